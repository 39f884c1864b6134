"""Builds the demonstration data from packages: shards, manifests, class names, tokenizer; complete or absent."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flip.runs.rundir import fsync_path, read_json, write_json, write_text
from jobs.common.filesystem import unwritable
from jobs.common.terminal import ProgressBar
from tools.emoji_dataset import download, split
from tools.emoji_dataset.split import Emoji

VERSION = 1
"""Version of the build; a higher one makes the next call build again."""
VOCABULARY = 4000
SHARDS = {"train": 8, "unseen": 2}
FOLDER = "emoji"

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


def ready(cache: Path) -> dict[str, Any] | None:
    """The facts in done.json if the data exists and was built by this version, else None."""
    try:
        done = read_json(cache / FOLDER / "done.json")
    except (ValueError, OSError):  # damaged or unreadable: building repairs it or reports why it cannot
        return None
    return done if done and {key: done.get(key) for key in _source()} == _source() else None


def _source() -> dict[str, Any]:
    return {"version": VERSION, "packages": {p.name: [p.version, p.sha512] for p in download.ALL}}


def build(cache: Path, force: bool = False) -> dict[str, Any]:
    """Build the data in ``cache``/emoji unless it is ready, and return the facts of its done.json.

    Concurrent builders wait for each other. Raises StorageError (network, disk), PermissionDenied and DataError (a
    wrong tarball); nothing is half-written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{FOLDER}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return (None if force else ready(cache)) or _build(cache)
    except OSError as error:
        raise unwritable(error, cache, "Name another folder with --cache or FLIP_CACHE.") from error


def _build(cache: Path) -> dict[str, Any]:
    store, part, final, old = (cache / name for name in ("packages", f"{FOLDER}.partial", FOLDER, f"{FOLDER}.old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    with ProgressBar("fetching packages") as bar:
        fetched = itertools.count(1)
        download.fetch(download.ALL, store, lambda _: bar(next(fetched), len(download.ALL)))
    emojis, pictures, counts = _classes(store)
    facts = _source() | {"counts": counts, "sets": _write_sets(part, emojis, pictures)}
    _write_tokenizer(part, emojis)
    _write_licences(part, store)
    write_json(part / "done.json", facts)
    fsync_path(part)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(part, final)
    fsync_path(cache)
    shutil.rmtree(old, ignore_errors=True)
    return facts


def _classes(store: Path) -> tuple[list[Emoji], Pictures, dict[str, int]]:
    """Classes (seen and unseen), an image for each drawing, and the number of emoji left by each rule."""
    from tools.emoji_dataset import render

    vendors = download.VENDORS
    icons = {vendor: download.member_json(package, store, "icons.json") for vendor, package in vendors.items()}
    characters = download.member_json(vendors["noto"], store, "chars.json")
    annotations = download.member_json(download.NAMES, store, "annotations/en/annotations.json")
    names = split.named(characters, annotations["annotations"]["annotations"])
    drawn = split.drawn(names, icons)

    drawings = [(vendor, emoji.slug, name) for emoji in drawn for vendor, name in emoji.drawings.items()]
    documents = [render.svg(icons[vendor], name) for vendor, _, name in drawings]
    pictures, thumbnails = {}, {}
    with ProgressBar("rendering pictures") as bar:
        for (vendor, slug, _), (png, thumbnail) in zip(drawings, render.render(documents), strict=True):
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
        manifest = _write_shards(folder / name, list(samples), SHARDS.get(name, 1))
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


def _write_shards(folder: Path, samples: Sequence[dict[str, Any]], shards: int) -> Any:
    """Write samples to webdataset shards in order, and their manifest. Equal samples give equal bytes."""
    from webdataset import TarWriter

    from flip.data.manifest.build import index

    folder.mkdir()
    paths = []
    for s in range(shards):
        paths.append(str(folder / f"{s:05d}.tar"))
        with TarWriter(paths[-1], mtime=0, user="flip", group="flip") as writer:
            for sample in samples[len(samples) * s // shards : len(samples) * (s + 1) // shards]:
                writer.write(sample)
    return index(paths, folder)


def _write_tokenizer(folder: Path, emojis: Sequence[Emoji]) -> None:
    from flip.tokenizer import train

    seen = [emoji for emoji in emojis if not emoji.unseen]
    lines = [line for e in seen for v in split.TRAINING if v in e.drawings for line in split.captions(e, v)]
    train(lines, VOCABULARY, folder / "tokenizer.json")


def _write_licences(folder: Path, store: Path) -> None:
    rows = []
    for vendor, package in download.VENDORS.items():
        info = download.member_json(package, store, "info.json")
        author, licence = info["author"], info["license"]
        by = f"[{author['name']}]({author['url']})"
        rows.append(f"| {info['name']} ({vendor}) | {package.spec} | {by} | [{licence['spdx']}]({licence['url']}) |")
    licence = download.member_json(download.NAMES, store, "package.json")["license"]
    text = download.member(download.NAMES, store, "LICENSE").decode().strip()
    write_text(folder / "LICENCES.md", LICENCES.format("\n".join(rows), download.NAMES.spec, licence, text))
