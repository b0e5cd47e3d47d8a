# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. Flow matching
#
# **Question.** Straight lines from noise to data cross each other. The paths of a flow never do. What does a network
# learn that is trained on the lines, and what does the crossing cost?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/01_flow_matching.ipynb)

# %%
import math
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, "..")  # a clone holds scflow.py and toy_2d.py one folder up,
sys.path.insert(0, ".")  # or here
try:
    import toy_2d
except ImportError:  # a hosted notebook: fetch them once
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "git+https://github.com/OWNER/REPO"], check=True)
    import toy_2d
import scflow
from experiments.lecture import exercise
from toy_2d import GREY, STUDENT, TEACHER, GaussianMixture

GREEN = "#009E73"
torch.set_num_threads(1)  # networks this small run best in one thread
plt.rcParams.update(toy_2d.STYLE)
plt.rcParams["figure.dpi"] = 72
plt.rcParams["lines.linewidth"] = 2

# %% [markdown]
# ## Lines that cross
#
# Data x₀ at t = 0, Gaussian noise x₁ at t = 1, drawn **apart from each other** and joined by a line,
# x_t = (1−t)·x₀ + t·x₁. Its velocity is v = x₁ − x₀, the same all along.
#
# In the plane two lines may cross on the page and yet be there at different times. So we start with numbers instead of
# points, and draw t as an axis. In such a picture a crossing is a meeting.

# %%
two = GaussianMixture([[-1.5], [1.5]], std=0.25, weights=[1.0, 2.0])  # the upper mode is twice as likely
generator = torch.Generator().manual_seed(0)
n = 2000
x0, _ = two.sample(n, generator)  # (n,1)
x1 = torch.randn(n, 1, generator=generator)

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
some = torch.cat([x1, x0], 1)[:60]  # (60,2): start and end of sixty lines
ax.plot([1, 0], some.T, color=GREY, lw=0.8)
ax.scatter(torch.ones(60), some[:, 0], s=14, zorder=3, color=TEACHER)
ax.scatter(torch.zeros(60), some[:, 1], s=14, zorder=3, color=STUDENT)
ax.set(xlabel="t  (noise on the left, data on the right)", ylabel="x")
ax.set(xlim=(1.02, -0.02), ylim=(-3.6, 3.6))
plt.show()

# %% [markdown]
# *What to see: a tangle. Through one place, at one time, go lines to both modes.*
#
# How many pairs of lines meet? Those whose order at t = 0 is not that at t = 1. Noise and data are independent, so
# both orders are equally likely.


# %%
def share_that_meet(starts, ends):
    """Share of the pairs of lines whose order at the end is not that at the start, (n,1) each."""
    at_start = starts - starts.T  # (n,n)
    at_end = ends - ends.T
    turned = at_start * at_end < 0
    pairs = len(starts) * (len(starts) - 1)
    return turned.sum().item() / pairs


meeting = share_that_meet(x1, x0)
print(f"pairs of lines that meet: {meeting:.3f}")
assert abs(meeting - 0.5) < 0.04  # every second pair

# %% [markdown]
# ## The mean over the lines
#
# Train a network on ‖ v(x_t,t) − (x₁−x₀) ‖². It sees the place and the time, not the line. A squared fit answers with
# the mean over all lines through that place:
#
# **v\*(x,t) = E[ x₁ − x₀ | x_t = x ]**
#
# For a Gaussian mixture this is a formula, and a `GaussianMixture` is called like a network to give it. Is it
# right? Draw many lines and take the mean by hand.

# %%
many = 1_000_000
x0, _ = two.sample(many, generator)
x1 = torch.randn(many, 1, generator=generator)
v = x1 - x0
halfway = (x0 + x1) / 2
passing = v[halfway.abs() < 0.02]  # of the lines that pass x = 0 at t = ½
exact = two(torch.zeros(1, 1), torch.tensor([0.5])).item()
print(f"{len(passing)} lines pass x = 0 at t = ½: their mean velocity is {passing.mean():.3f}, and v* is {exact:.3f}")
assert abs(passing.mean() - exact) < 0.1
near = (passing - exact).abs() < 0.3
assert near.float().mean() < 0.01  # hardly a line has that velocity

