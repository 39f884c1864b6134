"""Tests of the output and exit codes of shards verify, inspect, exclude, drop and info."""

import json
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest

from flip.config import merge
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest import build, filters
from flip.data.manifest.build import index
from flip.data.manifest.manifest import ChunkTable, Manifest, write
from flip.data.order import SampleOrder
from flip.runs.errors import StorageError
from tests.flip.data.manifest.test_manifest import write_tar
from tests.harness.common import ROOT
from tests.synthetic import caption, draw_image, encode, make_dataset
from tests.tools.commands.test_shards import run
from tools.commands.shards import main
from tools.shards_commands.verify import Report


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path / "data", samples=120, shards=3, size=16, chunk=4)


def call(capsys, *arguments):
    """Return the exit code and the output; with --json the parsed output."""
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    text = out.out + out.err
    return code, json.loads(out.out) if "--json" in arguments and out.out else text


def rot(manifest, j):
    key, start, *_ = manifest.chunk_reads(j)[0]
    with open(key, "r+b") as file:
        file.seek(start)
        file.write(b"rot")


@pytest.mark.long
def test_verify_reports_damage_and_writes_manifest_with_exceptions(data, capsys):
    code, text = call(capsys, "verify", data, "--workers", 1)
    assert code == 0 and re.match(r"120 samples in 30 of 30 chunks read and decoded; .* 0 bad\n$", text)
    manifest = Manifest.load(data)
    rot(manifest, 7)
    code, text = call(capsys, "verify", data, "--workers", 1, "--examples", 1)
    assert code == 65 and "4 x chunk N (samples N to N) is damaged: CRC32" in text and "id 28: " in text
    assert "--out NEW_FOLDER" in text and "id 29" not in text
    code, report = call(capsys, "verify", data, "--workers", 2, "--out", data.parent / "good", "--json")
    assert code == 0 and report["bad"] == 4 and report["bad_chunks"] == 1 and report["samples_checked"] == 120
    good = Manifest.load(data.parent / "good")
    assert sorted(good.exceptions) == [28, 29, 30, 31] and good.digest == report["digest"] != manifest.digest
    code, report = call(capsys, "verify", data.parent / "good", "--json", "--workers", 1)
    assert (code, report["bad"], report["samples_checked"], report["excepted_before"]) == (0, 0, 116, 4)
    code, text = call(capsys, "verify", data, "--out", data.parent / "good")
    assert code == 78 and "there is a manifest already" in text
    with open(manifest.keys[0], "ab") as file:
        file.write(b"more")
    code, text = call(capsys, "verify", data.parent / "good", "--workers", 1, "--out", data.parent / "better")
    assert code == 65
    assert "shard of a different length" in text
    assert "no manifest was written" in text
    assert not (data.parent / "better").exists()


def test_verify_accepts_labels_of_evaluation_set(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("0.png", encode(draw_image(0, 16))), ("0.cls", b"3")])
    assert call(capsys, "index", tmp_path / "0.tar", "--out", tmp_path / "m")[0] == 0
    verify = ("verify", tmp_path / "m", "--workers", 1)
    code, text = call(capsys, *verify, "--out", tmp_path / "good")
    assert code == 0 and "nothing to exclude" in text
    code, text = call(capsys, *verify, "--captions", "txt")
    assert code == 65 and "no caption ['txt']" in text


def test_verify_reports_findings_before_storage_error(data, capsys, monkeypatch):
    def parts(*_):  # must be a generator, because verify closes it
        yield Report(3, 1, 12, 1000, {5: "ugly"})
        raise StorageError("away", "there")

    monkeypatch.setattr("tools.shards_commands.verify.check", parts)
    code, text = call(capsys, "verify", data, "--out", data.parent / "new")
    assert code == 69 and text.startswith("until then: 12 samples in 3 of 30 chunks") and "1 x ugly" in text
    assert text.endswith("there: away.\n") and not (data.parent / "new").exists()
    code, text = call(capsys, "verify", data, "--chunks", 6)
    # The first three chunks are not a random sample.
    assert code == 69
    assert "until then: 12 samples in 3 of 30" in text
    assert "%" not in text


@pytest.mark.long
def test_verify_reports_findings_if_manifest_cannot_be_written(data, capsys, monkeypatch):
    manifest = Manifest.load(data)
    for j in range(20):
        rot(manifest, j)
    monkeypatch.setattr("flip.data.manifest.manifest.LIMIT", 4096)
    code, text = call(capsys, "verify", data, "--workers", 1, "--out", data.parent / "good")
    assert code == 78 and text.startswith("no manifest was written: 120 samples in 30 of 30 chunks")
    assert "80 x chunk N" in text and "exceptions.jsonl: a file of" in text and not (data.parent / "good").exists()


