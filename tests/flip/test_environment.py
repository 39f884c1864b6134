"""Tests of the record of what an attempt runs on: the name of the processor, and what counts as a change."""

import platform

import pytest

from flip import environment

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1

processor\t: 1
cpu family\t: 26
model\t\t: 2
model name\t: another
"""
ARM = """processor\t: 0
BogoMIPS\t: 2000.00
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd4f
"""


@pytest.mark.parametrize(
    "content, name",
    [
        (X86, "AMD EPYC (family 25, model 17)"),
        ("model name\t: a processor\n", "a processor"),
        (ARM, f"{platform.machine()} (implementer 0x41, part 0xd4f)"),
        ("", platform.machine()),
        (None, platform.machine()),
    ],
)
def test_processor_has_its_family_and_model(tmp_path, content, name):
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_text(content)
    assert environment.processor(str(path)) == name


@pytest.mark.parametrize(
    "before, now, changes",
    [
        ("AMD EPYC (family 25, model 17)", "AMD EPYC (family 25, model 17)", []),
        (
            "AMD EPYC (family 25, model 17)",
            "AMD EPYC (family 26, model 2)",
            ["processor AMD EPYC (family 25, model 17) -> AMD EPYC (family 26, model 2)"],
        ),
        ("AMD", "AMD EPYC (family 25, model 17)", ["processor AMD -> AMD EPYC (family 25, model 17)"]),
        ("", "AMD EPYC", ["processor none -> AMD EPYC"]),
    ],
)
def test_another_family_is_a_change(before, now, changes):
    assert environment.changes({"processor": before}, {"processor": now}) == changes
