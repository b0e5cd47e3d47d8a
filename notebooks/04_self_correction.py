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

# %%
import copy
import math
import subprocess
import sys
from dataclasses import replace

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
plt.rcParams.update({"font.size": 12, "figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

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


def residual(s, t, d):
    """E ‖f*(x̂_t,t) − x̂₀‖² at the exact map: f* takes x̂_t for an x_t, and stretches it by the wrong factor."""
    return d * s**2 * (((1 - t) * s + t) / sigma(s, t) - 1) ** 2


# %%
generator = torch.Generator().manual_seed(0)
for s in (0.15, 0.5, 1.0, 2.0):
    for t in (0.1, 0.5, 0.9):
        m, x1 = torch.tensor([2.0, -1.0, 0.5]), torch.randn(200_000, 3, generator=generator)
        x0_hat = m + s * x1  # f*(x₁,1)
        xt_hat = (1 - t) * x0_hat + t * x1
        again = m + s / sigma(s, t) * (xt_hat - (1 - t) * m)  # f*(x̂_t,t)
        measured = (again - x0_hat).square().sum(1).mean().item()
        assert abs(measured - residual(s, t, d=3)) < 0.02 * residual(s, t, d=3) + 1e-9
print("the closed form holds: the perfect consistency student has a self-correction loss above zero")

# %%
ts = torch.linspace(0, 1, 401)
fig, ax = plt.subplots(figsize=(7, 3.8))
for s, color in ((0.15, GREY), (0.5, THIRD), (1.0, STUDENT), (2.0, TEACHER)):
    ax.plot(ts, residual(s, ts, d=1) / s**2, color=color, lw=2.5, label=f"s = {s:g}")
ax.set(xlabel="t", ylabel="residual / (d·s²)", xlim=(0, 1), ylim=(0, 0.2))
ax.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.02, 1.05), ncol=4, columnspacing=1.0, handlelength=1.3)
plt.tight_layout()
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
    # your answer
    return s / (1 + s)  # a = b: (1−t)s = t


def worst_residual(s):
    """The residual there, for d = 1."""
    # your answer
    return s**2 * (math.sqrt(2) - 1) ** 2


# %%
fine = torch.linspace(0, 1, 20_001, dtype=torch.float64)
for s in (0.15, 0.5, 1.0, 2.0):
    curve = residual(s, fine, d=1)
    assert abs(fine[curve.argmax()].item() - worst_time(s)) < 1e-3
    assert abs(curve.max().item() - worst_residual(s)) < 1e-6 * s**2

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
    # your answer
    return t * ((x1 - x0_hat) - v)


# %%
torch.manual_seed(0)
net, x1, t = scflow.MLP(), torch.randn(512, 2), torch.rand(512)  # any network: an untrained one will do
with torch.no_grad():
    x0_hat = scflow.predict_x0(net, x1, torch.ones(512))
    xt_hat = scflow.interpolate(x0_hat, x1, t)
    direct = scflow.predict_x0(net, xt_hat, t) - x0_hat
    v = net(xt_hat, t)
assert torch.allclose(direct, landing_error(v, x1, x0_hat, t[:, None]), atol=1e-5)
ratio = direct.square().sum(1) / (v - (x1 - x0_hat)).square().sum(1)
assert torch.allclose(ratio, t**2, rtol=1e-2, atol=1e-5)  # so the velocity form is the same loss over t²

# %% [markdown]
# The division by t² moves the weight towards the data. At the exact map of one Gaussian the velocity form tends
# to d as t → 0, whatever s is.

# %%
for s in (0.15, 1.0, 2.0):
    small = torch.tensor(1e-4, dtype=torch.float64)
    assert abs(residual(s, small, d=2) / small**2 - 2) < 0.01

# %% [markdown]
# ## Can one network satisfy both losses?
#
# Yes, if it can tell an x_t from an x̂_t. Take s = 1, m = 0: then f\*(x₁,1) = x₁, so x̂_t = x₁ has variance 1, while
# x_t at t = ½ has variance ½. Both laws are round, so their norms hold all there is to tell them apart.

