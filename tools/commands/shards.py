"""Create, index, verify and inspect shards, and exclude bad samples."""

import argparse
import importlib
import json
import sys
from typing import Any

from jobs.common.cli import COUNT, INDEX, Number, Parser, add_root_option, run_command

EXAMPLES = """examples:
  flip shards index 'data/{00000..00041}.tar' --out data/manifest
  flip shards index 's3://bucket/laion/*.tar' --out data/manifest    (AWS_ENDPOINT_URL, AWS_PROFILE, ...)
  flip shards index 's3://bucket/laion/*.tar' --out data/manifest --part 1/64    (2/64, ..., then none)
  flip shards index coco/data --image image --caption caption --out coco/manifest    (parquet files)
  flip shards index 'more/*.tar' --add data/manifest --out data/manifest-2
  flip shards index 'data/*.tar' --out data/filtered --filter 'similarity>=0.28' --caption-length 5:1000
  flip shards index 's3://bucket/datacomp/*.tar' --out data/basic --uids basic_filter.npy
  flip shards info data/manifest
  flip shards make birds --out data/birds --template 'a photo of a {label}'    (birds/CLASS/*)
  flip shards make captions.csv --image photo --caption words --out data/mine
  flip shards make downloads/data --check header --out data/mine    (a folder of parquet files)
  flip shards make 'data/train-*.parquet' --image img --label label --out data/train
  flip shards make captions.csv --split 0.2 --out data/mine    (a fifth goes to data/mine/test)
  flip shards move data/manifest --to s3://bucket/laion --out manifests/laion
  flip shards recode data/manifest --short 256 --quality 85 --out data/small
  flip shards weights data/manifest --values views.npy --cap 10 --out data/weights
  flip shards weights data/manifest --field score --out data/weights
  flip shards exclude data/manifest --ids 512-767 --out data/manifest-2
  flip shards drop data/manifest-2 --out data/manifest-3
  flip shards verify data/manifest --sample 0.01
  flip shards verify data/manifest --workers 16 --out data/manifest-2
  flip shards inspect data/manifest --id 1234567 --save picture.jpg
  flip shards inspect --run runs/my/run --samples 81920000
"""
SHARE = Number(float, least=0, most=1)
CAPTIONS = "members that hold captions, as txt,alt or json:FIELD (default: txt)"


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    return run_command(run, options)


def run(options: argparse.Namespace) -> int:
    from flip.runs import addresses

    for argument, name in (("out", "--out"), ("manifest", "manifest")):
        addresses.require_local(getattr(options, argument, None) or "", name)
    module, function = options.run_by.split(":")
    outcome = getattr(importlib.import_module(f"tools.shards_commands.{module}"), function)(options)
    if options.json:
        text = json.dumps(outcome.report, indent=1)
    else:
        text = outcome.show()
    encoding = sys.stdout.encoding or "utf-8"  # escapes invalid bytes, and characters that the terminal cannot show
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return int(outcome.code)


class _Commands:
    def __init__(self) -> None:
        self.parser = Parser(prog="flip shards", description=__doc__, epilog=EXAMPLES)
        self.commands = self.parser.add_subparsers(required=True, metavar="command")

    def add(self, name: str, run_by: str, help_text: str, *aliases: str) -> argparse.ArgumentParser:
        """``run_by``: module:function in tools/shards_commands, imported when the command runs."""
        examples = [line for line in EXAMPLES.splitlines(True) if f" {name} " in line]
        epilog = "".join(["examples:\n", *examples])
        command = self.commands.add_parser(name, aliases=aliases, help=help_text, description=help_text, epilog=epilog)
        command.set_defaults(run_by=run_by)
        return command


def _parser() -> argparse.ArgumentParser:
    commands = _Commands()
    _indexing(commands)
    _making(commands)
    _deriving(commands)
    _checking(commands)
    _inspecting(commands)
    return commands.parser


