"""Tests runs that start from another run or an export: sources are resolved, checked, pinned, opened, converted."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from flip.checkpoint import export_record
from flip.checkpoint.saver import Checkpointer, model_state, optimizer_state
from flip.common.shutdown import Watchdog
from flip.config.derived import for_stage
from flip.config.identity import identity
from flip.config.merge import dump, lookup, merge
from flip.config.schema import Compute, Init
from flip.config.validate import validate
from flip.distributed import parallel
from flip.export import exporter
from flip.models import clip, image_encoder
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError, DataError, PermissionDenied
from flip.runs.formats import EXPORT_NUMBER
from flip.runs.rundir import RunDir, write_json
from flip.training import parameter_groups, warm_start
from flip.training.conversion import copy_weights
from flip.training.warm_start import check_compatible, load_converted
from tests.flip.export.test_exporter import configured, loaded_of
from tests.flip.test_byte_pairs import PUBLISHED
from tests.harness.remote_reads import record_reads
from tests.jobs.outcomes import config
from tests.synthetic import make_tokenizer


def save(run, samples, stage="pretrain", n=1, content="weights"):
    path = checkpoint_folder.folder(run, stage, samples, n)
    path.mkdir(parents=True)
    (path / (checkpoint_folder.SHARD_FILE % 1)).write_text(f"{content} {samples}")
    return checkpoint_folder.complete_checkpoint(path, {"stage": stage, "samples": samples, "attempt": n})


@pytest.fixture
def source(tmp_path):
    """A run of 12,800 samples with two intermediate checkpoints and its last checkpoint."""
    run = RunDir(tmp_path / "runs" / "base" / "a")
    run.path.mkdir(parents=True)
    run.config.write_text(dump(config()))
    run.start_attempt({})
    for samples in (1280, 6400, 12_800):
        save(run, samples)
    return run


def find(source, **fields):
    run_config = config(samples=25_600)
    run_config.data.decoder = "pillow"
    run_config.data.resize = "pillow"
    run_config.resources.hours = 24.0
    run_config.init = Init(run="base/a", **fields)
    run_config.init = warm_start.resolve_init(run_config, [source.path.parent, source.path.parent.parent])
    return run_config


def test_resolve_init_selects_checkpoint_by_samples_stage_or_end(source):
    for fields, samples in (({"samples": 6400}, 6400), ({"stage": "pretrain"}, 12_800), ({}, 12_800)):
        init = find(source, **fields).init
        assert (init.run, init.stage, init.samples) == (str(source.path), "pretrain", samples)
        assert warm_start.open_checkpoint(init).samples_seen == samples
    # The source is in the same sweep.
    assert warm_start.resolve_init(replace_init(run="a"), [source.path.parent]).samples == 12_800
    assert warm_start.resolve_init(replace_init(run=str(source.path)), []).samples == 12_800


def replace_init(**fields):
    run_config = config(samples=25_600)
    run_config.data.decoder = "pillow"
    run_config.data.resize = "pillow"
    run_config.resources.hours = 24.0
    run_config.init = Init(**fields)
    return run_config


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"samples": 1000}, "no checkpoint at S = 1000.*pretrain 1280, pretrain 6400, pretrain 12800"),
        ({"stage": "unmasked"}, "no such stage.*Stages: pretrain"),
        ({"samples": 6400, "commit": "0" * 16}, "another digest"),
    ],
)
def test_resolve_init_rejects_missing_run_checkpoint_stage_or_digest(source, fields, words):
    with pytest.raises(ConfigError, match=words):
        find(source, **fields)
    with pytest.raises(ConfigError, match="init.run: no such run"):
        warm_start.resolve_init(replace_init(run="base/b"), [source.path.parent.parent])
    for fields in ({"run": "~nobody-here/runs/a"}, {"export": "~nobody-here/model"}):
        with pytest.raises(ConfigError, match="home of an unknown user"):
            warm_start.resolve_init(replace_init(**fields), [source.path.parent.parent])


def test_resolve_init_rejects_checkpoint_not_yet_reached(source):
    checkpoint_folder.remove(checkpoint_folder.folder(source, "pretrain", 12_800, 1))
    with pytest.raises(ConfigError, match="no checkpoint at S = 12800.*once it exists"):
        find(source)


def test_resolve_init_rejects_incompatible_weights(source):
    other = replace_init(run="base/a")
    other.model.text.width *= 2
    with pytest.raises(ConfigError, match="model.text.width: cannot start from .*base/a"):
        warm_start.resolve_init(other, [source.path.parent.parent])
    larger = replace_init(run="base/a")
    larger.model.image.size *= 2
    assert warm_start.resolve_init(larger, [source.path.parent.parent]).samples, "positions are computed"
    larger.model.image.patch *= 2
    assert warm_start.resolve_init(larger, [source.path.parent.parent]).samples, "patch weights are resampled"
    larger.init.extend = True
    with pytest.raises(ConfigError, match="model.image.patch: cannot start from"):
        warm_start.resolve_init(larger, [source.path.parent.parent])


def test_extended_stage_has_a_head_if_its_source_has(source):
    """The checkpoint has the head's weights and moments, or none of them. A warm start takes the towers alone."""
    own = replace_init(run="base/a")
    own.stages[0].classification = 1.0
    assert warm_start.resolve_init(own, [source.path.parent.parent]).samples
    own.init.extend = True
    with pytest.raises(ConfigError, match=r"stages.classification: cannot continue from .*base/a.*warm start"):
        warm_start.resolve_init(own, [source.path.parent.parent])


