"""Fuzz tests of sweep files, cluster profiles and configurations: damaged text raises only ConfigError."""

import contextlib

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from flip.common.yaml_io import dump_yaml, parse_yaml, read_yaml
from flip.config.merge import dump, merge, read_config
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.sweeps.sweep_file import read_sweep
from tests.parsers.spoil import SCALARS, changed, spoiled

pytestmark = pytest.mark.timeout(60)

SWEEP = {
    "name": "trial",
    "title": "t",
    "recipe": "paper",
    "set": {"model": {"size": "B/16"}, "data.manifest": "m", "stages.pretrain": {"mask": 0.5, "samples": 1280}},
    "grid": {"seed": [1, 2], "optim.beta1": [0.9, 0.95]},
    "where": ["seed != 1 or optim.beta1 == 0.9"],
    "runs": {"a": {"model.size": "L/16"}, "b": None},
    "seeds": [0, 1],
    "paper": {"a": {"imagenet": 74.3}},
}
PROFILE = {
    "kind": "slurm", "gpus_per_node": 8, "gpu": "H100 SXM", "hours": 24, "options": {"mem": "10G"},
    "env": ["HTTPS_PROXY"], "setup": ["true"], "canary": 0, "container_mounts": ["/a:/b"],
}  # fmt: skip
#: A YAML bomb of nested aliases, nine levels deep: 9^9 entries in the memory of a few.
BOMB = "".join(f"{a}: &{a} [{', '.join([f'*{b}'] * 9)}]\n" for a, b in zip("bcdefghij", "abcdefghi", strict=True))
MERGED = "".join(
    f"{a}: &{a} {{<<: [{', '.join([f'*{b}'] * 9)}]}}\n" for a, b in zip("bcdefghij", "abcdefghi", strict=True)
)
TAGS = (
    "timestamp x",
    "bool x",
    "int x",
    "float x",
    "binary x",
    "set {a}",
    "omap [a: 1]",
    "pairs [a]",
    "null x",
    "merge x",
)
TAGGED = [f"runs: {{a: {{seed: !!{tag}}}}}" for tag in TAGS]
UNSAFE = ["!!python/object/apply:os.system [touch /tmp/never]", "!!python/name:os.system", "!x a"]


def text_of(document):
    return changed(document).map(yaml.safe_dump) | spoiled(yaml.safe_dump(document).encode()).map(
        lambda data: data.decode("utf-8", "surrogateescape")
    )


def parsed(path, text, reader):
    path.write_bytes(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)
    try:
        return reader(path)
    except ConfigError as error:
        assert "\n" not in error.paragraph() and len(error.paragraph()) < 20_000
        return None


@given(text_of(SWEEP))
@example("a: &a [1]\n" + BOMB + "grid: {seed: *j}")
@example("a: &a {x: 1}\n" + MERGED + "set: *j")
@example("runs: &a {b: *a}")
@example("runs: {a: {seed: 1" + "0" * 400 + "}}")
@example("grid: {seed: [1" + "0" * 400 + ", 1]}")
@example("grid: {optim.beta1: [1e999, 1]}")
@example("runs: {a: {seed: 1e9999999999}}")
@example("runs: {a: {seed: 1e99999999}}")
@example("runs: {a: {seed: '1e999999999999'}}")
@example("runs: {a: {stages: {pretrain: {mask: '1e-999999999999'}}}}")
@example("paper: {a: {imagenet: 1" + "0" * 400 + "}}\nruns: {a: }")
@example("[" * 50_000)
@example("runs: {a: {seed: " + "1" * 10_000 + "}}")
@example("runs: {a: {model: {size: ${oc.env:HOME}}}}")
@example("runs: {a: {stages: {" + "9" * 5000 + ": {mask: 0}}}}")
def test_load_sweep_raises_only_config_error_on_any_text(tmp_path, text):
    loaded = parsed(tmp_path / "trial.yaml", text, read_sweep)
    assert loaded is None or all(run.name and run.config for run in loaded.runs)


@pytest.mark.parametrize("text", TAGGED + [f"runs: {{a: {{seed: {text}}}}}" for text in UNSAFE])
def test_load_sweep_raises_only_config_error_on_yaml_tags(tmp_path, text):
    parsed(tmp_path / "trial.yaml", text, read_sweep)


@pytest.mark.parametrize("text", UNSAFE)
def test_parse_yaml_rejects_python_tags(text):
    with pytest.raises(ConfigError, match="constructor|tag"):
        parse_yaml(text, "x")


@given(text_of(PROFILE))
@example("hours: 1" + "0" * 400)
@example("options: &a {b: *a}")
@example("hours: 1e999")
def test_load_profile_raises_only_config_error_on_any_text(tmp_path, text):
    profile = parsed(tmp_path / "trial.yaml", text, lambda path: load_profile(str(path)))
    assert profile is None or (isinstance(profile, ClusterProfile) and profile.gpu_bytes >= 0 and profile.tflops >= 0)


VALUES = st.recursive(
    SCALARS.filter(lambda value: not isinstance(value, float) or value - value == 0),
    lambda more: st.lists(more, max_size=3) | st.dictionaries(st.text(max_size=4), more, max_size=3),
    max_leaves=6,
)


@given(VALUES)
def test_dump_yaml_round_trips_any_value(value):
    try:
        text = dump_yaml(value)
        text.encode()
    except (yaml.YAMLError, UnicodeEncodeError):  # lone surrogates
        return
    assert parse_yaml(text, "x") == value


@given(text_of({"schema": 1, "model": {"size": "B/16"}, "stages": [{"name": "a", "mask": 0.5}], "seed": 3}))
def test_read_config_round_trips_or_rejects_any_text(tmp_path, text):
    config = parsed(tmp_path / "config.yaml", text, read_config)
    if config is not None:
        (tmp_path / "again.yaml").write_text(dump(config), encoding="utf-8")
        assert read_config(tmp_path / "again.yaml") == config


@given(
    st.lists(st.tuples(st.sampled_from(["seed", "optim.beta1", "stages.0.mask", "evaluate.sets"]), st.text(max_size=8)))
)
def test_merge_raises_only_config_error_on_any_override(overrides):
    with contextlib.suppress(ConfigError):
        merge([], [f"{key}={value}" for key, value in overrides])


@given(st.binary(max_size=40))
def test_read_yaml_returns_mapping_or_config_error_for_any_bytes(tmp_path, data):
    document = parsed(tmp_path / "some.yaml", data, read_yaml)
    assert document is None or isinstance(document, dict)
