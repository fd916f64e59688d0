"""The page of `cdm demo`: what it draws, where it finds the teacher, and the page itself in a browser."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cdm.data.sampling import evaluations
from cdm.errors import CdmError
from cdm.families import get_family
from cdm.handover import demo as actions
from cdm.handover import demo_page
from cdm.handover.demo import Shot, find_teacher, open_demo
from cdm.handover.drawing import draw_pictures
from cdm.handover.export import export
from cdm.models.manifest import TeacherManifest
from cdm.models.student import FULL, Origin, find_student
from cdm.params import Params
from tests import chromium
from tests.pictures import served
from tests.test_cli import Command, as_file, command  # noqa: F401 - a fixture
from tests.test_export import full_student, lora_student  # noqa: F401 - fixtures

ROOT = Path(__file__).parent.parent
FAMILY = get_family("sd3")
PROMPT = "a red three on black paper"


@pytest.fixture
def about(tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path) -> dict[str, Path]:
    """Files of a pipeline with that teacher: its parameters, with guidance 3 and 4 steps, and the manifest."""
    as_file(tiny_params, tmp_path / "params.yaml")
    tiny_teacher.write(tmp_path / "teacher.json")
    return {"params": tmp_path / "params.yaml", "manifest": tmp_path / "teacher.json"}


def test_student_and_teacher_draw_the_same_noise(
    full_student: Path,  # noqa: F811
    tiny_sd3: Path,
    about: dict[str, Path],
) -> None:
    demo = open_demo(full_student, device="cpu", **about)
    assert (demo.teacher_steps, demo.guidance_scale, demo.remark) == (4, 3.0, "")
    assert demo.examples == ["a blue six on white paper", "a pink nine on gray paper", "a cyan zero on brown paper",
                             "a green two on gray paper"]  # fmt: skip
    student = demo.by_student(PROMPT, 2, 7)
    assert torch.equal(student.picture, draw_pictures(full_student, [PROMPT], 2, 7, device="cpu")[0])
    assert (student.steps, student.evaluations) == (2, 2)
    assert student.seconds > 0
    teacher = demo.by_teacher(PROMPT, 7)
    assert teacher is not None
    assert (teacher.steps, teacher.evaluations) == (4, evaluations(4, 3.0))
    assert teacher.picture.shape == student.picture.shape == (3, 32, 32)
    unguided = open_demo(full_student, device="cpu", teacher_steps=2, guidance_scale=1.0, **about)
    alike = unguided.by_teacher(PROMPT, 7)
    assert alike is not None
    assert torch.equal(alike.picture, draw_pictures(tiny_sd3, [PROMPT], 2, 7, device="cpu")[0])
    assert not torch.equal(alike.picture, teacher.picture)


def test_the_teachers_picture_is_remembered(full_student: Path, about: dict[str, Path]) -> None:  # noqa: F811
    demo = open_demo(full_student, device="cpu", **about)
    first = demo.by_teacher(PROMPT, 7)
    demo.by_student("something else", 1, 1)
    assert demo.by_teacher(f" {PROMPT}\n", 7) is first
    assert demo.by_teacher(PROMPT, 8) is not first
    for seed in range(actions.REMEMBERED):
        demo._drawn["other", seed] = Shot(torch.zeros(3, 1, 1), 1, 1, 1.0)
    demo.by_teacher(PROMPT, 9)
    assert len(demo._drawn) <= actions.REMEMBERED + 2
    assert (PROMPT, 7) not in demo._drawn


@pytest.mark.parametrize("layout", ["lora", "single-file"])
def test_exports_have_their_teacher_beside_them(
    lora_student: Path,  # noqa: F811
    tmp_path: Path,
    about: dict[str, Path],
    layout: str,
) -> None:
    name = "out" if layout == "lora" else "out.safetensors"
    made = export(lora_student, tmp_path / name, layout).path  # type: ignore[arg-type]
    demo = open_demo(made, device="cpu", **about)
    assert demo.name == str(made)
    student, teacher = demo.by_student(PROMPT, 1, 0), demo.by_teacher(PROMPT, 0)
    assert torch.equal(student.picture, draw_pictures(made, [PROMPT], 1, 0, device="cpu")[0])
    assert teacher is not None
    assert not torch.equal(student.picture, teacher.picture)


def test_a_student_without_its_teacher_draws_alone(
    full_student: Path,  # noqa: F811
    tiny_teacher: TeacherManifest,
    tmp_path: Path,
    about: dict[str, Path],
) -> None:
    def remark(origin: Origin | None, **changes: Path) -> str:
        if origin is None:
            (full_student / FULL).unlink()
        else:
            origin.write(full_student / FULL)
        demo = open_demo(full_student, device="cpu", **{**about, **changes})
        assert demo.by_teacher(PROMPT, 0) is None
        assert demo.by_student(PROMPT, 1, 0).picture.shape == (3, 32, 32)
        assert actions.introduction(demo).endswith(f"{demo.remark}.")
        return demo.remark

    here = Origin.from_training(tiny_teacher)
    assert remark(here, params=tmp_path / "none.yaml") == (
        "No teacher beside it: the teacher's guidance is not recorded here: give --guidance to see it as well"
    )
    assert remark(replace(here, source="no/such")) == "No teacher beside it: no/such is not on this machine"
    other = replace(here, digest="another")
    assert remark(other).endswith("is not the teacher that the student was distilled from")
    assert remark(None) == "No teacher beside it: the student does not say which teacher it is of"


def test_a_folder_is_taken_for_the_teacher_where_nothing_says_otherwise(
    full_student: Path,  # noqa: F811
    tiny_sd3: Path,
    tmp_path: Path,
) -> None:
    assert find_teacher(find_student(full_student), tmp_path / "none.json").base == tiny_sd3
    model = find_student(full_student)
    assert model.origin is not None
    shutil.copytree(tiny_sd3, tmp_path / "flux")
    index = tmp_path / "flux/model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "FluxPipeline"))
    elsewhere = replace(model, origin=replace(model.origin, source=str(tmp_path / "flux")))
    with pytest.raises(CdmError, match="is not the teacher that"):
        find_teacher(elsewhere, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((" ", 4, 0), "the prompt is empty"), (("a", 0, 0), "Steps are 0"), (("a", 4, -1), "The seed is -1")],
)
def test_what_cannot_be_drawn_is_said(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(CdmError, match=message):
        actions.checked(*arguments)


def test_small_pictures_are_enlarged_without_blur() -> None:
    picture = torch.randint(256, (3, 20, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shown = np.asarray(actions.as_image(picture))
    assert shown.shape == (240, 384, 3)
    assert np.array_equal(shown, picture.permute(1, 2, 0).numpy().repeat(12, 0).repeat(12, 1))
    assert actions.as_image(torch.zeros(3, 256, 256, dtype=torch.uint8)).size == (256, 256)


def test_captions_say_what_a_picture_took() -> None:
    picture = torch.zeros(3, 1, 1)
    assert actions.caption("Student", Shot(picture, 1, 1, 0.0123)) == (
        "**Student** · 1 step · 1 evaluation of the network · 12 ms"
    )
    assert actions.caption("Teacher", Shot(picture, 50, 100, 3.456)).endswith(
        "50 steps · 100 evaluations of the network · 3.46 s"
    )
    assert actions.duration(61.7) == "62 s"


def test_without_gradio_a_line_says_how_to_get_it(
    command: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert command("demo").error == "error: cdm demo needs gradio: pip install -c constraints.txt -e '.[demo]'"


def test_a_taken_port_is_a_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "there")
    with socket.socket() as taken:
        taken.bind((demo_page.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = command("demo", "--port", str(port)).error
    assert error.startswith(f"error: --port is {port}: ")
    assert error.endswith(": give another one")


# The page.

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of the miniature's own teacher on the page, as a student that does not know its teacher."""
    with served("miniature/teacher", ROOT) as found:
        yield found


