"""Tests the byte-pair tokenizer: ids of open_clip and transformers, damaged files, and training on own captions."""

import gzip
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import open_clip
import pytest
import transformers

from flip.config.schema import TextTower
from flip.runs.errors import ConfigError
from flip.tokenizer import BYTES, END, START, Tokenizer, train, train_byte_pairs
from tools.commands import tokenizer as command

PUBLISHED = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
TOWER = TextTower(length=77, causal=True, repair=True)
TEXTS = [
    "", "a photo of a cat!", "it's we're I'LL don't 'd 's's", "  A RED\tSquare\n number 4 ", "AT&amp;amp;T &lt;b&gt;",
    "caf\u00e9 nai\u0308ve e&#769;", "\u039f\u0394\u039f\u03a3 \u03a3", "\u0130stanbul STRASSE \u1e9e",
    "\u732b\u304c\u597d\u304d 2023", "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u200b zero",
    "!!!???... --__", "x" * 150, "1234 5\u00bd \u00b2 3.5-inch", " ".join(f"a blue frame {i}" for i in range(40)),
    "nul \x00 bell \x07 \x1b[31m", "word</w> <w>", "\ufffd \u2014", "don\u2019t \u201cquote\u201d \u00c3\u00a9",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 \u0639\u0631\u0628\u064a",
]  # fmt: skip


def odd_texts():
    """Texts with every fifth assigned character between letters and digits, and random ASCII texts."""
    draw = random.Random(1)
    assigned = [c for c in map(chr, range(32, 0x1F000, 5)) if unicodedata.category(c)[0] != "C" and c != "\u0345"]
    ascii_texts = ["".join(chr(draw.randint(32, 126)) for _ in range(draw.randint(1, 40))) for _ in range(500)]
    return [f"x{c}a {c}{c}1" for c in assigned] + ascii_texts


@pytest.fixture(scope="module")
def published():
    return Tokenizer.of(PUBLISHED, TOWER)


@pytest.mark.long
def test_published_file_gives_ids_of_open_clip(published):
    texts = TEXTS + odd_texts()
    actual = published(texts)
    expected = open_clip.SimpleTokenizer()(texts).numpy()
    different = [
        text for text, row, reference in zip(texts, actual, expected, strict=True) if not np.array_equal(row, reference)
    ]
    assert (actual.dtype, different, published.size) == (np.int32, [], 49_408)
    assert published(["!"]).tolist()[0][:3] == [49406, 256, 49407] and (published(["x" * 999])[:, -1] == 49407).all()


def test_transformers_file_gives_ids_of_transformers(published, tmp_path):
    content = json.loads(published._tokenizer.to_str())["model"]
    reference = transformers.CLIPTokenizerFast(content["vocab"], [tuple(pair) for pair in content["merges"]])
    reference.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.of(tmp_path / "tokenizer.json", TOWER)
    texts = [text for text in TEXTS if "\u03a3" not in text]  # CLIPTokenizerFast has no final sigma
    cleaned = [open_clip.tokenizer.basic_clean(text) for text in texts]
    for text, row, plain in zip(texts, tokenizer(texts), cleaned, strict=True):
        ids = reference(plain, truncation=True, max_length=77)["input_ids"]
        assert row[: len(ids)].tolist() == ids and not row[len(ids) :].any(), text
    assert np.array_equal(tokenizer(TEXTS), published(TEXTS))


