"""Training: what was stopped goes on as if it never had, ranks change nothing,
and mistakes end in one line."""
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build, randomise, tiny_clip_config, tiny_config
from PIL import Image
from torch.nn import functional as F

import bench_speed
import evaluate
import model as models
import sample
import train
from data import Shapes, to_float, to_square
from diffusion import make_alphas_cumprod

TIMINGS = ("images_per_s", "data_wait", "memory_gib", "mfu")
SMALL = ["--batch-size", "8", "--val", "8", "--log-every", "1", "--device", "cpu", "--sample-every", "1000"]


def start(folder: Path, *flags: str, ranks: int = 1) -> list[subprocess.Popen]:
    """The processes of one run, set up as torchrun sets them up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests/small_run.py"), *SMALL, *flags, "--out", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if ranks == 1:
        return [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 text=True)]
    env |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(ranks)]


def squares(samples) -> torch.Tensor:
    return to_float(torch.stack([torch.from_numpy(to_square(sample.image, 32)) for sample in samples]))


def finish(processes: list[subprocess.Popen]) -> str:
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:      # one that waits for another would wait for ever
            process.kill()
    assert all(process.returncode == 0 for process in processes), said
    return said[0]


def log_of(folder: Path, *without: str) -> list[dict]:
    """The lines of a run's log, its timings and other named fields left out."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS and k not in without} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    moments = {f"{i}.{k}": v for i, s in checkpoint["training"]["optimizer"]["state"].items()
               for k, v in s.items()}
    return {**checkpoint["model"], **{f"ema.{k}": v for k, v in checkpoint["ema"].items()}, **moments}


# ---------------------------------------------------------------- whole runs
@pytest.mark.parametrize("ranks", [1, 3])          # three: what more than two sum up rounds by its layout
def test_killed_at_any_step_and_resumed_is_never_stopped(tmp_path, ranks: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--steps", "30", "--save-every", "4", "--batch-size", "12"]
    said = finish(start(whole, *flags, ranks=ranks))
    assert said.index("retrieval on shapes") < said.index("checker on shapes"), \
        "validation must be the last word"

    stop_at = random.Random().randint(5, 25)          # a new step every time: any will do
    processes = start(killed, *flags, ranks=ranks)
    while (not (killed / "log.jsonl").exists()
           or len((killed / "log.jsonl").read_text().splitlines()) < stop_at):
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.002)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    left = log_of(killed)
    assert left[-1]["step"] < 30, "it was to be killed on the way"
    finish(start(killed, *flags, "--resume", ranks=ranks))

    assert log_of(killed) == log_of(whole), \
        f"killed at step {stop_at}: the log must be that of a run never stopped"
    expected, got = weights_of(whole), weights_of(killed)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), f"killed at step {stop_at}: {name} differs"
    losses = [line["loss"] for line in log_of(whole)]
    assert sum(losses[-5:]) < sum(losses[:5]), "a few steps must already help"


def test_two_ranks_are_one_process_with_the_same_global_batch(tmp_path) -> None:
    for ranks in (1, 2):
        finish(start(tmp_path / str(ranks), "--steps", "6", "--grad-clip", "0", ranks=ranks))
    one, two = (log_of(tmp_path / ranks) for ranks in "12")
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "loss_generation", "loss_alignment", "accuracy", "logit_scale"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), f"step {a['step']}: {name}"
        # Of the first step to 1e-5; later Adam, which divides by small numbers, has amplified the rounding.
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5 if a["step"] == 1 else 1e-4)


