"""The methods that CDM is compared with, each against what is known in closed form of Gaussian data.

A guided Gaussian teacher is Gaussian too: with the empty prompt's mean at 0 and a prompt's at m, guidance w has its
mean at w * m. `GaussianFlowMap` makes exactly such a distribution in any number of steps.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm.consistency import consistency_direction, velocity_change
from cdm.families import get_family
from cdm.flow import add_noise, renoise, renoise_coefficients, velocity_to_x0
from cdm.losses import (
    direction_loss,
    fake_score_loss,
    guidance_direction,
    guided,
    matching_direction,
    score_gradient,
    state_data_loss,
    state_score_loss,
)
from cdm.params import Losses, Schedule, load
from cdm.planning import forwards
from cdm.training.distiller import Distiller
from cdm.training.points import Anchor
from reference.gaussian import GaussianFlowMap, GaussianModel, optimal_velocity, optimal_x0
from reference.world import DIMENSIONS, build, distill_settings

TEACHER = {"offset": 0.5, "deviation": 0.7}
FIXED = Schedule(kind="fixed", min_len=1, max_len=1, sigma_min=0.02, sigma_max=0.98)
PHASES = FIXED.model_copy(update={"ends": "next"})


def losses(**terms: Any) -> Losses:
    """Only these terms."""
    off: dict[str, Any] = {"ca": {"weight": 0, "scale": 1}, "dm": {"weight": 0}, "cdm": {"weight": 0}}
    return Losses.model_validate(off | terms)


def matched(batch: int = 256, scale: float = 1.0, schedule: Schedule = FIXED, **settings: Any) -> Distiller:
    """A student that makes the (guided) teacher's very distribution, and a fake score that knows it."""
    student = GaussianFlowMap(DIMENSIONS, **TEACHER, scale=scale)
    fake = GaussianModel(DIMENSIONS, **TEACHER, scale=scale)
    distill = distill_settings(batch_size=batch, **settings)
    return build(distill=distill, schedule=schedule, student=student, fake=fake)[0]


def terms_of(distiller: Distiller, iteration: int = 0) -> tuple[Anchor, dict[str, Tensor]]:
    samples = distiller.parts[0]
    anchor = distiller.roll_out(iteration, samples, serves_student=True)
    distiller.predict(anchor, with_graph=True)
    outcomes = distiller.student_terms(anchor, distiller.draws(iteration, samples))
    return anchor, {name: outcome.loss for name, outcome in outcomes.items()}


def loss_of(distiller: Distiller) -> float:
    """That of its only term."""
    (term,) = terms_of(distiller)[1].values()
    return float(term.detach())


def in_x0(anchor: Anchor, loss: Tensor) -> Tensor:
    """The loss's gradient in the student's x0 at the anchor, times the number of elements."""
    assert anchor.velocity is not None
    (gradient,) = torch.autograd.grad(loss, anchor.velocity, retain_graph=True)
    return -gradient * gradient.numel() / anchor.sigma[:, None]


# DMD, DMD2, decoupled DMD


def test_with_one_norm_the_guided_direction_is_matching_plus_guidance() -> None:
    """Decoupled DMD (arXiv 2511.22677) with one point for both: exactly DMD2, with CA's scale w - 1."""
    student, cond, uncond, fake = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    together = matching_direction(student, guided(cond, uncond, 3.5), fake, min_norm=100.0)
    apart = matching_direction(student, cond, fake, min_norm=100.0)
    apart += guidance_direction(student, cond, uncond, scale=2.5, min_norm=100.0)
    torch.testing.assert_close(together, apart)


def test_dmd2_and_decoupled_dmd_have_one_gradient_where_norms_and_points_are_the_same() -> None:
    """The same through the engine: with all of tau's range for both, CA takes DM's point."""
    gradients = []
    for terms in (
        losses(dm={"weight": 1, "guidance_scale": 3.5}, min_norm=100.0),
        losses(dm={"weight": 1}, ca={"weight": 1, "scale": 2.5, "bounded": False}, min_norm=100.0),
    ):
        anchor, found = terms_of(build(distill=distill_settings(losses=terms), schedule=FIXED)[0])
        gradients.append(in_x0(anchor, torch.stack(list(found.values())).sum()))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("schedule", [FIXED, PHASES], ids=["data", "phases"])
