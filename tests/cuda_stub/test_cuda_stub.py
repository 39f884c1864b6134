"""Steps on PyTorch's CUDA build above a stub of CUDA: devices, waits, graphs, collectives, attention.

``make test-cuda-stub`` runs them (half an hour; the first time 4.6 GB are installed).
"""

import json
import platform
import re
import subprocess
import sys

import pytest

from flip import model_costs
from tests.cuda_stub import build
from tests.flip.distributed.rehearsal import CASES
from tests.harness.common import ROOT

LIMIT = 3600
"""Seconds of a process. Its work is at most 90 s, which a busy machine or a quota of processor time stretches."""

pytestmark = [
    pytest.mark.cuda_stub,
    pytest.mark.slow,
    pytest.mark.timeout(LIMIT + 60),
    pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="torch has no build for CUDA"),
]
REHEARSAL = ROOT / "tests" / "flip" / "distributed" / "rehearsal.json"


ROWS = [f"{model}, {ranks} ranks" for model in ("H/14, recipe paper", "L/16, recipe paper", "B/16, recipe clip")
        for ranks in (1, 8, 64)]  # fmt: skip
"""Of ``rows``."""
GRAPHS = {"paper": (4, 2), "clip": (5, 3)}
"""Recipe -> graphs of a masked stage, and further ones of an unmasked stage: the pixels, blocks of the image tower, and
blocks of the text tower. The last block of a tower has another graph if it computes one query: that of texts, and of
images that are pooled by their class token."""


def on_stub(*words, capability=90, **variables):
    """Run a Python command on the stub."""
    environment = build.prepare(capability)
    python = environment.pop("STUB_PYTHON")
    return subprocess.run(
        [python, *words], cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=LIMIT
    )


