"""Which of the launcher's promises hold on a Slurm site: a pure function of what was read there
(``jobs/slurm/site.py``)."""

from __future__ import annotations

from typing import NamedTuple

from flip.runs.errors import CAUSES
from jobs.common.cluster_profile import ClusterProfile
from jobs.host.slurm_cli import parse_int
from jobs.slurm.site import SHARED, Site

HOLDS, LESS, NOT, UNKNOWN = "holds", "with less", "does not hold", "not known"
OLDEST, FIXED = (20, 11), (26, 5)
"""Of Slurm: the first release that knows send_user_signal; the first that starts no finished job once more."""
CRED_EXPIRE = 120
"""Slurm's default, seconds."""
REQUEUE_DELAY = (25, 11)
"""The first release that reads SchedulerParameters=requeue_delay."""


class CheckResult(NamedTuple):
    """``read``: what was seen. ``then``: where not ``holds``, the remedy or the consequence, as a sentence."""

    promise: str
    verdict: str
    read: str
    then: str = ""


def findings(site: Site, profile: ClusterProfile) -> list[CheckResult]:
    """One per promise, in the order in which a person would want to know."""
    return [CheckResult(name, *judge(site, profile)) for name, judge in PROMISES.items()]


Verdict = tuple[str, str] | tuple[str, str, str]


def _accepted(site: Site, profile: ClusterProfile) -> Verdict:
    said = site.said.get("sbatch --test-only")
    if said is None or "did not answer" in said:
        return UNKNOWN, said or "sbatch --test-only was not asked", "Ask once more when the controller is less busy."
    if said:
        return NOT, said, "Correct partition, account, qos or options of the profile: nothing can be submitted."
    return HOLDS, f"sbatch --test-only takes a job of one node, {profile.hours:g} h, in {profile.partition}"


def _version(site: Site, profile: ClusterProfile) -> Verdict:
    read = f"Slurm {site.config.get('SLURM_VERSION', 'of an unknown version')}; the tests run on 24.11"
    if site.version and site.version < OLDEST:
        return LESS, read, "Nobody has tried it on releases before 20.11."
    return (HOLDS if site.version else UNKNOWN), read, "" if site.version else "Ask `sbatch --version`."


def _nodes(site: Site, profile: ClusterProfile) -> Verdict:
    node = site.shape
    if site.said.get("nodes"):
        return UNKNOWN, site.said["nodes"], "Compare the profile with `sinfo` yourself."
    if node is None:
        return NOT, "no node of the partition is up", "Jobs wait until one is."
    cards = f"{node.gpus} GPUs{f' ({node.gpu})' if node.gpu else ''}, " if node.gpus else ""
    share = f"{site.nodes[node]} of {sum(site.nodes.values())}"
    read = f"{share} usable nodes have {cards}{node.cpus} CPUs, {node.memory} MiB"
    most = {"gpus_per_node": max(n.gpus for n in site.nodes), "cpus_per_node": max(n.cpus for n in site.nodes)}
    for key, there in most.items():
        if getattr(profile, key) > there:
            return NOT, read, f"{key}: {getattr(profile, key)} is more than any node has; set it to {there}."
    select = site.config.get("SelectType", "")
    if profile.gpus_per_node and select and "cons_tres" not in select and "gres" not in profile.options:
        then = f"--gpus-per-node needs select/cons_tres; give options: {{gres: 'gpu:{profile.gpus_per_node}'}}."
        return NOT, f"{read}; SelectType={select}", then
    return HOLDS, read


def _memory(site: Site, profile: ClusterProfile) -> Verdict:
    share = site.memory_share
    if not share or any(key.startswith("mem") for key in profile.options):
        return HOLDS, "the profile asks for it" if share else "it is not counted, or all of a node is theirs"
    return LESS, share, "That is all a job gets that does not ask: give options: {mem-per-cpu: ...} in the profile."


def _again(site: Site, profile: ClusterProfile) -> Verdict:
    mode, grace = site.preemption
    kind = site.config.get("PreemptType", "")
    read = f"{kind}, PreemptMode={mode or '?'}, GraceTime={grace} s; jobs ask for --requeue"
    read += f" (JobRequeue={site.config.get('JobRequeue', '?')} is for those that do not)"
    if "no-requeue" in profile.options:
        then = "Each start is then a new job, submitted by the one before (docs/cluster.md): take no-requeue out."
        return LESS, "the profile's options say no-requeue", then
    plugins = [site.config.get(key, "") for key in ("JobSubmitPlugins", "CliFilterPlugins")]
    if any(name not in ("", "(null)") for name in plugins):
        read += "; a plugin of the site may disable requeue, then each start is a new job: `submit` says so"
    if mode in ("OFF", "REQUEUE"):
        return HOLDS, f"nobody preempts there ({kind}, PreemptMode=OFF)" if mode == "OFF" else read
    if mode == "SUSPEND":
        return LESS, read, "It is frozen and goes on there; after ten minutes of that it may end as a crash."
    if mode == "CANCEL":
        most = f"the grace and KillWait ({site.kill_wait} s)" if grace else f"KillWait ({site.kill_wait} s)"
        then = f"Its exit trap does it, if the ranks save and leave within {most}; else it is `stopped`: submit again."
        return LESS, read, then
    return UNKNOWN, site.said.get("qos") or read, "Say which QOS jobs get: --qos, or qos in the profile."


