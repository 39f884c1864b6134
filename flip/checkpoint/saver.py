"""Saving a trainer's state: sharded safetensors under the commit protocol of ``flip.runs.commit``.

The state is a flat dict of tensors, ``model.<name>`` and ``optim.<moment>.<name>``; everything else stands in
``commit.json``. Nothing that is loaded can execute: DCP's own ``.metadata`` is a pickle and is not used.
"""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from flip.checkpoint.dcp_io import Problem, Writer, own_part, raised
from flip.checkpoint.remote import Remote, base, marked, verify
from flip.checkpoint.restorer import Restorer
from flip.concurrency import DaemonExecutor
from flip.data.storage.retry import Patience
from flip.distributed.collectives import all_gather_json
from flip.distributed.parallel import World, local
from flip.runs import commit
from flip.runs.errors import Diverged, FlipError, Superseded
from flip.runs.rundir import RunDir

log = logging.getLogger(__name__)

BRIEF = 30.0
"""Seconds of outage that a deletion rides out: what is left over goes with the next."""


def model_state(pair: nn.Module) -> dict[str, torch.Tensor]:
    """``model.<name>`` of every parameter. Buffers are tables computed from the configuration."""
    return {f"model.{name}": parameter.detach() for name, parameter in pair.named_parameters()}


