"""A judging from its models to its table: what the stages of judging/ and `cdm judge` do."""

from __future__ import annotations

from pathlib import Path

from cdm.errors import CdmError
from cdm.judging import models, tables
from cdm.judging.cells import Drawing, read_texts, resolve
from cdm.judging.design import Judging
from cdm.judging.drawing import draw_cell
from cdm.judging.measuring import Result, asked, measure_cell
from cdm.judging.page import render
from cdm.judging.places import Places
from cdm.judging.standing import Standing
from cdm.models.student import Model
from cdm.system.files import Memory, write_text

HASHES = ".hashes.json"


def remembered(places: Places) -> Path:
    """The file in which hashes of models are remembered from one run to the next."""
    return places.root / HASHES


def draw(judging: Judging, places: Places, row: str, name: str, memory: Memory) -> bool:
    """Draw a cell's pictures; False where they are there. Raises CdmError, also where the model is another than the one
    that the cell is of."""
    drawing = Drawing.read(places.drawing(row, name))
    model: Model = models.find(judging.models[row])
    if models.digest(model, memory) != drawing.model:
        raise CdmError(
            f"models.{row}: changed since the cells were worked out: run `dvc repro` in judging/ again"
        )
    texts = read_texts(places.prompts(name))
    return draw_cell(
        drawing, model, texts, places.samples(row, name), places.pictures(row, name), judging.runtime
    )


def measure(judging: Judging, places: Places, row: str, name: str) -> bool:
    """Measure a cell's pictures; False where its figures are there."""
    path = places.result(row, name)
    known = Result.read(path)
    if known is not None and known.asked == asked(judging, places, row, name):
        return False
    measure_cell(judging, places, row, name).write(path)
    return True


def write_tables(judging: Judging, places: Places, made_by: str) -> Standing:
    """Write table.md, table.csv and the page of the results that are there. Raises CdmError if there is none."""
    standing = Standing.read(judging, places)
    write_text(places.root / "table.md", tables.markdown(standing, made_by))
    write_text(places.root / "table.csv", tables.as_csv(standing))
    places.page.parent.mkdir(parents=True, exist_ok=True)
    write_text(places.page, render(standing, places))
    return standing


def judge(judging: Judging, out: Path) -> Standing:
    """All of it in the folder `out`, where what is there and still the same is not made again. Raises CdmError."""
    places = Places(out)
    out.mkdir(parents=True, exist_ok=True)
    with Memory.kept(remembered(places)) as memory:
        resolve(judging, places, memory)
        # The reference first: the figures of the others need its pictures.
        rows = sorted(judging.rows, key=lambda row: row != judging.reference)
        for name in judging.sets:
            for row in rows:
                drawn = draw(judging, places, row, name, memory)
                measured = measure(judging, places, row, name)
                if not (drawn or measured):
                    print(f"{row}, {name}: there already")
    return write_tables(judging, places, "Made by `cdm judge`.")
