"""Where a run's first weights come from, if not from its seed: a commit of another run or an export (``init``).

A branch takes the weights alone and begins at S = 0. One that extends goes on at the S of the commit, with all that it
holds, as if the other run had been longer. No torch: submission finds the commit, the trainer opens it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flip.checkpoint import export_record
from flip.config import merge
from flip.config.derived import spans
from flip.config.identity import file_digest, flatten
from flip.config.merge import get
from flip.config.schema import Config, Init
from flip.runs import commit
from flip.runs.errors import ConfigError, DataError, PermissionDenied
from flip.runs.rundir import RunDir, load_record

#: Where these differ, the weights do not fit, or fit and mean something else.
_EQUAL = (
    "model.embed", "model.image.width", "model.image.layers", "model.image.heads", "model.text.width",
    "model.text.layers", "model.text.heads", "model.text.length", "model.text.vocabulary",
)  # fmt: skip
#: Where these differ, other weights are made of those there, which have no moments.
_MADE = ("model.image.patch", "model.objective")
#: Where these differ, the weights fit, and what they compute is another function: training has to make up for it.
_TOLD = (
    "model.image.size", "model.image.pool", "model.text.prepend_cls", "model.text.repair", "model.text.padding",
    "model.max_logit_scale", "augment.mean", "augment.std", "data.to_rgb", "evaluate.preprocess",
)  # fmt: skip


def agree(config: Config, source: Config, where: str, extend: bool = False) -> dict[str, list[object]]:
    """Key -> [there, here] of what differs and may. Raises ConfigError where ``config`` cannot begin from ``source``.

    Size and patch of the image may differ: positions are computed for the new grid, the patch weights resampled. The
    patch may not where ``extend``: moments go on as well. ``where``: what the source is called in errors.
    """
    for key in (*_EQUAL, *_MADE * extend):
        if get(config, key) != get(source, key):
            free = "image size, pool and texts" if extend else "image size, patch, pool, objective and texts"
            remedy = f"It must be {get(source, key)!r}, as there; what may differ is {free}."
            raise ConfigError(f"cannot begin from {where}", key, get(config, key), remedy)
    return {
        key: [get(source, key), get(config, key)] for key in (*_MADE, *_TOLD) if get(config, key) != get(source, key)
    }


def as_they_are(config: Config, source: Config) -> bool:
    """Whether all weights are those of the source."""
    return all(get(config, key) == get(source, key) for key in _MADE)


def digest(found: commit.Commit) -> str:
    """16 hex digits over a commit's stage, S and the checksums of its files: the same wherever it lies."""
    facts = [found.stage, found.samples, sorted((n, f["sha256"]) for n, f in found.record["files"].items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def find(config: Config, folders: Sequence[Path]) -> Init:
    """``config.init`` with what it means made concrete: its run's path, stage, samples and digest; path and digest of
    an export.

    ``folders``: where a name may be that is no path: the sweep's folder, RUNS_ROOT. Raises ConfigError where there is
    no such commit (yet) or export, and where its weights do not fit ``config``.
    """
    asked = config.init
    if asked.export:
        return _export(config, folders)
    run = _run(asked.run, folders)
    try:
        theirs = merge.read(run.config)
        stage, samples = _target(asked, theirs)
    except (OSError, ValueError) as error:
        raise ConfigError("init.run: its config.yaml cannot be read", str(run.path), str(error)) from error
    fitting = [one for one in commit.commits(run) if one.samples == samples and one.stage == (stage or one.stage)]
    if not fitting:
        present = ", ".join(f"{one.stage} {one.samples}" for one in commit.commits(run)) or "none"
        remedy = (
            f"Commits there: {present}. One that is still to come can be named once it is there (--only, until then)."
        )
        raise ConfigError(
            f"init: no commit at S = {samples}{f' of stage {stage}' * bool(stage)}", str(run.path), remedy=remedy
        )
    found = fitting[-1]
    _fits(config, theirs, run)
    if asked.commit not in ("", digest(found)):
        raise ConfigError("init.commit: the commit there is another one", str(found.path), digest(found))
    return replace(asked, run=str(run.path), stage=found.stage, samples=samples, commit=digest(found))


def _run(name: str, folders: Sequence[Path]) -> RunDir:
    places = [Path(name).expanduser(), *(folder / name for folder in folders)]
    for place in places:
        if place.is_absolute() and (place / "config.yaml").is_file():
            return RunDir(place)
    remedy = "Give SWEEP/RUN, RUN of the same sweep, or the full path of its directory."
    raise ConfigError("init.run: there is no such run", ", ".join(map(str, folders)), name, remedy)


def _target(asked: Init, theirs: Config) -> tuple[str, int]:
    """(stage, S); without samples the end of the stage, without a stage the end of the run."""
    ends = {span.stage.name: span.end for span in spans(theirs)}
    if asked.stage and asked.stage not in ends:
        raise ConfigError(
            "init.stage: the run has no such stage", asked.run, asked.stage, f"Stages: {', '.join(ends)}."
        )
    stage = asked.stage or ("" if asked.samples else list(ends)[-1])
    return stage, asked.samples or ends[stage]


def _fits(config: Config, theirs: Config, run: RunDir) -> None:
    """ConfigError where weights do not fit, or a token has another meaning."""
    agree(config, theirs, str(run.path), config.init.extend)
    stored = flatten(load_record(run.identity).get("config", {})).get("data.tokenizer")
    if isinstance(stored, str) and stored.startswith("sha256:") and file_digest(config.data.tokenizer) != stored:
        raise ConfigError(
            "data.tokenizer: not the one of the run that init names", str(run.path), config.data.tokenizer
        )


def _export(config: Config, folders: Sequence[Path]) -> Init:
    """The same of an export. What it holds is verified when it is read."""
    asked = config.init
    places = [Path(asked.export).expanduser().absolute(), *(folder / asked.export for folder in folders)]
    folder = next((place for place in places if export_record.is_export(place)), None)
    if folder is None:
        remedy = "Give the folder that tools/export.py wrote; export.json lies in it."
        raise ConfigError("init.export: there is no export", ", ".join(map(str, places)), asked.export, remedy)
    agree(config, export_record.config(folder), str(folder))
    found = export_record.digest(export_record.mark(folder))
    if asked.commit not in ("", found):
        raise ConfigError("init.commit: the export there is another one", str(folder), found)
    return replace(asked, export=str(folder), commit=found)


def kept(asked: Init, run: RunDir) -> Init | None:
    """The ``init`` of a run that was submitted as ``asked`` and has commits: it needs its source no more. Else None."""
    if not (run.config.is_file() and (commit.traces(run) or run.result.exists())):
        return None
    stored = merge.read(run.config).init
    names = [(Path(one.run).parts, Path(one.export).parts) for one in (stored, asked)]
    same = all(there[len(there) - len(here) :] == here for there, here in zip(*names, strict=True))
    same = same and bool(stored.run) == bool(asked.run) and bool(stored.export) == bool(asked.export)
    same = same and stored.extend == asked.extend and asked.stage in ("", stored.stage)
    return stored if same and asked.samples in (0, stored.samples) else None


def pin(init: Init, by: RunDir) -> None:
    """See to it that the commit stays. Raises DataError where it is gone already, PermissionDenied where it may go.

    A run that is complete may be somebody else's: nobody deletes there any more.
    """
    run = RunDir(init.run)
    if os.access(run.path, os.W_OK | os.X_OK):
        commit.pin(run, by, init.stage, init.samples)
    elif not run.result.exists():
        remedy = "Wait until that run is complete, or ask its owner."
        what = "init: the commit cannot be kept from being deleted"
        raise PermissionDenied(what, str(run.path), f"{init.stage}/", remedy)
    open_commit(init)


def open_commit(init: Init) -> commit.Commit:
    """The commit that a resolved ``init`` names. Raises DataError where it is gone, or another one."""
    run = RunDir(init.run)
    for found in reversed(commit.commits(run)):
        if (found.stage, found.samples) == (init.stage, init.samples) and digest(found) == init.commit:
            return found
    remedy = "Put it back, or name another one: that makes another run."
    where = f"{run.path}, stage {init.stage}, S = {init.samples}"
    raise DataError("the commit that init names is not there any more", where, init.commit, remedy)


def open_export(init: Init) -> Path:
    """The folder of the export that a resolved ``init`` names. Raises DataError where it is gone, or another one."""
    folder = Path(init.export)
    if not export_record.is_export(folder) or export_record.digest(export_record.mark(folder)) != init.commit:
        remedy = "Put it back, or name another one: that makes another run."
        raise DataError("the export that init names is not there any more", str(folder), init.commit, remedy)
    return folder
