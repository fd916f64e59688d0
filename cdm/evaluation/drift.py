"""Sentences about how the student's pictures look beside the teacher's, and with more steps beside few.

A sentence stands where the 95 % interval of the difference leaves out 0 and the difference is worth it
(`cdm.measures.Drift.least`): with thousands of pictures the interval bears out what nobody sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cdm.evaluation.metrics import Chosen
from cdm.evaluation.samples import Samples
from cdm.measures import Drift, quantities, steps_in_words
from cdm.params import Losses


def guidance_parameter(losses: Losses) -> str:
    """The parameter of a training that sets how strongly the student is guided."""
    terms = losses.terms
    if "ca" in terms:
        return "distill.losses.ca.scale"
    guided = [name for name in losses.guided if getattr(terms.get(name), "guidance_scale", 1.0) > 1]
    return ", ".join(f"distill.losses.{name}.guidance_scale" for name in guided) or "teacher.guidance_scale"


def growth(losses: Losses) -> str:
    """What makes a student more guided with more steps; empty where its training has nothing that does.

    CA that alone is bounded acts more often than the other terms at low noise levels (docs/methods.md).
    """
    terms = losses.terms
    if "ca" not in terms:
        return ""
    others = [terms[name] for name in losses.guided if name in terms]
    if getattr(terms["ca"], "bounded", False) and not all(getattr(each, "bounded", True) for each in others):
        return "CA alone is bounded (distill.losses.ca.bounded)"
    return "every step is guided anew (distill.losses.ca.fade)"


def findings(chosen: Chosen, samples: Samples, losses: Losses) -> list[str] | None:
    """What drifts, a sentence each; None where no measure that drifts was chosen."""
    known = {key: each.drift for key, each in quantities().items() if each.drift is not None}
    students = chosen.figures["student"]
    names = [name for name in next(iter(students.values())) if name in known]
    if not names:
        return None
    teacher = chosen.figures["teacher"].get(samples.full.key, {})
    said = []
    for name in names:
        if name in teacher:
            said += _beside_the_teacher(known[name], name, chosen, samples, teacher[name], losses)
    if chosen.steps is not None:
        few, more = chosen.steps
        for name in names:
            said += _betweensteps_in_words(
                known[name], name, chosen, students[f"steps{few}"][name], few, more, losses
            )
    return said


def as_record(chosen: Chosen, said: Sequence[str]) -> dict[str, Any]:
    """What metrics/quality.json holds of it: the sentences, and the differences between two numbers of steps."""
    if chosen.steps is None:
        return {"said": list(said)}
    few, more = chosen.steps
    return {"said": list(said), "steps": {"few": few, "more": more, "differences": chosen.between}}


def in_words(chosen: Chosen, said: Sequence[str]) -> list[str]:
    """The sentences, or one that says that there is nothing to say."""
    if said:
        return list(said)
    if not chosen.intervals:
        return [f"Of {chosen.prompts} prompts there are no intervals: whether pictures drift is not known."]
    return ["No drift that the intervals bear out."]


def _beside_the_teacher(
    drift: Drift, name: str, chosen: Chosen, samples: Samples, teacher: float, losses: Losses
) -> list[str]:
    """A sentence of what is above the teacher's, and one of what is below."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for each in samples.student:
        bounds = chosen.differences["student"][each.key][name]
        amount = _amount(drift, bounds, teacher)
        if amount:
            found[bounds[0] > 0].append(f"{amount} at {steps_in_words(each.steps)}")
    causes = {True: drift.too_much, False: drift.too_little}
    sentences = []
    for more, places in found.items():
        if places:
            direction = drift.above if more else drift.below
            text = f"{drift.subject} is {direction} the teacher's by {_joined(places)}"
            sentences.append(_sentence(text, causes[more], losses))
    return sentences


def _betweensteps_in_words(
    drift: Drift, name: str, chosen: Chosen, at_few: float, few: int, more: int, losses: Losses
) -> list[str]:
    bounds = chosen.between[name]
    amount = _amount(drift, bounds, at_few)
    if not amount:
        return []
    grown = bounds[0] > 0
    direction = drift.above if grown else drift.below
    text = f"{drift.subject} at {steps_in_words(more)} is {amount} {direction} that at {steps_in_words(few)}"
    return [_sentence(text, growth(losses) if grown and drift.guided_by_step else "", losses)]


def _amount(drift: Drift, bounds: Sequence[float], base: float) -> str:
    """A difference and half its interval in words; empty where it is not borne out, or not worth a word."""
    if len(bounds) < 3 or bounds[1] <= 0 <= bounds[2]:
        return ""
    relative = drift.unit == "%"
    if relative and base <= 0:
        return ""
    size, reach = abs(bounds[0]), (bounds[2] - bounds[1]) / 2
    if relative:
        size, reach = 100 * size / base, 100 * reach / base
    return f"{_number(size)} ± {_number(reach)} {drift.unit}" if size >= drift.least else ""


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 9.5 else f"{value:.2g}"


def _sentence(text: str, cause: str, losses: Losses) -> str:
    reason = f": {cause.format(guidance=guidance_parameter(losses))}" if cause else ""
    return f"{text[0].upper()}{text[1:]}{reason}."


def _joined(texts: Sequence[str]) -> str:
    *rest, last = texts
    return f"{', '.join(rest)} and {last}" if rest else last
