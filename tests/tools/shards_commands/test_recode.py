"""Tests of shards recode: what stays and what changes, the check of images, interruption, and what it refuses."""

import contextlib
import fcntl
import io
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import ExifTags, Image

from flip.data import decode
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest
from tests.flip.data.loading import BATCH, CHUNK, loader
from tests.flip.data.manifest.test_manifest import write_tar
from tests.harness.common import ROOT
from tests.parsers.jpegs import variants
from tests.synthetic import make_dataset, make_tokenizer, odd_images, oriented, smooth
from tests.tools.commands.test_shards_cli import call, rot
from tools.shards_commands import recode_image
from tools.shards_commands.recode_image import Recoding, Unsuitable

SHORT = 48
WANTED = Recoding(SHORT, 85, markers=True)


def jpeg(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def write_set(folder, images, chunk=2, shards=2):
    """Write samples with these images (bytes) and a caption and a json member each; returns the manifest's folder."""
    folder.mkdir()
    paths = [folder / f"{shard}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        members = []
        for i in range(len(images) * shard // shards, len(images) * (shard + 1) // shards):
            facts = json.dumps({"licence": "CC0", "number": i}).encode()
            members += [(f"k{i}.jpg", images[i]), (f"k{i}.txt", f"text {i}".encode()), (f"k{i}.json", facts)]
        write_tar(path, members)
    index([str(path) for path in paths], folder / "m", chunk)
    return folder / "m"


def samples(folder):
    manifest = Manifest.load(folder)
    return [sample for j in range(manifest.chunks) for sample in ChunkReader().read_chunk(manifest, j)]


@pytest.fixture
def source(tmp_path):
    return write_set(tmp_path / "source", [jpeg(smooth(96, 110 + i, seed=i)) for i in range(10)])


def test_recode_keeps_samples_and_writes_smaller_images(source, tmp_path, capsys):
    old = Manifest.load(source)
    code, report = call(capsys, "recode", source, "--short", SHORT, "--out", tmp_path / "out", "--json")
    new = Manifest.load(tmp_path / "out")
    assert code == 0 and report["images_recoded"] == 10 and report["images_kept"] == 0
    assert (new.samples, new.chunk, new.shards[:, 0].tolist()) == (old.samples, old.chunk, old.shards[:, 0].tolist())
    assert new.digest == report["digest"] != old.digest and new.mean_bytes < old.mean_bytes
    assert new.restart_markers_verified and not old.restart_markers_verified
    assert new.settings["recoded"]["source"] == old.digest and new.settings["recoded"]["quality"] == 85
    for before, after in zip(samples(source), samples(tmp_path / "out"), strict=True):
        assert list(before) == list(after) and all(before[name] == after[name] for name in ("txt", "json"))
        assert min(decode.decode(after["jpg"]).shape[:2]) == SHORT and len(after["jpg"]) < len(before["jpg"])
        with Image.open(io.BytesIO(after["jpg"])) as image:
            assert image.layer[0][1:3] == (2, 2) and image.layer[1][1:3] == (1, 1)
    assert report["views_compared"] == 10 and 30 < report["psnr_median_db"] < 60
    assert report["source"]["L"] == call(capsys, "info", source, "--json")[1]["shuffling_on_one_node_like_this"]["L"]
    assert not (tmp_path / "out.part").exists()
    assert call(capsys, "verify", tmp_path / "out", "--workers", 1)[0] == 0


@pytest.mark.long
def test_batches_of_recoded_shards_have_equal_ids_masks_and_captions(tmp_path, capsys):
    make_tokenizer(tmp_path / "tokenizer.json")
    source = make_dataset(tmp_path / "shards", 120, 5, size=64, fmt="jpg", chunk=CHUNK)
    (tmp_path / "few").mkdir()
    assert call(capsys, "exclude", source, "--ids", "3,50-51", "--out", tmp_path / "few" / "m")[0] == 0
    out = tmp_path / "out"
    assert call(capsys, "recode", tmp_path / "few" / "m", "--short", 32, "--out", out)[0] == 0
    batches = []
    for folder in (tmp_path / "few" / "m", out):
        with contextlib.closing(loader(source, folder=folder)) as loading:
            stream = loading.batches(0, BATCH, "0.5")
            batches.append([next(stream) for _ in range(4)])
    assert Manifest.load(out).exceptions == Manifest.load(tmp_path / "few" / "m").exceptions
    for before, after in zip(*batches, strict=True):
        for name in ("ids", "keep_indices", "tokens", "position_ids"):
            assert np.array_equal(getattr(before, name), getattr(after, name)), name
        difference = before.patches.numpy().astype(int) - after.patches.numpy()
        assert 0 < np.abs(difference).mean() < 12  # the same crops of the same images


def test_images_that_jpeg_cannot_hold_stay(tmp_path, capsys):
    images = odd_images()
    source = write_set(tmp_path / "source", list(images.values()))
    code, report = call(capsys, "recode", source, "--short", SHORT, "--out", tmp_path / "out", "--json")
    kept = report["kept_by_reason"]
    assert code == 0 and kept["transparent"] == 3 and kept["more than N bits per colour"] == 2, kept
    for name, before, after in zip(images, samples(source), samples(tmp_path / "out"), strict=True):
        stays = before["jpg"] == after["jpg"]
        assert stays or name not in ("RGBA", "LA", "clear palette", "16 bit", "16 bit, dark"), name
        old, new = (decode.decode(sample["jpg"]) for sample in (before, after))
        scaled = np.asarray(Image.fromarray(old).resize(new.shape[1::-1], Image.Resampling.BICUBIC), dtype=int)
        assert np.abs(scaled - new).mean() < 12, name


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_orientation_and_credits_stay(orientation):
    upright = smooth(90, 120)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Copyright] = "Someone"
    exif[ExifTags.Base.Make] = "A camera"
    stored = decode.decode(oriented(upright, orientation), exif="ignore")
    recoded = recode_image.recode_image(jpeg(stored, exif=exif), WANTED)
    turned = decode.decode(recoded, "simplejpeg", exif="apply")
    small = np.asarray(Image.fromarray(upright).resize((64, SHORT), Image.Resampling.BICUBIC), dtype=int)
    assert turned.shape == (SHORT, 64, 3) and np.abs(turned - small).mean() < 6
    with Image.open(io.BytesIO(recoded)) as image:
        assert image.getexif()[ExifTags.Base.Copyright] == "Someone" and ExifTags.Base.Make not in image.getexif()


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("size", [(48, 48), (49, 71), (16, 8)])
def test_restart_marker_follows_every_unit(grey, size):
    pixels = smooth(*size, channels=3)
    if grey:
        pixels = np.ascontiguousarray(pixels[..., 0])
    recoded = recode_image.recode_image(jpeg(pixels), Recoding(96, 90, markers=True))
    side = 8 if grey else 16
    units = -(-size[0] // side) * -(-size[1] // side)
    assert recode_image._has_marker_per_unit(recoded, units)
    assert not recode_image._has_marker_per_unit(recoded, units + 1)
    for marker in (0xD0, 0xD1)[: units - 1]:
        assert not recode_image._has_marker_per_unit(recoded.replace(bytes([0xFF, marker]), b"\xff\xd7"), units)
    assert not recode_image._has_marker_per_unit(jpeg(pixels), units)


def test_all_images_have_the_usual_huffman_tables():
    """The kernel builds tables once for images that share them."""
    recoded = [recode_image.recode_image(jpeg(smooth(96, side, channels=3)), WANTED) for side in (64, 96)]
    tables = [huffman_tables(image) for image in recoded]
    assert tables[0] == tables[1] == huffman_tables(jpeg(smooth(96, 96, channels=3)))
    assert tables[0] != huffman_tables(jpeg(smooth(96, 96, channels=3), optimize=True))


def huffman_tables(data):
    """The segments DHT of a JPEG."""
    starts = [match.start() for match in re.finditer(b"\xff\xc4", data)]
    return [data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")] for at in starts]


def test_image_that_does_not_pass_the_check_stays(monkeypatch):
    monkeypatch.setattr(recode_image, "_has_marker_per_unit", lambda data, units: False)
    with pytest.raises(Unsuitable, match="check"):
        recode_image.recode_image(jpeg(smooth(96, 96)), WANTED)


def test_image_that_would_grow_stays():
    small = recode_image.recode_image(jpeg(smooth(96, 96)), Recoding(SHORT, 30, markers=False))
    with pytest.raises(Unsuitable, match="more bytes"):
        recode_image.recode_image(small, Recoding(SHORT, 95, markers=True))


def hostile():
    """Name -> bytes of an image that training refuses."""
    marked = jpeg(smooth(96, 96), restart_marker_blocks=1)
    huge = bytearray(jpeg(smooth(96, 96)))
    at = huge.index(b"\xff\xc0")
    huge[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return {"cut off": marked[: len(marked) // 2], "huge": bytes(huge), "empty": b"", "text": b"<html>"}


def test_images_that_cannot_be_read_stay_and_markers_are_not_trusted(tmp_path, capsys):
    bad = hostile()
    images = [*bad.values(), *(jpeg(smooth(96, 96, seed=i)) for i in range(4))]
    source = write_set(tmp_path / "source", images)
    code, report = call(capsys, "recode", source, "--short", SHORT, "--out", tmp_path / "out", "--json")
    assert code == 0 and report["images_recoded"] == 4 and sum(report["kept_by_reason"].values()) == 4
    assert [sample["jpg"] for sample in samples(tmp_path / "out")[:4]] == list(bad.values())
    assert not Manifest.load(tmp_path / "out").restart_markers_verified
    assert any("damaged JPEGs have restart markers" in line for line in report["advice"])
    assert recode_image.markers_are_safe(bad["text"]) and not recode_image.markers_are_safe(bad["cut off"])

    assert call(capsys, "verify", source, "--workers", 1, "--out", tmp_path / "good")[0] == 0
    code, report = call(capsys, "recode", tmp_path / "good", "--short", SHORT, "--out", tmp_path / "out2", "--json")
    new = Manifest.load(tmp_path / "out2")
    assert code == 0 and new.restart_markers_verified and sorted(new.exceptions) == [0, 1, 2, 3]
    assert report["kept_by_reason"] == {"excluded by the manifest": 4}
    assert [sample["jpg"] for sample in samples(tmp_path / "out2")[:4]] == list(bad.values())


RARE = ("-sample 3x1 -restart 1B", "-sample 2x4 -restart 1B", "-sample 1x4 -restart 1B", "'CMYK'), quality=80, restart")
"""Commands of files that are intact, have restart markers, and that simplejpeg does not read."""


def test_intact_files_of_rare_forms_stay_and_cost_the_set_nothing(tmp_path, capsys):
    """They were counted as damaged, and no reader could skip in the others any more."""
    rare = [variants.written_by(words) for words in RARE]
    source = write_set(tmp_path / "source", [*rare, *(jpeg(smooth(400, 400, seed=i)) for i in range(4))])
    wanted = ("--short", 96, "--quality", 100)
    code, report = call(capsys, "recode", source, *wanted, "--out", tmp_path / "out", "--json")
    assert code == 0 and report["kept_by_reason"] == {"would take more bytes": 4} and report["images_recoded"] == 4
    assert [sample["jpg"] for sample in samples(tmp_path / "out")[:4]] == rare
    assert Manifest.load(tmp_path / "out").restart_markers_verified and "images_damaged" not in report
    assert not any("damaged" in line for line in report["advice"])
    assert all(map(recode_image.markers_are_safe, rare))


def test_file_that_is_read_with_a_warning_is_recoded_whatever_its_bytes(tmp_path, capsys):
    """``verify`` accepts it, so that no advice could help."""
    marked = recode_image.recode_image(jpeg(smooth(96, 96)), Recoding(96, 60, markers=True))
    at = len(marked) // 2
    warned = next(
        changed
        for changed in (marked[: at + i] + b"\xff\xd3" + marked[at + i + 2 :] for i in range(200))
        if is_read_with_warning(changed)
    )
    source = write_set(tmp_path / "source", [warned, *(jpeg(smooth(400, 400, seed=i)) for i in range(3))])
    assert call(capsys, "verify", source, "--workers", 1)[0] == 0
    code, report = call(capsys, "recode", source, "--short", 96, "--quality", 100, "--out", tmp_path / "out", "--json")
    assert code == 0 and report["images_recoded"] == 4 and report["restart_markers_verified"]
    written = samples(tmp_path / "out")[0]["jpg"]
    assert len(written) > recode_image.GROWTH * len(warned) and recode_image.markers_are_safe(written)


def is_read_with_warning(data):
    """Whether Pillow reads a file of which simplejpeg reports damage."""
    try:
        decode.decode(data)
    except decode.DecodeError:
        return False
    return not recode_image.markers_are_safe(data)


def test_report_names_damaged_images_and_the_command_that_excludes_them(tmp_path, capsys):
    bad = hostile()
    source = write_set(tmp_path / "source", [*bad.values(), *(jpeg(smooth(96, 96, seed=i)) for i in range(4))])
    code, report = call(capsys, "recode", source, "--short", SHORT, "--out", tmp_path / "out", "--json")
    assert code == 0 and report["images_damaged"] == 4
    assert [(row["id"], row["ordinal"]) for row in report["damaged_images"]] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert all(row["reason"] for row in report["damaged_images"])
    advice = next(line for line in report["advice"] if "restart markers" in line)
    words = shlex.split(advice.split("first: ")[1])
    arguments = [word.replace("NEW_FOLDER", str(tmp_path / "less")) for word in words[words.index("shards") + 1 :]]
    assert call(capsys, *arguments)[0] == 0
    code, report = call(capsys, "recode", tmp_path / "less", "--out", tmp_path / "out2", "--json")
    assert code == 0 and report["restart_markers_verified"]


def test_damaged_chunk_stops_unless_all_of_it_is_excluded(source, tmp_path, capsys):
    rot(Manifest.load(source), 2)
    code, text = call(capsys, "recode", source, "--short", SHORT, "--out", tmp_path / "out")
    assert code == 65 and "chunk 2 (samples 4 to 5) is damaged" in text and "shards exclude" in text
    assert call(capsys, "verify", source, "--workers", 1, "--out", tmp_path / "good")[0] == 0
    out = tmp_path / "out2"
    code, report = call(capsys, "recode", tmp_path / "good", "--short", SHORT, "--out", out, "--json")
    assert code == 0 and report["samples"] == 10 and report["exceptions"] == 2 and report["images_recoded"] == 8
    after = samples(out)
    assert [len(sample) for sample in after] == [3, 3, 3, 3, 1, 1, 3, 3, 3, 3] and after[6]["txt"] == b"text 6"


def test_filtered_manifest_gives_shards_without_dropped_samples(source, tmp_path, capsys):
    shards = [str(path) for path in source.parent.glob("*.tar")]
    (tmp_path / "uids").mkdir()
    filtered = tmp_path / "filtered"
    assert call(capsys, "index", *shards, "--caption-length", "6:6", "--chunk", 2, "--out", filtered)[0] == 0
    pixels = smooth(96, 96)
    members = []
    for i in (8, 100, 9):
        members += [(f"x{i}.jpg", jpeg(pixels)), (f"x{i}.txt", b"text %d" % i)]
    write_tar(source.parent / "2.tar", members)
    filtered = tmp_path / "filtered2"
    shards.append(str(source.parent / "2.tar"))
    assert call(capsys, "index", *shards, "--caption-length", "6:6", "--chunk", 2, "--out", filtered)[0] == 0
    code, report = call(capsys, "recode", filtered, "--short", SHORT, "--out", tmp_path / "out", "--json")
    old, new = Manifest.load(filtered), Manifest.load(tmp_path / "out")
    assert code == 0 and old.sample_filter and not new.sample_filter and report["samples"] == old.samples == 12
    assert [sample["txt"] for sample in samples(filtered)] == [sample["txt"] for sample in samples(tmp_path / "out")]
    assert "filters" not in new.settings and new.settings["recoded"]["filters"] == old.settings["filters"]


def test_further_shards_end_the_promise_about_markers(source, tmp_path, capsys):
    assert call(capsys, "recode", source, "--short", SHORT, "--out", tmp_path / "out")[0] == 0
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "3.tar", [("a.jpg", hostile()["cut off"]), ("a.txt", b"text")])
    command = ["index", tmp_path / "more" / "3.tar", "--add", tmp_path / "out", "--out", tmp_path / "both"]
    assert call(capsys, *command)[0] == 0
    assert not Manifest.load(tmp_path / "both").restart_markers_verified
    assert call(capsys, "exclude", tmp_path / "out", "--ids", "3", "--out", tmp_path / "less")[0] == 0
    assert Manifest.load(tmp_path / "less").restart_markers_verified


def test_recode_refuses_folders_and_options(source, tmp_path, capsys):
    recode = ["recode", source, "--short", SHORT, "--out"]
    (tmp_path / "link").symlink_to(source.parent)
    for out in (source, source.parent, tmp_path / "link"):
        code, text = call(capsys, *recode, out)
        assert code == 78 and "the source is in this folder" in text
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("text")
    code, text = call(capsys, *recode, tmp_path / "full")
    assert code == 78 and "not empty" in text and [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    for option in (["--short", 8], ["--quality", 0], ["--quality", 101], ["--workers", -1], ["--batch", 0]):
        code, text = call(capsys, *recode, tmp_path / "out", *option)
        assert code == 78 and option[0] in text and not (tmp_path / "out").exists()


def test_two_commands_do_not_write_one_folder(source, tmp_path, capsys):
    (tmp_path / "out.part").mkdir()
    with open(tmp_path / "out.part" / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, text = call(capsys, "recode", source, "--short", SHORT, "--out", tmp_path / "out")
        assert code == 78 and "another command writes here" in text
    assert call(capsys, "recode", source, "--short", SHORT, "--out", tmp_path / "out")[0] == 0


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.long
def test_killed_command_continues_with_equal_bytes(tmp_path, capsys):
    images = [jpeg(smooth(500, 500, seed=i)) for i in range(3)] * 20
    source = write_set(tmp_path / "source", images, chunk=4, shards=6)
    out = tmp_path / "out"
    command = ["recode", source, "--short", 384, "--out", out]
    child = subprocess.Popen([sys.executable, ROOT / "jobs", "shards", *map(str, command), "--workers", "1"])
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.part" / "0.json").exists():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    first = (out / "00000.tar").stat()
    assert not (out / "manifest.json").exists()
    (out / f"00005.tar.tmp.{'0' * 16}").write_bytes(b"of a killed process")
    code, text = call(capsys, *command, "--quality", 50)
    assert code == 78 and "a command with other options was interrupted" in text and '"quality": 85' in text
    assert call(capsys, *command)[0] == 0
    assert os.path.samestat(first, (out / "00000.tar").stat()) and len(list(out.glob("*.tar*"))) == 6
    assert call(capsys, *command[:-1], tmp_path / "at once")[0] == 0
    assert contents(out) == contents(tmp_path / "at once")
    assert call(capsys, *command)[0] == 78


def test_shard_that_was_changed_is_written_again(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(capsys, "recode", source, "--short", SHORT, "--out", tmp_path / "at once")[0] == 0
    expected = contents(tmp_path / "at once")
    rot(Manifest.load(source), 4)
    assert call(capsys, "recode", source, "--short", SHORT, "--out", out)[0] == 65
    assert contents(out) == {"00000.tar": expected["00000.tar"]}
    (out / "00000.tar").write_bytes(b"text")
    key, start, *_ = Manifest.load(source).chunk_reads(4)[0]
    assert call(capsys, "exclude", source, "--ids", "8-9", "--out", tmp_path / "less")[0] == 0
    code, text = call(capsys, "recode", tmp_path / "less", "--short", SHORT, "--out", out)
    assert code == 78 and "with other options" in text  # its digest is another one
    with open(key, "r+b") as file:
        file.seek(start)
        file.write(b"k8.")
    assert call(capsys, "recode", source, "--short", SHORT, "--out", out)[0] == 0
    assert contents(out) == expected


@pytest.mark.long
def test_file_that_cannot_be_written_ends_with_69_and_the_command_continues(source, tmp_path, capsys):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a full disk: writes fail from there on

    command = ["recode", str(source), "--short", "96", "--out", str(tmp_path / "out"), "--workers", "1"]
    failed = subprocess.run(
        [sys.executable, ROOT / "jobs", "shards", *command], preexec_fn=limit, capture_output=True, text=True
    )
    assert failed.returncode == 69 and "cannot be written" in failed.stderr and "Traceback" not in failed.stderr
    assert "give the same command again" in failed.stderr and not list((tmp_path / "out").iterdir())
    assert call(capsys, *command)[0] == 0
