"""Command lines of Slurm that the product executes: what tests with stand-ins may fake, and what a real Slurm runs.

The stand-ins for Slurm (the fixture ``commands`` and ``tests/fakeslurm``) refuse a command line that is not listed.
``tests/slurm/test_command_lines.py`` runs each of these lines against a real Slurm and fails if one is refused: an
answer that is faked to a command line that Slurm refuses would hide the error from all tests.

<JOB> and the like stand for values; words in brackets may be absent, and are also run alone and not at all.
"""

import re
from dataclasses import dataclass

SLURM_COMMANDS = ("sinfo", "scontrol", "squeue", "sacct", "sacctmgr", "sbatch", "srun", "scancel")
QUEUE = "%j|%K|%i|%T|%N|%r|%S|%k"
USER_LIMITS = "format=DefaultAccount,Account,DefaultQOS,MaxSubmitJobs,GrpSubmitJobs"
QOS_LIMITS = "format=PreemptMode,GraceTime,MaxWall,MaxSubmitJobsPerUser,MaxSubmitJobsPerAccount,GrpSubmitJobs"

VALUES = {
    "JOBS": r"[0-9_]+(,[0-9_]+)*",
    "JOB": r"[0-9]+(_[0-9]+)?",
    "NAMES": r"[^,]+(,[^,]+)*",
    "NODES": r"[^,\s]+(,[^,\s]+)*",
    "PARTITION": r"[\w-]+",
    "PARTITIONS": r"[\w-]+(,[\w-]+)*",
    "COMMENT": r"[\w:.-]*",
    "ACCOUNT": r"\w+",
    "QOS": r"\w+",
    "USER": r"[\w.-]+",
    "CLUSTER": r"[\w-]+",
    "FILE": r"[^-].*",
    "UID": r"[0-9]+",
    "N": r"[0-9]+",
    "WORDS": r".*",
}
PLACE = re.compile("<([A-Z]+)>")


@dataclass(frozen=True)
class CommandLine:
    """``job``: what JOB must be when the line is run: running, pending, requeued or held. ``accounting``: whether
    Slurm's accounting database must run. ``script``: whether a batch script comes on standard input."""

    text: str
    job: str = ""
    accounting: bool = False
    script: bool = False

    @property
    def words(self) -> list[tuple[str, bool]]:
        """(word, whether it may be absent)."""
        return [(word.strip("[]"), word.startswith("[")) for word in self.text.split()]

    def matches(self, words: list[str]) -> bool:
        """Whether a command line is this one, with its values."""
        given = list(words)
        for word, optional in self.words:
            literals = PLACE.split(word)
            literals[::2] = map(re.escape, literals[::2])
            literals[1::2] = (f"({VALUES[name]})" for name in literals[1::2])
            pattern = "".join(literals).removesuffix(re.escape("..."))
            fits = [bool(re.fullmatch(pattern, text)) for text in given[: None if word.endswith("...") else 1]]
            if not any(fits[:1]) and not optional:
                return False
            given = given[fits.index(False) if False in fits else len(fits) :]
        return not given

    def variants(self, values: dict[str, str]) -> list[list[str]]:
        """The words with these values: with all words in brackets, with none, and with each of them alone."""
        options = [i for i, (_, optional) in enumerate(self.words) if optional]
        if options:
            chosen = [set(options), *({i} for i in options), set[int]()]
        else:
            chosen = [set[int]()]
        lines = [[w for i, (w, optional) in enumerate(self.words) if not optional or i in kept] for kept in chosen]
        filled = []
        for line in lines:
            words = [PLACE.sub(lambda match: values[match[1]], word.removesuffix("...")) for word in line]
            if words not in filled:
                filled.append(words)
        return filled


