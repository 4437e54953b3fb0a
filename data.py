"""From files to batches: CLIP's tokenizer; images that may be broken; random crops and RandAugment for CLIP;
the sources that `--data` names; batches that are a function of the step alone; and `shapes`, data that needs
no files, with a checker that judges a picture by its pixels alone.

A bad sample is never fatal and never silent: it is counted by cause, and too many of them stop the run.
What it is not: noise, or a network. It imports no other file of the project. Read next: model.py."""
import copy
import gzip
import hashlib
import html
import io
import json
import math
import os
import signal
import tarfile
import warnings
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, count, pairwise, product
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ftfy
import numpy as np
import regex
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

CACHE = Path(torch.hub.get_dir()) / "diffdis"     # downloads, and indices of tars


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """`write` fills a file; its name holds either all of that or what was there before. Raises OSError."""
    part = path.with_name(path.name + ".part")      # one name: what a killed program left is overwritten
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # torch.save's word for a full disk is a RuntimeError
        raise OSError(f"cannot write {path}, is the disk full? ({error}); what was there is intact") from None
    finally:
        part.unlink(missing_ok=True)                # also after Ctrl-C


# ---------------------------------------------------------------- tokenizer
# What BPE works within. CLIP's own pattern also matches its control tokens; a caption must not say those.
PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
WORD_END, START, END = "</w>", "<|startoftext|>", "<|endoftext|>"
# Each byte as one printable character, in CLIP's order: printable ones stand for themselves, then the others.
PRINTABLE = [byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
SYMBOLS = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


@lru_cache(maxsize=2 ** 16)
def clean(caption: str) -> str:
    """CLIP's cleaning: mojibake and HTML entities undone, white space collapsed, lower case."""
    # Most captions have nothing to undo, and finding that out was a third of all loading time.
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return " ".join(caption.split()).lower()
    return regex.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(caption)))).strip().lower()


def spread(piece: str) -> str:
    """A piece as BPE starts on it: bytes, the last marked, each between spaces for str.replace to join."""
    return "".join(f" {SYMBOLS[byte]} " for byte in piece.encode("utf-8"))[:-1] + WORD_END + " "


