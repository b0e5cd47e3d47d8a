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
#
# It needs this repository: `pip install -e '.[notebooks]'` in a clone, or, hosted,
# `%pip install git+https://github.com/OWNER/REPO`.

# %%

import matplotlib.pyplot as plt
import torch

import scflow
import toy_2d
from experiments.lecture import exercise, start
from toy_2d import GREY, STUDENT, TEACHER, GaussianMixture

GREEN = "#009E73"
start(dpi=72, linewidth=2)

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
# *What to see: a tangle. Through one place, at one time, go lines to both modes. Every second pair of lines meets, for
# noise and data are independent.*

# %% [markdown]
# ## The mean over the lines
#
# Train a network on ‖ v(x_t,t) − (x₁−x₀) ‖². It sees the place and the time, not the line. A squared fit answers with
# the mean over all lines through that place:
#
# **v\*(x,t) = E[ x₁ − x₀ | x_t = x ]**
#
# For a Gaussian mixture this is a formula, and a `GaussianMixture` is called like a network to give it. Is it
# right? Draw many lines and take the mean of those that pass one place.

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

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
axes[0].hist(passing.numpy(), 60, color=GREY)
axes[0].axvline(exact, color=TEACHER, label="v*")
axes[0].set(xlabel="velocity of the lines through x = 0, t = ½", ylabel="lines")
places = torch.linspace(-2.5, 2.5, 300)
for t, color in zip((0.8, 0.5, 0.2), (STUDENT, TEACHER, GREEN)):
    formula = two(places[:, None], torch.full((300,), t))
    axes[1].plot(places, formula, color=color, lw=1.5, label=f"t = {t}")
axes[1].set(xlabel="x", ylabel="v*(x,t)", ylim=(-4, 4))
for ax in axes:
    ax.legend()
plt.show()

# %% [markdown]
# *What to see: left, lines through one place go one of two ways, and hardly one at v\*. Right, the formula: as t falls,
# v\* turns from one mode to the other within a shorter and shorter way.*

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
#
# Why is the density the same? What flows through a place is counted there as density times *mean* velocity. Who goes
# which way does not matter: at each meeting the lines may swap partners.

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
fig, ax = plt.subplots(figsize=(7, 2.8))
parts = {"chord²": STUDENT, "bend²": TEACHER, "spread²": GREY}
left = torch.zeros(3)
for i, part in enumerate(parts):
    width = torch.tensor([book[i] for book in books.values()])
    ax.barh(list(books), width, 0.6, left, color=parts[part], label=part)
    left = left + width
ax.set(xlabel="mean square per dimension", ylim=(-0.5, 3.3))
ax.legend(ncol=3, loc="upper left")
plt.show()

# %% [markdown]
# *What to see: in all three the larger part is not the way from noise to data, even for one Gaussian that is noise
# already.*

# %% [markdown]
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
# And here the two errors apart: v\* has only the first. Beside Euler stands Heun, which takes the mean of the slopes at
# both ends of a step, and pays two evaluations for it.

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
# *What to see: with v\* (grey) the error keeps falling: with twice the evaluations Euler about halves it, and Heun
# about quarters it. With the teacher (orange) it stops at the network's own error. From there on, more steps or a
# better solver buy nothing; before it, nothing but steps helps.*

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
# - Where is the network wrong? Draw ‖v − v\*‖ on a grid, at t = 0.9, 0.5 and 0.1.
# - Train longer, `teacher_steps=4000`. How far does the plateau of the last figure fall? Does the loss show it?
# - One evaluation knows only the mean of the data *at t = 1 under v\**. Can a network be trained to jump to the end of
#   the path instead? Open the next notebook, `02_consistency`.
