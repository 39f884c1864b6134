"""Tests that submit refuses runs that read buckets if their jobs would lack environment variables for access."""

import os
import re

import pytest

from flip.config.host import Host
from flip.config.merge import merge
from flip.config.resolve import DatasetFacts
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile
from jobs.planning import environment_checks, preflight
from tests.synthetic import make_dataset

NAMES = re.compile("AWS_|FSSPEC_|GOOGLE_|.*_PROXY$", re.IGNORECASE)


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The data set ``files``, and ``away`` with shards in a bucket; bucket and proxy variables are unset."""
    for name in filter(NAMES.match, list(os.environ)):
        monkeypatch.delenv(name)
    make_dataset(tmp_path / "files", samples=16, shards=2, size=16)
    make_dataset(tmp_path / "away", samples=16, shards=2, size=16)
    (tmp_path / "away" / "keys.txt").write_text("s3://b/0.tar\ns3://b/1.tar\n")
    return tmp_path


def config(there, *settings, data="files"):
    return merge([], [f"data.manifest={there}/{data}", "stages=[{name: pretrain, samples: 16, batch: 8}]", *settings])


def profile(kind="slurm", **fields):
    return ClusterProfile(name="mine", kind=kind, **fields)


def check(made, *profile, **more):
    return environment_checks.check_variables(environment_checks.required_places(made), *profile, **more)


def refused(made, **fields):
    with pytest.raises(ConfigError) as caught:
        check(made, profile(**fields))
    return caught.value


def test_preflight_names_unforwarded_variables_before_reading_bucket(there, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "FSSPEC_S3_ANON", "https_proxy", "no_proxy", "SECRET"):
        monkeypatch.setenv(name, "hush")
    made = config(there, data="away")
    with pytest.raises(ConfigError) as caught:
        preflight.check(made, [DatasetFacts(16, 8, 1.0, "", False)], profile(), Host(4, 10**10), there / "runs", False)
    assert caught.value.value == "AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, FSSPEC_S3_ANON, https_proxy, no_proxy"
    assert "profile mine" in str(caught.value) and "hush" not in str(caught.value)
    error = refused(made, env=["TOKEN", "AWS_ENDPOINT_URL", "no_proxy"], setup=["export https_proxy=http://there:3128"])
    assert error.code == 78 and error.value == "AWS_ACCESS_KEY_ID, FSSPEC_S3_ANON"
    names = re.search(r"env: \[(.*?)\]", error.remedy)[1].split(", ")
    ((name, said, skipped),) = check(made, profile(env=[*names, "https_proxy"]))
    assert name == "environment" and "are forwarded to jobs: AWS_ACCESS_KEY_ID, " in said and not skipped
    ((name, said, skipped),) = check(made, profile(), plan=True)
    assert name == "environment" and "AWS_ENDPOINT_URL" in said and skipped


def test_variables_check_applies_only_to_slurm_runs_with_bucket_urls(there, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "x")
    assert check(config(there), profile()) == []
    assert check(config(there, "checkpoint.url=file:///shared/c"), profile()) == []
    assert check(config(there, data="away"), profile("local")) == []
    assert refused(config(there, "checkpoint.url=s3://b/c")).value == "AWS_PROFILE"
    scored = f"evaluate.sets=[{{name: own, task: probe, manifest: {there}/files, train: {there}/away}}]"
    assert refused(config(there, scored)).value == "AWS_PROFILE"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/x.json")
    assert refused(config(there, "checkpoint.url=gs://b/c")).value == "GOOGLE_APPLICATION_CREDENTIALS"
    assert refused(config(there, "checkpoint.url=gs://b/c", data="away")).remedy.count("AWS_PROFILE") == 1


def test_variables_check_ignores_empty_and_irrelevant_variables(there, monkeypatch):
    for name in ("AWS_PAGER", "AWS_DEFAULT_OUTPUT", "AWS_EXECUTION_ENV", "AWS_EC2_METADATA_DISABLED", "no_proxy"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_PROFILE", "")
    ((_, said, skipped),) = check(config(there, data="away"), profile())
    assert "are not set here" in said and not skipped
