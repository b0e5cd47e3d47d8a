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
# # 2. Consistency
#
# **Question.** Can one network evaluation jump to where the flow would land? And if it can, why do more steps of the
# same network make the samples worse?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/02_consistency.ipynb)

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
plt.rcParams["figure.dpi"] = 80
plt.rcParams["lines.linewidth"] = 2

# %% [markdown]
# ## The flow map
#
# Data are eight Gaussians, and the teacher is their exact velocity v\*. Follow it from (x,t) down to t = 0: where it
# lands is **f\*(x,t)**. Two facts fix f\*: it is the same at all points of a path, and f\*(x,0) = x.

# %%
mixture = toy_2d.dataset("8gaussians")
generator = torch.Generator().manual_seed(0)
noise = torch.randn(4000, 2, generator=generator)
times = torch.linspace(1, 0, 101)

# %%
_, path = scflow.sample(mixture, noise[:30], steps=100, solver="heun", trajectory=True)  # (101,30,2)
landed = []  # f*(x_t,t) at each point
guess = []  # x_t − t·v*(x_t,t)
for x, t in zip(path, times):
    landed.append(mixture.flow_map(x, t.expand(30), steps=50))
    guess.append(scflow.predict_x0(mixture, x, t.expand(30)))
landed = torch.stack(landed)
guess = torch.stack(guess)
end = path[-1]
assert torch.equal(landed[-1], end)  # f*(x,0) = x
assert (landed - end).norm(dim=-1).max() < 0.02  # constant along each path
assert (guess - end).norm(dim=-1).max() > 1  # the straight jump with v* is not

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 4.4))
axes[0].plot(*path.permute(2, 0, 1), color=GREY, lw=1)
axes[0].scatter(*path[0].T, s=14, zorder=3, color=TEACHER, label="noise")
axes[0].scatter(*landed[0].T, s=22, zorder=3, color=STUDENT, label="f* of the noise")
toy_2d.window(axes[0])
for curves, color, name in ((path, GREY, "$x_t$"), (guess, TEACHER, "$x_t - t\\,v^*$"), (landed, STUDENT, "f*")):
    first, *others = axes[1].plot(times, curves[:, [0, 2, 4], 0], color=color)
    first.set_label(name)
axes[1].set(xlabel="t", ylabel="first coordinate", xlim=(1, 0), ylim=(-1.8, 2.2))
axes[0].legend(loc="upper left")
axes[1].legend(loc="upper center", ncol=3)
plt.show()

# %% [markdown]
# *What to see. Left: paths bend, and f\* knows their ends. Right: three paths, from noise to data. The point moves
# (grey); the teacher's straight guess moves too (orange); only f\* (blue) says the same thing all the way.*

# %% [markdown]
# ## A loss from the two facts
#
# Learn f\* without walking the paths. Take a point x_t and its neighbour on the path, a little nearer to the data. Ask
# the student for the same answer at both: that is **consistency**. The target is the answer of θ⁻, an average of the
# student's latest weights, which is held fixed in the update.
#
# The other fact, f(x,0) = x, costs nothing: f(x,t) = x − t·v(x,t) has it **whatever the weights are**.

# %%
torch.manual_seed(0)
net = scflow.MLP()  # untrained
assert torch.equal(scflow.predict_x0(net, noise, torch.zeros(4000)), noise)
assert not torch.allclose(scflow.predict_x0(net, noise, torch.ones(4000)), noise, atol=0.1)

# %% [markdown]
# ## Break it
#
# **Predict before you run it:** what is learned if the network gives f itself, and nothing ties down t = 0? Everything
# else stays: the loss, the teacher, the loop, the seeds.


# %%
class Free(torch.nn.Module):
    """A student whose f(x,t) is the network itself; this is the velocity that makes it so."""

    def __init__(self):
        super().__init__()
        self.net = scflow.MLP()

    def forward(self, x, t, cond=None):
        return (x - self.net(x, t)) / t.clamp(min=1e-6)[:, None]


