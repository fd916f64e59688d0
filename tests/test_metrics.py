"""The chosen measures: tiny random models of the real classes, exact cases, and what is said of absent ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cdm.errors import CdmError
from cdm.evaluation import distances, report
from cdm.evaluation.features import PixelFeatures
from cdm.evaluation.metrics import SCORES, Chosen, measure_chosen
from cdm.evaluation.models import clip as clip_models
from cdm.evaluation.models import lpips as lpips_models
from cdm.evaluation.models.base import pretrained, read_weights
from cdm.evaluation.models.clip import Aesthetic, Clip, ClipFeatures
from cdm.evaluation.models.dinov2 import Dinov2Features
from cdm.evaluation.models.inception import InceptionFeatures, resize
from cdm.evaluation.models.lpips import Lpips
from cdm.evaluation.quality import evaluate
from cdm.evaluation.results import join
from cdm.evaluation.samples import RealPictures, Samples, open_samples
from cdm.params import Metric, MetricModels, Params, ParamsError, parse
from cdm.preflight import _GET, MODELS_OF, check_paths, local_model
from scorers import convert_hps
from tests.metric_models import write_aesthetic, write_clip, write_dinov2, write_inception, write_lpips
from tests.sample_sets import PER_PROMPT, ROOT, noise_pictures, parameters, write_set

CPU = torch.device("cpu")
TEXTS = [f"a {ink} {digit} on {paper} paper" for ink in ("red", "blue") for digit in ("zero", "one", "two")
         for paper in ("black", "white")][:9]  # fmt: skip
COUNT = len(TEXTS) * PER_PROMPT


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> MetricModels:
    """Every model of the metrics; PickScore and HPS are other CLIPs than the plain one."""
    folder = tmp_path_factory.mktemp("models")
    return MetricModels(
        clip=str(write_clip(folder / "clip")),
        dinov2=str(write_dinov2(folder / "dinov2")),
        pick_score=str(write_clip(folder / "pick", seed=5)),
        hps=str(write_clip(folder / "hps", seed=6)),
        inception=str(write_inception(folder / "inception.pth")),
        aesthetic=str(write_aesthetic(folder / "aesthetic.pth")),
        lpips=str(write_lpips(folder / "lpips")),
    )


@pytest.fixture(scope="module")
def clip(models: MetricModels) -> Clip:
    return Clip(Path(models.clip), CPU)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """9 prompts of 4 samples: the student at 1 and 4 steps, the teacher at 4 and 50."""
    folder = tmp_path_factory.mktemp("sets")
    for seed, (model, steps) in enumerate([("student", 1), ("student", 4), ("teacher", 4), ("teacher", 50)]):
        write_set(folder, model, steps, noise_pictures(seed, COUNT, size=70))
    return open_samples(parameters(), folder, TEXTS)


def choose(models: MetricModels, *metrics: Metric, **evaluate: Any) -> Params:
    return parameters(judge=None, real=None, metrics=list(metrics), models=models, resamples=20, **evaluate)


def measure(params: Params, samples: Samples, tmp_path: Path, real: RealPictures | None = None) -> Chosen:
    found = measure_chosen(params, samples, real, tmp_path / "answers")
    assert found is not None
    return found


def test_clip_looks_at_pictures_as_its_processor_says(clip: Clip) -> None:
    """Against the model's own forward on pixels that PIL resized and cut."""
    import numpy as np
    from PIL import Image

    picture = noise_pictures(7, 1, size=40)[0, :, :, :30]  # 40 high, 30 wide
    image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((16, 21), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, 2:18].float() / 255
    mean, std = (
        torch.tensor(getattr(clip.processor, name))[:, None, None] for name in ("image_mean", "image_std")
    )
    tokens = clip.tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        output = clip.model(**tokens, pixel_values=((pixels - mean) / std)[None])
    assert torch.allclose(clip.images(picture[None]).float(), output.image_embeds, atol=1e-5)
    assert torch.allclose(clip.texts(TEXTS[:1]).float(), output.text_embeds, atol=1e-5)
    whole = clip.images(picture[None], whole=True)
    assert whole.norm().item() == pytest.approx(1)
    assert (whole - clip.images(picture[None])).abs().max() > 1e-3