def test_both_tasks_alone(tmp_path) -> None:
    for task in train.TASKS:
        said = finish(start(tmp_path / task, "--steps", "3", "--tasks", task))
        assert (f"loss_{task}" in log_of(tmp_path / task)[0]) and not any(
            f"loss_{other}" in log_of(tmp_path / task)[0] for other in train.TASKS if other != task)
        assert ("retrieval on" in said, "checker on" in said) == (
            task == "alignment", task == "generation"), "validation must measure what was trained"


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, ranks: int, number: int) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--steps", "40", "--save-every", "1000", "--eval-every", "40", "--workers", "1"]
    finish(start(whole, *flags, ranks=ranks))
    processes = start(stopped, *flags, ranks=ranks)
    while not (stopped / "log.jsonl").exists() or len((stopped / "log.jsonl").read_text().splitlines()) < 5:
        time.sleep(0.002)
    processes[-1].send_signal(number)            # one rank is enough: they agree
    said = finish(processes)
    step = log_of(stopped)[-1]["step"]
    assert step < 40 and f"after step {step} of 40" in said and "--resume" in said, said
    assert "validation" not in said
    finish(start(stopped, *flags, "--resume", ranks=ranks))
    assert log_of(stopped) == log_of(whole), "the signal must have cost nothing"
    expected, got = weights_of(whole), weights_of(stopped)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def test_torchrun_recovers_from_a_killed_rank(tmp_path) -> None:
    flags = ["--steps", "30", "--save-every", "5", "--eval-every", "30"]
    finish(start(tmp_path / "whole", *flags, ranks=2))
    folder = tmp_path / "killed"
    agent = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "tests/small_run.py"),
         *SMALL, *flags, "--out", str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (folder / "log.jsonl").exists() or len((folder / "log.jsonl").read_text().splitlines()) < 8:
        assert agent.poll() is None, agent.communicate()[0]
        time.sleep(0.002)
    os.kill(children(agent.pid)[-1], signal.SIGKILL)
    said = finish([agent])
    assert "step: 5 of 30" in said or "step: 10 of 30" in said, f"it must go on from a checkpoint: {said}"
    assert log_of(folder) == log_of(tmp_path / "whole")
    expected, got = weights_of(tmp_path / "whole"), weights_of(folder)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_micro_batches_on_two_ranks_are_the_whole_batch_at_once(tmp_path) -> None:
    flags = ["--steps", "4", "--grad-clip", "0", "--batch-size", "16"]
    finish(start(tmp_path / "whole", *flags))
    finish(start(tmp_path / "parts", *flags, "--micro-batch", "2", ranks=2))
    for a, b in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True):
        for name in ("loss", "loss_generation", "loss_alignment", "accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), f"step {a['step']}: {name}"
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5 if a["step"] == 1 else 1e-4)


