"""flip new NAME: write NAME.yaml, a short commented sweep on one's own data."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.common.cli import Parser, command, note, run_command

if TYPE_CHECKING:
    from flip.tokenizer import Tokenizer

EXAMPLES = """examples:
  flip new mine                                   data/manifest and data/tokenizer.json, a model for CPUs
  flip new mine --data /data/manifest --tokenizer /data/tokenizer.json --cluster h100 --size L/16
  flip new mine --recipe clip                     a model for `flip export --to transformers`
  flip new mine --data data/mine --test data/mine/test    (both from `flip shards make --split 0.2`)
"""
TEMPLATE = """\
# yaml-language-server: $schema={schema}
# Masked training on your own data: a run for each value below `grid`. Keys: docs/sweeps.md, fields: docs/contracts.md.
cluster: {cluster}
recipe: {recipe:<22} # {about}
set:
  data: {{manifest: {data}, tokenizer: {tokenizer}{images}}}
  model.size: {size}{text}
  stages:                      # lengths are in samples; passes over the data: samples / size of the data set
    - {{name: pretrain, samples: {samples}, batch: {batch}, base_lr: {base_lr}, warmup: {warmup}}}  # peak: {peak}
  resources: {resources}
{sets}
grid:
  stages.pretrain.mask: [0.5, 0.75]   # share of the patches that is left out; 0: CLIP
