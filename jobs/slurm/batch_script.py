"""The text of the batch script of one array, which submitit writes from our parameters.

The script checks the code and becomes the owner of the job, ``jobs/host/job.py``, which starts the same script again
for its children. ``fallback.sh`` holds its functions for a node that cannot run the owner (docs/restarts.md).
"""

import contextlib
import functools
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flip.files import acl, ownership, python_path
from flip.runs import next_step
from flip.runs.errors import CRASH, ConfigError
from jobs.common import filesystem
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job
from jobs.host import slurm_cli

#: Variables that jobs get from the submitting environment, besides those named in the profile: a job must not depend on
#: what happens to be set there, and secrets that are not named stay behind.
FORWARDED_ENV = ("HOME", "USER", "LOGNAME", "PATH", "LANG", "LC_ALL", "TZ", "SLURM_CONF", "FLIP_KERNEL")
#: Line that sets ``id``: the job, or the array element, as ``own_job.own_job`` names it.
OWN_JOB = "id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
END_OF_CHECK = "END_OF_OWNERSHIP"
#: Words of fallback.sh and their values.
CONSTANTS = {
    "MAX_FAILED_STARTS": str(next_step.MAX_FAILED_STARTS),
    "UNUSABLE": slurm_cli.UNUSABLE.pattern,
}


@contextlib.contextmanager
def clean_environment(names: Sequence[str]) -> Iterator[None]:
    """Reduce the environment of this process, which sbatch inherits, to these names.

    ``--export=NAMES`` would do the same, but makes Slurm load the user's login environment on the node.
    """
    before = dict(os.environ)
    try:
        for name in before.keys() - set(names):
            del os.environ[name]
        yield
    finally:
        os.environ.update(before)


def script_text(profile: ClusterProfile, jobs: Sequence[Job], folder: Path, name: str) -> str:
    """The batch script of an array, or of a single job. ``name``: of the job in Slurm.

    ``folder``: of the submission. Line i + 1 of its file ``runs`` is the run directory of element i.
    """
    # submitit's public way to a script is `SlurmExecutor.map_array`. It takes a Python function, writes a pickle of it
    # for each run, starts it with an interpreter of its own in place of our command, and prints none of sbatch's
    # messages. So the function below, on which it is built, is the only part of submitit that we use.
    from submitit.slurm.slurm import _make_sbatch_string

    job = jobs[0]
    elements = None
    if len(jobs) > 1:
        elements = len(jobs)
    options = parameters(profile, job, folder, name)
    text: str = _make_sbatch_string(command(profile, job), folder.absolute(), map_count=elements, **options)
    return text


def parameters(profile: ClusterProfile, job: Job, folder: Path, name: str) -> dict[str, Any]:
    """Keywords for submitit, see ``script_text``. ``job``: any of the array; they differ only in their run."""
    resources = job.resources
    keywords: dict[str, Any] = {
        "job_name": name,
        "nodes": resources.allocation,
        "ntasks_per_node": resources.processes,
        "cpus_per_task": profile.scheduler_cpus(resources.cpus),
        "time": minutes(resources.hours),
        "signal_delay_s": profile.signal_seconds,
        "wckey": None,  # sites that check wckeys know none called submitit
        "setup": setup_lines(profile, job, folder),
        "srun_args": srun_args(profile, job),
    }
    additional: dict[str, Any] = {
        "signal": f"USR2@{profile.signal_seconds}",
        "export": "ALL",  # of what ``clean_environment`` leaves
        # paths that every node has: a node without the shared folders must be able to start the script
        "output": "/dev/null",
        "error": "/dev/null",
        "chdir": "/",
    }
    if is_elastic(job) and profile.agents:
        additional["no-kill"] = True  # a lost node does not end the job
    if "no-requeue" not in profile.options:  # of both, sbatch takes the last
        additional["requeue"] = True
    if job.waits_for:
        additional["hold"] = True
    keywords["additional_parameters"] = additional | {key: value or True for key, value in profile.options.items()}
    if resources.gpus and not {"gres", "gpus", "gpus-per-node"} & profile.options.keys():
        keywords["gpus_per_node"] = resources.gpus
    for key in ("partition", "account", "qos"):
        if getattr(profile, key):
            keywords[key] = getattr(profile, key)
    keywords["array_parallelism"] = profile.parallel or profile.array_size
    return keywords


