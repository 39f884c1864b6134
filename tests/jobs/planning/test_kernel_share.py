"""Tests of the share of images that the visible-patch kernel takes, by a sample of a data set, and its use in plans."""

import os
from dataclasses import replace

import pytest
import visible_jpeg

from flip.config import schema
from flip.data import augment as augmenting
from flip.data import kernel
from flip.data.manifest.manifest import Manifest, write
from flip.runs.errors import DataError
from jobs.common.cluster_profile import load_profile
from jobs.planning import core_speeds, kernel_share, software_checks, throughput
from tests.flip.data.test_kernel import Half, odd_files, write_shard
from tests.jobs.planning.test_memory_fit import planned

H100 = load_profile("h100")
OVERRIDES = ("model.size=B/16", "resources.nodes=1", "data.decoder=simplejpeg", "data.resize=torchvision")


@pytest.fixture(autouse=True)
def usable_kernel(monkeypatch):
    reason = visible_jpeg.unavailable()
    if reason:
        assert os.environ.get("FLIP_REQUIRE_KERNEL") != "1", reason
        pytest.skip(f"no kernel: {reason}")
    monkeypatch.setenv("FLIP_CACHE", "/no/cache")
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    kernel_share._sample.cache_clear()


def data_set(folder, *names):
    """A data set of 96 images of these kinds in turn."""
    folder.mkdir()
    files = odd_files()
    write_shard(folder, [files[names[i % len(names)]][0] for i in range(96)])
    return folder


def config_of(folder, *overrides):
    config = planned(*OVERRIDES, *overrides)
    config.data.manifest = str(folder)
    return config


def shown(config):
    return software_checks.check_kernel(config, replace(H100, container="", python="")).text


def test_sample_counts_what_the_kernel_takes_and_names_the_others(tmp_path):
    seen = kernel_share.sample(str(data_set(tmp_path / "a", "JPEG", "PNG", "progressive", "CMYK")), "ignore")
    assert seen.images == kernel_share.IMAGES and 0.1 < seen.share < 0.5
    assert seen.refused.keys() == {"PNG", "progressive or otherwise not baseline", "CMYK or of several scans"}
    turned = str(data_set(tmp_path / "b", "turned"))
    assert (kernel_share.sample(turned, "ignore").share, kernel_share.sample(turned, "apply").share) == (1.0, 0.0)


def test_plan_says_the_share_of_the_images(tmp_path):
    assert shown(config_of(data_set(tmp_path / "a", "JPEG", "grey"))) == "yes; it takes 64 of 64 images sampled (100 %)"
    half = shown(config_of(data_set(tmp_path / "b", "JPEG", "PNG")))
    assert half.startswith("yes; it takes ") and "; others: " in half and " PNG" in half
    none = shown(config_of(data_set(tmp_path / "c", "PNG")))
    assert none == "no, because it takes 0 of 64 images sampled (0 %); others: 64 PNG"
    assert shown(config_of("/no/data")) == "yes"


def test_plan_counts_augmentation_that_changes_pixels(tmp_path, monkeypatch):
    folder = data_set(tmp_path / "a", "JPEG")
    monkeypatch.setitem(augmenting.AUGMENTATIONS, "new", Half())
    config = config_of(folder, "augment.flip=0.25")
    assert "75 % of the views by the augmentation; it takes 64 of 64" in shown(config)
    assert throughput.kernel_share_of(config, config.stages[0], throughput.images_of(config)) == 0.75
    always = config_of(folder, "augment.flip=1")
    assert shown(always).startswith("no, because the augmentation (new) changes the pixels of every view")


@pytest.mark.parametrize("names, share", [(("JPEG",), 1.0), (("JPEG", "PNG"), 0.5), (("PNG",), 0.0)])
def test_planned_speed_follows_the_share(tmp_path, names, share):
    config = config_of(data_set(tmp_path / "a", *names), "stages.pretrain.mask=0.75")
    (images,) = throughput.images_of(config)
    assert images.kernel == pytest.approx(share, abs=0.15)
    table = core_speeds.assumed_table()
    fast, slow = (table.microseconds(images, 224, 0.75, used) for used in (True, False))
    expected = 1e6 / (images.kernel * fast + (1 - images.kernel) * slow)
    assert throughput.core_samples(config, config.stages[0], H100) == pytest.approx(expected)
    text = throughput.described(config, config.stages[0], H100)
    assert (" % of them" in text) == (0 < images.kernel < 1)
    assert ("without the visible-patch kernel" in text) == (not images.kernel)
    assert throughput.recoded(images).kernel == 1.0


def test_excluded_samples_and_damaged_chunks_are_left_out(tmp_path):
    folder = data_set(tmp_path / "a", "JPEG", "PNG")
    manifest = Manifest.load(folder)
    bad = dict.fromkeys(range(1, 96, 2), "PNG")
    reduced = write(tmp_path / "less", manifest, manifest.checksums, bad)
    assert kernel_share.sample(str(reduced.folder), "ignore").share == 1.0
    os.truncate(folder / "0.tar", 4096)
    kernel_share._sample.cache_clear()
    with pytest.raises(DataError):
        kernel_share.sample(str(folder), "ignore")
    assert kernel_share.known_share(str(folder), "ignore") == 1.0


def test_no_kernel_or_no_data_reads_nothing(tmp_path, monkeypatch):
    assert kernel_share.sample("/no/data", "ignore") == kernel_share.KernelSample()
    folder = data_set(tmp_path / "a", "PNG")
    monkeypatch.setattr(kernel, "visible_jpeg", None)
    assert kernel_share.sample(str(folder), "ignore").images == 0
    assert "no visible-patch kernel: the package visible-jpeg is not installed" in kernel.decoders()
    assert "simplejpeg " in kernel.decoders() and "pillow " in kernel.decoders()
    config = config_of(folder)
    assert throughput.kernel_share_of(config, config.stages[0], throughput.images_of(config)) == 0.0
    assert kernel.obstacle(config.data, schema.Augment(), config.model.image)
