"""Text in pictures: how much of the words that a prompt quotes can be read in its picture.

Install: python3.11 -m venv /envs/ocr && /envs/ocr/bin/pip install rapidocr-onnxruntime==1.4.4

PP-OCRv4 for Latin letters and Chinese; its models come with it, and it needs no GPU. It has been run on pictures of
printed text, and not on a model's.

Words are what stands between double quotes, typographic ones, or single quotes around whole words. Letters and digits
are compared, without case, spaces and punctuation, the texts of a prompt one after the other in the order of reading:

score    1 - edit distance / length of the longer text, as AnyText has it (Tuo et al. 2024): 1 where all is right
correct  1 where each quoted text is found whole, whatever else can be read

A list in which some prompts quote nothing gets means over the others, which have no interval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from protocol import Answer, parser, serve

QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|\u2018([^\u2019]+)\u2019|(?<!\w)'([^']+)'(?!\w)")


def quoted(prompt: str) -> list[str]:
    """The texts that a prompt quotes and that have a letter or a digit, as `plain` has them."""
    texts = ["".join(match.groups(default="")) for match in QUOTED.finditer(prompt)]
    return [text for text in map(plain, texts) if text]


def plain(text: str) -> str:
    """Letters and digits without case."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def edit_distance(a: str, b: str) -> int:
    """Letters to insert, remove or replace that make one text the other (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def accuracy(wanted: Sequence[str], read: str) -> tuple[float, float]:
    """`score` and `correct` of what was read in a picture."""
    whole, found = "".join(wanted), plain(read)
    score = 1 - edit_distance(whole, found) / max(len(whole), len(found))
    return score, float(all(text in found for text in wanted))


def answer(images: Sequence[dict[str, Any]], read: Callable[[str], str]) -> Answer:
    """The answer to a request; `read` gives the text in the picture at a path."""
    wanted = [quoted(each["prompt"]) for each in images]
    if not any(wanted):
        raise SystemExit('no prompt quotes a text that a picture should show, such as: a sign that says "open"')
    found = [accuracy(texts, read(images[i]["path"])) for i, texts in enumerate(wanted) if texts]
    scores = {"score": [score for score, _ in found], "correct": [correct for _, correct in found]}
    if all(wanted):
        return {"scores": scores}
    return {"summary": {name: sum(values) / len(values) for name, values in scores.items()}}


def main() -> None:
    """Read the text in each picture whose prompt quotes some."""
    options = parser(__doc__)
    options.add_argument("--threshold", type=float, default=0.5, help="least confidence of a line of text")
    arguments = options.parse_args()
    from rapidocr_onnxruntime import RapidOCR

    engine = RapidOCR(text_score=arguments.threshold)

    def read(path: str) -> str:
        lines, _ = engine(path)
        return " ".join(text for _, text, _ in lines or [])

    def score(images: list[dict[str, Any]], _folder: Path) -> Answer:
        return answer(images, read)

    serve(arguments, score)


if __name__ == "__main__":
    main()
