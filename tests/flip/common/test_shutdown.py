"""Tests how training stops: signals, the supervisor pipe, cancels, agreement of ranks, hangs, and lost ranks."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flip.common import shutdown
from flip.common.shutdown import LIFELINE_VARIABLE, RunWatcher, StopFlag
from flip.runs.errors import CAUSES, HANG
from flip.runs.rundir import RunDir

SCRIPT = """
import os, signal, subprocess, sys
from flip.common import shutdown
flag = shutdown.install()
{body}
print(flag.reason)
"""


def run(body, **options):
    code = SCRIPT.format(body=body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_stop_flag_records_first_signal_and_process_continues(name):
    done = run(f"os.kill(os.getpid(), signal.{name})\nos.kill(os.getpid(), signal.SIGTERM)")
    assert (done.returncode, done.stdout.strip()) == (0, f"signal {name}")


@pytest.mark.parametrize("lifeline", [False, True])
def test_forkserver_start_loses_no_signal_and_server_ignores_signals(lifeline):
    """In production the lifeline has its own thread, to which the kernel may deliver a signal."""
    body = (
        "import threading, time, multiprocessing\n"
        "from multiprocessing import forkserver\n"
        "from flip import concurrency as pool\n"
        "start = pool.forkserver.ensure_running\n"
        "def hurt():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR2)\n"
        "    start()\n"
        "pool.forkserver.ensure_running = hurt\n"
        "pool.prepare_forkserver()\n"
        "server = forkserver._forkserver._forkserver_pid\n"
        "os.kill(server, signal.SIGTERM); os.kill(server, signal.SIGUSR2)\n"
        "time.sleep(0.5)\n"
        "assert os.waitpid(server, os.WNOHANG) == (0, 0)\n"
    )
    reader, writer = os.pipe()
    done = run(body, env={**os.environ, **({LIFELINE_VARIABLE: str(reader)} if lifeline else {})}, pass_fds=[reader])
    os.close(reader)
    os.close(writer)
    assert (done.returncode, done.stdout.strip() in ("signal SIGTERM", "signal SIGUSR2")) == (0, True), done.stderr


def test_stop_flag_is_set_when_supervisor_pipe_closes():
    reader, writer = os.pipe()
    body = "import time\nfor _ in range(200):\n    time.sleep(0.05)\n    if flag: break"
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body="print('up', flush=True)\n" + body)],
        env={**os.environ, LIFELINE_VARIABLE: str(reader)}, pass_fds=[reader], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(reader)
    assert child.stdout.readline() == "up\n"
    time.sleep(0.2)
    assert child.poll() is None
    os.close(writer)
    assert child.communicate(timeout=30)[0].strip() == "the supervisor is gone"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def watched(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    flag = StopFlag()
    is_set = threading.Event()
    flag.on_set(is_set.set)
    watcher = RunWatcher(run, run.start_attempt({}), flag, seconds=0.01)
    return run, flag, is_set, watcher


def test_run_watcher_sees_earlier_cancel_at_start(tmp_path):
    run, flag, _, watcher = watched(tmp_path)
    run.cancel.touch()
    watcher.start()
    watcher.close()
    assert flag.reason == "cancelled"


@pytest.mark.parametrize("what", ["cancelled", "superseded by a newer attempt"])
def test_run_watcher_sees_later_cancel_or_newer_attempt(tmp_path, what):
    run, flag, is_set, watcher = watched(tmp_path)
    watcher.start()
    assert not flag
    if what == "cancelled":
        run.cancel.touch()
    else:
        run.start_attempt({})
    assert is_set.wait(60) and flag.reason == what


def test_run_watcher_retries_after_file_system_error(tmp_path, caplog):
    """ENOTDIR simulates an outage: the folder of attempts disappears for a while and returns."""
    run, flag, is_set, watcher = watched(tmp_path)
    os.rename(run.attempts, run.path / "away")
    run.attempts.touch()
    watcher.start()
    assert not flag and "the run directory cannot be read" in caplog.text
    run.attempts.unlink()
    os.mkdir(run.path / "new")
    os.mkdir(run.path / "new" / "2")
    os.rename(run.path / "new", run.attempts)
    assert is_set.wait(60) and flag.reason == "superseded by a newer attempt"


AGREED = """
import sys
from torch import distributed
from flip.common.shutdown import CoordinatedStop
rank = int(sys.argv[2])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
agreement = CoordinatedStop(distributed.group.WORLD, 2)
later = CoordinatedStop(distributed.group.WORLD, 2)
print([agreement.poll_blocking(False), agreement.poll_blocking(rank == 1), *agreement.poll(False, False),
*later.poll(rank == 0, False), later.poll_blocking(False)], flush=True)
sys.stdin.read()
"""


def lines_of_two_ranks(script, store):
    """Returns the line that each rank prints. No rank ends before both have printed."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, store, str(rank)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    lines = [rank.stdout.readline().strip() for rank in ranks]
    for rank in ranks:
        rank.communicate(timeout=100)
    return lines


