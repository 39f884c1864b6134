"""Tests truncation, frequency and syntax masking of text, and the token table that the last two need."""

import json
from dataclasses import replace

import numpy as np
import pytest

from flip.config.schema import Data
from flip.data import masking
from flip.data.masking import MaskSpec
from flip.data.text_masking import TEXT_MASKINGS, FrequencyMasking, SyntaxMasking
from flip.data.token_table import ADJECTIVE, CONTINUATION, NOUN, OTHER, TokenTable, count_tokens
from flip.runs.errors import ConfigError
from flip.tokenizer import Tokenizer, train_byte_pairs
from tests.synthetic import make_tokenizer

LENGTH = 12
KEPT = 5


def visible(way, tokens, n=1, seed=9):
    rows = np.tile(np.array(tokens, np.int32), (n, 1))
    return masking.visible_tokens(seed, np.zeros(n), np.arange(n), rows, MaskSpec(1, KEPT, way))


def test_names_of_text_maskings_are_those_of_sweep_files():
    assert list(TEXT_MASKINGS) == ["random", "truncation", "prioritised", "frequency", "syntax"]


def test_truncation_keeps_the_first_positions():
    assert visible(TEXT_MASKINGS["truncation"](), [7] * LENGTH, 3).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_frequency_masking_prefers_padding_to_dropped_frequent_tokens():
    keep = np.array([1.0, 1.0, 0.25, 1.0])  # by id: padding, [CLS], a frequent word, a rare one
    way = FrequencyMasking(keep)
    tokens = [1, 2, 2, 2, 2, 2, 3, 3, 0, 0, 0, 0]
    rows = visible(way, tokens, 4000)
    frequent, rare, padding = (((rows >= a) & (rows < b)).sum(axis=1) for a, b in ((1, 6), (6, 8), (8, LENGTH)))
    undropped = np.random.default_rng(0).binomial(5, 0.25, 10**6)  # 4 places for these and 2 rare words
    assert frequent.mean() == pytest.approx(np.minimum(undropped, undropped * 4 / (undropped + 2)).mean(), abs=0.05)
    assert (rare[padding > 0] == 2).all(), "the mask drops padding before rare words"
    # Padding fills the other positions, not a dropped word.
    assert (padding == np.maximum(2 - frequent, 0))[rare == 2].all()
    assert (visible(way, tokens, 4000) == rows).all() and (visible(way, tokens, 4000, seed=8) != rows).any()


def test_syntax_masking_prefers_nouns_then_adjectives_then_other_words():
    parts = np.array([CONTINUATION, CONTINUATION, OTHER, ADJECTIVE, NOUN, CONTINUATION], np.int8)
    #           CLS a  red dog ##s and old house pad
    tokens = [1, 2, 3, 4, 5, 2, 3, 4, 0, 0, 0, 0]
    rows = visible(SyntaxMasking(parts), tokens, 200)
    assert (np.sort(rows[:, :1], axis=1) == 0).all()
    kept_positions = [set(row) for row in rows.tolist()]
    assert all({0, 3, 4, 7} <= row for row in kept_positions), "the mask keeps nouns and their continuation pieces"
    # The remaining position holds an adjective.
    assert {frozenset(row - {0, 3, 4, 7}) for row in kept_positions} == {frozenset({2}), frozenset({6})}
    short = visible(SyntaxMasking(parts), [1, 2, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    assert {0, 1, 2} <= set(short[0].tolist()), "the mask drops padding first"


@pytest.fixture
def tokenizer(tmp_path):
    return str(make_tokenizer(tmp_path / "tokenizer.json"))


def test_token_table_counts_tokens_and_tags_words(tokenizer, tmp_path):
    pytest.importorskip("textblob")
    tokenize = Tokenizer(tokenizer, 64, prepend_cls=False)
    captions = ["a red circle", "a blue circle", "the red square"]
    table = count_tokens(tokenize, captions, parts_of_speech=True)
    ids = {word: int(tokenize([word])[0][0]) for word in ["a", "red", "circle", "square"]}
    assert [table.counts[ids[word]] for word in ids] == [2, 2, 2, 1] and table.counts[0] == 0
    assert [table.parts[ids[word]] for word in ids] == [OTHER, ADJECTIVE, NOUN, NOUN]
    path = tmp_path / "table.json"
    table.write(path)
    assert TokenTable.read(str(path), tokenizer) == table
    data = Data(tokenizer=tokenizer, token_table=str(path), frequency_threshold=0.1)
    keep = FrequencyMasking.of(data).keep
    assert keep[ids["a"]] == pytest.approx((0.1 / (2 / sum(table.counts))) ** 0.5) and keep[0] == 1
    assert SyntaxMasking.of(data).parts.tolist() == table.parts


def test_token_table_nested_too_deeply_is_refused(tokenizer, tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"counts": ' + "[" * 200_000)
    with pytest.raises(ConfigError, match=r"data\.token_table: cannot be read.*recursion.*flip tokenizer table"):
        TokenTable.read(str(path), tokenizer)


def test_token_table_leaves_out_start_and_end_of_byte_pairs(tmp_path):
    """Evaluation always has them, so text_masking: frequency must not drop them."""
    path = tmp_path / "bpe.json"
    train_byte_pairs(["a red circle"], 600, path)
    tokenize = Tokenizer(path, 8, prepend_cls=False)
    table = count_tokens(tokenize, ["a a", "a"], parts_of_speech=False)
    start, a, end = tokenize(["a"])[0][:3]
    assert table.counts[a] == sum(table.counts) == 3 and table.counts[start] == table.counts[end] == 0
    table.write(tmp_path / "table.json")
    keep = FrequencyMasking.of(Data(tokenizer=str(path), token_table=str(tmp_path / "table.json"))).keep
    assert keep[start] == keep[end] == 1 > keep[a]


def test_token_table_is_rejected_if_missing_damaged_or_foreign(tokenizer, tmp_path):
    path = tmp_path / "table.json"
    table = count_tokens(Tokenizer(tokenizer, 64, prepend_cls=False), ["a red circle"], parts_of_speech=False)
    table.write(path)
    data = Data(tokenizer=tokenizer, token_table=str(path))
    assert FrequencyMasking.of(data)
    with pytest.raises(ConfigError, match="no parts of speech"):
        SyntaxMasking.of(data)
    with pytest.raises(ConfigError, match="is not given"):
        FrequencyMasking.of(replace(data, token_table=""))
    with pytest.raises(ConfigError, match="cannot be read"):
        FrequencyMasking.of(replace(data, token_table=str(tmp_path / "none.json")))
    replace(table, tokenizer="sha256:other").write(path)
    with pytest.raises(ConfigError, match="another tokenizer"):
        FrequencyMasking.of(data)
    invalid_tables = replace(table, counts=[-1] * len(table.counts)), replace(table, parts=[7] * len(table.counts))
    for damaged in (
        *(json.dumps(vars(invalid)) for invalid in invalid_tables),
        "[]",
        "{",
        json.dumps({"tokenizer": 1, "counts": ["a"]}),
        json.dumps({"tokenizer": "x"}),
    ):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match="cannot be read"):
            FrequencyMasking.of(data)
