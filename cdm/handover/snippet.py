"""Python that draws with a student in plain diffusers: what model cards and reports show."""

from __future__ import annotations

import json
from typing import Literal

from cdm.families.configs import INDEX, SCHEDULER, read_config
from cdm.families.folder import variants
from cdm.flow import inference_sigmas
from cdm.models.student import Model

Layout = Literal["diffusers", "lora", "single-file", "comfyui"]
STEPS = (1, 2, 4, 8)
"""Numbers of steps whose levels are spelt out."""
WIDTH = 80
"""Of a line, in characters."""


def diffusers_code(model: Model, name: str, layout: Layout, prompt: str) -> str:
    """A program that draws `prompt` in four steps with the student at the path `name`, and saves picture.png.

    In float32 on a CPU it draws the picture of `cdm sample` to the pixel.
    """
    teacher, length = teacher_of(model), model.origin.max_sequence_length if model.origin else None
    options = {"generator": "torch.Generator().manual_seed(0)"} | {
        key: repr(value)
        for key, value in model.family.call_options(model.base, model.latent_shape(), length).items()
    }
    levels = ",\n".join(f"    {steps}: {_levels(steps)}" for steps in STEPS)
    arguments = "\n".join(f"    {key}={value}," for key, value in options.items())
    return f"""\
import torch
{_loading(model, name, layout, teacher)}

sigmas = {{
{levels},
}}
image = pipeline(
    {_quoted(prompt)},
    sigmas=sigmas[4],
{arguments}
).images[0]
image.save("picture.png")"""


def teacher_of(model: Model) -> str:
    """The teacher as `teacher.source` named it, or where that is not recorded the folder at hand."""
    return model.origin.source if model.origin else str(model.base)


def _levels(steps: int) -> list[float]:
    return [float(sigma) for sigma in inference_sigmas(steps, shift=1.0)]


def _loading(model: Model, name: str, layout: Layout, teacher: str) -> str:
    """The lines that make `pipeline`."""
    index = read_config(model.base, INDEX)
    absent = [part for part, value in index.items() if isinstance(value, list) and value[0] is None]
    without = [f"{part}=None" for part in absent]
    of_teacher = [*without, *(f"variant={_quoted(each)}" for each in variants(model.base)[:1])]
    kind = model.family.pipeline_class_name
    if layout == "diffusers":
        return f"from diffusers import {kind}\n\npipeline = {_call(f'{kind}.from_pretrained', _quoted(name), *without)}"
    if layout == "lora":
        load = "pipeline" if _has_lora_loader(kind) else "pipeline.transformer"
        method = "load_lora_weights" if load == "pipeline" else "load_lora_adapter"
        return (
            f"from diffusers import {kind}\n\n"
            f"pipeline = {_call(f'{kind}.from_pretrained', _quoted(teacher), *of_teacher)}\n"
            f'{load}.{method}({_quoted(name)}, weight_name="pytorch_lora_weights.safetensors")'
            f"{_unstretched(model)}"
        )
    transformer = index["transformer"][1]
    single = [_quoted(name), f"config={_quoted(teacher)}", 'subfolder="transformer"']
    return (
        f"from diffusers import {transformer}, {kind}\n\n"
        f"transformer = {_call(f'{transformer}.from_single_file', *single)}\n"
        f"pipeline = {_call(f'{kind}.from_pretrained', _quoted(teacher), 'transformer=transformer', *of_teacher)}"
        f"{_unstretched(model)}"
    )


def _call(function: str, *arguments: str) -> str:
    """A call on one line, or where that is long with a line for each argument."""
    short = f"{function}({', '.join(arguments)})"
    return (
        short
        if len(short) <= WIDTH
        else "\n".join([f"{function}(", *(f"    {each}," for each in arguments), ")"])
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _unstretched(model: Model) -> str:
    """A line for a teacher whose scheduler stretches the levels, as Qwen-Image's does: a student has learnt without."""
    if read_config(model.base, SCHEDULER).get("shift_terminal") is None:
        return ""
    return "\npipeline.scheduler.register_to_config(shift_terminal=None)"


def _has_lora_loader(pipeline_class_name: str) -> bool:
    import diffusers

    return hasattr(getattr(diffusers, pipeline_class_name), "load_lora_weights")
