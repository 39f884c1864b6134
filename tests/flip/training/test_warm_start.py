"""The commit of another run that a run begins from: found, fitting, pinned, opened."""

from dataclasses import replace

import pytest

from flip.checkpoint import export_record
from flip.config.identity import identity
from flip.config.merge import dump
from flip.config.schema import Init
from flip.config.validate import validate
from flip.runs import commit
from flip.runs.errors import ConfigError, DataError, PermissionDenied
from flip.runs.rundir import RunDir, write_json
from flip.training import warm_start
from tests.jobs.outcomes import config


def save(run, samples, stage="pretrain", n=1, content="weights"):
    path = commit.folder(run, stage, samples, n)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(f"{content} {samples}")
    return commit.commit(path, {"stage": stage, "samples": samples, "attempt": n})


@pytest.fixture
def source(tmp_path):
    """A run of 12,800 samples with two commits and its end."""
    run = RunDir(tmp_path / "runs" / "base" / "a")
    run.path.mkdir(parents=True)
    run.config.write_text(dump(config()))
    run.begin_attempt({})
    for samples in (1280, 6400, 12_800):
        save(run, samples)
    return run


def find(source, **fields):
    made = config(samples=25_600)
    made.init = Init(run="base/a", **fields)
    made.init = warm_start.find(made, [source.path.parent, source.path.parent.parent])
    return made


def test_by_samples_by_stage_and_by_its_end(source):
    for fields, samples in (({"samples": 6400}, 6400), ({"stage": "pretrain"}, 12_800), ({}, 12_800)):
        init = find(source, **fields).init
        assert (init.run, init.stage, init.samples) == (str(source.path), "pretrain", samples)
        assert warm_start.open_commit(init).samples == samples
    assert warm_start.find(replace_init(run="a"), [source.path.parent]).samples == 12_800, "of the same sweep"
    assert warm_start.find(replace_init(run=str(source.path)), []).samples == 12_800


def replace_init(**fields):
    made = config(samples=25_600)
    made.init = Init(**fields)
    return made


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"samples": 1000}, "no commit at S = 1000.*pretrain 1280, pretrain 6400, pretrain 12800"),
        ({"stage": "unmasked"}, "no such stage.*Stages: pretrain"),
        ({"samples": 6400, "commit": "0" * 16}, "another one"),
    ],
)
def test_what_is_not_there_is_said(source, fields, words):
    with pytest.raises(ConfigError, match=words):
        find(source, **fields)
    with pytest.raises(ConfigError, match="init.run: there is no such run"):
        warm_start.find(replace_init(run="base/b"), [source.path.parent.parent])


def test_one_that_is_still_to_come(source):
    commit.remove(commit.folder(source, "pretrain", 12_800, 1))
    with pytest.raises(ConfigError, match="no commit at S = 12800.*still to come"):
        find(source)


def test_weights_must_fit(source):
    other = replace_init(run="base/a")
    other.model.text.width *= 2
    with pytest.raises(ConfigError, match="model.text.width: cannot begin from .*base/a"):
        warm_start.find(other, [source.path.parent.parent])
    larger = replace_init(run="base/a")
    larger.model.image.size *= 2
    assert warm_start.find(larger, [source.path.parent.parent]).samples, "positions are computed"
    larger.model.image.patch *= 2
    assert warm_start.find(larger, [source.path.parent.parent]).samples, "and patch weights resampled"
    larger.init.extend = True
    with pytest.raises(ConfigError, match="model.image.patch: cannot begin from"):
        warm_start.find(larger, [source.path.parent.parent])


@pytest.fixture
def export(tmp_path):
    """What submission sees of one; its weights are a line each."""
    folder = tmp_path / "made"
    (folder / "timm").mkdir(parents=True)
    (folder / export_record.CONFIG).write_text(dump(config()))
    for name in (export_record.OPEN_CLIP, export_record.TIMM):
        (folder / name).write_text(f"weights of {name}")
    seal(folder)
    return folder


def seal(folder):
    paths = {name: folder / name for name in (export_record.OPEN_CLIP, export_record.TIMM)}
    files = {name: {"bytes": path.stat().st_size, "sha256": commit.sha256(path)} for name, path in paths.items()}
    record = {"form": export_record.FORM, "stage": "pretrain", "samples": 64, "attempt": 1, "files": files}
    write_json(folder / export_record.MARK, record)


def test_an_export_is_known_by_its_weights(export, tmp_path):
    made = replace_init(export=str(export))
    made.model.image.size *= 2
    made.init = warm_start.find(made, [])
    assert made.init.export == str(export) and warm_start.open_export(made.init) == export
    assert warm_start.find(replace_init(export="made"), [tmp_path]) == made.init, "below the sweep or the runs root"
    made.data.decoder = made.data.resize = "pillow"
    validate(made)
    hashes = {identity(one, "")["hash"] for one in (made, replace_init())}
    moved = tmp_path / "moved"
    export.rename(moved)
    with pytest.raises(DataError, match="not there any more"):
        warm_start.open_export(made.init)
    with pytest.raises(ConfigError, match="init.export: there is no export"):
        warm_start.find(replace_init(export=str(export)), [])
    made.init = warm_start.find(replace_init(export=str(moved)), [])
    (moved / export_record.TIMM).write_text("others")
    seal(moved)
    with pytest.raises(DataError, match="not there any more"):
        warm_start.open_export(made.init)
    with pytest.raises(ConfigError, match="the export there is another one"):
        warm_start.find(replace_init(**vars(made.init)), [])
    plain = replace_init(export=str(moved))
    plain.model.image.size *= 2
    plain.init = warm_start.find(plain, [])
    assert len(hashes | {identity(plain, "")["hash"]}) == 3


