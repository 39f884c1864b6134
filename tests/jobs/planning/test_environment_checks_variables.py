"""Tests that submit refuses runs that read buckets if their jobs would lack environment variables for access."""

import os
import re

import pytest

from flip.common.host import Host
from flip.config.merge import merge
from flip.config.resolve import DatasetFacts
from flip.runs.checks import OK, UNKNOWN, run_rules
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir
from jobs.common.cluster_profile import ClusterProfile
from jobs.planning import environment_checks, preflight
from tests.synthetic import make_dataset

NAMES = re.compile("AWS_|FSSPEC_|GOOGLE_|.*_PROXY$", re.IGNORECASE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The data set ``files``, and ``away`` with shards in a bucket; bucket and proxy variables are unset."""
    for name in filter(NAMES.match, list(os.environ)):
        monkeypatch.delenv(name)
    make_dataset(tmp_path / "files", samples=16, shards=2, size=16)
    make_dataset(tmp_path / "away", samples=16, shards=2, size=16)
    (tmp_path / "away" / "keys.txt").write_text("s3://b/0.tar\ns3://b/1.tar\n")
    return tmp_path


def config(folder, *settings, data="files"):
    return merge([], [f"data.manifest={folder}/{data}", "stages=[{name: pretrain, samples: 16, batch: 8}]", *settings])


def profile(kind="slurm", **fields):
    return ClusterProfile(name="mine", kind=kind, **fields)


def check(values, *profile, **options):
    return environment_checks.check_variables(environment_checks.required_places(values), *profile, **options)


def refused(values, **fields):
    with pytest.raises(ConfigError) as caught:
        check(values, profile(**fields))
    return caught.value


def test_preflight_names_unforwarded_variables_before_reading_bucket(folder, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "FSSPEC_S3_ANON", "https_proxy", "no_proxy", "SECRET"):
        monkeypatch.setenv(name, "hush")
    remote = config(folder, data="away")
    facts = [DatasetFacts(16, 8, 1.0, False)]
    with pytest.raises(ConfigError) as caught:
        start = preflight.Start(
            remote, facts, profile(), Host(4, 10**10), folder / "runs", RunDir(folder / "runs" / "new")
        )
        list(run_rules(preflight.TRAINING, start))
    assert caught.value.value == "AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, FSSPEC_S3_ANON, https_proxy, no_proxy"
    assert "profile mine" in str(caught.value) and "hush" not in str(caught.value)
    error = refused(
        remote, env=["TOKEN", "AWS_ENDPOINT_URL", "no_proxy"], setup=["export https_proxy=http://there:3128"]
    )
    assert error.code == 78 and error.value == "AWS_ACCESS_KEY_ID, FSSPEC_S3_ANON"
    names = re.search(r"env: \[(.*?)\]", error.remedy)[1].split(", ")
    (row,) = check(remote, profile(env=[*names, "https_proxy"]))
    assert "are forwarded to jobs: AWS_ACCESS_KEY_ID, " in row.text and row.state == OK
    (row,) = check(remote, profile(), plan=True)
    assert "AWS_ENDPOINT_URL" in row.text and row.state == UNKNOWN


def test_variables_check_applies_only_to_slurm_runs_with_bucket_urls(folder, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "x")
    assert check(config(folder), profile()) == []
    assert check(config(folder, "checkpoint.url=file:///shared/c"), profile()) == []
    assert check(config(folder, data="away"), profile("local")) == []
    assert refused(config(folder, "checkpoint.url=s3://b/c")).value == "AWS_PROFILE"
    probe_set = f"evaluate.sets=[{{name: own, task: probe, manifest: {folder}/files, train: {folder}/away}}]"
    assert refused(config(folder, probe_set)).value == "AWS_PROFILE"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/x.json")
    assert refused(config(folder, "checkpoint.url=gs://b/c")).value == "GOOGLE_APPLICATION_CREDENTIALS"
    assert refused(config(folder, "checkpoint.url=gs://b/c", data="away")).remedy.count("AWS_PROFILE") == 1


def test_variables_check_ignores_empty_and_irrelevant_variables(folder, monkeypatch):
    for name in ("AWS_PAGER", "AWS_DEFAULT_OUTPUT", "AWS_EXECUTION_ENV", "AWS_EC2_METADATA_DISABLED", "no_proxy"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_PROFILE", "")
    (row,) = check(config(folder, data="away"), profile())
    assert "are not set here" in row.text and row.state == OK
