"""The fields of a run's configuration, with their limits, and the named model sizes (docs/contracts.md, Configuration).

Lengths are in samples, sizes in pixels or bytes, times in the unit that the name says. A value of ``auto`` is resolved
when a run is submitted (``flip.config.resolve``) and never occurs in a run's ``config.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from flip.common.option import option
from flip.runs.formats import CONFIG_NUMBER

MAX_SAMPLES = 2**53 - 1
"""Length of a stage. Larger counts are not exact in every JSON reader; no training comes near."""

YES_NO = ("yes", "no")
FUSED_KERNELS = ("flash", "cudnn", "efficient")
"""Values of ``compute.attention`` that name a kernel of SDPA (``flip.models.attention``)."""


def overrides(name: str, base: Any, *names: str) -> Any:
    """A dataclass of overrides: the fields of ``base`` in ``names`` (default: all), each None unless it is overridden.

    The fields keep the rules of ``base``. None is never part of the config hash.
    """
    kinds = get_type_hints(base)
    rules = base.__dataclass_fields__
    members = [
        (key, kinds[key] | None, field(default=None, metadata={**rules[key].metadata, "omit_if": None}))
        for key in names or kinds
    ]
    namespace = {"__doc__": base.__doc__, "__module__": __name__, "base": base}
    return make_dataclass(name, members, namespace=namespace)


def walk_fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any], Any]]:
    """(dotted key, section, field, value) of every field below a section; members of lists by name or position."""
    for item in fields(section):
        value = getattr(section, item.name)
        key = prefix + item.name
        members = {key: value}
        if isinstance(value, list):
            members = {f"{key}.{getattr(member, 'name', '') or i}": member for i, member in enumerate(value)}
        for name, member in members.items():
            if is_dataclass(member):
                yield from walk_fields(member, f"{name}.")
            else:
                yield name, section, item, member


@dataclass
class ImageTower:
    """The image encoder: a pre-norm ViT (docs/recipe.md, Image encoder)."""

    size: int = option(224, ge=1, le=2**14)
    """Side of the square input, pixels."""
    patch: int = option(16, ge=1, le=2**14)
    """Side of a patch, pixels; divides ``size``."""
    width: int = option(768, ge=1, le=2**20)
    layers: int = option(12, ge=1, le=2**12)
    heads: int = option(12, ge=1, le=2**12)
    pool: str = option("patches", choices=("all", "patches", "class", "attention"))
    """``all``: mean over class token and patches (recipe: paper). ``patches``: over patches only (recipe: portable).
    ``class``: the class token (recipe: clip). ``attention``: a learned query attends to the patches, then an MLP,
    without class token, as in SigLIP; tower timm only."""
    registers: int = option(0, ge=0, le=1024, omit_if=0)
    """Learned tokens without a position, which no mask hides and no mean includes but that of all; tower timm only."""
    qk_norm: bool = option(False, omit_if=False)
    """A LayerNorm of the queries and one of the keys of each head; tower timm only."""
    positions: str = option("sincos", choices=("sincos", "learned"), omit_if="sincos")
    """``sincos``: a fixed table, in which the class token has no position. ``learned``: a parameter, with a row for the
    class token and for each patch (recipe: clip)."""
    norm_pre: bool = option(False, omit_if=False)
    """A LayerNorm before the first block; the embedding of patches then has no bias (recipe: clip)."""
    tower: str = option("flip", choices=("flip", "timm"), omit_if="flip", user_class="UserImageTower")
    """``flip``: the toolkit's own. ``timm``: of timm's blocks, for registers, qk_norm and pool attention
    (docs/variants.md, Image towers). Or a class of your own, FILE.py:Class."""


@dataclass
class TextTower:
    """The text encoder: the same blocks (docs/recipe.md, Text encoder)."""

    length: int = option(32, ge=1, le=2**14)
    """Tokens per caption, cut or padded with id 0."""
    vocabulary: int = option(30522, ge=1, le=2**31 - 1)
    """Rows of the embedding; at least the tokenizer's size."""
    width: int = option(512, ge=1, le=2**20)
    layers: int = option(12, ge=1, le=2**12)
    heads: int = option(8, ge=1, le=2**12)
    prepend_cls: bool = True
    """Put [CLS] first and pool it (recipe: portable). False: pool the first word piece (recipe: paper)."""
    repair: bool = option(False, omit_if=False)
    """Repair broken encodings in texts (UTF-8 decoded as another encoding, by ftfy), as open_clip does with every text
    (recipe: portable). False: use texts as they are (recipe: paper)."""
    padding: str = option("attend", choices=("attend", "mask"), omit_if="attend")
    """``attend``: attention includes padding (both recipes). ``mask``: attention excludes padding. This is another
    model, and a faster one: padding is not computed at all (docs/variants.md, Text without padding)."""
    causal: bool = option(False, omit_if=False)
    """A token attends to earlier ones only. A caption stands between a start and an end token, which is pooled. Padding
    follows it, so it is neither seen nor computed (recipe: clip). Needs a byte-pair tokenizer."""