def test_verify_checks_random_part_of_chunks(data, capsys):
    code, report = call(capsys, "verify", data, "--sample", 0.5, "--no-decode", "--json", "--workers", 1)
    assert code == 0 and (report["chunks_checked"], report["samples_checked"], report["decoded"]) == (15, 60, False)
    assert report["bad_share_at_most"] == pytest.approx(1 - 0.05 ** (1 / 15))
    code, text = call(capsys, "verify", data, "--chunks", 5, "--seed", 3, "--workers", 1)
    assert code == 0 and "0 of 5 chunks drawn (seed 3)" in text and "At 95% confidence, at most 45.07 %" in text
    for arguments, expected in (
        (("--sample", 0), "--sample"),
        (("--sample", 1.5), "--sample"),
        (("--chunks", 31), "30 chunks"),
        (("--workers", -1), "--workers"),
        (("--captions", " ,"), "--captions"),
        (("--out", data / "00000.tar"), "a file is where a folder must be"),
        (("--out", data), "there is a manifest already"),
    ):
        code, text = call(capsys, "verify", data, *arguments)
        assert code == 78 and expected in text and text.count("\n") == 1


def test_inspect_shows_and_saves_sample(data, capsys, tmp_path):
    code, text = call(capsys, "inspect", data, "--id", 41, "--save", tmp_path / "x.png")
    assert code == 0 and (tmp_path / "x.png").read_bytes() == encode(draw_image(41, 16))
    for expected in ("00001.tar", "ordinal   1\n", "excepted  -", "width   16", "a green stripe number 41"):
        assert expected in text, expected
    code, text = call(capsys, "inspect", data, "--id", 41, "--save", tmp_path / "x.png")
    assert code == 78 and "the file already exists" in text
    code, report = call(capsys, "inspect", data, "--id", 42, "--json")
    assert report["json"] == {"number": 42} and set(report["members"]) == {"json", "png", "txt"}
    rot(Manifest.load(data), 10)
    code, text = call(capsys, "inspect", data, "--id", 42)
    assert code == 65 and "CRC32" in text
    for arguments in ((data,), (data, "--id", 120), (), (data, "--id", 1, "--step", 3), ("--run", data)):
        assert call(capsys, "inspect", *arguments)[0] == 78


def test_commands_read_captions_from_field_of_json_member(tmp_path, capsys):
    members = [("a.png", encode(draw_image(1, 16))), ("a.json", b'{"caption": ["a cat", "one more"]}')]
    write_tar(tmp_path / "0.tar", members)
    index([str(tmp_path / "0.tar")], tmp_path / "m")
    code, report = call(capsys, "inspect", tmp_path / "m", "--id", 0, "--captions", "json:caption", "--json")
    assert code == 0 and report["captions"] == ["a cat", "one more"]
    assert call(capsys, "verify", tmp_path / "m", "--captions", "json:caption")[0] == 0
    code, text = call(capsys, "verify", tmp_path / "m", "--captions", "json:title")
    assert code == 65 and "no caption ['json:title']" in text
    for command in (("verify",), ("inspect", "--id", 0)):
        code, text = call(capsys, *command, tmp_path / "m", "--captions", "json")
        assert code == 78 and "as json:caption" in text, text


def test_inspect_escapes_control_characters(tmp_path, capsys):
    """Unescaped, a caption could clear the screen."""
    members = [("a\x1b[2J.png", encode(draw_image(1, 16))), ("a\x1b[2J.txt", b"red\x1b]0;owned\x07")]
    write_tar(tmp_path / "0.tar", members)
    index([str(tmp_path / "0.tar")], tmp_path / "m")
    code, text = call(capsys, "inspect", tmp_path / "m", "--id", 0)
    assert code == 0 and "\x1b" not in text and "\x07" not in text
    assert r"red\x1b]0;owned\x07" in text


def test_inspect_escapes_undecodable_bytes_in_key(tmp_path):
    write_tar(tmp_path / "0.tar", [("caf\udce9.png", encode(draw_image(1, 16))), ("caf\udce9.txt", "é".encode())])
    index([str(tmp_path / "0.tar")], tmp_path / "m")
    shown = run("inspect", tmp_path / "m", "--id", 0)
    assert shown.returncode == 0 and "caf\\udce9\n" in shown.stdout and "\n  é\n" in shown.stdout, shown.stderr


