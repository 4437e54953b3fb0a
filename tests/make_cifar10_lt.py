"""CIFAR-10-LT, out of CIFAR-10 as class folders, for `evaluate.py longtail`.

    python tests/make_cifar10_lt.py data/cifar10 data/cifar10-lt

4,400 training images of the first class, 44 of the last: class k of K has int(most · imbalance^(-k / (K-1)))
(Cui et al. 2019), from FOLDERS/train; test images are all of FOLDERS/val. Other classes get no sentences."""
import shutil
import sys
from pathlib import Path

# What an encyclopedia would say first of each class: sentences for the text side to choose from.
ARTICLES = {
    "airplane": "An airplane flies through the air with fixed wings. Jet engines or propellers push it "
        "forward. It stands on a runway or crosses a blue sky. Its body is long and narrow.",
    "automobile": "An automobile is a car with four wheels. It carries a few people on a road. Most have a "
        "bonnet, doors and windows of glass. It is lower and shorter than a truck.",
    "bird": "A bird has feathers, a beak and two wings. It sits on a branch or flies. Small ones sing, and "
        "large ones like the ostrich run on the ground. It lays eggs.",
    "cat": "A cat is a small animal with soft fur. Its ears are pointed and its whiskers long. It lives in "
        "houses and hunts mice. Many have stripes.",
    "deer": "A deer is a slender brown animal of forest and meadow. Males grow antlers. It stands on four "
        "thin legs and eats grass. Its young have white spots.",
    "dog": "A dog is a tame animal that barks. It has a snout, and its ears often hang. It walks on a lead "
        "or plays with a ball. There are many breeds, large and small.",
    "frog": "A frog is a small animal with smooth wet skin. It jumps on long hind legs. It is green or "
        "brown and lives by the water. Its eyes stand out from its head.",
    "horse": "A horse is a large animal with a mane and a long tail. People ride it with a saddle. It "
        "gallops over grass or stands in a stable. It is brown, black or white.",
    "ship": "A ship is a large vessel that sails the sea. It carries goods and people over water. It has a "
        "hull, a deck and often masts or funnels. It lies in a harbour.",
    "truck": "A truck is a large vehicle that carries loads on a road. It has a cab in front and a trailer "
        "or a box behind. Fire engines are trucks. Its wheels are big."}


def make(folders: Path, out: Path, most: int = 4400, imbalance: float = 100) -> list[int]:
    """FOLDERS/{train,val}/CLASS/* -> OUT/{train,test}/CLASS/* with train.txt, test.txt and texts/
    -> training images of each class. An OUT that has some already would mix them in: it is an error."""
    names = sorted(folder.name for folder in (folders / "train").iterdir() if folder.is_dir())
    counts = [int(most * imbalance ** (-k / (len(names) - 1))) for k in range(len(names))]
    (out / "texts").mkdir(parents=True)
    for split, source in (("train", "train"), ("test", "val")):
        lines = []
        for name, count in zip(names, counts):
            images = sorted((folders / source / name).iterdir())
            assert len(images) >= count or split == "test", f"{name}: {len(images)} images, expected {count}"
            (out / split / name).mkdir(parents=True)
            for image in images[:count] if split == "train" else images:
                shutil.copyfile(image, out / split / name / image.name)
                lines.append(f"{split}/{name}/{image.name}\t{name}\n")
        (out / f"{split}.txt").write_text("".join(lines))
    for name in set(names) & set(ARTICLES):
        (out / "texts" / f"{name}.txt").write_text(ARTICLES[name].replace(". ", ".\n") + "\n")
    return counts


if __name__ == "__main__":
    print("training images by class:", *make(Path(sys.argv[1]), Path(sys.argv[2])))
