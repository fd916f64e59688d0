"""ImageReward (Xu et al. 2023), a preference score from BLIP.

Install: python3.10 -m venv /envs/image-reward && /envs/image-reward/bin/pip install image-reward "transformers<5" ftfy
git+https://github.com/openai/CLIP.git

Follows the package's documented interface; it has not been run with this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol import Answer, parser, serve


def main() -> None:
    """Score each image against its prompt."""
    options = parser(__doc__)
    options.add_argument("--model", default="ImageReward-v1.0", help="a name, or the path of the weights")
    arguments = options.parse_args()
    import ImageReward
    import torch

    model = ImageReward.load(arguments.model)

    def score(images: list[dict[str, Any]], _folder: Path) -> Answer:
        with torch.no_grad():
            values = [float(model.score(each["prompt"], each["path"])) for each in images]
        return {"scores": {"score": values}}

    serve(arguments, score)


if __name__ == "__main__":
    main()
