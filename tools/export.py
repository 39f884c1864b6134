"""Export a trained model to a self-contained folder that open_clip, timm and flip.load read without a network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
from typing import Any

from jobs.common.cli import Parser, quietly, run_command

EXAMPLES = """examples:
  python tools/export.py runs/quickstart/mask50                 the newest checkpoint -> its folder export/<stage>-<S>
  python tools/export.py my/run --commit pretrain/12800000000   another checkpoint
  python tools/export.py my/run --out ~/models/mine --replace
  python tools/export.py my/run --variant native                refuse unless open_clip's own encoder holds it exactly

variants (default: native or extra-block, as the model needs; docs/export.md):
  native        open_clip's own image encoder; models pooled over patches (recipe portable)
  extra-block   the same with one computed block; models pooled over all tokens (recipe paper). Not for fine-tuning in
                open_clip, nor float16
  timm-tower    open_clip builds the encoder by timm; any model, but the folder may not be moved
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", help="a run with a checkpoint: its folder, or sweep/run below FLIP_RUNS")
    parser.add_argument("--commit", default="", metavar="STAGE/S", help="checkpoint to export (default: the newest)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to create (default: RUN/export/<stage>-<S>)")
    parser.add_argument("--variant", choices=("native", "extra-block", "timm-tower"), default="", help="see below")
    parser.add_argument("--replace", action="store_true", help="replace an existing export")
    options = parser.parse_args(arguments)
    return run_command(export, options)


def export(options: argparse.Namespace) -> int:
    from flip.runs.errors import ConfigError
    from flip.runs.rundir import RunDir
    from jobs.common.cluster_profile import roots
    from jobs.runs import select
    from tools.shards_commands.output import writing

    source = options.run if Path(options.run).is_dir() else select.select_one(options.run, roots()).path
    from flip.checkpoint.export_record import is_export
    from flip.export import exporter  # imports torch: after the run's name was checked
    from flip.export.load import load

    if is_export(Path(source)) and not options.out:
        raise ConfigError("required to export an exported folder again", "--out")
    loaded = load(source, at=options.commit)
    name = f"{loaded.source.stage}-{loaded.source.samples}"
    out = options.out.expanduser() if options.out else RunDir(source).export / name
    with writing(out):
        record = exporter.export(loaded, out, options.variant, options.replace)
    report = {"folder": str(out.absolute()), **record}
    print(json.dumps(report, indent=1) if options.json else _text(report))
    return 0


def _text(report: dict[str, Any]) -> str:
    size = sum(file["bytes"] for file in report["files"].values()) / 1e6
    what = f"{report['run']} at {report['stage']}/{report['samples']}, variant {report['variant']}, {size:,.0f} MB"
    return "\n".join((
        f"{report['folder']}",
        f"  {what}",
        f"  open_clip.create_model_from_pretrained('local-dir:{report['folder']}')",
        f"  timm.create_model('local-dir:{report['folder']}/timm', pretrained=True)",
        *(f"  {sentence}" for sentence in report["differences"]),
        "  its README.md describes the model and the limits of the export",
    ))  # fmt: skip


if __name__ == "__main__":
    sys.exit(quietly(main))
