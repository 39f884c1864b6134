"""Tests of the tokenizer command: training, captions from JSON members, errors, and fast help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset

from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest
from flip.runs.errors import ConfigError
from flip.tokenizer import Tokenizer
from tests.synthetic import caption, draw_image, encode, make_dataset, make_tokenizer
from tools.commands import tokenizer
from tools.shards_commands.manifest import excepting

ROOT = Path(__file__).resolve().parents[3]


def test_train_yields_equal_tokenizers_from_lines_and_manifest(tmp_path, capsys):
    data = make_dataset(tmp_path / "data", samples=30, shards=2)
    lines = tmp_path / "captions.txt"
    lines.write_text("\n".join(caption(i) for i in range(30)) + "\n")
    for source, out in ((data, "a.json"), (lines, "b.json")):
        command = ["train", "--captions", str(source), "--vocabulary", "120", "--out", str(tmp_path / out), "--json"]
        assert tokenizer.main(command) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["captions"] == 60 and report["entries"] == Tokenizer(tmp_path / out, 32, True).size
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert tokenizer.main(command) == 78  # it never overwrites a file
    assert "already exists" in capsys.readouterr().err
    assert tokenizer.main(["show", str(tmp_path / "a.json"), "red square"]) == 0
    assert "red:" in capsys.readouterr().out


def test_vocabulary_without_room_for_words_is_refused(tmp_path, capsys):
    """The characters of the captions were entries all the same, more than --vocabulary."""
    lines = tmp_path / "captions.txt"
    lines.write_text("red square\n" * 9)
    words = ["train", "--captions", str(lines), "--out", str(tmp_path / "t.json"), "--vocabulary"]
    # 7 letters, 6 of them inside of words, and 5 special tokens
    assert tokenizer.main([*words, "18"]) == 78
    assert "have 7 different characters" in (error := capsys.readouterr().err) and "more than 18" in error
    assert not (tmp_path / "t.json").exists()
    assert tokenizer.main([*words, "19"]) == 0 and Tokenizer(tmp_path / "t.json", 32, True).size == 19


@pytest.mark.parametrize("kind", ["png", "jpg", "utf-16"])
def test_train_refuses_captions_that_are_no_text(tmp_path, capsys, kind):
    """Bytes of an image became words of a vocabulary."""
    path = tmp_path / f"captions.{kind}"
    if kind == "utf-16":
        path.write_text("a photo of a cat\n", encoding="utf-16")
    else:
        path.write_bytes(encode(draw_image(3, 32), kind))
    out = tmp_path / "tokenizer.json"
    assert tokenizer.main(["train", "--captions", str(path), "--vocabulary", "300", "--out", str(out)]) == 78
    error = capsys.readouterr().err
    assert f"{path}: not a text file" in error and "one caption per line" in error and not out.exists()
    lines = tmp_path / "latin-1.txt"
    lines.write_bytes("a caf\xe9\n".encode("latin-1"))
    assert list(tokenizer.captions(str(lines), "txt")) == ["a caf\ufffd"]


def test_captions_of_excluded_samples_are_left_out(tmp_path):
    data = make_dataset(tmp_path / "data", samples=30, shards=2)
    every = list(tokenizer.captions(str(data), "txt"))
    excepting(Manifest.load(data), {0: "bad", 29: "bad"}, str(tmp_path / "less"))
    assert list(tokenizer.captions(str(tmp_path / "less"), "txt")) == every[2:-2], "a sample has two captions"
    manifest = Manifest.load(data)
    chunk = manifest.chunk_ids(0)
    (key, start, stop, _), *_ = manifest.chunk_reads(0)
    with open(key, "r+b") as file:
        file.seek(start)
        file.write(bytes(stop - start))
    excepting(manifest, dict.fromkeys(chunk, "damaged"), str(tmp_path / "rest"))
    assert list(tokenizer.captions(str(tmp_path / "rest"), "txt")) == every[2 * len(chunk) :]


def test_captions_in_json_member_require_field_name(tmp_path):
    data = make_dataset(tmp_path / "data", samples=30, shards=2)  # every third sample has a JSON member {"number": n}
    with pytest.raises(ConfigError, match="json:caption"):
        list(tokenizer.captions(str(data), "json"))
    assert list(tokenizer.captions(str(data), "json:number")) == []


def test_captions_are_read_from_field_of_json_member(tmp_path):
    shard = tmp_path / "0.tar"
    with webdataset.TarWriter(str(shard), mtime=0) as writer:
        for i in range(3):
            image = encode(draw_image(i, 32, 0), "png")
            writer.write({"__key__": str(i), "png": image, "txt": "other", "json": {"caption": caption(i)}})
    index([str(shard)], tmp_path / "manifest", chunk=2)
    read = list(tokenizer.captions(str(tmp_path / "manifest"), "json:caption"))
    assert read == [caption(i).replace("\n", " ") for i in range(3)], "a field is one caption"


@pytest.mark.parametrize("command", [["train", "--vocabulary", "120"], ["table", "tokenizer.json"]])
def test_train_and_table_refuse_data_without_captions(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    data = make_dataset(tmp_path / "data", samples=30, shards=2)
    make_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.main([*command, "--captions", str(data), "--member", "text", "--out", "out.json"]) == 78
    assert "no captions found" in (error := capsys.readouterr().err) and "--member" in error
    assert not (tmp_path / "out.json").exists()


def test_train_rejects_unwritable_output_path(tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("a\u2028b\r\n\nc\n", newline="")
    assert list(tokenizer.captions(str(tmp_path / "lines.txt"), "txt")) == ["a\u2028b", "c"]
    out = tmp_path / "lines.txt" / "t.json"
    command = ["train", "--captions", str(tmp_path / "lines.txt"), "--vocabulary", "99", "--out", str(out)]
    assert tokenizer.main(command) == 78
    assert "a file is where a folder must be" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train", "--vocabulary", "120"], ["table", "tokenizer.json"]])
def test_train_and_table_check_output_before_reading_and_never_overwrite_it(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    make_tokenizer(tmp_path / "tokenizer.json")
    for out, code, words in (("tokenizer.json/t", 78, "a file is where a folder"), ("x" * 300, 69, "name too long")):
        assert tokenizer.main([*command, "--captions", "nowhere", "--out", out]) == code
        assert words in capsys.readouterr().err

    def captions(*_):
        Path("new/out.json").write_text("of another command")
        yield "a cat"

    monkeypatch.setattr(tokenizer, "captions", captions)
    assert tokenizer.main([*command, "--captions", "captions", "--out", "new/out.json"]) == 78
    assert "already exists" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in Path("new").iterdir()] == [("out.json", "of another command")]


def test_show_escapes_control_characters_and_surrogates(tmp_path, capsys):
    make_tokenizer(tmp_path / "tokenizer.json")
    command = ["show", str(tmp_path / "tokenizer.json"), "red\x1b[2J\udce9"]
    assert tokenizer.main(command) == 0
    assert capsys.readouterr().out.startswith("red\\x1b[2J\\udce9: ")
    assert tokenizer.main([*command, "--json"]) == 0
    (text,) = json.loads(out := capsys.readouterr().out)
    assert text == command[2] and out.isascii()


@pytest.mark.parametrize("tool", ["tokenizer", "predict", "export"])
def test_tool_help_imports_no_large_packages(tool):
    script = (
        "import sys\n"
        "from jobs.__main__ import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "finally: assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, tool]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "examples:" in done.stdout, done.stderr
