"""Tests of the rows of a measurement: on a CPU each row of a GPU is skipped with a reason, and its code still runs."""

from jobs.measuring import node
from jobs.measuring.functions.__main__ import ROWS
from jobs.measuring.rows import (
    MASKS,
    MODELS,
    NO_GPU,
    NO_PEER,
    ONE_NODE,
    SMALL,
    local_rows,
    scheduled_faults,
)


def rows_by_name(device, gpus):
    return {row.name: row for row in local_rows(device, gpus, 8, ())}


def test_each_row_of_gpus_is_skipped_on_cpus_with_reason_and_has_a_cpu_form():
    cuda = rows_by_name("cuda", 8)
    cpu = rows_by_name("cpu", 0)
    steps = [f"step_{size.replace('/', '').lower()}_{mask}" for size in MODELS for mask in MASKS]
    assert len(steps) == 6 and [cpu[name].skipped for name in steps] == [NO_GPU] * 6
    assert all(not cuda[name].skipped and cuda[name].options["compiled"] for name in steps)
    small = [row for name, row in cpu.items() if name.startswith("step_") and not row.skipped]
    assert {(row.options["size"], row.options["mask"]) for row in small} == {(s, m) for s in SMALL for m in MASKS}
    started = {row.function for row in cpu.values() if not row.skipped}
    assert started == {row.function for row in cuda.values() if not row.skipped}, "a row without a CPU form"


def test_rows_start_known_functions_and_have_limits():
    for rows in (rows_by_name("cuda", 8), rows_by_name("cpu", 0)):
        assert all(row.skipped or (row.function in ROWS and row.limit > 0) for row in rows.values())
        assert len({row.what for row in rows.values()}) == len(rows)


def test_faults_are_a_rank_an_agent_and_a_preemption_also_in_jobs():
    names = ["fault_rank", "fault_agent", "fault_preemption"]
    assert [row.name for row in local_rows("cpu", 0, 2, ()) if row.function == "fault"] == names
    rows = scheduled_faults("cuda", 8, 8, {"kind": "slurm"})
    assert [row.name for row in rows] == names[1:]
    assert all((row.options["nodes"], row.options["ranks"]) == (2, 2) for row in rows)
    assert tuple(names[1:]) == node.SCHEDULED, "nodes of a job leave them to the submit host"


def test_single_gpu_and_single_node_have_no_peers():
    assert rows_by_name("cuda", 1)["link_node"].skipped == NO_PEER
    assert rows_by_name("cuda", 8)["link_network"].skipped == ONE_NODE
    assert not rows_by_name("cuda", 2)["link_node"].skipped


def test_more_time_raises_each_limit():
    usual = rows_by_name("cpu", 0)
    assert all(row.limit == 3 * usual[row.name].limit for row in local_rows("cpu", 0, 8, (), 3.0))
    assert all(row.limit == usual[row.name].limit for row in local_rows("cpu", 0, 8, (), 0.5))


def test_less_time_shortens_each_measurement():
    short = {row.name: row for row in local_rows("cpu", 0, 2, (), 0.5)}
    usual = rows_by_name("cpu", 0)
    assert 2 * short["matmul"].options["seconds"] == usual["matmul"].options["seconds"]


def test_input_of_each_data_set_is_a_row():
    rows = local_rows("cpu", 0, 8, ["/a", "/b"])
    costs = {row.name: (row.what, row.options["manifest"]) for row in rows if row.function == "input"}
    assert costs == {
        "input_cost": ("cost of a sample on a core", "/a"),
        "input_cost_2": ("cost of a sample on a core, data set 2", "/b"),
    }
    (reads,) = (row for row in rows if row.function == "reads")
    assert reads.options["manifest"] == "/a"
