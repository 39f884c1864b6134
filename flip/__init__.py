"""FLIP: masked CLIP training. ``flip.load(run)`` gives a trained model, ``flip.read_runs(root)`` the results.

The host's Python >= 3.6 reads this file too.
"""

__all__ = ["__version__", "load", "read_runs"]
__version__ = "0.2.0"

TYPE_CHECKING = False  # type checkers and editors take it for true; ``typing`` need not be imported
if TYPE_CHECKING:
    from flip.export.load import load
    from flip.monitoring.results import read_runs
else:

    def __getattr__(name):
        # Imported at first use: importing the package must not import torch.
        modules = {"load": "flip.export.load", "read_runs": "flip.monitoring.results"}
        if name not in modules:
            raise AttributeError(f"module 'flip' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(modules[name]), name)

    def __dir__():
        return sorted(__all__)
