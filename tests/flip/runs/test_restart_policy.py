"""Tests of the restart policy, with one table row per case, and that host code runs on old versions of Python."""

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flip.common import gpu_software
from flip.runs import restart_policy
from flip.runs.errors import CAUSES
from flip.runs.restart_policy import LAUNCHER_STOPPED, STOP_REQUESTED, EndFacts, Limits, decide
from flip.runs.rundir import RunDir
from tests.harness.job_records import write_job

ROOT = Path(__file__).resolve().parents[3]


def c(cause, rank=0, **facts):
    return {"cause": cause, "code": CAUSES.get(cause, 70), "reason": f"why {cause}", "rank": rank, **facts}


def h(*causes):
    """History rows; a trailing + marks an attempt with a new checkpoint."""
    return [{"cause": cause.rstrip("+"), "committed": cause.endswith("+")} for cause in causes]


def ask(causes=(), code=0, state="RUNNING", history=(), complete=False, cancelled=False, progressed=False, **facts):
    end = EndFacts(code, state, **facts)
    return decide(list(causes), end, list(history), Limits(), complete, cancelled, progressed)


PORT = c("crash", reason="DistNetworkError: failed to bind to [::]:29500 (errno: 98 - Address already in use).")

TABLE = [
    # name, arguments, action, cause, delay
    ("complete", dict(complete=True), "done", "complete", 0),
    (
        "complete beats everything",
        dict(complete=True, cancelled=True, code=137, state="CANCELLED"),
        "done",
        "complete",
        0,
    ),
    ("0 without a result", dict(code=0), "requeue", "crash", 0),
    ("complete cause without a result", dict(causes=[c("complete")], code=0), "requeue", "crash", 0),
    ("cancel.json", dict(code=75, causes=[c("stopped")], cancelled=True), "stop", "cancelled", 0),
    ("cancelled by the scheduler", dict(code=75, state="CANCELLED,COMPLETING"), "stop", "cancelled", 0),
    ("cancelled, code 0", dict(code=0, state="CANCELLED"), "stop", "cancelled", 0),
    ("stopped", dict(code=75, causes=[c("stopped")]), "requeue", "stopped", 0),
    ("75 by code alone", dict(code=75), "requeue", "stopped", 0),
    ("configuration", dict(code=78), "stop", "config", 0),
    ("data", dict(code=65), "stop", "data", 0),
    ("permission", dict(code=77), "stop", "permission", 0),
    ("diverged", dict(code=76), "stop", "diverged", 0),
    ("hang", dict(code=71), "requeue", "hang", 0),
    ("crash", dict(code=70), "requeue", "crash", 0),
    *((f"unknown code {n}", dict(code=n), "requeue", "crash", 0) for n in (1, 2, 134, 137, 139, 143, 255)),
    ("not observed", dict(code=None), "requeue", "node", 0),
    # causes: ranked by class, not by code
    ("65 beside SIGABRT", dict(code=134, causes=[c("data"), c("peer_lost", 1)]), "stop", "data", 0),
    ("78 beside a clean stop", dict(code=143, causes=[c("stopped"), c("config", 1)]), "stop", "config", 0),
    ("stop, the rest was killed", dict(code=137, causes=[c("stopped"), c("peer_lost", 1)]), "requeue", "stopped", 0),
    ("only echoes", dict(code=137, causes=[c("peer_lost", 1)]), "requeue", "crash", 0),
    ("only echoes, no state", dict(code=70, state=None, causes=[c("peer_lost")]), "requeue", "node", 0),
    (
        "only echoes, no state, asked to stop",
        dict(code=70, state=None, causes=[c("peer_lost")], stop_requested=True),
        "requeue",
        "stopped",
        0,
    ),
    (
        "a crash and its echo, no state",
        dict(code=70, state=None, causes=[c("peer_lost"), c("crash", 1)]),
        "requeue",
        "crash",
        0,
    ),
    ("a cause of no class", dict(code=1, causes=[c("gremlins")]), "requeue", "crash", 0),
    # states
    ("requeued already", dict(code=75, state="PENDING"), "nothing", "stopped", 0),
    ("node lost, requeued already", dict(code=1, state="PENDING, COMPLETING"), "nothing", "stopped", 0),
    (
        "cut off while it starts, its peer crashed",
        dict(code=143, state="PENDING", causes=[c("crash")]),
        "nothing",
        "stopped",
        0,
    ),
    ("node failed", dict(code=1, state="NODE_FAIL", causes=[c("crash")]), "requeue", "node", 0),
    ("agents lost a node", dict(code=68, causes=[c("crash")]), "requeue", "node", 0),
    ("agents lost a node, no state", dict(code=68, state=None), "requeue", "node", 0),
    ("agents lost a node, asked to stop", dict(code=68, state=None, stop_requested=True), "requeue", "node", 0),
    ("agents lost a node while others saved", dict(code=68, causes=[c("stopped")]), "requeue", "stopped", 0),
    ("agents lost all nodes at a preemption", dict(code=68, state="PENDING"), "nothing", "stopped", 0),
    ("agents lost all nodes at a preemption, too", dict(code=68, state="PREEMPTED"), "requeue", "stopped", 0),
    ("agents lost all nodes at the wall limit", dict(code=68, state="TIMEOUT"), "requeue", "timeout", 0),
    ("wall limit, clean", dict(code=75, state="TIMEOUT", causes=[c("stopped")]), "requeue", "stopped", 0),
    ("wall limit, killed", dict(code=137, state="TIMEOUT"), "requeue", "timeout", 0),
    ("preempted, killed", dict(code=143, state="PREEMPTED"), "requeue", "stopped", 0),
    ("memory", dict(code=137, state="OUT_OF_MEMORY"), "requeue", "crash", 0),
    ("TERM, no state", dict(code=143, state=None), "nothing", "crash", 0),
    ("TERM and a clean stop, no state", dict(code=75, state=None, causes=[c("stopped")]), "nothing", "stopped", 0),
    ("lost agent, no state", dict(code=70, state=None, causes=[c("stopped", signal="")]), "requeue", "stopped", 0),
    ("newer attempt, no state", dict(code=75, state=None, causes=[c("stopped", signal="")]), "nothing", "stopped", 0),
    ("warning, no state", dict(code=75, state=None, causes=[c("stopped", signal="SIGUSR2")]), "requeue", "stopped", 0),
    ("crash, no state", dict(code=137, state=None), "requeue", "crash", 0),
    ("the launcher leaves", dict(code=75, state=LAUNCHER_STOPPED), "nothing", "stopped", 0),
    ("the launcher leaves a finished run", dict(state=LAUNCHER_STOPPED, complete=True), "done", "complete", 0),
    ("the launcher leaves a bad configuration", dict(code=78, state=LAUNCHER_STOPPED), "stop", "config", 0),
    # requested stops, whichever process carried them out
    ("killed after its grace", dict(code=137, state=f"RUNNING,{STOP_REQUESTED}"), "requeue", "stopped", 0),
    ("killed after a stop request, no state", dict(code=137, state=None, stop_requested=True), "requeue", "stopped", 0),
    ("asked to stop while it starts up", dict(code=143, state=f"RUNNING,{STOP_REQUESTED}"), "requeue", "stopped", 0),
    (
        "asked to stop, no strike",
        dict(code=137, state=f"{LAUNCHER_STOPPED},{STOP_REQUESTED}", history=h(*["crash"] * 2)),
        "nothing",
        "stopped",
        0,
    ),
    (
        "asked to stop, an orphan",
        dict(code=None, state=f"{LAUNCHER_STOPPED},{STOP_REQUESTED}", history=h("node", "node")),
        "nothing",
        "stopped",
        0,
    ),
    (
        "asked to stop, but it crashed",
        dict(code=137, state=f"RUNNING,{STOP_REQUESTED}", causes=[c("crash")]),
        "requeue",
        "crash",
        0,
    ),
    # limits
    ("second crash", dict(code=70, history=h("crash")), "requeue", "crash", 0),
    ("third crash", dict(code=70, history=h("crash", "crash")), "stop", "crash", 0),
    ("crash, timeout, hang", dict(code=71, history=h("crash", "timeout")), "stop", "hang", 0),
    ("nodes are counted apart", dict(code=71, history=h("crash", "node", "node")), "requeue", "hang", 0),
    ("a node that goes away ten times", dict(code=None, history=h(*["node"] * 9)), "stop", "node", 0),
    ("three wall limits", dict(code=137, state="TIMEOUT", history=h("timeout", "timeout")), "stop", "timeout", 0),
    ("preemption between does not reset", dict(code=70, history=h("crash", "stopped", "crash")), "stop", "crash", 0),
    ("a checkpoint between does", dict(code=70, history=h("crash", "crash", "stopped+")), "requeue", "crash", 0),
    (
        "a checkpoint in this one does",
        dict(code=70, history=h("crash", "crash"), progressed=True),
        "requeue",
        "crash",
        0,
    ),
    ("cut off after two crashes", dict(code=1, state="PENDING", history=h("crash", "crash")), "nothing", "stopped", 0),
    ("a cause that only a person can fix, requeued already", dict(code=78, state="PENDING"), "nothing", "stopped", 0),
    ("the same with a cause file", dict(code=78, state="PENDING", causes=[c("config")]), "stop", "config", 0),
    ("port taken", dict(code=70, causes=[PORT], history=h("crash", "crash")), "requeue", "port", 0),
    ("port taken, the peers crashed", dict(code=1, causes=[c("crash", 1), PORT]), "requeue", "port", 0),
    ("port no crash", dict(code=70, causes=[c("crash")], history=h("port", "port")), "requeue", "crash", 0),
    ("port taken ten times", dict(code=70, causes=[PORT], history=h(*["port"] * 9)), "stop", "port", 0),
    ("preemption is free", dict(code=75, history=h(*["stopped+"] * 99), progressed=True), "requeue", "stopped", 0),
    ("second without a checkpoint", dict(code=75, history=h("stopped")), "requeue", "stopped", 0),
    ("third without a checkpoint", dict(code=75, history=h("stopped", "stopped")), "requeue", "stopped", 60),
    ("fifth without a checkpoint", dict(code=75, history=h(*["stopped"] * 4)), "requeue", "stopped", 240),
    ("twentieth without a checkpoint", dict(code=75, history=h(*["stopped"] * 19)), "requeue", "stopped", 3600),
    (
        "third, with a checkpoint",
        dict(code=75, history=h("stopped", "stopped"), progressed=True),
        "requeue",
        "stopped",
        0,
    ),
    ("a checkpoint ends the row", dict(code=75, history=h("stopped", "stopped+", "stopped")), "requeue", "stopped", 0),
    ("storage", dict(code=69), "requeue", "storage", 30),
    ("storage again", dict(code=69, history=h("storage", "stopped", "storage")), "requeue", "storage", 120),
    ("storage, long", dict(code=69, history=h(*["storage"] * 20)), "requeue", "storage", 1800),
    ("storage after a checkpoint", dict(code=69, history=h("storage"), progressed=True), "requeue", "storage", 30),
    ("storage, the last try of a day", dict(code=69, history=h(*["storage"] * 52)), "requeue", "storage", 1800),
    ("storage, a day is over", dict(code=69, history=h(*["storage"] * 53)), "stop", "storage", 0),
    ("75 by code alone, no state", dict(code=75, state=None), "nothing", "stopped", 0),
    (
        "a clean stop beside a rank that was killed, no state",
        dict(code=137, state=None, causes=[c("stopped")]),
        "nothing",
        "stopped",
        0,
    ),
    ("a cause of no class beats the code", dict(code=75, causes=[c("gremlins")]), "requeue", "crash", 0),
    ("the launcher leaves, no delay", dict(code=69, state=LAUNCHER_STOPPED), "nothing", "storage", 0),
    ("the node did not boot", dict(code=1, state="BOOT_FAIL"), "requeue", "node", 0),
    ("wall limit, the shell's own code", dict(code=143, state="TIMEOUT"), "requeue", "timeout", 0),
    (
        "port taken, as an echo has it",
        dict(code=70, causes=[c("crash"), c("peer_lost", 1, reason="Address already in use")]),
        "requeue",
        "crash",
        0,
    ),
    # attempts that used up the wall limit
    ("warned at the limit, nothing kept", dict(code=75, limit_reason="it passed"), "requeue", "timeout", 0),
    ("the third time", dict(code=75, limit_reason="it passed", history=h("timeout", "timeout")), "stop", "timeout", 0),
    ("warned at the limit, saved", dict(code=75, limit_reason="it passed", progressed=True), "requeue", "stopped", 0),
    (
        "warned at the limit, and cancelled",
        dict(code=75, limit_reason="it passed", cancelled=True),
        "stop",
        "cancelled",
        0,
    ),
    (
        "warned at the limit, requeued already",
        dict(code=75, limit_reason="it passed", state="PENDING"),
        "nothing",
        "timeout",
        0,
    ),
    ("a crash at the limit", dict(code=70, limit_reason="it passed", progressed=True), "requeue", "crash", 0),
    # nodes that start no rank
    ("a node that starts no rank", dict(code=137, unstarted=["n2"]), "requeue", "node", 0),
    *(
        (
            f"beside a {cause} of those that waited",
            dict(code=137, causes=[c(cause)], unstarted=["n2"]),
            "requeue",
            "node",
            0,
        )
        for cause in ("crash", "hang", "stopped")
    ),
    ("and the node failed", dict(code=137, state="NODE_FAIL", unstarted=["n2"]), "requeue", "node", 0),
    ("and requeued already", dict(code=137, state="PENDING", unstarted=["n2"]), "nothing", "stopped", 0),
    ("beside a mistake", dict(code=137, causes=[c("config")], unstarted=["n2"]), "stop", "config", 0),
    ("hangs count with crashes", dict(code=70, history=h("hang", "hang")), "stop", "crash", 0),
    ("storage for a day", dict(code=69, history=h(*["storage"] * 60)), "stop", "storage", 0),
]


