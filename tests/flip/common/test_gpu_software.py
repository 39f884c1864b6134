"""Tests what ranks on GPUs need from a machine: the driver for torch's CUDA release, a C compiler, Python.h."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from flip.common import gpu_software
from flip.runs.checks import OK, UNKNOWN, require
from flip.runs.errors import CAUSES, ConfigError, FlipError
from flip.runs.restart_policy import EndFacts, Limits, decide
from jobs.common.cluster_profile import ClusterProfile
from jobs.planning.software_checks import check_gpu_software

LOCAL = ClusterProfile("workstation", "local", gpus_per_node=1)
SLURM = ClusterProfile("far", "slurm", gpus_per_node=8)


@pytest.fixture
def torch_build(tmp_path, monkeypatch):
    """Set the CUDA release of the torch that this interpreter finds, as its version.py writes it."""

    def use(release):
        (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {release}\nhip = None\n")
        origin = str(tmp_path / "__init__.py")
        monkeypatch.setattr(gpu_software, "find_spec", lambda name: SimpleNamespace(origin=origin))

    return use


@pytest.fixture
def driver(monkeypatch):
    def use(release):
        monkeypatch.setattr(gpu_software, "driver_cuda", lambda: release)

    return use


def compute(compile="yes", device="cuda"):
    return SimpleNamespace(compute=SimpleNamespace(device=device, compile=compile))


@pytest.mark.parametrize("written, expected", [("'13.0'", "13.0"), ("'12.8'", "12.8"), ("None", "")])
def test_torch_cuda_reads_release_without_importing_torch(torch_build, written, expected):
    torch_build(written)
    assert gpu_software.torch_cuda() == expected


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_driver_cuda_asks_library_of_driver(tmp_path):
    library = tmp_path / "libcuda.so.1"
    source = "int cuDriverGetVersion(int *version) { *version = 12080; return 0; }"
    subprocess.run(["cc", "-shared", "-xc", "-", "-o", library], input=source, text=True, check=True)
    assert gpu_software.driver_cuda(str(library)) == "12.8"
    assert gpu_software.driver_cuda(str(tmp_path / "absent.so")) == ""


@pytest.mark.parametrize(
    "built, driver, fits",
    [("13.0", "12.8", False), ("13.0", "13.0", True), ("13.2", "13.0", True), ("12.8", "12.2", True),
     ("12.8", "13.0", True), ("13.0", "", True), ("", "12.8", True)],
)  # fmt: skip
def test_driver_fits_torch_of_its_major_release(built, driver, fits):
    assert (gpu_software.driver_defect(built, driver) == "") == fits


def test_compiler_is_found_where_triton_looks(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C compiler" in gpu_software.compiler_defect()
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(gpu_software.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert gpu_software.compiler_defect() == ""
    (tmp_path / "Python.h").unlink()
    assert str(tmp_path / "Python.h") in gpu_software.compiler_defect()
    monkeypatch.setenv("CC", "absent-cc -m64")
    assert "absent-cc" in gpu_software.compiler_defect()


def test_rank_names_defect_and_restart_policy_leaves_its_node_out(torch_build, driver, tmp_path, monkeypatch):
    """Another node may have what this one lacks; after three starts without a checkpoint the run stops."""
    torch_build("'13.0'")
    driver("12.8")
    with pytest.raises(FlipError, match="CUDA 12.8.*CUDA 13.0.*series 580 or newer") as raised:
        require(gpu_software.OF_RANKS, False)
    cause = {"cause": raised.value.cause, "code": CAUSES["crash"], "reason": str(raised.value), "host": "n3"}
    decision = decide([cause], EndFacts(70, "FAILED"), [], Limits(), False, False, False)
    assert (decision.action, decision.exclude) == ("requeue", ("n3",))
    driver("13.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(FlipError, match="no C compiler.*python3-dev"):
        require(gpu_software.OF_RANKS, True)
    require(gpu_software.OF_RANKS, False)
    (tmp_path / "cache" / "KEY").mkdir(parents=True)
    (tmp_path / "cache" / "KEY" / "cuda_utils.cpython-311.so").touch()  # of an earlier attempt
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    require(gpu_software.OF_RANKS, True)


def test_preflight_refuses_local_gpu_run_and_reports_requirements_of_nodes(torch_build, driver, tmp_path, monkeypatch):
    torch_build("'13.0'")
    driver("12.8")
    with pytest.raises(ConfigError, match="too old.*series 580 or newer"):
        check_gpu_software(LOCAL, cuda=True, compiled=True)
    (row,) = check_gpu_software(SLURM, cuda=True, compiled=True)
    assert row.state == UNKNOWN and "series 580 or newer" in row.text and "Python.h" in row.text
    driver("13.0")
    (row,) = check_gpu_software(LOCAL, cuda=True, compiled=False)
    assert row.state == OK and "torch for CUDA 13.0" in row.text
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match="no C compiler"):
        check_gpu_software(LOCAL, cuda=True, compiled=True)
    torch_build("None")
    with pytest.raises(ConfigError, match=r"not a build for CUDA.*docs/one_machine.md"):
        check_gpu_software(LOCAL, cuda=True, compiled=True)
    assert check_gpu_software(LOCAL, cuda=False, compiled=True) == []


def test_doctor_names_driver_series_for_torch_of_this_python(torch_build):
    torch_build("'13.0'")
    (row,) = check_gpu_software(SLURM, cuda=True, compiled=True)
    assert "CUDA 13.0" in row.text and "series 580 or newer" in row.text and "nvidia-smi" in row.remedy
    torch_build("None")
    (row,) = check_gpu_software(SLURM, cuda=True, compiled=True)
    assert "docs/one_machine.md" in row.remedy
    page = Path(__file__).parents[3] / "docs" / "one_machine.md"
    assert "## Before the first job on GPUs\n" in page.read_text(encoding="utf-8")
