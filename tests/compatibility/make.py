"""Makes the files of this version that tests/compatibility reads, by the public commands.

    python -m tests.compatibility.make OUT

OUT gets data/ (two shards, manifests without and with a filter, a tokenizer), demo.yaml, export/, runs/demo/complete
with an evaluation, and runs/demo/stopped. In texts, OUT is written as @FILES@, the interpreter as @PYTHON@. Snapshots,
event files and locks are left out.

Each release adds a folder with its version as name, and later versions read it. Until 0.2.0 is released, a changed
format makes its folder again.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.synthetic import make_dataset, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
title: Files of a release
cluster: local
recipe: portable
set:
  model:
    embed: 8
    image: {size: 32, patch: 8, width: 8, layers: 1, heads: 1}
    text: {width: 8, layers: 1, heads: 1, vocabulary: 300, length: 12}
  data:
    manifest: "@FILES@/data"
    tokenizer: "@FILES@/data/tokenizer.json"
    workers: 1
    chunk: 2
    block: 1
    lanes: 4
    buffer: 268_435_456
    decoder: pillow
    resize: pillow
  compute: {device: cpu, precision: fp32, threads: 1, deterministic: "yes"}
  stages:
    - {name: pretrain, batch: 8, mask: 0.5, samples: 320, warmup: 16, base_lr: 1e-2}
    - {name: unmasked, batch: 8, mask: 0, samples: 64, base_lr: 1e-3}
  checkpoint: {samples: 80}
  evaluate:
    every: 160
    sets:
      - {name: validation, manifest: "@FILES@/data", classes: "@FILES@/data/classes.json", role: validation}
  monitor: {log_every: 4}
  resources: {nodes: 1, processes: 1, cpus: 1, hours: 1}
runs:
  complete: {}
  stopped:
    stages:
      pretrain: {samples: 400_000}
      unmasked: {samples: 64}
    evaluate: {every: 400_000}
"""


def command(*arguments, env=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    words = [sys.executable, "-m", "jobs", *arguments]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def data(out):
    folder = make_dataset(out / "data", samples=24, shards=2, size=32, classes=8, chunk=2)
    make_tokenizer(folder / "tokenizer.json")
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    for name, options in (("all", ()), ("filtered", ("--caption-length", "38:99"))):
        command("shards", "index", *shards, "--out", str(folder / name), "--chunk", "2", *options)


def wait(condition, event):
    limit = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < limit, event
        time.sleep(0.2)


def main(out):
    out = Path(out).resolve()
    out.mkdir(parents=True)
    data(out)
    sweep = out / "demo.yaml"
    sweep.write_text(SWEEP.replace("@FILES@", str(out)))
    env = {"FLIP_RUNS": str(out / "runs")}
    command("submit", str(sweep), "--yes", env=env)
    runs = out / "runs" / "demo"
    wait(lambda: (runs / "complete" / "result.json").exists(), "the complete run")
    wait(lambda: list(runs.glob("stopped/checkpoints/*/*/commit.json")), "a checkpoint of the other")
    command("cancel", "demo/stopped", "--yes", env=env)
    wait(lambda: list(runs.glob("stopped/attempts/1/end.json")), "its end")
    command("evaluate", "demo/complete", "--data", str(out), "--json", env=env)
    command("export", str(runs / "complete"), "--out", str(out / "export"), env=env)
    for path in (*runs.glob(".code"), *runs.rglob(".supervisor"), *runs.glob("*/tensorboard")):
        shutil.rmtree(path)
    for path in runs.rglob(".lock"):
        path.unlink()
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".yaml", ".jsonl", ".txt", ".err", ".out", ".md"):
            path.write_text(path.read_text().replace(str(out), "@FILES@").replace(sys.executable, "@PYTHON@"))


if __name__ == "__main__":
    main(sys.argv[1])
