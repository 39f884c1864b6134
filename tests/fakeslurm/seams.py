"""Patches that connect the code of jobs/ to the simulation: the clock, Slurm's commands, and submitit."""

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
        stack.enter_context(mock.patch("submitit.core.utils.CommandFunction", _sbatch(commands)))
        stack.enter_context(mock.patch("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 2)))
        yield


def _sbatch(commands):
    """The class with which submitit calls sbatch."""
    from submitit.core.utils import FailedJobError

    class CommandFunction:
        def __init__(self, args, verbose=False):
            self.args = args

        def __call__(self):
            try:
                return commands.call(*map(str, self.args))
            except slurm_cli.SlurmUnavailable as error:
                raise FailedJobError(str(error)) from error

    return CommandFunction
