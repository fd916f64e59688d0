"""The table of what commands refuse, and what they say: see `tests/refusals.py`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.refusals import Case, full_disk, unprivileged
from tests.refusals_world import PARAMS, ROOT, STUDENT, as_yaml, changed

Break = Callable[[Path], object]

INF, NAN = float("inf"), float("nan")
CHECK = ("cdm", "params", "check", "params.yaml")
DEEP = "[" * 5000 + "]" * 5000
DIGITS = "1" * 5000


# What is broken.


def all_of(*breaks: Break) -> Break:
    def prepare(folder: Path) -> None:
        for each in breaks:
            each(folder)

    return prepare


def remove(path: str) -> Break:
    def prepare(folder: Path) -> None:
        target = folder / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink()

    return prepare


def write(path: str, content: str | bytes) -> Break:
    """A file, in the place of whatever is there."""

    def prepare(folder: Path) -> None:
        target = folder / path
        if target.exists() or target.is_symlink():
            remove(path)(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def value(path: str, content: Any) -> Break:
    """A JSON file."""
    return write(path, json.dumps(content))


def edit(path: str, change: Callable[[Any], Any]) -> Break:
    """A JSON file whose value becomes another."""

    def prepare(folder: Path) -> None:
        found = json.loads((folder / path).read_text())
        value(path, change(found))(folder)

    return prepare


def with_key(path: str, key: str, content: Any) -> Break:
    """A JSON file with one value changed, by dotted key."""

    def change(found: Any) -> Any:
        inside = found
        *parents, last = key.split(".")
        for part in parents:
            inside = inside[part]
        inside[last] = content
        return found

    return edit(path, change)


def params(**changes: Any) -> Break:
    """The params file with some values changed; `__` stands for a dot."""
    return write(
        "params.yaml", as_yaml(changed({key.replace("__", "."): each for key, each in changes.items()}))
    )


def setting(key: str, content: Any) -> Break:
    return write("params.yaml", as_yaml(changed({key: content})))


def folder(path: str) -> Break:
    """An empty folder, in the place of whatever is there."""

    def prepare(inside: Path) -> None:
        write(path, b"")(inside)
        (inside / path).unlink()
        (inside / path).mkdir()

    return prepare


def link(path: str, target: str) -> Break:
    def prepare(inside: Path) -> None:
        write(path, b"")(inside)
        (inside / path).unlink()
        (inside / path).symlink_to(target)

    return prepare


def mode(path: str, bits: int) -> Break:
    return lambda inside: (inside / path).chmod(bits)


def cut(path: str, share: float = 0.5) -> Break:
    """A file whose end is missing."""

    def prepare(inside: Path) -> None:
        content = (inside / path).read_bytes()
        write(path, content[: int(len(content) * share)])(inside)

    return prepare


def own(path: str) -> Break:
    """A copy of what a link leads to, so that it can be broken."""

    def prepare(inside: Path) -> None:
        target = (inside / path).resolve()
        (inside / path).unlink()
        if target.is_dir():
            shutil.copytree(target, inside / path)
        else:
            shutil.copy(target, inside / path)

    return prepare


def tensors(path: str, change: Callable[[dict[str, Any]], Any]) -> Break:
    """A safetensors file whose tensors become others."""

    def prepare(inside: Path) -> None:
        found = load_file(inside / path)
        found = change(found) or found
        (inside / path).unlink()
        save_file(found, inside / path)

    return prepare


def without_first(found: dict[str, Any]) -> dict[str, Any]:
    """The tensors but for the first."""
    return {name: found[name] for name in sorted(found)[1:]}


def other_prompts(inside: Path) -> None:
    """Real pictures that show something else."""
    images = load_file(inside / "real.safetensors")["images"]
    (inside / "real.safetensors").unlink()
    metadata = {"prompts": json.dumps(["something else"] * len(images))}
    save_file({"images": images}, inside / "real.safetensors", metadata=metadata)


def git(*commands: str) -> Break:
    """A Git repository, and commands in it."""

    def prepare(inside: Path) -> None:
        named = {
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@t",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@t",
        }
        environment = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")} | named
        for command in ("init -q -b main", *commands):
            subprocess.run(
                ["git", *shlex.split(command)], cwd=inside, env=environment, check=True, capture_output=True
            )

    return prepare


COMMITTED = git("add params.yaml dvc.yaml metrics logs/distill.csv recipes", "commit -q -m one")


# Params files: what is no params file at all.


def params_file(name: str, content: str | bytes, says: str, **more: Any) -> Case:
    return Case(f"params file, {name}", CHECK, says, write("params.yaml", content), **more)


def text(**changes: Any) -> str:
    return as_yaml(changed({key.replace("__", "."): each for key, each in changes.items()}))


GOOD = as_yaml(PARAMS)
FILES = [
    Case("params file, missing", CHECK, "params.yaml: cannot be read: No such file", remove("params.yaml")),
    Case("params file, a folder", CHECK, "params.yaml: cannot be read: Is a directory", folder("params.yaml")),
    Case(
        "params file, a link in a circle",
        CHECK,
        "params.yaml: cannot be read",
        link("params.yaml", "params.yaml"),
    ),
    Case("params file, endless", CHECK, "larger than 32,768 bytes", link("params.yaml", "/dev/zero")),
    Case(
        "params file, a name too long",
        ("cdm", "params", "check", "x" * 5000),
        "cannot be read: File name too long",
    ),
    Case(
        "params file, not to be read",
        CHECK,
        "params.yaml: cannot be read: Permission denied",
        mode("params.yaml", 0o000),
        within=unprivileged,
    ),
    params_file("empty", "", "the file: "),
    params_file("a comment alone", "# nothing\n", "the file: "),
    params_file(
        "not UTF-8", b"# \xe9\n" + GOOD.encode(), "params.yaml: not UTF-8 text (byte 2): save it as UTF-8"
    ),
    params_file("UTF-16", GOOD.encode("utf-16"), "params.yaml: not UTF-8 text"),
    params_file("UTF-16 without a mark", GOOD.encode("utf-16-le"), "params.yaml: not valid YAML"),
    params_file("binary", bytes(range(256)) * 8, "params.yaml: not UTF-8 text"),
    params_file("a picture", (ROOT / "docs/overview.png").read_bytes()[:4000], "params.yaml: not UTF-8 text"),
    params_file("nested brackets", f"seed: {DEEP}", "params.yaml: not valid YAML: nested too deeply"),
    params_file(
        "nested maps", "{a: " * 5000 + "1" + "}" * 5000, "params.yaml: not valid YAML: nested too deeply"
    ),
    params_file("nested by indentation", "".join(" " * i + "a:\n" for i in range(250)), "unknown key", lines=0),
    params_file(
        "a key twice", GOOD.replace('"seed": 0', '"seed": 0, "seed": 1'), "params.yaml: not valid YAML"
    ),
    params_file(
        "a section twice", GOOD.replace('"seed": 0', '"seed": 0, "latents": {}'), "params.yaml: not valid YAML"
    ),
    params_file("5,000 digits", GOOD.replace('"seed": 0', f'"seed": {DIGITS}'), "params.yaml: not valid YAML"),
    params_file("5,000 hexadecimal digits", GOOD.replace('"seed": 0', f'"seed": 0x{DIGITS}'), "seed: "),
    params_file("4,000 digits", GOOD.replace('"seed": 0', f'"seed": {DIGITS[:4000]}'), "seed: "),
    params_file("a fraction of 5,000 digits", GOOD.replace('"seed": 0', f'"seed": {DIGITS}.5'), "seed: "),
    params_file("300,000 numbers", text(schedule__sigmas=[1.0] * 300_000), "larger than 32,768 bytes"),
    params_file("1,100 numbers", text(schedule__sigmas=[1.0] * 1100).replace("\n", ""), "at most 1,000"),
    params_file(
        "900 numbers", text(schedule__sigmas=[1.0] * 900), "schedule: sigmas must fall from 1.0, not [1.0, "
    ),
    params_file("a long text", text(teacher__source="x" * 20_000), "teacher.source"),
    params_file("an object of Python", "!!python/object:os.system {}", "params.yaml: not valid YAML"),
    params_file("two documents", f"{GOOD}\n---\n{GOOD}", "params.yaml: not valid YAML"),
    params_file(
        "a date that is none", GOOD.replace('"seed": 0', '"seed": 2020-99-99'), "params.yaml: not valid YAML"
    ),
    params_file("a date", GOOD.replace('"seed": 0', '"seed": 2020-01-01'), "seed: "),
    params_file("a tab", "seed: 0\n\tteacher:", "params.yaml: not valid YAML"),
    params_file("unfinished", GOOD[:100], "params.yaml: not valid YAML"),
    params_file("an alias of nothing", "seed: *other", "params.yaml: not valid YAML"),
    params_file("an alias of itself", "&a [*a, *a]", "the file: "),
    params_file(
        "aliases of aliases",
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9))
        + "seed: *j\n",
        "seed: ",
        lines=0,
    ),
    params_file("a list as a key", "? [a, b]\n: 1\n", "params.yaml: ", lines=0),
    params_file("a mapping as a key", "? {a: b}\n: 1\n", "params.yaml: ", lines=0),
    params_file("a number alone", "3", "the file: "),
    params_file("a list", "[1, 2]", "the file: "),
    params_file("a text", "params", "the file: "),
    params_file("merging a number", "<<: 3\nseed: 0\n", "params.yaml: ", lines=0),
    params_file("a tagged integer", "seed: !!int x\n", "params.yaml: not valid YAML"),
    params_file("a tagged fraction", "seed: !!float x\n", "params.yaml: not valid YAML"),
    params_file("binary by tag", "seed: !!binary x\n", "params.yaml: ", lines=0),
    params_file("a set", "seed: !!set {a, b}\n", "params.yaml: ", lines=0),
    params_file("a zero byte", GOOD + "\0", "params.yaml: not valid YAML"),
    params_file("a number as a key", GOOD.replace('"seed": 0', '"seed": 0, 7: 1'), "params.yaml: "),
    params_file(
        "a thousand unknown keys", text(**{f"key{i}": i for i in range(1000)}), "more problems", lines=21
    ),
    params_file("a key of two lines", text(**{"a\nb": 1}), "a b: unknown key"),
    params_file("JSON that ends early", GOOD[:-1], "params.yaml: not valid YAML"),
    params_file(
        "Windows paths", text().replace('"source": "teacher"', '"source": "C:\\teacher"'), "teacher.source: "
    ),
]


# Values.

VALUES = [
    ("seed", 2**63, "less than or equal to"),
    ("seed", 1e300, "seed: "),
    ("seed", True, "expected a number, not true"),
    ("seed", "a", "integer"),
    ("teacher.source", "a\nb", "printable characters on one line, not 'a\\nb'"),
    ("teacher.source", "\ud800", "valid string"),
    ("teacher.source", "te\0acher", "printable characters on one line"),
    ("teacher.source", "", "teacher.source: "),
    ("teacher.source", "x" * 5000, "teacher.source: "),
    ("teacher.family", "../sd3", "unknown family"),
    ("teacher.family", "__init__", "unknown family"),
    ("teacher.guidance_scale", INF, "finite number"),
    ("teacher.guidance_scale", NAN, "finite number"),
    ("teacher.guidance_scale", 1e12, "less than or equal to 1000"),
    ("teacher.resolution", 1e9, "less than or equal to 16384"),
    ("prompts.train", ["lists/train.txt"] * 500 + ["nothing.txt"], "no such file"),
    ("prompts.train", ["\ud800.txt"], "valid string"),
    ("prompts.train", ["x" * 5000], "prompts.train: x"),
    ("prompts.train", ["/dev/zero"], "prompts.train: /dev/zero: no such file"),
    ("prompts.eval_count", 1e12, "less than or equal to"),
    ("prompts.max_sequence_length", 1e9, "less than or equal to"),
    ("latents.steps", 1e9, "latents.steps: input should be less than or equal to 1000, not 1000000000.0"),
    ("latents.per_prompt", 1e9, "less than or equal to"),
    ("latents.train_pairs", 1e12, "less than or equal to"),
    ("schedule.max_len", 1e9, "less than or equal to 1000"),
    ("schedule.sigma_min", NAN, "finite number"),
    ("schedule.sigmas", [NAN], "finite number"),
    ("distill.iterations", 1e12, "less than or equal to"),
    ("distill.iterations", True, "expected a number, not true"),
    ("distill.batch_size", 1e12, "less than or equal to"),
    ("distill.student_every", 1e18, "less than or equal to"),
    ("distill.losses.ca.weight", INF, "finite number"),
    ("distill.losses.ca.scale", INF, "finite number"),
    ("distill.losses.ca.fade", INF, "finite number"),
    ("distill.losses.dm.weight", NAN, "finite number"),
    ("distill.losses.dm.weight", 1e30, "less than or equal to"),
    ("distill.losses.min_norm", INF, "finite number"),
    ("distill.losses.consistency", {"warmup": 1e12}, "less than or equal to"),
    ("distill.student.lr", INF, "finite number"),
    ("distill.student.lr", 1e6, "less than or equal to 1"),
    ("distill.student.betas", [1, 1], "less than 1"),
    ("distill.student.betas", [0.9, 0.99, 0.999], "at most 2"),
    ("distill.student.clip", INF, "finite number"),
    ("distill.student.weight_decay", INF, "finite number"),
    ("distill.student.eps", INF, "finite number"),
    ("distill.lora", {"rank": 1e9, "alpha": 1.0}, "less than or equal to"),
    ("distill.lora", {"rank": 4, "alpha": INF}, "finite number"),
    ("distill.probe", {"samples": 1e12}, "less than or equal to"),
    ("sample.steps", [1e9], "less than or equal to 1000"),
    ("sample.steps", list(range(1, 1002)), "at most 1,000"),
    ("sample.pictures", 1e9, "less than or equal to"),
    ("evaluate.neighbours", 1e9, "less than or equal to"),
    ("evaluate.resamples", 1e9, "less than or equal to"),
    ("evaluate.metrics", ["fid\nx"], "printable characters on one line"),
    ("runtime.threads", 1e12, "less than or equal to"),
    ("runtime.batch_size", 1e12, "less than or equal to"),
    ("runtime.micro_batch", 1e12, "less than or equal to"),
    ("runtime.device", "gpu", "runtime.device: "),
    ("runtime.device", "cuda:x", "runtime.device: "),
    ("runtime.checkpoint_every", 0.5, "integer"),
    ("runtime.timeout_hours", 1e12, "less than or equal to"),
]


def of_value(key: str, content: Any, says: str) -> Case:
    shown = repr(content) if len(repr(content)) < 40 else f"{repr(content)[:20]} of {len(repr(content))}"
    lines = 2 if key == "distill.student.betas" and content == [1, 1] else 1
    return Case(f"{key} {shown}", CHECK, says, setting(key, content), lines=lines)


# What a later stage would refuse: by the check, and by the first stage.

SCORER = {"name": "mine", "command": "python nothing.py"}
LATER: list[tuple[str, Break, str]] = [
    (
        "too many neighbours for two samples",
        params(prompts__eval_count=2, latents__per_prompt=1),
        "evaluate.neighbours 2 is too many for 2 samples of 2 prompts",
    ),
    (
        "too many neighbours without real pictures",
        params(evaluate__real=None, evaluate__neighbours=4),
        "evaluate.neighbours 4 is too many for 8 samples",
    ),
    (
        "too many neighbours for the real pictures",
        params(evaluate__neighbours=1000, latents__per_prompt=1000),
        "evaluate.neighbours 1000 is too many for the",
    ),
    ("no teacher", params(teacher__source="nothing"), "teacher.source: nothing: no such folder"),
    (
        "a file as teacher",
        params(teacher__source="real.safetensors"),
        "teacher.source: real.safetensors: no such folder",
    ),
    (
        "no prompts",
        params(prompts__train=["lists/nothing.txt"]),
        "prompts.train: lists/nothing.txt: no such file",
    ),
    ("no judge", params(evaluate__judge="nothing"), "evaluate.judge: nothing: no such folder"),
    (
        "a judge without config",
        all_of(own("judge"), remove("judge/config.json")),
        "evaluate.judge: judge/config.json: does not name",
    ),
    (
        "a judge with a deep config",
        all_of(own("judge"), write("judge/config.json", DEEP)),
        "evaluate.judge: judge/config.json: does not name",
    ),
    (
        "a judge of numbers",
        all_of(own("judge"), value("judge/config.json", {"attributes": {"ink": [1, 2]}})),
        "evaluate.judge: judge/config.json: does not name",
    ),
    (
        "a judge of other classes",
        all_of(own("judge"), value("judge/config.json", {"attributes": {"ink": ["red"]}})),
        "its weights are not of the 1 classes of ink",
    ),
    (
        "a judge without weights",
        all_of(own("judge"), remove("judge/model.safetensors")),
        "evaluate.judge: judge/model.safetensors: not a readable safetensors file",
    ),
    (
        "a judge that is cut off",
        all_of(own("judge"), cut("judge/model.safetensors")),
        "evaluate.judge: judge/model.safetensors: not a readable safetensors file",
    ),
    (
        "the teacher as judge",
        params(evaluate__judge="teacher"),
        "evaluate.judge: teacher/config.json: does not name",
    ),
    ("no real pictures", params(evaluate__real="nothing"), "evaluate.real: nothing: no such file"),
    (
        "a text as real pictures",
        params(evaluate__real="lists/train.txt"),
        "evaluate.real: lists/train.txt: not a readable safetensors file",
    ),
    (
        "real pictures that are cut off",
        all_of(own("real.safetensors"), cut("real.safetensors")),
        "evaluate.real: real.safetensors: not a readable safetensors file",
    ),
    (
        "real pictures without prompts",
        all_of(own("real.safetensors"), tensors("real.safetensors", lambda found: None)),
        "metadata `prompts` is no JSON list",
    ),
    (
        "real pictures in grey",
        all_of(
            own("real.safetensors"),
            tensors("real.safetensors", lambda found: {"images": np.ascontiguousarray(found["images"][:, :1])}),
        ),
        "holds no `images` of the shape (n, 3, height, width)",
    ),
    (
        "weights as real pictures",
        params(evaluate__real="judge/model.safetensors"),
        "holds no `images` of the shape",
    ),
    ("a scorer without its script", params(evaluate__scorers=[SCORER]), "nothing.py: no such file"),
    (
        "a scorer without its program",
        params(evaluate__scorers=[SCORER | {"command": "no-such-program"}]),
        "no such program",
    ),
    (
        "a scorer with half a quotation",
        params(evaluate__scorers=[SCORER | {"command": "python 'x"}]),
        "No closing quotation",
    ),
    (
        "no launch file",
        params(runtime__accelerate_config="nothing.yaml"),
        "runtime.accelerate_config: nothing.yaml: no such file",
    ),
    (
        "a launch file that is none",
        all_of(params(runtime__accelerate_config="launch.yaml"), write("launch.yaml", DEEP)),
        "runtime.accelerate_config: launch.yaml: not valid YAML: nested too deeply",
    ),
    (
        "a launch file in UTF-16",
        all_of(
            params(runtime__accelerate_config="launch.yaml"),
            write("launch.yaml", "num_processes: 2".encode("utf-16")),
        ),
        "runtime.accelerate_config: launch.yaml: not UTF-8 text",
    ),
    (
        "a launch file of half a process",
        all_of(params(runtime__accelerate_config="launch.yaml"), write("launch.yaml", "num_processes: 0.5")),
        "names no number of processes",
    ),
    (
        "a batch that does not divide",
        all_of(params(runtime__accelerate_config="launch.yaml"), write("launch.yaml", "num_processes: 3")),
        "distill.batch_size 2 does not divide over 3 processes",
    ),
    (
        "one GPU for two processes",
        all_of(
            params(runtime__accelerate_config="launch.yaml", runtime__device="cuda:1"),
            write("launch.yaml", "num_processes: 2"),
        ),
        "runtime.device: cuda:1 is one device, and each of several processes needs its own: set it to cuda",
    ),
    (
        "a term that does not work sharded",
        all_of(
            params(runtime__accelerate_config="launch.yaml", distill__losses__sgmd={"weight": 1.0}),
            write("launch.yaml", "{num_processes: 2, distributed_type: FSDP}"),
        ),
        "distill.losses.sgmd does not work sharded",
    ),
    ("a metric that is none", params(evaluate__metrics=["fdi"]), "unknown measure 'fdi'"),
    (
        "a metric without its model",
        params(evaluate__metrics=["frechet_inception"]),
        "evaluate.models: not on this machine: inception for frechet_inception: get them with `cdm fetch params.yaml`",
    ),
    (
        "a size that the teacher does not draw",
        params(teacher__resolution=30),
        "teacher.resolution is 30, but this model draws multiples of",
    ),
    (
        "a size larger than its positions",
        params(teacher__resolution=1024),
        "teacher.resolution is 1024, but this model draws up to",
    ),
    (
        "real pictures of another size",
        params(teacher__resolution=16),
        "evaluate.real: its pictures have 32 x 32 pixels, but the teacher draws 16 x 16",
    ),
    (
        "more text than the teacher reads",
        params(prompts__max_sequence_length=1000),
        "prompts.max_sequence_length is 1000",
    ),
    (
        "more evaluation prompts than there are",
        params(prompts__eval_count=5),
        "prompts.eval_count is 5, but prompts.eval holds 4",
    ),
    (
        "evaluation prompts that leave none to train on",
        params(prompts__eval=[], prompts__eval_count=6, evaluate__real=None),
        "prompts.eval_count 6 leaves none of 6",
    ),
    (
        "only evaluation prompts to train on",
        params(prompts__train=["lists/eval.txt"]),
        "nothing is left to train on",
    ),
    (
        "real pictures of other prompts",
        write("lists/eval.txt", "a red one\nanother\na third\na fourth\n"),
        "evaluate.real: real.safetensors has no picture of 4 of the 4 evaluation prompts (one is 'a red one')",
    ),
    (
        "an adapter of a layer that the teacher lacks",
        params(distill__lora={"rank": 2, "alpha": 2, "targets": ["to_nothing"]}),
        "distill.lora.targets: no linear layer of SD3Transformer2DModel has a name that ends in to_nothing",
    ),
    (
        "a judge of other layers",
        all_of(own("judge"), tensors("judge/model.safetensors", without_first)),
        "evaluate.judge: judge does not hold a judge",
    ),
    (
        "a model of a measure that is none",
        all_of(
            params(evaluate__metrics=["frechet_inception"], evaluate__models={"inception": "odd.safetensors"}),
            write("odd.safetensors", b"PAR1"),
        ),
        "odd.safetensors: not a readable file of weights",
    ),
]


def of_later(name: str, prepare: Break, says: str) -> list[Case]:
    return [
        Case(f"check, {name}", CHECK, says, prepare),
        Case(f"first stage, {name}", ("stages.teacher",), says, prepare, slow=not name.startswith("too many")),
    ]


# Prompt lists.

LONG = "x" * 1_000_000
PROMPT_FILES: list[tuple[str, str, str | bytes, str]] = [
    ("not UTF-8", "a.txt", b"a red \xe9\n", "lists/a.txt: not UTF-8 text (byte 6)"),
    ("UTF-16", "a.txt", "a red one\n".encode("utf-16"), "lists/a.txt: not UTF-8 text"),
    ("UTF-16 without a mark", "a.txt", "a red one\n".encode("utf-16-le"), "it has zero bytes, as UTF-16 does"),
    ("a megabyte on a line", "a.txt", f"a\n{LONG}\n", "lists/a.txt: prompt 2 has 1,000,000 characters"),
    ("a megabyte of words", "a.txt", "red " * 250_000, "lists/a.txt: prompt 1 has 999,999 characters"),
    ("blank lines", "a.txt", "\n \n\t\n", "nothing is left to train on"),
    ("empty", "a.txt", "", "nothing is left to train on"),
    ("no suffix", "a", "a red one\n", "prompt files are .txt"),
    ("a suffix that is none", "a.pdf", b"%PDF", "prompt files are .txt"),
    ("deep JSON", "a.json", DEEP, "lists/a.json: not valid JSON"),
    ("JSON cut off", "a.json", '["a", "b', "lists/a.json: not valid JSON"),
    ("a JSON object", "a.json", '{"a": 1}', "expected a list of prompts"),
    ("a JSON text", "a.json", '"a"', "expected a list of prompts"),
    ("half a surrogate pair", "a.json", '["\\ud800"]', "half a surrogate pair"),
    ("a number as prompt", "a.json", "[3]", "no key 'prompt'"),
    ("a number of 5,000 digits", "a.json", f"[{DIGITS}]", "lists/a.json: not valid JSON"),
    ("a megabyte in JSON", "a.json", json.dumps([LONG]), "prompt 1 has 1,000,000 characters"),
    ("annotations of another kind", "a.json", '{"annotations": [{"id": 1}]}', "image_id, id and caption"),
    ("annotations that are a number", "a.json", '{"annotations": 3}', "image_id, id and caption"),
    (
        "annotations with lists as ids",
        "a.json",
        '{"annotations": [{"id": 1, "image_id": [], "caption": "a"}]}',
        "image_id, id and caption",
    ),
    ("deep JSON lines", "a.jsonl", f'{{"prompt": "a"}}\n{DEEP}\n', "lists/a.jsonl:2: not valid JSON"),
    (
        "JSON lines without the key",
        "a.jsonl",
        '{"text": "a"}',
        "lists/a.jsonl:1: no key 'prompt' (it has text)",
    ),
    ("JSON lines of a list", "a.jsonl", '{"prompt": [1]}', "lists/a.jsonl:1: prompt is [1], expected a text"),
    ("half a surrogate pair in JSON lines", "a.jsonl", '{"prompt": "\\udfff"}', "half a surrogate pair"),
    ("a zero byte in JSON lines", "a.jsonl", '{"prompt": "a\\u0000b"}', "zero byte"),
    ("a megabyte in JSON lines", "a.jsonl", json.dumps({"prompt": LONG}), "prompt 1 has 1,000,000 characters"),
    ("CSV without the column", "a.csv", "text\na\n", "no column 'prompt' (it has text)"),
    ("empty CSV", "a.csv", "", "no column 'prompt' (it has none)"),
    ("CSV with half a quotation", "a.csv", 'prompt\n"a\n', "lists/a.csv:"),
    ("CSV with a field of a megabyte", "a.csv", f"prompt\n{LONG}\n", "lists/a.csv:"),
    ("CSV with rows too short", "a.csv", "other,prompt\na\n", "nothing is left to train on"),
    ("no parquet", "a.parquet", b"PAR1" * 10, "cannot be read as parquet"),
    ("empty parquet", "a.parquet", b"", "cannot be read as parquet"),
]


def of_prompts(name: str, file: str, content: str | bytes, says: str) -> list[Case]:
    prepare = all_of(params(prompts__train=[f"lists/{file}"]), write(f"lists/{file}", content))
    return [
        Case(f"check, prompts, {name}", CHECK, says, prepare),
        Case(f"prompts, {name}", ("stages.prompts",), says, prepare, slow=True),
    ]


PROMPTS = [
    *(case for row in PROMPT_FILES for case in of_prompts(*row)),
    Case(
        "prompts, a folder without texts",
        ("stages.prompts",),
        "a folder without .txt files",
        all_of(params(prompts__train=["empty"]), folder("empty")),
    ),
    Case(
        "prompts, too few",
        ("stages.prompts",),
        "prompts.eval_count is 5, but prompts.eval holds 4",
        params(prompts__eval_count=5),
    ),
    Case(
        "prompts, none left",
        ("stages.prompts",),
        "nothing is left to train on",
        params(prompts__train=["lists/eval.txt"]),
    ),
    Case(
        "prompts, not to be read",
        ("stages.prompts",),
        "lists/train.txt: cannot be read: Permission denied",
        mode("lists/train.txt", 0),
        within=unprivileged,
    ),
]


# What stages read of each other.

TEACHER_RECORD: list[tuple[str, Break]] = [
    ("missing", remove("data/teacher.json")),
    ("empty", write("data/teacher.json", "")),
    ("deep", write("data/teacher.json", DEEP)),
    ("binary", write("data/teacher.json", bytes(range(256)))),
    ("UTF-16", write("data/teacher.json", "{}".encode("utf-16"))),
    ("a list", value("data/teacher.json", [])),
    ("a number", value("data/teacher.json", 3)),
    ("a folder", folder("data/teacher.json")),
    ("a shape that is a text", with_key("data/teacher.json", "latent_shape", "4")),
    ("a shape of texts", with_key("data/teacher.json", "latent_shape", ["4", "8", "8"])),
    ("a negative shape", with_key("data/teacher.json", "latent_shape", [4, -8, 8])),
    ("a shift that is none", with_key("data/teacher.json", "shift", NAN)),
    ("a shift of zero", with_key("data/teacher.json", "shift", 0)),
    ("files that are none", with_key("data/teacher.json", "files", ["a"])),
    ("a family that is none", with_key("data/teacher.json", "family", 3)),
    ("a source of two lines", with_key("data/teacher.json", "source", "a\nb")),
]

OF_TEACHER = "data/teacher.json: missing or damaged: run the stage `teacher`"
STUDENT_RECORD: list[tuple[str, Break]] = [
    ("empty", write("models/student/student.json", "")),
    ("deep", write("models/student/student.json", DEEP)),
    ("not UTF-8", write("models/student/student.json", b'{"family": "\xe9"}')),
    ("UTF-16", write("models/student/student.json", "{}".encode("utf-16"))),
    ("a list", value("models/student/student.json", [])),
    ("nothing in it", value("models/student/student.json", {})),
    ("a family that is a number", with_key("models/student/student.json", "family", 3)),
    ("a source that is a list", with_key("models/student/student.json", "source", ["a"])),
    ("a shape of texts", with_key("models/student/student.json", "latent_shape", ["4", "8", "8"])),
    ("a shape of zero", with_key("models/student/student.json", "latent_shape", [4, 0, 8])),
    ("a shape of two sizes", with_key("models/student/student.json", "latent_shape", [8, 8])),
    ("a huge shape", with_key("models/student/student.json", "latent_shape", [4, 10**9, 10**9])),
    ("parameters that are a list", with_key("models/student/student.json", "params", [])),
    ("prompts that are a number", with_key("models/student/student.json", "params.prompts", 3)),
    (
        "a length that is a text",
        with_key("models/student/student.json", "params.prompts.max_sequence_length", "x"),
    ),
    ("a negative length", with_key("models/student/student.json", "params.prompts.max_sequence_length", -1)),
    ("a length of 5,000 digits", write("models/student/student.json", f'{{"family": {DIGITS}}}')),
    ("a training elsewhere", with_key("models/student/student.json", "training", "../../teacher")),
]

SAMPLE = ("cdm", "sample", "a red one", "--out", "a.png", "--device", "cpu")
EXPORT = ("cdm", "export", "models/student", "--out", "exported")
OF_STUDENT = "models/student/student.json: damaged"
LATENTS = ("stages.latents",)

READ = [
    *(Case(f"teacher.json, {name}", LATENTS, OF_TEACHER, prepare) for name, prepare in TEACHER_RECORD),
    Case(
        "teacher.json, a family unknown",
        LATENTS,
        "unknown family 'unet'",
        with_key("data/teacher.json", "family", "unet"),
    ),
    Case(
        "teacher.json, a teacher that is gone",
        ("stages.prompts",),
        "no such folder",
        with_key("data/teacher.json", "source", "gone"),
    ),
    *(Case(f"student.json, {name}", SAMPLE, OF_STUDENT, prepare) for name, prepare in STUDENT_RECORD),
    Case(
        "student.json of a LoRA, a family unknown",
        SAMPLE,
        "unknown family 'unet'",
        all_of(
            with_key("models/student/student.json", "family", "unet"),
            lambda inside: (inside / "models/student/student.json").rename(inside / "models/student/lora.json"),
        ),
    ),
    Case(
        "student.json of a LoRA, a teacher that is gone",
        SAMPLE,
        "models/student: a LoRA for ./gone, which is not to be had",
        all_of(
            with_key("models/student/student.json", "source", "./gone"),
            lambda inside: (inside / "models/student/student.json").rename(inside / "models/student/lora.json"),
        ),
    ),
    Case(
        "student, no index",
        SAMPLE,
        "models/student/model_index.json: not a readable config",
        remove("models/student/model_index.json"),
    ),
    Case(
        "student, a deep index",
        SAMPLE,
        "models/student/model_index.json: not a readable config",
        write("models/student/model_index.json", DEEP),
    ),
    Case(
        "student, a list as index",
        SAMPLE,
        "models/student/model_index.json: not a readable config",
        value("models/student/model_index.json", []),
    ),
    Case(
        "student, an index without a class",
        SAMPLE,
        "does not name a diffusers pipeline",
        value("models/student/model_index.json", {}),
    ),
    Case(
        "student, an index of another class",
        SAMPLE,
        "no family draws with a 3",
        with_key("models/student/model_index.json", "_class_name", 3),
    ),
    Case(
        "student, weights cut off",
        SAMPLE,
        "models/student",
        cut("models/student/transformer/diffusion_pytorch_model.safetensors"),
    ),
    Case(
        "student, weights that are text",
        SAMPLE,
        "models/student",
        write("models/student/transformer/diffusion_pytorch_model.safetensors", "weights"),
    ),
    Case(
        "student, weights not to be read",
        SAMPLE,
        "models/student",
        mode("models/student/transformer/diffusion_pytorch_model.safetensors", 0),
        within=unprivileged,
    ),
    Case(
        "student, a deep config",
        SAMPLE,
        "models/student",
        write("models/student/transformer/config.json", DEEP),
    ),
    Case(
        "student, a config of texts",
        SAMPLE,
        "models/student",
        with_key("models/student/transformer/config.json", "num_layers", "two"),
    ),
    Case(
        "student, a config that is a list",
        SAMPLE,
        "models/student",
        value("models/student/transformer/config.json", []),
    ),
    Case(
        "student, a config in UTF-16",
        SAMPLE,
        "models/student",
        write("models/student/transformer/config.json", "{}".encode("utf-16")),
    ),
    Case("student, no scheduler", SAMPLE, "models/student", remove("models/student/scheduler")),
    Case(
        "student, an autoencoder cut off",
        SAMPLE,
        "models/student",
        cut("models/student/vae/diffusion_pytorch_model.safetensors"),
    ),
    Case(
        "student, a tokenizer that is deep",
        SAMPLE,
        "models/student",
        write("models/student/tokenizer/tokenizer.json", DEEP),
    ),
    Case(
        "texts.json, missing",
        LATENTS,
        "data/prompts/eval/texts.json: missing or damaged",
        remove("data/prompts/eval/texts.json"),
    ),
    Case(
        "texts.json, deep",
        LATENTS,
        "data/prompts/eval/texts.json: missing or damaged",
        write("data/prompts/eval/texts.json", DEEP),
    ),
    Case(
        "texts.json, numbers", LATENTS, "data/prompts/eval", value("data/prompts/eval/texts.json", [1, 2, 3, 4])
    ),
    Case(
        "texts.json, an object", LATENTS, "data/prompts/eval", value("data/prompts/eval/texts.json", {"a": 1})
    ),
    Case(
        "timing.json, missing",
        ("stages.evaluate",),
        "logs/timing.json: missing or damaged",
        remove("logs/timing.json"),
    ),
    Case(
        "timing.json, deep",
        ("stages.evaluate",),
        "logs/timing.json: missing or damaged",
        write("logs/timing.json", DEEP),
    ),
    Case(
        "timing.json, a text",
        ("stages.evaluate",),
        "logs/timing.json: missing or damaged",
        with_key("logs/timing.json", "seconds", "x"),
    ),
    Case(
        "timing.json, nothing",
        ("stages.evaluate",),
        "logs/timing.json: missing or damaged",
        with_key("logs/timing.json", "seconds", None),
    ),
    Case(
        "timing.json, no number",
        ("stages.evaluate",),
        "logs/timing.json: missing or damaged",
        with_key("logs/timing.json", "seconds", NAN),
    ),
    Case(
        "distill.csv, missing",
        ("stages.evaluate",),
        "logs/distill.csv: cannot be read",
        remove("logs/distill.csv"),
    ),
    Case(
        "distill.csv, empty",
        ("stages.evaluate",),
        "logs/distill.csv: not a training log",
        write("logs/distill.csv", ""),
    ),
    Case(
        "distill.csv, not UTF-8",
        ("stages.evaluate",),
        "logs/distill.csv: not a training log",
        write("logs/distill.csv", b"iteration,\xe9\n1,2\n"),
    ),
    Case(
        "distill.csv, words",
        ("stages.evaluate",),
        "logs/distill.csv: not a training log",
        write("logs/distill.csv", "iteration,loss\none,two\n"),
    ),
    Case(
        "distill.csv, a field too long",
        ("stages.evaluate",),
        "logs/distill.csv: not a training log",
        write("logs/distill.csv", f"iteration,loss\n1,{LONG}\n"),
    ),
    Case(
        "samples, missing",
        ("stages.evaluate",),
        "data/samples/student/steps1: no such folder",
        remove("data/samples/student"),
    ),
    Case(
        "samples, a manifest that is deep",
        ("stages.evaluate",),
        "data/samples/student/steps1/manifest.json",
        write("data/samples/student/steps1/manifest.json", DEEP),
    ),
    Case("latents, missing", ("stages.sample",), "data/latents: no such folder", remove("data/latents")),
    Case(
        "latents, a manifest that is a list",
        ("stages.sample",),
        "data/latents/manifest.json: missing or damaged",
        value("data/latents/manifest.json", []),
    ),
    Case(
        "real pictures of other prompts",
        ("stages.evaluate",),
        "evaluate.real: real.safetensors has no picture of 4 of the 4 evaluation prompts",
        all_of(own("real.safetensors"), other_prompts),
    ),
]


# Places to write to.

IN_THE_WAY = ("checkpoints", "data", "logs", "metrics", "models", "plots", "report")


def file_in_the_way(name: str) -> list[Case]:
    breaks = write(name, "a file") if name in ("checkpoints", "plots", "report", "metrics") else write(name, "")
    says = f"{name}: a file is in the way of a folder"
    return [
        Case(f"a file {name}, {stage}", (f"stages.{stage}",), says, breaks) for stage in ("teacher", "evaluate")
    ]


PLACES = [
    *(case for name in IN_THE_WAY for case in file_in_the_way(name)),
    Case(
        "a link to nothing as logs", ("stages.teacher",), "logs: a file is in the way", link("logs", "nothing")
    ),
    *(
        Case(
            f"a read-only {name}",
            ("stages.teacher",),
            f"{name}: this user may not write there",
            mode(name, 0o555),
            within=unprivileged,
        )
        for name in ("data", "logs", "metrics", "models")
    ),
    Case(
        "a read-only folder",
        ("stages.teacher",),
        ".: this user may not write there",
        all_of(remove("report"), mode(".", 0o555)),
        within=unprivileged,
    ),
    Case(
        "teacher, out is a folder",
        ("stages.teacher", "--out", "lists"),
        "lists: a folder, where a file is to be written",
    ),
    Case("teacher, out has no name", ("stages.teacher", "--out", "."), ".: a folder, where a file"),
    Case("prompts, out has no name", ("stages.prompts", "--out", "."), ".: has no name of its own"),
    Case("prompts, out above", ("stages.prompts", "--out", "lists/.."), "lists/..: has no name of its own"),
    Case(
        "prompts, out holds other things",
        ("stages.prompts", "--out", "lists"),
        "lists: exists and holds other things",
    ),
    Case(
        "prompts, out is a file",
        ("stages.prompts", "--out", "lists/train.txt"),
        "lists/train.txt: a file is in the way of a folder",
    ),
    Case(
        "latents, out is a file",
        ("stages.latents", "--out", "lists/train.txt"),
        "lists/train.txt: a file is in the way of a folder",
    ),
    Case(
        "latents, out holds other things",
        ("stages.latents", "--out", "lists"),
        "lists: exists and holds other things",
    ),
    Case(
        "distill, student is a file",
        ("stages.distill", "--student", "lists/train.txt"),
        "lists/train.txt: a file is in the way of a folder",
    ),
    Case(
        "distill, log is a folder",
        ("stages.distill", "--log", "lists"),
        "lists: a folder, where a file is to be written",
    ),
    Case(
        "distill, log in a file",
        ("stages.distill", "--log", "lists/train.txt/log.csv"),
        "lists/train.txt: a file is in the way of a folder",
    ),
    Case(
        "sample, out is a file",
        ("stages.sample", "--out", "lists/train.txt"),
        "lists/train.txt: a file is in the way of a folder",
    ),
    Case(
        "evaluate, metrics is a folder",
        ("stages.evaluate", "--metrics", "lists"),
        "lists: a folder, where a file is to be written",
    ),
    Case(
        "evaluate, report is a file",
        ("stages.evaluate", "--report", "lists/train.txt"),
        "lists/train.txt: a file is in the way of a folder",
    ),
    Case(
        "a full disk, teacher",
        ("stages.teacher",),
        "data/",
        remove("data/.hashes.json"),
        within=lambda: full_disk(16),
    ),
    Case("a full disk, prompts", ("stages.prompts",), "data/", within=lambda: full_disk(64)),
    Case("a full disk, latents", ("stages.latents",), "data/", within=lambda: full_disk(1024)),
    Case("a full disk, distill", ("stages.distill",), "checkpoints", within=lambda: full_disk(8192)),
    Case("a full disk, sample", ("stages.sample",), "data/", within=lambda: full_disk(4096)),
    Case("a full disk, a picture", SAMPLE, "a.png", within=lambda: full_disk(128)),
    Case("a full disk, an export", EXPORT, "exported", within=lambda: full_disk(4096)),
    Case(
        "a full disk, a recipe",
        ("cdm", "recipe", "use", "cdm", "--to", "new.yaml"),
        "new.yaml",
        within=lambda: full_disk(512),
    ),
]


# Commands.


def sample(name: str, says: str, *options: str, prepare: Break = lambda inside: None, **more: Any) -> Case:
    command = ("cdm", "sample", *options)
    if not any("--out" in option for option in options):
        command += ("--out", "a.png")
    return Case(f"cdm sample, {name}", command, says, prepare, **more)


COMMANDS = [
    sample("a seed of 64 bits", "--seed is 18446744073709551616", "a", "--seed", str(2**64)),
    sample("a seed of 63 bits", "--seed is 9223372036854775808", "a", "--seed", str(2**63)),
    sample("a negative seed", "--seed is -1", "a", "--seed", "-1"),
    sample("a seed of 5,000 digits", "--seed", "a", "--seed", DIGITS, code=2),
    sample("a seed that is a word", "Invalid value for '--seed'", "a", "--seed", "x", code=2),
    sample("a seed that is a fraction", "Invalid value for '--seed'", "a", "--seed", "1.5", code=2),
    sample("the last seeds", "--seed is", "a", "b", "c", "--seed", str(2**63 - 2)),
    sample("a megabyte", "PROMPT has 1,000,000 characters", LONG),
    sample("an empty prompt", "PROMPT is empty", " "),
    sample("bytes that are not UTF-8", "PROMPT is not UTF-8 text", os.fsdecode(b"a \xff")),
    sample("no prompt", "Missing argument", code=2),
    sample("no steps", "--steps is 0", "a", "--steps", "0"),
    sample("too many steps", "--steps is 1000000000", "a", "--steps", "1000000000"),
    sample("too much zoom", "--zoom is 1000", "a", "--zoom", "1000"),
    sample("an unknown option", "No such option: --sed", "a", "--sed", "3", code=2),
    sample("a precision that is none", "Invalid value for '--dtype'", "a", "--dtype", "fp64", code=2),
    sample("a device that is none", "the device 'abacus' cannot be used here", "a", "--device", "abacus"),
    sample("another suffix", "--out is a.jpg", "a", "--out", "a.jpg"),
    sample("no name", "--out is .png", "a", "--out", ".png"),
    sample("a folder", "--out: lists.png: a folder", "a", "--out", "lists.png", prepare=folder("lists.png")),
    sample(
        "below a file", "--out: lists/train.txt: a file is in the way", "a", "--out", "lists/train.txt/a.png"
    ),
    sample("a name too long", "this name is too long", "a", "--out", "x" * 300 + ".png"),
    sample("into the student", "which a stage of the pipeline writes", "a", "--out", "models/student/a.png"),
    sample("into the samples", "lies in data/samples", "a", "--out", "data/samples/a.png"),
    sample("into the report", "lies in report", "a", "--out", "report/deep/a.png"),
    sample(
        "into a model",
        "which is a model",
        "a",
        "--out",
        "other/a.png",
        prepare=lambda inside: shutil.copytree(inside / STUDENT, inside / "other"),
    ),
    sample(
        "to a read-only folder",
        "may not write there",
        "a",
        "--out",
        "shut/a.png",
        prepare=all_of(folder("shut"), mode("shut", 0o555)),
        within=unprivileged,
    ),
    sample("no student", "no student there", "a", "--student", "nothing"),
    sample("a text as student", "no student there", "a", "--student", "lists/train.txt"),
    sample(
        "a file that is no export",
        "does not say which teacher it needs",
        "a",
        "--student",
        "judge/model.safetensors",
    ),
    sample(
        "a file that is cut off",
        "x.safetensors: not a readable safetensors file",
        "a",
        "--student",
        "x.safetensors",
        prepare=write("x.safetensors", b"\xff" * 100),
    ),
    sample(
        "a file with an odd header",
        "x.safetensors: not a readable safetensors file",
        "a",
        "--student",
        "x.safetensors",
        prepare=write("x.safetensors", (8).to_bytes(8, "little") + b"[[[[[[[["),
    ),
    sample(
        "an empty file",
        "x.safetensors: not a readable safetensors file",
        "a",
        "--student",
        "x.safetensors",
        prepare=write("x.safetensors", b""),
    ),
    Case(
        "cdm export, into the student",
        ("cdm", "export", "models/student", "--out", "models/student/exported"),
        "lies in models/student, which a stage of the pipeline writes",
    ),
    Case(
        "cdm export, into the samples",
        ("cdm", "export", "models/student", "--out", "data/samples/exported"),
        "lies in data/samples",
    ),
    Case(
        "cdm export, into the report",
        ("cdm", "export", "models/student", "--out", "report/exported"),
        "lies in report",
    ),
    Case(
        "cdm export, into the prompts by a detour",
        ("cdm", "export", "models/student", "--out", "lists/../data/prompts/train/exported"),
        "lies in data/prompts/train",
    ),
    Case(
        "cdm export, into an export",
        ("cdm", "export", "models/student", "--out", "other/inner"),
        "which is a model",
        lambda inside: shutil.copytree(inside / STUDENT, inside / "other"),
    ),
    Case(
        "cdm export, onto itself",
        ("cdm", "export", "models/student", "--out", "models/student"),
        "models/student: exists and is not overwritten",
    ),
    Case("cdm export, above", ("cdm", "export", "models/student", "--out", "new/.."), "has no name of its own"),
    Case(
        "cdm export, below a file",
        ("cdm", "export", "models/student", "--out", "lists/train.txt/x"),
        "lists/train.txt: a file is in the way",
    ),
    Case(
        "cdm export, a folder for one file",
        ("cdm", "export", "models/student", "--out", "x", "--format", "single-file"),
        "give a name that ends in .safetensors",
    ),
    Case("cdm export, a LoRA of a full student", (*EXPORT, "--format", "lora"), "all its weights have learnt"),
    Case(
        "cdm export, a format that is none",
        (*EXPORT, "--format", "onnx"),
        "Invalid value for '--format'",
        code=2,
    ),
    Case("cdm export, no student", ("cdm", "export", "nothing", "--out", "x"), "nothing: no student there"),
    Case(
        "cdm export, weights cut off",
        EXPORT,
        "models/student",
        cut("models/student/transformer/diffusion_pytorch_model.safetensors"),
    ),
    Case(
        "cdm export, an odd record",
        EXPORT,
        OF_STUDENT,
        with_key("models/student/student.json", "params.distill", [1]),
    ),
    Case(
        "cdm export, to a read-only folder",
        ("cdm", "export", "models/student", "--out", "shut/x"),
        "may not write there",
        all_of(folder("shut"), mode("shut", 0o555)),
        within=unprivileged,
    ),
    Case("cdm export, a push to nowhere", (*EXPORT, "--push", "a/b/c"), "no name for a hub"),
    Case("cdm push, no export", ("cdm", "push", "lists", "org/name"), "lists: no export there"),
    Case(
        "cdm push, a name that is none",
        ("cdm", "push", "models/student", "org"),
        "models/student: no export there",
    ),
    Case("cdm plan, no file", ("cdm", "plan", "nothing.yaml"), "nothing.yaml: cannot be read"),
    Case(
        "cdm plan, nested brackets",
        ("cdm", "plan", "params.yaml"),
        "nested too deeply",
        write("params.yaml", DEEP),
    ),
    Case(
        "cdm plan, no processes",
        ("cdm", "plan", "params.yaml", "--flops", "1e14", "--processes", "0"),
        "--processes is 0",
    ),
    Case("cdm plan, a rate that is none", ("cdm", "plan", "params.yaml", "--flops", "nan"), "--flops is nan"),
    Case("cdm plan, an endless rate", ("cdm", "plan", "params.yaml", "--flops", "inf"), "--flops is inf"),
    Case("cdm plan, no rate", ("cdm", "plan", "params.yaml", "--flops", "0"), "--flops is 0"),
    Case(
        "cdm plan, a use that is none",
        ("cdm", "plan", "params.yaml", "--flops", "1e14", "--utilisation", "nan"),
        "--utilisation is nan",
    ),
    Case(
        "cdm plan, more processes than samples",
        ("cdm", "plan", "params.yaml", "--flops", "1e14", "--processes", "1000000000"),
        "does not divide over 1000000000 processes",
    ),
    Case(
        "cdm plan, a teacher unknown",
        ("cdm", "plan", "params.yaml"),
        "not known without it",
        params(teacher__source="org/name"),
    ),
    Case(
        "cdm plan, a text as sharding",
        ("cdm", "plan", "params.yaml", "--sharding", "ddp"),
        "Invalid value for '--sharding'",
        code=2,
    ),
    Case("cdm compare, no repository", ("cdm", "compare"), "in no Git repository"),
    Case(
        "cdm compare, no results",
        ("cdm", "compare", "--brief"),
        "has no metrics/quality.json",
        all_of(remove("metrics"), git("add params.yaml", "commit -q -m one")),
    ),
    Case(
        "cdm compare, an unknown experiment",
        ("cdm", "compare", "nothing"),
        "nothing: no experiment and no revision",
        COMMITTED,
    ),
    Case("cdm compare, an empty name", ("cdm", "compare", ""), "no experiment and no revision", COMMITTED),
    Case(
        "cdm compare, an option as a name",
        ("cdm", "compare", "--", "--all"),
        "no experiment and no revision",
        COMMITTED,
    ),
    Case(
        "cdm compare, a page that is none",
        ("cdm", "compare", "--out", "lists/train.txt"),
        "--out is lists/train.txt: give a name that ends in .html",
        COMMITTED,
    ),
    Case(
        "cdm compare, a page in the report",
        ("cdm", "compare", "--out", "report/index.html"),
        "lies in report",
        COMMITTED,
    ),
    Case(
        "cdm compare, a page below a file",
        ("cdm", "compare", "--out", "lists/train.txt/x.html"),
        "a file is in the way",
        COMMITTED,
    ),
    *(
        Case(
            f"cdm compare, figures that are {name}",
            ("cdm", "compare", "--brief", "workspace"),
            "workspace: its metrics/quality.json is damaged",
            all_of(COMMITTED, prepare),
        )
        for name, prepare in [
            ("deep", write("metrics/quality.json", DEEP)),
            ("a list", value("metrics/quality.json", [])),
            ("empty", write("metrics/quality.json", "")),
            ("of no steps", value("metrics/quality.json", {"student": {"a": {}}, "teacher": {"steps1": {}}})),
            (
                "of texts",
                value(
                    "metrics/quality.json",
                    {"student": {"steps1": {"frechet_distance": "x"}}, "teacher": {"steps1": {}}},
                ),
            ),
            ("of lists", value("metrics/quality.json", {"student": [], "teacher": []})),
            ("with odd replicates", with_key("metrics/quality.json", "replicates", [1])),
        ]
    ),
    Case("cdm baseline, no repository", ("cdm", "baseline"), "in no Git repository"),
    Case(
        "cdm baseline, other changes",
        ("cdm", "baseline"),
        "params.yaml: changed",
        all_of(COMMITTED, params(seed=1)),
    ),
    Case("cdm offline-plots, no project", ("cdm", "offline-plots"), "no DVC project here"),
    Case(
        "cdm recipe list, no folder",
        ("cdm", "recipe", "list", "--recipes", "nothing"),
        "nothing: no recipes there",
    ),
    Case(
        "cdm recipe list, a file",
        ("cdm", "recipe", "list", "--recipes", "dvc.yaml"),
        "dvc.yaml: no recipes there",
    ),
    Case(
        "cdm recipe list, not UTF-8",
        ("cdm", "recipe", "list"),
        "recipes/odd.yaml: not UTF-8 text",
        write("recipes/odd.yaml", b"# \xe9\n"),
    ),
    Case(
        "cdm recipe list, a folder as recipe",
        ("cdm", "recipe", "list"),
        "recipes/odd.yaml: a folder, where a file is needed",
        folder("recipes/odd.yaml"),
    ),
    Case("cdm recipe use, unknown", ("cdm", "recipe", "use", "../params"), "no recipe '../params'"),
    Case(
        "cdm recipe use, over a pipeline",
        ("cdm", "recipe", "use", "cdm", "--to", "dvc.yaml"),
        "dvc.yaml: not a params file",
        COMMITTED,
    ),
    Case(
        "cdm recipe use, over a text",
        ("cdm", "recipe", "use", "cdm", "--to", "lists/train.txt"),
        "give the name of a params file",
    ),
    Case("cdm recipe use, over changes", ("cdm", "recipe", "use", "cdm"), "has changes that no commit holds"),
    Case(
        "cdm recipe use, onto a folder",
        ("cdm", "recipe", "use", "cdm", "--to", "x.yaml"),
        "x.yaml: a folder, where a file is to be written",
        folder("x.yaml"),
    ),
    Case(
        "cdm recipe use, below a file",
        ("cdm", "recipe", "use", "cdm", "--to", "dvc.yaml/x.yaml"),
        "dvc.yaml: a file is in the way",
    ),
    Case(
        "cdm recipe use, read-only",
        ("cdm", "recipe", "use", "cdm", "--to", "shut/x.yaml"),
        "may not write there",
        all_of(folder("shut"), mode("shut", 0o555)),
        within=unprivileged,
    ),
    Case("cdm, an unknown command", ("cdm", "smaple"), "smaple", code=2),
    Case("cdm, an unknown option", ("cdm", "--verison"), "No such option", code=2),
    Case("cdm params check, no file", ("cdm", "params", "check"), "Missing argument", code=2),
    Case(
        "cdm params check, two files", ("cdm", "params", "check", "a", "b"), "unexpected extra argument", code=2
    ),
    Case("a stage, an unknown option", ("stages.prompts", "--outt", "x"), "No such option", code=2),
    Case("a stage, an argument", ("stages.prompts", "x"), "unexpected extra argument", code=2),
    Case("a stage, an option without value", ("stages.prompts", "--out"), "requires an argument", code=2),
]

CASES: list[Case] = [
    *FILES,
    *(of_value(*row) for row in VALUES),
    *(case for row in LATER for case in of_later(*row)),
    *PROMPTS,
    *READ,
    *PLACES,
    *COMMANDS,
]
