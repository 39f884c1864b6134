"""``python jobs/submit.py SWEEP`` is ``flip submit SWEEP``, from any folder and without an installation."""

import os
import sys

if not __package__:  # run as a script: the repository takes the place of jobs/ on the path
    replaced = 0 if getattr(sys.flags, "safe_path", False) else 1  # jobs.__main__ refuses a Python without safe_path
    sys.path[:replaced] = [os.path.dirname(os.path.dirname(os.path.realpath(__file__)))]

from jobs.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