def test_a_clip_trains_alike_on_any_ranks_in_any_parts_and_resumed(tmp_path) -> None:
    """Random crops and RandAugment included."""
    flags = ["--model", "clip-tiny", "--augment", "--batch-size", "16", "--grad-clip", "0"]
    finish(start(tmp_path / "whole", *flags, "--steps", "4"))
    finish(start(tmp_path / "parts", *flags, "--steps", "4", "--micro-batch", "4", ranks=2))
    for a, b in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True):
        for name in ("loss", "loss_alignment", "accuracy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), f"step {a['step']}: {name}"
        assert "loss_generation" not in a and "loss_alignment_by_t" not in a
    flags += ["--steps", "60", "--save-every", "1000", "--eval-every", "60"]
    finish(start(tmp_path / "long", *flags))
    processes = start(tmp_path / "stopped", *flags)
    while not (tmp_path / "stopped/log.jsonl").exists() or len(log_of(tmp_path / "stopped")) < 2:
        time.sleep(0.002)
    processes[0].send_signal(signal.SIGTERM)
    finish(processes)
    assert log_of(tmp_path / "stopped")[-1]["step"] < 60, "else nothing was resumed"
    finish(start(tmp_path / "stopped", *flags, "--resume"))
    expected, got = weights_of(tmp_path / "long"), weights_of(tmp_path / "stopped")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


# ---------------------------------------------------------------- in this process
@pytest.fixture()
def small(monkeypatch, tmp_path):
    """`small(flags)` gives the parsed flags of a run of the small networks in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.PRESETS, "tiny", tiny_config())
    monkeypatch.setitem(models.CLIPS, "clip-tiny", tiny_clip_config())
    monkeypatch.setattr(train.Trainer, "validate", lambda self: None)
    return lambda *flags: train.parse_args([*SMALL, "--steps", "2", "--out", "run", *flags])


ABLATIONS = [("--no-fusion", "fusion.fusion", False),
             ("--no-shared-attention", "fusion.shared_attention", False),
             ("--no-own-ffn", "fusion.own_ffn", False), ("--align-blocks 3", "fusion.align_blocks", 3),
             ("--text-target noise", "text_target", "noise"),
             ("--image-target noise", "image_target", "noise"),
             ("--text-schedule linear", "text_schedule", "linear"), ("--gamma 0.5", "gamma", 0.5),
             ("--image-schedule cosine", "image_schedule", "cosine"),
             ("--condition-timestep 0", "condition_timestep", 0),
             ("--tasks generation", None, None), ("--tasks alignment", None, None),
             ("--no-train-text-encoder", None, None)]


@pytest.mark.parametrize("flags, field, value", ABLATIONS, ids=[a[0] for a in ABLATIONS])
def test_every_ablation_reaches_the_network_and_trains_all_of_it(small, flags: str, field, value) -> None:
    args = small(*flags.split())
    train.settle(args, torch.device("cpu"))
    trainer = train.Trainer(args, 0, 1, torch.device("cpu"))
    if field:
        holder = trainer.model.config
        for part in field.split("."):
            holder = getattr(holder, part)
        assert holder == value, f"{flags} must arrive in the checkpoint's configuration"
    batch = next(trainer.batches())
    losses = [trainer.train_step(batch)["loss"] for _ in range(8)]
    assert all(map(math.isfinite, losses))
    without = [name for name, p in trainer.averages.live.items() if p.grad is None]
    assert not without, f"DDP would wait forever for the gradients of {without}"
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    if "tasks" not in flags and "text-encoder" not in flags:
        assert not frozen, "joint training from scratch trains everything"


def test_a_clip_trains_all_of_itself_by_its_own_recipe(small, tmp_path) -> None:
    args = small("--model", "clip-tiny")
    train.settle(args, torch.device("cpu"))
    assert args.tasks == ("alignment",) and args.lr == 1e-3 and args.weight_decay == 0.1
    assert not args.augment, "RandAugment would make captions about colours and places untrue"
    photographs = small("--model", "clip-tiny", "--data", "photographs")
    train.settle(photographs, torch.device("cpu"))
    assert photographs.augment
    assert args.batch_size == 8 and train.RECIPES["clip-vit-b32"]["batch_size"] == 1024
    trainer = train.Trainer(args, 0, 1, torch.device("cpu"))
    trainer.train()
    assert not [name for name, p in trainer.model.named_parameters() if p.grad is None]
    loaded = models.load(tmp_path / "run/checkpoint.pt")
    assert isinstance(loaded, models.Clip) and loaded.tasks == ("alignment",) and loaded.data == "shapes"
    assert trainer.flops == pytest.approx(bench_speed.clip_flops(trainer.model.config, 8))
    images = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8)
    tokens = loaded.tokenizer(["a red circle", "a", "a green cross", "b", "c", "d"])
    model, pixels = trainer.model, loaded.read_batch(images)
    losses = train.backward(train.ClipLoss(model, args), [(pixels, tokens, {})], 1.0)
    with torch.no_grad():
        ours, texts = model.encode_image(pixels), model.encode_tokens(tokens)
        logits, truth = model.logit_scale.exp() * ours @ texts.T, torch.arange(6)
        slow = (F.cross_entropy(logits, truth)
                + F.cross_entropy(logits.T, truth)) / 2
    assert losses["alignment"].mean().item() == pytest.approx(slow.item(), rel=1e-5)


def test_a_run_remembers_what_it_was_trained_for(small, tmp_path, capsys) -> None:
    for tasks, command in (("generation", ["evaluate", "zeroshot"]),
                           ("alignment", ["sample", "a red circle"])):
        args = small("--tasks", tasks)
        args.out = tasks
        train.settle(args, torch.device("cpu"))
        train.Trainer(args, 0, 1, torch.device("cpu")).train()
        checkpoint = str(tmp_path / tasks / "checkpoint.pt")
        assert models.load(checkpoint).tasks == (tasks,)
        program = {"evaluate": evaluate, "sample": sample}[command[0]]
        with pytest.raises(SystemExit) as stop:
            program.main([*command[1:], "--ckpt", checkpoint, "--device", "cpu"])
        assert stop.value.code == 2 and "images" in capsys.readouterr().err
        joint = train.parse_args([*SMALL, "--steps", "1", "--init", checkpoint])
        assert set(train.make_model(joint, Shapes(), None).tasks) == set(train.TASKS), \
            "what it was trained for before, and what it is trained for now"


def gradients_of(model, args, parts) -> tuple[dict, dict]:
    """Losses and gradients of one batch in these parts."""
    model.zero_grad()
    losses = train.backward(train.JointLoss(model, args), parts, 0.7)
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tasks", ["generation,alignment", "generation", "alignment"])
@pytest.mark.parametrize("dtype, sizes, limit", [(torch.float64, [3, 3, 2], 1e-10),
                                                 (torch.float32, [4, 4], 1e-5)])
def test_parts_and_recomputed_activations_change_nothing(small, tasks, dtype, sizes, limit) -> None:
    """The alignment loss is over the whole batch, however it is cut; the largest error of a gradient in
    shares of the norm of all."""
    args = small("--tasks", tasks)
    train.settle(args, torch.device("cpu"))
    model = build().to(dtype).requires_grad_(True)
    train.freeze_unused(model, args.tasks, True)
    drawn = train.draw(model.config, model.latent_shape(32, 32), 0, 0, range(8))
    latents = model.encode_image(squares(Shapes().read(i) for i in range(8)))
    tokens = model.tokenizer([Shapes().captions(i)[0] for i in range(8)])
    whole, expected = gradients_of(model, args, [(latents, tokens, drawn)])
    cut = {name: value.split(sizes) for name, value in drawn.items()}
    parts = [(some, words, {name: value[i] for name, value in cut.items()})
             for i, (some, words) in enumerate(zip(latents.split(sizes), tokens.split(sizes)))]
    args.recompute = True
    for case in ([(latents, tokens, drawn)], parts):
        losses, got = gradients_of(model, args, case)
        assert losses.keys() == whole.keys() and got.keys() == expected.keys()
        for name, value in whole.items():
            assert torch.allclose(value.float(), losses[name].float(), atol=1e-5), name
        size = torch.stack([g.norm() for g in expected.values()]).norm()
        worst = max((got[name] - expected[name]).norm() / size for name in expected)
        assert worst < limit, f"a gradient is off by {worst} of the whole"
    if "alignment" in whole:
        alone, _ = gradients_of(model, args, parts[:1])
        assert not torch.allclose(alone["alignment"], whole["alignment"][:sizes[0]], atol=1e-2), \
            "a part's own InfoNCE is another loss: else this test would show nothing"


def test_recomputing_keeps_a_fraction_of_the_activations() -> None:
    model, kept = build(), {}
    drawn = train.draw(model.config, model.latent_shape(32, 32), 0, 0, range(4))
    for recompute in (False, True):
        if recompute:
            model.unet.recompute_activations()
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.requires_grad_(True).denoise_image(drawn["noise"], drawn["t_image"],
                                                     model.encode_text(["a"] * 4)[0])
        kept[recompute] = total
    assert kept[True] < 0.5 * kept[False], kept


@pytest.mark.parametrize("tasks", ["generation,alignment", "generation", "alignment"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_compiled_networks_have_no_graph_breaks(small, tasks: str, recompute: bool) -> None:
    """One graph each, fixed shapes, compiled once (with the compiler's tracing, not its code generation)."""
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    args, model = small("--tasks", tasks), build().requires_grad_(True)
    train.settle(args, torch.device("cpu"))
    args.recompute, counter = recompute, CompileCounter()
    joint = train.JointLoss(model, args)
    for name in ("denoise_image", "denoise_query", "denoise_both", "encode_text", "encode_image"):
        setattr(joint, name, torch.compile(getattr(joint, name), backend=counter, dynamic=False,
                                           fullgraph=True))
    for step in range(3):
        drawn = train.draw(model.config, model.latent_shape(32, 32), 0, step, range(4))
        pixels = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
        latents = joint.encode(pixels, drawn)
        train.backward(joint, [(latents, model.tokenizer(["a red circle"] * 4), drawn)], 1.0)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert counter.frame_count == 3, f"{counter.frame_count} compilations: UNet, text encoder, autoencoder"
    torch._dynamo.reset()


def test_bfloat16_is_for_products_only(small) -> None:
    args = small("--precision", "bf16")
    train.settle(args, torch.device("cpu"))
    trainer = train.Trainer(args, 0, 1, torch.device("cpu"))
    randomise(trainer.model)
    batch, losses = next(trainer.batches()), {}
    for bf16 in (True, False):
        trainer.joint.bf16 = bf16
        losses[bf16] = train.backward(trainer.joint, trainer.split(batch), 1.0)
        assert all(losses[bf16][task].dtype == torch.float32 for task in train.TASKS)
    for task in train.TASKS:
        assert not torch.equal(losses[True][task], losses[False][task]), "bf16 was not used"
        assert torch.allclose(losses[True][task], losses[False][task], rtol=0.05, atol=0.05), task
    trainer.joint.bf16 = True
    trainer.train_step(batch)
    kept = [*trainer.averages.live.values(), *trainer.averages.values.values(),
            *(p.grad for p in trainer.averages.live.values()),
            *(v for state in trainer.optimizer.state.values() for v in state.values())]
    assert all(value.dtype == torch.float32 for value in kept), \
        "weights, gradients, moments and averages are float32"


def test_the_flops_of_a_step_are_those_of_running_it(small) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    for tasks in ("generation,alignment", "generation", "alignment"):
        args = small("--tasks", tasks)
        train.settle(args, torch.device("cpu"))
        trainer = train.Trainer(args, 0, 1, torch.device("cpu"))
        batch = next(trainer.batches())
        # The counter knows attention by its parts, not the processor's fused kernel.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            train.backward(trainer.joint, trainer.split(batch), 1.0)
        assert counter.get_total_flops() / 8 == pytest.approx(trainer.flops, rel=0.02), tasks
        (Path("run") / "checkpoint.pt").unlink()


def test_peaks_are_known_by_name_or_not_at_all(monkeypatch) -> None:
    cuda = torch.device("cuda")
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12),
                       ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12),
                       ("NVIDIA L40S", 362e12), ("Radeon", None), ("NVIDIA T400", None),
                       ("NVIDIA H100 NVL", 835e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert train.peak_flops(cuda) == peak, name
    assert train.peak_flops(torch.device("cpu")) is None, "no guess where the table has no number"


def test_the_log_tells_what_an_owner_asks(small) -> None:
    train.main([*SMALL, "--steps", "4", "--log-every", "2", "--eval-every", "2", "--out", "run"])
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert {"loss", "loss_generation", "loss_alignment", "accuracy", "logit_scale", "grad_norm", "lr",
                "images_per_s", "data_wait", "memory_gib", "mfu", "skipped", "skipped_by_cause", "val_i2t_r1",
                "val_t2i_r1"} <= line.keys()
        assert 0 <= line["data_wait"] <= 1 and line["mfu"] is None and line["memory_gib"] > 0
        for task in train.TASKS:
            assert len(line[f"loss_{task}_by_t"]) == train.BINS
    picture = Image.open("run/log.png")
    assert picture.width > 300 and len(picture.convert("RGB").getcolors(100000)) > 3
    models.load("run/best.pt")


def test_losses_are_binned_by_their_timesteps() -> None:
    meter = train.Meter(torch.device("cpu"))
    t = torch.tensor([0, 249, 250, 999])
    meter.add_losses({"generation": torch.tensor([1.0, 2.0, 5.0, 7.0])}, {"t_image": t}, 1000)
    meter.add_losses({"generation": torch.tensor([1.0, 2.0, 5.0, 7.0])}, {"t_image": t}, 1000)
    read = meter.read(4, 1e9)
    assert read["generation_sums"].tolist() == [6, 10, 0, 14]
    assert read["generation_counts"].tolist() == [4, 2, 0, 2]
    assert meter.read(4, 1e9)["generation_counts"].sum() == 0, "every line starts anew"


def test_older_checkpoints_are_kept_as_told_and_the_best(small) -> None:
    train.main([*SMALL, "--steps", "10", "--save-every", "2", "--keep", "3", "--eval-every", "5",
                "--out", "run"])
    kept = {path.name: torch.load(path, weights_only=True)["training"]["step"]
            for path in Path("run").glob("*.pt")}
    best = kept.pop("best.pt")
    assert best in (5, 10)
    assert len(kept) == 3 and kept.pop("checkpoint.pt") == 10
    assert all(name == f"checkpoint-{step:06d}.pt" for name, step in kept.items()), kept
    assert not list(Path("run").glob("*.part"))


def test_a_resumed_run_knows_its_best(small) -> None:
    flags = [*SMALL, "--steps", "6", "--save-every", "3", "--eval-every", "3", "--out", "run"]
    train.main(flags)
    trained = torch.load("run/checkpoint.pt", weights_only=True)["training"]
    args = train.parse_args([*flags, "--resume"])
    train.settle(args, torch.device("cpu"))
    os.remove("run/best.pt")
    trainer = train.Trainer(args, 0, 1, torch.device("cpu"))
    assert [trainer.best, trainer.best_step] == list(trained["best"]) and trainer.best >= 0
    assert Path("run/best.pt").exists() == (trainer.best_step == 6), "killed before the best got its name"


@pytest.mark.parametrize("log", ["", "{oops\n", '{"a": 1}\n[]\n'])
def test_a_damaged_log_stops_nothing(small, log: str) -> None:
    flags = [*SMALL, "--steps", "2", "--out", "run"]
    train.main(flags)
    Path("run/log.jsonl").write_text(log)
    train.main([*flags, "--resume"])


def test_a_mistake_costs_no_name(small, capsys) -> None:
    for flags in (["--data", "nowhere"], ["--image-size", "33"]):
        with pytest.raises(SystemExit):
            train.main([*SMALL, "--steps", "2", *flags])
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_a_restart_by_torchrun_goes_on_with_its_own_run(small, monkeypatch) -> None:
    def run(name: str, count: int) -> Path:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        args = small()
        args.out = None
        return train.Run(args, 0).folder
    first, second = run("a", 0), run("b", 0)
    assert first != second
    models.save(second / "checkpoint.pt", build())
    assert run("a", 1) == first, "another run's checkpoint is not this one's"
    assert run("b", 1) == second and run("c", 1) not in (first, second)


def test_what_is_there_and_what_is_lost_is_said_first(small, tmp_path, capsys) -> None:
    for i in range(6):
        Image.new("RGB", (40, 40), (4 * i, 90, 90)).save(tmp_path / f"{i}.jpg")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}") if i else None
    train.main([*SMALL, "--data", str(tmp_path), "--steps", "1", "--workers", "0", "--max-bad", "0.5",
                "--out", "run"])
    said = capsys.readouterr()
    assert "5 samples" in said.out and "1 no caption" in said.out and "holds some twice" in said.err


