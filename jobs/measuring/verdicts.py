"""What works, what is slow and why, what does not work and why, and what to do: the verdicts of a measurement."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.common.text import shortened
from jobs.measuring.rows import NO_TIME
from jobs.planning.measurement import (
    BUSY_CORES,
    MEASURED,
    SKIPPED,
    TIME_LIMIT,
    MeasuredRow,
    Measurement,
    node_name,
    number,
)
from jobs.reporting.faults import PARTS

WORKS = "works"
SLOW = "slow"
BROKEN = "does not work"
UNKNOWN = "not measured"
ORDER = (BROKEN, SLOW, UNKNOWN, WORKS)
"""Verdicts in the order in which a reader needs them."""

PEER_SHARE = 0.9
"""Speed of a GPU as a share of the median of its peers, below which it is named."""
DATASHEET_SHARE = 0.5
LOW_UTILISATION = 0.3
MEMORY_SHARE = 1.1
"""Measured memory as a share of the plan's, above which plans are wrong."""
INPUT_MARGIN = 1.25
REPLACE_MILLISECONDS = 100.0
WRITE_MEGABYTES = 50.0
VISIBLE_MILLISECONDS = 3000.0
READ_MILLISECONDS = 100.0
BUSY_SHARE = 0.8
"""Time of kernels as a share of a step, below which the host is named as the cause."""
LOAD_SHARE = 0.5
"""Share of its cores that other processes used on a slow node, per share of speed that it lacks: less is no cause."""
THROTTLED_SECONDS = 0.1
"""CPU seconds for which a limit has stopped the row of products, above which it is named as the cause."""
RESUME_SECONDS = 60.0
SPREAD = 0.5
"""(slowest - fastest) / median of steps, above which they are uneven."""
MORE = "Give it more --minutes; without --cluster, rows that are measured are not run again"
READ_AHEAD = "Raise data.workers and data.buffer, so that more reads wait at once, or copy the shards nearer"
RECODE = "flip shards recode MANIFEST --short 256 --out NEW_FOLDER"
NO_SPACE = re.compile("No space left on device|quota exceeded|are free", re.IGNORECASE)
SPACE = "Free some, raise the quota, or name another folder: export FLIP_RUNS=FOLDER"
REQUEUE = (
    "Ask the administrator for SchedulerParameters=requeue_delay, or before Slurm 25.11 a lower cred_expire of AuthInfo"
)
RESUME_REMEDIES = {
    "start": "Put the code and its environment on a faster file system: imports take most of a start",
    "restore": "Name a faster folder for runs: export FLIP_RUNS=FOLDER",
}
"""Longest part of a slow restart -> what to do."""
REMEDIES = {
    "gpus": "Name the partition that has them, or correct gpus_per_node of the profile",
    "disk": "Name another folder for runs: export FLIP_RUNS=FOLDER, or runs_root of the profile",
    "save": "Check the space and the limits of the folder of runs",
    "peers": "Look at its log below .measure of the folder of runs, and at its state in Slurm: sinfo -R",
    "link": "Check NCCL_SOCKET_IFNAME, or GLOO_SOCKET_IFNAME, and the firewall between the nodes",
    "input": "Check the manifest: flip shards verify MANIFEST",
    "reads": "Check the manifest: flip shards verify MANIFEST",
}
"""Kind of a row -> what to do if it fails."""
AGAIN = "Run it again with --only {row}; if it fails again, report it with this page"
"""The same for all other rows."""


@dataclass(frozen=True)
class MachineVerdict:
    """One line: about what, how it is, why, and what to do."""

    about: str
    verdict: str
    because: str
    then: str = ""


def judge(measurement: Measurement) -> list[MachineVerdict]:
    """All verdicts, the worst first."""
    verdicts = [*_busy(measurement), *_failures(measurement)]
    for judged in JUDGES:
        verdicts += judged(measurement)
    return sorted(verdicts, key=lambda verdict: ORDER.index(verdict.verdict))


