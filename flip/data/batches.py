"""``flip.batches``: the loader for any training loop (docs/batches.md).

The n-th batch is a function of manifest, seed, lanes, block and the arguments of its view. The position is one
integer, S, the number of samples seen by all ranks.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch.utils.data import IterableDataset

from flip.concurrency import data_loader_workers
from flip.config.loop_config import loop_config, path_text, whole_number
from flip.config.schema import TextTower
from flip.data.loader import Batch, Loader
from flip.data.worker import WorkerConfig
from flip.runs.errors import ConfigError
from flip.tokenizer import Tokenizer

_WORKERS_REMEDY = "Use DataLoader(..., batch_size=None, num_workers=0), and flip.batches(..., workers=N)."


def batches(
    manifest: str | os.PathLike[str], *, batch: int, start: int = 0, mask: str = "0.5", size: int = 224,
    patch: int = 16, tokenizer: str | os.PathLike[str] | None = None, length: int = 77, seed: int = 0, rank: int = 0,
    world: int = 1, workers: int = 0, augment: Mapping[str, Any] | None = None, lanes: int | None = None,
    block: int | None = None, patch_masking: str = "uniform", **data: Any,
) -> BatchStream:  # fmt: skip
    """An endless iterator over this rank's part of global batches, exactly resumable at any batch.

    Args:
        manifest: folder that ``flip shards index`` wrote; "" for several data sets, which ``sets`` then names:
            sets=[{"name": "a", "manifest": FOLDER, "weight": 3}, ...].
        batch: B, samples of a batch of all ranks together; a rank gets B / ``world``.
        start: S, samples that all ranks have seen: ``samples_seen`` of the last batch of an earlier loop.
        mask: share of patches to hide, a decimal number; "0": none, so that ``Batch.images()`` can be used.
        size: side of an image, pixels.
        patch: side of a patch, pixels; divides ``size``.
        tokenizer: a tokenizer.json, or CLIP's published file of byte pairs. None: ``Batch.texts`` has the captions.
        length: tokens of a caption, cut or padded with id 0.
        seed: of order, crops, masks and choice of captions, 0 .. 2^64 - 1.
        rank: number of this process among ``world`` processes, which must have the same other arguments.
        world: number of processes; divides the lanes.
        workers: loader processes of this rank; 0: load in this process. Batches do not depend on it.
        augment: fields of ``augment`` (flip/config/schema.py), for example {"flip": 0, "crop_area": [0.2, 1.0]}.
        lanes: L, parallel streams of samples. Default: the most, at most 4096, that divide ``batch`` and leave the
            shuffle buffer of all ranks below 8 GiB. Another number is another order.
        block: Q, chunks of a lane that are shuffled together; 4 by default. Another number is another order.
        patch_masking: which patches are hidden, a row of ``PATCH_MASKINGS``: "uniform", "block" or "grid".
        data: further fields of ``data`` (flip/config/schema.py), for example ``captions=["json:caption"]``;
            ``captions=[]`` reads none.

    Raises ConfigError for arguments that are invalid or do not fit each other, DataError or PermissionDenied if the
    manifest or the tokenizer cannot be read. The iterator raises DataError or StorageError, also those of workers.
    """
    request = _Request(
        path_text(manifest), batch, whole_number("start", start, 0), rank, world, lanes, block, tokenizer, data,
        {
            "seed": seed, "model.image": {"size": size, "patch": patch}, "augment": {} if augment is None else augment,
            "data.workers": workers, "stages.loop.mask": mask, "stages.loop.patch_masking": patch_masking,
            "model.text": {"length": length, "prepend_cls": True, "repair": True},
        },
    )  # fmt: skip
    return BatchStream(request)


@dataclass(frozen=True)
class _Request:
    """The arguments of ``batches``."""

    manifest: str
    batch: int
    start: int
    rank: int
    world: int
    lanes: int | None
    block: int | None
    tokenizer: str | os.PathLike[str] | None
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    """The others, by dotted keys of a configuration."""

    def loader(self) -> tuple[Loader, str, str]:
        """The loader, the mask in canonical form, and ``patch_masking``.

        Raises ConfigError, DataError or PermissionDenied.
        """
        settings = dict(self.settings)
        settings |= {f"data.{name}": value for name, value in self.data.items()}
        has_captions = self.data.get("captions") != []
        if not has_captions:
            del settings["data.captions"]
        if self.tokenizer is not None:
            settings["data.tokenizer"] = path_text(self.tokenizer)
        config = loop_config(
            self.manifest, self.batch, self.start, self.rank, self.world, self.lanes, self.block, settings
        )
        if not has_captions:
            config.data.captions = []
        text = self._text(config.model.text, config.data.tokenizer)
        stage = config.stages[0]
        loader = Loader(replace(WorkerConfig.of(config), text=text), self.rank, self.world)
        return loader, stage.mask, stage.patch_masking

    def _text(self, text: TextTower, tokenizer: str) -> TextTower:
        """The text tower of the tokenizer's kind, or without one of length 0."""
        if self.tokenizer is None:
            return replace(text, length=0)
        kind = Tokenizer(tokenizer, text.length, text.prepend_cls, text.repair).kind
        return replace(text, causal=kind.has_end)


