"""Tests that a measurement names storage of high latency as such."""

import pytest

from jobs.measuring.functions import inputs
from jobs.measuring.verdicts import SLOW, WORKS, judge
from tests.jobs.measuring.test_verdicts import row
from tests.jobs.planning.test_measurement import example
from tests.s3.conftest import on_nanio

pytestmark = [pytest.mark.s3, pytest.mark.slow]


@on_nanio
def test_bucket_that_answers_late_has_a_high_latency(server, proxied, remote, tmp_path):
    proxy = proxied(server)
    proxy.plan((), 0)
    manifest = remote()
    verdicts = []
    for pace in (0.0, 0.3):
        proxy.pace = pace
        values = inputs.reads(str(tmp_path), str(manifest.folder), 1.0, 1)
        (judged,) = judge(example(row("reads", **values)))
        verdicts.append(judged)
    assert verdicts[0].verdict == WORKS, verdicts
    assert verdicts[1].verdict == SLOW and "high latency" in verdicts[1].because and "data.buffer" in verdicts[1].then
