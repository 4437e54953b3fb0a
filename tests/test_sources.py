"""Sources against broken files, and batches against the promise that they depend on nothing but the step."""
import io
import itertools
import json
import os
import tarfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
from data import (BadSample, SkipReport, Stream, TarSource, Tokenizer, decode_image, open_source, to_square,
                  training_batches)

# Broken shards with a list of what a careful loader makes of them; too large to be kept here.
HOSTILE = Path(os.environ.get("DIFFDIS_DATA", ROOT.parent / "shared" / "data")) / "hostile"


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(colour=(200, 30, 30), size=(40, 24), form="JPEG", mode="RGB", **options) -> bytes:
    return encoded(Image.new("RGB", size, colour).convert(mode), form, **options)


def write_tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            if isinstance(body, str):           # a link to there
                info.type, info.linkname, body = tarfile.SYMTYPE, body, b""
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def captioned(*keys: str) -> list[tuple[str, bytes]]:
    """A picture and its caption for each key."""
    return [(f"{key}.{kind}", body) for key in keys
            for kind, body in (("jpg", picture(size=(20, 20))), ("txt", f"caption {key}".encode()))]


def shards(folder: Path, sizes: list[int], sample=None):
    """A source of tars of so many samples each. sample: shard, number in it -> members by suffix."""
    for shard, size in enumerate(sizes):
        keys = [f"{shard}_{i}" for i in range(size)]
        write_tar(folder / f"{shard}.tar", captioned(*keys) if sample is None else [
            (f"{key}.{kind}", body) for i, key in enumerate(keys) for kind, body in sample(shard, i).items()])
    return open_source(str(folder))


def read_all(source) -> tuple[list, Counter]:
    """All usable samples in order, and why others are not."""
    found, skipped = [], Counter(source.skipped)
    for i in range(len(source)):
        try:
            found.append(source.read(i))
        except BadSample as bad:
            skipped[str(bad)] += 1
    return found, skipped


def captions_of(source) -> list[str]:
    return [source.captions(i)[0] for i in range(len(source))]


# ---------------------------------------------------------------- one picture
@pytest.mark.parametrize("mode, form", [("RGB", "JPEG"), ("RGB", "PNG"), ("RGB", "WEBP"), ("CMYK", "JPEG"),
                                        ("P", "PNG"), ("RGBA", "PNG"), ("P", "GIF")])
def test_every_mode_gives_its_colours(mode: str, form: str) -> None:
    image = decode_image(picture((200, 30, 30), form=form, mode=mode))
    assert image.mode == "RGB" and image.size == (40, 24)
    assert np.abs(np.asarray(image).mean((0, 1)) - (200, 30, 30)).max() < 6


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    raw = encoded(Image.fromarray(np.full((16, 16), 60000, np.uint16)), "PNG")
    assert abs(np.asarray(decode_image(raw)).mean() - 60000 / 257) < 1


def test_exif_rotation_is_applied_and_broken_metadata_costs_no_picture(monkeypatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = picture(size=(40, 24), exif=exif)
    assert decode_image(rotated).size == (24, 40)
    monkeypatch.setattr(data.ImageOps, "exif_transpose", lambda *args, **options: 1 / 0)
    assert decode_image(rotated).size == (40, 24), "the pixels are sound"
    monkeypatch.setattr(Image.Image, "convert", lambda *args: 1 / 0)
    with pytest.raises(BadSample, match="unreadable image"):
        decode_image(rotated)


@pytest.mark.parametrize("raw, cause", [
    (picture(size=(300, 300))[:900], "unreadable image"), (b"", "unreadable image"),
    (b"a text", "unreadable image"), (picture(size=(3, 2000), form="PNG"), "image too small"),
    (picture(size=(9000, 9000), form="PNG", mode="1"), "unreadable image"),     # a decompression bomb
    # Other formats are not opened: for an EPS, Pillow would start Ghostscript on a stranger's file.
    *((picture(form=form), "unreadable image") for form in ("TIFF", "BMP", "PPM", "EPS"))])
def test_unusable_pictures_are_named(raw: bytes, cause: str) -> None:
    with pytest.raises(BadSample) as bad:
        decode_image(raw)
    assert str(bad.value) == cause


def test_to_square_takes_the_centre() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    assert to_square(Image.fromarray(pixels), 10).min() > 250, \
        "what is not in the centre square must not come in"


def test_large_jpegs_are_decoded_small() -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), Image.BICUBIC)
    raw = encoded(smooth, "JPEG", quality=92)
    whole, small = decode_image(raw), decode_image(raw, side=60)
    assert whole.size == (640, 480) and small.size == (160, 120), "the smallest of twice the need or more"
    difference = to_square(whole, 64).astype(int) - to_square(small, 64)
    assert np.abs(difference).mean() < 1 and np.abs(difference).max() < 16
    assert decode_image(raw, side=256).size == (640, 480)


