"""python jobs/new.py NAME: write NAME.yaml, a short commented sweep on one's own data."""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: jobs/ must not be on the path, where tensorboard.py hides the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.common.cli import Parser, command, quietly, run_command

EXAMPLES = """examples:
  python jobs/new.py mine                                   data/manifest and data/tokenizer.json, a model for CPUs
  python jobs/new.py mine --data /data/manifest --tokenizer /data/tokenizer.json --cluster h100 --size L/16
  python jobs/new.py mine --recipe clip                     a model for `export --to transformers`
"""
TEMPLATE = """\
# yaml-language-server: $schema={schema}
# Masked training on your own data: a run for each value below `grid`. Keys: docs/sweeps.md, fields: docs/contracts.md.
cluster: {cluster}
recipe: {recipe:<22} # {about}
set:
  data: {{manifest: {data}, tokenizer: {tokenizer}}}
  model.size: {size}{text}
  stages:                      # lengths are in samples; passes over the data: samples / size of the data set
    - {{name: pretrain, samples: {samples}, batch: {batch}, base_lr: {base_lr}, warmup: {warmup}}}  # peak: {peak}
  resources: {resources}
  # evaluate.sets: test sets, by docs/evaluation.md; without them the report has no accuracy
grid:
  stages.pretrain.mask: [0.5, 0.75]   # share of the patches that is left out; 0: CLIP
"""
RECIPES = {
    "portable2": "the paper's recipe, which open_clip and timm load; transformers: recipe clip",
    "clip": "the architecture of CLIP, which transformers, open_clip and timm load",
}
SMALL_TEXT = "\n  model.text: {length: 32, vocabulary: 4000}   # at least the entries of the tokenizer"
"""For recipe clip, whose text encoder is large."""
SMALL = {"samples": "1e6", "batch": 128, "base_lr": "2e-3", "warmup": "5e4", "peak": "1e-3"}
"""For the sizes that train on CPUs."""
LARGE = {"samples": "100e6", "batch": 4096, "base_lr": "3e-5", "warmup": "5e6", "peak": "4.8e-4"}
CACHE = "cache:"
"""Start of a path in the cache."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description="Write NAME.yaml, a short commented sweep on your own data.", epilog=EXAMPLES)
    parser.add_argument("file", metavar="NAME", help="name of the sweep and of its file, which must not exist")
    about = "folder of the manifest, see `shards index` (default: %(default)s)"
    parser.add_argument("--data", default="data/manifest", metavar="MANIFEST", help=about)
    about = "its file, see `tokenizer train` (default: tokenizer.json next to the manifest)"
    parser.add_argument("--tokenizer", metavar="FILE", help=about)
    parser.add_argument("--size", metavar="SIZE", help="size of the model (default: B/16; without a GPU: emoji)")
    about = "clip is for transformers, and needs `tokenizer train --kind bpe` (default: %(default)s)"
    parser.add_argument("--recipe", choices=list(RECIPES), default="portable2", help=about)
    about = "profile: a name in sweeps/clusters or a .yaml file (default: %(default)s)"
    parser.add_argument("--cluster", default="local", metavar="NAME", help=about)
    return run_command(new, parser.parse_args(arguments))


def new(args: argparse.Namespace) -> int:
    """Write the file and show the next commands. Raises ConfigError if a value is unknown or the file exists."""
    from flip.config.resolve import resolve_path
    from flip.config.schema import MODEL_PRESETS
    from flip.runs.errors import ConfigError
    from flip.runs.rundir import write_text
    from jobs.common.cluster_profile import load_profile
    from jobs.common.filesystem import writing
    from jobs.common.paths import REPOSITORY, SWEEPS
    from jobs.common.text import suggestion
    from jobs.sweeps.expansion import NAME, NAME_RULE

    target = Path(args.file.removesuffix(".yaml") + ".yaml").expanduser()
    if not NAME.fullmatch(target.stem):
        raise ConfigError("not a valid name of a sweep", value=target.stem, remedy=NAME_RULE)
    if os.path.lexists(target):
        raise ConfigError("already exists", str(target), remedy="Choose another name.")
    gpus = load_profile(args.cluster).gpus_per_node
    size = args.size or ("B/16" if gpus else "emoji")
    if size not in MODEL_PRESETS:
        remedy = f"{suggestion(size, MODEL_PRESETS)} Sizes: {', '.join(MODEL_PRESETS)}.".strip()
        raise ConfigError("no such size", "--size", size, remedy)
    schema = SWEEPS / "schemas" / "sweep.json"
    # a place in the cache stays relative to it: the sweep also serves other users
    data = args.data.rstrip("/")
    if not data.startswith(CACHE) and "://" not in data:
        data = os.path.normpath(resolve_path(data or "/"))
    cache = CACHE if data.startswith(CACHE) else ""
    beside = cache + os.path.join(os.path.dirname(data.removeprefix(cache)), "tokenizer.json")
    tokenizer = args.tokenizer or beside
    tokenizer = tokenizer if tokenizer.startswith(CACHE) else resolve_path(tokenizer)
    small = MODEL_PRESETS[size]["image"]["width"] < 512
    values = {
        "recipe": args.recipe,
        "about": RECIPES[args.recipe],
        "text": SMALL_TEXT if small and args.recipe == "clip" else "",
        "schema": os.path.relpath(schema, target.parent) if REPOSITORY in target.absolute().parents else schema,
        "cluster": args.cluster,
        "data": json.dumps(data, ensure_ascii=False),
        "tokenizer": json.dumps(tokenizer, ensure_ascii=False),
        "size": size,
        "resources": f"{{nodes: 1, processes: {gpus or 1}, gpus: {gpus}}}",
        **(SMALL if small else LARGE),
    }
    with writing(target):
        write_text(target, TEMPLATE.format(**values))
    submit = partial(command, "submit", target.absolute())
    report = {"file": str(target), "next": [submit("--dry-run"), submit("--watch")]}
    text = "\n  ".join([f"written: {target}; next:", *report["next"]])
    print(json.dumps(report, indent=1) if args.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(quietly(main))
