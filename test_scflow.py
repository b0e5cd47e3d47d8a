"""Properties of scflow.py in the order of its sections, then of toy_2d.py, of celeba_latent.py and of the README.

Every docstring says what is tested, and why its tolerance. Exact statements run in float64 (fixture `float64`);
random ones are z-scores at a fixed seed.
"""

import ast
import copy
import csv
import functools
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import celeba_latent
import scflow
import toy_2d
from scflow import (
    MLP,
    DiT,
    EnergyDistance,
    GaussianMixture,
    LatentDiscriminator,
    Phase,
    PointDiscriminator,
    TeacherSettings,
    distill,
    distill_losses,
    predict_x0,
    sample,
    train_teacher,
)

torch.set_num_threads(1)  # tiny matrices: more threads are slower, and the order of sums must not change

MEANS, WEIGHTS = [[-1.5, 0.3], [0.4, -0.8], [2.0, 1.0]], [0.6, 0.3, 0.1]  # skewed: no symmetry to pass by
BASE = dict(
    steps=6, batch=32, lr=1e-2, lr_disc=1e-2, lambda_consistency=0.0, lambda_adv=0.0, lambda_self=0.0, lambda_bi=0.0,
    warmup_adv=0, warmup_self=0, warmup_bi=0, delta=0.3, tau=0.4, distance="squared", self_source="student",
    self_form="x0", at_one=0.0, adversarial="hinge", r1=0.0, r1_every=1, target_ema=0.9, ema=0.99,
)  # fmt: skip
ALL_FOUR = dict(lambda_consistency=1.0, lambda_adv=0.3, lambda_self=0.7, lambda_bi=0.5)


# ═══ Helpers ════════════════════════════════════════════════════════════════════════════════


@pytest.fixture(autouse=True)
def seeded():
    """Fresh weights are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Double precision for everything made in the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def phase(**changes):
    return Phase(**{**BASE, **changes})


@torch.no_grad()
def scramble(net, seed=1):
    """Redraw every parameter, zero-initialised ones too."""
    g = gen(seed)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) / p[0].numel() ** 0.5)
    return net


def mlp(seed=1, dim=2):
    return scramble(MLP(dim, width=16, depth=2), seed)


def dit(seed=1, shape=(2, 4, 6), patch=2):
    return scramble(DiT(shape, patch, dim=16, depth=2, heads=2, ratio=2), seed)


def critic(seed=9):
    return scramble(PointDiscriminator(2, width=16, depth=2), seed)


NETS = {"mlp": (mlp, (2,)), "dit": (dit, (2, 4, 6))}


def skewed():
    return GaussianMixture(MEANS, 0.3, WEIGHTS)


def batch(n, generator):
    return skewed().sample(n, generator)[0], None


def draw(n, seed=0, low=0.0, high=1.0):
    """x₀ of the skewed mixture, x₁, t in [low,high] and x_t."""
    g = gen(seed)
    x0 = batch(n, g)[0]
    x1, t = torch.randn(x0.shape, generator=g), low + (high - low) * torch.rand(n, generator=g)
    return x0, x1, t, scflow.interpolate(x0, x1, t)


def z_scores(x):
    """How many standard errors the column means (N,…) are from zero."""
    return x.mean(0) / (x.std(0) / len(x) ** 0.5)


class Gaussian(nn.Module):
    """The exact flow map f*(x,t) = m + s/σ_t·(x − (1−t)m) of N(m,s²I), posed as a network."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = torch.tensor(mean), std
        self.mixture = GaussianMixture([mean], std)

    def f(self, x, t):
        t = t[:, None]
        sigma = (((1 - t) * self.std) ** 2 + t**2).sqrt()
        return self.mean + self.std / sigma * (x - (1 - t) * self.mean)

    def forward(self, x, t, cond=None):
        return (x - self.f(x, t)) / t[:, None]


class Counted(nn.Module):
    """A network that counts its calls, its rows, and its rows with a gradient."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls, self.rows, self.grad_rows = net, 0, 0, 0

    def forward(self, x, *rest):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        self.grad_rows += len(x) * torch.is_grad_enabled()
        return self.net(x, *rest)


def same(a, b):
    """Bitwise equality of nested dictionaries, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def refused(call, *args, **options):
    """The call raises a ValueError of one line."""
    with pytest.raises(ValueError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def weights_of(net):
    return copy.deepcopy(net.state_dict())


def finite(net):
    return all(p.isfinite().all() for p in net.parameters())


# ═══ 1. The straight path ═══════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("name", NETS)
def test_landing_point_at_time_zero_is_the_point_itself(name):
    """f(x,0) = x bitwise for random weights; at t = ½ the same network moves the point, so this is not vacuous."""
    make, shape = NETS[name]
    net, x = make(), torch.randn(5, *shape)
    assert torch.equal(predict_x0(net, x, torch.zeros(5)), x)
    assert (predict_x0(net, x, torch.full((5,), 0.5)) - x).abs().mean() > 0.01


@pytest.mark.usefixtures("float64")
def test_time_runs_from_data_at_zero_to_noise_at_one():
    """x_0 is data, x_1 noise, dx_t/dt = x₁ − x₀, and that v lands on x₀ from every t (rounding: 1e-12)."""
    x0, x1, t, xt = draw(64)
    assert torch.equal(scflow.interpolate(x0, x1, torch.zeros(64)), x0)
    assert torch.equal(scflow.interpolate(x0, x1, torch.ones(64)), x1)
    slope = (scflow.interpolate(x0, x1, t + 0.5) - xt) / 0.5  # a straight line: its difference quotient is exact
    assert torch.allclose(slope, x1 - x0, atol=1e-12)
    assert torch.allclose(predict_x0(lambda x, t, cond: x1 - x0, xt, t), x0, atol=1e-12)
    assert scflow.flow_matching_loss(slope, x0, x1) < 1e-24 < scflow.flow_matching_loss(-slope, x0, x1)


# ═══ 2. Sampling ════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("solver", scflow.SOLVERS)
@pytest.mark.parametrize("start", [1.0, 0.6])
def test_sampling_walks_down_to_zero(solver, start):
    """The times a network sees fall from `start` in equal steps, there are nfe() of them, and dx = v·dt (1e-6)."""
    times = []

    def net(x, t, cond):
        times.append(t)
        return torch.full_like(x, 2.0)

    noise = torch.randn(3, 2, generator=gen())
    x, path = sample(net, noise, 4, solver, start=start, beta=0.0, trajectory=True)
    grid = [start * k / 4 for k in (4, 3, 2, 1, 0)]
    expected = [t for a, b in zip(grid, grid[1:]) for t in (a, b)] if solver == "heun" else grid[:-1]
    assert torch.allclose(torch.stack(times), torch.tensor(expected)[:, None].expand(-1, 3), atol=1e-6)
    assert len(times) == scflow.nfe(4, solver)
    assert path.shape == (5, 3, 2) and torch.equal(path[0], noise) and torch.equal(path[-1], x)
    if solver != "renoise":
        assert torch.allclose(x, noise - 2 * start, atol=1e-6)


@pytest.mark.parametrize("steps, solver", [(0, "euler"), (-1, "heun"), (1.5, "euler"), (4, "rk4")])
def test_sampler_refuses_what_it_cannot_do(steps, solver):
    """Fewer than one whole step, or an unknown solver, is a ValueError that names it."""
    with pytest.raises(ValueError, match=str(steps) if solver != "rk4" else "rk4"):
        sample(mlp(), torch.randn(3, 2), steps, solver)


@pytest.mark.usefixtures("float64")
def test_flow_map_of_one_gaussian():
    """The Heun flow map meets the closed form to 1e-6 from any t, one time per row (error falls as 1/steps²)."""
    exact, g = Gaussian([0.7, -1.2], 0.4), gen()
    x, t = torch.randn(200, 2, generator=g), torch.rand(200, generator=g)
    assert (exact.mixture.flow_map(x, t, steps=2000) - exact.f(x, t)).abs().max() < 1e-6


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("std", [0.15, 1.7])
def test_solver_order(solver, order, std):
    """The fitted slope of log error against log steps is −1 or −2 within 0.1 (not at s = 1: there Heun's reads 3)."""
    exact, x = Gaussian([0.7, -1.2], std), torch.randn(100, 2, generator=gen())
    steps = torch.tensor([256.0, 512.0, 1024.0])
    ends = [sample(exact.mixture, x, int(n), solver) for n in steps]
    errors = torch.stack([(end - exact.f(x, torch.ones(100))).norm() for end in ends]).log()
    logs = steps.log() - steps.log().mean()
    assert abs((logs * errors).sum() / logs.square().sum() + order) < 0.1


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("std", [0.15, 1.7])
def test_two_euler_steps_with_the_exact_map_have_the_wrong_spread(std):
    """Euler with f* is affine in the noise: slope s after one step, s(1+s)/√(1+s²) after two, both to rounding."""
    exact, noise = Gaussian([0.7, -1.2], std), torch.randn(10, 2, generator=gen())
    expected = {1: std, 2: std * (1 + std) / math.sqrt(1 + std**2)}
    for steps, slope in expected.items():
        difference = sample(exact, noise, steps) - sample(exact, -noise, steps)
        assert torch.allclose(difference, 2 * slope * noise, rtol=1e-10)


def test_renoising_with_the_exact_map_stays_exact():
    """With fresh noise (β = 1) mean and std stay those of the data, however many steps: |z| < 4 at n = 40,000."""
    exact, n, std = Gaussian([0.7, -1.2], 0.15), 40_000, 0.15
    x = sample(exact, torch.randn(n, 2, generator=gen()), 6, "renoise", beta=1.0, generator=gen(1))
    assert z_scores(x - exact.mean).abs().max() < 4
    assert ((x.std(0) / std - 1) * math.sqrt(2 * n)).abs().max() < 4  # the standard error of a std is s/√(2n)


def test_renoising_uses_the_same_noise_or_a_fresh_one():
    """β = 0 reuses x₁ bitwise and ignores the generator, β = 1 is independent of it (|z| < 4), ½ the formula (1e-6)."""
    noise = torch.randn(20_000, 2, generator=gen())
    zero_map = lambda x, t, cond: x / t[:, None]  # noqa: E731  f(x,t) = 0: what is left is the noise
    middle = {b: sample(zero_map, noise, 2, "renoise", beta=b, generator=gen(1), trajectory=True)[1][1] for b in (0, 1)}
    assert torch.allclose(middle[0], 0.5 * noise, atol=1e-6)
    assert z_scores(middle[1] * noise).abs().max() < 4 and abs(middle[1].std() - 0.5) < 0.01
    net, few = mlp(), noise[:8]
    runs = [sample(net, few, 3, "renoise", beta=0.0, generator=gen(seed)) for seed in (1, 2)]
    assert torch.equal(*runs)
    x, g = few, gen(1)
    for t, s in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        x = (1 - s) * predict_x0(net, x, torch.full((8,), t)) + s * (0.5 * few + 0.5 * torch.randn(8, 2, generator=g))
    assert torch.allclose(sample(net, few, 3, "renoise", beta=0.5, generator=gen(1)), x, atol=1e-6)


# ═══ 3. Conditions and guidance ═════════════════════════════════════════════════════════════

TOKENS, LATENTS = (3, 5), (2, 4, 6)  # three words of five


def labelled():
    """The skewed mixture's components with two labels, and a third of its own."""
    return GaussianMixture([*MEANS, [-0.5, 1.5]], 0.3, [0.5, 0.2, 0.1, 0.2], labels=[1, 2, 1, 3])


CONDITIONAL = {
    "mlp": lambda tokens=TOKENS: (scramble(MLP(2, width=16, depth=2, tokens=tokens)), (2,)),
    "dit": lambda tokens=TOKENS: (scramble(DiT(LATENTS, 2, dim=16, depth=2, heads=2, tokens=tokens)), LATENTS),
    "point critic": lambda tokens=TOKENS: (scramble(PointDiscriminator(2, 16, 2, tokens)), (2,)),
    "latent critic": lambda tokens=TOKENS: (scramble(LatentDiscriminator(LATENTS, 8, tokens)), LATENTS),
}


def conditional(name, tokens=TOKENS):
    """A random conditional network as a function of rows and condition, and five rows."""
    net, shape = CONDITIONAL[name](tokens)
    x, t = torch.randn(5, *shape, generator=gen()), torch.rand(5, generator=gen(1))
    return (lambda cond, rows=slice(None): net(x[rows], *[t[rows]] * ("critic" not in name), cond)), net


@pytest.mark.parametrize("name", CONDITIONAL)
def test_the_order_and_every_word_of_a_condition_count(name):
    """Other words, the same in another order, and a word fewer give other values; zeros are None, bitwise."""
    call, _ = conditional(name)
    rows = lambda *words: torch.tensor([words] * 5)  # noqa: E731
    base = call(rows(1, 2, 3))
    for words in ((1, 2, 4), (2, 1, 3), (1, 2, 0), (0, 1, 2), (0, 0, 0)):
        assert (call(rows(*words)) - base).flatten(1 if base.ndim > 1 else 0).abs().max() > 1e-3, words
    assert torch.equal(call(rows(0, 0, 0)), call(None))


@pytest.mark.parametrize("name", CONDITIONAL)
def test_each_row_has_its_own_condition(name):
    """A batch of different conditions is row by row what each gives alone (1e-5: float32 sums)."""
    call, _ = conditional(name)
    cond = torch.tensor([[1, 2, 3], [0, 0, 0], [5, 5, 5], [4, 0, 0], [1, 2, 4]])
    alone = torch.cat([call(cond[i : i + 1], slice(i, i + 1)) for i in range(5)])
    assert torch.allclose(call(cond), alone, atol=1e-5)


@pytest.mark.parametrize("name", CONDITIONAL)
@pytest.mark.parametrize(
    "cond",
    [
        torch.ones(5, 2),
        torch.ones(5, 4),
        torch.ones(4, 3),
        torch.ones(5),
        torch.full((5, 3), 6),
        torch.full((5, 3), -1),
    ],
    ids=["too short", "too long", "too few rows", "no words", "unknown word", "negative"],
)
def test_a_condition_of_another_form_is_refused(name, cond):
    """One line for a wrong length, wrong rows, tokens out of the table, and numbers that are not whole."""
    call, _ = conditional(name)
    refused(call, cond.long())
    refused(call, torch.ones(5, 3))  # floats


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_network_without_tokens_has_no_part_for_them(name):
    """No weight, no buffer, no entry of its architecture: an unconditional checkpoint is what it was."""
    _, net = conditional(name, None)
    assert not any("words" in key for key in net.state_dict()) and "tokens" not in net.arch
    assert not list(net.words.parameters())


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_conditional_network_is_read_back(name, tmp_path):
    """From the weights file alone, with its table of words: the same values bitwise."""
    call, net = conditional(name)
    scflow.save(tmp_path / "net.pt", net)
    again = scflow.load(tmp_path / "net.pt")
    assert again.words.tokens == TOKENS and same(again.state_dict(), net.state_dict())


def test_a_critic_projects_its_features_on_the_words():
    """logit(c) − logit(0) is linear in the words: each adds its own share, whatever the others are (1e-5)."""
    for name in ("point critic", "latent critic"):
        call, _ = conditional(name)
        share = lambda *words, call=call: call(torch.tensor([words] * 5)) - call(None)  # noqa: E731
        apart = share(1, 0, 0) + share(0, 2, 0) + share(0, 0, 3)
        assert torch.allclose(share(1, 2, 3), apart, atol=1e-5) and apart.abs().max() > 0.01


def test_guidance_is_one_pass_of_twice_the_rows():
    """v + w(v_c − v) of two separate passes (1e-6), in one call; w = 1 is the conditional velocity, w = 0 the other."""
    net, _ = CONDITIONAL["dit"]()
    x, t, cond = torch.randn(4, *LATENTS), torch.rand(4), torch.tensor([[1, 2, 3]] * 4)
    given, free = net(x, t, cond), net(x, t)
    assert (given - free).abs().max() > 1e-3
    for scale in (0.0, 1.0, 2.5):
        counted = Counted(net)
        v = scflow.guided(counted, scale)(x, t, cond)
        assert torch.allclose(v, free + scale * (given - free), atol=1e-6)
        assert (counted.calls, counted.rows) == (1, 8)


def test_guidance_without_a_condition_is_refused():
    """One line where no condition is given, and where the network takes none."""
    x, t = torch.randn(4, 2), torch.rand(4)
    refused(scflow.guided(CONDITIONAL["mlp"]()[0], 2.0), x, t)
    for net in (mlp(), skewed()):
        refused(scflow.guided(net, 2.0), x, t, torch.ones(4, 3, dtype=torch.int64))


def test_dropping_takes_whole_conditions():
    """A share of rows becomes zero, the others stay as they are (binomial: |z| < 4); none or all at the ends."""
    cond = torch.randint(1, 6, (4000, 3), generator=gen())
    dropped = scflow.drop(cond, 0.2, gen(1))
    gone = (dropped == 0).all(1)
    assert torch.equal(dropped[~gone], cond[~gone]) and abs(gone.double().mean() - 0.2) < 4 * (0.16 / 4000) ** 0.5
    assert torch.equal(scflow.drop(cond, 0.0, gen()), cond) and scflow.drop(cond, 1.0, gen()).sum() == 0


def test_the_teacher_learns_to_do_without_its_condition():
    """`teacher_drop` of the rows lose their condition, and none at 0; where there is none, nothing is drawn for it."""
    seen = []

    class Spy(MLP):
        def forward(self, x, t, cond=None):
            seen.append(cond)
            return super().forward(x, t, cond)

    def rows(share, mixture=labelled()):  # noqa: B008
        seen.clear()

        def batch(n, generator):
            x0, k = mixture.sample(n, generator)
            return x0, mixture.labels[k, None]

        (*_, run) = train_teacher(Spy(tokens=(1, 3)), batch, gen(), TeacherSettings(3, 2000, 1e-3, share))
        table = run.net.words.table.weight
        assert (table[0] == 0).all() and (table[1:] != 0).all()  # no word, no vector: not even a learned one
        return torch.cat(seen)

    assert abs((rows(0.3) == 0).double().mean() - 0.3) < 0.03 and (rows(0.0) == 0).sum() == 0
    generator, by_hand = gen(), gen()
    take(train_teacher(mlp(), batch, generator, TeacherSettings(1, 8, 1e-3, 0.5)))
    x0, _ = batch(8, by_hand)
    torch.randn(x0.shape, generator=by_hand), torch.rand(8, generator=by_hand)
    assert torch.equal(generator.get_state(), by_hand.get_state())
    refused(TeacherSettings, teacher_drop=1.0)
    refused(TeacherSettings, teacher_drop=-0.1)


@pytest.mark.parametrize("source, pinned", [("student", 0), ("frozen", 8)])
def test_conditions_reach_every_pass_of_the_distillation(source, pinned):
    """Teacher, target, source, student and critic get the rows' own conditions: losses are those computed by hand.

    With a source of its own, the critic judges the rows that are pinned at t = 1, which come from self-correction.
    """
    mixture, p = labelled(), scflow.Phase(**{f"lambda_{name}": 1.0 for name in scflow.LOSSES}, self_source=source)
    p = replace(p, at_one=pinned / 32, tau=0.0)
    student, target, other = (scramble(MLP(2, 16, 2, tokens=(1, 3)), seed) for seed in (1, 2, 4))
    disc, teacher = scramble(PointDiscriminator(2, 16, 2, (1, 3)), 3), scflow.guided(mixture, 2.0)
    origin = student if source == "student" else other
    nets = SimpleNamespace(teacher=teacher, student=student, target=target, disc=disc, source=origin)
    x0, k = mixture.sample(32, gen())
    cond, x1, t = mixture.labels[k, None], torch.randn(32, 2, generator=gen(1)), torch.rand(32, generator=gen(2))
    t[:pinned] = 1
    losses, fake = distill_losses(nets, x0, x1, t, p, p.weights(0), gen(3), cond)
    g, xt = gen(3), scflow.interpolate(x0, x1, t)
    s = t - torch.rand(32, generator=g) * t.clamp(max=p.delta)
    u = t + torch.rand(32, generator=g) * (1 - t).clamp(max=p.delta)
    free = mixture(xt, t)
    v = free + 2 * (mixture(xt, t, cond) - free)
    one = torch.ones(32)
    f_t, x0_hat = predict_x0(student, xt, t, cond), predict_x0(origin, x1, one, cond)
    xs, xu = (xt + (r - t)[:, None] * v for r in (s, u))
    distance = scflow.DISTANCES[p.distance]
    f_hat = predict_x0(student, scflow.interpolate(x0_hat.detach(), x1, t), t, cond)
    judged, about = (f_hat[:pinned], cond[:pinned]) if pinned else (x0_hat, cond)
    expected = {
        "consistency": distance(f_t, predict_x0(target, xs, s, cond)),
        "bi": distance(f_t, predict_x0(target, xu, u, cond)),
        "self": ((f_hat - x0_hat) ** 2).mean(),
        "adv": -disc(judged, about).mean(),
    }
    assert losses.keys() == expected.keys() and torch.allclose(fake, judged, atol=1e-5)
    for name, value in expected.items():
        assert torch.allclose(losses[name], value, rtol=1e-4), name


def test_a_guided_teacher_needs_a_student_to_start_from():
    """A velocity has no weights: refused; with `student=` it runs, and what is a module is prepared."""
    mixture, net = labelled(), MLP(2, 16, 2, tokens=(1, 3))
    batch = lambda n, g: (lambda x, k: (x, mixture.labels[k, None]))(*mixture.sample(n, g))  # noqa: E731
    make = lambda: PointDiscriminator(2, 16, 2, (1, 3))  # noqa: E731
    schedule, seen = (phase(**ALL_FOUR),), []
    refused(take, distill(scflow.guided(net, 2.0), make(), batch, gen(), schedule))
    before = weights_of(net)
    run = take(distill(scflow.guided(net, 2.0), make(), batch, gen(), schedule, net, prepare=seen.append))
    assert same(before, weights_of(net)) and not same(before, weights_of(run.student))
    assert seen == [run.student, run.target, run.frozen, run.disc]


# ═══ 4. Ground truth ════════════════════════════════════════════════════════════════════════


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 0.95])
def test_velocity_is_the_score_of_the_density(t):
    """v* = −(x + t·∇log p_t)/(1−t) by autograd, and DESIGN's sum over components, 1e-5 relative in float64."""
    mixture, (_, _, _, x) = skewed(), draw(200, low=t, high=t)
    x, times = torch.cat([x, 3 * x]).requires_grad_(), torch.full((400,), t)
    (score,) = torch.autograd.grad(mixture.log_density(x, times).sum(), x)
    v = mixture(x, times)
    assert (v + (x + t * score) / (1 - t)).norm() < 1e-5 * v.norm()
    var, mu = ((1 - t) * mixture.std) ** 2 + t**2, mixture.means
    square = (x[:, None] - (1 - t) * mu).square().sum(-1)
    gamma = torch.softmax(torch.tensor(WEIGHTS).log() - square / (2 * var), 1)[..., None]
    parts = -mu + (t - (1 - t) * mixture.std**2) / var * (x[:, None] - (1 - t) * mu)
    assert (v - (gamma * parts).sum(1)).norm() < 1e-10 * v.norm()


@pytest.mark.usefixtures("float64")
def test_velocity_at_noise_points_to_the_mean():
    """At t = 1 the velocity is x − Σ w_k μ_k (rounding: 1e-12)."""
    x = torch.randn(50, 2, generator=gen())
    mean = torch.tensor(WEIGHTS) @ torch.tensor(MEANS)
    assert torch.allclose(skewed()(x, torch.ones(50)), x - mean, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_density_against_torch_distributions():
    """log p_t equals that of torch's own mixture, for any t and dimension 3 (1e-10: rounding)."""
    mu, w, t = torch.randn(4, 3, generator=gen()), torch.tensor([0.4, 0.3, 0.2, 0.1]), 0.3
    scale = math.sqrt((0.7 * 0.5) ** 2 + t**2) * torch.ones(4, 3)
    parts = torch.distributions.Independent(torch.distributions.Normal(0.7 * mu, scale), 1)
    law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(w), parts)
    x = torch.randn(50, 3, generator=gen(1))
    found = GaussianMixture(mu, 0.5, w).log_density(x, torch.full((50,), t))
    assert torch.allclose(found, law.log_prob(x), atol=1e-10)


def test_velocity_is_the_conditional_mean():
    """E[(x₁−x₀−v*)·h(x_t,t)] = 0 for 7 h × 2 axes: |z| < 4 (Bonferroni 0.1%); wrong weights are seen (|z| > 10)."""
    x0, x1, t, xt = draw(100_000)
    a, b = xt.T
    h = torch.stack([torch.ones_like(a), a, b, (3 * a).sin(), a * b, (a > 1).float(), t * b], 1)[..., None]
    assert z_scores((x1 - x0 - skewed()(xt, t))[:, None] * h).abs().max() < 4
    assert z_scores((x1 - x0 - GaussianMixture(MEANS, 0.3)(xt, t))[:, None] * h).abs().max() > 10


def test_mixture_samples():
    """Stratified counts are n·w_k exactly; iid mean, second moment and counts within 4 standard errors."""
    mixture, n = skewed(), 20_000
    _, k = mixture.sample(n, gen(), stratified=True)
    assert k.bincount().tolist() == [12_000, 6_000, 2_000]
    x, k = mixture.sample(n, gen())
    w, mu = mixture.weights, mixture.means
    assert z_scores(nn.functional.one_hot(k, 3) - w).abs().max() < 4
    assert z_scores(x - w @ mu).abs().max() < 4
    assert z_scores(x**2 - w @ mu**2 - 0.3**2).abs().max() < 4
    assert z_scores((x - mu[k]).prod(1)).abs() < 4  # the axes of a component are independent