# ---------------------------------------------------------------- tars
def test_a_small_hostile_tar(tmp_path) -> None:
    jpg, deep = picture(), b"[" * 100_000       # a parser that recurses gives up with another error
    red, blue = picture((220, 20, 20)), picture((20, 20, 220))
    path = write_tar(tmp_path / "00000.tar", [
        ("a.jpg", jpg), ("a.txt", b"good"), ("a.json", deep),
        ("b.jpg", jpg),                                                  # no caption
        ("c.txt", b"no image"),
        ("d.jpg", red), ("d.txt", b"red"), ("d.jpg", blue), ("d.txt", b"blue"),       # the same name twice
        ("e.jpg", jpg), ("f.jpg", jpg), ("f.txt", b"f"), ("e.txt", b"late"),          # not side by side
        ("g.JPG", jpg), ("g.json", json.dumps({"caption": "from json", "captions": ["one", "two"]}).encode()),
        ("._h.jpg", b"shadow"), ("h.jpg", jpg), ("h.txt", "café".encode("latin-1")),
        ("n.v1.jpg", jpg), ("n.v1.txt", b"dotted"),
        ("../../evil.jpg", jpg), ("../../evil.txt", b"evil"),
        ("i.jpg", jpg[:200]), ("i.txt", b"truncated"),
        ("j.jpg", jpg), ("j.txt", b" \n "), ("m.jpg", jpg), ("m.json", deep),
        *((f"{raw}{end}", jpg if "jpg" in end else raw) for raw in (b"\xe9", b"\xff\xfee\0", b"e\0")
          for end in ("j.jpg", "j.json", "t.jpg", "t.txt")),        # Latin-1, UTF-16, without a mark
        ("k.json", b"{not json"), ("k.txt", b"k"), ("k.cls", b"7"), ("k.jpg", jpg),
        ("l.jpg", "/etc/hostname"), ("l.txt", b"x")])
    before = sorted(tmp_path.rglob("*"))
    source = TarSource("test", [path])
    found, skipped = read_all(source)
    assert [sample.captions for sample in found] == [
        ["good"], ["red"], ["blue"], ["f"], ["one", "two"], ["dotted"], ["evil"], ["k"]]
    for sample, channel in zip(found[1:3], (0, 2)):
        assert np.asarray(sample.image)[..., channel].mean() > 200, "a picture got another sample's caption"
    assert skipped == {"no caption": 2, "no image": 3, "empty caption": 2, "unreadable image": 1,
                       "caption is not UTF-8": 7}
    assert sorted(tmp_path.rglob("*")) == before, "reading a tar must write nothing beside it"
    with pytest.raises(ValueError, match="2 no caption, 3 no image"):
        open_source(str(path), max_bad=0.05)


def test_a_damaged_shard_is_said_and_weighed(tmp_path, recwarn) -> None:
    good, flipped, joined, last = shards(tmp_path, [40] * 4).tars
    raw = bytearray(flipped.read_bytes())
    with tarfile.open(flipped) as tar:
        raw[tar.getmembers()[40].offset + 150] ^= 1              # the checksum of a header in the middle
    flipped.write_bytes(raw)
    joined.write_bytes(joined.read_bytes() + last.read_bytes())
    source = TarSource("test", [good, flipped, joined])
    assert len(source) == 40 + 20 + 40, "tarfile stops at a bad header without a word"
    assert 50 <= source.skipped["damaged shard"] <= 70, "20 and 40 samples were lost"
    assert sum("are lost" in str(warning.message) for warning in recwarn) == 2


