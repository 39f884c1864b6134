"""Makes the files of an earlier release that tests/compatibility reads. Run it in a checkout of that release:

    cd CHECKOUT && PYTHONPATH=. python .../make.py OUT

OUT gets data/ (two shards, manifests of versions 1, 2 and 3, a tokenizer), old.yaml, export/, runs/old/complete and
runs/old/stopped. In texts, OUT is written as @OLD@, the interpreter as @PYTHON@. Snapshots, event files are left out.
The files in tests/compatibility/old come from commit f634574.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SWEEP = """
title: Files of an earlier release
cluster: local
recipe: portable
set:
  model:
    embed: 8
    image: {size: 32, patch: 8, width: 8, layers: 1, heads: 1}
    text: {width: 8, layers: 1, heads: 1, vocabulary: 300, length: 12}
  data:
    manifest: "@OLD@/data"
    tokenizer: "@OLD@/data/tokenizer.json"
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
      - {name: validation, manifest: "@OLD@/data", classes: "@OLD@/data/classes.json", role: validation}
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
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **(env or {})}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def data(out):
    from tests.synthetic import make_dataset, make_tokenizer

    folder = make_dataset(out / "data", samples=24, shards=2, size=32, classes=8, chunk=2)
    make_tokenizer(folder / "tokenizer.json")
    for version, options in (("v2", ()), ("v3", ("--caption-length", "38:99"))):
        shards = [str(path) for path in sorted(folder.glob("*.tar"))]
        command("tools/shards.py", "index", *shards, "--out", str(folder / version), "--chunk", "2", *options)
    shutil.copytree(folder / "v2", folder / "v1")
    record = json.loads((folder / "v1" / "manifest.json").read_text())
    record["version"] = 1  # it had no etags.txt
    del record["files"]["etags.txt"]
    (folder / "v1" / "etags.txt").unlink()
    (folder / "v1" / "manifest.json").write_text(json.dumps(record))


def wait(condition, event):
    limit = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < limit, event
        time.sleep(0.2)


def main(out):
    out = Path(out).resolve()
    out.mkdir(parents=True)
    data(out)
    sweep = out / "old.yaml"
    sweep.write_text(SWEEP.replace("@OLD@", str(out)))
    env = {"FLIP_RUNS": str(out / "runs")}
    command("jobs/submit.py", "--sweep", str(sweep), "--yes", env=env)
    runs = out / "runs" / "old"
    wait(lambda: (runs / "complete" / "result.json").exists(), "the complete run")
    wait(lambda: list(runs.glob("stopped/checkpoints/*/*/commit.json")), "a commit of the other")
    command("jobs/cancel.py", "old/stopped", "--yes", env=env)
    wait(lambda: list(runs.glob("stopped/attempts/1/end.json")), "its end")
    command("tools/export.py", str(runs / "complete"), "--out", str(out / "export"), env=env)
    for path in (*runs.glob(".code"), *runs.glob(".supervisor"), *runs.glob("*/tensorboard")):
        shutil.rmtree(path)
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".yaml", ".jsonl", ".txt", ".err", ".out", ".md"):
            path.write_text(path.read_text().replace(str(out), "@OLD@").replace(sys.executable, "@PYTHON@"))


if __name__ == "__main__":
    main(sys.argv[1])
