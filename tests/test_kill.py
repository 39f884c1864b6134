"""Tests that a run which is killed and resumed many times ends with the same bits as an undisturbed run."""

import os
import random
import signal

import numpy as np
import pytest

import flip
from flip.config.derived import stage_spans
from flip.config.identity import identity
from flip.config.schema import StageImage
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.weights import write_weights
from flip.runs import checkpoint_folder
from flip.runs.rundir import read_json, write_json
from flip.tokenizer import train_byte_pairs
from jobs.common.cluster_profile import load_profile
from jobs.host.processes import read_stat
from jobs.local.backend import LocalBackend
from tests.flip.models.test_clip import as_radford
from tests.harness.leftovers import Leftovers
from tests.harness.training_run import BATCH, INTERVAL, TrainingRun, configuration, decoded_images
from tests.synthetic import caption, make_dataset, make_tokenizer
from tests.verdicts import check_data, check_equal, ends, price
from tools.commands import shards

pytestmark = pytest.mark.kill


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=200, shards=3, chunk=4, classes=8)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """Files that the visible-patch kernel decodes."""
    folder = make_dataset(tmp_path_factory.mktemp("jpegs"), samples=200, shards=3, chunk=4, classes=8, fmt="jpg")
    make_tokenizer(folder / "tokenizer.json")
    return folder


def inject_faults(arena):
    """Cause faults in both stages and at their border: all signals, twice in a row, in a save, a damaged checkpoint."""
    arena.submit()
    arena.wait_step(7)  # the first checkpoint is at step 5
    arena.kill(rank=arena.world - 1)
    arena.wait_attempt(2)
    arena.wait_step(8)
    arena.kill(number=signal.SIGTERM)
    arena.wait_attempt(3)
    arena.wait_step(12)
    arena.kill(rank=arena.world - 1, number=signal.SIGUSR2)
    arena.wait_attempt(4)
    arena.wait_step(17)
    arena.trap.touch()  # rank 0 dies between the last shard and commit.json of step 20
    arena.faults += 1
    arena.wait(lambda: not arena.trap.exists(), "a death before the checkpoint")
    arena.wait_attempt(5)
    arena.kill()  # the second kill in a row, before any checkpoint
    arena.wait_attempt(6)
    arena.wait_step(26)
    arena.kill_supervisor()
    damaged = arena.damage_newest()
    arena.submit()
    arena.wait_attempt(7)
    arena.wait_step(39)
    border = stage_spans(arena.config)[0].end
    arena.wait(
        lambda: checkpoint_folder.checkpoints(arena.run)[-1].samples_seen >= border, "the checkpoint at the border"
    )
    arena.kill()
    arena.wait_attempt(8)
    arena.wait_step(51)
    arena.kill(rank=arena.world - 1)
    arena.wait_attempt(9)
    arena.wait_step(54)
    arena.kill(number=signal.SIGTERM)
    arena.wait_over()
    return damaged


@pytest.mark.slow
def test_run_with_kernel_killed_many_times_ends_with_same_bits(jpegs, tmp_path):
    check_killed(configuration(jpegs, 2, decoder="simplejpeg"), 2, jpegs, tmp_path)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_run_killed_many_times_ends_with_same_bits(world, data, tmp_path):
    check_killed(configuration(data, world), world, data, tmp_path)


def check_killed(config, world, data, tmp_path):
    if world == 1:
        config.checkpoint.background = "no"
    else:
        config.checkpoint.background = "yes"
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    storm = TrainingRun(tmp_path, "storm", config)
    (tmp_path / "tmp").mkdir()
    calm.env["TMPDIR"] = str(tmp_path / "tmp")
    calm.env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "compiled")  # otherwise torch creates a folder on import
    calm.submit()
    calm.wait_over()
    assert list((tmp_path / "tmp").iterdir()) == []
    damaged = inject_faults(storm)
    check_equal(calm, storm)
    check_resumes(storm, damaged.path)
    check_data(calm, decoded_images(data))
    check_data(storm, decoded_images(data))


