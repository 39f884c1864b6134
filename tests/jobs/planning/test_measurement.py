"""Tests of the file of a measured machine: what is read back, what is refused, what has become outdated."""

import json

import pytest

from flip import environment
from flip.runs.errors import ConfigError
from jobs.planning import measurement
from jobs.planning.measurement import FAILED, MEASURED, Machine, MeasuredRow, Measurement, number, read_measurement


def example(*rows, **fields):
    machine = Machine("a processor", 96, 1000.0, "NVIDIA H100 80GB HBM3", 8, "570.86.10", "Linux")
    return Measurement("2026-11-29", 2, machine, {"torch": "2.13.0"}, rows, **fields)


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def test_file_is_read_back_as_it_was_written(tmp_path):
    rows = (MeasuredRow("matmul_bf16", "a product", MEASURED, {"tflops": 651.5}, seconds=2.5),)
    rows += (MeasuredRow("disk", "writes", FAILED, {}, "no space"),)
    wanted = example(*rows, names=["a1", "a2"], python="3.12.1", load=0.5, minutes=10.0)
    read = read_measurement(write(tmp_path / "measured.json", wanted.as_dict()))
    assert read.as_dict() == json.loads(json.dumps(wanted.as_dict()))
    assert read.origin == "measured 2026-11-29 on 2 nodes"
    assert read.row("matmul_bf16").values == {"tflops": 651.5}
    assert read.row("disk") is None and [row.name for row in read.kind("matmul")] == ["matmul_bf16"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"rows": None},
        {"rows": [{"name": "x", "what": "y", "status": "well"}]},
        {"rows": [{"name": "x", "what": "y", "status": "measured", "values": [1]}]},
        {"machine": {"host": "a1"}},
        {"packages": []},
        {"nodes": "two"},
    ],
)
def test_damaged_or_newer_file_is_refused_with_remedy(tmp_path, change):
    path = write(tmp_path / "measured.json", example().as_dict() | change)
    with pytest.raises(ConfigError, match="flip doctor --measure") as caught:
        read_measurement(path)
    assert path in str(caught.value)


def test_missing_file_and_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no measurement can be read"):
        read_measurement(str(tmp_path / "missing.json"))
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ConfigError, match="no measurement can be read"):
        read_measurement(str(tmp_path / "text.json"))


@pytest.mark.parametrize("value", [None, "fast", True, 0, -1, float("nan"), float("inf")])
def test_number_is_positive_and_finite(value):
    assert number(MeasuredRow("a", "b", MEASURED, {"x": value}), "x") is None
    assert number(MeasuredRow("a", "b", MEASURED, {"x": 3}), "x") == 3 and number(None, "x") is None


def test_outdated_names_changed_versions_of_packages_and_driver(monkeypatch):
    packages = {"torch": "2.14.0", "numpy": "2.1"}
    monkeypatch.setattr(environment, "environment", lambda: {"python": "3.12.1", "packages": packages})
    monkeypatch.setattr(measurement, "driver", lambda: "580.1.2")
    measured = example(python="3.12.1")
    assert "torch 2.13.0 -> 2.14.0" in measured.outdated() and "driver 570.86.10 -> 580.1.2" in measured.outdated()
    packages = {"torch": "2.13.0+cpu"}
    monkeypatch.setattr(environment, "environment", lambda: {"python": "3.12.1", "packages": packages})
    assert not any("torch" in change for change in measured.outdated()), "another build of the same release"
    monkeypatch.setattr(environment, "environment", lambda: {"python": "3.12.1", "packages": {}})
    monkeypatch.setattr(measurement, "driver", lambda: "")
    assert measured.outdated() == [], "a submit host may lack packages and a GPU"


def test_driver_version_is_read_from_its_file(tmp_path):
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Tue Jan 7\nGCC version: gcc 12.3.0\n")
    assert measurement.driver(str(path)) == "570.86.10" and measurement.driver(str(tmp_path / "none")) == ""