def test_exported_json_gives_same_ids_here_and_in_transformers(published, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(published.to_json(), encoding="utf-8")
    assert np.array_equal(Tokenizer.of(file, TOWER)(TEXTS), published(TEXTS))
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    ids = reference("A photo of a  cat!")["input_ids"]
    assert published(["a photo of a cat!"])[0][: len(ids)].tolist() == ids and len(ids) == 8


def test_special_tokens_in_caption_are_plain_text(published):
    row = published([f"{START} cat {END} dog"])[0]
    assert (row == 49407).sum() == 1 and (row == 49406).sum() == 1
    assert published.piece(int(published.without_padding(row)[-2])) == "dog</w>"
    assert published.without_padding(published(["!a?!"])[0])[1:-1].tolist() != []  # id 0 is "!", not padding


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_tokenizer_rejects_kind_that_text_tower_does_not_use(kind, tmp_path):
    make = {"wordpiece": train, "bpe": train_byte_pairs}[kind]
    make(["a red cat"], 600, tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"model\.text\.causal"):
        Tokenizer.of(tmp_path / "tokenizer.json", TextTower(causal=kind == "wordpiece"))


CONTENT = {"model": {"type": "BPE", "vocab": {}, "merges": []}}
DAMAGED = {
    "cut gzip": (lambda: PUBLISHED.read_bytes()[:9999], "cannot be unpacked"),
    "other gzip": (lambda: gzip.compress(b"heading\na b c\n"), "pair"),
    "bytes": (lambda: gzip.compress(b"heading\n\xff\xfe\n"), "utf-8"),
    "no bytes": (lambda: json.dumps(CONTENT).encode(), "not byte pairs"),
    "end": (lambda: own_json(lambda model: model["vocab"].update({START: 513, END: 512})), "is not id 513"),
    "ids": (lambda: own_json(lambda model: model["vocab"].update({"x y": 9999})), "ids are not"),
    "pair": (lambda: own_json(lambda model: model["merges"].append(["a", "b"])), "pair 'a b'"),
    "merges": (lambda: own_json(lambda model: model.update(merges=[["a", 3]])), "tokenizer.json"),
}


def own_json(change):
    pieces = [*BYTES, *(byte + "</w>" for byte in BYTES), START, END]
    model = {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}
    change(model)
    return json.dumps({"model": model}).encode()


@pytest.mark.parametrize("name", DAMAGED)
def test_tokenizer_rejects_damaged_file(name, tmp_path):
    make, message = DAMAGED[name]
    (tmp_path / "tokenizer.json").write_bytes(make())
    with pytest.raises(ConfigError, match=message):
        Tokenizer(tmp_path / "tokenizer.json", 77, False)


def test_train_byte_pairs_is_deterministic_and_matches_open_clip(tmp_path):
    """Other processes and orders of captions give the same file. open_clip computes the same ids from its merges."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij\u00e9", k=draw.randint(1, 8))) for _ in range(300)]
    captions = [" ".join(draw.choices(words, k=5)) for _ in range(200)]
    contents = []
    for i in range(2):
        draw.shuffle(captions)
        script = "import sys, json; from flip.tokenizer import train_byte_pairs as train; "
        script += "print(train(json.load(sys.stdin), 700, sys.argv[1]))"
        arguments = [sys.executable, "-c", script, str(tmp_path / f"{i}.json")]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            arguments, input=json.dumps(captions), text=True, cwd=root, check=True, capture_output=True
        )
        assert int(done.stdout) == 700
        contents.append((tmp_path / f"{i}.json").read_bytes())
    assert contents[0] == contents[1]
    merges = json.loads(contents[0])["model"]["merges"]
    lines = ["heading", *(" ".join(pair) for pair in merges)]
    (tmp_path / "merges.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    by_merges = Tokenizer.of(tmp_path / "merges.gz", TOWER)
    by_table = Tokenizer.of(tmp_path / "0.json", TOWER)
    assert np.array_equal(by_merges(captions + TEXTS), by_table(captions + TEXTS))
    stock = open_clip.SimpleTokenizer(str(tmp_path / "merges.gz"))
    assert np.array_equal(stock(captions).numpy(), Tokenizer.of(tmp_path / "0.json", TOWER)(captions))


def test_tokenizer_command_trains_and_shows_byte_pairs(tmp_path, capsys):
    lines = tmp_path / "captions.txt"
    out = tmp_path / "bpe.json"
    lines.write_text("a red square\na red circle\n")
    arguments = ["train", "--kind", "bpe", "--captions", str(lines), "--out", str(out), "--vocabulary"]
    assert command.main([*arguments, "514"]) == 78 and "more than 514" in capsys.readouterr().err
    assert command.main([*arguments, "520"]) == 0 and "520" in capsys.readouterr().out
    assert command.main(["show", str(out), "Red!"]) == 0
    assert capsys.readouterr().out.strip().startswith(f"Red!: {START}:518") and out.exists()
