"""Scorers as real processes: what they are asked, what they may answer, and how they fail."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from cdm.errors import CdmError
from cdm.evaluation import report, scorers
from cdm.evaluation.metrics import Chosen, measure_chosen
from cdm.evaluation.samples import Samples, SampleSet
from cdm.evaluation.scorers import Answer
from cdm.params import Params, ScorerProcess
from cdm.preflight import check_paths
from cdm.system import programs
from tests.sample_sets import (
    PER_PROMPT,
    ROOT,
    TEXTS,
    noise_pictures,
    open_sets,
    parameters,
    write_set,
    write_sets,
)

PROMPTS = [text for text in TEXTS for _ in range(PER_PROMPT)]
DOUBLE = """
import json, sys
from PIL import Image
request = json.load(open(sys.argv[-2]))
open(CALLS, "a").write(request["set"] + "\\n")
assert request["format"] == "cdm-scorer-1"
reds = [Image.open(each["path"]).getpixel((0, 0))[0] for each in request["images"]]
lengths = [len(each["prompt"]) for each in request["images"]]
assert [each["id"] for each in request["images"]] == list(range(len(reds)))
print("noise on standard output")
json.dump({"scores": {"score": reds, "length": lengths}, "summary": {"overall": 0.5}}, open(sys.argv[-1], "w"))
"""
"""A scorer: the red of the first pixel, and the length of the prompt."""


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return open_sets(parameters(), write_sets(tmp_path / "sets"), TEXTS)


def scorer(tmp_path: Path, code: str, name: str = "double") -> ScorerProcess:
    script = tmp_path / f"{name}.py"
    script.write_text(f"CALLS = {str(tmp_path / 'calls')!r}\n{code}")
    return ScorerProcess(name=name, command=f"{sys.executable} {script}")


def ask(
    scorer: ScorerProcess,
    samples: SampleSet,
    prompts: list[str],
    cache: Path,
    minutes: float = 10.0,
) -> Answer:
    return scorers.ask(scorer, samples, prompts, cache, minutes=minutes)


def chosen_of(params: Params, samples: Samples, cache: Path) -> Chosen | None:
    return measure_chosen(params.evaluate, samples, None, cache, seed=params.seed, runtime=params.runtime)


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_a_scorer_sees_the_pictures_and_their_prompts(samples: Samples, tmp_path: Path) -> None:
    each = samples.student[0]
    answer = ask(scorer(tmp_path, DOUBLE), each, PROMPTS, tmp_path / "cache")
    assert answer.scores["score"] == each.pictures(range(len(PROMPTS)))[:, 0, 0, 0].tolist()
    assert answer.scores["length"] == [len(prompt) for prompt in PROMPTS]
    assert answer.summary == {"overall": 0.5}


def test_the_same_question_is_asked_once(samples: Samples, tmp_path: Path) -> None:
    cache, double = tmp_path / "cache", scorer(tmp_path, DOUBLE)
    first = ask(double, samples.student[0], PROMPTS, cache)
    assert ask(double, samples.student[0], PROMPTS, cache) == first
    assert calls(tmp_path) == ["student/steps1"]
    ask(double, samples.student[1], PROMPTS, cache)  # other pictures
    ask(double, samples.student[0], PROMPTS[::-1], cache)  # other prompts
    ask(double.model_copy(update={"command": double.command + " --other"}), samples.student[0], PROMPTS, cache)
    assert calls(tmp_path) == ["student/steps1", "student/steps4", "student/steps1", "student/steps1"]
    write_set(tmp_path / "sets", "student", 1, noise_pictures(77))  # drawn anew
    ask(double, open_sets(parameters(), tmp_path / "sets", TEXTS).student[0], PROMPTS, cache)
    assert len(calls(tmp_path)) == 5


def test_figures_of_scorers_in_the_rows(samples: Samples, tmp_path: Path) -> None:
    params = parameters(scorers=[scorer(tmp_path, DOUBLE)])
    chosen = chosen_of(params, samples, tmp_path / "cache")
    assert chosen is not None
    reds = samples.full.pictures(range(len(PROMPTS)))[:, 0, 0, 0].double()
    row = chosen.figures["teacher"]["steps50"]
    assert list(row) == ["double", "double_length", "double_overall"]
    assert row["double"] == pytest.approx(reds.mean().item(), rel=1e-5)
    student = chosen.figures["student"]["steps4"]["double"]
    assert chosen.differences["student"]["steps4"]["double"] == [
        pytest.approx(student - row["double"], abs=1e-3)
    ]
    assert chosen.intervals == {}  # of three prompts nothing is said
    table = report._chosen(chosen, samples)
    (paired,) = table["paired"]
    assert [each["name"] for each in paired["rows"]] == ["Student, 1 step", "Student, 4 steps"]
    cell = paired["rows"][1]["cells"]["double"]
    assert (cell.value, cell.error) == (f"{student - row['double']:.3g}".replace("-", "\u2212"), "")


FAILURES = {
    "import sys; print('a\\n\\nout of  memory', file=sys.stderr); sys.exit(3)": "exit code 3: a | out of memory",
    "import sys; sys.exit(2)": "exit code 2: it said nothing",
    "pass": "wrote no answer",
    "import sys; open(sys.argv[2], 'w').write('{')": "is not JSON",
    "import sys; open(sys.argv[2], 'w').write('[]')": "an answer has `scores` or `summary`",
    "import sys; open(sys.argv[2], 'w').write('{}')": "an answer has `scores` or `summary`",
    "import sys; open(sys.argv[2], 'w').write('{\"scores\": {\"score\": [1]}}')": "expected 12 finite numbers",
    "import sys; open(sys.argv[2], 'w').write('{\"scores\": {\"s\": [NaN' + ', 1' * 11 + ']}}')": "12 finite numbers",
    'import sys; open(sys.argv[2], \'w\').write(\'{"summary": {"all": "x"}}\')': "a finite number, not 'x'",
    "import sys; open(sys.argv[2], 'w').write('{\"summary\": {\"a\": ' + '9' * 400 + '}}')": "finite number, not '999",
    "import sys; open(sys.argv[2], 'w').write('{\"summary\": {\"' + 'a' * 400 + '\": 1}}')": "is no name of a figure",
    "import sys; open(sys.argv[2], 'w').write('{\"scores\": {\"a\\\\nb\": [1]}}')": "is no name of a figure",
    "import sys; open(sys.argv[2], 'w').write('[' * 5000)": "is not JSON",
    "import sys; open(sys.argv[2], 'wb').write(b'\\xff')": "is not JSON",
    "import os, sys; os.mkdir(sys.argv[2])": "wrote no answer: answer.json: Is a directory",
}


@pytest.mark.parametrize("code", FAILURES, ids=range(len(FAILURES)))
def test_a_failure_is_one_line(samples: Samples, tmp_path: Path, code: str) -> None:
    with pytest.raises(CdmError) as error:
        ask(scorer(tmp_path, code, "broken"), samples.student[0], PROMPTS, tmp_path / "cache")
    assert str(error.value).startswith("scorer broken: ")
    assert FAILURES[code] in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_what_was_answered_is_kept_when_another_fails(samples: Samples, tmp_path: Path) -> None:
    """The scorer after a broken one is asked too, and neither is asked again for what it has answered."""
    once = DOUBLE + "\nif request['set'] == 'teacher/steps4': sys.exit('no more')\n"
    broken, double = scorer(tmp_path, once, "broken"), scorer(tmp_path, DOUBLE, "double")
    params = parameters(scorers=[broken, double])
    with pytest.raises(CdmError, match=r"^scorer broken: teacher/steps4: 12 pictures: exit code 1: no more$"):
        chosen_of(params, samples, tmp_path / "cache")
    sets = ["student/steps1", "student/steps4", "teacher/steps4", "teacher/steps50"]
    assert calls(tmp_path) == [*sets[:3], *sets]
    with pytest.raises(CdmError, match="scorer broken"):
        chosen_of(params, samples, tmp_path / "cache")
    assert calls(tmp_path)[7:] == ["teacher/steps4"]


def test_a_scorer_that_is_not_there_is_reported_before_anything_starts(tmp_path: Path) -> None:
    named = [
        ScorerProcess(name="a", command="no-such-program --x"),
        ScorerProcess(name="b", command=f"{sys.executable} no/such/script.py --x 1"),
        ScorerProcess(name="c", command="unclosed 'quote"),
    ]
    with pytest.raises(CdmError) as error:
        check_paths(parameters(scorers=named))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "evaluate.scorers: a: no-such-program: no such program" in lines[0]
    assert "evaluate.scorers: b: no/such/script.py: no such file" in lines[1]
    assert "evaluate.scorers: c: " in lines[2]
    check_paths(parameters(scorers=[scorer(tmp_path, DOUBLE)]))


OTHERS = {"__init__", "protocol"}
ADAPTERS = sorted(path for path in (ROOT / "scorers").glob("*.py") if path.stem not in OTHERS)


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_adapters_compile_and_name_what_they_need(path: Path) -> None:
    """They run in environments of their own, which are not here; each imports the shared protocol and not cdm."""
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    compile(tree, path, "exec")
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    packages = {name.partition(".")[0] for name in imported if name}
    assert "cdm" not in packages
    assert path.stem not in packages, "Python would find the script where it looks for the package"
    assert ast.get_docstring(tree)


def test_the_shared_protocol_answers_a_request(samples: Samples, tmp_path: Path) -> None:
    """An adapter of two lines on scorers/protocol.py."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "scorers")!r})
