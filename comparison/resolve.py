"""Stage `resolve`: the full parameters of every cell, a file each, so that a cell depends on its own and no others."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Annotated

import typer
from ruamel.yaml import YAML

from cdm.models.manifest import TeacherManifest
from cdm.params import Params, load
from comparison import design
from stages.common import PARAMS, TeacherFile, run


def main(
    teacher: TeacherFile = Path("data/teacher.json"),
    out: Annotated[Path, typer.Option(help="Folder to write.")] = design.CELLS,
) -> None:
    """Work out the parameters of every method: matched guidance, and equal updates or equal cost."""
    comparison, base = design.load_comparison(), load(PARAMS)
    shift = TeacherManifest.read(teacher).shift
    # Whatever params.yaml distils with, which the teacher's rows and pairs do not depend on, is not to outdate them.
    reference = design.own_settings(comparison.methods[comparison.reference], base)
    texts = {"teacher.yaml": text(design.measured_at(reference, comparison.steps, comparison.steps))}
    pairs = 0
    for table, name, params in design.cells(comparison, base, shift):
        texts[f"{table}/{name}.yaml"] = text(params)
        pairs = max(pairs, params.latents.train_pairs)
        print(f"{table}/{name}: {summary(params, shift)}")
    texts["pairs.yaml"] = text(design.with_pairs(reference, pairs))
    shutil.rmtree(out, ignore_errors=True)
    for name, content in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content, encoding="utf-8")
    print(f"{len(texts) - 2} cells of {len(comparison.seeds)} seeds each")


def summary(params: Params, shift: float) -> str:
    """What has been worked out, for people."""
    strength = design.guidance_strength(params, shift)
    return (
        f"{design.student_updates(params):,} student updates,"
        f" {design.forward_equivalents(params, shift) / 1e6:.3f} million forward-equivalents,"
        f" guidance strength {'none' if strength is None else format(strength, '.3g')}"
    )


def text(params: Params) -> str:
    """A params file of all that is not at its default: a parameter that is added later changes no cell.

    Without `runtime`, which is the machine's and changes no result.
    """
    buffer = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(params.model_dump(mode="json", exclude={"runtime"}, exclude_defaults=True), buffer)
    return buffer.getvalue()


if __name__ == "__main__":
    run(main)
