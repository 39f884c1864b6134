"""The command that submits a run again: recorded in job.json, and shown to users."""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flip.files.deletion import COMMIT_FILE
from flip.files.ownership import why_untrusted
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir
from jobs.common import cli
from jobs.common.job import record_of
from jobs.common.paths import PROFILES, REPOSITORY, SWEEPS
from jobs.submitted_runs import select
from jobs.sweeps import sweep_file
from jobs.sweeps.sweep_file import seed_tail

_COMMAND = re.compile(
    r"jobs/submit\.py\n--sweep\n[^-\n].*"
    r"(\n[^-=\s][^=\s]*=.*)*"  # values of settings
    r"(\n--cluster\n[^-\n].*)?"
    r"(\n--root\n/.*)?"
    r"(\n--seeds(\n[0-9]{1,20})+)?"
    r"(\n--only\n\w[\w.-]*)?"
    r"(\n--changed\nkeep)?"
)
"""The arguments that ``submit_argv`` and a submission write, a line each."""


class SubmitCommand(NamedTuple):
    """A command that submits a sweep, as job.json has it."""

    argv: Sequence[str] = ()
    """``jobs/submit.py`` and its arguments."""
    folder: str = ""
    """The folder from which relative paths of the sweep file start; empty: it has none."""

    def line(self, root: Path, *options: object) -> str:
        """The command line for users to copy, which works in any folder. ``root``: where the runs are now."""
        words = list(self.argv[1:])
        if "--root" in words:
            at = words.index("--root")
            del words[at : at + 2]
        line = cli.command("submit", *_absolute_sweep(words), "--root", root, *options)
        if self.folder:
            return f"cd {shlex.quote(self.folder)} && {line}"
        return line


NO_COMMAND = SubmitCommand()


def submit_command(args: Any, file: Path, folder: str) -> SubmitCommand:
    """The command for the same runs. ``args``: the options of the submission; ``file``: the sweep file."""
    argv = ["jobs/submit.py", "--sweep", recorded_path(file), *args.overrides]
    if args.cluster:
        argv += [
            "--cluster",
            recorded_path(Path(args.cluster)) if args.cluster.endswith((".yaml", ".yml")) else args.cluster,
        ]
    if args.root:
        argv += ["--root", str(Path(args.root).absolute())]
    if args.seeds is not None:
        argv += ["--seeds", *map(str, args.seeds)]
    return SubmitCommand(argv, folder)


def recorded_path(path: Path) -> str:
    """An absolute path, or the path in the repository of a shipped sweep file."""
    path = path.expanduser().absolute()
    if path.parent == SWEEPS:
        return str(path.relative_to(REPOSITORY))
    return str(path)


def command(run: RunDir, retry: bool = False, diverged: bool = False) -> tuple[str, str | None]:
    """(advice, command to type or None). ``diverged``: the same configuration would fail again, so it must change.

    The command of job.json is used only if this user trusts the file and each word has a known form (``_COMMAND``).
    """
    record = record_of(run)
    name = name_in_sweep(run, record)
    stored = _stored_command(record)
    argv = list(stored.argv)
    options = ["--retry"] * retry
    if diverged:
        options = ["--changed", "fork"]
    if argv and why_untrusted(run.path / "job.json"):  # never run a sweep file or profile of another user as this user
        return f"its submitter can restart it with {shlex.join(['--only', name, *options])}", None
    newest = _newest(run, name)
    back = ""
    if newest != run.name:
        back = f" after restoring its old values in the sweep file, which now means {newest}"
    cluster = record.get("cluster")
    is_shipped = not cluster or (PROFILES / f"{cluster}.yaml").exists()
    if argv:
        how = f"to {_resuming(run)}{back}"
        if diverged:
            how = "change its learning rate or warm-up in the sweep file, then start it as a new run"
        return how, _line(run, argv, stored.folder, options)
    to = ""
    if not is_shipped:
        to = f", with --cluster and the file of the profile {cluster}"
    return f"submit the sweep file of {run.sweep} again{back}{to}, with {shlex.join(['--only', name, *options])}", None