@pytest.mark.parametrize("arguments, action, cause, delay", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_decide_returns_action_cause_and_delay(arguments, action, cause, delay):
    decision = ask(**arguments)
    assert (decision.action, decision.cause, decision.delay) == (action, cause, delay), decision.reason


def test_decide_handles_every_cause_and_suggests_retry_after_limit():
    for cause, code in CAUSES.items():
        assert ask(causes=[c(cause)], code=code).action in ("requeue", "stop")
    assert "why crash" in ask(causes=[c("crash")], code=70).reason
    assert "--retry" in ask(code=70, history=h("crash", "crash")).reason


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(code=137, state="OUT_OF_MEMORY"), "out of memory (killed by the scheduler)"),
        (dict(code=137), "killed by signal 9, as the kernel does when memory runs out"),
        (dict(code=139), "killed by signal 11"),
        (dict(code=255), "exit code 255, without a cause file"),
        (dict(code=0), "ended with 0, but there is no result.json"),
        (
            dict(code=75, state="PENDING"),
            "preempted, or its node failed, before a clean stop; the scheduler has requeued",
        ),
    ],
)
def test_decide_reason_starts_with_observation(arguments, words):
    assert ask(**arguments).reason.startswith(words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(complete=True), "complete"),
        (dict(cancelled=True), "cancelled"),
        (dict(state="CANCELLED"), "cancelled"),
        (dict(code=1, state="NODE_FAIL"), "the node failed"),
        (dict(code=137, state=f"RUNNING,{STOP_REQUESTED}"), "killed: asked to save and stop, it did not do so in time"),
        (dict(code=137, state="TIMEOUT"), "the wall limit came before a clean stop"),
        (dict(code=143, state="PREEMPTED"), "preempted before a clean stop"),
        (dict(code=None), "ended unseen: its host or its launcher went away"),
        (dict(code=None, state="UNSEEN", causes=[c("crash")]), "ended unseen: its host or its launcher went away"),
        (dict(code=143, state="UNSEEN"), "killed by signal 15; the job's state could not be read"),
        (dict(code=127), "exit code 127, without a cause file"),
        (dict(code=129), "killed by signal 1"),
        (dict(code=159), "killed by signal 31"),
        (dict(code=160), "exit code 160, without a cause file"),
        (dict(code=65), "exit code 65, without a cause file"),
        (dict(code=70, causes=[c("crash", 3)]), "rank 3: why crash"),
        (dict(code=70, causes=[{"cause": "crash"}]), "rank ?: crash"),
        (dict(code=75, state=LAUNCHER_STOPPED), "exit code 75, without a cause file; the launcher was asked to end"),
        (dict(code=143, state=None), "killed by signal 15; the job's state could not be read"),
    ],
)
def test_decide_reason_has_exact_text(arguments, words):
    assert ask(**arguments).reason == words


