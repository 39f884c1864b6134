"""Tests of CompiledGraphs, which counts the graphs that training compiles."""

import torch

from flip.monitoring import collector

LIMIT = collector.MAX_RECOMPILATIONS


def test_compiled_graphs_warns_once_per_stage_if_shapes_keep_changing():
    graphs = collector.CompiledGraphs()
    warned = [bool(graphs.update("masked", 12 + n)) for n in range(LIMIT + 4)]
    assert warned == [False] * (LIMIT + 1) + [True] + [False] * 2
    assert not graphs.update("unmasked", 100) and not graphs.update("unmasked", 100 + LIMIT)
    assert graphs.update("unmasked", 101 + LIMIT).startswith(f"stage unmasked: {LIMIT + 1} graphs")


def test_compiled_graphs_counts_graph_of_each_input_shape():
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    before = collector.CompiledGraphs.count()
    model = Doubled()
    model.compile(dynamic=False, backend="eager")
    for rows in (3, 3, 4):
        model(torch.ones(rows))
    assert collector.CompiledGraphs.count() == before + 2
