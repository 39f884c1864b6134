"""Tests of the speed of a core in plans: by images, mask and kernel, and of what smaller images would save."""

import json
from dataclasses import replace

import pytest

from jobs.common.cluster_profile import load_profile
from jobs.common.text import hours_text
from jobs.planning import core_speeds, step_time, throughput
from tests.jobs.planning.test_memory_fit import planned
from tests.synthetic import make_dataset
from tests.tools.commands.test_shards_cli import call

H100 = load_profile("h100")
OVERRIDES = ("model.size=B/16", "resources.nodes=1", "data.decoder=simplejpeg", "data.resize=torchvision")


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", "/no/cache")


@pytest.fixture(params=[False, True], ids=["whole", "kernel"])
def kernel(request, monkeypatch):
    monkeypatch.setattr(throughput, "uses_kernel", lambda *_: request.param)
    return request.param


def speed(config, profile=H100):
    return throughput.core_samples(config, config.stages[0], profile)


def test_speed_follows_mask_and_kernel(kernel):
    config = planned(*OVERRIDES, "stages.pretrain.mask=0.5")
    large = core_speeds.Images(384, False, False)
    microseconds = core_speeds.assumed_table().microseconds(large, 224, 0.5, kernel)
    assert speed(config) == pytest.approx(1e6 / microseconds)
    text = throughput.described(config, config.stages[0], H100)
    assert "images of 384 px as assumed, mask 0.5" in text and "assumed speeds" in text
    assert ("with the visible" in text) == kernel
    assert step_time.step_time(config, config.stages[0], H100).core_samples == pytest.approx(speed(config))


def test_speed_is_that_of_recoded_shards(tmp_path, capsys, kernel):
    source = make_dataset(tmp_path / "source", 20, 1, size=40, chunk=4, fmt="jpg")
    assert call(capsys, "recode", source, "--short", 32, "--out", tmp_path / "small")[0] == 0
    config = planned(*OVERRIDES, "stages.pretrain.mask=0.75")
    config.data.manifest = str(tmp_path / "small")
    (images,) = throughput.images_of(config)
    assert images == core_speeds.Images(32, True, True)
    assert "images of 32 px, mask" in throughput.described(config, config.stages[0], H100)
    record = json.loads((tmp_path / "small" / "manifest.json").read_text())
    record["settings"]["recoded"]["short"] = 256
    (tmp_path / "small" / "manifest.json").write_text(json.dumps(record))
    small = core_speeds.Images(256, True, True)
    microseconds = core_speeds.assumed_table().microseconds(small, 224, 0.75, kernel)
    assert speed(config) == pytest.approx(1e6 / microseconds)
    config.data.manifest = str(source)
    assert throughput.images_of(config) == [core_speeds.Images(384, False, False)]


def test_warning_names_the_command_and_what_it_saves(kernel):
    config = planned(*OVERRIDES, "stages.pretrain.mask=0.75", "compute.accumulate=2")
    slow = replace(H100, cpus_per_node=48)
    hours = []
    for images in ([], [core_speeds.Images(256, True, True)]):
        seconds = 0.0
        for stage in config.stages:
            step = step_time.step_time(config, stage, slow, images)
            seconds += step.total * stage.samples / stage.batch
        hours.append(seconds * 8 / 3600)
    warning = step_time.input_warning(config, slow)
    assert hours[1] < 0.7 * hours[0]
    saved = f"{hours_text(hours[0] - hours[1])} of {hours_text(hours[0])} GPU-hours"
    assert f"would save about {saved} and 11.2 TB of 16 TB: " in warning
    assert "shards recode /no/cache/laion400m --short 256 --out NEW_FOLDER" in warning
    assert not step_time.input_warning(config, replace(slow, cpus_per_node=10**4))
    config.stages[0].samples //= 10**5
    assert " 0 of 0" not in step_time.input_warning(config, slow), "of a short run"
