"""`flip doctor --measure`: measures this machine, or compares two measurements, and writes the pages."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from flip.data.manifest.manifest import Manifest
from flip.files.creation import closed_folder, output_folder
from flip.runs.errors import COMPLETE, CONFIG, ConfigError, DataError, StorageError
from flip.runs.rundir import write_json, write_text
from jobs.common.cli import confirm, note
from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.common.filesystem import writing
from jobs.common.paths import runs_root
from jobs.measuring import cluster, compare, machine, page
from jobs.measuring.rows import NODES_ROW, RowPlan, local_rows
from jobs.measuring.verdicts import BROKEN, judge
from jobs.pages.document import Block
from jobs.pages.html import render
from jobs.pages.markdown import markdown
from jobs.planning.measurement import MEASURED, MeasuredRow, Measurement, read_measurement

MINUTES = 3.0
CLUSTER_MINUTES = 10.0
"""Of a measurement of this machine, and of nodes of a cluster, unless --minutes is given."""
NODES = 2
"""Nodes of a cluster that are measured, unless --nodes is given."""
LEAST_MINUTES = 0.5
FREE_BYTES = {"cpu": 1e9, "cuda": 8e9}
"""Free space that the rows need in the folder of runs."""
FILE = "measured.json"
PLACE = ("partition", "account", "qos")
"""Options that replace fields of the profile."""


def measure(args: argparse.Namespace) -> int:
    """Measure this machine, or nodes of a cluster. Raises FlipError before anything runs."""
    profile = requested_profile(args)
    minutes = args.minutes
    if minutes is None:
        minutes = CLUSTER_MINUTES if profile.kind == "slurm" else MINUTES
    if not LEAST_MINUTES <= minutes <= 24 * 60:
        remedy = f"Give at least {LEAST_MINUTES:g}: each row starts a process."
        raise ConfigError("not a time for a measurement", "--minutes", f"{minutes:g}", remedy)
    folder = Path(args.out or f"measured-{datetime.date.today().isoformat()}").expanduser().absolute()
    if profile.kind == "slurm":
        measured = measure_cluster(args, profile, minutes, folder)
    else:
        measured = measure_here(args, profile, minutes, folder)
    if measured is None:
        return COMPLETE
    return show(measured, folder, args.json)


def requested_profile(args: argparse.Namespace) -> ClusterProfile:
    """The profile of the cluster with the options of the command line, or that of this machine.

    Raises ConfigError for options that have no meaning here.
    """
    profile = ClusterProfile()
    if args.cluster:
        profile = load_profile(args.cluster)
    for name in ("nodes", *PLACE):
        if getattr(args, name) is not None and profile.kind != "slurm":
            remedy = "Name a profile of a Slurm cluster: --cluster NAME (flip doctor --write NAME)."
            raise ConfigError("nodes of a cluster need its profile", f"--{name}", getattr(args, name), remedy)
    if args.write:
        raise ConfigError("a measurement writes no profile", "--write", args.write, "Call it without --measure first.")
    if args.try_agents:
        remedy = "Call it without --measure, which kills a node agent and needs a working one."
        raise ConfigError("a measurement does not try node agents", "--try-agents", args.try_agents, remedy)
    return dataclasses.replace(profile, **{name: getattr(args, name) for name in PLACE if getattr(args, name)})


def measure_here(args: argparse.Namespace, profile: ClusterProfile, minutes: float, folder: Path) -> Measurement | None:
    """Measure this machine and write the result; None if the user declines."""
    manifests = [checked_manifest(name) for name in args.data]
    gpus = machine.gpu_names()
    device = "cuda" if gpus else "cpu"
    this_machine = machine.describe_machine(gpus)
    rows = chosen(local_rows(device, len(gpus), this_machine.cores, manifests, share_of(minutes)), args.only)
    earlier = earlier_rows(folder / FILE, this_machine, args.force)
    root = usable_root(runs_root(profile.runs_root), FREE_BYTES[device])
    if not args.yes and not confirm(question(this_machine.cores, len(gpus), minutes, root)):
        return None

    def report(so_far: Measurement) -> None:
        row = so_far.rows[-1]
        note(f"{row.what:44} {row.status}, {row.seconds:.0f} s {row.detail}".rstrip())
        write_json(folder / FILE, so_far.as_dict())

    with writing(folder, "Name another folder with --out."):
        output_folder(folder)
        measured = machine.measure(rows, this_machine, root, minutes, args.names, earlier, report)
        write_pages(folder, page.blocks(measured), page.TITLE, "report")
    return measured


def measure_cluster(
    args: argparse.Namespace, profile: ClusterProfile, minutes: float, folder: Path
) -> Measurement | None:
    """Measure nodes in a job and write the result; None if the user declines. Raises ConfigError for an old result."""
    nodes = NODES if args.nodes is None else args.nodes
    chosen([*local_rows("cpu", 0, 1, args.data), NODES_ROW], args.only)
    if (folder / FILE).exists() and not args.force:
        raise ConfigError("a result already exists", str(folder / FILE), remedy="Name another --out, or add --force.")
    manifests = [checked_manifest(name) for name in args.data]  # their paths are those of the nodes, too
    cluster.check(profile, nodes, minutes)
    if not args.yes and not confirm(cluster.question(profile, nodes, minutes)):
        return None
    share = share_of(minutes / 2)  # nodes wait for each other, and start cold

    def report(measured: Measurement) -> None:
        with writing(folder, "Name another folder with --out."):
            output_folder(folder)
            write_json(folder / FILE, measured.as_dict())
            write_pages(folder, page.blocks(measured), page.TITLE, "report")

    measured = cluster.measure(profile, nodes, minutes, manifests, args.only, args.names, share, report)
    report(measured)
    return measured


def share_of(minutes: float) -> float:
    """The share of the usual seconds that each measurement may take."""
    return min(4.0, minutes / MINUTES)


def show(measured: Measurement, folder: Path, as_json: bool) -> int:
    """Print the result. Returns 78 if anything does not work."""
    verdicts = judge(measured)
    if as_json:
        listed = [dataclasses.asdict(verdict) for verdict in verdicts]
        print(json.dumps({**measured.as_dict(), "verdicts": listed}, indent=1))
        note(f"written: {folder}")
    else:
        print(page.terminal_text(measured))
        print(f"\nwritten: {folder}/report.html, report.md, {FILE}")
        print(f"for plans, in the cluster profile: measured: {folder / FILE}")
    if any(verdict.verdict == BROKEN for verdict in verdicts):
        return CONFIG
    return COMPLETE


def compare_files(args: argparse.Namespace) -> int:
    """Print two measurements side by side, and with --out write the pages."""
    first, second = (read_measurement(measurement_file(name)) for name in args.compare)
    parts = compare.blocks(first, second)
    if args.out:
        folder = Path(args.out).expanduser().absolute()
        with writing(folder, "Name another folder with --out."):
            output_folder(folder)
            write_pages(folder, parts, "Two measurements", "comparison")
    if args.json:
        keys = ("row", "number", "a", "b")
        rows = [dict(zip(keys, row, strict=True)) for row in compare.differences(first, second)]
        print(json.dumps({"a": first.as_dict(), "b": second.as_dict(), "numbers": rows}, indent=1))
    else:
        print(markdown(parts), end="")
    return COMPLETE


def measurement_file(name: str) -> str:
    """The file of a measurement that the user names by itself or by its folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        path /= FILE
    return str(path)


