"""The pages of the studies state the numbers that `recomputed.py` gets from the files without code of this project."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.lab.studies import recomputed

DOCS = Path(__file__).resolve().parents[3] / "docs"


def lines(page: str, after: str = "") -> list[list[str]]:
    text = (DOCS / page).read_text(encoding="utf-8").partition(after)[2] if after else (DOCS / page).read_text()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def row(page: str, *start: str, after: str = "") -> list[str]:
    return next(cells for cells in lines(page, after) if cells[: len(start)] == list(start))


def shown(value: float, low: float, high: float) -> str:
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def p_text(p: float) -> str:
    return "&lt; 0.001" if p < 0.001 else f"{p:.2g}"


def width(cell: str) -> float:
    """The width of an interval as it is shown."""
    _, low, high = map(float, re.findall(r"[+-]\d+\.\d", cell))
    return high - low


@pytest.mark.parametrize("study", ["study", "cheapest"])
def test_every_difference_and_corrected_p_of_arms(study: str) -> None:
    table = lines(f"{study}.md", "## Differences")
    head = table[0]
    end = next(i for i, cells in enumerate(table) if cells[0] == "arm")  # the next table
    rows = [dict(zip(head, cells, strict=True)) for cells in table[2:end]]
    assert len(rows) == {"study": 9, "cheapest": 5}[study]
    found = {
        (name, i): recomputed.difference(study, name, r["arm"], r["minus"])
        for name in ("twemoji", "openmoji")
        for i, r in enumerate(rows)
    }
    order = sorted(found, key=lambda key: found[key][3])
    corrected = 0.0
    for rank, (name, i) in enumerate(order):
        *interval, p = found[name, i]
        corrected = max(corrected, min(1.0, p * (len(order) - rank)))
        assert rows[i][name] == shown(*interval).replace("+-", "-"), rows[i]
        assert rows[i][f"{name}, p"] == p_text(corrected)
        verdict = "more accurate" if interval[0] > 0 else "less accurate"
        if corrected >= 0.05:
            verdict = "undecided"
        sentence = f"{rows[i]['arm']} against {rows[i]['minus']}: .*on {name} {verdict}, "
        assert re.search(sentence, (DOCS / f"{study}.md").read_text(encoding="utf-8"))


def test_every_difference_of_paired_pictures() -> None:
    """As printed, but an interval over both is no narrower than that of seeds alone."""
    page = "head_muon.md"
    for arm, minus in (("head", "adamw"), ("muon", "adamw")):
        head, *_ = lines(page, "## Differences")
        cells = next(cells for cells in lines(page, "## Differences") if cells[1:3] == [arm, minus])
        for name in ("twemoji", "openmoji", "unseen"):
            value, low, high = recomputed.paired_difference("head_muon", name, arm, minus)
            stated = cells[head.index(name)]
            alone = cells[head.index(f"{name}, seeds alone")]
            widest = max((shown(value, low, high), alone), key=width)
            assert stated == widest, (arm, name)
            p = cells[head.index(f"{name}, p")]
            is_decided = p.startswith("&lt;") or float(p) < 0.05
            sentence = f"{arm} against {minus}: .*on {name} {'(more|less) accurate' if is_decided else 'undecided'}, "
            assert re.search(sentence, (DOCS / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("study", ["study", "cheapest", "head_muon"])
def test_arms_and_baseline(study: str) -> None:
    head = lines(f"{study}.md", "## Arms")[0]
    for name in head[8:]:
        column = head.index(name)
        for arm, scores in recomputed.arm_scores(study, name).items():
            cell = row(f"{study}.md", arm, after="## Arms")[column]
            assert cell == f"{np.mean(scores):.1f} ({', '.join(f'{s:.1f}' for s in scores)})"
        if name == "unseen":
            assert row(f"{study}.md", "nearest training picture")[column] == "-", "training has none of its classes"
            continue
        stated, counted = recomputed.pixels(study)["train", name]
        assert row(f"{study}.md", "nearest training picture")[column] == f"{counted:.1f}"
        assert stated == pytest.approx(counted, abs=1e-9)
        best = max(np.mean(scores) for scores in recomputed.arm_scores(study, name).values())
        assert best < counted, "the first paragraph says that no arm reaches the baseline"
        stated, counted = recomputed.pixels(study, "probe")["train", name]
        assert row(f"{study}.md", "linear probe, random features")[column] == f"{counted:.1f}"
        assert stated == pytest.approx(counted, abs=1e-9)
    assert "No arm" in (DOCS / f"{study}.md").read_text(encoding="utf-8").partition("## Results")[0]


def test_no_run_of_the_scaling_study_reaches_the_baseline_of_its_data() -> None:
    """As the first paragraph of its page says; the rows of the baseline are those counted from the answers."""
    baseline = recomputed.pixels("scaling_study")
    shares = {"data1": "all", "data8": "1/8", "data64": "1/64"}
    for name, run in recomputed.records("scaling_study").items():
        data = shares[name.split("-")[1]]
        if run["kind"] == "run":
            reached = np.mean([baseline[data, family][1] for family in recomputed.FAMILIES])
            assert 100 * recomputed.accuracy(run) < reached, name
    probe = recomputed.pixels("scaling_study", "probe")
    for title, counted in (("nearest training picture", baseline), ("linear probe, random features", probe)):
        for data in dict.fromkeys(train for train, _ in counted):
            cells = row("scaling_study.md", f"{title}, {data} of the data")
            shown_sets = ("validation", *recomputed.FAMILIES)
            assert cells[2:6] == [f"{counted[data, name][1]:.1f}" for name in shown_sets]
    assert {train for train, _ in baseline} == set(shares.values())
    page = (DOCS / "scaling_study.md").read_text(encoding="utf-8")
    for data in set(shares.values()) - {train for train, _ in probe}:
        assert f"It was not computed with {data} of the data." in page


def test_laws_and_their_lack_of_fit() -> None:
    for form in recomputed.LINKS:
        fitted = recomputed.law(form, recomputed.registered(), recomputed.AXES)
        cells = row("scaling_study.md", form, after="### Laws")
        assert [cell.split()[0] for cell in cells[1:4]] == [f"{b:.3f}" for b in fitted["b"][1:]]
        assert f"F(3, 7) = {fitted['f']:.1f}, p = {fitted['p']:.2g}" in cells[4]
        assert ("refused" in cells[4]) == (fitted["p"] < 0.05) == (form == "power law")
        lengths = [run for n in (1, 2, 4) for run in recomputed.pair(f"2m-data8-mask0.5-s{{}}-x{n}")]
        along = recomputed.law(form, lengths, ("samples",))
        assert f"F(1, 3) = {along['f']:.1f}, p = {along['p']:.2g}" in cells[5]


def test_longest_runs_predicted_from_shorter_ones() -> None:
    """Log-odds predicts each of them inside its interval; the power law misses three of four."""
    inside = []
    for form in recomputed.LINKS:
        for name, ((value, low, high), result) in recomputed.longest(form).items():
            cells = row("scaling_study.md", name, form)
            assert cells[3] == f"{value:.1f} ({low:.1f} to {high:.1f})" and cells[4] == f"{result:.1f}"
            assert (cells[5] == "yes") == (low <= result <= high)
            inside.append((form, low <= result <= high))
    assert inside.count(("log-odds", True)) == 4 and inside.count(("power law", True)) == 1


def test_registered_prediction_failed() -> None:
    (corner,) = recomputed.runs_of("8m-data1-mask0.5-s0-x4")
    cells = row("scaling_study.md", "length 4")
    assert cells[1:] == ["16.3", "12.5 to 21.0", f"{100 * recomputed.accuracy(corner):.1f}", "no"]


def test_claims_and_speed_ups() -> None:
    reference = recomputed.pair("2m-data8-mask0.5-s{}-x2")
    large = recomputed.pair("8m-data8-mask0.5-s{}-x2")
    everything = recomputed.pair("2m-data1-mask0.5-s{}-x2")
    few = recomputed.pair("2m-data64-mask0.5-s{}-x2")
    unmasked = recomputed.pair("2m-data8-mask0-s{}-x2")
    most = recomputed.pair("2m-data8-mask0.75-s{}-x2")
    both, every = (recomputed.runs_of(f"8m-data1-mask0.5-s0-x{n}") for n in (2, 4))
    claims = {
        "A larger model is more accurate.": ((1, large), (-1, reference)),
        "More data are more accurate at equal training.": ((1, everything), (-1, reference)),
        "64 times the data are more accurate.": ((1, everything), (-1, few)),
        "With a larger model and more data, longer training gains, too.": ((1, every), (-1, both)),
        "Mask 50 % costs accuracy at equal samples and batch.": ((1, unmasked), (-1, reference)),
        "Mask 75 % costs more than 50 % at equal samples and batch.": ((1, reference), (-1, most)),
    }
    for claim, terms in claims.items():
        assert row("scaling_study.md", claim)[2] == shown(*recomputed.contrast(*terms))
    for against, mask, share in (("0", "0.5", "50 %"), ("0", "0.75", "75 %"), ("0.5", "0.75", "75 % instead of 50 %")):
        ratio, level = recomputed.speed_up(mask, against)
        cell = row("scaling_study.md", share, after="### Speed-up by masking")[-1]
        assert cell.startswith(f"{ratio:.2f} (") and cell.endswith(f"at {level:.1f} %")
        low, high = recomputed.speed_up_interval(mask, against)
        stated = [float(number) for number in re.findall(r"\((.*) to (.*)\)", cell)[0]]
        assert stated == pytest.approx([low, high], abs=(high - low) / 8), "by normal deviations"


def test_record_rows() -> None:
    found = recomputed.record_rows()
    assert len(found) >= 4
    for name, (seconds, mean, half) in found.items():
        cells = row("records.md", name)
        assert cells[1] == f"{seconds:.0f}" and cells[2] == f"{mean:.1f} ({mean - half:.1f} to {mean + half:.1f})"
        assert (cells[3] != "not reached") == (mean - half >= 21.3)
