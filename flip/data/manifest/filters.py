"""Filters of samples: by a list of uids, columns of a shard's parquet file, caption length, and an older manifest.

img2dataset writes NNNNN.parquet next to NNNNN.tar: a row for every link, with the ``key`` of the sample in the tar. A
sample is kept if all filters hold; without a row, or without a value in a column of a filter, it is dropped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.data.manifest.manifest import Manifest
from flip.data.manifest.tar import Sample, SamplePredicate
from flip.data.manifest.uids import UidList
from flip.data.parquet import small_file
from flip.data.storage.base import is_remote
from flip.data.storage.checksums import ETag
from flip.data.storage.client import StorageClient
from flip.runs.errors import ConfigError, DataError, StorageError

Codes = NDArray[np.uint8]
NO_ROW = "no row in the parquet file"
CAPTION = "txt"
NAMES_SHOWN = 20
NAME_SHOWN = 60
"""Names of columns in an error, and characters of each."""
_OTHER_SHARD = "It is not the shard that was indexed: restore it, or index the shards again."
_ORDER = ("<=", ">=", "<", ">")
_FORM = re.compile(r"\s*([^<>=!]+?)\s*(<=|>=|==|!=|<|>)\s*([^<>=!'\"\s](?:.*\S)?)\s*")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_FUNCTIONS = {
    "<=": "less_equal", ">=": "greater_equal", "<": "less", ">": "greater", "==": "equal", "!=": "not_equal",
}  # fmt: skip


@dataclass(frozen=True)
class Filter:
    """COLUMN OP VALUE. Numbers are compared as float64; text has == and != only."""

    column: str
    op: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Raises ConfigError."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise ConfigError(
                "no filter", "--filter", text, "Write COLUMN OP NUMBER, as 'punsafe<0.5'; OP: < <= > >= == !="
            )
        parsed = cls(*match.groups())
        if parsed.op in _ORDER and not _NUMBER.fullmatch(parsed.value):
            raise ConfigError(f"{parsed.op} needs a number", "--filter", text, "Text is compared with == and != alone.")
        return parsed

    def __str__(self) -> str:
        return f"{self.column}{self.op}{self.value}"

    def holds(self, column: Any, where: str) -> Any:
        """Apply to a pyarrow array; null if there is no value. Raises ConfigError if the types do not fit."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = column.type
        if pa.types.is_dictionary(kind):  # each text once, however many rows have it
            return self.holds(column.dictionary, where).take(column.indices)
        if pa.types.is_null(kind):  # the type of a column without any value
            return pa.nulls(len(column), pa.bool_())
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            if not _NUMBER.fullmatch(self.value):
                raise ConfigError(f"the column {self.column} holds numbers", where, str(self))
            value: Any = pa.scalar(float(self.value))
            column = column.cast(pa.float64(), safe=False)  # 53 bits of an integer suffice for a filter
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            if self.op in _ORDER:
                raise ConfigError(f"the column {self.column} holds text, which has no order", where, str(self))
            value = pa.scalar(self.value, kind)
        else:
            raise ConfigError(f"the column {self.column} holds {kind}, neither numbers nor text", where, str(self))
        none = pc.is_null(column, nan_is_null=True)
        return pc.if_else(none, pa.scalar(None, pa.bool_()), pc.call_function(_FUNCTIONS[self.op], [column, value]))


@dataclass(frozen=True)
class Length:
    """Number of characters of a caption, cleaned as by the tokenizer without repair. ``most``: None for no limit."""

    least: int
    most: int | None

    @classmethod
    def parse(cls, text: str) -> Length:
        """MIN:MAX; either may be left out. Raises ConfigError."""
        match = re.fullmatch(r"(\d*):(\d*)", text)
        if match is None or text == ":" or (match[2] and int(match[2]) < int(match[1] or 0)):
            raise ConfigError(
                "no range of lengths", "--caption-length", text, "Write MIN:MAX, MIN: or :MAX, as 5:1000."
            )
        return cls(int(match[1] or 0), int(match[2]) if match[2] else None)

    def __str__(self) -> str:
        return f"caption length {self.least}:{'' if self.most is None else self.most}"

    def holds(self, length: int) -> bool:
        return self.least <= length and (self.most is None or length <= self.most)


