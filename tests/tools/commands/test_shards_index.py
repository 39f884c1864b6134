"""Tests of shards index: parts, damaged shards, URLs, incomplete samples, and errors."""

import bz2
import glob
import gzip
import json
import lzma
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from flip.data.manifest.build import part_folder
from flip.data.manifest.manifest import Manifest
from flip.runs.errors import ConfigError, PermissionDenied
from tests.flip.data.manifest.test_manifest import write_tar
from tests.harness.common import ROOT, no_access
from tests.synthetic import make_dataset
from tests.tools.commands.test_shards import JOBS, run
from tests.tools.commands.test_shards_cli import call
from tools.commands.shards import main
from tools.shards_commands.index import local_matches, share
from tools.shards_commands.output import claim


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path / "data", samples=70, shards=7, size=16, chunk=4)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_index_parts_run_concurrently_and_merge_into_manifest(data, tmp_path, capsys):
    command = ["index", data / "*.tar", "--chunk", 4, "--json", "--out"]
    reference = call(capsys, *command, tmp_path / "whole")[1]
    assert (reference["shards_scanned"], reference["shards_scanned_before"]) == (7, 0)

    out = tmp_path / "m"
    processes = [
        subprocess.Popen(
            [sys.executable, JOBS, "shards", *map(str, command), out, "--part", "slurm"],
            env=os.environ | {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "3"},
            stdout=subprocess.PIPE,
        )
        for task in "02"
    ]
    reports = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and not out.exists()
    assert [(report["part"], report["shards"], report["shards_scanned"]) for report in reports] == [
        ("1/3", 2, 2),
        ("3/3", 3, 3),
    ]
    assert len(contents(part_folder(out))) == 2, "one file for each part that scans shards"
    code, again = call(capsys, *command, out, "--part", "3/3")
    assert code == 0 and (again["shards_scanned"], again["shards_scanned_before"]) == (0, 3)

    code, merged = call(capsys, *command, out)
    assert code == 0 and (merged["shards_scanned"], merged["shards_scanned_before"]) == (2, 5)
    assert merged["digest"] == reference["digest"] and contents(out) == contents(tmp_path / "whole")
    assert not part_folder(out).exists()
    code, text = call(capsys, *command, out, "--part", "1/3")
    assert code == 78 and "there is a manifest already" in text


