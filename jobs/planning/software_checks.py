"""Checks of the software of jobs: decoders of images, and what GPUs need besides torch. Nodes are not asked."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from flip.common import gpu_software
from flip.config.derived import dataset_lanes, for_stage
from flip.config.schema import Config
from flip.data import augment, kernel
from flip.runs.checks import DEGRADED, OK, UNKNOWN, Check, Rule
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.paths import install_command
from jobs.planning import kernel_share


def _other_python(profile: ClusterProfile) -> bool:
    """Whether ranks may have another Python than this process, so that only they can look."""
    return bool(profile.container) or profile.python not in ("", sys.executable)


def check_libraries(config: Config, profile: ClusterProfile) -> None:
    """ConfigError if the decoder or the resizer is not installed in this interpreter. Others are not asked."""
    if profile.kind != "local" or profile.python not in ("", sys.executable):
        return
    for key in ("decoder", "resize"):
        library = getattr(config.data, key)
        if library in ("simplejpeg", "torchvision") and find_spec(library) is None:
            remedy = f"Install it ({install_command()}), or set data.{key} to pillow."
            raise ConfigError(f"data.{key}: is not installed", value=library, remedy=remedy)


def check_kernel(config: Config, profile: ClusterProfile) -> Check:
    """Whether loaders compute visible patches alone. Machines of a cluster may differ, which changes no batch."""
    if _other_python(profile):
        return Check(UNKNOWN, "jobs run another Python; the first lines of a rank's log name its decoders")
    use = kernel.use(config)
    if "yes" not in use:
        return Check(OK, use)
    parts = [kernel_share.sample(share.manifest, config.data.exif) for share in dataset_lanes(config.data)]
    seen = sum(parts, kernel_share.KernelSample())
    if not seen.images:
        return Check(OK, use)
    if not seen.taken:
        return Check(OK, f"no, because {seen.summary()}")
    shares = {f"{100 * augment.unchanged_share(for_stage(config, stage).augment):.0f} %" for stage in config.stages}
    if shares != {"100 %"}:
        use += f", for {', '.join(sorted(shares))} of the views by the augmentation"
    return Check(OK, f"{use}; {seen.summary()}")


def check_decoders(profile: ClusterProfile) -> Check:
    """The decoders of this Python."""
    if _other_python(profile):
        remedy = "It needs visible-jpeg (`pip install ./kernel`). The first lines of a rank's log name its decoders."
        return Check(UNKNOWN, "jobs run another Python", remedy)
    if kernel.why_unavailable():
        remedy = "Loaders decode images as a whole, which takes longer (docs/reading.md)."
        return Check(DEGRADED, kernel.decoders(), remedy)
    return Check(OK, kernel.decoders())


def check_gpu_software(profile: ClusterProfile, cuda: bool, compiled: bool) -> list[Check]:
    """Whether torch, driver and compiler serve ranks on GPUs: asked here if they run here, else by each rank.

    ``cuda``: whether ranks use GPUs. ``compiled``: whether they compile blocks.
    """
    if not cuda:
        return []
    asked = f"each rank checks its node before it starts: {', '.join(_requirements(compiled))}"
    if _other_python(profile):
        remedy = "Its Python needs a torch for the nodes' driver."
        return [Check(UNKNOWN, f"jobs run another Python; {asked}", remedy)]
    built = gpu_software.torch_cuda()
    if not built:
        what = "torch of this Python is not a build for CUDA"
        if profile.kind != "local":
            remedy = f"Unless jobs use another Python, install one: {gpu_software.INSTALL_PAGE}."
            return [Check(UNKNOWN, f"{what}; {asked}", remedy)]
        raise ConfigError(what, value=sys.executable, remedy=f"Install one: {gpu_software.INSTALL_PAGE}.")
    if profile.kind != "local":
        needed = f"torch is built for CUDA {built}, so nodes need a driver of {gpu_software.required_driver(built)}"
        return [Check(UNKNOWN, f"{needed}; {asked}", "Ask a node: `nvidia-smi`, `gcc --version`.")]
    what, remedy = gpu_software.node_defect(compiled)
    if what:
        raise ConfigError(what, remedy=remedy)
    return [Check(OK, f"driver for CUDA {gpu_software.driver_cuda() or 'unknown'}, torch for CUDA {built}")]


def _requirements(compiled: bool) -> list[str]:
    if compiled:
        return ["driver", "C compiler", "Python.h"]
    return ["driver"]


OF_PROFILE = (
    Rule(
        "nodes can run torch on their GPUs",
        lambda profile: check_gpu_software(profile, profile.gpus_per_node > 0, compiled=True),
    ),
    Rule("images are decoded by the visible-patch kernel", check_decoders),
)
"""Of ``flip doctor``, for a cluster profile, in addition to ``jobs.slurm.site_checks``."""
