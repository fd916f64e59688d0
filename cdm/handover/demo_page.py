"""The page of `cdm demo`, in gradio: it asks nothing of the network, and is served to this machine alone."""

from __future__ import annotations

import importlib.util
import os
import random
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cdm.errors import CdmError

if TYPE_CHECKING:
    from cdm.handover.demo import Demo, Shot

HOST = "127.0.0.1"
MOST_STEPS = 16
MOST_SEED = 2**31 - 1
PLACEHOLDER = "What to draw"
CSS = "img { image-rendering: pixelated; } footer { display: none !important; }"


def check(port: int) -> None:
    """Raises CdmError if gradio is not installed, or the port may not be had: before any model is loaded."""
    if importlib.util.find_spec("gradio") is None:
        raise CdmError("cdm demo needs gradio: pip install -c constraints.txt -e '.[demo]'")
    with socket.socket() as wanted:
        wanted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            wanted.bind((HOST, port))
        except OSError as error:
            raise CdmError(f"--port is {port}: {error.strerror}: give another one") from None


def serve(demo: Demo, port: int) -> None:
    """Serve the page until Ctrl-C."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    page = build(demo)
    page.launch(
        server_name=HOST,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    print(f"http://{HOST}:{port}: the page, until Ctrl-C", flush=True)
    page.block_thread()


def build(demo: Demo) -> Any:
    """The page, a gradio.Blocks."""
    import gradio as gr

    from cdm.handover.demo import as_image, caption, introduction

    def shown(shot: Shot, name: str) -> list[Any]:
        return [caption(name, shot), as_image(shot.picture)]

    def draw(prompt: str, steps: float, seed: float | None) -> Iterator[list[Any]]:
        """The student's picture as soon as it is there, then the teacher's."""
        try:
            student = shown(demo.by_student(prompt, int(steps), int(seed or 0)), "Student")
            if demo.teacher is None:
                yield student
                return
            yield [*student, "**Teacher** · drawing …", gr.skip()]
            teacher = demo.by_teacher(prompt, int(seed or 0))
            assert teacher is not None, "there is one"
            yield [*student, *shown(teacher, "Teacher")]
        except CdmError as error:
            raise gr.Error(str(error)) from None

    def picture() -> Any:
        return gr.Image(format="png", interactive=False, show_label=False, buttons=["download", "fullscreen"])

    with gr.Blocks(title=f"CDM: {demo.name}", analytics_enabled=False) as page:
        gr.Markdown(f"# {demo.name}\n{introduction(demo)}")
        first = demo.examples[0] if demo.examples else ""
        prompt = gr.Textbox(first, label="Prompt", placeholder=PLACEHOLDER, lines=1)
        if demo.examples:
            examples = gr.Dataset(
                label="Prompts to try", components=[prompt], samples=[[text] for text in demo.examples]
            )
        with gr.Row(equal_height=True):
            steps = gr.Slider(1, MOST_STEPS, 4, step=1, label="Steps of the student", scale=3)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED, scale=1)
            another = gr.Button("Another seed", scale=1)
            go = gr.Button("Draw", variant="primary", scale=1)
        outputs = []
        with gr.Row():
            for _ in range(1 if demo.teacher is None else 2):
                with gr.Column():
                    outputs += [gr.Markdown(), picture()]
        request: dict[str, Any] = {
            "fn": draw,
            "inputs": [prompt, steps, seed],
            "outputs": outputs,
            "concurrency_id": "draw",
            "concurrency_limit": 1,
        }
        hidden: dict[str, Any] = {"api_visibility": "private"}
        go.click(**request, api_name="draw")
        gr.on([prompt.submit, seed.submit, steps.release], **request, **hidden)
        another.click(lambda: random.randrange(MOST_SEED), None, seed, **hidden).then(**request, **hidden)
        if demo.examples:
            examples.click(lambda sample: sample[0], examples, prompt, **hidden).then(**request, **hidden)
            page.load(**request, **hidden)
    return page
