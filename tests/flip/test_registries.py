"""Tests of all implementations that a setting selects by name: losses, optimisers, augmentation steps, text masks and
tokenizers (CONTRIBUTING.md). Each check names the step that was forgotten when an entry was added."""

import contextlib
import types
from dataclasses import fields

import numpy as np
import pytest
import torch

from flip import loss_kinds, model_costs
from flip.checkpoint.saver import Checkpointer, model_state, optimizer_state
from flip.config import schema
from flip.config.json_schema import definitions
from flip.config.schema import Augment
from flip.data import augment as augmenting
from flip.data import masking
from flip.data.augment import AUGMENTATIONS, AugmentationStep
from flip.data.patch_masking import BLOCK, GRID, PATCH_MASKINGS
from flip.data.text_masking import TEXT_MASKINGS
from flip.distributed import parallel
from flip.loss_kinds import LOSSES, Loss, SigmoidLoss
from flip.optimizer_kinds import OPTIMIZERS, AdamW
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir
from flip.tokenizer import TOKENIZERS
from flip.tower_kinds import IMAGE_TOWERS
from flip.traffic import step_phases
from flip.training import grad_cache, parameter_groups
from lab.documentation import choices
from tests.flip.models.test_clip import tiny
from tests.flip.training.test_grad_cache import batch
from tools.commands.tokenizer import KINDS

#: Setting -> (its table, its choices, the file of the choices).
REGISTRIES = {
    "model.objective": (LOSSES, schema.Model, "objective"),
    "optim.name": (OPTIMIZERS, schema.Optim, "name"),
    "model.image.tower": (IMAGE_TOWERS, schema.ImageTower, "tower"),
    "stages.patch_masking": (PATCH_MASKINGS, schema.Stage, "patch_masking"),
    "stages.text_masking": (TEXT_MASKINGS, schema.Stage, "text_masking"),
}
#: Purposes of draws of others (docs/contracts.md, Randomness).
OTHER_PURPOSES = {masking.MASK, masking.TEXT, masking.CAPTION, 7, 8, BLOCK, GRID}
#: Fields that had a value other than off before steps were registered.
FIRST_FIELDS = {"crop_area", "crop_aspect", "flip", "rotate", "translate", "zoom"}
FIRST_FIELDS |= {"brightness", "contrast", "saturation", "grey"}
NORMALISATION = {"mean", "std"}
#: Names of classes of a user.
USER_CLASSES = {"steps"}


# -- what is missing, as sentences ------------------------------------------------------------------------------------


def missing_choices():
    for setting, (registry, owner, name) in REGISTRIES.items():
        choices = owner.__dataclass_fields__[name].metadata["choices"]
        for entry in registry.keys() ^ set(choices):
            yield f"flip/config/schema.py: the choices of {setting} and its table differ in {entry}"
        assert definitions(owner)[owner.__name__]["properties"][name]["anyOf"][0]["enum"] == list(choices)
    for entry in TOKENIZERS.keys() ^ set(KINDS):
        yield f"tools/commands/tokenizer.py: KINDS and TOKENIZERS differ in {entry}"


def missing_descriptions():
    for registry in (LOSSES, OPTIMIZERS, PATCH_MASKINGS, TEXT_MASKINGS, TOKENIZERS, AUGMENTATIONS, IMAGE_TOWERS):
        for name, entry in registry.items():
            if not choices.description(entry):
                yield f"{name}: its class needs a docstring, which the page of choices shows"


def missing_fields_of_losses():
    known = {field.name for field in fields(schema.Model)}
    for name, loss in LOSSES.items():
        for parameter in loss.parameters.keys() - known:
            yield f"flip/config/schema.py: {name} needs a field {parameter} in Model, the first value of its parameter"


def missing_fields_of_steps():
    known = {field.name: field for field in fields(schema.Augment)}
    owned = [field for step in AUGMENTATIONS.values() for field in step.fields]
    for name, step in AUGMENTATIONS.items():
        for field in step.fields:
            if field not in known:
                yield f"flip/config/schema.py: step {name} needs a field {field} in Augment"
            elif field not in FIRST_FIELDS and known[field].metadata.get("omit_if") != 0:
                yield f"flip/config/schema.py: augment.{field} needs omit_if=0.0, or old runs change their identity"
    for field in known.keys() - NORMALISATION - USER_CLASSES - set(owned):
        yield f"flip/data/augment.py: no step has the field augment.{field}"


