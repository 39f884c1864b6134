"""Tests that submit refuses runs whose container does not mount all input paths, and names the missing mounts."""

import shutil
from pathlib import Path

import pytest

from flip.common.host import Host
from flip.config.resolve import dataset_facts, resolve_auto
from flip.config.schema import Config, Data, DataSet, Evaluate, EvaluationSet, walk_fields
from flip.data.manifest.build import index
from flip.runs.checks import OK, UNKNOWN
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile
from jobs.planning import environment_checks
from jobs.slurm.batch_script import mounts
from jobs.sweeps.sweep_file import read_sweep
from tests.synthetic import make_dataset, make_tokenizer

SWEEP = """
set:
  model: {{size: tiny}}
  data: {{manifest: {there}/data, tokenizer: cache:t/tokenizer.json, workers: 0, block: 1}}
  stages: [{{name: pretrain, samples: 48, batch: 16}}]
  evaluate:
    sets: [{{name: small, manifest: {there}/data, classes: {there}/data/classes.json}}]
runs: {{a: }}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set, and a tokenizer in the cache in the home directory."""
    monkeypatch.setattr(environment_checks, "APPTAINER_BINDS", ("~",))  # without /tmp, where these tests run
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FLIP_CACHE", raising=False)
    make_dataset(tmp_path / "data", samples=48, shards=2, size=16, classes=4)
    cache = tmp_path / "home/.cache/flip/t"
    cache.mkdir(parents=True)
    make_tokenizer(cache / "tokenizer.json")
    return tmp_path


def config(folder, *overrides):
    (folder / "demo.yaml").write_text(SWEEP.format(there=folder))
    requested = read_sweep(folder / "demo.yaml", list(overrides)).runs[0].config
    return resolve_auto(requested, Host(cores=4, memory=10**10), dataset_facts(requested))


def check(folder, *mounted, runtime="pyxis", plan=False, overrides=(), **fields):
    keywords = {"kind": "slurm", "container": "x.sqsh", "container_mounts": list(mounted), **fields}
    profile = ClusterProfile(name="mine", container_runtime=runtime, **keywords)
    return environment_checks.check_container(config(folder, *overrides), profile, folder / "runs/demo", plan)


def refused(folder, *mounted, **options):
    with pytest.raises(ConfigError) as caught:
        check(folder, *mounted, **options)
    return caught.value


def test_container_check_requires_mounts_of_all_input_paths(folder):
    cache = folder / "home/.cache/flip"
    error = refused(folder)
    assert error.code == 78 and error.where == str(folder / "data") and "data.manifest" in error.what
    assert "profile mine" in error.what and error.remedy.endswith(f"at the same path: {folder}/data, {cache}.")
    error = refused(folder, str(folder / "data"))
    assert error.where == str(cache / "t/tokenizer.json") and "data.tokenizer" in error.what
    assert error.remedy.endswith(f": {cache}.")
    shutil.copy(folder / "data/classes.json", folder / "names.json")
    override = f"evaluate.sets.small.classes={folder}/names.json"
    error = refused(folder, str(folder / "data"), str(cache), overrides=[override])
    assert "evaluate.sets.small.classes" in error.what and error.remedy.endswith(f": {folder}.")
    (row,) = check(folder, str(folder / "data"), str(cache))
    assert str(cache) in row.text and row.state == OK


def test_container_check_knows_all_paths_that_ranks_read():
    sections = Config(evaluate=Evaluate(sets=[EvaluationSet("small")]), data=Data(sets=[DataSet("more")]))
    known = {key for key, _ in environment_checks.paths_read(sections)}
    paths = {key for key, _, field, _ in walk_fields(sections) if "path" in field.metadata}
    assert paths - known == {"data.manifest", "data.cache"}, "the manifest is that of each share; each node has a cache"


@pytest.mark.parametrize(
    "mount, seen",
    [("{}", True), ("{}/", True), ("{}:{}", True), ("{}:{}/:ro", True), ("{}:/data", False), ("{}x", False)],
)
def test_container_check_accepts_only_mounts_at_same_path(folder, mount, seen):
    mount_entry = mount.replace("{}", str(folder / "data"))
    assert mounts(ClusterProfile(container_mounts=[mount_entry]), folder)[1].startswith(f"{folder}/data")
    if seen:
        check(folder, mount_entry, str(folder / "home"))
    else:
        assert refused(folder, mount_entry, str(folder / "home")).where == str(folder / "data")


