"""Tests loader processes: they end with the main process, survive signals, and report their failures."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from flip.data.manifest.manifest import Manifest
from flip.data.order import SampleOrder
from flip.data.worker_pool import SharedSlots, _error
from flip.model_costs import IN_HAND
from flip.runs.errors import ConfigError, DataError, FlipError, PermissionDenied, StorageError
from tests.flip.data.loading import BATCH, BLOCK, CHUNK, LANES, SAMPLES, loader

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import json
from pathlib import Path
from tests.flip.data.loading import BATCH, loader

if __name__ == "__main__":
    from flip.concurrency import prepare_forkserver
    prepare_forkserver()
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGUSR2, lambda *_: None)
    source = loader(Path({data!r}), workers=2)
    batches = source.batches(0, BATCH, "0.5")
    ids = [next(batches).ids.tolist() for _ in range({take})]
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "leave":
            sys.exit(75)
        print(json.dumps(next(batches).ids.tolist()), flush=True)
"""


@contextlib.contextmanager
def running(data, script, take=2, **environment):
    script.write_text(SCRIPT.format(root=str(ROOT), data=str(data), take=take), encoding="utf-8")
    child = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | environment,
    )  # fmt: skip
    family = []
    try:
        assert child.stdout.readline() == "ready\n"
        family = psutil.Process(child.pid).children(recursive=True)
        assert len(family) >= 4  # two workers, the fork server, the resource tracker
        yield child, family
    finally:
        for member in [psutil.Process(child.pid), *family] if child.poll() is None else family:
            with contextlib.suppress(psutil.NoSuchProcess):  # all end with their parent
                member.kill()
        child.communicate()


@pytest.fixture
def process(original, tmp_path):
    with running(original, tmp_path / "main.py") as child_and_family:
        yield child_and_family


def assert_gone(family):
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


@pytest.mark.long
def test_workers_end_after_sigkill_of_main_process(process):
    child, family = process
    child.kill()
    child.wait()
    assert_gone(family)


@pytest.mark.long
def test_workers_end_after_sigkill_of_main_process_during_hanging_read(folder, original, tmp_path):
    for shard in folder.glob("*.tar"):
        shard.unlink()
        os.mkfifo(shard)  # opening a FIFO without a writer blocks
    shutil.copy(original.parent / "tokenizer.json", folder.parent)
    with running(folder, tmp_path / "main.py", take=0) as (child, family):
        time.sleep(1)
        child.kill()
        child.wait()
        assert_gone(family)


@pytest.mark.long
def test_workers_ignore_signals_to_process_group(process):
    child, family = process
    for name in (signal.SIGTERM, signal.SIGUSR2):
        os.killpg(child.pid, name)
        time.sleep(0.2)
    ids = []
    for _ in range(6):
        child.stdin.write("next\n")
        child.stdin.flush()
        ids.append(json.loads(child.stdout.readline()))
    order = SampleOrder(11, SAMPLES, CHUNK, BLOCK, LANES)
    assert ids == [order.batch(t * BATCH, BATCH)[0].tolist() for t in range(2, 8)]
    assert psutil.STATUS_ZOMBIE not in [member.status() for member in family]


@pytest.mark.long
def test_exit_with_live_workers_does_not_hang(process):
    child, family = process
    child.stdin.write("leave\n")
    child.stdin.flush()
    assert child.wait(timeout=20) == 75
    assert_gone(family)


@pytest.mark.long
def test_workers_start_if_tmpdir_is_too_long_for_socket_path(original, tmp_path):
    long_folder = tmp_path / ("job-" + "1" * 100)
    long_folder.mkdir()
    with running(original, tmp_path / "main.py", TMPDIR=str(long_folder)) as (child, family):
        child.stdin.write("leave\n")
        child.stdin.flush()
        assert child.wait(timeout=20) == 75
        assert_gone(family)
    assert not list(long_folder.iterdir())


def mapped(pid):
    """Lines of the memory map of a process that belong to shared memory of multiprocessing."""
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/pym-" in line]


