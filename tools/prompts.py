"""Write the class names and prompt templates of a zero-shot data set as the JSON file that ``evaluate.sets`` takes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import dataclasses

from jobs.common.cli import Parser

EXAMPLES = """examples:
  python tools/prompts.py imagenet --out imagenet7.json                 OpenAI's names, the paper's 7 templates
  python tools/prompts.py imagenet --templates 80 --out imagenet80.json
  python tools/prompts.py /data/wds_pets --out pets.json                names and templates of the data set itself
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("of", help="imagenet, or the folder of a wds_* data set")
    parser.add_argument("--templates", type=int, default=7, help="number of templates for imagenet: 7 (default) or 80")
    parser.add_argument("--out", required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    from flip.evaluation import prompts
    from flip.runs.errors import ConfigError, FlipError
    from flip.runs.rundir import write_json

    try:
        found = prompts.imagenet(options.templates) if options.of == "imagenet" else prompts.of_folder(options.of)
        if found is None and not Path(options.of).is_dir():
            remedy = "Give the folder of a wds_* set, or the word imagenet."
            raise ConfigError("there is no such folder", options.of, remedy=remedy)
        if found is None:
            raise ConfigError("brings no names and templates", options.of, remedy=f"Files: {', '.join(prompts.WDS)}.")
        write_json(Path(options.out), dataclasses.asdict(found))
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"{options.out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 77 if isinstance(error, PermissionError) else 69
    print(f"{options.out}: {len(found.names)} names, {len(found.templates)} templates")
    return 0


if __name__ == "__main__":
    from jobs.common.cli import quietly

    sys.exit(quietly(main))
