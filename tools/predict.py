"""Classify images with a trained model: print the probability of each label."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json

from jobs.common.cli import Parser, quietly, run_command

EXAMPLES = """examples:
  python tools/predict.py runs/quickstart/mask50 cat.png --labels "a cat,a dog"
  python tools/predict.py runs/x/y *.jpg --labels cat,dog --templates "a picture of {}" "a drawing of {}" --json
  python tools/predict.py runs/x/y cat.png --classes classes.json --top 3
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "run", help="a run with a checkpoint: its folder, or sweep/run below FLIP_RUNS; or an exported folder"
    )
    parser.add_argument("images", nargs="+", metavar="image", help="image files")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", help="labels, separated by commas")
    labels.add_argument("--classes", help='a JSON file {"names": [...], "templates": [...]}')
    parser.add_argument(
        "--templates", nargs="+", metavar="T", help="prompt templates; {} is replaced by the label (default: {})"
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="labels shown per image (default 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    options = parser.parse_args(arguments)
    return run_command(predict, options)


def predict(options: argparse.Namespace) -> int:
    from flip.evaluation import prompts
    from flip.runs.errors import ConfigError
    from jobs.common.cluster_profile import roots
    from jobs.runs import select

    if options.top < 1:
        raise ConfigError("must be at least 1", "--top", options.top)
    run = options.run if Path(options.run).is_dir() else select.select_one(options.run, roots()).path
    if options.classes:
        classes = prompts.read_prompts(options.classes)
        names, templates = classes.names, classes.templates
    else:
        names, templates = [label.strip() for label in options.labels.split(",") if label.strip()], ["{}"]
    from flip.export.load import load  # imports torch: after all checks that do not need it

    probabilities = load(run, options.device).classify(options.images, names, options.templates or templates)
    best = probabilities.topk(min(options.top, len(names)))
    rows = zip(options.images, best.values.tolist(), best.indices.tolist(), strict=True)
    report = [
        {"image": image, "labels": [{"label": names[c], "probability": p} for p, c in zip(*row, strict=True)]}
        for image, *row in rows
    ]
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    width = max(map(len, options.images))
    for entry in report:
        for i, row in enumerate(entry["labels"]):  # the image is named on its first line only
            print(f"{'' if i else entry['image']:{width}}  {row['probability']:6.1%}  {row['label']}")
    return 0


if __name__ == "__main__":
    sys.exit(quietly(main))
