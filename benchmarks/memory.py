"""Memory of a training step: predicted by ``flip.model_costs``, and measured.

One step of one process: B/16 at three batches and three mask ratios, after a small step that creates the optimiser's
state. On a CPU the measured value is the peak of a separate process above its memory after imports, on CUDA the peak of
the allocator.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks.lib import results
from benchmarks.lib.results import rounded
from benchmarks.loss import device
from flip import model_costs
from flip.config.derived import visible_patch_count
from flip.config.schema import MODEL_PRESETS, Augment, Compute, ImageTower, Model, Optim, TextTower
from jobs.measuring.functions.peak_memory import peak_bytes, start_peak

LARGER = 128, 256, 512
"""b on a GPU."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(MODEL_PRESETS), default="B/16")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="b (default: %(default)s)")
    parser.add_argument("--mask", nargs="+", default=["0", "0.5", "0.75"], help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    ways = "no", "selective", "block"
    parser.add_argument("--recompute", nargs="+", choices=ways, default=ways, help="(default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default: %(default)s)")
    results.options(parser, "memory")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.size = "tiny"
        chosen.batch = [4]
        chosen.mask = ["0.5"]
        chosen.recompute = ["no", "selective"]
    rows = [row for recompute in chosen.recompute for row in cases(chosen, chosen.device, chosen.batch, recompute)]
    report: dict[str, Any] = {
        "benchmark": "memory", "machine": results.machine() | device(chosen.device), "size": chosen.size,
        "precision": chosen.precision, "attention": attention(chosen.device, chosen.precision),
        "device": chosen.device, "cases": rows,
        "farthest": rounded(max(abs(row["measured_to_predicted"] - 1) for row in rows)),
    }  # fmt: skip
    if chosen.device == "cpu":
        report["on_cuda"] = {"command": "make bench-gpu", "cases": cases(chosen, "cuda", LARGER, "no", measure=False)}
    results.publish(report, chosen)
    return 0


def attention(device: str, precision: str) -> str:
    if (device, precision) == ("cpu", "bf16"):
        return "explicit"
    return "sdpa"


def cases(
    chosen: argparse.Namespace, device: str, batches: Sequence[int], recompute: str, measure: bool = True
) -> list[dict[str, Any]]:
    """A row for each batch and mask ratio. Without ``measure``, only the prediction."""
    sized = MODEL_PRESETS[chosen.size]
    towers = {"image": ImageTower(**sized["image"]), "text": TextTower(**sized["text"])}
    model = Model(size=chosen.size, embed=sized["embed"], **towers)
    compute = Compute(
        device=device, precision=chosen.precision, attention=attention(device, chosen.precision),
        threads=chosen.threads, deterministic="no", recompute=recompute,
    )  # fmt: skip
    rows = []
    for b, mask in itertools.product(batches, chosen.mask):
        predicted = model_costs.device_memory(model, compute, b, mask)["total"]
        row = {"b": b, "mask": mask, "recompute": recompute, "predicted_MB": round(predicted / 1e6)}
        if measure:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                measured = pool.submit(_case, model, compute, b, mask, chosen.seed).result()
            row |= {"measured_MB": round(measured / 1e6), "measured_to_predicted": rounded(measured / predicted)}
            print(row, file=sys.stderr, flush=True)
        else:
            row |= {"measured_MB": "not measured"}
        rows.append(row)
    return rows


def _case(model: Model, compute: Compute, b: int, mask: str, seed: int) -> int:
    """Peak bytes of a step above those at rest, in this process."""
    import torch

    from flip.distributed import parallel
    from flip.models import clip as towers
    from flip.training import grad_cache, parameter_groups

    world = parallel.start(compute)
    generator = torch.Generator().manual_seed(seed)

    def once(pair: Any, of: Model, b: int, mask: str) -> None:
        optimizer = pair.optimizer
        optimizer.zero_grad(set_to_none=True)
        count = visible_patch_count(of.image, mask)
        patches = (of.image.size // of.image.patch) ** 2
        pixels = torch.randint(0, 256, (b, count, 3 * of.image.patch**2), dtype=torch.uint8, generator=generator)
        keep = torch.rand(b, patches, generator=generator).argsort(dim=1)[:, :count].sort(dim=1).values.to(torch.int16)
        tokens = torch.randint(0, of.text.vocabulary, (b, of.text.length), dtype=torch.int32, generator=generator)
        grad_cache.grad_cache_backward(pair, (pixels, keep, tokens), 1, world.device, parallel.autocast(compute, world))
        optimizer.step()

    def built(of: Model) -> Any:
        with torch.device("meta"):
            pair = towers.CLIPModel(of, Augment(), compute.attention, compute.recompute)
        parallel.apply_parallelism(pair, world, compute)
        towers.init_weights(pair, seed)
        pair.optimizer = parameter_groups.build(pair.named_parameters(), Optim())  # type: ignore[assignment]
        return pair

    row = MODEL_PRESETS["tiny"]
    small = Model(embed=row["embed"], image=ImageTower(**row["image"]), text=TextTower(**row["text"]))
    once(built(small), small, 4, "0.5")  # what libraries load at their first use
    before = start_peak(compute.device)
    pair = built(model)
    once(pair, model, 2, mask)
    once(pair, model, b, mask)
    return peak_bytes(compute.device) - before


if __name__ == "__main__":
    sys.exit(main())
