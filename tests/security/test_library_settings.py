"""Tests that settings of libraries in the current folder, which may belong to another user, are not read.

Mallory prepares the folder; Alice runs the real command in it.
"""

import ast
import importlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.jobs.outcomes import make
from tests.security.users import ROOT

pytestmark = pytest.mark.long

SECRET = "0123456789abcdef0123456789abcdef01234567"  # noqa: S105  of no account
READERS = {
    "matplotlib": {"jobs/pages/charts.py"},
    "pdb": {"jobs/commands/debug.py"},
    "wandb": {"jobs/tracking/wandb_tracker.py"},
}
"""Library that reads settings in the current folder -> the files that import it, whose callers leave the folder."""


@pytest.fixture
def place(users):
    """A folder of Mallory's, which Alice can read."""
    with users.mallory.acts():
        folder = users.shared / "hers"
        folder.mkdir()
    return folder


def own_run(alice):
    """A complete run of Alice's with curves."""
    with alice.acts():
        return make(alice.home / "runs" / "demo", "run")


def test_pipe_in_place_of_matplotlibrc_does_not_stop_report(users, place):
    alice = users.alice
    run = own_run(alice)
    with users.mallory.acts():
        os.mkfifo(place / "matplotlibrc")
    done = alice.python("jobs", "report", "demo", cwd=place, FLIP_RUNS=run.path.parent.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    page = run.path.parent / "report.html"
    assert "<svg" in page.read_text(), "it has charts"


def test_report_writes_to_relative_path_of_the_current_folder(users):
    """Charts are drawn outside of it."""
    alice = users.alice
    run = own_run(alice)
    words = ["report", "demo", "--folder", "pages", "--out", "page.html"]
    done = alice.python("jobs", *words, cwd=alice.home, FLIP_RUNS=run.path.parent.parent)
    assert done.returncode == 0, done.stderr
    assert (alice.home / "page.html").exists() and (alice.home / "pages" / "report.html").exists()


class Listener(ThreadingHTTPServer):
    """A server of Mallory's on loopback that records the headers of all requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Recorder)
        self.requests = []


class _Recorder(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self):
        self.server.requests.append(str(self.headers))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def listener():
    server = Listener()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.timeout(180)
def test_follow_takes_no_address_of_wandb_from_current_folder(users, place, listener):
    pytest.importorskip("wandb")
    alice = users.alice
    run = own_run(alice)
    closed = "http://127.0.0.1:9"  # the discard port, on which nothing listens
    with users.mallory.acts():
        for name in ("wandb", ".wandb"):
            (place / name).mkdir()
            (place / name / "settings").write_text(f"[default]\nbase_url = http://127.0.0.1:{listener.server_port}\n")
    with alice.acts():
        (alice.home / ".config" / "wandb").mkdir(parents=True)
        (alice.home / ".config" / "wandb" / "settings").write_text(f"[default]\nbase_url = {closed}\n")
    done = alice.python(
        "jobs", "follow", "demo", "--once", "--project", "clip", cwd=place, FLIP_RUNS=run.path.parent.parent,
        WANDB_API_KEY=SECRET, WANDB_INIT_TIMEOUT=8, timeout=120,
    )  # fmt: skip
    assert not listener.requests, listener.requests
    assert done.returncode in (69, 78), done.stderr
    assert "wandb" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.timeout(180)
def test_pipe_in_place_of_defaults_of_wandb_does_not_stop_follow(users, place):
    pytest.importorskip("wandb")
    alice = users.alice
    run = own_run(alice)
    with users.mallory.acts():
        os.mkfifo(place / "config-defaults.yaml")
    words = ["follow", "demo", "--once", "--project", "clip"]
    runs = run.path.parent.parent
    done = alice.python("jobs", *words, cwd=place, FLIP_RUNS=runs, WANDB_MODE="offline", timeout=60)
    assert done.returncode == 0 and "up to date" in done.stdout, done.stderr


CALLBACK = """
class Stops:
    every = 1

    def step(self, view):
        breakpoint()
"""


@pytest.mark.timeout(180)
def test_debugger_executes_no_pdbrc_of_current_folder(users, desk, place):
    """Alice's own ``~/.pdbrc`` is executed."""
    alice = users.alice
    with users.mallory.acts():
        (place / ".pdbrc").write_text("import os; open(os.environ['HOME'] + '/executed', 'w').close()\n")
    with alice.acts():
        (alice.home / ".pdbrc").write_text("import os; open(os.environ['HOME'] + '/own', 'w').close()\n")
        (alice.home / "stops.py").write_text(CALLBACK)
        (alice.home / "demo.yaml").write_text(desk.sweep.read_text())
    done = alice.python(
        "jobs", "debug", alice.home / "demo.yaml", "--run", "half", "--out", alice.home,
        "monitor.callbacks=[stops.py:Stops]", cwd=place, FLIP_RUNS=alice.home / "runs", timeout=120,
    )  # fmt: skip
    assert not (alice.home / "executed").exists(), done.stderr
    assert (alice.home / "own").exists(), (done.stdout, done.stderr)


def test_only_known_files_import_libraries_that_read_the_current_folder():
    importers = {name: set() for name in READERS}
    for path in (path for folder in ("flip", "jobs", "tools", "lab") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in {name.partition(".")[0] for name in names} & READERS.keys():
                importers[name].add(path.relative_to(ROOT).as_posix())
    assert importers == READERS


def test_outside_returns_to_the_folder_also_after_an_error(tmp_path, monkeypatch):
    current_folder = importlib.import_module("flip.files.current_folder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a problem"), current_folder.outside():
        assert os.getcwd() == "/"
        raise ValueError("a problem")
    assert os.getcwd() == str(tmp_path)
