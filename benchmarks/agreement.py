"""Our measures against the packages that others use, on pictures and features that are made here.

    pip install torch-fidelity lpips prdc vendi-score open_clip_torch scikit-learn torchvision
    python -m benchmarks.agreement [--aesthetic sac+logos+ava1-l14-linearMSE.pth]

Networks have random weights, the same ones on both sides: what is compared is the computation, from pixels or features
to the figure. The channels' weights of LPIPS are the published ones, which its package brings; so is the vocabulary of
CLIP, from open_clip. A row of the table is a figure, ours and theirs, and the difference over theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor, nn

from cdm.evaluation import distances
from cdm.evaluation.models import clip as ours
from cdm.evaluation.models.inception import InceptionFeatures
from cdm.evaluation.models.lpips import BACKBONE, LINEAR, Lpips
from cdm.models.hps import convert
from cdm.system import boundary

CPU = torch.device("cpu")
PACKAGES = ("torch-fidelity", "lpips", "prdc", "vendi-score", "open_clip_torch")
PROMPTS = ("a red circle on white paper", 'two owls, reading: "news"', "4 small houses, SUNSET " * 20)
"""Of several pieces of punctuation, letters of both cases, and longer than what CLIP reads."""
CURLY = "two owls, reading: \N{LEFT DOUBLE QUOTATION MARK}news\N{RIGHT DOUBLE QUOTATION MARK}"
"""open_clip's tokeniser makes these quotation marks straight, and the one of transformers does not."""
HEAD = (768, 1024, 128, 64, 16, 1)
"""Widths of the layers of the LAION aesthetic head."""


@dataclass(frozen=True)
class Row:
    """A figure by two programs."""

    measure: str
    reference: str
    ours: float
    theirs: float
    known: bool = False
    """Whether it is known that they differ."""

    @property
    def difference(self) -> float:
        """Relative to theirs."""
        return abs(self.ours - self.theirs) / max(abs(self.theirs), 1e-12)


def rows(folder: Path, head: Path | None = None) -> Iterator[Row]:
    """Every figure; `folder` is for weights, `head` the published aesthetic head."""
    declare_operators()
    yield from of_features()
    yield from of_inception(folder)
    yield from of_lpips(folder)
    yield from of_clip(folder, head)


def declare_operators() -> None:
    """Lets torchvision be imported whose compiled operators are of another build of torch: none of them is used."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_kept: list[Any] = []


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(seed: int, count: int, height: int, width: int) -> Tensor:
    """Smooth random pictures, uint8 (count, 3, height, width), which use the whole range."""
    small = draw(seed, count, 3, 6, 6)
    large = nn.functional.interpolate(small, (height, width), mode="bicubic")
    noisy = large + 0.1 * draw(seed + 1, count, 3, height, width)
    return (128 + 80 * noisy).clamp(0, 255).to(torch.uint8)


def of_features() -> Iterator[Row]:
    """Figures of given features."""
    from prdc import compute_prdc
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kernel_mmd
    from vendi_score import vendi

    mixing = draw(0, 64, 64) / 8
    for count, name in ((400, "FID, 400 of 64 features"), (50, "FID, 50 of 64 features (singular)")):
        a, b = draw(1, count, 64) @ mixing, draw(2, count, 64) @ mixing * 1.2 + 0.3
        statistics = [fid_features_to_statistics(features) for features in (a, b)]
        theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        yield Row(name, "torch-fidelity", distances.frechet_distance(a, b), theirs)
    a, b = draw(1, 400, 64) @ mixing, draw(2, 400, 64) @ mixing * 1.2 + 0.3
    theirs = kernel_mmd(
        a.numpy(), b.numpy(), kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1
    )
    yield Row("KID", "torch-fidelity", distances.kernel_distance(a, b), float(theirs))
    with redirect_stdout(StringIO()):
        found = compute_prdc(a.numpy(), b.numpy(), nearest_k=5)
    for name, value in distances.manifold(a, b, 5)._asdict().items():
        yield Row(name.capitalize(), "prdc", value, float(found[name]))
    yield Row("Vendi", "vendi-score", distances.vendi(a), float(vendi.score_dual(a.numpy())))


def of_inception(folder: Path) -> Iterator[Row]:
    """Features of InceptionV3 with random weights, and the FID of these."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    path = folder / "inception.pth"
    torch.save(random_inception(), path)
    mine = InceptionFeatures(path, CPU)
    theirs = FeatureExtractorInceptionV3("test", ["2048"], feature_extractor_weights_path=str(path))
    features: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for height, width in ((64, 64), (299, 299), (400, 320)):
        images = pictures(height, 4, height, width)
        pair = mine(images), theirs(images)[0].double()
        features[height, width] = pair
        worst = int((pair[0] - pair[1]).abs().argmax())
        value, found = (each.flatten()[worst].item() for each in pair)
        yield Row(f"InceptionV3, worst feature of {height} x {width}", "torch-fidelity", value, found)
    (a, theirs_a), (b, theirs_b) = features[64, 64], features[400, 320]
    statistics = [fid_features_to_statistics(each) for each in (theirs_a, theirs_b)]
    distance = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    yield Row("FID from pictures", "torch-fidelity", distances.frechet_distance(a, b), distance)


