"""Becomes a program of the user: ``python -I program_start.py SIGNAL PARENT WORD...``.

Of TERM, USR1 and USR2 it keeps the default action of SIGNAL and ignores the others: Slurm signals every process of a
step, and a program that handles one of them must not be killed by another. The program dies with its parent, the
process PARENT. It starts in a process of its own because no Python code may run between fork and exec of a process
with threads. Standard library.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
NO_PROGRAM = 127
NOT_EXECUTABLE = 126


def main(name: str, parent: int, words: list[str]) -> int:
    for each in ("TERM", "USR1", "USR2"):
        action = signal.SIG_DFL if each == name else signal.SIG_IGN
        signal.signal(signal.Signals[f"SIG{each}"], action)
    for each in ("SIGPIPE", "SIGXFSZ", "SIGINT"):  # Python has changed them
        signal.signal(signal.Signals[each], signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(0o022)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before the line above
        return 1
    try:
        os.execvp(words[0], words)  # noqa: S606
    except PermissionError as error:
        problem = f"error: {words[0]} is not executable: {error.strerror}"
        code = NOT_EXECUTABLE
    except OSError as error:
        problem = f"error: {words[0]} cannot be started: {error.strerror}"
        code = NO_PROGRAM
    os.write(2, f"{problem}\n".encode("utf-8", "replace"))
    return code


if __name__ == "__main__":
    os._exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
