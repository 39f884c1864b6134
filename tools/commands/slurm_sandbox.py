"""Run a real Slurm on this machine, with virtual nodes and fake GPUs, to try preemption and node failures."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.common.cli import COUNT, INDEX, Parser, command, run_command
from jobs.common.text import table
from tools.sandbox import daemons
from tools.sandbox.cluster import SandboxCluster
from tools.sandbox.config import Options

EXAMPLES = """examples:
  flip slurm_sandbox start                     four nodes of 8 GPUs; prints how to submit jobs
  flip slurm_sandbox preempt --seconds 20      a job of higher priority takes all nodes for a while
  flip slurm_sandbox lose n2                   simulates a node failure; `return n2` brings it back
  flip slurm_sandbox status                    daemons, nodes, jobs
  flip slurm_sandbox stop                      cancels all jobs and ends all processes
  apt-get install $(flip slurm_sandbox packages)
  flip slurm_sandbox start --nodes 2 --grace 0 --no-user-signal --accounting --set KillWait=30
  flip slurm_sandbox start --accounting --preempt qos --no-requeue --job-submit site.lua --max-submit 20
"""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return run_command(run, options)


def run(options: argparse.Namespace) -> int:
    options.folder = options.folder or _folder()
    report = options.run(options)
    print(json.dumps(report, indent=1) if options.json else options.show(report))
    return 0


def start(options: argparse.Namespace) -> dict[str, Any]:
    """Start a Slurm; if one is running in the folder already, show how to use it."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    cluster = SandboxCluster(options.folder, **{**given, "job_submit": _script(options.job_submit)})
    started = cluster.start(keep=options.keep)
    used = cluster.site.options
    return {
        "started": started,
        "folder": str(cluster.folder),
        "slurm_conf": str(cluster.site.conf),
        "profile": str(cluster.profile),
        "nodes": used.nodes,
        "gpus": used.cards,
        "cpus": used.cpus,
        "memory": used.memory,
        "ports": [used.port, used.port + used.ports - 1],
        "address": cluster.site.address if cluster.site.only else "all addresses",
    }


def _script(path: Path | None) -> str:
    from flip.runs.errors import ConfigError

    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", "option job-submit", path, "Name a script in Lua.") from error


def stop(options: argparse.Namespace) -> dict[str, Any]:
    """Cancel all jobs and end all processes of the Slurm in the folder."""
    cluster = SandboxCluster.open(options.folder)
    return {"folder": str(cluster.folder), "stopped": cluster.stop()}


def status(options: argparse.Namespace) -> dict[str, Any]:
    """Show daemons, nodes and jobs."""
    return SandboxCluster.open(options.folder).status()


def lose(options: argparse.Namespace) -> dict[str, Any]:
    """Kill all processes of a node, as if its machine had failed."""
    cluster = SandboxCluster.open(options.folder)
    cluster.lose(options.node)
    return {"node": options.node, "down_after": cluster.site.options.node_timeout}


def bring_back(options: argparse.Namespace) -> dict[str, Any]:
    """Start a lost node again."""
    SandboxCluster.open(options.folder).bring_back(options.node)
    return {"node": options.node}


def preempt(options: argparse.Namespace) -> dict[str, Any]:
    """Submit a job of higher priority for whole nodes, which preempts jobs in partition low."""
    cluster = SandboxCluster.open(options.folder)
    nodes = options.nodes or cluster.site.options.nodes
    return {"job": cluster.preempt(nodes, options.seconds, options.nodelist)}


def packages(options: argparse.Namespace) -> dict[str, Any]:
    """Print the Debian packages that are missing on this machine, on one line; empty if none."""
    return {"missing": daemons.missing_packages(options.accounting)}


