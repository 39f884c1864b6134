"""Recognises data sets that `shards make` does not read, and names the command that reads or converts each.

A format is recognised by its address, the names of its files, or its first bytes. Every refusal of a format is a row
of a table here.
"""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flip.common import image_formats
from flip.runs.errors import ConfigError

HEAD = 512
"""Bytes by which a file is recognised: the header of a tar has its mark at byte 257."""
JSON_HEAD = 1 << 16
"""Bytes of a JSON file in which its first keys are searched."""
_TO_PARQUET = "Write it as parquet with the columns image and caption"


class OtherFormat(NamedTuple):
    """A format that `shards make` does not read."""

    name: str
    pattern: str
    """Regular expression of the names of its files, or of entries of its folder."""
    remedy: str
    """PATH stands for the source, quoted for a shell."""


ADDRESSES = {
    "hf": "Download it first: hf download {name} --repo-type dataset --local-dir DIR, then give DIR.",
    "s3": "Copy it first: aws s3 cp --recursive {address} DIR, then give DIR.",
    "gs": "Copy it first: gcloud storage cp -r {address} DIR, then give DIR.",
    "http": "Download it first: curl -LO {address}, then give the file.",
    "https": "Download it first: curl -LO {address}, then give the file.",
}
"""Scheme -> remedy."""
_SAVED = "from datasets import load_from_disk; load_from_disk('DIR').to_parquet('set.parquet')"
_TARS = OtherFormat("webdataset shards (tar)", r"\.tar$", "Index them: flip shards index PATH --out MANIFEST.")
FORMATS = (
    _TARS,
    OtherFormat(
        "shards of mosaicml-streaming (MDS)",
        r"\.mds(\.zstd)?$",
        f"{_TO_PARQUET}: read it with streaming.StreamingDataset(local=DIR).",
    ),
    OtherFormat("a Lance data set", r"\.lance$|^_versions$", f"{_TO_PARQUET}: lance.dataset(DIR).to_batches()."),
    OtherFormat("an LMDB", r"\.mdb$", f"{_TO_PARQUET}, with the package lmdb and the code of who wrote its values."),
    OtherFormat(
        "TFRecords", r"\.tfrec(ords?)?(-\d+-of-\d+)?(\.gz)?$", f"{_TO_PARQUET}: read it with tf.data.TFRecordDataset."
    ),
    OtherFormat(
        "a data set of save_to_disk (arrow)", r"\.arrow$", f'Convert it: python -c "{_SAVED}", then give set.parquet.'
    ),
    OtherFormat("FFCV data", r"\.beton$", f"{_TO_PARQUET}, from the data that it was made of."),
    OtherFormat("an HDF5 file", r"\.(h5|hdf5)$", f"{_TO_PARQUET}: read it with h5py."),
    OtherFormat("an archive", r"\.(zip|tgz|tar\.\w+|7z|rar)$", "Unpack it, and give its folder."),
    OtherFormat("a table in gzip", r"\.(csv|tsv|jsonl?|ndjson|txt)\.gz$", "Unpack it with gunzip, and give the table."),
)
_LIST = OtherFormat(
    "a list of addresses",
    r"\.(txt|lst)$",
    "Download the images: img2dataset --url_list PATH --output_format webdataset --output_folder DIR, then"
    " flip shards index 'DIR/*.tar' --out MANIFEST.",
)
_MAGIC = (
    (b"PAR1", "a parquet file", "parquet"),
    (b"PARE", "an encrypted parquet file", ""),
    (b"\x1f\x8b", "a gzip file", "gz"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "zst"),
    (b"PK\x03\x04", "a zip archive", "zip"),
    (b"ARROW1", "an arrow file", "arrow"),
    (b"\x89HDF", "an HDF5 file", "h5"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", ""),
    (b"<!doctype", "a web page", "html"),
    (b"<html", "a web page", "html"),
)
"""First bytes, the name of the format, and its usual suffix."""


def refuse_address(source: str) -> None:
    """Raise ConfigError if a source is an address, such as hf://datasets/OWNER/NAME."""
    scheme, mark, rest = source.partition("://")
    if not mark:
        return
    name = "/".join(rest.removeprefix("datasets/").split("/")[:2])
    remedy = ADDRESSES.get(scheme, "Copy it to a local folder first.")
    remedy = remedy.format(name=shlex.quote(name), address=shlex.quote(source))
    raise ConfigError("a source is a folder or a table on this machine, not an address", "SOURCE", source, remedy)


def refuse_addresses(names: Sequence[str], path: str) -> None:
    """Raise ConfigError if a table without a column of images has a column of their addresses.

    ``names``: its columns.
    """
    address = next((name for name in names if re.fullmatch(r"(image|img|photo)?_?(url|uri|link)s?", name.lower())), "")
    if not address:
        return
    form = Path(path).suffix[1:].lower().replace("pq", "parquet")
    caption = next((name for name in names if name.lower() in ("caption", "text", "title", "alt")), "CAPTION")
    command = (
        f"img2dataset --url_list {shlex.quote(path)} --input_format {form} --url_col {shlex.quote(address)}"
        f" --caption_col {shlex.quote(caption)} --output_format webdataset --output_folder DIR"
    )
    remedy = f"Download them: {command}, then flip shards index 'DIR/*.tar' --out MANIFEST."
    raise ConfigError("the table lists addresses of images, not images", path, address, remedy)


def refuse_folder(folder: Path, names: Sequence[str]) -> None:
    """Raise ConfigError if the files of a folder without images have another format.

    ``names``: paths of its files and folders, relative to it.
    """
    for other in FORMATS:
        match = next((name for name in names if re.search(other.pattern, Path(name).name.lower())), "")
        if not match:
            continue
        path = str(folder)
        if other is _TARS:
            path = str(folder / Path(match).parent / "*.tar")
        raise ConfigError(f"the folder holds {other.name}", str(folder), match, _filled(other.remedy, path))


def refuse_file(path: Path, head: bytes, suffixes: Sequence[str]) -> None:
    """Raise ConfigError if a file has another format than a table with one of the ``suffixes``, or not that of its own.

    ``head``: its first ``HEAD`` bytes.
    """
    suffix = path.suffix.lower()
    found, usual = _by_magic(head)
    is_named_parquet = suffix in (".parquet", ".pq")
    if is_named_parquet and found == "a parquet file":
        return
    if is_named_parquet:
        raise _not_parquet(path, head, found, usual)
    if found == "a parquet file":
        what = f"the file is a parquet file, its name ends with {suffix or 'no suffix'}"
        remedy = f"Rename it: mv {_quoted(path)} {_quoted(path.with_suffix('.parquet'))}."
        raise ConfigError(what, str(path), remedy=remedy)
    for other in (*FORMATS, _LIST):
        if re.search(other.pattern, path.name.lower()):
            raise ConfigError(f"the file holds {other.name}", str(path), remedy=_filled(other.remedy, str(path)))
    if found:
        remedy = f"Give a folder of images, or a table ({', '.join(suffixes)})."
        raise ConfigError(f"the file is {found}, not a table", str(path), remedy=remedy)
    if suffix not in suffixes:
        remedy = f"Save it as CSV, for example. Tables are: {', '.join(suffixes)}."
        raise ConfigError("tables of this form are not read", str(path), remedy=remedy)


def refuse_json(path: str, head: str) -> None:
    """Raise ConfigError if a file is a JSON document, not JSON lines; COCO's and LLaVA's are named.

    ``head``: its first ``JSON_HEAD`` characters.
    """
    start = head.lstrip()
    if _is_coco(start):
        names = "n = {i['id']: i['file_name'] for i in d['images']}"
        rows = "[{'image': n[a['image_id']], 'caption': a['caption']} for a in d['annotations']]"
        raise _document(path, "a document of COCO annotations", rows, f"{names}; ", " Add --images FOLDER.")
    if not start.startswith("["):
        return
    if '"conversations"' in head:
        rows = "[{'image': r['image'], 'caption': r['conversations'][-1]['value']} for r in d if 'image' in r]"
        raise _document(path, "a JSON list in LLaVA's form", rows, more=" Add --images FOLDER.")
    raise _document(path, "a JSON list, not one object per line", "d")


def _document(path: str, what: str, rows: str, before: str = "", more: str = "") -> ConfigError:
    """The error for a JSON document, with the program that writes its rows as JSON lines."""
    lines = str(Path(path).with_suffix(".jsonl"))
    if lines == path:
        lines = f"{path}.jsonl"
    program = (
        f"import json; d = json.load(open({path!r})); {before}rows = {rows};"
        f" open({lines!r}, 'w').writelines(json.dumps(r) + chr(10) for r in rows)"
    )
    remedy = f"Convert it: python -c {shlex.quote(program)}, and give {lines}.{more}"
    return ConfigError(f"the table cannot be read: it is {what}", path, remedy=remedy)


def _is_coco(start: str) -> bool:
    """Whether the first object of a JSON file has images and annotations, and is no row of JSON lines."""
    if not start.startswith("{"):
        return False
    line = start.partition("\n")[0]
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):  # the object has several lines, or is longer than the head
        return re.match(r'{\s*"(info|images|annotations|licenses|categories|type)"\s*:\s*[\[{"]', start) is not None
    return isinstance(first, dict) and {"images", "annotations"} <= first.keys()


