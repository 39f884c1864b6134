"""Patches that connect the code of jobs/ to the simulation: the clock and Slurm's commands."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from types import SimpleNamespace
from unittest import mock

from flip.runs.rundir import RunDir
from jobs.host import batch_hooks, lost_step, processes, slurm_cli
from jobs.host.agents import coordinator, job_coordinator, lost_batch_host
from tests.fakeslurm.agents import AgentServer, Listener, SimulatedThread

CLOCKED = ("flip.runs.", "jobs.host.")
"""Packages whose modules get the simulated clock."""


@contextlib.contextmanager
def in_place(clock, commands):
    """Let the code of jobs/ call the simulated Slurm and use the simulated clock."""
    with contextlib.ExitStack() as stack:
        for module in clocked_modules():
            stack.enter_context(mock.patch.object(module, "time", clock.module))
        stack.enter_context(mock.patch.object(slurm_cli, "call", commands.call))
        for name, stand_in in _for_coordinator(clock).items():
            stack.enter_context(mock.patch.object(job_coordinator, name, stand_in))
        stack.enter_context(mock.patch.object(batch_hooks, "write_code", _write_code(clock)))
        stack.enter_context(mock.patch.object(RunDir, "start_attempt", _noted(clock, RunDir.start_attempt)))
        stack.enter_context(mock.patch.object(lost_batch_host, "_srun_answers", _srun_answers(clock)))
        stack.enter_context(
            mock.patch.object(processes, "kill_orphans", lambda *args: [])
        )  # it reads processes of this host
        stack.enter_context(mock.patch.object(lost_step, "POLL_SECONDS", float("inf")))  # the same
        stack.enter_context(
            mock.patch.object(lost_step, "kill_srun", lambda run, n: clock.current.about.life.body.kill_srun())
        )
        yield


def clocked_modules():
    """The loaded modules that read the clock on the host of a job."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(CLOCKED)]
    return [module for module in modules if getattr(module, "time", None) is time]


def _for_coordinator(clock):
    """Name in ``job_coordinator`` -> what replaces it."""
    return {
        "Coordinator": functools.partial(coordinator.Coordinator, clock=lambda: clock.now),
        "AgentServer": functools.partial(AgentServer, clock),
        "listen": lambda host, first, last: Listener(clock.current.about.life),
        "listening_address": lambda nodes, environ: "",
        "address_of": lambda agent: agent.node,
        "threading": SimpleNamespace(Thread=functools.partial(SimulatedThread, clock)),
    }


def _noted(clock, start_attempt):
    """``RunDir.start_attempt``, which also tells the life of the calling process that it has won an attempt."""

    def start_and_note(run, start, after=None):
        n = start_attempt(run, start, after)
        place = clock.current and clock.current.about
        if n and place:
            place.life.won(n)
        return n

    return start_and_note


def _write_code(clock):
    """``batch_hooks.write_code``: the shell reads the code when srun has ended."""

    def write_code(fd, code):
        clock.current.about.life.agents_code = code

    return write_code


def _srun_answers(clock):
    """``lost_batch_host._srun_answers``: srun runs on the first node of the job."""

    def answers(environ):
        return clock.current.about.life.has_srun

    return answers