def _busy(measurement: Measurement) -> Iterator[MachineVerdict]:
    if is_busy(measurement):
        cores = measurement.machine.cores
        because = f"other processes used {measurement.load:g} of {cores} cores: all speeds here are too low"
        yield MachineVerdict("load of the machine", SLOW, because, "Measure again while nothing else runs")


def is_busy(measurement: Measurement) -> bool:
    """Whether other processes used so much that each speed is doubtful: then no uneven one is a trouble of its own."""
    return measurement.load > BUSY_CORES


def _failures(measurement: Measurement) -> Iterator[MachineVerdict]:
    """Rows that failed, and those for which no time was left."""
    full: dict[str, str] = {}
    for row in measurement.rows:
        if row.status not in (MEASURED, SKIPPED) and NO_SPACE.search(row.detail):
            full.setdefault("".join(row.what.partition(", node")[1:]), row.detail)
    for where, detail in full.items():
        because = re.sub(r"^(OSError: )?(\[Errno \d+\] )?", "", detail)
        yield MachineVerdict(f"space of the folder of runs{where}", BROKEN, because, SPACE)
    for row in measurement.rows:
        if row.status in (MEASURED, SKIPPED) or NO_SPACE.search(row.detail):
            continue
        if row.status == TIME_LIMIT and "link_" in row.name:
            because = f"{row.detail}: packets between the processes may be dropped"
            yield MachineVerdict(row.what, BROKEN, because, _remedy(row))
        elif row.status == TIME_LIMIT:
            yield MachineVerdict(row.what, UNKNOWN, row.detail, MORE)
        else:
            yield MachineVerdict(row.what, BROKEN, row.detail or row.status, _remedy(row))


def _left_out(measurement: Measurement) -> Iterator[MachineVerdict]:
    """One verdict for all rows for which no time was left."""
    late = [row.what for row in measurement.rows if row.status == SKIPPED and row.detail == NO_TIME]
    subject = f"{len(late)} rows"
    if len(late) == 1:
        subject = late[0]
    if late:
        yield MachineVerdict(subject, UNKNOWN, f"no time was left for {'; '.join(late)}", MORE)


def _arithmetic(measurement: Measurement) -> Iterator[MachineVerdict]:
    row = measurement.row("matmul")
    if row is None:
        return
    devices: Sequence[dict[str, Any]] = row.values["devices"]
    rates = [float(device["bf16"]) for device in devices]
    middle = statistics.median(rates)
    slow = [device for device in devices if float(device["bf16"]) < PEER_SHARE * middle]
    for device in slow:
        because = f"{device['bf16']:g} TFLOP/s in bf16, its peers {middle:g}"
        remedy = "Compare its clocks and temperature with those of its peers: nvidia-smi -q -d CLOCK,TEMPERATURE"
        yield MachineVerdict(f"GPU {device['number']}", SLOW, because, remedy)
    peak = devices[0].get("datasheet")
    because = f"{middle:g} TFLOP/s in bf16" + (f", {100 * middle / peak:.0f} % of the data sheet" if peak else "")
    if peak and middle < DATASHEET_SHARE * peak:
        yield MachineVerdict(
            "products of matrices", SLOW, because, "Check power limits and clocks: nvidia-smi -q -d POWER,CLOCK"
        )
    elif not slow:
        yield MachineVerdict("products of matrices", WORKS, because)


def _copies(measurement: Measurement) -> Iterator[MachineVerdict]:
    row = measurement.row("copies")
    if row is None:
        return
    rates = {device["number"]: float(device["gbytes"]) for device in row.values["devices"]}
    middle = statistics.median(rates.values())
    slow = {gpu: rate for gpu, rate in rates.items() if rate < PEER_SHARE * middle}
    for gpu, rate in slow.items():
        because = f"{rate:g} GB/s from the host, its peers {middle:g}"
        remedy = (
            "Compare its slot: nvidia-smi --query-gpu=index,pcie.link.gen.current,pcie.link.width.current --format=csv"
        )
        yield MachineVerdict(f"copies to GPU {gpu}", SLOW, because, remedy)
    if not slow:
        place = "within memory" if row.values.get("device") == "cpu" else "to each GPU"
        yield MachineVerdict(row.what, WORKS, f"{middle:g} GB/s {place}")