def part(name, *words, **options):
    """What a part of ``rows`` prints."""
    done = on_stub("-m", "tests.cuda_stub.rows", name, *words, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


# -- not compiled: seconds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_traffic_is_that_of_rehearsal_and_memory_that_of_plan(case):
    """NCCL's own records of a step on the CUDA path, against the rehearsal with fake tensors on the CPU's."""
    seen = part(f"traffic of {case}")
    expected = json.loads(REHEARSAL.read_text(encoding="utf-8"))[str(case)]
    assert seen["collectives"] == expected["collectives"]
    config = case.config()
    plan = model_costs.stage_memory(config, config.stages[0])["total"] / 1e9
    print(f"{case}: {seen['GB']} GB, plan {plan:.2f} GB")
    assert seen["GB"] == pytest.approx(plan, rel=0.05)


@pytest.mark.parametrize("name", ["paper, 1", "paper, 8", "clip, 64"])
def test_steps_wait_for_nothing_and_use_one_device(name):
    """Two stages with a border, accumulated steps, a save, an evaluation and a stop request, by the trainer's own
    methods."""
    seen = part(f"tiny, recipe {name} ranks, not compiled")
    check_steps(seen)


def caches(folder):
    """Variables of processes that keep compiled code in a folder."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows of a model share what is equal."""
    return caches(tmp_path_factory.mktemp("compiled"))


def check_steps(seen):
    """Asserts of rows with and without compiled blocks."""
    for steps in (seen["steps"], seen["accumulated"], seen["unmasked"]):
        for step in steps:
            assert step["devices"] == ["cuda:0"]
            assert step["attention"]
        for step in steps[1:]:
            assert set(step["waits"]) <= {"wait cudaEventSynchronize"}, "the host waits for what it reads a step late"
    assert seen["breaks"] == {} and seen["save"]["pinned"]
    assert set(seen["save"]["waits"]) == {"wait cudaDeviceSynchronize"}
    evaluation = seen["evaluation"]
    assert (evaluation["outputs"], evaluation["weights"]) == (["torch.float32"] * 2, ["torch.float32"])
    features = {"wait copy to pageable memory": 1, "wait cudaStreamSynchronize": 1}
    assert evaluation["waits"][1] == features, "texts: the host waits for their features alone"
    assert seen.get("timeouts", [1_500_000]) == [1_500_000], "all groups have the timeout of the world"


@pytest.mark.parametrize("row", ROWS)
def test_compiled_steps_of_row(row, compiled):
    """Two stages with a border, accumulated steps, a save, an evaluation and a stop request, by the trainer's own
    methods, on models with all their blocks."""
    seen = part(row, **compiled)
    check_steps(seen)
    first, more = GRAPHS["clip" if "clip" in row else "paper"]
    counts = {name: [step["graphs"] for step in seen[name]] for name in ("steps", "accumulated", "unmasked")}
    assert counts == {
        "steps": [first, 0, 0],
        "accumulated": [first, 0],  # passes without gradients
        "unmasked": [more, 0, 0],
    }
    for name, planned in (("steps", "planned"), ("accumulated", "planned accumulated"), ("unmasked", "planned")):
        for step in seen[name]:
            assert step.get("collectives", {}) == {
                kind: [number, pytest.approx(size, abs=0.011)] for kind, (number, size) in seen[planned].items()
            }
            assert step["triton"] and step["spills"] == [] and not step["kernels without attributes"]
            assert set(step["cubins"]) <= {"cubin sm_90"}
    # Packed captions: all blocks but the last one of the text tower use flash by torch.nn.attention.varlen.
    kernels = {"flash", "flash backward"} if "clip" in row else set()
    assert seen["steps"][1]["attention"].keys() == {"cudnn", "cudnn backward"} | kernels
    assert re.findall(r": (\w+)(?:;|$)", seen["log"][0]).count("cudnn") == seen["log"][0].count("tokens")


@pytest.mark.parametrize("capability, kernel", [(80, "flash"), (100, "cudnn")])
def test_kernels_compile_for_capability_without_spills(capability, kernel, tmp_path):
    """ptxas writes into each cubin for which GPU it is, and the stack of each kernel."""
    step = part("one compiled step", capability=capability, **caches(tmp_path))
    assert step["cubins"].keys() == {f"cubin sm_{capability}"} and step["cubins"][f"cubin sm_{capability}"] > 20
    assert step["spills"] == [] and not step["kernels without attributes"] and step["graphs"] == 4
    assert step["attention"].keys() == {kernel, f"{kernel} backward"}


def test_compiled_code_serves_all_ranks_of_node_and_later_attempts_on_others(tmp_path):
    """Each process is a rank: what it finds in the caches of its node and in the run directory, and what it adds."""

    def step(local_rank, run, node):
        (tmp_path / run).mkdir(exist_ok=True)
        seen = part("compiled code", str(local_rank), str(tmp_path / run), **caches(tmp_path / node))
        print(local_rank, run, node, seen)
        return seen

    first = step(0, "run", "node")
    assert first["loaded"] == [0, 0] and first["compiled"][0] > 500 and first["copy"][0] == 1
    assert first["cache"]["autograd_cache_miss"] == GRAPHS["paper"][0]
    neighbour = step(3, "none", "node")
    assert neighbour["device"] == "cuda:0" and neighbour["compiled"] == [0, 0]
    later = step(5, "run", "other")
    assert later["loaded"][0] > 100 and later["compiled"][0] < first["compiled"][0] / 10
    for seen in (neighbour, later):
        assert not [name for name in seen["cache"] if name.endswith("miss")]


def test_start_binds_device_and_connects_groups_and_profiles_steps():
    seen = part("start")
    assert (seen["device"], seen["bound"]) == ("cuda:0", "cuda:0")
    assert [step.rpartition("group of ")[2] for step in seen["connecting"]] == ["training", "flags and counts", "saves"]
    assert seen["totals"] == ["int", "dict", "list"] and seen["traces"] == 1 and seen["communication"] == 0.0


@pytest.mark.parametrize(
    "asked, chosen", [("sdpa", "cudnn"), ("flash", "flash"), ("cudnn", "cudnn"), ("efficient", "efficient")]
)
def test_attention_is_the_kernel_that_is_asked_for(asked, chosen):
    """On compute capability 9.0 torch itself chooses cuDNN."""
    seen = part(f"attention {asked}")
    assert seen["step"].keys() == {chosen, f"{chosen} backward"}
    (line,) = seen["log"]
    assert line.startswith("stage masked, attention kernels: image, ")
    assert set(re.findall(r": (\w+)(?:;|$)", line)) == {chosen}


def test_kernel_without_plan_is_replaced_before_stage():
    """cuDNN plans on a real device, so on the stub it fails for every shape."""
    warning, line = part("fall-back")
    assert "the kernel cudnn fails" in warning and "flash" in line and "cudnn" not in line


@pytest.mark.parametrize("file, chosen, dots", [
    ("tests/flip/training/test_gpu.py", "pins or (completes and not yes)", "..."),
    ("tests/flip/training/test_gpu.py", "completes and yes", "."),
    ("tests/jobs/runtime/test_network_check.py", "links", "."),
])  # fmt: skip
def test_gpu_tests_that_need_no_values_pass(file, chosen, dots, tmp_path):
    """``train`` itself, from a configuration to a result, without and with compiled blocks; the network of a node."""
    plugin = ["-p", "tests.cuda_stub.plugin", "-p", "no:cacheprovider"]
    words = ["-m", "gpu", "-k", chosen, file]
    done = on_stub("-m", "pytest", "-q", *plugin, *words, **caches(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.split()[0] == dots, "all chosen tests ran"


# -- defects on purpose: each must be found ---------------------------------------------------------------------------


FOUND = {
    "tensor of the CPU in the step": "Expected all tensors to be on the same device",
    "item in the step": "called a synchronizing CUDA operation",
    "copy from pageable memory": "wait copy from pageable memory",
    "mesh over all ranks": r'"gathers of 64": \[\s+9,',
    "graph break in a block": r'"breaks": \{\s+"',
}
"""A defect -> what shows it, in the output of ``rows``."""


@pytest.fixture(scope="module")
def without_defect():
    return json.dumps(part("defect: none"), indent=1)


@pytest.mark.parametrize("defect", FOUND)
def test_defect_is_found(defect, without_defect):
    done = on_stub("-m", "tests.cuda_stub.rows", f"defect: {defect}")
    assert re.search(FOUND[defect], done.stdout + done.stderr), (done.stdout + done.stderr)[-3000:]
    assert not re.search(FOUND[defect], without_defect)


def test_missing_tokenizer_of_gpu_tests_is_found(tmp_path):
    """The defect that made the first row of ``make bench-gpu`` fail on every card."""
    source = (ROOT / "tests/flip/training/test_gpu.py").read_text(encoding="utf-8")
    broken = source.replace(', tokenizer=str(data / "tokenizer.json"))', ")")
    assert broken != source
    (tmp_path / "test_broken.py").write_text(broken, encoding="utf-8")
    plugin = ["-p", "tests.cuda_stub.plugin", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    done = on_stub("-m", "pytest", "-q", *plugin, "-m", "gpu", "-k", "pins", str(tmp_path / "test_broken.py"))
    assert done.returncode == 1 and "tokenizer.json" in done.stdout, done.stdout[-3000:]
