"""Tests that submit refuses runs whose container does not mount all input paths, and names the missing mounts."""

import shutil
from pathlib import Path

import pytest

from flip.config.host import Host
from flip.config.resolve import dataset_facts, resolve
from flip.data.manifest.build import index
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile
from jobs.planning import environment_checks
from jobs.slurm.batch_script import mounts
from jobs.sweeps.sweep_file import load
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
def there(tmp_path, monkeypatch):
    """A data set, and a tokenizer in the cache in the home directory."""
    monkeypatch.setattr(environment_checks, "APPTAINER_BINDS", ("~",))  # without /tmp, where these tests run
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FLIP_CACHE", raising=False)
    make_dataset(tmp_path / "data", samples=48, shards=2, size=16, classes=4)
    cache = tmp_path / "home/.cache/flip/t"
    cache.mkdir(parents=True)
    make_tokenizer(cache / "tokenizer.json")
    return tmp_path


def config(there, *overrides):
    (there / "demo.yaml").write_text(SWEEP.format(there=there))
    asked = load(there / "demo.yaml", list(overrides)).runs[0].config
    return resolve(asked, Host(cores=4, memory=10**10), dataset_facts(asked))


def check(there, *seen, runtime="pyxis", plan=False, overrides=(), **fields):
    keywords = {"kind": "slurm", "container": "x.sqsh", "container_mounts": list(seen), **fields}
    profile = ClusterProfile(name="mine", container_runtime=runtime, **keywords)
    return environment_checks.check_container(config(there, *overrides), profile, there / "runs/demo", plan)


def refused(there, *seen, **more):
    with pytest.raises(ConfigError) as caught:
        check(there, *seen, **more)
    return caught.value


def test_container_check_requires_mounts_of_all_input_paths(there):
    cache = there / "home/.cache/flip"
    error = refused(there)
    assert error.code == 78 and error.where == str(there / "data") and "data.manifest" in error.what
    assert "profile mine" in error.what and error.remedy.endswith(f"at the same path: {there}/data, {cache}.")
    error = refused(there, str(there / "data"))
    assert error.where == str(cache / "t/tokenizer.json") and "data.tokenizer" in error.what
    assert error.remedy.endswith(f": {cache}.")
    shutil.copy(there / "data/classes.json", there / "names.json")
    here = f"evaluate.sets.small.classes={there}/names.json"
    error = refused(there, str(there / "data"), str(cache), overrides=[here])
    assert "evaluate.sets.small.classes" in error.what and error.remedy.endswith(f": {there}.")
    ((name, said, skipped),) = check(there, str(there / "data"), str(cache))
    assert name == "container" and str(cache) in said and not skipped


@pytest.mark.parametrize(
    "mount, seen",
    [("{}", True), ("{}/", True), ("{}:{}", True), ("{}:{}/:ro", True), ("{}:/data", False), ("{}x", False)],
)
def test_container_check_accepts_only_mounts_at_same_path(there, mount, seen):
    given = mount.replace("{}", str(there / "data"))
    assert mounts(ClusterProfile(container_mounts=[given]), there)[1].startswith(f"{there}/data")
    if seen:
        check(there, given, str(there / "home"))
    else:
        assert refused(there, given, str(there / "home")).where == str(there / "data")


def test_container_check_needs_no_mount_for_sweep_folder(there):
    (there / "runs/demo").mkdir(parents=True)
    shutil.move(there / "data", there / "runs/demo/data")
    moved = [f"data.manifest={there}/runs/demo/data", f"evaluate.sets.small.manifest={there}/runs/demo/data"]
    moved += [f"evaluate.sets.small.classes={there}/runs/demo/data/classes.json"]
    check(there, str(there / "home"), overrides=moved)


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
@pytest.mark.parametrize("name", ["a:b", "a,b"])
def test_container_check_refuses_runs_root_with_colon_or_comma(there, runtime, name):
    (there / name).mkdir()
    profile = ClusterProfile(name="mine", kind="slurm", container="x.sqsh", container_runtime=runtime)
    with pytest.raises(ConfigError, match="PATH:TARGET.*must contain neither.*FLIP_RUNS=FOLDER") as caught:
        environment_checks.check_container(config(there), profile, there / name / "demo")
    assert caught.value.value == str(there / name / "demo")
    assert environment_checks.check_container(config(there), ClusterProfile(kind="slurm"), there / name / "demo") == []


def test_container_check_needs_no_mount_for_home_with_apptainer(there):
    assert refused(there, runtime="apptainer").remedy.endswith(f": {there}/data.")
    check(there, str(there / "data"), runtime="apptainer")


def test_container_check_requires_mounts_of_shards_and_link_targets(there):
    index([str(path) for path in (there / "data").glob("*.tar")], there / "manifest", workers=1)
    seen = [str(there / "home"), str(there / "manifest")]
    other = [f"data.manifest={there}/manifest", "evaluate.sets=[]"]
    error = refused(there, *seen, overrides=other)
    assert error.where == str(there / "data") and "data.manifest, by its shards," in error.what
    check(there, *seen, str(there / "data"), overrides=other)
    (there / "manifest/t.json").symlink_to(there / "data/tokenizer.json")
    make_tokenizer(there / "data/tokenizer.json")
    (there / "link").symlink_to(there / "data")  # a mounted link gives access to its target
    check(there, str(there / "home"), f"{there}/link", overrides=[f"data.manifest={there}/link", "evaluate.sets=[]"])
    other += [f"data.tokenizer={there}/manifest/t.json"]
    check(there, *seen, str(there / "data"), overrides=other)
    shutil.move(there / "data/tokenizer.json", there / "t.json")
    (there / "manifest/t.json").unlink()
    (there / "manifest/t.json").symlink_to(there / "t.json")
    assert refused(there, *seen, str(there / "data"), overrides=other).where == str(there / "t.json")


def test_container_check_refuses_unmounted_link_to_mounted_folder(there):
    """A mounted target does not help: the path of the link does not exist in the container."""
    (there / "link").symlink_to(there / "data")
    seen, other = [str(there / "home"), str(there / "data")], [f"data.manifest={there}/link", "evaluate.sets=[]"]
    assert refused(there, *seen, overrides=other).where == str(there / "link")


def test_remedy_replaces_many_folders_by_common_parent(there):
    assert environment_checks._folders([f"/big/part-{i}" for i in range(9)]) == "/big"
    assert environment_checks._folders(["/a/x", "/b/y"]) == "/a/x, /b/y"


def test_container_check_is_empty_without_container_or_slurm(there):
    assert check(there, container="") == check(there, kind="local") == []


def test_container_check_is_skipped_in_plan_without_data(there):
    ((name, said, skipped),) = check(there, plan=True)
    assert (name, skipped) == ("container", True) and "container_mounts" in said


def test_container_check_needs_no_mount_for_urls():
    assert not environment_checks._hidden("s3://bucket/manifest", []) and environment_checks._hidden(
        str(Path("/data/m")), ["/dat"]
    )
