"""The command inspect: one sample, or a step of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flip.config import merge
from flip.config.derived import Span, spans
from flip.data.manifest.manifest import Manifest
from flip.data.mixture import Source, sources
from flip.runs.errors import DATA, ConfigError, DataError
from flip.runs.rundir import RunDir, read_record
from jobs.common.cluster_profile import roots
from jobs.common.text import plain
from jobs.runs import select
from tools.shards_commands import look
from tools.shards_commands.look import Found, Taken
from tools.shards_commands.output import Bar, Outcome, captions, lines, writing


def inspect(options: argparse.Namespace) -> Outcome:
    """What stands at an id of a manifest, or at a step of a run."""
    if options.run:
        if options.manifest or options.id is not None or options.save or options.captions:
            raise ConfigError(
                "a manifest, --id, --captions and --save do not go with --run", remedy="Ask for one or the other."
            )
        return _step(options)
    if options.step is not None or options.samples is not None:
        raise ConfigError("--step and --samples are of a run", remedy="Name it: --run RUN_DIR")
    if not options.manifest or options.id is None:
        raise ConfigError("what shall be looked at?", remedy="Give MANIFEST --id N, or --run RUN_DIR --step T.")
    found = look.sample(Manifest.load(options.manifest), options.id, captions(options))
    saved = _save(found, options.save) if options.save else {}
    report = {name: value for name, value in asdict(found).items() if name != "image"} | saved
    return Outcome(report, DATA if found.damage else 0, _sample_text(report))


def _save(found: Found, path: str) -> dict[str, Any]:
    if found.image is None:
        raise ConfigError("this sample has no image to save", f"sample {found.id}", sorted(found.members))
    with writing(path):
        try:
            with open(path, "xb") as file:
                file.write(found.image[1])
        except FileExistsError:
            raise ConfigError("the file is there already", path, remedy="Name another one for --save.") from None
    return {"saved": path}


def _sample_text(report: dict[str, Any]) -> str:
    shown = {name: value for name, value in report.items() if value not in (None, {}, []) or name == "excepted"}
    return "\n".join(lines(shown | {name: str(report[name]) for name in ("id", "ordinal", "chunk")}))


def _run(typed: str) -> RunDir:
    """By the path of its folder, or as sweep/run below FLIP_RUNS."""
    return RunDir(typed) if Path(typed).is_dir() else select.select_one(typed, roots())


def _same_data(run: RunDir, sources: Sequence[Source], start: int) -> None:
    """Raises DataError where a manifest was made anew since the run was submitted: its ids are other samples.

    ConfigError where the run had other data at S = ``start``.
    """
    try:
        stored = read_record(run.identity) or {}
        data, before = stored["config"]["data"], stored.get("before", [])
        submitted = [one["manifest"] for one in data.get("sets") or [data]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # none, or damaged: it tells nothing
    for one in before:
        if start < one["samples"]:
            what = f"until S = {one['samples']} the run had other data"
            was = "; ".join(f"{change['key']} {change.get('was')}" for change in one.get("changes", ()))
            raise ConfigError(what, str(run.identity), was, "Look into that manifest: inspect MANIFEST --id N.")
    for was, source in zip(map(str, submitted), sources, strict=False):
        if was.startswith("digest:") and was != f"digest:{source.manifest.digest}":
            remedy = "Bring the run's manifest back to where its config.yaml says."
            what = "not the manifest that the run was submitted with"
            raise DataError(what, str(source.manifest.folder), source.manifest.digest, remedy)


def _step(options: argparse.Namespace) -> Outcome:
    run = _run(options.run)
    if not run.config.is_file():
        raise ConfigError("no run here: config.yaml is missing", str(run.path), remedy="Give the folder of a run.")
    config = merge.read(run.config)
    span, start = _place(spans(config), options.step, options.samples)
    sets = sources(config.data)
    _same_data(run, sets, start)
    taken = list[Taken]()
    with Bar("reading", "") as bar:
        for one in look.batch(config, sets, start, span.stage.batch, options.read):
            taken.append(one)
            bar(len(taken), span.stage.batch)
    report = {
        "run": str(run.path),
        "manifest": ", ".join(str(one.manifest.folder) for one in sets),
        "stage": span.stage.name,
        "step": (start - span.start) // span.stage.batch + _steps_before(spans(config), span) + 1,
        "samples_before": start,
        "samples_after": start + span.stage.batch,
        "read": options.read,
        "replaced": sum(one.stands_for is not None for one in taken),
    }
    text = "\n".join([*lines(report), "", *(_row(one) for one in taken)])
    return Outcome(report | {"batch": [one._asdict() for one in taken]}, 0, text)


def _row(one: Taken) -> str:
    place = f"lane {one.lane}  id {one.id}  visit {one.visit}  {plain(Path(one.shard).name)}, sample {one.ordinal}"
    instead = f"  (for id {one.stands_for})" if one.stands_for is not None else ""
    return f"{place}{instead}" + (f"  {plain(one.caption)}" if one.caption is not None else "")


def _steps_before(all_spans: list[Span], span: Span) -> int:
    return sum(one.steps for one in all_spans if one.end <= span.start)


def _place(all_spans: list[Span], step: int | None, samples: int | None) -> tuple[Span, int]:
    """The stage of a step, and S before it. ``samples``: S after it, or any number that it passed over."""
    if step is None and samples is None:
        raise ConfigError("which step?", remedy="Give --step T or --samples S, as in metrics/*.jsonl.")
    for span in all_spans:
        before = _steps_before(all_spans, span)
        if step is not None and before < step <= before + span.steps:
            return span, span.start + (step - before - 1) * span.stage.batch
        if samples is not None and span.start < samples <= span.end:
            return span, span.start + (samples - span.start - 1) // span.stage.batch * span.stage.batch
    last = all_spans[-1]
    name, value, top = (
        ("--step", step, _steps_before(all_spans, last) + last.steps)
        if step is not None
        else ("--samples", samples, last.end)
    )
    raise ConfigError(f"the run's are 1 .. {top}", name, value)
