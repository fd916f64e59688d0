"""Finding and loading the models of measures on this machine, with commands that get those that are missing.

Nothing is downloaded. Importing this module needs no torch: `cdm params check` and every stage look for the models.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm.errors import CdmError
from cdm.measures import MODELS, chosen, load
from cdm.models.hub import downloaded, is_hub_id, resolved_revision
from cdm.params import Evaluate, MetricModels

if TYPE_CHECKING:
    import torch


def local_model(source: str) -> Path | None:
    """The file or folder of a model that measures: a path, or `org/name[@revision]` in the hub's cache.

    None where it is not here; nothing is downloaded.
    """
    path = Path(source)
    name, _, revision = source.partition("@")
    if path.exists() or not is_hub_id(name):
        return path if path.exists() else None
    return downloaded(name, revision or None)


def load_model(key: str, models: MetricModels, device: torch.device) -> Any:
    """The model that the field `key` of `evaluate.models` names, on `device`.

    The report calls it by what the parameters say, and the commit of a hub's model. Raises CdmError.
    """
    source: str | None = getattr(models, key)
    path = None if source is None else local_model(source)
    if path is None:  # it was there when the stage began
        raise CdmError(f"evaluate.models.{key}: {source}: not here: see docs/evaluation.md")
    revision = resolved_revision(path)
    name = f"{source} at {revision}" if revision and revision not in str(source) else str(source)
    return load(MODELS[key].loader)(path, device, name)


def missing_models(evaluate: Evaluate) -> Iterator[str]:
    """A line for each model that a chosen measure needs and that is not here, with the command that gets it."""
    users: dict[str, list[str]] = {}
    for measure in chosen(evaluate.metrics):
        for key in measure.models:
            users.setdefault(key, []).append(measure.name)
    for key, metrics in users.items():
        source: str | None = getattr(evaluate.models, key)
        problem = "no model is named" if source is None else _problem(key, source)
        if problem:
            model = f"evaluate.models.{key}: {f'{source}: ' if source else ''}{problem}"
            yield f"{model}, but evaluate.metrics has {', '.join(metrics)}: {_remedy(key, source)}"


def _problem(key: str, source: str) -> str:
    """What is wrong with the model at `source`; empty where it is all there."""
    path, patterns = local_model(source), MODELS[key].files
    if path is None:
        return "not in the hub's cache" if is_hub_id(source.partition("@")[0]) else "no such file or folder"
    if not patterns:
        return "" if path.is_file() else "a folder, expected a file of weights"
    missing = [pattern for pattern in patterns if not any(path.glob(pattern))]
    return f"has no {', '.join(missing)}" if missing else ""


def _remedy(key: str, source: str | None) -> str:
    name, _, revision = (source or "").partition("@")
    command = MODELS[key].command
    if command is not None:
        return f"get it with `{command}` and name it there, or leave the metric out"
    if not is_hub_id(name):
        return "name the right folder, or leave the metric out"
    option = f" --revision {revision}" if revision else ""
    files = "--include '*.json' --include '*.txt' --include '*.safetensors'"
    return f"get it with `hf download {name}{option} {files}`, or leave the metric out"
