"""The training step: equal to the plain order of operations, gradients where they belong, nothing computed twice."""

from __future__ import annotations

import pytest
import torch

from cdm.params import Losses
from cdm.randomness import Draws
from cdm.training.distiller import parts_of
from cdm.training.points import Anchor, with_level
from cdm.training.terms import extrapolate
from reference.plain import PlainDistiller
from reference.world import DIMENSIONS, build, class_means, distill_settings, parameters

ONLY = {
    "ca": Losses.model_validate({"ca": {"weight": 1, "scale": 2}, "dm": {"weight": 0}, "cdm": {"weight": 0}}),
    "dm": Losses.model_validate({"ca": {"weight": 0, "scale": 2}, "dm": {"weight": 1}, "cdm": {"weight": 0}}),
    "cdm": Losses.model_validate({"ca": {"weight": 0, "scale": 2}, "dm": {"weight": 0}, "cdm": {"weight": 1}}),
}


@pytest.mark.parametrize("rollouts", ["shared", "fresh"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"student_every": 1},
        {
            "losses": {
                "ca": {"weight": 1, "scale": 2, "bounded": False},
                "dm": {"weight": 0},
                "cdm": {"weight": 1},
            }
        },
        {
            "losses": {
                "ca": {"weight": 1, "scale": 2},
                "dm": {"weight": 1, "bounded": True},
                "cdm": {"weight": 1, "bounded": True},
            }
        },
        {"losses": ONLY["ca"]},
        {"losses": ONLY["dm"]},
        {"losses": ONLY["cdm"]},
        {
            "losses": {
                "ca": {"weight": 0.7, "scale": 3, "fade": 0.5},
                "dm": {"weight": 1},
                "cdm": {"weight": 0.2},
                "min_norm": 2.0,
            }
        },
        {
            "losses": {
                "ca": {"weight": 1, "scale": 2, "point": "own"},
                "dm": {"weight": 1, "bounded": True},
                "cdm": {"weight": 0.5},
            }
        },
        {"fake_draws": "mirrored", "student_every": 4},
        {"fake_knows_level": True},
        {"fake_only": 2, "merge": 0.5},
    ],
    ids=[
        "default",
        "every",
        "no-dm-unbounded",
        "bounded",
        "ca",
        "dm",
        "cdm",
        "fade",
        "own",
        "mirrored",
        "level",
        "fake-only",
    ],
)
def test_equals_the_plain_order_of_operations(changes: dict, rollouts: str):
    """Three rounds on the same random numbers: the same losses and, through the updates, the same gradients."""
    distill = distill_settings(rollouts=rollouts, **changes)
    (ours, networks), (plain, plain_networks) = build(distill=distill), build(PlainDistiller, distill=distill)
    for start in range(0, 3 * distill.student_every, distill.student_every):
        measured, expected = ours.round(start), plain.round(start)
        for name, value in expected.items():
            assert measured[name] == pytest.approx(value, rel=1e-4), name
    for name, value in parameters(plain_networks).items():
        torch.testing.assert_close(parameters(networks)[name], value, rtol=1e-5, atol=1e-6)


def test_costs_less_than_the_plain_order():
    distill = distill_settings(rollouts="shared", batch_size=64)
    (ours, networks), (plain, plain_networks) = build(distill=distill), build(PlainDistiller, distill=distill)
    ours.round(0)
    plain.round(0)
    assert networks.samples["student"] < 0.5 * plain_networks.samples["student"]
    assert networks.samples["student+graph"] == 2 * 64  # at the anchor and off the trajectory, once each
    assert networks.calls["teacher"] == 1
    assert networks.calls["fake"] == 1
    assert networks.samples["teacher"] < plain_networks.samples["teacher"] == 4 * 64


def test_a_term_of_weight_zero_is_not_computed():
    for name, teacher, fake, with_graph in (("ca", 12, 0, 6), ("dm", 6, 6, 6), ("cdm", 6, 6, 6)):
        distiller, networks = build(distill=distill_settings(losses=ONLY[name]))
        metrics = distiller.round(0)
        assert [key for key in metrics if key in ("loss_ca", "loss_dm", "loss_cdm")] == [f"loss_{name}"]
        assert networks.samples["teacher"] == teacher
        assert networks.samples["fake"] == fake
        assert networks.samples["student+graph"] == with_graph


