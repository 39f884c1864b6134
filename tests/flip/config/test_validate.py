import json

import pytest

from flip.common.host import Host
from flip.config.derived import stage_spans, visible_patch_count
from flip.config.merge import merge
from flip.config.resolve import dataset_facts, resolve_auto
from flip.config.validate import plan_numbers, validate, warnings
from flip.runs.errors import ConfigError

BASE = {
    "model.size": "tiny",
    "data": {"samples": 10_000, "sample_bytes": 1000},
    "stages": [
        {"name": "pretrain", "samples": 1000, "batch": 128, "warmup": 100},
        {"name": "unmasked", "samples": 640, "batch": 64, "mask": 0},
    ],
}


def run(*overrides, **resolved):
    """A resolved configuration. ``resolved`` sets fields of ``data`` after the resolution."""
    config = merge([("test", BASE)], overrides)
    config = resolve_auto(config, Host(cores=2, memory=10**10), dataset_facts(config))
    for name, value in resolved.items():
        setattr(config.data, name, value)
    return config


@pytest.mark.parametrize(
    "words, said",
    [
        (["stages.pretrain.base_lr=2000"], "peak learning rate"),
        (["stages.pretrain.base_lr=4e-6"], "base_lr is the default 4e-06, meant for batches of 16,384 or more"),
        (["stages.pretrain.base_lr=1e-9"], "peak learning rate"),
        (["stages.pretrain.base_lr=1e-3"], ""),
        (["stages.pretrain.base_lr=0"], "base_lr is 0"),
    ],
)
def test_warnings_report_implausible_learning_rate(words, said):
    messages = warnings(run(*words, "stages.unmasked.base_lr=1e-3"))
    assert (len(messages), all(said in message for message in messages)) == (bool(said), True), messages


def test_warnings_report_batch_larger_than_data_set():
    config = run("stages.pretrain.base_lr=1e-3", "stages.unmasked.base_lr=1e-3")
    assert not warnings(config)
    config.data.samples = config.stages[0].batch - 1
    (message,) = warnings(config)
    assert "more pairs than the data set" in message


def test_warnings_report_masking_of_unmasked_texts():
    (message,) = warnings(run("stages.pretrain={base_lr: 1e-3, text_masking: syntax}", "stages.unmasked.base_lr=1e-3"))
    assert message == "stage pretrain: text_masking syntax has no effect, as text_mask is 0"
    words = "stages.pretrain={base_lr: 1e-3, text_mask: 0.5, text_masking: syntax}"
    assert not warnings(run(words, "stages.unmasked.base_lr=1e-3"))


