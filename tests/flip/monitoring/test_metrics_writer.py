"""Tests of MetricsWriter: metric lines, TensorBoard curves over all attempts, and the status of the newest attempt."""

import errno
import importlib.metadata

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from flip import environment, model_costs
from flip.config.schema import Config, Evaluate, EvaluationSet, Stage
from flip.monitoring import metrics_writer
from flip.monitoring.collector import PARTS
from flip.runs.rundir import RunDir, read_json, read_record, write_json
from tests.harness.common import metric_lines

CONFIG = Config(stages=[Stage(samples=80, batch=8)], evaluate=Evaluate(sets=[EvaluationSet(name="val")]))


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "sweep" / "run")


def record(step, loss):
    return {
        "step": step, "samples": step * 8, "stage": "pretrain", "loss": loss, "accuracy": 0.5, "lr": 0.1,
        "logit_scale": 14.3, "grad_norm": 2.0, "samples_per_second": 4.0, "data_wait": 0.1, "mfu": 0.2, "replaced": 0,
        "param_norm": 30.0, "update_norm": 0.1, "masking_speedup": 1.9, "memory": 1 << 30, "device_memory": None,
        "shares": dict.fromkeys(PARTS, 1 / 6) | {"communication": None}, "verdict": "compute-bound",
    }  # fmt: skip


def attempt(run, start, steps, loss):
    n = run.start_attempt({})
    writer = metrics_writer.MetricsWriter(run, n, total=80, steps=10, seconds=0.0)
    writer.start(start, start // 8, CONFIG)
    for step in steps:
        writer.step(record(step, loss))
    return writer


def test_curve_contains_repeated_steps_only_once(run):
    attempt(run, 0, (1, 2, 3, 4), loss=1.0).close("stopped")
    attempt(run, 16, (3, 4, 5), loss=2.0).close("complete")
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("batch/loss")] == [
        (8, 1.0), (16, 1.0), (24, 2.0), (32, 2.0), (40, 2.0),
    ]  # fmt: skip
    assert [(line["step"], line["loss"]) for line in metric_lines(run)] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_attempt_records_its_environment_and_warns_of_another_one(run, monkeypatch, caplog):
    attempt(run, 0, (1,), loss=1.0).close("stopped")
    recorded = read_record(run.attempt(1) / "ready.json")["environment"]
    assert recorded["packages"]["torch"] == importlib.metadata.version("torch") and recorded["processor"]
    assert recorded["kernel"].startswith(("yes (visible-jpeg ", "no, because "))
    attempt(run, 8, (2,), loss=1.0).close("stopped")
    assert not caplog.records and environment.changes_in(run, 2) == []
    upgraded = {**recorded, "packages": {**recorded["packages"], "numpy": "9.9"}}
    monkeypatch.setattr(environment, "of_attempt", lambda gpu, kernel: upgraded)
    attempt(run, 16, (3,), loss=1.0).close("stopped")
    change = f"numpy {recorded['packages']['numpy']} -> 9.9"
    assert change in caplog.text and environment.changes_in(run, 3) == [change]


def test_unreadable_environment_of_an_earlier_attempt_is_ignored(run):
    attempt(run, 0, (1,), loss=1.0).close("stopped")
    (run.attempt(1) / "ready.json").write_text("{")
    attempt(run, 8, (2,), loss=1.0).close("stopped")
    assert environment.changes_in(run, 2) == []


def test_last_status_has_position_beyond_last_logged_step(run):
    attempt(run, 0, (1, 2), loss=1.0).close("cancelled", "cancelled", {"samples": 32, "step": 4})
    status = read_json(run.status)
    assert (status["samples"], status["step"], status["accuracy"], status["phase"]) == (32, 4, 0.5, "cancelled")
    writer = metrics_writer.MetricsWriter(run, run.start_attempt({}), total=80, steps=10, seconds=0.0)
    writer.close("failed", "no data", {"samples": 0, "step": 0})
    assert read_json(run.status)["phase"] == "failed"


def read(run):
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    return events


