"""Tests of scaling curves: runs that differ along one axis, and their laws in the report."""

import pytest

from flip.config import merge
from flip.monitoring.results import read_run
from flip.runs.rundir import read_json, write_json
from jobs.reporting import figures
from jobs.reporting.laws import LOG_ODDS
from jobs.reporting.scaling_laws import AXES, Curve, Trial, curves, ignored, law_of
from tests.jobs import gallery
from tests.jobs.outcomes import make


def trials(xs, errors):
    return [Trial(str(i), x, error, error, error) for i, (x, error) in enumerate(zip(xs, errors, strict=True))]


@pytest.mark.parametrize(
    "xs, errors",
    [
        ([1.0, 2.0, 4.0], [0.5, 0.4, 0.3]),  # too few runs
        ([1.0, 1.0, 2.0, 2.0], [0.5, 0.5, 0.4, 0.4]),  # only two distinct x
        ([1.0, 2.0, 4.0, 8.0], [0.5, 0.4, 0.3, 0.0]),  # an error of 0 has no logarithm
        ([1.0, 2.0, 4.0, 8.0], [1.0, 0.9, 0.8, 0.7]),  # an accuracy of 0 has no logarithm
    ],
)
def test_law_is_none_for_insufficient_data(xs, errors):
    assert law_of(trials(xs, errors)) is None


def test_law_that_does_not_fit_is_not_drawn():
    """The errors fall, rise and fall again, with little spread at each x: the chart has their means."""
    xs = [1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0]
    errors = [0.40, 0.401, 0.30, 0.301, 0.38, 0.381, 0.20, 0.201]
    curve = Curve("batch", "b", trials(xs, errors), law_of(trials(xs, errors)))
    assert curve.law.refused
    series = figures._law(curve, 0)
    assert not series.fit and not series.band and len(series.lines[0]) == 4
    row = figures._exponent("twemoji", curve)
    assert row["exponent b"] == "does not fit" and row["lack of fit"].startswith("F(2, 4) = ")
    good = Curve("batch", "b", trials(xs, [0.4 * x**-0.2 for x in xs]), law_of(trials(xs, [0.4 * x**-0.2 for x in xs])))
    assert figures._law(good, 0).fit and figures._exponent("t", good)["at twice x"] == "error -12.9 %"


