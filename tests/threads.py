"""A process of several threads, as ranks and Slurm's daemons are."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

TWO = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start()"
TWO += "; ctypes.CDLL(None).pthread_exit(None)"


@contextlib.contextmanager
def only_first_thread_ended():
    """Yield the pid of a process whose first thread has ended: a zombie for the kernel while another thread runs."""
    child = subprocess.Popen([sys.executable, "-c", TWO], start_new_session=True)
    try:
        limit = time.monotonic() + 30
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < limit and child.poll() is None
            time.sleep(0.02)
        yield child.pid
    finally:
        child.kill()
        child.wait(30)
