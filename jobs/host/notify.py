"""Notifications: the profile's command ``notify`` gets an event as JSON on standard input.

    {"event": "run_stopped", "sweep", "run", "folder", "attempt", "cause", "reason", "time"}      for good, by itself
    {"event": "sweep_ended", "sweep", "folder", "complete", "failed", "cancelled", "time"}        each a list of names

Callers send events last, wait for the command for a limited time, and ignore what it does.
"""

import hashlib
import json
import subprocess
import time
from typing import Any, Dict, List, Optional

from flip.files.creation import run_folder
from flip.runs import attempts, lifecycle
from flip.runs.lifecycle import ABSENT, FINAL, HELD, RunState, SchedulerView
from flip.runs.rundir import RunDir, create_json, read_record

DEADLINE = 30.0  # seconds that the command gets


def send_events(run: RunDir, action: str) -> List[str]:
    """Send the events that follow from the decision ``action`` about a run. Returns problems as texts; never raises.

    There is no event for a run that a user has cancelled.
    """
    problems: List[str] = []
    try:
        command = run.read_job().get("notify") or []
        if not command or action not in ("stop", "done"):
            return problems
        row = attempts.last_end(run) or {}
        if action == "stop" and row.get("cause") != "cancelled":
            fields = {key: row.get(key) for key in ("attempt", "cause", "reason")}
            event = dict(fields, event="run_stopped", sweep=run.sweep, run=run.name, folder=str(run.path))
            problems += _send(command, event)
        sweep_event = _sweep_ended(run)
        if sweep_event is not None:
            problems += _send(command, sweep_event)
    except (OSError, ValueError, KeyError) as error:
        problems.append(str(error))
    return problems


def _final_state(run: RunDir) -> str:
    """complete, cancelled or failed; empty if the run may continue: no scheduler is asked.

    A run whose canary is lost does not start any more and counts as failed.
    """
    facts = lifecycle.read_run_facts(run)
    state = lifecycle.state_of(facts, SchedulerView(ABSENT)).state
    if state in FINAL:
        return state
    if not facts.waits_for:
        return ""
    first = _canary_state(RunDir(run.path.parent / facts.waits_for))
    if lifecycle.state_of(facts, SchedulerView(HELD), first).state == "stopped":
        return "failed"
    return ""


def _canary_state(first: RunDir) -> RunState:
    """The state of a canary as its files prove it; one that may continue is running."""
    facts = lifecycle.read_run_facts(first)
    state = lifecycle.state_of(facts, SchedulerView(ABSENT))
    if state.state in FINAL or not facts.submitted:
        return state
    return RunState("running")


def _sweep_ended(run: RunDir) -> Optional[Dict[str, Any]]:
    """The event of the sweep's end; None if one of its runs may continue, and for all callers but the first.

    There is none for jobs of evaluations, whose folder is no sweep.
    """
    sweep = run.path.parent
    names_by_state: Dict[str, List[str]] = {"complete": [], "failed": [], "cancelled": []}
    names = (read_record(sweep / "sweep.json") or {}).get("runs", [])
    states = []
    for other in [RunDir(sweep / name) for name in names if (sweep / name / "job.json").exists()]:
        state = _final_state(other)
        if not state:
            return None
        names_by_state[state].append(other.name)
        states.append([other.name, state, attempts.submitted_after(other)])
    if not states:
        return None
    name = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
    run_folder(sweep / ".notified")
    if not create_json(sweep / ".notified" / (name + ".json"), names_by_state):
        return None
    return dict(names_by_state, event="sweep_ended", sweep=sweep.name, folder=str(sweep))


def _send(command: List[str], event: Dict[str, Any]) -> List[str]:
    text = json.dumps(dict(event, time=time.time()), sort_keys=True).encode()
    null = subprocess.DEVNULL
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True)
    except (OSError, ValueError) as error:
        return ["notify: %s" % error]
    try:
        process.communicate(text, timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        return ["notify: %s took longer than %g s" % (command[0], DEADLINE)]
    except OSError as error:  # the command did not read its input
        return ["notify: %s" % error]
    if process.returncode:
        return ["notify: %s ended with %d" % (command[0], process.returncode)]
    return []