def test_curves_contain_all_known_values_of_metric_line(run):
    attempt(run, 0, (1, 2), loss=1.0).close("stopped")
    curves = {tag: [e.value for e in read(run).Scalars(tag)] for tag in read(run).Tags()["scalars"]}
    assert curves["system/grad_norm"] == [2, 2] and curves["system/update_norm"] == pytest.approx([0.1, 0.1])
    assert curves["system/host_memory_peak_bytes"] == [1 << 30, 1 << 30]
    assert "system/device_memory_peak_bytes" not in curves
    shares = {tag for tag in curves if tag.startswith("system/time/")}
    assert shares == {f"system/time/{part}_share" for part in PARTS} - {"system/time/communication_share"}
    assert read_json(run.status)["verdict"] == "compute-bound"


def test_counter_curve_starts_at_first_nonzero_count(run):
    """Counters that stay 0 have no curve, because TensorBoard would show two dozen charts of zeros for local runs."""
    writer = attempt(run, 0, (), loss=1.0)
    for step, (replaced, retries) in enumerate([(0, 0), (0, 2), (3, 0)], 1):
        storage = {"retries": float(retries), "cache_hits": 0.0}
        writer.step(record(step, 1.0) | {"replaced": replaced, "storage": storage})
    writer.close("complete")
    events = read(run)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("system/storage/", "system/replaced"))]
    points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    assert points == {"system/storage/retries": [(16, 2), (24, 0)], "system/replaced_samples": [(24, 3)]}
    # Metric lines contain every counter.
    assert [line["storage"]["cache_hits"] for line in metric_lines(run)] == [0, 0, 0]


def test_curves_have_descriptions_in_tensorboard(run):
    writer = attempt(run, 0, (1, 2), loss=1.0)
    writer.step(record(3, 1.0) | {"storage": {"retries_slowdown": 2.0}})
    writer.add_scores(24, [{"name": "val", "task": "zeroshot", "top1": 0.25}])
    writer.close("complete")
    events = read(run)
    shown = {tag: events.SummaryMetadata(tag).summary_description for tag in events.Tags()["scalars"]}
    assert len(shown) > 15 and all(shown.values()), shown
    about = events.SummaryMetadata("batch/loss")
    assert (about.display_name, about.summary_description) == ("batch/loss", "Loss of the global batch.")
    # TensorBoard's fast data server needs these values.
    assert (about.data_class, about.plugin_data.plugin_name) == (1, "scalars")


def test_tensorboard_opens_with_loss_accuracy_and_speed(run):
    """It sorts groups by name: the first has these three, and no group but system/ has others."""
    writer = attempt(run, 0, (1, 2), loss=1.0)
    writer.step(record(3, 1.0) | {"storage": {"requests": 2.0}, "callback": {"GradNoise/noise": 1.0}, "replaced": 1})
    writer.add_scores(24, [{"name": "val", "task": "zeroshot", "top1": 0.25}])
    writer.close("complete")
    tags = sorted(read(run).Tags()["scalars"])
    assert tags[:3] == ["batch/accuracy", "batch/loss", "batch/samples_per_second"]
    others = [tag for tag in tags[3:] if not tag.startswith("system/")]
    assert others == ["callback/GradNoise/noise", "scores/val_top1"]
    assert "custom_scalars__config__" not in read(run).Tags()["tensors"], "a layout has charts without curves"


def test_hparams_table_has_single_row_per_run(run):
    """TensorBoard's plugin shows a single row if the values are in the run's own folder, without subfolders.

    Only what the sweep varies is a column, and the mask in any case.
    """
    run.path.parent.mkdir(parents=True)
    write_json(run.path.parent / "sweep.json", {"varied": ["stages.pretrain.batch"]})
    attempt(run, 0, (1,), loss=1.0).close("stopped")
    writer = attempt(run, 8, (2,), loss=1.0)
    writer.close("complete")
    events = read(run)
    tags = events.PluginTagToContent(metadata.PLUGIN_NAME)
    session = metadata.parse_session_start_info_plugin_data(tags[metadata.SESSION_START_INFO_TAG])
    ended = metadata.parse_session_end_info_plugin_data(tags[metadata.SESSION_END_INFO_TAG])
    assert set(session.hparams) == {"stages.pretrain.batch", "stages.pretrain.mask"}
    assert session.hparams["stages.pretrain.batch"].number_value == 8
    assert session.hparams["stages.pretrain.mask"].string_value == "0.5"
    assert metadata.EXPERIMENT_TAG not in tags, "it would fix the columns by one run"
    assert ended.status == 1  # STATUS_SUCCESS
    assert [path for path in run.tensorboard.iterdir() if path.is_dir()] == []


