"""The fields of a run's configuration (docs/contracts.md, Configuration). Pure dataclasses: no torch, no files.

Lengths are in samples, sizes in pixels or bytes, times in the unit that the name says. A value of ``auto`` is resolved
when a run is submitted (``flip.config.resolve``) and never stands in a run's ``config.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flip.config.model import ImageTower as ImageTower  # one door to all fields
from flip.config.model import Model
from flip.config.model import TextTower as TextTower

SCHEMA = 1
"""Version of this schema; stands in config.yaml and identity.json. Another meaning needs a new number and a reader."""


@dataclass
class DataSet:
    """One of several data sets of a run. Its samples have ids from s * 2^48 on, s its place in the list from 0 on."""

    name: str = ""
    manifest: str = ""
    """Folder of its manifest, as ``data.manifest``."""
    weight: float = 1.0
    """Its share of every batch, in proportion to the others' weights; what lanes make of it may miss it by 1 %."""
    lanes: int = 0
    """Lanes that it holds; 0: auto, by weight."""
    samples: int = 0
    """As ``data.samples``, of this set."""
    sample_bytes: int = 40_000
    """As ``data.sample_bytes``, of this set."""
    chunk: int = 0
    """R of this set; 0: auto (its manifest's)."""


@dataclass
class Data:
    manifest: str = ""
    """Folder of the data set's manifest. ``cache:NAME`` means NAME below FLIP_CACHE (default ~/.cache/flip)."""
    sets: list[DataSet] = field(default_factory=list)
    """Several data sets instead of one; ``manifest`` and ``chunk`` are empty then, ``samples`` is their sum."""
    samples: int = 0
    """Nominal number of samples where there is no manifest to read yet (dry runs); 0: as the manifest says."""
    sample_bytes: int = 40_000
    """Nominal mean bytes of a sample where there is no manifest to read yet."""
    tokenizer: str = ""
    """Path of the tokenizer.json; ``cache:`` as above."""
    captions: list[str] = field(default_factory=lambda: ["txt"])
    """Where captions are: members with one per line (``txt``), or fields of a JSON member (``json:caption``: a string
    or a list of strings). One caption is drawn by the counter hash."""
    workers: int = -1
    """Loader processes per rank; 0: in the trainer's own process; -1: auto."""
    chunk: int = 0
    """R, samples per ranged read; 0: auto (the manifest's)."""
    block: int = 4
    """Q, chunks per shuffling block."""
    lanes: int = 0
    """L, fixed streams; 0: auto (docs/contracts.md, Configuration)."""
    buffer: int = 0
    """Bytes of raw samples that all ranks may hold together; 0: auto (a quarter of the hosts' memory)."""
    decoder: str = "auto"
    """``pillow`` (reference) or ``simplejpeg`` (JPEG only; other formats go to Pillow)."""
    resize: str = "auto"
    """``pillow`` or ``torchvision`` (uint8, antialiased)."""
    to_rgb: str = "flatten"
    """How pictures become RGB, in training and evaluation. ``flatten``: transparency is laid on white, 16-bit grey is
    scaled. ``convert``: as Pillow and open_clip convert: the alpha channel is dropped, 16-bit values above 255 become
    255 (recipe: portable2)."""
    max_replaced: float = 0.01
    """Share of samples that may be replaced because they cannot be decoded; more stop the run with 65."""
    deadline: float = 600.0
    """Seconds of storage outage that a read rides out before the run ends with 69, to be started again later."""
    timeout: float = 15.0
    """Seconds without a byte after which a request to storage has failed and is sent again."""
    hedge: float = 1.0
    """Seconds without an answer after which, at the earliest, storage is asked a second time; 0: never."""
    client: str = "s3fs"
    """What reads object storage: ``s3fs``, or ``obstore`` where that is installed: less of the processor a byte."""
    cache: str = ""
    """Folder on every node's own disk where chunks are kept that were read (docs/shards.md); ``""``: nowhere."""
    cache_bytes: int = 100_000_000_000
    """Bytes that a node's cache may hold; the oldest chunks give way."""


