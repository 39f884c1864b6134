"""``python -m jobs.measuring.functions ROW [JSON]``: runs one row and prints its numbers as one JSON document."""

from __future__ import annotations

import importlib
import json
import sys

ROWS = {
    "matmul": "arithmetic:matmul",
    "copies": "arithmetic:copies",
    "collectives": "collectives:in_node",
    "collective_rank": "collectives:rank",
    "step": "steps:step",
    "losses": "steps:losses",
    "losses_rank": "steps:losses_rank",
    "trace": "trace:trace",
    "input": "inputs:cost",
    "reads": "inputs:reads",
    "disk": "disk:files",
    "saves": "disk:saves",
    "fault": "faults:fault",
}
"""Name of a row -> module of this package and function."""


def main(arguments: list[str]) -> int:
    name, *words = arguments
    module, _, function = ROWS[name].partition(":")
    options = json.loads(words[0]) if words else {}
    work = vars(importlib.import_module(f"jobs.measuring.functions.{module}"))[function]
    print(json.dumps(work(**options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
