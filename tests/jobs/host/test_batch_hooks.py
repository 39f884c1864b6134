"""The end of an attempt is queried until Slurm answers; its cause is never guessed."""

import pytest

from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import batch_hooks, slurm_cli
from tests.jobs.act import act

SILENT = "exit 1"
NONE = "[ $1 = show ] && echo 'JobState=RUNNING Restarts=1'; exit 0"
AWAY = "[ $1 = show ] && printf 'JobState=RUNNING Restarts=1\\n Comment=away:1:0:1 \\n'; exit 0"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Of a job that was started again; its first attempt has no end."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_json(run.path / "job.json", {"token": "t", "after": 0})
    run.start_attempt({"resumes_from": 0, "after": 0})
    for name, value in {"SLURM_JOB_ID": "57", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm_cli.time, "sleep", lambda seconds: None)
    return run


def causes(run):
    return [(read_json(run.attempt(n) / "end.json") or {}).get("cause") for n in run.attempt_numbers()]


def test_a_begin_that_hears_nothing_leaves_it_to_the_end_of_its_attempt(run, commands, capsys):
    """A node that is cut off from Slurm, after an attempt whose end the storage did not take."""
    commands("scontrol", SILENT)
    assert act("begin", run.path, "--token", "t") == 0
    assert causes(run) == [None, None] and "Slurm does not say how the last attempt ended" in capsys.readouterr().err
    commands("scontrol", AWAY)
    assert act("end", run.path, "--attempt", "2", "--code", "70") == 0
    assert causes(run) == ["storage", "crash"]


def test_or_to_the_next_begin(run, commands):
    commands("scontrol", SILENT)
    act("begin", run.path)
    commands("scontrol", AWAY)
    act("begin", run.path)
    assert causes(run) == ["storage", "node", None]


@pytest.mark.parametrize("said, cause", [(NONE, "node"), (AWAY, "storage")])
def test_one_that_hears_settles_it(run, commands, said, cause):
    commands("scontrol", said)
    act("begin", run.path)
    assert causes(run) == [cause, None]


def test_the_word_for_the_next_start_waits_for_a_controller_that_is_away(run, commands, slept, tmp_path, monkeypatch):
    """For longer than anybody asks what earlier starts left: it goes before the requeue, whenever that is."""
    monkeypatch.setattr(batch_hooks, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(slurm_cli, "OUTAGE_SECONDS", 100.0)
    asked = f"$(wc -l < {tmp_path}/calls)"
    heard = tmp_path / "heard"
    answers = f"[ $1 = show ] && echo 'JobState=RUNNING Restarts=1' || echo $* >> {heard}"
    commands("scontrol", f"[ {asked} -lt 11 ] && exit 1; {answers}; exit 0")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch_hooks, "end", full)
    assert act("end", run.path, "--attempt", "1", "--code", "75") == 69
    assert heard.read_text().splitlines() == [
        "update JobId=57 Comment=away:1:1:1",
        "requeue 57",
        "update JobId=57 StartTime=now+1800",
    ]
