"""Path, samplers, losses, training, networks, then the two scripts: each test shows one property.

Each docstring says what is shown, and why its tolerance. Exact statements run in double precision (`@exact`).
Random ones have fixed seeds; a z-score says how many standard errors a mean lies from where it should be.
"""

import copy
import csv
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

# A machine with a GPU runs the tests on its CPU, too. SCFLOW_TEST_CUDA=0 shows them GPU 0.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("SCFLOW_TEST_CUDA", "")

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import celeba_latent
import scflow
import toy_2d
from celeba_latent import (
    TRAITS,
    Codec,
    Latents,
    NormalStart,
    PatchPCA,
    PicturePCA,
    Pictures,
    TinyAutoencoder,
    draw_faces,
    start_from_normal,
)
from scflow import (
    MLP,
    DiT,
    LatentCritic,
    Phase,
    PointCritic,
    TeacherSettings,
    distill,
    distill_losses,
    predict_x0,
    sample,
    train_teacher,
)
from toy_2d import EnergyDistance, GaussianMixture

torch.set_num_threads(1)  # for tiny matrices more threads are slower, and the order of sums must not change

LATENT = (2, 4, 6)  # channels, height, width
LABEL = (1, 3)  # a condition of one word out of three
SENTENCE = (3, 5)  # three words out of five
ALL_FOUR = {"lambda_consistency": 1.0, "lambda_adv": 0.3, "lambda_self": 0.7, "lambda_bi": 0.5}
NONE = dict.fromkeys(ALL_FOUR, 0.0)
COPIES = ("teacher", "target", "ema", "frozen")  # networks of a run that no optimiser moves


# ═══ Helpers ════════════════════════════════════════════════════════════════════════════════


@pytest.fixture(autouse=True)
def seeded():
    """Fresh weights are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Double precision for everything that the test makes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


exact = pytest.mark.usefixtures("float64")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def scramble(net, seed=1):
    """Redraw every parameter, those that start at zero too, so that values stay of size one."""
    generator = gen(seed)
    for p in net.parameters():
        fan_in = p[0].numel()
        p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
    return net


def mlp(seed=1, tokens=None):
    return scramble(MLP(2, width=16, depth=2, tokens=tokens), seed)


def dit(seed=1, tokens=None):
    return scramble(DiT(LATENT, patch=2, dim=16, depth=2, heads=2, tokens=tokens), seed)


def point_critic(seed=9, tokens=None):
    return scramble(PointCritic(2, width=16, depth=2, tokens=tokens), seed)


def latent_critic(seed=9, tokens=None):
    return scramble(LatentCritic(LATENT, width=8, tokens=tokens), seed)


def phase(**changes):
    """A short phase with no losses but those that are named."""
    settings = dict(NONE, steps=6, batch=32, lr=1e-2, lr_critic=1e-2, delta=0.3, distance="squared", ema=0.99)
    settings.update(changes)
    return Phase(**settings)


class Gaussian:
    """Data N(m, s²I), for which everything is known in closed form. Its σ_t² = (1−t)²s² + t²."""

    def __init__(self, std):
        self.mean = torch.tensor([0.7, -1.2])
        self.std = std

    def sample(self, n, generator):
        return self.mean + self.std * torch.randn(n, 2, generator=generator)

    def sigma(self, t):
        return (((1 - t) * self.std) ** 2 + t**2).sqrt()

    def velocity(self, x, t, cond=None):
        """v*(x,t) = −m + (t − (1−t)s²)/σ_t² · (x − (1−t)m): the exact teacher."""
        t = t[:, None]
        slope = (t - (1 - t) * self.std**2) / self.sigma(t) ** 2
        return -self.mean + slope * (x - (1 - t) * self.mean)

    def flow_map(self, x, t):
        """f*(x,t) = m + s/σ_t · (x − (1−t)m): where the exact path through (x,t) ends."""
        t = t[:, None]
        return self.mean + self.std / self.sigma(t) * (x - (1 - t) * self.mean)

    def student(self, x, t, cond=None):
        """The perfect student: the velocity that lands on f*."""
        return (x - self.flow_map(x, t)) / t[:, None]


def batch(n, generator):
    """Points around (0.7, −1.2), without conditions."""
    x0 = Gaussian(0.4).sample(n, generator)
    return x0, None


def labelled(n, generator):
    """Points of three kinds, and the label of each: 1, 2 or 3."""
    x0, _ = batch(n, generator)
    label = torch.randint(1, 4, (n, 1), generator=generator)
    return x0 + label, label


def draw(n, t=None):
    """x₀, x₁, times and labels; every time is `t` if it is given."""
    generator = gen(7)
    x0, label = labelled(n, generator)
    x1 = torch.randn(n, 2, generator=generator)
    times = torch.rand(n, generator=generator)
    if t is not None:
        times.fill_(t)
    return x0, x1, times, label


def networks():
    """All that `distill_losses` needs of a run: different random networks, each with gradients."""
    return SimpleNamespace(
        teacher=mlp(2, LABEL),
        student=mlp(3, LABEL),
        target=mlp(4, LABEL),
        ema=mlp(5, LABEL),
        frozen=mlp(6, LABEL),
        critic=point_critic(9, LABEL),
    )


def losses_of(run, p, x0, x1, t, label=None):
    """The losses of phase `p` after any warm-up."""
    losses, _ = distill_losses(run, x0, x1, t, p, p.weights(p.warmup), gen(5), label)
    return losses


def take(loop, updates=None):
    """The run after so many more updates, or at its end."""
    runs = list(itertools.islice(loop, updates))
    return runs[-1]


def weights_of(net):
    return copy.deepcopy(net.state_dict())


def same(a, b):
    """Bitwise equality of tensors, numbers, lists of numbers, and dictionaries of all these."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def close(a, b, tolerance):
    """The weights of two networks agree, relatively or absolutely."""
    pairs = zip(a.parameters(), b.parameters())
    return all(torch.allclose(p, q, rtol=tolerance, atol=tolerance) for p, q in pairs)


def refused(call, *args, match=None, **options):
    """The call raises a ValueError of one line."""
    with pytest.raises(ValueError, match=match) as error:
        call(*args, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400


def z_scores(x):
    """How many standard errors the column means of x (N,…) are from zero."""
    return x.mean(0) / (x.std(0) / len(x) ** 0.5)


# ═══ 1. The straight path ═══════════════════════════════════════════════════════════════════


@exact
def test_time_runs_from_data_at_zero_to_noise_at_one():
    """x_t is x₀ at 0, x₁ at 1, and a line between; its slope is x₁ − x₀ and lands on x₀ (rounding: 1e-12)."""
    x0, x1, t, _ = draw(64)
    assert torch.equal(scflow.interpolate(x0, x1, torch.zeros(64)), x0)
    assert torch.equal(scflow.interpolate(x0, x1, torch.ones(64)), x1)

    xt = scflow.interpolate(x0, x1, t)
    slope = (scflow.interpolate(x0, x1, t + 0.5) - xt) / 0.5
    assert torch.allclose(slope, x1 - x0, atol=1e-12)
    assert scflow.flow_matching_loss(slope, x0, x1) < 1e-24
    assert torch.allclose(predict_x0(lambda *_: slope, xt, t), x0, atol=1e-12)


@pytest.mark.parametrize("make, shape", [(mlp, (2,)), (dit, LATENT)])
def test_at_time_zero_a_point_lands_on_itself(make, shape):
    """f(x,0) = x bitwise, whatever the weights are. At t = ½ the same weights move the point."""
    net = make()
    x = torch.randn(5, *shape)
    assert torch.equal(predict_x0(net, x, torch.zeros(5)), x)
    assert (predict_x0(net, x, torch.full((5,), 0.5)) - x).abs().mean() > 0.01


# ═══ 2. Samplers ════════════════════════════════════════════════════════════════════════════


@exact
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sampling_walks_down_to_zero(solver):
    """Each row falls from its own start in equal steps; a constant velocity is followed exactly (1e-12)."""
    times = []

    def constant(x, t, cond):
        times.append(t)
        return torch.full_like(x, 2.0)

    noise = torch.randn(3, 2)
    start = torch.tensor([1.0, 0.6, 0.2])
    x, path = sample(constant, noise, 2, solver, start=start, trajectory=True)
    assert len(times) == scflow.nfe(2, solver)
    assert torch.equal(times[0], start)
    assert torch.equal(times[-1], start / 2 if solver == "euler" else 0 * start)
    assert torch.allclose(path[1], noise - start[:, None], atol=1e-12)
    assert torch.allclose(x, noise - 2 * start[:, None], atol=1e-12)


@pytest.mark.parametrize("steps, solver", [(0, "euler"), (1.5, "heun"), (4, "rk4")])
def test_a_sampler_refuses_what_it_cannot_do(steps, solver):
    """Fewer than one whole step, and an unknown solver."""
    refused(sample, mlp(), torch.randn(3, 2), steps, solver)


@exact
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("std", [0.15, 1.7])
def test_the_order_of_a_solver(solver, order, std):
    """Twice the steps: the error falls by 2^order (5%: higher orders). At s = 1 Heun's reads 3 by chance."""
    truth = Gaussian(std)
    noise = torch.randn(100, 2)
    end = truth.flow_map(noise, torch.ones(100))
    coarse = (sample(truth.velocity, noise, 512, solver) - end).norm()
    fine = (sample(truth.velocity, noise, 1024, solver) - end).norm()
    assert coarse / fine == pytest.approx(2**order, rel=0.05)


@exact
@pytest.mark.parametrize("std", [0.15, 1.7])
def test_two_euler_steps_with_the_exact_map_have_the_wrong_spread(std):
    """Euler with f* is linear in the noise: slope s after one step, s(1+s)/√(1+s²) after two (1e-10)."""
    truth = Gaussian(std)
    noise = torch.randn(10, 2)
    two = std * (1 + std) / math.sqrt(1 + std**2)
    for steps, slope in [(1, std), (2, two)]:
        difference = sample(truth.student, noise, steps) - sample(truth.student, -noise, steps)
        assert torch.allclose(difference, 2 * slope * noise, rtol=1e-10)


def test_renoising_with_the_exact_map_stays_exact():
    """With fresh noise (β = 1) mean and std stay those of the data over six steps: |z| < 4."""
    truth = Gaussian(0.15)
    n = 40_000
    noise = torch.randn(n, 2, generator=gen())
    x = sample(truth.student, noise, 6, "renoise", beta=1.0, generator=gen(1))
    assert z_scores(x - truth.mean).abs().max() < 4
    z_of_std = (x.std(0) / 0.15 - 1) * math.sqrt(2 * n)  # the standard error of a std is s/√(2n)
    assert z_of_std.abs().max() < 4


@exact
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_renoising_mixes_the_same_noise_and_fresh_noise(beta):
    """Each step lands, and goes back up with (1−β)·x₁ + β·fresh: the formula written out (1e-12)."""
    net = mlp()
    noise = torch.randn(8, 2)
    generator = gen(1)
    x = noise
    for t, s in [(1.0, 0.5), (0.5, 0.0)]:
        landed = predict_x0(net, x, torch.full((8,), t))
        fresh = torch.randn(8, 2, generator=generator)
        x = (1 - s) * landed + s * ((1 - beta) * noise + beta * fresh)
    assert torch.allclose(sample(net, noise, 2, "renoise", beta=beta, generator=gen(1)), x, atol=1e-12)


# ═══ 3. Truth ═══════════════════════════════════════════════════════════════════════════════


# ═══ 4. Losses ══════════════════════════════════════════════════════════════════════════════


def losses_written_again(run, p, x0, x1, t, generator, label):
    """The four losses written down a second time, symbol by symbol, with every constant detached."""

    def f(net, x, t):
        return x - t[:, None] * net(x, t, label[: len(x)])

    def walk(x, now, end):
        count = {"euler": 1, "heun": 1, "heun-2": 2}[p.walk]
        step = (end - now) / count
        for _ in range(count):
            slope = run.teacher(x, now, label)
            if p.walk != "euler":
                ahead = x + step[:, None] * slope
                slope = (slope + run.teacher(ahead, now + step, label)) / 2
            x = x + step[:, None] * slope
            now = now + step
        return x.detach()

    def distance(a, b):
        if p.distance == "squared":
            return ((a - b) ** 2).mean()
        return (((a - b) ** 2 + 0.01**2).sqrt() - 0.01).mean()

    n = len(t)
    one = torch.ones(n)
    s = t - torch.rand(n, generator=generator) * t.clamp(max=p.delta)
    u = t + torch.rand(n, generator=generator) * (1 - t).clamp(max=p.delta)
    xt = (1 - t)[:, None] * x0 + t[:, None] * x1
    f_t = f(run.student, xt, t)

    target = f(run.target, walk(xt, t, s), s).detach()
    for i in range(n):
        if s[i] < p.tau:
            target[i] = x0[i]
    consistency = distance(f_t, target)

    f_u = f(run.target, walk(xt, t, u), u).detach()
    bi = distance(f_t, f_u)

    judged = max(1, round(p.judged * n))
    x0_hat = f(run.student, x1, one)[:judged]
    logits = run.critic(x0_hat, label[:judged])
    adv = -logits.mean() if p.adversarial == "hinge" else F.softplus(-logits).mean()

    x0_fixed = f(getattr(run, p.self_source), x1, one).detach()
    xt_hat = (1 - t)[:, None] * x0_fixed + t[:, None] * x1
    rest = f(run.student, xt_hat, t) - x0_fixed
    if p.self_form == "velocity":
        rest = rest / t[:, None]
    correction = (rest**2).mean()

    return {"consistency": consistency, "bi": bi, "adv": adv, "self": correction}, x0_hat


VARIANTS = {
    "plain": {},
    "huber": {"distance": "huber"},
    "velocity form": {"self_form": "velocity"},
    "ema source": {"self_source": "ema"},
    "frozen source, one row judged": {"self_source": "frozen", "judged": 0.01},
    "a quarter judged": {"judged": 0.25, "adversarial": "softplus"},
    "heun": {"walk": "heun", "tau": 0.0},
    "two heun steps": {"walk": "heun-2", "delta": 1.0},
}


@exact
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_their_gradients_equal_those_written_again(variant):
    """Values and the student's gradients agree with `losses_written_again` (rounding: 1e-9), loss by loss."""
    p = phase(**ALL_FOUR, **VARIANTS[variant])
    run = networks()
    x0, x1, t, label = draw(32)
    ours, judged = distill_losses(run, x0, x1, t, p, p.weights(0), gen(5), label)
    theirs, judged_too = losses_written_again(run, p, x0, x1, t, gen(5), label)
    assert ours.keys() == theirs.keys()
    assert torch.allclose(judged, judged_too, rtol=1e-9)
    weights = list(run.student.parameters())
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-9), name
        our_grads = torch.autograd.grad(ours[name], weights, retain_graph=True)
        their_grads = torch.autograd.grad(theirs[name], weights, retain_graph=True)
        for a, b in zip(our_grads, their_grads):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("source", ["student", "ema", "frozen"])
def test_only_student_and_critic_get_gradients(source):
    """Teacher, target, average and frozen copy could learn here, and nothing reaches them."""
    run = networks()
    losses = losses_of(run, phase(**ALL_FOUR, self_source=source), *draw(16))
    sum(losses.values()).backward()
    for name in COPIES:
        for weight in getattr(run, name).parameters():
            assert weight.grad is None
    assert any(weight.grad is not None for weight in run.student.parameters())


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_self_correction_sends_no_gradient_through_its_sample(slope):
    """A weight that acts on x̂₀ alone gets none. At slope 0 the target is its only way, at 1 also x̂_t."""
    shift = nn.Parameter(torch.zeros(2))

    def student(x, t, cond):
        at_one = (t == 1)[:, None]  # x̂₀ is evaluated there, and x̂_t at t = ½
        return slope * x - shift * at_one

    losses = losses_of(SimpleNamespace(student=student), phase(lambda_self=1.0), *draw(16, t=0.5))
    (grad,) = torch.autograd.grad(losses["self"] + 0 * shift.sum(), shift)
    assert grad.abs().max() == 0


@exact
@pytest.mark.parametrize("name", ["consistency", "bi"])
def test_the_residual_of_the_exact_map_falls_by_four_when_the_window_halves(name):
    """One Euler step of the teacher misses its own path by O(δ²). The ratio is 4 within 10% at δ = 0.02."""
    truth = Gaussian(0.4)
    run = SimpleNamespace(teacher=truth.velocity, student=truth.student, target=truth.student)
    residual = {}
    for delta in (0.02, 0.01):
        p = phase(**{f"lambda_{name}": 1.0}, delta=delta, tau=0.0)
        losses = losses_of(run, p, *draw(1000, t=0.6))
        residual[delta] = losses[name].sqrt()
    assert residual[0.02] / residual[0.01] == pytest.approx(4, rel=0.1)


def one_step_spread(truth, walk, delta, cells=10):
    """a(1) of the map that consistency training converges to, for the exact teacher; see the test below.

    The times lie on a grid with `cells` cells to a window. The mean over s is a trapezoid sum.
    """
    cell = delta / cells
    total = round(1 / cell)
    grid = torch.linspace(0, 1, total + 1)
    a = torch.ones(total + 1)
    for i in range(1, total + 1):
        n = min(i, cells)  # cells in the window below t
        s = grid[i - n : i + 1]
        t = grid[i].expand(n + 1)

        # One step from t to s multiplies the distance to the mean path (1−t)·m by g(t,s).
        beside = torch.ones(n + 1, 2)
        start = (1 - t)[:, None] * truth.mean + beside
        end = scflow.follow(truth.velocity, start, t, s, walk) - (1 - s)[:, None] * truth.mean
        g = end[:, 0]

        # A trapezoid counts both ends by half. The upper end is a(t) itself, as g(t,t) = 1: solve for it.
        terms = a[i - n : i] * g[:n]
        below = terms.sum() - terms[0] / 2
        a[i] = below / (n - 1 / 2)
    return a[total]


@exact
@pytest.mark.parametrize("walk, order", [("euler", 1), ("heun", 2), ("heun-2", 2)])
@pytest.mark.parametrize("std", [0.15, 1.7])
def test_a_perfect_consistency_student_has_the_error_of_the_teachers_steps(walk, order, std):
    """With the exact velocity and an ideal network, one student step still has the solver's error, in its order.

    For one Gaussian all is linear. The teacher's step from t to s multiplies the distance from the mean path
    by a number g(t,s). The student's map multiplies it by a number a(t), with a(0) = 1. Training comes to rest
    when a(t) is the mean of its own targets: a(t) = mean of a(s)·g(t,s) over s ~ t − U(0, min(t,δ)). From
    t = 0 upwards this has one solution. Each window adds an error of size δ^(order+1), and 1/δ windows lie
    between t = 0 and t = 1. So the error of a(1), which should be the std of the data, is of size δ^order:
    half the window halves it for Euler steps, and divides it by four for Heun steps. (5%: higher orders
    leave 2.5%, the grid 0.5%.)
    """
    truth = Gaussian(std)
    wide = one_step_spread(truth, walk, delta=0.02) - std
    narrow = one_step_spread(truth, walk, delta=0.01) - std
    assert wide / narrow == pytest.approx(2**order, rel=0.05)


