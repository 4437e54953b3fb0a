"""FID's parts: the network against pytorch-fid's, the resizing against Pillow channel by channel, streaming
statistics against torch.cov, and the distance against formulas that can be written down."""
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, build, import_oracle
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import data
import evaluate
import model as models
import sample
from data import Shapes
from evaluate import Statistics, frechet_distance, inception_input
from model import Inception, load_inception
from sample import to_pil


# ---------------------------------------------------------------- the network
@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random numbers that keep features of ordinary size, batch norm's statistics and shift among them."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, value in Inception().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() > 1:
            found[name] = noise * (2 / value[0].numel()) ** 0.5
        elif name.endswith("num_batches_tracked"):
            found[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            found[name] = 0.6 + torch.rand(value.shape, generator=generator)
        else:
            found[name] = 0.2 * noise + name.endswith("bn.weight")
    return found


@pytest.fixture(scope="module")
def ours(weights) -> Inception:
    network = Inception().eval().requires_grad_(False)
    network.load_state_dict(weights)
    return network


@pytest.fixture(scope="module")
def theirs(weights):
    """pytorch-fid's wrapper around its network with the same weights; its loading is strict."""
    inception = import_oracle("pytorch_fid.inception")
    original = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *_, **__: weights
    try:
        return inception.InceptionV3([0, 1, 2, 3]).eval()
    finally:
        inception.load_state_dict_from_url = original


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_the_network_is_pytorch_fids(ours, theirs) -> None:
    pixels = torch.randint(0, 256, (2, 299, 299, 3), dtype=torch.uint8)
    images = inception_input(pixels, "legacy")
    outputs = {}
    hooks = [ours.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: outputs.update(
        {name: out})) for name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_6e")]
    features = ours(images)
    for hook in hooks:
        hook.remove()
    theirs.normalize_input = False
    expected = theirs(images)
    theirs.normalize_input = True
    stages = [F.max_pool2d(outputs["Conv2d_2b_3x3"], 3, 2), F.max_pool2d(outputs["Conv2d_4a_3x3"], 3, 2),
              outputs["Mixed_6e"], features[:, :, None, None]]
    assert features.shape == (2, 2048) and features.std() > 1e-2, "features that are all alike test nothing"
    for found, wanted in zip(stages, expected, strict=True):
        assert relative(found, wanted) < 1e-5, "our Inception is not the one FID is defined with"


@pytest.mark.parametrize("size", [(64, 90), (512, 400)])
@torch.no_grad()
def test_whole_path_is_pytorch_fids(ours, theirs, size: tuple[int, int]) -> None:
    """From pixels of another size, as its command reads them: [0, 1], resized and scaled inside."""
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    expected = theirs(pixels.permute(0, 3, 1, 2) / 255)[3].flatten(1)
    assert relative(ours(inception_input(pixels, "legacy")), expected) < 1e-5
    assert relative(ours(inception_input(pixels, "clean")), expected) > 1e-3, "the two ways must differ"


@torch.no_grad()
def test_features_do_not_depend_on_the_batch(ours) -> None:
    images = torch.rand(3, 3, 299, 299) * 2 - 1
    assert relative(ours(images)[1:2], ours(images[1:2])) < 1e-5, "the rest of a batch changed an image"


# ---------------------------------------------------------------- its file
@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path) -> None:
    """Nothing of the user's is read or written."""
    monkeypatch.setattr(models, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")


@pytest.mark.parametrize("zipped", [True, False], ids=["new", "before 1.6"])
@pytest.mark.parametrize("counters", [True, False])
def test_a_weight_file_loads(weights, tmp_path, zipped: bool, counters: bool) -> None:
    stored = {name: value for name, value in weights.items() if counters or "num_batches" not in name}
    torch.save(stored, tmp_path / "inception.pth", _use_new_zipfile_serialization=zipped)
    network = load_inception(tmp_path / "inception.pth")
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items()
               if "num_batches" not in name)


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("Mixed_7c.branch3x3_2b.conv.weight"), "lacks Mixed_7c.branch3x3_2b.conv.weight"),
    (lambda w: w.update({"AuxLogits.fc.bias": torch.zeros(3)}), "unknown AuxLogits.fc.bias"),
    (lambda w: w.update({"fc.bias": torch.zeros(1000)}), r"fc.bias of shape \(1000,\) instead of \(1008,\)"),
    (lambda w: w.update({"fc.bias": torch.zeros(1008, dtype=torch.int64)}), "fc.bias as torch.int64")])
