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

start(linewidth=2)
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## Two kinds of points
#
# Consistency trains the student at x_t = (1−t)·x₀ + t·x₁, where data x₀ and noise x₁ are drawn independently.
# An Euler step goes somewhere else. It starts at x₁ and moves towards the one-step sample x̂₀ = f(x₁,1). So it arrives
# at x̂_t = (1−t)·x̂₀ + t·x₁, where x̂₀ was made from *the same* x₁.
#
# **Self-correction** trains the student at x̂_t. Its loss is ‖f(x̂_t,t) − x̂₀‖², with no gradient in x̂₀. If the loss
# is zero, every later jump lands where the first one did.
#
# The exact map f\* is the perfect student of consistency (notebook 2). Is its self-correction loss zero? Take data
# N(0, s²) in one dimension. There x_t has the standard deviation σ_t = √((1−t)²s² + t²), and f\*(x,t) = (s/σ_t)·x.
# Because x̂₀ = s·x₁, x̂_t has the standard deviation σ̂_t = (1−t)s + t. The loss is s²·(σ̂_t/σ_t − 1)² on average.

# %%
x1 = torch.randn(50_000, generator=generator)
t = torch.linspace(0, 1, 101)[:, None]  # (101,1): with (50000,) it makes (101,50000)
fig, ax = plt.subplots(figsize=(7, 3.6))
for s, color in ((0.15, GREY), (0.5, STUDENT), (2.0, TEACHER)):
    sigma = (((1 - t) * s) ** 2 + t**2) ** 0.5
    sigma_hat = (1 - t) * s + t
    x0_hat = s * x1  # f*(x₁,1)
    xt_hat = (1 - t) * x0_hat + t * x1
    again = s / sigma * xt_hat  # f*(x̂_t,t)
    loss = (again - x0_hat).square().mean(1, keepdim=True)
    assert torch.allclose(loss, s**2 * (sigma_hat / sigma - 1) ** 2, rtol=0.03, atol=1e-6)
    ax.plot(t, loss / s**2, color=color, label=f"s = {s:g}")
ax.set(xlabel="t", ylabel="loss of the exact map / s²", xlim=(0, 1), ylim=(0, 0.22))
ax.legend(loc="upper center", ncol=3)
plt.show()

# %% [markdown]
# *What to see: the loss is zero only at the two ends. In between, even the exact map lands somewhere else when it
# starts from x̂_t. What the picture leaves out: real data are not one Gaussian.*
#
# ## The same loss in velocities
#
# The loss can also compare velocities: ‖v(x̂_t,t) − (x₁ − x̂₀)‖². Then it says: **on the line from x₁ to x̂₀ the velocity
# is that of the line**. The student's paths become straight.
#
# **Exercise.** Write f(x̂_t,t) − x̂₀ with v = v(x̂_t,t), without f and x̂_t. (Hint: f(x,t) = x − t·v(x,t).)


# %%
def landing_error(v, x1, x0_hat, t):
    """f(x̂_t,t) − x̂₀."""
    return ...  # your answer


# %%
@exercise
def check():
    v, x1, x0_hat, t = torch.rand(4, 500)
    xt_hat = (1 - t) * x0_hat + t * x1
    f = xt_hat - t * v
    assert torch.allclose(f - x0_hat, landing_error(v, x1, x0_hat, t), atol=1e-5)


# %% jupyter={"source_hidden": true}
# Solution
def landing_error(v, x1, x0_hat, t):
    return t * ((x1 - x0_hat) - v)


check()

# %% [markdown]
# So the velocity form is that loss over t², at each t. It gives more weight to small t.
#
# ## Can one student satisfy both losses?
#
# Yes, if it can tell an x_t from an x̂_t. Take data N(0, I) in d dimensions, and t = ½. In each dimension x_t has
# variance ½. Here f\*(x₁,1) = x₁, so x̂_t = x₁ has variance 1. Only the norm of a point tells its kind. The densities
# are equal at ‖x‖² = d·ln 2: the best guess is x_t below, and x̂_t above. The *overlap* is the sum of both error rates.