@pytest.mark.usefixtures("float64")
def test_a_label_leaves_the_mixture_of_its_components():
    """Density up to its share and velocity are those of a mixture of these alone (1e-12); the shares add up to p_t."""
    mixture = labelled()
    x0, x1, t, xt = draw(200)
    densities = []
    for label in (1, 2, 3):
        mine, cond = mixture.labels == label, torch.full((200, 1), label)
        alone = GaussianMixture(mixture.means[mine], mixture.std, mixture.weights[mine])
        share = mixture.weights[mine].sum().log()
        assert torch.allclose(mixture(xt, t, cond), alone(xt, t), atol=1e-12)
        densities.append(mixture.log_density(xt, t, cond))
        assert torch.allclose(densities[-1], share + alone.log_density(xt, t), atol=1e-12)
    assert torch.allclose(torch.stack(densities).logsumexp(0), mixture.log_density(xt, t), atol=1e-12)
    assert torch.equal(mixture(xt, t, torch.zeros(200, 1, dtype=torch.int64)), mixture(xt, t))
    refused(mixture, xt, t, torch.full((200, 1), 4))
    refused(mixture, xt, t, torch.ones(200, 2, dtype=torch.int64))
    again = scflow.build(mixture.arch)
    assert torch.equal(again.labels, mixture.labels) and "labels" not in skewed().arch


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 4.0])
def test_guided_velocity_is_that_of_the_tilted_density(scale):
    """v_w = −(x + t·s)/(1−t), s the gradient of (1−w)·log p_t(x) + w·log p_t(x|c) by central differences (1e-6)."""
    mixture, h = labelled(), 1e-5
    x = 2 * torch.randn(60, 2, generator=gen())
    for t0 in (0.1, 0.3, 0.6, 0.9):
        t, cond = torch.full((60,), t0), torch.tensor([1, 2, 3]).repeat(20)[:, None]

        def log(x, t=t, cond=cond):
            return (1 - scale) * mixture.log_density(x, t) + scale * mixture.log_density(x, t, cond)

        score = torch.stack([(log(x + h * e) - log(x - h * e)) / (2 * h) for e in torch.eye(2)], 1)
        v = scflow.guided(mixture, scale)(x, t, cond)
        error = (v + (x + t0 * score) / (1 - t0)).abs().max()
        assert error < 1e-6 * max(1, v.abs().max()), t0


# ═══ 5. Settings and schedules ══════════════════════════════════════════════════════════════


@pytest.mark.parametrize(
    "name, value",
    [("steps", 0), ("batch", -1), ("lr", 0.0), ("lr_disc", -1.0), ("r1_every", 0), ("delta", 0.0), ("delta", 1.5)]
    + [("tau", -0.1), ("tau", 2.0), ("at_one", 1.1), ("target_ema", -1.0), ("ema", 1.1), ("r1", -1.0)]
    + [("lambda_self", -0.1), ("warmup_bi", -1), ("lr", math.nan), ("distance", "l1"), ("adversarial", "wgan")]
    + [("self_source", "teacher"), ("self_form", "noise")],
)
def test_phase_refuses_bad_values(name, value):
    """A value out of its range is a ValueError that names the setting."""
    with pytest.raises(ValueError, match=name):
        phase(**{**ALL_FOUR, name: value})


def test_schedules_are_checked():
    """No phases, nothing to learn, or a frozen source before there is one: ValueError. The presets pass."""
    frozen = phase(**ALL_FOUR, self_source="frozen")
    for bad, word in (((), "phase"), ((frozen,), "frozen")):
        with pytest.raises(ValueError, match=word):
            scflow.check_schedule(bad)
        with pytest.raises(ValueError, match=word):
            next(distill(mlp(), critic(), batch, gen(), bad))
    scflow.check_schedule((phase(**ALL_FOUR), frozen))
    with pytest.raises(ValueError, match="zero"):
        phase()
    with pytest.raises(ValueError, match="teacher_batch"):
        TeacherSettings(teacher_batch=0)
    for schedule in scflow.SCHEDULES.values():
        scflow.check_schedule(schedule)


def test_rescale_keeps_the_proportions():
    """Shares stay within rounding (half a step a phase), every phase keeps a step, and nothing else changes."""
    schedule = (phase(**ALL_FOUR, steps=300), phase(**ALL_FOUR, steps=100, tau=0.0))
    assert [p.steps for p in scflow.rescale(schedule, 40)] == [30, 10]
    assert [p.steps for p in scflow.rescale(schedule, 1)] == [1, 1]
    assert scflow.rescale(schedule, 400) == schedule


# ═══ 6. Networks ════════════════════════════════════════════════════════════════════════════


