"""flip evaluate RUN ... | --model open_clip:FOLDER: score checkpoints, locally or on a cluster."""

import argparse

from jobs.common.cli import AMOUNT, COUNT, INDEX, Parser, run_command

EXAMPLES = """examples:
  flip evaluate quickstart/masked                         the sets of the run, its newest checkpoint
  flip evaluate 'quickstart/*masked' --checkpoint all     several runs, a job each
  flip evaluate x/y --sets imagenet1k flickr30k --data /data/eval --cluster our --gpus 4
  flip evaluate x/y --sets datacomp38 --data /data/eval   a suite: also paper-table3, 4, 5, 6
  flip evaluate x/y --sets probe:imagenet1k=/data/wds_imagenet1k --checkpoint all
  flip evaluate x/y --sets imagenet1k --mask 0.5 --ensemble   masked inference, and complementary masks
  flip evaluate --model open_clip:/models/vit-b-16 --sets imagenet1k   reported in the sweep `others`
  flip evaluate --list                                    data sets, and where to get them
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="flip evaluate",
        description="Score checkpoints on data sets. The ranks share the images.",
        epilog=EXAMPLES,
    )
    parser.add_argument("target", nargs="*", help="sweeps, SWEEP/RUN, patterns of it, or folders")
    parser.add_argument("--model", metavar="open_clip:FOLDER", help="an open_clip model in place of a run")
    parser.add_argument(
        "--save-as", "--into", metavar="SWEEP/NAME", dest="into",
        help="run that gets the results of a --model; default: others/ and the folder's name",
    )  # fmt: skip
    parser.add_argument("--checkpoint", default="newest", help="newest (default), all, S, or STAGE/S-n")
    parser.add_argument(
        "--url", default="", metavar="ADDRESS",
        help="read checkpoint files below this address, even if it comes from a record of another user",
    )  # fmt: skip
    parser.add_argument(
        "--sets", nargs="+", default=[], metavar="SET",
        help="a suite (see --list), NAME or NAME=PATH, with the prefix zeroshot:, retrieval: or probe: for another task"
        " than the default; default: the run's own sets",
    )  # fmt: skip
    parser.add_argument(
        "--data", default="", metavar="ROOT", help="folder of data sets; default: FLIP_DATA, else ./data"
    )
    parser.add_argument(
        "--classes", default="", metavar="FILE", help="JSON file with class names and templates of zero-shot sets"
    )
    parser.add_argument(
        "--templates",
        choices=["7", "80"],
        default="",
        help="number of prompt templates for ImageNet, from the open_clip package",
    )
    _add_scoring_options(parser)
    _add_job_options(parser)
    parser.add_argument(
        "--list", action="store_true", help="list data sets: whether they are present, and where to get them"
    )
    return parser


def _add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """Options of how images are scored."""
    parser.add_argument("--mask", nargs="+", default=[], metavar="RATIO", help="also score masked images")
    parser.add_argument(
        "--ensemble", action="store_true", help="also average over complementary masks that show every patch"
    )
    parser.add_argument(
        "--probe-c", "--cost", type=AMOUNT, default=0.0, dest="cost",
        help="C of linear probes, as in scikit-learn; default: chosen on part of the training set",
    )  # fmt: skip
    parser.add_argument("--batch", type=COUNT, default=256, help="images per encoder batch (default 256)")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="precision of the encoders (default fp32)"
    )
    parser.add_argument("--no-cache", action="store_true", help="do not store features in FLIP_CACHE/features")


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    """Options of the job that computes the scores."""
    parser.add_argument(
        "--cluster",
        default="local",
        metavar="NAME",
        help="profile: a name in sweeps/clusters or a .yaml file (default local)",
    )
    parser.add_argument("--nodes", type=COUNT, default=1, help="nodes of the job (default: %(default)s)")
    parser.add_argument("--processes", type=INDEX, default=0, help="ranks per node; default: its GPUs, else 1")
    parser.add_argument("--gpus", type=INDEX, default=-1, help="GPUs per node; default: those of the profile")
    parser.add_argument("--hours", type=AMOUNT, default=4.0, help="wall time limit of the job in hours (default 4)")
    parser.add_argument("--root", help="folder of run directories; default: the profile's, FLIP_RUNS, else ./runs")
    parser.add_argument("--detach", action="store_true", help="do not wait for the results")


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if not args.list and bool(args.target) == bool(args.model):
        parser.error("give a run, --model or --list")
    return run_command(evaluate, args)


def evaluate(args: argparse.Namespace) -> int:
    from jobs.common.terminal import show
    from jobs.submission.evaluation import EvaluateCommand, listing

    if args.list:
        show(listing(args.data, args.json))
        return 0
    return EvaluateCommand(args).run()
