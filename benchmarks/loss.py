"""The contrastive loss in tiles beside the same with whole logits, and beside open_clip's where that is installed.

One rank's work at local batch b and global batch B, forward and backward, features of all ranks at hand: its b rows of
the logits, fp32. Each case runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import importlib.util
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks import results
from benchmarks.results import rounded
from flip.flops import LOSS_TILE, loss_bytes

WIDTH = 512
"""E of B/16."""
TILES = 256, LOSS_TILE, 4096
DENSE_MATRICES = 6
"""Matrices b x B of the whole form at its peak, two of logits and what their softmax and gradients take; measured."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=int, nargs="+", default=[4096, 8192], help="b (default: %(default)s)")
    whole = [8192, 16_384, 32_768, 65_536]
    parser.add_argument("--batch", type=int, nargs="+", default=whole, help="B (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="medians are over these (default: %(default)s)")
    results.options(parser, "loss")
    chosen = parser.parse_args(arguments)
    rows = [row for b in chosen.local for batch in chosen.batch if b <= batch for row in at(b, batch, chosen)]
    report = {"benchmark": "loss", "machine": results.machine() | device(chosen.device), "E": WIDTH, "cases": rows}
    results.publish(report, chosen)
    return 0


def device(name: str) -> dict[str, str]:
    import torch

    return {"torch": torch.__version__} | ({"card": torch.cuda.get_device_name()} if name == "cuda" else {})


def at(b: int, batch: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """All forms at one size: milliseconds, their ratio to the whole form's, and memory beside the features."""
    forms = [("whole", 0), *((f"tiles of {tile}", tile) for tile in TILES if tile < batch)]
    if b == batch and importlib.util.find_spec("open_clip"):
        forms.append(("open_clip", 0))
    rows = []
    for name, tile in forms:
        row = {"b": b, "B": batch, "form": name, "milliseconds": "", "to_whole": "", "extra_MB": "", "predicted_MB": ""}
        if tile:
            row["predicted_MB"] = round(loss_bytes(b, batch // b, WIDTH, tile) / 1e6)
        if not tile and DENSE_MATRICES * 4 * b * batch > 0.8 * memory(chosen.device):
            row["milliseconds"] = "does not fit"
        else:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                work = pool.submit(_case, name, tile, b, batch, chosen.device, chosen.repeats, chosen.seed)
                seconds, extra = work.result()
            row |= {"milliseconds": rounded(1000 * seconds), "extra_MB": round(extra / 1e6)}
        rows.append(row)
    base = rows[0]["milliseconds"]
    for row in rows:
        if isinstance(base, float) and isinstance(row["milliseconds"], float):
            row["to_whole"] = rounded(row["milliseconds"] / base)
    return rows


def memory(device: str) -> int:
    """Bytes of the machine or the card."""
    if device == "cpu":
        from flip.config.resolve import host

        return host().memory
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def _case(name: str, tile: int, b: int, batch: int, device: str, repeats: int, seed: int) -> tuple[float, int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = (b, batch, batch)  # own images, all texts, and all images, which only the whole form needs
    image, texts, images = (
        torch.nn.functional.normalize(torch.randn(n, WIDTH, generator=generator), dim=1).to(device) for n in shapes
    )
    images[:b] = image
    leaves = [x.requires_grad_() for x in (image, texts, images, torch.tensor(14.3, device=device))]
    step = {"whole": _whole, "open_clip": _open_clip}.get(name, _tiles)
    times = []
    step(torch, *(x[:64].detach().requires_grad_() if x.dim() else x for x in leaves), tile or 1)  # what starts once
    before = _peak(torch, device, reset=True)
    for _ in range(repeats):
        begin = time.perf_counter()
        step(torch, *leaves, tile)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2], _peak(torch, device) - before


def _peak(torch: Any, device: str, reset: bool = False) -> int:
    """Most bytes so far; with ``reset`` those of now, from which the peak is counted."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tiles(torch: Any, image: Any, texts: Any, images: Any, scale: Any, tile: int) -> None:
    from flip.contrastive import _Rows

    loss, _ = _Rows.apply(image, texts, scale, 0, tile, None)
    torch.autograd.grad(loss, [image, texts, scale])


def _whole(torch: Any, image: Any, texts: Any, images: Any, scale: Any, tile: int) -> None:
    """Both matrices of logits at once, as trainers with a local loss hold them."""
    own = torch.arange(len(image), device=image.device)
    to_text, to_image = scale * image @ texts.T, scale * texts[: len(image)] @ images.T
    loss = (torch.nn.functional.cross_entropy(to_text, own) + torch.nn.functional.cross_entropy(to_image, own)) / 2
    torch.autograd.grad(loss, [image, texts, images, scale])


def _open_clip(torch: Any, image: Any, texts: Any, images: Any, scale: Any, tile: int) -> None:
    from open_clip.loss import ClipLoss

    torch.autograd.grad(ClipLoss()(image, texts[: len(image)], scale), [image, texts, scale])


if __name__ == "__main__":
    sys.exit(main())
