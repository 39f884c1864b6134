"""Properties that must hold after a storm. Each proof is a function of the storm: it returns its evidence, or
raises."""

import subprocess
from dataclasses import dataclass

from flip.checkpoint.remote_folder import OWNER_FILE
from flip.config.derived import stage_spans
from flip.data.storage import s3
from flip.runs import checkpoint_folder
from flip.runs.rundir import OWNER, read_json
from tests.harness.common import metric_lines
from tests.harness.training_run import BATCH, INTERVAL, decoded_images
from tests.s3.servers import BUCKET, SECRET
from tests.storm.faults import EVERY
from tests.verdicts import check_data, check_equal

PROOFS = []


@dataclass(frozen=True)
class Loss:
    """Steps of an ended attempt that the next one repeated."""

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
    """every fault was injected, and its run resumed without help"""
    missing = [f"{run.run.name}: {run.trouble}" for run in storm.runs if run.trouble]
    assert not missing, "\n".join(missing)
    return f"{sum(len(run.done) for run in storm.runs)} faults"


@proof
def complete(storm):
    """every run is complete, and nothing was submitted again but by a person who had cancelled it, or whose owner was
    killed with its guard, or before it had a guard"""
    repeated, failed, submissions = storm.scene.submissions()
    assert not failed, "\n".join(failed)
    for run in storm.runs:
        assert run.run.result.exists(), run.story()
        last = read_json(run.run.attempt(run.run.newest_attempt()) / "end.json")
        assert last["action"] == "done", run.story()
    by_hand = sum("submitted again" in done.intervention for done in storm.interventions)
    assert submissions == storm.submissions + by_hand, f"Slurm got {submissions} submissions, {by_hand} by hand"
    return f"{len(storm.runs)} runs; {repeated} repeated submit commands started nothing"


@proof
def interventions(storm):
    """no run needed a person, except where one had held or cancelled it, or its owner was killed with its guard or
    before it had a guard, which `status` showed"""
    kinds = {done.strike.kind for done in storm.interventions}
    assert kinds <= {"held", "scancelled", "owner_killed_at_start", "owner_and_guard_killed"}, kinds
    return "; ".join(f"{done.strike.kind}: {done.intervention}" for done in storm.interventions) or "none"


@proof
def the_same_bits(storm):
    """final weights and moments, every loss and every score are bit-identical to those of an undisturbed run"""
    for run in storm.runs:
        check_equal(storm.calm(run), run, scores=_scores(run))
    return "all tensors of the last checkpoints"


