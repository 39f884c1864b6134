"""Tests of the request of an evaluation job."""

import pytest

from flip.config.schema import Compute
from flip.evaluation.request import EvaluationRequest
from flip.monitoring.results import read_run
from flip.runs.errors import ConfigError, DataError
from flip.runs.formats import FormatError
from flip.runs.rundir import RunDir, read_json, write_json
from flip.runs.side_jobs import REQUEST

COMPUTE = Compute(device="cpu", precision="bf16", attention="explicit", threads=3, deterministic="yes")


@pytest.fixture
def job(tmp_path):
    run = RunDir(tmp_path / "sweep" / ".evaluate" / "run-1126-0000")
    run.path.mkdir(parents=True)
    return run


def request(**fields):
    sets = ({"name": "pets", "task": "", "path": "/data", "templates": ""},)
    views = (("0", False), ("0.5", True))
    return EvaluationRequest("/runs/sweep/run", COMPUTE, commits=("a/8-1",), sets=sets, views=views, **fields)


def test_request_is_the_whole_configuration_of_a_job(job):
    written = request(cost=1.5, deadline=7.0, timeout=3.0, hang_minutes=9.0)
    written.write(job)
    assert EvaluationRequest.read(job) == written
    assert not job.config.exists()
    outcome = read_run(job.path)
    assert (outcome.state, outcome.damage, outcome.settings) == ("stopped", [], {})


def test_damaged_request_is_refused(job):
    with pytest.raises(ConfigError, match=r"task\.json is missing"):
        EvaluationRequest.read(job)
    for change in ({"compute": {"unknown": 1}}, {"views": 3}, {"unknown": 1}):
        request().write(job)
        write_json(job.path / REQUEST, {**read_json(job.path / REQUEST), **change})
        with pytest.raises(DataError, match="no request of an evaluation"):
            EvaluationRequest.read(job)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"schema": 0}, "schema: an older version wrote this format"),
        ({"schema": 2}, "schema: a newer version wrote this format"),
        ({"schema": None}, "schema: states no format"),
        ({"compute": None}, "lacks `compute`"),
        ({"views": None}, "lacks `views`"),
    ],
)
def test_request_of_another_version_or_a_part_of_one_is_refused(job, change, words):
    request().write(job)
    record = {**read_json(job.path / REQUEST), **change}
    write_json(job.path / REQUEST, {name: value for name, value in record.items() if value is not None})
    with pytest.raises(FormatError, match=words) as error:
        EvaluationRequest.read(job)
    assert error.value.code == 78 and "flip evaluate" in error.value.remedy
