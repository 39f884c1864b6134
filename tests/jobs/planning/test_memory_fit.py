"""Tests of the memory checks of a plan and of the changes that they propose if a configuration does not fit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from flip import model_costs
from flip.common.host import Host
from flip.config.derived import at_world, world_size
from flip.config.finish import finish
from flip.config.identity import identity
from flip.model_costs import ACCELERATORS, find_accelerator, stage_memory
from flip.runs.checks import UNKNOWN
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.planning import memory_fit, preflight, run_cost
from jobs.sweeps.sweep_file import read_sweep

SWEEP = Path(__file__).resolve().parents[3] / "sweeps" / "model_scaling.yaml"
NODE = Host(cores=96, memory=10**12, bf16=True, cuda=True)


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", "/no/cache")


def planned(*overrides, run="baseline", on=NODE):
    runs = read_sweep(SWEEP, ["data.decoder=pillow", "data.resize=pillow", *overrides]).runs
    (requested,) = [candidate.config for candidate in runs if candidate.name == run]
    return finish(requested, on).config


def refused(config, profile, on=NODE):
    with pytest.raises(ConfigError) as error:
        memory_fit.check(config, profile, on)
    return error.value


def proposals(error):
    """The proposed changes as lists of overrides, the smallest change first."""
    first, alternatives = re.fullmatch(r"The smallest change that fits: (.*?)\.(?: Or: (.*)\.)?", error.remedy).groups()
    return [re.split(" with | and ", change) for change in [first, *(alternatives or "").split("; ")] if change]


def test_memory_check_reports_gpu_and_host_memory_if_config_fits():
    reports = {
        row.name: (row.text, row.state == UNKNOWN) for row in memory_fit.check(planned(), load_profile("h100"), NODE)
    }
    assert "of 80 GB, less about " in reports["GPU memory"][0] and "activations" in reports["GPU memory"][0]
    assert not reports["GPU memory"][1] and "a node" in reports["memory"][0]


def test_memory_of_cuda_and_nccl_is_not_for_tensors():
    config = planned()
    profile = load_profile("h100")
    needed = memory_fit.largest_stage(config)[1]["total"]
    reserved = memory_fit.reserved_bytes(config)
    alone = planned("resources.nodes=1", "resources.processes=1", "resources.gpus=1")
    assert memory_fit.reserved_bytes(alone) == memory_fit.CONTEXT < reserved
    for room, fits in ((reserved, True), (reserved - 1, False)):
        assert memory_fit.fits_gpu(config, replace(profile, gpu_memory_gb=(needed + room) / 1e9)) == fits


def test_memory_check_proposes_changes_that_fit():
    no_recompute = "compute.recompute=no"
    error = refused(planned(no_recompute), load_profile("h100"))
    assert "stage unmasked needs about" in error.what and "80 GB" in error.what
    changes = proposals(error)
    assert [overrides[0].partition("=")[0] for overrides in changes] == [
        "stages.unmasked.compute.recompute", "compute.accumulate", "resources.nodes", "stages.pretrain.batch",
    ]  # fmt: skip
    for overrides in changes:
        memory_fit.check(planned(no_recompute, *overrides), load_profile("h100"), NODE)
    assert changes[0] == ["stages.unmasked.compute.recompute=selective"] and changes[1] == ["compute.accumulate=2"]


def test_memory_check_proposes_nodes_that_fit_with_their_copies():
    """More nodes have more copies of the model: two nodes of 40 GB would not be enough here."""
    profile = ClusterProfile(name="small", kind="slurm", gpus_per_node=8, gpu_memory_gb=40)
    base = ["model.size=H/14", "resources.nodes=1", "compute.recompute=selective"]
    base += [f"stages.{name}.batch=4096" for name in ("pretrain", "unmasked")]
    for overrides in proposals(refused(planned(*base), profile)):
        memory_fit.check(planned(*base, *overrides), profile, NODE)


@pytest.mark.parametrize("gb, first", [(40, "compute.recompute=block"), (10, "compute.accumulate=")])
def test_memory_check_proposes_larger_change_for_smaller_card(gb, first):
    profile = ClusterProfile(name="small", kind="slurm", gpus_per_node=8, gpu_memory_gb=gb)
    config = planned("compute.recompute=no")
    error = refused(config, profile)
    overrides = proposals(error)[0]
    assert overrides[0].startswith(first), overrides
    refused(planned("compute.recompute=no", "stages.unmasked.compute.recompute=selective"), profile)
    memory_fit.check(planned(*["compute.recompute=no", *overrides]), profile, NODE)


def test_stage_recompute_affects_only_its_own_stage():
    """Memory and hours of the other stage stay the same, and so does the identity of the run."""
    plain, one_stage, all_stages = (
        planned("compute.recompute=no", *overrides)
        for overrides in ((), ["stages.unmasked.compute.recompute=block"], ["compute.recompute=block"])
    )
    memory = [[stage_memory(config, stage) for stage in config.stages] for config in (plain, one_stage, all_stages)]
    assert memory[1] == [memory[0][0], memory[2][1]]
    estimates = [run_cost.estimate(config, load_profile("h100")) for config in (plain, one_stage, all_stages)]
    hours = [[stage.gpu_hours for stage in estimate.stages] for estimate in estimates]
    assert hours[1] == [hours[0][0], hours[2][1]]
    assert identity(plain, "")["hash"] == identity(one_stage, "")["hash"]


@pytest.mark.parametrize("room, chosen", [(1.01, "no"), (0.99, "yes"), (0, "no")])
def test_fit_reshard_keeps_weights_gathered_if_gpus_have_room(room, chosen):
    """``room`` is GPU memory as a fraction of what the run needs without resharding; at 0 the profile gives none."""
    config = planned("compute.reshard=auto")
    assert config.compute.reshard == "no"
    tensors = memory_fit.largest_stage(config)[1]["total"]
    gpu = room * (tensors + memory_fit.reserved_bytes(config)) / 1e9
    memory_fit.fit_reshard(config, ClusterProfile(kind="slurm", gpus_per_node=8, gpu_memory_gb=gpu))
    assert config.compute.reshard == chosen
    assert (memory_fit.largest_stage(config)[1]["total"] < tensors) == (chosen == "yes")


def test_memory_check_advises_smaller_model_if_no_change_fits():
    tiny = ClusterProfile(name="tiny", kind="slurm", gpus_per_node=8, gpu_memory_gb=0.05)
    assert "smaller model" in refused(planned(), tiny).remedy


def test_memory_check_is_skipped_if_profile_lacks_memory_sizes():
    """The submitting machine may be smaller or larger than a node, so its own memory does not count."""
    (gpu, memory) = memory_fit.check(planned(), ClusterProfile(kind="slurm", gpu="abacus"), Host(4, 10**9))
    assert gpu.state == UNKNOWN and "gpu_memory_gb" in gpu.text
    assert memory.state == UNKNOWN and "(memory_gb)" in memory.text and "GB a node" in memory.text


def test_memory_check_refuses_cpu_run_on_too_small_host():
    batches = [f"stages.{name}.batch=1024" for name in ("pretrain", "unmasked")]
    config = planned("resources={nodes: 1, processes: 2, gpus: 0}", "data.lanes=8", *batches)
    small = Host(cores=8, memory=60 * 10**9)
    error = refused(config, ClusterProfile(), small)
    assert "a node that has" in error.what and "resources.nodes" not in error.remedy
    assert [overrides[0] for overrides in proposals(error)][:2] == ["compute.recompute=block", "compute.accumulate=4"]
    assert "resources.nodes" in refused(config, ClusterProfile(kind="slurm", memory_gb=60), small).remedy


def test_checkpoint_memory_is_doubled_on_gpus_or_with_memory_url():
    cpu = ["resources={nodes: 1, processes: 2, gpus: 0}", "data.lanes=8"]
    single_copy = model_costs.checkpoint_memory(planned(*cpu))
    assert single_copy == model_costs.state_bytes(planned()) // 2
    remote = planned(*cpu, "checkpoint.background=no", "checkpoint.url=s3://bucket/x")
    assert model_costs.checkpoint_memory(remote) == single_copy
    assert model_costs.checkpoint_memory(planned(*cpu, "checkpoint.url=gs://bucket/x")) == 2 * single_copy
    gpus = planned()
    assert model_costs.checkpoint_memory(gpus) == 2 * (2 * single_copy) // world_size(gpus)


def test_memory_check_refuses_loaders_too_large_for_gpu_host():
    error = refused(planned(), load_profile("h100"), Host(cores=96, memory=10**9, cuda=True))
    assert "data.buffer" in error.remedy


@pytest.mark.parametrize(
    "name, found",
    [
        ("H100 SXM", "H100 SXM"), ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("h100", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA A100-SXM4-80GB", "A100 80 GB"), ("a100", "A100 40 GB"),
        ("NVIDIA L40S", "L40S"), ("l4", "L4"), ("nvidia a10", "A10"), ("a40", "A40"), ("", None), ("mi300x", None),
        ("nvidia_a40", "A40"), ("nvidia_l4", "L4"), ("nvidia_a10", "A10"), ("nvidia_b200", "B200"),
        ("nvidia_h200_nvl", "H200 NVL"), ("nvidia_a100-sxm4-80gb", "A100 80 GB"), ("a100_1g.5gb", None),
        ("nvidia_h100_80gb_hbm3_1g.10gb", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)  # fmt: skip
def test_find_accelerator_recognises_card_names(name, found):
    card = find_accelerator(name)
    assert (card and card.name) == found


def test_accelerator_table_has_sources_and_unique_names():
    assert all(card.source.startswith("NVIDIA ") and card.memory_gb > 0 for card in ACCELERATORS)
    assert len({card.name for card in ACCELERATORS}) == len(ACCELERATORS)
    assert all(find_accelerator(card.name) is card for card in ACCELERATORS)


def test_profile_derives_tflops_and_memory_from_card_name():
    known = ClusterProfile(gpu="a100")
    explicit = ClusterProfile(gpu="a100", gpu_memory_gb=80, peak_tflops=300)
    assert (known.tflops, known.gpu_bytes) == (312, 40e9)
    assert (explicit.tflops, explicit.gpu_bytes) == (300, 80e9)
    assert (ClusterProfile().tflops, ClusterProfile().gpu_bytes) == (0, 0)


def test_estimate_counts_recomputed_passes_in_steps_and_hours():
    profile = replace(load_profile("h100"), utilisation=0.4)
    plain, recomputed, accumulated = (
        run_cost.estimate(planned(*overrides), profile)
        for overrides in ((), ["compute.recompute=block"], ["compute.recompute=block", "compute.accumulate=2"])
    )
    assert recomputed.cost.gpu_hours == pytest.approx(plain.cost.gpu_hours * 4 / 3)
    assert accumulated.cost.gpu_hours == pytest.approx(plain.cost.gpu_hours * 5 / 3)
    assert recomputed.cost.flops == plain.cost.flops
    stage = plain.as_dict()["stages"][0]
    assert stage["step_seconds"] * stage["steps"] * 128 / 3600 == pytest.approx(stage["gpu_hours"])
    assert stage["memory"]["total"] > stage["memory"]["weights"] > 0


def test_memory_is_checked_on_every_number_of_nodes_of_range():
    """On fewer nodes a rank holds a larger part of the weights and moments."""
    profile = load_profile("h100")
    config = planned("resources.nodes=[2, 8]", "compute.replicate=1", "compute.reshard=yes", "compute.recompute=block")
    rows = list(preflight._memory(config, profile, NODE))
    assert [row.name for row in rows if "GPU" in row.name] == [f"GPU memory, {n} nodes" for n in (2, 4, 8)]
    few, most = (memory_fit.largest_stage(at_world(config, ranks))[1]["total"] for ranks in (16, 64))
    assert few > most
    tight = replace(profile, gpu_memory_gb=((few + most) / 2 + memory_fit.reserved_bytes(config)) / 1e9)
    memory_fit.check(config, tight, NODE)
    with pytest.raises(ConfigError, match="on 2 nodes stage .* of a GPU that has .* Begin the range with more nodes"):
        list(preflight._memory(config, tight, NODE))


def test_estimate_lists_speeds_of_range_and_price_of_spares():
    shape = ["resources.nodes=[2, 8]", "resources.spares=2", "data.lanes=512"]
    lines = run_cost.estimate(planned(*shape), load_profile("h100")).nodes
    spares = "2 spare: 25 % more nodes than work"
    assert [line.split(",")[0] for line in lines] == ["2: 16 ranks", "4: 32 ranks", "8: 64 ranks", spares]
    assert "4 micro-batches" in lines[0] and "samples/s" in lines[0] and "micro-batches" not in lines[2]
    assert lines[3].endswith("node-hours")
    assert not run_cost.estimate(planned(), load_profile("h100")).nodes


def test_spares_need_node_agents():
    config = planned("resources.nodes=2", "resources.spares=1")
    profile = load_profile("h100")
    preflight._machine(config, profile, NODE)
    with pytest.raises(ConfigError, match=r"spares: h100 has no node agents.*agents: true"):
        preflight._machine(config, replace(profile, agents=False), NODE)
    tracked = planned("resources.nodes=2", "resources.spares=1", "monitor.wandb=masking")
    preflight._machine(tracked, profile, NODE)