def minutes(hours: float) -> int:
    """A wall limit in whole minutes, rounded up; 8.3 * 60, which is a little above 498, is 498."""
    return max(1, math.ceil(round(hours * 60, 6)))  # 0 means no limit


def functions(name: str) -> list[str]:
    """The lines of a file of shell functions in this folder, with the constants of the functions in Python."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    for constant, value in CONSTANTS.items():
        text = text.replace(constant, value)
    return text.splitlines()


def is_elastic(job: Job) -> bool:
    """Whether a start may have more nodes than it uses: a range of nodes, or spare ones."""
    return bool(job.resources.least_nodes or job.resources.spares)


def setup_lines(profile: ClusterProfile, job: Job, folder: Path) -> list[str]:
    """The script of a job that ``jobs/host/job.py`` owns, before the line ``srun``.

    Without arguments it is the start of the job, and becomes its owner. The owner starts it again, with the environment
    of the start and FLIP_ATTEMPT:

    - ``step`` KIND NODES loads modules, executes the setup lines and becomes srun. KIND: ``agents``, one task per node,
      or ``ranks``.
    - ``follow`` NAME STEP becomes the follower of a tracker, with the environment that the setup lines left to srun.
      STEP: process of the step. SIGUSR1 ends it when the job is over.
    - ``elsewhere`` CODE ends a start whose owner cannot import its modules.
    """
    return [
        "trap '' TERM USR1 USR2  # neither a start nor its end is interrupted",
        *_location(job.sweep),
        f"exclude={shlex.quote(profile.options.get('exclude', ''))}",
        OWN_JOB,
        *functions("fallback.sh"),
        "if [ $# -eq 0 ]; then  # Slurm starts the job",
        *_owner_start(profile, job, folder),
        "fi",
        '[ "$1" != elsewhere ] || elsewhere "$2"',
        *_follower(profile, job),
        *_step(profile, job),
    ]


def _owner_start(profile: ClusterProfile, job: Job, folder: Path) -> list[str]:
    """Lines that check the code, set the environment of all processes of the job, and become its owner."""
    owner = shlex.quote(str(job.host_code / "jobs" / "host" / "job.py"))
    options = [f"--token {folder.name}", f"--peer-seconds {profile.peer_seconds}"]
    if profile.agents:
        options.append("--agents")
    options += [f"--tracker {name}" for name in _followed(profile, job)]
    options.append('--script "$0"')
    return [
        "unset FLIP_ATTEMPT FLIP_AGENTS  # a successor may have inherited those of its predecessor",
        "umask go-w  # also for what the ranks create",
        f"log={shlex.quote(str(folder))}/$id",
        'exec >>"$log.out" 2>>"$log.err" || elsewhere',
        *_ownership(profile, job),
        '[ -z "$exposed" ] || echo "$exposed" >&2',
        *_exports(profile, job, folder),
        f"[ -r {owner} ] || elsewhere 2",
        "shopt -s execfail",
        f'exec {shlex.quote(profile.hosts_python)} -I {owner} "$FLIP_RUN" {" ".join(options)} || elsewhere',
    ]


def _step(profile: ClusterProfile, job: Job) -> list[str]:
    """Lines of ``step`` KIND NODES: options of srun, modules, the setup lines, and a function that becomes srun.

    The setup lines may change the positional parameters, which a file that they source would also see, and may call
    srun themselves.
    """
    resources = job.resources
    size = '--nodes="$3"'
    # an agent may end while another one imports the trainer, until it learns that srun is to start the ranks
    cpus = profile.scheduler_cpus(resources.processes * resources.cpus)
    agents = [size, '--ntasks="$3"', "--ntasks-per-node=1", f"--cpus-per-task={cpus}", "--wait=0"]
    if is_elastic(job):  # the agents of other nodes outlive that of a lost one
        agents.append("--no-kill")
    ranks = [
        size,
        f'--ntasks="$(($3 * {resources.processes}))"',
        *placement(profile, job),
        f"--wait={profile.peer_seconds}",
    ]
    return [
        "trap : TERM USR1 USR2  # srun would inherit ignored signals",
        'if [ "$2" = agents ]; then  # each starts the ranks of its node, of all attempts of this job',
        "  export FLIP_AGENTS=1",
        f"  flip_options=({' '.join(agents)})",
        "else",
        f"  flip_options=({' '.join(ranks)})",
        "fi",
        "set --",
        *_modules(profile.modules),
        *profile.setup,
        'srun() { exec srun "${flip_options[@]}" "$@"; }',
    ]


def srun_args(profile: ClusterProfile, job: Job) -> list[str]:
    """Arguments of ``srun`` for all kinds of steps.

    ``all``: output of tasks before they open their own logs goes to the log of the job.
    """
    argv = ["--output=all", "--error=all", "--kill-on-bad-exit=0", "--export=ALL"]
    return argv + _pyxis_options(profile, job)


def _followed(profile: ClusterProfile, job: Job) -> Sequence[str]:
    """Names of the trackers whose followers run on the first node. With pyxis none, since srun alone opens the image:
    there, ``flip follow`` on a login node sends the metrics."""
    if profile.container and profile.container_runtime == "pyxis":
        return ()
    return job.trackers


def _follower(profile: ClusterProfile, job: Job) -> list[str]:
    """Lines of ``follow`` NAME STEP. It waits until the step has executed srun, after the setup lines, which may set
    proxies and keys but must not be executed twice, and reads the environment of srun."""
    if not _followed(profile, job):
        return []
    follow = shlex.join(_in_container(profile, job, [profile.jobs_python, "-m", "jobs.follow"]))
    arguments = '"$FLIP_RUN" --attempt "$FLIP_ATTEMPT" --job --tracker "$flip_tracker"'
    return [
        'if [ "$1" = follow ]; then',
        "  flip_tracker=$2",
        "  trap 'exit 0' TERM USR1 USR2",
        '  exec </dev/null >"$FLIP_RUN/logs/$FLIP_ATTEMPT/follow-$flip_tracker.log" 2>&1',
        '  while read -r flip_name <"/proc/$3/comm" && [ "$flip_name" != srun ]; do sleep 0.5; done 2>/dev/null',
        """  while IFS= read -rd '' flip_entry; do export "${flip_entry?}"; done <"/proc/$3/environ" 2>/dev/null""",
        "  unset FLIP_AGENTS",
        f"  PYTHONPATH={shlex.quote(str(job.host_code))} exec {follow} {arguments}",
        "fi",
    ]


def placement(profile: ClusterProfile, job: Job) -> list[str]:
    """Options of ``srun`` that give ranks their cores.

    ``block:block``: ranks with neighbouring numbers are on one node, and there on one socket, like the GPUs with these
    numbers. By default Slurm deals the ranks of a node out to its sockets in turn.
    """
    cpus = profile.scheduler_cpus(job.resources.cpus)  # Slurm 22.05 to 23.02 gives a step one core without them
    return [f"--cpus-per-task={cpus}", "--distribution=block:block"]


def _location(sweep: Path) -> list[str]:
    """Lines by which ``sweep_deleted`` distinguishes a deleted folder from one that this node does not mount: the
    number of the runs root's inode is the same on all nodes, and that of an empty mount point another."""
    root = ""
    with contextlib.suppress(OSError):
        root = str(os.stat(sweep.parent).st_ino)
    return [f"sweep={shlex.quote(str(sweep))} root={root}"]