def test_scores_are_functions_of_the_cosine(clip: Clip) -> None:
    images, prompts = noise_pictures(8, 3, size=20), [TEXTS[0], TEXTS[1], TEXTS[0]]
    cosine = (clip.images(images) * clip.texts(prompts)).sum(1)
    assert cosine.std() > 1e-4
    expected = {
        clip_models.clip_score: 100 * cosine.clamp(min=0),
        clip_models.pick_score: clip.model.logit_scale.exp().item() * cosine,
        clip_models.hps: cosine,
    }
    for make, scores in expected.items():
        assert torch.allclose(make(clip, "name")(images, prompts), scores)


def test_hps_is_read_from_the_names_of_open_clip(clip: Clip) -> None:
    """The tiny CLIPModel written as open_clip would, and back."""
    ours = clip.model.state_dict()
    theirs = {name: ours[there] for name, there in convert_hps.PLAIN.items()}
    theirs["visual.proj"] = ours["visual_projection.weight"].T
    theirs["text_projection"] = ours["text_projection.weight"].T
    for prefix, tower in (("visual.", "vision_model"), ("", "text_model")):
        for number in range(2):
            layer = f"{tower}.encoder.layers.{number}."
            block = f"{prefix}transformer.resblocks.{number}."
            for kind in ("weight", "bias"):
                attention = [ours[f"{layer}self_attn.{each}_proj.{kind}"] for each in ("q", "k", "v")]
                theirs[f"{block}attn.in_proj_{kind}"] = torch.cat(attention)
                theirs[f"{block}attn.out_proj.{kind}"] = ours[f"{layer}self_attn.out_proj.{kind}"]
                theirs[f"{block}mlp.c_fc.{kind}"] = ours[f"{layer}mlp.fc1.{kind}"]
                theirs[f"{block}mlp.c_proj.{kind}"] = ours[f"{layer}mlp.fc2.{kind}"]
                theirs[f"{block}ln_1.{kind}"] = ours[f"{layer}layer_norm1.{kind}"]
                theirs[f"{block}ln_2.{kind}"] = ours[f"{layer}layer_norm2.{kind}"]
    converted = convert_hps.convert(theirs)
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], ours[name]) for name in ours)
    with pytest.raises(KeyError):
        convert_hps.convert({"visual.attn_pool.query": torch.zeros(1)})


def test_long_prompts_are_cut_not_refused(clip: Clip) -> None:
    assert clip.texts(["a red zero on black paper " * 40]).shape == (1, clip.model.config.projection_dim)


def test_the_aesthetic_head_is_its_layers_one_after_the_other(clip: Clip, models: MetricModels) -> None:
    images = noise_pictures(9, 2, size=20)
    weights = read_weights(Path(str(models.aesthetic)))
    hidden = clip.images(images)
    for layer in (0, 2, 3):
        hidden = (
            hidden @ weights[f"layers.{layer}.weight"].double().T + weights[f"layers.{layer}.bias"].double()
        )
    head = Aesthetic(clip, Path(str(models.aesthetic)), "name")
    assert torch.allclose(head(images, ["", ""]), hidden[:, 0])


