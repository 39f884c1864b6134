"""``tensorboard`` shows runs by name, adds later runs, and removes its scratch folder."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from flip.runs.rundir import RunDir
from jobs.commands import tensorboard
from jobs.commands.tensorboard import RunLinks
from tests.harness.common import free_port
from tests.jobs.outcomes import make

ROOT = Path(__file__).resolve().parents[3]


def events(run, value, tag="batch/loss"):
    """Write a scalar to an event file, as the trainer's writer does, but without torch."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(run.tensorboard))
    for step in (1, 2, 3):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value / step)])
        writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
    writer.close()


def test_add_links_new_runs_under_unique_names(tmp_path):
    runs = [make(tmp_path / "one", name) for name in ("a", "b")]
    for run in runs[:1]:
        run.tensorboard.mkdir()
    folder = tmp_path / "links"
    folder.mkdir()
    links = RunLinks(folder)
    assert links.add(runs) == ["one/a"] and (folder / "one" / "a").resolve() == runs[0].tensorboard
    runs[1].tensorboard.mkdir()
    other = RunDir(tmp_path / "a" / "a")
    other.tensorboard.mkdir(parents=True)
    assert links.add([*runs, other]) == ["one/b", "a/a"], "only runs that started since the last call"
    assert not list(runs[0].tensorboard.iterdir()), "the sweep has the name of a run"
    elsewhere = make(tmp_path / "cluster" / "one", "a")
    elsewhere.tensorboard.mkdir()
    (name,) = links.add([*runs, elsewhere])
    assert name.startswith("one@") and name.endswith("cluster/a"), "a run of the same name in another root"


@pytest.mark.long
@pytest.mark.timeout(180)
def test_tensorboard_command_serves_sweep_and_removes_scratch_folder(tmp_path):
    for name, value in (("mask50", 3.0), ("clip", 4.0)):
        events(make(tmp_path / "runs" / "demo", name), value)
    port = free_port()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    argv = ["demo", "--root", str(tmp_path / "runs"), "--", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    command = [sys.executable, str(ROOT / "jobs"), "tensorboard", *argv]
    log = tmp_path / "out"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        runs = _until(f"http://127.0.0.1:{port}/data/runs", lambda runs: len(runs) == 2)
        assert sorted(runs) == ["demo/clip", "demo/mask50"]
        url = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"
        assert "batch/loss" in str(_until(url, lambda tags: "demo/mask50" in tags))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert list(scratch.glob("flip-tensorboard-*")) == []
    shown = log.read_text()
    assert shown.index("every user of this machine can read these runs") < shown.index(f":{port}/")


def _until(url, condition):
    limit = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                content = json.load(answer)
            if condition(content):
                return content
        except (OSError, ValueError):
            pass
        assert time.monotonic() < limit, url
        time.sleep(0.3)


def test_ctrl_c_while_tensorboard_imports_ends_it_without_traceback(tmp_path):
    """The child that stands for TensorBoard sends the signal to its process group, as a terminal does."""
    make(tmp_path / "runs" / "demo", "mask50")
    scratch = tmp_path / "scratch"
    module = tmp_path / "code" / "tensorboard" / "main.py"
    for folder in (scratch, module.parent):
        folder.mkdir(parents=True)
    (module.parent / "__init__.py").write_text("")
    module.write_text("import os, signal, time\nos.killpg(0, signal.SIGINT)\ntime.sleep(60)\n")
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = sys.argv[1:]\n"
    start += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    argv = ["-c", start, str(ROOT / "jobs"), "tensorboard", "demo", "--root", str(tmp_path / "runs")]
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(tmp_path / "code")}
    process = subprocess.run(
        [sys.executable, *argv], env=environment, capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert (process.returncode, process.stderr) == (130, "interrupted\n")
    assert list(scratch.glob("flip-tensorboard-*")) == []


def test_option_of_tensorboard_before_the_dashes_is_named(capsys):
    with pytest.raises(SystemExit) as raised:
        tensorboard.main(["demo", "--port", "7007"])
    assert raised.value.code == 2
    assert "options of TensorBoard follow after --: flip tensorboard -- --port" in capsys.readouterr().err


def test_tensorboard_command_refuses_unknown_sweep(tmp_path):
    command = [sys.executable, str(ROOT / "jobs"), "tensorboard", "absent", "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 78 and "no such sweep" in done.stderr
