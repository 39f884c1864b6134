"""One run under faults with the real supervisor, ranks and signals, and the records to check afterwards."""

import io
import json
import os
import signal
import subprocess
import tarfile

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from flip.checkpoint.remote import local_copy
from flip.config import merge
from flip.config.derived import for_stage, patches, visible_patch_count, world_size
from flip.data import augment, masking
from flip.data.sources import load_sources
from flip.runs import attempts, checkpoint_folder
from flip.runs.rundir import read_json
from flip.training.sample_log import patch_hashes
from jobs.common.cluster_profile import load_profile
from jobs.common.job import Job, JobResources
from jobs.host import sessions
from jobs.local.backend import LocalBackend, live_ranks
from jobs.submitted_runs import clusters
from jobs.workloads.training import trackers_of
from tests.harness.common import ROOT, make_run, wait_until

BATCH = 16
INTERVAL = 5
"""Pairs per step, and steps between checkpoints."""


RESIZE = {"pillow": "pillow", "simplejpeg": "torchvision"}
"""Decoder -> its resize. With the second pair the visible-patch kernel decodes JPEG files."""


def configuration(data, world, samples=(44, 16), precision="fp32", decoder="pillow"):
    """Return a resolved configuration of the tiny model: a masked and an unmasked stage of ``samples`` steps."""
    layer = {
        "model": {"size": "tiny"},
        "data": {
            "manifest": str(data), "tokenizer": str(data / "tokenizer.json"),
            "workers": 1, "chunk": 4, "block": 2, "lanes": 8, "buffer": 1 << 28,
            "decoder": decoder, "resize": RESIZE[decoder],
        },
        "stages": [
            {"name": "pretrain", "samples": samples[0] * BATCH, "batch": BATCH, "mask": "0.5", "base_lr": 0.01},
            {"name": "unmasked", "samples": samples[1] * BATCH, "batch": BATCH, "mask": "0", "base_lr": 0.002},
        ],
        "compute": {
            "device": "cpu", "precision": precision, "attention": "explicit", "threads": 1, "deterministic": "yes",
        },
        "checkpoint": {"samples": INTERVAL * BATCH},
        "evaluate": {"every": 18 * BATCH, "batch": 64, "sets": [
            {"name": name, "manifest": str(data), "classes": str(data / "classes.json"), "role": name}
            for name in ("validation", "test")
        ]},
        "monitor": {"log_every": 1, "status_seconds": 0.1},
        "resources": {"processes": world},
    }  # fmt: skip
    return merge.merge([("test", layer)])


def last_weights(run):
    """All tensors of the last checkpoint of a run, by shard file and name."""
    tensors_by_key = {}
    with local_copy(checkpoint_folder.checkpoints(run)[-1]) as folder:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    tensors_by_key[file.name, name] = tensors.get_tensor(name)
    return tensors_by_key


