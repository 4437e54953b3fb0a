"""Training: what was stopped goes on as if it never had, ranks change nothing,
and mistakes end in one line."""
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build, error_of, randomise, tiny_clip_config, tiny_config
from PIL import Image
from test_sources import captions_of
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import evaluate
import model as models
import sample
import train
from data import Shapes, to_float, to_square
from diffusion import make_alphas_cumprod
from fusion import SpatialTransformer
from model import ClipLayer, ResBlock, UNetConfig

SMALL = ["--batch-size", "8", "--val", "8", "--device", "cpu",
         "--eval-every", "1000"]          # scores only after the last step
SMALL_RUN = str(Path(__file__).with_name("small_run.py"))
CLIP = ["--preset", "clip-tiny", "--augment"]
TIMEOUT = 300             # seconds without a new line in the log: it hangs


# ---------------------------------------------------------------- whole runs
def launch(ranks: int, folder: Path, *flags) -> subprocess.Popen:
    """A run, of several ranks under torchrun; what it says goes to a file beside its folder."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1",
                "--nproc_per_node", str(ranks), "--max-restarts", "9"] if ranks > 1 else []
    threads = str(torch.get_num_threads() if ranks == 1 else 1)        # sums round by it: as in this process
    command = [sys.executable, *torchrun, SMALL_RUN, *SMALL, "--out", str(folder), *flags]
    with folder.with_suffix(".said").open("a") as said:
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                env={**os.environ, "OMP_NUM_THREADS": threads})


def ranks_of(job: subprocess.Popen) -> list[int]:
    """The processes that train; a rank's own children read its data."""
    if "torch.distributed.run" not in job.args:
        return [job.pid]
    listed = subprocess.check_output(["ps", "-o", "pid=,args=", "--ppid", str(job.pid)], text=True)
    return [int(line.split()[0]) for line in listed.splitlines() if SMALL_RUN in line]


def finish(job: subprocess.Popen, folder: Path, lines: float = math.inf) -> str:
    """Wait for a run's end, or for so many lines of its log -> what it has said."""
    log, count, changed = folder / "log.jsonl", -1, time.monotonic()
    while job.poll() is None and count < lines:
        time.sleep(0.01)
        before, count = count, log.read_bytes().count(b"\n") if log.exists() else 0
        changed = changed if count == before else time.monotonic()
        if time.monotonic() - changed > TIMEOUT:
            job.kill()
            pytest.fail(f"{folder.name} hangs")
    said = folder.with_suffix(".said").read_text()
    assert not job.returncode, said[-3000:]
    return said


def log_of(folder: Path) -> list[dict]:
    """A run's log, but for timings, and what a resumed run counts anew."""
    free = ("images_per_s", "data_wait", "skipped")
    return [{name: value for name, value in line.items() if name not in free}
            for line in train.read_log(folder / "log.jsonl")]


def flat(value, name: str = "") -> dict:
    """Everything in nested dicts and lists, by name; tensors as bytes: NaN equals itself, and 0 is not -0."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f"{name}.{key}").items()}
    return {name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


def assert_same(run: Path, other: Path) -> None:
    """The same numbers in both logs, and the same bits in both checkpoints."""
    for line, expected in zip(log_of(run), log_of(other), strict=True):
        assert line == expected
    ours, expected = (flat(torch.load(path / "checkpoint.pt", weights_only=True)) for path in (run, other))
    assert ours.keys() == expected.keys()
    assert not [name for name, value in ours.items() if value != expected[name]]


@pytest.fixture()
def small(monkeypatch, tmp_path):
    """`small(flags)` is a Trainer of the small networks, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.PRESETS, "tiny", tiny_config())
    monkeypatch.setitem(models.CLIPS, "clip-tiny", tiny_clip_config())
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "checker", partial(evaluate.checker, n=4))
    torch.backends.cuda.enable_flash_sdp(True)          # an earlier test may have trained in bf16
    return lambda *flags: train.Trainer(train.parse_args([*SMALL, "--steps", "2", "--out", "run", *flags]),
                                        0, 1, torch.device("cpu"))


def whole_run(ranks: int, folder: Path, *flags) -> None:
    """A whole run: of one rank in this process, whose networks the fixture `small` has made small."""
    if ranks == 1:
        train.main([*SMALL, "--out", str(folder), *flags])
    else:
        finish(launch(ranks, folder, *flags), folder)


