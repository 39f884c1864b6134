"""Which positions of a caption a text mask keeps: one class for each value of ``text_masking`` of a stage.

A way ranks the positions of captions. The lowest ranks stay; equal ones by the counter hash. Ranks are a pure function
of seed, epoch, sample id and tokens. A new way is a class here and a row of ``TEXT_MASKINGS``, or a class in a user's
file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.common import user_classes
from flip.config.schema import Data
from flip.data.token_table import NOUN, TokenTable
from flip.rng import key, uniform
from flip.runs.errors import ConfigError

Ranks = NDArray[np.int64]
WORD = 7
"""Purpose of the draw that drops frequent words (docs/contracts.md, Randomness)."""


@dataclass(frozen=True)
class Captions:
    """Captions whose positions are ranked, and the counters of their draws."""

    seed: int
    epochs: Any
    """(n, 1)"""
    ids: Any
    """(n, 1)"""
    tokens: NDArray[np.int32]
    """(n, T) token ids."""
    padding: NDArray[np.bool_]
    """(n, T)"""


@dataclass(frozen=True)
class TextMasking:
    """Any positions, padding or not; and the base of the other ways."""

    @classmethod
    def of(cls, data: Data) -> TextMasking:
        """The way for a data set. Raises ConfigError if it needs a token table that ``data`` does not have."""
        return cls()

    def ranks(self, captions: Captions) -> Ranks:
        """(n, T): low ranks stay."""
        return np.zeros(captions.tokens.shape, np.int64)


@dataclass(frozen=True)
class Truncation(TextMasking):
    """The first positions."""

    def ranks(self, captions: Captions) -> Ranks:
        return np.broadcast_to(np.arange(captions.tokens.shape[1]), captions.tokens.shape)


@dataclass(frozen=True)
class PrioritisedMasking(TextMasking):
    """Tokens before padding (FLIP, arXiv 2212.00794, Table 1c)."""

    def ranks(self, captions: Captions) -> Ranks:
        return captions.padding.astype(np.int64)


@dataclass(frozen=True)
class FrequencyMasking(TextMasking):
    """Token w is dropped with probability 1 - sqrt(t / f(w)), f being its share of all tokens (CLIPF, arXiv
    2412.16148).

    Tokens that are not dropped stay first, then padding, then the others.
    """

    keep: NDArray[np.float64] = field(repr=False)
    """min(1, sqrt(t / f(w))) of every token id."""

    @classmethod
    def of(cls, data: Data) -> TextMasking:
        shares = TokenTable.read(data.token_table, data.tokenizer).shares()
        with np.errstate(divide="ignore"):  # a token that never occurs is never dropped
            return cls(np.minimum(1.0, np.sqrt(data.frequency_threshold / shares)))

    def ranks(self, captions: Captions) -> Ranks:
        columns = np.arange(captions.tokens.shape[1])
        draws = uniform(key(captions.seed, captions.epochs, captions.ids, WORD, columns))
        return np.where(captions.padding, 1, np.where(draws < self.keep[captions.tokens], 0, 2))


@dataclass(frozen=True)
class SyntaxMasking(TextMasking):
    """Nouns, then adjectives, then other words, then padding (CLIPA, arXiv 2305.07017, section 3.2)."""

    parts: NDArray[np.int8] = field(repr=False)
    """Part of speech of every token id (``TokenTable.parts``)."""

    @classmethod
    def of(cls, data: Data) -> TextMasking:
        table = TokenTable.read(data.token_table, data.tokenizer)
        if not table.parts:
            remedy = "Make it again: flip tokenizer table --parts-of-speech."
            raise ConfigError("has no parts of speech", "data.token_table", data.token_table, remedy)
        return cls(np.array(table.parts, np.int8))

    def ranks(self, captions: Captions) -> Ranks:
        parts = self.parts[captions.tokens].astype(np.int64)
        for t in range(parts.shape[1]):  # a continuation belongs to the word that it continues
            if t:
                before = parts[:, t - 1]
            else:
                before = np.full(len(parts), NOUN)
            parts[:, t] = np.where(parts[:, t] < 0, before, parts[:, t])
        return np.where(captions.padding, parts.max(initial=0) + 1, parts)


#: ``text_masking`` of a stage -> class. ``of(data)`` makes one.
TEXT_MASKINGS: dict[str, type[TextMasking]] = {
    "random": TextMasking,
    "truncation": Truncation,
    "prioritised": PrioritisedMasking,
    "frequency": FrequencyMasking,
    "syntax": SyntaxMasking,
}


def text_masking(name: str) -> type[TextMasking]:
    """The class of ``text_masking`` of a stage. Executes a user's file."""
    return TEXT_MASKINGS.get(name) or user_classes.load(name, TextMasking)
