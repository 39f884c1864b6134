import pytest

from flip.runs.rundir import RunDir, write_json


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    run.config.write_text("seed: 3\ncheckpoint: {url: 's3://key:secret@host/bucket'}\n")
    write_json(run.identity, {"hash": "abc", "schema": 2, "config": {}})
    return run
