"""The result page of a storm, in Markdown."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from tests.storm.faults import HOME
from tests.storm.proofs import losses
from tests.storm.run import LIVELY

PACKAGES = ("torch", "numpy", "s3fs", "nanio")


def page(storm, proved):
    """The text of the page. ``proved``: (property, whether it holds, evidence or error) of every proof."""
    scene = storm.scene
    all_hold = all(ok for _, ok, _ in proved)
    strikes = sorted((done for run in storm.runs for done in run.done), key=lambda done: done.seconds)
    lines = [
        f"# Fault injection: seed {storm.seed}, {len(strikes)} faults of {len({d.strike.kind for d in strikes})} kinds",
        "",
        f"{'All properties hold.' if all_hold else 'NOT all properties hold.'} `make storm SEED={storm.seed}"
        f" FAULTS={storm.count}{'' if scene.name == HOME else f' SITE={scene.name}'}`, {scene.seconds:.0f} s.",
        "",
        f"- Machine: {machine()}.",
        f"- Versions: {versions(scene)}.",
        f"- Slurm: {scene.form}; {len(scene.here.site.names)} nodes, preemption sends {scene.preemption}; shards "
        "on an S3 server (nanio) behind a proxy per run; checkpoints every 5 steps.",
        "",
        "| run | ranks | checkpoints | saves | steps | attempts | faults |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in storm.runs:
        resources = run.config.resources
        section = run.config.checkpoint
        ranks = f"{resources.nodes} x {resources.processes}" + (", FSDP" if run.world > 1 else "")
        if section.background == "yes":
            saves = "in the background"
        else:
            saves = "blocking"
        storage = "S3" if section.url else "disk"
        row = (run.run.name, ranks, storage, saves, sum(storm.scene.dealt.steps[run.run.name]))
        lines.append(_row(*row, run.run.newest_attempt(), len(run.done)))
    proved = [(" ".join(text.split()), ok, evidence) for text, ok, evidence in proved]
    lines += ["", "## Properties", "", "| property | holds | evidence |", "|---|---|---|"]
    lines += [
        _row(text, "yes" if ok else "**no**", evidence.splitlines()[0] if evidence else "")
        for text, ok, evidence in proved
    ]
    lines += ["", "## Faults", "", _row("at", "run", "step", "fault", "what happened", "steps lost", "trained again"),
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    runs_by_fault = {id(done): run for run in storm.runs for done in run.done}
    lost = {}
    for run in storm.runs:
        lost |= {(run.run.name, loss.attempt): loss for loss in losses(run)}
    owned = set()
    for done in strikes:
        key = runs_by_fault[id(done)].run.name, done.attempt
        loss = None
        if done.strike.kind not in LIVELY:
            loss = lost.get(key)
        ended = ""
        if loss:
            owned.add(key)
            ended = f"; attempt {done.attempt} ended with cause `{loss.cause}`"
        event = done.what + ended + (f"; by hand: {done.intervention}" if done.intervention else "")
        if done.trained is not None:
            resumed = f"{done.trained:.0f} s"
        else:
            resumed = "never"
        lines.append(
            _row(f"{done.seconds:.0f} s", key[0], done.step, done.strike.kind.replace("_", " "), event,
                 loss.steps if loss else 0, resumed)
        )  # fmt: skip
    rest = [(name, loss) for (name, _), loss in lost.items() if (name, loss.attempt) not in owned]
    lines += [
        "",
        "`steps lost`: steps of the interrupted attempt that the next one repeats. `trained again`: time from the "
        "fault to the next logged step, of the next attempt or of the same one if it survived.",
        "",
    ]
    if rest:
        lines += ["Attempts that ended without a fault of their own run:", ""]
        lines += [f"- {name}, attempt {loss.attempt}: `{loss.cause}`, {loss.steps} steps lost" for name, loss in rest]
        lines.append("")
    wrong = [f"## No: {text}\n\n```\n{evidence}\n```\n" for text, ok, evidence in proved if not ok]
    return "\n".join([*lines, *wrong])


def _row(*cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}"


def versions(scene):
    parts = [f"Python {sys.version.split()[0]}", scene.here.call("sinfo", "--version").strip()]
    return ", ".join(parts + [f"{name} {version(name)}" for name in PACKAGES])