def test_limits_defaults_match_contracts():
    assert Limits() == (3, 10, 10, 3, 60.0, 3600.0, 30.0, 1800.0, 86400)


def test_cause_of_no_class_is_a_failure_that_counts_itself():
    """Else a cause that is new in CAUSES would restart a run for ever."""
    kinds = {*restart_policy.FINAL, *restart_policy.FAILURES, *restart_policy.OWN_LIMITS}
    assert set(CAUSES) - kinds == {"storage", "stopped", "complete", "peer_lost"}
    decided = restart_policy._by_cause("unheard", "", h("unheard", "unheard"), Limits(), progressed=False)
    assert decided.action == "stop"


def test_decide_applies_separate_limits_to_ports_nodes_and_failures():
    for cause, code in (("port", 70), ("node", None)):
        limits = Limits(failures=1, ports=2, nodes=3)
        most = {"port": 2, "node": 3}[cause]
        for before in range(1, 4):
            causes = [PORT] if cause == "port" else []
            decision = decide(
                causes, EndFacts(code, "RUNNING"), h(*[cause] * (before - 1)), limits, False, False, False
            )
            assert (decision.cause, decision.action) == (cause, "stop" if before >= most else "requeue")
    decision = decide([], EndFacts(70, "RUNNING"), [], Limits(failures=1), False, False, True)
    assert decision.action == "requeue", "the attempt made progress"


