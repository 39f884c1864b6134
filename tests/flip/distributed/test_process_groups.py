"""Tests of the process groups: how ranks find each other, over which interface, and how long they wait."""

import contextlib
import datetime
import os

import pytest
import torch
from torch import distributed
from torch.distributed import distributed_c10d

from flip.distributed import parallel
from tests.harness.ranks import run_ranks
from tests.harness.sharded_models import compute, launch


def connected(rank, size, store):
    """Start with copies of the weights; return the steps with a short limit, and the timeouts of all groups."""
    steps = []

    @contextlib.contextmanager
    def connecting(what):
        steps.append(what)
        yield

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), FLIP_STORE=store)
    world = parallel.start(compute(), 30.0, connecting=connecting)
    parallel._mesh(world, 2)
    groups = [*distributed_c10d._world.pg_map]
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    parallel.stop()
    return steps, sorted(timeouts), world.timeout


@pytest.mark.long
def test_every_group_is_connected_within_short_limit_and_has_timeout_of_world(tmp_path):
    """A group with another timeout would end a step that is slow, before the watchdog names it."""
    results = run_ranks(connected, 4, 4, str(tmp_path / "store"))
    for steps, timeouts, timeout in results:
        assert timeouts == [timeout, 6 * timeout] == [datetime.timedelta(minutes=35), datetime.timedelta(minutes=210)]
        ends = [step.rpartition(" group")[2] for step in steps]
        assert ends[:3] == [" of training", " of flags and counts", " of saves"]
        assert ends[3:] == ["s of copies of the weights", "s of shards of the weights"]


def test_timeout_of_collectives_covers_compilation():
    assert parallel.collective_timeout(2.0) == datetime.timedelta(minutes=25)


@pytest.mark.parametrize("hang_minutes, minutes", [(20.0, 25.0), (0.0, 1445.0)])
def test_collectives_wait_longer_than_watchdog_and_longest_read(hang_minutes, minutes):
    world = parallel.start(compute(), hang_minutes)
    parallel.stop()
    assert world.timeout == datetime.timedelta(minutes=minutes)


def test_nccl_monitor_waits_longer_than_watchdog_unless_user_chose(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "60")  # restored after the test
    parallel.delay_nccl_monitor(datetime.timedelta(minutes=25))
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "60"
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")
    parallel.delay_nccl_monitor(datetime.timedelta(minutes=25))
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "1500"


def test_stay_on_loopback_keeps_interface_set_by_user(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")  # restored after the test
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    parallel.stay_on_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0" and os.environ["NCCL_SOCKET_IFNAME"].startswith("=lo")


@pytest.mark.parametrize(
    "given", [{"LOCAL_WORLD_SIZE": "1"}, {}, {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}]
)
def test_open_store_is_that_of_torch_for_several_hosts_and_torchrun(given, monkeypatch):
    store = distributed.HashStore()
    monkeypatch.setattr(distributed, "rendezvous", lambda url, rank, size, timeout: iter([(store, rank, size)]))
    for name in ("FLIP_STORE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert parallel.open_store(1, 2, datetime.timedelta(seconds=1)) is store
    assert store.timeout == datetime.timedelta(seconds=1)


def test_start_turns_tf32_off():
    torch.set_float32_matmul_precision("high")
    try:
        assert launch(1, [compute()], lambda *_: torch.get_float32_matmul_precision()) == ["highest"]
    finally:
        torch.set_float32_matmul_precision("highest")
