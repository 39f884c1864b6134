"""What a training script may ask its launcher. Copy this file next to the script; it needs the standard library alone.

    from run_helper import exit_saved, log, resume_from, stop_requested

Without a launcher nothing changes: there is no checkpoint to continue from, and ``log`` writes nothing.
"""

import json
import os
import signal
import sys

SAVED = 75
"""Exit code: saved after a stop request. The launcher starts the script again."""

_stop = []


def stop_requested():
    """Whether the launcher has asked to save and end. With several ranks: agree by an all-reduce, as they get the
    signal at different steps."""
    return bool(_stop)


def resume_from():
    """The path of the newest complete checkpoint, or None if there is none yet."""
    return os.environ.get("RUN_CHECKPOINT") or None


def log(step, **numbers):
    """Report progress: ``log(step, loss=loss.item())``. Only rank 0 writes."""
    path = os.environ.get("RUN_METRICS")
    if path and os.environ.get("RANK", "0") == "0":
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")


def exit_saved():
    """End the script after a save."""
    sys.exit(SAVED)


for _name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is not signal.SIG_IGN:
        signal.signal(getattr(signal, _name), lambda *_: _stop.append(True))