def anchor_of(distiller, samples) -> Anchor:
    anchor = distiller.roll_out(0, samples, serves_student=True)
    distiller.predict(anchor, with_graph=True)
    return anchor


@pytest.mark.parametrize("name", ["ca", "dm", "cdm"])
def test_gradient_reaches_the_student_alone(name: str):
    distiller, networks = build(distill=distill_settings(losses=ONLY[name]))
    for parameter in networks.models["teacher"].parameters():
        parameter.requires_grad_(True)  # would show a gradient if one could reach it
    networks.models["fake"].load_state_dict(networks.models["student"].state_dict())
    terms = distiller.student_terms(anchor_of(distiller, range(6)), Draws(0, 0, range(6)))
    terms[name].loss.backward()
    assert all(p.grad is None for role in ("teacher", "fake") for p in networks.models[role].parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in networks.models["student"].parameters())


def test_no_gradient_flows_through_the_extrapolation():
    """The CDM term's gradient is that of a student run at a constant off-trajectory point."""
    distiller, networks = build(distill=distill_settings(losses=ONLY["cdm"]))
    draws = Draws(0, 0, range(6))
    anchor = anchor_of(distiller, range(6))
    x0_off, sigma_off = extrapolate(distiller.context(anchor, draws))
    x0_off.sum().backward()
    measured = [p.grad.clone() for p in networks.models["student"].parameters()]
    for p in networks.models["student"].parameters():
        p.grad = None
    with torch.no_grad():
        v = networks.velocity("student", anchor.x, anchor.sigma, anchor.conditioning)
        x_off = anchor.x + (sigma_off - anchor.sigma)[:, None] * v
    v_off = networks.velocity("student", x_off, sigma_off, anchor.conditioning)
    (x_off - sigma_off[:, None] * v_off).sum().backward()
    for ours, expected in zip(measured, networks.models["student"].parameters(), strict=True):
        torch.testing.assert_close(ours, expected.grad)


@pytest.mark.parametrize("dm", [{"weight": 1}, {"weight": 1, "bounded": True}, {"weight": 0}])
@pytest.mark.parametrize("bounded", [True, False])
def test_sharing_a_point_with_dm_leaves_cas_level_uniform(dm: dict, bounded: bool):
    """CA's tau must stay U(0, sigma), or U(0, 1), whether or not it borrows DM's draw."""
    losses = {"ca": {"weight": 1, "scale": 2, "bounded": bounded}, "dm": dm, "cdm": {"weight": 0}}
    distill = distill_settings(losses=losses, renoise_min=0.0, renoise_max=1.0, batch_size=2000)
    distiller, _ = build(distill=distill)
    sigma = torch.full((2000,), 0.6)
    x = torch.zeros(2000, DIMENSIONS)
    anchor = Anchor(x, sigma, {}, range(2000), False, velocity=torch.zeros_like(x))
    points, rows = distiller.context(anchor, Draws(1, 0, range(2000))).points_of_guidance
    quantiles = torch.linspace(0.1, 0.9, 9)
    expected = quantiles * (0.6 if bounded else 1.0)
    assert (points.tau.quantile(quantiles) - expected).abs().max() < 0.04
    shares = dm["weight"] and (bounded or not dm.get("bounded"))
    fraction = 0.0 if not shares else (0.6 if bounded and not dm.get("bounded") else 1.0)
    assert abs(1 - len(rows) / 2000 - fraction) < 0.04


@pytest.mark.parametrize(
    ("most", "sizes"), [(2, [2, 2, 2, 1]), (4, [3, 4]), (6, [3, 4]), (7, [7]), (None, [7])]
)
def test_parts_are_as_few_and_as_equal_as_can_be(most: int | None, sizes: list[int]):
    parts = parts_of(range(10, 17), most)
    assert sorted(map(len, parts)) == sorted(sizes)
    assert [sample for part in parts for sample in part] == list(range(10, 17))


