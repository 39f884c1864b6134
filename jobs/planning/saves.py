"""Of checkpoints, what can be known before a job is queued: whether their place can be written, how long one takes."""

from __future__ import annotations

import os
from functools import lru_cache

from flip.checkpoint.remote import Remote
from flip.data.storage.retry import Patience
from flip.runs.commit import commits
from flip.runs.rundir import RunDir


@lru_cache(maxsize=16)
def written(url: str, deadline: float = 10.0) -> str:
    """Write an object where checkpoints will lie, and delete it. Raises what a save would, after the deadline."""
    place = url if "://" in url else f"file://{url}"
    probe = Remote(f"{place.rstrip('/')}/.probe-{os.getpid()}", Patience(deadline=deadline))
    probe.put("probe", b"probe")
    probe.remove()
    return f"{url}: objects can be written and deleted"


def time_to_save(run: RunDir, seconds: float) -> str:
    """What the commits of a run took, beside the ``seconds`` before its end at which it is told to stop.

    A stop waits for the save under way, trains to the end of two steps (ranks agree a step late), and saves once more;
    no second time where S is the one that is being saved.
    """
    known = [one.record for one in commits(run)]
    took = max((float(one.get("saving", 0.0)) for one in known), default=0.0)
    step = max((one["seconds"] / one["step"] for one in known if one.get("step")), default=0.0)
    if not took:
        return ""
    enough = 2 * took + 2 * step <= seconds
    verdict = "" if enough else ": too late for a save under way, two steps and one more save; raise signal_seconds"
    steps = f", a step {step:.1f} s" if step else ""
    return f"{took:.1f} s at most until now{steps}, the warning comes {seconds:g} s before the end{verdict}"
