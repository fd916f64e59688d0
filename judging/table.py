"""Stage `table`: the table, the page and the CSV of whatever cells have results; run it by hand at any time."""

from __future__ import annotations

from cdm.judging.run import write_tables
from cdm.judging.tables import text_table
from judging.common import PLACES, read_params
from stages.common import run

MADE_BY = "Made by `dvc --cd judging repro`; [docs/judging.md](../docs/judging.md) says how to read it."


def main() -> None:
    """Write the table and the page, and print the table."""
    print(text_table(write_tables(read_params(), PLACES, MADE_BY)))
    print(f"{PLACES.page}: the same with pictures")


if __name__ == "__main__":
    run(main)
