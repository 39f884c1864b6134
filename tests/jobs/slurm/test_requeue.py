"""Tests that the batch script's functions restart a job as their twins in Python do, with stand-ins for Slurm.

tests/slurm/test_requeue.py compares both on a real Slurm.
"""

import os
import subprocess
from dataclasses import dataclass, field

import pytest

from tests.harness.failed_start import BASH, PYTHON, STATUS, changes, queries, script

DISABLED = 'echo "57: Requested operation is presently disabled." >&2; exit 1'
ELEMENT = {"SLURM_ARRAY_JOB_ID": "57", "SLURM_ARRAY_TASK_ID": "1"}
SHELL_VARIABLES = ("_", "PWD", "OLDPWD", "SHLVL")


@dataclass(frozen=True)
class Situation:
    """``fields``: of the job. ``requeue``, ``update``: what scontrol does. ``changes``: calls that change something.
    ``silent``: the first two words of a command that fails once."""

    changes: list[str]
    fields: str = ""
    nodes: str = "n6 n7 n8"
    requeue: str = "true"
    update: str = "true"
    queue: str = ""
    silent: str = ""
    attempt: int | None = None
    element: bool = False
    env: dict[str, str] = field(default_factory=dict)


PLAIN = [
    "scontrol update JobId=58 Comment=away:1:0:0:127:n7",
    "scontrol requeue 58",
    "scontrol update JobId=58 ExcNodeList=n7",
]
LATE = [*PLAIN[1:], PLAIN[0]]
"""Slurm changes a job that ends only after the requeue."""
ENDING = "JobState=COMPLETING Reason=None"
SITUATIONS = {
    "requeue": Situation(PLAIN),
    "exclusion": Situation(
        [
            "scontrol update JobId=58 Comment=away:4:0:12:127:n7",
            "scontrol requeue 58",
            "scontrol update JobId=58 StartTime=now+180 ExcNodeList=n1,n2,n4,n7",
        ],
        fields="ExcNodeList=n1,n2,n5,n4 Comment=away:3:-1:12:127:n5",
    ),
    "exclusion guard": Situation(
        ["scontrol update JobId=58 Comment=away:1:0:0:127:n7", "scontrol requeue 58"], nodes="n6|down* n7 n8|drained"
    ),
    "just enough other nodes": Situation(
        PLAIN,
        nodes="n6|down* n7 n8",
    ),
    "limit of failed starts": Situation([], fields="Comment=away:100:-1:0:127:n5"),
    "earlier failed starts, then a good one": Situation(
        [
            "scontrol update JobId=58 Comment=away:1:3:12:127:n7",
            "scontrol requeue 58",
            "scontrol update JobId=58 ExcNodeList=n7",
        ],
        fields="Restarts=3 Comment=away:9:1:12:127:n5",
        env={"SLURM_RESTART_COUNT": "3"},
    ),
    "requeued by Slurm": Situation(
        ["scontrol update JobId=58 Comment=away:1:0:4:127:n7"], fields="JobState=PENDING Restarts=1", attempt=4
    ),
    "requeued by Slurm, ending": Situation(
        ["scontrol update JobId=58 Comment=away:1:0:0:127:n7"], fields="JobState=COMPLETING Reason=None Restarts=1"
    ),
    "cancelled": Situation([], fields="JobState=COMPLETING Reason=None", attempt=4),
    "cancelled in the grace period of a preemption": Situation(
        [], fields=f"{ENDING} PreemptTime=2026-11-25T09:24:02 EndTime=2026-11-25T09:24:13"
    ),
    "cancelled without a limit": Situation([], fields=f"{ENDING} RunTime=1-00:00:28 TimeLimit=UNLIMITED"),
    "cancelled before its limit": Situation([], fields=f"{ENDING} RunTime=08:09:59 TimeLimit=08:10:00"),
    "at its limit": Situation(LATE, fields=f"{ENDING} RunTime=1-08:09:00 TimeLimit=1-08:09:00"),
    "at the end of a reservation": Situation(LATE, fields="JobState=COMPLETING Reason=TimeLimit RunTime=00:00:05"),
    "preempted": Situation(LATE, fields=f"{ENDING} PreemptTime=2026-11-25T09:24:13 EndTime=2026-11-25T09:24:15"),
    "without its node": Situation(LATE, fields="JobState=COMPLETING Reason=NodeDown"),
    "killed": Situation(LATE, fields="JobState=COMPLETING Reason=RaisedSignal:9(Killed)"),
    "cancelled before an attempt": Situation([], fields="JobState=CANCELLED"),
    "cancelled meanwhile": Situation(
        ["scontrol update JobId=58 Comment=away:1:0:0:127:n7"],
        update="sed -i s/JobState=RUNNING/JobState=CANCELLED/ {folder}/shown",
    ),
    "answer lost": Situation(
        PLAIN,
        requeue="sed -i s/Restarts=0/Restarts=1/ {folder}/shown; exit 1",
    ),
    "silent at first": Situation(PLAIN, silent="show job"),
    "silent sinfo": Situation(PLAIN, silent="-h -N"),
    "silent hostnames": Situation(PLAIN, silent="show hostnames"),
    "silent update": Situation([PLAIN[0], *PLAIN], silent="update JobId=58"),
    "refused at first": Situation([*PLAIN[:2], *PLAIN[1:]], silent="requeue 58"),
    "array element": Situation(
        [
            "scontrol update JobId=57_1 Comment=away:1:0:0:127:n7",
            "scontrol requeue 57_1",
            "scontrol update JobId=57_1 ExcNodeList=n7",
        ],
        element=True,
    ),
    "successor": Situation(
        [
            "scontrol update JobId=58 Comment=away:1:0:0:127:n7",
            "scontrol requeue 58",
            "sbatch --parsable --dependency=afterany:58 --exclude=n7 --comment=away:1:-1:0:127:n7",
        ],
        requeue=DISABLED,
    ),
    "successor of an element": Situation(
        [
            "scontrol update JobId=57_1 Comment=away:4:0:5:127:n7",
            "scontrol requeue 57_1",
            "sbatch --parsable --dependency=afterany:57_1 --array=1 --begin=now+180 --exclude=n4,n7 "
            "--comment=away:4:-1:5:127:n7",
        ],
        fields="ExcNodeList=n4,n3 Comment=away:3:-1:4:69:n3",
        requeue=DISABLED,
        queue="t|0|99_0|RUNNING|n1|None|N/A|\nt|1|57_1|RUNNING|n7|None|N/A|",
        attempt=5,
        element=True,
    ),
    "successor, exclusion guard": Situation(
        [
            "scontrol update JobId=58 Comment=away:1:0:0:127:n7",
            "scontrol requeue 58",
            "sbatch --parsable --dependency=afterany:58 --exclude=n8,n3 --comment=away:1:-1:0:127:n7",
        ],
        fields="ExcNodeList=n8,n3",
        nodes="n7 n8",
        requeue=DISABLED,
    ),
    "successor that exists": Situation(
        ["scontrol update JobId=58 Comment=away:1:0:0:127:n7", "scontrol requeue 58"],
        requeue=DISABLED,
        queue="t|N/A|58|RUNNING|n7|None|N/A|\nt|N/A|101|PENDING||Dependency|N/A|\nt|N/A|99|FAILED|n1|None|N/A|",
    ),
}