def test_older_checkpoints_are_sorted_by_number(small) -> None:
    run = train.Run(small(), 0)
    for step in (999_500, 1_000_000, 2):
        (run.folder / f"checkpoint-{step:06d}.pt").touch()
    assert [path.name for path in run.older()][-1] == "checkpoint-1000000.pt"


def test_what_cannot_be_written_is_found_before_training(small, monkeypatch, capsys, tmp_path) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, "--out", "run", "--steps", "2"])
    assert stop.value.code == 2 and "make room" in capsys.readouterr().err
    assert not Path("run").exists()
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, "--out", str(tmp_path / "file/run"), "--steps", "2"])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_micro_batches_that_do_not_fit_are_refused(small, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, "--out", "run", "--micro-batch", "3"])
    assert stop.value.code == 2 and "--micro-batch 3" in capsys.readouterr().err


def slow_losses(model, args, images, tokens, drawn) -> tuple[list, list]:
    """Algorithm 1 pair by pair, as the paper writes it, for noise as the image's target."""
    config, generation, queries = model.config, [], []
    null, texts = model.text_encoder(model.tokenizer([""]))[0], model.text_encoder(tokens)[1]
    for i in range(len(images)):
        z, c = model.encode_image(images[i:i + 1]), model.text_encoder(tokens[i:i + 1])[0]
        t = drawn["t_image"][i:i + 1]
        alpha_bar = make_alphas_cumprod(config.image_schedule, 1000)[t].float()
        z_t = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * drawn["noise"][i]
        c = null if drawn["u"][i, 0] < args.p_uncond else c
        generation.append(((model.denoise_image(z_t, t, c) - drawn["noise"][i]) ** 2).mean())
        t = drawn["t_text"][i:i + 1]
        alpha_bar = make_alphas_cumprod(config.text_schedule, 1000)[t].float()
        e_t = (config.gamma * alpha_bar.sqrt() * texts[i].detach()
               + (1 - alpha_bar).sqrt() * drawn["query_noise"][i])
        z = torch.zeros_like(z) if drawn["u"][i, 1] < args.p_drop_image else z
        pred, a, s = model.denoise_query(e_t, t, z), config.gamma * alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        e_0 = {"data": pred, "noise": (e_t - s * pred) / a, "v": (a * e_t - s * pred) / (a * a + s * s)}
        queries.append(F.normalize(e_0[config.text_target], dim=-1)[0])
    similarity = model.logit_scale.exp() * torch.stack(queries) @ texts.T
    alignment = [(similarity[i].logsumexp(0) + similarity[:, i].logsumexp(0)) / 2 - similarity[i, i]
                 for i in range(len(images))]
    return generation, alignment