def _steps(measurement: Measurement) -> Iterator[MachineVerdict]:
    for row in measurement.kind("step"):
        values = row.values
        model = values["size"]
        if values.get("device") == "cpu":
            model = f"a small model ({model})"
        subject = f"training of {model}, mask {values['mask']}"
        share = number(row, "utilisation")
        words = f"{values['samples_per_second']:,.0f} samples/s"
        if share:
            words += f", {100 * share:.0f} % of the peak"
        memory = number(row, "megabytes")
        planned = number(row, "planned_megabytes")
        if values.get("device") == "cuda" and memory and planned and memory > MEMORY_SHARE * planned:
            because = f"a step needs {memory:,.0f} MB, and plans count {planned:,.0f} MB"
            yield MachineVerdict(
                f"memory of {values['size']}", SLOW, because, "Leave more memory free, and report it with this page"
            )
        if values.get("recompilations"):
            because = f"{words}; {values['recompilations']} graphs were compiled again after the first steps"
            yield MachineVerdict(subject, SLOW, because, "Report it with this page")
        elif share and share < LOW_UTILISATION:
            because, remedy = _low_because(measurement, values)
            yield MachineVerdict(subject, SLOW, f"{words}; {because}", remedy)
        elif float(values.get("spread", 0)) > SPREAD and not is_busy(measurement):
            because = f"{words}, but the slowest step takes {100 * float(values['spread']):.0f} % of the median longer"
            yield MachineVerdict(subject, SLOW, because, "Measure again while nothing else runs")
        else:
            yield MachineVerdict(subject, WORKS, words)


def _low_because(measurement: Measurement, step: Mapping[str, Any]) -> tuple[str, str]:
    """Why a step is slow, and what to do: the card, the host, or kernels. It has neither input nor communication."""
    row = measurement.row("matmul")
    if row is not None:
        card = row.values["devices"][0]
        if card["bf16"] < DATASHEET_SHARE * (card.get("datasheet") or 0):
            return "the card is slow: products of matrices are, too", "Check power limits: nvidia-smi -q -d POWER,CLOCK"
    because = "its kernels are slow: products of matrices are not"
    trace = measurement.row("trace")
    if trace is None or any(trace.values[key] != step[key] for key in ("size", "mask")):
        return because, "Look at the trace: make bench-gpu ONLY=trace"
    busy = trace.values["busy"] * trace.values["milliseconds"] / step["milliseconds"]  # the profiler slows the host
    if busy < BUSY_SHARE:
        because = f"kernels run for {100 * busy:.0f} % of a step: the host launches them too slowly"
        return because, "Give a GPU more pairs (stages.batch), and see that other processes leave its cores free"
    longest = sorted(trace.values["longest"].items(), key=lambda kernel: -kernel[1])[:3]
    names = ", ".join(f"{name[:40]} {100 * share:.0f} %" for name, share in longest)
    return f"{because}; the longest: {names}", "Look at the trace: make bench-gpu ONLY=trace"


def _links(measurement: Measurement) -> Iterator[MachineVerdict]:
    for name, subject in (("link_node", "communication in a node"), ("link_network", "communication between nodes")):
        row = measurement.row(name)
        if row is not None:
            backend = "gloo between processes" if row.values.get("device") == "cpu" else "NCCL"
            yield MachineVerdict(subject, WORKS, f"{row.values['gbps']:,.1f} Gbit/s per rank and direction ({backend})")
            yield from _slow_links(row)