def test_status_is_written_only_by_newest_attempt(run):
    old = attempt(run, 0, (1, 2), loss=1.0)
    assert read_json(run.status)["eta_seconds"] == (80 - 16) / 4
    new = attempt(run, 16, (), loss=1.0)
    old.close("stopped")
    status = read_json(run.status)
    assert (status["attempt"], status["phase"], status["samples"]) == (2, "training", 16)
    new.close("complete")
    assert read_json(run.status)["phase"] == "complete"


def test_time_left_counts_the_work_of_later_stages(run):
    """An unmasked stage follows, whose samples take longer."""
    stages = [Stage(samples=80, batch=8, mask="0.75"), Stage(name="unmasked", samples=80, batch=8, mask="0")]
    config = Config(stages=stages)
    flops = [model_costs.stage_flops(config, stage) for stage in stages]
    writer = metrics_writer.MetricsWriter(run, run.start_attempt({}), total=160, steps=20, seconds=0.0)
    writer.start(0, 0, config)
    writer.step(record(2, 1.0))
    expected = (80 - 16 + 80 * flops[1] / flops[0]) / 4
    assert read_json(run.status)["eta_seconds"] == pytest.approx(expected) and flops[1] > 2 * flops[0]


def test_status_reports_that_throughput_varies(run):
    writer = attempt(run, 0, (), loss=1.0)
    verdicts = []
    speeds = [0.1] + [100.0] * 14 + [60.0] * 15  # the first step is warm-up
    for step, speed in enumerate(speeds, start=1):
        writer.step(record(step, 1.0) | {"samples_per_second": speed})
        verdicts.append(read_json(run.status)["unsteady"])
    assert verdicts[:12] == [None] * 12 and set(verdicts[12:16]) == {False} and verdicts[-1] is True
    writer.close("complete")


def test_status_keeps_step_and_loss_if_attempt_resumes_at_end(run):
    """Such an attempt trains no step and writes no metric line."""
    attempt(run, 0, (1, 2, 3), loss=1.5).close("stopped")
    attempt(run, 24, (), loss=9.0).close("complete")
    status = read_json(run.status)
    assert (status["step"], status["samples"], status["stage"], status["loss"]) == (3, 24, "pretrain", 1.5)


def test_status_omits_loss_of_steps_to_be_repeated(run):
    attempt(run, 0, (1, 2, 3), loss=1.5).close("stopped")
    attempt(run, 16, (), loss=9.0)
    assert (read_json(run.status)["step"], read_json(run.status)["loss"]) == (2, None)


def test_status_shows_storage_outage_until_recovery(run):
    writer = attempt(run, 0, (1,), loss=1.0)
    for text in ("storage does not answer", None):
        writer.status(storage=text)
        assert read_json(run.status)["storage"] == text
    writer.close("stopped")


def test_status_that_cannot_be_written_does_not_end_the_attempt(run, monkeypatch, caplog):
    """The storage that fails may be that of the run directory, whose outage the status is to show."""
    writer = attempt(run, 0, (1,), loss=1.0)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(metrics_writer, "write_json", stale)
        for _ in range(2):
            writer.status(storage="storage does not answer")
    assert read_json(run.status)["storage"] is None
    assert [record.getMessage().count("Stale file handle") for record in caplog.records] == [1]
    writer.status()
    assert read_json(run.status)["storage"] == "storage does not answer", "the next call writes what is missing"