@dataclass
class Model:
    """The two towers and what joins them."""

    size: str = option("B/16", identity=False)
    """A row of ``MODEL_PRESETS``: sets every field below that is not given by name."""
    embed: int = option(512, ge=1, le=2**20)
    """Width of the shared embedding."""
    image: ImageTower = option(ImageTower)
    text: TextTower = option(TextTower)
    temperature: float = option(0.07, gt=0)
    """Initial temperature; logit_scale starts at ln(1 / temperature)."""
    max_logit_scale: float = option(100.0, ge=1)
    """The scale is clamped to [1, this] inside the forward pass (docs/recipe.md, Objective)."""
    objective: str = option("clip", choices=("clip", "siglip"), omit_if="clip", user_class="Loss")
    """``clip``: symmetric InfoNCE. ``siglip``: the sigmoid loss of each pair; recipe siglip has its values of
    temperature, bias and clamp. Or a class of your own, FILE.py:Class."""
    logit_bias: float = option(-10.0, ge=-1_000_000, le=1_000_000, omit_if=-10.0)
    """Initial bias of the logits, learned; used by objective siglip only."""
    activation: str = option("gelu_tanh", choices=("gelu_tanh", "gelu", "quick_gelu"), omit_if="gelu_tanh")
    """Of the MLPs. ``gelu_tanh``: GELU by its tanh approximation. ``gelu``: exact. ``quick_gelu``: x sigmoid(1.702 x)
    (recipe: clip)."""
    norm_eps: float = option(1e-6, choices=(1e-6, 1e-5), omit_if=1e-6)
    """Added to the variance in all LayerNorms; 1e-5 in recipe clip."""
    initialisation: str = option("xavier", choices=("xavier", "clip"), omit_if="xavier")
    """Distribution of the first weights (docs/variants.md, The architecture of CLIP)."""


def _preset(
    embed: int, image: tuple[int, int, int, int, int], text: tuple[int, int, int], **more: int
) -> dict[str, Any]:
    """``image``: size, patch, width, layers, heads. ``text``: width, layers, heads."""
    image_fields = dict(zip(("size", "patch", "width", "layers", "heads"), image, strict=True))
    return {
        "embed": embed,
        "image": image_fields,
        "text": dict(zip(("width", "layers", "heads"), text, strict=True), **more),
    }


#: name -> fields of ``Model`` (docs/recipe.md, Sizes). L/14 is L/16 with patch 14 (the paper tunes it from L/16).
MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "B/32": _preset(512, (224, 32, 768, 12, 12), (512, 12, 8)),
    "B/16": _preset(512, (224, 16, 768, 12, 12), (512, 12, 8)),
    "L/16": _preset(768, (224, 16, 1024, 24, 16), (768, 12, 12)),
    "L/14": _preset(768, (224, 14, 1024, 24, 16), (768, 12, 12)),
    "H/14": _preset(1024, (224, 14, 1280, 32, 16), (1024, 24, 16)),
    # for tests: small, but with every kind of part
    "tiny": _preset(48, (64, 8, 64, 3, 2), (64, 2, 2), vocabulary=1000),
    # for the quickstart: 48 px images, two CPU cores
    "emoji": _preset(128, (48, 8, 128, 4, 2), (128, 1, 2), vocabulary=4000),
}


