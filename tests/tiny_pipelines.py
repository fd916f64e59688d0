"""A tiny pipeline of each family: the real class of every component, random weights, pictures of 32 x 32 pixels.

Latents are 8 x 8, so that a picture is 16 image tokens. Everything is made here, without a network; the same numbers
every time. The fixture `tiny_pipeline` of conftest.py saves one once a session.

What is tiny hides what depends on shapes: so there are parts of published shapes too, for slow tests (`REAL_SHAPES`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

RESOLUTION = 32
PROMPTS = ["a red three on black paper", "a blue 'seven' on paper"]
TEXT_TOKENS = {
    "sd3": 0,
    "sd3_t5": 16,
    "sd3_real": 16,
    "longcat": 24,
    "flux": 16,
    "qwen_image": 32,
    "z_image": 32,
}
"""Text tokens that are enough for `PROMPTS` (`prompts.max_sequence_length`), by pipeline."""
WIDTH = 32
"""Of every text encoder's hidden states."""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def save(name: str, folder: Path) -> Path:
    """Saves the tiny pipeline `name` in `folder`, which it returns."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (BUILDERS | REAL_SHAPES)[name]().save_pretrained(folder)
    return folder


def call(
    name: str,
    pipeline: Any,
    prompts: list[str],
    noise: Tensor,
    sigmas: list[float],
    guidance_scale: float = 1.0,
    output_type: str = "latent",
) -> Tensor:
    """What a user of diffusers writes to draw `prompts` from `noise` (batch, channels, height, width).

    Latents (batch, channels, height, width), or whatever `output_type` says. `guidance_scale` counts from 1.
    """
    batch, channels, height, width = noise.shape
    pixels = pipeline.vae_scale_factor
    options: dict[str, Any] = {"height": height * pixels, "width": width * pixels, "output_type": output_type}
    options |= {"sigmas": sigmas, "latents": noise}
    packed = hasattr(pipeline, "_pack_latents")
    if packed:
        options["latents"] = pipeline._pack_latents(noise, batch, channels, height, width)
    if name == "longcat":
        pipeline.tokenizer_max_length = TEXT_TOKENS[name]
        options |= {"guidance_scale": guidance_scale, "enable_prompt_rewrite": False}
    else:
        options["max_sequence_length"] = TEXT_TOKENS[name]
    if name in ("flux", "qwen_image"):
        options |= {
            "true_cfg_scale": guidance_scale,
            "negative_prompt": [""] * batch if guidance_scale > 1 else None,
        }
    elif name == "z_image":
        options["guidance_scale"] = guidance_scale - 1
    else:
        options["guidance_scale"] = guidance_scale
    drawn = pipeline(list(prompts), **options).images
    if packed and output_type == "latent":
        unpacked = pipeline._unpack_latents(drawn, height * pixels, width * pixels, pixels)
        return unpacked.reshape(noise.shape)  # some have a dimension of frames
    return drawn


def sd3() -> Any:
    """Stable Diffusion 3 without T5, on the miniature's words."""
    from diffusers import StableDiffusion3Pipeline

    from miniature.teacher import build_text_encoder, build_tokenizer, build_transformer

    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=build_transformer(layers=2, heads=2, head_dim=8),
        scheduler=_scheduler(shift=3.0),
        vae=_autoencoder(channels=4),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def sd3_t5() -> Any:
    """Stable Diffusion 3.5 Medium with T5: normalised queries and keys, and a second attention in the first block."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    from miniature.teacher import build_text_encoder, build_tokenizer

    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=6,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        scheduler=_scheduler(shift=3.0),
        vae=_autoencoder(channels=16),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(2 * WIDTH),
        tokenizer_3=_t5_tokenizer(),
    )


def sd3_real() -> Any:
    """Stable Diffusion 3 Medium, as wide outside of its transformer as it is, but of few layers and words: a whole
    autoencoder, the widths of its three text encoders, heads of 64 numbers, positions of pictures up to 1536 x 1536."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    from miniature.teacher import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=256,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        ),
        scheduler=_scheduler(shift=3.0),
        vae=kl_autoencoder(),
        text_encoder=_clip(tokenizer, width=768, heads=12, activation="quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, width=1280, heads=20, activation="gelu"),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(4096, head_width=64, inner=512),
        tokenizer_3=_t5_tokenizer(),
    )


