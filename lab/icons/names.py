"""Captions from the names, aliases and categories of icons; pure functions of one icons.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

TEMPLATES = ("{}", "an icon of {}", "a symbol of {}", "the {} icon", "a pictogram of {}")
"""Zero-shot templates; the first three are training captions, so that two templates are new."""
ALIASES = 2
"""Other names of an icon that become captions."""

STYLES = {
    "outline": "a line icon", "outlined": "a line icon", "line": "a line icon", "linear": "a line icon",
    "stroke": "a line icon", "broken": "a broken line icon", "thin": "a thin line icon", "light": "a thin line icon",
    "fill": "a filled icon", "filled": "a filled icon", "solid": "a filled icon", "baseline": "a filled icon",
    "bold": "a bold icon", "block": "a block icon", "sharp": "a sharp icon",
    "round": "a rounded icon", "rounded": "a rounded icon", "flat": "a flat icon", "color": "a coloured icon",
    "duotone": "a two-tone icon", "twotone": "a two-tone icon", "two-tone": "a two-tone icon", "duo": "a two-tone icon",
}  # fmt: skip
"""Words of a variant, from most to least important -> the style that the caption names."""
ALWAYS = {"outline", "outlined", "fill", "filled", "solid", "duotone", "twotone"}
"""Words that mean a variant at the end of any name; others do so only if the set lists them ("traffic-light")."""
_SIZE = re.compile(r"\d+(px|x\d+)?")
_NUMBER = re.compile(r"0\d")
"""Numbers of a variant ("home-01")."""


@dataclass(frozen=True)
class Icon:
    """A drawing: its name in the set, what it shows, and the other parts of its captions ("" if unknown)."""

    name: str
    subject: str
    style: str
    category: str
    aliases: tuple[str, ...]


def icons(collection: Mapping[str, Any]) -> Iterator[Icon]:
    """The drawings of an icons.json in the order of their names, without those of size 0 and aliases that mirror or
    turn one."""
    aliases: dict[str, list[str]] = {}
    for alias, item in collection.get("aliases", {}).items():
        if set(item) <= {"parent", "hidden"}:
            aliases.setdefault(item["parent"], []).append(alias)
    categories = {name: title for title, names in collection.get("categories", {}).items() for name in names}
    variants = [{*collection.get(ends, ())} - {""} for ends in ("prefixes", "suffixes")]
    logo = ""
    if collection["info"].get("category") == "Logos":
        logo = "logo"
    for name, drawing in sorted(collection["icons"].items()):
        if 0 in (drawing.get("width"), drawing.get("height")):
            continue
        subject, words = _split(name, *variants)
        others = (_split(alias, *variants)[0] for alias in sorted(aliases.get(name, ())))
        yield Icon(
            name,
            subject,
            _style(words, collection, name),
            _spaced(categories.get(name, "")) or logo,
            tuple(dict.fromkeys(other for other in others if other != subject))[:ALIASES],
        )


def _split(name: str, prefixes: set[str], suffixes: set[str]) -> tuple[str, list[str]]:
    """What the icon shows, as words, and the words of its variant.

    A prefix may also be at the end and a suffix at the beginning. The longest variant counts; of several, the one that
    is where the set says.
    """
    words: list[str] = []
    matches = []
    for variant in prefixes | suffixes:
        if name.endswith(f"-{variant}"):
            matches.append((len(variant), variant in suffixes, variant, name.removesuffix(f"-{variant}")))
        elif name.startswith(f"{variant}-"):
            matches.append((len(variant), variant in prefixes, variant, name.removeprefix(f"{variant}-")))
    if matches:
        _, _, variant, name = max(matches)
        words = variant.split("-")
    parts = name.split("-")
    while len(parts) > 1 and (parts[-1] in ALWAYS or _NUMBER.fullmatch(parts[-1])):
        words = [parts.pop(), *words]
    return " ".join(filter(None, parts)), [word for word in words if not _SIZE.fullmatch(word)]


def _style(words: list[str], collection: Mapping[str, Any], name: str) -> str:
    """The style that the caption names: by the variant, else by how the drawing is painted."""
    named = next((style for word, style in STYLES.items() if word in words), "")
    if named:
        return named
    if collection["info"].get("palette"):
        return "a coloured icon"
    if "stroke=" in collection["icons"][name]["body"]:
        return "a line icon"
    return ""


def _spaced(title: str) -> str:
    """A category as words: "FoodDrink" and "Food & Drink" -> "food drink"."""
    return " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z0-9]+", title)).lower()


def captions(icon: Icon) -> list[str]:
    """The lines of one training sample, of which training draws one: templates, style, category, other names."""
    lines = [template.format(icon.subject) for template in TEMPLATES[:3]]
    if icon.style:
        lines += [f"{icon.subject}, {icon.style}"]
    if icon.category:
        lines += [f"{icon.subject}, {icon.category}"]
    lines += [f"an icon of {icon.subject}, or {alias}" for alias in icon.aliases]
    return lines
