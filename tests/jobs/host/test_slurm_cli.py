"""Tests of slurm_cli with stub commands on PATH; tests/slurm uses the real commands."""

import pytest

from jobs.host import own_job, slurm_cli

SLURMS = """BOOT_FAIL CANCELLED COMPLETED COMPLETING CONFIGURING DEADLINE EXPEDITING FAILED LAUNCH_FAILED NODE_FAIL
OUT_OF_MEMORY PENDING POWER_UP_NODE PREEMPTED RECONFIG_FAIL REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING RESV_DEL_HOLD
REVOKED RUNNING SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED SUSPENDED TIMEOUT UPDATE_DB"""


def test_each_slurm_state_belongs_to_a_single_group():
    """SLURMS lists the states of squeue and sacct, up to Slurm 25.11."""
    lists = slurm_cli.WAITING + slurm_cli.TRANSITIONAL + slurm_cli.ON_NODES + slurm_cli.ENDED
    assert sorted(lists) == sorted(SLURMS.split())


def test_unreachable_controller_gives_no_state_and_raises_from_calls(commands):
    commands("scontrol", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert own_job.job_state("57", 0) is None
    with pytest.raises(slurm_cli.SlurmUnavailable, match="Unable to contact"):
        slurm_cli.cluster_name()
    commands("scontrol", "sleep 60")
    with pytest.raises(slurm_cli.SlurmUnavailable, match="did not answer for 0.2 s"):
        slurm_cli.call("scontrol", "show", "config", deadline=0.2)


@pytest.mark.parametrize("text, value", [("00:01:40", 100), ("1-02:00:00", 93600), ("UNLIMITED", None), ("", None)])
def test_parse_duration_returns_seconds_or_none(text, value):
    assert slurm_cli.parse_duration(text) == value


def test_queue_reads_all_jobs_with_single_squeue_call(commands):
    lines = [
        "demo.1f|0|50_0|RUNNING|n[1-2]|None|N/A",
        "demo.1f|1|50_1|PENDING||(held|by admin)|2026-11-25T14:00:00",
        "x.2|N/A|9|COMPLETED|n1|None",
    ]
    commands("squeue", "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines))
    rows = slurm_cli.queue(["x.2", "demo.1f", "x.2"])
    assert {key: (row.id, row.state, row.reason) for key, row in rows.items()} == {
        ("demo.1f", 0): ("50_0", "RUNNING", "None"),
        ("demo.1f", 1): ("50_1", "PENDING", "(held|by admin)"),
        ("x.2", 0): ("9", "COMPLETED", "None"),
    }
    assert [rows[key].start for key in rows] == ["", "2026-11-25T14:00:00", ""]
    assert commands.calls() == ["squeue -a -h -r -t all --name=demo.1f,x.2 -o %j|%K|%i|%T|%N|%r|%S|%k"]
    assert slurm_cli.queue([]) == {}


def test_call_removes_user_settings_from_environment(commands, monkeypatch):
    for name in ("SQUEUE_PARTITION", "SCANCEL_INTERACTIVE", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    commands("scontrol", "env")
    lines = slurm_cli.call("scontrol", "show", "config").splitlines()
    assert [line for line in lines if line.startswith(("SLURM_", "SQUEUE_", "SCANCEL_"))] == [
        "SLURM_CONF=/etc/slurm.conf"
    ]


def test_queue_returns_newest_job_with_same_name_and_index(commands):
    lines = ["demo.77aa|3|61_3|PENDING||Dependency", "demo.77aa|3|57_3|COMPLETED|n1|None"]
    commands("squeue", "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines))
    assert slurm_cli.queue(["demo.77aa"])["demo.77aa", 3].id == "61_3"
