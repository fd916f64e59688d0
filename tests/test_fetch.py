"""`cdm fetch`, from a hub and addresses on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from cdm.errors import CdmError
from cdm.external import record_evaluation
from cdm.models import published
from cdm.models.fetch import fetch
from cdm.models.metric_models import model_path, model_problem
from cdm.models.published import File
from cdm.params import Evaluate, MetricModels
from cdm.preflight import problems_of_evaluation
from cdm.system.files import Memory
from tests.metric_models import write_clip
from tests.stand_in_hub import READER, Hub, Repository
from tests.test_cli import Command, command  # noqa: F401 - a fixture

CLIP = "openai/clip-vit-large-patch14"
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
CONTENT = bytes(range(256)) * 20


def hashed(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine with a CLIP, at whose address the aesthetic head is published too; empty caches."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", READER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_clip(tmp_path / "clip")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with Hub().running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        pattern = f"{running.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
        running.repositories[CLIP] = Repository(commits=[{**files, "flax_model.msgpack": b"not read"}])
        running.files[HEAD] = CONTENT
        commit = running.repositories[CLIP].sha
        known = {name: hashed(content) for name, content in files.items() if name != "vocab.json"}
        table = [File("clip", CLIP, commit, name, known.get(name)) for name in files]
        table.append(File("aesthetic", f"{running.address}/files/{HEAD}", None, HEAD, hashed(CONTENT)))
        monkeypatch.setattr(published, "FILES", tuple(table))
        yield running


def section(*metrics: str, **models: str | None) -> Evaluate:
    return Evaluate(metrics=list(metrics), models=MetricModels(**models))


def problem_of(evaluate: Evaluate) -> str:
    with pytest.raises(CdmError) as error:
        list(fetch(evaluate))
    (message,) = str(error.value).splitlines()
    return message


def test_what_the_measures_need_is_got_and_found(served: Hub, tmp_path: Path) -> None:
    """Both are at first not here, then fetched, then found by name; nothing is fetched twice, nor what is not read."""
    evaluate = section("clip_score", "aesthetic")
    (missing,) = problems_of_evaluation(evaluate, "REMEDY")
    assert missing.endswith(f"clip ({CLIP}) for clip_score, aesthetic; aesthetic for aesthetic: REMEDY")
    lines = list(fetch(evaluate))
    commit = served.repositories[CLIP].sha
    folder = tmp_path / f"hub/models--openai--clip-vit-large-patch14/snapshots/{commit}"
    assert model_path("clip", CLIP) == folder
    assert not (folder / "flax_model.msgpack").exists()
    assert (tmp_path / "cache/cdm" / HEAD).read_bytes() == CONTENT
    assert lines[0].startswith(f"clip: {CLIP} at {commit}: ")
    assert lines[0].endswith(f"hashes recorded in {folder.parents[1] / commit}.sha256.json of vocab.json")
    assert lines[1] == f"aesthetic: {tmp_path / 'cache/cdm' / HEAD}: 0.0 MB, hashes as they should be"
    assert not list(problems_of_evaluation(evaluate, ""))
    served.requests.clear()
    again = list(fetch(evaluate))
    assert again[0].endswith("hashes as they should be")
    assert not [request for request in served.requests if request.startswith("GET") and "/api/" not in request]


def test_a_download_that_was_broken_off_goes_on(served: Hub, tmp_path: Path) -> None:
    evaluate = section("aesthetic", clip=str(tmp_path / "clip"))
    served.breaks_off = 1000
    first = problem_of(evaluate) if served.breaks_off else ""
    part = tmp_path / "cache/cdm" / f"{HEAD}.part"
    assert part.read_bytes() == CONTENT[:1000], first
    assert model_problem("aesthetic", None)
    list(fetch(evaluate))
    assert (tmp_path / "cache/cdm" / HEAD).read_bytes() == CONTENT
    assert not part.exists()


def test_a_part_of_something_else_is_refused_and_then_begun_anew(served: Hub, tmp_path: Path) -> None:
    evaluate = section("aesthetic", clip=str(tmp_path / "clip"))
    part = tmp_path / "cache/cdm" / f"{HEAD}.part"
    for content in (b"x" * 10, b"x" * len(CONTENT)):  # shorter, and as long: nothing follows it
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        if len(content) < len(CONTENT):
            assert f"{HEAD} has the SHA-256 " in problem_of(evaluate)
        list(fetch(evaluate))
        assert (tmp_path / "cache/cdm" / HEAD).read_bytes() == CONTENT
        (tmp_path / "cache/cdm" / HEAD).unlink()


def test_another_file_than_the_published_one_is_refused(served: Hub, tmp_path: Path) -> None:
    served.files[HEAD] = b"changed"
    message = problem_of(section("aesthetic", clip=str(tmp_path / "clip")))
    assert message.startswith(
        f"{served.address}/files/{HEAD}: {HEAD} has the SHA-256 {hashed(b'changed')[:16]}... "
    )
    assert not (tmp_path / "cache/cdm" / HEAD).exists()
    served.repositories[CLIP].commits[0]["config.json"] += b" "
    message = problem_of(section("clip_score"))
    assert "config.json has the SHA-256" in message
    assert "it was deleted; fetch it again" in message
    assert model_problem("clip", CLIP) == "has no config.json"
    (missing,) = problems_of_evaluation(section("clip_score"), "REMEDY")
    assert missing == f"evaluate.models: not on this machine: clip ({CLIP}) for clip_score: REMEDY"


def test_a_recorded_hash_is_checked_from_then_on(served: Hub, tmp_path: Path) -> None:
    """By `cdm fetch`, and by the stage that hashes what an evaluation reads."""
    evaluate = section("clip_score")
    list(fetch(evaluate))
    record_evaluation(evaluate, tmp_path / "inputs.json", Memory())
    folder = model_path("clip", CLIP)
    assert folder is not None
    blob = (folder / "vocab.json").resolve()
    blob.write_bytes(blob.read_bytes() + b" ")
    with pytest.raises(
        CdmError, match=r"^evaluate\.models\.clip: .*vocab\.json: another file than the one that is pub"
    ):
        record_evaluation(evaluate, tmp_path / "inputs.json", Memory())
    assert "vocab.json has the SHA-256" in problem_of(evaluate)
    list(fetch(evaluate))
    record_evaluation(evaluate, tmp_path / "inputs.json", Memory())


def test_files_go_where_the_parameters_name_them(served: Hub, tmp_path: Path) -> None:
    target = tmp_path / "weights/head.pth"
    evaluate = section("aesthetic", clip=str(tmp_path / "clip"), aesthetic=str(target))
    list(fetch(evaluate))
    assert target.read_bytes() == CONTENT
    target.write_bytes(b"mine")
    assert problem_of(evaluate).endswith("remove it and fetch it again, or name your own elsewhere")
    assert target.read_bytes() == b"mine"
    (target.parent / "mine.pth").write_bytes(b"mine")
    evaluate = section("aesthetic", clip=str(tmp_path / "clip"), aesthetic=str(target.parent / "mine.pth"))
    assert list(fetch(evaluate))[1] == f"aesthetic: {target.parent / 'mine.pth'}: here, and yours"
    (message,) = problem_of(section("clip_score", clip=str(tmp_path / "none"))).splitlines()
    assert message.endswith("no such file or folder, and it is published nowhere that is known")


def test_another_model_of_the_hub(served: Hub) -> None:
    """Its revision is that of the parameters, or main, and all its hashes are recorded."""
    served.repositories["some-org/clip"] = served.repositories[CLIP]
    evaluate = section("clip_score", clip="some-org/clip")
    (line,) = fetch(evaluate)
    assert "of config.json, merges.txt, model.safetensors" in line
    assert not list(problems_of_evaluation(evaluate, ""))
    served.refuses["some-org/other"] = 404
    assert "some-org/other" in problem_of(section("clip_score", clip="some-org/other"))


def test_hps_is_converted_from_what_is_published(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = served.repositories[CLIP].sha
    files = served.repositories[CLIP].files
    served.repositories["xswu/HPSv2"] = Repository(commits=[{"hps.pt": b"weights"}])
    small = [name for name in files if not name.endswith(("safetensors", "msgpack"))]
    table = [File("hps", "xswu/HPSv2", commit, "hps.pt", hashed(b"weights"))]
    monkeypatch.setattr(
        published, "FILES", (*table, *(File("hps", CLIP, commit, name, None) for name in small))
    )

    def convert(found: dict[str, Path], out: Path) -> None:
        assert found["hps.pt"].read_bytes() == b"weights"
        assert found.keys() == {"hps.pt", *small}
        out.mkdir()
        for name, path in found.items():
            (out / name.replace("hps.pt", "model.safetensors")).write_bytes(path.read_bytes())

    monkeypatch.setattr("cdm.models.hps.convert_files", convert)
    evaluate = section("hps")
    (line,) = fetch(evaluate)
    assert "hashes recorded in" in line
    assert not list(problems_of_evaluation(evaluate, ""))
    assert next(iter(fetch(evaluate))).endswith("hashes as they should be")
    lock = json.loads((tmp_path / "cache/cdm/hps.sha256.json").read_text())
    assert lock["model.safetensors"] == hashed(b"weights")


def test_the_command(command: Command, served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    clip = tmp_path / "clip"
    result = command("fetch", "--metric", "aesthetic", "--model", f"clip={clip}")
    assert result.out.splitlines()[0] == f"clip: {clip}: here, and yours"
    assert "not both" in command("fetch", "params.yaml", "--metric", "aesthetic").error
    assert "params.yaml" in command("fetch").error
    assert "unknown measure" in command("fetch", "--metric", "beauty").error


def test_every_hash_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in published.FILES:
        assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
        if not file.is_on_hub:
            assert file.sha256, f"{file.place} may change"
            continue
        assert len(bytes.fromhex(file.revision or "")) == 20
