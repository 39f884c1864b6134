"""The curves of a run, for TensorBoard and other trackers: tag and description of each field of a metric line.

The x axis of every curve is S, samples seen, so that batch sizes can be compared. No torch.

TensorBoard sorts groups of curves by name: ``batch/`` comes first, with loss, accuracy and speed, then ``callback/``
and ``scores/``. All others are in ``system/``.
"""

from collections.abc import Mapping
from typing import Any

from flip.evaluation.metrics.result_files import curve
from flip.loss_kinds import all_parameters

CURVES = {
    "loss": ("batch/loss", "Loss of the global batch."),
    "accuracy": ("batch/accuracy", "Share of images whose own caption is the nearest in the global batch."),
    "classification_loss": ("system/classification_loss", "Loss of the text classification head, before its weight."),
    "lr": ("system/learning_rate", "Learning rate of the step."),
    "logit_scale": ("system/logit_scale", "Factor of the logits, after clamping."),
    **{name: (f"system/{name}", text) for name, text in all_parameters().items()},
    "grad_norm": ("system/grad_norm", "2-norm of all gradients, before clipping."),
    "param_norm": ("system/param_norm", "2-norm of all weights."),
    "update_norm": (
        "system/update_norm",
        "2-norm of the change of all weights in the step. Relative to param_norm: the step size.",
    ),
    "samples_per_second": (
        "batch/samples_per_second",
        "Training speed of all ranks together, without saves and evaluation.",
    ),
    "data_wait": ("system/data_wait_share", "Share of the steps' time in which the trainer waited for a batch."),
    "mfu": (
        "system/model_flops_utilisation",
        "Model FLOPs utilisation: FLOPs of the kept patches as a share of the dense datasheet peak of the GPU."
        " Three forward passes a step, in the precision of the run; null if no peak is known: CPUs, MIG slices, other"
        " cards, and fp32 without TF32.",
    ),
    "matmul_utilisation": (
        "system/matmul_utilisation",
        "FLOPs of the kept patches as a share of the speed of one large matrix product on this device, measured for"
        " 0.2 s at the start of the attempt. Not comparable between machines or with published MFU.",
    ),
    "masking_speedup": (
        "system/masking_speedup",
        "FLOPs of a pair without a mask divided by those with the mask of the stage: the speed-up at equal utilisation."
        " Calculated, not measured.",
    ),
    "memory": ("system/host_memory_peak_bytes", "Peak host memory of rank 0 so far, bytes."),
    "device_memory": (
        "system/device_memory_peak_bytes",
        "Peak GPU memory of rank 0 that PyTorch allocated since the last point, bytes.",
    ),
    "replaced": ("system/replaced_samples", "Samples so far that could not be decoded."),
    "kernel_share": (
        "system/kernel_share",
        "Share of the images of all ranks in this attempt of which the visible-patch kernel decoded the visible patches"
        " only. The log says why others were decoded as a whole.",
    ),
    "decoder_fallbacks": (
        "system/decoder_fallbacks",
        "Images of all ranks in this attempt that a decoder left to the next, slower decoder after an error.",
    ),
}
"""Field of a metric line -> (tag, description)."""

WITHOUT_CURVE = {
    "step": "Number of the step, from 1 over all stages.",
    "samples": "S after the step.",
    "stage": "Name of the stage.",
    "attempt": "Number of the attempt.",
    "seconds": "Training time of the run so far, over all attempts, without saves and evaluation; no step twice.",
    "time": "Unix time of the line.",
    "cpu_seconds": "CPU time of rank 0's process in this attempt, all threads, without loader processes.",
    "compiled_graphs": "Graphs that rank 0 has compiled in this attempt; more than 8 in a stage are a warning.",
    "bound": "What limits the speed in the last ten lines.",
    "verdict": "The sentence about it.",
    "saves": "Checkpoints of this attempt so far.",
    "saving": "Seconds that steps waited for saves in this attempt.",
    "save_wait": "Of these, seconds in which a save waited for the one before.",
}
"""Field of a metric line that is no curve -> description."""
NESTED = {
    "shares": "Parts of the time since the last line.",
    "storage": "Counters of the readers.",
    "callback": "Values of classes of your own, NAME/VALUE; only with monitor.callbacks.",
}
"""Field whose parts are curves -> description: ``TIME``, ``STORAGE``, and the values of a user's callbacks."""