def test_index_run_twice_concurrently_writes_single_manifest(data, tmp_path, capsys):
    """Both commands scan at the same time; the slower command still scans when the faster one has finished."""
    script = (
        "import glob, sys, time; from flip.data.manifest import build; from tools.commands.shards import main\n"
        "def slow(*rest, scan=build.scan_shard):\n"
        "    while len(glob.glob(sys.argv[1] + '.part/*.jsonl')) < 2 and not glob.glob(sys.argv[1]): time.sleep(0.01)\n"
        "    time.sleep(float(sys.argv[3]))\n"
        "    return scan(*rest)\n"
        "build.scan_shard = slow\n"
        "sys.exit(main(['index', sys.argv[2], '--chunk', '4', '--out', sys.argv[1]]))"
    )
    out = tmp_path / "m"
    pattern = data / "*.tar"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, out, pattern, pause], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for pause in ("0", "0.5")
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 78], errors
    assert "m: there is a manifest already" in errors[1]
    call(capsys, "index", pattern, "--chunk", 4, "--out", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole") and not part_folder(out).exists()


def test_index_accepts_more_parts_than_shards(data, tmp_path, capsys):
    counts = [call(capsys, "index", data / "*.tar", "--out", tmp_path / "m", "--json", "--part", f"{i}/9") for i in
              range(1, 10)]  # fmt: skip
    assert [code for code, _ in counts] == [0] * 9
    assert sum(report["shards_scanned"] for _, report in counts) == 7
    assert call(capsys, "index", data / "*.tar", "--out", tmp_path / "m", "--json")[1]["shards_scanned"] == 0


def test_share_parses_fraction_and_slurm_variables():
    def slurm(task, first, count):
        names = ("ID", "MIN", "COUNT")
        return {f"SLURM_ARRAY_TASK_{name}": str(x) for name, x in zip(names, (task, first, count), strict=True)}

    assert share("1/1", {}) == (1, 1) and share("64/64", slurm(1, 1, 9)) == (64, 64)
    assert share("slurm", slurm(0, 0, 64)) == (1, 64) and share("slurm", slurm(8, 5, 4)) == (4, 4)
    for text in ("0/3", "4/3", "1", "1/0", "-1/3", "one/3"):
        with pytest.raises(ConfigError, match="not a share"):
            share(text, {})
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID.*sbatch --array"):
        share("slurm", {})
    with pytest.raises(ConfigError, match="without gaps"):
        share("slurm", slurm(7, 0, 3))


def test_index_reports_or_skips_damaged_shards(data, tmp_path, capsys):
    for number in range(5):
        (data / f"{number:05d}.tar").write_bytes(b"<html>")
    command = ["index", data / "{00000..00006}.tar", "--chunk", 4, "--out", tmp_path / "m"]
    code, text = call(capsys, *command)
    assert code == 65 and "5 of 7 shards cannot be indexed: " in text and "; and 2 more. " in text
    assert "--skip-damaged" in text and f"{tmp_path}/m.part" in text and text.count("\n") == 1
    assert main([*map(str, command), "--json"]) == 65
    assert json.loads(capsys.readouterr().err)["error"]["message"] == text.strip()
    code, report = call(capsys, *command, "--json")
    assert code == 65 and len(report["damaged"]) == 5 and not (tmp_path / "m").exists()
    assert report["damaged"][4]["shard"] == f"{data}/00004.tar" and "not a whole tar" in report["damaged"][4]["reason"]
    code, text = call(capsys, *command, "--skip-damaged")
    assert code == 0 and text.count("not a whole tar: header cut off at byte 0\n") == 5 and "\nleft out\n" in text
    manifest = Manifest.load(tmp_path / "m")
    assert manifest.samples == 20
    assert [entry["shard"] for entry in manifest.settings["left_out"]] == [f"{data}/0000{i}.tar" for i in range(5)]
    code, text = call(capsys, *command, "--part", "1/7")
    assert code == 78
    code, text = call(capsys, *command[:-1], tmp_path / "n", "--part", "1/7")
    assert code == 65 and "00000.tar: not a whole tar" in text


def test_index_counts_shards_without_stats_json(data, tmp_path, capsys):
    def missing_stats(out):
        code, report = call(capsys, "index", data / "*.tar", "--out", tmp_path / out, "--json")
        if code == 0:
            return report.get("shards_without_stats_json")
        return code

    assert missing_stats("none") is None
    for number in range(7):
        assert number == 0 or missing_stats(f"{number}") == 7 - number
        (data / f"{number:05d}_stats.json").write_text("{}")
    assert missing_stats("all") is None


def test_index_add_appends_shards_to_manifest(data, tmp_path, capsys):
    old = tmp_path / "old"
    new = tmp_path / "new"
    call(capsys, "index", data / "0000[3-6].tar", "--out", old, "--chunk", 3)
    command = ["index", data / "0000[0-2].tar", "--add", old, "--out", new, "--json"]
    assert call(capsys, *command, "--part", "2/3")[1]["shards_scanned"] == 1
    code, report = call(capsys, *command)
    assert code == 0 and (report["shards"], report["samples"], report["chunk"]) == (7, 70, 3)
    assert (report["shards_scanned"], report["shards_scanned_before"]) == (2, 1)
    assert call(capsys, "verify", new)[0] == 0
    keys = [Manifest.load(folder).keys for folder in (old, new)]
    assert keys[1][: len(keys[0])] == keys[0] and len(keys[1]) == len(keys[0]) + 3, "ids of old samples stay"
    code, text = call(capsys, "index", data / "0000[1-3].tar", "--add", old, "--out", tmp_path / "x")
    assert code == 78 and f"{data}/00003.tar" in text and "in the old manifest already" in text
    with pytest.raises(SystemExit):
        call(capsys, *command, "--chunk", 4)
    code, text = call(capsys, *command[:-2], tmp_path / "y", "--caption-length", "1:")
    assert code == 78 and "filters do not go with --add" in text and not part_folder(tmp_path / "y").exists()


REASONS = (
    "shards are files or objects, and this is neither", "several shards in one name", "contains credentials",
    "a web server has no listing", "gs:// needs the package gcsfs",
)  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [*zip((
        "https://me:secret@h/{00000..00003}.tar", "https://h/*.tar", "gs://bucket/00000.tar",
        "pipe:aws s3 cp s3://b/00000.tar -", "S3://bucket/00000.tar", "s3:/bucket/00000.tar", "file://host/00000.tar",
        "00000.tar::00001.tar", "s3://b/00000.tar::s3://b/00001.tar",
    )), ("gs://b/0.tar", "--part", "2/2"), ("gs://b/0.tar", "--skip-damaged"), ("gs://b/0.tar", "--add", "data")],
)  # fmt: skip
def test_index_rejects_unsupported_urls(data, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, text = call(capsys, "index", "more/*.tar", *arguments, "--out", "m")
    assert code == 78
    assert any(reason in text for reason in REASONS)
    assert text.count("\n") == 1 and "secret" not in text and os.listdir(tmp_path) == ["data"]


def test_index_accepts_file_urls(data, tmp_path, capsys, monkeypatch):
    odd = data.rename(tmp_path / "a::b 100%\udce9")
    digest = call(capsys, "index", odd / "*.tar", "--out", tmp_path / "m", "--json")[1]["digest"]
    url = f"{tmp_path}/a::b%20100%25%E9/"
    for number, pattern in enumerate(
        (f"file://{url}{{00000..00006}}.tar", f"file://localhost{url}*.tar", f"file:{url}*.tar")
    ):
        code, report = call(capsys, "index", pattern, "--out", tmp_path / str(number), "--json")
        assert code == 0 and report["digest"] == digest
        assert Manifest.load(tmp_path / str(number)).keys == Manifest.load(tmp_path / "m").keys
    monkeypatch.chdir(tmp_path)
    odd.rename(tmp_path / "run:")
    assert call(capsys, "index", "run:/*.tar", "--out", "n", "--json")[1]["digest"] == digest


def test_index_names_format_of_non_tar_file(data, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tar = (data / "00000.tar").read_bytes()
    cases = {
        "bz2": (bz2.compress(tar), "compressed with bzip2, no tar header at byte 0. Unpack it (bunzip2)"),
        "xz": (lzma.compress(tar), "compressed with xz, no tar header at byte 0. Unpack it (unxz)"),
        "zst": (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd, no tar header at byte 0. Unpack it (unzstd)"),
        "zip": (b"PK\3\4" + bytes(600), "a zip archive, no tar header at byte 0"),
    }
    for name, (content, expected) in cases.items():
        (data / f"x.{name}").write_bytes(content)
        code, text = call(capsys, "index", data / f"x.{name}", "--out", tmp_path / "m")
        assert code == 65 and expected in text and text.count("\n") == 1
    pq.write_table(pa.table({"key": ["0"] * 500}), data / "00000.parquet")
    code, text = call(capsys, "index", data / "00000.*", "--out", tmp_path / "m")
    assert code == 65 and "00000.parquet: not a whole tar: a Parquet file, no tar header at byte 0" in text
    assert "--image" in text
    assert not (tmp_path / "m").exists()


@pytest.mark.timeout(60)
def test_index_rejects_fifo_socket_and_device_without_waiting(data, tmp_path, capsys):
    """Opening a FIFO would block until a writer opens it."""
    os.mkfifo(data / "fifo.tar")
    code, text = call(capsys, "index", data / "*.tar", "--out", tmp_path / "m")
    assert code == 65 and "fifo.tar: a FIFO is no shard" in text and text.count("\n") == 1
    with socket.socket(socket.AF_UNIX) as unix_socket:
        unix_socket.bind(os.path.relpath(data / "socket.tar"))
        for name in (data / "socket.tar", "/dev/null"):
            code, text = call(capsys, "index", name, "--out", tmp_path / "m")
            assert code == 65 and f"{name}: a device or a socket is no shard" in text
    code, report = call(capsys, "index", data / "*.tar", "--out", tmp_path / "m", "--json", "--skip-damaged")
    assert code == 0 and report["samples"] == 70 and len(report["left_out"]) == 2


def test_index_counts_complete_and_incomplete_samples(data, tmp_path, capsys):
    """30 samples have a caption without an image. Meta files and names without extension are skipped."""
    command = ["index", data / "*.tar", tmp_path / "half.tar", "--out", tmp_path / "m"]
    members = [("README", b""), *((f"{i}.txt", b"text") for i in range(30)), ("__info__/a.jpg", b"")]
    write_tar(tmp_path / "half.tar", members)
    code, report = call(capsys, *command, "--json")
    assert code == 0 and (report["complete"], report["incomplete"], report["samples"]) == (70, 30, 100)
    assert report["incomplete_by_reason"] == {"caption without an image": 30}
    assert report["skipped_members"] == {"names without key and extension": 1, "meta files of webdataset": 1}
    shutil.rmtree(tmp_path / "m")
    code, text = call(capsys, *command)
    assert code == 0 and re.search(r"^complete +70\nincomplete +30\n", text, re.MULTILINE)
    assert "\nincomplete by reason\n  caption without an image  30\nskipped members\n  names " in text


def test_index_rejects_data_set_of_incomplete_samples(data, tmp_path, capsys):
    command = ["index", data / "*.tar", "--out", tmp_path / "m", "--captions", "alt"]
    code, text = call(capsys, *command)
    assert code == 65 and f"{tmp_path}/m: 0 of 70 samples have an image and a caption (alt)" in text
    assert "Members that are there: txt, json. Name" in text and text.count("\n") == 1
    assert main([*map(str, command), "--json"]) == 65
    assert json.loads(capsys.readouterr().err)["error"]["message"] == text.strip()
    code, report = call(capsys, *command, "--json")
    assert code == 65 and (report["complete"], report["incomplete"]) == (0, 70) and "0 of 70" in report["error"]
    assert not (tmp_path / "m").exists() and part_folder(tmp_path / "m").exists()
    for more in (["--captions", "alt,txt"], ["--min-complete", 0]):
        assert call(capsys, *command)[0] == 65
        code, report = call(capsys, *command, *more, "--json")
        assert code == 0 and report["shards_scanned_before"] == 7, "other options need no new scan"
        shutil.rmtree(tmp_path / "m")
    for wrong, message in (("1.5", "at most 1"), ("-1", "at least 0"), ("nan", "a finite number")):
        code, text = call(capsys, *command, f"--min-complete={wrong}")
        assert code == 78 and f"--min-complete: must be {message}" in text
    write_tar(tmp_path / "labels.tar", [("a.jpg", b"x"), ("a.cls", b"1")])
    # An evaluation set needs no captions.
    assert call(capsys, "index", tmp_path / "labels.tar", "--out", tmp_path / "m")[0] == 0


def test_index_rejects_gzip_compressed_tar(data, tmp_path, capsys):
    for number in range(2):
        (data / f"{number}.tar.gz").write_bytes(gzip.compress((data / f"{number:05d}.tar").read_bytes()))
    code, text = call(capsys, "index", data / "0.tar.gz", "--out", tmp_path / "m")
    assert code == 65 and "0.tar.gz: not a whole tar: compressed with gzip, no tar header at byte 0. Unpack it" in text
    code, text = call(capsys, "index", data / "*.tar.gz", "--out", tmp_path / "m")
    assert code == 65 and text.count("compressed with gzip") == 2 and "gunzip" in text and "Fetch" not in text
    (data / "1.tar.gz").write_bytes(b"\x1f\x8bshort")
    code, text = call(capsys, "index", data / "1.tar.gz", "--out", tmp_path / "m")
    assert code == 65 and "compressed with gzip" in text


def test_index_reports_folder_below_wildcard_that_cannot_be_read(data, tmp_path, capsys):
    for name in ("part-0", "part-2"):
        data.joinpath(name).mkdir()
        shutil.copy(data / "00000.tar", data / name / "0.tar")
    (data / "part-0" / ".hidden.tar").write_bytes(b"")
    (data / "part-3").write_text("no folder")
    (data / "lost+found").symlink_to("lost+found")  # at the root of a file system only root may read it
    assert local_matches(f"{data}/*/*.tar") == [str(data / name / "0.tar") for name in ("part-0", "part-2")]
    expected = [str(data / name / "0.tar") for name in ("part-0", "part-2")]
    for pattern in ("part-*/*.tar", "part-*/0.tar", "part-[02]/?.tar"):
        assert local_matches(f"{data}/{pattern}") == sorted(glob.glob(f"{data}/{pattern}")) == expected
    (data / "part-1").symlink_to("part-1")
    for pattern in ("part-*/*.tar", "part-*/0.tar"):
        code, text = call(capsys, "index", data / pattern, "--out", tmp_path / "m")
        assert code == 69 and f"{data}/part-1: the folder cannot be read: Too many levels" in text
    assert not (tmp_path / "m").exists()


def test_index_reports_folder_that_may_not_be_read(data):
    with no_access(data):
        for pattern in ("*.tar", "0000[0]/x.tar"):
            with pytest.raises(PermissionDenied, match="the folder may not be read"):
                local_matches(str(data / pattern))
        with pytest.raises(PermissionDenied, match="may not be written"):
            claim(data / "below" / "m")


@pytest.mark.parametrize("more", [[], ["--part", "1/2"]])
def test_index_reports_output_whose_folder_cannot_be_looked_up(data, tmp_path, capsys, more):
    code, text = call(capsys, "index", data / "*.tar", "--out", tmp_path / ("x" * 300), *more)
    assert code == 69 and "cannot be written: File name too long" in text and text.count("\n") == 1


@pytest.mark.long
def test_index_rejects_invalid_arguments(data, tmp_path):
    result = run("index", data / "{0..3.tar", "--out", tmp_path / "m")
    assert result.returncode == 78 and "unbalanced braces" in result.stderr and result.stderr.count("\n") == 1
    for arguments, expected in (
        (("--workers", "-1"), "--workers"),
        (("--part", "9"), "--part"),
        (("--out", data), "there is a manifest already"),
        (("--out", data / "00000.tar"), "a file is where a folder must be"),
    ):
        result = run("index", data / "*.tar", "--out", tmp_path / "m", *arguments)
        assert result.returncode == 78 and expected in result.stderr and result.stderr.count("\n") == 1
