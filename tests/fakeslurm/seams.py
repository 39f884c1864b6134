"""Patches that connect the code of jobs/ to the simulation: the clock and Slurm's commands."""

from __future__ import annotations

import contextlib
import sys
import time
from unittest import mock

from flip.runs.rundir import RunDir
from jobs.host import rank_step, slurm_cli
from jobs.host.agents import node_pool, orphaned_task

CLOCKED = ("flip.runs.", "jobs.host.")
"""Packages whose modules get the simulated clock."""


@contextlib.contextmanager
def in_place(clock, commands):
    """Let the code of jobs/ call the simulated Slurm and use the simulated clock."""
    with contextlib.ExitStack() as stack:
        for module in clocked_modules():
            stack.enter_context(mock.patch.object(module, "time", clock.module))
        stack.enter_context(mock.patch.object(slurm_cli, "call", commands.call))
        stack.enter_context(mock.patch.object(RunDir, "start_attempt", _noted(clock, RunDir.start_attempt)))
        stack.enter_context(mock.patch.object(orphaned_task, "_srun_answers", _srun_answers(clock)))
        stack.enter_context(mock.patch.object(node_pool, "address_of", lambda agent: agent.node))
        stack.enter_context(mock.patch.object(rank_step, "LOOK_SECONDS", float("inf")))  # for processes of this host
        yield


def clocked_modules():
    """The loaded modules that read the clock on the host of a job."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(CLOCKED)]
    return [module for module in modules if getattr(module, "time", None) is time]


def _noted(clock, start_attempt):
    """``RunDir.start_attempt``, which also tells the life of the calling process that it has won an attempt."""

    def start_and_note(run, start, after=None):
        n = start_attempt(run, start, after)
        place = clock.current and clock.current.about
        if n and place:
            place.life.won(n)
        return n

    return start_and_note


def _srun_answers(clock):
    """``orphaned_task._srun_answers``: srun runs on the first node of the job."""

    def answers(environ):
        return clock.current.about.life.has_srun

    return answers
