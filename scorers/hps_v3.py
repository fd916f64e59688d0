"""HPSv3 (Ma et al. 2025), a preference score from Qwen2-VL; needs one GPU of 24 GB.

Install: python3.10 -m venv /envs/hpsv3 && /envs/hpsv3/bin/pip install hpsv3

Follows the package's documented interface; it has not been run with this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol import Answer, in_batches, parser, serve


def main() -> None:
    """Score each image with the mean of the predicted preference."""
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--device", default="cuda")
    arguments = options.parse_args()
    from hpsv3 import HPSv3RewardInferencer

    inferencer = HPSv3RewardInferencer(device=arguments.device)

    def score(images: list[dict[str, Any]], _folder: Path) -> Answer:
        values: list[float] = []
        for batch in in_batches(images, arguments.batch):
            rewards = inferencer.reward(
                prompts=[each["prompt"] for each in batch], image_paths=[each["path"] for each in batch]
            )
            values += [float(reward[0]) for reward in rewards]  # mean and deviation of a normal distribution
        return {"scores": {"score": values}}

    serve(arguments, score)


if __name__ == "__main__":
    main()
