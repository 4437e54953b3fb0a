"""The latent cache: training from it is training from the pictures, without the autoencoder."""
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build, tiny_config
from test_sources import picture, write_tar

import data
import evaluate
import model as models
import train
from fusion import FusionConfig
from model import AutoencoderConfig

KL = AutoencoderConfig("kl", 4, 2, 0.5, (32, 32))


@pytest.fixture()
def world(tmp_path, monkeypatch):
    """Three tars of captioned pictures, and a checkpoint with a small KL autoencoder of random weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Trainer, "validate", lambda self: None)
    for shard, count in enumerate((30, 1, 19)):
        members = []
        for i in range(count):
            body = picture((40 * shard + 5 * i, 200 - 5 * i, 90), (40, 40), "PNG")
            captions = [f"picture {shard} {i}", f"image {shard} {i}"][:1 + i % 2]
            members += [(f"{shard}{i:03d}.png", body), (f"{shard}{i:03d}.txt", captions[0].encode()),
                        (f"{shard}{i:03d}.json", json.dumps({"captions": captions}).encode())]
        (tmp_path / "pictures").mkdir(exist_ok=True)
        write_tar(tmp_path / "pictures" / f"{shard}.tar", members)
    model = build(tiny_config(autoencoder=KL, fusion=FusionConfig(32, align_blocks=1, head_width=16)))
    models.save(tmp_path / "start.pt", model)
    return model


def cache(*flags: str, out: str = "latents") -> None:
    data.main(["cache", "--data", "pictures", "--init", "start.pt", "--out", out, "--workers", "0",
               "--batch-size", "8", "--device", "cpu", *flags])


def trainer(source: str, out: str) -> train.Trainer:
    args = train.parse_args(["--data", source, "--init", "start.pt", "--batch-size", "8", "--val", "2",
                             "--steps", "4", "--out", out, "--device", "cpu", "--workers", "0"])
    train.settle(args, torch.device("cpu"))
    return train.Trainer(args, 0, 1, torch.device("cpu"))


def test_a_step_from_latents_is_the_step_from_pictures(world, monkeypatch) -> None:
    cache()
    runs = [trainer("pictures", "a"), trainer("latents", "b")]
    batches = [next(run.batches()) for run in runs]
    assert batches[0].captions == batches[1].captions and torch.equal(batches[0].tokens, batches[1].tokens)
    (from_pictures,), (from_latents,) = (run.split(batch) for run, batch in zip(runs, batches))
    error = (from_pictures[0] - from_latents[0]).abs().max() / from_pictures[0].abs().max()
    assert 0 < error < 2e-3, "half precision, and no more, lies between the two"
    losses = [train.backward(run.loss, run.split(batch), 1.0) for run, batch in zip(runs, batches)]
    for task in train.TASKS:
        assert torch.allclose(losses[0][task], losses[1][task], rtol=5e-3, atol=5e-3), task

    # With the moments rounded as the cache rounds them, the two steps are the same, bit for bit.
    exact = models.KLAutoencoder.moments
    monkeypatch.setattr(models.KLAutoencoder, "moments", lambda self, images: tuple(
        value.half().float() for value in exact(self, images)))
    records = [run.train_step(batch) for run, batch in zip(runs, batches)]
    assert records[0] == records[1]
    for name, value in runs[0].averages.live.items():
        assert torch.equal(value, runs[1].averages.live[name]), name


def test_training_from_latents_holds_no_autoencoder_and_its_checkpoint_is_whole(world) -> None:
    cache()
    run = trainer("latents", "run")
    assert run.model.autoencoder is None
    assert not [name for name, _ in run.loss.named_parameters() if "autoencoder" in name]
    run.train()
    assert (Path("run") / "samples/step_000004.png").exists(), "pictures need the decoder for a moment"
    assert run.model.autoencoder is None
    end = models.load("run/checkpoint.pt")
    for name, value in world.autoencoder.state_dict().items():
        assert torch.equal(end.autoencoder.state_dict()[name], value), name
    train.main(["--data", "latents", "--init", "start.pt", "--batch-size", "8", "--val", "2", "--steps", "4",
                "--out", "run", "--device", "cpu", "--workers", "0", "--resume"])


def contents(folder: str) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_stopped_cache_goes_on_and_ranks_share_it(world, monkeypatch) -> None:
    cache(out="whole")
    whole = contents("whole")
    shards = [f"0000{i}.{end}" for i in range(3) for end in ("json", "tar")]
    assert sorted(whole) == [*shards, data.CACHE_NOTES]
    with tarfile.open("whole/00000.tar") as tar:
        names = [member.name for member in tar][:3]
    assert names == ["000000000.latent.npy", "000000000.tokens.npy", "000000000.json"]
    cache(out="stopped")
    (Path("stopped") / "00001.tar").unlink()
    (Path("stopped") / "00002.tar.part").write_bytes(b"killed here")
    untouched = (Path("stopped") / "00000.tar").stat().st_mtime_ns
    with pytest.raises(ValueError, match="2 of 3 shards"):
        data.open_source("stopped")
    cache(out="stopped")
    (Path("stopped") / "00002.tar.part").unlink()
    assert contents("stopped") == whole
    assert (Path("stopped") / "00000.tar").stat().st_mtime_ns == untouched
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        cache(out="shared")
    assert contents("shared") == whole


@pytest.mark.parametrize("flags, message", [
    ("--image-size 16", "another cache"), ("--data latents --out other", "already"),
    ("--image-size 15", "multiple"),
    ("--data nowhere", "no data"), ("--init nowhere.pt", "nowhere.pt"), ("--batch-size 0", "batch-size"),
    ("--out start.pt/below", "start.pt"), ("--out pictures/latents", "one in the other"),
    ("--out .", "one in the other"), ("--out full", "no latent cache")])
def test_mistakes_end_in_one_line_and_status_2(world, capsys, flags: str, message: str) -> None:
    cache()
    Path("full").mkdir()
    write_tar(Path("full/00000.tar"), [("a.jpg", picture()), ("a.txt", b"a")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cache(*flags.split())
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and message in error, error


def test_latents_of_another_autoencoder_or_size_are_refused(world) -> None:
    cache()
    models.save("start.pt", build(world.config, seed=1))
    with pytest.raises(ValueError, match="another autoencoder"):
        trainer("latents", "a")
    other = build(replace(world.config, image_size=64))
    other.load_state_dict(world.state_dict())
    models.save("start.pt", other)
    with pytest.raises(ValueError, match="--image-size 32"):
        trainer("latents", "b")


def test_bad_latents_are_counted(world) -> None:
    cache()
    with tarfile.open("latents/00001.tar", "w"):
        pass
    members = [("a.latent.npy", b"no array"), ("a.tokens.npy", b""), ("a.json", b'{"caption": "a"}')]
    write_tar(Path("latents/00001.tar"), members)
    source = data.open_source("latents")
    causes = []
    for i in range(len(source)):
        try:
            source.read(i)
        except data.BadSample as bad:
            causes.append(bad.cause)
    assert causes == ["unreadable latent.npy"]


def test_the_command_runs_as_the_readme_says(world) -> None:
    command = [sys.executable, str(ROOT / "data.py"), "cache", "--data", "pictures", "--init", "start.pt",
               "--out", "latents", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert done.returncode == 0 and "wrote 3 of 3 shards" in done.stdout, done.stderr
    assert "python train.py --data latents" in done.stdout


def test_scores_from_latents_are_those_from_pictures(world) -> None:
    cache()
    results = []
    for source in ("pictures", "latents"):
        args = evaluate.parse_args(["retrieval", "--data", source, "--batch-size", "7"])
        results.append(evaluate.retrieval(world, data.open_source(source), args))
    assert results[0]["n"] == results[1]["n"] == 50 and results[0]["n_texts"] == results[1]["n_texts"]
    for name in ("i2t_r1", "t2i_r1", "i2t_r10"):
        assert results[0][name] == pytest.approx(results[1][name], abs=0.05), "half precision, no more"
    other = build(world.config, seed=1)
    with pytest.raises(ValueError, match="another autoencoder"):
        evaluate.retrieval(other, data.open_source("latents"), args)


@pytest.mark.parametrize("labelled", [True, False])
def test_folders_of_pictures_can_be_cached(world, tmp_path, labelled: bool) -> None:
    for i in range(12):
        folder = tmp_path / "folders" / (f"kind.{i % 2}" if labelled else "all")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"my.photo {i}.png").write_bytes(picture((20 * i, 90, 90), (40, 40), "PNG"))
        if not labelled:
            (folder / f"my.photo {i}.txt").write_text(f"photo {i}")
    cache("--data", "folders")
    before, after = data.open_source("folders"), data.open_source("latents")
    assert len(after) == 12 and after.classes == before.classes
    for i in range(12):
        a, b = before.read(i), after.read(i)
        assert (a.captions, a.key, a.label) == (b.captions, b.key, b.label)
    trainer("latents", "run").train()


def test_what_a_cache_lost_is_remembered_and_judged(world, capsys) -> None:
    members = [(f"{i}.{kind}", body) for i in range(20) for kind, body in (
        ("jpg", picture() if i % 2 else b"broken"), ("txt", f"picture {i}".encode()))]
    for shard in "34":
        write_tar(Path(f"pictures/{shard}.tar"), members)
    for attempt in range(4):
        with pytest.raises(SystemExit):
            cache()
        assert "20 unreadable image" in capsys.readouterr().err or attempt == 0
    cache("--max-bad", "0.5")
    assert data.open_source("latents").skipped["unreadable image"] == 20


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"format": "diffdis-latents-1", "shards": 3}'])
def test_a_damaged_description_is_said(world, text: str) -> None:
    cache()
    (Path("latents") / data.CACHE_NOTES).write_text(text)
    with pytest.raises(ValueError, match="latents.json"):
        data.open_source("latents")
