"""``SandboxCluster``: a real Slurm on this machine with virtual nodes and fake GPUs, all of it below one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flip.files import deletion
from flip.files.creation import closed_folder, open_lock
from flip.runs.errors import ConfigError, FlipError, PermissionDenied
from flip.runs.rundir import write_text
from tools.sandbox import daemons, processes
from tools.sandbox.config import Options, SandboxConfig, free_block

COMMAND_SECONDS = 10.0
"""Timeout of a Slurm command."""
FOLDERS = ("run", "log", "dev", "munge", "state", "spool")
EMPTIED = ("run", "log", "state", "spool", "database")
"""Deleted at start unless jobs are kept; munge's key stays."""


class SandboxCluster:
    """A Slurm in ``folder``. ``options``: fields of `config.Options`; ``open`` reads those of the last start."""

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        self.folder = Path(folder).expanduser().resolve()
        options["settings"] = tuple(options.get("settings", ()))
        self.site = SandboxConfig(self.folder, Options(**options))

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> SandboxCluster:
        """The Slurm that was started last in ``folder``."""
        path = Path(folder).expanduser().resolve() / "here.json"
        try:
            return cls(path.parent, **json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            remedy = "Start one: flip slurm_sandbox start"
            raise ConfigError("no Slurm was started in this folder", path.parent, remedy=remedy) from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"invalid record of the options: {error}", path, remedy="Start again.") from error

    @property
    def profile(self) -> Path:
        """A cluster profile for flip submit."""
        return self.folder / "profile.yaml"

    def env(self) -> dict[str, str]:
        """Environment variables for Slurm's commands."""
        return {"SLURM_CONF": str(self.site.conf)}

    def start(self, keep: bool = False) -> bool:
        """Start all daemons and wait until the nodes are idle. Returns False if this Slurm runs already.

        ``keep``: keep the queue, job numbers and logs of the last start.
        """
        daemons.require_packages(self.site.options.accounting)
        self.site.check()
        with self._lock():
            if self.running():
                self.site = SandboxCluster.open(self.folder).site
                return False
            daemons.stop_all(self.site)  # left by a crash
            options = self.site.options
            port = free_block(options.ports, options.port)
            self.site = SandboxConfig(self.folder, dataclasses.replace(options, port=port))
            self._create_files(keep)
            try:
                self._start_daemons()
            except BaseException:  # on Ctrl-C, too
                daemons.stop_all(self.site)
                raise
        return True

    def stop(self) -> bool:
        """Cancel all jobs, wait for their end, end all processes. Returns False if there was none."""
        if not self.site.conf.exists():
            return False
        with self._lock():
            running = bool(processes.daemons(self.folder))
            if self.running():
                self._cancel_all()
            daemons.stop_all(self.site)
        return running

    def running(self) -> bool:
        """Whether slurmctld and munged run; nodes may be down."""
        pids = daemons.pids(self.site)
        return bool(pids["munged"] and pids["slurmctld"])

    def call(self, *argv: str, timeout: float = COMMAND_SECONDS) -> str:
        """Run a Slurm command and return its standard output. Raises FlipError if it fails or does not answer."""
        try:
            done = subprocess.run(
                argv, env=daemons.environment(self.site), timeout=timeout,
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            remedy = f"See {self.folder}/log, or stop and start again."
            raise FlipError(f"no answer for {timeout:g} s", argv[0], remedy=remedy) from None
        except FileNotFoundError:
            raise ConfigError("command not found", argv[0], remedy="Install slurm-client.") from None
        if done.returncode:
            raise FlipError(done.stderr.strip() or f"ended with {done.returncode}", " ".join(argv))
        return done.stdout

    def lose(self, node: str) -> None:
        """Kill a node's slurmd, its steps and their tasks. Slurm notices after ``node_timeout`` seconds or more."""
        daemons.kill_node(self.site, self._node(node))

    def silence(self, node: str) -> None:
        """Stop all processes of a node without ending a connection, as if its network were cut. ``lose`` ends them."""
        daemons.stop_node(self.site, self._node(node))

    def end_silence(self, node: str) -> None:
        """Let the processes of a silent node go on."""
        daemons.continue_node(self.site, self._node(node))

    def bring_back(self, node: str) -> None:
        """Start the slurmd of a lost node again, and wait until Slurm reports the node as up."""
        daemon = daemons.slurmd(self.site, self._node(node))
        if not daemons.pids(self.site)[daemon.name]:
            child = daemons.launch(self.site, daemon)
            daemons.wait_ready(self.site, child, daemon, lambda: self._usable(node))

    def preempt(self, nodes: int = 2, seconds: int = 20, nodelist: str = "") -> str:
        """Submit a job of higher priority for whole nodes (those of ``nodelist`` if given); returns its id."""
        if nodelist:
            size = f"--nodelist={nodelist}"
        else:
            size = f"--nodes={nodes}"
        options = [f"--{self.site.options.preempt}=high", size, "--exclusive", f"--time={seconds // 60 + 1}"]  # minutes
        options += ["--no-requeue", "--job-name=preempt", "--output=/dev/null", "--chdir=/"]  # it runs once
        options += [f"--wrap=exec sleep {seconds}"]
        return self.call("sbatch", "--parsable", *options).strip().partition(";")[0]

    def set_grace(self, seconds: int) -> None:
        """Set GraceTime of the partition or QOS low until the next start."""
        if self.site.options.preempt == "qos":
            daemons.set_grace(self.call, seconds)
            return
        self.call("scontrol", "update", "PartitionName=low", f"GraceTime={seconds}")

    def status(self) -> dict[str, Any]:
        """Daemons with their pids (0: not running), nodes and jobs; both empty if Slurm does not run."""
        running = self.running()
        nodes = list[dict[str, str]]()
        jobs = list[dict[str, str]]()
        if running:
            nodes = self._rows("name state reason", "sinfo", "-h", "-N", "-p", "low", "-o", "%N|%T|%E")
            for node in nodes:
                if node["reason"] == "none":
                    node["reason"] = ""
            columns = "JobArrayID:|,Name:|,Partition:|,State:|,RestartCnt:|,NodeList:|,Reason:"
            jobs = self._rows("id name partition state restarts nodes reason", "squeue", "-h", "-r", "-O", columns)
        report = {"folder": str(self.folder), "port": self.site.options.port, "running": running}
        return report | {"daemons": daemons.pids(self.site), "nodes": nodes, "jobs": jobs}

    def _rows(self, keys: str, *argv: str) -> list[dict[str, str]]:
        names = keys.split()
        lines = (line.split("|", len(names) - 1) for line in self.call(*argv).splitlines())
        return [dict(zip(names, map(str.strip, cells), strict=True)) for cells in lines if len(cells) == len(names)]

    def _node(self, name: str) -> str:
        if name not in self.site.names:
            raise ConfigError("unknown node", value=name, remedy=f"Nodes are: {', '.join(self.site.names)}.")
        return name

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One start or stop at a time."""
        try:
            lock = open_lock(closed_folder(self.folder) / ".lock", 0o600)
        except OSError as error:
            remedy = "Name a folder of your own with --folder."
            raise PermissionDenied(f"cannot write: {error.strerror}", self.folder, remedy=remedy) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _create_files(self, keep: bool) -> None:
        emptied = ("run",) if keep else EMPTIED
        for name in emptied:
            deletion.discard_own_folder(self.folder / name)
        folders = list(FOLDERS)
        if self.site.options.accounting:
            folders.append("database")
        for name in folders:
            closed_folder(self.folder / name)
        for name in ("munge", "state", "database"):  # munged requires it
            if (self.folder / name).exists():
                (self.folder / name).chmod(0o700)
        for node in self.site.names:
            closed_folder(self.site.spool(node))
        self.site.write()
        if self.site.options.accounting:
            daemons.write_accounting(self.site)
        write_text(self.folder / "here.json", json.dumps(dataclasses.asdict(self.site.options), indent=1))

    def _start_daemons(self) -> None:
        site = self.site
        daemons.start(site, daemons.munged(site), (site / "run" / "munge.sock").exists)
        if site.options.accounting:
            daemons.start_accounting(site, self.call)
        controller = daemons.slurmctld(site)
        nodes = [daemons.slurmd(site, node) for node in site.names]
        child, *children = [daemons.launch(site, daemon) for daemon in (controller, *nodes)]
        daemons.wait_ready(site, child, controller, lambda: self._answers("scontrol", "ping"))
        for started, daemon, node in zip(children, nodes, site.names, strict=True):
            daemons.wait_ready(site, started, daemon, lambda node=node: self._usable(node))  # type: ignore[misc]

    def _answers(self, *argv: str) -> bool:
        try:
            return "UP" in self.call(*argv, timeout=5)
        except FlipError:
            return False

    def _usable(self, node: str) -> bool:
        """Whether its slurmd listens and slurmctld reports it as up, which it also does for a node lost recently."""
        if not daemons.listens(self.site.address, self.site.options.port + 1 + self.site.names.index(node)):
            return False
        try:
            state = self.call("sinfo", "-h", "-p", "low", "-n", node, "-o", "%T", timeout=5).strip()
        except FlipError:
            return False
        return bool(re.fullmatch("idle|mixed|allocated|completing", state))

    def _cancel_all(self) -> None:
        """Cancel all jobs, and wait until the queue is empty or their time to end is over."""
        limit = time.monotonic() + self.site.options.kill_wait + 15
        pids = daemons.pids(self.site)
        lost = [node for node in self.site.names if not pids[f"slurmd.{node}"]]
        with contextlib.suppress(FlipError):  # a controller that does not answer is killed anyway
            if lost:  # else Slurm waits for their jobs
                self.call("scontrol", "update", f"NodeName={','.join(lost)}", "State=DOWN", "Reason=stop")
            while time.monotonic() < limit:
                jobs = sorted(set(self.call("squeue", "-h", "-o", "%F").split()))
                if not jobs:
                    return
                with contextlib.suppress(FlipError):  # a job may have ended meanwhile
                    self.call("scancel", *jobs)
                time.sleep(0.3)
