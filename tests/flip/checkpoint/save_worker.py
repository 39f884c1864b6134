"""Kills saves at every write. Each round forks a process per rank from a process that has imported torch.

``python -m tests.flip.checkpoint.save_worker RUN WORLD [URL]``: the k-th round kills one rank at its k-th change of a
file below ``checkpoints/``, in the middle of writing a file, or before or after a request that changes an object at
URL. The next round must load a checkpoint: that of the previous S or of the next S, with the values of that S. A rank
is finished when it survives a round. At the end the script prints the number of kills.
"""

import os
import signal
import sys
import time
import traceback

import torch
import torch._dynamo  # the first optimiser imports it: takes seconds, here once instead of in every forked process
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from flip.checkpoint import safetensors_io
from flip.checkpoint import saver as checkpoint
from flip.checkpoint.remote import local_copy
from flip.checkpoint.remote_folder import OWNER_FILE
from flip.config import schema
from flip.data.storage import s3
from flip.data.storage.retry import RetryPolicy
from flip.distributed import parallel
from flip.runs import checkpoint_folder
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir, read_json
from flip.training import parameter_groups
from tests.harness.common import free_port

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}
INTERVAL = 16
"""S between saves."""


def changed_path(event, values):
    """The path that an audit event names; deletions name it relative to an open folder."""
    if event in ("os.remove", "os.rmdir"):
        folder = values[1]
    else:
        folder = -1
    if folder >= 0:
        return f"{os.readlink(f'/proc/self/fd/{folder}')}/{values[0]}"
    return str(values[0])


class KillSwitch:
    """Kills this process at the ``left``-th change from now."""

    def __init__(self, left):
        self.left = left

    def step(self, *_):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def audit(self, event, values):
        written = event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR)
        if (written or event in CHANGES) and "/checkpoints" in changed_path(event, values):
            self.step()

    def around(self, request):
        def wrapped(*rest, **more):
            self.step()
            answer = request(*rest, **more)
            self.step()
            return answer

        return wrapped

    def arm(self):
        write = safetensors_io._write_file

        def in_halves(path, data):
            path.write_bytes(data[: len(data) // 2])
            self.step()
            return write(path, data)

        safetensors_io._write_file = in_halves
        for name in ("_call", "_call_with_body"):  # all methods that change an object
            setattr(s3.S3Storage, name, self.around(getattr(s3.S3Storage, name)))
        sys.addaudithook(self.audit)


def state(world):
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 8))
    if world.size > 1:
        fully_shard(pair)
    optimizer = parameter_groups.build(pair.named_parameters(), schema.Optim())
    return checkpoint.model_state(pair) | checkpoint.optimizer_state(pair, optimizer)


def fill(tensors, samples):
    """Fills tensors with values that depend on S only."""
    for number, tensor in enumerate(tensors.values()):
        local = parallel.local(tensor)
        local.copy_(torch.arange(local.numel()).view(local.shape) * 0.5 + samples + 1000 * number)


def rank(run, n, kill_switch, url):
    """Loads, checks and saves as one rank. Returns 0, or 3 if the loaded values differ from the saved values."""
    world = parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    loaded = state(world)
    expected = state(world)
    saver = checkpoint.Checkpointer(run, n, world, keep=1, background=True, **url)
    with torch.no_grad():
        newest = saver.restorer.newest()
        samples = newest.samples_seen if newest else 0
        if newest is not None:
            saver.restorer.load(newest, loaded)
            fill(expected, samples)
            if any(not torch.equal(parallel.local(loaded[name]), parallel.local(expected[name])) for name in expected):
                return 3
        kill_switch.arm()
        fill(loaded, samples + INTERVAL)
        saver.save(loaded, "pretrain", samples + INTERVAL)
        for _ in range(20):  # as training does during a background save
            fill(loaded, -1)
            distributed.all_reduce(torch.ones(100))
    saver.wait()
    return 0


def child_main(run, n, kill_switch, url):
    try:
        code = rank(run, n, kill_switch, url)
    except (RuntimeError, FlipError) as error:  # the first: the other rank has ended
        code = 4 if "onnection" in str(error) else 5
        print(error, file=sys.stderr)
    except BaseException:  # a fork must not return into the code of its parent
        traceback.print_exc()
        code = 5
    sys.stderr.flush()
    os._exit(code)


def round_of(run, size, victim, left, url):
    """Runs one round. Returns whether the victim died; in this case kills all other ranks."""
    n = run.start_attempt({})
    port = str(free_port())
    children = []
    for r in range(size):
        os.environ.update(RANK=str(r), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        child = os.fork()
        if child == 0:
            child_main(run, n, KillSwitch(left if r == victim else -1), url)
        children.append(child)
    codes = {}
    dead = False
    while len(codes) < size:
        for r, child in enumerate(children):
            if r not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[r] = os.waitstatus_to_exitcode(status)
                    dead = dead or (r == victim and codes[r] == -signal.SIGKILL)
                elif dead:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert dead or set(codes.values()) == {0}, codes
    assert not {3, 5} & set(codes.values()), codes
    return dead


def check(run, url):
    """Checks that every checkpoint is complete."""
    for saved in checkpoint_folder.checkpoints(run):
        with local_copy(saved, url.get("retry_policy")):
            pass


def main(run, size, url):
    """Returns the number of kills. Checks that only the kept checkpoint remains at the end."""
    killed = 0
    while round_of(run, size, -1, -1, url):
        raise AssertionError("a rank died without a kill")
    for victim in range(size):
        left = 0
        while True:
            before = checkpoint_folder.checkpoints(run)[-1].samples_seen
            dead = round_of(run, size, victim, left, url)
            after = checkpoint_folder.checkpoints(run)[-1].samples_seen
            expected = {before, before + INTERVAL} if dead else {before + INTERVAL}
            assert after in expected, (victim, left, before, after)
            check(run, url)
            if not dead:
                break
            killed = killed + 1
            left = left + 1
    checkpoints = checkpoint_folder.checkpoints(run)
    assert len(checkpoints) == 1 and [p for p in run.checkpoints.glob("*/*") if p.is_dir()] == [checkpoints[0].path]
    if url:
        folder = read_json(run.checkpoints / "url.json")["url"]
        keys = {key for key, _ in s3.S3Storage().list(folder + "/")}
        files = {
            f"{checkpoints[0].record['url']}/{name}"
            for name in (*checkpoints[0].record["files"], checkpoint_folder.COMMIT_FILE)
        }
        assert keys == files | {f"{folder}/{OWNER_FILE}"}
    return killed


if __name__ == "__main__":
    place = {}
    if sys.argv[3:]:
        place = {"url": sys.argv[3], "retry_policy": RetryPolicy(deadline=20, timeout=10)}
    print(main(RunDir(sys.argv[1]), int(sys.argv[2]), place))
