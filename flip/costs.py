"""What a run costs by arithmetic, before it starts: parameters, FLOPs, memory of devices and hosts, peaks of GPUs.

No torch, so that planning is instant. FLOPs of a step are those of its matrix products, forward and backward. Memory is
held against real steps by benchmarks/memory.py, on CPUs; on CUDA nothing was measured yet. Peaks are the datasheets'.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flip.config.derived import kept, positions, shares, world
from flip.config.schema import Compute, Config, ImageTower, Model, Stage, TextTower

LOSS_TILE = 1024
"""Columns of logits that the loss holds at once. On a CPU more are not faster (benchmarks/loss.py)."""


def parameters(model: Model) -> dict[str, int]:
    """Trainable parameters: ``image``, ``text`` and ``total``, which counts the logit scale (and bias) too."""
    image, text = model.image, model.text
    pixels = 3 * image.patch**2
    counts = {
        "image": pixels * image.width + 2 * image.width + _blocks(image) + image.width * model.embed,
        "text": (text.vocabulary + text.length) * text.width + _blocks(text) + text.width * model.embed,
    }
    return counts | {"total": sum(counts.values()) + 1 + (model.objective == "siglip")}


def _blocks(tower: ImageTower | TextTower) -> int:
    """The blocks and the LayerNorm after them."""
    return tower.layers * (12 * tower.width**2 + 13 * tower.width) + 2 * tower.width


def tokens(image: ImageTower, mask: str) -> int:
    """Length of the image tower's sequence: the visible patches and the class token."""
    return kept(image, mask) + 1


def forward_flops(model: Model, mask: str, positions: float | None = None) -> dict[str, int]:
    """Forward FLOPs of one pair at a mask ratio: ``image``, ``text``, ``total``. The loss is left out.

    ``positions``: of a caption that are computed, a mean, where text masking or masked padding leaves fewer than all.
    """
    image, text = model.image, model.text
    visible = tokens(image, mask)
    embedding = 2 * (visible - 1) * 3 * image.patch**2 * image.width
    counts = {
        "image": embedding + _forward(image, visible) + 2 * image.width * model.embed,
        "text": _forward(text, text.length if positions is None else positions) + 2 * text.width * model.embed,
    }
    return counts | {"total": sum(counts.values())}


def _forward(tower: ImageTower | TextTower, length: float) -> int:
    return round(tower.layers * (24 * length * tower.width**2 + 4 * length**2 * tower.width))


def training_flops(model: Model, mask: str, positions: float | None = None) -> dict[str, int]:
    """FLOPs of one pair in training: three forward passes, the backward one counting two. The basis of MFU."""
    return {name: 3 * count for name, count in forward_flops(model, mask, positions).items()}


def loss_bytes(local: int, world: int, embed: int, tile: int = LOSS_TILE) -> int:
    """Bytes that the loss of b = ``local`` pairs on each of W ranks holds at most, fp32: O(b * tile), never O(b * B).

    Three tiles of logits (backward), all ranks' texts with their gradient, the rank's own features with theirs, and
    log-sum-exp of rows and columns.
    """
    whole = local * world
    return 4 * (3 * local * min(tile, whole) + 2 * whole * embed + 2 * 2 * local * embed + 4 * (local + whole))


SAVED, SELECTED, TEMPORARY = 17, 9, 12
"""Values of the width per token. Saved by a block for its backward pass: its two inputs, two norms, q, k, v, the heads'
output, the hidden layer before and after its activation, and what attention copies. Of these ``recompute: selective``
keeps: input, q, k, v, the heads' projection, the hidden layer (SDPA's output besides). Temporary: what the backward
pass of a block holds beyond."""

NORMS, SQUARES = 2, 3
"""Under autocast on CUDA, which a single rank has for bf16, LayerNorm and softmax compute in fp32 (AT_FORALL_FP32 and
_SET_OPT_DTYPE in torch's ATen/autocast_mode.h); on a CPU, where SAVED was found, they do not. Beside SAVED: both norms'
inputs are of twice the bytes. Explicit attention keeps its weights in fp32 and a copy in bf16: three for one."""

LAST, LAST_SELECTED = 5, 4
"""The same two of the text tower's last block, of which the first position alone goes on: input, norm, q, k and v."""

STATE_BYTES = 12
"""Of a checkpoint per parameter: the weight and two moments, fp32."""

SLOTS = 4
"""Parts of batches that a loader process may be ahead (``flip.data.worker_pool``)."""
IN_HAND = 2
"""Batches of the rank itself: the one in use, and the next one while it is put together."""


