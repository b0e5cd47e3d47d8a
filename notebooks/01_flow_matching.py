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
import torch

sys.path[:0] = [".", ".."]  # a clone holds scflow.py here or one folder up
try:
    import scflow
except ImportError:  # a hosted notebook: fetch it once
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "git+https://github.com/OWNER/REPO"], check=True)
    import scflow

torch.set_num_threads(1)  # networks this small run best in one thread
TEACHER, STUDENT, THIRD, GREY, PINK = "#D55E00", "#0072B2", "#009E73", "#999999", "#CC79A7"
plt.rcParams.update({"font.size": 12, "figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Lines that cross
#
# Data x₀ at t = 0, Gaussian noise x₁ at t = 1, drawn **apart from each other** and joined by a line,
# x_t = (1−t)·x₀ + t·x₁. Its velocity is v = x₁ − x₀, the same all along.
#
# In the plane two lines may cross on the page and yet be there at different times. So we start with numbers instead of
# points, and draw t as an axis: there a crossing is a meeting.

# %%
two = scflow.GaussianMixture(
    [[-1.5], [1.5]], std=0.25, weights=[1.0, 2.0]
)  # data: two modes, the upper twice as likely
generator = torch.Generator().manual_seed(0)
n = 2000
x0, _ = two.sample(n, generator)  # (n,1)
x1 = torch.randn(n, 1, generator=generator)

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
ax.plot([1, 0], torch.cat([x1, x0], 1)[:60].T, color=GREY, lw=0.8, zorder=1)
ax.scatter(torch.ones(60), x1[:60], s=14, color=TEACHER, zorder=2)
ax.scatter(torch.zeros(60), x0[:60], s=14, color=STUDENT, zorder=2)
ax.set(xlabel="t  (noise on the left, data on the right)", ylabel="x", xlim=(1.02, -0.02), ylim=(-3.6, 3.6))
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: a tangle. Through one place, at one time, go lines to both modes.*
#
# How many pairs of lines meet? Those whose order at t = 0 is not that at t = 1. Noise knows nothing of data, so each
# order is as likely as the other.


# %%
def share_that_meet(starts, ends):
    """Share of the pairs of lines whose order is turned round between start and end, (n,1) each."""
    turned = (starts - starts.T) * (ends - ends.T) < 0  # (n,n)
    return turned.sum().item() / (len(starts) * (len(starts) - 1))


print(f"pairs of lines that meet: {share_that_meet(x1, x0):.3f}")
assert abs(share_that_meet(x1, x0) - 0.5) < 0.04  # every second pair

# %% [markdown]
# ## The mean over the lines
#
# Train a network on ‖ v(x_t,t) − (x₁−x₀) ‖². It sees the place and the time, not the line. A squared fit answers with
# the mean over all lines through that place:
#
# **v\*(x,t) = E[ x₁ − x₀ | x_t = x ]**
#
# For a Gaussian mixture this is a formula, and `scflow.GaussianMixture` is called like a network to give it. Is it
# right? Draw many lines and take the mean by hand.

# %%
many = 1_000_000
x0, _ = two.sample(many, generator)
x1 = torch.randn(many, 1, generator=generator)
t, place = 0.5, 0.0
passing = ((1 - t) * x0 + t * x1 - place).abs() < 0.02
v = (x1 - x0)[passing]
exact = two(torch.tensor([[place]]), torch.tensor([t])).item()
print(f"{len(v)} lines pass x = {place} at t = {t}: their mean velocity is {v.mean():.3f}, and v* is {exact:.3f}")
assert abs(v.mean() - exact) < 0.1
assert ((v - exact).abs() < 0.3).float().mean() < 0.01  # hardly a line has that velocity

# %% [markdown]
# The same for every place at once, at three times. In each narrow bin the mean over the lines must be that of v\*, up
# to the error of a finite sample.

# %%
edges, found = torch.linspace(-2.5, 2.5, 51), {}
for t in (0.8, 0.5, 0.2):
    xt, wanted = (1 - t) * x0 + t * x1, x1 - x0
    left = (wanted - two(xt, torch.full((many,), t)))[:, 0]  # what v* leaves over
    bins = torch.bucketize(xt[:, 0], edges)
    count = torch.bincount(bins)
    mean, over, square = (torch.bincount(bins, w) / count for w in (wanted[:, 0], left, left**2))
    enough = (count > 500) & (torch.arange(len(count)) > 0) & (torch.arange(len(count)) < 51)
    assert (over.abs() < 5 * (square / count).sqrt())[enough].all()  # nothing but the error of the sample
    found[t] = (edges - 0.05)[enough[:51]], mean[:51][enough[:51]]

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
axes[0].hist(v.numpy(), 60, color=GREY)
axes[0].axvline(exact, color=TEACHER, lw=2.5)
axes[0].annotate(
    "v*", (exact, 1), (6, -14), xycoords=("data", "axes fraction"), textcoords="offset points", color=TEACHER
)
axes[0].set(xlabel="velocity of the lines through x = 0, t = 0.5", ylabel="lines")
xs = torch.linspace(-2.5, 2.5, 300)
for (t, dots), color in zip(found.items(), (STUDENT, TEACHER, THIRD)):
    axes[1].plot(xs, two(xs[:, None], torch.full((300,), t))[:, 0], color=color, lw=1.5, label=f"t = {t}")
    axes[1].plot(*dots, "o", color=color, ms=5)
axes[1].set(xlabel="x", ylabel="v*(x,t)", ylim=(-4, 4))
axes[1].legend(frameon=False)
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: left, lines through one place go one of two ways, and hardly one at v\*. Right, the dots are means
# over lines, the curves the formula; as t falls, v\* turns from one mode to the other within a shorter and shorter
# way.*

# %% [markdown]
# **Exercise.** Find the formula. For one Gaussian N(m, s²I), x₀ and x_t are jointly Gaussian, so that the mean of
# x₁ − x₀ is linear in x. With σ_t² = (1−t)²s² + t² the slope of x₀ on x_t is (1−t)s²/σ_t², and that of x₁ is t/σ_t².
# For a mixture, weigh the answers of the components: how likely is each to have sent the line through x?


# %%
def one_gaussian(x, t, m, s):
    """E[x₁ − x₀ | x_t = x] for x₀ ~ N(m, s²I); x is (B,d), t is (B,1), m is (d,)."""
    var = ((1 - t) * s) ** 2 + t**2
    # your answer
    return -m + (t - (1 - t) * s**2) / var * (x - (1 - t) * m)


def responsibilities(x, t, means, s, weights):
    """γ_k(x,t), the probability that a line through (x,t) comes from component k, (B,K)."""
    square = (x[:, None] - (1 - t)[:, None] * means).square().sum(-1)  # (B,K) distances to the moved centres
    # your answer
    return (weights.log() - square / (2 * (((1 - t) * s) ** 2 + t**2))).softmax(1)


# %%
angle = torch.arange(8) * math.pi / 4
eight = scflow.GaussianMixture(2 * torch.stack([angle.cos(), angle.sin()], 1), std=0.15)
for mixture in (two, eight):
    x, t = (
        2 * torch.randn(500, mixture.means.shape[1], generator=generator),
        0.05 + 0.95 * torch.rand(500, 1, generator=generator),
    )
    each = torch.stack([one_gaussian(x, t, m, mixture.std) for m in mixture.means], 1)  # (B,K,d)
    gamma = responsibilities(x, t, mixture.means, mixture.std, mixture.weights)
    assert torch.allclose((gamma[..., None] * each).sum(1), mixture(x, t[:, 0]), rtol=1e-3, atol=1e-3)

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
    x, t = torch.linspace(-3, 3, 200), torch.linspace(1, 0, 200)
    p = torch.stack([mixture.log_density(x[:, None], t[i].expand(200)).exp() for i in range(200)], 1)
    ax.imshow(p.sqrt(), cmap="Greys", extent=(1, 0, -3, 3), origin="lower", aspect="auto", vmax=1.8)
    ax.set(xlabel="t", xlim=(1, 0), ylim=(-3, 3))


# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
for ax, title in zip(axes, ("lines: what is trained on", "v*: what is learned")):
    shade(ax, two)
    ax.set_title(title)
axes[0].plot([1, 0], torch.cat([x1, x0], 1)[:40].T, color=TEACHER, lw=0.8)
axes[1].plot(times, path[:, 5::10, 0], color=STUDENT, lw=0.8)
axes[0].set_ylabel("x")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: the same density at every t, in grey, and other paths. The lines are straight and cross. The paths of
# v\* do not cross, so they bend: at first all head for the mean of the data, then they part.*

# %% [markdown]
# Why is the density the same? What flows through a place is counted there as density times *mean* velocity. Who goes
# which way does not matter: at each meeting the lines may swap partners.
#
# **Exercise.** On a line this fixes the flow. No path overtakes another, so the share of the mass below a path stays
# what it was: F_t(x_t) = Φ(x₁). Write F_t, the distribution function of x_t.


# %%
def share_below(x, t, means, s, weights):
    """P(x_t < x) for the mixture, x of shape (B,1) and one t; Φ is torch.special.ndtr."""
    sigma = (((1 - t) * s) ** 2 + t**2) ** 0.5
    # your answer
    return (weights * torch.special.ndtr((x - (1 - t) * means[:, 0]) / sigma)).sum(1)


# %%
for x, t in zip(path, times):
    assert (share_below(x, t, two.means, two.std, two.weights) - quantiles).abs().max() < 5e-3
upward = (path[-1] > 0).float().mean().item()
print(f"share of the noise that goes to the upper mode: {upward:.4f}")
assert abs(upward - 2 / 3) < 0.005  # the flow cuts the noise where the weights say

# %% [markdown]
# The same in the plane, with eight modes. A point keeps the colour of its noise.

# %%
x1 = torch.randn(n, 2, generator=generator)
x0, _ = eight.sample(n, generator)
_, flow = scflow.sample(eight, x1, steps=60, solver="heun", trajectory=True)  # (61,n,2)
lines = torch.stack([scflow.interpolate(x0, x1, t.expand(n)) for t in torch.linspace(1, 0, 61)])
quarter = (2 * torch.atan2(x1[:, 1], x1[:, 0]) / math.pi).floor().long() + 2  # of the plane, where the noise is
colors = [(TEACHER, STUDENT, THIRD, PINK)[q % 4] for q in quarter]


def clouds(ax, points, shown=500):
    ax.scatter(*points[:shown].T, s=4, c=colors[:shown], lw=0)
    ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])


