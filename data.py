"""Captions to tokens, files to images, and a world of coloured shapes that needs no files at all.

What it is, top to bottom: CLIP's tokenizer, which can also learn a vocabulary; reading images that may be
broken; random crops and RandAugment, for training CLIP; the sources that `--data` names; batches that are a
pure function of the step; the built-in data `shapes` with its checker, which judges a picture against its
caption from the pixels alone; and a command that encodes a data set's images once:
    python data.py cache --data cc3m --init sd-v1-5 --out cc3m-latents
What it is not: noise, or a network. It imports no other file of the project but for that command.

Bad samples are never fatal and never silent: they are counted by cause, and too many of them stop the run.
Read next: fusion.py and model.py.
"""
import contextlib
import gzip
import hashlib
import heapq
import html
import io
import json
import math
import os
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import ftfy
import numpy as np
import regex
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CACHE = Path(torch.hub.get_dir()) / "diffdis"     # downloads, and indices of large data sets
SLOW_INDEX = 5            # seconds of indexing that are worth a file
CACHE_NOTES = "latents.json"


# ---------------------------------------------------------------- tokenizer
@lru_cache(maxsize=2 ** 16)
def clean(caption: str) -> str:
    """CLIP's cleaning: mojibake and HTML entities undone, white space collapsed, lower case."""
    # Most captions have nothing to undo, and finding that out was a third of all loading time.
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return " ".join(caption.split()).lower()
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return regex.sub(r"\s+", " ", text).strip().lower()


def words(caption: str) -> list[str]:
    """The caption's words (runs of letters or digits), lower case: what a user would call a word."""
    return regex.findall(r"[\p{L}\p{N}]+", clean(caption))


# What BPE works within. CLIP's own pattern also matches its control tokens;
# a caption must not be able to say them.
PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> dict[int, str]:
    """Each byte as one printable character, in CLIP's order: printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(printable + others,
                    [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]))


class Tokenizer:
    """CLIP's byte-level byte-pair encoding (Radford et al. 2021).

    merges: "left right" in the order they were learnt;
    context_length: L, tokens per caption with start and end.
    """

    def __init__(self, merges: list[str], context_length: int = 77) -> None:
        self.merges, self.context_length = merges, context_length
        self.symbols = byte_symbols()
        self.rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        base = list(self.symbols.values())
        names = base + [s + WORD_END for s in base] + ["".join(pair) for pair in self.rank] + [START, END]
        self.id = {name: i for i, name in enumerate(names)}
        self.names, self.vocab_size = names, len(names)
        self.start, self.end = self.vocab_size - 2, self.vocab_size - 1
        self.cache: dict[str, list[int]] = {}
        self.has_warned = False

    @classmethod
    def from_file(cls, path: str | Path, context_length: int = 77) -> "Tokenizer":
        """Read CLIP's bpe_simple_vocab_16e6.txt.gz, or a folder with vocab.json and merges.txt.

        Raises FileNotFoundError, or ValueError if the two files of a folder do not describe CLIP's table.
        """
        path = Path(path)
        if path.is_dir():
            missing = [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]
            if missing:
                raise FileNotFoundError(f"{path} has no {' and no '.join(missing)}: "
                                        "expected a tokenizer's folder")
            lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
            tokenizer = cls([line for line in lines if line and not line.startswith("#version")],
                            context_length)
            try:
                table = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path / 'vocab.json'} is not JSON ({error}): fetch it again") from None
            if tokenizer.id != table:
                raise ValueError(f"{path}: vocab.json is not the table that merges.txt gives by CLIP's rule")
            return tokenizer
        if not path.is_file():
            raise FileNotFoundError(f"no vocabulary at {path}: "
                                    "expected bpe_simple_vocab_16e6.txt.gz or a folder")
        try:
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not CLIP's gzipped vocabulary: {error}") from None
        # The file holds more; CLIP uses these.
        merges = [line for line in lines[1:49152 - 256 - 2 + 1] if line]
        if not merges or any(line.count(" ") != 1 for line in merges):
            raise ValueError(f"{path} is gzipped, but not CLIP's vocabulary: expected lines of two symbols")
        return cls(merges, context_length)

    @classmethod
    def learn(cls, captions: Iterable[str], vocab_size: int, context_length: int = 77) -> "Tokenizer":
        """Learn merges from captions: the most frequent pair first, ties in alphabetical order.

        vocab_size: at most this many tokens, at least 514; fewer if nothing is left to merge.
        """
        if vocab_size < 514:
            raise ValueError(f"vocab_size is {vocab_size}, expected at least 514 (bytes and control tokens)")
        table = byte_symbols()
        pieces = Counter(piece for caption in captions for piece in PIECES.findall(clean(caption)))
        spelt = [[table[byte] for byte in piece.encode("utf-8")] for piece in pieces]
        spelt = [[*symbols[:-1], symbols[-1] + WORD_END] for symbols in spelt]
        return cls(learn_merges(spelt, list(pieces.values()), vocab_size - 514), context_length)

    def to_dict(self) -> dict:
        return {"merges": self.merges, "context_length": self.context_length}

    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal tokens."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, values: dict) -> "Tokenizer":
        return cls(values["merges"], values["context_length"])

    def spell(self, piece: str) -> list[int]:
        """One piece -> ids: start from bytes, apply the earliest learnt merge that fits until none does."""
        if piece in self.cache:
            return self.cache[piece]
        parts = [self.symbols[byte] for byte in piece.encode("utf-8")]
        parts[-1] += WORD_END
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if pair not in self.rank:
                break
            parts = merge_pair(parts, pair)
        ids = [self.id[part] for part in parts]
        if len(self.cache) < 2 ** 16:     # bounded: web captions hold endless odd strings
            self.cache[piece] = ids
        return ids

    def encode(self, caption: str) -> list[int]:
        """A caption -> ids, without start and end."""
        return [i for piece in PIECES.findall(clean(caption)) for i in self.spell(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, control tokens left out."""
        byte_of = {symbol: byte for byte, symbol in self.symbols.items()}
        text = "".join(self.names[int(i)] for i in ids if int(i) < self.start).replace(WORD_END, " ")
        return bytes(byte for s in text for byte in ([byte_of[s]] if s in byte_of else b" ")).decode(
            "utf-8", errors="replace").strip()

    def __call__(self, captions: list[str]) -> Tensor:
        """captions -> tokens [B, L] int64: start, ids, end, then padded with end.

        Padding with the end token is Stable Diffusion's way. The first end is where the text query is read,
        and attention is causal, so the padding serves both tasks.
        Longer captions are cut, the end token kept.
        """
        if isinstance(captions, str):
            raise ValueError("expected a list of captions, came one string: write tokenizer([caption])")
        tokens = torch.full((len(captions), self.context_length), self.end)
        for row, caption in zip(tokens, captions):
            ids = self.encode(caption)
            room = self.context_length - 2
            if len(ids) > room and not self.has_warned:     # once: web captions would fill the screen
                self.has_warned = True
                warnings.warn(f"a caption of {len(ids)} tokens is cut to the {room} that fit, "
                              f"and so will others be: {caption[:40]!r}…", stacklevel=2)
            ids = ids[:room]
            row[:len(ids) + 1] = torch.tensor([self.start, *ids])
        return tokens


def merge_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of the pair, from the left."""
    merged, i = [], 0
    while i < len(parts):
        joined = i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair
        merged.append(parts[i] + parts[i + 1] if joined else parts[i])
        i += 2 if joined else 1
    return merged


def learn_merges(spelt: list[list[str]], counts: list[int], limit: int) -> list[str]:
    """The BPE algorithm on spelt words and their counts -> up to `limit` merges.

    Only words that hold the merged pair are visited, and a heap with stale entries finds the next pair,
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
# No others: Pillow would start Ghostscript for an EPS named .jpg.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MIN_SIDE, MAX_PIXELS = 8, 64_000_000      # px; beyond these a picture is noise, or a decompression bomb


class BadSample(Exception):
    """A sample that cannot be used, and why; `cause` is one of a few short strings, to be counted."""

    def __init__(self, cause: str, key: str = "") -> None:
        super().__init__(f"{key}: {cause}")
        self.cause, self.key = cause, key