def test_an_export_stands_alone_and_must_fit(export):
    other = replace_init(export=str(export))
    other.model.embed *= 2
    with pytest.raises(ConfigError, match="model.embed: cannot begin from"):
        warm_start.find(other, [])
    with pytest.raises(ConfigError, match="init.export: stands alone"):
        validate(replace_init(export=str(export), extend=True))
    with pytest.raises(ConfigError, match="init.commit: is not resolved"):
        validate(replace_init(export=str(export)))


def test_a_run_that_has_begun_needs_its_source_no_more(source, tmp_path):
    run = RunDir(tmp_path / "runs" / "more" / "b")
    run.path.mkdir(parents=True)
    made = find(source, samples=6400)
    run.config.write_text(dump(made))
    asked = Init(run="base/a", samples=6400)
    assert warm_start.kept(asked, run) is None, "nothing is committed"
    save(run, 128)
    assert warm_start.kept(asked, run) == made.init == warm_start.kept(replace(asked, samples=0), run)
    for other in ({"samples": 1280}, {"extend": True}, {"run": "base/b"}, {"run": "", "export": "x"}, {"stage": "x"}):
        assert warm_start.kept(replace(asked, **other), run) is None


def test_it_is_part_of_what_a_run_is_wherever_it_lies(source, tmp_path):
    plain = config(samples=25_600)
    made = find(source, samples=6400)
    hashes = [identity(one, "")["hash"] for one in (plain, made, find(source), find(source, samples=6400, extend=True))]
    assert len(set(hashes)) == 4
    assert "init" not in identity(plain, "")["config"], "runs of before keep theirs"
    moved = replace(made.init, run="/elsewhere")
    made.init = moved
    assert identity(made, "")["hash"] == hashes[1]


def test_extending_goes_on_between_two_steps_of_the_same_stage(source):
    made = find(source, samples=6400, extend=True)
    made.data.decoder = made.data.resize = "pillow"
    validate(made)
    for change, words in (
        ({"batch": 192}, "is no step of stage pretrain"),
        ({"name": "first"}, "lies in stage first, there in pretrain"),
        ({"samples": 6400}, "not before the end"),
    ):
        made = find(source, samples=6400, extend=True)
        for key, value in change.items():
            setattr(made.stages[0], key, value)
        with pytest.raises(ConfigError, match=words):
            validate(made)
    unresolved = replace_init(run="base/a")
    with pytest.raises(ConfigError, match="init.commit: is not resolved"):
        validate(unresolved)
    nobody = replace_init(extend=True)
    with pytest.raises(ConfigError, match="there is no init.run"):
        validate(nobody)


def test_a_pinned_commit_is_never_deleted(source, tmp_path):
    made = find(source, samples=1280)
    by = RunDir(tmp_path / "runs" / "more" / "b")
    by.path.mkdir(parents=True)
    warm_start.pin(made.init, by)
    save(source, 19_200)
    save(source, 20_000)
    commit.retain(source, 1, keep=1)
    assert [one.samples for one in commit.commits(source)] == [1280, 20_000]
    assert warm_start.open_commit(made.init).samples == 1280
    (pin,) = source.pins.iterdir()
    pin.write_text("{")
    with pytest.raises(OSError, match="not JSON"):
        commit.retain(source, 1, keep=1)
    assert len(commit.commits(source)) == 2, "where a pin cannot be read nothing goes"
    pin.unlink()
    warm_start.pin(made.init, by)
    write_json(by.result, {})
    commit.retain(source, 1, keep=1)
    assert [one.samples for one in commit.commits(source)] == [20_000], "who needed it is complete"


def test_pins_of_runs_that_are_gone_are_cleared_away(source, tmp_path):
    made, gone, there = find(source, samples=1280), RunDir(tmp_path / "gone"), RunDir(tmp_path / "there")
    for by in (gone, there):
        by.path.mkdir()
        warm_start.pin(made.init, by)
    assert commit.holders(source) == {gone.path, there.path}
    gone.path.rmdir()
    assert commit.holders(source) == {there.path} and len(list(source.pins.iterdir())) == 2
    assert commit.pinned(source) == {("pretrain", 1280)}
    warm_start.pin(made.init, there)
    assert len(list(source.pins.iterdir())) == 1


def test_gone_or_another_one_is_an_error(source, tmp_path):
    made = find(source, samples=6400)
    commit.remove(commit.folder(source, "pretrain", 6400, 1))
    with pytest.raises(DataError, match="not there any more"):
        warm_start.pin(made.init, RunDir(tmp_path / "b"))
    save(source, 6400, n=2, content="other")
    with pytest.raises(DataError, match="not there any more"):
        warm_start.open_commit(made.init)


def test_somebody_elses_run_must_be_complete(source, tmp_path, monkeypatch):
    init = find(source, samples=6400).init
    monkeypatch.setattr(warm_start.os, "access", lambda *_: False)
    with pytest.raises(PermissionDenied, match="cannot be kept"):
        warm_start.pin(init, RunDir(tmp_path / "b"))
    write_json(source.result, {})
    warm_start.pin(init, RunDir(tmp_path / "b"))
    assert not source.pins.exists()