def test_an_aesthetic_head_of_another_model_is_refused(clip: Clip, tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.zeros(1, 768), "layers.0.bias": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(CdmError, match=r"head\.pth: layers of \[12, 1\] do not lead from CLIP's 12 features"):
        Aesthetic(clip, tmp_path / "head.pth", "name")
    torch.save({"weight": torch.zeros(1, 12)}, tmp_path / "head.pth")
    with pytest.raises(CdmError, match="no numbered linear layers"):
        Aesthetic(clip, tmp_path / "head.pth", "name")


def test_dinov2_gives_its_class_token(models: MetricModels) -> None:
    model = Dinov2Features(Path(models.dinov2), CPU, "name")
    images = noise_pictures(10, 2, size=28)  # its own size: nothing to resize
    mean, std = (
        torch.tensor(getattr(model.processor, name))[:, None, None] for name in ("image_mean", "image_std")
    )
    with torch.no_grad():
        expected = model.model(pixel_values=(images / 255 - mean) / std).pooler_output
    assert torch.allclose(model(images).float(), expected, atol=1e-5)
    assert model(noise_pictures(11, 2, size=50)).shape == (2, 16)


@pytest.fixture(scope="module")
def features(models: MetricModels) -> InceptionFeatures:
    return InceptionFeatures(Path(str(models.inception)), CPU)


class TestInception:
    def test_features_of_different_pictures_differ(self, features: InceptionFeatures) -> None:
        found = features(noise_pictures(12, 2, size=32))
        assert found.shape == (2, 2048)
        assert (found[0] - found[1]).abs().max() > 0.05

    def test_layers_are_those_of_the_published_weights(self, features: InceptionFeatures) -> None:
        """Some of their names and shapes, and the number of parameters of FID's InceptionV3 with its 1,008 classes."""
        shapes = {name: tuple(weight.shape) for name, weight in features.network.state_dict().items()}
        assert shapes["Conv2d_4a_3x3.conv.weight"] == (192, 80, 3, 3)
        assert shapes["Mixed_5b.branch5x5_2.bn.running_mean"] == (64,)
        assert shapes["Mixed_6a.branch3x3.conv.weight"] == (384, 288, 3, 3)
        assert shapes["Mixed_6e.branch7x7dbl_4.conv.weight"] == (192, 192, 7, 1)
        assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
        assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
        assert shapes["fc.weight"] == (1008, 2048)
        assert sum(weight.numel() for weight in features.network.parameters()) == 23_850_960

    def test_average_pooling_leaves_out_what_is_beyond_the_border(self, features: InceptionFeatures) -> None:
        ones = torch.ones(1, 1, 4, 4)
        assert torch.equal(features.network.Mixed_5b.pool(ones), ones)
        ramp = torch.arange(9.0).reshape(1, 1, 3, 3)
        assert features.network.Mixed_7b.pool(ramp)[0, 0, 0, 0] == 2  # of 0, 1, 3, 4
        assert features.network.Mixed_7c.pool(ramp)[0, 0, 0, 0] == 4

    def test_other_weights_are_refused(self, tmp_path: Path) -> None:
        torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
        with pytest.raises(CdmError, match=r"other\.pth: other weights than expected"):
            InceptionFeatures(tmp_path / "other.pth", CPU)


def test_resizing_is_that_of_tensorflow_1() -> None:
    """Pixel i lies at i * size / side: 0, 0.75, 1.5, 2.25 of a ramp, which beyond its last pixel stays the same."""
    ramp = torch.tensor([[0.0, 1, 2]]).expand(3, 3).expand(1, 3, 3, 3)
    row = torch.tensor([0.0, 0.75, 1.5, 2.0])
    assert torch.allclose(resize(ramp, 4), row.expand(1, 3, 4, 4))
    assert torch.allclose(resize(ramp.transpose(2, 3), 4), row[:, None].expand(1, 3, 4, 4))
    assert torch.equal(resize(ramp, 3), ramp)


def test_lpips_is_the_published_formula(models: MetricModels) -> None:
    """Summed over layers: the mean over places of the weighted squared difference of normalised activations."""
    model = Lpips(Path(str(models.lpips)), CPU)
    images = noise_pictures(13, 3, size=70)
    pixels = images.float() / 255 * 2 - 1
    pixels = (pixels - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor(
        [0.458, 0.448, 0.450]
    )[:, None, None]
    linear = torch.load(Path(str(models.lpips)) / lpips_models.LINEAR)
    relus = [i for i, layer in enumerate(model.network) if isinstance(layer, nn.ReLU)]

    def distance(a: int, b: int) -> float:
        total = 0.0
        for number, end in enumerate(relus):
            activations = model.network[: end + 1](pixels)
            unit = F.normalize(activations, dim=1)
            squares = (unit[a] - unit[b]).square() * linear[f"lin{number}.model.1.weight"][0]
            total += squares.sum(0).mean().item()
        return total

    with torch.no_grad():
        expected = (distance(0, 1) + distance(0, 2) + distance(1, 2)) / 3
    assert model.mean_distance(images) == pytest.approx(expected, rel=1e-4)
    assert model.mean_distance(images[[0, 0]]) == pytest.approx(0, abs=1e-9)


def test_folders_that_hold_another_model_are_refused(models: MetricModels, tmp_path: Path) -> None:
    from transformers import CLIPModel

    with pytest.raises(CdmError, match=r"cannot be loaded as a CLIPModel|holds no whole CLIPModel"):
        pretrained(CLIPModel, Path(models.dinov2), CPU)
    with pytest.raises(CdmError, match="cannot be loaded as a CLIPModel"):
        pretrained(CLIPModel, tmp_path, CPU)


class Planted:
    """What a pickle could do: run code."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("planted"),))


def test_weights_are_read_without_running_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Planted()}, tmp_path / "bad.pth")
    (tmp_path / "noise.safetensors").write_bytes(b"no")
    torch.save([1], tmp_path / "list.pth")
    for name, reason in (
        ("bad.pth", "not a readable file of weights"),
        ("noise.safetensors", "not a readable file of weights"),
        ("list.pth", "not a dictionary of tensors"),
        ("none.pth", "not a readable file of weights"),
    ):
        with pytest.raises(CdmError, match=f"{name}: {reason}"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "planted").exists()


def test_nothing_chosen_measures_nothing(samples: Samples, tmp_path: Path) -> None:
    params = parameters(judge=None, real=None)
    assert measure_chosen(params, samples, None, tmp_path) is None
    evaluation = evaluate(params, samples, None, PixelFeatures())
    assert join(evaluation, None) == evaluation.quality


def test_figures_against_the_teacher(models: MetricModels, samples: Samples, tmp_path: Path) -> None:
    """Distances are those of the raw features to the teacher's full-length set, which has none to itself."""
    params = choose(models, "frechet_dinov2", "kernel_dinov2", "prdc_dinov2", "vendi_dinov2", "cmmd")
    chosen = measure(params, samples, tmp_path)
    model = Dinov2Features(Path(models.dinov2), CPU, "name")
    ours, theirs = (torch.cat([*map(model, each.batches())]) for each in (samples.student[0], samples.full))
    groups = torch.arange(COUNT) // PER_PROMPT
    row = chosen.figures["student"]["steps1"]
    assert row["frechet_dinov2"] == pytest.approx(distances.frechet_distance(ours, theirs), rel=1e-5)
    assert row["kernel_dinov2"] == pytest.approx(
        distances.kernel_distance(ours, theirs, groups, groups), rel=1e-3
    )
    for name, value in distances.manifold(theirs, ours, 2)._asdict().items():
        assert row[f"{name}_dinov2"] == pytest.approx(value, rel=1e-5)
    assert row["vendi_dinov2"] == pytest.approx(distances.vendi(ours), rel=1e-5)
    within = [distances.vendi(each) for each in ours.split(PER_PROMPT)]
    assert row["vendi_in_prompt_dinov2"] == pytest.approx(sum(within) / len(within), rel=1e-5)
    embed = ClipFeatures(Clip(Path(models.clip), CPU), "name")
    embedded = (torch.cat([*map(embed, each.batches())]) for each in (samples.student[0], samples.full))
    assert row["cmmd"] == pytest.approx(distances.cmmd(*embedded), rel=1e-4)
    full = chosen.figures["teacher"]["steps50"]
    assert full.keys() == {"vendi_dinov2", "vendi_in_prompt_dinov2"}
    assert chosen.differences["student"]["steps1"].keys() == full.keys()
    assert chosen.intervals["student"]["steps1"].keys() == row.keys()
    low, high = chosen.intervals["student"]["steps1"]["frechet_dinov2"]
    assert low < row["frechet_dinov2"] < high


def test_figures_against_real_pictures(models: MetricModels, samples: Samples, tmp_path: Path) -> None:
    """One real picture a prompt, as with captions: the teacher has a distance too, and kernels take no groups."""
    real = RealPictures(noise_pictures(30, len(TEXTS), size=70), torch.arange(len(TEXTS)))
    chosen = measure(choose(models, "frechet_dinov2", "kernel_dinov2"), samples, tmp_path, real)
    model = Dinov2Features(Path(models.dinov2), CPU, "name")
    ours, theirs = torch.cat([*map(model, samples.full.batches())]), model(real.images)
    row = chosen.figures["teacher"]["steps50"]
    assert row["frechet_dinov2"] == pytest.approx(distances.frechet_distance(ours, theirs), rel=1e-5)
    assert row["kernel_dinov2"] == pytest.approx(distances.kernel_distance(ours, theirs), rel=1e-3)
    difference, low, high = chosen.differences["student"]["steps4"]["frechet_dinov2"]
    student = chosen.figures["student"]["steps4"]["frechet_dinov2"]
    assert difference == pytest.approx(student - row["frechet_dinov2"], abs=1e-4)
    assert low < difference < high


def test_scores_of_every_picture_and_their_paired_differences(
    models: MetricModels, samples: Samples, tmp_path: Path
) -> None:
    chosen = measure(choose(models, *SCORES, "lpips"), samples, tmp_path)
    clip, prompts = Clip(Path(models.clip), CPU), [text for text in TEXTS for _ in range(PER_PROMPT)]
    means = {
        each.key: clip_models.clip_score(clip, "")(torch.cat([*each.batches()]), prompts).mean().item()
        for each in (samples.student[0], samples.full)
    }
    row, full = chosen.figures["student"]["steps1"], chosen.figures["teacher"]["steps50"]
    assert list(row) == [*SCORES, "lpips_diversity"] == list(full)
    assert row["clip_score"] == pytest.approx(means["steps1"], rel=1e-4)
    assert len({row[name] for name in SCORES}) == 4
    difference, low, high = chosen.differences["student"]["steps1"]["clip_score"]
    assert difference == pytest.approx(means["steps1"] - means["steps50"], rel=1e-3, abs=1e-5)
    assert low < difference < high
    assert dict(chosen.sources)["aesthetic"] == f"aesthetic.pth on CLIP ({models.clip})"
    diversity = Lpips(Path(str(models.lpips)), CPU)
    values = [diversity.mean_distance(each) for each in torch.cat([*samples.full.batches()]).split(PER_PROMPT)]
    assert full["lpips_diversity"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_quality_json_keeps_its_rows_and_gains_the_figures(
    models: MetricModels, samples: Samples, tmp_path: Path
) -> None:
    params = choose(models, "clip_score")
    evaluation = evaluate(params, samples, None, PixelFeatures())
    chosen = measure(params, samples, tmp_path)
    joined = join(evaluation, chosen)
    assert list(joined) == ["student", "teacher", "intervals", "differences"]
    for model, rows in evaluation.quality.items():
        for key, row in rows.items():
            assert list(joined[model][key])[: len(row)] == list(row)
            assert joined[model][key].items() >= row.items()
            assert "clip_score" in joined[model][key]
    assert json.loads(json.dumps(joined)) == joined
    page = report.render(
        params, report.Teacher("t", None, 1), samples, evaluation,
        {name: report.Picture(b"", b"") for name in ("overview", "contact_sheet", "quality", "losses")}, chosen,
    )  # fmt: skip
    value = f"{chosen.figures['student']['steps4']['clip_score']:.3g}"
    assert "Chosen measures" in page
    assert value in page[page.index("Chosen measures") :]
    assert f"{len(TEXTS)} prompts" in page
    plain = report.render(
        params, report.Teacher("t", None, 1), samples, evaluation,
        {name: report.Picture(b"", b"") for name in ("overview", "contact_sheet", "quality", "losses")},
    )  # fmt: skip
    assert "Chosen measures" not in plain


def test_every_figure_has_a_column_of_the_report(
    models: MetricModels, samples: Samples, tmp_path: Path
) -> None:
    known = {column.key for column in report.CHOSEN}
    fast = [metric for metric in get_args(Metric) if "inception" not in metric]
    chosen = measure(choose(models, *fast), samples, tmp_path)
    assert {name for rows in chosen.figures.values() for row in rows.values() for name in row} <= known


def test_too_few_pictures_for_the_neighbours(models: MetricModels, samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(CdmError, match="needs more than the 16 pictures of half of the prompts"):
        measure(choose(models, "prdc_dinov2", neighbours=16), samples, tmp_path)


class TestAbsent:
    """A model that is not here is named with the command that gets it, by every stage and by `cdm params check`."""

    def problems(self, metrics: list[Metric], **models: str | None) -> list[str]:
        with pytest.raises(CdmError) as error:
            check_paths(parameters(metrics=metrics, models=MetricModels(**models)))
        return str(error.value).splitlines()

    def test_every_metric_says_what_it_needs(self) -> None:
        assert MODELS_OF.keys() == set(get_args(Metric))
        assert {key for keys in MODELS_OF.values() for key in keys} == set(MetricModels.model_fields)

    def test_the_page_names_every_metric_model_and_command(self) -> None:
        page = (ROOT / "docs/evaluation.md").read_text()
        named = {metric for metric in get_args(Metric) if not metric.endswith("_dinov2")} | {
            *MetricModels.model_fields
        }
        assert [name for name in sorted(named) if f"`{name}`" not in page] == []
        assert "the same with `_dinov2`" in page
        addresses = [address for command in _GET.values() for address in re.findall(r"https://\S+", command)]
        assert len(addresses) == 4
        assert [address for address in addresses if address not in page] == []

    def test_a_model_of_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        (line,) = self.problems(["clip_score", "cmmd"], clip="some-org/clip@main")
        assert "evaluate.models.clip: some-org/clip@main: not in the hub's cache" in line
        assert "evaluate.metrics has clip_score, cmmd" in line
        command = "hf download some-org/clip --revision main"
        # The program takes one pattern an option: further ones would be names of files.
        patterns = "--include '*.json' --include '*.txt' --include '*.safetensors'"
        assert f"`{command} {patterns}`" in line

    def test_models_that_are_files(self) -> None:
        lines = self.problems(
            ["frechet_inception", "aesthetic", "lpips", "hps"], clip=str(ROOT), aesthetic="none.pth"
        )
        assert len(lines) == 5
        text = "\n".join(lines)
        for expected in (
            "evaluate.models.inception: no model is named",
            "evaluate.models.aesthetic: none.pth: no such file or folder",
            "evaluate.models.lpips: no model is named",
            "evaluate.models.hps: no model is named",
            "has no config.json, preprocessor_config.json",
        ):
            assert expected in text
        assert len(re.findall(r"get it with `(?:curl|mkdir|hf download)", text)) == 4

    def test_what_is_here_is_no_problem(self, models: MetricModels) -> None:
        check_paths(parameters(metrics=list(get_args(Metric)), models=models))

    def test_a_folder_of_another_kind(self, models: MetricModels) -> None:
        (line,) = self.problems(["lpips"], lpips=models.clip)
        assert "has no alexnet-owt-7be5be79.pth, alex.pth" in line

    def test_the_hub_s_cache_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        repository = tmp_path / "models--some-org--clip"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text("c0ffee" * 6 + "beef")
        (repository / "snapshots" / ("c0ffee" * 6 + "beef")).mkdir(parents=True)
        found = local_model("some-org/clip")
        assert found == repository / "snapshots" / ("c0ffee" * 6 + "beef")
        assert local_model("some-org/other") is None
        assert local_model("no such file") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["cmmd", "cmmd"]}, "metrics names something twice"),
        ({"metrics": ["fid"]}, "evaluate.metrics.0: input should be"),
        ({"scorers": [{"name": "cmmd", "command": "x"}]}, "a scorer is called cmmd, as a metric is"),
        ({"scorers": [{"name": "a b", "command": "x"}]}, "string should match"),
        ({"models": {"clipp": "x"}}, "unknown key"),
    ],
)
def test_parameters_that_cannot_be(change: dict[str, Any], message: str) -> None:
    values = parameters().model_dump()
    with pytest.raises(ParamsError, match=re.escape(message)):
        parse(values | {"evaluate": values["evaluate"] | change})


def test_lpips_needs_two_pictures_of_a_prompt() -> None:
    values = parameters(metrics=["lpips"]).model_dump()
    with pytest.raises(
        ParamsError, match=r"lpips, which compares pictures of one prompt: set latents\.per_prompt"
    ):
        parse(values | {"latents": values["latents"] | {"per_prompt": 1}})