def test_broken_shards_do_not_stop_the_rest(tmp_path, recwarn) -> None:
    for name in "07":
        write_tar(tmp_path / f"{name}.tar", captioned(*"0123"))
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:6000])       # within 2.jpg
    (tmp_path / "2.tar").write_bytes(b"")
    (tmp_path / "3.tar").write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 4096, np.uint8)))
    tarfile.open(tmp_path / "4.tar", "w:gz").close()
    write_tar(tmp_path / "5.tar", [])
    block = tarfile.TarInfo("x")                # long names without an end, in which tarfile recurses
    block.type, block.size = tarfile.GNUTYPE_LONGNAME, 4
    (tmp_path / "6.tar").write_bytes(3000 * (block.tobuf(tarfile.GNU_FORMAT) + b"name".ljust(512, b"\0")))
    source = open_source(str(tmp_path))
    whole, said = captions_of(source), " ".join(str(warning.message) for warning in recwarn)
    assert len(whole) == 8 + 2 and whole[-4:] == whole[:4], "shards after a broken one are reached"
    assert [name for name in "01234567" if f"{name}.tar" in said] == list("123456"), "bad shards are named"
    assert source.skipped["damaged shard"] >= 6
    assert read_all(source)[1] == source.skipped, "what was indexed of a cut shard must be whole"


@pytest.mark.skipif(not HOSTILE.is_dir(), reason="the hostile shards are not on this machine")
def test_hostile_shards_as_expected() -> None:
    expected = json.loads((HOSTILE / "EXPECTED.json").read_text())
    found, _ = read_all(TarSource("hostile", [HOSTILE / "00000.tar"]))
    for case in expected["samples"]:
        got = [sample for sample in found if sample.captions[0] in case.get("caption", "")]
        allowed = {case["expect"], *case.get("tolerated", [])}
        assert ("yield" if got else "skip") in allowed, case
        if got and case["expect"] == "yield":
            assert list(got[0].image.size) == case["size_after_conversion"], case
            if "mean_rgb_after_conversion" in case:
                mean = np.asarray(got[0].image, np.float64).mean((0, 1))
                assert np.abs(mean - case["mean_rgb_after_conversion"]).max() <= 4, (case, mean)
    told = " ".join(case.get("caption", "") + case.get("note", "") for case in expected["samples"])
    assert all(s.captions[0] in told for s in found), "of another file"


def test_an_index_is_kept_and_forgotten_when_a_shard_changes(tmp_path, monkeypatch, recwarn) -> None:
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/9.tar").write_bytes(b"")
    first = shards(tmp_path / "tars", [3, 4])
    with monkeypatch.context() as patch:
        patch.setattr(TarSource, "index_shard", None)             # a second reading would fail
        again = open_source(str(tmp_path / "tars"))
    assert captions_of(again) == captions_of(first) and again.captions(6) == ["caption 1_3"]
    assert again.skipped == first.skipped
    assert again.skipped["damaged shard"] == 1 and any("9.tar is damaged" in str(w.message) for w in recwarn)
    assert len(shards(tmp_path / "tars", [3, 5])) == 8
    for index in (tmp_path / "cache").iterdir():
        index.write_bytes(b"damaged")
    assert len(shards(tmp_path / "tars", [3, 5])) == 8


