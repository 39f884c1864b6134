"""job.json of runs whose jobs tests start by hand."""

from pathlib import Path

from flip.runs.rundir import RunDir, write_json

ROOT = Path(__file__).resolve().parents[2]


def write_job(run: RunDir, nodes: int = 1, processes: int = 1, **fields: object) -> None:
    """Write a job.json with all fields that a start needs. ``fields``: others, or in their place."""
    record = {
        "kind": "slurm",
        "folder": str(run.path),
        "snapshot": str(ROOT),
        "shape": {"processes": processes},
        "usable": [nodes],
        "exposed": [],
        "token": "t",
        "after": 0,
    }
    write_json(run.path / "job.json", {**record, **fields})


def write_formats(code: Path) -> Path:
    """Make ``code`` a snapshot of this version for the checks of a start. Returns it."""
    place = code / "flip" / "runs" / "formats.py"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes((ROOT / "flip" / "runs" / "formats.py").read_bytes())
    return code
