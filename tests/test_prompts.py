"""Prompt files of every kind, the split, and what is encoded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cdm.data import prompts
from cdm.data.prompt_lists import ReadReport, read_prompts, split_prompts
from cdm.data.prompt_set import OnlinePrompts, PromptSet
from cdm.data.prompts import count_over_long
from cdm.data.store import Store, StoreError
from cdm.errors import CdmError
from cdm.families import get_family
from cdm.models.manifest import TeacherManifest
from cdm.params import Params
from tests.inputs import build_prompts

TEXTS = [
    "a red three",
    "một con mèo",
    "三匹の猫",
    "قطة حمراء",
    "two lines:\nabove and below",
    'say "hi", twice',
    "🦊",
]
ONE_LINE = [text for text in TEXTS if "\n" not in text]


def write_jsonl(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_csv(path: Path, texts: list[str]) -> Path:
    rows = ["id,prompt", *(f'1,"{text.replace(chr(34), chr(34) * 2)}"' for text in texts)]
    path.write_bytes("\r\n".join(rows).encode())
    return path


def test_txt_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*ONE_LINE, "", "  spaced \t", "a red three"]).encode())
    assert read_prompts([path]) == ([*ONE_LINE, "spaced"], ReadReport(len(ONE_LINE) + 1, 1, 1))


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("one\u2028still one\x0b\nnext", encoding="utf-8")
    assert read_prompts([path])[0] == ["one\u2028still one", "next"]


def test_jsonl_and_csv_keep_every_text(tmp_path: Path) -> None:
    assert read_prompts([write_jsonl(tmp_path / "list.jsonl", [*TEXTS])])[0] == TEXTS
    assert read_prompts([write_csv(tmp_path / "list.csv", TEXTS)])[0] == TEXTS


def test_parquet_keeps_every_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "list.parquet"
    parquet.write_table(pyarrow.table({"caption": [*TEXTS, None], "id": range(len(TEXTS) + 1)}), path)
    assert read_prompts([path], "caption") == (TEXTS, ReadReport(len(TEXTS), 0, 1))
    with pytest.raises(CdmError, match=r"no column 'prompt' .it has caption, id"):
        read_prompts([path])
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(CdmError, match="cannot be read as parquet") as error:
        read_prompts([path])
    assert len(str(error.value).splitlines()) == 1


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CdmError, match=r"pip install 'cdm\[parquet\]'"):
        read_prompts([tmp_path / "list.parquet"])


def test_duplicates_are_counted_over_all_files_and_compositions(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    first = write_jsonl(tmp_path / "a.jsonl", [composed, "tea", None, "  "])
    second = write_csv(tmp_path / "b.csv", [decomposed, "tea ", "milk"])
    assert read_prompts([first, second]) == ([composed, "tea", "milk"], ReadReport(3, 2, 2))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.doc", b"", "prompt files are .txt, .json, .jsonl, .csv, .parquet, not .doc"),
        ("list", b"", "not without suffix"),
        ("list.txt", None, "list.txt: cannot be read: No such file"),
        ("list.txt", b"caf\xe9", "list.txt: not UTF-8 text .byte 3."),
        ("list.jsonl", b'{"prompt": "a"}\n{"prompt"', "list.jsonl:2: not valid JSON"),
        ("list.jsonl", b'{"text": "a"}', "list.jsonl:1: no key 'prompt' .it has text."),
        ("list.jsonl", b'["a"]', "list.jsonl:1: no key 'prompt'"),
        ("list.jsonl", b'{"prompt": 7}', "list.jsonl:1: prompt is 7, expected a text"),
        ("list.jsonl", b'{"prompt": "\\ud800"}', "list.jsonl:1: prompt holds half a surrogate pair"),
        ("list.csv", b"text\na", "list.csv: no column 'prompt' .it has text."),
        ("list.csv", b"", "list.csv: no column 'prompt' .it has none."),
        ("list.csv", b'prompt\n"a"b', "list.csv:2: not valid CSV"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CdmError, match=message) as error:
        read_prompts([path])
    assert len(str(error.value).splitlines()) == 1


def test_no_evaluation_prompt_is_trained_on() -> None:
    train = ["a", "b", "caf\u00e9", "c", "d"]
    split = split_prompts(train, ["x", "b", "cafe\u0301"], eval_count=2, seed=0)
    assert split.train == ["a", "c", "d"]
    assert split.eval == ["x", "b"]
    assert split.removed == 2
    fewer = split_prompts(train, ["x", "b", "cafe\u0301"], eval_count=1, seed=0)
    assert fewer.train == split.train, "the number of evaluation prompts does not change what is learnt from"


def test_prompts_are_held_back_where_there_is_no_evaluation_list() -> None:
    train = [str(number) for number in range(50)]
    split = split_prompts(train, None, eval_count=10, seed=0)
    assert len(split.eval) == 10
    assert sorted(split.train + split.eval) == sorted(train)
    assert split.eval != train[:10]
    assert split == split_prompts(train, None, eval_count=10, seed=0)
    assert split.eval != split_prompts(train, None, eval_count=10, seed=1).eval


def test_too_few_prompts_are_an_error() -> None:
    with pytest.raises(CdmError, match=r"eval_count is 3, but prompts.eval holds 2"):
        split_prompts(["a"], ["x", "y"], eval_count=3, seed=0)
    with pytest.raises(CdmError, match="eval_count 2 leaves none of 2"):
        split_prompts(["a", "b"], None, eval_count=2, seed=0)
    with pytest.raises(CdmError, match="nothing is left to train on"):
        split_prompts(["a"], ["a"], eval_count=1, seed=0)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_build_caches_what_the_family_encodes(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    report = build_prompts(tiny_params, tiny_teacher, tmp_path / "out")
    assert report.lines() == [
        "5 training prompts, 3 evaluation prompts",
        "training files: dropped 1 duplicates and 1 empty prompts",
        "removed 1 evaluation prompts from the training list",
    ]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["removed_from_train"] == 1
    family = get_family("sd3")
    pipeline = family.load_pipeline(tiny_teacher.folder())
    for name, texts in (
        ("train", [f"a red {digit} on black paper" for digit in ("one", "two", "three", "four", "five")]),
        ("eval", ["a blue six on white paper", "a pink nine on gray paper", "a cyan zero on brown paper"]),
        ("empty", [""]),
    ):
        found = PromptSet(tmp_path / "out" / name)
        assert found.texts == texts
        assert len(found) == len(texts)
        indices = list(reversed(range(len(texts))))
        expected = family.encode(pipeline, [texts[i] for i in indices], 0)
        conditioning = found.conditioning(indices, torch.device("cpu"))
        assert conditioning.keys() == expected.keys()
        for key, tensor in conditioning.items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-5)
        Store(tmp_path / "out" / name).verify()


def test_build_is_the_same_bytes_again_and_leaves_nothing_else(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    build_prompts(tiny_params, tiny_teacher, tmp_path / "out")
    first = tree(tmp_path / "out")
    build_prompts(tiny_params, tiny_teacher, tmp_path / "out")
    assert tree(tmp_path / "out") == first
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]


def test_online_stores_the_training_texts_only(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    online = tiny_params.model_copy(
        update={"prompts": tiny_params.prompts.model_copy(update={"embed": "online"})}
    )
    build_prompts(online, tiny_teacher, tmp_path / "out")
    train = PromptSet(tmp_path / "out" / "train")
    assert len(train) == 5
    assert list(tree(tmp_path / "out" / "train")) == ["texts.json"]
    with pytest.raises(CdmError, match=r"prompts.embed cached"):
        train.conditioning([0])
    assert PromptSet(tmp_path / "out" / "eval").conditioning([2])["pooled_projections"].shape == (1, 64)
    source = tiny_teacher.folder()
    online_prompts = OnlinePrompts(train, get_family("sd3"), source, online.prompts, offload=False)
    encoded = online_prompts.conditioning([3, 0])
    build_prompts(tiny_params, tiny_teacher, tmp_path / "cached")
    for key, tensor in PromptSet(tmp_path / "cached" / "train").conditioning([3, 0]).items():
        torch.testing.assert_close(encoded[key], tensor, atol=1e-5, rtol=1e-5)


def test_an_interrupted_build_is_resumed(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_prompts(tiny_params, tiny_teacher, tmp_path / "straight")
    family = get_family("sd3")
    encode, encoded = type(family).encode, list[str]()

    def watched(self: object, pipeline: object, texts: list[str], length: int | None = None) -> object:
        if len(encoded) == 5 and "interrupted" not in encoded:
            encoded.append("interrupted")
            raise KeyboardInterrupt
        if texts != [""]:
            encoded.extend(texts)
        return encode(family, pipeline, texts, length)  # type: ignore[arg-type]

    monkeypatch.setattr(type(family), "encode", watched)
    monkeypatch.setattr(prompts, "shard_rows", lambda *_: 2)
    with pytest.raises(KeyboardInterrupt):
        build_prompts(tiny_params, tiny_teacher, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    build_prompts(tiny_params, tiny_teacher, tmp_path / "out")
    evaluation = PromptSet(tmp_path / "out" / "eval").texts
    assert encoded[: len(evaluation)] == evaluation
    assert not set(evaluation) & set(encoded[encoded.index("interrupted") :]), (
        "finished sets are not encoded again"
    )
    for name in ("train", "eval"):
        straight = Store(tmp_path / "straight" / name).all()
        for key, tensor in Store(tmp_path / "out" / name).all().items():
            assert torch.equal(tensor, straight[key])


def test_build_replaces_its_own_folder_only(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(StoreError, match="photos: exists and holds other things"):
        build_prompts(tiny_params, tiny_teacher, tmp_path / "photos")
    assert list(tree(tmp_path / "photos")) == ["cat.png"]


def test_a_missing_or_damaged_set_names_its_stage(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    with pytest.raises(CdmError, match="run the stage `prompts`"):
        PromptSet(tmp_path / "out" / "eval")
    build_prompts(tiny_params, tiny_teacher, tmp_path / "out")
    (tmp_path / "out" / "eval" / "texts.json").write_text('["one"]')
    with pytest.raises(CdmError, match="1 texts, but 3 rows"):
        PromptSet(tmp_path / "out" / "eval")
    texts = PromptSet(tmp_path / "out" / "train").texts
    (tmp_path / "out" / "train" / "texts.json").write_text(json.dumps([*texts[1:], texts[0]]))
    with pytest.raises(CdmError, match=r"texts\.json: not the texts whose embeddings lie beside it: run"):
        PromptSet(tmp_path / "out" / "train")


@pytest.mark.parametrize("content", ["{}", "[1, 2, 3]", "[]", "[", "null", "[" * 5000])
def test_texts_that_are_none_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "texts.json").write_text(content)
    with pytest.raises(CdmError, match=r"texts\.json: missing or damaged: run the stage `prompts` again$"):
        PromptSet(tmp_path)


def test_a_damaged_embedding_is_not_used(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    build_prompts(tiny_params, tiny_teacher, tmp_path / "out")
    for name in ("train", "eval", "empty"):
        shard = tmp_path / "out" / name / "shard-00000.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        prompts_of = PromptSet(tmp_path / "out" / name)
        with pytest.raises(StoreError, match=f"{name}/shard-00000.safetensors: its hash differs"):
            prompts_of.conditioning([0])


def changed(params: Params, section: str, **values: object) -> Params:
    part = getattr(params, section).model_copy(update=values)
    return params.model_copy(update={section: part})


def test_half_precision_is_stored_as_such_and_given_out_as_float32(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    build_prompts(tiny_params, tiny_teacher, tmp_path / "exact")
    build_prompts(changed(tiny_params, "prompts", precision="bf16"), tiny_teacher, tmp_path / "half")
    exact, half = (PromptSet(tmp_path / name / "train") for name in ("exact", "half"))
    assert half.store is not None
    assert {value.dtype for value in half.store.rows([0]).values()} == {torch.bfloat16}
    for key, value in half.conditioning([4, 1]).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact.conditioning([4, 1])[key], atol=0.1, rtol=0.1)
        assert not torch.equal(value, exact.conditioning([4, 1])[key])


def test_what_embeddings_take_is_said_before_and_refused_where_there_is_no_room(
    tiny_params: Params,
    tiny_teacher: TeacherManifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
    with pytest.raises(
        CdmError, match=r"embeddings of 9 prompts take 2\.07e-05 GB, but 2e-05 GB are free: make room"
    ):
        build_prompts(tiny_params, tiny_teacher, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors"))
    assert "embeddings of 9 prompts: 2.07e-05 GB of disk, 2e-05 GB are free" in capsys.readouterr().err
    # Half of it has room, and so has what is encoded while training.
    build_prompts(changed(tiny_params, "prompts", precision="bf16"), tiny_teacher, tmp_path / "half")
    build_prompts(changed(tiny_params, "prompts", embed="online"), tiny_teacher, tmp_path / "online")
    assert "embeddings of 4 prompts" in capsys.readouterr().err.splitlines()[-1]
    stored = sum(value.nbytes for value in PromptSet(tmp_path / "half" / "eval").store.all().values())  # type: ignore[union-attr]
    assert stored == 3 * 20_736 / 9 / 2, "the figures are those of the tensors"


def test_prompts_that_no_encoder_reads_to_the_end_are_counted(
    tiny_pipeline: Callable[[str], Path], tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    def counted(name: str, length: int, *texts: str) -> tuple[int, int]:
        pipeline = get_family("sd3").load_pipeline(tiny_pipeline(name), image=False, transformer=False)
        return count_over_long(pipeline, texts, length)

    short, middle, long = "red", "red " * 12, "red " * 200
    assert counted("sd3", 0, short, middle, long)[0] == 2
    assert counted("sd3_t5", 150, short, middle, long)[0] == 1, "T5 reads what CLIP does not"
    assert counted("sd3", 0, short) == (0, counted("sd3", 0, long)[1])

    Path(tiny_params.prompts.train[0]).write_text(f"{short}\n{middle}")
    report = build_prompts(tiny_params, tiny_teacher, tmp_path / "out")
    assert report.over_long == 1
    assert report.lines()[-1].startswith("1 prompts are longer than the 8 tokens that are read")


def test_encoders_that_are_offloaded_wait_on_the_cpu(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = changed(tiny_params, "prompts", embed="online")
    build_prompts(online, tiny_teacher, tmp_path / "out")
    texts = PromptSet(tmp_path / "out" / "train")
    for offload, places in ((False, ["cpu"]), (True, ["cpu", "cpu"])):
        source = tiny_teacher.folder()
        encoded = OnlinePrompts(texts, get_family("sd3"), source, online.prompts, offload=offload)
        moved: list[str] = []
        real = encoded.pipeline.to
        monkeypatch.setattr(
            encoded.pipeline, "to", lambda place, m=moved, r=real: (m.append(str(place)), r(place))[1]
        )
        assert not any(value.requires_grad for value in encoded.conditioning([0], torch.device("cpu")).values())
        assert moved == places