def test_truncation_makes_the_posterior_mean_the_optimum():
    """Where s < τ the squared loss is least at f = E[x₀|x_t], here for two points of data with odds 4 : 1.

    At the optimum the gradient has mean zero against any function h(x_t,t): |z| < 4. The odds are skewed,
    so that medians and midpoints fail: f moved by 0.05 gives |z| > 10.
    """
    n = 50_000
    generator = gen()
    right = torch.rand(n, 1, generator=generator) < 0.2
    x0 = 2.0 * right - 1  # −1 or +1
    x1 = torch.randn(n, 1, generator=generator)
    t = 0.05 + 0.95 * torch.rand(n, generator=generator)
    s = t - torch.rand(n, generator=generator) * t.clamp(max=0.3)
    xt = scflow.interpolate(x0, x1, t)

    # By Bayes the odds are 1/4·exp(2(1−t)x/t²), and the mean of ±1 at log-odds z is tanh(z/2).
    log_odds = 2 * (1 - t)[:, None] * xt / t[:, None] ** 2 - math.log(4)
    posterior_mean = (log_odds / 2).tanh()
    f_s = torch.full_like(xt, 7.0)
    h = torch.cat([torch.ones_like(xt), xt, xt.sin(), t[:, None]], 1)
    for shift in (0.0, 0.05):
        f_t = (posterior_mean + shift).requires_grad_()
        loss = scflow.truncated_consistency_loss(f_t, f_s, x0, s, 0.4, scflow.squared)
        (grad,) = torch.autograd.grad(loss, f_t)
        z = z_scores((grad * h)[s < 0.4]).abs().max()
        assert z < 4 if shift == 0 else z > 10


@exact
@pytest.mark.parametrize("t", [0.2, 0.9])
@pytest.mark.parametrize("std", [0.15, 1.7])
def test_self_correction_of_the_exact_map_is_its_closed_form(std, t):
    """It is not zero: s²·(((1−t)s+t)/σ_t − 1)² times the mean of x₁², or that over t² (1e-9: rounding)."""
    run = SimpleNamespace(student=Gaussian(std).student)
    x0, x1, times, _ = draw(200, t)
    sigma = math.sqrt(((1 - t) * std) ** 2 + t**2)
    closed_form = (std * (((1 - t) * std + t) / sigma - 1)) ** 2 * x1.square().mean()
    for form, expected in [("x0", closed_form), ("velocity", closed_form / t**2)]:
        losses = losses_of(run, phase(lambda_self=1.0, self_form=form), x0, x1, times)
        assert torch.allclose(losses["self"], expected, rtol=1e-9)


@pytest.mark.parametrize("gap", [0.5, 3.0])
def test_the_hinge_loss_of_the_best_critic_measures_total_variation(gap):
    """For N(0,1) and N(gap,1) it is 2(1 − TV) with TV = erf(gap/√8), within 4 standard errors."""
    n = 100_000
    data = torch.randn(n, generator=gen(0))
    samples = torch.randn(n, generator=gen(1)) + gap
    real = (gap / 2 - data).sign()  # +1 where the data are denser
    fake = (gap / 2 - samples).sign()
    tv = math.erf(gap / math.sqrt(8))
    standard_error = 2 * math.sqrt((1 - tv**2) / 2 / n)  # of two means of numbers that are 0 or 2
    assert abs(scflow.critic_loss(real, fake) - 2 * (1 - tv)) < 4 * standard_error


def test_r1_is_half_the_mean_squared_slope():
    """For D(x) = a/2·‖x‖² it is a²/2·E‖x₀‖², and its derivative by a is a·E‖x₀‖² (1e-5: float32)."""
    a = torch.tensor(3.0, requires_grad=True)

    def critic(x, cond):
        return a / 2 * x.square().sum(1)

    x0, *_ = draw(64)
    norm = x0.square().sum(1).mean()
    r1 = scflow.r1_penalty(critic, x0)
    (slope,) = torch.autograd.grad(r1, a)
    assert torch.allclose(r1, 9 / 2 * norm, rtol=1e-5)
    assert torch.allclose(slope, 3 * norm, rtol=1e-5)


NEEDS = {
    "consistency": {"teacher", "target", "student"},
    "bi": {"teacher", "target", "student"},
    "adv": {"critic", "student"},
    "self": {"student"},
}


@pytest.mark.parametrize("source", ["student", "ema", "frozen"])
def test_a_network_that_no_loss_needs_is_not_touched(source):
    """For every choice of losses the networks that are called are those that these losses need."""

    def watch(name, net):
        def note(*_):
            called.add(name)

        net.register_forward_hook(note)

    run = networks()
    called = set()
    for name, net in vars(run).items():
        watch(name, net)
    p = phase(**ALL_FOUR, self_source=source)
    x0, x1, t, label = draw(8)
    for count in range(5):
        for chosen in itertools.combinations(NEEDS, count):
            called.clear()
            lambdas = {name: float(name in chosen) for name in NEEDS}
            losses, _ = distill_losses(run, x0, x1, t, p, lambdas, gen(), label)
            needed = {source} if "self" in chosen else set()
            for name in chosen:
                needed.update(NEEDS[name])
            assert losses.keys() == set(chosen)
            assert called == needed


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("form", ["x0", "velocity"])
def test_a_single_row_at_the_ends_of_time(t, form):
    """At t = 0 and t = 1 a batch of one has finite losses and gradients, that of huber's root included."""
    run = networks()
    p = phase(**ALL_FOUR, distance="huber", self_form=form, walk="heun")
    losses = losses_of(run, p, *draw(1, t))
    sum(losses.values()).backward()
    for weight in run.student.parameters():
        assert weight.grad.isfinite().all()


# ═══ 5. Training ════════════════════════════════════════════════════════════════════════════

FIRST = phase(**ALL_FOUR, steps=3)
SECOND = phase(lambda_self=1.0, lambda_adv=0.1, steps=3, self_source="frozen", pinned=0.25, judged=0.5)
TWO_PHASES = (FIRST, SECOND)
SHORT = TeacherSettings(teacher_steps=5, teacher_batch=32, teacher_lr=1e-2)


def student_loop(schedule=TWO_PHASES, seed=0, critic_seed=9, **options):
    """A distillation of small conditional networks; the same arguments give the same run."""
    critic = point_critic(critic_seed, LABEL)
    return distill(mlp(2, LABEL), critic, labelled, gen(seed), schedule, **options)


@pytest.mark.parametrize(
    "name, value",
    [("steps", 0), ("batch", 1.5), ("lr", math.nan), ("lambda_self", -0.1), ("delta", 0.0), ("tau", 2.0)]
    + [("judged", 0.0), ("warmup", 6), ("walk", "heun-0"), ("walk", "rk4"), ("self_source", "teacher")],
)
def test_a_phase_refuses_bad_values(name, value):
    """A ValueError of one line names the setting."""
    settings = dict(ALL_FOUR)
    settings[name] = value
    refused(phase, **settings, match=name)


def test_a_schedule_that_contradicts_itself_is_refused():
    """No phase, nothing to learn, a critic's penalty without a critic, a frozen copy of no phase before."""
    refused(phase, match="zero")
    refused(phase, lambda_self=1.0, r1=1.0, match="r1")
    refused(TeacherSettings, teacher_batch=0, match="teacher_batch")
    refused(next, student_loop(schedule=()), match="phase")
    refused(next, student_loop(schedule=(SECOND,)), match="frozen")


def test_rescaling_keeps_the_proportions():
    """Every phase keeps its share of the updates, and at least one."""
    schedule = (replace(FIRST, steps=300), replace(SECOND, steps=100))
    assert [p.steps for p in scflow.rescale(schedule, 40)] == [30, 10]
    assert [p.steps for p in scflow.rescale(schedule, 1)] == [1, 1]


def adamw_by_hand(net, betas=(0.9, 0.999)):
    return torch.optim.AdamW(net.parameters(), betas=betas, weight_decay=0.0)


LOOPS = {
    "hinge": {},
    "softplus and R1": {"adversarial": "softplus", "r1": 0.5, "judged": 0.5},
    "pinned and judged": {"pinned": 0.25, "judged": 0.5},
    "heun, warm-up, constant rate": {"walk": "heun", "warmup": 1, "lr_fall": "none"},
}


@exact
@pytest.mark.parametrize("name", LOOPS)
def test_distillation_equals_a_hand_written_loop(name):
    """Three updates of one phase and two of the next: five networks agree with a plain loop (1e-8: rounding)."""
    first = phase(**ALL_FOUR, steps=3, ema=0.03, **LOOPS[name])  # the average meets its cap in the third update
    second = phase(lambda_self=1.0, lambda_adv=0.5, steps=2, lr_critic=2e-2, self_source="frozen", **LOOPS[name])
    run = take(student_loop((first, second), seed=5))

    hand = networks()
    for network in ("student", *COPIES):
        setattr(hand, network, mlp(2, LABEL))
    opt = adamw_by_hand(hand.student)
    opt_critic = adamw_by_hand(hand.critic, betas=(0.5, 0.99))
    generator = gen(5)
    for step in range(5):
        p = first if step < 3 else second
        i = step if step < 3 else step - 3
        if step == 3:  # all networks start from the average, and Adam afresh
            hand.student = copy.deepcopy(hand.ema)
            hand.target = copy.deepcopy(hand.ema)
            hand.frozen = copy.deepcopy(hand.ema)
            opt = adamw_by_hand(hand.student)
        fall = 1 if p.lr_fall == "none" else (1 + math.cos(math.pi * i / p.steps)) / 2
        opt.param_groups[0]["lr"] = p.lr * (i + 1) / 50 * fall
        opt_critic.param_groups[0]["lr"] = p.lr_critic
        x0, label = labelled(p.batch, generator)
        x1 = torch.randn(x0.shape, generator=generator)
        t = torch.rand(p.batch, generator=generator)
        t[: round(p.pinned * p.batch)] = 1

        losses, x0_hat = losses_written_again(hand, p, x0, x1, t, generator, label)
        total = p.lambda_consistency * losses["consistency"] + p.lambda_adv * losses["adv"]
        if i >= p.warmup:
            total = total + p.lambda_self * losses["self"] + p.lambda_bi * losses["bi"]
        opt.zero_grad()
        total.backward()
        opt.step()
        with torch.no_grad():
            for average, decay in [(hand.target, 0.9), (hand.ema, scflow.growing(step, p.ema))]:
                for a, b in zip(average.parameters(), hand.student.parameters()):
                    a.copy_(decay * a + (1 - decay) * b)

        n = len(x0_hat)
        x0 = x0[:n].requires_grad_()
        real = hand.critic(x0, label[:n])
        fake = hand.critic(x0_hat.detach(), label[:n])
        if p.adversarial == "hinge":
            loss = (1 - real).relu().mean() + (1 + fake).relu().mean()
        else:
            loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        (slope,) = torch.autograd.grad(real.sum(), x0, create_graph=True)
        loss = loss + p.r1 / 2 * slope.square().sum(1).mean()
        opt_critic.zero_grad()
        loss.backward()
        opt_critic.step()

    for network in ("student", "target", "ema", "frozen", "critic"):
        assert close(getattr(run, network), getattr(hand, network), 1e-8), network


def test_each_optimiser_moves_only_its_own_network():
    """Between the start and the end of an optimiser's step no bit of any other network changes."""
    loop = student_loop()
    run = next(loop)
    names = ("student", "critic", *COPIES)
    before = {}
    moved = []

    def remember(*_):
        for name in names:
            before[name] = weights_of(getattr(run, name))

    def compare(*_):
        changed = [name for name in names if not same(before[name], getattr(run, name).state_dict())]
        moved.append(changed)

    for opt in (run.opt, run.opt_critic):
        opt.register_step_pre_hook(remember)
        opt.register_step_post_hook(compare)
    next(loop)
    assert moved == [["student"], ["critic"]]


def test_the_teacher_is_a_frozen_copy():
    """No update changes a bit of the teacher or of the network passed in; copies ask for no gradient."""
    teacher = mlp(2, LABEL)
    start = weights_of(teacher)
    run = take(distill(teacher, point_critic(9, LABEL), labelled, gen(), TWO_PHASES))
    assert run.teacher is not teacher
    assert same(run.teacher.state_dict(), start)
    assert same(teacher.state_dict(), start)
    assert not same(run.student.state_dict(), start)
    for name in COPIES:
        assert not any(weight.requires_grad for weight in getattr(run, name).parameters())


def two_with_buffers():
    """Two networks of different weights, float buffers and a counter."""
    old = scramble(nn.BatchNorm1d(4), 1)
    new = scramble(nn.BatchNorm1d(4), 2)
    new(torch.randn(5, 4))  # moves its buffers
    return old, new


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_an_average_of_weights_and_buffers(decay):
    """decay·average + (1−decay)·net (1e-6); bitwise the network at 0, untouched at 1; counters are copied."""
    average, net = two_with_buffers()
    old = weights_of(average)
    new = weights_of(net)
    scflow.ema_update(average, net, decay)
    assert same(net.state_dict(), new)
    if decay == 0:
        assert same(average.state_dict(), new)
    if decay == 1:
        assert same(average.state_dict(), old)
        return
    for name, value in average.state_dict().items():
        expected = decay * old[name] + (1 - decay) * new[name]
        if not value.is_floating_point():
            expected = new[name]
        assert torch.allclose(value, expected, atol=1e-6), name


def test_the_decay_of_the_sampling_average_grows():
    """It is 0 at first, so that the start is forgotten, and never above its cap."""
    decays = [scflow.growing(step, 0.99) for step in (0, 10, 100, 1000, 100_000)]
    assert decays == sorted(decays)
    assert decays[0] == 0 < decays[1]
    assert decays[-1] == 0.99


def test_the_learning_rate_rises_along_a_line_and_falls_along_a_cosine():
    """1/50 in the first update, half at mid-way, next to nothing in the last (closed form, 1e-12)."""
    assert scflow.lr_factor(0, 1000) == pytest.approx(1 / 50, rel=1e-12)
    assert scflow.lr_factor(500, 1000) == pytest.approx(1 / 2, rel=1e-12)
    assert scflow.lr_factor(999, 1000) < 1e-5


def exact_teacher(x, t, cond=None):
    return Gaussian(0.4).velocity(x, t)


@pytest.mark.parametrize("teacher", [exact_teacher, scflow.guided(mlp(4, LABEL), 2.0)])
def test_a_teacher_without_weights_needs_a_student(teacher):
    """A formula or a guided velocity cannot start a student: refused, until `student=` is given."""
    student = mlp(3, LABEL)
    start = weights_of(student)
    arguments = (teacher, point_critic(9, LABEL), labelled, gen(), TWO_PHASES)
    refused(next, distill(*arguments), match="student=")
    run = take(distill(*arguments, student=student))
    assert run.teacher is teacher
    assert same(student.state_dict(), start)
    assert not same(run.student.state_dict(), start)


@exact
@pytest.mark.parametrize("oracle, times", [(None, "uniform"), (None, "logit-normal"), (exact_teacher, "uniform")])
def test_the_teachers_training_equals_a_hand_written_loop(oracle, times):
    """Five updates regress on x₁ − x₀, or on the oracle, with some conditions dropped and the gradient clipped."""
    settings = replace(SHORT, teacher_drop=0.25, teacher_times=times, teacher_rise=3, teacher_clip=0.5)
    run = take(train_teacher(mlp(2, LABEL), labelled, gen(3), settings, oracle))
    net = mlp(2, LABEL)
    average = mlp(2, LABEL)
    opt = adamw_by_hand(net)
    generator = gen(3)
    for i in range(5):
        opt.param_groups[0]["lr"] = 1e-2 * min(1, (i + 1) / 3) * (1 + math.cos(math.pi * i / 5)) / 2
        x0, label = labelled(32, generator)
        x1 = torch.randn(32, 2, generator=generator)
        t = torch.rand(32, generator=generator)
        if times == "logit-normal":
            t = torch.sigmoid(2**0.5 * torch.erfinv(2 * t - 1))
        xt = (1 - t)[:, None] * x0 + t[:, None] * x1
        kept = torch.rand(32, 1, generator=generator) >= 0.25
        target = x1 - x0 if oracle is None else oracle(xt, t)
        loss = (net(xt, t, label * kept) - target).square().mean()
        opt.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        assert norm > 0.5
        for p in net.parameters():
            p.grad *= 0.5 / norm
        opt.step()
        scflow.ema_update(average, net, scflow.growing(i, 0.9999))
    assert close(run.net, net, 1e-7)  # torch adds a millionth to the norm, which AdamW hardly feels
    assert close(run.ema, average, 1e-7)


