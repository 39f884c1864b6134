"""The kinds of image towers: parameters, FLOPs, and the forms of exports that hold them.

``model.image.tower`` of a configuration chooses one. ``flip.models.image_towers`` builds it. Plans need only the sizes,
so nothing here imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from flip.common import user_classes
from flip.config.derived import patches
from flip.config.schema import Augment, ImageTower, Model, TextTower

if TYPE_CHECKING:
    from torch import nn


FORMS = ("native", "extra-block", "timm-tower", "transformers", "onnx")
"""Variants of open_clip's exports, and the other forms."""


class ImageTowerKind(ABC):  # noqa: B024 - users derive from UserImageTower
    """The sizes of one kind of image tower. Here those of a pre-norm ViT with all settings of ``model.image``."""

    exports: tuple[str, ...] = ()
    """Forms of exports, and variants of open_clip, that can hold the tower (``why_not_exported``)."""

    def prefix_tokens(self, image: ImageTower) -> int:
        """Tokens before the patches, in all blocks: the class token and the registers."""
        return has_class_token(image) + image.registers

    def parameters(self, model: Model) -> int:
        """Trainable parameters with the projection. Training compares the number with that of the built tower."""
        image = model.image
        # Vectors of the width of a token: patch weights, their bias or norm_pre's gain and bias, tokens, positions.
        learned = 0
        if image.positions == "learned":
            learned = has_class_token(image) + patches(image)
        vectors = 3 * image.patch**2 + (2 if image.norm_pre else 1) + has_class_token(image) + image.registers + learned
        norms = 0
        if image.qk_norm:
            norms = image.layers * 4 * (image.width // image.heads)
        pool = 0
        if image.pool == "attention":
            pool = 12 * image.width**2 + 12 * image.width
        return vectors * image.width + block_parameters(image) + norms + pool + image.width * model.embed

    def flops(self, model: Model, visible: int) -> int:
        """Forward FLOPs of one image with so many visible patches, of matrix products alone."""
        image = model.image
        tokens = visible + self.prefix_tokens(image)
        pool = 0
        if image.pool == "attention":  # keys and values, attention of one query, its projections, and the MLP
            pool = 4 * visible * image.width**2 + 4 * visible * image.width + 20 * image.width**2
        embedding = 2 * visible * 3 * image.patch**2 * image.width
        return embedding + block_flops(image, tokens) + pool + 2 * image.width * model.embed

    def why_not_exported(self, image: ImageTower, form: str) -> str:
        """The settings for which a form of exports has no place, as words; empty if it can hold the tower."""
        if form not in self.exports:
            return f"the tower (model.image.tower: {image.tower.partition('@')[0]})"
        if form == "timm-tower":
            return ""
        lacks = {
            f"registers (model.image.registers: {image.registers})": image.registers > 0,
            "norms of queries and keys (model.image.qk_norm: true)": image.qk_norm,
            "pooling by attention (model.image.pool: attention)": image.pool == "attention",
        }
        return ", ".join(feature for feature, applies in lacks.items() if applies)


class FlipTower(ImageTowerKind):
    """The toolkit's own ViT: class token, or mean of patches or of all tokens."""

    exports = FORMS


class TimmTower(ImageTowerKind):
    """A ViT of timm's blocks, with registers, norms of queries and keys, and SigLIP's pooling by attention. Without
    these it is the same function as ``flip``, with the same weights.
    """

    exports = FORMS


class UserImageTower(ImageTowerKind):
    """The base of an image tower in a file of a user (``model.image.tower: FILE.py:Class``).

    Plans execute no file: they count the parameters and FLOPs of a ViT with these settings. Training compares
    ``parameters`` with the built tower: override it if it differs.
    """

    @abstractmethod
    def build(self, model: Model, augment: Augment, attention: str) -> nn.Module:
        """The tower, a module with

        - ``forward(patches, keep_indices=None, with_pooled=False)``: (b, K, p*p*3) uint8 and the positions (b, K) of
          these patches, or all in order without them -> (b, E) fp32, not normalised; with ``with_pooled`` also the
          pooled features (b, D) before the projection;
        - ``blocks``, an ``nn.ModuleList`` of its equal parts, which are sharded and compiled one by one;
        - ``projection``, the last ``nn.Linear`` without bias, D -> E, which computes in fp32;
        - optionally ``draw(name, value, generator) -> bool``: fills the first value of a parameter. Without it, or if
          it returns False, vectors are 1, biases 0 and matrices Xavier's. Values given in ``__init__`` are overwritten.

        It is built on the meta device: create buffers inside ``with torch.device("cpu")``. It has no dropout and no
        stochastic depth. ``attention``: a resolved ``compute.attention``.
        """


#: ``model.image.tower`` -> its sizes.
IMAGE_TOWERS: dict[str, ImageTowerKind] = {
    "flip": FlipTower(),
    "timm": TimmTower(),
}


def has_class_token(image: ImageTower) -> bool:
    """Pooling by attention needs none."""
    return image.pool != "attention"


def image_tower(name: str) -> Any:
    """The kind of ``model.image.tower``. Executes a user's file."""
    if name in IMAGE_TOWERS:
        return IMAGE_TOWERS[name]
    return user_classes.named(name, {}, UserImageTower)  # type: ignore[type-abstract]


def declared(name: str) -> ImageTowerKind:
    """As ``image_tower``, of a user's class its constants alone: for plans."""
    return user_classes.declared(name, IMAGE_TOWERS, UserImageTower, "timm")  # type: ignore[arg-type, type-abstract]


def block_parameters(tower: ImageTower | TextTower) -> int:
    """Parameters of the blocks of a tower and of the LayerNorm after them, without norms of queries and keys."""
    return tower.layers * (12 * tower.width**2 + 13 * tower.width) + 2 * tower.width


def block_flops(tower: ImageTower | TextTower, length: float) -> int:
    """Forward FLOPs of the blocks of a tower for one sequence of ``length`` tokens."""
    return round(tower.layers * (24 * length * tower.width**2 + 4 * length**2 * tower.width))
