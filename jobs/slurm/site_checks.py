"""Which guarantees of the launcher hold on a Slurm site: pure functions of what ``jobs/slurm/site.py`` has read."""

import re

from flip.runs.checks import DEGRADED, FAILS, OK, UNKNOWN, Check, Rule, run_rules
from flip.runs.errors import CAUSES
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.paths import install_command
from jobs.host.slurm_cli import parse_int
from jobs.slurm.site import SHARED, Node, Site

OLDEST = (20, 11)  # first release with send_user_signal
SHORT_KILL_WAIT = 10  # seconds, for a save, and for the job's owner, which takes a third of a second on an idle node
CRED_EXPIRE = 120  # Slurm's default, seconds
REQUEUE_DELAY = (25, 11)  # first release that reads SchedulerParameters=requeue_delay
EXPEDITED = (25, 11)  # first release with --requeue=expedite
MAY_2026 = (26, 5)  # first release that orders tasks by topology, and refuses --gres=gpu with --gpus-per-node
OLDEST_WITH_AGENTS = (23, 2)  # a cautious bound: only 24.11 is tested
CLOSED_NETWORK = "Keep ports of the nodes closed to other machines (SECURITY.md, Ports)."
NEWER = {"--requeue=expedite": EXPEDITED, "requeue_delay": REQUEUE_DELAY, "srun --ignore-signals": MAY_2026}


def check_site(site: Site, profile: ClusterProfile) -> list[Check]:
    """A row per guarantee of the launcher, in the order of CHECKS. Rows that are not OK have a remedy."""
    return list(run_rules(CHECKS, site, profile))


def _accepted(site: Site, profile: ClusterProfile) -> Check:
    refusal = site.errors.get("sbatch --test-only")
    if refusal is None or "did not answer" in refusal:
        return Check(
            UNKNOWN, refusal or "sbatch --test-only was not run", "Try again when the controller is less busy."
        )
    if refusal:
        return Check(
            FAILS, refusal, "Correct partition, account, qos or options of the profile: nothing can be submitted."
        )
    return Check(OK, f"sbatch --test-only accepts a job of one node, {profile.hours:g} h, in {profile.partition}")


def _version(site: Site, profile: ClusterProfile) -> Check:
    read = f"Slurm {site.config.get('SLURM_VERSION', 'of an unknown version')}; the tests run on 24.11"
    if not site.version:
        return Check(UNKNOWN, read, "Ask `sbatch --version`.")
    if site.version < OLDEST:
        return Check(DEGRADED, read, "Releases before 20.11 are untested.")
    return Check(OK, read)


