"""python jobs/status.py [SWEEP | SWEEP/RUN | DIR]: where every run stands, from the run directories and the cluster."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
# Python puts a script's folder first in sys.path, where jobs/common/cluster_profile.py and jobs/slurm/site.py would
# hide other modules.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

from jobs.common.cli import Parser, add_root_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from flip.runs.rundir import RunDir
    from jobs.common.job import JobState

EXAMPLES = """examples:
  python jobs/status.py                      every sweep below RUNS_ROOT
  python jobs/status.py quickstart           one sweep
  python jobs/status.py quickstart/mask50    one run
  python jobs/status.py quickstart --watch   redrawn until all runs have ended; Ctrl-C leaves them going
  python jobs/status.py --goodput            what the time of the runs went to
  python jobs/status.py --root /data/runs --json
exit code: 0, or 69 if the state of every run is unknown (Slurm does not answer, or files cannot be read); with --watch
that of the worst run
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description="Where every run stands.", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", help="a sweep, sweep/run or a folder; default: all")
    add_root_option(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--watch", action="store_true", help="go on until all have ended; the exit code says how")
    kind.add_argument("--goodput", action="store_true", help="useful, repeated and lost time, and what would help")
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    args = parser.parse_args(arguments)
    if args.watch and args.json:
        parser.error("--watch is for people: ask for --json as often as you like")
    from flip.runs.errors import COMPLETE, STORAGE, FlipError
    from jobs.common.cluster_profile import roots
    from jobs.runs import select

    try:
        runs = select.resolve(args.what, roots(args.root))
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    if args.watch:
        from jobs.reporting.watch import watch
        from jobs.submission.render import again

        return watch([run.path for run in runs], sys.stdout, again=again())
    if args.goodput:
        from jobs.reporting import goodput

        sums = goodput.of_runs(runs)
        print(json.dumps(goodput.as_dict(sums), indent=1) if args.json else goodput.render(sums))
        return 0
    rows = table(runs)
    print(json.dumps(rows, indent=1) if args.json else render(rows))
    return STORAGE if all(row["state"] == "unknown" for row in rows) else COMPLETE


def table(runs: list[RunDir]) -> list[dict[str, Any]]:
    """One row per run: sweep, run, cluster (the profile that it was submitted with), state, stage, samples, total,
    step, steps, loss, phase, samples_per_second, eta_seconds, attempts, restarts, progress_time (Unix time of the last
    progress that was written), reason. Null is what the run has not written yet.
    """
    from jobs.runs.clusters import states

    known = states(runs)
    return [row(run, known[run.path]) for run in runs]


def row(run: RunDir, state: JobState) -> dict[str, Any]:
    """One run's row. Speed and ETA are those of a running attempt only. What a damaged file would say is None; the
    reason names it."""
    from functools import partial

    from flip.runs.rundir import read_record
    from jobs.host import attempts
    from jobs.runs.clusters import cluster_of

    live, damage = _said(lambda: read_record(run.status))
    last, more = _said(lambda: attempts.last(run))
    newest = [run.attempt(state.attempt) / name for name in ("start.json", "end.json")] if state.attempt else []
    records = (run.identity, run.path / "job.json", run.result, run.cancel, *newest)
    damaged = [_said(partial(read_record, path))[1] for path in records]
    keys = ["stage", "samples", "total", "step", "steps", "loss", "phase"]
    found = {"sweep": run.sweep, "run": run.name, "state": state.state, **{key: live.get(key) for key in keys}}
    found["cluster"] = cluster_of(run)
    moving = state.state == "running" and live.get("attempt") == state.attempt
    for key in ("samples_per_second", "eta_seconds"):
        found[key] = live.get(key) if moving else None
    found["attempts"] = state.attempt
    found["restarts"] = max(0, state.attempt - 1)
    found["progress_time"] = live.get("time")
    reason = state.detail or (str(last.get("reason", "")) if state.state != "complete" else "")
    outage = str(live.get("storage") or "") if moving else ""
    troubles = [words for words in (outage, damage, more, *damaged) if words and words not in reason]
    found["reason"] = "; ".join(filter(None, [reason, *dict.fromkeys(troubles)]))
    return found


def _said(read: Callable[[], dict[str, Any] | None]) -> tuple[dict[str, Any], str]:
    """(what a file of a run says, ""), of one that cannot be read ({}, why): it must not hide the other runs."""
    from jobs.common.job import UNREADABLE

    try:
        return dict(read() or {}), ""
    except UNREADABLE as error:
        return {}, f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def render(rows: list[dict[str, Any]]) -> str:
    """The table as text, one block per sweep."""
    from itertools import groupby

    from jobs.common.text import plain
    from jobs.common.text import table as aligned

    blocks = []
    for sweep, group in groupby(rows, key=lambda r: r["sweep"]):
        several = len({r.get("cluster") for r in rows if r["sweep"] == sweep} - {None}) > 1
        shown = [{**({"cluster": r["cluster"]} if several else {}), **_shown(r)} for r in group]
        order = ["run", *(key for key in shown[0] if key != "run")]
        blocks.append(f"{plain(sweep)}\n{aligned([{key: s[key] for key in order} for s in shown], indent='  ')}")
    return "\n\n".join(blocks)


def _shown(r: dict[str, Any]) -> dict[str, str | None]:
    import time

    from jobs.common.text import count, duration

    done = None if r["samples"] is None or not r["total"] else f"{count(r['samples'])} / {count(r['total'])}"
    return {
        "run": r["run"],
        "state": r["state"],
        "stage": r["stage"],
        "samples": done,
        "step": count(r["step"]),
        "loss": None if r["loss"] is None else f"{r['loss']:.3f}",
        "samples/s": count(r["samples_per_second"]),
        "ETA": duration(r["eta_seconds"]),
        "attempt": str(r["attempts"]),
        "restarts": str(r["restarts"]),
        "last progress": None
        if r["progress_time"] is None
        else f"{duration(max(0, time.time() - r['progress_time']))} ago",
        "why": r["reason"] or None,
    }


if __name__ == "__main__":
    from jobs.common.cli import quietly

    sys.exit(quietly(main))