"""
RECIPES = {
    "portable2": "the paper's recipe, which open_clip and timm load; transformers: recipe clip",
    "clip": "the architecture of CLIP, which transformers, open_clip and timm load",
}
SMALL_TEXT = "\n  model.text: {{length: 32, vocabulary: {entries}}}   # at least the entries of the tokenizer"
"""For recipe clip, whose text encoder is large."""
USUAL_ENTRIES = 4000
"""Of a tokenizer that does not exist yet."""
CACHE = "cache:"
"""Start of a path in the cache."""
NO_SETS = "  # evaluate.sets: test sets, by docs/evaluation.md; without them the report has no accuracy"


class Schedule(NamedTuple):
    """Length and rate of a stage. ``samples``: of a large data set; ``passes``: the most passes over a small one."""

    samples: int
    passes: int
    batch: int
    base_lr: float

    def fields(self, size: int) -> dict[str, str]:
        """The fields of the template for a data set of ``size`` samples; 0: unknown."""
        samples = self.samples
        batch = self.batch
        if size:
            while batch > SMALLEST_BATCH and 2 * batch > size:
                batch //= 2
            samples = min(samples, max(self.passes * size, batch))
        samples = int(float(f"{samples:.2g}"))
        return {
            "samples": _short(samples),
            "batch": str(batch),
            "base_lr": _short(self.base_lr),
            "warmup": _short(samples // 20),
            "peak": _short(self.base_lr * batch / 256),
        }


SMALLEST_BATCH = 16
SMALL_WIDTH = 512
"""Models with a narrower image tower train on CPUs."""
SMALL = Schedule(samples=1_000_000, passes=100, batch=128, base_lr=2e-3)
"""For the sizes that train on CPUs."""
LARGE = Schedule(samples=100_000_000, passes=100, batch=4096, base_lr=3e-5)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="flip new", description="Write NAME.yaml, a short commented sweep on your own data.", epilog=EXAMPLES
    )
    parser.add_argument("file", metavar="NAME", help="name of the sweep and of its file, which must not exist")
    help_text = "folder of the manifest, see `shards index` (default: %(default)s)"
    parser.add_argument("--data", default="data/manifest", metavar="MANIFEST", help=help_text)
    help_text = "manifest of images that are scored at the end (default: MANIFEST/test if it exists)"
    parser.add_argument("--test", metavar="FOLDER", help=help_text)
    help_text = "its file, see `tokenizer train` (default: tokenizer.json next to the manifest)"
    parser.add_argument("--tokenizer", metavar="FILE", help=help_text)
    parser.add_argument("--size", metavar="SIZE", help="size of the model (default: B/16; without a GPU: emoji)")
    help_text = (
        "clip is for transformers, and needs `flip tokenizer train --kind bpe` (default: as the tokenizer needs)"
    )
    parser.add_argument("--recipe", choices=list(RECIPES), help=help_text)
    help_text = "profile: a name in sweeps/clusters or a .yaml file (default: %(default)s)"
    parser.add_argument("--cluster", default="local", metavar="NAME", help=help_text)
    return run_command(new, parser.parse_args(arguments))


def new(args: argparse.Namespace) -> int:
    """Write the file and show the next commands.

    Raises ConfigError if a value is unknown, the file exists, or its folder does not.
    """
    from flip.runs import addresses
    from flip.runs.errors import ConfigError
    from flip.runs.rundir import write_text
    from jobs.common.filesystem import writing
    from jobs.common.paths import SWEEPS
    from jobs.sweeps.expansion import NAME, NAME_RULE

    target = Path(args.file.removesuffix(".yaml") + ".yaml").expanduser()
    if not NAME.fullmatch(target.stem):
        raise ConfigError("not a valid name of a sweep", value=target.stem, remedy=NAME_RULE)
    if os.path.lexists(target):
        raise ConfigError("already exists", str(target), remedy="Choose another name, or move that file away.")
    shipped = SWEEPS / target.name
    if target.parent.absolute() == Path.cwd() and shipped.exists():
        what = "a sweep of this name exists, and the name would mean both files"
        raise ConfigError(what, str(shipped), target.stem, "Choose another name.")
    if not target.parent.is_dir():
        raise ConfigError("no such folder", str(target.parent), remedy="Make it, or name a file in another folder.")
    for option, path in (("--data", args.data), ("--test", args.test), ("--tokenizer", args.tokenizer)):
        addresses.require_local(path or "", option)
    fields = _fields(args, target)
    with writing(target, "Name a file in another folder."):
        write_text(target, TEMPLATE.format(**fields))
    note(_missing_data(_place(args.data)))
    submit = partial(command, "submit", target.absolute())
    report = {"file": str(target), "next": [submit("--dry-run"), submit("--watch")]}
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print(f"written: {target}; next:", *report["next"], sep="\n  ")
    return 0


def _fields(args: argparse.Namespace, target: Path) -> dict[str, object]:
    """The fields of the template for the file ``target``. Raises ConfigError if a value of ``args`` is unknown."""
    from flip.config.resolve import manifest_record
    from flip.config.schema import MODEL_PRESETS
    from flip.runs.errors import ConfigError, suggestion
    from jobs.common.cluster_profile import load_profile

    gpus = load_profile(args.cluster).gpus_per_node
    size = args.size or ("B/16" if gpus else "emoji")
    if size not in MODEL_PRESETS:
        remedy = f"{suggestion(size, MODEL_PRESETS)} Sizes: {', '.join(MODEL_PRESETS)}.".strip()
        raise ConfigError("no such size", "--size", size, remedy)
    small = MODEL_PRESETS[size]["image"]["width"] < SMALL_WIDTH
    data = _place(args.data)
    record = manifest_record(data) or {}
    tokenizer = _tokenizer(args.tokenizer, data)
    own_tokenizer = _known_tokenizer(tokenizer)
    recipe = _recipe(args.recipe, own_tokenizer)
    test = _test_manifest(args.test, data)
    sets = NO_SETS
    if test:
        sets = _test_set(target.stem, test)
    text = ""
    if small and recipe == "clip":
        entries = USUAL_ENTRIES
        if own_tokenizer:
            entries = own_tokenizer.size
        text = SMALL_TEXT.format(entries=entries)
    lengths = SMALL if small else LARGE
    return {
        "recipe": recipe,
        "about": RECIPES[recipe],
        "text": text,
        "schema": _schema(target),
        "cluster": _cluster(args.cluster),
        "data": json.dumps(data, ensure_ascii=False),
        "tokenizer": json.dumps(tokenizer, ensure_ascii=False),
        "size": size,
        "resources": f"{{nodes: 1, processes: {gpus or 1}, gpus: {gpus}}}",
        "images": _of_images(record),
        "sets": sets,
        **lengths.fields(int(record.get("samples", 0))),
    }


def _missing_data(data: str) -> str:
    """A note if there is no manifest yet; empty if there is one."""
    from flip.config.resolve import manifest_record, source_remedy

    if manifest_record(data):
        return ""
    remedy = source_remedy(data) or (
        "Make it before the dry run, from tar files (flip shards index) or from images (flip shards make)."
    )
    return f"{data}: no manifest yet. {remedy}"


def _schema(target: Path) -> Path:
    """Where the sweep file ``target`` finds the schema for editors."""
    from jobs.common.paths import REPOSITORY, SWEEPS

    schema = SWEEPS / "schemas" / "sweep.json"
    if REPOSITORY in target.absolute().parents:
        return Path(os.path.relpath(schema, target.parent))
    return schema


def _cluster(name: str) -> str:
    """The profile as the sweep file names it: a name, or an absolute path."""
    from flip.config.resolve import is_relative_profile, resolve_path

    if is_relative_profile(name):
        return json.dumps(resolve_path(name), ensure_ascii=False)
    return name


def _tokenizer(path: str, data: str) -> str:
    """The tokenizer's file; by default the one next to the manifest ``data``."""
    from flip.config.resolve import resolve_path

    if path:
        return path if path.startswith(CACHE) else resolve_path(path)
    cache = CACHE if data.startswith(CACHE) else ""
    default = cache + os.path.join(os.path.dirname(data.removeprefix(cache)), "tokenizer.json")
    return default if cache else resolve_path(default)


