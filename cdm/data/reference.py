"""The teacher's own samples of the evaluation prompts, as what a student is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cdm.data.prompt_set import PromptSet
from cdm.data.store import MANIFEST, Store
from cdm.errors import CdmError
from cdm.models.manifest import TeacherManifest
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
        return opened

    @property
    def per_prompt(self) -> int:
        """Samples of each prompt: sample k belongs to prompt `k // per_prompt`."""
        return int(self.cache.metadata["per_prompt"])

    @property
    def digest(self) -> str:
        """Hash of the latents."""
        return sha256(self.cache.folder / MANIFEST)
