"""Tests of shards verify: findings with one and several processes, and the upper bound from a part of the chunks."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest, write
from flip.runs.errors import ConfigError, DataError, FlipError, StorageError
from tests.flip.data.loading import CHUNK, SAMPLES
from tests.flip.data.manifest.test_manifest import write_tar
from tests.synthetic import draw_image, encode, make_dataset
from tests.tools.commands.test_shards_cli import call
from tools.shards_commands import verify
from tools.shards_commands.verify import Report, VerificationPlan, check, draw, kind, resized, upper_bound

ROOT = Path(__file__).resolve().parents[3]


def checked(manifest, workers=0, chunks=None, **fields):
    report = Report()
    for part in check(
        manifest, VerificationPlan(range(manifest.chunks) if chunks is None else chunks, **fields), workers
    ):
        report.add(part)
    return report


def rot(manifest, j, at=5):
    key, start, *_ = manifest.chunk_reads(j)[0]
    with open(key, "r+b") as file:
        file.seek(start + at)
        file.write(b"rot")


def test_check_accepts_intact_shards_and_reports_missing_captions(original):
    manifest = Manifest.load(original)
    report = checked(manifest)
    assert (report.chunks, report.samples, report.bad, report.bad_chunks) == (manifest.chunks, SAMPLES, {}, 0)
    assert report.bytes == manifest.shards[:, 2].sum()
    assert report.bytes == verify.planned_bytes(manifest, VerificationPlan(range(manifest.chunks)))
    assert checked(manifest, captions=["txt", "alt"]).bad == {}
    assert len(checked(manifest, captions=["alt"]).bad) == SAMPLES
    assert checked(manifest, captions=["alt"], decode=False).bad == {}


def test_check_reports_equal_findings_with_worker_processes(folder):
    manifest = Manifest.load(folder)
    rot(manifest, 7)
    os.unlink(manifest.keys[3])
    serial = checked(manifest)
    parallel = checked(manifest, workers=2)
    assert serial == parallel and {14, 15} < set(serial.bad)
    assert set(serial.bad) - {14, 15} == set(range(120, 162))
    assert serial.reasons() == {
        "the shard is missing (N.tar)": 42,  # samples 121 to 161, and sample 120 in the chunk of sample 121
        "chunk N (samples N to N) is damaged: CRC32 N, indexed was N": 2,
    }
    examples = [bad for bad in serial.examples(manifest, 1) if "CRC32" in bad["reason"]]
    assert [(bad["id"], bad["ordinal"], os.path.basename(bad["shard"])) for bad in examples] == [(14, 14, "00000.tar")]
    assert str(folder) not in " ".join(serial.bad.values())  # otherwise the digest would depend on the folder


def test_check_skips_excepted_samples(folder):
    manifest = Manifest.load(folder)
    rot(manifest, 7)
    known = write(folder / "known", manifest, manifest.checksums, dict.fromkeys(manifest.chunk_ids(7), "rot"))
    report = checked(known)
    assert not report.bad and report.samples == SAMPLES - CHUNK and report.chunks == manifest.chunks


def test_resized_reports_shard_of_changed_length(folder):
    manifest = Manifest.load(folder)
    plan = VerificationPlan(range(manifest.chunks))
    assert resized(manifest, plan) == []
    with open(manifest.keys[2], "ab") as file:
        file.write(b"more")
    (line,) = resized(manifest, plan)
    assert line.startswith(f"{manifest.keys[2]}: ") and resized(manifest, VerificationPlan([0, 1])) == []
    chunk = int(manifest.first[2]) // CHUNK + 3
    assert resized(manifest, VerificationPlan([chunk])) == [line] and checked(manifest).bad == {}


def test_check_raises_storage_error_instead_of_finding(folder, monkeypatch):
    manifest = Manifest.load(folder)
    monkeypatch.setattr(
        verify.ChunkReader, "read_chunk", lambda *_: (_ for _ in ()).throw(StorageError("away", "there"))
    )
    with pytest.raises(StorageError, match="there: away"):
        checked(manifest)


def test_check_raises_error_of_worker_process(folder):
    manifest = Manifest.load(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="the manifest is damaged") as error:
        checked(manifest, workers=2)
    assert error.value.code == 65


def test_check_raises_error_if_worker_process_is_killed(original, monkeypatch):
    monkeypatch.setattr(verify, "_TASK", CHUNK)
    manifest = Manifest.load(original)
    parts = check(manifest, VerificationPlan(range(manifest.chunks)), 2)
    next(parts)
    processes = [child for child in multiprocessing.active_children() if child.name.startswith("verify-")]
    assert len(processes) == 2
    os.kill(processes[1].pid, signal.SIGKILL)
    with pytest.raises(FlipError, match="ended by itself") as error:
        list(parts)
    assert error.value.code == 70 and not any(process.is_alive() for process in processes)


def test_draw_returns_sorted_unique_chunks_by_seed():
    manifest = type("Fake", (), {"chunks": 1000})()
    assert draw(manifest, 1000, 3) == list(range(1000))
    chunks = draw(manifest, 100, 3)
    assert chunks == sorted(set(chunks)) == draw(manifest, 100, 3) != draw(manifest, 100, 4) and len(chunks) == 100
    for count in (0, 1001):
        with pytest.raises(ConfigError, match="1000 chunks"):
            draw(manifest, count, 0)


@pytest.mark.parametrize(
    "bad, n, bound",
    [(0, 1, 0.95), (0, 10, 0.2589), (0, 300, 0.009936), (1, 10, 0.3942), (3, 100, 0.0757), (5, 5, 1.0)],
)
def test_upper_bound_equals_clopper_pearson_bound(bad, n, bound):
    assert upper_bound(bad, n) == pytest.approx(bound, rel=2e-3)


def test_upper_bound_is_accurate_for_many_chunks():
    assert upper_bound(0, 75_000) == pytest.approx(3 / 75_000, rel=0.01)
    assert upper_bound(7500, 75_000) == pytest.approx(0.1018, rel=2e-3)


def test_report_sums_parts_and_groups_reasons_by_kind():
    assert kind("chunk 7: CRC32 0xab12, 5 of 0007.tar") == "chunk N: CRC32 N, N of N.tar"
    report = Report()
    report.add(Report(2, 1, 4, 100, {3: "short by 3"}))
    report.add(Report(1, 1, 2, 50, {9: "short by 4", 8: "gone"}))
    assert (report.chunks, report.bad_chunks, report.samples, report.bytes) == (3, 2, 6, 150)
    assert list(report.reasons().items()) == [("short by N", 2), ("gone", 1)]


@pytest.mark.long
def test_verify_ends_all_processes_on_ctrl_c(tmp_path):
    make_dataset(tmp_path / "data", samples=1200, shards=2, size=256, chunk=2)
    child = subprocess.Popen(
        [sys.executable, ROOT / "jobs", "shards", "verify", tmp_path / "data", "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Restore SIGINT as in a terminal: tests in the background ignore it, and the command would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    family = []
    end = time.monotonic() + 60
    while len(family) < 4 and time.monotonic() < end:
        family = psutil.Process(child.pid).children(recursive=True)
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, "Traceback" in err) == (130, False) and "interrupted" in out + err, err
    assert not psutil.wait_procs(family, timeout=20)[1]


def test_verify_and_inspect_count_captions_that_are_not_utf8(tmp_path, capsys):
    """Training reads them with replacement characters, so they are no findings."""
    samples = [b"one", "zw\xf6lf".encode("latin-1"), "zw\xf6lf".encode(), b"\xff\xfet\0"]
    (tmp_path / "data").mkdir()
    files = []
    for i, text in enumerate(samples):
        data = b'{"caption": "' + text.replace(b"\0", b"") + b'", "other": "\xff"}'
        files += [(f"{i}.png", encode(draw_image(i, 16))), (f"{i}.txt", text), (f"{i}.json", data)]
    write_tar(tmp_path / "data" / "0.tar", files)
    manifest = index([str(tmp_path / "data" / "0.tar")], tmp_path / "data", 2)
    for captions in ("txt", "txt:whole", "json:caption"):
        command = ["verify", manifest.folder, "--captions", captions, "--workers", 1]
        code, report = call(capsys, *command, "--json")
        assert code == 0 and report["bad"] == 0 and report["warnings"] == {"caption is not UTF-8": 2}, captions
        assert [example["id"] for example in report["warning_examples"]] == [1, 3]
        code, text = call(capsys, *command)
        assert code == 0 and "warning: 2 x caption is not UTF-8" in text and "id 3: " in text
    assert call(capsys, "verify", manifest.folder, "--no-decode", "--json")[1]["warnings"] == {}
    shown = [call(capsys, "inspect", manifest.folder, "--id", i, "--json")[1]["warning"] for i in range(4)]
    assert shown == [None, "caption is not UTF-8", None, "caption is not UTF-8"]
