"""The pictures of docs/pictures, made anew of the results at hand: `python -m tests.pictures`, after `dvc repro`.

It needs Chromium and gradio (`pip install -c constraints.txt -e '.[slow]'`).
"""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.chromium import Browser


def write(path: Path, screenshot: bytes) -> None:
    """Write a screenshot as a PNG without transparency."""
    with Image.open(io.BytesIO(screenshot)) as image:
        image.convert("RGB").save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def report(page: Path, out: Path) -> None:
    """The report on a wide screen, and its pictures on a phone."""
    with Browser(1280, 1100) as browser:
        browser.open(page.absolute().as_uri())
        browser.wait("!document.getElementById('compare').hidden")
        write(out / "report.png", browser.picture())
        browser.resize(400, 1100)
        browser.run("document.getElementById('compare').scrollIntoView()")
        write(out / "report-narrow.png", browser.picture())


def demo(student: str, out: Path) -> None:
    """The page of `cdm demo` with the first example drawn."""
    with served(student) as address, Browser(1060, 900) as browser:
        browser.open(address)
        browser.wait("document.body.innerText.includes('100 evaluations of the network')")
        browser.wait(
            "[...document.images].length >= 2 && [...document.images].every((image) => image.complete)"
        )
        write(out / "demo.png", browser.picture())


@contextmanager
def served(student: str, folder: Path = Path()) -> Iterator[str]:
    """The address of `cdm demo`, run in `folder`, once its page is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cdm.cli", "demo", student, "--port", str(port)]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line == f"http://127.0.0.1:{port}: the page, until Ctrl-C\n":
                break
        else:
            raise AssertionError("".join(said))
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/pictures")
    folder.mkdir(parents=True, exist_ok=True)
    report(Path("report/index.html"), folder)
    demo("models/student", folder)
