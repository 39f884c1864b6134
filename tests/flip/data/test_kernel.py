"""Tests that batches have the same bits with and without the visible-patch kernel, and when it is used."""

import hashlib
import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import visible_jpeg
from PIL import Image

from flip.config import schema
from flip.data import augment as augmenting
from flip.data import kernel
from flip.data import loader as loader_module
from flip.data.decode_counts import REPLACEMENT
from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest
from tests.flip.data.loading import BATCH, CHUNK, PLAIN, SAMPLES, loader
from tests.synthetic import draw_image, encode, make_dataset, make_tokenizer, smooth

COLOUR = schema.Augment(brightness=0.2, contrast=0.2, saturation=0.2, grey=0.2)
FAST = {"decoder": "simplejpeg", "resize": "torchvision"}
TOWER = schema.ImageTower(size=48, patch=16)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    root = tmp_path_factory.mktemp("jpegs")
    make_tokenizer(root / "tokenizer.json")
    return make_dataset(root / "shards", SAMPLES, 3, size=64, fmt="jpg", chunk=CHUNK)


@pytest.fixture
def accepted(monkeypatch):
    """Results of the kernel: whether it accepted each file."""
    reason = visible_jpeg.unavailable()
    if reason:
        assert os.environ.get("FLIP_REQUIRE_KERNEL") != "1", reason
        pytest.skip(f"no kernel: {reason}")
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    results = []
    decode = visible_jpeg.File.patches

    def patches(*args, **options):
        result = decode(*args, **options)
        results.append(result is not None)
        return result

    monkeypatch.setattr(visible_jpeg.File, "patches", patches)
    assert kernel.difference() == ""
    results.clear()
    return results


def digests(folder, count=6, mask="0.5", **fields):
    """SHA-256 of all arrays of each global batch."""
    world = fields.pop("world", 1)
    hashes = [hashlib.sha256() for _ in range(count)]
    for rank in range(world):
        batches = loader(folder, rank, world, **fields).batches(0, BATCH, mask)
        for hash, batch in zip(hashes, batches, strict=False):
            for array in (batch.patches, batch.keep_indices, batch.tokens, batch.ids):
                hash.update(array.numpy().tobytes())
        batches.close()
    return [hash.hexdigest() for hash in hashes]


@pytest.mark.parametrize("mask", ["0", "0.5", "0.75"])
@pytest.mark.parametrize("augment", [PLAIN, COLOUR], ids=["plain", "colour"])
def test_batches_are_equal_with_and_without_kernel(jpegs, accepted, monkeypatch, augment, mask):
    used = digests(jpegs, mask=mask, augment=augment, **FAST)
    assert accepted == [True] * (6 * BATCH)
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert digests(jpegs, mask=mask, augment=augment, **FAST) == used
    assert len(accepted) == 6 * BATCH


@pytest.mark.parametrize("name", ["__init__", "size", "patches"])
def test_whatever_the_kernel_raises_the_file_is_decoded_as_a_whole(jpegs, accepted, monkeypatch, name):
    used = digests(jpegs, 2, **FAST)

    def fail(*_args, **_options):
        raise KeyError(6)

    monkeypatch.setattr(visible_jpeg.File, name, fail)
    # The comparison of the process has passed before.
    assert digests(jpegs, 2, **FAST) == used