def test_validate_accepts_valid_config_and_returns_notes():
    notes = validate(run())
    assert any("24 samples more" in note for note in notes) and any("no evaluation set" in note for note in notes)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["stages.pretrain.batch=100", "resources.processes=3"],
            ["stages.pretrain.batch", "100", "3 ranks", "99 or 102"],
        ),
        (["data.lanes=48"], ["data.lanes", "48", "stages.pretrain.batch 128", "96 or 144"]),
        (["data.lanes=2", "resources.nodes=4"], ["2 lanes", "4 ranks"]),
        (["data.lanes=64", "data.block=100"], ["12800 chunks", "has 5000", "data.block to 39"]),
        (["data.lanes=4", "data.workers=5"], ["data.workers", "4 lanes of a rank", "5"]),
        (["model.image.patch=7"], ["7 does not divide size 64", "63 or 70"]),
        (["model.image.size=4096", "model.image.patch=16"], ["model.image.patch", "65536 patches", "32767"]),
        (["optim.beta1=1"], ["optim.beta1", "below 1"]),
        (["optim.beta2=1.0"], ["optim.beta2", "below 1"]),
        (["model.image.heads=3"], ["model.image.heads", "63 or 66"]),
        (["model.text.heads=3"], ["model.text.heads", "3 heads"]),
        (["model.image.width=66"], ["multiple of 4", "64 or 68"]),
        (["stages.pretrain.mask=1"], ["stages.pretrain.mask", "below 1", "'1'"]),
        (["stages.pretrain.mask=-0.1"], ["stages.pretrain.mask", "at least 0"]),
        (["stages.pretrain.mask=0.99"], ["keeps none of 64 patches"]),
        (["stages.pretrain.text_mask=0.98"], ["stages.pretrain.text_mask", "keeps none of 32 positions"]),
        (["init={stage: pretrain, samples: 128}"], ["init.run: is not given", "Name the run"]),
        (["init.stage=pretrain"], ["init.run: is not given"]),
        (["stages.pretrain.text_masking=some"], ["stages.pretrain.text_masking", "random, truncation, prioritised"]),
        (["model.text.padding=none"], ["model.text.padding", "attend, mask"]),
        (["model.objective=sigmoid"], ["model.objective", "clip, siglip"]),
        (["stages.1.name=pretrain"], ["stages", "same name", "pretrain"]),
        (["stages.1.name=a/b"], ["stages", "'a/b'"]),
        (["stages=[]"], ["stages", "none"]),
        (["stages.pretrain.samples=0"], ["stages.pretrain.samples", "at least 1"]),
        (["stages.pretrain.batch=-4"], ["stages.pretrain.batch", "at least 1", "-4"]),
        (["stages.pretrain.warmup=1001"], ["stages.pretrain.warmup", "1000 samples", "1001"]),
        (["stages.pretrain.base_lr=-1"], ["stages.pretrain.base_lr"]),
        (["model.image.pool=max"], ["model.image.pool", "'max'", "all, patches"]),
        (["compute.precision=fp16"], ["compute.precision", "bf16"]),
        (["compute.deterministic=maybe"], ["compute.deterministic", "yes, no"]),
        (["data.decoder=gif"], ["data.decoder", "simplejpeg"]),
        (["compute.device=cuda"], ["compute.device", "resources.gpus is 0"]),
        (["resources.gpus=2"], ["resources.processes", "2 GPUs"]),
        (["seed=-1"], ["seed", "at least 0"]),
        (["seed=18446744073709551616"], ["seed", "at most 18446744073709551615"]),
        (["checkpoint.minutes=-1"], ["checkpoint.minutes", "at least 0"]),
        (["checkpoint.keep=0"], ["checkpoint.keep", "at least 1"]),
        (["augment.crop_area=[0.9, 0.5]"], ["augment.crop_area", "smaller first"]),
        (["augment.std=[1, 1]"], ["augment.std", "three"]),
        (["augment.std=[1, 1, 0]"], ["augment.std.2", "above 0"]),
        (["stages.unmasked.image.size=65"], ["stages.unmasked.image.patch", "8 does not divide size 65", "64 or 72"]),
        (["stages.unmasked.image.patch=0"], ["stages.unmasked.image.patch", "at least 1"]),
        (["stages.unmasked.text.length=0"], ["stages.unmasked.text.length", "at least 1"]),
        (["stages.pretrain.image.size=8", "stages.pretrain.mask=0.5"], ["pretrain.mask", "keeps none of 1 patches"]),
        (["stages.pretrain.text.length=1", "stages.pretrain.text_mask=0.5"], ["keeps none of 1 positions"]),
        (["stages.pretrain.augment.crop_area=[0, 1]"], ["stages.pretrain.augment.crop_area", "above 0"]),
        (["stages.pretrain.augment.std=[1]"], ["stages.pretrain.augment.std", "three"]),
        (["model.temperature=0.005"], ["model.temperature", "from 0.01 to 1"]),
        (["model.temperature=2"], ["model.temperature", "never learned"]),
        (["stages.pretrain.schedule=linear"], ["stages.pretrain.schedule", "cosine, constant, wsd"]),
        (["stages.pretrain.schedule=wsd"], ["stages.pretrain.cooldown", "schedule wsd", "together"]),
        (["stages.pretrain.cooldown=10"], ["stages.pretrain.cooldown", "schedule cosine"]),
        (
            ["stages.pretrain.schedule=wsd", "stages.pretrain.cooldown=900", "stages.pretrain.warmup=200"],
            ["stages.pretrain.cooldown", "warm-up of 200", "1000 samples"],
        ),
        (["checkpoint.keep_at=[130]"], ["checkpoint.keep_at", "130", "stage pretrain", "128 or 256"]),
        (["checkpoint.keep_at=[12800000]"], ["checkpoint.keep_at", "after the end"]),
        (["data.captions=[]"], ["data.captions"]),
        (["data.cache=s3://bucket/chunks"], ["data.cache", "not an address"]),
        (["data.manifest=s3://bucket/manifest"], ["data.manifest", "on this machine, not an address", "shards index"]),
        (["data.tokenizer=https://host/t.json"], ["data.tokenizer", "on this machine, not an address"]),
        (["data.manifest=$HOME/manifest"], ["data.manifest", "$HOME are not replaced", "~"]),
        (
            ["evaluate.sets=[{name: a, manifest: m, classes: c}, {name: a, manifest: m, classes: c}]"],
            ["same name", "a"],
        ),
        (
            ["evaluate.sets=[{name: a, manifest: m}]"],
            ["evaluate.sets.a.classes", "`flip prompts`"],
        ),
        (["evaluate.sets=[{name: a, manifest: m, task: probe}]"], ["evaluate.sets.a.train", "`flip shards index`"]),
        (["evaluate.sets=[{name: a, manifest: m, task: probing}]"], ["evaluate.sets.a.task", "'probing'"]),
        (["evaluate.sets=[{name: a, role: tst}]"], ["evaluate.sets.a.role", "'tst'"]),
    ],
)
def test_validate_error_names_invalid_setting_and_reason(overrides, words):
    with pytest.raises(ConfigError) as caught:
        validate(run(*overrides))
    text = caught.value.paragraph()
    assert caught.value.code == 78 and "\n" not in text
    for word in words:
        assert word in text


