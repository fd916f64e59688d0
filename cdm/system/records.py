"""Records in JSON: dataclasses whose types are checked when they are read, because files are edited by hand."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse_record(kind: type[T], text: str | bytes) -> T:
    """The dataclass of JSON `text`; raises ValueError where that is none, or holds values of other types.

    Keys that the dataclass does not know are left out: a later version may have written them.
    """
    record: T = _adapter(kind).validate_json(text, strict=True)  # type: ignore[arg-type]
    return record
