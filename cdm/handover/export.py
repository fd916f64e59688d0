"""Export of a student: in one of several layouts and precisions, with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families.configs import INDEX, read_config
from cdm.handover.adapters import for_comfyui, read_lora
from cdm.handover.card import Export, model_card
from cdm.handover.drawing import Precision
from cdm.handover.snippet import Layout
from cdm.measures import is_quality
from cdm.models.student import FULL, LORA, METADATA, Model, Origin, find_student, student_hashes
from cdm.system import git
from cdm.system.device import DTYPES
from cdm.system.files import at_home, digest_of, read_json
from cdm.system.places import check_folder, check_is_nobodys
from cdm.system.writing import placed

CARD = "README.md"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file that tells a folder with a LoRA, as diffusers names it."""
FILES: tuple[Layout, ...] = ("single-file", "comfyui")
"""Layouts that are one file."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    path: Path
    card: Path
    remark: str | None
    """Why the card has no figures, where a file of figures was named."""


def export(
    student: str | Path,
    out: str | Path,
    layout: Layout,
    *,
    precision: Precision = "fp32",
    metrics: str | Path | None = None,
) -> Exported:
    """Write the student at `student` to `out`: a folder, or for the layouts in `FILES` a file with its card beside it.

    `precision` is that of the student's own weights; the other parts of a diffusers folder stay as the teacher has
    them. The card quotes `metrics` (metrics/quality.json) if its figures are of this very student.
    Raises CdmError, before anything is written, if `out` is taken or the student has no such layout; `out` appears
    when it is whole, or not at all.
    """
    student, out = at_home(student), at_home(out)
    card = out.with_suffix(".md") if layout in FILES else out / CARD
    _check_free(out, card, layout)
    model, dtype = find_student(student), DTYPES[precision]
    _check_layout(student, model, layout)
    quality, remark = quality_of(student, None if metrics is None else at_home(metrics))
    here = Path()
    about = Export(out.name, layout, model, precision, quality, git.commit(here), git.differing(here))
    with _whole(out) as staged:
        _write(model, staged, layout, dtype)
        if staged.is_dir():
            (staged / CARD).write_text(model_card(about), encoding="utf-8")
    if not card.exists():
        card.write_text(model_card(about), encoding="utf-8")
    return Exported(out, card, remark)


def _check_free(out: Path, card: Path, layout: Layout) -> None:
    if (layout in FILES) != (out.suffix == ".safetensors"):
        wanted = "a name that ends in .safetensors" if layout in FILES else "the name of a folder"
        raise CdmError(f"--out is {out}: give {wanted} for the format {layout}")
    for path in (out, card):
        if path.exists():
            raise CdmError(f"{path}: exists and is not overwritten: remove it, or give --out another name")
    try:
        check_folder(out)
        check_is_nobodys(out, marks=(INDEX, LORA_WEIGHTS))
    except CdmError as error:
        raise CdmError(f"--out: {error}") from None


def _check_layout(student: Path, model: Model, layout: Layout) -> None:
    if layout in ("lora", "comfyui") and model.lora is None:
        raise CdmError(
            f"{student}: all its weights have learnt, so there is no LoRA in it: use the format diffusers or"
            " single-file, or distil with distill.lora"
        )
    if layout == "single-file":
        kind = _transformer_class(model)
        if not _has_single_file_loader(kind):
            raise CdmError(
                f"{student}: diffusers loads no single file as a {kind}: use the format diffusers"
                + (" or lora" if model.lora else "")
            )


def _transformer_class(model: Model) -> str:
    return str(read_config(model.base, INDEX)["transformer"][1])


def _has_single_file_loader(kind: str) -> bool:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return kind in SINGLE_FILE_LOADABLE_CLASSES


def quality_of(student: Path, metrics: Path | None) -> tuple[Mapping[str, Any] | None, str | None]:
    """The figures in the file `metrics` if they are of this very student; else None, and a remark that says why.

    The file has the hash of the student's files, which are read once to compare it. A file that is not there needs
    no remark.
    """
    if metrics is None or not metrics.exists():
        return None, None
    quality = read_json(metrics)
    measured = (quality.get("basis") or {}).get("student") if is_quality(quality) else None
    if not isinstance(measured, str):
        return None, (
            f"{metrics}: does not say which student its figures are of, so they are left out of the card: run the stage"
            " `evaluate` again"
        )
    if measured != digest_of(student_hashes(student)):
        return None, f"{metrics}: its figures are of another student, and are left out of the card"
    return quality, None


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A path beside `out` that takes its place at the end, and that is gone if anything fails."""
    try:
        with placed(out) as staged:
            yield staged
    except OSError as error:
        raise CdmError(f"--out is {out}: {error.strerror or error}") from None


def _write(model: Model, staged: Path, layout: Layout, dtype: torch.dtype) -> None:
    match layout:
        case "diffusers":
            staged.mkdir()
            model.family.save_student(_transformer(model).to(dtype), model.base, staged)
            if model.origin is not None:
                model.origin.write(staged / FULL)
        case "lora":
            factors, config = _adapter(model, dtype)
            model.family.save_lora(factors, config, staged)
            assert model.lora is not None
            shutil.copyfile(model.lora / LORA, staged / LORA)
        case "comfyui":
            factors, _ = _adapter(model, dtype)
            with torch.device("meta"):
                empty = model.family.build_transformer(model.base)
            named = for_comfyui(model.family, empty, factors)
            save_file({name: value.contiguous() for name, value in named.items()}, staged)
        case "single-file":
            state = _transformer(model).to(dtype).state_dict()
            save_file(
                {name: value.contiguous() for name, value in state.items()}, staged, metadata=_metadata(model)
            )


def _transformer(model: Model) -> nn.Module:
    """The student's transformer in float32, a LoRA fused into it."""
    if model.lora is None and model.weights is None:
        return model.family.load_transformer(model.base)
    transformer: Any = model.load(text=False, image=False).transformer
    if model.lora is not None:
        transformer.fuse_lora()
        transformer.unload_lora()
    fused: nn.Module = transformer
    return fused


def _metadata(model: Model) -> dict[str, str]:
    """A single entry: of several, safetensors would write the order at random."""
    origin = model.origin or Origin(model.family.name, str(model.base), None, "")
    return {METADATA: origin.as_text()}


def _adapter(model: Model, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The factors of the student's LoRA in `dtype`, and peft's config."""
    assert model.lora is not None
    factors, config = read_lora(model.lora)
    return {name: value.to(dtype) for name, value in factors.items()}, config
