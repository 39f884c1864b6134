"""The callbacks of a user: classes that ``monitor.callbacks`` names (CONTRIBUTING.md, A metric of your own).

Their files are copied into the code snapshot when the run is submitted, and loaded from there. A class sees a
``TrainingView``, whose tensors it cannot write to. Its values join the all-reduce of the metric lines, so that it costs
no collective of its own. An error disables it on all ranks at the next metric line, whose all-reduce carries a flag for
it; only then, once, the ranks also exchange the text of the error.

The guard of a call is against mistakes, not against intent: a callback is code of the user, with the user's rights.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flip.common import user_classes
from flip.common.user_classes import UserClass
from flip.config.callback_names import ARGUMENTS, EVERY, VALUE, parse
from flip.config.schema import Config
from flip.data.loader import Batch
from flip.distributed.collectives import all_gather_json
from flip.distributed.parallel import World, local
from flip.training.callbacks import Callback, Training
from flip.training.grad_cache import PairFeatures

log = logging.getLogger(__name__)


class CallbackError(Exception):
    """A callback did what callbacks must not do. It disables the callback; the run goes on."""


class ModelView:
    """The weights of the model, as far as this rank holds them."""

    __slots__ = ("_training",)

    def __init__(self, training: Training) -> None:
        self._training = training

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, this rank's part of the parameter), with its part of the gradient as ``grad``, or None.

        A part may be empty. Parts share memory with the model: clone what must stay, and write to none.
        """
        for name, parameter in self._training.model.named_parameters():
            part = local(parameter.detach())
            if parameter.grad is not None:
                part.grad = local(parameter.grad.detach())
            yield name, part


