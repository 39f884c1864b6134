"""What the ranks of test_node_agent.py execute: it records how it was started, and ends when a file says how."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from flip.common import shutdown
from flip.runs.rundir import write_json

PRELOAD = ("json", *os.environ.get("TEST_PRELOAD", "").split())


def open_files():
    """Names of the files that are open, without that of the listing itself."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(f"/proc/self/fd/{name}")


if __name__ == "__main__":
    flag = shutdown.install()
    folder = Path(sys.argv[1])
    names = ("RANK", "WORLD_SIZE", "FLIP_ATTEMPT", "EXTRA")
    main = sys.modules["__main__"]
    record = {
        "environment": {name: os.environ.get(name, "") for name in names},
        "hidden": [name for name in os.environ if name in ("FLIP_AGENT_KEY", "FLIP_NODE_AGENT")],
        "forked": "jobs.runtime.node_agent" in Path("/proc/self/cmdline").read_text(),
        "main": getattr(main, "__file__", "blank"),
        "pid": os.getpid(),
        "parent": os.getppid(),
        "session": os.getsid(0),
        "open": sorted(open_files()),
        "handlers": [signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL],
        "wakeup": signal.set_wakeup_fd(-1),
    }
    print(f"rank {record['environment']['RANK']}", flush=True)
    rank = record["environment"]["RANK"]
    write_json(folder / f"rank.{os.environ['FLIP_ATTEMPT']}.{rank}", record)
    while not flag and not (folder / f"end.{rank}").exists():
        time.sleep(0.02)
    while flag and (folder / "slow").exists():
        time.sleep(0.02)
    if flag:
        write_json(folder / f"stopped.{rank}", {"reason": flag.reason})
        sys.exit(75)
    sys.exit(json.loads((folder / f"end.{rank}").read_text()))