def test_inspect_json_replaces_nan_and_infinity_with_null(tmp_path, capsys):
    """img2dataset writes missing values as NaN, which most JSON parsers besides Python's reject."""
    content = b'{"similarity": NaN, "all": [Infinity, -Infinity, 1e999, 0.25, 3]}'
    write_tar(tmp_path / "0.tar", [("a.png", encode(draw_image(1, 16))), ("a.json", content)])
    index([str(tmp_path / "0.tar")], tmp_path / "m")
    main(["inspect", str(tmp_path / "m"), "--id", "0", "--json"])
    text = capsys.readouterr().out
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    assert json.loads(text)["json"] == {"similarity": None, "all": [None, None, None, 0.25, 3]}


@pytest.fixture
def a_run(data):
    stages = [{"name": "pretrain", "samples": 90, "batch": 48}, {"name": "unmasked", "samples": 24, "batch": 24}]
    values = {"manifest": str(data), "samples": 120, "chunk": 4, "lanes": 6, "block": 2, "decoder": "pillow"}
    config = merge.merge([("test", {"seed": 5, "data": values, "stages": stages})])
    folder = data.parent / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(merge.dump(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "arguments, stage, step, start, size",
    [
        (("--step", 1), "pretrain", 1, 0, 48),
        (("--step", 2), "pretrain", 2, 48, 48),
        (("--step", 3), "unmasked", 3, 96, 24),
        (("--samples", 96), "pretrain", 2, 48, 48),
        (("--samples", 97), "unmasked", 3, 96, 24),
        (("--samples", 1), "pretrain", 1, 0, 48),
    ],
)
def test_inspect_shows_batch_of_step(a_run, capsys, arguments, stage, step, start, size):
    code, report = call(capsys, "inspect", "--run", a_run, *arguments, "--json")
    assert code == 0 and (report["stage"], report["step"], report["samples_before"]) == (stage, step, start)
    ids, visits = SampleOrder(5, 120, 4, 2, 6).batch(start, size)
    assert [sample["id"] for sample in report["batch"]] == ids.tolist()
    assert [sample["visit"] for sample in report["batch"]] == visits.tolist()
    assert all(str(sample["id"]) in sample["caption"] for sample in report["batch"]) and report["replaced"] == 0


def test_inspect_rejects_steps_outside_run(a_run, capsys):
    for arguments, expected in (((), "no step given"), (("--step", 4), "1 .. 3"), (("--samples", 121), "1 .. 120")):
        code, text = call(capsys, "inspect", "--run", a_run, *arguments)
        assert code == 78 and expected in text
    code, text = call(capsys, "inspect", "--run", a_run, "--step", 2, "--no-read")
    assert code == 0 and text.count("\nlane ") == 48 and "number" not in text


def test_inspect_accepts_run_name_and_rejects_other_manifest(a_run, data, capsys, monkeypatch):
    monkeypatch.setenv("FLIP_RUNS", str(a_run.parent.parent))
    name = f"{a_run.parent.name}/{a_run.name}"
    assert call(capsys, "inspect", "--run", name, "--step", 1, "--no-read")[0] == 0
    for digest, code in ((Manifest.load(data).digest, 0), ("0" * 64, 65)):
        record = {"schema": 2, "config": {"data": {"manifest": f"digest:{digest}"}}}
        (a_run / "identity.json").write_text(json.dumps(record), encoding="utf-8")
        exit_code, text = call(capsys, "inspect", "--run", a_run, "--step", 1, "--no-read")
        assert exit_code == code and ("not the manifest" in text) == bool(code)
    assert call(capsys, "inspect", "--run", "nowhere/there", "--step", 1)[0] == 78


def test_index_filters_are_applied_and_recorded(data, capsys):
    index = ("index", data / "*.tar", "--chunk", 4)
    code, report = call(capsys, *index, "--caption-length", "42:", "--out", data.parent / "m", "--json")
    assert code == 0
    assert report["seen"] == 120
    assert report["samples_read_per_sample"] == round(120 / report["samples"], 2)
    assert report["dropped"] == {"caption length 42:": 120 - report["samples"]}
    code, text = call(capsys, "info", data.parent / "m")
    assert "filters\n  caption length 42:\n" in text and "dropped\n  caption length 42:" in text
    assert "\nfilters\n" not in call(capsys, "info", data)[1]
    call(capsys, *index, "--caption-length", "41:", "--out", data.parent / "same")
    assert Manifest.load(data.parent / "same").digest == Manifest.load(data.parent / "m").digest
    for arguments, code, expected in (
        (("--filter", "width=1"), 78, "--filter: no filter (found: 'width=1')"),
        (("--caption-length", "5"), 78, "--caption-length"),
        (("--caption-length", "99:"), 78, "no sample passes the filters"),
        (("--filter", "width>1"), 65, "00000.parquet: the parquet file of this shard is missing"),
    ):
        exit_code, text = call(capsys, *index, "--out", data.parent / "no", *arguments)
        assert exit_code == code
        assert expected in text
        assert text.count("\n") == 1
        assert not (data.parent / "no").exists()


def test_drop_removes_excepted_samples(data, capsys):
    call(capsys, "except", data, "--ids", "3,40-47,119", "--out", data.parent / "less")
    code, report = call(capsys, "drop", data.parent / "less", "--out", data.parent / "good", "--json")
    assert code == 0 and (report["samples"], report["exceptions"], report["chunk"]) == (110, 0, 4), report
    digest = Manifest.load(data.parent / "less").digest[:12]
    assert report["dropped"] == {f"not excluded in {data.parent / 'less'} (digest {digest})": 10}
    old = Manifest.load(data)
    new = Manifest.load(data.parent / "good")
    reader = ChunkReader()
    good = [id for id in range(120) if id not in {3, *range(40, 48), 119}]
    assert [new.locate(id) for id in range(110)] == [old.locate(id) for id in good]
    samples = [bytes(s["txt"]) for j in range(new.chunks) for s in reader.read_chunk(new, j)]
    assert samples == [caption(id).encode() for id in good]
    call(capsys, "except", data.parent / "good", "--ids", "0", "--out", data.parent / "less again")
    code, report = call(capsys, "drop", data.parent / "less again", "--out", data.parent / "better", "--json")
    assert code == 0 and Manifest.load(data.parent / "better").locate(0)[1] == 1 and report["samples"] == 109
    code, text = call(capsys, "drop", data, "--out", data.parent / "same")
    assert code == 78 and "nothing to drop" in text and not (data.parent / "same").exists()
    with open(data / "00001.tar", "ab") as file:
        file.write(bytes(512))
    code, text = call(capsys, "drop", data.parent / "less", "--out", data.parent / "none")
    assert code == 65 and "00001.tar: the shard has" in text and not (data.parent / "none" / "manifest.json").exists()
    (data / "00002.tar").unlink()
    code, text = call(capsys, "drop", data.parent / "less", "--out", data.parent / "other")
    assert code == 65 and "shards index --skip-damaged" in text


def test_repeated_drop_scans_again_after_exclusions_changed(data, capsys, monkeypatch):
    folder = data.parent
    call(capsys, "exclude", data, "--ids", "3", "--out", folder / "less")
    with monkeypatch.context() as patch:  # interrupted after all scans
        patch.setattr("tools.shards_commands.manifest.merge", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call(capsys, "drop", folder / "less", "--out", folder / "good")
    shutil.rmtree(folder / "less")
    call(capsys, "exclude", data, "--ids", "3,4", "--out", folder / "less")
    filters._opened.cache_clear()  # as in a new process
    code, report = call(capsys, "drop", folder / "less", "--out", folder / "good", "--json")
    assert code == 0 and report["samples"] == 118


def test_drop_refuses_shard_of_other_etag_or_fewer_samples(data, capsys, monkeypatch):
    """The size is the same: exceptions would be applied to other samples."""
    old = Manifest.load(data)
    table = ChunkTable(old.keys, old.shards, old.chunk, old.offsets, ["before"] * 3)
    write(data.parent / "less", table, old.checksums, {3: "bad"})
    drop = ("drop", data.parent / "less", "--out", data.parent / "good")
    with monkeypatch.context() as patch:
        patch.setattr(build, "file_stat", lambda key, stat=build.file_stat: stat(key)._replace(etag="after"))
        code, text = call(capsys, *drop)
    assert code == 65 and "00000.tar: the ETag of the shard is after, indexed was before" in text
    key, start, stop, _ = old.chunk_reads(19)[0]
    with open(key, "r+b") as file:
        file.seek(start)
        file.write(bytes(stop - start))
    code, text = call(capsys, *drop)
    assert code == 65 and "00001.tar: 36 samples, indexed were 40" in text and not (data.parent / "good").exists()


def test_drop_keeps_filters_and_shards_that_were_left_out(data, capsys):
    damaged = data / "00002.tar"
    folder = data.parent
    damaged.write_bytes(b"no tar")
    index = ("index", data / "*.tar", "--chunk", 4, "--skip-damaged", "--caption-length", "42:")
    code, report = call(capsys, *index, "--out", folder / "m", "--json")
    assert code == 0 and 2 < report["samples"] < report["seen"] == 80
    call(capsys, "exclude", folder / "m", "--ids", "0,1", "--out", folder / "less")
    assert call(capsys, "drop", folder / "less", "--out", folder / "good")[0] == 0
    code, new = call(capsys, "info", folder / "good", "--json")
    name = f"not excluded in {folder / 'less'} (digest {Manifest.load(folder / 'less').digest[:12]})"
    assert new["filters"] == [*report["filters"], name] and new["seen"] == 80
    assert new["dropped"] == report["dropped"] | {name: 2} and new["samples"] == report["samples"] - 2
    (left_out,) = Manifest.load(folder / "good").settings["left_out"]
    assert left_out["shard"] == str(damaged)


def test_new_manifests_of_evaluation_set_keep_names_of_classes(data, tmp_path, capsys):
    """Without them `flip evaluate --sets NAME=FOLDER` refuses the new set."""
    names = b'{"names": ["a", "b"], "templates": ["{}"]}'
    (data / "classes.json").write_bytes(names)
    few = tmp_path / "few"
    commands = [
        ["exclude", data, "--ids", "3", "--out", few],
        ["drop", few, "--out", tmp_path / "dropped"],
        ["recode", data, "--short", "16", "--out", tmp_path / "small"],
        ["move", data, "--to", data, "--out", tmp_path / "moved"],
    ]
    for command in commands:
        assert call(capsys, *command)[0] == 0
        assert (command[-1] / "classes.json").read_bytes() == names, command[0]
    (data / "classes.json").write_bytes(b"other")
    assert call(capsys, "exclude", data, "--ids", "4", "--out", few)[0] == 78
    assert (few / "classes.json").read_bytes() == names, "a manifest's folder never changes"


@pytest.mark.parametrize("option", ["--out", "manifest"])
def test_address_in_place_of_folder_is_refused(data, tmp_path, capsys, monkeypatch, option):
    """A folder named ``s3:`` was made in the current folder."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    places = {"manifest": data, "--out": tmp_path / "out", option: "s3://bucket/set"}
    assert main(["recode", str(places["manifest"]), "--out", str(places["--out"])]) == 78
    error = capsys.readouterr().err
    assert f"{option}: must be a path on this machine, not an address (found: 's3://bucket/set')" in error
    assert sorted(tmp_path.iterdir()) == before


def test_info_reports_shard_sizes_exceptions_and_shuffling(data, capsys):
    call(capsys, "except", data, "--ids", "3,5", "--reason", "short by 7 bytes", "--out", data.parent / "less")
    code, report = call(capsys, "info", data.parent / "less", "--batch", 64, "--json")
    assert report["samples_per_shard"] == {"min": 40, "median": 40.0, "max": 40}
    assert report["exceptions_by_reason"] == {"short by N bytes": 2}
    shuffling = report["shuffling_on_one_node_like_this"]
    assert (shuffling["B"], shuffling["L"], shuffling["Q"], shuffling["R"]) == (64, 2, 4, 4)
    assert 1.5 * 32 * report["mean_bytes"] == pytest.approx(shuffling["buffer_bytes"], rel=0.01)
    text = call(capsys, "info", data)[1]
    assert "samples per shard\n  min     40\n" in text
    assert "  Q, chunks of a block   4\n" in text and "  L, lanes " in text, "letters had no words"
    assert call(capsys, "info", data, "--batch", 0)[0] == 78


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_help_contains_examples(command):
    shown = run(command, "--help")
    assert shown.returncode == 0 and "examples:" in shown.stdout


def test_commands_that_only_read_do_not_import_torch(data):
    """verify, inspect and info start quickly because they do not import torch."""
    script = (
        "import sys; from tools.commands.shards import main\n"
        f"codes = [main([name, {str(data)!r}, *more]) for name, more in (('info', ()), ('verify', ('--workers', '1')), "
        "('inspect', ('--id', '3')))]\n"
        "sys.exit(any(codes) or 'torch' in sys.modules)"
    )

    root = str(ROOT)
    assert subprocess.run([sys.executable, "-c", script], cwd=root, env=os.environ).returncode == 0
