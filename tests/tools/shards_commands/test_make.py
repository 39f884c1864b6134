"""Tests of shards make: manifests from each kind of source, rejected images, and no partial output after errors."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flip.data.manifest import build
from flip.data.manifest.manifest import Manifest
from flip.data.sample_members import label_of
from flip.evaluation.datasets import catalog
from flip.evaluation.datasets.catalog import DatasetRequest
from flip.evaluation.datasets.prompts import Prompts
from tests.flip.data.manifest.test_filters import samples
from tests.harness.common import ROOT
from tests.synthetic import draw_image, encode
from tests.tools.commands.test_shards_cli import call
from tools.commands.shards import main
from tools.shards_commands import make, source_files


@pytest.fixture
def images(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(encode(draw_image(i, 16)))
    return tmp_path / "pictures"


def members(folder):
    """Return the samples of a manifest in order, each as a map from extension to bytes."""
    return [sample for chunk in samples(Manifest.load(folder)) for sample in chunk]


def write_table(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8-sig")
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_make_reads_table_of_image_paths(images, tmp_path, capsys, kind):
    rows = [{"Filepath": f"{i}.png", "text": f"number  {i}, ", "source": "here"} for i in range(5)]
    table = write_table(images / f"t.{kind}", rows)
    out = tmp_path / "out"
    code, report = call(capsys, "make", table, "--out", out, "--per-shard", 2, "--json")
    assert code == 0 and (report["rows"], report["refused"], report["samples"], report["shards"]) == (5, 0, 5, 3)
    assert report["manifest"] == str(out)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]
    written = members(out)
    assert [sample["txt"].decode() for sample in written] == [f"number {i}," for i in range(5)]
    assert [sample["png"] for sample in written] == [encode(draw_image(i, 16)) for i in range(5)]
    assert [json.loads(sample["json"]) for sample in written] == [
        {"file": f"{i}.png", "source": "here"} for i in range(5)
    ]


def test_make_writes_equal_bytes_from_equal_sources(images, tmp_path, capsys):
    table = write_table(tmp_path / "t.csv", [{"path": f"{i}.png", "caption": f"{i}"} for i in range(5)])
    for name in ("a", "b"):
        command = ["make", table, "--images", images, "--out", tmp_path / name, "--per-shard", 2]
        assert call(capsys, *command)[0] == 0
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1] and "00002.tar" in contents[0]


@pytest.mark.long
def test_make_writes_equal_bytes_with_several_processes(images, tmp_path, capsys, monkeypatch):
    table = write_table(images / "t.csv", [{"path": f"{i % 7}.png", "caption": f"{i}"} for i in range(30)])
    for few, name in ((100, "a"), (10, "b")):
        monkeypatch.setattr(make, "FEW", few)
        assert call(capsys, "make", table, "--out", tmp_path / name, "--per-shard", 4)[0] == 0
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1] and len(members(tmp_path / "a")) == 22


@pytest.mark.parametrize("form", ["bytes", "datasets"])
def test_make_reads_images_labels_and_keys_from_parquet(tmp_path, capsys, form):
    images = [encode(draw_image(i, 16), "jpg") for i in range(4)]
    wrapped = [image if form == "bytes" else {"bytes": image, "path": None} for image in images]
    rows = [{"image": image, "class": [10, 9, 10, 9][i], "id": f"x/{i}"} for i, image in enumerate(wrapped)]
    table = write_table(tmp_path / "t.parquet", rows)
    templates = ["--template", "a {label}", "--template", "the {}"]
    command = ["make", table, "--label", "class", "--key", "id", *templates, "--out", tmp_path / "out"]
    assert call(capsys, *command)[0] == 0
    written = members(tmp_path / "out")
    assert [(sample["jpg"], sample["cls"]) for sample in written] == list(
        zip(images, [b"1", b"0", b"1", b"0"], strict=True)
    )
    assert written[0]["txt"] == b"a 10\nthe 10" and "json" not in written[0]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {
        "names": ["9", "10"], "templates": ["a {}", "the {}"],
    }  # fmt: skip
    code, text = call(capsys, "inspect", tmp_path / "out", "--id", 3)
    assert code == 0 and "x/3" in text


def test_make_stores_jpeg_of_several_images_as_jpg(images, tmp_path, capsys):
    """Cameras and telephones write them."""
    first, second = (Image.fromarray(draw_image(i, 16)) for i in range(2))
    first.save(images / "5.jpg", "MPO", save_all=True, append_images=[second])
    table = write_table(images / "t.csv", [{"path": "5.jpg", "caption": "a"}])
    assert call(capsys, "make", table, "--out", tmp_path / "out")[0] == 0
    assert members(tmp_path / "out")[0]["jpg"] == (images / "5.jpg").read_bytes()


LATIN1 = "Caf\xe9".encode("latin-1")


def refusals(report):
    """Return the last word of the row's name -> reason, of a report."""
    return {entry["row"].rpartition(" ")[2].rpartition("/")[2]: entry["reason"] for entry in report["refused_rows"]}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_make_refuses_rows_of_table_that_are_not_utf8(images, tmp_path, capsys, kind):
    rows = [{"path": f"{i}.png", "caption": f"a {i} WORD", "source": "b"} for i in range(4)]
    table = write_table(images / f"t.{kind}", rows)
    content = table.read_bytes().replace(b"a 1 WORD", LATIN1).replace(b"a 2 WORD", "Caf\xe9".encode())
    table.write_bytes(content)
    code, report = call(capsys, "make", table, "--out", tmp_path / "out", "--json")
    (reason,) = refusals(report).values()
    assert code == 0 and refusals(report) == {"2": reason}
    assert reason.startswith("its caption is not UTF-8: convert it, for example with iconv")
    assert [sample["txt"].decode() for sample in members(tmp_path / "out")] == ["a 0 WORD", "Caf\xe9", "a 3 WORD"]
    table.write_bytes(content.replace(b",b\r", b",\xe9\r").replace(b"\tb\r", b"\t\xe9\r").replace(b'"b"', b'"\xe9"'))
    code, text = call(capsys, "make", table, "--out", tmp_path / "none")
    assert code == 65 and "its column 'source' is not UTF-8" in text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_make_reads_table_and_text_files_by_byte_order_mark(images, tmp_path, capsys, encoding):
    (images / "t.csv").write_bytes("path,caption\r\n0.png,Caf\xe9\r\n".encode(encoding))
    (images / "1.txt").write_bytes("Caf\xe9\nl\xe4n\n".encode(encoding))
    for source, text, more in ((images / "t.csv", "Caf\xe9", 0), (images, "Caf\xe9\nl\xe4n", 0.1)):
        out = tmp_path / f"of {source.name}"
        assert call(capsys, "make", source, "--out", out, "--min-complete", more)[0] == 0
        assert [sample["txt"].decode() for sample in members(out)] == [text]


