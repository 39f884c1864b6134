"""Captions to token ids: lower-case WordPiece or byte pairs by the `tokenizers` package, the same in training,
evaluation and export.

A caption is cleaned (HTML entities unescaped twice, white space collapsed; in recipe portable, encoding errors are
repaired first), tokenised, cut to the length and padded with id 0. WordPiece: no [SEP]; in recipe portable it starts
with [CLS]. Byte pairs (recipe clip): it stands between a start and an end token, which is never cut.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Each of many loader processes tokenises with one thread. Read when the package first encodes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import ftfy  # noqa: E402
import ftfy.chardata  # noqa: E402
import tokenizers  # noqa: E402
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

from flip.config.schema import TextTower  # noqa: E402
from flip.files.creation import read_regular  # noqa: E402
from flip.runs.errors import ConfigError, read_error  # noqa: E402
from flip.runs.rundir import write_text  # noqa: E402

UNKNOWN = "[UNK]"
SPECIAL = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
MAX_ALPHABET = 1000
START = "<|startoftext|>"
END = "<|endoftext|>"
"""Special tokens of byte pairs, as transformers names them; their ids are the highest."""
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [chr(byte) for byte in _PRINTABLE] + [chr(256 + i) for i in range(256 - len(_PRINTABLE))]
"""The characters that stand for the 256 bytes in a byte-pair vocabulary, by id: printable ones, then the others."""
WORD_END = "</w>"
"""Ends the last piece of a word."""
CLIP_VOCABULARY = "7cccc44d334555d1ff3c0ac5f0246b428fab2918383e77ee745cf30d41010b78"
"""SHA-256 of the lines of CLIP's 49,408 entries."""
CLIP_MERGES = 48_894
"""Pairs that CLIP uses of the 262,143 in its published file: 49,408 entries with 512 bytes and two special tokens."""
MAX_FILE_BYTES = 16 << 20
"""Of a tokenizer.json, or of CLIP's published file unpacked; BERT's has 0.5 MB, CLIP's 3.2 MB."""
RAW_LIMIT = 1 << 20
TEXT_LIMIT = 1 << 16
"""Characters read of a text, before and after cleaning: encoding needs 280 bytes per character."""
MAX_CACHED_WORDS = 100_000
"""Words whose ids are cached; a caption of ten cached words takes an eighth of the time."""
_NEITHER = "neither byte pairs nor lower-case WordPiece"
_WORD = re.compile(r"[a-z0-9]+|[!-/:-@\[-`{-~]")
"""The words of BertPreTokenizer in printable lower-case ASCII: each punctuation mark is a word."""
_BYTE_PAIR_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
"""The same for byte pairs. ``_UNICODE_WORD`` without the restriction to ASCII."""
_UNICODE_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BERT = re.compile(r"(^|/)bert-([a-z]+-)?uncased/")
"""The folder of BERT's published file, as recipe paper names it."""


def clean(text: str, repair: bool = False) -> str:
    """Unescape HTML entities and collapse white space. ``repair``: fix encodings first by ftfy, as open_clip."""
    if repair and not (text.isascii() and text.isprintable() and "&" not in text):  # ftfy changes none of these
        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


