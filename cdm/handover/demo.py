"""What the page of `cdm demo` does: a student and its teacher in memory, which draw the same prompt and noise.

The page itself is in `cdm.handover.demo_page`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from cdm import limits
from cdm.data.prompt_lists import read_prompts
from cdm.data.sampling import evaluations
from cdm.data.spread import spread
from cdm.errors import CdmError
from cdm.families import Conditioning
from cdm.families.configs import INDEX
from cdm.handover.drawing import Drawer, chosen_dtype, enlarge
from cdm.models.hub import downloaded
from cdm.models.manifest import TeacherManifest, pipeline_class
from cdm.models.student import Model, Origin, find_student
from cdm.params import Params, load
from cdm.system.device import choose_device
from cdm.system.files import at_home, read_json

LEAST_WIDTH = 384
"""Pixels on the page: smaller pictures are enlarged by a whole factor."""
EXAMPLES = 6
REMEMBERED = 64
"""The teacher's pictures that are kept: a change of the student's steps need not draw them again."""
TEACHER_STEPS = 50
"""Where the pipeline's parameters do not say it."""


@dataclass(frozen=True)
class Shot:
    """A picture (3, height, width), uint8, and what it took to draw it once the prompt was encoded."""

    picture: Tensor
    steps: int
    evaluations: int
    seconds: float


@dataclass
class Demo:
    """A student, and its teacher if that is to be had, ready to draw."""

    name: str
    student: Drawer
    teacher: Drawer | None
    remark: str
    """Why there is no teacher."""
    teacher_steps: int = TEACHER_STEPS
    guidance_scale: float = 1.0
    examples: list[str] = field(default_factory=list)
    _drawn: dict[tuple[str, int], Shot] = field(default_factory=dict)
    _encoded: tuple[str, Conditioning] | None = None

    def by_student(self, prompt: str, steps: int, seed: int) -> Shot:
        """The student's picture, without guidance. Raises CdmError for what cannot be drawn."""
        conditioning = self._encode(checked(prompt, steps, seed))
        begun = time.perf_counter()
        picture = self.student.draw(conditioning, steps, seed)
        return Shot(picture, steps, evaluations(steps, 1.0), time.perf_counter() - begun)

    def by_teacher(self, prompt: str, seed: int) -> Shot | None:
        """The guided teacher's picture from the same noise; None where there is no teacher."""
        if self.teacher is None:
            return None
        key = (checked(prompt, self.teacher_steps, seed), seed)
        if key not in self._drawn:
            conditioning, empty = self._encode(key[0]), self.student.encode("")
            begun = time.perf_counter()
            picture = self.teacher.draw(
                conditioning, self.teacher_steps, seed, guidance_scale=self.guidance_scale, empty=empty
            )
            seconds = time.perf_counter() - begun
            while len(self._drawn) >= REMEMBERED:
                del self._drawn[next(iter(self._drawn))]
            count = evaluations(self.teacher_steps, self.guidance_scale)
            self._drawn[key] = Shot(picture, self.teacher_steps, count, seconds)
        return self._drawn[key]

    def _encode(self, prompt: str) -> Conditioning:
        if self._encoded is None or self._encoded[0] != prompt:
            self._encoded = prompt, self.student.encode(prompt)
        return self._encoded[1]


def open_demo(
    student: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    teacher_steps: int | None = None,
    guidance_scale: float | None = None,
    params: Path = Path("params.yaml"),
    manifest: Path = Path("data/teacher.json"),
) -> Demo:
    """Load the student at `student`, whatever `cdm export` or a training has made of it, and its teacher.

    Of the teacher `params` say the guidance, the number of steps and prompts as examples, where they are about the
    same teacher; `manifest` is what the stage `teacher` wrote, by which a folder is known to be the teacher still.
    Nothing is downloaded: a teacher that is not on this machine is left out. Raises CdmError if the student cannot
    be used.
    """
    if guidance_scale is not None and not 1 <= guidance_scale <= limits.GUIDANCE:
        raise CdmError(f"--guidance is {guidance_scale:g}: give a number from 1 to {limits.GUIDANCE:g}")
    model, place = find_student(student), choose_device(device)
    precision = chosen_dtype(dtype, place)
    known = params_about(model.origin, params)
    guidance_scale = (
        guidance_scale if known is None or guidance_scale is not None else known.teacher.guidance_scale
    )
    drawer = Drawer.load(model, place, precision)
    teacher, remark = None, ""
    try:
        source = find_teacher(model, manifest)
        if guidance_scale is None:
            raise CdmError("the teacher's guidance is not recorded here: give --guidance to see it as well")
        teacher = Drawer.load(source, place, precision, text=False)
    except CdmError as error:
        remark = f"No teacher beside it: {error}"
    return Demo(
        str(student),
        drawer,
        teacher,
        remark,
        teacher_steps or (TEACHER_STEPS if known is None else known.latents.steps),
        1.0 if guidance_scale is None else guidance_scale,
        [] if known is None else example_prompts(known),
    )


