"""Fuzz tests of the parsers of Slurm's output, which may be cut off, mixed up or of another release."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flip.runs import lifecycle
from flip.runs.errors import ConfigError
from flip.runs.lifecycle import RunState
from flip.runs.rundir import RunDir, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.host import failed_starts, own_job, slurm_cli
from jobs.slurm import job_states, site, site_checks
from tests.parsers.spoil import spoiled

pytestmark = pytest.mark.timeout(60)

QUEUE = (
    "s.1f|0|50_0|RUNNING|n[1-2]|None|N/A\ns.1f|1|50_1|PENDING||(held|by admin)|2026-11-25T14:00:00\n"
    "s.1f|N/A|9|COMPLETED|n1|None\n"
)
JOB = (
    "JobId=57 ArrayJobId=50 ArrayTaskId=3 JobName=a.b\n   JobState=COMPLETING Reason=None\n   Requeue=1 Restarts=2\n"
    "   RunTime=1-00:00:00 TimeLimit=2-00:00:00 TimeMin=N/A\n   ExcNodeList=(null) Comment=away:3:1:2\n"
    "   EndTime=2026-11-25T09:24:14 PreemptTime=2026-11-25T09:24:13\n"
)
CONFIG = (
    "Configuration data as of 2026-11-25T09:24:14\nClusterName            = here\nKillWait = 30 sec\n"
    "AuthInfo = cred_expire=120\nMaxArraySize = 1001\nSLURM_VERSION = 24.11.5\nPreemptType = preempt/partition_prio\n"
    "RequeueExit = 1,10-12\nSlurmdTimeout = 300 sec\n"
)
PARTITION = "PartitionName=p Default=YES GraceTime=60 MaxTime=1-00:00:00 PreemptMode=REQUEUE DefMemPerCPU=100\n"
NODES = "n1|8|64000|gpu:h100:8(S:0-1)|idle\nn2|8|64000|(null)|drained*\n"
#: Words that int() rejects, and numbers that are out of range.
ODD = ("²", "٣", "9" * 5000, "-1", "99999999999999999999", "0001-01-01T00:00:00", "4294967294-4294967295")


@st.composite
def printed(draw, good):
    """Draw bytes of standard output with exchanged numbers, possibly damaged."""
    tokens = good.split()
    for _ in range(draw(st.integers(0, 2))):
        old = draw(st.sampled_from(["0", "1", "2", "3", "30", "120", "2026-11-25T09:24:14", "1-00:00:00", *tokens]))
        good = good.replace(old, draw(st.sampled_from(ODD)))
    encoded = good.encode()
    return draw(st.just(encoded) | spoiled(encoded))


@pytest.fixture
def answers(monkeypatch):
    """Replace Slurm's commands: a mutable mapping of command -> output."""
    outputs = {}

    def run(args, **_):
        return subprocess.CompletedProcess(args, 0, outputs.get(Path(args[0]).name, b""), b"")

    monkeypatch.setattr(slurm_cli.subprocess, "run", run)
    return outputs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("slurm") / "s" / "run")
    run.start_attempt({})
    write_json(run.path / "job.json", {"kind": "slurm", "name": "s.1f", "index": 1, "after": 0, "site": "here"})
    return run


@given(printed(QUEUE))
@example("s.1f|²|50_0|RUNNING|n|None|N/A\n".encode())
def test_queue_parses_any_squeue_output(answers, run, text):
    answers |= {"squeue": text, "scontrol": CONFIG.encode()}
    rows = slurm_cli.queue(["s.1f"])
    assert all(isinstance(name, str) and index >= 0 for name, index in rows)
    assert isinstance(lifecycle.states([run], job_states.seen([run]))[run.path], RunState)


WORD = st.text(st.sampled_from("abcdefgh[]-,.0123 ()"), max_size=8)


@given(st.dictionaries(st.integers(0, 999), st.tuples(WORD, WORD, st.text("ab| (),:", max_size=9)), max_size=4))
def test_queue_returns_printed_rows(answers, jobs):
    answers["squeue"] = "".join(f"s.1f|{i}|7_{i}|{a}|{b}|{why}|N/A\n" for i, (a, b, why) in jobs.items()).encode()
    expected = {("s.1f", i): slurm_cli.QueueRow(f"7_{i}", a, why, b) for i, (a, b, why) in jobs.items()}
    assert slurm_cli.queue(["s.1f"]) == expected


@given(printed(JOB))
def test_job_state_parses_any_scontrol_output(answers, text):
    answers["scontrol"] = text
    assert own_job.job_state("50_3", 2) is None or own_job.job_state("50_3", 2).strip()
    mark = failed_starts.before(slurm_cli.fields_of(slurm_cli.call("scontrol", "show", "job")), 2)
    assert mark.starts >= 0 and mark.attempt >= 0


@given(st.text(max_size=12) | st.sampled_from(ODD))
@example("1-" + "9" * 5000 + ":00:00")
@example("0001-01-01T00:00:00")
@example("9999-12-31T23:59:59")
def test_time_parsers_return_value_or_none_for_any_text(text):
    assert slurm_cli.parse_duration(text) is None or slurm_cli.parse_duration(text) >= 0
    assert slurm_cli.timestamp(text) is None or isinstance(slurm_cli.timestamp(text), float)
    assert slurm_cli.parse_int(text) is None or slurm_cli.parse_int(text) >= 0


@given(st.integers(0, 400), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_parse_duration_returns_printed_seconds(days, hours, minutes, rest):
    text = (f"{days}-" if days else "") + f"{hours:02d}:{minutes:02d}:{rest:02d}"
    assert slurm_cli.parse_duration(text) == ((days * 24 + hours) * 60 + minutes) * 60 + rest


@given(printed(CONFIG), printed(PARTITION), printed(NODES), st.text("REQU,|0123:-", max_size=20))
@example(b"RequeueExit = 0-99999999999\nMaxArraySize = " + b"9" * 5000, PARTITION.encode(), NODES.encode(), "")
def test_check_site_gives_verdicts_for_any_slurm_output(answers, config, partition, nodes, qos):
    answers |= {"scontrol": config}
    read = slurm_cli.config()
    answers |= {"scontrol": partition}
    profile = ClusterProfile(name="x", kind="slurm", gpus_per_node=8, partition="p")
    try:
        fields = site._partition(profile, read)
    except ConfigError:
        fields = {}
    shown = dict(zip(("preempt", "grace", "wall", "submit"), qos.split("|"), strict=False))
    nodes = site.parse_nodes(nodes.decode("utf-8", "replace"))
    slurm_site = site.Site(read, fields, shown, {"submit": qos}, nodes=nodes, python="3.11.7")
    results = site_checks.check_site(slurm_site, profile)
    assert len(results) == len(site_checks.CHECKS) and all(result.state and result.text for result in results)
