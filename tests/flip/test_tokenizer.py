"""Tests the WordPiece tokenizer: ids, cleaning and repair of text, foreign and damaged files, and training."""

import html
import json
import random
import subprocess
import sys
from pathlib import Path

import ftfy
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from flip.config.schema import TextTower
from flip.runs.errors import ConfigError
from flip.tokenizer import SPECIAL, Tokenizer, clean, train, train_byte_pairs

CAPTIONS = [
    "A red cat, sitting on a mat.",
    "the cats & the dogs [all of them]",
    "caf\u00e9 at night; 100% pad",
    "unaffable runners running",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(CAPTIONS, 200, file)
    return file


def pieces(path, text, length=32):
    vocabulary = {i: piece for piece, i in json.loads(path.read_text())["model"]["vocab"].items()}
    return [vocabulary[i] for i in Tokenizer(path, length, prepend_cls=False)([text])[0] if i]


def test_tokenizer_pads_cuts_and_prepends_cls(path):
    tokenizer = Tokenizer(path, 8, prepend_cls=False)
    rows = tokenizer(["cat", "", "a a a a a a a a a a"])
    assert (rows.shape, rows.dtype) == ((3, 8), np.int32)
    assert rows[0, 0] > 4 and not rows[0, 4:].any() and not rows[1].any() and rows[2].all()
    first = Tokenizer(path, 8, prepend_cls=True)(["cat", "", "a a a a a a a a a a"])
    assert (first[:, 0] == SPECIAL.index("[CLS]")).all()
    assert np.array_equal(first[:, 1:], rows[:, :7])  # [CLS] counts towards the length; no [SEP]
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    assert [vocabulary[special] for special in SPECIAL] == [0, 1, 2, 3, 4]
    assert tokenizer.size == len(vocabulary) <= 200


BROKEN = "The cat doesn\u00c3\u00a2\u00e2\u201a\u00ac\u00e2\u201e\u00a2t sleep \u2013 \u201cred\u201d"
"""UTF-8 text that was decoded as Windows-1252 twice."""


@pytest.mark.parametrize(
    "text", [BROKEN, "a  red\tcat", "Tom &amp;amp;amp; Jerry", "\x1b[31mred\x07", "cat < dog &lt;"]
)
def test_repair_matches_open_clip(path, text):
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    assert clean(text, repair=True) == " ".join(repaired.split())
    assert "doesn't sleep" in clean(BROKEN, repair=True) and "doesn't" not in clean(BROKEN)
    tokens = Tokenizer.of(path, TextTower(length=32, prepend_cls=False, repair=True))([text])
    assert np.array_equal(tokens, Tokenizer(path, 32, False)([" ".join(repaired.split())]))


@given(st.text(st.characters(codec="ascii")))
def test_repair_of_ascii_text_matches_ftfy_and_html_unescape(text):
    assert clean(text, repair=True) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def test_tokenizer_cleans_whitespace_entities_case_and_accents(path):
    assert pieces(path, "  A\tRED \n cat ") == pieces(path, "a red cat")
    assert pieces(path, "cats &amp;amp; dogs") == pieces(path, "cats & dogs")
    assert pieces(path, "CAF\u00c9") == pieces(path, "cafe")


PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80)


@given(st.lists(st.one_of(PRINTABLE, st.text(max_size=40), st.sampled_from(CAPTIONS)), max_size=4))
def test_word_cache_does_not_change_ids(path, texts):
    tokenizer = Tokenizer(path, 1000, prepend_cls=False)
    for _ in range(2):
        for text, row in zip(texts, tokenizer(texts), strict=True):
            ids = tokenizer._tokenizer.encode(clean(text), add_special_tokens=False).ids
            assert row[: len(ids)].tolist() == ids and not row[len(ids) :].any()


def test_word_cache_is_bounded(path, monkeypatch):
    monkeypatch.setattr("flip.tokenizer.MAX_CACHED_WORDS", 3)
    tokenizer = Tokenizer(path, 32, prepend_cls=False)
    text = "the cats & the dogs [all of them]"
    assert (tokenizer([text, text]) == Tokenizer(path, 32, False)([text, text])).all() and len(tokenizer._word_ids) <= 3


