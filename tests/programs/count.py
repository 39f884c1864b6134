"""A program that imports nothing of the toolkit: counts up, saves, and stops when it is asked to (docs/command.md).

Its state is a running hash over its steps, so that a wrong restart changes the result.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--seconds", type=float, default=0.1)
parser.add_argument("--every", type=int, default=5)
parser.add_argument("--out", default="out")
parser.add_argument("--resume", default="")
parser.add_argument("--lr", default="")
options = parser.parse_args()

stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
step, state = 0, options.lr
if options.resume:
    step, state = json.loads(Path(options.resume).read_text())
    print("continues at", step, flush=True)
out = Path(options.out)
out.mkdir(parents=True, exist_ok=True)


def save():
    temporary = out / "saving"
    temporary.write_text(json.dumps([step, state]))
    os.replace(temporary, out / f"step-{step}.json")


while step < options.steps:
    time.sleep(options.seconds)
    step += 1
    state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
    with open("metrics.jsonl", "a") as lines:
        lines.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
    if step % options.every == 0 or stop:
        save()
    if stop:
        sys.exit(75)
save()
(out / "final").write_text(state)
