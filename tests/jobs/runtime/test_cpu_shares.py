"""Tests which CPUs each rank of a node agent gets."""

import os

from jobs.runtime import cpu_shares


def test_ranks_share_cpus_of_agent_by_cores(monkeypatch, tmp_path):
    """CPU i and i + 4 are threads of a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cpu_shares, "first_thread", lambda cpu: cpu % 4)
    bound = {"SLURM_CPU_BIND": "quiet,mask_cpu:0xFF"}
    assert [cpu_shares.share_of_cpus(rank, 2, bound) for rank in (0, 1)] == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert cpu_shares.share_of_cpus(0, 3, bound) == [0, 4], "the remainder stays unused"
    for unbound in ({}, {"SLURM_CPU_BIND": "quiet,none"}, {"SLURM_CPU_BIND": ""}):
        assert cpu_shares.share_of_cpus(0, 2, unbound) == []


def test_ranks_of_agent_stay_on_sockets_that_share_cpu_numbers_in_turn(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cpu_shares, "package", lambda cpu: cpu % 2)
    monkeypatch.setattr(cpu_shares, "first_thread", lambda cpu: cpu)
    bound = {"SLURM_CPU_BIND": "quiet,mask_cpu:0xFF"}
    shares = [cpu_shares.share_of_cpus(rank, 4, bound) for rank in range(4)]
    assert shares == [[0, 2], [4, 6], [1, 3], [5, 7]]


def test_package_of_cpu(tmp_path):
    (tmp_path / "cpu3" / "topology").mkdir(parents=True)
    (tmp_path / "cpu3" / "topology" / "physical_package_id").write_text("1\n")
    assert (cpu_shares.package(3, tmp_path), cpu_shares.package(4, tmp_path)) == (1, 0)


def test_first_thread_of_core(tmp_path):
    for text, first in (("3,51\n", 3), ("2-3\n", 2), ("7\n", 7)):
        (tmp_path / "cpu51" / "topology").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cpu51" / "topology" / "thread_siblings_list").write_text(text)
        assert cpu_shares.first_thread(51, tmp_path) == first
    assert cpu_shares.first_thread(9, tmp_path) == 9
