"""The page of the public Python interface, which Sphinx fills from docstrings."""

from flip import __all__

_HEAD = """# Python interface

The public names of the package `flip`. [results.md](../results.md#from-python) and [batches.md](../batches.md) show
them in use. Everything else may move.
"""
_CLASSES = {
    "What submit returns": ("jobs.submission.api.SubmittedRuns", "flip.runs.lifecycle.RunState"),
    "What load returns": ("flip.export.load.TrainedModel",),
    "What batches returns": ("flip.data.batches.BatchStream", "flip.data.loader.Batch"),
    "The view of a metric of your own": (
        "flip.training.user_callbacks.TrainingView",
        "flip.training.user_callbacks.ModelView",
        "flip.training.user_callbacks.OptimizerView",
        "flip.training.grad_cache.PairFeatures",
    ),
    "Errors": (
        "flip.runs.errors.FlipError",
        "flip.runs.errors.ConfigError",
        "flip.runs.errors.DataError",
        "flip.runs.errors.StorageError",
        "flip.runs.errors.PermissionDenied",
    ),
}
"""Heading -> classes that users get from the functions."""


def functions() -> list[str]:
    """The public functions, in the order of the alphabet."""
    return [f"flip.{name}" for name in sorted(__all__) if not name.startswith("__")]


def python_api_page() -> str:
    """The page, with Sphinx's directives."""
    parts = [_HEAD, "## Functions\n", *(_directive("autofunction", name) for name in functions())]
    for title, names in _CLASSES.items():
        parts.append(f"## {title}\n")
        parts += [_directive("autoclass", name, "   :members:\n") for name in names]
    return "\n".join(parts)


def _directive(kind: str, name: str, options: str = "") -> str:
    return f"```{{eval-rst}}\n.. {kind}:: {name}\n{options}```\n"