def _scores(run):
    """Number of validations during training and at the end of each stage, plus the test."""
    every = run.config.evaluate.every
    ends = [span.end for span in stage_spans(run.config)]
    positions = {s for s in range(BATCH, ends[-1] + 1, BATCH) if s // every > (s - BATCH) // every} | set(ends)
    return len(positions) + 1


@proof
def the_ordered_ids(storm):
    """each global batch of every attempt has exactly the ids of the sample order, and the images of these ids"""
    images = decoded_images(storm.scene.folder / "data")
    for run in storm.runs:
        check_data(run, images)
    return f"{sum(len(batches) for run in storm.runs for batches in run.witnessed().values())} batches"


@proof
def each_step_once(storm):
    """the metric history has each step once"""
    for run in storm.runs:
        steps = [line["step"] for line in metric_lines(run.run)]
        assert steps == list(range(1, sum(span.steps for span in stage_spans(run.config)) + 1)), run.run.name
    return f"{sum(span.steps for run in storm.runs for span in stage_spans(run.config))} steps"


@proof
def steps_lost(storm):
    """repeated steps: none after a clean stop, else at most one save interval, plus one if a save was running in the
    background, plus one for a damaged checkpoint"""
    pairs = [(run, loss) for run in storm.runs for loss in losses(run)]
    beyond = [f"{run.run.name}: {loss}" for run, loss in pairs if loss.steps > loss.bound]
    assert not beyond, "\n".join(beyond)
    return f"{sum(loss.steps for _, loss in pairs)} steps after {len(pairs)} ends, at most {INTERVAL} per interval"


def losses(run):
    """The losses of all attempts that trained and were followed by another one. Each attempt resumes from the newest
    valid checkpoint."""
    trained = run.witnessed()
    result = []
    numbers = run.run.attempt_numbers()
    for n in numbers:
        end = read_json(run.run.attempt(n) / "end.json")
        following = (read_json(run.run.attempt(m) / "ready.json") for m in numbers if m > n)
        ready = next(filter(None, following), None)
        if not trained[n] or end is None or ready is None:
            continue
        steps = (max(trained[n]) + BATCH - ready["samples"]) // BATCH  # an attempt may stop where an earlier one was
        result.append(Loss(n, end["cause"], end["action"], steps, _bound(run, n, end)))
    return result


def _bound(run, n, end):
    """Maximum number of lost steps. A background save may be incomplete; then the checkpoint before it counts."""
    if end["code"] == 75:
        return 0
    damaged = any(EVERY[done.strike.kind].damages for done in run.done if done.attempt == n)
    return INTERVAL * (1 + (run.config.checkpoint.background == "yes") + damaged)


@proof
def no_twins(storm):
    """no two attempts of a run trained at the same time: an old one took at most one step after the next was ready"""
    for run in storm.runs:
        for n in run.run.attempt_numbers()[1:]:
            ready = read_json(run.run.attempt(n) / "ready.json")
            late = [line["step"] for line in run.lines(n - 1) if ready and line["time"] > ready["time"]]
            assert len(late) <= 1, f"{run.run.name}: attempt {n - 1} logged {late} after attempt {n} was ready"
    return f"{sum(len(run.run.attempt_numbers()) for run in storm.runs)} attempts"


@proof
def the_status(storm):
    """`status` showed each run as running or waiting in the order of its attempts, otherwise only as a person had
    stopped it or its owner was killed, and finally as complete"""
    for run in storm.runs:
        observed = [state for state in run.seen if state != ("queued", 0)]
        assert observed[-1] == ("complete", run.run.newest_attempt()), observed
        shown = {state for done in run.done for state in EVERY[done.strike.kind].shows}
        assert {state for state, _ in observed[:-1]} <= {"running", "waiting"} | shown, observed
        assert [n for _, n in observed] == sorted(n for _, n in observed), observed
    return f"{sum(len(run.seen) for run in storm.runs)} changes"


@proof
def nothing_left(storm):
    """nothing is left: no job, process or temporary file, no object without a checkpoint, no secret in a file"""
    queued = storm.scene.here.call("squeue", "-h", "-o", "%i %T %j").strip()
    assert not queued, queued
    done = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    running = [line for line in done.stdout.splitlines() if str(storm.scene.runs) in line]
    assert not running, "\n".join(running)
    for run in storm.runs:
        assert run.leftovers() == ([], []), run.leftovers()
    temporary = storm.scene.folder / "tmp"
    folders = [path.name for path in temporary.glob("flip-*")]
    for mark in temporary.glob(f"pymp-*/{OWNER}"):  # of ranks; those of the storm itself have no record
        folders.append(f"{mark.parent.name} of {read_json(mark)}")
    assert not folders, folders
    objects = {key for key, _ in s3.S3Storage().list(f"s3://{BUCKET}/checkpoints/")}
    remote = [run for run in storm.runs if (run.run.checkpoints / "url.json").exists()]
    referenced = {
        f"{checkpoint.record['url']}/{name}"
        for run in storm.runs
        for checkpoint in checkpoint_folder.checkpoints(run.run)
        if "url" in checkpoint.record
        for name in (*checkpoint.record["files"], checkpoint_folder.COMMIT_FILE)
    }
    referenced |= {f"{read_json(run.run.checkpoints / 'url.json')['url']}/{OWNER_FILE}" for run in remote}
    assert objects == referenced, f"without a checkpoint: {objects - referenced}, missing: {referenced - objects}"
    for path in storm.scene.runs.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    return f"{len(objects)} objects, all of a checkpoint but the owner records of {len(remote)} folders"
