"""Stage `draw`: the pictures of a cell; an interrupted one is taken up again at its last whole shard."""

from __future__ import annotations

from cdm.judging.design import load_judging
from cdm.judging.run import draw, remembered
from cdm.system.files import Memory
from cdm.system.launcher import launch
from judging.common import PARAMS, PLACES, Row, SetName, read_params
from stages.common import run


def main(row: Row, name: SetName) -> None:
    """Draw the prompts of a set with a model."""
    launch("judging.draw", load_judging(PARAMS).runtime.accelerate_config)
    with Memory.kept(remembered(PLACES)) as memory:
        draw(read_params(), PLACES, row, name, memory)


if __name__ == "__main__":
    run(main)