def test_decide_excludes_hosts_for_hardware_errors_and_unstarted_ranks():
    broken = "AcceleratorError: CUDA error: uncorrectable ECC error encountered"
    causes = [c("crash", host="n1", reason=broken), c("crash", 1, host="n2"), c("peer_lost", 2, host="n3")]
    causes.append(c("peer_lost", 3, host="n4", reason=broken))  # quotes the error of another rank's GPU
    assert ask(causes=causes, code=70).exclude == ("n1",)
    started = ask(code=137, unstarted=["n7"])
    assert started.exclude == ("n7",) and started.reason.startswith("no rank could be started on n7: the mount")
    checked = ask(code=None, unhealthy={"n7": "memory: 3 MiB", "n5": "GPUs: 7 of 8"})
    assert (checked.cause, checked.action, checked.exclude) == ("node", "requeue", ("n5", "n7"))
    assert checked.reason == "failed the health check before the start: n5 (GPUs: 7 of 8), n7 (memory: 3 MiB)"
    full = ask(causes=[c("storage")], code=137, unstarted=["n7"])  # srun reports a rank's own 69 in the same words
    assert (full.cause, full.exclude) == ("storage", ())


def test_decide_names_memory_limit_beside_crashes_of_other_ranks():
    """srun ends with 1 then, and the state of the job stays RUNNING until its script has ended."""
    for causes in ([], [c("peer_lost")], [c("crash", 1, reason="CUDA error")]):
        decision = ask(causes=causes, code=1, out_of_memory=["n1", "n2"])
        assert (decision.cause, decision.action, decision.exclude) == ("crash", "requeue", ())
        assert decision.reason.startswith("out of memory: a rank on n1, n2 was killed at the memory limit of the job")
    assert ask(causes=[c("diverged")], code=1, out_of_memory=["n1"]).cause == "diverged"


