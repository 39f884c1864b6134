"""Tests that need a GPU: run `python -m pytest -m gpu` on a machine with a GPU."""

import pytest
import torch

from flip.checkpoint.staging import StagedShard
from flip.common.shutdown import StopFlag
from flip.config.merge import dump
from flip.distributed import parallel
from flip.files import deletion
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir, read_json
from flip.training.trainer import train
from tests.flip.data.loading import BATCH as READ
from tests.flip.data.loading import loader
from tests.harness.training_run import BATCH, configuration
from tests.synthetic import make_dataset, make_tokenizer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=120, shards=2, chunk=4, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    return folder


def test_loader_pins_batches(data):
    reader = loader(data, pinned=True, chunk=4, tokenizer=str(data / "tokenizer.json"))
    batch = next(reader.batches(0, READ, "0.5"))
    assert all(field.is_pinned() for field in (batch.patches, batch.keep_indices, batch.tokens))


def test_staged_shard_copies_cuda_tensors_bitwise():
    """Copies stay exact in a reused page-locked buffer, even if later kernels change the tensors."""
    state = {f"model.{i}": torch.randn(257, 129 + i, device="cuda") for i in range(200)}
    state["optim.step"] = torch.zeros((), device="cuda")
    staged = StagedShard(state, 0, pinned=True)
    for _ in range(3):
        for tensor in state.values():
            tensor.add_(1)
        expected = {name: tensor.clone() for name, tensor in state.items()}
        staged.fill(state)
        for tensor in state.values():
            tensor.zero_()
        assert all(staged.tensors[name].is_pinned() for name in state)
        assert all(torch.equal(staged.tensors[name], expected[name].cpu()) for name in state)


@pytest.mark.parametrize(
    ("accumulate", "compiled", "padding"), [(1, "no", "attend"), (2, "no", "mask"), (1, "yes", "mask")]
)
def test_train_on_gpu_completes_and_saves_checkpoints(data, tmp_path, monkeypatch, accumulate, compiled, padding):
    config = configuration(data, world=1, samples=(6, 2), precision="bf16")
    config.compute.device = "cuda"
    config.compute.attention = "sdpa"
    config.compute.deterministic = "no"
    config.compute.accumulate = accumulate
    config.compute.compile = compiled
    config.model.text.padding = padding
    config.evaluate.every = 0
    config.checkpoint.samples = 3 * BATCH
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    run.config.write_text(dump(config))
    copies = set()
    discard = deletion.discard_own_folder

    def discard_own_folder(folder):
        """A complete run deletes the copy of its compiled code."""
        if folder == run.compiled:
            copies.update(file.stem for file in folder.glob("*.bin"))
        return discard(folder)

    monkeypatch.setattr(deletion, "discard_own_folder", discard_own_folder)
    try:
        train(run, run.start_attempt({}), StopFlag(), lambda *_: None)
    finally:
        parallel.stop()
    assert read_json(run.result)["samples"] == 8 * BATCH
    assert [saved.samples_seen for saved in checkpoint_folder.checkpoints(run)][-1] == 8 * BATCH
    assert torch.cuda.max_memory_allocated() > 0
    if compiled == "yes":
        assert copies == {stage.name for stage in config.stages}, "later attempts load the code of their stage"
    else:
        assert not copies
