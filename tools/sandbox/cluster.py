"""``Here``: a real Slurm on this machine with virtual nodes and fake GPUs, all of it below one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flip.runs.errors import ConfigError, FlipError, PermissionDenied
from tools.sandbox import accounting, daemons, processes, shutdown
from tools.sandbox.config import Options, Site, free_block, put

#: Seconds that a command of Slurm's gets.
DEADLINE = 10.0
FOLDERS = ("run", "log", "dev", "munge", "state", "spool")
#: Emptied by a fresh start; munge's key stays.
EMPTIED = ("run", "log", "state", "spool", "database")


class Here:
    """A Slurm in ``folder``. ``Here.open`` reads the options of the one that was started there last."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        nodes: int = 4,
        gpus: int = 8,
        cpus: int = 16,
        memory: int = 64000,
        grace: int = 0,
        kill_wait: int = 5,
        user_signal: bool = True,
        accounting: bool = False,
        select: str = "cons_tres",
        node_timeout: int = 30,
        settings: Sequence[str] = (),
        port: int = 0,
        preempt: str = "partition",
        requeue: bool = True,
        job_submit: str = "",
        max_submit: int = 0,
    ) -> None:
        self.folder = Path(folder).expanduser().resolve()
        sizes, times = (nodes, gpus, cpus, memory), (grace, kill_wait)
        form = (preempt, requeue, job_submit, max_submit)
        options = Options(*sizes, *times, user_signal, accounting, select, node_timeout, tuple(settings), port, *form)
        self.site = Site(self.folder, options)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Here:
        """The Slurm that was started in ``folder`` last."""
        path = Path(folder).expanduser().resolve() / "here.json"
        try:
            return cls(path.parent, **json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            remedy = "Start one: python tools/slurm_sandbox.py start"
            raise ConfigError("no Slurm was started in this folder", path.parent, remedy=remedy) from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"not what start writes: {error}", path, remedy="Start again.") from error

    @property
    def profile(self) -> Path:
        """A cluster profile for jobs/submit.py."""
        return self.folder / "profile.yaml"

    def env(self) -> dict[str, str]:
        """What Slurm's clients need in their environment."""
        return {"SLURM_CONF": str(self.site.conf)}

    def start(self, keep: bool = False) -> bool:
        """Bring all up, idle and ready. False where it runs already, then with the options it was started with.

        The queue, the numbers of jobs and the logs begin anew, unless ``keep``.
        """
        daemons.missing(self.site.options.accounting)
        self.site.check()
        with self._alone():
            if self.running():
                self.site = Here.open(self.folder).site
                return False
            shutdown.end_all(self.site)  # what a crash has left
            self._choose_port()
            self._folders(keep)
            try:
                self._up()
            except BaseException:  # Ctrl-C too: nothing half is left
                shutdown.end_all(self.site)
                raise
        return True

    def stop(self) -> bool:
        """Cancel all jobs, wait for their end, end all processes. Returns False if there was none."""
        if not self.site.conf.exists():
            return False
        with self._alone():
            there = bool(processes.daemons(self.folder))
            if self.running():
                self._empty()
            shutdown.end_all(self.site)
        return there

    def running(self) -> bool:
        """Whether slurmctld and munged run; nodes may be down."""
        pids = daemons.pids(self.site)
        return bool(pids["munged"] and pids["slurmctld"])

    def call(self, *words: str, timeout: float = DEADLINE) -> str:
        """Run a Slurm command and return its standard output. Raises FlipError if it fails or does not answer."""
        try:
            done = subprocess.run(
                words,
                env=daemons.environment(self.site),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            remedy = f"See {self.folder}/log, or stop and start again."
            raise FlipError(f"no answer for {timeout:g} s", words[0], remedy=remedy) from None
        except FileNotFoundError:
            raise ConfigError("no such command", words[0], remedy="Install slurm-client.") from None
        if done.returncode:
            raise FlipError(done.stderr.strip() or f"ended with {done.returncode}", " ".join(words))
        return done.stdout

    def lose(self, node: str) -> None:
        """Kill a node's slurmd, its steps and their tasks. Slurm finds out after ``node_timeout`` seconds or more."""
        shutdown.kill_node(self.site, self._node(node))

    def bring_back(self, node: str) -> None:
        """Start the slurmd of a lost node again, and wait until Slurm reports the node as up."""
        daemon = daemons.slurmd(self.site, self._node(node))
        if not daemons.pids(self.site)[daemon.name]:
            child = daemons.launch(self.site, daemon)
            daemons.up(self.site, child, daemon, lambda: self._usable(node))

    def preempt(self, nodes: int = 2, seconds: int = 20, nodelist: str = "") -> str:
        """Submit a job of higher priority for whole nodes (those of ``nodelist`` if given); returns its id."""
        where = f"--nodelist={nodelist}" if nodelist else f"--nodes={nodes}"
        high = "qos" if self.site.options.preempt == "qos" else "partition"
        words = [
            "--parsable",
            f"--{high}=high",
            "--time=60",
            "--exclusive",
            "--job-name=preempt",
            "--output=/dev/null",
            "--chdir=/",
        ]
        return self.call("sbatch", *words, where, f"--wrap=exec sleep {seconds}").strip().partition(";")[0]

    def set_grace(self, seconds: int) -> None:
        """Set GraceTime of the partition or QOS low until the next start."""
        if self.site.options.preempt == "qos":
            accounting.set_grace(self.call, seconds)
            return
        self.call("scontrol", "update", "PartitionName=low", f"GraceTime={seconds}")

    def status(self) -> dict[str, Any]:
        """Daemons with their pids (0: not running), nodes and jobs; both empty if Slurm does not run."""
        found: dict[str, Any] = {"folder": str(self.folder), "port": self.site.options.port, "running": self.running()}
        found["daemons"] = daemons.pids(self.site)
        found["nodes"], found["jobs"] = [], []
        if found["running"]:
            found["nodes"] = self._rows("name state reason", "sinfo", "-h", "-N", "-p", "low", "-o", "%N|%T|%E")
            for node in found["nodes"]:
                node["reason"] = "" if node["reason"] == "none" else node["reason"]
            keys = "id name partition state restarts nodes reason"
            form = "JobArrayID:|,Name:|,Partition:|,State:|,RestartCnt:|,NodeList:|,Reason:"
            found["jobs"] = self._rows(keys, "squeue", "-h", "-r", "-O", form)
        return found

    def _rows(self, keys: str, *words: str) -> list[dict[str, str]]:
        names = keys.split()
        lines = (line.split("|", len(names) - 1) for line in self.call(*words).splitlines())
        return [dict(zip(names, map(str.strip, cells), strict=True)) for cells in lines if len(cells) == len(names)]

    def _node(self, name: str) -> str:
        if name not in self.site.names:
            raise ConfigError("no such node", value=name, remedy=f"There are: {', '.join(self.site.names)}.")
        return name

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One start or stop at a time."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / ".lock", os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError as error:
            remedy = "Name a folder of your own with --folder."
            raise PermissionDenied(f"cannot write: {error.strerror}", self.folder, remedy=remedy) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _choose_port(self) -> None:
        options = self.site.options
        first = free_block(options.ports, options.port)
        self.site = Site(self.folder, dataclasses.replace(options, port=first))

    def _folders(self, keep: bool) -> None:
        for name in EMPTIED if not keep else ("run",):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in (*FOLDERS, *(["database"] if self.site.options.accounting else [])):
            (self.folder / name).mkdir(exist_ok=True)
        for name in ("munge", "state", "database"):  # munged insists
            if (self.folder / name).exists():
                (self.folder / name).chmod(0o700)
        for node in self.site.names:
            self.site.spool(node).mkdir(exist_ok=True)
        self.site.write()
        if self.site.options.accounting:
            accounting.write(self.site)
        put(self.folder / "here.json", json.dumps(dataclasses.asdict(self.site.options), indent=1).encode())

    def _up(self) -> None:
        site = self.site
        daemons.one(site, daemons.munged(site), (site / "run" / "munge.sock").exists)
        if site.options.accounting:
            accounting.up(site, self.call)
        controller = daemons.slurmctld(site)
        child = daemons.launch(site, controller)
        nodes = [(daemon, daemons.launch(site, daemon)) for daemon in (daemons.slurmd(site, n) for n in site.names)]
        daemons.up(site, child, controller, lambda: self._answers("scontrol", "ping"))
        for (daemon, started), node in zip(nodes, site.names, strict=True):
            daemons.up(site, started, daemon, lambda node=node: self._usable(node))  # type: ignore[misc]

    def _answers(self, *words: str) -> bool:
        try:
            return "UP" in self.call(*words, timeout=5)
        except FlipError:
            return False

    def _usable(self, node: str) -> bool:
        """Whether its slurmd listens and slurmctld knows. Until slurmctld notices, a lost node looks unchanged."""
        if not daemons.listens(self.site.address, self.site.options.port + 1 + self.site.names.index(node)):
            return False
        try:
            state = self.call("sinfo", "-h", "-p", "low", "-n", node, "-o", "%T", timeout=5).strip()
        except FlipError:
            return False
        return bool(re.fullmatch("idle|mixed|allocated|completing", state))

    def _empty(self) -> None:
        """Cancel all jobs until the queue is empty or their time to end is over."""
        limit = time.monotonic() + self.site.options.kill_wait + 15
        pids = daemons.pids(self.site)
        lost = [node for node in self.site.names if not pids[f"slurmd.{node}"]]
        try:
            if lost:  # else their jobs would be waited for
                self.call("scontrol", "update", f"NodeName={','.join(lost)}", "State=DOWN", "Reason=stop")
            while time.monotonic() < limit:
                jobs = sorted(set(self.call("squeue", "-h", "-o", "%F").split()))
                if not jobs:
                    return
                with contextlib.suppress(FlipError):  # one may have ended meanwhile
                    self.call("scancel", *jobs)
                time.sleep(0.3)
        except FlipError:  # a controller that does not answer is ended all the same
            return