def test_matching_rests_where_the_student_has_the_guided_teachers_distribution(schedule: Schedule) -> None:
    terms = losses(dm={"weight": 1, "guidance_scale": 3.0})
    assert loss_of(matched(scale=3.0, losses=terms, schedule=schedule)) < 1e-6
    assert loss_of(matched(scale=2.0, losses=terms, schedule=schedule)) > 1e-2


def test_matching_pulls_the_student_to_the_guided_teacher() -> None:
    """Too high a mean is lowered, too wide a student narrowed."""
    student = GaussianFlowMap(DIMENSIONS, offset=0.9, deviation=1.0, scale=3.0)
    distill = distill_settings(batch_size=256, losses=losses(dm={"weight": 1, "guidance_scale": 3.0}))
    fake = GaussianModel(DIMENSIONS, offset=0.9, deviation=1.0, scale=3.0)
    distiller, _ = build(distill=distill, schedule=FIXED, student=student, fake=fake)
    terms_of(distiller)[1]["dm"].backward()
    assert (student.offset.grad > 0).all()
    assert student.log_deviation.grad > 0


@pytest.mark.parametrize("term", ["dm", "cdm", "consistency"])
def test_a_guided_teacher_is_guided_as_its_pipeline_does_it(term: str) -> None:
    """With a rule that gives the guided velocity the length of the unguided one, as LongCat-Image and Qwen-Image do."""
    asked: list[tuple[Tensor, Tensor, float]] = []

    def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        asked.append((cond, uncond, scale))
        velocity = uncond + scale * (cond - uncond)
        return velocity * cond.norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True)

    terms = losses(**{term: {"weight": 1, "guidance_scale": 3.0}})
    plain, _ = build(distill=distill_settings(losses=terms))
    other, networks = build(distill=distill_settings(losses=terms), guide=guide)
    assert loss_of(plain) != pytest.approx(loss_of(other), rel=1e-3)
    ((_, _, scale),) = asked
    assert scale == 3.0
    context = other.context(terms_of(other)[0], other.draws(0, range(6)))
    x, sigma, prompts = torch.randn(6, DIMENSIONS), torch.full((6,), 0.7), context.anchor.conditioning
    velocities = [networks.velocity("teacher", x, sigma, each) for each in (prompts, context.no_prompt(x))]
    answers = [velocity_to_x0(x, velocity, sigma) for velocity in velocities]
    expected = velocity_to_x0(x, guide(*velocities, 3.0), sigma)
    torch.testing.assert_close(context.guided_answer(answers, x, sigma, 3.0), expected)
    assert context.guided_answer(answers[:1], x, sigma, 1.0) is answers[0]


def test_regression_is_the_squared_distance_of_one_step_to_the_teachers_sample() -> None:
    distill = distill_settings(losses=losses(regression={"weight": 1}))
    student = GaussianFlowMap(DIMENSIONS, offset=0.8, deviation=0.7)
    distiller, networks = build(distill=distill, schedule=FIXED, student=student)
    distiller.round(0)
    assert not networks.samples["fake+graph"], "nobody asks the fake score: it need not learn"
    student.zero_grad()
    with torch.no_grad():
        student.offset.fill_(0.8)
        student.log_deviation.fill_(torch.tensor(0.7).log())
    _, found = terms_of(distiller)
    assert float(found["regression"].detach()) == pytest.approx(0.3**2, rel=1e-4)
    found["regression"].backward()
    torch.testing.assert_close(student.offset.grad, torch.full((DIMENSIONS,), 2 * 0.3 / DIMENSIONS))


# Phased DMD and TDM