def random_inception() -> dict[str, Tensor]:
    """Random weights that keep the scale of what passes through the network."""
    from cdm.evaluation.models.inception import Inception

    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = Inception()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                assert module.running_mean is not None
                for values in (module.running_var, module.weight):
                    nn.init.uniform_(values, 0.8, 1.25)
                for values in (module.running_mean, module.bias):
                    nn.init.normal_(values, std=0.1)
        return network.state_dict()


def of_lpips(folder: Path) -> Iterator[Row]:
    """LPIPS with a random AlexNet and the published channels' weights."""
    import lpips

    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    (folder / "lpips").mkdir()
    weights = theirs.net.state_dict()  # slice2.3.weight: the number is that of torchvision's AlexNet
    torch.save(
        {f"features.{name.split('.', 1)[1]}": each for name, each in weights.items()},
        folder / "lpips" / BACKBONE,
    )
    linear = {
        name: each for name, each in theirs.state_dict().items() if name.startswith("lin") and name[3].isdigit()
    }
    torch.save(linear, folder / "lpips" / LINEAR)
    mine = Lpips(folder / "lpips", CPU)
    for side in (64, 256):
        images = pictures(side, 2, side, side)
        with torch.no_grad():
            found = theirs(*(images.float() / 127.5 - 1).split(1)).item()
        yield Row(f"LPIPS, two pictures of {side} x {side}", "lpips", mine.mean_distance(images), found)


def of_clip(folder: Path, head: Path | None) -> Iterator[Row]:
    """CLIPScore, PickScore, HPS and the aesthetic score, from pictures and texts to the figure."""
    images = pictures(9, len(PROMPTS), 300, 240)
    for activation, model in (("quick_gelu", "as ViT-L/14"), ("gelu", "as ViT-H-14")):
        place = folder / activation
        place.mkdir()
        theirs = write_clip(place, activation)
        seen, read = pictures_of(theirs, images), texts_of(theirs, PROMPTS)
        cosine = (seen * read).sum(1)
        mine = ours.Clip(place, CPU, "random")
        reference = f"open_clip, {model}"
        if activation == "quick_gelu":
            yield from _rows("CLIPScore", reference, ours.clip_score(mine)(images, PROMPTS), 100 * cosine)
            yield from of_aesthetic(folder, head, mine, images, seen)
            continue
        scale = theirs.logit_scale.exp().item()
        yield from _rows("PickScore", reference, ours.pick_score(mine)(images, PROMPTS), scale * cosine)
        yield from _rows("HPS", reference, ours.hps(mine)(images, PROMPTS), cosine)
        curly = (seen[1] * texts_of(theirs, [CURLY])[0]).sum().item()
        value = ours.hps(mine)(images[1:2], [CURLY]).item()
        yield Row("HPS, curly quotation marks", reference, value, curly, known=True)


