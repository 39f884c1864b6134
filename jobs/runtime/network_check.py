"""Measures the network between all ranks of an allocation before they work, in processes of their own.

``start`` forks the process of a node, which forks one per rank, as training has them: with NCCL on GPUs, else with
gloo. They meet as ranks do, measure an all-reduce of all ranks and the links between neighbouring nodes (of an only
node: between its ranks), and end. The process of the node reports a row, named ``NETWORK``.

``jobs.host.agents.node_health.judge`` compares the nodes by their links, of GPUs alone: processes on CPUs share cores,
so that their speeds show little of the network. A group that does not form, or that hangs, ends after ``SECONDS``: the
network is then not known, and the run starts all the same.
"""

import contextlib
import datetime
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

from flip.runs.checks import OK, UNKNOWN, Check, Rule, run_rules
from jobs.host.agents.node_health import NETWORK
from jobs.runtime import check_process
from jobs.runtime.check_process import END, CheckProcess, write_row

SECONDS = 8.0
"""Of the ranks, from their start."""
JOIN_SECONDS = 5.0
"""Of these, for all ranks to come."""
GRACE = 1.0
"""After that, for the process of the node to report."""
LEAVE_SECONDS = 1.0
"""For the ranks to end by themselves once they have measured: their peers may still wait for them."""
GROUP_SECONDS = 60.0
"""For a collective. The end of the process comes first."""
REDUCE_BYTES = {"cuda": 1 << 26, "cpu": 1 << 20}
LINK_BYTES = {"cuda": 1 << 25, "cpu": 1 << 20}
ROUNDS = 3
"""The fastest counts: a link that was fast once is not broken."""

#: What a rank measures: ``reduce``, in bytes per second, and ``links``, rows {between, rate}. Empty except on the first
#: rank of a node. ``error``: why there is nothing.
Answer = dict[str, Any]


class NetworkSettings(NamedTuple):
    """``environments``: of the ranks of this node. ``nodes``: names of all nodes, in their order."""

    environments: Sequence[Mapping[str, str]]
    device: str
    nodes: Sequence[str]


def start(settings: NetworkSettings) -> CheckProcess:
    """Start the part of this node. This process has imported torch, has one thread and has not touched a GPU. Raises
    OSError."""
    return check_process.start(partial(run, settings), NETWORK, SECONDS + GRACE)


def run(settings: NetworkSettings, output: int, work: Callable[[str], Answer] | None = None) -> None:
    """Start the ranks of this node, and report what they measure to the descriptor ``output``.

    ``work``: replaces ``measure`` in tests.
    """
    answers = _answers(settings, work or measure)
    for row in run_rules(CHECKS, answers, settings):
        write_row(output, row.as_json())
    write_row(output, END)


def _answers(settings: NetworkSettings, work: Callable[[str], Answer]) -> list[Answer]:
    """The answers of the ranks of this node, in their order."""
    end = time.monotonic() + SECONDS
    ranks: list[_Rank] = []
    try:
        for environ in settings.environments:
            ranks.append(_Rank(environ, partial(work, settings.device)))
        answers = [rank.answer(end) for rank in ranks]
        leave = min(end, time.monotonic() + LEAVE_SECONDS)
        for rank in ranks:
            rank.answer(leave)
    finally:
        for rank in ranks:
            rank.close()
    return answers


def finding(answers: Sequence[Answer], settings: NetworkSettings) -> Check:
    """What the ranks of a node have measured, with the node's rate if there are several nodes with GPUs."""
    errors = [answer["error"] for answer in answers if "error" in answer]
    if errors:
        return Check(UNKNOWN, errors[0])
    first = answers[0]
    environ = settings.environments[0]
    node = int(environ["NODE_RANK"])
    rates = [link["rate"] / 1e9 for link in first["links"]]
    text = f"all-reduce of {environ['WORLD_SIZE']} ranks: {first['reduce'] / 1e9:.3g} GB/s"
    text += f"; slowest link: {min(rates):.3g} GB/s, fastest: {max(rates):.3g} GB/s"
    if len(settings.nodes) == 1:
        return Check(OK, text)
    own = [(sum(link["between"]) - node, link["rate"]) for link in first["links"] if node in link["between"]]
    links = " and ".join(f"{settings.nodes[peer]} ({rate / 1e9:.3g} GB/s)" for peer, rate in own)
    text += f"; links to {links}"
    if settings.device == "cpu":
        return Check(OK, text)
    return Check(OK, text, rates=((f"links, to {links}", max(rate for _, rate in own)),))


