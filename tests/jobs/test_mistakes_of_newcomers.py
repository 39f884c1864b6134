"""Mistakes in sweep files and command lines that newcomers made: each is understood, or named with its remedy."""

import json
import re
import subprocess
import sys

import pytest

from jobs.commands import submit
from tests.jobs.submitted_runs import test_resubmit

desk = test_resubmit.desk


def fails(capsys, *words):
    assert submit.main(list(words)) == 78
    return capsys.readouterr().err


def test_two_sweep_files_of_one_name_are_told_apart(desk, capsys):
    assert desk("mine.yaml") == ["half"]
    other = desk.folder / "away" / "mine.yaml"
    other.write_text((desk.folder / "mine.yaml").read_text())
    assert submit.main([str(other), "--dry-run"]) == 0, "a copy is the same sweep"
    capsys.readouterr()
    other.write_text(other.read_text().replace("0.5", "0.75"))
    for words in ((str(other),), (str(other), "--dry-run")):
        shown = fails(capsys, *words)
        assert f"its runs have the folder of another sweep file, {desk.folder / 'mine.yaml'}" in shown
        assert "another `name`" in shown and "--root" in shown
    (desk.folder / "mine.yaml").unlink()
    assert "holds another configuration" in fails(capsys, str(other)), "a file that was moved is the sweep file now"
    other.write_text(other.read_text().replace("0.75", "0.5"))
    assert desk(str(other)) == ["half"]


def test_several_names_after_only(desk, capsys):
    runs = "runs: {a: , b: {optim.beta2: 0.9}, c: {optim.beta2: 0.8}}\nseeds: [0, 1]"
    text = (desk.folder / "mine.yaml").read_text()
    (desk.folder / "mine.yaml").write_text(text.replace("runs: {half: }", runs))
    assert desk("mine.yaml", "--only", "a", "b*", "stages.pretrain.samples=64") == ["a", "b", "b-s1"]
    shown = fails(capsys, "mine.yaml", "--only", "a", "d")
    assert "no run of the sweep matches (found: 'd')" in shown


def test_huge_numbers_are_short(desk, capsys):
    assert "(found: 1e300)" in fails(capsys, "mine.yaml", "stages.pretrain.samples=1e300")


def test_true_means_yes(desk, capsys):
    for word in ("compute.compile=true", "compute.compile=yes"):
        assert submit.main(["mine.yaml", "--dry-run", "--json", word]) == 0
    first, second = capsys.readouterr().out.split("\n}\n")[:2]
    assert json.loads(first + "}")["runs"][0]["identity"] == json.loads(second + "}")["runs"][0]["identity"]


def test_stages_as_mapping_of_fields(desk, capsys):
    shown = fails(capsys, "mine.yaml", "stages={samples: 48, batch: 16}")
    assert "these are fields of one member: samples, batch" in shown and "stages: [{name: NAME, samples: ...}]" in shown


def test_default_is_called_a_default(desk, capsys):
    text = (desk.folder / "mine.yaml").read_text()
    text = re.sub("stages: .*", "stages: {pretrain: {samples: 48, batch: 16, mask: 0.5}, unmasked: null}", text)
    (desk.folder / "mine.yaml").write_text(text.replace("name: other", "name: other\nrecipe: portable"))
    shown = fails(capsys, "mine.yaml")
    assert "stages.pretrain.warmup: longer than" in shown and "It is a default value, of the recipe" in shown
    shown = fails(capsys, "mine.yaml", "stages.pretrain.warmup=96")
    assert "stages.pretrain.warmup: longer than" in shown and "default value" not in shown


@pytest.mark.parametrize("name", ["status", "submit"])
def test_deleted_current_folder(tmp_path, name):
    from tests.harness.common import ROOT

    folder = tmp_path / "gone"
    folder.mkdir()
    start = 'cd "$1"; rmdir "$1"; exec "$2" "$3" "$4" x'
    words = ["sh", "-c", start, "sh", str(folder), sys.executable, str(ROOT / "jobs"), name]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (78, "")
    assert "the current folder has been deleted" in done.stderr and "Traceback" not in done.stderr
