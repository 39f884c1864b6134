"""A second tracker: one file of JSON lines per project. It stores every logged step."""

import json

from jobs.tracking.tracker import TrackedRun


class LinesTracker:
    def open(self, run: TrackedRun, step: int) -> int:
        run.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(run.folder / f"{run.project}.jsonl", "a+", encoding="utf-8")  # noqa: SIM115
        self._file.seek(0)
        lines = [json.loads(line) for line in self._file]
        self._write(open=run.id, name=run.name, group=run.group, config=dict(run.config))
        return max((line["step"] for line in lines if "step" in line), default=-1)

    def log(self, step, values):
        self._write(step=step, values=dict(values))

    def summary(self, values):
        self._write(summary=dict(values))

    def close(self):
        self._file.close()

    def _write(self, **record):
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