def _slow_links(row: MeasuredRow) -> Iterator[MachineVerdict]:
    """Links of GPUs that are slower than their peers. Processes on CPUs share one link, and two GPUs have no other."""
    links = row.values.get("links", ())
    if row.values.get("device") != "cuda" or len(links) < 3:
        return
    middle = statistics.median(link["gbytes"] for link in links)
    what = "node" if row.values["nodes"] > 1 else "GPU"
    for link in links:
        if link["gbytes"] < PEER_SHARE * middle:
            first, second = link["between"]
            because = f"{link['gbytes']:g} GB/s in each direction, its peers {middle:g}"
            remedy = REMEDIES["link"]
            if what == "GPU":
                remedy = f"Look at its links: nvidia-smi nvlink --status -i {first}"
            yield MachineVerdict(f"link of {what} {first} and {what} {second}", SLOW, because, remedy)


def _input(measurement: Measurement) -> Iterator[MachineVerdict]:
    for row in measurement.kind("input"):
        yield _input_of(measurement, row)


def _input_of(measurement: Measurement, row: MeasuredRow) -> MachineVerdict:
    """The verdict of a data set: can the cores feed the GPUs, and what takes most of the time of a sample?"""
    subject = f"input{row.what.partition(',')[2]}"
    fastest = min(row.values["rows"], key=lambda each: float(each["microseconds"]))
    per_core = 1e6 / float(fastest["microseconds"])
    kernel = "with" if fastest["kernel"] else "without"
    words = f"{per_core:,.0f} samples/s a core at mask {fastest['mask']:g}, {kernel} the visible-patch kernel"
    words += f"; {100 * row.values['shares'][row.values['limit']]:.0f} % of its time is {row.values['limit']}"
    needed = _needed_cores(measurement, row)
    if needed > measurement.machine.cores:
        because = f"{words}: the GPUs of a node need {needed:,} cores, and it has {measurement.machine.cores}"
        return MachineVerdict(subject, SLOW, because, f"Store smaller images: {RECODE}")
    if not fastest["kernel"] and row.values.get("without_kernel_because"):
        because = f"{words}: {row.values['without_kernel_because']}"
        return MachineVerdict(subject, SLOW, because, "Install the kernel: make install")
    return MachineVerdict(subject, WORKS, words)


def _needed_cores(measurement: Measurement, costs: MeasuredRow) -> int:
    """Cores that feed the GPUs of a node at the most demanding of the measured steps; 0 without GPUs."""
    needed = 0.0
    for step in _cuda_steps(measurement):
        rows = [each for each in costs.values["rows"] if float(each["mask"]) == float(step.values["mask"])]
        cheapest = min(float(each["microseconds"]) for each in rows or costs.values["rows"])
        needed = max(needed, float(step.values["samples_per_second"]) * cheapest / 1e6)
    return math.ceil(INPUT_MARGIN * needed * measurement.machine.gpus)


def _reads(measurement: Measurement) -> Iterator[MachineVerdict]:
    row = measurement.row("reads")
    if row is None:
        return
    values = row.values
    speed = float(values[f"megabytes_per_second_{values['processes']}"])
    milliseconds = float(values.get("read_milliseconds", 0))
    words = f"{speed:,.0f} MB/s with {values['processes']} processes, {milliseconds:.3g} ms a read"
    if values["cached"]:
        words += " (from the page cache)"
    rates = [float(step.values["samples_per_second"]) for step in _cuda_steps(measurement)]
    needed = INPUT_MARGIN * max(rates, default=0) * measurement.machine.gpus * float(values["bytes_per_sample"]) / 1e6
    if speed < needed:
        because = f"{words}: the GPUs of a node need {needed:,.0f} MB/s"
        yield MachineVerdict(row.what, SLOW, because, f"Store the shards nearer, or smaller images: {RECODE}")
    elif milliseconds > READ_MILLISECONDS:
        because = f"{words}: the storage has a high latency"
        yield MachineVerdict(row.what, SLOW, because, READ_AHEAD)
    else:
        yield MachineVerdict(row.what, WORKS, words)