# %%
for d in (2, 8, 32, 128, 512):
    x0, x1 = torch.randn(2, 20_000, d, generator=generator)
    xt = (x0 + x1) / 2
    xt_above = (xt.square().sum(1) > d * math.log(2)).float().mean()
    xt_hat_below = (x1.square().sum(1) < d * math.log(2)).float().mean()
    print(f"{d:3} dimensions: overlap {xt_above + xt_hat_below:.2f}")

# %% [markdown]
# In the plane most points could be of either kind. In 512 dimensions hardly any could, and a student might satisfy
# both losses. (Overlap is not all: "More dimensions" in `experiments/README.md` measures trained students.)
#
# Where the points overlap, the student has to compromise. Take d = 1, s = 1, t = ½. At a point x, consistency asks for
# f\*(x,½) = √2·x. Self-correction asks for x, because here x̂₀ = x₁ = x̂_t.
#
# **Exercise.** Let p be the density of the points x_t at x, and q that of the points x̂_t. If both losses are squared,
# and trained together, f(x,½) minimises p·(f − √2·x)² + λ·q·(f − x)². Which f is it?


# %%
def compromise(x, p, q, lam):
    """The best f(x,½) for both losses, where self-correction has the weight λ."""
    return ...  # your answer


# %%
@exercise
def check():
    f = torch.linspace(0, 3, 30_001)
    for x, p, q, lam in ((1.0, 0.21, 0.24, 0.1), (1.0, 0.21, 0.24, 1.0), (2.0, 0.01, 0.05, 1.0)):
        loss = p * (f - math.sqrt(2) * x) ** 2 + lam * q * (f - x) ** 2
        assert abs(compromise(x, p, q, lam) - f[loss.argmin()]) < 1e-3


# %% jupyter={"source_hidden": true}
# Solution
def compromise(x, p, q, lam):
    return (p * math.sqrt(2) * x + lam * q * x) / (p + lam * q)  # the mean of both, with weights p and λ·q


check()

# %% [markdown]
# ## Measured: first distil, then straighten
#
# The paper trains all losses together. Where points overlap, its student should lie between the two values; λ moves it.
# The schedule `two_phase` is **this project's own**. Phase 1 is consistency alone, with better steps of the teacher
# (notebook 9). Phase 2 is self-correction in its velocity form, with a weak critic (notebook 3). Here x̂₀ comes from a
# frozen copy of the student of phase 1, and three quarters of the rows have t = 1. The teacher is the exact velocity of
# eight Gaussians. It has no weights to copy, so the student starts untrained.
#
# Do one step and eight agree? The *gap* is the root-mean-square distance of their ends, from the same noise.

# %%
mixture = toy_2d.dataset("8gaussians")
first, last = scflow.SCHEDULES["two_phase"]
first = replace(first, steps=500)  # shortened: this is a lecture
last = replace(last, steps=250, batch=256)
torch.manual_seed(0)
net = scflow.MLP()
critic = scflow.PointCritic()
for run in scflow.distill(mixture, critic, toy_2d.batches(mixture), generator, (first, last), student=net):
    if run.step == first.steps:  # the end of phase 1
        before = copy.deepcopy(run.ema)
students = {"after phase 1": before, "after phase 2": run.ema}
print(f"self-correction loss at the end, in velocities: {run.losses['self']:.3f}")

# %%
noise = torch.randn(2000, 2, generator=generator)
gaps = {}
fig, axes = plt.subplots(1, 2, figsize=(9, 4.8))
for ax, (name, net) in zip(axes, students.items()):
    jump = scflow.sample(net, noise)
    x, path = scflow.sample(net, noise, steps=8, trajectory=True)
    gaps[name] = toy_2d.rms_distance(x, jump)
    ax.plot(*path[:, :40].permute(2, 0, 1), color=GREY, lw=1.2)  # x and y, (9,40) each
    ax.scatter(*jump[:40].T, s=55, zorder=3, facecolors="none", edgecolors=TEACHER, label="1 step")
    ax.scatter(*x[:40].T, s=14, zorder=3, color=STUDENT, label="8 steps")
    toy_2d.window(ax, f"{name}: gap {gaps[name]:.2f}")