@pytest.fixture
def export(tmp_path):
    """An export as submission sees it. Each weight file holds a line of text."""
    folder = tmp_path / "made"
    (folder / "timm").mkdir(parents=True)
    (folder / export_record.CONFIG).write_text(dump(config()))
    for name in (export_record.OPEN_CLIP, export_record.TIMM):
        (folder / name).write_text(f"weights of {name}")
    seal(folder)
    return folder


def seal(folder):
    paths = {name: folder / name for name in (export_record.OPEN_CLIP, export_record.TIMM)}
    files = {
        name: {"bytes": path.stat().st_size, "sha256": checkpoint_folder.sha256(path)} for name, path in paths.items()
    }
    record = {"form": EXPORT_NUMBER, "stage": "pretrain", "samples": 64, "attempt": 1, "files": files}
    write_json(folder / export_record.EXPORT_FILE, record)


def test_export_source_is_identified_by_digest_of_its_weights(export, tmp_path):
    run_config = replace_init(export=str(export))
    run_config.model.image.size *= 2
    run_config.init = warm_start.resolve_init(run_config, [])
    assert run_config.init.export == str(export) and warm_start.open_export(run_config.init) == export
    # Below the sweep or the runs root.
    assert warm_start.resolve_init(replace_init(export="made"), [tmp_path]) == run_config.init
    validate(run_config)
    hashes = {identity(variant, "")["hash"] for variant in (run_config, replace_init())}
    moved = tmp_path / "moved"
    export.rename(moved)
    with pytest.raises(DataError, match="no longer exists"):
        warm_start.open_export(run_config.init)
    with pytest.raises(ConfigError, match="init.export: no such export"):
        warm_start.resolve_init(replace_init(export=str(export)), [])
    run_config.init = warm_start.resolve_init(replace_init(export=str(moved)), [])
    (moved / export_record.TIMM).write_text("others")
    seal(moved)
    with pytest.raises(DataError, match="no longer exists"):
        warm_start.open_export(run_config.init)
    with pytest.raises(ConfigError, match="this export has another digest"):
        warm_start.resolve_init(replace_init(**vars(run_config.init)), [])
    plain = replace_init(export=str(moved))
    plain.model.image.size *= 2
    plain.init = warm_start.resolve_init(plain, [])
    assert len(hashes | {identity(plain, "")["hash"]}) == 3


def test_existing_file_of_another_form_is_not_called_missing(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"pickled")
    with pytest.raises(warm_start.SourceMissing, match="weights.bin: init.export: neither an export nor weights"):
        warm_start.resolve_init(replace_init(export="weights.bin"), [tmp_path])


def test_export_source_must_fit_and_excludes_other_init_keys(export):
    other = replace_init(export=str(export))
    other.model.embed *= 2
    with pytest.raises(ConfigError, match="model.embed: cannot start from"):
        warm_start.resolve_init(other, [])
    with pytest.raises(ConfigError, match="init.export: excludes"):
        validate(replace_init(export=str(export), extend=True))
    with pytest.raises(ConfigError, match="init.commit: is not resolved"):
        validate(replace_init(export=str(export)))