def test_special_tokens_in_caption_are_plain_text(path):
    assert pieces(path, "[PAD] cat")[:3] == ["[", "pad", "]"]
    assert "[UNK]" not in pieces(path, "[CAT]")
    assert pieces(path, "\u4e2d cat")[0] == "[UNK]"


def test_tokenizer_ignores_template_truncation_and_added_tokens_of_file(path, tmp_path):
    """A published tokenizer.json has a template, truncation and added tokens. The tokenizer ignores them."""
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}},
    }
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [{"id": 0, "content": "[PAD]", "special": True, **flags}]
    other = tmp_path / "foreign.json"
    other.write_text(json.dumps(content))
    text = ["[PAD] a red cat on the mat"]
    assert np.array_equal(Tokenizer(other, 32, False)(text), Tokenizer(path, 32, False)(text))


def test_file_without_model_type_is_read_as_wordpiece(path, tmp_path):
    """BERT's published file is from 2020. The tokenizers package then wrote no type, and still reads such files."""
    content = json.loads(path.read_text())
    assert content["model"].pop("type") == "WordPiece"
    old = tmp_path / "old.json"
    old.write_text(json.dumps(content))
    for text in CAPTIONS:
        ids = Tokenizer(old, 32, False)([text])
        assert np.array_equal(ids, Tokenizer(path, 32, False)([text]))
        expected = tokenizers.Tokenizer.from_file(str(old)).encode(clean(text), add_special_tokens=False).ids
        assert ids[0, : len(expected)].tolist() == expected
    del content["model"]["max_input_chars_per_word"]
    old.write_text(json.dumps({**content, "model": {**content["model"], "merges": []}}))  # for example BPE
    with pytest.raises(ConfigError, match="not byte pairs"):
        Tokenizer(old, 32, False)


@pytest.mark.parametrize("folder", ["bert-uncased", "google/bert-base-uncased"])
def test_error_for_published_tokenizer_does_not_suggest_training(path, tmp_path, folder):
    """Recipe paper names the tokenizer of BERT. A newly trained tokenizer would give another model."""
    file = tmp_path / folder / "tokenizer.json"
    file.parent.mkdir(parents=True)
    for text in (None, "{}", path.read_text().replace("[PAD]", "[PAAD]")):
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            Tokenizer(file, 32, False)
        assert "docs/reproduce.md" in caught.value.remedy and "tokenizer.py" not in caught.value.remedy
    with pytest.raises(ConfigError, match=r"flip tokenizer train"):
        Tokenizer(tmp_path / "bert-uncased.json", 32, False)


@pytest.mark.long
def test_train_is_deterministic_for_any_process_and_order(tmp_path):
    """Words of random letters give many ties. The trainer of the tokenizers package writes another file per process."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 8))) for _ in range(300)]
    captions = [" ".join(draw.choices(words, k=5)) for _ in range(200)]
    contents = []
    for i in range(3):
        draw.shuffle(captions)
        file = tmp_path / f"{i}.json"
        script = "import sys, json; from flip.tokenizer import train; train(json.load(sys.stdin), 250, sys.argv[1])"
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", script, str(file)]
        subprocess.run(command, input=json.dumps(captions), text=True, cwd=root, check=True)
        contents.append(file.read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_train_limits_vocabulary_despite_rare_characters(tmp_path):
    captions = ["common words here"] * 5 + ["".join(chr(0x4E00 + i) for i in range(3000))]
    assert train(captions, 1300, tmp_path / "t.json") <= 1300


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"model": {"type": "BPE"}, "normalizer": {}}'])
def test_tokenizer_rejects_missing_or_invalid_file(tmp_path, text):
    file = tmp_path / "tokenizer.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match="tokenizer.json"):
        Tokenizer(file, 32, False)


def test_tokenizer_rejects_file_if_pad_is_not_id_0(path, tmp_path):
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["[PAD]"], vocabulary["[UNK]"] = vocabulary["[UNK]"], vocabulary["[PAD]"]
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="id 0"):
        Tokenizer(tmp_path / "t.json", 32, False)


@pytest.mark.parametrize("trainer", [train, train_byte_pairs])
def test_training_accepts_lone_surrogates(tmp_path, trainer):
    """JSON texts that were cut inside a pair of UTF-16 contain them."""
    assert trainer([*CAPTIONS, "nice \ud83d"], 600, tmp_path / "tokenizer.json") > 0
