"""The visible-patch kernel: patches of JPEG files, without decoding what the mask hides.

The package ``visible-jpeg`` (kernel/README.md) reproduces the bits of simplejpeg and of torch's antialiased resize, and
refuses files and views that it does not reproduce. These are decoded as a whole. So it is no option: whether a machine
has it changes no batch. ``FLIP_KERNEL=0`` switches it off.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flip.config import schema
from flip.config.derived import for_stage
from flip.data import augment as augmenting
from flip.data import decode

try:
    import visible_jpeg
except ImportError:
    visible_jpeg = None  # type: ignore[assignment]  # mypy has no form for a module that may be missing

VARIABLE = "FLIP_KERNEL"
"""Environment variable; 0: images are decoded as a whole."""

# Of the images and views that ``difference`` compares.
_SIDES = (75, 96)
_SIZE = 48
_PATCH = 16
# Frequent reasons of the kernel, by the words that users know.
_NOT_JPEG = "not a JPEG file"
_SHORT = {
    "not baseline: progressive, arithmetic, lossless or 12 bits": "progressive or otherwise not baseline",
    "a sampling other than 4:4:4, 4:2:2 and 4:2:0": "sampled 4:4:0, 4:1:1 or otherwise",
    "neither grey nor three components of one scan": "CMYK or of several scans",
}
_KERNEL = decode.ThirdPartyDecoder("kernel")

_VISIBLE = np.array([0, 2, 3, 4, 8], np.int16)


class VisiblePatches:
    """Writes the visible patches of training views with the kernel."""

    def __init__(self, data: schema.Data, augment: schema.Augment, image: schema.ImageTower) -> None:
        self._augment = augment
        self._size = image.size
        self._patch = image.patch
        self._ignores_exif = data.exif == "ignore"
        self.refusal = ""
        """Why the last call of ``write`` returned False."""
        self.error = ""
        """The class of error that the kernel raised in that call; empty: none."""

    @classmethod
    def of(cls, data: schema.Data, augment: schema.Augment, image: schema.ImageTower) -> VisiblePatches | None:
        """None if ``why_unused`` names a reason."""
        if why_unused(data, augment, image):
            return None
        return cls(data, augment, image)

    def write(
        self, content: memoryview, draws: augmenting.Draws, row: int, keep: NDArray[np.int16], out: NDArray[np.uint8],
        verified: bool = False,
    ) -> bool:  # fmt: skip
        """Write the patches ``keep`` of the view for row ``row`` of the draws. False: this file or view is not for the
        kernel, and ``out`` is undefined.

        ``verified``: the file is known to be flawless, so that the kernel may skip from one restart marker to another.
        """
        self.error = ""
        try:
            self.refusal = self._write(content, draws, row, keep, out, verified)
        except decode.DecoderError as error:  # a fault of the kernel: the file is decoded as a whole
            self.refusal = "the kernel raised an error"
            self.error = error.kind
        return not self.refusal

    def _write(
        self, content: memoryview, draws: augmenting.Draws, row: int, keep: NDArray[np.int16], out: NDArray[np.uint8],
        verified: bool,
    ) -> str:  # fmt: skip
        """As ``write``; returns why not, empty: written. Raises DecoderError if the kernel raises an error."""
        with _KERNEL:
            file = visible_jpeg.File(content, ignore_exif=self._ignores_exif)
            sides = file.size()
        if sides is None:
            return refusal(content)
        width, height = sides
        view = augmenting.describe(width, height, self._size, self._augment, draws, row)
        if view.affine is not None or view.changes:
            return "augmentation that changes pixels"
        with _KERNEL:
            patches = file.patches(
                view.box, self._size, self._patch, keep, mirrored=view.is_mirrored, verified=verified, out=out
            )
        if patches is None:
            return refusal(content)
        if view.colour is not None:  # pixel by pixel, so that it may follow the cut into patches
            pil_image = Image.fromarray(out.reshape(-1, self._patch, 3))
            out[:] = np.asarray(pil_image.convert("RGB", view.colour)).reshape(out.shape)
        return ""

    def why_refused(self, content: memoryview) -> str:
        """Why the kernel does not take a file, whatever its view; empty: it does. Decodes few of its pixels."""
        try:
            with _KERNEL:
                file = visible_jpeg.File(content, ignore_exif=self._ignores_exif)
                sides = file.size()
                if sides is None:
                    return refusal(content)
                keep = np.zeros(1, np.int16)
                if file.patches((0, 0, *sides), self._size, self._patch, keep) is None:
                    return refusal(content)
        except decode.DecoderError as error:
            return error.kind
        return ""


def refusal(content: memoryview) -> str:
    """Why the kernel has just refused a file, in this thread, in a few words."""
    reason = visible_jpeg.why()
    if reason == _NOT_JPEG:
        return decode.format_name(content)
    return _SHORT.get(reason, reason)


def obstacle(data: schema.Data, augment: schema.Augment, image: schema.ImageTower) -> str:
    """Why the kernel is not used here for a resolved configuration; empty: it is. Imports no torch."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0"
    if data.decoder != "simplejpeg":
        return f"data.decoder is {data.decoder}"
    if data.resize != "torchvision":
        return f"data.resize is {data.resize}"
    if not augmenting.unchanged_share(augment):
        steps = ", ".join(augmenting.changing_steps(augment))
        return f"the augmentation ({steps}) changes the pixels of every view"
    if reason := _why_unusable():
        return reason
    is_too_large = image.size > visible_jpeg.MAX_SIZE or image.patch > visible_jpeg.MAX_PATCH
    if is_too_large or image.size // image.patch > visible_jpeg.MAX_ROW:
        return f"it makes no views of {image.size} px with patches of {image.patch} px"
    return visible_jpeg.unavailable()


