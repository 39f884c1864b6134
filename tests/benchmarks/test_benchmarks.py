"""Tests that every benchmark runs at a small size and writes its results; no test checks a speed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import parquet, prefetch, storage, stream, table
from benchmarks.lib import steady, synthetic, table_rows
from flip.data import decode
from flip.data.order import SampleOrder
from flip.data.prefetch import chunks_due, phase
from jobs.measuring.functions import photo_shards
from tests.slurm_site import require

pytestmark = pytest.mark.long

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name, *arguments, cwd):
    command = [sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def report(name, *arguments, cwd):
    """Run a benchmark and return its JSON.

    Checks that it prints the same as it writes, and that the table accepts it.
    """
    result = run(name, *arguments, "--json", "--out", cwd / "results" / f"{name}.json", cwd=cwd)
    assert result.returncode == 0, result.stderr
    written = json.loads((cwd / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert written == json.loads(result.stdout) and written["benchmark"] == name
    assert set(written["machine"]) >= {"processor", "cores", "load_before", "python", "numpy"}
    assert written["took"]["seconds"] > 0 <= written["took"]["cores_of_others"]
    rows = table_rows.ROWS[name](written)
    assert all(row.what and row.own for row in rows) and len({row.what for row in rows}) == len(rows)
    assert f"| {name}.json |" in table.page({name: written}, {})
    return written


def test_order_benchmark_reports_disk_size_and_first_batch_times(tmp_path):
    results = report("order", "--quick", cwd=tmp_path)
    assert results["data"]["shards"] == 600 and results["data"]["L"] % 512 == 0
    assert results["disk"]["bytes"] == sum(size for name, size in results["disk"].items() if "." in name)
    assert [(row["passes"], row["W"]) for row in results["first_batch"][:4]] == [(0, 1), (0, 8), (0, 512), (0.01, 1)]
    assert [row["W"] for row in results["afterwards"]] == [8, 512] and results["chunk_reads_per_second"] > 0
    assert [row["check"] for row in results["load"]] == [False, True]


def test_parquet_benchmark_measures_each_writer_and_names_absent_peers(tmp_path):
    results = report("parquet", "--quick", cwd=tmp_path)
    assert [case["writer"] for case in results["cases"]] == list(parquet.WRITERS)
    assert results["cases"][0]["read_per_used"] < 1.01
    assert [row["peer"] for row in results["peers"]] == list(parquet.PEERS)
    assert all((row["read_us"] is None) == (row["note"] == "not installed") for row in results["peers"])


def test_prefetch_benchmark_repeats_without_stalls_at_constant_latency(tmp_path):
    results = report("prefetch", "--quick", cwd=tmp_path)
    again = report("prefetch", "--quick", cwd=tmp_path)
    assert results == again | {"machine": results["machine"], "took": results["took"]}
    calm = [case for case in results["cases"] if case["latency"] == "constant" and case["step"] == 0.5]
    assert calm and all(case["stalled_share"] == 0 for case in calm)


def test_report_benchmark_measures_page_and_plain_json(tmp_path):
    results = report("report", "--quick", cwd=tmp_path)
    assert results["data"]["runs"] == 7 and results["data"]["metrics_bytes"] > 7 * 60 * 400
    for part in ("report", "plain_json"):
        assert results[part]["seconds"] > 0 and results[part]["peak_bytes"] > 10_000_000
    assert results["report"]["page_bytes"] > 10_000


@pytest.mark.slow
def test_step_benchmark_measures_forms_and_masks(tmp_path):
    results = report("step", "--quick", "--beside", 0.75, "--masks", 0, 0.75, cwd=tmp_path)
    own_rows = [row for row in results["beside_the_peer"] if row["form"] != "open_clip"]
    assert [(row["mask"], row["form"]) for row in own_rows] == [("0.75", "ours"), ("0.75", "ours, padding left out")]
    assert all(row["milliseconds"] > 0 and row["peak_MB"] > 50 for row in own_rows)
    assert all(sum(row["profile"].values()) == pytest.approx(1, abs=0.01) for row in own_rows)
    first, second = results["masked"]["cases"]
    assert first["time_ratio"] == first["FLOPs_ratio"] == 1 and second["FLOPs_ratio"] < 0.6 and first["b"] == 2
    assert "not measured" in results["gpu"]


def test_loss_benchmark_compares_tiled_and_untiled_forms(tmp_path):
    results = report("loss", "--quick", cwd=tmp_path)
    assert results["farthest_from_float64"] <= table_rows.EXACT
    assert [(row["B"], row["form"]) for row in results["cases"] if row["form"] != "open_clip"] == [
        (256, "whole"),
        (256, "tiles of 256"),
        (512, "whole"),
        (512, "tiles of 256"),
    ]
    assert all(row["milliseconds"] > 0 for row in results["cases"])
    assert all(row["kernels"] > 0 for row in results["cases"] if row["form"].startswith("tiles"))


def test_checkpoint_benchmark_measures_stalls_and_planning(tmp_path):
    results = report("checkpoint", "--quick", cwd=tmp_path)
    assert [row["way"] for row in results["cases"]] == ["blocking", "background", "torch async_save"]
    assert all(0 < row["stall_s"] <= row["written_s"] for row in results["cases"])
    own, dcp, cached = results["planning"]
    assert [row["ranks"] for row in results["planning"]] == [8, 8, 8] and own["items"] > 200
    assert own["exchanged_MB"] < cached["exchanged_MB"] < dcp["exchanged_MB"] == cached["exchanged_first_MB"]


def test_memory_benchmark_reports_predicted_and_measured_bytes(tmp_path):
    results = report("memory", "--quick", cwd=tmp_path)
    assert [row["recompute"] for row in results["cases"]] == ["no", "selective"]
    assert all(row["measured_MB"] >= 0 < row["predicted_MB"] for row in results["cases"])
    assert {row["measured_MB"] for row in results["on_cuda"]["cases"]} == {"not measured"}


@pytest.mark.slow
@pytest.mark.s3
def test_stream_benchmark_measures_installed_pipelines_and_stage_costs(tmp_path):
    results = report("stream", "--quick", cwd=tmp_path)
    dataset = results["sets"]["256 px"]
    assert set(dataset["measured"]) == set(stream.PLACES)
    for place, rows in dataset["measured"].items():
        assert [row["pipeline"] for row in rows] == stream.PLACES[place]
        for row in rows:
            measured = row["samples_per_s"] is not None and row["cpu_us"] > 0
            assert measured == (not row["note"]) and (measured or row["pipeline"] in stream.NEEDS)
    goals = {row["what"]: row["goal"] for row in dataset["ratios"]}
    decoding = "beside bare decode + crop, samples per processor second"
    assert goals[f"files to batch on one core, 256 px, markers, mask 0.75, {decoding}"] == 2
    assert goals["files to batch on two cores, 256 px, mask 0.5, beside one core, samples/s"] == stream.TWO_TO_ONE
    assert goals["S3 to batch on one core, 256 px, mask 0.75, beside webdataset + s3fs whole, samples/s"] == 1.5
    costs = {row["stage"]: row["us"] for row in dataset["costs"]}
    assert min(cost for stage, cost in costs.items() if stage != "all else") > 0
    assert sum(cost for stage, cost in costs.items() if stage != "whole") == pytest.approx(costs["whole"], rel=0.01)


def test_stream_ratio_is_of_speeds_in_the_same_round():
    own = [stream.Pass(200.0, 10.0), stream.Pass(300.0, 20.0), stream.Pass(100.0, 40.0)]
    peer = [stream.Pass(100.0, 30.0), stream.Pass(100.0, 40.0), stream.Pass(100.0, 40.0)]
    by_rate = stream._ratio("what", own, peer, "rate", 1.5)
    assert by_rate == {"what": "what", "ours": 200, "peer": 100, "goal": 1.5, "ratio": 2, "least": 1, "most": 3}
    by_cpu = stream._ratio("what", own, peer, "cpu", None)
    assert [by_cpu[key] for key in ("ours", "peer", "ratio", "least", "most")] == [50_000, 25_000, 2, 1, 3]


def test_steady_pass_leaves_out_first_and_last_batches():
    """They come from full buffers, and take no time."""

    def batches(name):
        for number in range(40):
            if steady.AHEAD <= number < 40 - steady.AHEAD:
                time.sleep(0.01)
            yield 4

    measured = steady.measure(batches, "name", 160, 4)
    assert 0 < measured.rate <= 4 / 0.01 and measured.cpu < 0.01e6


@pytest.mark.slow
@pytest.mark.s3
def test_resume_benchmark_times_first_batch_at_several_starts(tmp_path):
    results = report("resume", "--quick", cwd=tmp_path)
    starts = [row["S"] for row in results["ours"]]
    assert starts == sorted(set(starts)) and starts[-1] < results["data"]["N"]
    assert all(row["first_batch_seconds"] > 0 and row["megabytes_read"] > 1 for row in results["ours"])
    assert [row["computed_seconds"] > 0 for row in results["webdataset"]] == [True] * 3
    measured = [row for row in results["mosaicml_streaming"] if row.get("note") != "not installed"]
    assert all(row["first_sample_seconds"] > 0 for row in measured)


@pytest.mark.slow
@pytest.mark.s3
def test_storage_benchmark_compares_clients_and_second_requests(tmp_path):
    results = report("storage", "--quick", cwd=tmp_path)
    assert [row["client"] for row in results["processor"]] == ["s3fs", "obstore"]
    cases = [(row["client"], row["hedge"]) for row in results["late"]]
    assert cases == [("s3fs", 0.0), ("s3fs", 1.0), ("obstore", 0.0), ("obstore", 1.0)]
    assert all(row["requests"] >= results["settings"]["reads"] for row in results["late"])


def test_delay_of_an_answer_is_drawn_from_seed_range_and_count():
    head = b"GET /data/object.tar HTTP/1.1\r\nRange: bytes=%d-%d\r\n\r\n"
    one, same, other = (storage.Latency(seed, 100) for seed in (0, 0, 1))
    delays = [one(head % (100 * number, 100 * number + 99)) for number in (0, 1, 1)]
    assert delays == [same(head % (100 * number, 100 * number + 99)) for number in (0, 1, 1)]
    assert len({*delays, other(head % (0, 99))}) == 4
    assert one(b"GET /data?list-type=2 HTTP/1.1\r\n\r\n") == 0


def test_photo_shards_have_file_sizes_of_photographs():
    """The bytes of a JPEG determine its decoding time: they are about as many as LAION's, and all images differ."""
    for kind, low, high in zip(photo_shards.KINDS, (20_000, 45_000), (28_000, 65_000), strict=True):
        photos = photo_shards.samples(kind, 12, 1)
        assert low < np.mean([len(image) for image, _ in photos]) < high and len({image for image, _ in photos}) == 12
        shapes = [decode.decode(image).shape for image, _ in photos]
        assert {min(shape[:2]) for shape in shapes} == {kind.side} and (len(set(shapes)) == 1) == kind.square
        assert photos == photo_shards.samples(kind, 12, 1) and all(3 <= len(text.split()) <= 20 for _, text in photos)


