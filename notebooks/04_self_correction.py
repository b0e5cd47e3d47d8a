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
# # 4. Self-correction
#
# **Question.** One step and eight steps of the same student disagree. What makes them agree, and what is the price?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/04_self_correction.ipynb)
#
# It needs this repository: `pip install -e '.[notebooks]'` in a clone, or, hosted,
# `%pip install git+https://github.com/OWNER/REPO`.

# %%
import copy
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import scflow
import toy_2d
from experiments.lecture import exercise, start
from toy_2d import GREY, STUDENT, TEACHER

GREEN = "#009E73"
start(linewidth=2)

# %% [markdown]
# ## Two kinds of points
#
# Consistency trains the student at x_t = (1−t)·x₀ + t·x₁: data and noise drawn apart.
# An Euler step takes it somewhere else. From the one-step sample x̂₀ = f(x₁,1) it goes to x̂_t = (1−t)·x̂₀ + t·x₁,
# with *the same* x₁.
#
# **Self-correction** trains there: ‖ f(x̂_t,t) − x̂₀ ‖², with x̂₀ held fixed. At loss zero, every later step
# lands where the first one did.

# %% [markdown]
# First the exact world: data N(m, s²I). With σ_t² = (1−t)²s² + t² the flow map is known:
# f\*(x,t) = m + (s/σ_t)·(x − (1−t)m). It is the perfect consistency student. Is its self-correction loss zero?


# %%
def sigma(s, t):
    """Standard deviation of x_t."""
    return (((1 - t) * s) ** 2 + t**2) ** 0.5


def sigma_hat(s, t):
    """Standard deviation of x̂_t at the exact map."""
    return (1 - t) * s + t


def residual(s, t, d):
    """E ‖f*(x̂_t,t) − x̂₀‖² at the exact map: f* takes x̂_t for an x_t, and stretches it by the wrong factor."""
    return d * s**2 * (sigma_hat(s, t) / sigma(s, t) - 1) ** 2


# %%
generator = torch.Generator().manual_seed(0)
m = torch.tensor([2.0, -1.0, 0.5])
x1 = torch.randn(200_000, 3, generator=generator)
for s in (0.15, 0.5, 1.0, 2.0):
    x0_hat = m + s * x1  # f*(x₁,1)
    for t in (0.1, 0.5, 0.9):
        xt_hat = (1 - t) * x0_hat + t * x1
        again = m + s / sigma(s, t) * (xt_hat - (1 - t) * m)  # f*(x̂_t,t)
        measured = (again - x0_hat).square().sum(1).mean().item()
        expected = residual(s, t, d=3)
        assert abs(measured - expected) < 0.02 * expected + 1e-9
print("the closed form holds: the perfect consistency student has a self-correction loss above zero")

# %%
t = torch.linspace(0, 1, 401)
fig, ax = plt.subplots(figsize=(7, 3.8))
for s, color in ((0.15, GREY), (0.5, GREEN), (1.0, STUDENT), (2.0, TEACHER)):
    ax.plot(t, residual(s, t, d=1) / s**2, color=color, label=f"s = {s:g}")
ax.set(xlabel="t", ylabel="residual / (d·s²)", xlim=(0, 1), ylim=(0, 0.21))
ax.legend(loc="upper center", ncol=4)
plt.show()

# %% [markdown]
# *What to see: the residual is zero only at the two ends. In between, the exact map fails to agree with itself.
# All curves reach the same height; the narrower the data, the nearer to the data the worst time.*
#
# **Exercise.** At which t is the residual worst, for a given s? And how large is it there, per dimension?
# (Hint: write a = (1−t)s and b = t. When is (a+b)/√(a²+b²) largest?)


# %%
def worst_time(s):
    """The t in (0,1) with the largest residual."""
    return ...  # your answer


def worst_residual(s):
    """The residual there, for d = 1."""
    return ...  # your answer


# %%
@exercise
def check():
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for s in (0.15, 0.5, 1.0, 2.0):
        curve = residual(s, t, d=1)
        assert abs(t[curve.argmax()] - worst_time(s)) < 1e-3
        assert abs(curve.max() - worst_residual(s)) < 1e-6 * s**2


# %% jupyter={"source_hidden": true}
# Solution
def worst_time(s):
    return s / (1 + s)  # a = b: (1−t)s = t


def worst_residual(s):
    return s**2 * (math.sqrt(2) - 1) ** 2


check()

