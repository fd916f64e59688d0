"""The command `python -m exact`: the methods on the exact world, as a table, data and figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cdm.errors import CdmError
from cdm.system import boundary


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Methods, as exact/methods.py names them; default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder to write exact.csv and the figures to.")] = Path("docs"),
    explain: Annotated[bool, typer.Option(help="Also draw the figure that explains CDM.")] = True,
) -> None:
    """Distil an exact Gaussian mixture with several methods, and print how far each student is from the truth."""
    from exact.methods import METHODS

    chosen = names or list(METHODS)
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        raise CdmError(f"no method {unknown[0]!r}: name some of {', '.join(METHODS)}")
    import torch

    from exact.experiment import run, table, write
    from exact.figure import Subjects, paint
    from exact.plots import compare
    from exact.world import World, two_spirals

    torch.set_num_threads(1)  # the networks are small: more threads would only wait for each other
    out.mkdir(parents=True, exist_ok=True)
    rows = run(World(two_spirals()), chosen, range(seeds), lambda line: print(line, file=sys.stderr))
    write(rows, out / "exact.csv")
    print(f"Energy distance x 100, {seeds} seeds, by number of evaluations\n")
    print(table(rows, "energy_distance", scale=100))
    print("\nSliced Wasserstein distance x 100\n")
    print(table(rows, "sliced_wasserstein", scale=100))
    compare(rows, out / "exact-methods.png")
    if explain:
        paint(Subjects.train(), out / "exact.png")


if __name__ == "__main__":
    boundary.run(boundary.program(main))