def wrong_declarations_of_steps():
    """``changes_pixels`` of a step against what it does to views with its fields set."""
    for name, step in AUGMENTATIONS.items():
        augment = types.SimpleNamespace(**{field.name: default_of(field) for field in fields(schema.Augment)})
        for field in step.fields:
            if not isinstance(getattr(augment, field, 0.0), list):
                setattr(augment, field, 0.5)
        changes = False
        for row in np.linspace(0.0, 0.99, 8):
            view = augmenting.View(64, 48, 32, (0, 0, 64, 48))
            step.apply(view, augment, np.full(step.count, row))
            changes = changes or view.affine is not None or bool(view.changes)
        if changes != step.changes_pixels:
            yield f"{name}: its class needs changes_pixels = {changes}: so plans count the images for the kernel"


def default_of(field):
    return getattr(Augment(), field.name)


def missing_purposes():
    users = {}
    for name, step in AUGMENTATIONS.items():
        if step.purpose in OTHER_PURPOSES:
            yield f"{name}: purpose {step.purpose} has another use (docs/contracts.md, Randomness)"
        for number in range(step.first, step.first + step.count):
            other = users.setdefault((step.purpose, number), name)
            if other != name:
                yield f"{name}: draw {number} of purpose {step.purpose} belongs to {other}: take a purpose of its own"


