"""flip doctor: check which guarantees hold on a Slurm cluster, write a profile for it, and measure a machine."""

from __future__ import annotations

import argparse
import json
import tempfile
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.common.cli import AMOUNT, COUNT, Parser, run_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flip.runs.checks import Check
    from jobs.common.cluster_profile import ClusterProfile
    from jobs.slurm.site import AgentsTrial, Site

EXAMPLES = """examples:
  flip doctor                                     the default partition of the site
  flip doctor --partition gpu --account vision --write mine
  flip doctor --cluster mine                      check a profile against the site
  flip doctor --partition gpu --try-agents --write mine    let node agents of two nodes connect, in a job of seconds
  flip doctor --json
  flip doctor --measure                           measure this machine: at most three minutes; asks first
  flip doctor --measure --data MANIFEST --minutes 10 --out measured --yes
  flip doctor --measure --cluster mine --nodes 2    # in a job
  flip doctor --measure --compare measured-2026-11-29 measured
Without --measure and --try-agents nothing is submitted: sbatch runs with --test-only. Exit code: 0; 78 if a check
fails, or if a measured part does not work; 69 if Slurm does not answer, or without space.
"""
DEFAULT_HOURS = 24.0
"""Hours of an attempt if the site has no time limit."""
LINE = 100
"""Characters of a line of the checks."""
TRY_SECONDS = 300
"""For which a try of node agents waits for free nodes."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="flip doctor",
        description="Check which guarantees hold on a Slurm cluster and write a profile for it, or measure a machine.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--partition", help="default: that of the profile, else the default of the site")
    parser.add_argument("--account", help="account, if the site requires one")
    parser.add_argument("--qos", help="quality of service, if jobs name one")
    parser.add_argument("--cluster", metavar="NAME", help="check this profile instead of one drafted from the site")
    parser.add_argument(
        "--write",
        metavar="NAME",
        help="write the profile to sweeps/clusters/NAME.yaml, or to a path that ends in .yaml",
    )
    parser.add_argument(
        "--try-agents",
        nargs="?",
        type=COUNT,
        const=TRY_SECONDS,
        metavar="SECONDS",
        help="let node agents connect once: a job without GPUs on up to two nodes of the partition, of at most two"
        f" minutes, which waits at most SECONDS for free nodes (default: {TRY_SECONDS})",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file; measure all rows again")
    add_measure_options(parser)
    return run_command(examine_or_measure, parser.parse_args(arguments))


def add_measure_options(parser: Parser) -> None:
    group = parser.add_argument_group("measure a machine (docs/measure.md)")
    group.add_argument("--measure", action="store_true", help="measure this machine, or nodes of --cluster in a job")
    group.add_argument("--minutes", type=AMOUNT, help="most minutes of the measurement; default: 3, in a job 10")
    group.add_argument("--nodes", type=COUNT, help="number of nodes of the job; default: 2")
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="MANIFEST",
        help="measure input of these data sets, whose first shards must exist on this machine, even with --cluster;"
        " default: synthetic shards",
    )
    group.add_argument("--only", nargs="+", metavar="ROW", help="measure these rows alone")
    group.add_argument(
        "--out", metavar="FOLDER", help="of the result; one that has rows continues. Default: measured-DATE"
    )
    group.add_argument("--names", action="store_true", help="write the name of the host, too")
    group.add_argument("--compare", nargs=2, metavar=("A", "B"), help="show two results side by side; measure nothing")
    group.add_argument("--yes", action="store_true", help="do not ask")


def examine_or_measure(args: argparse.Namespace) -> int:
    if not args.measure and not args.compare:
        refuse_measure_options(args)
        return examine(args)
    from jobs.measuring import command

    if args.compare:
        return command.compare_files(args)
    return command.measure(args)


def refuse_measure_options(args: argparse.Namespace) -> None:
    """Raise ConfigError if an option of a measurement is given without --measure."""
    from flip.runs.errors import ConfigError

    for name in ("minutes", "nodes", "data", "only", "out", "names"):
        if getattr(args, name):
            raise ConfigError("this option needs --measure", f"--{name}", getattr(args, name), "Add --measure.")


def examine(args: argparse.Namespace) -> int:
    from flip.runs.checks import FAILS, run_rules
    from flip.runs.errors import COMPLETE, CONFIG
    from jobs.common.terminal import show
    from jobs.planning import software_checks
    from jobs.slurm import site as reading
    from jobs.slurm.site_checks import check_site

    target = None
    if args.write:
        target = place(args.write, args.force)
    base = requested_profile(args)
    site = reading.read(base)
    profile = base
    if not args.cluster:
        profile = draft(base, site)
    site = replace(site, errors={**site.errors, "sbatch --test-only": reading.rejection(profile)})
    if args.try_agents:
        site = replace(site, agents_trial=try_agents(site, profile, args.try_agents))
        if not args.cluster:
            profile = draft(base, site)
    results = [*check_site(site, profile), *run_rules(software_checks.OF_PROFILE, profile)]
    if target:
        write(target, profile_yaml(draft(base, site), site))
    cluster = site.config.get("ClusterName", "")
    if args.json:
        rows = [{"promise": row.name, "verdict": row.state, "read": row.text, "then": row.remedy} for row in results]
        written = None
        if target:
            written = str(target)
        report = {
            "cluster": cluster,
            "partition": site.partition["PartitionName"],
            "promises": rows,
            "written": written,
            "next": [next_command(args, target)],
        }
        print(json.dumps(report, indent=1))
    else:
        show(render(results, f"Slurm cluster {cluster}, partition {site.partition['PartitionName']}"))
        if target:
            print(f"\nwritten: {target}")
    if any(result.state == FAILS for result in results):
        return CONFIG
    return COMPLETE


def try_agents(site: Site, profile: ClusterProfile, seconds: int) -> AgentsTrial:
    """Let node agents connect once, by a copy of this code below the runs root, as jobs have it."""
    from jobs.common.cli import note
    from jobs.common.filesystem import writing
    from jobs.common.paths import REPOSITORY, runs_root
    from jobs.slurm import agents_trial
    from jobs.slurm.site import AgentsTrial
    from jobs.submission.snapshot import take

    refusal = site.errors.get("sbatch --test-only")
    if refusal:
        return AgentsTrial(unable=refusal.removeprefix("sbatch: "))  # the command names itself, too
    if profile.container:
        return AgentsTrial(unable="only the image has the Python of the ranks")
    nodes = min(agents_trial.MOST_NODES, sum(site.nodes.values()) or agents_trial.MOST_NODES)
    root = runs_root(profile.runs_root)
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    note(f"a job on {nodes} nodes tries node agents; it waits at most {seconds} s for them")
    with writing(place), tempfile.TemporaryDirectory(prefix=".try-agents-", dir=place) as folder:
        code = take(REPOSITORY, Path(folder) / "code").path
        return agents_trial.try_agents(profile, nodes, code, Path(folder), seconds)


def next_command(args: argparse.Namespace, target: Path | None) -> str:
    """The command that writes a profile; with a profile, a dry run on it."""
    from jobs.common.cli import command

    if target:
        return command("submit", "quickstart", "--cluster", target.absolute(), "--dry-run")
    if args.cluster:
        profile = args.cluster
        if profile.endswith((".yaml", ".yml")):
            profile = Path(profile).expanduser().absolute()
        return command("submit", "quickstart", "--cluster", profile, "--dry-run")
    options = [f"--{name}={getattr(args, name)}" for name in ("partition", "account", "qos") if getattr(args, name)]
    return command("doctor", *options, "--write", "NAME")


def requested_profile(args: argparse.Namespace) -> ClusterProfile:
    """The named profile or an empty one, with the options of the command line."""
    from flip.runs.errors import ConfigError
    from jobs.common.cluster_profile import ClusterProfile, load_profile, require_trusted_programs

    if args.cluster:
        profile = load_profile(args.cluster)
    else:
        profile = ClusterProfile(kind="slurm")
    require_trusted_programs(profile)
    if profile.kind != "slurm":
        remedy = "Name a profile with kind: slurm. To measure this machine: flip doctor --measure."
        raise ConfigError("not a profile of a Slurm cluster", f"{profile.name}, kind", profile.kind, remedy)
    settings = {key: getattr(args, key) for key in ("partition", "account", "qos") if getattr(args, key)}
    return replace(profile, **settings)


def place(name: str, force: bool) -> Path:
    """Path of the new profile. Raises ConfigError if it exists."""
    from flip.runs.errors import ConfigError
    from jobs.common.paths import PROFILES

    if name.endswith((".yaml", ".yml")):
        target = Path(name).expanduser()
    else:
        target = PROFILES / f"{name}.yaml"
    if target.exists() and not force:
        raise ConfigError("profile already exists", "--write", str(target), "Choose another name, or add --force.")
    return target


def write(target: Path, content: str) -> None:
    """Write the profile, if it can be loaded: an existing one is replaced."""
    from flip.runs.rundir import write_text
    from jobs.common.cluster_profile import load_profile
    from jobs.common.filesystem import writing

    with writing(target, "Name another path with --write."):
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder) / target.name
            write_text(trial, content)
            load_profile(str(trial))
        write_text(target, content)


def draft(profile: ClusterProfile, site: Site) -> ClusterProfile:
    """The profile, completed with values from the site."""
    from jobs.host.slurm_cli import parse_int
    from jobs.slurm.site import Node

    node = site.common_node or Node(0, 0, 0, "")
    most = parse_int(site.config.get("MaxArraySize", ""))
    if site.max_seconds:
        hours = max(0.01, int(site.max_seconds / 36) / 100)
    else:
        hours = DEFAULT_HOURS
    options = dict(profile.options)
    threads = node.threads_per_core
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
        cpus_per_node=node.cpus // threads,
        threads_per_core=threads,
        memory_gb=float(node.memory_gb),
        hours=hours,
        signal_seconds=max(1, min(120, int(hours * 3600) // 4)),
        array_size=profile.array_size if most is None else max(1, most - 1),
        options=options,
        agents=_has_agents(profile, site),
    )


def profile_yaml(profile: ClusterProfile, site: Site) -> str:
    """YAML of a drafted profile, with the source of each value; other fields of the profile are copied."""
    from jobs.common.cluster_profile import ClusterProfile

    count = 0
    if site.common_node:
        count = site.nodes[site.common_node]
    limits = f"MaxTime={site.partition.get('MaxTime', '')} of the partition"
    if site.qos.get("wall"):
        limits += f", MaxWall={site.qos['wall']} of the QOS"
    lines: list[tuple[str, Any, str]] = [
        ("kind", profile.kind, ""),
        ("partition", profile.partition, ""),
        ("account", profile.account, ""),
        ("qos", profile.qos, ""),
        ("runs_root", profile.runs_root, ""),
        ("gpus_per_node", profile.gpus_per_node, f"sinfo; {count} of {sum(site.nodes.values())} usable nodes"),
        ("gpu", profile.gpu, "sinfo (gres); shown in plans"),
        ("cpus_per_node", profile.cpus_per_node, "sinfo; cores"),
        *_threads_line(profile),
        ("memory_gb", int(profile.memory_gb), "sinfo"),
        ("hours", int(profile.hours) if profile.hours % 1 == 0 else profile.hours, limits),
        ("signal_seconds", profile.signal_seconds, "chosen: 120, or a quarter of the hours"),
        ("array_size", profile.array_size, f"MaxArraySize={site.config.get('MaxArraySize', '')}, minus 1"),
        ("options", profile.options, ", ".join(filter(None, [site.config.get("SelectType"), site.memory_share]))),
        ("agents", profile.agents, _reason_for_agents(profile, site)),
    ]
    defaults = asdict(ClusterProfile())
    written = {"name", *(key for key, _, _ in lines)}
    lines += [
        (key, value, "unchanged")
        for key, value in asdict(profile).items()
        if value != defaults[key] and key not in written
    ]
    rows = [f"# Slurm cluster {site.config.get('ClusterName', '')}, as read by `flip doctor`."]
    rows.append("# All fields: docs/cluster.md and jobs/common/cluster_profile.py.")
    rows += [_field(key, value, source) for key, value, source in lines if value not in ("", {}, [])]
    if profile.gpus_per_node and not profile.tflops:
        rows.append("# peak_tflops: 989.0     # dense bf16 peak of one card (of an H100 SXM); for GPU-hours in plans")
    if profile.gpus_per_node and not profile.network_gbps:
        rows.append("# nvlink_gbps: 3600.0     # per GPU and direction (of an H100 SXM); for communication in plans")
        rows.append("# network_gbps: 400.0     # of a node's network, divided by its GPUs")
    return "\n".join([*rows, ""])


def _threads_line(profile: ClusterProfile) -> list[tuple[str, Any, str]]:
    if profile.threads_per_core == 1:
        return []
    return [
        ("threads_per_core", profile.threads_per_core, "sinfo; Slurm counts threads: jobs request cores times this")
    ]


def _has_agents(profile: ClusterProfile, site: Site) -> bool:
    """Whether the written profile has node agents: unless something speaks against them, or if the given profile has
    them and a try did not fail."""
    from jobs.slurm.site_checks import agents_problem

    if not agents_problem(site, profile):
        return True
    has_failed = site.agents_trial is not None and bool(site.agents_trial.problem)
    return profile.agents and not has_failed


def _reason_for_agents(profile: ClusterProfile, site: Site) -> str:
    from jobs.slurm.site_checks import agents_problem

    return agents_problem(site, profile) or "restart a run in its job after a fault (docs/restarts.md)"


def render(results: Sequence[Check], title: str) -> str:
    """A paragraph per guarantee: its state, what was seen, and the consequence if it does not hold."""
    wide = max(len(row.state) for row in results)
    indent = " " * (wide + 6)
    lines = [title]
    for row in results:
        lines.append(f"  {row.state:{wide}}  {row.name}")
        texts = [row.text]
        if row.remedy:
            texts.append(f"-> {row.remedy}")
        for text in filter(None, texts):
            lines += textwrap.wrap(
                text, LINE, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines)


def _field(key: str, value: Any, source: str) -> str:
    """A line of YAML, with its source as a comment."""
    import yaml

    if isinstance(value, list | dict):
        shown = json.dumps(value, ensure_ascii=False)  # JSON is YAML, and one line also of texts with several
    else:
        shown = yaml.safe_dump(value, width=1000).splitlines()[0]
    line = f"{key}: {shown}"
    if source:
        line = f"{line:24}  # {source}"
    return line
