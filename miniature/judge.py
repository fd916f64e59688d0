"""Stage `judge`: a classifier of digit, ink and paper, trained on real pictures."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from cdm.evaluation.judge import Judge, JudgeConfig
from miniature.common import load_params, optimiser, progress
from miniature.world import ATTRIBUTES, draw_combinations, load_glyphs, render


def main(folder: Path = Path("miniature/judge"), metrics: Path = Path("miniature/judge.json")) -> None:
    seed, params = load_params("judge")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    train, held_out = load_glyphs()
    judge = Judge(JudgeConfig({name: list(values) for name, values in ATTRIBUTES.items()}))
    adamw, schedule = optimiser(judge.parameters(), params["lr"], params["iterations"])
    for _ in progress(params["iterations"], "judge"):
        which, attributes = draw_combinations(train, params["batch_size"], generator)
        logits = judge(render(train, which, attributes, params["scale"], generator)).logits
        losses = [F.cross_entropy(logits[name], attributes[:, i]) for i, name in enumerate(ATTRIBUTES)]
        adamw.zero_grad()
        torch.stack(losses).sum().backward()
        adamw.step()
        schedule.step()

    judge.eval()
    which, attributes = draw_combinations(held_out, 4000, generator)
    with torch.no_grad():
        logits = judge(render(held_out, which, attributes, params["scale"], generator)).logits
    right = torch.stack([logits[name].argmax(1) == attributes[:, i] for i, name in enumerate(ATTRIBUTES)])
    accuracy = {name: round(right[i].float().mean().item(), 4) for i, name in enumerate(ATTRIBUTES)}
    accuracy["all"] = round(right.all(0).float().mean().item(), 4)
    judge.save(folder)
    metrics.write_text(json.dumps({"held_out_accuracy": accuracy}, indent=2) + "\n")
    print(accuracy)


if __name__ == "__main__":
    main()
