"""Shards and manifests: make shards, index them, check them, look into them, leave out what is bad."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import importlib
import json

from jobs.common.cli import Parser

MAKING = """examples:
  python tools/shards.py index 'data/{00000..00041}.tar' --out data/manifest
  python tools/shards.py index 's3://bucket/laion/*.tar' --out data/manifest    (AWS_ENDPOINT_URL, AWS_PROFILE, ...)
  python tools/shards.py index 's3://bucket/laion/*.tar' --out data/manifest --part 1/64    (2/64, ..., then none)
  python tools/shards.py index 'more/*.tar' --add data/manifest --out data/manifest-2
  python tools/shards.py index 'data/*.tar' --out data/filtered --filter 'similarity>=0.28' --caption-length 5:1000
  python tools/shards.py info data/manifest
  python tools/shards.py make captions.csv --images pictures --out data
  python tools/shards.py except data/manifest --ids 512-767 --out data/manifest-2
  python tools/shards.py drop data/manifest-2 --out data/manifest-3
"""
CHECKING = """examples:
  python tools/shards.py verify data/manifest --sample 0.01
  python tools/shards.py verify data/manifest --workers 16 --out data/manifest-2
  python tools/shards.py inspect data/manifest --id 1234567 --save picture.jpg
  python tools/shards.py inspect --run runs/my/run --samples 81920000
  python tools/shards.py diff data/manifest data/manifest-2
  python tools/shards.py bench data/manifest --want 2000
"""
CAPTIONS = "members that hold captions, as txt,alt or json:FIELD (default: txt)"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from flip.runs.errors import FlipError

    module, function = options.run_by.split(":")
    try:
        found = getattr(importlib.import_module(f"tools.shards_commands.{module}"), function)(options)
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    _print(json.dumps(found.report, indent=1) if options.json else found.show())
    return found.code


def _print(text: str) -> None:
    """A key or a path may hold bytes that are no text, and a terminal may lack a letter: those show as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


class _Commands:
    def __init__(self) -> None:
        self.parser = Parser(description=__doc__, epilog=MAKING + CHECKING.partition("\n")[2], formatter_class=_Shape)
        self.commands = self.parser.add_subparsers(required=True, metavar="command")

    def add(self, name: str, run_by: str, about: str, examples: str) -> argparse.ArgumentParser:
        """``run_by``: module:function in tools/shards_commands, imported when the command runs."""
        one = self.commands.add_parser(name, help=about, description=about, epilog=examples, formatter_class=_Shape)
        one.set_defaults(run_by=run_by)
        one.add_argument("--json", action="store_true", help="print JSON")
        return one


_Shape = argparse.RawDescriptionHelpFormatter


def _parser() -> argparse.ArgumentParser:
    commands = _Commands()
    _making(commands)
    _checking(commands)
    _looking(commands)
    return commands.parser


def _making(commands: _Commands) -> None:
    about = (
        "Walk shards and write their manifest. What was scanned is kept in OUT.part until then: after a stop the same "
        "command goes on. Exit code 65 where shards are damaged, when all others are scanned."
    )
    one = commands.add("index", "index:index", about, MAKING)
    one.add_argument("shards", nargs="+", help=".tar files, s3:// or file:// URLs; braces and wildcards are expanded")
    one.add_argument("--out", required=True, help="folder of the new manifest")
    first = one.add_mutually_exclusive_group()
    first.add_argument("--chunk", type=int, default=0, help="R, samples per read; default: by the number of samples")
    first.add_argument(
        "--add", metavar="MANIFEST", help="put its shards first, unread, with its R: their samples keep their ids"
    )
    one.add_argument("--workers", type=int, default=0, help="processes, of 200 MB each; default: one per core")
    one.add_argument("--skip-damaged", action="store_true", help="leave out shards that are missing or no whole tar")
    about = "a complete sample has an image and one of these: captions, or the label cls of a set to evaluate on"
    one.add_argument("--captions", default="txt,cls", metavar="A,B", help=f"{about} (default: %(default)s)")
    one.add_argument(
        "--min-complete",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="exit code 65 if fewer samples are complete (default: %(default)s)",
    )
    one.add_argument(
        "--part",
        metavar="I/N",
        help="only scan the I-th of N shares, for the same command without it; slurm: this task's",
    )
    about = "keep samples with this in the shard's parquet file, as 'punsafe<0.5'; OP: < <= > >= == !=; repeatable"
    one.add_argument("--filter", action="append", default=[], metavar="'COLUMN OP VALUE'", help=about)
    about = "keep samples with a caption of so many characters, both included, as 5:1000, 5: or :1000"
    one.add_argument("--caption-length", default="", metavar="MIN:MAX", help=about)
    one = commands.add("info", "manifest:info", "What a manifest holds.", MAKING)
    one.add_argument("manifest", help="its folder")
    one.add_argument(
        "--batch", type=int, default=4096, help="B that lanes and buffer are shown for (default: %(default)s)"
    )
    one = commands.add("make", "write:make", "Write images and captions as shards, then index them.", MAKING)
    one.add_argument("table", help="CSV with a header, or JSON lines")
    one.add_argument("--images", help="folder that the image column is relative to; default: the table's")
    one.add_argument("--out", required=True, help="folder for shards and manifest")
    one.add_argument("--per-shard", type=int, default=1000, help="samples per shard (default: %(default)s)")
    one.add_argument("--image", default="image", help="column of the image's path (default: %(default)s)")
    one.add_argument("--caption", default="caption", help="column of the caption (default: %(default)s)")
    about = "Write a new manifest of the same shards whose exception list names some samples more."
    one = commands.add("except", "manifest:leave_out", about, MAKING)
    one.add_argument("manifest", help="its folder; it stays as it is")
    one.add_argument("--ids", required=True, help="sample ids, as 7,512-767")
    one.add_argument("--reason", default="left out by hand", help="stands in the list and in the log")
    one.add_argument("--out", required=True, help="folder of the new manifest")
    about = (
        "Write a new manifest of the same shards without the samples that the exception list names. "
        "Reads the shards again; sample ids are others, so runs that use it are new runs."
    )
    one = commands.add("drop", "manifest:drop", about, MAKING)
    one.add_argument("manifest", help="its folder; it stays as it is")
    one.add_argument("--workers", type=int, default=0, help="processes, of 200 MB each; default: one per core")
    one.add_argument("--out", required=True, help="folder of the new manifest")


