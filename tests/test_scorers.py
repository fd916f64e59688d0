"""Scorers as real processes: what they are asked, what they may answer, and how they fail."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cdm.errors import CdmError
from cdm.evaluation import report
from cdm.evaluation.metrics import Chosen, measure_chosen
from cdm.evaluation.samples import Samples
from cdm.evaluation.scorers import ask
from cdm.params import Params, ScorerProcess
from cdm.preflight import check_paths
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


def chosen_of(params: Params, samples: Samples, cache: Path) -> Chosen | None:
    return measure_chosen(params.evaluate, samples, None, cache, seed=params.seed, device="cpu")


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
    with pytest.raises(CdmError, match=r"^scorer broken: exit code 1: no more$"):
        chosen_of(params, samples, tmp_path / "cache")
    sets = ["student/steps1", "student/steps4", "teacher/steps4", "teacher/steps50"]
    assert calls(tmp_path) == [*sets[:3], *sets]
    with pytest.raises(CdmError, match="scorer broken"):
        chosen_of(params, samples, tmp_path / "cache")
    assert calls(tmp_path)[7:] == ["teacher/steps4"]


def test_a_scorer_that_is_not_there_is_reported_before_anything_starts(tmp_path: Path) -> None:
    scorers = [
        ScorerProcess(name="a", command="no-such-program --x"),
        ScorerProcess(name="b", command=f"{sys.executable} no/such/script.py --x 1"),
        ScorerProcess(name="c", command="unclosed 'quote"),
    ]
    with pytest.raises(CdmError) as error:
        check_paths(parameters(scorers=scorers))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "evaluate.scorers: a: no-such-program: no such program" in lines[0]
    assert "evaluate.scorers: b: no/such/script.py: no such file" in lines[1]
    assert "evaluate.scorers: c: " in lines[2]
    check_paths(parameters(scorers=[scorer(tmp_path, DOUBLE)]))


OTHERS = {"__init__", "protocol", "convert_hps"}
ADAPTERS = sorted(path for path in (ROOT / "scorers").glob("*.py") if path.stem not in OTHERS)


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_adapters_compile_and_name_what_they_need(path: Path) -> None:
    """They run in environments of their own, which are not here; each imports the shared protocol and not cdm."""
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    compile(tree, path, "exec")
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "cdm" not in {name.partition(".")[0] for name in imported if name}
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
