"""Prompts: read from files, cleaned, split into training and evaluation, encoded by the teacher's text encoders."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cdm import limits
from cdm.data.prompt_formats import json_rows, text_files
from cdm.data.prompt_set import TEXTS
from cdm.data.store import ShardWriter, is_complete, open_staging, publish, shard_rows
from cdm.errors import CdmError, shown
from cdm.families import Conditioning, Family, get_family
from cdm.families.common import check_finite
from cdm.models.manifest import TeacherManifest
from cdm.params import Prompts, Runtime
from cdm.randomness import philox
from cdm.system.device import DTYPES, choose_device
from cdm.system.files import digest_of, write_json
from cdm.system.problems import naming
from cdm.system.progress import track
from cdm.system.provenance import code_digest

ROWS_PER_SHARD = 4096


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


def build(
    settings: Prompts, teacher: TeacherManifest, out: Path, *, seed: int, runtime: Runtime
) -> PromptsReport:
    """Write `out/train`, `out/eval` and `out/empty` (each a `PromptSet`) and `out/report.json`.

    Training prompts are encoded only where `prompts.embed` is cached. An interrupted run is resumed. Raises
    CdmError for files or splits that cannot be used, or where the disk is too small, before anything is encoded.
    """
    split, report = read_split(settings, seed)
    family, source = get_family(teacher.family), teacher.folder()
    code = code_digest("prompts", teacher.family)
    staging = open_staging(out, f"train/{TEXTS}", digest_of([code, settings.embed]))
    encoder = _Encoder(settings, teacher, family, source, runtime)
    encoded = ["", *split.eval, *(split.train if settings.embed == "cached" else [])]
    check_disk(staging, len(encoded), encoder.row_bytes)
    over_long, limit = count_over_long(
        encoder.pipeline, [*split.eval, *split.train], settings.max_sequence_length
    )
    report = replace(report, over_long=over_long, token_limit=limit)
    encoder.write([""], staging / "empty", "empty prompt")
    encoder.write(split.eval, staging / "eval", "evaluation prompts")
    if settings.embed == "cached":
        encoder.write(split.train, staging / "train", "training prompts")
    else:
        (staging / "train").mkdir(exist_ok=True)
        write_json(staging / "train" / TEXTS, split.train)
    write_json(staging / "report.json", asdict(report))
    publish(out)
    return report


def build_missing(
    settings: Prompts, teacher: TeacherManifest, out: Path, *, seed: int, runtime: Runtime
) -> None:
    """`build`, unless `out` holds these very prompts of this teacher, encoded as `settings` say. Raises CdmError."""
    split, _ = read_split(settings, seed)
    metadata = encoding_metadata(settings, teacher)
    encoded = {"empty": [""], "eval": split.eval, "train": split.train}
    if settings.embed == "online":
        del encoded["train"]
    if not all(
        is_complete(out / name, {**metadata, "prompts_sha256": digest_of(texts)})
        for name, texts in encoded.items()
    ):
        build(settings, teacher, out, seed=seed, runtime=runtime)


def encoding_metadata(settings: Prompts, teacher: TeacherManifest) -> dict[str, Any]:
    """Everything that determines the embeddings of given texts; stored with them."""
    return {
        "teacher": teacher.digest,
        "max_sequence_length": settings.max_sequence_length,
        "precision": settings.precision,
    }


def check_disk(folder: Path, rows: int, row_bytes: int) -> None:
    """Say on standard error what `rows` embeddings take; CdmError if the disk of `folder` has no room for what is
    not there yet."""
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    needed, free = rows * row_bytes, shutil.disk_usage(folder).free
    print(
        f"embeddings of {rows:,} prompts: {_gigabytes(needed)} of disk, {_gigabytes(free)} are free",
        file=sys.stderr,
    )
    if needed - written > free:
        raise CdmError(
            f"{folder.parent}: embeddings of {rows:,} prompts take {_gigabytes(needed)}, but {_gigabytes(free)} are"
            " free: make room, set prompts.precision to bf16, or set prompts.embed to online"
        )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.3g} GB" if count < 1e12 else f"{count / 1e12:,.3g} TB"


def count_over_long(pipeline: Any, texts: Sequence[str], max_sequence_length: int) -> tuple[int, int]:
    """How many of `texts` are too long for every text encoder of `pipeline`, and how many tokens are read at most.

    The last tokenizer is that of the large encoder, which reads `max_sequence_length` tokens.
    """
    parts = {name: part for name, part in sorted(pipeline.components.items()) if part is not None}
    tokenizers = [part for name, part in parts.items() if name.startswith("tokenizer")]
    limits = [int(tokenizer.model_max_length) for tokenizer in tokenizers]
    limits[-1] = min(limits[-1], max_sequence_length or limits[-1])
    longer = list(texts)
    for tokenizer, limit in zip(tokenizers, limits, strict=True):
        if longer:
            ids = tokenizer(longer, verbose=False)["input_ids"]
            longer = [text for text, tokens in zip(longer, ids, strict=True) if len(tokens) > limit]
    return len(longer), max(limits)


class _Encoder:
    """Encodes lists of prompts into stores; the pipeline is loaded once."""

    def __init__(
        self, settings: Prompts, teacher: TeacherManifest, family: Family, source: Path, runtime: Runtime
    ) -> None:
        self.family, self.source = family, source
        self.length = settings.max_sequence_length
        self.batch_size = runtime.batch_size
        precision = settings.precision
        self.metadata = encoding_metadata(settings, teacher)
        pipeline = family.load_pipeline(source, image=False, transformer=False, dtype=DTYPES[precision])
        self.pipeline = pipeline.to(choose_device(runtime.device))
        row = self.encode([""])
        self.row_bytes = sum(tensor.nbytes for tensor in row.values())
        made = {name: tuple(tensor.shape[1:]) for name, tensor in row.items()}
        taken = family.conditioning_shapes(source, self.length)
        if made != taken:
            raise CdmError(
                f"{source}: its text encoders make {made}, but its transformer takes {taken}: they are of different"
                " models: get the model again"
            )

    def encode(self, texts: list[str]) -> Conditioning:
        encoded = self.family.encode(self.pipeline, texts, self.length)
        check_finite(encoded, self.pipeline, self.source, "prompts.precision")
        return encoded

    def write(self, texts: list[str], folder: Path, title: str) -> None:
        """A `PromptSet` of `texts`, unless an interrupted run has finished it."""
        metadata = {**self.metadata, "prompts_sha256": digest_of(texts)}
        if not is_complete(folder, metadata):
            rows = shard_rows(self.row_bytes, ROWS_PER_SHARD)
            with naming(folder), ShardWriter(folder, rows, metadata) as writer:
                starts = range(writer.rows_done, len(texts), self.batch_size)
                for start in track(starts, title, unit="batch"):
                    writer.append(self.encode(texts[start : start + self.batch_size]))
        write_json(folder / TEXTS, texts)
