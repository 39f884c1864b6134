"""Tests how the index, verify and training treat every known kind of damage to shards.

Damage before indexing: the index rejects an incomplete shard; verify reports an unusable sample, and training replaces
it. Damage after indexing: training stops with exit code 65, and continues with the manifest that verify writes.
"""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest import tar
from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest, write
from flip.data.order import SampleOrder
from flip.runs.errors import DataError
from jobs.measuring.functions import input_stages
from tests.flip.data.loading import BATCH, BLOCK, CHUNK, LANES, loader
from tests.flip.data.manifest.test_manifest import write_tar
from tests.flip.data.test_decode_odd import SOUND
from tests.flip.data.test_loader import same, take
from tests.synthetic import caption, draw_image, encode
from tools.shards_commands import inspect_samples
from tools.shards_commands.recode_image import Recoding, markers_are_safe, recode_image
from tools.shards_commands.verify import Report, VerificationPlan, check, resized

HURT = 2
AT = 20
"""Sample AT of shard HURT is damaged."""
STEPS = 8
"""More than a pass, so that training reads every sample."""


class Spots:
    """Byte offsets in a shard around sample AT."""

    def __init__(self, data):
        self.data = data
        samples = list(tar.samples(memoryview(data), strict=True))
        self.start = samples[AT].start
        self.next = samples[AT + 1].start
        self.end = samples[-1].end
        self.image, size = samples[AT].members["png"]
        self.image_end = self.image + size
        self.text_header = next(offset - 512 for name, (offset, _) in samples[AT].members.items() if name == "txt")

    def put(self, offset, new):
        return self.data[:offset] + new + self.data[offset + len(new) :]

    def flip(self, offset):
        return self.put(offset, bytes([self.data[offset] ^ 8]))


