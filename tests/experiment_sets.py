"""A Git repository with experiments as DVC keeps them, and results that are made up."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdm.experiments.headline import as_csv, make_headline

STEPS = (1, 4)
NOISE = (-0.03, -0.01, 0.01, 0.03, -0.02, 0.02, 0.0, 0.0)
"""Deviations of replicates, one a block of samples: their interval reaches 0.047 to either side."""
BASIS: dict[str, Any] = {
    "student": "s", "teacher": "t", "guidance_scale": 2.0, "prompts": "p", "per_prompt": 8, "seed": 0,
    "judge": "j", "real": "r", "models": {},
}  # fmt: skip
PARAMS = """\
seed: 0
schedule:
  max_len: 6
  sigmas: [1.0, 0.5]
distill:
  losses:
    ca:
      scale: 0.75
    cdm:
      weight: 0.25
"""


def quality(
    distance: float = 1.0, wobble: float = 0.0, basis: Mapping[str, Any] = BASIS, **figures: float
) -> dict[str, Any]:
    """What metrics/quality.json holds. `wobble` is how far the replicates are from those of another call."""

    def row(model: str, steps: int) -> dict[str, float]:
        scale = 1 if model == "student" else 2
        return {
            "evaluations": steps * scale, "frechet_distance": distance * scale / steps, "style_distance": 3.0,
            "attribute_accuracy": 0.9, "precision": 0.7, "recall": 0.8, "diversity": 5.0, "count": 64, **figures,
        }  # fmt: skip

    sets = {"student": STEPS, "teacher": (4, 50)}
    rows = {model: {f"steps{steps}": row(model, steps) for steps in each} for model, each in sets.items()}
    replicates = {
        model: {
            key: {
                name: [each[name] + deviation + wobble * (-1) ** i for i, deviation in enumerate(NOISE)]
                for name in ("frechet_distance", "style_distance", "attribute_accuracy")
            }
            for key, each in found.items()
        }
        for model, found in rows.items()
    }
    return {**rows, "real": {}, "replicates": {"noise": replicates}, "basis": dict(basis)}


class Project:
    """The files of a pipeline in Git; every method commits."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, 0
        self.git("init", "--quiet", "--initial-branch=main")
        for name, value in (("name", "test"), ("email", "test@example.org")):
            self.git("config", f"user.{name}", value)

    def git(self, *arguments: str) -> str:
        self.seconds += 1  # a commit is later than the one before
        date = {"GIT_COMMITTER_DATE": f"@{1_700_000_000 + self.seconds} +0000"}
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.folder,
            env=os.environ | date,
            check=True,
            text=True,
            capture_output=True,
        )
        return done.stdout.strip()

    def write(self, figures: Mapping[str, Any] | None = None, params: str = PARAMS, code: str = "1") -> None:
        """The params file, the lock and the results, uncommitted."""
        deps = [{"path": "cdm/losses.py", "md5": code}, {"path": "data/latents", "md5": f"{code}.dir"}]
        (self.folder / "params.yaml").write_text(params)
        (self.folder / "dvc.lock").write_text(json.dumps({"stages": {"distill": {"deps": deps}}}))
        if figures is not None:
            (self.folder / "metrics").mkdir(exist_ok=True)
            (self.folder / "metrics/quality.json").write_text(json.dumps(figures))
            headline = make_headline(figures, seconds=1234, forwards=835_200)
            (self.folder / "metrics/headline.json").write_text(json.dumps(headline))
            (self.folder / "metrics/quality.csv").write_text(as_csv(figures))

    def commit(self, *arguments: Any, **keywords: Any) -> str:
        """A commit of what `write` writes."""
        self.write(*arguments, **keywords)
        self.git("add", ".")
        self.git("commit", "--quiet", "--allow-empty", "--message", "results")
        return self.git("rev-parse", "HEAD")

    def experiment(self, name: str, *arguments: Any, **keywords: Any) -> str:
        """The same as an experiment of the current commit, as DVC keeps it; the commit and the files stay."""
        head = self.git("rev-parse", "HEAD")
        made = self.commit(*arguments, **keywords)
        self.git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", made)
        self.git("reset", "--quiet", "--hard", head)
        return made