class TokenizerKind(ABC):
    """One kind of tokenizer: how it is read and trained, and what surrounds the tokens of a caption."""

    title: str
    """Its name in messages."""
    has_end: bool
    """Captions end with a token of the highest id, which a causal text tower pools; padding follows it. False: padding
    is id 0, and the tower is not causal."""
    word: re.Pattern[str]
    """The words of printable lower-case ASCII, which are tokenised independently."""
    smallest: int
    """Entries of any vocabulary that it trains."""

    @abstractmethod
    def describes(self, model: Mapping[str, Any]) -> bool:
        """Whether ``model`` of a tokenizer.json is of this kind."""

    @abstractmethod
    def read(self, content: Mapping[str, Any]) -> tokenizers.Tokenizer:
        """The tokenizer of a tokenizer.json. Raises ValueError, KeyError or TypeError if it cannot be used."""

    @abstractmethod
    def surrounds(self, prepend_cls: bool) -> tuple[list[str], list[str]]:
        """Special tokens before and after a caption's own."""

    @abstractmethod
    def fixed_token(self, size: int) -> tuple[str, int]:
        """A token whose id of ``size`` is fixed, and that id."""

    @abstractmethod
    def train(self, texts: Iterable[str], vocabulary: int, path: str | os.PathLike[str]) -> int:
        """Train a tokenizer.json on captions and return its number of entries, at most ``vocabulary``."""

    def prepare(self, text: str) -> str:
        """A clean text as the tokenizer expects it."""
        return text

    def normalizer(self, cleaning: list[Any], repair: bool, own: Any) -> Any:
        """That of an exported tokenizer.json: ``cleaning``, then ``own``, which the tokenizer has."""
        if cleaning:
            return normalizers.Sequence([*cleaning, own])
        return own

    def without_padding(self, row: NDArray[np.int32]) -> NDArray[np.int32]:
        """The tokens of one row of ids."""
        if self.has_end:
            return row[: row.argmax() + 1]
        return row[row != 0]


class WordPiece(TokenizerKind):
    """Lower-case WordPiece, as BERT's. No [SEP]; [PAD] is id 0."""

    title = "WordPiece"
    has_end = False
    word = _WORD
    smallest = len(SPECIAL)

    def describes(self, model: Mapping[str, Any]) -> bool:
        # Files of 2020, BERT's published one included, have no type; only WordPiece has max_input_chars_per_word.
        return bool(model.get("type", "WordPiece" if "max_input_chars_per_word" in model else "") == "WordPiece")

    def read(self, content: Mapping[str, Any]) -> tokenizers.Tokenizer:
        normalizer = dict(content["normalizer"])
        if normalizer.pop("type") != "BertNormalizer" or not normalizer["lowercase"]:
            raise ValueError(_NEITHER)
        vocabulary = content["model"]["vocab"]
        _check_ids(vocabulary)
        return _wordpiece(vocabulary, **normalizer)

    def surrounds(self, prepend_cls: bool) -> tuple[list[str], list[str]]:
        return ["[CLS]"] * prepend_cls, []

    def fixed_token(self, size: int) -> tuple[str, int]:
        return "[PAD]", 0

    def train(self, texts: Iterable[str], vocabulary: int, path: str | os.PathLike[str]) -> int:
        return train(texts, vocabulary, path)


class BytePairs(TokenizerKind):
    """Lower-case byte pairs, as CLIP's, between a start and an end token."""

    title = "byte pairs"
    has_end = True
    word = _BYTE_PAIR_WORD
    smallest = 2 * len(BYTES) + 2

    def describes(self, model: Mapping[str, Any]) -> bool:
        return "merges" in model

    def read(self, content: Mapping[str, Any]) -> tokenizers.Tokenizer:
        model = content["model"]
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        return _byte_pairs(merges, model["vocab"])

    def surrounds(self, prepend_cls: bool) -> tuple[list[str], list[str]]:
        return [START], [END]

    def fixed_token(self, size: int) -> tuple[str, int]:
        return END, size - 1

    def train(self, texts: Iterable[str], vocabulary: int, path: str | os.PathLike[str]) -> int:
        return train_byte_pairs(texts, vocabulary, path)

    def prepare(self, text: str) -> str:
        return text.lower()

    def normalizer(self, cleaning: list[Any], repair: bool, own: Any) -> Any:
        composed = [normalizers.NFC()] if repair else []
        return normalizers.Sequence([*cleaning, *composed, normalizers.Lowercase()])


#: ``--kind`` of ``flip tokenizer train`` -> kind. A tokenizer.json states its own by ``model``.
TOKENIZERS: dict[str, TokenizerKind] = {
    "wordpiece": WordPiece(),
    "bpe": BytePairs(),
}