def find_teacher(model: Model, manifest: Path) -> Model:
    """The teacher of a student, on this machine. Raises CdmError with the reason where it is not to be had."""
    if model.lora is not None or model.weights is not None:
        return Model(model.family, model.base, origin=model.origin)
    origin = model.origin
    if origin is None:
        raise CdmError("the student does not say which teacher it is of")
    local = at_home(origin.source)
    folder = local if local.is_dir() else downloaded(origin.source, origin.revision)
    if folder is None or not (folder / INDEX).is_file():
        raise CdmError(f"{origin.source} is not on this machine")
    if pipeline_class(folder) != model.family.pipeline_class_name or _is_another(origin, manifest):
        raise CdmError(f"{origin.source} is not the teacher that the student was distilled from")
    return Model(model.family, folder, origin=origin)


def _is_another(origin: Origin, manifest: Path) -> bool:
    """Whether the stage `teacher` has found another model behind the teacher's name."""
    if read_json(manifest) is None:
        return False
    found = TeacherManifest.read(manifest)
    return found.source == origin.source and found.digest != origin.digest


def params_about(origin: Origin | None, path: Path) -> Params | None:
    """The parameters in a file, if they are usable and name the teacher of `origin`."""
    try:
        params = load(path) if path.is_file() else None
    except CdmError:
        return None
    same = params is not None and origin is not None and params.teacher.source == origin.source
    return params if same else None


def example_prompts(params: Params) -> list[str]:
    """A few of the evaluation prompts, from all parts of the list; none where the files are not there."""
    try:
        texts, _ = read_prompts(params.prompts.eval, params.prompts.column)
    except CdmError:
        return []
    return [texts[index] for index in spread(len(texts), EXAMPLES)]


def checked(prompt: str, steps: int, seed: int) -> str:
    """The prompt without space around it. Raises CdmError if it is empty, or steps or seed are none."""
    if not prompt.strip():
        raise CdmError("Say what to draw: the prompt is empty.")
    if len(prompt) > limits.PROMPT:
        raise CdmError(f"The prompt has {len(prompt):,} characters: at most {limits.PROMPT:,}.")
    if not 1 <= steps <= limits.STEPS:
        raise CdmError(f"Steps are {steps}: 1 to {limits.STEPS:,}.")
    if not 0 <= seed <= limits.SEED:
        raise CdmError(f"The seed is {seed}: 0 to {limits.SEED}.")
    return prompt.strip()


def is_small(width: int) -> bool:
    """Whether pictures of this width are enlarged."""
    return 2 * width <= LEAST_WIDTH


def as_image(picture: Tensor) -> Image.Image:
    """A picture for a screen: a small one with each pixel as a square."""
    width = picture.shape[-1]
    factor = LEAST_WIDTH // width if is_small(width) else 1
    return Image.fromarray(enlarge(picture, factor).permute(1, 2, 0).contiguous().numpy())


def caption(name: str, shot: Shot) -> str:
    """What a picture took, as Markdown."""
    steps, count = _counted(shot.steps, "step"), _counted(shot.evaluations, "evaluation")
    return f"**{name}** · {steps} · {count} of the network · {duration(shot.seconds)}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """Seconds with two digits, or milliseconds."""
    return (
        f"{1000 * seconds:.0f} ms"
        if seconds < 0.1
        else f"{seconds:.2f} s"
        if seconds < 10
        else f"{seconds:.0f} s"
    )


def introduction(demo: Demo) -> str:
    """What is on the page, as Markdown."""
    origin = demo.student.model.origin
    student = "A student" if origin is None else f"A student of `{origin.source}`"
    if demo.teacher is None:
        return f"{student}. {demo.remark}."
    guided = "without guidance" if demo.guidance_scale == 1 else f"with guidance {demo.guidance_scale:g}"
    return (
        f"{student}, beside its teacher {guided}: the same prompt and the same noise. Times are those of drawing, once"
        " the prompt is encoded."
    )
