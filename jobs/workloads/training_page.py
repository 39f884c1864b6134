"""A training as lines and tables of a dry run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

from flip.common.plain_data import ConfigChange, flatten
from flip.config.derived import missing_in_transformers, model_label
from flip.config.merge import to_dict
from flip.config.schema import MODEL_PRESETS, Config
from jobs.common.terminal import TextTable
from jobs.common.text import count, formatted, size
from jobs.planning.run_cost import Estimate

DROPPED = (
    "FLOPs", "steps", "peak lr", "passes", "kept", "a rank", "batch", "price", "mask", "s a step", "samples",
    "GPU-hours",
)  # fmt: skip
"""Columns that a narrow terminal does not show; the first one disappears first."""


def lines(config: Config, estimate: Estimate, against_base: Sequence[ConfigChange]) -> list[str | TextTable]:
    """Model, data and ranks of a resolved run, and a table of its stages."""
    numbers = estimate.numbers
    parameters = estimate.parameters
    data = numbers["data"]
    return [
        *_labelled("from base", _differences(config, against_base)),
        f"  model        {model_label(flatten(to_dict(config)))}: {count(parameters['total'])} parameters"
        f" (image {count(parameters['image'])}, text {count(parameters['text'])})",
        f"  export       {_exports(config)}",
        *_data(data),
        f"  ranks        {numbers['world']}, each with a buffer of {size(data['buffer_per_rank'])};"
        f" world sizes allowed: {_worlds(numbers['worlds'])}",
        *_labelled("nodes", estimate.nodes),
        TextTable(_stages(estimate), drop=DROPPED, indent="  "),
        *_steps(estimate),
    ]


def _stages(estimate: Estimate) -> list[dict[str, Any]]:
    """A row per stage."""
    rows = [
        {
            "stage": stage["name"],
            **cost.cells(),
            "batch": f"{stage['batch']:,}",
            "mask": _mask(stage),
            "px": stage["image"],
            "kept": f"{stage['kept']} of {stage['patches']}",
            "passes": _passes(stage["passes"]),
            "peak lr": f"{stage['lr']:.3g}",
            "a rank": size(device.memory["total"]),
            "s a step": formatted(device.step_seconds, ".3g"),
        }
        for stage, cost, device in zip(estimate.numbers["stages"], estimate.stages, estimate.devices, strict=True)
    ]
    if estimate.cost.gpu_hours:
        return rows
    return [{key: value for key, value in row.items() if key != "GPU-hours"} for row in rows]


def _mask(stage: Mapping[str, Any]) -> str:
    """The share of patches that are hidden, and which, unless any."""
    way = stage["patch_masking"].partition("@")[0]
    if way == "uniform":
        return str(stage["mask"])
    return f"{stage['mask']} {way}"


def _steps(estimate: Estimate) -> list[str]:
    """The parts of a step on GPUs, a line per stage."""
    lines = [
        f"{row['name']}: {step.compute_seconds:.3g} s arithmetic + {step.communication_seconds:.3g} s exposed"
        f" communication + {step.data_seconds:.3g} s wait for input; utilisation {100 * step.utilisation:.1f} %;"
        f" input needs {step.input_cores:.0f} cores a node"
        for row, device in zip(estimate.numbers["stages"], estimate.devices, strict=True)
        if (step := device.step) is not None
    ]
    return _labelled("a step", lines)


def _labelled(label: str, lines: Iterable[str]) -> list[str]:
    """The lines in one column, the label before the first."""
    labels = chain([label], repeat(""))
    return [f"  {label:<13}{line}" for label, line in zip(labels, lines, strict=False)]


def _data(data: dict[str, Any]) -> list[str]:
    sets = data["sets"]
    blocks = f"blocks of {data['block']}"
    lines = []
    for row in sets:
        line = f"{count(row['samples'])} samples, {_passes(row['passes'])} passes;"
        line += f" {row['lanes']} lanes, chunks of {row['chunk']}, {blocks}"
        if row["name"]:
            line += f"; {row['name']}, {row['lanes'] / data['lanes']:.3%} of every batch"
        lines.append(line)
    return _labelled("data", lines)


def _differences(config: Config, changes: Sequence[ConfigChange]) -> list[str]:
    """The differences from the base as lines, without those that follow from a different model.size."""
    filled = dict[str, Any]()
    lines = list[str]()
    if any(change.key == "model.size" for change in changes):
        filled = flatten(MODEL_PRESETS.get(config.model.size, {}), "model")
    removed = [change.key for change in changes if change.key.endswith(".name") and change.now is None]  # of a stage
    for change in changes:
        if change.key in removed:
            lines.append(f"{change.key.removesuffix('.name')}: removed")
        elif not change.key.startswith(tuple(key.removesuffix("name") for key in removed)) and (
            change.key not in filled or filled[change.key] != change.now
        ):
            lines.append(f"{change.key}: {_value(change.was)} -> {_value(change.now)}")
    return lines or ["no change"]


def _exports(config: Config) -> str:
    """The libraries that load the model."""
    if missing_in_transformers(config.model):
        return "open_clip and timm; for transformers: recipe clip"
    return "open_clip, timm and transformers"


def _passes(number: float) -> str:
    if number >= 1000:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        if value:
            return "yes"
        return "no"
    if value in (None, ""):
        return "none"
    return str(value)


def _worlds(worlds: list[int]) -> str:
    """A list of divisors, abbreviated if it is long."""
    if len(worlds) <= 14:
        return ", ".join(map(str, worlds))
    return ", ".join(map(str, [*worlds[:10], "...", *worlds[-2:]]))