def test_launcher_benchmark_counts_sbatch_and_squeue_calls(tmp_path):
    results = report("launcher", "--quick", cwd=tmp_path)
    assert results["plan"]["runs"] == results["submit"]["runs"] == 4 and results["status"]["runs"] == 6
    own, loop, *_ = results["submit"]["ways"]
    assert own["sbatch_calls"] == results["submit"]["shapes"] == 2 and results["status"]["squeue_calls"] == 1
    assert {row["verdict"] for row in (results["plan"], results["status"], *results["help"])} <= {"ok", "missed"}
    assert "explain" in [row["command"] for row in results["help"]]
    assert loop["sbatch_calls"] == 4


@pytest.mark.slow
def test_evaluation_benchmark_measures_zero_shot_and_retrieval(tmp_path):
    results = report("evaluation", "--quick", cwd=tmp_path)
    assert set(results["tasks"]) == {"zero-shot", "retrieval"}
    for task in results["tasks"].values():
        assert task["farthest"] <= 1e-6 and 0 < min(task["shares"].values()) < 1
        assert all(row["milliseconds"] > 0 for row in task["forms"])


def test_prefetch_benchmark_prints_text_and_rejects_invalid_ranks(tmp_path):
    size = ["--ranks", 2, "--lanes", 4, "--batch", 128, "--steps", 40, "--shards", 200]
    assert "stalled share" in run("prefetch", *size, cwd=tmp_path).stdout
    refused = run("prefetch", "--ranks", 3, "--lanes", 4, cwd=tmp_path)
    assert refused.returncode == 2 and "W must divide L" in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(table_rows.ROWS))
