"""Stage `teacher`: transformer and text encoders, trained together by flow matching, saved as a pipeline."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from cdm.evaluation.judge import Judge
from miniature.common import load_params, optimiser, progress
from miniature.world import ATTRIBUTES, WORDS, combinations, draw_combinations, load_glyphs, render

TEXT_TOKENS = 8  # start, six words, end
TEXT_WIDTH = 32
NULL_TOKENS = 256  # the zero tokens that SD3's pipeline appends in place of T5's, by default


class PaddedAttention:
    """SD3's joint attention in which the last text token stands for `exp(log_count)` equal ones.

    Without a T5 encoder the diffusers pipeline appends `max_sequence_length` zero tokens to the text. Text
    tokens carry no position, so n equal tokens stay equal through the network and act as one whose attention
    logit is raised by log n. Training with one token of a random count n in {0, 1..256} therefore makes the
    teacher right for every `max_sequence_length`, at the price of one token.
    """

    log_count: torch.Tensor  # (batch,)

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def heads(states: torch.Tensor, project: nn.Module, norm: nn.Module | None) -> torch.Tensor:
            split = project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat(
            [heads(image, attn.to_q, attn.norm_q), heads(text, attn.add_q_proj, attn.norm_added_q)], 2
        )
        key = torch.cat(
            [heads(image, attn.to_k, attn.norm_k), heads(text, attn.add_k_proj, attn.norm_added_k)], 2
        )
        value = torch.cat([heads(image, attn.to_v, None), heads(text, attn.add_v_proj, None)], 2)
        bias = F.pad(self.log_count[:, None], (key.shape[2] - 1, 0))[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        image, text = mixed.split([image.shape[1], text.shape[1]], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of this world's words: each is one token; other words fall apart into letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    pieces = sorted(set(learnt["vocab"]) | set(letters) | {letter + "</w>" for letter in letters})
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)
    for word in WORDS:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"the word {word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer(layers: int, heads: int, head_dim: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


class Teacher(nn.Module):
    """What is trained: token ids and noisy latents in, velocity out."""

    def __init__(self, tokenizer: CLIPTokenizer, **transformer: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.text_encoder_2 = build_text_encoder(tokenizer)
        self.transformer = build_transformer(**transformer)
        self.attention = PaddedAttention()
        self.transformer.set_attn_processor(self.attention)

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, token_ids: torch.Tensor, log_count: torch.Tensor
    ) -> torch.Tensor:
        encoded = [
            encoder(token_ids, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        prompt_embeds = torch.cat([e.hidden_states[-2] for e in encoded], dim=-1)
        self.attention.log_count = log_count
        return self.transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=F.pad(prompt_embeds, (0, 0, 0, 1)),
            pooled_projections=torch.cat([e.text_embeds for e in encoded], dim=-1),
        ).sample


def encode_pictures(
    vae: AutoencoderKL, count: int, scale_range: tuple[float, float], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (count, 4, 8, 8) of random training pictures, and each one's row in `combinations()`."""
    train, _ = load_glyphs()
    row_of = {(c.digit, c.ink, c.paper): row for row, c in enumerate(combinations())}
    latents, rows = [], []
    for _ in progress(math.ceil(count / 500), "encode"):
        which, attributes = draw_combinations(train, 500, generator)
        with torch.no_grad():
            mean = vae.encode(render(train, which, attributes, scale_range, generator) * 2 - 1).latent_dist.mean
        latents.append((mean - vae.config.shift_factor) * vae.config.scaling_factor)
        rows += [row_of[tuple(row)] for row in attributes.tolist()]
    return torch.cat(latents), torch.tensor(rows)


def draw_sigma(count: int, generator: torch.Generator) -> torch.Tensor:
    """Half uniform, half logit-normal: the middle is hardest, the ends must not be forgotten."""
    uniform = torch.rand(count, generator=generator)
    normal = torch.randn(count, generator=generator).sigmoid()
    return torch.where(torch.rand(count, generator=generator) < 0.5, uniform, normal)


def attribute_accuracy(pipeline: StableDiffusion3Pipeline, judge: Judge, guidance_scale: float) -> float:
    """Share of 320 pictures (one a prompt, 50 guided steps) whose digit, ink and paper are all right."""
    every = combinations()
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [c.prompt for c in every],
        num_inference_steps=50,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=0,
        output_type="pt",
    ).images
    logits = judge(images.float()).logits
    expected = torch.tensor([[c.digit, c.ink, c.paper] for c in every])
    right = [logits[name].argmax(1) == expected[:, i] for i, name in enumerate(ATTRIBUTES)]
    return torch.stack(right).all(0).float().mean().item()


