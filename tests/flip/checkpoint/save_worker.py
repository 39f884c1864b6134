"""Saves that are killed at every write: a process per rank and kill, forked from one that has imported torch.

``python -m tests.flip.checkpoint.save_worker RUN WORLD [URL]``: the k-th round kills one rank, at its k-th change of a
file below ``checkpoints/``, in the middle of writing one, or before or after a request that changes something at URL.
The next round must find a checkpoint that it can load, of S as it was or one further, with the values of that S. A rank
is done with when it lives; at the end it prints how often one died.
"""

import os
import signal
import sys
import time

import torch
import torch._dynamo  # the first optimiser asks for it: seconds, once instead of in every process that is forked
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from flip.checkpoint import safetensors_io
from flip.checkpoint import saver as checkpoint
from flip.checkpoint.remote import local_copy, url_prefix
from flip.config import schema
from flip.data.storage import s3
from flip.data.storage.retry import RetryPolicy
from flip.distributed import parallel
from flip.runs import commit
from flip.runs.rundir import RunDir
from flip.training import optimizer as optim
from tests.s3.servers import free_port

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}
EACH = 16
"""S between saves."""


class Doom:
    """Ends this process at the ``left``-th change from now."""

    def __init__(self, left):
        self.left = left

    def step(self, *_):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def audit(self, event, values):
        written = event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR)
        if (written or event in CHANGES) and "/checkpoints" in str(values[0]):
            self.step()

    def around(self, request):
        def asked(*rest, **more):
            self.step()
            answer = request(*rest, **more)
            self.step()
            return answer

        return asked

    def arm(self):
        write = safetensors_io._write_file

        def in_halves(path, data):
            path.write_bytes(data[: len(data) // 2])
            self.step()
            return write(path, data)

        safetensors_io._write_file = in_halves
        for name in ("_call", "_call_with_body"):  # all that change something
            setattr(s3.S3Storage, name, self.around(getattr(s3.S3Storage, name)))
        sys.addaudithook(self.audit)


def state(world):
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 8))
    if world.size > 1:
        fully_shard(pair)
    optimizer = optim.build(pair.named_parameters(), schema.Optim())
    return checkpoint.model_state(pair) | checkpoint.optimizer_state(pair, optimizer)


def fill(tensors, samples):
    """Values that S alone decides."""
    for number, tensor in enumerate(tensors.values()):
        local = parallel.local(tensor)
        local.copy_(torch.arange(local.numel()).view(local.shape) * 0.5 + samples + 1000 * number)


def rank(run, n, doom, url):
    """One rank's life: 0; 3 where what was loaded is not what was saved."""
    world = parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    found, expected = state(world), state(world)
    saver = checkpoint.Checkpointer(run, n, world, keep=1, background=True, **url)
    with torch.no_grad():
        newest = saver.restorer.newest()
        samples = newest.samples if newest else 0
        if newest is not None:
            saver.restorer.load(newest, found)
            fill(expected, samples)
            if any(not torch.equal(parallel.local(found[name]), parallel.local(expected[name])) for name in expected):
                return 3
        doom.arm()
        fill(found, samples + EACH)
        saver.save(found, "pretrain", samples + EACH)
        for _ in range(20):  # as training does meanwhile
            fill(found, -1)
            distributed.all_reduce(torch.ones(100))
    saver.wait()
    return 0


def life(run, n, doom, url):
    try:
        code = rank(run, n, doom, url)
    except RuntimeError as error:  # the other rank has gone
        code = 4 if "onnection" in str(error) else 5
        print(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)


def round_of(run, size, victim, left, url):
    """Whether the victim died. All others go with it."""
    n, port, children = run.start_attempt({}), str(free_port()), []
    for r in range(size):
        os.environ.update(RANK=str(r), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        child = os.fork()
        if child == 0:
            life(run, n, Doom(left if r == victim else -1), url)
        children.append(child)
    codes, dead = {}, False
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
    """No commit exists in part."""
    for one in commit.commits(run):
        with local_copy(one, url.get("retry_policy")):
            pass


def main(run, size, url):
    """How many were killed. At the end there is nothing but what is kept."""
    killed = 0
    while round_of(run, size, -1, -1, url):
        raise AssertionError("a rank died without a kill")
    for victim in range(size):
        left = 0
        while True:
            before = commit.commits(run)[-1].samples
            dead = round_of(run, size, victim, left, url)
            after = commit.commits(run)[-1].samples
            assert after in ((before, before + EACH) if dead else (before + EACH,)), (victim, left, before, after)
            check(run, url)
            if not dead:
                break
            killed, left = killed + 1, left + 1
    kept = commit.commits(run)
    assert len(kept) == 1 and [p for p in run.checkpoints.glob("*/*") if p.is_dir()] == [kept[0].path]
    if url:
        there = {key for key, _ in s3.S3Storage().list(url_prefix(run, url["url"]))}
        assert there == {f"{kept[0].record['url']}/{name}" for name in (*kept[0].record["files"], commit.COMMIT_FILE)}
    return killed


if __name__ == "__main__":
    place = {"url": sys.argv[3], "retry_policy": RetryPolicy(deadline=20, timeout=10)} if sys.argv[3:] else {}
    print(main(RunDir(sys.argv[1]), int(sys.argv[2]), place))