def test_shared_memory_has_no_name_and_is_freed_with_the_pool_and_its_batches(original):
    """Unnamed shared memory never outlives its processes, however they end."""
    source = loader(original, workers=2)
    batches = source.batches(0, BATCH, "0.5")
    batch = next(batches)
    expected = batch.patches.clone()
    pids = [os.getpid(), *(process.pid for process in source._producer._processes)]
    assert all(lines and all(line.endswith("(deleted)") for line in lines) for lines in map(mapped, pids))
    memory = weakref.ref(source._producer._slots._memory._wrapper)
    source.close()
    source.close()
    assert memory() is not None and batch.patches.equal(expected), "a batch stays valid"
    del batch
    assert memory() is None


def address(batch):
    return batch.patches.data_ptr()


def test_batch_is_lent_and_its_memory_is_filled_again_once_it_is_dropped(original):
    expected = loader(original).batches(0, BATCH, "0.5")
    source = loader(original, workers=2)
    addresses = set()
    for batch in itertools.islice(source.batches(0, BATCH, "0.5"), 4 * SharedSlots.COUNT):
        assert source._producer._slots._lent <= IN_HAND, "the loop drops a batch when it gets the next one"
        assert all(map(torch.equal, batch[:4], next(expected)[:4]))
        addresses.add(address(batch))
    assert len(addresses) == SharedSlots.COUNT
    source.close()


def test_part_of_a_batch_keeps_all_of_its_memory(original):
    source = loader(original, workers=2)
    batches = source.batches(0, BATCH, "0.5")
    batch = next(batches)
    where = address(batch)
    last_rows = batch.keep_indices[-3:].numpy()
    expected = last_rows.copy()
    del batch
    later = [address(next(batches)) for _ in range(3 * SharedSlots.COUNT)]
    assert where not in later and np.array_equal(last_rows, expected)
    del last_rows
    assert where in [address(next(batches)) for _ in range(3 * SharedSlots.COUNT)]
    source.close()


def test_caller_that_keeps_all_batches_gets_copies(original):
    count = 3 * SharedSlots.COUNT
    source = loader(original, workers=2)
    kept = list(itertools.islice(source.batches(0, BATCH, "0.5"), count))
    assert len({address(batch) for batch in kept}) == count
    for batch, expected in zip(kept, loader(original).batches(0, BATCH, "0.5"), strict=False):
        assert all(map(torch.equal, batch[:4], expected[:4]))
    source.close()


def test_killed_worker_raises_runtime_error_in_main_process(original):
    source = loader(original, workers=2)
    batches = source.batches(0, BATCH, "0.5")
    next(batches)
    os.kill(source._producer._processes[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="loader-1 ended by itself"):
        for _ in range(20):
            next(batches)
    source.close()


def test_failed_worker_delivers_finished_batches_before_its_error(original, folder):
    """The main process gets the finished batches, then the error of the worker instead of a broken pipe."""
    manifest = Manifest.load(folder)
    order = SampleOrder(11, SAMPLES, CHUNK, BLOCK, LANES)
    first, second, third = (set((order.batch(t * BATCH, BATCH)[0] // CHUNK).tolist()) for t in range(3))
    shard, start, _, _ = manifest.chunk_ranges(min(third - first - second))[0]
    with open(manifest.keys[shard], "r+b") as file:
        file.seek(start + 600)
        file.write(b"rot")
    source = loader(original, folder=folder, workers=1)
    batches = source.batches(0, BATCH, "0.5")
    (process,) = source._producer._processes
    process.join(timeout=20)
    assert process.exitcode == 0
    for t in range(2):
        assert next(batches).ids.tolist() == order.batch(t * BATCH, BATCH)[0].tolist()
    with pytest.raises(DataError, match="is damaged"):
        next(batches)


@pytest.mark.parametrize("kind", [FlipError, ConfigError, DataError, PermissionDenied, StorageError])
def test_worker_error_retains_type_and_message(kind):
    sent = kind("what", "where", 3, "remedy")
    fields = {"cause": sent.cause, "what": sent.what, "where": sent.where, "value": sent.value, "remedy": sent.remedy}
    received = _error(json.loads(json.dumps(fields)))
    assert type(received) is kind and str(received) == str(sent)
