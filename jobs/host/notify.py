"""Somebody is told: a command of the profile (``notify``) gets an event as JSON on standard input.

    {"event": "run_stopped", "sweep", "run", "folder", "attempt", "cause", "reason", "time"}      for good, by itself
    {"event": "sweep_ended", "sweep", "folder", "complete", "failed", "cancelled", "time"}        each a list of names

Whoever decides calls it last: it waits for the command for a while, and what the command does changes nothing.
Standard library, Python >= 3.6.
"""

import hashlib
import json
import subprocess
import time
from typing import Any, Dict, List, Optional

from flip.runs.rundir import RunDir, create_json, read_record
from jobs.host import attempts

#: Seconds that the command gets.
DEADLINE = 30.0


def send_events(run: RunDir, action: str) -> List[str]:
    """Tell what follows from the decision ``action`` about a run. What went wrong with it, in words; raises nothing.

    A person who cancels a run is not told of it.
    """
    troubles: List[str] = []
    try:
        words = (read_record(run.path / "job.json") or {}).get("notify") or []
        if not words or action not in ("stop", "done"):
            return troubles
        row = attempts.last_end(run) or {}
        if action == "stop" and row.get("cause") != "cancelled":
            facts = {key: row.get(key) for key in ("attempt", "cause", "reason")}
            event = dict(facts, event="run_stopped", sweep=run.sweep, run=run.name, folder=str(run.path))
            troubles += _call(words, event)
        whole = _whole(run)
        if whole is not None:
            troubles += _call(words, whole)
    except (OSError, ValueError, KeyError) as error:
        troubles.append(str(error))
    return troubles


def _whole(run: RunDir) -> Optional[Dict[str, Any]]:
    """The event of the sweep's end; None where a run of it may go on, and for all but the first who sees this end.

    Jobs of evaluations, whose folder is no sweep, have none.
    """
    sweep = run.path.parent
    found: Dict[str, List[str]] = {"complete": [], "failed": [], "cancelled": []}
    names = (read_record(sweep / "sweep.json") or {}).get("runs", [])
    ends = []
    for other in [RunDir(sweep / name) for name in names if (sweep / name / "job.json").exists()]:
        verdict = attempts.current_end(other)
        if other.result.exists():
            how = "complete"
        elif other.cancel.exists() or (verdict is not None and verdict["cause"] == "cancelled"):
            how = "cancelled"
        elif verdict is not None and verdict["action"] == "stop":
            how = "failed"
        else:
            return None
        found[how].append(other.name)
        ends.append([other.name, how, attempts.submitted_after(other)])
    if not ends:
        return None
    name = hashlib.sha256(json.dumps(ends).encode()).hexdigest()[:16]
    (sweep / ".notified").mkdir(exist_ok=True)
    if not create_json(sweep / ".notified" / (name + ".json"), found):
        return None
    return dict(found, event="sweep_ended", sweep=sweep.name, folder=str(sweep))


def _call(words: List[str], event: Dict[str, Any]) -> List[str]:
    text = json.dumps(dict(event, time=time.time()), sort_keys=True).encode()
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return ["notify: %s" % error]
    try:
        process.communicate(text, timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        return ["notify: %s took longer than %g s" % (words[0], DEADLINE)]
    except OSError as error:  # it did not read
        return ["notify: %s" % error]
    return ["notify: %s ended with %d" % (words[0], process.returncode)] if process.returncode else []
