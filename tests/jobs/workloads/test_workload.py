"""Tests that each kind of work has the interface, and that a directory of each kind is described by its own words."""

import inspect

import pytest

from flip.config.merge import dump, merge
from flip.config.schema import Compute
from flip.evaluation.request import EvaluationRequest
from flip.runs.rundir import RunDir, write_json
from flip.runs.side_jobs import SIDE_JOBS
from jobs.commands import explain
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import JobResources
from jobs.common.terminal import TextTable
from jobs.reporting import run_details
from jobs.reporting.outcomes import outcomes, terminal_page
from jobs.reporting.report import result_cells
from jobs.reporting.seed_groups import group_by_seed
from jobs.workloads import submitted
from jobs.workloads.evaluation import EvaluationWorkload
from jobs.workloads.training_request import TrainingRequest
from jobs.workloads.workload import Place, RequestedRun, SweepRun, Workload, job_of
from tests.jobs.outcomes import config, make, wanted


def members(protocol):
    """The names that a protocol and those above it ask for."""
    named = {name for each in protocol.__mro__ for name in vars(each) if not name.startswith("_")}
    return named - set(dir(object))


def evaluation(folder):
    request = EvaluationRequest(str(folder / "demo" / "a"), Compute(), sets=({"name": "mnist", "path": ""},))
    return EvaluationWorkload(request, JobResources(gpus=1), ClusterProfile())


def test_each_kind_of_work_has_the_interface(tmp_path):
    assert {"resources", "rank_module", "files", "checks", "pin"} <= members(Workload) < members(SweepRun)
    for work, protocol in ((wanted(), SweepRun), (evaluation(tmp_path), Workload)):
        assert [name for name in members(protocol) if not hasattr(type(work), name) and name not in vars(work)] == []
    assert [name for name in members(RequestedRun) if not hasattr(TrainingRequest, name)] == []
    kinds = {member.kind for _, member in inspect.getmembers(submitted) if hasattr(member, "kind")}
    assert kinds == submitted.KINDS.keys(), "each kind of work has a class for its directories"


def test_job_of_each_kind_runs_its_module(tmp_path):
    jobs = [job_of(work, RunDir(tmp_path / "a"), tmp_path) for work in (wanted(), evaluation(tmp_path))]
    records = [job.record() for job in jobs]
    assert [record["job_kind"] for record in records] == ["train", "evaluate"]
    assert [record["module"] for record in records] == ["jobs.worker", "jobs.evaluator"]
    assert [record["shape"]["gpus"] for record in records] == [0, 1]


@pytest.mark.parametrize("recorded", ["train", "evaluate", None, "of no kind"])
@pytest.mark.parametrize("folder", ["demo", SIDE_JOBS])
def test_record_or_else_the_place_tells_the_kind_of_a_directory(tmp_path, recorded, folder):
    run = RunDir(tmp_path / folder / "a")
    run.path.mkdir(parents=True)
    if recorded:
        write_json(run.path / "job.json", {"job_kind": recorded})
    by_place = submitted.SubmittedEvaluation if folder == SIDE_JOBS else submitted.SubmittedTraining
    assert type(submitted.of_run(run)) is submitted.KINDS.get(recorded, by_place)


def test_page_of_a_directory_has_the_words_of_its_kind(tmp_path):
    run = RunDir(tmp_path / "demo" / "a")
    job = RunDir(tmp_path / "demo" / SIDE_JOBS / "a-1")
    for each in (run, job):
        each.path.mkdir(parents=True)
    assert "what      a training; its config.yaml cannot be read" in explain.page(run_details.explain(run))
    assert "what      an evaluation; its request cannot be read" in explain.page(run_details.explain(job))
    run.config.write_text(dump(config()))
    evaluation(tmp_path).request.write(job)
    shown = explain.page(run_details.explain(run))
    assert "what      tiny, 12,800 samples (pretrain: 12,800, batch 128, mask 0.5)" in shown
    shown = explain.page(run_details.explain(job))
    assert f"what      evaluation of {run.path}" in shown and "sets      mnist" in shown
    assert "mask" not in shown and "unknown size" not in shown and "samples" not in shown


def test_report_of_evaluations_has_no_column_of_masks(tmp_path):
    run = make(tmp_path / "demo", "a")
    job = RunDir(tmp_path / "demo" / SIDE_JOBS / "a-1")
    job.path.mkdir(parents=True)
    evaluation(tmp_path).request.write(job)
    (table,) = (part for part in terminal_page(outcomes([job])).parts if isinstance(part, TextTable))
    assert "mask" not in table.rows[0]
    assert result_cells(group_by_seed(outcomes([run])), outcomes([run]))[0]["mask"] == "0.5"


def test_place_knows_the_forks_of_a_run(tmp_path):
    for name in ("a", "a-v10", "a-v2", "b-v2"):
        (tmp_path / name).mkdir()
    place = Place(tmp_path, ["a", "b-v2"], ClusterProfile(), None)
    assert [path.name for path in place.directories("a")] == ["a", "a-v2", "a-v10"]
    assert [path.name for path in place.directories("b")] == ["b"], "b-v2 is a run of the sweep file"


def test_value_that_neither_sweep_nor_command_line_sets_is_a_default(tmp_path):
    class Asked:
        chosen = frozenset({"optim.beta2", "stages.pretrain.mask"})
        config = merge([])

    request = TrainingRequest(Asked, tmp_path / "demo.yaml")
    assert request.is_default("optim.eps") and request.is_default("data.lanes")
    assert not request.is_default("optim.beta2") and not request.is_default("stages")
    assert not request.is_default("no such section.x")
