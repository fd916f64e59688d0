"""Prompt sets in the shapes that their authors publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cdm.data.prompt_lists import ReadReport, read_prompts
from cdm.errors import CdmError


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def test_geneval_is_a_list_of_objects(tmp_path: Path) -> None:
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts([path])[0] == ["a photo of a bench", "a photo of two clocks"]


def test_dpg_bench_is_a_folder_of_texts(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "10.txt").write_text("A long description,\nin two lines.\n")
    (folder / "256.txt").write_text("Another one")
    (folder / "README.md").write_text("not a prompt")
    assert read_prompts([folder])[0] == ["A long description,\nin two lines.", "Another one"]
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(CdmError, match=r"empty: a folder without \.txt files"):
        read_prompts([empty])


def test_hps_has_lists_of_texts_or_objects(tmp_path: Path) -> None:
    anime = write(tmp_path / "anime.json", ["a fox", "một con mèo", "a fox", ""])
    assert read_prompts([anime]) == (["a fox", "một con mèo"], ReadReport(2, 1, 1))
    rows = write(
        tmp_path / "benchmark.json", [{"prompt": "a fox", "category": "animals"}, {"prompt": "a bear"}]
    )
    assert read_prompts([rows])[0] == ["a fox", "a bear"]


def test_coco_gives_each_image_its_first_caption(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 9, "id": 40, "caption": "later"},
        {"image_id": 9, "id": 31, "caption": "A bicycle replica with a clock."},
        {"image_id": 4, "id": 77, "caption": "A man on a horse.\n"},
    ]
    path = write(tmp_path / "captions_val2014.json", {"images": [], "annotations": annotations})
    assert read_prompts([path])[0] == ["A man on a horse.", "A bicycle replica with a clock."]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompts": []}, "expected a list of prompts, or COCO's captions"),
        ({"annotations": [{"image_id": 1, "id": 2, "bbox": []}]}, "may be of another task"),
        ({"annotations": 3}, "may be of another task"),
        ([{"text": "x"}], "entry 1: no key 'prompt'"),
        (["x", 3], "entry 2: no key 'prompt'"),
    ],
)
def test_other_documents_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CdmError, match=message) as error:
        read_prompts([write(tmp_path / "list.json", value)])
    assert "list.json" in str(error.value)


def test_broken_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('["a", ')
    with pytest.raises(CdmError, match=r"list\.json: not valid JSON"):
        read_prompts([tmp_path / "list.json"])