# ---------------------------------------------------------------- folders
@pytest.mark.parametrize("name, files, words", [
    ("cc3m", (), "no data at cc3m"), ("nowhere", (), "expected shapes, a folder, a tar"),
    ("a.jpg", ("a.jpg",), "expected shapes, a folder, a tar"), (".", ("0.tar",), "no usable sample"),
    (".", ("0.tar", "a.jpg"), "1 tars and 1 images"),
    # Else every picture is trained as "a photo of an Images", and zero-shot of one class is always right:
    *((".", files, "two or more class folders") for files in (
        (), ("In/cat/a.jpg", "In/dog/b.jpg"), ("cat/a.jpg", "dog.jpg"), ("Images/a.jpg", "Images/b.jpg"))),
    *((".", files, "below it " + ", ".join(sorted(Path(f).parts[0] for f in files))) for files in (
        ("cc3m-train-0.tar", "cc3m-validation-0.tar"), ("Test0.tar", "trainval.tar"), ("x-eval-0.tar",),
        ("cars_train/a.jpg", "cars_test/a.jpg"), ("trainA/a.jpg", "testB/a.jpg"), ("Evaluation/cat/a.jpg",),
        ("test_set/a.jpg", "Training/b.jpg"), ("train_images/0.tar", "eval-01/0.tar"))),
    *((".", ("cat/a.jpg", "dog/a.jpg", file), words) for file, words in (
        ("elk/", "see elk"), ("elk/a.bmp", "see elk"), ("__MACOSX/cat/._a.jpg", "see __MACOSX"),
        ("cat/@eaDir/a.jpg/b.jpg", "see a.jpg"), ("elk ->", "No such file .*/elk"),
        ("elk/a.jpg ->", "No such file .*/elk/a.jpg"), ("locked/a.jpg", "No such file .*none"),
        *((f"cat/{file}", "1 other suffix") for file in ("b.bmp", "a.TXT", "a.caption", "tmp")),
        *((f"{holder}/a.jpg", f"like {holder} have no names") for holder in (
            "images", "JPEGImages", "SegmentationClass", "masks_2", "photos", "@eaDir"))))])
def test_what_is_no_data_or_half_understood_is_refused(tmp_path, monkeypatch, name, files, words) -> None:
    monkeypatch.chdir(tmp_path)
    for path, kind in ((Path(file.split()[0]), file[-1]) for file in files):
        (path if kind == "/" else path.parent).mkdir(parents=True, exist_ok=True)
        if kind == ">":
            path.symlink_to("nowhere")
        elif kind != "/":
            path.write_bytes(picture())
    if "0.tar" in files:
        write_tar(Path("0.tar"), [("a.txt", b"x")])
    see = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: see(Path("none") if path.name == "locked" else path))
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        open_source(name, max_bad=0.05)


def test_links_are_followed_but_not_twice_and_hidden_files_not_seen(tmp_path) -> None:
    for name in ("real/cat", "data/dog", "data/.ipynb_checkpoints"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.jpg").write_bytes(picture())
        (tmp_path / name / "._0.jpg").write_bytes(b"a shadow file of macOS")
    (tmp_path / "data/cat").symlink_to(tmp_path / "real/cat")
    source = open_source(str(tmp_path / "data"))
    assert source.classes == ["cat", "dog"] and len(source) == 2
    for target in ("data", "real/cat"):
        (tmp_path / "data/again").symlink_to(tmp_path / target)
        with pytest.raises((ValueError, OSError), match="twice: remove one|Too many levels"):
            open_source(str(tmp_path / "data"))
        (tmp_path / "data/again").unlink()


@pytest.mark.parametrize("kind", ["tars", "captions", "classes"])
def test_training_never_sees_the_validation_half(tmp_path, kind: str) -> None:
    def put(*folders: str) -> None:
        for folder in [tmp_path / name for name in folders]:
            for name in ("big_cat", "owl") if kind == "classes" else ("",):
                (folder / name).mkdir(parents=True)
                (folder / name / "a.jpg").write_bytes(picture())
            if kind == "captions":
                for name in ("a.txt", "b.jpg", "c.bmp", "c.txt", "README.txt"):
                    (folder / name).write_bytes(picture() if "txt" not in name else b"a")
            if kind == "tars":
                (folder / "a.jpg").unlink()
                write_tar(folder / "test-0.tar", captioned("a"))

    put("both/train", "both/val", "tested/train", "tested/Test", "called/Training", "higher/set/train2017",
        "higher/set/val2017")
    for split in ("train", "val"):
        source = open_source(str(tmp_path / "both"), split)
        path = (source.tars if kind == "tars" else source.images)[0]
        assert path.relative_to(tmp_path / "both").parts[0] == split
    if kind == "captions":
        assert len(source) == 1 and source.skipped == {"no caption": 1, "no image": 1}
    if kind == "classes":
        assert source.classes == ["big cat", "owl"] and source.read(1).label == 1
        assert [source.captions(i) for i in range(2)] == [["a photo of a big cat"], ["a photo of an owl"]]
    assert len(open_source(str(tmp_path / "tested"), "train")) > 0
    if kind == "tars":
        for name, split in (("cc3m-trainval-0", "train"), ("x-test", "val"), ("dev-1", "val"), ("0", "val")):
            (tmp_path / name).mkdir()
            write_tar(tmp_path / name / f"{name}.tar", captioned("a"))
            assert len(open_source(str(tmp_path / name), split)) == 1
            with pytest.raises(ValueError, match="but below it") if name != "0" else nullcontext():
                open_source(str(tmp_path / name), {"train": "val", "val": "train"}[split])
    for name, split in (("tested", "val"), *itertools.product(("called", "higher"), ("train", "val"))):
        with pytest.raises(ValueError, match=f"no folder {split}, but below it"):
            open_source(str(tmp_path / name), split)


def test_a_line_of_a_text_file_is_a_caption_in_tars_as_in_folders(tmp_path) -> None:
    text, meta = b"\xef\xbb\xbfone\r\n\n two \nthree", json.dumps({"captions": ["four", 5, " "]}).encode()
    path = write_tar(tmp_path / "0.tar", [
        ("a.jpg", picture()), ("a.txt", text), ("b.jpg", picture()), ("b.txt", b"six"), ("b.json", meta),
        ("c.jpg", picture()), ("c.json", meta), ("d.jpg", picture()), ("d.json", b'{"caption": "seven"}'),
        ("e.jpg", picture()), ("e.txt", b"nine"), ("e.json", b'{"captions": ["eight", "nine"]}')])
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    for name in ("0.tar", "folder"):
        source = open_source(str(tmp_path / name))
        captions = [source.captions(i) for i in range(5)]
        assert captions[:4] == [["one", "two", "three"], ["six"], ["four"], ["seven"]], \
            "KEY.txt wins over others"
        assert captions[4] == ["eight", "nine"], "of which it is one"


def test_a_fingerprint_is_of_the_samples_wherever_they_lie(tmp_path) -> None:
    prints = []
    for place, text in (("here", b"dog"), ("there", b"dog"), ("changed", b"cat")):
        path = write_tar(tmp_path / f"{place}.tar", [*captioned("a"), ("b.jpg", picture()), ("b.txt", text)])
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / place, filter="data")
        prints.append({open_source(str(name)).fingerprint() for name in (path, tmp_path / place)})
    assert prints[0] == prints[1] and not prints[0] & prints[2]


