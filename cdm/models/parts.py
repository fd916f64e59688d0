"""Checks of a teacher's parts before anything is built on them: each against the model that its config describes.

Tensors are compared by the names, shapes and types in the headers of the files, so that a check takes seconds however
large a model is. The numbers themselves are looked at where a part first makes something of them
(`cdm.families.common`), but for the autoencoder, which nothing needs before a training is over.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cdm.errors import CdmError
from cdm.families.configs import AUTOENCODER, INDEX, TRANSFORMER, read_config
from cdm.families.folder import is_model, parts, weights

if TYPE_CHECKING:  # a second look at a teacher needs no torch
    from cdm.families import Family

LFS_POINTER = b"version https://git-lfs"
"""What a file starts with that Git LFS has not fetched."""
SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
"""The scheduler of every family: Euler steps along the velocity."""
SIDE = 4
"""Height and width of the latents on which transformer and autoencoder are tried."""
NAMED = 3
"""Tensors of a kind that a message names."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types in a safetensors header that are cast to the precision of a run."""

Headers = dict[str, dict[str, tuple[str, tuple[int, ...]]]]
"""By part: type and shape of every tensor in the files of its weights, by name."""

CURES: dict[str, Callable[[str], bool]] = {
    "it was saved with a LoRA in it: call unload_lora_weights() after fuse_lora() and save it again": (
        lambda name: ".lora_A." in name or ".lora_B." in name or ".base_layer." in name
    ),
    "its projections are fused: call unfuse_qkv_projections() and save it again": (
        lambda name: ".to_qkv" in name or ".to_added_qkv" in name
    ),
    "it is in the layout of another tool: get the model as a diffusers folder": (
        lambda name: name.startswith(("model.diffusion_model.", "first_stage_model.", "conditioner.", "net."))
    ),
    "it was saved from inside a wrapper: save the model itself": (
        lambda name: name.startswith(("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module."))
    ),
}
"""What is wrong with weights, and what to do, by how the names of tensors look that the model does not have."""


@dataclass
class Difference:
    """How the tensors of a part differ from those of its model; all empty where they do not."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    """With both shapes."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.reshaped)

    def text(self) -> str:
        """In words, with the first names of each kind."""
        kinds = {"missing": self.missing, "extra": self.extra, "of another shape": self.reshaped}
        return ", ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names)

    def cure(self) -> str:
        """What to do about it."""
        found = (cure for cure, fits in CURES.items() if any(map(fits, self.extra)))
        return next(found, "get the model again, or its config")


def read_headers(folder: Path) -> Headers:
    """The headers of all weights of the pipeline in `folder`; torch is not needed.

    Raises CdmError that names the part that is missing, or the file of its weights that is missing or damaged, or that
    holds integers.
    """
    headers: Headers = {}
    for part, (library, _) in parts(folder).items():
        if not (folder / part).is_dir():
            raise CdmError(f"{folder / part}: missing, though {INDEX} names it: get the model again")
        names = weights(folder, part, library)
        if not names and (
            is_model(folder, part, library) or part.startswith(("transformer", "text_encoder", "vae"))
        ):
            raise CdmError(f"{folder / part}: holds no weights in safetensors files, and no others are loaded")
        if (folder / part / "adapter_config.json").exists():
            raise CdmError(
                f"{folder / part}: holds an adapter (adapter_config.json), which would be loaded into it:"
                " fuse it into the weights and save the model again, or remove its files"
            )
        if names:
            headers[part] = {}
        for name in names:
            headers[part] |= _header(folder / part / name)
    return headers


def check_parts(folder: Path, family: Family, headers: Headers) -> None:
    """CdmError, in one line, if a part of the pipeline in `folder` is not what `family` and the part's config say.

    That is: parts that the family needs, the tensors of every model, the files of tokenizers, that transformer and
    autoencoder fit, and that the numbers of the autoencoder are finite.
    """
    named = parts(folder)
    _check_needed(folder, family, named)
    with _quiet():
        for part in headers:
            _check_tensors(folder, part, *named[part], headers[part])
        for part, (library, name) in named.items():
            if part.startswith("tokenizer"):
                _check_tokenizer(folder, part, library, name, family)
        _check_fit(folder, family)
    _check_numbers(folder, Path(AUTOENCODER).parent.name, named)