@pytest.mark.parametrize("flags, ranks, number", [
    (["--workers", "1"], 1, signal.SIGINT), (CLIP, 1, signal.SIGTERM),
    ([], 3, signal.SIGTERM)], ids=str)             # three: what more than two sum up rounds by its layout
def test_killed_then_stopped_and_resumed_is_never_stopped(small, tmp_path, flags, ranks, number) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*flags, "--steps", "40", "--save-every", "8", "--batch-size", "12"]
    whole_run(ranks, whole, *flags)
    job = launch(ranks, stopped, *flags)
    finish(job, stopped, lines=random.randint(9, 13))         # a new step every time: any will do
    os.kill(ranks_of(job)[-1], signal.SIGKILL)
    if ranks == 1:                     # there is no torchrun to start it again
        job.wait()
        job = launch(1, stopped, *flags, "--resume")
    finish(job, stopped, lines=25)                # of the second start: killed, it had not come so far
    os.kill(ranks_of(job)[-1], number)            # one rank is enough: they agree
    said, step = finish(job, stopped), log_of(stopped)[-1]["step"]
    begun = re.findall(r"step: (\d+) of 40", said)
    assert len(begun) == 2 and 8 <= int(begun[1]) < 25, "it was to be killed on the way, and to go on"
    assert step < 40 and f"after step {step} of 40" in said and "--resume" in said, said
    assert " on shapes" not in said, "no scores of half a run"
    saved = torch.load(stopped / "checkpoint.pt", weights_only=True)["training"]["step"]
    assert saved == step, "what was learnt since the last checkpoint is lost"
    whole_run(ranks, stopped, *flags, "--resume")
    assert_same(stopped, whole)
    if ranks > 1:
        assert "checker on shapes" in stopped.with_suffix(".said").read_text()
    losses = [line["loss"] for line in log_of(whole)]
    assert sum(losses[-5:]) < sum(losses[:5]), "a few steps must already help"