def device(model: Model, compute: Compute, local: int, mask: str, ranks: int = 1, left: int = 0) -> dict[str, int]:
    """Bytes that one rank holds at the peak of a step of ``local`` pairs: each part and their ``total``.

    ``left``: positions of a caption, where a text mask leaves fewer than all. Weights, gradients and both moments are
    fp32 and shared over the ranks of a copy, but for gradients between micro-batches. Activations are freed while
    gradients come: the peak is at the end of the forward pass, when the text tower's are gone, or at the end of the
    backward pass or the step of the optimiser, whichever is most. Interpreter, libraries and (on CUDA) context and
    kernels come on top.
    """
    count, shard = parameters(model), max(1, ranks // compute.replicate)
    length, micro = tokens(model.image, mask), -(-local // compute.accumulate)
    size, captions = 2 if compute.precision == "bf16" else 4, left or model.text.length
    always = {
        "weights": 4 * count["total"] // shard,
        "moments": 8 * count["total"] // shard,
        "batch": local * (kept(model.image, mask) * (3 * model.image.patch**2 + 2) + 4 * model.text.length),
    }
    vocabulary = model.text.vocabulary * model.text.width
    if ranks == 1 and compute.precision == "bf16":
        always["bf16_weights"] = 2 * (count["total"] - vocabulary)  # autocast's copies
    gradients = {name: 4 * count[name] // shard for name in ("image", "text")}
    images = micro * size * _saved(model.image, length, compute, ranks) + _edge(model.image, mask, micro, size)
    texts = micro * size * _saved(model.text, captions, compute, ranks, first=True)
    work = {
        "image": micro * size * TEMPORARY * length * model.image.width,
        "text": micro * size * TEMPORARY * captions * model.text.width,
    }
    # Earlier micro-batches have left the gradient of everything; ranks add theirs up and share them after the last.
    earlier = 4 * count["total"] if compute.accumulate > 1 else 0
    loss = loss_bytes(local, ranks, model.embed)
    both = {"image_activations": images, "text_activations": texts}
    moments = [
        {"gradients": earlier, **both, "temporary": work["text"], "loss": loss},
        {"gradients": max(earlier, gradients["text"]), "image_activations": images, "temporary": work["image"]},
        {"gradients": earlier or sum(gradients.values())},
    ]  # fmt: skip
    if ranks > 1:
        for parts, gathered in zip(moments, _gathered(model, compute, size), strict=True):
            parts["gathered"] = gathered
    parts = always | max(moments, key=lambda parts: sum(parts.values()))
    return parts | {"total": sum(parts.values())}


def _gathered(model: Model, compute: Compute, size: int) -> tuple[int, int, int]:
    """Bytes of weights that a rank holds whole, and of gradients before their sum, at the three moments of ``device``.

    Before the last micro-batch FSDP gives back no weights in the backward pass (``flip.training.grad_cache``), and
    projections are fp32. Until its end there is the text tower's gradient of the embedding besides, and that of the
    block at work.
    """
    image, text, count = model.image, model.text, parameters(model)
    block, vocabulary = 12 * max(image.width, text.width) ** 2, text.vocabulary * text.width
    # Two blocks, at work and on their way, or a tower's rest, with the gradients of one.
    units = (2 * size + 4) * max(block, vocabulary)
    if compute.accumulate == 1:
        return units, units, units
    whole = size * count["total"] + (4 - size) * model.embed * (image.width + text.width)
    return units, units + size * count["text"], whole + size * (vocabulary + block)


def saved(model: Model, compute: Compute, micro: int, mask: str) -> int:
    """Bytes that autograd keeps of a micro-batch's forward pass on one rank, autocast's copies of weights included."""
    size = 2 if compute.precision == "bf16" else 4
    image = _saved(model.image, tokens(model.image, mask), compute)
    text = _saved(model.text, model.text.length, compute, first=True)
    copies = 2 * (parameters(model)["total"] - model.text.vocabulary * model.text.width) if size == 2 else 0
    return micro * size * (image + text) + _edge(model.image, mask, micro, size) + copies


def _saved(tower: ImageTower | TextTower, length: int, compute: Compute, ranks: int = 1, first: bool = False) -> int:
    """Values that the blocks save for the backward pass of one sequence, and one block at work, where it is rebuilt.

    ``first``: of the last block only the first position is computed.
    """
    one, wide = length * tower.width, ranks == 1 and compute.precision == "bf16" and compute.device == "cuda"
    squares = (SQUARES if wide else 1) * tower.heads * length**2 if compute.attention == "explicit" else 0
    whole = (SAVED + (NORMS if wide else 0)) * one + squares
    if compute.recompute == "no":
        return tower.layers * whole - ((whole - (LAST + wide) * one) if first else 0)
    if compute.recompute == "block":
        return tower.layers * one + whole
    selected = SELECTED + (compute.attention == "sdpa")
    return tower.layers * selected * one - ((selected - LAST_SELECTED) * one if first else 0) + whole


def _edge(image: ImageTower, mask: str, micro: int, size: int) -> int:
    """Bytes of the normalised pixels of a micro-batch, which the embedding's gradient needs."""
    return micro * size * kept(image, mask) * 3 * image.patch**2


def loader(config: Config, stage: Stage) -> int:
    """Bytes that the loader of one rank holds at most on the host: two blocks of every lane, and batches.

    Batches are those that its processes are ahead, and those in hand.
    """
    ranks, data, image = world(config), config.data, config.model.image
    raw = sum(len(one.lanes) * data.block * one.chunk * one.sample_bytes for one in shares(data)) / ranks
    row = kept(image, stage.mask) * (3 * image.patch**2 + 2) + 6 * positions(config.model.text, stage.text_mask) + 16
    batches = (SLOTS if data.workers else 0) + IN_HAND
    return int(2 * raw + batches * stage.batch // ranks * row)


def saving(config: Config) -> int:
    """Bytes that a rank's host holds of a checkpoint on its way: its file, and a copy before.

    What lies on the host and is waited for needs none. From a card DCP fetches all tensors before it makes a file.
    """
    copies = 2 if config.checkpoint.background == "yes" or config.compute.device == "cuda" else 1
    return copies * STATE_BYTES * parameters(config.model)["total"] // world(config)


def rank(config: Config, stage: Stage) -> dict[str, int]:
    """``device`` of a resolved configuration's stage."""
    ranks, left = world(config), positions(config.model.text, stage.text_mask)
    return device(config.model, config.compute, stage.batch // ranks, stage.mask, ranks, left)


@dataclass(frozen=True)
class Accelerator:
    name: str
    pattern: str
    """Of its names, in lower case: those that people and drivers give it, and Slurm's gres."""
    memory_gb: float
    tflops: float
    """Dense bf16 with fp32 sums, TFLOP/s."""
    source: str


#: The first whose pattern is found in a name counts. A bare ``a100`` is taken for the smaller one.
ACCELERATORS = (
    Accelerator("B200", r"\bb200", 180, 2250, "NVIDIA HGX B200 data sheet: 4500 with sparsity"),
    Accelerator("GH200", r"gh200", 96, 989, "NVIDIA GH200 data sheet: 1979 with sparsity"),
    Accelerator("H200 NVL", r"\bh200.*nvl", 141, 835, "NVIDIA H200 data sheet: 1671 with sparsity"),
    Accelerator("H200", r"h200", 141, 989, "NVIDIA H200 data sheet: 1979 with sparsity"),
    Accelerator("H100 NVL", r"h100.*nvl", 94, 835, "NVIDIA H100 data sheet: 1671 with sparsity"),
    Accelerator("H100 PCIe", r"h100.*pcie", 80, 756, "NVIDIA H100 data sheet: 1513 with sparsity"),
    Accelerator("H100 SXM", r"h100", 80, 989, "NVIDIA H100 data sheet: 1979 with sparsity"),
    Accelerator("A100 80 GB", r"a100.*80", 80, 312, "NVIDIA A100 data sheet"),
    Accelerator("A100 40 GB", r"a100", 40, 312, "NVIDIA A100 data sheet"),
    Accelerator("L40S", r"l40s", 48, 362, "NVIDIA L40S data sheet"),
    Accelerator("L4", r"\bl4\b", 24, 121, "NVIDIA L4 data sheet: 242 with sparsity"),
    Accelerator("A40", r"\ba40\b", 48, 150, "NVIDIA A40 data sheet"),
    Accelerator("A10", r"\ba10\b", 24, 125, "NVIDIA A10 data sheet"),
)


def find(name: str) -> Accelerator | None:
    """The card of that name, as ``H100 SXM``, ``NVIDIA A100-SXM4-80GB`` or gres ``h100``; None: not in the table."""
    name = name.lower()
    return next((card for card in ACCELERATORS if re.search(card.pattern, name)), None)


_SPEED = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}
"""Precision -> tensor-core rate relative to bf16. It is the same for every card of the table."""


def peak_flops(name: str, precision: str) -> float | None:
    """Dense datasheet peak of a device in FLOP/s, or None if it is unknown.

    ``name``: as ``torch.cuda.get_device_name`` returns it. ``precision``: ``bf16``, ``fp16``, ``tf32`` or ``fp32``. The
    last does not run on tensor cores and has no peak here. A MIG slice has only a part of its card's rate: unknown.
    """
    card = None if " MIG " in name else find(name)
    return None if card is None or precision not in _SPEED else 1e12 * card.tflops * _SPEED[precision]