def _code(number: int) -> int:
    """Code of "filter ``number`` of ``Filters.names`` fails"; one more: it finds no value."""
    return 2 * number + 2


class _EarlierDrops:
    """Which samples of a shard an earlier manifest left out, handed out in order."""

    def __init__(self, dropped: NDArray[np.bool_], key: str) -> None:
        self.dropped = dropped
        self.key = key
        self.position = 0

    def take(self, count: int) -> NDArray[np.bool_]:
        """Whether each of the next ``count`` samples was left out. Raises DataError after the last."""
        self.position += count
        if self.position > len(self.dropped):
            what = f"more than the {len(self.dropped)} samples that were indexed"
            raise DataError(what, self.key, remedy=_OTHER_SHARD)
        return self.dropped[self.position - count : self.position]


@dataclass(frozen=True)
class Filters:
    """All must hold; the first that fails is the reason. ``uids`` and ``columns`` come first, in this order."""

    columns: tuple[Filter, ...] = ()
    length: Length | None = None
    uids: UidList | None = None
    manifest: str = ""
    """Folder of a manifest of the same shards: only its samples without its exceptions are kept."""

    @property
    def names(self) -> list[str]:
        """The filters as text; equal for equal filters."""
        digest = ""
        if self.manifest:
            digest = _opened(self.manifest)[0].digest[:12]
        good = []
        if self.manifest:
            good = [f"not excluded in {self.manifest} (digest {digest})"]
        return [*map(str, [*self.columns, *filter(None, [self.length, self.uids])]), *good]

    @property
    def reasons(self) -> list[str]:
        """Reasons for dropping a sample; code c of ``dropped`` stands for entry c - 1."""
        return [NO_ROW, *(reason for name in self.names for reason in (name, f"{name}: no value"))]

    def parquet_file(self, key: str) -> str | None:
        """The file that filters on columns read for a shard; None without such filters."""
        if self.columns:
            return f"{key.removesuffix('.tar')}.parquet"
        return None

    def check_count(self, key: str, count: int) -> None:
        """Raise DataError if a shard has fewer than the samples that ``manifest`` was indexed from."""
        if self.manifest and count < (indexed := len(_dropped_by_manifest(self.manifest, key))):
            raise DataError(f"{count} samples, indexed were {indexed}", key, remedy=_OTHER_SHARD)

    def predicate(self, key: str, reader: StorageClient) -> SamplePredicate:
        """The predicate of a shard: 0 for a kept sample, else the code of the reason. Reads the parquet file.

        Raises ConfigError (missing column, or wrong type), DataError (missing or damaged parquet file), and what
        ``reader`` raises.
        """
        where = self.parquet_file(key)
        table = None
        if where:
            table = _table(where, self.columns, reader)
        earlier = None
        if self.manifest:
            earlier = _EarlierDrops(_dropped_by_manifest(self.manifest, key), key)
        of_length = _code(len(self.columns))
        of_uids = _code(len(self.columns) + bool(self.length))
        of_manifest = _code(len(self.names) - 1)

        def predicate(samples: Sequence[Sample], view: memoryview) -> Codes:
            codes = np.zeros(len(samples), dtype=np.uint8)
            by_filter = []
            if self.uids:
                by_filter = [self.uids.codes(samples, view, of_uids)]
            if table:
                by_filter += _by_columns(*table, samples)
            if self.length:
                by_filter.append(_by_length(self.length, samples, view, of_length))
            if earlier:
                by_filter.append(earlier.take(len(samples)) * np.uint8(of_manifest))
            for of_filter in by_filter:
                codes = np.where(codes == 0, of_filter, codes)
            return codes

        return predicate

    def row_codes(self, columns: Sequence[Any], captions: Sequence[str]) -> list[Codes]:
        """Codes of rows of a parquet file that holds the images, for each filter.

        ``columns``: pyarrow arrays, one for each of ``columns``; ``captions``: of the rows. Raises ConfigError.
        """
        import pyarrow.compute as pc

        codes = []
        for number, (each, values) in enumerate(zip(self.columns, columns, strict=True)):
            holds = each.holds(values, each.column)
            codes += [_codes(pc.is_null(holds), _code(number) + 1), _codes(pc.invert(holds), _code(number))]
        if self.length:
            from flip.tokenizer import RAW_LIMIT, clean  # brings a library that no other filter needs

            code = _code(len(self.columns))
            lengths = (len(clean(text[:RAW_LIMIT])) for text in captions)
            codes.append(np.array([0 if self.length.holds(each) else code for each in lengths], dtype=np.uint8))
        return codes

    def settings(self, counts: NDArray[np.int64]) -> dict[str, Any]:
        """Settings of the manifest: filters, samples seen and kept, dropped samples by reason, and for a list of uids
        its length and how many samples have such a uid (equal uids count twice).

        ``counts``: number of samples per code.
        """
        dropped = {reason: int(n) for reason, n in zip(self.reasons, counts[1:], strict=False) if n}
        report: dict[str, Any] = {
            "filters": self.names,
            "seen": int(counts.sum()),
            "kept": int(counts[0]),
            "dropped": dropped,
        }
        if self.uids:
            present = report["seen"] - sum(dropped.get(f"{self.uids}{end}", 0) for end in ("", ": no value"))
            absent = max(0, self.uids.count - present)
            report["uids"] = {"listed": self.uids.count, "in_shards": present, "not_in_shards": absent}
        if self.manifest:  # its own settings still hold: filters, uids, shards that were left out
            before = _opened(self.manifest)[0].settings
            earlier = before.get("dropped", {})
            now = sum(dropped.values()) - sum(earlier.values())
            filters = [*before.get("filters", []), *self.names]
            report = before | report | {"filters": filters, "dropped": earlier | {self.names[-1]: now}}
        return report