@dataclass(eq=False)
class Tokenizer:
    """CLIP's byte-level byte-pair encoding (Radford et al. 2021)."""
    merges: list[str]             # "left right", in the order they were learnt
    context_length: int = 77      # L, tokens per caption, ends included

    def __post_init__(self) -> None:
        self.rank = {tuple(merge.split(" ")): i for i, merge in enumerate(self.merges)}
        base = list(SYMBOLS.values())
        self.names = [*base, *(s + WORD_END for s in base), *map("".join, self.rank), START, END]
        self.id = {name: i for i, name in enumerate(self.names)}
        self.vocab_size = len(self.names)
        self.start, self.end = self.vocab_size - 2, self.vocab_size - 1

    @classmethod
    def from_file(cls, path: str | Path, context_length: int = 77) -> "Tokenizer":
        """CLIP's bpe_simple_vocab_16e6.txt.gz, or a folder with merges.txt and the vocab.json that it gives,
        or with both in one tokenizer.json. Raises ValueError on anything else."""
        path, is_folder = Path(path), Path(path).is_dir()
        try:
            if is_folder and not (path / "vocab.json").exists():           # as transformers 5 saves it
                both = json.loads((path / "tokenizer.json").read_bytes())["model"]
                merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in both["merges"]]
            else:
                raw = (path / "merges.txt").read_bytes() if is_folder else gzip.decompress(path.read_bytes())
                # After a headline; CLIP's own file holds more merges than CLIP uses.
                merges = list(filter(None, raw.decode("utf-8").splitlines()[1:49152 - 256 - 2 + 1]))
                both = {"vocab": json.loads((path / "vocab.json").read_bytes())} if is_folder else {}
            tokenizer = cls(merges, context_length)
            if both.get("vocab", tokenizer.id) != tokenizer.id or {m.count(" ") for m in merges} != {1}:
                raise ValueError("expected merges of two symbols, and the vocabulary that they give")
        except Exception as error:      # what a damaged file raises has many names
            raise ValueError(f"{path} is no vocabulary of CLIP's ({error}): fetch it again") from None
        return tokenizer

    @classmethod
    def learn(cls, captions: Iterable[str], vocab_size: int, context_length: int = 77) -> "Tokenizer":
        """Learn merges from captions: the most frequent pair first, ties in alphabetical order.
        vocab_size: at most this many tokens, at least 514; fewer if nothing is left to merge."""
        pieces = Counter(piece for caption in captions for piece in PIECES.findall(clean(caption)))
        words, counts, merges = list(map(spread, pieces)), list(pieces.values()), []
        frequency, holders = Counter(), defaultdict(set)

        def add(i: int, sign: int) -> None:
            for pair in pairwise(words[i].split()):
                frequency[pair] += sign * counts[i]
                holders[pair].add(i)
        for i in range(len(words)):
            add(i, 1)
        while len(merges) < vocab_size - 514 and (most := max(frequency.values(), default=0)):
            pair = min(pair for pair, count in frequency.items() if count == most)
            merges.append(" ".join(pair))
            for i in holders.pop(pair):          # only the words that change
                add(i, -1)
                words[i] = words[i].replace(" {}  {} ".format(*pair), " {}{} ".format(*pair))
                add(i, 1)
        return cls(merges, context_length)

    @lru_cache(maxsize=2 ** 16)
    def spell(self, piece: str) -> tuple[int, ...]:
        """One piece -> ids: start from bytes, apply the earliest learnt merge that fits until none does."""
        word = spread(piece)
        while known := [pair for pair in pairwise(word.split()) if pair in self.rank]:
            pair = min(known, key=self.rank.get)
            word = word.replace(" {}  {} ".format(*pair), " {}{} ".format(*pair))
        return tuple(self.id[part] for part in word.split())

    def encode(self, caption: str) -> list[int]:
        """A caption -> ids, without start and end."""
        return [i for piece in PIECES.findall(clean(caption)) for i in self.spell(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, control tokens left out."""
        byte_of = {symbol: byte for byte, symbol in SYMBOLS.items()} | {" ": ord(" ")}
        text = "".join(self.names[int(i)] for i in ids if int(i) < self.start).replace(WORD_END, " ")
        return bytes(byte_of[symbol] for symbol in text).decode("utf-8", errors="replace").strip()

    def __call__(self, captions: list[str]) -> Tensor:
        """captions, cut to fit -> tokens [B, L] int64: start, ids, end, further ends, as Stable Diffusion
        pads. The text query is read at the first end: attention is causal, what follows changes nothing."""
        tokens, room = torch.full((len(captions), self.context_length), self.end), self.context_length - 1
        for row, caption in zip(tokens, captions):
            ids = [self.start, *self.encode(caption)]
            if len(ids) > room:       # the same words each time: Python then says it once
                warnings.warn(f"captions of more than {room - 1} tokens are cut, the end kept", stacklevel=2)
            row[:min(len(ids), room)] = torch.tensor(ids[:room])
        return tokens


# ---------------------------------------------------------------- images that may be broken
IMAGE_SUFFIXES = ("jpg", "jpeg", "jfif", "png", "webp", "gif")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")     # no others: Pillow would start Ghostscript for an EPS
Image.MAX_IMAGE_PIXELS = 32_000_000                # Pillow refuses twice as many: a decompression bomb
warnings.filterwarnings("ignore", module="PIL")    # on large pictures and odd metadata


class BadSample(Exception):
    """A sample that cannot be used. Its words are the cause, one of a few, to be counted."""


def decode_image(raw: bytes, side: int | None = None) -> Image.Image:
    """Bytes of a JPEG, PNG, WebP or GIF (first frame), of any mode -> upright RGB picture. Raises BadSample.
    side: px that are needed, a JPEG of four times as many is decoded smaller, to save time; None: all."""
    try:
        image = Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS)
        if side is not None:
            image.draft(None, (2 * side, 2 * side))      # never below twice what is needed
        image.load()
        with suppress(Exception):                 # behind broken metadata the pixels may be sound
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):      # 16 bits of grey: convert() would clip them all to white
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:     # white shows through: black ink would be on black
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
    except Exception:       # Pillow's decoders raise nearly anything on damaged files
        raise BadSample("unreadable image") from None
    if min(image.size) < 8:                       # px: trackers and the like show nothing
        raise BadSample("image too small")
    return image


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Centre square of the picture, resized (bicubic, antialiased) -> uint8 [size, size, 3]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))   # resize()'s own box lets the rest bleed in
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3], on any device -> float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- random crop, RandAugment (CLIP's training)
CROP_AREA = (0.5, 1.0)      # share, uniform: our choice between OpenCLIP's (0.9, 1) and ImageNet's (0.08, 1)
CROP_ASPECT = (3 / 4, 4 / 3)              # width to height, log-uniform


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random part of an RGB picture, resized to size x size px (torchvision's RandomResizedCrop, bicubic);
    after ten that do not fit in, the largest one of a permitted aspect, from the centre."""
    (width, height), (least, greatest) = image.size, CROP_ASPECT
    for _ in range(10):
        pixels = width * height * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(math.log(least), math.log(greatest)))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            break
    else:
        w, h = min(width, round(height * greatest)), min(height, round(width / least))
        left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Each pixel (x, y) from (ax + by + c, dx + ey + f), the nearest one; black from outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


# RandAugment's choices, in torchvision's order: RGB picture, value -> RGB picture; the value at magnitude 9
# of 30; whether a coin turns its sign. Shears are in px per px, translations in shares of the side.
OPERATIONS: dict[str, tuple[Callable, float, bool]] = {
    "Identity": (lambda image, value: image, 0, False),
    "ShearX": (lambda image, value: affine(image, 1, value, 0, 0, 1, 0), 0.09, True),
    "ShearY": (lambda image, value: affine(image, 1, 0, 0, value, 1, 0), 0.09, True),
    "TranslateX": (lambda image, x: affine(image, 1, 0, -int(x * image.width), 0, 1, 0), 45 / 331, True),
    "TranslateY": (lambda image, y: affine(image, 1, 0, 0, 0, 1, -int(y * image.height)), 45 / 331, True),
    "Rotate": (lambda image, degrees: image.rotate(degrees, Image.Resampling.NEAREST), 9, True),
    **{how: (lambda image, value, how=how: getattr(ImageEnhance, how)(image).enhance(1 + value), 0.27, True)
       for how in ("Brightness", "Color", "Contrast", "Sharpness")},
    "Posterize": (ImageOps.posterize, 7, False), "Solarize": (ImageOps.solarize, 178.5, False),
    "AutoContrast": (lambda image, value: ImageOps.autocontrast(image), 0, False),
    "Equalize": (lambda image, value: ImageOps.equalize(image), 0, False)}


def rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """RandAugment (Cubuk et al. 2020) on an RGB picture: two operations, with torchvision's values."""
    for _ in range(2):
        operation, value, has_sign = list(OPERATIONS.values())[rng.integers(len(OPERATIONS))]
        image = operation(image, -value if has_sign and rng.integers(2) else value)
    return image


# ---------------------------------------------------------------- sources
def decode_text(raw: bytes) -> str:
    """Text from UTF-8. Raises BadSample on anything else: letters lost would be other captions."""
    with suppress(UnicodeDecodeError):
        if "\0" not in (text := raw.decode("utf-8-sig")):       # UTF-16 has these
            return text
    raise BadSample("caption is not UTF-8")


def fill(template: str, name: str) -> str:
    """A sentence about a class: its name for {}, its name's article for {a}."""
    return template.replace("{a}", "an" if name[0].lower() in "aeiou" else "a").replace("{}", name)


class Sample(NamedTuple):
    image: Image.Image | np.ndarray      # RGB, or moments: see Source
    captions: list[str] | str            # in training the one that is chosen
    label: int | None
    place: int                           # its number in the source; in training in the stream


class Source:
    """Image-caption samples by index: images as files, each of a class, with texts, or with KEY.txt or
    KEY.json beside it. `rows`: which are in use. Subclasses replace `content`, or `captions` and `image`."""
    KINDS = ("image", "txt", "json")           # of what a sample is made of
    moments: np.ndarray | None = None          # --latents: float16 [all rows, 2C, h, w], NaN if unusable
    template = "a photo of {a} {}"             # the caption of an image that has just a class

    def __init__(self, name: str, images: Sequence[Path] = (), classes: list[str] | None = None,
                 labels: list[int] | None = None, texts: list[list[str]] | None = None) -> None:
        """name: for messages; classes: names, in the order of the labels; labels, texts: of all images; in
        evaluation each of these texts is a text of its own. Raises FileNotFoundError."""
        self.name, self.images, self.rows = name, images, range(len(images))
        self.classes, self.labels, self.texts = classes, labels, texts
        self.skipped: Counter = Counter()      # what indexing had to leave out, by cause
        # A score over the images that happen to be there compares with nothing.
        if missing := [image for image in images if not image.is_file()]:
            raise FileNotFoundError(f"{len(missing)} of the {len(images)} images in {name} are missing, as "
                                    f"{missing[0]}")

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: np.ndarray) -> "Source":
        part = copy.copy(self)
        part.rows, part.skipped = np.asarray(self.rows)[indices], Counter()
        return part

    def fingerprint(self) -> str:
        """A digest of names, classes, labels, texts and 1000 samples' contents, wherever the data lies."""
        known = [path.name for path in self.images], self.classes, self.labels, self.texts
        digest, part = hashlib.sha256(repr(known).encode()), evenly_spaced(self, 1000)
        for index, kind in product(range(len(part)), self.KINDS):
            digest.update(part.content(index, kind))
        return digest.hexdigest()[:8]

    def content(self, index: int, kind: str) -> bytes:
        """A sample's "image", "txt" or "json"; empty where there is none, or none that can be read."""
        image = self.images[self.rows[index]]
        with suppress(OSError):
            return (image if kind == "image" else image.with_suffix(f".{kind}")).read_bytes()
        return b""

    def captions(self, index: int) -> list[str]:
        """All captions of a sample, its image left undecoded. Raises BadSample."""
        if self.texts is not None:
            return self.texts[self.rows[index]]
        if self.labels is not None:
            return [fill(self.template, self.classes[self.labels[self.rows[index]]])]
        (text, said), meta = (decode_text(self.content(index, kind)) for kind in ("txt", "json")), {}
        with suppress(ValueError, TypeError, RecursionError):      # no JSON object, or absurdly nested
            meta = dict(json.loads(said))
        given = meta["captions"] if isinstance(meta.get("captions"), list) else [meta.get("caption")]
        lines, listed = ([text.strip() for text in texts if isinstance(text, str) and clean(text)]
                         for texts in (text.splitlines(), given))
        # KEY.txt wins: the list in KEY.json is used only where it agrees with it.
        if captions := listed if listed and (not lines or lines[0] in listed) else lines:
            return captions
        raise BadSample("empty caption")

    def image(self, index: int, side: int | None = None) -> Image.Image | np.ndarray:
        """A sample's picture, of which `side` px are needed (None: all), or its moments. Raises BadSample."""
        if self.moments is None:
            return decode_image(self.content(index, "image"), side)
        if np.isnan(moments := np.array(self.moments[self.rows[index]])).any():
            raise BadSample("unusable image")
        return moments

    def read(self, index: int, side: int | None = None) -> Sample:
        captions = self.captions(index)          # first: a bad one costs no decoding
        return Sample(self.image(index, side), captions, self.labels and self.labels[self.rows[index]], index)

    def __getitem__(self, index: int) -> tuple[Sample | None, list[str]]:        # as `make_batch` takes it
        try:
            return self.read(index), []
        except BadSample as bad:
            return None, [str(bad)]


