"""Sweep files of programs: what they mean, and what is refused."""

import pytest
import yaml

from flip.runs.errors import ConfigError
from jobs.sweeps import command_file
from jobs.workloads.loading import requested_runs

FILE = {
    "command": ["python3", "train.py", "--lr", "{lr}"],
    "set": {"lr": 0.1},
    "resume": {"folder": "out", "arguments": ["--resume", "{checkpoint}"]},
}


@pytest.fixture
def read(tmp_path):
    def read(table, *overrides, **options):
        path = tmp_path / "demo.yaml"
        path.write_text(yaml.safe_dump(table, sort_keys=False))
        return command_file.load(path, overrides, **options)

    return read


def test_grid_and_seeds_make_runs(read):
    table = {**FILE, "command": [*FILE["command"], "{seed}"], "grid": {"lr": [0.1, 0.2]}, "seeds": [0, 1]}
    sweep = read(table)
    assert sweep.names == ["lr0.1", "lr0.1-s1", "lr0.2", "lr0.2-s1"]
    assert sweep.runs[3].parameters == {"lr": 0.2, "seed": 1}
    assert sweep.runs[3].differs == {"lr": 0.2, "seed": 1}
    assert [run.name for run in read(table, only="*-s1").runs] == ["lr0.1-s1", "lr0.2-s1"]
    assert [run.name for run in read({**table, "where": ["lr > 0.1"]}).runs] == ["lr0.2", "lr0.2-s1"]


def test_command_line_sets_parameters_and_resources(read):
    (run,) = read(FILE, "lr=0.5", "resources.processes=2").runs
    assert run.parameters == {"lr": 0.5} and run.resources.processes == 2


def test_words_are_kept_as_they_are(read):
    words = ["python3", "a b", "line\nbreak", "$HOME", '{"a": {"b": 1}}', 5, "{lr}"]
    (run,) = read({**FILE, "command": words}).runs
    assert run.program.argv == ("python3", "a b", "line\nbreak", "$HOME", '{"a": {"b": 1}}', "5", "{lr}")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"command": "python train.py {lr}"}, "needs a list of words: no shell splits a text"),
        ({"command": []}, "names no program"),
        ({"command": ["python3", True, "{lr}"]}, "is not a word"),
        ({"command": ["python3", "a\0b", "{lr}"]}, "NUL"),
        ({"command": ["python3", "{lrr}"]}, "an unknown placeholder (found: '{lrr}'). Did you mean lr?"),
        ({"command": ["python3", "{lr}", "{checkpoint}"]}, "exists from the second attempt on"),
        ({"command": ["python3"]}, "the parameter lr is in no word of the command"),
        ({"set": {"lr": [1, 2]}}, "needs text, a number, or true or false"),
        ({"set": {"run": 1}}, "it is a placeholder of the launcher"),
        ({"set": {"a.b": 1}}, "not the name of a parameter"),
        ({"recipe": "paper"}, "A program has no recipe"),
        ({"resumes": {}}, "Did you mean resume"),
        ({"resume": {"arguments": ["-r"]}}, "need `folder`"),
        ({"resume": {"folder": "out", "number": "("}}, "is no regular expression"),
        ({"resume": {"folder": "out", "pattern": "../*"}}, "is not a pattern below `folder`"),
        ({"metrics": {"pattern": "loss (?P<loss>.*)"}}, "has no named group for the position"),
        ({"metrics": {"pattern": "epoch (?P<epoch>.*)"}}, "counts epochs alone, whose length is unknown"),
        ({"metrics": {"file": "a", "pattern": "(?P<step>.)"}}, "names several sources"),
        ({"metrics": {"names": {"los": "x"}}}, "no such metric (found: 'los'). Did you mean loss?"),
        ({"stop": {"signal": "KILL"}}, "One of: TERM, USR1, USR2."),
        ({"env": {"A B": "x"}}, "not the name of an environment variable"),
        ({"code": "nowhere"}, "no such folder"),
        ({"resources": {"processes": 0}}, "must be at least 1"),
        ({"evaluate": {"pattern": "x"}}, "needs `command`"),
        ({"evaluate": {"command": ["./score"], "pattern": "(?P<name>.)"}}, "has no group named score"),
        ({"evaluate": {"command": ["{checkpoint}"]}, "resume": {}}, "needs resume.folder"),
        ({"resume": {"folder": "/data/out"}, "grid": {"lr": [1, 2]}}, "would save into the same folder"),
    ],
)
def test_bad_file_is_refused(read, changes, message):
    with pytest.raises(ConfigError) as error:
        read({**FILE, **changes})
    assert message in str(error.value)


def test_runs_with_folders_of_their_own_are_accepted(read):
    for folder in ("/data/{lr}", "{run}/out", "out"):
        read({**FILE, "resume": {"folder": folder}, "grid": {"lr": [1, 2]}})


def test_program_runs_beside_trainings(tmp_path):
    path = tmp_path / "mixed.yaml"
    entry = {**FILE, "grid": {"lr": [0.1, 0.2]}}
    table = {"recipe": "portable", "runs": {"half": {"stages.pretrain.mask": 0.5}}, "commands": {"other": entry}}
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    sweep = requested_runs(path)
    assert [run.name for run in sweep.runs] == ["half", "other-lr0.1", "other-lr0.2"]
    assert [run.name for run in requested_runs(path, only="other*").runs] == ["other-lr0.1", "other-lr0.2"]
    table["commands"] = {"half": FILE}
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    with pytest.raises(ConfigError, match="a run has this name already"):
        requested_runs(path)