def marginal_slope(sigma: Tensor, deviation: float) -> Tensor:
    """The optimal velocity of N(0, deviation^2) at x, over x."""
    one, zero = torch.ones_like(sigma)[:, None], torch.zeros_like(sigma)[:, None]
    return optimal_velocity(one, sigma, zero, deviation)[:, 0]


def target_of(loss: Any, velocity: Tensor, weight: Tensor) -> Tensor:
    """What a squared loss of this weight pulls its velocity to: from its gradient at 0."""
    (gradient,) = torch.autograd.grad(loss, velocity)
    return -gradient * gradient.numel() / (2 * weight)


def best_slope(target: Tensor, x: Tensor) -> Tensor:
    """Least squares through 0 over the rows, which are independent directions of a centred Gaussian: exact."""
    return (target * x).sum() / (x * x).sum()


@pytest.mark.parametrize(("sigma", "tau"), [(0.0, 0.4), (0.3, 0.5), (0.6, 0.7), (0.75, 0.8)])
@pytest.mark.parametrize("deviation", [0.5, 1.3])
def test_the_score_of_states_is_learnt_without_bias_and_the_obvious_target_has_one(
    sigma: float, tau: float, deviation: float
) -> None:
    """States ((1 - sigma) deviation, sigma) of N(0, deviation^2): the best velocity is that of the data at tau."""
    s, t = torch.tensor([sigma, sigma]).double(), torch.tensor([tau, tau]).double()
    spread = (((1 - sigma) * deviation) ** 2 + sigma**2) ** 0.5
    x = torch.tensor([[spread], [0.0]]).double()
    noise = torch.tensor([[0.0], [1.0]]).double()
    x_tau = renoise(x, noise, s, t)
    velocity = torch.zeros_like(x, requires_grad=True)
    _, rest = renoise_coefficients(s, t)
    weight = (1 / rest**2).clamp(max=10)[:, None]
    target = target_of(state_score_loss(velocity, x, noise, s, t), velocity, weight)
    expected = marginal_slope(t, deviation)[0]
    torch.testing.assert_close(best_slope(target, x_tau), expected.double(), rtol=1e-5, atol=1e-6)
    obvious = best_slope(noise - x, x_tau)
    assert (abs(obvious - expected) > 0.02) == (sigma > 0)


def test_the_data_target_learns_the_same_where_noise_and_data_are_independent() -> None:
    sigma, tau, deviation = 0.3, 0.6, 0.7
    s, t = torch.full((3,), sigma), torch.full((3,), tau)
    x0, e, fresh = torch.eye(3)[:, :, None].unbind(0)
    x0 = x0 * deviation
    x_tau = renoise(add_noise(x0, e, s), fresh, s, t)
    velocity = torch.zeros_like(x0, requires_grad=True)
    weight = min(((1 - tau) / tau) ** 2, 5.0) * t[:, None] ** 2
    target = target_of(state_data_loss(velocity, x_tau, x0, t), velocity, weight)
    torch.testing.assert_close(best_slope(target, x_tau), marginal_slope(t, deviation)[0])


def test_renoised_states_are_those_of_the_data() -> None:
    """Variances add up: of `add_noise` at sigma, then `renoise` to tau, as of `add_noise` at tau."""
    sigma, tau = torch.tensor([0.0, 0.2, 0.7]), torch.tensor([0.1, 0.6, 0.9])
    scale, spread = renoise_coefficients(sigma, tau)
    torch.testing.assert_close(scale * (1 - sigma), 1 - tau)
    torch.testing.assert_close((scale * sigma) ** 2 + spread**2, tau**2)


def test_on_data_the_losses_of_states_are_flow_matching() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise, velocity = torch.randn(3, 5, 2, generator=generator)
    zero, tau = torch.zeros(5), torch.full((5,), 0.5)
    plain = fake_score_loss(velocity, x0, noise)
    torch.testing.assert_close(state_score_loss(velocity, x0, noise, zero, tau), 4 * plain)  # 1 / tau^2
    in_x0 = 0.25 * plain  # tau^2, and SNR 1
    torch.testing.assert_close(state_data_loss(velocity, add_noise(x0, noise, tau), x0, tau), in_x0)


