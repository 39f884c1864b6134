"""The foreign site of a storm: a Slurm of another form, whose prolog and Python of batch scripts fail on demand."""

import contextlib
import re
import signal
import sys
from pathlib import Path

from tests.harness.storm_site import StormSite
from tests.storm.deal import RUNS
from tests.storm.faults import FOREIGN
from tools.sandbox import processes
from tools.sandbox.config import Options, SandboxConfig

PROLOG = """#!/bin/sh
! rm {folder}/fail/$SLURM_JOB_ID 2>/dev/null
"""
PYTHON = """#!/bin/sh
# The Python of batch scripts. Their first call is: python -I -c PROGRAM SWEEP/.code/NUMBER ...
if [ "$2" = -c ]; then
  runs=${{4%/.code/*}}/.slurm/${{SLURM_JOB_NAME##*.}}/runs
  run=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" "$runs")
  ! rm "{folder}/hidden/${{run##*/}}" 2>/dev/null || exit 127
fi
exec {python} "$@"
"""
WIDE = tuple(name for name, layout in RUNS.items() if layout.nodes == 2)
NARROW = tuple(name for name in RUNS if name not in WIDE)


class ForeignStormSite(StormSite):
    """The run of two nodes has a partition of two. A job whose prolog fails is not held (nohold_on_prolog_fail)."""

    name = FOREIGN
    form = "whole nodes (select/linear), JobRequeue=0, a prolog that may fail, a partition as small as the job"
    profiles = {"small.yaml": ("small", WIDE), "rest.yaml": ("rest", NARROW)}

    def options(self):
        folder = self.folder / "slurm"
        (parameters,) = re.findall("^SchedulerParameters=(.*)$", SandboxConfig(folder, Options()).slurm_conf(), re.M)
        settings = ["SlurmctldTimeout=30", f"Prolog={self.folder}/prolog"]
        settings.append("DebugFlags=NO_CONF_HASH")  # slurmds know fewer partitions than a restarted slurmctld
        settings.append(f"SchedulerParameters={parameters},nohold_on_prolog_fail")
        return {"nodes": 7, "select": "linear", "requeue": False, "settings": settings}

    def profile_text(self):
        return f"host_python: {self.folder}/python\n"

    def start_slurm(self):
        for name in ("fail", "hidden"):
            (self.folder / name).mkdir()
        for name, text in (("prolog", PROLOG), ("python", PYTHON)):
            (self.folder / name).write_text(text.format(folder=self.folder, python=sys.executable))
            (self.folder / name).chmod(0o755)
        super().start_slurm()
        for name, nodes in (("small", "n[1-2]"), ("rest", "n[3-7]")):
            line = [f"PartitionName={name}", f"Nodes={nodes}", "MaxTime=INFINITE", "State=UP", "PriorityTier=1"]
            line.append("PreemptMode=REQUEUE")
            self.here.call("scontrol", "create", *line)
            with open(self.here.site.conf, "a", encoding="utf-8") as conf:  # for restarts of slurmctld
                conf.write(" ".join(line) + "\n")

    def set_grace(self, run, seconds):
        self.here.call("scontrol", "update", f"PartitionName={self._partition(run)}", f"GraceTime={seconds}")

    def has_spare(self, run):
        return self._partition(run) != "small"

    def _partition(self, run):
        return next(partition for partition, names in self.profiles.values() if run.run.name in names)

    # -- faults ------------------------------------------------------------------------------------------------------

    def fail_prolog(self, number):
        """Let the prolog of the next start of a job fail, on one node. Return the file that it removes then."""
        return _flag(self.folder / "fail" / number)

    def hide_interpreter(self, name):
        """Let the next start of a run not find its Python. Return the file that is removed then."""
        return _flag(self.folder / "hidden" / name)

    def resume_drained(self):
        """Resume the nodes whose prolog has failed; return whether there were any."""
        with self.hands:
            lines = self.here.call("sinfo", "-h", "-N", "-p", "high", "-o", "%N|%T|%E").splitlines()
            drained = [line.split("|")[0] for line in lines if "Prolog" in line.split("|")[2]]
            for node in drained:
                self.here.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        return bool(drained)

    def stop_answers(self, stop):
        """Stop slurmctld, or let it continue."""
        if stop:
            processes.freeze(self._controller())
        else:
            processes.kill(self._controller(), signal.SIGCONT)

    def stepds(self, number):
        """The running steps of a job (``batch``, ``0``, ...) and their slurmstepds, one per node."""
        running = [process for group in processes.daemons(self.here.folder).values() for process in group]
        steps = {}
        for process in sorted(running, key=lambda process: process.pid):
            if process.name != "slurmstepd":
                continue
            with contextlib.suppress(OSError):  # it has ended meanwhile
                title = Path(f"/proc/{process.pid}/cmdline").read_text()
                if step := re.search(rf"\[{number}\.(\w+)\]", title):
                    steps.setdefault(step[1], []).append(process)
        return steps

    def rank_step(self, job):
        """The number of the step of all ranks of a job, as Slurm shows it. Each restart in the job has the next one."""
        shown = self.here.call("squeue", "--steps", "--noheader", "--format=%i", f"--jobs={job}").split()
        return max((step for _, step in (name.rsplit(".", 1) for name in shown) if step.isdigit()), key=int, default="")


def _flag(path):
    path.touch()
    return path
