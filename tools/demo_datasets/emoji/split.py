"""Chooses classes, held-out classes and captions; pure functions without files or network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VALIDATION = "noto-v1"
TEST = ("twemoji", "openmoji")
TRAINING = ("noto", "fluent-emoji", "fluent-emoji-flat", "emojione", "emojione-v1", "fxemoji")
DRAWERS = (*TRAINING, VALIDATION, *TEST)

TEMPLATES = (
    "{}",
    "a picture of {}",
    "a drawing of {}",
    "an icon of {}",
    "an emoji of {}",
    "a small picture of {}",
    "a colourful drawing of {}",
)
"""Training captions with the name. The first PROMPTS are the zero-shot templates."""
PROMPTS = 5
KEYWORD_LISTS = 3
"""Lists of keywords, in addition to the 7 templates: 30 % of the lines, from which a caption is drawn evenly."""

_VARIANT = re.compile(r"family-|(wo)?man-|.*(couple|kiss|facing-right$|-thirty$)")
"""Families, one sex of a person, couples and kisses, mirrored figures, half hours: too similar to distinguish."""


@dataclass(frozen=True)
class Emoji:
    """A class: slug, CLDR name and keywords, and vendor -> name of the drawing."""

    slug: str
    name: str
    keywords: tuple[str, ...]
    drawings: Mapping[str, str]

    @property
    def unseen(self) -> bool:
        """Whether training never sees this class: one in eight, by the hash of the slug."""
        return int(hashlib.sha1(self.slug.encode(), usedforsecurity=False).hexdigest(), 16) % 8 == 0


def named(characters: Mapping[str, str], annotations: Mapping[str, Any]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(slug, name, keywords) of the emoji worth being a class, in slug order.

    ``characters``: code points ("1f600" or "2764-fe0f") -> slug. ``annotations``: character -> {"tts", "default"}.
    """
    names = {}
    for points, slug in characters.items():
        if "skin-tone" in slug or _VARIANT.match(slug):
            continue
        text = "".join(chr(int(point, 16)) for point in points.split("-"))
        for key in (text, text.replace("\ufe0f", ""), text + "\ufe0f"):
            if key in annotations:
                names[slug] = (slug, annotations[key]["tts"][0], tuple(annotations[key]["default"]))
                break
    return [names[slug] for slug in sorted(names)]


def drawn(names: list[tuple[str, str, tuple[str, ...]]], icons: Mapping[str, Mapping[str, Any]]) -> list[Emoji]:
    """The named emoji drawn by both test vendors and two others. ``icons``: vendor -> icons.json."""
    slugs = {slug for slug, *_ in names}
    result = []
    for slug, name, keywords in names:
        drawings = {v: drawing for v in DRAWERS if (drawing := _drawing(v, icons[v], slug, slugs))}
        if all(vendor in drawings for vendor in TEST) and len(drawings) >= len(TEST) + 2:
            result.append(Emoji(slug, name, keywords, drawings))
    return result


def _drawing(vendor: str, icons: Mapping[str, Any], slug: str, slugs: set[str]) -> str | None:
    """A vendor's name of the drawing of a slug; None for an alias of another class's drawing, or a mirrored one."""
    if vendor == "fxemoji":
        name = slug.replace("-", "")
    else:
        name = slug
    while name not in icons["icons"]:
        alias = icons.get("aliases", {}).get(name)
        if alias is None or set(alias) != {"parent"}:
            return None
        name = alias["parent"]
        if name in slugs:
            return None
    return name


def distinct(emojis: list[Emoji], alike: set[tuple[str, str]]) -> list[Emoji]:
    """Leave out emoji that look like another one as drawn by some vendor. ``alike``: pairs of slugs, in any order.

    Unseen classes stay. Of the others, the one that more vendors have drawn stays, then the first by slug.
    """
    pairs = alike | {(b, a) for a, b in alike}
    chosen: set[str] = set()
    for emoji in sorted(emojis, key=lambda e: (not e.unseen, -len(e.drawings), e.slug)):
        if emoji.unseen or not any((emoji.slug, other) in pairs for other in chosen):
            chosen.add(emoji.slug)
    return [emoji for emoji in emojis if emoji.slug in chosen]


def captions(emoji: Emoji, vendor: str) -> list[str]:
    """The lines of one training sample: every template, and lists of 2 to 4 keywords that differ by vendor."""
    lines = [template.format(emoji.name) for template in TEMPLATES]
    for i in range(KEYWORD_LISTS):
        words = sorted(emoji.keywords, key=lambda word: _hash(vendor, emoji.slug, i, word))
        lines.append(", ".join(words[: 2 + _hash(vendor, emoji.slug, i) % 3]))
    return lines


def shuffled(samples: list[tuple[Emoji, str]]) -> list[tuple[Emoji, str]]:
    """(emoji, vendor) in an order that depends only on these names: classes and vendors spread over the shards."""
    return sorted(samples, key=lambda sample: _hash(sample[1], sample[0].slug))


def _hash(*parts: object) -> int:
    return int(hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest(), 16)