@pytest.mark.slow
@needs_gradio
@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")
def test_the_page_draws_in_a_browser_and_asks_nothing_of_the_network(address: str) -> None:
    with chromium.Browser(1100, 900) as browser:
        browser.open(address)
        browser.wait("document.querySelector('textarea, input[type=text]') !== null")
        assert "the student does not say which teacher it is of" in browser.run("document.body.innerText")
        browser.run("document.querySelector('textarea, input[type=text]').focus()")
        browser.call("Input.insertText", text=PROMPT)
        browser.press("Enter")
        browser.wait("document.body.innerText.includes('4 steps · 4 evaluations of the network')")
        browser.wait("[...document.images].some((image) => image.complete && image.naturalWidth === 384)")
        assert all(url.startswith((address, "data:", "blob:")) for url in browser.requested), browser.requested
        assert not browser.run("[...document.fonts].some((font) => font.status === 'error')")


@pytest.mark.slow
@needs_gradio
def test_the_page_can_be_asked_by_programs_and_says_what_is_wrong(address: str) -> None:
    code = f"""
from gradio_client import Client
client = Client({address!r}, verbose=False, analytics_enabled=False)
caption, picture = client.predict({PROMPT!r}, 2, 5, api_name="/draw")
print(caption)
print(picture if isinstance(picture, str) else picture["path"])
try:
    client.predict(" ", 2, 5, api_name="/draw")
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    caption, path, error = done.stdout.splitlines()
    assert re.fullmatch(r"\*\*Student\*\* · 2 steps · 2 evaluations of the network · [\d.]+ m?s", caption)
    expected = draw_pictures(ROOT / "miniature/teacher", [PROMPT], 2, 5, device="cpu")[0]
    from PIL import Image

    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(actions.as_image(expected)))
    assert error == "Say what to draw: the prompt is empty."