class TarSource(Source):
    """img2dataset's tars (CC3M's layout): KEY.jpg, KEY.txt and/or KEY.json, members of a sample side by side.
    The headers are read once, and the index kept in CACHE: then a sample is a few reads at known places."""

    def __init__(self, name: str, tars: list[Path]) -> None:
        super().__init__(name)
        self.tars = tars
        stamp = repr([(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in tars])
        saved = CACHE / f"index3-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.npz"
        try:
            self.places, skipped = np.load(saved).values()
            self.skipped = Counter(json.loads(str(skipped)))
        except Exception:            # none there, or damaged, which has many names
            shards = enumerate(tqdm(tars, "index", unit="shard", delay=2, disable=None))
            self.places = np.concatenate([self.index_shard(*shard) for shard in shards])
            with suppress(OSError):              # costs only its use
                CACHE.mkdir(parents=True, exist_ok=True)
                skipped = json.dumps(self.skipped)
                write_atomically(saved, partial(np.savez, places=self.places, skipped=skipped))
        self.rows = range(len(self.places))

    def index_shard(self, shard: int, path: Path) -> np.ndarray:
        """Where one tar's samples are [N, 7]: shard, then offset and size of each kind (size -1: absent). A
        damaged tar is said, and what is lost with it counted as the samples that it would hold."""
        samples, size, end, rest = [], path.stat().st_size, 0, b""
        with (suppress(OSError, tarfile.TarError, EOFError, ValueError, RecursionError),        # judged below
              path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar):
            for member in tar:
                if member.offset_data + member.size > size:
                    break
                end = tar.offset
                key, _, suffix = member.name.rpartition(".")
                kind = "image" if suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
                if not member.isreg() or kind not in self.KINDS or os.path.basename(key)[:1] in ("", "."):
                    continue                                             # links, shadow files
                # A kind seen again is another sample of the same name: never mix the two.
                if not samples or key != samples[-1][0] or kind in samples[-1][1]:
                    samples.append((key, {}))
                samples[-1][1][kind] = (member.offset_data, member.size)
            file.seek(end)
            rest = file.read(2 ** 20)
        # Zeros end a whole tar. tarfile stops without a word at a header that it cannot read.
        if not end or len(rest) < 512 or rest.strip(b"\0"):
            self.skipped["damaged shard"] += max(1, round((len(samples) - 1) * (size / max(1, end) - 1)))
            warnings.warn(f"{path} is damaged, or compressed: {size - end:,} of {size:,} bytes are lost")
        images = [parts for _, parts in samples if "image" in parts]
        places = [[shard, *chain.from_iterable(parts.get(kind, (0, -1)) for kind in self.KINDS)]
                  for parts in images if len(parts) > 1]
        self.skipped += {"no image": len(samples) - len(images), "no caption": len(images) - len(places)}
        return np.array(places, np.int64).reshape(-1, 7)

    def content(self, index: int, kind: str) -> bytes:
        shard, *places = self.places[self.rows[index]].tolist()
        offset, size = places[2 * self.KINDS.index(kind):][:2]
        with suppress(OSError):          # also where there is none: a size of -1 cannot be read
            return os.pread(self.shard_file(shard).fileno(), size, offset)
        return b""

    @lru_cache(maxsize=256)          # to open a file for each member is a tenth of reading small pictures
    def shard_file(self, shard: int) -> BinaryIO:
        return self.tars[shard].open("rb")


def evenly_spaced(source: Source, count: int | None) -> Source:
    """`count` samples from all over the source, or all of it: the first ones might be all of one class."""
    if count is None or count >= len(source):
        return source
    return source.subset(np.linspace(0, len(source) - 1, count).astype(np.int64))


def hold_out(source: Source, name: str, count: int, max_bad: float = 1.0) -> tuple[Source, Source]:
    """What to train on, and `count` samples to take scores on: from `name`/val where that is there, else from
    the source, at most a twentieth, evenly spaced; `shapes` has its own. Raises ValueError."""
    if name == "shapes" or Path(name, "val").is_dir():
        return source, evenly_spaced(open_source(name, "val", max_bad), count)
    if len(source) < 2:
        raise ValueError(f"{source.name} has {len(source)} sample, and one is held out: training needs more")
    held = evenly_spaced(source, max(1, min(count, len(source) // 20)))
    return source.subset(~np.isin(source.rows, held.rows)), held


def usable_captions(source: Source, limit: int) -> Iterator[list[str]]:
    """The captions of up to `limit` samples, evenly spaced over the source, bad ones passed over."""
    is_endless = isinstance(source, Shapes) and source.split == "train"      # a thousand hold every word
    for i in range(1000) if is_endless else range(0, len(source), -(-len(source) // limit)):
        with suppress(BadSample):             # counted when it is read for training
            yield source.captions(i)


# ---------------------------------------------------------------- what --data names
def open_source(name: str, split: str = "train", max_bad: float = 1.0) -> Source:
    """What `--data` names -> a source. Raises FileNotFoundError or ValueError.

    name: "shapes"; a tar; Karpathy's table, NAME.json; a list of images, NAME.txt; or a folder, of which
    `split` takes its half. max_bad: share that indexing may leave out."""
    if name == "shapes":
        return Shapes(split)
    path = Path(name).absolute()
    layouts = {"folder": open_folder, ".tar": lambda tar, split: TarSource(tar.name, [tar]),
               ".json": open_karpathy, ".txt": open_list}
    layout = "folder" if path.is_dir() else path.suffix.lower()
    if not path.exists() or layout not in layouts:
        raise FileNotFoundError(f"no data at {name}: expected shapes, a folder, a tar, a .txt or .json list")
    source = layouts[layout](path, split)
    if not len(source):
        raise ValueError(f"{name}: no usable sample ({dict(source.skipped)}): expected KEY.jpg with KEY.txt")
    SkipReport(max_bad, len(source) + source.skipped.total(), source.skipped).check(final=True)
    return source


HALF = regex.compile(r"(?i)(?<!\p{L})(train(val)?|val|dev|test|eval|holdout)(ing|(id|u)\w*)?(?!\p{L}{2})")
# No class is called so: by a number, as ImageNet's n01440764, by what a folder holds, by a system.
NO_CLASS = regex.compile(r"(?i)(n|class_)?\d+|((jpeg)?images|photos|data|masks|labels)_?\d*|segm.*|[@_].*")


def walk(folder: Path) -> Iterator[Path]:
    """All folders and files below, in order, links followed. Raises OSError on what may not be seen."""
    for path in sorted(folder.iterdir()):
        if not regex.fullmatch(r"(?i)\..*|thumbs.db|desktop.ini|readme(\.\w+)?|.*_stats.json", path.name):
            yield path
            if path.stat() and path.is_dir():        # stat() raises where a link leads nowhere
                yield from walk(path)


def open_folder(path: Path, split: str) -> Source:
    """Tars, images with .txt or .json beside them, or class folders (DIR/CLASS/IMAGE), in DIR/SPLIT; without
    halves DIR is taken whole, whatever the split. Raises ValueError on anything else."""
    root = path / split if (path / split).is_dir() else path
    entries = {entry: entry.is_dir() for entry in walk(root)}
    files, folders = ([entry for entry in entries if entries[entry] == kind] for kind in (False, True))
    if len({folder.resolve() for folder in (root, *folders)}) <= len(folders):
        raise ValueError(f"links in {root} lead to the same folder twice: remove one")
    tars, images = ([file for file in files if file.suffix[1:].lower() in suffixes]
                    for suffixes in (("tar",), IMAGE_SUFFIXES))
    # Halves of the data are a folder called train, or cars_train beside cars_test, but no "train station".
    halves = {half[1].lower(): entry.name for entry in (*folders, *tars) if (half := HALF.search(entry.stem))}
    is_half = any(HALF.fullmatch(folder.name.rstrip("0123456789")) for folder in folders)
    is_half |= bool(tars) and any(half.startswith("train") != (split == "train") for half in halves)
    if root == path and (is_half or len(halves) > 1):
        raise ValueError(f"{path} has no folder {split}, but below it {', '.join(sorted(halves.values()))}: "
                         "name one, or put each half into a folder, train and val")
    texts = {file.with_suffix("") for file in files if file.suffix in (".txt", ".json")}
    captioned = [image for image in images if image.with_suffix("") in texts]
    classes = {image.parent for image in images}
    if tars and not images:
        return TarSource(path.name, tars)
    if captioned and not tars:
        source, without = Source(path.name, captioned), texts - {image.with_suffix("") for image in images}
        source.skipped += {"no caption": len(images) - len(captioned), "no image": len(without)}
        return source
    odd = [folder for folder in (root, *folders) if (folder.parent == root) != (folder in classes)]
    if tars or odd or len(classes) < 2:
        raise ValueError(f"{root} holds {len(tars)} tars and {len(images)} images, not in two or more class "
                         f"folders (see {[root, *odd][-1].name}): expected tars, KEY.jpg + .txt, CLASS/IMAGE")
    source = Source(path.name, images, *class_names(root, [image.parent.name for image in images]))
    source.skipped += {"other suffix": sum(file.parent != root for file in files) - len(images)}
    return source


def text_lines(path: Path) -> list[str]:
    """A text file's lines that are not blank. Raises ValueError."""
    try:
        return [line for line in decode_text(path.read_bytes()).splitlines() if line.strip()]
    except BadSample:
        raise ValueError(f"{path} is no text in UTF-8: save it as that") from None


def class_names(root: Path, tags: list[str]) -> tuple[list[str], list[int]]:
    """Each image's class, as its folder or a list has it -> the names of all classes, sorted by tag, and each
    image's label. A name is the tag, or what classnames.txt, in `root` or above, says. Raises ValueError."""
    number = {tag: i for i, tag in enumerate(sorted(set(tags)))}
    names = [regex.sub(r"^(n\d{8}-|\d+\.|\d{3,}_)(?=\p{L})", "", tag).replace("_", " ") for tag in number]
    if table := next(filter(Path.is_file, (root / "classnames.txt", root.parent / "classnames.txt")), None):
        lines = [line.partition(",")[0].rstrip("_ ").split(maxsplit=1) for line in text_lines(table)]
        said = sorted((words[0], words[1].replace("_", " ").strip()) for words in lines if len(words) > 1)
        wrong, names = {tag for tag, _ in said} ^ number.keys(), [name for _, name in said]
        if wrong or len(lines) > len(number):
            raise ValueError(f"{table}: look at {min(wrong, default='doubles')}; a class is one 'TAG NAME'")
    elif (unnamed := [*filter(NO_CLASS.fullmatch, number)]) or len(set(names)) < len(names):
        raise ValueError(f"{root}: classes like {min(unnamed or number)} have no names that differ: put a "
                         "classnames.txt of lines 'TAG NAME' there (Kaggle's LOC_synset_mapping.txt)")
    return names, [number[tag] for tag in tags]


def open_list(table: Path, split: str) -> Source:
    """The images that a list names: lines "PATH<TAB>CLASS" or "PATH", then CLASS is the folder that holds
    the image; PATH is below the list's own folder. Raises FileNotFoundError or ValueError."""
    rows = [line.partition("\t") for line in text_lines(table)]
    images = [table.parent / path.strip().lstrip("/") for path, _, _ in rows]
    tags = [tag.strip() or image.parent.name for image, (_, _, tag) in zip(images, rows)]
    # SUN397 has church/outdoor and cathedral/outdoor, which by their folders' names would be one class.
    folders = {image.parent for image, (_, _, tag) in zip(images, rows) if not tag.strip()}
    if len({path.name for path in folders}) < len(folders) or len(set(tags)) == 1 or "\t" in "".join(tags):
        raise ValueError(f"{table}: one class, two folders of one name, or three columns, not PATH<TAB>CLASS")
    return Source(table.stem, images, *class_names(table.parent, tags))


def open_karpathy(table: Path, split: str) -> Source:
    """COCO or Flickr with Karpathy's split (Karpathy and Fei-Fei 2015), the pictures beside the table as
    "filepath/filename" or "filename". "train" is his train and restval; "val" is his *test*, on which the
    field compares retrieval, of each image the first five captions. Raises FileNotFoundError, ValueError."""
    wanted, least = (("train", "restval"), 1) if split == "train" else (("test",), 5)
    try:
        entries = [entry for entry in json.loads(table.read_bytes())["images"] if entry["split"] in wanted]
        images = [table.parent / (entry.get("filepath") or "") / entry["filename"] for entry in entries]
        texts = [[sentence["raw"].strip() for sentence in entry["sentences"] if clean(sentence["raw"])][:5]
                 for entry in entries]
        if min(map(len, texts), default=5) < least:
            raise ValueError(f"an image of {' and '.join(wanted)} has fewer than {least} captions")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{table} is damaged, or not Karpathy's table ({error!r}): fetch it again") from None
    return Source(table.stem, images, texts=texts)


# ---------------------------------------------------------------- batches
class Batch(NamedTuple):
    images: Tensor                # uint8 [B, S, S, 3]; from cached latents moments, float16 [B, 2C, h, w]
    captions: list                # B captions; in evaluation B lists of captions
    labels: list                  # B class numbers, or None each
    places: list[int]             # of the samples in their source; in training in the stream
    skipped: Counter              # bad samples met on the way, by cause
    tokens: Tensor | None = None  # [B, L] int64, in training
    drawn: dict | None = None     # what the `draw` of training_batches made for this step


def make_batch(size: int, tokenizer: Tokenizer | None, draw: Callable[[int], dict] | None, batch_size: int,
               rows: list[tuple[Sample | None, list[str]]]) -> Batch:
    """For each row a sample, or none, and why others were skipped -> a batch, put together in the workers."""
    samples = [sample for sample, _ in rows if sample]
    skipped = Counter(cause for _, causes in rows for cause in causes)
    images, captions, labels, places = map(list, zip(*samples)) if samples else ([],) * 4
    arrays = [image if isinstance(image, np.ndarray) else to_square(image, size) for image in images]
    return Batch(torch.from_numpy(np.array(arrays)), captions, labels, places, skipped,
                 tokenizer and tokenizer(captions), draw and draw(places[0] // batch_size))


def evaluation_batches(source: Source, image_size: int, batch_size: int, workers: int = 0) -> DataLoader:
    """The source's samples once, in order, with all their captions; bad ones are left out and counted."""
    return DataLoader(source, batch_size, num_workers=workers,
                      collate_fn=partial(make_batch, image_size, None, None, 1))


@dataclass(eq=False)
class Stream:
    """Item n is the n-th sample of an endless stream, and the causes of bad ones that it replaces: a function
    of source and seed. Each epoch shows every sample of the source once, with one of its captions."""
    source: Source
    image_size: int               # px
    seed: int
    shuffle_buffer: int = 100_000      # samples that are mixed with each other
    augment: bool = False         # a random crop and RandAugment of each picture, not its centre square

    @lru_cache(maxsize=1)
    def order(self, epoch: int) -> Sequence[int]:
        """An epoch's order: shards in a fresh sequence, each stretch of `shuffle_buffer` samples at random.
        So files are read one after another; all over 100 GB nearly every sample would be a seek."""
        rng, size = np.random.default_rng([self.seed, epoch]), len(self.source)
        if isinstance(self.source, Shapes):      # random already; each seed begins elsewhere
            return range(self.seed * 10_000_000, self.seed * 10_000_000 + size)
        if not isinstance(self.source, TarSource) or self.shuffle_buffer >= size:
            return rng.permutation(size)
        shards = self.source.places[self.source.rows, 0]
        order = np.argsort(rng.permutation(shards.max() + 1)[shards], kind="stable")
        for first in range(0, size, self.shuffle_buffer):
            rng.shuffle(order[first:first + self.shuffle_buffer])
        return order

    def __getitem__(self, position: int) -> tuple[Sample, list[str]]:
        size, causes = len(self.source), []
        epoch, place = divmod(position, size)
        # Replaced from half an epoch away: the very next one is in this batch already, and would be its own
        # negative. The stride has no common factor with the length.
        stride = size // 2 + (2 if size % 4 == 2 else 1)
        while len(causes) < 100:
            index = int(self.order(epoch)[(place + len(causes) * stride) % size]) % size
            try:
                sample = self.source.read(index, self.image_size)
            except BadSample as bad:
                causes.append(str(bad))
                continue
            if self.augment:
                # read() leaves twice the needed side, and a crop has at least sqrt(1/2 · 3/4) = 0.61 of it.
                rng = np.random.default_rng([self.seed, epoch, index, 1])
                crop = random_crop(sample.image, self.image_size, rng)
                sample = sample._replace(image=rand_augment(crop, rng))
            choice = np.random.default_rng([self.seed, epoch, index]).integers(len(sample.captions))
            return sample._replace(captions=sample.captions[choice], place=position), causes
        raise ValueError(f"100 unusable samples in a row ({dict(Counter(causes))}): no image-caption data?")


def leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach a whole process group; what to do about them is the training loop's to say."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def training_batches(source: Source, image_size: int, batch_size: int, seed: int, start: int = 0,
                     workers: int = 0, rank: int = 0, world: int = 1, tokenizer: Tokenizer | None = None,
                     draw: Callable[[int], dict] | None = None, **options) -> Iterator[Batch]:
    """Endless training batches from number `start` on, of each this rank's rows, every `world`-th. No batch
    depends on those before it: to resume the step is enough, and workers and ranks change nothing.

    batch_size: over all ranks; workers: processes that read, decode, crop and tokenise, which close() ends;
    draw: number of the batch -> what else training needs; options: of `Stream`. Raises ValueError."""
    rows = (range(k * batch_size + rank, (k + 1) * batch_size, world) for k in count(start))
    try:
        yield from DataLoader(
            Stream(source, image_size, seed, **options), batch_sampler=rows, num_workers=workers,
            collate_fn=partial(make_batch, image_size, tokenizer, draw, batch_size),
            prefetch_factor=4 if workers else None, worker_init_fn=leave_signals)
    except (ValueError, RuntimeError) as error:        # out of a worker: pages of traceback, or its death
        error.__traceback__ = None       # its frames would keep the loader, and workers that no signal ends
        raise ValueError(str(error).split("ValueError: ")[-1].strip()) from None


@dataclass
class SkipReport:
    """Counts samples, and bad ones by cause, and says when these are too many."""
    max_bad: float = 0.05         # share
    visited: int = 0
    skipped: Counter = field(default_factory=Counter)

    def add(self, batch: Batch) -> None:
        self.visited += len(batch.places) + batch.skipped.total()
        self.skipped += batch.skipped

    def check(self, final: bool = False) -> None:
        """Raises ValueError when more than max_bad were bad; on the way, from 100 on, beyond chance (3 σ)."""
        most = self.max_bad * self.visited
        if (final or self.visited >= 100) and self.skipped.total() > most + (not final) * 3 * most ** 0.5:
            raise ValueError(f"too much of the data is unusable ({self}); mend it, or raise --max-bad")

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.skipped.items()))
        return f"samples read: {self.visited}, skipped: {causes or 'none'}"


# ---------------------------------------------------------------- shapes
# Dark: mid-grey, 0 in [-1, 1], is what convolutions see outside a picture, and took far longer to learn.
SIDE, BACKGROUND = 32, 32.0                 # px; red = green = blue of 255
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (240, 220, 50),
           "purple": (160, 60, 200), "white": (250, 250, 250)}
# Signed distance to the outline of a shape of radius r, from x to its middle, without sign, and y, downwards.
SHAPES = {
    "circle": lambda x, y, r: np.sqrt(x * x + y * y) - r,
    "square": lambda x, y, r: np.maximum(x, np.abs(y)) - 0.886 * r,
    "triangle": lambda x, y, r: np.maximum(y - 0.34 * r, 0.866 * x - 0.5 * (y - 0.34 * r)) - 0.68 * r,
    "cross": lambda x, y, r: np.minimum(np.maximum(x - 1.05 * r, np.abs(y) - 0.35 * r),
                                        np.maximum(np.abs(y) - 1.05 * r, x - 0.35 * r))}
RADII = {"": 7.0, "small": 5.0}             # px; the large size goes without saying
RELATIONS = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}
OPPOSITE = dict(zip(RELATIONS, ("below", "above", "to the right of", "to the left of")))
PIXELS = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5      # y, x of pixel centres
KINDS = list(product(COLOURS, SHAPES))
Thing = namedtuple("Thing", "size colour shape")


class Scene(NamedTuple):
    """One thing, or two of different colours and their relation ("first RELATION second")."""
    things: tuple[Thing, ...]
    relation: str | None
    centres: tuple[tuple[float, float], ...]      # x, y in px

    def caption(self) -> str:
        return f" {self.relation} ".join(f"a {' '.join(filter(None, thing))}" for thing in self.things)


def is_held_out(pair: tuple) -> bool:
    """A fifth of the pairs of kinds, whatever their sizes and relation, is never shown in training; the
    README's own prompt is among them, so that it shows a combination the model never saw."""
    name = " ".join(sorted(" ".join(kind) for kind in pair))
    return name == "blue square red circle" or hashlib.sha256(name.encode()).digest()[0] < 51


PAIRS = [(a, b) for i, a in enumerate(KINDS) for b in KINDS[i + 1:] if a[0] != b[0]]
TRAIN_PAIRS, HELD_OUT_PAIRS = ([pair for pair in PAIRS if is_held_out(pair) == held] for held in (0, 1))
MEANINGS = list(product(HELD_OUT_PAIRS, product(RADII, RADII), RELATIONS))
MEANINGS = [MEANINGS[i] for i in np.random.default_rng(0).permutation(len(MEANINGS))]     # mixed


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers, [32, 32] in [0, 1]; x, y: the centre of its bounding box, px."""
    return np.clip(0.5 - SHAPES[shape](np.abs(PIXELS[1] - x), PIXELS[0] - y, radius), 0, 1)


def paint(image: np.ndarray, alpha: np.ndarray, colour: str) -> np.ndarray:
    """A colour over a picture [32, 32, 3], as far as alpha [32, 32] covers it."""
    return (image + alpha[..., None] * (np.array(COLOURS[colour], np.float32) - image)).astype(np.float32)


def render(scene: Scene) -> np.ndarray:
    """A scene -> uint8 [32, 32, 3], anti-aliased."""
    image = np.full((SIDE, SIDE, 3), BACKGROUND, np.float32)
    for thing, (x, y) in zip(scene.things, scene.centres):
        image = paint(image, coverage(thing.shape, x, y, RADII[thing.size]), thing.colour)
    return image.round().astype(np.uint8)


def pair_scene(pair: tuple, sizes: tuple[str, str], relation: str, rng: np.random.Generator) -> Scene:
    """Two things, their centres 15 to 17 px apart along the relation's axis and loose across it; by a coin,
    the same is told from the second one's side."""
    things = tuple(Thing(size, *kind) for size, kind in zip(sizes, pair))
    if rng.integers(2):
        things, relation = things[::-1], OPPOSITE[relation]
    along, across = 8 * np.array([1.0, -1.0]) + rng.uniform(-0.5, 0.5, 2), rng.uniform(-1, 1, 2)
    axis = np.array(RELATIONS[relation])
    centres = 16 + np.outer(along, axis) + np.outer(across, np.abs(axis[::-1]))
    return Scene(things, relation, tuple(map(tuple, centres.tolist())))


def same_words(pair: tuple, sizes: tuple, relation: str, rng: np.random.Generator) -> tuple:
    """Another meaning of the same words: the things exchange places, shapes, both, or sizes."""
    (colour_a, shape_a), (colour_b, shape_b) = pair
    exchanged = ((colour_a, shape_b), (colour_b, shape_a))
    choices = [(pair, sizes, OPPOSITE[relation])]
    if shape_a != shape_b and not is_held_out(exchanged):
        choices += [(exchanged, sizes, relation), (exchanged, sizes, OPPOSITE[relation])]
    if sizes[0] != sizes[1]:
        choices.append((pair, sizes[::-1], relation))
    return choices[rng.integers(len(choices))]


class Shapes(Source):
    """Procedural scenes with captions: sample i is a function of (seed, split, i) alone.

    split "train": endless in practice, pairs of TRAIN_PAIRS, one scene in ten a single thing. Scenes come in
    twos that share a batch; their captions have the same words, but for the side they are told from, and
    another meaning: all must be read to tell them apart. "val": each meaning of held-out pairs once ("A above
    B" and "B below A" are one). "classes": single things of 24 classes such as "red circle"."""
    template = "a {}"

    def __init__(self, split: str = "train", seed: int = 0) -> None:
        super().__init__("shapes")
        self.split, self.seed = split, seed
        self.rows = range({"train": 10 ** 12, "val": len(MEANINGS), "classes": 2400}[split])
        if split == "classes":
            self.classes = [" ".join(kind) for kind in KINDS]
            self.labels = [i % len(KINDS) for i in self.rows]

    def scene(self, index: int) -> Scene:
        row, sizes = int(self.rows[index]), list(RADII)
        key = [self.seed, ("train", "val", "classes").index(self.split)]
        rng = np.random.default_rng([*key, 1, row])
        if self.split == "val":
            return pair_scene(*MEANINGS[row], rng)
        group = np.random.default_rng([*key, 0, row // 2])                # what the pair's scenes share
        if self.split == "classes" or group.random() < 0.1:
            kind = KINDS[row % len(KINDS) if self.split == "classes" else rng.integers(len(KINDS))]
            return Scene((Thing(sizes[rng.integers(2)], *kind),), None, (tuple(rng.uniform(14, 18, 2)),))
        meaning = (TRAIN_PAIRS[group.integers(len(TRAIN_PAIRS))],
                   (sizes[group.integers(2)], sizes[group.integers(2)]), list(RELATIONS)[group.integers(4)])
        return pair_scene(*(same_words(*meaning, rng) if row % 2 else meaning), rng)

    def captions(self, index: int) -> list[str]:
        return [self.scene(index).caption()]

    def image(self, index: int, side: int | None = None) -> Image.Image:
        return Image.fromarray(render(self.scene(index)))


# ---------------------------------------------------------------- its checker
THING = f"a (?:(small) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
CAPTION = regex.compile(rf"{THING}(?: ({'|'.join(RELATIONS)}) (?!a (?:small )?\2 ){THING})?")    # two colours
MIN_MASS = 12.0          # px of a colour that count as a thing: about half of the smallest thing's inside
MIN_OVERLAP = 0.75       # with the best shape: a clean thing has 0.95, a blurred blob 0.6
FAR, MAX_STRAYS = 64, 32     # of 255, px: edges of clean things give up to 17, a speck of 6 px across 36
Fit = namedtuple("Fit", "overlap shape radius alpha")      # intersection over union; px; coverage [32, 32]


def parse(caption: str) -> tuple[tuple[Thing, ...], str | None]:
    """A caption of the grammar -> its things and relation. Raises ValueError on anything else."""
    if not (match := CAPTION.fullmatch(clean(caption))):
        raise ValueError(f"{caption!r} is not in the grammar of 'a red circle above a small blue square'")
    words = match.groups(default="")
    return (Thing(*words[:3]), Thing(*words[4:]))[:1 + bool(words[3])], words[3] or None


def colour_masks(image: np.ndarray) -> dict[str, np.ndarray]:
    """Per colour, how much of each pixel it covers: [32, 32] in [0, 1], of the pixels that are nearest to it.
    One at a thing's edge mixes its colour with the ground behind: it lies on the line between the two."""
    offset = image.astype(np.float32) - BACKGROUND
    lines = np.array(list(COLOURS.values()), np.float32) - BACKGROUND                   # [6, 3]
    alphas = np.clip(offset @ lines.T / (lines ** 2).sum(1), 0, 1)                      # [32, 32, 6]
    nearest = ((offset[:, :, None] - alphas[..., None] * lines) ** 2).sum(-1).argmin(-1)
    return {colour: np.where((nearest == i) & (alphas[..., i] > 0.35), alphas[..., i], 0)
            for i, colour in enumerate(COLOURS)}


def centroid(mask: np.ndarray) -> np.ndarray:
    """x, y in px."""
    return np.array([(mask * PIXELS[1]).sum(), (mask * PIXELS[0]).sum()]) / mask.sum()


def best_fit(mask: np.ndarray) -> Fit:
    """Analysis by synthesis: which of the shapes, in three sizes at nine places each, fits a mask best."""
    (x, y), shifts, fits = centroid(mask), np.array([-0.5, 0.0, 0.5], np.float32), []
    for shape in SHAPES:
        unit = coverage(shape, 16.0, 16.0, 6.0)
        radius = 6.0 * (mask.sum() / unit.sum()) ** 0.5   # equal area
        lift = (centroid(unit)[1] - 16.0) * radius / 6    # a triangle's centroid is below its box's centre
        for scale, dx, dy in product(np.array([0.94, 1.0, 1.06], np.float32), shifts, shifts):
            alpha = coverage(shape, x + dx, y - lift + dy, radius * scale)
            solid = np.where(alpha > 0.35, alpha, 0)
            overlap = np.minimum(solid, mask).sum() / np.maximum(solid, mask).sum()
            fits.append(Fit(overlap, shape, radius * scale, alpha))
    return max(fits, key=lambda fit: fit.overlap)


def check(image: np.ndarray, caption: str) -> dict[str, bool]:
    """What of a caption of `shapes` a picture, uint8 [32, 32, 3], shows, decided from its pixels alone ->
    {"colour": the mentioned ones, and nothing else stands out; "shape": of each thing, cleanly; "size";
    "relation": they stand as the caption says; "all"}. Raises ValueError on other captions."""
    things, relation = parse(caption)
    masks, mentioned = colour_masks(image), {thing.colour for thing in things}
    # Only pixels mostly of a colour count here: faint noise all over the ground must not add up to a thing.
    present = {colour for colour, mask in masks.items() if mask[mask > 0.5].sum() >= MIN_MASS}
    if not mentioned <= present:
        return dict.fromkeys(("colour", "shape", "size", "relation", "all"), False)
    fits = [best_fit(masks[thing.colour]) for thing in things]
    explained, middle = np.full(image.shape, BACKGROUND, np.float32), (RADII[""] * RADII["small"]) ** 0.5
    for thing, fit in zip(things, fits):
        explained = paint(explained, fit.alpha, thing.colour)
    strays = (np.abs(image - explained).max(-1) > FAR).sum()
    axis = RELATIONS.get(relation, (0, 0))
    offset = centroid(masks[things[0].colour]) - centroid(masks[things[-1].colour])      # first from second
    verdict = {"colour": present == mentioned and bool(strays <= MAX_STRAYS),
               "shape": [f.shape for f in fits if f.overlap >= MIN_OVERLAP] == [t.shape for t in things],
               "size": [fit.radius < middle for fit in fits] == [thing.size == "small" for thing in things],
               "relation": relation is None or bool(offset @ axis > max(abs(offset @ axis[::-1]), 4.0))}
    return {**verdict, "all": all(verdict.values())}