def _nodes(site: Site, profile: ClusterProfile) -> Check:
    node = site.common_node
    if site.errors.get("nodes"):
        return Check(UNKNOWN, site.errors["nodes"], "Compare the profile with `sinfo` yourself.")
    if node is None:
        return Check(FAILS, "no node of the partition is up", "Jobs wait until one is.")
    read = f"{site.nodes[node]} of {sum(site.nodes.values())} usable nodes have {_resources(node)}"
    cpus = max(n.cpus for n in site.nodes)
    most = {"gpus_per_node": max(n.gpus for n in site.nodes), "cpus_per_node": cpus // profile.threads_per_core}
    for key, maximum in most.items():
        if getattr(profile, key) > maximum:
            return Check(FAILS, read, f"{key}: {getattr(profile, key)} is more than any node has; set it to {maximum}.")
    select = site.config.get("SelectType", "")
    if profile.gpus_per_node and select and "cons_tres" not in select and "gres" not in profile.options:
        then = f"--gpus-per-node needs select/cons_tres; give options: {{gres: 'gpu:{profile.gpus_per_node}'}}."
        return Check(FAILS, f"{read}; SelectType={select}", then)
    return Check(OK, read)


def _resources(node: Node) -> str:
    parts = [f"{node.cpus} CPUs", f"{node.memory} MiB"]
    if node.threads_per_core > 1:
        parts[0] += f" ({node.cores} cores)"
    if node.gpus:
        kind = ""
        if node.gpu:
            kind = f" ({node.gpu})"
        parts.insert(0, f"{node.gpus} GPUs{kind}")
    return ", ".join(parts)


def _threads(site: Site, profile: ClusterProfile) -> Check:
    node = site.common_node
    if node is None or not node.cores:
        return Check(
            UNKNOWN, "sinfo names no cores", "Compare CPUTot with the sockets and cores of `scontrol show node`."
        )
    counted = node.threads_per_core
    read = f"a node has {node.cores} cores and {node.cpus} CPUs, so Slurm counts {_per_core(counted)}"
    if profile.options.get("hint") == "nomultithread" or profile.options.get("threads-per-core") == "1":
        counted = 1
        read += "; options of the profile give whole cores"
    if profile.threads_per_core == counted:
        return Check(OK, read)
    have = profile.threads_per_core
    remedy = f"threads_per_core is {have}: a job gets {_share(counted, have)} the cores that its run asks for. "
    remedy += f"Set threads_per_core: {counted} in the profile"
    if profile.cpus_per_node > node.cores:
        remedy += f" and cpus_per_node, which counts cores, to {node.cores}"
    return Check(DEGRADED, read, f"{remedy}.")


def _per_core(threads: int) -> str:
    if threads == 1:
        return "cores"
    return f"hardware threads, {threads} for each core"


def _share(counted: int, have: int) -> str:
    """A job's cores as a multiple of those that its run asks for, in words."""
    if counted > have:
        return {2: "half", 4: "a quarter of"}.get(counted // have, f"1/{counted // have} of")
    return {2: "twice"}.get(have // counted, f"{have // counted} times")


def _memory(site: Site, profile: ClusterProfile) -> Check:
    share = site.memory_share
    if not share:
        return Check(OK, "memory is not counted, or jobs get all of a node")
    if any(key.startswith("mem") for key in profile.options):
        return Check(OK, "the profile asks for it")
    return Check(
        DEGRADED, share, "Jobs that request no memory get only that: set options: {mem-per-cpu: ...} in the profile."
    )


def _restarts(site: Site, profile: ClusterProfile) -> Check:
    mode, grace = site.preemption
    kind = site.config.get("PreemptType", "")
    read = f"{kind}, PreemptMode={mode or '?'}, GraceTime={grace} s; jobs ask for --requeue"
    read += f" (JobRequeue={site.config.get('JobRequeue', '?')} is for those that do not)"
    if "no-requeue" in profile.options:
        then = "Each start is then a new job, submitted by the previous one (docs/cluster.md): remove no-requeue."
        return Check(DEGRADED, "the profile's options say no-requeue", then)
    plugins = [site.config.get(key, "") for key in ("JobSubmitPlugins", "CliFilterPlugins")]
    if any(name not in ("", "(null)") for name in plugins):
        read += "; a plugin of the site may disable requeue, then each start is a new job: `submit` says so"
    if mode == "OFF":
        return Check(OK, f"no preemption there ({kind}, PreemptMode=OFF)")
    if mode == "REQUEUE":
        return Check(OK, read)
    if mode == "SUSPEND":
        return Check(
            DEGRADED, read, "It is frozen and continues there; after ten minutes of that it may end as a crash."
        )
    if mode == "CANCEL":
        most = f"KillWait ({site.kill_wait} s)"
        if grace:
            most = f"the grace and {most}"
        then = f"Its owner does it, if the ranks save and leave within {most}; else it is `stopped`: submit again."
        return Check(DEGRADED, read, then)
    return Check(UNKNOWN, site.errors.get("qos") or read, "Name the QOS of jobs: --qos, or qos in the profile.")


def _warned(site: Site, profile: ClusterProfile) -> Check:
    mode, grace = site.preemption
    signal = "TERM"
    if "send_user_signal" in site.config.get("PreemptParameters", ""):
        signal = "USR2"
    read = f"GraceTime={grace} s, KillWait={site.kill_wait} s, {signal} at the start"
    if not mode:
        return Check(UNKNOWN, "see above", "It depends on the QOS.")
    if mode == "OFF":
        return Check(OK, "no preemption there")
    if mode == "SUSPEND":
        return Check(DEGRADED, f"PreemptMode={mode}", "No signal comes before it is frozen; its memory is preserved.")
    if not grace:
        return Check(
            DEGRADED, read, f"A save that takes longer than {site.kill_wait} s is lost: keep checkpoint.minutes low."
        )
    return Check(OK, read)


def _limit(site: Site, profile: ClusterProfile) -> Check:
    most = site.max_seconds
    asked = profile.hours * 3600
    allowed = f"{most / 3600:g} h" if most else "any"
    read = f"USR2 comes {profile.signal_seconds} s before the limit of {profile.hours:g} h; the site allows {allowed}"
    if most and asked > most:
        return Check(FAILS, read, f"Jobs that ask for more do not start: set hours to {int(most / 36) / 100:g}.")
    if profile.signal_seconds * 2 > asked:
        return Check(DEGRADED, read, "Attempts are over soon after they begin: lower signal_seconds, or raise hours.")
    if profile.signal_seconds < 60:
        return Check(DEGRADED, read, "Slurm looks at limits every half minute: give signal_seconds 60 or more.")
    return Check(OK, f"{read}; a job that outlives it is requeued all the same")


def _crash(site: Site, profile: ClusterProfile) -> Check:
    most = parse_int(site.config.get("MaxBatchRequeue", ""))
    read = f"the owner of the job calls scontrol requeue; MaxBatchRequeue={_shown(most, 'not set')}"
    starts, holds = (_codes(site.config.get(key, "")) for key in ("RequeueExit", "RequeueExitHold"))
    bad = {code for cause, code in CAUSES.items() if cause != "complete"}
    if bad & starts:
        then = "Slurm starts such jobs again by itself, also those that a person must fix; ask for their removal."
        return Check(FAILS, f"RequeueExit has {_list(bad & starts)}", then)
    if bad & holds:
        return Check(
            DEGRADED, f"RequeueExitHold has {_list(bad & holds)}", "Such jobs are held until `scontrol release`."
        )
    if most is not None and most < 2:
        then = "Jobs that Slurm itself starts again more often are held: `status` shows why, `scontrol release` helps."
        return Check(DEGRADED, read, then)
    return Check(OK, read)


def _in_its_job(site: Site, profile: ClusterProfile) -> Check:
    problem = agents_problem(site, profile)
    tried = _tried(site, problem)
    if profile.agents and problem:
        return Check(DEGRADED, f"agents: true, but {problem}{tried}", _remedy_of_agents(site, profile))
    if problem:
        return Check(
            DEGRADED, f"{problem}{tried}", f"{_remedy_of_trial(site)}Slurm requeues the job after every fault."
        )
    if not profile.agents:
        then = "Set agents: true in the profile, or Slurm requeues the job after every fault."
        return Check(DEGRADED, f"agents: false{tried}", then)
    if site.agents_trial is not None and site.agents_trial.unable:
        then = "Nodes may be busy, or jobs may need more options: try again, with more seconds (--try-agents SECONDS)."
        return Check(UNKNOWN, f"agents: true{tried}", then)
    return Check(OK, f"agents: true{tried}")


def _tried(site: Site, problem: str) -> str:
    """What a try of node agents has shown beyond ``problem``, to be appended to a text."""
    trial = site.agents_trial
    if trial is None:
        return ""
    text = ""
    if trial.unable:
        text += f"; could not be tried: {trial.unable}"
    if trial.problem not in ("", problem):
        text += f"; {trial.problem}"
    if trial.nodes:
        text += f"; agents of {', '.join(trial.nodes)} connect"
    return text


def _remedy_of_trial(site: Site) -> str:
    """The remedy of a problem of a try, with a space behind it; empty without one."""
    if site.agents_trial is None or not site.agents_trial.problem:
        return ""
    return f"{site.agents_trial.remedy} "


def _remedy_of_agents(site: Site, profile: ClusterProfile) -> str:
    """What to do if a profile has agents although something speaks against them."""
    remedy = _remedy_of_trial(site)
    if remedy:
        return f"{remedy}Until then remove agents from the profile: srun starts the ranks."
    if profile.container or site.agents_trial is not None:
        return "Remove agents from the profile: srun then starts the ranks, and Slurm requeues after every fault."
    return "Remove agents from the profile, or see whether they connect at all: flip doctor --try-agents."


def agents_problem(site: Site, profile: ClusterProfile) -> str:
    """Why runs should not have node agents on this site; empty: they may (docs/node_agents.md).

    The configuration of Slurm decides first, then a try, if there was one.
    """
    if site.version < OLDEST_WITH_AGENTS:
        return f"Slurm is {site.config.get('SLURM_VERSION', 'of an unknown version')}, node agents need 23.02"
    if profile.container:
        return "the ranks run in a container"
    if site.kill_wait < SHORT_KILL_WAIT:
        return f"KillWait={site.kill_wait} s, less than {SHORT_KILL_WAIT} s"
    task_prolog = _task_prolog_of(site)
    if task_prolog:
        return f"TaskProlog={task_prolog} would run once for all ranks of a node"
    if "OverMemoryKill" in site.config.get("JobAcctGatherParams", ""):
        return "JobAcctGatherParams=OverMemoryKill would kill the agent with a rank"
    if site.version >= MAY_2026 and _orders_tasks(site):
        return f"tasks follow the topology ({site.config['TopologyPlugin']})"
    if site.agents_trial is not None:
        return site.agents_trial.problem
    return ""


def _ports(site: Site, profile: ClusterProfile) -> Check:
    """Whether what listens on the first of several nodes does so on one interface (SECURITY.md, Ports)."""
    trial = site.agents_trial
    if sum(site.nodes.values()) == 1:
        return Check(OK, "the partition has one node: ranks of one host listen on loopback")
    if trial is None or trial.store is None:
        read = "ranks on several nodes listen without authentication; rank 0's store does on all interfaces of its node"
        read += " if the node's own name leads to loopback there (127.0.1.1 in Debian's /etc/hosts)"
        return Check(UNKNOWN, read, f"flip doctor --try-agents looks at two nodes. {CLOSED_NETWORK}")
    listeners = [("rank 0's store", trial.store, "the node's own name leads to loopback there, or to no address of it")]
    if profile.agents:
        why = "no address is known that leads to the other nodes"
        listeners.append(("the coordinator of node agents", trial.coordinator or "", why))
    open_ = [
        f"{what} on all interfaces of the first node, because {why}" for what, address, why in listeners if not address
    ]
    rest = [f"{what} at {address}" for what, address, _ in listeners if address]
    read = f"listens without authentication: {'; '.join([*open_, *rest])}"
    if not open_:
        return Check(OK, f"{read}. gloo and NCCL take one interface of each node")
    remedy = "Let the nodes' names lead to their addresses in the nodes' network, also in their own /etc/hosts."
    return Check(DEGRADED, read, f"{remedy} {CLOSED_NETWORK}")


def _task_prolog_of(site: Site) -> str:
    """Path of the site's TaskProlog; empty if it has none."""
    value = site.config.get("TaskProlog", "")
    if value == "(null)":
        return ""
    return value


def _task_prolog(site: Site, profile: ClusterProfile) -> Check:
    task_prolog = _task_prolog_of(site)
    if not task_prolog:
        return Check(OK, "no TaskProlog")
    return Check(
        OK, f"TaskProlog={task_prolog} may export variables; the code of the run precedes folders of its PYTHONPATH"
    )


def _prolog(site: Site, profile: ClusterProfile) -> Check:
    prologs = [name for name in site.config if re.fullmatch(r"(Prolog|PrologSlurmctld)(\[\d+\])?", name)]
    set_ = [name for name in prologs if site.config[name] not in ("", "(null)")]
    if not set_:
        return Check(OK, "no prolog")
    read = f"{set_[0]}={site.config[set_[0]]}"
    parameters = site.config.get("SchedulerParameters", "")
    if "nohold_on_prolog_fail" in parameters.split(","):
        return Check(OK, f"{read}; nohold_on_prolog_fail: such a job starts elsewhere")
    then = "Slurm holds a job whose prolog fails: `status` prints the command that releases it. Ask for "
    return Check(DEGRADED, read, then + "SchedulerParameters=nohold_on_prolog_fail, with which it starts elsewhere.")


def _outcome(site: Site, profile: ClusterProfile) -> Check:
    age = parse_int(site.config.get("MinJobAge", ""))
    read = f"run directories record it; squeue lists ended jobs for {_shown(age)} s (MinJobAge)"
    read += f"; KillWait={site.kill_wait} s"
    if age is not None and age < 60:
        return Check(DEGRADED, read, "Of a job that was killed with its owner `status` then knows only that it ended.")
    if site.kill_wait < SHORT_KILL_WAIT:
        then = "After scancel the owner may be killed before it records the end. `flip cancel` has no such limit."
        return Check(DEGRADED, read, then)
    return Check(OK, read)


def _lost(site: Site, profile: ClusterProfile) -> Check:
    limit = parse_int(site.config.get("SlurmdTimeout", ""))
    if limit is None:
        return Check(UNKNOWN, "SlurmdTimeout is not known", "Ask `scontrol show config`.")
    if limit == 0:
        return Check(
            FAILS, "SlurmdTimeout=0", "Slurm never declares a silent node lost: cancel and submit such runs yourself."
        )
    read = f"noticed after {limit} s or more (SlurmdTimeout), then Slurm starts the job again"
    if site.config.get("ReturnToService") == "0":
        read += "; lost nodes come back only by hand"
    return Check(OK, read)


def _sweep(site: Site, profile: ClusterProfile) -> Check:
    most = parse_int(site.config.get("MaxArraySize", ""))
    jobs = site.config.get("MaxJobCount", "?")
    name, submit = site.submit_limit
    read = f"MaxArraySize={_shown(most)}, MaxJobCount={jobs}"
    if name:
        read += f", {name} {submit}"
    if most is None:
        return Check(UNKNOWN, read, "sbatch refuses arrays that are too big: lower array_size.")
    if profile.array_size > max(1, most - 1):
        return Check(FAILS, read, f"Arrays of {profile.array_size} are refused: set array_size to {max(1, most - 1)}.")
    if name:
        then = f"Sweeps of more than {submit} runs, other jobs included, are refused: submit parts with --only."
        return Check(DEGRADED, read, then)
    if most <= 2:
        return Check(DEGRADED, read, "Every run is a job of its own.")
    return Check(OK, f"{read}; bigger sweeps make more arrays of {profile.array_size}")


def _delay(site: Site, profile: ClusterProfile) -> Check:
    wait, whence = requeue_delay(site)
    read = f"about {wait} s from a requeue to the next start at the earliest ({whence})"
    if wait > CRED_EXPIRE + 1:
        return Check(DEGRADED, read, "Every preemption costs that.")
    return Check(OK, read)


def requeue_delay(site: Site) -> tuple[int, str]:
    """(seconds, the setting that decides): requeue_delay if Slurm knows it, else cred_expire plus one second."""
    delay = parse_int(_parameters(site, "SchedulerParameters").get("requeue_delay", ""))
    if delay is not None and site.version >= REQUEUE_DELAY:
        return delay, f"SchedulerParameters=requeue_delay={delay}"
    given = parse_int(_parameters(site, "AuthInfo").get("cred_expire", ""))
    if given:
        return given + 1, f"cred_expire={given}, AuthInfo"
    return CRED_EXPIRE + 1, f"cred_expire={CRED_EXPIRE}, the default of Slurm"


def _newer(site: Site, profile: ClusterProfile) -> Check:
    """Features of releases since 25.11. Jobs use none but ``requeue_delay``, which is the site's. With an expedited
    requeue Slurm itself would restart runs that stopped for good, if an epilog fails."""
    features = [name for name, first in NEWER.items() if site.version >= first]
    read = f"this release has {', '.join(features) or 'none'} (of {', '.join(NEWER)})"
    if profile.options.get("gres", "").startswith("gpu") and "gpus-per-node" in profile.options:
        verdict = DEGRADED
        if site.version >= MAY_2026:
            verdict = FAILS
        return Check(
            verdict, "the profile's options have gres and gpus-per-node", "Slurm 26.05 refuses both: remove one."
        )
    if site.version >= MAY_2026 and _orders_tasks(site):
        then = "Rank 0 may then be on another node than the first: untested. CR_NO_DIST_TOPO_BLOCK restores the order."
        return Check(DEGRADED, f"tasks follow the topology ({site.config['TopologyPlugin']})", then)
    return Check(OK, read)


def _orders_tasks(site: Site) -> bool:
    plugin = site.config.get("TopologyPlugin", "").rpartition("/")[2]
    is_flat = plugin in ("", "(null)", "none", "default", "flat")
    return not is_flat and "CR_NO_DIST_TOPO_BLOCK" not in site.config.get("SelectTypeParameters", "")


def _parameters(site: Site, key: str) -> dict[str, str]:
    """The NAME=VALUE parts of a setting that is a list."""
    parts = (part.strip().partition("=") for part in site.config.get(key, "").split(","))
    return {name: value for name, mark, value in parts if mark}


def _python(site: Site, profile: ClusterProfile) -> Check:
    name = profile.hosts_python
    if site.errors.get("python"):
        then = "Name a Python >= 3.6 that the nodes' hosts have: host_python in the profile."
        return Check(FAILS, site.errors["python"], then)
    if tuple(parse_int(part) or 0 for part in site.python.split(".")[:2]) < (3, 6):
        return Check(
            FAILS, f"{name} is Python {site.python}", "The owner of a job needs 3.6: name another in host_python."
        )
    read = f"{name} is Python {site.python} on this machine"
    kind = site.filesystems.get("python", "")
    if kind.startswith(SHARED):
        return Check(OK, f"{read}, on {kind}")
    return Check(UNKNOWN, read, f"Nodes must have it too: `srun -N1 -p {profile.partition} {name} --version` shows it.")


def _runs_root(site: Site, profile: ClusterProfile) -> Check:
    problem = site.errors.get("runs root", "")
    kind = site.filesystems.get("runs root", "")
    if problem:
        return Check(FAILS, problem, "Name a writable folder: runs_root in the profile, or FLIP_RUNS.")
    if kind.startswith(SHARED):
        return Check(OK, f"writable; {kind}")
    then = "Nodes must see this folder under the same path: put runs_root on the shared file system."
    return Check(UNKNOWN, f"writable; {kind or 'its file system is not known'}", then)


def _environment(site: Site, profile: ClusterProfile) -> Check:
    if site.unset:
        return Check(
            FAILS, f"not set here: {', '.join(site.unset)}", "Export them, or remove them from the profile's env."
        )
    read = "sbatch --export=ALL of a few names"
    if profile.env:
        read += f" and {', '.join(profile.env)}"
    return Check(OK, read)


def _submitit(site: Site, profile: ClusterProfile) -> Check:
    if site.errors.get("submitit"):
        return Check(FAILS, "submitit is not installed", install_command())
    return Check(OK, "submitit and sbatch, srun, squeue, scancel, scontrol are here")


def _codes(text: str) -> set[int]:
    """``1,10-12`` as a set; a process ends with 0 to 255."""
    codes: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        least = parse_int(first)
        if least is None:
            continue
        most = parse_int(last)
        if most is None:
            most = least
        codes |= {code for code in range(256) if least <= code <= most}
    return codes


def _shown(number: int | None, unknown: str = "?") -> str:
    if number is None:
        return unknown
    return str(number)


def _list(codes: set[int]) -> str:
    return ", ".join(map(str, sorted(codes)))


CHECKS = (
    Rule("jobs can be submitted from here", _submitit),
    Rule("a job is accepted", _accepted),
    Rule("the release of Slurm is tested", _version),
    Rule("nodes match the profile", _nodes),
    Rule("a run gets the cores that it asks for", _threads),
    Rule("a job gets the memory it needs", _memory),
    Rule("a preempted run starts again", _restarts),
    Rule("a run is warned before it is preempted", _warned),
    Rule("a run is warned before the time limit", _limit),
    Rule("a killed rank or a crash is restarted", _crash),
    Rule("a fault costs seconds, not a requeue", _in_its_job),
    Rule("ports of a run are open on one interface", _ports),
    Rule("a lost node is noticed", _lost),
    Rule("a failed prolog does not hold jobs", _prolog),
    Rule("ranks import the code of their run", _task_prolog),
    Rule("the outcome of a run is known", _outcome),
    Rule("a sweep may have any number of runs", _sweep),
    Rule("a requeued job starts soon", _delay),
    Rule("newer features of Slurm are used correctly", _newer),
    Rule("the batch script's host has a Python", _python),
    Rule("runs can be stored in the runs root", _runs_root),
    Rule("the environment of jobs is defined", _environment),
)
