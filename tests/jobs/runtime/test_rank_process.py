"""The rank process: exit codes and causes of ends that need no training."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flip.common.yaml_io import read_yaml
from flip.config import merge
from flip.config.identity import identity
from flip.data.manifest.manifest import Manifest
from flip.data.token_table import TokenTable
from flip.evaluation.datasets.prompts import read_prompts
from flip.runs.errors import CONFIG, CRASH, DATA, STORAGE, ConfigError, StorageError
from flip.runs.rundir import RunDir, write_json
from flip.tokenizer import Tokenizer
from jobs.runtime import rank_process
from tests.harness.training_run import configuration
from tests.synthetic import make_dataset, make_tokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    return run


def work(run, before=None, **env):
    """Run a rank process. The new process calls ``before`` before the rank process starts."""
    command = [sys.executable, "-m", "jobs.worker", str(run.path)]
    extra = {"FLIP_ATTEMPT": "1", "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **extra}, capture_output=True, text=True, timeout=120, preexec_fn=before
    )


def test_rank_process_exits_at_once_if_run_is_complete(run):
    write_json(run.result, {})
    done = work(run)
    assert done.returncode == 0 and run.causes(1) == []


def test_rank_process_refuses_code_other_than_snapshot(run, tmp_path):
    done = work(run, FLIP_SNAPSHOT=str(tmp_path))
    (cause,) = run.causes(1)
    assert done.returncode == CONFIG == cause["code"] and "snapshot" in cause["reason"]
    assert "Traceback" not in done.stderr


def test_rank_process_reports_config_error_without_traceback(run):
    run.config.write_text("schema: 99\n")
    done = work(run)
    assert done.returncode == CONFIG and "Traceback" not in done.stderr and "schema" in run.causes(1)[0]["reason"]


def test_rank_process_distinguishes_missing_data_from_replaced_data(run, tmp_path):
    data = make_dataset(tmp_path / "data", samples=40, shards=1, chunk=1)
    make_tokenizer(data / "tokenizer.json")
    config = configuration(data, world=1)
    run.config.write_text(merge.dump(config))
    write_json(run.identity, identity(config, "code"))
    data.rename(tmp_path / "kept")
    done = work(run)
    (cause,) = run.causes(1)
    # Missing data may be a missing file system of one node.
    assert done.returncode == STORAGE
    assert cause["cause"] == "storage"
    assert "data.manifest: " in cause["reason"] and "data.tokenizer: " in cause["reason"]
    shutil.rmtree(tmp_path / "kept")
    make_dataset(data, samples=40, shards=1, chunk=1, seed=5)
    make_tokenizer(data / "tokenizer.json")
    done = work(run, FLIP_ATTEMPT=str(run.start_attempt({})))
    (cause,) = run.causes(2)
    assert done.returncode == DATA and cause["cause"] == "data" and "data.manifest" in cause["reason"]


def test_rank_process_records_signal_received_before_handler_installation(run):
    """jobs/host/rank_entry.py blocks the signal until then. Unrecorded, a preemption would count as a lost node."""

    def block_and_send_signal():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)

    run.config.write_text("schema: 99\n")
    assert work(run, block_and_send_signal).returncode == CONFIG
    assert run.stop_requested(1) and run.causes(1)[0]["signal"] == "SIGTERM"


FAILS = """
import sys
from jobs.runtime import rank_process
def fail(*_):
    raise {error}
rank_process.exit_process(rank_process.main(sys.argv[1], fail))
"""


@pytest.mark.parametrize(
    "error, code", [("OSError(28, 'No space left')", STORAGE), ("DataError('x')", DATA), ("KeyError(3)", CRASH)]
)
def test_rank_process_preserves_cause_and_exit_code_if_log_disk_is_full(run, error, code):
    """The log is on the full disk. A failed print must not hide the cause."""
    program = FAILS.format(error=error).replace("import sys", "import sys\nfrom flip.runs.errors import DataError")
    environment = {**os.environ, "FLIP_ATTEMPT": "1", "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", program, str(run.path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=full, stderr=full, timeout=120)
    assert (done.returncode, [cause["code"] for cause in run.causes(1)]) == (code, [code])


@pytest.fixture
def open_folder():
    """A folder that other users can read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a rank as another user")
