"""Places-LT as VL-LTR has it -> beside it the lists and articles that `evaluate.py longtail` reads.

    python tests/convert_places_lt.py data/places-lt

From Places_LT_{train,test}.txt, lines "PATH LABEL", labels.txt, lines "NAME LABEL", and wiki/desc_LABEL.txt.
"""
import shutil
import sys
from pathlib import Path


def pairs(table: Path) -> list[list[str]]:
    return [line.strip().rsplit(None, 1) for line in table.read_text().splitlines() if line.strip()]


def convert(root: Path) -> None:
    names = {label: name.replace("_", " ").replace("/", " ").strip()
             for name, label in pairs(root / "labels.txt")}
    assert len(set(names.values())) == len(names), "two classes of one name"
    for split in ("train", "test"):
        lines = [f"{path.lstrip('/')}\t{names[label]}\n"
                 for path, label in pairs(root / f"Places_LT_{split}.txt")]
        (root / f"{split}.txt").write_text("".join(lines))
    for label, name in names.items():
        if (root / "wiki" / f"desc_{label}.txt").is_file():
            shutil.copyfile(root / "wiki" / f"desc_{label}.txt", root / "wiki" / f"{name}.txt")


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
