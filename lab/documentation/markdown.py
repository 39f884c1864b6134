"""Tables of Markdown."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are Markdown, each on one line."""
    lines = [columns, ["---"] * len(columns), *([cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(text: str) -> str:
    """The text as one line whose bars do not end the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def code(value: object) -> str:
    """The value as code; empty text as an empty pair of quotes."""
    return f"`{value}`" if value != "" else '`""`'