def test_make_refuses_text_files_and_class_folders_that_are_not_utf8(images, tmp_path, capsys):
    for i in range(5):
        (images / f"{i}.txt").write_bytes(LATIN1 if i == 3 else "\xe9".encode())
    code, report = call(capsys, "make", images, "--out", tmp_path / "texts", "--json")
    assert code == 0 and report["samples"] == 4
    assert refusals(report)["3.png"].startswith("its text file is not UTF-8: convert it")
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "pets") + b"/caf\xe9"))
    for place in (folder, tmp_path / "pets" / "dog"):
        place.mkdir(parents=True)
        (place / "0.png").write_bytes(encode(draw_image(0, 16)))
    code, report = call(capsys, "make", tmp_path / "pets", "--out", tmp_path / "classes", "--json")
    assert code == 0 and (report["classes"], report["samples"]) == (1, 1)
    assert refusals(report)["0.png"].startswith("its folder's name is not UTF-8")


@pytest.mark.parametrize(
    "value, reason",
    [
        ("NaN", "not a finite number"),
        ("Infinity", "not a finite number"),
        ("true", "true or false"),
        ('{"en": "x"}', "an object"),
        ('["a", ["b"]]', "a list"),
        ('["a", NaN]', "not a finite number"),
        ('"\\ud800"', "UTF-8"),
    ],
)
@pytest.mark.parametrize("field", ["caption", "label"])
def test_make_refuses_captions_and_labels_that_are_no_text(images, tmp_path, capsys, value, reason, field):
    rows = [
        '{"path": "0.png", "caption": 7.5, "label": 2}',
        '{"path": "2.png", "caption": ["a", null, 3], "label": "b"}',
    ]
    bad = '{"path": "1.png", "caption": "a", "label": "c", "FIELD": VALUE}'.replace("FIELD", field).replace(
        "VALUE", value
    )
    (images / "t.jsonl").write_text("\n".join([rows[0], "", bad, rows[1]]))
    code, report = call(capsys, "make", images / "t.jsonl", "--label", "label", "--out", tmp_path / "out", "--json")
    assert code == 0 and report["refused"] == 1 and f"its {field} is" in refusals(report)["2"]
    if not (field == "label" and value.startswith("[")):
        assert reason in refusals(report)["2"]
    assert [sample["txt"].decode() for sample in members(tmp_path / "out")] == ["7.5", "a\n3"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["names"] == ["2", "b"]


def test_make_names_line_of_json_that_cannot_be_read(images, tmp_path, capsys):
    (images / "t.jsonl").write_text('{"path": "0.png", "caption": "a"}\n\n{"path": "1.png", "caption": }\n')
    code, text = call(capsys, "make", images / "t.jsonl", "--out", tmp_path / "out")
    assert code == 78 and "line 3, column 30: Expecting value" in text and "line 1" not in text


@pytest.mark.parametrize("name, mark", [("t.csv", ";"), ("t.csv", "\t"), ("t.tsv", ","), ("t.tsv", ";")])
def test_make_names_other_delimiter_of_table(images, tmp_path, capsys, name, mark):
    (images / name).write_text(f"path{mark}caption\n0.png{mark}a cat, or\ttwo; or three\n")
    code, text = call(capsys, "make", images / name, "--out", tmp_path / "out")
    names = {",": "commas", "\t": "tabs", ";": "semicolons"}
    assert code == 78 and f"separated by {names[mark]}, not by" in text and "Save it with" in text


def test_make_refuses_row_of_bytes_column_without_value(tmp_path, capsys):
    rows = [{"image": {"bytes": bytes_}, "caption": "a"} for bytes_ in (encode(draw_image(0, 16)), None)]
    table = write_table(tmp_path / "t.parquet", rows)
    code, report = call(capsys, "make", table, "--out", tmp_path / "out", "--json")
    assert code == 0 and report["refused_rows"] == [{"row": f"{table}, row 2", "reason": "it has no image"}]


def test_make_fills_empty_captions_from_labels(images, tmp_path, capsys):
    rows = [{"path": f"{i}.png", "text": ["a pet", "", None][i], "class": "b_c"} for i in range(3)]
    table = write_table(images / "t.jsonl", rows)
    assert call(capsys, "make", table, "--label", "class", "--out", tmp_path / "out")[0] == 0
    texts = [(sample["txt"], sample["cls"]) for sample in members(tmp_path / "out")]
    assert texts == [(b"a pet", b"0"), (b"a photo of a b c", b"0"), (b"a photo of a b c", b"0")]


def test_make_converts_folder_per_class_into_evaluation_set(tmp_path, capsys):
    for i in range(6):
        path = tmp_path / "pets" / ("great_dane", "cat", "cat")[i % 3] / "deeper" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw_image(i, 16), "jpg"))
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not of an image")
    code, report = call(capsys, "make", tmp_path / "pets", "--out", tmp_path / "out", "--json")
    assert code == 0 and (report["classes"], report["samples"]) == (2, 6)
    dataset = catalog.resolve_dataset(DatasetRequest("pets", path=str(tmp_path / "out")), str(tmp_path))
    assert (dataset.task, dataset.prompts) == ("zeroshot", Prompts(["cat", "great dane"], ["a photo of a {}"]))
    opened = dataset.location.open()
    for _, sample in opened.samples(range(opened.count)):
        name = json.loads(bytes(sample["json"]))["file"].partition("/")[0]
        assert label_of(sample) == ["cat", "great_dane"].index(name)
        assert bytes(sample["txt"]).decode() == f"a photo of a {name.replace('_', ' ')}"


