import dataclasses
import subprocess
import sys

import pytest

from flip.common.yaml_io import LocatedDict, read_yaml
from flip.config.merge import dump, lookup, merge, read_config
from flip.config.schema import MODEL_PRESETS, Config
from flip.runs.errors import ConfigError, PermissionDenied
from tests.harness.common import no_access

BASE = ("base.yaml", {"stages": [{"name": "pretrain", "samples": 1000, "batch": 10, "mask": 0.5}]})


def mistake(call, *args, **kwargs):
    """The text of the ConfigError that a call raises. Asserts that it is one line and has exit code 78."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == 78
    text = caught.value.paragraph()
    assert "\n" not in text
    return text


def test_merge_prefers_later_layers_and_explicit_fields_to_size_preset():
    over = ("over.yaml", {"model": {"size": "H/14", "image.width": 64}, "optim.beta2": 0.9})
    config = merge([BASE, over], ["optim.beta2=0.98", "optim.beta2=0.99"])
    assert config.model.image.width == 64
    assert config.model.image.layers == MODEL_PRESETS["H/14"]["image"]["layers"]
    assert config.optim.beta2 == 0.99
    assert merge([over, ("top", {"model.size": "tiny"})]).model.text.vocabulary == 1000
    assert merge([("empty", {})]) == dataclasses.replace(Config(), stages=[])


def test_merge_returns_configs_without_shared_state():
    layer = ("layer", {"augment.mean": [0.5, 0.5, 0.5], "stages": [{"name": "pretrain", "samples": 10, "batch": 2}]})
    first = merge([layer])
    second = merge([layer])
    assert first == second and first.augment.std == Config().augment.std
    first.augment.mean[0] = 0.1
    first.augment.std[0] = 0.1
    first.stages[0].batch = 4
    first.model.image.width = 8
    assert second == merge([layer]) and second.model.image.width == Config().model.image.width


def test_merge_parses_numbers_in_common_notations(tmp_path):
    path = tmp_path / "numbers.yaml"
    path.write_text(
        "stages: [{name: a, samples: 12.8e9, batch: 65_536, warmup: '1e3', base_lr: 4e-6, mask: .50}]\n"
        "seed: 18446744073709551615\ncompute: {deterministic: yes}\nresources: {hours: 24}\n"
    )
    config = merge([(str(path), read_yaml(path))])
    stage = config.stages[0]
    assert (stage.samples, stage.batch, stage.warmup) == (12_800_000_000, 65536, 1000)
    assert stage.base_lr == 4e-6 and config.seed == 2**64 - 1
    assert config.compute.deterministic == "yes" and config.resources.hours == 24.0


@pytest.mark.parametrize("written", ["0.5", "0.50", ".5", "5e-1"])
def test_merge_normalises_spelling_of_mask(written):
    assert merge([BASE], [f"stages.pretrain.mask={written}"]).stages[0].mask == "0.5"
    assert merge([("x", {"stages": [{"mask": float(written)}]})]).stages[0].mask == "0.5"
    assert merge([BASE], ["stages.pretrain.mask=0.0"]).stages[0].mask == "0"
    assert merge([BASE], [f"stages.pretrain.text_mask={written}"]).stages[0].text_mask == "0.5"


def test_merge_overrides_named_list_members_by_name_or_position():
    more = {"stages": {"pretrain": {"mask": "0.75"}, "unmasked": {"samples": 50, "batch": 5}}}
    config = merge([BASE, ("more", more)], ["stages.0.samples=7", "evaluate.sets.t.manifest=x"])
    assert [(s.name, s.samples, s.batch, s.mask) for s in config.stages] == [
        ("pretrain", 7, 10, "0.75"),
        ("unmasked", 50, 5, "0.5"),
    ]
    assert lookup(config, "evaluate.sets.t.manifest") == "x" and lookup(config, "stages.none.mask") is None
    assert [s.name for s in merge([BASE, ("more", more)], ["stages.pretrain="]).stages] == ["unmasked"]
    assert [s.name for s in merge([BASE], ["stages=[{name: b}]"]).stages] == ["b"]
    three = ("x", {"stages": {name: {"samples": 50, "batch": 5} for name in "bc"}})
    for change, left in (({"0": None, "1": None}, "c"), ({"0": None, "1": {"batch": 7}}, "bc"), ({"2": None}, "pb")):
        # Positions are those before the change.
        assert [s.name[0] for s in merge([BASE, three, ("y", {"stages": change})]).stages] == list(left)


@pytest.mark.parametrize(
    "override, words",
    [
        ("modle.size=B/16", ["modle", "unknown key", "Did you mean model?"]),
        ("model.image.widht=3", ["model.image.widht", "model.image.width"]),
        ("lr=3", ["lr: unknown key"]),
        ("weight_decay=3", ["optim.weight_decay"]),
        ("stages.pretrain.bach=3", ["stages.pretrain.batch"]),
        ("stages.7.batch=3", ["There are 1: pretrain"]),
        ("stages=3", ["needs a list", "3"]),
        ("stages.pretrain=3", ["needs a mapping", "3"]),
        ("stages.pretrain.mask=half", ["stages.pretrain.mask", "'half'", "0.5"]),
        ("seed=1.5", ["seed", "whole number", "1.5"]),
        ("seed=true", ["seed", "whole number", "True"]),
        ("seed=", ["seed", "has no value"]),
        ("optim.eps=.inf", ["optim.eps", "number"]),
        ("optim.eps=1e999", ["optim.eps", "number"]),
        ("optim.decay_logit_scale=3", ["true or false", "3"]),
        ("recipe=[a]", ["recipe", "text"]),
        ("recipe=${oc.env:HOME}", ["interpolation is off", "${oc.env:HOME}"]),
        ("data.manifest=???", ["interpolation is off", "???"]),
        ("model.size=XXL", ["model.size", "'XXL'", "B/16"]),
        ("augment.mean=[a]", ["augment.mean.0", "'a'"]),
        ("nonsense", ["KEY=VALUE", "'nonsense'"]),
        ("optim..eps=1", ["empty part"]),
        ("seed=[", ["command line, seed", "not valid YAML"]),
    ],
)
def test_merge_rejects_invalid_override_and_names_key(override, words):
    text = mistake(merge, [BASE], [override])
    assert "command line" in text
    for word in words:
        assert word in text


def test_merge_error_names_file_line_and_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nmodel:\n  image:\n    width: wide\n")
    message = mistake(merge, [BASE, (str(path), read_yaml(path))])
    assert message == f"{path}:4: model.image.width: needs a whole number (found: 'wide')."


def test_merge_expands_dotted_keys_of_stages_in_list():
    stage = {"name": "small", "samples": 10, "batch": 2}
    nested, dotted = (
        merge([("x", {"stages": [{**stage, **image}]})]) for image in ({"image": {"size": 112}}, {"image.size": 112})
    )
    assert nested == dotted and nested.stages[0].image.size == 112


def test_merge_rejects_key_in_both_dotted_and_nested_form():
    assert "twice" in mistake(merge, [("x", {"optim.eps": 1e-8, "optim": {"eps": 1e-6}})])
    assert "twice" in mistake(merge, [("x", {"optim": 3, "optim.eps": 1e-8})])


@pytest.mark.parametrize(
    "content, words",
    [
        (b"- a\n- b\n", ["a mapping is needed", "list"]),
        (b"just text", ["a mapping is needed"]),
        (b"a: 1\nb: \xff\n", [":2:", "not UTF-8", "0xff"]),
        (b"a: 1\nb: [1,\n", ["not valid YAML", ":3:"]),
        (b"a: 1\nb: 2\na: 3\n", [":3:1", "occurs twice", "line 1"]),
        (b"a: !!python/object:os.system x\n", ["not valid YAML", ":1:"]),
        (b"a: \x00\n", ["not valid YAML"]),
        (b"[a, b]: 1\n", ["plain text"]),
    ],
)
def test_read_yaml_rejects_file_without_valid_mapping(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    text = mistake(read_yaml, path)
    for word in [str(path), *words]:
        assert word in text


def test_read_yaml_rejects_missing_file_and_folder(tmp_path):
    assert "no such file" in mistake(read_yaml, tmp_path / "none.yaml")
    assert "folder" in mistake(read_yaml, tmp_path)


def test_read_yaml_raises_permission_denied_for_unreadable_file(tmp_path):
    path = tmp_path / "secret.yaml"
    path.write_text("a: 1\n")
    tmp_path.chmod(0o755)
    with no_access(path), pytest.raises(PermissionDenied) as caught:
        read_yaml(path)
    assert caught.value.code == 77 and str(path) in str(caught.value)


def test_read_yaml_returns_text_keys_and_yaml_1_2_scalars(tmp_path):
    path = tmp_path / "scalars.yaml"
    path.write_text("0.5: yes\non: 010\nx: 1:30\ny: 1e3\nz:\n<<: {w: 1}\n")
    table = read_yaml(path)
    assert table == {"0.5": "yes", "on": "010", "x": "1:30", "y": 1000.0, "z": None, "w": 1}
    assert isinstance(table, LocatedDict) and table.lines["x"] == 3


def test_read_config_round_trips_dump_and_refuses_other_format(tmp_path):
    config = merge(
        [BASE], ["recipe='1e3'", "data.manifest='caf\u00e9: x'", "compute.deterministic=no", "model.size=tiny"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert read_config(path) == config
    assert dump(read_config(path)) == dump(config)
    path.write_text(dump(config).replace("size: tiny", "size: 2M/8"), encoding="utf-8")
    assert read_config(path).model.embed == config.model.embed, "a size of another release is a label"
    path.write_text(dump(config).replace("schema: 1", "schema: 99"))
    assert "newer" in mistake(read_config, path) and str(path) in mistake(read_config, path)


def test_config_modules_do_not_import_torch():
    code = (
        "import sys, flip.config.merge, flip.config.validate, flip.config.identity; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