# %%
dims = 2 ** torch.arange(0, 13, dtype=torch.float64)
inside = torch.special.gammainc  # P(‖x‖² < c) for a Gaussian; the two densities are equal at ‖x‖² = d·ln 2
overlap = 1 - inside(dims / 2, dims * math.log(2)) + inside(dims / 2, dims * math.log(2) / 2)
assert abs(overlap[1] - 0.75) < 1e-9 and overlap[-1] < 1e-6  # three quarters in the plane, nothing at d = 4096

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.3))
for ax, d in zip(axes, (2, 4096)):
    x0, x1 = torch.randn(2, 2000, d, generator=generator)
    for x, color, name in ((0.5 * x0 + 0.5 * x1, STUDENT, "$x_t$"), (x1, TEACHER, r"$\hat{x}_t$")):
        norms = x.norm(dim=1) / math.sqrt(d)
        ax.hist(norms.numpy(), 40, range=(0, 2.5) if d == 2 else (0.6, 1.1), color=color, alpha=0.6, label=name)
    ax.set(title=f"d = {d}", xlabel="norm / √d", yticks=[])
    ax.legend(frameon=False, loc="upper right" if d == 2 else "upper center")
axes[2].semilogx(dims, overlap, color=THIRD, lw=2.5, marker="o", base=2)
axes[2].set(title="overlap of the laws", xlabel="dimension d", ylim=(0, 1), xticks=[1, 16, 256, 4096])
plt.tight_layout()
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
    return torch.exp(-((x / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def compromise(x, s, t, lam):
    """The f(x,t) that minimises E(f(x_t) − f*(x_t))² + λ·E(f(x̂_t) − x̂₀)²."""
    line = (1 - t) * s + t  # standard deviation of x̂_t
    # your answer
    p, q = normal(x, sigma(s, t)), lam * normal(x, line)
    return (p * (s / sigma(s, t)) * x + q * (s / line) * x) / (p + q)  # the mean of both, weighted by density


# %%
s, t, n = 1.0, 0.5, 1_000_000
x0, x1 = torch.randn(2, n, generator=generator)
xt, xt_hat = (1 - t) * s * x0 + t * x1, ((1 - t) * s + t) * x1
for lam in (0.1, 1.0, 10.0):
    for at in (0.8, 1.6):  # the best constant in a narrow bin is the weighted mean of what is asked there
        a, b = (xt - at).abs() < 0.02, (xt_hat - at).abs() < 0.02
        asked = (s / sigma(s, t) * xt[a]).sum() + lam * (s * x1[b]).sum()
        best = asked / (a.sum() + lam * b.sum())
        assert abs(best - compromise(torch.tensor(at), s, t, lam)) < 0.02

# %%
xs = torch.linspace(0, 3, 200)
fig, ax = plt.subplots(figsize=(6.5, 3.8))
ax.plot(xs, xs * s / sigma(s, t), color=STUDENT, lw=2.5, label="consistency alone")
for lam, style in ((0.1, ":"), (1.0, "--"), (10.0, "-.")):
    ax.plot(xs, compromise(xs, s, t, lam), color="black", ls=style, lw=1.8, label=f"both, λ = {lam:g}")
ax.plot(xs, xs * s / ((1 - t) * s + t), color=TEACHER, lw=2.5, label="self-correction alone")
ax.set(xlabel="x", ylabel="best f(x, ½)", xlim=(0, 3), ylim=(0, 4.3))
ax.legend(frameon=False)
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: neither line is kept. Trained together, one network lands between the two; λ moves it. Far out, where
# only x̂_t goes, self-correction wins.*

# %% [markdown]
# The same with sliders, where `ipywidgets` is at hand (hosted notebooks have it); elsewhere one picture.


# %%
def tug_of_war(s=0.15, t=0.5, lam=1.0):
    """Draw what the losses ask for, and how often they come to each x."""
    line, x = (1 - t) * s + t, torch.linspace(0, 3 * ((1 - t) * s + t), 200)
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for std, color, name in ((sigma(s, t), STUDENT, "consistency"), (line, TEACHER, "self-correction")):
        axes[0].plot(x, normal(x, std), color=color, lw=2.5, label=name)
        axes[1].plot(x, x * s / std, color=color, lw=2.5, label=name)
    axes[1].plot(x, compromise(x, s, t, lam), color="black", ls="--", lw=1.8, label=f"both, λ = {lam:g}")
    axes[0].set(xlabel="x", title=f"s = {s:g}, t = {t:g}", ylabel="density", ylim=(0, None))
    axes[1].set(xlabel="x", title="best f(x,t)", ylim=(0, None))
    for ax in axes:
        ax.legend(frameon=False)
    plt.tight_layout()
    plt.show()


try:
    from ipywidgets import interact

    interact(tug_of_war, s=(0.05, 2.0, 0.05), t=(0.05, 0.95, 0.05), lam=(0.0, 10.0, 0.1))
except ImportError:
    tug_of_war()

# %% [markdown]
# *What to see: the two laws all but coincide when s is small against t, and so do the answers. The quarrel is worst
# where (1−t)s = t.*

# %% [markdown]
# ## Can self-correction reach zero at all?
#
# Only if no two lines x₁ → x̂₀ are at the same place at the same time: the network sees (x,t), not the line.
# On the left, lines between data and noise drawn apart. On the right, lines of the exact map.

# %%
angle = torch.arange(8) * math.pi / 4
mixture = scflow.GaussianMixture(2 * torch.stack([angle.cos(), angle.sin()], 1), std=0.15)
n = 2000
noise = torch.randn(n, 2, generator=generator)
data, _ = mixture.sample(n, generator)
one = torch.ones(n)
landed = mixture.flow_map(noise, one, steps=100)  # x̂₀ of the exact map

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 4.5), sharex=True, sharey=True)
for ax, end, title in zip(axes, (data, landed), ("drawn apart", "exact map")):
    a, b = noise[:150], end[:150]
    ax.plot(torch.stack([a[:, 0], b[:, 0]]), torch.stack([a[:, 1], b[:, 1]]), color=GREY, lw=0.8, zorder=1)
    ax.scatter(*a.T, s=12, color=TEACHER, label="$x_1$", zorder=2)
    ax.scatter(*b.T, s=12, color=STUDENT, label="$x_0$" if end is data else r"$\hat{x}_0$", zorder=2)
    ax.set(title=title, xlabel="first coordinate", aspect="equal", xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
    ax.legend(frameon=False, loc="upper left", handletextpad=0.1, borderpad=0)
axes[0].set_ylabel("second coordinate")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: a tangle on the left. On the right each noise goes to the mode on its own side, and the lines fan out.*
#
# **Exercise.** Two lines with starts x₁, y₁ and ends x̂₀, ŷ₀ differ at time t by (1−t)(x̂₀ − ŷ₀) + t(x₁ − y₁). Show: if
# ⟨x₁ − y₁, x̂₀ − ŷ₀⟩ > 0, they never meet. Then count the pairs for which this holds.


# %%
def share_that_cannot_meet(starts, ends):
    """Share of the pairs i < j with ⟨starts_i − starts_j, ends_i − ends_j⟩ > 0."""
    # your answer: the product of the difference with x₁ − y₁ is (1−t)·⟨…⟩ + t·‖x₁ − y₁‖², positive at all t
    a, b = starts[:, None] - starts, ends[:, None] - ends  # (n,n,d)
    i, j = torch.triu_indices(len(starts), len(starts), 1)
    return ((a * b).sum(-1)[i, j] > 0).float().mean().item()


# %%
print(f"pairs that cannot meet: drawn apart {share_that_cannot_meet(noise, data):.3f}, "
      f"exact map {share_that_cannot_meet(noise, landed):.5f}")  # fmt: skip
assert share_that_cannot_meet(noise, landed) > 0.9999  # the lines of the exact map do not cross
assert abs(share_that_cannot_meet(noise, data) - 0.5) < 0.05
line = torch.arange(4.0)[:, None]
assert share_that_cannot_meet(line, line) == 1 and share_that_cannot_meet(line, -line) == 0

# %% [markdown]
# So on the eight Gaussians a student *can* be straight, and exact at t = 1. But it cannot also be the exact map in
# between: there the two kinds of points overlap. Something has to give.
#
# ## Measured: distil first, straighten last
#
# The paper trains all losses jointly. The schedule of this section, `two_phase`, is **this project's own**. Phase 1 has
# no self-correction. Phase 2 has almost nothing else: it straightens the lines to the samples of a frozen copy of the
# phase-1 student.

# %%
first, last = scflow.SCHEDULES["two_phase"]
first, last = replace(first, steps=500), replace(last, steps=250, batch=256)  # shortened: this is a lecture
print(f"phase 1: consistency {first.lambda_consistency}, adv {first.lambda_adv}, self {first.lambda_self}")
print(f"phase 2: consistency {last.lambda_consistency}, adv {last.lambda_adv}, self {last.lambda_self} "
      f"({last.self_form} form, x̂₀ from the {last.self_source} copy)")  # fmt: skip


def batch(n, generator):
    return mixture.sample(n, generator)[0], None


# %% [markdown]
# The teacher is the exact velocity, so it has no error of its own. The student starts from a short regression on it.

# %%
torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
settings = scflow.TeacherSettings(teacher_steps=400)
*_, run = scflow.train_teacher(scflow.MLP(), batch, generator, settings, oracle=mixture)  # run it to the end
start = run.ema

# %%
for run in scflow.distill(mixture, scflow.PointDiscriminator(), batch, generator, (first, last), student=start):
    if run.step == first.steps:
        before, critic = copy.deepcopy(run.ema), copy.deepcopy(run.disc)
after = run.ema
print(f"self-correction loss at the end: {run.losses['self']:.3f} per element, in velocities")

# %%
shown = noise[:40]
fig, axes = plt.subplots(1, 2, figsize=(9, 4.5), sharex=True, sharey=True)
for ax, net, title in zip(axes, (before, after), ("after phase 1", "after phase 2")):
    _, path = scflow.sample(net, shown, steps=8, trajectory=True)
    jump = scflow.sample(net, shown, steps=1)
    ax.plot(*path.permute(2, 0, 1), color=GREY, lw=1.2, zorder=1)
    ax.scatter(*jump.T, s=55, facecolors="none", edgecolors=TEACHER, linewidths=1.5, label="1 step", zorder=2)
    ax.scatter(*path[-1].T, s=14, color=STUDENT, label="8 steps", zorder=3)
    ax.set(title=title, xlabel="first coordinate", aspect="equal", xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
axes[0].set_ylabel("second coordinate")
axes[0].legend(frameon=False, loc="upper left", handletextpad=0.1, borderpad=0)
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: the path of each noise in eight Euler steps, and its one-step sample as a ring. After phase 1 the dots
# miss their rings. After phase 2 the paths are nearly straight, and most dots sit in or next to their ring.*

# %% [markdown]
# In numbers: energy distance to the data (zero is perfect), the consistency gap (RMS distance to the one-step sample of
# the same noise), and the pairs of lines that cannot meet. For comparison, Euler steps of the *exact* map.

# %%
STEPS = (1, 2, 4, 8)
distance = scflow.EnergyDistance(*mixture.sample(n, generator, stratified=True))
floor = scflow.noise_floor(distance, lambda: mixture.sample(n, generator)[0], repeats=10)


def exact(x, t, cond=None):
    """The exact flow map in the form of a student: the average velocity to the end."""
    return (x - mixture.flow_map(x, t, steps=25)) / t[:, None]


def measure(net):
    """Energy distances with Euler and with re-noising, and consistency gaps, for each number of steps."""
    euler = {k: scflow.sample(net, noise, k) for k in STEPS}
    renoised = [scflow.sample(net, noise, k, "renoise", generator=torch.Generator().manual_seed(1)) for k in STEPS]
    gaps = {k: scflow.rms_distance(euler[1], x) for k, x in euler.items()}
    return {"euler": [distance(x) for x in euler.values()], "renoise": [distance(x) for x in renoised], "gap": gaps}


# %%
rows = {"exact map": measure(exact), "after phase 1": measure(before), "after phase 2": measure(after)}
print(f"energy distance ×10³, floor {1e3 * floor[0]:.1f} ± {1e3 * floor[1]:.1f}; steps {STEPS}")
for name, row in rows.items():
    for solver in ("euler", "renoise"):
        print(f"  {name:14s} {solver:8s}", *(f"{1e3 * value:7.1f}" for value in row[solver]))
for name, row in rows.items():
    print(f"consistency gap, {name:14s}", *(f"{value:.3f}" for value in row["gap"].values()))
for name, net in (("phase 1", before), ("phase 2", after)):
    share = share_that_cannot_meet(noise, scflow.sample(net, noise))
    print(f"pairs of lines that cannot meet, after {name}: {share:.4f}")
    assert share > 0.9  # nearly all, but a trained map is not the exact one: a small floor remains

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
looks = {"exact map": (GREY, "s", "--"), "after phase 1": (STUDENT, "o", "-"), "after phase 2": (TEACHER, "^", "-")}
for ax, solver, title in zip(axes, ("euler", "renoise"), ("Euler steps", "fresh re-noising")):
    ax.axhspan(*(1e3 * (floor[0] + sign * 2 * floor[1]) for sign in (-1, 1)), color="#EEEEEE", label="noise floor")
    for name, (color, marker, style) in looks.items():
        values = [1e3 * value for value in rows[name][solver]]
        ax.plot(range(4), values, color=color, marker=marker, ls=style, lw=2.2, ms=8, label=name)
    ax.set(title=title, xlabel="steps", xticks=range(4), xticklabels=STEPS)
axes[0].set_ylabel("energy distance ×10³")
axes[0].legend(frameon=False, loc="upper left")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: with Euler, more steps harm the exact map and the phase-1 student alike: it is no defect of training.
# Phase 2 makes the curve flat. With re-noising it is the other way round, for re-noising visits x_t and not x̂_t.*

# %%
one_step, gap = {k: r["euler"][0] for k, r in rows.items()}, {k: r["gap"][8] for k, r in rows.items()}
assert gap["after phase 2"] < gap["after phase 1"] / 2
assert rows["after phase 2"]["euler"][3] < rows["after phase 1"]["euler"][3] / 2
assert rows["after phase 2"]["renoise"][3] > 2 * rows["after phase 1"]["renoise"][3]
assert rows["exact map"]["euler"][3] > 0.02 > 0.005 > abs(rows["exact map"]["renoise"][3])

# %% [markdown]
# ## The price
#
# Compare the student with the exact map on true points x_t, at every t. **Predict before you run it:** where does
# phase 2 change the answer, and where can it not?

# %%
truth = {}  # t → true points x_t, and where the exact map takes them
for t in torch.linspace(0.1, 1, 10):
    x0, x1 = mixture.sample(n, generator)[0], torch.randn(n, 2, generator=generator)
    xt = scflow.interpolate(x0, x1, t * one)
    truth[round(t.item(), 1)] = xt, mixture.flow_map(xt, t * one, steps=40)


def map_error(net, t):
    """RMS distance of f(x_t,t) to f*(x_t,t), for one t of the grid."""
    xt, end = truth[t]
    with torch.no_grad():
        return scflow.rms_distance(scflow.predict_x0(net, xt, t * one), end)


errors = {name: [map_error(net, t) for t in truth] for name, net in (("phase 1", before), ("phase 2", after))}

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
for (name, values), color, marker in zip(errors.items(), (STUDENT, TEACHER), "o^"):
    ax.plot(truth.keys(), values, color=color, marker=marker, lw=2.2, ms=8, label=f"after {name}")
ax.set(xlabel="t", ylabel="flow-map error on true $x_t$", ylim=(0, None))
ax.legend(frameon=False)
plt.tight_layout()
plt.show()
assert errors["phase 2"][-1] < 1.5 * errors["phase 1"][-1]  # at t = 1 the map is kept
assert errors["phase 2"][4] > 1.5 * errors["phase 1"][4]  # at t = ½ it is given up

# %% [markdown]
# *What to see: at t = 1, where x_t and x̂_t are both the noise, the two students are about equally exact. In between,
# phase 2 has given the map up.* Euler steps from noise walk along the points x̂_t. Only re-noising goes to the points
# x_t, and pays.

# %% [markdown]
# ## The frontier
#
# The paper trains the losses together. Let students go on from phase 1 for as many updates as phase 2 had, with
# consistency, adversarial term and self-correction jointly, at weights λ_self from 0 to 10. (Not the paper's full
# setting: that is joint from the teacher on, with truncation and the bidirectional term.) The last one takes x̂₀ not
# from the student itself but from its slow average.

# %%
joint = replace(first, steps=last.steps, batch=last.batch, lr=last.lr)
points = {}
for lam, source in ((0.0, "student"), (0.1, "student"), (1.0, "student"), (10.0, "student"), (10.0, "ema")):
    phase, g = replace(joint, lambda_self=lam, self_source=source), torch.Generator().manual_seed(3)
    *_, run = scflow.distill(mixture, copy.deepcopy(critic), batch, g, (phase,), student=before)
    a, b = (scflow.sample(run.ema, noise, k) for k in (1, 8))
    points[lam, source] = map_error(run.ema, 0.5), scflow.rms_distance(a, b), 1e3 * distance(a), 1e3 * distance(b)

# %%
points["exact"] = 0.0, gap["exact map"], *(1e3 * rows["exact map"]["euler"][i] for i in (0, 3))
points["start"] = errors["phase 1"][4], gap["after phase 1"], *(1e3 * rows["after phase 1"]["euler"][i] for i in (0, 3))
points["two"] = errors["phase 2"][4], gap["after phase 2"], *(1e3 * rows["after phase 2"]["euler"][i] for i in (0, 3))
for name, values in points.items():
    print(f"{name!s:17s} map error {values[0]:.2f}, gap {values[1]:.2f}, "
          f"energy distance ×10³ {values[2]:.1f} in 1 step, {values[3]:.1f} in 8")  # fmt: skip
chain = [values for key, values in points.items() if key[1:] == ("student",)]
looks = {"exact": (GREY, "s", "exact map"), "start": (STUDENT, "o", "phase 1: the start")}
looks[10.0, "ema"] = PINK, "D", "λ = 10, x̂₀ from the average"
looks["two"] = TEACHER, "^", "two_phase (ours)"

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 4.3))
for ax, i, name in zip(axes, (1, 3), ("gap, 1 to 8 steps", "energy distance ×10³, 8 steps")):
    ax.plot([v[0] for v in chain], [v[i] for v in chain], color=THIRD, marker="s", lw=1.5, ms=8, label="joint, by λ")
    for key, (color, marker, label) in looks.items():
        ax.plot(points[key][0], points[key][i], marker, color=color, ms=11, label=label)
    ax.set(xlabel="flow-map error at t = ½", ylabel=name, xlim=(-0.03, None), ylim=(0 if i == 1 else -1.5, None))
    for lam, v, place in zip(("λ=0", "0.1", "1", "10"), chain, ((-38, -2), (-32, -13), (10, 2), (-22, -16))):
        ax.annotate(lam, (v[0], v[i]), place, textcoords="offset points")
axes[0].legend(frameon=False, loc="lower left", fontsize=11)
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: left is faithful to the teacher's map, down is consistent; no student is both, and the exact map itself
# has a gap. A small λ changes little; a large one gives up the map for a smaller gap. `two_phase` goes to that end on
# purpose, from a target that stands still. At λ = 10 the student that chases its own samples agrees with itself better
# than before, on worse samples.*

# %%
faithful, strong, two = points[0.0, "student"], points[10.0, "student"], points["two"]
for row in (strong, two):
    assert row[0] > 1.5 * faithful[0] and row[1] < faithful[1] / 1.2  # a smaller gap, paid with the map
assert points["exact"][1] > 1.5 * two[1]
assert strong[2] > 3 * faithful[2] and strong[2] > points[10.0, "ema"][2]  # its own source: one step suffers too
assert two[3] < min(faithful[3], strong[3]) / 2  # the frozen source keeps the samples good

# %% [markdown]
# **The answer.** Straight lines make the step counts agree. The price is the teacher's map between the ends. You pay
# only if something visits the points x_t there: re-noising does, Euler does not.

# %% [markdown]
# ## What to try next
#
# - Let phase 2 follow a moving target: `replace(last, self_source="ema")`. Does the one-step sample drift?
# - Swap the form: `replace(last, self_form="x0")`. Which step count suffers, and which times had the weight t²?
# - Train jointly from the teacher on, `scflow.SCHEDULES["paper"]`, and mark it on the frontier. Then open the next
#   notebook of this folder.