# %%
short = scflow.Phase(steps=300, batch=256, tau=0.0, lambda_adv=0.0, lambda_self=0.0, lambda_bi=0.0)
batch = toy_2d.batches(mixture)
critic = scflow.PointCritic()  # it has weight zero here
losses = {}
students = {}
for name, kind in (("f = x − t·v", scflow.MLP), ("f = network", Free)):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    losses[name] = []
    for run in scflow.distill(mixture, critic, batch, g, (short,), student=kind()):
        losses[name].append(run.losses["consistency"])
    students[name] = run.ema

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.4))
for ax, name, color in zip(axes[1:], students, (STUDENT, TEACHER)):
    axes[0].semilogy(losses[name], color=color, lw=1.5, label=name)
    x = scflow.sample(students[name], noise[:1000])
    toy_2d.cloud(ax, x, name, color)
axes[0].set(xlabel="update", title="consistency loss", ylim=(1e-6, 0.1))
axes[0].legend(loc="lower left")
plt.show()

# %% [markdown]
# *What to see: the network without a boundary wins on the loss and loses everything else. It says nearly the same for
# every noise: a constant is perfectly consistent.* A small consistency loss proves nothing by itself.

# %%
final = {}
spread = {}
for name, net in students.items():
    final[name] = np.mean(losses[name][-20:])
    spread[name] = scflow.sample(net, noise).std(0).mean().item()
    print(f"{name:12s} final loss {final[name]:.6f}, standard deviation of the samples {spread[name]:.3f}")
assert final["f = network"] < final["f = x − t·v"] / 10
assert spread["f = network"] < 0.1
assert spread["f = x − t·v"] > 1

# %% [markdown]
# ## The neighbour
#
# The true neighbour on the path is not known. The teacher gives it approximately, by one Euler step:
# x_r = x_t − (t−r)·v\*(x_t,t). The time r is drawn evenly from the **window** before t, r = t − U(0, min(t,δ)).
# (`scflow` writes x_s; from here on, s is the width of the data.)
#
# What does that Euler step cost? One Gaussian N(0, s²) shows it, for there every map is a factor on x.


# %%
def sigma(s, t):
    """Standard deviation of x_t."""
    return (((1 - t) * s) ** 2 + t**2) ** 0.5


def slope(s, t):
    """v*(x,t) / x."""
    return (t - (1 - t) * s**2) / sigma(s, t) ** 2


def exact_factor(s, t):
    """f*(x,t) / x."""
    return s / sigma(s, t)


def mean_factor(s, t):
    """E[x₀|x_t = x] / x."""
    return 1 - t * slope(s, t)


# %%
x = torch.randn(500, 1, generator=generator)
t = torch.rand(500, generator=generator)
for s in (0.15, 0.5, 2.0):
    gaussian = GaussianMixture([[0.0]], std=s)
    assert torch.allclose(gaussian(x, t), slope(s, t)[:, None] * x, atol=1e-3)
    assert torch.allclose(gaussian.flow_map(x, t), exact_factor(s, t)[:, None] * x, atol=1e-3)

# %% [markdown]
# **Exercise.** A student says f(x,r) = a·x at time r. By which number does it multiply x_t when it answers at the
# teacher's neighbour, f(x_r,r)?


# %%
def target_factor(a, t, r, s):
    """f(x_r,r) / x_t for x_r one Euler step from x_t."""
    return ...  # your answer


# %%
@exercise
def check():
    r = t * torch.rand(500)
    a = torch.rand(500)
    near = t - 1e-4
    for s in (0.15, 0.5, 2.0):
        gaussian = GaussianMixture([[0.0]], std=s)
        neighbour = scflow.follow(gaussian, x, t, r, "euler")
        assert torch.allclose(a[:, None] * neighbour, target_factor(a, t, r, s)[:, None] * x, atol=1e-3)
        close = target_factor(exact_factor(s, near), t, near, s)
        assert torch.allclose(close, exact_factor(s, t), atol=1e-3)  # for a tiny step f* is consistent