def optimizer_state(pair: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """``optim.<moment>.<name>``. AdamW makes its state at the first step; a fresh one gets zeros here."""
    state = {}
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in pair.named_parameters():
        if not parameter.requires_grad:
            continue
        assert id(parameter) in known, f"{name} is not the tensor that the optimiser updates"
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        for moment, value in moments.items():
            state[f"optim.{moment}.{name}"] = value
    return state


class Checkpointer(Restorer):
    """Writes the checkpoints of one attempt, and reads what is there. All methods are collective.

    ``background``: a save returns when the state has been copied in the host's memory; a thread writes and commits it.
    That thread alone uses the group ``world.storage`` then.

    ``url``: where the files lie instead of the run directory, which has each commit.json all the same; a try with that
    storage is repeated with ``patience``.
    """

    def __init__(
        self, run: RunDir, attempt: int, world: World, keep: int, background: bool = False,
        url: str = "", patience: Patience | None = None,
    ) -> None:  # fmt: skip
        super().__init__(run, attempt, world, patience, url)
        self._keep = keep
        self.waited = 0.0
        """Seconds that saves waited for the one before them."""
        self.took = 0.0
        """Seconds of the newest save, until its commit was read back."""
        self._executor: DaemonExecutor | None = None
        self._pending: Future[None] | None = None
        self._stager: DefaultStager | None = None
        if background:
            self._executor = DaemonExecutor(1, "checkpoint")
            card = world.device.type == "cuda"
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=card,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=card,
                )
            )

    def save(self, state: dict[str, torch.Tensor], stage: str, samples: int, **record: Any) -> None:
        """Write ``state`` and commit it as S = ``samples``; delete what is no longer needed.

        Raises Superseded where a newer attempt holds the run, Diverged where a weight is not finite, StorageError when
        it cannot be written (a full disk); what was written of it is freed, older commits stay. In the background these
        come out of the next ``wait`` or ``save``, on all ranks alike.
        """
        begin = time.perf_counter()
        self.wait()
        self.close()
        self.waited += time.perf_counter() - begin
        write = partial(self._write, stage=stage, samples=samples, record=record, begin=time.perf_counter())
        if self._stager is None or self._executor is None:
            write(state)
            return
        self._pending = self._executor.submit(write, self._stager.stage(state))

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed on this rank; the others' fails at about the same time."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Return when no save is under way any more. Raises what ``save`` raises."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(
        self, state: dict[str, torch.Tensor], stage: str, samples: int, record: dict[str, Any], begin: float
    ) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)  # a thread begins on the first card
        path = commit.folder(self._run, stage, samples, self._attempt)
        self._refuse(state, samples)
        record = dict(record, stage=stage, samples=samples, attempt=self._attempt, parent=self.parent)
        problem = self._try(path, state, record, begin)
        if problem is not None and problem.passes and not self._url:  # at a URL each request was repeated
            if self._world.first:
                log.warning("the checkpoint could not be written, once more: %s", problem.text)
            problem = self._try(path, state, record, begin)
        if problem is not None:
            raise self._told(problem, path, state)
        self.parent, self.took = f"{stage}/{path.name}", time.perf_counter() - begin
        if self._world.first:
            log.info("committed S = %d in stage %s, %.1f s", samples, stage, self.took)
            self._retain([path])

    def _try(self, path: Path, state: dict[str, torch.Tensor], record: dict[str, Any], begin: float) -> Problem | None:
        """Write and commit. One rank's trouble is everybody's: then what was begun is freed, and the first is told."""
        remote: Remote | None = None
        files: dict[str, dict[str, Any]] = {}

        def prepare() -> None:
            nonlocal remote
            if self._world.first:
                path.mkdir(parents=True, exist_ok=True)  # what a try before could not free is written over
            remote = Remote(self._place(path), self._patience) if self._url else None

        def write() -> None:
            files.update(Writer(path, remote, self._world.rank).save(own_part(state, self._world.rank)))

        def mark() -> None:
            if self._world.first:
                facts = record | {"world": self._world.size, "saving": time.perf_counter() - begin}
                if remote is not None:
                    facts["url"] = remote.url
                    remote.put(commit.MARK, marked(facts | {"files": files}))
                commit.commit(path, facts, files)

        def read_back() -> None:
            verify(commit.read(path), self._patience, part=self._world.rank, parts=self._world.size)

        problem = self._together(prepare) or self._together(write)
        if problem is None:
            for part in all_gather_json(files, self._world.storage):
                files.update(part)
            problem = self._together(mark) or self._together(read_back)  # before anything older goes
        if problem is not None and self._world.first:
            try:
                # a newer attempt may have taken a straggler's folder away before the last of its files had come
                if path.is_dir() or remote is not None:
                    self._delete(path)
            except (OSError, FlipError) as error:
                log.warning("what was begun of a checkpoint could not be freed: %s", error)
            self._retain([])  # what older attempts began as well
        return problem

    def _place(self, path: Path) -> str:
        """The URL of a commit's folder."""
        return f"{base(self._run, self._url)}/{path.parent.name}/{path.name}"

    def _retain(self, named: list[Path]) -> None:
        try:
            commit.retain(self._run, self._attempt, self._keep, named, self._delete)
        except (OSError, FlipError) as error:  # what is too much does no harm, and the next save tries again
            log.warning("an old checkpoint could not be deleted: %s", error)

    def _delete(self, path: Path) -> None:
        """Whatever is there of a commit, its mark in the run directory first."""
        try:
            url = commit.read(path).record.get("url", "")
        except commit.Damaged:  # or only begun
            url = ""
        commit.withdraw(path)
        if url or self._url:
            brief = replace(self._patience, deadline=min(self._patience.deadline, BRIEF))
            Remote(url or self._place(path), brief).remove()
        commit.remove(path)

    def _refuse(self, state: dict[str, torch.Tensor], samples: int) -> None:
        """What must never be committed: by a straggler, or with weights that are not finite."""
        problem = "superseded" if self._world.first and not self._run.holds(self._attempt) else ""
        for name, tensor in state.items():
            if name.startswith("model.") and not bool(local(tensor).isfinite().all()):
                problem = problem or f"{name.removeprefix('model.')} is not finite"
        told = [p for p in all_gather_json(problem, self._world.storage) if p]
        if "superseded" in told:
            raise Superseded("a newer attempt holds the run", self._run.path)
        if told:
            remedy = "Lower `base_lr` or lengthen `warmup`; the newest commit is from before."
            raise Diverged(f"weights have diverged: {told[0]}", f"S = {samples}", remedy=remedy)

    def _told(self, problem: Problem, path: Path, state: dict[str, torch.Tensor]) -> FlipError:
        """The error of tries in vain, with the numbers where waiting may help. Collective."""
        what, remedy = f"the checkpoint could not be written: {problem.text}", ""
        if problem.passes:
            needed = sum(all_gather_json(sum(local(t).nbytes for t in state.values()), self._world.storage))
            what += f"; it takes {needed:,} bytes"
            if not self._url:
                what += f", {shutil.disk_usage(self._run.path).free:,} are free, and a second try failed as well"
            remedy = "Free space or mend the storage; the run goes on from the commit before."
        return raised(problem)(what, path, remedy=remedy)
