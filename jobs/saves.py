"""Of checkpoints, what can be known before a job is queued: whether their place can be written, how long one takes."""

from __future__ import annotations

import os
from functools import lru_cache

from flip.commit import commits
from flip.data.retry import Patience
from flip.remote import Remote
from flip.rundir import RunDir


@lru_cache(maxsize=16)
def written(url: str, deadline: float = 10.0) -> str:
    """Write an object where checkpoints will lie, and delete it. Raises what a save would, after the deadline."""
    place = url if "://" in url else f"file://{url}"
    probe = Remote(f"{place.rstrip('/')}/.probe-{os.getpid()}", Patience(deadline=deadline))
    probe.put("probe", b"probe")
    probe.remove()
    return f"{url}: objects can be written and deleted"


def time_to_save(run: RunDir, seconds: float) -> str:
    """What the commits of a run took, beside the ``seconds`` that a stop leaves for one under way and one more."""
    took = max((float(one.record.get("saving", 0.0)) for one in commits(run)), default=0.0)
    if not took:
        return ""
    verdict = "" if 2 * took <= seconds else ": too late for a save under way and one more; raise signal_seconds"
    return f"{took:.1f} s at most until now, the warning comes {seconds:g} s before the end{verdict}"
