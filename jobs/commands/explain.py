"""flip explain SWEEP/RUN ...: configuration, state and its cause, attempts and next step of a run."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.common.cli import Parser, add_run_arguments, run_command
from jobs.common.text import count, duration, hours_text, inherited_text, percent

if TYPE_CHECKING:
    from jobs.common.terminal import Page, TextTable

EXAMPLES = """examples:
  flip explain quickstart/masked
  flip explain 'quickstart/*masked'
  flip explain quickstart/masked --json     a mapping; of several runs a list of mappings
"""


UNINFORMATIVE = (None, "", "RUNNING", "COMPLETING")
"""States of a Slurm job in its exit handler, whatever ended its processes."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="flip explain",
        description="Explain runs, each on one page: configuration, state and its cause, attempts, next step.",
        epilog=EXAMPLES,
    )
    add_run_arguments(parser, all_runs=False)
    return run_command(explain, parser.parse_args(arguments))


def explain(args: argparse.Namespace) -> int:
    from jobs.common.terminal import show
    from jobs.reporting import run_details
    from jobs.submitted_runs import select

    documents = [run_details.explain(run) for run in select.chosen(args)]
    if args.json:
        document = documents[0] if len(documents) == 1 else documents
        print(json.dumps(document, indent=1))
        return 0
    for i, each in enumerate(documents):
        if i:
            print(end="\n\n", flush=True)
        show(page(each))
    return 0


# -- the page ----------------------------------------------------------------------------------------------------------


def page(document: Mapping[str, Any]) -> Page:
    """The details; control characters from files are escaped."""
    from flip.runs.rundir import RunDir
    from jobs.common.terminal import Page, TextTable
    from jobs.workloads import submitted

    next_ = document["next"]
    heads = [
        ("run", f"{document['sweep']}/{document['run']}, in {document['folder']}"),
        *submitted.of_run(RunDir(document["folder"])).rows(document),
        ("code", _code(document["code"])),
        ("state", _state(document["state"])),
        *_decision(document["evidence"], document["state"].get("reason") or ""),
        *_start(document["start"]),
        ("next", _coming(next_)),
    ]
    heads += [("inherited", inherited_text(folder)) for folder in document["inherited"]]
    heads += [("damaged", damage) for damage in document["damaged"]]
    if document["verdict"]:
        heads += [("speed", document["verdict"])]
    if files := document["anomalies"]:
        heads += [("bad steps", f"{len(files)}, the last one: {files[-1]}")]
    lines: list[str | TextTable] = [f"{name:<10}{text}" for name, text in heads]
    if attempts := _history(document["attempts"], document["evidence"]):
        drop = ("nodes", "S from", "to", "took", "started")
        lines += ["", "attempts", TextTable(attempts, {"cause of end": 12, "decided": 8}, drop, indent="  ")]
        lines += _environment_changes(document["attempts"])
    else:
        lines += ["", "no attempt has started"]
    if document["incidents"]:
        lines += ["", "incidents", TextTable(_counts(document["incidents"]), indent="  ")]
    return Page(*lines, "", *_spent(document["goodput"]))


def _code(code: Mapping[str, Any]) -> str:
    place = f"{code['digest'] or 'unknown'}, {code['folder']}"
    if code["present"]:
        return place
    return f"{place} (absent)"


def _state(row: Mapping[str, Any]) -> str:
    parts = [": ".join(filter(None, [row["state"], row.get("reason")]))]
    if row.get("samples") is not None and row.get("total"):
        parts.append(f"S = {count(row['samples'])} of {count(row['total'])}")
    if row.get("loss") is not None:
        parts += [f"loss {row['loss']:.3f}"]
    if row.get("eta_seconds") is not None:
        parts += [f"{duration(row['eta_seconds'])} left"]
    return ", ".join(parts)


