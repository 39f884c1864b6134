"""A job that Slurm does not requeue is followed by a new one; tests/slurm has the real refusal."""

import os
import subprocess

import pytest

from jobs.host import slurm_cli, successor

SCRIPT = "#!/bin/bash\n#SBATCH --hold\n#SBATCH --array=0-3%2\necho '#SBATCH --hold'\n"
SHOWN = "JobId=60 JobState={state} Restarts=0\n   Comment={comment}\n   ExcNodeList={out} NodeList=n1\n"


@pytest.fixture
def slurm(commands, tmp_path, monkeypatch):
    """``slurm(...)``: stand-ins for the commands; what sbatch was given is in tmp_path / given and env."""
    for name, value in {"SLURM_JOB_ID": "60", "SLURM_ARRAY_JOB_ID": "57", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NAME", "demo.77aa")
    (tmp_path / "script").write_text(SCRIPT)

    def make(state="RUNNING", comment="", out="(null)", queue="demo.77aa|3|57_3|RUNNING|n1|None", sbatch=""):
        (tmp_path / "shown").write_text(SHOWN.format(state=state, comment=comment, out=out))
        commands("squeue", f"echo '{queue}'")
        commands("scontrol", f"case $1 in show) cat {tmp_path}/shown;; write) cat {tmp_path}/script;; *) exit 1;; esac")
        commands("sbatch", sbatch or f"cat > {tmp_path}/given; env > {tmp_path}/env; echo '99;far'")

    make.sbatch = lambda: [call for call in commands.calls() if call.startswith("sbatch")]
    make()
    return make


def test_the_same_script_for_this_element_alone_when_its_predecessor_has_ended(slurm, tmp_path):
    said = successor.submit("57_3", 0, 4)
    assert said == "requeue is disabled for this job; submitted its successor 99"
    assert slurm.sbatch() == ["sbatch --parsable --dependency=afterany:60 --array=3"]
    assert (tmp_path / "given").read_text() == SCRIPT.replace("#SBATCH --hold\n", "#\n", 1), "not held once more"


def test_delay_nodes_and_starts_that_came_to_nothing_are_handed_on(slurm):
    slurm(comment="away:7:0:4", out="n[8-9]")
    successor.submit("57_3", 0, 4, delay=59.6, exclude=("n3", "n2"))
    words = "--begin=now+60 --exclude=n[8-9],n2,n3 --comment=away:7:-1:4"
    assert slurm.sbatch() == [f"sbatch --parsable --dependency=afterany:60 --array=3 {words}"]


@pytest.fixture(params=["gone", "other"])
def parent(request):
    """The pid of a batch shell that was killed, or of the process that took its place: our own environment counts."""
    if request.param == "gone":
        yield 0
        return
    with subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"]}) as other:
        yield other.pid
        other.kill()


def test_it_gets_what_its_predecessor_was_given_and_not_what_belongs_to_that_job(slurm, tmp_path, monkeypatch, parent):
    monkeypatch.setattr(successor.os, "getppid", lambda: parent)
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("OWN_NAME", "kept")
    successor.submit("57_3", 0, 4)
    given = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert {name for name in given if name.startswith("SLURM")} == {"SLURM_CONF"}
    assert (given["OWN_NAME"], given["FLIP_FOLLOWS"]) == ("kept", "4")


def test_there_is_one_successor(slurm):
    slurm(queue="demo.77aa|3|61_3|PENDING||Dependency")
    assert successor.submit("57_3", 0, 4) == "left alone: job 61_3 continues its run"
    assert slurm.sbatch() == []


def test_the_newest_job_of_a_run_is_the_one_that_counts(commands):
    lines = ["demo.77aa|3|61_3|PENDING||Dependency", "demo.77aa|3|57_3|COMPLETED|n1|None"]
    commands("squeue", "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines))
    assert slurm_cli.queue(["demo.77aa"])["demo.77aa", 3].id == "61_3"


@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED"])
def test_a_refusal_is_final(slurm, state):
    slurm(
        state=state, sbatch="echo 'sbatch: error: Batch job submission failed: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
    )
    if state == "CANCELLED":
        assert successor.submit("57_3", 0, 4) == "left alone: it is CANCELLED"
        return
    with pytest.raises(slurm_cli.SlurmUnavailable, match="QOSMaxSubmitJobPerUserLimit"):
        successor.submit("57_3", 0, 4)
    assert len(slurm.sbatch()) == 1


def test_silence_is_not(slurm, commands, monkeypatch):
    naps = []

    def nap(seconds):
        naps.extend([seconds] if seconds >= 1 else [])  # those for a command's end left out
        if seconds == 2:
            slurm()

    monkeypatch.setattr(successor.time, "sleep", nap)
    commands("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    commands("scontrol", "exit 1")
    assert successor.submit("57_3", 0, 4).endswith("successor 99") and naps == [1.0, 2.0]


@pytest.mark.parametrize(
    "environ, newest, over",
    [({}, 9, False), ({"FLIP_FOLLOWS": "4"}, 4, False), ({"FLIP_FOLLOWS": "4"}, 5, True),
     ({"FLIP_FOLLOWS": "4", "SLURM_RESTART_COUNT": "1"}, 5, False)],
)  # fmt: skip
def test_a_successor_begins_where_no_other_job_has(environ, newest, over):
    assert successor.superseded(newest, environ) is over