def test_stored_init_is_used_once_run_has_checkpoint(source, tmp_path):
    run = RunDir(tmp_path / "runs" / "more" / "b")
    run.path.mkdir(parents=True)
    run_config = find(source, samples=6400)
    run.config.write_text(dump(run_config))
    requested = Init(run="base/a", samples=6400)
    assert warm_start.stored_init(requested, run) is None, "nothing is saved"
    save(run, 128)
    assert warm_start.stored_init(requested, run) == run_config.init
    assert warm_start.stored_init(replace(requested, samples=0), run) == run_config.init
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        patch.setenv("FLIP_CACHE", str(tmp_path / "runs"))
        for name in ("~/runs/base/a", "cache:base/a"):
            assert warm_start.stored_init(replace(requested, run=name), run) == run_config.init
    for other in ({"samples": 1280}, {"extend": True}, {"run": "base/b"}, {"run": "", "export": "x"}, {"stage": "x"}):
        assert warm_start.stored_init(replace(requested, **other), run) is None


def test_identity_depends_on_init_but_not_on_its_path(source, tmp_path):
    plain = config(samples=25_600)
    run_config = find(source, samples=6400)
    hashes = [
        identity(variant, "")["hash"]
        for variant in (plain, run_config, find(source), find(source, samples=6400, extend=True))
    ]
    assert len(set(hashes)) == 4
    assert "init" not in identity(plain, "")["config"], "older runs keep their identity"
    moved = replace(run_config.init, run="/elsewhere")
    run_config.init = moved
    assert identity(run_config, "")["hash"] == hashes[1]


def test_validate_requires_extend_to_continue_at_step_of_same_stage(source):
    run_config = find(source, samples=6400, extend=True)
    validate(run_config)
    for change, message in (
        ({"batch": 192}, "is not a step of stage pretrain"),
        ({"name": "first"}, "is in stage first, but in pretrain"),
        ({"samples": 6400}, "not before the end"),
    ):
        run_config = find(source, samples=6400, extend=True)
        for key, value in change.items():
            setattr(run_config.stages[0], key, value)
        with pytest.raises(ConfigError, match=message):
            validate(run_config)
    unresolved = replace_init(run="base/a")
    with pytest.raises(ConfigError, match="init.commit: is not resolved"):
        validate(unresolved)
    without = replace_init(extend=True)
    with pytest.raises(ConfigError, match="init.run: is not given"):
        validate(without)


def test_pinned_checkpoint_is_retained_until_dependent_run_completes(source, tmp_path):
    run_config = find(source, samples=1280)
    dependent = RunDir(tmp_path / "runs" / "more" / "b")
    dependent.path.mkdir(parents=True)
    warm_start.pin(run_config.init, dependent)
    save(source, 19_200)
    save(source, 20_000)
    checkpoint_folder.apply_retention(source, 1, keep=1)
    assert [saved.samples_seen for saved in checkpoint_folder.checkpoints(source)] == [1280, 20_000]
    assert warm_start.open_checkpoint(run_config.init).samples_seen == 1280
    (pin,) = source.pins.iterdir()
    pin.write_text("{")
    with pytest.raises(OSError, match="not JSON"):
        checkpoint_folder.apply_retention(source, 1, keep=1)
    assert len(checkpoint_folder.checkpoints(source)) == 2, "an unreadable pin keeps every checkpoint"
    pin.unlink()
    warm_start.pin(run_config.init, dependent)
    write_json(dependent.result, {})
    checkpoint_folder.apply_retention(source, 1, keep=1)
    # The dependent run is complete.
    assert [saved.samples_seen for saved in checkpoint_folder.checkpoints(source)] == [20_000]


def test_pin_removes_pins_of_deleted_runs(source, tmp_path):
    run_config = find(source, samples=1280)
    gone = RunDir(tmp_path / "gone")
    existing = RunDir(tmp_path / "there")
    for dependent in (gone, existing):
        dependent.path.mkdir()
        warm_start.pin(run_config.init, dependent)
    assert checkpoint_folder.pin_holders(source) == {gone.path, existing.path}
    gone.path.rmdir()
    assert checkpoint_folder.pin_holders(source) == {existing.path} and len(list(source.pins.iterdir())) == 2
    assert checkpoint_folder.pinned(source) == {("pretrain", 1280)}
    warm_start.pin(run_config.init, existing)
    assert len(list(source.pins.iterdir())) == 1


