"""Tests of verdicts: each trouble has its cause and its remedy, and a machine without trouble has none."""

from dataclasses import replace

import pytest

from jobs.measuring import page
from jobs.measuring.verdicts import BROKEN, SLOW, UNKNOWN, WORKS, judge
from jobs.planning.measurement import FAILED, MEASURED, SKIPPED, TIME_LIMIT, MeasuredRow
from tests.jobs.planning.test_measurement import example


def row(name, **values):
    return MeasuredRow(name, f"row {name}", MEASURED, values, seconds=1.0)


def gpu(number, bf16, datasheet=989.0):
    return {"number": number, "name": "NVIDIA H100 80GB HBM3", "bf16": bf16, "datasheet": datasheet}


def speed(microseconds, kernel=True):
    return {"short": 384, "markers": False, "size": 224, "mask": 0.75, "kernel": kernel, "microseconds": microseconds}


STEP = {
    "device": "cuda", "size": "B/16", "mask": "0.5", "batch": 256, "parameters": 150e6, "samples_per_second": 3000.0,
    "milliseconds": 85.0, "utilisation": 0.42, "tflops": 415.0, "spread": 0.05, "recompilations": 0,
    "megabytes": 20_000, "planned_megabytes": 21_000,
}  # fmt: skip
DISK = {"write_megabytes_per_second": 900.0, "replace_milliseconds": 2.0, "locks_exclude": True}
READS = {
    "processes": 8, "megabytes_per_second_8": 3000.0, "read_milliseconds": 8.0, "cached": False,
    "bytes_per_sample": 40_000,
}  # fmt: skip
SAVE = {"megabytes": 2000, "save_seconds": 2.0, "stall_seconds": 0.1, "restore_seconds": 1.0, "equal": True}
FAULT = {
    "next_step_seconds": 4.5, "steps": 200, "different_tensors": [], "detect_seconds": 0.1, "decide_seconds": 2.0,
    "start_seconds": 1.5, "restore_seconds": 0.2, "replay_seconds": 0.1,
}  # fmt: skip
LATE_START = {"next_step_seconds": 95.0, "start_seconds": 90.5}
REQUEUED = {"next_step_seconds": 135.0, "requeue_seconds": 121, "setting": "cred_expire=120", "nodes": 2}
COPIES = {"devices": [{"number": number, "gbytes": rate} for number, rate in enumerate((52.0, 52.5, 26.0))]}
GOOD = {
    "matmul": {"devices": [gpu(0, 650.0), gpu(1, 655.0), gpu(2, 648.0), gpu(3, 652.0)]},
    "copies": {"devices": [{"number": 0, "gbytes": 52.0}, {"number": 1, "gbytes": 51.0}]},
    "step_b16_0.5": STEP,
    "link_node": {"device": "cuda", "gbps": 2900.0},
    "input_cost": {
        "rows": [speed(250.0)],
        "without_kernel_because": "",
        "limit": "view",
        "shares": {"read": 0.12, "view": 0.88},
    },
    "reads": READS,
    "disk": DISK,
    "save": SAVE,
    "losses": {"steps": 50, "rows": [{"form": "bf16, eager", "largest_difference": 0.004, "tolerance": 0.02}]},
    "fault_rank": FAULT,
    "fault_preemption": FAULT,
}


def verdicts(**changes):
    rows = [row(name, **(values | changes.get(name, {}))) for name, values in GOOD.items()]
    return judge(example(*rows))


def test_good_machine_works():
    assert {verdict.verdict for verdict in verdicts()} == {WORKS} and len(verdicts()) == 11


