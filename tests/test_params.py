"""Every bad value and every unknown key of a params file is refused with one line that names it."""

from __future__ import annotations

import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from pydantic import BaseModel
from ruamel.yaml import YAML

from cdm.params import Params, ParamsError, load, parse

ROOT = Path(__file__).parent.parent
DEFAULTS = YAML(typ="safe").load((ROOT / "params.yaml").read_text())


REMOVED = object()


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The repository's params with some keys set, or `REMOVED`; a number in a key counts elements of a list."""
    values = deepcopy(DEFAULTS)
    for key, value in changes.items():
        *sections, last = (int(part) if part.isdigit() else part for part in key.split("."))
        section: Any = values
        for part in sections:
            section = section.setdefault(part, {}) if isinstance(section, dict) else section[part]
        if value is REMOVED:
            del section[last]
        else:
            section[last] = value
    return values


def problems(values: Any) -> list[str]:
    with pytest.raises(ParamsError) as caught:
        parse(values)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted(ROOT.glob("recipes/*.yaml"))], ids=lambda p: p.name
)
def test_every_params_file_of_the_repository_is_accepted(path: Path) -> None:
    assert isinstance(load(path), Params)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 1.5, "integer"),
        ("seed", None, "integer"),
        ("teacher.family", "unet", "unknown family 'unet' (known: "),
        ("teacher.source", 3, "string"),
        ("teacher.guidance_scale", 0.5, "greater than or equal to 1"),
        ("prompts.train", [], "at least 1"),
        ("prompts.train", "a.txt", "list"),
        ("prompts.eval_count", 0, "greater than or equal to 1"),
        ("prompts.max_sequence_length", -1, "greater than or equal to 0"),
        ("prompts.embed", "sometimes", "'cached' or 'online'"),
        ("latents.steps", 0, "greater than or equal to 1"),
        ("latents.per_prompt", 0, "greater than or equal to 1"),
        ("schedule.kind", "random", "'dynamic'"),
        ("schedule.min_len", 0, "greater than or equal to 1"),
        ("schedule.max_len", "six", "integer"),
        ("schedule.sigma_min", 0, "greater than 0"),
        ("schedule.sigma_max", 1, "less than 1"),
        ("schedule.spacing", "even", "'stratified' or 'independent'"),
        ("schedule.sigmas.1", 1.5, "less than or equal to 1"),
        ("distill.iterations", 0, "greater than or equal to 1"),
        ("distill.batch_size", 0, "greater than or equal to 1"),
        ("distill.student_every", 0, "greater than or equal to 1"),
        ("distill.fake_only", -1, "greater than or equal to 0"),
        ("distill.rollouts", "two", "'shared' or 'fresh'"),
        ("distill.losses.ca.weight", -1, "greater than or equal to 0"),
        ("schedule.ends", "noise", "'data' or 'next'"),
        ("distill.fake_target", "noise", "'score' or 'data'"),
        ("distill.losses.dm.guidance_scale", 0.5, "greater than or equal to 1"),
        ("distill.losses.regression.weight", -1, "greater than or equal to 0"),
        ("distill.losses.sgmd.regulariser", -1, "greater than or equal to 0"),
        ("distill.losses.consistency.step", 2, "less than or equal to 1"),
        ("distill.losses.min_norm", 0, "greater than 0"),
        ("latents.train_pairs", -1, "greater than or equal to 0"),
        ("distill.losses.ca.scale", -0.1, "greater than or equal to 0"),
        ("distill.losses.dm.bounded", "perhaps", "boolean"),
        ("distill.renoise_min", -0.1, "greater than or equal to 0"),
        ("distill.renoise_max", 1.1, "less than or equal to 1"),
        ("distill.student.lr", 0, "greater than 0"),
        ("distill.student.warmup", -5, "greater than or equal to 0"),
        ("distill.fake.betas", [0.9], "missing"),
        ("distill.fake.clip", 0, "greater than 0"),
        ("distill.merge", 2, "less than or equal to 1"),
        ("distill.ema", 1.5, "less than or equal to 1"),
        ("distill.keep", "first", "'last' or 'best'"),
        ("distill.lora", {"rank": 0, "alpha": 1}, "greater than or equal to 1"),
        ("distill.lora", {"rank": 1, "alpha": 1, "base": "2bit"}, "'precision', '8bit' or '4bit'"),
        (
            "distill.lora",
            {"rank": 1, "alpha": 1, "targets": "mlp"},
            "'mlp' is neither attention nor attention+feed-forward",
        ),
        ("distill.lora", {"rank": 1, "alpha": 1, "targets": []}, "[] is neither attention nor"),
        ("distill.probe.every", 0, "greater than or equal to 1"),
        ("distill.probe.reference", "pairs", "'none' or 'latents'"),
        ("distill.probe.samples", 1, "greater than or equal to 2"),
        ("distill.probe.steps", [], "at least 1"),
        (
            "distill.probe.metrics",
            ["lpips"],
            "'lpips' is no measure without a model (known: saturation, contrast,",
        ),
        ("distill.precision", "fp8", "'fp32' or 'bf16'"),
        ("sample.steps", [], "at least 1"),
        ("sample.steps.0", 0, "greater than or equal to 1"),
        ("sample.pictures", 0, "greater than or equal to 1"),
        ("evaluate.neighbours", 0, "greater than or equal to 1"),
        ("runtime.batch_size", 0, "greater than or equal to 1"),
        ("runtime.checkpoint_every", 0, "greater than or equal to 1"),
        ("runtime.pictures_every", -1, "greater than or equal to 0"),
        ("runtime.timeout_hours", 0, "greater than 0"),
        ("runtime.tracker", "excel", "'tensorboard' or 'wandb'"),
    ],
)
def test_a_bad_value_is_refused_and_named(key: str, value: Any, says: str) -> None:
    lines = problems(changed({key: value}))
    assert any(line.startswith(key) and says in line for line in lines), lines


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule.min_len": 6, "schedule.max_len": 4}, "schedule: max_len 4 is below min_len 6"),
        (
            {"schedule.sigma_min": 0.9, "schedule.sigma_max": 0.5},
            "schedule: sigma_max 0.5 is not above sigma_min 0.9",
        ),
        ({"schedule.sigmas": [1.0, 0.5, 0.5]}, "schedule: sigmas must fall from 1.0"),
        ({"schedule.sigmas": [0.9, 0.5]}, "schedule: sigmas must fall from 1.0"),
        ({"schedule.off_range": [0.9, 0.2]}, "schedule: off_range falls from 0.9 to 0.2"),
        ({"schedule.sigmas": []}, "schedule: sigmas must fall from 1.0"),
        ({"distill.renoise_min": 0.7, "distill.renoise_max": 0.6}, "distill: renoise_max 0.6 is not above"),
        ({"distill.iterations": 12, "distill.fake_only": 12}, "distill: iterations 12 leave no student update"),
        ({"distill.fake_only": 61}, "distill: fake_only 61 is not a multiple of student_every 3: use 60"),
        (
            {f"distill.losses.{term}.weight": 0 for term in ("ca", "dm", "cdm")},
            "distill.losses: all terms have weight 0",
        ),
        (
            {"distill.losses.regression.weight": 1},
            "the file: distill.losses.regression has a weight, but there are no pairs: set latents.train_pairs",
        ),
        (
            {"latents.train_pairs": 8, "prompts.embed": "online"},
            "the file: latents.train_pairs needs the training prompts encoded",
        ),
        (
            {"schedule.ends": "next"},
            "the file: schedule.ends is next, which is for dm alone: give ca, cdm weight 0",
        ),
        ({"distill.keep": "best"}, "distill: keep is best, but nothing tells which is: set probe.reference"),
        ({"distill.probe.steps": [4, 4]}, "distill.probe: steps names a number twice: [4, 4]"),
        ({"distill.probe.metrics": ["contrast"]}, "distill.probe: metrics are chosen, but there is no probe"),
        (
            {"distill.probe.metrics": ["contrast", "contrast"], "distill.probe.reference": "latents"},
            "distill.probe: metrics names something twice: contrast, contrast",
        ),
        (
            {"distill.probe.best_by": "contrast", "distill.probe.reference": "latents"},
            "distill.probe: best_by is 'contrast', which is neither distance nor one of metrics",
        ),
        ({"sample.steps": [2, 4, 2]}, "sample: steps names a number twice: [2, 4, 2]"),
        ({"sample.teacher_steps": [1, 1]}, "sample: teacher_steps names a number twice: [1, 1]"),
    ],
)
def test_values_that_contradict_each_other_are_refused(changes: dict[str, Any], says: str) -> None:
    (line,) = problems(changed(changes))
    assert line.startswith(says)


