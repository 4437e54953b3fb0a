"""The layouts that evaluation data sets come in: names, numbers and pixels against files made here."""
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import build, tiny_config
from PIL import Image

import data
import model as models
from data import BadSample, check_index, evaluation_batches, evenly_spaced, open_source
from model import AutoencoderConfig


def write_image(path: Path, grey: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (grey,) * 3).save(file, "PNG")        # told by its bytes, whatever the suffix
    path.write_bytes(file.getvalue())


def greys(source) -> list[tuple[int, str | None]]:
    """(grey, class name) of every sample in order: a label is right if it is right for this very picture."""
    samples = [source.read(i) for i in range(len(source))]
    return [(int(np.asarray(s.image)[0, 0, 0]), None if s.label is None else source.classes[s.label])
            for s in samples]


def refused(match: str, error=ValueError):
    return pytest.raises(error, match=match)


# ---------------------------------------------------------------- CIFAR
@pytest.fixture()
def cifar(tmp_path) -> Path:
    """CIFAR-10's files of 3 records each: pixel values tell the file, record, plane, row and column."""
    (tmp_path / "batches.meta.txt").write_text("airplane\nautomobile\nbig_bird\n\n")
    for k, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        records = np.zeros((3, 3073), np.uint8)
        for r in range(3):
            records[r, 0] = (k + r) % 3
            plane, row, column = np.mgrid[:3, :32, :32]
            records[r, 1:] = (60 * plane + 3 * k + r + 2 * row + column % 2).ravel()
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path


def test_cifar10(cifar) -> None:
    train, val = open_source(str(cifar)), open_source(str(cifar), "val")
    assert len(train) == 15 and len(val) == 3
    assert train.classes == val.classes == ["airplane", "automobile", "big bird"]
    for index in range(15):
        sample, (file, record) = train.read(index), divmod(index, 3)
        pixels = np.asarray(sample.image).astype(int)
        assert pixels.shape == (32, 32, 3) and sample.label == train.labels[index] == (file + record) % 3
        for y, x, channel in ((0, 0, 0), (0, 1, 0), (5, 0, 1), (31, 31, 2)):
            assert pixels[y, x, channel] == 60 * channel + 3 * file + record + 2 * y + x % 2, \
                "records hold plane after plane, and rows from the top"
    assert train.captions(0) == ["a photo of an airplane"]
    assert val.read(0).captions == ["a photo of a big bird"]
    assert len({train.read(i).key for i in range(15)}) == 15
    batch = next(evaluation_batches(val, 32, 8))
    assert batch.labels == [2, 0, 1] and batch.images.shape == (3, 32, 32, 3)


def test_cifar100_takes_the_fine_label(tmp_path) -> None:
    (tmp_path / "fine_label_names.txt").write_text("apple\naquarium_fish\nbaby\n")
    (tmp_path / "coarse_label_names.txt").write_text("food\nfish\n")
    for name, count in (("train", 4), ("test", 2)):
        records = np.full((count, 3074), 7, np.uint8)
        records[:, 0], records[:, 1] = 1, np.arange(count) % 3
        records[:, 2:] = np.arange(count)[:, None] + (0 if name == "train" else 100)
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    train, val = (open_source(str(tmp_path), split) for split in ("train", "val"))
    assert greys(train) == [(0, "apple"), (1, "aquarium fish"), (2, "baby"), (3, "apple")]
    assert greys(val) == [(100, "apple"), (101, "aquarium fish")]


def test_damaged_cifar_is_refused(cifar) -> None:
    file = cifar / "data_batch_2.bin"
    whole = file.read_bytes()
    for body, words in ((whole[:-1], "9218 bytes, expected a multiple of 3073"), (b"", "0 bytes"),
                        (whole[:3073] + b"\3" + whole[3074:], "label 3 in record 1 .*expected 0 to 2")):
        file.write_bytes(body)
        with refused(words):
            open_source(str(cifar))
        assert len(open_source(str(cifar), "val")) == 3, "the test file is whole"
    file.unlink()
    with refused("no data_batch_2.bin", FileNotFoundError):
        open_source(str(cifar))
    with refused("expected train or val"):
        open_source(str(cifar), "test")
    (cifar / "batches.meta.txt").unlink()
    with refused("no batches.meta.txt", FileNotFoundError):
        open_source(str(cifar), "val")