# %% jupyter={"source_hidden": true}
# Solution
def target_factor(a, t, r, s):
    return a * (1 - (t - r) * slope(s, t))


check()

# %% [markdown]
# At f\* itself the two answers differ by O(δ²): halve the step, and the residual falls by four.

# %%
s = 0.5
t = 0.6
steps = 0.2 / 2 ** torch.arange(7, dtype=torch.float64)
r = t - steps
target = target_factor(exact_factor(s, r), t, r, s)
residuals = sigma(s, t) * (exact_factor(s, t) - target).abs()
ratios = residuals[:-1] / residuals[1:]
print("halving the step divides the residual by", *(f"{ratio:.2f}" for ratio in ratios))
assert abs(ratios[-1] - 4) < 0.1

# %% [markdown]
# ## What a window trades
#
# So take a tiny window? Only at t = 0 is the answer known from the start, f(x,0) = x. With every refit it is known up
# to a time that is at most δ higher. We can watch it: keep one factor a(t) for each t of a grid. A **sweep** refits all
# of them, each to the mean of its targets.

# %%
grid = torch.linspace(0, 1, 801, dtype=torch.float64)
ts = grid[:, None]
rs = grid[None, :]


def sweep_matrix(delta, s):
    """M with a ← M·a: row t averages the targets from all r of the window before t."""
    inside = (rs < ts) & (rs > ts - delta - 1e-9)
    count = inside.sum(1, keepdim=True).clamp(min=1)
    matrix = target_factor(1, ts, rs, s) * inside / count
    matrix[0, 0] = 1  # f(x,0) = x
    return matrix


def at_rest(matrix, constant=0 * grid):
    """The a that a sweep leaves as it is: a = M·a + constant, with a = 1 at t = 0."""
    eye = torch.eye(len(grid) - 1)
    rest = torch.linalg.solve(eye - matrix[1:, 1:], matrix[1:, 0] + constant[1:])
    return torch.cat([grid[-1:], rest])


# %%
s = 0.5
deltas = [0.4, 0.2, 0.1, 0.05, 0.025, 0.0125]
bias = []
sweeps = []
snapshots = []
for delta in deltas:
    matrix = sweep_matrix(delta, s)
    final = at_rest(matrix)[-1].item()
    a = mean_factor(s, grid)  # it starts at the teacher's guess
    count = 0
    while abs(a[-1] - final) > 0.01 * s:
        if delta == 0.1 and count % 6 == 0:
            snapshots.append(a)
        a = matrix @ a
        count += 1
    bias.append(abs(final - s))
    sweeps.append(count)

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.6))
for i, a in enumerate(snapshots):
    axes[0].plot(grid, a, color=STUDENT, lw=1.5, alpha=0.25 + 0.75 * i / len(snapshots))
axes[0].plot(grid, exact_factor(s, grid), "k--", label="f*")
axes[0].set(xlabel="t", ylabel="f(x,t) / x", ylim=(0, 1.15), title="δ = 0.1, every 6 sweeps")
axes[1].loglog(steps, residuals, "s-", color=GREY, label="residual of f*")
axes[1].loglog(deltas, bias, "o-", color=TEACHER, label="error after many sweeps")
axes[1].set(xlabel="δ", title="error")
axes[2].loglog(deltas, sweeps, "^-", color=GREEN)
axes[2].set(xlabel="δ", title="sweeps until within 1%")
for ax in axes[:2]:
    ax.legend()
plt.show()

# %% [markdown]
# *What to see. Left: the curve starts at the teacher's guess and is put right from t = 0 outwards. Middle: one hop errs
# by δ² (grey), the whole walk by δ (orange). Right: the shorter the window, the more sweeps. A short window is more
# exact, and takes longer.*

# %%
for delta, error, count in zip(deltas, bias, sweeps):
    print(f"δ = {delta:<7g} error after many sweeps, over s: {error / s:.3f}; sweeps: {count}")
