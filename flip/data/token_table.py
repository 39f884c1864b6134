"""The token table of a data set: how often each token occurs in its captions, and which part of speech it is.

``flip tokenizer table`` writes it as JSON; ``text_masking: frequency`` and ``syntax``, and stages with
``classification`` read it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flip.config.identity import file_digest
from flip.files.creation import read_regular
from flip.runs.errors import ConfigError, read_error
from flip.runs.rundir import write_text

if TYPE_CHECKING:
    from flip.tokenizer import Tokenizer

NOUN = 0
ADJECTIVE = 1
OTHER = 2
CONTINUATION = -1
"""Parts of speech; CONTINUATION: the token continues a word and has the part of that word."""
MAX_BYTES = 16 << 20
LONGEST = 256
"""Tokens of a caption that are counted."""


@dataclass(frozen=True)
class TokenTable:
    """Statistics of the tokens of a vocabulary, by id."""

    tokenizer: str
    """Digest of the tokenizer.json."""
    counts: list[int]
    parts: list[int]
    """NOUN, ADJECTIVE, OTHER or CONTINUATION of every token; empty: unknown."""
    captions: int
    """Captions that were counted."""
    documents: list[int]
    """Captions that contain a token, by id."""

    @classmethod
    def read(cls, path: str, tokenizer: str) -> TokenTable:
        """Read a table. Raises ConfigError if it is missing, damaged or of another tokenizer than that path."""
        from flip.tokenizer import Tokenizer  # brings a library that masking without a table does not need

        remedy = "Make it: flip tokenizer table TOKENIZER --captions ... --out FILE."
        if not path:
            raise ConfigError("data.token_table: is not given", remedy=remedy)
        try:
            table = cls(**json.loads(read_regular(Path(path), MAX_BYTES)))
            size = Tokenizer(tokenizer, 1, prepend_cls=False).size
            rows = table.counts, table.parts or table.counts, table.documents
            if not all(isinstance(v, int) and v >= 0 for v in (table.captions, *table.counts, *table.documents)):
                raise ValueError("it has a value that is not a count")
            if not all(part in (NOUN, ADJECTIVE, OTHER, CONTINUATION) for part in table.parts):
                raise ValueError("it has a value that is no part of speech")
            if table.captions < max(table.documents, default=0):
                raise ValueError("more captions contain a token than were counted")
        except OSError as error:
            raise read_error(error, "data.token_table: cannot be read", path, remedy) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError("data.token_table: cannot be read", path, str(error), remedy) from error
        if table.tokenizer != file_digest(tokenizer) or {len(row) for row in rows} != {size}:
            raise ConfigError("data.token_table: is the table of another tokenizer", path, tokenizer, remedy)
        return table

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(dataclasses.asdict(self)) + "\n")

    def shares(self) -> NDArray[np.float64]:
        """Share of every token in all tokens, without padding (id 0)."""
        counts = np.array(self.counts, np.float64)
        counts[0] = 0
        return counts / max(counts.sum(), 1)

    def rarities(self) -> NDArray[np.float64]:
        """log((N + 1) / (n + 1)) of every token, which n of N captions contain, as SuperCLIP weights them."""
        return np.log((self.captions + 1) / (np.array(self.documents, np.float64) + 1))


def count_tokens(tokenizer: Tokenizer, captions: Iterable[str], parts_of_speech: bool) -> TokenTable:
    """The table of captions. ``parts_of_speech``: the most frequent part of a token, by TextBlob's tagger."""
    counts = np.zeros(tokenizer.size, np.int64)
    documents = np.zeros(tokenizer.size, np.int64)
    total = 0
    votes = np.zeros((tokenizer.size, OTHER + 1), np.int64)
    tag = _tagger() if parts_of_speech else None
    for caption in captions:
        # without what every caption has, which would be dropped
        ids = tokenizer.own_tokens(tokenizer([caption])[0])
        counts += np.bincount(ids, minlength=len(counts))
        documents[np.unique(ids)] += 1
        total += 1
        tagged = []
        if tag:
            tagged = tag(caption)
        for word, name in tagged:
            if name.startswith("NN"):
                part = NOUN
            else:
                part = ADJECTIVE if name.startswith("JJ") else OTHER
            votes[tokenizer([word])[0][tokenizer.start], part] += 1
    parts = votes.argmax(axis=1)
    parts[votes.sum(axis=1) == 0] = CONTINUATION
    known = parts.tolist() if parts_of_speech else []
    return TokenTable(file_digest(tokenizer.path), counts.tolist(), known, total, documents.tolist())


def _tagger() -> Callable[[str], list[tuple[str, str]]]:
    """TextBlob's tagger, which has its lexicon in its package: caption -> (word, Penn Treebank tag)."""
    try:
        from textblob.en import tag
    except ModuleNotFoundError as error:
        remedy = "pip install textblob"
        raise ConfigError("parts of speech need the package textblob", remedy=remedy) from error
    return lambda caption: tag(caption)  # type: ignore[no-any-return]