@pytest.mark.parametrize("batch_size", [6, 7])
@pytest.mark.parametrize("micro_batch", [2, 4, 5])
def test_micro_batches_give_the_gradients_of_the_whole_batch(micro_batch: int, batch_size: int):
    """Also where they do not divide the samples: those of a smaller part count no more than others."""
    distill = distill_settings(batch_size=batch_size)
    (whole, networks), (parts, part_networks) = (
        build(distill=distill),
        build(distill=distill, micro_batch=micro_batch),
    )
    for start in (0, 2):
        expected, measured = whole.round(start), parts.round(start)
        for name in ("loss_fake", "loss_ca", "loss_dm", "loss_cdm", "sigma", "grad_norm_student"):
            assert measured[name] == pytest.approx(expected[name], rel=1e-4), name
    for name, value in parameters(networks).items():
        torch.testing.assert_close(parameters(part_networks)[name], value, rtol=1e-5, atol=1e-6)


def test_fake_only_rounds_leave_the_student_alone_and_merge_the_fake_score_towards_it():
    distiller, networks = build(distill=distill_settings(fake_only=2, merge=1.0))
    before = parameters(networks)
    metrics = distiller.round(0)
    after = parameters(networks)
    assert "loss_dm" not in metrics
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("fake"))
    assert all(torch.equal(after[f"fake.{n}"], after[f"student.{n}"]) for n in ("offset", "log_deviation"))


def test_mirrored_draws_cancel_what_is_odd_in_them():
    """The mean over a pair: of the noise 0, of a level 1/2; each alone is distributed as before."""
    draws = Draws(0, 4, range(500))
    for purpose in ("fake", "other"):
        assert not (draws.normal(purpose, (3,)) + draws.mirror().normal(purpose, (3,))).any()
        torch.testing.assert_close(draws.uniform(purpose) + draws.mirror().uniform(purpose), torch.ones(500))
    assert draws.mirror().mirror() == draws


def test_rounds_depend_on_nothing_but_their_number():
    """No hidden state: other rounds and torch's global generator do not change what a round draws."""
    first, _ = build()
    second, _ = build()
    torch.manual_seed(1)
    a = first.roll_out(4, range(6), True)
    torch.manual_seed(2)
    torch.rand(7)
    b = second.roll_out(4, range(2, 4), True)
    torch.testing.assert_close(a.x[2:4], b.x)
    assert torch.equal(a.conditioning["mean"][2:4], class_means(4, range(2, 4))["mean"])


def test_a_fake_score_that_knows_the_level_tells_two_kinds_of_data_apart():
    """Data of a narrow kind made at one level and of a wide kind at another: only with the level does the fake
    score learn both means; without it, it learns their average."""
    x0 = torch.cat([torch.full((8, DIMENSIONS), -1.0), torch.full((8, DIMENSIONS), 1.0)])
    sigma = torch.cat([torch.full((8,), 0.2), torch.full((8,), 0.9)])
    means = {}
    for knows in (False, True):
        settings = {"lr": 6e-2, "warmup": 0}
        distill = distill_settings(
            fake_knows_level=knows, fake=settings, merge=0.0, batch_size=16, iterations=600
        )
        distiller, _ = build(distill=distill, samples=range(16))
        conditioning = {"mean": torch.zeros(16, DIMENSIONS)}
        anchor = Anchor(x0, sigma, conditioning, range(16), False, velocity=torch.zeros_like(x0))
        for iteration in range(100):
            distiller.update_fake(iteration, [anchor])
        noise = torch.zeros_like(x0)  # at level 1 the x0 prediction is the mean of the data
        for_fake = with_level(conditioning, sigma, distill)
        v = distiller.networks.velocity("fake", noise, torch.ones(16), for_fake).detach()
        means[knows] = -v.reshape(2, -1).mean(1)
    assert means[False].abs().max() < 0.2
    torch.testing.assert_close(means[True], torch.tensor([-1.0, 1.0]), atol=0.2, rtol=0)


def test_the_level_map_starts_at_nothing_and_is_not_blended():
    distiller, _ = build(distill=distill_settings(fake_knows_level=True, merge=1.0))
    fake = distiller.networks.parameters("fake")
    assert set(fake) - set(distiller.networks.parameters("student")) == {"level.weight", "level.bias"}
    assert not fake["level.weight"].any()
    distiller.round(0)
    assert fake["level.weight"].abs().sum() > 0
