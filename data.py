"""Captions to tokens, files to images, and a world of coloured shapes that needs no files at all.

What it is, top to bottom: CLIP's tokenizer, which can also learn a vocabulary; images that may be broken;
random crops and RandAugment, for training CLIP; the sources that `--data` names; batches that are a function
of the step alone; the built-in data `shapes`; and its checker, which judges a picture by its pixels alone
against its caption.
What it is not: noise, or a network. It imports no other file of the project.

A bad sample is never fatal and never silent: it is counted by cause, and too many of them stop the run.
Read next: model.py.
"""
import copy
import gzip
import hashlib
import heapq
import html
import io
import json
import math
import os
import signal
import sys
import tarfile
import warnings
import zipfile
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ftfy
import numpy as np
import regex
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CACHE = Path(torch.hub.get_dir()) / "diffdis"     # downloads, and indices of large data sets
LARGE_INDEX = 10_000                              # samples: reading their places takes seconds


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a file that is complete under its name, or the old one stays. Raises OSError."""
    part = path.with_name(path.name + ".part")      # one name: what a killed program left is overwritten
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # torch.save's word for a full disk is a RuntimeError
        reason = getattr(error, "strerror", None) or "writing stopped short: is the disk full?"
        raise OSError(f"cannot write {path}: {reason}; whatever was there before is intact") from None
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- tokenizer
# What BPE works within. CLIP's own pattern also matches its control tokens; a caption must not say those.
PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
WORD_END, START, END = "</w>", "<|startoftext|>", "<|endoftext|>"


@lru_cache(maxsize=2 ** 16)
def clean(caption: str) -> str:
    """CLIP's cleaning: mojibake and HTML entities undone, white space collapsed, lower case."""
    # Most captions have nothing to undo, and finding that out was a third of all loading time.
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return " ".join(caption.split()).lower()
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return regex.sub(r"\s+", " ", text).strip().lower()


