"""Every number that plans assume about a machine, and the measured number that replaces it.

Constants stand here, and only here, until `flip doctor --measure` has measured them. ``measured`` of the cluster
profile names its file. The rows that plans read: ``step_*`` (arithmetic of a step), ``link_*`` (collectives in a node
and between nodes) and ``input_*`` (the cost of a sample on a core). Constants of NCCL are in ``flip.traffic``, assumed
speeds of a core in ``assumed_speeds.yaml``, a file of the same form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from flip.config.schema import Config, Stage
from flip.model_costs import find_accelerator, parameters
from flip.runs.errors import ConfigError
from flip.traffic import Links
from jobs.common.cluster_profile import ClusterProfile
from jobs.planning.core_speeds import ROW, SpeedTable, assumed_table, table_in
from jobs.planning.measurement import BUSY_CORES, REMEDY, MeasuredRow, Measurement, number, read_measurement

ARITHMETIC = 0.4
"""Share of a GPU's peak that a step reaches without communication. A roofline over the traced kernels of an H100
(650 TFLOP/s, 2.8 TB/s) gives 0.38 (B/16 at 75 %) to 0.47 (H/14 at 50 %); nothing was measured."""
USUAL_SHORT = 384
"""Shorter side of images, pixels: img2dataset's size for LAION in docs/laion.md."""
RECODED_SHORT = 256
"""Shorter side of images that plans propose to store."""
QUALITY_SHARE = 0.67
"""Bytes of a JPEG of quality 85 with restart markers, as a share of those of quality 95 with the same pixels."""
MARGIN = 1.25
"""Loader processes for each one that the GPUs need on average."""
USUAL_WORKERS = 8
"""Loader processes per rank if the cores of a node are unknown or plenty."""
LINKS = {"nvlink_gbps": "link_node", "network_gbps": "link_network"}
"""Field of the profile -> the row that measures it. Its value is the data sheet's, if any."""


def measurement_of(profile: ClusterProfile) -> Measurement | None:
    """The measurement that the profile names, if it is of the same GPU. Raises ConfigError for a damaged file."""
    if not profile.measured:
        return None
    measured = _read(profile.measured)
    if measured.rehearsal:
        raise ConfigError("a rehearsal measures nothing", profile.measured, remedy=REMEDY)
    if is_other_gpu(measured, profile):
        return None
    return measured


def is_other_gpu(measured: Measurement, profile: ClusterProfile) -> bool:
    """Whether the GPU of the profile is not the measured one, or the measured machine had none."""
    if not profile.gpus_per_node:
        return False
    return find_accelerator(measured.machine.gpu) != find_accelerator(profile.gpu) or not measured.machine.gpus


def arithmetic_share(config: Config, stage: Stage, profile: ClusterProfile) -> float:
    """Share of the peak that the arithmetic of a stage reaches: measured steps of the nearest model, else assumed."""
    rate = _step_rate(config, stage, profile, "cuda", "tflops")
    if rate is None or not profile.tflops:
        return ARITHMETIC
    return rate / profile.tflops


def core_gflops(config: Config, stage: Stage, profile: ClusterProfile) -> float:
    """GFLOP/s of a CPU core in training: measured steps of the nearest model, else those of the profile."""
    return _step_rate(config, stage, profile, "cpu", "core_gflops") or profile.core_gflops


def links_of(config: Config, profile: ClusterProfile) -> Links:
    """Measured speeds of links, else those of the profile."""
    speeds = [link_gbps(profile, name) or getattr(profile, name) for name in LINKS]
    return Links(config.resources.processes, *speeds)


def link_gbps(profile: ClusterProfile, name: str) -> float | None:
    """The measured speed of a link of GPUs, by its field of the profile; None without one."""
    measured = measurement_of(profile)
    if measured is None:
        return None
    row = measured.row(LINKS[name])
    if row is None or row.values.get("device") != "cuda":
        return None
    return number(row, "gbps")


def speed_table(profile: ClusterProfile) -> SpeedTable:
    """Speeds of a core: measured, else assumed. Raises ConfigError for a damaged file."""
    measured = measurement_of(profile)
    if measured is None or not measured.kind(ROW):
        return assumed_table()
    return table_in(measured, profile.measured, f"speeds of {_core(measured)}, {measured.origin}")


def described_arithmetic(profile: ClusterProfile) -> str:
    """The source of the arithmetic of GPUs, in words: "an assumed 40 % of 989 TFLOP/s (H100 SXM)"."""
    peak = f"of {profile.tflops:g} TFLOP/s ({profile.gpu or 'a GPU'})"
    measured = measurement_of(profile)
    rows = _steps(measured, "cuda", "tflops")
    if measured is None or not rows or not profile.tflops:
        return f"an assumed {100 * ARITHMETIC:g} % {peak}"
    shares = [100 * float(row.values["tflops"]) / profile.tflops for row in rows]
    return f"{_span(shares)} % {peak}, {measured.origin} (steps of {_models(rows)})"


