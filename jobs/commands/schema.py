"""JSON Schemas of sweeps, recipes and cluster profiles, for completion and checks in editors.

The shipped files name their schema in the first line; ``--write`` makes sweeps/schemas/ and docs/choices.md anew.
"""

import argparse
import json
from collections.abc import Sequence

from jobs.common.cli import Parser, run_command

EXAMPLES = """examples:
  flip schema sweep
  flip schema --write

In a YAML file: # yaml-language-server: $schema=schemas/sweep.json
"""
KINDS = ("sweep", "recipe", "profile")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="flip schema", description="Print the JSON Schema of a kind of YAML file.", epilog=EXAMPLES)
    parser.add_argument("kind", nargs="?", choices=KINDS, default="sweep", help="kind of file; default: sweep")
    parser.add_argument("--write", action="store_true", help="write all to sweeps/schemas, and docs/choices.md")
    return run_command(schema, parser.parse_args(arguments))


def schema(args: argparse.Namespace) -> int:
    from flip.runs.files import output_folder
    from flip.runs.rundir import write_text
    from jobs.common.paths import REPOSITORY, SWEEPS
    from jobs.sweeps import choices_page
    from jobs.sweeps.json_schemas import SCHEMAS

    if not args.write:
        print(text(SCHEMAS[args.kind]()), end="")
        return 0
    folder = SWEEPS / "schemas"
    output_folder(folder)
    for name in KINDS:
        write_text(folder / f"{name}.json", text(SCHEMAS[name]()))
    written = [str(folder / f"{name}.json") for name in KINDS]
    page = REPOSITORY / "docs" / "choices.md"
    if page.parent.is_dir():  # not in a copy without documentation
        write_text(page, choices_page.text())
        written.append(str(page))
    print(json.dumps(written, indent=1) if args.json else "\n".join(written))
    return 0


def text(schema: dict) -> str:
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