def test_run_restarts_from_its_agent_to_same_bits(data, tmp_path, tmp_path_factory, monkeypatch):
    """A rank is killed, a rank is stopped, and the agent itself is killed. The ranks of attempts 1 to 3 are forked from
    one agent; those of a killed agent save. Nothing of an attempt is left when the next one steps."""
    config = configuration(data, world=2, samples=(24, 4))
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    storm = TrainingRun(tmp_path, "storm", config, pause=0.3)  # ranks that live when a slow machine lets the test look
    calm.submit()
    calm.wait_over()
    left = Leftovers(tmp_path_factory.mktemp("t"))
    monkeypatch.setenv("TMPDIR", str(left.temporary))
    storm.submit()
    agents = []
    for n, step, fault in ((1, 7, "kill"), (2, 12, "stop"), (3, 17, "kill the agent")):
        storm.wait_step(step, attempt=n)  # after a checkpoint of this attempt
        left.note(row["pid"] for row in storm.ranks())
        agents.append({int(read_stat(row["pid"])[1][1]) for row in storm.ranks()})
        if fault == "kill the agent":
            os.kill(*agents[-1], signal.SIGKILL)
        else:
            storm.kill(rank=n - 1, number=signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        storm.wait_step(1, attempt=n + 1)
        assert left.find(n + 1) == [], fault
    storm.wait_over()
    assert agents[0] == agents[1] == agents[2] and len(agents[0]) == 1
    assert [end["cause"] for end in ends(storm, 4)] == ["crash", "hang", "stopped", "complete"]
    storm.wait(lambda: not left.find(), "the end of its temporary files")
    check_equal(calm, storm, scores=4)
    check_data(storm, decoded_images(data))


@pytest.mark.slow
def test_siglip_with_masked_unpadded_texts_resumes_to_same_bits(data, tmp_path):
    config = configuration(data, world=2, samples=(12, 4))
    config.model.objective = "siglip"
    config.model.temperature = 0.1
    config.model.max_logit_scale = 10_000.0
    config.model.text.padding = "mask"
    config.stages[0].text_mask = "0.5"
    config.stages[0].text_masking = "prioritised"
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    storm = TrainingRun(tmp_path, "storm", config)
    for arena in (calm, storm):
        arena.submit()
    storm.wait_step(7)
    storm.kill(rank=1)
    for arena in (calm, storm):
        arena.wait_over()
    check_equal(calm, storm, scores=3)
    assert storm.run.newest_attempt() == 2
    biases = [line["logit_bias"] for line in calm.lines(1)]
    assert len(biases) == 16 and len(set(biases)) > 10 and abs(biases[0] + 10) < 0.1  # the bias is trained


@pytest.mark.slow
def test_unlocked_tower_resumes_to_same_bits_on_both_sides_of_the_border(data, tmp_path):
    """Rank 1 is killed while the image tower is locked, at the border, and after it has moments."""
    config = configuration(data, world=2, samples=(12, 10))
    config.stages[0].locked = ["image"]
    config.evaluate.every = 0
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    storm = TrainingRun(tmp_path, "storm", config, pause=0.1)
    calm.submit()
    calm.wait_over()
    storm.submit()
    for attempt, step in enumerate((7, 13, 18), start=1):
        storm.wait_attempt(attempt)
        storm.wait_step(step)
        storm.kill(rank=1)
    storm.wait_over()
    check_equal(calm, storm, scores=3)
    assert storm.run.newest_attempt() == 4


def test_gpu_defaults_resume_to_same_bits(data, tmp_path):
    """The run has two copies of the weights, kept until the end of a step, and a single tile of the loss."""
    config = configuration(data, world=4, samples=(12, 4))
    config.compute.replicate = 2
    config.compute.reshard = "no"
    config.compute.loss_tile = 65_536
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    storm = TrainingRun(tmp_path, "storm", config, pause=0.2)
    calm.submit()
    calm.wait_over()
    storm.submit()
    storm.wait_step(7)
    storm.kill(rank=3)
    storm.wait_attempt(2)
    storm.wait_step(10, attempt=2)
    storm.kill(number=signal.SIGTERM)
    storm.wait_over()
    check_equal(calm, storm, scores=3)
    assert storm.run.newest_attempt() == 3


@pytest.mark.slow
def test_stop_request_travels_with_statistics_and_stalled_peer_of_killed_rank_is_ended(data, tmp_path):
    """As on GPUs, rank 0 waits in step 8 when rank 1 is killed. Later only rank 1 receives the stop signal."""
    config = configuration(data, world=2, samples=(12, 4))
    config.evaluate.every = 0
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    storm = TrainingRun(tmp_path, "storm", config, pause=0.2)
    storm.env |= {"KILL_REQUESTS": "with-statistics", "KILL_STALL": "0:8"}
    calm.submit()
    calm.wait_over()
    storm.submit()
    storm.wait_step(7)
    storm.kill(rank=1)
    storm.wait_attempt(2)
    storm.wait_step(10, attempt=2)
    storm.kill(rank=1, number=signal.SIGTERM)
    storm.wait_over()
    check_equal(calm, storm, scores=3)
    causes = [sorted(cause["cause"] for cause in storm.run.causes(n)) for n in storm.run.attempt_numbers()]
    assert causes == [[], ["stopped", "stopped"], ["complete", "complete"]]
    assert "killed by signal 9" in ends(storm, 1)[0]["reason"]


@pytest.mark.slow
def test_second_attempt_reuses_compiled_code_and_complete_run_deletes_it(data, tmp_path, monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # a test that compiled in this process has set them
        monkeypatch.delenv(name, raising=False)
    config = configuration(data, world=1, samples=(12, 4))
    config.stages = config.stages[:1]
    config.compute.compile = "yes"
    config.evaluate.every = 0
    config.evaluate.sets = []
    storm = TrainingRun(tmp_path, "storm", config, pause=0.2)
    storm.submit()
    storm.wait(lambda: storm.lines(1), "the first compiled step", seconds=280)
    first = {path.name for path in storm.run.compiled.rglob("*.so")}
    storm.kill(number=signal.SIGTERM)
    storm.wait(lambda: storm.lines(2), "a step of the second attempt", seconds=280)
    assert {path.name for path in storm.run.compiled.rglob("*.so")} == first != set()
    storm.wait_over()
    assert storm.run.result.exists() and storm.run.newest_attempt() == 2
    storm.wait(lambda: not storm.run.compiled.exists(), "the deletion of the compiled code")


@pytest.mark.slow
def test_clip_recipe_with_two_resolutions_resumes_to_same_bits(data, tmp_path):
    """A rank is killed with masked images and texts at 64 px, then again at 96 px with resampled positions."""
    train_byte_pairs([caption(i) for i in range(200)], 600, tmp_path / "tokenizer.json")
    config = configuration(data, world=2, samples=(12, 8))
    as_radford(config.model)
    config.data.tokenizer = str(tmp_path / "tokenizer.json")
    config.evaluate.every = 0
    config.stages[0].text_mask = "0.5"
    config.stages[1].image = StageImage(size=96)
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    storm = TrainingRun(tmp_path, "storm", config)
    for arena in (calm, storm):
        arena.submit()
    for attempt, step in enumerate((7, 18), start=1):
        storm.wait_attempt(attempt)
        storm.wait_step(step)
        storm.kill(rank=1)
    for arena in (calm, storm):
        arena.wait_over()
    check_equal(calm, storm, scores=3)
    assert storm.run.newest_attempt() == 3
    model = flip.load(calm.run.path)
    assert model.model.image.positions.shape == (1 + 144, 64)
    assert model.classify(np.zeros((2, 40, 50, 3), np.uint8), ["a red square", "a blue ring"]).shape == (2, 2)


def test_run_with_weights_has_the_same_order_in_any_world_and_resumes_to_same_bits(data, tmp_path):
    """Samples have one or two views in an epoch, and each view another mask."""
    values = np.repeat(np.resize([2.0, 2.0, 1.0], 50), 4)
    write_weights(tmp_path / "weights", Manifest.load(data), [values], 0.0, "a test")
    arenas = []
    for name, world in (("calm", 2), ("storm", 2), ("alone", 1)):
        config = configuration(data, world, samples=(16, 6))
        config.data.weights = str(tmp_path / "weights")
        config.data.lanes = 2
        config.data.block = 1
        config.evaluate.every = 0
        arenas.append(TrainingRun(tmp_path, name, config, pause=0.05 * (name == "storm")))
        arenas[-1].submit()
    calm, storm, alone = arenas
    for attempt, step in enumerate((7, 18), start=1):
        storm.wait_attempt(attempt)
        storm.wait_step(step)
        storm.kill(rank=1)
    for arena in arenas:
        arena.wait_over()
    check_equal(calm, storm, scores=3)
    assert storm.run.newest_attempt() == 3
    assert {checkpoint.record["order"] for checkpoint in checkpoint_folder.checkpoints(storm.run)} == {2}
    for arena in (storm, alone):
        check_data(arena, decoded_images(data))


@pytest.mark.slow
def test_stopped_run_resumes_over_moved_shards_to_same_bits(tmp_path):
    data = make_dataset(tmp_path / "data", samples=200, shards=3, chunk=4, classes=8)
    make_tokenizer(data / "tokenizer.json")
    config = configuration(data, world=1, samples=(12, 4))
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    calm.submit()
    calm.wait_over()
    storm = TrainingRun(tmp_path, "storm", config)
    write_json(storm.run.identity, identity(config, ""))
    storm.submit()
    storm.wait_step(7)
    storm.kill_supervisor()
    (tmp_path / "moved").mkdir()
    for shard in data.glob("*.tar"):
        shard.rename(tmp_path / "moved" / shard.name)
    assert shards.main(["move", str(data), "--to", str(tmp_path / "moved"), "--out", str(tmp_path / "manifest")]) == 0
    storm.config = configuration(data, world=1, samples=(12, 4))
    storm.config.data.manifest = str(tmp_path / "manifest")
    for item in storm.config.evaluate.sets:
        item.manifest = str(tmp_path / "manifest")
    storm.save_config()
    storm.submit()
    storm.wait_over()
    check_equal(calm, storm, scores=3)
    assert storm.run.newest_attempt() == 2 and min(storm.witnessed_of(2)) >= 5 * BATCH


@pytest.mark.slow
@pytest.mark.parametrize("is_stopped", [False, True], ids=["waits", "is stopped"])
def test_hung_rank_is_ended_and_run_resumes_to_same_bits(is_stopped, data, tmp_path):
    """A rank hangs in step 8. Its peer gets no error: it waits. The run ends with the same bits."""
    config = configuration(data, world=2)
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    calm.submit()
    calm.wait_over()
    config.monitor.hang_minutes = 0.15
    config.data.deadline = 5.0
    arena = TrainingRun(tmp_path, "hung", config)
    if not is_stopped:
        arena.env["KILL_STALL"] = "1:8"
    arena.submit()
    arena.wait_step(7)
    if is_stopped:
        arena.kill(rank=1, number=signal.SIGSTOP)
    arena.wait_attempt(2)
    (end,) = ends(arena, 1)
    assert (end["cause"], end["code"], end["action"]) == ("hang", 71, "requeue"), arena.story()
    if is_stopped:
        assert "rank 1: its process was stopped by a signal (SIGSTOP)" in end["reason"]
    else:
        assert "no progress for" in end["reason"] and "a step from S" in end["reason"]
        assert "in run_stage" in (arena.run.logs / "1" / "node0.err").read_text()
    arena.wait_over()
    check_equal(calm, arena)
    assert arena.leftovers() == ([], [])


@pytest.mark.slow
def test_run_requeues_after_full_disk_and_completes_with_space(data, tmp_path):
    """The attempt ends with 69 and deletes its partial checkpoint; the run completes when space is available."""
    arena = TrainingRun(tmp_path, "full", configuration(data, world=1, samples=(12, 4)))
    arena.env["KILL_FILE_BYTES"] = "300000"
    arena.submit()
    arena.wait(lambda: arena.run.newest_attempt() and ends(arena, 1)[0], "the end of the attempt")
    (end,) = ends(arena, 1)
    assert (end["cause"], end["code"], end["action"]) == ("storage", 69, "requeue") and end["delay"] > 0
    assert "could not be written" in end["reason"] and "Free space" in end["reason"]
    assert checkpoint_folder.checkpoints(arena.run) == [] and not list(arena.run.checkpoints.glob("*/*"))
    del arena.env["KILL_FILE_BYTES"]
    arena.submit()
    arena.wait_over()
    assert arena.run.result.exists(), arena.story()
    assert arena.leftovers() == ([], [])


def test_diverged_run_stops_for_good_without_checkpoint(data, tmp_path):
    config = configuration(data, world=1, samples=(12, 4))
    config.stages[0].base_lr = 1e30
    arena = TrainingRun(tmp_path, "wild", config, pause=0)
    arena.submit()
    arena.wait(lambda: arena.run.newest_attempt() and ends(arena, 1)[0], "the end of the attempt")
    (end,) = ends(arena, 1)
    assert (end["cause"], end["code"], end["action"]) == ("diverged", 76, "stop"), arena.story()
    assert checkpoint_folder.checkpoints(arena.run) == []


def test_nonfinite_gradient_on_single_rank_stops_run_before_checkpoint(data, tmp_path):
    """The attempt ends with 76 and records the samples of each rank; the previous checkpoint stays the newest."""
    config = configuration(data, world=2, samples=(12, 4))
    config.monitor.log_every = 100
    arena = TrainingRun(tmp_path, "nan", config, pause=0)
    arena.env["KILL_GRADIENT"] = "1:10"  # a multiple of the interval: the step would be saved
    arena.submit()
    arena.wait(lambda: arena.run.newest_attempt() and ends(arena, 1)[0], "the end of the attempt")
    (end,) = ends(arena, 1)
    assert (end["cause"], end["code"], end["action"]) == ("diverged", 76, "stop"), arena.story()
    assert "step 10, S = 160" in end["reason"] and "anomalies/1-10.0.json" in end["reason"]
    assert [saved.samples_seen for saved in checkpoint_folder.checkpoints(arena.run)] == [5 * BATCH]
    records = [read_json(arena.run.anomalies / f"1-10.{rank}.json") for rank in range(2)]
    assert records[0]["ids"] + records[1]["ids"] == arena.order().batch(9 * BATCH, BATCH)[0].tolist()
    assert {record["grad_norm"] for record in records} == {"nan"}
    arena.wait(lambda: arena.leftovers() == ([], []), "the end of all processes")


@pytest.mark.slow
def test_rank_exits_by_itself_after_losing_peer(data, tmp_path):
    """The rank exits within a step, without the launcher. The killed rank leaves no cause."""
    arena = TrainingRun(tmp_path, "lost", configuration(data, world=2, samples=(12, 4)))
    arena.cluster = LocalBackend(load_profile("local"), peer_grace=100)
    arena.submit()
    arena.wait_step(3)
    arena.kill(rank=1)
    arena.wait_attempt(2)
    (end,) = ends(arena, 1)
    assert [(cause["rank"], cause["cause"]) for cause in arena.run.causes(1)] == [(0, "peer_lost")], arena.story()
    assert end["action"] == "requeue", arena.story()
    arena.wait_over()


def check_resumes(arena, damaged):
    """Check that every attempt resumed from the newest valid checkpoint and that no fault cost more than its price."""
    steps = sum(span.steps for span in stage_spans(arena.config))
    trained = arena.witnessed()
    assert arena.run.newest_attempt() >= 10
    done = 0
    for n in arena.run.attempt_numbers()[1:]:
        before = ends(arena, n - 1)
        start = min(trained[n], default=None)
        if start is None:
            continue
        saved = before[-1]["commits"]
        replayed = done - start
        if n != int(damaged.name.rpartition("-")[2]) + 1:
            assert start == saved > 0, (n, arena.story())
            assert replayed <= (0 if before[-1]["cause"] == "stopped" else price(arena) * BATCH)
        else:  # the newest checkpoint was damaged: resumed from the previous checkpoint
            assert 0 < start < saved and replayed <= (INTERVAL + price(arena)) * BATCH
        done = max(trained[n]) + BATCH
        assert done > start
    total = sum(len(batches) for batches in trained.values())
    assert total <= steps + arena.faults * price(arena), total
    verdicts = [end["action"] for end in ends(arena, arena.run.newest_attempt())]
    assert verdicts[-1] == "done" and "stop" not in verdicts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_faults_leave_same_bits(seed, data, tmp_path):
    """Faults of random kinds occur at random steps, with both world sizes."""
    rng = random.Random(seed)
    config = configuration(data, world=1 + seed % 2, precision=("fp32", "bf16")[seed // 2 % 2])
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    storm = TrainingRun(tmp_path, "storm", config)
    calm.submit()
    calm.wait_over()
    storm.submit()
    for _ in range(8):
        n = storm.run.newest_attempt()
        last = max((line["step"] for k in range(1, n + 1) for line in storm.lines(k)), default=0)
        if last > 50:
            break
        storm.wait_step(max(INTERVAL + 1, last + rng.randrange(0, 6)))
        kind = rng.choice(["kill", "term", "usr2", "supervisor"])
        if kind == "supervisor":
            storm.kill_supervisor()
            storm.submit()
        else:
            number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr2": signal.SIGUSR2}[kind]
            storm.kill(rank=rng.randrange(storm.world), number=number)
        storm.wait_attempt(n + 1)
    storm.wait_over()
    check_equal(calm, storm)
    check_data(storm, decoded_images(data))
