"""HTML pages in one look: a single file that needs no network, light or dark as the reader prefers, with pictures that
enlarge and code to copy."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from cdm.evaluation.theme import DARK, LIGHT

BASE = "page.html.j2"
"""The template that others extend, by its variable `base`."""
HERE = Path(__file__).parent
TYPES = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8\xff\xe0": "image/jpeg"}
"""Types of pictures by their first four bytes."""


def render(template: str, folder: Path = HERE, **values: Any) -> str:
    """The page of a template in `folder`. A value that the template names and that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, HERE]), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["code"] = code
    return environment.get_template(template).render(base=BASE, light=LIGHT, dark=DARK, **values)


def code(text: str) -> Markup:
    """`text` as HTML, with what stands in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def uri(picture: bytes) -> str:
    """A picture, PNG, WebP or JPEG, as an address that holds all of it."""
    return f"data:{TYPES[picture[:4]]};base64,{base64.b64encode(picture).decode()}"