def parse(filters: Sequence[str], length: str, uids: str | None = None) -> Filters | None:
    """Parse command-line options; None if there are no filters. Raises ConfigError."""
    columns = tuple(map(Filter.parse, filters))
    listed = UidList.open(uids) if uids else None
    parsed = Filters(columns, Length.parse(length) if length else None, listed)
    if len(parsed.reasons) > 255:
        raise ConfigError("too many filters", "--filter", len(filters))
    return parsed if parsed.names else None


def column(name: str, names: Sequence[str], where: str) -> str:
    """The column of this name, or the only one that differs in case only. Raises ConfigError."""
    if name in names:
        return name
    matches = [other for other in names if other.lower() == name.lower()]
    if len(matches) == 1:
        return matches[0]
    lower = {other.lower(): other for other in names}
    near = (
        matches or [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)] or names
    )
    if matches:
        what = "more than one column has this name"
    else:
        what = "there is no such column"
    raise ConfigError(what, where, name, f"{'Near are' if near is not names else 'There are'}: {listed(near)}.")


def listed(names: Sequence[str]) -> str:
    """The names for a message, of many the first. A file states them, so that their number and length have no limit."""
    shown = [name if len(name) <= NAME_SHOWN else f"{name[:NAME_SHOWN]}..." for name in names[:NAMES_SHOWN]]
    if len(names) > NAMES_SHOWN:
        shown.append(f"and {len(names) - NAMES_SHOWN:,} others")
    return ", ".join(shown)


def _name(key: str) -> str | None:
    """The key of a sample in the parquet file; None if it is no UTF-8, which all text of a parquet file is."""
    name = key.rpartition("/")[2]
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of another encoding, as surrogates
        return None
    return name


def _dropped_by_manifest(folder: str, key: str) -> NDArray[np.bool_]:
    """Per sample of a shard's tar: whether a manifest has filtered it out, or lists it as an exception."""
    manifest, rows, bad = _opened(folder)
    row = rows[key]
    first = int(manifest.first[row])
    count = int(manifest.shards[row, 0])
    if manifest.sample_filter:
        ordinals = manifest.sample_filter.ordinals(row)
    else:
        ordinals = np.arange(count)
    dropped = np.ones(int(manifest.sample_filter.tars[row, 0]) if manifest.sample_filter else count, dtype=np.bool_)
    dropped[ordinals] = False
    dropped[ordinals[bad[np.searchsorted(bad, first) : np.searchsorted(bad, first + count)] - first]] = True
    return dropped


