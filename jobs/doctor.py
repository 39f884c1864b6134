"""python jobs/doctor.py: read the Slurm site, say which promises hold there, and write a profile for it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: jobs/ must not be on the path, where tensorboard.py hides the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.common.cli import Parser, quietly, run_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobs.common.cluster_profile import ClusterProfile
    from jobs.slurm.site import Site
    from jobs.slurm.site_checks import CheckResult

EXAMPLES = """examples:
  python jobs/doctor.py                                     the site's default partition
  python jobs/doctor.py --partition gpu --account vision --write mine
  python jobs/doctor.py --cluster mine                      does the profile still fit the site?
  python jobs/doctor.py --json
Nothing is submitted: sbatch is asked with --test-only. Exit code 78 if a check fails, else 0.
"""
UNLIMITED = 24.0
"""Hours of an attempt where the site sets no limit."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description="Read the Slurm site that answers here: which promises hold on it, and a profile for it.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--partition", help="default: the profile's, else the site's default one")
    parser.add_argument("--account", help="for sites that bill")
    parser.add_argument("--qos", help="quality of service, where jobs name one")
    parser.add_argument("--cluster", metavar="NAME", help="judge this profile in place of one that fits the site")
    parser.add_argument(
        "--write", metavar="NAME", help="write the profile: sweeps/clusters/NAME.yaml, or a path that ends in .yaml"
    )
    parser.add_argument("--force", action="store_true", help="replace the file that is there")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(arguments)
    return run_command(lambda: examine(args))


def examine(args: argparse.Namespace) -> int:
    from flip.runs.errors import COMPLETE, CONFIG
    from jobs.slurm import site as reading
    from jobs.slurm.site_checks import FAIL, check_site

    target = place(args.write, args.force) if args.write else None
    base = given(args)
    site = reading.read(base)
    profile = base if args.cluster else draft(base, site)
    errors = {**site.errors, "sbatch --test-only": reading.rejection(profile)}
    found = check_site(replace(site, errors=errors), profile)
    if target:
        write(target, text(draft(base, site), site))
    cluster = site.config.get("ClusterName", "")
    if args.json:
        rows = [finding._asdict() for finding in found]
        report = {"cluster": cluster, "partition": site.partition["PartitionName"], "promises": rows}
        print(json.dumps({**report, "written": str(target) if target else None}, indent=1))
    else:
        print(render(found, f"Slurm cluster {cluster}, partition {site.partition['PartitionName']}"))
        if target:
            print(f"\nwritten: {target}")
    return CONFIG if any(finding.verdict == FAIL for finding in found) else COMPLETE


def given(args: argparse.Namespace) -> ClusterProfile:
    """The named profile, or an empty one, with what the command line says."""
    from flip.runs.errors import ConfigError
    from jobs.common.cluster_profile import ClusterProfile, load_profile

    profile = load_profile(args.cluster) if args.cluster else ClusterProfile(kind="slurm")
    if profile.kind != "slurm":
        raise ConfigError("not a profile of a Slurm cluster", f"{profile.name}, kind", profile.kind)
    words = {key: getattr(args, key) for key in ("partition", "account", "qos") if getattr(args, key)}
    return replace(profile, **words)


def place(name: str, force: bool) -> Path:
    """Where the profile goes. ConfigError where there is one."""
    from flip.runs.errors import ConfigError
    from jobs.common.paths import PROFILES

    target = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if target.exists() and not force:
        raise ConfigError("there is such a profile", "--write", str(target), "Take another name, or add --force.")
    return target


def write(target: Path, content: str) -> None:
    """The file, whole. It is read back: what is written must load."""
    from flip.runs.rundir import write_text
    from jobs.common.cluster_profile import load_profile
    from jobs.common.filesystem import unwritable

    try:
        write_text(target, content)
    except OSError as error:
        raise unwritable(error, target, "Name another path with --write.") from error
    load_profile(str(target))


