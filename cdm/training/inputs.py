"""The inputs of a training: teacher, prompts, and where they are needed pairs and a reference for the probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cdm.data.prompt_set import OnlinePrompts, PromptSet
from cdm.data.reference import Reference
from cdm.data.store import MANIFEST, Store
from cdm.errors import CdmError
from cdm.families import Conditioning, Family, get_family
from cdm.models.manifest import TeacherManifest
from cdm.params import Params
from cdm.randomness import Draws, prompt_indices
from cdm.system.files import sha256
from cdm.training.terms import Pairs, PairSource


@dataclass(frozen=True)
class Inputs:
    """The inputs of a training: a teacher on this disk, the training prompts, the empty prompt."""

    family: Family
    teacher: TeacherManifest
    source: Path
    prompts: PromptSet | OnlinePrompts
    empty: Conditioning
    latent_shape: tuple[int, ...]
    shift: float
    digests: list[str]
    """Hashes of what is read: part of the experiment's fingerprint."""
    evaluation: PromptSet
    """Prompts that are not trained on, for pictures during training."""
    reference: Reference | None
    """What a probe compares with, if there is one."""
    pairs: Store | None = None
    """Noise and the teacher's samples of training prompts, for a regression if there is one."""

    @classmethod
    def gather(
        cls,
        params: Params,
        teacher: TeacherManifest,
        prompts: Path,
        *,
        latents: Path | None = None,
        pairs: Path | None = None,
    ) -> Inputs:
        """The inputs that earlier stages have written: `latents` are read for a probe, `pairs` for a regression.

        Both lie beside the folder `prompts` unless they are given. Raises CdmError if one is missing, damaged or of
        something else.
        """
        source, family = teacher.folder(), get_family(teacher.family)
        texts, empty = PromptSet(prompts / "train"), PromptSet(prompts / "empty")
        online = params.prompts.embed == "online"
        offload = params.runtime.offload_encoders
        train = OnlinePrompts(texts, family, source, params.prompts, offload=offload) if online else texts
        digests = [teacher.digest, train.sha256]
        reference = None
        if params.distill.probe.reference == "latents":
            reference = Reference.open(prompts, latents or prompts.with_name("latents"), teacher)
            digests.append(reference.digest)
        store = None
        if any(needs.pairs for needs in params.distill.losses.needs.values()):
            store = open_pairs(pairs or prompts.with_name("pairs"), teacher, train.sha256)
            digests.append(sha256(store.folder / MANIFEST))
        return cls(
            family,
            teacher,
            source,
            train,
            empty.conditioning([0]),
            tuple(teacher.latent_shape),
            teacher.shift,
            digests,
            PromptSet(prompts / "eval"),
            reference,
            store,
        )


def open_pairs(folder: Path, teacher: TeacherManifest, prompts_sha256: str) -> Store:
    """The pairs that the stage `latents` has written; CdmError if they are missing, damaged or of something else."""
    pairs = Store(folder)
    pairs.verify()
    if (pairs.metadata.get("teacher"), pairs.metadata.get("prompts_sha256")) != (
        teacher.digest,
        prompts_sha256,
    ):
        raise CdmError(f"{folder}: drawn for another teacher or other prompts: run the stage `latents` again")
    return pairs


def prompt_source(
    inputs: Inputs, seed: int, batch_size: int, device: torch.device
) -> Callable[[int, Sequence[int]], Conditioning]:
    """The conditioning of an iteration's samples: every prompt once an epoch, in an order of its own."""
    prompts = inputs.prompts

    def conditioning(iteration: int, samples: Sequence[int]) -> Conditioning:
        positions = [iteration * batch_size + sample for sample in samples]
        return prompts.conditioning(prompt_indices(seed, positions, len(prompts)), device)

    return conditioning


def pair_source(inputs: Inputs, device: torch.device) -> PairSource | None:
    """Pairs for an iteration's samples, each drawn anew from all that there are."""
    if inputs.pairs is None:
        return None
    store, prompts = inputs.pairs, inputs.prompts

    def pairs(draws: Draws) -> Pairs:
        rows = store.rows(draws.integers("pair", len(store)))
        conditioning = prompts.conditioning(rows["prompt"].tolist(), device)
        return Pairs(rows["noise"].to(device), rows["latents"].to(device), conditioning)

    return pairs