@pytest.mark.parametrize(
    ("name", "change", "about", "verdict", "because", "then"),
    [
        ("matmul", {"devices": [gpu(0, 650.0), gpu(1, 655.0), gpu(2, 560.0)]}, "GPU 2", SLOW, "560 TFLOP/s", "CLOCK"),
        ("matmul", {"devices": [gpu(0, 400.0)]}, "products", SLOW, "40 % of the data sheet", "POWER"),
        ("copies", COPIES, "copies to GPU 2", SLOW, "26 GB/s from the host, its peers 52", "pcie.link.width"),
        ("step_b16_0.5", {"utilisation": 0.2}, "training of B/16", SLOW, "its kernels are slow", "trace"),
        ("step_b16_0.5", {"recompilations": 3}, "training of B/16", SLOW, "3 graphs were compiled again", "Report"),
        ("step_b16_0.5", {"spread": 0.9}, "training of B/16", SLOW, "90 % of the median longer", "nothing else runs"),
        ("step_b16_0.5", {"megabytes": 30_000}, "memory of B/16", SLOW, "plans count 21,000 MB", "memory free"),
        ("input_cost", {"rows": [speed(4000.0)]}, "input", SLOW, "need 120 cores, and it has 96", "flip shards recode"),
        (
            "input_cost", {"rows": [speed(300.0, False)], "without_kernel_because": "visible-jpeg is missing"},
            "input", SLOW, "visible-jpeg is missing", "make install",
        ),
        ("reads", {"megabytes_per_second_8": 900.0}, "row reads", SLOW, "GPUs of a node need 1,200 MB/s", "recode"),
        ("reads", {"read_milliseconds": 300.0}, "row reads", SLOW, "high latency", "data.buffer"),
        ("disk", {"locks_exclude": False}, "locks", BROKEN, "two attempts", "FLIP_RUNS"),
        ("disk", {"replace_milliseconds": 400.0}, "folder of runs", SLOW, "high latency", "FLIP_RUNS"),
        ("disk", {"write_megabytes_per_second": 9.0}, "folder of runs", SLOW, "writes 9 MB/s", "FLIP_RUNS"),
        ("save", {"equal": False}, "save and restore", BROKEN, "differ", "FLIP_RUNS"),
        (
            "losses", {"rows": [{"form": "bf16, compiled", "largest_difference": 0.31, "tolerance": 0.02}]},
            "losses in bf16, compiled", BROKEN, "31 % from fp32", "fp32",
        ),
        (
            "losses", {"rows": [{"form": "bf16, eager", "largest_difference": None, "tolerance": 0.02}]},
            "losses in bf16, eager", BROKEN, "not finite", "fp32",
        ),
        ("fault_rank", {"different_tensors": ["a", "b"]}, "fault_rank", BROKEN, "2 tensors differ", "report it"),
        ("fault_rank", {"next_step_seconds": 130.0}, "fault_rank", SLOW, "after 130 s (detect", "Report"),
        ("fault_rank", LATE_START, "fault_rank", SLOW, "decide 2, start 90.5, restore", "faster file system"),
        ("fault_rank", {**LATE_START, "restore_seconds": 200.0}, "fault_rank", SLOW, "restore 200", "FLIP_RUNS"),
        ("fault_preemption", REQUEUED, "fault_preemption", SLOW, "Slurm waits 121 before it starts", "requeue_delay"),
    ],
)  # fmt: skip
def test_each_trouble_is_named_with_cause_and_remedy(name, change, about, verdict, because, then):
    first = [each for each in verdicts(**{name: change}) if each.verdict != WORKS][0]
    assert (first.verdict, about in first.about) == (verdict, True), first
    assert because in first.because and then in first.then


TRACE = {"size": "B/16", "mask": "0.5", "longest": {"gemm": 0.3, "flash_fwd": 0.4}, "kernels": 900}


@pytest.mark.parametrize(
    ("busy", "because", "then"),
    [(0.95, "the longest: flash_fwd 40 %, gemm 30 %", "bench-gpu"), (0.5, "kernels run for 50 % of a step", "pairs")],
)
def test_low_utilisation_is_explained_by_the_trace(busy, because, then):
    trace = row("trace", busy=busy, milliseconds=85.0, **TRACE)
    slow = row("step_b16_0.5", **(STEP | {"utilisation": 0.2}))
    (judged,) = judge(example(row("matmul", **GOOD["matmul"]), slow, trace))[:1]
    assert judged.verdict == SLOW and because in judged.because and then in judged.then


def test_trace_counts_the_time_of_a_step_without_profiler_and_explains_no_other_step():
    """Kernels of 85 ms in a profiled step of 170 ms: an ordinary step of 85 ms has nothing but kernels."""
    trace = row("trace", busy=0.5, milliseconds=170.0, **TRACE)
    slow = STEP | {"utilisation": 0.2}
    (judged,) = judge(example(row("step_b16_0.5", **slow), trace))
    assert "the longest: flash_fwd" in judged.because
    for other in ({"size": "L/16"}, {"mask": "0.75"}):
        (judged,) = judge(example(row("step_other", **(slow | other)), trace))
        assert "its kernels are slow" in judged.because and "flash_fwd" not in judged.because


def test_input_verdict_takes_the_cost_at_the_mask_of_each_step():
    """Eight GPUs at 3,000 samples/s, and 5,000 us a sample at the mask of the step: 1.25 * 8 * 3000 * 0.005."""
    rows = [speed(200.0), speed(5000.0) | {"mask": 0.5}]
    (judged,) = [each for each in verdicts(input_cost={"rows": rows}) if each.about == "input"]
    assert "need 150 cores" in judged.because
    (judged,) = [each for each in verdicts(input_cost={"rows": [speed(3200.0)]}) if each.about == "input"]
    assert judged.verdict == WORKS, "96 of 96 cores"


