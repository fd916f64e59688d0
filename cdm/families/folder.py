"""Which files of a diffusers folder belong to its pipeline: those that the libraries load, and no others.

Hashing, downloading, copying into a student and the checks of a teacher all ask here. What lies beside, such as the
single file of another tool, pickles, or a twin in another precision, belongs to none. This needs no torch.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from cdm.errors import CdmError
from cdm.families.configs import INDEX, read_config

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""What the files of a model's weights are called, by the library that loads them."""
WEIGHTS = ".safetensors"
"""Suffix of weights; others, which may hold code, are never loaded."""
SMALL = (".jinja", ".json", ".model", ".txt")
"""Suffixes of what a part is loaded from beside its weights: configs, vocabularies, chat templates."""
TEMPLATES = "additional_chat_templates"
"""The only folder inside a part from which anything is loaded."""
PREFERRED = ("bf16", "fp16")
"""Variants that are taken first where a part has several, and no plain weights."""


def parts(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of each part of the pipeline in `folder` that is not null, by the part's name.

    Raises CdmError if the folder's index cannot be read.
    """
    found = {
        name: kind
        for name, kind in read_config(folder, INDEX).items()
        if isinstance(kind, list) and len(kind) == 2
    }
    return {
        name: (str(kind[0]), str(kind[1]))
        for name, kind in found.items()
        if name.isidentifier() and None not in kind
    }


def pipeline_files(folder: Path) -> dict[str, str]:
    """The files of the pipeline in `folder`: by the plain name under which a library asks for one, its own name.

    Both are paths in the folder, and they differ for weights that are there in a variant alone: for
    `vae/model.safetensors` there may be `vae/model.bf16.safetensors`. Parts that are links are followed. Raises
    CdmError if an index is missing or damaged.
    """
    found = {INDEX: INDEX}
    for part, (library, _) in parts(folder).items():
        inside = _names(folder / part)
        small = {name: name for name in inside if _is_small(name)}
        for plain, name in (small | _weights(folder / part, inside, library)).items():
            found[f"{part}/{plain}"] = f"{part}/{name}"
    return dict(sorted(found.items()))


def variants(folder: Path) -> list[str]:
    """Variants of the weights that are there in no plain form, such as bf16; empty for a pipeline as it is saved."""
    renamed = [(plain, name) for plain, name in pipeline_files(folder).items() if plain != name]
    return sorted({word for plain, name in renamed for word in name.split(".") if word not in plain.split(".")})


def weights(folder: Path, part: str, library: str) -> list[str]:
    """Names of the weight files of a part, without their index; empty where it has none."""
    found = _weights(folder / part, _names(folder / part), library)
    return [name for name in found.values() if name.endswith(WEIGHTS)]


def plain_index(library: str) -> str:
    """Name of the index of shards that are no variant."""
    return f"{STEMS[library]}{WEIGHTS}.index.json"


def plain_weights(folder: Path, part: str, library: str) -> list[str]:
    """Names of the weights that a part has on a hub if they are no variant; its index, if any, is here already."""
    index = folder / part / plain_index(library)
    return shard_names(index) if index.is_file() else [f"{STEMS[library]}{WEIGHTS}"]


def variant_patterns(library: str) -> list[str]:
    """Patterns of the names of weights in any variant, and of their indexes."""
    stem = STEMS[library]
    return [f"{stem}[-.]*{WEIGHTS}", f"{stem}{WEIGHTS}.index.*.json", f"{stem}{WEIGHTS}.*.index.json"]


def is_model(folder: Path, part: str, library: str) -> bool:
    """Whether a part has weights, by what lies beside them: tokenizers and schedulers call their configs otherwise."""
    return library in STEMS and (folder / part / "config.json").is_file()


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names; CdmError if it is damaged."""
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CdmError(f"{index}: damaged: get the model again") from None
    if any(Path(name).name != name for name in names):
        raise CdmError(f"{index}: names files in other folders, which are not loaded: get the model again")
    return sorted(names)


@contextmanager
def plain_view(folder: Path) -> Iterator[Path]:
    """`folder` as libraries load it: itself, or while the context lasts a folder of links that have plain names."""
    files = pipeline_files(folder)
    if all(plain == name for plain, name in files.items()):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="pipeline-") as view:
        for plain, name in files.items():
            link = Path(view, plain)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / name).resolve())
        yield Path(view)


def copy_parts(source: Path, folder: Path, without: str) -> None:
    """Copies the pipeline in `source` to `folder`, but for the part `without`, under plain names.

    Only contents are copied: the copies may be written to, whatever the rights of the files of `source` are.
    """
    for part in parts(source):
        remove(folder / part)
    for plain, name in pipeline_files(source).items():
        if PurePosixPath(plain).parts[0] != without:
            target = folder / plain
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # it may be a link to where it must not change
            shutil.copyfile(source / name, target)


def remove(folder: Path) -> None:
    """Removes a folder or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _names(part: Path) -> list[str]:
    """Paths of the files in a part that a library may look for."""
    inside = [*part.glob("*"), *part.glob(f"{TEMPLATES}/*.jinja")]
    return sorted(path.relative_to(part).as_posix() for path in inside if path.is_file())


def _is_small(name: str) -> bool:
    """Whether a part is loaded from the file, and it belongs to no weights."""
    return name.endswith(SMALL) and not name.startswith(".") and not re.search(r"\.index\.(.+\.)?json$", name)


def _weights(part: Path, names: Collection[str], library: str) -> dict[str, str]:
    """The weights of a part with their index, of several: by plain name, the name."""
    stem = STEMS.get(library)
    if stem is None:
        return {}
    single, index = f"{stem}{WEIGHTS}", plain_index(library)
    # Where both are there, each library has its own choice.
    order = (index, single) if library == "diffusers" else (single, index)
    found = next(((plain, plain) for plain in order if plain in names), None)
    if found is None:
        variants = _variants(stem, names)
        known = [*(name for name in PREFERRED if name in variants), *sorted(variants)]
        if not known:
            return {}
        found = variants[known[0]]
    plain, name = found
    shards = shard_names(part / name) if plain == index else []
    return {plain: name} | {shard: shard for shard in shards}


def _variants(stem: str, names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Plain name and name of the weights, or of their index, by variant."""
    patterns = {
        f"{stem}{WEIGHTS}": (rf"{stem}\.(\w+)\{WEIGHTS}",),
        f"{stem}{WEIGHTS}.index.json": (
            rf"{stem}\{WEIGHTS}\.index\.(\w+)\.json",
            rf"{stem}\{WEIGHTS}\.(?!index\.)(\w+)\.index\.json",  # as diffusers once wrote it
        ),
    }
    return {
        found[1]: (plain, name)
        for plain, each in patterns.items()
        for pattern in each
        for name in sorted(names)
        if (found := re.fullmatch(pattern, name))
    }