def _check_needed(folder: Path, family: Family, named: Mapping[str, tuple[str, str]]) -> None:
    """The parts that the family needs, and no half of a pair."""
    transformer = Path(TRANSFORMER).parent.name
    wanted = {transformer: family.transformer_class_name, "scheduler": SCHEDULER_CLASS}
    for part in [*family.text_components, "vae", *wanted]:
        if part not in named and part not in family.optional_components:
            raise CdmError(f"{folder / INDEX}: its {part} is null, but the family {family.name} needs one")
    for part, name in wanted.items():
        if named[part][1] != name:
            raise CdmError(f"{folder / INDEX}: its {part} is a {named[part][1]}, expected a {name}")
    for part in family.optional_components:
        both = ("text_encoder", "tokenizer")
        twin = part.replace(*(both if part.startswith(both[0]) else both[::-1]))
        if part in named and twin not in named:
            raise CdmError(f"{folder / INDEX}: its {twin} is null, though {part} is there, which needs it")


def _check_tensors(
    folder: Path, part: str, library: str, name: str, header: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """The tensors of a part against the model of its config."""
    where, kind = folder / part, _class(folder / part, library, name)
    config = read_config(folder, f"{part}/config.json")
    if config.get("quantization_config"):
        raise CdmError(f"{where}: is quantized, and cannot be learnt from: get the model in floating point")
    if library == "diffusers" and config.get("_class_name", name) != name:
        raise CdmError(f"{where}: a {config['_class_name']} by its config.json, but a {name} by {INDEX}")
    compare = {"diffusers": _compare_diffusers, "transformers": _compare_transformers}.get(library)
    if compare is None:
        raise CdmError(f"{where}: of {library}, from which no weights are loaded")
    try:
        difference, integers = compare(kind, where, header)
    except Exception as error:  # noqa: BLE001 - whatever a class makes of values that it does not expect
        problem = " ".join(str(error).split())
        raise CdmError(f"{where}/config.json: describes no {name} ({problem}): get the model again") from None
    if difference:
        raise CdmError(
            f"{where}: its tensors are not those of the {name} of its config.json: {difference.text()}:"
            f" {difference.cure()}"
        )
    if integers:
        raise CdmError(
            f"{where}: {_some(integers)}: integers, where the model has floating point: it is quantized, or not its"
            " weights: get the model in floating point"
        )


def _compare_diffusers(
    kind: Any, where: Path, header: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[Difference, list[str]]:
    """Differences of a model of diffusers, and names of tensors that are integers and should not be."""
    import torch

    with torch.device("meta"):
        model = kind.from_config(read_config(where, "config.json"))
    expected = model.state_dict()
    found = model._fix_state_dict_keys_on_load(dict(header))  # noqa: SLF001 - names that its loader knows, too
    ignored = kind._keys_to_ignore_on_load_unexpected or []  # noqa: SLF001
    return (
        _difference(
            {name: tuple(value.shape) for name, value in expected.items()},
            {name: shape for name, (_, shape) in found.items()},
            ignored,
        ),
        [
            name
            for name, (dtype, _) in found.items()
            if dtype not in FLOATS and name in expected and expected[name].is_floating_point()
        ],
    )


def _difference(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], ignored: list[str]
) -> Difference:
    return Difference(
        sorted(expected.keys() - found.keys()),
        sorted(
            name
            for name in found.keys() - expected.keys()
            if not any(re.search(each, name) for each in ignored)
        ),
        [
            _reshaped(name, found[name], shape)
            for name, shape in sorted(expected.items())
            if name in found and found[name] != shape
        ],
    )


def _compare_transformers(
    kind: Any, where: Path, header: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[Difference, list[str]]:
    """As `_compare_diffusers`. Its own loader says what it takes for what: it knows older names, and tensors that are
    one and the same. It gets tensors without numbers.
    """
    import torch

    types = {True: torch.float32, False: torch.int64}
    state = {
        name: torch.empty(shape, dtype=types[dtype in FLOATS], device="meta")
        for name, (dtype, shape) in header.items()
    }
    model, info = kind.from_pretrained(
        None,
        config=kind.config_class.from_pretrained(where),
        state_dict=state,
        device_map={"": "meta"},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    expected = model.state_dict()
    head = [] if model.get_output_embeddings() is not None else ["lm_head.weight"]
    difference = Difference(
        sorted(info["missing_keys"]),
        sorted(set(info["unexpected_keys"]) - set(head)),  # a head that no hidden state goes through
        [_reshaped(*each) for each in sorted(info["mismatched_keys"], key=lambda each: str(each[0]))],
    )
    integers = [
        name
        for name, (dtype, _) in header.items()
        if dtype not in FLOATS and not name.endswith("position_ids") and _is_float(expected.get(name))
    ]
    return difference, integers


def _is_float(value: Any) -> bool:
    """Whether a model has floating point there; a name of older files, which it does not have, counts as such."""
    return value is None or bool(value.is_floating_point())


def _reshaped(name: str, found: Any, expected: Any) -> str:
    return f"{name} is {tuple(found)} instead of {tuple(expected)}"


def _check_tokenizer(folder: Path, part: str, library: str, name: str, family: Family) -> None:
    """A tokenizer that has its files, a vocabulary, no word that its text encoder does not know, and a chat template
    where the family needs one. Without its files, the class makes one that reads every text alike.
    """
    where, kind = folder / part, _class(folder / part, library, name)
    names = {path.name for path in where.iterdir()}
    apart = {name for key, name in kind.vocab_files_names.items() if key != "tokenizer_file"}
    missing = [] if "tokenizer.json" in names else sorted(apart - names)
    missing += [name for name in ("tokenizer_config.json",) if name not in names]
    if missing:
        raise CdmError(f"{where}: has no {' and no '.join(missing)}: get the model again")
    try:
        tokenizer = kind.from_pretrained(where, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - those of the Rust library are of no narrower class
        raise CdmError(
            f"{where}: cannot be loaded ({' '.join(str(error).split())}): get the model again"
        ) from None
    vocabulary = tokenizer.get_vocab()
    if not vocabulary.keys() - {*tokenizer.all_special_tokens}:
        raise CdmError(f"{where}: its vocabulary is empty: get the model again")
    if family.chat_template and not tokenizer.chat_template:
        raise CdmError(
            f"{where}: has no chat template (chat_template.jinja), which the pipeline writes prompts in"
        )
    known = _vocabulary_size(folder, part.replace("tokenizer", "text_encoder"))
    if known is not None and max(vocabulary.values()) >= known:
        raise CdmError(
            f"{where}: numbers words up to {max(vocabulary.values())}, but its text encoder knows {known}: it"
            " belongs to another model"
        )


def _vocabulary_size(folder: Path, part: str) -> int | None:
    """Words that a text encoder knows, where its config says so."""
    try:
        config = read_config(folder, f"{part}/config.json")
    except CdmError:
        return None
    inner = config.get("text_config")
    size = (inner if isinstance(inner, dict) else {}).get("vocab_size", config.get("vocab_size"))
    return size if isinstance(size, int) else None


def _check_fit(folder: Path, family: Family) -> None:
    """That the transformer takes and makes latents of the autoencoder: one call on tensors without numbers."""
    import torch

    from cdm.families.common import MASK

    config = read_config(folder, AUTOENCODER)
    channels: int = config.get("latent_channels", config.get("z_dim"))  # type: ignore[assignment]
    try:
        with torch.device("meta"), torch.no_grad():
            x = torch.empty(1, channels, SIDE, SIDE)
            shapes = family.conditioning_shapes(folder).items()
            conditioning = {name: torch.empty(1, *shape) for name, shape in shapes if name != MASK}
            drawn = family.velocity(family.build_transformer(folder), x, torch.empty(1), conditioning)
        problem = "" if drawn.shape == x.shape else f"it makes {tuple(drawn.shape)} of {tuple(x.shape)}"
    except CdmError:
        raise
    except Exception as error:  # noqa: BLE001 - of whatever does not fit, torch and diffusers raise everything
        problem = " ".join(str(error).split())
    if problem:
        raise CdmError(
            f"{folder}: its transformer does not draw the {channels} channels of its autoencoder, so that they are of"
            f" different models: get the model again ({problem})"
        )


def _check_numbers(folder: Path, part: str, named: Mapping[str, tuple[str, str]]) -> None:
    """That the weights of a part are finite."""
    from cdm.families.common import is_finite

    for name in weights(folder, part, named[part][0]):
        with safe_open(folder / part / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if not is_finite(file.get_tensor(key)):
                    raise CdmError(
                        f"{folder / part / name}: {key} holds numbers that are not finite: get the model again"
                    )


def _class(where: Path, library: str, name: str) -> Any:
    """A class of diffusers or transformers; CdmError if there is none."""
    import diffusers
    import transformers

    modules: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    kind = getattr(modules.get(library), name, None)
    if kind is None:
        raise CdmError(f"{where}: a {name} of {library}, which this version of {library} does not have")
    return kind


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in a safetensors file, from its header; CdmError if it is cut off or none."""
    if not path.is_file():
        raise CdmError(f"{path}: missing, though the index of shards names it: get the model again")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        problem = " ".join(str(error).split())
    if _start(path, len(LFS_POINTER)) == LFS_POINTER:
        problem = "a pointer of Git LFS: run `git lfs pull` where it comes from"
    raise CdmError(f"{path}: not a readable safetensors file ({problem})")


def _start(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _some(names: list[str]) -> str:
    """The first few of some names."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what the libraries say of a model that does not fit, and no bars: a line of our own says it."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
