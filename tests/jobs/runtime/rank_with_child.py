"""A rank with a child process outside of its process group, as a loader process may be."""

import os
import subprocess
import sys
import time
from pathlib import Path

from flip.runs.rundir import write_json

if __name__ == "__main__":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
    record = {"pid": os.getpid(), "child": child.pid}
    write_json(Path(sys.argv[1]) / f"rank.{os.environ['FLIP_ATTEMPT']}.{os.environ['RANK']}", record)
    time.sleep(600)
