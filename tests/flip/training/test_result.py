"""Tests result.json: what a complete run says of its length, its cost and its last checkpoint."""

from types import SimpleNamespace

from flip import model_costs
from flip.config.schema import Config, Stage
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir, read_json
from flip.training.result import write_result


def test_result_counts_the_operations_of_every_stage_and_names_the_last_checkpoint(tmp_path):
    run = RunDir(tmp_path / "run")
    run.start_attempt({})
    folder = checkpoint_folder.folder(run, "unmasked", 96, 1)
    folder.mkdir(parents=True)
    (folder / "__0.safetensors").write_bytes(b"weights")
    checkpoint_folder.complete_checkpoint(folder, {"stage": "unmasked", "samples": 96, "attempt": 1})
    stages = [Stage(name="pretrain", samples=64, batch=8, mask="0.5"), Stage(name="unmasked", samples=32, batch=8)]
    config = Config(stages=stages)
    training = SimpleNamespace(
        samples_seen=96, step=12, seconds=4.0, loader=SimpleNamespace(digest="d"),
        counters=SimpleNamespace(peak_memory=dict),
    )  # fmt: skip
    write_result(run, 1, config, training, 2, 3, [])
    result = read_json(run.result)
    masked, unmasked = (model_costs.stage_flops(config, stage) for stage in stages)
    assert result["flops"] == 64 * masked + 32 * unmasked
    assert (result["samples"], result["steps"], result["samples_per_second"]) == (96, 12, 24.0)
    assert (result["world"], result["attempts"], result["replaced"], result["manifest"]) == (2, 1, 3, "d")
    assert result["commit"] == {"path": "checkpoints/unmasked/96-1", "samples": 96}
