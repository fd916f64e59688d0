"""Where the models of the measures are published, at which revision, and what their files hash to.

A model that `evaluate.models` names otherwise, by a folder or another model of a hub, is not in this table.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cdm.system.files import read_json


@dataclass(frozen=True)
class File:
    """A file of a published model."""

    model: str
    """The field of `evaluate.models`."""
    place: str
    """`org/name` on the hub, or the address of this file."""
    revision: str | None
    """The commit, of a model on the hub."""
    name: str
    sha256: str | None
    """None where it is not known: it is recorded when the file is fetched for the first time, and checked from then
    on."""
    size: int | None = None
    """Bytes; None: few, or not known."""

    @property
    def is_on_hub(self) -> bool:
        """Whether it is a file of a hub's model, not one at an address."""
        return self.revision is not None


_CLIP = ("clip", "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
_DINOV2 = ("dinov2", "facebook/dinov2-large", "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c")
_PICK = ("pick_score", "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
_HPS = ("hps", "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a")
_HPS_BASE = ("hps", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
_TEXTS = ("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")

FILES = (
    File(*_CLIP, "config.json", "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a"),
    File(
        *_CLIP, "preprocessor_config.json", "910e70b3956ac9879ebc90b22fb3bc8a75b6a0677814500101a4c072bd7857bd"
    ),
    File(
        *_CLIP,
        "model.safetensors",
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        1_710_540_580,
    ),
    File(*_CLIP, "merges.txt", "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"),
    File(*_CLIP, "special_tokens_map.json", "f8c0d6c39aee3f8431078ef6646567b0aba7f2246e9c54b8b99d55c22b707cbf"),
    File(*_CLIP, "tokenizer.json", "a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4"),
    File(*_CLIP, "tokenizer_config.json", "deef455e52fa5e8151e339add0582e4235f066009601360999d3a9cda83b1129"),
    File(*_CLIP, "vocab.json", "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69"),
    File(*_DINOV2, "config.json", "12df51c069a2dc1305e34ba71ef58bc2407ea553b75f4722a1715c1bce3bbed0"),
    File(
        *_DINOV2, "preprocessor_config.json", "14e780d86fa1861f8751f868d7f45425b5feb55c38ca26f152ca5097ab30f828"
    ),
    File(
        *_DINOV2,
        "model.safetensors",
        "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
        1_217_522_888,
    ),
    File(*_PICK, "model.safetensors", None, 3_940_000_000),
    *(File(*_PICK, name, None) for name in ("config.json", "preprocessor_config.json", *_TEXTS)),
    File(
        *_HPS,
        "HPS_v2.1_compressed.pt",
        "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        1_972_490_005,
    ),
    *(File(*_HPS_BASE, name, None) for name in ("config.json", "preprocessor_config.json", *_TEXTS)),
    File(
        "inception",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        None,
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95_628_359,
    ),
    File(
        "aesthetic",
        "https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/"
        "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        None,
        "sac+logos+ava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        3_714_759,
    ),
    File(
        "lpips",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        None,
        "alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        244_408_911,
    ),
    File(
        "lpips",
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth",
        None,
        "alex.pth",
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        6_009,
    ),
)
"""Every file of every published model."""


def files_of(model: str) -> list[File]:
    """The files of the model that a field of `evaluate.models` is meant for."""
    return [file for file in FILES if file.model == model]


def revision_of(repository: str) -> str | None:
    """The commit of `org/name` that this table has; None for another model."""
    return next((file.revision for file in FILES if file.place == repository), None)


def default_place(model: str) -> Path:
    """Where a fetched model is put that the parameters do not name: below `$XDG_CACHE_HOME/cdm`, or `~/.cache/cdm`."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cdm"
    files = files_of(model)
    return base / (files[0].name if len(files) == 1 else model)


def published_hashes(place: str, *, every: bool = False) -> dict[str, str]:
    """SHA-256 of the files of a hub's model by name, as far as they are known; with `every`, also names of the others,
    with empty hashes."""
    files = [file for file in FILES if file.place == place]
    return {file.name: file.sha256 or "" for file in files if file.sha256 or every}


def lock_of(path: Path) -> Path:
    """The file beside a fetched file or folder that has the hashes which were recorded when it was fetched: beside the
    folders of a hub's cache, `COMMIT.sha256.json` in the folder of the model."""
    beside = path.parent if path.parent.name == "snapshots" else path
    return beside.with_name(f"{path.name}.sha256.json")


def read_lock(path: Path) -> dict[str, str]:
    """The recorded hashes of a fetched file or folder, by name; none where nothing was recorded."""
    recorded = read_json(lock_of(path))
    return {str(name): str(found) for name, found in recorded.items()} if isinstance(recorded, dict) else {}


def expected_hashes(model: str, source: str | None, path: Path) -> dict[str, str]:
    """What the files of a fetched model at `path` hash to, by name, published or recorded; of a model that somebody has
    put there, nothing."""
    if path.parent.name == "snapshots":
        place = path.parents[1].name.removeprefix("models--").replace("--", "/", 1)
        known = published_hashes(place) if revision_of(place) == path.name else {}
    else:
        known = {file.name: file.sha256 for file in files_of(model) if source is None and file.sha256}
    return read_lock(path) | known