def sections(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all sections, the file itself being the empty one."""
    found = [prefix]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += sections(field.annotation, f"{prefix}.{name}".lstrip("."))
    return found


def numbers(schema: dict[str, Any], definitions: dict[str, Any], key: str = "") -> dict[str, dict[str, Any]]:
    """The schemas of all numbers below a schema, by dotted key; a 0 in a key counts elements of a list."""
    if "$ref" in schema:
        return numbers(definitions[schema["$ref"].split("/")[-1]], definitions, key)
    if schema.get("type") in ("integer", "number"):
        return {key: schema}
    inside = [(f"{key}.{name}".lstrip("."), each) for name, each in schema.get("properties", {}).items()]
    inside += [(key, each) for each in schema.get("anyOf", [])]
    items = schema.get("prefixItems", [])[:1] or [schema[name] for name in ["items"] if name in schema]
    inside += [(f"{key}.0", each) for each in items]
    return {name: each for place, part in inside for name, each in numbers(part, definitions, place).items()}


SCHEMA = Params.model_json_schema()
NUMBERS = numbers(SCHEMA, SCHEMA["$defs"])


def test_every_number_has_bounds() -> None:
    assert len(NUMBERS) > 60
    assert {"seed", "schedule.sigmas.0", "distill.lora.rank", "distill.student.betas.0"} <= set(NUMBERS)
    for ends in (("maximum", "exclusiveMaximum"), ("minimum", "exclusiveMinimum")):
        assert [key for key, schema in NUMBERS.items() if not set(ends) & set(schema)] == []


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e300, True, "many"])
def test_what_is_no_number_that_makes_sense_is_refused_everywhere(value: Any) -> None:
    for key in NUMBERS:
        changes = {"distill.lora": {"rank": 4, "alpha": 4.0}} if key.startswith("distill.lora.") else {}
        if key == "schedule.off_range.0":
            changes = {"schedule.off_range": [0.2, 0.8]}
        lines = problems(changed(changes | {key: value}))
        assert any(line.startswith(key) for line in lines), (key, lines)


def test_many_problems_are_counted() -> None:
    lines = problems(changed({f"unknown{i}": i for i in range(100)}))
    assert len(lines) == 21
    assert lines[-1] == "and 80 more problems"


@pytest.mark.parametrize("section", sections(Params), ids=lambda section: section or "top")
def test_an_unknown_key_is_refused_in_every_section(section: str) -> None:
    key = f"{section}.lerning_rate".lstrip(".")
    (line,) = problems(changed({key: 1}))
    assert line.startswith(f"{key}: unknown key (known here: ")


@pytest.mark.parametrize("key", ["seed", "teacher", "distill.losses.dm", "schedule.max_len", "sample.steps"])
def test_a_missing_key_is_named(key: str) -> None:
    assert problems(changed({key: REMOVED})) == [f"{key}: missing"]


def test_every_problem_has_a_line_of_its_own() -> None:
    values = changed({"seed": -1, "distill.typo": 1, "sample.steps": []})
    assert [line.split(":")[0] for line in problems(values)] == ["seed", "distill.typo", "sample.steps"]


@pytest.mark.parametrize("values", [None, [], "seed", 3])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    (line,) = problems(values)
    assert line.startswith("the file: ")


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """`dvc exp run -S distill.student.lr=3e-5` writes 3e-05, a string to a YAML 1.1 reader."""
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    written = re.sub(r"student:( +#.*)\n    lr: [^ ]*", r"student:\1\n    lr: 3e-05", text)
    assert written != text
    path.write_text(written)
    assert load(path).distill.student.lr == 3e-5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        ("seed: [", "not valid YAML: "),
        ("seed: 0\nseed: 1\n", "not valid YAML: "),
        ("", "the file: "),
    ],
    ids=["missing", "unfinished", "duplicate", "empty"],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ParamsError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {says}")
    assert "\n" not in str(caught.value)


def test_every_parameter_says_what_it_means() -> None:
    def undocumented(model: type[BaseModel]) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found += undocumented(field.annotation)
            elif not field.description:
                found.append(f"{model.__name__}.{name}")
        return found

    assert undocumented(Params) == []


def test_params_cannot_be_changed() -> None:
    params = parse(DEFAULTS)
    with pytest.raises(ValueError, match="frozen"):
        params.schedule.max_len = 3  # type: ignore[misc]


FILES = [ROOT / "params.yaml", *sorted(ROOT.glob("recipes/*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_default_is_silent(path: Path) -> None:
    """Every key stands in every params file: what shapes a result is in the file, not in the code."""
    values = YAML(typ="safe").load(path.read_text())
    assert values == load(path).model_dump(mode="json")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_dvc_leaves_a_params_file_as_it_is(path: Path, tmp_path: Path) -> None:
    """`dvc exp run -S` writes the file anew: the first one changes the line that it is to change, and no other."""
    copy = Path(shutil.copy(path, tmp_path / "params.yaml"))
    apply_overrides(copy, ["distill.fake.lr=3e-5", "sample.pictures=3"])
    before, after = path.read_text().splitlines(), copy.read_text().splitlines()
    changed_lines = [old for old, new in zip(before, after, strict=True) if old != new]
    assert [line.split(":")[0].strip() for line in changed_lines] == ["lr", "pictures"]
