"""Captions -> token ids, by the `tokenizers` package and one tokenizer.json for training, evaluation and export.

A caption is cleaned (HTML entities unescaped twice, white space collapsed; in recipe portable broken encodings are
repaired first), split into lower-case WordPiece, cut to the length, filled with id 0. No [SEP]; [CLS] first in recipe
portable.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Loader processes are many: each tokenises with one thread of its own. Read when the package first encodes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import ftfy  # noqa: E402
import tokenizers  # noqa: E402
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

from flip.config.schema import TextTower  # noqa: E402
from flip.runs.errors import ConfigError  # noqa: E402
from flip.runs.ownership import read_regular  # noqa: E402
from flip.runs.rundir import write_text  # noqa: E402

UNKNOWN = "[UNK]"
SPECIAL = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000
LIMIT = 16 << 20
"""Bytes of a tokenizer.json. BERT's has 0.5 MB."""
RAW_LIMIT, TEXT_LIMIT = 1 << 20, 1 << 16
"""Characters of a text that are read, before and after it is cleaned: encoding takes 280 bytes for each."""
KNOWN = 100_000
"""Words whose ids are kept; a caption of ten such words takes an eighth of the time."""
_WORD = re.compile(r"[a-z0-9]+|[!-/:-@\[-`{-~]")
"""What BertPreTokenizer makes of printable lower-case ASCII: punctuation stands alone."""
REMEDY = "Make one: python tools/tokenizer.py train"
BERT = re.compile(r"(^|/)bert-([a-z]+-)?uncased/")
"""The folder of a file that is published, as recipe paper names it."""
PUBLISHED = (
    "BERT's published one belongs there, and one that is trained here would make another model: docs/reproduce.md says"
    " where it comes from."
)


def clean(text: str, repair: bool = False) -> str:
    """``repair``: broken encodings and odd quotes first, by ftfy: with it, what open_clip does to every text."""
    if repair and not (text.isascii() and text.isprintable() and "&" not in text):  # of those ftfy changes nothing
        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


class Tokenizer:
    """Raises ConfigError where ``path`` is missing, damaged, or its [PAD] is not id 0. ``repair``: as in ``clean``."""

    def __init__(self, path: str | os.PathLike[str], length: int, prepend_cls: bool, repair: bool = False) -> None:
        self.path, self.length, self._repair = str(path), length, repair
        self._inner, self._known = _read(Path(path)), dict[str, list[int]]()
        self._first = [self._id("[CLS]")] if prepend_cls else []
        if self._id("[PAD]") != 0:
            raise ConfigError("[PAD] is not id 0", self.path, self._id("[PAD]"), _remedy(self.path))

    @classmethod
    def of(cls, path: str | os.PathLike[str], tower: TextTower) -> Tokenizer:
        """As a model's text tower needs it."""
        return cls(path, tower.length, tower.prepend_cls, tower.repair)

    @property
    def size(self) -> int:
        """Number of token ids; the text tower's vocabulary must not be smaller."""
        return self._inner.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """(n, length) int32."""
        rows = np.zeros((len(texts), self.length), dtype=np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = (self._first + self._ids(clean(text[:RAW_LIMIT], self._repair)[:TEXT_LIMIT]))[: self.length]
            row[: len(ids)] = ids
        return rows

    def _ids(self, text: str) -> list[int]:
        """All of a text that is clean; in lower-case ASCII words stand alone, and most have come before."""
        if not (text.isascii() and text.isprintable()):
            return self._encode(text)
        found = list[int]()
        for word in _WORD.findall(text.lower()):
            ids = self._known.get(word)
            if ids is None:
                if len(self._known) == KNOWN:
                    self._known.clear()
                ids = self._known[word] = self._encode(word)
            found += ids
        return found

    def _encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # half of a pair: JSON and command lines may hold it, UTF-8 not
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, id: int) -> str:
        """The entry of an id."""
        return str(self._inner.id_to_token(id))

    def to_json(self) -> str:
        """A tokenizer.json that gives others the same ids: what counts of ours, and [CLS] first as a template.

        Cutting and filling to the length, and cleaning, are the reader's.
        """
        whole: Any = tokenizers.Tokenizer.from_str(self._inner.to_str())
        if self._first:
            special = [("[CLS]", self._first[0])]
            whole.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=special)
        return json.dumps(json.loads(whole.to_str()), ensure_ascii=False, indent=1) + "\n"

    def _id(self, token: str) -> int:
        found = self._inner.token_to_id(token)
        if found is None:
            raise ConfigError(f"has no {token}", self.path, remedy=_remedy(self.path))
        return found


def _read(path: Path) -> tokenizers.Tokenizer:
    """The vocabulary and the normaliser's switches of a file; nothing else of it counts, no template, no padding."""
    try:
        content = json.loads(read_regular(path, LIMIT).decode("utf-8"))
        model, normalizer = content["model"], dict(content["normalizer"])
        # files of 2020, and BERT's published one is of them, do not say their type; no other model has that field
        kind = model.get("type", "WordPiece" if "max_input_chars_per_word" in model else "")
        if (kind, normalizer.pop("type")) != ("WordPiece", "BertNormalizer") or not normalizer["lowercase"]:
            raise ValueError("not lower-case WordPiece")
        if sorted(model["vocab"].values()) != list(range(len(model["vocab"]))):
            raise ValueError("its ids are not 0, 1, 2, ...")
        return _wordpiece(model["vocab"], **normalizer)
    except FileNotFoundError as error:
        raise ConfigError("no such tokenizer", str(path), remedy=_remedy(path)) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, TypeError)) else str(error)
        what = f"is no tokenizer.json that can be used: {problem}"
        raise ConfigError(what, str(path), remedy=_remedy(path)) from error


def _remedy(path: str | os.PathLike[str]) -> str:
    return PUBLISHED if BERT.search(os.fspath(path)) else REMEDY


def _wordpiece(vocabulary: dict[str, int], **switches: Any) -> tokenizers.Tokenizer:
    model: Any = models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100)
    inner: Any = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.BertNormalizer(**switches)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return inner


def train(texts: Iterable[str], vocabulary: int, path: str | os.PathLike[str]) -> int:
    """Write a lower-case WordPiece tokenizer.json learnt from the captions, and return its number of entries.

    The same captions in any order give the same file. The ids of SPECIAL come first, [PAD] is 0. There may be fewer
    than ``vocabulary`` entries where the captions hold no more; the commonest ALPHABET characters are always there.
    """
    inner = _wordpiece({}, lowercase=True)
    lines = sorted(clean(text) for text in texts)
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for line in lines:
        for word, _ in inner.pre_tokenizer.pre_tokenize_str(inner.normalizer.normalize_str(line)):
            counts.update(word)
            inside.update(word[1:])
    letters = sorted(sorted(counts), key=counts.__getitem__, reverse=True)[:ALPHABET]
    # The trainer takes letters, and numbers those inside words, as a hash map happens to list them, and breaks ties by
    # those numbers. Naming both beforehand makes the result a function of the captions.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *sorted("##" + letter for letter in inside.intersection(letters))],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    inner.train_from_iterator(lines, trainer)
    content = json.loads(inner.to_str())
    content["added_tokens"] = []  # else other readers of the file would find "[PAD]" in the letters of a caption
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return len(content["model"]["vocab"])
