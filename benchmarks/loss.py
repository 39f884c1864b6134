"""The tiled contrastive loss compared with full logits, and with open_clip's loss if it is installed.

The work of one rank at local batch b and global batch B, forward and backward, with the features of all ranks given:
its b rows of the logits, fp32. ``kernels`` are counted on a fake process group. Each case runs in its own process, so
that peaks of memory are separate.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import importlib.util
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any

from benchmarks.lib import results
from benchmarks.lib.results import rounded
from flip.model_costs import LOSS_TILE, loss_bytes
from jobs.measuring.functions.peak_memory import peak_bytes, start_peak

WIDTH = 512
"""E of B/16."""
TILES = 256, LOSS_TILE, 4096
DENSE_MATRICES = 6
"""Matrices b x B at the peak of the loss with full logits (measured): two of logits, and their softmax and
gradients."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=int, nargs="+", default=[4096, 8192], help="b (default: %(default)s)")
    batches = [8192, 16_384, 65_536]
    parser.add_argument("--batch", type=int, nargs="+", default=batches, help="B (default: %(default)s)")
    parser.add_argument("--tiles", type=int, nargs="+", default=TILES, help="columns at once (default: %(default)s)")
    parser.add_argument("--tf32", action="store_true", help="products in TF32 instead of fp32, on CUDA")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="medians are over these (default: %(default)s)")
    results.options(parser, "loss")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.local = [256]
        chosen.batch = [256, 512]
        chosen.repeats = 1
    rows = [row for b in chosen.local for batch in chosen.batch if b <= batch for row in at(b, batch, chosen)]
    facts = results.machine() | device(chosen.device) | results.versions(["open_clip_torch"])
    report = {"benchmark": "loss", "machine": facts, "device": chosen.device, "E": WIDTH, "cases": rows}
    report |= {"farthest_from_float64": rounded(farthest(chosen.seed))}
    results.publish(report, chosen)
    return 0


def device(name: str) -> dict[str, str]:
    import torch

    return {"torch": torch.__version__} | ({"card": torch.cuda.get_device_name()} if name == "cuda" else {})


def at(b: int, batch: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """All forms at one size: kernels, milliseconds, their ratio to full logits, and memory without the features."""
    from tests.flip.distributed.rehearsal import loss_operations

    forms = {"whole": 0} | {f"tiles of {tile}": tile for tile in chosen.tiles if tile <= batch}
    if b == batch and importlib.util.find_spec("open_clip"):
        forms["open_clip"] = 0
    fits = DENSE_MATRICES * 4 * b * batch <= 0.6 * memory(chosen.device)
    times, extra = measured({name: tile for name, tile in forms.items() if tile or fits}, b, batch, chosen)
    rows = []
    for name, tile in forms.items():
        row = {"b": b, "B": batch, "form": name, "milliseconds": "does not fit"}
        row |= dict.fromkeys(["to_whole", "least", "most", "extra_MB", "predicted_MB", "kernels"], "")
        if tile:
            row["kernels"] = loss_operations(b, batch // b, WIDTH, tile)
            given = 4 * WIDTH * (batch + 2 * b)  # features that are there before: all texts, own images and texts
            row["predicted_MB"] = round((loss_bytes(b, batch // b, WIDTH, tile) - given) / 1e6)
        if name in times:
            row |= {"milliseconds": rounded(1000 * statistics.median(times[name])), "extra_MB": extra[name]}
        if "whole" in times and name in times:
            row |= results.ratio(times[name], times["whole"], "to_whole")
        rows.append(row)
    return rows


def measured(forms: dict[str, int], b: int, batch: int, chosen: argparse.Namespace) -> Any:
    """Seconds of each form in each round, in turn, and its MB. Each has its own process."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    extra: dict[str, int] = {}
    with ExitStack() as stack:
        context = get_context("spawn")
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for name in forms}
        for _ in range(chosen.repeats):
            for name, pool in pools.items():
                seconds, more = pool.submit(_case, name, forms[name], b, batch, chosen).result()
                times[name].append(seconds)
                extra.setdefault(name, round(more / 1e6))  # in later rounds, memory of the first may still be held
    return times, extra


def memory(device: str) -> int:
    """Memory of the machine or the GPU."""
    if device == "cpu":
        from flip.common.host import this_host

        return this_host().memory
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def _case(name: str, tile: int, b: int, batch: int, chosen: argparse.Namespace) -> tuple[float, int]:
    """Seconds of one forward and backward pass, and its peak bytes without the features."""
    import torch

    device = chosen.device
    torch.set_float32_matmul_precision("high" if chosen.tf32 else "highest")
    generator = torch.Generator().manual_seed(chosen.seed)
    shapes = (b, batch, batch)  # own images, all texts, and all images, which only the whole form needs
    image, texts, images = (
        torch.nn.functional.normalize(torch.randn(n, WIDTH, generator=generator), dim=1).to(device) for n in shapes
    )
    images[:b] = image
    leaves = [x.requires_grad_() for x in (image, texts, images, torch.tensor(14.3, device=device))]
    step = {"whole": _whole, "open_clip": _open_clip}.get(name, _tiles)
    step(torch, *(x[:64].detach().requires_grad_() if x.dim() else x for x in leaves), tile or 1)  # what starts once
    before = start_peak(device)
    start_time = time.perf_counter()
    step(torch, *leaves, tile)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_time, peak_bytes(device) - before


def farthest(seed: int, b: int = 512, tile: int = 96) -> float:
    """Largest relative error of the tiled loss and its gradients against the plain formula, in float64."""
    import torch

    from flip.models.tiled_loss import contrastive_loss

    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(b, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    leaves = [torch.nn.functional.normalize(each, dim=1).requires_grad_() for each in drawn]
    leaves.append(torch.tensor(14.3, dtype=torch.float64, requires_grad=True))
    image, text, scale = leaves
    logits = scale * image @ text.T
    own = torch.arange(b)
    cross_entropy = torch.nn.functional.cross_entropy
    plain = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    tiled, _ = contrastive_loss("clip", image, text, scale, tile=tile)
    tiled_grads, reference = ([value.detach(), *torch.autograd.grad(value, leaves)] for value in (tiled, plain))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(tiled_grads, reference, strict=True))


def _tiles(torch: Any, image: Any, texts: Any, images: Any, scale: Any, tile: int) -> None:
    from flip.loss_kinds import LOSSES
    from flip.models.tiled_loss import _TiledLoss

    loss, _ = _TiledLoss.apply(LOSSES["clip"], 0, tile, None, {}, image, texts, scale)
    torch.autograd.grad(loss, [image, texts, scale])


def _whole(torch: Any, image: Any, texts: Any, images: Any, scale: Any, tile: int) -> None:
    """Both full matrices of logits, as in trainers with a local loss."""
    own = torch.arange(len(image), device=image.device)
    to_text = scale * image @ texts.T
    to_image = scale * texts[: len(image)] @ images.T
    loss = (torch.nn.functional.cross_entropy(to_text, own) + torch.nn.functional.cross_entropy(to_image, own)) / 2
    torch.autograd.grad(loss, [image, texts, images, scale])


def _open_clip(torch: Any, image: Any, texts: Any, images: Any, scale: Any, tile: int) -> None:
    from open_clip.loss import ClipLoss

    torch.autograd.grad(ClipLoss()(image, texts[: len(image)], scale), [image, texts, scale])


if __name__ == "__main__":
    sys.exit(main())