def plain_dit(net, x, t):
    """The DiT again with loops, explicit softmax attention and sin-cos tables: nothing shared but the weights."""
    w, p, dim, heads = net.state_dict(), net.patch, net.arch["dim"], net.arch["heads"]
    (n, c, height, width), d = x.shape, dim // heads

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h, shift, scale):
        h = h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def silu(h):
        return h / (1 + (-h).exp())

    def gelu(h):
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    out, cells = torch.zeros_like(x), [(i, j) for i in range(height // p) for j in range(width // p)]
    freqs = [10_000 ** (-4 * k / dim) for k in range(dim // 4)]
    for b in range(n):
        patches = [x[b, :, i * p : i * p + p, j * p : j * p + p] for i, j in cells]
        tokens = torch.stack([patch.permute(1, 2, 0).flatten() for patch in patches])
        table = [[f(a * q) for f in (math.sin, math.cos) for a in cell for q in freqs] for cell in cells]
        h = linear("embed", tokens) + torch.tensor(table)
        angles = [1000 * t[b].item() * 10_000 ** (-k / 128) for k in range(128)]
        times = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        cond = silu(linear("time.2", silu(linear("time.0", times))))
        for k in range(net.arch["depth"]):
            shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{k}.modulation", cond).split(dim)
            query, key, value = linear(f"blocks.{k}.qkv", norm(h, shift1, scale1)).split(dim, 1)
            mixed = []
            for part in range(heads):
                q, kk, v = (m[:, part * d : part * d + d] for m in (query, key, value))
                scores = (q @ kk.T / math.sqrt(d)).exp()
                mixed.append(scores / scores.sum(1, keepdim=True) @ v)
            h = h + gate1 * linear(f"blocks.{k}.proj", torch.cat(mixed, 1))
            inner = gelu(linear(f"blocks.{k}.mlp.0", norm(h, shift2, scale2)))
            h = h + gate2 * linear(f"blocks.{k}.mlp.2", inner)
        shift, scale = linear("modulation", cond).split(dim)
        for token, (i, j) in zip(linear("head", norm(h, shift, scale)), cells):
            out[b, :, i * p : i * p + p, j * p : j * p + p] = token.reshape(p, p, c).permute(2, 0, 1)
    return out


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape, patch", [((2, 4, 6), 2), ((3, 4, 4), 1), ((1, 8, 4), 4)])
def test_dit_equals_a_plain_implementation(shape, patch):
    """Same output as `plain_dit` to 1e-10 in float64, with every zero-initialised layer redrawn."""
    net, x, t = dit(shape=shape, patch=patch), torch.randn(3, *shape), torch.tensor([0.0, 0.37, 1.0])
    expected = plain_dit(net, x, t)
    assert expected.std() > 0.1
    assert torch.allclose(net(x, t), expected, atol=1e-10)


def test_dit_starts_as_the_zero_map_with_closed_gates():
    """At initialisation the output is exactly 0, and every block returns its random tokens bitwise: all gates are 0."""
    net = DiT((2, 4, 6), 2, dim=16, depth=3, heads=2)
    assert net(torch.randn(3, 2, 4, 6), torch.rand(3)).abs().max() == 0
    tokens, c = torch.randn(3, 6, 16), torch.randn(3, 16)
    for block in net.blocks:
        gates = block.modulation(c).chunk(6, 1)
        assert gates[2].abs().max() == 0 and gates[5].abs().max() == 0
        assert torch.equal(block(tokens, c), tokens)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patchify_and_unpatchify_invert_each_other(p):
    """Both orders are the identity bitwise on a non-square latent, and a token holds its own patch."""
    x = torch.randn(2, 3, 8, 12)
    tokens = scflow.patchify(x, p)
    assert tokens.shape == (2, 96 // p**2, 3 * p * p)
    assert torch.equal(tokens[:, 12 // p].sort(1).values, x[:, :, p : 2 * p, :p].flatten(1).sort(1).values)
    assert torch.equal(scflow.unpatchify(tokens, p, 8, 12), x)
    tokens = torch.randn(tokens.shape)
    assert torch.equal(scflow.patchify(scflow.unpatchify(tokens, p, 8, 12), p), tokens)


def test_what_does_not_divide_is_refused():
    """Sizes that do not divide are a one-line ValueError, not a wrong shape or another library's error."""
    for shape, p in (((1, 2, 5, 4), 2), ((1, 2, 4, 6), 4)):
        refused(scflow.patchify, torch.randn(shape), p)
    for shape, p, h, w in (((1, 6, 8), 2, 4, 4), ((1, 4, 7), 2, 4, 4), ((1, 3, 16), 4, 6, 8), ((1, 2, 4), 2, 1, 8)):
        refused(scflow.unpatchify, torch.randn(shape), p, h, w)
    for shape, heads in (((1, 6, 5), 2), ((1, 4, 4), 3)):
        refused(DiT, shape, 2, dim=16, depth=1, heads=heads)


@pytest.mark.parametrize(
    "net, shape",
    [
        (MLP(3, width=24, depth=2), (3,)),
        (DiT((2, 4, 6), 2, dim=16, depth=3, heads=2, ratio=2), (2, 4, 6)),
        (DiT((4, 8, 8), 1, dim=32, depth=1, heads=4), (4, 8, 8)),
        (DiT((4, 8, 8), 2, dim=32, depth=2, heads=4, tokens=(5, 9)), (4, 8, 8)),
        (MLP(2, width=24, depth=2, tokens=(1, 3)), (2,)),
    ],
)
def test_flops_are_those_counted(net, shape):
    """flops() equals torch's count exactly (MATH attention forced: the counter sees nothing in the fused kernel)."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(torch.randn(1, *shape), torch.rand(1))
    assert net.flops() == counter.get_total_flops()


@pytest.mark.parametrize("shape, width", [((2, 8, 8), 16), ((3, 6, 10), 8), ((4, 4, 4), 16), ((1, 5, 17), 8)])
def test_flops_of_a_critic_are_those_counted(shape, width):
    """flops() equals torch's count exactly, odd sides and widths that meet their cap included."""
    for disc in (LatentDiscriminator(shape, width), LatentDiscriminator((1, 32, 32), 128)):
        with FlopCounterMode(display=False) as counter:
            disc(torch.randn(1, *disc.arch["shape"]))
        assert disc.flops() == counter.get_total_flops()


@pytest.mark.parametrize("make", [dit, lambda: scramble(LatentDiscriminator((2, 4, 6), width=16))])
def test_a_lower_precision_is_one_of_the_passes_alone(make):
    """In bfloat16 (8 bits) output and gradient move, by less than 5%; they and the weights stay float32."""
    net, x, t = make(), torch.randn(16, 2, 4, 6), torch.rand(16)
    times, inner = [t] if isinstance(net, DiT) else [], []
    next(m for m in net.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda layer, args, out: inner.append(out.dtype)
    )

    def learn(precision):
        net.precision = precision
        net.zero_grad()
        out = net(x, *times)
        out.square().mean().backward()
        assert all(v.dtype == torch.float32 for p in net.parameters() for v in (p, p.grad)) and out.dtype == x.dtype
        return out.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])

    for full, half in zip(learn(torch.float32), learn(torch.bfloat16)):
        assert 1e-4 < (half - full).norm() / full.norm() < 0.05
    assert inner == [torch.float32, torch.bfloat16]
    if isinstance(net, DiT):
        latents = lambda n, g: (torch.randn(n, 2, 4, 6, generator=g), None)  # noqa: E731
        run = take(train_teacher(net, latents, gen(), TeacherSettings(2, 4, 1e-3)))
        parts = torch.utils._pytree.tree_leaves(run.state_dict()["parts"])
        assert {v.dtype for v in parts if torch.is_tensor(v)} == {torch.float32} and run.ema.precision == torch.bfloat16


def test_a_condition_is_refused():
    """Networks without conditioning say so, whatever the condition, rather than ignore it."""
    cond, x, t = torch.zeros(2, 5, dtype=torch.int64), torch.randn(2, 2), torch.rand(2)
    latents = torch.randn(2, 2, 4, 6)
    for call in (
        lambda: mlp()(x, t, cond),
        lambda: dit()(latents, t, cond),
        lambda: skewed()(x, t, cond),
        lambda: critic()(x, cond),
        lambda: LatentDiscriminator((2, 4, 6), width=8)(latents, cond),
        lambda: sample(mlp(), x, cond=cond),
    ):
        with pytest.raises(ValueError, match="unconditional"):
            call()


@pytest.mark.parametrize("shape", [(2,), (2, 8, 8), (3, 6, 10), (1, 4, 16)])
def test_a_critic_judges_every_row_alone(shape):
    """One logit a row for any shape, and no row sees the others of its batch (1e-5: float32 sums)."""
    disc = critic() if len(shape) == 1 else LatentDiscriminator(shape, width=16)
    x = torch.randn(6, *shape)
    assert disc(x).shape == (6,) and disc(x).std() > 1e-4
    assert torch.allclose(disc(x), torch.cat([disc(row[None]) for row in x]), atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_one_batch_is_learned_by_heart(name):
    """With x₀, x₁ and t fixed the flow loss falls below 1% of its start: the network can learn, and all of it."""
    make, shape = NETS[name]
    net, opt_lr = (MLP(2, width=64, depth=2), 1e-2) if name == "mlp" else (DiT(shape, 2, 32, 2, 2, 2), 5e-3)
    g = gen()
    x0, x1, t = torch.randn(8, *shape, generator=g), torch.randn(8, *shape, generator=g), torch.rand(8, generator=g)
    opt, xt, start = torch.optim.Adam(net.parameters(), opt_lr), scflow.interpolate(x0, x1, t), weights_of(net)
    losses = []
    for _ in range(200):
        loss = scflow.flow_matching_loss(net(xt, t), x0, x1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert not any(torch.equal(p, start[k]) for k, p in net.named_parameters())  # no parameter is dead


# ═══ 7. Losses ══════════════════════════════════════════════════════════════════════════════


def losses_of(nets, n, t, the_phase, seed=0):
    """`distill_losses` on a draw with every time equal to t."""
    x0, x1, t, _ = draw(n, seed, t, t)
    return distill_losses(SimpleNamespace(**nets), x0, x1, t, the_phase, the_phase.weights(0), gen(seed))


def reference_losses(nets, x0, x1, t, p, generator):
    """DESIGN section 3 written down again: one pass per symbol, every constant detached by hand."""

    def f(net, x, t):
        return x - t[:, None] * net(x, t)

    s = t - torch.rand(len(t), generator=generator) * t.clamp(max=p.delta)
    u = t + torch.rand(len(t), generator=generator) * (1 - t).clamp(max=p.delta)
    xt = (1 - t[:, None]) * x0 + t[:, None] * x1
    v = nets.teacher(xt, t).detach()
    at_s, at_u = (f(nets.target, xt + (r - t)[:, None] * v, r).detach() for r in (s, u))
    truncated = torch.stack([x0[i] if s[i] < p.tau else at_s[i] for i in range(len(s))])
    distance = {"squared": lambda d: (d * d).mean(), "huber": lambda d: ((d * d + 1e-4).sqrt() - 0.01).mean()}
    d, one = distance[p.distance], torch.ones_like(t)
    x0_hat = f(nets.student, x1, one)
    fixed = (x0_hat if p.self_source == "student" else f(nets.source, x1, one)).detach()
    xt_hat = (1 - t[:, None]) * fixed + t[:, None] * x1
    rest = f(nets.student, xt_hat, t) - fixed
    if p.self_form == "velocity":
        rest = nets.student(xt_hat, t) - (x1 - fixed)
    own, others = p.lambda_self > 0 and p.self_source == "student", p.lambda_consistency + p.lambda_bi + p.lambda_self
    if p.at_one > 0 and others and not own:
        x0_hat = x0_hat[: round(p.at_one * len(t))]  # the pinned rows serve the critic
    logits = nets.disc(x0_hat)
    adv = -logits.mean() if p.adversarial == "hinge" else (1 + (-logits).exp()).log().mean()
    f_t = f(nets.student, xt, t)
    losses = {"consistency": d(f_t - truncated), "bi": d(f_t - at_u), "self": (rest * rest).mean(), "adv": adv}
    return {k: v for k, v in losses.items() if getattr(p, f"lambda_{k}") > 0}, x0_hat


VARIANTS = {
    "all, huber": dict(ALL_FOUR, distance="huber"),
    "all, velocity form, softplus": dict(ALL_FOUR, self_form="velocity", adversarial="softplus"),
    "all, EMA source": dict(ALL_FOUR, self_source="ema"),
    "all, frozen source, pinned rows": dict(ALL_FOUR, self_source="frozen", at_one=0.25),
    "self": dict(lambda_self=1.0),
    "self and adv": dict(lambda_self=1.0, lambda_adv=1.0, at_one=0.25),
    "self and adv, shared": dict(
        lambda_self=1.0, lambda_adv=1.0, self_source="frozen", self_form="velocity", at_one=0.25
    ),
    "consistency and self": dict(lambda_consistency=1.0, lambda_self=1.0),
    "consistency and adv, shared": dict(lambda_consistency=1.0, lambda_adv=1.0, at_one=0.25),
    "bi and adv, shared": dict(lambda_bi=1.0, lambda_adv=1.0, at_one=0.25),
    "bi": dict(lambda_bi=1.0),
    "adv": dict(lambda_adv=1.0),
    "adv, pinned rows": dict(lambda_adv=1.0, at_one=0.25),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_their_gradients_equal_a_hand_written_reference(variant):
    """Values and student gradients to 1e-9 (rounding); x̂₀ is a constant of 'self', and constants get no gradient."""
    p = phase(**VARIANTS[variant])
    nets = SimpleNamespace(teacher=mlp(2), student=mlp(3), target=mlp(4), source=mlp(5), disc=critic())
    if p.self_source == "student":
        nets.source = nets.student
    x0, x1, t, _ = draw(32)
    t[: round(p.at_one * 32)] = 1.0
    losses, fake = distill_losses(nets, x0, x1, t, p, p.weights(0), gen(7))
    expected, expected_fake = reference_losses(nets, x0, x1, t, p, gen(7))
    assert losses.keys() == expected.keys()
    parameters = list(nets.student.parameters())
    for name, loss in losses.items():
        assert torch.allclose(loss, expected[name], rtol=1e-9), name
        ours, theirs = (torch.autograd.grad(v, parameters, retain_graph=True) for v in (loss, expected[name]))
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(ours, theirs)), name
        assert max(g.abs().max() for g in ours) > 1e-4, name
    assert fake is None if p.lambda_adv == 0 else torch.allclose(fake, expected_fake, rtol=1e-9)
    sum(losses.values()).backward()
    fixed = [nets.teacher, nets.target] + [nets.source] * (nets.source is not nets.student)
    assert all(q.grad is None for net in fixed for q in net.parameters())


@pytest.mark.parametrize("where", ["target", "x_t"])
def test_self_correction_sends_no_gradient_through_its_sample(where):
    """With x̂₀ from a network whose only parameter is a shift, neither the target nor x̂_t passes it a gradient."""
    shift = nn.Parameter(torch.zeros(2))
    slope = {"target": 0.0, "x_t": 1.0}[where]  # a student that ignores x leaves the target as the only way

    def student(x, t, cond):
        return slope * x - shift * (t == 1)[:, None]  # the shift acts at t = 1 only: that is, on x̂₀

    losses, _ = losses_of(dict(student=student, source=student), 16, 0.5, phase(lambda_self=1.0))
    assert not losses["self"].requires_grad or torch.autograd.grad(losses["self"], shift)[0].abs().max() == 0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["consistency", "bi"])
def test_consistency_residual_falls_by_four_when_the_window_halves(name):
    """At the exact map the residual norm of one Euler teacher step is O(δ²): ratio 4 within 10% at δ = 0.02, 0.01."""
    exact = Gaussian([0.7, -1.2], 0.4)
    nets, kind = dict(teacher=exact.mixture, student=exact, target=exact), {f"lambda_{name}": 1.0}
    residual = [losses_of(nets, 1000, 0.6, phase(**kind, delta=d, tau=0.0))[0][name].sqrt() for d in (0.02, 0.01)]
    assert 0 < residual[1] and abs(residual[0] / residual[1] - 4) < 0.4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("std", [0.15, 1.7])
def test_self_correction_of_the_exact_map_is_its_closed_form(std, t):
    """The loss is s²(((1−t)s+t)/σ_t − 1)² · mean x₁² exactly (1e-9), with mean x₁² → 1; the velocity form is it/t²."""
    exact, (_, x1, _, _) = Gaussian([0.7, -1.2], std), draw(2000, 0, t, t)
    sigma = math.sqrt(((1 - t) * std) ** 2 + t**2)
    expected = std**2 * (((1 - t) * std + t) / sigma - 1) ** 2 * x1.square().mean()
    assert abs(x1.square().mean() - 1) < 4 * math.sqrt(2 / x1.numel())  # so that the loss has the stated expectation
    for form, factor in (("x0", 1), ("velocity", t**-2)):
        losses, _ = losses_of(dict(student=exact), 2000, t, phase(lambda_self=1.0, self_form=form))
        assert torch.allclose(losses["self"], factor * expected, rtol=1e-9)


def test_truncation_makes_the_posterior_mean_the_optimum():
    """At f = x − t·v* the squared loss's gradient has mean zero on h where s < τ (|z| < 4), and is f − f_s elsewhere.

    The mixture is skewed, so the median or any symmetric point would fail: moving f by 0.05 gives |z| > 10.
    """
    n, tau = 100_000, 0.4
    x0, _, t, xt = draw(n, low=0.05)
    s = t - torch.rand(n, generator=gen(1)) * t.clamp(max=0.3)
    a, b = xt.T
    h = torch.stack([torch.ones_like(a), a, b, (3 * a).sin(), a * b, t], 1)[..., None]
    for shift in (0.0, 0.05):
        f_t = (predict_x0(skewed(), xt, t) + shift).requires_grad_()
        f_s = torch.full_like(f_t, 7.0)
        loss = scflow.truncated_consistency_loss(f_t, f_s, x0, s, tau, scflow.squared)
        (grad,) = torch.autograd.grad(loss, f_t)
        grad = grad * f_t.numel() / 2
        assert torch.allclose(grad[s >= tau], (f_t - f_s)[s >= tau], atol=1e-4)
        z = z_scores((grad[:, None] * h)[s < tau]).abs().max()
        assert z < 4 if shift == 0 else z > 10


@pytest.mark.parametrize("gap", [0.5, 1.0, 3.0])
def test_hinge_loss_of_the_sign_critic_measures_total_variation(gap):
    """For N(0,1) and N(μ,1) it is 2(1−TV), TV = erf(μ/√8), within 4 standard errors; other critics do worse."""
    n, tv = 200_000, math.erf(gap / math.sqrt(8))
    p, q = torch.randn(n, generator=gen(0)), torch.randn(n, generator=gen(1)) + gap
    loss = scflow.discriminator_loss((gap / 2 - p).sign(), (gap / 2 - q).sign())
    error = 2 * math.sqrt((1 - tv**2) / 2 / n)  # two means of 2·Bernoulli((1−TV)/2)
    assert abs(loss - 2 * (1 - tv)) < 4 * error
    for worse in (lambda x: 0.7 * (gap / 2 - x).sign(), lambda x: (gap / 2 + 0.3 - x).sign(), lambda x: 0 * x):
        assert scflow.discriminator_loss(worse(p), worse(q)) > loss


def test_r1_is_taken_on_the_data():
    """For D = a/2·‖x‖² it is γ/2·a²·E‖x₀‖²·every (1e-5), far from its value on fakes, with derivative a·γ·E‖x₀‖²."""
    a = torch.tensor(3.0, requires_grad=True)
    disc, gamma = (lambda x, cond=None: a / 2 * x.square().sum(1)), 0.5
    real, fake = torch.randn(64, 2) + 5, torch.randn(64, 2)
    norm = real.square().sum(1).mean()
    for every in (1, 4):
        p = phase(lambda_adv=1.0, adversarial="softplus", r1=gamma, r1_every=every)
        r1 = scflow.disc_losses(disc, real, fake, p)["r1"]
        assert torch.allclose(r1, gamma / 2 * 9 * norm * every, rtol=1e-5)
        assert torch.allclose(torch.autograd.grad(r1, a)[0], 3 * gamma * norm * every, rtol=1e-5)
    assert "r1" not in scflow.disc_losses(disc, real, fake, p, penalise=False)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("at", [0.0, 1.0])
@pytest.mark.parametrize("form, source", [("x0", "student"), ("velocity", "student"), ("x0", "ema"), ("x0", "frozen")])
def test_edges_of_time_and_batches_of_one(n, at, form, source):
    """All losses and gradients are finite at t = 0 and t = 1, for one row too, with huber's root and the critic's."""
    p = phase(**ALL_FOUR, distance="huber", self_form=form, self_source=source, r1=1.0)
    nets = dict(teacher=mlp(2), student=mlp(3), target=mlp(4), source=mlp(5), disc=critic())
    losses, fake = losses_of(nets, n, at, p)
    losses |= scflow.disc_losses(nets["disc"], torch.randn(n, 2), fake, p)
    assert len(losses) == 6 and all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    for net in (nets["student"], nets["disc"]):
        assert all(q.grad.isfinite().all() for q in net.parameters() if q.grad is not None)


@pytest.mark.parametrize("on", [c for r in (1, 2, 3, 4) for c in itertools.combinations(scflow.LOSSES, r)])
@pytest.mark.parametrize("source, at_one", [("student", 0.0), ("student", 0.25), ("ema", 0.25), ("frozen", 0.0)])
def test_a_loss_of_weight_zero_costs_nothing(on, source, at_one):
    """Rows per network are DESIGN section 3's, exactly: in calls, in rows, and in rows that keep a graph."""
    n, pinned = 8, round(8 * at_one)
    p = phase(**{f"lambda_{k}": 1.0 for k in on}, self_source=source, at_one=at_one)
    nets = {k: Counted(critic() if k == "disc" else mlp()) for k in ("teacher", "student", "target", "source", "disc")}
    follow = len({"consistency", "bi"} & set(on))
    own, adv, corr = source == "student", "adv" in on, "self" in on
    shared = adv and pinned > 0 and (follow or corr) and not (corr and own)  # the critic takes the pinned rows
    one_step = adv and not shared or corr and own
    losses_of(nets, n, 0.5, p)
    assert nets["teacher"].rows == n * (follow > 0)
    assert nets["target"].rows == n * follow and nets["target"].calls == (follow > 0)
    assert nets["source"].rows == n * (corr and not own)
    assert nets["student"].rows == n * ((follow > 0) + one_step + corr)
    assert nets["student"].grad_rows == n * ((follow > 0) + (adv and not shared) + corr)
    merged = follow > 0 and one_step and adv
    assert nets["student"].calls == (follow > 0) + one_step + corr - merged
    assert nets["disc"].rows == (pinned if shared else n) * adv
    assert all(nets[k].grad_rows == 0 for k in ("teacher", "target", "source"))


# ═══ 8. Averages of the weights ═════════════════════════════════════════════════════════════


def averaged_pair():
    """Two networks with a float buffer and an integer one, at very different scales."""
    pair = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    for seed, factor, net in zip((1, 2), (1e8, 1e-8), pair):
        scramble(net.requires_grad_(False), seed)
        net[0].weight.mul_(factor)
        net(torch.randn(5, 3))  # moves the buffers
    pair[1](torch.randn(5, 3))
    return pair


def test_average_at_decay_zero_and_one():
    """Decay 0 is bitwise the network, 1 bitwise unchanged, buffers included, floats and integers."""
    average, net = averaged_pair()
    before = weights_of(average)
    assert not any(torch.equal(before[k], v) for k, v in net.state_dict().items())
    scflow.ema_update(average, net, 1.0)
    assert same(average.state_dict(), before)
    scflow.ema_update(average, net, 0.0)
    assert same(average.state_dict(), net.state_dict())


def test_average_between():
    """average ← 0.9·average + 0.1·net for floats (1e-6 relative), integers are copied, the network is untouched."""
    average, net = averaged_pair()
    before, theirs = weights_of(average), weights_of(net)
    scflow.ema_update(average, net, 0.9)
    for k, v in average.state_dict().items():
        expected = 0.9 * before[k] + 0.1 * theirs[k] if v.is_floating_point() else theirs[k]
        assert torch.allclose(v, expected, rtol=1e-6, atol=1e-7), k
    assert same(net.state_dict(), theirs)


def test_growing_decay():
    """The sampling average forgets its start: decay 0 at first, then growing, and never above its setting."""
    decays = [scflow.growing(step, 0.99) for step in (0, 10, 100, 1000, 10**6)]
    assert decays[0] == 0 and decays == sorted(decays) and decays[1] > 0 and decays[-1] == 0.99


# ═══ 9. Training loops ══════════════════════════════════════════════════════════════════════

PARTS = ("student", "target", "ema", "frozen", "disc", "opt", "opt_disc")
TWO_PHASES = (
    phase(**ALL_FOUR, steps=3, r1=0.5),
    phase(lambda_self=1.0, lambda_adv=0.1, steps=3, self_source="frozen", self_form="velocity", at_one=0.25, ema=0.5),
)


def run_distill(schedule, seed=0, **options):
    return distill(mlp(2), critic(), batch, gen(seed), schedule, **options)


def take(runs, n=None):
    """The State after n more updates, or at the end: one object, which the loop keeps up to date."""
    return list(itertools.islice(runs, n))[-1]


def follow_rate(opt, theirs):
    """Take learning rate and betas of another optimiser: the schedule has a test of its own."""
    opt.param_groups[0].update({k: theirs.param_groups[0][k] for k in ("lr", "betas")})


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("adversarial, r1_every, at_one", [("hinge", 1, 0.0), ("softplus", 2, 0.25)])
def test_three_updates_equal_a_hand_written_loop(adversarial, r1_every, at_one):
    """Student, target (0.9 old + 0.1 new), average and critic after three updates of a plain loop, to 1e-8."""
    p = phase(**ALL_FOUR, adversarial=adversarial, r1=0.5, r1_every=r1_every, at_one=at_one, steps=5)
    teacher, student, target, ema, disc = mlp(2), mlp(2), mlp(2), mlp(2), critic()
    opt, opt_disc = (torch.optim.AdamW(net.parameters(), weight_decay=0) for net in (student, disc))
    nets, g = SimpleNamespace(teacher=teacher, student=student, target=target, disc=disc), gen(5)
    for i, run in enumerate(itertools.islice(run_distill((p,), seed=5), 3)):
        follow_rate(opt, run.opt)
        follow_rate(opt_disc, run.opt_disc)
        x0, _ = batch(p.batch, g)
        x1, t = torch.randn(x0.shape, generator=g), torch.rand(p.batch, generator=g)
        t[: round(p.at_one * p.batch)] = 1
        losses, fake = reference_losses(nets, x0, x1, t, p, g)
        opt.zero_grad()
        (losses["consistency"] + 0.3 * losses["adv"] + 0.7 * losses["self"] + 0.5 * losses["bi"]).backward()
        opt.step()
        with torch.no_grad():
            for average, decay in ((target, p.target_ema), (ema, scflow.growing(i, p.ema))):
                for a, b in zip(average.parameters(), student.parameters()):
                    a.copy_(decay * a + (1 - decay) * b)
        real = x0.clone().requires_grad_()
        logits = disc(real), disc(fake.detach())
        if adversarial == "hinge":
            loss = (1 - logits[0]).relu().mean() + (1 + logits[1]).relu().mean()
        else:
            loss = (1 + (-logits[0]).exp()).log().mean() + (1 + logits[1].exp()).log().mean()
        if i % r1_every == 0:
            (grad,) = torch.autograd.grad(logits[0].sum(), real, create_graph=True)
            loss = loss + p.r1 / 2 * grad.square().sum(1).mean() * r1_every
        opt_disc.zero_grad()
        loss.backward()
        opt_disc.step()
    for name, net in dict(student=student, target=target, ema=ema, disc=disc).items():
        for a, b in zip(getattr(run, name).parameters(), net.parameters()):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-9), name


def test_each_optimiser_moves_its_own_network():
    """The student's step changes no bit of the critic or its gradients, nor the critic's step those of the student."""
    p = phase(**ALL_FOUR, steps=4)
    run, seen = next(run_distill((p,))), []

    def snapshot():
        nets = {"student": run.student, "disc": run.disc, "teacher": run.teacher}
        return {k: (weights_of(n), [copy.deepcopy(q.grad) for q in n.parameters()]) for k, n in nets.items()}

    def watch(opt, name):
        step = opt.step
        zeroed = opt.zero_grad

        def watched():
            before = snapshot()
            step()
            after = snapshot()
            seen.append((name, {k for k in before if not same(before[k][0], after[k][0])}, after))

        opt.step, opt.zero_grad = watched, zeroed

    watch(run.opt, "student")
    watch(run.opt_disc, "disc")
    for net in (run.student, run.disc):
        net.zero_grad()
    for i in (1, 2):
        scflow.distill_step(run, p, i, batch)
    assert [(name, moved) for name, moved, _ in seen] == [("student", {"student"}), ("disc", {"disc"})] * 2
    for (_, _, one), (_, _, two) in (seen[0:2], seen[2:4]):
        assert same(one["student"][1], two["student"][1])  # the critic's backward pass left these alone
    assert all(g is None or g.abs().max() == 0 for g in seen[0][2]["disc"][1])
    assert same(seen[1][2]["disc"][1], seen[2][2]["disc"][1])  # and the student's left those alone
    assert same(snapshot()["student"][0], seen[2][2]["student"][0])  # nothing moved the student after its own step


def test_the_teacher_is_a_frozen_copy():
    """No update changes a bit of the teacher in use, its weights ask for no gradient, and the caller's is untouched."""
    teacher, start = mlp(2), weights_of(mlp(2))
    run = take(distill(teacher, critic(), batch, gen(), TWO_PHASES))
    assert same(run.teacher.state_dict(), start) and same(teacher.state_dict(), start)
    frozen = (run.teacher, run.target, run.ema, run.frozen)
    assert not any(q.requires_grad for net in frozen for q in net.parameters())
    assert all(q.requires_grad for net in (teacher, run.student) for q in net.parameters())
    assert not same(run.student.state_dict(), start) and run.teacher is not teacher


def test_warm_up_is_a_weight_that_starts_late():
    """Each loss appears at its own step, not before; without adv the critic does not move by a bit."""
    p = phase(**ALL_FOUR, warmup_adv=2, warmup_self=1, warmup_bi=3, steps=4)
    names, critics = [], []
    for run in run_distill((p,)):
        names.append(set(run.losses))
        critics.append(weights_of(run.disc))
    assert names[0] == {"consistency"} and names[1] == {"consistency", "self"}
    assert names[2] == {"consistency", "self", "adv", "disc"} and names[3] == names[2] | {"bi"}
    assert same(critics[1], critic().state_dict()) and not same(critics[2], critics[1])


def test_r1_comes_every_so_many_updates():
    """With r1_every = 3 the penalty is paid at updates 0, 3 and 6 of a phase."""
    p = phase(lambda_adv=1.0, adversarial="softplus", r1=1.0, r1_every=3, steps=7)
    assert ["r1" in run.losses for run in run_distill((p,))] == [i % 3 == 0 for i in range(7)]


@pytest.mark.parametrize("source", ["frozen", "ema"])
def test_the_second_phase_takes_over_the_average(source):
    """Student and target start phase 2 at the average (lr 1e-12 moves it < 1e-8); 'frozen' stays there bitwise."""
    second = phase(lambda_self=1.0, lr=1e-12, self_source=source, steps=3, target_ema=0.5, ema=0.5)
    runs = run_distill((phase(**ALL_FOUR, steps=30, ema=0.99), second))
    run = take(runs, 30)
    average, student = weights_of(run.ema), weights_of(run.student)
    assert max((average[k] - student[k]).abs().max() for k in average) > 1e-5
    sources = []
    for run in runs:
        for net in (run.student, run.target):
            assert max((average[k] - v).abs().max() for k, v in net.state_dict().items()) < 1e-8
        assert same(run.frozen.state_dict(), average)
        sources.append(run.source)
        assert all(state["step"] == len(sources) for state in run.opt.state.values())  # Adam starts afresh too
    assert len(sources) == 3 and all(net is getattr(run, source) for net in sources)


def test_the_ema_source_moves_and_the_frozen_one_does_not():
    """Through a phase with an ordinary learning rate 'ema' changes at every step and 'frozen' by no bit."""
    for source, count in (("ema", 3), ("frozen", 1)):
        runs = run_distill((TWO_PHASES[0], phase(lambda_self=1.0, steps=3, self_source=source, ema=0.5)))
        states = [weights_of(run.source) for run in runs][3:]
        assert len({str([v.tolist() for v in s.values()]) for s in states}) == count


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("with_oracle", [False, True])
def test_the_teacher_regresses_on_the_velocity(with_oracle):
    """Three updates equal a hand-written loop on x₁ − x₀, or on the oracle, to 1e-9."""
    settings, oracle = TeacherSettings(4, 32, 1e-2), skewed() if with_oracle else None
    net, g = mlp(2), gen(3)
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0)
    for run in itertools.islice(train_teacher(mlp(2), batch, gen(3), settings, oracle), 3):
        follow_rate(opt, run.opt)
        x0 = batch(32, g)[0]
        x1, t = torch.randn(32, 2, generator=g), torch.rand(32, generator=g)
        xt = (1 - t[:, None]) * x0 + t[:, None] * x1
        loss = (net(xt, t) - (skewed()(xt, t) if with_oracle else x1 - x0)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert abs(run.losses["flow"] - loss.item()) < 1e-9
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(run.net.parameters(), net.parameters()))


def test_learning_rates():
    """The student's rate comes within 20% of its phase's lr and ends below 1% of it; the critic's is constant."""
    kind = dict(lambda_adv=1.0, batch=4, steps=200, lr_disc=0.3)
    rates = [
        (run.opt.param_groups[0]["lr"], run.opt_disc.param_groups[0]["lr"])
        for run in run_distill((phase(**kind, lr=1e-3), phase(**kind, lr=5e-3)))
    ]
    assert all(disc == 0.3 for _, disc in rates)
    for part, lr in ((rates[:200], 1e-3), (rates[200:], 5e-3)):
        assert 0.8 * lr < max(part)[0] <= lr and 0 <= part[-1][0] < 0.01 * lr


def spoiled(n_good):
    """A batch function whose rows are NaN after so many calls."""
    calls = itertools.count()
    return lambda n, g: (batch(n, g)[0] * (1.0 if next(calls) < n_good else math.nan), None)


def test_a_state_keeps_the_latest_losses_as_numbers():
    """`also` adds to the losses of an update, else they are new; no graph is kept; a GPU looks every 50 updates."""
    run, one = scflow.State(gen()), torch.ones(2, requires_grad=True)
    run.record({"a": one.sum(), "b": one.mean()})
    run.record({"c": torch.tensor(3.0)}, also=True)
    assert run.losses == {"a": 2.0, "b": 1.0, "c": 3.0} and not run.latest["a"].requires_grad
    run.record({"d": torch.tensor(4.0)})
    assert run.losses == {"d": 4.0}
    for device, step, noticed in (("cpu", 7, True), ("cuda", 7, False), ("cuda", 100, True)):
        run.generator, run.step = SimpleNamespace(device=torch.device(device)), step
        try:
            run.record({"bad": torch.tensor(math.nan)})
        except FloatingPointError as error:
            assert noticed and f"the bad loss became nan at step {step + 1}" in str(error)
        else:
            assert not noticed


@pytest.mark.parametrize("loss, weights", [("consistency", ALL_FOUR), ("disc", dict(lambda_adv=1.0))])
def test_a_loss_that_is_not_finite_stops_distillation(loss, weights):
    """NaN rows in the third batch: FloatingPointError names the loss and step 3, and every network stays finite."""
    runs = distill(mlp(2), critic(), spoiled(2), gen(), (phase(**weights),))
    run = next(runs)
    with pytest.raises(FloatingPointError, match=rf"{loss} loss .*step 3"):
        take(runs)
    assert run.step == 2 and all(finite(getattr(run, k)) for k in PARTS[:5])


def test_a_loss_that_is_not_finite_stops_the_teacher():
    """The same for the teacher: its loss is called flow, and the weights of step 2 are kept."""
    runs = train_teacher(mlp(), spoiled(2), gen(), TeacherSettings(5, 16, 1e-2))
    run = next(runs)
    with pytest.raises(FloatingPointError, match="flow loss .*step 3"):
        take(runs)
    assert run.step == 2 and finite(run.net) and finite(run.ema)


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_distillation_resumes_bit_for_bit(stop, tmp_path):
    """Stopped in a phase or between two, saved, and taken up by fresh objects: every part ends bitwise equal."""
    whole = take(run_distill(TWO_PHASES))
    run = take(run_distill(TWO_PHASES), stop)
    scflow.save(tmp_path / "run.pt", run.ema, state=run.state_dict())
    saved = scflow.read(tmp_path / "run.pt")["state"]
    assert set(PARTS) <= saved["parts"].keys()
    assert same(saved["parts"]["target"], run.target.state_dict())
    resumed = take(distill(mlp(2), critic(77), batch, gen(99), TWO_PHASES, student=mlp(55), resume=saved))
    assert resumed.step == whole.step == 6 and resumed.losses == whole.losses
    for name in PARTS:
        assert same(getattr(resumed, name).state_dict(), getattr(whole, name).state_dict()), name
    assert torch.equal(resumed.generator.get_state(), whole.generator.get_state())


def test_the_teacher_resumes_bit_for_bit(tmp_path):
    """The same for the teacher: network, average, optimiser and generator."""
    settings = TeacherSettings(6, 32, 1e-2)
    whole = take(train_teacher(mlp(2), batch, gen(), settings))
    run = take(train_teacher(mlp(2), batch, gen(), settings), 3)
    scflow.save(tmp_path / "run.pt", run.ema, state=run.state_dict())
    saved = scflow.read(tmp_path / "run.pt")["state"]
    resumed = take(train_teacher(mlp(55), batch, gen(99), settings, resume=saved))
    for name in ("net", "ema", "opt"):
        assert same(getattr(resumed, name).state_dict(), getattr(whole, name).state_dict()), name
    assert torch.equal(resumed.generator.get_state(), whole.generator.get_state())


def test_a_run_repeats_itself():
    """The same seeds give the same run bitwise, another seed of the generator another one."""
    one, two, other = (take(run_distill(TWO_PHASES, seed)).ema.state_dict() for seed in (0, 0, 1))
    assert same(one, two) and not same(one, other)


def test_gradient_norms_are_those_of_the_weighted_losses():
    """norms_every reports ‖λ∇L‖ per loss at its steps alone (1e-5), and measuring changes no bit of the run."""
    plain, seen = take(run_distill(TWO_PHASES)), []
    for measured in run_distill(TWO_PHASES, norms_every=2):
        seen.append(measured.grad_norms.keys())
    assert same(plain.student.state_dict(), measured.student.state_dict()) and not plain.grad_norms
    assert all((len(keys) == 0) == bool(step % 2) for step, keys in enumerate(seen)) and {"self", "adv"} in seen
    net = mlp()
    norm = scflow.grad_norm(3 * sum(q.square().sum() for q in net.parameters()) / 2, net)
    assert abs(norm / (3 * sum(q.square().sum() for q in net.parameters()).sqrt()) - 1) < 1e-5


class Conditioned(nn.Module):
    """A network, or a critic, that insists on a condition for each of its rows, and notes it (copies note it too)."""

    seen = []

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, *rest):
        *t, cond = rest
        assert cond.shape == (len(x), 1)
        self.seen.append(cond[:, 0])
        return self.net(x, *t)


@pytest.mark.parametrize("changes", [{}, dict(self_source="ema"), dict(self_source="ema", at_one=0.25)])
def test_the_condition_travels_with_every_pass(changes):
    """Teacher, target, student, source and critic get the row numbers as conditions, stacked as the rows are."""

    def numbered(n, generator):
        return batch(n, generator)[0], torch.arange(n)[:, None]

    Conditioned.seen.clear()
    for _ in distill(
        Conditioned(mlp()), Conditioned(critic()), numbered, gen(), (phase(r1=1.0, **ALL_FOUR, **changes),)
    ):
        pass
    assert len(Conditioned.seen) >= 7 * BASE["steps"]
    for rows in Conditioned.seen:
        n = int(rows.max()) + 1
        assert n in (8, 32) and torch.equal(rows, torch.arange(n).repeat(len(rows) // n))


def test_a_teacher_without_weights_needs_a_student():
    """An oracle and a plain function cannot initialise the student: one clear line."""
    for teacher in (skewed(), lambda x, t, cond=None: x):
        with pytest.raises(ValueError, match="pass student="):
            next(distill(teacher, critic(), batch, gen(), (phase(**ALL_FOUR),)))


def test_the_learning_rate_rises_along_a_line_and_falls_along_a_cosine():
    """1/50 at the first update, half at mid-way, nearly 0 at the last (closed form, 1e-12)."""
    assert abs(scflow.lr_factor(0, 1000) - 1 / 50) < 1e-12 and abs(scflow.lr_factor(500, 1000) - 0.5) < 1e-12
    assert scflow.lr_factor(999, 1000) < 1e-5


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 4, 10)])
def test_latents_of_any_shape_are_distilled(shape):
    """A DiT and a convolutional critic run both phases on (C,H,W): losses finite, every network moved, shapes kept."""
    net, disc = DiT(shape, 2, dim=16, depth=1, heads=2), LatentDiscriminator(shape, width=8)
    start = weights_of(disc)
    latents = lambda n, g: (torch.randn(n, *shape, generator=g), None)  # noqa: E731
    run = take(distill(scramble(net), disc, latents, gen(), TWO_PHASES))
    assert run.step == 6 and all(math.isfinite(v) for v in run.losses.values())
    assert finite(run.student) and not same(disc.state_dict(), start)
    assert sample(run.ema, torch.randn(3, *shape), 2).shape == (3, *shape)


UPDATES = {f"{k} {i}": p for k, phases in scflow.SCHEDULES.items() for i, p in enumerate(phases)}
UPDATES |= {f"faces {k} {i}": p for k, phases in celeba_latent.SCHEDULES.items() for i, p in enumerate(phases)}
UPDATES |= {k: phase(**v, steps=2) for k, v in VARIANTS.items()}


@pytest.mark.parametrize("name", UPDATES)
def test_flops_of_an_update_are_those_counted(name):
    """Within 4% of torch's count of a real update: a first layer has no gradient to pass on, and R1 is left out."""
    p, shape = scflow.replace(UPDATES[name], batch=8, r1=0.0), (4, 8, 8)
    net, disc = scramble(DiT(shape, 2, dim=64, depth=3, heads=2)), LatentDiscriminator(shape, width=16)
    latents = lambda n, g: (torch.randn(n, *shape, generator=g), None)  # noqa: E731
    run = next(distill(net, disc, latents, gen(), (phase(lambda_self=1.0, batch=1),)))
    run.source = getattr(run, p.self_source)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        scflow.distill_step(run, p, p.steps - 1, latents)
    counted = counter.get_total_flops() / 8
    assert abs(scflow.distill_flops(net, disc, p, p.steps - 1) / counted - 1) < 0.04
    if name == "faces paper 0":  # losses that are still off cost nothing
        assert scflow.distill_flops(net, disc, p, 0) < 0.8 * counted


def test_what_runs_is_prepared_once():
    """`prepare` gets every network that an update calls, each once, the copies that distillation makes included."""
    prepared, called = [], set()

    def prepare(net):
        prepared.append(net)
        net.register_forward_hook(lambda net, *_: called.add(net))

    run = take(run_distill(TWO_PHASES, prepare=prepare))
    used = [run.teacher, run.student, run.target, run.frozen, run.disc]
    assert len(prepared) == 5 and set(prepared) == set(used) == called


def test_r1_goes_round_a_compiled_critic():
    """A compiled graph has no second derivative; the critic's losses and gradients are those of a plain one (1e-5)."""
    p, g = phase(lambda_adv=1.0, adversarial="softplus", r1=1.0), gen()
    real, fake = torch.randn(8, 2, 4, 4, generator=g), torch.randn(8, 2, 4, 4, generator=g)
    plain, compiled = (scramble(LatentDiscriminator((2, 4, 4), width=8)) for _ in range(2))
    compiled.compile(backend="aot_eager")
    for disc in (plain, compiled):
        losses = scflow.disc_losses(disc, real, fake, p)
        sum(losses.values()).backward()
    assert losses["r1"] > 1e-4 and compiled.state_dict().keys() == plain.state_dict().keys()
    for a, b in zip(plain.parameters(), compiled.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [100, 101, 102])
def test_one_student_step_beats_one_teacher_step_twentyfold(seed):
    """Energy distance on eight Gaussians after a short run: 20 times smaller at least (hundreds after a full one)."""
    torch.manual_seed(seed)
    angles = torch.arange(8) * math.pi / 4
    ring = GaussianMixture(2 * torch.stack([angles.cos(), angles.sin()], 1), 0.15)
    g = gen(seed)
    draw_ring = lambda n, g: (ring.sample(n, g)[0], None)  # noqa: E731
    teacher = take(train_teacher(MLP(2, width=64, depth=3), draw_ring, g, TeacherSettings(400, 256, 4e-3))).ema
    short = phase(**ALL_FOUR, steps=400, batch=256, lr=2e-3, lr_disc=1e-3, tau=0.0, distance="huber")
    disc, short = PointDiscriminator(2, width=64, depth=2), (scflow.replace(short, lambda_self=0.0),)
    student = take(distill(teacher, disc, draw_ring, g, short)).ema
    measure, noise = EnergyDistance(*ring.sample(2000, g, stratified=True)), torch.randn(2000, 2, generator=g)
    assert measure(sample(teacher, noise)) > 20 * max(measure(sample(student, noise)), 1e-3)


# ═══ 10. Checkpoints ═════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("make", [mlp, dit, critic, skewed, lambda: scramble(LatentDiscriminator((2, 4, 4), width=8))])
def test_a_saved_network_comes_back(make, tmp_path):
    """load() rebuilds any network of the module from the file alone: weights bitwise, eval mode, no gradients."""
    net, path = make(), tmp_path / "net.pt"
    scflow.save(path, net, note={"seed": 3})
    back = scflow.load(path)
    assert type(back) is type(net) and same(back.state_dict(), net.state_dict())
    assert not back.training and not any(q.requires_grad for q in back.parameters())
    assert scflow.read(path)["note"] == {"seed": 3}
    assert scflow.read(path)["weights"].keys() == net.state_dict().keys()
    assert not any(part in key for key in scflow.read(path)["weights"] for part in ("_orig_mod.", "module."))
    if not isinstance(net, PointDiscriminator | LatentDiscriminator):
        noise = torch.randn(4, *getattr(net, "shape", (2,)), generator=gen())
        assert torch.equal(sample(back, noise, steps=1), sample(net, noise, steps=1))


def test_a_compiled_network_is_saved_without_prefixes(tmp_path):
    """torch.compile wraps a module as `_orig_mod`; the checkpoint holds the plain names, and loads as ever."""
    net = mlp()
    scflow.save(tmp_path / "net.pt", torch.compile(net))
    assert scflow.read(tmp_path / "net.pt")["weights"].keys() == net.state_dict().keys()
    assert same(scflow.load(tmp_path / "net.pt").state_dict(), net.state_dict())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_old_checkpoint(error, tmp_path, monkeypatch):
    """When writing stops half-way the old file is whole, and no temporary file is left."""
    path, net = tmp_path / "net.pt", mlp(1)
    scflow.save(path, net)

    def broken(content, file):
        file.write(b"PK\x03\x04 half a file")
        raise error

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(type(error)):
        scflow.save(path, mlp(2))
    assert same(scflow.load(path).state_dict(), net.state_dict())
    assert os.listdir(tmp_path) == ["net.pt"]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_killed_save_keeps_the_old_checkpoint(tmp_path):
    """SIGKILL in the middle of the second save leaves the first one loadable, and a third one goes through."""
    path = tmp_path / "net.pt"
    program = f"""if True:
        import os, signal, torch, scflow
        scflow.save({str(path)!r}, scflow.MLP(2, width=16, depth=2), step=1)
        def half(content, file):
            file.write(b"PK half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = half
        scflow.save({str(path)!r}, scflow.MLP(2, width=16, depth=2), step=2)
    """
    here = os.path.dirname(os.path.abspath(scflow.__file__))
    done = subprocess.run([sys.executable, "-c", program], cwd=here, timeout=60)
    assert done.returncode == -9
    assert scflow.read(path)["step"] == 1 and isinstance(scflow.load(path), MLP)
    scflow.save(path, mlp(), step=3)
    assert scflow.read(path)["step"] == 3


class Attack:
    """Code that would run when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(share, tmp_path):
    """A file cut anywhere is a one-line ValueError."""
    path = tmp_path / "net.pt"
    scflow.save(path, mlp())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(scflow.load, path)


def test_a_foreign_file_is_refused(tmp_path):
    """Random bytes, text, other torch files, a folder, nothing: a one-line ValueError; pickled code does not run."""
    path, marker, g = tmp_path / "net.pt", tmp_path / "ran", gen()
    refused(scflow.load, path)
    refused(scflow.load, tmp_path)
    contents = [bytes(torch.randint(256, (n,), generator=g).tolist()) for n in (1, 2, 3, 10, 100, 1000) * 20]
    contents += [b"hello\n", b"PK\x03\x04 no zip", pickle.dumps([1, 2]), pickle.dumps(Attack(marker)), b"\x80\x02."]
    for content in contents:
        path.write_bytes(content)
        refused(scflow.load, path)
    for thing in ([1, 2], mlp().state_dict(), mlp(), torch.ones(3), Attack(marker), {"format": "other"}):
        torch.save(thing, path)
        refused(scflow.load, path)
    assert not marker.exists()


def test_another_architecture_is_refused(tmp_path):
    """Weights for other sizes, an unknown class or none at all: a one-line ValueError, not torch's list of keys."""
    path, net = tmp_path / "net.pt", mlp()
    scflow.save(path, net)
    refused(scflow.load, path, MLP(2, width=8, depth=2))
    refused(scflow.load, path, dit())
    for arch in (None, {"name": "Unknown"}, {**net.arch, "width": 8}, {**net.arch, "colour": 1}):
        net.arch = arch
        scflow.save(path, net)
        refused(scflow.load, path)


# ═══ 11. Measures ═══════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("d, error", [(2, 3e-4), (3, 1e-5)])
def test_energy_distance_by_brute_force(d, error):
    """Pairs counted one by one, with and without strata; to float32, and in 2-D to the error of the projections."""
    x, y, k = torch.randn(5, d), torch.randn(6, d) + 1, torch.tensor([0, 1, 0, 1, 1, 0])

    def mean(pairs):
        values = [(a - b).norm().item() for a, b in pairs]
        return sum(values) / len(values)

    cross, own = mean(itertools.product(x, y)), mean(itertools.permutations(x, 2))
    assert abs(EnergyDistance(y)(x) - (2 * cross - own - mean(itertools.permutations(y, 2)))) < 2 * cross * error
    a, b = y[k == 0], y[k == 1]
    strata = mean(itertools.permutations(a, 2)) / 4 + mean(itertools.permutations(b, 2)) / 4
    strata += mean(itertools.product(a, b)) / 2
    assert abs(EnergyDistance(y, k)(x) - (2 * cross - own - strata)) < 2 * cross * error
    with pytest.raises(ValueError, match="two rows"):
        EnergyDistance(y, torch.arange(6))


@pytest.mark.parametrize("d", [2, 3])
def test_total_distance_is_that_of_all_pairs(d):
    """Against torch.pdist: in 3-D for blocks of every size; in 2-D also of one pair in any direction, to 2e-4."""
    x = torch.randn(9, d).double()
    for rows in (1, 2, 5, 100):
        assert abs(scflow.total_distance(x, rows) / torch.pdist(x).sum() - 1) < (2e-4 if d == 2 else 1e-12)
    for angle in torch.linspace(0, math.pi, 500):
        pair = torch.tensor([[0.0, 0.0], [3 * angle.cos(), 3 * angle.sin()]])
        assert d == 3 or abs(scflow.total_distance(pair) / 3 - 1) < 2.01e-4


def test_symmetry_of_the_data_does_not_add_up_the_errors_of_projections():
    """A ring of modes against itself pushed outwards: in 2-D, by projections, as in 3-D, without them, within 0.1%."""
    for modes in (3, 4, 5, 6, 8, 12, 16):
        angle = 2 * math.pi / modes * (torch.arange(1600) % modes)
        centres = 2 * torch.stack([angle.cos(), angle.sin()], 1)
        x = centres + 0.03 * torch.randn(1600, 2, generator=gen(1))
        flat, solid = (EnergyDistance(F.pad(x, pad))(F.pad(x + centres / 20, pad)) for pad in ((0, 0), (0, 1)))
        assert abs(flat / solid - 1) < 1e-3, modes


def test_energy_distance_is_unbiased():
    """Over 200 references and samples its mean is 0 (|z| < 4), stratified or not; ignoring the strata it is not."""
    mixture, g = skewed(), gen()
    rows = []
    for _ in range(200):
        (y, k), (z, _), (x, _) = mixture.sample(60, g, True), mixture.sample(60, g), mixture.sample(60, g)
        rows.append([EnergyDistance(y, k)(x), EnergyDistance(z)(x), EnergyDistance(y)(x)])
    stratified, iid, naive = z_scores(torch.tensor(rows)).tolist()
    assert abs(stratified) < 4 and abs(iid) < 4 and naive < -6


def test_noise_floor_and_rms_distance_by_hand():
    """1, 2, …, 20 have mean 10.5 and n−1 deviation √35; rows of norms 3 and 4 have √12.5: rows, not elements."""
    mean, std = scflow.noise_floor(float, itertools.count(1).__next__, repeats=20)
    assert mean == 10.5 and abs(std - math.sqrt(35)) < 1e-12
    a = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]])
    assert abs(scflow.rms_distance(a, torch.zeros_like(a)) - math.sqrt(12.5)) < 1e-6


