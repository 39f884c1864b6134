"""Shards and manifests: make shards, index them, see what a manifest holds, leave out what is bad."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import csv
import glob
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flip.data.manifest import Manifest

EXAMPLES = """examples:
  python tools/shards.py index 'data/{00000..00041}.tar' --out data/manifest
  python tools/shards.py info data/manifest
  python tools/shards.py make captions.csv --images pictures --out data
  python tools/shards.py except data/manifest --ids 512-767 --out data/manifest-2
"""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from flip.exitcodes import FlipError

    try:
        report = options.run(options)
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        width = max(map(len, report))
        for name, value in report.items():
            print(f"{name.replace('_', ' '):{width}}  {f'{value:,}' if isinstance(value, int) else value}")
    return 0


def index(options: argparse.Namespace) -> dict[str, Any]:
    """Walk shards and write their manifest."""
    from flip.data.index import index as make_index

    with writing(options.out), _bar("indexing", "B") as bar:
        return facts(make_index(expand(options.shards), options.out, options.chunk, bar))


def info(options: argparse.Namespace) -> dict[str, Any]:
    """What a manifest holds."""
    from flip.data.manifest import Manifest

    return facts(Manifest.load(options.manifest))


def make(options: argparse.Namespace) -> dict[str, Any]:
    """Write images and captions as shards, then index them."""
    import webdataset

    from flip.data.index import index as make_index
    from flip.data.manifest import refuse_existing
    from flip.exitcodes import ConfigError

    if options.per_shard < 1:
        raise ConfigError("must be at least 1", "--per-shard", options.per_shard)
    rows, out, paths = list(table(options.table, options.image, options.caption)), Path(options.out), list[str]()
    if not rows:
        raise ConfigError("the table has no rows", options.table)
    refuse_existing(out)
    images = Path(options.images or Path(options.table).parent)
    extensions = [extension(row[options.image], f"{options.table}, row {i}") for i, row in enumerate(rows, 1)]
    with writing(out), _bar("writing", "") as bar:
        out.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(rows), options.per_shard):
            paths.append(str(out / f"{len(paths):05d}.tar"))
            with webdataset.TarWriter(paths[-1], mtime=0) as writer:
                for number, row in enumerate(rows[first : first + options.per_shard], first):
                    picture = read(images / row[options.image], f"{options.table}, row {number + 1}")
                    caption = " ".join(row[options.caption].split())
                    sample = {"__key__": f"{number:09d}", extensions[number]: picture, "txt": caption}
                    rest = {k: v for k, v in row.items() if k not in (options.image, options.caption)}
                    writer.write(sample | ({"json": rest} if rest else {}))
                    bar(number + 1, len(rows))
    with writing(out), _bar("indexing", "B") as bar:
        return facts(make_index(paths, out, 0, bar))


def leave_out(options: argparse.Namespace) -> dict[str, Any]:
    """Write a new manifest of the same shards whose exception list names some samples more."""
    from flip.data.manifest import Manifest, write
    from flip.exitcodes import ConfigError

    old = Manifest.load(options.manifest)
    exceptions = dict(old.exceptions)
    for part in options.ids.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        ids = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not ids or ids.stop > old.samples:
            raise ConfigError(f"not sample ids below {old.samples}", "--ids", part, "Write them as 7,512-767.")
        exceptions.update(dict.fromkeys(ids, options.reason))
    with writing(options.out):
        return facts(write(options.out, old, old.checksums, exceptions, old.settings))


@contextmanager
def writing(out: "str | Path") -> Iterator[None]:
    """Errors of the file system inside are those of writing ``out``."""
    from flip.exitcodes import ConfigError
    from jobs.disk import unwritable

    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError("a file is where a folder must be, or the other way round", error.filename or out) from error
    except OSError as error:
        raise unwritable(error, out, "Choose another --out.") from error


def extension(name: Any, where: str) -> str:
    """The member that an image file becomes. Raises DataError for a name that training would not know."""
    from flip.data.decode import EXTENSIONS
    from flip.exitcodes import DataError

    found = Path(str(name)).suffix.lower().lstrip(".").replace("jpeg", "jpg")
    if found not in EXTENSIONS:
        raise DataError("no known extension of an image", where, name, f"Known are: {', '.join(EXTENSIONS)}.")
    return found


def read(path: Path, where: str) -> bytes:
    """The bytes of an image. Raises DataError, PermissionDenied."""
    from flip.exitcodes import DataError, PermissionDenied

    try:
        return path.read_bytes()
    except PermissionError:
        raise PermissionDenied("the image may not be read", where, str(path), "Grant read access to it.") from None
    except FileNotFoundError:
        raise DataError("there is no such image", where, str(path), "Check --images.") from None
    except OSError as error:
        raise DataError(f"the image cannot be read: {error.strerror}", where, str(path)) from error


def facts(manifest: "Manifest") -> dict[str, Any]:
    return {
        "manifest": str(manifest.folder),
        "digest": manifest.digest,
        "shards": len(manifest.keys),
        "samples": manifest.samples,
        "bytes": int(manifest.shards[:, 1].sum()),
        "mean_bytes": round(manifest.mean_bytes),
        "chunk": manifest.chunk,
        "chunks_per_pass": manifest.samples // manifest.chunk,
        "left_out_by_training": manifest.tail,
        "exceptions": len(manifest.exceptions),
    }


def expand(patterns: list[str]) -> list[str]:
    """Paths of patterns with braces ({00000..00041}, {a,b}) and wildcards; one without a match stands for itself."""
    import braceexpand

    paths = []
    for pattern in patterns:
        for path in braceexpand.braceexpand(pattern):
            paths += sorted(glob.glob(path)) or [path]
    return paths


def table(path: str, *columns: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a CSV file with a header, or of a file with a JSON object per line."""
    from flip.exitcodes import ConfigError

    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = map(json.loads, file) if path.endswith((".jsonl", ".json")) else csv.DictReader(file)
            for number, row in enumerate(rows, 1):
                missing = [name for name in columns if not isinstance(row, dict) or not isinstance(row.get(name), str)]
                if missing:
                    raise ConfigError(
                        f"row {number} has no text in column {missing[0]!r}", path, remedy="See --image, --caption."
                    )
                yield row
    except OSError as error:
        raise ConfigError(f"the table cannot be read: {error.strerror}", path) from error
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"the table cannot be read: {error}", path) from error


