"""The tokenizer against transformers' CLIPTokenizer and a textbook BPE."""
import gzip
import importlib.util
import itertools
import json
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from conftest import put_vocabulary

from data import SYMBOLS, Tokenizer, clean

CAPTIONS = ["a photo of a dog on a beach", "two dogs run on the beach", "the dog's ball isn't on the photo",
            "a beach, a ball & a dog!", "running dogs photographed running"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.learn(CAPTIONS, 600, context_length=16)


def test_same_ids_as_transformers(tokenizer: Tokenizer, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    put_vocabulary(tmp_path, tokenizer)
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    strings = CAPTIONS + ["Two DOGS   run\n\ton it", "it's 3 o'clock, 12:30", "naïve café 犬 ünïcødé",
                          "🐶👩‍👧 emoji", "", "a", "x" * 300, "don't I'll they've",
                          "a_b-c/d @ #tag $5.00 100%", "ﬁne ½ ²"]
    for text in strings:
        expected = theirs(clean(text))["input_ids"][1:-1]     # cleaned first: theirs has no ftfy
        assert tokenizer.encode(text) == expected, \
            f"{text!r}: pretrained text encoders would see other tokens"
    captions = [*CAPTIONS, "", " ".join(CAPTIONS)]            # the last is cut
    padded = theirs(captions, padding="max_length", max_length=16, truncation=True)["input_ids"]
    with pytest.warns(UserWarning, match="more than 14 tokens"):
        tokens = tokenizer(captions)
    assert tokens.tolist() == padded, "Stable Diffusion pads with the end token; the text query is read there"


def test_control_tokens_in_a_caption_stay_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|endoftext|> a dog <|startoftext|>")
    assert max(ids) < tokenizer.start, \
        "a caption must not be able to end itself: the text query is read at the end"
    assert tokenizer.decode(ids).replace(" ", "") == "<|endoftext|>adog<|startoftext|>"


def slow_learn(captions: list[str], count: int) -> list[str]:
    """The algorithm as Sennrich et al. 2016 print it: count all pairs anew for every merge."""
    spelt, merges = Counter(), []
    for word in " ".join(captions).lower().split():
        spelt[" ".join(SYMBOLS[byte] for byte in word.encode()) + "</w>"] += 1
    for _ in range(count):
        pairs = Counter()
        for word, n in spelt.items():
            for pair in itertools.pairwise(word.split()):
                pairs[pair] += n
        if not pairs:
            break
        best = " ".join(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        merges.append(best)
        bigram = re.compile(rf"(?<!\S){re.escape(best)}(?!\S)")
        spelt = Counter({bigram.sub(best.replace(" ", ""), word): n for word, n in spelt.items()})
    return merges


def test_learning_equals_the_textbook_algorithm() -> None:
    plain = ["low lower lowest", "newer newest wider", "banana bandana aaaa aaaaa", "low low new"] * 2
    assert Tokenizer.learn(plain, 514 + 40).merges == slow_learn(plain, 40)


def test_every_file_gives_the_same_tokens(tokenizer: Tokenizer, tmp_path) -> None:
    put_vocabulary(tmp_path, tokenizer)
    path = tmp_path / "vocabulary.txt.gz"
    path.write_bytes(gzip.compress("\n".join(['"a header"', *tokenizer.merges, ""]).encode("utf-8")))
    for file in (tmp_path, path):
        assert Tokenizer.from_file(file).id == tokenizer.id, "the first line is a header, not a merge"


@pytest.mark.parametrize("spell", [" ".join, list])
def test_what_transformers_5_saves_is_read(tokenizer: Tokenizer, tmp_path, spell) -> None:
    transformers, file = pytest.importorskip("transformers"), tmp_path / "new/tokenizer.json"
    put_vocabulary(tmp_path / "old", tokenizer)
    transformers.CLIPTokenizer.from_pretrained(str(tmp_path / "old")).save_pretrained(file.parent)
    saved = json.loads(file.read_bytes())
    merges = [spell(m.split(" ") if isinstance(m, str) else m) for m in saved["model"]["merges"]]
    file.write_text(json.dumps(saved | {"model": saved["model"] | {"merges": merges}}))
    assert Tokenizer.from_file(file.parent).id == tokenizer.id
    file.write_text(json.dumps(saved | {"model": saved["model"] | {"merges": merges[::-1]}}))
    with pytest.raises(ValueError, match="no vocabulary of CLIP's .*expected merges of two symbols"):
        Tokenizer.from_file(file.parent)


def test_other_files_are_refused(tokenizer: Tokenizer, tmp_path) -> None:
    put_vocabulary(tmp_path, tokenizer)
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"some\nother text than that\n"))
    (tmp_path / "x.gz").write_bytes(b"no gzip")
    for name, table in (("", "{}"), ("", "{cut"), ("", "[" * 100_000), ("other.gz", ""), ("x.gz", ""),
                        ("none", "")):
        (tmp_path / "vocab.json").write_text(table)
        with pytest.raises(ValueError, match="no vocabulary of CLIP's .*fetch it again"):
            Tokenizer.from_file(tmp_path / name)


# ---------------------------------------------------------------- the published vocabulary
def strings_of_the_web(count: int) -> list[str]:
    """Words, oddities and any characters, mixed."""
    rng = random.Random(0)
    characters = map(chr, range(0x20, 0x1FAFF))
    assigned = [c for c in characters if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    odd = ["&amp;amp; &lt;b&gt;", "\t\r\n \u00a0\u3000", "\x00\x07\x1b[0m", "👩‍👩‍👧‍👦🏳️‍🌈", "x" * 2000,
           "ï¬\x81x â€œquotedâ€\x9d", "i̇İIı ẞß ΣςΣ", "don't WE'LL they've I'D it's 'em", "١٢٣ ½ ² Ⅷ",
           "<|startoftext|> a <|endoftext|>", "", "a\u0301 \u202eright to left\u202c", "漢字かな한글",
           "https://x.y/z?q=1&r=2#f", "$1,234.50 (100%) @home #tag"]
    plain = "a the dog Beach running 3 12:30 o'clock naïve café état".split()
    return [rng.choice((" ", "  ", "")).join(
        rng.choice((rng.choice(odd), rng.choice(plain), "".join(rng.choices(assigned, k=rng.randint(1, 8)))))
        for _ in range(rng.randint(1, 6))) for _ in range(count)]


def test_the_published_vocabulary_gives_the_published_ids() -> None:
    """Against CLIP's own tokenizer, a file in the wheel of open_clip, without the package around it."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("no published vocabulary here: pip install --no-deps open_clip_torch")
    folder = Path(package.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours, theirs = Tokenizer.from_file(folder / "bpe_simple_vocab_16e6.txt.gz"), module.SimpleTokenizer()
    assert ours.vocab_size == 49408 and (ours.start, ours.end) == (49406, 49407)
    for text in strings_of_the_web(20_000):
        if "<|" not in text:                     # control tokens, which ours does not let a caption say
            assert ours.encode(text) == theirs.encode(text), repr(text)
