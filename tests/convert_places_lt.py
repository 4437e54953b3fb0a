"""Places-LT as VL-LTR has it -> beside it the lists and sentences that `evaluate.py longtail` reads.

    python tests/convert_places_lt.py data/places-lt

From Places_LT_{train,test}.txt, lines "PATH LABEL", labels.txt, lines "NAME LABEL", and wiki/desc_LABEL.txt,
Wikipedia's article on each class, its sections headed "== Name =="."""
import sys
from pathlib import Path

import regex

# Sections that tell nothing of an article's subject, up to the next heading.
DROPPED = regex.compile(r"^==+ *(References|External links|Further reading|Bibliography)[= ]*$.*?(?=^==|\Z)",
                        regex.MULTILINE | regex.DOTALL)


def sentences(article: str) -> list[str]:
    lines = [line.strip() for line in DROPPED.sub("", article).split("\n") if not line.startswith("==")]
    return [part for line in lines for part in regex.split(r"(?<=[.?!])\s+(?=\p{Lu})", line) if part]


def convert(root: Path) -> None:
    def pairs(name: str) -> list[list[str]]:
        return [line.strip().rsplit(None, 1) for line in (root / name).open() if line.strip()]
    names = {label: regex.sub("[_/]", " ", name).strip() for name, label in pairs("labels.txt")}
    assert len(set(names.values())) == len(names), "two classes of one name"
    for split in ("train", "test"):
        lines = [f"{path.lstrip('/')}\t{names[label]}" for path, label in pairs(f"Places_LT_{split}.txt")]
        (root / f"{split}.txt").write_text("\n".join(lines))
    (root / "texts").mkdir(exist_ok=True)
    for label, name in names.items():
        article = root / "wiki" / f"desc_{label}.txt"
        if article.is_file():
            (root / "texts" / f"{name}.txt").write_text("\n".join(sentences(article.read_text())))


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
