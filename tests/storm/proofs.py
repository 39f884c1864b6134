"""What must hold after a storm. Each proof is a function of the storm; it returns what it found, or raises."""

import subprocess
from dataclasses import dataclass

from flip.config.derived import stage_spans
from flip.data.storage import s3
from flip.runs import commit
from flip.runs.rundir import read_json
from tests.harness.common import metric_lines
from tests.harness.training_run import BATCH, INTERVAL, decoded_hashes
from tests.s3.servers import BUCKET, SECRET
from tests.storm.faults import EVERY
from tests.verdicts import check_data, check_equal

PROOFS = []


@dataclass(frozen=True)
class Loss:
    """What the end of an attempt cost: steps that the next one did again."""

    attempt: int
    cause: str
    action: str
    steps: int
    bound: int


def proof(check):
    PROOFS.append(check)
    return check


@proof
def every_fault_struck(storm):
    """every fault struck, and its run trained again by itself"""
    missing = [f"{run.run.name}: {run.trouble}" for run in storm.runs if run.trouble]
    assert not missing, "\n".join(missing)
    return f"{sum(len(run.done) for run in storm.runs)} faults"


@proof
def complete(storm):
    """every run is complete, without a hand: nothing was submitted again, and nobody was asked"""
    typed, failed, submissions = storm.scene.submissions()
    assert not failed, "\n".join(failed)
    for run in storm.runs:
        assert run.run.result.exists(), run.story()
        last = read_json(run.run.attempt(run.run.newest_attempt()) / "end.json")
        assert last["action"] == "done", run.story()
    assert submissions == storm.submissions, f"Slurm got {submissions} submissions"
    return f"{len(storm.runs)} runs; {typed} more submit commands started nothing"


@proof
def the_same_bits(storm):
    """final weights and moments, every loss and score: bit for bit those of an undisturbed run"""
    for run in storm.runs:
        check_equal(storm.calm(run), run, scores=_scores(run))
    return "all tensors of the last commits"


def _scores(run):
    """Validations on the way, one at the border and one in the end, and the test."""
    every, ends = run.config.evaluate.every, [span.end for span in stage_spans(run.config)]
    positions = {s for s in range(BATCH, ends[-1] + 1, BATCH) if s // every > (s - BATCH) // every} | set(ends)
    return len(positions) + 1


@proof
def the_ordered_ids(storm):
    """each global batch held exactly the ordered ids, and the pictures of those ids, in every attempt"""
    hashes = decoded_hashes(storm.scene.folder / "data")
    for run in storm.runs:
        check_data(run, hashes)
    return f"{sum(len(batches) for run in storm.runs for batches in run.witnessed().values())} batches"


@proof
def each_step_once(storm):
    """the history that readers see has each step once"""
    for run in storm.runs:
        steps = [line["step"] for line in metric_lines(run.run)]
        assert steps == list(range(1, sum(span.steps for span in stage_spans(run.config)) + 1)), run.run.name
    return f"{sum(span.steps for run in storm.runs for span in stage_spans(run.config))} steps"


@proof
def steps_lost(storm):
    """steps done again: none after a clean stop, else at most an interval between commits, one more for a save that was
    under way in the background, one more for a damaged commit"""
    found = [(run, loss) for run in storm.runs for loss in losses(run)]
    beyond = [f"{run.run.name}: {loss}" for run, loss in found if loss.steps > loss.bound]
    assert not beyond, "\n".join(beyond)
    return f"{sum(loss.steps for _, loss in found)} steps after {len(found)} ends, at most {INTERVAL} an interval"


def losses(run):
    """Of every attempt that did not end the run. Each attempt goes on from the newest good commit."""
    trained, done, found = run.witnessed(), 0, []
    numbers = run.run.attempt_numbers()
    for n, after in zip(numbers, numbers[1:], strict=False):
        done = max([done, *(s + BATCH for s in trained[n])])
        ready = read_json(run.run.attempt(after) / "ready.json")
        end = read_json(run.run.attempt(n) / "end.json")
        if ready is None or end is None:
            continue  # it never came to train
        found.append(Loss(n, end["cause"], end["action"], (done - ready["samples"]) // BATCH, _bound(run, n, end)))
    return found


def _bound(run, n, end):
    """Steps. With a save in the background the newest may be on its way: then the one before counts."""
    if end["code"] == 75:
        return 0
    damaged = any(EVERY[done.strike.kind].damages for done in run.done if done.attempt == n)
    return INTERVAL * (1 + (run.config.checkpoint.background == "yes") + damaged)


@proof
def no_twins(storm):
    """no two attempts of a run trained together: an old one took one step at most when the next one was ready"""
    for run in storm.runs:
        for n in run.run.attempt_numbers()[1:]:
            ready = read_json(run.run.attempt(n) / "ready.json")
            late = [line["step"] for line in run.lines(n - 1) if ready and line["time"] > ready["time"]]
            assert len(late) <= 1, f"{run.run.name}: attempt {n - 1} logged {late} after attempt {n} was ready"
    return f"{sum(len(run.run.attempt_numbers()) for run in storm.runs)} attempts"


@proof
def the_status_told(storm):
    """`status` told each run as running and waiting in the order of its attempts, and complete in the end"""
    for run in storm.runs:
        told = [state for state in run.seen if state != ("queued", 0)]
        assert told[-1] == ("complete", run.run.newest_attempt()), told
        assert {state for state, _ in told[:-1]} <= {"running", "waiting"}, told
        assert [n for _, n in told] == sorted(n for _, n in told), told
    return f"{sum(len(run.seen) for run in storm.runs)} changes"


@proof
def nothing_left(storm):
    """nothing is left: no job, no process, no temporary file, no object that no commit names, no secret in a file"""
    queued = storm.scene.here.call("squeue", "-h", "-o", "%i %T %j").strip()
    assert not queued, queued
    done = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    running = [line for line in done.stdout.splitlines() if str(storm.scene.runs) in line]
    assert not running, "\n".join(running)
    for run in storm.runs:
        assert run.leftovers() == ([], []), run.leftovers()
    copies = [path.name for path in (storm.scene.folder / "tmp").glob("flip-*")]
    assert not copies, copies
    objects = {key for key, _ in s3.S3Storage().list(f"s3://{BUCKET}/checkpoints/")}
    named = {
        f"{found.record['url']}/{name}"
        for run in storm.runs
        for found in commit.commits(run.run)
        if "url" in found.record
        for name in (*found.record["files"], commit.COMMIT_FILE)
    }
    assert objects == named, f"too many {objects - named}, too few {named - objects}"
    for path in storm.scene.runs.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    return f"{len(objects)} objects, all named"
