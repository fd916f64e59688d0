"""Readers of published prompt sets, in the files that their authors distribute; cdm.data.prompts reads plain lists.

GenEval      prompts/evaluation_metadata.jsonl: a JSON object a line, its text under `prompt` (any .jsonl)
DPG-Bench    dpg_bench/prompts: a folder of .txt files, each one prompt
HPS v2       anime.json, concept-art.json, paintings.json, photo.json, drawbench.json: a JSON list of texts
HPS v3       a JSON list of objects with the text under `prompt`
COCO         captions_val2014.json, captions_val2017.json: of each image its first caption
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdm.errors import CdmError


def json_rows(value: Any, column: str, where: str) -> Sequence[Any]:
    """Rows `{column: text}` of a JSON document: a list of texts, a list of such rows, or COCO's captions.

    Of a COCO image the caption with the lowest id counts, images in the order of their ids. `where` names the file
    in a CdmError.
    """
    if isinstance(value, dict) and "annotations" in value:
        return [{column: caption} for caption in _captions(value["annotations"], where)]
    if isinstance(value, list):
        return [{column: each} if isinstance(each, str) else each for each in value]
    raise CdmError(f"{where}: expected a list of prompts, or COCO's captions with `annotations`")


def _captions(annotations: Any, where: str) -> list[str]:
    try:
        ordered = sorted(annotations, key=lambda each: (each["image_id"], each["id"]), reverse=True)
        first = {each["image_id"]: each["caption"] for each in ordered}  # the lowest id comes last and stays
    except (TypeError, KeyError):
        raise CdmError(
            f"{where}: COCO's `annotations` have image_id, id and caption; this one may be of another task"
        ) from None
    return [first[image] for image in sorted(first)]


def text_files(folder: Path) -> list[Path]:
    """The .txt files of a folder, each of which is one prompt, by name. Raises CdmError if there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".txt" and path.is_file())
    if not found:
        raise CdmError(f"{folder}: a folder without .txt files, each of which would be one prompt")
    return found