assert 1.7 < bias[-2] / bias[-1] < 2.1  # first order: half the window, half the error
assert 1.5 < sweeps[-1] / sweeps[-2] < 2.5  # and twice the sweeps

# %% [markdown]
# The same with sliders, where `ipywidgets` is at hand (hosted notebooks have it); elsewhere one picture.


# %%
def draw_sweeps(delta=0.1, sweeps=6, s=0.5):
    """Draw the factor a(t) after a number of sweeps with window δ."""
    matrix = sweep_matrix(delta, s)
    a = mean_factor(s, grid)
    for _ in range(sweeps):
        a = matrix @ a
    fig, ax = plt.subplots(figsize=(6.5, 3.4))
    ax.plot(grid, a, color=STUDENT, label=f"δ = {delta:g}, {sweeps} sweeps")
    ax.plot(grid, at_rest(matrix), ":", color=TEACHER, label="after many sweeps")
    ax.plot(grid, exact_factor(s, grid), "k--", label="f*")
    ax.set(xlabel="t", ylabel="f(x,t) / x", ylim=(0, 1.15), title=f"s = {s:g}")
    ax.legend()
    plt.show()


try:
    from ipywidgets import interact

    interact(draw_sweeps, delta=(0.02, 0.5, 0.02), sweeps=(0, 60), s=(0.1, 1.0, 0.1))
except ImportError:
    draw_sweeps()

# %% [markdown]
# *What to see: the answer is known as far as the blue curve lies on the dotted one. With a wide window that is
# everywhere at once, but the answer is wrong.*

# %% [markdown]
# ## A better step
#
# The Euler step makes it wrong. After many sweeps the student says what the teacher's hops say, hop after hop
# down to t = 0, and each hop errs. So let the teacher walk better inside the window: `scflow.follow` can take one
# **Heun** step, or two. It costs more teacher evaluations, but they need no gradient.
#
# **Predict before you run it:** on the eight Gaussians, by how much does the error of the whole walk fall when δ is
# halved?


# %%
def walk_error(delta, walk):
    """RMS distance to f* of hops of length δ from t = 1 to 0, with the exact velocity."""
    hops = round(1 / delta)
    x = start
    for i in range(hops):
        t = torch.full((len(x),), 1 - i / hops, dtype=torch.float64)
        r = torch.full((len(x),), 1 - (i + 1) / hops, dtype=torch.float64)
        x = scflow.follow(precise, x, t, r, walk)
    return toy_2d.rms_distance(x, goal)


precise = toy_2d.dataset("8gaussians").double()  # double precision: the errors are small
start = noise[:500].double()
goal = precise.flow_map(start, torch.ones(500, dtype=torch.float64), steps=1000)
windows = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128]
walks = {}
for walk in ("euler", "heun", "heun-2"):
    walks[walk] = [walk_error(delta, walk) for delta in windows]

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
for walk, color in zip(walks, (TEACHER, STUDENT, GREEN)):
    order = math.log2(walks[walk][-2] / walks[walk][-1])
    wanted = 1 if walk == "euler" else 2
    assert abs(order - wanted) < 0.2
    ax.loglog(windows, walks[walk], "o-", color=color, label=f"{walk}: order {order:.2f}")
ax.set(xlabel="window δ", ylabel="error of the whole walk")
ax.legend()
plt.show()
assert walks["heun-2"][0] < 1.2 * walks["euler"][2]  # δ = 1/2 against δ = 1/8
assert walks["heun-2"][1] < walks["euler"][3] / 2  # δ = 1/4 against δ = 1/16

# %% [markdown]
# *What to see: one Euler step per window leaves an error of order δ, one Heun step of order δ², once the window is
# short enough for the bends of the paths.* Two Heun steps in a window of ½ err no more than one Euler step in a window
# of ⅛, and news of the data moves four times as far with every refit. In narrower windows they are far ahead. So a
# better step buys a **wide window**. The paper takes one Euler step in a narrow one; this project's own schedule,
# `two_phase`, takes two Heun steps in a wide one. (A student draws its hops from 0 to δ, so its error is smaller than
# that of the longest hops. The order is the same.)