def decode_image(raw: bytes, key: str = "", side: int | None = None) -> Image.Image:
    """Bytes of a JPEG, PNG, WebP or GIF (first frame), of any mode -> upright RGB picture.

    side: px that are needed; a JPEG more than twice as large is decoded at a half, a quarter or an eighth of
    its size, which the decoder does in less time than it saves. None: at full size. Raises BadSample.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's word on large pictures and odd metadata: judged below.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("decompression bomb", key)
            if min(image.size) < MIN_SIDE:
                raise BadSample("image too small", key)
            if side is not None:
                image.draft(None, (2 * side, 2 * side))      # never below twice what is needed
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):      # 16 bits of grey: convert() would clip them all to white
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if image.mode == "RGB":
                return image             # as most are: convert() would copy it
            return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except Image.DecompressionBombError:
        raise BadSample("decompression bomb", key) from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error,
            zlib.error) as error:
        raise BadSample("truncated image" if "truncated" in str(error) else "unreadable image", key) from None


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


# ---------------------------------------------------------------- augmentation (CLIP's training images)
# Share of the picture's area. Our choice: the paper only says "random crop", and a caption tells of the whole
# picture, more than a class name does. OpenCLIP takes (0.9, 1.0), ImageNet's classifiers (0.08, 1.0).
CROP_AREA = (0.5, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)              # width to height


def crop_box(width: int, height: int, rng: np.random.Generator,
             area: tuple[float, float] = CROP_AREA) -> tuple[int, int, int, int]:
    """A random part of a picture -> left, top, right, bottom, px (torchvision's RandomResizedCrop).

    area: range of the part's share of the picture, uniform; its aspect is log-uniform in CROP_ASPECT. After
    ten parts that do not fit, the largest one of a permitted aspect, from the centre.
    """
    least, greatest = CROP_ASPECT
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(least), math.log(greatest)))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * greatest)), min(height, round(width / least))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_crop(image: Image.Image, size: int, rng: np.random.Generator,
                area: tuple[float, float] = CROP_AREA) -> Image.Image:
    """A random part of an RGB picture (see crop_box), resized to size x size px (bicubic, antialiased)."""
    part = image.crop(crop_box(*image.size, rng, area))
    return part.resize((size, size), Image.Resampling.BICUBIC)


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Each pixel (x, y) from (ax + by + c, dx + ey + f), the nearest one; black from outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


# What RandAugment chooses from: RGB picture, value in the unit that STRENGTHS gives -> RGB picture.
# Pillow's enhancers blend with the picture less its brightness, colour, ...; 1 is the picture itself.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Identity": lambda image, value: image,
    "ShearX": lambda image, value: affine(image, 1, value, 0, 0, 1, 0),       # the top left corner stays
    "ShearY": lambda image, value: affine(image, 1, 0, 0, value, 1, 0),
    "TranslateX": lambda image, value: affine(image, 1, 0, -int(value), 0, 1, 0),
    "TranslateY": lambda image, value: affine(image, 1, 0, 0, 0, 1, -int(value)),
    "Rotate": lambda image, value: image.rotate(value, Image.Resampling.NEAREST),
    "Brightness": lambda image, value: ImageEnhance.Brightness(image).enhance(1 + value),
    "Color": lambda image, value: ImageEnhance.Color(image).enhance(1 + value),
    "Contrast": lambda image, value: ImageEnhance.Contrast(image).enhance(1 + value),
    "Sharpness": lambda image, value: ImageEnhance.Sharpness(image).enhance(1 + value),
    "Posterize": lambda image, value: ImageOps.posterize(image, int(value)),
    "Solarize": lambda image, value: ImageOps.solarize(image, value),
    "AutoContrast": lambda image, value: ImageOps.autocontrast(image),
    "Equalize": lambda image, value: ImageOps.equalize(image)}
# Value at the least and at the greatest magnitude, and whether a coin turns its sign; the rest take none.
STRENGTHS = {
    "ShearX": (0.0, 0.3, True), "ShearY": (0.0, 0.3, True),                   # px per px
    "TranslateX": (0.0, 150 / 331, True), "TranslateY": (0.0, 150 / 331, True),      # of the side
    "Rotate": (0.0, 30.0, True),                                              # degrees, counterclockwise
    "Brightness": (0.0, 0.9, True), "Color": (0.0, 0.9, True),
    "Contrast": (0.0, 0.9, True), "Sharpness": (0.0, 0.9, True),
    "Posterize": (8, 4, False),                                               # bits that are kept
    "Solarize": (255.0, 0.0, False)}                                          # inverted from here on


def strength(name: str, size: tuple[int, int], magnitude: int, bins: int) -> tuple[float, bool]:
    """An operation's value at a magnitude of 0 .. bins - 1, for a picture of (width, height) px;
    whether it has a sign. Raises ValueError for other magnitudes."""
    if not 0 <= magnitude < bins:
        raise ValueError(f"magnitude is {magnitude}, expected 0 to {bins - 1} ({bins} bins)")
    least, greatest, is_signed = STRENGTHS.get(name, (0.0, 0.0, False))
    if name == "Posterize":
        return least - round(magnitude / ((bins - 1) / (least - greatest))), is_signed
    side = {"TranslateX": size[0], "TranslateY": size[1]}.get(name, 1)
    # In float32, as torchvision has it: pixels and shifts are cut to integers, so the last digit can count.
    return torch.linspace(least, greatest * side, bins)[magnitude].item(), is_signed


def rand_augment(image: Image.Image, rng: np.random.Generator, operations: int = 2, magnitude: int = 9,
                 bins: int = 31) -> Image.Image:
    """RandAugment (Cubuk et al. 2020) on an RGB picture, with torchvision's operations and values.

    operations: how many, one after another, each drawn from all; magnitude: 0 .. bins - 1, of all of them.
    """
    for _ in range(operations):
        name = list(OPERATIONS)[rng.integers(len(OPERATIONS))]
        value, is_signed = strength(name, image.size, magnitude, bins)
        if is_signed and rng.integers(2):
            value = -value
        image = OPERATIONS[name](image, value)
    return image


# ---------------------------------------------------------------- sources
@dataclass
class Sample:
    image: Image.Image | None     # RGB; None in a latent cache
    captions: list[str]
    key: str
    label: int | None = None
    moments: np.ndarray | None = None    # of a latent cache: mean and log-variance, float16 [2C, h, w]
    tokens: np.ndarray | None = None     # and every caption's tokens, uint16 [captions, L]


class Source:
    """Image-caption samples by index. `skipped` counts what indexing had to leave out, by cause."""
    name: str
    classes: list[str] | None = None
    skipped: Counter
    cache: dict | None = None            # what a latent cache says of itself; None: samples are images
    separate_captions = False            # whether evaluation takes every caption as a text of its own

    def __len__(self) -> int:
        raise NotImplementedError

    def captions(self, index: int) -> list[str]:
        """All captions of a sample, its image left undecoded. Raises BadSample."""
        raise NotImplementedError

    def read(self, index: int, side: int | None = None) -> Sample:
        """A sample; side: px of it that are needed, None: all. Raises BadSample."""
        raise NotImplementedError

    def shards(self) -> np.ndarray | None:
        """Which file each sample lies in, int32 [len(self)]; None where that makes no difference."""
        return None

    def paths(self) -> list[Path]:
        """The files that samples lie in."""
        return []

    def usable_captions(self, limit: int) -> Iterator[list[str]]:
        """The captions of up to `limit` samples, evenly spaced over the source, bad ones passed over."""
        for i in range(0, len(self), -(-len(self) // limit)):
            try:
                yield self.captions(i)
            except BadSample:
                continue              # counted when it is read for training


class TarSource(Source):
    """img2dataset's tars (CC3M's layout): KEY.jpg, KEY.txt and/or KEY.json, members of a sample side by side.

    The tars' headers are read once, and kept in CACHE where that took long; after that a sample is a few
    reads at known places. So samples come in any order at no cost, and nothing but a number need be
    remembered to go on where one was. A latent cache is the same with KEY.latent.npy instead of an image.
    """
    KINDS = ("image", "txt", "json", "latent.npy", "tokens.npy")

    def __init__(self, tars: list[Path], name: str, cache: dict | None = None) -> None:
        self.name, self.tars, self.cache, self.skipped = name, tars, cache, Counter()
        self.classes = None if cache is None else cache["classes"]
        self.separate_captions = bool(cache and cache.get("separate_captions"))
        self.lost = 0                 # bytes of shards that could not be read
        self.warnings: list[str] = []
        self.files: dict[tuple[int, int], int] = {}
        stamp = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in tars]
        stamp = json.dumps([self.KINDS, cache is None, stamp])
        kept = CACHE / f"index-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"
        started = time.monotonic()
        if not self.load_index(kept):
            self.table = self.build_index()
            if time.monotonic() - started > SLOW_INDEX:
                self.keep_index(kept)
        for warning in self.warnings:
            print(f"warning: {warning}", file=sys.stderr)

    def build_index(self) -> np.ndarray:
        """Where everything is, a row per sample: key, shard, offset and size of each kind (-1: absent)."""
        keys: list[bytes] = []
        rows = array("q")             # flat, 8 bytes a number: lists of them would take GBs for CC3M
        wanted = "image" if self.cache is None else "latent.npy"
        for shard, path in enumerate(tqdm(self.tars, "index", unit="shard", delay=2, disable=None)):
            for key, members in self.index(path):
                cause = ("no image" if wanted not in members else
                         None if "txt" in members or "json" in members else "no caption")
                if cause:
                    self.skipped[cause] += 1
                    continue
                keys.append(key.encode(errors="replace")[:200])
                rows.extend([shard, *(number for kind in self.KINDS
                                      for number in members.get(kind, (0, -1)))])
        if self.lost and keys:      # a lost shard weighs what the samples in it would
            readable = sum(path.stat().st_size for path in self.tars) - self.lost
            self.skipped["lost with its shard (estimated)"] = round(self.lost * len(keys) / readable)
        table = np.empty(len(keys), [("key", f"S{max(map(len, keys), default=1)}"), ("shard", np.int32),
                                     ("place", np.int64, (len(self.KINDS), 2))])
        numbers = np.array(rows).reshape(len(keys), 1 + 2 * len(self.KINDS))
        table["key"], table["shard"] = keys, numbers[:, 0]
        table["place"] = numbers[:, 1:].reshape(-1, len(self.KINDS), 2)
        return table

    def load_index(self, kept: Path) -> bool:
        """Take the index of an earlier run, mapped: all processes of a machine share its memory."""
        try:
            self.table = np.load(kept / "table.npy", mmap_mode="r")
            if self.table.dtype.names != ("key", "shard", "place"):
                return False
            notes = json.loads((kept / "notes.json").read_text())
            self.skipped, self.warnings = Counter(notes["skipped"]), list(notes["warnings"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def keep_index(self, kept: Path) -> None:
        """Write the index for the next run. It is whole or not there; a full disk costs only its use."""
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=kept.parent))
            np.save(folder / "table.npy", self.table)
            notes = {"skipped": self.skipped, "warnings": self.warnings}
            (folder / "notes.json").write_text(json.dumps(notes))
            with contextlib.suppress(OSError):       # another process was quicker
                os.rename(folder, kept)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            self.warnings.append(f"the index is not kept for the next run ({error})")

    def index(self, path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
        """One tar's samples in order: key, {kind: (offset, size)}.

        What is wrong with a shard is counted and said.
        """
        key, members, read_to, total, cause = None, {}, 0, path.stat().st_size, None
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, base = os.path.split(member.name)
                    stem, _, suffix = base.partition(".")
                    if member.offset_data + member.size > total:
                        raise tarfile.ReadError("data cut short")
                    read_to = tar.offset
                    if not member.isreg() or base.startswith("._"):     # links, folders, macOS's shadow files
                        continue
                    kind = "image" if suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
                    name = os.path.join(folder, stem)
                    # An extension seen again is another sample of the same name: never mix the two.
                    if members and (name != key or kind in members):
                        yield key, members
                        members = {}
                    key, members[kind] = name, (member.offset_data, member.size)
            with path.open("rb") as file:        # tarfile also stops, silently, at a header it cannot read
                file.seek(read_to)
                end = file.read(2 ** 20)
            cause = ("empty shard" if not read_to else "shard cut short" if len(end) < 512 else
                     "damaged shard, or several in one file" if end.strip(b"\0") else None)
        except OSError as error:
            cause = f"unreadable shard ({error.strerror or error})"
        except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
            head = path.open("rb").read(2)
            cause = ("empty shard" if not head else "compressed shard: gunzip it" if head == b"\x1f\x8b" else
                     "shard cut short" if read_to else f"unreadable shard ({error})")
        if cause:
            self.skipped[cause] += 1
            self.lost += total - read_to
            self.warnings.append(f"{path}: {cause}")
        if members:
            yield key, members

    def __len__(self) -> int:
        return len(self.table)

    def key(self, index: int) -> str:
        return self.table[index]["key"].decode(errors="replace")

    def paths(self) -> list[Path]:
        return self.tars

    def shards(self) -> np.ndarray:
        return self.table["shard"]

    def member(self, index: int, kind: str) -> bytes | None:
        shard, (offset, size) = int(self.table[index]["shard"]), self.table[index]["place"][
            self.KINDS.index(kind)].tolist()
        if size < 0:
            return None
        place = (os.getpid(), shard)             # a forked worker must not share its parent's file
        if place not in self.files:
            if len(self.files) >= 256:           # stay far below the usual limit on open files
                os.close(self.files.pop(next(iter(self.files))))
            self.files[place] = os.open(self.tars[shard], os.O_RDONLY)
        return os.pread(self.files[place], size, offset)

    def fields(self, index: int) -> dict:
        meta = self.member(index, "json")
        try:
            fields = json.loads(meta) if meta else {}
        except (ValueError, RecursionError):
            return {}        # not JSON, not Unicode, or absurdly nested: the .txt may still do
        return fields if isinstance(fields, dict) else {}

    def captions(self, index: int, fields: dict | None = None) -> list[str]:
        text, fields = self.member(index, "txt"), self.fields(index) if fields is None else fields
        first = [] if text is None else [text.decode("utf-8-sig", errors="replace")]
        listed = fields.get("captions") or [fields.get("caption")]
        listed = [c for c in listed if isinstance(c, str)] if isinstance(listed, list) else []
        # .txt wins: the list is used only where it agrees with it.
        found = listed if listed and (not first or first[0].strip() in [c.strip() for c in listed]) else first
        found = [caption.strip() for caption in found if clean(caption)]
        if not found:
            raise BadSample("empty caption" if first or listed else "no caption", self.key(index))
        return found

    def array(self, index: int, kind: str) -> np.ndarray:
        raw = self.member(index, kind)
        try:
            return np.lib.format.read_array(io.BytesIO(raw or b""), allow_pickle=False)
        except (ValueError, EOFError):
            raise BadSample(f"unreadable {kind}", self.key(index)) from None

    def read(self, index: int, side: int | None = None) -> Sample:
        fields, key = self.fields(index), self.key(index)
        captions = self.captions(index, fields)
        if self.cache is None:
            return Sample(decode_image(self.member(index, "image"), key, side), captions, key)
        moments, tokens = self.array(index, "latent.npy"), self.array(index, "tokens.npy")
        if list(moments.shape) != self.cache["shape"] or len(tokens) != len(captions):
            raise BadSample("unfit latent", key)
        return Sample(None, captions, str(fields.get("key", key)), fields.get("label"), moments, tokens)


def class_caption(name: str) -> str:
    return f"a photo of a{'n' if name[0].lower() in 'aeiou' else ''} {name}"


def read_bytes(path: Path) -> bytes:
    """A file that was there when the source was opened. Raises BadSample."""
    try:
        return path.read_bytes()
    except OSError:
        raise BadSample("unreadable file", str(path)) from None


class FileSource(Source):
    """Images as files: each of a class, or with a .txt of captions beside it."""

    def __init__(self, images: list[Path], name: str, classes: list[str] | None = None,
                 labels: list[int] | None = None) -> None:
        self.name, self.images, self.labels, self.skipped = name, images, labels, Counter()
        self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def paths(self) -> list[Path]:
        return self.images

    def captions(self, index: int) -> list[str]:
        if self.labels is not None:
            return [class_caption(self.classes[self.labels[index]])]
        text = read_bytes(self.images[index].with_suffix(".txt")).decode("utf-8-sig", errors="replace")
        found = [line.strip() for line in text.splitlines() if clean(line)]
        if not found:
            raise BadSample("empty caption", str(self.images[index]))
        return found

    def read(self, index: int, side: int | None = None) -> Sample:
        path = self.images[index]
        label = None if self.labels is None else self.labels[index]
        return Sample(decode_image(read_bytes(path), str(path), side), self.captions(index), str(path), label)


class KarpathySource(FileSource):
    """Images as files, their captions from one of Karpathy's tables: each is a text of its own."""
    separate_captions = True

    def __init__(self, images: list[Path], name: str, texts: list[list[str]]) -> None:
        super().__init__(images, name)
        self.texts = texts

    def captions(self, index: int) -> list[str]:
        return self.texts[index]


