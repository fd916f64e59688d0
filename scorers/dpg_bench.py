"""DPG-Bench (Hu et al. 2024): the share of questions about a long prompt that mPLUG answers with yes.

Install: git clone https://github.com/TencentQQGYLab/ELLA /src/ELLA && python3.10 -m venv /envs/ella &&
/envs/ella/bin/pip install -r /src/ELLA/requirements.txt

The prompts have to be DPG-Bench's own (the folder `dpg_bench/prompts`). Follows the repository's documented script; it
has not been run with this project.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from PIL import Image
from protocol import Answer, parser, serve


def main() -> None:
    """Score each image, one after the other of each prompt."""
    options = parser(__doc__)
    options.add_argument("--ella", type=Path, required=True, help="clone of the repository")
    arguments = options.parse_args()
    bench = arguments.ella / "dpg_bench"
    items = {path.read_text(encoding="utf-8").strip(): path.stem for path in (bench / "prompts").glob("*.txt")}

    def score(images: list[dict[str, Any]], folder: Path) -> Answer:
        unknown = [each["prompt"] for each in images if each["prompt"] not in items]
        if unknown:
            raise SystemExit(f"{len(unknown)} prompts are not DPG-Bench's, such as {unknown[0]!r}")
        # The script takes one picture an item: the j-th samples of all prompts make a round.
        rounds: list[list[dict[str, Any]]] = []
        seen: dict[str, int] = {}
        for each in images:
            number = seen[each["prompt"]] = seen.get(each["prompt"], -1) + 1
            rounds += [[]] * (number == len(rounds))
            rounds[number] = [*rounds[number], each]
        with Image.open(images[0]["path"]) as first:
            side = first.width
        values: dict[int, float] = {}
        for number, chosen in enumerate(rounds):
            values |= _run(bench, folder / f"round{number}", chosen, items, side)
        return {"scores": {"score": [values[each["id"]] for each in images]}}

    serve(arguments, score)


def _run(
    bench: Path, folder: Path, images: list[dict[str, Any]], items: dict[str, str], side: int
) -> dict[int, float]:
    """Scores (0 to 100) by id of pictures of different prompts."""
    pictures, results = folder / "pictures", folder / "results.txt"
    pictures.mkdir(parents=True)
    ids = {}
    for each in images:
        item = items[each["prompt"]]
        ids[item] = each["id"]
        (pictures / f"{item}.png").symlink_to(each["path"])
    options = {"--image-root-path": pictures, "--csv": bench / "dpg_bench.csv", "--res-path": results}
    command = ["accelerate", "launch", "--num_processes", "1", bench / "compute_dpg_bench.py"]
    command += [part for pair in options.items() for part in pair]
    subprocess.run([*command, "--resolution", str(side), "--pic-num", "1"], check=True)
    found = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        path, *numbers = line.split(", ")
        if path.endswith(".png") and numbers:
            found[ids[Path(path).stem]] = 100 * float(numbers[-1])
    return found


if __name__ == "__main__":
    main()