# %% [markdown]
# The same for every place at once, at three times. In each narrow bin the mean over the lines must be that of v\*, up
# to the error of a finite sample.

# %%
edges = torch.linspace(-2.5, 2.5, 51)
dots = {}
for t in (0.8, 0.5, 0.2):
    times = torch.full((many,), t)
    xt = scflow.interpolate(x0, x1, times)
    difference = v - two(xt, times)
    number = torch.bucketize(xt[:, 0], edges)  # of the bin; 0 and 51 are outside
    dots[t] = []
    for b in range(1, 51):
        inside = number == b
        rest = difference[inside]
        if len(rest) > 500:
            error = rest.std() / math.sqrt(len(rest))
            assert rest.mean().abs() < 5 * error  # nothing but the error of the sample
            centre = (edges[b - 1] + edges[b]) / 2
            dots[t].append((centre, v[inside].mean()))

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
axes[0].hist(passing.numpy(), 60, color=GREY)
axes[0].axvline(exact, color=TEACHER, label="v*")
axes[0].set(xlabel="velocity of the lines through x = 0, t = ½", ylabel="lines")
places = torch.linspace(-2.5, 2.5, 300)
for t, color in zip(dots, (STUDENT, TEACHER, GREEN)):
    formula = two(places[:, None], torch.full((300,), t))
    axes[1].plot(places, formula, color=color, lw=1.5, label=f"t = {t}")
    axes[1].plot(*zip(*dots[t]), "o", color=color)
axes[1].set(xlabel="x", ylabel="v*(x,t)", ylim=(-4, 4))
for ax in axes:
    ax.legend()
plt.show()

# %% [markdown]
# *What to see: left, lines through one place go one of two ways, and hardly one at v\*. Right, the dots are means
# over lines, the curves the formula. As t falls, v\* turns from one mode to the other within a shorter and shorter
# way.*

# %% [markdown]
# **Exercise.** Find the formula. For one Gaussian N(m, s²I), x₀ and x_t are jointly Gaussian, so that the mean of
# x₁ − x₀ is linear in x. With σ_t² = (1−t)²s² + t² the slope of x₀ on x_t is (1−t)s²/σ_t², and that of x₁ is t/σ_t².
# For a mixture, weigh the answers of the components: how likely is each to have sent the line through x?


# %%
def one_gaussian(x, t, m, s):
    """E[x₁ − x₀ | x_t = x] for x₀ ~ N(m, s²I); x is (B,d), t is (B,1), m is (d,)."""
    return ...  # your answer


def responsibilities(x, t, means, s, weights):
    """γ_k(x,t), the probability that a line through (x,t) comes from component k, (B,K)."""
    return ...  # your answer


# %%
eight = toy_2d.dataset("8gaussians")  # eight modes on a circle in the plane


@exercise
def check():
    for mixture in (two, eight):
        dim = mixture.means.shape[1]
        x = 2 * torch.randn(500, dim)
        t = 0.05 + 0.95 * torch.rand(500, 1)
        each = torch.stack([one_gaussian(x, t, m, mixture.std) for m in mixture.means], 1)  # (B,K,d)
        gamma = responsibilities(x, t, mixture.means, mixture.std, mixture.weights)  # (B,K)
        mine = (gamma[..., None] * each).sum(1)
        assert torch.allclose(mine, mixture(x, t[:, 0]), rtol=1e-3, atol=1e-3)


# %% jupyter={"source_hidden": true}
# Solution
def one_gaussian(x, t, m, s):
    var = ((1 - t) * s) ** 2 + t**2
    return -m + (t - (1 - t) * s**2) / var * (x - (1 - t) * m)


def responsibilities(x, t, means, s, weights):
    moved = (1 - t)[:, None] * means  # (B,K,d): the centres at time t
    square = (x[:, None] - moved).square().sum(-1)  # (B,K)
    var = ((1 - t) * s) ** 2 + t**2
    return (weights.log() - square / (2 * var)).softmax(1)


check()

# %% [markdown]
# ## The flow that does not cross
#
# Follow v\* from the noise down to t = 0. Two paths never meet: from a common place they would have to go on
# together.