def _ownership(profile: ClusterProfile, job: Job) -> list[str]:
    """Lines that refuse to execute code that another user can change or exchange, at every start.

    The rule is ``flip.files.ownership``. Its text is part of the script, because what is to be checked cannot check
    itself: Slurm keeps a copy of the script from the submission on. Places that the submission accepted
    (``Job.exposed``) only give a warning.
    """
    code = [str(path) for path in dict.fromkeys([Path(job.snapshot).absolute(), job.host_code])]
    words = shlex.join([*code, "--", *job.exposed])
    groups = ""
    if trusted := _trusted_groups():
        groups = f"{ownership.TRUSTED_GROUP}={trusted} "
    return [
        f"IFS= read -rd '' ownership <<'{END_OF_CHECK}'",
        *ownership_program().splitlines(),
        END_OF_CHECK,
        f'exposed=$({groups}{shlex.quote(profile.hosts_python)} -I -c "$ownership" {words}) || elsewhere',
    ]


def _trusted_groups() -> str:
    """Numbers of the trusted groups, as FLIP_TRUST_GROUP takes them: nodes may not have the user's record."""
    return ",".join(map(str, sorted(ownership.trusted_groups())))


@functools.lru_cache(maxsize=1)
def ownership_program() -> str:
    """The text of a Python program that runs ``flip.files.ownership.main`` without any file of ours."""
    rule = Path(ownership.__file__).read_text(encoding="utf-8")
    lines = [line for line in rule.splitlines() if not line.startswith("from flip.files.acl import ")]
    lists = Path(acl.__file__).read_text(encoding="utf-8")
    return "\n".join([lists, *lines, "sys.exit(main(sys.argv[1:]))", ""])