# %%
fig, axes = plt.subplots(2, 5, figsize=(10, 4.4))
for row, name, points in zip(axes, ("lines", "v*"), (lines, flow)):
    for ax, i in zip(row, (0, 15, 30, 45, 60)):
        clouds(ax, points[i])
        ax.set_title(f"t = {1 - i / 60:g}" if name == "lines" else "")
    row[0].set_ylabel(name)
plt.tight_layout()
plt.show()

# %%
for i in (15, 30, 45, 60):
    distance = scflow.EnergyDistance(lines[i])(flow[i])
    print(f"t = {1 - i / 60:g}: energy distance of the two clouds {distance:.4f}")
    assert distance < 0.01  # the same law

# %% [markdown]
# *What to see: the two clouds in a column have the same law. Along the lines the colours are stirred; along v\* every
# colour stays together.*

# %%
if "get_ipython" in globals():  # a notebook, not a program
    from IPython.display import HTML, display
    from matplotlib.animation import FuncAnimation

    fig, axes = plt.subplots(1, 2, figsize=(6, 3.2), dpi=45)

    def frame(i):
        for ax, name, points in zip(axes, ("lines", "v*"), (lines, flow)):
            ax.clear()
            clouds(ax, points[10 * i], shown=100)
            ax.set_title(f"{name}, t = {1 - i / 6:.2f}")

    display(HTML(FuncAnimation(fig, frame, 7, interval=300).to_jshtml(default_mode="reflect")))
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
    (x0, _), x1 = (
        mixture.sample(n, generator, stratified=True),
        torch.randn(n, mixture.means.shape[1], generator=generator),
    )
    _, path = scflow.sample(mixture, x1, steps, "heun", trajectory=True)
    bend, spread = [], []
    for x, t in zip(path, torch.linspace(1, 0, steps + 1)):
        t = t.expand(n)
        bend.append((mixture(x, t) - (x1 - path[-1])).square().mean())
        spread.append((mixture(scflow.interpolate(x0, x1, t), t) - (x1 - x0)).square().mean())
    mean = [torch.trapezoid(torch.stack(y), dx=1 / steps).item() for y in (bend, spread)]
    return (x1 - path[-1]).square().mean().item(), *mean


