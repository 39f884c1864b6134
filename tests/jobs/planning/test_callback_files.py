"""Tests of the checks of monitor.callbacks before a submission: the file is read, never executed."""

import inspect
import os

import pytest

from flip.config.callback_names import ARGUMENTS, parse
from flip.runs.errors import ConfigError, PermissionDenied
from flip.training.callbacks import HOOKS, Callback
from jobs.planning import callback_files

GOOD = """
raise SystemExit("executed")

class GradNoise:
    every = 100
    values = ("noise", "scale")

    def step(self, view):
        return {"noise": self._half(view.loss)}

    def end(self, view, phase, *more):
        pass

    def _half(self, x):
        return x / 2
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_metric.py").write_text(GOOD)
    return tmp_path


def test_names_and_arguments_are_those_of_the_hooks():
    """``combine`` alone is no hook of the trainer."""
    of_hooks = {name: len(inspect.signature(getattr(Callback, name)).parameters) - 1 for name in HOOKS}
    assert {**of_hooks, "combine": 1} == ARGUMENTS


def test_read_returns_content_of_each_file_once(folder):
    (folder / "more").mkdir()
    (folder / "more" / "other.py").write_text("class A:\n    def stop(self, view): pass\nclass B(A):\n    pass\n")
    entries = ["my_metric.py:GradNoise", "more/other.py:A", "more/other.py:B"]
    assert callback_files.read(entries, folder) == {
        "my_metric.py": GOOD.encode(), "more/other.py": (folder / "more" / "other.py").read_bytes(),
    }  # fmt: skip
    assert callback_files.read([], folder) == {}


@pytest.mark.parametrize(
    "entry",
    ["my_metric.py", "GradNoise", "../my_metric.py:A", "/tmp/my_metric.py:A", "a/../b.py:A", ".a.py:A", "a.txt:A",
     "a.py:A B", "a.py:1A", "a//b.py:A", "a.py:A\n", ""],
)  # fmt: skip
def test_entry_names_file_below_sweep_and_class(entry):
    with pytest.raises(ConfigError, match=r"FILE\.py:Class"):
        parse([entry])


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two classes have this name .*GradNoise"):
        parse(["a.py:GradNoise", "b.py:GradNoise"])


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("class GradNoise", "class GradNoises", "no such class .*Did you mean GradNoises"),
        ("def step", "def on_step", "calls no method of this name .*on_step"),
        ("def step(self, view)", "def step(self)", "with 2 arguments"),
        ("def step(self, view)", "def step(self, view, more)", "with 2 arguments"),
        ("def step(self, view)", "def step(self, view, *, more)", "with 2 arguments"),
        ("def step(self, view)", "async def step(self, view)", "does not wait for `async`"),
        ("every = 100", "every = 0", "whole number from 1 .*0"),
        ("every = 100", "every = 2.5", "whole number from 1"),
        ('values = ("noise", "scale")', 'values = "noise"', "needs names of numbers"),
        ('values = ("noise", "scale")', 'values = ("noise/scale",)', "needs names of numbers"),
        ('    values = ("noise", "scale")\n', "", "step returns a number that `values` does not name .*noise"),
        ('values = ("noise", "scale")', 'values = ("scale",)', "step returns a number .*noise.*Write values = "),
        ("raise SystemExit", "raise (", "is not valid Python"),
    ],
)
def test_mistakes_are_found_without_execution(folder, before, after, message):
    assert before in GOOD
    (folder / "my_metric.py").write_text(GOOD.replace(before, after))
    with pytest.raises(ConfigError, match=message) as error:
        callback_files.read(["my_metric.py:GradNoise"], folder)
    assert error.value.code == 78 and "my_metric.py" in str(error.value)


@pytest.mark.parametrize(
    "other",
    ["values = tuple(NAMES)", "values: tuple = tuple(NAMES)", "def __init__(self):\n        self.values = NAMES"],
)
def test_values_that_are_not_written_out_are_left_to_training(folder, other):
    (folder / "my_metric.py").write_text(GOOD.replace('values = ("noise", "scale")', other))
    assert callback_files.read(["my_metric.py:GradNoise"], folder)


def test_class_without_hooks_and_missing_or_large_file_are_refused(folder):
    (folder / "my_metric.py").write_text("class GradNoise:\n    every = 1\n")
    with pytest.raises(ConfigError, match="has no method to call"):
        callback_files.read(["my_metric.py:GradNoise"], folder)
    with pytest.raises(ConfigError, match="no such file. Put it into the folder of the sweep file"):
        callback_files.read(["absent.py:GradNoise"], folder)
    (folder / "my_metric.py").write_bytes(b"#" * (callback_files.LIMIT + 1))
    with pytest.raises(ConfigError, match="more than the limit"):
        callback_files.read(["my_metric.py:GradNoise"], folder)


@pytest.mark.parametrize("linked", [False, True])
def test_file_that_others_may_write_is_refused(folder, linked):
    file = folder / "my_metric.py"
    if linked:
        (folder / "real").mkdir()
        file.rename(folder / "real" / "file.py")
        file.symlink_to(folder / "real" / "file.py")
    assert callback_files.read(["my_metric.py:GradNoise"], folder)
    os.chmod(file.resolve(), 0o666)
    with pytest.raises(PermissionDenied, match="is not trusted: every user may write to it") as error:
        callback_files.read(["my_metric.py:GradNoise"], folder)
    assert error.value.code == 77 and "chmod go-w" in str(error.value)