def test_coverage_and_precision():
    """A true sample scores 1 and 1 − e^{−9/2}, without a mode 1 − w_k, far away 0, within 4 standard errors."""
    mixture, n = GaussianMixture([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]], 0.2, WEIGHTS), 20_000
    x, k = mixture.sample(n, gen(), stratified=True)
    coverage, precision = scflow.coverage_and_precision(x, mixture)
    inside = 1 - math.exp(-4.5)
    assert coverage > 0.995 and abs(precision - inside) < 4 * math.sqrt(inside * (1 - inside) / n)
    coverage, precision = scflow.coverage_and_precision(x[k != 1], mixture)
    assert abs(coverage - 0.7) < 0.005 and precision > 0.98
    assert scflow.coverage_and_precision(x + 50, mixture) == (0, 0)


def test_sliced_distance_of_a_shift():
    """A shift Δ in d dimensions reads ‖Δ‖/√d (2% at 20,000 projections), a shuffle 0, sizes must agree."""
    x, shift = torch.randn(50, 3, generator=gen()), torch.tensor([3.0, 0.0, 4.0])
    y = (x + shift)[torch.randperm(50, generator=gen())]
    assert abs(scflow.sliced_w2(x, y, 20_000, gen()) * math.sqrt(3) / 5 - 1) < 0.02
    assert scflow.sliced_w2(x, x.flip(0), 50, gen()) < 1e-6
    with pytest.raises(ValueError, match="equal size"):
        scflow.sliced_w2(x, y[:-1])


def test_a_rate_is_work_over_time(monkeypatch):
    """Work of 0.1 s and 5 units goes at 50 a second; the first time, which is slow, is not counted."""
    now, work = [0.0], itertools.chain([9.0], itertools.repeat(0.1))

    def advance():
        now[0] += next(work)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert abs(toy_2d.rate("cpu", advance, 5) - 50) < 1e-6


def shaped(n, mean, cov, seed=0):
    """Rows (n,d) whose sample mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), generator=gen(seed))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


@pytest.mark.usefixtures("float64")
def test_frechet_distance_of_known_gaussians():
    """‖m−n‖² + Σ(√c−√d)² for diagonal covariances, tr (CD)^½ from CD's eigenvalues for full ones (1e-8)."""
    m, n, g = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5]), gen()
    c, d = torch.tensor([1.0, 4.0, 0.25]), torch.tensor([9.0, 1.0, 0.01])
    found = scflow.frechet_distance(shaped(50, m, c.diag()), shaped(70, n, d.diag(), 1))
    assert abs(found / (10 + 4 + 1 + 0.16) - 1) < 1e-8
    c, d = (a @ a.T for a in torch.randn(2, 3, 3, generator=g))
    root = torch.linalg.eigvals(c @ d).real.sqrt().sum()
    found = scflow.frechet_distance(shaped(50, m, c), shaped(70, n, d, 1))
    assert root > 0.1 and abs(found / (10 + c.trace() + d.trace() - 2 * root).item() - 1) < 1e-8


def test_frechet_distance_of_a_set_to_itself_is_zero_and_needs_rows():
    """0 to 1e-6 of the variance for float32 rows in another order, symmetric; no more rows than dimensions: refused."""
    x, y = torch.randn(300, 40, generator=gen()), 2 * torch.randn(100, 40, generator=gen(1))
    assert abs(scflow.frechet_distance(x, x.flip(0))) < 1e-4 < 1 < scflow.frechet_distance(x, y)
    assert abs(scflow.frechet_distance(x, y) - scflow.frechet_distance(y, x)) < 1e-6
    refused(scflow.frechet_distance, x[:40], x)
    refused(scflow.frechet_distance, x, x[:40])


def test_neighbours_by_brute_force():
    """Distance to the k-th nearest row and its index, in blocks of any size, against sorting (1e-5: float32)."""
    x, y = torch.randn(11, 3, generator=gen()), torch.randn(7, 3, generator=gen(1))
    for k, rows in itertools.product((1, 2, 7), (1, 4, 500)):
        distance, index = scflow.neighbours(x, y, k, rows)
        for i in range(11):
            order = sorted(range(7), key=lambda j: (x[i] - y[j]).norm().item())
            assert index[i] == order[k - 1] and abs(distance[i] - (x[i] - y[order[k - 1]]).norm()) < 1e-5


@pytest.mark.parametrize("k", [1, 2, 5])
def test_coverage_by_brute_force(k):
    """The share of real rows with a fake one within their k-th real neighbour; 1 for the set itself, 0 far away."""
    real, fake = torch.randn(60, 2, generator=gen()), torch.randn(25, 2, generator=gen(1)) + 0.7
    covered = 0
    for i in range(60):
        radius = sorted((real[i] - real[j]).norm().item() for j in range(60) if j != i)[k - 1]
        covered += min((real[i] - row).norm().item() for row in fake) <= radius
    assert 0.1 < covered / 60 < 0.9 and abs(scflow.knn_coverage(real, fake, k) - covered / 60) < 1e-9
    assert scflow.knn_coverage(real, real, k) == 1 and scflow.knn_coverage(real, fake + 100, k) == 0


def test_features_of_pictures_are_layout_and_texture():
    """Thumbnails are means of pixels, bitwise; textures are the same in any batch, feel a pattern and not a place."""
    x = (255 * celeba_latent.draw_faces(torch.rand(6, 34, generator=gen()), 64)).byte()
    thumbs, texture = celeba_latent.picture_features(x)
    means = x.reshape(6, 3, 32, 2, 32, 2).float().mean((3, 5)).round()
    assert thumbs.dtype == torch.uint8 and (thumbs.float() - means).abs().max() <= 1  # a half is rounded either way
    assert torch.equal(celeba_latent.picture_features(thumbs)[0], thumbs)
    torch.manual_seed(5)
    alone = torch.cat([celeba_latent.picture_features(row[None])[1] for row in x])
    assert texture.shape == (6, 192) and texture.isfinite().all() and torch.allclose(alone, texture, atol=1e-4)
    board = torch.tensor([[60, 200], [200, 60]], dtype=torch.uint8).repeat(32, 32).expand(1, 3, 64, 64)
    plain = torch.full_like(board, 130)
    (same_thumb, one), (thumb, two) = celeba_latent.picture_features(board), celeba_latent.picture_features(plain)
    assert torch.equal(same_thumb, thumb) and (one - two).norm() > 0.3 * two.norm()
    moved = celeba_latent.picture_features(x.roll(16, 3))
    assert (moved[1] - texture).norm() < 0.2 * (texture[:3] - texture[3:]).norm() * 2**0.5
    assert (moved[0].float() - thumbs.float()).abs().mean() > 10


