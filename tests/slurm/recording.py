"""Plays scenarios on a real Slurm, and records and compares the results.

    python -m tests.slurm.recording --out tests/slurm/scenarios.json      all of them (about 15 minutes)
    python -m tests.slurm.recording --only finishes                       prints one

The simulated Slurm must reproduce scenarios.json. It contains, for each attempt of each scenario: ``states`` of the job
in squeue, ``signals`` of each rank, the exit ``code`` of the attempt, the job fields that the owner ``read`` at its
end, the ``words`` that it derived from them for ``flip.runs.next_step``, its other ``calls``, and its ``decision``.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

from tests.harness.slurm_scene import SlurmScene, slurm
from tests.slurm.scenarios import SCENARIOS

FILE = Path(__file__).with_name("scenarios.json")
STOPS = ("TERM", "USR2")


def load():
    """The last recording: name -> record."""
    return json.loads(FILE.read_text())["scenarios"]


def perform(name, cluster, squeue, folder):
    """The record of one scenario on a Slurm with its options."""
    scenario = SCENARIOS[name]
    cluster.set_grace(scenario.grace)
    cluster.call("scontrol", "update", "PartitionName=low", f"PreemptMode={scenario.mode}")
    scene = SlurmScene(cluster, squeue, folder, name)
    try:
        scenario.act(scene)
        scene.over()
        target = 1 if name.startswith("last_element") else 0
        record = scene.record(target)
        if len(scene.runs) > 1:
            record["sibling"] = scene.record(1 - target)
    finally:
        scene.close()
    settings = {**scenario.options, "grace": scenario.grace, "mode": scenario.mode}
    return {"event": scenario.event, "settings": settings, **record}


def essence(record, torn=False):
    """The reproducible part of a record. ``torn``: without what the owner did at the first attempt's end.

    Slurm sends CONT with other signals, sends some signals twice, and delivers simultaneous signals in any order. A
    poll of squeue may miss a short state, and times differ.
    """
    attempts = [
        {
            "signals": {
                rank: sorted({name for name in names if name in STOPS}) for rank, names in a["signals"].items()
            },
            "gpus": a["gpus"],
            "code": a["code"],
            "words": a["words"],
            "decision": a["decision"] and {key: a["decision"][key] for key in ("action", "cause", "delay")},
            "calls": [call["words"] for call in a["calls"]],
        }
        for a in record["attempts"]
    ]
    if torn:
        for key in ("code", "words", "decision", "calls"):
            attempts[0].pop(key)
    summary = {"attempts": attempts, "end": record["end"]["state"], "job": record["job"], "own_id": record["own_id"]}
    return summary | ({"sibling": essence(record["sibling"])} if "sibling" in record else {})


def record(names, folder, log=print):
    """Record scenarios; returns (release of Slurm, name -> record). Scenarios with equal options share a Slurm."""
    records = {}
    groups = []
    version = ""
    for name in names:
        if SCENARIOS[name].options not in groups:
            groups.append(SCENARIOS[name].options)
    for number, options in enumerate(groups):
        slurm_folder = folder / f"slurm{number}"
        with slurm(slurm_folder, **options) as (cluster, squeue):
            version = re.search(r"SLURM_VERSION\s*= (\S+)", cluster.call("scontrol", "show", "config"))[1]
            for name in (name for name in names if SCENARIOS[name].options == options):
                start = time.monotonic()
                records[name] = perform(name, cluster, squeue, slurm_folder)
                log(f"{name}: {time.monotonic() - start:.1f} s, {records[name]['end']['state']}")
    return version, {name: records[name] for name in names}


def text(value):
    """JSON with short lists on one line."""
    long = json.dumps(value, indent=1) + "\n"
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s*\n\s*", " ", m[1]) + "]", long)


def main():
    parser = argparse.ArgumentParser(description="Record what a real Slurm does to a run.")
    parser.add_argument("--out", type=Path, help="the file; default: printed")
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="NAME")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scenarios") as folder:
        version, scenarios = record(args.only, Path(folder), lambda line: print(line, flush=True))
    document = text({"slurm": version, "scenarios": scenarios})
    if args.out:
        args.out.write_text(document)
    else:
        print(document)


if __name__ == "__main__":
    main()