@dataclass
class Init:
    """Where the first weights come from: a commit of another run, or an export. Nothing named: from the seed."""

    run: str = ""
    """SWEEP/RUN, RUN of the same sweep, or the path of a run directory."""
    stage: str = ""
    """The stage of the commit; empty: any with ``samples``, or the last."""
    samples: int = 0
    """S of the commit; 0: the end of the stage."""
    extend: bool = False
    """False: a branch, the weights alone, from S = 0. True: on from S, with the moments where the stage goes on."""
    export: str = ""
    """Instead of a run: the folder of an export (docs/export.md), of which a branch takes the weights."""
    commit: str = ""
    """Digest of the commit or export, found at submission: what the identity holds of ``init``, with ``extend``."""


@dataclass
class Augment:
    """Drawn per sample by the counter hash: purposes crop 1, flip 2, augment 6 (docs/contracts.md, Randomness)."""

    crop_area: list[float] = field(default_factory=lambda: [0.5, 1.0])
    crop_aspect: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rotate: float = 0.0
    """Largest rotation, degrees; 0: none. Any of rotate, translate, zoom > 0 makes one affine map of the crop."""
    translate: float = 0.0
    """Largest shift, share of the side."""
    zoom: float = 0.0
    """Largest zoom in or out: factor in [1 / (1 + z), 1 + z], log-uniform."""
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    """Colour: factor uniform in [1 - x, 1 + x] each; 0: off."""
    grey: float = 0.0
    """Probability of a grey image."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])


@dataclass
class Stage:
    name: str = "pretrain"
    samples: int = 0
    """Length of this stage; its steps are ceil(samples / batch)."""
    batch: int = 0
    """B, the global batch of contrasted pairs."""
    mask: str = "0.5"
    """Share of patches dropped, a decimal number; kept are floor(P * (1 - mask)) in exact arithmetic."""
    text_mask: str = "0"
    """The same of a caption's positions, padding included; the first, which is pooled, always stays."""
    text_masking: str = "random"
    """Which are dropped. ``random``: any. ``prioritised``: padding before tokens (docs/recipe.md, Masking of text)."""
    base_lr: float = 4e-6
    """Peak learning rate per 256 samples of batch: lr = base_lr * batch / 256."""
    warmup: int = 0
    """Samples of linear warm-up from 0; cosine to 0 follows."""


@dataclass
class Optim:
    """AdamW. A stage begins with fresh moments (docs/recipe.md, Optimiser and schedule)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.2
    decay_logit_scale: bool = False
    """True in recipe: paper. Class token and token embedding are decayed in both; biases, gains, positions never."""
    clip: float = 0.0
    """Largest global gradient norm; 0: no clipping."""


@dataclass
class Compute:
    device: str = "auto"
    """``cpu`` or ``cuda``."""
    precision: str = "auto"
    """``fp32`` or ``bf16``; auto: bf16 where the processor or card is fast at it."""
    attention: str = "auto"
    """``explicit`` (matmul, softmax, matmul) or ``sdpa``; auto: explicit for bf16 on a CPU, else sdpa (measured)."""
    threads: int = 0
    """Threads of a rank's arithmetic; 0: auto. Part of the identity: it moves the last bits."""
    deterministic: str = "auto"
    """``yes`` or ``no``; auto: yes on a CPU."""
    recompute: str = "no"
    """What blocks compute again in the backward pass (activation checkpointing), to the same bits. ``selective``: all
    but matrix products and SDPA, which costs little and saves two fifths of the memory or more. ``block``: everything,
    a forward pass more, much less memory."""
    compile: str = "no"
    """``yes``: the blocks are compiled (torch.compile), minutes at the start of every stage. Moves the last bits."""
    replicate: int = 1
    """Copies of the sharded weights (hybrid sharding): each lies on W / this neighbouring ranks, as those of a node,
    and what crosses copies are the gradients alone. 1: one over all ranks. Moves the last bits."""
    accumulate: int = 1
    """Micro-batches in which a rank goes through its share of a batch: less memory for activations, a forward pass
    more, the same gradient (pairs are still contrasted with the whole batch). Moves the last bits."""