def _checking(commands: _Commands) -> None:
    about = (
        "Read shards again: length, CRC32, headers, and every image and caption as training reads them. "
        "Exit code 65 where something bad was found that --out did not put into an exception list."
    )
    one = commands.add("verify", "verify:verify", about, CHECKING)
    one.add_argument("manifest", help="its folder; it stays as it is")
    some = one.add_mutually_exclusive_group()
    some.add_argument("--sample", type=float, metavar="SHARE", help="check this share of the chunks, drawn at random")
    some.add_argument("--chunks", type=int, metavar="N", help="check N chunks, drawn at random")
    one.add_argument("--seed", type=int, default=0, help="of that draw (default: %(default)s)")
    one.add_argument(
        "--decode", action=argparse.BooleanOptionalAction, default=True, help="decode images and captions (default)"
    )
    one.add_argument("--captions", help=CAPTIONS)
    one.add_argument("--workers", type=int, default=0, help="processes; default: one per core")
    one.add_argument("--out", help="folder of a new manifest that excepts what was found bad")
    one.add_argument("--examples", type=int, default=3, help="samples named per reason (default: %(default)s)")

    about = "How fast one core reads, walks, decodes and crops, which of these limits, and how many workers it takes."
    one = commands.add("bench", "bench:bench", about, CHECKING)
    one.add_argument("manifest", help="its folder")
    one.add_argument("--seconds", type=float, default=20.0, help="in all, about (default: %(default)s)")
    one.add_argument("--want", type=float, default=0.0, metavar="X", help="images/s that the workers are counted for")
    one.add_argument("--captions", help=CAPTIONS)
    one.add_argument("--decoder", choices=("simplejpeg", "pillow"), default="simplejpeg")
    one.add_argument("--resize", choices=("torchvision", "pillow"), default="torchvision")
    one.add_argument("--size", type=int, default=224, help="side of the view, pixels (default: %(default)s)")
    one.add_argument("--patch", type=int, default=16, help="side of a patch, pixels (default: %(default)s)")
    one.add_argument("--mask", default="0.5", help="share of patches dropped (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0, help="of the draw of chunks and crops (default: %(default)s)")


def _looking(commands: _Commands) -> None:
    about = "One sample of a manifest (--id), or all samples of a step of a run (--run with --step or --samples)."
    one = commands.add("inspect", "inspect_samples:inspect", about, CHECKING)
    one.add_argument("manifest", nargs="?", help="its folder (not with --run)")
    one.add_argument("--id", type=int, help="sample id")
    one.add_argument("--captions", help=CAPTIONS)
    one.add_argument("--save", metavar="FILE", help="write the image's bytes to this new file")
    one.add_argument("--run", metavar="RUN", help="a run: its folder, or sweep/run below FLIP_RUNS")
    where = one.add_mutually_exclusive_group()
    where.add_argument("--step", type=int, help="step, as in the run's metrics: the first is 1")
    where.add_argument("--samples", type=int, help="S as in metrics and TensorBoard: the step that reached it")
    one.add_argument(
        "--read",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the samples: captions, and which stood in for bad ones; --no-read: ids alone, at once",
    )

    about = "What differs between two manifests, and whether a run's order would. Exit code 0: nothing, 1: something."
    one = commands.add("diff", "diff:diff", about, CHECKING)
    one.add_argument("old", help="folder of a manifest")
    one.add_argument("new", help="folder of another")


if __name__ == "__main__":
    from jobs.common.cli import quietly

    sys.exit(quietly(main))
