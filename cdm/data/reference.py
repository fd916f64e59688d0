"""The teacher's own samples of the evaluation prompts, as what a student is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cdm.data.prompt_set import PromptSet
from cdm.data.store import MANIFEST, Store
from cdm.errors import CdmError
from cdm.models.manifest import TeacherManifest
from cdm.system.device import DTYPES
from cdm.system.files import sha256


@dataclass(frozen=True)
class Reference:
    """The evaluation prompts, and the cache of the teacher's full-length `latents` with their `noise`."""

    prompts: PromptSet
    cache: Store

    @classmethod
    def open(cls, prompts: Path, latents: Path, teacher: TeacherManifest) -> Reference:
        """Opens the output of the stages `prompts` and `latents`.

        Raises CdmError if one is missing or damaged, or if the latents belong to another teacher or other prompts.
        """
        opened = cls(PromptSet(prompts / "eval"), Store(latents))
        opened.cache.verify()
        expected = {"teacher": teacher.digest, "prompts_sha256": opened.prompts.sha256}
        for name, value in expected.items():
            if opened.cache.metadata.get(name) != value:
                other = "another teacher" if name == "teacher" else "other prompts"
                raise CdmError(f"{latents}: drawn for {other}: run the stage `latents` again")
        if not opened._is_consistent():
            raise CdmError(f"{latents / MANIFEST}: changed since it was written: run the stage `latents` again")
        return opened

    def _is_consistent(self) -> bool:
        """Whether the cache can have been drawn as its manifest says."""
        return (
            len(self.cache) == len(self.prompts) * self.per_prompt
            and self.steps >= 1
            and self.guidance_scale >= 1
            and self.precision in DTYPES
            and self.seed >= 0
        )

    @property
    def per_prompt(self) -> int:
        """Samples of each prompt: sample k belongs to prompt `k // per_prompt`."""
        return self.cache.fact("per_prompt", int)

    @property
    def steps(self) -> int:
        """Steps in which the teacher has drawn them."""
        return self.cache.fact("steps", int)

    @property
    def guidance_scale(self) -> float:
        """The guidance with which the teacher has drawn them; 1 is none."""
        return self.cache.fact("guidance_scale", float)

    @property
    def precision(self) -> str:
        """The arithmetic in which they were drawn, a key of `DTYPES`."""
        return self.cache.fact("precision", str)

    @property
    def seed(self) -> int:
        """The seed of their noise."""
        return self.cache.fact("seed", int)

    @property
    def digest(self) -> str:
        """Hash of the latents."""
        return sha256(self.cache.folder / MANIFEST)
