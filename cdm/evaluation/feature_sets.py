"""Distances between the features of samples and those of reference pictures, by cdm.evaluation.distances.

These are what the measures of the kind "distance" name: each takes two sets and the number of nearest neighbours, and
returns its values in the order of the measure's quantities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cdm.evaluation import distances


@dataclass(frozen=True)
class FeatureSet:
    """Feature vectors of a set of pictures, and the prompt that each picture shows."""

    features: Tensor
    """float64 (pictures, features)."""
    prompt: Tensor
    """int64 (pictures,): indices of prompts."""

    def of_prompts(self, prompts: Tensor | None) -> FeatureSet:
        """The pictures of these prompts (their indices); all pictures where None."""
        if prompts is None:
            return self
        rows = torch.isin(self.prompt, prompts)
        return FeatureSet(self.features[rows.to(self.features.device)], self.prompt[rows])

    @property
    def groups(self) -> Tensor | None:
        """The prompts, if each has several pictures here: a single one makes no pair."""
        counts = self.prompt.bincount()
        return self.prompt if int(counts[counts > 0].min()) > 1 else None


def frechet(ours: FeatureSet, theirs: FeatureSet, _neighbours: int) -> tuple[float]:
    """Squared Fréchet distance."""
    return (distances.frechet_distance(ours.features, theirs.features),)


def kernel(ours: FeatureSet, theirs: FeatureSet, _neighbours: int) -> tuple[float]:
    """Unbiased kernel distance (KID); pairs within a set are of one prompt where both sets have several of each."""
    groups = (ours.groups, theirs.groups)
    known = groups if all(group is not None for group in groups) else ()
    return (distances.kernel_distance(ours.features, theirs.features, *known),)


def manifold(ours: FeatureSet, theirs: FeatureSet, neighbours: int) -> distances.Manifold:
    """Precision, recall, density and coverage."""
    return distances.manifold(theirs.features, ours.features, neighbours)


def cmmd(ours: FeatureSet, theirs: FeatureSet, _neighbours: int) -> tuple[float]:
    """CMMD, of unit CLIP embeddings."""
    return (distances.cmmd(ours.features, theirs.features),)
