"""Stage `real`: the prompt lists, and held-out real pictures of the evaluation prompts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from miniature.common import load_params
from miniature.world import combinations, load_glyphs, render


def main(folder: Path = Path("miniature/data")) -> None:
    seed, params = load_params("real")
    generator = torch.Generator().manual_seed(seed)
    _, held_out = load_glyphs()
    train = [c for c in combinations() if not c.is_eval]
    evaluation = [c for c in combinations() if c.is_eval]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("".join(c.prompt + "\n" for c in train))
    (folder / "eval.txt").write_text("".join(c.prompt + "\n" for c in evaluation))

    which, attributes = [], []
    for combination in evaluation:
        of_digit = torch.nonzero(held_out.digit == combination.digit)[:, 0]
        order = torch.randperm(len(of_digit), generator=generator)[: params["per_prompt"]]
        which.append(of_digit[order])
        row = torch.tensor([combination.digit, combination.ink, combination.paper])
        attributes.append(row.expand(params["per_prompt"], 3))
    images = render(held_out, torch.cat(which), torch.cat(attributes), params["scale"], generator)
    prompts = [c.prompt for c in evaluation for _ in range(params["per_prompt"])]
    save_file(
        {"images": (images * 255).round().to(torch.uint8)},
        folder / "real.safetensors",
        metadata={"prompts": json.dumps(prompts)},
    )


if __name__ == "__main__":
    main()