# %%
one = scflow.GaussianMixture([[0.0, 0.0]], std=1.0)  # data that are themselves N(0, I)
worlds = {"one Gaussian": one, "two modes": two, "eight modes": eight}
books = {name: accounts(mixture) for name, mixture in worlds.items()}
for name, (chord, bend, spread) in books.items():
    mixture = worlds[name]
    second = mixture.std**2 + (mixture.weights[:, None] * mixture.means**2).sum(0).mean().item()
    print(f"{name:12s} lines² {1 + second:.3f} = chord² {chord:.3f} + bend² {bend:.3f} + spread² {spread:.3f}")
    assert abs(chord + bend + spread - (1 + second)) < 0.05 * (1 + second)
    assert bend > 0.1 and spread > 0.1 and chord < bend + spread

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
_, path = scflow.sample(one, noise[10::20].expand(-1, 2), 50, "heun", trajectory=True)
shade(axes[0], scflow.GaussianMixture([[0.0]], std=1.0))
axes[0].plot(torch.linspace(1, 0, 51), path[..., 0], color=STUDENT, lw=1)
axes[0].set(ylabel="x", title="data = noise, and yet the flow moves")
start = torch.zeros(3)
for i, (part, color) in enumerate((("chord²", STUDENT), ("bend²", TEACHER), ("spread²", GREY))):
    width = torch.tensor([book[i] for book in books.values()])
    axes[1].barh(list(books), width, left=start, color=color, label=part, height=0.6)
    start = start + width
