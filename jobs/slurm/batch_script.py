"""The batch script of one array: what submitit is told, and the lines that it puts before ``srun``. Only text.

The decision to start again is taken on the host, outside the trainer and its container, in the script's exit trap
(docs/contracts.md, Stop and resume).
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flip.runs.errors import ConfigError
from jobs.common import filesystem
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job
from jobs.host.slurm_cli import MAX_FAILED_STARTS

FORWARDED_ENV = ("HOME", "USER", "LOGNAME", "PATH", "LANG", "LC_ALL", "TZ", "SLURM_CONF")
"""What jobs get of the environment that submits, besides the names in the profile: a job must not depend on what
happens to be set there, and a secret that is not named stays behind."""


@contextlib.contextmanager
def clean_environment(names: Sequence[str]) -> Iterator[None]:
    """Within, the environment of this process, which submitit's sbatch inherits, holds these names alone.

    ``--export=NAMES`` would do it too, but makes Slurm load the user's login environment on the node.
    """
    before = dict(os.environ)
    try:
        for name in before.keys() - set(names):
            del os.environ[name]
        yield
    finally:
        os.environ.update(before)


def parameters(profile: ClusterProfile, job: Job, folder: Path, name: str) -> dict[str, Any]:
    """Keywords for submitit's ``update_parameters``. ``job``: any of the array, they differ in their run alone.

    ``folder``: the submission's, with the list ``runs``: line i + 1 is the run directory of element i.
    """
    shape = job.shape
    wanted: dict[str, Any] = {
        "job_name": name,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.processes,
        "cpus_per_task": shape.cpus,
        "time": minutes(shape.hours),
        "signal_delay_s": profile.signal_seconds,
        "wckey": None,  # a site that checks them knows none called submitit
        "setup": setup_lines(profile, job, folder),
        "srun_args": srun_args(profile, job),
        "additional_parameters": {
            "requeue": True,
            "signal": f"USR2@{profile.signal_seconds}",
            "export": "ALL",  # of the little that ``clean_environment`` leaves
            # what every node has: one that lacks the shared folders must get as far as to say so
            **dict.fromkeys(("output", "error"), "/dev/null"),
            "chdir": "/",
            **({"hold": True} if job.waits_for else {}),
        },
    }
    if shape.gpus and not {"gres", "gpus", "gpus-per-node"} & profile.options.keys():
        wanted["gpus_per_node"] = shape.gpus
    for key in ("partition", "account", "qos"):
        if getattr(profile, key):
            wanted[key] = getattr(profile, key)
    wanted["array_parallelism"] = profile.parallel or profile.array_size
    wanted["additional_parameters"] |= {key: value or True for key, value in profile.options.items()}
    return wanted


def minutes(hours: float) -> int:
    """A wall limit as Slurm takes it: whole minutes, rounded up. 8.3 * 60 is a little above 498 and means that."""
    return max(1, math.ceil(round(hours * 60, 6)))  # Slurm takes 0 as no limit


NODE_FAULT_HANDLER = [
    "follow() (  # Slurm does not requeue this job: the same script as a new one, as jobs/host/slurm_cli.py does it",
    '  text=$(scontrol write batch_script "$id" -) || exit',
    '  words=(--dependency="afterany:$SLURM_JOB_ID" --comment="away:$((starts + 1)):-1:$attempt")',
    '  words+=(--begin="now+$((60 * starts))" --exclude="$out")',
    '  [ -z "$SLURM_ARRAY_TASK_ID" ] || words+=(--array="$SLURM_ARRAY_TASK_ID")',
    '  for name in "${!SLURM@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done',
    r"""  sbatch "${words[@]}" <<< "${text/$'\n#SBATCH --hold\n'/$'\n'}" """.rstrip(),
    ")",
    "again() {  # for half a day while Slurm is silent, as when this node is cut off; ten minutes where it refuses",
    "  for _ in {1..1440}; do no=${no:-0}",
    '    why=$(scontrol requeue "$id" 2>&1) && return; echo "$why" >&2',
    '    case $why in *"presently disabled"*) follow; exit "$code";; esac; sleep 30',
    '    now=$(scontrol show job "$id") || continue',
    r"""    now=$(sed -En 's/.*Restarts=([0-9]+).*/\1/p' <<< "$now")""",
    '    [ "${now:-$life}" = "$life" ] || exit "$code"  # Slurm has started it again',
    '    no=$((no + 1)); [ "$no" -lt 20 ] || return',
    "  done",
    "}",
    'ask() { for _ in 1 2 3 4 5; do scontrol "$@" && break; sleep 30; done; }',
    "elsewhere() {  # a node that lacks what the others have, a mount or the interpreter, must not eat a whole array",
    "  code=$?",
    '  case $code in 1|2|4|126|127|13[0-9]) ;; *) exit "$code";; esac  # others are what `begin` means',
    "  life=${SLURM_RESTART_COUNT:-0} starts=0 attempt=0  # as slurm_cli.FailedStarts: starts in a row for nothing",
    '  until shown=$(scontrol show job "$id") || [ "$((tries += 1))" -gt 1440 ]; do sleep 30; done  # as the trap does',
    r"""  mark=$(sed -En 's/^ *Comment=away:([0-9]+:-?[0-9]+:[0-9]+).*/\1/p' <<< "$shown")""",
    '  IFS=: read -r past last ended <<< "$mark"',
    '  [ "${last:-x}" != $((life - 1)) ] || starts=$past; [ -z "$ended" ] || attempt=$ended',
    f'  [ "$starts" -lt {MAX_FAILED_STARTS} ] || exit "$code"',
    '  ask update JobId="$id" Comment="away:$((starts + 1)):$life:$attempt"',
    # nodes that Slurm already excludes (profile, broken hardware) stay excluded. A node that gave the job back is
    # listed twice; the next one replaces it, so that an outage of all nodes cannot exclude them all
    r"""  out=$(sed -En 's/.*ExcNodeList=([^ ]+).*/\1/p' <<< "$shown" | sed -E '"""
    r"""s/^\(null\)$//; s/(^|,)([^][,]+),\2(,|$)/\1/; s/,$//')""",
    "  out=${out:+$out,}$SLURMD_NODENAME,$SLURMD_NODENAME",
    "  again",
    '  scontrol update JobId="$id" ${shown:+"ExcNodeList=$out"} StartTime="now+$((60 * starts))"',
    '  exit "$code"',
    "}",
]