# %%
quantiles = (torch.arange(400) + 0.5) / 400
noise = torch.special.ndtri(quantiles)[:, None]  # 400 numbers spread like noise, in order
times = torch.linspace(1, 0, 201)
_, path = scflow.sample(two, noise, steps=200, solver="heun", trajectory=True)  # (201,400,1)
assert (path.diff(dim=1) > 0).all()  # at every time they are in the order in which they started


def shade(ax, mixture):
    """The density of x_t in grey, and the axes of a picture over t."""
    x = torch.linspace(-3, 3, 200)[:, None]
    columns = []
    for t in torch.linspace(1, 0, 200):
        density = mixture.log_density(x, t.expand(200)).exp()
        columns.append(density.sqrt())
    picture = torch.stack(columns, 1)
    ax.imshow(picture, "Greys", extent=(1, 0, -3, 3), origin="lower", aspect="auto", vmax=1.8)
    ax.set(xlabel="t", xlim=(1, 0), ylim=(-3, 3))


# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
for ax in axes:
    shade(ax, two)
some = torch.cat([x1, x0], 1)[:40]
axes[0].plot([1, 0], some.T, color=TEACHER, lw=0.8)
axes[1].plot(times, path[:, 5::10, 0], color=STUDENT, lw=0.8)
axes[0].set(title="lines: what is trained on", ylabel="x")
axes[1].set_title("v*: what is learned")
plt.show()

# %% [markdown]
# *What to see: the same density at every t, in grey, and other paths. The lines are straight and cross. The paths of
# v\* do not cross, so they bend: at first all go towards the mean of the data, then they part.*

# %% [markdown]
# Why is the density the same? What flows through a place is counted there as density times *mean* velocity. Who goes
# which way does not matter: at each meeting the lines may swap partners.
#
# **Exercise.** On a line this fixes the flow. No path overtakes another, so the share of the mass below a path stays
# what it was: F_t(x_t) = Φ(x₁). Write F_t, the distribution function of x_t.


# %%
def share_below(x, t, means, s, weights):
    """P(x_t < x) for the mixture, x of shape (B,1) and one t; Φ is torch.special.ndtr."""
    return ...  # your answer


# %%
@exercise
def check():
    for x, t in zip(path, times):
        error = share_below(x, t, two.means, two.std, two.weights) - quantiles
        assert error.abs().max() < 5e-3


# %% jupyter={"source_hidden": true}
# Solution
def share_below(x, t, means, s, weights):
    sigma = (((1 - t) * s) ** 2 + t**2) ** 0.5
    below = torch.special.ndtr((x - (1 - t) * means[:, 0]) / sigma)  # (B,K)
    return (weights * below).sum(1)


check()

# %%
upward = (path[-1] > 0).float().mean().item()
print(f"share of the noise that goes to the upper mode: {upward:.4f}")
assert abs(upward - 2 / 3) < 0.005  # the flow cuts the noise where the weights say

# %% [markdown]
# The same in the plane, with eight modes. A point keeps the colour of its noise.

# %%
x0, _ = eight.sample(n, generator)
x1 = torch.randn(n, 2, generator=generator)
_, flow = scflow.sample(eight, x1, steps=60, solver="heun", trajectory=True)  # (61,n,2)
times = torch.linspace(1, 0, 61)
lines = torch.stack([scflow.interpolate(x0, x1, t.expand(n)) for t in times])
colors = toy_2d.by_angle(x1)

# %%
fig, axes = plt.subplots(2, 5, figsize=(10, 4.4))
for column, i in zip(axes.T, (0, 15, 30, 45, 60)):
    toy_2d.cloud(column[0], lines[i, :500], f"t = {1 - i / 60:g}", colors[:500])
    toy_2d.cloud(column[1], flow[i, :500], "", colors[:500])
axes[0, 0].set_ylabel("lines")
axes[1, 0].set_ylabel("v*")
plt.show()

# %%
for i in (15, 30, 45, 60):
    distance = toy_2d.EnergyDistance(lines[i])
    print(f"t = {1 - i / 60:g}: energy distance of the two clouds {distance(flow[i]):.4f}")
    assert distance(flow[i]) < 0.01  # the same law