def _decision(evidence: Mapping[str, Any] | None, shown: str) -> list[tuple[str, str]]:
    """What was decided and why. ``shown``: the reason in the state above, which is not repeated."""
    if evidence is None:
        return []
    reason = evidence["reason"] or "-"
    if evidence["cause"] and reason in shown:
        reason = ""
    why = ": ".join(filter(None, [evidence["cause"], reason]))
    if evidence["action"]:
        decided = f"{evidence['action']}, because of {why}"
    elif evidence["expected"]:
        decided = f"nothing yet; the next start would decide {evidence['expected']}, because of {why}"
    else:
        decided = f"nothing yet; {why}"
    if evidence["cause"] == "complete":
        decided = f"{evidence['action'] or 'nothing yet'}: it is complete"
    code = evidence["code"]
    state = evidence["state"]
    seen = f"exit code {'unknown' if code is None else code}"
    if state not in UNINFORMATIVE:
        seen += f", job state {state}"
    lines = [("decided", f"attempt {evidence['attempt']}: {decided}"), ("evidence", seen)]
    if evidence["lines"] and evidence["cause"] != "complete":
        lines += [("log", evidence["log"]), *(("", f"| {line}") for line in evidence["lines"])]
    return lines


def _start(start: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if start is None:
        return []
    return [("start", f"the batch script's log since then: {start['log']}"), *(("", f"| {x}") for x in start["lines"])]


def _coming(next_: Mapping[str, Any]) -> str:
    parts = [next_["what"]]
    if next_["not_before"]:
        parts.append(f"not before {_clock(next_['not_before'])}")
    if next_["estimate"]:
        parts.append(f"Slurm expects {next_['estimate']}")
    text = ", ".join(parts)
    if next_["command"]:
        text += f": {next_['command']}"
    return text


def _clock(moment: float | None) -> str | None:
    if moment is None:
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _history(attempts: list[dict[str, Any]], evidence: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row per attempt. The reason of the end that ``evidence`` explains stands above the table."""
    explained = None
    if evidence:
        explained = evidence["attempt"]
    return [
        {
            "n": str(a["attempt"]),
            "started": _clock(a["time"]),
            "nodes": a["where"],
            "took": duration(a["seconds"]),
            "S from": count(a["from"]),
            "to": count(a["to"]),
            "cause of end": _cause_of_end(a, a["attempt"] == explained),
            "decided": _decided(a),
        }
        for a in attempts
    ]


def _cause_of_end(attempt: Mapping[str, Any], is_explained: bool) -> str | None:
    if not attempt["cause"] or is_explained:
        return attempt["cause"] or None
    return ": ".join(dict.fromkeys(filter(None, [attempt["cause"], attempt["reason"]])))


def _decided(attempt: Mapping[str, Any]) -> str | None:
    if attempt["action"] and attempt["delay"]:
        return f"{attempt['action']} after {attempt['delay']:g} s"
    return attempt["action"]


def _environment_changes(attempts: list[dict[str, Any]]) -> list[str]:
    """A line per attempt that trained with other packages or on another processor than the attempt before."""
    changed = [a for a in attempts if a["environment"]]
    return [f"  attempt {a['attempt']} ran in another environment: {'; '.join(a['environment'])}" for a in changed]


def _counts(incidents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from flip.runs.restart_policy import Limits

    columns = {"cause": "cause", "total": "total", "without_commit": "without a new checkpoint", "limit": "stops at"}
    rows = [{head: incident[key] for key, head in columns.items()} for incident in incidents]
    others = {"storage": f"{duration(Limits().storage_total)} of waits"}
    return [{**row, "stops at": row["stops at"] or others.get(row["cause"], "no limit")} for row in rows]


def _spent(spent: Mapping[str, Any]) -> list[str]:
    if not spent["total"]:
        return ["time      unknown"]
    parts = ", ".join(f"{part} {percent(share)} %" for part, share in spent["share"].items() if share)
    if spent["waiting_hours"] is None:
        waited = "unknown"
    else:
        waited = duration(3600 * spent["waiting_hours"])
    lines = [f"time      {hours_text(spent['total'])} {spent['unit']}: {parts}; waited for a start: {waited}"]
    if spent["advice"]:
        lines.append(f"try       {spent['advice']}")
    return lines