def _warned(site: Site, profile: ClusterProfile) -> Verdict:
    mode, grace = site.preemption
    told = "send_user_signal" in site.config.get("PreemptParameters", "")
    read = f"GraceTime={grace} s, KillWait={site.kill_wait} s, {'USR2' if told else 'TERM'} at the beginning"
    if not mode:
        return UNKNOWN, "see above", "It depends on the QOS."
    if mode == "OFF":
        return HOLDS, "nobody preempts there"
    if mode == "SUSPEND":
        return LESS, f"PreemptMode={mode}", "No signal comes before it is frozen; what it holds in memory stays."
    if not grace:
        return LESS, read, f"A save that takes longer than {site.kill_wait} s is lost: keep checkpoint.minutes low."
    return HOLDS, read


def _limit(site: Site, profile: ClusterProfile) -> Verdict:
    most, asked = site.longest, profile.hours * 3600
    read = f"USR2 comes {profile.signal_seconds} s before the limit of {profile.hours:g} h; the site allows "
    read += f"{most / 3600:g} h" if most else "any"
    if most and asked > most:
        return NOT, read, f"Jobs that ask for more do not start: set hours to {int(most / 36) / 100:g}."
    if profile.signal_seconds * 2 > asked:
        return LESS, read, "Attempts are over soon after they begin: lower signal_seconds, or raise hours."
    if profile.signal_seconds < 60:
        return LESS, read, "Slurm looks at limits every half minute: give signal_seconds 60 or more."
    return HOLDS, f"{read}; a job that outlives it is requeued all the same"


def _crash(site: Site, profile: ClusterProfile) -> Verdict:
    most = parse_int(site.config.get("MaxBatchRequeue", ""))
    read = f"the job's exit trap calls scontrol requeue; MaxBatchRequeue={'not set' if most is None else most}"
    starts, holds = (_codes(site.config.get(key, "")) for key in ("RequeueExit", "RequeueExitHold"))
    ours = {code for cause, code in CAUSES.items() if cause != "complete"}
    if ours & starts:
        then = "Slurm starts such jobs again by itself, also those that a person must mend; ask for their removal."
        return NOT, f"RequeueExit has {_list(ours & starts)}", then
    if ours & holds:
        return LESS, f"RequeueExitHold has {_list(ours & holds)}", "Such jobs are held until `scontrol release`."
    if most is not None and most < 2:
        then = "Jobs that Slurm itself starts again more often are held: `status` shows why, `scontrol release` helps."
        return LESS, read, then
    return HOLDS, read


def _cancel(site: Site, profile: ClusterProfile) -> Verdict:
    return HOLDS, "cancel.json is looked at before every start, the job's state before every requeue"


def _truth(site: Site, profile: ClusterProfile) -> Verdict:
    age = parse_int(site.config.get("MinJobAge", ""))
    read = f"run directories say it; squeue lists ended jobs for {'?' if age is None else age} s (MinJobAge)"
    if age is not None and age < 60:
        return LESS, read, "Of a job that was killed with its exit trap `status` then knows only that it ended."
    return HOLDS, read


def _lost(site: Site, profile: ClusterProfile) -> Verdict:
    limit = parse_int(site.config.get("SlurmdTimeout", ""))
    back = "; lost nodes come back by hand alone" if site.config.get("ReturnToService") == "0" else ""
    if limit is None:
        return UNKNOWN, "SlurmdTimeout was not said", "Ask `scontrol show config`."
    if limit == 0:
        return NOT, "SlurmdTimeout=0", "Slurm never takes a silent node as lost: cancel and submit such runs yourself."
    return HOLDS, f"noticed after {limit} s or more (SlurmdTimeout), then Slurm starts the job again{back}"


def _sweep(site: Site, profile: ClusterProfile) -> Verdict:
    most, jobs = parse_int(site.config.get("MaxArraySize", "")), site.config.get("MaxJobCount", "?")
    name, submit = site.submit_limit
    read = f"MaxArraySize={'?' if most is None else most}, MaxJobCount={jobs}"
    read += f", {name} {submit}" if name else ""
    if most is None:
        return UNKNOWN, read, "sbatch says so where an array is too big: lower array_size."
    if profile.array_size > max(1, most - 1):
        return NOT, read, f"Arrays of {profile.array_size} are refused: set array_size to {max(1, most - 1)}."
    if name:
        then = (
            f"Sweeps of more than {submit} runs are refused, other jobs counted in: submit parts of them with --only."
        )
        return LESS, read, then
    if most <= 2:
        return LESS, read, "Every run is a job of its own."
    return HOLDS, f"{read}; bigger sweeps make more arrays of {profile.array_size}"