TIME = {
    "data_wait": "Share of time in which rank 0 waited for a batch.",
    "compute": "Share of time for the rest of the steps.",
    "communication": "Share of time for communication in steps that does not overlap with compute.",
    "checkpoint": "Share of time in which saves blocked training.",
    "evaluation": "Share of time in which evaluation blocked training.",
    "other": "Share of time between steps.",
}
"""Part of ``shares`` -> description."""

STORAGE = {
    "requests": "Requests, second ones included.",
    "bytes": "Bytes received, with failed attempts.",
    "seconds": "Seconds in requests, without the pauses between them.",
    "hedged": "Second requests for a late range.",
    "hedges_won": "Second requests that were answered first.",
    "resumed": "Bytes of failed attempts that were not requested again.",
    "cap": "Current limit of concurrent requests.",
    "held": "Bytes of chunks that are held or requested now.",
    "cache_hits": "Chunks read from the caches of the nodes.",
    "cache_misses": "Chunks that the caches of the nodes did not have.",
    "cache_failures": "Cache files that were damaged, or could not be read or written.",
}
"""Counter of ``storage`` -> description; ``retries_KIND`` counts failed attempts of one kind."""

COUNTERS = ("replaced", "kernel_share", "decoder_fallbacks")
"""Fields whose curves start with their first count, as those of ``storage`` do: most counters of most runs stay 0."""


def describe(tag: str) -> str:
    """The description of a tag; empty if it is no curve of a run."""
    group, _, name = tag.partition("/")
    if group == "callback":
        return f"Value of the class {name.partition('/')[0]} in monitor.callbacks; mean over ranks and calls."
    if group == "scores":
        return f"Top-1 score on {name.removesuffix('_top1')}."
    if name.startswith("time/"):
        return TIME.get(name.removeprefix("time/").removesuffix("_share"), "")
    if name.startswith("storage/"):
        return _describe_counter(name.removeprefix("storage/"))
    return next((text for known, text in CURVES.values() if known == tag), "")


def _describe_counter(name: str) -> str:
    kind = name.removeprefix("retries_")
    if kind != name:
        text = f"Failed attempts to read, by cause: {kind}."
    else:
        text = STORAGE.get(name, "")
    if text:
        return f"{text} Sum over the ranks in this attempt."
    return ""


def scores(evaluations: list[dict[str, Any]]) -> dict[str, float]:
    """Tag -> top-1 of the results of one evaluation."""
    return {curve(item["name"]): item["top1"] for item in evaluations}


class CurvePoints:
    """Turns metric lines into points, in order: counters appear with their first count."""

    def __init__(self) -> None:
        self._counted: set[str] = set()

    def of(self, line: Mapping[str, Any]) -> dict[str, float]:
        """Tag -> value of one metric line."""
        points = {tag: line.get(field) for field, (tag, _) in CURVES.items() if field not in COUNTERS}
        points |= {f"callback/{name}": value for name, value in (line.get("callback") or {}).items()}
        points |= {f"system/time/{part}_share": share for part, share in (line.get("shares") or {}).items()}
        counts = {CURVES[field][0]: line.get(field) for field in COUNTERS}
        counts |= {f"system/storage/{name}": count for name, count in (line.get("storage") or {}).items()}
        self._counted |= {tag for tag, count in counts.items() if count}
        points |= {tag: count for tag, count in counts.items() if tag in self._counted}
        return {tag: value for tag, value in points.items() if value is not None}