def test_dropping_takes_whole_conditions():
    """The share of rows becomes zero (binomial: |z| < 4); the others keep every word."""
    cond = torch.randint(1, 6, (4000, 3), generator=gen())
    dropped = scflow.drop(cond, 0.2, gen(1))
    gone = (dropped == 0).all(1)
    assert torch.equal(dropped[~gone], cond[~gone])
    assert abs(gone.float().mean() - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5


def spoiled(good):
    """A batch function whose rows are not numbers after so many good calls."""
    calls = itertools.count()

    def sometimes(n, generator):
        x0, cond = batch(n, generator)
        if next(calls) >= good:
            x0 = x0 * math.nan
        return x0, cond

    return sometimes


@pytest.mark.parametrize("loss", ["flow", "consistency", "critic"])
def test_a_loss_that_is_not_finite_stops_the_run(loss):
    """Bad rows in the third update: the error names the loss and step 3, and no weight is spoiled."""
    rows = spoiled(good=2)
    loops = {
        "flow": train_teacher(mlp(), rows, gen(), SHORT),
        "consistency": distill(mlp(), point_critic(), rows, gen(), (phase(lambda_consistency=1.0),)),
        "critic": distill(mlp(), point_critic(), rows, gen(), (phase(lambda_adv=1.0),)),
    }
    loop = loops[loss]
    run = next(loop)
    with pytest.raises(FloatingPointError, match=f"{loss} loss .*step 3"):
        take(loop)
    assert run.step == 2
    run.state_dict()  # it would refuse spoiled weights


class HostReads(TorchDispatchMode):
    """Counts how often a number of a tensor is asked for, for which a GPU would have to finish its work."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["paper", "two_phase"])
def test_an_update_waits_for_no_number(name, monkeypatch):
    """Losses are looked at by `check_finite` alone, on a GPU at every fiftieth update. Left out, nothing is read."""
    schedule = scflow.rescale(scflow.SCHEDULES[name], 6)
    if name == "paper":
        schedule = (replace(schedule[0], adversarial="softplus", r1=1.0),)
    loop = distill(mlp(), point_critic(), batch, gen(), schedule)
    with HostReads() as reads:
        take(loop, 1)
    assert reads.count > 0
    monkeypatch.setattr(scflow.Run, "check_finite", lambda run: None)
    with HostReads() as reads:
        take(loop)
    assert reads.count == 0


def test_weights_that_are_not_finite_are_never_saved():
    """`state_dict` names the network."""
    run = next(student_loop())
    next(run.ema.parameters()).data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="ema"):
        run.state_dict()


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_distillation_resumes_bit_for_bit(stop, tmp_path):
    """Stopped in a phase or between two, saved, read, and taken up afresh, a run ends as if never stopped."""
    whole = take(student_loop())
    run = take(student_loop(), stop)
    scflow.save(tmp_path / "run.pt", run.ema, state=run.state_dict())
    saved = scflow.read(tmp_path / "run.pt")["state"]
    fresh = student_loop(seed=99, critic_seed=77, student=mlp(55, LABEL), resume=saved)
    assert same(take(fresh).state_dict(), whole.state_dict())


def test_the_teacher_resumes_bit_for_bit():
    """The same for the teacher's network, average, optimiser and random numbers."""
    loop = train_teacher(mlp(2), batch, gen(), SHORT)
    saved = copy.deepcopy(take(loop, 3).state_dict())
    whole = take(loop)
    resumed = take(train_teacher(mlp(55), batch, gen(99), SHORT, resume=saved))
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(resumed.ema.state_dict(), whole.ema.state_dict())


def test_a_state_that_does_not_fit_is_refused():
    """Another kind of run, another architecture, or a GPU's random numbers (16 bytes): one line."""
    run = next(student_loop())
    teacher = next(train_teacher(mlp(), batch, gen(), SHORT))
    wider = next(train_teacher(MLP(), batch, gen(), SHORT))
    refused(run.load_state_dict, teacher.state_dict(), match="another kind")
    refused(teacher.load_state_dict, run.state_dict(), match="another kind")
    refused(teacher.load_state_dict, wider.state_dict(), match="another architecture")
    state = run.state_dict()
    state["generator"] = torch.zeros(16, dtype=torch.uint8)
    refused(run.load_state_dict, state, match="another device")


def test_one_student_step_beats_one_teacher_step_twentyfold():
    """Energy distance to eight Gaussians after 400 updates, one seed. (Measured: 190 times.)"""
    ring = toy_2d.batches(toy_2d.dataset("8gaussians"))
    distance = toy_2d.reference("8gaussians", 2000)
    generator = gen(100)
    settings = TeacherSettings(teacher_steps=400, teacher_batch=256)
    teacher = take(train_teacher(MLP(width=64), ring, generator, settings)).ema
    schedule = (Phase(steps=400, batch=256, tau=0.0, delta=0.2, walk="heun", lambda_self=0.0, lambda_bi=0.0),)
    student = take(distill(teacher, PointCritic(), ring, generator, schedule)).ema
    noise = torch.randn(2000, 2, generator=generator)
    one_teacher_step = distance(sample(teacher, noise))
    one_student_step = distance(sample(student, noise))
    assert one_teacher_step > 20 * one_student_step


# ═══ 6. Networks ════════════════════════════════════════════════════════════════════════════


def plain_dit(net, x, t, cond):
    """The DiT of one latent (C,H,W) again, with loops and explicit attention: only the weights are shared."""
    w = net.state_dict()
    p = net.patch
    dim = net.arch["dim"]
    heads = net.arch["heads"]
    channels, height, width = x.shape

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h, shift, scale):
        return F.layer_norm(h, (dim,), eps=1e-6) * (1 + scale) + shift

    def attention(name, h):
        query, key, value = linear(f"{name}.qkv", h).split(dim, 1)
        size = dim // heads
        parts = []
        for k in range(heads):
            part = slice(k * size, (k + 1) * size)
            scores = query[:, part] @ key[:, part].T / size**0.5
            parts.append(scores.softmax(1) @ value[:, part])
        return linear(f"{name}.proj", torch.cat(parts, 1))

    tokens = []
    corners = list(itertools.product(range(0, height, p), range(0, width, p)))
    freqs = 10_000 ** (-4 * torch.arange(dim // 4) / dim)
    for i, j in corners:
        patch = x[:, i : i + p, j : j + p].permute(1, 2, 0).flatten()
        angle = torch.cat([i / p * freqs, j / p * freqs])
        position = torch.cat([angle.sin(), angle.cos()])
        tokens.append(linear("embed", patch) + position)
    for place, word in enumerate(cond):
        row = word + place * net.words.words if word > 0 else 0
        tokens.append(w["words.table.weight"][row])
    h = torch.stack(tokens)

    angle = 1000 * t * 10_000 ** (-torch.arange(128) / 128)
    wave = torch.cat([angle.cos(), angle.sin()])
    c = F.silu(linear("time.2", F.silu(linear("time.0", wave))))
    for k in range(net.arch["depth"]):
        name = f"blocks.{k}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.modulation", c).split(dim)
        h = h + gate1 * attention(name, norm(h, shift1, scale1))
        inner = linear(f"{name}.mlp.0", norm(h, shift2, scale2))
        h = h + gate2 * linear(f"{name}.mlp.2", F.gelu(inner, approximate="tanh"))
    shift, scale = linear("modulation", c).split(dim)
    patches = linear("head", norm(h, shift, scale))

    out = torch.zeros_like(x)
    for patch, (i, j) in zip(patches, corners):
        out[:, i : i + p, j : j + p] = patch.reshape(p, p, channels).permute(2, 0, 1)
    variance = (1 - t) ** 2 + t**2
    return (2 * t - 1) / variance * x + out / variance**0.5


@exact
@pytest.mark.parametrize("shape, patch", [(LATENT, 2), ((1, 8, 4), 4)])
def test_the_dit_equals_a_plain_implementation(shape, patch):
    """The same output as `plain_dit` to 1e-10, with every layer that starts at zero redrawn."""
    net = scramble(DiT(shape, patch, dim=16, depth=2, heads=2, tokens=SENTENCE))
    x = torch.randn(3, *shape)
    t = torch.tensor([0.0, 0.37, 1.0])
    cond = torch.tensor([[1, 2, 5], [3, 0, 0], [0, 0, 0]])
    v = net(x, t, cond)
    for b in range(3):
        plain = plain_dit(net, x[b], t[b], cond[b])
        assert plain.std() > 0.1
        assert torch.allclose(v[b], plain, atol=1e-10)


@exact
def test_the_dit_starts_as_the_velocity_of_normal_latents_with_closed_gates():
    """At first the output is the exact velocity where the data are N(0,I), and every block returns its tokens."""
    net = DiT(LATENT, patch=2, dim=16, depth=3, heads=2)
    x = torch.randn(3, *LATENT)
    t = torch.tensor([0.0, 0.4, 1.0])
    normal = GaussianMixture(torch.zeros(1, x[0].numel()), 1.0)
    assert torch.allclose(net(x, t).flatten(1), normal(x.flatten(1), t), atol=1e-12)
    tokens = torch.randn(3, 6, 16)
    for block in net.blocks:
        assert torch.equal(block(tokens, torch.randn(3, 16)), tokens)


def test_sizes_that_do_not_divide_are_refused():
    """Latents, tokens, and the sizes of a DiT and of a critic."""
    refused(scflow.patchify, torch.randn(1, 2, 5, 4), 2)
    refused(scflow.unpatchify, torch.randn(1, 6, 8), 2, 4, 4)
    refused(DiT, (1, 6, 5))
    refused(DiT, LATENT, heads=5)
    refused(LatentCritic, LATENT, width=12)
    refused(dit(), torch.randn(1, 2, 4, 4), torch.rand(1))


@pytest.mark.parametrize("shape", [(2,), LATENT, (3, 6, 11)])
def test_a_critic_judges_every_row_alone(shape):
    """One logit a row, the same without the other rows, odd sides included (1e-5: float32 sums)."""
    critic = point_critic() if shape == (2,) else LatentCritic(shape, width=8)
    x = torch.randn(6, *shape)
    alone = torch.cat([critic(row[None]) for row in x])
    assert critic(x).shape == (6,)
    assert critic(x).std() > 1e-4
    assert torch.allclose(critic(x), alone, atol=1e-5)


def test_perceptrons_take_points_of_any_shape(tmp_path):
    """Latents are points whose numbers stand in another order: the same velocities and logits, bitwise."""
    x = torch.randn(5, *LATENT)
    t = torch.rand(5)
    net = scramble(MLP(LATENT, width=16, depth=2))
    flat = MLP(math.prod(LATENT), width=16, depth=2)
    flat.load_state_dict(net.state_dict())
    assert net(x, t).shape == x.shape
    assert torch.equal(net(x, t).flatten(1), flat(x.flatten(1), t))
    scflow.save(tmp_path / "net.pt", net)
    assert torch.equal(scflow.load(tmp_path / "net.pt")(x, t), net(x, t))

    critic = scramble(PointCritic(math.prod(LATENT), width=16, depth=2))
    assert torch.equal(critic(x), critic(x.flatten(1)))


EVERY_NETWORK = [(mlp, (2,)), (dit, LATENT), (point_critic, (2,)), (latent_critic, LATENT)]
every_network = pytest.mark.parametrize("make, shape", EVERY_NETWORK)


def caller(net, shape, rows=5):
    """A velocity or a critic as a function of the condition alone, at fixed points and times."""
    x = torch.randn(rows, *shape, generator=gen())
    t = torch.rand(rows, generator=gen(1))
    if isinstance(net, (PointCritic, LatentCritic)):
        return lambda cond: net(x, cond)
    return lambda cond: net(x, t, cond)


@every_network
def test_the_order_and_every_word_of_a_condition_count(make, shape):
    """Another word, another order, a word fewer give other values. All zeros are no condition, bitwise."""
    call = caller(make(tokens=SENTENCE), shape)
    base = call(torch.tensor([[1, 2, 3]] * 5))
    for words in ([1, 2, 4], [2, 1, 3], [1, 2, 0], [0, 1, 2], [0, 0, 0]):
        other = call(torch.tensor([words] * 5))
        assert (other - base).abs().max() > 1e-3, words
    assert torch.equal(other, call(None))


@every_network
def test_a_condition_of_another_form_is_refused(make, shape):
    """Wrong shapes, unknown words, numbers that are not whole; and any at all by a network without words."""
    call = caller(make(tokens=SENTENCE), shape)
    for wrong in [(5, 2), (5, 4), (4, 3), (5,)]:
        refused(call, torch.ones(wrong, dtype=torch.int64))
    refused(call, torch.full((5, 3), 6))
    refused(call, torch.full((5, 3), -1))
    refused(call, torch.ones(5, 3))
    refused(caller(make(), shape), torch.ones(5, 3, dtype=torch.int64), match="unconditional")


@pytest.mark.parametrize("make", [dit, latent_critic])
def test_bfloat16_is_only_inside_the_pass(make):
    """Layers compute in bfloat16 (8 bits: output within 5%); weights, gradients and output stay float32."""
    net = make()
    call = caller(net, LATENT)
    full = call(None)
    net.precision = torch.bfloat16
    inner = set()
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(lambda layer, args, out: inner.add(out.dtype))
    low = call(None)
    low.square().mean().backward()
    assert inner == {torch.bfloat16}
    assert low.dtype == torch.float32
    assert 1e-4 < (low - full).norm() / full.norm() < 0.05
    for weight in net.parameters():
        assert weight.dtype == weight.grad.dtype == torch.float32


# ═══ 7. Guidance ════════════════════════════════════════════════════════════════════════════


def test_guidance_goes_beyond_the_condition():
    """v + w·(v_c − v): the velocity without a condition at w = 0, with it at w = 1, further at 2.5 (1e-6)."""
    net = mlp(1, LABEL)
    x0, _, t, label = draw(4)
    v_cond = net(x0, t, label)
    v_free = net(x0, t)
    assert (v_cond - v_free).abs().min() > 1e-3
    for w in (0.0, 1.0, 2.5):
        v = scflow.guided(net, w)(x0, t, label)
        assert torch.allclose(v, v_free + w * (v_cond - v_free), atol=1e-6)


def test_guidance_without_a_condition_is_refused():
    """One line, also with a condition for some rows only."""
    x0, _, t, label = draw(4)
    guided = scflow.guided(mlp(1, LABEL), 2.0)
    refused(guided, x0, t)
    refused(guided, x0, t, label[:3])


# ═══ 8. Weights files ═══════════════════════════════════════════════════════════════════════


@every_network
def test_a_saved_network_comes_back(make, shape, tmp_path):
    """The file alone is enough: the same weights bitwise, frozen, and what was saved beside them."""
    path = tmp_path / "net.pt"
    net = make(tokens=SENTENCE)
    scflow.save(path, net, note={"seed": 3})
    back = scflow.load(path)
    cond = torch.tensor([[1, 2, 3]] * 5)
    assert torch.equal(caller(back, shape)(cond), caller(net, shape)(cond))
    assert same(back.state_dict(), net.state_dict())
    assert not back.training
    assert not any(weight.requires_grad for weight in back.parameters())
    assert scflow.read(path)["note"] == {"seed": 3}


def test_a_compiled_network_is_saved_without_prefixes(tmp_path):
    """torch.compile wraps a network as `_orig_mod`; the file holds the plain names."""
    net = mlp()
    scflow.save(tmp_path / "net.pt", torch.compile(net))
    assert same(scflow.load(tmp_path / "net.pt").state_dict(), net.state_dict())


class Attack:
    """Code that would run when it is unpickled: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_does_not_run(tmp_path):
    """Neither as a plain pickle nor within a file of torch."""
    path = tmp_path / "net.pt"
    marker = tmp_path / "ran"
    path.write_bytes(pickle.dumps(Attack(marker)))
    refused(scflow.load, path)
    torch.save({"format": scflow.FORMAT, "arch": None, "weights": Attack(marker)}, path)
    refused(scflow.load, path)
    assert not marker.exists()


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    """Missing, a folder, cut anywhere, foreign bytes, other files of torch: one line each."""
    path = tmp_path / "net.pt"
    refused(scflow.load, path)
    refused(scflow.load, tmp_path)
    scflow.save(path, mlp())
    whole = path.read_bytes()
    cut = [whole[: int(share * len(whole))] for share in (0.0, 0.01, 0.5, 0.99)]
    for content in [*cut, b"hello\n", b"PK\x03\x04 no zip", b"\x80\x02."]:
        path.write_bytes(content)
        refused(scflow.load, path)
    for thing in ([1, 2], mlp().state_dict(), mlp(), {"format": "other"}, {"format": scflow.FORMAT}):
        torch.save(thing, path)
        refused(scflow.load, path)


def test_an_entry_that_is_missing_is_named(tmp_path):
    """Whoever needs more of a file than the weights says so when it is read."""
    path = tmp_path / "net.pt"
    scflow.save(path, mlp(), step=3)
    assert scflow.read(path, "step")["step"] == 3
    refused(scflow.read, path, "step", "log", match="net.pt.*'log'")


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    """A number of numpy is a Python object that `read` refuses: `save` does so before it touches the old file."""
    path = tmp_path / "net.pt"
    scflow.save(path, mlp())
    before = contents(tmp_path)
    refused(scflow.save, path, mlp(2), score=np.mean([1.0, 2.0]), match="net.pt is not written")
    assert contents(tmp_path) == before


def test_another_architecture_is_refused(tmp_path):
    """Other sizes, an unknown class, unknown settings or none: one line, not torch's list of keys."""
    path = tmp_path / "net.pt"
    net = mlp()
    scflow.save(path, net)
    refused(scflow.load, path, MLP(2, width=8, depth=2))
    refused(scflow.load, path, dit())
    for arch in (None, {"name": "Unknown"}, {**net.arch, "width": 8}, {**net.arch, "colour": 1}):
        net.arch = arch
        scflow.save(path, net)
        refused(scflow.load, path)


# ═══ toy_2d.py 1: exact truth ═══════════════════════════════════════════════════════════════

MEANS = [[-1.0, 0.5], [1.5, 0.0], [0.3, -1.8]]
SHARES = [0.6, 0.3, 0.1]


def skewed(labels=None):
    """Three Gaussians of unequal shares."""
    return GaussianMixture(MEANS, 0.3, SHARES, labels)


def on_paths(n):
    """x₀ of the skewed mixture, x₁, times and x_t."""
    generator = gen(3)
    x0, _ = skewed().sample(n, generator)
    x1 = torch.randn(n, 2, generator=generator)
    t = torch.rand(n, generator=generator)
    return x0, x1, t, scflow.interpolate(x0, x1, t)


@exact
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.95])
def test_the_velocity_is_the_score_of_the_density(t):
    """v* = −(x + t·∇log p_t)/(1−t) by autograd, where the data are and far from them (1e-10: rounding)."""
    x = 3 * torch.randn(300, 2)
    x.requires_grad_()
    times = torch.full((300,), t)
    (score,) = torch.autograd.grad(skewed().log_density(x, times).sum(), x)
    expected = -(x + t * score) / (1 - t)
    assert torch.allclose(skewed()(x, times), expected, rtol=1e-10, atol=1e-10)


@exact
@pytest.mark.parametrize(
    "std, weights", [(0.0, None), (-1.0, None), (1.0, [1.0]), (1.0, [2.0, -1.0]), (1.0, [0.0, 0.0])]
)
def test_a_mixture_that_is_none_is_refused(std, weights):
    """A width that is not positive; weights too few, negative or all zero."""
    refused(GaussianMixture, torch.zeros(2, 2), std, weights)


def test_the_density_is_that_of_torch_distributions():
    """log p_t is torch's own mixture with means (1−t)μ_k and variance (1−t)²s² + t², here in 3-D (rounding: 1e-12)."""
    means = torch.randn(4, 3)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    sigma = math.sqrt((0.7 * 0.5) ** 2 + 0.3**2)
    parts = torch.distributions.Normal(0.7 * means, sigma)
    parts = torch.distributions.Independent(parts, 1)
    which = torch.distributions.Categorical(weights)
    law = torch.distributions.MixtureSameFamily(which, parts)
    x = torch.randn(50, 3)
    found = GaussianMixture(means, 0.5, weights).log_density(x, torch.full((50,), 0.3))
    assert torch.allclose(found, law.log_prob(x), atol=1e-12)


def test_the_velocity_is_the_conditional_mean():
    """E[(x₁ − x₀ − v*)·h(x_t)] = 0 for seven h and two axes: all |z| < 4, which chance breaks once in a thousand.

    The velocity for equal shares fails by far.
    """
    x0, x1, t, xt = on_paths(100_000)
    a, b = xt.T
    one = torch.ones_like(a)
    tests = torch.stack([one, a, b, (3 * a).sin(), a * b, (a > 1).float(), t * b], 1)  # (n,7)
    for mixture, is_true in [(skewed(), True), (GaussianMixture(MEANS, 0.3), False)]:
        rest = x1 - x0 - mixture(xt, t)  # (n,2)
        products = rest[:, :, None] * tests[:, None]  # (n,2,7)
        z = z_scores(products).abs().max()
        assert z < 4 if is_true else z > 10


def test_samples_have_the_moments_of_the_mixture():
    """Shares, mean and second moments are within 4 standard errors; stratified, the shares are exact."""
    mixture = skewed()
    x0, k = mixture.sample(20_000, gen())
    mean = mixture.weights @ mixture.means
    second = mixture.weights @ mixture.means**2 + 0.3**2
    assert z_scores(F.one_hot(k, 3) - mixture.weights).abs().max() < 4
    assert z_scores(x0 - mean).abs().max() < 4
    assert z_scores(x0**2 - second).abs().max() < 4
    assert z_scores((x0 - mixture.means[k]).prod(1)).abs() < 4  # the axes of a component are independent

    x0, k = mixture.sample(20_000, gen(), stratified=True)
    assert k.bincount().tolist() == [12_000, 6_000, 2_000]
    assert z_scores(x0 - mixture.means[k]).abs().max() < 4


@exact
def test_a_label_leaves_the_mixture_of_its_components():
    """With a label, velocity and density are those of these components alone, but for their share (1e-12)."""
    mixture = skewed(labels=[1, 2, 1])
    _, _, t, xt = on_paths(100)
    for label, mine in [(1, [0, 2]), (2, [1])]:
        cond = torch.full((100, 1), label)
        alone = GaussianMixture(mixture.means[mine], 0.3, mixture.weights[mine])
        share = mixture.weights[mine].sum().log()
        assert torch.allclose(mixture(xt, t, cond), alone(xt, t), atol=1e-12)
        assert torch.allclose(mixture.log_density(xt, t, cond), share + alone.log_density(xt, t), atol=1e-12)

    no_label = torch.zeros(100, 1, dtype=torch.int64)
    assert torch.equal(mixture(xt, t, no_label), mixture(xt, t))
    assert type(mixture.label_count) is int  # a tensor would have to be fetched from the device at every call
    refused(mixture, xt, t, torch.full((100, 1), 3))
    refused(skewed(), xt, t, torch.ones(100, 1, dtype=torch.int64))


@exact
@pytest.mark.parametrize("std", [0.15, 1.7])
def test_the_flow_map_of_one_gaussian_is_its_closed_form(std):
    """From any (x,t), each row with its own t. 200 Heun steps are good to 1e-3 (at s = 0.15; measured 2e-4)."""
    truth = Gaussian(std)
    mixture = GaussianMixture(truth.mean[None], std)
    x = torch.randn(100, 2)
    t = torch.rand(100)
    assert torch.allclose(mixture.flow_map(x, t), truth.flow_map(x, t), atol=1e-3)


