"""Builds the icon set from its package: shards of nested subsets, held-out sets, tokenizer, licences."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flip.files.creation import new_folder
from flip.runs.rundir import write_json, write_text
from lab.icons import drawings, families, names, selection
from lab.icons.drawings import Drawing
from tools.demo_datasets import output
from tools.demo_datasets.output import DemoData, Facts

SHARDS = 64
SUBSETS = {"train-1of8": 8, "train-1of64": 1}
"""Training subset -> how many of the shards it has."""
VOCABULARY = 4000

LICENCES = """\
# Licences of these pictures and captions

The pictures were rendered from the drawings below to 64 px on white, without other changes; the captions are their
names. The key of a sample is SET_NAME. CC-BY requires attribution, CC-BY-SA and MPL also that derived works have the
same licence: comply with them before passing files on. Logos may be trademarks of their owners.

Package: {}

| set | by | licence |
|---|---|---|
{}
"""


def _write(folder: Path, store: Path, work: Path) -> Facts:
    everything, info = drawings.read(store, work)
    different, blank, copies = selection.different(everything, families.HELD_OUT)
    held_out = {name: [d for d in different if d.family == name] for name in families.HELD_OUT}
    candidates = [d for d in different if d.family not in held_out]
    training, leakage = _without_duplicates(candidates, [d for chosen in held_out.values() for d in chosen])
    sets = _write_training(folder, training, info) | _write_held_out(folder, training, held_out)
    _write_tokenizer(folder, training)
    rows = [output.licence_row(info[prefix], prefix) for prefix in sorted(info)]
    write_text(folder / "LICENCES.md", LICENCES.format(families.PACKAGE.spec, "\n".join(rows)))
    counts = {"drawings": len(everything), "blank": blank, "copies": copies}
    counts["near-duplicates"] = len(candidates) - len(training)
    counts |= {"collections": len(info), "families": len({d.family for d in everything})}
    return {"counts": counts, "sets": sets, "leakage": leakage}


def _without_duplicates(training: Sequence[Drawing], held_out: Sequence[Drawing]) -> tuple[list[Drawing], Facts]:
    """The training pictures that are near no held-out one, and for each held-out family the share of its pictures with
    a near-duplicate in training, before and after."""
    before, to_held_out = selection.nearest(held_out, training)
    remaining = [d for d, distance in zip(training, to_held_out, strict=True) if distance >= selection.NEAR]
    after, _ = selection.nearest(held_out, remaining)
    owners = np.array([d.family for d in held_out])
    facts: Facts = {}
    for family in dict.fromkeys(owners.tolist()):
        facts[family] = {"pictures": int((owners == family).sum())}
        for when, distances in (("before", before), ("after", after)):
            for name, limit in (("", selection.NEAR), ("_2x", 2 * selection.NEAR)):
                facts[family][f"near_{when}{name}"] = round(float((distances[owners == family] < limit).mean()), 4)
    return remaining, facts


def _write_training(folder: Path, training: Sequence[Drawing], info: Mapping[str, Any]) -> Facts:
    """Write the shards in random order, so that their first ones are random subsets, with a parquet file each."""
    from flip.data.manifest.build import index

    ordered = selection.shuffled(training)
    samples = [{"__key__": d.key, "png": d.png, "txt": "\n".join(names.captions(d.icon))} for d in ordered]
    facts = {"train": _facts("training", output.write_shards(folder / "train", samples, SHARDS))}
    for number, part in enumerate(output.parts(ordered, SHARDS)):
        _write_columns(folder / "train" / f"{number:05d}.parquet", part, info)
    for name, shards in SUBSETS.items():  # copies: a manifest names shards by path only below its own folder
        new_folder(folder / name)
        for number in range(shards):
            for end in ("tar", "parquet"):
                shutil.copyfile(folder / "train" / f"{number:05d}.{end}", folder / name / f"{number:05d}.{end}")
        manifest = index([str(path) for path in sorted((folder / name).glob("*.tar"))], folder / name)
        facts[name] = _facts("training", manifest)
    return facts


def _write_columns(path: Path, part: Sequence[Drawing], info: Mapping[str, Any]) -> None:
    """The metadata of a shard's samples, for `flip shards index --filter`."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        "key": [d.key for d in part],
        "set": [d.prefix for d in part],
        "family": [d.family for d in part],
        "licence": [info[d.prefix]["license"]["spdx"] for d in part],
        "style": [d.icon.style for d in part],
        "coloured": [int(bool(info[d.prefix].get("palette"))) for d in part],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _write_held_out(folder: Path, training: Sequence[Drawing], held_out: Mapping[str, Sequence[Drawing]]) -> Facts:
    """Write the zero-shot sets of the held-out families, and retrieval and probe sets of the test families.

    A set has a picture of each class, and NAME-all of a test family every picture whose name training has: runs before
    version 3 were scored on the former, and later ones are scored on the latter (docs/icons.md).
    """
    drawn = selection.drawn_by(training)
    classes = {name: selection.classes(pictures, drawn) for name, pictures in held_out.items()}
    facts = {}
    for name, chosen in classes.items():
        if name == families.VALIDATION:
            role = "validation"
        else:
            role = "test"
        facts[name] = _write_classes(folder / name, role, list(chosen), chosen.values())
    for name in families.TEST:
        pictures = selection.pictures(held_out[name], drawn)
        subjects = sorted({drawing.icon.subject for drawing in pictures})
        facts[f"{name}-all"] = _write_classes(folder / f"{name}-all", "test", subjects, pictures)

    test = [drawing for name in families.TEST for drawing in held_out[name]]
    pairs = selection.retrieval(test, drawn)
    samples = [{"__key__": d.key, "png": d.png, "txt": f"an icon of {d.icon.subject}"} for d in pairs]
    facts["retrieval"] = _facts("test", output.write_shards(folder / "retrieval", samples))

    tested, *others = families.PROBE
    shared = [name for name in classes[tested] if any(name in classes[other] for other in others)]
    shown = [classes[tested][name] for name in shared]
    learned = [d for other in others for d in held_out[other] if d.icon.subject in set(shared)]
    learned, _ = _without_duplicates(learned, shown)
    for split, pictures in (("train", learned), ("test", shown)):
        facts[f"probe/{split}"] = _write_classes(folder / "probe" / split, "test", shared, pictures)
    return facts


def _write_classes(folder: Path, role: str, labels: Sequence[str], pictures: Iterable[Drawing]) -> Facts:
    """Write labelled samples and classes.json."""
    numbers = {name: i for i, name in enumerate(labels)}
    samples = [
        {"__key__": d.key, "png": d.png, "txt": d.icon.subject, "cls": str(numbers[d.icon.subject])}
        for d in selection.shuffled(list(pictures))
    ]
    manifest = output.write_shards(folder, samples)
    write_json(folder / "classes.json", {"names": list(labels), "templates": list(names.TEMPLATES)})
    return _facts(role, manifest) | {"classes": len(labels)}


def _facts(role: str, manifest: Any) -> Facts:
    return {"role": role, "samples": manifest.samples, "digest": manifest.digest}


def _write_tokenizer(folder: Path, training: Sequence[Drawing]) -> None:
    from flip.tokenizer import train

    lines = (line for d in training for line in (d.icon.subject, d.icon.style, d.icon.category) if line)
    train(lines, VOCABULARY, folder / "tokenizer.json")


DATA = DemoData("icons", 3, [families.PACKAGE], _write)
"""Building it needs 1 GB of memory and, meanwhile, 2 GB of disk."""
