"""Tests of flip/common/user_classes.py: classes in files of a user are checked by their text and executed by hash."""

import hashlib
import pickle

import numpy as np
import pytest

from flip.common import user_classes
from flip.common.user_classes import UserClass, parse
from flip.data.augment import AUGMENTATIONS, AugmentationStep
from flip.data.text_masking import Captions, TextMasking
from flip.loss_kinds import LOSSES, Loss
from flip.optimizer_kinds import OPTIMIZERS, AdamW, OptimizerKind
from flip.runs.errors import ConfigError, StorageError

STEP = b"""
from flip.data.augment import AugmentationStep


class Erase(AugmentationStep):
    purpose = 100
    count = 2

    def apply(self, view, augment, draws):
        view.changes.append(lambda pixels: pixels * 0)
"""
MASKING = b"""
import numpy as np

from flip.data.text_masking import TextMasking


class Backwards(TextMasking):
    def ranks(self, captions):
        return np.broadcast_to(-np.arange(captions.tokens.shape[1]), captions.tokens.shape)
"""


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Puts a file into the snapshot of a run, and returns the entry of a class in it."""
    monkeypatch.setenv("FLIP_SNAPSHOT", str(tmp_path))

    def copy(text, cls, file="mine.py"):
        name = UserClass(file, cls, hashlib.sha256(text).hexdigest())
        path = tmp_path / user_classes.FOLDER / name.copy
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        return name

    return copy


def test_entries_have_one_form_with_and_without_hash():
    assert parse("a/b.py:C", "optim.name") == ("a/b.py", "C", "")
    digest = "0" * 64
    name = parse(f"b.py:C@sha256:{digest}", "optim.name")
    assert name == ("b.py", "C", digest) and str(name) == f"b.py:C@sha256:{digest}"
    assert name.copy == f"{'0' * 16}/b.py"
    for wrong in ("b.py", "../b.py:C", "/b.py:C", "b.py:C@sha256:00", f"b.py:C@md5:{digest}", "adamw", "b.py:C\n"):
        assert not user_classes.is_entry(wrong)
        with pytest.raises(ConfigError, match=r"optim\.name: needs FILE\.py:Class"):
            parse(wrong, "optim.name")


def test_row_of_table_precedes_and_user_class_is_one_object(copied):
    assert user_classes.named("adamw", OPTIMIZERS, OptimizerKind) is OPTIMIZERS["adamw"]
    entry = str(copied(STEP, "Erase"))
    step = user_classes.named(entry, AUGMENTATIONS, AugmentationStep)
    assert isinstance(step, AugmentationStep) and step.count == 2
    assert user_classes.named(entry, AUGMENTATIONS, AugmentationStep) is step


def test_object_reaches_a_loader_process(copied):
    """A process that has not imported the file executes it by path and hash."""
    entry = str(copied(MASKING, "Backwards"))
    sent = pickle.dumps(user_classes.load(entry, TextMasking)())
    user_classes.load.cache_clear()
    captions = Captions(0, np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 4), np.int32), np.zeros((1, 4), bool))
    assert pickle.loads(sent).ranks(captions).tolist() == [[0, -1, -2, -3]]


def test_file_with_another_hash_is_not_executed(copied, tmp_path):
    name = copied(b"raise SystemExit('executed')\n" + MASKING, "Backwards")
    path = tmp_path / user_classes.FOLDER / name.copy
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ConfigError, match="another hash than config.yaml names.*is not executed"):
        user_classes.load(str(name), TextMasking)
    with pytest.raises(ConfigError, match="executed by its hash alone"):
        user_classes.load("mine.py:Backwards", TextMasking)
    path.unlink()
    with pytest.raises(ConfigError, match="no copy of a file of yours here.*flip.load"):
        user_classes.load(str(name), TextMasking)
    path.mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        user_classes.load(str(name), TextMasking)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"1 / 0\n", "raises an error when it is imported.*ZeroDivisionError"),
        (b"raise SystemExit(3)\n", "raises an error when it is imported.*SystemExit"),
        (b"Mine = 3\n", "is no class derived from TextMasking"),
        (b"class Mine:\n    pass\n", "is no class derived from TextMasking"),
    ],
)
def test_errors_of_the_file_name_it(copied, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        user_classes.load(str(copied(text, "Mine")), TextMasking)
    assert "mine.py" in str(error.value) and error.value.code == 78


def test_stand_in_has_constants_and_executes_nothing():
    text = b"raise SystemExit('executed')\n" + STEP.replace(b"count = 2", b"count: int = 3\n    changes_pixels = False")
    step = user_classes.stand_in(UserClass("mine.py", "Erase"), text, AugmentationStep, "mine.py")
    assert (step.purpose, step.count, step.changes_pixels, step.first) == (100, 3, False, 0)
    assert type(step).apply is AugmentationStep.apply


def test_bases_of_the_same_file_and_of_the_table_count():
    text = b"""
from flip import optimizer_kinds

class Base(optimizer_kinds.AdamW):
    moment_bytes = 12

class Mine(Base):
    def build(self, groups, optim, fused):
        pass
"""
    kind = user_classes.stand_in(UserClass("mine.py", "Mine"), text, OptimizerKind, "mine.py")
    assert isinstance(kind, AdamW) and kind.moment_bytes == 12


LOSS = b"""
from flip.loss_kinds import Loss

class Mine(Loss):
    parameters = {"margin": "A margin."}
    first_values = {"margin": 0.5}
    terms = 2

    def forward(self, tiles, accuracy):
        pass

    def gradient(self, tiles, columns, logits, saved):
        pass
"""


@pytest.mark.parametrize(
    "base, text, before, after, message",
    [
        (Loss, LOSS, b"class Mine", b"class Mines", "no such class.*Did you mean Mines"),
        (Loss, LOSS, b"(Loss)", b"", r"not derived from Loss.*class Mine\(Loss\)"),
        (Loss, LOSS, b"(Loss)", b"(Thing)", "not derived from Loss"),
        (Loss, LOSS, b"def gradient", b"def grad", "lacks the method gradient.*flip/loss_kinds.py"),
        (Loss, LOSS, b"logits, saved", b"logits", "calls this method with 5 arguments, including self"),
        (Loss, LOSS, b"def forward", b"async def forward", "does not wait for `async`"),
        (Loss, LOSS, b"terms = 2", b"terms = 1 + 1", "terms needs a constant of type int"),
        (Loss, LOSS, b"terms = 2", b"terms = '2'", "terms needs a constant of type int"),
        (Loss, LOSS, b"terms = 2", b"terms = (", "not valid Python"),
        (AugmentationStep, STEP, b"    purpose = 100\n", b"", "lacks the attribute purpose"),
    ],
)
def test_mistakes_are_found_without_execution(base, text, before, after, message):
    assert before in text
    text = b"raise SystemExit('executed')\n" + text.replace(before, after)
    name = UserClass("mine.py", "Erase" if base is AugmentationStep else "Mine")
    with pytest.raises(ConfigError, match=message) as error:
        user_classes.stand_in(name, text, base, "mine.py")
    assert "mine.py" in str(error.value) and error.value.remedy


def test_declared_row_of_unknown_file_is_the_default():
    """As for the report of a run whose snapshot is elsewhere."""
    entry = f"mine.py:Mine@sha256:{'1' * 64}"
    assert user_classes.declared(entry, LOSSES, Loss, "clip") is LOSSES["clip"]
    digest = user_classes.remember(LOSS)
    assert user_classes.declared(f"mine.py:Mine@sha256:{digest}", LOSSES, Loss, "clip").terms == 2
