"""Write the class names and prompt templates of a zero-shot data set as the JSON file that ``evaluate.sets`` takes."""

import argparse
import dataclasses
import json
from pathlib import Path

from jobs.common.cli import Parser, run_command

EXAMPLES = """examples:
  flip prompts imagenet --out imagenet7.json                 OpenAI's names, the paper's 7 templates
  flip prompts imagenet --templates 80 --out imagenet80.json
  flip prompts /data/wds_pets --out pets.json                names and templates of the data set itself
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="flip prompts", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("of", help="imagenet, or the folder of a wds_* data set")
    parser.add_argument("--templates", type=int, choices=(7, 80), default=7, help="for imagenet (default: 7)")
    parser.add_argument("--out", required=True, metavar="FILE")
    return run_command(write, parser.parse_args(arguments))


def write(options: argparse.Namespace) -> int:
    from flip.evaluation.datasets import prompts
    from flip.files.creation import output_folder, read_regular
    from flip.runs.errors import ConfigError
    from flip.runs.rundir import to_json, write_text
    from tools.shards_commands.output import writing

    classes: prompts.Prompts | None
    if options.of == "imagenet":
        classes = prompts.imagenet_prompts(options.templates)
    else:
        classes = prompts.read_folder(options.of)
    if classes is None and not Path(options.of).is_dir():
        remedy = "Give the folder of a wds_* data set, or the word imagenet."
        raise ConfigError("folder does not exist", options.of, remedy=remedy)
    if classes is None:
        raise ConfigError("has no names and templates", options.of, remedy=f"Files: {', '.join(prompts.WDS)}.")
    out = Path(options.out)
    text = to_json(dataclasses.asdict(classes))
    with writing(out):
        output_folder(out.parent)
        try:
            if read_regular(out, prompts.LIMIT) != text.encode():
                raise ConfigError("already exists, with other content", str(out), remedy="Choose another --out.")
        except FileNotFoundError:
            write_text(out, text)
        except ValueError as error:  # not a regular file, or too large
            raise ConfigError(str(error), remedy="Choose another --out.") from error
    report = {"file": options.out, "names": len(classes.names), "templates": len(classes.templates)}
    text = "{file}: {names} names, {templates} templates".format(**report)
    print(json.dumps(report, indent=1) if options.json else text)
    return 0
