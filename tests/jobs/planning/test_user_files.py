"""Tests of the files of a user's classes before a submission: pinned by hash, checked, refused; never executed."""

import os
import re
import textwrap
from pathlib import Path

import pytest

from flip.config.identity import identity
from flip.config.merge import merge
from flip.runs.errors import ConfigError, PermissionDenied
from jobs.planning import user_files

FILE = """
raise SystemExit("executed")

from flip.data.augment import AugmentationStep
from flip.optimizer_kinds import AdamW


class Mine(AdamW):
    pass


class Erase(AugmentationStep):
    purpose = 100
    count = 2

    def apply(self, view, augment, draws):
        pass


class Again(Erase):
    first = 1
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path


def configured(**settings):
    return merge([("test", {"optim.name": "mine.py:Mine", "stages": [{"name": "a"}]}), ("more", settings)])


def test_entries_are_pinned_everywhere_and_files_read_by_hash(folder):
    steps = ["mine.py:Erase"]
    asked = configured(**{"augment.steps": steps, "stages.a.augment.steps": steps, "monitor.callbacks": []})
    config = user_files.pinned(asked, folder)
    assert asked.optim.name == "mine.py:Mine", "the argument is not changed"
    name, _, digest = config.optim.name.partition("@sha256:")
    assert name == "mine.py:Mine" and len(digest) == 64
    assert config.augment.steps == config.stages[0].augment.steps == [f"mine.py:Erase@sha256:{digest}"]
    assert user_files.read(config, folder) == {f"{digest[:16]}/mine.py": FILE.encode()}
    assert user_files.paths(config, folder) == [folder / "mine.py"]
    assert len(list(user_files.described(config))) == 3
    assert user_files.pinned(configured(**{"optim.name": "muon"}), folder).optim.name == "muon"


def test_hash_of_configuration_covers_the_file(folder):
    before = identity(user_files.pinned(configured(), folder), "")["hash"]
    assert before == identity(user_files.pinned(configured(), folder), "")["hash"]
    (folder / "mine.py").write_text(FILE + "\n")
    assert before != identity(user_files.pinned(configured(), folder), "")["hash"]


def test_changed_file_is_taken_from_a_copy_or_refused(folder):
    config = user_files.pinned(configured(), folder)
    ((copy, content),) = user_files.read(config, folder).items()
    (folder / "mine.py").write_text("class Mine:\n    pass\n")
    with pytest.raises(ConfigError, match=r"optim\.name: the file has changed since the run was submitted"):
        user_files.read(config, folder)
    (folder / "copies" / copy).parent.mkdir(parents=True)
    (folder / "copies" / copy).write_bytes(content)
    assert user_files.read(config, folder, [folder / "copies"]) == {copy: content}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optim.name": "absent.py:Mine"}, r"optim\.name: no such file.*Put it into the folder of the sweep"),
        ({"optim.name": "mine.py:Min"}, r"optim\.name: the file has no such class.*Did you mean Mine"),
        ({"optim.name": "mine.py:Erase"}, r"optim\.name: is not derived from OptimizerKind"),
        ({"model.objective": "mine.py:Mine"}, r"model\.objective: is not derived from Loss"),
        ({"stages.a.text_masking": "mine.py:Mine"}, r"stages\.a\.text_masking: is not derived from TextMasking"),
        ({"augment.steps": ["mine.py:Erase", "mine.py:Again"]}, "two steps have the same draws"),
        ({"augment.steps": ["mine.py:Erase", "mine.py:Erase"]}, "two steps have the same draws"),
    ],
)
def test_mistakes_name_setting_value_and_remedy(folder, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        user_files.pinned(configured(**settings), folder)
    assert error.value.code == 78 and error.value.remedy


def test_purposes_of_flip_and_neighbours_are_refused(folder):
    (folder / "mine.py").write_text(FILE.replace("purpose = 100", "purpose = 6"))
    with pytest.raises(ConfigError, match="purpose of draws is not for classes of users"):
        user_files.pinned(configured(**{"augment.steps": ["mine.py:Erase"]}), folder)
    (folder / "helper.py").write_text("")
    for line in ("import helper", "from helper import x", "from . import y", "import os, helper.z"):
        (folder / "mine.py").write_text(f"{line}\n{FILE}")
        with pytest.raises(ConfigError, match="imports a file beside it.*Put all of it into this one file"):
            user_files.pinned(configured(), folder)


def test_example_of_the_page_is_accepted(folder):
    """Of docs/own_classes.md."""
    section = (Path(__file__).parents[3] / "docs" / "own_classes.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"(?m)(?:^    from flip(?:.*)\n)(?:(?: {4}.*)?\n)+", section)
    (folder / "mine.py").write_text(textwrap.dedent(example))
    config = user_files.pinned(configured(**{"optim.name": "adamw", "augment.steps": ["mine.py:Erase"]}), folder)
    assert config.augment.steps[0].startswith("mine.py:Erase@sha256:")


def test_file_that_others_may_write_is_refused(folder):
    os.chmod(folder / "mine.py", 0o666)
    with pytest.raises(PermissionDenied, match=r"the file of optim\.name is not trusted: every user may write to it"):
        user_files.pinned(configured(), folder)