@pytest.mark.parametrize("flags, micro_batch, ranks", [([], 2, 2), ([], 4, 1), (CLIP, 4, 2)], ids=str)
def test_ranks_and_micro_batches_change_nothing(small, tmp_path, flags, micro_batch, ranks) -> None:
    """Random crops and RandAugment included."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    flags = [*flags, "--steps", "6", "--eval-every", "3", "--batch-size", "16", "--precision", "fp32"]
    whole_run(1, whole, *flags)
    whole_run(ranks, shared, *flags, "--micro-batch", str(micro_batch))
    for a, b in zip(log_of(whole), log_of(shared), strict=True):
        for name in {"loss", "loss_generation", "loss_alignment", "accuracy", "logit_scale"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), f"step {a['step']}: {name}"
        # Of the first step to 1e-5; later Adam, which divides by small numbers, has amplified the rounding.
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5 if a["step"] == 1 else 1e-3)


# ---------------------------------------------------------------- one trainer
def fail_of(capsys, *flags: str) -> str:
    return error_of(capsys, train.main, [*SMALL, "--steps", "2", *flags], alone=False)


@pytest.mark.parametrize("flags", [
    "--no-fusion", "--no-shared-attention", "--no-own-ffn", "--align-blocks 3", "--text-target noise",
    "--text-schedule linear", "--image-schedule cosine", "--gamma 0.5", "--condition-timestep 0",
    "--image-size 16", "--tasks generation", "--tasks alignment", "--no-train-text-encoder"])
def test_every_ablation_reaches_the_network_and_trains_all_of_it(small, flags: str) -> None:
    trainer = small(*flags.split())
    name, *value = flags.removeprefix("--no-").removeprefix("--").replace("-", "_").split()
    before, after = (flat(asdict(config)) for config in (tiny_config(), trainer.model.config))
    changed = {key.rsplit(".")[-1]: str(after[key]) for key in after if after[key] != before[key]}
    expected = {} if name in ("tasks", "train_text_encoder") else {name: (value or ["False"])[0]}
    assert {**changed, "vocab_size": 0} == {**expected, "vocab_size": 0}, \
        f"{flags} must arrive in the checkpoint's configuration, and nothing else"
    batch = next(trainer.batches())
    assert all(math.isfinite(trainer.train_step(batch)["loss"]) for _ in range(3))
    without = [name for name, p in trainer.averages.live.items() if p.grad is None]
    assert not without, f"DDP would wait forever for the gradients of {without}"
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    if "tasks" not in flags and "text-encoder" not in flags:
        assert not frozen, "joint training from scratch trains everything"


def test_a_clip_trains_all_of_itself_by_its_own_recipe(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(train.RECIPES["clip-tiny"], "muon", 0)       # as the larger ones'
    trainer = small("--preset", "clip-tiny")
    args, model = trainer.args, trainer.model
    assert args.tasks == ["alignment"] and args.weight_decay == 0.1 and args.batch_size == 8
    assert not args.augment, "RandAugment would make captions about colours and places untrue"
    trainer.train()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    loaded = models.load(tmp_path / "run/checkpoint.pt")
    assert isinstance(loaded, models.Clip) and loaded.tasks == ("alignment",) and loaded.data == "shapes"
    images = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8)
    tokens = loaded.tokenizer(["a red circle", "a", "a green cross", "b", "c", "d"])
    losses = train.backward(train.ClipLoss(model), [(images, tokens, {})], 1.0)
    with torch.no_grad():
        queries, texts = model.encode_image(loaded.read_batch(images)), model.encode_tokens(tokens)
        logits, truth = model.logit_scale.exp() * queries @ texts.T, torch.arange(6)
        slow = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    assert losses["alignment"].mean().item() == pytest.approx(slow.item(), rel=1e-5)


def test_a_run_remembers_what_it_was_trained_for(small, tmp_path, capsys) -> None:
    for tasks, program, words, score in (("generation", evaluate, ["zeroshot"], "checker"),
                                         ("alignment", sample, ["a red circle"], "retrieval")):
        train.main([*SMALL, "--steps", "2", "--tasks", tasks, "--out", tasks])
        scores = re.findall(r"(\w+) on shapes", capsys.readouterr().out)
        assert scores == [score], "scores must be of what was trained"
        assert [name for name in log_of(Path(tasks))[0] if name.startswith("loss_")] == [f"loss_{tasks}"]
        checkpoint = str(tmp_path / tasks / "checkpoint.pt")
        assert models.load(checkpoint).tasks == (tasks,)
        argv = [*words, "--ckpt", checkpoint, "--device", "cpu"]
        assert "train.py --init" in error_of(capsys, program.main, argv, alone=False)
        begin = models.load(checkpoint, weights="raw")
        both = small("--init", checkpoint, "--out", f"{tasks}-both").model
        now = both.state_dict()
        assert not [name for name, value in begin.state_dict().items() if not torch.equal(value, now[name])]
        assert both.data == "shapes" and both.tasks == train.TASKS
        one = small("--init", f"{tasks}-both", "--tasks", tasks, "--out", f"{tasks}-one")
        assert one.model.tasks == (tasks,), "the other is forgotten"


# ---------------------------------------------------------------- the loss
def pairs_of(model, count: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Latents, tokens and noise of the first pairs of `shapes`."""
    pairs = [Shapes().read(i) for i in range(count)]
    pixels = to_float(torch.stack([torch.from_numpy(to_square(pair.image, 32)) for pair in pairs]))
    noise = train.sample_noise(model.config, model.latent_shape(32, 32), 0, 0, range(count))
    return model.encode_image(pixels), model.tokenizer([pair.captions[0] for pair in pairs]), noise


