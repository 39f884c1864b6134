"""The former name of tools/slurm_sandbox.py, kept for one release."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the repository takes the place of tools/ on the path
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[1])]

from jobs.common.cli import quietly
from tools.slurm_sandbox import main

if __name__ == "__main__":
    sys.exit(quietly(main))
