"""The library without DVC: the page about it runs as it stands, and a run by hand is the pipeline's."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cdm
from cdm.handover.drawing import draw_pictures
from cdm.models.manifest import describe
from cdm.params import Params
from cdm.training.inputs import Inputs
from cdm.training.loop import distill
from tests.inputs import build_prompts
from tests.write_params import write_params

PAGE = Path(__file__).parent.parent / "docs/library.md"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def params(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """The params file of a tiny training in the present folder."""
    monkeypatch.chdir(tmp_path)
    return write_params(tmp_path, tiny_sd3, batch_size=1)


def weights(student: Path) -> dict[str, torch.Tensor]:
    return load_file(student / WEIGHTS)


@pytest.mark.slow
def test_the_page_runs_as_it_stands(params: Params, tmp_path: Path) -> None:
    first, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(first.strip().splitlines()) <= 10
    names: dict[str, object] = {}
    exec(first + second, names)
    assert names["training"].iteration == 120
    assert {path.name for path in (tmp_path / "runs/first").glob("*.png")} == {
        f"{n}.png" for n in (30, 60, 90, 120)
    }
    assert (tmp_path / "runs/first/student.csv").read_text().count("\n") == 61
    assert names["images"].shape == (1, 3, 32, 32)
    assert names["images"].dtype == torch.uint8


def test_importing_is_light_and_shows_the_interface() -> None:
    code = (
        "import sys, cdm; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules);"
        "assert set(cdm.__all__) <= set(dir(cdm)); cdm.load_params; cdm.CdmError;"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cdm.nothing


def test_by_hand_interrupted_and_resumed_it_is_the_student_of_the_pipeline(
    params: Params, tmp_path: Path
) -> None:
    params = cdm.load_params(tmp_path / "params.yaml", {"distill.iterations": 12, "distill.batch_size": 2})
    teacher = describe("sd3", params.teacher.source, None)
    build_prompts(params, teacher, tmp_path / "data")
    inputs = Inputs.gather(params, teacher, tmp_path / "data")
    distill(params, inputs, checkpoints=tmp_path / "ck", student=tmp_path / "student", log=tmp_path / "log.csv")

    first = cdm.Distillation(params, "by-hand")
    for _ in first:
        if first.iteration == 6:
            first.checkpoint()
        if first.iteration == 8:
            break  # what came behind the checkpoint is lost, and is done again
    second = cdm.Distillation(params, str(tmp_path / "by-hand"))
    assert second.iteration == 6
    pictures = second.draw(["a red three", "a blue three"], steps=2, seed=3)
    assert len(list(second)) == 3
    student = second.save("by-hand/student")
    assert {name: value.tolist() for name, value in weights(student).items()} == {
        name: value.tolist() for name, value in weights(tmp_path / "student").items()
    }
    assert student.with_name("student.csv").read_text() == (tmp_path / "log.csv").read_text()
    with pytest.raises(cdm.CdmError, match="all 12 iterations are done"):
        second.round()

    assert all(isinstance(picture, Image.Image) and picture.size == (32, 32) for picture in pictures)
    drawn = second.draw("a red three", steps=2, seed=3)[0]
    (saved,) = draw_pictures(student, ["a red three"], steps=2, seed=3, device="cpu")
    pixels = torch.from_numpy(np.array(drawn)).permute(2, 0, 1).int()
    assert (pixels - saved.int()).abs().max() <= 1
    assert pixels.float().std() > 0

    next(iter(second.state.average.values())).fill_(math.nan)
    with pytest.raises(cdm.CdmError, match="latents, pictures are not finite"):
        second.draw("a red three", steps=2)


def test_changes_are_checked_like_the_file(params: Params, tmp_path: Path) -> None:
    assert cdm.load_params("params.yaml", {"schedule.max_len": 6, "seed": 3}).schedule.max_len == 6
    with pytest.raises(cdm.CdmError, match=r"params.yaml: schedule.max_length: unknown key"):
        cdm.load_params("params.yaml", {"schedule.max_length": 6})
    with pytest.raises(cdm.CdmError, match=r"seed.value: seed is a value, not a section"):
        cdm.load_params("params.yaml", {"seed.value": 6})