def why_unavailable() -> str:
    """Why this Python cannot use the kernel, whatever the configuration; empty: it can. Imports no torch."""
    return _why_unusable() or visible_jpeg.unavailable()


def _why_unusable() -> str:
    if visible_jpeg is None:
        return "the package visible-jpeg is not installed (make install)"
    if not hasattr(visible_jpeg, "MAX_ROW"):  # before 2.0
        return "the package visible-jpeg is too old (make install)"
    return ""


def decoders() -> str:
    """What decodes images in this Python, the fastest first, with versions. Imports no torch."""
    if reason := why_unavailable():
        names = [f"no visible-patch kernel: {reason}"]
    else:
        names = [f"visible-jpeg {visible_jpeg.version()} (the visible-patch kernel)"]
    for package in ("simplejpeg", "pillow"):
        try:
            names.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            names.append(f"no {package}")
    return "; ".join(names)


def why_unused(data: schema.Data, augment: schema.Augment, image: schema.ImageTower) -> str:
    """Why the kernel is not used in this process; empty: it is. Imports torch if it could be used."""
    return obstacle(data, augment, image) or difference()


@cache
def difference() -> str:
    """Why the kernel cannot stand in for the decoder and the resize of this process; empty: its patches are equal.

    Compares a few images, in some 20 ms: another release of simplejpeg, libjpeg-turbo or torch could round otherwise.
    Imports torch.
    """
    versions = f"simplejpeg {metadata.version('simplejpeg')} and torch {metadata.version('torch')}"
    try:
        is_equal = all(_equals_decoder(content) for content in _examples())
    except decode.DecoderError as error:
        return f"a decoder failed on an example: {error.kind}"
    if is_equal:
        return ""
    return f"its patches differ from those of {versions}"


def _equals_decoder(content: bytes) -> bool:
    """Whether two views of a file have the same patches with the kernel and without it."""
    with _KERNEL:
        file = visible_jpeg.File(content)
        width, height = file.size() or (0, 0)
    for mirrored in (False, True):
        box = (2 + mirrored, 5, width - 3, height - 7 * mirrored)
        view = augmenting.View(width, height, _SIZE, box, mirrored)
        with _KERNEL:
            patches = file.patches(box, _SIZE, _PATCH, _VISIBLE, mirrored=mirrored)
        pixels = augmenting.geometry(decode.decode(content, "simplejpeg"), view, "torchvision")
        expected = decode.patches(np.asarray(pixels), _PATCH, _VISIBLE)
        if patches is None or not np.array_equal(patches, expected):
            return False
    return True


def use(config: schema.Config) -> str:
    """Whether a resolved run uses the kernel on this machine: "yes", or "no, because ...". Imports no torch."""
    stages = defaultdict[str, list[str]](list)
    for stage in config.stages:
        own = for_stage(config, stage)
        stages[obstacle(own.data, own.augment, own.model.image)].append(stage.name)
    answers = []
    for reason, names in stages.items():
        answer = f"no, because {reason}" if reason else "yes"
        if len(stages) > 1:
            answer = f"stage {', '.join(names)}: {answer}"
        answers.append(answer)
    return "; ".join(answers)


def use_in_attempt(config: schema.Config) -> str:
    """``use`` as an attempt records it: after a comparison in this process, and with the library. Imports torch."""
    planned = use(config)
    if "yes" not in planned:
        return planned
    if reason := difference():
        return f"no, because {reason}"
    return f"{planned} ({record()})"


def record() -> str:
    """Version and digest of the kernel's library; empty without one."""
    library = visible_jpeg.library_path() if visible_jpeg else None
    if library is None:
        return ""
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    return f"visible-jpeg {visible_jpeg.version()}, sha256 {digest}"


def _examples() -> Iterator[bytes]:
    """JPEG files of each sampling that the kernel decodes, smooth and not."""
    import simplejpeg

    for sampling, side, quality in product(("444", "422", "420", "Gray"), _SIDES, (60, 95)):
        random = np.random.default_rng(side).integers(0, 256, (side, side + 9, 3), np.uint8)
        random[side // 2 :] = np.linspace(0, 255, side + 9, dtype=np.uint8)[:, None]
        yield simplejpeg.encode_jpeg(random, quality, "RGB", sampling)