LINES = [
    CommandLine("sinfo -h -N -p <PARTITION> -o %N|%T"),
    CommandLine("sinfo -h -N -p <PARTITIONS> -o %N|%c|%m|%G|%T|%z"),
    CommandLine("scontrol show config"),
    CommandLine("scontrol -a show partition <PARTITION>"),
    CommandLine("scontrol -a -o show partition [<PARTITION>]"),
    CommandLine("scontrol show hostnames <NODES>"),
    CommandLine("scontrol show node <NODES>"),
    CommandLine("scontrol show job <JOB>", "running"),
    CommandLine("scontrol write batch_script <JOB> -", "running"),
    CommandLine("scontrol requeue <JOB>", "running"),
    CommandLine("scontrol update JobId=<JOB> Comment=<COMMENT>", "running"),
    CommandLine("scontrol update JobId=<JOB> StartTime=now+<N> [ExcNodeList=<NODES>]", "requeued"),
    CommandLine("scontrol update JobId=<JOB> ExcNodeList=<NODES> [StartTime=now+<N>]", "requeued"),
    CommandLine("scontrol update JobId=<JOB> [StartTime=now+<N>] ExcNodeList=", "requeued"),
    CommandLine("scontrol release <JOBS>", "held"),
    CommandLine(f"squeue -a -h -r -t all --name=<NAMES> -o {QUEUE}"),
    CommandLine("scancel [--user=<UID>] <JOB>...", "held"),
    CommandLine("scancel --user=<USER> --name=<NAMES>"),
    CommandLine("scancel --signal=USR2 [--user=<UID>] <JOB>", "running"),
    CommandLine("sbatch <FILE>"),
    CommandLine("sbatch --test-only", script=True),
    CommandLine(
        "sbatch --test-only [--partition=<PARTITIONS>] --nodes=<N> --ntasks=<N> --time=<N> --requeue "
        "[--gpus-per-node=<N>] --wrap=true"
    ),
    CommandLine(
        "sbatch --test-only [--partition=<PARTITIONS>] [--account=<ACCOUNT>] [--qos=<QOS>] --nodes=<N> --ntasks=<N> "
        "--time=<N> --requeue [--gpus-per-node=<N>] [--qos=<QOS>] --wrap=true",
        accounting=True,
    ),
    CommandLine(
        "sbatch --parsable --dependency=afterany:<JOB> [--array=<N>] [--begin=now+<N>] [--exclude=<NODES>] "
        "[--comment=<COMMENT>]",
        "running", script=True,
    ),
    CommandLine(
        "srun [--nodes=<N>] [--ntasks=<N>] --unbuffered --output <FILE> --error <FILE> --output=all --error=all "
        "--kill-on-bad-exit=0 --wait=<N> --export=ALL --cpus-per-task=<N> "
        "--distribution=block:block <WORDS>..."
    ),
    CommandLine(
        "srun [--nodes=<N>] [--ntasks=<N>] [--ntasks-per-node=1] --cpus-per-task=<N> [--distribution=block:block] "
        "--wait=<N> [--no-kill] --unbuffered --output <FILE> --error <FILE> "
        "--output=all --error=all --kill-on-bad-exit=0 --export=ALL <WORDS>..."
    ),
    CommandLine(
        "srun --nodes=<N> --ntasks=<N> --ntasks-per-node=1 --cpus-per-task=1 --mem=512M --time=2 --immediate=<N> "
        "--job-name=<NAMES> --chdir=/ --wait=0 --kill-on-bad-exit=0 --export=ALL [--partition=<PARTITION>] "
        "[--account=<ACCOUNT>] [--qos=<QOS>] [--constraint=<WORDS>] [--exclude=<NODES>] <WORDS>..."
    ),
    CommandLine("srun --kill-on-bad-exit=1 --export=ALL <WORDS>..."),
    CommandLine(f"sacctmgr -n -P show user name=<USER> cluster=<CLUSTER> withassoc {USER_LIMITS}", accounting=True),
    CommandLine(f"sacctmgr -n -P show qos name=<QOS> {QOS_LIMITS}", accounting=True),
]  # fmt: skip


def check(words: list[str]) -> None:
    """Raise AssertionError if a command line of Slurm is not listed: no real Slurm has accepted it."""
    listed = words[0] not in SLURM_COMMANDS or any(line.matches(words) for line in LINES)
    assert listed, f"add it to {__name__}, so that a real Slurm runs it: {words}"
