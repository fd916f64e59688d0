"""The plain order of operations, as the method is usually written: the yardstick for `cdm.training.distiller`.

Every sample runs through its whole rollout; every fake-score update has a rollout of its own where `rollouts` is
`fresh`; the student is run again at the anchor for each term; each question to teacher and fake score is a call of
its own. The random numbers are the same, so losses and gradients must be the same to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdm.families.base import expand_to_batch
from cdm.flow import euler_step
from cdm.losses import direction_loss, guidance_direction, matching_direction
from cdm.randomness import Draws
from cdm.rollout import Conditioning
from cdm.schedule import draw_rollouts
from cdm.training.distiller import Anchor, Distiller, Metrics, Renoised


class PlainDistiller(Distiller):
    """`Distiller` without anything shared or skipped."""

    def roll_out(self, iteration: int, samples: Sequence[int], serves_student: bool) -> Anchor:
        draws = self.draws(iteration, samples)
        conditioning = self.prompts(iteration, samples)
        rollouts = draw_rollouts(self.schedule, self.shift, draws)
        x = draws.normal("noise", self.latent_shape)
        anchors, velocities = x.clone(), torch.zeros_like(x)
        sigmas = torch.nn.functional.pad(rollouts.sigmas, (0, 1))
        lengths = (sigmas > 0).sum(1)
        for step in range(int(lengths.max())):
            at_anchor = torch.tensor([depth == step for depth in rollouts.depth], device=x.device)
            runs = torch.nonzero(lengths > step)[:, 0]
            own = {name: value[runs] for name, value in conditioning.items()}
            with torch.no_grad():
                velocity = self.networks.velocity("student", x[runs], sigmas[runs, step], own)
            anchors[at_anchor] = x[at_anchor]
            velocities[at_anchor] = velocity[at_anchor[runs]]
            x = x.index_copy(0, runs, euler_step(x[runs], velocity, sigmas[runs, step], sigmas[runs, step + 1]))
        return Anchor(anchors, rollouts.anchor_sigma, conditioning, samples, False, velocities)

    def predict(self, anchor: Anchor, with_graph: bool) -> None:
        if with_graph:
            anchor.velocity = self.networks.velocity("student", anchor.x, anchor.sigma, anchor.conditioning)

    def student_terms(self, anchor: Anchor, draws: Draws) -> tuple[dict[str, Tensor], Metrics]:
        losses = self.distill.losses
        terms: dict[str, Tensor] = {}
        if losses.dm.weight:
            self.predict(anchor, with_graph=True)
            x0 = anchor.x0
            at_dm, _, _ = self.renoise_at_anchor(anchor, x0.detach(), draws)
            terms["dm"] = self.matching_term(x0, at_dm, anchor.conditioning, anchor.sigma)
        if losses.ca.weight:
            self.predict(anchor, with_graph=True)
            x0 = anchor.x0
            _, at_ca, _ = self.renoise_at_anchor(anchor, x0.detach(), draws)
            empty = expand_to_batch(self.empty, len(x0))
            x0_cond = self.ask("teacher", [at_ca.query(anchor.conditioning)])[0]
            x0_uncond = self.ask("teacher", [at_ca.query(empty)])[0]
            terms["ca"] = direction_loss(x0, guidance_direction(x0, x0_cond, x0_uncond, losses.ca.scale))
        if losses.cdm.weight:
            self.predict(anchor, with_graph=False)
            x0_off, sigma_off = self.off_trajectory(anchor, draws)
            at_cdm = self.renoise(x0_off.detach(), sigma_off if losses.cdm.bounded else None, draws, "cdm")
            terms["cdm"] = self.matching_term(x0_off, at_cdm, anchor.conditioning, sigma_off)
        return terms, {}

    def matching_term(
        self, x0: Tensor, renoised: Renoised, conditioning: Conditioning, sigma: Tensor
    ) -> Tensor:
        real = self.ask("teacher", [renoised.query(conditioning)])[0]
        fake = self.ask("fake", [renoised.query(self.for_fake(conditioning, sigma))])[0]
        return direction_loss(x0, matching_direction(x0, real, fake))
