"""Tests of the count of failed starts in the comment of a job, with stub commands on PATH."""

import pytest

from jobs.host import failed_starts, slurm_cli
from tests.jobs.host.scontrol_answers import show


@pytest.mark.parametrize(
    "comment, mark",
    [("away:3:6:12:127:n1", (3, 12, 127, "n1")), ("away:3:5:12:69:", (0, 12, 69, "")), ("away:3:6:12", (3, 12, 0, "")),
     ("mine", (0, 0, 0, "")), ("away:3:6:12:x", (0, 0, 0, "")), ("(null)", (0, 0, 0, ""))],
)  # fmt: skip
def test_failed_starts_are_passed_on_in_job_comment(commands, comment, mark):
    commands("scontrol", show() + f"\necho '   AdminComment=x Comment={comment} '")
    fields = slurm_cli.fields_of(slurm_cli.call("scontrol", "show", "job", "57_3"))
    assert failed_starts.before(fields, 7) == mark
    failed_starts.record_failed_starts("57_3", 7, failed_starts.FailedStarts(4, 12, 127, "n1"))
    assert commands.calls()[-1] == "scontrol update JobId=57_3 Comment=away:4:7:12:127:n1"