def _delay(site: Site, profile: ClusterProfile) -> Verdict:
    wait, whence = _requeue_delay(site)
    read = f"about {wait} s from a requeue to the next start at the earliest ({whence})"
    return (LESS, read, "Every preemption costs that.") if wait > CRED_EXPIRE + 1 else (HOLDS, read)


def _requeue_delay(site: Site) -> tuple[int, str]:
    """(seconds, the setting that says so): requeue_delay where Slurm knows it, else cred_expire and a second more."""
    delay = parse_int(_parameters(site, "SchedulerParameters").get("requeue_delay", ""))
    if delay is not None and site.version >= REQUEUE_DELAY:
        return delay, f"SchedulerParameters=requeue_delay={delay}"
    given = parse_int(_parameters(site, "AuthInfo").get("cred_expire", ""))
    wait = given or CRED_EXPIRE
    return wait + 1, f"cred_expire={wait}, {'AuthInfo' if given else 'the default of Slurm'}"


def _parameters(site: Site, key: str) -> dict[str, str]:
    """The NAME=VALUE parts of a setting that is a list."""
    parts = (part.strip().partition("=") for part in site.config.get(key, "").split(","))
    return {name: value for name, mark, value in parts if mark}


def _finished(site: Site, profile: ClusterProfile) -> Verdict:
    mode, grace = site.preemption
    if mode == "REQUEUE" and grace and site.version < FIXED:
        return HOLDS, "Slurm may start a finished job once more here (GraceTime, before 26.05): it leaves at once"
    return HOLDS, "a job that is started once more leaves at once"


def _python(site: Site, profile: ClusterProfile) -> Verdict:
    name = profile.hosts_python
    if site.said.get("python"):
        return NOT, site.said["python"], "Name a Python >= 3.6 that the nodes' hosts have: host_python in the profile."
    if tuple(parse_int(part) or 0 for part in site.python.split(".")[:2]) < (3, 6):
        return NOT, f"{name} is Python {site.python}", "The exit trap needs 3.6: name another in host_python."
    read, kind = f"{name} is Python {site.python} on this machine", site.places.get("python", "")
    if kind.startswith(SHARED):
        return HOLDS, f"{read}, on {kind}"
    return UNKNOWN, read, f"Nodes must have it too: `srun -N1 -p {profile.partition} {name} --version` shows it."


def _root(site: Site, profile: ClusterProfile) -> Verdict:
    trouble, kind = site.said.get("runs root", ""), site.places.get("runs root", "")
    if trouble:
        return NOT, trouble, "Name a folder that may be written: runs_root in the profile, or FLIP_RUNS."
    if kind.startswith(SHARED):
        return HOLDS, f"may be written; {kind}"
    then = "Nodes must see this very folder under the same path: put runs_root on the shared file system."
    return UNKNOWN, f"may be written; {kind or 'its file system is not known'}", then


def _plain(site: Site, profile: ClusterProfile) -> Verdict:
    words = [f"{name} {'does not answer' if site.said.get(name) else 'answers'}" for name in ("squeue --json", "sacct")]
    return HOLDS, "; ".join(words)


def _environment(site: Site, profile: ClusterProfile) -> Verdict:
    if site.unset:
        return NOT, f"not set here: {', '.join(site.unset)}", "Export them, or take them out of the profile's env."
    return HOLDS, f"sbatch --export=ALL of a few names{' and ' + ', '.join(profile.env) if profile.env else ''}"


def _submitit(site: Site, profile: ClusterProfile) -> Verdict:
    if site.said.get("submitit"):
        return NOT, "submitit is not installed", "pip install -r requirements.txt"
    return HOLDS, "submitit and sbatch, srun, squeue, scancel, scontrol are here"


def _codes(text: str) -> set[int]:
    """``1,10-12`` as a set; a process ends with 0 to 255."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        least, most = parse_int(first), parse_int(last)
        if least is not None:
            found |= {code for code in range(256) if least <= code <= (least if most is None else most)}
    return found


def _list(codes: set[int]) -> str:
    return ", ".join(map(str, sorted(codes)))


PROMISES = {
    "jobs can be submitted from here": _submitit,
    "a job is accepted": _accepted,
    "a release of Slurm that is known": _version,
    "nodes as the profile says": _nodes,
    "a job gets the memory it needs": _memory,
    "a preempted run starts again": _again,
    "a run is warned before it is preempted": _warned,
    "a run is warned before the time limit": _limit,
    "a killed rank or a crash is started again": _crash,
    "a lost node is noticed": _lost,
    "a cancelled run stays cancelled": _cancel,
    "what became of a run is known": _truth,
    "a sweep may have any number of runs": _sweep,
    "a requeued job starts soon": _delay,
    "a finished run is not trained again": _finished,
    "the batch script's host has a Python": _python,
    "runs can live where they shall": _root,
    "the environment of jobs is a known one": _environment,
    "neither JSON nor accounting is needed": _plain,
}
"""Promise -> what is judged."""
