"""Slurm's commands for the simulated controller: their output and their errors.

``call`` replaces ``jobs.host.slurm_cli.call``; all code above it is the product's.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from jobs.host.slurm_cli import DEADLINE, SlurmUnavailable, command_error
from tests.fakeslurm.clock import EPOCH
from tests.fakeslurm.controller import Refused
from tests.fakeslurm.host import Script
from tests.harness import slurm_command_lines

AWAY = "Unable to contact slurm controller (connect failure)"


class Commands:
    """``trouble(args)`` returns the fault of a call: "" (none), silent, refused, empty, or dropped (executed, but the
    reply is lost). ``latency``: seconds before and after the execution."""

    def __init__(self, clock, controller, trouble=lambda args: "", latency=0.0):
        self.clock = clock
        self.controller = controller
        self.trouble = trouble
        self.latency = latency
        self.noted = []
        """Of every call: who (Process.about), words, code, standard output, what stood on standard error."""

    def call(self, *args, **options):
        """Execute a command line of the product, which must be one that a real Slurm has accepted."""
        slurm_command_lines.check(list(args))
        return self.perform(*args, **options)

    def perform(self, *args, **options):
        """Execute a command line, also one of the tests alone."""
        process = self.clock.current
        record = {"by": process and process.about, "words": list(args), "code": None, "out": "", "said": ""}
        if process is not None:
            record["attempt"] = process.environ.get("FLIP_ATTEMPT")
        self.noted.append(record)
        self._wait(self.latency)
        trouble = self.trouble(args)
        if process is not None and process.about is not None and not process.about.reachable:
            trouble = "silent"
        if trouble == "silent":
            self._wait(options.get("deadline", DEADLINE))
            raise SlurmUnavailable(f"{args[0]} did not answer for {options.get('deadline', DEADLINE):g} s")
        if trouble == "refused":
            raise self._unanswered(record, AWAY)
        try:
            if trouble != "empty":
                record["out"] = self._do(*args, **options)
            else:
                record["out"] = ""
            record["code"] = 0
        except Refused as error:
            raise self._unanswered(record, str(error)) from None
        self._wait(self.latency)
        if trouble == "dropped":
            raise self._unanswered(record, "Socket timed out on send/recv operation")
        return record["out"]

    def _wait(self, seconds):
        if seconds and self.clock.current is not None:
            self.clock.current.wait(seconds)

    @staticmethod
    def _unanswered(record, stderr):
        record["code"] = 1
        record["said"] = stderr
        return command_error(record["words"][0], stderr)

    def _do(self, name, *args, text="", env=None, **options):
        if name == "sbatch" and text:
            return self._follower(args, text, env)
        return getattr(self, f"_{name}")(*args)

    # -- one per command ---------------------------------------------------------------------------------------------

    def _sbatch(self, path):
        fields = Script.read(Path(path).read_text())
        if (fields["least_nodes"] or fields["nodes_wanted"]) > len(self.controller.nodes):
            raise Refused("Batch job submission failed: Requested node configuration is not available")
        return f"Submitted batch job {self.controller.submit(**fields)}"

    def _follower(self, args, text, env):
        """sbatch of a script on standard input: a successor job of one element, which starts after its predecessor."""
        options = dict(arg.removeprefix("--").split("=", 1) for arg in args if "=" in arg)
        if self.controller.site.refuses_followers:
            raise Refused("Batch job submission failed: Access/permission denied")
        fields = Script.read(text) | {"elements": None}
        later = float(options.get("begin", "now+0").partition("+")[2])
        after = self.controller.find(options["dependency"].partition(":")[2]).id
        index = options.get("array")
        extra = {"after": after, "comment": options.get("comment", ""), "excluded": options.get("exclude", "")}
        extra["follows"] = env.get("FLIP_FOLLOWS", "")
        return f"{self.controller.submit(**fields | extra | {'later': later}, only=index and int(index))}\n"

    def _scontrol(self, *args):
        if args[:2] == ("write", "batch_script"):
            return self.controller.find(args[2]).script.text
        if args[:2] == ("show", "config"):
            return f"Configuration data as of now\nClusterName             = {self.controller.site.name}\n"
        if args[:2] == ("show", "hostnames"):
            return "".join(f"{name}\n" for name in args[2].split(","))
        if args[:2] == ("show", "job"):
            return self._shown(self.controller.find(args[2]))
        if args[0] == "requeue":
            self.controller.requeue(self.controller.find(args[1]))
            return ""
        if args[0] == "release":
            for job in [job for text in args[1].split(",") for job in self.controller.all_of(text)]:
                self.controller.release(job)
            return ""
        assert args[0] == "update", args
        return self._updated(dict(arg.split("=", 1) for arg in args[1:]))

    def _updated(self, changes):
        job = self.controller.find(changes.pop("JobId"))
        job.comment = changes.pop("Comment", job.comment)
        if "TimeLimit" in changes:
            self.controller.set_limit(job, 60.0 * int(changes.pop("TimeLimit")))
        if changes and job.state != "PENDING":
            raise Refused("Job is no longer pending execution")
        if "StartTime" in changes:
            wait = float(re.fullmatch(r"now\+(\d+)", changes.pop("StartTime"))[1])
            job.eligible = max(job.eligible, self.clock.now + wait)
        job.excluded = changes.pop("ExcNodeList", job.excluded)
        assert not changes, changes
        return ""

    def _shown(self, job):
        now = self.clock.now
        ran = 0
        if job.start is not None:
            ran = (now if job.state == "RUNNING" else job.end) - job.start
        array = ""
        if job.index is not None:
            array = f" ArrayJobId={job.array} ArrayTaskId={job.index}"
        requeue = int(self.controller.site.requeue)
        preempted = ""
        host = ""
        if job.state != "PENDING":
            preempted = f" PreemptTime={_moment(job.preempt_time)}"
        if job.life is not None:
            host = f" BatchHost={job.life.host.name}"
        return (
            f"JobId={job.id}{array} JobName={job.name}\n"
            f"   JobState={_state(job)} Reason={job.reason} Dependency=(null)\n"
            f"   Requeue={requeue} Restarts={job.restarts} BatchFlag=1 Reboot=0 ExitCode={job.exit_code}\n"
            f"   RunTime={_span(ran)} TimeLimit={_span(job.limit)} TimeMin=N/A\n"
            f"   EligibleTime={_moment(job.eligible)} StartTime={_moment(job.start)}\n"
            f"   EndTime={_moment(job.end)}{preempted}\n"
            f"   Partition=low NumNodes={len(job.nodes) or job.nodes_wanted}\n"
            f"   Comment={job.comment} \n"
            f"   ExcNodeList={job.excluded or '(null)'} NodeList={','.join(node.name for node in job.nodes)}{host}\n"
        )

    def _sinfo(self, *args):
        """The nodes, all of one partition."""
        return "".join(f"{node.name}|{'idle' if node.up else 'down*'}\n" for node in self.controller.nodes.values())

    def _squeue(self, *args):
        names = next(arg for arg in args if arg.startswith("--name=")).removeprefix("--name=").split(",")
        lines = []
        for job in self.controller.jobs.values():
            if job.name in names:
                index = "N/A" if job.index is None else job.index
                nodes = ",".join(node.name for node in job.nodes)
                lines.append(f"{job.name}|{index}|{job.key}|{_state(job)}|{nodes}|{job.reason}|N/A|{job.comment}\n")
        return "".join(lines)

    def _scancel(self, *args):
        if args[0] in ("--batch", "--full"):
            job = self.controller.find(args[-1])
            job.life.signal_shell(args[1].partition("=")[2], full=args[0] == "--full")
            return ""
        if not args[0].startswith("--"):
            for job in [job for text in args for job in self.controller.all_of(text)]:
                self.controller.cancel(job)
            return ""
        job = self.controller.find(args[-1])
        if args[0] == "--signal=USR2":
            if job.state != "RUNNING" or job.completing:
                raise Refused("Job/step already completing or completed")
            job.life.happened("warned")
            job.life.signal_steps("USR2")
            return ""
        raise AssertionError(args)


def _state(job):
    if job.completing:
        return "COMPLETING"
    return job.state


def _span(seconds):
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def _moment(now):
    if now is None:
        return "None"
    return datetime.fromtimestamp(EPOCH + now, UTC).strftime("%Y-%m-%dT%H:%M:%S")