# %% [markdown]
# ## Truncation
#
# The paper does not walk all the way: where r < τ, the target is the true x₀. That is news from the data without
# waiting. But many x₀ belong to one x_t, and the best squared answer is their mean,
# E[x₀|x_t] = x_t − t·v\*(x_t,t). Above τ this mean is handed on along the path.
#
# **Exercise.** One Gaussian: what is the standard deviation of f(x₁,1), if it is the mean at the point x_τ of its path?


# %%
def one_step_std(tau, s):
    """Standard deviation of E[x₀|x_τ]."""
    return ...  # your answer


# %%
x1 = torch.randn(500, 1, generator=generator)


@exercise
def check():
    for s in (0.15, 0.5, 1.0, 2.0):
        gaussian = GaussianMixture([[0.0]], std=s)
        for tau in (0.1, 0.4, 0.8):
            x_tau = sigma(s, tau) * x1  # the flow from t = 1 to τ: paths keep their quantile
            mean = scflow.predict_x0(gaussian, x_tau, torch.full((500,), tau))
            assert abs(mean.std() / x1.std() - one_step_std(tau, s)) < 1e-3 * s
        assert abs(one_step_std(0.0, s) - s) < 1e-9
        assert one_step_std(1.0, s) == 0


# %% jupyter={"source_hidden": true}
# Solution
def one_step_std(tau, s):
    return (1 - tau) * s**2 / sigma(s, tau)  # the mean is (1−τ)s²/σ_τ² · x_τ, and x_τ has deviation σ_τ


check()

# %% [markdown]
# The formula hands the mean on without error, from τ sharp. Sweeps with a window tell the rest.


# %%
def rest_std(tau, s, delta=0.1):
    """Standard deviation of f(x₁,1) after many sweeps, with targets x₀ where r < τ."""
    matrix = sweep_matrix(delta, s)
    window = matrix != 0
    truncated = rs < tau - 1e-9
    share = (window & truncated).sum(1) / window.sum(1)  # of the targets that are data
    a = at_rest(matrix * ~truncated, share * mean_factor(s, grid))
    return a[-1].item()


# %%
taus = torch.linspace(0, 1, 101)
some = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
fig, ax = plt.subplots(figsize=(7, 3.8))
for s, color in ((0.15, GREY), (0.5, GREEN), (1.0, STUDENT)):
    ax.plot(taus, one_step_std(taus, s) / s, color=color, label=f"s = {s:g}")
    swept = [rest_std(tau, s) / s for tau in some]
    ax.plot(some, swept, "o", color=color)
    assert 0.75 < rest_std(0.4, s) / one_step_std(0.4, s) < 1
ax.axvline(0.4, color="black", ls=":", lw=1.5, label="τ = 0.4")
ax.set(xlabel="truncation τ", ylabel="one-step std / s", xlim=(0, 1), ylim=(0, 1.03))
ax.legend()
plt.show()

# %% [markdown]
# *What to see: lines are the formula, dots the sweeps with δ = 0.1. Truncation shrinks the one-step sample, the narrow
# Gaussian most. The dots lie a little lower: the window shrinks too. A mean is no sample; the next notebook asks a
# critic to win the spread back.*

# %% [markdown]
# ## A student
#
# Back to the eight Gaussians, with τ = 0. The network of the broken experiment that kept its boundary goes on
# training, in larger batches.

# %%
phase = scflow.Phase(steps=900, batch=384, tau=0.0, lambda_adv=0.0, lambda_self=0.0, lambda_bi=0.0)
g = torch.Generator().manual_seed(2)
for run in scflow.distill(mixture, critic, batch, g, (phase,), student=students["f = x − t·v"]):
    student = run.ema  # the average that is sampled from

