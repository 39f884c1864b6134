"""The command that indexes a bucket."""

import json

import pytest

from flip.data.manifest import Manifest
from tests.s3.servers import BUCKET, files
from tools.shards import main

pytestmark = pytest.mark.s3


def test_wildcards_and_braces_in_a_bucket(original, own, proxied, tmp_path, capsys):
    proxied(own)
    files(own.address).pipe_file(f"{BUCKET}/set/deeper/00009.tar", b"not to be taken")
    for number, pattern in enumerate(["set/*.tar", "s?t/0000[0-4].tar", "set/{00000..00004}.tar"]):
        out = tmp_path / str(number)
        assert main(["index", f"s3://{BUCKET}/{pattern}", "--out", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["shards"] == 5
        assert Manifest.load(out).keys[4] == f"s3://{BUCKET}/set/00004.tar"
    whole = Manifest.load(tmp_path / "0")
    assert main(["except", str(whole.folder), "--ids", "7", "--out", str(tmp_path / "less")]) == 0
    less = Manifest.load(tmp_path / "less")
    assert (less.keys, less.etags) == (whole.keys, whole.etags) and all(less.etags)
    assert main(["index", f"s3://{BUCKET}/none/*.tar", "--out", str(tmp_path / "none")]) == 65
    assert f"s3://{BUCKET}/none/*.tar: the shard is missing" in capsys.readouterr().err
