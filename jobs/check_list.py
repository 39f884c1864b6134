"""Every check before ranks work, by the first stage that can run it: ``stages``. docs/reference.md prints it.

A list of rules belongs to one kind of work or to all kinds, and runs for the subject that its module describes.
"""

from collections.abc import Sequence

from flip.common import gpu_software
from flip.config import validate
from flip.runs.checks import CLUSTER, NODE, RANK, SUBMIT, Rule
from jobs.planning import preflight, software_checks
from jobs.runtime import health, network_check, rank_process
from jobs.slurm import site_checks
from jobs.workloads import command, evaluation


def stages() -> dict[str, dict[str, Sequence[Rule]]]:
    """Stage -> the lists that run there, by what they concern."""
    return {
        SUBMIT: {
            "a configuration": validate.RULES,
            "a run that trains": preflight.TRAINING,
            "warnings of a run that trains": preflight.TRAINING_WARNINGS,
            "all runs of a submission": [preflight.SPACE],
            "a run that executes a program": command.RULES,
            "an evaluation": evaluation.RULES,
        },
        CLUSTER: {
            "a submission, or an evaluation": [preflight.SCHEDULER],
            "a site, by `flip doctor`": [*site_checks.CHECKS, *software_checks.OF_PROFILE],
        },
        NODE: {
            "a node": health.CHECKS,
            "a node with GPUs": health.GPU_CHECKS,
            "all nodes together": network_check.CHECKS,
        },
        RANK: {
            "every rank": rank_process.OF_ALL_WORK,
            "a rank that trains": rank_process.OF_TRAINING,
            "a rank with a GPU": gpu_software.OF_RANKS,
        },
    }
