"""The mathematics of scflow.py as tests: path, samplers, truth, losses, training, networks, guidance, files.

Each docstring says what is shown, and why its tolerance. Exact statements run in double precision (`@exact`).
Random ones have fixed seeds; a z-score says how many standard errors a mean lies from where it should be.
"""

import copy
import itertools
import math
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

# A machine with a GPU runs the tests on its CPU, too. SCFLOW_TEST_CUDA=0 shows them GPU 0.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("SCFLOW_TEST_CUDA", "")

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scflow
import toy_2d
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


@pytest.mark.parametrize("std", [0.15, 1.7])
def test_the_exact_velocity_is_the_mean_of_the_slopes(std):
    """E[(x₁ − x₀ − v*(x_t,t))·h(x_t,t)] = 0 for several functions h: |z| < 4. A teacher can learn no more."""
    truth = Gaussian(std)
    generator = gen()
    x0 = truth.sample(50_000, generator)
    x1 = torch.randn(50_000, 2, generator=generator)
    t = torch.rand(50_000, generator=generator)
    xt = scflow.interpolate(x0, x1, t)
    rest = x1 - x0 - truth.velocity(xt, t)
    for h in (torch.ones_like(xt), xt, xt.flip(1), (3 * xt).sin()):
        assert z_scores(rest * h).abs().max() < 4


# ═══ 4. Losses ══════════════════════════════════════════════════════════════════════════════


def reference_losses(run, p, x0, x1, t, generator, label):
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
def test_losses_and_their_gradients_equal_the_reference(variant):
    """Values and the student's gradients agree with `reference_losses` (rounding: 1e-9), loss by loss."""
    p = phase(**ALL_FOUR, **VARIANTS[variant])
    run = networks()
    x0, x1, t, label = draw(32)
    ours, judged = distill_losses(run, x0, x1, t, p, p.weights(0), gen(5), label)
    theirs, judged_too = reference_losses(run, p, x0, x1, t, gen(5), label)
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
def test_the_neighbours_fill_the_window():
    """s fills [t − min(t,δ), t] and u fills [t, t + min(1−t,δ)], to 1% of both ends (2,000 rows)."""
    seen = []

    def target(x, times, cond):
        seen.append(times)
        return x

    run = networks()
    run.target = target
    x0, x1, t, label = draw(2000)
    losses_of(run, phase(**ALL_FOUR, delta=0.2), x0, x1, t, label)
    s, u = seen
    back = (t - s) / t.clamp(max=0.2)
    ahead = (u - t) / (1 - t).clamp(max=0.2)
    for share in (back, ahead):
        assert 0 <= share.min() < 0.01
        assert 0.99 < share.max() <= 1


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
    "softplus and R1": {"adversarial": "softplus", "r1": 0.5},
    "pinned and judged": {"pinned": 0.25, "judged": 0.5},
    "heun and warm-up": {"walk": "heun", "warmup": 1},
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
        opt.param_groups[0]["lr"] = p.lr * scflow.lr_factor(i, p.steps)
        opt_critic.param_groups[0]["lr"] = p.lr_critic
        x0, label = labelled(p.batch, generator)
        x1 = torch.randn(x0.shape, generator=generator)
        t = torch.rand(p.batch, generator=generator)
        t[: round(p.pinned * p.batch)] = 1

        losses, x0_hat = reference_losses(hand, p, x0, x1, t, generator, label)
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


def test_warm_up_is_a_weight_that_starts_late():
    """Self-correction and the bidirectional loss appear after `warmup` updates of the phase, not before."""
    early = {"consistency", "adv", "critic"}
    names = [run.losses.keys() for run in student_loop((phase(**ALL_FOUR, warmup=2, steps=3),))]
    assert names == [early, early, early | {"self", "bi"}]


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


def test_the_next_phase_starts_from_the_average():
    """Student, target and frozen copy become the average bitwise, Adam's moments go, the critic's stay."""
    run = take(student_loop((FIRST,)))
    average = weights_of(run.ema)
    assert not same(run.student.state_dict(), average)
    scflow.next_phase(run)
    for name in ("student", "target", "frozen", "ema"):
        assert same(getattr(run, name).state_dict(), average)
    assert len(run.opt.state) == 0
    assert len(run.opt_critic.state) > 0


def test_the_frozen_copy_stands_still_and_the_average_moves():
    """Through the second phase 'frozen' keeps every bit, and 'ema' changes at each update."""
    loop = student_loop()
    frozen = weights_of(take(loop, 3).ema)
    latest = frozen
    for run in loop:
        assert same(run.frozen.state_dict(), frozen)
        assert not same(run.ema.state_dict(), latest)
        latest = weights_of(run.ema)


