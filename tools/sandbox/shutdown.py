"""End the Slurm in a folder without leftovers, or one node as if its machine had failed."""

from __future__ import annotations

from collections.abc import Sequence

from flip.runs.errors import FlipError
from tools.sandbox import processes
from tools.sandbox.config import Site
from tools.sandbox.processes import Process

#: In this order; seconds between SIGTERM and SIGKILL.
LIMITS = {"slurmctld": 15.0, "slurmscriptd": 5.0, "slurmdbd": 15.0, "mariadbd": 30.0, "munged": 5.0}


def kill_node(site: Site, node: str) -> None:
    """Simulate a machine failure: SIGKILL slurmd, its slurmstepds and their tasks, in this order."""
    _kill(site, [p for p in processes.daemons(site.folder).get(site.spool(node), []) if p.name == "slurmd"])
    kill_steps(site, [node])


def kill_steps(site: Site, nodes: Sequence[str]) -> None:
    """SIGKILL the slurmstepds of nodes and their tasks, none of which sees another one's end and tells of it.

    A slurmstepd would report its tasks; srun, or the process that looks after it, would end the step on other nodes. So
    all stand still before the first dies, and children die first: the kernel wakes what loses its parent. More than
    once: a step may be starting.
    """
    marks = {node: (f"SLURM_CONF={site.conf}", f"SLURMD_NODENAME={node}") for node in nodes}
    for _ in range(50):
        there = processes.daemons(site.folder)
        steps = [p for node in nodes for p in there.get(site.spool(node), []) if p.name == "slurmstepd"]
        tasks = processes.tasks(steps, list(marks.values()))
        if not steps and not tasks:
            return
        processes.freeze(steps + tasks)
        _kill(site, processes.children_first(steps + tasks))


def end_all(site: Site) -> None:
    """End all processes: slurmds, steps and tasks, slurmctld, slurmdbd, MariaDB, munged."""
    nodes = [place.name for place in processes.daemons(site.folder) if place.parent == site / "spool"]
    _end(site, "slurmd", 10.0)
    kill_steps(site, sorted({*nodes, *site.names}))
    for name, seconds in LIMITS.items():
        _end(site, name, seconds)
    left = [p for there in processes.daemons(site.folder).values() for p in there]
    if left:
        remedy = "It may hang in the kernel."
        raise FlipError("a daemon outlives SIGKILL", site.folder, f"{left[0].name}, pid {left[0].pid}", remedy)


def _end(site: Site, name: str, seconds: float) -> None:
    found = [p for there in processes.daemons(site.folder).values() for p in there if p.name == name]
    processes.end(found, seconds)


def _kill(site: Site, found: list[Process]) -> None:
    processes.kill(found)
    processes.gone(found, 5)