@dataclass
class DataSet:
    """One of several data sets of a run. Its sample ids start at s * 2^48, s being its position in the list from 0."""

    name: str = ""
    manifest: str = option("", path="manifest")
    """Folder of its manifest, as ``data.manifest``."""
    weight: float = option(1.0, gt=0, le=10**9, identity=False)
    """Its share of every batch, in proportion to the other weights; the resulting lanes may miss it by 1 %."""
    lanes: int = option(0, ge=0, le=2**20)
    """Lanes of this set; 0: auto, by weight."""
    samples: int = option(0, ge=0, le=2**48 - 1)
    """As ``data.samples``, of this set."""
    sample_bytes: int = option(40_000, ge=1, le=2**40, identity=False)
    """As ``data.sample_bytes``, of this set."""
    chunk: int = option(0, ge=0, le=2**20)
    """R of this set; 0: auto (its manifest's)."""


@dataclass
class Data:
    """What is read, in which order, and how it is decoded."""

    manifest: str = option("", path="manifest")
    """Folder of the data set's manifest. ``cache:NAME`` is NAME below FLIP_CACHE (default ~/.cache/flip)."""
    sets: list[DataSet] = option([], omit_if=[])
    """Several data sets instead of one; ``manifest`` and ``chunk`` are then empty, ``samples`` is their sum."""
    samples: int = option(0, auto=0, ge=0, le=2**48 - 1)
    """Nominal number of samples if there is no manifest yet (dry runs); 0: that of the manifest."""
    sample_bytes: int = option(40_000, ge=1, le=2**40, identity=False)
    """Nominal mean bytes of a sample if there is no manifest yet."""
    tokenizer: str = option("", path="file")
    """Path of the tokenizer.json; ``cache:`` as above."""
    token_table: str = option("", path="file", omit_if="")
    """Path of a table by ``flip tokenizer table``; for ``text_masking: frequency`` or ``syntax``, or
    ``classification``, of a stage."""
    weights: str = option("", path="file", omit_if="")
    """Path of a file by ``flip shards weights``: each sample's expected views in an epoch (docs/weights.md)."""
    frequency_threshold: float = option(1e-6, gt=0, le=1, omit_if=1e-6)
    """t of ``text_masking: frequency``: a token with share f of all tokens is kept with probability sqrt(t / f)."""
    captions: list[str] = option(["txt"], weights="caption_weights")
    """Where captions are: members with one per line (``txt``), members that are one caption (``txt:whole``), or fields
    of a JSON member (``json:caption``: a string or a list of strings). One caption is drawn by the counter hash. As a
    mapping to weights, ``{txt: 1, json:synthetic: 3}``: first one of those that the sample has, then one of its
    captions."""
    caption_weights: list[float] = option([], gt=0, le=10**9, omit_if=[])
    """The weights of ``captions``, in their order, if these are a list; empty: every caption is equally likely."""
    fields: list[str] = option([], omit_if=[])
    """Numbers of each sample that the loss of ``model.objective`` uses: fields at the top level of the ``json`` member,
    for example ``[similarity]``. A sample without one of them counts as damaged (docs/fields.md)."""
    workers: int = option(-1, auto=-1, ge=-1, le=1024, identity=False)
    """Loader processes per rank; 0: load in the trainer's process; -1: auto (with GPUs 8, or as many as they need if
    that is more, within a node's cores if the profile gives them; on CPUs at most 1)."""
    chunk: int = option(0, ge=0, le=2**20)
    """R, samples per ranged read; 0: auto (the manifest's)."""
    block: int = option(4, ge=1, le=2**20)
    """Q, chunks per shuffling block."""
    lanes: int = option(0, auto=0, ge=0, le=2**20)
    """L, fixed streams; 0: auto (docs/contracts.md, Configuration)."""
    buffer: int = option(0, auto=0, ge=0, identity=False)
    """Bytes of raw samples that all ranks may hold together; 0: auto (a quarter of the hosts' memory)."""
    decoder: str = option("auto", auto="auto", choices=("auto", "pillow", "simplejpeg"))
    """``pillow`` (reference) or ``simplejpeg`` (JPEG only; other formats go to Pillow)."""
    resize: str = option("auto", auto="auto", choices=("auto", "pillow", "torchvision"))
    """``pillow`` or ``torchvision`` (uint8, antialiased)."""
    to_rgb: str = option("flatten", choices=("flatten", "convert"), omit_if="flatten")
    """How images become RGB, in training and evaluation. ``flatten``: transparency is composed on white, 16-bit grey is
    scaled. ``convert``: as Pillow and open_clip convert: the alpha channel is dropped, 16-bit values above 255 become
    255 (recipe: portable2)."""
    exif: str = option("ignore", choices=("ignore", "apply"), omit_if="ignore")
    """EXIF orientation of images, in training, evaluation and predictions. ``ignore``: pixels are used as stored, as
    open_clip does. ``apply``: images are turned upright before the crop."""
    max_replaced: float = option(0.01, ge=0, le=1)
    """Share of samples that may be replaced because they cannot be decoded; more end the run with 65."""
    deadline: float = option(600.0, ge=0, le=86_400, identity=False)
    """Seconds of storage outage after which a read fails and the run ends with 69, to be restarted later."""
    timeout: float = option(15.0, gt=0, le=3600, identity=False)
    """Seconds without a byte after which a request to storage has failed and is sent again."""
    hedge: float = option(1.0, ge=0, le=3600, identity=False)
    """Seconds without an answer after which, at the earliest, a second request is sent; 0: never."""
    client: str = option("s3fs", choices=("s3fs", "obstore"), identity=False)
    """Object storage client: ``s3fs``, or ``obstore`` if installed, which needs less CPU time per byte."""
    cache: str = option("", path="folder", identity=False)
    """Folder on each node's local disk that caches chunks (docs/shards.md); ``""``: no cache."""
    cache_bytes: int = option(100_000_000_000, ge=1, identity=False)
    """Size limit of a node's cache; the oldest chunks are deleted first."""