# ---------------------------------------------------------------- class folders and names
SYNSETS = {"n01440764": "tench", "n02012849": "crane", "n03126707": "crane"}      # two classes of one name
PICTURES = [("n03126707", 30), ("n01440764", 10), ("n02012849", 20), ("n01440764", 11)]


@pytest.fixture()
def folders(tmp_path) -> Path:
    """DIR/{train,val}/SYNSET/*.JPEG, made in no order."""
    for split, shift in (("val", 0), ("train", 100)):
        for tag, grey in PICTURES:
            write_image(tmp_path / split / tag / f"x_{grey}.JPEG", grey + shift)
    return tmp_path


EXPECTED = [(10, "tench"), (11, "tench"), (20, "crane"), (30, "crane")]


@pytest.mark.parametrize("place", ["", "val"])
@pytest.mark.parametrize("name, text", [
    ("classnames.txt", "n03126707 crane\nn01440764\ttench\n\nn02012849 crane\n"),         # any order
    ("classnames.txt", "tench\ncrane\ncrane\n"),
    ("LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane, b\n")])
def test_names_of_class_folders(folders, place: str, name: str, text: str) -> None:
    (folders / place / name).write_text(text)
    source = open_source(str(folders), "val")
    assert source.classes == ["tench", "crane", "crane"] and greys(source) == EXPECTED
    assert source.labels == [0, 0, 1, 2], "two classes of one name stay two classes"
    assert source.captions(0) == ["a photo of a tench"]
    if not place:
        train = open_source(str(folders), "train")
        assert train.classes == source.classes and train.labels == source.labels
        assert greys(train)[0] == (110, "tench")


@pytest.mark.parametrize("text, words", [
    ("tench\ncrane\n", "2 names for 3 classes"),
    ("n01440764 tench\nn02012849 crane\nn03126708 crane\n", "none for folder n03126707"),
    ("n01440764 tench\nn02012849\nn03126707 crane\n", "line 2: no name for n02012849"),
    ("n01440764 tench\nn02012849 a\nn03126707 b\n\nn02012849 c\n", "line 5: a second name for n02012849"),
    ("n01440764 tench\nn02012849 a\nn03126707 b\nn99999999 c\n", "for n99999999 there is no folder"),
    ("", "0 names for 3")])
def test_names_that_do_not_fit_are_refused(folders, text: str, words: str) -> None:
    (folders / "classnames.txt").write_text(text)
    with refused(words):
        open_source(str(folders), "val")


def test_names_in_another_order_are_refused(tmp_path) -> None:
    for i, name in enumerate(("apple_pie", "churros", "pizza")):
        write_image(tmp_path / "food" / name / "0.jpg", i)
    (tmp_path / "food/classnames.txt").write_text("Pizza\nApple pie\nChurros\n")
    with refused("another order .*look at apple_pie"):
        open_source(str(tmp_path / "food"))
    (tmp_path / "food/classnames.txt").write_text("pizza A Pizza\nchurros Churros\napple_pie Apple pie\n")
    assert greys(open_source(str(tmp_path / "food"))) == [(0, "Apple pie"), (1, "Churros"), (2, "A Pizza")]
    (tmp_path / "food/classnames.txt").write_text("pizza A Pizza\nchuros Churros\napple_pie Apple pie\n")
    with refused("none for folder churros"):        # one misspelt line does not make the lines names alone
        open_source(str(tmp_path / "food"))
    (tmp_path / "food/classnames.txt").unlink()
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    assert open_source(str(tmp_path / "food")).classes == ["apple pie", "churros", "pizza"], "not ImageNet's"
    for i in range(11):
        write_image(tmp_path / "numbers" / str(i) / "0.jpg", i)
    (tmp_path / "numbers/classnames.txt").write_text("\n".join(f"name {i}" for i in range(11)))
    with refused("another order"):                 # sorted folders are 0, 1, 10, 2
        open_source(str(tmp_path / "numbers"))
    (tmp_path / "numbers/classnames.txt").write_text("\n".join(f"{i} name {i}" for i in range(11)))
    assert sorted(greys(open_source(str(tmp_path / "numbers")))) == [(i, f"name {i}") for i in range(11)]