# %% [markdown]
# ## The same loss in velocities
#
# `scflow` has two forms of this loss: it compares landing points, or velocities, ‖ v(x̂_t,t) − (x₁ − x̂₀) ‖².
# The second says it plainly: **on the line from x₁ to x̂₀, the velocity is that of the line**. Paths become straight.
#
# **Exercise.** Write f(x̂_t,t) − x̂₀ with the velocity v = v(x̂_t,t), without using f or x̂_t.


# %%
def landing_error(v, x1, x0_hat, t):
    """f(x̂_t,t) − x̂₀ from the velocity v at x̂_t; t has shape (B,1)."""
    return ...  # your answer


# %%
torch.manual_seed(0)
net = scflow.MLP().requires_grad_(False)  # any network: an untrained one will do
x1 = torch.randn(512, 2)
t = torch.rand(512)
x0_hat = scflow.predict_x0(net, x1, torch.ones(512))
xt_hat = scflow.interpolate(x0_hat, x1, t)
direct = scflow.predict_x0(net, xt_hat, t) - x0_hat
v = net(xt_hat, t)


@exercise
def check():
    assert torch.allclose(direct, landing_error(v, x1, x0_hat, t[:, None]), atol=1e-5)


# %% jupyter={"source_hidden": true}
# Solution
def landing_error(v, x1, x0_hat, t):
    return t * ((x1 - x0_hat) - v)


check()

# %% [markdown]
# So the velocity form is the same loss over t²: the division moves the weight towards the data.

# %% [markdown]
# ## Can one network satisfy both losses?
#
# Yes, if it can tell an x_t from an x̂_t. Take s = 1, m = 0: then f\*(x₁,1) = x₁, so x̂_t = x₁ has variance 1, while
# x_t at t = ½ has variance ½. Both laws are round, so their norms hold all there is to tell them apart. The two
# densities are equal at ‖x‖² = d·ln 2.

# %%
dims = 2.0 ** torch.arange(13)
limit = dims * math.log(2)
xt_outside = 1 - torch.special.gammainc(dims / 2, limit)  # P(‖x_t‖² > d·ln 2)
xt_hat_inside = torch.special.gammainc(dims / 2, limit / 2)  # P(‖x̂_t‖² < d·ln 2)
overlap = xt_outside + xt_hat_inside
assert abs(overlap[1] - 0.75) < 1e-6  # three quarters in the plane
assert overlap[-1] < 1e-6  # nothing at d = 4096

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.3))
for ax, d in zip(axes, (2, 4096)):
    x0 = torch.randn(2000, d, generator=generator)
    x1 = torch.randn(2000, d, generator=generator)
    xt = (x0 + x1) / 2
    bins = torch.linspace(0, 2.5, 40) if d == 2 else torch.linspace(0.6, 1.1, 40)
    ax.hist(xt.norm(dim=1) / math.sqrt(d), bins, color=STUDENT, alpha=0.6, label="$x_t$")
    ax.hist(x1.norm(dim=1) / math.sqrt(d), bins, color=TEACHER, alpha=0.6, label=r"$\hat{x}_t$")
    ax.set(title=f"d = {d}", xlabel="norm / √d", yticks=[])
    ax.legend()
axes[2].semilogx(dims, overlap, "o-", base=2, color=GREEN)
axes[2].set(title="overlap of the laws", xlabel="dimension d", ylim=(0, 1))
plt.show()

# %% [markdown]
# *What to see: in the plane most points could be either kind. In the dimension of a picture's latents the two kinds lie
# on different shells, and a network could answer differently on each. (Real data are not round: measure before you
# believe it.)*

# %% [markdown]
# Where they overlap, there is a tug of war. At a point x, consistency asks for f\*(x,t). Self-correction asks for
# the mean of the x̂₀ whose lines pass there. A squared fit can give only one value.
#
# **Exercise.** Which one? One Gaussian N(0, s²), d = 1, weight λ on self-correction. (Hint: how often does each loss
# come to x?)


