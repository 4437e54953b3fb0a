"""The layouts that evaluation data sets come in: names, classes and pictures against files made here."""
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from test_sources import picture

from data import open_source


def write_image(path: Path, grey: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture((grey,) * 3, (16, 12), "PNG"))        # told by its bytes, whatever the suffix


def greys(source) -> list[tuple[int, str | None]]:
    """(grey, class name) of every sample in order: a label is right if it is right for this very picture."""
    samples = [source.read(i) for i in range(len(source))]
    return [(int(np.asarray(s.image)[0, 0, 0]), None if s.label is None else source.classes[s.label])
            for s in samples]


# ---------------------------------------------------------------- class folders and names
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
@pytest.mark.parametrize("text", [
    "n03126707 crane\nn01440764\ttench\n\nn02012849 crane\n",         # in any order
    "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane, b\n"])        # as Kaggle's
def test_names_of_class_folders(folders, place: str, text: str) -> None:
    (folders / place / "classnames.txt").write_text(text)
    source = open_source(str(folders), "val")
    assert source.classes == ["tench", "crane", "crane"] and greys(source) == EXPECTED
    assert source.labels == [0, 0, 1, 2], "two classes of one name stay two classes"
    assert source.captions(0) == ["a photo of a tench"]
    if not place:
        train = open_source(str(folders), "train")
        assert train.classes == source.classes and train.labels == source.labels
        assert greys(train)[0] == (110, "tench")


@pytest.mark.parametrize("text, look_at", [
    ("tench\ncrane\ncrane\n", "n01440764"),
    ("n01440764 tench\nn02012849 crane\nn03126708 crane\n", "n03126707"),
    ("n01440764 tench\nn02012849 _\nn03126707 crane\n", "n02012849"),
    ("n01440764 tench\nn02012849 a\nn03126707 b\n\nn02012849 c\n", "doubles"),
    ("n01440764 tench\nn02012849 a\nn03126707 b\nn99999999 c\n", "n99999999"), ("", "n01440764")])
def test_names_that_do_not_fit_are_refused(folders, text: str, look_at: str) -> None:
    (folders / "classnames.txt").write_text(text)
    with pytest.raises(ValueError, match=f"look at {look_at}; .*'TAG NAME'"):
        open_source(str(folders), "val")


def test_folders_are_names_unless_they_are_synsets_or_alike(folders) -> None:
    with pytest.raises(ValueError, match="no names that differ.*LOC_synset_mapping.txt"):
        open_source(str(folders), "val")
    for name in ("food/apple_pie", "food/churros", "alike/a_b", "alike/a b", "numbers/00", "numbers/01",
                 "tags/class_0", "tags/class_1"):
        write_image(folders / name / "0.jpg")
    assert open_source(str(folders / "food")).classes == ["apple pie", "churros"]
    for name in ("001.ak47", "n02085620-Chihuahua", "00012_Owl", "N"):
        write_image(folders / "numbered" / name / "0.jpg")
    assert open_source(str(folders / "numbered")).classes == ["Owl", "ak47", "N", "Chihuahua"]
    for name in ("alike", "numbers", "tags"):
        with pytest.raises(ValueError, match="no names that differ"):
            open_source(str(folders / name))


def test_real_classes_stay_classes_whatever_lies_beside_them(tmp_path) -> None:
    names = ["707-320", "bullet train", "data center", "license plate", "train", "train station"]
    for name, place in product(names, ("halves/train", "halves/val", "whole")):
        if (place, name) != ("whole", "train"):            # CIFAR-100 has it
            write_image(tmp_path / place / name / "0.jfif")
            (tmp_path / place / name / "Thumbs.db").write_text("")
    (tmp_path / "whole/README.txt").write_text("")
    for place, split in product(("halves", "whole"), ("train", "val")):
        source = open_source(str(tmp_path / place), split)
        assert source.classes == [n for n in names if (place, n) != ("whole", "train")] and not source.skipped


def test_listing_order_changes_nothing(folders, monkeypatch) -> None:
    (folders / "classnames.txt").write_text("n01440764 tench\nn02012849 crane\nn03126707 crane\n")
    see = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(list(see(path))))
    source, read = open_source(str(folders), "val"), open_source(str(folders), "val").fingerprint()
    assert greys(source) == EXPECTED and source.fingerprint() == read
    source.classes = ["other", *source.classes[1:]]
    assert source.fingerprint() != read, "other names make other captions"


# ---------------------------------------------------------------- lists
@pytest.fixture()
def images(tmp_path) -> Path:
    for i, path in enumerate(("pizza/1.jpg", "apple_pie/2.jpeg", "pizza/3.png", "0034309.jpg", "a b/4.jpg",
                              "c/church/outdoor/5.jpg", "c/cathedral/outdoor/6.jpg")):
        write_image(tmp_path / path, i)
    return tmp_path


