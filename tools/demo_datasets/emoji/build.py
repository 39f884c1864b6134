"""Builds the demonstration data from packages: shards, manifests, class names, tokenizer; complete or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flip.runs.rundir import write_json, write_text
from jobs.common.terminal import ProgressBar
from tools.demo_datasets import npm, output
from tools.demo_datasets.emoji import split, vendors
from tools.demo_datasets.emoji.split import Emoji
from tools.demo_datasets.output import DemoData, Facts

VOCABULARY = 4000
SHARDS = {"train": 8, "unseen": 2}

LICENCES = """\
# Licences of these pictures and captions

The pictures were rendered from the drawings below to 64 px on white, without other changes. CC-BY requires
attribution, CC-BY-SA also that derived works have the same licence: comply with both before passing files on.

| drawings | package | by | licence |
|---|---|---|---|
{}

Names and keywords: Unicode CLDR ({}, {}), whose licence follows.

{}
"""

Pictures = dict[tuple[str, str], bytes]
"""(vendor, slug) -> PNG."""
Captions = Callable[[Emoji, str], list[str]]
"""(class, vendor) -> captions of a sample."""


def _write(folder: Path, store: Path, _: Path) -> Facts:
    emojis, pictures, counts = _classes(store)
    facts = {"counts": counts, "sets": _write_sets(folder, emojis, pictures)}
    _write_tokenizer(folder, emojis)
    _write_licences(folder, store)
    return facts


def _classes(store: Path) -> tuple[list[Emoji], Pictures, dict[str, int]]:
    """Classes (seen and unseen), an image for each drawing, and the number of emoji left by each rule."""
    from tools.demo_datasets import render

    icons = {vendor: npm.member_json(package, store, "icons.json") for vendor, package in vendors.VENDORS.items()}
    characters = npm.member_json(vendors.VENDORS["noto"], store, "chars.json")
    annotations = npm.member_json(vendors.NAMES, store, "annotations/en/annotations.json")
    names = split.named(characters, annotations["annotations"]["annotations"])
    drawn = split.drawn(names, icons)

    drawings = [(vendor, emoji.slug, name) for emoji in drawn for vendor, name in emoji.drawings.items()]
    documents = [render.svg(icons[vendor], name) for vendor, _, name in drawings]
    pictures = {}
    thumbnails = {}
    with ProgressBar("rendering pictures") as bar, render.renderers() as pool:
        rendered = render.render(pool, documents, render.png_and_thumbnail)
        for (vendor, slug, _), (png, thumbnail) in zip(drawings, rendered, strict=True):
            pictures[vendor, slug], thumbnails[vendor, slug] = png, thumbnail
            bar(len(pictures), len(documents))

    pairs = set()
    for vendor in split.DRAWERS:
        slugs = [emoji.slug for emoji in drawn if vendor in emoji.drawings]
        pairs |= render.alike(slugs, [thumbnails[vendor, slug] for slug in slugs])
    emojis = split.distinct(drawn, pairs)
    unseen = sum(emoji.unseen for emoji in emojis)
    counts = {"named": len(names), "drawn": len(drawn), "distinct": len(emojis)}
    return emojis, pictures, counts | {"unseen": unseen, "training": len(emojis) - unseen}


def _write_sets(folder: Path, emojis: Sequence[Emoji], pictures: Pictures) -> dict[str, Any]:
    """Write shards, manifests and class names. Returns samples, digest and role of each set."""
    seen = [emoji for emoji in emojis if not emoji.unseen]
    unseen = [emoji for emoji in emojis if emoji.unseen]
    roles = {"train": "training", split.VALIDATION: "validation", "unseen": "test"} | dict.fromkeys(split.TEST, "test")
    members: dict[str, Iterable[dict[str, Any]]] = {
        "train": _samples(seen, split.TRAINING, pictures, split.captions, label=False),
        "unseen": _samples(unseen, split.DRAWERS, pictures, _name),
    }
    for vendor in (split.VALIDATION, *split.TEST):
        members[vendor] = _samples(seen, (vendor,), pictures, _name)
    for file, chosen in (("classes.json", seen), ("classes-unseen.json", unseen)):
        names = [emoji.name for emoji in chosen]
        write_json(folder / file, {"names": names, "templates": split.TEMPLATES[: split.PROMPTS]})
    facts = {}
    for name, samples in members.items():
        manifest = output.write_shards(folder / name, list(samples), SHARDS.get(name, 1))
        facts[name] = {"role": roles[name], "samples": manifest.samples, "digest": manifest.digest}
    return facts


def _name(emoji: Emoji, vendor: str) -> list[str]:
    return [emoji.name]


def _samples(
    emojis: Sequence[Emoji], vendors: Sequence[str], pictures: Pictures, captions: Captions, label: bool = True
) -> Iterator[dict[str, Any]]:
    labels = {emoji.slug: i for i, emoji in enumerate(emojis)}
    for emoji, vendor in split.shuffled([(e, v) for e in emojis for v in vendors if v in e.drawings]):
        members = {"png": pictures[vendor, emoji.slug], "txt": "\n".join(captions(emoji, vendor))}
        if label:
            members["cls"] = str(labels[emoji.slug])
        yield {"__key__": f"{vendor}_{emoji.slug}", **members}


def _write_tokenizer(folder: Path, emojis: Sequence[Emoji]) -> None:
    from flip.tokenizer import train

    seen = [emoji for emoji in emojis if not emoji.unseen]
    lines = [line for e in seen for v in split.TRAINING if v in e.drawings for line in split.captions(e, v)]
    train(lines, VOCABULARY, folder / "tokenizer.json")


def _write_licences(folder: Path, store: Path) -> None:
    info = {vendor: npm.member_json(package, store, "info.json") for vendor, package in vendors.VENDORS.items()}
    rows = [output.licence_row(info[vendor], vendor, vendors.VENDORS[vendor].spec) for vendor in info]
    licence = npm.member_json(vendors.NAMES, store, "package.json")["license"]
    text = npm.member(vendors.NAMES, store, "LICENSE").decode().strip()
    write_text(folder / "LICENCES.md", LICENCES.format("\n".join(rows), vendors.NAMES.spec, licence, text))


DATA = DemoData("emoji", 1, vendors.ALL, _write)