# %%
noise = noise[:2000]
clouds = {
    "v*, 1 step": scflow.sample(mixture, noise),
    "student, 1 step": scflow.sample(student, noise),
    "f*": mixture.flow_map(noise, torch.ones(2000), steps=50),
}
fig, axes = plt.subplots(1, 3, figsize=(10, 3.7))
for ax, name, color in zip(axes, clouds, (TEACHER, STUDENT, GREY)):
    toy_2d.cloud(ax, clouds[name], name, color)
plt.show()

# %% [markdown]
# *What to see: one step with the teacher's velocity gives the mean of all data, for any noise. One step of the student
# gives eight modes, with some points on the bridges between them.*

# %%
error_teacher = toy_2d.rms_distance(clouds["v*, 1 step"], clouds["f*"])
error_student = toy_2d.rms_distance(clouds["student, 1 step"], clouds["f*"])
print(f"distance to the exact map in one step: v* {error_teacher:.2f}, student {error_student:.2f}")
assert error_student < error_teacher / 4

# %% [markdown]
# ## More steps
#
# More steps helped the teacher. Let the student take them: Euler steps with its v, or **re-noising**, jump to x̂₀ and
# noise it again to the next time. Beside it the perfect student, f\* itself, as the velocity (x − f\*(x,t))/t.


# %%
def exact(x, t, cond=None):
    """The exact flow map in the form of a student: the average velocity to the end."""
    return (x - mixture.flow_map(x, t, steps=20)) / t[:, None]


STEPS = (1, 2, 4, 8)
networks = {"exact map": exact, "student": student}
samples = {}
for name, net in networks.items():
    for solver in ("euler", "renoise"):
        for k in STEPS:
            g = torch.Generator().manual_seed(3)
            samples[name, solver, k] = scflow.sample(net, noise, k, solver, generator=g)

# %%
fig, axes = plt.subplots(2, 4, figsize=(10, 5.3))
columns = {
    "1 step": ("euler", 1),
    "2 Euler steps": ("euler", 2),
    "8 Euler steps": ("euler", 8),
    "8 times re-noised": ("renoise", 8),
}
for row, name, color in zip(axes, networks, (GREY, STUDENT)):
    for ax, (title, (solver, k)) in zip(row, columns.items()):
        toy_2d.cloud(ax, samples[name, solver, k], title, color, size=3)
    row[0].set_ylabel(name)
plt.show()

# %% [markdown]
# *What to see: both rows do the same. Euler steps swell the modes and drive them outwards; re-noising leaves them where
# they are.*

# %%
distance = toy_2d.reference("8gaussians", 2000)  # energy distance to a fixed sample of the data
floor = toy_2d.floor_of("8gaussians", 2000)
low = 1e3 * (floor["mean"] - 2 * floor["sd"])
high = 1e3 * (floor["mean"] + 2 * floor["sd"])
print(f"energy distance ×10³, noise floor {low:.1f} to {high:.1f}; steps {STEPS}")
scores = {}
for name in networks:
    for solver in ("euler", "renoise"):
        scores[name, solver] = [1e3 * distance(samples[name, solver, k]) for k in STEPS]
        print(f"  {name:10s} {solver:8s}", *(f"{score:7.1f}" for score in scores[name, solver]))

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.7), sharey=True)
for ax, solver in zip(axes, ("euler", "renoise")):
    ax.axhspan(low, high, color="#EEEEEE", label="noise floor")
    for name, color, style in (("exact map", GREY, "s--"), ("student", STUDENT, "o-")):
        ax.plot(range(4), scores[name, solver], style, color=color, label=name)
    ax.set(xlabel="steps", xticks=range(4), xticklabels=STEPS)
