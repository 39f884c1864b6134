"""The files of a run directory and of the folders around it, and what each holds (docs/contracts.md).

In a path, <name> stands for any part of a name. Paths that end in a slash are folders, with all files in them. Standard
library, Python >= 3.6.
"""

import re
from typing import Dict, Optional

RUN_FILES = {
    "config.yaml": "the resolved configuration, every field",
    "command.json": "of a run of a program, in place of config.yaml: words, parameters, and how it is followed",
    "work/": "working directory of a program: links to its copied code, and what it writes there",
    "identity.json": (
        "hash, schema, code (digest of the snapshot), uid (who submitted it), config (what the hash is over),"
        " classes (digests of class names), callbacks (checksums of the files of `monitor.callbacks`, if any;"
        " not hashed)"
    ),
    "job.json": (
        "how it was started; `job_kind`: train, evaluate or command; `kind`: the back end; `time`: when; `after`: the "
        "newest attempt at that time; `uid`: who submitted it; `canary` (steps, releases) of a canary run, "
        "`waits_for` of a run that waits for it; `command`: the arguments that submit it again; `command_folder`: the "
        "folder from which relative paths of its sweep file start (empty: it has none); `trackers`: those that follow "
        "it; `exposed`: "
        "folders above in which others can rename, accepted because the run existed before they were checked; "
        "`folder`: this run directory; `copy_of`: the one from which it was copied, renamed or moved before it was "
        "submitted, or empty"
    ),
    "status.json": (
        "replaced every few seconds: attempt, phase, stage, S, step, loss, accuracy, speed, time left, "
        "verdict (bottleneck), unsteady (speed), storage (a current outage; null: none), reason (why the "
        "attempt ended), `callbacks` (disabled classes of `monitor.callbacks`, and why)"
    ),
    "trained.json": "of a program with an evaluation: that it ended well, where, and its last checkpoint",
    "cancel.json": "who cancelled it and why",
    "attempts/<n>/start.json": (
        "host, world, resumes_from (S), first_commit; locally `gpus`, the devices of the attempt, and `warm`,"
        " whether it starts from the agent of the attempt before"
    ),
    "attempts/<n>/ready.json": (
        "when it could train, from which S, seconds of `restoring`, `accumulate`, environment: Python, packages, "
        "processor and GPU of rank 0, and whether the visible-patch kernel is used (no option: it changes no bit)"
    ),
    "attempts/<n>/pids.json": "of a local attempt: rank, pid and start time of each rank process",
    "attempts/<n>/coordinator.json": (
        "on Slurm with node agents: host, port and key of the coordinator of the job that began with n"
    ),
    "attempts/<n>/remote.json": (
        "with `checkpoint.url`: the attempt's `id` in owner.json, and `writer` in its checkpoints (docs/checkpoints.md)"
    ),
    "attempts/<n>/cause.<r>.json": "why rank r ended: cause, code, reason; its first cause is final",
    "attempts/<n>/resume.json": "of a program: the checkpoint that it was given (path, samples); empty: none",
    "attempts/<n>/error.<r>.json": "of a program: the error that its rank r wrote to TORCHELASTIC_ERROR_FILE",
    "attempts/<n>/wall.json": "its wall limit in seconds, as last read from Slurm",
    "attempts/<n>/told.json": "rank 0 received a stop request",
    "attempts/<n>/limit.json": "Slurm ended it for its wall limit",
    "attempts/<n>/progress.json": "an evaluation stored a score",
    "attempts/<n>/end.json": (
        "what was decided: action, cause, reason, delay; code, state, commits, committed; `noticed`: when the"
        " launcher saw the first rank fail; `observed`: whether it saw the end"
    ),
    "metrics/<n>.jsonl": (
        "a line per logged step; of a repeated step the highest n counts. saves, saving: checkpoints of this "
        "attempt until then, and the seconds that steps waited for them. shares: of the time since the line "
        "before (docs/monitoring.md)"
    ),
    "anomalies/<n>-<step>.<r>.json": (
        "of a skipped step, or of a loss spike: rank r's samples (`ids`), kind, stage, step, S, loss, "
        "grad_norm, lr, bound; non-finite values are strings"
    ),
    "traces/<n>-<step>.json.gz": "profile of rank 0, if requested",
    "tensorboard/": "one event file per attempt, without repeated steps",
    "trackers/<name>.json": (
        "of a tracker such as wandb: id of the run there, last step sent when its follower closed, scores sent, results"
    ),
    "trackers/<name>.lock": "held by its follower",
    "trackers/<name>/": "files of the tracker",
    "checkpoints/<stage>/<S>-<n>/": (
        "safetensors and commit.json; of a program commit.json alone, with `kind` external and the `path` of its files"
    ),
    "checkpoints/url.json": (
        "with `checkpoint.url`: the address of its remote folder (url), this run directory (folder), and the remote "
        "folders that `submit --take-over` gave it (taken: SWEEP/NAME below `checkpoint.url`)"
    ),
    "eval/<stage>-<S>.json": (
        "scores at S, in training: stage, samples, seconds (of training up to S), attempt, evaluations: a result per "
        "column with counts, shares, the 95 % interval of the first share, chance, seconds, precision, commit, data "
        "(digest of the data set), view (size, mask, differences from the default) and predictions (their digest)"
    ),
    "eval/<stage>-<S>/<job>.json": (
        "the same of a separate job (docs/evaluation.md): stage, samples, job, evaluations"
    ),
    "eval/<stage>-<S>/<name>.predictions.jsonl": "the prediction for each image of a zero-shot set, at the end",
    "pins/<digest>.json": (
        "a checkpoint (stage, samples) that is not deleted until another run directory is complete (by): a run "
        "that starts from it, or an evaluation, which may also fail or be cancelled"
    ),
    "compiled/": (
        "code that torch.compile made, for later attempts; deleted when the run is complete. Only its user can open it"
    ),
    "compiled.of-<user>-<time>/": "came with a copy of the run, and is not used",
    "export/<stage>-<S>/": "the export of that checkpoint by flip export (docs/export.md)",
    "logs/<n>/": (
        "node<i>.out, node<i>.err, on Slurm job.out, job.err; follow-<tracker>.log; collectives.<r>.json of "
        "rank r if it hung"
    ),
    "logs/latest": "points to the newest",
    "result.json": "written once, last: the run is complete",
}  # type: Dict[str, str]
"""Path below the run directory -> what it holds."""