@pytest.mark.parametrize("bounded", [False, True])
def test_levels_of_a_phase_lie_above_its_end(bounded: bool) -> None:
    terms = losses(dm={"weight": 1, "bounded": bounded})
    distiller = matched(batch=1500, losses=terms, schedule=PHASES, renoise_max=1.0)
    anchor = distiller.roll_out(0, range(1500), True)
    distiller.predict(anchor, with_graph=False)
    assert anchor.end is not None
    following = dict(zip((1.0, 6 / 7, 2 / 3, 0.4), (6 / 7, 2 / 3, 0.4, 0.0), strict=True))  # the shift is 2
    torch.testing.assert_close(
        anchor.end, torch.tensor([following[min(following, key=lambda s: abs(s - a))] for a in anchor.sigma])
    )
    at = distiller.context(anchor, distiller.draws(0, range(1500))).points_of_matching
    top = anchor.sigma if bounded else torch.ones(1500)
    share = (at.tau - anchor.end) / (top - anchor.end)
    assert ((at.tau >= anchor.end + 0.0199) & (share <= 1)).all()
    quantiles = torch.linspace(0.2, 0.9, 8)
    assert (share.quantile(quantiles) - quantiles).abs().max() < 0.05


@pytest.mark.parametrize("settings", [{"fake_target": "score"}, {"fake_target": "data", "fake_bounded": True}])
def test_a_fake_score_of_states_learns_the_distribution_that_they_come_from(settings: dict[str, Any]) -> None:
    """Of states of N(0.5, 0.7^2) at the list's levels, never of its data before the last step."""
    distill = distill_settings(
        batch_size=64,
        losses=losses(dm={"weight": 1}),
        iterations=120,
        fake={"lr": 6e-2, "warmup": 0, "decay_from": 0.4, "clip": 10.0},
        merge=0.0,
        **settings,
    )
    fake = GaussianModel(DIMENSIONS, offset=0.1, deviation=1.2)
    distiller, _ = build(distill=distill, schedule=PHASES, fake=fake)
    samples = range(64)
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    at = torch.arange(64) % 4
    for iteration in range(120):
        draws = distiller.draws(iteration, samples)
        x0, noise = 0.5 + 0.7 * draws.normal("x0", (DIMENSIONS,)), draws.normal("noise", (DIMENSIONS,))
        x, mean = add_noise(x0, noise, levels[at]), torch.zeros(64, DIMENSIONS)
        anchor = Anchor(x, levels[at], {"mean": mean}, samples, False, noise - x0, end=levels[at + 1])
        distiller.update_fake(iteration, [anchor])
    torch.testing.assert_close(fake.offset.mean().detach(), torch.tensor(0.5), atol=0.05, rtol=0)
    torch.testing.assert_close(fake.log_deviation.exp().detach(), torch.tensor(0.7), atol=0.05, rtol=0)


# SGMD


def sgmd_setup(distiller: Distiller) -> tuple[Anchor, Tensor]:
    anchor, found = terms_of(distiller)
    return anchor, in_x0(anchor, found["sgmd"])


def test_sgmd_is_the_gradient_through_the_fake_scores_input() -> None:
    """For linear predictions the Jacobian is a number, so that all of it can be written down."""
    distill = distill_settings(losses=losses(sgmd={"weight": 1, "guidance_scale": 2.0, "regulariser": 0.3}))
    fake = GaussianModel(DIMENSIONS, offset=0.2, deviation=0.9)
    distiller, _ = build(distill=distill, schedule=FIXED, fake=fake)
    anchor, measured = sgmd_setup(distiller)
    draws = distiller.draws(0, anchor.samples)
    tau = draws.uniform("sgmd_tau").clamp(0.02, 0.98)
    x0, mean = anchor.x0.detach(), anchor.conditioning["mean"]
    x = add_noise(x0, draws.normal("sgmd_noise", (DIMENSIONS,)), tau)
    real = optimal_x0(x, tau, 0.5 + 2 * mean, 0.7)
    ours = optimal_x0(x, tau, 0.2 + mean, 0.9)
    t = tau[:, None]
    slope = (1 - t) * 0.81 / ((1 - t) ** 2 * 0.81 + t**2)
    norm = (real - x0).abs().mean(1, keepdim=True)
    expected = (1 - t) * slope * ((ours - real) / norm - 0.3 * (ours - x0) / t)
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in fake.parameters())


