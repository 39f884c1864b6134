"""What a run costs by arithmetic, before it starts: parameters, FLOPs, memory of devices and hosts, peaks of GPUs.

No torch, so that planning is instant. FLOPs count the matrix products of a step, forward and backward. On CPUs
benchmarks/memory.py compares the memory with that of real steps; on CUDA it has not been measured. Peaks are those of
data sheets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from flip import loss_kinds, optimizer_kinds, tower_kinds
from flip.config.derived import (
    dataset_lanes,
    for_stage,
    target_count,
    visible_patch_count,
    visible_token_count,
    world_size,
)
from flip.config.schema import Compute, Config, ImageTower, Model, Stage, TextTower
from flip.tower_kinds import block_flops, block_parameters

LOSS_TILE = Compute.loss_tile
"""Columns of logits that the loss computes at once by default."""
USUAL_PASSES = 3
"""The cost of a step in forward passes if none is repeated: the backward pass counts as two."""

# Memory of a transformer block, in values per token and unit of width.
SAVED = 16
"""Saved for the backward pass: two inputs, two norms, q, k, v, the heads' output, and the hidden layer before and after
its activation."""
QUICK_GELU = 4
"""Saved in addition with activation quick_gelu: a sigmoid of the hidden layer."""
SELECTED = 9
"""Saved with ``recompute: selective``: input, q, k, v, the heads' projection, the hidden layer; SDPA's output is
extra."""
LAST = 5
"""SAVED of a last block that computes only the pooled token: input, norm, q, k, v."""
LAST_SELECTED = 4
"""SELECTED of such a block."""
TEMPORARY = 12
"""The rest of the peak in the backward pass of a block."""

# Under autocast on CUDA (bf16 on a single rank) LayerNorm and softmax compute in fp32 (AT_FORALL_FP32 and
# _SET_OPT_DTYPE in torch's ATen/autocast_mode.h). On a CPU, where SAVED was measured, they do not.
NORMS = 2
"""Saved in addition to SAVED there: the inputs of both norms have twice the bytes."""
SQUARES = 3
"""Factor of the saved attention weights of explicit attention there: values in fp32, and a copy in bf16."""

SLOTS = 4
"""Batches that a loader process prepares in advance while its rank holds ``IN_HAND`` (``flip.data.worker_pool``)."""
IN_HAND = 2
"""Batches of the rank itself: the one in use, and the next one."""
BATCHES_ON_CUDA = 3
"""Batches on a GPU: the one in use, the next one, and one whose memory is not known to be free yet
(``flip.training.grad_cache``)."""
_SPEED = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}
"""Precision -> tensor-core rate relative to bf16, the same for every entry of the table."""


def parameters(model: Model) -> dict[str, int]:
    """Trainable parameters: ``image``, ``text`` and ``total``, which includes the logit scale and those of the loss."""
    text = model.text
    counts = {
        "image": tower_kinds.declared(model.image.tower).parameters(model),
        "text": (text.vocabulary + text.length) * text.width + block_parameters(text) + text.width * model.embed,
    }
    return counts | {"total": sum(counts.values()) + 1 + len(loss_kinds.declared(model.objective).parameters)}


def image_tokens(image: ImageTower, visible: int) -> int:
    """Tokens of an image in the blocks of its tower, with so many visible patches."""
    return visible + tower_kinds.declared(image.tower).prefix_tokens(image)


def block_matrices(model: Model, locked: Sequence[str] = ()) -> list[tuple[int, int]]:
    """(rows, columns) of every matrix of the blocks: q, k and v in one, the heads' projection, and both of the MLP.

    ``locked``: towers without theirs.
    """
    shapes = []
    for name, tower in (("image", model.image), ("text", model.text)):
        if name in locked:
            continue
        width = tower.width
        block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
        shapes += tower.layers * block
    return shapes


def trained_parameters(model: Model, locked: Sequence[str]) -> dict[str, int]:
    """``parameters`` without those of ``locked`` towers, whose projections are trained."""
    counts = parameters(model)
    widths = {"image": model.image.width, "text": model.text.width}
    for tower in locked:
        fixed = counts[tower] - widths[tower] * model.embed
        counts[tower] -= fixed
        counts["total"] -= fixed
    return counts


def moment_bytes(model: Model, optimizer: str, locked: Sequence[str] = ()) -> int:
    """Bytes of the moments of all trained parameters. ``optimizer``: ``optim.name``."""
    kind = optimizer_kinds.declared(optimizer)
    total = trained_parameters(model, locked)["total"]
    if not kind.others:
        return kind.moment_bytes * total
    matrices = sum(rows * columns for rows, columns in block_matrices(model, locked))
    return kind.moment_bytes * matrices + optimizer_kinds.declared(kind.others).moment_bytes * (total - matrices)


def optimizer_flops(model: Model, optimizer: str, locked: Sequence[str] = ()) -> int:
    """FLOPs of the matrix products of a step of the optimiser, over all ranks of a copy of the weights."""
    return sum(optimizer_kinds.declared(optimizer).matrix_flops(*shape) for shape in block_matrices(model, locked))


def head_parameters(model: Model) -> int:
    """Parameters of the text classification head, which ``parameters`` does not include."""
    return model.text.vocabulary * (model.image.width + 1)


def head_memory(model: Model, compute: Compute, stage: Stage, ranks: int) -> int:
    """Bytes of the text classification head on a rank: weights, gradients, moments of AdamW, the full weights and their
    gradient if sharded, three tiles of logits, and targets."""
    count = head_parameters(model)
    local = stage.batch // ranks
    shard = max(1, ranks // compute.replicate)
    gathered = 8 * count if ranks > 1 else 4 * count  # of one rank: gradients before they are added
    tiles = 4 * 3 * local // compute.accumulate * min(compute.loss_tile, model.text.vocabulary)
    return 16 * count // shard + gathered + tiles + 4 * target_count(stage) * local


def forward_flops(model: Model, mask: str, positions: float | None = None) -> dict[str, int]:
    """Forward FLOPs of one pair at a mask ratio: ``image``, ``text``, ``total``, without the loss.

    ``positions``: mean number of computed caption positions, if text masking or masked padding leaves fewer than all.
    """
    text = model.text
    visible = visible_patch_count(model.image, mask)
    counts = {
        "image": tower_kinds.declared(model.image.tower).flops(model, visible),
        "text": block_flops(text, text.length if positions is None else positions) + 2 * text.width * model.embed,
    }
    return counts | {"total": sum(counts.values())}


def training_flops(model: Model, mask: str, positions: float | None = None) -> dict[str, int]:
    """FLOPs of one pair in training, the basis of MFU: three times forward, because backward takes twice as many."""
    return {name: 3 * count for name, count in forward_flops(model, mask, positions).items()}


def forward_passes(compute: Compute) -> int:
    """Cost of a step in forward passes: the usual ones, plus those that are repeated."""
    return USUAL_PASSES + (compute.recompute == "block") + (compute.accumulate > 1)


def loss_bytes(local: int, world_size: int, embed: int, tile: int = LOSS_TILE, objective: str = Model.objective) -> int:
    """Peak bytes of the loss on a rank with ``local`` pairs of W * ``local``, in fp32.

    Counts three tiles of logits (backward), the texts of all ranks with their gradient, the rank's own features with
    theirs, and the values that the loss itself stores.
    """
    batch = local * world_size
    values = loss_kinds.declared(objective).values(local, batch)
    return 4 * (3 * local * min(tile, batch) + 2 * batch * embed + 2 * 2 * local * embed + values)


def device_memory(
    model: Model, compute: Compute, local: int, mask: str, ranks: int = 1, left: int = 0, optimizer: str = "adamw",
    locked: Sequence[str] = (),
) -> dict[str, int]:  # fmt: skip
    """Bytes of one rank at the peak of a step: each part and their ``total``.

    Args:
        local: pairs of the rank per step.
        mask: share of patches dropped.
        ranks: W.
        left: positions of a caption, if a text mask leaves fewer than all; 0: all.
        optimizer: ``optim.name``.
        locked: towers without gradients, moments and saved activations.

    Weights, gradients and moments are fp32 and sharded over the ranks of a replica, except gradients between
    micro-batches. Interpreter, libraries, and (on CUDA) context and kernels are not included.
    """
    peaks = _peaks(model, compute, local, mask, ranks, left or model.text.length, locked)
    if ranks > 1:
        for parts, gathered in zip(peaks, _gathered(model, compute, value_bytes(compute)), strict=True):
            parts["gathered"] = gathered
    constant = _constant_memory(model, compute, local, mask, ranks)
    constant["moments"] = moment_bytes(model, optimizer, locked) // max(1, ranks // compute.replicate)
    parts = constant | max(peaks, key=lambda parts: sum(parts.values()))
    return parts | {"total": sum(parts.values())}


def value_bytes(compute: Compute) -> int:
    """Bytes of one value of an activation, or of a weight of the blocks while it is used."""
    if compute.precision == "bf16":
        return 2
    return 4


def activations(
    model: Model, compute: Compute, micro: int, mask: str, ranks: int = 1, captions: int = 0
) -> dict[str, int]:
    """Bytes that autograd saves in the forward pass of a micro-batch, for the image and the text tower.

    ``captions``: positions of a caption; 0: all.
    """
    image = model.image
    visible = visible_patch_count(model.image, mask)
    size = value_bytes(compute)
    pixels = visible * 3 * image.patch**2  # normalised, for the gradient of the embedding
    tokens = image_tokens(image, visible)
    stem = pixels + (tokens * image.width if image.norm_pre else 0)
    text = _saved(model, model.text, captions or model.text.length, compute, ranks, pooled_only=True)
    pooled_only = image.pool == "class" and image.tower == ImageTower.tower
    images = _saved(model, image, tokens, compute, ranks, pooled_only)
    if image.qk_norm:  # queries and keys before their norms
        images += 2 * image.layers * tokens * image.width
    return {
        "image_activations": micro * size * (images + stem),
        "text_activations": micro * size * text,
    }


def loader_memory(config: Config, stage: Stage) -> int:
    """Peak bytes of one rank's loader on the host: two blocks of every lane, prepared batches, and those in hand."""
    ranks = world_size(config)
    data = config.data
    model = for_stage(config, stage).model
    raw = (
        sum(len(dataset.lanes) * data.block * dataset.chunk * dataset.sample_bytes for dataset in dataset_lanes(data))
        / ranks
    )
    pixels = visible_patch_count(model.image, stage.mask) * (3 * model.image.patch**2 + 2)
    row = pixels + 6 * visible_token_count(model.text, stage.text_mask) + 16 + 4 * target_count(stage)
    batches = IN_HAND
    if data.workers:
        batches += SLOTS
    if config.compute.device == "cuda":
        batches += IN_HAND  # page-locked copies
    return int(2 * raw + batches * stage.batch // ranks * row)


def state_bytes(config: Config) -> int:
    """Bytes of a checkpoint: weights in fp32, and the optimiser's moments."""
    total = 4 * parameters(config.model)["total"] + moment_bytes(config.model, config.optim.name)
    if any(stage.classification for stage in config.stages):
        total += 12 * head_parameters(config.model)
    return total


def checkpoint_memory(config: Config) -> int:
    """Upper bound of the bytes on a rank's host while a checkpoint is saved: the buffer with its file.

    Twice for GPUs, because torch rounds page-locked memory up to a power of two; fsspec copies what it writes.
    """
    url = config.checkpoint.url
    if config.compute.device == "cuda" or (url and not url.startswith("s3://")):
        copies = 2
    else:
        copies = 1
    return copies * state_bytes(config) // world_size(config)


def stage_memory(config: Config, stage: Stage) -> dict[str, int]:
    """``device_memory`` of a stage of a resolved configuration."""
    ranks = world_size(config)
    config = for_stage(config, stage)
    model = config.model
    left = visible_token_count(model.text, stage.text_mask)
    local = stage.batch // ranks
    parts = device_memory(model, config.compute, local, stage.mask, ranks, left, config.optim.name, stage.locked)
    if stage.classification:
        parts["head"] = head_memory(model, config.compute, stage, ranks)
        parts["total"] += parts["head"]
    return parts


def stage_flops(config: Config, stage: Stage) -> int:
    """``pair_flops`` in a stage."""
    model = for_stage(config, stage).model
    return pair_flops(
        model,
        stage.batch,
        stage.mask,
        text_mask=stage.text_mask,
        optimizer=config.optim.name,
        copies=config.compute.replicate,
        has_head=bool(stage.classification),
        locked=stage.locked,
    )


def pair_flops(
    model: Model, batch: int, mask: str, *, text_mask: str, optimizer: str, copies: int, has_head: bool,
    locked: Sequence[str] = (),
) -> int:  # fmt: skip
    """FLOPs of one pair in training, with its share of what the optimiser multiplies in a step.

    Args:
        text_mask: masks text to the positions that it leaves.
        copies: copies of the weights (``compute.replicate``); the optimiser multiplies once for each.
        has_head: whether the text classification head is trained.
        locked: towers that have a forward pass only.
    """
    positions = visible_token_count(model.text, text_mask)
    forward = forward_flops(model, mask, positions)
    flops = training_flops(model, mask, positions)["total"]
    for tower in locked:  # its projection alone has a backward pass, for its weights
        width = model.image.width if tower == "image" else model.text.width
        flops -= 2 * forward[tower] - 2 * width * model.embed
    flops += copies * optimizer_flops(model, optimizer, locked) // batch
    if has_head:
        flops += 3 * 2 * model.image.width * model.text.vocabulary
    return flops


class Accelerator(NamedTuple):
    """A GPU and its figures."""

    name: str
    pattern: str
    """Matches its names in lower case, with spaces for _ and -: marketing names, driver names, and Slurm's gres."""
    memory_gb: float
    """1e9 bytes: by the data sheet, or what CUDA reports if that is less, as for GDDR memory with ECC."""
    tflops: float
    """Dense bf16 with fp32 accumulation, TFLOP/s."""
    source: str


#: The first entry whose pattern matches counts. A bare ``a100`` matches the smaller one.
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
    Accelerator("L40S", r"l40s", 47, 362, "NVIDIA L40S data sheet; memory: 44.4 GiB, QwenLM/Qwen3-VL issue 2097"),
    Accelerator("L4", r"\bl4\b", 23, 121, "NVIDIA L4 data sheet: 242 with sparsity; memory: as A10"),
    Accelerator("A40", r"\ba40\b", 47, 150, "NVIDIA A40 data sheet; memory: as L40S"),
    Accelerator("A10", r"\ba10\b", 23, 125, "NVIDIA A10 data sheet; memory: 22.2 GiB, pytorch/torchtune issue 229"),
)


