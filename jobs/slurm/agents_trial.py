"""Tries node agents once on a Slurm site: a step of up to two nodes whose tasks connect as agents do.

``srun`` starts ``jobs/host/agents/probe.py`` on each node, without GPUs, for at most two minutes. It gives up if no
nodes are free in time, and no job is left behind.
"""

import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flip.files.ownership import user_name
from jobs.common.cluster_profile import ClusterProfile
from jobs.host import rank_entry, slurm_cli
from jobs.host.agents import contact, probe
from jobs.slurm.batch_script import FORWARDED_ENV, clean_environment
from jobs.slurm.site import AgentsTrial

MOST_NODES = 2
LIMIT_MINUTES = 2
"""Wall limit of the step. An agent searches for a minute."""
START_SECONDS = 60.0
"""For Slurm to start and to end the step, beyond its wall limit."""
MEMORY = "512M"
"""Of each node: without a request a job may get, and wait for, all memory of a node."""
SELECTING = ("constraint", "exclude", "nodelist", "prefer", "reservation", "wckey")
"""Options of a profile that the step needs, too. Others request resources."""
LONGEST = 300
"""Characters of a text of srun that are shown."""

TASK = "task"
"""Kind of problem: the task of a node printed no result."""
REMEDIES = {
    TASK: "Correct that: a TaskProlog that fails, or a Python that a node lacks, ends the ranks of every run.",
    probe.LISTEN: f"The first node needs a free port from {rank_entry.PORTS[0]} to {rank_entry.PORTS[1]}, and the"
    " runs root.",
    probe.FOLDER: "Nodes must see the runs root under the same path, and each other's new files within a minute.",
    probe.NAME: "Make the name service of the nodes, or their /etc/hosts, resolve the names of nodes.",
    probe.NETWORK: "Ask for open TCP ports between nodes; ranks on several nodes need them, too (docs/parallel.md).",
}
TASK_LINE = re.compile(r"^srun: error: \S+: tasks? [0-9,-]+: ", re.MULTILINE)
"""In the messages of an srun whose tasks have started."""

QUEUED = re.compile(r"^srun: job \d+ (queued and waiting for|has been allocated) resources\n?", re.MULTILINE)
"""Messages of srun that are no errors."""


def try_agents(profile: ClusterProfile, nodes: int, code: Path, folder: Path, seconds: int) -> AgentsTrial:
    """Run the step on ``nodes`` nodes of the profile's partition, after at most ``seconds`` in the queue.

    ``code``: a snapshot of the code; ``folder``: an empty folder. Nodes must see both.
    """
    name = f"flip-try-agents-{secrets.token_hex(4)}"
    program = code / "jobs" / "host" / "agents" / "probe.py"
    command = ["srun", *_options(profile, nodes, name, seconds)]
    command += [profile.hosts_python, "-I", "-B", str(program), str(folder), str(contact.CONNECT_SECONDS)]
    deadline = seconds + 60 * LIMIT_MINUTES + START_SECONDS
    try:
        with clean_environment([*FORWARDED_ENV, *profile.env]):
            environ = dict(os.environ)
            if profile.master_addr:
                environ["MASTER_ADDR"] = profile.master_addr
            step = slurm_cli.run_step(command, environ, deadline)
    except slurm_cli.SlurmUnavailable as error:
        return AgentsTrial(unable=str(error))
    finally:
        with suppress(slurm_cli.SlurmUnavailable):  # the job ends at its limit
            slurm_cli.call("scancel", f"--user={user_name(os.geteuid())}", f"--name={name}")
    return _judge_step(step)


def _options(profile: ClusterProfile, nodes: int, name: str, seconds: int) -> list[str]:
    """Options of srun, which submits the step as a job of its own."""
    options = {
        "nodes": str(nodes),
        "ntasks": str(nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": "1",
        "mem": MEMORY,
        "time": str(LIMIT_MINUTES),
        "immediate": str(seconds),
        "job-name": name,
        "chdir": "/",
        "wait": "0",
        "kill-on-bad-exit": "0",
        "export": "ALL",
    }
    for key in ("partition", "account", "qos"):
        if getattr(profile, key):
            options[key] = getattr(profile, key)
    options |= {key: profile.options[key] for key in SELECTING if key in profile.options}
    return [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]


def _judge_step(step: slurm_cli.StepResult) -> AgentsTrial:
    answers = parse_answers(step.output)
    if not answers and not TASK_LINE.search(step.errors):
        errors = QUEUED.sub("", step.errors)
        text = slurm_cli.failure_text("srun", errors) or f"srun ended with {step.code}"
        return AgentsTrial(unable=_short(text))
    names = [answer["node"] for answer in answers]
    if answers:
        with suppress(slurm_cli.SlurmUnavailable):  # then only the nodes that answered are known
            names = slurm_cli.host_names(answers[0]["nodes"])
    return judge(names, answers, step.errors)


def parse_answers(output: str) -> list[Mapping[str, str]]:
    """The results in the output of all tasks. A TaskProlog may have printed other lines, or before the mark."""
    answers = []
    for line in output.splitlines():
        _, mark, text = line.partition(probe.MARK)
        if mark:
            with suppress(ValueError):
                answers.append(json.loads(text))
    return answers


def judge(names: Sequence[str], answers: Iterable[Mapping[str, str]], errors: str) -> AgentsTrial:
    """The result of a step on the nodes ``names``, the first of which listened; none if no task has answered.

    ``errors``: what srun printed on standard error.
    """
    by_node = {answer["node"]: answer for answer in answers}
    problems: dict[str, tuple[str, str]] = {}
    """Node -> kind, text."""
    for name in names:
        if name not in by_node:
            problems[name] = TASK, _task_errors(name, errors)
        elif by_node[name]["problem"]:
            problems[name] = by_node[name]["kind"], by_node[name]["problem"]
    if not names:
        problems["all nodes"] = TASK, _task_errors("", errors)
    elif problems.get(names[0], ("", ""))[0] in (TASK, probe.LISTEN):  # others cannot see its address
        problems = {name: problem for name, problem in problems.items() if problem[0] != probe.FOLDER}
    accepted = [name for name in names if name in by_node and not by_node[name]["problem"]]
    text = "; ".join(f"{name}: {problem}" for name, (_, problem) in problems.items())
    kinds = dict.fromkeys(kind for kind, _ in problems.values())
    first = by_node.get(names[0], {}) if names else {}
    return AgentsTrial(
        accepted, text, " ".join(REMEDIES[kind] for kind in kinds),
        store=first.get("store"), coordinator=first.get("coordinator"),
    )  # fmt: skip


def _task_errors(node: str, errors: str) -> str:
    """The lines of srun about a node, or all if none names it."""
    lines = [line.strip() for line in QUEUED.sub("", errors).splitlines() if line.strip()]
    own = [line for line in lines if node and re.search(rf"\b{re.escape(node)}\b", line)]
    return _short("; ".join(own or lines) or "its task printed no result")


def _short(text: str) -> str:
    text = " ".join(text.split())
    if len(text) > LONGEST:
        return text[:LONGEST] + " ..."
    return text
