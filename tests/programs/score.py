"""An evaluation of count.py: its score is the share of steps that the checkpoint has; the first start fails."""

import json
import os
import sys
from pathlib import Path

assert os.environ["WORLD_SIZE"] == "1" and os.environ["RANK"] == "0"
marker = Path("scored-before")
if not marker.exists():
    marker.touch()
    raise SystemExit("RuntimeError: no luck at first")
step, _ = json.loads(Path(sys.argv[1]).read_text())
print("not a score")
print(json.dumps({"name": "steps", "score": step / 40, "metric": "accuracy", "n": 40}))
