"""Contact sheets: the same prompts and noise drawn by teacher and student at every number of steps, as PNGs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cdm.data.spread import spread
from cdm.evaluation.samples import Samples, SampleSet
from cdm.evaluation.theme import LIGHT, Theme, font_file
from cdm.measures import steps_in_words

MARGIN, GAP, GROUP_GAP, TILE_GAP = 24, 8, 32, 2
LABEL_WIDTH = 138
HEADER_HEIGHT = 84
SMALL = 96
"""Pictures up to this width are shown pixel by pixel in strips, larger ones as wide as `LARGE`."""
LARGE = 256


@dataclass(frozen=True)
class Column:
    """`pictures` (prompts, noises, 3, height, width) uint8, below a heading and a smaller note."""

    heading: str
    note: str
    pictures: Tensor


@dataclass(frozen=True)
class Group:
    """Columns of one model (student or teacher) under a title."""

    model: str
    title: str
    columns: list[Column]


def contact_sheet(samples: Samples, prompts: int, theme: Theme = LIGHT) -> bytes:
    """PNG of every sample set for `prompts` prompts spread over the list, with up to four noises of each."""
    noises = 4 if samples.per_prompt >= 4 else 1
    teacher, student = samples.teacher[::-1], samples.student
    return _sheet(samples, teacher, student, spread(len(samples.texts), prompts), noises, 96, theme)


def overview(samples: Samples, prompts: int = 6, theme: Theme = LIGHT) -> bytes:
    """PNG about 1,200 pixels wide: the teacher at its full and its three lowest numbers of steps, the student at
    its four lowest, for the first noise of each of `prompts` prompts spread over the list."""
    few = [each for each in samples.teacher if each is not samples.full][:3]
    teacher, student = [samples.full, *few[::-1]], samples.student[:4]
    return _sheet(samples, teacher, student, spread(len(samples.texts), prompts), 1, 128, theme)


@dataclass(frozen=True)
class Strips:
    """The same prompts and noise of every sample set, without letters: pictures that a page puts side by side."""

    prompts: list[str]
    noises: int
    """Pictures of a prompt: four as a square block, or one."""
    across: int
    """Pictures side by side in a block."""
    small: bool
    """Whether pixels are those of the samples."""
    files: list[bytes]
    """Of each set in the order of `Samples.sets`: the blocks one below the other, PNG, or WebP where not small."""


def strips(samples: Samples, prompts: int) -> Strips:
    """The strips of `prompts` prompts spread over the list."""
    chosen = spread(len(samples.texts), prompts)
    height, width = samples.full.shape[1:]
    small = width <= SMALL
    noises = 4 if small and samples.per_prompt >= 4 else 1
    rows = [prompt * samples.per_prompt + noise for prompt in chosen for noise in range(noises)]
    across = 2 if noises > 1 else 1

    if not small:
        width, height = min(width, LARGE), round(height * min(width, LARGE) / width)

    def strip(shown: SampleSet) -> bytes:
        image = Image.new("RGB", (across * width, len(rows) // across * height))
        for index, row in enumerate(rows):
            picture = _picture(shown.pictures([row])[0], width, height)
            image.paste(picture, (index % across * width, index // across * height))
        return png(image) if small else _webp(image)

    return Strips(
        [samples.texts[prompt] for prompt in chosen],
        noises,
        across,
        small,
        [strip(each) for each in samples.sets],
    )


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=85)
    return buffer.getvalue()


def _sheet(
    samples: Samples,
    teacher: Sequence[SampleSet],
    student: Sequence[SampleSet],
    prompts: Sequence[int],
    noises: int,
    tile: int,
    theme: Theme,
) -> bytes:
    rows = [prompt * samples.per_prompt + noise for prompt in prompts for noise in range(noises)]
    width, height = _tile_size(samples.full.shape, tile)

    def shrunk(picture: Tensor) -> Tensor:
        if picture.shape[-1] <= width:
            return picture
        return torch.from_numpy(np.array(_picture(picture, width, height))).permute(2, 0, 1)

    def column(shown: SampleSet) -> Column:
        note = "1 evaluation" if shown.evaluations == 1 else f"{shown.evaluations} evaluations"
        # One at a time: large pictures of all columns need not be there together.
        pictures = torch.stack([shrunk(shown.pictures([row])[0]) for row in rows])
        return Column(steps_in_words(shown.steps), note, pictures.unflatten(0, (len(prompts), noises)))

    titles = ("Teacher, guided", "Student, no guidance") if samples.guided else ("Teacher", "Student")
    groups = [
        Group("teacher", titles[0], [column(each) for each in teacher]),
        Group("student", titles[1], [column(each) for each in student]),
    ]
    return png(compose([samples.texts[prompt] for prompt in prompts], groups, tile, theme))


def compose(prompts: Sequence[str], groups: Sequence[Group], tile: int, theme: Theme) -> Image.Image:
    """A sheet with a row for each prompt; pictures are about `tile` pixels wide, small ones enlarged by whole
    factors without smoothing. The noises of one prompt form a square block."""
    noises = groups[0].columns[0].pictures.shape[1]
    across = 2 if noises > 1 else 1
    width, height = _tile_size(groups[0].columns[0].pictures.shape[-3:], tile)
    cell_width = across * (width + TILE_GAP) - TILE_GAP
    label = _font(15 if across == 1 else 22)
    label_width = round(LABEL_WIDTH * label.size / 15)
    cell_height = -(-noises // across) * (height + TILE_GAP) - TILE_GAP
    group_widths = [len(group.columns) * (cell_width + GAP) - GAP for group in groups]
    left = MARGIN + label_width + GAP
    total_width = left + sum(group_widths) + GROUP_GAP * (len(groups) - 1) + MARGIN
    total_height = MARGIN + HEADER_HEIGHT + len(prompts) * (cell_height + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (total_width, total_height), theme.ground)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN + HEADER_HEIGHT
    for row, prompt in enumerate(prompts):
        middle = top + row * (cell_height + GAP) + cell_height / 2
        text = _wrap(prompt, label, label_width, cell_height)
        draw.multiline_text((MARGIN, middle), text, font=label, fill=theme.ink, anchor="lm", spacing=5)
    for group, group_width in zip(groups, group_widths, strict=True):
        _draw_title(draw, group.title, left, group_width, theme.model(group.model))
        for number, column in enumerate(group.columns):
            x = left + number * (cell_width + GAP)
            _draw_heading(draw, column, x + cell_width / 2, cell_width, theme)
            for row in range(len(prompts)):
                y = top + row * (cell_height + GAP)
                for noise in range(noises):
                    place = (x + noise % across * (width + TILE_GAP), y + noise // across * (height + TILE_GAP))
                    sheet.paste(_picture(column.pictures[row, noise], width, height), place)
        left += group_width + GROUP_GAP
    return sheet


def _draw_title(draw: ImageDraw.ImageDraw, title: str, left: int, width: int, colour: str) -> None:
    draw.text((left, MARGIN + 16), title, font=_font(20, bold=True), fill=colour, anchor="ls")
    draw.rectangle((left, MARGIN + 26, left + width - 1, MARGIN + 28), fill=colour)


def _draw_heading(draw: ImageDraw.ImageDraw, column: Column, centre: float, width: int, theme: Theme) -> None:
    note = column.note if draw.textlength(column.note, font=_font(14)) <= width else column.note.split()[0]
    draw.text((centre, MARGIN + 52), column.heading, font=_font(17, bold=True), fill=theme.ink, anchor="ms")
    draw.text((centre, MARGIN + 72), note, font=_font(14), fill=theme.muted, anchor="ms")


def _tile_size(shape: Sequence[int], tile: int) -> tuple[int, int]:
    """Width and height at which pictures of a shape (3, height, width) are shown."""
    _, height, width = shape
    factor = max(1, round(tile / width)) if width <= tile else tile / width
    return round(width * factor), round(height * factor)


def _picture(image: Tensor, width: int, height: int) -> Image.Image:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return picture.resize(
        (width, height), Image.Resampling.NEAREST if width >= picture.width else Image.Resampling.LANCZOS
    )


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file(bold), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, height: int) -> str:
    """`text` in lines of at most `width` pixels, cut with an ellipsis where it would be higher than `height`."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    most = max(1, int(height / (1.6 * font.size)))
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    return "\n".join(lines)


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
