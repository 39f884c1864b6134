"""One run on a real Slurm: started, watched, looked at afterwards. What hurts it is in ``storm.py``."""

import random
import threading
from collections import Counter
from pathlib import Path

from flip.data.retry import TABLE
from flip.rundir import read_json
from jobs import scheduler
from jobs.cluster import Shape
from jobs.profile import Profile
from jobs.slurm import SlurmCluster
from jobs.slurm_state import ENDED
from tests.arena import Arena

NODES, PROCESSES = 2, 2


def profile(**fields):
    """A profile for ``tools/slurm_here.py``."""
    base = {"name": "here", "kind": "slurm", "partition": "low", "hours": 0.5}
    return Profile(**{**base, "signal_seconds": 60, "peer_seconds": 20, **fields})


class SlurmArena(Arena):
    """``here``: the Slurm, see ``tools.slurm_here.Here``; its SLURM_CONF must stand in this process's environment.

    ``store``: where the data lie in a bucket (tests/s3/store.py). Jobs get there by variables that the profile names.
    """

    def __init__(self, here, folder, name, config, pause=0.05, module="tests.kill_worker", store=None, **fields):
        if store:
            fields["env"] = list(store.environment)
        self.here, self.profile, self.module, self.store = here, profile(**fields), module, store
        super().__init__(folder, name, config, pause)
        self.rng = random.Random(0)
        """Of what faults choose."""
        self.seen = []
        """(state, attempt) as ``status`` told them, one after the other, without repetitions."""
        self._over, self._asking = threading.Event(), threading.Lock()

    def open(self):
        return SlurmCluster(self.profile)

    def shape(self):
        return Shape(NODES, self.world // NODES, 0, 1, self.profile.hours)

    def submit(self):
        """From now on ``status`` is asked all the time."""
        super().submit()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while not self._over.wait(0.3):
            self.state()

    def state(self):
        with self._asking:
            state = super().state()
            if not self.seen or self.seen[-1] != (state.state, state.attempt):
                self.seen.append((state.state, state.attempt))
        return state

    def wait_over(self, seconds=180):
        super().wait_over(seconds)
        self._over.set()

    def ranks(self):
        """Rows {rank, pid, node} of the living processes of this run's newest attempt, from /proc."""
        found, n = [], str(self.run.newest_attempt())
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                if self.module not in words or str(self.run.path) not in words:
                    continue
                pairs = (entry / "environ").read_bytes().decode().split("\0")
                environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            except OSError:
                continue
            if environ.get("FLIP_ATTEMPT") == n and "RANK" in environ:
                found.append({"rank": int(environ["RANK"]), "pid": int(entry.name), "node": environ["SLURMD_NODENAME"]})
        return sorted(found, key=lambda row: row["rank"])

    def job(self):
        """The run's row in squeue, None where it is not listed."""
        record = read_json(self.run.path / "job.json")
        return scheduler.queue([record["name"]]).get((record["name"], record["index"]))

    # -- hands -------------------------------------------------------------------------------------------------------

    def preempt(self, seconds=6):
        """A job of higher priority takes all nodes."""
        self.faults += 1
        return self.here.preempt(nodes=len(self.here.site.names), seconds=seconds)

    def wait_gone(self, seconds=60):
        """Until nothing of the run is on a node, nor will be."""
        self.wait(lambda: self.job() is None or self.job().state in ENDED, "its end in Slurm", seconds)

    # -- what is read back -------------------------------------------------------------------------------------------

    def last_step(self):
        """Of all that were logged."""
        return max((line["step"] for n in self.run.attempt_numbers() for line in self.lines(n)), default=0)

    def retries(self, n):
        """Class -> failed requests to storage that attempt n's ranks have told of."""
        told = self.lines(n)[-1:]
        return Counter({kind: told[0]["storage"][f"retries_{kind}"] for kind in TABLE} if told else {})

    def story(self):
        parts = [super().story(), str(self.seen), str(self.job())]
        for path in sorted(self.run.logs.glob("*/job.*"))[-4:]:
            parts.append(f"--- {path}\n{path.read_text()[-1500:]}")
        for path in sorted(self.run.path.parent.glob(".slurm/*/*.err")):
            parts.append(f"--- {path}\n{path.read_text()[-800:]}")
        return "\n".join(parts)
