"""python jobs/evaluate.py RUN | --model open_clip:FOLDER: score committed checkpoints, here or on a cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: jobs/ must not be on the path, where tensorboard.py hides the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.common.cli import Parser, quietly, run_command

EXAMPLES = """examples:
  python jobs/evaluate.py quickstart/mask50                         the sets of the run, its newest commit
  python jobs/evaluate.py x/y --sets imagenet1k flickr30k --data /data/eval --cluster our --gpus 4
  python jobs/evaluate.py x/y --sets probe:imagenet1k=/data/wds_imagenet1k --commit all
  python jobs/evaluate.py x/y --sets imagenet1k --mask 0.5 --ensemble   masked inference, and complementary masks
  python jobs/evaluate.py --model open_clip:/models/vit-b-16 --sets imagenet1k   stands in the tables of sweep `others`
  python jobs/evaluate.py --list                                    the names, what is here, where to get the rest
"""


def parser() -> argparse.ArgumentParser:
    made = Parser(
        description="Score committed checkpoints on data sets, all ranks together, every image once.", epilog=EXAMPLES
    )
    made.add_argument("run", nargs="?", help="sweep/run, or the folder of a run")
    made.add_argument("--model", metavar="open_clip:FOLDER", help="somebody else's model in the place of a run")
    made.add_argument(
        "--save-as", "--into", metavar="SWEEP/NAME", dest="into",
        help="run that gets the results of a --model; default: others/ and the folder's name",
    )  # fmt: skip
    made.add_argument("--commit", default="newest", help="newest (default), all, S, or STAGE/S-n")
    made.add_argument(
        "--url", default="", metavar="ADDRESS",
        help="read checkpoint files below this address even if another user's record leads there",
    )  # fmt: skip
    made.add_argument(
        "--sets", nargs="+", default=[], metavar="SET",
        help="NAME or NAME=PATH, before it zeroshot:, retrieval: or probe: where another task is meant; default: the"
        " run's own sets",
    )  # fmt: skip
    made.add_argument("--data", default="", metavar="ROOT", help="where data sets lie; default: FLIP_DATA, else ./data")
    made.add_argument("--classes", default="", metavar="FILE", help="names and templates (JSON) of zero-shot sets")
    made.add_argument("--templates", choices=["7", "80"], default="", help="of ImageNet, by open_clip's package")
    made.add_argument("--mask", nargs="+", default=[], metavar="RATIO", help="score masked images as well")
    made.add_argument("--ensemble", action="store_true", help="and the average over masks that show every patch")
    made.add_argument(
        "--probe-c", "--cost", type=float, default=0.0, dest="cost",
        help="C of linear probes, as in scikit-learn; default: chosen on part of the training set",
    )  # fmt: skip
    made.add_argument("--batch", type=int, default=256, help="images encoded at a time (default 256)")
    made.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of the arithmetic; default: fp32, as exported"
    )
    made.add_argument("--no-cache", action="store_true", help="keep no features in FLIP_CACHE/features")
    made.add_argument("--cluster", default="local", metavar="NAME", help="profile in sweeps/clusters (default local)")
    made.add_argument("--nodes", type=int, default=1)
    made.add_argument("--processes", type=int, default=0, help="ranks of a node; default: its GPUs, else 1")
    made.add_argument("--gpus", type=int, default=-1, help="of a node; default: as the profile has them")
    made.add_argument("--hours", type=float, default=4.0, help="wall limit of the job (default 4)")
    made.add_argument("--root", help="where run directories live; default: the profile's, FLIP_RUNS, else ./runs")
    made.add_argument("--detach", action="store_true", help="do not wait for the results")
    made.add_argument("--list", action="store_true", help="data sets by name: here or not, and where to get them")
    made.add_argument("--json", action="store_true", help="the results as one JSON list on standard output")
    return made


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    if not args.list and bool(args.run) == bool(args.model):
        made.error("name a run, or --model, or --list")
    return run_command(lambda: evaluate(args))


def evaluate(args: argparse.Namespace) -> int:
    from jobs.submission.evaluation import EvaluationRequest, listing

    if args.list:
        print(listing(args.data, args.json))
        return 0
    return EvaluationRequest(args).run()


if __name__ == "__main__":
    sys.exit(quietly(main))
