"""``python jobs/submit.py SWEEP`` is ``flip submit SWEEP``, from any folder and without an installation."""

import os
import sys

if not __package__:  # run as a script: the repository takes the place of jobs/ on the path
    sys.path[: 0 if sys.flags.safe_path else 1] = [os.path.dirname(os.path.dirname(os.path.realpath(__file__)))]

from jobs.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
