"""What the commands share: progress, errors of writing, and how a report is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from flip.exitcodes import ConfigError
from jobs.disk import unwritable


class Outcome(NamedTuple):
    """What a command found; printed as JSON, or as ``text``, by default a line per name."""

    report: dict[str, Any]
    code: int = 0
    text: str = ""

    def show(self) -> str:
        return self.text or "\n".join(lines(self.report))


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A line per name; below the name of a table or a list, a line per entry."""
    width = max((len(name) for name, value in report.items() if not isinstance(value, (dict, list))), default=0)
    for name, value in report.items():
        name = name.replace("_", " ")
        if isinstance(value, dict):
            yield name
            yield from (f"  {line}" for line in lines(value))
        elif isinstance(value, list):
            yield name
            yield from (f"  {'  '.join(map(str, one.values())) if isinstance(one, dict) else one}" for one in value)
        else:
            yield f"{name:{width}}  {number(value)}"


def names(text: str, option: str) -> list[str]:
    """a,b as [a, b]. Raises ConfigError where there is none."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise ConfigError("names nothing", option, text, "Write names with commas between them, as txt,alt.")
    return found


def number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


@contextmanager
def writing(out: str | Path) -> Iterator[None]:
    """Errors of the file system inside are those of writing ``out``."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError("a file is where a folder must be, or the other way round", error.filename or out) from error
    except OSError as error:
        raise unwritable(error, out, "Choose another --out.") from error


class Bar:
    """A progress bar on a terminal, nothing elsewhere; called with what is done, what there is, and a word beside."""

    def __init__(self, what: str, unit: str) -> None:
        self.bar = tqdm(desc=what, unit=unit or "it", unit_scale=bool(unit), disable=None, leave=False)

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: int, total: int, beside: str = "") -> None:
        self.bar.total = total
        if beside:
            self.bar.set_postfix_str(beside, refresh=False)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()