@pytest.mark.parametrize("text_target", ["data", "noise", "v"])
def test_the_loss_and_its_gradient_are_algorithm_1(small, text_target: str) -> None:
    model = build(tiny_config(gamma=0.5, image_target="noise", image_schedule="linear",
                              text_schedule="cosine", text_target=text_target)).requires_grad_(True)
    args = small("--p-uncond", "0.3", "--p-drop-image", "0.3")
    train.settle(args, torch.device("cpu"))
    pairs = [Shapes().read(i) for i in range(4)]
    images = squares(pairs)
    tokens = model.tokenizer([pair.captions[0] for pair in pairs])
    drawn = train.draw(model.config, model.latent_shape(32, 32), 0, 0, range(4))
    drawn["u"] = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.9, 0.9], [0.9, 0.9]])     # one of each dropped
    slow = dict(zip(train.TASKS, map(torch.stack, slow_losses(model, args, images, tokens, drawn))))
    (slow["generation"].mean() + 0.7 * slow["alignment"].mean()).backward()
    gradients = [None, {name: p.grad.clone() for name, p in model.named_parameters()}]
    model.zero_grad()
    fast = train.backward(train.JointLoss(model, args), [(model.encode_image(images), tokens, drawn)], 0.7)
    gradients[0] = {name: p.grad for name, p in model.named_parameters()}
    for task in train.TASKS:
        assert torch.allclose(fast[task], slow[task], atol=1e-4), f"{task} is not the paper's loss"
    total = torch.stack([gradient.norm() for gradient in gradients[1].values()]).norm()
    for name, expected in gradients[1].items():
        error = (gradients[0][name] - expected).norm() / expected.norm().clamp(min=0.01 * total)
        assert error < 1e-3, f"the gradient of {name} is not that of the paper's loss: off by {error}"


