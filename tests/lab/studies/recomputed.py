"""Recomputes the headline numbers of the studies from committed files, with numpy alone and nothing of this project.

``python tests/tools/studies/recomputed.py`` prints them. `test_recomputed.py` compares them with the pages. Quantiles
of Student's t and tails of F are integrals of their densities, so that no function is shared with the project.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).resolve().parents[3] / "docs"
FAMILIES = ("tabler", "carbon", "game-icons")
UNIT = 204_800
Record = dict[str, Any]


@cache
def records(study: str) -> dict[str, Record]:
    return {
        p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted((DOCS / study / "results").glob("*.json"))
    }


def item(record: Record, name: str) -> Record:
    return next(each for each in record["evaluations"] if each["name"] == name)


# -- distributions -----------------------------------------------------------------------------------------------------


def t_tail(t: float, freedom: float) -> float:
    """Two-sided, by the substitution t = tan(angle) * sqrt(freedom)."""
    start = np.arctan(abs(t) / np.sqrt(freedom))
    whole, tail = (np.linspace(a, np.pi / 2, 20_001) for a in (0.0, start))
    power = freedom - 1
    return float(np.trapezoid(np.cos(tail) ** power, tail) / np.trapezoid(np.cos(whole) ** power, whole))


def t_quantile(freedom: float) -> float:
    low, high = 0.0, 50.0
    for _ in range(50):
        middle = (low + high) / 2
        if t_tail(middle, freedom) > 0.05:
            low = middle
        else:
            high = middle
    return high


def f_tail(f: float, a: int, b: int) -> float:
    """By u = y^2 of the beta density of y^2 = b / (b + a F)."""
    whole, tail = (np.linspace(0.0, end, 20_001) for end in (np.pi / 2, np.arcsin(np.sqrt(b / (b + a * f)))))
    density: Callable[[Any], Any] = lambda x: np.sin(x) ** (b - 1) * np.cos(x) ** (a - 1)  # noqa: E731
    return float(np.trapezoid(density(tail), tail) / np.trapezoid(density(whole), whole))


# -- studies of arms ---------------------------------------------------------------------------------------------------


def arm_scores(study: str, name: str) -> dict[str, list[float]]:
    """Arm -> score of seeds 0, 1, 2 in per cent."""
    runs = records(study)
    arms = [run for run in runs if runs[run]["kind"] == "run" and not run.endswith(("-s1", "-s2"))]
    return {a: [100 * item(runs[a + end], name)["top1"] for end in ("", "-s1", "-s2")] for a in arms}


def difference(study: str, name: str, first: str, second: str) -> tuple[float, float, float, float]:
    """(value, low, high, p) over seeds and pictures."""
    scores = arm_scores(study, name)
    table = np.array(list(scores.values()))
    rest = table - table.mean(1)[:, None] - table.mean(0)[None] + table.mean()
    freedom = (len(table) - 1) * 2
    seeds = 2 * (rest**2).sum() / freedom / 3
    n = next(item(run, name)["n"] for run in records(study).values() if run["kind"] == "run")
    a, b = np.mean(scores[first]), np.mean(scores[second])
    total = seeds + (a * (100 - a) + b * (100 - b)) / n
    degrees = freedom * (total / seeds) ** 2
    half = t_quantile(degrees) * np.sqrt(total)
    return float(a - b), float(a - b - half), float(a - b + half), t_tail((a - b) / np.sqrt(total), degrees)


def bits(entry: Record) -> np.ndarray:
    """Whether each picture was right, as 0 or 1."""
    return np.unpackbits(np.frombuffer(base64.b64decode(entry["right"]), np.uint8))[: entry["n"]].astype(float)


def paired_difference(study: str, name: str, first: str, second: str) -> tuple[float, float, float]:
    """(value, low, high) over seeds and pictures, from answers of both arms on the same pictures.

    The variance of a difference of means over pictures, and that of seeds with its degrees of freedom: no bootstrap.
    """
    runs = records(study)
    ends = ("", "-s1", "-s2")
    each = np.mean([bits(item(runs[first + e], name)) - bits(item(runs[second + e], name)) for e in ends], axis=0)
    table = np.array(list(arm_scores(study, name).values()))
    rest = table - table.mean(1)[:, None] - table.mean(0)[None] + table.mean()
    freedom = (len(table) - 1) * 2
    seeds = 2 * (rest**2).sum() / freedom / 3
    total = seeds + 1e4 * each.var() / len(each)
    half = t_quantile(freedom * (total / seeds) ** 2) * np.sqrt(total)
    value = 100 * each.mean()
    return float(value), float(value - half), float(value + half)


# -- the scaling study -------------------------------------------------------------------------------------------------


def accuracy(record: Record) -> float:
    return float(np.mean([item(record, name)["top1"] for name in FAMILIES]))


def runs_of(*ends: str) -> list[Record]:
    found = records("scaling_study")
    return [found[end] for end in ends]


def registered() -> list[Record]:
    return runs_of(*json.loads((DOCS / "scaling_study" / "prediction.json").read_text(encoding="utf-8"))["runs"])


LINKS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "power law": (lambda a: -np.log(1 - a), lambda y: 1 - np.exp(-y)),
    "log-odds": (lambda a: np.log(a / (1 - a)), lambda y: 1 / (1 + np.exp(-y))),
}


def law(form: str, learned: Sequence[Record], axes: Sequence[str]) -> dict[str, Any]:
    design = np.array([[1.0, *(np.log(run[axis]) for axis in axes)] for run in learned])
    y = LINKS[form][0](np.array([accuracy(run) for run in learned]))
    b, *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - len(b)
    rest = float(((y - design @ b) ** 2).sum())
    cells: dict[tuple[float, ...], list[float]] = {}
    for row, value in zip(design, y, strict=True):
        cells.setdefault(tuple(row), []).append(float(value))
    pure = sum(((np.array(values) - np.mean(values)) ** 2).sum() for values in cells.values())
    more, repeated = len(cells) - len(b), len(y) - len(cells)
    f = p = None
    if more and repeated:
        f = (rest - pure) / more / (pure / repeated)
        p = f_tail(f, more, repeated)
    return {"form": form, "b": b, "design": design, "variance": rest / freedom, "freedom": freedom, "f": f, "p": p}


def predicted(fitted: dict[str, Any], target: Sequence[Record], axes: Sequence[str]) -> tuple[float, float, float]:
    """Per cent: the mean of the target's runs, and its 95 % interval."""
    row = np.array([1.0, *(np.log(target[0][axis]) for axis in axes)])
    design = fitted["design"]
    error = np.sqrt(fitted["variance"] * (1 / len(target) + row @ np.linalg.inv(design.T @ design) @ row))
    half = t_quantile(fitted["freedom"]) * error
    value = float(row @ fitted["b"])
    return tuple(float(100 * LINKS[fitted["form"]][1](v)) for v in (value, value - half, value + half))  # type: ignore[return-value]


