"""The two JSON files between the stage `evaluate` and a scorer. Needs Python 3.9 and nothing else."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = "cdm-scorer-1"

Answer = dict[str, Any]
"""`scores`: by name, a number for each image; `summary`: by name, one number for all of them."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a scorer; add options to it, which the command in the parameters sets."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("request", type=Path, help="JSON file to read")
    made.add_argument("answer", type=Path, help="JSON file to write")
    return made


def serve(arguments: argparse.Namespace, score: Callable[[list[dict[str, Any]], Path], Answer]) -> None:
    """Answer a request by `score`, of the images ({"id", "path", "prompt"}) and the folder that holds them."""
    request = json.loads(arguments.request.read_text(encoding="utf-8"))
    if request["format"] != FORMAT:
        raise SystemExit(f"this scorer reads {FORMAT}, not {request['format']}")
    answer = score(request["images"], arguments.request.parent)
    arguments.answer.write_text(json.dumps(answer), encoding="utf-8")


def in_batches(images: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """The images, `size` at a time."""
    return [images[start : start + size] for start in range(0, len(images), size)]
