"""The models of `cdm judge` as its arguments name them: PLACE, or PLACE,steps=50,guidance=4.5,name=base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdm import limits
from cdm.errors import CdmError
from cdm.judging.design import Judging
from cdm.params import ParamsError, validated

OPTIONS = {
    "name": "name",
    "steps": "steps",
    "sigmas": "sigmas",
    "guidance": "guidance_scale",
    "precision": "precision",
    "revision": "revision",
    "tokens": "max_sequence_length",
    "resolution": "resolution",
}
"""What may stand behind a place, and the key of a judging's `models` that it sets."""
NUMBERS = {"steps": int, "guidance": float, "tokens": int, "resolution": int}
SHARED = ("metric_models", "precision", "runtime", "seed")
"""Settings of a judging that are not those of a prompt set."""
SET = "prompts"
"""The name of the prompt set of `cdm judge`."""


def parse_model(argument: str) -> dict[str, Any]:
    """The values of a model; raises CdmError if the argument is none."""
    place, *options = argument.split(",")
    values: dict[str, Any] = {"source": place}
    for option in options:
        name, equals, text = option.partition("=")
        if name not in OPTIONS or not equals or not text:
            known = ", ".join(f"{each}=" for each in OPTIONS)
            raise CdmError(f"MODEL {argument}: {option!r} is none of {known}")
        values[OPTIONS[name]] = _value(argument, name, text)
    return values


def _value(argument: str, name: str, text: str) -> Any:
    try:
        if name == "sigmas":
            return [float(level) for level in text.split("/")]
        return NUMBERS[name](text) if name in NUMBERS else text
    except ValueError:
        form = "numbers with / between them" if name == "sigmas" else "a number"
        raise CdmError(f"MODEL {argument}: {name} is {text!r}, expected {form}") from None


def judging_of(
    arguments: Sequence[str], prompts: Sequence[Path], reference: str | None = None, **settings: Any
) -> Judging:
    """The judging that a command asks for; `settings` are of its prompt set, and `seed`, `precision`, `metric_models`,
    `runtime` of all. Raises CdmError."""
    models: dict[str, dict[str, Any]] = {}
    for argument in arguments:
        values = parse_model(argument)
        title = values.pop("name", None) or _title(str(values["source"]), values)
        name = _name(title, models)
        models[name] = {"title": title, **values}
    shared = {key: settings.pop(key) for key in SHARED if key in settings}
    names = list(models)
    chosen = _reference(reference, models)
    title = ", ".join(path.name for path in prompts)
    values = {
        "rows": names,
        "sets": [SET],
        "reference": chosen,
        "models": models,
        "prompts": {SET: {"title": title, **settings, "files": [*map(str, prompts)]}},
        **shared,
    }
    try:
        return validated(Judging, values)
    except ParamsError as error:
        text = str(error).replace(f"prompts.{SET}.", "")
        for name, argument in sorted(zip(names, arguments, strict=True), reverse=True):
            text = text.replace(f"models.{name}", f"MODEL {argument}: ")
        raise CdmError(text.replace(": .", ": ").replace(": : ", ": ")) from None


def _reference(wanted: str | None, models: dict[str, dict[str, Any]]) -> str:
    if wanted is None:
        return next(iter(models))
    found = [name for name, values in models.items() if wanted in (name, values["title"], values["source"])]
    if not found:
        raise CdmError(f"--reference is {wanted}: give one of the models: {', '.join(models)}")
    return found[0]


def _title(source: str, values: dict[str, Any]) -> str:
    """The last part of a place, and what it draws with where that is not the default."""
    parts = [Path(source).stem if source.endswith(".safetensors") else Path(source).name]
    if "steps" in values:
        parts.append(f"{values['steps']} steps")
    if values.get("guidance_scale", 1) != 1:
        parts.append(f"guidance {values['guidance_scale']:g}")
    return ", ".join(parts)


def _name(title: str, taken: dict[str, Any]) -> str:
    """A name for files of what is called `title`, which no other has."""
    base = re.sub(r"[^a-z0-9_]+", "-", title.lower()).strip("-_")[: limits.NAME - 4] or "model"
    names = [base, *(f"{base}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)