def test_validate_rejects_unresolved_values():
    for name, value in (("workers", -1), ("lanes", 0), ("chunk", 0), ("decoder", "auto")):
        with pytest.raises(ConfigError, match=rf"data\.{name}: is not resolved"):
            validate(run(**{name: value}))


def test_validate_rejects_more_ranks_than_tiny_data_set_allows():
    with pytest.raises(ConfigError, match="the data set has 40"):
        validate(run("data.samples=40", "resources.processes=16"))


def test_stage_spans_are_contiguous_and_hold_full_batches():
    first, second = stage_spans(run())
    assert (first.start, first.end, first.steps) == (0, 1024, 8)
    assert (second.start, second.end, second.steps) == (1024, 1664, 10)


def test_kept_patches_uses_exact_arithmetic():
    image = run("model.image.size=80").model.image
    assert [visible_patch_count(image, mask) for mask in ("0", "0.5", "0.9", "0.7", "0.29")] == [100, 50, 10, 30, 71]


def test_plan_numbers_reports_world_data_and_stages():
    numbers = plan_numbers(run("resources.processes=2", "data.lanes=8"))
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["world"] == 2 and numbers["worlds"] == [1, 2, 4, 8]
    assert numbers["data"]["sets"][0]["chunk"] == 2 and numbers["data"]["buffer"] == 8 * 4 * 2 * 1000 * 1.5
    assert numbers["data"]["buffer_per_rank"] == 48_000
    assert numbers["data"]["passes"] == pytest.approx(0.1664)
    stage = numbers["stages"][0]
    assert (stage["local_batch"], stage["patches"], stage["kept"], stage["steps"]) == (64, 64, 32, 8)
    assert stage["lr"] == pytest.approx(4e-6 / 2)