def test_measure_of_pictures(faces_demo):
    """The reference scores 0, 0 and 1; layout is the 64 largest components (SVD, 1e-4); a space sees its own damage."""
    (thumbs, texture), measure = faces_demo.given, faces_demo.measure
    assert len(thumbs) == 210 and (measure.basis.T @ measure.basis - torch.eye(64)).abs().max() < 1e-4
    flat = thumbs.flatten(1).float() / 255
    largest = torch.linalg.svdvals(flat - flat.mean(0))[:64]
    layout = measure.spaces(thumbs, texture)["layout"]
    assert abs(layout.square().sum() / largest.square().sum() - 1) < 1e-4 and layout.mean(0).abs().max() < 1e-4
    itself = measure(thumbs, texture)
    assert abs(itself["layout"]) < 1e-4 and abs(itself["texture"]) < 1e-4 and itself["coverage"] == 1
    darker, rough = measure(thumbs // 2, texture), measure(thumbs, 2 * texture)
    assert darker["layout"] > 1 and darker["coverage"] < 0.5 and darker["texture"] == itself["texture"]
    assert rough["texture"] > 1 and rough["layout"] == itself["layout"] and rough["coverage"] == 1


# ═══ toy_2d.py: the command line ════════════════════════════════════════════════════════════

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
SHORT = "--teacher-steps 40 --student-steps 40 --samples 200".split()


def toy(*argv):
    """Run a command in this process; returns its exit code."""
    return toy_2d.main(list(map(str, argv)))


def spawn(cwd, *argv):
    """Start a command in a process of its own, on one thread."""
    command = [sys.executable, str(HERE / "toy_2d.py"), *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def equal_weights(a, b):
    """Whether two checkpoints hold bitwise the same networks, averages and optimiser states."""
    a, b = (torch.load(f, weights_only=True) for f in (a, b))
    flat_a, flat_b = (torch.utils._pytree.tree_leaves({k: c[k] for k in ("weights", "state")}) for c in (a, b))
    return len(flat_a) == len(flat_b) and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(flat_a, flat_b)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short finished run with all figures: its parent folder; the run is in runs/8gaussians."""
    folder = tmp_path_factory.mktemp("toy")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert toy(*SHORT, "--figures", "all", "--gif") == 0
    finally:
        os.chdir(before)
    return folder


def points_file(name, array):
    np.save(name, array)
    return name


ERRORS = {
    "unknown data set": (["--dataset", "moon"], "moon"),
    "teacher steps": (["--teacher-steps", "0"], "teacher_steps"),
    "student steps": (["--student-steps", "-5"], "steps"),
    "student steps zero": (["--student-steps", "0"], "steps"),
    "batch": (["--student-batch", "0"], "batch"),
    "teacher batch": (["--teacher-batch", "-1"], "teacher_batch"),
    "samples": (["--samples", "0"], "samples"),
    "not a number": (["--seed", "one"], "one"),
    "unknown flag": (["--lamda-self", "1"], "--lamda-self"),
    "unknown choice": (["--preset", "papers"], "papers"),
    "device": (["--device", "tpu9"], "tpu9"),
    "resume without a run": (["--resume", "--out", "nowhere"], "nothing to resume"),
    "resume without any run": (["--resume"], "nothing to resume"),
    "existing out": (["--out", "."], "--overwrite"),
    "unwritable": (["--out", "/dev/null/run"], "cannot write"),
    "exact teacher": (["--teacher", "exact", "--dataset", "moons"], "mixture"),
    "resume and overwrite": (["--resume", "--overwrite"], "contradict"),
    "frozen first": (["--preset", "paper", "--self-source", "frozen"], "first phase"),
    "critic without adversary": (["--preset", "consistency", "--r1", "1"], "r1"),
    "no loss": (["--preset", "consistency", "--lambda-consistency", "0"], "weight zero"),
    "three values, two phases": (["--lambda-self", "0", "1", "2"], "phases"),
    "zero evaluations": (["--nfe", "0"], "nfe"),
    "evaluations in words": (["--nfe", "1,two"], "nfe"),
    "endless warm-up": (["--preset", "paper", "--student-steps", "10", "--warmup-self", "10"], "warmup_self"),
    "overwriting what is no run": (["--out", ".", "--overwrite"], "left alone"),
    "negative weight": (["--lambda-bi", "-1"], "lambda_bi"),
    "window": (["--delta", "2"], "delta"),
    "missing points": (["--dataset", "missing.npy"], "missing.npy"),
    "shape of points": (["--dataset", "cube.npy"], "(N, 2)"),
    "points not finite": (["--dataset", "nan.npy"], "finite"),
    "points are text": (["--dataset", "text.npy"], "numbers"),
    "complex points": (["--dataset", "complex.npy"], "complex"),
    "an archive of points": (["--dataset", "archive.npy"], "archive"),
    "one point": (["--dataset", "one.npy"], "one point"),
    "not a npy file": (["--dataset", "fake.npy"], "fake.npy"),
    "few points": (["--dataset", "few.npy"], "100"),
    "plot without a run": (["plot", "--out", "nowhere"], "nowhere"),
    "ablation of unknown data": (["ablate", "--datasets", "moon"], "moon"),
    "ablation of an unknown row": (["ablate", "--rows", "main", "papers"], "papers"),
    "ablation with a bad flag": (["ablate", "--rows", "--lamda-self 1"], "--lamda-self"),
    "teacher of no run": (["--teacher-from", "nowhere"], "nowhere"),
    "guidance without labels": (["--guidance", "2"], "no labels"),
    "guidance in words": (["--dataset", "labelled", "--guidance", "much"], "much"),
    "dropping everything": (["--dataset", "labelled", "--teacher-drop", "1"], "teacher_drop"),
    "resume of no scale": (["--dataset", "labelled", "--resume"], "nothing to resume"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_clear_line_and_changes_nothing(case, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line on stderr that names the trouble, no traceback, and no file written or lost."""
    monkeypatch.chdir(tmp_path)
    points_file("cube.npy", np.zeros((200, 3)))
    points_file("nan.npy", np.full((200, 2), np.nan))
    points_file("text.npy", np.full((200, 2), "a"))
    points_file("few.npy", np.zeros((5, 2)))
    points_file("complex.npy", np.ones((200, 2)) * 1j)
    points_file("one.npy", np.ones((200, 2)))
    with open("archive.npy", "wb") as file:
        np.savez(file, np.zeros((200, 2)))
    Path("fake.npy").write_bytes(b"not numpy")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    argv, word = ERRORS[case]
    assert toy(*argv, *([] if argv[0] in toy_2d.COMMANDS else SHORT[4:] if "--samples" not in argv else [])) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and "Traceback" not in error
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_an_existing_run_is_neither_overwritten_nor_continued_with_other_settings(finished, monkeypatch, capsys):
    """Without --overwrite the folder is refused; --resume names the setting that differs; nothing changes."""
    monkeypatch.chdir(finished)
    before = {p: p.read_bytes() for p in Path("runs/8gaussians").iterdir()}
    assert toy(*SHORT, "--out", "runs/8gaussians") == 2
    assert toy(*SHORT, "--out", "runs/8gaussians", "--resume", "--seed", "7") == 2
    assert "other settings" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("runs/8gaussians").iterdir()} == before


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other architecture", "the teacher's", "weights alone"])
def test_a_bad_checkpoint_stops_a_resumed_run_with_one_line(damage, finished, tmp_path, monkeypatch, capsys):
    """--resume on a damaged student.pt: exit code 2, and the file is left as it is."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs/8gaussians", "run")
    Path("run/metrics.json").unlink()  # as if it had been stopped before the end
    student = Path("run/student.pt")
    if damage == "truncated":
        student.write_bytes(student.read_bytes()[:1000])
    elif damage == "foreign":
        torch.save({"some": "thing"}, student)
    elif damage == "the teacher's":
        shutil.copy("run/teacher.pt", student)
    elif damage == "weights alone":
        scflow.save(student, MLP())
    else:
        content = torch.load(student, weights_only=True)
        content["arch"]["width"] = 32
        torch.save(content, student)
    before = student.read_bytes()
    assert toy(*SHORT, "--out", "run", "--resume") == 2
    error = capsys.readouterr().err
    assert "student.pt" in error.splitlines()[-1] and "Traceback" not in error
    assert student.read_bytes() == before


def test_the_same_command_gives_the_same_table(finished, tmp_path, monkeypatch):
    """Every measure of two runs of one command agrees to the last bit, on one machine and thread count."""
    monkeypatch.chdir(tmp_path)
    assert toy(*SHORT, "--figures", "none") == 0
    rows = [json.loads((p / "runs/8gaussians/metrics.json").read_text())["rows"] for p in (finished, tmp_path)]
    assert rows[0] == rows[1]


def test_ctrl_c_saves_and_resuming_ends_bit_for_bit_like_an_uninterrupted_run(tmp_path):
    """A real SIGINT to a real process, in the student's training; then --resume; then everything is compared."""
    flags = "--teacher-steps 60 --student-steps 300 --samples 200 --figures none --save-every 50".split()
    assert spawn(tmp_path, *flags, "--out", "whole").wait(100) == 0
    process, checkpoint = spawn(tmp_path, *flags, "--out", "parts"), tmp_path / "parts/student.pt"
    until(checkpoint.exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "saved in parts" in errors.splitlines()[-1] and "Traceback" not in errors
    assert 50 <= torch.load(checkpoint, weights_only=True)["state"]["step"] < 300
    assert spawn(tmp_path, *flags, "--out", "parts", "--resume").wait(100) == 0
    assert equal_weights(tmp_path / "whole/student.pt", checkpoint)
    rows = [json.loads((tmp_path / p / "metrics.json").read_text())["rows"] for p in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert (tmp_path / "whole/log.csv").read_bytes() == (tmp_path / "parts/log.csv").read_bytes()


def until(condition, seconds=60):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_run_killed_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    """SIGKILL while checkpoints are written as fast as they can be: what is there loads, and --resume goes on."""
    flags = "--teacher-steps 30 --student-steps 150 --samples 200 --figures none --save-every 1 --out run".split()
    process = spawn(tmp_path, *flags)
    until((tmp_path / "run/student.pt").exists)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    scflow.load(tmp_path / "run/student.pt")
    scflow.load(tmp_path / "run/teacher.pt")
    assert spawn(tmp_path, *flags, "--resume").wait(100) == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    """A learning rate that explodes: exit code 2, one line with the loss and the step, the checkpoint loads."""
    monkeypatch.chdir(tmp_path)
    argv = [
        *SHORT,
        "--student-lr",
        "1e30",
        "--lambda-adv",
        "0",
        "--figures",
        "none",
        "--save-every",
        "1",
        "--out",
        "run",
    ]
    assert toy(*argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"the (consistency|bi) loss became (nan|inf) at step \d+", error)
    net = scflow.load("run/student.pt")
    assert all(p.isfinite().all() for p in scflow.load("run/teacher.pt").parameters()) and net is not None


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    """The last update explodes, after its finite loss: the run fails, and the checkpoint before it stays."""
    monkeypatch.chdir(tmp_path)
    argv = [*SHORT, "--figures", "none", "--save-every", "1", "--out", "run", "--preset", "paper"]
    update = scflow.distill_step

    def explode(run, phase, i, *rest):
        update(run, phase, i, *rest)
        if i == phase.steps - 1:
            next(run.student.parameters()).data.fill_(math.inf)

    monkeypatch.setattr(scflow, "distill_step", explode)
    assert toy(*argv) == 2
    assert "no longer finite at step 40" in capsys.readouterr().err.splitlines()[-1]
    content = scflow.read("run/student.pt")
    assert content["state"]["step"] == 39 and finite(scflow.load("run/student.pt"))


def test_the_figures_are_drawn_and_not_empty(finished):
    """Each PNG has many colours and is under 300 kB; the GIF moves and is under 2 MB; plot draws them again."""
    run = finished / "runs/8gaussians"
    names = ["1_hero", "2_steps", "3_paths", "4_field", "5_losses", "6_critic"]
    for name in names:
        file = run / f"{name}.png"
        with Image.open(file) as image:
            colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
        assert len(colours) > 50 and file.stat().st_size < 300_000
    with Image.open(run / "distillation.gif") as image:
        assert image.n_frames > 10 and (run / "distillation.gif").stat().st_size < 2_000_000
    hero = (run / "1_hero.png").read_bytes()
    (run / "1_hero.png").unlink()
    assert toy("plot", "--out", run) == 0 and (run / "1_hero.png").read_bytes() == hero


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    """Without --out a second run goes to runs/moons-2 and leaves the first alone."""
    monkeypatch.chdir(tmp_path)
    argv = "--dataset moons --teacher-steps 2 --student-steps 2 --samples 50 --figures none --quiet".split()
    assert toy(*argv) == 0 and toy(*argv) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["moons", "moons-2"]


@pytest.mark.parametrize("name", toy_2d.DATASETS)
def test_data_sets_are_centred_of_common_size_and_stratified_like_iid(name):
    """Mean 0 and RMS radius in [1.5,2.1]; iid and stratified draws are the same law (energy distance, 4 sd)."""
    data, generator = toy_2d.dataset(name), torch.Generator().manual_seed(0)
    x, _ = data.sample(20_000, generator)
    assert x.mean(0).norm() < 0.06 and 1.5 < x.square().sum(1).mean().sqrt() < 2.1
    reference, strata = data.sample(2_000, generator, stratified=True)
    energy = scflow.EnergyDistance(reference, strata)
    mean, sd = scflow.noise_floor(energy, lambda: data.sample(2_000, generator)[0])
    assert abs(mean) < 4 * sd / math.sqrt(20) + 1e-3
    assert strata.bincount().float().std() <= 1


def test_your_own_points_are_learned_from_a_file(tmp_path, monkeypatch):
    """A file of points, far from the origin and of any scale, runs from start to finish."""
    monkeypatch.chdir(tmp_path)
    points_file("mine.npy", np.random.default_rng(0).normal(100, 30, (500, 2)))
    assert toy("--dataset", "mine.npy", *SHORT) == 0
    metrics = json.loads(Path("runs/mine/metrics.json").read_text())
    assert all(math.isfinite(r["energy"]) for r in metrics["rows"]) and Path("runs/mine/1_hero.png").exists()


def test_the_exact_teacher_is_exact(tmp_path, monkeypatch):
    """--teacher exact: the teacher's 50-step flow-map error is the solver's alone, below 0.1."""
    monkeypatch.chdir(tmp_path)
    assert toy("--teacher", "exact", *SHORT, "--figures", "basic", "--out", "run") == 0
    rows = json.loads(Path("run/metrics.json").read_text())["rows"]
    (error,) = [r["map_error"] for r in rows if r["who"] == "teacher" and r["steps"] == 50]
    assert error < 0.1


def test_a_borrowed_teacher_changes_no_number(finished, tmp_path, monkeypatch, capsys):
    """--teacher-from: the same student to the bit, the same measures; another run's teacher is refused in one line."""
    monkeypatch.chdir(tmp_path)
    donor = finished / "runs/8gaussians"
    stamp = (donor / "teacher.pt").stat().st_mtime_ns
    assert toy(*SHORT, "--figures", "none", "--out", "run", "--teacher-from", donor) == 0
    assert equal_weights("run/student.pt", donor / "student.pt") and (donor / "teacher.pt").stat().st_mtime_ns == stamp
    rows = [json.loads((p / "metrics.json").read_text())["rows"] for p in (Path("run"), donor)]
    assert rows[0] == rows[1]
    assert toy(*SHORT, "--figures", "none", "--out", "more", "--teacher-from", donor, "--samples", "150") == 0
    more = json.loads(Path("more/metrics.json").read_text())["rows"]
    assert len(more) == len(rows[0]) and all(a["energy"] != b["energy"] for a, b in zip(more, rows[0]))
    assert toy(*SHORT, "--figures", "none", "--out", "other", "--teacher-from", donor, "--seed", "7") == 2
    assert "differs in seed" in capsys.readouterr().err


def test_an_unfinished_teacher_is_not_borrowed(finished, tmp_path, monkeypatch, capsys):
    """A teacher that was stopped half-way: one line, and exit code 2."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs/8gaussians", "donor")
    content = torch.load("donor/teacher.pt", weights_only=True)
    content["state"]["step"] -= 1
    torch.save(content, "donor/teacher.pt")
    assert toy(*SHORT, "--figures", "none", "--out", "run", "--teacher-from", "donor") == 2
    assert "not finished" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fresh", "free"])
def test_variants_of_self_correction_change_what_they_say_and_nothing_else(kind, monkeypatch):
    """Fresh noise that happens to be x₁ is the paper's loss; without the stop, only the gradient differs."""
    nets = SimpleNamespace(**{k: MLP(2, 16, 2) for k in ("teacher", "student", "target")}, disc=PointDiscriminator())
    phase, generator = Phase(steps=9), torch.Generator()
    x0, x1, t = torch.randn(64, 2), torch.randn(64, 2), torch.rand(64)
    weights = phase.weights(0)
    paper, _ = distill_losses(nets, x0, x1, t, phase, weights, generator.manual_seed(0))
    variant = functools.partial(toy_2d.self_correction_variant, kind, nets, x0, x1, t, phase, weights)
    losses, _ = variant(generator.manual_seed(0))
    assert all(torch.equal(losses[k], paper[k]) for k in ("consistency", "bi", "adv"))
    if kind == "fresh":
        assert abs(losses["self"] - paper["self"]) > 1e-4
        monkeypatch.setattr(scflow, "randn_like", lambda x, generator: x1)
        losses, _ = variant(generator.manual_seed(0))
    torch.testing.assert_close(losses["self"], paper["self"])
    grads = [torch.autograd.grad(x["self"], list(nets.student.parameters())) for x in (losses, paper)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads)) == (kind == "fresh")


def test_path_error_is_zero_for_the_exact_map_and_not_for_the_velocity():
    """Of v(x,t) = (x − f*(x,t))/t it is zero; the exact velocity's f is the posterior mean, some way off."""
    mixture = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.2)

    def exact(x, t, cond=None):
        return (x - mixture.flow_map(x, t)) / t[:, None]

    assert toy_2d.path_error(exact, mixture, 0) < 1e-4
    assert 0.2 < toy_2d.path_error(mixture, mixture, 0) < 1


def test_paired_comparison_finds_a_difference_and_only_then():
    """Halved in all of ten pairs: 10 of 10, small p; changed up and down in turn: large p. Keys pair, not the order."""
    a = {("moons", seed): 1.0 + 0.1 * seed for seed in range(10)}
    b = {k: v / 2 for k, v in reversed(a.items())}
    ratio, fell, p = toy_2d.paired(a, b).split(", ")
    assert (ratio, fell) == ("×0.50", "10/10") and float(p) < 0.01
    ratio, fell, p = toy_2d.paired(b, a).split(", ")
    assert (ratio, fell) == ("×2.00", "0/10") and float(p) < 0.01
    mixed = {k: v + (-1) ** k[1] * 0.01 * (k[1] + 1) for k, v in a.items()}
    _, fell, p = toy_2d.paired(a, mixed).split(", ")
    assert fell == "5/10" and float(p) > 0.5
    assert toy_2d.paired(a, {("moons", 0): 1.0}) == ""
    changes = np.array([-3.0, 7.0, 6.0, -1.0, 5.0, 4.0, -2.0, 8.0])  # of ranks |change|; p by all 256 signs
    after = {("moons", i): 10 + change for i, change in enumerate(changes)}
    exact = np.mean([abs(np.dot(s, np.abs(changes))) >= changes.sum() for s in itertools.product((-1, 1), repeat=8)])
    _, fell, p = toy_2d.paired(dict.fromkeys(after, 10.0), after).split(", ")
    assert fell == "3/8" and abs(float(p) - exact) < 0.015


def tables(text):
    """Rows of all Markdown tables in the text, as {heading: cell}."""
    heads = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells and heads and not set(line) <= set("|- "):
            yield dict(zip(heads, cells))
        heads = heads or cells if cells else None


@pytest.mark.parametrize("group", toy_2d.GROUPS)
def test_rows_of_the_ablation_are_valid_and_change_one_thing(group):
    """Every row's flags configure a run; no two are the same; each is compared with a row of its table."""
    rows, seen = toy_2d.chosen_rows([group]), []
    for flags, other in rows.values():
        seen.append(toy_2d.configure(shlex.split(flags)))
        assert other in rows or not other
    assert all(a != b for a, b in itertools.combinations(seen, 2))


def test_ablation_writes_every_cell_shares_teachers_and_repeats_no_run(tmp_path, monkeypatch, capsys):
    """Two rows and one that explodes, two seeds: tables, tests, figure; a teacher a seed; again, nothing is trained."""
    monkeypatch.chdir(tmp_path)
    argv = ["ablate", "--quick", "--seeds", "0,1", "--samples", "100", "--workers", "2"]
    argv += ["--rows", "consistency", "--preset paper --lambda-self 2", "--preset paper --student-lr 1e30"]
    argv += ["--flags", "--teacher-steps 5 --student-steps 20 --nfe 1,2"]
    assert toy(*argv) == 0
    text, runs = Path("results/ablation.md").read_text(), sorted(Path("runs/ablate").iterdir())
    assert text.startswith("`python toy_2d.py ablate --quick") and "seeds 0,1; 100 samples" in text
    assert text.count("| 8gaussians (") == 3 and text.count("Failed: --preset paper --student-lr 1e30, 8gaussians") == 2
    assert len(re.findall(r"^\| --preset paper --lambda-self 2 \| consistency \| ×", text, re.M)) == 1
    with open("results/ablation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    students = [r for r in rows if r["row"] == "consistency"]
    assert len(students) == 2 * 4 and len([r for r in rows if r["row"] == "teacher"]) == 2 * 3
    mean = np.mean([1e3 * float(r["energy"]) for r in students if (r["solver"], r["nfe"]) == ("euler", "2")])
    assert f"{mean:.2f} ±" in next(line for line in text.splitlines() if "| consistency |" in line)
    assert Path("results/ablation.png").stat().st_size > 5000
    assert len(runs) == 6 and len({(r / "teacher.pt").read_bytes() for r in runs}) == 2
    before = {p: p.stat().st_mtime_ns for r in runs for p in r.glob("student.pt")}
    assert toy(*argv) == 0 and Path("results/ablation.md").read_text() == text
    assert {p: p.stat().st_mtime_ns for p in before} == before


class HereAndNow:
    """A pool of processes without the processes."""

    def __init__(self, workers, mp_context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def map(self, function, *arguments):
        return list(map(function, *arguments))


def test_ablation_trains_a_teacher_once_for_each_data_set_and_seed(tmp_path, monkeypatch):
    """The first wave trains them; every other run is told to borrow the one of its data set, seed and kind."""
    waves = []

    class Pool(HereAndNow):
        def map(self, function, cells):
            waves.append([toy_2d.configure(cell)[0] for cell in cells])
            row = dict(who="student", solver="euler", nfe=1, energy=1.0, gap=0.5)
            common = dict(floor=dict(mean=0.0, sd=1e-4), machine="here", rows=[row])
            return [dict(common, dataset=r.dataset, seed=r.seed, teacher=r.teacher) for r in waves[-1]]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy_2d, "ProcessPoolExecutor", Pool)
    rows = ["consistency", "paper", "--preset paper --teacher exact", "--preset consistency --teacher exact"]
    assert toy("ablate", "--datasets", "8gaussians,moons", "--seeds", "0,1", "--rows", *rows) == 0
    first, second = waves  # moons have no exact teacher
    trained = {run.out: (run.dataset, run.seed, run.teacher) for run in first}
    assert len(first) == len(set(trained.values())) == 6 and not any(run.teacher_from for run in first)
    assert [trained[run.teacher_from] for run in second] == [(r.dataset, r.seed, r.teacher) for r in second]
    assert len(second) == 6


def test_ablation_averages_over_data_sets_before_it_takes_deviations():
    """The mean row: each seed's mean over data sets, then mean ± sd over seeds; pairs are counted over both."""

    def cell(name, seed, energy):
        row = dict(who="student", solver="euler", nfe=1, energy=energy / 1e3, gap=0.5)
        floor = dict(mean=0.0, sd=1e-4)
        return dict(dataset=name, seed=seed, teacher="learned", machine="here", floor=floor, rows=[row])

    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 11.0, ("b", 1): 10.0}
    done = [("one", cell(*key, v)) for key, v in values.items()] + [("two", cell(*k, v - 1)) for k, v in values.items()]
    results = toy_2d.Ablation({"one": ("", ""), "two": ("", "one")}, done)
    text = "\n".join([*results.table(toy_2d.Ablate()), *results.tests()])
    assert "| a (0.00 ± 0.10) | one | 2.00 ± 1.41 |" in text
    assert "| mean of 2 | one | 6.25 ± 0.35 |" in text  # of 6 and 6.5
    assert "| two | one | ×0.84, 4/4, " in text


def test_a_run_without_labels_has_the_settings_it_always_had(finished):
    """Nothing about guidance is written to its config.json, so that older runs go on with --resume."""
    config = json.loads((finished / "runs/8gaussians/config.json").read_text())
    assert {"guidance", "learn_from", "teacher_drop"}.isdisjoint(config | config["teacher_settings"])
    assert set(config["teacher_settings"]) == {"teacher_steps", "teacher_batch", "teacher_lr"}


@pytest.fixture(scope="module")
def guided_runs(tmp_path_factory):
    """A short labelled run of two scales: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("guided") / "run"
    argv = ["--dataset", "labelled", "--guidance", "1", "3", "--out", folder, "--quiet"]
    assert toy(*argv, *SHORT) == 0
    return folder, [*argv, *SHORT]


def test_every_guidance_scale_has_a_student_and_all_share_a_teacher(guided_runs, capsys):
    """Two run folders with one teacher bitwise and two students; a row for each measure; again: refused."""
    folder, argv = guided_runs
    one, three = (folder / f"guidance-{scale}" for scale in (1, 3))
    assert (one / "teacher.pt").read_bytes() == (three / "teacher.pt").read_bytes()
    assert not equal_weights(one / "student.pt", three / "student.pt")
    assert scflow.load(three / "student.pt").words.tokens == (1, 3)
    rows = list(tables((folder / "guidance.md").read_text(encoding="utf-8")))
    assert len(rows) == 2 * 9 and {row["guidance"] for row in rows} == {"1", "3"}
    for row in rows:
        values = [float(row[label]) for label in ("1", "2", "3", "mean")]
        assert abs(np.mean(values[:3]) - values[3]) < 0.011
    assert Image.open(folder / "guidance.png").size[1] > 300
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.pt")}
    assert toy(*argv) == 2 and "--overwrite" in capsys.readouterr().err
    assert toy(*argv, "--resume") == 0 and before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.pt")}
    assert toy("plot", "--out", one) == 2 and "guidance.png" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_a_guided_student_learns_from_its_teachers_samples_or_from_the_data(source, tmp_path, monkeypatch):
    """What distillation draws, with its labels: 50-step samples of the guided teacher, or the data set's own rows.

    Energy distances to the two, at w = 4, where they are far apart: below 0.03 and above 0.3 (5 or more sd either way).
    """
    seen, distil = [], scflow.distill

    def spy(teacher, disc, batch, generator, *rest, **options):
        seen.extend((teacher, batch))
        return distil(teacher, disc, batch, generator, *rest, **options)

    monkeypatch.setattr(scflow, "distill", spy)
    short = ["--teacher", "exact", "--teacher-steps", 5, "--student-steps", 2, "--samples", 50, "--quiet"]
    short += ["--figures", "none", "--out", tmp_path / "run"]
    assert toy("--dataset", "labelled", "--guidance", 4, "--learn-from", source, *short) == 0
    teacher, batch = seen
    found = json.loads((tmp_path / "run/guidance-4/metrics.json").read_text())["guidance"]
    assert max(map(abs, found["teacher to exact"])) < 0.3  # for this teacher is the exact one
    assert min(found["teacher to truth"] + found["exact to truth"] + found["exact to tilted"]) > 0.5
    x0, cond = batch(1500, gen())
    data = toy_2d.dataset("labelled")
    pool, k = data.sample(6000, gen(1))
    for label in (1, 2, 3):
        ours, mine = x0[cond[:, 0] == label], pool[data.labels[k] == label]
        noise = torch.randn(500, 2, generator=gen(2))
        goal = sample(teacher, noise, 50, cond=torch.full((500, 1), label))
        near, far = (scflow.EnergyDistance(y)(ours) for y in ((goal, mine) if source == "teacher" else (mine, goal)))
        assert near < 0.03 and far > 0.3


def test_bench_gives_every_method_the_same_budget_and_repeats_no_run(tmp_path, monkeypatch, capsys):
    """Three relatives for a hundredth of the time: costs, tables, figures; the same budget spent; cells read back."""
    monkeypatch.chdir(tmp_path)
    module = toy_2d.notebook("06_relatives")
    monkeypatch.setattr(toy_2d, "notebook", lambda stem: module)
    monkeypatch.setattr(toy_2d, "ProcessPoolExecutor", HereAndNow)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    names = ["2-rectified flow", "BOOT", module.OURS]
    argv = ["bench", "--methods", ",".join(names), "--datasets", "moons", "--seeds", "0", "--shares", "0.005,0.01"]
    argv += ["--samples", "100", "--rounds", "1", "--workers", "2"]
    assert toy(*argv) == 0
    text = Path("results/bench.md").read_text(encoding="utf-8")
    rows = [row for row in tables(text) if "data set (noise floor)" in row]
    assert [row["row"] for row in rows] == 2 * names  # by steps, and by time
    assert rows[1]["1"] and not rows[1]["2"] and set(rows[3]) == {"data set (noise floor)", "row", "0.005", "0.01"}
    assert rows[0]["1"] == rows[3]["0.01"]  # one step with all of the time
    costs = {row["loss"]: row for row in tables(text) if "loss" in row}
    effort = {row["method"]: row for row in tables(text) if "method" in row}
    assert list(effort) == names and all(float(row["evaluations"]) > 0 for row in effort.values())
    assert costs.keys() == module.COST.keys() - {"one million evaluations"}
    assert all(float(costs[name][k]) > 0 for name in module.PHASES for k in ("ms", "naively / ours", "floor / ours"))
    with open("results/bench.csv", newline="") as file:
        updates = {r["row"]: int(r["updates"]) for r in csv.DictReader(file)}
    cost, share = module.COST, 0.01
    pairs = cost["one million evaluations"] * 50_000 * 20 / 1e6
    assert abs(updates["2-rectified flow"] - share * (module.BUDGET - pairs)) <= 1
    boot = share * (module.TEACHER + (module.BUDGET - module.TEACHER) / cost["BOOT"])
    assert abs(updates["BOOT"] - boot) <= 1
    assert updates[module.OURS] == share * module.TEACHER + 12  # of 1,150 in both phases
    assert {k: int(row["updates"]) for k, row in effort.items()} == updates
    assert Path("results/bench.png").stat().st_size > 5000 and Path("results/bench-time.png").stat().st_size > 5000
    before = {p: p.stat().st_mtime_ns for p in Path("runs/bench").iterdir()}
    monkeypatch.setattr(module, "costs", lambda rounds: dict.fromkeys([*costs, *(f"{k}, naively" for k in costs)], 1.0))
    assert len(before) == 6 and toy(*argv) == 0
    assert {p: p.stat().st_mtime_ns for p in Path("runs/bench").iterdir()} == before


def test_bench_of_an_unknown_method_is_refused(tmp_path, monkeypatch, capsys):
    """One line, exit code 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    assert toy("bench", "--methods", "alchemy") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_bench_tries_at_most_twelve_settings_of_a_method():
    """The grid of each relative holds what its method is called with by default, or settings that it takes."""
    module = toy_2d.notebook("06_relatives")
    for method, (function, counts) in module.METHODS.items():
        trials, known = module.trials(method), inspect.signature(function).parameters
        assert len(trials) <= 12 and all(trial.keys() <= known.keys() for trial in trials)
        assert counts[0] == 1


def test_growth_changes_one_thing_at_a_time_and_repeats_no_run(tmp_path, monkeypatch):
    """The default stands in every column it belongs to, a case of eight dimensions in its own; runs are read back."""
    monkeypatch.chdir(tmp_path)
    module = toy_2d.notebook("08_growth")
    monkeypatch.setattr(toy_2d, "notebook", lambda stem: module)
    monkeypatch.setattr(toy_2d, "ProcessPoolExecutor", HereAndNow)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert all(sum(case[k] != v for k, v in module.DEFAULT.items()) <= 1 for case in module.CASES)
    assert module.DEFAULT in module.CASES
    grid = module.DEFAULT | dict(modes=9)
    monkeypatch.setattr(module, "CASES", [module.DEFAULT, module.DEFAULT | dict(d=8), grid])
    argv = ["bench", "--growth", "--seeds", "0,1", "--shares", "0.01", "--samples", "100", "--out", "new/growth"]
    assert toy(*argv) == 0
    rows = list(tables(Path("new/growth.md").read_text(encoding="utf-8")))
    shown = [(row["what grows"], row["to"]) for row in rows]
    defaults = [(module.TITLES[k], str(module.DEFAULT[k])) for k in ("rows", "width", "d")]
    assert shown == [*defaults, (module.TITLES["d"], "8"), (module.TITLES["modes"], "9")]
    assert all("±" in row[k] for row in rows for k in ("floor", "teacher 50", "1", "8", "map error"))
    with open("new/growth.csv", newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 3 * 2 * 6 and {(r["d"], r["modes"]) for r in records} == {("2", "8"), ("8", "8"), ("2", "9")}
    last = [r for r in records if (r["who"], r["nfe"]) == ("student", "8")]
    plane = [float(r["energy"]) for r in last if (r["d"], r["modes"]) == ("2", "8")]
    assert rows[0]["8"].startswith(f"{1e3 * np.mean(plane):.2f} ±")
    before = {p: p.stat().st_mtime_ns for p in Path("runs/bench").iterdir()}
    assert len(before) == 6 and Path("new/growth.png").stat().st_size > 5000
    assert toy(*argv) == 0 and {p: p.stat().st_mtime_ns for p in Path("runs/bench").iterdir()} == before


# ═══ celeba_latent.py: pictures and autoencoders ════════════════════════════════════════════

TINY = (dict(dim=16, depth=1, heads=2), dict(teacher_steps=12, teacher_batch=16, teacher_lr=1e-3))


def faces(*argv):
    """Run a command in this process; returns its exit code."""
    return celeba_latent.main(list(map(str, argv)))


def drawings(n, size=32, seed=0):
    """uint8 (n,3,size,size)."""
    traits = torch.rand(n, celeba_latent.TRAITS, generator=gen(seed))
    return (255 * celeba_latent.draw_faces(traits, size)).round().byte()


def save_picture(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, **options)


@pytest.fixture(scope="module")
def tiny():
    """The smallest networks, and a device said to reach 1 GFLOP/s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(celeba_latent.SIZES, "small", TINY)
        patch.setattr(toy_2d, "matmul_rate", lambda device: 1e9)
        yield


@pytest.fixture(scope="module")
def faces_demo(tiny, tmp_path_factory):
    """A short demo: folders of run and latents, and the measure of its evaluation with what that was made of."""
    run, seen, make = tmp_path_factory.mktemp("demo") / "run", [], celeba_latent.PictureMeasure

    def measure(*given):
        seen.append(SimpleNamespace(given=given, measure=make(*given)))
        return seen[-1].measure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(celeba_latent, "PictureMeasure", measure)
        short = "--drawings 2100 --count 1000 --teacher-steps 12 --student-steps 12 --quiet".split()
        assert faces("demo", *short, "--out", run) == 0
    return SimpleNamespace(run=run, latents=Path(f"{run}-latents"), **vars(seen[0]))


ENCODE = "--size 32 --channels 4 --flips --batch 1 --quiet".split()


@pytest.fixture(scope="module")
def album(tiny, tmp_path_factory):
    """Sixty pictures in three formats and nested folders, and files that are none; latents; and a short run on them."""
    folder = tmp_path_factory.mktemp("album")
    for i, picture in enumerate(drawings(60, 40)):
        kind = ("png", "jpg", "webp")[i % 3]
        save_picture(folder / f"pictures/{'ab'[i % 2]}/deep/{i:02d}.{kind}", picture[:, :36] if i % 5 else picture)
    save_picture(folder / "pictures/small.png", picture[:, :20])
    save_picture(folder / "pictures/.hidden.png", picture)
    whole = (folder / "pictures/a/deep/00.png").read_bytes()
    (folder / "pictures/a/broken.PNG").write_bytes(whole[: len(whole) // 2])
    (folder / "pictures/notes.txt").write_text("no picture")
    assert faces("encode", "--images", folder / "pictures", *ENCODE, "--out", folder / "latents") == 0
    out = ["--out", folder / "run", "--quiet"]
    assert faces("teacher", "--latents", folder / "latents", "--teacher-steps", 3, *out) == 0
    assert faces("distill", "--student-steps", 3, *out) == 0
    return folder


def test_drawn_faces_are_pictures_of_any_size():
    """Values in [0,1], the same twice, and at 64 px pooled to 32 px nearly as at 32 px (1.2%; with hard edges 1.4%)."""
    traits = torch.rand(50, celeba_latent.TRAITS, generator=gen())
    small, large = (celeba_latent.draw_faces(traits, size) for size in (32, 64))
    assert small.shape == (50, 3, 32, 32) and small.min() >= 0 and small.max() <= 1 and small.std() > 0.1
    assert torch.equal(small, celeba_latent.draw_faces(traits, 32))
    assert torch.allclose(small[7:8], celeba_latent.draw_faces(traits[7:8], 32), atol=1e-6)
    assert (F.avg_pool2d(large, 2) - small).abs().mean() < 0.012
    sharp = [(x[..., 1:] - x[..., :-1]).abs().amax((1, 2, 3)).mean() for x in (small, large)]
    assert 0.8 < sharp[1] / sharp[0] < 1.25  # an edge takes as many pixels at any size


def test_every_trait_is_seen_and_no_two_faces_are_alike():
    """Each of the 34 numbers moves a pixel by 2% at least in some face; of 300 faces the nearest differ by RMS 3%."""
    g = gen()
    base = torch.rand(20, celeba_latent.TRAITS, generator=g)
    for i in range(celeba_latent.TRAITS):
        other = base.clone()
        other[:, i] = (base[:, i] + 0.5) % 1
        moved = (celeba_latent.draw_faces(other) - celeba_latent.draw_faces(base)).abs().amax((1, 2, 3))
        assert moved.max() > 0.02 and (moved > 0).double().mean() > 0.2, i
    x = celeba_latent.draw_faces(torch.rand(300, celeba_latent.TRAITS, generator=g)).flatten(1)
    assert scflow.neighbours(x, x, 2)[0].min() / x.shape[1] ** 0.5 > 0.03


def low_contrast(n=40, size=16):
    """Pictures around ½, so that no decoded value is clamped."""
    noise = torch.randn(n, 3, size, size, generator=gen())
    return 0.5 + 0.03 * F.avg_pool2d(noise, 3, 1, 1) + 0.01 * noise


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("factor, channels", [(4, 5), (8, 32), (2, 12)])
def test_patch_components_lose_exactly_the_variance_they_leave_out(factor, channels):
    """Orthonormal basis; squared error, share kept and latent variances are those of numpy's eigenvalues (1e-9)."""
    x, net = low_contrast(), celeba_latent.PatchPCA(factor, channels)
    kept = net.fit(x)
    patches = x.unfold(2, factor, factor).unfold(3, factor, factor).permute(0, 2, 3, 1, 4, 5)
    patches = patches.reshape(-1, 3 * factor**2).numpy()
    values = np.sort(np.linalg.eigvalsh(np.cov(patches.T)))[::-1]
    assert abs(kept - values[:channels].sum() / values.sum()) < 1e-9 and (kept < 0.99 or channels == 12)
    assert torch.allclose(net.basis.T @ net.basis, torch.eye(channels), atol=1e-9)
    z = net.encode(x)
    assert z.shape == (40, channels, 16 // factor, 16 // factor) and z.mean((0, 2, 3)).abs().max() < 1e-9
    variances = z.transpose(0, 1).flatten(1).var(1)
    assert torch.allclose(variances, torch.from_numpy(values[:channels].copy()), rtol=1e-6)
    error = (net.decode(z) - x).square().sum() / (len(patches) - 1)
    assert abs(error.item() - values[channels:].sum()) < 1e-9 * values.sum()


@pytest.mark.usefixtures("float64")
def test_all_patch_components_and_no_autoencoder_lose_nothing():
    """decode(encode(x)) = x to rounding (1e-12) with all 3·factor² components; `none` is the pixels bitwise."""
    x = torch.rand(30, 3, 8, 12, generator=gen())
    net = celeba_latent.PatchPCA(2, 12)
    net.fit(x)
    assert torch.allclose(net.decode(net.encode(x)), x, atol=1e-12)
    none = celeba_latent.autoencoder("none", 8, 32)
    assert none.factor == 1 and torch.equal(none.encode(x), x) and torch.equal(none.decode(x), x)
    for factor, channels in ((2, 13), (8, 0), (8, 193), (1, -1)):
        refused(celeba_latent.PatchPCA, factor, channels)


def tiny_pair(prefix, channels, pool=False, width=8):
    """Random weights of the TAESD family, by the names and shapes of its files; returns the two dictionaries."""
    g, halves = gen(channels), []

    def conv(half, name, a, b, side=3, bias=True):
        half[f"{name}.weight"] = torch.randn(b, a, side, side, generator=g) / math.sqrt(a * side**2)
        half.update({f"{name}.bias": 0.1 * torch.randn(b, generator=g)} if bias else {})

    def block(half, name, pooled):
        for i in (0, 2, 4):
            conv(half, f"{name}.conv.{i}", width, width)
        if pooled:
            conv(half, f"{name}.pool.0", width, 4 * width, 1, bias=False)
            half |= {f"{name}.pool.1.{k}": torch.rand(4 * width, generator=g) for k in ("weight", "bias")}
            conv(half, f"{name}.pool.3", 4 * width, width, 1, bias=False)

    encoder, decoder = {}, {}
    conv(encoder, "0", 3, width)
    for i in (2, 6, 10):
        conv(encoder, str(i), width, width, bias=False)
    for i in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        block(encoder, str(i), pool and i > 10)
    conv(encoder, "14", width, channels)
    conv(decoder, "1", channels, width)
    for i in (7, 12, 17):
        conv(decoder, str(i), width, width, bias=False)
    for i in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        block(decoder, str(i), pool and i < 6)
    conv(decoder, "19", width, 3)
    for half, name in ((encoder, "encoder"), (decoder, "decoder")):
        half.update({k: v + 0.5 for k, v in half.items() if k == "19.bias"})  # pictures around ½
        torch.save(half, f"{prefix}_{name}.pth")
        halves.append(half)
    return halves


def plain_tiny(weights, x, strided, doubled):
    """A half of a tiny autoencoder layer by layer, from the numbers in its names alone."""

    def conv(name, x, **options):
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)

    for i in sorted({int(name.split(".")[0]) for name in weights}):
        if f"{i}.weight" in weights:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if i in doubled else x
            x = conv(i, x, padding=1, stride=2 if i in strided else 1)
            x = x.relu() if i == 1 else x  # of the decoder
            continue
        if f"{i}.pool.0.weight" in weights:
            h = conv(f"{i}.pool.0", x)
            groups = h.unflatten(1, (4, -1))
            mean, var = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, unbiased=False)
            h = ((groups - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
            h = h * weights[f"{i}.pool.1.weight"][:, None, None] + weights[f"{i}.pool.1.bias"][:, None, None]
            x = x + conv(f"{i}.pool.3", h.relu())
        h = conv(f"{i}.conv.2", conv(f"{i}.conv.0", x, padding=1).relu(), padding=1)
        x = (x + conv(f"{i}.conv.4", h.relu(), padding=1)).relu()
    return x


@pytest.mark.parametrize("channels, pool", [(4, False), (16, False), (32, True)])
def test_a_tiny_autoencoder_equals_a_plain_implementation(channels, pool, tmp_path):
    """Latents and pictures of a random pair of files, and after a checkpoint, equal `plain_tiny` to 1e-4 (float32)."""
    encoder, decoder = tiny_pair(tmp_path / "pair", channels, pool)
    x, z = torch.rand(2, 3, 32, 48, generator=gen()), 4 * torch.randn(2, channels, 3, 2, generator=gen())
    latents = plain_tiny(encoder, x, strided=(2, 6, 10), doubled=())
    pictures = plain_tiny(decoder, (z / 3).tanh() * 3, strided=(), doubled=(7, 12, 17)).clamp(0, 1)
    assert latents.std() > 0.01 and 0.01 < pictures.std() and (pictures > 0).double().mean() > 0.2
    net = celeba_latent.autoencoder(str(tmp_path / "pair"), 32, 99)
    scflow.save(tmp_path / "net.pt", net)
    for read in (net, scflow.load(tmp_path / "net.pt")):
        assert torch.allclose(read.encode(x), latents, atol=1e-4 * latents.abs().max().item())
        assert torch.allclose(read.decode(z), pictures, atol=1e-4) and read.factor == 8
        assert not any(p.requires_grad for p in read.parameters())


def encode_again(album, out, *changes):
    """Encode the album's pictures as they were, but for changes; returns the exit code."""
    return faces("encode", "--images", album / "pictures", *ENCODE, *changes, "--out", out)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_an_autoencoder_of_diffusers(kind, album, tmp_path):
    """Latents are the mode of its posterior (1e-2: float16), the folder decodes like the library (2 of 255 levels)."""
    diffusers = pytest.importorskip("diffusers")
    if kind == "AutoencoderKL":
        down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
        how = dict(down_block_types=down, up_block_types=up, block_out_channels=[8, 8], norm_num_groups=4)
    else:
        how = dict(encoder_block_out_channels=[8] * 4, decoder_block_out_channels=[8] * 4)
    vae = getattr(diffusers, kind)(**how).eval()
    vae.save_pretrained(tmp_path / "vae")
    assert encode_again(album, tmp_path / "latents", "--autoencoder", tmp_path / "vae") == 0
    data = celeba_latent.Latents(tmp_path / "latents")
    x = celeba_latent.Pictures(album / "pictures").read_all([data.meta["sources"][i] for i in (0, 7)], 32)
    with torch.no_grad():
        out = vae.encode(2 * torch.stack(x).float() / 255 - 1)
        z = out.latent_dist.mode() if kind == "AutoencoderKL" else out.latents
        pictures = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    assert data.shape == tuple(z.shape[1:]) and z.std() > 0
    stored = torch.from_numpy(data.arrays["latents"][[0, 14]]).float()
    assert (stored - z).abs().max() < 1e-2 * z.abs().max()
    decoded = celeba_latent.Codec(data.meta).decode(data.normalised(torch.tensor([0, 7])))
    assert (decoded.float() - 255 * pictures).abs().max() < 2
    assert not scflow.read(tmp_path / "latents/meta.pt")["weights"]  # the source is named, not copied


# ═══ celeba_latent.py: latents ══════════════════════════════════════════════════════════════


def contents(folder):
    """What a latents folder holds: the arrays' bytes, and what meta.pt says."""
    arrays = {name: Path(folder, f"{name}.npy").read_bytes() for name in ("latents", "thumbs", "textures")}
    return arrays | scflow.read(folder / "meta.pt")


def test_a_zip_is_encoded_like_the_folder_and_says_what_it_left_out(album, tmp_path, capsys):
    """Arrays, statistics and sources bitwise the same; the broken and the tiny picture are counted and named."""
    with zipfile.ZipFile(tmp_path / "album.zip", "w") as file:
        for path in sorted((album / "pictures").rglob("*"), reverse=True):
            file.write(path, path.relative_to(album / "pictures"))
    assert faces("encode", "--images", tmp_path / "album.zip", *ENCODE, "--out", tmp_path / "latents") == 0
    assert same(contents(tmp_path / "latents"), contents(album / "latents"))
    said, meta = capsys.readouterr().out, scflow.read(album / "latents/meta.pt")
    assert "60 pictures" in said and "2 skipped" in said and "small.png: too small (40×20)" in said
    assert "a/broken.PNG: cannot be read" in said
    names = {f"{'ab'[i % 2]}/deep/{i:02d}.{('png', 'jpg', 'webp')[i % 3]}" for i in range(60)}
    assert set(meta["sources"]) == names and len(meta["sources"]) == 60
    assert [name for name, _ in meta["skipped"]] == ["a/broken.PNG", "small.png"]


@pytest.mark.parametrize("wide", [True, False])
def test_the_crop_is_the_central_square(wide, tmp_path):
    """Of a picture three squares long the middle one is read, and a marker beside its centre stays at its place."""
    picture = torch.zeros(3, 32, 96, dtype=torch.uint8)
    picture[0, :, :32], picture[2, :, 64:] = 200, 200  # red and blue at the sides
    picture[1, :, 32:64] = 100
    picture[1, 8:12, 36:40] = 255
    save_picture(tmp_path / "a.png", picture if wide else picture.mT)
    crop = celeba_latent.Pictures(tmp_path).read("a.png", 32)
    crop = crop if wide else crop.mT
    assert torch.equal(crop, picture[:, :, 32:64])
    small = celeba_latent.Pictures(tmp_path).read("a.png", 8)
    small = small if wide else small.mT
    assert small[1].argmax() == 2 * 8 + 1 and small[::2].max() < 20  # the filter looks a little beyond the edge


def test_a_photograph_is_read_as_the_camera_was_held(tmp_path):
    """The EXIF orientation 6 is a quarter turn: the picture's left column becomes the top row."""
    picture, tag = torch.zeros(3, 16, 16, dtype=torch.uint8), Image.Exif()
    picture[:, :, :4], tag[0x0112] = 200, 6
    save_picture(tmp_path / "a.png", picture, exif=tag)
    assert torch.equal(celeba_latent.Pictures(tmp_path).read("a.png", 16), picture.mT)


def test_pictures_are_resized_without_aliasing(tmp_path):
    """A fine chequered pattern at any zoom becomes even grey (3 of 255 levels), grey and transparent pictures RGB."""
    for side in (96, 112, 70):
        board = (torch.arange(side)[:, None] + torch.arange(side)) % 2 * 255
        save_picture(tmp_path / "board.png", board.byte().expand(3, -1, -1))
        assert (celeba_latent.Pictures(tmp_path).read("board.png", 16)[:, 2:-2, 2:-2].float() - 127.5).abs().max() < 3
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (40, 40)).save(tmp_path / "other.png")
        assert celeba_latent.Pictures(tmp_path).read("other.png", 16).shape == (3, 16, 16)


def test_every_picture_has_its_latent_and_its_mirror_image_the_next_row(album, tmp_path):
    """Rows 2i and 2i+1 are the encoded picture i and its mirror (2e-3: float16); the last row is the last good one."""
    tiny_pair(tmp_path / "pair", 4)
    assert encode_again(album, tmp_path / "latents", "--autoencoder", tmp_path / "pair", "--batch", 7) == 0
    data, pictures = celeba_latent.Latents(tmp_path / "latents"), celeba_latent.Pictures(album / "pictures")
    x = torch.stack(pictures.read_all(data.meta["sources"], 32))
    net = celeba_latent.TinyAutoencoder.read(tmp_path / "pair")
    with torch.no_grad():
        both = torch.stack([net.encode(x / 255), net.encode(x.flip(3) / 255)], 1).flatten(0, 1)
    rows = torch.from_numpy(data.arrays["latents"][:120].astype(np.float32))
    assert data.arrays["latents"].dtype == np.float16 and (both[::2] - both[1::2]).abs().max() > 0.03
    assert (rows - both).abs().max() < 2e-3 * both.abs().max()
    assert not data.arrays["latents"][120:].any()  # room for pictures that were skipped
    for ours, theirs in zip(data.originals(torch.arange(60)), celeba_latent.picture_features(x)):
        assert torch.allclose(ours, theirs, atol=1e-4)
    z = data.normalised(torch.tensor([3, 8]), mirrored=True)
    expected = (both[[6, 7, 16, 17]] - data.meta["mean"]) / data.meta["std"]
    assert (z - expected).abs().max() < 0.02 and torch.equal(data.normalised(torch.tensor([8])), z[2:3])


def test_latents_are_normalised_per_channel_and_decoded_again(album, tmp_path):
    """Mean 0 and deviation 1 in every channel (1e-3: float16); codec and statistics give the pictures back."""
    data, all_of_them = celeba_latent.Latents(album / "latents"), torch.arange(60)
    z = data.normalised(all_of_them, mirrored=True).double()
    stored = data.arrays["latents"].astype(np.float64)
    assert np.ptp(stored[:120].std((0, 2, 3))) > 0.1  # the channels differ: statistics over all would be seen
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3
    x = torch.stack(celeba_latent.Pictures(album / "pictures").read_all(data.meta["sources"], 32))
    net = scflow.load(album / "latents/meta.pt")
    best = net.decode(net.encode(x / 255)) * 255
    decoded = celeba_latent.Codec(data.meta).decode(z.float()[::2], batch=7)
    assert decoded.dtype == torch.uint8 and (decoded - best).abs().max() < 1.5 and (best - x).square().mean() > 1
    assert encode_again(album, tmp_path / "none", "--autoencoder", "none") == 0
    data = celeba_latent.Latents(tmp_path / "none")
    decoded = celeba_latent.Codec(data.meta).decode(data.normalised(all_of_them))
    assert (decoded.int() - x.int()).abs().max() <= 1


def test_a_tenth_is_held_out_and_never_trained_on(album, tmp_path):
    """The same pictures each time, with flips or without; batches hold the others and their mirrors, and no more."""
    data = celeba_latent.Latents(album / "latents")
    assert faces("encode", "--images", album / "pictures", *"--size 24 --autoencoder none --quiet".split(),
                 "--out", tmp_path / "plain") == 0  # fmt: skip
    other = celeba_latent.Latents(tmp_path / "plain")
    assert torch.equal(data.held_out, other.held_out) and torch.equal(data.train, other.train)
    assert len(data.held_out) == 6 and data.held_out.tolist() != list(range(6))
    assert sorted(data.held_out.tolist() + data.train.tolist()) == list(range(60))
    for latents in (data, other):
        x, cond = latents.batch("cpu")(4000, gen())
        rows = {tuple(row) for row in x.flatten(1).tolist()}
        mine = latents.normalised(latents.train, mirrored=True)
        assert cond is None and len(mine) == latents.copies * 54 and mine.shape[1:] == latents.shape
        assert rows == {tuple(row) for row in mine.flatten(1).tolist()}
        assert not rows & {
            tuple(row) for row in latents.normalised(latents.held_out, mirrored=True).flatten(1).tolist()
        }


class Killed(BaseException):
    """The process ends here: nobody catches this."""


def nth(function, n, instead):
    """The function, but for the n-th call."""
    calls = itertools.count(1)
    return lambda *args, **options: (instead if next(calls) == n else function)(*args, **options)


def killed(*_, **__):
    raise Killed


def saved_and_killed(*args, save=scflow.save, **options):
    save(*args, **options)
    raise Killed


MOMENTS = {
    "before the first save": ("picture_features", celeba_latent.picture_features, 9, killed, 0),
    "while encoding": ("picture_features", celeba_latent.picture_features, 41, killed, 32),
    "while saving": ("save", scflow.save, 3, killed, 32),
    "after saving": ("save", scflow.save, 2, saved_and_killed, 32),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_encoding_is_refused_and_resumes_bit_for_bit(moment, album, tmp_path, monkeypatch, capsys):
    """The half folder trains nothing; --resume takes other settings for an error, and encodes only what is missing."""
    name, function, n, instead, done = MOMENTS[moment]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(scflow if name == "save" else celeba_latent, name, nth(function, n, instead))
        encode_again(album, tmp_path / "half")
    assert faces("teacher", "--latents", tmp_path / "half", "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("no meta.pt" if done == 0 else "unfinished") in said
    assert encode_again(album, tmp_path / "half", "--resume", "--size", 16) == 2
    assert "other settings" in capsys.readouterr().err
    seen, function = [], celeba_latent.picture_features
    monkeypatch.setattr(celeba_latent, "picture_features", lambda x: (seen.append(len(x)), function(x))[1])
    assert encode_again(album, tmp_path / "half", "--resume") == 0
    assert same(contents(tmp_path / "half"), contents(album / "latents"))
    assert sum(seen) <= 62 - done and not (tmp_path / "run").exists()


def kill_while_saving(n, *argv):
    """Run a command in a process that is killed half-way through its n-th save."""
    program = f"""if True:
        import os, signal, sys, torch, celeba_latent, toy_2d
        celeba_latent.SIZES["small"], toy_2d.matmul_rate = {TINY!r}, lambda device: 1e9
        save, calls = torch.save, []
        def half(content, file):
            calls.append(0)
            if len(calls) < {n}:
                return save(content, file)
            file.write(b"PK half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = half
        sys.exit(celeba_latent.main({list(map(str, argv))!r}))
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE, env=env, timeout=100).returncode == -9


def test_a_killed_encoding_resumes_bit_for_bit(album, tmp_path):
    """A real SIGKILL in the middle of the second save; then --resume; then every byte is compared."""
    out = tmp_path / "half"
    kill_while_saving(2, "encode", "--images", album / "pictures", *ENCODE, "--out", out)
    assert scflow.read(out / "meta.pt")["done"] == 16 and not scflow.read(out / "meta.pt")["complete"]
    assert encode_again(album, out, "--resume") == 0
    assert same(contents(out), contents(album / "latents"))
    before = contents(out)
    assert encode_again(album, out, "--resume") == 0 and same(contents(out), before)  # a finished folder stays


def test_a_demo_that_was_stopped_while_it_encoded_goes_on(tmp_path, monkeypatch):
    """--resume encodes the rest, and trains from the start; with a run folder there, training is resumed too."""
    commands = []
    for name in ("teacher", "distill", "evaluate"):
        monkeypatch.setattr(celeba_latent, f"{name}_command", lambda argv, name=name: commands.append([name, *argv]))
    argv = ["demo", "--drawings", 1200, "--out", tmp_path / "run", "--quiet"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(celeba_latent, "picture_features", nth(celeba_latent.picture_features, 2, killed))
        faces(*argv)
    assert not commands and faces(*argv, "--resume") == 0
    assert len(celeba_latent.Latents(tmp_path / "run-latents").train) == 1080
    assert [name for name, *_ in commands] == ["teacher", "distill", "evaluate"] and "--resume" not in sum(commands, [])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    assert faces(*argv, "--resume") == 0
    assert ["--resume" in command for command in commands[3:]] == [True, True, False]


@pytest.mark.parametrize("bad, word", [(20, "none"), (12, "20 are needed")])
def test_too_few_good_pictures_are_an_error(bad, word, tmp_path, capsys):
    """Nothing left, or next to nothing: exit code 2, one line that names a picture and why it was left out."""
    for i, picture in enumerate(drawings(20)):
        save_picture(tmp_path / f"pictures/{i:02d}.png", picture[:, : 10 if i < bad else 32])
    for kind in ("pca", "none"):
        assert faces("encode", "--images", tmp_path / "pictures", *ENCODE, "--autoencoder", kind, "--out",
                     tmp_path / kind) == 2  # fmt: skip
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "00.png" in said + "00.png" * (kind == "pca") and "too small (32×10)" in said
        assert word in said or (kind, word) == ("none", "none")
        assert faces("teacher", "--latents", tmp_path / kind, "--out", tmp_path / "run") == 2
        capsys.readouterr()


# ═══ celeba_latent.py: teacher and student ══════════════════════════════════════════════════


def training(demo, out, *changes):
    """The demo's training again, in a folder of its own: the two commands."""
    common = ["--out", out, "--save-every", "5", "--quiet"]
    return ["teacher", "--latents", demo.latents, "--patch", 1, *common], ["distill", "--student-steps", 12, *common]


def losses_logged(run):
    with open(run / "log.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in ("images_per_s", "mfu")} for row in csv.DictReader(file)]


def test_ctrl_c_in_training_on_latents_resumes_bit_for_bit(faces_demo, tmp_path, monkeypatch, capsys):
    """SIGINT in teacher and student: saved there, refused without --resume or with other settings, equal at the end."""
    out, note = tmp_path / "run", celeba_latent.Log.note
    teacher, distill = training(faces_demo, out)

    def refused_with(word, *argv):
        before = {p: p.read_bytes() for p in out.iterdir()}
        assert faces(*argv) == 2
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == 1 and {p: p.read_bytes() for p in out.iterdir()} == before

    def stop(log, stage, state, total):
        note(log, stage, state, total)
        if state.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    for name, command in (("teacher", teacher), ("student", distill)):
        with monkeypatch.context() as patch:
            patch.setattr(celeba_latent.Log, "note", stop)
            assert faces(*command) == 130
        said = capsys.readouterr().err
        assert "--resume" in said and said.count("\n") == 1
        assert scflow.read(out / f"{name}.pt")["state"]["step"] == 7
        if name == "teacher":
            refused_with("update 7", *distill)
            refused_with("exists", *teacher)
            refused_with("teacher_batch", *teacher, "--resume", "--teacher-batch", 8)
        else:
            refused_with("exists", *distill)
            refused_with("schedule", *distill, "--resume", "--lambda-adv", 0.5)
            refused_with("seed", *distill, "--resume", "--seed", 1)
            refused_with("schedule", *distill, "--resume", "--student-steps", 13)
        assert faces(*command, "--resume") == 0
        assert equal_weights(out / f"{name}.pt", faces_demo.run / f"{name}.pt")
    assert losses_logged(out) == losses_logged(faces_demo.run)
    assert faces(*distill, "--overwrite") == 0 and equal_weights(out / "student.pt", faces_demo.run / "student.pt")
    assert losses_logged(out) == losses_logged(faces_demo.run)


@pytest.mark.parametrize("name, n", [("teacher", 2), ("student", 3)])
def test_a_killed_training_on_latents_resumes_bit_for_bit(name, n, faces_demo, tmp_path):
    """A real SIGKILL while a checkpoint is written, of the student in its second phase; the one before it is whole."""
    out = tmp_path / "run"
    teacher, distill = training(faces_demo, out)
    if name == "student":
        out.mkdir()
        for file in ("teacher.pt", "config.json"):
            shutil.copy(faces_demo.run / file, out)
    command = teacher if name == "teacher" else distill
    kill_while_saving(n, *command)
    assert scflow.read(out / f"{name}.pt")["state"]["step"] == 5 * (n - 1)
    assert faces(*command, "--resume") == 0
    assert equal_weights(out / f"{name}.pt", faces_demo.run / f"{name}.pt")


def test_checkpoints_of_faces_are_plain_and_complete(faces_demo):
    """scflow.load alone rebuilds each network; no prefix in any name; all in float32; the codec travels along."""
    for name, parts in (("teacher", ("net", "ema", "opt")), ("student", PARTS)):
        content = scflow.read(faces_demo.run / f"{name}.pt")
        net = scflow.load(faces_demo.run / f"{name}.pt")
        assert isinstance(net, DiT) and net.shape == (64, 2, 2) and net.arch["dim"] == 16
        assert same(net.state_dict(), content["state"]["parts"]["ema"])  # the average is what samples
        assert content["state"]["parts"].keys() == set(parts) and content["state"]["step"] == 12
        dictionaries = [content["weights"], content["codec"]["weights"], *content["state"]["parts"].values()]
        assert not any(str(k).startswith(("_orig_mod.", "module.")) for d in dictionaries for k in d)
        assert all(v.dtype == torch.float32 for v in content["weights"].values())
        meta = scflow.read(faces_demo.latents / "meta.pt")
        assert all(same(content["codec"][k], meta[k]) for k in ("arch", "weights", "mean", "std", "size"))


def test_compiled_training_saves_plain_weights(album, tmp_path, monkeypatch):
    """--compile yes compiles the teacher, and the five networks that distillation runs; no name gets a prefix."""
    compiled, real = [], torch.compile

    def compile_nothing(thing, *args, **options):
        compiled.append(thing)
        return (
            real(thing, backend="eager") if isinstance(thing, nn.Module) else thing
        )  # a wrapper, or a method as it is

    monkeypatch.setattr(torch, "compile", compile_nothing)
    out, plain = tmp_path / "run", scflow.read(album / "run/student.pt")
    common = ["--compile", "yes", "--out", out, "--quiet"]
    assert faces("teacher", "--latents", album / "latents", "--teacher-steps", 3, *common) == 0
    assert len(compiled) == 1
    assert faces("distill", "--student-steps", 3, *common) == 0 and len(compiled) == 6
    content = scflow.read(out / "student.pt")
    assert content["weights"].keys() == plain["weights"].keys()
    for name, part in plain["state"]["parts"].items():
        assert content["state"]["parts"][name].keys() == part.keys()
    assert same(content["weights"], plain["weights"])


@pytest.mark.parametrize("preset, precision", [("paper", "fp32"), ("paper", "bf16"), ("two_phase", "bf16")])
def test_presets_run_in_both_precisions(preset, precision, album, tmp_path, monkeypatch, capsys):
    """Finite losses in the log with speed beside them; an estimate before the start; the weights are float32."""
    out, seen, loop = tmp_path / "run", [], scflow.distill

    def spy(teacher, disc, *rest, **options):
        seen.extend([teacher.precision, disc.precision])
        return loop(teacher, disc, *rest, **options)

    monkeypatch.setattr(scflow, "distill", spy)
    shutil.copytree(album / "run", out)
    argv = ["distill", "--overwrite", "--out", out, "--preset", preset, "--student-steps", 12, "--student-batch", 8]
    argv += ["--warmup-self", 2, "--warmup-bi", 2] if preset == "paper" else []
    assert faces(*argv, "--precision", precision) == 0
    assert seen == 2 * [{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]]
    said = capsys.readouterr().out
    assert "minutes" in said and "GB on disk" in said and {"paper": "12", "two_phase": "10 + 2"}[preset] in said
    content = scflow.read(out / "student.pt")
    assert len(content["plan"]["schedule"]) == len(celeba_latent.SCHEDULES[preset]) and content["state"]["step"] == 12
    assert all(v.dtype == torch.float32 for v in content["weights"].values())
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        row = [row for row in csv.DictReader(file) if row["stage"] == "student"][-1]
    assert row["step"] == "11" and float(row["images_per_s"]) > 0 and float(row["mfu"]) > 0
    kinds = {"paper": ("consistency", "adv", "self", "bi", "disc", "r1"), "two_phase": ("self", "adv", "disc")}
    assert all(math.isfinite(float(row[k])) for k in kinds[preset])


def test_the_log_counts_pictures_and_flops_by_phase(monkeypatch, tmp_path):
    """10 updates in 2 s are 5 batches a second; utilisation is that times the phase's FLOPs; drawing is not counted."""
    run, drawn = celeba_latent.Run(sheet_every=20, device="cpu", quiet=True), []
    monkeypatch.setattr(toy_2d, "matmul_rate", lambda device: 1e6)
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 2).__next__)
    log = celeba_latent.Log(run, [], [(20, 4, 1000.0), (20, 8, 500.0)], [], lambda state: drawn.append(state.step))
    for step in range(1, 41):
        log.note("student", SimpleNamespace(step=step, losses={"adv": 1.0}), 40)
    assert [row["step"] for row in log.rows] == [1, 11, 21, 31] and drawn == [20, 40]
    assert [row.get("images_per_s") for row in log.rows] == [None, 20, None, 40]
    assert [row.get("mfu") for row in log.rows] == [None, 0.02, None, 0.02]


def test_the_estimate_adds_up_time_and_memory(monkeypatch, capsys):
    """Updates × rows × FLOPs at 40% of the device's rate in minutes, and 4 bytes a number (three digits)."""
    monkeypatch.setattr(toy_2d, "matmul_rate", lambda device: 1e12)
    net = nn.Linear(999, 1000, bias=False)
    celeba_latent.Log(celeba_latent.Run(device="cpu"), [], [(600, 10, 1e12), (300, 20, 2e12)], 50 * [net], None)
    said = capsys.readouterr().out
    assert "600 + 300 updates" in said and "about 7.5e+02 minutes" in said and "0.2 GB" in said


# ═══ celeba_latent.py: samples and measures ═════════════════════════════════════════════════


def test_samples_come_from_the_run_or_from_the_weights_file_alone(faces_demo, tmp_path, monkeypatch, capsys):
    """The same pictures from both, equal to decoding by hand (1 of 255), by seed and steps; the grid holds them."""
    monkeypatch.chdir(tmp_path)
    content = scflow.read(faces_demo.run / "student.pt")  # of so short a run, hardly other than its teacher
    content["weights"]["head.weight"] += 0.2 * torch.randn(content["weights"]["head.weight"].shape, generator=gen())
    torch.save(content, "moved.pt")
    Path("run").mkdir()
    shutil.copy("moved.pt", "run/student.pt")
    argv = ["sample", "--count", 5, "--seed", 3, "--steps", 1, 2]
    assert faces(*argv, "--out", "run", "--file", "a.npz") == 0
    assert "2 network evaluations" in capsys.readouterr().out
    shutil.rmtree("run")
    assert faces(*argv, "--out", "moved.pt", "--file", "b.npz") == 0
    assert faces(*argv, "--out", "moved.pt", "--file", "grid.png") == 0
    assert faces(*argv[:3], "--seed", 4, "--out", "moved.pt", "--file", "c.npz", "--solver", "heun") == 0
    assert "2 network evaluations" in capsys.readouterr().out.splitlines()[-1]
    assert faces(*argv[:5], "--out", faces_demo.run / "teacher.pt", "--file", "d.npz") == 0
    found = {name: np.load(f"{name}.npz")["pictures"] for name in ("a-1", "a-2", "b-1", "b-2", "c-1", "d-1")}
    assert all(x.shape == (5, 32, 32, 3) and x.dtype == np.uint8 for x in found.values())
    assert np.array_equal(found["a-1"], found["b-1"]) and np.array_equal(found["a-2"], found["b-2"])
    for one, two in (("a-1", "a-2"), ("a-1", "c-1"), ("a-1", "d-1")):
        assert not np.array_equal(found[one], found[two])
    codec, noise = content["codec"], torch.randn(5, 64, 2, 2, generator=gen(3))
    for steps in (1, 2):
        z = sample(scflow.load("moved.pt"), noise, steps) * codec["std"] + codec["mean"]
        tokens = z.flatten(2).mT @ codec["weights"]["basis"].T + codec["weights"]["mean"]
        expected = 255 * scflow.unpatchify(tokens, 16, 32, 32).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(found[f"a-{steps}"] - expected).max() < 1
        with Image.open(f"grid-{steps}.png") as image:
            grid = np.asarray(image)
        assert grid.shape == (64, 96, 3) and (grid[32:, 64:] == 255).all()
        tiles = [grid[r : r + 32, c : c + 32] for r in (0, 32) for c in (0, 32, 64)][:5]
        assert np.array_equal(np.stack(tiles), found[f"a-{steps}"])


def test_the_demo_leaves_measures_and_sheets(faces_demo):
    """A row per network and step count, finite; the floor with its deviation; the table is the rows less the floor."""
    metrics = json.loads((faces_demo.run / "metrics.json").read_text())
    rows, floor = metrics["rows"], metrics["floor"]
    who = [(r["who"], r.get("nfe")) for r in rows]
    assert who == [
        ("autoencoder", None),
        *(("teacher", n) for n in (1, 50)),
        *(("student", n) for n in (1, 2, 4, 8)),
    ]
    assert (metrics["samples"], metrics["held_out"], metrics["train"], metrics["seed"]) == (1000, 210, 1890, 0)
    assert floor.keys() == {"layout", "texture", "coverage"} and floor["coverage"][0] > 0.9
    assert all(0 < floor[k][1] < floor[k][0] for k in ("layout", "texture"))
    for r in rows[1:]:
        assert all(math.isfinite(r[k]) for k in ("layout", "texture", "coverage", "gap", "novelty"))
        assert r["layout"] > 2 * rows[0]["layout"] and (r["gap"] == 0) == (r["nfe"] == 1)  # untrained
    text = (faces_demo.run / "metrics.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if re.match(r"\| (autoencoder|teacher|student)", line)]
    assert "1000 samples against 210 held-out" in text and f"layout {floor['layout'][0]:.4f} ±" in text
    for cells, r in zip(lines, rows, strict=True):
        assert cells[2] == f"{r['layout'] - floor['layout'][0]:.4f}" and cells[4] == f"{r['coverage']:.4f}"
        assert cells[3] == f"{r['texture'] - floor['texture'][0]:.4f}"
    for name in ("teacher", "student", "neighbours"):
        with Image.open(faces_demo.run / f"{name}.png") as image:
            assert len(np.unique(np.asarray(image.convert("RGB")) @ [65536, 256, 1])) > 50
    data = celeba_latent.Latents(faces_demo.latents)
    assert all(torch.equal(a, b) for a, b in zip(faces_demo.given, data.originals(data.held_out)))


def test_measures_of_the_truth_are_those_of_the_autoencoder(faces_demo, tmp_path, monkeypatch):
    """Held-out pictures in place of samples beat the floor and are new; others are as good as decoded, and copies."""
    shutil.copytree(faces_demo.run, tmp_path / "run")
    data, calls = celeba_latent.Latents(faces_demo.latents), []
    some = {"teacher": data.held_out.repeat(5), "student": data.train[torch.randperm(1890, generator=gen())]}
    codec = celeba_latent.Codec(data.meta)
    truths = {who: codec.decode(data.normalised(which[:1000])) for who, which in some.items()}
    moved = {who: pictures ^ 8 for who, pictures in truths.items()}  # by 8 levels everywhere: the gap

    def truth(net, noise, steps, codec, cond=None):
        calls.append(steps)
        return (truths if steps == 1 else moved)["teacher" if len(calls) <= 2 else "student"]

    monkeypatch.setattr(celeba_latent, "features_of", functools.cache(celeba_latent.features_of))
    monkeypatch.setattr(celeba_latent, "generate", truth)
    monkeypatch.setattr(celeba_latent, "PictureMeasure", lambda *given: faces_demo.measure)
    assert faces("evaluate", "--out", tmp_path / "run", "--count", 1000) == 0 and calls == [1, 50, 1, 2, 4, 8]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    floor, rows = metrics["floor"], metrics["rows"]
    assert floor == json.loads((faces_demo.run / "metrics.json").read_text())["floor"]
    autoencoder, held_out, trained = rows[0], rows[1], rows[3]
    assert held_out["layout"] < 0.5 * floor["layout"][0] and held_out["coverage"] == 1
    assert abs(held_out["novelty"] - 1) < 0.1 and trained["novelty"] < 0.5
    for k in ("layout", "texture"):  # another thousand of the same
        assert abs(trained[k] - autoencoder[k]) < 4 * floor[k][1]
    assert abs(trained["coverage"] - autoencoder["coverage"]) < 0.05
    assert all(abs(r["gap"] - (r["nfe"] > 1) * 8 / 255) < 1e-6 for r in rows[1:])


def test_fid_is_taken_between_samples_and_held_out_originals(album, monkeypatch):
    """The library gets uint8 (3,S,S) rows: the samples, and the held-out pictures themselves; without it, one line."""
    data, given = celeba_latent.Latents(album / "latents"), {}

    def calculate_metrics(input1, input2, fid, **options):
        given.update(one=input1, two=input2)
        return {"frechet_inception_distance": 12.5 if fid else None}

    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(calculate_metrics=calculate_metrics))
    pictures = drawings(7, 32, 5)
    assert celeba_latent.inception_fid(pictures, data, album / "pictures") == 12.5
    one, two = ([given[k][i] for i in range(len(given[k]))] for k in ("one", "two"))
    assert torch.equal(torch.stack(one), pictures) and len(two) == 6
    thumbs, _ = data.originals(data.held_out)
    assert torch.equal(torch.stack(two), thumbs) and two[0].dtype == torch.uint8  # at 32 px they are the pictures
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity$"):
        celeba_latent.inception_fid(pictures, data, album / "pictures")


# ═══ celeba_latent.py: attributes ═══════════════════════════════════════════════════════════

NAMES = ["Dark_Skin", "Smiling", "Eyeglasses"]


def attribute_list(folder, names, n_names=3):
    """A list in CelebA's format for pictures by name, and what it says: ones and minus ones (N,3)."""
    values = [[1 if (hash_of(name) >> k) % 2 else -1 for k in range(n_names)] for name in names]
    lines = [f"{name}  {'  '.join(f'{v:2d}' for v in row)}" for name, row in zip(names, values)]
    text = "\n".join([str(len(names)), " ".join(NAMES[:n_names]), *lines, ""])
    (folder / "list.txt").write_text(text, encoding="utf-8")
    return folder / "list.txt", dict(zip(names, values))


def hash_of(name):
    return sum(ord(c) * 31**i for i, c in enumerate(name))


@pytest.fixture(scope="module")
def portrait(album, tmp_path_factory):
    """The album encoded with a list of three attributes: folder, latents, what the list says; and a guided run."""
    folder = tmp_path_factory.mktemp("portrait")
    names = [path.name for path in sorted((album / "pictures").rglob("*")) if path.is_file()]
    path, said = attribute_list(folder, names)
    images = ["--images", album / "pictures", "--labels", path, "--out", folder / "latents"]
    assert faces("encode", *images, *ENCODE) == 0
    out = ["--out", folder / "run", "--quiet"]
    assert faces("teacher", "--latents", folder / "latents", "--teacher-steps", 3, *out) == 0
    assert faces("distill", "--student-steps", 3, "--guidance", 2, *out) == 0
    return SimpleNamespace(folder=folder, said=said, path=path, images=images)


def test_labels_are_those_of_the_pictures_that_were_encoded(portrait, album):
    """Row by row the list's signs for the picture's name, 1 for −1 and 2 for 1; without a list nothing is kept."""
    data = celeba_latent.Latents(portrait.folder / "latents")
    assert data.attributes == NAMES and data.tokens == (3, 2) and len(data.labels) == len(data.meta["sources"]) == 60
    for name, row in zip(data.meta["sources"], data.labels.tolist()):
        assert [2 * v - 3 for v in row] == portrait.said[Path(name).name]
    plain = celeba_latent.Latents(album / "latents")
    assert plain.attributes == [] and plain.tokens is None and "labels" not in plain.meta
    assert plain.batch("cpu")(4, gen())[1] is None


def test_a_batch_carries_a_random_part_of_its_own_labels(portrait):
    """What is told of a row is the row's own (its mirror image has the same); from none to all is told, about half."""
    data = celeba_latent.Latents(portrait.folder / "latents")
    z, cond = data.batch("cpu")(6000, gen())
    known = data.normalised(data.train, mirrored=True)
    rows = torch.cdist(z.flatten(1), known.flatten(1)).argmin(1)
    truth = data.labels[data.train][rows // data.copies].long()
    assert ((cond == truth) | (cond == 0)).all() and cond.dtype == torch.int64
    told = (cond > 0).double()
    assert (
        abs(told.mean() - 0.5) < 0.03 and told.all(1).double().mean() > 0.2 and (told == 0).all(1).double().mean() > 0.2
    )


def test_samples_are_asked_for_by_their_attributes(portrait, tmp_path, monkeypatch, capsys):
    """Other attributes, other pictures of the same noise; unknown names and values are one line; the run is guided."""
    monkeypatch.chdir(tmp_path)
    out = ["sample", "--out", portrait.folder / "run/student.pt", "--count", 2, "--file"]
    for name, given in (
        ("yes", ["Smiling=1"]),
        ("no", ["Smiling=0"]),
        ("both", ["Smiling=1", "Eyeglasses=0"]),
        ("none", []),
    ):
        assert faces(*out, f"{name}.npz", *(["--attributes", *given] if given else [])) == 0
    capsys.readouterr()
    for given, word in (("Smile=1", "Eyeglasses"), ("Smiling=2", "Smiling=0"), ("Smiling", "Smiling=1")):
        assert faces(*out, "x.npz", "--attributes", given) == 2
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == 1 and not Path("x-1.npz").exists()
    assert scflow.read(portrait.folder / "run/student.pt")["plan"]["guidance"] == 2
    assert celeba_latent.wanted(("Eyeglasses=0", "Smiling=1"), NAMES, 2).tolist() == [[0, 2, 1]] * 2


def test_attributes_reach_the_network_that_samples(portrait, monkeypatch):
    """The student is called with the tokens asked for, in every batch."""
    seen, sampler = [], scflow.sample
    monkeypatch.setattr(
        scflow, "sample", lambda *a, **k: (seen.append(a[4] if len(a) > 4 else None), sampler(*a, **k))[1]
    )
    net, codec = celeba_latent.load_run(portrait.folder / "run/student.pt", "cpu")
    cond = celeba_latent.wanted(["Smiling=1"], net.attributes, 5)
    celeba_latent.generate(net, torch.randn(5, *net.shape), 1, codec, batch=2, cond=cond)
    assert [len(c) for c in seen] == [2, 2, 1] and all((c == cond[: len(c)]).all() for c in seen)


LISTS = {
    "empty": ("", "begin with"),
    "no names": ("2\n", "begin with"),
    "no count": ("Smiling\nBright\na.png 1\n", "begin with"),
    "a value short": ("1\nSmiling Bright\na.png 1\n", "line 3"),
    "a zero": ("2\nSmiling\na.png 1\nb.png 0\n", "line 4"),
    "a line short": ("3\nSmiling\na.png 1\nb.png -1\n", "lists 2"),
    "a picture short": ("1\nSmiling\na.png 1\n", "no line for"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_bad_list_of_labels_is_one_line(case, album, tmp_path, capsys):
    """It names the file and what is wrong with it, and no folder is made."""
    text, word = LISTS[case]
    (tmp_path / "list.txt").write_text(text)
    images = ["--images", album / "pictures", "--labels", tmp_path / "list.txt", "--out", tmp_path / "new"]
    assert faces("encode", *images, *ENCODE) == 2
    said = capsys.readouterr().err
    assert word in said and "list.txt" in said and said.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_run_on_labelled_pictures_refuses_others(portrait, album, tmp_path, capsys):
    """Latents without the teacher's attributes are refused, and so is a resumption with another guidance."""
    shutil.copytree(portrait.folder / "run", tmp_path / "run")
    given = ["distill", "--out", tmp_path / "run", "--student-steps", 3, "--quiet"]
    assert faces(*given, "--overwrite", "--latents", album / "latents", "--guidance", 2) == 2
    assert "other attributes" in capsys.readouterr().err
    assert faces(*given, "--resume", "--guidance", 3) == 2 and faces(*given, "--resume", "--guidance", 2) == 0


def test_evaluation_asks_for_the_attributes_of_the_pictures_and_shows_the_guided_teacher(
    faces_demo, tmp_path, monkeypatch, capsys
):
    """Every sample of every network has the labels of a training picture; guidance counts as two evaluations a step."""
    latents = shutil.copytree(faces_demo.latents, tmp_path / "latents")
    content = scflow.read(latents / "meta.pt")
    labels = torch.randint(1, 3, (len(content["sources"]), 2), generator=gen(), dtype=torch.uint8)
    torch.save({**content, "attributes": ["Left", "Right"], "labels": labels}, latents / "meta.pt")
    out = ["--out", tmp_path / "run", "--quiet"]
    assert faces("teacher", "--latents", latents, "--patch", 1, "--teacher-steps", 2, *out) == 0
    assert faces("distill", "--student-steps", 2, "--guidance", 2, *out) == 0
    seen, make = [], celeba_latent.generate
    monkeypatch.setattr(celeba_latent, "generate", lambda *a, **k: (seen.append(k["cond"]), make(*a, **k))[1])
    monkeypatch.setattr(celeba_latent, "PictureMeasure", lambda *given: faces_demo.measure)
    assert faces("evaluate", "--out", tmp_path / "run", "--count", 1000) == 0
    rows = json.loads((tmp_path / "run/metrics.json").read_text())["rows"]
    assert [(r["who"], r["nfe"]) for r in rows if "guided" in r["who"]] == [("teacher, guided at 2", 100)]
    assert all(c.shape == (1000, 2) and torch.equal(c, seen[0]) and {*c.unique().tolist()} == {1, 2} for c in seen)
    assert "guided at 2" in capsys.readouterr().out


# ═══ celeba_latent.py: speed ════════════════════════════════════════════════════════════════


@pytest.mark.usefixtures("float64")
def test_one_loss_at_a_time_is_the_same_computation():
    """Values, gradients and draws of `distill_losses` to 1e-12, with a pass for every use: 5 for the student's 3."""
    p = phase(**ALL_FOUR)
    nets = {
        k: Counted(critic() if k == "disc" else mlp(i)) for i, k in enumerate(("teacher", "student", "target", "disc"))
    }
    x0, x1, t, _ = draw(32)
    results = []
    for function in (celeba_latent.one_loss_at_a_time, distill_losses):
        g = gen(7)
        losses, fake = function(SimpleNamespace(**nets), x0, x1, t, p, p.weights(0), g)
        parameters = list(nets["student"].parameters())
        grads = torch.autograd.grad(sum(losses[k] * w for k, w in p.weights(0).items()), parameters)
        results.append((losses, fake, g.get_state(), grads, nets["student"].rows))
    (a, fake_a, state_a, grads_a, rows_a), (b, fake_b, state_b, grads_b, rows_b) = results
    assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-12 for k in a) and torch.equal(state_a, state_b)
    assert torch.allclose(fake_a, fake_b, atol=1e-12) and rows_a == 5 * 32 and rows_b - rows_a == 3 * 32
    assert all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in zip(grads_a, grads_b))


def test_bench_times_every_variant_and_finds_them_equal(tiny, tmp_path, monkeypatch, capsys):
    """Two updates × four variants; ours is naive fp32 (1e-4), bfloat16 is near it; share is FLOPs by time by rate."""
    rates, naive = iter([1e9, 1.05e9]), []

    def spy(nets, *rest, function=celeba_latent.one_loss_at_a_time):
        naive.append(nets)
        return function(nets, *rest)

    monkeypatch.setattr(celeba_latent, "one_loss_at_a_time", spy)
    monkeypatch.setattr(toy_2d, "matmul_rate", lambda device: next(rates))
    monkeypatch.setattr(toy_2d, "rate", lambda *_: 1e9)
    argv = "--channels 2 --side 8 --batch 4 --rounds 1 --updates 1 --device cpu".split()
    assert faces("bench", *argv, "--out", tmp_path / "deep/bench") == 0
    content = json.loads((tmp_path / "deep/bench.json").read_text())
    rows, net = content["rows"], DiT((2, 8, 8), 2, **TINY[0])
    assert [(r["update"], r["variant"]) for r in rows] == list(
        itertools.product(("teacher", "distill"), celeba_latent.VARIANTS)
    )
    flops = {"teacher": 3 * net.flops()}
    flops["distill"] = scflow.distill_flops(net, LatentDiscriminator((2, 8, 8)), Phase(), 0)
    for r in rows:
        close = 0.2 if r["variant"] == "bf16 eager" else 1e-4
        assert r["loss"] < close and r["gradient"] < close and r["start_up"] > 0
        assert (r["gradient"] > 1e-4) == (r["variant"] == "bf16 eager")
        assert 0 < r["p10"] <= r["ratio"] <= r["p90"] < math.inf
        assert abs(r["share"] * r["ms"] * 1e6 / (4 * flops[r["update"]]) - 1) < 1e-6
    assert len(set(naive)) == 2  # the runs of two variants
    table = (tmp_path / "deep/bench.md").read_text()
    assert len(re.findall(r"^\| small \| (?:teacher|distill) \|", table, re.M)) == 8
    assert "5.0%" in table and "MORE THAN 3%" in table and table in capsys.readouterr().out


# ═══ celeba_latent.py: bad input ════════════════════════════════════════════════════════════


@pytest.fixture(scope="module")
def troubles(album, tmp_path_factory):
    """A folder of everything that can be wrong, beside an album in order."""
    at = tmp_path_factory.mktemp("troubles")
    for name in ("latents", "run", "pictures"):
        shutil.copytree(album / name, at / name)
    stored = np.load(at / "latents/latents.npy")
    spoiled, unseen = stored.copy(), stored.copy()
    spoiled[0, 0, 0, 0] = np.inf
    unseen[2 * celeba_latent.Latents(at / "latents").held_out[0]] = np.nan
    arrays = {"shape": stored[:, :, :2], "short": stored[:100], "nan": spoiled, "wide": (8 * stored).astype(np.float16)}
    arrays |= {"nan-held-out": unseen, "words": stored.astype("U3")}
    for name in (*arrays, "archive", "cut", "gone", "damaged", "half", "other"):
        shutil.copytree(at / "latents", at / name)
    for name, array in arrays.items():
        np.save(at / name / "latents.npy", array)
    with open(at / "archive/latents.npy", "wb") as file:
        np.savez(file, stored)
    (at / "damaged.zip").write_bytes((at / "run/teacher.pt").read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    (at / "cut/thumbs.npy").write_bytes((at / "latents/thumbs.npy").read_bytes()[:5000])
    (at / "gone/textures.npy").unlink()
    (at / "damaged/meta.pt").write_bytes((at / "latents/meta.pt").read_bytes()[:1000])
    meta = scflow.read(at / "latents/meta.pt")
    torch.save(meta | {"complete": False}, at / "half/meta.pt")
    torch.save(meta | {"mean": meta["mean"] + 0.1}, at / "other/meta.pt")
    for name in ("unfinished", "foreign", "no-config", "untaught", "moved"):
        shutil.copytree(at / "run", at / name)
        (at / name / "student.pt").unlink()
    teacher = scflow.read(at / "run/teacher.pt")
    teacher["state"]["step"] = 2
    torch.save(teacher, at / "unfinished/teacher.pt")
    shutil.copy(at / "run/student.pt", at / "foreign/teacher.pt")
    (at / "no-config/config.json").write_text("{")
    (at / "untaught/teacher.pt").unlink()
    config = json.loads((at / "run/config.json").read_text())
    (at / "moved/config.json").write_text(json.dumps(config | {"latents": "nowhere"}))
    for name in ("run", "unfinished"):
        (at / name / "config.json").write_text(json.dumps(config | {"latents": "latents"}))
    scflow.save(at / "points.pt", mlp())
    (at / "empty").mkdir()
    names = [path.name for path in (at / "pictures").rglob("*") if path.is_file()]
    (at / "labels.txt").write_text("\n".join([str(len(names)), "Smiling", *(f"{name} 1" for name in names)]))
    tiny_pair(at / "pair", 4)
    tiny_pair(at / "alone", 4)
    (at / "alone_decoder.pth").unlink()
    tiny_pair(at / "cut-pair", 4)
    (at / "cut-pair_encoder.pth").write_bytes((at / "pair_encoder.pth").read_bytes()[:2000])
    for half in ("encoder", "decoder"):
        torch.save(mlp().state_dict(), at / f"foreign-pair_{half}.pth")
        shutil.copy(at / "pair_encoder.pth", at / f"twice_{half}.pth")
    return at


ENCODING = ["encode", "--images", "pictures", "--out", "new", "--size", "32"]
TEACHING = ["teacher", "--teacher-steps", "3", "--out", "new", "--latents"]
DISTILLING = ["distill", "--student-steps", "9", "--out"]
FACES_ERRORS = {
    "no command": ([], "name a command"),
    "unknown command": (["train"], "name a command"),
    "unknown flag": (["demo", "--drawing", "3"], "--drawing"),
    "device": (["demo", "--device", "tpu9"], "tpu9"),
    "no drawings": (["demo", "--drawings", "0"], "drawings"),
    "no pictures named": (["encode", "--out", "new"], "--images"),
    "missing pictures": (["encode", "--images", "nowhere", "--out", "new"], "nowhere"),
    "empty folder": (["encode", "--images", "empty", "--out", "new"], "empty"),
    "not a zip": (["encode", "--images", "points.pt.txt", "--out", "new"], "points.pt.txt"),
    "no zip of pictures": (["encode", "--images", "pictures/notes.txt", "--out", "new"], "neither"),
    "damaged zip": (["encode", "--images", "damaged.zip", "--out", "new"], "whole zip"),
    "zip without pictures": (["encode", "--images", "points.pt", "--out", "new"], "holds no"),
    "size of patches": ([*ENCODING, "--size", "36"], "multiple of 8"),
    "too many components": ([*ENCODING, "--channels", "193"], "1 to 192"),
    "no components": ([*ENCODING, "--channels", "0"], "channels"),
    "no batch": ([*ENCODING, "--batch", "-1"], "batch"),
    "half a pair": ([*ENCODING, "--autoencoder", "alone"], "alone_decoder.pth"),
    "damaged pair": ([*ENCODING, "--autoencoder", "cut-pair"], "cut-pair_encoder.pth"),
    "foreign pair": ([*ENCODING, "--autoencoder", "foreign-pair"], "TAESD"),
    "two encoders": ([*ENCODING, "--autoencoder", "twice"], "TAESD"),
    "missing package": ([*ENCODING, "--autoencoder", "some/vae"], "pip install 'diffusers"),
    "existing latents": ([*ENCODING, "--out", "latents"], "--overwrite"),
    "resume and overwrite": ([*ENCODING, "--resume", "--overwrite"], "contradict"),
    "resume of nothing": ([*ENCODING, "--resume"], "nothing to resume"),
    "overwriting what is no run": ([*ENCODING, "--out", "pictures", "--overwrite"], "left alone"),
    "unwritable": ([*ENCODING, "--out", "/dev/null/latents"], "cannot write"),
    "no latents named": (TEACHING[:-1], "run encode"),
    "missing latents": ([*TEACHING, "nowhere"], "nowhere"),
    "pictures for latents": ([*TEACHING, "pictures"], "meta.pt"),
    "unfinished latents": ([*TEACHING, "half"], "--resume"),
    "damaged statistics": ([*TEACHING, "damaged"], "meta.pt"),
    "latents of another shape": ([*TEACHING, "shape"], "(124, 4, 2, 4), not (120, 4, 4, 4)"),
    "too few latents": ([*TEACHING, "short"], "(100, 4, 4, 4), not (120"),
    "latents in words": ([*TEACHING, "words"], "words/latents.npy"),
    "an archive of latents": ([*TEACHING, "archive"], "archive/latents.npy"),
    "latents that are not finite": ([*TEACHING, "nan"], "not finite"),
    "held-out latents that are not finite": ([*TEACHING, "nan-held-out"], "not finite"),
    "latents of another scale": ([*TEACHING, "wide"], "deviation of 8"),
    "truncated thumbnails": ([*TEACHING, "cut"], "thumbs.npy"),
    "missing textures": ([*TEACHING, "gone"], "textures.npy"),
    "patches that do not tile": ([*TEACHING, "latents", "--patch", "3"], "patches of 3"),
    "unknown size": ([*TEACHING, "latents", "--size", "XL"], "XL"),
    "existing run": ([*TEACHING, "latents", "--out", "run"], "--overwrite"),
    "teacher steps": ([*TEACHING, "latents", "--teacher-steps", "0"], "teacher_steps"),
    "no teacher": ([*DISTILLING, "untaught"], "run celeba_latent.py teacher"),
    "no run": ([*DISTILLING, "nowhere"], "run celeba_latent.py teacher"),
    "unfinished teacher": ([*DISTILLING, "unfinished"], "update 2"),
    "a student for a teacher": ([*DISTILLING, "foreign"], "teacher.pt"),
    "damaged settings": ([*DISTILLING, "no-config"], "config.json"),
    "latents that went away": ([*DISTILLING, "moved"], "nowhere"),
    "another autoencoder": ([*DISTILLING, "moved", "--latents", "other"], "another autoencoder"),
    "existing student": ([*DISTILLING, "run"], "--overwrite"),
    "another seed": ([*DISTILLING, "run", "--resume", "--seed", "5"], "seed"),
    "endless warm-up": ([*DISTILLING, "run", "--preset", "paper"], "warmup_self"),
    "three values, two phases": ([*DISTILLING, "run", "--lambda-self", "0", "1", "2"], "phases"),
    "frozen first": ([*DISTILLING, "run", "--lambda-self", "1", "--self-source", "frozen"], "first phase"),
    "sample without a run": (["sample", "--out", "nowhere"], "nowhere"),
    "sample of points": (["sample", "--out", "points.pt"], "points.pt"),
    "no steps": (["sample", "--out", "run", "--steps", "0"], "step"),
    "no samples": (["sample", "--out", "run", "--count", "0"], "count"),
    "kind of file": (["sample", "--out", "run", "--file", "faces.gif"], ".npz"),
    "sample into nowhere": (["sample", "--out", "run", "--count", "2", "--file", "nowhere/a.png"], "nowhere"),
    "few samples": (["evaluate", "--out", "run", "--count", "100"], "1000 or more"),
    "few pictures": (["evaluate", "--out", "run", "--count", "1000"], "too few"),
    "evaluation without a student": (["evaluate", "--out", "moved", "--count", "1000"], "student.pt"),
    "evaluation with other latents": (
        ["evaluate", "--out", "run", "--count", "1000", "--latents", "other"],
        "another autoencoder",
    ),
    "guidance without labels": (
        [*DISTILLING, "moved", "--latents", "latents", "--guidance", "2"],
        "encode with --labels",
    ),
    "attributes without labels": (["sample", "--out", "run", "--attributes", "Smiling=1"], "without --labels"),
    "resumed with labels": (
        [*ENCODING[:-4], "--out", "latents", "--size", "32", "--resume", "--labels", "labels.txt"],
        "with other settings",
    ),
    "missing list of labels": ([*ENCODING, "--labels", "nowhere.txt"], "nowhere.txt"),
    "bench of an unknown size": (["bench", "--sizes", "XL"], "XL"),
    "no rounds": (["bench", "--rounds", "0"], "rounds"),
}


@pytest.mark.parametrize("case", FACES_ERRORS)
def test_bad_input_for_faces_is_one_clear_line_and_changes_nothing(case, troubles, monkeypatch, capsys):
    """Exit code 2, one line on stderr that names the trouble, no traceback, and no file written or lost."""
    monkeypatch.chdir(troubles)
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    before = {p: p.stat().st_mtime_ns for p in troubles.rglob("*")}
    argv, word = FACES_ERRORS[case]
    assert faces(*argv) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and error.startswith("celeba_latent.py: error: ")
    assert {p: p.stat().st_mtime_ns for p in troubles.rglob("*")} == before


@pytest.mark.parametrize("command", ["encode", "teacher", "distill", "sample"])
def test_running_out_of_memory_says_what_to_lower(command, troubles, tmp_path, monkeypatch, capsys):
    """torch's error, of many lines, becomes one that names the settings; exit code 2."""
    monkeypatch.chdir(troubles)

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    where = {"encode": (celeba_latent.PatchPCA, "encode"), "teacher": (scflow, "flow_matching_loss")}
    where |= {"distill": (scflow, "distill_step"), "sample": (scflow, "sample")}
    monkeypatch.setattr(*where[command], full)
    shutil.copytree("moved", tmp_path / "run")
    argv = {"encode": [*ENCODING, "--out", tmp_path / "new"], "sample": ["sample", "--out", "run"]}
    argv |= {"teacher": [*TEACHING, "latents", "--out", tmp_path / "new"]}
    argv |= {"distill": ["distill", "--latents", "latents", "--out", tmp_path / "run"]}
    assert faces(*argv[command], *(["--quiet"] if command != "sample" else [])) == 2
    error = capsys.readouterr().err
    assert "out of memory" in error and "--student-batch" in error and error.count("\n") == 1


# ═══ Notebooks ══════════════════════════════════════════════════════════════════════════════


def percent_cells(text):
    """The cells of a percent-format source as (kind, text)."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.M)[1:]:
        mark, _, body = part.partition("\n")
        markdown = "[markdown]" in mark
        lines = [re.sub("^# ?", "", line) if markdown else line for line in body.strip("\n").split("\n")]
        cells.append(("markdown" if markdown else "code", "\n".join(lines).strip("\n")))
    return cells


@pytest.mark.parametrize("source", sorted((HERE / "notebooks").glob("*.py")), ids=lambda path: path.stem)
def test_notebooks_are_their_sources_executed(source):
    """Each .ipynb has the cells of its .py, ran from top to bottom without an error, and stays below a megabyte."""
    path = source.with_suffix(".ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [(c["cell_type"], "".join(c["source"]).strip("\n")) for c in cells] == percent_cells(source.read_text())
    code = [c for c in cells if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert not any(out["output_type"] == "error" for c in code for out in c["outputs"])
    assert any("image/png" in out.get("data", {}) for c in code for out in c["outputs"])
    assert path.stat().st_size < 1_000_000


# ═══ Notebook 7: prompts and guidance ═══════════════════════════════════════════════════════


@pytest.fixture(scope="module")
def prompts():
    """The source of the notebook as a module, with the smallest networks."""
    module = toy_2d.notebook("07_prompts_and_guidance")
    first, last = (replace(p, steps=3, batch=4) for p in module.PRESETS["cpu"][2])
    dims = dict(dim=16, depth=1, heads=2)
    module.PRESETS = {name: (dims, TeacherSettings(4, 8, 1e-3), (first, last)) for name in module.PRESETS}
    return module


def test_the_reader_reads_what_was_drawn(prompts):
    """All that was drawn, in at least 99.9% of 1,500 pictures of seen and held-out combinations, as bytes."""
    g = gen()
    scenes = prompts.settle(prompts.SCENES[torch.cat([prompts.pick(1000, g), prompts.pick(500, g, unseen=True)])], g)
    numbers = torch.tensor([prompts.SENTENCES[prompts.sentence(scene)] for scene in scenes.tolist()])
    pictures = prompts.draw(prompts.SCENES[numbers], g)
    assert pictures.min() >= 0 and pictures.max() <= 1 and (prompts.SCENES[numbers] >= 0).all()
    assert prompts.accuracy(numbers, (255 * pictures).round() / 255) >= 0.999


def test_the_reader_notices_every_kind_of_mistake(prompts):
    """At most 0.1% of pictures of a scene that differs in one thing alone pass for the sentence, for each thing."""
    g, scenes = gen(1), prompts.SCENES  # of two objects, all said of both
    numbers = torch.where((scenes >= 0).all(1) & (scenes[:, 3] > 0) & (scenes[:, :3] != scenes[:, 4:]).any(1))[0]
    numbers = numbers[torch.randperm(len(numbers), generator=g)[:250]]
    for name, change in prompts.mistakes().items():
        wrong = change(prompts.SCENES[numbers])
        told = (wrong != prompts.SCENES[numbers]).any(1)
        assert told.sum() > 120 and prompts.accuracy(numbers[told], prompts.draw(wrong[told], g)) <= 0.001, name


@pytest.mark.parametrize("open_columns, said", [((0, 4), (1, 5)), ((1, 5), (0, 4)), ((0, 1, 4, 5), ())])
def test_what_is_left_open_may_be_anything_and_nothing_else_may(prompts, open_columns, said):
    """Without sizes, colours or both a sentence is shown by each picture of it, and by none if what it says changes."""
    g = gen(3)
    numbers = torch.where((prompts.SCENES >= 0).all(1) & ~prompts.UNSEEN)[0]
    scenes = prompts.SCENES[numbers[torch.randperm(len(numbers), generator=g)[:200]]]
    pictures, two = prompts.draw(scenes, g), scenes[:, 3] > 0
    for column in open_columns:
        scenes[two if column > 3 else slice(None), column] = -1

    def passes(scenes):
        return prompts.accuracy(
            torch.tensor([prompts.SENTENCES[prompts.sentence(s)] for s in scenes.tolist()]), pictures
        )

    assert passes(scenes) >= 0.995
    for column in (2, *said):
        other, count = scenes.clone(), 3 if column == 2 else 4 if column in (1, 5) else 2
        other[two if column > 3 else slice(None), column] = (
            other[two if column > 3 else slice(None), column] + 1
        ) % count
        assert passes(other) <= (0.01 if column < 4 else 0.01 + float((~two).double().mean())), column


def test_a_mean_of_pictures_shows_no_open_colour(prompts):
    """Means of 100 drawings: no sentence with an open colour is shown, though most of those that say all are."""
    g, scenes, share = gen(4), prompts.SCENES, []
    for kind in ((scenes >= 0).all(1), (scenes[:, [1, 5]] < 0).any(1)):
        numbers = torch.where(kind & ~prompts.UNSEEN)[0]
        numbers = numbers[torch.randperm(len(numbers), generator=g)[:100]]
        means = torch.stack([prompts.draw(scenes[i].expand(100, -1), g).mean(0) for i in numbers])
        share.append(prompts.accuracy(numbers, means))
    assert share[0] > 0.5 and share[1] <= 0.01


DAMAGES = ["noise", "a blot", "half a shape", "an empty ground", "two colours", "a dark ground", "a ghost", "specks"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_reader_passes_no_damaged_picture(prompts, damage):
    """Of 300 damaged pictures at most 2% pass (a blot may fall on a shape, half a square may look like a shape)."""
    g = gen(2)
    numbers = prompts.pick(300, g)
    x = prompts.draw(prompts.SCENES[numbers], g)
    if damage == "noise":
        x = torch.rand(x.shape, generator=g)
    elif damage == "a blot":
        x[:, :, :4, :4] = prompts.PALETTE[0][:, None, None]
    elif damage == "half a shape":
        inside = (x - x[:, :, :1, :1]).abs().sum(1, keepdim=True) > 0.3
        x = torch.where(inside & (torch.arange(32)[:, None] % 8 < 4), x[:, :, :1, :1], x)
    elif damage == "an empty ground":
        x = x[:, :, :1, :1].expand_as(x)
    elif damage == "two colours":
        x = torch.where(torch.arange(32) % 2 == 0, x, x.roll(1, 1))  # every second column has its channels turned
    elif damage == "a dark ground":
        x = torch.where((x - x[:, :, :1, :1]).abs().sum(1, keepdim=True) < 0.05, 0.3, x)
    elif damage == "a ghost":
        x[:, :, 1:5, 1:5] = 0.55 * x[:, :, 1:5, 1:5] + 0.45 * prompts.PALETTE[2][:, None, None]
    else:
        for top in range(1, 30, 6):
            x[:, :, top : top + 2, :2] = prompts.PALETTE[2][:, None, None]
    assert prompts.accuracy(numbers, x) <= 0.02


def test_variety_is_the_number_of_colours(prompts):
    """4 for true pictures of "a circle", 3 for "a square", 1 for "a red circle"; 0 for pictures of something else."""
    pairs = [("a circle", "a circle"), ("a square", "a square"), ("a circle", "a red circle"), ("a circle", "a square")]
    scenes = [prompts.SCENES[prompts.parse(drawn)].expand(400, -1) for _, drawn in pairs]
    found = [prompts.variety(prompts.parse(a), prompts.draw(x, gen())) for (a, _), x in zip(pairs, scenes)]
    assert found == pytest.approx([4, 3, 1, 0], abs=0.05)


def test_sentences_and_scenes_are_the_same_thing(prompts):
    """Each of the 8,145 scenes has a sentence of its own, which is parsed back; the tokens are its words in order."""
    assert len(prompts.SENTENCES) == len(prompts.SCENES) == 45 + 4 * 45**2 == len(prompts.TOKENS.unique(dim=0))
    for text, number in list(prompts.SENTENCES.items())[::37]:
        assert prompts.parse(text) == number == prompts.parse(f"{text.capitalize()}.")
        assert prompts.sentence(prompts.SCENES[number].tolist()) == text
        words = [prompts.WORDS[token - 1] for token in prompts.TOKENS[number].tolist() if token]
        assert " ".join(words) == text
    assert prompts.TOKENS.max() == len(prompts.WORDS) and prompts.TOKENS.shape[1] == prompts.LENGTH


def test_every_word_has_its_place(prompts):
    """At each of the ten places stand the words of one kind, all of them, or none where that may be left out."""
    noun = [["a"], [*prompts.SIZES], [*prompts.COLOURS], [*prompts.SHAPES]]
    for i, words in enumerate([*noun, ["left", "right", "above", "below"], ["of"], *noun]):
        asked = {1 + prompts.WORDS.index(word) for word in words} | ({0} if i not in (0, 3) else set())
        assert set(prompts.TOKENS[:, i].tolist()) == asked


def test_the_teacher_sees_pictures_of_its_sentences(prompts):
    """Of 300 latents and tokens of a batch 95% read back as told after decoding, and none shows what is held out."""
    codec = celeba_latent.Codec(prompts.codec_of(2000))
    z, words = prompts.captions(codec)(300, gen())
    tokens = prompts.TOKENS.tolist()
    numbers = torch.tensor([tokens.index(row) for row in words.tolist()])
    assert not prompts.UNSEEN[numbers].any() and prompts.accuracy(numbers, codec.decode(z) / 255) > 0.95
    assert prompts.accuracy(numbers.roll(1), codec.decode(z) / 255) < 0.1


def test_held_out_combinations_are_never_trained_on(prompts):
    """Of 20,000 drawn sentences none names one, nor has a picture of an open colour one; the others are all said."""
    pairs, s = ("green triangle", "yellow square"), prompts.SCENES
    green, yellow = [*prompts.COLOURS].index("green"), [*prompts.COLOURS].index("yellow")
    one, two = ((s[:, c] == green) & (s[:, h] == 2) | (s[:, c] == yellow) & (s[:, h] == 1) for c, h in ((1, 2), (5, 6)))
    named = one | two & (s[:, 3] > 0)
    assert torch.equal(named, prompts.UNSEEN) and 0.2 < named.double().mean() < 0.4
    seen, unseen = prompts.pick(20000, gen()), prompts.pick(20000, gen(), unseen=True)
    assert not named[seen].any() and named[unseen].all()
    assert (prompts.CHANCE > 0).all() and prompts.CHANCE.sum() == pytest.approx(1) and len(seen.unique()) > 3000
    assert abs((prompts.SCENES[seen, 3] == 0).double().mean() - 0.2) < 0.05
    settled = prompts.settle(prompts.SCENES[seen], gen(1))
    assert (settled >= 0).all()
    assert not any(pair in prompts.sentence(scene) for scene in settled.unique(dim=0).tolist() for pair in pairs)


def test_what_is_open_is_drawn_evenly(prompts):
    """Of "a circle" every size and colour alike, what is said stays, and a set share of sentences leave each open."""
    scene = prompts.SCENES[prompts.parse("a circle above a small red square")].expand(8000, -1)
    settled = prompts.settle(scene, gen())
    assert (settled[:, 2:] == scene[:, 2:]).all()
    counts = torch.bincount(settled[:, 0] * 4 + settled[:, 1], minlength=8)
    assert len(counts) == 8 and (counts - 1000).abs().max() < 150
    said = prompts.SCENES[prompts.pick(20000, gen())]
    assert abs((said[:, 0] < 0).double().mean() - 0.5) < 0.03
    assert abs((said[:, 1] < 0).double().mean() - 0.286) < 0.03  # of 1/4 and 3/4, with a sixth of the latter held out


@pytest.mark.parametrize(
    "prompt, word",
    [
        ("a purple circle", "yellow"),
        ("a red small circle", "SIZE"),
        ("", "SIZE"),
        ("a small red circle above", "RELATION"),
    ],
)
def test_a_prompt_outside_the_grammar_is_refused(prompts, prompt, word, tmp_path, monkeypatch, capsys):
    """One line: of an unknown word the vocabulary, else the grammar; nothing is written."""
    monkeypatch.chdir(tmp_path)
    commands = dict(sample=prompts.sample_command)
    assert toy_2d.main(["sample", "--prompt", prompt], commands, None, "prompts") == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_following_the_guided_flow_does_not_sample_the_tilted_density(prompts):
    """At w = 1 they agree within 0.01 (floor 0.003), at w = 2 0.1 apart; the grid draws p₀(x|c) itself at 1."""
    mixture, g, n = toy_2d.dataset("labelled"), gen(), 1500
    for label in (1, 2, 3):
        cond, distance = torch.full((n, 1), label), {}
        for scale in (1.0, 2.0):
            goal = scflow.EnergyDistance(prompts.tilted(mixture, label, scale, n, g))
            flow = sample(scflow.guided(mixture, scale), torch.randn(n, 2, generator=g), 30, "heun", cond)
            distance[scale] = goal(flow)
        assert abs(distance[1.0]) < 0.01 and distance[2.0] > 0.1
        truth = prompts.of_label(mixture, label).sample(n, g)[0]
        assert abs(scflow.EnergyDistance(truth)(prompts.tilted(mixture, label, 1.0, n, g))) < 0.01


def test_captions_are_trained_measured_resumed_and_drawn(prompts, tmp_path, monkeypatch, capsys):
    """The README's commands: a table with every network and count, a sheet, a prompt; resumed, nothing runs again."""
    monkeypatch.chdir(tmp_path)
    commands = dict(train=prompts.train_command, sample=prompts.sample_command)

    def program(*argv):
        return toy_2d.main(list(map(str, argv)), commands, "train", "prompts")

    written = re.findall(r"^python notebooks/07_prompts_and_guidance.py (.*)$", README, re.M)
    given, drawn = (shlex.split(command) for command in written)
    given.remove("2")  # two seeds have a deviation too
    given += ["--samples", 200, "--device", "cpu", "--quiet"]
    assert program(*given) == 0
    rows = list(tables(Path("runs/captions/captions.md").read_text(encoding="utf-8")))
    counts = [(row["network"], row["evaluations"]) for row in rows]
    teacher, student = (
        [(who, n) for n in ns] for who, ns in (("teacher, unguided", ("1", "2", "4", "50")), ("student", "1248"))
    )
    assert counts == [("truth", ""), ("autoencoder", ""), *teacher, ("teacher, guided", "100"), *student]
    assert (
        rows[0]["accuracy"] == rows[0]["held out"] == rows[0]["in red"] == "100.0 ± 0.0%"
        and rows[2]["accuracy"] == "0.0 ± 0.0%"
    )
    assert float(rows[1]["accuracy"].split()[0]) > 99
    assert Image.open("runs/captions/seed-0/prompts.png").size[0] > 500
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*.pt")}
    assert len(before) == 4 and program(*given) == 2 and "--overwrite" in capsys.readouterr().err
    assert program(*given, "--resume") == 0
    assert before == {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*.pt")}
    assert program(*drawn, "--steps", 1, 2, "--count", 3, "--device", "cpu") == 0
    assert Image.open("prompt.png").size == (3 * 136, 2 * 136)
    out = ["--out", "runs/captions/seed-0/teacher.pt", "--device", "cpu"]
    assert program("sample", "--prompt", "a large blue circle", *out) == 0
    stranger = scflow.DiT(prompts.LATENT, 1, 16, 1, 2)
    scflow.save("stranger.pt", stranger, codec=scflow.read("runs/captions/seed-0/student.pt")["codec"])
    small = ["--samples", 200, "--device", "cpu", "--quiet", "--seeds"]
    wrong = {
        "no network of captions": ["sample", "--out", "stranger.pt", "--device", "cpu"],
        "seed-1 exists": [*small, 7, 1],
        "twice": [*small, 7, 7],
        "not nan": [*small, 7, "--guidance", "nan"],
    }
    capsys.readouterr()
    for word, argv in wrong.items():
        assert program(*argv) == 2
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == 1 and not Path("runs/captions/seed-7").exists()


# ═══ README.md ══════════════════════════════════════════════════════════════════════════════

COMMANDS = re.findall(r"^(?:pip install .* && )?python (toy_2d\.py.*)$", README, re.M)  # in blocks, and in sentences
COMMANDS = sorted({" ".join(c.split()) for c in COMMANDS + re.findall(r"`python (toy_2d\.py[^`]*)`", README)})
FACES = re.findall(r"^python (celeba_latent\.py (?!demo).*)$", README, re.M)  # in blocks; the demo is the fixture
FACES = list({re.sub(r" [^- ]\S*", "", c[17:]) + c[17:20]: c for c in FACES}.values())  # one for each set of flags
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_run(command, finished, tmp_path, monkeypatch):
    """As written, shortened only by step and size flags."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs", "runs") if " plot " in command else None
    points_file("points.npy", np.random.default_rng(0).normal(size=(200, 2)))
    _, *argv = shlex.split(command)
    if "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            toy(*argv)
        return
    if argv[:1] == ["ablate"]:  # all of its rows are valid; two of them are run
        settings = toy_2d.Ablate(**toy_2d.cli(argv[1:], "", toy_2d.Ablate)[0])
        for flags, _ in toy_2d.chosen_rows(settings.rows).values():
            toy_2d.configure(shlex.split(f"{flags} {settings.flags}"))
        argv += ["--samples", "100", "--flags", "--teacher-steps 2 --student-steps 4", "--seeds", "0,1"]
        data = "labelled" if "labelled" in settings.datasets else "moons"
        argv += ["--datasets", data, "--rows", *list(toy_2d.chosen_rows(settings.rows))[:2]]
    elif argv[:1] == ["bench"]:
        monkeypatch.setattr(toy_2d, "ProcessPoolExecutor", HereAndNow)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
        argv += ["--samples", "200", "--shares", "0.01", "--seeds", "0", "--rounds", "1"]
        argv += ["--methods", "BOOT", "--datasets", "moons"]
    elif argv[:1] != ["plot"]:
        argv += SHORT
    assert toy(*argv) == 0


@pytest.mark.parametrize("command", FACES)
def test_readme_commands_on_faces_run(command, album, portrait, faces_demo, tmp_path, monkeypatch):
    """As written, but for the pictures, their labels, the autoencoder, and step and size flags."""
    monkeypatch.chdir(tmp_path)
    name, *argv = shlex.split(command)[1:]
    instead = {"--images": album / "pictures", "--labels": portrait.path, "--autoencoder": "pca"}
    for i, flag in enumerate(argv):
        if flag in instead:
            argv[i + 1] = str(instead[flag])
    made = portrait.folder if {"--guidance", "--attributes"} & {*argv} else album
    out = Path(argv[argv.index("--out") + 1] if "--out" in argv else "runs/demo")
    if name == "teacher":
        shutil.copytree(album / "latents", argv[argv.index("--latents") + 1])
    elif name in ("distill", "sample"):
        shutil.copytree(made / "run", out)
        (out / "student.pt").unlink() if name == "distill" else None
    elif name == "evaluate":
        shutil.copytree(faces_demo.run, out)
    short = {"demo": "--drawings 2000 --count 1000 --teacher-steps 2 --student-steps 2", "encode": "--size 32"}
    short |= {"teacher": "--size small --teacher-steps 2", "distill": "--student-steps 2", "sample": "--count 4"}
    short |= {"evaluate": "--count 1000", "bench": "--sizes small --side 4 --batch 2 --rounds 1 --updates 1"}
    assert faces(name, *argv, *short[name].split()) == 0


def test_readme_tables_are_those_of_the_results():
    """Every row of measures in the README, whatever its columns, is in a table that a command wrote to results/."""
    written = [row for path in (HERE / "results").rglob("*.md") for row in tables(path.read_text(encoding="utf-8"))]
    measured = [row for row in tables(README) if "1" in row or "network" in row]
    assert len(measured) > 30
    for row in measured:
        assert any(row.items() <= other.items() for other in written), row


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_readme_examples_run(number, finished, tmp_path, monkeypatch):
    """Each worked example as it stands; the first finds a finished run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs", "runs")
    scope = {}
    pytest.importorskip("diffusers") if "diffusers" in EXAMPLES[number] else None  # an optional extra
    exec(EXAMPLES[number], scope)
    if "x0" in scope:
        assert scope["x0"].shape == (1000, 2) and scope["x0"].isfinite().all()


def test_readme_names_the_tests_and_functions_that_exist():
    """Every `name` in the table of losses is in scflow.py, and every `test_…` in this file."""
    for name in re.findall(r"`(test_\w+)`", README):
        assert name in globals(), name
    for name in re.findall(r"`(\w+_(?:loss|losses|penalty))`", README):
        assert hasattr(scflow, name), name


def test_the_module_draws_nothing_parses_nothing_and_keeps_its_budget():
    """scflow.py imports neither matplotlib nor argparse nor tqdm, and has at most 680 lines of code."""
    source = (HERE / "scflow.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) (matplotlib|argparse|tqdm)", source, re.M)
    tree, text = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            text |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [n for n, line in enumerate(source.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")]
    assert len(set(lines) - text) <= 680
