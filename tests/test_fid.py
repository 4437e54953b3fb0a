"""FID's parts: the network against pytorch-fid's, the resizing against Pillow channel by channel, and the
distance against formulas that can be written down."""
import hashlib
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, build, error_of, import_oracle, tiny_clip_config
from PIL import Image
from torch import Tensor

import data
import evaluate
import model as models
import sample
from data import Shapes
from evaluate import Inception, frechet_distance
from sample import to_pil


# ---------------------------------------------------------------- the network
@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random numbers that keep features of ordinary size, batch norm's statistics and shift among them; under
    the names of torchvision's network, of which pytorch-fid's differs in its pooling alone."""
    generator = torch.Generator().manual_seed(0)
    weights = import_oracle("torchvision.models").Inception3(1008, aux_logits=False,
                                                             init_weights=False).state_dict()
    for name, value in weights.items():
        if value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif value.is_floating_point():
            is_factor = name.endswith(("weight", "running_var"))
            value.uniform_(0.7, 1.4, generator=generator).sub_(0 if is_factor else 1)
    return weights


@pytest.fixture()
def network(weights, tmp_path, monkeypatch) -> Inception:
    """As it is loaded from a file of these weights."""
    path = tmp_path / "inception.pth"
    torch.save(weights, path)
    monkeypatch.setattr(models, "download", lambda name: path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(models.DOWNLOADS, "inception", ("", digest[:8]))
    return Inception(torch.device("cpu"))


@torch.no_grad()
def test_the_network_is_pytorch_fids(network, weights, monkeypatch) -> None:
    inception = import_oracle("pytorch_fid.inception")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: weights)
    theirs = inception.InceptionV3(normalize_input=False).eval()
    images = torch.randint(0, 256, (2, 3, 299, 299)) / 127.5 - 1
    features, expected = network.encode_image(images), theirs(images)[0].flatten(1)
    assert features.shape == (2, 2048) and features.std() > 1e-2, "features that are all alike test nothing"
    assert (features - expected).norm() < 1e-5 * expected.norm(), "it is not the one FID is defined with"


def test_other_weights_are_refused(network, tmp_path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "inception.pth")
    with pytest.raises(ValueError, match="is not FID's Inception"):
        Inception(torch.device("cpu"))


# ---------------------------------------------------------------- resizing
@pytest.mark.parametrize("height, width", [(32, 32), (401, 277), (299, 299), (700, 64)])
def test_resize_is_pillows_channel_by_channel(height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    found = Inception.read_batch(torch.from_numpy(pixels))
    assert found.shape == (2, 3, 299, 299) and found.dtype == torch.float32
    for i in range(2):
        for c in range(3):
            plane = Image.fromarray(np.ascontiguousarray(pixels[i, :, :, c]).astype(np.float32), mode="F")
            values = np.asarray(plane.resize((299, 299), Image.BICUBIC)).clip(0, 255)
            assert np.allclose(found[i, c].numpy(), (values - 128) / 128, atol=1e-6), (i, c)
    assert found.min() >= -1 and found.max() <= 127 / 128, "bicubic's overshoot is cut off, as in clean-fid"


# ---------------------------------------------------------------- the distance
def rows(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated features of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return noise @ mix + torch.arange(width) / 3


def near(found: float, expected: Tensor | float, tolerance: float = 1e-9) -> bool:
    return math.isclose(found, float(expected), rel_tol=tolerance, abs_tol=tolerance)


@pytest.mark.parametrize("width, seed", [(2, 0), (2, 1), (7, 2), (40, 3)])
def test_the_last_trace_by_the_products_eigenvalues(width: int, seed: int) -> None:
    """Those of Σ₁ Σ₂, which is not symmetric, by the general solver: another way to the same trace."""
    a, b = rows(5 * width, width, seed), rows(5 * width, width, seed + 50)
    first, second = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * roots
    assert near(frechet_distance(a, b), expected, 1e-7) and near(frechet_distance(b, a), expected, 1e-7)


@pytest.mark.parametrize("count", [2, 20, 127, 400])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_a_set_is_at_distance_zero_from_itself(count: int, scale: float) -> None:
    """Also with fewer images than features, where the covariance is singular."""
    features = rows(count, 128) * scale
    found = frechet_distance(features, features.flip(0))
    assert 0 <= found < 1e-6 * max(1, scale ** 2)


def test_fewer_images_than_features() -> None:
    """In a larger space the distance is what it is in the subspace the features really lie in. Where nothing
    overlaps the traces add up: a hundred eigenvalues of 1e-16 must not count as 1e-8 each."""
    frame, a, b = torch.linalg.qr(rows(300, 300))[0], rows(60, 8, 0), rows(60, 8, 1)
    assert near(frechet_distance(a @ frame[:8], b @ frame[:8]), frechet_distance(a, b), 1e-11)
    a, b = rows(60, 100, 0) @ frame[:100], rows(90, 150, 1) @ frame[100:250]
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()
    assert near(frechet_distance(a, b), expected, 1e-12)


def test_large_means_and_single_precision_cost_no_digits() -> None:
    assert near(frechet_distance(torch.ones(5, 3), torch.zeros(6, 3)), 3), "all images the same"
    a, b = (rows(200, 10, seed).float() + 1000 for seed in (0, 1))
    assert near(frechet_distance(a, b), frechet_distance(a.double() - 1000, b.double() - 1000), 1e-7)


# ---------------------------------------------------------------- the command
@pytest.fixture()
def drawer(tmp_path, monkeypatch):
    """A folder with a model that draws, c.pt, and 40 pictures to compare with, in refs/."""
    monkeypatch.chdir(tmp_path)
    models.save(tmp_path / "c.pt", build())
    (tmp_path / "refs").mkdir()
    for i in range(40):
        Shapes("val").read(i).image.resize((50, 40)).save(f"refs/{i:02d}.png")
        Path(f"refs/{i:02d}.txt").write_text(Shapes("val").captions(i)[0])
    return tmp_path


FID = ["fid", "--ckpt", "c.pt", "--data", "refs", "--steps", "2", "--device", "cpu", "--workers", "0",
       "--json", "r.json"]
OWN = ["--features", "c.pt"]


def result_of(*flags: str) -> dict:
    evaluate.main([*FID, *flags])
    return json.loads(Path("r.json").read_text())


def test_the_command_equals_its_parts_done_slowly(drawer, monkeypatch, capsys) -> None:
    """Compared are the text queries which a checkpoint reads from the pictures."""
    compiled, stances = [], []
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: stances.append(stance) or nullcontext())
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: compiled.append(forward) or forward)
    monkeypatch.setattr(models, "which", lambda name: name)
    found = result_of("retrieval", *OWN, "--batch-size", "7", "--out", "drawn", "--seed", "5", "--compile",
                      "--n", "20", "--guidance-scale", "3", "--control", "no-image")["fid"]   # of retrieval
    assert len(compiled) > 10
    assert stances == ["default"] * 2 + ["force_eager"], "the last batch is smaller"
    assert (found["n"], found["n_reference"], found["features"]) == (20, 40, "DiffDis")
    model, source, queries = models.load("c.pt"), data.open_source("refs"), []
    drawn = [np.asarray(to_pil(sample.draw_images(model, source.captions(place)[:1], [5 + i], 2, 3.0)[0]))
             for i, place in enumerate(np.linspace(0, 39, 20).astype(int))]
    for pictures in (drawn, [data.to_square(source.read(i).image, 32) for i in range(40)]):
        queries.append(torch.cat([sample.draw_queries(model, model.read_batch(torch.from_numpy(
            picture[None].copy())), [i], seed=5) for i, picture in enumerate(pictures)]).double())
    assert found["fid"] == pytest.approx(frechet_distance(*queries), rel=1e-3)
    assert abs(np.asarray(Image.open("drawn/000011.png"), int) - drawn[11]).max() <= 1
    assert len(list(Path("drawn").iterdir())) == 20
    assert "fid" in capsys.readouterr().out
    number = len(compiled)
    for name in ("drawn/000003.png", "drawn/000019.png"):      # of the first and of the last batch
        Path(name).unlink()
        Path(name).mkdir()
        argv = [*FID, *OWN, "--batch-size", "7", "--n", "20", "--out", "drawn"]
        assert name in error_of(capsys, evaluate.main, argv)
        Path(name).rmdir()
    assert len(compiled) == number, "not compiled where nobody asked"


@pytest.mark.parametrize("device, flags, expected", [
    ("cuda", "", 1), ("cuda", "--no-compile", 0), ("cuda", "--n 4999", 0), ("cpu", "", 0),
    ("cpu", "--compile", 1)])
def test_thousands_are_compiled_on_cuda(drawer, monkeypatch, device: str, flags: str, expected: int) -> None:
    calls, model = [], models.load("c.pt")
    stands_in = SimpleNamespace(config=model.config, tasks=model.tasks, device=SimpleNamespace(type=device))
    monkeypatch.setattr(models, "wrap_blocks", calls.append)
    monkeypatch.setattr(models, "load", lambda *_, **__: stands_in)
    monkeypatch.setattr(evaluate, "open_source", lambda *_: range(9000))
    monkeypatch.setattr(evaluate, "fid", lambda *_, **__: {})
    evaluate.run_task("fid", stands_in, evaluate.parse_args([*FID, *OWN, *flags.split()]))
    assert calls == [stands_in] * expected


def test_damaged_pictures_are_said_and_too_many_refused(drawer, capsys) -> None:
    for i in (3, 9):
        Path(f"refs/{i:02d}.png").write_bytes(b"no picture")
    found = result_of(*OWN, "--max-bad", "0.1")
    assert (found["n"], found["n_reference"]) == (40, 38), "the captions are sound"
    assert found["skipped"]["skipped"] == {"unreadable image": 2}
    assert result_of(*OWN, "--max-bad", "0.1", "--n", "5")["n"] == 5, "of which one has no image"
    assert "skipped: 2 unreadable image" in capsys.readouterr().out
    assert "unusable" in error_of(capsys, evaluate.main, [*FID, *OWN, "--max-bad", "0.01"])


def test_inceptions_features_and_a_small_number_is_said(drawer, network, capsys) -> None:
    found = result_of("--n", "6")
    assert found["features"] == "Inception" and found["n"] == 6 and found["fid"] > 0.01
    assert "warning: 6 pictures, 2048 features" in capsys.readouterr().out
    models.save(drawer / "clip.pt", build(tiny_clip_config()))
    assert result_of("--features", "clip.pt")["features"] == "Clip"
    assert "warning" not in capsys.readouterr().out, "40 pictures are more than 32 features"


def test_ranks_share_it_and_agree(drawer) -> None:
    alone = result_of(*OWN, "--batch-size", "6")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(drawer / "home")}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone",
                    str(ROOT / "evaluate.py"), *FID, *OWN, "--batch-size", "6"], check=True,
                   env=env, capture_output=True, timeout=300)
    shared = json.loads(Path("r.json").read_text())
    assert shared["ranks"] == 3 and shared["n"] == shared["n_reference"] == 40
    assert shared["fid"] == pytest.approx(alone["fid"], rel=1e-4)