class Tokenizer:
    """A tokenizer.json of a kind in ``TOKENIZERS``, or CLIP's published file of byte pairs.

    Raises ConfigError if it is missing or damaged, its [PAD] is not id 0, or its end token is not the highest id.
    ``length``: positions of a caption. ``prepend_cls``: start with [CLS] (WordPiece). ``repair``: as in ``clean``.
    """

    def __init__(self, path: str | os.PathLike[str], length: int, prepend_cls: bool, repair: bool = False) -> None:
        self.path = str(path)
        self.length = length
        self._repair = repair
        self.kind, self._tokenizer = _read(Path(path))
        self._word_ids = dict[str, list[int]]()
        first, last = self.kind.surrounds(prepend_cls)
        self._prefix = list(map(self._id, first))
        self._suffix = list(map(self._id, last))
        token, id = self.kind.fixed_token(self.size)
        if self._id(token) != id:
            raise ConfigError(f"{token} is not id {id}", self.path, self._id(token), _remedy(self.path))

    @classmethod
    def of(cls, path: str | os.PathLike[str], tower: TextTower) -> Tokenizer:
        """The tokenizer of a text tower. Raises ConfigError also if it is of a kind that does not fit the tower."""
        tokenizer = cls(path, tower.length, tower.prepend_cls, tower.repair)
        if tokenizer.kind.has_end != tower.causal:
            fitting = " or ".join(kind.title for kind in TOKENIZERS.values() if kind.has_end == tower.causal)
            what = f"is a tokenizer of {tokenizer.kind.title}, but model.text.causal is {str(tower.causal).lower()}"
            raise ConfigError(what, tokenizer.path, remedy=f"Use one of {fitting}, or another recipe.")
        return tokenizer

    @property
    def size(self) -> int:
        """Number of token ids; at most the vocabulary of the text tower."""
        return self._tokenizer.get_vocab_size()

    @property
    def is_published(self) -> bool:
        """Whether these are CLIP's byte pairs, which open_clip and transformers have."""
        entries = "\n".join(map(self.piece, range(self.size)))
        return self.kind is TOKENIZERS["bpe"] and hashlib.sha256(entries.encode()).hexdigest() == CLIP_VOCABULARY

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """(n, length) int32 token ids."""
        rows = np.zeros((len(texts), self.length), dtype=np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = self._prefix + self._ids(clean(text[:RAW_LIMIT], self._repair)[:TEXT_LIMIT])
            ids = ids[: self.length - len(self._suffix)] + self._suffix
            row[: len(ids)] = ids
        return rows

    def _ids(self, text: str) -> list[int]:
        """Ids of a clean text. In ASCII, words are tokenised independently, so that their ids can be cached."""
        if not (text.isascii() and text.isprintable()):
            return self._encode(self.kind.prepare(text))
        ids = list[int]()
        for word in self.kind.word.findall(text.lower()):
            if word not in self._word_ids:
                if len(self._word_ids) == MAX_CACHED_WORDS:
                    self._word_ids.clear()
                self._word_ids[word] = self._encode(word)
            ids += self._word_ids[word]
        return ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(_without_surrogates(text), add_special_tokens=False).ids
        return ids

    def without_padding(self, row: NDArray[np.int32]) -> NDArray[np.int32]:
        """The tokens of one row of ids."""
        return self.kind.without_padding(row)

    @property
    def start(self) -> int:
        """Position of a caption's first token, after those that start every caption."""
        return len(self._prefix)

    def own_tokens(self, row: NDArray[np.int32]) -> NDArray[np.int32]:
        """The tokens of one row of ids without padding and without those that surround every caption."""
        ids = self.without_padding(row)
        return ids[len(self._prefix) : len(ids) - len(self._suffix)]

    def piece(self, id: int) -> str:
        """The vocabulary entry of an id."""
        return str(self._tokenizer.id_to_token(id))

    def to_json(self, normalized: bool = False) -> str:
        """A tokenizer.json with the same ids, special tokens as a template; it does not cut or pad.

        ``normalized``: it also does the part of ``clean`` that normalizers of ``tokenizers`` can do.
        """
        exported: Any = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        steps: list[Any] = []
        if normalized:
            steps = _cleaning(self._repair)
        exported.normalizer = self.kind.normalizer(steps, self._repair, exported.normalizer)
        special = {self.piece(id): id for id in self._prefix + self._suffix}
        if special:
            template = " ".join([*list(special)[:1], "$A", *list(special)[1:]])
            exported.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=list(special.items())
            )
        return json.dumps(json.loads(exported.to_str()), ensure_ascii=False, indent=1) + "\n"

    def _id(self, token: str) -> int:
        id = self._tokenizer.token_to_id(token)
        if id is None:
            raise ConfigError(f"has no {token}", self.path, remedy=_remedy(self.path))
        return id


