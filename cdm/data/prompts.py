"""Prompts as stores of embeddings: the lists of a params file, encoded by the teacher's text encoders."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cdm.data.prompt_lists import PromptsReport, read_split
from cdm.data.prompt_set import TEXTS
from cdm.data.store import ShardWriter, is_complete, open_staging, publish, shard_rows
from cdm.errors import CdmError
from cdm.families import Conditioning, Family, get_family
from cdm.families.common import check_finite
from cdm.models.manifest import TeacherManifest
from cdm.params import Prompts, Runtime
from cdm.system.device import DTYPES, choose_device
from cdm.system.files import digest_of, write_json
from cdm.system.problems import naming
from cdm.system.progress import track
from cdm.system.provenance import code_digest

ROWS_PER_SHARD = 4096


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
