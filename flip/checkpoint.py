"""Saving and loading a trainer's state: sharded safetensors under the commit protocol of ``flip.commit``.

The state is a flat dict of tensors, ``model.<name>`` and ``optim.<moment>.<name>``; everything else stands in
``commit.json``. Nothing that is loaded can execute: DCP's own ``.metadata`` is a pickle and is not used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from flip import commit
from flip.background import Background
from flip.config.schema import Init
from flip.data.retry import Patience
from flip.exitcodes import DataError, Diverged, FlipError, Superseded
from flip.origin import open_commit
from flip.parallel import World
from flip.remote import Remote, base, marked, verify
from flip.rundir import RunDir
from flip.writer import DAMAGED, Problem, Writer, raised

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


class Checkpointer:
    """Writes and picks the checkpoints of one attempt. All methods are collective: call them on all ranks.

    ``background``: a save returns when the state has been copied in the host's memory; a thread writes and commits it.
    That thread alone uses the group ``world.storage`` then.

    ``url``: where the files lie instead of the run directory, which has each commit.json all the same; a try with that
    storage is repeated with ``patience``.
    """

    def __init__(
        self, run: RunDir, attempt: int, world: World, keep: int, background: bool = False,
        url: str = "", patience: Patience | None = None,
    ) -> None:  # fmt: skip
        self._run, self._attempt, self._world, self._keep = run, attempt, world, keep
        self._url, self._patience = url, patience or Patience()
        self._copy: Path | None = None
        self.parent = ""
        """Folder name of the commit that this attempt went on from."""
        self.waited = 0.0
        """Seconds that saves waited for the one before them."""
        self.took = 0.0
        """Seconds of the newest save, until its commit was read back."""
        self._thread = Background("checkpoint")
        self._stager: DefaultStager | None = None
        if background:
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
        self._release()
        self.waited += time.perf_counter() - begin
        write = partial(self._write, stage=stage, samples=samples, record=record, begin=time.perf_counter())
        if self._stager is None:
            write(state)
            return
        copy = self._stager.stage(state)
        self._thread.begin(partial(write, copy))

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed on this rank; the others' fails at about the same time."""
        return self._thread.failed

    def wait(self) -> None:
        """Return when no save is under way any more. Raises what ``save`` raises."""
        self._thread.wait()

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
            writer = Writer(path, remote)
            dcp.save(state, storage_writer=writer, process_group=self._world.storage)
            files.update(writer.files)

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
            for part in self._gather(files):
                files.update(part)
            problem = self._together(mark) or self._together(read_back)  # before anything older goes
        if problem is not None and self._world.first:
            try:
                if path.is_dir():
                    self._delete(path)
            except (OSError, FlipError) as error:
                log.warning("what was begun of a checkpoint could not be freed: %s", error)
            self._retain([])  # what older attempts began as well
        return problem

    def _together(self, work: Callable[[], object]) -> Problem | None:
        """Do it on all ranks; of their problems the first rank's that has one. Collective."""
        problem = None
        try:
            work()
        except (OSError, CheckpointException, FlipError, commit.Damaged) as error:
            problem = Problem.of(error)
        return next((p for p in self._gather(problem) if p is not None), None)

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
        told = [p for p in self._gather(problem) if p]
        if "superseded" in told:
            raise Superseded("a newer attempt holds the run", self._run.path)
        if told:
            remedy = "Lower `base_lr` or lengthen `warmup`; the newest commit is from before."
            raise Diverged(f"weights have diverged: {told[0]}", f"S = {samples}", remedy=remedy)

    def _told(self, problem: Problem, path: Path, state: dict[str, torch.Tensor]) -> FlipError:
        """The error of tries in vain, with the numbers where waiting may help. Collective."""
        what, remedy = f"the checkpoint could not be written: {problem.text}", ""
        if problem.passes:
            needed = sum(self._gather(sum(local(tensor).nbytes for tensor in state.values())))
            what += f"; it takes {needed:,} bytes"
            if not self._url:
                what += f", {shutil.disk_usage(self._run.path).free:,} are free, and a second try failed as well"
            remedy = "Free space or mend the storage; the run goes on from the commit before."
        return raised(problem)(what, path, remedy=remedy)

    def newest(self) -> commit.Commit | None:
        """The newest commit whose files are what it says, agreed by all ranks; None where the run has none yet.

        A damaged one is set aside with a warning, and the one before is taken. Raises DataError where all are damaged:
        a run never starts from zero by itself.
        """
        choices: list[Any] = [None, None]
        if self._world.first:
            choices = [[str(c.path) for c in reversed(commit.commits(self._run))], commit.traces(self._run)]
        distributed.broadcast_object_list(choices, src=0, group=self._world.storage)
        copy = self._scratch()
        for path in map(Path, choices[0]):
            damaged = self._together(lambda path=path: self._fetch(path, copy))  # type: ignore[misc]
            if damaged is None:
                self.parent = f"{path.parent.name}/{path.name}"
                return commit.read(path)
            self._release()
            if damaged.cause != DAMAGED:
                raise raised(damaged)(damaged.text)
            log.warning(
                "checkpoint %s is damaged (%s); taking the one before", f"{path.parent.name}/{path.name}", damaged.text
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
        problem = self._together(lambda: open_commit(init))
        if problem is not None:
            raise DataError(f"the run cannot begin: {problem.text}", init.run)
        self.parent = str(open_commit(init).path)
        return self.open(Path(self.parent))

    def open(self, path: Path) -> commit.Commit:
        """The commit in a folder, verified and at hand for ``load``. Raises DataError where it is damaged."""
        copy = self._scratch()
        problem = self._together(lambda: self._fetch(path, copy))
        if problem is not None:
            self._release()
            kind = DataError if problem.cause == DAMAGED else raised(problem)
            remedy = "It was deleted since, or is damaged: name another one."
            raise kind(f"this checkpoint cannot be read: {problem.text}", path, remedy=remedy)
        return commit.read(path)

    def load(self, source: commit.Commit, state: dict[str, torch.Tensor]) -> None:
        """Fill the tensors of ``state`` in place; each must be in the checkpoint, which ``newest`` or
        ``open`` has given."""
        reader = dcp.HuggingFaceStorageReader(str(self._copy or source.path))
        dcp.load(state, storage_reader=reader, process_group=self._world.storage)

    def _scratch(self) -> Path:
        """Where this node's ranks share a copy of a checkpoint."""
        copies = self._gather(str(scratch(self._run, self._world.rank)))
        return Path(copies[self._world.rank - self._world.local_rank])

    def _fetch(self, path: Path, copy: Path) -> None:
        """Verify this rank's part of a commit; of one at a URL, copy all of it to this node, once for its ranks."""
        found = commit.read(path)
        if "url" not in found.record:
            commit.verify(found, part=self._world.rank, parts=self._world.size)
            return
        self._copy = copy
        if self._world.local_rank == 0:
            shutil.rmtree(copy, ignore_errors=True)  # of an attempt that was killed
            copy.mkdir(mode=0o700)
            Remote(found.record["url"], self._patience).fetch(found.record["files"], copy)

    def _release(self) -> None:
        """Delete the copy of a checkpoint from a URL. All ranks must be through with it."""
        if self._copy is not None and self._world.local_rank == 0:
            shutil.rmtree(self._copy, ignore_errors=True)
        self._copy = None

    def close(self) -> None:
        self._release()

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._world.size
        distributed.all_gather_object(values, value, group=self._world.storage)
        return values


def scratch(run: RunDir, rank: int) -> Path:
    """Where a node's first rank copies a checkpoint to, in the temporary folder."""
    token = hashlib.sha256(str(run.path).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"flip-{os.getuid()}-{token}-{rank}"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