@pytest.mark.long
def test_coordinated_stop_reaches_all_ranks_now_or_at_next_poll(tmp_path):
    """``poll_blocking`` answers at once: a stop between two evaluation sets must not wait for the next set."""
    expected = "[False, True, True, False, False, False, True]"
    assert lines_of_two_ranks(AGREED, tmp_path / "store") == [expected] * 2


WITH_STATISTICS = """
import sys, torch
from torch import distributed
from flip.common.shutdown import CoordinatedStop
from flip.distributed.collectives import mean_over_ranks
rank = int(sys.argv[2])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
agreement, seen = CoordinatedStop(distributed.group.WORLD, 2, with_statistics=True), []
statistics = torch.tensor([0.1, 0.25]) * (rank + 1)
for step in range(8):
    seen.append(agreement.poll(rank == 1 and step >= 3, rank == 0 and step in (1, 2)))
    if any(seen[-1]):
        agreement.flush()
    if seen[-1][0]:
        break
    requests = agreement.requests(torch.device("cpu"))
    means = mean_over_ranks(statistics, 2, requests)
    assert torch.equal(means, mean_over_ranks(statistics, 2)) and torch.allclose(means, torch.tensor([0.15, 0.375]))
    agreement.submit(requests)
seen = ["none save stop both".split()[2 * stop + save] for stop, save in seen]
print(seen, agreement.poll_blocking(rank == 0), flush=True)
sys.stdin.read()
"""


@pytest.mark.long
def test_coordinated_stop_sends_requests_with_statistics_and_saves_once(tmp_path):
    """Rank 0 requests a save in steps 1 and 2, rank 1 a stop from step 3 on. Ranks read a request two steps later."""
    agreed = "['none', 'none', 'none', 'save', 'none', 'stop'] True"
    assert lines_of_two_ranks(WITH_STATISTICS, tmp_path / "store") == [agreed] * 2


HANGING = """
import sys, threading, time
from flip.common.shutdown import Watchdog
dog = Watchdog({seconds}, lambda cause, what: print(cause, what, flush=True))
def waits_for_nobody():
    threading.Event().wait(60)
for _ in range(150):  # longer than the limit
    dog.heartbeat("a step from S = 7", {times})
    time.sleep(0.01)
{end}
"""


class Pauses:
    """Stands in for the event of a watchdog: each wait takes as long as the next number says."""

    def __init__(self, clock, seconds):
        self.clock = clock
        self.seconds = seconds

    def wait(self, _):
        if not self.seconds:
            return True
        self.clock[0] += self.seconds.pop(0)
        return False


@pytest.mark.parametrize("naps, ends", [([1.0, 3600.0, 1.0, 1.0], False), ([1.0] * 62, True)])
def test_watchdog_does_not_count_time_in_which_its_process_was_stopped(monkeypatch, naps, ends):
    """As in a job that Slurm suspends for an hour."""
    clock = [1000.0]
    monkeypatch.setattr(shutdown.time, "monotonic", lambda: clock[0])
    dog = shutdown.Watchdog(0, lambda *_: None)
    dog._seconds = 60.0
    dog.heartbeat("a step")
    dog._closed = Pauses(clock, naps)
    monkeypatch.setattr(shutdown.faulthandler, "dump_traceback", lambda **_: None)
    codes = []
    monkeypatch.setattr(shutdown.os, "_exit", codes.append)
    dog._watch()
    assert codes == [71] * ends