def _started(report: dict[str, Any]) -> str:
    folder = []
    if Path(report["folder"]) != _folder().resolve():
        folder = ["--folder", report["folder"]]
    first, last = report["ports"]
    if report["started"]:
        head = "Slurm runs"
    else:
        head = "Slurm runs already"
    sizes = f"{report['nodes']} nodes of {report['gpus']} GPUs, {report['cpus']} CPUs, {report['memory']:,} MB"
    rows = {
        f"{head}:": f"{sizes}; partitions low and high; ports {first}-{last} of {report['address']}",
        "to use it": f"export SLURM_CONF={report['slurm_conf']}",
        "to submit": command("submit", "quickstart", "--cluster", report["profile"]),
        "to preempt": command("slurm_sandbox", "preempt", *folder),
        "to stop": command("slurm_sandbox", "stop", *folder),
        "files": f"{report['folder']} (log/, profile.yaml, slurm.conf)",
    }
    return "\n".join(f"{name:20}{text}" for name, text in rows.items())


def _state(report: dict[str, Any]) -> str:
    if not report["running"]:
        return f"does not run: {report['folder']}"
    dead = [name for name, pid in report["daemons"].items() if not pid]
    if dead:
        daemon_line = f"not alive: {', '.join(dead)}"
    else:
        daemon_line = "all daemons are alive"
    if report["jobs"]:
        jobs = table(report["jobs"])
    else:
        jobs = "no jobs"
    return f"runs: {report['folder']}\n{daemon_line}\n\n{table(report['nodes'])}\n\n{jobs}"


def _folder() -> Path:
    from flip.common.cache import cache_root

    return cache_root() / "slurm"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="flip slurm_sandbox", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., dict[str, Any]], show: Callable[[dict[str, Any]], str]):
        help_text = run.__doc__
        command = commands.add_parser(name, help=help_text, description=help_text, epilog=EXAMPLES)
        help_text = "folder with all of its state (default: slurm in FLIP_CACHE, else ~/.cache/flip/slurm)"
        command.add_argument("--folder", type=Path, help=help_text)
        command.set_defaults(run=run, show=show)
        return command

    _start_options(add("start", start, _started))
    command = add("packages", packages, lambda report: " ".join(report["missing"]))
    command.add_argument("--accounting", action="store_true", help="include packages of slurmdbd and MariaDB")
    stopped = "stopped: {folder}; no process is left".format
    add("stop", stop, lambda report: stopped(**report) if report["stopped"] else f"did not run: {report['folder']}")
    add("status", status, _state)
    lost = "{node} is lost; Slurm marks it as down after {down_after} seconds or more".format
    add("lose", lose, lambda report: lost(**report)).add_argument("node", help="n1, n2, ...")
    back = add("return", bring_back, lambda report: f"{report['node']} is back")
    back.add_argument("node", help="n1, n2, ...")
    command = add("preempt", preempt, lambda report: f"submitted job {report['job']} of higher priority")
    command.add_argument("--nodes", type=COUNT, help="number of nodes (default: all)")
    command.add_argument("--seconds", type=COUNT, default=60, help="duration of the job (default: %(default)s)")
    command.add_argument("-w", "--nodelist", default="", help="use exactly these nodes, such as n[1-2]")
    return parser


def _start_options(command: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Options):
        option = f"--{field.name.replace('_', '-')}"
        default = field.default
        help_text = field.metadata["help"]
        if field.name == "grace":
            default = 30
        if default is True:
            command.add_argument(f"--no-{option[2:]}", dest=field.name, action="store_false", help=help_text)
        elif default is False:
            command.add_argument(option, action="store_true", help=help_text)
        elif isinstance(default, int):
            help_text += f" (default: {default})"
            command.add_argument(option, type=INDEX, default=default, metavar="N", help=help_text)
        elif field.name == "settings":
            command.add_argument(
                "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help=help_text
            )
        elif field.name == "job_submit":
            command.add_argument(option, type=Path, metavar="FILE", help=help_text)
        else:
            command.add_argument(option, choices=field.metadata["choices"], default=default, help=help_text)
    command.add_argument("--keep", action="store_true", help="keep the jobs and job numbers of the last start")