# %% [markdown]
# *What to see: the two clouds in a column have the same law. Along the lines the colours are mixed; along v\* every
# colour stays together.*

# %%
if "get_ipython" in globals():  # a notebook, not a program
    from IPython.display import HTML, display
    from matplotlib.animation import FuncAnimation

    fig, axes = plt.subplots(1, 2, figsize=(6, 3.2), dpi=45)

    def frame(i):
        for ax, name, points in zip(axes, ("lines", "v*"), (lines, flow)):
            ax.clear()
            toy_2d.cloud(ax, points[10 * i, :100], f"{name}, t = {1 - i / 6:.2f}", colors[:100])

    movie = FuncAnimation(fig, frame, 7, interval=300)
    display(HTML(movie.to_jshtml(default_mode="reflect")))
    plt.close(fig)

# %% [markdown]
# ## What the crossing costs
#
# The lines are longer than they need be. Where does the rest go? Take squares, and the mean over everything.
#
# - At one place: v\* is a mean, so (length of the lines)² = (v\*)² + (**spread** of the lines around v\*)².
# - Along one path: the mean of v\* is its chord x₁ − x̂₀, so (v\*)² = (chord)² + (**bend** of v\* around the chord)².
#
# Together: **lines² = chord² + bend² + spread²**. The spread is the least value of the training loss. The bend is
# what makes few steps fail.


# %%
def accounts(mixture, n=8000, steps=50):
    """Mean squares of chord, bend and spread, per dimension."""
    x0, _ = mixture.sample(n, generator, stratified=True)
    x1 = torch.randn(x0.shape, generator=generator)
    x0_hat, path = scflow.sample(mixture, x1, steps, "heun", trajectory=True)
    bend = []
    spread = []
    for x, t in zip(path, torch.linspace(1, 0, steps + 1)):
        t = t.expand(n)
        xt = scflow.interpolate(x0, x1, t)
        bend.append(scflow.squared(mixture(x, t), x1 - x0_hat))
        spread.append(scflow.squared(mixture(xt, t), x1 - x0))
    bend = torch.trapezoid(torch.stack(bend), dx=1 / steps)
    spread = torch.trapezoid(torch.stack(spread), dx=1 / steps)
    chord = scflow.squared(x1, x0_hat)
    return chord.item(), bend.item(), spread.item()


# %%
one = GaussianMixture([[0.0, 0.0]], std=1.0)  # data that are themselves N(0, I)
worlds = {"one Gaussian": one, "two modes": two, "eight modes": eight}
books = {}
for name, mixture in worlds.items():
    chord, bend, spread = accounts(mixture)
    books[name] = chord, bend, spread
    square = mixture.std**2 + (mixture.weights @ mixture.means**2).mean().item()  # of the data
    total = 1 + square  # of the lines: noise and data are independent
    print(f"{name:12s} lines² {total:.3f} = chord² {chord:.3f} + bend² {bend:.3f} + spread² {spread:.3f}")
    assert abs(chord + bend + spread - total) < 0.05 * total
    assert min(bend, spread) > 0.1
    assert chord < bend + spread

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
still = GaussianMixture([[0.0]], std=1.0)
shade(axes[0], still)
_, path = scflow.sample(still, noise[10::20], 50, "heun", trajectory=True)  # (51,20,1)
times = torch.linspace(1, 0, 51)
axes[0].plot(times, path[..., 0], color=STUDENT, lw=1)
axes[0].set(ylabel="x", title="data = noise, and yet the flow moves")
parts = {"chord²": STUDENT, "bend²": TEACHER, "spread²": GREY}
left = torch.zeros(3)
for i, part in enumerate(parts):
    width = torch.tensor([book[i] for book in books.values()])
    axes[1].barh(list(books), width, 0.6, left, color=parts[part], label=part)
    left = left + width
axes[1].set(xlabel="mean square per dimension", ylim=(-0.5, 3.3))
axes[1].legend(ncol=3, loc="upper left")
plt.show()

# %% [markdown]
# *What to see: left, data that are noise already. To stand still would do, but the lines do not know that: on the
# average they first run together. Right, the accounts. In all three the larger part is not the way from noise to data.*