# ═══ toy_2d.py 2: data sets ═════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("name", toy_2d.DATASETS)
def test_data_sets_are_centred_and_of_common_size(name):
    """Of 20,000 points the mean is 0 within 0.06 (4 standard errors: 0.04), the RMS radius between 1.5 and 2.1."""
    x0, _ = toy_2d.dataset(name).sample(20_000, gen())
    assert x0.mean(0).norm() < 0.06
    assert 1.5 < x0.square().sum(1).mean().sqrt() < 2.1


@pytest.mark.parametrize("name", toy_2d.DATASETS)
def test_a_stratified_sample_is_of_the_same_law(name):
    """Every part has its share to one point; twenty plain samples are at no distance (4 standard errors)."""
    data = toy_2d.dataset(name)
    generator = gen()
    reference, part = data.sample(2000, generator, stratified=True)
    counts = part.bincount()
    assert counts.max() - counts.min() <= 1 and len(counts) > 1
    energy = EnergyDistance(reference, part)
    mean, sd = toy_2d.noise_floor(energy, lambda: data.sample(2000, generator)[0])
    assert abs(mean) < 4 * sd / math.sqrt(20) + 1e-3  # the one reference has an error of its own, below 1e-3


def save_points(path, points):
    np.save(path, points)
    return str(path)


def test_your_own_points_are_centred_scaled_and_split(tmp_path):
    """From any place and scale they get mean 0 and RMS radius 2 (1e-5: float32); a fifth is held out."""
    points = np.random.default_rng(0).normal(100, [30, 5], (505, 2))
    data = toy_2d.dataset(save_points(tmp_path / "mine.npy", points))
    everything = torch.cat([data.train, data.held_out])
    assert everything.mean(0).abs().max() < 1e-5
    assert abs(everything.square().sum(1).mean().sqrt() - 2) < 1e-5
    assert len(data.held_out) == 101 and len(data.train) == 404

    scale = everything.numpy().std(0) / points.std(0)
    assert abs(scale[0] / scale[1] - 1) < 1e-5  # both axes have one scale


def test_held_out_points_are_never_drawn_for_training(tmp_path):
    """5,000 draws from 400 points leave none of these out (e^{−12} each); a stratified sample is the held-out ones."""
    points = np.random.default_rng(0).normal(size=(500, 2))
    data = toy_2d.dataset(save_points(tmp_path / "mine.npy", points))
    drawn, _ = data.sample(5000, gen())
    assert same(drawn.unique(dim=0), data.train.unique(dim=0))
    held_out, _ = data.sample(5000, gen(), stratified=True)
    assert same(held_out, data.held_out)
    assert len(torch.cat([drawn, held_out]).unique(dim=0)) == 500


BAD_POINTS = {
    "three columns": (np.ones((200, 3)), "(N,2)"),
    "too few": (np.ones((99, 2)), "N ≥ 100"),
    "text": (np.full((200, 2), "a"), "real numbers"),
    "complex": (np.ones((200, 2)) * 1j, "complex"),
    "objects": (np.full((200, 2), None), "no .npy file of points"),
    "not finite": (np.full((200, 2), np.nan), "finite"),
    "one point": (np.full((200, 2), 7.1), "one point"),
}


@pytest.mark.parametrize("case", BAD_POINTS)
def test_bad_points_are_refused(case, tmp_path):
    """What is no cloud of points says so, and names its file."""
    points, words = BAD_POINTS[case]
    path = save_points(tmp_path / "bad.npy", points)
    refused(toy_2d.dataset, path, match=f"bad.npy.*{re.escape(words)}")


# ═══ toy_2d.py 3: measures ══════════════════════════════════════════════════════════════════


def mean_distance(pairs):
    lengths = [(a - b).norm().item() for a, b in pairs]
    return sum(lengths) / len(lengths)


@pytest.mark.parametrize("dim, error", [(2, 1e-3), (3, 1e-5)])
def test_the_energy_distance_by_brute_force(dim, error):
    """Pair by pair. In 2-D every length is known to 1e-3 of itself, in 3-D to float32."""
    x = torch.randn(5, dim)
    y = torch.randn(6, dim) + 1
    between = mean_distance(itertools.product(x, y))
    within_x = mean_distance(itertools.permutations(x, 2))
    within_y = mean_distance(itertools.permutations(y, 2))
    tolerance = error * (2 * between + within_x + within_y)
    assert abs(EnergyDistance(y)(x) - (2 * between - within_x - within_y)) < tolerance

    # Two strata of three rows: half of all independent pairs lie across them, a quarter inside each.
    strata = torch.tensor([0, 1, 0, 1, 1, 0])
    a, b = y[strata == 0], y[strata == 1]
    within_y = mean_distance(itertools.product(a, b)) / 2
    for part in (a, b):
        within_y += mean_distance(itertools.permutations(part, 2)) / 4
    assert abs(EnergyDistance(y, strata)(x) - (2 * between - within_x - within_y)) < tolerance


def test_a_stratum_of_one_row_is_refused():
    """It would have no pair."""
    refused(EnergyDistance, torch.randn(3, 2), torch.tensor([0, 0, 1]), match="two rows")


@pytest.mark.parametrize("modes", [3, 4, 5, 6, 8, 12, 16])
def test_symmetric_data_do_not_add_up_the_errors_of_projections(modes):
    """A ring of modes against itself pushed outwards: in the plane, by projections, as in space, by pairs.

    To 1%. For 30 lines, or 32, the errors of the pairs would add up to 7% and 13%.
    """
    angle = 2 * math.pi / modes * (torch.arange(1600) % modes)
    centres = torch.stack([2 * angle.cos(), 2 * angle.sin()], 1)
    x = centres + 0.03 * torch.randn(1600, 2, generator=gen(1))
    pushed = x + centres / 20
    in_plane = EnergyDistance(x)(pushed)
    x = F.pad(x, (0, 1))  # a third coordinate of 0
    pushed = F.pad(pushed, (0, 1))
    in_space = EnergyDistance(x)(pushed)
    assert abs(in_plane / in_space - 1) < 0.01


def test_the_energy_distance_is_unbiased():
    """Over 200 references and samples of one law its mean is 0 (|z| < 4), if the strata of the reference are told."""
    mixture = skewed()
    generator = gen()
    rows = []
    for _ in range(200):
        x, _ = mixture.sample(60, generator)
        y, _ = mixture.sample(60, generator)
        stratified, k = mixture.sample(60, generator, stratified=True)
        measures = (EnergyDistance(y), EnergyDistance(stratified, k), EnergyDistance(stratified))
        rows.append([energy(x) for energy in measures])
    plain, told, untold = z_scores(torch.tensor(rows))
    assert abs(plain) < 4 and abs(told) < 4
    assert untold < -6


def test_the_noise_floor_by_hand():
    """1, 2, …, 20 have the mean 10.5 and, over n − 1, the deviation √35."""
    counter = itertools.count(1)
    mean, sd = toy_2d.noise_floor(float, lambda: next(counter))
    assert mean == 10.5
    assert abs(sd - math.sqrt(35)) < 1e-12


class Asked:
    """Normal points that remember how many were asked for, and how."""

    def __init__(self):
        self.calls = []

    def sample(self, n, generator=None, stratified=False):
        self.calls.append((n, stratified))
        return torch.randn(n, 2, generator=generator), torch.zeros(n)


def test_the_floor_is_taken_at_the_size_of_the_sample(monkeypatch):
    """Twenty true samples of n points, against one stratified reference of n points; its error is a sample's own."""
    data = Asked()
    monkeypatch.setitem(toy_2d.DATASETS, "asked", lambda: data)
    floor = toy_2d.floor_of("asked", 60)
    assert sorted(data.calls) == [(60, False)] * 20 + [(60, True)]
    assert abs(floor["mean"]) < 4 * floor["sd"]


def test_coverage_and_precision_by_hand():
    """3σ is 1.5. Two of four points are nearer to a mode, one at each: 0.5 of a share of 0.7, and all 0.3."""
    mixture = GaussianMixture([[0.0, 0.0], [10.0, 0.0]], 0.5, [0.7, 0.3])
    x = torch.tensor([[1.4, 0.0], [0.0, 1.6], [10.0, 1.4], [5.0, 5.0]])
    coverage, precision = toy_2d.coverage_and_precision(x, mixture)
    assert abs(coverage - 0.8) < 1e-6 and precision == 0.5
    assert toy_2d.coverage_and_precision(x + 50, mixture) == (0, 0)


def test_the_sliced_distance_of_a_shift():
    """A shift Δ in d dimensions reads ‖Δ‖/√d (2% with 20,000 projections); the order of the rows is nothing."""
    x = torch.randn(50, 3)
    shifted = x + torch.tensor([3.0, 0.0, 4.0])
    found = toy_2d.sliced_w2(x, shifted[torch.randperm(50)], 20_000, gen())
    assert abs(found * math.sqrt(3) / 5 - 1) < 0.02
    refused(toy_2d.sliced_w2, x, x[:-1], match="equal size")


# ═══ toy_2d.py 4: settings and flags ════════════════════════════════════════════════════════


def test_a_flag_takes_one_value_or_one_for_each_phase():
    """One value goes to all phases, two go to the two; what is not named stays as it was."""
    before = scflow.SCHEDULES["two_phase"]
    _, _, schedule = toy_2d.configure("--delta 0.3 --lambda-self 0.2 0.7 --student-steps 30 20".split())
    assert [phase.delta for phase in schedule] == [0.3, 0.3]
    assert [phase.lambda_self for phase in schedule] == [0.2, 0.7]
    assert [phase.steps for phase in schedule] == [30, 20]
    assert [phase.lr for phase in schedule] == [phase.lr for phase in before]


@pytest.mark.parametrize("steps", [5, 230, 2300])
def test_one_number_of_steps_is_shared_out(steps):
    """In the proportions of the preset, rounded, and at least one step a phase."""
    before = scflow.SCHEDULES["two_phase"]
    total = sum(phase.steps for phase in before)
    _, _, schedule = toy_2d.configure(["--student-steps", str(steps)])
    for old, new in zip(before, schedule):
        assert abs(new.steps - old.steps * steps / total) <= 0.5 or new.steps == 1
    assert abs(sum(phase.steps for phase in schedule) - steps) <= 1


def test_settings_reach_their_own_class():
    """Run and teacher get what is theirs. A fit to the exact velocity is short, unless its length is given."""
    run, settings, _ = toy_2d.configure("--nfe 1 3 --gif --teacher-lr 0.5".split())
    assert list(run.nfe) == [1, 3] and run.gif and not run.overwrite
    assert settings == TeacherSettings(teacher_lr=0.5)
    for given, steps in [("", 1000), ("--teacher-steps 7", 7)]:
        _, settings, _ = toy_2d.configure(["--teacher", "exact", *given.split()])
        assert settings.teacher_steps == steps


# ═══ toy_2d.py 5: bad input ═════════════════════════════════════════════════════════════════

SHORT_RUN = "--teacher-steps 20 --student-steps 8 --samples 200 --width 16 --depth 2".split()
SILENT = [*SHORT_RUN, "--figures", "none", "--quiet"]


def toy(*argv):
    """Run a command in this process; returns its exit code."""
    return toy_2d.main([str(word) for word in argv])


def contents(folder):
    """{path: bytes} of everything in a folder."""
    found = {}
    for path in Path(folder).rglob("*"):
        found[path] = path.read_bytes() if path.is_file() else "a folder"
    return found


ERRORS = {
    "--dataset moon": "moon",
    "--dataset missing.npy": "missing.npy",
    "--dataset bad.npy": "bad.npy",
    "--teacher-steps 0": "teacher_steps",
    "--teacher-batch -1": "teacher_batch",
    "--teacher-drop 1": "teacher_drop",
    "--student-steps 0": "steps",
    "--student-steps -5 5": "steps",
    "--student-batch 0": "batch",
    "--student-lr nan": "lr",
    "--samples 0": "samples",
    "--width 0": "width",
    "--nfe 0": "nfe",
    "--nfe 1,two": "1,two",
    "--nfe 1000000000000000000000000": "too large",
    "--seed -1": "seed",
    "--seed one": "one",
    "--seed 4294967296": "too large",
    "--lamda-self 1": "--lamda-self",
    "--lambda-sel 1": "--lambda-sel",  # no abbreviations: a flag of tomorrow may share the beginning
    "--lambda-bi -1": "lambda_bi",
    "--lambda-self 0 1 2": "2 phases, not 3",
    "--delta 2": "delta",
    "--walk heun-0": "heun-0",
    "--preset papers": "papers",
    "--distance huber l1": "l1",
    "--device tpu9": "tpu9",
    "--teacher exact --dataset moons": "mixture",
    "--preset paper --self-source frozen": "first phase",
    "--preset consistency --r1 1": "r1",
    "--preset consistency --lambda-consistency 0": "weight zero",
    "--preset paper --student-steps 10 --warmup 10": "warmup",
    "--out .": "--overwrite",
    "--out . --overwrite": "no run of toy_2d.py",
    "--out bad.npy --overwrite": "no run of toy_2d.py",
    "--out foreign --overwrite": "'holiday'",
    "--out foreign": "--overwrite",
    "--out /dev/null/run": "cannot write",
    "moons": "moons",
    "plot --out nowhere": "nowhere",
    "plot --out foreign": "'holiday'",
    "plot --figures some": "some",
}


@pytest.mark.parametrize("command", ERRORS)
def test_bad_input_is_one_clear_line_and_changes_nothing(command, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line on stderr that names the trouble, and no file written or lost."""
    monkeypatch.chdir(tmp_path)
    save_points("bad.npy", np.ones((200, 3)))
    os.mkdir("foreign")
    for name, content in {"config.json": '{"kind": "holiday"}', "teacher.pt": "mine", "metrics.json": "{}"}.items():
        Path("foreign", name).write_text(content)
    before = contents(tmp_path)
    argv = command.split()
    if argv[0] != "plot":
        argv = SILENT + argv
    assert toy(*argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("toy_2d.py: error: ") and output.err.count("\n") == 1
    assert ERRORS[command] in output.err
    assert contents(tmp_path) == before


# ═══ toy_2d.py 6: run folders ═══════════════════════════════════════════════════════════════


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one short run with all figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("toy"))
        assert toy(*SHORT_RUN, "--figures", "all", "--gif") == 0
        return Path("runs/8gaussians").absolute()


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    """Without a name the next free one is taken, and those before are left alone."""
    monkeypatch.chdir(tmp_path)
    names = [toy_2d.new_folder("", "moons").name for _ in range(3)]
    assert names == ["moons", "moons-2", "moons-3"]


def test_of_two_runs_only_one_gets_the_folder(tmp_path):
    """The one that comes second is refused, although the first has written nothing yet."""
    with toy_2d.open_folder(tmp_path / "run", "", False, toy_2d.RUN):
        with pytest.raises(ValueError, match="--overwrite"):
            with toy_2d.open_folder(tmp_path / "run", "", False, toy_2d.RUN):
                pass


def test_a_finished_run_is_refused_unless_it_is_to_be_overwritten(finished, tmp_path, monkeypatch):
    """Without --overwrite no byte changes. With it the old run's files go, and your own stay."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "notes.txt").write_text("mine")
    before = contents(run)
    assert toy(*SILENT, "--out", "run") == 2
    assert contents(run) == before

    assert toy(*SILENT, "--out", "run", "--overwrite", "--seed", "1") == 0
    assert read_metrics(run)["seed"] == 1
    kept = {path.name for path in run.iterdir()}
    assert kept == {"config.json", "teacher.pt", "student.pt", "metrics.json", "log.csv", "notes.txt"}


# ═══ toy_2d.py 7: a run ═════════════════════════════════════════════════════════════════════


def test_the_same_command_gives_the_same_numbers(finished, tmp_path):
    """To the last bit on one machine, whatever was drawn before; another seed gives others."""
    torch.manual_seed(123)
    before = read_metrics(finished)
    assert toy(*SILENT, "--out", tmp_path / "same") == 0
    after = read_metrics(tmp_path / "same")
    for key in ("rows", "floor", "path_error"):
        assert after[key] == before[key]
    assert (tmp_path / "same/log.csv").read_bytes() == (finished / "log.csv").read_bytes()

    assert toy(*SILENT, "--out", tmp_path / "other", "--seed", 1) == 0
    other = read_metrics(tmp_path / "other")["rows"]
    assert all(a["energy"] != b["energy"] for a, b in zip(other, before["rows"]))


def test_the_rows_of_a_run_are_complete_and_finite(finished):
    """Every solver at every number of evaluations, with all measures it has; the floor is at the run's own size."""
    metrics = read_metrics(finished)
    expected = [("teacher", "euler", steps) for steps in (1, 2, 4, 8, 50)]
    expected += [("student", solver, steps) for solver in ("euler", "renoise") for steps in (1, 2, 4, 8)]
    assert [(row["who"], row["solver"], row["steps"]) for row in metrics["rows"]] == expected
    for row in metrics["rows"]:
        names = {"energy", "sliced_w2", "coverage", "precision"}
        if row["solver"] == "euler":
            names.update(("gap", "map_error"))  # they compare pairs, and re-noising leaves none
        values = {name: value for name, value in row.items() if name not in ("who", "solver", "steps")}
        assert values.keys() == names | {"nfe"}
        assert all(math.isfinite(value) for value in values.values())
    assert metrics["floor"] == toy_2d.floor_of("8gaussians", 200)
    assert metrics["path_error"] > 0 and metrics["samples"] == 200


def test_the_consistency_gap_and_renoising_start_from_the_one_step_sample(finished):
    """In one step the gap is 0 and both solvers agree; in more steps neither is so."""
    rows = {}
    for row in read_metrics(finished)["rows"]:
        rows[row["who"], row["solver"], row["steps"]] = row
    for steps in (1, 2, 4, 8):
        euler = rows["student", "euler", steps]
        renoise = rows["student", "renoise", steps]
        assert (euler["gap"] == 0) == (steps == 1)
        assert (euler["energy"] == renoise["energy"]) == (steps == 1)


def test_the_saved_student_has_the_reported_measures(finished):
    """The weights file alone gives a network whose samples score what metrics.json says, to the last bit.

    With another seed the noise is another one, and so are all measures.
    """
    data = toy_2d.eight_gaussians()
    student = scflow.load(finished / "student.pt")
    reported = [row for row in read_metrics(finished)["rows"] if row["who"] == "student"]
    for seed in (0, 1):
        run, _, _ = toy_2d.configure([*SILENT, "--seed", str(seed)])
        rows = toy_2d.evaluate(run, data, "student", student)
        assert (rows == reported) == (seed == 0)


def test_the_measures_of_a_point_mass_by_hand():
    """A network that lands every point at the origin, where the data are nearly a circle of radius 2 (to 10%).

    Its energy distance is 2·2 − 8/π, for two points of the circle are 8/π apart on average. Its sliced distance
    is the RMS of a coordinate, √2, and the exact map is 2 away.
    """
    run = toy_2d.Run(samples=400, nfe=(1,))

    def to_origin(x, t, cond=None):
        return x / t[:, None]

    row, *_ = toy_2d.evaluate(run, toy_2d.eight_gaussians(), "student", to_origin)
    assert abs(row["energy"] / (4 - 8 / math.pi) - 1) < 0.1
    assert abs(row["sliced_w2"] / math.sqrt(2) - 1) < 0.1
    assert abs(row["map_error"] / 2 - 1) < 0.1
    assert row["precision"] == 0 and row["coverage"] == 0


def test_the_exact_teacher_is_exact(tmp_path):
    """--teacher exact: the 50 Euler steps alone are in its flow-map error, below 0.1; the short fit would have 1."""
    assert toy(*SILENT, "--teacher", "exact", "--out", tmp_path / "run") == 0
    rows = read_metrics(tmp_path / "run")["rows"]
    (error,) = [row["map_error"] for row in rows if row["who"] == "teacher" and row["steps"] == 50]
    assert error < 0.1


def test_a_student_of_the_exact_teacher_follows_the_exact_velocity(finished):
    """The walk is along v*; the fitted network is only where the student starts."""
    run, _, schedule = toy_2d.configure([*SILENT, "--teacher", "exact"])
    data = toy_2d.dataset(run.dataset)
    state = toy_2d.fit_student(run, data, scflow.load(finished / "teacher.pt"), schedule)
    _, x1, t, xt = on_paths(50)
    assert torch.equal(state.teacher(xt, t), data(xt, t))


def test_your_own_points_run_from_start_to_finish(tmp_path, monkeypatch):
    """A file of points far from the origin is learned, measured and drawn, without measures that need a mixture."""
    monkeypatch.chdir(tmp_path)
    save_points("mine.npy", np.random.default_rng(0).normal(100, 30, (500, 2)))
    assert toy(*SHORT_RUN, "--dataset", "mine.npy", "--figures", "all", "--quiet") == 0
    folder = Path("runs/mine")
    for row in read_metrics(folder)["rows"]:
        assert math.isfinite(row["energy"])
        assert "precision" not in row and "map_error" not in row
    assert len(list(folder.glob("*.png"))) == 6


def test_the_path_error_is_zero_for_the_exact_map():
    """Of the velocity that lands on f* it is 0 (1e-4: the solver); v* itself lands on the posterior mean."""
    mixture = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.2)

    def exact_map(x, t, cond=None):
        return (x - mixture.flow_map(x, t, 100)) / t[:, None]

    assert toy_2d.path_error(exact_map, mixture, 0) < 1e-4
    assert 0.2 < toy_2d.path_error(mixture, mixture, 0) < 1