@cache
def _opened(folder: str) -> tuple[Manifest, dict[str, int], NDArray[np.int64]]:
    """A manifest, the row of each shard, and the ids of its exceptions, ascending; loaded once per process."""
    manifest = Manifest.load(folder, check=False)
    return (
        manifest,
        {key: row for row, key in enumerate(manifest.keys)},
        np.array(sorted(manifest.exceptions), np.int64),
    )


def _codes(mask: Any, code: int) -> Codes:
    """``code`` for each true entry of a boolean pyarrow array, else 0."""
    return mask.fill_null(False).to_numpy(zero_copy_only=False).astype(np.uint8) * np.uint8(code)


def _by_length(length: Length, samples: Sequence[Sample], view: memoryview, code: int) -> Codes:
    """``code`` for a caption of another length, ``code`` + 1 without a caption, else 0."""
    from flip.tokenizer import RAW_LIMIT, clean  # brings a library that no other filter needs

    def code_of(sample: Sample) -> int:
        if CAPTION not in sample.members:
            return code + 1
        at, size = sample.members[CAPTION]
        text = bytes(view[at : at + min(size, RAW_LIMIT)]).decode("utf-8", "replace")
        if length.holds(len(clean(text))):
            return 0
        return code

    return np.fromiter(map(code_of, samples), dtype=np.uint8, count=len(samples))


def _by_columns(keys: Any, filters: Sequence[Any], samples: Sequence[Sample]) -> list[Codes]:
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pa.array([_name(sample.key) for sample in samples], pa.string())
    rows = pc.index_in(names, value_set=keys, skip_nulls=True)
    codes = [_codes(pc.is_null(rows), 1)]
    for number, holds in enumerate(filters):
        values = holds.take(rows)
        codes += [_codes(pc.is_null(values), _code(number) + 1), _codes(pc.invert(values), _code(number))]
    return codes


def _table(where: str, filters: Sequence[Filter], reader: StorageClient) -> tuple[Any, list[Any]]:
    """The keys of a parquet file's rows as strings, and for each filter whether it holds, as pyarrow arrays."""
    import pyarrow as pa

    def choose(schema: Any) -> list[str]:
        if "key" not in schema.names:
            remedy = "Is it the one that img2dataset wrote?"
            remedy = f"There are: {listed(schema.names)}. {remedy}"
            raise DataError("the parquet file has no column key", where, remedy=remedy)
        chosen = [column(each.column, schema.names, where) for each in filters]
        for each, name in zip(filters, chosen, strict=True):
            each.holds(pa.nulls(0, schema.field(name).type), where)  # refuses a type before the column is read
        return ["key", *chosen]

    keys, *columns = small_file.read(_bytes(where, reader), where, choose)
    rows = keys.drop_null()
    if pa.types.is_dictionary(keys.type):
        _refuse_repeated(rows.indices, where)  # before each row gets a copy of its text
        keys = keys.dictionary_decode()
        rows = rows.dictionary_decode()
    try:
        keys = keys.cast(pa.string())
        rows = rows.cast(pa.string())
    except pa.ArrowException as error:
        raise small_file.damaged(where, str(error)) from error
    _refuse_repeated(rows, where)
    return keys, [each.holds(values, where) for each, values in zip(filters, columns, strict=True)]


def _refuse_repeated(keys: Any, where: str) -> None:
    import pyarrow.compute as pc

    if pc.count_distinct(keys).as_py() < len(keys):
        raise DataError("the parquet file has rows of one key", where, remedy="Is it the one that img2dataset wrote?")


def _bytes(where: str, reader: StorageClient) -> bytes:
    """The bytes of a parquet file, checked by its ETag or a second reading."""
    try:
        stat = reader.stat(where)
    except DataError as error:
        remedy = (
            "Filters on columns read it: img2dataset writes one next to each shard. Bring it there, or do not filter."
        )
        raise DataError("the parquet file of this shard is missing", where, remedy=remedy) from error
    small_file.check_size(stat.size, where)
    data = reader.read(where, 0, stat.size, stat.etag)
    if is_remote(where) and stat.size:
        etag = ETag(reader.parts(where, stat) if "-" in stat.etag else ())
        etag.update(data)
        if etag.value() != stat.etag and reader.read(where, 0, stat.size, stat.etag) != data:
            raise StorageError("two readings differ", where, remedy="Look at the network, then index again.")
    return data
