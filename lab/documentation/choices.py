"""The page with every implementation that a setting selects by name, from the registries.

The description of an entry is the first paragraph of its docstring.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lab.documentation.markdown import table

_HEAD = """# Choices by name

The implementations that a setting selects by its name, from the tables in the code.
[CONTRIBUTING.md](../../CONTRIBUTING.md) says how to add one.
"""


def choices_page() -> str:
    """The page."""
    from flip.data.augment import AUGMENTATIONS
    from flip.data.patch_masking import PATCH_MASKINGS
    from flip.data.text_masking import TEXT_MASKINGS
    from flip.loss_kinds import LOSSES, all_parameters
    from flip.optimizer_kinds import OPTIMIZERS
    from flip.tokenizer import TOKENIZERS
    from flip.tower_kinds import IMAGE_TOWERS

    learned = {name: (f"`{name}`", f"`model.{name}`", what) for name, what in all_parameters().items()}
    steps = {
        name: (", ".join(f"`augment.{field}`" for field in step.fields), f"{step.purpose}: {_numbers(step)}")
        for name, step in AUGMENTATIONS.items()
    }
    parts = [
        _HEAD,
        _section(
            "Image towers", "`model.image.tower` (`IMAGE_TOWERS`, flip/tower_kinds.py):", ("tower",), IMAGE_TOWERS,
        ),
        _section("Losses", "`model.objective` (`LOSSES`, flip/loss_kinds.py):", ("loss",), LOSSES),
        "Learned parameters of losses, which are metrics too:\n",
        table(("parameter", "first value", "meaning"), learned.values()),
        _section("Optimisers", "`optim.name` (`OPTIMIZERS`, flip/optimizer_kinds.py):", ("optimiser",), OPTIMIZERS),
        _section(
            "Steps of the augmentation",
            "In this order (`AUGMENTATIONS`, flip/data/augment.py). Draws: purpose and i of "
            "[contracts.md](../contracts.md#randomness).",
            ("step", "fields; all 0: off", "draws"), AUGMENTATIONS, steps,
        ),
        _section(
            "Masking of patches", "`patch_masking` of a stage (`PATCH_MASKINGS`, flip/data/patch_masking.py):",
            ("way", ), PATCH_MASKINGS,
        ),
        _section(
            "Masking of texts", "`text_masking` of a stage (`TEXT_MASKINGS`, flip/data/text_masking.py):",
            ("way", ), TEXT_MASKINGS,
        ),
        _section(
            "Tokenizers", "`--kind` of `flip tokenizer train` (`TOKENIZERS`, flip/tokenizer.py); a file states its.",
            ("kind", ), TOKENIZERS,
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def _numbers(step: Any) -> str:
    last = step.first + step.count - 1
    if last == step.first:
        return str(last)
    return f"{step.first} .. {last}"


def _section(
    title: str, about: str, columns: Sequence[str], registry: Mapping[str, Any],
    more: Mapping[str, Sequence[str]] | None = None,
) -> str:  # fmt: skip
    rows = [(f"`{name}`", *(more or {}).get(name, ()), description(entry)) for name, entry in registry.items()]
    return f"## {title}\n\n{about}\n\n{table((*columns, 'description'), rows)}"


def description(entry: Any) -> str:
    """The first paragraph of the docstring of an entry, a class or an object, as one line."""
    kind = entry if isinstance(entry, type) else type(entry)
    return " ".join((kind.__dict__.get("__doc__") or "").partition("\n\n")[0].split()).replace("``", "`")