@pytest.mark.parametrize("flag, loss", [("--teacher-lr", "flow"), ("--student-lr", "consistency|bi|self|adv")])
def test_a_run_whose_loss_is_not_finite_ends_in_one_line(flag, loss, tmp_path, capsys):
    """A rate that explodes: exit code 2, one line with the loss and the step, and no folder of a failed run."""
    run = tmp_path / "run"
    assert toy(*SILENT, flag, "1e30", "--out", run) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"toy_2d.py: error: the ({loss}) loss became (nan|inf) at step \d+\n", error)
    assert not run.exists()


def test_ctrl_c_is_one_line_and_leaves_the_old_run(finished, tmp_path, monkeypatch, capsys):
    """In the middle of the training: exit code 130. All is written at the end, and so nothing was lost yet."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = contents(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scflow, "flow_matching_loss", interrupt)
    assert toy(*SILENT, "--out", run, "--overwrite") == 130
    assert toy(*SILENT, "--out", tmp_path / "new") == 130
    assert capsys.readouterr().err == "toy_2d.py: stopped\n" * 2
    assert contents(tmp_path) == before


def test_the_log_holds_every_tenth_update(finished):
    """Of both stages, with every loss that has a weight."""
    with open(finished / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["teacher", "teacher", "student"]
    assert [row["step"] for row in rows] == ["1", "11", "1"]
    assert all(float(row["flow"]) > 0 for row in rows[:2])
    first_phase = scflow.SCHEDULES["two_phase"][0]
    for name, weight in first_phase.weights(0).items():
        if weight > 0:
            assert math.isfinite(float(rows[2][name]))


# ═══ toy_2d.py 8: figures ═══════════════════════════════════════════════════════════════════


PANELS = {
    "1_hero": (2, 4),
    "2_steps": (1, 1),
    "3_paths": (1, 3),
    "4_field": (2, 4),
    "5_losses": (1, 1),  # a run this short has hardly a curve
    "6_critic": (1, 4),
}


@pytest.mark.parametrize("name", PANELS)
def test_a_figure_is_drawn_and_not_empty(name, finished):
    """Something stands in the middle of every panel, away from its frame and words; less than 300 KB."""
    file = finished / f"{name}.png"
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("L"))
    rows, columns = PANELS[name]
    for row in np.array_split(pixels, rows, axis=0):
        for panel in np.array_split(row, columns, axis=1):
            h, w = panel.shape
            assert panel[h // 4 : -h // 4, w // 4 : -w // 4].std() > 5
    assert file.stat().st_size < 300_000


def test_losses_are_drawn_to_the_end_of_each_phase_and_no_untrained_one(finished):
    """Two phases with self-correction, the second with consistency, too: curves from first to last record."""
    pictures = toy_2d.Pictures(finished)
    first = Phase(steps=100, lambda_consistency=0.0, lambda_adv=0.0, lambda_bi=0.0)
    pictures.schedule = (first, replace(first, lambda_consistency=1.0))
    pictures.rows = [{"stage": "student", "step": step, "self": step / 100} for step in range(1, 200, 10)]
    distances, game, by_t = pictures.losses(toy_2d.drawing()).axes
    first_curve, second_curve, phase_end = distances.lines
    assert list(first_curve.get_xdata()) == list(range(1, 100, 10))
    assert list(second_curve.get_xdata()) == list(range(101, 200, 10))
    assert second_curve.get_ydata()[0] > 1.01  # no record of the first phase is in the second's mean
    assert phase_end.get_xdata()[0] == 100
    assert not game.get_visible()
    assert [text.get_text() for text in by_t.get_legend().get_texts()] == ["flow", "consistency", "self"]


def test_the_gif_moves_and_its_windows_stand_still(finished):
    """A frame for each of the eight updates, in less than 2 MB. Points move; the lines around them do not."""
    file = finished / "distillation.gif"
    assert file.stat().st_size < 2_000_000
    pictures = []
    with Image.open(file) as image:
        for i in range(image.n_frames):
            image.seek(i)
            pictures.append(np.asarray(image.convert("L")).astype(float))
    assert len(pictures) >= 8

    lines = [(picture < 240).mean(0) > 0.7 for picture in pictures]  # columns of pixels that are drawn all along
    assert lines[0].sum() >= 6
    assert all(np.array_equal(one, lines[0]) for one in lines)
    below_title = slice(60, None)
    assert np.abs(pictures[-1] - pictures[0])[below_title].mean() > 0.3


def test_plot_draws_the_same_figure_again(finished):
    """From the folder's files alone, to the last byte."""
    hero = finished / "1_hero.png"
    before = hero.read_bytes()
    hero.unlink()
    assert toy("plot", "--out", finished) == 0
    assert hero.read_bytes() == before