def old_python() -> str:
    """The oldest Python from 3.6 to 3.10 on this machine, or any Python of pyenv; empty if there is none."""
    places = [*Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin/python3")]
    candidates = [str(p) for p in sorted(places, key=lambda p: [int(n) for n in p.parts[-3].split(".")])]
    candidates += [p for p in (shutil.which(f"python3.{minor}") for minor in range(6, 11)) if p]
    return next((p for p in candidates if subprocess.run([p, "-c", ""], check=False).returncode == 0), "")


HOST_CODE = [ROOT / "flip" / "__init__.py", ROOT / "jobs" / "__init__.py", *ROOT.glob("flip/runs/*.py")]
HOST_CODE += [*ROOT.glob("jobs/host/**/*.py")]


@pytest.mark.parametrize("path", HOST_CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_host_code_parses_as_python_3_6(path):
    """Checks the syntax on every machine. If an older Python is installed, the next test runs the code with it."""
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.skipif(not old_python(), reason="no Python older than ours here")
def test_owner_of_job_runs_on_oldest_available_python(tmp_path):
    run = tmp_path / "sweep" / "run"
    run.mkdir(parents=True)
    write_job(RunDir(run))
    script = tmp_path / "script"
    script.write_text('echo "$@"; exit 78')
    owner = [old_python(), "-I", str(ROOT / "jobs" / "host" / "job.py"), str(run), "--script", str(script)]

    ended = subprocess.run(owner, capture_output=True, text=True, check=False)
    assert ended.returncode == 78, ended.stderr
    output = (run / "logs" / "1" / "job.out").read_text()
    assert output.startswith("step ranks 1\n") and '"do": "stop"' in output
    refused = subprocess.run(owner, capture_output=True, text=True, check=False)
    assert refused.returncode == 78 and "not started" in refused.stderr


CRASHES = {
    "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be": "HARDWARE",
    "RuntimeError: CUDA error: uncorrectable NVLink error detected during the execution": "HARDWARE",
    "RuntimeError: CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error": "HARDWARE",
    "RuntimeError: CUDA error: no CUDA-capable device is detected": "HARDWARE",
    "RuntimeError: No CUDA GPUs are available": "HARDWARE",
    "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable": "HARDWARE",
    "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized": "HARDWARE",
    "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU": "HARDWARE",
    "NVMLError_GpuIsLost: GPU is lost": "HARDWARE",
    "RuntimeError: The NVIDIA driver on your system is too old (found version 12020).": "HARDWARE",
    f"n3: {gpu_software.DRIVER_TOO_OLD}: it runs CUDA 12.8, and torch is built for CUDA 13.0.": "HARDWARE",
    f"n3: {gpu_software.NO_COMPILER}: there is no C compiler (gcc or clang).": "HARDWARE",
    "RuntimeError: CUDA error: an illegal memory access was encountered": "",
    "RuntimeError: CUDA error: device-side assert triggered": "",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of": "",
    "DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, useIpv6: "
    "false, code: -98, name: EADDRINUSE, message: address already in use": "PORT_TAKEN",
    "OSError: [Errno 98] Address already in use (while attempting to bind on address ('127.0.0.1', 17211))":
    "PORT_TAKEN",
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4":
    "PEER_GONE",
    "DistBackendError: NCCL error: remote process exited or there was a network error": "PEER_GONE",
}  # fmt: skip


@pytest.mark.parametrize("text", CRASHES)
def test_crash_message_matches_only_its_own_pattern(text):
    known = [name for name in ("HARDWARE", "PORT_TAKEN", "PEER_GONE") if getattr(restart_policy, name).search(text)]
    assert known == ([CRASHES[text]] if CRASHES[text] else [])