def _known_tokenizer(path: str) -> Tokenizer | None:
    """The tokenizer at ``path``; None if there is none yet. Raises ConfigError if it is damaged, or a folder."""
    from flip.config.resolve import resolve_path
    from flip.runs.errors import ConfigError
    from flip.tokenizer import Tokenizer

    file = resolve_path(path)
    if os.path.isdir(file):
        remedy = f"Name the file: --tokenizer {os.path.join(path, 'tokenizer.json')}"
        raise ConfigError("a folder, and a tokenizer is a file", "--tokenizer", path, remedy)
    if not os.path.isfile(file):
        return None
    return Tokenizer(file, length=1, prepend_cls=False)


def _recipe(chosen: str | None, tokenizer: Tokenizer | None) -> str:
    """The recipe: ``chosen``, or the one for the tokenizer. Raises ConfigError if the two do not fit."""
    from flip.runs.errors import ConfigError

    if tokenizer is None:
        return chosen or "portable2"
    fitting = "portable2"
    if tokenizer.kind.has_end:
        fitting = "clip"
    if chosen not in (None, fitting):
        what = f"does not fit {tokenizer.path}, a tokenizer of {tokenizer.kind.title}"
        raise ConfigError(what, "--recipe", chosen, f"Use --recipe {fitting}, or name another file with --tokenizer.")
    return fitting


def _test_manifest(path: str, data: str) -> str:
    """The manifest of the test set: ``path``, or the one below ``data``; empty: none. Raises ConfigError."""
    from flip.config.resolve import manifest_record
    from flip.runs.errors import ConfigError

    if path:
        test = _place(path)
        if manifest_record(test) is None:
            remedy = "Make one with: flip shards make SOURCE --split 0.2 --out FOLDER, which writes FOLDER/test."
            raise ConfigError("no manifest in this folder", "--test", path, remedy)
        return test
    below = f"{data}/test"
    return below if manifest_record(below) else ""


def _place(path: str) -> str:
    """An absolute path; a place in the cache stays relative to it, because the sweep also serves other users."""
    from flip.config.resolve import resolve_path

    path = path.rstrip("/")
    if path.startswith(CACHE):
        return path
    return os.path.normpath(resolve_path(path or "/"))


def _of_images(record: Mapping[str, Any]) -> str:
    """Settings of ``data`` that the images of a data set need, by the counts of `shards make`."""
    settings = record.get("settings")
    counts = None
    if isinstance(settings, dict):
        counts = settings.get("pictures")
    if not isinstance(counts, dict):
        return ""
    fields = ""
    if counts.get("transparent"):
        fields += ", to_rgb: flatten"
    if counts.get("turned"):
        fields += ", exif: apply"
    return fields


def _test_set(name: str, folder: str) -> str:
    """The lines of ``evaluate.sets`` for the manifest of a test set, with class names or with captions."""
    from flip.config.resolve import resolve_path

    fields = f"name: {name}, manifest: {json.dumps(folder, ensure_ascii=False)}"
    if os.path.isfile(os.path.join(resolve_path(folder), "classes.json")):
        fields += f", classes: {json.dumps(f'{folder}/classes.json', ensure_ascii=False)}"
    else:
        fields += ", task: retrieval"
    return f"  evaluate.sets: [{{{fields}}}]   # scored at the end; docs/evaluation.md"


def _short(number: float) -> str:
    """A number as sweep files write it: 1e6, 3.2e4, 960."""
    if 0.1 <= number < 10_000:
        return f"{number:g}"
    mantissa, _, exponent = f"{number:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"
