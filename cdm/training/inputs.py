"""The inputs of a training: teacher, prompts, and where they are needed pairs and a reference for the probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cdm.data.prompt_set import OnlinePrompts, PromptSet, as_float32
from cdm.data.reference import Reference
from cdm.data.store import MANIFEST, Store
from cdm.errors import CdmError
from cdm.families import Conditioning, Family, get_family
from cdm.models.manifest import TeacherManifest
from cdm.params import Distill, Params
from cdm.randomness import Draws, prompt_indices
from cdm.rollout import take
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
    inputs: Inputs, seed: int, distill: Distill, samples: Sequence[int], device: torch.device, at_once: int
) -> Callable[[int, Sequence[int]], Conditioning]:
    """The conditioning of an iteration's samples: every prompt once an epoch, in an order of its own.

    Prompts that are not stored are encoded once a round, all those of the `samples` of this process, `at_once` in one
    forward.
    """
    prompts = inputs.prompts
    several = distill.rollouts == "fresh" and distill.losses.ask_fake

    def indices(iteration: int, samples: Sequence[int]) -> list[int]:
        # Rollouts one after the other: a round has one alone where it is shared, or where only the last is asked for.
        rollout = iteration if several else iteration // distill.student_every
        positions = [rollout * distill.batch_size + sample for sample in samples]
        return prompt_indices(seed, positions, len(prompts))

    def stored(iteration: int, samples: Sequence[int]) -> Conditioning:
        return prompts.conditioning(indices(iteration, samples), device)

    if isinstance(prompts, OnlinePrompts):
        return OnlineRound(prompts, indices, distill, samples, device, at_once)
    return stored


class OnlineRound:
    """The conditioning of a process's `samples` in the iterations of a round, encoded when the first is asked for.

    The encoders may have to come to the device and to leave it again, which takes longer than they work. `indices` are
    the prompts of an iteration's samples. What is encoded waits on the CPU.
    """

    def __init__(
        self,
        prompts: OnlinePrompts,
        indices: Callable[[int, Sequence[int]], list[int]],
        distill: Distill,
        samples: Sequence[int],
        device: torch.device,
        at_once: int,
    ) -> None:
        self.prompts, self.indices, self.distill, self.samples = prompts, indices, distill, samples
        self.device, self.at_once = device, at_once
        self.kept: dict[int, Conditioning] = {}

    def __call__(self, iteration: int, samples: Sequence[int]) -> Conditioning:
        if iteration not in self.kept:
            self.kept = self._encode(iteration)
        rows = torch.tensor([self.samples.index(sample) for sample in samples])
        return as_float32(take(self.kept[iteration], rows), self.device)

    def _encode(self, iteration: int) -> dict[int, Conditioning]:
        """From this iteration to the last of its round that rolls out."""
        every = self.distill.student_every
        left = every - iteration % every if self.distill.rollouts == "fresh" else 1
        iterations, count = range(iteration, iteration + left), len(self.samples)
        wanted = [index for each in iterations for index in self.indices(each, self.samples)]
        encoded = self.prompts.encoded(wanted, self.device, self.at_once)
        return {
            each: take(encoded, slice(number * count, (number + 1) * count))
            for number, each in enumerate(iterations)
        }


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
