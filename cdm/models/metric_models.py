"""Finding and loading the models of measures on this machine, and what is missing: models, and programs of scorers.

Nothing is downloaded here (`cdm.models.fetch` does that). Importing this module needs no torch: `cdm params check` and
every stage look for the models.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm.errors import CdmError
from cdm.measures import MODELS, chosen, load
from cdm.models.hub import downloaded, is_hub_id, resolved_revision
from cdm.models.published import default_place, files_of, revision_of
from cdm.params import Evaluate, MetricModels
from cdm.system.commands import Command

if TYPE_CHECKING:
    import torch


def local_model(source: str) -> Path | None:
    """The file or folder of a model that measures: a path, or `org/name[@revision]` in the hub's cache; without a
    revision the one that is fetched, or else the main branch.

    None where it is not here; nothing is downloaded.
    """
    path = Path(source)
    name, _, revision = source.partition("@")
    if path.exists() or not is_hub_id(name):
        return path if path.exists() else None
    pinned = None if revision else revision_of(name)
    return (downloaded(name, pinned) if pinned else None) or downloaded(name, revision or None)


def model_path(key: str, source: str | None) -> Path | None:
    """Where the model of the field `key` of `evaluate.models` is: at `source`, or where `cdm fetch` puts it if none is
    named. None where it is not here."""
    return local_model(str(default_place(key)) if source is None else source)


def load_model(key: str, models: MetricModels, device: torch.device) -> Any:
    """The model that the field `key` of `evaluate.models` names, on `device`.

    The report calls it by what the parameters say, and the commit of a hub's model. Raises CdmError.
    """
    source: str | None = getattr(models, key)
    path = model_path(key, source)
    if path is None:  # it was there when the stage began
        raise CdmError(f"evaluate.models.{key}: {source}: not here: see docs/evaluation.md")
    revision = resolved_revision(path)
    named = path.name if source is None else source
    name = f"{named} at {revision}" if revision and revision not in named else named
    return load(MODELS[key].loader)(path, device, name)


def users(evaluate: Evaluate) -> dict[str, list[str]]:
    """The chosen measures by the model that they need."""
    found: dict[str, list[str]] = {}
    for measure in chosen(evaluate.metrics):
        for key in measure.models:
            found.setdefault(key, []).append(measure.name)
    return found


def is_fetched(key: str, source: str | None) -> bool:
    """Whether `cdm fetch` can get the model of the field `key`: it is on a hub, or published as files that are put
    where `source` says."""
    if source is None or is_hub_id(source.partition("@")[0]):
        return True
    return all(not file.is_on_hub for file in files_of(key)) or MODELS[key].converter is not None


def missing_models(evaluate: Evaluate, remedy: str) -> Iterator[str]:
    """Lines on the models that a chosen measure needs and that are not here: one for all that `cdm fetch` gets, which
    ends with `remedy`, and one for each other. Of those that are there in part the rest is fetched."""
    absent = []
    for key, metrics in users(evaluate).items():
        source: str | None = getattr(evaluate.models, key)
        problem = model_problem(key, source)
        yours = source is not None and Path(source).exists()
        if problem and is_fetched(key, source) and not yours:
            absent.append(f"{key}{f' ({source})' if source else ''} for {', '.join(metrics)}")
        elif problem:
            yield (
                f"evaluate.models.{key}: {source or default_place(key)}: {problem}, but evaluate.metrics has"
                f" {', '.join(metrics)}: name the right one, or leave the metric out"
            )
    if absent:
        yield f"evaluate.models: not on this machine: {'; '.join(absent)}: {remedy}"


def model_problem(key: str, source: str | None) -> str:
    """What is wrong with the model of the field `key` at `source`; empty where it is all there."""
    path, patterns = model_path(key, source), MODELS[key].files
    if path is None:
        return (
            "not in the hub's cache"
            if is_hub_id((source or "").partition("@")[0])
            else "no such file or folder"
        )
    if not patterns:
        return "" if path.is_file() else "a folder, expected a file of weights"
    missing = [pattern for pattern in patterns if not any(path.glob(pattern))]
    return f"has no {', '.join(missing)}" if missing else ""


def scorer_problem(command: str) -> str:
    """What is missing for a scorer's command: its program, or a script; empty where all is there."""
    try:
        parsed = Command.parse(command)
    except CdmError as error:
        return str(error)
    if parsed.program is None:
        return f"{parsed.arguments[0]}: no such program: see docs/scorers.md"
    return "; ".join(f"{name}: no such file" for name in parsed.missing_scripts())


def without_missing(evaluate: Evaluate) -> tuple[Evaluate, dict[str, str]]:
    """With `evaluate.missing: skip` the section without the measures and scorers whose models and programs are not
    here, and why each of these is left out, by name; else the section as it is."""
    if evaluate.missing == "refuse":
        return evaluate, {}
    skipped: dict[str, str] = {}
    for key, metrics in users(evaluate).items():
        source: str | None = getattr(evaluate.models, key)
        if problem := model_problem(key, source):
            where = source or default_place(key).name
            skipped |= dict.fromkeys(metrics, f"evaluate.models.{key}: {where}: {problem}")
    for scorer in evaluate.scorers:
        if problem := scorer_problem(scorer.command):
            skipped[scorer.name] = f"evaluate.scorers: {problem}"
    left = {
        "metrics": [name for name in evaluate.metrics if name not in skipped],
        "scorers": [scorer for scorer in evaluate.scorers if scorer.name not in skipped],
    }
    return evaluate.model_copy(update=left), skipped