def _indexing(commands: _Commands) -> None:
    help_text = (
        "Scan shards and write their manifest. Results are kept in OUT.part meanwhile: if the command is interrupted, "
        "run it again to continue. Exit code 65 if shards are damaged, after all others have been scanned."
    )
    command = commands.add("index", "index:index", help_text)
    command.add_argument(
        "shards",
        nargs="+",
        help=".tar files, s3:// or file:// URLs; braces and wildcards are expanded. With --image: parquet files, or "
        "folders of them, which are read in place",
    )
    command.add_argument("--image", metavar="COLUMN", help="column of images in parquet files: bytes, or {bytes, path}")
    help_text = "columns of captions in parquet files; rows without any are dropped"
    command.add_argument("--caption", metavar="COLUMN[,...]", help=help_text)
    help_text = "further columns to keep with the captions (default: all texts, numbers and truth values)"
    command.add_argument("--columns", metavar="A,B", help=help_text)
    command.add_argument("--out", required=True, help="folder of the new manifest")
    first = command.add_mutually_exclusive_group()
    first.add_argument("--chunk", type=COUNT, default=0, help="R, samples per read; default: by the number of samples")
    help_text = "extend this manifest: its shards come first, are not read, and their samples keep their ids"
    first.add_argument("--add", metavar="MANIFEST", help=help_text)
    command.add_argument("--workers", type=INDEX, default=0, help="processes of 200 MB each (default: one per core)")
    command.add_argument("--skip-damaged", action="store_true", help="leave out shards that are missing or incomplete")
    help_text = "a complete sample has an image and one of these: captions, or the label cls of a set to evaluate on"
    command.add_argument("--captions", default="txt,cls", metavar="A,B", help=f"{help_text} (default: %(default)s)")
    help_text = "exit code 65 if fewer samples are complete (default: %(default)s)"
    command.add_argument("--min-complete", type=SHARE, default=0.5, metavar="SHARE", help=help_text)
    help_text = "only scan part I of N, before the same command without --part; slurm: by the array task"
    command.add_argument("--part", metavar="I/N", help=help_text)
    help_text = (
        "keep samples whose row in the shard's parquet file, or in the parquet file that is indexed, matches, as "
        "'punsafe<0.5'; OP: < <= > >= == !=; repeatable"
    )
    command.add_argument("--filter", action="append", default=[], metavar="'COLUMN OP VALUE'", help=help_text)
    help_text = "keep samples with a caption of MIN to MAX characters, inclusive, as 5:1000, 5: or :1000"
    command.add_argument("--caption-length", default="", metavar="MIN:MAX", help=help_text)
    help_text = "keep samples whose uid (of their json member) is in this list, a .npy file as of DataComp's subsets"
    command.add_argument("--uids", metavar="FILE", help=help_text)
    command = commands.add("info", "manifest:info", "Describe a manifest.")
    command.add_argument("manifest", help="its folder")
    help_text = "batch size for which lanes and buffer are shown (default: %(default)s)"
    command.add_argument("--batch", type=COUNT, default=4096, help=help_text)