# %%
assert torch.allclose(path[25], path[0] / math.sqrt(2), atol=1e-3)  # σ_t is least at t = ½
assert torch.allclose(path[50], path[0], atol=1e-3)

# %% [markdown]
# **Exercise.** For one Gaussian N(m, s²I) the spread has a closed form: v = (x_t − x₀)/t, so at a given t it is the
# variance of x₀ given x_t, over t². That variance is s²t²/σ_t². Now take the mean over t from 0 to 1. (Hint:
# u = t/(1−t).)


# %%
def mean_spread(s):
    """∫ s²/σ_t² dt from 0 to 1, with σ_t² = (1−t)²s² + t²: the floor of the loss per dimension."""
    return ...  # your answer


# %%
@exercise
def check():
    for s in (0.3, 1.0, 2.0):
        _, bend, spread = accounts(GaussianMixture([[1.0, -0.5]], s))
        assert abs(spread - mean_spread(s)) < 0.03 * mean_spread(s)
        assert abs(bend - (2 * s - mean_spread(s))) < 0.05 * s  # what is left of lines² − chord² = 2s


# %% jupyter={"source_hidden": true}
# Solution
def mean_spread(s):
    return math.pi * s / 2  # with u = t/(1−t) it is ∫ s²/(s² + u²) du from 0 to ∞


check()

# %% [markdown]
# So spread² + bend² = 2s: both vanish together, and only when the data are a single point.
#
# ## How many steps?
#
# A solver replaces the path by a polygon. First a fact about v\*. Since x₀ = x_t − t·(x₁−x₀) on each line, the mean
# gives **f(x,t) = x − t·v\*(x,t) = E[ x₀ | x_t = x ]**: where the slope points is the mean of the data that may lie
# ahead.
#
# **Exercise.** Where does *one* Euler step from the noise x₁ land?


# %%
def one_euler_step(x1, mixture):
    """x₁ − v*(x₁,1), without calling the mixture."""
    return ...  # your answer


# %%
@exercise
def check():
    for mixture in worlds.values():
        x1 = torch.randn(200, mixture.means.shape[1])
        assert torch.allclose(one_euler_step(x1, mixture), scflow.sample(mixture, x1, steps=1), atol=1e-5)


# %% jupyter={"source_hidden": true}
# Solution
def one_euler_step(x1, mixture):
    mean = mixture.weights @ mixture.means
    return mean.expand_as(x1)  # x₁ says nothing about x₀: the mean of all data


check()

# %%
ends = torch.stack([two.weights @ two.means, two.means[1]])  # the mean of all data, and the upper mode
at_mean, at_mode = two.log_density(ends, torch.zeros(2)).exp()
print(f"density of the data at their mean {at_mean:.5f}, at the upper mode {at_mode:.5f}")
assert at_mean < 0.01 * at_mode  # all samples land where there are almost no data

# %%
fig, axes = plt.subplots(1, 4, figsize=(10, 3.4), sharey=True)
for ax, steps in zip(axes, (1, 2, 4, 16)):
    shade(ax, two)
    _, path = scflow.sample(two, noise[10::20], steps, trajectory=True)
    times = torch.linspace(1, 0, steps + 1)
    ax.plot(times, path[..., 0], color=STUDENT, lw=1)
    ax.set(title=toy_2d.plural(steps, "step"), xticks=[1, 0.5, 0])
axes[0].set_ylabel("x")
plt.show()

# %% [markdown]
# *What to see: Euler's polygons over the density. One step takes all noise to one number, the mean of the data. Two are
# hardly better. With sixteen the polygon follows the bend.*
#
# Heun takes the mean of the slopes at both ends of a step, and pays two evaluations for it. For one Gaussian the flow
# map is known, f\*(x₁,1) = m + s·x₁, and the orders can be measured.

# %%
counts = [4, 8, 16, 32, 64, 128, 256, 512, 1024]  # evaluations of v*
m = torch.tensor([1.0, -0.5], dtype=torch.float64)
x1 = torch.randn(500, 2, generator=generator).double()


def solver_error(s, solver, evaluations):
    """RMS distance to the exact flow map, in double precision."""
    exact = GaussianMixture(m[None], s).double()
    steps = evaluations // scflow.nfe(1, solver)
    x = scflow.sample(exact, x1, steps, solver)
    return toy_2d.rms_distance(x, m + s * x1)