axes[1].set(xlabel="mean square per dimension", ylim=(-0.5, 3.3))
axes[1].legend(frameon=False, ncol=3, loc="upper left")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: left, data that are noise already. To stand still would do, but the lines do not know that: on the
# average they first run together. Right, the accounts; in all three the larger part is not the way from noise to data.*

# %%
halfway, ends = path[25], path[-1]
assert torch.allclose(halfway, path[0] / math.sqrt(2), atol=1e-3)  # σ_t is least at t = ½
assert torch.allclose(ends, path[0], atol=1e-3)

# %% [markdown]
# **Exercise.** For one Gaussian N(m, s²I) the spread has a closed form: v = (x_t − x₀)/t, so at a given t it is the
# variance of x₀ given x_t, over t². That variance is s²t²/σ_t². Now take the mean over t from 0 to 1. (Hint:
# u = t/(1−t).)


# %%
def mean_spread(s):
    """∫ s²/σ_t² dt from 0 to 1, with σ_t² = (1−t)²s² + t²: the floor of the loss per dimension."""
    # your answer
    return math.pi * s / 2  # with u = t/(1−t) it is ∫ s²/(s² + u²) du from 0 to ∞


# %%
for s in (0.3, 1.0, 2.0):
    chord, bend, spread = accounts(scflow.GaussianMixture([[1.0, -0.5]], s))
    assert abs(spread - mean_spread(s)) < 0.03 * mean_spread(s)
    assert abs(bend - (2 * s - mean_spread(s))) < 0.05 * s  # what is left of lines² − chord² = 2s

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
    # your answer
    return (mixture.weights @ mixture.means).expand_as(x1)  # x₁ says nothing about x₀: the mean of all data