axes[0].set(title="Euler steps", ylabel="energy distance ×10³")
axes[1].set_title("fresh re-noising")
axes[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# *What to see: with Euler both curves climb, with re-noising neither. The climb is a property of a perfect
# consistency model, not a defect of training.*

# %%
for name in networks:
    once, twice, _, eight_times = scores[name, "euler"]
    assert eight_times > twice > once + 2
    assert scores[name, "renoise"][-1] < eight_times / 3

# %% [markdown]
# ## Why
#
# From x₁ an Euler step goes to x̂_t = (1−t)·x̂₀ + t·x₁, with **the same** x₁ that x̂₀ came from. In x_t, data and noise
# are drawn apart. For one Gaussian f\*(x₁,1) = s·x₁: the deviations are (1−t)s + t and σ_t, and the first is larger.
#
# **Exercise.** What is the standard deviation after two Euler steps of f\*?


# %%
def two_steps_std(s):
    """Standard deviation of f*(x̂_t,t) at t = ½."""
    return ...  # your answer


# %%
def gaussian_student(s):
    """The exact map of N(0, s²) in the form of a student."""

    def velocity(x, t, cond=None):
        return (1 - exact_factor(s, t))[:, None] * x / t[:, None]

    return velocity


def width(s, steps):
    """The standard deviation after so many Euler steps of f*."""
    x = scflow.sample(gaussian_student(s), x1, steps)
    return (x.std() / x1.std()).item()


@exercise
def check():
    for s in (0.15, 0.5, 1.0, 2.0):
        assert abs(width(s, 2) - two_steps_std(s)) < 1e-3 * s


# %% jupyter={"source_hidden": true}
# Solution
def two_steps_std(s):
    return s * (1 + s) / math.sqrt(1 + s**2)  # s/σ_t · ((1−t)s + t), at t = ½


check()

# %%
for s in (0.15, 0.5, 1.0, 2.0):
    x = torch.randn(50_000, 1, generator=generator)
    again = scflow.sample(gaussian_student(s), x, steps=8, solver="renoise", generator=generator)
    assert abs(again.std() - s) < 0.03 * s  # re-noised points are true x_t, and keep the width

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
t = torch.linspace(0, 1, 101)
axes[0].plot(t, (1 - t) * 0.5 + t, color=TEACHER, label=r"$\hat{x}_t$, visited by Euler")
axes[0].plot(t, sigma(0.5, t), color=STUDENT, label="$x_t$, trained on")
axes[0].set(xlabel="t", ylabel="standard deviation", title="s = 0.5", ylim=(0, 1.05))
counts = [1, 2, 4, 8, 16, 32, 64, 128]
for s, color in ((0.15, GREY), (0.5, GREEN), (1.0, STUDENT)):
    widths = [width(s, count) / s for count in counts]
    axes[1].semilogx(counts, widths, "o-", base=2, color=color, label=f"s = {s:g}")
    assert abs(widths[0] - 1) < 1e-3
    assert abs(widths[-1] - 2) < 0.05
axes[1].set(xlabel="Euler steps of the exact map", ylabel="std / s", ylim=(0.9, 2.1))
for ax in axes:
    ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# *What to see. Left: Euler visits points that are too far out. Right: f\* takes them for true x_t and lands too far
# out as well. With many steps every Gaussian ends twice as wide, whatever s is.*

# %%
one, *_, eight = scores["student", "euler"]
print(
    f"distance to the exact map after one step: {error_student:.2f}, where the teacher's step has {error_teacher:.2f}"
)
print(f"energy distance ×10³ of the student: one step {one:.1f}, eight Euler steps {eight:.1f}")

# %% [markdown]
# **The answer.** Yes, one evaluation can land where the flow does: consistency, with the boundary built in. Its v is
# then the average velocity to the end, and Euler on it solves another equation. Notebook 4 repairs that.

# %% [markdown]
# ## What to try next
#
# - Train the student with `tau=0.4` instead of `tau=0.0` in `phase`. Do its one-step modes shrink to points?
# - Set `delta=0.02`, then `delta=0.5`, in `phase`. Which error does each make after the same number of updates? And
#   `delta=0.5` with `walk="heun-2"`?
# - A truncated student gives means, and means blur. Notebook 3, `03_one_step_gan`, asks a critic for the rest.
