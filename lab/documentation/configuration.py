"""The page with every field of a configuration and of a cluster profile, from their dataclasses."""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from flip.common.option import BOUNDS, descriptions
from flip.common.typed import TYPES
from flip.config.schema import Config
from jobs.common.cluster_profile import ClusterProfile
from lab.documentation.markdown import code, table

COLUMNS = ("field", "default", "values", "identity", "meaning")
_HEAD = """# Configuration

Every field of a run, from `flip/config/schema.py`, and of a cluster profile. `NAME` is the name of a member of a list.
[contracts.md](../contracts.md#configuration) says how files are merged.

| identity | if a run is submitted again with another value |
|---|---|
| yes | it is another run: `submit` asks for `--changed` |
| yes, unless V | the same; fields that are newer than some runs are not part of the config hash at the value V |
| content | as yes, if the contents differ; the path may change |
| no | the same run continues |
| product | `resources.nodes * resources.processes`, the number of ranks, is part of the config hash |

A run that extends another one (`init.extend`) may have another number of ranks:
[sweeps.md](../sweeps.md#change-the-number-of-ranks).
"""


@dataclasses.dataclass(frozen=True)
class FieldEntry:
    """One field of the page: its dotted key, and the cells of its row."""

    key: str
    default: str
    values: str
    identity: str
    meaning: str


def configuration_page() -> str:
    """The page."""
    parts = [_HEAD]
    for title, section, entries in sections(Config, "", True):
        parts.append(f"## {title or 'The run itself'}\n\n{section}\n\n{_table(entries)}")
    profile = [
        dataclasses.replace(entry, identity="no")
        for _, _, rows in sections(ClusterProfile, "", False)
        for entry in rows
    ]
    about = "A file of `sweeps/clusters/`; [cluster.md](../cluster.md#the-profile) explains how to make one."
    return "\n".join([*parts, f"## Cluster profile\n\n{about}\n\n{_table(profile)}"])


def _table(entries: list[FieldEntry]) -> str:
    return table(COLUMNS, ((code(e.key), e.default, e.values, e.identity, e.meaning) for e in entries))


def sections(kind: Any, prefix: str, is_hashed: bool) -> Iterator[tuple[str, str, list[FieldEntry]]]:
    """(key, first paragraph of its docstring, its own fields) of a dataclass, then of each section below it."""
    described = descriptions(kind)
    hints = typing.get_type_hints(kind)
    own = []
    below: list[tuple[Any, str, bool]] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        rules = field.metadata
        hashed = is_hashed and rules.get("identity", True)
        member = (typing.get_args(hint) or (hint,))[0]
        if dataclasses.is_dataclass(member):
            name = field.name if member is hint else f"{field.name}.NAME"
            below.append((member, f"{prefix}{name}.", hashed))
        else:
            key = prefix + field.name
            identity = _identity(key, hashed, rules)
            meaning = described.get(field.name, "")
            own.append(FieldEntry(key, _default(field), _values(hint, rules), identity, _code(meaning)))
    if own:
        yield f"{prefix.rstrip('.')}", _about(kind), own
    for member, name, hashed in below:
        yield from sections(member, name, hashed)


def _about(kind: Any) -> str:
    documented = getattr(kind, "base", kind)
    about = " ".join((documented.__doc__ or "").partition("\n\n")[0].split())
    return re.sub(r" \(docs/[^)]*\)", "", about).replace("``", "`")


def _code(meaning: str) -> str:
    """The docstring with links to the pages, and their headings, that it names."""
    return re.sub(r"docs/(\w+\.md)(?:, ([A-Z][\w &]*))?", _link, meaning)


def _link(match: re.Match[str]) -> str:
    heading = (match[2] or "").strip()
    if not heading:
        return f"[{match[1]}](../{match[1]})"
    anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    return f"[{heading}](../{match[1]}#{anchor})"


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    else:
        value = field.default_factory()
    if value is None:
        return "as the run's"
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, list):
        value = [round(item, 6) if isinstance(item, float) else item for item in value]
    return code(value)


def _values(hint: Any, rules: Mapping[str, Any]) -> str:
    if type(None) in typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    if rules.get("choices"):
        return ", ".join(code(choice) for choice in rules["choices"])
    if typing.get_origin(hint) is list:
        return f"list of {_values(typing.get_args(hint)[0], rules)}"
    if rules.get("decimal"):
        return "decimal number from 0 to below 1"
    if "path" in rules:
        return "path"
    name = TYPES[hint].description.removeprefix("a ")
    bounds = [f"{bound.sign} {_number(rules[rule])}" for rule, bound in BOUNDS.items() if rule in rules]
    return ", ".join([name, *bounds])


def _number(value: float) -> str:
    """A bound: powers of two above a million as such."""
    for sign, minus in ((0, ""), (1, " - 1")):
        power = int(value + sign).bit_length() - 1
        if value == int(value) and value > 10**6 and int(value + sign) == 2**power:
            return f"2^{power}{minus}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _identity(key: str, is_hashed: bool, rules: Mapping[str, Any]) -> str:
    if key in ("resources.nodes", "resources.processes"):
        return "product"
    if not is_hashed:
        return "no"
    if rules.get("path") in ("manifest", "file"):
        return "content"
    if "omit_if" not in rules:
        return "yes"
    value = rules["omit_if"]
    if value is None:
        return "yes, unless absent"
    if isinstance(value, bool):
        value = str(value).lower()
    return f"yes, unless {code(value)}"