SWEEP_FILES = {
    "<sweep>/sweep.json": "the sweep, with its `file`",
    "<sweep>/.code/<digest>/": "the code as submitted, with a user's classes in `callbacks/`",
    "<sweep>/.supervisor/": "the local supervisor",
    "<sweep>/.slurm/<token>/": "on Slurm a submission: script, list of runs",
    "<sweep>/.evaluate/<job>/": (
        "an evaluation job: a run directory with its request, task.json (model, commits, sets, compute, "
        "waits), in place of config.yaml and identity.json"
    ),
    "<sweep>/.notified/": "ends of the sweep for which a notification was sent",
    "<sweep>/<run>-v2/": "a fork: the run with a newer configuration (`--changed fork`)",
    ".trash/<time>/": (
        "<sweep>/<run>: removed, replaced and pruned run directories. Only `flip clean` deletes one; .trash is created"
        " with the mode of RUNS_ROOT"
    ),
}  # type: Dict[str, str]
"""Path below RUNS_ROOT -> what it holds."""


def described(path: str, table: Dict[str, str]) -> Optional[str]:
    """The entry of ``RUN_FILES`` or ``SWEEP_FILES`` to which the path of a file belongs; None: there is none."""
    for pattern in table:
        parts = re.split(r"(<\w+>)", pattern.rstrip("/"))
        regex = "".join("[^/]+" if part.startswith("<") else re.escape(part) for part in parts)
        rest = ""
        if pattern.endswith("/"):
            rest = "/.*"
        if re.fullmatch(regex + rest, path):
            return pattern
    return None