# %%
def normal(x, std):
    """The density of N(0, std²)."""
    return torch.exp(-((x / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def asked_by_consistency(x, s, t):
    """f*(x,t)."""
    return s / sigma(s, t) * x


def asked_by_self_correction(x, s, t):
    """x̂₀ of the line through (x,t)."""
    return s / sigma_hat(s, t) * x


def compromise(x, s, t, lam):
    """The f(x,t) that minimises E(f(x_t) − f*(x_t))² + λ·E(f(x̂_t) − x̂₀)²."""
    return ...  # your answer


# %%
s = 1.0
t = 0.5
x0 = torch.randn(1_000_000, generator=generator)
x1 = torch.randn(1_000_000, generator=generator)
xt = (1 - t) * s * x0 + t * x1
xt_hat = sigma_hat(s, t) * x1


@exercise
def check():
    for place in (0.8, 1.6):
        a = asked_by_consistency(xt[(xt - place).abs() < 0.02], s, t)  # what is asked in a narrow bin
        b = asked_by_self_correction(xt_hat[(xt_hat - place).abs() < 0.02], s, t)
        for lam in (0.1, 1.0, 10.0):
            best = (a.sum() + lam * b.sum()) / (len(a) + lam * len(b))  # the best constant in the bin
            assert abs(best - compromise(torch.tensor(place), s, t, lam)) < 0.02


# %% jupyter={"source_hidden": true}
# Solution
def compromise(x, s, t, lam):
    # The mean of both, weighted by density.
    p = normal(x, sigma(s, t))
    q = lam * normal(x, sigma_hat(s, t))
    return (p * asked_by_consistency(x, s, t) + q * asked_by_self_correction(x, s, t)) / (p + q)


check()

# %%
x = torch.linspace(0, 3, 200)
fig, ax = plt.subplots(figsize=(6.5, 3.8))
ax.plot(x, asked_by_consistency(x, s, t), color=STUDENT, label="consistency alone")
for lam, style in ((0.1, ":"), (1.0, "--"), (10.0, "-.")):
    ax.plot(x, compromise(x, s, t, lam), style, color="black", label=f"both, λ = {lam:g}")
ax.plot(x, asked_by_self_correction(x, s, t), color=TEACHER, label="self-correction alone")
ax.set(xlabel="x", ylabel="best f(x, ½)", xlim=(0, 3), ylim=(0, 4.3))
ax.legend()
plt.show()

# %% [markdown]
# *What to see: neither line is kept. Trained together, one network lands between the two; λ moves it. Far out, where
# only x̂_t goes, self-correction wins.*

# %% [markdown]
# ## Can self-correction reach zero at all?
#
# Only if no two lines x₁ → x̂₀ are at the same place at the same time: the network sees (x,t), not the line.
# On the left, lines between data and noise drawn apart. On the right, lines of the exact map.

# %%
n = 2000
mixture = toy_2d.dataset("8gaussians")
noise = torch.randn(n, 2, generator=generator)
data, _ = mixture.sample(n, generator)
one = torch.ones(n)
landed = mixture.flow_map(noise, one, steps=100)  # x̂₀ of the exact map

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 4.5))
for ax, ends, title in zip(axes, (data, landed), ("drawn apart", "exact map")):
    lines = torch.stack([noise[:150], ends[:150]])  # (2,150,2)
    ax.plot(lines[..., 0], lines[..., 1], color=GREY, lw=0.8)
    ax.scatter(*lines[0].T, s=12, zorder=3, color=TEACHER, label="noise")
    ax.scatter(*lines[1].T, s=12, zorder=3, color=STUDENT, label="data")
    toy_2d.window(ax, title)
axes[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# *What to see: a tangle on the left. On the right each noise goes to the mode on its own side, and the lines fan out.*
#
# **Exercise.** Two lines with starts x₁, y₁ and ends x̂₀, ŷ₀ differ at time t by (1−t)(x̂₀ − ŷ₀) + t(x₁ − y₁). Show: if
# ⟨x₁ − y₁, x̂₀ − ŷ₀⟩ > 0, they never meet. Then count the pairs for which this holds.


# %%
def share_that_cannot_meet(starts, ends):
    """Share of the pairs i < j with ⟨starts_i − starts_j, ends_i − ends_j⟩ > 0."""
    return ...  # your answer


# %%
@exercise
def check():
    row = torch.arange(4.0)[:, None]
    bent = torch.tensor([[0.0], [1.0], [3.0], [2.0]])  # one pair of six changes its order
    assert share_that_cannot_meet(row, row) == 1
    assert share_that_cannot_meet(row, -row) == 0
    assert abs(share_that_cannot_meet(row, bent) - 5 / 6) < 1e-6


# %% jupyter={"source_hidden": true}
# Solution
def share_that_cannot_meet(starts, ends):
    # The product of the difference with x₁ − y₁ is (1−t)·⟨…⟩ + t·‖x₁ − y₁‖², positive at all t.
    i, j = torch.triu_indices(len(starts), len(starts), 1)
    products = (starts[i] - starts[j]) * (ends[i] - ends[j])
    return (products.sum(1) > 0).float().mean().item()


check()

# %%
apart = share_that_cannot_meet(noise, data)
mapped = share_that_cannot_meet(noise, landed)
print(f"pairs that cannot meet: drawn apart {apart:.3f}, exact map {mapped:.5f}")
assert abs(apart - 0.5) < 0.05
assert mapped > 0.9999  # the lines of the exact map do not cross

# %% [markdown]
# So on the eight Gaussians a student *can* be straight, and exact at t = 1. But it cannot also be the exact map in
# between: there the two kinds of points overlap. Something has to give.
#
# ## Measured: distil first, straighten last
#
# The paper trains all losses jointly. The schedule of this section, `two_phase`, is **this project's own**. Phase 1 has
# no self-correction. In phase 2 it is the main term: it straightens the lines to the samples of a frozen copy of the
# phase-1 student.

# %%
first, last = scflow.SCHEDULES["two_phase"]
first = replace(first, steps=500)  # shortened: this is a lecture
last = replace(last, steps=250, batch=256)
for i, phase in enumerate((first, last)):
    print(f"phase {i + 1}:", phase.weights(0))
print(f"self-correction in its {last.self_form} form, with x̂₀ from the {last.self_source} copy")

# %% [markdown]
# The teacher is the exact velocity, so it has no error of its own. The student starts from a short regression on it.

# %%
torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
batch = toy_2d.batches(mixture)
settings = scflow.TeacherSettings(teacher_steps=400)
for run in scflow.train_teacher(scflow.MLP(), batch, generator, settings, oracle=mixture):
    start = run.ema

# %%
for run in scflow.distill(mixture, scflow.PointCritic(), batch, generator, (first, last), student=start):
    if run.step == first.steps:
        before = copy.deepcopy(run.ema)
after = run.ema
print(f"self-correction loss at the end: {run.losses['self']:.3f} per element, in velocities")

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 4.5))
for ax, net, title in zip(axes, (before, after), ("after phase 1", "after phase 2")):
    x, path = scflow.sample(net, noise[:40], steps=8, trajectory=True)
    jump = scflow.sample(net, noise[:40], steps=1)
    ax.plot(*path.permute(2, 0, 1), color=GREY, lw=1.2)
    ax.scatter(*jump.T, s=55, zorder=3, facecolors="none", edgecolors=TEACHER, label="1 step")
    ax.scatter(*x.T, s=14, zorder=3, color=STUDENT, label="8 steps")
    toy_2d.window(ax, title)
