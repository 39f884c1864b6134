"""python jobs/debug.py --sweep FILE --run NAME: one run, here and now, in a scratch copy, under a debugger."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: jobs/ must not be on the path, where tensorboard.py hides the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.common.cli import Parser, quietly, run_command

if TYPE_CHECKING:
    from flip.runs.rundir import RunDir
    from jobs.planning.plan import ResolvedRun

EXAMPLES = """examples:
  python jobs/debug.py --sweep quickstart --run mask50
  python jobs/debug.py --sweep quickstart --run mask50 stages.pretrain.batch=32 compute.device=cpu
  salloc -N 2 --ntasks-per-node 8 --gpus-per-node 8 python jobs/debug.py --sweep my.yaml --run large --out /shared/tmp
One rank, in this process, without loader processes: pdb stops where an error is, and at breakpoint(). Within an
allocation of Slurm's with more than one task the ranks are its tasks, started by srun; their logs are shown at the end.
Where the run exists, its newest commit is copied and gone on from; the run itself is not touched.
"""


def parser() -> argparse.ArgumentParser:
    made = Parser(
        description="Try one run of a sweep here and now, in a scratch copy of its directory.", epilog=EXAMPLES
    )
    made.add_argument("--sweep", required=True, metavar="FILE", help="the sweep file, or its name in sweeps/")
    made.add_argument("--run", required=True, metavar="NAME")
    made.add_argument("--fresh", action="store_true", help="from the beginning, even where the run has a commit")
    made.add_argument("--out", metavar="DIR", help="where the copy is made; default: a temporary folder, which stays")
    made.add_argument("--no-pdb", action="store_true", help="show the traceback, start no debugger")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings on top of the sweep's")
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return run_command(lambda: debug(args, allocation(os.environ)))


def allocation(environ: Mapping[str, str]) -> list[int]:
    """Tasks on each node of the allocation of Slurm's that this process is in: ``2(x3),1`` is [2, 2, 2, 1]."""
    if "SLURM_JOB_ID" not in environ:
        return []
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_TASKS_PER_NODE", ""))
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def debug(args: argparse.Namespace, tasks: list[int]) -> int:
    """The exit code of the ranks."""
    from flip.runs.errors import ConfigError

    allocated = sum(tasks) > 1
    if len(set(tasks)) > 1:
        remedy = "Ask for it with --ntasks-per-node."
        raise ConfigError("the nodes of the allocation have different numbers of tasks", value=tasks, remedy=remedy)
    nodes, processes = (len(tasks), tasks[0]) if allocated else (1, 1)
    mild = ["monitor.hang_minutes=0", "monitor.log_every=1", "data.workers=0"]
    mild += [] if allocated else ["resources.gpus=0"]
    fixed = ["resources.cluster=''", f"resources.nodes={nodes}", f"resources.processes={processes}"]
    wanted, real = resolve(args, not allocated, mild, fixed)
    run = scratch(wanted, real, args)
    print(f"a scratch copy: {run.path}", flush=True)
    n = run.start_attempt({"host": os.uname().nodename, "first_commit": False})
    return in_allocation(run, n) if allocated else in_process(run, n, args.no_pdb)


def resolve(args: argparse.Namespace, alone: bool, below: list[str], above: list[str]) -> tuple[ResolvedRun, RunDir]:
    """The run as a submission would have it, and where the real one is or would be; settings below and above those
    that were typed."""
    from dataclasses import replace

    from flip.config.merge import read_config
    from flip.runs.rundir import RunDir
    from jobs import submit
    from jobs.common.cluster_profile import load_profile
    from jobs.submission.submission import Submission

    def submission(*more: str) -> Submission:
        words = ["--sweep", args.sweep, "--only", args.run, "--dry-run", *below, *args.overrides, *above, *more]
        return Submission(submit.parser().parse_args(words))

    made = submission()
    real = RunDir(made.folder / made.sweep.runs[0].name)
    if real.config.exists() and not read_config(real.config).data.sets:  # a commit's S is one of its lanes
        made = submission(f"data.lanes={read_config(real.config).data.lanes}")
    here = load_profile("local")  # of the sweep's own cluster only the folder of its runs is of interest
    made.profile = replace(here, kind=here.kind if alone else "slurm", runs_root=made.profile.runs_root)
    return made.wanted()[0], real


def scratch(wanted: ResolvedRun, real: RunDir, args: argparse.Namespace) -> RunDir:
    """A run directory with this configuration and, where the real one has it, the newest commit."""
    import shutil

    from flip.checkpoint.remote import at_hand
    from flip.config.merge import dump
    from flip.runs import commit
    from flip.runs.rundir import RunDir, write_json, write_text

    folder = Path(tempfile.mkdtemp(prefix=f"flip-{wanted.name}-", dir=args.out)) / real.sweep
    run = RunDir(folder / wanted.name)
    run.path.mkdir(parents=True)
    wanted.config.checkpoint.url = ""  # what lies there belongs to the real run
    write_text(run.config, dump(wanted.config))
    write_json(run.identity, dict(wanted.identity))
    done = [] if args.fresh else commit.commits(real)
    if done:
        copy = run.checkpoints / done[-1].stage / done[-1].path.name
        with at_hand(done[-1]) as here:
            shutil.copytree(here, copy)
        write_json(copy / commit.COMMIT_FILE, {key: value for key, value in done[-1].record.items() if key != "url"})
    return run


def in_process(run: RunDir, n: int, no_pdb: bool) -> int:
    """This process is the only rank."""
    import pdb
    import traceback

    from jobs.runtime import worker

    ours = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "FLIP_ATTEMPT": str(n)}
    os.environ.update(ours)
    try:
        worker.in_process(run, n)
    except Exception as error:  # whatever it is, it is what one looks for here
        traceback.print_exc()
        if not no_pdb and sys.stdin.isatty():
            pdb.post_mortem(error.__traceback__)
        return getattr(error, "code", 70)
    return 0


def in_allocation(run: RunDir, n: int) -> int:
    """The ranks are the tasks of the allocation in which this process runs, all of them."""
    from jobs.common.paths import REPOSITORY
    from jobs.common.text import plain
    from jobs.reporting.run_details import last_lines

    code = REPOSITORY
    run.open_logs(n)
    ours = {"FLIP_RUN": run.path, "FLIP_ATTEMPT": n, "FLIP_SNAPSHOT": code, "PYTHONPATH": code, "PYTHONUNBUFFERED": 1}
    words = [
        "srun",
        "--kill-on-bad-exit=1",
        "--export=ALL",
        sys.executable,
        str(code / "jobs" / "host" / "rank_entry.py"),
        "jobs.worker",
    ]
    done = subprocess.run(words, env={**os.environ, **{key: str(value) for key, value in ours.items()}}, check=False)
    for path in sorted((run.logs / str(n)).iterdir()):
        print(f"--- {path}", *map(plain, last_lines(path, 20)), sep="\n")
    return done.returncode


if __name__ == "__main__":
    from jobs.runtime.worker import leave

    leave(quietly(main))  # threads of torch that still run would let the interpreter's end abort