def encode_randomly(random):
    """A JPEG file of random size, content, quality, sampling, restart interval and tables."""
    width, height = random.integers(16, 200, 2).tolist()
    pixels = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    pixels = (pixels + random.normal(0, random.choice([1, 20, 100]), pixels.shape)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    options = {"quality": int(random.integers(5, 99)), "subsampling": int(random.integers(3))}
    if random.random() < 0.1:
        image = image.convert("L")
        del options["subsampling"]
    if random.random() < 0.4:
        options["restart_marker_blocks"] = int(random.integers(1, 9))
    if random.random() < 0.2:
        options["optimize"] = True
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("files, cases", [(60, 600), pytest.param(2000, 20_000, marks=pytest.mark.slow)])
def test_batches_of_random_files_crops_and_masks_are_equal(tmp_path, accepted, monkeypatch, files, cases):
    random = np.random.default_rng(files)
    make_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards", [encode_randomly(random) for _ in range(files)])
    count = -(-cases // (3 * BATCH))

    def batches():
        return [digests(tmp_path / "shards", count, mask, **FAST) for mask in ("0", "0.5", "0.75")]

    used = batches()
    assert sum(accepted) == 3 * count * BATCH >= cases
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert batches() == used and len(accepted) == 3 * count * BATCH
    assert len({digest for each in used for digest in each}) == 3 * count


@pytest.mark.long
def test_batches_of_other_ranks_and_worker_processes_are_equal(jpegs, accepted, monkeypatch):
    used = digests(jpegs, **FAST)
    assert digests(jpegs, world=2, **FAST) == digests(jpegs, world=2, workers=2, **FAST)
    assert digests(jpegs, workers=2, **FAST) == used
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert digests(jpegs, workers=2, **FAST) == used


def test_batches_of_recoded_shards_are_equal_and_decoded_as_verified(mixed, accepted, monkeypatch):
    monkeypatch.setattr(Manifest, "restart_markers_verified", property(lambda manifest: True))
    options = []
    decode = visible_jpeg.File.patches

    def patches(*args, **given):
        options.append(given["verified"])
        return decode(*args, **given)

    monkeypatch.setattr(visible_jpeg.File, "patches", patches)
    used = digests(mixed, max_replaced=1, **FAST)
    assert options and all(options) and any(accepted)
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert digests(mixed, max_replaced=1, **FAST) == used


def counts(folder, count=4, workers=0, **fields):
    """How the images of the first global batches were decoded."""
    source = loader(folder, workers=workers, max_replaced=1, **{**FAST, **fields})
    batches = source.batches(0, BATCH, "0.5")
    for _ in range(count):
        next(batches)
    decoded = source.decoded()
    batches.close()
    assert decoded.images == decoded.vector()[0] == count * BATCH
    assert source.decoded().images == count * BATCH, "after its end"
    return decoded


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_counted_by_reason(mixed, accepted, workers):
    decoded = counts(mixed, workers=workers)
    reasons = {"progressive or otherwise not baseline", "CMYK or of several scans", "PNG", "smaller than 16 pixels"}
    assert decoded.whole.keys() == reasons | {REPLACEMENT}
    assert decoded.by_kernel > 0 and decoded.fallbacks["simplejpeg CMYK"] > 0
    assert f"{decoded.by_kernel} of {4 * BATCH} images (" in decoded.summary()
    assert "progressive or otherwise not baseline" in decoded.summary() and "simplejpeg ValueError" in decoded.summary()
    again = counts(mixed, workers=0)
    assert (again.by_kernel, again.whole) == (decoded.by_kernel, decoded.whole)


def test_images_that_no_kernel_decodes_are_counted_with_the_reason(jpegs, accepted, monkeypatch):
    assert counts(jpegs).by_kernel == 4 * BATCH
    assert counts(jpegs, augment=schema.Augment(zoom=0.1)).whole == {
        "the augmentation (affine) changes the pixels of every view": 4 * BATCH
    }
    monkeypatch.setitem(augmenting.AUGMENTATIONS, "new", Half())
    some = counts(jpegs, augment=schema.Augment(flip=0.5))
    assert 0.3 < some.by_kernel / some.images < 0.7
    assert some.whole.keys() == {"augmentation that changes pixels"}
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert counts(jpegs).whole == {"FLIP_KERNEL=0": 4 * BATCH}
    monkeypatch.delenv(kernel.VARIABLE)
    monkeypatch.setattr(kernel, "visible_jpeg", None)
    (reason,) = counts(jpegs).whole
    assert "not installed" in reason


class Half(augmenting.AugmentationStep):
    """A darker view of some images."""

    purpose = 9
    count = 1
    fields = ("flip",)
    probability = "flip"

    def apply(self, view, augment, draws):
        view.changes.append(lambda pixels: pixels // 2)


def test_log_says_how_images_were_decoded(mixed, accepted, monkeypatch, caplog):
    monkeypatch.setattr(loader_module, "_FIRST_IMAGES", BATCH)
    with caplog.at_level("INFO", "flip.data"):
        decoded = counts(mixed)
    lines = [record.getMessage() for record in caplog.records if "kernel" in record.getMessage()]
    assert lines[0].startswith("visible-patch kernel, first images: ") and f" of {BATCH} images" in lines[0]
    assert lines[1:] == [f"visible-patch kernel: {decoded.summary()}"]


def test_error_of_the_kernel_is_counted(jpegs, accepted, monkeypatch):
    def fail(*_args, **_options):
        raise KeyError(6)

    monkeypatch.setattr(visible_jpeg.File, "patches", fail)
    decoded = counts(jpegs)
    assert decoded.fallbacks == {"kernel KeyError": 4 * BATCH}
    assert decoded.whole == {"the kernel raised an error": 4 * BATCH}


def odd_files():
    """Name -> (file, whether the kernel decodes it)."""
    pixels = Image.fromarray(smooth(70, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {"PNG": (encode(draw_image(1), "png"), False), "JPEG": (encode(draw_image(2), "jpg"), True)}
    forms = {
        "progressive": (pixels, {"progressive": True}, False), "CMYK": (pixels.convert("CMYK"), {}, False),
        "grey": (pixels.convert("L"), {}, True), "4:4:4": (pixels, {"subsampling": 0}, True),
        "restarts": (pixels, {"restart_marker_blocks": 1}, True), "turned": (pixels, {"exif": exif}, True),
        "a line": (pixels.resize((90, 4)), {}, False),
    }  # fmt: skip
    for name, (image, options, is_decoded) in forms.items():
        file = io.BytesIO()
        image.save(file, "JPEG", **options)
        files[name] = (file.getvalue(), is_decoded)
    files["cut"] = (files["JPEG"][0][:-40], False)
    return files


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A data set of files that the kernel decodes, refuses, and that nothing decodes."""
    root = tmp_path_factory.mktemp("mixed")
    make_tokenizer(root / "tokenizer.json")
    folder = root / "shards"
    folder.mkdir()
    files = [content for content, _ in odd_files().values()]
    write_shard(folder, [files[i % len(files)] for i in range(96)])
    return folder


def write_shard(folder, files):
    """Write a shard of JPEG files, and its manifest."""
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, image in enumerate(files):
            for name, content in (("jpg", image), ("txt", b"an image")):
                member = tarfile.TarInfo(f"{i:04d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index([str(folder / "0.tar")], folder, chunk=CHUNK)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_files_that_kernel_refuses_are_decoded_as_before(mixed, accepted, monkeypatch, exif):
    used = digests(mixed, exif=exif, max_replaced=1, **FAST)
    assert sum(accepted) > 0
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert digests(mixed, exif=exif, max_replaced=1, **FAST) == used


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_kernel_decodes_what_it_reproduces(accepted, exif):
    data = schema.Data(decoder="simplejpeg", resize="torchvision", exif=exif)
    writer = kernel.VisiblePatches.of(data, PLAIN, TOWER)
    draws = kernel.augmenting.draw(PLAIN, 1, np.zeros(1, np.int64), np.zeros(1, np.int64))
    out = np.empty((9, 768), np.uint8)
    for name, (content, is_decoded) in odd_files().items():
        is_written = writer.write(memoryview(content), draws, 0, np.arange(9, dtype=np.int16), out)
        assert is_written == (is_decoded and (name, exif) != ("turned", "apply")), name


def test_kernel_is_not_used_where_its_bits_would_differ(accepted, monkeypatch):
    data = schema.Data(decoder="simplejpeg", resize="torchvision")
    assert kernel.obstacle(data, PLAIN, TOWER) == ""
    assert kernel.obstacle(replace(data, decoder="pillow"), PLAIN, TOWER) == "data.decoder is pillow"
    assert kernel.obstacle(replace(data, resize="pillow"), PLAIN, TOWER) == "data.resize is pillow"
    assert "(affine) changes the pixels" in kernel.obstacle(data, schema.Augment(zoom=0.1), TOWER)
    assert "2048 px" in kernel.obstacle(data, PLAIN, schema.ImageTower(size=2048, patch=16))
    assert "patches of 2 px" in kernel.obstacle(data, PLAIN, schema.ImageTower(size=224, patch=2)), "112 in a row"
    assert kernel.obstacle(data, PLAIN, schema.ImageTower(size=1024, patch=16)) == ""
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert kernel.obstacle(data, PLAIN, TOWER) == "FLIP_KERNEL=0"
    monkeypatch.delenv(kernel.VARIABLE)
    with monkeypatch.context() as patched:
        patched.delattr(visible_jpeg, "MAX_ROW")
        assert "too old" in kernel.obstacle(data, PLAIN, TOWER)
    monkeypatch.setattr(kernel, "visible_jpeg", None)
    assert "not installed" in kernel.obstacle(data, PLAIN, TOWER)
    assert kernel.VisiblePatches.of(data, PLAIN, TOWER) is None and kernel.record() == ""


def test_kernel_is_not_used_if_decoder_or_resize_have_other_bits(accepted, monkeypatch):
    monkeypatch.setattr(kernel.decode, "decode", lambda data, decoder: np.zeros((75, 84, 3), np.uint8))
    assert kernel.difference.__wrapped__().startswith("its patches differ from those of simplejpeg ")


def test_use_names_stages_that_differ(accepted):
    config = schema.Config()
    config.data.decoder = "simplejpeg"
    config.data.resize = "torchvision"
    config.stages = [schema.Stage(name="a"), schema.Stage(name="b")]
    assert kernel.use(config) == "yes"
    config.data.decoder = "pillow"
    assert kernel.use(config) == "no, because data.decoder is pillow"
    assert kernel.record().startswith(f"visible-jpeg {visible_jpeg.version()}, sha256 ")