class TrainingRun:
    """A run directory, with methods to start, damage and watch the run."""

    def __init__(self, folder, name, config, pause=0.05):
        self.run = make_run(folder / "sweep" / name, merge.dump(config))
        self.config = config
        self.world = world_size(config)
        self.trap = folder / f"{name}.trap"
        self.env = {
            "FLIP_WITNESS": "1", "KILL_STEP_SECONDS": str(pause), "KILL_BEFORE_COMMIT_FILE": str(self.trap),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.cluster = self.open()
        self.faults = 0

    # -- actions -----------------------------------------------------------------------------------------------------

    def open(self):
        return LocalBackend(load_profile("local"))

    def submit(self):
        fields = {"module": "tests.kill_rank", "trackers": trackers_of(self.config)}
        self.cluster.submit([Job(self.run, ROOT, self.shape(), self.env, **fields)])

    def save_config(self):
        self.run.config.write_text(merge.dump(self.config), encoding="utf-8")

    def shape(self):
        return JobResources(processes=self.world)

    def ranks(self):
        """Return rows {rank, pid} of the newest attempt's live processes."""
        return live_ranks(self.run)

    def supervisor(self):
        return read_json(self.run.path.parent / ".supervisor" / "pid.json")["pid"]

    def wait(self, condition, event, seconds=120):
        def met():
            if condition():
                return True
            failed = any((read_json(p) or {}).get("action") == "stop" for p in self.ends())
            assert not failed or condition(), f"timeout while waiting for {event}\n{self.story()}"
            return False

        wait_until(met, event, seconds, 0.01, self.story)

    def ends(self):
        return [self.run.attempt(n) / "end.json" for n in self.run.attempt_numbers()]

    def wait_step(self, step, attempt=None):
        """Wait until the newest attempt (or ``attempt``) has logged ``step`` or a later step."""

        def reached():
            n = attempt or self.run.newest_attempt()
            return any(line["step"] >= step for line in self.lines(n))

        self.wait(reached, f"step {step}")

    def wait_attempt(self, n):
        self.wait(lambda: self.run.newest_attempt() >= n and self.ranks(), f"attempt {n}")

    def state(self):
        return clusters.states([self.run])[self.run.path]

    def wait_state(self, *states, seconds=120):
        self.wait(lambda: self.state().state in states, " or ".join(states), seconds)

    def wait_over(self, seconds=120):
        """Wait until the run is over, and until its supervisor has recorded that, after the end of its ranks."""
        self.wait_state("complete", "failed", seconds=seconds)
        self.wait(lambda: not attempts.unended(self.run), "the record of its end")

    def kill(self, rank=0, number=signal.SIGKILL):
        """Send a signal to one rank of the newest attempt."""
        (pid,) = [row["pid"] for row in self.ranks() if row["rank"] == rank]
        os.kill(pid, number)
        self.faults += 1

    def kill_supervisor(self):
        pid = self.supervisor()
        os.kill(pid, signal.SIGKILL)
        self.faults += 1
        self.wait(lambda: not sessions.alive(pid, sessions.start_time(pid)), "the supervisor's end")
        self.wait(lambda: not self.ranks(), "the ranks' end by their lifeline")

    def damage_newest(self):
        """Flip one byte in the middle of the newest checkpoint's largest file."""
        newest = checkpoint_folder.checkpoints(self.run)[-1]
        file = max(newest.path.glob("*.safetensors"), key=lambda p: p.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        self.faults += 1
        return newest

    # -- records ----------------------------------------------------------------------------------------------------

    def lines(self, n):
        """Return the complete metric lines of attempt n."""
        path = self.run.metrics / f"{n}.jsonl"
        if path.exists():
            return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        return []

    def witnessed(self):
        """Return attempt -> S -> (ids, hashes of visible patches) of global batches whose step all ranks finished."""
        return {n: self.witnessed_of(n) for n in self.run.attempt_numbers()}

    def witnessed_of(self, n):
        parts = []
        for rank in range(self.world):
            path = self.run.path / "witness" / f"{n}.{rank}.jsonl"
            rows = []
            if path.exists():
                rows = path.read_text().split("\n")[:-1]
            parts.append({row["samples"]: row for row in map(json.loads, rows)})
        shared = set.intersection(*(set(part) for part in parts))
        fields = ("ids", "seen")
        return {s: tuple(sum((part[s][field] for part in parts), []) for field in fields) for s in sorted(shared)}

    def order(self):
        return load_sources(self.config.data)[0].order(self.config.seed, self.config.data.block)

    def weights(self):
        """Return the samples of the last checkpoint, and ``last_weights``."""
        return checkpoint_folder.checkpoints(self.run)[-1].samples_seen, last_weights(self.run)

    def leftovers(self):
        """Return processes that name this run, and files with temporary names."""
        running = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        files = [p for p in self.run.path.parent.rglob("*") if ".tmp." in p.name or ".new." in p.name]
        return [line for line in running.splitlines() if str(self.run.path) in line], files

    def story(self):
        """Return logs and records for the message of a failed test."""
        parts = [str(read_json(self.run.attempt(n) / "end.json")) for n in self.run.attempt_numbers()]
        parts += [str(self.run.causes(n)) for n in self.run.attempt_numbers()]
        logs = sorted(self.run.logs.glob("*/node0.err"))
        parts += [f"--- {p}\n{p.read_text()[-1500:]}" for p in logs[-2:]]
        journal = self.run.path.parent / ".supervisor" / "log"
        return "\n".join(parts + ([journal.read_text()[-3000:]] if journal.exists() else []))


def decoded_images(data):
    """Return per sample id its pixels (H, W, 3), read with only tarfile and Pillow."""
    images = []
    for path in sorted(data.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith((".png", ".jpg")):
                    images.append(np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")))
    return images


def seen_hashes(config, span, samples, images):
    """Return (ids, hashes of the visible patches) of the global batch at S = ``samples``, as ``SampleLog`` writes them,
    from ``decoded_images``: without reader, decoder, loader and workers."""
    staged = for_stage(config, span.stage)
    image = staged.model.image
    data = config.data
    order = load_sources(data)[0].order(config.seed, data.block)
    ids, epochs = order.batch(samples, span.stage.batch)
    draws = augment.draw(staged.augment, config.seed, epochs, ids)
    keep = masking.visible_patches(
        config.seed, epochs, ids, patches(image), visible_patch_count(image, span.stage.mask)
    )
    rows = []
    for row, id in enumerate(ids.tolist()):
        view = augment.view(images[id], image.size, staged.augment, draws, row, data.resize)
        cells = view.reshape(image.size // image.patch, image.patch, image.size // image.patch, image.patch, 3)
        rows.append(np.ascontiguousarray(cells.swapaxes(1, 2).reshape(patches(image), -1)[keep[row]]))
    return ids.tolist(), patch_hashes(torch.from_numpy(np.stack(rows)))