AXES = ("parameters", "data_samples", "samples")


def pair(name: str) -> list[Record]:
    """Both seeds of a run, whose name has {} for the seed."""
    return runs_of(name.format(0), name.format(1))


def longest(form: str) -> dict[str, tuple[tuple[float, float, float], float]]:
    """Longest run -> (prediction from shorter ones, result), per cent."""
    result = {}
    for mask in ("0", "0.75"):
        base = f"2m-data8-mask{mask}-s{{}}-x"
        fitted = law(form, [*pair(base + "1"), *pair(base + "2")], ("samples",))
        target = pair(base + "4")
        result[f"mask {mask}"] = predicted(fitted, target, ("samples",)), 100 * np.mean(list(map(accuracy, target)))
    short = [run for run in registered() if run["samples"] < 4 * UNIT]
    target = pair("2m-data8-mask0.5-s{}-x4")
    found = predicted(law(form, short, AXES), target, AXES)
    result["mask 0.5"] = found, 100 * np.mean(list(map(accuracy, target)))
    corner = runs_of("8m-data1-mask0.5-s0-x4")
    result["joint corner"] = predicted(law(form, registered(), AXES), corner, AXES), 100 * accuracy(corner[0])
    return result


def spread() -> tuple[float, int]:
    """Deviation between seeds of the scaling study in points, pooled over points, and its degrees of freedom."""
    found = records("scaling_study")
    pairs = [
        [accuracy(run), accuracy(found[name.replace("-s0-", "-s1-")])]
        for name, run in found.items()
        if run["kind"] == "run" and "-s0-" in name and name.replace("-s0-", "-s1-") in found
    ]
    return 100 * float(np.sqrt(np.mean([(a - b) ** 2 / 2 for a, b in pairs]))), len(pairs)


def contrast(*terms: tuple[int, Sequence[Record]]) -> tuple[float, float, float]:
    """Points, with the interval over seeds and pictures."""
    deviation, freedom = spread()
    value = sum(sign * 100 * float(np.mean(list(map(accuracy, runs)))) for sign, runs in terms)
    seeds = deviation**2 * sum(1 / len(runs) for _, runs in terms)
    pictures = 0.0
    for _, runs in terms:
        each = [sum(i["top1"] * (1 - i["top1"]) / i["n"] for i in (item(run, f) for f in FAMILIES)) for run in runs]
        pictures += 1e4 * float(np.mean(each)) / 9
    half = t_quantile(freedom * ((seeds + pictures) / seeds) ** 2) * np.sqrt(seeds + pictures)
    return value, float(value - half), float(value + half)


def speed_up(mask: str, against: str = "0") -> tuple[float, float]:
    """(ratio of costs, accuracy in per cent) at the highest accuracy that both reach."""
    times = json.loads((DOCS / "scaling_study" / "calibration.json").read_text(encoding="utf-8"))["work"]
    curves = []
    for each in (against, mask):
        costs = [length * times[f"2M/8, mask {each}"]["seconds"] for length in (1, 2, 4)]
        means = [float(np.mean(list(map(accuracy, pair(f"2m-data8-mask{each}-s{{}}-x{n}"))))) for n in (1, 2, 4)]
        curves.append((np.log(costs), means))
    level = min(max(means) for _, means in curves)
    first, second = (np.interp(level, means, costs) for costs, means in curves)
    return float(np.exp(first - second)), 100 * level