def test_curves_join_runs_that_differ_only_along_axis(tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    folder = gallery.sweep(tmp_path, "grid_small", seeds=[0, 1])
    all_curves = curves([read_run(path) for path in sorted(folder.glob("[!.]*/"))], "twemoji")
    by_axis = {axis.name: [curve for curve in all_curves if curve.axis == axis.name] for axis in AXES}
    assert [len(by_axis[axis]) for axis in by_axis] == [2, 4, 4, 4, 0], "2 x 2 x 2 runs with equal batches"
    for axis in ("parameters", "samples in the data set", "samples seen"):
        for curve in by_axis[axis]:
            assert len({trial.x for trial in curve.trials}) == 2 and len(curve.trials) == 4 and curve.law is None
    assert len({curve.name for curve in by_axis["samples seen"]}) == 4
    for flops_curve in by_axis["training FLOPs"]:  # one curve per data set: its size costs no FLOPs
        assert len(flops_curve.trials) == 8 and flops_curve.law.form is LOG_ODDS


def run_with(folder, name, flops, edit=None, top1=0.2, **fields):
    """Write a complete run that cost ``flops``; ``edit`` changes its configuration."""
    run = make(folder, name, top1=top1, **fields)
    if edit is not None:
        config = merge.read_config(run.config)
        edit(config)
        run.config.write_text(merge.dump(config), encoding="utf-8")
    write_json(run.result, {**read_json(run.result), "flops": flops})


def curves_along(folder, axis):
    return [curve for curve in curves([read_run(p) for p in sorted(folder.iterdir())], "twemoji") if curve.axis == axis]


METHODS = {
    "mask": lambda config, i: setattr(config.stages[0], "mask", ("0", "0.5", "0.75", "0.25")[i]),
    "optimiser": lambda config, i: setattr(config.optim, "beta2", 0.95 + i / 100),
    "batch": lambda config, i: setattr(config.stages[0], "batch", (128, 256, 512, 64)[i]),
    "objective": lambda config, i: setattr(config.model, "objective", ("clip", "siglip", "clip", "siglip")[i]),
    "resolution": lambda config, i: setattr(config.model.image, "size", (64, 72, 80, 96)[i]),
    "data": lambda config, i: setattr(config.data, "manifest", f"/data/{i}"),
}


@pytest.mark.parametrize("method", METHODS)
def test_curves_over_flops_do_not_join_different_methods(tmp_path, method):
    """Masked and unmasked runs cost different FLOPs, but nothing was scaled, so there is no curve and no law."""
    for i in range(4):
        run_with(tmp_path, str(i), 1e12 * 2**i, lambda config, i=i: METHODS[method](config, i), top1=0.2 + i / 50)
    assert curves_along(tmp_path, "training FLOPs") == []


def test_curves_over_flops_join_different_model_sizes_and_lengths(tmp_path):
    for i in range(4):

        def edit(config, i=i):
            config.model.size = f"s{i}"
            config.model.image.width = 64 * (1 + i)
            config.stages[0].samples = 12_800 << i

        run_with(tmp_path, str(i), 1e12 * 2**i, edit, top1=0.2 + i / 50)
    (curve,) = curves_along(tmp_path, "training FLOPs")
    assert curve.law is not None and curve.law.runs == 4


def test_curves_join_cooldowns_from_several_checkpoints_of_a_trunk(tmp_path):
    for extend in (True, False):
        for i in range(4):

            def edit(config, i=i, extend=extend):
                config.init.run = "s/trunk"
                config.init.commit = str(i) * 16
                config.init.extend = extend
                config.stages[0].samples = 12_800 << i

            run_with(tmp_path / str(extend), str(i), 1e12 * 2**i, edit, top1=0.2 + i / 50)
    (curve,) = curves_along(tmp_path / "True", "training FLOPs")
    assert curve.name == "all runs" and curve.law.runs == 4
    assert curves_along(tmp_path / "False", "training FLOPs") == [], "branches from other weights"


def test_curves_over_batch_have_single_learning_rate_per_batch(tmp_path):
    """Two learning rates at each batch size give two curves; a different rate for each batch size gives one curve."""

    def setting(batch, rate):
        return lambda config: (setattr(config.stages[0], "batch", batch), setattr(config.stages[0], "base_lr", rate))

    for batch in (64, 128):
        for rate in (1e-3, 2e-3):
            run_with(tmp_path / "grid", f"{batch}-{rate}", 1e12, setting(batch, rate))
        run_with(tmp_path / "zip", str(batch), 1e12, setting(batch, 64 / batch * 1e-3))
    assert [len(curve.trials) for curve in curves_along(tmp_path / "grid", "batch")] == [2, 2]
    assert [len(curve.trials) for curve in curves_along(tmp_path / "zip", "batch")] == [2]


def test_curves_over_data_do_not_join_different_captions(tmp_path):
    for i, captions in enumerate((["txt"], ["json"])):

        def edit(config, i=i, captions=captions):
            config.data.samples = 5000 << i
            config.data.captions = captions

        run_with(tmp_path, str(i), 1e12, edit)
    assert curves_along(tmp_path, "samples in the data set") == []


def test_curves_ignore_incomplete_runs_and_missing_flops(tmp_path):
    make(tmp_path / "s", "a")
    make(tmp_path / "s", "b", steps=50, complete=False)
    run = make(tmp_path / "s", "c")
    result = read_json(run.result)
    write_json(run.result, {**result, "flops": None})
    outcomes = [read_run(tmp_path / "s" / name) for name in "abc"]
    assert curves(outcomes, "twemoji") == [] and curves(outcomes, "absent") == []


def test_no_setting_of_a_method_is_ignored():
    for key in (
        "resources.nodes", "data.lanes", "seed", "stages.pretrain.warmup", "compute.accumulate", "data.cache",
        "stages.pretrain.compute.recompute", "recipe",
    ):  # fmt: skip
        assert ignored(key)
    for key in ("stages.pretrain.mask", "data.manifest", "model.image.width", "optim.beta2"):
        assert not ignored(key)
