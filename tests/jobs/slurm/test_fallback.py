"""Tests of jobs/slurm/fallback.sh, the way of a job from a broken node back to the queue, with stand-ins for Slurm.

tests/slurm/test_fallback.py does it on a real Slurm.
"""

import pytest

from flip.runs.next_step import MAX_FAILED_STARTS
from jobs.host.failed_starts import FailedStarts, parse_failed_starts
from jobs.host.slurm_cli import fields_of

SHOWN = """JobId=58 ArrayJobId=57 ArrayTaskId=1 JobName=demo
   JobState={state} Reason=None
   Restarts={restarts} BatchFlag=1
   ReqNodeList=(null) ExcNodeList=(null)
   AdminComment=away:3:6:9:1:n9 {comment}
   StdErr=/dev/null"""
DISABLED = 'echo "57_1: Requested operation is presently disabled." >&2; exit 1'


@pytest.fixture
def fail(owned, tmp_path):
    """``fail(...)`` lets a start fail with exit code 127 on n7; returns the calls that change something.

    ``comment``: field of the job. ``state``: of the job. ``requeue``, ``hostnames``: what these verbs of scontrol do.
    """

    def fail(comment="", state="RUNNING", requeue="true", hostnames="echo $3 | tr , '\\n'", restarts=0, **env):
        (tmp_path / "shown").write_text(SHOWN.format(state=state, restarts=restarts, comment=comment))
        show = f"case $2 in job) cat {tmp_path}/shown;; hostnames) {hostnames};; esac"
        update = f'case $3 in Comment=*) sed -i "s/ Comment=.*/ $3/" {tmp_path}/shown;; esac'
        owned.commands("scontrol", f"case $1 in show) {show};; update) {update};; requeue) {requeue};; esac")
        owned.commands("sleep", "")
        assert owned.start("elsewhere", "127", SLURM_RESTART_COUNT=str(restarts or ""), **env).wait(60) == 127
        return [call for call in owned.commands.calls() if call.startswith(("scontrol update", "scontrol requeue"))]

    return fail


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "Comment=(null)",
        "Comment=away:1:6:0:127:n3",
        "Comment=away:1:6:0",
        "Comment=away:12:6:5:1:n3",
        "Comment=away:12:6:5:1:",
        "Comment=away:12:7:5:1:n3",
        "Comment=away:12:5:5:1:n3",
        "Comment=away:12:-1:5:1:n3",
        "Comment=away:99:6:5:1:n3",
        "Comment=away:12:6:5:1",
        "Comment=away:12:6:5:1:n3:x",
        "Comment=away:12:6:5:1:n3|x",
        "Comment=away:12:6:5x",
        "Comment=away:1234567890:6:5",
        "Comment=away:x:6:5",
        "Comment=far away:12:6:5",
        "Comment=sweep 7",
    ],
)
@pytest.mark.parametrize("restarts", [0, 7])
def test_failed_start_is_counted_as_python_reads_it(fail, comment, restarts):
    """A preemption or a good start sets the number to zero: the comment is then not of the start before this one.

    The attempt whose end could not be written stays in it.
    """
    writer, failed = parse_failed_starts(fields_of(f"   {comment} x=y").get("Comment", ""))
    starts = failed.starts if writer == restarts - 1 else 0
    changes = fail(comment=comment, restarts=restarts)
    after = FailedStarts(starts + 1, failed.attempt, 127, "n7").comment(restarts)
    delay = f"StartTime=now+{60 * starts} " if starts else ""
    assert changes == [
        f"scontrol update JobId=57_1 Comment={after}",
        "scontrol requeue 57_1",
        f"scontrol update JobId=57_1 {delay}ExcNodeList=n7",
    ]


@pytest.mark.parametrize("starts, again", [(MAX_FAILED_STARTS - 1, True), (MAX_FAILED_STARTS, False)])
def test_number_of_failed_starts_is_limited(fail, starts, again):
    changes = fail(f"Comment=away:{starts}:6:0:127:n3", restarts=7)
    assert len(changes) == (3 if again else 0)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "TIMEOUT"])