def test_benchmark_help_lists_out_option(name, tmp_path):
    assert "--out" in run(name, "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(("words", "quick"), [((), False), (("QUICK=1",), True)])
def test_make_bench_is_quick_only_if_requested(words, quick):
    environment = {name: value for name, value in os.environ.items() if name not in ("QUICK", "MAKEFLAGS")}
    command = ["make", "-n", "bench", "ONLY=order", *words]
    shown = subprocess.run(command, cwd=FOLDER.parent, env=environment, capture_output=True, text=True, check=True)
    assert "benchmarks/$name.py" in shown.stdout and ("--quick" in shown.stdout) == quick


def test_synthetic_table_has_consistent_chunk_reads():
    table = synthetic.table(700)
    assert table.chunks == -(-table.samples // table.chunk) and (table.shards[:, 2] <= table.shards[:, 1]).all()
    length = synthetic.SAMPLE_BLOCKS * 512
    for j in (0, 1, 500, table.chunks - 1):
        reads = table.chunk_reads(j)
        assert sum(count for *_, count in reads) == len(table.chunk_ids(j))
        assert all(stop - start == count * length for _, start, stop, count in reads)
    crossing = next(j for j in range(table.chunks) if len(table.chunk_reads(j)) == 2)
    assert table.chunk_reads(crossing)[1][1] == 0


def test_prefetch_plan_follows_sample_order_and_chunks_due():
    table = synthetic.table(300)
    stream = SampleOrder(5, table.samples, table.chunk, prefetch.Q, 8)
    fleet = prefetch.Fleet(2, 40, 16)
    needs = prefetch.plan(stream, table, fleet)
    lane = 3
    k = 1
    selected = (needs.lane == lane) & (needs.block == k)
    ids = stream.positions(range(lane, lane + 1), k * stream.block_samples, stream.block_samples)[0][0]
    first = {int(j): int(np.flatnonzero(ids // table.chunk == j)[0]) for j in np.unique(ids // table.chunk)}
    assert (needs.position[selected] - k * stream.block_samples).tolist() == list(first.values())
    assert needs.requests[selected].tolist() == [len(table.chunk_reads(j)) for j in first]
    for lead, span in (
        (0.0, stream.block_samples),
        (10.0, stream.block_samples - 256),
        (1.0, stream.block_samples - 32),
    ):
        starts = prefetch.begins(stream, fleet, needs, prefetch.Case(0.5, 2, "waiting", "drawn", "spread", lead))
        counts = [chunks_due(n, span, prefetch.Q, phase(lane)) for n in range(stream.block_samples)]
        moments = [next(n for n, count in enumerate(counts) if count > i) for i in range(4)]
        assert starts[selected].tolist() == [n // fleet.count for n in moments]


def test_simulated_worker_fills_all_slots_but_the_lent_one_while_its_rank_waits():
    case = prefetch.Case(1.0, 2, "waiting", "constant")
    clock = prefetch._Clock(case, prefetch.Fleet(ranks=1, steps=20, count=1), work=0.0)
    late = 8
    starts = []
    for step in range(20):
        begin = clock.begin(step)
        starts.append(begin[0])
        clock.done(step, begin + [0.0, 100.0 * (step == late)])
    prepared = [step for step in range(late, 20) if starts[step] < clock.ready[late]]
    assert len(prepared) == prefetch.AHEAD, "while the rank waits for the other worker"


def test_synthetic_held_bytes_counts_cached_blocks():
    stream = SampleOrder(1, 100_000, 16, 4, 512)
    assert synthetic.held_bytes(stream, 8) == 2 * 2 * 8 * 64 * stream.block_samples


@pytest.mark.slow
@pytest.mark.slurm
def test_recovery_benchmark_times_restarts_in_job_and_by_requeue(tmp_path):
    require(False)
    results = report("recovery", "--quick", cwd=tmp_path)
    cases = {case["case"]: case for case in results["cases"]}
    assert {name: case.get("requeues") for name, case in cases.items()} == {
        "agents": 0, "requeue": 1, "spare": 0, "silent": 0, "submitit": 1, "start": None,
    }  # fmt: skip
    assert all(case["seconds"] > 0 for case in cases.values())
    assert cases["submitit"]["after_killed_rank"] == "FAILED"
    assert cases["start"]["without_agents"] > 0 and "median" in cases["start"]["extra"]
