"""Tests of shards make on several parquet files: their order, their columns, other formats, and invalid sources."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.harness.common import ROOT
from tests.synthetic import draw_image, encode
from tests.tools.commands.test_shards_cli import call
from tests.tools.shards_commands.test_make import members, write_table
from tools.shards_commands import make, parquet_source
from tools.shards_commands.shard_writer import _tar_header
from tools.shards_commands.source_images import CHECKS


def image(number):
    return {"bytes": encode(draw_image(number, 16), "jpg"), "path": None}


def rows_of(first, count):
    return [{"image": image(n), "caption": f"number {n}", "score": n / 8} for n in range(first, first + count)]


def write_files(folder, counts, suffix=".parquet"):
    """Write a file of as many rows as each of ``counts``; rows are numbered over all files."""
    folder.mkdir(exist_ok=True)
    first = 0
    for number, count in enumerate(counts):
        write_table_as_parquet(folder / f"train-{number:05d}-of-{len(counts):05d}{suffix}", rows_of(first, count))
        first += count
    return folder


def write_table_as_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def texts(out):
    return [sample["txt"].decode() for sample in members(out)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_make_reads_a_folder_a_pattern_and_several_files_alike(tmp_path, capsys, monkeypatch):
    folder = write_files(tmp_path / "set", [5, 0, 7], ".pq")
    (folder / "README.md").write_text("a data set")
    (folder / ".cache").mkdir()
    write_table_as_parquet(folder / ".cache" / "old.parquet", rows_of(90, 2))
    paths = sorted(folder.glob("*.pq"))
    for name, sources in (
        ("a", [folder]),
        ("b", [f"{folder}/*.pq"]),
        ("c", paths[::-1]),
        ("d", [*paths[:2], paths[2]]),
    ):
        code, report = call(capsys, "make", *sources, "--out", tmp_path / name, "--per-shard", 3, "--json")
        assert code == 0 and (report["rows"], report["samples"], report["shards"]) == (12, 12, 5)
        assert contents(tmp_path / name) == contents(tmp_path / "a")
    assert texts(tmp_path / "a") == [f"number {n}" for n in range(12)]
    assert json.loads(members(tmp_path / "a")[3]["json"]) == {"score": 3 / 8}
    names = []
    for path in sorted((tmp_path / "a").glob("*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert names[0] == "000000000.jpg" and names[-1] == "000000011.json" and len(set(names)) == len(names)


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--split", 0.3], ["--label", "class", "--key", "id"]])
def test_make_of_several_files_does_not_depend_on_the_number_of_processes(tmp_path, capsys, monkeypatch, more):
    monkeypatch.setattr(parquet_source, "_PART_ROWS", 8)
    (tmp_path / "set").mkdir()
    for number, count in enumerate([20, 3, 30]):
        rows = [
            row | {"class": "ab"[n % 2], "id": f"{number}-{n}"} for n, row in enumerate(rows_of(50 * number, count))
        ]
        write_table_as_parquet(tmp_path / "set" / f"{number}.parquet", rows, row_group_size=4)
    for few, processes in ((1000, 1), (0, 2), (0, 4)):
        monkeypatch.setattr(make, "FEW", few)
        monkeypatch.setattr(make, "cores", lambda processes=processes: processes)
        out = tmp_path / f"of {processes}"
        assert call(capsys, "make", tmp_path / "set", "--out", out, "--per-shard", 5, *more)[0] == 0
        found = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert len(found) > 10
        if processes == 1:
            expected = found
        assert found == expected
    captions = texts(tmp_path / "of 4")
    if "--split" in more:
        captions += texts(tmp_path / "of 4" / "test")
    assert len(captions) == 53


def test_make_reads_row_groups_at_the_borders_of_parts_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parquet_source, "_PART_ROWS", 10)
    path = write_table_as_parquet(tmp_path / "t.parquet", rows_of(0, 70), row_group_size=3)
    assert call(capsys, "make", path, "--out", tmp_path / "out", "--per-shard", 7)[0] == 0
    assert texts(tmp_path / "out") == [f"number {n}" for n in range(70)]


def test_make_checks_headers_only_on_request(tmp_path, capsys):
    whole = [encode(draw_image(n, 64), "jpg") for n in range(2)]
    clear = io.BytesIO()
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(clear, "PNG")
    images = [whole[0], whole[1][:-200], b"<html>", clear.getvalue(), encode(draw_image(3, 16))]
    path = write_table_as_parquet(tmp_path / "t.parquet", [{"jpg": data, "text": "a"} for data in images])
    reports = {}
    for check in CHECKS:
        code, reports[check] = call(capsys, "make", path, "--check", check, "--out", tmp_path / check, "--json")
        assert code == 0 and reports[check]["transparent_pictures"] == 1
    assert [row["row"][-5:] for row in reports["decode"]["refused_rows"]] == ["row 2", "row 3"]
    assert [row["row"][-5:] for row in reports["header"]["refused_rows"]] == ["row 3"]
    assert [next(iter(sample)) for sample in members(tmp_path / "header")] == ["jpg", "jpg", "png", "png"]


def test_make_leaves_bytes_and_vectors_out_of_the_json_member_unless_named(tmp_path, capsys):
    more = {"embedding": [0.5, 0.25], "thumbnail": b"\xff", "second": image(1), "tags": ["a", "b"], "n": 3}
    path = write_table_as_parquet(tmp_path / "t.parquet", [rows_of(0, 1)[0] | more])
    code, report = call(capsys, "make", path, "--out", tmp_path / "a", "--json")
    assert code == 0 and report["left_out_columns"] == ["embedding", "thumbnail", "second"]
    assert json.loads(members(tmp_path / "a")[0]["json"]) == {"score": 0.0, "tags": ["a", "b"], "n": 3}
    columns = ["--columns", "embedding, thumbnail"]
    assert call(capsys, "make", path, "--out", tmp_path / "b", *columns)[0] == 0
    assert json.loads(members(tmp_path / "b")[0]["json"]) == {"embedding": [0.5, 0.25], "thumbnail": "/w=="}
    code, text = call(capsys, "make", path, "--out", tmp_path / "c", "--columns", "embeding")
    assert code == 78 and "no such column" in text and "embedding" in text


def test_make_accepts_columns_that_differ_in_their_encoding_only(tmp_path, capsys):
    first, second = rows_of(0, 2)
    write_table_as_parquet(tmp_path / "0.parquet", [first | {"note": "x"}])
    table = pa.table(
        {
            "image": pa.array([second["image"]["bytes"]], pa.large_binary()),
            "caption": pa.array(["number 1"]).dictionary_encode(),
            "score": pa.array([1], pa.int8()),
            "note": pa.nulls(1),
        }
    )
    pq.write_table(table, tmp_path / "1.parquet")
    code, text = call(capsys, "make", tmp_path / "0.parquet", tmp_path / "1.parquet", "--out", tmp_path / "no")
    assert code == 78 and "image is bytes, not images" in text and f"{tmp_path}/1.parquet" in text
    write_table_as_parquet(tmp_path / "0.parquet", [first | {"image": first["image"]["bytes"], "note": "x"}])
    assert call(capsys, "make", tmp_path / "0.parquet", tmp_path / "1.parquet", "--out", tmp_path / "out")[0] == 0
    assert texts(tmp_path / "out") == ["number 0", "number 1"]


def test_make_continues_after_it_was_killed(tmp_path, capsys):
    """SIGKILL leaves a hidden folder only; the second call writes what the first one would have written."""
    folder = write_files(tmp_path / "set", [1500, 1500, 1500])
    command = [sys.executable, "-m", "jobs", "shards", "make", folder, "--out", tmp_path / "out"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while not list(tmp_path.glob(".out.*/*.tar")) and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    for name in ("out", "other"):
        assert call(capsys, "make", folder, "--out", tmp_path / name)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "other") and len(texts(tmp_path / "out")) == 4500
    (left,) = tmp_path.glob(".out.*")
    assert left.is_dir()


def lacking(folder):
    write_table_as_parquet(folder / "a.parquet", rows_of(0, 2))
    for name in "bc":
        write_table_as_parquet(folder / f"{name}.parquet", [{"image": image(0), "text": "a"}])


def other_types(folder):
    write_table_as_parquet(folder / "a.parquet", rows_of(0, 2))
    write_table_as_parquet(folder / "b.parquet", [row | {"score": "high"} for row in rows_of(0, 2)])


def other_columns(folder):
    write_table_as_parquet(folder / "a.parquet", rows_of(0, 2))
    write_table_as_parquet(folder / "b.parquet", [row | {"width": 16} for row in rows_of(0, 2)])


def other_classes(folder):
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        table = pa.table({"image": [image(0)], "caption": ["x"], "label": [1]})
        features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": classes}}}}
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), folder / f"{name}.parquet")


def splits(folder):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        write_table_as_parquet(folder / f"{name}.parquet", rows_of(0, 1))


def lists_of_images(folder):
    write_table_as_parquet(folder / "a.parquet", [{"images": [image(0)], "image": [image(0)], "caption": "a"}])


def addresses(folder):
    write_table_as_parquet(folder / "a.parquet", [{"URL": "https://a/b.jpg", "TEXT": "a"}])


def parquet_beside_tars(folder):
    write_table_as_parquet(folder / "00000.parquet", rows_of(0, 1))
    (folder / "00000.tar").write_bytes(bytes(10240))


def cut_off(folder):
    path = write_table_as_parquet(folder / "a.parquet", rows_of(0, 1))
    path.write_bytes(path.read_bytes()[:-10])


def named(name, content):
    def write(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)

    return write


@pytest.mark.parametrize(
    "write, more, words",
    [
        (lambda folder: None, [], ["there are no images here", "A folder has images"]),
        (lacking, [], ["2 of 3 files lack a column that", "a.parquet has", "b.parquet", "found: 'caption'"]),
        (other_types, [], ["b.parquet: its columns differ", "score is text, not number", "--columns"]),
        (other_columns, [], ["b.parquet: its columns differ", "width is new", "--columns"]),
        (other_classes, ["--label", "label"], ["b.parquet", "other names of classes than", "a.parquet"]),
        (splits, [], ["test and train are names of splits", "Make a set of each", "*.parquet"]),
        (lists_of_images, [], ["a.parquet: each row holds a list of images", "found: 'image'", "--image"]),
        (addresses, [], ["lists addresses of images", "img2dataset --url_list", "--url_col URL --caption_col TEXT"]),
        (parquet_beside_tars, [], ["holds webdataset shards (tar)", "00000.tar", "flip shards index"]),
        (cut_off, [], ["a parquet file without a footer", "Download or copy it again"]),
        (named("a.parquet", b"path,caption\n"), [], ["not a parquet file", "Rename it"]),
        (
            named("a.parquet", b"version https://git-lfs.github.com/spec/v1\n"),
            [],
            ["pointer of Git LFS", "git lfs pull"],
        ),
        (named("a.parquet", b"PARE" + bytes(20)), [], ["is encrypted", "without encryption"]),
        (named("a.parquet", b""), [], ["the file is empty"]),
        (named("shard.00000.mds", b""), [], ["(MDS)", "streaming.StreamingDataset"]),
        (named("data.mdb", b""), [], ["an LMDB", "parquet with the columns image and caption"]),
        (named("set.lance/data/0.lance", b""), [], ["a Lance data set", "lance.dataset("]),
        (named("a.tfrecord-00000-of-00002", b""), [], ["TFRecords", "tf.data.TFRecordDataset"]),
        (named("data-00000-of-00001.arrow", b""), [], ["save_to_disk (arrow)", "load_from_disk(", "to_parquet"]),
    ],
)
def test_make_refuses_a_folder_that_it_cannot_read(tmp_path, capsys, write, more, words):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder)
    code, text = call(capsys, "make", folder, "--out", tmp_path / "out", *more)
    assert code == 78 and all(word in text for word in words), text
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


COCO = {"info": {}, "images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}
LLAVA = [{"image": "0.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a cat"}]}]
PLAIN_LIST = [{"image": "0.png", "caption": "a cat"}]


@pytest.mark.parametrize("document, name", [(COCO, "COCO annotations"), (LLAVA, "LLaVA"), (PLAIN_LIST, "a JSON list")])
@pytest.mark.parametrize("indent", [None, 1])
def test_make_prints_the_command_that_converts_a_json_document(tmp_path, capsys, document, name, indent):
    (tmp_path / "0.png").write_bytes(encode(draw_image(0, 16)))
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(document, indent=indent))
    code, text = call(capsys, "make", path, "--out", tmp_path / "out")
    assert code == 78 and name in text, text
    command = text.partition("Convert it: ")[2].partition(", and give ")[0]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert call(capsys, "make", tmp_path / "captions.jsonl", "--out", tmp_path / "out")[0] == 0
    assert texts(tmp_path / "out") == ["a cat"]


@pytest.mark.parametrize(
    "source, words",
    [
        ("hf://datasets/nlphuji/flickr30k", "hf download nlphuji/flickr30k --repo-type dataset"),
        ("s3://bucket/set", "aws s3 cp --recursive s3://bucket/set"),
        ("https://host/captions.csv", "curl -LO https://host/captions.csv"),
        ("nothing-*.parquet", "cannot be read: No such file"),
        ("list.txt", "img2dataset --url_list"),
        ("shard.tar", "flip shards index"),
        ("set.zip", "Unpack it"),
        ("parquet.csv", "is a parquet file, its name ends with .csv. Rename it: mv parquet.csv parquet.parquet"),
        ("table.pq", "not a parquet file"),
        ("folder.csv", "the folder is empty"),
    ],
)
def test_make_names_the_way_to_sources_that_it_does_not_read(tmp_path, capsys, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    for name in ("list.txt", "shard.tar", "set.zip"):
        (tmp_path / name).write_text("https://host/a.jpg\n")
    write_table_as_parquet(tmp_path / "parquet.csv", rows_of(0, 1))
    write_table(tmp_path / "table.csv", [{"path": "0.png", "caption": "a"}]).rename(tmp_path / "table.pq")
    (tmp_path / "folder.csv").mkdir()
    code, text = call(capsys, "make", source, "--out", "out")
    if source == "folder.csv":
        words = "there are no images here"
    assert code == 78 and words in text, text
    assert not (tmp_path / "out").exists()


def test_make_refuses_several_sources_of_other_kinds_and_repeated_files(tmp_path, capsys):
    folder = write_files(tmp_path / "set", [1, 1])
    table = write_table(tmp_path / "t.csv", [{"path": "0.png", "caption": "a"}])
    code, text = call(capsys, "make", folder, table, "--out", tmp_path / "out")
    assert code == 78 and f"{table}: of several sources, each must be a parquet file" in text
    path = next(folder.iterdir())
    code, text = call(capsys, "make", folder, path, "--out", tmp_path / "out")
    assert code == 78 and "the file is named twice" in text


def test_make_names_images_option_for_rows_with_paths_only(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(encode(draw_image(0, 16)))
    rows = [{"image": {"bytes": None, "path": "0.png"}, "caption": "a"}]
    path = write_table_as_parquet(tmp_path / "tables" / "t.parquet", rows)
    code, text = call(capsys, "make", path, "--out", tmp_path / "out")
    assert code == 65 and "row 1: the image does not exist" in text and "with --images" in text, text
    assert call(capsys, "make", path, "--images", tmp_path / "pictures", "--out", tmp_path / "out")[0] == 0
    assert texts(tmp_path / "out") == ["a"]


def test_make_counts_null_images_and_lists_of_images_by_reason(tmp_path, capsys):
    rows = [*rows_of(0, 2), {"image": None, "caption": "a", "score": 0.0}]
    path = write_table_as_parquet(tmp_path / "t.parquet", rows)
    code, report = call(capsys, "make", path, "--out", tmp_path / "out", "--json")
    assert code == 0 and report["refused_by_reason"] == {"it has no image": 1}
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": ["a.png"], "caption": "a"}))
    code, text = call(capsys, "make", tmp_path / "t.jsonl", "--out", tmp_path / "no")
    assert code == 65 and "its image is a list: write a row for each image" in text


def test_make_reads_no_parquet_file_that_is_linked_from_elsewhere(tmp_path, capsys):
    """A shared folder can hold links of other users; the cache of huggingface_hub has such links, too."""
    write_files(tmp_path / "private", [1])
    folder = write_files(tmp_path / "set", [1])
    (folder / "train-00001.parquet").symlink_to(next((tmp_path / "private").iterdir()))
    code, text = call(capsys, "make", folder, "--out", tmp_path / "out")
    assert code == 78 and "lies outside of the source" in text and "name the files: " in text
    assert call(capsys, "make", f"{folder}/*.parquet", "--out", tmp_path / "out")[0] == 0


def test_make_names_the_row_with_a_repeated_key(tmp_path, capsys):
    for name in "ab":
        write_table_as_parquet(tmp_path / f"{name}.parquet", [rows_of(0, 1)[0] | {"id": "7"}])
    command = ["make", tmp_path / "a.parquet", tmp_path / "b.parquet", "--key", "id", "--out", tmp_path / "out"]
    code, text = call(capsys, *command)
    assert code == 78 and "two rows have the same key" in text and "a.parquet, row 1" in text and "'7'" in text


@pytest.mark.parametrize("name", ["000000001.jpg", "a/b c.json", "x" * 100, "x" * 101, "é.png"])
@pytest.mark.parametrize("size", [0, 511, 12345, 8**11 - 1, 8**11])
def test_headers_of_shards_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert _tar_header(name, size) == info.tobuf()


def test_make_reads_csv_with_quoted_line_breaks_and_byte_order_mark(tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(encode(draw_image(0, 16)))
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfpath,caption\r\n0.png,"a cat,\r\non a ""mat"""\r\n')
    assert call(capsys, "make", tmp_path / "t.csv", "--out", tmp_path / "out")[0] == 0
    assert texts(tmp_path / "out") == ['a cat, on a "mat"']


