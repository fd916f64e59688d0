"""Stage `vae`: a small AutoencoderKL, 32x32 pixels to 8x8 latents of 4 channels."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from miniature.common import load_params, optimiser, progress
from miniature.world import SIZE, Glyphs, draw_combinations, load_glyphs, render


def main(folder: Path = Path("miniature/vae"), metrics: Path = Path("miniature/vae.json")) -> None:
    seed, params = load_params("vae")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 2)
    train, held_out = load_glyphs()

    def draw(glyphs: Glyphs, count: int) -> torch.Tensor:
        return render(glyphs, *draw_combinations(glyphs, count, generator), params["scale"], generator)

    blocks = 3
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    adamw, schedule = optimiser(vae.parameters(), params["lr"], params["iterations"])
    for _ in progress(params["iterations"], "vae"):
        images = draw(train, params["batch_size"]) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        kl_a_dimension = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.mse_loss(decoded, images) + 0.3 * F.l1_loss(decoded, images) + 5e-4 * kl_a_dimension
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adamw.step()
        schedule.step()

    vae.eval()
    images = draw(held_out, 1000) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        squared_error = F.mse_loss(vae.decode(latents).sample.clamp(-1, 1), images)
    # As in SD3, the transformer sees (latents - shift_factor) * scaling_factor: mean 0, deviation 1.
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder)
    psnr = 10 * torch.log10(4 / squared_error).item()
    metrics.write_text(json.dumps({"held_out_psnr_db": round(psnr, 2)}, indent=2) + "\n")
    print(f"held-out PSNR {psnr:.2f} dB")


if __name__ == "__main__":
    main()
