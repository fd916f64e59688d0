"""GenEval (Ghosh et al. 2023): whether a detector finds the objects, counts, colours and positions of the prompt.

Install: git clone https://github.com/djghosh13/geneval /src/geneval && cd /src/geneval && conda env create -p
/envs/geneval -f environment.yml && conda run -p /envs/geneval mim install mmdet==2.27.0 &&
./evaluation/download_models.sh weights/

The prompts have to be GenEval's own (`evaluation_metadata.jsonl`). Follows the repository's documented scripts; it has
not been run with this project.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from protocol import Answer, parser, serve


def main() -> None:
    """Score each image with 1 where everything is right; the summary is the mean of the tasks' means."""
    options = parser(__doc__)
    options.add_argument("--geneval", type=Path, required=True, help="clone of the repository")
    options.add_argument("--model-path", type=Path, required=True, help="folder of the detector's weights")
    arguments = options.parse_args()
    lines = (arguments.geneval / "prompts/evaluation_metadata.jsonl").read_text(encoding="utf-8").splitlines()
    metadata = {entry["prompt"]: entry for entry in map(json.loads, lines)}

    def score(images: list[dict[str, Any]], folder: Path) -> Answer:
        tree, results = folder / "geneval", folder / "results.jsonl"
        prompts = list(dict.fromkeys(each["prompt"] for each in images))
        unknown = [prompt for prompt in prompts if prompt not in metadata]
        if unknown:
            raise SystemExit(f"{len(unknown)} prompts are not GenEval's, such as {unknown[0]!r}")
        for each in images:
            place = tree / f"{prompts.index(each['prompt']):05d}"
            (place / "samples").mkdir(parents=True, exist_ok=True)
            (place / "metadata.jsonl").write_text(json.dumps(metadata[each["prompt"]]), encoding="utf-8")
            (place / "samples" / f"{each['id']:06d}.png").symlink_to(each["path"])
        script = arguments.geneval / "evaluation/evaluate_images.py"
        subprocess.run(
            [sys.executable, script, tree, "--outfile", results, "--model-path", arguments.model_path],
            check=True,
        )
        rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        right = {int(Path(row["filename"]).stem): float(row["correct"]) for row in rows}
        tasks: dict[str, list[float]] = {}
        for row in rows:
            tasks.setdefault(row["tag"], []).append(float(row["correct"]))
        means = {tag: sum(values) / len(values) for tag, values in sorted(tasks.items())}
        return {
            "scores": {"correct": [right[each["id"]] for each in images]},
            "summary": {"overall": sum(means.values()) / len(means), **means},
        }

    serve(arguments, score)


if __name__ == "__main__":
    main()