def _read(path: Path) -> tuple[TokenizerKind, tokenizers.Tokenizer]:
    """Uses the vocabulary and the normaliser's options of a file only, not its template or padding."""
    try:
        data = read_regular(path, MAX_FILE_BYTES)
        if data.startswith(b"\x1f\x8b"):
            return TOKENIZERS["bpe"], _byte_pairs(_published_merges(data))
        content = json.loads(data.decode("utf-8"))
        model = content["model"]
        kind = next((kind for kind in TOKENIZERS.values() if kind.describes(model)), None)
        if kind is None:
            raise ValueError(_NEITHER)
        return kind, kind.read(content)
    except FileNotFoundError as error:
        raise ConfigError("no such tokenizer", str(path), remedy=_remedy(path)) from error
    except OSError as error:
        raise read_error(error, "cannot be read", path) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, (KeyError, TypeError)):
            problem = f"{type(error).__name__}: {error}"
        else:
            problem = str(error)
        what = f"is no tokenizer.json that can be used: {problem}"
        raise ConfigError(what, str(path), remedy=_remedy(path)) from error


def _check_ids(vocabulary: dict[str, int]) -> None:
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError("its ids are not 0, 1, 2, ...")


def _published_merges(data: bytes) -> list[tuple[str, ...]]:
    """The pairs that CLIP uses of bpe_simple_vocab_16e6.txt.gz: one a line, after a heading."""
    try:
        with gzip.open(io.BytesIO(data)) as file:
            lines = file.read(MAX_FILE_BYTES).decode("utf-8").splitlines()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot be unpacked: {error}") from error
    return [tuple(line.split()) for line in lines[1 : 1 + CLIP_MERGES]]


def _byte_pairs(merges: Sequence[tuple[str, ...]], vocabulary: dict[str, int] | None = None) -> tokenizers.Tokenizer:
    """``vocabulary``: default, bytes, bytes at the end of a word, merged pairs in their order, START, END."""
    if vocabulary is None:
        pieces = dict.fromkeys([*BYTES, *(byte + WORD_END for byte in BYTES), *map("".join, merges), START, END])
        vocabulary = {piece: id for id, piece in enumerate(pieces)}
    _check_ids(vocabulary)
    if not vocabulary.keys() >= {byte + end for byte in BYTES for end in ("", WORD_END)}:
        raise ValueError(f"not byte pairs of words that end in {WORD_END}")
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError(f"its pair {' '.join(pair)!r} is not of two entries that make a third")
    model: Any = models.BPE(vocabulary, list[Any](merges), end_of_word_suffix=WORD_END)
    tokenizer: Any = tokenizers.Tokenizer(model)
    words = pre_tokenizers.Split(tokenizers.Regex(_UNICODE_WORD), behavior="removed", invert=True)
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _remedy(path: str | os.PathLike[str]) -> str:
    if _BERT.search(os.fspath(path)):
        return "Put BERT's published file there (docs/reproduce.md has its source); one trained here is another model."
    return "Make one: flip tokenizer train"