class OptimizerView:
    """The state of the optimiser, as far as this rank holds it."""

    __slots__ = ("_training",)

    def __init__(self, training: Training) -> None:
        self._training = training

    @property
    def learning_rate(self) -> float:
        """The rate of the newest step."""
        return float(self._of_stage().param_groups[0]["lr"])

    def named_moments(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name of a parameter, its moments), for AdamW ``step``, ``exp_avg`` and ``exp_avg_sq``, for matrices of
        Muon ``momentum_buffer``; this rank's parts.

        No moments before the first step of a stage.
        """
        state = self._of_stage().state
        for name, parameter in self._training.model.named_parameters():
            moments = state.get(parameter, {})
            yield name, {moment: local(value.detach()) for moment, value in moments.items()}

    def _of_stage(self) -> torch.optim.Optimizer:
        if self._training.optimizer is None:
            raise CallbackError("there is no optimiser outside of a stage")
        return self._training.optimizer


class TrainingView:
    """What a callback sees of the training. Nothing of it can be set, and its tensors cannot be written to."""

    __slots__ = ("_model", "_optimizer", "_shards", "_training", "_world")

    def __init__(self, training: Training, world: World, replicate: int) -> None:
        self._training = training
        self._world = world
        self._model = ModelView(training)
        self._optimizer = OptimizerView(training)
        self._shards = world.size // max(1, replicate)

    @property
    def model(self) -> ModelView:
        """The weights and their gradients."""
        return self._model

    @property
    def optimizer(self) -> OptimizerView:
        """Learning rate and moments."""
        return self._optimizer

    @property
    def shards(self) -> int:
        """Number of parts into which weights, gradients and moments are split. The mean over ranks of this number times
        a sum over the own part is the sum over all elements."""
        return self._shards

    @property
    def samples_seen(self) -> int:
        """S: after the step in ``step``, before it in ``before_step``."""
        return self._training.samples_seen

    @property
    def step(self) -> int:
        """Steps of the run until S."""
        return self._training.step

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self._training.span.stage.name

    @property
    def loss(self) -> Tensor | None:
        """() of the newest step, over the global batch, on the device; None before the first step of an attempt."""
        return self._training.loss

    @property
    def accuracy(self) -> Tensor | None:
        """As ``loss``: share of images whose own caption is the nearest in the global batch."""
        return self._training.accuracy

    @property
    def batch(self) -> Batch | None:
        """This rank's part of the batch, in host memory (``flip.data.loader.Batch``): patches, keep_indices, tokens,
        ids, epochs. None in hooks other than ``step``."""
        return self._training.batch

    @property
    def features(self) -> PairFeatures | None:
        """The features of ``batch``, image and text, from which ``loss`` was computed, so that they cost no forward
        pass: (b, E) each, of norm 1. Row i belongs to sample ``batch.ids[i]``. None in hooks other than ``step``."""
        return self._training.features

    @property
    def rank(self) -> int:
        return self._world.rank

    @property
    def world_size(self) -> int:
        return self._world.size


class UserCallbacks(Callback):
    """Calls the classes of ``monitor.callbacks`` and combines their values over ranks. All methods are collective."""

    def __init__(self, config: Config, world: World) -> None:
        self._world = world
        self._replicate = config.compute.replicate
        self._members = [_Member(name) for name in parse(config.monitor.callbacks)]
        self._view: TrainingView | None = None
        self.disabled = list[str]()
        """A line for each class that the ranks have agreed to call no more: its name and why."""

    def start(self, training: Training) -> None:
        """Load the classes, and agree on those that all ranks could load."""
        if not self._members:
            return
        self._view = TrainingView(training, self._world, self._replicate)
        for member in self._members:
            member.load(training)
        rows = all_gather_json([[member.failure, member.layout] for member in self._members], self._world.control_group)
        for i, member in enumerate(self._members):
            failures = [row[i][0] for row in rows]
            if not any(failures) and any(row[i][1] != rows[0][i][1] for row in rows):
                failures[0] = "its attributes differ between the ranks"
            self._disable(member, failures)
        self._call("start", training)

    def start_stage(self, training: Training) -> None:
        self._call("start_stage", training)

    def before_step(self, training: Training) -> None:
        self._call("before_step", training, step=training.step + 1)

    def step(self, training: Training) -> None:
        self._call("step", training, step=training.step)

    def save(self, training: Training) -> None:
        self._call("save", training)

    def evaluate(self, training: Training) -> None:
        self._call("evaluate", training)

    def stop(self, training: Training) -> None:
        self._call("stop", training)

    def end(self, training: Training, phase: str, reason: str) -> None:
        self._call("end", training, phase, reason)

    def pending(self) -> list[float]:
        """The numbers of this rank since the last metric line, for an all-reduce: as many on every rank."""
        return [number for member in self._active() for number in member.pending()]

    def reduced(self, sums: Sequence[float], training: Training) -> dict[str, Any]:
        """The field ``callback`` of a metric line, from the sums over ranks of ``pending``; nothing without callbacks.

        ``pending`` starts again. Disables classes that have failed on a rank, for which the ranks exchange the texts of
        the errors.
        """
        if not self._members:
            return {}
        values = dict[str, float | None]()
        position = 0
        failed = list[_Member]()
        for member in self._active():
            count = len(member.pending())
            own = sums[position : position + count]
            position += count
            if own[0] > 0:
                failed.append(member)
            else:
                values |= member.combined(own[1:], training)
        if failed:
            rows = all_gather_json([member.failure for member in failed], self._world.control_group)
            for i, member in enumerate(failed):
                self._disable(member, [row[i] for row in rows])
        return {"callback": values}

    def _active(self) -> Iterable[_Member]:
        return [member for member in self._members if not member.disabled]

    def _call(self, hook: str, training: Training, *values: Any, step: int = 0) -> None:
        if self._view is None:  # there are none, or the attempt has failed before its start
            return
        for member in self._active():
            if step % member.every == 0:
                member.call(hook, self._view, training, *values)

    def _disable(self, member: _Member, failures: Sequence[str]) -> None:
        """Disable a class if it has failed on a rank. ``failures``: a text for each rank, empty without a failure."""
        ranks = [rank for rank, failure in enumerate(failures) if failure]
        if not ranks:
            return
        member.disabled = True
        text = f"{member.name.cls} is disabled: {failures[ranks[0]]} (rank {ranks[0]})"
        self.disabled.append(text)
        if self._world.is_rank0:
            log.warning("callback %s; the run goes on without it", text)


class _Member:
    """One class, on this rank. ``failure``: why it is not called here any more; ``disabled``: nor on any rank."""

    def __init__(self, name: UserClass) -> None:
        self.name = name
        self.failure = ""
        self.disabled = False
        self.every = EVERY
        self._names = list[str]()
        self._hooks = dict[str, Any]()
        self._reset()

    @property
    def layout(self) -> list[Any]:
        """Attributes that must be equal on all ranks."""
        return [self.every, self._names]

    def load(self, training: Training) -> None:
        """Import the file and create the object."""
        with self._failing("cannot be loaded"), _guard(training):
            loaded = getattr(user_classes.module(self.name), self.name.cls)()
            every = getattr(loaded, "every", EVERY)
            names = getattr(loaded, "values", ())
            if type(every) is not int or every < 1:
                raise CallbackError(f"every: needs a whole number from 1, not {every!r}")
            if isinstance(names, str) or not all(isinstance(name, str) and VALUE.fullmatch(name) for name in names):
                raise CallbackError(f"values: needs a tuple of names, not {names!r}")
            self.every = every
            self._names = list(dict.fromkeys(names))
            self._hooks = {hook: getattr(loaded, hook) for hook in ARGUMENTS if hasattr(loaded, hook)}
            self._reset()

    def call(self, hook: str, view: TrainingView, training: Training, *values: Any) -> None:
        """Call a hook; ``step`` adds what it returns to the pending values."""
        if self.failure or hook not in self._hooks:
            return
        with self._failing(f"{hook}() at step {training.step}"), _guard(training):
            result = self._hooks[hook](view, *values)
            if hook == "step" and result is not None:
                self._add(result)

    def pending(self) -> list[float]:
        """Whether it has failed here, then the sum and count of each value."""
        return [float(bool(self.failure)), *(number for name in self._names for number in self._sums[name])]

    def combined(self, sums: Sequence[float], training: Training) -> dict[str, float | None]:
        """Tag -> value of a metric line, from the sums over ranks; None for what is not finite. Starts again."""
        means = {name: sums[2 * i] / sums[2 * i + 1] for i, name in enumerate(self._names) if sums[2 * i + 1] > 0}
        self._reset()
        if "combine" in self._hooks:
            complete = len(means) == len(self._names) and not self.failure
            means = self._combine(means, training) if complete else {}
        return {f"{self.name.cls}/{name}": x if math.isfinite(x) else None for name, x in means.items()}

    def _combine(self, means: dict[str, float], training: Training) -> dict[str, float]:
        with self._failing(f"combine() at step {training.step}"), _guard(training):
            return _numbers(self._hooks["combine"](means))
        return {}

    def _reset(self) -> None:
        self._sums = {name: (0.0, 0) for name in self._names}

    def _add(self, result: object) -> None:
        numbers = _numbers(result)
        unknown = [name for name in numbers if name not in self._sums]
        if unknown:
            raise CallbackError(f"step returned {unknown[0]}, which `values` does not name")
        for name, number in numbers.items():
            total, count = self._sums[name]
            self._sums[name] = total + number, count + 1

    @contextlib.contextmanager
    def _failing(self, where: str) -> Iterator[None]:
        """Around code of the class: an error is logged, and is its failure on this rank."""
        try:
            yield
        except (Exception, SystemExit) as error:  # whatever a user's code raises, the run goes on
            self.failure = f"{where}: {type(error).__name__}: {error}"
            log.warning("callback %s, %s\n%s", self.name.cls, self.failure, traceback.format_exc())


def _numbers(result: object) -> dict[str, float]:
    """A mapping of names to numbers as floats. Waits for the device if they are tensors on it."""
    if not isinstance(result, Mapping):
        raise CallbackError(f"needs a dict of numbers, not {type(result).__name__}")
    for name in result:
        if not isinstance(name, str) or not VALUE.fullmatch(name):
            raise CallbackError(f"{name!r} is no name of a value")
    return {name: float(number) for name, number in result.items()}


@contextlib.contextmanager
def _guard(training: Training) -> Iterator[None]:
    """Around code of a user: no gradients are recorded, tensors of the training are read-only, collectives are refused,
    and the random generators have the same states after it as before.

    Saving and restoring the states takes less than comparing them, and a callback that draws numbers does no harm.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = []
    if torch.cuda.is_initialized():
        devices = [torch.cuda.current_device()]
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), _ReadOnly(_storages(training)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class _ReadOnly(TorchDispatchMode):
    """Refuses operations that write to one of the storages, and all collectives."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()
        self._storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "c10d" in func.namespace:
            raise CallbackError("a callback may not communicate: return values, which are averaged over the ranks")
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._check(args[i] if i < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _check(self, written: Any) -> None:
        if isinstance(written, Tensor):
            if written.numel() and _storage(written) in self._storages:
                raise CallbackError("a callback may not write to tensors of the training: clone them first")
        elif isinstance(written, (list, tuple)):
            for tensor in written:
                self._check(tensor)


def _storages(training: Training) -> set[int]:
    """The addresses of the memory of all tensors that a view shows."""
    tensors: list[Any] = [training.loss, training.accuracy, training.gradient_norm, *(training.batch or ())]
    tensors += training.features or ()
    for parameter in training.model.parameters():
        tensors += [parameter, parameter.grad]
    if training.optimizer is not None:
        for moments in training.optimizer.state.values():
            tensors += moments.values()
    return {_storage(tensor) for tensor in tensors if isinstance(tensor, Tensor)} - {0}


def _storage(tensor: Tensor) -> int:
    """The address of the memory of a tensor, or of this rank's part of one."""
    return int(getattr(tensor, "_local_tensor", tensor).untyped_storage().data_ptr())