axes[0].legend(loc="upper left")
plt.show()
assert gaps["after phase 2"] < gaps["after phase 1"] / 2

# %% [markdown]
# *What to see: a grey line is the path of one noise in eight Euler steps, and a dot is its end. A ring is the one-step
# sample of the same noise. After phase 1 most dots miss their ring. After phase 2 most are in it or on its edge. The
# paths are nearly straight. What is wrong: not all dots are in the middle, and a few samples lie between the modes.*
#
# (Lines that cross would ask for two velocities at one point. The small loss above suggests that they hardly cross.)
#
# Now the energy distance to the data, with Euler steps and with re-noising (notebook 2). The floor: true samples.


# %%
def exact(x, t, cond=None):
    """The exact map in the form of a student: the average velocity to the end."""
    return (x - mixture.flow_map(x, t, steps=25)) / t[:, None]


distance = toy_2d.reference("8gaussians", 2000)  # to a fixed sample of the data
floor = toy_2d.floor_of("8gaussians", 2000)
scores = {}
print(f"energy distance ×10³ at 1, 2, 4, 8 steps; noise floor {1e3 * floor['mean']:.1f} ± {1e3 * floor['sd']:.1f}")
for name, net in {"exact map": exact, **students}.items():
    for solver in ("euler", "renoise"):
        samples = [scflow.sample(net, noise, k, solver, generator=generator) for k in (1, 2, 4, 8)]
        scores[name, solver] = [1e3 * distance(x) for x in samples]
        print(f"  {name:13s} {solver:7s}", *(f"{score:6.1f}" for score in scores[name, solver]))
assert scores["exact map", "euler"][3] > 20
assert abs(scores["exact map", "renoise"][3]) < 5
assert scores["after phase 2", "euler"][3] < scores["after phase 1", "euler"][3] / 2
assert scores["after phase 2", "renoise"][3] > 2 * scores["after phase 1", "renoise"][3]

# %% [markdown]
# With Euler, more steps harm the exact map and the student of phase 1 alike. After phase 2 one step and eight are both
# near the noise floor. With re-noising it is the other way round, because re-noising goes to points x_t, not x̂_t.
#
# ## The price
#
# How far (root-mean-square) are both students from the exact map, at true points x_t? **Predict before you run it:** at
# which t does phase 2 change the student, and where not?

# %%
errors = {}
for t in (0.2, 0.5, 0.8, 1.0):
    times = torch.full((2000,), t)
    x0, _ = mixture.sample(2000, generator)
    xt = scflow.interpolate(x0, noise, times)
    end = mixture.flow_map(xt, times, steps=40)
    for name, net in students.items():
        errors[name, t] = toy_2d.rms_distance(scflow.predict_x0(net, xt, times), end)
    print(f"t = {t}: distance after phase 1 {errors['after phase 1', t]:.2f}, phase 2 {errors['after phase 2', t]:.2f}")
assert errors["after phase 2", 0.5] > 1.5 * errors["after phase 1", 0.5]  # at t = ½ the map is given up
assert errors["after phase 2", 1.0] < 1.5 * errors["after phase 1", 1.0]  # at t = 1 it is kept
for name in students:
    print(f"{name}: gap {gaps[name]:.2f}, distance to the exact map at t = ½ {errors[name, 0.5]:.2f}")

# %% [markdown]
# At t = 1 the target is the frozen copy's x̂₀, so the map is kept. In between, phase 2 has given it up.
#
# **The answer.** Self-correction makes the paths straight, and then one step and eight agree. The price is the exact
# map between the ends. You pay only if a sampler visits the points x_t there: re-noising does, Euler does not.
#
# ## What to try next
#
# - Let phase 2 follow a moving target: `replace(last, self_source="ema")`. Does the one-step sample drift?
# - Use the other form: `replace(last, self_form="x0")`. Which step count suffers, and which times had little weight?
# - Train all losses together: `scflow.SCHEDULES["paper"]`, with λ_self of 0.1, 1 and 10. What does a smaller gap cost?