def test_a_file_that_vanishes_is_a_bad_sample(tmp_path) -> None:
    for name in ("a.jpg", "a.txt", "b.jpg", "b.txt"):
        (tmp_path / name).write_bytes(picture() if "jpg" in name else b"text")
    source = open_source(str(tmp_path))
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.txt").unlink()
    assert read_all(source) == ([], {"unreadable image": 1, "empty caption": 1})


# ---------------------------------------------------------------- batches
BAD = 16              # of the samples of `tars` the one whose caption is empty


@pytest.fixture()
def tars(tmp_path):
    return shards(tmp_path, [12, 12], lambda shard, i: {
        "jpg": picture((shard * 100, i * 10, 50), (20, 20)),
        "txt": b"" if 12 * shard + i == BAD else f"caption {shard} {i}".encode()})


def take(source, count: int, batch_size: int = 8, seed: int = 3, **options) -> list:
    return list(itertools.islice(training_batches(source, 16, batch_size, seed, **options), count))


def test_batches_depend_on_the_step_alone(tars) -> None:
    options = dict(tokenizer=Tokenizer.learn(["caption 0 1"], 520, 16), draw=lambda k: {"step": k})
    alone, late = take(tars, 6, **options), take(tars, 2, start=4)
    for k, (batch, other) in enumerate(zip(alone, take(tars, 6, workers=2, **options))):
        assert torch.equal(batch.images, other.images), "the number of workers must not change the data"
        assert batch.drawn == other.drawn == {"step": k}
        assert torch.equal(batch.tokens, other.tokens)
        assert torch.equal(batch.tokens, options["tokenizer"](batch.captions))
    assert [b.captions for b in late] == [b.captions for b in alone[4:]], "resuming must go on in the stream"


