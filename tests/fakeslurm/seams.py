"""The places where the code of jobs/ meets the world: the clock, Slurm's commands, and what submitit calls."""

from __future__ import annotations

import contextlib
from unittest import mock

from flip.runs import rundir
from jobs.host import attempts, batch_hooks, processes, slurm_cli


@contextlib.contextmanager
def in_place(clock, commands):
    """The code of jobs/ asks this Slurm, and lives by this clock."""
    with contextlib.ExitStack() as stack:
        for module in (slurm_cli, batch_hooks, attempts, rundir):
            stack.enter_context(mock.patch.object(module, "time", clock.module))
        stack.enter_context(mock.patch.object(slurm_cli, "call", commands.call))
        stack.enter_context(mock.patch.object(processes, "kill_orphans", lambda *given: []))  # it looks at this host
        stack.enter_context(mock.patch("submitit.core.utils.CommandFunction", _sbatch(commands)))
        stack.enter_context(mock.patch("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 2)))
        yield


def _sbatch(commands):
    """What submitit starts sbatch with."""
    from submitit.core.utils import FailedJobError

    class CommandFunction:
        def __init__(self, words, verbose=False):
            self.words = words

        def __call__(self):
            try:
                return commands.call(*map(str, self.words))
            except slurm_cli.SlurmUnavailable as error:
                raise FailedJobError(str(error)) from error

    return CommandFunction
