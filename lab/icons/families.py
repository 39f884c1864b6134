"""Which icon sets are used, and which of them count as one design (pure; no files)."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from tools.demo_datasets.npm import Package

PACKAGE = Package(
    "@iconify/json",
    "2.2.535",
    "nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw==",
)

VALIDATION = "bi"
TEST = ("tabler", "carbon", "game-icons")
"""Held-out families: line drawings on a grid of 24 px; mixed ones on 32 px; silhouettes, the hard one."""
PROBE = ("carbon", "tabler", "game-icons")
"""The linear probe: tested on the first family, trained on the others."""
HELD_OUT = (*TEST, VALIDATION)

_FAMILIES = {
    "material": "ic material-symbols material-symbols-light mdi mdi-light zmdi line-md",  # Google's, and extensions
    "fluent": "fluent fluent-color fluent-mdl2 codicon",  # Microsoft; codicon shares drawings with fluent
    "feather": "feather lucide lucide-lab",  # Lucide is a fork of Feather
    "fontawesome": "fa fa-* fa6-* fa7-* la",  # releases 4 to 7; Line Awesome redraws it
    "streamline": "streamline* guidance covid",  # one studio; styles of the same drawings
    "icon-park": "icon-park*",  # styles
    "boxicons": "boxicons bx bxl bxs",  # releases 2 and 3
    "unicons": "uil uim uis uit",  # styles
    "heroicons": "heroicons* sidekickicons",  # releases 1 and 2, and an extension in their style
    "ionicons": "ion famicons",  # Famicons is a fork of Ionicons
    "pepicons": "pepicons*",  # styles
    "coreui": "cib cif cil",  # one designer
    "icons8": "icons8 wpf flat-color-icons",  # one studio
    "entypo": "entypo*",  # one designer
    "devicon": "devicon*",  # styles
    "halfmann": "majesticons pixelarticons",  # one designer
    "juge": "mynaui vadivam",  # one designer
    "mono": "mono-icons mi",  # the same set twice
    "maps": "maki temaki roentgen osmic pinhead",  # Pinhead collects the map symbols of the others
    "glyphs": "glyphs glyphs-poly",  # styles
    "cryptocurrency": "cryptocurrency*",  # styles
    "web3": "token*",  # styles
    "thesvg": "thesvg*",  # styles
}
"""Family -> patterns of its sets, and why they are one design. Every other set is a family of its own."""


def family(prefix: str) -> str:
    """The family of a set by its prefix, as in "fa6-solid" -> "fontawesome"."""
    matches = (name for name, sets in _FAMILIES.items() if any(fnmatchcase(prefix, p) for p in sets.split()))
    return next(matches, prefix)


def refusal(prefix: str, info: Mapping[str, Any]) -> str:
    """Why a set is left out, or "". ``info``: that of its icons.json.

    Emoji are the other demonstration set. Licences: neither non-commercial nor GPL.
    """
    licence = info["license"].get("spdx", "")
    if info.get("category") == "Emoji" or prefix == "fluent-emoji":
        return "emoji"
    if not licence or "GPL" in licence or "-NC" in licence:
        return f"licence {licence or 'unknown'}"
    return ""
