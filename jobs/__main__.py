"""Runs one command: ``python -m jobs submit ...``, or ``flip submit ...`` after ``pip install --no-deps -e .``.

Each command is a file of jobs/ or tools/ and runs exactly as ``python jobs/submit.py ...`` does.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "jobs": {
        "submit": "check a sweep, show its cost, start the runs that are missing",
        "status": "state and progress of runs",
        "logs": "output of the ranks of a run",
        "cancel": "save, end and stop runs",
        "explain": "one page about one run: state, cause, next step",
        "report": "results as table, page, Markdown, CSV and figures",
        "tensorboard": "TensorBoard over runs",
        "evaluate": "score checkpoints on data sets",
        "debug": "one run of a sweep in this process, under a debugger",
        "doctor": "check a Slurm cluster and write a profile for it",
        "schema": "JSON Schemas of sweeps and profiles, for editors",
    },
    "tools": {
        "shards": "index, filter, verify, inspect and benchmark tar shards",
        "export": "export a checkpoint to open_clip or timm",
        "predict": "zero-shot prediction for image files",
        "tokenizer": "train or test a tokenizer",
        "prompts": "class names and templates of zero-shot data sets",
    },
}
EXAMPLES = """examples:
  flip submit --sweep quickstart --dry-run
  flip status quickstart --watch
  flip report quickstart
  flip shards index --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else ""
    known = [command for commands in COMMANDS.values() for command in commands]
    if "_ARGCOMPLETE" in os.environ or name == "completion":
        from jobs.common import completion
        from jobs.common.cli import run_command

        if name == "completion" and "_ARGCOMPLETE" not in os.environ:
            return run_command(lambda: completion.script(words[1:]))
        name = completion.command([*known, "completion"])
    folder = next((folder for folder, commands in COMMANDS.items() if name in commands), None)
    if folder is None:
        rows = [f"  {command:12} {text}" for commands in COMMANDS.values() for command, text in commands.items()]
        usage = "\n".join(["usage: flip COMMAND ... (flip COMMAND --help)", "", *rows, "", EXAMPLES])
        if name in ("-h", "--help"):
            print(usage, end="")
            return 0
        if name:
            from jobs.common.text import suggestion

            usage = f"{usage}\nunknown command: {name}. {suggestion(name, known)}"
        print(usage.rstrip(), file=sys.stderr)
        return 2
    script = ROOT / folder / f"{name}.py"
    if not script.exists():
        print(f"flip {name} needs a checkout of the repository: pip install --no-deps -e .", file=sys.stderr)
        return 78
    sys.argv = [str(script), *words[1:]]
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