CONFIG = '{"kind": "run of toy_2d.py", "dataset": "8gaussians", "teacher": "learned", "schedule": %s}'
DAMAGES = {
    "metrics.json": ["", "{", "[]", "{}", '{"rows": 3, "floor": 0}', "[" * 100000],
    "config.json": ["", "no json", "{}", CONFIG % '[{"at_one": 0.5}]', CONFIG % "[1]", CONFIG % '[{"steps": "x"}]'],
    "student.pt": ["", "no weights"],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_plot_refuses_an_unfinished_or_damaged_run(name, finished, tmp_path, capsys):
    """A file is missing, or is not what it should be: one line that names the file, and nothing is drawn."""
    for damage in [None, *DAMAGES[name]]:
        run = tmp_path / "run"
        run.mkdir()
        for other in DAMAGES:
            shutil.copy(finished / other, run)
        shutil.copy(finished / "teacher.pt", run)
        (run / name).unlink()
        if damage is not None:
            (run / name).write_text(damage)
        assert toy("plot", "--out", run) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1
        assert not list(run.glob("*.png"))
        shutil.rmtree(run)


# ═══ celeba_latent.py 1: drawn faces ════════════════════════════════════════════════════════


def numbers(n, seed=0):
    """What n faces are drawn from, (n,23)."""
    return torch.randn(n, len(TRAITS), generator=gen(seed))


def drawings(n, size=32, seed=0):
    """Drawn faces, uint8 (n,3,size,size)."""
    return (255 * draw_faces(numbers(n, seed), size)).round().byte()


def test_traits_have_their_names_and_ranges():
    """The k-th number, here k, is the trait of the k-th name, so many deviations from its mean (1e-5: float32)."""
    n = len(TRAITS)
    traits = celeba_latent.read_traits(torch.arange(n)[None])
    for k, (name, (mean, deviation)) in enumerate(TRAITS.items()):
        value = getattr(traits, name)
        assert value.shape == (1, 1, 1)
        assert abs(value.item() - mean - deviation * k) < 1e-5, name


def test_every_trait_is_seen():
    """A deviation more moves some pixel of some of twenty faces by 2% at least."""
    before = numbers(20)
    faces_before = draw_faces(before)
    for k, name in enumerate(TRAITS):
        after = before.clone()
        after[:, k] += 1
        moved = (draw_faces(after) - faces_before).abs()
        assert moved.max() > 0.02, name


def test_no_two_faces_are_alike():
    """Of 300 faces the two nearest differ by more than 3% (RMS over all pixels)."""
    x = draw_faces(numbers(300)).flatten(1)
    distance, _ = celeba_latent.neighbours(x, x, 2)  # the nearest is the face itself
    assert distance.min() / x.shape[1] ** 0.5 > 0.03


def test_faces_can_be_drawn_at_any_size():
    """At 64 px, averaged to 32, they are nearly those at 32 px (0.4%), each alone too (1e-6)."""
    small = draw_faces(numbers(50), 32)
    large = draw_faces(numbers(50), 64)
    assert small.shape == (50, 3, 32, 32) and large.shape == (50, 3, 64, 64)
    assert small.min() >= 0 and small.max() <= 1
    assert (F.avg_pool2d(large, 2) - small).abs().mean() < 0.006
    alone = draw_faces(numbers(50)[7:8], 32)
    assert torch.allclose(alone, small[7:8], atol=1e-6)


# ═══ celeba_latent.py 2: autoencoders ═══════════════════════════════════════════════════════


@exact
@pytest.mark.parametrize("factor, channels", [(4, 5), (8, 32)])
def test_components_lose_exactly_the_variance_they_leave_out(factor, channels):
    """The squared error and the share that is kept are numpy's eigenvalues of the patches' covariance (1e-9).

    The pictures lie around ½, so that nothing is clamped.
    """
    x = 0.5 + 0.03 * F.avg_pool2d(torch.randn(40, 3, 16, 16), 3, 1, 1)
    patches = scflow.patchify(x, factor).flatten(0, 1).numpy()  # (40·h·w, 3·factor²)
    values = np.linalg.eigvalsh(np.cov(patches.T))  # the largest come last
    left_out = values[:-channels].sum()

    net = PatchPCA(factor, channels)
    kept = net.fit(x)
    assert abs(kept - 1 + left_out / values.sum()) < 1e-9
    z = net.encode(x)
    assert z.shape == (40, channels, 16 // factor, 16 // factor)
    error = (net.decode(z) - x).square().sum() / (len(patches) - 1)
    assert abs(error - left_out) < 1e-9 * values.sum()


@exact
def test_all_components_and_no_autoencoder_lose_nothing():
    """decode(encode(x)) is x for oblong pictures too: with 3·factor² components to 1e-12, with `none` bitwise."""
    x = torch.rand(30, 3, 8, 12)
    net = PatchPCA(2, 12)
    net.fit(x)
    assert torch.allclose(net.decode(net.encode(x)), x, atol=1e-12)
    none = celeba_latent.autoencoder("none", 8, 32)
    assert torch.equal(none.encode(x), x)
    assert torch.equal(none.decode(x), x)


@exact
def test_components_of_whole_pictures_lose_exactly_the_variance_they_leave_out():
    """As numpy's singular values say (1e-9), and each number has the root of its component's deviation (1e-9)."""
    x = 0.5 + 0.03 * F.avg_pool2d(torch.randn(40, 3, 16, 16), 3, 1, 1)
    flat = x.flatten(1).numpy()
    values = np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2 / len(x)  # the largest come first
    left_out = values[7:].sum()

    net = PicturePCA(16, 7)
    kept = net.fit(x)
    assert abs(kept - 1 + left_out / values.sum()) < 1e-9
    z = net.encode(x)
    assert z.shape == (40, 1, 1, 7)
    variance = z.flatten(1).var(0, correction=0).sort(descending=True).values
    assert torch.allclose(variance, torch.tensor(values[:7]).sqrt(), rtol=1e-9)
    error = (net.decode(z) - x).square().sum() / len(x)
    assert abs(error - left_out) < 1e-9 * values.sum()


def tiny_pair(prefix, channels=4, pool=False):
    """Random weights as the two files of a TAESD pair."""
    net = TinyAutoencoder(channels, pool, width=8)
    for weight in net.parameters():
        weight.data *= 1.6  # else values fade from layer to layer
    net.decoder[-1].bias.data += 0.5  # pictures around grey
    encoder = net.encoder.state_dict()
    decoder = net.decoder.state_dict()
    torch.save(encoder, f"{prefix}_encoder.pth")
    torch.save(decoder, f"{prefix}_decoder.pth")
    return encoder, decoder


def plain_conv(w, name, x, stride=1):
    """A 3×3 convolution, from weights by their names in the published files."""
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding=1)


def plain_block(w, name, x, pool=False):
    if pool:
        h = F.conv2d(x, w[f"{name}.pool.0.weight"])
        h = F.group_norm(h, 4, w[f"{name}.pool.1.weight"], w[f"{name}.pool.1.bias"])
        x = x + F.conv2d(h.relu(), w[f"{name}.pool.3.weight"])
    h = plain_conv(w, f"{name}.conv.0", x).relu()
    h = plain_conv(w, f"{name}.conv.2", h).relu()
    h = plain_conv(w, f"{name}.conv.4", h)
    return (x + h).relu()


def plain_encoder(w, x, pool):
    x = plain_conv(w, 0, x)
    x = plain_block(w, 1, x)
    for i in (2, 6, 10):
        x = plain_conv(w, i, x, stride=2)
        for k in (1, 2, 3):
            x = plain_block(w, i + k, x, pool and i == 10)
    return plain_conv(w, 14, x)


def plain_decoder(w, z, pool):
    x = 3 * (z / 3).tanh()
    x = plain_conv(w, 1, x).relu()
    for i in (3, 8, 13):
        for k in (0, 1, 2):
            x = plain_block(w, i + k, x, pool and i == 3)
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = plain_conv(w, i + 4, x)
    x = plain_block(w, 18, x)
    return plain_conv(w, 19, x).clamp(0, 1)


@pytest.mark.parametrize("channels, pool", [(4, False), (32, True)])
def test_a_tiny_autoencoder_equals_a_plain_implementation(channels, pool, tmp_path):
    """Read from its two files, and from a checkpoint after that, it agrees with layer by layer (1e-4: float32)."""
    encoder, decoder = tiny_pair(tmp_path / "pair", channels, pool)
    x = torch.rand(2, 3, 32, 48)
    z = 4 * torch.randn(2, channels, 3, 2)
    latents = plain_encoder(encoder, x, pool)
    pictures = plain_decoder(decoder, z, pool)
    inside = (pictures > 0) & (pictures < 1)
    assert inside.double().mean() > 0.3

    net = celeba_latent.autoencoder(str(tmp_path / "pair"), 32, 99)
    scflow.save(tmp_path / "net.pt", net)
    for read in (net, scflow.load(tmp_path / "net.pt")):
        assert torch.allclose(read.encode(x), latents, rtol=1e-4, atol=1e-4 * latents.abs().max().item())
        assert torch.allclose(read.decode(z), pictures, atol=1e-4)


# ═══ celeba_latent.py 3: what is compared ═══════════════════════════════════════════════════


def test_features_are_computed_on_the_device_in_small_batches(monkeypatch):
    """On a device without memory one sees where each batch went."""
    seen = []

    def spy(pictures):
        seen.append((pictures.device.type, len(pictures)))
        return torch.zeros(len(pictures), 1), torch.zeros(len(pictures), 1)

    monkeypatch.setattr(celeba_latent, "picture_features", spy)
    celeba_latent.features_of(torch.zeros(150, 3, 8, 8).byte(), "meta")
    assert seen == [("meta", 64), ("meta", 64), ("meta", 22)]


def test_textures_feel_a_pattern_that_thumbnails_do_not():
    """A fine chequered board has the thumbnail of even grey, and a texture of its own (30% of the grey's norm)."""
    square = torch.tensor([[200, 60], [60, 200]], dtype=torch.uint8)
    board = square.repeat(32, 32).expand(1, 3, 64, 64)
    grey = torch.full_like(board, 130)
    thumb, texture = celeba_latent.picture_features(board)
    grey_thumb, grey_texture = celeba_latent.picture_features(grey)
    assert torch.equal(thumb, grey_thumb)
    assert (texture - grey_texture).norm() > 0.3 * grey_texture.norm()


def moments(n, mean, root):
    """Rows (n,d) whose sample mean and covariance are exactly `mean` and root·rootᵀ."""
    x = torch.randn(n, len(mean))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return mean + white.T @ root.T


@exact
def test_the_frechet_distance_of_known_gaussians():
    """‖m−m′‖² + tr C + tr C′ − 2Σ√λ, λ the eigenvalues of CC′ as numpy finds them, which do not commute (1e-9)."""
    m1, m2 = torch.randn(2, 4)
    a, b = torch.randn(2, 4, 4)
    found = celeba_latent.frechet_distance(moments(60, m1, a), moments(90, m2, b))
    values = np.linalg.eigvals((a @ a.T @ b @ b.T).numpy()).real
    traces = a.square().sum() + b.square().sum()
    expected = (m1 - m2).square().sum() + traces - 2 * np.sqrt(values).sum()
    assert abs(found - expected) < 1e-9


@pytest.mark.parametrize("rows", [(4, 9), (9, 4)])
def test_a_frechet_distance_of_few_rows_is_refused(rows):
    """As many rows as dimensions leave a covariance singular; one more do not."""
    x, y = (torch.randn(n, 4) for n in rows)
    refused(celeba_latent.frechet_distance, x, y, match="4 samples are too few")
    celeba_latent.frechet_distance(torch.randn(5, 4), torch.randn(5, 4))


@exact
@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_by_brute_force(k):
    """The k-th smallest of all distances from each row, and where it is (rounding: 1e-9)."""
    x = torch.randn(11, 3)
    y = torch.randn(7, 3)
    distance, index = celeba_latent.neighbours(x, y, k, rows=4)
    for i in range(11):
        lengths = (x[i] - y).norm(dim=1)
        nearest = lengths.argsort()[k - 1]
        assert index[i] == nearest
        assert abs(distance[i] - lengths[nearest]) < 1e-9


@exact
def test_coverage_by_brute_force():
    """A real row counts if a fake one is nearer than its second nearest other real row."""
    real = torch.randn(30, 2)
    fake = torch.randn(12, 2) + 0.5
    covered = 0
    for i in range(30):
        others = torch.cat([real[:i], real[i + 1 :]])
        radius = (others - real[i]).norm(dim=1).sort().values[1]
        if (fake - real[i]).norm(dim=1).min() <= radius:
            covered += 1
    assert 0 < covered < 30
    assert celeba_latent.knn_coverage(real, fake, k=2) == covered / 30


@pytest.fixture(scope="module")
def measured():
    """250 faces: thumbnails, textures, and the measure whose reference they are."""
    thumbs, textures = celeba_latent.features_of(drawings(250))
    measure = celeba_latent.PictureMeasure(thumbs, textures)
    return SimpleNamespace(thumbs=thumbs, textures=textures, measure=measure)


def test_layout_is_the_largest_components_of_the_thumbnails(measured):
    """The 64 features hold the variance of the 64 largest singular values, and their mean is 0 (1e-4: float32)."""
    flat = measured.thumbs.flatten(1).float() / 255
    largest = torch.linalg.svdvals(flat - flat.mean(0))[:64]
    layout = measured.measure.reference["layout"]
    assert abs(layout.square().sum() / largest.square().sum() - 1) < 1e-4
    assert layout.mean(0).abs().max() < 1e-4


def test_each_measure_sees_its_own_damage(measured):
    """The reference scores 0, 0 and 1 (1e-4). Darker is a matter of layout and coverage, rougher of texture."""
    itself = measured.measure(measured.thumbs, measured.textures)
    assert abs(itself["layout"]) < 1e-4 and abs(itself["texture"]) < 1e-4
    assert itself["coverage"] == 1

    darker = measured.measure(measured.thumbs // 2, measured.textures)
    assert darker["layout"] > 1 and darker["coverage"] < 0.5
    assert darker["texture"] == itself["texture"]

    rougher = measured.measure(measured.thumbs, 2 * measured.textures)
    assert rougher["texture"] > 1
    assert rougher["layout"] == itself["layout"] and rougher["coverage"] == 1


# ═══ celeba_latent.py 4: pictures ═══════════════════════════════════════════════════════════


def save_picture(path, picture, **options):
    """uint8 (3,H,W) as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, **options)


def read_back(path, size, picture, **options):
    """The picture as it is read after it was saved."""
    save_picture(path, picture, **options)
    return Pictures(path.parent).read(path.name, size)


@pytest.mark.parametrize("wide", [True, False])
def test_the_crop_is_the_central_square(wide, tmp_path):
    """Of a picture three squares long the middle one is read, bitwise where nothing is resized."""
    picture = drawings(1, 96)[0, :, :32]
    middle = picture[:, :, 32:64]
    if not wide:
        picture = picture.mT
        middle = middle.mT
    assert torch.equal(read_back(tmp_path / "a.png", 32, picture), middle)


def test_a_photograph_is_read_as_the_camera_was_held(tmp_path):
    """The EXIF orientation 6 is a quarter turn: the left column becomes the top row."""
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    picture[:, :, :4] = 200
    tag = Image.Exif()
    tag[0x0112] = 6
    assert torch.equal(read_back(tmp_path / "a.png", 16, picture, exif=tag), picture.mT)


@pytest.mark.parametrize("side", [96, 112, 70])
def test_pictures_are_resized_without_aliasing(side, tmp_path):
    """A fine chequered board becomes even grey at any zoom (3 of 255 levels), away from the edge."""
    board = (torch.arange(side)[:, None] + torch.arange(side)) % 2 * 255
    small = read_back(tmp_path / "board.png", 16, board.byte().expand(3, -1, -1))
    assert (small[:, 2:-2, 2:-2].float() - 127.5).abs().max() < 3


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    """65,535 is white, 257 is 1; nothing is cut off at 255."""
    levels = np.arange(256, dtype=np.uint16).repeat(4).reshape(32, 32)
    Image.fromarray(257 * levels).save(tmp_path / "grey.png")
    picture = Pictures(tmp_path).read("grey.png", 32)
    assert same(picture, torch.from_numpy(levels.astype(np.uint8)).expand(3, 32, 32))


# ═══ celeba_latent.py 5: latents ════════════════════════════════════════════════════════════

ENCODE = "--size 32 --channels 4 --flips --batch 1 --quiet".split()
TEACH = "--teacher-steps 12 --teacher-batch 16 --quiet".split()
DISTIL = "--student-steps 12 --quiet".split()


def faces(*argv):
    """Run a command in this process; returns its exit code."""
    return celeba_latent.main([str(word) for word in argv])


def encode_again(album, out, *changes):
    """Encode the album as it was, but for changes; returns the exit code."""
    return faces("encode", "--images", album / "pictures", *ENCODE, "--out", out, *changes)


@pytest.fixture(scope="module")
def tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(celeba_latent.SIZES, "small", dict(dim=16, depth=1, heads=2))
        patch.setitem(celeba_latent.PERCEPTRON, "width", 16)
        yield


@pytest.fixture(scope="module")
def album(tiny_networks, tmp_path_factory):
    """Forty pictures in three formats, and files that are none; their latents; a run."""
    folder = tmp_path_factory.mktemp("album")
    for i, picture in enumerate(drawings(40, 40)):
        name = f"{i:02d}.{['png', 'jpg', 'webp'][i % 3]}"
        if i % 5:
            picture = picture[:, :36]
        save_picture(folder / "pictures" / "ab"[i % 2] / name, picture)
    save_picture(folder / "pictures/small.png", picture[:, :20])
    save_picture(folder / "pictures/.hidden.png", picture)
    whole = (folder / "pictures/a/00.png").read_bytes()
    (folder / "pictures/a/broken.PNG").write_bytes(whole[:900])
    (folder / "pictures/notes.txt").write_text("no picture")

    assert encode_again(folder, folder / "latents") == 0
    run = folder / "run"
    assert faces("teacher", "--latents", folder / "latents", "--out", run, *TEACH) == 0
    assert faces("distill", "--out", run, *DISTIL) == 0
    return folder


def folder_of_latents(folder):
    """All that a latents folder holds: the bytes of its arrays, and what meta.pt says."""
    content = scflow.read(folder / "meta.pt")
    for name in ("latents", "thumbs", "textures"):
        content[name] = (folder / f"{name}.npy").read_bytes()
    return content


def test_a_zip_is_encoded_like_the_folder(album, tmp_path):
    """Arrays, statistics and names are bitwise the same, whatever the order in the zip."""
    with zipfile.ZipFile(tmp_path / "album.zip", "w") as file:
        for path in sorted((album / "pictures").rglob("*"), reverse=True):
            file.write(path, path.relative_to(album / "pictures"))
    assert encode_again(album, tmp_path / "latents", "--images", tmp_path / "album.zip") == 0
    assert same(folder_of_latents(tmp_path / "latents"), folder_of_latents(album / "latents"))


def test_pictures_that_are_left_out_are_named(album, tmp_path, capsys):
    """The broken and the small one are counted, printed and recorded. Hidden and other files are no pictures."""
    assert encode_again(album, tmp_path / "latents") == 0
    said = capsys.readouterr().out
    assert "40 pictures" in said and "2 skipped" in said
    assert "small.png: too small (40×20)" in said
    assert "a/broken.PNG: cannot be read" in said
    meta = scflow.read(tmp_path / "latents/meta.pt")
    assert [name for name, _ in meta["skipped"]] == ["a/broken.PNG", "small.png"]
    assert len(set(meta["sources"])) == 40
    assert not any("hidden" in name for name in meta["sources"])


def originals(album, data):
    """The album's pictures in the order of their latents, uint8 (40,3,32,32)."""
    return torch.stack(Pictures(album / "pictures").read_all(data.meta["sources"], 32))


def test_each_picture_has_its_latent_and_its_mirror_image_the_next_row(album, tmp_path):
    """Rows 2i and 2i+1 are picture i and its mirror image (2e-3: float16), in batches with gaps too."""
    tiny_pair(tmp_path / "pair")
    assert encode_again(album, tmp_path / "latents", "--autoencoder", tmp_path / "pair", "--batch", 7) == 0
    data = Latents(tmp_path / "latents")
    x = originals(album, data) / 255
    net = scflow.load(tmp_path / "latents/meta.pt")
    stored = torch.tensor(data.arrays["latents"][:80]).float()
    scale = stored.abs().max()
    assert (stored[::2] - stored[1::2]).abs().max() > 0.03 * scale
    assert (stored[::2] - net.encode(x)).abs().max() < 2e-3 * scale
    assert (stored[1::2] - net.encode(x.flip(3))).abs().max() < 2e-3 * scale


def test_what_is_compared_is_kept_of_the_originals(album):
    """Thumbnails and textures of the pictures by number, as computed again (1e-4: float32 sums)."""
    data = Latents(album / "latents")
    which = torch.tensor([31, 2])
    thumbs, textures = data.originals(which)
    x = originals(album, data)[which]
    assert torch.equal(thumbs, x)  # at 32 px they are the pictures
    assert torch.allclose(textures, celeba_latent.picture_features(x)[1], atol=1e-4)


def test_latents_are_normalised_per_channel(album):
    """Mean 0 and deviation 1 in each, though the channels' own deviations differ (1e-3: float16)."""
    data = Latents(album / "latents")
    stored = data.arrays["latents"][:80].astype(np.float64)
    assert np.ptp(stored.std((0, 2, 3))) > 0.1
    z = data.normalised(torch.arange(40), mirrored=True).double()
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    assert (z.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["pca", "none"])
def test_the_codec_decodes_normalised_latents(name, album, tmp_path):
    """To what the autoencoder itself makes of the pictures (1.5 levels: float16, and rounding), in any batches."""
    assert encode_again(album, tmp_path / "latents", "--autoencoder", name) == 0
    data = Latents(tmp_path / "latents")
    x = originals(album, data)
    net = scflow.load(tmp_path / "latents/meta.pt")
    expected = 255 * net.decode(net.encode(x / 255))
    decoded = Codec(data.meta).decode(data.normalised(torch.arange(40)), batch=7)
    assert decoded.dtype == torch.uint8
    assert (decoded - expected).abs().max() < 1.5


def rows_of(x):
    """The rows of a tensor as a set."""
    return {tuple(row) for row in x.flatten(1).tolist()}


def test_a_tenth_is_held_out_and_never_trained_on(album):
    """4,000 rows of a batch are the other 36 pictures and their mirror images, all of them, and nothing else."""
    data = Latents(album / "latents")
    assert len(data.held_out) == 4
    assert sorted(data.held_out.tolist() + data.train.tolist()) == list(range(40))
    drawn, _ = data.batch("cpu")(4000, gen())
    trained = rows_of(data.normalised(data.train, mirrored=True))
    assert len(trained) == 72
    assert rows_of(drawn) == trained
    assert not trained & rows_of(data.normalised(data.held_out, mirrored=True))


@pytest.mark.parametrize("bad, words", [(20, "only 0 of 20"), (12, "only 8 of 20")])
def test_too_few_good_pictures_are_an_error(bad, words, tmp_path, capsys):
    """None, or next to none: one line that says why one of them was left out, and no folder."""
    for i, picture in enumerate(drawings(20)):
        save_picture(tmp_path / f"pictures/{i:02d}.png", picture[:, :10] if i < bad else picture)
    assert faces("encode", "--images", tmp_path / "pictures", *ENCODE, "--out", tmp_path / "latents") == 2
    error = capsys.readouterr().err
    assert words in error and "too small (32×10)" in error and error.count("\n") == 1
    assert not (tmp_path / "latents").exists()


def with_ctrl_c(function, n):
    """The function, but in its n-th call Ctrl-C is pressed."""
    calls = itertools.count(1)

    def pressing(*args, **options):
        if next(calls) == n:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **options)

    return pressing


def said_stopped(capsys):
    """What is printed at Ctrl-C: one line with the way to go on."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return "--resume" in error


def test_an_encoding_that_was_stopped_resumes_bit_for_bit(album, tmp_path, monkeypatch, capsys):
    """Ctrl-C at the 21st good picture: it is still counted, the folder trains nothing, and the rest is encoded."""
    out = tmp_path / "latents"
    with monkeypatch.context() as patch:
        patch.setattr(celeba_latent, "picture_features", with_ctrl_c(celeba_latent.picture_features, 21))
        assert encode_again(album, out) == 130
    assert said_stopped(capsys)
    assert len(scflow.read(out / "meta.pt")["sources"]) == 21
    assert faces("teacher", "--latents", out, "--out", tmp_path / "run") == 2
    assert "unfinished" in capsys.readouterr().err

    calls = []
    monkeypatch.setattr(PatchPCA, "fit", calls.append)  # the components stay as they were fitted
    assert encode_again(album, out, "--resume") == 0
    assert not calls
    assert same(folder_of_latents(out), folder_of_latents(album / "latents"))


# ═══ celeba_latent.py 6: autoencoders of diffusers ══════════════════════════════════════════


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_an_autoencoder_of_diffusers(kind, album, tmp_path):
    """Latents are the mode of its posterior (1e-2: float16), and decode like the library's (2 of 255 levels)."""
    diffusers = pytest.importorskip("diffusers")
    if kind == "AutoencoderKL":
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        vae = diffusers.AutoencoderKL(**blocks, block_out_channels=[8, 8], norm_num_groups=4)
    else:
        widths = [8, 8, 8, 8]
        vae = diffusers.AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    vae.eval().requires_grad_(False)
    vae.save_pretrained(tmp_path / "vae")
    assert encode_again(album, tmp_path / "latents", "--autoencoder", tmp_path / "vae") == 0

    data = Latents(tmp_path / "latents")
    x = originals(album, data)[[0, 7]]
    out = vae.encode(2 * (x / 255) - 1)
    z = out.latent_dist.mode() if kind == "AutoencoderKL" else out.latents
    stored = torch.tensor(data.arrays["latents"][[0, 14]]).float()
    assert (stored - z).abs().max() < 1e-2 * z.abs().max()
    pictures = 255 * (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    decoded = Codec(data.meta).decode(data.normalised(torch.tensor([0, 7])))
    assert (decoded - pictures).abs().max() < 2
    assert not data.meta["weights"]  # the source is named, and not copied


LOADING = [
    "teacher --latents latents --out new",
    "distill --latents latents --out run --overwrite",
    "sample --out run",
    "evaluate --latents latents --out run",
]


@pytest.mark.parametrize("command", LOADING)
def test_a_source_in_a_foreign_file_is_not_fetched_unless_trusted(command, album, tmp_path, monkeypatch, capsys):
    """A stand-in for the library sees whether it may fetch. What to type, if one trusts it, is in the error."""
    shutil.copytree(album, tmp_path, dirs_exist_ok=True)
    arch = {"name": "Diffusers", "source": "some/vae"}
    edit(tmp_path / "latents/meta.pt", arch=arch, weights={})
    codec = {**scflow.read(tmp_path / "run/teacher.pt")["codec"], "arch": arch, "weights": {}}
    for name in ("teacher", "student"):
        edit(tmp_path / f"run/{name}.pt", codec=codec)
    asked = []

    def load_config(source, local_files_only):
        asked.append((source, local_files_only))
        raise OSError("it is not here")

    library = SimpleNamespace(AutoencoderKL=SimpleNamespace(load_config=load_config))
    monkeypatch.setitem(sys.modules, "diffusers", library)
    monkeypatch.setattr(celeba_latent, "TRUSTED", set())
    monkeypatch.chdir(tmp_path)
    assert faces(*command.split()) == 2
    assert "--trust-autoencoder some/vae" in capsys.readouterr().err
    assert faces(*command.split(), "--trust-autoencoder", "some/vae") == 2
    assert asked == [("some/vae", True), ("some/vae", False)]


# ═══ celeba_latent.py 7: teacher and student ════════════════════════════════════════════════


def edit(path, **changes):
    """Change entries of a weights file."""
    torch.save({**scflow.read(path), **changes}, path)


def log_of(run):
    """The log without empty cells."""
    rows = []
    with open(run / "log.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.append({name: value for name, value in row.items() if value != ""})
    return rows


def same_run(run, album, name):
    """Weights, averages, optimisers and random numbers are bitwise those of the album's run, and so is the log."""
    ours = scflow.read(run / f"{name}.pt")
    theirs = scflow.read(album / f"run/{name}.pt")
    rows = log_of(run)
    equal = same(ours["weights"], theirs["weights"]) and same(ours["state"], theirs["state"])
    return equal and rows == log_of(album / "run")[: len(rows)]


def taught(album, run):
    """A new run folder with the album's teacher."""
    run.mkdir()
    for name in ("teacher.pt", "config.json"):
        shutil.copy(album / "run" / name, run)
    return run


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_training_that_was_stopped_resumes_bit_for_bit(name, album, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the seventh update: it is finished and saved, and the run ends as if it had never stopped."""
    run = tmp_path / "run"
    command = ["teacher", "--latents", album / "latents", "--out", run, *TEACH]
    if name == "student":
        taught(album, run)
        command = ["distill", "--out", run, *DISTIL]
    with monkeypatch.context() as patch:
        patch.setattr(scflow, "lr_factor", with_ctrl_c(scflow.lr_factor, 7))
        assert faces(*command) == 130
    assert said_stopped(capsys)
    assert scflow.read(run / f"{name}.pt")["state"]["step"] == 7
    assert faces(*command, "--resume") == 0
    assert same_run(run, album, name)


def test_a_new_student_takes_the_place_of_the_old(album, tmp_path):
    """--overwrite: the measures of the old one go, the same seed gives the same again, another seed another."""
    run = tmp_path / "run"
    shutil.copytree(album / "run", run)
    (run / "metrics.json").write_text("{}")
    assert faces("distill", "--out", run, *DISTIL, "--overwrite") == 0
    assert not (run / "metrics.json").exists()
    assert same_run(run, album, "student")
    assert faces("distill", "--out", run, *DISTIL, "--overwrite", "--seed", 1) == 0
    assert not same_run(run, album, "student")


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_checkpoints_are_plain_and_complete(name, album):
    """The file alone gives the average, the network that samples, and the codec; all in float32, without prefixes."""
    content = scflow.read(album / f"run/{name}.pt")
    state = content["state"]
    parts = {"teacher": scflow.TeacherRun.PARTS, "student": scflow.StudentRun.PARTS}
    assert state["parts"].keys() == set(parts[name])
    assert state["step"] == 12
    net = scflow.load(album / f"run/{name}.pt")
    assert net.shape == (4, 4, 4)
    assert same(dict(net.state_dict()), dict(state["parts"]["ema"]))
    for key, weight in content["weights"].items():
        assert weight.dtype == torch.float32
        assert "_orig_mod" not in key
    meta = scflow.read(album / "latents/meta.pt")
    for key, value in content["codec"].items():
        assert same(value, meta[key])


# ─── Where networks start: normal latents ───


def normal_latents():
    """A mean (8,), variances (8,) and axes (8,8), and 4,000 latents (4000,2,2,2) that have them; a new DiT for them."""
    mean = torch.randn(8, generator=gen(1))
    variance = torch.logspace(1, -2, 8)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=gen(2))).Q
    x = torch.randn(4000, 8, generator=gen(3))
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly of covariance 1
    latents = (mean + x * variance.sqrt() @ axes.T).view(-1, 2, 2, 2)
    net = DiT((2, 2, 2), 1, dim=8, depth=1, heads=2)
    return SimpleNamespace(mean=mean, variance=variance, axes=axes, latents=latents, net=net)


@exact
@pytest.mark.parametrize("components", [8, 3])
def test_the_start_of_a_teacher_is_the_velocity_of_normal_latents(components):
    """Untrained it carries noise x₁ to m + V√λ·Vᵀx₁, in 400 Heun steps (1e-3: their error).

    λ is 1 beyond the leading components, as a DiT starts. The mean is the true one everywhere.
    """
    normal = normal_latents()
    teacher = NormalStart(normal.net.arch, components, "velocity")
    teacher.fit(normal.latents)
    variance = torch.ones(8)
    variance[:components] = normal.variance[:components]
    x1 = torch.randn(5, 8, generator=gen())
    expected = normal.mean + (x1 @ normal.axes * variance.sqrt()) @ normal.axes.T
    found = sample(teacher, x1.view(-1, 2, 2, 2), 400, "heun")
    assert (found.flatten(1) - expected).abs().max() < 1e-3


@exact
def test_the_start_of_a_student_is_the_flow_map_of_normal_latents():
    """Around an exact teacher one step lands where the flow does, from t = 1 and from each t on its path."""
    normal = normal_latents()
    teacher = NormalStart(normal.net.arch, 8, "velocity")
    teacher.fit(normal.latents)
    student = start_from_normal(teacher, normal.latents, "map")
    assert len(student.variance) == 8
    x1 = torch.randn(5, 8, generator=gen())
    expected = normal.mean + (x1 @ normal.axes * normal.variance.sqrt()) @ normal.axes.T
    for t in (1.0, 0.6, 0.05, 0.0):
        scale = ((1 - t) ** 2 * normal.variance + t**2).sqrt()
        xt = (1 - t) * normal.mean + (x1 @ normal.axes * scale) @ normal.axes.T
        found = predict_x0(student, xt.view(-1, 2, 2, 2), torch.full((5,), t))
        assert (found.flatten(1) - expected).abs().max() < 1e-9


def test_a_student_of_ours_starts_from_the_flow_map_and_the_papers_from_its_teacher(album, tmp_path):
    """Both hold the teacher, whose DiT has a start of its own."""
    run = taught(album, tmp_path / "run")
    teacher = scflow.read(run / "teacher.pt")["arch"]
    assert teacher["name"] == "NormalStart" and teacher["form"] == "velocity"
    assert teacher["net"]["name"] == "DiT"
    short = ["--student-steps", 4, "--student-batch", 8, "--quiet", "--overwrite"]
    assert faces("distill", "--out", run, *short) == 0
    ours = scflow.read(run / "student.pt")["arch"]
    assert ours["form"] == "map" and ours["net"] == teacher
    assert faces("distill", "--out", run, *short, "--preset", "paper", "--warmup", 1) == 0
    assert scflow.read(run / "student.pt")["arch"] == teacher


def test_three_latents_give_no_covariance_to_start_from():
    """The network stays as it is."""
    normal = normal_latents()
    assert start_from_normal(normal.net, normal.latents[:3], "map") is normal.net


@pytest.fixture
def compiled(monkeypatch):
    """The modules that were compiled, by torch's own graphs but without a compiler."""
    found = []
    compiler = torch.compile

    def eager(function, **options):
        found.append(function.__self__)
        return compiler(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", eager)
    return found


def kinds_of(modules):
    return sorted(type(module).__name__ for module in modules)


def test_compiled_training_saves_the_same_plain_weights(album, tmp_path, compiled):
    """The teacher's block, and then those of student, target, frozen copy and teacher, and the critic."""
    run = tmp_path / "run"
    assert faces("teacher", "--latents", album / "latents", "--out", run, *TEACH, "--compile", "yes") == 0
    assert kinds_of(compiled) == ["Block"]
    compiled.clear()
    assert faces("distill", "--out", run, *DISTIL, "--compile", "yes") == 0
    assert kinds_of(compiled) == ["Block"] * 4 + ["LatentCritic"]
    assert same_run(run, album, "student")


@pytest.mark.parametrize("net", [dit(), latent_critic()], ids=["DiT", "LatentCritic"])
def test_a_compiled_network_is_one_graph(net):
    """Without a break, at which the processor would take over."""
    x = torch.randn(3, *LATENT)
    inputs = (x,) if isinstance(net, LatentCritic) else (x, torch.rand(3))
    assert torch._dynamo.explain(net)(*inputs).graph_break_count == 0


def test_a_critic_with_r1_is_not_compiled(album, tmp_path, compiled):
    """A compiled graph has no second derivative."""
    run = taught(album, tmp_path / "run")
    paper = ["--preset", "paper", "--warmup", "1", "--student-steps", "2"]
    assert faces("distill", "--out", run, *paper, "--compile", "yes", "--quiet") == 0
    assert kinds_of(compiled) == ["Block"] * 4


PRESETS = {
    "two_phase": {"self", "adv", "critic"},
    "large": {"self", "adv", "critic", "r1"},
    "paper": {"consistency", "adv", "self", "bi", "critic", "r1"},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run_in_both_precisions(preset, precision, album, tmp_path, monkeypatch):
    """All their losses are finite. Networks and critic compute in the precision, and their weights stay float32.

    In bf16 there is no fused attention: on a CPU its backward pass is slow.
    """
    run = taught(album, tmp_path / "run")
    short = ["--preset", preset, "--student-steps", 12, "--student-batch", 8, "--quiet"]
    if preset == "paper":
        short += ["--warmup", 2]
    seen = []
    distill = scflow.distill

    def spy(velocity, critic, *args, student, **options):
        (inner,) = [part for part in student.modules() if isinstance(part, DiT)]
        seen.extend([inner.precision, critic.precision])
        return distill(velocity, critic, *args, student=student, **options)

    monkeypatch.setattr(scflow, "distill", spy)
    assert faces("distill", "--out", run, *short, "--precision", precision) == 0
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert seen == [expected[precision]] * 2
    assert torch.backends.cuda.flash_sdp_enabled() == (precision == "fp32")
    last = log_of(run)[-1]
    assert last.keys() == PRESETS[preset] | {"stage", "step"}
    assert all(math.isfinite(float(last[name])) for name in PRESETS[preset])
    weights = scflow.read(run / "student.pt")["weights"]
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_checkpoints_are_written_by_the_clock(tmp_path, monkeypatch):
    """Every two minutes at updates of half a minute; the sheet after an update counts as well, and so does the end."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(celeba_latent, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    saved = []
    monkeypatch.setattr(celeba_latent.RunFile, "save", lambda file, run, extra: saved.append(run.step))

    def loop():
        for step in range(1, 12):
            clock.now += 30
            yield SimpleNamespace(step=step, losses={})

    asked = celeba_latent.Train(quiet=True, save_every=2)
    file = celeba_latent.RunFile(tmp_path, "student", asked, start=lambda: None)
    for run in file.follow(loop(), total=11):
        if run.step == 5:
            clock.now += 60
    assert saved == [4, 6, 10, 11]


# ═══ celeba_latent.py 8: samples ════════════════════════════════════════════════════════════


def samples(weights, *argv, steps=1):
    """Five pictures, uint8 (5,32,32,3), that `sample` writes here."""
    assert faces("sample", "--out", weights, "--count", 5, "--file", "samples.npz", "--steps", steps, *argv) == 0
    return np.load(f"samples-{steps}.npz")["pictures"]


@pytest.fixture
def lively(album, tmp_path, monkeypatch):
    """A weights file of a student whose pictures depend on everything; the current folder holds it alone."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(album / "run/student.pt", "lively.pt")
    net = scramble(scflow.load("lively.pt").requires_grad_(False))
    edit("lively.pt", weights=net.state_dict())
    return Path("lively.pt")


def test_sampling_places_networks_as_training_does(lively, monkeypatch):
    """On a device that is fast in bf16 they compute so; here the rule is asked, not the device."""
    asked = []
    monkeypatch.setattr(celeba_latent, "place", lambda net, device: asked.append(device) or net)
    samples(lively)
    assert asked == ["cpu"]


def test_samples_are_decoded_steps_of_the_network(lively):
    """By hand from the weights file: seeded noise, Euler steps, statistics, components (1 of 255 levels)."""
    codec = scflow.read(lively)["codec"]
    net = scflow.load(lively)
    noise = torch.randn(5, 4, 4, 4, generator=gen(3))
    for steps in (1, 2):
        z = scflow.sample(net, noise, steps) * codec["std"] + codec["mean"]
        patches = z.flatten(2).mT @ codec["weights"]["basis"].T + codec["weights"]["mean"]
        expected = 255 * scflow.unpatchify(patches, 8, 32, 32).clamp(0, 1).permute(0, 2, 3, 1)
        found = samples(lively, "--seed", 3, steps=steps)
        assert found.dtype == np.uint8
        assert np.abs(found - expected.numpy()).max() < 1


def test_samples_come_from_the_run_or_from_the_weights_file_alone(lively):
    """The same pictures; another seed gives others."""
    os.mkdir("run")
    shutil.copy(lively, "run/student.pt")
    assert np.array_equal(samples("run"), samples(lively))
    assert not np.array_equal(samples("run"), samples("run", "--seed", 1))


def test_a_grid_holds_the_samples(lively):
    """Row by row in three columns, the place that is left is white."""
    pictures = samples(lively)
    assert faces("sample", "--count", 5, "--out", lively, "--file", "grid.png") == 0
    with Image.open("grid-1.png") as image:
        grid = np.asarray(image)
    assert grid.shape == (64, 96, 3)
    for i, picture in enumerate(pictures):
        top = 32 * (i // 3)
        left = 32 * (i % 3)
        assert np.array_equal(grid[top : top + 32, left : left + 32], picture)
    assert (grid[32:, 64:] == 255).all()


def test_each_sample_keeps_its_noise_and_condition_in_any_batches(lively):
    """In batches of two the pictures are those of one batch (1 level: float32 sums)."""
    _, codec = celeba_latent.load_run(lively, "cpu")
    net = scramble(DiT((4, 4, 4), 2, dim=16, depth=1, heads=2, tokens=(3, 2)))
    noise = torch.randn(5, 4, 4, 4)
    cond = torch.randint(0, 3, (5, 3))
    together = celeba_latent.generate(net, noise, 1, codec, cond=cond)
    apart = celeba_latent.generate(net, noise, 1, codec, cond=cond, batch=2)
    assert (apart.int() - together.int()).abs().max() <= 1


# ═══ celeba_latent.py 9: the demo and its measures ══════════════════════════════════════════

DEMO = "--drawings 2100 --count 1000 --teacher-steps 12 --student-steps 12 --quiet".split()


@pytest.fixture(scope="module")
def demo(tiny_networks, tmp_path_factory):
    """The run folder of a short demo; its latents lie beside it."""
    run = tmp_path_factory.mktemp("demo") / "run"
    assert faces("demo", *DEMO, "--out", run) == 0
    return run


def test_a_demo_that_was_stopped_while_it_encoded_goes_on(demo, tmp_path, monkeypatch):
    """--resume encodes the rest bit for bit, and starts to train; with a run there, it resumes the training too."""
    resumed = []
    monkeypatch.setattr(celeba_latent, "teach", lambda asked, settings: resumed.append(asked.resume))
    monkeypatch.setattr(celeba_latent, "distil", lambda asked, schedule: resumed.append(asked.resume))
    monkeypatch.setattr(celeba_latent, "evaluate", lambda asked: None)
    argv = ["demo", *DEMO, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(celeba_latent, "picture_features", with_ctrl_c(celeba_latent.picture_features, 2))
        assert faces(*argv) == 130
    assert not resumed

    assert faces(*argv, "--resume") == 0
    assert same(folder_of_latents(tmp_path / "run-latents"), folder_of_latents(Path(f"{demo}-latents")))
    assert resumed == [False, False]

    (tmp_path / "run").mkdir()
    assert faces(*argv, "--resume") == 0
    assert resumed == [False, False, True, True]


def test_the_demo_measures_both_networks(demo):
    """A row for each network and number of steps, all finite. A sample of one step has no gap to itself."""
    metrics = read_metrics(demo)
    rows = [(row["who"], row.get("nfe")) for row in metrics["rows"]]
    expected = [("autoencoder", None), ("teacher", 1), ("teacher", 50), ("teacher, Heun", 50)]
    expected += [("student", 1), ("student", 2), ("student", 4), ("student", 8)]
    assert rows == expected
    assert (metrics["samples"], metrics["held_out"], metrics["train"]) == (1000, 210, 1890)
    for row in metrics["rows"][1:]:
        for name in ("layout", "texture", "coverage", "gap", "novelty"):
            assert math.isfinite(row[name])
        assert (row["gap"] == 0) == (row["nfe"] == 1)


def test_the_table_shows_distances_less_their_floor(demo):
    """Layout and texture of every row less the floor, coverage as it is, and the floor itself in the heading."""
    metrics = read_metrics(demo)
    floor = metrics["floor"]
    text = (demo / "metrics.md").read_text()
    assert "1000 samples against 210 held-out pictures" in text
    assert f"layout {floor['layout'][0]:.4f} ± {floor['layout'][1]:.4f}" in text
    lines = text.splitlines()[-len(metrics["rows"]) :]
    for line, row in zip(lines, metrics["rows"]):
        cells = [cell.strip() for cell in line.split("|")]
        layout = row["layout"] - floor["layout"][0]
        texture = row["texture"] - floor["texture"][0]
        assert cells[1:3] == [row["who"], str(row.get("nfe", ""))]
        assert cells[3:6] == [f"{layout:.4f}", f"{texture:.4f}", f"{row['coverage']:.4f}"]


@pytest.mark.parametrize("name", ["teacher", "student", "neighbours"])
def test_the_demo_draws_sheets(name, demo):
    """With many colours."""
    with Image.open(demo / f"{name}.png") as image:
        colours = image.convert("RGB").getcolors(10**6)
    assert len(colours) > 50


@pytest.fixture(scope="module")
def judged(demo, tmp_path_factory):
    """An evaluation in which decoded pictures stand for samples: held-out ones for the teacher's, and for the
    student's those that it was trained on. More than one step moves all of them by 8 levels.
    """
    folder = tmp_path_factory.mktemp("judged")
    run = shutil.copytree(demo, folder / "run")
    latents = shutil.copytree(f"{demo}-latents", folder / "latents")
    data = Latents(latents)
    order = torch.randperm(len(data.train), generator=gen())
    pictures = {
        "teacher": Codec(data.meta).decode(data.normalised(data.held_out.repeat(5)[:1000])),
        "student": Codec(data.meta).decode(data.normalised(data.train[order[:1000]])),
    }
    student = scflow.load(run / "student.pt").state_dict()
    sheets = {}

    def generate(net, noise, steps, codec, solver):
        is_student = same(net.state_dict(), student)
        found = pictures["student" if is_student else "teacher"]
        return found if steps == 1 else found ^ 8

    def draw_sheet(path, columns):
        sheets[path.name] = columns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(celeba_latent, "generate", generate)
        patch.setattr(celeba_latent, "draw_sheet", draw_sheet)
        assert faces("evaluate", "--out", run, "--latents", latents, "--count", 1000) == 0
    rows = {}
    for row in read_metrics(run)["rows"]:
        rows[row["who"], row.get("nfe")] = row
    floor = read_metrics(run)["floor"]
    return SimpleNamespace(rows=rows, floor=floor, sheets=sheets, data=data)


def test_held_out_pictures_beat_the_floor_and_are_new(judged):
    """The floor's training pictures are twice as far away, at least. Held-out ones are as new as they are (10%)."""
    row = judged.rows["teacher", 1]
    assert row["layout"] < 0.5 * judged.floor["layout"][0]
    assert row["coverage"] == 1
    assert abs(row["novelty"] - 1) < 0.1


def test_training_pictures_are_as_good_as_the_autoencoder_and_copies(judged):
    """They are another thousand of those that the row of the autoencoder has (4 deviations); novelty sees them."""
    row = judged.rows["student", 1]
    autoencoder = judged.rows["autoencoder", None]
    for name in ("layout", "texture"):
        mean, deviation = judged.floor[name]
        assert mean > 0
        assert abs(row[name] - autoencoder[name]) < 4 * deviation
    assert row["novelty"] < 0.5


def test_the_gap_is_to_the_sample_of_one_step(judged):
    """8 of 255 levels, for every network and any number of steps (1e-6: float32)."""
    for (who, nfe), row in judged.rows.items():
        if who != "autoencoder":
            expected = 0 if nfe == 1 else 8 / 255
            assert abs(row["gap"] - expected) < 1e-6


def test_the_sheet_of_neighbours_shows_the_nearest_training_pictures(judged):
    """The student's pictures are decoded training pictures here: the nearest of each is itself, bitwise."""
    sheet = judged.sheets["neighbours.png"]
    assert list(sheet) == ["student 1", "nearest"]
    assert len(sheet["nearest"]) == 8
    assert torch.equal(sheet["nearest"], sheet["student 1"])


def test_the_floor_is_of_training_pictures_as_many_as_samples(album):
    """Five draws, without repetition; of the numbers 1 to 5 the mean is 3, and the deviation √2.5 (1e-12)."""
    data = Latents(album / "latents")
    trained = rows_of(data.originals(data.train)[0])
    drawn = []

    def measure(thumbs, textures):
        drawn.append(rows_of(thumbs))
        return {"layout": len(drawn)}

    floor, _ = celeba_latent.floor_of(measure, data, 30, gen())
    mean, deviation = floor["layout"]
    assert mean == 3 and abs(deviation - math.sqrt(2.5)) < 1e-12
    for rows in drawn:
        assert len(rows) == 30 and rows <= trained


def test_the_floor_needs_as_many_training_pictures_as_samples(demo, capsys):
    """1,891 samples cannot be compared with 1,890 pictures: one line, and the measures stay."""
    before = contents(demo)
    assert faces("evaluate", "--out", demo, "--count", 1891) == 2
    error = capsys.readouterr().err
    assert "as many training pictures for the floor, and there are 1890" in error and error.count("\n") == 1
    assert contents(demo) == before


def test_fid_is_taken_between_samples_and_training_pictures(album, monkeypatch):
    """The library gets rows uint8 (3,S,S): all samples, and the training pictures themselves."""
    given = {}

    def calculate_metrics(input1, input2, fid, verbose):
        given["ours"] = torch.stack(list(input1))
        given["theirs"] = torch.stack(list(input2))
        return {"frechet_inception_distance": 12.5}

    library = SimpleNamespace(calculate_metrics=calculate_metrics)
    monkeypatch.setitem(sys.modules, "torch_fidelity", library)
    data = Latents(album / "latents")
    pictures = drawings(7)
    assert celeba_latent.inception_fid(pictures, data, album / "pictures") == 12.5
    assert torch.equal(given["ours"], pictures)
    assert torch.equal(given["theirs"], originals(album, data)[data.train])

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if it were not installed
    refused(celeba_latent.inception_fid, pictures, data, album / "pictures", match="pip install torch-fidelity")


def test_fid_takes_its_own_number_of_samples(demo, album, tmp_path, monkeypatch):
    """All that are drawn, which are more than the other measures take. Its values stand in the table."""
    counts = []

    def fid(pictures, data, images):
        counts.append(len(pictures))
        return 12.5

    monkeypatch.setattr(celeba_latent, "FID_SAMPLES", 1100)
    monkeypatch.setattr(celeba_latent, "fidelity", lambda: None)
    monkeypatch.setattr(celeba_latent, "inception_fid", fid)
    run = tmp_path / "run"
    shutil.copytree(demo, run)
    assert faces("evaluate", "--out", run, "--count", 1000, "--fid", album / "pictures") == 0
    assert counts == [1100] * 7
    assert "1000 samples" in (run / "metrics.md").read_text()
    assert "12.5" in (run / "metrics.md").read_text()


# ═══ celeba_latent.py 10: commands and bad input ════════════════════════════════════════════


@pytest.mark.parametrize("command", ["teacher", "distill"])
def test_help_shows_the_default_size_and_preset(command, monkeypatch, capsys):
    """Behind every text the value of `small` or, where they differ, the values of both phases of `two_phase`."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        faces(command, "--help")
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    settings = {"teacher": (celeba_latent.TEACHERS["small"],), "distill": celeba_latent.SCHEDULES["two_phase"]}
    for name, text in toy_2d.help_texts(type(settings[command][0])).items():
        values = [str(getattr(part, name)) for part in settings[command]]
        if len(set(values)) == 1:
            values = values[:1]
        assert f"{text} [{' '.join(values)}]" in said
    if command == "distill":
        assert "truncation τ: below it the consistency target is the data itself [0.0 0.4]" in said


def shorten(path):
    """Cut a file in half."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.fixture(scope="module")
def troubles(album, tmp_path_factory):
    """A copy of the album in order, and beside it everything that can be wrong."""
    at = tmp_path_factory.mktemp("troubles")
    shutil.copytree(album, at, dirs_exist_ok=True)
    config = json.loads((at / "run/config.json").read_text())
    (at / "run/config.json").write_text(json.dumps({**config, "latents": "latents"}))

    def copy_of(source, name):
        return shutil.copytree(at / source, at / name)

    # Latents. In each folder one thing is wrong.
    data = Latents(at / "latents")
    stored = np.load(at / "latents/latents.npy")
    changed = stored.copy()
    changed[0] += 1
    np.save(copy_of("latents", "changed") / "latents.npy", changed)
    shorten(copy_of("latents", "cut") / "thumbs.npy")
    shorten(copy_of("latents", "damaged") / "meta.pt")
    (copy_of("latents", "gone") / "textures.npy").unlink()
    edit(copy_of("latents", "half") / "meta.pt", complete=False)
    edit(copy_of("latents", "other") / "meta.pt", mean=data.meta["mean"] + 0.1)

    # Runs.
    taught(album, at / "unfinished")
    state = scflow.read(at / "run/teacher.pt")["state"]
    edit(at / "unfinished/teacher.pt", state={**state, "step": 2})
    shutil.copy(at / "run/student.pt", taught(album, at / "swapped") / "teacher.pt")
    (taught(album, at / "unread") / "config.json").write_text("{")
    (taught(album, at / "moved") / "config.json").write_text(json.dumps({**config, "latents": "nowhere"}))
    state = scflow.read(at / "run/student.pt")["state"]
    edit(copy_of("run", "gpu") / "student.pt", state={**state, "generator": torch.zeros(16, dtype=torch.uint8)})

    # Pictures, autoencoders, weights.
    os.mkdir(at / "empty")
    os.mkfifo(at / "empty/pipe.png")
    shutil.copytree(at / "pictures", at / "more")
    shutil.copy(at / "pictures/a/00.png", at / "more/b/00.png")
    os.mkdir(at / "foreign")
    (at / "foreign/config.json").write_text("{}")
    (at / "foreign/teacher.pt").write_text("mine")
    scflow.save(at / "points.pt", scflow.MLP(width=8))
    for name in ("alone", "cut-pair", "foreign", "nan"):
        tiny_pair(at / name)
    decoder = torch.load(at / "nan_decoder.pth")
    decoder["1.weight"] += math.nan
    torch.save(decoder, at / "nan_decoder.pth")
    (at / "alone_decoder.pth").unlink()
    shorten(at / "cut-pair_encoder.pth")
    shutil.copy(at / "points.pt", at / "foreign_encoder.pth")
    return at


FACES_ERRORS = {
    "": "name a command",
    "demo --drawings 1999": "2,000 or more",
    "demo --count 10": "1000 or more",
    "demo --drawings 3000 --count 2900": "--count 2900",
    "demo --teacher-steps 0": "teacher_steps",
    "demo --seed -1": "seed",
    "demo --out run": "--resume",
    "demo --out latents --overwrite": "latents is no run of celeba_latent.py",
    "demo --device tpu9": "tpu9",
    "encode --out new": "--images",
    "encode --images nowhere --out new": "nowhere",
    "encode --images empty --out new": "empty",
    "encode --images pictures/notes.txt --out new": "no zip of pictures",
    "encode --images points.pt --out new": "holds no",
    "encode --images pictures --out new --size 36": "multiple of 8",
    "encode --images pictures --out new --size 8": "at least 16",
    "encode --images pictures --out new --autoencoder alone": "alone_decoder.pth",
    "encode --images pictures --out new --autoencoder cut-pair": "cut-pair_encoder.pth",
    "encode --images pictures --out new --autoencoder foreign": "TAESD",
    "encode --images pictures --out new --autoencoder some/vae": "pip install 'diffusers",
    "encode --images pictures --out latents --size 32": "--resume",
    "encode --images pictures --out new --resume --overwrite": "contradict",
    "encode --images pictures --out new --resume": "nothing to resume",
    "encode --images pictures --out latents --size 32 --resume": "with other settings",
    "encode --images more --out latents --size 32 --channels 4 --flips --resume": "pictures, images",
    "encode --images pictures --out pictures --overwrite": "no folder of latents",
    "encode --images pictures --out run --overwrite": "says 'run of",
    "encode --images pictures --out latents --overwrite": "20 are needed",
    "encode --images pictures --out latents --overwrite --size 32 --channels 193": "1 to 192",
    "encode --images pictures --out latents --overwrite --size 32 --autoencoder nan": "not finite",
    "encode --images pictures --out /dev/null/latents": "cannot write",
    "teacher --out new": "a folder that encode has made",
    "teacher --out new --latents nowhere": "nowhere",
    "teacher --out new --latents run": "says 'run of celeba_latent.py'",
    "teacher --out new --latents half": "--resume",
    "teacher --out new --latents damaged": "meta.pt",
    "teacher --out new --latents cut": "thumbs.npy",
    "teacher --out new --latents gone": "textures.npy",
    "teacher --out latents --latents latents --overwrite": "latents is no run of celeba_latent.py",
    "teacher --out foreign --latents latents --overwrite": "foreign is no run of celeba_latent.py",
    "teacher --out run --latents latents --overwrite --teacher-lr 0": "teacher_lr",
    "teacher --out run --latents latents --overwrite --patch 3": "patches of 3",
    "teacher --out run --latents latents --overwrite --seed 9999999999": "too large",
    "teacher --out run --latents changed --overwrite": "checksum",
    "teacher --out run --latents latents --teacher-steps 12 --teacher-batch 16 --resume --precision bf16": "precision",
    "teacher --out new --latents latents --network XL": "XL",
    "teacher --out run --latents latents": "--resume",
    "teacher --out run --latents latents --resume": "teacher_steps, teacher_batch",
    "distill --out nowhere": "run celeba_latent.py teacher",
    "distill --out run --overwrite --latents changed": "checksum",
    "distill --out run --student-steps 12 --resume --precision bf16": "precision",
    "distill --out unfinished": "update 2",
    "distill --out swapped": "teacher.pt",
    "distill --out unread": "config.json",
    "distill --out moved": "nowhere",
    "distill --out moved --latents other": "another autoencoder",
    "distill --out run": "--overwrite",
    "distill --out run --student-steps 12 --resume --seed 5": "seed",
    "distill --out run --student-steps 12 --resume --lambda-adv 1": "schedule",
    "distill --out gpu --student-steps 12 --resume --quiet": "another device",
    "distill --out run --overwrite --lambda-self 1 --self-source frozen": "first phase",
    "sample --out nowhere": "nowhere",
    "sample --out points.pt": "points.pt",
    "sample --out run --steps 0": "step",
    "sample --out run --count 2 --file .png": ".png",
    "sample --out run --count 0": "count",
    "sample --out run --file faces.gif": ".npz",
    "sample --out run --count 2 --file nowhere/a.png": "nowhere",
    "evaluate --out run --count 100": "1000 or more",
    "evaluate --out run --count 1000": "too few",
    "evaluate --out moved --count 1000": "student.pt",
    "evaluate --out run --count 1000 --latents other": "another autoencoder",
}


@pytest.mark.parametrize("command", FACES_ERRORS)
def test_bad_input_for_faces_is_one_clear_line_and_changes_nothing(command, troubles, monkeypatch, capsys):
    """Exit code 2, one line on stderr that names the trouble, no update, and no file written or lost."""

    def update(*args):
        pytest.fail("it has begun to train")

    monkeypatch.chdir(troubles)
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    monkeypatch.setattr(scflow, "lr_factor", update)
    before = contents(troubles)
    assert faces(*command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("celeba_latent.py: error: ") and error.count("\n") == 1
    assert FACES_ERRORS[command] in error
    assert contents(troubles) == before


# ═══ Files 1: nothing is lost ═══════════════════════════════════════════════════════════════

posix = pytest.mark.skipif(os.name == "nt", reason="signals and file systems of POSIX")
WRITERS = {
    "weights": lambda path: scflow.save(path, mlp(2)),
    "text": lambda path: toy_2d.write_text(path, "new"),
    "table": lambda path: toy_2d.write_csv(path, [{"new": 1}]),
    "figure": lambda path: toy_2d.write_figure(path, toy_2d.drawing().figure()),
    "sheet": lambda path: celeba_latent.draw_sheet(path, {"new": torch.zeros(1, 3, 8, 8).byte()}),
}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_replaced_whole_or_not_at_all(name, error, tmp_path, monkeypatch):
    """Stopped when all is written, but not yet on the disk: the old file is untouched, and no other file is left."""
    path = tmp_path / "file.png"
    path.write_text("old")

    def fail(descriptor):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(type(error)) as caught:
            WRITERS[name](path)
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert contents(tmp_path) == {path: b"old"}
    WRITERS[name](path)
    assert list(contents(tmp_path)) == [path] and path.read_bytes() != b"old"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Each writes a file of its own, and none follows a link; the later one stays."""
    other = tmp_path / "other"
    other.write_text("mine")
    path = tmp_path / "file"
    path.symlink_to(other)
    with scflow.replacing(path) as first:
        with scflow.replacing(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert other.read_text() == "mine"


CHANGES = ("os.rename", "os.remove", "os.rmdir")  # what Python reports before it changes the file system


def killed(n, main, *argv):
    """Run a command in a process that is killed right before its n-th change of a file; whether there are as many."""
    child = os.fork()
    if child == 0:
        count = itertools.count(1)

        def hook(event, _):
            if event in CHANGES and next(count) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        main([str(word) for word in argv])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def finish(command, out):
    """Go on with a run that was killed, if it had begun."""
    resume = ["--resume"] if Path(out).exists() else []
    return faces(*command, "--out", out, *resume)


@posix
def test_an_encoding_that_is_killed_anywhere_resumes_bit_for_bit(album, tmp_path):
    """Before and after each file takes its name: what --resume makes of it is what an unbroken command makes."""
    command = ["encode", "--images", album / "pictures", *ENCODE]
    for n in itertools.count(1):
        out = tmp_path / str(n)
        more = killed(n, celeba_latent.main, *command, "--out", out)
        assert finish(command, out) == 0
        assert same(folder_of_latents(out), folder_of_latents(album / "latents"))
        assert not list(out.glob(f"{scflow.UNFINISHED}*"))
        if not more:
            break
    assert n > 8  # four files, or the same again, with a change before and one after each


@posix
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_training_that_is_killed_anywhere_resumes_bit_for_bit(name, album, tmp_path):
    """Weights, averages, optimisers, random numbers and log: as if the run had never been killed.

    It saves after every update. Killed are the start and the first two saves at each of their changes, then some.
    """
    command = ["teacher", "--latents", album / "latents", *TEACH, "--save-every", 0]
    if name == "student":
        command = ["distill", *DISTIL, "--save-every", 0]
    for n in [*range(1, 13), 30, 45]:
        out = tmp_path / str(n)
        if name == "student":
            taught(album, out)
        assert killed(n, celeba_latent.main, *command, "--out", out)
        assert finish(command, out) == 0
        assert same_run(out, album, name)
        assert not list(out.glob(f"{scflow.UNFINISHED}*"))


@pytest.mark.parametrize("command", ["encode --images pictures", "teacher --latents latents", "distill"])
def test_an_empty_name_is_not_the_present_folder(command, album, tmp_path, monkeypatch, capsys):
    """As of a variable of the shell that is not set."""
    shutil.copytree(album, tmp_path, dirs_exist_ok=True)
    shutil.copytree(album / "run", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert faces(*command.split(), "--out", "") == 2
    assert "give --out a folder" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_only_files_of_a_run_are_deleted(tmp_path):
    """What lies beside them stays; a folder of such a name stops it before the first deletion."""
    for name in ("metrics.json", "student.pt", "mine.pt", "mine.gif", "1_mine.png"):
        (tmp_path / name).write_text("x")
    (tmp_path / "log.csv").mkdir()
    before = contents(tmp_path)
    refused(toy_2d.clear_folder, tmp_path, toy_2d.RUN_FILES, match="log.csv is a folder")
    assert contents(tmp_path) == before
    (tmp_path / "log.csv").rmdir()
    toy_2d.clear_folder(tmp_path, toy_2d.RUN_FILES)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.pt", "mine.gif", "1_mine.png"}


OVERWRITING = {
    "encode": "encode --images pictures --size 32 --channels 4 --flips --out latents --overwrite",
    "teacher": "teacher --latents latents --out run --overwrite --quiet",
    "distill": "distill --out run --overwrite --quiet",
}


@pytest.mark.parametrize("name", OVERWRITING)
def test_what_fails_in_its_first_update_has_overwritten_nothing(name, album, tmp_path, monkeypatch):
    """As with a batch for which the memory is too small: the old files are as they were, and are used again."""
    shutil.copytree(album, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({**config, "latents": "latents"}))
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(scflow, "lr_factor", full)
    monkeypatch.setattr(PatchPCA, "encode", full)
    assert faces(*OVERWRITING[name].split()) == 2
    assert contents(tmp_path) == before


@posix
def test_a_run_that_is_killed_while_it_overwrites_can_be_overwritten(finished, tmp_path, monkeypatch):
    """Measures are there only beside all the files they belong to: the old ones, or the new ones."""
    old = read_metrics(finished)
    trained = scflow.load(finished / "student.pt")
    state = SimpleNamespace(ema=trained, target=trained)
    monkeypatch.setattr(toy_2d, "fit_teacher", lambda *_: trained)
    monkeypatch.setattr(toy_2d, "fit_student", lambda *_: state)
    new = {**old, "seed": 77}
    monkeypatch.setattr(toy_2d, "measure", lambda *_: dict(new))
    run = tmp_path / "run"
    command = [*SILENT, "--out", run, "--overwrite"]
    for n in itertools.count(1):
        shutil.copytree(finished, run)
        more = killed(n, toy_2d.main, *command)
        if (run / "metrics.json").exists():
            files = {path.name for path in run.iterdir()}
            assert {"config.json", "teacher.pt", "student.pt", "log.csv"} <= files
            untouched = scflow.read(run / "student.pt")["rows"] == scflow.read(finished / "student.pt")["rows"]
            assert read_metrics(run)["seed"] == (0 if untouched else 77)
        assert toy(*command) == 0
        assert read_metrics(run)["seed"] == 77
        shutil.rmtree(run)
        if not more:
            break
    assert n > 20


@pytest.fixture
def small_disk(tmp_path):
    """A disk of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


FULL_DISK = {
    "run": "toy {short} --out {disk}/new --width 64",
    "overwritten run": "toy {short} --out {disk}/run --overwrite --width 512",
    "figures": "toy plot --out {disk}/run --figures all",
    "film": "toy plot --out {disk}/run --figures none --gif",
    "latents": "faces encode --images {album}/pictures --size 32 --channels 4 --out {disk}/new --quiet",
    "teacher": "faces teacher --latents {album}/latents --teacher-steps 3 --quiet --out {disk}/new",
    "sheet": "faces sample --out {album}/run --count 900 --file {disk}/new.png",
    "array": "faces sample --out {album}/run --count 900 --file {disk}/new.npz",
}


@pytest.mark.parametrize("case", FULL_DISK)
def test_a_full_disk_is_one_line_and_leaves_no_broken_file(case, small_disk, finished, album, tmp_path, capsys):
    """Files that were there are whole, or gone if they were to be overwritten; of new ones each is whole."""
    run = small_disk / "run"
    run.mkdir()
    for name in ("config.json", "metrics.json", "student.pt", "teacher.pt"):
        shutil.copy(finished / name, run)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filling").write_bytes(bytes(free - 64 * 1024))
    before = contents(small_disk)
    program, *argv = FULL_DISK[case].format(short=" ".join(SILENT), disk=small_disk, album=album).split()
    assert {"toy": toy, "faces": faces}[program](*argv) == 2
    error = capsys.readouterr().err
    assert "error: cannot write" in error and error.count("\n") == 1
    for path, content in contents(small_disk).items():
        assert not path.name.startswith(scflow.UNFINISHED)
        if path in before and "overwritten" not in case:
            assert content == before[path]
        elif path.suffix == ".pt":
            scflow.load(path)
        elif path.suffix == ".json":
            toy_2d.read_json(path)
        elif path.suffix == ".png":
            Image.open(path).load()


# ═══ Files 2: nothing damaged is accepted in silence ════════════════════════════════════════


def harm(whole, rng):
    """One of five kinds of damage, somewhere."""
    at = rng.integers(len(whole))
    length = 1 + rng.integers(64)
    noise = rng.bytes(length)
    flipped = bytes([whole[at] ^ 1 << rng.integers(8)])
    kinds = {
        "a bit": whole[:at] + flipped + whole[at + 1 :],
        "cut off": whole[:at],
        "a piece lost": whole[:at] + whole[at + length :],
        "a piece added": whole[:at] + noise + whole[at:],
        "a piece replaced": whole[:at] + noise + whole[at + length :],
    }
    return kinds[rng.choice(list(kinds))]


def plotted(path):
    pictures = toy_2d.Pictures(path.parent)
    return pictures.curves, pictures.schedule


def decoded(path):
    pictures = Pictures(path)
    return pictures.read_all(pictures.names, 32)


# A file, what reads it, and whether what is read must be the same (else: anything, without another error).
READERS = {
    "run/student.pt": (lambda path: scflow.load(path).state_dict(), True),
    "run/metrics.json": (plotted, False),
    "run/config.json": (plotted, False),
    "latents/meta.pt": (lambda path: Latents(path.parent).meta["mean"], True),
    "latents/latents.npy": (lambda path: Latents(path.parent).normalised(torch.arange(40), mirrored=True), True),
    "latents/config.json": (lambda path: Latents(path.parent).shape, True),
    "pair_encoder.pth": (lambda path: TinyAutoencoder.read(path.parent / "pair").state_dict(), True),
    "points.npy": (lambda path: toy_2d.Points(path).train, False),
    "pictures.zip": (decoded, False),
}


@pytest.mark.parametrize("name", READERS)
def test_random_damage_is_refused_or_harmless(name, finished, album, tmp_path):
    """A hundred damages of each kind of file: a ValueError of one line, or what is read is as it was."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(album / "latents", tmp_path / "latents")
    save_points(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(100, 2)))
    tiny_pair(tmp_path / "pair")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in sorted((album / "pictures/a").iterdir())[:6]:
            archive.write(path, path.name)

    read, exact = READERS[name]
    path = tmp_path / name
    whole = path.read_bytes()
    good = read(path)
    rng = np.random.default_rng(1)
    refusals = 0
    for _ in range(100):
        path.write_bytes(harm(whole, rng))
        try:
            found = read(path)
        except ValueError as error:
            assert "\n" not in str(error)
            refusals += 1
        else:
            assert not exact or same(found, good)
    assert refusals > (50 if exact else 10)


# ═══ Files 3: how a program ends ════════════════════════════════════════════════════════════


def test_a_terminal_that_knows_no_greek_is_no_error():
    """In --help stand θ⁻ and δ."""
    program = [sys.executable, toy_2d.__file__, "--help"]
    done = subprocess.run(program, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    assert b"\\u03b8" in done.stdout


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_no_error(name, tmp_path, monkeypatch):
    """With tables on the one, and progress bars on the other; Python puts None in its place."""
    monkeypatch.setattr(sys, name, None)
    assert toy(*SHORT_RUN, "--figures", "none", "--out", tmp_path / "run") == 0
    assert toy(*SHORT_RUN, "--out", tmp_path / "run") == 2


WITHOUT_MEMORY = {
    "python": MemoryError(),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB."),
}


@pytest.mark.parametrize("error", WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)
def test_running_out_of_memory_says_what_to_lower(error, tmp_path, monkeypatch, capsys):
    """One line, exit code 2, and no folder."""

    def full(*_):
        raise error

    monkeypatch.setattr(scflow, "flow_matching_loss", full)
    assert toy(*SILENT, "--out", tmp_path / "run") == 2
    output = capsys.readouterr().err
    assert "out of memory" in output and "--teacher-batch" in output and output.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_error_that_nobody_expected_says_where_it_happened(tmp_path, monkeypatch, capsys):
    """Its kind, its words, file and line, and how to see the rest."""

    def wrong(*_):
        return {}["key"]

    monkeypatch.setattr(scflow, "flow_matching_loss", wrong)
    assert toy(*SILENT, "--out", tmp_path / "run") == 2
    output = capsys.readouterr().err
    assert re.search(r"KeyError: 'key' \(test_scflow.py, line \d+; python -X dev", output) and output.count("\n") == 1
