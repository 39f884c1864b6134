"""The home site of a storm: a Slurm, an S3 server with a proxy for each run, data, a working tree and the sweep.

Everything is below one folder. The storm runs in its own process, whose environment is used for submissions.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

from flip.data.manifest.build import index
from jobs.common.cluster_profile import load_profile
from jobs.planning.environment_checks import client_variables
from jobs.submission import snapshot
from tests.harness.common import ROOT
from tests.harness.training_run import BATCH, INTERVAL
from tests.s3.proxy import Proxy
from tests.s3.servers import BUCKET, Nanio, environment, upload
from tests.storm.deal import RUNS
from tests.storm.faults import DEADLINE, HOME
from tests.synthetic import make_dataset, make_tokenizer
from tools.sandbox import daemons, processes
from tools.sandbox.cluster import SandboxCluster

NODES = 6
SILENT = 20
"""Seconds after which a silent node is down. With 10 on an overloaded machine, Slurm marked live nodes as down."""
EDITED = (
    "flip/training/trainer.py",
    "flip/training/grad_cache.py",
    "jobs/runtime/rank_process.py",
    "jobs/host/rank_entry.py",
    "jobs/host/job.py",
)
PASSED = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_EC2_METADATA_DISABLED", "FLIP_WITNESS",
          "OMP_NUM_THREADS", "TMPDIR")  # fmt: skip


BUSY = "another command is at work on this sweep"


class StormSite:
    PACE = 0.06
    """Seconds between two reads of the data, four per step: slow enough to inject a fault at a given step."""
    SLOW = 1.0
    """The same while a run waits for the lock."""
    name = HOME
    restarts_at_once = False
    """Whether a run starts again within a second after a killed rank."""
    form = "CPUs and memory as resources (select/cons_tres), one partition, JobRequeue=1"
    profiles = {"here.yaml": ("low", tuple(RUNS))}
    """File of a cluster profile -> (its partition, the runs that are submitted with it)."""

    def __init__(self, folder, dealt, say):
        self.folder = folder
        self.dealt = dealt
        self._say = say
        self.runs = folder / "runs"
        self.calm = folder / "calm"
        self.tree = folder / "tree"
        self.server = Nanio(folder / "nanio")
        options = {"nodes": NODES, "settings": ["SlurmctldTimeout=30"], **self.options()}
        self.here = SandboxCluster(
            folder / "slurm", gpus=0, cpus=2, user_signal=dealt.warned, node_timeout=SILENT, **options
        )
        self.lines = {}
        self.hands = threading.RLock()
        """Run -> its proxy; the lock ``hands`` guarantees that no other fault stops Slurm meanwhile."""
        self.failed = False
        self._again = []
        self._started = time.monotonic()

    def say(self, text):
        self._say(f"{self.seconds:5.0f} s  {text}")

    @property
    def seconds(self):
        return time.monotonic() - self._started

    def options(self):
        """Options of the sandbox that differ from the defaults here."""
        return {}

    def profile_text(self):
        """Further lines of the cluster profiles."""
        return ""

    def set_grace(self, run, seconds):
        """Set the grace period of preemption in the partition of a run."""
        self.here.set_grace(seconds)

    def has_spare(self, run):
        """Whether the partition of a run has a node that the run does not use."""
        return True

    # -- start and stop ----------------------------------------------------------------------------------------------

    def start(self):
        """Start all servers, write all files and submit the sweep."""
        (self.folder / "tmp").mkdir()
        data = make_dataset(self.folder / "data", samples=200, shards=3, chunk=4, classes=8)
        make_tokenizer(data / "tokenizer.json")
        make_dataset(self.folder / "scored", samples=32, shards=1, chunk=4, classes=8, seed=1)
        self.server.start()
        upload(self.server, data)
        for name in client_variables(["s3"], os.environ):
            del os.environ[name]  # of this machine: submit would require the profile to forward them
        settings = environment(self.server.address)
        os.environ.update(settings | {"FLIP_WITNESS": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder / "tmp")})
        keys = [f"s3://{BUCKET}/set/{path.name}" for path in sorted(data.glob("*.tar"))]
        index(keys, self.folder / "manifest", chunk=4)
        for name in RUNS:
            self.lines[name] = Proxy(self.server).start()
            self.lines[name].pace = self.PACE
        self.start_slurm()
        os.environ.update(self.here.env())
        self._copy_tree()
        self._write_files()
        self.profile = load_profile(str(self.folder / next(iter(self.profiles))))
        self.say(f"Slurm of {len(self.here.site.names)} nodes and S3 server are up; preemption sends {self.preemption}")
        for cluster, (_, names) in self.profiles.items():
            self._submit(self.tree, "storm.yaml", cluster, self.runs, "--only", *names)
        self._submit(ROOT, "calm/storm.yaml", "local.yaml", self.calm)

    def start_slurm(self):
        self.here.start()

    def stop(self):
        with contextlib.suppress(Exception):
            self.here.stop()
        for run in self.calm.glob("storm/.supervisor/pid.json"):
            with contextlib.suppress(ProcessLookupError, KeyError):
                os.kill(json.loads(run.read_text())["pid"], signal.SIGTERM)
        for line in self.lines.values():
            line.stop()
        self.server.kill()

    @property
    def preemption(self):
        if self.dealt.warned:
            return "USR2"
        return "TERM"

    def _copy_tree(self):
        for path in snapshot.files(ROOT):
            target = self.tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / path).read_bytes())

    def _write_files(self):
        ways = [f"*/{name}) export AWS_ENDPOINT_URL={line.address};;" for name, line in self.lines.items()]
        setup = json.dumps([f"case $FLIP_RUN in {' '.join(ways)} esac"])
        for cluster, (partition, _) in self.profiles.items():
            (self.folder / cluster).write_text(
                f"kind: slurm\npartition: {partition}\ncpus_per_node: 2\nmemory_gb: 60\nhours: 0.5\n"
                f"signal_seconds: 60\npeer_seconds: 20\ncanary: 0\noptions: {{exclusive: ''}}\n"
                f"env: [SLURM_CONF, {', '.join(PASSED)}]\nsetup: {setup}\n{self.profile_text()}"
            )
        (self.folder / "local.yaml").write_text("kind: local\nparallel: 1\n")
        (self.folder / "calm").mkdir()
        (self.folder / "storm.yaml").write_text(json.dumps(self._sweep(self.folder / "manifest", self._placed)))
        calm = self._sweep(self.folder / "data", lambda layout: {"resources": {"processes": layout.world}})
        (self.folder / "calm" / "storm.yaml").write_text(json.dumps(calm))

    @staticmethod
    def _placed(layout):
        url = f"s3://{BUCKET}/checkpoints" if layout.bucket else ""
        hang = 0.4 if layout.world > 1 else 10.0  # a stopped single rank must not hit its own watchdog
        return {
            "checkpoint": {"url": url, "background": "yes" if layout.background else "no"},
            "monitor": {"hang_minutes": hang},
            "resources": {"nodes": layout.nodes, "processes": layout.processes},
        }

    def _sweep(self, manifest, placed):
        """Return the sweep file as a JSON value, which is valid YAML."""
        data = self.folder / "data"
        scored = self.folder / "scored"
        vocabulary_size = len(json.loads((data / "tokenizer.json").read_text())["model"]["vocab"])
        common = {
            "model": {"size": "tiny", "text": {"vocabulary": vocabulary_size}},
            "data": {
                "manifest": str(manifest), "tokenizer": str(data / "tokenizer.json"), "workers": 1, "chunk": 4,
                "block": 2, "lanes": 8, "buffer": 1 << 28, "decoder": "pillow", "resize": "pillow",
                "deadline": DEADLINE, "timeout": 4, "hedge": 2,
            },
            "compute": {
                "device": "cpu", "precision": "fp32", "attention": "explicit", "threads": 1, "deterministic": "yes",
            },
            "checkpoint": {"samples": INTERVAL * BATCH},
            "evaluate": {"every": 18 * BATCH, "batch": 16, "sets": [
                {"name": role, "manifest": str(scored), "classes": str(scored / "classes.json"), "role": role}
                for role in ("validation", "test")
            ]},
            "monitor": {"log_every": 1, "status_seconds": 0.2, "hang_minutes": 10.0},
            "resources": {"cpus": 1, "hours": 0.5},
        }  # fmt: skip
        runs = {}
        for seed, (name, layout) in enumerate(RUNS.items()):
            masked, unmasked = self.dealt.steps[name]
            stages = [
                {"name": "pretrain", "samples": masked * BATCH, "batch": BATCH, "mask": "0.5", "base_lr": 0.01},
                {"name": "unmasked", "samples": unmasked * BATCH, "batch": BATCH, "mask": "0", "base_lr": 0.002},
            ]
            runs[name] = {"seed": seed, "stages": stages, **placed(layout)}
        return {"title": "A storm", "set": common, "runs": runs}

    # -- users -------------------------------------------------------------------------------------------------------

    def _command(self, tree, sweep, cluster, runs, *options):
        line = [sys.executable, tree / "jobs" / "submit.py", "--sweep", self.folder / sweep]
        line += ["--cluster", self.folder / cluster, *options]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.Popen(
            list(map(str, line)), cwd=self.folder, env={**environment, "FLIP_RUNS": str(runs)}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _submit(self, *arguments):
        process = self._command(*arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output

    def submit_again(self, name):
        """Submit one run whatever its state. The others are left: one of them may just be lost by a fault of its own,
        which the command would end."""
        self._again.append(self._command(self.tree, "storm.yaml", self._cluster(name), self.runs, "--only", name))

    def resubmit(self, name, *options):
        """Submit one run as the owner of a stopped run does. No other fault may silence the controller meanwhile."""
        with self.hands:
            self._submit(self.tree, "storm.yaml", self._cluster(name), self.runs, "--only", name, *options)

    def _cluster(self, name):
        (cluster,) = [cluster for cluster, (_, names) in self.profiles.items() if name in names]
        return cluster

    def submissions(self):
        """Return (number of repeated commands, outputs of failed commands, number of submissions to Slurm).

        A command that meets another one at work on the sweep refuses, as it should."""
        outputs = [(process, process.communicate(timeout=120)[0]) for process in self._again]
        failed = [text for process, text in outputs if process.returncode and BUSY not in text]
        return len(outputs), failed, len(list((self.runs / "storm" / ".slurm").iterdir()))

    def edit_tree(self):
        for name in EDITED:
            file = self.tree / name
            if "edited" not in (text := file.read_text()):
                file.write_text(text + "\nraise RuntimeError('the working tree was edited')\n")

    # -- nodes and daemons ------------------------------------------------------------------------------------------

    def _controller(self):
        return [p for p in processes.running().values() if p.pid == daemons.pids(self.here.site)["slurmctld"]]

    def signal_controller(self, number):
        """Send a signal to slurmctld; returns its processes."""
        controller = self._controller()
        processes.kill(controller, number)
        return controller

    @staticmethod
    def wait_controller(controller):
        assert processes.wait(controller, 20), "slurmctld does not end"

    def start_controller(self):
        for leftover in [p for group in processes.daemons(self.here.folder).values() for p in group]:
            if leftover.name == "slurmscriptd":  # left by a killed slurmctld
                processes.end([leftover], 5)
        daemon = daemons.slurmctld(self.here.site)
        daemons.start(self.here.site, daemon, lambda: "UP" in self._ping())

    def _ping(self):
        try:
            return self.here.call("scontrol", "ping", timeout=5)
        except Exception:  # not ready yet
            return ""

    def cut_off(self, node, pid):
        """Simulate a node that loses its network: kill its Slurm daemons and the batch script, but not the rank ``pid``
        and its workers. Return the pids of the rank and its workers."""
        site = self.here.site
        running = processes.daemons(site.folder).get(site.spool(node), [])
        steps = [p for p in running if p.name == "slurmstepd"]
        tasks = processes.tasks(steps, [(f"SLURM_CONF={site.conf}", f"SLURMD_NODENAME={node}")])
        family = {pid}
        while more := {p.pid for p in tasks if p.parent in family} - family:
            family |= more
        victims = [p for p in running if p.name == "slurmd"] + steps + [p for p in tasks if p.pid not in family]
        for victim in victims:  # else an agent kills its rank when its task dies
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGSTOP)
        processes.kill(victims)
        assert processes.wait(victims, 10)  # a stopped rank would get SIGHUP from the kernel when its parent ends
        return family