@dataclass
class Checkpoint:
    minutes: float = 0.0
    """Interval between commits, minutes of training; used where ``samples`` is 0. 0: auto, from what saves cost and how
    often the run was cut off (``flip.checkpoint.interval``)."""
    samples: int = 0
    """Interval between commits in samples; 0: by time."""
    keep: int = 2
    """Newest commits kept, beside the last of every stage."""
    background: str = "yes"
    """``yes``: training goes on while a copy of the state in the host's memory is written; at most one save is under
    way. ``no``: it waits, and on a CPU no memory is taken for the copy. On CUDA both take as much of the host: what is
    written is copied there first."""
    url: str = ""
    """Where checkpoints lie instead of the run directory, as ``s3://bucket/prefix`` or another protocol of fsspec:
    below ``<sweep>/<run>-<token>/``. The run directory has their commit.json all the same. ``""``: nowhere else."""


@dataclass
class EvaluationSet:
    """One data set to score on (docs/evaluation.md). Its shards hold a ``cls`` member, for retrieval a ``txt`` one."""

    name: str = ""
    manifest: str = ""
    classes: str = ""
    """Zero-shot: JSON {"names": [...], "templates": ["a picture of {}", ...]}."""
    role: str = "test"
    """``validation``: scored in training and used to choose; ``test``: scored once, at the end."""
    task: str = "zeroshot"
    """``zeroshot``, ``retrieval`` (images and captions, both ways), or ``probe`` (linear, on frozen features)."""
    train: str = ""
    """Probe: the manifest of the images that it is fitted on."""


@dataclass
class Evaluate:
    every: int = 0
    """Samples between evaluations in training (sets of role ``validation``); 0: after each stage and at the end."""
    batch: int = 256
    preprocess: str = "crop_resize"
    """Order of resize and crop of an image's view (bicubic, centred). ``crop_resize``: the central square, whose edges
    may lie between pixels, is resized (recipes: paper, portable). ``resize_crop``: the short side is resized, then the
    square is cropped at whole pixels, as open_clip and torchvision do (recipe: portable2)."""
    sets: list[EvaluationSet] = field(default_factory=list)


@dataclass
class Monitor:
    log_every: int = 10
    """Steps between metric lines."""
    status_seconds: float = 3.0
    hang_minutes: float = 20.0
    """Minutes without a step after which a rank ends itself (71), to be started again; a commit may take six times as
    long. 0: never. More than ``data.deadline``, for which a read may wait."""
    spike: float = 0.0
    """A loss above median + this * sigma of the ``spike_window`` losses before it is told and its samples are written
    down (``anomalies/``); 8 is a good begin. The run goes on. 0: never."""
    spike_window: int = 100
    """Steps; for as many at the begin of a stage or attempt nothing is a spike."""
    profile_steps: int = 0
    """Steps of rank 0 that PyTorch's profiler traces (``traces/``); 0: none."""
    profile_from: int = 0
    """S at which they begin; where an attempt begins later they are not traced."""
    sample_minutes: float = 10.0
    """Minutes between two steps of rank 0 that are profiled for what they wait for other ranks; 0: none is."""


@dataclass
class Resources:
    """What a run occupies. Not part of what matters to science, except the world size for the last bits."""

    nodes: int = 1
    processes: int = 1
    """Ranks per node: one per GPU, or CPU processes. W = nodes * processes."""
    gpus: int = 0
    """GPUs per node, 0: a CPU run."""
    cpus: int = 0
    """CPU cores per process; 0: as the cluster profile says."""
    hours: float = 24.0
    """Wall limit of one attempt."""
    cluster: str = ""
    """Profile of the cluster that this run goes to; empty: the sweep's. ``--cluster`` stands above it."""


@dataclass
class Config:
    schema: int = SCHEMA
    seed: int = 0
    """Seed of everything: order, crops, masks, captions, weights. 0 .. 2^64 - 1."""
    recipe: str = "portable"
    """Name of the file in sweeps/recipes that this configuration began from; a label only, its values are fields."""
    model: Model = field(default_factory=Model)
    init: Init = field(default_factory=Init)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    stages: list[Stage] = field(default_factory=list)
    optim: Optim = field(default_factory=Optim)
    compute: Compute = field(default_factory=Compute)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    monitor: Monitor = field(default_factory=Monitor)
    resources: Resources = field(default_factory=Resources)