def described_links(profile: ClusterProfile) -> str:
    """The speeds of links and their sources, in words."""
    speeds = []
    unknown = []
    for name in LINKS:
        speed = link_gbps(profile, name)
        measured = measurement_of(profile)
        if speed and measured:
            speeds.append(f"{speed:,.0f} Gbit/s ({name}, {measured.origin})")
        elif getattr(profile, name):
            speeds.append(f"{getattr(profile, name):g} Gbit/s ({name})")
        else:
            unknown.append(name)
    words = "no communication"
    if speeds:
        words = f"communication at {' and '.join(speeds)} a GPU"
    if unknown:
        words += f"; set {' and '.join(unknown)} in the profile to count that of runs with such links"
    return words


def described_cores(profile: ClusterProfile) -> str:
    """The speed of a CPU core in training and its source, in words."""
    measured = measurement_of(profile)
    rows = _steps(measured, "cpu", "core_gflops")
    if measured is None or not rows:
        return f"an assumed {profile.core_gflops:g} GFLOP/s a core"
    speeds = [float(row.values["core_gflops"]) for row in rows]
    return f"{_span(speeds)} GFLOP/s {_core(measured)}, {measured.origin} (steps of {_models(rows)})"


def remarks(profile: ClusterProfile) -> list[str]:
    """What a reader must know about the measurement: another GPU, or versions that have changed since."""
    if not profile.measured:
        return []
    measured = _read(profile.measured)
    if is_other_gpu(measured, profile):
        other = measured.machine.gpu or "a machine without GPUs"
        return [f"the measurement of {measured.date} is of {other}, not of {profile.gpu or 'this GPU'}: it is not used"]
    doubts = []
    if measured.load > BUSY_CORES:
        cores = f"{measured.load:g} of {measured.machine.cores} cores"
        doubts.append(f"other processes used {cores} during the measurement of {measured.date}: repeat it")
    if changes := measured.outdated():
        doubts.append(f"the measurement of {measured.date} is older than {', '.join(changes)}: repeat it")
    return doubts


def uses_measured_gpu(profile: ClusterProfile) -> bool:
    """Whether any number about GPUs was measured."""
    links = any(link_gbps(profile, name) for name in LINKS)
    return links or bool(_steps(measurement_of(profile), "cuda", "tflops"))


def _step_rate(config: Config, stage: Stage, profile: ClusterProfile, device: str, key: str) -> float | None:
    """The rate of measured steps: of the model nearest in size, linear in the mask between rows."""
    rows = _steps(measurement_of(profile), device, key)
    if not rows:
        return None
    wanted = math.log(parameters(config.model)["total"])
    sizes = {_size(row) for row in rows}
    nearest = min(sizes, key=lambda size: abs(math.log(size) - wanted))
    points = sorted((float(row.values["mask"]), float(row.values[key])) for row in rows if _size(row) == nearest)
    return float(np.interp(float(stage.mask), [mask for mask, _ in points], [rate for _, rate in points]))


def _steps(measured: Measurement | None, device: str, key: str) -> list[MeasuredRow]:
    """Measured steps on a device that have all the numbers that plans use."""
    rows = [row for row in _rows(measured, "step") if row.values.get("device") == device]
    return [row for row in rows if number(row, key) and number(row, "parameters") and _is_mask(row.values.get("mask"))]


def _span(values: Sequence[float]) -> str:
    """The least and the largest value: "38 to 47"."""
    return " to ".join(dict.fromkeys(f"{value:,.0f}" for value in (min(values), max(values))))


def _models(rows: Sequence[MeasuredRow]) -> str:
    return ", ".join(dict.fromkeys(str(row.values.get("size")) for row in rows))


def _core(measured: Measurement) -> str:
    """A core of the measured machine, with the name of its processor if that is known."""
    if not measured.machine.processor:
        return "a core"
    return f"a core of {measured.machine.processor}"


def _is_mask(value: Any) -> bool:
    try:
        return 0 <= float(value) < 1
    except (TypeError, ValueError):
        return False


def _size(row: MeasuredRow) -> float:
    return float(row.values["parameters"])


def _rows(measured: Measurement | None, kind: str) -> Sequence[MeasuredRow]:
    if measured is None:
        return []
    return measured.kind(kind)


_read = cache(read_measurement)  # a plan asks for it at each step