@dataclass
class Init:
    """Source of the initial weights: a checkpoint of another run, or an export. By default they come from the seed."""

    run: str = option("", identity=False)
    """SWEEP/RUN, RUN of the same sweep, or the path of a run directory."""
    stage: str = option("", identity=False)
    """The stage of the checkpoint; empty: any with ``samples``, or the last."""
    samples: int = option(0, ge=0, identity=False)
    """S of the checkpoint; 0: the end of the stage."""
    extend: bool = False
    """False: a warm start, which takes the weights alone and starts at S = 0. True: continue from S, with the
    optimiser's moments if the stage continues."""
    export: str = option("", identity=False)
    """Instead of a run: the folder of an export (docs/export.md) whose weights a warm start takes."""
    commit: str = ""
    """Digest of the checkpoint or export, resolved at submission. The config hash has this and ``extend``."""


@dataclass
class Augment:
    """Drawn per sample by the counter hash: purposes crop 1, flip 2, augment 6 (docs/contracts.md, Randomness)."""

    crop_area: list[float] = option([0.5, 1.0])
    """Smallest and largest share of the image's area."""
    crop_aspect: list[float] = option([0.75, 4 / 3])
    """Smallest and largest width / height of the crop."""
    flip: float = option(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    rotate: float = option(0.0, ge=0, le=180)
    """Largest rotation, degrees; 0: none. Any of rotate, translate, zoom > 0 makes one affine map of the crop."""
    translate: float = option(0.0, ge=0, le=1)
    """Largest shift, share of the side."""
    zoom: float = option(0.0, ge=0, le=10)
    """Largest zoom in or out: factor in [1 / (1 + z), 1 + z], log-uniform."""
    brightness: float = option(0.0, ge=0, le=1)
    contrast: float = option(0.0, ge=0, le=1)
    saturation: float = option(0.0, ge=0, le=1)
    """Colour: factor uniform in [1 - x, 1 + x] each; 0: off."""
    grey: float = option(0.0, ge=0, le=1)
    """Probability of a grey image."""
    steps: list[str] = option([], omit_if=[], user_class="AugmentationStep")
    """Steps of your own, FILE.py:Class, applied in this order after all others."""
    mean: list[float] = option([0.485, 0.456, 0.406])
    std: list[float] = option([0.229, 0.224, 0.225], gt=0)
    """Normalisation of RGB values in [0, 1]."""


@dataclass
class Compute:
    """How the ranks compute."""

    device: str = option("auto", auto="auto", choices=("auto", "cpu", "cuda"))
    """``cpu`` or ``cuda``."""
    precision: str = option("auto", auto="auto", choices=("auto", "fp32", "bf16"))
    """``fp32`` or ``bf16``; auto: bf16 if the processor or GPU is fast at it."""
    attention: str = option("auto", auto="auto", choices=("auto", "explicit", "sdpa", *FUSED_KERNELS))
    """``explicit`` (matmul, softmax, matmul) or ``sdpa``; auto: explicit for bf16 on a CPU, else sdpa (measured). On
    CUDA ``sdpa`` leaves the kernel to torch; ``flash``, ``cudnn`` or ``efficient`` is the first that is tried."""
    threads: int = option(0, auto=0, ge=0, le=4096)
    """Threads for the arithmetic of a rank; 0: auto. Part of the config hash: it changes the last bits."""
    deterministic: str = option("auto", auto="auto", choices=("auto", *YES_NO))
    """``yes`` or ``no``; auto: yes on a CPU."""
    recompute: str = option("no", choices=("no", "selective", "block"), identity=False)
    """What blocks compute again in the backward pass (activation checkpointing). ``selective``: all but matrix products
    and SDPA, which costs little and saves two fifths of the memory or more. ``block``: everything, which costs a second
    forward pass and saves much more memory. The bits stay the same; compiled, the last ones may change."""
    compile: str = option("no", auto="auto", choices=("auto", *YES_NO), omit_if="no")
    """``yes``: compile the blocks (torch.compile), minutes at the start of every stage. Changes the last bits. ``auto``
    (the recipes): yes on CUDA."""
    replicate: int = option(1, auto=0, ge=0, le=2**20, omit_if=1)
    """Copies of the sharded weights (hybrid sharding). Each lies on W / this neighbouring ranks, for example those of a
    node; only gradients are exchanged between copies. 1: one copy over all ranks. 0 (the recipes): auto, a copy per
    node on CUDA. Changes the last bits."""
    loss_tile: int = option(1024, auto=0, ge=0, le=2**24, omit_if=1024)
    """Columns of logits that the loss computes at once. 0 (the recipes): auto, on CUDA about 2^23 / b for the b pairs
    of a rank, as a tile then takes 32 MB; 1024 on a CPU. Changes the last bits."""
    loss_tf32: str = option("no", choices=YES_NO, omit_if="no")
    """``yes``: the loss multiplies in TF32 on CUDA, with an error of about 4e-4 of its gradients, beside 1 % of bf16
    towers. Changes the last bits there; no effect on a CPU. All other fp32 arithmetic stays fp32."""
    reshard: str = option("yes", auto="auto", choices=("auto", *YES_NO), identity=False)
    """Whether the full weights of a block are freed after its forward pass and gathered again for the next pass.
    ``no`` needs memory for all of them and halves the traffic, more so with ``accumulate``; the same bits. ``auto``
    (the recipes): no on GPUs if the plan fits their memory, else yes."""
    accumulate: int = option(1, ge=1, le=2**20, omit_if=1)
    """Micro-batches into which a rank splits its share of a batch: less memory for activations, a second forward pass,
    the same gradient (pairs are still contrasted with the whole batch). Changes the last bits."""


if TYPE_CHECKING:
    StageImage = ImageTower
    StageText = TextTower
    StageAugment = Augment
    StageCompute = Compute
else:
    StageImage = overrides("StageImage", ImageTower, "size", "patch")
    StageText = overrides("StageText", TextTower, "length")
    StageAugment = overrides("StageAugment", Augment)
    StageCompute = overrides("StageCompute", Compute, "recompute")


@dataclass
class Stage:
    """A part of the training with its own length, batch, mask, learning rate, image size, text length, augmentation."""

    name: str = "pretrain"
    samples: int = option(0, ge=1, le=MAX_SAMPLES)
    """Length of this stage; its steps are ceil(samples / batch)."""
    batch: int = option(0, ge=1, le=2**31 - 1)
    """B, the global batch of contrasted pairs."""
    mask: str = option("0.5", decimal=True)
    """Share of patches dropped, a decimal number; floor(P * (1 - mask)) stay, in exact arithmetic."""
    patch_masking: str = option(
        "uniform", choices=("uniform", "block", "grid"), omit_if="uniform", user_class="PatchMasking"
    )
    """Which patches are dropped. ``uniform``: any. ``block``: rectangles. ``grid``: a regular grid (docs/variants.md,
    Masking of patches). Or a class of your own, FILE.py:Class."""
    text_mask: str = option("0", decimal=True, omit_if="0")
    """The same for the positions of a caption, padding included; the first one, which is pooled, always stays."""
    text_masking: str = option(
        "random", choices=("random", "truncation", "prioritised", "frequency", "syntax"), omit_if="random",
        user_class="TextMasking",
    )  # fmt: skip
    """Which are dropped. ``random``: any. ``truncation``: the last ones. ``prioritised``: padding before tokens.
    ``frequency``: frequent words. ``syntax``: padding, then words that are neither nouns nor adjectives, then
    adjectives (docs/variants.md, Masking of text). Or a class of your own, FILE.py:Class."""
    locked: list[str] = option([], choices=("image", "text"), omit_if=[])
    """Towers that keep their weights in this stage, in evaluation mode; their projections are trained."""
    classification: float = option(0.0, ge=0, omit_if=0.0)
    """Weight of the loss of the text classification head, which is added to the contrastive loss; 0: no head. Needs
    ``data.token_table`` (docs/variants.md, Text classification head)."""
    base_lr: float = option(4e-6, ge=0)
    """Peak learning rate per 256 samples of batch: lr = base_lr * batch / 256."""
    warmup: int = option(0, ge=0, le=MAX_SAMPLES)
    """Samples of linear warm-up from 0; ``schedule`` follows."""
    schedule: str = option("cosine", choices=("cosine", "constant", "wsd"), omit_if="cosine")
    """``cosine``: to 0 at the end of the stage. ``constant``: the peak. ``wsd`` (warm-up, stable, decay): the peak,
    then to 0 over the last ``cooldown`` samples (docs/variants.md, Schedules)."""
    cooldown: int = option(0, ge=0, le=MAX_SAMPLES, omit_if=0)
    """Samples of the decay at the end of the stage; for schedule wsd only."""
    image: StageImage = option(StageImage)
    """Image and patch size in this stage; absent: those of ``model.image``. Weights are converted at the border of two
    stages (docs/variants.md, Stages of other sizes)."""
    text: StageText = option(StageText)
    """Tokens per caption in this stage; absent: ``model.text.length``."""
    augment: StageAugment = option(StageAugment)
    """Fields of ``augment`` that differ in this stage."""
    compute: StageCompute = option(StageCompute)
    """What blocks compute again in this stage; absent: ``compute.recompute``. Only a stage without a mask may need
    it."""


@dataclass
class Optim:
    """The optimiser. A stage starts with fresh moments (docs/recipe.md, Optimiser and schedule)."""

    name: str = option("adamw", choices=("adamw", "muon"), omit_if="adamw", user_class="OptimizerKind")
    """A row of ``OPTIMIZERS`` in flip/optimizer_kinds.py, or a class of your own, FILE.py:Class."""
    beta1: float = option(0.9, ge=0, lt=1)
    beta2: float = option(0.95, ge=0, lt=1)
    eps: float = option(1e-8, gt=0)
    momentum: float = option(0.95, ge=0, lt=1, omit_if=0.95)
    """Of the matrices that optimiser muon updates; betas and eps are those of AdamW."""
    weight_decay: float = option(0.2, ge=0)
    decay_logit_scale: bool = False
    """True in recipe: paper. Class token and token embedding are decayed in both; biases, gains, positions never."""
    clip: float = option(0.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""


@dataclass
class Checkpoint:
    """When checkpoints are saved, which ones are kept, and where."""

    minutes: float = option(0.0, ge=0)
    """Interval between checkpoints, minutes of training; used if ``samples`` is 0. 0: auto, from the measured cost of
    saves and the rate of interruptions (``flip.checkpoint.manager``)."""
    samples: int = option(0, ge=0)
    """Interval between checkpoints in samples; 0: by time."""
    keep: int = option(2, ge=1, le=1000)
    """Newest checkpoints to keep, in addition to the last of every stage."""
    keep_at: list[int] = option([], ge=1, le=MAX_SAMPLES)
    """Values of S at which a checkpoint is saved and kept for good, so that other runs can start from it."""
    background: str = option("yes", choices=YES_NO)
    """``yes``: training continues while a copy of the state in host memory is written; at most one save is in progress.
    ``no``: training waits. Both need the same memory, because the state is always copied first."""
    url: str = ""
    """Where checkpoints are stored instead of the run directory, as ``s3://bucket/prefix`` or with another admitted
    scheme (``flip.runs.addresses``): below ``<sweep>/<run>-<token>/``. Their commit.json is also in the run directory.
    ``""``: the run directory."""


@dataclass
class EvaluationSet:
    """One data set to score on (docs/evaluation.md). Its shards hold a ``cls`` member, for retrieval a ``txt`` one."""

    name: str = ""
    manifest: str = option("", path="manifest")
    classes: str = option("", path="file", identity=False)
    """Zero-shot: JSON {"names": [...], "templates": ["a picture of {}", ...]}. No part of the config hash: names can be
    corrected without another training."""
    role: str = option("test", choices=("validation", "test"))
    """``validation``: scored in training and used to choose; ``test``: scored once, at the end."""
    task: str = option("zeroshot", choices=("zeroshot", "retrieval", "probe"), omit_if="zeroshot")
    """``zeroshot``, ``retrieval`` (images and captions, both ways), or ``probe`` (linear, on frozen features)."""
    train: str = option("", path="manifest", omit_if="")
    """Probe: the manifest of the images that it is fitted on."""


@dataclass
class Evaluate:
    """Evaluations in training."""

    every: int = option(0, ge=0, identity=False)
    """Samples between evaluations in training (sets of role ``validation``); 0: after each stage and at the end."""
    batch: int = option(256, ge=1, le=2**31 - 1, identity=False)
    """Images or texts that a rank encodes at once."""
    preprocess: str = option(
        "crop_resize", choices=("crop_resize", "resize_crop", "resize_crop_floor"), omit_if="crop_resize"
    )
    """Order of resize and crop of an image's view (bicubic, centred). ``crop_resize``: the central square, whose edges
    may lie between pixels, is resized (recipes: paper, portable). ``resize_crop``: the short side is resized, then the
    square is cropped at whole pixels, as open_clip and torchvision do (recipe: portable2).
    ``resize_crop_floor``: converted to RGB, resized, and cropped at a corner that is rounded down, as transformers does
    (recipe: clip)."""
    sets: list[EvaluationSet] = option([])


@dataclass
class Monitor:
    """What is logged, and when a run counts as hung."""

    log_every: int = option(10, ge=1, le=2**31 - 1)
    """Steps between metric lines."""
    status_seconds: float = option(3.0, gt=0)
    """Seconds between updates of status.json."""
    hang_minutes: float = option(20.0, ge=0, le=1_000_000)
    """Minutes without a step after which a rank exits with 71, to be restarted; a save may take six times as long.
    0: never. Must exceed ``data.deadline``, which is how long a read may wait."""
    spike: float = option(0.0, ge=0)
    """A loss above median + this * sigma of the last ``spike_window`` losses is reported, and its samples are recorded
    (``anomalies/``); start with 8. The run continues. 0: never."""
    spike_window: int = option(100, ge=3, le=10_000)
    """Steps; in the first steps of a stage or attempt, as many as this, no loss counts as a spike."""
    profile_steps: int = option(0, ge=0, le=1000)
    """Steps of rank 0 to trace with PyTorch's profiler (``traces/``); 0: none."""
    profile_from: int = option(0, ge=0)
    """S at which the trace starts; an attempt that starts later is not traced."""
    sample_minutes: float = option(10.0, ge=0, le=1_000_000)
    """Minutes between steps of rank 0 that are profiled for time spent waiting for other ranks; 0: never."""
    callbacks: list[str] = option([], omit_if=[])
    """Classes of your own, FILE.py:Class, that compute further metrics. The files lie in the folder of the sweep file,
    or below it, and are copied with the code (docs/monitoring.md, A metric of your own)."""
    wandb: str = ""
    """Project on Weights & Biases, PROJECT or ENTITY/PROJECT, to which a process outside of the ranks sends the metrics
    (docs/monitoring.md, Weights & Biases); ``""``: none. TensorBoard is always written."""


@dataclass
class Resources:
    """What a run occupies. Of this the config hash has the world size alone, which changes the last bits."""

    nodes: int = option(1, ge=1, le=2**20, least="least_nodes")
    """Nodes. With a range [LEAST, MOST] a run also trains on fewer: on numbers whose ranks divide the lanes."""
    least_nodes: int = option(0, ge=0, le=2**20)
    """Fewest nodes, if `nodes` is a range; 0: no range."""
    spares: int = option(0, ge=0, le=1024)
    """Further nodes of the allocation, which wait to replace lost ones."""
    processes: int = option(1, ge=1, le=1024)
    """Ranks per node: one per GPU, or CPU processes. W = nodes * processes."""
    gpus: int = option(0, ge=0, le=1024)
    """GPUs per node, 0: a CPU run."""
    cpus: int = option(0, ge=0, le=4096)
    """CPU cores per process; 0: that of the cluster profile."""
    hours: float = option(0.0, auto=0.0, ge=0)
    """Wall limit of one attempt; 0: auto (the ``hours`` of the cluster profile, at most 24)."""
    cluster: str = ""
    """Cluster profile of this run; empty: the sweep's. ``--cluster`` overrides it."""


@dataclass
class Config:
    """The whole configuration of a run."""

    schema: int = option(CONFIG_NUMBER, identity=False)
    seed: int = option(0, ge=0, le=2**64 - 1)
    """Seed of everything: order, crops, masks, captions, weights. 0 .. 2^64 - 1."""
    recipe: str = option("portable", identity=False)
    """Name of the file in sweeps/recipes that this configuration is based on; a label only, its values are fields."""
    model: Model = option(Model)
    init: Init = option(Init)
    data: Data = option(Data)
    augment: Augment = option(Augment)
    stages: list[Stage] = option([])
    optim: Optim = option(Optim)
    compute: Compute = option(Compute)
    checkpoint: Checkpoint = option(Checkpoint, identity=False)
    evaluate: Evaluate = option(Evaluate)
    monitor: Monitor = option(Monitor, identity=False)
    resources: Resources = option(Resources, identity=False)