axes[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# *What to see: the path of each noise in eight Euler steps, and its one-step sample as a ring. After phase 1 the dots
# miss their rings. After phase 2 the paths are nearly straight, and most dots sit in or next to their ring.*

# %% [markdown]
# In numbers: energy distance to the data (zero is perfect), the consistency gap (RMS distance to the one-step sample of
# the same noise), and the pairs of lines that cannot meet. For comparison, Euler steps of the *exact* map.

# %%
STEPS = (1, 2, 4, 8)
distance = toy_2d.reference("8gaussians", n)  # to a fixed sample of the data
floor = toy_2d.floor_of("8gaussians", n)


def exact(x, t, cond=None):
    """The exact flow map in the form of a student: the average velocity to the end."""
    return (x - mixture.flow_map(x, t, steps=25)) / t[:, None]


def measure(net):
    """For each number of steps: energy distances ×10³ with Euler and with re-noising, and consistency gaps."""
    row = {"euler": [], "renoise": [], "gap": []}
    jump = scflow.sample(net, noise)
    for k in STEPS:
        x = scflow.sample(net, noise, k)
        row["euler"].append(1e3 * distance(x))
        row["gap"].append(toy_2d.rms_distance(x, jump))
        g = torch.Generator().manual_seed(1)
        x = scflow.sample(net, noise, k, "renoise", generator=g)
        row["renoise"].append(1e3 * distance(x))
    return row


# %%
low = 1e3 * (floor["mean"] - 2 * floor["sd"])
high = 1e3 * (floor["mean"] + 2 * floor["sd"])
networks = {"exact map": exact, "after phase 1": before, "after phase 2": after}
rows = {}
print(f"energy distance ×10³, noise floor {low:.1f} to {high:.1f}; steps {STEPS}")
for name, net in networks.items():
    rows[name] = measure(net)
    for key, values in rows[name].items():
        print(f"  {name:14s} {key:8s}", *(f"{value:7.2f}" for value in values))
    share = share_that_cannot_meet(noise, scflow.sample(net, noise))
    print(f"  {name:14s} pairs of lines that cannot meet: {share:.4f}")
    assert share > 0.9  # nearly all, but a trained map is not the exact one: a small floor remains

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
for ax, solver in zip(axes, ("euler", "renoise")):
    ax.axhspan(low, high, color="#EEEEEE", label="noise floor")
    for name, color, style in zip(rows, (GREY, STUDENT, TEACHER), ("s--", "o-", "^-")):
        ax.plot(range(4), rows[name][solver], style, color=color, label=name)
    ax.set(xlabel="steps", xticks=range(4), xticklabels=STEPS)
axes[0].set(title="Euler steps", ylabel="energy distance ×10³")
axes[1].set_title("fresh re-noising")
axes[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# *What to see: with Euler, more steps harm the exact map and the phase-1 student alike: it is no defect of training.
# Phase 2 makes the curve flat. With re-noising it is the other way round, for re-noising visits x_t and not x̂_t.*

# %%
phase1 = rows["after phase 1"]
phase2 = rows["after phase 2"]
assert phase2["gap"][3] < phase1["gap"][3] / 2
assert phase2["euler"][3] < phase1["euler"][3] / 2
assert phase2["renoise"][3] > 2 * phase1["renoise"][3]
assert rows["exact map"]["euler"][3] > 20
assert abs(rows["exact map"]["renoise"][3]) < 5

# %% [markdown]
# ## The price
#
# Compare the student with the exact map on true points x_t, at every t. **Predict before you run it:** where does
# phase 2 change the answer, and where can it not?

# %%
TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
truth = {}  # {t: true points x_t, and where the exact map takes them}
for t in TIMES:
    x0, _ = mixture.sample(n, generator)
    x1 = torch.randn(n, 2, generator=generator)
    xt = scflow.interpolate(x0, x1, t * one)
    truth[t] = xt, mixture.flow_map(xt, t * one, steps=40)


@torch.no_grad()  # a measurement
def map_error(net, t):
    """RMS distance of f(x_t,t) to f*(x_t,t)."""
    xt, end = truth[t]
    return toy_2d.rms_distance(scflow.predict_x0(net, xt, t * one), end)


errors1 = [map_error(before, t) for t in TIMES]
errors2 = [map_error(after, t) for t in TIMES]

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
ax.plot(TIMES, errors1, "o-", color=STUDENT, label="after phase 1")
ax.plot(TIMES, errors2, "^-", color=TEACHER, label="after phase 2")
ax.set(xlabel="t", ylabel="flow-map error on true $x_t$", ylim=(0, None))
ax.legend()
plt.show()
assert errors2[-1] < 1.5 * errors1[-1]  # at t = 1 the map is kept
assert errors2[4] > 1.5 * errors1[4]  # at t = ½ it is given up

# %% [markdown]
# *What to see: at t = 1, where x_t and x̂_t are both the noise, the two students are about equally exact. In between,
# phase 2 has given the map up.* Euler steps from noise walk along the points x̂_t. Only re-noising goes to the points
# x_t, and pays.

# %%
for name, phase in (("after phase 1", phase1), ("after phase 2", phase2)):
    gap = phase["gap"][3]
    euler = phase["euler"][3]
    renoise = phase["renoise"][3]
    print(f"{name}: gap {gap:.2f}; energy distance ×10³ of eight steps: Euler {euler:.1f}, re-noising {renoise:.1f}")

# %% [markdown]
# **The answer.** Straight lines make the step counts agree. The price is the teacher's map between the ends. You pay
# only if something visits the points x_t there: re-noising does, Euler does not.

# %% [markdown]
# ## What to try next
#
# - Let phase 2 follow a moving target: `replace(last, self_source="ema")`. Does the one-step sample drift?
# - Swap the form: `replace(last, self_form="x0")`. Which step count suffers, and which times had the weight t²?
# - Train jointly, as the paper does: `scflow.SCHEDULES["paper"]`, with λ_self of 0.1, 1 and 10. What does a smaller gap
#   cost? Then open the next notebook of this folder.