WHOLE = {
    "cut at a sample border": lambda s: s.data[: s.start],
    "cut between members": lambda s: s.data[: s.text_header],
    "cut in an image": lambda s: s.data[: s.image + 50],
    "cut in a header": lambda s: s.data[: s.start + 100],
    "a zeroed header": lambda s: s.put(s.start, bytes(512)),
    "a garbage header": lambda s: s.put(s.start, b"\x7f" * 512),
    "a flipped byte in a header's name": lambda s: s.flip(s.start + 3),
    "a flipped byte in a header's size": lambda s: s.flip(s.start + 134),
    "zeros in place of a sample": lambda s: s.put(s.start, bytes(s.next - s.start)),
    "zero blocks slipped in": lambda s: s.data[: s.start] + bytes(1024) + s.data[s.start :],
    "a piece missing": lambda s: s.data[: s.image] + s.data[s.image + 512 :],
    "empty": lambda _: b"",
    "a web page": lambda _: b"<!DOCTYPE html><html>503 Slow Down</html>" * 400,
    "missing": lambda _: None,
}
"""Kinds of damage that leave no complete, valid tar."""
UNSEEN_BY_INDEX = {
    "a flipped byte in an image": lambda s: s.flip((s.image + s.image_end) // 2),
    "a flipped byte in a caption": lambda s: s.flip(s.text_header + 512),
    "another sample in its place": lambda s: s.put(s.image, s.data[s.image : s.image_end][::-1]),
}
"""Kinds of damage that leave a valid tar: only the CRC in the index detects them."""
AROUND = {
    "garbage after the end": lambda s: s.data + b"<html>",
    "no end mark": lambda s: s.data[: s.end],
}
"""Damage outside all samples: the index rejects it, and readers with a manifest ignore it."""


def damage_shard(folder, damage):
    """Damage shard HURT and return its path."""
    path = folder / f"{HURT:05d}.tar"
    data = damage(Spots(path.read_bytes()))
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    return path


def verified(manifest):
    report = Report()
    for part in check(manifest, VerificationPlan(range(manifest.chunks))):
        report.add(part)
    return report


def train(original, folder, **fields):
    return take(loader(original, folder=folder, **fields), 0, STEPS)


def arrays(batches):
    return [{name: getattr(batch, name) for name in ("patches", "keep_indices", "tokens", "ids")} for batch in batches]


def assert_in_place(batches, manifest, bad):
    """Every position holds the sample of the order, or a good sample in place of a bad one."""
    order = SampleOrder(11, manifest.samples, CHUNK, BLOCK, LANES)
    replaced = 0
    for t, batch in enumerate(batches):
        for scheduled, actual in zip(order.batch(t * BATCH, BATCH)[0].tolist(), batch.ids.tolist(), strict=True):
            assert actual not in bad and (scheduled in bad or actual == scheduled)
            replaced += scheduled in bad
    assert replaced


@pytest.mark.parametrize("name", [*WHOLE, *AROUND])
def test_index_rejects_incomplete_or_malformed_tar(folder, tmp_path, name):
    path = damage_shard(folder, {**WHOLE, **AROUND}[name])
    with pytest.raises(DataError, match=f"{path.name}: ") as error:
        index([str(folder / f"{i:05d}.tar") for i in range(5)], tmp_path / "m")
    assert error.value.code == 65 and error.value.remedy and not (tmp_path / "m").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", [*WHOLE, *UNSEEN_BY_INDEX])
def test_damage_after_indexing_stops_training_until_excepted(original, folder, tmp_path, name):
    manifest = Manifest.load(folder)
    path = damage_shard(folder, {**WHOLE, **UNSEEN_BY_INDEX}[name])
    with pytest.raises(DataError, match=path.name) as error:
        train(original, folder)
    assert error.value.code == 65 and error.value.remedy

    report = verified(manifest)
    first = int(manifest.first[HURT])
    assert first + AT in report.bad
    assert set(report.bad) <= set(range(first - CHUNK, int(manifest.first[HURT + 1]) + CHUNK))
    if len(report.bad) > CHUNK:  # the rest of the shard has moved or is missing
        assert set(range(first + AT, int(manifest.first[HURT + 1]))) <= set(report.bad)

    known = write(tmp_path / "known", manifest, manifest.checksums, report.bad)
    healed = train(original, known.folder, max_replaced=0)
    assert_in_place(healed, known, report.bad)
    assert sum(batch.replaced for batch in healed) == 0  # excepted samples do not count as replaced


@pytest.mark.parametrize("name", AROUND)
def test_damage_outside_samples_is_reported_and_changes_no_batch(original, folder, name):
    manifest = Manifest.load(folder)
    before = train(original, folder)
    path = damage_shard(folder, AROUND[name])
    after = train(original, folder)
    assert same(arrays(before), arrays(after))
    assert not verified(manifest).bad
    assert [line.startswith(f"{path}: ") for line in resized(manifest, VerificationPlan(range(manifest.chunks)))] == [
        True
    ]


def test_index_ignores_stats_files_of_img2dataset(folder, tmp_path):
    """img2dataset writes 00000_stats.json when a shard is complete; the end mark of the tar shows the same."""
    digest = Manifest.load(folder).digest
    for i in range(4):
        (folder / f"{i:05d}_stats.json").write_text('{"successes": 99999}')
    again = index([str(folder / f"{i:05d}.tar") for i in range(5)], tmp_path / "m", chunk=CHUNK)
    assert again.digest == digest


# -- samples that are bad from the start ------------------------------------------------------------------------------

BOMB = io.BytesIO()
Image.new("1", (9000, 9000)).save(BOMB, "PNG")
GOOD = encode(draw_image(37, 32))

SAMPLES = {
    "an image cut off": ({"png": GOOD[:-300]}, "OSError"),
    "an empty image": ({"png": b""}, "an empty file"),
    "a web page for an image": ({"jpg": b"<html>404</html>"}, "a web page"),
    "a flipped byte in a PNG": ({"png": GOOD[:60] + bytes([GOOD[60] ^ 1]) + GOOD[61:]}, ""),
    "a bomb": ({"png": BOMB.getvalue()}, "9000 x 9000 pixels"),
    "no image": ({}, "no image among its members ['txt']"),
    "no caption": ({"png": GOOD, "txt": None}, "no caption ['txt'] among its members ['png']"),
    "neither": ({"json": b"{}", "txt": None}, "no image among its members ['json']"),
}
"""Members that replace the image and caption of sample 37, and the expected reason."""


def make(folder, change):
    """Write and index 64 samples in two shards; ``change``: replaces members of sample 37."""
    for shard in range(2):
        members = []
        for i in range(32 * shard, 32 * shard + 32):
            sample = {"txt": caption(i).encode()} | ({"png": encode(draw_image(i, 32))} if i != 37 else change)
            members += [(f"{i:05d}.{name}", data) for name, data in sorted(sample.items()) if data is not None]
        write_tar(folder / f"{shard}.tar", members)
    return index([str(folder / f"{shard}.tar") for shard in range(2)], folder, chunk=CHUNK)


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("name", SAMPLES)
def test_bad_sample_is_reported_by_verify_and_replaced_in_training(original, tmp_path, caplog, name, decoder):
    change, reason = SAMPLES[name]
    manifest = make(tmp_path, change)
    report = verified(manifest)
    assert list(report.bad) == [37] and reason in report.bad[37]

    batches = train(original, tmp_path, decoder=decoder)
    assert_in_place(batches, manifest, {37})
    assert sum(batch.replaced for batch in batches) > 0
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"{tmp_path / '1.tar'}, sample 5 replaced: {report.bad[37]}"]


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_jpeg_for_which_simplejpeg_raises_key_error_is_read_everywhere(original, tmp_path, caplog, decoder):
    manifest = make(tmp_path, {"jpg": SOUND["baseline, sampling 1x4"]})
    assert verified(manifest).bad == {}
    assert "undecodable" not in inspect_samples.sample(manifest, 37).picture
    assert input_stages._decode(ChunkReader().read_chunk(manifest, 37 // CHUNK), spec_of(manifest))[0] == CHUNK
    assert recode_image(SOUND["baseline, sampling 1x4"], Recoding(32, 90, markers=True))
    assert markers_are_safe(SOUND["baseline, sampling 1x4"] + b"\xff\xdd"), "no reader skips in it"

    batches = train(original, tmp_path, decoder=decoder)
    assert 37 in np.concatenate([batch.ids for batch in batches])
    assert sum(batch.replaced for batch in batches) == 0
    assert [record.getMessage() for record in caplog.records if "replaced" in record.getMessage()] == []


def spec_of(manifest):
    return input_stages.spec_of(manifest, "simplejpeg", "torchvision", 32, 16)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_accepts_distant_equal_keys_and_rejects_adjacent_duplicates(tmp_path, format):
    """Position identifies a sample, so an equal key elsewhere is another sample.

    Adjacent samples with equal keys are indistinguishable, so the index rejects them.
    """
    parts = [("0.txt", b"first"), ("1.txt", b"other"), ("0.txt", b"second")]
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", parts, format)
    manifest = index([str(tmp_path / f"{shard}.tar") for shard in range(2)], tmp_path / "m", chunk=1)
    assert manifest.samples == 6 and verified(manifest).reasons() == {"no image among its members ['txt']": 6}
    write_tar(tmp_path / "1.tar", [("0.png", b"1"), ("0.txt", b"x"), ("0.png", b"2"), ("0.txt", b"y")], format)
    with pytest.raises(DataError, match="sample 0 holds two members png"):
        index([str(tmp_path / "1.tar")], tmp_path / "n")


def test_verify_groups_samples_of_missing_shard_under_single_reason(folder):
    manifest = Manifest.load(folder)
    os.unlink(manifest.keys[HURT])
    assert verified(manifest).reasons() == {"the shard is missing (N.tar)": 42}