def play(variant, situation, folder, commands):
    """Run a start that fails; returns (calls, what sbatch got: script and environment)."""
    folder.mkdir()
    usual = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0", "ExcNodeList": "(null)", "Comment": "(null)"}
    usual |= {"Partition": "gpu", "NumNodes": "1"}
    usual |= dict(pair.split("=", 1) for pair in situation.fields.split())
    (folder / "shown").write_text("".join(f"   {key}={value} x=y\n" for key, value in usual.items()))
    (folder / "queue").write_text(situation.queue)
    (folder / "script").write_text("#!/bin/bash\n#SBATCH --hold\n#SBATCH --nodes=1\ntrue\n#SBATCH --hold\n")
    acts = f"requeue) {situation.requeue};; update) {situation.update};;".replace("{folder}", str(folder))
    fails = (
        f"[ \"$1 $2\" = '{situation.silent}' ] && ! [ -e {folder}/failed ] && {{ touch {folder}/failed; exit 1; }}\n"
    )
    shows = f"job) cat {folder}/shown;; hostnames) echo $3 | tr , '\\n';;"
    commands(
        "scontrol",
        f"{fails}case $1 in show) case $2 in {shows} esac;; write) cat {folder}/script;; {acts} esac",
    )
    nodes = [node if "|" in node else f"{node}|idle" for node in situation.nodes.split()]
    commands("sinfo", f"{fails}printf '%s\\n' {' '.join(map(repr, nodes))}")
    commands("squeue", f"cat {folder}/queue")
    commands("sbatch", f"cat > {folder}/given; env > {folder}/env; echo 99")
    commands("sleep", "")
    environ = {"SLURM_JOB_ID": "58", "SLURM_JOB_NAME": "t", "SLURMD_NODENAME": "n7", "SLURM_JOB_PARTITION": "gpu"}
    environ |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_CONF": "/etc/slurm.conf", "FLIP_FOLLOWS": "2", "OWN": "with space"}
    environ |= {**(ELEMENT if situation.element else {}), **situation.env}
    (folder / "script.sh").write_text(script(variant, attempt=situation.attempt))
    before = len(commands.calls())
    done = subprocess.run(["bash", folder / "script.sh"], env={**os.environ, **environ}, timeout=60)
    assert done.returncode == (70 if variant == BASH and situation.attempt else STATUS)
    given = [(folder / name).read_text() for name in ("given", "env") if (folder / name).exists()]
    calls = [call for call in commands.calls()[before:] if not call.startswith("sleep")]
    return calls, given


@pytest.mark.long
@pytest.mark.parametrize("name", SITUATIONS)
def test_batch_functions_restart_job_as_python_does(name, commands, tmp_path):
    situation = SITUATIONS[name]
    played = {variant: play(variant, situation, tmp_path / variant, commands) for variant in (BASH, PYTHON)}
    for calls, _ in played.values():
        assert changes(calls) == situation.changes
    assert queries(played[BASH][0]) == queries(played[PYTHON][0])
    if not played[BASH][1]:
        assert not played[PYTHON][1]
        return
    texts = [given[0].rstrip() for _, given in played.values()]
    assert texts[0] == texts[1] == "#!/bin/bash\n#SBATCH --nodes=1\ntrue\n#SBATCH --hold", "the successor is not held"
    environments = [
        {line for line in given[1].splitlines() if line.partition("=")[0] not in SHELL_VARIABLES}
        for _, given in played.values()
    ]
    assert environments[0] == environments[1]
    assert {"OWN=with space", "SLURM_CONF=/etc/slurm.conf"} <= environments[0]
    names = ("FLIP_FOLLOWS", "FLIP_ATTEMPT", "FLIP_SNAPSHOT")
    follows = {line for line in environments[0] if line.startswith(names)}
    assert follows == ({f"FLIP_FOLLOWS={situation.attempt}"} if situation.attempt else set())