def test_failed_row_leaves_the_others():
    rows = [row(name, **values) for name, values in GOOD.items() if name != "disk"]
    failed = MeasuredRow("disk", "files in the folder of runs", FAILED, {}, "No space left on device", 1.0)
    late = MeasuredRow("reads", "reads of shards", TIME_LIMIT, {}, "it took more than 60 s", 60.0)
    skipped = MeasuredRow("link_network", "collectives between nodes", SKIPPED, {}, "one node")
    judged = judge(example(failed, late, skipped, *rows))
    assert [each.verdict for each in judged[:3]] == [BROKEN, UNKNOWN, WORKS] and len(judged) == 12
    assert judged[0].because == "No space left on device" and "FLIP_RUNS" in judged[0].then
    assert page.headline(judged) == "1 does not work, 1 is not measured, 10 work"


@pytest.mark.parametrize("name", ["matmul", "step_b16_0.5", "losses", "fault_rank", "nodes", "node2_losses"])
def test_each_row_that_fails_has_a_remedy(name):
    (judged,) = judge(example(MeasuredRow(name, name, FAILED, {}, "RuntimeError: x")))
    assert judged.verdict == BROKEN and f"--only {name.removeprefix('node2_')};" in judged.then


def test_rows_without_space_are_one_verdict_of_the_folder_of_runs():
    rows = [MeasuredRow(name, name, FAILED, {}, "OSError: No space left on device") for name in ("disk", "save")]
    rows += [MeasuredRow("node2_save", "save, node 2", FAILED, {}, "[Errno 122] Disk quota exceeded")]
    judged = judge(example(*rows))
    wanted = ["space of the folder of runs", "space of the folder of runs, node 2"]
    assert [each.about for each in judged] == wanted and {each.verdict for each in judged} == {BROKEN}


def test_link_without_an_answer_does_not_work_and_one_without_time_is_not_measured():
    late = MeasuredRow("link_network", "collectives between nodes", TIME_LIMIT, {}, "it took more than 90 s")
    (judged,) = judge(example(late))
    assert judged.verdict == BROKEN and "dropped" in judged.because and "firewall" in judged.then
    (judged,) = judge(example(replace(late, status=SKIPPED, detail="no time was left: give it more --minutes")))
    assert judged.verdict == UNKNOWN


@pytest.mark.parametrize(
    ("fields", "about", "then"),
    [
        ({"device": "cuda", "nodes": 1}, "link of GPU 1 and GPU 2", "nvlink --status -i 1"),
        ({"device": "cuda", "nodes": 3}, "link of node 1 and node 2", "firewall"),
        ({"device": "cpu", "nodes": 1}, "", ""),
    ],
)
def test_slow_link_is_named_beside_its_peers(fields, about, then):
    links = [
        {"between": [0, 1], "gbytes": 48.0},
        {"between": [1, 2], "gbytes": 40.0},
        {"between": [2, 0], "gbytes": 49.0},
    ]
    judged = judge(example(row("link_node", gbps=2900.0, links=links, **fields)))
    slow = [each for each in judged if each.verdict == SLOW]
    assert [each.about for each in slow] == ([about] if about else []) and judged[-1].verdict == WORKS
    if about:
        assert "40 GB/s in each direction, its peers 48" in slow[0].because and then in slow[0].then
    assert len(judge(example(row("link_node", gbps=2900.0, links=links[:2], **fields)))) == 1, "no peer to compare with"


def test_cpu_limit_of_a_slow_node_is_named():
    entry = {"node": 1, "row": "matmul", "number": "devices 0 bf16", "value": 50.0, "peers": 100.0, "load": 3.0}
    peers = {"slow": [entry | {"throttled_seconds": 4.2}], "versions": []}
    (judged,) = judge(example(row("peers", **peers)))
    assert "stopped its processes for 4.2 CPU seconds" in judged.because and "Raise the CPU limit" in judged.then


def test_busy_machine_is_said_first_and_explains_uneven_steps():
    uneven = row("step_tiny_0.5", **{**STEP, "device": "cpu", "spread": 0.9})
    judged = judge(replace(example(row("disk", **DISK), uneven), load=1.7))
    assert (judged[0].about, judged[0].verdict) == ("load of the machine", SLOW)
    assert "1.7 of 96 cores" in judged[0].because and [each.verdict for each in judged[1:]] == [WORKS] * 2


def test_input_of_each_data_set_has_a_verdict_that_names_its_largest_stage():
    second = replace(row("input_cost_2", **GOOD["input_cost"]), what="cost of a sample on a core, data set 2")
    judged = judge(example(row("input_cost", **GOOD["input_cost"]), second))
    assert [verdict.about for verdict in judged] == ["input", "input data set 2"]
    assert all("88 % of its time is view" in verdict.because for verdict in judged)
