"""Tests of the shards commands on parquet files that are read in place."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from flip.evaluation.datasets.image_sources import Shards
from flip.runs.errors import ConfigError
from jobs.measuring.functions import input_stages
from jobs.planning import kernel_share
from tests.flip.data.parquet_files.write import jpeg
from tests.tools.commands.test_shards_cli import call
from tools.commands import tokenizer
from tools.commands.shards import main

ROWS = 40
COLUMNS = ("--image", "image", "--caption", "caption", "--json")


def write(folder, split="train", files=2, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        rows = range(number * ROWS, (number + 1) * ROWS)
        captions = [None if row % 20 == 7 else f"row {row}" for row in rows]
        table = pa.table({"image": [jpeg(row) for row in rows], "caption": captions, "score": np.array(rows) / 100})
        pq.write_table(table, folder / f"{split}-{number:05d}-of-{files:05d}.parquet", **options)
    return folder


@pytest.fixture
def manifest(tmp_path, capsys):
    code, _ = call(capsys, "index", write(tmp_path / "set"), *COLUMNS, "--chunk", "8", "--out", tmp_path / "m")
    assert code == 0
    return Manifest.load(tmp_path / "m")


def read(manifest):
    return [(bytes(sample["jpg"]), bytes(sample["json"])) for _, sample in ChunkReader().samples(manifest)]


def test_index_of_folder_reports_rows_dropped_captions_and_bytes_read(tmp_path, capsys):
    folder = write(tmp_path / "set", compression="none", use_dictionary=False)
    code, report = call(capsys, "index", folder, *COLUMNS, "--chunk", "8", "--out", tmp_path / "m")
    assert code == 0
    assert (report["shards"], report["samples"], report["seen"]) == (2, 76, 80)
    assert report["dropped"] == {"the caption is null or empty": 4}
    assert report["parquet"]["data.captions"] == "json:caption"
    assert report["parquet"]["bytes_read_per_byte_used"] < 1.2
    assert "to_read_less" not in report["parquet"]


def test_index_names_chunk_or_command_if_whole_pages_are_read(tmp_path, capsys):
    folder = write(tmp_path / "set", compression="zstd", use_dictionary=False)
    report = call(capsys, "index", folder, *COLUMNS, "--chunk", "4", "--out", tmp_path / "m")[1]
    advice = report["parquet"]["to_read_less"]
    assert advice.startswith("index with --chunk 64, or write tars: flip shards make FILES --image image")
    folder = write(tmp_path / "wide", compression="zstd", use_dictionary=False, files=1)
    report = call(capsys, "index", folder, *COLUMNS, "--chunk", "4", "--out", tmp_path / "n")[1]
    assert report["parquet"]["to_read_less"].startswith("write tars: flip shards make FILES")


def test_filters_are_on_columns_of_the_files(tmp_path, capsys):
    folder = write(tmp_path / "set")
    options = ("--filter", "score>=0.2", "--chunk", "8", "--out", tmp_path / "m")
    report = call(capsys, "index", folder, *COLUMNS, *options)[1]
    assert report["samples"] == 57 and report["dropped"]["score>=0.2"] == 19


def test_folder_with_several_splits_is_refused(tmp_path, capsys):
    write(write(tmp_path / "set"), "test")
    assert main(["index", str(tmp_path / "set"), *COLUMNS, "--out", str(tmp_path / "m")]) == 78
    assert "several splits: test, train" in capsys.readouterr().err


def test_verify_inspect_and_info_read_manifest(manifest, capsys):
    code, report = call(capsys, "verify", manifest.folder, "--json")
    assert (code, report["samples_checked"], report["bad"]) == (0, 76, 0)
    report = call(capsys, "inspect", manifest.folder, "--id", "40", "--json")[1]
    assert report["captions"] == ["row 42"] and report["shard"].endswith("00001-of-00002.parquet")
    assert (report["ordinal"], report["key"]) == (2, "000000002")
    report = call(capsys, "info", manifest.folder, "--json")[1]
    assert report["samples_per_shard"] == {"min": 38, "median": 38.0, "max": 38}


def test_verify_names_damage_and_excludes_it(manifest, tmp_path, capsys):
    key, start, stop, _ = manifest.chunk_reads(2)[0]
    data = bytearray(Path(key).read_bytes())
    data[(start + stop) // 2] ^= 1
    Path(key).write_bytes(data)
    code, report = call(capsys, "verify", manifest.folder, "--out", tmp_path / "good", "--json")
    assert (code, report["bad_chunks"] >= 1) == (0, True)
    assert call(capsys, "verify", tmp_path / "good", "--json")[0] == 0


def test_exclude_and_move_keep_samples_and_bring_lines(manifest, tmp_path, capsys):
    before = read(manifest)
    call(capsys, "exclude", manifest.folder, "--ids", "3", "--out", tmp_path / "without", "--json")
    shutil.copytree(tmp_path / "set", tmp_path / "new")
    code, report = call(capsys, "move", manifest.folder, "--to", tmp_path / "new", "--out", tmp_path / "n", "--json")
    assert (code, report["digest"]) == (0, manifest.digest)
    shutil.rmtree(manifest.folder)
    assert read(Manifest.load(tmp_path / "without")) == before[:3] + before[4:]
    shutil.rmtree(tmp_path / "set")
    assert read(Manifest.load(tmp_path / "n")) == before


#: Command on a manifest of parquet files (M), the exit code, and what its report or its error has.
COMMANDS = [
    (["shards", "info", "M"], 0, '"data.captions": "json:caption"'),
    (["shards", "inspect", "M", "--id", "3"], 0, '"row 3"'),
    (["shards", "inspect", "M", "--id", "3", "--save", "OUT"], 0, '"format": "JPEG"'),
    (["shards", "verify", "M", "--sample", "0.5"], 0, '"bad": 0'),
    (["shards", "verify", "M", "--out", "OUT"], 0, '"samples_checked": 76'),
    (["shards", "exclude", "M", "--ids", "3", "--out", "OUT"], 0, '"exceptions": 1'),
    (["shards", "move", "M", "--to", "SET", "--out", "OUT"], 0, '"samples": 76'),
    (["tokenizer", "train", "--captions", "M", "--vocabulary", "300", "--out", "OUT"], 0, '"captions": 76'),
    (["shards", "drop", "M", "--out", "OUT"], 78, "Training leaves excluded samples out"),
    (["shards", "recode", "M", "--short", "16", "--out", "OUT"], 78, "flip shards make FILES --out FOLDER"),
    (["shards", "index", "more.tar", "--add", "M", "--out", "OUT"], 78, "Index all parquet files anew"),
    (["shards", "index", "SET", *COLUMNS[:-1], "--uids", "u.npy", "--out", "OUT"], 78, "--filter 'COLUMN OP VALUE'"),
    (["shards", "index", "SET", *COLUMNS[:-1], "--add", "M", "--out", "OUT"], 78, "Index all parquet files anew"),
]


@pytest.mark.parametrize(("command", "expected", "text"), COMMANDS, ids=[" ".join(row[0][:2]) for row in COMMANDS])
def test_each_command_works_on_parquet_files_or_refuses_with_remedy(
    manifest, tmp_path, capsys, command, expected, text
):
    places = {"M": manifest.folder, "SET": tmp_path / "set", "OUT": tmp_path / "out"}
    run = {"shards": main, "tokenizer": tokenizer.main}[command[0]]
    code = run([str(places.get(word, word)) for word in [*command[1:], "--json"]])
    output = capsys.readouterr()
    assert code == expected, output.err
    if code:
        assert text in json.loads(output.err)["error"]["remedy"] and not output.out
    else:
        assert text in output.out


def test_measurements_read_parquet_files(manifest):
    spec = input_stages.spec_of(manifest, "simplejpeg", "pillow", 32, 16)
    rows, stages = input_stages.measure(manifest, spec, 0.05)
    assert all(stage.samples and not stage.skipped for stage in stages)
    assert all(row.microseconds > 0 for row in rows)
    assert kernel_share.sample(str(manifest.folder), "ignore").refused == {}


def test_options_of_tars_are_refused_with_parquet_files(tmp_path, capsys):
    folder = str(write(tmp_path / "set"))
    assert main(["index", folder, "--image", "image", "--out", str(tmp_path / "m")]) == 78
    assert "no column of captions" in capsys.readouterr().err
    assert main(["index", folder, "--caption", "caption", "--out", str(tmp_path / "m")]) == 78
    assert "is for parquet files" in capsys.readouterr().err


def test_parquet_file_without_columns_names_options(tmp_path, capsys):
    path = str(next(write(tmp_path / "set").glob("*.parquet")))
    assert main(["index", path, "--out", str(tmp_path / "m")]) == 65
    assert "--image COLUMN --caption COLUMN" in capsys.readouterr().err


def test_missing_column_names_those_that_exist(tmp_path, capsys):
    folder = str(write(tmp_path / "set"))
    assert main(["index", folder, "--image", "xyz", "--caption", "caption", "--out", str(tmp_path / "m")]) == 78
    assert "image, caption, score" in capsys.readouterr().err


def test_lines_hold_chosen_columns_only(tmp_path, capsys):
    folder = write(tmp_path / "set")
    for chosen, expected in (([], {"caption", "score"}), (["--columns", "caption"], {"caption"})):
        out = tmp_path / f"m{len(chosen)}"
        call(capsys, "index", folder, *COLUMNS, *chosen, "--out", out)
        assert set(json.loads(read(Manifest.load(out))[0][1])) == expected


def test_evaluation_set_of_parquet_files_is_refused_with_remedy(manifest):
    with pytest.raises(ConfigError, match="an evaluation set is of tars") as caught:
        Shards(manifest)
    assert "flip shards make" in caught.value.paragraph()