def test_make_takes_equal_file_names_in_several_class_folders(tmp_path, capsys):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "0.png").write_bytes(encode(draw_image(number, 16)))
    assert call(capsys, "make", tmp_path / "pets", "--out", tmp_path / "out")[0] == 0
    found = {json.loads(sample["json"])["file"]: sample["cls"] for sample in members(tmp_path / "out")}
    assert found == {"cat/0.png": b"0", "dog/0.png": b"1"}


def test_make_refuses_row_of_metadata_whose_file_is_absent(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.png").write_bytes(encode(draw_image(0, 16)))
    rows = [{"file_name": f"{n}.png", "text": "a"} for n in range(2)]
    write_table(tmp_path / "set" / "metadata.jsonl", rows)
    code, report = call(capsys, "make", tmp_path / "set", "--out", tmp_path / "out", "--json")
    (refused,) = report["refused_rows"]
    assert code == 0
    assert refused["row"].endswith("metadata.jsonl, row 2")
    assert "the image does not exist" in refused["reason"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_make_names_file_that_may_not_be_read(tmp_path, capsys):
    path = write_table_as_parquet(tmp_path / "t.parquet", rows_of(0, 1))
    Path(path).chmod(0)
    code, text = call(capsys, "make", path, "--out", tmp_path / "out")
    assert code == 78 and "the table cannot be read: Permission denied" in text
