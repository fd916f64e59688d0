"""Records in JSON: dataclasses whose types are checked when they are read, because files are edited by hand."""

from __future__ import annotations

from typing import TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


def parse_record(kind: type[T], text: str | bytes) -> T:
    """The dataclass of JSON `text`; raises ValueError where that is none, or holds values of other types.

    Keys that the dataclass does not know are left out: a later version may have written them.
    """
    return TypeAdapter(kind).validate_json(text, strict=True)