def kl_autoencoder() -> Any:
    """That of Stable Diffusion 3; those of FLUX.1, LongCat-Image and Z-Image have its shapes too."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def qwen_autoencoder() -> Any:
    """That of Qwen-Image."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage()


def longcat() -> Any:
    """LongCat-Image, but for the processor that its pipeline rewrites prompts with, which needs torchvision."""
    from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

    template = LongCatImagePipeline(*[None] * 6).prompt_template_encode_prefix
    tokenizer = _qwen_tokenizer(template)
    return LongCatImagePipeline(
        scheduler=_dynamic_scheduler(),
        vae=_autoencoder(channels=16),
        text_encoder=_qwen_vl(len(tokenizer)),
        tokenizer=tokenizer,
        text_processor=None,
        transformer=LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=[4, 6, 6],
        ),
    )


def flux() -> Any:
    """FLUX.1-dev: guidance is an input of its transformer."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    from miniature.teacher import build_text_encoder, build_tokenizer

    tokenizer = build_tokenizer()
    return FluxPipeline(
        scheduler=_dynamic_scheduler(),
        vae=_autoencoder(channels=16),
        text_encoder=CLIPTextModel(build_text_encoder(tokenizer).config),
        tokenizer=tokenizer,
        text_encoder_2=_t5(WIDTH),
        tokenizer_2=_t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def qwen_image() -> Any:
    """Qwen-Image, with the stretched levels of its published scheduler."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    # The pipeline drops the template's first tokens: with the words of the template, those of the prompt remain.
    tokenizer = _qwen_tokenizer(QwenImagePipeline(*[None] * 5).prompt_template_encode)
    return QwenImagePipeline(
        scheduler=_dynamic_scheduler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=16,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
        ),
        text_encoder=_qwen_vl(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def z_image() -> Any:
    """Z-Image."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = _qwen_tokenizer(CHAT, chat_template=CHAT)
    return ZImagePipeline(
        scheduler=_scheduler(shift=3.0),
        vae=_autoencoder(channels=16),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
            )
        ),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 32, 32],
        ),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    builder.__name__: builder for builder in (sd3, sd3_t5, longcat, flux, qwen_image, z_image)
}


REAL_SHAPES: dict[str, Callable[[], Any]] = {"sd3_real": sd3_real}
"""Pipelines of published shapes, about half a gigabyte each."""
AUTOENCODERS: dict[str, Callable[[], Any]] = {"sd3": kl_autoencoder, "qwen_image": qwen_autoencoder}
"""Autoencoders of published shapes, by a family that decodes with them."""


def family_of(name: str) -> str:
    """The family of a pipeline here."""
    return name.removesuffix("_t5").removesuffix("_real")


def resolution_of(name: str) -> int:
    """Pixels on a side of a pipeline's pictures: those of 8 x 8 latents."""
    return 2 * RESOLUTION if name in REAL_SHAPES else RESOLUTION


def _scheduler(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _dynamic_scheduler(**config: Any) -> Any:
    return _scheduler(
        **{"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0} | config
    )


def _autoencoder(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=1.3,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def _qwen_tokenizer(template: str, **options: Any) -> Any:
    """Qwen's tokenizer with a vocabulary of bytes, and of the words of `PROMPTS` and their `template`."""
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([*PROMPTS, template] * 3, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=bpe.get_vocab(), merges=merges, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def _qwen_vl(words: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": words,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": 0,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 1,
                "out_hidden_size": WIDTH,
                "fullatt_block_indexes": [0],
            },
            image_token_id=1,
            video_token_id=2,
            vision_start_token_id=3,
            vision_end_token_id=4,
        )
    )


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    letters = [("▁", -2.0), *((chr(code), -3.0) for code in range(ord("a"), ord("z") + 1))]
    return T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


def _t5(width: int, head_width: int = 8, inner: int | None = None) -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_kv": head_width, "d_ff": inner or width}
    return T5EncoderModel(T5Config(vocab_size=64, **sizes, num_layers=2, num_heads=2))


def _clip(tokenizer: Any, width: int, heads: int, activation: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