def _cuda_steps(measurement: Measurement) -> list[MeasuredRow]:
    return [step for step in measurement.kind("step") if step.values.get("device") == "cuda"]


def _disk(measurement: Measurement) -> Iterator[MachineVerdict]:
    row = measurement.row("disk")
    if row is None:
        return
    values = row.values
    if not values["locks_exclude"]:
        because = "two processes hold the same lock at once: two attempts of a run could write at once"
        yield MachineVerdict("locks", BROKEN, because, REMEDIES["disk"])
    words = f"writes {values['write_megabytes_per_second']:,.0f} MB/s, replaces a file in"
    words += f" {values['replace_milliseconds']:.3g} ms"
    if values["replace_milliseconds"] > REPLACE_MILLISECONDS:
        because = f"{words}: each state file of a run waits for that"
        yield MachineVerdict("folder of runs", SLOW, f"{because}. The storage has a high latency", REMEDIES["disk"])
    elif values["write_megabytes_per_second"] < WRITE_MEGABYTES:
        yield MachineVerdict("folder of runs", SLOW, f"{words}: saves take long", REMEDIES["disk"])
    else:
        yield MachineVerdict("folder of runs", WORKS, words)


def _saves(measurement: Measurement) -> Iterator[MachineVerdict]:
    row = measurement.row("save")
    if row is None:
        return
    values = row.values
    if not values["equal"]:
        yield MachineVerdict(
            "save and restore", BROKEN, "the restored tensors differ from those that were saved", REMEDIES["disk"]
        )
        return
    words = f"{values['megabytes']:,} MB are saved in {values['save_seconds']:.3g} s, of which training waits"
    words += f" {values['stall_seconds']:.2g} s, and restored in {values['restore_seconds']:.3g} s"
    yield MachineVerdict("save and restore", WORKS, words)


def _losses(measurement: Measurement) -> Iterator[MachineVerdict]:
    row = measurement.row("losses")
    if row is None:
        return
    wrong = [each for each in row.values["rows"] if not _is_near(each)]
    for each in wrong:
        because = "the loss is not finite"
        if each["largest_difference"] is not None:
            because = f"the loss differs by {100 * each['largest_difference']:.2g} % from fp32 without compilation;"
            because += f" {100 * each['tolerance']:g} % are expected"
        yield MachineVerdict(
            f"losses in {each['form']}", BROKEN, because, "Report it with this page; train in fp32 until then"
        )
    if not wrong:
        most = max(each["largest_difference"] for each in row.values["rows"])
        forms = "; ".join(each["form"] for each in row.values["rows"])
        words = f"{row.values['steps']} steps in {forms} differ by {100 * most:.2g} % at most from fp32, eager"
        yield MachineVerdict("losses", WORKS, words)


def _is_near(form: Mapping[str, Any]) -> bool:
    largest = form["largest_difference"]
    return largest is not None and largest <= form["tolerance"]


def _faults(measurement: Measurement) -> Iterator[MachineVerdict]:
    for row in measurement.kind("fault"):
        yield _fault(row)