def test_container_check_needs_no_mount_for_sweep_folder(folder):
    (folder / "runs/demo").mkdir(parents=True)
    shutil.move(folder / "data", folder / "runs/demo/data")
    overrides = [f"data.manifest={folder}/runs/demo/data", f"evaluate.sets.small.manifest={folder}/runs/demo/data"]
    overrides += [f"evaluate.sets.small.classes={folder}/runs/demo/data/classes.json"]
    check(folder, str(folder / "home"), overrides=overrides)


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
@pytest.mark.parametrize("name", ["a:b", "a,b"])
def test_container_check_refuses_runs_root_with_colon_or_comma(folder, runtime, name):
    (folder / name).mkdir()
    profile = ClusterProfile(name="mine", kind="slurm", container="x.sqsh", container_runtime=runtime)
    with pytest.raises(ConfigError, match="PATH:TARGET.*must contain neither.*FLIP_RUNS=FOLDER") as caught:
        environment_checks.check_container(config(folder), profile, folder / name / "demo")
    assert caught.value.value == str(folder / name / "demo")
    no_container = ClusterProfile(kind="slurm")
    assert environment_checks.check_container(config(folder), no_container, folder / name / "demo") == []


def test_container_check_needs_no_mount_for_home_with_apptainer(folder):
    assert refused(folder, runtime="apptainer").remedy.endswith(f": {folder}/data.")
    check(folder, str(folder / "data"), runtime="apptainer")


def test_container_check_requires_mounts_of_shards_and_link_targets(folder):
    index([str(path) for path in (folder / "data").glob("*.tar")], folder / "manifest", workers=1)
    mounted = [str(folder / "home"), str(folder / "manifest")]
    overrides = [f"data.manifest={folder}/manifest", "evaluate.sets=[]"]
    error = refused(folder, *mounted, overrides=overrides)
    assert error.where == str(folder / "data") and "data.manifest, by its shards," in error.what
    check(folder, *mounted, str(folder / "data"), overrides=overrides)
    (folder / "manifest/t.json").symlink_to(folder / "data/tokenizer.json")
    make_tokenizer(folder / "data/tokenizer.json")
    (folder / "link").symlink_to(folder / "data")  # a mounted link gives access to its target
    check(
        folder, str(folder / "home"), f"{folder}/link", overrides=[f"data.manifest={folder}/link", "evaluate.sets=[]"]
    )
    overrides += [f"data.tokenizer={folder}/manifest/t.json"]
    check(folder, *mounted, str(folder / "data"), overrides=overrides)
    shutil.move(folder / "data/tokenizer.json", folder / "t.json")
    (folder / "manifest/t.json").unlink()
    (folder / "manifest/t.json").symlink_to(folder / "t.json")
    assert refused(folder, *mounted, str(folder / "data"), overrides=overrides).where == str(folder / "t.json")


def test_container_check_refuses_unmounted_link_to_mounted_folder(folder):
    """A mounted target does not help: the path of the link does not exist in the container."""
    (folder / "link").symlink_to(folder / "data")
    mounted = [str(folder / "home"), str(folder / "data")]
    overrides = [f"data.manifest={folder}/link", "evaluate.sets=[]"]
    assert refused(folder, *mounted, overrides=overrides).where == str(folder / "link")


def test_remedy_replaces_many_folders_by_common_parent(folder):
    assert environment_checks._folders([f"/big/part-{i}" for i in range(9)]) == "/big"
    assert environment_checks._folders(["/a/x", "/b/y"]) == "/a/x, /b/y"


def test_container_check_is_empty_without_container_or_slurm(folder):
    assert check(folder, container="") == check(folder, kind="local") == []


def test_container_check_is_skipped_in_plan_without_data(folder):
    (row,) = check(folder, plan=True)
    assert row.state == UNKNOWN and "container_mounts" in row.text


def test_container_check_needs_no_mount_for_urls():
    assert not environment_checks._hidden("s3://bucket/manifest", [])
    assert environment_checks._hidden(str(Path("/data/m")), ["/dat"])
