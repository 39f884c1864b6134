"""The former name of tools/slurm_sandbox.py, kept for one release."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common.cli import quietly
from tools.slurm_sandbox import main

if __name__ == "__main__":
    sys.exit(quietly(main))
