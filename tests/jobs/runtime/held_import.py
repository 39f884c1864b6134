"""A module whose import takes as long as a test wants: until the run has a file ``imported``."""

import os
import time
from pathlib import Path

while not (Path(os.environ["FLIP_RUN"]) / "imported").exists():
    time.sleep(0.02)
