"""Patches that connect the code of jobs/ to the simulation: the clock and Slurm's commands."""

from __future__ import annotations

import contextlib
from unittest import mock

from flip.runs import attempts, rundir, wall_limit
from jobs.host import batch_hooks, lost_step, own_job, processes, requeue, slurm_cli


@contextlib.contextmanager
def in_place(clock, commands):
    """Let the code of jobs/ call the simulated Slurm and use the simulated clock."""
    with contextlib.ExitStack() as stack:
        for module in (slurm_cli, own_job, requeue, batch_hooks, attempts, wall_limit, rundir):
            stack.enter_context(mock.patch.object(module, "time", clock.module))
        stack.enter_context(mock.patch.object(slurm_cli, "call", commands.call))
        stack.enter_context(
            mock.patch.object(processes, "kill_orphans", lambda *args: [])
        )  # it reads processes of this host
        stack.enter_context(mock.patch.object(lost_step, "POLL_SECONDS", float("inf")))  # the same
        yield