def _making(commands: _Commands) -> None:
    help_text = (
        "Write images with captions or labels as shards, and index them. Images that cannot be decoded are left "
        "out and reported. The folder appears when it is complete. Parquet files are read by one process per core."
    )
    command = commands.add("make", "make:make", help_text)
    help_text = (
        "a folder per class; a folder of images with text files of the same names, or with metadata.jsonl (.csv, "
        ".parquet); a table: CSV or TSV with a header, or JSON lines; or parquet files (.parquet, .pq), which may hold "
        "the images: files, patterns and folders, sorted by name"
    )
    command.add_argument("source", nargs="+", metavar="SOURCE", help=help_text)
    command.add_argument("--out", required=True, help="folder for shards, manifest and, with labels, classes.json")
    help_text = (
        "folder of the images, which paths in a table are relative to (default: that of the table). Files outside of "
        "SOURCE and this folder, after links are followed, are refused"
    )
    command.add_argument("--images", metavar="FOLDER", help=help_text)
    command.add_argument(
        "--image", metavar="COLUMN", help="column of images (default: image, path, file_name, file, ...)"
    )
    command.add_argument("--caption", metavar="COLUMN", help="column of captions (default: caption, text or title)")
    help_text = "column of classes; captions, if there are none, are made of --template"
    command.add_argument("--label", metavar="COLUMN", help=help_text)
    command.add_argument("--key", metavar="COLUMN", help="column of the samples' names (default: numbers)")
    help_text = "columns of the json member (default: all others, of parquet those without bytes and lists of numbers)"
    command.add_argument("--columns", metavar="A,B", help=help_text)
    help_text = (
        "header: read only the size and format of each image, twice as fast; data that are cut off are found "
        "by shards verify or in training (default: %(default)s)"
    )
    command.add_argument("--check", choices=("decode", "header"), default="decode", help=help_text)
    help_text = "caption of a labelled image (default: a photo of a {label}); of several, training draws one"
    command.add_argument("--template", action="append", metavar="TEXT", help=help_text)
    help_text = "write this share of the images, chosen by a hash of their names, to OUT/test, an evaluation set"
    command.add_argument("--split", type=Number(float, above=0, below=1), metavar="SHARE", help=help_text)
    command.add_argument("--per-shard", type=COUNT, default=1000, help="rows per shard (default: %(default)s)")
    help_text = "exit code 65 if fewer images can be used (default: %(default)s)"
    command.add_argument("--min-complete", type=SHARE, default=0.5, metavar="SHARE", help=help_text)


def _deriving(commands: _Commands) -> None:
    help_text = (
        "Write the manifest of shards that were copied to another folder or bucket. Checks that each exists there with "
        "the indexed size and, if both are known, ETag; reads no shard. Samples, order and digest stay: runs continue."
    )
    command = commands.add("move", "move:move", help_text)
    command.add_argument("manifest", help="its folder; it stays as it is")
    command.add_argument("--to", required=True, metavar="PREFIX", help="folder or s3:// prefix of the shards now")
    help_text = "the part of the old paths that PREFIX replaces; shards elsewhere stay (default: their common folder)"
    command.add_argument("--from", dest="prefix", metavar="OLD", help=help_text)
    command.add_argument("--sizes-only", action="store_true", help="do not compare ETags")
    command.add_argument("--out", required=True, help="folder of the new manifest")
    _recoding(commands)
    _weighting(commands)
    help_text = "Write a new manifest of the same shards that excludes further samples."
    command = commands.add("exclude", "manifest:exclude", help_text, "except")
    command.add_argument("manifest", help="its folder; it stays as it is")
    command.add_argument("--ids", required=True, help="sample ids, as 7,512-767")
    command.add_argument(
        "--reason", default="left out by hand", help="reason recorded in the exception list and in logs"
    )
    command.add_argument("--out", required=True, help="folder of the new manifest")
    help_text = (
        "Write a new manifest of the same shards without the excluded samples. "
        "Scans the shards again. Sample ids change, so runs that use it are new runs."
    )
    command = commands.add("drop", "manifest:drop", help_text)
    command.add_argument("manifest", help="its folder; it stays as it is")
    command.add_argument("--workers", type=INDEX, default=0, help="processes of 200 MB each (default: one per core)")
    command.add_argument("--out", required=True, help="folder of the new manifest")


def _recoding(commands: _Commands) -> None:
    help_text = (
        "Write the shards again with smaller JPEGs, which decode faster, and their manifest. Samples, ids, order and "
        "exceptions stay, and so do captions and all other members. Images that cannot be recoded stay as they are. If "
        "the command is interrupted, run it again to continue."
    )
    command = commands.add("recode", "recode:recode", help_text)
    command.add_argument("manifest", help="its folder; it stays as it is")
    help_text = "shorter side of larger images, pixels (default: %(default)s)"
    command.add_argument("--short", type=Number(int, least=16), default=256, metavar="PIXELS", help=help_text)
    help_text = "JPEG quality, 1 to 100 (default: %(default)s)"
    command.add_argument("--quality", type=Number(int, least=1, most=100), default=85, metavar="Q", help=help_text)
    both: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": True}
    help_text = "write a restart marker after each 16 x 16 pixels, by which decoders skip hidden patches (default)"
    command.add_argument("--restart-markers", **both, help=help_text)
    help_text = "batch size for which the source's data.lanes is shown (default: %(default)s)"
    command.add_argument("--batch", type=COUNT, default=4096, help=help_text)
    command.add_argument("--workers", type=INDEX, default=0, help="processes (default: one per core)")
    command.add_argument("--out", required=True, help="folder of the new shards and their manifest")


