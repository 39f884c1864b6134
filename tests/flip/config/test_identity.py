import json
import shutil

import pytest

from flip.common.host import Host
from flip.common.plain_data import flatten
from flip.config.identity import changed_class_names, diff_identity, identity, is_same_run, missing_class_names
from flip.config.merge import merge
from flip.config.resolve import dataset_facts, resolve_auto
from flip.config.schema import Optim
from flip.runs.formats import RUN_NUMBER

GOLDEN = "97c8679663407766c8875ff80f78268f462f7d22d4078ffb4fc23d4e596082c1"
"""A change of this hash makes every stored run look changed."""


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    record = {"samples": 5513, "chunk": 1, "mean_bytes": 3000.4, "digest": "d1", "version": 2}
    (folder / "manifest.json").write_text(json.dumps(record))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "classes.json").write_text('{"names": []}')
    return folder


def run(folder, *overrides, cores=2):
    settings = {
        "model.size": "tiny",
        "data": {"manifest": str(folder), "tokenizer": str(folder / "tokenizer.json")},
        "stages": [{"name": "pretrain", "samples": 1000, "batch": 128}],
        "evaluate.sets": [{"name": "val", "manifest": str(folder), "classes": str(folder / "classes.json")}],
        "compute.threads": 1,
    }
    config = merge([("test", settings)], overrides)
    return resolve_auto(config, Host(cores=cores, memory=10**10), dataset_facts(config))


def test_identity_hash_is_pinned(data):
    stored = identity(run(data), "code")
    assert stored["hash"] == GOLDEN and stored["schema"] == RUN_NUMBER


def test_class_names_can_be_corrected_without_another_run(data):
    """Labels may turn out not to fit the names when the training is complete."""
    config = run(data)
    before = identity(config, "code")
    assert is_same_run(before, config) and changed_class_names(before, config) == []
    for correct in (lambda: (data / "classes.json").write_text('{"names": ["a"]}'), (data / "classes.json").unlink):
        correct()
        assert is_same_run(before, config) and diff_identity(before, config) == []
        assert changed_class_names(before, config) == ["val"]
        assert identity(config, "code")["hash"] == GOLDEN
    assert missing_class_names(before, config) == [str(data / "classes.json")]
    assert missing_class_names(identity(config, "code"), config) == [], "they never existed"
    other = run(data, "evaluate.sets.val.role=validation")
    assert not is_same_run(before, other)
    assert [change.key for change in diff_identity(before, other)] == ["evaluate.sets.val.role"]


def test_identity_ignores_data_location_and_runtime_settings(data, tmp_path):
    before = identity(run(data), "code")
    shutil.move(data, tmp_path / "moved")
    overrides = ["data.workers=3", "data.buffer=5e9", "data.deadline=60", "data.timeout=5", "data.hedge=2"]
    overrides += ["data.cache=/tmp/chunks", "data.cache_bytes=5e9", "data.client=obstore"]
    overrides += ["checkpoint.minutes=1", "monitor.log_every=1", "resources.hours=1"]
    after = run(tmp_path / "moved", *overrides, "evaluate.every=500", "recipe=mine", "resources.cpus=4", cores=64)
    assert identity(after, "other code")["hash"] == before["hash"]
    assert diff_identity(before, after) == []
    assert str(tmp_path) not in json.dumps(before["config"])


def test_identity_omits_newer_field_at_its_omit_if_value(data, monkeypatch):
    before = identity(run(data), "code")
    monkeypatch.setattr(Optim.__dataclass_fields__["clip"], "metadata", {"omit_if": 0.0})
    same = identity(run(data), "code")
    other = identity(run(data, "optim.clip=1"), "code")
    assert "clip" in before["config"]["optim"] and "clip" not in same["config"]["optim"]
    assert other["config"] == before["config"] | {"optim": before["config"]["optim"] | {"clip": 1.0}}


@pytest.mark.parametrize(
    "override, key",
    [
        ("seed=1", "seed"),
        ("stages.pretrain.mask=0.75", "stages.pretrain.mask"),
        ("optim.beta2=0.98", "optim.beta2"),
        ("data.lanes=64", "data.lanes"),
        ("compute.threads=2", "compute.threads"),
        ("data.resize=pillow", "data.resize"),
        ("resources.processes=2", "world"),
        ("evaluate.sets.val.role=validation", "evaluate.sets.val.role"),
        ("evaluate.sets.val.task=retrieval", "evaluate.sets.val.task"),
        ("evaluate.sets.val.train=/elsewhere", "evaluate.sets.val.train"),
        ("augment.flip=0", "augment.flip"),
        ("stages.pretrain.text_mask=0.50", "stages.pretrain.text_mask"),
        ("stages.pretrain.text_masking=prioritised", "stages.pretrain.text_masking"),
        ("model.text.padding=mask", "model.text.padding"),
        ("model.objective=siglip", "model.objective"),
        ("data.to_rgb=convert", "data.to_rgb"),
        ("data.exif=apply", "data.exif"),
        ("evaluate.preprocess=resize_crop", "evaluate.preprocess"),
    ],
)
def test_identity_hash_and_diff_reveal_setting_that_affects_results(data, override, key):
    before = identity(run(data), "code")
    config = run(data, override)
    assert identity(config, "code")["hash"] != before["hash"]
    changes = diff_identity(json.loads(json.dumps(before)), config)
    assert [change.key for change in changes] == [key]
    assert "->" in str(changes[0])


def test_identity_changes_with_tokenizer_content(data):
    before = identity(run(data), "code")
    (data / "tokenizer.json").write_text("{ }")
    assert [change.key for change in diff_identity(before, run(data))] == ["data.tokenizer"]


def test_diff_identity_lists_fields_of_added_stage(data):
    changes = diff_identity(
        identity(run(data), "code"), run(data, "stages.unmasked.samples=10", "stages.unmasked.batch=128")
    )
    assert {change.key for change in changes} == {
        f"stages.unmasked.{field}" for field in ("name", "samples", "batch", "mask", "base_lr", "warmup")
    }
    assert changes[0].was is None


def test_identity_depends_on_order_of_stages_but_not_of_evaluation_sets(data):
    def ordered(stages, sets):
        common = {"batch": 128, "samples": 1000}
        place = {"manifest": str(data), "classes": str(data / "classes.json")}
        return run(
            data,
            f"stages={[{'name': n, **common} for n in stages]}",
            f"evaluate.sets={[{'name': n, **place} for n in sets]}",
        )

    config = ordered("ab", "xy")
    before = identity(config, "")
    assert identity(ordered("ab", "yx"), "")["hash"] == before["hash"]
    assert [s.name for s in config.evaluate.sets] == ["x", "y"], "the configuration itself keeps its order"
    changed = ordered("ba", "xy")
    assert identity(changed, "")["hash"] != before["hash"]
    assert [tuple(change) for change in diff_identity(before, changed)] == [("stages", ["a", "b"], ["b", "a"])]


def test_flatten_keeps_plain_and_empty_lists():
    assert flatten({"a": {"b": [1, 2]}, "c": [], "d": [{"name": "x", "e": 1}]}) == {
        "a.b": [1, 2],
        "c": [],
        "d.x.name": "x",
        "d.x.e": 1,
    }
