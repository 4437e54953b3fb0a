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
from conftest import ROOT, build, tiny_config
from PIL import Image
from torch.nn import functional as F

import model as models
import train
from data import Shapes, to_square, to_tensor
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


def finish(processes: list[subprocess.Popen]) -> str:
    said = [process.communicate(timeout=300)[0] for process in processes]
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
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_step_and_resumed_is_never_stopped(tmp_path, ranks: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--steps", "30", "--save-every", "4"]
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


# ---------------------------------------------------------------- in this process
@pytest.fixture()
def small(monkeypatch, tmp_path):
    """`small(flags)` gives the parsed flags of a run of the small networks in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.PRESETS, "tiny", tiny_config())
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


def slow_losses(model, args, images, tokens, drawn) -> tuple[list, list]:
    """Algorithm 1 pair by pair, as the paper writes it, for noise and data as targets."""
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
        queries.append(F.normalize(model.denoise_query(e_t, t, z), dim=-1)[0])
    similarity = model.logit_scale.exp() * torch.stack(queries) @ texts.T
    alignment = [(similarity[i].logsumexp(0) + similarity[:, i].logsumexp(0)) / 2 - similarity[i, i]
                 for i in range(len(images))]
    return generation, alignment


def test_the_loss_and_its_gradient_are_algorithm_1(small) -> None:
    model = build(tiny_config(gamma=0.5, image_target="noise", image_schedule="linear",
                              text_schedule="cosine")).requires_grad_(True)
    args = small("--p-uncond", "0.3", "--p-drop-image", "0.3")
    train.settle(args, torch.device("cpu"))
    pairs = [Shapes().read(i) for i in range(4)]
    images = to_tensor([to_square(pair.image, 32) for pair in pairs])
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
    start.known_words = frozenset({"zebra"})
    models.save(tmp_path / "start.pt", start)
    args = small("--init", "start.pt", "--steps", "1", "--lr", "0", "--lr-pretrained", "0")
    train.settle(args, torch.device("cpu"))
    trainer = train.Trainer(args, 0, 1, torch.device("cpu"))
    trainer.train()
    end = models.load(tmp_path / "run/checkpoint.pt")
    for name, value in start.state_dict().items():
        assert torch.equal(value, end.state_dict()[name]), name
    assert end.tokenizer.merges == start.tokenizer.merges and {"zebra", "a"} <= end.known_words


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
    ("--stpes 3", "--stpes")])
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
