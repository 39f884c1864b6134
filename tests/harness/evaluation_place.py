"""A run with two checkpoints and data sets to score it on, for tests of evaluations."""

import json

from torch.distributed import checkpoint as dcp

from flip.checkpoint import saver
from flip.config import merge
from flip.models import clip
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir, create_json, write_json, write_text
from jobs.commands import evaluate
from tests.flip.evaluation.datasets.test_catalog import images, wds
from tests.synthetic import make_dataset, make_tokenizer


def add_checkpoint(run, config, samples, attempt):
    """Add a checkpoint with random weights; the seed is the number of samples."""
    pair = clip.CLIPModel(config.model, config.augment, "sdpa")
    clip.init_weights(pair, samples)
    path = checkpoint_folder.folder(run, "pretrain", samples, attempt)
    path.mkdir(parents=True)
    writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
    dcp.save(saver.model_state(pair), storage_writer=writer, no_dist=True)
    checkpoint_folder.complete_checkpoint(path, {"stage": "pretrain", "samples": samples, "attempt": attempt})


def make_place(root):
    """Write a run with two checkpoints, and data sets, to the folder."""
    data = make_dataset(root / "data" / "own", samples=30, shards=2, classes=5)
    make_tokenizer(root / "tokenizer.json")
    wds(root / "data" / "wds_flickr30k", captions=True)
    wds(root / "data" / "wds_mnist")
    wds(root / "data" / "wds_mnist", "train", 12)
    images(root / "data" / "faces" / "test", [f"{c}/{i}.png" for c in range(3) for i in range(3)])
    write_text(root / "data" / "faces" / "classes.json", '{"names": ["a", "b", "c"], "templates": ["{}"]}')
    settings = [
        "model.size=tiny", "stages=[{name: pretrain, samples: 64, batch: 8}]", f"data.manifest={data}",
        f"data.tokenizer={root}/tokenizer.json", "compute.threads=1", "compute.device=cpu", "compute.precision=bf16",
        "compute.attention=sdpa", "compute.deterministic=yes", "compute.replicate=3",
        "evaluate.preprocess=resize_crop",
        f"evaluate.sets=[{{name: own, manifest: {data}, classes: {data}/classes.json}}]",
    ]  # fmt: skip
    run = RunDir(root / "runs" / "sweep" / "run")
    config = merge.merge([], settings)
    run.path.mkdir(parents=True)
    write_text(run.config, merge.dump(config))
    write_json(run.identity, {"hash": "", "schema": 2, "config": {}})
    add_checkpoint(run, config, 32, 1)
    add_checkpoint(run, config, 64, 1)
    create_json(run.result, {
        "run": "run", "stage": "pretrain", "samples": 64, "seconds": 1.0, "samples_per_second": 64.0, "evaluations": [],
    })  # fmt: skip
    return root


def run_evaluate(capsys, *argv):
    code = evaluate.main([*argv, "--json"])
    output = capsys.readouterr()
    assert code == 0, output
    return json.loads(output.out)