# %%
for mixture in worlds.values():
    x1 = torch.randn(200, mixture.means.shape[1], generator=generator)
    assert torch.allclose(one_euler_step(x1, mixture), scflow.sample(mixture, x1, steps=1), atol=1e-5)
density = two.log_density(torch.stack([two.weights @ two.means, two.means[1]]), torch.zeros(2)).exp()
print(f"density of the data at their mean {density[0]:.5f}, at the upper mode {density[1]:.5f}")
assert density[0] < 0.01 * density[1]  # all samples land where there are almost no data

# %%
fig, axes = plt.subplots(1, 4, figsize=(10, 3.4), sharey=True)
for ax, steps in zip(axes, (1, 2, 4, 16)):
    shade(ax, two)
    _, path = scflow.sample(two, noise[10::20], steps, trajectory=True)
    ax.plot(torch.linspace(1, 0, steps + 1), path[..., 0], color=STUDENT, lw=1)
    ax.set(title=f"{steps} step" + "s" * (steps > 1), xticks=[1, 0.5, 0])
axes[0].set_ylabel("x")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: Euler's polygons over the density. One step takes all noise to one number, the mean of the data. Two are
# hardly better; with sixteen the polygon follows the bend.*
#
# Heun takes the mean of the slopes at both ends of a step, and pays two evaluations for it. For one Gaussian the flow
# map is known, f\*(x₁,1) = m + s·x₁, and the orders can be measured.

# %%
counts = 2 ** torch.arange(2, 11)  # evaluations of v*
m, x1 = torch.tensor([1.0, -0.5]), torch.randn(500, 2, generator=generator)