@pytest.mark.parametrize(
    "error, code", [("open(run / 'status.json', 'w')", STORAGE), ("{}[3]", STORAGE), ("raise ConfigError('x')", CONFIG)]
)
def test_rank_process_ends_with_storage_code_if_run_folder_is_read_only(open_folder, error, code):
    """Its cause cannot be written either. A crash would count as the run's fault; a configuration error stays one."""
    run = RunDir(open_folder / "run")
    run.start_attempt({})
    program = "import os, sys\nfrom pathlib import Path\nfrom flip.runs.errors import ConfigError\n"
    program += "from jobs.runtime import rank_process\nrun = Path(sys.argv[1])\nos.setuid(12345)\n"
    program += f"def fail(*_):\n    {error}\nrank_process.exit_process(rank_process.main(sys.argv[1], fail))"
    environment = {**os.environ, "FLIP_ATTEMPT": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(run.path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and run.causes(1) == [], done.stderr


@pytest.mark.parametrize(
    "error, cause",
    [(OSError(28, "No space left on device"), "storage"), (OSError(2, "No such file"), "crash"), (KeyError(3), "crash"),
     (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4"), "peer_lost")],
)  # fmt: skip
def test_rank_process_classifies_exceptions_by_cause(run, error, cause):
    from flip.common import shutdown

    def fail(*_):
        raise error

    actual, reason, trace = rank_process._run_work(fail, run, 1, shutdown.StopFlag())
    assert actual == cause and str(error.args[-1]) in reason and "Traceback" in trace


def test_record_end_writes_recent_collectives_for_hang(run):
    import torch
    from torch import distributed

    folder = run.open_logs(1)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        distributed.all_reduce(torch.ones(3))
        rank_process.record_end(run, 1, "hang", "no progress for 1200 s")
    finally:
        distributed.destroy_process_group()
    (cause,) = run.causes(1)
    assert (cause["cause"], cause["code"], cause["reason"]) == ("hang", 71, "no progress for 1200 s")
    names = [entry["profiling_name"] for entry in json.loads((folder / "collectives.0.json").read_text())["entries"]]
    assert names[-1] == "gloo:all_reduce"


BLOCKED = """
import ctypes, sys
from flip.runs.rundir import RunDir
from jobs.runtime import rank_process
rank_process.FLIGHT_RECORD_SECONDS = 0.2
rank_process.shutdown.flight_record = lambda: ctypes.PyDLL(None).sleep(60)  # keeps the interpreter
rank_process.record_end(RunDir(sys.argv[1]), 1, "hang", "no progress for 1200 s")
"""


def test_process_ends_if_flight_recorder_keeps_interpreter(run):
    run.open_logs(1)
    line = [sys.executable, "-c", BLOCKED, str(run.path)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert result.returncode == 1 and "Timeout" in result.stderr and run.causes(1)[0]["cause"] == "hang"


@pytest.mark.parametrize(
    "code, kind",
    [
        (errno.ESTALE, StorageError),
        (errno.EIO, StorageError),
        (errno.ENOTCONN, StorageError),
        (errno.ESHUTDOWN, StorageError),
        (errno.ELOOP, ConfigError),
    ],
)
def test_files_of_run_raise_storage_error_if_their_storage_fails(tmp_path, monkeypatch, code, kind):
    """The run is tried again after it, and not after errors of the configuration."""

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    manifest = make_dataset(tmp_path / "data", samples=8, shards=1)
    monkeypatch.setattr("flip.files.creation.os.open", fail)
    monkeypatch.setattr("builtins.open", fail)
    for read in (
        lambda: Tokenizer(tokenizer, 8, prepend_cls=False),
        lambda: TokenTable.read(str(tmp_path / "table.json"), str(tokenizer)),
        lambda: Manifest.load(manifest),
        lambda: read_yaml(tmp_path / "config.yaml"),
        lambda: read_prompts(str(tmp_path / "classes.json")),
    ):
        with pytest.raises(kind):
            read()