def order(errors):
    """Minus the slope of the last four points on log-log axes."""
    slope, _ = np.polyfit(np.log(counts[-4:]), np.log(errors[-4:]), 1)
    return -slope


# %%
fig, ax = plt.subplots(figsize=(7, 4))
for solver, color, wanted in (("euler", TEACHER, 1), ("heun", STUDENT, 2)):
    for s, style in ((0.15, "-"), (1.7, "--")):
        errors = [solver_error(s, solver, count) for count in counts]
        ax.loglog(counts, errors, color=color, ls=style, marker="o", label=f"{solver}, s = {s}")
        print(f"s = {s}: {solver} has order {order(errors):.2f}")
        assert abs(order(errors) - wanted) < 0.15
ax.set(xlabel="evaluations of v*", ylabel="RMS error of the sample")
ax.legend()
plt.show()

# %% [markdown]
# *What to see: with twice the evaluations Euler halves its error and Heun quarters it, once the steps are short enough
# for the bend. With few evaluations neither is any good on narrow data.*

# %% [markdown]
# ## A network instead of v\*
#
# Now train one on the eight modes. `train_teacher` draws x₀, x₁ and t, and regresses on x₁ − x₀. Its loss is
# spread² + ‖v − v\*‖²: the first part, the **floor**, no network can lower. We record the second apart.

# %%
x0, _ = eight.sample(100_000, generator)
x1 = torch.randn(100_000, 2, generator=generator)
t = torch.rand(100_000, generator=generator)
xt = scflow.interpolate(x0, x1, t)
exact = eight(xt, t)
floor = scflow.flow_matching_loss(exact, x0, x1).item()


@torch.no_grad()  # a measurement
def excess(net, rows=4000):
    """E‖v − v*‖² per dimension."""
    v = net(xt[:rows], t[:rows])
    return scflow.squared(v, exact[:rows]).item()


# %%
torch.manual_seed(0)
net = scflow.MLP()
settings = scflow.TeacherSettings(teacher_steps=1000)
losses = []
errors = {}
for run in scflow.train_teacher(net, toy_2d.batches(eight), generator, settings):
    losses.append(run.losses["flow"])
    if run.step % 25 == 0:
        errors[run.step] = excess(run.ema)
teacher = run.ema  # the average over the last updates

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
axes[0].plot(losses, color=TEACHER, lw=0.7, label="loss of each batch")
axes[0].axhline(floor, color="black", ls="--", label="floor, from v*")
axes[0].set(xlabel="update", ylabel="loss", ylim=(0, 4))
axes[0].legend()
axes[1].semilogy(errors.keys(), errors.values(), color=TEACHER)
axes[1].set(xlabel="update", ylabel="loss − floor = ‖v − v*‖²")
plt.show()

# %% [markdown]
# *What to see: left, the loss comes to its floor early and stays put. Right, the network goes on learning: what is left
# to learn is far smaller than the noise of a batch. **A flow-matching loss that does not move is no sign of failure.***

# %%
tail = torch.tensor(losses[-200:])
print(f"floor {floor:.3f}; last 200 losses {tail.mean():.3f} ± {tail.std():.3f}; ‖v − v*‖² {errors[1000]:.4f}")
assert abs(tail.mean() - floor) < 0.1 * floor
assert errors[1000] < errors[100] / 3
assert errors[1000] < tail.std()
with torch.no_grad():  # a measurement
    total = scflow.flow_matching_loss(teacher(xt, t), x0, x1)
assert abs(total - floor - excess(teacher, len(xt))) < 0.02  # the two parts add up

# %% [markdown]
# Where is the network wrong? Against v\* one can say it for every place and time.

