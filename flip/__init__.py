"""FLIP: masked CLIP training. ``flip.load(run)`` gives a trained model, ``flip.read_runs(root)`` the results."""


def __getattr__(name: str) -> object:
    # Looked up when first used: importing the package must not import torch.
    homes = {"load": "flip.loaded", "read_runs": "flip.results"}
    if name not in homes:
        raise AttributeError(f"module 'flip' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(homes[name]), name)