def test_pin_and_open_checkpoint_reject_missing_or_replaced_checkpoint(source, tmp_path):
    run_config = find(source, samples=6400)
    checkpoint_folder.remove(checkpoint_folder.folder(source, "pretrain", 6400, 1))
    with pytest.raises(DataError, match="no longer exists"):
        warm_start.pin(run_config.init, RunDir(tmp_path / "b"))
    save(source, 6400, n=2, content="other")
    with pytest.raises(DataError, match="no longer exists"):
        warm_start.open_checkpoint(run_config.init)


def test_pin_requires_read_only_source_run_to_be_complete(source, tmp_path, monkeypatch):
    init = find(source, samples=6400).init
    monkeypatch.setattr(warm_start.os, "access", lambda *_: False)
    with pytest.raises(PermissionDenied, match="cannot be pinned"):
        warm_start.pin(init, RunDir(tmp_path / "b"))
    write_json(source.result, {})
    warm_start.pin(init, RunDir(tmp_path / "b"))
    assert not source.pins.exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(exported folder, its tokenizer, the exported model)."""
    root = tmp_path_factory.mktemp("source")
    tokenizer = make_tokenizer(root / "tokenizer.json")
    loaded = loaded_of(configured("portable", tokenizer), root)
    loaded.model.logit_scale.data.fill_(3.0)
    exporter.export(loaded, root / "made")
    return root / "made", tokenizer, loaded


def fresh(tokenizer, *settings, recipe="portable"):
    config = configured(recipe, tokenizer, "tiny", *settings)
    pair = clip.CLIPModel(config.model, config.augment, "sdpa")
    clip.init_weights(pair, 9)
    return pair, config


@torch.no_grad()
def test_load_converted_at_higher_resolution_copies_all_weights(exported):
    folder, tokenizer, loaded = exported
    pair, config = fresh(tokenizer, "model.image.size=96")
    differs = load_converted(pair, config, folder)
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in pair.state_dict().items())
    assert torch.equal(pair.image.positions, image_encoder.sincos(12, 64))
    assert differs == {"model.image.size": [64, 96]}
    # If only the 8 x 8 patches at the top left of 12 x 12 are visible, the input equals that of the smaller model.
    patches = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 64, 192), dtype=np.uint8))
    keep = (torch.arange(8)[:, None] * 12 + torch.arange(8)).reshape(1, 64)
    assert torch.allclose(pair.encode_image(patches, keep), loaded.model.encode_image(patches), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("size, patch, grid", [(56, 7, 8), (64, 16, 4)])  # 8 -> 7 has the ratio of 16 -> 14
def test_load_converted_with_other_patch_size_changes_patch_weights_only(exported, size, patch, grid):
    folder, tokenizer, loaded = exported
    pair, config = fresh(tokenizer, f"model.image.size={size}", f"model.image.patch={patch}")
    load_converted(pair, config, folder)
    own = pair.state_dict()
    source = loaded.model.state_dict()
    assert [name for name in own if not torch.equal(own[name], source[name])] == ["image.patch.weight"]
    assert torch.equal(pair.image.positions, image_encoder.sincos(grid, 64))
    # A uniform image has no detail that resizing could change: both patch embeddings are equal.
    even = torch.ones(3).repeat(patch**2) @ own["image.patch.weight"].T
    assert torch.allclose(even, torch.ones(192) @ source["image.patch.weight"].T, atol=1e-4)


def test_load_converted_returns_settings_that_change_the_function(exported):
    folder, tokenizer, _ = exported
    pair, config = fresh(tokenizer, recipe="paper")
    differs = load_converted(pair, config, folder)
    keys = {"model.image.pool", "model.text.prepend_cls", "model.text.repair"}
    assert differs.keys() == keys and differs["model.image.pool"] == ["patches", "all"]


def test_load_converted_rejects_incompatible_model_or_tokenizer(exported, tmp_path):
    folder, tokenizer, loaded = exported
    for setting, key in (("model.image.heads=4", "model.image.heads"), ("model.embed=32", "model.embed")):
        pair, config = fresh(tokenizer, setting)
        with pytest.raises(ConfigError, match=key):
            load_converted(pair, config, folder)
        with pytest.raises(ConfigError, match=f"cannot start from there.*{key}|{key}.*cannot start from there"):
            check_compatible(config, loaded.config, "there")
    other = make_tokenizer(tmp_path / "other.json", ["quite other words"])
    pair, config = fresh(other)
    with pytest.raises(ConfigError, match="is not the tokenizer of"):
        load_converted(pair, config, folder)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    with pytest.raises((ConfigError, DataError)):
        load_converted(pair, config, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())


@torch.no_grad()
def test_load_converted_keeps_own_logit_bias_if_objectives_differ(exported, tmp_path):
    folder, tokenizer, loaded = exported
    pair, config = fresh(tokenizer, recipe="siglip")
    assert load_converted(pair, config, folder).keys() == {"model.objective", "model.max_logit_scale"}
    assert float(pair.logit_bias) == -10.0 and torch.equal(pair.text.positions, loaded.model.text.positions)
    exporter.export(loaded_of(configured("siglip", tokenizer), tmp_path), tmp_path / "made")
    other, config = fresh(tokenizer)
    load_converted(other, config, tmp_path / "made")
    assert not other.loss_parameters()


@pytest.mark.long
@torch.no_grad()
def test_load_converted_resizes_learned_positions_of_recipe_clip(exported, tmp_path):
    folder, *_ = exported
    loaded = loaded_of(configured("clip", PUBLISHED), tmp_path)
    exporter.export(loaded, tmp_path / "made")
    pair, config = fresh(PUBLISHED, "model.image.size=96", recipe="clip")
    assert load_converted(pair, config, tmp_path / "made").keys() == {"model.image.size"}
    own = pair.state_dict()
    source = loaded.model.state_dict()
    changed = {name for name in own if not torch.equal(own[name], source[name])}
    assert changed == {"image.positions", "logit_scale"}  # an export stores the clamped scale
    assert own["image.positions"].shape == (1 + 144, 64)
    with pytest.raises(ConfigError, match=r"model\.(text\.vocabulary|text\.causal|image\.positions)"):
        load_converted(pair, config, folder)


def branch_config(*settings):
    layer = {"model": {"size": "tiny", "image": {"positions": "learned"}}, "stages": [{"name": "pretrain"}]}
    return merge([("test", layer)], settings)


def built(config, seed):
    config = for_stage(config, config.stages[0])
    pair = clip.CLIPModel(config.model, config.augment, "sdpa")
    clip.init_weights(pair, seed)
    return pair


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A run with one checkpoint at a URL, its checkpointer, its model, and a list of the ranges read from now on."""
    run = RunDir(tmp_path / "sweep" / "run")
    config = branch_config()
    run.start_attempt({})
    run.config.write_text(dump(config))
    world = parallel.start(Compute(device="cpu", threads=1, deterministic="no"))
    saver = Checkpointer(run, 1, world, keep=1, url=f"file://{tmp_path}/there")
    pair = built(config, seed=3)
    optimizer = parameter_groups.build(pair.named_parameters(), config.optim)
    saver.save(model_state(pair) | optimizer_state(pair, optimizer), "pretrain", 16)
    yield run, saver, pair, record_reads(monkeypatch)
    parallel.stop()