def test_sgmd_rests_at_the_teachers_distribution_on_average() -> None:
    """There the scores agree; what the regulariser adds differs from sample to sample, and has mean 0."""
    terms = {"weight": 1, "guidance_scale": 2.0}
    _, plain = sgmd_setup(matched(scale=2.0, losses=losses(sgmd={**terms, "regulariser": 0.0})))
    assert plain.abs().max() < 1e-4
    limits = {"renoise_min": 0.1}  # the variance grows without bound towards 0
    _, regularised = sgmd_setup(matched(batch=2000, scale=2.0, losses=losses(sgmd=terms), **limits))
    error = regularised.std(0) / len(regularised) ** 0.5
    assert (regularised.std(0) > 0.01).all()
    assert (regularised.mean(0).abs() < 4 * error).all()


def test_the_gradient_of_sgmd_by_hand() -> None:
    x0, real, fake = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]])
    gradient = score_gradient(x0, real, fake, torch.tensor([0.5]), regulariser=0.1)
    torch.testing.assert_close(gradient, torch.tensor([[1.0 - 0.4, -1.0]]))


# Consistency


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_tangent_of_the_true_consistency_function_is_zero(scale: float) -> None:
    terms = losses(consistency={"weight": 1, "guidance_scale": scale, "warmup": 0})
    schedule = Schedule(kind="dynamic", min_len=1, max_len=5, sigma_min=0.1, sigma_max=0.9)
    assert loss_of(matched(scale=scale, losses=terms, schedule=schedule)) < 1e-6
    assert loss_of(matched(scale=scale + 1, losses=terms, schedule=schedule)) > 0.1


def test_the_step_of_the_discrete_form_tends_to_the_tangent() -> None:
    sizes = []
    for step in (0.2, 0.1, 0.05):
        terms = losses(consistency={"weight": 1, "warmup": 0, "step": step})
        length = loss_of(matched(losses=terms)) ** 0.5
        sizes.append(length / (1 - length))  # of a tangent, over 0.1, before it is normalised
    assert sizes[1] < 0.7 * sizes[0]
    assert sizes[2] < 0.7 * sizes[1]


