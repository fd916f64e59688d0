"""The model card of a student: what it is, how it was made, how good it is, and how to draw with it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML

from cdm.flow import inference_sigmas
from cdm.handover.snippet import STEPS, Layout, diffusers_code
from cdm.measures import HEADLINES, basics, by_judge
from cdm.models.hub import is_hub_id
from cdm.models.student import Model
from cdm.system.circumstances import some_of

PROMPT = "PROMPT"
COLUMNS = ("evaluations", *(quantity.key for quantity in HEADLINES), "precision", "recall")
"""Figures of `metrics/quality.json` that a card shows, where they are there."""
DIGITS = 4
"""Significant digits of a figure."""
SHOWN = 12
"""Characters of a hash that are shown."""
NAMED = 5
"""Changed files that are named; of the rest the number is told."""
SHOWN_STEPS = 4
"""Steps whose levels are spelt out for ComfyUI."""
ADAPTERS = ("lora", "comfyui")
"""Layouts that need the teacher's transformer."""


@dataclass(frozen=True)
class Export:
    """The facts that a card states."""

    name: str
    """Name of the folder or file that was written."""
    layout: Layout
    model: Model
    """What was exported."""
    precision: str
    quality: Mapping[str, Any] | None
    """The content of `metrics/quality.json`, where it is about this student."""
    commit: str | None
    """Of the repository that it was exported in."""
    changed: Sequence[str] = ()
    """Files of that repository that differed from the commit."""


