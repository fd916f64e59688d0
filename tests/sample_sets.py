"""Made-up sample sets on disk, and the parameters that ask for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cdm.data.store import ShardWriter
from cdm.evaluation.features import Extractor
from cdm.evaluation.quality import Evaluation, evaluate
from cdm.evaluation.samples import RealPictures, Samples, open_samples
from cdm.params import Params, load

ROOT = Path(__file__).parent.parent
TEXTS = ["a red zero on black paper", "a blue one on white paper", "a pink two on gray paper"]
PER_PROMPT = 4


def parameters(**evaluate: object) -> Params:
    """3 prompts of 4 samples: the student at 1 and 4 steps, the teacher at 4 and 50."""
    params = load(ROOT / "params.yaml")
    return params.model_copy(
        update={
            "latents": params.latents.model_copy(update={"steps": 50, "per_prompt": PER_PROMPT}),
            "sample": params.sample.model_copy(update={"steps": [4, 1], "teacher_steps": [4], "pictures": 2}),
            "evaluate": params.evaluate.model_copy(update={"neighbours": 2, **evaluate}),
        }
    )


def noise_pictures(seed: int, count: int = len(TEXTS) * PER_PROMPT, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def write_set(
    folder: Path, model: str, steps: int, images: torch.Tensor, prompts: str = "ab" * 32, by: str = "cd" * 32
) -> None:
    """What the stage `sample` leaves for one model, of the hash `by`, and number of steps."""
    evaluations = steps * (2 if model == "teacher" else 1)
    metadata = {
        "steps": steps,
        "evaluations": evaluations,
        "guidance_scale": 2.0,
        "prompts_sha256": prompts,
        "seed": 0,
        "model": by,
    }
    with ShardWriter(folder / model / f"steps{steps}", 5, metadata) as writer:
        writer.append({"images": images, "latents": torch.zeros(len(images), 4, 1, 1)})


def write_sets(folder: Path, **pictures: torch.Tensor) -> Path:
    """All sets that `parameters` asks for; pictures by name (`student1`), noise where not given."""
    for seed, (model, steps) in enumerate([("student", 1), ("student", 4), ("teacher", 4), ("teacher", 50)]):
        write_set(folder, model, steps, pictures.get(f"{model}{steps}", noise_pictures(seed)))
    return folder


def write_real(path: Path, images: torch.Tensor, prompts: list[str]) -> Path:
    save_file({"images": images}, path, metadata={"prompts": json.dumps(prompts)})
    return path


def open_sets(params: Params, folder: Path, texts: list[str] = TEXTS) -> Samples:
    """The sets below `folder` that `params` asks for."""
    return open_samples(params.sample, params.latents, folder, texts)


def evaluated(params: Params, samples: Samples, real: RealPictures | None, extractor: Extractor) -> Evaluation:
    """The figures of `samples` with the settings of `params`."""
    return evaluate(samples, real, extractor, neighbours=params.evaluate.neighbours, seed=params.seed)
