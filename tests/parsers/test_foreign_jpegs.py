"""Tests that every command ends on JPEG files of many encoders, damaged ones too, and names each file that it skips.

``jpegs/corpus.tar.xz`` holds small files of the encoders of ``ENCODERS``; ``jpegs/corpus.json`` has the command that
wrote each. ``jpegs/variants.py`` makes 16 files of each: with other headers, with damage, and as it is.
"""

import contextlib
import csv
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import visible_jpeg

from flip.config import schema
from flip.data import augment, decode, kernel
from flip.data.decode import DecodeError
from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest
from tests.flip.data.loading import BATCH, PLAIN, loader
from tests.flip.data.manifest.test_manifest import write_tar
from tests.harness.training_run import TrainingRun, configuration
from tests.parsers.jpegs import variants
from tests.synthetic import make_tokenizer
from tests.tools.commands.test_shards_cli import call
from tools.shards_commands import inspect_samples
from tools.shards_commands.recode_image import markers_are_safe

pytestmark = [pytest.mark.usefixtures("unsynced"), pytest.mark.long]
ENCODERS = {
    "Chromium's canvas", "FFmpeg", "Go image/jpeg", "GraphicsMagick", "Guetzli", "Java ImageIO", "OpenCV", "PHP gd",
    "Pillow", "Qt", "Skia", "imagecodecs", "jpeg-js", "jpeglib (IJG 6b, 7, 8d, 9e)", "libjpeg-turbo cjpeg",
    "libjpeg-turbo jpegtran", "libvips", "mozjpeg", "netpbm", "sharp", "simplejpeg",
}  # fmt: skip
FAST = {"decoder": "simplejpeg", "resize": "torchvision"}
SHARDS = 4
CHUNK = 16
"""Samples of a chunk, of which no block is damaged as a whole. It divides the number of files."""
TOWER = schema.ImageTower(size=48, patch=16)
KEEPS = (np.arange(9, dtype=np.int16), np.array([2, 4, 6], np.int16))


@pytest.fixture(scope="module")
def files():
    return variants.every()


@pytest.fixture(scope="module")
def reasons(files):
    """Name -> why training cannot read the file; empty if it can."""
    return {name: reason_of(data) for name, data in files.items()}


