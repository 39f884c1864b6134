"""A training by DistributedDataParallel that imports nothing of the toolkit (docs/command.md)."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--seconds", type=float, default=0.1)
parser.add_argument("--out", default="out")
parser.add_argument("--pause", type=float, default=0.0, help="write checkpoints in place, in two parts")
parser.add_argument("--resume")
options = parser.parse_args()

stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
torch.set_num_threads(1)
model = DistributedDataParallel(torch.nn.Linear(8, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
step = 0
if options.resume:
    state = torch.load(options.resume)
    step = state["step"]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def save():
    if rank == 0:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "saving")
        if options.pause and step < options.steps:
            write_in_parts((out / "saving").read_bytes(), out / f"step-{step}.pt")
        else:
            os.replace(out / "saving", out / f"step-{step}.pt")


def write_in_parts(data, path):
    with open(path, "wb", 0) as file:
        file.write(data[: len(data) // 2])
        time.sleep(options.pause)
        file.write(data[len(data) // 2 :])


while step < options.steps:
    time.sleep(options.seconds)
    data = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 * step + rank))
    loss = model(data).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    if rank == 0:
        print(f"step {step} loss {loss.item():.6f}", flush=True)
    ends = torch.tensor(float(bool(stop)))
    distributed.all_reduce(ends)  # ranks get the signal at different steps
    if step % 5 == 0 or ends > 0:
        save()
    if ends > 0:
        sys.exit(75)
save()
distributed.destroy_process_group()
