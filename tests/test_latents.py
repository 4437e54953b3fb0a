"""train.py --latents: a run from encoded images is the run from the pictures, but for rounding."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build, error_of, tiny_config
from test_sources import picture, shards, write_tar

import model as models
import train
from data import BadSample, open_source
from model import AutoencoderConfig

KL = AutoencoderConfig("kl", 4, 2, 0.5, (32, 32))


@pytest.fixture()
def begin(tmp_path, monkeypatch):
    """Two tars of captioned pictures, one of them broken, and a checkpoint with a small KL autoencoder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Trainer, "validate", lambda self: None)
    monkeypatch.setitem(models.PRESETS, "tiny", tiny_config())
    Path("pictures").mkdir()

    def sample(shard: int, i: int) -> dict[str, bytes]:
        body = picture((40 * shard + 5 * i, 200 - 5 * i, 90), (40, 40), "PNG")
        captions = [f"picture {shard} {i}", f"image {shard} {i}"][:1 + i % 2]
        return {"png": b"broken" if (shard, i) == (1, 4) else body,
                "json": json.dumps({"captions": captions}).encode()}
    shards(Path("pictures"), [30, 20], sample)
    model = build(tiny_config(autoencoder=KL))
    models.save("start.pt", model)
    return model


def trainer(out: str, *flags: str) -> train.Trainer:
    args = train.parse_args(["--data", "pictures", "--init", "start.pt", "--batch-size", "8", "--val", "2",
                             "--steps", "2", "--out", out, "--device", "cpu", "--workers", "0",
                             "--precision", "fp32", *flags])
    return train.Trainer(args, 0, 1, torch.device("cpu"))


def test_a_run_from_latents_is_the_run_from_pictures(begin) -> None:
    runs = [trainer("a"), trainer("b", "--latents", "latents")]
    batches = [next(run.batches()) for run in runs]
    assert batches[0].captions == batches[1].captions and torch.equal(batches[0].tokens, batches[1].tokens)
    from_pictures, from_latents = (run.loss(*run.parts(batch)[0])[0] for run, batch in zip(runs, batches))
    error = (from_pictures - from_latents).abs().max() / from_pictures.abs().max()
    assert 0 < error < 2e-3, "half precision, and no more, lies between the two"
    mean = runs[0].model.read_batch(batches[0].images)
    assert (from_pictures - mean).abs().max() > 0.1, "training sees samples of the posterior, not its mean"
    records = [run.train_step(batch) for run, batch in zip(runs, batches)]
    for name, value in records[0].items():
        assert abs(value - records[1][name]) < 2e-3 * max(1, abs(value)), name
    assert runs[1].train() and Path("b/samples/step_000002.png").exists()
    end = models.load("b/checkpoint.pt").autoencoder.state_dict()
    assert all(torch.equal(end[name], value) for name, value in begin.autoencoder.state_dict().items())


def test_images_are_encoded_once_and_what_is_missing_later(begin, monkeypatch) -> None:
    whole = trainer("a", "--latents", "latents")
    marks, moments = sorted(Path("latents").iterdir())           # NAME.done.npy, NAME.npy
    before, done = np.load(moments), np.load(marks)
    assert before.shape == (50, 8, 16, 16) and before.dtype == np.float16
    assert done.all() and np.flatnonzero(np.isnan(before).any((1, 2, 3))).tolist() == [34], \
        "the broken picture is marked, and not tried again"
    with pytest.raises(BadSample, match="unusable image"):
        whole.source.read(int(np.flatnonzero(np.asarray(whole.source.rows) == 34)[0]))

    seen, exact = [], models.KLAutoencoder.moments
    monkeypatch.setattr(models.KLAutoencoder, "moments",
                        lambda self, images: seen.append(len(images)) or exact(self, images))
    trainer("b", "--latents", "latents")
    assert not seen, "all is there"
    table, file = np.load(marks, "r+"), np.load(moments, "r+")
    for rows, out in ((range(10, 13), "c"), ([34], "d")):   # of a stopped run; 34 is the broken one
        table[rows], file[rows] = False, 0
        trainer(out, "--latents", "latents")
        assert np.load(marks).all() and np.allclose(np.load(moments), before, atol=2e-3, equal_nan=True)
    assert sum(seen) == 3

    with moments.open("r+b") as cut_short:
        cut_short.truncate(5000)
    with pytest.raises(ValueError, match="npy cannot be used"):
        trainer("e", "--latents", "latents")
    moments.unlink()
    trainer("e", "--latents", "latents")
    assert np.allclose(np.load(moments), before, atol=2e-3, equal_nan=True), "it must be made anew"


def test_other_data_size_or_autoencoder_make_other_latents(begin) -> None:
    trainer("a", "--latents", "latents")
    trainer("b", "--latents", "latents", "--image-size", "16")
    begin.autoencoder.quant_conv.bias.data += 1
    models.save("start.pt", begin)
    trainer("c", "--latents", "latents")
    write_tar(Path("pictures/1.tar"), [(f"1_{i}.{kind}", body) for i in range(20) for kind, body in (
        ("png", picture((9, 9, 9), form="PNG")), ("txt", b"of the same names"))])
    trainer("d", "--latents", "latents")
    assert len(list(Path("latents").glob("*.done.npy"))) == 4, "latents of one belong to no other"


def test_two_ranks_share_the_work(begin, monkeypatch) -> None:
    whole, source, shares = trainer("a", "--latents", "latents"), open_source("pictures"), []
    for rank in range(2):
        monkeypatch.setattr(train, "rank_and_world", lambda: (rank, 2))
        monkeypatch.setattr(train, "evaluation_batches", lambda part, *rest: shares.append(part.rows) or [])
        for path in Path("latents").iterdir():       # nothing is done yet
            np.save(path, np.zeros_like(np.load(path)))
        train.add_latents(source, whole.model, Path("latents"), 0)
    assert sorted(np.concatenate(shares)) == list(range(50)) and min(map(len, shares)) == 25


@pytest.mark.parametrize("flags", ["", "--data pictures --preset clip-tiny",
                                   "--data pictures --tasks alignment --augment"])
def test_what_needs_pictures_refuses_latents(begin, capsys, flags: str) -> None:
    argv = [*flags.split(), "--latents", "latents", "--device", "cpu"]
    assert "--latents" in error_of(capsys, train.main, argv, alone=False)