FORWARD = [
    # handlers, since srun would inherit ignored signals. On TERM srun kills its ranks; for them USR1 means the same
    'forward() { [ -z "$step" ] || kill -s "$1" "$step"; }',
    "trap 'forward USR1' TERM; trap 'forward USR2' USR1 USR2",
    "srun() {  # in the background, as a shell that waits for a foreground command handles no signal",
    '  (exec srun "$@") & step=$!',
    '  while wait "$step"; code=$?; [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do :; done',
    '  step=; return "$code"',
    "}",
]


def _ownership(*code: Path) -> list[str]:
    """Lines that refuse to execute code of another user, at every start. Slurm holds the script itself.

    A user who may rename folders in the runs root can put another snapshot in place of the owner's. ``.git`` and
    ``.venv`` are no part of a snapshot, only of a checkout that is used as one.
    """
    folders = " ".join(dict.fromkeys(shlex.quote(str(path)) for path in code))
    foreign = "'(' ! -user \"$EUID\" ! -user 0 -o -perm -002 ! -type l ')'"
    return [
        f"foreign=$(find {folders} -name '.[gv]*' -prune -o {foreign} -print -quit)",
        '[ -z "$foreign" ] || { echo "$foreign: of another user, or writable by all: not executed" >&2; exit 77; }',
    ]


