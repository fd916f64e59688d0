"""The chosen measures: tiny random models of the real classes, exact cases, and what is said of absent ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cdm.errors import CdmError
from cdm.evaluation import distances, report, sheets
from cdm.evaluation.features import PixelFeatures
from cdm.evaluation.making import Making
from cdm.evaluation.metrics import Chosen, measure_chosen
from cdm.evaluation.models import clip as clip_models
from cdm.evaluation.models import lpips as lpips_models
from cdm.evaluation.models.base import Crops, pretrained, read_weights
from cdm.evaluation.models.clip import Aesthetic, AestheticHead, Clip
from cdm.evaluation.models.dinov2 import Dinov2Features
from cdm.evaluation.models.inception import InceptionFeatures, resize
from cdm.evaluation.models.lpips import Lpips
from cdm.evaluation.results import join
from cdm.evaluation.samples import RealPictures, Samples
from cdm.external import record_evaluation
from cdm.measures import JUDGED, MEASURES, MODELS, Measure, Quantity, basics, by_judge, load, quantities
from cdm.models import hps as hps_models
from cdm.models import published
from cdm.models.manifest import TeacherManifest
from cdm.models.metric_models import local_model, without_missing
from cdm.params import MetricModels, Params, ParamsError, Runtime, ScorerProcess, parse
from cdm.preflight import check_paths
from cdm.system.circumstances import Circumstances
from cdm.system.files import Memory
from tests.metric_models import write_aesthetic, write_clip, write_dinov2, write_inception, write_lpips
from tests.sample_sets import PER_PROMPT, ROOT, evaluated, noise_pictures, open_sets, parameters, write_set

CPU = torch.device("cpu")
RUNTIME = Runtime(device="cpu")
TEXTS = [f"a {ink} {digit} on {paper} paper" for ink in ("red", "blue") for digit in ("zero", "one", "two")
         for paper in ("black", "white")][:9]  # fmt: skip
COUNT = len(TEXTS) * PER_PROMPT
SCORES = [name for name, measure in MEASURES.items() if measure.kind == "score"]


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
    return Clip(Path(models.clip), CPU, "name")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """9 prompts of 4 samples: the student at 1 and 4 steps, the teacher at 4 and 50."""
    folder = tmp_path_factory.mktemp("sets")
    for seed, (model, steps) in enumerate([("student", 1), ("student", 4), ("teacher", 4), ("teacher", 50)]):
        write_set(folder, model, steps, noise_pictures(seed, COUNT, size=70))
    return open_sets(parameters(), folder, TEXTS)


def choose(models: MetricModels, *metrics: str, **evaluate: Any) -> Params:
    return parameters(judge=None, real=None, metrics=list(metrics), models=models, resamples=20, **evaluate)


def measure(params: Params, samples: Samples, tmp_path: Path, real: RealPictures | None = None) -> Chosen:
    found = measure_chosen(
        params.evaluate, samples, real, tmp_path / "answers", seed=params.seed, runtime=RUNTIME
    )
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
        assert torch.allclose(make(clip)(images, prompts), scores)


def test_hps_is_read_from_the_names_of_open_clip(clip: Clip) -> None:
    """The tiny CLIPModel written as open_clip would, and back."""
    ours = clip.model.state_dict()
    theirs = {name: ours[there] for name, there in hps_models.PLAIN.items()}
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
    converted = hps_models.convert(theirs)
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], ours[name]) for name in ours)
    with pytest.raises(KeyError):
        hps_models.convert({"visual.attn_pool.query": torch.zeros(1)})


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
    head = Aesthetic(clip, AestheticHead(Path(str(models.aesthetic)), CPU))
    assert torch.allclose(head(images, ["", ""]), hidden[:, 0])


def test_an_aesthetic_head_of_another_model_is_refused(clip: Clip, tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.zeros(1, 768), "layers.0.bias": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(CdmError, match=r"head\.pth: layers of \[12, 1\] do not lead from CLIP's 12 features"):
        Aesthetic(clip, AestheticHead(tmp_path / "head.pth", CPU))
    torch.save({"weight": torch.zeros(1, 12)}, tmp_path / "head.pth")
    with pytest.raises(CdmError, match="no numbered linear layers"):
        Aesthetic(clip, AestheticHead(tmp_path / "head.pth", CPU))


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


def plain_inception(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Pooled features of the InceptionV3 of FID: pixels (n, 3, 299, 299) in [-1, 1] to (n, 2048)."""

    def conv(x: torch.Tensor, name: str, stride: int = 1, pad: int | tuple[int, int] = 0) -> torch.Tensor:
        x = F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=pad)
        mean, var, scale, shift = (
            weights[f"{name}.bn.{kind}"][:, None, None]
            for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 0.001).sqrt() * scale + shift).clamp(min=0)

    def mean_around(x: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(x[:1, :1])
        total = F.avg_pool2d(x, 3, 1, 1, divisor_override=1)
        return total / F.avg_pool2d(ones, 3, 1, 1, divisor_override=1)

    across, down = (0, 3), (3, 0)  # kernels of 1 x 7 and 7 x 1
    x = conv(pixels, "Conv2d_1a_3x3", stride=2)
    x = conv(conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", pad=1)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        five = conv(conv(x, f"{block}.branch5x5_1"), f"{block}.branch5x5_2", pad=2)
        three = conv(conv(x, f"{block}.branch3x3dbl_1"), f"{block}.branch3x3dbl_2", pad=1)
        three = conv(three, f"{block}.branch3x3dbl_3", pad=1)
        pooled = conv(mean_around(x), f"{block}.branch_pool")
        x = torch.cat([conv(x, f"{block}.branch1x1"), five, three, pooled], 1)
    three = conv(conv(x, "Mixed_6a.branch3x3dbl_1"), "Mixed_6a.branch3x3dbl_2", pad=1)
    three = conv(three, "Mixed_6a.branch3x3dbl_3", stride=2)
    x = torch.cat([conv(x, "Mixed_6a.branch3x3", stride=2), three, F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = conv(conv(x, f"{block}.branch7x7_1"), f"{block}.branch7x7_2", pad=across)
        seven = conv(seven, f"{block}.branch7x7_3", pad=down)
        twice = conv(x, f"{block}.branch7x7dbl_1")
        for number, pad in ((2, down), (3, across), (4, down), (5, across)):
            twice = conv(twice, f"{block}.branch7x7dbl_{number}", pad=pad)
        pooled = conv(mean_around(x), f"{block}.branch_pool")
        x = torch.cat([conv(x, f"{block}.branch1x1"), seven, twice, pooled], 1)
    three = conv(conv(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", stride=2)
    seven = conv(conv(x, "Mixed_7a.branch7x7x3_1"), "Mixed_7a.branch7x7x3_2", pad=across)
    seven = conv(conv(seven, "Mixed_7a.branch7x7x3_3", pad=down), "Mixed_7a.branch7x7x3_4", stride=2)
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    for block, pool in (("Mixed_7b", mean_around), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        three = conv(x, f"{block}.branch3x3_1")
        twice = conv(conv(x, f"{block}.branch3x3dbl_1"), f"{block}.branch3x3dbl_2", pad=1)
        pairs = [
            conv(hidden, f"{block}.{name}{side}", pad=pad)
            for hidden, name in ((three, "branch3x3_2"), (twice, "branch3x3dbl_3"))
            for side, pad in (("a", (0, 1)), ("b", (1, 0)))
        ]
        x = torch.cat([conv(x, f"{block}.branch1x1"), *pairs, conv(pool(x), f"{block}.branch_pool")], 1)
    return x.mean((2, 3))


class TestInception:
    def test_features_are_those_of_plain_convolutions(self, models: MetricModels) -> None:
        """The network written down once more, with torch's functions alone, on the weights by their published names."""
        images = noise_pictures(12, 1, size=299)
        expected = plain_inception(torch.load(Path(str(models.inception))), (images.float() - 128) / 128)
        assert expected.std() > 0.05
        found = InceptionFeatures(Path(str(models.inception)), CPU)(images)
        assert found.shape == (1, 2048)
        assert torch.allclose(found.float(), expected, rtol=1e-3, atol=1e-4)

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
    assert measure_chosen(params.evaluate, samples, None, tmp_path, seed=0, runtime=RUNTIME) is None
    evaluation = evaluated(params, samples, None, PixelFeatures())
    assert join(evaluation, None) == evaluation.quality | {"replicates": {"noise": evaluation.replicates}}


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
    embed = Clip(Path(models.clip), CPU, "name")
    embedded = (torch.cat([*map(embed, each.batches())]) for each in (samples.student[0], samples.full))
    assert row["cmmd"] == pytest.approx(distances.cmmd(*embedded), rel=1e-4)
    full = chosen.figures["teacher"]["steps50"]
    assert full.keys() == {"vendi_dinov2", "vendi_in_prompt_dinov2"}
    assert chosen.differences["student"]["steps1"].keys() == full.keys()
    assert chosen.intervals["student"]["steps1"].keys() == row.keys()
    low, high = chosen.intervals["student"]["steps1"]["frechet_dinov2"]
    assert low < row["frechet_dinov2"] < high


def test_patches_are_the_middle_of_pictures_at_full_resolution(
    models: MetricModels, samples: Samples, tmp_path: Path
) -> None:
    chosen = measure(choose(models, "frechet_dinov2", "patch_frechet_dinov2"), samples, tmp_path)
    model = Dinov2Features(Path(models.dinov2), CPU, "name")
    assert model.side == 28
    middle = slice(21, 49)  # 28 of 70 pixels
    ours, theirs = (
        model(torch.cat([*each.batches()])[:, :, middle, middle]) for each in (samples.student[0], samples.full)
    )
    row = chosen.figures["student"]["steps1"]
    expected = distances.frechet_distance(ours, theirs)
    assert row["patch_frechet_dinov2"] == pytest.approx(expected, rel=1e-5)
    assert row["frechet_dinov2"] != pytest.approx(expected, rel=1e-2)
    described = dict(chosen.sources)["DINOv2, crops"]
    assert described == f"class tokens of DINOv2 ({models.dinov2}), of the middle of pictures, 28 pixels"


def test_of_pictures_smaller_than_a_patch_the_whole_is_taken(models: MetricModels) -> None:
    model = Dinov2Features(Path(models.dinov2), CPU, "name")
    images = noise_pictures(14, 2, size=30)[:, :, :20]
    crops = Crops(model, images.shape[1:])
    assert torch.equal(crops(images), model(images))
    assert crops.description.endswith(", of whole pictures, which are smaller than a crop of 28 pixels")


def test_a_patch_is_sharper_than_the_shrunk_picture_of_blur(models: MetricModels) -> None:
    """What patches are for: blur that vanishes when a picture is shrunk is there in its crop."""
    fine = noise_pictures(15, 24, size=112)
    coarse = F.avg_pool2d(fine.float(), 4)
    blurred = F.interpolate(coarse, scale_factor=4).round().to(torch.uint8)
    model = Dinov2Features(Path(models.dinov2), CPU, "name")
    whole = distances.frechet_distance(model(fine), model(blurred))
    crops = Crops(model, fine.shape[1:])
    assert distances.frechet_distance(crops(fine), crops(blurred)) > 10 * whole


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
    clip, prompts = Clip(Path(models.clip), CPU, ""), [text for text in TEXTS for _ in range(PER_PROMPT)]
    means = {
        each.key: clip_models.clip_score(clip)(torch.cat([*each.batches()]), prompts).mean().item()
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
    evaluation = evaluated(params, samples, None, PixelFeatures())
    chosen = measure(params, samples, tmp_path)
    joined = join(evaluation, chosen)
    assert list(joined) == ["student", "teacher", "intervals", "differences", "replicates"]
    for over, name in (("noise", "frechet_distance"), ("prompts", "clip_score")):
        assert set(joined["replicates"][over]["student"]["steps1"]) >= {name}
    for model, rows in evaluation.quality.items():
        for key, row in rows.items():
            assert list(joined[model][key])[: len(row)] == list(row)
            assert joined[model][key].items() >= row.items()
            assert "clip_score" in joined[model][key]
    assert json.loads(json.dumps(joined)) == joined
    picture = report.Picture(b"\x89PNG", b"\x89PNG")
    pictures = report.Pictures(picture, [picture], [picture], sheets.strips(samples, 1))
    made = Making(Circumstances("2026-03-01T12:30:59+01:00", "an abacus", "Python 3"), None, samples.hashes)
    teacher = TeacherManifest("sd3", "t", None, {}, [4, 1, 1], 1.0, 1)
    page = report.render(params, teacher, samples, evaluation, pictures, made, chosen=chosen)
    value = f"{chosen.figures['student']['steps4']['clip_score']:.3g}"
    assert "Chosen measures" in page
    assert value in page[page.index("Chosen measures") :]
    assert f"{len(TEXTS)} prompts" in page
    plain = report.render(params, teacher, samples, evaluation, pictures, made)
    assert "Chosen measures" not in plain


def test_every_figure_has_a_column_of_the_report(
    models: MetricModels, samples: Samples, tmp_path: Path
) -> None:
    known = quantities().keys()
    fast = [name for name in MEASURES if "inception" not in name]
    chosen = measure(choose(models, *fast), samples, tmp_path)
    assert {name for rows in chosen.figures.values() for row in rows.values() for name in row} <= known


class Brightness:
    """A scorer that needs no model."""

    description = "the mean of the pixels"

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.double().mean((1, 2, 3))


def test_another_measure_is_one_record(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the parameters to the report."""
    quantity = Quantity("brightness", "Brightness of pixels", "high", "how bright pictures are")
    record = Measure("brightness", "score", (), f"{__name__}:Brightness", (quantity,))
    monkeypatch.setitem(MEASURES, "brightness", record)
    values = parameters(judge=None, real=None).model_dump()
    values["evaluate"] |= {"metrics": ["brightness"]}
    params = parse(values)
    check_paths(params)
    chosen = measure(params, samples, tmp_path)
    pictures = torch.cat([*samples.full.batches()]).double()
    assert chosen.figures["teacher"]["steps50"] == {
        "brightness": pytest.approx(pictures.mean().item(), rel=1e-5)
    }
    assert chosen.sources == [("brightness", "the mean of the pixels")]
    assert report._chosen(chosen, samples)["columns"] == [quantity]


def test_every_record_names_what_can_be_imported() -> None:
    names = [model.loader for model in MODELS.values()] + [measure.compute for measure in MEASURES.values()]
    assert all(callable(load(name)) for name in names)


def test_every_figure_of_the_judge_has_a_title(samples: Samples) -> None:
    rows = evaluated(parameters(), samples, None, PixelFeatures()).quality
    found = {key for sets in rows.values() for row in sets.values() for key in row}
    assert found - {"count"} == JUDGED.keys() - {"attribute_accuracy"}  # pixel features know no attributes


def test_what_no_judge_saw_is_called_by_what_it_is() -> None:
    """Every figure that is worked out from features has another title without a judge: only counts and shares of right
    pictures keep theirs."""
    pixels = basics(judged=False)
    assert pixels.keys() == JUDGED.keys()
    same = {key for key in JUDGED if pixels[key] == JUDGED[key]}
    assert same == {"evaluations", "attribute_accuracy"}
    assert all("ixel" in pixels[key].title for key in JUDGED.keys() - same)
    assert basics(judged=True) == JUDGED


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ({"student": {"steps1": {}}, "basis": {"judge": "ab"}}, True),
        ({"student": {"steps1": {"attribute_accuracy": 1.0}}, "basis": {"judge": None}}, False),
        ({"student": {"steps1": {"attribute_accuracy": 1.0}}}, True),
        ({"student": {"steps1": {}}, "basis": None}, False),
    ],
)
def test_who_saw_the_pictures(quality: dict[str, Any], expected: bool) -> None:
    assert by_judge(quality) is expected


def test_no_two_quantities_share_a_key() -> None:
    keys = [quantity.key for measure in MEASURES.values() for quantity in measure.quantities]
    assert len({*keys, *JUDGED}) == len(keys) + len(JUDGED)


@pytest.mark.parametrize("module", ["cdm.preflight", "cdm.params", "cdm.handover.recipes"])
def test_checking_parameters_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_too_few_pictures_for_the_neighbours(models: MetricModels, samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(CdmError, match="needs more than the 16 pictures of half of the prompts"):
        measure(choose(models, "prdc_dinov2", neighbours=16), samples, tmp_path)


class TestAbsent:
    """A model that is not here is named with the command that gets it, by every stage and by `cdm params check`."""

    def problems(self, metrics: list[str], **models: str | None) -> list[str]:
        with pytest.raises(CdmError) as error:
            check_paths(parameters(metrics=metrics, models=MetricModels(**models)))
        return str(error.value).splitlines()

    def test_the_models_are_those_of_the_parameters(self) -> None:
        assert MetricModels.model_fields.keys() == MODELS.keys()
        assert {key for measure in MEASURES.values() for key in measure.models} == MODELS.keys()

    def test_the_page_names_every_metric_model_and_file(self) -> None:
        page = (ROOT / "docs/evaluation.md").read_text()
        named = {name for name in MEASURES if not name.endswith("_dinov2")} | {*MetricModels.model_fields}
        assert [name for name in sorted(named) if f"`{name}`" not in page] == []
        assert "the same with `_dinov2`" in page
        assert {file.model for file in published.FILES} == MODELS.keys()
        for file in published.FILES:
            assert file.place in page
            assert f"`{file.revision[:8]}`" in page if file.revision else file.sha256

    def test_what_can_be_fetched_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        metrics = ["clip_score", "cmmd", "aesthetic", "frechet_inception", "hps", "lpips"]
        (line,) = self.problems(metrics, clip="some-org/clip@main", inception="weights/inception.pth")
        assert line == (
            "evaluate.models: not on this machine: clip (some-org/clip@main) for clip_score, cmmd, aesthetic; aesthetic"
            " for aesthetic; inception (weights/inception.pth) for frechet_inception; hps for hps; lpips for lpips: get"
            " them with `cdm fetch params.yaml`, or go on without with `evaluate.missing: skip`"
        )

    def test_what_cannot_be_fetched_is_a_line_of_its_own(self) -> None:
        lines = self.problems(["clip_score", "frechet_dinov2"], clip=str(ROOT), dinov2="none")
        assert len(lines) == 2
        assert "evaluate.models.clip: " in lines[0]
        assert "has no config.json, preprocessor_config.json" in lines[0]
        assert lines[1] == (
            "evaluate.models.dinov2: none: no such file or folder, but evaluate.metrics has frechet_dinov2:"
            " name the right one, or leave the metric out"
        )

    def test_with_skip_it_is_left_out_and_named(
        self, models: MetricModels, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        gone = models.model_copy(update={"aesthetic": None, "dinov2": "none"})
        scorer = ScorerProcess(name="mine", command="no-such-program x.py")
        metrics = ("clip_score", "aesthetic", "vendi_dinov2", "lpips")
        params = choose(gone, *metrics, scorers=[scorer], missing="skip")
        check_paths(params)
        section, skipped = without_missing(params.evaluate)
        assert section.metrics == ["clip_score", "lpips"]
        assert skipped == {
            "aesthetic": "evaluate.models.aesthetic: sac+logos+ava1-l14-linearMSE.pth: no such file or folder",
            "vendi_dinov2": "evaluate.models.dinov2: none: no such file or folder",
            "mine": "evaluate.scorers: no-such-program: no such program: see docs/scorers.md",
        }
        refused = params.evaluate.model_copy(update={"missing": "refuse"})
        assert without_missing(refused) == (refused, {})
        record_evaluation(params.evaluate, tmp_path / "inputs.json", Memory())
        recorded = json.loads((tmp_path / "inputs.json").read_text())
        assert (
            recorded["models"]["aesthetic"]
            is recorded["models"]["dinov2"]
            is recorded["scorers"]["mine"]
            is None
        )
        assert recorded["models"]["clip"]

    def test_what_is_here_is_no_problem(self, models: MetricModels) -> None:
        check_paths(parameters(metrics=list(MEASURES), models=models))

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
        ({"metrics": ["fid"]}, "evaluate.metrics: unknown measure 'fid' (known: frechet_inception, "),
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
