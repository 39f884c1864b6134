"""Scores of an evaluation compared with CLIP_benchmark's functions on the same features: equality and speed.

Zero-shot classification as on ImageNet (50,000 images, 1000 classes), retrieval as on COCO (5,000 images with five
captions each). Features are random: each near to its class or image, and normalised; encoding, which costs both the
same, is left out. Each form runs in its own process, so that peaks of memory are separate; all score in turn.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from multiprocessing import get_context
from typing import Any, NamedTuple

from benchmarks.lib import results
from benchmarks.lib.results import rounded
from jobs.measuring.functions.peak_memory import peak_bytes, start_peak

OURS = "ours"
PEER = "clip_benchmark"
WIDTH = 512
CAPTIONS = 5
BATCH = 256
"""E; captions per image; images per batch of the peer."""
NEAR = 0.25
CAPTION_NEAR = 0.22
"""Noise per dimension of a feature, relative to length 1: some features are nearest to a wrong class."""
AMONG = 1, 5, 10


class Task(NamedTuple):
    """``second``: classes, or captions of all images."""

    name: str
    images: int
    second: int
    seed: int
    threads: int


class Scored(NamedTuple):
    seconds: float
    extra: int
    """Peak bytes, without the features."""
    shares: dict[str, float]
    """Metric -> value, 0 to 1."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="of zero-shot (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--retrieved", type=int, default=5000, help="images of retrieval (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="medians are over these (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of each (default: all cores)")
    results.options(parser, "evaluation")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.images = 300
        chosen.classes = 20
        chosen.retrieved = 60
        chosen.repeats = 1
        chosen.threads = 1
    facts = results.machine()
    more = chosen.seed, chosen.threads or facts["cores"]
    tasks = [
        Task("zero-shot", chosen.images, chosen.classes, *more),
        Task("retrieval", chosen.retrieved, CAPTIONS * chosen.retrieved, *more),
    ]
    report = {
        "benchmark": "evaluation", "machine": facts, "E": WIDTH, "threads": more[1],
        "versions": results.versions(["torch", "clip_benchmark"]),
        "tasks": {task.name: compare(task, chosen.repeats) for task in tasks},
    }  # fmt: skip
    results.publish(report, chosen)
    return 0


def compare(task: Task, rounds: int) -> dict[str, Any]:
    """Both forms at one task: milliseconds, samples per second, memory, and the difference of their results."""
    scores: dict[str, list[Scored]] = {OURS: [], PEER: []}
    with ExitStack() as stack:
        context = get_context("spawn")
        pools = {form: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for form in scores}
        for _ in range(rounds):
            for form, pool in pools.items():
                scores[form].append(pool.submit(scored, form, task).result())
    own_shares, peer_shares = (scores[form][0].shares for form in (OURS, PEER))
    times = {form: [outcome.seconds for outcome in each] for form, each in scores.items()}
    rows = []
    for form, each in scores.items():
        seconds = statistics.median(times[form])
        row = {"form": form, "milliseconds": rounded(1000 * seconds), "samples_per_s": rounded(task.images / seconds)}
        row |= {"extra_MB": round(each[0].extra / 1e6)}  # in later rounds, memory of the first may still be held
        rows.append(row | results.ratio(times[PEER], times[form], "times_as_fast"))
    return {
        "images": task.images, "classes" if task.name == "zero-shot" else "captions": task.second,
        "forms": rows, "shares": own_shares,
        "farthest": max(abs(own_shares[name] - peer_shares[name]) for name in own_shares | peer_shares),
    }  # fmt: skip


def scored(form: str, task: Task) -> Scored:
    """The task once, in this process."""
    score = _ready(form, task)
    before = start_peak()
    start_time = time.perf_counter()
    shares = score()
    return Scored(time.perf_counter() - start_time, peak_bytes() - before, shares)


@cache
def _ready(form: str, task: Task) -> Callable[[], dict[str, float]]:
    """The function to measure; features and libraries are loaded before."""
    import torch

    torch.set_num_threads(task.threads)
    functions = {"zero-shot": zero_shot, "retrieval": retrieval}[task.name](task)
    small = Task(task.name, 40, 200 if task.name == "retrieval" else 20, task.seed, task.threads)
    {"zero-shot": zero_shot, "retrieval": retrieval}[task.name](small)[form]()
    return functions[form]


def zero_shot(task: Task) -> dict[str, Callable[[], dict[str, float]]]:
    import torch
    from clip_benchmark.metrics import zeroshot_classification as peer_module

    from flip.evaluation.tasks.zero_shot import classify

    # NumPy 2.4 does not take an array of one element for a number any more, which the peer relies on
    peer_module.float = lambda array: array.item()
    generator = torch.Generator().manual_seed(task.seed)
    classes = torch.nn.functional.normalize(torch.randn(task.second, WIDTH, generator=generator), dim=1)
    labels = torch.randint(task.second, (task.images,), generator=generator)
    features = _near(classes[labels], NEAR, generator)

    def own() -> dict[str, float]:
        scores = classify(features, labels, classes, "drawn")
        return {name: scores[name] for name in ("top1", "top5")}

    def peer() -> dict[str, float]:
        batches = list(zip(features.split(BATCH), labels.split(BATCH), strict=True))
        logits, target = peer_module.run_classification(_Table(features), classes.T, batches, "cpu", amp=False)
        return dict(zip(("top1", "top5"), peer_module.accuracy(logits, target, topk=(1, 5)), strict=True))

    return {OURS: own, PEER: peer}


def retrieval(task: Task) -> dict[str, Callable[[], dict[str, float]]]:
    import torch
    from clip_benchmark.metrics import zeroshot_retrieval as peer_module

    from flip.evaluation.tasks.retrieval import retrieve

    generator = torch.Generator().manual_seed(task.seed)
    images = torch.nn.functional.normalize(torch.randn(task.images, WIDTH, generator=generator), dim=1)
    owners = torch.arange(task.images).repeat_interleave(CAPTIONS)
    captions = _near(images[owners], CAPTION_NEAR, generator)
    order = torch.arange(len(captions)).reshape(task.images, CAPTIONS)

    def own() -> dict[str, float]:
        scores = retrieve(images, captions, owners, "drawn")
        return {f"{side} @{k}": scores[side][f"top{k}"] for side in ("text", "image") for k in AMONG}

    def peer() -> dict[str, float]:
        batches = [(images[rows], order[rows].tolist()) for rows in torch.arange(task.images).split(BATCH)]
        scores = peer_module.evaluate(
            _Table(captions), batches, torch.tensor, "cpu", amp=False, recall_k_list=list(AMONG)
        )
        return {f"{side} @{k}": scores[f"{side}_retrieval_recall@{k}"] for side in ("text", "image") for k in AMONG}

    return {OURS: own, PEER: peer}


class _Table:
    """A model for clip_benchmark: an image is its features, a text is the index of its features."""

    def __init__(self, texts: Any) -> None:
        self.texts = texts

    def encode_image(self, features: Any) -> Any:
        return features

    def encode_text(self, at: Any) -> Any:
        return self.texts[at]


def _near(what: Any, noise: float, generator: Any) -> Any:
    import torch

    drawn = torch.randn(what.shape, generator=generator)
    return torch.nn.functional.normalize(what + noise * drawn, dim=1)


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    sys.exit(main())
