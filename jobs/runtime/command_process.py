"""One rank of a run that executes a program: starts it, follows it, and finds the cause of its end (docs/command.md).

Rank 0 decides from which checkpoint all ranks continue (``resume.json``), follows checkpoints and metrics, and writes
result.json when all ranks have ended well.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flip.common.shutdown import RunWatcher, StopFlag
from flip.common.user_classes import FOLDER
from flip.files.creation import replace_link, run_folder
from flip.runs.cgroup import memory_kills
from flip.runs.checkpoint_folder import EXTERNAL
from flip.runs.command_record import DEFAULT_METRICS, STAGE, WORK, filled, read_command, text_of
from flip.runs.errors import CAUSES, PeerLost, StorageError
from flip.runs.restart_policy import PEER_GONE
from flip.runs.rundir import RunDir, create_json, read_lenient, read_record
from jobs.host.rank_entry import port
from jobs.runtime.program import Program
from jobs.runtime.program_checkpoints import CheckpointFollower
from jobs.runtime.program_evaluation import ScoreLines
from jobs.runtime.program_metrics import EventFiles, JsonLines, NumberSource, Pattern, ProgramMetrics

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
RESUME_SECONDS = 300.0
"""For rank 0 to say from which checkpoint all continue."""
USAGE = {2: "usage", 126: "not executable", 127: "no such program"}
"""Exit codes that no other start would change."""
NAMED = {code: cause for cause, code in CAUSES.items() if cause not in ("complete", "stopped", "peer_lost", "crash")}
PHASES = {"complete": "complete", "stopped": "interrupted"}
"""Cause of the end of an attempt -> its phase in status.json; others: failed."""
TRAINED = "trained.json"
"""Of a run: what it has reached when all its ranks had ended well, and its evaluation had not."""
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
"""Environment of an evaluation, which is one process."""


def execute(run: RunDir, attempt: int, flag: StopFlag) -> tuple[str, str]:
    """The work of a rank in an attempt: (cause, reason) of its end."""
    return Rank(run, attempt, flag, int(os.environ.get("RANK", "0"))).execute()


class Rank:
    """A rank of an attempt."""

    def __init__(self, run: RunDir, attempt: int, flag: StopFlag, rank: int) -> None:
        self.run = run
        self.attempt = attempt
        self.flag = flag
        self.rank = rank
        self.record = read_command(run)
        self.work = run.path / WORK
        self.code = Path(os.environ["FLIP_SNAPSHOT"]) / FOLDER / self.record["code"]
        self.error_file = run.attempt(attempt) / f"error.{rank}.json"
        self.values = {name: text_of(value) for name, value in self.record["parameters"].items()}
        self.values |= {"run": str(run.path), "attempt": str(attempt), "code": str(self.code)}

    def execute(self) -> tuple[str, str]:
        if self.rank == 0:
            return self._execute_first()
        return self._execute_other()

    # -- the parts of rank 0 -------------------------------------------------------------------------------------------

    def _execute_first(self) -> tuple[str, str]:
        self._link_code()
        RunWatcher(self.run, self.attempt, self.flag).start()
        trained = read_record(self.run.path / TRAINED)
        if trained is not None:
            source = JsonLines(self._metrics_file())
            settings = self.record.get("metrics", {})
            metrics = ProgramMetrics(self.run, self.attempt, source, settings, int(trained.get("samples") or 0))
            cause, reason = self._evaluate(trained, metrics)
            metrics.close(PHASES.get(cause, "failed"), reason)
            return cause, reason
        return self._train()

    def _train(self) -> tuple[str, str]:
        metrics: ProgramMetrics | None = None

        def position() -> int | None:
            return None if metrics is None else metrics.position

        resume = self.record.get("resume", {})
        folder = self._path(resume.get("folder", ""))
        checkpoints = CheckpointFollower(self.run, self.attempt, resume, folder, position)
        newest = checkpoints.start()
        chosen: dict[str, Any] = {}
        if newest is not None:
            chosen = {"path": newest.record["path"], "samples": newest.samples_seen}
        create_json(self.run.attempt(self.attempt) / "resume.json", chosen)
        source, on_line = self._source()
        start = int(chosen.get("samples", 0))
        metrics = ProgramMetrics(self.run, self.attempt, source, self.record.get("metrics", {}), start)
        program = self._start(chosen, on_line)
        code = self._follow(program, checkpoints, metrics)
        if code is None:
            minutes = self.record["stop"]["hang_minutes"]
            reason = f"no output, metrics or checkpoint for {minutes:g} min"
            metrics.close("failed", reason)
            return "hang", reason
        left = program.close()
        metrics.finish()
        if code in (0, CAUSES["stopped"]):
            checkpoints.look(final=True)
        cause, reason = self._cause(code, program, left, checkpoints, metrics)
        if cause == "complete":
            lost = self._wait_for_peers()
            if lost:
                cause, reason = lost
        why = [reason]
        if cause != "complete":
            why += [checkpoints.why_none(), metrics.why_none()]
        reason = "; ".join(filter(None, why))
        if cause == "complete":
            cause, reason = self._complete(checkpoints, metrics)
        metrics.close(PHASES.get(cause, "failed"), reason)
        return cause, reason

    def _follow(self, program: Program, checkpoints: CheckpointFollower, metrics: ProgramMetrics) -> int | None:
        """Follow the program until it ends. Returns its exit code; None if it hung and was killed."""
        limit = 60 * float(self.record.get("stop", {}).get("hang_minutes") or 0.0)
        asked = False
        while True:
            code = program.wait(POLL_SECONDS)
            if code is not None:
                return code
            metrics.read()
            checkpoints.look()
            if self.flag and not asked:
                asked = True
                log.info("asked to stop: %s", self.flag.reason)
                program.request_stop()
            active = max(program.active_at, checkpoints.saved_at, metrics.line_at)
            if limit and time.monotonic() - active > limit:
                program.kill()
                program.close(0.0)
                return None

    def _cause(
        self,
        code: int,
        program: Program,
        left: list[str],
        checkpoints: CheckpointFollower,
        metrics: ProgramMetrics,
    ) -> tuple[str, str]:
        newest = checkpoints.newest
        reached = max(metrics.position or 0, newest.samples_seen if newest else 0)
        is_done = bool(metrics.total) and reached >= metrics.total
        if code == 0 and (is_done or not (metrics.total or self.flag)):
            if left and not is_done:
                what = f"it ended with 0, but has left {left[0]} at work, which was killed: it must not become a daemon"
                return "crash", what
            return "complete", ""
        if code == 0 and self.flag:
            return "stopped", f"{self.flag.reason}: it saved and ended"
        if code == 0:
            return "crash", f"it ended with 0 at {reached:,} of {metrics.total:,} (metrics.total)"
        if code == CAUSES["stopped"] and not self.flag and not checkpoints.saves:
            return "crash", "it ended with 75 without a stop request and without a new checkpoint"
        return self._cause_of_code(code, program)

    def _wait_for_peers(self) -> tuple[str, str] | None:
        """Wait for the ends of all other ranks; (cause, reason) if one of them did not end well."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        while True:
            ends = [record for record in self.run.causes(self.attempt) if record["rank"] != 0]
            bad = next((record for record in ends if record["cause"] != "complete"), None)
            if bad is not None:
                if bad["cause"] == "stopped":
                    return "stopped", f"rank {bad['rank']}: {bad['reason']}"
                return "peer_lost", f"rank {bad['rank']} has ended: {bad['reason']}"
            if len(ends) >= world - 1:
                return None
            if self.flag:
                return "stopped", f"{self.flag.reason}, before all ranks had ended"
            time.sleep(POLL_SECONDS)

    def _complete(self, checkpoints: CheckpointFollower, metrics: ProgramMetrics) -> tuple[str, str]:
        """Write result.json, after the evaluation if there is one."""
        newest = checkpoints.newest
        start = read_lenient(self.run.attempt(1) / "start.json").get("time")
        seconds = metrics.seconds or (time.time() - start if start else 0.0)
        samples = max(metrics.position or 0, newest.samples_seen if newest else 0)
        speed = samples / seconds if samples and seconds and metrics.position else None
        reached: dict[str, Any] = {
            "samples": samples,
            "steps": metrics.last_step,
            "seconds": seconds,
            "samples_per_second": speed,
        }
        reached = {key: value for key, value in reached.items() if value is not None}
        if not self._scorer:
            self._write_result(reached, [])
            return "complete", ""
        checkpoint = newest.record["path"] if newest else ""
        create_json(self.run.path / TRAINED, {**reached, "checkpoint": checkpoint, "attempt": self.attempt})
        return self._evaluate({**reached, "checkpoint": checkpoint}, metrics)

    def _write_result(self, reached: Mapping[str, Any], scores: list[dict[str, Any]]) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        result = {"kind": EXTERNAL, "stage": STAGE, **reached, "world": world, "evaluations": scores}
        create_json(self.run.result, {**result, "time": time.time()})

    @property
    def _scorer(self) -> list[str]:
        """Words of the evaluation; empty: there is none."""
        return list(self.record.get("evaluate", {}).get("command", []))

    def _evaluate(self, trained: Mapping[str, Any], metrics: ProgramMetrics) -> tuple[str, str]:
        """Score what the program has reached, and write result.json."""
        metrics.status(phase="evaluating")
        lines = ScoreLines(self.record.get("evaluate", {}).get("pattern", ""))
        chosen = {"path": trained.get("checkpoint", ""), "samples": trained.get("samples", 0)}
        values = {**self.values, "checkpoint": str(chosen["path"])}
        words = [filled(word, values) for word in self._scorer]
        environ = self._environment(chosen, values) | ALONE
        program = self._launch(words, environ, lines.on_line)
        limit = 60 * float(self.record.get("stop", {}).get("hang_minutes") or 0.0)
        asked = False
        while (code := program.wait(POLL_SECONDS)) is None:
            if self.flag and not asked:
                asked = True
                program.request_stop()
            if limit and time.monotonic() - program.active_at > limit:
                program.kill()
                program.close(0.0)
                return "hang", f"evaluate: no output for {limit / 60:g} min"
        program.close()
        if self.flag:
            return "stopped", f"{self.flag.reason}: the evaluation starts again"
        if code == CAUSES["stopped"]:
            return "crash", "evaluate: it ended with 75 without a stop request"
        if code:
            cause, reason = self._cause_of_code(code, program)
            return cause, f"evaluate: {reason}"
        reached = {key: value for key, value in trained.items() if key not in ("checkpoint", "attempt")}
        self._write_result(reached, lines.scores())
        return "complete", ""

    # -- the parts of other ranks --------------------------------------------------------------------------------------

    def _execute_other(self) -> tuple[str, str]:
        if (self.run.path / TRAINED).exists():  # since an earlier attempt: rank 0 alone has work
            return "complete", ""
        program = self._start(self._chosen())
        asked = False
        while (code := program.wait(POLL_SECONDS)) is None:
            if self.flag and not asked:
                asked = True
                program.request_stop()
        program.close()
        if code == 0 and self.flag:
            return "stopped", f"{self.flag.reason}: it saved and ended"
        if code == 0:
            return "complete", ""
        return self._cause_of_code(code, program)

    def _chosen(self) -> Mapping[str, Any]:
        """What rank 0 has decided. Raises PeerLost if it has ended, StorageError if its file does not appear."""
        until = time.monotonic() + RESUME_SECONDS
        path = self.run.attempt(self.attempt) / "resume.json"
        while time.monotonic() < until:
            record = read_record(path)
            if record is not None:
                return dict(record)
            if any(each["rank"] == 0 for each in self.run.causes(self.attempt)):
                raise PeerLost("rank 0 has ended before the program started")
            time.sleep(POLL_SECONDS)
        raise StorageError("rank 0 has not written it, or this node does not see it", path)

    # -- of all ranks --------------------------------------------------------------------------------------------------

    def _cause_of_code(self, code: int, program: Program) -> tuple[str, str]:
        """(cause, reason) of a program that did not end with 0."""
        if code < 0:
            what = f"it was killed by {_signal_name(-code)}"
        else:
            what = f"it ended with {code}"
        if code == CAUSES["stopped"]:
            why = self.flag.reason or "by itself"
            return "stopped", f"{why}: it saved and ended"
        if self.flag:
            return "stopped", f"{self.flag.reason}: {what}, and did not say that it saved"
        error = program.error(self.error_file)
        reason = ": ".join(filter(None, [what, error]))
        if code in USAGE:
            return "config", f"{reason} ({USAGE[code]}: read its log)"
        if code in NAMED:
            return NAMED[code], reason
        if code == -signal.SIGKILL and memory_kills() > self._memory_kills:
            return "crash", f"{reason}: out of memory, at the memory limit of the job (--mem) or of this machine"
        if code > 0 and PEER_GONE.search(error):
            return "peer_lost", reason
        return "crash", reason

    def _start(self, chosen: Mapping[str, Any], on_line: Any = lambda line: None) -> Program:
        values = {**self.values, "checkpoint": str(chosen.get("path", ""))}
        words = list(self.record["argv"])
        if chosen:
            words += self.record.get("resume", {}).get("arguments", [])
        words = [filled(word, values) for word in words]
        return self._launch(words, self._environment(chosen, values), on_line)

    def _launch(self, words: list[str], environ: Mapping[str, str], on_line: Any) -> Program:
        self._memory_kills = memory_kills()
        log.info("starts %s", words)
        signal_name = self.record.get("stop", {}).get("signal", "TERM")
        return Program(words, environ, self.work, signal_name, on_line)

    def _environment(self, chosen: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, str]:
        """The environment of the program: that of this rank without the modules of the toolkit, and its own."""
        environ = dict(os.environ)
        for name in ("PYTHONPATH", "PYTHONSAFEPATH", "FLIP_STORE", "FLIP_LIFELINE_FD"):
            environ.pop(name, None)
        cpus = self.record.get("resources", {}).get("cpus") or 1
        environ.setdefault("OMP_NUM_THREADS", str(cpus))
        environ.setdefault("PYTHONUNBUFFERED", "1")
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(port(str(self.run.path), str(self.attempt))))
        environ |= {
            "TORCHELASTIC_ERROR_FILE": str(self.error_file),
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt - 1),
            "RUN_DIR": str(self.run.path),
            "RUN_ATTEMPT": str(self.attempt),
            "RUN_RESUMES": str(int(bool(chosen))),
            "RUN_CHECKPOINT": values["checkpoint"],
            "RUN_METRICS": str(self._metrics_file()),
        }
        environ |= {name: filled(value, values) for name, value in self.record.get("env", {}).items()}
        return environ

    def _source(self) -> tuple[NumberSource, Any]:
        """(where its numbers are, what gets its lines of output)."""
        metrics = self.record.get("metrics", {})
        if metrics.get("pattern"):
            pattern = Pattern(metrics["pattern"])
            return pattern, pattern.on_line
        if metrics.get("tensorboard"):
            folder = self._path(metrics["tensorboard"])
            assert folder is not None
            return EventFiles(folder), lambda line: None
        return JsonLines(self._metrics_file()), lambda line: None

    def _metrics_file(self) -> Path:
        return self._path(self.record.get("metrics", {}).get("file", "")) or self.work / DEFAULT_METRICS

    def _path(self, template: str) -> Path | None:
        """A path of command.json, in the working directory of the program; None if it is empty."""
        if not template:
            return None
        return self.work / Path(filled(template, self.values)).expanduser()

    def _link_code(self) -> None:
        """Make the working directory: links to the copied code, next to what the program has written."""
        run_folder(self.work)
        if not self.code.is_dir():
            raise StorageError("the copied code of the program is missing", self.code)
        for entry in sorted(self.code.iterdir()):
            place = self.work / entry.name
            is_link = place.is_symlink()
            if entry.name == "__pycache__" or (place.is_dir() and not is_link):
                continue  # the program has a folder of its own there
            if place.exists() and not is_link:
                aside = self.work / f"{entry.name}.changed-{self.attempt - 1}"
                log.warning("the program has replaced its copied file %s: moved to %s", entry.name, aside.name)
                os.replace(place, aside)
            replace_link(place, str(entry))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
