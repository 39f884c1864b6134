"""Tests of the output file of the prompts command."""

from flip.evaluation.datasets import prompts
from tools.commands.prompts import main


def test_prompts_creates_folder_and_never_overwrites_other_content(tmp_path, capsys):
    for name, text in zip(prompts.WDS, ("cat\ndog\n", "a photo of a {c}\n"), strict=True):
        (tmp_path / name).write_text(text)
    out = tmp_path / "new" / "classes.json"
    for _ in range(2):
        assert main([str(tmp_path), "--out", str(out)]) == 0
        assert prompts.read_prompts(str(out)) == prompts.read_folder(tmp_path)
    out.write_text("notes")
    assert main([str(tmp_path), "--out", str(out)]) == 78 and out.read_text() == "notes"
    assert "already exists, with other content" in capsys.readouterr().err
    for path in (tmp_path, out / "below.json"):
        assert main([str(tmp_path), "--out", str(path)]) == 78
        assert "a file is where a folder must be" in capsys.readouterr().err