def test_a_step_weighs_the_tasks_follows_the_rate_and_averages_the_weights(small) -> None:
    args = small("--align-weight", "0.7", "--warmup", "4", "--lr", "1e-3", "--ema", "0.6", "--steps", "20")
    train.settle(args, torch.device("cpu"))
    trainer = train.Trainer(args, 0, 1, torch.device("cpu"))
    name, parameter = next(iter(trainer.averages.live.items()))
    average, batches = parameter.detach().clone(), trainer.batches()
    for step in range(3):
        record = trainer.train_step(next(batches))
        expected = record["loss_generation"] + 0.7 * record["loss_alignment"]
        assert abs(record["loss"] - expected) < 1e-5
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (step + 1) / 4)
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * parameter.detach()
    assert torch.allclose(trainer.averages.values[name], average, atol=1e-6)
    assert not torch.equal(average, parameter), "what is averaged must lag behind"
    live = parameter.detach().clone()
    trainer.averages.swap()
    assert torch.allclose(parameter, average, atol=1e-6), "pictures are drawn with the averages"
    trainer.averages.swap()
    assert torch.equal(parameter, live)
    rates = [train.learning_rate_factor(step, args) for step in (0, 3, 4, 12, 20)]
    assert rates == pytest.approx([0.25, 1, 1, 0.5, 0]), "warm-up, then half a cosine to nothing"