class CifarSource(Source):
    """CIFAR-10 or CIFAR-100 in its binary version (Krizhevsky 2009); the files stay on the disk, mapped.

    path: a folder with data_batch_{1..5}.bin, test_batch.bin and batches.meta.txt, records of a label byte
    and 3 x 32 x 32 bytes, plane after plane; or train.bin, test.bin and fine_label_names.txt, where a byte of
    the coarse label comes first, which is not used. split: "train", or "val" for the test file.
    Raises FileNotFoundError or ValueError.
    """
    TEN = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "val": ["test_batch.bin"]}
    HUNDRED = {"train": ["train.bin"], "val": ["test.bin"]}

    def __init__(self, path: Path, split: str) -> None:
        is_ten = not (path / "fine_label_names.txt").is_file()
        names = path / ("batches.meta.txt" if is_ten else "fine_label_names.txt")
        self.files = [path / file for file in (self.TEN if is_ten else self.HUNDRED)[known_split(split)]]
        missing = [file.name for file in (names, *self.files) if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{path} looks like CIFAR-{10 if is_ten else 100}'s binary version, but "
                                    f"has no {' and no '.join(missing)}: unpack the whole archive")
        self.name, self.skipped = path.name, Counter()
        self.classes = [line.strip().replace("_", " ") for _, line in text_lines(names)]
        head = 1 if is_ten else 2
        self.records = [self.open_records(file, head) for file in self.files]       # uint8 [n, head + 3072]
        self.labels = np.concatenate([records[:, head - 1] for records in self.records]).astype(np.int64)
        self.ends = np.cumsum([len(records) for records in self.records])

    def open_records(self, file: Path, head: int) -> np.ndarray:
        size, record = file.stat().st_size, head + 3072
        if not size or size % record:
            raise ValueError(f"{file} has {size} bytes, expected a multiple of {record}: unpack it again")
        records = np.memmap(file, np.uint8, "r").reshape(-1, record)
        wrong = np.flatnonzero(records[:, head - 1] >= len(self.classes))
        if len(wrong):
            raise ValueError(f"{file}: label {records[wrong[0], head - 1]} in record {wrong[0]} "
                             f"(in all {len(wrong)} wrong ones), expected 0 to {len(self.classes) - 1}: "
                             "unpack it again")
        return records

    def __len__(self) -> int:
        return len(self.labels)

    def paths(self) -> list[Path]:
        return self.files

    def captions(self, index: int) -> list[str]:
        return [class_caption(self.classes[self.labels[index]])]

    def read(self, index: int, side: int | None = None) -> Sample:
        file = int(np.searchsorted(self.ends, index, side="right"))
        place = index - int(self.ends[file]) + len(self.records[file])
        pixels = self.records[file][place, -3072:].reshape(3, 32, 32).transpose(1, 2, 0)
        return Sample(Image.fromarray(np.ascontiguousarray(pixels)), self.captions(index),
                      f"{self.files[file].name}:{place}", int(self.labels[index]))