class _bar:
    """A progress bar on a terminal, nothing elsewhere; called with what is done and what there is."""

    def __init__(self, what: str, unit: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(desc=what, unit=unit or "it", unit_scale=bool(unit), disable=None, leave=False)

    def __enter__(self) -> "_bar":
        return self

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name, help=run.__doc__, description=run.__doc__, epilog=EXAMPLES, formatter_class=parser.formatter_class
        )
        one.set_defaults(run=run)
        one.add_argument("--json", action="store_true", help="print JSON")
        return one

    one = command("index", index)
    one.add_argument("shards", nargs="+", help=".tar files; braces and wildcards are expanded")
    one.add_argument("--out", required=True, help="folder of the new manifest")
    one.add_argument("--chunk", type=int, default=0, help="R, samples per read; default: by the number of samples")
    one = command("info", info)
    one.add_argument("manifest", help="its folder")
    one = command("make", make)
    one.add_argument("table", help="CSV with a header, or JSON lines")
    one.add_argument("--images", help="folder that the image column is relative to; default: the table's")
    one.add_argument("--out", required=True, help="folder for shards and manifest")
    one.add_argument("--per-shard", type=int, default=1000, help="samples per shard (default: %(default)s)")
    one.add_argument("--image", default="image", help="column of the image's path (default: %(default)s)")
    one.add_argument("--caption", default="caption", help="column of the caption (default: %(default)s)")
    one = command("except", leave_out)
    one.add_argument("manifest", help="its folder; it stays as it is")
    one.add_argument("--ids", required=True, help="sample ids, as 7,512-767")
    one.add_argument("--reason", default="left out by hand", help="stands in the list and in the log")
    one.add_argument("--out", required=True, help="folder of the new manifest")
    return parser


if __name__ == "__main__":
    from jobs.pipe import quietly

    sys.exit(quietly(main))