class BatchStream(IterableDataset[Batch]):
    """What ``flip.batches`` returns: an iterator over ``Batch``, with a state.

    Also an iterable data set for ``torch.utils.data.DataLoader(stream, batch_size=None)`` without workers of its own.
    Iterating again goes on where the last loop ended. ``close``, or the end of a ``with`` block, ends the workers.
    """

    def __init__(self, request: _Request) -> None:
        self._request = request
        self._loader, self._mask, self._patch_masking = request.loader()
        self._batches: Generator[Batch, None, None] | None = None
        self._finish: Callable[[], object] = self._loader.close
        self.samples_seen = request.start
        """S after the last batch that was delivered. Batches that workers have prepared in advance do not count."""

    @property
    def digest(self) -> str:
        """Digest of the manifest: it changes with every sample, exception or chunk size."""
        return self._loader.digest

    @property
    def lanes(self) -> int:
        """L."""
        return self._loader.config.data.lanes

    @property
    def block(self) -> int:
        """Q."""
        return self._loader.config.data.block

    def __iter__(self) -> Iterator[Batch]:
        if data_loader_workers():
            what = "a worker of a DataLoader would repeat the batches of the others"
            raise ConfigError(what, "DataLoader(num_workers=...)", data_loader_workers(), _WORKERS_REMEDY)
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._loader.batches(
                self.samples_seen, self._request.batch, self._mask, patch_masking=self._patch_masking
            )
            self._finish = weakref.finalize(self, self._batches.close)  # also at the end of the program
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()  # the next call starts again at ``samples_seen``
            raise
        self.samples_seen = batch.samples_seen
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint: S after the last batch delivered, and what determines the order of samples.

        If something between this iterator and the training step holds batches, such as a prefetcher to a GPU, put
        ``samples_seen`` of the last batch that was trained in place of its own.
        """
        return {"samples_seen": self.samples_seen, **self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a state, with any number of ranks and workers that the lanes permit.

        Lanes and block come from the state. Raises ConfigError if the state is of another manifest or seed, if lanes
        or block were given and differ, or if the numbers do not fit.
        """
        own = self._order()
        for name in ("samples_seen", *own):
            if name not in state:
                what = f"no state of flip.batches: {name} is missing"
                raise ConfigError(what, "load_state_dict", sorted(state), "Give what state_dict() returned.")
        given = {"lanes": self._request.lanes, "block": self._request.block}
        for name, value in own.items():
            if given.get(name, value) is not None and state[name] != value:
                raise _other_state(name, value, state[name])
        start = whole_number("samples_seen", state["samples_seen"], 0)
        request = replace(self._request, start=start, lanes=state["lanes"], block=state["block"])
        loader, _, _ = request.loader()
        self.close()
        self._request = replace(self._request, start=start)
        self._loader = loader
        self.samples_seen = start

    def close(self) -> None:
        """End the workers. The next batch starts them again."""
        self._batches = None
        self._finish()
        self._loader.close()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        what = "a stream of batches cannot be sent to another process"
        raise ConfigError(what, "DataLoader(num_workers=...)", remedy=_WORKERS_REMEDY)

    def _order(self) -> dict[str, Any]:
        """What determines the order of samples."""
        config = self._loader.config
        return {
            "manifest": self.digest, "seed": config.seed, "lanes": self.lanes, "block": self.block,
            "order": self._loader.order_number,
        }  # fmt: skip


def _other_state(name: str, own: Any, found: Any) -> ConfigError:
    """The error for a state that does not continue the order of this stream."""
    remedies = {
        "manifest": "Name the manifest of that loop, or start anew with start=0.",
        "order": "Continue with the release that wrote the state.",
        "seed": f"Pass seed={found}.",
    }
    remedy = remedies.get(name, f"Leave {name} out, or pass {name}={found}.")
    return ConfigError(
        f"the state is of another order: here {name} is {own}", f"load_state_dict, {name}", found, remedy
    )
