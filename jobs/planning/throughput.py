"""The speed at which a core prepares samples in a stage of a run, and what it was taken from.

It is of a table: that of the measurement which the cluster profile names, or the assumed one
(``jobs.planning.assumptions``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

from flip.config.derived import for_stage
from flip.config.resolve import manifest_record
from flip.config.schema import Config, Data, DataSet, Stage
from flip.data import augment, kernel
from jobs.common.cluster_profile import ClusterProfile
from jobs.planning import kernel_share
from jobs.planning.assumptions import QUALITY_SHARE, RECODED_SHORT, USUAL_SHORT, speed_table
from jobs.planning.core_speeds import Images


def core_samples(config: Config, stage: Stage, profile: ClusterProfile, images: Sequence[Images] = ()) -> float:
    """Samples per second of a core in a stage of a resolved configuration. ``images``: by default those of its data."""
    table = speed_table(profile)
    images = images or images_of(config)
    size = for_stage(config, stage).model.image.size
    mask = float(Fraction(stage.mask))
    total = sum(each.weight for each in images)
    cost = 0.0
    for each in images:
        share = kernel_share_of(config, stage, [each])
        with_kernel = table.microseconds(each, size, mask, True)
        without = table.microseconds(each, size, mask, False)
        cost += each.weight * (share * with_kernel + (1 - share) * without)
    return 1e6 * total / cost


def kernel_share_of(config: Config, stage: Stage, images: Sequence[Images]) -> float:
    """The share of views that the kernel computes, by a sample of the images and the declarations of augmentation."""
    if not uses_kernel(config, stage):
        return 0.0
    files = sum(each.weight * each.kernel for each in images) / sum(each.weight for each in images)
    return files * augment.unchanged_share(for_stage(config, stage).augment)


def images_of(config: Config) -> list[Images]:
    """What is known of the images of each training data set."""
    sets: Iterable[Data | DataSet] = config.data.sets or [config.data]
    return [_images(each.manifest, getattr(each, "weight", 1.0), config.data.exif) for each in sets]


def _images(manifest: str, weight: float, exif: str) -> Images:
    share = kernel_share.known_share(manifest, exif)
    record = manifest_record(manifest) or {}
    recoded = record.get("settings", {}).get("recoded")
    if isinstance(recoded, dict) and isinstance(recoded.get("short"), int):
        return Images(recoded["short"], recoded.get("restart_markers_verified") is True, True, weight, share)
    return Images(USUAL_SHORT, False, False, weight, share)


def recoded(images: Images) -> Images:
    """What `shards recode` would make of images: JPEGs for the kernel. What it has left as it was, it leaves again."""
    share = 1.0
    if images.markers:
        share = images.kernel
    return replace(images, short=min(images.short, RECODED_SHORT), markers=True, kernel=share)


def byte_share(before: Images, after: Images) -> float:
    """Bytes of recoded images as a share of those before."""
    return QUALITY_SHARE * (after.short / before.short) ** 2


def uses_kernel(config: Config, stage: Stage) -> bool:
    """Whether loaders compute visible patches only, if the nodes are like this machine."""
    own = for_stage(config, stage)
    return not kernel.obstacle(own.data, own.augment, own.model.image)


def described(config: Config, stage: Stage, profile: ClusterProfile) -> str:
    """The speed of a core in a stage, what it depends on, and its source, in words."""
    speed = f"{core_samples(config, stage, profile):,.0f} samples/s a core"
    every = images_of(config)
    sides = [f"{each.short} px{'' if each.stated else ' as assumed'}" for each in every]
    share = kernel_share_of(config, stage, every)
    used = "without the visible-patch kernel"
    if share:
        used = "with the visible-patch kernel"
    if 0 < share < 1:
        used += f" for {100 * share:.0f} % of them"
    images = f"images of {' and '.join(dict.fromkeys(sides))}, mask {stage.mask}, {used}: "
    return f"{speed} ({images}{speed_table(profile).origin})"


def origin(profile: ClusterProfile) -> str:
    """Where the speed of a core comes from, in words."""
    return speed_table(profile).origin