def _weighting(commands: _Commands) -> None:
    help_text = (
        "Write a file of weights for data.weights: how often training sees each sample of a manifest in an epoch, on "
        "average. Samples that the manifest excludes get 0."
    )
    command = commands.add("weights", "weights:weights", help_text)
    command.add_argument("manifest", help="its folder")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--values", metavar="FILE", help="a .npy file with a number per sample, by ascending id")
    source.add_argument("--field", metavar="NAME", help="a number in the json member of each sample; reads all shards")
    help_text = (
        "a .npy file of uids (u8,u8), each row a view, or of uids with numbers (u8,u8,f8); samples whose uid is not "
        "listed get 0; reads all shards"
    )
    source.add_argument("--table", metavar="FILE", help=help_text)
    help_text = "soft cap: a weight w above C becomes C (2 - C / w), which is below 2 C (default: none)"
    command.add_argument("--cap", type=Number(float, above=0), default=0.0, metavar="C", help=help_text)
    command.add_argument("--out", required=True, metavar="FILE", help="the new file")


def _checking(commands: _Commands) -> None:
    help_text = (
        "Check shards against their manifest: length, CRC32, headers, and every image and caption as in training. "
        "Exit code 65 if bad data was found, unless --out has excluded it."
    )
    command = commands.add("verify", "verify:verify", help_text)
    command.add_argument("manifest", help="its folder; it stays as it is")
    part = command.add_mutually_exclusive_group()
    part.add_argument(
        "--sample",
        type=Number(float, above=0, most=1),
        metavar="SHARE",
        help="check this share of the chunks, drawn at random",
    )
    part.add_argument("--chunks", type=COUNT, metavar="N", help="check N chunks, drawn at random")
    command.add_argument("--seed", type=INDEX, default=0, help="seed of the draw (default: %(default)s)")
    both: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": True}
    command.add_argument("--decode", **both, help="decode images and captions (default)")
    help_text = "a sample needs one of these members, or a label in place of a caption"
    default = "(default: txt,cls, or the captions of parquet files)"
    command.add_argument("--captions", metavar="A,B", help=f"{help_text} {default}")
    command.add_argument("--workers", type=INDEX, default=0, help="processes (default: one per core)")
    command.add_argument("--out", help="write a new manifest to this folder that excludes the bad samples")
    command.add_argument("--examples", type=INDEX, default=3, help="samples listed per reason (default: %(default)s)")


def _inspecting(commands: _Commands) -> None:
    help_text = (
        "Show one sample of a manifest (--id), or all samples of a step of a run (--run with --step or --samples)."
    )
    command = commands.add("inspect", "inspect_samples:inspect", help_text)
    command.add_argument("manifest", nargs="?", help="its folder (not with --run)")
    command.add_argument("--id", type=INDEX, help="sample id")
    command.add_argument("--captions", help=CAPTIONS)
    command.add_argument("--save", metavar="FILE", help="write the image's bytes to this new file")
    command.add_argument("--run", metavar="RUN", help="a run: its folder, or SWEEP/RUN")
    add_root_option(command)
    step = command.add_mutually_exclusive_group()
    step.add_argument("--step", type=COUNT, help="step number as in the metrics of the run; the first is 1")
    step.add_argument("--samples", type=COUNT, help="the step that reached S samples, as in metrics and TensorBoard")
    help_text = "read the samples to show captions and replacements; --no-read shows ids only, at once"
    command.add_argument("--read", action=argparse.BooleanOptionalAction, default=True, help=help_text)
