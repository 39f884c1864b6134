"""Saving and loading a trainer's state: sharded safetensors under the commit protocol of ``flip.commit``.

The state is a flat dict of tensors, ``model.<name>`` and ``optim.<moment>.<name>``; everything else stands in
``commit.json``. Nothing that is loaded can execute: DCP's own ``.metadata`` is a pickle and is not used.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from flip import commit
from flip.config.schema import Init
from flip.exitcodes import DataError, Diverged, StorageError, Superseded
from flip.origin import open_commit
from flip.parallel import World
from flip.rundir import RunDir

log = logging.getLogger(__name__)


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


class Checkpointer:
    """Writes and picks the checkpoints of one attempt. All methods are collective: call them on all ranks."""

    def __init__(self, run: RunDir, attempt: int, world: World, keep: int) -> None:
        self._run, self._attempt, self._world, self._keep = run, attempt, world, keep
        self.parent = ""
        """Folder name of the commit that this attempt went on from."""

    def save(self, state: dict[str, torch.Tensor], stage: str, samples: int, **record: Any) -> None:
        """Write ``state`` and commit it as S = ``samples``; delete what is no longer needed.

        Raises Superseded where a newer attempt holds the run, Diverged where a weight is not finite, StorageError when
        it cannot be written (a full disk); what was written of it is freed, older commits stay.
        """
        path = commit.folder(self._run, stage, samples, self._attempt)
        self._refuse(state, samples)
        problem = ""
        if self._world.first:
            try:
                path.mkdir(parents=True)
            except OSError as error:
                problem = _innermost(error)
        self._agree(problem, path)
        try:
            writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
            dcp.save(state, storage_writer=writer, process_group=self._world.storage)
            if self._world.first:
                record = dict(record, stage=stage, samples=samples, attempt=self._attempt, parent=self.parent)
                made = commit.commit(path, record | {"world": self._world.size})
                commit.verify(made)  # read back before anything older goes
        except (OSError, CheckpointException, commit.Damaged) as error:
            problem = _innermost(error)
        self._agree(problem, path)
        self.parent = f"{stage}/{path.name}"
        if self._world.first:
            try:
                commit.retain(self._run, self._attempt, self._keep, named=[path])
            except OSError as error:  # what is too much does no harm, and the next save tries again
                log.warning("an old checkpoint could not be deleted: %s", error)

    def _refuse(self, state: dict[str, torch.Tensor], samples: int) -> None:
        """What must never be committed: by a straggler, or with weights that are not finite."""
        problem = "superseded" if self._world.first and not self._run.holds(self._attempt) else ""
        for name, tensor in state.items():
            if name.startswith("model.") and not bool(local(tensor).isfinite().all()):
                problem = problem or f"{name.removeprefix('model.')} is not finite"
        told = [p for p in self._gather(problem) if p]
        if "superseded" in told:
            raise Superseded("a newer attempt holds the run", self._run.path)
        if told:
            remedy = "Lower `base_lr` or lengthen `warmup`; the newest commit is from before."
            raise Diverged(f"weights have diverged: {told[0]}", f"S = {samples}", remedy=remedy)

    def _agree(self, problem: str, path: Path) -> None:
        """One rank's trouble with storage is everybody's: all raise, and what was begun is freed."""
        told = [p for p in self._gather(problem) if p]
        if not told:
            return
        if self._world.first and path.is_dir():
            commit.remove(path)
        raise StorageError(
            f"the checkpoint could not be written: {told[0]}",
            path,
            remedy="Free space or mend the storage; the run goes on from the commit before.",
        )

    def newest(self) -> commit.Commit | None:
        """The newest commit whose files are what it says, agreed by all ranks; None where the run has none yet.

        A damaged one is set aside with a warning, and the one before is taken. Raises DataError where all are damaged:
        a run never starts from zero by itself.
        """
        choices: list[Any] = [None, None]
        if self._world.first:
            choices = [[str(c.path) for c in reversed(commit.commits(self._run))], commit.traces(self._run)]
        distributed.broadcast_object_list(choices, src=0, group=self._world.storage)
        for path in map(Path, choices[0]):
            damage = ""
            try:
                found = commit.read(path)
                commit.verify(found, part=self._world.rank, parts=self._world.size)
            except commit.Damaged as error:
                damage = str(error)
            damages = [d for d in self._gather(damage) if d]
            if not damages:
                self.parent = f"{found.stage}/{path.name}"
                return found
            log.warning(
                "checkpoint %s/%s is damaged (%s); taking the one before", path.parent.name, path.name, damages[0]
            )
            if self._world.first and self._run.holds(self._attempt):
                commit.set_aside(path)
        if choices[1]:
            raise DataError(
                "all checkpoints are damaged",
                self._run.checkpoints,
                remedy="Restore one from a copy, or move the folder `checkpoints` away to begin again from zero.",
            )
        return None

    def origin(self, init: Init) -> commit.Commit:
        """The commit of another run that ``init`` names, verified. DataError where it is not what was submitted."""
        problem = ""
        try:
            found = open_commit(init)
            commit.verify(found, part=self._world.rank, parts=self._world.size)
        except (commit.Damaged, DataError) as error:
            problem = str(error)
        told = [p for p in self._gather(problem) if p]
        if told:
            raise DataError("the commit that the run begins from cannot be used", init.run, remedy=told[0])
        self.parent = str(found.path)
        return found

    def load(self, source: commit.Commit, state: dict[str, torch.Tensor]) -> None:
        """Fill the tensors of ``state`` in place; each must be in the checkpoint."""
        reader = dcp.HuggingFaceStorageReader(str(source.path))
        dcp.load(state, storage_reader=reader, process_group=self._world.storage)

    def _gather(self, value: str) -> list[str]:
        values: list[Any] = [None] * self._world.size
        distributed.all_gather_object(values, value, group=self._world.storage)
        return values


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _innermost(error: BaseException) -> str:
    """The text of what really happened: DCP wraps the errors of its ranks."""
    if isinstance(error, CheckpointException):
        for failure, _trace in error.failures.values():
            return _innermost(failure)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device ({error.filename or 'checkpoint folder'})"
    return str(error)