def test_other_weights_are_refused(weights, tmp_path, change, message: str) -> None:
    changed = dict(weights)
    change(changed)
    torch.save(changed, tmp_path / "inception.pth")
    with pytest.raises(ValueError, match=message):
        load_inception(tmp_path / "inception.pth")


def test_damaged_or_missing_files_are_refused(weights, tmp_path) -> None:
    path = tmp_path / "inception.pth"
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth"):
        load_inception(path)
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for damaged in (whole[:-1000], whole[:100_000], whole[:40], whole[:19], b"", b"\x80\x02K\x01."):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no readable checkpoint"):
            load_inception(path)


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_nothing_in_an_old_file_is_run(tmp_path) -> None:
    attack = {"fc.bias": torch.zeros(1008), "attack": Attack(tmp_path / "ran")}
    torch.save(attack, tmp_path / "inception.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_inception(tmp_path / "inception.pth")
    assert not (tmp_path / "ran").exists(), "a downloaded file ran code"


def test_weights_are_fetched_by_name_and_checked(weights, tmp_path, monkeypatch) -> None:
    """torch.hub compares the beginning of the sha256: a file of other content is not kept."""
    url, beginning = models.DOWNLOADS["inception"]
    assert url.endswith(f"-{beginning}.pth")
    torch.save(weights, tmp_path / "served.pth")
    other = (tmp_path / "served.pth").as_uri()
    monkeypatch.setitem(models.DOWNLOADS, "inception", (other, beginning))
    with pytest.raises(OSError, match="could not download.*invalid hash"):
        load_inception()
    assert not list((tmp_path / "cache").iterdir()), "a file that failed its check stayed"
    digest = hashlib.sha256((tmp_path / "served.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(models.DOWNLOADS, "inception", (other, digest[:8]))
    assert torch.equal(load_inception().fc.bias, weights["fc.bias"])


# ---------------------------------------------------------------- resizing
@pytest.mark.parametrize("height, width", [(32, 32), (401, 277), (299, 299), (700, 64)])
def test_clean_resize_is_pillows_channel_by_channel(height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    found = inception_input(torch.from_numpy(pixels), "clean")
    assert found.shape == (2, 3, 299, 299) and found.dtype == torch.float32
    for i in range(2):
        for c in range(3):
            plane = Image.fromarray(np.ascontiguousarray(pixels[i, :, :, c]).astype(np.float32), mode="F")
            values = np.asarray(plane.resize((299, 299), Image.BICUBIC)).clip(0, 255)
            assert np.allclose(found[i, c].numpy(), (values - 128) / 128, atol=1e-6), (i, c)
    assert found.min() >= -1 and found.max() <= 127 / 128, "bicubic's overshoot is cut off, as in clean-fid"


def test_clean_resize_does_not_alias() -> None:
    """Stripes finer than the result's pixels: their mean remains, or a pattern that is not in the image."""
    stripes = torch.zeros(1, 64, 1300, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    inside = slice(4, -4)
    clean, legacy = (inception_input(stripes, way)[..., inside].std() for way in ("clean", "legacy"))
    assert clean < 0.1 < 0.5 < legacy, (clean, legacy)


@torch.no_grad()
def test_pixels_of_the_right_size_pass_through_both_resizes() -> None:
    pixels = torch.randint(0, 256, (1, 299, 299, 3), dtype=torch.uint8)
    channels = pixels.permute(0, 3, 1, 2).double()
    assert torch.allclose(inception_input(pixels, "legacy").double(), channels / 127.5 - 1, atol=1e-6)
    assert torch.allclose(inception_input(pixels, "clean").double(), (channels - 128) / 128, atol=1e-6)


@pytest.mark.parametrize("pixels, resize, message", [
    (torch.zeros(1, 8, 8, 3), "clean", "float32"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "clean", "3, 8"),
    (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "bicubic", "clean, legacy")])
def test_other_pixels_are_refused(pixels: Tensor, resize: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inception_input(pixels, resize)


# ---------------------------------------------------------------- statistics
def rows(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated features of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return noise @ mix + torch.arange(width) / 3


def of(features: Tensor, batch: int = 1000) -> Statistics:
    found = Statistics(features.shape[1])
    for part in features.split(batch):
        found.add(part)
    return found


def exact(mean: Tensor, covariance: Tensor, count: int = 101) -> Statistics:
    """Statistics with this very mean and covariance."""
    found = Statistics(len(mean))
    found.count, found.mean, found.scatter = count, mean.double(), covariance.double() * (count - 1)
    return found


def same(a: Statistics, b: Statistics, tolerance: float = 1e-10) -> bool:
    return (a.count == b.count and torch.allclose(a.mean, b.mean, rtol=tolerance, atol=tolerance)
            and torch.allclose(a.scatter, b.scatter, rtol=tolerance, atol=tolerance * a.count))


@pytest.mark.parametrize("offset, tolerance", [(0.0, 1e-10), (1e4, 1e-10), (1e7, 1e-6)])
def test_streaming_is_one_go(offset: float, tolerance: float) -> None:
    features = rows(537, 12) + offset
    found = Statistics(12)
    for part in features.split([1, 0, 200, 3, 1, 332]):
        found.add(part)
    assert found.count == 537
    assert torch.allclose(found.mean, features.mean(dim=0), rtol=1e-12)
    assert torch.allclose(found.covariance(), torch.cov(features.T), rtol=tolerance, atol=tolerance), \
        "a large mean must not cost the covariance its digits"


def test_features_in_float32_are_summed_in_float64() -> None:
    features = (rows(3000, 4) + 100).float()
    expected = torch.cov(features.double().T)
    assert torch.allclose(of(features, 7).covariance(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parts", [(300, 200), (1, 350, 149), (0, 500), (500, 0, 0)])
def test_merged_ranks_are_the_whole(parts: tuple[int, ...]) -> None:
    features = rows(500, 6) + 1e3
    merged, *others = [of(part, 64) for part in features.split(list(parts))]
    merged.merge(others)
    assert same(merged, of(features))
    second = of(features.split(list(parts))[1], 64)
    assert torch.equal(others[0].mean, second.mean), "merging changed the other"


def gather_on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    features = rows(90, 5).split([31, 59])[rank]
    whole = of(features, 16).gather()
    torch.save((whole.count, whole.mean, whole.scatter), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_gather_the_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    torch.multiprocessing.spawn(gather_on_a_rank, (str(tmp_path),), 2)
    (count, mean, scatter), other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(exact(mean, scatter / (count - 1), count), of(rows(90, 5)))
    assert torch.equal(scatter, other[2]), "ranks that differ in rounding print two results"


def test_alone_gathering_gives_a_copy() -> None:
    features = rows(40, 3)
    first = of(features[:20])
    whole = first.gather()
    whole.add(features[20:])
    assert same(whole, of(features)) and same(first, of(features[:20]))


def test_unusable_features_are_refused() -> None:
    found = Statistics(3)
    with pytest.raises(ValueError, match=r"\(4, 2\), expected \[B, 3\]"):
        found.add(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="not finite"):
        found.add(torch.full((4, 3), math.nan))
    with pytest.raises(ValueError, match="do not join"):
        found.merge([Statistics(2)])
    found.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="here are 1"):
        frechet_distance(found, found)
    with pytest.raises(ValueError, match="3 and 2 features"):
        frechet_distance(found, Statistics(2))


# ---------------------------------------------------------------- the distance
def spd(width: int, seed: int) -> Tensor:
    return torch.cov(rows(5 * width, width, seed).T)


def near(found: float, expected: Tensor | float, tolerance: float = 1e-9) -> bool:
    return math.isclose(found, float(expected), rel_tol=tolerance, abs_tol=tolerance)


def test_equal_covariances_leave_the_means() -> None:
    covariance, mean = spd(7, 0), torch.arange(7.0).double()
    found = frechet_distance(exact(mean, covariance), exact(2 * mean + 1, covariance))
    assert near(found, (mean + 1).square().sum())


def test_one_dimension_is_the_difference_of_deviations() -> None:
    one = exact(torch.tensor([1.0]), torch.tensor([[4.0]]))
    two = exact(torch.tensor([4.0]), torch.tensor([[25.0]]))
    assert near(frechet_distance(one, two), 9 + (5 - 2) ** 2)


def test_diagonal_and_commuting_covariances() -> None:
    """Sums over axes of (difference of deviations)²; turned together, the same."""
    first, second = torch.tensor([9.0, 0.25, 4.0, 0.0]).double(), torch.tensor([1.0, 4.0, 0.0, 0.0]).double()
    expected = (first.sqrt() - second.sqrt()).square().sum()
    turn = torch.linalg.qr(rows(4, 4))[0]
    for q in (torch.eye(4).double(), turn):
        a, b = (exact(torch.zeros(4), q @ torch.diag(d) @ q.T) for d in (first, second))
        assert near(frechet_distance(a, b), expected)


@pytest.mark.parametrize("seed", range(5))
def test_two_dimensions_by_formula(seed: int) -> None:
    """For 2×2: tr √M = √(tr M + 2 √det M), M = Σ₁ Σ₂ (Cayley and Hamilton)."""
    first, second, means = spd(2, seed), spd(2, seed + 50), rows(2, 2, seed)
    product = first @ second
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = (means[0] - means[1]).square().sum() + first.trace() + second.trace() - 2 * root
    a, b = exact(means[0], first), exact(means[1], second)
    assert near(frechet_distance(a, b), expected) and near(frechet_distance(b, a), expected)


def test_many_dimensions_by_the_products_eigenvalues() -> None:
    """Those of Σ₁ Σ₂, which is not symmetric, by the general solver: another way to the same trace."""
    first, second = spd(40, 1), spd(40, 2)
    roots = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    found = frechet_distance(exact(torch.zeros(40), first), exact(torch.zeros(40), second))
    assert near(found, first.trace() + second.trace() - 2 * roots, 1e-7)


@pytest.mark.parametrize("count", [2, 20, 127, 400])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_a_set_is_at_distance_zero_from_itself(count: int, scale: float) -> None:
    """Also with fewer images than features, where the covariance is singular."""
    features = rows(count, 128) * scale
    found = frechet_distance(of(features), of(features.flip(0), 9))
    assert 0 <= found < 1e-6 * max(1, scale ** 2)


def test_fewer_images_than_features() -> None:
    """In a larger space the distance is what it is in the subspace the features really lie in."""
    inner = [rows(60, 8, seed) for seed in (0, 1)]
    frame = torch.linalg.qr(rows(300, 300))[0][:8]
    expected = frechet_distance(*(of(features) for features in inner))
    assert near(frechet_distance(*(of(features @ frame) for features in inner)), expected, 1e-11)


def test_sets_that_vary_in_different_directions() -> None:
    """Nothing overlaps, so the traces add up: a hundred eigenvalues of 1e-16 must not count as 1e-8 each."""
    frame = torch.linalg.qr(rows(300, 300))[0]
    a, b = of(rows(60, 100, 0) @ frame[:100]), of(rows(90, 150, 1) @ frame[100:250])
    expected = (a.mean - b.mean).square().sum() + a.covariance().trace() + b.covariance().trace()
    assert near(frechet_distance(a, b), expected, 1e-12)


def test_images_that_are_all_the_same() -> None:
    a, b = of(torch.ones(5, 3)), of(torch.zeros(6, 3))
    assert near(frechet_distance(a, b), 3)


def test_shifted_features_are_at_the_same_distance() -> None:
    features = [rows(200, 10, seed) for seed in (0, 1)]
    near_zero = frechet_distance(*(of(f) for f in features))
    assert near(frechet_distance(*(of(f + 1e4) for f in features)), near_zero, 1e-7)


@torch.no_grad()
def test_pixels_to_distance(ours) -> None:
    """All of it: a set against itself is 0, against darker pictures far from it."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 40, 32, 3), generator=generator, dtype=torch.uint8)
    sets = []
    for images in (pixels, pixels.flip(0), pixels // 4):
        sets.append(Statistics(256))
        for batch in images.split([3, 1]):
            sets[-1].add(ours(inception_input(batch, "clean"))[:, :256])
    assert frechet_distance(sets[0], sets[1]) < 1e-6 < 1e-2 < frechet_distance(sets[0], sets[2])


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


FID = ["fid", "--data", "refs", "--allow-small", "--steps", "2", "--device", "cpu", "--workers", "0",
       "--json", "r.json", "--features", "c.pt"]


def result_of(*flags: str) -> dict:
    drawn = [] if "--images" in flags else ["--ckpt", "c.pt"]
    evaluate.main([*FID, *drawn, *flags])
    return json.loads(Path("r.json").read_text())


def test_the_command_equals_its_parts_done_slowly(drawer, capsys) -> None:
    found = result_of("--batch-size", "7", "--out", "drawn", "--seed", "5")
    assert "guidance scale" in capsys.readouterr().out and found["n"] == found["n_reference"] == 40
    model = models.load("c.pt")
    source = data.open_source("refs")
    prompts = [source.captions(i)[0] for i in range(40)]
    tokens = []
    for pictures in ([np.asarray(to_pil(sample.draw_images(model, [prompt], [5 + i], steps=2)[0]))
                      for i, prompt in enumerate(prompts)],
                     [data.to_square(source.read(i).image, 32) for i in range(40)]):
        rows = [evaluate.image_tokens(model, model.read_batch(torch.from_numpy(picture[None])), [i], 5)
                for i, picture in enumerate(pictures)]
        tokens.append(torch.cat(rows).double())
    ours, theirs = tokens
    expected = slow_distance(ours, theirs)
    assert found["fid"] == pytest.approx(expected, rel=1e-3)
    again = result_of("--images", "drawn", "--seed", "5", "--image-size", "32")
    assert again["fid"] == pytest.approx(found["fid"], rel=1e-6), "PNG loses nothing"


def slow_distance(a: Tensor, b: Tensor) -> float:
    """By the eigenvalues of Σ₁ Σ₂ itself."""
    roots = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).sqrt().real.sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()
            - 2 * roots).item()


def test_damaged_pictures_are_told_and_too_many_refused(drawer, capsys) -> None:
    for i in (3, 9):
        Path(f"refs/{i:02d}.png").write_bytes(b"no picture")
    found = result_of("--max-bad", "0.1", "--images", "refs")
    assert found["n"] == found["n_reference"] == 38
    assert found["skipped"]["skipped"] == found["skipped"]["skipped_pictures"] == {"unreadable image": 2}
    assert "left out: 4 unreadable image" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main([*FID, "--ckpt", "c.pt", "--max-bad", "0.01"])
    assert "unusable" in capsys.readouterr().err


def test_both_sets_are_compared_at_the_same_size(drawer) -> None:
    result_of("--image-size", "16", "--out", "drawn")
    assert Image.open("drawn/000000.png").size == (16, 16)


def test_inception_from_a_file(drawer, weights) -> None:
    torch.save(weights, "inception.pth")
    evaluate.main(["fid", "--data", "refs", "--images", "refs", "--allow-small", "--device", "cpu", "--json",
                   "r.json", "--inception", "inception.pth", "--workers", "0", "--image-size", "32"])
    found = json.loads(Path("r.json").read_text())
    assert abs(found["fid"]) < 1e-4 and "Inception pool3, clean" in found["protocol"]["features"]


@pytest.mark.parametrize("flags, message", [
    (["--control", "no-image"], "--control"), (["--images", "nowhere"], "no pictures"),
    (["--data", "nowhere"], "no data"), (["--images", "refs", "--features", "none.pt"], "none.pt")])
def test_mistakes_end_in_one_line_and_status_2(drawer, capsys, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*FID, *([] if "--images" in flags else ["--ckpt", "c.pt"]), *flags])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in error and "\n" not in error


def test_few_pictures_are_refused(drawer, capsys) -> None:
    with pytest.raises(SystemExit):
        evaluate.main([*[flag for flag in FID if flag != "--allow-small"], "--ckpt", "c.pt"])
    assert "40 pictures" in capsys.readouterr().err


def test_ranks_share_it_and_agree(drawer) -> None:
    alone = result_of("--batch-size", "6")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(drawer / "home")}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone",
                    str(ROOT / "evaluate.py"), *FID, "--ckpt", "c.pt", "--batch-size", "6"], check=True,
                   env=env, capture_output=True, timeout=300)
    shared = json.loads(Path("r.json").read_text())
    assert shared["ranks"] == 3 and shared["n"] == shared["n_reference"] == 40
    assert shared["fid"] == pytest.approx(alone["fid"], rel=1e-4)