class Subset(Source):
    """Some samples of another source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices, self.cache = source, indices, source.cache
        self.name, self.classes, self.skipped = source.name, source.classes, Counter(source.skipped)
        self.separate_captions = source.separate_captions

    def __len__(self) -> int:
        return len(self.indices)

    def captions(self, index: int) -> list[str]:
        return self.source.captions(int(self.indices[index]))

    def read(self, index: int, side: int | None = None) -> Sample:
        return self.source.read(int(self.indices[index]), side)

    def paths(self) -> list[Path]:
        return self.source.paths()

    def shards(self) -> np.ndarray | None:
        shards = self.source.shards()
        return None if shards is None else shards[self.indices]


def evenly_spaced(source: Source, count: int | None) -> Source:
    """`count` samples from all over the source, or all of it: the first ones might be all of one class."""
    if count is None or count >= len(source):
        return source
    some = Subset(source, np.linspace(0, len(source) - 1, count).astype(np.int64))
    some.skipped = Counter()      # what the whole source lost is nothing to judge so few by
    return some


def hold_out(source: Source, count: int) -> tuple[Source, Source]:
    """Split off `count` samples for validation (at most a twentieth), evenly spaced; `shapes` has its own."""
    if isinstance(source, Shapes):
        return source, evenly_spaced(Shapes("val", source.seed), count)
    held = evenly_spaced(source, max(1, min(count, len(source) // 20)))
    indices = getattr(held, "indices", np.arange(len(source)))          # a source of one sample is its own
    rest = np.setdiff1d(np.arange(len(source)), indices)
    return Subset(source, rest if len(rest) else indices), held


CC3M_COMMAND = ("img2dataset --input_format tsv --url_list cc3m.tsv --url_col url --caption_col caption "
                "--output_format webdataset --image_size 256 --processes_count 16 --thread_count 64 "
                "--output_folder cc3m")


KARPATHY_TABLES = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json")


def open_source(name: str, split: str = "train", list_file: str | None = None) -> Source:
    """What `--data` names -> a source.

    name: "shapes"; "cc3m" (./cc3m, ./data/cc3m or $DIFFDIS_DATA/cc3m); a tar; or a folder of
    - tars (all below it), images with .txt beside them, class folders (CLASS/*.jpg, better names may be
      given, see class_names), or ImageNet's flat validation images: of DIR/train or DIR/val if there is one,
      as `split` says; to train without DIR/train, of all but DIR/val;
    - CIFAR-10's or CIFAR-100's binary files, see CifarSource;
    - COCO's or Flickr's images and Karpathy's table of them, see open_karpathy (or the table's own path).
    list_file: the images of the folder that count, and their classes, see open_list.
    Raises FileNotFoundError or ValueError: what came, what was expected, what to do.
    """
    if list_file is not None:
        return open_list(Path(name), Path(list_file))
    if name == "shapes":
        return Shapes(split)
    path = Path(name)
    if name == "cc3m":
        places = [Path("cc3m"), Path("data/cc3m"), *([Path(os.environ["DIFFDIS_DATA"]) / "cc3m"]
                                                     if "DIFFDIS_DATA" in os.environ else [])]
        path = next((place for place in places if place.is_dir()), None)
        if path is None:
            raise FileNotFoundError(
                f"no cc3m in {', '.join(map(str, places))}; to download it (after adding the line "
                f"'caption<TAB>url' on top of its .tsv): {CC3M_COMMAND}")
    if not path.exists():
        raise FileNotFoundError(f"no data at {name}: expected 'shapes', 'cc3m', a tar, or a folder")
    tables = [path] if path.suffix == ".json" else [path / file for file in KARPATHY_TABLES]
    if any(table.is_file() for table in tables):
        return open_karpathy([table for table in tables if table.is_file()], split)
    if any((path / p).is_file() for p in ("data_batch_1.bin", "test_batch.bin", "fine_label_names.txt")):
        return CifarSource(path, split)
    if (path / split).is_dir() and not (path / CACHE_NOTES).is_file():
        path = path / split
    elif split == "val" and (path / "train").is_dir() and any(p.is_dir() for p in (path / "train").iterdir()):
        raise ValueError(f"{name} has a folder train, but none called val: name the one to evaluate, as "
                         f"{path / 'test'}")
    files = [path] if path.is_file() else files_below(path)
    files = [p for p in files if split != "train" or not p.is_relative_to(path / "val")]
    tars = files if path.is_file() else [p for p in files if p.suffix == ".tar"]
    return open_tars(path, name, tars) if tars else open_folder(
        path, [p for p in files if p.suffix[1:].lower() in IMAGE_SUFFIXES])


def open_tars(path: Path, name: str, tars: list[Path]) -> TarSource:
    """The tars of a folder, or of a latent cache. Raises ValueError."""
    notes = path / CACHE_NOTES
    source = open_cache(notes, tars, path.name) if notes.is_file() else TarSource(tars, path.name)
    if not len(source):
        raise ValueError(f"{name}: {len(tars)} tars but no usable sample ({dict(source.skipped)}): "
                         "expected KEY.jpg with KEY.txt or KEY.json")
    return source


def known_split(split: str) -> str:
    if split not in ("train", "val"):
        raise ValueError(f"no split {split!r} here, expected train or val")
    return split


def files_below(path: Path) -> list[Path]:
    """All files, sorted, links to folders followed; hidden ones and macOS's shadows are left out."""
    found, visited = [], set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in visited:          # a link back up
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    return sorted(p for p in found if p.is_file())


def open_folder(path: Path, images: list[Path]) -> FileSource:
    """A folder's images, captioned or in class folders. Raises ValueError."""
    captioned = [p for p in images if p.with_suffix(".txt").is_file()]
    if captioned:
        source = FileSource(captioned, path.name)
        source.skipped["no caption"] = len(images) - len(captioned)
        return source
    in_folders = [p for p in images if p.parent != path]
    if not in_folders and any(p.name.startswith("ILSVRC2012_val_") for p in images):
        return open_flat_imagenet(path)
    if not in_folders:
        raise ValueError(f"{path} holds {len(images)} images and no tars: expected tars, "
                         "images with .txt beside them, class folders of images, Karpathy's table, or "
                         "CIFAR's binary files (not the pickled ones)")
    folders = [p.relative_to(path).parts[0] for p in in_folders]
    return FileSource(in_folders, path.name, *class_names(path, folders, "folder"))


def in_or_above(folder: Path, name: str) -> Path | None:
    """A file of this name in the folder, or else beside it."""
    return next((p for p in (folder / name, folder.absolute().parent / name) if p.is_file()), None)


def text_lines(path: Path) -> list[tuple[int, str]]:
    """A text file's lines that are not blank, numbered from 1."""
    lines = path.read_text("utf-8-sig", errors="replace").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


SYNSET = regex.compile(r"n\d{8}")         # WordNet's number of a class, as ImageNet's folders are called


def read_class_names(path: Path, tags: list[str]) -> dict[str, str] | list[str]:
    """A file of names -> {tag: name} if its lines begin with the classes' tags, else its names in order.

    path: classnames.txt, or Kaggle's LOC_synset_mapping.txt ("n01440764 tench, Tinca tinca": the name is
    what stands before the comma). Names may occur twice: ImageNet has two kinds of crane. Raises ValueError.
    """
    lines = [(number, *(line.split(maxsplit=1) + [""])[:2]) for number, line in text_lines(path)]
    first, is_kaggles = {tag for _, tag, _ in lines}, path.name != "classnames.txt"
    # Most, not all: a misspelt tag must be named by the caller, not turn every line into a name.
    begin_with_tags = sum(tag in first for tag in tags) > len(tags) / 2 or all(map(SYNSET.fullmatch, first))
    if not is_kaggles and not (begin_with_tags and any(name for _, _, name in lines)):
        return [f"{word} {rest}".strip().replace("_", " ") for _, word, rest in lines]
    names = {}
    for number, tag, name in lines:
        name = (name.partition(",")[0] if is_kaggles else name).strip().replace("_", " ")
        if not name or tag in names:
            raise ValueError(f"{path}, line {number}: {'a second name' if name else 'no name'} for {tag}, "
                             "expected 'CLASS NAME', each class once")
        names[tag] = name
    return names


def class_names(root: Path, tags: list[str], kind: str) -> tuple[list[str], list[int]]:
    """What tells each image's class -> the names of all classes, sorted by tag, and each image's number.

    tags: a class folder, synset or class, per image; kind: "folder", "class", or "number" (from 0 on).
    The names are the tags themselves, unless there is in `root`, or beside it,
    - classnames.txt with lines "CLASS NAME...", or with a name a line, in the order of the numbers or of the
      sorted tags, as many as there are;
    - for synsets, Kaggle's LOC_synset_mapping.txt.
    Numbers count the sorted synsets, as Caffe's val.txt does. Raises ValueError where anything does not fit.
    """
    present, path = sorted(set(tags)), in_or_above(root, "classnames.txt")
    if path is None and all(SYNSET.fullmatch(tag) or kind == "number" for tag in present):
        path = in_or_above(root, "LOC_synset_mapping.txt")
    if path is None:
        names = dict(zip(present, own_names(root, present, kind)))
    else:
        names = read_class_names(path, present)
        if kind == "number" and not (isinstance(names, dict) and set(present) <= set(names)):
            if isinstance(names, dict) and list(names) != sorted(names):
                raise ValueError(f"{path}: classes are given by number, and the lines are not sorted: "
                                 "sort them, if the numbers count sorted classes")
            names = dict(enumerate(names if isinstance(names, list) else names.values()))
            tags, present = [int(tag) for tag in tags], [int(tag) for tag in present]
        elif isinstance(names, list):
            check_order(path, present, names)
            names = dict(zip(present, names))
    unnamed, unused = [tag for tag in present if tag not in names], sorted(set(names) - set(present))
    if unnamed:
        raise ValueError(f"{path} has {len(names)} lines and none for {kind} {unnamed[0]} (in all "
                         f"{len(unnamed)} of {len(present)} lack one"
                         f"{'; numbers count from 0' if kind == 'number' else ''}): add the lines")
    if unused and kind == "folder":
        raise ValueError(f"{path} names {len(names)} classes, and for {unused[0]} there is no folder (in all "
                         f"{len(unused)}): complete {root}, or write a classnames.txt of its classes alone")
    order = sorted(names)
    number = {tag: i for i, tag in enumerate(order)}
    return [names[tag] for tag in order], [number[tag] for tag in tags]


def own_names(root: Path, present: list[str], kind: str) -> list[str]:
    """Names of classes for which no file gives any. Raises ValueError."""
    if kind == "number":
        raise ValueError(f"classes are given by number, and {root} has no classnames.txt in it or beside it: "
                         "write one, a name a line in the order of the numbers")
    if all(map(SYNSET.fullmatch, present)):
        print(f"warning: {root} has no classnames.txt or LOC_synset_mapping.txt in it or beside it: its "
              f"classes are called {present[0]} and so on, which no text encoder knows", file=sys.stderr)
    names = [tag.replace("_", " ") for tag in present]
    if len(set(names)) < len(names):
        raise ValueError(f"{root}: two classes have the same name but for underscores: rename one")
    return names


def check_order(path: Path, tags: list[str], names: list[str]) -> None:
    """Names alone can be told to be in another order than the sorted tags only by what they say.

    Labels that are off by an order look like a model at chance. Raises ValueError.
    """
    if len(names) != len(tags):
        raise ValueError(f"{path} has {len(names)} names for {len(tags)} classes: expected as many, in the "
                         "order of the sorted classes, or lines 'CLASS NAME'")
    said = [name.lower() for name in names]
    own = [tag.replace("_", " ").lower() for tag in tags]
    wrong = [tag for tag, mine, name in zip(tags, own, said) if mine != name and mine in said]
    if all(map(str.isdecimal, tags)) and tags != sorted(tags, key=int):
        wrong = tags                 # 0, 1, 10, 2: are the names in this order too?
    if wrong:
        raise ValueError(f"{path} may be in another order than the sorted classes ({', '.join(tags[:4])}, …; "
                         f"look at {wrong[0]}): write lines 'CLASS NAME'")


def open_flat_imagenet(root: Path) -> FileSource:
    """ImageNet's validation images as their archive holds them, all in one folder.

    In it or beside it is Kaggle's LOC_val_solution.csv, or Caffe's val.txt, a list "FILE NUMBER".
    Raises FileNotFoundError or ValueError.
    """
    table = in_or_above(root, "LOC_val_solution.csv")
    if table is None:
        table = in_or_above(root, "val.txt")
        if table is None:
            raise ValueError(f"{root} holds ImageNet's validation images, but neither it nor the folder "
                             "above holds LOC_val_solution.csv or val.txt: copy one there")
        return open_list(root, table)
    entries = []
    for number, line in text_lines(table):
        image, _, boxes = line.partition(",")            # boxes are "n03995372 85 1 499 272 ", of one class
        if (image, boxes) == ("ImageId", "PredictionString"):
            continue
        if not SYNSET.fullmatch(boxes[:9]):
            raise ValueError(f"{table}, line {number}: {line[:60]!r}, expected ILSVRC2012_val_…,SYNSET …")
        entries.append((image, boxes[:9]))
    return listed_images(root, entries, table)


def open_list(root: Path, table: Path) -> FileSource:
    """The images of a folder that a list names.

    root: folder; table: text, a line per image: "PATH", "PATH CLASS..." or "PATH<TAB>CLASS...". PATH is
    relative to root whether it begins with a slash or not, may lack .jpg, .jpeg or .png, and may hold blanks
    if a tab follows. Where there is no CLASS it is the name of the folder that holds the image. If every
    CLASS is a number, they count the names of classnames.txt from 0 on. Blank lines, and lines that begin
    with "#", are passed over. Raises FileNotFoundError or ValueError.
    """
    for path, is_there, what in ((root, root.is_dir(), "folder"), (table, table.is_file(), "list")):
        if not is_there:
            raise FileNotFoundError(f"no {what} at {path}: expected a folder of images and a list of them")
    entries = []
    for _, line in text_lines(table):
        if not line.lstrip().startswith("#"):
            image, _, tag = line.partition("\t") if "\t" in line else line.strip().partition(" ")
            entries.append((image.strip().lstrip("/"), tag.strip()))
    return listed_images(root, entries, table)


def listed_images(root: Path, entries: list[tuple[str, str]], table: Path) -> FileSource:
    """(path below root, class or "" for its folder's name) of each image -> a source.

    Raises FileNotFoundError or ValueError.
    """
    if not entries:
        raise ValueError(f"{table} lists no image: expected lines 'PATH' or 'PATH CLASS'")
    endings = ("", ".jpg", ".jpeg", ".png", ".JPEG", ".JPG", ".PNG")
    places = [next((root / (path + end) for end in endings if os.path.isfile(f"{root}/{path}{end}")), None)
              for path, _ in entries]
    refuse_missing([path for (path, _), place in zip(entries, places) if place is None], entries, table, root)
    tags, folder_of = [], {}
    for path, tag in entries:
        folder, name = os.path.dirname(path), tag or os.path.basename(os.path.dirname(path))
        # SUN397 has church/outdoor and cathedral/outdoor: the folder's name would make them one class.
        if not name or not tag and folder_of.setdefault(name, folder) != folder:
            raise ValueError(f"{table} gives no class for {path}, and its folder's name is no class either "
                             f"({'it has no folder' if not name else f'{folder_of[name]} has the same'}): "
                             "write 'PATH<TAB>CLASS'")
        tags.append(name)
    is_numbered = all(tag.isdecimal() for _, tag in entries)
    return FileSource(places, root.name, *class_names(root, tags, "number" if is_numbered else "class"))


def refuse_missing(missing: list[str], entries: list, table: Path, root: Path) -> None:
    """Raises FileNotFoundError: a score over the images that happen to be there compares with nothing."""
    if missing:
        raise FileNotFoundError(f"{root} lacks {len(missing)} of the {len(entries)} images in {table}, "
                                f"the first is {missing[0]}: complete the folder, or shorten the list")


def open_karpathy(tables: list[Path], split: str) -> KarpathySource:
    """COCO or Flickr with Karpathy's split (Karpathy and Fei-Fei 2015): each image's first five captions.

    split: "train", which is his train and restval; "val", which is his *test*: the 5,000 images of COCO or
    1,000 of Flickr on which the field compares retrieval. There every image must have five captions.
    tables: one dataset_NAME.json. Images lie at filepath/filename or filename in its folder, or in one there
    that is called images or as Flickr's archives call it. Raises FileNotFoundError or ValueError.
    """
    if len(tables) > 1:
        raise ValueError(f"{tables[0].parent} holds {' and '.join(t.name for t in tables)}: name one of them")
    table, wanted = tables[0], {"train": ("train", "restval"), "val": ("test",)}[known_split(split)]
    try:
        entries = [(entry.get("filepath") or "", entry["filename"],
                    [text["raw"].strip() for text in entry["sentences"] if clean(text["raw"])][:5])
                   for entry in json.loads(table.read_bytes())["images"] if entry["split"] in wanted]
        places = [find_image(table.parent, folder, name) for folder, name, _ in entries]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{table} is damaged, or not Karpathy's table of images and their sentences "
                         f"({type(error).__name__}: {error}): fetch it again") from None
    if not entries:
        raise ValueError(f"{table} has no image of the split {' or '.join(wanted)}: fetch it again")
    few = [name for _, name, texts in entries if len(texts) < 5]
    if few and split == "val":
        raise ValueError(f"{table}: {few[0]} has fewer than five captions (in all {len(few)} images), "
                         "and retrieval is compared with five each: fetch it again")
    refuse_missing([name for (_, name, _), place in zip(entries, places) if place is None], entries, table,
                   table.parent)
    usable = [(place, texts) for (_, _, texts), place in zip(entries, places) if texts]
    source = KarpathySource([place for place, _ in usable], table.stem, [texts for _, texts in usable])
    source.skipped["no caption"] = len(entries) - len(usable)
    return source


def find_image(root: Path, folder: str, name: str) -> Path | None:
    places = ("", "images", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset")
    return next((p for place in places for p in (root / place / folder / name, root / place / name)
                 if p.is_file()), None)


# ---------------------------------------------------------------- batches
class Batch(NamedTuple):
    images: Tensor                # uint8 [B, S, S, 3]; of a latent cache moments, float16 [B, 2C, h, w]
    captions: list                # B captions; in evaluation B lists of captions
    labels: list                  # B class numbers, or None each
    keys: list[str]
    skipped: Counter              # bad samples met on the way, by cause
    visited: int                  # samples tried, good and bad
    tokens: Tensor | None = None  # [B, L] int64, in training
    drawn: dict | None = None     # what the `draw` of training_batches made for this step
    words: frozenset = frozenset()       # of the captions, in training
    places: tuple = ()            # of the samples in their source, in evaluation


def stack(samples: list[Sample], image_size: int) -> Tensor:
    """Samples -> Batch.images."""
    if samples and samples[0].moments is not None:
        return torch.from_numpy(np.stack([s.moments for s in samples]))
    pixels = [to_square(s.image, image_size) for s in samples]
    return torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(
        (0, image_size, image_size, 3), dtype=torch.uint8)


class SkipReport:
    """Counts bad samples by cause, and says when they are too many."""

    def __init__(self, max_bad: float = 0.05) -> None:
        if not 0 <= max_bad <= 1:
            raise ValueError(f"--max-bad is {max_bad}, expected a share from 0 to 1")
        self.max_bad, self.visited, self.skipped = max_bad, 0, Counter()

    def add(self, skipped: Counter, visited: int) -> None:
        self.visited += visited
        self.skipped.update(skipped)

    def check(self, final: bool = False) -> None:
        """Raises ValueError when more than max_bad of the samples were bad;
        judged from the 100th on, or at last."""
        bad = sum(self.skipped.values())
        if (final or self.visited >= 100) and bad > self.max_bad * self.visited:
            raise ValueError(f"too much of the data is unusable ({self}); mend it, or raise --max-bad")

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.skipped.items()))
        return f"samples read: {self.visited}, skipped: {causes or 'none'}"

    def to_dict(self) -> dict:
        return {"visited": self.visited, "skipped": dict(self.skipped)}

    def load(self, values: dict) -> None:
        self.visited, self.skipped = values["visited"], Counter(values["skipped"])


def check_index(source: Source, max_bad: float) -> None:
    """The same judgement on what indexing left out. Raises ValueError."""
    report = SkipReport(max_bad)
    report.add(source.skipped, len(source) + sum(source.skipped.values()))
    report.check(final=True)


class TrainingBatches(Dataset):
    """Item k is this rank's share of global batch k, every world-th row:
    a function of (source, seed, k, batch size).

    No state means: resuming needs the step alone, workers and ranks change nothing, and no rank can run dry,
    however few or uneven the shards are. Raises ValueError where pixels to augment are wanted of latents.
    """

    def __init__(self, source: Source, image_size: int, batch_size: int, seed: int, rank: int, world: int,
                 tokenizer: Tokenizer | None = None, shuffle_buffer: int = 100_000,
                 draw: Callable[[int], dict] | None = None, augment: bool = False) -> None:
        if augment and source.cache is not None:
            raise ValueError(f"{source.name} is a latent cache, and augmentation needs pixels: train on the "
                             "images it was made from, or without augmentation")
        self.source, self.image_size, self.seed, self.draw = source, image_size, seed, draw
        self.augment = augment
        self.batch_size, self.rows = batch_size, range(rank, batch_size, world)
        self.tokenizer, self.shuffle_buffer, self.shards = tokenizer, shuffle_buffer, source.shards()
        self.order: tuple[int, np.ndarray | None] = (-1, None)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """All samples once, in an order that is a function of (seed, epoch).

        Shards come in a fresh order; within each stretch of `shuffle_buffer` samples of their sequence the
        order is random. So files are read one after another, as from a stream, and a stretch fits in the
        machine's file cache; in random order all over 100 GB nearly every sample would be a seek.
        """
        rng, count = np.random.default_rng([self.seed, epoch]), len(self.source)
        if self.shards is None or self.shuffle_buffer >= count:
            return rng.permutation(count)
        turn = rng.permutation(int(self.shards.max()) + 1)
        order = np.argsort(turn[self.shards], kind="stable")
        for first in range(0, count, self.shuffle_buffer):
            rng.shuffle(order[first:first + self.shuffle_buffer])
        return order

    def index_at(self, position: int) -> tuple[int, int]:
        """Position in the endless stream -> epoch, sample."""
        epoch, place = divmod(position, len(self.source))
        if isinstance(self.source, Shapes):      # drawn at random already; each seed has its own stretch
            return epoch, (place + self.seed * 10_000_000) % len(self.source)
        if self.order[0] != epoch:
            self.order = (epoch, self.epoch_order(epoch))
        return epoch, int(self.order[1][place])

    def read(self, position: int, skipped: Counter) -> tuple[Sample, int] | None:
        """The sample at a position, and which of its captions; a bad one is replaced by another of the epoch
        (None after 100 in a row)."""
        epoch, place = divmod(position, len(self.source))
        for attempt in range(100):
            # From half an epoch away: the very next one is in this batch already,
            # and would be its own negative. The stride and the length have no common factor.
            stride = len(self.source) // 2 + (2 if len(self.source) % 4 == 2 else 1)
            substitute = (place + attempt * stride) % len(self.source)
            _, index = self.index_at(epoch * len(self.source) + substitute)
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
            choice = 0
            if len(sample.captions) > 1:
                choice = int(np.random.default_rng([self.seed, epoch, index]).integers(len(sample.captions)))
            return sample, choice
        return None

    def __getitem__(self, k: int) -> Batch | ValueError:
        skipped: Counter = Counter()
        found = [self.read(k * self.batch_size + row, skipped) for row in self.rows]
        if None in found:       # handed over, not raised: a worker's exceptions arrive as pages of traceback
            return ValueError(f"100 unusable samples in a row ({dict(skipped)}): "
                              "is this an image-caption data set?")
        samples = [sample for sample, _ in found]
        captions = [sample.captions[choice] for sample, choice in found]
        return Batch(stack(samples, self.image_size), captions, [s.label for s in samples],
                     [s.key for s in samples], skipped, len(self.rows) + sum(skipped.values()),
                     self.tokenize(found, captions), self.draw(k) if self.draw else None,
                     frozenset(word for caption in captions for word in words(caption)))

    def tokenize(self, found: list[tuple[Sample, int]], captions: list[str]) -> Tensor | None:
        if self.tokenizer is None:
            return None
        if self.source.cache is None or self.source.cache["tokenizer"] != self.tokenizer.fingerprint():
            return self.tokenizer(captions)
        tokens = [sample.tokens[choice] for sample, choice in found]
        return torch.from_numpy(np.stack(tokens).astype(np.int64))


def as_it_is(batch: Batch | ValueError) -> Batch | ValueError:
    return batch


def leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach a whole process group; what to do about them is the training loop's to say."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def training_batches(source: Source, image_size: int, batch_size: int, seed: int, start: int = 0,
                     rank: int = 0, world: int = 1, workers: int = 0, tokenizer: Tokenizer | None = None,
                     shuffle_buffer: int = 100_000, draw: Callable[[int], dict] | None = None,
                     augment: bool = False) -> Iterator[Batch]:
    """Endless training batches from number `start` on; of a global batch, the rows of one rank of `world`.

    workers: processes that read, decode, crop and tokenise, 0 for none; close() the iterator to end them.
    shuffle_buffer: samples that are mixed with each other, see TrainingBatches.epoch_order.
    draw: number of the batch -> what else training needs for it, made by the workers too.
    augment: a random crop and RandAugment of each picture, a function of (seed, epoch, sample), in place of
    its centre square. Raises ValueError for a latent cache.
    Raises ValueError where nothing usable is left.
    """
    dataset = TrainingBatches(source, image_size, batch_size, seed, rank, world, tokenizer, shuffle_buffer,
                              draw, augment)
    for batch in DataLoader(dataset, batch_size=None, sampler=range(start, 2 ** 40), num_workers=workers,
                            collate_fn=as_it_is, prefetch_factor=4 if workers else None,
                            worker_init_fn=leave_signals):
        if isinstance(batch, ValueError):
            raise batch
        yield batch


class EvaluationBatches(Dataset):
    """Item k holds the samples number k · batch_size and following, with all their captions;
    bad ones are left out and counted."""

    def __init__(self, source: Source, image_size: int, batch_size: int) -> None:
        self.source, self.image_size, self.batch_size = source, image_size, batch_size

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, k: int) -> Batch:
        samples, places, skipped, first = [], [], Counter(), k * self.batch_size
        for i in range(first, min(first + self.batch_size, len(self.source))):
            try:
                samples.append(self.source.read(i))
                places.append(i)
            except BadSample as bad:
                skipped[bad.cause] += 1
        return Batch(stack(samples, self.image_size), [s.captions for s in samples],
                     [s.label for s in samples], [s.key for s in samples], skipped,
                     len(samples) + sum(skipped.values()), places=tuple(places))


def evaluation_batches(source: Source, image_size: int, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """The source's usable samples once, in order."""
    return iter(DataLoader(EvaluationBatches(source, image_size, batch_size), batch_size=None,
                           num_workers=workers, collate_fn=as_it_is))


# ---------------------------------------------------------------- built-in data: shapes
# Dark, not the mid-grey that is 0 in [-1, 1]: zeros mean "outside the picture" to a convolution, and "no
# picture" to the alignment task. On grey, small networks took far longer to learn where things are.
SIDE, BACKGROUND = 32, 32.0                 # px; red = green = blue of 255
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (240, 220, 50),
           "purple": (160, 60, 200), "white": (250, 250, 250)}
SHAPES = ("circle", "square", "triangle", "cross")
RADII = {"": 7.0, "small": 5.0}             # px; the large size goes without saying
RELATIONS = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}
PIXELS = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5      # y, x of pixel centres


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return " ".join(filter(None, self))


class Scene(NamedTuple):
    """One thing, or two of different colours and their relation ("first RELATION second")."""
    things: tuple[Thing, ...]
    relation: str | None
    centres: tuple[tuple[float, float], ...]      # x, y in px

    def caption(self) -> str:
        return f" {self.relation} ".join(f"a {thing}" for thing in self.things)


KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
PAIRS = [(a, b) for i, a in enumerate(KINDS) for b in KINDS[i + 1:] if a[0] != b[0]]


@lru_cache(maxsize=None)
def is_held_out(pair: tuple) -> bool:
    """A fifth of the pairs of things, whatever their sizes and relation, is never shown in training.

    The README's own prompt is among them, so that it shows a combination the model never saw.
    """
    name = " ".join(sorted(" ".join(kind) for kind in pair))
    return name == "blue square red circle" or hashlib.sha256(name.encode()).digest()[0] < 51


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


def render(scene: Scene) -> np.ndarray:
    """A scene -> uint8 [32, 32, 3], anti-aliased."""
    image = np.full((SIDE, SIDE, 3), BACKGROUND, np.float32)
    for thing, (x, y) in zip(scene.things, scene.centres):
        alpha = coverage(thing.shape, x, y, RADII[thing.size])[..., None]
        image += alpha * (np.array(COLOURS[thing.colour], np.float32) - image)
    return image.round().astype(np.uint8)


def place(relation: str, rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """Centres of two things: 15 to 17 px apart along the relation's axis, loose across it; always inside."""
    along, across = 8 * np.array([1.0, -1.0]) + rng.uniform(-0.5, 0.5, 2), rng.uniform(-1, 1, 2)
    dx, dy = RELATIONS[relation]
    return tuple((float(16 + dx * a + abs(dy) * c), float(16 + dy * a + abs(dx) * c))
                 for a, c in zip(along, across))


def opposite(relation: str) -> str:
    dx, dy = RELATIONS[relation]
    return next(name for name, direction in RELATIONS.items() if direction == (-dx, -dy))


def pair_scene(pair: tuple, sizes: tuple[str, str], relation: str, flip: bool,
               rng: np.random.Generator) -> Scene:
    """A scene of two things; flipped, the same relation is told from the second one's side."""
    things = tuple(Thing(size, *kind) for size, kind in zip(sizes, pair))
    if flip:
        things, relation = things[::-1], opposite(relation)
    return Scene(things, relation, place(relation, rng))


def same_words(pair: tuple, sizes: tuple, relation: str, rng: np.random.Generator) -> tuple:
    """Another meaning told with the same words:
    the things change places, or exchange shapes, sizes or both."""
    (colour_a, shape_a), (colour_b, shape_b) = pair
    exchanged = ((colour_a, shape_b), (colour_b, shape_a))
    choices = [(pair, sizes, opposite(relation))]
    if shape_a != shape_b and not is_held_out(exchanged):
        choices += [(exchanged, sizes, relation), (exchanged, sizes, opposite(relation))]
    if sizes[0] != sizes[1]:
        choices.append((pair, sizes[::-1], relation))
    return choices[rng.integers(len(choices))]


class Shapes(Source):
    """Procedural scenes with captions: sample i is a function of (seed, split, i) alone.

    In training, scenes come in pairs whose captions have the same words and another meaning. They share a
    batch, so that telling captions apart means reading all of them, not just spotting a colour.

    split "train": endless in practice, pairs of TRAIN_PAIRS, one scene in ten a single thing;
    "val": each meaning of the held-out pairs exactly once ("A above B" and "B below A" are one meaning);
    "classes": single things, labelled with one of 24 classes such as "red circle".
    """
    name = "shapes"

    def __init__(self, split: str = "train", seed: int = 0) -> None:
        if split not in ("train", "val", "classes"):
            raise ValueError(f"shapes has no split {split!r}, expected train, val or classes")
        self.split, self.seed, self.skipped = split, seed, Counter()
        self.classes = [" ".join(kind) for kind in KINDS] if split == "classes" else None
        if split == "val":
            meanings = [(pair, (a, b), relation) for pair in HELD_OUT_PAIRS for a in RADII for b in RADII
                        for relation in RELATIONS]
            order = np.random.default_rng(0).permutation(len(meanings))     # one order, whatever the seed
            self.meanings = [meanings[i] for i in order]

    def __len__(self) -> int:
        return {"train": 10 ** 9, "val": len(HELD_OUT_PAIRS) * 16, "classes": 2400}[self.split]

    def scene(self, index: int) -> Scene:
        key = [self.seed, ("train", "val", "classes").index(self.split)]
        rng, sizes = np.random.default_rng([*key, 1, index]), list(RADII)
        if self.split == "val":
            return pair_scene(*self.meanings[index], bool(rng.integers(2)), rng)
        group = np.random.default_rng([*key, 0, index // 2])                # what the pair's scenes share
        if self.split == "classes" or group.random() < 0.1:
            kind = KINDS[index % len(KINDS) if self.split == "classes" else rng.integers(len(KINDS))]
            return Scene((Thing(sizes[rng.integers(2)], *kind),), None, (tuple(rng.uniform(14, 18, 2)),))
        pair = TRAIN_PAIRS[group.integers(len(TRAIN_PAIRS))]
        meaning = (pair, (sizes[group.integers(2)], sizes[group.integers(2)]),
                   list(RELATIONS)[group.integers(4)])
        if index % 2:
            meaning = same_words(*meaning, rng)
        return pair_scene(*meaning, bool(rng.integers(2)), rng)

    def captions(self, index: int) -> list[str]:
        return [self.scene(index).caption()]

    def read(self, index: int, side: int | None = None) -> Sample:
        scene = self.scene(index)
        label = index % len(KINDS) if self.split == "classes" else None
        return Sample(Image.fromarray(render(scene)), [scene.caption()],
                      f"shapes-{self.split}-{index}" + f"-seed{self.seed}" * (self.seed > 0), label)

    def usable_captions(self, limit: int) -> Iterator[list[str]]:
        return map(self.captions, range(min(limit, len(self), 1000)))       # a thousand hold every word


def held_out_captions(count: int) -> list[str]:
    """Captions of the first `count` validation scenes."""
    val = Shapes("val")
    return [val.captions(i)[0] for i in range(min(count, len(val)))]


# ---------------------------------------------------------------- long-tailed data
class LongTail(NamedTuple):
    """A data set with few images of most classes, and what is said of each (VL-LTR; Tian et al. 2022)."""
    train: Source                 # labelled
    test: Source                  # likewise
    names: list[str]              # K classes
    sentences: list[list[str]]    # of each class, from its description; none without one

    @property
    def name(self) -> str:
        return self.test.name

    def labels(self) -> Tensor:
        """Of all training images [N]."""
        return torch.tensor([label_of(self.train, i) for i in range(len(self.train))])

    def counts(self) -> list[int]:
        """Training images of each class."""
        return torch.bincount(self.labels(), minlength=len(self.names)).tolist()


def label_of(source: Source, index: int) -> int:
    """The label of a sample that has one, without reading it."""
    if isinstance(source, Subset):
        return label_of(source.source, int(source.indices[index]))
    return index % len(KINDS) if isinstance(source, Shapes) else int(source.labels[index])


PLACES_LT = {"train": 62500, "val": 7300, "test": 36500}       # images of its lists, 365 classes
# Sections of a Wikipedia article that tell nothing of its subject.
DROPPED_SECTIONS = {"References", "External links", "Further reading", "Bibliography"}


def open_longtail(name: str) -> LongTail:
    """A long-tailed data set in Places-LT's layout, as VL-LTR has it.

    name: a folder, or "places-lt" (./places-lt, ./data/places-lt or $DIFFDIS_DATA/places-lt), with
    *train.txt, *val.txt and *test.txt, lines "PATH LABEL", PATH below the folder, LABEL from 0 (of val the
    list is checked, its images are not needed);
    labels.txt, lines "NAME LABEL" (without it a class is called as the folder of its images);
    wiki/desc_LABEL.txt, if there, an article on the class; or "shapes": 24 kinds of things, by Zipf's law.
    Raises FileNotFoundError or ValueError before any image is read: lists or images that are not there,
    labels out of range, classes without a training image, paths that are trained and tested on, other counts
    than Places-LT's in its own lists.
    """
    if name == "shapes":
        return zipf_shapes()
    places = [Path(name)] if name != "places-lt" else [Path(name), Path("data") / name, *(
        [Path(os.environ["DIFFDIS_DATA"]) / name] if "DIFFDIS_DATA" in os.environ else [])]
    root = next((place for place in places if place.is_dir()), None)
    if root is None:
        raise FileNotFoundError(f"no folder at {', '.join(map(str, places))}: expected one with lists "
                                "*train.txt, *val.txt, *test.txt, or 'shapes'")
    tables, lists = {}, {}
    for split in PLACES_LT:
        found = sorted(root.glob(f"*{split}.txt"))
        if len(found) != 1:
            raise ValueError(f"{root} has {len(found)} files *{split}.txt, expected one list of images")
        tables[split], lists[split] = found[0], read_label_list(found[0])
    names = label_names(root, lists["train"], tables["train"])
    for split, entries in lists.items():
        check_labels(tables[split], entries, names, split)
    sources = []
    for split, entries in ((split, lists[split]) for split in ("train", "test")):
        missing = [path for path, _ in entries if not os.path.isfile(root / path)]
        refuse_missing(missing, entries, tables[split], root)
        sources.append(FileSource([root / path for path, _ in entries], f"{root.name} {split}", names,
                                  [label for _, label in entries]))
    shared = len({os.path.realpath(p) for p in sources[0].images}
                 & {os.path.realpath(p) for p in sources[1].images})
    if shared:
        raise ValueError(f"{shared} images are both in {tables['train']} and in {tables['test']}: what is "
                         "tested on must not be trained on")
    articles = [root / "wiki" / f"desc_{label}.txt" for label in range(len(names))]
    return LongTail(*sources, names, [read_sentences(path) if path.is_file() else [] for path in articles])


def check_labels(table: Path, entries: list[tuple[str, int]], names: list[str], split: str) -> None:
    """Raises ValueError on a label out of range, a class without training, or a part of Places-LT's list."""
    for path, label in entries:
        if label >= len(names):
            raise ValueError(f"{table}: {path} has label {label}, expected 0 to {len(names) - 1}")
    if "Places_LT" in table.name and (len(entries), len(names)) != (PLACES_LT[split], 365):
        raise ValueError(f"{table} has {len(entries)} images, of {len(names)} classes, and Places-LT's has "
                         f"{PLACES_LT[split]}, of 365: complete it, or give it another name")
    empty = sorted(set(range(len(names))) - {label for _, label in entries})
    if split == "train" and empty:
        raise ValueError(f"{table} has no image of {len(empty)} of {len(names)} classes, the first is "
                         f"{empty[0]} ({names[empty[0]]}): there is nothing to learn it from")


def read_label_list(table: Path) -> list[tuple[str, int]]:
    """Lines "PATH LABEL" -> [(path, label)]. Raises ValueError."""
    entries = []
    for number, line in text_lines(table):
        path, label = (line.strip().rsplit(None, 1) + [""])[:2]
        if not path or not label.isdecimal():
            raise ValueError(f"{table}, line {number}: {line[:60]!r}, expected 'PATH LABEL', LABEL from 0")
        entries.append((path.strip().lstrip("/"), int(label)))
    if not entries:
        raise ValueError(f"{table} is empty: expected lines 'PATH LABEL'")
    return entries


def label_names(root: Path, entries: list[tuple[str, int]], table: Path) -> list[str]:
    """Names of the classes 0, 1, …: from labels.txt, else of the folders their images lie in."""
    if (root / "labels.txt").is_file():
        table = root / "labels.txt"
        entries = read_label_list(table)
    else:
        entries = [(os.path.basename(os.path.dirname(path)), label) for path, label in entries]
    pairs = {(label, regex.sub("[_/]", " ", name).strip()) for name, label in entries}
    names = dict(sorted(pairs))
    if list(names) != list(range(len(pairs))) or not all(names.values()):
        raise ValueError(f"{table}: {len(pairs)} pairs of label and name, the highest label is {max(names)}: "
                         "expected every number from 0 on once, each with a name")
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice and table.name != "labels.txt":
        raise ValueError(f"{table}: two classes have folders {twice[0]!r}, a name that would not tell them "
                         "apart: write labels.txt, lines 'NAME LABEL'")
    return list(names.values())


def read_sentences(path: Path) -> list[str]:
    """A Wikipedia article as text, its sections headed "== Name ==" -> its sentences, less those of
    DROPPED_SECTIONS."""
    kept, dropped = [], False
    for _, line in text_lines(path):
        if line.startswith("=="):
            dropped = line.strip("= ") in DROPPED_SECTIONS
        elif not dropped:
            kept += regex.split(r"(?<=[.?!])\s+(?=\p{Lu})", line.strip())
    return [sentence for sentence in kept if clean(sentence)]


def zipf_shapes(most: int = 300) -> LongTail:
    """24 kinds of things, `most` training images of the first, a half, a third, … of that of the next ones.

    The order goes round colours and shapes, so that rare kinds are made of common words.
    """
    order = [7 * i % len(KINDS) for i in range(len(KINDS))]
    rows = [kind + len(KINDS) * i for place, kind in enumerate(order) for i in range(most // (place + 1))]
    train, test = Shapes("classes", seed=2), Shapes("classes")
    sentences = [[f"a {name}", f"a small {name}"] for name in test.classes]
    return LongTail(Subset(train, np.array(sorted(rows))), test, test.classes, sentences)


# ---------------------------------------------------------------- the checker of shapes
CAPTION = regex.compile(
    r"a (?:(?P<size>small) )?(?P<colour>{0}) (?P<shape>{1})(?: (?P<relation>{2}) (?P<rest>a .*))?"
    .format("|".join(COLOURS), "|".join(SHAPES), "|".join(RELATIONS)))


def parse(caption: str) -> tuple[tuple[Thing, ...], str | None]:
    """A caption of the grammar -> its things and relation. Raises ValueError on anything else."""
    match = CAPTION.fullmatch(clean(caption))
    if match is None:
        raise ValueError(f"{caption!r} is not in the grammar of shapes, "
                         "e.g. 'a red circle above a small blue square'")
    thing = Thing(match["size"] or "", match["colour"], match["shape"])
    if match["relation"] is None:
        return (thing,), None
    return (thing, *parse(match["rest"])[0]), match["relation"]


MIN_MASS = 12.0          # px of a colour that count as a thing: about half of the smallest thing's inside
MIN_OVERLAP = 0.75       # intersection over union: a clean thing has 0.95, a blurred blob 0.6
FAR, MAX_STRAYS = 64, 32     # of 255, px: edges of clean things give up to 17, a speck of 6 px across 36


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


def centroid(mask: np.ndarray) -> tuple[float, float]:
    return float((mask * PIXELS[1]).sum() / mask.sum()), float((mask * PIXELS[0]).sum() / mask.sum())


class Fit(NamedTuple):
    shape: str
    radius: float                 # px
    overlap: float                # intersection over union with the mask
    alpha: np.ndarray             # the template itself, [32, 32]


def best_fit(mask: np.ndarray) -> Fit:
    """Analysis by synthesis: the template that fits a mask best."""
    x, y = centroid(mask)
    shifts, fits = np.array([-0.5, 0.0, 0.5], np.float32), []
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


def strays(image: np.ndarray, fits: dict[str, Fit]) -> int:
    """How many pixels are far from what the fitted templates, in their colours on the ground, explain."""
    explained = np.full(image.shape, BACKGROUND, np.float32)
    for colour, fit in fits.items():
        explained += fit.alpha[..., None] * (np.array(COLOURS[colour], np.float32) - explained)
    return int((np.abs(image - explained).max(-1) > FAR).sum())


def check(image: np.ndarray, caption: str) -> dict[str, bool]:
    """Whether a picture shows what a caption of `shapes` says, decided from the pixels alone.

    image: uint8 [32, 32, 3] -> {"colour", "shape", "size", "relation", "all"}:
    the mentioned colours are there, and nothing else stands out; each thing of its colour has the right
    shape, cleanly; the right size; and they stand as told. Raises ValueError on other pictures and captions.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f"a picture of {image.dtype} {image.shape}, expected uint8 {(SIDE, SIDE, 3)}")
    things, relation = parse(caption)
    masks = colour_masks(image)
    # Only pixels mostly of a colour count here: faint noise all over the ground must not add up to a thing.
    present = {colour for colour, mask in masks.items() if mask[mask > 0.5].sum() >= MIN_MASS}
    told, middle = {thing.colour for thing in things}, (RADII[""] * RADII["small"]) ** 0.5
    fits = {colour: best_fit(masks[colour]) for colour in told & present}
    verdict = {"colour": present == told and strays(image, fits) <= MAX_STRAYS,
               "shape": told <= present, "size": told <= present, "relation": told <= present}
    for thing, fit in [(thing, fits[thing.colour]) for thing in things if thing.colour in fits]:
        verdict["shape"] &= fit.shape == thing.shape and fit.overlap >= MIN_OVERLAP
        verdict["size"] &= ("small" if fit.radius < middle else "") == thing.size
    if relation is not None and verdict["relation"]:
        offset = np.subtract(*(centroid(masks[thing.colour]) for thing in things))      # first from second
        along, across = offset @ RELATIONS[relation], abs(offset @ RELATIONS[relation][::-1])
        verdict["relation"] = bool(along > max(across, 4.0))
    return {**verdict, "all": all(verdict.values())}


# ---------------------------------------------------------------- latent cache
CACHE_FORMAT = "diffdis-latents-1"


def read_cache_notes(path: Path) -> dict:
    """What a latent cache says of itself. Raises ValueError where it says too little."""
    kinds = {"format": str, "shards": int, "shape": list, "image_size": int, "autoencoder": str,
             "tokenizer": str, "classes": (list, type(None))}
    try:
        notes = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): make the cache again") from None
    wrong = [name for name, kind in kinds.items()
             if not isinstance(notes, dict) or not isinstance(notes.get(name, 0.0), kind)]
    if wrong or notes["format"] != CACHE_FORMAT:
        raise ValueError(f"{path} does not describe a latent cache of format {CACHE_FORMAT!r} (look at "
                         f"{', '.join(wrong) or 'format'}): make the cache again")
    return notes


def open_cache(notes: Path, tars: list[Path], name: str) -> TarSource:
    """A latent cache as a source; what was lost in making it counts as skipped. Raises ValueError."""
    cache = read_cache_notes(notes)
    if cache["shards"] != len(tars):
        raise ValueError(f"{notes.parent} is a latent cache with {len(tars)} of {cache['shards']} shards: "
                         "give the command that made it again, it goes on where it was")
    source = TarSource(tars, name, cache)
    for path in tars:
        source.skipped.update(read_shard_report(path)["skipped"])
    return source


def read_shard_report(path: Path) -> dict:
    """What was read and skipped for one shard of a cache, kept beside it."""
    try:
        report = json.loads(path.with_suffix(".json").read_text())
        return {"visited": int(report["visited"]), "skipped": dict(report["skipped"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"visited": 0, "skipped": {}}


def cache_units(source: Source) -> list[np.ndarray]:
    """The samples that go into each shard of a cache: those of one tar, or 10,000 of them."""
    shards = source.shards()
    where = np.arange(len(source)) // 10_000 if shards is None else shards
    return np.split(np.arange(len(source)), np.flatnonzero(np.diff(where)) + 1)


def cache_shard(source: Subset, model, path: Path, args, bar: tqdm) -> SkipReport:
    """Encode a source's samples into one tar: moments, tokens and captions of each. Raises OSError."""
    part, report = path.with_name(path.name + ".part"), SkipReport(1.0)
    with tarfile.open(part, "w") as tar:
        def add(name: str, body: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        for batch in evaluation_batches(source, args.image_size, args.batch_size, args.workers):
            report.add(batch.skipped, batch.visited)
            bar.update(batch.visited)
            if not batch.captions:
                continue
            with torch.no_grad():
                moments = torch.cat(model.autoencoder.moments(to_float(batch.images.to(model.device))), 1)
            for row, values in enumerate(moments.half().cpu().numpy()):
                # A name of our own: keys may be paths, hold dots, or occur twice.
                name, captions = f"{source.indices[batch.places[row]]:09d}", batch.captions[row]
                tokens = model.tokenizer(captions).numpy().astype(np.uint16)
                for kind, numbers in (("latent", values), ("tokens", tokens)):
                    file = io.BytesIO()
                    np.lib.format.write_array(file, numbers, allow_pickle=False)
                    add(f"{name}.{kind}.npy", file.getvalue())
                add(f"{name}.json", json.dumps({"key": batch.keys[row], "captions": captions,
                                                "label": batch.labels[row]}).encode())
    with part.open("rb") as file:
        os.fsync(file.fileno())
    path.with_suffix(".json").write_text(json.dumps(report.to_dict()))
    os.replace(part, path)
    return report


def start_cache(out: Path, notes: dict) -> None:
    """Make the folder and say in it what it holds, or find that it holds this already. Raises ValueError."""
    holds_tars = out.is_dir() and any(out.glob("*.tar"))     # looked up first: another rank may begin between
    if (out / CACHE_NOTES).exists():
        before = read_cache_notes(out / CACHE_NOTES)
        differ = [f"{k} was {before.get(k)}, is {v}" for k, v in notes.items() if before.get(k) != v]
        if differ:
            raise ValueError(f"{out} holds another cache ({'; '.join(differ)}): choose another --out")
        return
    if holds_tars:
        raise ValueError(f"{out} holds tars that are no latent cache: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".{CACHE_NOTES}.{os.getpid()}"             # several ranks may write it, all the same
    part.write_text(json.dumps(notes))
    os.replace(part, out / CACHE_NOTES)


def write_cache(args) -> None:
    """Encode a data set once, so that training needs no autoencoder (README, "Latents, once for all").

    One tar per tar of the source, complete under its name or not there, so that a stopped command goes on
    where it was; the ranks of torchrun share the shards. Raises ValueError or OSError.
    """
    import model as models       # here, not above: model.py imports this file
    out, data = Path(args.out).resolve(), Path(args.data).resolve()
    if out == data or out in data.parents or data in out.parents:
        raise ValueError(f"--out {args.out} and --data {args.data} lie one in the other: the latents would "
                         "be taken for part of the data, choose another --out")
    model = models.load(args.init, args.device, weights="raw")
    if isinstance(model, models.Clip):
        raise ValueError(f"--init {args.init} is a CLIP, which reads pixels: it has no latents to keep")
    if args.image_size is None:      # Stable Diffusion's own files say 512, its fine-tuning here takes 256
        theirs = model.tasks == ("generation",) and model.config.autoencoder.kind == "kl"
        args.image_size = (models.PRESETS["sd-v1"] if theirs else model.config).image_size
    source = open_source(args.data)
    check_index(source, args.max_bad)
    if source.cache is not None:
        raise ValueError(f"{args.data} is a latent cache already: expected images")
    units = cache_units(source)
    channels, height, width = model.latent_shape(args.image_size, args.image_size)
    start_cache(out, {
        "format": CACHE_FORMAT, "source": source.name, "samples": len(source), "shards": len(units),
        "shape": [2 * channels, height, width], "image_size": args.image_size, "classes": source.classes,
        "autoencoder": models.fingerprint(model.autoencoder), "tokenizer": model.tokenizer.fingerprint(),
        **({"separate_captions": True} if source.separate_captions else {})})
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    paths, report = [out / f"{i:05d}.tar" for i in range(len(units))], SkipReport(args.max_bad)
    mine = range(rank, len(units), world)
    todo = [i for i in mine if not paths[i].exists()]
    for i in set(mine) - set(todo):
        before = read_shard_report(paths[i])
        report.add(Counter(before["skipped"]), before["visited"])
    with tqdm(total=sum(len(units[i]) for i in todo), unit="image", disable=None) as bar:
        for i in todo:
            try:
                found = cache_shard(Subset(source, units[i]), model, paths[i], args, bar)
            except OSError as error:
                raise OSError(f"cannot write {paths[i]}: {error.strerror or error}; the shards before it are "
                              "kept") from None
            finally:
                paths[i].with_name(paths[i].name + ".part").unlink(missing_ok=True)
            report.add(found.skipped, found.visited)
            report.check()
    report.check(final=True)
    print(f"{report}\nwrote {len(todo)} of {len(units)} shards to {args.out}"
          + (f" (rank {rank} of {world}; the others may still be at work)" if world > 1 else "")
          + f"; train with: python train.py --data {args.out} --init {args.init} "
          f"--image-size {args.image_size}")


def main(argv: list[str] | None = None) -> None:
    import sample       # for the command line only; it imports this file
    parser = sample.Parser(description=__doc__.split("\n")[0])
    cache = parser.add_subparsers(dest="task", required=True).add_parser(
        "cache", help="encode a data set's images once, for training without the autoencoder")
    add = cache.add_argument
    add("--data", required=True, help="cc3m, or a folder of tars, class folders or captioned images")
    add("--init", required=True, help="whose autoencoder and tokenizer: what train.py --init will be given")
    add("--out", required=True, help="folder of the new tars")
    add("--image-size", type=sample.positive,
        help="px; without it 256 for Stable Diffusion's files, else the checkpoint's own")
    add("--batch-size", type=sample.positive, default=32, help="images encoded at once")
    add("--workers", type=sample.natural, default=2, help="processes that read and decode")
    add("--max-bad", type=sample.finite, default=0.05, help="stop when more than this share is unusable")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to encode")
    args = parser.parse_args(argv)
    try:
        args.device = sample.pick_device(args.device)
        if args.device.type == "cuda" and "LOCAL_RANK" in os.environ:
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        write_cache(args)
    except (ValueError, OSError) as error:
        sample.fail(error)
    except KeyboardInterrupt:
        sample.fail("stopped by Ctrl-C: the same command goes on with the shards that are left", 130)


if __name__ == "__main__":
    import data         # by its own name: sample.py and model.py import it, and classes must be one
    data.main()