def _wordpiece(vocabulary: dict[str, int], **options: Any) -> tokenizers.Tokenizer:
    model: Any = models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100)
    tokenizer: Any = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _cleaning(repair: bool) -> list[Any]:
    """Normalizers for the parts of ``clean`` that replace characters one by one, in the order of ftfy.

    Left out are HTML entities, broken encodings and full-width characters, which ``flip.export.differences`` names.
    """
    if not repair:  # ``str.split`` counts these as white space, the regular expressions of ``tokenizers`` do not
        return [_replace(r"[\x1C-\x1F\u0085]", " ")]
    ligatures = [normalizers.Replace(chr(code), text) for code, text in sorted(ftfy.chardata.LIGATURES.items())]
    return [
        _replace(r"\x1B\[[0-9;]*[a-zA-Z]", ""),  # escape sequences of terminals
        *ligatures,
        _replace(r"[\u02BC\u2018-\u201B]", "'"),
        _replace(r"[\u201C-\u201F]", '"'),
        _replace(r"[\x00-\x08\x0B\x0E-\x1F\x7F\u206A-\u206F\uFEFF\uFFF9-\uFFFC]", ""),
    ]


def _replace(pattern: str, text: str) -> Any:
    return normalizers.Replace(tokenizers.Regex(pattern), text)


def _without_surrogates(text: str) -> str:
    """``text`` with ? in place of lone surrogates, which JSON and command lines may contain."""
    return text.encode("utf-8", "replace").decode()


def train_byte_pairs(texts: Iterable[str], vocabulary: int, path: str | os.PathLike[str]) -> int:
    """Train a lower-case byte-pair tokenizer.json of CLIP's kind on captions and return its number of entries.

    As ``train``; the entries are 512 for bytes, merged pairs, and at the end START and END.
    """
    tokenizer: Any = _byte_pairs([])
    # Listing all bytes beforehand fixes their numbers, by which the trainer breaks ties.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=[byte + end for end in ("", WORD_END) for byte in BYTES],
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(_without_surrogates(clean(text).lower()) for text in texts), trainer)
    tokenizer = _byte_pairs([tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    write_text(path, json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1) + "\n")
    return int(tokenizer.get_vocab_size())


def train(texts: Iterable[str], vocabulary: int, path: str | os.PathLike[str]) -> int:
    """Train a lower-case WordPiece tokenizer.json on captions and return its number of entries.

    The file does not depend on the order of captions. The ids of SPECIAL come first, [PAD] is 0. There are fewer than
    ``vocabulary`` entries if the captions do not contain more. The most common MAX_ALPHABET characters are entries, at
    the start of a word and inside. Raises ConfigError if ``vocabulary`` has no room for words beside them.
    """
    tokenizer = _wordpiece({}, lowercase=True)
    lines = sorted(_without_surrogates(clean(text)) for text in texts)
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for line in lines:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(line)):
            counts.update(word)
            inside.update(word[1:])
    letters = sorted(sorted(counts), key=counts.__getitem__, reverse=True)[:MAX_ALPHABET]
    later = sorted("##" + letter for letter in inside.intersection(letters))
    fixed = len(SPECIAL) + len(letters) + len(later)
    if vocabulary <= fixed:
        what = f"the captions have {len(letters)} different characters, which need {fixed} entries"
        raise ConfigError(what, "--vocabulary", vocabulary, f"Give more than {fixed}, for pieces of words.")
    # The trainer orders letters, and letters inside words, by a hash map and breaks ties by their numbers. Listing both
    # beforehand makes the result a function of the captions.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *later],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []  # otherwise other readers would parse "[PAD]" in a caption
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return len(content["model"]["vocab"])
