"""Export a trained model to a self-contained folder for open_clip, timm and flip.load, for transformers, or as ONNX
models."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.common.cli import Parser, add_root_option, note, run_command

EXAMPLES = """examples:
  flip export runs/quickstart/masked                     the newest checkpoint -> its folder export/<stage>-<S>
  flip export my/run --checkpoint pretrain/12800000000   another checkpoint
  flip export 'my/mask*'                                 several runs
  flip export my/run --out ~/models/mine --replace
  flip export my/run --variant native                    refuse unless open_clip's own encoder holds it exactly
  flip export my/run --to transformers                   for AutoModel and pipelines; models of recipe clip
  flip export my/run --to onnx                           both encoders as ONNX models, for batches of any size

variants of --to open_clip (default: native or extra-block, as the model needs; docs/export.md):
  native        open_clip's own image encoder; models pooled over patches (recipe portable)
  extra-block   the same with one computed block; models pooled over all tokens (recipe paper). Not for fine-tuning in
                open_clip, nor float16
  timm-tower    open_clip builds the encoder by timm; any model, but the folder may not be moved
"""
_USAGE = {
    "open_clip": (
        "open_clip.create_model_from_pretrained('local-dir:{folder}')",
        "timm.create_model('local-dir:{folder}/timm', pretrained=True)",
    ),
    "transformers": (
        "transformers.AutoModel.from_pretrained('{folder}')",
        "transformers.AutoProcessor.from_pretrained('{folder}', backend='pil')",
    ),
    "onnx": (
        "onnxruntime.InferenceSession('{folder}/image_encoder.onnx')",
        "onnxruntime.InferenceSession('{folder}/text_encoder.onnx')",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="flip export", description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "runs", nargs="+", metavar="run", help="runs with a checkpoint: SWEEP/RUN, patterns, or folders"
    )
    add_root_option(parser)
    parser.add_argument(
        "--checkpoint", default="", metavar="STAGE/S", help="checkpoint to export (default: the newest)"
    )
    choices = ("open_clip", "transformers", "onnx")
    parser.add_argument("--to", choices=choices, default="open_clip", help="library to export to (default: open_clip)")
    where = "folder to create (default: RUN/export/<stage>-<S>; for others than open_clip, with -<library> at its end)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=where)
    parser.add_argument("--variant", choices=("native", "extra-block", "timm-tower"), default="", help="see below")
    parser.add_argument("--replace", action="store_true", help="replace an existing export")
    return run_command(export, parser.parse_args(arguments))


def export(options: argparse.Namespace) -> int:
    from flip.runs.errors import ConfigError
    from jobs.common.terminal import ProgressBar
    from jobs.submitted_runs import select

    sources = select.models(options.runs, options.root)
    if options.out and len(sources) > 1:
        raise ConfigError(f"one folder for {len(sources)} models", "--out", str(options.out), "Export them one by one.")
    if len(sources) > 1:
        sources = _without_exports(sources, options)
    reports = []
    for source in sources:
        with ProgressBar(f"exporting {source.name}"):
            reports.append(_export(source, options))
    payload = reports[0] if len(reports) == 1 else reports
    print(json.dumps(payload, indent=1) if options.json else "\n".join(map(_text, reports)))
    return 0


def _without_exports(sources: Sequence[Path], options: argparse.Namespace) -> list[Path]:
    """The runs whose chosen checkpoint has no export yet; all with --replace. Raises before anything is written."""
    from flip.checkpoint.export_record import is_export
    from flip.export.load import select_checkpoint
    from flip.runs.errors import ConfigError
    from flip.runs.rundir import RunDir

    left = []
    for source in sources:
        if is_export(source):
            raise ConfigError("required to export an exported folder again", "--out", remedy="Export it alone.")
        chosen = select_checkpoint(RunDir(source), options.checkpoint)
        out = RunDir(source).export / _folder_name(chosen.stage, chosen.samples_seen, options.to)
        if is_export(out) and not options.replace:
            note(f"{out}: exists already, not replaced")
        else:
            left.append(source)
    return left


def _folder_name(stage: str, samples_seen: int, library: str) -> str:
    return f"{stage}-{samples_seen}" + ("" if library == "open_clip" else f"-{library}")


def _export(source: Path, options: argparse.Namespace) -> dict[str, Any]:
    from flip.checkpoint.export_record import is_export
    from flip.export import exporter  # imports torch: after the run's name was checked
    from flip.export.load import load
    from flip.files.creation import run_folder
    from flip.runs.errors import ConfigError
    from flip.runs.rundir import RunDir
    from tools.shards_commands.output import writing

    if is_export(source) and not options.out:
        raise ConfigError("required to export an exported folder again", "--out")
    loaded = load(source, at=options.checkpoint)
    name = _folder_name(loaded.source.stage, loaded.source.samples_seen, options.to)
    if options.out:
        out = options.out.expanduser()
    else:
        out = RunDir(source).export / name
    exporter.choose_format(loaded.config.model, options.to, options.variant)  # before a folder is created
    with writing(out):
        if not options.out:
            run_folder(out.parent)  # of the run; the export itself follows the umask
        record = exporter.export(loaded, out, options.variant, options.replace, options.to)
    return {"folder": str(out.absolute()), **record}


def _text(report: dict[str, Any]) -> str:
    size = sum(file["bytes"] for file in report["files"].values()) / 1e6
    if "variant" in report:
        form = f"variant {report['variant']}"
    else:
        form = report["format"]
    usage = _USAGE[report.get("format", "open_clip")]
    return "\n".join((
        f"{report['folder']}",
        f"  {report['run']} at {report['stage']}/{report['samples']}, {form}, {size:,.0f} MB",
        *(f"  {line.format(folder=report['folder'])}" for line in usage),
        *(f"  {sentence}" for sentence in report["differences"]),
        "  its README.md describes the model and the limits of the export",
    ))  # fmt: skip
