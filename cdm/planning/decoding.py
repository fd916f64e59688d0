"""Memory of pictures while a model is trained: its autoencoder, and what decoding takes, counted on fake tensors."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from cdm.families.configs import AUTOENCODER, read_config
from cdm.params import Params
from cdm.planning.architecture import Architecture
from cdm.planning.footprint import Network
from cdm.system.progress import quieten_libraries


def measures_pictures(params: Params) -> bool:
    """Whether the probe of a training measures pictures, and not latents alone."""
    probe = params.distill.probe
    return probe.reference != "none" and bool(probe.metrics)


def decodes(params: Params) -> bool:
    """Whether a training draws pictures, to be looked at or to be measured."""
    return params.runtime.pictures_every > 0 or measures_pictures(params)


def plan_decoding(params: Params, architecture: Architecture) -> tuple[int, int]:
    """Bytes of the autoencoder, and the most that decoding one picture takes beside them: in `latents.precision` where
    pictures are looked at, in float32 where a probe measures them.

    Pictures are decoded one at a time, by the main process alone or, for measures of a probe, by every process. What a
    convolution needs as work space is not counted: it is the library's choice.
    """
    config = read_config(architecture.configs, AUTOENCODER)

    def build() -> nn.Module:
        import diffusers

        quieten_libraries()
        kind = getattr(diffusers, config["_class_name"])
        model: nn.Module = kind.from_config(config).requires_grad_(False)
        return model

    def latents(batch: int) -> dict[str, Tensor]:
        return {"x": torch.empty(batch, *architecture.latent_shape)}

    def decode(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return architecture.family.decode(SimpleNamespace(vae=model), inputs["x"])

    half = params.latents.precision == "bf16" and not measures_pictures(params)
    dtype = torch.bfloat16 if half else torch.float32
    network = Network(build, latents, decode, frozen=dtype)
    weights = sum(parameter.nbytes for parameter in network.model.parameters())
    return weights, network.forward(1).peak
