"""VQAScore (Lin et al. 2024): how likely a model answers "yes" when asked whether the picture shows the prompt.

Install: python3.10 -m venv /envs/t2v && /envs/t2v/bin/pip install t2v-metrics git+https://github.com/openai/CLIP.git

The model clip-flant5-xxl needs a GPU of 40 GB, clip-flant5-xl less. Follows the package's documented interface; it has
not been run with this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol import Answer, parser, serve


def main() -> None:
    """Score each image against its prompt."""
    options = parser(__doc__)
    options.add_argument("--model", default="clip-flant5-xxl")
    options.add_argument("--batch", type=int, default=16)
    arguments = options.parse_args()
    import t2v_metrics

    model = t2v_metrics.VQAScore(model=arguments.model)

    def score(images: list[dict[str, Any]], _folder: Path) -> Answer:
        pairs = [{"images": [each["path"]], "texts": [each["prompt"]]} for each in images]
        values = model.batch_forward(dataset=pairs, batch_size=arguments.batch)  # (images, 1, 1)
        return {"scores": {"score": [float(value) for value in values.flatten()]}}

    serve(arguments, score)


if __name__ == "__main__":
    main()
