"""A program that uses the helper of sweeps/programs."""

import json
import os
import time
from pathlib import Path

from run_helper import exit_saved, log, resume_from, stop_requested

step = 0
if resume_from():
    step = json.loads(Path(resume_from()).read_text())
Path("out").mkdir(exist_ok=True)
while step < 50:
    time.sleep(0.1)
    step += 1
    log(step, loss=1 / step)
    if step % 5 == 0 or stop_requested():
        Path("out/saving").write_text(json.dumps(step))
        os.replace("out/saving", f"out/step-{step}")
    if stop_requested():
        exit_saved()