def test_job_that_slurm_does_not_run_is_left_alone(fail, state):
    assert fail(state=state) == []


@pytest.mark.parametrize(
    "nodes, exclude, excluded",
    [
        ("n7|idle n8|idle", "", "n7"),
        ("n7|idle", "", ""),
        ("n7|mixed n8|drained n9|down*", "", ""),
        ("n7|idle n8|idle", "n8", ""),
        ("n7|idle n7|idle n8|allocated n8|allocated", "n9", "n9,n7"),
        ("n6|idle n7|idle n8|idle n9|idle", "n9,n8", "n9,n8,n7"),
    ],
)
def test_node_is_excluded_beside_those_of_profile_if_another_node_works(fail, owned, nodes, exclude, excluded):
    """The nodes of earlier failed starts are not: an outage must not exclude all."""
    if exclude:
        owned.write(options={"exclude": exclude})
    owned.commands("sinfo", f"echo '{nodes}' | tr ' ' '\\n'")
    updates = [call for call in fail() if "ExcNodeList" in call]
    assert updates == ([f"scontrol update JobId=57_1 ExcNodeList={excluded}"] if excluded else [])


def test_nodes_of_several_partitions_count_once(fail, owned):
    """sinfo has a line per node and partition."""
    owned.commands("sinfo", "printf 'n%s|idle\\n' 7 7 8 8")
    assert not [call for call in fail(SLURM_JOB_NUM_NODES="2") if "ExcNodeList" in call]


@pytest.mark.parametrize("silent", ["sinfo", "hostnames"])
def test_no_node_is_excluded_if_slurm_does_not_list_the_nodes(fail, owned, silent):
    hostnames = "echo $3"
    if silent == "sinfo":
        owned.commands("sinfo", "exit 1")
    else:
        hostnames = "exit 1"
    changes = fail("Comment=away:2:-1:0:127:n3", hostnames=hostnames)
    assert changes[-1] == "scontrol update JobId=57_1 StartTime=now+120"


def test_no_node_is_excluded_if_profile_names_a_file_of_nodes(fail, owned):
    """A real Slurm accepts the path as the name of a node; the nodes in the file would no longer be excluded."""
    owned.write(options={"exclude": "/shared/nodes"})
    assert not [call for call in fail() if "ExcNodeList" in call]


def test_requeue_waits_while_slurm_does_not_answer(fail, owned, tmp_path):
    """A node that is cut off reaches neither files nor the controller until its network is back."""
    count = f'n=$(cat {tmp_path}/n 2>/dev/null); echo "1$n" > {tmp_path}/n'
    refuse = count + "; [ ${#n} -ge 5 ] || { echo no >&2; exit 1; }"
    changes = fail("Comment=away:2:-1:0:127:n3", requeue=refuse)
    assert changes.count("scontrol requeue 57_1") == 6
    assert {call for call in changes if "Comment" in call} == {"scontrol update JobId=57_1 Comment=away:3:0:0:127:n7"}
    assert changes[-1] == "scontrol update JobId=57_1 StartTime=now+120 ExcNodeList=n7"


@pytest.mark.parametrize("requeue, requeues", [(DISABLED, 1), ("exit 1", 20)])
def test_start_ends_if_slurm_refuses_the_requeue(fail, requeue, requeues):
    changes = fail(requeue=requeue)
    assert changes.count("scontrol requeue 57_1") == requeues
    assert not [call for call in changes if "ExcNodeList" in call]


def test_start_waits_half_a_day_for_slurm(owned):
    owned.commands("scontrol", "exit 1")
    owned.commands("sleep", "")
    assert owned.start("elsewhere", "2").wait(100) == 2
    waits = owned.commands.calls().count("sleep 30")
    assert 30 * waits == pytest.approx(12 * 3600, rel=0.01)