def model_card(export: Export) -> str:
    """The card, Markdown with the hub's YAML in front."""
    parts = [
        front_matter(export),
        f"# {export.name}",
        _summary(export),
        f"## Use\n\n{_usage(export)}",
        f"## Quality\n\n{_quality(export)}",
        f"## Training\n\n{_training(export)}",
        "## Licence\n\nThat of the teacher, whose weights these are made from.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(export: Export) -> str:
    """The YAML block that the hub reads. A teacher that is a folder here has no name there."""
    from huggingface_hub import ModelCardData

    origin = export.model.origin
    known = origin is not None and is_hub_id(origin.source)
    data = ModelCardData(
        base_model=origin.source if origin is not None and known else None,
        base_model_relation=("adapter" if export.layout in ADAPTERS else "finetune") if known else None,
        library_name="diffusion-single-file" if export.layout == "comfyui" else "diffusers",
        pipeline_tag="text-to-image",
        tags=[
            "text-to-image",
            "diffusion-distillation",
            "few-step",
            "cdm",
            export.model.family.name,
            *(["comfyui"] if export.layout == "comfyui" else []),
            *(["lora"] if export.layout in ADAPTERS else []),
        ],
    )
    return f"---\n{data.to_yaml().strip()}\n---"


def _summary(export: Export) -> str:
    origin = export.model.origin
    teacher = "a teacher that is not recorded" if origin is None else f"`{origin.source}`"
    if origin is not None and origin.revision:
        teacher += f" at `{origin.revision}`"
    kind = {
        "diffusers": "a complete diffusers folder",
        "lora": "a LoRA for its teacher",
        "single-file": "the transformer as one file; the other parts are the teacher's",
        "comfyui": "a LoRA for its teacher in ComfyUI",
    }[export.layout]
    return (
        f"A few-step student of {teacher}: it draws in one to eight steps without guidance, one evaluation of the"
        " network a step. Distilled by continuous-time distribution matching"
        f" ([arXiv 2605.06376](https://arxiv.org/abs/2605.06376)). This is {kind}, in {export.precision}."
    )


def _usage(export: Export) -> str:
    return _usage_in_comfyui(export) if export.layout == "comfyui" else _usage_in_diffusers(export)


def _usage_in_comfyui(export: Export) -> str:
    levels = ", ".join(f"{sigma:g}" for sigma in inference_sigmas(SHOWN_STEPS, shift=1.0).tolist())
    return f"""\
Put `{export.name}` into `models/loras` of ComfyUI, and a node `LoraLoaderModelOnly` with it behind the loader of the
teacher. Keep to these settings:

- strength of the LoRA: 1. The file holds the whole strength, and no alpha.
- `cfg`: 1. The student has learnt the guidance.
- sampler `euler`, scheduler `simple`, denoise 1, {STEPS[0]} to {STEPS[-1]} steps. These are the levels that it was
  trained for: with {SHOWN_STEPS} steps {levels}, before the model's own shift.
- size and shift: those of the teacher."""


def _usage_in_diffusers(export: Export) -> str:
    code = diffusers_code(export.model, export.name, export.layout, PROMPT)
    command = f'cdm sample "{PROMPT}" --student {export.name} --steps 4 --seed 0 --out picture.png'
    return f"""\
```python
{code}
```

Keep to these settings:

- `sigmas`: the levels before the model's own shift, {STEPS[0]} to {STEPS[-1]} of them. diffusers' own for so few steps
  are others, and waste the last step.
- the other arguments as they are: no guidance, which the student has learnt, and the size and length of text that it
  was trained with.

The same picture, to the pixel in float32 on a CPU (elsewhere but for rounding):

```
{command}
```

Its seed is that of `generator`; with several prompts, the next ones have the next seeds. On an accelerator add
`.to("cuda")` (or `"mps"`) to the pipeline, and `torch_dtype=torch.bfloat16` where it is loaded to halve its memory."""


def _quality(export: Export) -> str:
    quality = export.quality
    if quality is None:
        return "Not measured, or not known to be this student's."
    rows = [
        (name if name == "student" else "teacher, guided", int(steps.removeprefix("steps")), figures)
        for name in ("teacher", "student")
        for steps, figures in quality[name].items()
    ]
    known = basics(by_judge(quality))
    shown = [known[key] for key in COLUMNS if all(key in figures for _, _, figures in rows)]
    lines = [
        "| model | steps | " + " | ".join(column.title for column in shown) + " |",
        "| --- |" + " ---: |" * (len(shown) + 1),
    ]
    for name, steps, figures in sorted(rows, key=lambda row: (row[0] == "student", row[1])):
        cells = " | ".join(_rounded(figures[column.key]) for column in shown)
        lines.append(f"| {name} | {steps} | {cells} |")
    return "\n".join([*lines, "", _measured(export, quality)])


def _rounded(value: float) -> str:
    """A count as it is; else so many significant digits, with the zeros at their end."""
    return f"{value:,}" if isinstance(value, int) else f"{value:#.{DIGITS}g}"


def _measured(export: Export, quality: Mapping[str, Any]) -> str:
    """What the figures are of."""
    counts = {figures.get("count") for figures in quality["student"].values()}
    of = f"{count:,} samples each" if len(counts) == 1 and (count := counts.pop()) else "samples"
    text = f"Of {of}, drawn by the student whose files have the hash `{quality['basis']['student'][:SHOWN]}`"
    return (
        text + (", before its weights became " + export.precision if export.precision != "fp32" else "") + "."
    )


def _training(export: Export) -> str:
    origin, parts = export.model.origin, []
    if origin is not None and origin.params:
        stream = io.StringIO()
        yaml = YAML()
        yaml.default_flow_style = None  # short lists and mappings on a line
        yaml.dump(dict(origin.params), stream)
        parts.append(
            f"Parameters, as `params.yaml` of the pipeline names them:\n\n```yaml\n{stream.getvalue()}```"
        )
    else:
        parts.append("The parameters are not recorded.")
    if origin is not None:
        parts.append(f"Digest of the teacher: `{origin.digest}`.")
    if export.commit is not None:
        parts.append(f"Exported from a repository at commit `{export.commit}`{_changes(export.changed)}.")
    return "\n\n".join(parts)


def _changes(files: Sequence[str]) -> str:
    """The rest of a sentence about a working tree in which `files` differ from the commit."""
    if not files:
        return ""
    return f", whose tree was not clean: these files differed from it: {some_of(files, NAMED)}"