CHECKS = [
    missing_choices, missing_descriptions, missing_fields_of_losses, missing_fields_of_steps,
    wrong_declarations_of_steps, missing_purposes,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nothing_is_missing_of_any_entry(check):
    problems = list(check())
    assert not problems, "\n".join(problems)


class Undocumented(AdamW):
    __doc__ = None


class TwoBiases(SigmoidLoss):
    """A loss with a learned parameter that no setting starts."""

    parameters = {"logit_bias": "Bias.", "other_bias": "Another bias."}


class Blur(AugmentationStep):
    """A blur whose field and purpose are forgotten."""

    purpose = masking.FLIP
    count = 1
    fields = ("blur",)

    def apply(self, view, augment, draws):
        raise NotImplementedError


class Darken(AugmentationStep):
    """A darker view, which its declaration denies."""

    purpose = 9
    count = 1
    fields = ("blur",)
    changes_pixels = False

    def apply(self, view, augment, draws):
        view.changes.append(lambda pixels: pixels // 2)


class Still(AugmentationStep):
    """A step that moves the crop, and declares more."""

    purpose = 9
    count = 1
    fields = ("blur",)

    def apply(self, view, augment, draws):
        view.box = (1, 1, 9, 9)


@pytest.mark.parametrize(
    "registry, entry, check, problem",
    [
        (OPTIMIZERS, AdamW(), missing_choices, "the choices of optim.name and its table differ in new"),
        (LOSSES, TwoBiases(), missing_choices, "the choices of model.objective and its table differ in new"),
        (OPTIMIZERS, Undocumented(), missing_descriptions, "new: its class needs a docstring"),
        (LOSSES, TwoBiases(), missing_fields_of_losses, "new needs a field other_bias in Model"),
        (AUGMENTATIONS, Blur(), missing_fields_of_steps, "step new needs a field blur in Augment"),
        (AUGMENTATIONS, Blur(), missing_purposes, "new: draw 0 of purpose 2 belongs to flip"),
        (AUGMENTATIONS, Darken(), wrong_declarations_of_steps, "new: its class needs changes_pixels = True"),
        (AUGMENTATIONS, Still(), wrong_declarations_of_steps, "new: its class needs changes_pixels = False"),
        (TOKENIZERS, TOKENIZERS["bpe"], missing_choices, "KINDS and TOKENIZERS differ in new"),
    ],
)
def test_check_names_the_forgotten_step(monkeypatch, registry, entry, check, problem):
    monkeypatch.setitem(registry, "new", entry)
    assert problem in "\n".join(check())


# -- every loss --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=LOSSES)
def objective(request):
    return request.param


def test_plan_counts_parameters_memory_and_traffic_of_every_loss(objective):
    model = schema.Model(objective=objective)
    pair = tiny(objective=objective)
    assert pair.loss_parameters().keys() == LOSSES[objective].parameters.keys()
    without = model_costs.parameters(model)["total"] - len(pair.loss_parameters())
    assert without == model_costs.parameters(schema.Model())["total"] - len(LOSSES["clip"].parameters)
    assert model_costs.loss_bytes(64, 8, 512, objective=objective) > 4 * 3 * 64 * 512
    compute = schema.Compute(precision="bf16", device="cuda")
    loss_phase = next(phase for phase in step_phases(model, compute, 64, 8) if phase.share == 0)
    (calls,) = loss_phase.collectives
    reductions, values = LOSSES[objective].reductions(512)
    assert (calls.kind, calls.calls, calls.bytes) == ("reduction", reductions + 1, 4 * (values + 2))


def trained(pair, optimizer, steps):
    for step in steps:
        parameter_groups.set_learning_rate(optimizer, schema.Stage(samples=8 * 256, batch=256, base_lr=1e-2), step)
        optimizer.zero_grad(set_to_none=True)
        grad_cache.grad_cache_backward(pair, batch(), 1, torch.device("cpu"), contextlib.nullcontext())
        optimizer.step()
    return {name: value.detach().clone() for name, value in pair.named_parameters()}


@pytest.mark.long
def test_every_loss_trains_its_parameters_and_resumes_to_the_same_bits(objective, tmp_path):
    pair = tiny(objective=objective)
    optimizer = parameter_groups.build(pair.named_parameters(), schema.Optim())
    before = trained(pair, optimizer, [1])
    run = RunDir(tmp_path / "s" / "run")
    saver = Checkpointer(run, run.start_attempt({}), parallel.World(0, 1, torch.device("cpu"), None, None), keep=2)
    saver.save(model_state(pair) | optimizer_state(pair, optimizer), "pretrain", 256)
    straight = trained(pair, optimizer, [2])
    changed = [name for name in LOSSES[objective].parameters if not torch.equal(before[name], straight[name])]
    assert changed == list(LOSSES[objective].parameters)

    other = tiny(objective=objective, trained=False)
    optimizer = parameter_groups.build(other.named_parameters(), schema.Optim())
    (newest,) = checkpoint_folder.checkpoints(run)
    saver.restorer.load(newest, model_state(other) | optimizer_state(other, optimizer))
    resumed = trained(other, optimizer, [2])
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_loss_parameters_are_not_decayed(objective):
    assert not any(parameter_groups.uses_weight_decay(name, True) for name in LOSSES[objective].parameters)
    assert loss_kinds.all_parameters().keys() >= LOSSES[objective].parameters.keys()
    assert isinstance(LOSSES[objective], Loss)


# -- every augmentation step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_draws_of_every_step_depend_on_seed_epoch_and_id_alone(name):
    """So that a run that resumes, or has other ranks, sees the same views."""
    epochs = np.array([0, 1, 1])
    ids = np.array([7, 7, 9])
    augment = Augment(**{field: 0.5 for field in AUGMENTATIONS[name].fields if not field.startswith("crop")})
    together = augmenting.draw(augment, 3, epochs, ids)[name]
    assert together.shape == (3, AUGMENTATIONS[name].count)
    for row in range(3):
        alone = augmenting.draw(augment, 3, epochs[row : row + 1], ids[row : row + 1])[name]
        assert np.array_equal(alone[0], together[row])
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_step_that_denies_its_changes_is_refused_at_run_time(monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "new", Darken())
    drawn = {"new": np.zeros((1, 1))}
    with pytest.raises(ConfigError, match="step new declares changes_pixels = False"):
        augmenting.describe(64, 48, 32, Augment(), drawn, 0)


def test_share_of_views_for_the_kernel_follows_declarations_and_probabilities(monkeypatch):
    class Sometimes(Darken):
        fields = ("flip",)
        probability = "flip"
        changes_pixels = True

    assert augmenting.unchanged_share(Augment(brightness=0.2)) == 1.0
    assert augmenting.unchanged_share(Augment(zoom=0.2)) == 0.0
    monkeypatch.setitem(AUGMENTATIONS, "new", Sometimes())
    assert augmenting.unchanged_share(Augment(flip=0.25)) == 0.75
    assert augmenting.unchanged_share(Augment(flip=0.25, rotate=3)) == 0.0