def test_generation_leaves_the_query_stream_alone_and_alignment_the_decoder(small) -> None:
    model = build()
    for task, untouched in (("generation", models.is_new),
                            ("alignment", lambda n: n.startswith("unet.up_blocks"))):
        train.freeze_unused(model.requires_grad_(True), (task,), True)
        for name, parameter in model.named_parameters():
            assert not (untouched(name) and parameter.requires_grad), name


def test_optimizer_groups(small) -> None:
    args = small("--lr", "3e-4", "--lr-pretrained", "1e-5", "--weight-decay", "0.1")
    model = build()
    rate = {id(p): (g["peak_lr"], g["weight_decay"])
            for g in train.make_optimizer(model, args, True).param_groups for p in g["params"]}
    assert len(rate) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = (3e-4 if models.is_new(name) else 1e-5, 0.1 if parameter.dim() >= 2 else 0.0)
        assert rate[id(parameter)] == expected, name


def test_starting_from_another_checkpoint_keeps_its_weights_and_vocabulary(small, tmp_path) -> None:
    start = build()
    start.data = "shapes"
    models.save(tmp_path / "start.pt", start)
    args = small("--init", "start.pt", "--steps", "1", "--lr", "0", "--lr-pretrained", "0")
    train.settle(args, torch.device("cpu"))
    trainer = train.Trainer(args, 0, 1, torch.device("cpu"))
    trainer.train()
    end = models.load(tmp_path / "run/checkpoint.pt")
    for name, value in start.state_dict().items():
        assert torch.equal(value, end.state_dict()[name]), name
    assert end.tokenizer.merges == start.tokenizer.merges and end.data == "shapes"


def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoint(small, tmp_path, capsys) -> None:
    flags = [*SMALL, "--out", "run", "--save-every", "2", "--lr", "1e30", "--warmup", "3", "--grad-clip", "0"]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--steps", "50"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (stop.value.code == 2 and "not finite" in error and "timesteps" in error
            and "shapes-train-" in error)
    if (tmp_path / "run/checkpoint.pt").exists():
        models.load(tmp_path / "run/checkpoint.pt")