def _fault(row: MeasuredRow) -> MachineVerdict:
    """The verdict of a row of faults."""
    values = row.values
    differing = values["different_tensors"]
    if differing:
        because = f"after it {len(differing)} tensors differ from an undisturbed run: {shortened(differing, 2)}"
        return MachineVerdict(row.what, BROKEN, because, _remedy(row))
    place = ""
    if values.get("nodes", 1) > 1:
        place = f" on {values['nodes']} nodes"
    parts = {part: float(values[f"{part}_seconds"]) for part in PARTS if f"{part}_seconds" in values}
    words = f"the next step came after {values['next_step_seconds']:g} s{place}"
    if parts:
        words += f" ({', '.join(f'{part} {seconds:g}' for part, seconds in parts.items())})"
    words += f", and the weights of {values['steps']} steps are those of an undisturbed run, bit for bit"
    if values["next_step_seconds"] <= RESUME_SECONDS:
        return MachineVerdict(row.what, WORKS, words)
    delay = values.get("requeue_seconds", 0)
    if delay > RESUME_SECONDS / 2:
        words += f"; of these seconds, Slurm waits {delay:g} before it starts a requeued job ({values['setting']})"
        return MachineVerdict(row.what, SLOW, words, REQUEUE)
    longest = max(parts, key=lambda part: parts[part], default="")
    return MachineVerdict(row.what, SLOW, words, RESUME_REMEDIES.get(longest, "Report it with this page"))


def _remedy(row: MeasuredRow) -> str:
    """What to do if a row fails, of this node or of another one (``jobs.measuring.node.merged``)."""
    name = re.sub(r"^node\d+_", "", row.name)
    return REMEDIES.get(name.split("_")[0], AGAIN).format(row=name)


def _nodes(measurement: Measurement) -> Iterator[MachineVerdict]:
    """Files and locks between nodes, and nodes that are slower than the others or have other packages."""
    row = measurement.row("nodes")
    if row is not None:
        visible = row.values["visible_milliseconds"]
        words = f"a file and its answer are visible after {visible:.3g} ms, locks exclude other nodes"
        if not row.values["locks_exclude"]:
            because = "a node gets a lock that another one holds: two attempts of a run could write at once"
            yield MachineVerdict("folder of runs, between nodes", BROKEN, because, REMEDIES["disk"])
        elif visible > VISIBLE_MILLISECONDS:
            yield MachineVerdict(
                "folder of runs, between nodes", SLOW, words, "Mount it with a shorter attribute cache"
            )
        else:
            yield MachineVerdict("folder of runs, between nodes", WORKS, words)
    peers = measurement.row("peers")
    if peers is None:
        return
    for entry in peers.values["versions"]:
        because = f"packages differ from those of the first node: {entry['difference']}"
        yield MachineVerdict("packages of nodes", BROKEN, because, "Install the same packages on all nodes")
    slowest: dict[int, dict[str, Any]] = {}
    for entry in peers.values["slow"]:
        worst = slowest.setdefault(entry["node"], entry)
        if entry["value"] / entry["peers"] < worst["value"] / worst["peers"]:
            slowest[entry["node"]] = entry
    for node, entry in slowest.items():
        share = 1 - entry["value"] / entry["peers"]
        what = next((row.what for row in measurement.rows if row.name == entry["row"]), entry["row"])
        unit = entry["number"].split(" ")[-1].replace("_", " ")
        because = f"{100 * share:.0f} % slower than its peers in {what} ({unit}): {entry['value']:.4g}, peers"
        because += f" {entry['peers']:.4g}"
        remedy = "Look at its clocks and limits; exclude it if it stays"
        if not measurement.names:
            remedy += "; --names shows its host"
        stopped = entry.get("throttled_seconds", 0)
        if stopped > THROTTLED_SECONDS:
            because += f"; a limit of its cgroup has stopped its processes for {stopped:g} CPU seconds"
            remedy = "Raise the CPU limit of its cgroup (of the container, or of Slurm)"
        elif entry["load"] > max(BUSY_CORES, LOAD_SHARE * share * measurement.machine.cores):
            because += f"; other processes used {entry['load']:g} of its cores"
            remedy = "Measure again while nothing else runs on it"
        yield MachineVerdict(node_name(measurement.names, node), SLOW, because, remedy)


JUDGES: tuple[Callable[[Measurement], Iterator[MachineVerdict]], ...] = (
    _left_out, _arithmetic, _copies, _steps, _links, _nodes, _input, _reads, _disk, _saves, _losses, _faults,
)  # fmt: skip
