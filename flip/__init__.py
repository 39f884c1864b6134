"""FLIP: masked CLIP training. ``flip.plan(sweep)`` gives the cost of runs, ``flip.submit(sweep)`` starts them,
``flip.read_runs(root)`` reads their results, ``flip.read_metrics(run)`` a curve, ``flip.load(run)`` gives a trained
model, ``flip.batches(manifest, ...)`` the data for a training loop of your own.

The host's Python >= 3.6 reads this file too.
"""

__all__ = ["__version__", "batches", "load", "plan", "read_metrics", "read_runs", "submit"]

TYPE_CHECKING = False  # type checkers and editors take it for true; ``typing`` need not be imported
if TYPE_CHECKING:
    from flip.data.batches import batches
    from flip.export.load import load
    from flip.monitoring.curve_table import read_metrics
    from flip.monitoring.results import read_runs
    from flip.version import __version__
    from jobs.submission.api import plan, submit
else:

    def __getattr__(name):
        # Imported at first use: importing the package must not import torch. ``submit`` and ``plan`` are the
        # launcher's, the only names of jobs/ in flip/. No module below may import the package (tests/test_imports.py).
        modules = {
            "batches": "flip.data.batches", "load": "flip.export.load",
            "read_metrics": "flip.monitoring.curve_table", "read_runs": "flip.monitoring.results",
            "plan": "jobs.submission.api", "submit": "jobs.submission.api", "__version__": "flip.version",
        }  # fmt: skip
        if name not in modules:
            raise AttributeError(f"module 'flip' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(modules[name]), name)

    def __dir__():
        return sorted(__all__)