def optimisers(teacher: Teacher, params: dict[str, Any]) -> list[tuple[torch.optim.Optimizer, Any]]:
    """Muon for the matrices inside the transformer's blocks, AdamW for the rest, each with its schedule.

    In a short trial the held-out loss after 1,000 iterations was 0.59, with AdamW alone 0.66; one is a tenth slower.
    """
    matrices = [value for value in teacher.transformer.transformer_blocks.parameters() if value.ndim == 2]
    inside = {id(value) for value in matrices}
    others = [value for value in teacher.parameters() if id(value) not in inside]
    muon = torch.optim.Muon(matrices, lr=params["muon_lr"], weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
    steps = params["iterations"]
    falling = OneCycleLR(muon, params["muon_lr"], total_steps=steps, pct_start=0.05, cycle_momentum=False)
    return [(muon, falling), optimiser(others, params["lr"], steps)]


def train(
    teacher: Teacher,
    vae: AutoencoderKL,
    token_ids: torch.Tensor,
    params: dict[str, Any],
    generator: torch.Generator,
) -> Teacher:
    """The moving average of `teacher`, trained on freshly drawn pictures.

    `token_ids` (321, 8): a row for each of `combinations()` and a last one for the empty prompt.
    """
    latents, rows = encode_pictures(vae, params["pictures"], params["scale"], generator)
    empty, batch = len(token_ids) - 1, params["batch_size"]
    learning = optimisers(teacher, params)
    average = AveragedModel(teacher, multi_avg_fn=get_ema_multi_avg_fn(params["ema"]), use_buffers=True)
    forward = torch.compile(teacher) if shutil.which("g++") else teacher  # an eighth faster where it can be had
    for iteration in progress(params["iterations"], "teacher"):
        index = torch.randint(len(latents), (batch,), generator=generator)
        x0, noise = latents[index], torch.randn(batch, *latents.shape[1:], generator=generator)
        sigma = draw_sigma(batch, generator)
        x = torch.lerp(x0, noise, sigma[:, None, None, None])
        dropped = torch.rand(batch, generator=generator) < params["prompt_dropout"]
        ids = token_ids[torch.where(dropped, empty, rows[index])]
        log_count = torch.rand(batch, generator=generator) * math.log(NULL_TOKENS)
        log_count[torch.rand(batch, generator=generator) < 0.2] = math.log(NULL_TOKENS)
        log_count[torch.rand(batch, generator=generator) < 0.5] = -math.inf
        loss = F.mse_loss(forward(x, sigma, ids, log_count), noise - x0)
        teacher.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        for optim, schedule in learning:
            optim.step()
            schedule.step()
        average.update_parameters(teacher)
        if iteration % 500 == 0:
            print(f"iteration {iteration} loss {loss.item():.4f}", flush=True)
    return cast(Teacher, average.module)


def main(folder: Path = Path("miniature/teacher"), metrics: Path = Path("miniature/teacher.json")) -> None:
    seed, params = load_params("teacher")
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained("miniature/vae").eval()
    tokenizer = build_tokenizer()
    prompts = [c.prompt for c in combinations()] + [""]
    token_ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    teacher = Teacher(tokenizer, layers=params["layers"], heads=params["heads"], head_dim=params["head_dim"])
    teacher = train(teacher, vae, token_ids, params, torch.Generator().manual_seed(seed + 3))

    teacher.eval()
    teacher.transformer.set_attn_processor(JointAttnProcessor2_0())
    pipeline = StableDiffusion3Pipeline(
        transformer=teacher.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=params["shift"]),
        vae=vae,
        text_encoder=teacher.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=teacher.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder)
    judge = Judge.load(Path("miniature/judge"))
    accuracy = {f"guidance_{g}": round(attribute_accuracy(pipeline, judge, g), 4) for g in (1.0, 1.5, 2.0, 3.0)}
    metrics.write_text(json.dumps({"attribute_accuracy_50_steps": accuracy}, indent=2) + "\n")
    print(accuracy)


if __name__ == "__main__":
    main()
