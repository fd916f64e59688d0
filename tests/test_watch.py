"""Watching a training: it shows what happens and changes nothing, but for the probe, which may choose the student."""

from __future__ import annotations

import csv
import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch import Tensor

from cdm.data.prompt_set import PromptSet
from cdm.data.reference import Reference
from cdm.errors import CdmError
from cdm.evaluation.looks import colour_cast, contrast
from cdm.families import get_family
from cdm.models.manifest import TeacherManifest, describe
from cdm.params import Params, Probe, load
from cdm.preflight import check_paths
from cdm.randomness import Draws
from cdm.training import pictures, watch
from cdm.training.inputs import Inputs
from cdm.training.networks import FullNetworks
from cdm.training.probe import (
    Looks,
    QualityProbe,
    deviations,
    draw_student,
    exchange,
    exchanged,
    falls_due,
    latent_features,
)
from cdm.training.watch import Stopwatch, TimedNetworks, Watch
from tests.crashing import crash_rounds
from tests.inputs import build_prompts, cache_latents, train
from tests.launching import succeed_in_two_processes
from tests.write_params import write_params

ITERATIONS = 12
PROBE: dict[str, Any] = {
    "reference": "latents", "every": 4, "samples": 6, "steps": [1, 2], "metrics": ["contrast", "colour_cast"],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of a short distillation of the tiny teacher: two evaluation prompts, three latents of each."""
    folder = tmp_path_factory.mktemp("watched")
    values = write_params(folder, tiny_sd3, iterations=ITERATIONS, probe=PROBE).model_dump(mode="json")
    values["prompts"]["eval_count"] = 2
    values["latents"]["per_prompt"] = 3
    values["runtime"]["pictures_every"] = 8
    YAML().dump(values, folder / "params.yaml")
    manifest = describe("sd3", str(tiny_sd3), None)
    manifest.write(folder / "teacher.json")
    params = load(folder / "params.yaml")
    build_prompts(params, manifest, folder / "prompts")
    cache_latents(params, manifest, folder / "prompts", folder / "latents")
    return folder


def with_changes(world: Path, **changes: dict[str, Any]) -> Params:
    """The world's parameters with `section={key: value}`."""
    params = load(world / "params.yaml")
    sections = {name: getattr(params, name).model_copy(update=values) for name, values in changes.items()}
    return params.model_copy(update=sections)


def gather(world: Path, params: Params) -> Inputs:
    manifest = TeacherManifest.read(world / "teacher.json")
    return Inputs.gather(params, manifest, world / "prompts")


def run(world: Path, out: Path, params: Params | None = None) -> None:
    params = params or load(world / "params.yaml")
    train(params, gather(world, params), out, watched=True)


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_same_student(out: Path, expected: Path) -> None:
    mine, theirs = weights(out), weights(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def read_log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def watched(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with probe, pictures and times."""
    out = tmp_path_factory.mktemp("run")
    run(world, out)
    return out


def networks(world: Path) -> FullNetworks:
    family = get_family("sd3")
    return FullNetworks(family, family.load_transformer(TeacherManifest.read(world / "teacher.json").folder()))


@pytest.mark.parametrize(
    ("every", "since", "now", "expected"),
    [(4, 2, 4, True), (4, 4, 6, False), (4, 6, 9, True), (4, 8, 10, True), (0, 0, 10, False), (3, 0, 2, False)],
)
def test_falls_due_at_multiples_and_at_the_end(every: int, since: int, now: int, expected: bool) -> None:
    assert falls_due(every, since, now, last=10) is expected


def test_exchange_is_exact_and_undone_even_by_an_error() -> None:
    one, other = {"w": torch.randn(5)}, {"w": torch.randn(5)}
    first, second = one["w"].clone(), other["w"].clone()
    with suppress(RuntimeError), exchanged(one, other):
        assert torch.equal(one["w"], second)
        assert torch.equal(other["w"], first)
        raise RuntimeError("in between")
    assert torch.equal(one["w"], first)
    assert torch.equal(other["w"], second)
    exchange(one, other)
    assert torch.equal(one["w"], second)


class OnApple(torch.Tensor):
    """A tensor on a device that has no double precision."""

    def double(self) -> Tensor:  # type: ignore[override]
        raise TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
        )

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


def test_latent_features_need_no_double_precision_on_the_device() -> None:
    latents = torch.randn(3, 4, 8, 8)
    assert torch.equal(latent_features(latents.as_subclass(OnApple)), latent_features(latents))


def test_latent_features_tell_layout_from_texture() -> None:
    noise = torch.randn(6, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    features = latent_features(noise)
    layout = 2 * 16
    assert features.shape == (6, layout + 2 + 3 * 2)  # octaves of 16, 8 and 4
    assert features.dtype == torch.float64
    torch.testing.assert_close(
        features[:, :layout], noise.double().unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(1)
    )
    blurred = torch.nn.functional.avg_pool2d(noise, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    soft = latent_features(blurred)
    torch.testing.assert_close(soft[:, :layout], features[:, :layout], atol=1e-6, rtol=0)
    assert (soft[:, layout : layout + 2] < features[:, layout : layout + 2]).all()
    assert (soft[:, layout + 2 : layout + 4] == 0).all()


class TestProbe:
    @pytest.fixture
    def reference(self, world: Path) -> Reference:
        manifest = TeacherManifest.read(world / "teacher.json")
        return Reference.open(world / "prompts", world / "latents", manifest)

    def probe(self, world: Path, reference: Reference, of: FullNetworks, **changes: Any) -> QualityProbe:
        manifest = TeacherManifest.read(world / "teacher.json")
        settings = Probe(**{**PROBE, "metrics": [], **changes})
        looks = Looks(get_family("sd3"), manifest.folder(), settings.metrics, torch.device("cpu"))
        return QualityProbe(
            settings,
            reference,
            of,
            looks if settings.metrics else None,
            seed=5,
            shift=manifest.shift,
            latent_shape=manifest.latent_shape,
            batch=4,
            accelerator=Accelerator(cpu=True),
        )

    def test_it_measures_the_average_and_leaves_everything_as_it_was(
        self, world: Path, reference: Reference
    ) -> None:
        of = networks(world)
        student = of.parameters("student")
        probe = self.probe(world, reference, of)
        average = {name: value.detach().clone() for name, value in student.items()}
        expected = probe.measure(student, average)
        with torch.no_grad():
            for value in student.values():
                value.mul_(1.5)
        broken = {name: value.detach().clone() for name, value in student.items()}
        before = {name: value.clone() for name, value in average.items()}
        assert probe.measure(student, average) == expected
        assert all(torch.equal(student[name], broken[name]) for name in student)
        assert all(torch.equal(average[name], before[name]) for name in student)
        worse = probe.measure(student, broken)
        assert worse["probe"] != expected["probe"]

    def test_it_is_the_frechet_distance_to_the_cached_latents(self, world: Path, reference: Reference) -> None:
        of = networks(world)
        student = of.parameters("student")
        average = {name: value.detach().clone() for name, value in student.items()}
        figures = self.probe(world, reference, of).measure(student, average)
        manifest = TeacherManifest.read(world / "teacher.json")
        noise = Draws(5, 0, range(6)).normal("probe", manifest.latent_shape)
        conditioning = reference.prompts.conditioning([0, 1, 0, 1, 0, 1])
        sigmas = 3 * torch.tensor([1.0, 0.5]) / (1 + 2 * torch.tensor([1.0, 0.5]))
        drawn = latent_features(draw_student(of, noise, conditioning, sigmas))
        target = latent_features(reference.cache.all()["latents"])
        scale = target.std(0)
        scale[scale == 0] = 1
        a, b = (drawn / scale).numpy(), (target / scale).numpy()
        expected = _frechet(a, b)
        assert figures["probe_steps2"] == pytest.approx(expected, rel=1e-3)
        assert figures["probe"] == pytest.approx((figures["probe_steps1"] + figures["probe_steps2"]) / 2)

    def test_it_says_how_pictures_look_beside_the_teachers(self, world: Path, reference: Reference) -> None:
        """The distance stays as it is; a look is the mean over decoded pictures, by that of the teacher's."""
        of = networks(world)
        student = of.parameters("student")
        average = {name: value.detach().clone() for name, value in student.items()}
        plain = self.probe(world, reference, of).measure(student, average)
        names = ["contrast", "colour_cast"]
        figures = self.probe(world, reference, of, metrics=names).measure(student, average)
        assert {name: figures[name] for name in plain} == plain
        more = [f"probe_{name}{end}" for name in names for end in ("_steps1", "_steps2", "")]
        assert list(figures) == [*plain, *more]

        manifest = TeacherManifest.read(world / "teacher.json")
        family = get_family("sd3")
        pipeline = family.load_pipeline(manifest.folder(), text=False, transformer=False)

        def seen(latents: Tensor) -> tuple[Tensor, Tensor]:
            images = (family.decode(pipeline, latents) * 255).round().to(torch.uint8)
            return contrast(images)[0].mean(), torch.stack(colour_cast(images)).mean(1)

        noise = Draws(5, 0, range(6)).normal("probe", manifest.latent_shape)
        conditioning = reference.prompts.conditioning([0, 1, 0, 1, 0, 1])
        ours = seen(draw_student(of, noise, conditioning, torch.ones(1)))
        each = reference.per_prompt
        wanted = [sample % 2 * each + sample // 2 for sample in range(min(6, 2 * each))]
        theirs = seen(reference.cache.rows(wanted)["latents"])
        assert figures["probe_contrast_steps1"] == pytest.approx((ours[0] / theirs[0] - 1).item(), abs=0.01)
        assert figures["probe_colour_cast_steps1"] == pytest.approx(
            (ours[1] - theirs[1]).norm().item(), rel=0.02
        )
        sizes = [abs(figures[f"probe_contrast_steps{steps}"]) for steps in (1, 2)]
        assert figures["probe_contrast"] == pytest.approx(sum(sizes) / 2)

    def test_its_noise_is_not_the_evaluations(self, world: Path, reference: Reference, monkeypatch) -> None:
        seen: list[Tensor] = []

        def draw(networks: FullNetworks, noise: Tensor, *rest: Any) -> Tensor:
            seen.append(noise)
            return noise

        monkeypatch.setattr("cdm.training.probe.draw_student", draw)
        probe = self.probe(world, reference, networks(world), steps=[1])
        probe.measure({}, {})
        drawn = torch.cat(seen)
        assert len(drawn) == PROBE["samples"]
        cached = reference.cache.all()["noise"]
        assert torch.cdist(drawn.flatten(1), cached.flatten(1)).min() > 1

    def test_fewer_samples_than_prompts_are_compared_with_latents_of_their_prompts(
        self, world: Path, reference: Reference, monkeypatch
    ) -> None:
        asked: list[int] = []
        rows = reference.cache.rows

        def recorded(indices: Any) -> dict[str, Tensor]:
            asked.extend(indices)
            return rows(indices)

        monkeypatch.setattr(reference.cache, "rows", recorded)
        monkeypatch.setattr(
            reference.prompts, "texts", ["one", "two", "three"]
        )  # samples: 2, of "one" and "two"
        self.probe(world, reference, networks(world), samples=2)
        assert asked == list(range(6))


def _frechet(a: Any, b: Any) -> float:
    """By the textbook: a square root of the product of covariances, here by its eigenvalues."""
    import numpy as np

    covariances = [np.cov(each, rowvar=False) for each in (a, b)]
    roots = np.sqrt(np.clip(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0, None)).sum()
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(covariances[0] + covariances[1]) - 2 * roots)


def test_the_probe_is_in_the_log_every_so_many_iterations_and_last(watched: Path) -> None:
    rows = read_log(watched)
    probed = [int(row["iteration"]) for row in rows if row["probe"]]
    assert probed == [4, 8, 12]
    assert all(
        float(row["probe_steps1"]) > 0 and float(row["probe_steps2"]) > 0 for row in rows if row["probe"]
    )


def test_watching_changes_neither_student_nor_log(world: Path, watched: Path, tmp_path: Path) -> None:
    """Nor does a run that wants no pictures leave those of another."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "iteration-000002.png").touch()
    run(world, tmp_path, with_changes(world, distill={"probe": Probe()}, runtime={"pictures_every": 0}))
    assert_same_student(tmp_path, watched)
    plain = [{k: v for k, v in row.items() if not k.startswith("probe")} for row in read_log(watched)]
    assert plain == read_log(tmp_path)
    assert files(tmp_path / "pictures") == {}


def test_pictures_are_sheets_of_every_column(watched: Path) -> None:
    pictures = files(watched / "pictures")
    assert sorted(pictures) == ["curves.png", "iteration-000008.png", "iteration-000012.png"]
    assert pictures["iteration-000008.png"] != pictures["iteration-000012.png"]
    with Image.open(watched / "pictures" / "iteration-000012.png") as sheet:
        assert sheet.width > 8 * 128  # teacher, two and two of the student, three predictions
        assert sheet.height > 2 * 128  # a row a prompt
    with Image.open(watched / "pictures" / "curves.png") as curves:
        assert curves.width > 500


def test_columns_show_what_they_say(world: Path, tmp_path: Path) -> None:
    from cdm.training.pictures import LEVEL, Gallery, Subject

    params = load(world / "params.yaml")
    inputs, of = gather(world, params), networks(world)
    gallery = Gallery(
        inputs.family,
        inputs.source,
        Subject.choose(params, inputs.evaluation, inputs.empty, inputs.latent_shape),
        of,
        seed=5,
        shift=inputs.shift,
        batch=1,
        accelerator=Accelerator(cpu=True),
        kept=tmp_path / "kept",
        out=tmp_path / "out",
    )
    gallery.open(0)
    student = of.parameters("student")
    average = {name: value.detach().clone() for name, value in student.items()}
    with torch.no_grad():
        for value in student.values():
            value.mul_(1.1)
    columns = gallery.latents(student, average)
    assert inputs.reference is not None
    cached = inputs.reference.cache.rows(
        [0, 3]
    )  # the first sample of each prompt, as the stage `latents` draws it
    torch.testing.assert_close(gallery.teacher, cached["latents"], atol=1e-4, rtol=1e-3)
    conditioning = inputs.evaluation.conditioning([0, 1])
    one = torch.ones(2)
    for name, role in (("student1", "student"), ("average1", "teacher")):  # the average is still the teacher
        velocity = of.velocity(role, cached["noise"], one, conditioning).detach()
        torch.testing.assert_close(columns[name], cached["noise"] - velocity, atol=1e-5, rtol=1e-4)
    noise = Draws(5, 0, [0, 1]).normal("pictures", inputs.latent_shape)
    x = (1 - LEVEL) * columns["student4"] + LEVEL * noise
    for role in ("student", "teacher", "fake"):
        expected = x - LEVEL * of.velocity(role, x, LEVEL * one, conditioning)
        torch.testing.assert_close(columns[f"x0_{role}"], expected.detach(), atol=1e-5, rtol=1e-4)


def test_times_are_beside_the_log(watched: Path, capsys) -> None:
    timing = json.loads((watched / "timing.json").read_text())
    assert timing["rounds"] == ITERATIONS / 2
    assert set(timing["seconds_in"]) == {"rollout", "teacher", "fake", "student", "other"}
    assert all(seconds > 0 for seconds in timing["seconds_in"].values())
    assert sum(timing["seconds_in"].values()) == pytest.approx(timing["seconds"])
    assert timing["samples_per_second"] == pytest.approx(ITERATIONS * 4 / timing["seconds"])
    begun = datetime.fromisoformat(timing["circumstances"]["date"])
    assert abs((datetime.now(UTC) - begun).total_seconds()) < 86400
    assert f"torch {torch.__version__}" in timing["circumstances"]["versions"]
    assert not any("second" in name for name in read_log(watched)[0])


class Clock:
    """A clock that each reading moves on by one second."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


def test_seconds_go_to_what_was_asked(world: Path, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    stopwatch = Stopwatch(torch.device("cpu"))
    plain = networks(world)
    timed = TimedNetworks(plain, stopwatch)
    shape = TeacherManifest.read(world / "teacher.json").latent_shape
    conditioning = PromptSet(world / "prompts" / "eval").conditioning([0])
    x, sigma = torch.zeros(1, *shape), torch.ones(1)
    with torch.no_grad():
        drawn = timed.velocity("student", x, sigma, conditioning)
        timed.velocity("student", x, sigma, conditioning)
        timed.velocity("teacher", x, sigma, conditioning)
    timed.backward("student", timed.velocity("student", x, sigma, conditioning).sum())
    timed.velocity("fake", x, sigma, conditioning)
    assert torch.equal(drawn, plain.velocity("student", x, sigma, conditioning))
    assert timed.parameters("fake") == plain.parameters("fake")
    assert stopwatch.read() == {"rollout": 2, "teacher": 1, "student": 2, "fake": 1}
    assert stopwatch.read() == {}


def test_on_cuda_events_take_the_time_and_the_device_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for the events: what they are asked, and when."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def elapsed_time(self, end: Event) -> float:
            assert calls[-1] == "synchronize"
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    stopwatch = Stopwatch(torch.device("cuda"))
    for name in ("teacher", "fake", "teacher"):
        with stopwatch.measure(name):
            calls.append("work")
    assert calls == ["record", "work", "record"] * 3
    assert stopwatch.read() == {"teacher": 3.0, "fake": 1.5}
    assert stopwatch.read() == {}
    assert calls.count("synchronize") == 1


def test_summary_says_where_the_time_went(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    watched = Watch(Accelerator(cpu=True), Stopwatch(torch.device("cpu")), samples=12, places=None)
    for _ in range(2):
        with watched.round(), watched.stopwatch.measure("rollout"):
            clock.now += 8
    assert watched.summary() == "2 rounds in 22 s, 1.1 samples/s: rollout 82%, other 18%"


def test_an_interrupted_training_counts_the_rounds_that_its_student_learnt_in(
    tmp_path: Path, monkeypatch
) -> None:
    """Not those after its checkpoint, which are trained again, nor a line that a crash has torn."""
    clock, kept = Clock(), tmp_path / "times.jsonl"
    monkeypatch.setattr(watch, "time", clock)

    def run_rounds(resumed: int, rounds: dict[int, float]) -> Watch:
        watched = Watch(
            Accelerator(cpu=True), Stopwatch(torch.device("cpu")), samples=12, places=None, kept=kept
        )
        with watched.running(resumed):
            for iteration, seconds in rounds.items():
                with watched.round():
                    clock.now += seconds - 1  # reading it takes the last one
                watched.after_round([{"iteration": iteration}], {}, {})
        return watched

    first = run_rounds(0, {2: 10, 4: 20, 6: 40})
    assert (first.timing()["rounds"], first.timing()["seconds"]) == (3, 70)
    with kept.open("a") as file:
        file.write('{"iteration": 8, "sec')
    resumed = run_rounds(4, {6: 100, 8: 200})
    assert (resumed.timing()["rounds"], resumed.timing()["seconds"]) == (4, 330)
    assert run_rounds(8, {}).timing()["seconds"] == 330
    assert run_rounds(0, {2: 5}).timing()["seconds"] == 5, "begun anew"


def scripted_probe(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Tensor]]:
    """Replaces figures so that the second of three probes is the best; returns each probed average by its figure.

    The log's curves are written as numbers: to draw them takes longer than all else in such a run.
    """
    figures: dict[float, float] = {}
    averages: dict[int, dict[str, Tensor]] = {}

    def measure(self: QualityProbe, student: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, float]:
        key = round(float(sum(value.double().abs().sum() for value in average.values())), 9)
        if key not in figures:
            figures[key] = [3.0, 1.0, 2.0][len(figures)]
        figure = figures[key]
        averages.setdefault(len(figures), {name: value.clone() for name, value in average.items()})
        return {"probe_steps1": figure, "probe": figure}

    monkeypatch.setattr(QualityProbe, "measure", measure)
    monkeypatch.setattr(pictures, "losses", lambda curves: repr(curves).encode())
    return averages


@pytest.mark.slow
def test_keep_best_saves_the_average_of_the_best_probe(world: Path, tmp_path: Path, monkeypatch) -> None:
    averages = scripted_probe(monkeypatch)
    run(world, tmp_path, with_changes(world, distill={"keep": "best"}))
    saved = weights(tmp_path)
    assert all(torch.equal(saved[name], value) for name, value in averages[2].items())
    assert any(not torch.equal(saved[name], value) for name, value in averages[3].items())


def test_keep_best_may_go_by_a_measure_of_pictures(world: Path, tmp_path: Path, monkeypatch) -> None:
    """The log has them; the student that is kept is the one that the named measure chooses, not the distance."""
    measure, averages = QualityProbe.measure, []

    def recorded(self: QualityProbe, student: dict[str, Tensor], average: dict[str, Tensor]) -> Any:
        found = measure(self, student, average)
        averages.append({name: value.clone() for name, value in average.items()})
        return found | {"probe": 10.0 - len(averages), "probe_contrast": [2.0, 0.5, 1.0][len(averages) - 1]}

    monkeypatch.setattr(QualityProbe, "measure", recorded)
    probe = Probe(**PROBE, best_by="contrast")
    params = with_changes(world, distill={"keep": "best", "probe": probe}, runtime={"pictures_every": 0})
    run(world, tmp_path, params)
    saved = weights(tmp_path)
    assert all(torch.equal(saved[name], value) for name, value in averages[1].items())
    assert any(not torch.equal(saved[name], value) for name, value in averages[2].items())
    probed = [row for row in read_log(tmp_path) if row["probe"]]
    assert [float(row["probe_contrast"]) for row in probed] == [2.0, 0.5, 1.0]
    assert all(row["probe_colour_cast_steps2"] for row in probed)


def test_deviations_are_relative_or_lengths() -> None:
    student, teacher = torch.tensor([0.3, 5.0, -2.0, 0.9]), torch.tensor([0.25, 2.0, 2.0, 1.0])
    found = deviations(["contrast", "colour_cast", "sharpness"], student.double(), teacher.double())
    assert found == pytest.approx({"contrast": 0.2, "colour_cast": 5.0, "sharpness": -0.1})


def test_resumes_bit_for_bit_with_probe_and_pictures(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best average comes from before the crash, so it must have been in the checkpoint."""
    scripted_probe(monkeypatch)
    params = with_changes(world, distill={"keep": "best"})
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run(world, whole, params)
    crash_rounds(monkeypatch, 10)
    with pytest.raises(RuntimeError, match="crash 10"):
        run(world, torn, params)
    (torn / "pictures" / "iteration-000008.png").unlink()  # as DVC does before a stage
    run(world, torn, params)
    assert_same_student(torn, whole)
    assert (torn / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    assert files(torn / "pictures") == files(whole / "pictures")
    rounds = {json.loads((out / "timing.json").read_text())["rounds"] for out in (whole, torn)}
    assert rounds == {ITERATIONS / 2}


def test_a_sharded_network_works_with_exchanged_parameters_and_then_with_its_own() -> None:
    succeed_in_two_processes("tests.run_exchange")


@pytest.mark.slow
def test_two_processes_probe_as_one(world: Path, watched: Path, tmp_path: Path) -> None:
    succeed_in_two_processes("tests.run_distill", world, tmp_path, tmp_path / "ck")
    first = {row["iteration"]: row for row in read_log(watched)}["4"]
    mine = {row["iteration"]: row for row in read_log(tmp_path)}["4"]
    for name in ("probe_steps1", "probe_steps2", "probe", "probe_contrast", "probe_colour_cast"):
        assert float(mine[name]) == pytest.approx(float(first[name]), rel=1e-3)
    assert sorted(files(tmp_path / "pictures")) == sorted(files(watched / "pictures"))


def test_a_probe_without_its_latents_is_refused_at_once(world: Path, tmp_path: Path) -> None:
    manifest = TeacherManifest.read(world / "teacher.json")
    with pytest.raises(CdmError, match="nothing: no such folder"):
        Inputs.gather(load(world / "params.yaml"), manifest, world / "prompts", latents=tmp_path / "nothing")
    other = TeacherManifest(**{**vars(manifest), "files": {}})
    with pytest.raises(CdmError, match="drawn for another teacher"):
        Inputs.gather(load(world / "params.yaml"), other, world / "prompts")


def test_latents_belong_to_the_experiment_only_where_they_are_probed(world: Path) -> None:
    probed, unprobed = load(world / "params.yaml"), with_changes(world, distill={"probe": Probe()})
    without = gather(world, unprobed)
    assert without.reference is None
    assert gather(world, probed).digests[:-1] == without.digests


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What a tracker, which stands in for TensorBoard, was told."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    told: list[tuple[str, Any]] = []

    class Recorder(tracking.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True
        tracker = None

        def __init__(self, run_name: str, logging_dir: str, **settings: Any) -> None:
            super().__init__()
            told.append(("start", (run_name, Path(logging_dir))))

        def start(self) -> None: ...

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            told.append(("log", {**values, "step": step}))

        def finish(self) -> None:
            told.append(("finish", None))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    return told


def test_a_tracker_hears_every_round(world: Path, tmp_path: Path, tracker: list[tuple[str, Any]]) -> None:
    params = with_changes(world, runtime={"tracker": "tensorboard", "pictures_every": 0})
    run(world, tmp_path, params)
    assert [kind for kind, _ in tracker] == ["start", *["log"] * (ITERATIONS // 2), "finish"]
    name, folder = tracker[0][1]
    assert (name, folder.parent) == ("cdm", tmp_path / "trackers")
    figures = [values for kind, values in tracker if kind == "log"]
    assert [values["step"] for values in figures] == list(range(2, ITERATIONS + 1, 2))
    assert [float(row["loss_fake"]) for row in read_log(tmp_path)] == [
        values["loss_fake"] for values in figures
    ]
    assert {"samples_per_second", "seconds_rollout", "seconds_teacher", "probe"} <= figures[-1].keys()


def test_a_tracker_is_ended_when_training_fails(
    world: Path, tmp_path: Path, tracker: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_rounds(monkeypatch, 4)
    with pytest.raises(RuntimeError, match="crash 4"):
        run(world, tmp_path, with_changes(world, runtime={"tracker": "tensorboard"}))
    assert tracker[-1] == ("finish", None)
    assert (tmp_path / "timing.json").exists()


@pytest.mark.slow
def test_tensorboard_itself_reads_what_was_logged(world: Path, tmp_path: Path) -> None:
    """By its own reader: a point for each row of the log that has the figure."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(world, tmp_path, with_changes(world, runtime={"tracker": "tensorboard", "pictures_every": 0}))
    (folder,) = {path.parent for path in (tmp_path / "trackers").rglob("events.out.tfevents.*")}
    events = reader.EventAccumulator(str(folder)).Reload()
    rows = read_log(tmp_path)
    for name in ("loss_fake", "loss_cdm", "grad_norm_student", "probe_steps2"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        expected = {int(row["iteration"]): float(row[name]) for row in rows if row[name]}
        assert logged == pytest.approx(expected, rel=1e-6)
    assert {"samples_per_second", "seconds_teacher"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_the_first_stage(
    world: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdm.preflight.find_spec", lambda package: None)
    with pytest.raises(CdmError) as caught:
        check_paths(with_changes(world, runtime={"tracker": name}))
    lines = str(caught.value).splitlines()
    assert f"runtime.tracker: {name} is not installed: pip install {name}, or set it to null" in lines
