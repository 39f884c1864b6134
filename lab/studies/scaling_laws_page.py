"""The laws on the page of the scaling study: their exponents, the prediction of the joint corner, its failure, and the
longest runs predicted from shorter ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from jobs.common.text import percent
from jobs.pages.document import Block, Text
from jobs.reporting import laws
from jobs.reporting.distributions import Interval
from jobs.reporting.laws import LOG_ODDS, POWER, Form, Law
from lab.studies.engine.page import paragraphs, section
from lab.studies.engine.results import score
from lab.studies.scaling_design import AXES, JOINT, LENGTHS, MASKS, REFERENCE, ScalingResults, StudyPoint, law

FORMS = (POWER, LOG_ODDS)
CORNER = tuple(group.point(*group.lengths) for group in JOINT)

EXPONENTS = """\
Least squares in the logarithms over the {runs} runs at mask 50 % outside the joint corner. Power law: {power}.
Log-odds: {odds}; b is the slope of the log-odds per e-fold. Lack of fit: F test against the spread between seeds; below
p = 0.05 the form is refused. Intervals of the power law are those of prediction.json, a bootstrap of residuals over all
axes together; earlier versions of this page had 0.016 to 0.023 for parameters, from the six runs along that axis
alone. A form that does not fit has no valid interval of either kind."""

REGISTERED = """\
Registered {time} UTC, before the corner was trained: a power law over all axes, without a test of its form. The
intervals do not include the uncertainty of the form."""

FAILED = """\
The registered prediction failed: the result of length 4 is outside of its interval. The form was wrong, not the axes.
At errors of 0.85 to 0.98 the logarithm of the error is almost linear in accuracy, so that a power law adds the gains of
model, data and length, where log-odds multiply them. The test for lack of fit along the length shows this without the
corner: power law {power}; log-odds {odds}. The study did not make it. Log-odds was chosen after the corner was known,
so that its agreement is no prediction. python -m lab.study --predict now chooses the form by the accuracy of the runs,
and refuses to predict if that form does not fit."""

LONGEST = """\
Each of the longest runs from shorter ones, by both forms, after the fact. Without more positions than coefficients, or
without several seeds at a position, lack of fit cannot be tested; the intervals by Student's t with 2 degrees of
freedom are wide. A test that passes proves no form: from two lengths the power law passes at mask 50 %, and misses. The
corner is predicted from the registered {runs} runs."""


def sections(study: ScalingResults) -> list[Block]:
    try:
        fitted = {form: law(study, form)[0] for form in FORMS}
    except ValueError as error:
        why = section("Laws", "law|why not", [("all axes", str(error))], text="why not")
        return [*why, *_registered(study)]
    return [*_exponents(study, fitted), *_registered(study), *_longest(study, fitted)]


def length_law(study: ScalingResults, form: Form, mask: str, longest: float) -> Law:
    """The law along the length of the reference with a mask. Raises ValueError if its runs do not determine it."""
    points = [StudyPoint(mask=mask, length=length) for length in LENGTHS if length <= longest]
    runs = [record for point in points for record in study.points(point).values()]
    return laws.fit([[run["samples"]] for run in runs], list(map(score, runs)), form)


def _along(study: ScalingResults, form: Form) -> str:
    try:
        fitted = length_law(study, form, REFERENCE.mask, LENGTHS[-1])
    except ValueError:
        return "-"
    return _verdict(fitted)


def _verdict(fitted: Law) -> str:
    if fitted.lack is None:
        return "not tested"
    if fitted.refused:
        return f"{fitted.lack}: refused"
    return str(fitted.lack)


def _exponents(study: ScalingResults, fitted: dict[Form, Law]) -> list[Block]:
    lines = []
    for form, each in fitted.items():
        exponents = each.exponents()
        if form is POWER and study.prediction and "form" not in study.prediction:
            exponents = [Interval(**fields) for fields in study.prediction["exponents"]]
        cells = [f"{b.value:.3f} ({b.low:.3f} to {b.high:.3f})" for b in exponents]
        lines.append((form.name, *cells, _verdict(each), _along(study, form)))
    note = EXPONENTS.format(runs=fitted[POWER].runs, power=POWER.formula, odds=LOG_ODDS.formula)
    columns = "form|b, parameters|b, data|b, samples|lack of fit, all axes|lack of fit along the length"
    text = "lack of fit, all axes|lack of fit along the length"
    return section("Laws", columns, lines, " ".join(note.split()), text)


def _registered(study: ScalingResults) -> list[Block]:
    if not study.prediction:
        return [Text("The joint corner is not predicted yet.", tone="note")]
    lines = []
    for point in CORNER:
        errors = study.prediction["errors"][str(point.length)]
        predicted = Interval(1 - errors["value"], 1 - errors["high"], 1 - errors["low"])
        lines.append((f"length {point.length:g}", *_cells(predicted, study.scores(point))))
    failed = any(inside == "no" for *_, inside in lines)
    note = " ".join(REGISTERED.format(time=study.prediction["time"]).split())
    blocks = section(
        "The joint corner, registered prediction", "length|predicted top-1|95 % interval|result|inside", lines, note
    )
    if failed:
        verdicts = {form: _along(study, form) for form in FORMS}
        blocks += paragraphs(FAILED.format(power=verdicts[POWER], odds=verdicts[LOG_ODDS]))
    return blocks


def _cells(predicted: Interval, scores: Sequence[float]) -> tuple[str, str, str, str]:
    """Prediction, its interval, the result, and whether it is inside."""
    bounds = f"{percent(predicted.low)} to {percent(predicted.high)}"
    if not scores:
        return percent(predicted.value), bounds, "-", "-"
    result = fmean(scores)
    inside = {True: "yes", False: "no"}[predicted.contains(result)]
    return percent(predicted.value), bounds, percent(result), inside


def _longest(study: ScalingResults, fitted: dict[Form, Law]) -> list[Block]:
    lines = []
    for form in FORMS:
        for mask in MASKS:
            target = StudyPoint(mask=mask, length=LENGTHS[-1])
            try:
                if mask == REFERENCE.mask:
                    lines.append(_line(study, law(study, form, LENGTHS[-2])[0], target, AXES))
                else:
                    lines.append(_line(study, length_law(study, form, mask, LENGTHS[-2]), target, ("samples",)))
            except ValueError:  # runs are missing
                continue
        lines.append(_line(study, fitted[form], CORNER[-1], AXES))
    lines = [line for line in lines if line[4] != "-"]
    columns = "longest run|form|runs|predicted (95 %)|result|inside|lack of fit"
    note = " ".join(LONGEST.format(runs=fitted[POWER].runs).split())
    return section("Longest runs, predicted from shorter ones", columns, lines, note, "form|lack of fit")


def _line(study: ScalingResults, fitted: Law, target: StudyPoint, axes: Sequence[str]) -> tuple[str, ...]:
    records = list(study.points(target).values())
    name = f"mask {target.mask}"
    if target in CORNER:
        name = "joint corner"
    if not records:
        return name, fitted.form.name, str(fitted.runs), "-", "-", "-", _verdict(fitted)
    predicted = fitted.extrapolate([records[0][axis] for axis in axes], len(records))
    value, bounds, result, inside = _cells(predicted, study.scores(target))
    return name, fitted.form.name, str(fitted.runs), f"{value} ({bounds})", result, inside, _verdict(fitted)
