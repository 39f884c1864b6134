"""Classify images with a trained model: print the probability of each label.

With --set, show images of a test set with the captions that the run's last evaluation found nearest.
"""

import argparse
import json
from pathlib import Path

from jobs.common.cli import COUNT, Parser, add_root_option, command, run_command

EXAMPLES = """examples:
  flip predict runs/quickstart/masked cat.png --labels "a cat,a dog"
  flip predict runs/x/y *.jpg --labels cat,dog --templates "a picture of {}" "a drawing of {}" --json
  flip predict runs/x/y cat.png --classes classes.json --top 3
  flip predict quickstart/masked --set twemoji --count 8
"""
EXAMPLE = 'Example: --labels "a cat,a dog"'
SEPARATORS = (";", "|", "\t", "\n")
"""Characters other than a comma that separate labels elsewhere."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="flip predict", description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "run", help="a run with a checkpoint: its folder, or sweep/run below FLIP_RUNS; or an exported folder"
    )
    parser.add_argument("images", nargs="*", metavar="image", help="image files")
    add_root_option(parser)
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--set", metavar="NAME", help="show images of this evaluation set, without the model")
    parser.add_argument("--count", type=COUNT, default=3, metavar="N", help="images shown of --set (default 3)")
    labels.add_argument("--labels", help="labels, separated by commas")
    labels.add_argument("--classes", help="a JSON file with the lists names and templates")
    parser.add_argument(
        "--templates", nargs="+", metavar="T", help="prompt templates; {} is replaced by the label (default: {})"
    )
    parser.add_argument("--top", type=COUNT, default=5, metavar="K", help="labels shown per image (default 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    options = parser.parse_args(arguments)
    if bool(options.images) == bool(options.set):
        parser.error("give image files with --labels or --classes, or only --set")
    return run_command(show_test_images if options.set else predict, options)


def predict(options: argparse.Namespace) -> int:
    from flip.evaluation.datasets import prompts
    from jobs.common.cluster_profile import roots
    from jobs.common.text import plain
    from jobs.submitted_runs import select

    if Path(options.run).is_dir():
        run = options.run
    else:
        run = select.select_single(options.run, roots(options.root)).path
    if options.classes:
        if not Path(options.classes).exists():
            from flip.runs.errors import ConfigError

            remedy = "It is a JSON file with the lists names and templates. To type labels: --labels 'cat, dog'."
            raise ConfigError("no such file of class names", "--classes", options.classes, remedy)
        classes = prompts.read_prompts(options.classes)
        names = classes.names
        templates = classes.templates
    else:
        names = _labels(options.labels)
        templates = ["{}"]
    from flip.export.load import load  # imports torch: after all checks that do not need it
    from jobs.common.terminal import ProgressBar

    with ProgressBar("predicting") as bar:
        model = load(run, options.device)
        probabilities = model.classify(options.images, names, options.templates or templates, bar)
    best = probabilities.topk(min(options.top, len(names)))
    rows = zip(options.images, best.values.tolist(), best.indices.tolist(), strict=True)
    report = [
        {"image": image, "labels": [{"label": names[c], "probability": p} for p, c in zip(*row, strict=True)]}
        for image, *row in rows
    ]
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    width = max(len(plain(image)) for image in options.images)
    for entry in report:
        for i, row in enumerate(entry["labels"]):  # the image is named on its first line only
            print(f"{'' if i else plain(entry['image']):{width}}  {row['probability']:6.1%}  {plain(row['label'])}")
    return 0


def _labels(text: str) -> list[str]:
    """The labels of ``--labels``. Raises ConfigError."""
    from flip.runs.errors import ConfigError

    names = [label.strip() for label in text.split(",") if label.strip()]
    if not names:
        raise ConfigError("needs at least one label", "--labels", text, EXAMPLE)
    for separator in SEPARATORS:
        if separator in text:
            remedy = f"{EXAMPLE}. Labels that contain {separator!r} can be given in a file, with --classes."
            raise ConfigError(f"separate labels by commas, not by {separator!r}", "--labels", text, remedy)
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if repeated is not None:
        raise ConfigError("a label is repeated, and would share its probability", "--labels", repeated, "Give it once.")
    return names


def show_test_images(options: argparse.Namespace) -> int:
    from flip.evaluation.metrics.predictions import TOP
    from flip.monitoring.results import read_run
    from flip.runs.errors import ConfigError, DataError
    from jobs.common.cluster_profile import roots
    from jobs.common.terminal import show, show_image
    from jobs.reporting import examples
    from jobs.submitted_runs import select

    if options.top > TOP:
        raise ConfigError(f"must be from 1 to {TOP} with --set", "--top", options.top)
    outcome = read_run(select.select_single(options.run, roots(options.root)).path)
    try:
        item, predicted = examples.read_predictions(outcome, options.set)
    except (OSError, ValueError) as error:
        raise DataError(f"predictions cannot be read: {error}") from error
    if predicted is None:
        sets = ", ".join(dict.fromkeys(row["name"] for row in outcome.evaluations)) or "none"
        remedy = f"Sets with final scores: {sets}. To score again: {command('evaluate', outcome.run.path)}"
        raise ConfigError("no predictions are stored for this set", str(outcome.run.path), options.set, remedy)
    images, problem = examples.choose_images(outcome, item, predicted, options.count, options.top)
    if options.json:
        rows = [{"image": image.name, "label": image.label, "captions": dict(image.captions)} for image in images]
        print(json.dumps(rows, indent=1))
        return 0
    top1, top5, chance = (100 * item[key] for key in ("top1", "top5", "chance"))
    show(
        f"{outcome.run.name} on {options.set}: {len(images)} of {len(predicted.images):,} images in"
        f" {predicted.where}, chosen by a hash, with the nearest of {len(predicted.names):,} captions and their cosine"
        f" similarities. Of all images {top1:.1f} % are right, as the right caption is the nearest (chance"
        f" {chance:.2g} %); {top5:.1f} % have it among the nearest five."
    )
    for image in images:
        lines = []
        for name, score in image.captions:
            mark = "  <- right caption" if name == image.label else ""
            lines.append(f"  {score:6.3f}  {name}{mark}")
        verdict = "right" if image.is_right else "wrong"
        show_image(image.jpeg, "\n".join([f"\n{image.label}: {verdict} ({image.name})", *lines]))
    if problem:
        show(f"not drawn: {problem}")
    return 0
