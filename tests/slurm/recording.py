"""Plays scenarios on a real Slurm, and writes and compares what was seen.

    python -m tests.slurm.recording --out tests/slurm/scenarios.json      all of them (about 15 minutes)
    python -m tests.slurm.recording --only finishes                       prints one

scenarios.json is what whoever imitates Slurm must reproduce. It holds, for each attempt of each scenario: ``states`` of
the job in squeue, ``signals`` of each rank, the ``code`` that the exit trap saw, what it ``read`` of the job and into
which ``words`` for ``jobs.host.restart_policy`` it made that, its ``calls``, the ``decision``, and what the ``watcher``
of the limit did.
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
    """Name -> record, as recorded last."""
    return json.loads(FILE.read_text())["scenarios"]


def perform(name, here, squeue, folder):
    """The record of one scenario on a Slurm with its options."""
    scenario = SCENARIOS[name]
    here.set_grace(scenario.grace)
    here.call("scontrol", "update", "PartitionName=low", f"PreemptMode={scenario.mode}")
    scene = SlurmScene(here, squeue, folder, name)
    try:
        scenario.act(scene)
        scene.over()
        hurt = 1 if name.startswith("last_element") else 0
        record = scene.record(hurt)
        if len(scene.runs) > 1:
            record["sibling"] = scene.record(1 - hurt)
    finally:
        scene.close()
    settings = {**scenario.options, "grace": scenario.grace, "mode": scenario.mode}
    return {"event": scenario.event, "settings": settings, **record}


def essence(record, torn=False):
    """What of a record is the same each time. ``torn``: without what the first attempt's trap left.

    Slurm sends CONT beside other signals, some of them twice, and two that come together in any order; a state that
    lasts less than a poll of squeue may be missed, and seconds differ.
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
            **{key: [call["words"] for call in a[key]] for key in ("calls", "watcher")},
        }
        for a in record["attempts"]
    ]
    if torn:
        for key in ("code", "words", "decision", "calls"):
            attempts[0].pop(key)
    found = {"attempts": attempts, "end": record["end"]["state"], "job": record["job"], "own_id": record["own_id"]}
    return found | ({"sibling": essence(record["sibling"])} if "sibling" in record else {})


def record(names, folder, log=print):
    """(release of Slurm, name -> record); one Slurm per group of equal options."""
    found, groups, version = {}, [], ""
    for name in names:
        if SCENARIOS[name].options not in groups:
            groups.append(SCENARIOS[name].options)
    for number, options in enumerate(groups):
        place = folder / f"slurm{number}"
        with slurm(place, **options) as (here, squeue):
            version = re.search(r"SLURM_VERSION\s*= (\S+)", here.call("scontrol", "show", "config"))[1]
            for name in (name for name in names if SCENARIOS[name].options == options):
                begin = time.monotonic()
                found[name] = perform(name, here, squeue, place)
                log(f"{name}: {time.monotonic() - begin:.1f} s, {found[name]['end']['state']}")
    return version, {name: found[name] for name in names}


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
    found = text({"slurm": version, "scenarios": scenarios})
    if args.out:
        args.out.write_text(found)
    else:
        print(found)


if __name__ == "__main__":
    main()
