"""What a params file names outside itself: all of it is looked for before anything long starts."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from cdm.errors import CdmError
from cdm.params import Evaluate, Metric, Params

MODELS_OF: dict[Metric, tuple[str, ...]] = {
    "frechet_inception": ("inception",),
    "kernel_inception": ("inception",),
    "prdc_inception": ("inception",),
    "vendi_inception": ("inception",),
    "frechet_dinov2": ("dinov2",),
    "kernel_dinov2": ("dinov2",),
    "prdc_dinov2": ("dinov2",),
    "vendi_dinov2": ("dinov2",),
    "cmmd": ("clip",),
    "clip_score": ("clip",),
    "pick_score": ("pick_score",),
    "hps": ("hps",),
    "aesthetic": ("clip", "aesthetic"),
    "lpips": ("lpips",),
}
"""Keys of `evaluate.models` that a metric needs."""
_PICTURES = ("config.json", "preprocessor_config.json", "*.safetensors")
_FILES = {
    "clip": (*_PICTURES, "vocab.json", "merges.txt"),
    "dinov2": _PICTURES,
    "pick_score": (*_PICTURES, "vocab.json", "merges.txt"),
    "hps": (*_PICTURES, "vocab.json", "merges.txt"),
    "lpips": ("alexnet-owt-7be5be79.pth", "alex.pth"),
}
"""What the folder of a model holds, as patterns; the other models are files."""
_GET = {
    "hps": "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir . && hf download"
    " laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include '*.json' --include '*.txt' --local-dir hps-base"
    " && python scorers/convert_hps.py HPS_v2.1_compressed.pt hps-base hps",
    "inception": "curl -LO https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "aesthetic": "curl -LO https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac+logos+ava1-l14-linearMSE.pth",
    "lpips": "mkdir -p lpips && cd lpips && curl -LO https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    " -LO https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth",
}
"""Commands that get models that are on no hub in the form that is read here."""


def is_hub_id(source: str) -> bool:
    """Whether `source` is `org/name` on a hub; where `org` is a folder here, one inside it was meant."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).parent.is_dir()


def check_paths(named: Params) -> None:
    """Raises CdmError with a line for every file, folder or package that is named and that is not there."""
    problems = list(_problems(named))
    if problems:
        raise CdmError("\n".join(problems))


def _problems(named: Params) -> Iterator[str]:
    teacher, evaluate, configs = named.teacher, named.evaluate, named.runtime.accelerate_config
    if not Path(teacher.source).expanduser().is_dir() and not is_hub_id(teacher.source):
        yield f"teacher.source: {teacher.source}: no such folder, and not a hub id (org/name)"
    for key in ("train", "eval"):
        for name in getattr(named.prompts, key):
            if not Path(name).exists():
                yield f"prompts.{key}: {name}: no such file"
    if evaluate.judge is not None and not Path(evaluate.judge).is_dir():
        yield f"evaluate.judge: {evaluate.judge}: no such folder"
    if evaluate.real is not None and not Path(evaluate.real).is_file():
        yield f"evaluate.real: {evaluate.real}: no such file"
    yield from _missing_models(evaluate)
    yield from _missing_scorers(evaluate)
    if configs is not None and not Path(configs).is_file():
        yield f"runtime.accelerate_config: {configs}: no such file"
    yield from _missing_packages(named)


def _missing_packages(named: Params) -> Iterator[str]:
    for role in ("student", "fake"):
        if getattr(named.distill, role).states == "8bit" and find_spec("bitsandbytes") is None:
            yield f"distill.{role}.states: 8bit needs bitsandbytes: pip install bitsandbytes, or set it to fp32"
    tracker = named.runtime.tracker
    if tracker is not None and find_spec(tracker) is None:
        yield f"runtime.tracker: {tracker} is not installed: pip install {tracker}, or set it to null"


def local_model(source: str) -> Path | None:
    """The file or folder of a model of the metrics: a path, or `org/name[@revision]` in the hub's cache.

    None where it is not here; nothing is downloaded.
    """
    path = Path(source).expanduser()
    name, _, revision = source.partition("@")
    if path.exists() or not is_hub_id(name):
        return path if path.exists() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _missing_models(evaluate: Evaluate) -> Iterator[str]:
    """A line for each model that a chosen metric needs and that is not here, with the command that gets it."""
    users: dict[str, list[str]] = {}
    for metric in evaluate.metrics:
        for key in MODELS_OF[metric]:
            users.setdefault(key, []).append(metric)
    for key, metrics in users.items():
        source: str | None = getattr(evaluate.models, key)
        problem = "no model is named" if source is None else _lacks(key, source)
        if problem:
            whose = f"evaluate.models.{key}: {f'{source}: ' if source else ''}{problem}"
            yield f"{whose}, but evaluate.metrics has {', '.join(metrics)}: {_remedy(key, source)}"


def _lacks(key: str, source: str) -> str:
    """What is wrong with the model at `source`; empty where it is all there."""
    found = local_model(source)
    if found is None:
        return "not in the hub's cache" if is_hub_id(source.partition("@")[0]) else "no such file or folder"
    if key not in _FILES:
        return "" if found.is_file() else "a folder, expected a file of weights"
    missing = [pattern for pattern in _FILES[key] if not any(found.glob(pattern))]
    return f"has no {', '.join(missing)}" if missing else ""


def _remedy(key: str, source: str | None) -> str:
    name, _, revision = (source or "").partition("@")
    if key in _GET:
        return f"get it with `{_GET[key]}` and name it there, or leave the metric out"
    if not is_hub_id(name):
        return "name the right folder, or leave the metric out"
    at = f" --revision {revision}" if revision else ""
    files = "--include '*.json' --include '*.txt' --include '*.safetensors'"
    return f"get it with `hf download {name}{at} {files}`, or leave the metric out"


def _missing_scorers(evaluate: Evaluate) -> Iterator[str]:
    """A line for each scorer whose program, or whose script, is not there."""
    for scorer in evaluate.scorers:
        try:
            program, *arguments = shlex.split(scorer.command)
        except ValueError as error:
            yield f"evaluate.scorers: {scorer.name}: {scorer.command}: {error}"
            continue
        if shutil.which(program) is None:
            yield f"evaluate.scorers: {scorer.name}: {program}: no such program: see docs/evaluation.md"
        for name in arguments:
            if name.endswith(".py") and not Path(name).is_file():
                yield f"evaluate.scorers: {scorer.name}: {name}: no such file"


def program_files(command: str) -> list[str]:
    """The files that a scorer's command names: its program where that is a path in this folder, and its arguments."""
    program, *arguments = shlex.split(command)
    named = [*([program] if "/" in program and not Path(program).is_absolute() else []), *arguments]
    return [name for name in named if Path(name).is_file()]