def run_watched(seconds, end, times=1.0):
    script = HANGING.format(seconds=seconds, end=end, times=times)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


@pytest.mark.long
def test_watchdog_ends_process_without_heartbeats():
    ended = run_watched(1.0, "dog.heartbeat('a step from S = 7'); waits_for_nobody()", times=60)
    assert ended.returncode == HANG == 71
    assert ended.stdout.startswith("hang no progress for ") and "a step from S = 7" in ended.stdout
    assert "in waits_for_nobody" in ended.stderr


@pytest.mark.long
def test_watchdog_ends_process_if_its_callback_fails():
    ended = run_watched(1.0, "dog._on_end = None; dog.heartbeat('the last'); waits_for_nobody()", times=60)
    assert ended.returncode == HANG and "in waits_for_nobody" in ended.stderr


@pytest.mark.long
def test_watchdog_ends_process_that_connects_for_too_long_and_names_step():
    """The limit of connecting is short however long the limit before it is, which returns at the end of the step."""
    slow = "from flip.common import shutdown; shutdown.CONNECT_SECONDS = 0.2\n"
    step = "with dog.connecting('connecting the group of saves'):"
    ended = run_watched(600.0, f"{slow}{step} waits_for_nobody()")
    assert ended.returncode == HANG and "connecting the group of saves" in ended.stdout
    assert run_watched(600.0, f"{slow}{step} pass\ntime.sleep(1.5); sys.exit(3)").returncode == 3


@pytest.mark.long
def test_watchdog_spares_process_if_closed_disabled_or_given_longer_limit():
    assert run_watched(1.0, "dog.heartbeat('the last'); dog.close(); time.sleep(1.5); sys.exit(3)", 60).returncode == 3
    assert run_watched(1.0, "time.sleep(1.5); sys.exit(3)", times=60).returncode == 3
    assert run_watched(0, "time.sleep(1.5); sys.exit(3)").returncode == 3


WATCHED = """
import os, signal, sys, threading
from torch import distributed
from flip.common.shutdown import PeerWatcher
rank = int(sys.argv[2])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=4)
peers = PeerWatcher(distributed.group.WORLD, rank, 4, lambda cause, what: print(cause, what, flush=True), seconds=0.1)
distributed.barrier()
print("up", flush=True)
command = sys.stdin.readline()
if command == "leave\\n":
    peers.close()
    os._exit(3)
if command == "close\\n":
    peers.close()
    print("closed", flush=True)
    [thread.join() for thread in threading.enumerate() if thread.name == "peer-watcher"]
    os._exit(3)
threading.Event().wait()
"""


@pytest.fixture
def watched_ranks(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WATCHED, tmp_path / "store", str(rank)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )
        for rank in range(4)
    ]  # fmt: skip
    assert [rank.stdout.readline() for rank in ranks] == ["up\n"] * 4
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.communicate()


@pytest.mark.long
def test_peer_watcher_ends_all_ranks_if_a_rank_dies(watched_ranks):
    watched_ranks[2].kill()
    ends = {n: (rank.communicate(timeout=100)[0], rank.returncode) for n, rank in enumerate(watched_ranks) if n != 2}
    assert {code for _, code in ends.values()} == {CAUSES["peer_lost"]} == {70}
    assert ends[1][0].startswith("peer_lost rank 2 has ended: ")
    assert [ends[n][0] for n in (0, 3)] == ["peer_lost another rank has ended\n"] * 2


@pytest.mark.long
def test_peer_watcher_ignores_ranks_that_close(watched_ranks):
    for rank in reversed(watched_ranks):
        assert rank.poll() is None
        rank.stdin.write("close\n")
    ends = [(rank.communicate(timeout=100)[0], rank.returncode) for rank in watched_ranks]
    assert ends == [("closed\n", 3)] * 4


@pytest.mark.long
def test_peer_watcher_closes_though_ranks_have_ended(watched_ranks):
    """Rank 2 tells rank 1 of its end, whose process is gone; and so on. As at the end of a run."""
    for number in (1, 2, 3, 0):
        watched_ranks[number].stdin.write("leave\n")
        assert watched_ranks[number].wait(100) == 3