def draft(profile: ClusterProfile, site: Site) -> ClusterProfile:
    """The profile with what was read of the site."""
    from jobs.host.slurm_cli import parse_int
    from jobs.slurm.site import Node

    node = site.common_node or Node(0, 0, 0, "")
    most = parse_int(site.config.get("MaxArraySize", ""))
    hours = max(0.01, int(site.max_seconds / 36) / 100) if site.max_seconds else UNLIMITED
    options = dict(profile.options)
    if node.gpus and "cons_tres" not in site.config.get("SelectType", "cons_tres"):
        options.setdefault("gres", f"gpu:{node.gpus}")
    if site.memory_share and node.cpus and not any(key.startswith("mem") for key in options):
        options["mem-per-cpu"] = f"{node.memory // node.cpus}M"
    return replace(
        profile,
        kind="slurm",
        partition=profile.partition or site.partition["PartitionName"],
        gpus_per_node=node.gpus,
        gpu=node.gpu,
        cpus_per_node=node.cpus,
        memory_gb=float(node.memory_gb),
        hours=hours,
        signal_seconds=max(1, min(120, int(hours * 3600) // 4)),
        array_size=profile.array_size if most is None else max(1, most - 1),
        options=options,
    )


def text(profile: ClusterProfile, site: Site) -> str:
    """YAML of a drafted profile; each line says where it is from. What the profile says beside that is kept."""
    import yaml

    from jobs.common.cluster_profile import ClusterProfile

    count = site.nodes[site.common_node] if site.common_node else 0
    limits = f"MaxTime={site.partition.get('MaxTime', '')} of the partition"
    limits += f", MaxWall={site.qos['wall']} of the QOS" if site.qos.get("wall") else ""
    lines: list[tuple[str, Any, str]] = [
        ("kind", profile.kind, ""),
        ("partition", profile.partition, ""),
        ("account", profile.account, ""),
        ("qos", profile.qos, ""),
        ("runs_root", profile.runs_root, ""),
        ("gpus_per_node", profile.gpus_per_node, f"sinfo; {count} of {sum(site.nodes.values())} usable nodes are such"),
        ("gpu", profile.gpu, "sinfo (gres); shown in plans"),
        ("cpus_per_node", profile.cpus_per_node, "sinfo"),
        ("memory_gb", int(profile.memory_gb), "sinfo"),
        ("hours", int(profile.hours) if profile.hours % 1 == 0 else profile.hours, limits),
        ("signal_seconds", profile.signal_seconds, "chosen: 120, or a quarter of the hours"),
        ("array_size", profile.array_size, f"MaxArraySize={site.config.get('MaxArraySize', '')}, less one"),
        ("options", profile.options, ", ".join(filter(None, [site.config.get("SelectType"), site.memory_share]))),
    ]
    usual = asdict(ClusterProfile())
    kept = {key: value for key, value in asdict(profile).items() if value != usual[key]}
    lines += [
        (key, value, "as it was") for key, value in kept.items() if key not in ("name", *(row[0] for row in lines))
    ]
    done = [f"# The Slurm cluster {site.config.get('ClusterName', '')} as `python jobs/doctor.py` read it."]
    done.append("# Every field: docs/cluster.md and jobs/common/cluster_profile.py.")
    for key, value, source in lines:
        if value not in ("", {}, []):
            row = f"{key}: {yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}"
            done.append(f"{row:24}  # {source}" if source else row)
    if profile.gpus_per_node and not profile.tflops:
        done.append("# peak_tflops: 989.0     # dense bf16 peak of one card (of an H100 SXM); for GPU-hours in plans")
    return "\n".join([*done, ""])


def render(found: Sequence[CheckResult], title: str) -> str:
    """A line per promise; what follows from one that does not hold stands below it."""
    wide, verdict = (max(len(finding[i]) for finding in found) for i in (0, 1))
    lines = [title]
    for finding in found:
        lines.append(f"  {finding.promise:{wide}}  {finding.verdict:{verdict}}  {finding.read}")
        if finding.then:
            lines.append(f"  {'':{wide}}  {'':{verdict}}  -> {finding.then}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(quietly(main))
