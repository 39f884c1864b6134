"""Saves a training state as sharded safetensors under the protocol of ``flip.runs.checkpoint_folder``.

The state is a flat dict of tensors, ``model.<name>`` and ``optim.<moment>.<name>``; everything else is in
``commit.json``. Nothing that is loaded can execute.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flip.checkpoint.remote import RemoteCheckpoint, verify
from flip.checkpoint.remote_folder import RemoteFolder
from flip.checkpoint.restorer import CheckpointRestorer
from flip.checkpoint.safetensors_io import write_shard
from flip.checkpoint.staging import StagedShard
from flip.concurrency import DaemonExecutor
from flip.data.storage.retry import DEFAULT_POLICY, RetryPolicy
from flip.distributed.collectives import RankFailure, all_gather_json, broadcast_json, run_on_all
from flip.distributed.parallel import World
from flip.files.creation import run_folder
from flip.optimizer_kinds import moments_of
from flip.runs import checkpoint_folder
from flip.runs.errors import Diverged, FlipError, Superseded
from flip.runs.rundir import RunDir, to_json

log = logging.getLogger(__name__)

DELETE_DEADLINE_SECONDS = 30.0
"""How long a deletion is retried during an outage; the next save deletes what is left."""


TRAINING_ONLY = "model.head."
"""Start of the names of parameters that only training uses: the text classification head."""


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """``model.<name>`` -> parameter, sharded as it is. Buffers are tables computed from the configuration."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """``optim.<moment>.<name>`` -> moment, sharded as its parameter; also before the first step, when the optimiser has
    none yet. Raises RuntimeError as ``moments_of``."""
    state = {}
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # of a locked tower
            continue
        assert id(parameter) in known, f"{name} is not the tensor that the optimiser updates"
        for moment, value in moments_of(optimizer, parameter).items():
            state[f"optim.{moment}.{name}"] = value
    return state


class Checkpointer:
    """Writes the checkpoints of one attempt and deletes old ones. All methods are collective.

    Args:
        background: a save returns as soon as the state is copied to host memory; a thread, which alone uses the group
            ``world.checkpoint_group`` then, writes the checkpoint.
        url: where the files are written instead of the run directory, which still gets each commit.json.
        retry_policy: how long a request to storage at ``url`` is repeated.
        keep_at: values of S whose checkpoints are never deleted.
    """

    def __init__(
        self, run: RunDir, attempt: int, world: World, keep: int, background: bool = False,
        url: str = "", retry_policy: RetryPolicy = DEFAULT_POLICY, keep_at: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._run = run
        self._attempt = attempt
        self._world = world
        self._keep = keep
        self._url = url
        self._keep_at = keep_at
        self._retry_policy = retry_policy
        self._remote_folder: RemoteFolder | None = None
        if url:
            self._remote_folder = RemoteFolder(run, url, self._retry_policy, attempt)
        self.restorer = CheckpointRestorer(run, attempt, world, retry_policy, url)
        self.blocked_seconds = 0.0
        """Seconds that saves waited for the previous save."""
        self.last_save_seconds = 0.0
        """Seconds of the newest save, until its checkpoint was read back."""
        self._pending: Future[None] | None = None
        self._executor: DaemonExecutor | None = None
        if background:
            self._executor = DaemonExecutor(1, "checkpoint")
        self._staged: StagedShard | None = None

    def save(self, state: dict[str, torch.Tensor], stage: str, samples_seen: int, **record: Any) -> None:
        """Save ``state`` as the checkpoint at S = ``samples_seen``, and delete checkpoints that are no longer needed.

        Raises Superseded if a newer attempt holds the run, Diverged if a weight is not finite, StorageError if it
        cannot be written (a full disk); what was written of it is freed, older checkpoints stay. A save in the
        background raises these from the next ``wait`` or ``save``, on all ranks alike.
        """
        start_time = time.perf_counter()
        self.wait()
        self.restorer.close()
        self.blocked_seconds += time.perf_counter() - start_time
        write = partial(
            self._write, stage=stage, samples_seen=samples_seen, record=record, start_time=time.perf_counter()
        )
        staged = self._stage(state)
        if self._executor is None:
            write(staged)
        else:
            self._pending = self._executor.submit(write, staged)

    def _stage(self, state: dict[str, torch.Tensor]) -> StagedShard:
        """A copy of this rank's part of ``state``, in the buffer of the previous save if the layout is the same."""
        if self._staged is None or not self._staged.fits(state):
            self._staged = None  # frees its buffer before the next one is allocated
            self._staged = StagedShard(state, self._world.rank, pinned=self._world.device.type == "cuda")
        self._staged.fill(state)
        return self._staged

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed on this rank; on other ranks it fails at about the same
        time."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Wait for the save in the background. Raises what ``save`` raises."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def _write(
        self, staged: StagedShard, stage: str, samples_seen: int, record: dict[str, Any], start_time: float
    ) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)  # a new thread uses the first GPU
        path = checkpoint_folder.folder(self._run, stage, samples_seen, self._attempt)
        self._check_saveable(staged, samples_seen)
        record = dict(record, stage=stage, samples=samples_seen, attempt=self._attempt, parent=self.restorer.parent)
        if self._remote_folder is not None:
            record["writer"] = self._remote_folder.id
        failure = self._save_once(path, staged, record, start_time)
        if failure is not None and failure.is_transient and not self._url:  # at a URL each request was repeated
            if self._world.is_rank0:
                log.warning("the checkpoint could not be written, retrying: %s", failure.text)
            failure = self._save_once(path, staged, record, start_time)
        if failure is not None:
            raise self._to_error(failure, path, staged)
        self.restorer.parent = f"{stage}/{path.name}"
        self.last_save_seconds = time.perf_counter() - start_time
        if self._world.is_rank0:
            log.info("saved a checkpoint at S = %d in stage %s, %.1f s", samples_seen, stage, self.last_save_seconds)
            self._retain([path])

    def _save_once(
        self, path: Path, staged: StagedShard, record: dict[str, Any], start_time: float
    ) -> RankFailure | None:
        """Write a checkpoint. A failure of one rank is that of all, and frees what was written."""
        group = self._world.checkpoint_group
        steps = _SaveSteps(self._world, path, staged, record, start_time, self._retry_policy)
        failure = run_on_all(partial(self._prepare, path), group)
        if failure is None:
            address = broadcast_json(self._url_of(path), group)
            failure = run_on_all(partial(steps.write, address), group)
        if failure is None:
            for part in all_gather_json(steps.files, group):
                steps.files.update(part)
            failure = run_on_all(steps.write_commit_file, group)
        if failure is None:
            failure = run_on_all(steps.read_back, group)  # before older checkpoints are deleted
        if failure is not None and self._world.is_rank0:
            self._discard(path, is_remote=steps.remote is not None)
        return failure

    def _prepare(self, path: Path) -> None:
        """Create the folder of a checkpoint; rank 0 does it."""
        if not self._world.is_rank0:
            return
        if self._remote_folder is not None:
            self._remote_folder.claim()
            self._remote_folder.refuse_links(self._remote_folder.checkpoint_url(path))
        run_folder(self._run.checkpoints)
        run_folder(path.parent)
        run_folder(path)  # an earlier try may have left files

    def _discard(self, path: Path, is_remote: bool) -> None:
        """Free what a failed save has written. Failures are logged."""
        try:
            # a newer attempt may have deleted the folder of this straggler before its last file was written
            if path.is_dir() or is_remote:
                self._delete(path)
        except (OSError, FlipError) as error:
            log.warning("the files of a failed save could not be deleted: %s", error)
        self._retain([])  # also frees failed saves of older attempts

    def _url_of(self, path: Path) -> str:
        """The computed URL of a checkpoint's folder, on rank 0; empty if there is none, or none was claimed yet."""
        folder = self._remote_folder
        if folder is not None and folder.url:
            return folder.checkpoint_url(path)
        return ""

    def _retain(self, named: list[Path]) -> None:
        if self._remote_folder is not None and not self._remote_folder.url:
            return  # the storage failed before a save could claim the folder
        try:
            checkpoint_folder.apply_retention(self._run, self._attempt, self._keep, named, self._delete, self._keep_at)
        except (OSError, FlipError) as error:  # too many checkpoints do no harm, and the next save tries again
            log.warning("an old checkpoint could not be deleted: %s", error)

    def _delete(self, path: Path) -> str:
        """Delete a checkpoint, complete or not, its commit.json in the run directory first.

        Returns "", or why it is left alone. An address that its record names is only compared with the computed ones
        of the remote folders of this run directory. Raises PermissionDenied if the folder in use has another owner.
        """
        try:
            record = checkpoint_folder.read_checkpoint(path).record
        except (checkpoint_folder.CorruptCheckpoint, NotADirectoryError):  # damaged, or never complete
            record = {}
        files = list(record["files"]) if record else None
        address = record.get("url", "")
        if not record:
            address = self._url_of(path)
        retry_policy = replace(self._retry_policy, deadline=min(self._retry_policy.deadline, DELETE_DEADLINE_SECONDS))
        if not address:
            return checkpoint_folder.make_incomplete(path) or checkpoint_folder.remove(path, files)
        if self._remote_folder is None:
            return f"its files are at {address}, and this run has no checkpoint.url"
        return self._remote_folder.discard(path, address, files, retry_policy)

    def _check_saveable(self, staged: StagedShard, samples_seen: int) -> None:
        """Refuse saves of a straggler, and weights that are not finite. Raises Superseded, Diverged."""
        problem = ""
        if self._world.is_rank0 and not self._run.is_current_attempt(self._attempt):
            problem = "superseded"
        for name, tensor in staged.tensors.items():
            if name.startswith("model.") and not bool(tensor.isfinite().all()):
                problem = problem or f"{name.removeprefix('model.')} is not finite"
        problems = [text for text in all_gather_json(problem, self._world.checkpoint_group) if text]
        if "superseded" in problems:
            raise Superseded("a newer attempt holds the run", self._run.path)
        if problems:
            remedy = "Lower `base_lr` or lengthen `warmup`."
            raise Diverged(f"weights have diverged: {problems[0]}", f"S = {samples_seen}", remedy=remedy)

    def _to_error(self, failure: RankFailure, path: Path, staged: StagedShard) -> FlipError:
        """The error for a save that failed, with sizes if more space may help. Collective."""
        what = f"the checkpoint could not be written: {failure.text}"
        remedy = ""
        if failure.is_transient:
            needed = sum(all_gather_json(staged.data.nbytes, self._world.checkpoint_group))
            what += f"; it takes {needed:,} bytes"
            if not self._url:
                what += f", {shutil.disk_usage(self._run.path).free:,} are free, and a second try failed as well"
            remedy = "Free space or fix the storage; the run continues from the checkpoint before."
        return failure.error_class(what, path, remedy=remedy)


