"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from cdm import hub
from cdm.hub import TeacherManifest
from cdm.params import Params, parse

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete StableDiffusion3Pipeline folder with random weights: 8x8x4 latents, 32x32 pictures, no T5."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from miniature.teacher import build_text_encoder, build_tokenizer, build_transformer

    folder = tmp_path_factory.mktemp("tiny") / "sd3"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        pipeline = StableDiffusion3Pipeline(
            transformer=build_transformer(layers=2, heads=2, head_dim=8),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 8, 8),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=32,
                scaling_factor=1.3,
                shift_factor=0.1,
                use_quant_conv=False,
                use_post_quant_conv=False,
                mid_block_add_attention=False,
            ),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=build_text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tiny_sd3: Path) -> TeacherManifest:
    """What the stage `teacher` finds out about `tiny_sd3`."""
    return hub.describe("sd3", str(tiny_sd3), None)


@pytest.fixture
def tiny_params(tiny_sd3: Path, tmp_path: Path) -> Params:
    """Parameters of a run with `tiny_sd3` in seconds: five training prompts, three evaluation prompts."""
    lists = tmp_path / "lists"
    lists.mkdir()
    train = [f"a red {digit} on black paper" for digit in ("one", "two", "three", "four", "five", "one")]
    evaluation = ["a blue six on white paper", "a pink nine on gray paper", "a cyan zero on brown paper"]
    (lists / "train.txt").write_text("\n".join([*train, "", evaluation[0]]))
    (lists / "eval.txt").write_text("\n".join([*evaluation, "a green two on gray paper"]))
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    values["teacher"] |= {"source": str(tiny_sd3), "track": str(tiny_sd3), "guidance_scale": 3.0}
    values["prompts"] |= {
        "train": [str(lists / "train.txt")],
        "eval": [str(lists / "eval.txt")],
        "track": str(lists),
        "eval_count": 3,
    }
    values["latents"] |= {"steps": 4, "per_prompt": 2}
    values["sample"] |= {"steps": [1, 2], "teacher_steps": [1], "pictures": 2}
    values["runtime"] |= {"device": "cpu", "batch_size": 2}
    return parse(values)
