"""Lists of prompts: read from files, cleaned, split into training and evaluation. This needs no torch."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdm import limits
from cdm.data.prompt_formats import json_rows, text_files
from cdm.errors import CdmError, shown
from cdm.params import Prompts


@dataclass(frozen=True)
class ReadReport:
    """Numbers of prompts that were read from files, and left out."""

    prompts: int
    """Distinct prompts that were kept."""
    duplicates: int
    empty: int


@dataclass(frozen=True)
class Split:
    """Training prompts and evaluation prompts; none is in both."""

    train: list[str]
    eval: list[str]
    removed: int
    """Training prompts removed because the evaluation lists have them too."""


@dataclass(frozen=True)
class PromptsReport:
    """The report of the stage `prompts`: numbers of prompts that were kept, left out, and too long."""

    train: int
    eval: int
    train_files: ReadReport
    eval_files: ReadReport | None
    removed_from_train: int
    over_long: int = 0
    """Prompts that are too long for every text encoder."""
    token_limit: int = 0
    """Tokens of a prompt that are read."""

    def lines(self) -> list[str]:
        """The report as lines of text."""
        result = [f"{self.train} training prompts, {self.eval} evaluation prompts"]
        for name, read in (("training", self.train_files), ("evaluation", self.eval_files)):
            if read is not None and (read.duplicates or read.empty):
                result.append(
                    f"{name} files: dropped {read.duplicates} duplicates and {read.empty} empty prompts"
                )
        if self.removed_from_train:
            result.append(f"removed {self.removed_from_train} evaluation prompts from the training list")
        if self.over_long:
            result.append(
                f"{self.over_long} prompts are longer than the {self.token_limit} tokens that are read: their ends"
                " have no effect"
            )
        return result


def read_prompts(files: Sequence[str | Path], column: str = "prompt") -> tuple[list[str], ReadReport]:
    """The distinct prompts of `files` in their order, without surrounding space.

    .txt has a prompt a line; .jsonl, .csv and .parquet have them under `column`, where a prompt may have several
    lines; .json files and folders are as cdm.data.prompt_formats says. Two that differ in Unicode composition or
    surrounding space only are one. Raises CdmError, naming the file and the line, for what cannot be read.
    """
    kept: dict[str, str] = {}
    total = empty = 0
    for path in map(Path, files):
        reader = _from_folder if path.is_dir() else _READERS.get(path.suffix.lower())
        if reader is None:
            raise CdmError(
                f"{path}: prompt files are {', '.join(_READERS)}, not {path.suffix or 'without suffix'}"
            )
        for number, text in enumerate(reader(path, column), 1):
            total += 1
            text = text.strip()
            if len(text) > limits.PROMPT:
                raise CdmError(
                    f"{path}: prompt {number} has {len(text):,} characters, and no text encoder reads so many:"
                    f" a prompt has at most {limits.PROMPT:,}"
                )
            if text:
                kept.setdefault(_identity(text), text)
            else:
                empty += 1
    return list(kept.values()), ReadReport(len(kept), total - empty - len(kept), empty)


def _identity(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise CdmError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CdmError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    if "\0" in text:
        raise CdmError(f"{path}: not UTF-8 text (it has zero bytes, as UTF-16 does): save it as UTF-8")
    return text


def _from_txt(path: Path, _column: str) -> Iterable[str]:
    return io.StringIO(_read_text(path), newline=None)


def _from_jsonl(path: Path, column: str) -> Iterable[str]:
    for number, line in enumerate(io.StringIO(_read_text(path), newline=None), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CdmError(f"{path}:{number}: not valid JSON: {error}") from None
            yield _cell(row, column, f"{path}:{number}")


def _from_csv(path: Path, column: str) -> Iterable[str]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        if column not in (reader.fieldnames or []):
            raise CdmError(
                f"{path}: no column {column!r} (it has {_listed(reader.fieldnames)}): see prompts.column"
            )
        for row in reader:
            yield _cell(row, column, f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise CdmError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}") from None


def _from_parquet(path: Path, column: str) -> Iterable[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CdmError(f"{path}: reading .parquet needs pyarrow: pip install 'cdm[parquet]'") from None
    try:
        names = parquet.read_schema(path).names
        if column not in names:
            raise CdmError(f"{path}: no column {column!r} (it has {_listed(names)}): see prompts.column")
        values = parquet.read_table(path, columns=[column])[column].to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise CdmError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())}") from None
    return (_cell({column: value}, column, f"{path}: row {number}") for number, value in enumerate(values, 1))


def _from_json(path: Path, column: str) -> Iterable[str]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CdmError(f"{path}: not valid JSON: {error}") from None
    rows = json_rows(value, column, str(path))
    return (_cell(row, column, f"{path}: entry {number}") for number, row in enumerate(rows, 1))


def _from_folder(path: Path, _column: str) -> Iterable[str]:
    return map(_read_text, text_files(path))


_READERS: dict[str, Callable[[Path, str], Iterable[str]]] = {
    ".txt": _from_txt,
    ".json": _from_json,
    ".jsonl": _from_jsonl,
    ".csv": _from_csv,
    ".parquet": _from_parquet,
}


def _cell(row: Any, column: str, where: str) -> str:
    """The prompt of a row; an absent value is an empty prompt."""
    if not isinstance(row, dict) or column not in row:
        found = _listed(row) if isinstance(row, dict) else "no keys"
        raise CdmError(f"{where}: no key {column!r} (it has {found}): see prompts.column")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise CdmError(f"{where}: {column} is {shown(value)}, expected a text")
    if value and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise CdmError(f"{where}: {column} holds half a surrogate pair, which is no text")
    if value and "\0" in value:
        raise CdmError(f"{where}: {column} holds a zero byte, which is no text")
    return value or ""


def _listed(names: Iterable[Any] | None) -> str:
    return ", ".join(map(str, names or [])) or "none"


def split_prompts(train: list[str], evaluation: list[str] | None, eval_count: int, seed: int) -> Split:
    """The first `eval_count` of `evaluation`, or where that is None, as many held back from `train` at random.

    No prompt of `evaluation` stays in the training list, whether it is among the first or not, so that
    `eval_count` does not change what is learnt from. Raises CdmError where too few prompts are left.
    """
    if evaluation is None:
        if len(train) <= eval_count:
            raise CdmError(f"prompts.eval_count {eval_count} leaves none of {len(train)} prompts to train on")
        from cdm.randomness import philox

        order = philox(seed, "evaluation prompts").permutation(len(train))
        held_back = set(order[:eval_count].tolist())
        kept = [text for i, text in enumerate(train) if i not in held_back]
        return Split(kept, [train[i] for i in sorted(held_back)], 0)
    if len(evaluation) < eval_count:
        raise CdmError(f"prompts.eval_count is {eval_count}, but prompts.eval holds {len(evaluation)} prompts")
    reserved = set(map(_identity, evaluation))
    kept = [text for text in train if _identity(text) not in reserved]
    if not kept:
        raise CdmError("prompts.train: nothing is left to train on without empty and evaluation prompts")
    return Split(kept, evaluation[:eval_count], len(train) - len(kept))


def read_split(settings: Prompts, seed: int) -> tuple[Split, PromptsReport]:
    """The prompts of the files that `settings` name, split, and the report on them. Raises CdmError."""
    train, train_report = read_prompts(settings.train, settings.column)
    evaluation, eval_report = read_prompts(settings.eval, settings.column) if settings.eval else (None, None)
    split = split_prompts(train, evaluation, settings.eval_count, seed)
    report = PromptsReport(len(split.train), len(split.eval), train_report, eval_report, split.removed)
    return split, report