def listed(folder: Path, text: str, encoding: str = "utf-8"):
    (folder / "list.txt").write_text(text, encoding)
    return open_source(str(folder / "list.txt"), "val")


def test_a_list_chooses_images_and_their_classes(images) -> None:
    source = listed(images, "\ufeffpizza/3.png\n\n/pizza/1.jpg\r\napple_pie/2.jpeg\n")
    assert greys(source) == [(2, "pizza"), (0, "pizza"), (1, "apple pie")] and source.labels == [1, 1, 0]
    assert source.captions(2) == ["a photo of an apple pie"]
    assert greys(source.subset(np.array([2, 0]))) == [(1, "apple pie"), (2, "pizza")]
    source = listed(images, "0034309.jpg\tBoeing 707\na b/4.jpg\tDC-3\npizza/1.jpg\n"
                            "c/church/outdoor/5.jpg\tchurch outdoor\n")
    assert greys(source) == [(3, "Boeing 707"), (4, "DC-3"), (0, "pizza"), (5, "church outdoor")]
    assert source.classes == ["Boeing 707", "DC-3", "church outdoor", "pizza"]
    (images / "classnames.txt").write_text("pizza a flat thing\napple_pie Apple Pie\n")
    assert greys(listed(images, "pizza/3.png\napple_pie/2.jpeg\n")) == [(2, "a flat thing"), (1, "Apple Pie")]


@pytest.mark.parametrize("text, words, error", [
    ("pizza/1.jpg\npizza/8.jpg\nnone\n", "2 of the 3 images .*pizza/8", FileNotFoundError),
    ("\n", "no usable sample", ValueError),
    ("c/church/outdoor/5.jpg\nc/cathedral/outdoor/6.jpg\n", "two folders of one name", ValueError),
    ("pizza/1.jpg\tpizza\t0\npizza/3.png\tpie\t1\n", "or three columns", ValueError),
    ("pizza/1.jpg\thot_dog\npizza/3.png\thot dog\n", "names that differ", ValueError)])
def test_lists_that_are_refused(images, text: str, words: str, error: type) -> None:
    with pytest.raises(error, match=words):
        listed(images, text)
    for encoding in ("latin-1", "utf-16", "utf-16-le"):
        with pytest.raises(ValueError, match="list.txt is no text in UTF-8"):
            listed(images, text + "a b/4.jpg\tcafé\n", encoding)


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


@pytest.mark.parametrize("has_filepath", [True, False])
def test_karpathys_split(tmp_path, has_filepath: bool) -> None:
    for i, (folder, name, *_) in enumerate(COCO):
        write_image(tmp_path / (folder if has_filepath else "") / name, i)
    entries = COCO if has_filepath else [("", *entry[1:]) for entry in COCO]
    path = str(table(tmp_path / "dataset_coco.json", entries))
    train, val = (open_source(path, split) for split in ("train", "val"))
    assert [grey for grey, _ in greys(val)] == [0, 4], "evaluation is on the split that he calls test"
    assert [grey for grey, _ in greys(train)] == [1, 2] and train.classes is None
    assert val.captions(0) == [f"a.jpg says {k}." for k in range(5)], "the first five, as in the field"
    assert len(train.captions(1)) == 4 and val.read(1).captions == [f"e.jpg says {k}." for k in range(5)]
    last = val.subset(np.array([1]))
    assert val.texts is not None and last.texts is not None, "each is a text of its own"
    assert greys(last)[0][0] == 4 and last.captions(0)[0] == "e.jpg says 0.", "of this very picture"


def test_karpathys_table_refuses(tmp_path) -> None:
    for i, (folder, name, *_) in enumerate(COCO):
        write_image(tmp_path / folder / name, i)
    path = table(tmp_path / "dataset_coco.json", [*COCO, ("val2014", "a.jpg", "test", 4)])
    with pytest.raises(ValueError, match="an image of test has fewer than 5 captions"):
        open_source(str(path), "val")
    assert len(open_source(str(path), "train")) == 2
    table(path, [*COCO, ("val2014", "x.jpg", "test", 5), ("val2014", "y.jpg", "test", 5)])
    with pytest.raises(FileNotFoundError, match="2 of the 4 images .*x.jpg"):
        open_source(str(path), "val")
    table(path, [COCO[1]])
    with pytest.raises(ValueError, match="no usable sample"):
        open_source(str(path), "val")
    for text in ("{", '{"images": [{"split": "test"}]}', "[]", '{"images": ["x"]}', "[" * 100_000, "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="damaged, or not Karpathy's"):
            open_source(str(path), "val")
