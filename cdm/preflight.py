"""Checks, before a run starts, of what a params file asks for.

What it names exists and is what it should be: files and folders, models of measures, packages, programs that score
pictures. And no later stage would refuse it. This needs no torch. A result depends on nothing here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cdm import measures
from cdm.data.prompt_lists import read_split
from cdm.errors import CdmError, line, shown
from cdm.models.hub import downloaded, is_hub_id
from cdm.models.metric_models import load_model, missing_models, scorer_problem, without_missing
from cdm.models.use import Use, check_use
from cdm.params import Distill, Evaluate, Params, ParamsError, Runtime, read_yaml
from cdm.system.files import Memory, at_home, digest_of, read_json
from cdm.system.launcher import shared_device

if TYPE_CHECKING:
    from cdm.families.configs import Configs


def check_run(settings: Params, file: str = "params.yaml") -> None:
    """Raises CdmError with a line for everything that a stage would refuse, as far as it can be known before a run.
    `file` is where the settings are from."""
    pictures = too_few_pictures(settings.evaluate, settings.prompts.eval_count, settings.latents.per_prompt)
    _raise([*_problems(settings, file), *pictures])


def check_lists(settings: Params) -> None:
    """Raises CdmError where the prompt lists cannot be read, do not divide as they should, or are not those of the real
    pictures. It reads all of them, and so only the first stage asks."""
    split, _ = read_split(settings.prompts, settings.seed)
    if settings.evaluate.real is not None:
        _raise(list(problems_of_reals(settings.evaluate, split.eval, settings.latents.per_prompt)))


def check_teacher(settings: Params) -> None:
    """Raises CdmError where the teacher does not draw or read what is asked of it, by its configs: those on this disk,
    or of a published model. Nothing is fetched. Of another model nothing is known before the first stage has it."""
    from cdm.families import get_family

    teacher = settings.teacher
    family = get_family(teacher.family)
    folder = at_home(teacher.source)
    configs: Configs | None = (
        folder if _is(Path.is_dir, folder) else downloaded(teacher.source, teacher.revision)
    )
    if configs is None and teacher.source in family.published:
        configs = family.published[teacher.source].configs
    if configs is None:
        return
    use = use_of(settings)
    try:
        check_use(family, configs, teacher.resolution, use)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise CdmError(
            line(f"{teacher.source}: its configs describe no teacher of the family {family.name} ({problem})")
        ) from None


def check_models(evaluate: Evaluate) -> None:
    """Load the judge and every model of the chosen measures, one after the other, on the CPU, and drop them again.
    Raises CdmError for one that is broken or another than its place needs."""
    evaluate, _ = without_missing(evaluate)
    if not evaluate.metrics and evaluate.judge is None:
        return
    import torch

    from cdm.evaluation.features import JudgeFeatures

    if evaluate.judge is not None:
        JudgeFeatures(Path(evaluate.judge))
    loaded: set[str] = set()
    for measure in sorted(measures.chosen(evaluate.metrics), key=lambda each: each.kind != "score"):
        if measure.kind == "score" or not loaded.issuperset(measure.models):
            models = [load_model(key, evaluate.models, torch.device("cpu")) for key in measure.models]
            loaded.update(measure.models)
        if measure.kind == "score":  # it says whether its models fit each other
            measures.load(measure.compute)(*models)


def check_models_once(evaluate: Evaluate, recorded: Path, memory: Memory) -> None:
    """`check_models`, unless `memory` says that these very files were in order: those whose hashes are in `recorded`,
    which `cdm.external.record_evaluation` wrote."""
    key = digest_of([read_json(recorded), evaluate.metrics])
    if memory.values.get("models") != key:
        check_models(evaluate)
        memory.values["models"] = key


def use_of(settings: Params) -> Use:
    """What these parameters ask of the teacher. Raises CdmError for real pictures that cannot be read."""
    lora = settings.distill.lora
    targets = None if lora is None or isinstance(lora.targets, str) else tuple(lora.targets)
    return Use(settings.prompts.max_sequence_length, real_size(settings.evaluate), targets)


def real_size(evaluate: Evaluate) -> tuple[int, int] | None:
    """Height and width of the real pictures, in pixels; None where there are none. Raises CdmError."""
    if evaluate.real is None:
        return None
    _raise(list(_problems_of_real(Path(evaluate.real), evaluate.neighbours)))
    height, width = _header(Path(evaluate.real))[0]["images"][2:]
    return height, width


def check_paths(settings: Params) -> None:
    """Raises CdmError with a line for every file, folder or package that is named and that is not there or not what it
    should be."""
    _raise(list(_problems(settings)))


def _raise(problems: list[str]) -> None:
    if problems:
        raise CdmError("\n".join(map(line, problems)))


def _problems(settings: Params, file: str = "params.yaml") -> Iterator[str]:
    teacher, evaluate = settings.teacher, settings.evaluate
    if not _is(Path.is_dir, Path(teacher.source)) and not is_hub_id(teacher.source):
        yield f"teacher.source: {teacher.source}: no such folder, and not a hub id (org/name)"
    for key in ("train", "eval"):
        for name in getattr(settings.prompts, key):
            if not _is(Path.is_file, Path(name)) and not _is(Path.is_dir, Path(name)):
                yield f"prompts.{key}: {name}: no such file"
    yield from problems_of_evaluation(
        evaluate, f"get them with `cdm fetch {file}`, or go on without with `evaluate.missing: skip`"
    )
    if settings.runtime.accelerate_config is not None:
        yield from _problems_of_processes(
            Path(settings.runtime.accelerate_config), settings.distill, settings.runtime.device
        )
    yield from _missing_packages(settings.distill, settings.runtime)


def problems_of_evaluation(evaluate: Evaluate, remedy: str) -> Iterator[str]:
    """A line for everything that an evaluation needs and that is not there, or not what it should be; `remedy` says how
    to get models of measures."""
    if evaluate.judge is not None:
        yield from _problems_of_judge(Path(evaluate.judge))
    if evaluate.real is not None:
        yield from _problems_of_real(Path(evaluate.real), evaluate.neighbours)
    needed, _ = without_missing(evaluate)
    yield from missing_models(needed, remedy)
    for scorer in needed.scorers:
        if problem := scorer_problem(scorer.command):
            yield f"evaluate.scorers: {scorer.name}: {problem}"


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    """Whether a path is of a kind; it is not where the system does not take the name, or lets nobody look."""
    try:
        return kind(path)
    except OSError:
        return False


def too_few_pictures(evaluate: Evaluate, prompts: int, each: int) -> Iterator[str]:
    """Lines where an evaluation of so many prompts would compare fewer pictures, `each` of a prompt, than its measures
    need."""
    count = prompts * each
    most = measures.most_neighbours(count, count if evaluate.real is None else None)
    if evaluate.neighbours > most:
        yield (
            f"evaluate.neighbours {evaluate.neighbours} is too many for {count} samples of"
            f" {prompts} prompts: lower it, or raise latents.per_prompt or prompts.eval_count"
        )
    if evaluate.real is None:
        yield from _too_few_in_halves(evaluate, prompts, each, "samples")


def _too_few_in_halves(evaluate: Evaluate, prompts: int, each: int, what: str) -> Iterator[str]:
    """A line where half of the prompts, which intervals are resampled from, have fewer pictures than a measure needs:
    `each` of a prompt at least. `what` these are called."""
    users = [measure.name for measure in measures.chosen(evaluate.metrics) if measure.uses_neighbours]
    resampled = bool(evaluate.resamples) and prompts >= measures.FEWEST_PROMPTS
    half = prompts // 2 * each
    if users and resampled and evaluate.neighbours >= half:
        yield (
            f"evaluate.neighbours {evaluate.neighbours} is too many for the {half} {what} of half of the prompts,"
            f" which {users[0]} resamples: lower it, or set evaluate.resamples to 0"
        )


def _problems_of_judge(folder: Path) -> Iterator[str]:
    """What is wrong with a judge, by its config and the header of its weights."""
    if not _is(Path.is_dir, folder):
        yield f"evaluate.judge: {folder}: no such folder"
        return
    config = read_json(folder / "config.json")
    attributes = config.get("attributes") if isinstance(config, dict) else None
    if not isinstance(attributes, dict) or not all(map(_is_texts, attributes.values())):
        yield f"evaluate.judge: {folder / 'config.json'}: does not name the classes of attributes"
        return
    try:
        shapes, _ = _header(folder / "model.safetensors")
    except ValueError as error:
        yield f"evaluate.judge: {error}"
        return
    for name, classes in attributes.items():
        if shapes.get(f"heads.{name}.bias") != [len(classes)]:
            yield f"evaluate.judge: {folder}: its weights are not of the {len(classes)} classes of {name}"


def _problems_of_real(path: Path, neighbours: int) -> Iterator[str]:
    """What is wrong with a file of real pictures, by its header."""
    if not _is(Path.is_file, path):
        yield f"evaluate.real: {path}: no such file"
        return
    try:
        shapes, metadata = _header(path)
    except ValueError as error:
        yield f"evaluate.real: {error}"
        return
    try:
        prompts = json.loads(metadata.get("prompts", ""))
    except (ValueError, RecursionError):
        prompts = None
    shape = shapes.get("images", [])
    if len(shape) != 4 or shape[1] != 3:
        yield f"evaluate.real: {path}: holds no `images` of the shape (n, 3, height, width)"
    elif not _is_texts(prompts) or len(prompts) != shape[0]:
        yield f"evaluate.real: {path}: its metadata `prompts` is no JSON list of a text for each of {shape[0]} pictures"
    elif neighbours > measures.most_neighbours(shape[0], shape[0]):
        yield f"evaluate.neighbours {neighbours} is too many for the {shape[0]} pictures of {path}: lower it"


def problems_of_reals(evaluate: Evaluate, prompts: Sequence[str], each: int) -> Iterator[str]:
    """What is wrong with real pictures for these evaluation prompts, of which samples have `each`: every prompt needs
    one, and halves of them enough."""
    path = Path(evaluate.real or "")
    counts = Counter(json.loads(_header(path)[1]["prompts"]))
    missing = [text for text in prompts if text not in counts]
    if missing:
        yield (
            f"evaluate.real: {path} has no picture of {len(missing)} of the {len(prompts)} evaluation prompts (one is"
            f" {shown(missing[0])}): add some, or set evaluate.real to null to compare with the teacher"
        )
        return
    total = sum(counts[text] for text in prompts)
    drawn = len(prompts) * each
    if evaluate.neighbours > measures.most_neighbours(drawn, total):
        yield (
            f"evaluate.neighbours {evaluate.neighbours} is too many for {total} real pictures of the {len(prompts)}"
            " evaluation prompts: lower it, or raise prompts.eval_count"
        )
    fewest = min(each, *(counts[text] for text in prompts))
    yield from _too_few_in_halves(evaluate, len(prompts), fewest, "pictures")


def _header(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes of the tensors in a safetensors file, and its metadata. Raises ValueError."""
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
            return shapes, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _problems_of_processes(path: Path, distill: Distill, device: str) -> Iterator[str]:
    """What is wrong with a config of accelerate, and with what its processes would share."""
    if not _is(Path.is_file, path):
        yield f"runtime.accelerate_config: {path}: no such file"
        return
    try:
        config = read_yaml(path)
    except ParamsError as error:
        yield f"runtime.accelerate_config: {error}"
        return
    count = config.get("num_processes", 1) if isinstance(config, dict) else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        yield f"runtime.accelerate_config: {path}: names no number of processes: see the files in configs/"
        return
    if distill.batch_size % count:
        yield f"distill.batch_size {distill.batch_size} does not divide over {count} processes"
    if count > 1 and (problem := shared_device(device)):
        yield problem
    if count > 1 and config.get("distributed_type") == "FSDP":
        yield from unsharded(distill)


def unsharded(distill: Distill) -> Iterator[str]:
    """A line for every setting that does not work with parameters that are sharded over processes."""
    for name, needs in sorted(distill.losses.needs.items()):
        if not needs.sharded:
            yield f"distill.losses.{name} does not work sharded: give it weight 0, or use plain DDP"
    if distill.lora is not None and distill.lora.base != "precision":
        base = distill.lora.base
        yield f"distill.lora.base {base} does not work sharded: set it to precision, or use plain DDP"


def _missing_packages(distill: Distill, runtime: Runtime) -> Iterator[str]:
    for role in ("student", "fake"):
        if getattr(distill, role).states == "8bit" and find_spec("bitsandbytes") is None:
            yield f"distill.{role}.states: 8bit needs bitsandbytes: pip install bitsandbytes, or set it to fp32"
    base = distill.lora.base if distill.lora is not None else "precision"
    if base != "precision" and find_spec("bitsandbytes") is None:
        yield f"distill.lora.base: {base} needs bitsandbytes: pip install bitsandbytes, or set it to precision"
    tracker = runtime.tracker
    if tracker is not None and find_spec(tracker) is None:
        yield f"runtime.tracker: {tracker} is not installed: pip install {tracker}, or set it to null"