class _SaveSteps:
    """The steps of one try to save, which all ranks take together, each by ``run_on_all``.

    Between ``write`` and ``write_commit_file`` the caller adds the ``files`` of the other ranks.
    """

    def __init__(
        self, world: World, path: Path, staged: StagedShard, record: dict[str, Any], start_time: float,
        retry_policy: RetryPolicy,
    ) -> None:  # fmt: skip
        self._world = world
        self._path = path
        self._staged = staged
        self._record = record
        self._start_time = start_time
        self._retry_policy = retry_policy
        self.remote: RemoteCheckpoint | None = None
        """Where the files are written, unless that is the run directory."""
        self.files: dict[str, dict[str, Any]] = {}
        """Name -> size and digest of each written file."""

    def write(self, address: str) -> None:
        """Write this rank's file. ``address``: of the files; empty: in the run directory."""
        if address:
            self.remote = RemoteCheckpoint(address, self._retry_policy)
        self.files.update(write_shard(self._path, self._staged.data, self._world.rank, self.remote))

    def write_commit_file(self) -> None:
        """Write commit.json, which rank 0 does."""
        if not self._world.is_rank0:
            return
        saving = time.perf_counter() - self._start_time
        record = self._record | {"world": self._world.size, "saving": saving}
        if self.remote is not None:
            record["url"] = self.remote.url
            self.remote.put(checkpoint_folder.COMMIT_FILE, to_json(record | {"files": self.files}).encode())
        checkpoint_folder.complete_checkpoint(self._path, record, self.files)

    def read_back(self) -> None:
        """Verify this rank's part of the checkpoint. Raises what ``verify`` raises."""
        verify(
            checkpoint_folder.read_checkpoint(self._path),
            self._retry_policy,
            part=self._world.rank,
            parts=self._world.size,
        )
