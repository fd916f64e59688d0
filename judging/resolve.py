"""Stage `resolve`: checks everything, finds models and prompts, and writes what each cell is made from."""

from __future__ import annotations

from cdm.judging.cells import resolve
from cdm.judging.run import remembered
from cdm.system.files import Memory
from judging.common import PLACES, read_params
from stages.common import run


def main() -> None:
    """Check the params file and what it names, and work out the cells."""
    judging = read_params()
    with Memory.kept(remembered(PLACES)) as memory:
        found = resolve(judging, PLACES, memory)
    print(f"{len(found)} models on {len(judging.sets)} prompt sets: {len(found) * len(judging.sets)} cells")


if __name__ == "__main__":
    run(main)
