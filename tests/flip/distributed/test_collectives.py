"""Tests the collectives that send values and errors between ranks as JSON, never as pickles."""

import errno
import math
import struct

import pytest
from torch import distributed
from torch.distributed import distributed_c10d

from flip.distributed.collectives import DAMAGED, ERRORS, all_gather_json, broadcast_json, run_on_all, run_on_first
from flip.runs import errors
from flip.runs.checkpoint_folder import CorruptCheckpoint
from flip.runs.errors import ConfigError, FlipError, PeerLost, StorageError
from tests.harness.ranks import run_ranks

EXACT = [
    None,
    True,
    0,
    -1,
    1 << 80,
    "",
    "a\nb",
    "\udc80",
    "é" * 9,
    [],
    {},
    {"a": [{"b": None}]},
    0.1,
    -0.0,
    5e-324,
    1e308,
]


@pytest.mark.parametrize("value", [*EXACT, math.inf, -math.inf], ids=repr)
def test_collectives_preserve_json_values_exactly(value):
    for received in (broadcast_json(value, None), *all_gather_json(value, None), run_on_first(lambda: value, None)):
        assert received == value and type(received) is type(value)
        if isinstance(value, float):
            assert struct.pack("d", received) == struct.pack("d", value)
    assert math.isnan(broadcast_json(math.nan, None))


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), ConfigError], ids=["bytes", "set", "object", "class"])
def test_broadcast_json_rejects_values_outside_json(value):
    with pytest.raises(TypeError, match="not JSON serializable"):
        broadcast_json(value, None)


@pytest.mark.parametrize(
    ("error", "cause", "kind"),
    [
        (OSError(errno.ENOSPC, "no space"), "storage", StorageError),
        (CorruptCheckpoint("a byte"), DAMAGED, StorageError),
        (ConfigError("a key"), "config", ConfigError),
    ],
)
def test_run_on_all_returns_failure_of_rank(error, cause, kind):
    def fail():
        raise error

    failure = run_on_all(fail, None)
    assert (failure.cause, failure.error_class) == (cause, kind) and failure.is_transient == (cause != "config")
    assert run_on_all(lambda: None, None) is None


def test_error_table_covers_every_error_class():
    known = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FlipError)}
    assert set(ERRORS.values()) == known


class Narrower(ConfigError):
    """An error class that the table ERRORS lacks."""


class Opaque:
    def __repr__(self):
        return "<opaque>"


def fails(error):
    def function():
        raise error

    return function


def work(rank, group):
    """Runs all collectives and returns the results that this rank sees."""
    seen = {}
    seen["first"] = broadcast_json({"rank": rank, "text": "x" * 70000} if rank == 0 else None, group)
    seen["all"] = all_gather_json(["y" * rank * 1000, rank / 3], group)
    called = []
    seen["run"] = run_on_first(lambda: called.append(rank) or 7, group)
    seen["called"] = called
    for name, error in {
        "known": Narrower("not so", "here", Opaque(), "Do this."),
        "plain": errors.Diverged("lost"),
        "other": KeyError("k"),
    }.items():
        try:
            run_on_first(fails(error), group)
        except Exception as found:
            seen[name] = [type(found).__name__, str(found)]
    return seen


def rank_main(rank, folder):
    distributed_c10d._unpickler = None  # any unpickling fails
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    group = distributed.new_group(backend="gloo")
    seen = work(rank, group)
    distributed.barrier(group)
    return seen


@pytest.mark.long
def test_collectives_agree_across_two_ranks_without_pickle(tmp_path):
    for rank, seen in enumerate(run_ranks(rank_main, 2, tmp_path)):
        assert seen["first"] == {"rank": 0, "text": "x" * 70000}
        assert seen["all"] == [["", 0.0], ["y" * 1000, 1 / 3]]
        assert (seen["run"], seen["called"]) == (7, [0] if rank == 0 else [])
        assert seen["known"] == [["Narrower", "ConfigError"][rank], "here: not so (found: <opaque>). Do this."]
        assert seen["plain"] == ["Diverged", "lost."]
        assert seen["other"] == [["KeyError", "'k'"], [PeerLost.__name__, "rank 0 failed: KeyError: 'k'."]][rank]