def test_bare_synsets_are_said(folders, capsys) -> None:
    assert open_source(str(folders), "val").classes == list(SYNSETS)
    assert "no text encoder knows" in capsys.readouterr().err


def test_listing_order_changes_nothing(folders, monkeypatch) -> None:
    (folders / "classnames.txt").write_text("".join(f"{tag} {name}\n" for tag, name in SYNSETS.items()))
    walk = os.walk

    def backwards(*args, **options):
        for folder, below, names in walk(*args, **options):
            below.sort(reverse=True)
            yield folder, below, sorted(names, reverse=True)
    monkeypatch.setattr(os, "walk", backwards)
    assert greys(open_source(str(folders), "val")) == EXPECTED


# ---------------------------------------------------------------- ImageNet's flat folder
@pytest.fixture()
def flat(tmp_path) -> Path:
    for i, (_, grey) in enumerate(PICTURES, 1):
        write_image(tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", grey)
    return tmp_path


IN_FILE_ORDER = [(30, "crane"), (10, "tench"), (20, "crane"), (11, "tench")]
CSV = "ImageId,PredictionString\n" + "".join(
    f"ILSVRC2012_val_{i:08d},{tag} 85 1 499 272 {tag} 1 2 3 4 \n"
    for i, tag in [(i, PICTURES[i - 1][0]) for i in (3, 1, 4, 2)])
MAPPING = "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane, b\n"


@pytest.mark.parametrize("place", ["", "val"])
def test_flat_imagenet_with_kaggles_table(flat, place: str) -> None:
    (flat / place / "LOC_val_solution.csv").write_text(CSV)
    (flat / place / "LOC_synset_mapping.txt").write_text(MAPPING)
    source = open_source(str(flat), "val")
    assert sorted(greys(source)) == EXPECTED and source.classes == ["tench", "crane", "crane"]
    assert sorted(source.labels) == [0, 0, 1, 2]
    (flat / place / "LOC_val_solution.csv").write_text(CSV + "ILSVRC2012_val_00000009,?\n")
    with refused("line 6: 'ILSVRC2012_val_00000009"):
        open_source(str(flat), "val")
    (flat / place / "LOC_val_solution.csv").write_text(CSV + "ILSVRC2012_val_00000009,n01440764 1 2 3 4\n")
    with refused("lacks 1 of the 5 .*ILSVRC2012_val_00000009", FileNotFoundError):
        open_source(str(flat), "val")


@pytest.mark.parametrize("name, text", [
    ("LOC_synset_mapping.txt", MAPPING), ("classnames.txt", "tench\ncrane\ncrane\n"),
    ("classnames.txt", "".join(f"{tag} {name}\n" for tag, name in SYNSETS.items()))])
def test_flat_imagenet_with_caffes_list(flat, name: str, text: str) -> None:
    numbers = [list(SYNSETS).index(tag) for tag, _ in PICTURES]
    lines = [f"ILSVRC2012_val_{i:08d}.JPEG {number}\n" for i, number in enumerate(numbers, 1)]
    with refused("LOC_val_solution.csv or val.txt"):
        open_source(str(flat), "val")
    (flat / "val.txt").write_text("".join(lines))
    with refused("no classnames.txt"):
        open_source(str(flat), "val")
    (flat / name).write_text(text)
    source = open_source(str(flat), "val")
    assert greys(source) == IN_FILE_ORDER and source.labels == numbers == [2, 0, 1, 0]
    (flat / "val.txt").write_text("".join(lines).replace(" 2", " 3"))
    with refused("3 lines and none for number 3 .*from 0"):       # as if they counted from 1
        open_source(str(flat), "val")


def test_numbers_need_sorted_synsets(flat) -> None:
    (flat / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 0\n")
    (flat / "classnames.txt").write_text("n02012849 crane\nn01440764 tench\n")
    with refused("not sorted"):
        open_source(str(flat), "val")


# ---------------------------------------------------------------- lists
def listed(folder: Path, text: str):
    (folder / "list.txt").write_text(text)
    return open_source(str(folder / "images"), "val", list_file=str(folder / "list.txt"))


@pytest.fixture()
def images(tmp_path) -> Path:
    for i, path in enumerate(("pizza/1.jpg", "apple_pie/2.jpeg", "pizza/3.png", "0034309.jpg", "a b/4.jpg",
                              "c/church/outdoor/5.jpg", "c/cathedral/outdoor/6.jpg")):
        write_image(tmp_path / "images" / path, i)
    return tmp_path


def test_list_with_classes_by_folder(images) -> None:
    source = listed(images, "\ufeff# Food-101 lists no suffixes\n\npizza/3\n/pizza/1.jpg\r\napple_pie/2\n")
    assert greys(source) == [(2, "pizza"), (0, "pizza"), (1, "apple pie")] and source.labels == [1, 1, 0]
    assert source.captions(2) == ["a photo of an apple pie"]
    (images / "classnames.txt").write_text("Pastry\nFlat bread\n")
    assert greys(listed(images, "pizza/3\napple_pie/2\n")) == [(2, "Flat bread"), (1, "Pastry")], \
        "names follow the sorted folders, not the list"
    (images / "classnames.txt").write_text("pizza a flat thing\napple_pie Apple Pie\nchurros Churros\n")
    source = listed(images, "pizza/3\napple_pie/2\n")
    assert greys(source) == [(2, "a flat thing"), (1, "Apple Pie")] and len(source.classes) == 3


def test_list_with_classes_written(images) -> None:
    source = listed(images, "0034309 Boeing 707\na b/4.jpg\tDC-3\npizza/1.jpg\n"
                            "c/church/outdoor/5\tchurch outdoor\n")
    assert greys(source) == [(3, "Boeing 707"), (4, "DC-3"), (0, "pizza"), (5, "church outdoor")]
    assert source.classes == ["Boeing 707", "DC-3", "church outdoor", "pizza"]


def test_list_with_numbers(images) -> None:
    with refused("no classnames.txt"):
        listed(images, "pizza/1 1\n0034309 0\n")
    (images / "classnames.txt").write_text("zebra\naardvark\ncrane bird\n")      # the order is the numbers'
    source = listed(images, "pizza/1 1\n0034309 0\npizza/3\t2\n")
    assert greys(source) == [(0, "aardvark"), (3, "zebra"), (2, "crane bird")]
    (images / "images/classnames.txt").write_text("2 two\n10 ten\n1 one\n")        # numbers of one's own
    assert greys(listed(images, "pizza/1 10\n0034309 2\n")) == [(0, "ten"), (3, "two")]


@pytest.mark.parametrize("text, words, error", [
    ("pizza/1\npizza/8\nnone\n", "lacks 2 of the 3 .*pizza/8", FileNotFoundError),
    ("\n# nothing\n", "lists no image", ValueError),
    ("0034309\n", "no class for 0034309", ValueError),
    ("c/church/outdoor/5\nc/cathedral/outdoor/6\n", "c/church/outdoor has the same", ValueError),
    ("pizza/1 hot_dog\npizza/3 hot dog\n", "same name", ValueError)])
def test_lists_that_are_refused(images, text: str, words: str, error: type) -> None:
    with refused(words, error):
        listed(images, text)


def test_no_list_no_folder(images) -> None:
    with refused("no list at", FileNotFoundError):
        open_source(str(images), list_file=str(images / "none.txt"))
    with refused("no folder at", FileNotFoundError):
        open_source("shapes", list_file=str(images / "images/0034309.jpg"))


# ---------------------------------------------------------------- Karpathy's tables
def table(path: Path, entries: list[tuple]) -> Path:
    """entries: (filepath, filename, split, number of captions)."""
    path.write_text(json.dumps({"dataset": "x", "images": [
        {"filename": name, "split": split, "imgid": i, **({"filepath": folder} if folder else {}),
         "sentences": [{"raw": f" {name} says {k}. ", "tokens": []} for k in range(count)]}
        for i, (folder, name, split, count) in enumerate(entries)]}))
    return path


COCO = [("val2014", "a.jpg", "test", 7), ("train2014", "b.jpg", "train", 5),
        ("val2014", "c.jpg", "restval", 4), ("val2014", "d.jpg", "val", 5), ("val2014", "e.jpg", "test", 5)]


@pytest.mark.parametrize("below", ["", "images"])
@pytest.mark.parametrize("has_filepath", [True, False])
def test_karpathys_split(tmp_path, below: str, has_filepath: bool) -> None:
    for i, (folder, name, *_) in enumerate(COCO):
        write_image(tmp_path / below / (folder if has_filepath else "") / name, i)
    entries = COCO if has_filepath else [("", *entry[1:]) for entry in COCO]
    path = table(tmp_path / "dataset_coco.json", entries)
    for name in (tmp_path, path):
        train, val = (open_source(str(name), split) for split in ("train", "val"))
        assert [grey for grey, _ in greys(val)] == [0, 4], "evaluation is on the split that he calls test"
        assert [grey for grey, _ in greys(train)] == [1, 2] and train.classes is None
        assert val.captions(0) == [f"a.jpg says {k}." for k in range(5)], "the first five, as in the field"
        assert len(train.captions(1)) == 4 and val.read(1).captions == [f"e.jpg says {k}." for k in range(5)]
        assert val.separate_captions and evenly_spaced(val, 1).separate_captions
    path.rename(tmp_path / "dataset_flickr30k.json")
    assert len(open_source(str(tmp_path), "val")) == 2


def test_other_sources_join_equal_captions(images) -> None:
    assert not listed(images, "pizza/1\n").separate_captions


def test_karpathys_table_refuses(tmp_path) -> None:
    for i, (folder, name, *_) in enumerate(COCO):
        write_image(tmp_path / folder / name, i)
    path = table(tmp_path / "dataset_coco.json", [*COCO, ("val2014", "a.jpg", "test", 4)])
    with refused("a.jpg has fewer than five captions .in all 1 images"):
        open_source(str(tmp_path), "val")
    assert len(open_source(str(tmp_path), "train")) == 2
    table(path, [*COCO, ("val2014", "x.jpg", "test", 5), ("val2014", "y.jpg", "test", 5)])
    with refused("lacks 2 of the 4 .*x.jpg", FileNotFoundError):
        open_source(str(tmp_path), "val")
    table(path, [COCO[1], ("val2014", "c.jpg", "train", 0)])
    with refused("no image of the split test"):
        open_source(str(tmp_path), "val")
    with refused("1 no caption"):
        check_index(open_source(str(tmp_path), "train"), 0.05)
    for text in ("{", '{"images": [{"split": "test"}]}', "[]", '{"images": ["x"]}', "[" * 100_000, "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with refused("damaged, or not Karpathy's") as error:
            open_source(str(tmp_path), "val")
        assert "\n" not in str(error.value)
    table(tmp_path / "dataset_flickr8k.json", COCO)
    with refused("name one of them"):
        open_source(str(tmp_path), "val")
    assert len(open_source(str(tmp_path / "dataset_flickr8k.json"), "val")) == 2


def test_a_broken_picture_is_still_counted(tmp_path) -> None:
    write_image(tmp_path / "a.jpg")
    (tmp_path / "e.jpg").write_bytes(b"no picture")
    source = open_source(str(table(tmp_path / "x.json", [("", *entry[1:]) for entry in COCO[::4]])), "val")
    with pytest.raises(BadSample):
        source.read(1)


def test_a_latent_cache_keeps_labels_and_separate_captions(cifar, monkeypatch) -> None:
    monkeypatch.chdir(cifar)
    kl = AutoencoderConfig("kl", 4, 2, 0.5, (32, 32))
    models.save(cifar / "start.pt", build(tiny_config(autoencoder=kl)))
    for i, (_, name, *_) in enumerate(COCO):
        write_image(cifar / "coco" / name, i)
    table(cifar / "coco/dataset_coco.json", [("", *entry[1:]) for entry in COCO])
    for name, out in ((str(cifar), cifar.parent / "ten"), ("coco", "latents")):
        data.main(["cache", "--data", name, "--init", "start.pt", "--out", str(out), "--workers", "0",
                   "--image-size", "32", "--device", "cpu"])
        before, after = open_source(name), open_source(str(out))
        assert after.classes == before.classes and after.separate_captions == before.separate_captions
        for i in range(len(before)):
            assert (after.read(i).label, after.captions(i)) == (before.read(i).label, before.captions(i))
