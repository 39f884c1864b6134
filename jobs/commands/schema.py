"""JSON Schemas: of sweeps, recipes and cluster profiles for editors, and of the documents of ``--json`` for programs.

The shipped files name their schema in the first line; ``--write`` makes sweeps/schemas/ anew.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from jobs.common.cli import Parser, run_command
from jobs.common.documents import DOCUMENTS, schema_of

EXAMPLES = """examples:
  flip schema sweep
  flip schema status    of the document that `flip status --json` prints
  flip schema --write

In a YAML file: # yaml-language-server: $schema=schemas/sweep.json
"""
LINE_LENGTH = 160
KINDS = ("sweep", "recipe", "profile")


def main(arguments: Sequence[str] | None = None) -> int:
    help_text = "Print the JSON Schema of a kind of YAML file, or of a document that --json prints."
    parser = Parser(prog="flip schema", description=help_text, epilog=EXAMPLES)
    help_text = "kind of file or document; default: sweep"
    parser.add_argument("kind", nargs="?", choices=(*KINDS, *DOCUMENTS), default="sweep", help=help_text)
    parser.add_argument("--write", action="store_true", help="write those of files to sweeps/schemas")
    return run_command(schema, parser.parse_args(arguments))


def schema(args: argparse.Namespace) -> int:
    from flip.files.creation import output_folder
    from flip.runs.rundir import write_text
    from jobs.common.paths import SWEEPS
    from jobs.sweeps.json_schemas import SCHEMAS

    if not args.write:
        document = schema_of(args.kind) if args.kind in DOCUMENTS else SCHEMAS[args.kind]()
        print(schema_json(document), end="")
        return 0
    folder = SWEEPS / "schemas"
    output_folder(folder)
    for name in KINDS:
        write_text(folder / f"{name}.json", schema_json(SCHEMAS[name]()))
    written = [str(folder / f"{name}.json") for name in KINDS]
    print(json.dumps(written, indent=1) if args.json else "\n".join(written))
    return 0


def schema_json(schema: Any) -> str:
    return _lines(schema, "") + "\n"


def _lines(value: Any, start: str) -> str:
    """A value as JSON, in one line if it fits: then a new field changes a line in each place that lists it.

    ``start``: what precedes it in its line, an indent and a key.
    """
    line = json.dumps(value, ensure_ascii=False)
    if len(start) + len(line) < LINE_LENGTH or not isinstance(value, dict | list) or not value:
        return line
    indent = " " * (len(start) - len(start.lstrip()) + 1)
    if isinstance(value, dict):
        keys = [f"{indent}{json.dumps(key)}: " for key in value]
        members = [key + _lines(item, key) for key, item in zip(keys, value.values(), strict=True)]
        first, last = "{}"
    else:
        members = [indent + _lines(item, indent) for item in value]
        first, last = "[]"
    return first + "\n" + ",\n".join(members) + "\n" + indent[1:] + last
