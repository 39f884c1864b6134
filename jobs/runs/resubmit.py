"""How a run is submitted again: noted in its job.json when it is submitted, and told to who asks what comes next."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flip.runs.ownership import untrusted
from flip.runs.rundir import RunDir
from jobs.common.job import record_of
from jobs.common.paths import PROFILES, REPOSITORY, SWEEPS
from jobs.runs import select


def typed(args: Any, file: Path) -> list[str]:
    """The words of ``jobs/submit.py`` that mean the same runs from any folder. ``file``: the sweep's."""
    words = ["jobs/submit.py", "--sweep", _path(file), *args.overrides]
    if args.cluster:
        words += ["--cluster", _path(Path(args.cluster)) if args.cluster.endswith((".yaml", ".yml")) else args.cluster]
    if args.seeds is not None:
        words += ["--seeds", *map(str, args.seeds)]
    return words


def _path(path: Path) -> str:
    """As it is found from anywhere: a sweep file of the repository by its place in there."""
    path = path.expanduser().absolute()
    return str(path.relative_to(REPOSITORY)) if path.parent == SWEEPS else str(path)


def command(run: RunDir, retry: bool = False) -> tuple[str, str | None]:
    """(what is to be done, in words; the command that does it, None where there is none to type).

    The command is that of job.json only if this user trusts the file and each word has a known form (``_COMMAND``).
    """
    if is_evaluation(run):
        return "order it anew: jobs/evaluate.py takes up none that is there", None
    record = record_of(run)
    name, words, options = wanted(run, record), _words(record), ["--retry"] * retry
    if words and untrusted(run.path / "job.json"):  # another user's sweep file or profile must not run as this one
        return f"its submitter can start it again, with {shlex.join(['--only', name, *options])}", None
    newest = _newest(run, name)
    back = f" with its old values back in the sweep file, which means {newest} by now" if newest != run.name else ""
    cluster = record.get("cluster")
    known = not cluster or (PROFILES / f"{cluster}.yaml").exists()
    if not words and known and (SWEEPS / f"{run.sweep}.yaml").exists():  # an older version's record
        words = ["jobs/submit.py", "--sweep", run.sweep, *(["--cluster", cluster] if cluster else []), "--only", name]
    if words:
        return f"to go on from its newest commit{back}", f"python {shlex.join([*words, *options])}"
    to = "" if known else f", with --cluster and the file of the profile {cluster}"
    return f"submit the sweep file of {run.sweep} again{back}{to}, with {shlex.join(['--only', name, *options])}", None


def is_evaluation(run: RunDir) -> bool:
    """Whether it is a job of ``jobs/evaluate.py``: no sweep's name begins with a dot."""
    return run.sweep.startswith(".")


def wanted(run: RunDir, record: Mapping[str, Any]) -> str:
    """What the sweep file calls the run. A fork, NAME-v2, lies beside the run NAME and has its name there."""
    words = _words(record)
    if "--only" in words[:-1]:
        return words[words.index("--only") + 1]
    fork = re.fullmatch(r"(.+)-v[0-9]+", run.name)
    return fork[1] if fork and select.is_run(run.path.with_name(fork[1])) else run.name


def _words(record: Mapping[str, Any]) -> list[str]:
    """The command in a job.json if every word of it has the form that a submission writes, else nothing."""
    words = record.get("command", [])
    text = "\n".join(words)
    return words if all(word.isprintable() for word in words) and _COMMAND.fullmatch(text) else []


_COMMAND = re.compile(
    r"jobs/submit\.py\n--sweep\n[^-\n].*"
    r"(\n[^-=\s][^=\s]*=.*)*"  # values of settings
    r"(\n--cluster\n[^-\n].*)?"
    r"(\n--seeds(\n[0-9]{1,20})+)?"
    r"(\n--only\n\w[\w.-]*)?"
    r"(\n--changed\nkeep)?"
)
"""The words that ``typed`` and a submission write, a line each."""


def _newest(run: RunDir, name: str) -> str:
    """Of a run and its forks the newest, which is what the sweep file means by ``name``."""
    numbers = {name: 1}
    for other in select.runs_below(run.path.parent):
        fork = re.fullmatch(rf"{re.escape(name)}-v([0-9]+)", other.name)
        if fork and wanted(other, record_of(other)) == name:
            numbers[other.name] = int(fork[1])
    return max(numbers, key=lambda one: numbers[one])
