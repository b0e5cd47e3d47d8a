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
#
# It needs this repository: `pip install -e '.[notebooks]'` in a clone, or, hosted,
# `%pip install git+https://github.com/OWNER/REPO`.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch

import scflow
import toy_2d
from experiments.lecture import exercise, start
from toy_2d import GREY, STUDENT, TEACHER, GaussianMixture

GREEN = "#009E73"
start(linewidth=2)

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
# The true neighbour on the path is not known. The teacher gives it by a step of its own: in the paper, and in this
# notebook, one Euler step in a narrow window. Notebook 9 asks for a better one.

# %% [markdown]
# ## Truncation
#
# The paper does not walk all the way down. Where the neighbour's time is below τ, the target is the true x₀. But many
# x₀ belong to one x_t, and the best squared answer is their mean, E[x₀|x_t] = x_t − t·v\*(x_t,t). Above τ this mean is
# handed on along the path.
#
# **Exercise.** One Gaussian N(0, s²), where σ_t² = (1−t)²s² + t². What is the standard deviation of f(x₁,1), if it is
# the mean at the point x_τ of its path?


# %%
def sigma(s, t):
    """Standard deviation of x_t."""
    return (((1 - t) * s) ** 2 + t**2) ** 0.5


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
# For narrow data the mean at τ = 0.4 has hardly any spread left. A mean is no sample; notebook 3 asks a critic to win
# the spread back.
#
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
    """The exact map of N(0, s²), f*(x,t) = (s/σ_t)·x, in the form of a student."""

    def velocity(x, t, cond=None):
        factor = s / sigma(s, t)
        return (1 - factor)[:, None] * x / t[:, None]

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