def question(cores: int, gpus: int, minutes: float, root: Path) -> str:
    """The cost of a measurement, and whether to start it."""
    cards = f" and {gpus} GPUs" if gpus else ""
    return (
        f"This uses all {cores} cores{cards} of this machine for up to {minutes:g} minutes and writes temporary files"
        f" below {root}. Other work on the machine makes the numbers too low. Start?"
    )


def chosen(rows: Sequence[RowPlan], only: Sequence[str] | None) -> list[RowPlan]:
    """The rows that ``--only`` names; all without it. Raises ConfigError for an unknown name."""
    names = [row.name for row in rows]
    for name in only or ():
        if name not in names:
            raise ConfigError("no such row", "--only", name, f"Rows: {', '.join(names)}.")
    return [row for row in rows if not only or row.name in only]


def earlier_rows(path: Path, this_machine: machine.Machine, force: bool) -> dict[str, MeasuredRow]:
    """Measured rows of an earlier call on this machine, which this one continues; none with ``force``.

    Raises ConfigError if the file is of another machine.
    """
    if force or not path.exists():
        return {}
    earlier = read_measurement(str(path))
    if earlier.machine != this_machine or earlier.outdated():
        remedy = "Name another folder with --out, or add --force to replace it."
        raise ConfigError("a measurement of another machine or of other versions", str(path), remedy=remedy)
    return {row.name: row for row in earlier.rows if row.status == MEASURED}


def checked_manifest(name: str) -> str:
    """The path of the manifest. Raises DataError if its shards are not on this machine."""
    path = Path(name).expanduser().absolute()
    manifest = Manifest.load(str(path))
    key = manifest.keys[0]
    if "://" not in key and not Path(key).exists():
        remedy = "Is it the manifest of another site? Index the shards that are here: flip shards index"
        raise DataError("a shard of the manifest does not exist", str(path), key, remedy)
    return str(path)


def usable_root(root: Path, needed: float) -> Path:
    """The folder of runs, created if it does not exist. Raises StorageError without space."""
    with writing(root):
        closed_folder(root)
        free = shutil.disk_usage(root).free
    if free < needed:
        remedy = "Free some, or name another folder: export FLIP_RUNS=FOLDER"
        raise StorageError(f"the rows need {needed / 1e9:g} GB", str(root), f"{free / 1e9:.2g} GB are free", remedy)
    return root


def write_pages(folder: Path, parts: Sequence[Block], title: str, name: str) -> None:
    """Write NAME.html and NAME.md."""
    write_text(folder / f"{name}.html", render(title, parts))
    write_text(folder / f"{name}.md", markdown(parts))