def find_accelerator(name: str) -> Accelerator | None:
    """The accelerator of a name such as ``NVIDIA A100-SXM4-80GB`` or gres ``nvidia_a40``; None if unknown.

    Also None for a MIG slice, which has only a part of its GPU's rate and memory.
    """
    words = re.sub(r"[_-]+", " ", name.lower())
    if re.search(r"\b\dg[. ]\d+gb|\bmig\b", words):
        return None
    return next((entry for entry in ACCELERATORS if re.search(entry.pattern, words)), None)


def peak_flops(name: str, precision: str) -> float | None:
    """Dense datasheet peak of a device in FLOP/s, or None if it is unknown.

    ``name``: from ``torch.cuda.get_device_name``. ``precision``: ``bf16``, ``fp16`` or ``tf32``; ``fp32`` has no peak
    here, as it does not use tensor cores.
    """
    entry = find_accelerator(name)
    if entry is None or precision not in _SPEED:
        return None
    return 1e12 * entry.tflops * _SPEED[precision]


def _constant_memory(model: Model, compute: Compute, local: int, mask: str, ranks: int) -> dict[str, int]:
    """The parts of ``device_memory`` that a step holds all the time, without the moments."""
    count = parameters(model)
    shard = max(1, ranks // compute.replicate)
    visible = visible_patch_count(model.image, mask)
    if compute.device == "cuda":
        batches = BATCHES_ON_CUDA
    else:
        batches = 1
    constant = {
        "weights": 4 * count["total"] // shard,
        "batch": batches * local * (visible * (3 * model.image.patch**2 + 2) + 4 * model.text.length),
    }
    if ranks == 1 and value_bytes(compute) == 2:  # autocast's copies
        constant["bf16_weights"] = 2 * (count["total"] - model.text.vocabulary * model.text.width)
    return constant


def _peaks(
    model: Model, compute: Compute, local: int, mask: str, ranks: int, captions: int, locked: Sequence[str]
) -> list[dict[str, int]]:
    """The other parts of ``device_memory`` at four times of a step, of which one is the peak.

    These are the end of the forward pass, the time after the image tower's activations are freed (text is encoded
    first), the end of the backward pass or the optimiser's step, and the loss of all micro-batches, which are encoded
    again after it. ``captions``: positions of a caption.
    """
    shard = max(1, ranks // compute.replicate)
    visible = visible_patch_count(model.image, mask)
    micro = -(-local // compute.accumulate)
    size = value_bytes(compute)
    trained = trained_parameters(model, locked)
    gradients = {name: 4 * trained[name] // shard for name in ("image", "text")}
    work = {
        "image": micro * size * TEMPORARY * image_tokens(model.image, visible) * model.image.width,
        "text": micro * size * TEMPORARY * captions * model.text.width,
    }
    # Between micro-batches each rank holds all gradients unsharded.
    earlier = 0
    if compute.accumulate > 1:
        earlier = 4 * trained["total"]
    loss = loss_bytes(local, ranks, model.embed, compute.loss_tile, model.objective)
    saved = activations(model, compute, micro, mask, ranks, captions)
    saved |= {f"{tower}_activations": 0 for tower in locked}
    texts = saved["text_activations"]
    # After the loss of micro-batches both towers' features are left, with their gradients.
    if compute.accumulate > 1:
        features = 4 * 2 * 2 * local * model.embed
    else:
        features = loss
    return [
        {"gradients": earlier, **saved, "temporary": work["image"], "loss": features},
        {"gradients": max(earlier, gradients["image"]), "text_activations": texts, "temporary": work["text"]},
        {"gradients": earlier or sum(gradients.values())},
        {"loss": loss},
    ]  # fmt: skip


def _gathered(model: Model, compute: Compute, size: int) -> tuple[int, int, int, int]:
    """Bytes of unsharded weights, and of gradients before their reduction, at the four times of ``_peaks``.

    Before the last micro-batch FSDP does not reshard weights in the backward pass (``flip.training.grad_cache``). Fp32
    projections are counted as if they stayed gathered from the forward pass to the end.
    """
    image = model.image
    text = model.text
    count = parameters(model)
    block = 12 * max(image.width, text.width) ** 2
    vocabulary = text.vocabulary * text.width
    projections = 4 * model.embed * (image.width + text.width)
    # The rest of a tower, the current and the prefetched block; gradients of the current one, as it computes them.
    units = projections + size * (vocabulary + 3 * block)
    # Gradients of the embedding or a block, and the fp32 copy that is being reduced.
    end = projections + (2 * size + 4) * max(block, vocabulary)
    unsharded = size * count["total"] + projections * (4 - size) // 4
    if compute.reshard == "no":
        units = unsharded + size * block
    if compute.accumulate > 1:  # all weights, and the gradients of the embedding and of a block
        end = unsharded + size * (vocabulary + block)
    if compute.accumulate == 1 or compute.reshard == "no":
        return units, units, end, units
    return units, units + size * count["image"], end, units


def _saved(
    model: Model, tower: ImageTower | TextTower, length: int, compute: Compute, ranks: int, pooled_only: bool
) -> int:
    """Values that the blocks save for the backward pass of one sequence, with the block that is being recomputed.

    ``pooled_only``: the last block computes only the pooled token.
    """
    tokens = length * tower.width
    fp32 = ranks == 1 and compute.precision == "bf16" and compute.device == "cuda"
    squares = 0
    if compute.attention == "explicit":
        squares = (SQUARES if fp32 else 1) * tower.heads * length**2
    values = SAVED + (QUICK_GELU if model.activation == "quick_gelu" else 0) + (NORMS if fp32 else 0)
    block = values * tokens + squares
    if compute.recompute == "no":
        return tower.layers * block - ((block - (LAST + fp32) * tokens) if pooled_only else 0)
    if compute.recompute == "block":
        return tower.layers * tokens + block
    selected = SELECTED + (compute.attention != "explicit")
    return tower.layers * selected * tokens - ((selected - LAST_SELECTED) * tokens if pooled_only else 0) + block
