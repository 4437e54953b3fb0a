"""Random crops and RandAugment against torchvision, to the pixel; batches that depend on the step alone."""
import itertools

import numpy as np
import pytest
import torch
from conftest import import_oracle
from PIL import Image
from test_sources import captions_of, encoded, shards, take

import data
from data import CROP_AREA, CROP_ASPECT, rand_augment, random_crop

SIZES = [(48, 48), (65, 40), (31, 77)]             # width, height


@pytest.fixture(scope="module")
def torchvision():
    return import_oracle("torchvision.transforms")


@pytest.fixture()
def replay(torchvision, monkeypatch):
    """replay(rng): from here on torchvision draws what it draws from rng, in place of torch's generator."""
    def start(rng: np.random.Generator) -> None:
        monkeypatch.setattr(torch, "randint", lambda *bounds, size=(1,): torch.tensor(
            [rng.integers(*[bound for bound in bounds if isinstance(bound, int)])]))
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: torch.tensor(
            [rng.uniform(float(low), float(high))]))
    return start


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Blobs with some grain and a narrow range of values, so that every operation has something to do."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(20, 220, (5, 5, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.integers(-12, 13, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(blobs) + grain).clip(3, 251).astype(np.uint8))


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


# ---------------------------------------------------------------- RandAugment
def test_rand_augment_is_torchvisions(torchvision, replay) -> None:
    """200 operations: each kind comes eight times at least, one with a sign twice at least with either."""
    theirs = torchvision.RandAugment(2, 9, 31)
    for seed in range(100):
        image = photo(SIZES[seed % 3], seed)
        ours = rand_augment(image, np.random.default_rng(seed))
        replay(np.random.default_rng(seed))
        assert same(ours, theirs(image)), f"seed {seed}: other operations, signs or values"


# ---------------------------------------------------------------- random crops
@pytest.mark.parametrize("area", [CROP_AREA, (0.08, 1.0), (0.9, 1.0)])
def test_random_crops_are_torchvisions(torchvision, replay, monkeypatch, area: tuple) -> None:
    monkeypatch.setattr(data, "CROP_AREA", area)
    theirs = torchvision.RandomResizedCrop(24, area, CROP_ASPECT, torchvision.InterpolationMode.BICUBIC)
    # The last two are so long that no part fits, or hardly one: then it is the centre.
    images = [photo(size, seed) for seed, size in enumerate([*SIZES, (24, 24), (300, 20), (21, 200)])]
    for image, seed in itertools.product(images, range(40)):
        ours = random_crop(image, 24, np.random.default_rng(seed))
        replay(np.random.default_rng(seed))
        assert same(ours, theirs(image)), (image.size, seed)


def test_crops_of_reduced_jpegs_are_never_enlarged() -> None:
    assert (CROP_AREA[0] * CROP_ASPECT[0]) ** 0.5 > 0.5, \
        "sources decode a JPEG at twice the side that is needed, or a little more; a part of it must do"


# ---------------------------------------------------------------- batches
@pytest.fixture()
def source(tmp_path):
    """Twelve pictures, one of them broken, in two tars."""
    return shards(tmp_path, [6, 6], lambda shard, i: {
        "png": b"broken" if (shard, i) == (1, 2) else encoded(photo((40, 28), 6 * shard + i), "PNG"),
        "txt": f"caption {shard} {i}".encode()})


def by_sample(batches: list) -> list[dict]:
    """Epochs of twelve -> each caption's picture."""
    rows = [row for batch in batches for row in zip(batch.captions, batch.images)]
    return [dict(rows[first:first + 12]) for first in range(0, len(rows), 12)]


def test_an_augmented_picture_depends_on_seed_epoch_and_sample(source) -> None:
    batches = take(source, 3, augment=True)
    for plain, here, there in zip(take(source, 3), batches, take(source, 3, augment=True, workers=2)):
        assert torch.equal(here.images, there.images), "the number of workers must not change the data"
        assert here.images.shape == (8, 16, 16, 3) and not torch.equal(here.images, plain.images)
        assert (here.captions, here.skipped) == (plain.captions, plain.skipped)
    epochs = by_sample(batches)
    others = by_sample(take(source, 8, batch_size=3, augment=True, shuffle_buffer=6))
    seeds = by_sample(take(source, 3, seed=4, augment=True))
    assert len(epochs) == len(others) == 2 and len(epochs[0]) == 11
    for epoch, other in zip(epochs, others):
        assert all(torch.equal(image, other[caption]) for caption, image in epoch.items()), \
            "its place must not count"
    for caption, image in epochs[0].items():
        assert not torch.equal(image, epochs[1][caption]), "every epoch has crops of its own"
        assert not torch.equal(image, seeds[0][caption])


def test_batches_hold_torchvisions_pictures(torchvision, replay, source) -> None:
    batches, bicubic = take(source, 2, augment=True), torchvision.InterpolationMode.BICUBIC
    theirs = torchvision.Compose([torchvision.RandomResizedCrop(16, CROP_AREA, CROP_ASPECT, bicubic),
                                  torchvision.RandAugment()])
    index = {caption: i for i, caption in enumerate(captions_of(source))}
    for caption, image in by_sample(batches)[0].items():
        replay(np.random.default_rng([3, 0, index[caption], 1]))
        expected = theirs(source.read(index[caption]).image)
        assert np.array_equal(np.asarray(expected), image.numpy()), "crop, then RandAugment of what is seen"