def test_make_follows_links_to_class_folders_of_named_folder_and_leaves_out_hidden_ones(images, tmp_path, capsys):
    for name in ("pets/dog", "pets/.cache"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").write_bytes(encode(draw_image(9, 16)))
    (tmp_path / "pets" / "cat").symlink_to(images)
    (tmp_path / "pets" / "dog" / "all").symlink_to(tmp_path / "pets")
    (tmp_path / "pets" / "dog" / "gone.png").symlink_to("nothing")
    command = ["make", tmp_path / "pets", "--json", "--min-complete", 0]
    code, report = call(capsys, *command, "--images", images, "--out", tmp_path / "out")
    assert code == 0 and (report["classes"], report["samples"], report["refused"]) == (2, 6, 1)
    code, report = call(capsys, *command, "--out", tmp_path / "without")
    assert code == 0 and (report["classes"], report["samples"], report["refused"]) == (1, 1, 2)
    assert refusals(report)["cat"].startswith("the folder lies outside of the source: name a folder")


def test_make_names_folder_that_cannot_be_read(images, tmp_path, capsys):
    (images / "loop").symlink_to("loop")
    code, text = call(capsys, "make", images, "--out", tmp_path / "out")
    assert code == 78 and "the folder cannot be read: Too many levels" in text and str(images / "loop") in text


def test_make_reads_folder_of_images_and_text_files(images, tmp_path, capsys):
    for i in range(4):
        (images / f"{i}.txt").write_text(f"one {i}\n\n  two {i}\n")
    (images / ".hidden.png").write_bytes(b"")
    code, report = call(capsys, "make", images, "--out", tmp_path / "out", "--json")
    assert code == 0 and report["refused_rows"] == [{"row": f"{images}/4.png", "reason": "it has no caption"}]
    assert [sample["txt"].decode() for sample in members(tmp_path / "out")] == [f"one {i}\ntwo {i}" for i in range(4)]


@pytest.mark.parametrize("more", [["--key", "id"], ["--label", "nolabel", "--caption", "x"], ["--image", "i"]])
def test_make_refuses_columns_for_a_folder(images, capsys, more):
    code, error = call(capsys, "make", images, "--out", images.parent / "out", *more)
    assert code == 78 and all(option in error for option in more[::2]) and "a column of a table" in error


def test_make_of_images_without_texts_or_classes_says_what_a_folder_needs(images, tmp_path, capsys):
    code, text = call(capsys, "make", images, "--out", tmp_path / "out")
    assert code == 65 and "a .txt file of its name or, if none has one, a folder of its class." in text


def test_make_reports_rejected_rows_and_writes_valid_rows(images, tmp_path, capsys):
    (images / "5.png").write_bytes(encode(draw_image(1, 64))[:300])
    (images / "6.jpg").write_text("<html>")
    (images / "7.png").mkdir()
    names = ["0.png", "9.png", "5.png", "6.jpg", "7.png", "https://a/b.png", "1.png", "2.png", "3.png"]
    rows = [{"image": name, "caption": "", "key": f"k{i}"} for i, name in enumerate(names)]
    for row, text, key in zip(
        rows, ["a"] * 7 + ["b", " "], ["0", "1", "2", "3", "4", "5", "6", "a.b", "8"], strict=True
    ):
        row |= {"caption": text, "key": key}
    table = write_table(images / "t.csv", rows)
    command = ["make", table, "--key", "key", "--out", tmp_path / "out", "--per-shard", 3]
    code, text = call(capsys, *command)
    assert code == 65 and "7 of 9 images cannot be used; the first is" in text and "t.csv, row 2: the image" in text
    assert not (tmp_path / "out").exists() and {path.name for path in tmp_path.iterdir()} == {"pictures"}
    code, report = call(capsys, *command, "--min-complete", 0.2, "--json")
    assert code == 0 and report["shards"] == 2, "a shard without samples is not written"
    reasons = [entry["reason"] for entry in report["refused_rows"]]
    assert [entry["row"].rpartition(" ")[2] for entry in report["refused_rows"]] == list("2345689")
    for reason, expected in zip(
        reasons,
        ["does not exist", "truncated", "a web page", "Is a directory", "is a URL", "its key 'a.b'", "no caption"],
        strict=True,
    ):
        assert expected in reason
    assert [sample["png"] for sample in members(tmp_path / "out")] == [encode(draw_image(i, 16)) for i in (0, 1)]


@pytest.mark.parametrize(
    "rows, more, words",
    [
        ([{"photo": "0.png", "caption": "a"}], [], "no column is called image, image_path"),
        ([{"image": "0.png", "words": "a"}], [], "no column is called caption"),
        ([{"image": "0.png", "words": "a"}], ["--caption", "word"], "there is no such column"),
        ([{"image": "0.png", "caption": "a"}], ["--label", "class"], "there is no such column"),
        ([{"image": "0.png", "caption": "a"}] * 2, ["--key", "caption"], "two rows have the same key"),
        ([{"image": "0.png", "caption": "a"}], ["--template", "a photo"], "a template needs one {}"),
        ([{"image": "0.png", "caption": "a"}], ["--per-shard", "0"], "--per-shard"),
        ([{"image": "0.png", "caption": "a"}], ["--min-complete", "2"], "--min-complete: must be at most 1"),
        ([{"image": "0.png", "caption": "a"}], ["--out", "pictures"], "the folder is not empty"),
        ([{"image": "0.png", "caption": "a"}], ["--out", "pictures/0.png"], "a file is where a folder must be"),
    ],
)  # fmt: skip
def test_make_writes_nothing_if_options_or_columns_are_invalid(
    images, tmp_path, capsys, monkeypatch, rows, more, words
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    write_table(tmp_path / "t.jsonl", rows)
    code, text = call(capsys, "make", "t.jsonl", "--images", "pictures", "--out", "out", *more)
    (tmp_path / "t.jsonl").unlink()
    assert code == 78 and words in text and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name, content",
    [
        ("t.csv", ""),
        ("t.csv", "image,caption\n"),
        ("t.jsonl", "[1]\n"),
        ("t.csv", "path,text\n0.png,a cat\n1.png,a cat, or not\n"),
        ("t.jsonl", "{"),
        ("t.parquet", "no"),
        ("t.csv", None),
    ],
)
def test_make_rejects_unreadable_or_empty_table(tmp_path, capsys, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    code, text = call(capsys, "make", tmp_path / name, "--out", tmp_path / "out")
    assert code == 78 and "the table" in text and name in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["2.png\tc\n", '2.png\t"c" or d\n'])
def test_make_names_line_before_stray_quote(images, tmp_path, capsys, end):
    (images / "t.tsv").write_text(f'path\ttext\n0.png\ta cat\n1.png\t"b\n{end}')
    code, text = call(capsys, "make", images / "t.tsv", "--out", tmp_path / "out", "--min-complete", 0)
    assert code == 78 and "cannot be read after line 2" in text and "write the quote twice" in text


@pytest.mark.parametrize("name", ["1.png", "1.txt"])
def test_make_refuses_unreadable_file_but_ends_if_storage_fails(images, tmp_path, capsys, monkeypatch, name):
    for i in range(5):
        (images / f"{i}.txt").write_text("a")
    out = tmp_path / "out"
    number = errno.EIO

    def read(folder, path, read=source_files._read_below):
        if path == name:
            raise OSError(number, os.strerror(number), path)
        return read(folder, path)

    monkeypatch.setattr(source_files, "_read_below", read)
    for number in (errno.EIO, errno.ESTALE, errno.EMFILE):
        code, text = call(capsys, "make", images, "--out", out)
        assert code == 69 and f"{images / name}: the " in text and os.strerror(number) in text and not out.exists()
    number = errno.EACCES
    code, report = call(capsys, "make", images, "--out", out, "--json")
    (refused,) = report["refused_rows"]
    assert code == 0 and refused["reason"].endswith("cannot be read: Permission denied"), refused


def test_make_uses_columns_that_only_later_json_lines_have(images, tmp_path, capsys):
    rows = [{"path": "0.png"}, {"path": "1.png", "caption": "a"}, {"path": "2.png", "caption": "b", "id": 7}]
    code, report = call(capsys, "make", write_table(images / "t.jsonl", rows), "--out", tmp_path / "out", "--json")
    assert code == 0 and [entry["reason"] for entry in report["refused_rows"]] == ["it has no caption"]
    written = members(tmp_path / "out")
    assert [sample["txt"] for sample in written] == [b"a", b"b"]
    assert json.loads(written[1]["json"]) == {"file": "2.png", "id": 7}


def test_make_refuses_key_that_webdataset_skips(images, tmp_path, capsys):
    rows = [{"path": f"{i}.png", "caption": "a", "key": key} for i, key in enumerate(["__a__/1", "__a__", "b/__a__/1"])]
    table = write_table(images / "t.csv", rows)
    code, report = call(capsys, "make", table, "--key", "key", "--out", tmp_path / "out", "--json")
    (refused,) = report["refused_rows"]
    assert code == 0 and report["samples"] == 2 and "its key '__a__/1' is in a folder __x__" in refused["reason"]


def test_make_reports_output_whose_folder_cannot_be_looked_up(images, tmp_path, capsys):
    table = write_table(images / "t.csv", [{"path": "0.png", "caption": "a"}])
    code, text = call(capsys, "make", table, "--out", tmp_path / ("x" * 300))
    assert code == 69 and "cannot be written: File name too long" in text


def test_make_leaves_no_output_if_terminated(images, tmp_path):
    table = write_table(images / "t.csv", [{"path": "0.png", "caption": "a"}])
    script = (
        "import os, signal, sys, time; from jobs.common.cli import run_main\n"
        "from tools.commands.shards import main; from tools.shards_commands import make\n"
        "make.build.index = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60)\n"
        "sys.exit(run_main(lambda: main(['make', *sys.argv[1:]])))"
    )
    command = [sys.executable, "-c", script, table, "--out", tmp_path / "out"]
    assert subprocess.run(command, cwd=ROOT).returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_make_leaves_no_output_if_disk_is_full(images, tmp_path, capsys, monkeypatch):
    table = write_table(images / "t.csv", [{"path": "0.png", "caption": "a"}])

    def fail(shards, folder, *_, **__):
        build.part_folder(folder).mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make.build, "index", fail)
    code, text = call(capsys, "make", table, "--out", tmp_path / "out")
    assert code == 69 and "No space left" in text and [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_make_refuses_files_outside_of_source(images, tmp_path, capsys):
    """A link or path of another person must not bring a private file into shards that all can read."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.txt").write_text("a password")
    (tmp_path / "private" / "secret.png").write_bytes(encode(draw_image(7, 16)))
    for i in range(5):
        (images / f"{i}.txt").write_text(f"text {i}")
    (images / "3.txt").unlink()
    (images / "3.txt").symlink_to("../private/secret.txt")
    (images / "4.png").unlink()
    (images / "4.png").symlink_to(tmp_path / "private" / "secret.png")
    (images / "0.png").rename(images / "inside.PNG")
    (images / "0.png").symlink_to("inside.PNG")  # a link inside of the source
    code, report = call(capsys, "make", images, "--out", tmp_path / "folder", "--json")
    assert code == 0 and report["samples"] == 3
    reasons = refusals(report)
    assert reasons.pop("inside.PNG") == "it has no caption" and set(reasons) == {"3.png", "4.png"}
    assert reasons["3.png"].startswith("the text file lies outside of the source: name a folder that contains it with")
    assert reasons["4.png"].startswith("the image lies outside of the source")

    paths = [
        "1.png",
        "../private/secret.png",
        str(tmp_path / "private" / "secret.png"),
        "4.png",
        str(images / "2.png"),
    ]
    rows = [{"path": path, "caption": "a"} for path in paths]
    table = write_table(images / "t.csv", rows)
    command = ["make", table, "--json", "--min-complete", 0]
    code, report = call(capsys, *command, "--out", tmp_path / "table")
    assert code == 0
    assert set(refusals(report)) == {"2", "3", "4"}
    assert report["refused_by_reason"] == {
        reason: 3 for reason in refusals(report).values()
    }  # fmt: skip
    code, report = call(capsys, *command, "--images", tmp_path / "private", "--out", tmp_path / "both")
    assert code == 0 and set(refusals(report)) == {"1", "4"}, "names are relative to --images; its files are allowed"

    table = write_table(
        images / "t.parquet", [{"image": {"bytes": None, "path": path}, "caption": "a"} for path in paths]
    )
    code, report = call(capsys, "make", table, "--json", "--min-complete", 0, "--out", tmp_path / "parquet")
    assert code == 0 and set(refusals(report)) == {"2", "3", "4"}
    texts = b"".join(path.read_bytes() for path in tmp_path.glob("*/*.tar"))
    assert b"password" not in texts


def test_make_opens_no_link_that_replaces_file_while_it_reads(images, tmp_path, capsys, monkeypatch):
    """Between the check of a path and its opening another process exchanges the file, or a folder above it."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "0.png").write_bytes(encode(draw_image(7, 16)))
    (images / "below").mkdir()
    (images / "below" / "0.png").write_bytes(encode(draw_image(6, 16)))
    rows = [{"path": path, "caption": "a"} for path in ("0.png", "below/0.png", "1.png")]
    table = write_table(images / "t.csv", rows)

    def read(folder, path, read=source_files._read_below):
        if path == "0.png":
            (images / path).unlink()
            (images / path).symlink_to(tmp_path / "private" / "0.png")
        if path == "below/0.png":
            (images / "below").rename(tmp_path / "moved")
            (images / "below").symlink_to(tmp_path / "private")
        return read(folder, path)

    monkeypatch.setattr(source_files, "_read_below", read)
    code, report = call(capsys, "make", table, "--json", "--min-complete", 0, "--out", tmp_path / "out")
    assert code == 0 and set(refusals(report)) == {"1", "2"} and report["samples"] == 1


def test_make_that_loses_against_another_one_ends_with_78(images, tmp_path, capsys, monkeypatch):
    table = write_table(images / "t.csv", [{"path": "0.png", "caption": "a"}])
    out = tmp_path / "out"

    def index(*arguments, index=make.build.index, **options):
        monkeypatch.setattr(make.build, "index", index)
        assert main(["make", str(table), "--out", str(out)]) == 0  # the winner
        return index(*arguments, **options)

    monkeypatch.setattr(make.build, "index", index)
    code, text = call(capsys, "make", table, "--out", out)
    assert code == 78 and "there is a manifest already" in text
    assert len(members(out)) == 1 and {path.name for path in tmp_path.iterdir()} == {"pictures", "out"}


def test_make_splits_off_evaluation_set_by_name(images, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    for i in range(40):
        (tmp_path / "more" / f"{i}.png").write_bytes(encode(draw_image(i, 16)))
    rows = [{"path": f"{i % 40}.png", "caption": f"text {i}", "class": "ab"[i % 2]} for i in range(80)]
    table = write_table(tmp_path / "more" / "t.csv", rows)
    command = ["make", table, "--label", "class", "--split", 0.25, "--per-shard", 7, "--json"]
    code, report = call(capsys, *command, "--out", tmp_path / "out")
    assert code == 0 and report["rows"] + report["test"]["rows"] == 80 and 8 <= report["test"]["samples"] <= 32
    names = [
        {json.loads(sample["json"])["file"] for sample in members(tmp_path / "out" / name)} for name in ("", "test")
    ]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 40, "both captions of an image are in one set"
    classes = [(tmp_path / "out" / name / "classes.json").read_text() for name in ("", "test")]
    assert classes[0] == classes[1]
    write_table(table, [{"path": "new.png", "caption": "new", "class": "c"}, *rows])
    (tmp_path / "more" / "new.png").write_bytes(encode(draw_image(50, 16)))
    assert call(capsys, *command, "--out", tmp_path / "again")[0] == 0
    test = {json.loads(sample["json"])["file"] for sample in members(tmp_path / "again" / "test")}
    assert test - {"new.png"} == names[1], "a new row moves no other"
    dataset = catalog.resolve_dataset(DatasetRequest("more", path=str(tmp_path / "out")), str(tmp_path))
    assert dataset.location.manifest == str(tmp_path / "out" / "test") and dataset.prompts.names == ["a", "b"]


@pytest.mark.parametrize("split", ["0", "1", "-0.5", "1e-9"])
def test_make_refuses_split_without_two_sets(images, tmp_path, capsys, split):
    table = write_table(images / "t.csv", [{"path": f"{i}.png", "caption": "a"} for i in range(4)])
    code, text = call(capsys, "make", table, f"--split={split}", "--out", tmp_path / "out")
    assert code == (65 if split == "1e-9" else 78) and "--split" in text
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_make_counts_transparent_turned_and_duplicate_images(images, tmp_path, capsys):
    opaque, clear = (Image.new("RGBA", (16, 16), (9, 9, 9, alpha)) for alpha in (255, 0))
    opaque.save(images / "opaque.png")
    clear.save(images / "clear.png")
    Image.new("P", (16, 16), 0).save(images / "palette.gif", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw_image(8, 16)).save(images / "turned.jpg", exif=exif)
    (images / "copy.png").write_bytes((images / "1.png").read_bytes())
    for path in list(images.iterdir()):
        path.with_suffix(".txt").write_text("a")
    code, report = call(capsys, "make", images, "--out", tmp_path / "out", "--json")
    expected = {"transparent": 2, "turned": 1, "duplicates": 1}
    assert code == 0 and {name: report[f"{name}_pictures"] for name in expected} == expected
    assert Manifest.load(tmp_path / "out").settings["pictures"] == expected
    code, text = call(capsys, "make", images, "--out", tmp_path / "again")
    assert "set data.to_rgb: flatten" in text and "set data.exif: apply" in text


def class_label_table(path, feature, labels):
    """Write a parquet file as Hugging Face's ``datasets`` does, which stores the features in its schema."""
    table = pa.table({"image": [{"bytes": encode(draw_image(i, 16)), "path": None} for i in range(len(labels))]})
    table = table.append_column("label", pa.array(labels))
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    return path


def test_make_names_classes_by_the_schema_of_datasets(tmp_path, capsys):
    """Captions were "a photo of a 1"."""
    feature = {"names": ["tabby_cat", "dog"], "_type": "ClassLabel"}
    path = class_label_table(tmp_path / "t.parquet", feature, [1, 0, -1, 2, None])
    code, report = call(
        capsys, "make", path, "--label", "label", "--min-complete", 0, "--out", tmp_path / "out", "--json"
    )
    assert code == 0
    assert [row["reason"] for row in report["refused_rows"]] == [
        "it has no label",
        "its label is a number without a name in the schema",
        "it has no label",
    ]
    assert [sample["txt"].decode() for sample in members(tmp_path / "out")] == [
        "a photo of a dog",
        "a photo of a tabby cat",
    ]
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["names"] == ["dog", "tabby cat"]


@pytest.mark.parametrize("feature", [{"_type": "Value", "dtype": "int64"}, None, "ClassLabel"])
def test_make_takes_numbers_that_are_no_class_label_as_they_are(tmp_path, capsys, feature):
    path = class_label_table(tmp_path / "t.parquet", feature, [1, 0])
    assert call(capsys, "make", path, "--label", "label", "--out", tmp_path / "out")[0] == 0
    assert [sample["txt"].decode() for sample in members(tmp_path / "out")] == ["a photo of a 1", "a photo of a 0"]


def test_make_refuses_class_label_without_names(tmp_path, capsys):
    path = class_label_table(tmp_path / "t.parquet", {"_type": "ClassLabel", "names": None}, [1, 0])
    code, text = call(capsys, "make", path, "--label", "label", "--out", tmp_path / "out")
    assert code == 78 and "the schema has no names of the classes of this column" in text and "label" in text