@pytest.mark.parametrize("sizes", [[50], [1, 40, 9], [8, 3, 20, 1, 6, 2, 10]])
def test_any_shards_serve_any_ranks_and_workers(tmp_path, sizes: list[int]) -> None:
    """One shard for six consumers, or shards of one sample: the stream is the same, and never ends."""
    source, options = shards(tmp_path, sizes), dict(shuffle_buffer=12)
    alone = take(source, 20, **options)                       # more than three epochs
    for world, workers in ((2, 3), (4, 1)):
        options |= dict(world=world, workers=workers)
        ranks = [take(source, 20, rank=rank, **options) for rank in range(world)]
        for batch, *parts in zip(alone, *ranks):
            for rank, part in enumerate(parts):
                assert part.captions == batch.captions[rank::world]
                assert torch.equal(part.images, batch.images[rank::world])
    stream = [caption for batch in alone for caption in batch.captions]
    for epoch in range(3):
        assert len(set(stream[50 * epoch:50 * epoch + 50])) == 50, "an epoch is every sample once"
    assert stream[:50] != stream[50:100], "every epoch has an order of its own"


def test_the_shuffle_buffer_reads_shard_after_shard(tmp_path) -> None:
    source, stretches = shards(tmp_path, [20] * 10), []
    orders = [list(Stream(source, 16, seed, 40).order(epoch)) for seed, epoch in ((3, 0), (3, 1), (4, 0))]
    for order in orders:
        assert sorted(order) == list(range(200))
        parts = [order[first:first + 40] for first in range(0, 200, 40)]
        assert all(part != sorted(part) for part in parts), "mixed with each other"
        stretches.append([{place // 20 for place in part} for part in parts])
        assert all(len(shards) == 2 for shards in stretches[-1]), "40 samples are those of two shards of 20"
        assert stretches[-1] != [{2 * k, 2 * k + 1} for k in range(5)], "shards come in another order"
    assert stretches[0] != stretches[1] and stretches[0] != stretches[2], "of each epoch and seed its own"
    assert orders[0] == list(Stream(source, 16, 3, 40).order(0))


def test_every_epoch_chooses_among_the_captions_anew(tmp_path) -> None:
    captions = [f"caption {k}" for k in range(5)]
    source = shards(tmp_path, [8], lambda _, i: {
        "jpg": picture((30 * i,) * 3), "json": json.dumps({"captions": captions}).encode()})
    seen: dict[int, set] = {}
    for batch in take(source, 6):                                     # an epoch each
        for image, caption in zip(batch.images, batch.captions):
            seen.setdefault(int(image[0, 0, 0]), set()).add(caption)
    assert len(seen) == 8 and set().union(*seen.values()) == set(captions)
    assert all(len(own) > 1 for own in seen.values()), "a picture keeps one caption"


def test_an_epoch_shows_every_sample_once_and_replaces_bad_ones(tars) -> None:
    batches = take(tars, 3)           # 24 positions = one epoch, one sample of it bad
    shown = [caption for batch in batches for caption in batch.captions]
    assert len(shown) == 24 and set(shown) == {f"caption {n // 12} {n % 12}" for n in range(24) if n != BAD}
    assert sum((b.skipped for b in batches), Counter()) == {"empty caption": 1}
    assert all(len(set(b.captions)) == 8 for b in batches), "a substitute is no neighbour's twin"


@pytest.mark.parametrize("count", [2, 3, 6, 10, 16, 30])
def test_a_bad_sample_is_replaced_by_any_other_that_is_good(tmp_path, count: int) -> None:
    source = shards(tmp_path, [count], lambda _, i: {
        "jpg": picture() if i == count - 1 else b"bad", "txt": str(i).encode()})
    assert take(source, 1, 2)[0].captions == [str(count - 1)] * 2


def test_too_many_bad_samples_stop() -> None:
    SkipReport(0.05, 99, Counter({"unreadable image": 6})).check()
    SkipReport(0.05, 120, Counter({"unreadable image": 6})).check(final=True)
    SkipReport(0.05, 120, Counter({"unreadable image": 13})).check()       # 6 and, by chance, 7.3
    for bad, final in ((14, False), (7, True)):
        with pytest.raises(ValueError, match=f"3 no caption, {bad - 3} unreadable image"):
            SkipReport(0.05, 120, Counter({"unreadable image": bad - 3, "no caption": 3})).check(final)