def _resuming(run: RunDir) -> str:
    """What a start of the run does, by its checkpoints."""
    if any(run.checkpoints.glob(f"*/*/{COMMIT_FILE}")):
        return "resume from its newest checkpoint"
    return "start it again, without a checkpoint to resume from"


def with_seeds(run: RunDir, seeds: Sequence[int], designs: Collection[str] = ()) -> str | None:
    """The command that submits the sweep of a run with these seeds; None if its sweep file is unknown.

    ``designs``: names of runs without their seeds. The command has --only unless they are all that the sweep has, or
    none are given.
    """
    stored = _stored_command(record_of(run))
    argv = stored.argv
    if not argv or why_untrusted(run.path / "job.json"):
        return None
    selecting = [argv.index(option) for option in ("--root", "--seeds", "--only", "--changed") if option in argv]
    argv = argv[: min(selecting, default=len(argv))]
    options = ["--seeds", *map(str, seeds)]
    if designs and set(designs) != _designs(argv):
        tails = [seed_tail(seed) for seed in seeds]
        options += ["--only", *("-".join(filter(None, [design, tail])) for design in designs for tail in tails)]
    return _line(run, argv, stored.folder, options)


def design_of(run: RunDir, seed: int) -> str:
    """The name of a run in its sweep file, without its seed."""
    name = name_in_sweep(run, record_of(run))
    tail = seed_tail(seed)
    if tail:
        return name.removesuffix(f"-{tail}")
    return name


def _designs(argv: Sequence[str]) -> set[str]:
    """The names without seeds of all runs of a sweep file; empty if it cannot be read."""
    path = REPOSITORY / argv[argv.index("--sweep") + 1]
    if not path.is_file() or why_untrusted(path):
        return set()
    try:
        return {run.arm for run in sweep_file.read_sweep(path).runs}
    except FlipError:
        return set()


def _line(run: RunDir, argv: Sequence[str], folder: str, options: Sequence[str]) -> str:
    """The command line for the folder in which the run is now, which may have been moved."""
    return SubmitCommand(argv, folder).line(run.path.absolute().parent.parent, *options)


def _absolute_sweep(words: Sequence[str]) -> list[str]:
    """The words with the path of a shipped sweep file, which is recorded relative to the repository, from anywhere."""
    at = words.index("--sweep") + 1
    shipped = REPOSITORY / words[at]
    if not shipped.is_file():
        return list(words)
    return [*words[:at], str(shipped), *words[at + 1 :]]


def name_in_sweep(run: RunDir, record: Mapping[str, Any]) -> str:
    """Name of the run in the sweep file. A fork NAME-v2 of the run NAME is called NAME there."""
    argv = _stored_command(record).argv
    if "--only" in argv[:-1]:
        return argv[argv.index("--only") + 1]
    fork = re.fullmatch(r"(.+)-v[0-9]+", run.name)
    if fork and select.is_run(run.path.with_name(fork[1])):
        return fork[1]
    return run.name


def _stored_command(record: Mapping[str, Any]) -> SubmitCommand:
    """The command in job.json if every word has the form that a submission writes, else an empty one."""
    argv = record.get("command", [])
    folder = record.get("command_folder", "")
    text = "\n".join(argv)
    printable = all(word.isprintable() for word in (*argv, folder))
    if printable and _COMMAND.fullmatch(text) and folder[:1] in ("", "/"):
        return SubmitCommand(argv, folder)
    return NO_COMMAND


def _newest(run: RunDir, name: str) -> str:
    """The newest of a run and its forks: the run that the sweep file means by ``name``."""
    numbers = {name: 1}
    for other in select.runs_below(run.path.parent):
        fork = re.fullmatch(rf"{re.escape(name)}-v([0-9]+)", other.name)
        if fork and name_in_sweep(other, record_of(other)) == name:
            numbers[other.name] = int(fork[1])
    return max(numbers, key=numbers.__getitem__)