def solver_error(s, solver):
    """RMS distance to the exact flow map for each number of evaluations, in double precision."""
    v, noise = scflow.GaussianMixture(m[None], s).double(), x1.double()
    steps = [c // scflow.nfe(1, solver) for c in counts.tolist()]
    return torch.tensor([scflow.rms_distance(scflow.sample(v, noise, k, solver), m + s * noise) for k in steps])


def order(errors):
    """Minus the slope of the last four points on log-log axes."""
    x, y = counts[-4:].log(), errors[-4:].log()
    return -(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


# %%
fig, ax = plt.subplots(figsize=(7, 4))
for s, style in ((0.15, "-"), (1.7, "--")):
    for solver, color, wanted in (("euler", TEACHER, 1), ("heun", STUDENT, 2)):
        errors = solver_error(s, solver)
        ax.loglog(counts, errors, color=color, ls=style, marker="o", lw=2, label=f"{solver}, s = {s}")
        print(f"s = {s}: {solver} has order {order(errors):.2f}")
        assert abs(order(errors) - wanted) < 0.15
ax.set(xlabel="evaluations of v*", ylabel="RMS error of the sample")
ax.legend(frameon=False)
plt.tight_layout()
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
x0, x1, t = (
    eight.sample(100_000, generator)[0],
    torch.randn(100_000, 2, generator=generator),
    torch.rand(100_000, generator=generator),
)
xt = scflow.interpolate(x0, x1, t)
exact = eight(xt, t)
floor = scflow.flow_matching_loss(exact, x0, x1).item()


@torch.no_grad()  # a measurement
def excess(net, rows=4000):
    """E‖v − v*‖² per dimension."""
    return scflow.squared(net(xt[:rows], t[:rows]), exact[:rows]).item()


# %%
torch.manual_seed(0)
losses, error = [], {}
settings = scflow.TeacherSettings(teacher_steps=1000)
for run in scflow.train_teacher(scflow.MLP(), lambda n, g: (eight.sample(n, g)[0], None), generator, settings):
    losses.append(run.losses["flow"])
    if run.step % 25 == 0:
        error[run.step] = excess(run.ema)
teacher = run.ema  # the average over the last updates

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
axes[0].plot(losses, color=TEACHER, lw=0.7, label="loss of each batch")
axes[0].axhline(floor, color="black", ls="--", lw=1.8, label="floor, from v*")
axes[0].set(xlabel="update", ylabel="loss", ylim=(0, 4))
axes[0].legend(frameon=False)
axes[1].semilogy(error.keys(), error.values(), color=TEACHER, lw=2.2)
axes[1].set(xlabel="update", ylabel="loss − floor = ‖v − v*‖²")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: left, the loss comes to its floor early and stays put. Right, the network goes on learning: what is left
# to learn is far smaller than the noise of a batch. **A flow-matching loss that does not move is no sign of failure.***

# %%
tail, early = torch.tensor(losses[-200:]), error[100]
print(f"floor {floor:.3f}; last 200 losses {tail.mean():.3f} ± {tail.std():.3f}; ‖v − v*‖² {error[1000]:.4f}")
assert abs(tail.mean() - floor) < 0.1 * floor
assert error[1000] < early / 3 and error[1000] < tail.std()
with torch.no_grad():  # the two parts add up
    total = scflow.flow_matching_loss(teacher(xt, t), x0, x1)
assert abs(total - floor - excess(teacher, len(xt))) < 0.02

# %% [markdown]
# Where is the network wrong? Against v\* one can say it for every place and time.

# %%
side = torch.linspace(-3, 3, 81)
grid = torch.cartesian_prod(side, side)
fig, axes = plt.subplots(1, 4, figsize=(10, 3), layout="constrained")
for ax, t in zip(axes, (0.9, 0.5, 0.3, 0.1)):
    at = torch.full((len(grid),), t)
    with torch.no_grad():  # a picture
        wrong = (teacher(grid, at) - eight(grid, at)).norm(dim=1)
    density = eight.log_density(grid, at)
    wrong[density < density.max() - math.log(1000)] = math.nan  # hardly any line comes here
    image = ax.imshow(
        wrong.view(81, 81).T,
        cmap="YlOrBr",
        origin="lower",
        extent=(-3, 3, -3, 3),
        vmin=0,
        vmax=1.5,
        interpolation="nearest",
    )
    ax.set(title=f"t = {t}", xticks=[], yticks=[])
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
distance = scflow.EnergyDistance(*eight.sample(2000, generator, stratified=True))
fig, axes = plt.subplots(1, 5, figsize=(10, 2.6))
for ax, steps in zip(axes, (1, 2, 4, 8, 64)):
    x = scflow.sample(teacher, x1, steps)
    ax.scatter(*x[:600].T, s=3, color=TEACHER, lw=0)
    ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
    ax.set(title=f"{steps} step" + "s" * (steps > 1), xlabel=f"10³ × distance: {1e3 * distance(x):.1f}")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: the teacher's samples by Euler, and their energy distance to the data, which is about zero for a true
# sample. One step is the mean of the data, with the network's error around it.*
#
# And here the two errors apart: v\* has only the first.

# %%
counts, result = [2**k for k in range(1, 8)], {}
for name, net in (("v*", eight), ("teacher", teacher)):
    for solver in ("euler", "heun"):
        steps = [c // scflow.nfe(1, solver) for c in counts]
        result[name, solver] = [scflow.rms_distance(scflow.sample(net, x1, k, solver), truth) for k in steps]

# %%
fig, ax = plt.subplots(figsize=(7, 4.2))
for (name, solver), errors in result.items():
    color, style = {"v*": GREY, "teacher": TEACHER}[name], {"euler": "o-", "heun": "s--"}[solver]
    ax.loglog(counts, errors, style, color=color, lw=2.2, ms=7, label=f"{name}, {solver}")
ax.set(xlabel="evaluations", ylabel="RMS distance to the exact sample")
ax.set_xticks(counts, counts)
ax.minorticks_off()
ax.legend(frameon=False)
plt.tight_layout()
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