class Numbered(nn.Module):
    """A network, or a critic, whose condition must be the number of the row."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args):
        *inputs, cond = args
        rows = len(inputs[0])
        assert torch.equal(cond, torch.arange(rows)[:, None])
        return self.net(*inputs)


@pytest.mark.parametrize("judged", [1.0, 0.25])
@pytest.mark.parametrize("source", ["student", "ema"])
def test_conditions_reach_every_pass(source, judged):
    """Every network (for R1, too) gets each row's own condition, whatever share is judged."""

    def numbered(n, generator):
        x0, _ = batch(n, generator)
        return x0, torch.arange(n)[:, None]

    p = phase(**ALL_FOUR, r1=1.0, self_source=source, judged=judged, walk="heun", steps=2)
    run = take(distill(Numbered(mlp()), Numbered(point_critic()), numbered, gen(), (p,)))
    assert run.step == 2


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
@pytest.mark.parametrize("oracle", [None, exact_teacher])
def test_the_teachers_training_equals_a_hand_written_loop(oracle):
    """Five updates regress on x₁ − x₀, or on the oracle, with some conditions dropped (1e-9: rounding)."""
    settings = replace(SHORT, teacher_drop=0.25)
    run = take(train_teacher(mlp(2, LABEL), labelled, gen(3), settings, oracle))
    net = mlp(2, LABEL)
    average = mlp(2, LABEL)
    opt = adamw_by_hand(net)
    generator = gen(3)
    for i in range(5):
        opt.param_groups[0]["lr"] = 1e-2 * scflow.lr_factor(i, 5)
        x0, label = labelled(32, generator)
        x1 = torch.randn(32, 2, generator=generator)
        t = torch.rand(32, generator=generator)
        xt = (1 - t)[:, None] * x0 + t[:, None] * x1
        kept = torch.rand(32, 1, generator=generator) >= 0.25
        target = x1 - x0 if oracle is None else oracle(xt, t)
        loss = (net(xt, t, label * kept) - target).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        scflow.ema_update(average, net, scflow.growing(i, 0.9999))
    assert close(run.net, net, 1e-9)
    assert close(run.ema, average, 1e-9)


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


def test_a_run_repeats_itself():
    """The same seeds give the same run bitwise, another seed another run."""
    first = take(student_loop(seed=0))
    again = take(student_loop(seed=0))
    other = take(student_loop(seed=1))
    assert same(first.ema.state_dict(), again.ema.state_dict())
    assert not same(first.ema.state_dict(), other.ema.state_dict())


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
    return out


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


def test_the_dit_starts_as_the_zero_map_with_closed_gates():
    """At first the output is exactly 0, and every block returns its tokens bitwise."""
    net = DiT(LATENT, patch=2, dim=16, depth=3, heads=2)
    assert net(torch.randn(3, *LATENT), torch.rand(3)).abs().max() == 0
    tokens = torch.randn(3, 6, 16)
    for block in net.blocks:
        assert torch.equal(block(tokens, torch.randn(3, 16)), tokens)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patches_and_latents_are_two_forms_of_one_thing(p):
    """Cut and put together again, an oblong latent is the same bitwise; the first token is its corner."""
    x = torch.randn(2, 3, 8, 12)
    tokens = scflow.patchify(x, p)
    assert tokens.shape == (2, 96 // p**2, 3 * p * p)
    assert torch.equal(scflow.unpatchify(tokens, p, 8, 12), x)
    first = x[0, :, :p, :p].permute(1, 2, 0).flatten()
    assert torch.equal(tokens[0, 0], first)


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


def test_one_batch_is_learned_by_heart():
    """With x₀, x₁ and t fixed the flow loss falls below 1% of its start."""
    net = MLP(2, width=64, depth=2)
    x0, x1, t, _ = draw(8)
    xt = scflow.interpolate(x0, x1, t)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(200):
        loss = scflow.flow_matching_loss(net(xt, t), x0, x1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


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


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_old_file(error, tmp_path, monkeypatch):
    """When writing stops half-way the old file is whole, and no other file is left."""
    path = tmp_path / "net.pt"
    scflow.save(path, mlp(1))

    def broken(content, file):
        file.write(b"half a file")
        raise error

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(type(error)):
        scflow.save(path, mlp(2))
    assert same(scflow.load(path).state_dict(), mlp(1).state_dict())
    assert os.listdir(tmp_path) == ["net.pt"]


KILLED_SAVE = """
import os, signal, sys
import torch
import scflow

def half(content, file):
    file.write(b"half a file")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
scflow.save(sys.argv[1], scflow.MLP())
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_killed_save_keeps_the_old_file(tmp_path):
    """A program that is killed while it writes leaves the old file whole, and the next save goes through."""
    path = tmp_path / "net.pt"
    scflow.save(path, mlp(1))
    folder = Path(scflow.__file__).parent
    done = subprocess.run([sys.executable, "-c", KILLED_SAVE, path], cwd=folder, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert same(scflow.load(path).state_dict(), mlp(1).state_dict())
    scflow.save(path, mlp(2))
    assert same(scflow.load(path).state_dict(), mlp(2).state_dict())


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
    for thing in ([1, 2], mlp().state_dict(), mlp(), {"format": "other"}):
        torch.save(thing, path)
        refused(scflow.load, path)


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
