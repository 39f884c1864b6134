"""What srun says of nodes that could not start a rank."""

import pytest

from jobs.host import bad_nodes

LOST = "srun: error: n2: task 1: Exited with exit code 2\n"


def found(tmp_path, text, among=4):
    (tmp_path / "job.err").write_text(text)
    return bad_nodes.unstartable_nodes(str(tmp_path / "job.err"), among)


@pytest.mark.parametrize("code", bad_nodes.UNSTARTED_CODES)
def test_it_is_named(tmp_path, code):
    text = f"x\nsrun: error: n-2.site: tasks 4-5,7: Exited with exit code {code}\nsrun: error: n1: task 0: Killed\n"
    assert found(tmp_path, text) == ["n-2.site"]


@pytest.mark.parametrize("code", [1, 12, 65, 70, 75, 78, 137, 143])
def test_other_ends_are_the_ranks_own(tmp_path, code):
    assert found(tmp_path, f"srun: error: n2: task 1: Exited with exit code {code}\n") == []


def test_most_of_the_nodes_are_not_left_out(tmp_path):
    three = LOST + LOST.replace("n2", "n3") + LOST.replace("n2", "n4")
    assert found(tmp_path, three, 6) == ["n2", "n3", "n4"] and found(tmp_path, three, 5) == []
    assert found(tmp_path, LOST, 2) == ["n2"] and found(tmp_path, LOST, 1) == []


def test_a_log_that_is_not_there_or_long(tmp_path):
    assert bad_nodes.unstartable_nodes(str(tmp_path / "nothing"), 4) == []
    assert found(tmp_path, LOST + "x" * bad_nodes.TAIL_BYTES) == [] and found(
        tmp_path, "x" * bad_nodes.TAIL_BYTES + "\n" + LOST
    )