def of_aesthetic(
    folder: Path, head: Path | None, clip: ours.Clip, images: Tensor, seen: Tensor
) -> Iterator[Row]:
    """The aesthetic score of pictures; `seen` are the reference's embeddings."""
    layers = aesthetic_layers(head)
    path = head or folder / "head.pth"
    if head is None:
        torch.save({f"layers.{key}": each for key, each in layers.state_dict().items()}, path)
    mine = ours.Aesthetic(clip, ours.AestheticHead(path, CPU))
    with torch.no_grad():
        found = layers(seen.float())[:, 0]
    name = "Aesthetic, published head" if head else "Aesthetic, random head"
    yield from _rows(name, "its network, in torch", mine(images, PROMPTS), found)


def _rows(name: str, reference: str, values: Tensor, theirs: Tensor) -> Iterator[Row]:
    """A row a picture."""
    for number, pair in enumerate(zip(values.tolist(), theirs.tolist(), strict=True), 1):
        yield Row(f"{name}, picture {number}", reference, *pair)


def aesthetic_layers(head: Path | None) -> nn.Sequential:
    """The network of improved-aesthetic-predictor, with the weights of `head`, or random ones."""
    modules: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for number, (inside, outside) in enumerate(pairwise(HEAD)):
            modules.append(nn.Linear(inside, outside))
            if number < 3:
                modules.append(nn.Dropout(0.2 if number < 2 else 0.1))
    layers = nn.Sequential(*modules).eval()
    if head is not None:
        weights = torch.load(head, map_location="cpu", weights_only=True)
        layers.load_state_dict({name.removeprefix("layers."): each for name, each in weights.items()})
    return layers


def write_clip(folder: Path, activation: str) -> Any:
    """A small random CLIP of open_clip, which is written to `folder` as a transformers model with CLIP's tokeniser."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = SimpleTokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(7)  # cosines are positive: CLIPScore is not cut off at 0
        model = CLIP(
            HEAD[0],
            CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=14, image_size=56),
            CLIPTextCfg(width=64, heads=1, layers=2, vocab_size=tokenizer.vocab_size),
            quick_gelu=activation == "quick_gelu",
        ).eval()
    small = {"num_hidden_layers": 2, "hidden_act": activation}
    config = CLIPConfig(
        text_config={
            **small,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_attention_heads": 1,
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": tokenizer.sot_token_id,
            "eos_token_id": tokenizer.eot_token_id,
        },
        vision_config={
            **small,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        projection_dim=HEAD[0],
    )
    made = CLIPModel(config)
    made.load_state_dict(convert(model.state_dict()))
    made.save_pretrained(folder)
    size = {"height": 56, "width": 56}
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=size).save_pretrained(folder)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): number for piece, number in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return model


def pictures_of(model: Any, images: Tensor) -> Tensor:
    """Unit embeddings of pictures by open_clip, float64."""
    from open_clip.transform import image_transform

    prepare = image_transform(56, is_train=False)
    pixels = torch.stack([prepare(Image.fromarray(np.asarray(each.permute(1, 2, 0)))) for each in images])
    with torch.no_grad():
        seen: Tensor = model.encode_image(pixels, normalize=True)
    return seen.double()


def texts_of(model: Any, texts: Sequence[str]) -> Tensor:
    """Unit embeddings of texts by open_clip, float64."""
    from open_clip.tokenizer import SimpleTokenizer

    with torch.no_grad():
        read: Tensor = model.encode_text(SimpleTokenizer()(list(texts)), normalize=True)
    return read.double()


def main(
    aesthetic: Annotated[
        Path | None, typer.Option(help="The published aesthetic head; otherwise one with random weights.")
    ] = None,
) -> None:
    """Print the table."""
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *PACKAGES)))
    print("\n| figure | reference | ours | theirs | relative difference |\n| --- | --- | ---: | ---: | ---: |")
    with TemporaryDirectory() as folder:
        for row in rows(Path(folder), aesthetic):
            print(
                f"| {row.measure} | {row.reference} | {row.ours:.9g} | {row.theirs:.9g} | {row.difference:.1e} |"
            )


if __name__ == "__main__":
    boundary.run(boundary.program(main))