def test_the_tangent_is_the_derivative_along_the_flow() -> None:
    """Against a central difference of the student's x0, for a student that is no consistency function."""
    student, teacher = (
        GaussianModel(DIMENSIONS, -0.3, 1.2).double(),
        GaussianModel(DIMENSIONS, **TEACHER).double(),
    )
    x, mean = torch.randn(2, 6, DIMENSIONS, generator=torch.Generator().manual_seed(1)).double()
    sigma, conditioning = torch.linspace(0.2, 0.9, 6).double(), {"mean": mean}

    def network(x: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return student(x, sigma, conditioning["mean"])

    with torch.no_grad():
        velocity, flow = network(x, sigma, conditioning), teacher(x, sigma, mean)
        change = velocity_change(network, x, sigma, conditioning, velocity, flow, torch.zeros(6))
        direction = consistency_direction(velocity, flow, change, sigma, torch.zeros(6).double(), share=1.0)

        def x0(h: float) -> Tensor:
            there = x + h * flow
            return there - (sigma + h)[:, None] * network(there, sigma + h, conditioning)

        tangent = (x0(1e-4) - x0(-1e-4)) / 2e-4
    size = tangent.square().mean(1, keepdim=True).sqrt() + 0.1
    torch.testing.assert_close(direction, -tangent / size, rtol=1e-5, atol=1e-7)


def test_warm_up_begins_with_the_flow_itself() -> None:
    velocity, flow, change = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    half = torch.full((2,), 0.5)
    direction = consistency_direction(velocity, flow, change, half, torch.zeros(2), share=0.0)
    difference = velocity - flow
    torch.testing.assert_close(direction, difference / (difference.square().mean(1, keepdim=True).sqrt() + 0.1))
    terms = losses(consistency={"weight": 1, "warmup": 4})
    distiller = matched(losses=terms)
    shares = []
    for done in (0, 1, 3, 9):
        distiller.student.updates_done = done
        shares.append(loss_of(distiller))
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < 1e-6
    assert shares[3] < 1e-6


def test_the_derivative_goes_through_the_real_architecture(tiny_sd3: Path) -> None:
    family = get_family("sd3")
    model = family.load_transformer(tiny_sd3)
    generator = torch.Generator().manual_seed(0)
    x, flow = torch.randn(2, 2, 4, 8, 8, generator=generator)
    conditioning = {
        "encoder_hidden_states": torch.randn(2, 8, 64, generator=generator),
        "pooled_projections": torch.randn(2, 64, generator=generator),
    }

    def network(x: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return family.velocity(model, x, sigma, conditioning)

    sigma = torch.tensor([0.4, 1.0])
    with torch.no_grad():
        here = network(x, sigma, conditioning)
        change = velocity_change(network, x, sigma, conditioning, here, flow, torch.zeros(2))
        h = 2e-4
        ahead, behind = (network(x + k * flow, sigma + k, conditioning) for k in (h, -h))
    torch.testing.assert_close(
        change, (ahead - behind) / (2 * h), rtol=0.02, atol=0.02 * float(change.abs().max())
    )


# Knobs


def test_guidance_that_fades_is_scaled_by_the_students_level() -> None:
    sizes = []
    for fade in (0.0, 2.0):
        terms = losses(ca={"weight": 1, "scale": 2.0, "fade": fade})
        anchor, found = terms_of(build(distill=distill_settings(losses=terms), schedule=FIXED)[0])
        sizes.append(in_x0(anchor, found["ca"]))
    torch.testing.assert_close(sizes[1], sizes[0] * anchor.sigma[:, None] ** 2)


def test_directions_are_divided_by_min_norm_at_least() -> None:
    def loss(min_norm: float) -> float:
        terms = losses(dm={"weight": 1}, cdm={"weight": 1}, ca={"weight": 1, "scale": 2}, min_norm=min_norm)
        _, found = terms_of(build(distill=distill_settings(losses=terms))[0])
        return float(torch.stack(list(found.values())).sum().detach())

    assert loss(100.0) == pytest.approx(4 * loss(200.0), rel=1e-4)


def test_direction_loss_has_the_gradient_of_minus_twice_the_direction() -> None:
    x0 = torch.zeros(2, 2, requires_grad=True)
    direction_loss(x0, torch.ones(2, 2)).backward()
    torch.testing.assert_close(x0.grad, torch.full((2, 2), -0.5))


# What they cost

GUIDED = {"weight": 1, "guidance_scale": 3.0}
PAIRS = {"weight": 1}
STEP = {"weight": 1, "step": 0.1}


@pytest.mark.parametrize("rollouts", ["shared", "fresh"])
@pytest.mark.parametrize(
    ("schedule", "parts", "terms"),
    [
        (FIXED, 1, {"dm": GUIDED, "cdm": GUIDED}),
        (FIXED, 2, {"cdm": {"weight": 1}}),
        (FIXED, 1, {"ca": {"weight": 1, "scale": 2}}),
        (PHASES, 1, {"dm": GUIDED}),
        (FIXED, 2, {"dm": GUIDED, "regression": PAIRS}),
        (FIXED, 1, {"regression": PAIRS}),
        (FIXED, 1, {"sgmd": GUIDED}),
        (FIXED, 2, {"sgmd": {"weight": 1}}),
        (FIXED, 1, {"consistency": GUIDED}),
        (FIXED, 2, {"consistency": STEP}),
    ],
)
def test_the_plan_counts_the_forwards_of_every_method(
    schedule: Schedule, parts: int, terms: dict[str, Any], rollouts: str
) -> None:
    distill = distill_settings(rollouts=rollouts, batch_size=24, losses=losses(**terms))
    distiller, networks = build(distill=distill, schedule=schedule, micro_batch=24 // parts)
    distiller.round(0)
    planned = forwards.forwards_of_round(distill, schedule, 2.0, parts=parts)
    with_graph = sum(count for key, count in networks.samples.items() if key.endswith("+graph")) / 24
    assert with_graph == planned.with_graph
    plain = networks.samples.total() / 24 - with_graph
    assert plain == pytest.approx(planned.plain, abs=0.7)  # three standard errors of the anchors' depth


# Recipes

ROOT = Path(__file__).parent.parent
RECIPES = ("cdm", "consistency", "decoupled-dmd", "dmd", "dmd2", "phased-dmd", "sgmd", "tdm")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_the_miniature_differs_in_its_method_alone(name: str) -> None:
    """Data and measure are params.yaml's; all train as the recipe `cdm` does, with as many student updates."""
    recipe, default = load(ROOT / "recipes" / f"{name}.yaml"), load(ROOT / "params.yaml")
    outside = {"schedule", "distill"}
    expected, found = default.model_dump(exclude=outside), recipe.model_dump(exclude=outside)
    assert (found["latents"].pop("train_pairs") > 0) == (name == "dmd")
    expected["latents"].pop("train_pairs")
    assert found == expected
    distill = recipe.distill
    assert (distill.iterations - distill.fake_only) / distill.student_every == 600
    same = {"batch_size", "student", "fake", "merge", "ema", "precision", "lora", "probe", "keep"}
    if name == "consistency":
        same.remove("student")  # at the others' rate it learns worse
    reference = load(ROOT / "recipes/cdm.yaml").distill
    assert distill.model_dump(include=same) == reference.model_dump(include=same)
    comment = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
    assert re.match(r"# .*arXiv \d{4}\.\d{5}", comment)


def test_the_recipes_are_guided_alike() -> None:
    """A teacher guided by 1 + a moves a student as CA of scale a does, which a CDM term without guidance dilutes."""
    for name in RECIPES:
        terms = load(ROOT / "recipes" / f"{name}.yaml").distill.losses
        if name == "consistency":
            assert terms.consistency.guidance_scale == load(ROOT / "params.yaml").teacher.guidance_scale
        elif terms.ca.weight:
            assert terms.ca.scale / (terms.dm.weight + terms.cdm.weight) == pytest.approx(0.72)
        else:
            guided_term = terms.sgmd if terms.sgmd.weight else terms.dm
            assert guided_term.guidance_scale == pytest.approx(1.72)


@pytest.mark.parametrize("name", RECIPES)
def test_the_method_of_a_recipe_runs(name: str) -> None:
    """A round on the Gaussian world with the recipe's own schedule and terms: finite, and the student moves."""
    recipe = load(ROOT / "recipes" / f"{name}.yaml")
    distill = recipe.distill.model_copy(update={"batch_size": 8, "fake_only": 0})
    student = GaussianFlowMap(DIMENSIONS, offset=-0.3, deviation=1.2)
    distiller, networks = build(distill=distill, schedule=recipe.schedule, student=student)
    before = {key: value.detach().clone() for key, value in networks.parameters("student").items()}
    metrics = distiller.round(0)
    assert all(math.isfinite(value) for value in metrics.values())
    assert {key.removeprefix("loss_") for key in metrics if key.startswith("loss_")} - {"fake"} == set(
        distill.losses.weights
    )
    assert all((value != before[key]).any() for key, value in networks.parameters("student").items())