from protocol import in_batches, parser, serve
options = parser("test")
options.add_argument("--add", type=float, default=0.0)
arguments = options.parse_args()
def score(images, folder):
    assert (folder / "request.json").exists()
    return {{"scores": {{"score": [each["id"] + arguments.add for b in in_batches(images, 5) for each in b]}}}}
serve(arguments, score)
"""
    adapter = scorer(tmp_path, code, "adapter")
    adapter = adapter.model_copy(update={"command": adapter.command + " --add 0.5"})
    answer = ask(adapter, samples.student[0], PROMPTS, tmp_path / "cache")
    assert answer.scores == {"score": [index + 0.5 for index in range(len(PROMPTS))]}


def test_geneval_s_adapter_lays_out_pictures_as_its_script_wants_them(samples: Samples, tmp_path: Path) -> None:
    """With a stand-in for the repository's script that calls a picture right if its prompt is about red."""
    clone = tmp_path / "geneval"
    (clone / "prompts").mkdir(parents=True)
    (clone / "evaluation").mkdir()
    rows = [{"tag": "colors" if "red" in text else "counting", "prompt": text} for text in TEXTS]
    (clone / "prompts/evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (clone / "evaluation/evaluate_images.py").write_text("""
import json, pathlib, sys
root, out = pathlib.Path(sys.argv[1]), sys.argv[sys.argv.index("--outfile") + 1]
with open(out, "w") as file:
    for folder in sorted(root.iterdir()):
        entry = json.loads((folder / "metadata.jsonl").read_text())
        for picture in sorted((folder / "samples").iterdir()):
            assert picture.read_bytes()[:4] == b"\\x89PNG"
            row = {**entry, "filename": str(picture), "correct": "red" in entry["prompt"]}
            file.write(json.dumps(row) + "\\n")
""")
    command = f"{sys.executable} {ROOT / 'scorers/geneval.py'} --geneval {clone} --model-path {tmp_path}"
    answer = ask(ScorerProcess(name="geneval", command=command), samples.full, PROMPTS, tmp_path / "cache")
    assert answer.scores == {"correct": [1.0] * PER_PROMPT + [0.0] * 2 * PER_PROMPT}
    assert answer.summary == {"overall": 0.5, "colors": 1.0, "counting": 0.0}


class TestOcr:
    @pytest.fixture
    def ocr(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(ROOT / "scorers")
        return importlib.import_module("ocr")

    @pytest.mark.parametrize(
        ("prompt", "texts"),
        [
            ('a cake that says "Happy Birthday!" and "No. 5"', ["happybirthday", "no5"]),
            ("a sign “Open” and one «ZU» and one \u2018Eau\u2019", ["open", "zu", "eau"]),
            ("a dog's bowl with 'Rex' on it, the dogs' own", ["rex"]),
            ('a shop of "..." and a dog\'s bowl', []),
        ],
    )
    def test_the_texts_that_a_prompt_quotes(self, ocr: Any, prompt: str, texts: list[str]) -> None:
        assert ocr.quoted(prompt) == texts

    @pytest.mark.parametrize(
        ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("same", "same", 0), ("ab", "ba", 2)]
    )
    def test_the_edit_distance(self, ocr: Any, a: str, b: str, distance: int) -> None:
        assert ocr.edit_distance(a, b) == distance == ocr.edit_distance(b, a)

    def test_what_is_read_is_compared_without_case_and_spaces(self, ocr: Any) -> None:
        assert ocr.accuracy(["open", "24h"], "OPEN\n24 h") == (1.0, 1.0)
        assert ocr.accuracy(["open"], "0PEN") == (0.75, 0.0)
        assert ocr.accuracy(["open"], "") == (0.0, 0.0)
        assert ocr.accuracy(["open"], "we open") == (pytest.approx(4 / 6), 1.0)

    def test_scores_if_all_prompts_quote_a_text_and_means_if_some_do(self, ocr: Any) -> None:
        texts = {"a": "open", "b": "closed", "c": "any"}
        images = [{"path": path, "prompt": 'a sign "open"'} for path in "ab"]
        read = texts.__getitem__
        expected = [1.0, pytest.approx(1 - 4 / 6)]  # closed, losed, osed, oped, open
        assert ocr.answer(images, read) == {"scores": {"score": expected, "correct": [1.0, 0.0]}}
        means = {"score": pytest.approx((1 + 2 / 6) / 2), "correct": 0.5}
        assert ocr.answer([*images, {"path": "c", "prompt": "a dog"}], read) == {"summary": means}
        with pytest.raises(SystemExit, match="no prompt quotes a text"):
            ocr.answer([{"path": "c", "prompt": "a dog"}], read)

    def test_it_reads_pictures_with_the_package(self, tmp_path: Path) -> None:
        """With a stand-in for the package: what its engine gives is a list of boxes, texts and confidences, or None."""
        (tmp_path / "rapidocr_onnxruntime.py").write_text("""
class RapidOCR:
    def __init__(self, text_score):
        assert text_score == 0.6
    def __call__(self, path):
        from PIL import Image
        red = Image.open(path).getpixel((0, 0))[0]
        return ([[None, "OP", 0.9], [None, "EN", 0.8]] if red > 127 else None), [0.1]
""")
        texts = ['a sign "open"', "a door “open”", "a 'OPEN!' mat"]
        sets = write_sets(tmp_path / "sets")
        samples = open_sets(parameters(), sets, texts)
        command = f"PYTHONPATH={tmp_path} {sys.executable} {ROOT / 'scorers/ocr.py'} --threshold 0.6"
        prompts = [text for text in texts for _ in range(PER_PROMPT)]
        answer = ask(ScorerProcess(name="ocr", command=command), samples.full, prompts, tmp_path / "cache")
        reds = samples.full.pictures(range(len(prompts)))[:, 0, 0, 0] > 127
        assert reds.unique().tolist() == [False, True]
        assert answer.scores == {"score": reds.double().tolist(), "correct": reds.double().tolist()}


def test_pictures_reach_a_scorer_unchanged(samples: Samples, tmp_path: Path) -> None:
    code = """
import json, shutil, sys
request = json.load(open(sys.argv[1]))
shutil.copy(request["images"][5]["path"], CALLS)
json.dump({"summary": {"x": 1}}, open(sys.argv[2], "w"))
"""
    ask(scorer(tmp_path, code), samples.full, PROMPTS, tmp_path / "cache")
    import numpy as np

    found = torch.from_numpy(np.array(Image.open(tmp_path / "calls"))).permute(2, 0, 1)
    assert torch.equal(found, samples.full.pictures([5])[0])


def test_a_scorer_is_asked_again_when_its_own_script_changes(samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "helper.py").touch()
    double = scorer(tmp_path, f"import helper\n{DOUBLE}")

    def is_asked() -> bool:
        before = len(calls(tmp_path))
        ask(double, samples.student[0], PROMPTS, tmp_path / "cache")
        return len(calls(tmp_path)) > before

    assert is_asked()
    assert not is_asked()
    for name in ("double.py", "helper.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# changed\n")
        assert is_asked(), name
        assert not is_asked(), name


def test_a_kept_answer_that_is_damaged_is_asked_for_again(samples: Samples, tmp_path: Path) -> None:
    double = scorer(tmp_path, DOUBLE)
    first = ask(double, samples.student[0], PROMPTS, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    for content in ("{", '{"scores": {"score": [1]}}', ""):
        kept.write_text(content)
        assert ask(double, samples.student[0], PROMPTS, tmp_path / "cache") == first
    assert len(calls(tmp_path)) == 4


def test_a_command_may_set_variables_and_begin_at_home(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import json, os, sys
json.dump({"summary": {"gpu": int(os.environ["GPU"]), "more": int(sys.argv[1])}}, open(sys.argv[-1], "w"))
"""
    scorer(tmp_path, code, "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHON_OF_MINE", sys.executable)
    monkeypatch.setenv("MORE", "7")
    command = "GPU=3 $PYTHON_OF_MINE ~/mine.py $MORE"
    mine = ScorerProcess(name="mine", command=command)
    check_paths(parameters(scorers=[mine]))
    assert ask(mine, samples.full, PROMPTS, tmp_path / "cache").summary == {"gpu": 3, "more": 7}
    monkeypatch.setenv("MORE", "8")  # another value is another question
    assert ask(mine, samples.full, PROMPTS, tmp_path / "cache").summary == {"gpu": 3, "more": 8}


def test_what_is_waited_for_is_said(
    samples: Samples, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "EVERY", 0.05)
    slow = (
        "import sys, time\nprint('loading\\tweights', file=sys.stderr, flush=True)\ntime.sleep(0.5)\n" + DOUBLE
    )
    ask(scorer(tmp_path, slow), samples.student[0], PROMPTS, tmp_path / "cache", minutes=3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scorer double: student/steps1: 12 pictures: at most 3 minutes"
    assert lines[-1] == (
        "scorer double: student/steps1: 12 pictures: 0 of at most 3 minutes, which says: loading weights"
    )


def test_a_scorer_cannot_fill_the_screen(
    samples: Samples, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = """
import sys
for _ in range(20):
    sys.stderr.write("\\x1b[2Jx" * 2**18)  # 20 MB in one line
sys.stderr.write("\\x07the end")
sys.exit(1)
"""
    with pytest.raises(CdmError) as error:
        ask(scorer(tmp_path, loud, "loud"), samples.student[0], PROMPTS, tmp_path / "cache")
    shown = capsys.readouterr().err
    assert len(shown) < 2 * programs.PASSED_ON
    assert shown.endswith("\n(it says more, which is left out)\n")
    assert str(error.value).endswith("the end")
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


WITH_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("waiting for a licence", file=sys.stderr, flush=True)
with open(CALLS, "w") as file:
    file.write(f"{child.pid}\\n")
time.sleep(600)
"""


def child_of(tmp_path: Path) -> int:
    """The process that a scorer has started, once it has."""
    while not (calls(tmp_path) and (tmp_path / "calls").read_text().endswith("\n")):
        time.sleep(0.01)
    return int(calls(tmp_path)[0])


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_scorer_that_takes_too_long_is_ended_with_all_that_it_started(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands until the scorer has started its child, and is then past the limit."""
    started = []

    def clock() -> float:
        if started:
            child_of(tmp_path)
            return 5 * 60.0
        started.append(True)
        return 0.0

    monkeypatch.setattr(programs.time, "monotonic", clock)
    with pytest.raises(CdmError) as error:
        ask(scorer(tmp_path, WITH_A_CHILD, "stuck"), samples.student[0], PROMPTS, tmp_path / "cache", minutes=5)
    assert str(error.value) == (
        "scorer stuck: student/steps1: 12 pictures: stopped after 5 minutes (runtime.scorer_minutes):"
        " waiting for a licence"
    )
    monkeypatch.undo()
    assert is_gone(child_of(tmp_path))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_evaluation_leaves_no_scorer_behind(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupted(*_: object) -> bool:
        child_of(tmp_path)
        os.kill(os.getpid(), number)
        time.sleep(10)  # the signal comes before that is over
        return True

    monkeypatch.setattr(programs, "_ended", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        ask(scorer(tmp_path, WITH_A_CHILD, "stuck"), samples.student[0], PROMPTS, tmp_path / "cache")
    assert is_gone(child_of(tmp_path))
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_evaluation_that_is_killed_leaves_no_scorer_behind(samples: Samples, tmp_path: Path) -> None:
    """It can do nothing any more: a guard beside the scorer ends it."""
    pid = os.fork()
    if pid == 0:
        ask(scorer(tmp_path, WITH_A_CHILD, "stuck"), samples.student[0], PROMPTS, tmp_path / "cache")
        os._exit(0)
    child = child_of(tmp_path)
    assert not is_gone(child)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    until = time.monotonic() + 30
    while not is_gone(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert is_gone(child)


def test_a_process_that_a_scorer_leaves_behind_does_not_hold_it_up(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that it has started has its standard error, and goes on."""
    monkeypatch.setattr(programs, "LAST_WORDS", 0.1)
    server = """
import subprocess
server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(CALLS + "-server", "w").write(str(server.pid))
"""
    answer = ask(scorer(tmp_path, DOUBLE + server), samples.student[0], PROMPTS, tmp_path / "cache")
    left = psutil.Process(int((tmp_path / "calls-server").read_text()))
    left.kill()
    assert answer.summary == {"overall": 0.5}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("A=1", "names no program"),
        ("$NOT_SET_AT_ALL x.py", "the environment variable NOT_SET_AT_ALL is not set"),
        ("~/no-such-program", "no-such-program: no such program: see docs/scorers.md"),
    ],
)
def test_commands_are_checked_before_a_run(command: str, says: str) -> None:
    with pytest.raises(CdmError, match=f"^evaluate.scorers: a: .*{re.escape(says)}$"):
        check_paths(parameters(scorers=[ScorerProcess(name="a", command=command)]))