def byte_symbols() -> dict[int, str]:
    """Each byte as one printable character, in CLIP's order: printable ones stand for themselves."""
    printable = [byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """CLIP's byte-level byte-pair encoding (Radford et al. 2021).

    merges: "left right" in the order they were learnt; context_length: L, tokens per caption, ends included.
    """

    def __init__(self, merges: list[str], context_length: int = 77) -> None:
        self.merges, self.context_length = merges, context_length
        self.symbols = byte_symbols()
        self.rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        base = list(self.symbols.values())
        self.names = [*base, *(s + WORD_END for s in base), *map("".join, self.rank), START, END]
        self.id = {name: i for i, name in enumerate(self.names)}
        self.vocab_size = len(self.names)
        self.start, self.end = self.vocab_size - 2, self.vocab_size - 1

    @classmethod
    def from_file(cls, path: str | Path, context_length: int = 77) -> "Tokenizer":
        """CLIP's bpe_simple_vocab_16e6.txt.gz, or a folder with vocab.json and merges.txt.

        Raises FileNotFoundError or ValueError, also if the folder's two files do not describe one table.
        """
        path, table = Path(path), None
        try:
            if path.is_dir():
                lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
                table = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
            else:       # a headline, and more merges than CLIP uses
                lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1:49152 - 256 - 2 + 1]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no vocabulary at {error.filename}: expected "
                                    "bpe_simple_vocab_16e6.txt.gz, or vocab.json and merges.txt") from None
        except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
            raise ValueError(f"{path} is no vocabulary of CLIP's ({error}): fetch it again") from None
        merges = [line for line in lines if line and not line.startswith("#version")]
        if not merges or any(line.count(" ") != 1 for line in merges):
            raise ValueError(f"{path} is no vocabulary of CLIP's: expected lines of two symbols")
        tokenizer = cls(merges, context_length)
        if table not in (None, tokenizer.id):
            raise ValueError(f"{path}: vocab.json is not the table that merges.txt gives by CLIP's rule")
        return tokenizer

    @classmethod
    def learn(cls, captions: Iterable[str], vocab_size: int, context_length: int = 77) -> "Tokenizer":
        """Learn merges from captions: the most frequent pair first, ties in alphabetical order.

        vocab_size: at most this many tokens, at least 514; fewer if nothing is left to merge.
        """
        table = byte_symbols()
        pieces = Counter(piece for caption in captions for piece in PIECES.findall(clean(caption)))
        spelt = [[table[byte] for byte in piece.encode("utf-8")] for piece in pieces]
        spelt = [[*symbols[:-1], symbols[-1] + WORD_END] for symbols in spelt]
        return cls(learn_merges(spelt, list(pieces.values()), vocab_size - 514), context_length)

    def to_dict(self) -> dict:
        """What `Tokenizer(**values)` takes."""
        return {"merges": self.merges, "context_length": self.context_length}

    @lru_cache(maxsize=2 ** 16)
    def spell(self, piece: str) -> tuple[int, ...]:
        """One piece -> ids: start from bytes, apply the earliest learnt merge that fits until none does."""
        parts = [self.symbols[byte] for byte in piece.encode("utf-8")]
        parts[-1] += WORD_END
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if pair not in self.rank:
                break
            parts = merge_pair(parts, pair)
        return tuple(self.id[part] for part in parts)

    def encode(self, caption: str) -> list[int]:
        """A caption -> ids, without start and end."""
        return [i for piece in PIECES.findall(clean(caption)) for i in self.spell(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, control tokens left out."""
        byte_of = {symbol: byte for byte, symbol in self.symbols.items()} | {" ": ord(" ")}
        text = "".join(self.names[int(i)] for i in ids if int(i) < self.start).replace(WORD_END, " ")
        return bytes(byte_of[symbol] for symbol in text).decode("utf-8", errors="replace").strip()

    def __call__(self, captions: list[str]) -> Tensor:
        """captions -> tokens [B, L] int64: start, ids, end, then padded with end. Longer ones are cut.

        The first end is where the text query is read. Attention is causal, so padding with further ends, as
        Stable Diffusion does, changes nothing there.
        """
        if isinstance(captions, str):
            raise ValueError("expected a list of captions, came one string: write tokenizer([caption])")
        tokens, room = torch.full((len(captions), self.context_length), self.end), self.context_length - 2
        for row, caption in zip(tokens, captions):
            ids = self.encode(caption)
            if len(ids) > room:       # the same words each time: Python then says it once
                warnings.warn(f"captions of more than {room} tokens are cut, the last one kept", stacklevel=2)
            ids = [self.start, *ids[:room]]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


def merge_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of the pair, from the left."""
    merged, i = [], 0
    while i < len(parts):
        joins = tuple(parts[i:i + 2]) == pair
        merged.append("".join(pair) if joins else parts[i])
        i += 2 if joins else 1
    return merged


def learn_merges(spelt: list[list[str]], counts: list[int], limit: int) -> list[str]:
    """The BPE algorithm on spelt words and their counts -> up to `limit` merges.

    Only words that hold the merged pair are visited, and a heap with stale entries gives the next pair,
    so that 30,000 captions take seconds.
    """
    frequency, where = Counter(), defaultdict(set)
    for i, parts in enumerate(spelt):
        for pair in zip(parts, parts[1:]):
            frequency[pair] += counts[i]
            where[pair].add(i)
    heap, merges = [(-n, pair) for pair, n in frequency.items()], []
    heapq.heapify(heap)
    while heap and len(merges) < limit:
        count, pair = heapq.heappop(heap)
        if frequency[pair] != -count or not count:
            continue                     # stale: the true count was pushed when it changed
        merges.append(" ".join(pair))
        changed = set()
        for i in where.pop(pair):
            for sign, parts in ((-1, spelt[i]), (1, merge_pair(spelt[i], pair))):
                for neighbours in zip(parts, parts[1:]):
                    frequency[neighbours] += sign * counts[i]
                    changed.add(neighbours)
                    where[neighbours].add(i)
                spelt[i] = parts
        for neighbours in changed:
            heapq.heappush(heap, (-frequency[neighbours], neighbours))
    return merges


# ---------------------------------------------------------------- images that may be broken
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")     # no others: Pillow would start Ghostscript for an EPS
MIN_SIDE, MAX_PIXELS = 8, 64_000_000      # px; beyond these a picture is noise, or a decompression bomb
warnings.filterwarnings("ignore", module="PIL")      # on large pictures and odd metadata: judged here


class BadSample(Exception):
    """A sample that cannot be used; `cause` is one of a few short strings, to be counted."""

    def __init__(self, cause: str, key: str = "") -> None:
        super().__init__(f"{key}: {cause}")
        self.cause, self.key = cause, key


def decode_image(raw: bytes, key: str = "", side: int | None = None) -> Image.Image:
    """Bytes of a JPEG, PNG, WebP or GIF (first frame), of any mode -> upright RGB picture.

    side: px that are needed; a JPEG more than twice as large is decoded at a half, a quarter or an eighth of
    its size, which saves time. None: at full size. Raises BadSample.
    """
    try:
        image = Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS)
        if min(image.size) < MIN_SIDE or image.width * image.height > MAX_PIXELS:
            raise BadSample("image too small" if min(image.size) < MIN_SIDE else "image too large", key)
        if side is not None:
            image.draft(None, (2 * side, 2 * side))      # never below twice what is needed
        image.load()
        with suppress(Exception):                 # behind broken metadata the pixels may be sound
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):      # 16 bits of grey: convert() would clip them all to white
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA") if image.mode == "P" else image
        return image if image.mode == "RGB" else image.convert("RGB")
    except BadSample:
        raise
    except Exception:       # Pillow's decoders raise nearly anything on damaged files
        raise BadSample("unreadable image", key) from None


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Centre square of the picture, resized (bicubic, antialiased) -> uint8 [size, size, 3]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.width != image.height:      # cropped first: resize()'s own box lets pixels from outside bleed in
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image if side == size else image.resize((size, size), Image.Resampling.BICUBIC))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3], on any device -> float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- random crop, RandAugment (CLIP's training)
# Share of the picture's area. Our choice: the paper only says "random crop", and a caption tells of the whole
# picture, more than a class name does. OpenCLIP takes (0.9, 1.0), ImageNet's classifiers (0.08, 1.0).
CROP_AREA = (0.5, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)              # width to height
RANDOM_OPERATIONS, MAGNITUDE, BINS = 2, 9, 31      # RandAugment's N, M, and the number of magnitudes


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random part of a picture -> left, top, right, bottom, px (torchvision's RandomResizedCrop).

    Its share of the area is uniform in CROP_AREA, its aspect log-uniform in CROP_ASPECT. After ten parts that
    do not fit, the largest one of a permitted aspect, from the centre.
    """
    least, greatest = CROP_ASPECT
    for _ in range(10):
        pixels = width * height * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(math.log(least), math.log(greatest)))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * greatest)), min(height, round(width / least))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random part of an RGB picture, resized to size x size px (bicubic, antialiased)."""
    return image.crop(crop_box(*image.size, rng)).resize((size, size), Image.Resampling.BICUBIC)


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Each pixel (x, y) from (ax + by + c, dx + ey + f), the nearest one; black from outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def enhance(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    """Pillow's enhancers blend with the picture less its brightness, colour, ...; 1 is the picture itself."""
    return lambda image, value: kind(image).enhance(1 + value)


# RandAugment's choices: RGB picture, value -> RGB picture; the value at the least and at the greatest
# magnitude, whether a coin turns its sign. Shears are in px per px, translations in shares of the side.
OPERATIONS: dict[str, tuple[Callable, float, float, bool]] = {
    "Identity": (lambda image, value: image, 0, 0, False),
    "ShearX": (lambda image, value: affine(image, 1, value, 0, 0, 1, 0), 0, 0.3, True),
    "ShearY": (lambda image, value: affine(image, 1, 0, 0, value, 1, 0), 0, 0.3, True),
    "TranslateX": (lambda image, value: affine(image, 1, 0, -int(value), 0, 1, 0), 0, 150 / 331, True),
    "TranslateY": (lambda image, value: affine(image, 1, 0, 0, 0, 1, -int(value)), 0, 150 / 331, True),
    "Rotate": (lambda image, value: image.rotate(value, Image.Resampling.NEAREST), 0, 30, True),    # degrees
    "Brightness": (enhance(ImageEnhance.Brightness), 0, 0.9, True),
    "Color": (enhance(ImageEnhance.Color), 0, 0.9, True),
    "Contrast": (enhance(ImageEnhance.Contrast), 0, 0.9, True),
    "Sharpness": (enhance(ImageEnhance.Sharpness), 0, 0.9, True),
    "Posterize": (lambda image, bits: ImageOps.posterize(image, int(bits)), 8, 4, False),
    "Solarize": (lambda image, value: ImageOps.solarize(image, value), 255, 0, False),
    "AutoContrast": (lambda image, value: ImageOps.autocontrast(image), 0, 0, False),
    "Equalize": (lambda image, value: ImageOps.equalize(image), 0, 0, False)}


def rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """RandAugment (Cubuk et al. 2020) on an RGB picture, with torchvision's operations and values."""
    for _ in range(RANDOM_OPERATIONS):
        name = list(OPERATIONS)[rng.integers(len(OPERATIONS))]
        operation, least, greatest, has_sign = OPERATIONS[name]
        side = {"TranslateX": image.width, "TranslateY": image.height}.get(name, 1)
        # In float32, as torchvision has it: shifts are cut to integers, so the last digit can count.
        value = torch.linspace(least, greatest * side, BINS)[MAGNITUDE].item()
        value = round(value) if name == "Posterize" else value
        image = operation(image, -value if has_sign and rng.integers(2) else value)
    return image


# ---------------------------------------------------------------- sources
@dataclass
class Sample:
    image: Image.Image | np.ndarray      # RGB, or moments: see Source
    captions: list[str]
    key: str
    label: int | None = None


class Source:
    """Image-caption samples by index; `rows` are those in use, of all there are.

    What differs between kinds of sources: key(index), a name for messages, and member(index, kind), the
    content of a sample's "image", "txt" or "json" (None: there is none), which raises OSError. `Shapes` has
    no files: it makes captions and images itself.
    """
    classes: list[str] | None = None     # names, in the order of the labels
    labels: list[int] | None = None      # of all rows
    texts: list[list[str]] | None = None       # captions of all rows; in evaluation each is a text of its own
    # Instead of images what the autoencoder makes of them, mean and log-variance (train.py --latents):
    moments: np.ndarray | None = None          # float16 [all rows, 2C, h, w], NaN where an image is unusable

    def __init__(self, name: str, count: int) -> None:
        self.name, self.rows = name, range(count)
        self.skipped: Counter = Counter()      # what indexing had to leave out, by cause

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: np.ndarray) -> "Source":
        part = copy.copy(self)
        part.rows, part.skipped = np.asarray(self.rows)[indices], Counter()
        return part

    def shards(self) -> np.ndarray | None:
        """Which file each sample lies in [len(self)]; None where that makes no difference."""
        return None

    def label(self, index: int) -> int | None:
        return None if self.labels is None else self.labels[self.rows[index]]

    def content(self, index: int, kind: str) -> bytes | None:
        try:
            return self.member(index, kind)
        except OSError:
            raise BadSample("unreadable file", self.key(index)) from None

    def captions(self, index: int) -> list[str]:
        """All captions of a sample, its image left undecoded. Raises BadSample."""
        if self.texts is not None:
            return self.texts[self.rows[index]]
        if self.labels is not None:
            name = self.classes[self.label(index)]
            return [f"a photo of a{'n' if name[0].lower() in 'aeiou' else ''} {name}"]
        lines, listed = read_captions(self.content(index, "txt"), self.content(index, "json"))
        # KEY.txt wins: the list in KEY.json is used only where it agrees with it.
        captions = listed if listed and (not lines or lines[0] in listed) else lines
        if not captions:
            raise BadSample("empty caption", self.key(index))
        return captions

    def image(self, index: int, side: int | None = None) -> Image.Image | np.ndarray:
        """A sample's picture, or its moments; side: px that are needed, None: all. Raises BadSample."""
        if self.moments is None:
            return decode_image(self.content(index, "image"), self.key(index), side)
        moments = np.array(self.moments[self.rows[index]])
        if np.isnan(moments).any():
            raise BadSample("unusable image", self.key(index))
        return moments

    def read(self, index: int, side: int | None = None) -> Sample:
        captions = self.captions(index)          # first: a bad one costs no decoding
        return Sample(self.image(index, side), captions, self.key(index), self.label(index))


def read_captions(text: bytes | None, meta: bytes | None) -> tuple[list[str], list[str]]:
    """The captions in KEY.txt, one a line, and in KEY.json, its "captions" or "caption"."""
    def usable(values: list) -> list[str]:
        return [value.strip() for value in values if isinstance(value, str) and clean(value)]
    fields: dict = {}
    with suppress(ValueError, TypeError, RecursionError):      # no JSON object, or absurdly nested
        fields = dict(json.loads(meta or b"{}"))
    several = fields.get("captions")
    listed = usable(several if isinstance(several, list) else [several]) or usable([fields.get("caption")])
    return usable((text or b"").decode("utf-8-sig", errors="replace").splitlines()), listed


class TarSource(Source):
    """img2dataset's tars (CC3M's layout): KEY.jpg, KEY.txt and/or KEY.json, members of a sample side by side.

    The tars' headers are read once, and kept in CACHE where they are many. After that a sample is a few reads
    at known places: samples come in any order, and to go on where one was a number is enough.
    """
    KINDS = ("image", "txt", "json")

    def __init__(self, tars: list[Path], name: str) -> None:
        super().__init__(name, 0)
        self.tars = tars
        stamp = repr([(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in tars])
        saved = CACHE / f"index-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.npz"
        try:
            with np.load(saved) as index:
                self.table, self.skipped = index["table"], Counter(json.loads(str(index["skipped"])))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):       # none there, or damaged
            self.table = self.build_index()
            if len(self.table) >= LARGE_INDEX:
                with suppress(OSError):              # costs only its use
                    saved.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(saved, lambda file: np.savez(
                        file, table=self.table, skipped=json.dumps(self.skipped)))
        self.rows = range(len(self.table))

    def build_index(self) -> np.ndarray:
        """A row per sample: its key, and [shard, then offset and size of each kind (size -1: absent)]."""
        keys, places = [], array("q")        # flat, 8 bytes a number: lists of them would take GBs for CC3M
        for shard, path in enumerate(tqdm(self.tars, "index", unit="shard", delay=2, disable=None)):
            for key, members in self.samples_of(path):
                if "image" not in members or not {"txt", "json"} & members.keys():
                    self.skipped["no image" if "image" not in members else "no caption"] += 1
                    continue
                keys.append(key.encode(errors="replace")[:200])
                places.extend([shard, *(n for kind in self.KINDS for n in members.get(kind, (0, -1)))])
        width = max(map(len, keys), default=1)
        table = np.empty(len(keys), [("key", f"S{width}"), ("place", np.int64, (7,))])
        table["key"], table["place"] = keys, np.array(places).reshape(len(keys), 7)
        return table

    def samples_of(self, path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
        """One tar's samples in order: key, {kind: (offset, size)}. A damaged shard is said, and what is lost
        with it counted as the samples that it would hold."""
        key, members, samples, end, size, rest = None, {}, 0, 0, path.stat().st_size, b"unread"
        with suppress(OSError, tarfile.TarError, EOFError, ValueError, RecursionError):     # judged below
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.offset_data + member.size > size:
                        break
                    end = tar.offset
                    folder, base = os.path.split(member.name)
                    stem, _, suffix = base.partition(".")
                    if not member.isreg() or not stem:     # links, folders, macOS's shadow files
                        continue
                    kind = "image" if suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
                    # A kind seen again is another sample of the same name: never mix the two.
                    if members and (os.path.join(folder, stem) != key or kind in members):
                        yield key, members
                        members, samples = {}, samples + 1
                    key, members[kind] = os.path.join(folder, stem), (member.offset_data, member.size)
                file.seek(end)
                rest = file.read(2 ** 20)
        if members:
            yield key, members
        # Zeros end a whole tar. tarfile stops without a word at a header that it cannot read.
        if not end or len(rest) < 512 or rest.strip(b"\0"):
            self.skipped["damaged shard"] += max(1, round(samples * (size / max(1, end) - 1)))
            print(f"warning: {path} is empty, cut short, compressed or no tar: {size - end:,} of {size:,} "
                  "bytes are lost", file=sys.stderr)

    def key(self, index: int) -> str:
        return self.table["key"][self.rows[index]].decode(errors="replace")

    def shards(self) -> np.ndarray:
        return self.table["place"][self.rows, 0]

    def member(self, index: int, kind: str) -> bytes | None:
        shard, *places = self.table["place"][self.rows[index]].tolist()
        offset, size = places[2 * self.KINDS.index(kind):][:2]
        return None if size < 0 else os.pread(self.shard_file(shard).fileno(), size, offset)

    @lru_cache(maxsize=256)          # to open a file for each member is a tenth of reading small pictures
    def shard_file(self, shard: int) -> BinaryIO:
        return self.tars[shard].open("rb")


class FileSource(Source):
    """Images as files, each of a class, with texts, or with KEY.txt or KEY.json beside it."""

    def __init__(self, images: list[Path], name: str, classes: list[str] | None = None,
                 labels: list[int] | None = None, texts: list[list[str]] | None = None) -> None:
        super().__init__(name, len(images))
        self.images, self.classes, self.labels, self.texts = images, classes, labels, texts

    def key(self, index: int) -> str:
        return str(self.images[self.rows[index]])

    def member(self, index: int, kind: str) -> bytes | None:
        image = self.images[self.rows[index]]
        path = image if kind == "image" else image.with_suffix(f".{kind}")
        return path.read_bytes() if kind == "image" or path.is_file() else None


def evenly_spaced(source: Source, count: int | None) -> Source:
    """`count` samples from all over the source, or all of it: the first ones might be all of one class."""
    if count is None or count >= len(source):
        return source
    return source.subset(np.linspace(0, len(source) - 1, count).astype(np.int64))


def hold_out(source: Source, count: int) -> tuple[Source, Source]:
    """Split off `count` samples for validation (at most a twentieth), evenly spaced; `shapes` has its own."""
    if isinstance(source, Shapes):
        return source, evenly_spaced(Shapes("val", source.seed), count)
    if len(source) < 2:
        raise ValueError(f"{source.name} has {len(source)} sample, and one is held out: training needs more")
    held = np.linspace(0, len(source) - 1, max(1, min(count, len(source) // 20))).astype(np.int64)
    rest = np.setdiff1d(np.arange(len(source)), held)
    return source.subset(rest), source.subset(held)


def usable_captions(source: Source, limit: int) -> Iterator[list[str]]:
    """The captions of up to `limit` samples, evenly spaced over the source, bad ones passed over."""
    is_endless = isinstance(source, Shapes) and source.split == "train"      # a thousand hold every word
    for i in range(1000) if is_endless else range(0, len(source), -(-len(source) // limit)):
        with suppress(BadSample):             # counted when it is read for training
            yield source.captions(i)


# ---------------------------------------------------------------- what --data names
HALF = regex.compile(r"(train|val|valid|validation|dev|test)(ing)?\d*", regex.IGNORECASE)
SYNSET = regex.compile(r"n\d{8}")         # WordNet's number of a class, as ImageNet's folders are called


def open_source(name: str, split: str = "train") -> Source:
    """What `--data` names -> a source.

    name: "shapes"; "cc3m" (./cc3m or ./data/cc3m); a tar; Karpathy's table, NAME.json; a list of images,
    NAME.txt; or a folder of tars, of images with .txt or .json beside them, or of class folders
    (DIR/CLASS/IMAGE). Where a folder has halves, DIR/train and DIR/val, `split` takes its own.
    Raises FileNotFoundError or ValueError: what came, what was expected, what to do.
    """
    if name == "shapes":
        return Shapes(split)
    path = Path("data/cc3m" if name == "cc3m" and not Path(name).is_dir() else name).absolute()
    if not path.exists():
        raise FileNotFoundError(f"no data at {name}: expected shapes, a file, a folder, or cc3m or data/cc3m "
                                "as img2dataset downloads it (see the README)")
    if path.is_file() and path.suffix in (".json", ".txt"):
        return open_karpathy(path, split) if path.suffix == ".json" else open_list(path)
    files = [path] if path.is_file() else files_of_half(path, split)
    tars = [file for file in files if file.suffix.lower() == ".tar"]
    images = [file for file in files if file.suffix[1:].lower() in IMAGE_SUFFIXES]
    texts = {file.with_suffix("") for file in files if file.suffix in (".txt", ".json")}
    captioned = [image for image in images if image.with_suffix("") in texts]
    if tars and images or path.is_file() and not tars:
        what = "a file" if path.is_file() else "a folder of tars and images"
        raise ValueError(f"{path} is {what}: expected a tar, a list (.txt), a table (.json), or a folder of "
                         "one kind of data")
    if tars:
        source: Source = TarSource(tars, path.name)
    elif captioned:
        source = FileSource(captioned, path.name)
        source.skipped["no caption"] = len(images) - len(captioned)
    else:
        root = path / split if (path / split).is_dir() else path
        folders = {image.parent for image in images}
        if len(folders) < 2 or {folder.parent for folder in folders} != {root}:
            raise ValueError(f"{root} holds {len(images)} images, not all in folders of two or more classes: "
                             "expected DIR/CLASS/IMAGE, images with .txt beside them, or tars")
        source = FileSource(images, path.name, *class_names(root, [image.parent.name for image in images]))
    if not len(source):
        raise ValueError(f"{name}: no usable sample ({dict(source.skipped)}): expected KEY.jpg with KEY.txt")
    return source


def files_below(path: Path) -> list[Path]:
    """All files, sorted, links to folders followed; hidden ones and other systems' junk are left out."""
    files, visited = [], set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:          # a link back up
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders
                               if name[0] != "." and name not in ("@eaDir", "__MACOSX"))
        files += [Path(folder) / name for name in names if name[0] != "."]
    return sorted(filter(Path.is_file, files))


def files_of_half(path: Path, split: str) -> list[Path]:
    """The files of DIR/SPLIT, or of a DIR in which no folder is called as a half of the data. Raises
    ValueError where there are others: nothing may be trained on that is tested on."""
    if (path / split).is_dir():
        return files_below(path / split)
    files = files_below(path)
    folders = {folder for file in files for folder in file.relative_to(path).parts[:-1]}
    halves = sorted(filter(HALF.fullmatch, folders))
    if halves:
        raise ValueError(f"{path} has no folder {split}, but below it {', '.join(halves)}: name one to use")
    return files


def text_lines(path: Path) -> list[str]:
    """A text file's lines that are not blank."""
    return [line for line in path.read_text("utf-8-sig", errors="replace").split("\n") if line.strip()]


def class_names(root: Path, tags: list[str]) -> tuple[list[str], list[int]]:
    """Each image's class, as its folder or a list has it -> the names of all classes, each image's label.

    Classes are sorted by tag. Their names are the tags, or stand in `root` or above it in classnames.txt or
    Kaggle's LOC_synset_mapping.txt: lines "TAG NAME, …", of which the first name is taken. Raises ValueError.
    """
    present = sorted(set(tags))
    names, are_synsets = {tag: tag.replace("_", " ") for tag in present}, all(map(SYNSET.fullmatch, present))
    files = ("classnames.txt", "LOC_synset_mapping.txt")[:1 + are_synsets]
    tables = [folder / file for folder in (root, root.absolute().parent) for file in files]
    tables = list(filter(Path.is_file, tables))
    if tables:
        lines = [line.partition(",")[0].split(maxsplit=1) for line in text_lines(tables[0])]
        names = {tag: " ".join(words).replace("_", " ").strip() for tag, *words in lines}
        wrong = set(names) ^ set(present) | {tag for tag in names if not names[tag]}
        if wrong or len(names) < len(lines):
            raise ValueError(f"{tables[0]} does not name each class in {root} once (look at "
                             f"{min(wrong, default='doubles')}): expected lines 'TAG NAME'")
    elif are_synsets or len(set(names.values())) < len(names):
        raise ValueError(f"{root}: classes called {present[0]} and so on have no name that tells them apart: "
                         "put LOC_synset_mapping.txt, or a classnames.txt of lines 'TAG NAME', there")
    number = {tag: i for i, tag in enumerate(present)}
    return [names[tag] for tag in present], [number[tag] for tag in tags]


def refuse_missing(images: list[Path], table: Path) -> None:
    """Raises FileNotFoundError: a score over the images that happen to be there compares with nothing."""
    missing = [image for image in images if not image.is_file()]
    if missing or not images:
        first = f", the first is {missing[0]}" if missing else ""
        raise FileNotFoundError(f"{len(missing)} of the {len(images)} images in {table} are not there{first}"
                                ": complete the folder, or correct the list")


def open_list(table: Path) -> FileSource:
    """The images that a list names: lines "PATH<TAB>CLASS" or "PATH", then CLASS is the folder that holds
    the image; PATH is below the list's own folder. Raises FileNotFoundError or ValueError."""
    rows = [line.partition("\t") for line in text_lines(table)]
    images = [table.parent / path.strip().lstrip("/") for path, _, _ in rows]
    refuse_missing(images, table)
    tags = [tag.strip() or image.parent.name for image, (_, _, tag) in zip(images, rows)]
    # SUN397 has church/outdoor and cathedral/outdoor, which by their folders' names would be one class.
    folders = {(image.parent, tag) for image, tag, (_, tab, _) in zip(images, tags, rows) if not tab}
    if len({tag for _, tag in folders}) < len(folders):
        raise ValueError(f"{table} lists images of two folders of one name: expected lines 'PATH<TAB>CLASS'")
    return FileSource(images, table.stem, *class_names(table.parent, tags))


def open_karpathy(table: Path, split: str) -> FileSource:
    """COCO or Flickr with Karpathy's split (Karpathy and Fei-Fei 2015): each image's first five captions.

    table: dataset_NAME.json; the pictures lie in its folder as "filepath/filename", or without filepath.
    split: "train", his train and restval; "val", his *test*, the 5,000 images of COCO or 1,000 of Flickr, of
    five captions each, on which the field compares retrieval. Raises FileNotFoundError or ValueError.
    """
    wanted, least = (("train", "restval"), 1) if split == "train" else (("test",), 5)
    try:
        entries = [entry for entry in json.loads(table.read_bytes())["images"] if entry["split"] in wanted]
        images = [table.parent / (entry.get("filepath") or "") / entry["filename"] for entry in entries]
        texts = [[sentence["raw"].strip() for sentence in entry["sentences"] if clean(sentence["raw"])][:5]
                 for entry in entries]
        if min(map(len, texts), default=5) < least:
            raise ValueError(f"an image of {' and '.join(wanted)} has fewer than {least} captions")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{table} is damaged, or not Karpathy's table of images and their sentences "
                         f"({type(error).__name__}: {error}): fetch it again") from None
    refuse_missing(images, table)
    return FileSource(images, table.stem, texts=texts)


# ---------------------------------------------------------------- batches
class Batch(NamedTuple):
    images: Tensor                # uint8 [B, S, S, 3]; from cached latents moments, float16 [B, 2C, h, w]
    captions: list                # B captions; in evaluation B lists of captions
    labels: list                  # B class numbers, or None each
    keys: list[str]
    skipped: Counter              # bad samples met on the way, by cause
    visited: int                  # samples tried, good and bad
    tokens: Tensor | None = None  # [B, L] int64, in training
    drawn: dict | None = None     # what the `draw` of training_batches made for this step
    places: tuple = ()            # of the samples in their source, in evaluation


def make_batch(samples: list[Sample], captions: list, size: int, skipped: Counter, **more) -> Batch:
    arrays = [s.image if isinstance(s.image, np.ndarray) else to_square(s.image, size) for s in samples]
    images = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0, size, size, 3).byte()
    return Batch(images, captions, [s.label for s in samples], [s.key for s in samples], skipped,
                 len(samples) + skipped.total(), **more)


@dataclass
class SkipReport:
    """Counts bad samples by cause, and says when they are too many."""
    max_bad: float = 0.05         # share
    visited: int = 0
    skipped: Counter = field(default_factory=Counter)

    def add(self, skipped: dict, visited: int) -> None:
        self.visited += visited
        self.skipped.update(skipped)

    def check(self, final: bool = False) -> None:
        """Raises ValueError when more than max_bad were bad; judged from the 100th sample on, or at last."""
        if (final or self.visited >= 100) and sum(self.skipped.values()) > self.max_bad * self.visited:
            raise ValueError(f"too much of the data is unusable ({self}); mend it, or raise --max-bad")

    def counts(self) -> dict:
        return {"visited": self.visited, "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.skipped.items()) if count)
        return f"samples read: {self.visited}, skipped: {causes or 'none'}"


def check_index(source: Source, max_bad: float) -> None:
    """The same judgement on what indexing left out. Raises ValueError."""
    SkipReport(max_bad, len(source) + source.skipped.total(), source.skipped).check(final=True)


@dataclass
class TrainingBatches(Dataset):
    """Item k is this rank's share of global batch k: a function of (source, seed, k, batch size).

    No batch depends on those before it: to resume the step is enough, workers and ranks change nothing, and
    no rank runs dry, however few or uneven the shards are.
    """
    source: Source
    image_size: int               # px
    batch_size: int               # over all ranks
    seed: int
    rank: int = 0                 # whose rows are every `world`-th
    world: int = 1
    tokenizer: Tokenizer | None = None
    shuffle_buffer: int = 100_000                  # samples that are mixed with each other
    draw: Callable[[int], dict] | None = None      # number of the batch -> what else training needs for it
    augment: bool = False         # a random crop and RandAugment of each picture, not its centre square
    order: tuple = (-1, None)     # kept from the last call: an epoch's number and order

    def epoch_order(self, epoch: int) -> np.ndarray:
        """All samples once, in an order that is a function of (seed, epoch).

        Shards come in a fresh order; within each stretch of `shuffle_buffer` samples of their sequence the
        order is random. So files are read one after another, and a stretch fits in the machine's file cache;
        in random order all over 100 GB nearly every sample would be a seek.
        """
        rng, count = np.random.default_rng([self.seed, epoch]), len(self.source)
        shards = self.source.shards()
        if shards is None or self.shuffle_buffer >= count:
            return rng.permutation(count)
        order = np.argsort(rng.permutation(int(shards.max()) + 1)[shards], kind="stable")
        for first in range(0, count, self.shuffle_buffer):
            rng.shuffle(order[first:first + self.shuffle_buffer])
        return order

    def index_at(self, epoch: int, place: int) -> int:
        """The sample at a place in an epoch's order."""
        if isinstance(self.source, Shapes):      # random already; each seed has its own stretch
            return (place + self.seed * 10_000_000) % len(self.source)
        if self.order[0] != epoch:
            self.order = (epoch, self.epoch_order(epoch))
        return int(self.order[1][place])

    def read(self, position: int, skipped: Counter) -> tuple[Sample, str] | None:
        """The sample at a position of the endless stream, and one of its captions; a bad one is replaced by
        another of the epoch (None after 100 in a row)."""
        count = len(self.source)
        epoch, place = divmod(position, count)
        # From half an epoch away: the very next one is in this batch already, and would be its own negative.
        stride = count // 2 + (2 if count % 4 == 2 else 1)          # without a common factor with the length
        for attempt in range(100):
            index = self.index_at(epoch, (place + attempt * stride) % count)
            try:
                sample = self.source.read(index, self.image_size)
            except BadSample as bad:
                skipped[bad.cause] += 1
                continue
            if self.augment:
                # read() may have decoded it at twice the needed side. That is enough: a part of half the area
                # is at its narrowest sqrt(1/2 · 3/4) = 0.61 of the shorter side, still more than image_size.
                rng = np.random.default_rng([self.seed, epoch, index, 1])
                sample.image = rand_augment(random_crop(sample.image, self.image_size, rng), rng)
            choices = len(sample.captions)
            choice = np.random.default_rng([self.seed, epoch, index]).integers(choices) if choices > 1 else 0
            return sample, sample.captions[choice]
        return None

    def __getitem__(self, k: int) -> Batch | ValueError:
        skipped: Counter = Counter()
        rows = range(self.rank, self.batch_size, self.world)
        pairs = [self.read(k * self.batch_size + row, skipped) for row in rows]
        if None in pairs:       # handed over, not raised: a worker's exceptions arrive as pages of traceback
            return ValueError(f"100 unusable samples in a row ({dict(skipped)}): "
                              "is this an image-caption data set?")
        samples, captions = map(list, zip(*pairs))
        tokens, drawn = self.tokenizer and self.tokenizer(captions), self.draw and self.draw(k)
        return make_batch(samples, captions, self.image_size, skipped, tokens=tokens, drawn=drawn)


def as_it_is(batch: Batch | ValueError) -> Batch | ValueError:
    return batch               # what the loader does by default would add a Counter to itself


def leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach a whole process group; what to do about them is the training loop's to say."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def training_batches(source: Source, image_size: int, batch_size: int, seed: int, start: int = 0,
                     workers: int = 0, **options) -> Iterator[Batch]:
    """Endless training batches from number `start` on; options: of `TrainingBatches`.

    workers: processes that read, decode, crop and tokenise, 0 for none; close() the iterator to end them.
    Raises ValueError where nothing usable is left.
    """
    dataset = TrainingBatches(source, image_size, batch_size, seed, **options)
    for batch in DataLoader(dataset, batch_size=None, sampler=range(start, 2 ** 40), num_workers=workers,
                            collate_fn=as_it_is, prefetch_factor=4 if workers else None,
                            worker_init_fn=leave_signals):
        if isinstance(batch, ValueError):
            raise batch
        yield batch


@dataclass
class EvaluationBatches(Dataset):
    """Item k holds the samples number k · batch_size and following, with all their captions; bad ones are
    left out and counted."""
    source: Source
    image_size: int
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, k: int) -> Batch:
        samples, skipped, first = {}, Counter(), k * self.batch_size
        for i in range(first, min(first + self.batch_size, len(self.source))):
            try:
                samples[i] = self.source.read(i)
            except BadSample as bad:
                skipped[bad.cause] += 1
        captions = [sample.captions for sample in samples.values()]
        return make_batch(list(samples.values()), captions, self.image_size, skipped, places=tuple(samples))


def evaluation_batches(source: Source, image_size: int, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """The source's usable samples once, in order."""
    return iter(DataLoader(EvaluationBatches(source, image_size, batch_size), batch_size=None,
                           num_workers=workers, collate_fn=as_it_is))


# ---------------------------------------------------------------- shapes
# Dark, not the mid-grey that is 0 in [-1, 1]: zeros mean "outside the picture" to a convolution, and "no
# picture" to the alignment task. On grey, small networks took far longer to learn where things are.
SIDE, BACKGROUND = 32, 32.0                 # px; red = green = blue of 255
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (240, 220, 50),
           "purple": (160, 60, 200), "white": (250, 250, 250)}
SHAPES = ("circle", "square", "triangle", "cross")
RADII = {"": 7.0, "small": 5.0}             # px; the large size goes without saying
RELATIONS = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}
OPPOSITE = {"above": "below", "below": "above", "to the left of": "to the right of",
            "to the right of": "to the left of"}
PIXELS = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5      # y, x of pixel centres
KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """One thing, or two of different colours and their relation ("first RELATION second")."""
    things: tuple[Thing, ...]
    relation: str | None
    centres: tuple[tuple[float, float], ...]      # x, y in px

    def caption(self) -> str:
        return f" {self.relation} ".join(f"a {' '.join(filter(None, thing))}" for thing in self.things)


@lru_cache(maxsize=None)
def is_held_out(pair: tuple) -> bool:
    """A fifth of the pairs of kinds, whatever their sizes and relation, is never shown in training.

    The README's own prompt is among them, so that it shows a combination the model never saw.
    """
    name = " ".join(sorted(" ".join(kind) for kind in pair))
    return name == "blue square red circle" or hashlib.sha256(name.encode()).digest()[0] < 51


PAIRS = [(a, b) for i, a in enumerate(KINDS) for b in KINDS[i + 1:] if a[0] != b[0]]
TRAIN_PAIRS = [pair for pair in PAIRS if not is_held_out(pair)]
HELD_OUT_PAIRS = [pair for pair in PAIRS if is_held_out(pair)]


def coverage(shape: str, centre_x, centre_y, radius) -> np.ndarray:
    """How much of each pixel the shape covers, in [0, 1], from its signed distance: [..., SIDE, SIDE].

    The centre is that of the bounding box; arguments broadcast against pixels.
    """
    y, x = PIXELS[0] - centre_y, np.abs(PIXELS[1] - centre_x)
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - radius
    elif shape == "square":
        distance = np.maximum(x, np.abs(y)) - 0.886 * radius
    elif shape == "triangle":
        inner, y = 0.68 * radius, y - 0.34 * radius          # equilateral, point up; inner is its inradius
        distance = np.maximum(y, 0.866 * x - 0.5 * y) - inner
    else:
        arm, half, y = 1.05 * radius, 0.35 * radius, np.abs(y)
        distance = np.minimum(np.maximum(x - arm, y - half), np.maximum(y - arm, x - half))
    return np.clip(0.5 - distance, 0, 1)


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
    dx, dy = RELATIONS[relation]
    return Scene(things, relation, tuple((float(16 + dx * a + abs(dy) * c), float(16 + dy * a + abs(dx) * c))
                                         for a, c in zip(along, across)))


def same_words(pair: tuple, sizes: tuple, relation: str, rng: np.random.Generator) -> tuple:
    """Another meaning of the same words: the things change places, or exchange shapes, sizes or both."""
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
    pairs whose captions have the same words and another meaning: they share a batch, so that telling captions
    apart means reading all of them, not just spotting a colour.
    "val": each meaning of the held-out pairs exactly once ("A above B" and "B below A" are one meaning);
    "classes": single things, labelled with one of 24 classes such as "red circle".
    """

    def __init__(self, split: str = "train", seed: int = 0) -> None:
        counts = {"train": 10 ** 9, "val": len(HELD_OUT_PAIRS) * 16, "classes": 2400}
        super().__init__("shapes", counts[split])
        self.split, self.seed = split, seed
        if split == "classes":
            self.classes = [" ".join(kind) for kind in KINDS]
            self.labels = [i % len(KINDS) for i in self.rows]
        if split == "val":
            meanings = [(pair, (a, b), relation) for pair in HELD_OUT_PAIRS for a in RADII for b in RADII
                        for relation in RELATIONS]
            order = np.random.default_rng(0).permutation(len(meanings))     # one order, whatever the seed
            self.meanings = [meanings[i] for i in order]

    def scene(self, index: int) -> Scene:
        row, sizes = int(self.rows[index]), list(RADII)
        key = [self.seed, ("train", "val", "classes").index(self.split)]
        rng = np.random.default_rng([*key, 1, row])
        if self.split == "val":
            return pair_scene(*self.meanings[row], rng)
        group = np.random.default_rng([*key, 0, row // 2])                # what the pair's scenes share
        if self.split == "classes" or group.random() < 0.1:
            kind = KINDS[row % len(KINDS) if self.split == "classes" else rng.integers(len(KINDS))]
            return Scene((Thing(sizes[rng.integers(2)], *kind),), None, (tuple(rng.uniform(14, 18, 2)),))
        meaning = (TRAIN_PAIRS[group.integers(len(TRAIN_PAIRS))],
                   (sizes[group.integers(2)], sizes[group.integers(2)]), list(RELATIONS)[group.integers(4)])
        return pair_scene(*(same_words(*meaning, rng) if row % 2 else meaning), rng)

    def key(self, index: int) -> str:
        return f"shapes-{self.split}-{self.rows[index]}" + f"-seed{self.seed}" * (self.seed > 0)

    def captions(self, index: int) -> list[str]:
        return [self.scene(index).caption()]

    def image(self, index: int, side: int | None) -> Image.Image:
        return Image.fromarray(render(self.scene(index)))


# ---------------------------------------------------------------- its checker
CAPTION = regex.compile(
    r"a (?:(?P<size>small) )?(?P<colour>{0}) (?P<shape>{1})(?: (?P<relation>{2}) (?P<rest>a .*))?"
    .format("|".join(COLOURS), "|".join(SHAPES), "|".join(RELATIONS)))
MIN_MASS = 12.0          # px of a colour that count as a thing: about half of the smallest thing's inside
MIN_OVERLAP = 0.75       # intersection over union: a clean thing has 0.95, a blurred blob 0.6
FAR, MAX_STRAYS = 64, 32     # of 255, px: edges of clean things give up to 17, a speck of 6 px across 36


def parse(caption: str) -> tuple[tuple[Thing, ...], str | None]:
    """A caption of the grammar -> its things and relation. Raises ValueError on anything else."""
    match = CAPTION.fullmatch(clean(caption))
    if match is None:
        raise ValueError(f"{caption!r} is not in the grammar of shapes, "
                         "e.g. 'a red circle above a small blue square'")
    thing = Thing(match["size"] or "", match["colour"], match["shape"])
    return ((thing,) if match["rest"] is None else (thing, *parse(match["rest"])[0])), match["relation"]


def colour_masks(image: np.ndarray) -> dict[str, np.ndarray]:
    """Per colour, how much of each pixel it covers: [32, 32] in [0, 1], of the pixels that are nearest to it.

    A pixel at a thing's edge mixes its colour with the ground behind: it lies on the line between the two.
    """
    offset = image.astype(np.float32) - BACKGROUND
    lines = np.array(list(COLOURS.values()), np.float32) - BACKGROUND                   # [6, 3]
    alphas = np.clip(offset @ lines.T / (lines ** 2).sum(1), 0, 1)                      # [32, 32, 6]
    nearest = ((offset[:, :, None] - alphas[..., None] * lines) ** 2).sum(-1).argmin(-1)
    return {colour: np.where((nearest == i) & (alphas[..., i] > 0.35), alphas[..., i], 0)
            for i, colour in enumerate(COLOURS)}


def centroid(mask: np.ndarray) -> np.ndarray:
    """x, y in px."""
    return np.array([(mask * PIXELS[1]).sum(), (mask * PIXELS[0]).sum()]) / mask.sum()


class Fit(NamedTuple):
    shape: str
    radius: float                 # px
    overlap: float                # intersection over union with the mask
    alpha: np.ndarray             # the template itself, [32, 32]


def best_fit(mask: np.ndarray) -> Fit:
    """Analysis by synthesis: the template that fits a mask best."""
    (x, y), shifts, fits = centroid(mask), np.array([-0.5, 0.0, 0.5], np.float32), []
    for shape in SHAPES:
        unit = coverage(shape, 16.0, 16.0, 6.0)
        lift = centroid(unit)[1] - 16.0                   # a triangle's centroid is below its box's centre
        radius = 6.0 * (mask.sum() / unit.sum()) ** 0.5   # equal area
        radii = radius * np.array([0.94, 1.0, 1.06], np.float32)[:, None, None, None, None]
        alphas = coverage(shape, x + shifts[:, None, None, None],
                          y - lift * radius / 6 + shifts[:, None, None], radii)
        solid = np.where(alphas > 0.35, alphas, 0)
        overlap = np.minimum(solid, mask).sum((-1, -2)) / np.maximum(solid, mask).sum((-1, -2))
        at = np.unravel_index(overlap.argmax(), overlap.shape)
        fits.append(Fit(shape, radii[at[0]].item(), float(overlap.max()), alphas[at]))
    return max(fits, key=lambda fit: fit.overlap)


def check(image: np.ndarray, caption: str) -> dict[str, bool]:
    """Whether a picture shows what a caption of `shapes` says, decided from the pixels alone.

    image: uint8 [32, 32, 3] -> {"colour", "shape", "size", "relation", "all"}: the mentioned colours are
    there, and nothing else stands out; each thing of its colour has the right shape, cleanly; the right size;
    and they stand as the caption says. Raises ValueError on other pictures and captions.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f"a picture of {image.dtype} {image.shape}, expected uint8 {(SIDE, SIDE, 3)}")
    things, relation = parse(caption)
    masks, mentioned = colour_masks(image), {thing.colour for thing in things}
    # Only pixels mostly of a colour count here: faint noise all over the ground must not add up to a thing.
    present = {colour for colour, mask in masks.items() if mask[mask > 0.5].sum() >= MIN_MASS}
    fits = {colour: best_fit(masks[colour]) for colour in mentioned & present}
    explained = np.full(image.shape, BACKGROUND, np.float32)
    for colour, fit in fits.items():
        explained = paint(explained, fit.alpha, colour)
    strays = (np.abs(image - explained).max(-1) > FAR).sum()
    complete, middle = mentioned <= present, (RADII[""] * RADII["small"]) ** 0.5
    verdict = {"colour": present == mentioned and strays <= MAX_STRAYS, "shape": complete, "size": complete,
               "relation": complete}
    for thing, fit in [(thing, fits[thing.colour]) for thing in things if thing.colour in fits]:
        verdict["shape"] &= fit.shape == thing.shape and fit.overlap >= MIN_OVERLAP
        verdict["size"] &= ("small" if fit.radius < middle else "") == thing.size
    if relation is not None and complete:
        offset = np.subtract(*(centroid(masks[thing.colour]) for thing in things))      # first from second
        along, across = offset @ RELATIONS[relation], abs(offset @ RELATIONS[relation][::-1])
        verdict["relation"] = along > max(across, 4.0)
    verdict = {name: bool(value) for name, value in verdict.items()}
    return {**verdict, "all": all(verdict.values())}