@pytest.mark.parametrize(
    "settings, converted",
    [
        ((), set()),
        (("model.image.pool=all",), set()),
        (("model.image.patch=16", "model.text.length=20"), {"image.patch.weight", "image.positions", "text.positions"}),
        (("model.objective=siglip",), {"logit_bias"}),
    ],
)
def test_branch_reads_only_weights_of_remote_checkpoint_after_its_verification(remote, caplog, settings, converted):
    """Moments are two thirds of a checkpoint. Only its verification, which ranks share, reads them.

    The log lists the settings that differ.
    """
    run, saver, pair, ranges = remote
    (source,) = checkpoint_folder.checkpoints(run)
    config = branch_config(*settings)
    config.init = Init(run=str(run.path), stage="pretrain", samples=16, commit=warm_start.digest(source))
    branch = built(config, seed=4)
    expected = built(config, seed=4)
    copy_weights(pair, expected)
    with caplog.at_level(logging.INFO, logger="flip"):
        warm_start.apply(branch, for_stage(config, config.stages[0]), saver.restorer, Watchdog(0, lambda *_: None))
    for setting in settings:
        key, value = setting.split("=")
        assert f"{key}: {lookup(branch_config(), key)} in the source, {value} here" in caplog.text
    assert ("no setting of the model differs" in caplog.text) == (not settings)
    own = branch.state_dict()
    source_weights = pair.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in expected.state_dict().items())
    changed = {name for name in own if name not in source_weights or not torch.equal(own[name], source_weights[name])}
    assert changed == converted
    assert saver.restorer.parent == str(source.path)
    (size,) = (facts["bytes"] for facts in source.record["files"].values())
    (verified, *read) = ranges
    assert verified == (0, size) and sum(stop - start for start, stop in read) < size / 2