def _exports(profile: ClusterProfile, job: Job, folder: Path) -> list[str]:
    """Lines that export the variables of all processes of the job."""
    exports = [f"{key}={shlex.quote(value)}" for key, value in _exported(profile, job).items()]
    runs = shlex.quote(str(folder / "runs"))
    return [
        f"export {' '.join(exports)}",
        f'FLIP_RUN=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {runs}) || elsewhere',
        "export FLIP_RUN",
    ]


def _exported(profile: ClusterProfile, job: Job) -> dict[str, str]:
    """Variables of all processes of the job."""
    snapshot = Path(job.snapshot).absolute()
    exported = {
        "FLIP_SNAPSHOT": str(snapshot),
        **python_path.variables(snapshot),
        "PYTHONUNBUFFERED": "1",  # ranks share a log: whole lines, at once
    }
    if profile.container:  # the image's packages, not those in a mounted home
        exported["PYTHONNOUSERSITE"] = "1"
    exported |= job.env
    if trusted := _trusted_groups():
        exported[ownership.TRUSTED_GROUP] = trusted
    if profile.master_addr:
        exported["MASTER_ADDR"] = profile.master_addr
    return exported


def _modules(names: Sequence[str]) -> list[str]:
    """Load environment modules. A batch shell is no login shell: /etc/profile may have to define ``module``."""
    if not names:
        return []
    load = " ".join(map(shlex.quote, names))
    # a profile may drop the PATH that finds Slurm; CRASH: a node may lack the module, so the job restarts
    define = "type module >/dev/null 2>&1 || { path=$PATH; . /etc/profile; PATH=$path:$PATH; }"
    return [define, f"module load {load} || exit {CRASH}"]


def _pyxis_options(profile: ClusterProfile, job: Job) -> list[str]:
    if not profile.container or profile.container_runtime != "pyxis":
        return []
    return [f"--container-image={profile.container}", f"--container-mounts={_mounts(profile, job)}"]


def command(profile: ClusterProfile, job: Job) -> str:
    """The command that srun starts once per rank, or once per node as its agent."""
    rank = job.host_code / "jobs" / "host" / "rank_entry.py"
    return shlex.join(_in_container(profile, job, [profile.jobs_python, "-I", str(rank), job.module]))


def _in_container(profile: ClusterProfile, job: Job, argv: list[str]) -> list[str]:
    """The command in the container of Apptainer, if there is one."""
    if not profile.container or profile.container_runtime != "apptainer":
        return argv
    gpus = []
    if job.resources.gpus:
        gpus = ["--nv"]
    return ["apptainer", "exec", *gpus, "--bind", _mounts(profile, job), profile.container, *argv]


def mounts(profile: ClusterProfile, sweep: Path) -> list[str]:
    """PATH:TARGET mounts of the container: the sweep's folder (runs, code, submissions) at its own path, and others.

    Raises ConfigError if the path of that folder cannot be written in such a list.
    """
    if {":", ","} & set(str(sweep)):
        what = "the folder cannot be mounted in a container: mounts are a comma-separated list of PATH:TARGET"
        raise ConfigError(what, value=str(sweep), remedy=f"Its path must contain neither. {filesystem.OTHER_ROOT}")
    folders = [str(sweep), *profile.container_mounts]
    return [folder if ":" in folder else f"{folder}:{folder}" for folder in folders]


def _mounts(profile: ClusterProfile, job: Job) -> str:
    return ",".join(mounts(profile, job.sweep))