@pytest.fixture(scope="module")
def shards(files, tmp_path_factory):
    """A manifest of all files; sample ids count them in their order."""
    root = tmp_path_factory.mktemp("jpegs")
    make_tokenizer(root / "tokenizer.json")
    folder = root / "shards"
    folder.mkdir()
    rows = list(files.items())
    size = -(-len(rows) // SHARDS)
    for shard in range(SHARDS):
        members = []
        for name, data in rows[shard * size : (shard + 1) * size]:
            members += [(f"{name}.jpg", data), (f"{name}.txt", b"an image")]
        write_tar(folder / f"{shard}.tar", members)
    index([str(folder / f"{shard}.tar") for shard in range(SHARDS)], folder, chunk=CHUNK)
    return folder


@pytest.fixture
def with_kernel(monkeypatch):
    if reason := visible_jpeg.unavailable():
        assert os.environ.get("FLIP_REQUIRE_KERNEL") != "1", reason
        pytest.skip(f"no kernel: {reason}")
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    assert kernel.difference() == ""


def reason_of(data):
    try:
        decode.decode(data, "simplejpeg")
    except DecodeError as error:
        return str(error)
    return ""


def ids_of(reasons):
    """The ids of the samples that training cannot read."""
    return {id for id, reason in enumerate(reasons.values()) if reason}


def test_the_list_names_an_encoder_and_a_command_for_each_file(files):
    rows = variants.listed()
    assert [row["file"] for row in rows] == list(variants.corpus())
    assert {row["encoder"] for row in rows} == ENCODERS and all(row["command"] for row in rows)
    assert len(files) == len(rows) * len(variants.CHANGES) >= 3000 and len(files) % CHUNK == 0
    assert len(set(files.values())) > 0.9 * len(files), "some changes concern only a part of the files"


def test_both_decoders_refuse_the_same_files(files, reasons):
    for name, data in files.items():
        reason = ""
        try:
            decode.decode(data, "pillow")
        except DecodeError as error:
            reason = str(error)
        assert reason == reasons[name], name
    assert 300 < len(ids_of(reasons)) < 1000


def test_check_of_jpegs_gives_the_decoder_enough_memory(files, monkeypatch):
    """Of lossless JPEG libjpeg-turbo writes the full size, also where simplejpeg allocates a scaled image."""
    decode_jpeg = simplejpeg.decode_jpeg
    overrun = []

    def guarded(data, *arguments, buffer=None, **options):
        room = np.full(1 << 20, 0xA5, np.uint8)
        image = decode_jpeg(data, *arguments, buffer=room, **options)
        given = image.size if buffer is None else buffer.size
        if (room[given:] != 0xA5).any():
            overrun.append(image.shape)
        return image

    monkeypatch.setattr(simplejpeg, "decode_jpeg", guarded)
    read = 0
    for data in files.values():
        with contextlib.suppress(DecodeError):
            read += decode.jpeg_is_readable(data)
    assert read > 1500 and not overrun


def expected_patches(data, draws, exif, keep):
    """What training reads without the kernel; None if it cannot read the file."""
    try:
        pixels = decode.decode(data, "simplejpeg", exif=exif)
    except DecodeError:
        return None
    view = augment.view(pixels, TOWER.size, PLAIN, draws, 0, "torchvision")
    return decode.patches(np.asarray(view), TOWER.patch, keep)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_kernel_takes_no_other_decision_and_gives_no_other_pixel(files, with_kernel, monkeypatch, exif):
    """Also where it skips between restart markers, which it may in each file that recode counts as safe."""
    monkeypatch.setattr(kernel, "_KERNEL", contextlib.nullcontext())  # an error of the kernel fails the test
    writer = kernel.VisiblePatches.of(schema.Data(**FAST, exif=exif), PLAIN, TOWER)
    taken = {False: 0, True: 0}
    for id, (name, data) in enumerate(files.items()):
        draws = augment.draw(PLAIN, 1, np.zeros(1, np.int64), np.array([id], np.int64))
        for keep in KEEPS:
            expected = expected_patches(data, draws, exif, keep)
            for verified in {False, markers_are_safe(data)}:
                out = np.empty((len(keep), 768), np.uint8)
                if not writer.write(memoryview(data), draws, 0, keep, out, verified):
                    continue
                taken[verified] += 1
                assert expected is not None, f"{name}: read by the kernel only, verified {verified}"
                assert np.array_equal(out, expected), f"{name}: other pixels, verified {verified}"
    assert min(taken.values()) > 1000


def batches_of(folder, mask):
    """(ids, replaced samples, visible patches) of batches in which each sample of a data set comes at least once."""
    count = 2 * Manifest.load(folder).samples // BATCH
    tokenizer = str(folder.parent / "tokenizer.json")
    batches = loader(folder, max_replaced=1, chunk=CHUNK, tokenizer=tokenizer, **FAST).batches(0, BATCH, mask)
    read = []
    for _, batch in zip(range(count), batches, strict=False):
        read.append((batch.ids.numpy().tolist(), batch.replaced, batch.patches.numpy().copy()))
    batches.close()
    return read


def assert_equal(batches, others):
    for (ids, replaced, patches), (other_ids, other_replaced, other_patches) in zip(batches, others, strict=True):
        assert (ids, replaced) == (other_ids, other_replaced)
        assert np.array_equal(patches, other_patches)


@pytest.mark.parametrize("mask", ["0", "0.75"])
def test_batches_are_equal_with_and_without_kernel_and_each_replaced_file_is_logged(
    shards, reasons, with_kernel, monkeypatch, caplog, mask
):
    with caplog.at_level(logging.WARNING, "flip.data"):
        used = batches_of(shards, mask)
    lines = {record.getMessage() for record in caplog.records if " replaced: " in record.getMessage()}
    manifest = Manifest.load(shards)
    for id, reason in enumerate(reasons.values()):
        shard, ordinal = manifest.locate(id)
        if reason:
            assert f"{shard}, sample {ordinal} replaced: {reason}" in lines
    assert len(lines) == len(ids_of(reasons))
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert_equal(batches_of(shards, mask), used)


def test_verify_ends_and_names_each_file_that_training_cannot_read(shards, reasons, tmp_path, capsys):
    arguments = ["verify", shards, "--workers", 1, "--examples", 10_000, "--json"]
    code, report = call(capsys, *arguments)
    named = {row["id"]: row["reason"] for row in report["examples"]}
    assert code == 65 and named == {id: reason for id, reason in enumerate(reasons.values()) if reason}
    assert call(capsys, *arguments, "--out", tmp_path / "good")[0] == 0
    assert Manifest.load(tmp_path / "good").exceptions.keys() == ids_of(reasons)


def test_make_ends_and_names_each_file_that_it_leaves_out(files, reasons, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for name, data in files.items():
        (source / f"{name}.jpg").write_bytes(data)
    with open(source / "t.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "caption"])
        rows.writerows([f"{name}.jpg", "an image"] for name in files)
    code, report = call(capsys, "make", source / "t.csv", "--out", tmp_path / "out", "--json")
    assert code == 0, report
    refused = {row["row"]: row["reason"] for row in report["refused_rows"]}
    numbers = {f"{source / 't.csv'}, row {id + 1}": reason for id, reason in enumerate(reasons.values()) if reason}
    assert code == 0 and refused == numbers and report["refused"] == len(numbers)
    assert report["samples"] == len(files) - len(numbers)


def test_inspect_ends_for_each_file_and_says_why_training_cannot_read_it(shards, reasons, capsys):
    manifest = Manifest.load(shards)
    for id, (name, reason) in enumerate(reasons.items()):
        sample = inspect_samples.sample(manifest, id)
        assert (sample.key, sample.damage) == (name, None)
        assert (sample.picture or {}).get("undecodable", "") == reason, name
    for id in sorted(ids_of(reasons))[:3]:
        code, text = call(capsys, "inspect", shards, "--id", id)
        assert code in (0, 65) and list(reasons.values())[id] in text


def test_recode_ends_names_damaged_files_and_keeps_the_markers_of_others(
    shards, reasons, with_kernel, monkeypatch, tmp_path, capsys
):
    code, report = call(capsys, "recode", shards, "--short", 48, "--workers", 1, "--out", tmp_path / "all", "--json")
    assert code == 0 and report["images_damaged"] == len(ids_of(reasons))
    assert {row["id"]: row["reason"] for row in report["damaged_images"]} == {
        id: reason for id, reason in enumerate(reasons.values()) if reason
    }
    assert not Manifest.load(tmp_path / "all").restart_markers_verified, "some damaged files have markers"

    assert call(capsys, "verify", shards, "--workers", 1, "--out", tmp_path / "good")[0] == 0
    out = tmp_path / "less"
    code, report = call(capsys, "recode", tmp_path / "good", "--short", 48, "--workers", 1, "--out", out, "--json")
    assert code == 0 and "images_damaged" not in report and report["restart_markers_verified"]
    make_tokenizer(tmp_path / "tokenizer.json")
    used = batches_of(out, "0.75")
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert_equal(batches_of(out, "0.75"), used)


def test_training_ends_and_its_log_names_each_file_that_it_replaced(shards, reasons, tmp_path):
    steps = 2 * len(reasons) // 16  # in which each sample comes at least once
    config = configuration(shards.parent, 1, samples=(steps, 1), decoder="simplejpeg")
    config.data.manifest = str(shards)
    config.data.chunk = CHUNK
    config.data.max_replaced = 1.0
    config.evaluate.sets = {}
    run = TrainingRun(tmp_path, "jpegs", config, pause=0)
    run.submit()
    run.wait_over()
    assert run.state().state == "complete", run.story()
    log = "".join(path.read_text() for path in sorted(Path(run.run.logs).glob("1/*")))
    manifest = Manifest.load(shards)
    for id, reason in enumerate(reasons.values()):
        shard, ordinal = manifest.locate(id)
        assert not reason or f"{shard}, sample {ordinal} replaced: {reason}" in log
