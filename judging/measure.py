"""Stage `measure`: the figures of a cell."""

from __future__ import annotations

from cdm.judging.measuring import measure_cell
from judging.common import PLACES, Row, SetName, read_params
from stages.common import run


def main(row: Row, name: SetName) -> None:
    """Measure the pictures that a model drew of a prompt set."""
    measure_cell(read_params(), PLACES, row, name).write(PLACES.result(row, name))


if __name__ == "__main__":
    run(main)
