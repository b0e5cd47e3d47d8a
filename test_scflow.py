"""Properties of scflow.py, in the order of its sections. Every docstring says what is tested and why its tolerance.

Exact statements run in float64 (fixture `float64`), and random ones are z-scores of a fixed seed. Run `pytest -q`.
"""

import copy
import itertools
import math
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import scflow
from scflow import DiT, EnergyDistance, GaussianMixture, LatentDiscriminator, MLP, Phase, PointDiscriminator
from scflow import TeacherSettings, distill, distill_losses, predict_x0, sample, train_teacher

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
    _, slope = torch.func.jvp(lambda t: scflow.interpolate(x0, x1, t), (t,), (torch.ones(64),))
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


# ═══ 3. Ground truth ════════════════════════════════════════════════════════════════════════


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


# ═══ 4. Settings and schedules ══════════════════════════════════════════════════════════════


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


# ═══ 5. Networks ════════════════════════════════════════════════════════════════════════════


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
        tokens = torch.stack([x[b, :, i * p : i * p + p, j * p : j * p + p].permute(1, 2, 0).flatten() for i, j in cells])
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: scflow.patchify(torch.randn(1, 2, 5, 4), 2),
        lambda: scflow.patchify(torch.randn(1, 2, 4, 6), 4),
        lambda: scflow.unpatchify(torch.randn(1, 6, 8), 2, 4, 4),
        lambda: scflow.unpatchify(torch.randn(1, 4, 7), 2, 4, 4),
        lambda: scflow.unpatchify(torch.randn(1, 3, 16), 4, 6, 8),
        lambda: DiT((1, 6, 5), 2, dim=16, depth=1, heads=2),
        lambda: DiT((1, 4, 4), 2, dim=16, depth=1, heads=3),
    ],
)
def test_what_does_not_divide_is_refused(make):
    """Sizes that do not divide are a one-line ValueError, not a wrong shape or another library's error."""
    with pytest.raises(ValueError) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "net, shape",
    [
        (MLP(3, width=24, depth=2), (3,)),
        (DiT((2, 4, 6), 2, dim=16, depth=3, heads=2, ratio=2), (2, 4, 6)),
        (DiT((4, 8, 8), 1, dim=32, depth=1, heads=4), (4, 8, 8)),
    ],
)
def test_flops_are_those_counted(net, shape):
    """flops() equals torch's count exactly (MATH attention forced: the counter sees nothing in the fused kernel)."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(torch.randn(1, *shape), torch.rand(1))
    assert net.flops() == counter.get_total_flops()


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