# %%
side = torch.linspace(-toy_2d.LIMIT, toy_2d.LIMIT, 81)
grid = torch.cartesian_prod(side, side)  # (81²,2)
fig, axes = plt.subplots(1, 4, figsize=(10, 3))
for ax, t in zip(axes, (0.9, 0.5, 0.3, 0.1)):
    times = torch.full((len(grid),), t)
    with torch.no_grad():  # a picture
        wrong = (teacher(grid, times) - eight(grid, times)).norm(dim=1)
    density = eight.log_density(grid, times)
    wrong[density < density.max() - math.log(1000)] = math.nan  # hardly any line comes here
    image = ax.pcolormesh(side, side, wrong.view(81, 81).T, cmap="YlOrBr", vmin=0, vmax=1.5)
    toy_2d.window(ax, f"t = {t}")
fig.colorbar(image, ax=axes, label="‖v − v*‖", extend="max", shrink=0.65)
plt.show()

# %% [markdown]
# *What to see: near the noise the network is nearly right. As t falls, it errs in the middle and between the modes,
# where v\* turns sharply, and at rims where few lines come. White: less than a thousandth of the highest density.*
#
# ## Two errors
#
# A sample of the teacher is wrong for two reasons: its steps are too long, and its velocity is not v\*. Steps can be
# bought. Here are its samples.

# %%
x1 = torch.randn(2000, 2, generator=generator)
truth = eight.flow_map(x1, torch.ones(2000), steps=800)
distance = toy_2d.reference("8gaussians", 2000)  # energy distance to a fixed sample of the data
fig, axes = plt.subplots(1, 5, figsize=(10, 2.6))
for ax, steps in zip(axes, (1, 2, 4, 8, 64)):
    x = scflow.sample(teacher, x1, steps)
    toy_2d.cloud(ax, x[:600], toy_2d.plural(steps, "step"), TEACHER)
    ax.set_xlabel(f"10³ × distance: {1e3 * distance(x):.1f}")
plt.show()

# %% [markdown]
# *What to see: the teacher's samples by Euler, and their energy distance to the data, which is about zero for a true
# sample. One step is the mean of the data, with the network's error around it.*
#
# And here the two errors apart: v\* has only the first.

# %%
counts = [2, 4, 8, 16, 32, 64, 128]
result = {}
for name, velocity in (("v*", eight), ("teacher", teacher)):
    for solver in ("euler", "heun"):
        result[name, solver] = []
        for count in counts:
            x = scflow.sample(velocity, x1, count // scflow.nfe(1, solver), solver)
            result[name, solver].append(toy_2d.rms_distance(x, truth))

# %%
fig, ax = plt.subplots(figsize=(7, 4.2))
for (name, solver), values in result.items():
    color = TEACHER if name == "teacher" else GREY
    style = "o-" if solver == "euler" else "s--"
    ax.loglog(counts, values, style, color=color, label=f"{name}, {solver}")
ax.set(xlabel="evaluations", ylabel="RMS distance to the exact sample")
ax.set_xticks(counts, counts)
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# *What to see: with v\* (grey) the error keeps falling. With the teacher (orange) it stops falling at the network's own
# error. From there on, more steps or a better solver buy nothing; before it, nothing but steps helps.*

# %%
for solver in ("euler", "heun"):
    assert result["v*", solver][-1] < result["v*", solver][-2] / 1.5  # still falling
    assert result["teacher", solver][-1] > 0.8 * result["teacher", solver][-2]  # no longer
assert result["v*", "heun"][-1] < result["teacher", "heun"][-1] / 3  # the rest is the network's
assert result["teacher", "euler"][0] > 3 * result["teacher", "euler"][-1]

# %%
one, many = (1e3 * distance(scflow.sample(teacher, x1, steps)) for steps in (1, 64))
print(f"the least loss is {floor:.2f}; energy distance ×10³ of the teacher: one step {one:.0f}, 64 steps {many:.1f}")
assert one > 100 * many

# %% [markdown]
# **The answer.** The network learns the mean over all lines through a place. Its paths do not cross, so they bend. The
# price is a loss that cannot reach zero, and dozens of evaluations for one sample.

# %% [markdown]
# ## What to try next
#
# - Set s = 1 in the figure of the orders. Heun seems better than it should be: what is special about σ_t there?
# - Train longer, `teacher_steps=4000`. How far does the plateau of the last figure fall? Does the loss show it?
# - One evaluation knows only the mean of the data *at t = 1 under v\**. Can a network be trained to jump to the end of
#   the path instead? Open the next notebook, `02_consistency`.