@pytest.mark.parametrize("flags, message", [
    ("--data nowhere", "no data at nowhere"), ("--data empty", "empty"), ("--steps 0", "--steps"),
    ("--lr nan", "--lr"), ("--tasks drawing", "generation, alignment"), ("--batch-size 1", "pairs"),
    ("--gamma 2", "gamma"), ("--p-uncond 1.5", "--p-uncond"), ("--align-blocks -1", "--align-blocks"),
    ("--no-fusion --no-own-ffn", "without fusion"), ("--align-weight inf", "finite"), ("--seed -3", "--seed"),
    ("--init start.pt --tokenizer start.pt", "--tokenizer"), ("--image-size 1600000", "up to"),
    ("--init nowhere.pt", "nowhere.pt"), ("--image-size 33", "multiple"),
    ("--condition-timestep 5000", "condition_timestep"), ("--preset huge", "--preset"),
    ("--tokenizer nowhere", "no vocabulary"), ("--resume", "--steps was 2, is 3"), ("", "--resume"),
    ("--model clip-tiny --gamma 0.5", "--gamma"), ("--model clip-tiny --tasks generation", "only reads"),
    ("--augment", "--augment"), ("--stpes 3", "--stpes")])
def test_mistakes_end_in_one_line_and_status_2(small, tmp_path, capsys, flags: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    base = [*SMALL, "--out", "run", "--steps", "2"]
    if flags in ("", "--resume"):
        train.main(base)
        base[-1] = "3" if flags else "2"
        capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*base, *flags.split()])
    error = capsys.readouterr().err.strip()
    assert (stop.value.code == 2 and message in error and error.startswith("error: ")
            and "\n" not in error), error
    assert flags in ("", "--resume") or not (tmp_path / "run/checkpoint.pt").exists()


def test_resuming_keeps_only_the_log_lines_that_will_not_be_written_again(small, tmp_path) -> None:
    run = train.Run(small(), 0)
    lines = [json.dumps({"step": step}) for step in range(1, 6)]
    run.log.write_text("\n".join([*lines, '{"step": 6, "lo']))          # killed in the middle of a line
    run.start_log(3)
    assert run.log.read_text().splitlines() == lines[:3]


def test_runs_do_not_overwrite_each_other(small, tmp_path) -> None:
    args = small("--data", "shapes")
    args.out = None
    first = train.Run(args, 0)
    assert train.Run(args, 0).folder == Path("runs/shapes-tiny-2"), "a folder is taken from its start"
    models.save(first.checkpoint, build())
    args.resume = True
    assert train.Run(args, 0).folder == first.folder, "to resume is to go on with the newest run"


def test_a_held_out_sample_without_a_caption_is_no_end_of_training(small, tmp_path) -> None:
    for i in range(60):
        Image.new("RGB", (40, 40), (4 * i, 90, 90)).save(tmp_path / f"{i:02d}.jpg")
        (tmp_path / f"{i:02d}.txt").write_text("" if i == 0 else f"picture {i}")
    train.main([*SMALL, "--data", str(tmp_path), "--workers", "1", "--steps", "2", "--out", "run"])
    assert (tmp_path / "run/samples/step_000002.png").exists()


def test_nothing_usable_is_said_in_one_line_even_from_a_worker(small, tmp_path, capsys) -> None:
    (tmp_path / "data").mkdir()
    for i in range(60):
        (tmp_path / f"data/{i:02d}.jpg").write_bytes(b"no picture")
        (tmp_path / f"data/{i:02d}.txt").write_text(f"picture {i}")
    flags = ["--data", "data", "--workers", "1", "--steps", "2", "--out", "run", "--max-bad", "1"]
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "100 unusable samples in a row" in error and "Traceback" not in error


def test_draws_depend_on_seed_step_and_row_alone() -> None:
    config = tiny_config()
    whole = train.draw(config, (4, 2, 2), 1, 7, range(6))
    odd = train.draw(config, (4, 2, 2), 1, 7, range(1, 6, 2))
    for name in whole:
        assert torch.equal(whole[name][1::2], odd[name]), name
        assert not torch.equal(whole[name], train.draw(config, (4, 2, 2), 1, 8, range(6))[name])


def test_each_seed_sees_its_own_shapes() -> None:
    first = [next(train.training_batches(Shapes(), 32, 8, seed)).captions for seed in (0, 1, 2)]
    assert first[0] != first[1] != first[2] != first[0]