def speed_up_interval(mask: str, against: str = "0", draws: int = 20_000) -> tuple[float, float]:
    """Of the ratio of costs at the highest accuracy that both reach: normal errors by seeds, pictures and calibration.

    Seeds: the deviations of the six pairs of both designs. Pictures: binomial, as if lengths had seen different ones.
    """
    random = np.random.default_rng(1)
    times = json.loads((DOCS / "scaling_study" / "calibration.json").read_text(encoding="utf-8"))["work"]
    runs = [[pair(f"2m-data8-mask{each}-s{{}}-x{n}") for n in (1, 2, 4)] for each in (against, mask)]
    scores = np.array([[[accuracy(run) for run in both] for both in each] for each in runs])  # (design, length, seed)
    seeds = scores.var(axis=2, ddof=1).mean() / 2
    items = [[[[item(run, f) for f in FAMILIES] for run in both] for both in each] for each in runs]
    binomial = [
        [np.mean([sum(i["top1"] * (1 - i["top1"]) / i["n"] for i in run) / 9 for run in both]) for both in each]
        for each in items
    ]
    means = scores.mean(axis=2) + np.sqrt(seeds + np.array(binomial)) * random.standard_normal((draws, 2, 3))
    means = np.maximum.accumulate(means, axis=2)
    works = [times[f"2M/8, mask {each}"] for each in (against, mask)]
    costs = np.log(np.outer([work["seconds"] for work in works], (1, 2, 4)))
    error = np.sqrt(sum(np.square(_of_median(work)) for work in works))
    levels = means.max(axis=2).min(axis=1)
    logs = np.array([
        np.interp(level, a, costs[0]) - np.interp(level, b, costs[1])
        for level, (a, b) in zip(levels, means, strict=True)
    ])  # fmt: skip
    low, high = np.quantile(np.exp(logs + error * random.standard_normal(draws)), (0.025, 0.975))
    return float(low), float(high)


def _of_median(work: Record) -> float:
    """Relative standard error of a median of normal values with these quartiles."""
    low, high = work["quartiles"]
    return float(np.sqrt(np.pi / 2) * (high - low) / 1.349 / np.sqrt(work["intervals"]) / work["seconds"])


# -- records -----------------------------------------------------------------------------------------------------------


def record_rows() -> dict[str, tuple[float, float, float]]:
    """Recipe -> core-seconds, and mean and half of its 95 % interval in per cent.

    The unit is the arm clipa of cheapest.md, which takes 360 core-seconds: as many as its samples cost on the machine
    of the row.
    """
    arm = records("cheapest")["clipa"]["settings"]
    rows = {}
    for path in sorted((DOCS / "records").glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        if path.stem == "tried":
            continue
        measured = row["measured"]
        unit = sum(arm[f"stages.{stage}.samples"] * each for stage, each in measured["reference"].items()) / 360
        own = row["samples"] * measured["recipe"]["pretrain"] / unit
        scores = 100 * np.array(list(row["scores"].values()))
        half = t_quantile(len(scores) - 1) * scores.std(ddof=1) / np.sqrt(len(scores))
        rows[path.stem] = own, float(scores.mean()), float(half)
    return rows


# -- the baseline ------------------------------------------------------------------------------------------------------


def pixels(study: str, method: str | None = None) -> dict[tuple[str, str], tuple[float, float]]:
    """(training set, test set) -> top-1 in per cent: as stated, and counted from the answers.

    Of two comparisons the one that is better on validation counts.
    """
    rows = json.loads((DOCS / study / "baseline.json").read_text(encoding="utf-8"))["sets"]
    rows = [row for row in rows if row.get("method") == method]
    counted: dict[tuple[str, str], tuple[float, float]] = {}
    for train in dict.fromkeys(row["train"] for row in rows):
        own = [row for row in rows if row["train"] == train]
        best = max((row["top1"], row["by"]) for row in own if row["set"] == "validation")[1]
        for row in own:
            if row["by"] == best:
                counted[train, row["set"]] = 100 * row["top1"], 100 * float(bits(row).mean())
    return counted


if __name__ == "__main__":
    for study in ("study", "cheapest"):
        print(
            study,
            {name: round(float(np.mean(s)), 1) for name, s in arm_scores(study, "twemoji").items()},
            pixels(study),
        )
    print("mask50 - clip", *(difference("study", name, "mask50", "clip") for name in ("twemoji", "openmoji")))
    for form in LINKS:
        fitted = law(form, registered(), AXES)
        print(form, "b", fitted["b"][1:], "F", fitted["f"], "p", fitted["p"], longest(form))
    print("speed-up", *((speed_up(mask), speed_up_interval(mask)) for mask in ("0.5", "0.75")))
    print("records", record_rows())