def _not_parquet(path: Path, head: bytes, found: str, usual: str) -> ConfigError:
    """The error for a file whose name ends as that of a parquet file."""
    if found.startswith("an encrypted"):
        remedy = "Write it again without encryption."
        return ConfigError("the parquet file is encrypted", str(path), remedy=remedy)
    if found.startswith("a pointer"):
        remedy = "Download the file: git lfs pull, or hf download OWNER/NAME --repo-type dataset --local-dir DIR."
        return ConfigError(f"the file is {found}", str(path), remedy=remedy)
    if not head:
        return ConfigError("the table cannot be read: the file is empty", str(path), remedy="Download it again.")
    remedy = "Rename it to the suffix of its format, or download it again."
    if usual:
        remedy = f"Rename it: mv {_quoted(path)} {_quoted(path.with_suffix('.' + usual))}, or download it again."
    what = f"the table cannot be read: not a parquet file but {found or 'another one'}"
    return ConfigError(what, str(path), bytes(head[:12]), remedy)


def _by_magic(head: bytes) -> tuple[str, str]:
    """Name and usual suffix of a format by the first bytes of a file; empty if it is not known."""
    if head[257:262] == b"ustar":
        return "a tar", "tar"
    lower = head[:64].lstrip().lower()
    for mark, name, suffix in _MAGIC:
        if head.startswith(mark) or lower.startswith(mark):
            return name, suffix
    image = image_formats.by_start(head)
    if image and min(map(len, image.starts)) > 2:  # two letters may begin a table
        return f"an image ({image.name})", image.extensions[0]
    return "", ""


def _filled(remedy: str, path: str) -> str:
    return remedy.replace("PATH", shlex.quote(path)).replace("(DIR)", f"({path!r})")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
