"""The command bench."""

from __future__ import annotations

import argparse
import math
from typing import Any

from flip.data.manifest.manifest import Manifest
from flip.runs.errors import COMPLETE, ConfigError
from tools.shards_commands import bench_library as benches
from tools.shards_commands.output import Outcome, captions


def bench(options: argparse.Namespace) -> Outcome:
    """What each stage of the data's way costs a core here."""
    if not 0 <= options.want < math.inf:
        raise ConfigError("must be a number, and not negative", "--want", options.want)
    manifest = Manifest.load(options.manifest)
    members, sizes = captions(options), (options.size, options.patch)
    spec = benches.spec_of(manifest, members, options.decoder, options.resize, *sizes, options.seed)
    if options.resize == "torchvision":
        import torch

        torch.set_num_threads(1)  # as a loader process does
    stages = benches.bench(manifest, spec, options.mask, options.seconds)
    verdict = benches.judge(stages, manifest.mean_bytes, options.want)
    rows = [
        {
            "stage": one.name,
            "samples_per_second": round(one.rate, 1),
            "megabytes_per_second": round(one.bytes / 1e6 / one.seconds, 1),
            "us_per_sample": round(one.wall_us, 1),
            "cpu_us_per_sample": round(one.cpu_us, 1),
            "samples": one.samples,
            "skipped": one.skipped,
        }
        for one in stages
    ]
    report = {
        "manifest": str(manifest.folder),
        "decoder": options.decoder,
        "resize": options.resize,
        "size": options.size,
        "stages": rows,
        "limit": verdict.limit,
        "shares": {name: round(share, 3) for name, share in verdict.shares.items()},
        "samples_per_second_per_worker": round(verdict.per_worker, 1),
        "reads_may_be_cached": benches.cached(manifest),
    }
    if options.want:
        needed = verdict.wanted_bytes / 1e6
        report |= {"want": options.want, "workers": verdict.workers, "megabytes_per_second_needed": round(needed, 1)}
    return Outcome(report, COMPLETE, _bench_text(report))


def _bench_text(report: dict[str, Any]) -> str:
    lines = [f"{'stage':8}{'samples/s':>12}{'MB/s':>10}{'us/sample':>12}{'of them CPU':>13}"]
    for one in report["stages"]:
        lines.append(
            f"{one['stage']:8}{one['samples_per_second']:>12,.0f}{one['megabytes_per_second']:>10,.1f}"
            f"{one['us_per_sample']:>12,.0f}{one['cpu_us_per_sample']:>13,.0f}"
        )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report["shares"].items())
    lines += [
        "(read: bytes from the storage alone; walk: tar headers in memory; decode: images in memory; "
        "whole: all that a worker does but the tokenizer)",
        f"{report['limit']} limits: of a sample's time {shares}",
        f"one worker on a core of its own: {report['samples_per_second_per_worker']:,.0f} samples/s",
    ]
    if report["reads_may_be_cached"]:
        lines.append(
            "These shards fit into this machine's memory: reads may have come from there and not from the storage."
        )
    if "want" in report:
        lines.append(
            f"{report['want']:,.0f} images/s take {report['workers']:,} workers, as many cores, "
            f"and {report['megabytes_per_second_needed']:,.0f} MB/s of the storage"
        )
    return "\n".join(lines)