def gradients_of(loss: torch.nn.Module, parts: list) -> tuple[dict, dict]:
    loss.zero_grad()
    losses = train.backward(loss, parts, 0.7)
    return losses, {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


def slow_losses(model, z: torch.Tensor, tokens: torch.Tensor, noise: dict) -> tuple[list, list]:
    """Algorithm 1 pair by pair, as the paper writes it, for noise as the image's target."""
    config, generation, queries, without = model.config, [], [], noise["u"] < torch.tensor([0.1, 0.3])
    null, texts = model.text_encoder(model.tokenizer([""]))[0], model.text_encoder(tokens)[1]
    for i in range(len(z)):
        t, c = noise["t_image"][i:i + 1], model.text_encoder(tokens[i:i + 1])[0]
        alpha_bar = make_alphas_cumprod(config.image_schedule, 1000)[t].float()
        z_t = alpha_bar.sqrt() * z[i:i + 1] + (1 - alpha_bar).sqrt() * noise["noise"][i]
        pred = model.denoise_image(z_t, t, null if without[i, 0] else c)
        generation.append(((pred - noise["noise"][i]) ** 2).mean())
        t = noise["t_text"][i:i + 1]
        alpha_bar = make_alphas_cumprod(config.text_schedule, 1000)[t].float()
        a, s = config.gamma * alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        e_t = a * texts[i].detach() + s * noise["query_noise"][i]
        pred = model.denoise_query(e_t, t, torch.zeros_like(z[:1]) if without[i, 1] else z[i:i + 1])
        e_0 = {"data": pred, "noise": (e_t - s * pred) / a, "v": (a * e_t - s * pred) / (a * a + s * s)}
        queries.append(F.normalize(e_0[config.text_target], dim=-1)[0])
    similarity = model.logit_scale.exp() * torch.stack(queries) @ texts.T
    alignment = [((similarity[i].logsumexp(0) - similarity[i, i]) * ~without[i, 1]
                  + similarity[:, i].logsumexp(0) - similarity[i, i]) / 2 for i in range(len(z))]
    return generation, alignment


@pytest.mark.parametrize("text_target", ["data", "noise", "v"])
def test_the_loss_and_its_gradient_are_algorithm_1(text_target: str) -> None:
    model = build(tiny_config(gamma=0.5, image_target="noise", image_schedule="linear",
                              text_schedule="cosine", text_target=text_target)).requires_grad_(True)
    latents, tokens, noise = pairs_of(model, 4)
    noise["u"] = torch.tensor([[0.05, 0.9], [0.9, 0.1], [0.9, 0.9], [0.15, 0.4]])    # one of each dropped
    slow = dict(zip(train.TASKS, map(torch.stack, slow_losses(model, latents, tokens, noise))))
    (slow["generation"].mean() + 0.7 * slow["alignment"].mean()).backward()
    expected = {f"model.{name}": p.grad.clone() for name, p in model.named_parameters()}
    fast, got = gradients_of(train.JointLoss(model, p_drop_image=0.3), [(latents, tokens, noise)])
    for task in train.TASKS:
        assert torch.allclose(fast[task], slow[task], atol=1e-4), f"{task} is not the paper's loss"
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp(min=0.01 * total)
        assert error < 1e-3, f"the gradient of {name} is not that of the paper's loss: off by {error}"


@pytest.mark.parametrize("tasks", [train.TASKS, ("generation",), ("alignment",)])
@pytest.mark.parametrize("dtype, sizes, limit", [(torch.float64, [3, 3, 2], 1e-10),
                                                 (torch.float32, [4, 4], 1e-4)])
def test_parts_and_recomputed_activations_change_nothing(tasks, dtype, sizes, limit) -> None:
    """The alignment loss is over the whole batch, however it is cut; the largest error of a gradient in
    shares of the norm of all (in float32 up to 1.1e-5, by processor)."""
    model = build().to(dtype).requires_grad_(True)
    train.freeze_unused(model, tasks, True)
    loss, (latents, tokens, noise) = train.JointLoss(model, tasks), pairs_of(build(), 8)
    latents = latents.to(dtype)
    whole, expected = gradients_of(loss, [(latents, tokens, noise)])
    cut = {name: value.split(sizes) for name, value in noise.items()}
    parts = [(z, words, {name: value[i] for name, value in cut.items()})
             for i, (z, words) in enumerate(zip(latents.split(sizes), tokens.split(sizes)))]
    models.wrap_blocks(model.unet, lambda forward: partial(checkpoint, forward, use_reentrant=False))
    for case in ([(latents, tokens, noise)], parts):
        losses, got = gradients_of(loss, case)
        assert losses.keys() == whole.keys() and got.keys() == expected.keys()
        for name, value in whole.items():
            assert torch.allclose(value.float(), losses[name].float(), atol=1e-5), name
        size = torch.stack([g.norm() for g in expected.values()]).norm()
        worst = max((got[name] - expected[name]).norm() / size for name in expected)
        assert worst < limit, f"a gradient is off by {worst} of the whole"
    if "alignment" in whole:
        alone, _ = gradients_of(loss, parts[:1])
        assert not torch.allclose(alone["alignment"], whole["alignment"][:sizes[0]], atol=1e-2), \
            "a part's own InfoNCE is another loss: else this test would show nothing"


@pytest.mark.parametrize("flags", [(), ("--recompute",), ("--preset", "clip-tiny")], ids=str)
def test_blocks_are_compiled_once_for_a_shape(small, monkeypatch, flags: tuple) -> None:
    """Whole, without graph breaks (traced, not translated by the compiler), not for scores, and to
    the same numbers."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter, records, counts = CompileCounter(), [], []
    monkeypatch.setattr(models, "which", lambda name: name)            # nothing is translated
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    monkeypatch.setitem(models.PRESETS, "tiny", tiny_config(unet=UNetConfig((32, 64), (True, True), 3, 2)))
    for out, compile in (("plain", "--no-compile"), ("compiled", "--compile")):
        trainer = small(*flags, compile, "--out", out)
        blocks = [module for module in trainer.model.modules()
                  if isinstance(module, (ResBlock, SpatialTransformer, ClipLayer))]
        unet = [*trainer.model.unet.modules()] if "--recompute" in flags else []
        wrapped = [block for block in blocks if out == "compiled" or block in unet]
        assert wrapped == [block for block in blocks if "forward" in vars(block)], "not all, or too many"
        batches = trainer.batches()
        for _ in range(2):
            records.append(trainer.train_step(next(batches)))
            counts.append(counter.frame_count)
        trainer.evaluate()
        counts.append(counter.frame_count)
    assert counts[:3] == [0] * 3 and 0 < counts[3] == counts[4] == counts[5] < len(blocks), counts
    assert records[:2] == records[2:]
    torch._dynamo.reset()


def test_bfloat16_is_for_products_only(small) -> None:
    trainer, losses, norms = small("--precision", "bf16"), {}, []
    assert trainer.optimizer.bf16 and not torch.backends.cuda.flash_sdp_enabled(), "slow on a CPU"
    randomise(trainer.model)
    for norm in (m for m in trainer.model.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.register_forward_hook(lambda norm, x, y: norms.append(y.dtype))
    batch = next(trainer.batches())
    for bf16 in (True, False):
        trainer.loss.bf16 = bf16
        losses[bf16] = train.backward(trainer.loss, trainer.parts(batch), 1.0)
        assert all(losses[bf16][task].dtype == torch.float32 for task in train.TASKS)
    assert set(norms) == {torch.float32}, "also slow"
    for task in train.TASKS:
        assert not torch.equal(losses[True][task], losses[False][task]), "bf16 was not used"
        assert torch.allclose(losses[True][task], losses[False][task], rtol=0.05, atol=0.05), task
    trainer.loss.bf16 = True
    trainer.train_step(batch)
    state = [*trainer.averages.live.values(), *trainer.averages.values.values(),
             *(p.grad for p in trainer.averages.live.values()),
             *(v for moments in trainer.optimizer.state.values() for v in moments.values())]
    assert all(value.dtype == torch.float32 for value in state), \
        "weights, gradients, moments and averages are float32"


def test_a_cpu_computes_in_float32_unless_told(small) -> None:
    for flags, precision in ([], "fp32"), (["--precision", "bf16"], "bf16"):
        trainer = small(*flags, "--out", precision)
        assert trainer.args.precision == precision and trainer.optimizer.bf16 == (precision == "bf16")


def test_noise_depends_on_seed_step_and_row_alone() -> None:
    config = tiny_config()
    whole = train.sample_noise(config, (4, 2, 2), 1, 7, range(6))
    odd = train.sample_noise(config, (4, 2, 2), 1, 7, range(1, 6, 2))
    for name in whole:
        assert torch.equal(whole[name][1::2], odd[name]), name
        assert not torch.equal(whole[name], train.sample_noise(config, (4, 2, 2), 1, 8, range(6))[name])
    first = [next(train.training_batches(Shapes(), 32, 8, seed)).captions for seed in (0, 1, 100)]
    assert first[0] != first[1] != first[2] != first[0], "each seed sees its own shapes"


# ---------------------------------------------------------------- a step
def test_a_step_weighs_the_tasks_follows_the_rate_and_averages_the_weights(small, monkeypatch) -> None:
    monkeypatch.setitem(train.RECIPES["tiny"], "ema", 0.6)
    trainer = small("--align-weight", "0.7", "--warmup", "4", "--lr", "1e-3", "--steps", "20")
    name, parameter = next(iter(trainer.averages.live.items()))
    average, batches = parameter.detach().clone(), trainer.batches()
    for step in range(3):
        record = trainer.train_step(next(batches))
        expected = record["loss_generation"] + 0.7 * record["loss_alignment"]
        assert abs(record["loss"] - expected) < 1e-5
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (step + 1) / 4) == record["lr"]
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * parameter.detach()
    assert torch.allclose(trainer.averages.values[name], average, atol=1e-6)
    assert not torch.equal(average, parameter), "what is averaged must lag behind"
    live, address = parameter.detach().clone(), parameter.data_ptr()
    trainer.averages.swap()
    assert torch.allclose(parameter, average, atol=1e-6), "pictures are drawn with the averages"
    trainer.averages.swap()
    assert torch.equal(parameter, live) and parameter.data_ptr() == address
    rates = [train.learning_rate_factor(step, 20, 4, "cosine") for step in (0, 3, 4, 8, 12, 20)]
    assert rates == pytest.approx([0.25, 1, 1, 0.5 + 0.125 ** 0.5, 0.5, 0]), "warm-up, then half a cosine"
    rates = [train.learning_rate_factor(step, 20, 4, "linear") for step in (3, 10, 16, 20)]
    assert rates == pytest.approx([1, 1, 0.25 / 0.6, 0]), "as it is, then a straight line to nothing"
    assert train.learning_rate_factor(19, 20, 4, "constant") == 1
    trainer.step = 16
    assert trainer.train_step(next(batches))["lr"] == pytest.approx(1e-3 * 0.25 / 0.6), "tiny's is linear"


def test_a_long_gradient_is_clipped_and_the_temperature_bounded(small) -> None:
    trainer = small("--align-weight", "1e4")
    trainer.model.logit_scale.data.fill_(9.0)
    record = trainer.train_step(next(trainer.batches()))
    norm = torch.stack([p.grad.norm() for p in trainer.averages.live.values()]).norm()
    assert record["grad_norm"] > 10 and norm.item() == pytest.approx(train.MAX_NORM, rel=1e-3)
    assert trainer.model.logit_scale.item() == pytest.approx(math.log(100)), "as CLIP"


def test_optimizer_groups() -> None:
    model = build()
    both = train.make_optimizer(model, 3e-4, 0.99, 0.1, slower=10, muon=7).param_groups
    rates = {g["peak_lr"]: g["weight_decay"] for g in both if "momentum" in g}
    assert sorted(rates) == pytest.approx([2.1e-4, 2.1e-3]) and not any(rates.values())
    groups = train.make_optimizer(model, 3e-4, 0.99, 0.1, slower=10).param_groups
    rate = {id(p): (g["peak_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rate) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    for name, parameter in model.named_parameters():
        expected = (3e-4 if models.is_new(name) else 3e-5, 0.1 if parameter.dim() >= 2 else 0.0)
        assert rate[id(parameter)] == pytest.approx(expected), name
    assert {g["peak_lr"] for g in train.make_optimizer(model, 3e-4, 0.99, 0.1).param_groups} == {3e-4}


@pytest.mark.parametrize("bf16, error", [(False, 1e-4), (True, 0.05)])
def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw(bf16: bool, error: float) -> None:
    torch.manual_seed(0)
    model, plain = build(), build()
    muon = train.make_optimizer(model, 1e-3, 0.99, 0.1, muon=10)
    muon.bf16, adamw = bf16, train.make_optimizer(plain, 1e-3, 0.99, 0.1)
    momenta, others = {}, dict(plain.named_parameters())
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"]
    for _ in range(3):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            others[name].grad = parameter.grad.clone()
        muon.step()
        adamw.step()
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "embedding.weight" in name or name in ("unet.conv_in.weight",
                                                                             "unet.conv_out.weight"):
                assert torch.equal(parameter, others[name]), f"{name} is AdamW's"
                continue
            step = ((before[name] - parameter.detach()) / 1e-2).flatten(1).double()
            gradient = parameter.grad.flatten(1).double()
            momenta[name] = 0.8 * momenta.get(name, 0) + 0.2 * gradient
            nesterov = 0.8 * momenta[name] + 0.2 * gradient
            u, s, v = torch.linalg.svd(nesterov, full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
            expected = u * s @ v * max(1, len(u) / v.shape[1]) ** 0.5
            assert (step - expected).norm() < error * expected.norm(), name


def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoint(small, tmp_path, capsys) -> None:
    error = fail_of(capsys, "--out", "run", "--lr", "1e30", "--warmup", "3", "--steps", "50")
    assert re.search(r"step \d+: .*loss.* not finite", error)
    model = models.load(tmp_path / "run/checkpoint.pt")
    assert all(p.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- a run
def test_the_log_tells_what_an_owner_asks(small, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    train.main([*SMALL, "--steps", "4", "--eval-every", "2", "--out", "run"])
    lines = train.read_log(Path("run/log.jsonl"))
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert {"loss", "loss_generation", "loss_alignment", "accuracy", "logit_scale", "grad_norm", "lr",
                "images_per_s", "data_wait", "skipped", "val_i2t_r1", "val_t2i_r1",
                "val_denoising_error"} <= line.keys()
        assert 0 <= line["data_wait"] <= 1
    said = capsys.readouterr().out
    assert "step 2 of 4" in said, "progress"
    assert re.findall(r"(\w+) on shapes", said) == ["retrieval", "checker"], "scores are the last word"
    curves = Path(__file__).with_name("curves.py")
    subprocess.run([sys.executable, curves, "run", "again=run", "--out", "curves.png"], check=True)
    colours = {colour: n for n, colour in Image.open("curves.png").convert("RGB").getcolors(100000)}
    assert colours[255, 127, 14] > 500, "the second run's lines, on top of the first's"
    assert {path.name for path in Path("run/samples").iterdir()} == {"step_000002.png", "step_000004.png"}


def test_resuming_keeps_the_log_of_what_is_not_done_again_and_says_what_is_missing(small, capsys) -> None:
    train.main([*SMALL, "--steps", "2", "--out", "run", "--resume"])
    assert "nothing to resume, run/checkpoint.pt is not there" in capsys.readouterr().out
    lines = Path("run/log.jsonl").read_text()
    with open("run/log.jsonl", "a") as file:
        file.write('{"step": 3}\n{"step": 4, "lo')          # killed in the middle of a line
    small("--resume")
    assert Path("run/log.jsonl").read_text() == lines
    Path("run/log.jsonl").write_text("no JSON\n")
    assert "run/log.jsonl cannot be used" in fail_of(capsys, "--out", "run", "--resume")


def test_runs_do_not_overwrite_each_other_and_a_mistake_takes_no_name(small, capsys) -> None:
    for flags in ("--data nowhere", "--image-size 33", "--data cc3m", "--init nowhere.pt"):
        fail_of(capsys, *flags.split())
    assert not Path("runs").exists(), "nothing may be left of a mistake"
    first, second = small("--out", ""), small("--out", "")
    assert [str(run.folder) for run in (first, second)] == ["runs/shapes-tiny", "runs/shapes-tiny-2"]
    os.utime("runs/shapes-tiny/checkpoint.pt")
    assert small("--out", "", "--resume").folder == first.folder, "to resume is to go on with the newest run"
    assert small("--out", "", "--preset", "clip-tiny", "--resume").folder.name == "shapes-clip-tiny"


def test_defaults_follow_what_is_given(small, capsys, monkeypatch) -> None:
    assert "--preset tiny" in fail_of(capsys, "--data", "cc3m"), "no CUDA: say how to train something"
    with monkeypatch.context() as patch:
        for name in ("CC", "CXX"):
            patch.delenv(name, raising=False)
        patch.setattr(models, "which", lambda name: None)
        assert "finds no compiler" in fail_of(capsys, "--compile")
        for name, is_cuda in product(("gcc", "clang"), (True, False)):        # Triton is content with either
            patch.setattr(models, "which", lambda wanted: wanted == name)
            weights = [SimpleNamespace(is_cuda=is_cuda)]
            with nullcontext() if is_cuda else pytest.raises(ValueError):
                models.wrap_blocks(SimpleNamespace(parameters=lambda: iter(weights), modules=tuple))
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda"))
    for flags, expected in (([], ("tiny", None)), (["--data", "cc3m/"], ("sd-v1", "sd-v1-5")),
                            (["--data", "cc3m", "--preset", "small"], ("small", None)),
                            (["--data", "cc3m", "--init", "x.pt"], (None, "x.pt"))):
        args = train.parse_args(flags)
        assert (args.preset, args.init) == expected, flags
    for name, preset in (models.PRESETS | models.CLIPS).items():
        assert train.preset_of(preset) == name
    models.save("start.pt", begin := build())
    monkeypatch.setitem(models.PRESETS, "sd-v1", models.PRESETS["tiny"])
    monkeypatch.delitem(models.PRESETS, "tiny")
    trainer = small("--init", "start.pt")
    assert trainer.model.tokenizer.merges == begin.tokenizer.merges != [], "tokens keep their meaning"
    rates = {group["peak_lr"] for group in trainer.optimizer.param_groups}
    assert trainer.args.preset == "sd-v1" and rates == {1e-4, 1e-5}, "the recipe of the weights' own preset"
    assert trainer.args.warmup == 1000 and not trainer.args.train_text_encoder
    assert "give sd-v1" in fail_of(capsys, "--init", "start.pt", "--preset", "small")
    monkeypatch.delitem(models.PRESETS, "sd-v1")
    assert "the one whose recipe" in fail_of(capsys, "--init", "start.pt")
    assert small("--init", "start.pt", "--preset", "small", "--out", "small").args.warmup == 500


@pytest.mark.parametrize("flags, message", [
    ("--data nowhere", "no data at nowhere"), ("--data empty", "empty"), ("--steps 0", "--steps"),
    ("--lr nan", "--lr"), ("--tasks drawing", "generation,alignment"), ("--batch-size 1", "2 pairs"),
    ("--gamma 2", "gamma"), ("--p-drop-image 1.5", "from 0 to 1"), ("--max-bad -1", "--max-bad"),
    ("--no-fusion --no-own-ffn", "without fusion"), ("--align-weight inf", "--align-weight"),
    ("--align-weight -1", "--align-weight"), ("--seed -3", "--seed"), ("--init nowhere.pt", "nowhere.pt"),
    ("--image-size 1600000", "to 4096"), ("--image-size 33", "multiple"), ("--preset huge", "--preset"),
    ("--condition-timestep 5000", "0 to 1000"), ("--micro-batch 3", "--micro-batch 3"),
    ("--out file/run", "file"), ("--augment", "--augment"), ("--preset sd-v1", "--init"),
    ("--preset clip-tiny --gamma 0.5", "--gamma"), ("--preset clip-tiny --recompute", "--recompute"),
    ("--preset clip-tiny --no-train-text-encoder", "--train-text-encoder"),
    ("--preset clip-tiny --tasks generation", "only reads"), ("--stpes 3", "--stpes")])
def test_mistakes_end_in_one_line_and_status_2(small, tmp_path, capsys, flags: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert message in fail_of(capsys, "--out", "run", *flags.split())
    assert not (tmp_path / "run").exists()


def write_pairs(count: int) -> None:
    Path("data").mkdir()
    for i in range(count):
        Image.new("RGB", (40, 40), (4 * i, 90, 90)).save(f"data/{i:02d}.jpg")
        Path(f"data/{i:02d}.txt").write_text(f"picture {i}")


def test_a_run_goes_on_only_as_it_began(small, capsys) -> None:
    write_pairs(60)
    Path("data/00.txt").write_text("")       # the first is held out
    flags = ["--data", "data", "--workers", "1", "--out", "run"]
    train.main([*SMALL, *flags, "--steps", "2"])
    assert "60 samples" in capsys.readouterr().out and Path("run/samples/step_000002.png").exists()
    assert "add --resume" in fail_of(capsys, *flags)
    assert "--steps was 2, is 3" in fail_of(capsys, *flags, "--resume", "--steps", "3")
    Path("data/07.txt").write_text("another")
    assert re.search(r"--samples was \[57, 3, '\w{8}'\], is \[57, 3, '\w{8}'\]", fail_of(
        capsys, *flags, "--resume")), "other data, other run"
    Path("data/07.txt").write_text("picture 7")
    train.main([*SMALL, *flags, "--steps", "2", "--resume", "--data", str(Path("data").rename("moved"))])


def test_some_pairs_are_held_out_from_all_over(small, capsys) -> None:
    assert small("--out", "shapes").val.split == "val", "shapes has its own"
    write_pairs(60)
    trainer = small("--data", "data", "--val", "3")
    assert captions_of(trainer.val) == ["picture 0", "picture 29", "picture 59"]
    assert captions_of(trainer.source) == [f"picture {i}" for i in range(60) if i not in (0, 29, 59)]
    assert len(small("--data", "data", "--val", "30", "--out", "many").val) == 3, "a twentieth at most"
    shutil.copytree("data", "halves/train")
    shutil.copytree("data", "halves/val")
    assert len(small("--data", "halves", "--val", "30", "--out", "halves").val) == 30, "or of their own val"
    for i in range(1, 60):
        Path(f"data/{i:02d}.txt").unlink()
    assert "training needs more" in fail_of(capsys, "--data", "data", "--max-bad", "1")


def test_nothing_usable_is_said_in_one_line_even_from_a_worker(small, capsys) -> None:
    write_pairs(60)
    shutil.copytree("data", "halves/val")
    for path in Path("data").glob("*.jpg"):
        path.write_bytes(b"no picture")
    assert "no held-out sample of data can be read" in fail_of(capsys, "--data", "data", "--max-bad", "1")
    Path("data").rename("halves/train")
    command = [sys.executable, SMALL_RUN, *SMALL, "--data", "halves", "--workers", "1", "--max-bad", "1"]
    job = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)      # and ends
    assert job.returncode == 2 and "100 unusable samples in a row" in job.stderr, job
    assert "Traceback" not in job.stderr
