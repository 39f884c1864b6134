"""Classify images with a trained model: print the probability of each label."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json

from jobs.common.cli import Parser

EXAMPLES = """examples:
  python tools/predict.py runs/quickstart/mask50 cat.png --labels "a cat,a dog"
  python tools/predict.py runs/x/y *.jpg --labels cat,dog --templates "a picture of {}" "a drawing of {}" --json
  python tools/predict.py runs/x/y cat.png --classes classes.json --top 3
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def predict(options: argparse.Namespace) -> list[dict[str, object]]:
    """Per image the labels from the likeliest on: [{"image", "labels": [{"label", "probability"}, ...]}]."""
    from flip.evaluation import prompts
    from flip.runs.errors import ConfigError
    from jobs.common.cluster_profile import roots
    from jobs.runs import select

    if options.top < 1:
        raise ConfigError("must be at least 1", "--top", options.top)
    run = options.run if Path(options.run).is_dir() else select.select_one(options.run, roots()).path
    if options.classes:
        names, templates = (wording := prompts.read(options.classes)).names, wording.templates
    else:
        names, templates = [label.strip() for label in options.labels.split(",") if label.strip()], ["{}"]
    from flip.export.load import load  # torch: what can be wrong without it was said by now

    probabilities = load(run, options.device).classify(options.images, names, options.templates or templates)
    best = probabilities.topk(min(options.top, len(names)))
    return [
        {"image": image, "labels": [{"label": names[c], "probability": p} for p, c in zip(*row, strict=True)]}
        for image, row in zip(
            options.images, zip(best.values.tolist(), best.indices.tolist(), strict=True), strict=True
        )
    ]


def table(found: list[dict[str, object]]) -> str:
    """One line per image and label; the image stands on its first."""
    lines: list[str] = []
    width = max(len(str(entry["image"])) for entry in found)
    for entry in found:
        image = str(entry["image"])
        for row in entry["labels"]:  # type: ignore[attr-defined]
            lines.append(f"{image:{width}}  {row['probability']:6.1%}  {row['label']}")
            image = ""
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from flip.runs.errors import FlipError

    try:
        found = predict(options)
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    print(json.dumps(found, indent=1) if options.json else table(found))
    return 0


if __name__ == "__main__":
    from jobs.common.cli import quietly

    sys.exit(quietly(main))