CHECKS = (Rule(NETWORK, finding, "is an all-reduce as fast as that of the peers, and each link?"),)
"""Of a node, for what its ranks have measured and ``NetworkSettings``."""


# -- a rank ------------------------------------------------------------------------------------------------------------


class _Rank:
    """A process that calls ``work`` with this environment and writes its answer to a pipe."""

    def __init__(self, environ: Mapping[str, str], work: Callable[[], Answer]) -> None:
        self._output, inner = os.pipe()
        self._text = b""
        self.pid = os.fork()
        if self.pid == 0:
            _become_rank(environ, work, inner)
        os.close(inner)

    def answer(self, end: float) -> Answer:
        """The next answer, until a moment of the monotonic clock."""
        while b"\n" not in self._text:
            ready, _, _ = select.select([self._output], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return {"error": f"no answer in {SECONDS:g} s"}
            part = os.read(self._output, 1 << 16)
            if not part:
                return {"error": "a process ended early"}
            self._text += part
        line, _, self._text = self._text.partition(b"\n")
        return dict(json.loads(line))

    def close(self) -> None:
        """Kill the process, and wait until its GPU memory is free."""
        os.close(self._output)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _become_rank(environ: Mapping[str, str], work: Callable[[], Answer], output: int) -> NoReturn:
    """In the child: answer, then wait for the peers, which may still need this process."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environ)
        try:
            answer = work()
        except (RuntimeError, OSError, ValueError) as error:  # RuntimeError: of torch's stores and groups
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        with os.fdopen(output, "w", encoding="utf-8") as file:
            file.write(json.dumps(answer) + "\n")
            file.flush()
            _wait_for_peers()
        code = 0
    except BaseException:  # whatever happens here must not continue as a second parent
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait_for_peers() -> None:
    from torch import distributed

    with contextlib.suppress(RuntimeError):  # a peer has ended already
        if distributed.is_initialized():
            distributed.barrier()


def measure(device_name: str) -> Answer:
    """The part of one rank, whose place is in the environment. Collective."""
    import torch
    from torch import distributed

    from flip.common import devices
    from flip.distributed import link_speed, parallel

    rank = int(os.environ["RANK"])
    size = int(os.environ["WORLD_SIZE"])
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    torch.set_num_threads(1)
    device = torch.device("cpu")
    bound = None
    backend = "gloo"
    if device_name == "cuda":
        device = bound = devices.own_gpu()
        torch.cuda.set_device(device)
        backend = "nccl"
    if local == size:
        parallel.stay_on_loopback()
    store = parallel.open_store(rank, size, datetime.timedelta(seconds=JOIN_SECONDS))
    parallel.wait_for_ranks(store, size)
    timeout = datetime.timedelta(seconds=GROUP_SECONDS)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=bound)
    bytes_reduced = REDUCE_BYTES[device_name]
    full = torch.ones(bytes_reduced // 4, device=device)
    seconds = link_speed.collective_seconds(lambda: distributed.all_reduce(full), device, ROUNDS)
    place = local if local < size else 1
    links = []
    for pairs in link_speed.disjoint(link_speed.neighbours(size, local), place):
        times = link_speed.link_seconds(pairs, LINK_BYTES[device_name], device, ROUNDS).amin(1)
        for pair, fastest in zip(pairs, times.tolist(), strict=True):
            between = [number // place for number in pair]
            links.append({"between": between, "rate": LINK_BYTES[device_name] / fastest})
    if int(os.environ["LOCAL_RANK"]):
        return {}
    moved = 2 * bytes_reduced * (size - 1) / size
    return {"reduce": moved / float(seconds.min()), "links": links}
