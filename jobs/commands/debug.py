"""flip debug SWEEP --run NAME: train a run in this process, in a scratch copy, under a debugger."""

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

from jobs.common.cli import Parser, add_root_option, add_sweep_arguments, run_command

if TYPE_CHECKING:
    from flip.runs.rundir import RunDir
    from jobs.workloads.workload import SweepRun

EXAMPLES = """examples:
  flip debug quickstart --run masked
  flip debug quickstart --run masked stages.pretrain.batch=32 compute.device=cpu
  salloc -N 2 --ntasks-per-node 8 --gpus-per-node 8 flip debug my.yaml --run large --out /shared/tmp
There is one rank, in this process, without loader processes; pdb starts at an error and at breakpoint(). In a Slurm
allocation of several tasks, srun starts one rank per task, and their logs are shown at the end. If the run exists, the
scratch copy resumes from its newest checkpoint; the run itself is not changed.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="flip debug",
        description="Train a run of a sweep in this process, in a scratch copy of its directory.",
        epilog=EXAMPLES,
        json=False,
    )
    add_sweep_arguments(parser)
    help_text = "the run, as in the plan of `flip submit --dry-run`"
    parser.add_argument("--run", required=True, metavar="NAME", help=help_text)
    add_root_option(parser)
    parser.add_argument("--fresh", action="store_true", help="start from scratch, even if the run has a checkpoint")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for the copy; default: a temporary folder, which is not deleted"
    )
    parser.add_argument("--no-pdb", action="store_true", help="show the traceback, do not start a debugger")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    return run_command(lambda args: debug(args, allocation(os.environ)), args)


def allocation(environ: Mapping[str, str]) -> list[int]:
    """Tasks per node of the current Slurm allocation: ``2(x3),1`` is [2, 2, 2, 1]; empty outside of Slurm."""
    if "SLURM_JOB_ID" not in environ:
        return []
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_TASKS_PER_NODE", ""))
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def debug(args: argparse.Namespace, tasks: list[int]) -> int:
    """Train in this process or in the allocation; returns the exit code of the ranks."""
    from flip.files import current_folder
    from flip.runs.errors import ConfigError

    allocated = sum(tasks) > 1
    if len(set(tasks)) > 1:
        remedy = "Ask for it with --ntasks-per-node."
        raise ConfigError("the nodes of the allocation have different numbers of tasks", value=tasks, remedy=remedy)
    if allocated:
        nodes = len(tasks)
        processes = tasks[0]
    else:
        nodes = 1
        processes = 1
    defaults = ["monitor.hang_minutes=0", "monitor.log_every=1", "data.workers=0"]
    if not allocated:
        defaults += ["resources.gpus=0"]
    fixed = [
        "resources.cluster=''",
        "checkpoint.url=''",  # the URL belongs to the real run
        f"resources.nodes={nodes}",
        f"resources.processes={processes}",
    ]
    resolved, real, callbacks = resolved_run(args, not allocated, defaults, fixed)
    run = scratch(resolved, real, args)
    print(f"a scratch copy: {run.path}", flush=True)
    n = run.start_attempt({"host": os.uname().nodename, "first_commit": False})
    code = code_with(callbacks, run)
    current_folder.leave()
    if allocated:
        return in_allocation(run, n, code)
    return in_process(run, n, args.no_pdb, code)


def _refuse_program(args: argparse.Namespace) -> None:
    """Raise ConfigError if the run executes a program: its own debugger starts it."""
    from flip.runs.errors import ConfigError
    from jobs.sweeps.sweep_file import find_sweep
    from jobs.workloads.command_request import CommandRequest
    from jobs.workloads.loading import requested_runs

    file = find_sweep(args.sweep)
    for run in requested_runs(file, only=args.run, may_be_empty=True).runs:
        if isinstance(run, CommandRequest):
            remedy = "Start its command by hand: `flip submit SWEEP --dry-run` shows the words."
            raise ConfigError("this run executes a program, and debug runs trainings alone", file, run.name, remedy)


def resolved_run(
    args: argparse.Namespace, local: bool, below: list[str], above: list[str]
) -> tuple[SweepRun, RunDir, Mapping[str, bytes]]:
    """The resolved run; its real directory, which may not exist; path -> content of the files of the user's classes.

    ``below`` and ``above``: settings with lower and higher priority than those of the command line.
    """
    from dataclasses import replace

    from flip.runs.rundir import RunDir
    from jobs.common.cluster_profile import load_profile
    from jobs.submission.check import check_runs
    from jobs.submission.request import Request, SubmitOptions, read_request
    from jobs.submission.resolve import resolve_runs
    from jobs.workloads.training_request import settings_of_checkpoints

    def request(*more: str) -> Request:
        overrides = [*below, *args.overrides, *above, *more]
        return read_request(SubmitOptions(args.sweep, only=args.run, overrides=overrides, dry_run=True, root=args.root))

    _refuse_program(args)
    requested = request()
    real = RunDir(requested.folder / requested.sweep.runs[0].name)
    needed = settings_of_checkpoints(real)
    if needed:
        requested = request(*needed)
    profile = load_profile("local")  # the cluster of the sweep only gives the folder of its runs
    kind = "slurm"
    if local:
        kind = profile.kind
    profile = replace(profile, kind=kind, runs_root=requested.profile.runs_root)
    resolved = resolve_runs(replace(requested, profile=profile))
    check_runs(resolved)
    return resolved.runs[0], real, resolved.code


def code_with(callbacks: Mapping[str, bytes], run: RunDir) -> Path:
    """The folder of the code that runs: this checkout, or a snapshot beside the scratch copy with files of the user."""
    from jobs.common.paths import REPOSITORY
    from jobs.submission.snapshot import take

    if not callbacks:
        return REPOSITORY
    return take(REPOSITORY, run.path.parent / ".code", callbacks).path


def scratch(resolved: SweepRun, real: RunDir, args: argparse.Namespace) -> RunDir:
    """Create a run directory with this configuration and a copy of the newest checkpoint of ``real``, if it has one."""
    import shutil

    from flip.checkpoint.remote import local_copy
    from flip.files.creation import closed_folder
    from flip.runs import checkpoint_folder
    from flip.runs.rundir import RunDir, write_json, write_text
    from jobs.common.filesystem import writing

    with writing(args.out or tempfile.gettempdir(), "Name another folder with --out."):
        folder = Path(tempfile.mkdtemp(prefix=f"flip-{resolved.name}-", dir=args.out)) / real.sweep
    run = RunDir(folder / resolved.name)
    closed_folder(run.path)
    for name, text in resolved.files().items():
        write_text(run.path / name, text)
    write_json(run.identity, dict(resolved.identity))
    checkpoints = []
    if not args.fresh:
        checkpoints = checkpoint_folder.checkpoints(real)
    if checkpoints:
        copy = run.checkpoints / checkpoints[-1].stage / checkpoints[-1].path.name
        with local_copy(checkpoints[-1]) as here:
            closed_folder(copy.parent)
            shutil.copytree(here, copy)
        write_json(
            copy / checkpoint_folder.COMMIT_FILE,
            {key: value for key, value in checkpoints[-1].record.items() if key != "url"},
        )
    return run


def in_process(run: RunDir, n: int, no_pdb: bool, code: Path) -> int:
    """Train with this process as the only rank. ``code``: has the files of the user's classes."""
    import pdb
    import traceback

    from flip.runs.errors import CRASH
    from jobs.runtime import rank_process

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "FLIP_ATTEMPT": str(n)}
    os.environ["FLIP_SNAPSHOT"] = str(code)
    try:
        rank_process.in_process(run, n)
    except Exception as error:  # any error is shown to the user
        traceback.print_exc()
        if not no_pdb and sys.stdin.isatty():
            pdb.post_mortem(error.__traceback__)
        return getattr(error, "code", CRASH)
    return 0


def in_allocation(run: RunDir, n: int, code: Path) -> int:
    """Train with one rank per task of the current Slurm allocation."""
    from flip.files import python_path
    from jobs.common.paths import JOBS
    from jobs.common.text import plain
    from jobs.reporting.run_details import last_lines

    run.open_logs(n)
    entry = str(JOBS / "host" / "rank_entry.py")
    variables = {"FLIP_RUN": str(run.path), "FLIP_ATTEMPT": str(n), "FLIP_SNAPSHOT": str(code)}
    variables |= python_path.variables(str(code))
    argv = ["srun", "--kill-on-bad-exit=1", "--export=ALL", sys.executable, "-I", entry, "jobs.worker"]
    done = subprocess.run(argv, env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"}, check=False)
    for path in sorted((run.logs / str(n)).iterdir()):
        print(f"--- {path}", *map(plain, last_lines(path, 20)), sep="\n")
    return done.returncode
