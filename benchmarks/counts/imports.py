"""Circles of imports between modules, with imports inside functions and for types."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence

from benchmarks.counts.code import Module
from benchmarks.counts.rows import Row, listed


def rows(modules: Sequence[Module]) -> list[Row]:
    """All rows of this module."""
    circles = sorted(circles_of(edges(modules)), key=len)
    top = circles_of(edges(modules, everywhere=False))
    return [
        listed("modules in a circle of imports", [name for circle in circles for name in circle]),
        Row("modules in the largest circle", len(circles[-1]) if circles else 0),
        listed("modules in a circle of imports at top level", [name for circle in top for name in circle]),
    ]


def edges(modules: Sequence[Module], everywhere: bool = True) -> dict[str, set[str]]:
    """Module -> modules that it imports by name. ``everywhere``: inside functions and under TYPE_CHECKING, too."""
    known = {module.name for module in modules}
    return {module.name: set(imported(module, known, everywhere)) - {module.name} for module in modules}


def imported(module: Module, known: Collection[str], everywhere: bool = True) -> Iterator[str]:
    """The names in ``known`` that a module imports. ``from flip import rng`` names flip.rng, not the package."""
    nodes = ast.walk(module.tree) if everywhere else iter(module.tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in known:
                    yield name
                elif node.module in known:
                    yield node.module


def circles_of(graph: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components), without single ones."""
    search = _Search(graph)
    for name in sorted(graph):
        if name not in search.order:
            search.visit(name)
    return [sorted(group) for group in search.groups if len(group) > 1]


class _Search:
    """Tarjan's algorithm. ``order``: the place of each module in the search; ``low``: the lowest place it reaches."""

    def __init__(self, graph: Mapping[str, Collection[str]]) -> None:
        self.graph = graph
        self.order: dict[str, int] = {}
        self.low: dict[str, int] = {}
        self.open: list[str] = []
        self.groups: list[list[str]] = []

    def visit(self, name: str) -> None:
        self.order[name] = len(self.order)
        self.low[name] = self.order[name]
        self.open.append(name)
        for other in sorted(self.graph[name]):
            if other not in self.order:
                self.visit(other)
                self.low[name] = min(self.low[name], self.low[other])
            elif other in self.open:
                self.low[name] = min(self.low[name], self.order[other])
        if self.low[name] == self.order[name]:
            place = self.open.index(name)
            self.groups.append(self.open[place:])
            del self.open[place:]