def setup_lines(profile: ClusterProfile, job: Job, folder: Path) -> list[str]:
    """The script before ``srun``. TERM comes to it with a preemption without grace, and with scancel."""
    snapshot = Path(job.snapshot).absolute()
    # -I: whatever modules and setup lines say to Pythons is said to another one
    decide = (
        f"{shlex.quote(profile.hosts_python)} -I {shlex.quote(str(job.host_code / 'jobs' / 'host' / 'batch_hooks.py'))}"
    )
    exported = {
        "FLIP_SNAPSHOT": str(snapshot),
        "PYTHONPATH": str(snapshot),
        "PYTHONUNBUFFERED": "1",  # ranks share a log: whole lines, at once
        **({"PYTHONNOUSERSITE": "1"} if profile.container else {}),  # the image's packages, not those in a home it sees
        **job.env,
    }
    if profile.master_addr:
        exported["MASTER_ADDR"] = profile.master_addr
    beside = [f'{decide} release "$FLIP_RUN" & releaser=$!; disown  # those that wait for this canary']
    return [
        "id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        "trap '' TERM USR1 USR2  # what is begun here is finished",
        *NODE_FAULT_HANDLER,
        f"said={shlex.quote(str(folder))}/$id",
        'exec >>"$said.out" 2>>"$said.err" || elsewhere',
        *_ownership(snapshot, job.host_code),
        f"export {' '.join(f'{key}={shlex.quote(value)}' for key, value in exported.items())}",
        f'FLIP_RUN=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {shlex.quote(str(folder / "runs"))}) || elsewhere',
        f'FLIP_ATTEMPT=$({decide} begin "$FLIP_RUN" --token {folder.name}) || elsewhere',
        '[ -n "$FLIP_ATTEMPT" ] || exit 0  # complete, cancelled, or submitted again',
        "export FLIP_RUN FLIP_ATTEMPT",
        "finish() {",
        "  code=$?; trap '' TERM USR1 USR2; trap - EXIT",
        *_late(profile, job),
        f'  {decide} end "$FLIP_RUN" --attempt "$FLIP_ATTEMPT" --code "$code" ${{late:+--late}}',
        '  [ -z "$watcher" ] || kill -9 "$watcher" 2>/dev/null  # not before: `end` may outlive the limit',
        *(['  [ -z "$releaser" ] || kill -9 "$releaser"'] if job.canary else []),
        '  exit "$code"',
        "}",
        "trap finish EXIT",
        'exec >>"$FLIP_RUN/logs/$FLIP_ATTEMPT/job.out" 2>>"$FLIP_RUN/logs/$FLIP_ATTEMPT/job.err"',
        f'{decide} watch "$FLIP_RUN" --attempt "$FLIP_ATTEMPT" & watcher=$!; disown',
        *(beside if job.canary else []),
        *FORWARD,
        *_modules(profile.modules),
        *profile.setup,
    ]


def _late(profile: ClusterProfile, job: Job) -> list[str]:
    """Whether the attempt had its whole wall limit: its warning comes up to a minute early. Of very short ones, which
    are that all the time, it is not asked.
    """
    limit, before = 60 * minutes(job.shape.hours), profile.signal_seconds + 75
    return [f'  [ "$SECONDS" -lt {limit - before} ] || late=1'] if limit > 2 * before else []


def _modules(names: Sequence[str]) -> list[str]:
    """A batch shell is no login shell: where there is no ``module`` yet, the system's profile brings it."""
    if not names:
        return []
    load = " ".join(map(shlex.quote, names))
    # a profile may forget the PATH that finds Slurm; a node may lack what the next one has, so it is tried again
    bring = "type module >/dev/null 2>&1 || { path=$PATH; . /etc/profile; PATH=$path:$PATH; }"
    return [bring, f"module load {load} || exit 70"]


def srun_args(profile: ClusterProfile, job: Job) -> list[str]:
    """Arguments of ``srun``. One rank's bad end must not kill the others while they save: they get ``peer_seconds``.

    ``all``: what tasks say before they have their own log, as that there is no such interpreter, goes to the job's.
    """
    words = ["--output=all", "--error=all", "--kill-on-bad-exit=0", f"--wait={profile.peer_seconds}", "--export=ALL"]
    words.append(f"--cpus-per-task={job.shape.cpus}")  # Slurm 22.05 to 23.02 gives a step one core without it
    if profile.container and profile.container_runtime == "pyxis":
        words += [f"--container-image={profile.container}", f"--container-mounts={_mounts(profile, job)}"]
    return words


def command(profile: ClusterProfile, job: Job) -> str:
    """What srun starts, once per rank, as a line of shell."""
    rank = job.host_code / "jobs" / "host" / "rank_entry.py"
    words = [profile.jobs_python, str(rank), job.module]
    if profile.container and profile.container_runtime == "apptainer":
        cards = ["--nv"] if job.shape.gpus else []
        words = ["apptainer", "exec", *cards, "--bind", _mounts(profile, job), profile.container, *words]
    return shlex.join(words)


def mounts(profile: ClusterProfile, sweep: Path) -> list[str]:
    """PATH:PLACE of what the container sees: the sweep's folder (runs, code, submissions) at its own path, and more.

    ConfigError where these words cannot say that folder."""
    if {":", ","} & set(str(sweep)):
        what = "no folder for runs in a container: its mounts are a list with commas of PATH:PLACE"
        raise ConfigError(what, value=str(sweep), remedy=f"Its path must have neither. {filesystem.ELSEWHERE}")
    folders = [str(sweep), *profile.container_mounts]
    return [folder if ":" in folder else f"{folder}:{folder}" for folder in folders]


def _mounts(profile: ClusterProfile, job: Job) -> str:
    sweep = job.run.path.parent
    sweep = sweep.parent if sweep.name.startswith(".") else sweep  # an evaluation's job lies in a folder of the sweep's
    return ",".join(mounts(profile, sweep))
