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
# ## The flow map
#
# Data are eight Gaussians, and the teacher is their exact velocity v\*. Follow it from (x,t) down to t = 0: where it
# lands is **f\*(x,t)**. Two facts fix f\*: it is the same at all points of a path, and f\*(x,0) = x.

# %%
angle = torch.arange(8) * math.pi / 4
mixture = scflow.GaussianMixture(2 * torch.stack([angle.cos(), angle.sin()], 1), std=0.15)
generator = torch.Generator().manual_seed(0)
noise = torch.randn(4000, 2, generator=generator)
shown, times = noise[:30], torch.linspace(1, 0, 101)

# %%
_, path = scflow.sample(mixture, shown, steps=100, solver="heun", trajectory=True)  # (101,30,2)
every = [(x, t.expand(30)) for x, t in zip(path, times)]
landed = torch.stack([mixture.flow_map(x, t, steps=50) for x, t in every])  # f*(x_t,t) at each point
guess = torch.stack([scflow.predict_x0(mixture, x, t) for x, t in every])  # x_t − t·v*(x_t,t)
assert torch.equal(landed[-1], path[-1])  # f*(x,0) = x
assert (landed - path[-1]).norm(dim=-1).max() < 0.02  # constant along each path
assert (guess - path[-1]).norm(dim=-1).max() > 1  # the straight jump with v* is not

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 4.4))
axes[0].plot(*path.permute(2, 0, 1), color=GREY, lw=1)
axes[0].scatter(*path[0].T, s=14, color=TEACHER, label="noise", zorder=2)
axes[0].scatter(*landed[0].T, s=22, color=STUDENT, label="f* of the noise", zorder=2)
axes[0].set(xlabel="first coordinate", ylabel="second coordinate", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
for i in (0, 2, 4):
    for y, color, name in ((path, GREY, "$x_t$"), (guess, TEACHER, "$x_t - t\\,v^*$"), (landed, STUDENT, "f*")):
        axes[1].plot(times, y[:, i, 0], color=color, lw=2.5, label=name if i == 0 else None)
axes[1].set(xlabel="t", ylabel="first coordinate", xlim=(1, 0))
axes[1].set(ylim=(-1.8, 2.2))
axes[0].legend(frameon=False, loc="upper left", handletextpad=0.1, borderpad=0)
axes[1].legend(frameon=False, loc="upper center", ncol=3)
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see. Left: paths bend, and f\* knows their ends. Right: three paths, from noise to data. The point moves
# (grey); the teacher's straight guess moves too (orange); only f\* (blue) says the same thing all the way.*

# %% [markdown]
# ## A loss from the two facts
#
# Learn f\* without walking the paths. Take a point x_t and its neighbour on the path, a little nearer to the data. Ask
# the student for the same answer at both: that is **consistency**. The target side is a slow copy of the student, θ⁻,
# held fixed.
#
# The other fact, f(x,0) = x, costs nothing: f(x,t) = x − t·v(x,t) has it **whatever the weights are**.

# %%
torch.manual_seed(0)
net, x = scflow.MLP(), torch.randn(1000, 2, generator=generator)  # an untrained network
assert torch.equal(scflow.predict_x0(net, x, torch.zeros(1000)), x)
assert not torch.allclose(scflow.predict_x0(net, x, torch.ones(1000)), x, atol=0.1)

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


def batch(n, generator):
    return mixture.sample(n, generator)[0], None


# %%
alone = dict(tau=0.0, lambda_adv=0.0, lambda_self=0.0, lambda_bi=0.0)  # consistency and nothing else
short, losses, students = scflow.Phase(steps=300, batch=256, **alone), {}, {}
for name, kind in (("f = x − t·v", scflow.MLP), ("f = network", Free)):
    torch.manual_seed(0)
    g, losses[name] = torch.Generator().manual_seed(1), []
    for run in scflow.distill(mixture, scflow.PointDiscriminator(), batch, g, (short,), student=kind()):
        losses[name].append(run.losses["consistency"])
    students[name] = run.ema

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.4))
for ax, (name, net), color in zip(axes[1:], students.items(), (STUDENT, TEACHER)):
    axes[0].semilogy(losses[name], color=color, lw=1.5, label=name)
    ax.scatter(*scflow.sample(net, noise[:1000]).T, s=5, color=color)
    ax.set(title=name, xlabel="first coordinate", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
axes[0].set(xlabel="update", title="consistency loss", ylim=(1e-6, 0.1))
axes[0].legend(frameon=False, loc="lower left")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: the network without a boundary wins on the loss and loses everything else. It says nearly the same for
# every noise: a constant is perfectly consistent.* A small consistency loss proves nothing by itself.

# %%
spread = {name: scflow.sample(net, noise).std(0).mean().item() for name, net in students.items()}
final = {name: sum(values[-20:]) / 20 for name, values in losses.items()}
for name in students:
    print(f"{name:12s} final loss {final[name]:.6f}, standard deviation of the samples {spread[name]:.3f}")
assert final["f = network"] < final["f = x − t·v"] / 10
assert spread["f = network"] < 0.1 < 1 < spread["f = x − t·v"]

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


# %%
x, t = torch.randn(500, 1, generator=generator), torch.rand(500, generator=generator)
for s in (0.15, 0.5, 2.0):
    gaussian = scflow.GaussianMixture([[0.0]], std=s)
    assert torch.allclose(gaussian(x, t), slope(s, t)[:, None] * x, atol=1e-3)
    assert torch.allclose(gaussian.flow_map(x, t), exact_factor(s, t)[:, None] * x, atol=1e-3)

# %% [markdown]
# **Exercise.** A student says f(x,r) = a·x at time r. By which number does it multiply x_t when it answers at the
# teacher's neighbour, f(x_r,r)?


# %%
def target_factor(a, t, r, s):
    """f(x_r,r) / x_t for x_r one Euler step from x_t."""
    # your answer
    return a * (1 - (t - r) * slope(s, t))


# %%
r = t * torch.rand(500, generator=generator)
for s in (0.15, 0.5, 2.0):
    a, gaussian = torch.rand(500, generator=generator), scflow.GaussianMixture([[0.0]], std=s)
    neighbour = x - (t - r)[:, None] * gaussian(x, t)
    assert torch.allclose(a[:, None] * neighbour, target_factor(a, t, r, s)[:, None] * x, atol=1e-3)
    close = target_factor(exact_factor(s, t - 1e-4), t, t - 1e-4, s)  # for a tiny step f* is consistent
    assert torch.allclose(close, exact_factor(s, t), atol=1e-3)

# %% [markdown]
# At f\* itself the two answers differ by O(δ²): halve the step, and the residual falls by four.

# %%
s, t, steps = 0.5, 0.6, 0.2 / 2 ** torch.arange(7, dtype=torch.float64)
residuals = sigma(s, t) * (exact_factor(s, t) - target_factor(exact_factor(s, t - steps), t, t - steps, s)).abs()
order = np.polyfit(steps[-4:].log(), residuals[-4:].log(), 1)[0]
print(f"halving the step divides the residual by {', '.join(f'{q:.2f}' for q in residuals[:-1] / residuals[1:])}")
assert abs(order - 2) < 0.1 and abs(residuals[-2] / residuals[-1] - 4) < 0.2

# %% [markdown]
# ## What a window trades
#
# So take a tiny window? News of the data enters at t = 0 only, and moves at most δ with every refit. We can watch
# it: keep one factor a(t) for each t of a grid. A **sweep** refits all of them, each to the mean of its targets.


# %%
grid = torch.linspace(0, 1, 801, dtype=torch.float64)
t, r = grid[:, None], grid[None, :]


def sweep_matrix(delta, s):
    """M with a ← M·a: row t averages the targets from all r of the window before t."""
    inside = (r < t) & (r > t - delta - 1e-9)
    matrix = target_factor(1, t, r, s) * inside / inside.sum(1, keepdim=True).clamp(min=1)
    matrix[0, 0] = 1  # f(x,0) = x
    return matrix


def rest(matrix, constant):
    """The a that a sweep leaves as it is: a = M·a + constant. At t = 0 it is one."""
    eye = torch.eye(len(grid), dtype=grid.dtype)
    known = (matrix[1:, 0] + constant[1:])[:, None]
    return torch.linalg.solve_triangular(eye[1:, 1:] - matrix[1:, 1:], known, upper=False)[:, 0]


# %%
s, deltas, bias, sweeps, snapshots = 0.5, 0.4 / 2 ** torch.arange(6), [], [], []
nothing = torch.zeros_like(grid)
for delta in deltas.tolist():
    matrix, a, count = sweep_matrix(delta, s), (1 - grid) * s**2 / sigma(s, grid) ** 2, 0  # from the teacher's guess
    final = rest(matrix, nothing)[-1].item()
    while abs(a[-1].item() - final) > 0.01 * s:
        if delta == deltas[2] and count % 6 == 0:
            snapshots.append(a)
        a, count = matrix @ a, count + 1
    bias.append(abs(final - s))
    sweeps.append(count)

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.6))
for i, a in enumerate(snapshots):
    name = "every 6 sweeps" if i == len(snapshots) - 1 else None
    axes[0].plot(grid, a, color=STUDENT, lw=1.5, alpha=0.25 + 0.75 * i / len(snapshots), label=name)
axes[0].plot(grid, exact_factor(s, grid), color="black", ls="--", lw=2, label="f*")
axes[0].set(xlabel="t", ylabel="f(x,t) / x", ylim=(0, 1.15), title=f"δ = {deltas[2]:g}")
axes[0].legend(frameon=False)
axes[1].loglog(steps, residuals, "s-", color=GREY, lw=2, label="residual of f*")
axes[1].loglog(deltas, bias, "o-", color=TEACHER, lw=2, label="error at rest")
axes[1].set(xlabel="δ", title="error")
axes[1].legend(frameon=False)
axes[2].loglog(deltas, sweeps, "^-", color=THIRD, lw=2)
axes[2].set(xlabel="δ", title="sweeps until within 1%")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see. Left: the curve starts at the teacher's guess and is put right from t = 0 outwards. Middle: one hop errs
# by δ² (grey), the whole walk by δ (orange). Right: the shorter the window, the more sweeps. The window trades accuracy
# for patience.*

# %%
print("error at rest, over s:", ", ".join(f"δ = {d:g}: {b / s:.3f}" for d, b in zip(deltas.tolist(), bias)))
print("sweeps:", ", ".join(f"δ = {d:g}: {n}" for d, n in zip(deltas.tolist(), sweeps)))
assert 1.7 < bias[-2] / bias[-1] < 2.1  # first order: half the window, half the error
assert 1.5 < sweeps[-1] / sweeps[-2] < 2.5  # and twice the sweeps

# %% [markdown]
# The same with sliders, where `ipywidgets` is at hand (hosted notebooks have it); elsewhere one picture.


# %%
def walk(delta=0.1, sweeps=6, s=0.5):
    """Draw the factor a(t) after a number of sweeps with window δ."""
    a, matrix = (1 - grid) * s**2 / sigma(s, grid) ** 2, sweep_matrix(delta, s)
    for _ in range(sweeps):
        a = matrix @ a
    plt.figure(figsize=(6.5, 3.4))
    plt.plot(grid, a, color=STUDENT, lw=2.5, label=f"δ = {delta:g}, {sweeps} sweeps")
    plt.plot(grid[1:], rest(matrix, nothing), color=TEACHER, lw=2.5, ls=":", label="at rest")
    plt.plot(grid, exact_factor(s, grid), color="black", ls="--", lw=2, label="f*")
    plt.gca().set(xlabel="t", ylabel="f(x,t) / x", ylim=(0, 1.15), title=f"s = {s:g}")
    plt.legend(frameon=False)
    plt.show()


try:
    from ipywidgets import interact

    interact(walk, delta=(0.02, 0.5, 0.02), sweeps=(0, 60), s=(0.1, 1.0, 0.1))
except ImportError:
    walk()

# %% [markdown]
# *What to see: news of the data has come as far as the blue curve lies on the dotted one. With a wide window it
# arrives at once, but at the wrong place.*

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
    # your answer
    return (1 - tau) * s**2 / sigma(s, tau)  # the mean is (1−τ)s²/σ_τ² · x_τ, and x_τ has deviation σ_τ


# %%
x1 = torch.randn(500, 1, generator=generator)
for s in (0.15, 0.5, 1.0, 2.0):
    gaussian = scflow.GaussianMixture([[0.0]], std=s)
    for tau in (0.1, 0.4, 0.8):
        x_tau = sigma(s, tau) * x1  # the flow from t = 1 to τ: paths keep their quantile
        mean = scflow.predict_x0(gaussian, x_tau, torch.full((500,), tau))
        assert abs((mean.std() / x1.std()).item() - one_step_std(tau, s)) < 1e-3 * s
    assert abs(one_step_std(0.0, s) - s) < 1e-9 and one_step_std(1.0, s) == 0

# %% [markdown]
# The formula hands the mean on without error, from τ sharp. Sweeps with a window tell the rest.


# %%
def rest_std(tau, s, delta=0.1):
    """Standard deviation of f(x₁,1) at rest, with targets x₀ where r < τ."""
    matrix, truncated = sweep_matrix(delta, s), r < tau - 1e-9
    share = ((matrix != 0) & truncated).sum(1) / (matrix != 0).sum(1)
    return rest(matrix * ~truncated, share * (1 - grid) * s**2 / sigma(s, grid) ** 2)[-1].item()


taus, fig = torch.linspace(0, 1, 101), plt.figure(figsize=(7, 3.8))
for s, color in ((0.15, GREY), (0.5, THIRD), (1.0, STUDENT)):
    plt.plot(taus, one_step_std(taus, s) / s, color=color, lw=2.5, label=f"s = {s:g}")
    plt.plot(taus[10:91:10], [rest_std(tau, s) / s for tau in taus[10:91:10].tolist()], "o", color=color, ms=7)
plt.axvline(0.4, color="black", ls=":", lw=1.5, label="τ = 0.4")
plt.gca().set(xlabel="truncation τ", ylabel="one-step std / s", xlim=(0, 1), ylim=(0, 1.03))
plt.legend(frameon=False)
plt.tight_layout()
plt.show()
assert all(0.75 < rest_std(0.4, s) / one_step_std(0.4, s) < 1 for s in (0.15, 0.5, 1.0))

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
phase = scflow.Phase(steps=900, batch=384, **alone)
g, critic = torch.Generator().manual_seed(2), scflow.PointDiscriminator()  # a critic of weight zero
*_, run = scflow.distill(mixture, critic, batch, g, (phase,), student=students["f = x − t·v"])
student = run.ema

# %%
noise = noise[:2000]
truth = mixture.flow_map(noise, torch.ones(2000), steps=50)
jumps = {"v*, 1 step": scflow.sample(mixture, noise), "student, 1 step": scflow.sample(student, noise)}
fig, axes = plt.subplots(1, 3, figsize=(10, 3.7), sharey=True)
for ax, (name, x), color in zip(axes, (jumps | {"f*": truth}).items(), (TEACHER, STUDENT, GREY)):
    ax.scatter(*x.T, s=4, color=color)
    ax.set(title=name, xlabel="first coordinate", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
axes[0].set_ylabel("second coordinate")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: one step with the teacher's velocity gives the mean of all data, for any noise. One step of the student
# gives eight modes, with a few points on the bridges between them.*

# %%
errors = {name: scflow.rms_distance(x, truth) for name, x in jumps.items()}
print("distance to the exact map:", ", ".join(f"{name} {e:.2f}" for name, e in errors.items()))
assert errors["student, 1 step"] < errors["v*, 1 step"] / 4

# %% [markdown]
# ## More steps
#
# More steps helped the teacher. Let the student take them: Euler steps with its v, or **re-noising**, jump to x̂₀ and
# noise it again to the next time. Beside it the perfect student, f\* itself, as the velocity (x − f\*(x,t))/t.


# %%
def exact(x, t, cond=None):
    """The exact flow map in the form of a student: the average velocity to the end."""
    return (x - mixture.flow_map(x, t, steps=20)) / t[:, None]


STEPS, clouds = (1, 2, 4, 8), {}
for name, net in (("exact map", exact), ("student", student)):
    for solver in ("euler", "renoise"):
        for k in STEPS:
            g = torch.Generator().manual_seed(3)
            clouds[name, solver, k] = scflow.sample(net, noise, k, solver, generator=g)

# %%
fig, axes = plt.subplots(2, 4, figsize=(10, 5.3), sharex=True, sharey=True)
columns = (("euler", 1, "1 step"), ("euler", 2, "2 Euler steps"), ("euler", 8, "8 Euler steps"))
for row, name, color in zip(axes, ("exact map", "student"), (GREY, STUDENT)):
    for ax, (solver, k, title) in zip(row, (*columns, ("renoise", 8, "8 times re-noised"))):
        ax.scatter(*clouds[name, solver, k][:1000].T, s=3, color=color)
        ax.set(title=title if name == "exact map" else None, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    row[0].set_ylabel(name)
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: both rows do the same. Euler steps swell the modes and drive them outwards; re-noising leaves them where
# they are.*

# %%
distance = scflow.EnergyDistance(*mixture.sample(4000, generator, stratified=True))
floor = scflow.noise_floor(distance, lambda: mixture.sample(2000, generator)[0], repeats=10)
scores = {key: 1e3 * distance(x) for key, x in clouds.items()}
print(f"energy distance ×10³, floor {1e3 * floor[0]:.1f} ± {1e3 * floor[1]:.1f}; steps {STEPS}")
for name in ("exact map", "student"):
    for solver in ("euler", "renoise"):
        print(f"  {name:10s} {solver:8s}", *(f"{scores[name, solver, k]:7.1f}" for k in STEPS))

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.7), sharey=True)
for ax, solver, title in zip(axes, ("euler", "renoise"), ("Euler steps", "fresh re-noising")):
    ax.axhspan(*(1e3 * (floor[0] + sign * 2 * floor[1]) for sign in (-1, 1)), color="#EEEEEE", label="noise floor")
    for name, color, marker, style in (("exact map", GREY, "s", "--"), ("student", STUDENT, "o", "-")):
        values = [scores[name, solver, k] for k in STEPS]
        ax.plot(range(4), values, color=color, marker=marker, ls=style, lw=2.2, ms=8, label=name)
    ax.set(title=title, xlabel="steps", xticks=range(4), xticklabels=STEPS)
axes[0].set_ylabel("energy distance ×10³")
axes[0].legend(frameon=False, loc="upper left")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: with Euler both curves climb, with re-noising neither. The climb is a property of a perfect
# consistency model, not a defect of training.*

# %%
for name in ("exact map", "student"):
    assert scores[name, "euler", 8] > scores[name, "euler", 2] > scores[name, "euler", 1] + 2
    assert scores[name, "renoise", 8] < scores[name, "euler", 8] / 3

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
    # your answer
    return s * (1 + s) / math.sqrt(1 + s**2)  # s/σ_t · ((1−t)s + t), at t = ½


# %%
def gaussian_student(s):
    """The exact map of N(0, s²) in the form of a student."""
    return lambda x, t, cond=None: (1 - exact_factor(s, t))[:, None] * x / t[:, None]


for s in (0.15, 0.5, 1.0, 2.0):
    walked = scflow.sample(gaussian_student(s), x1, steps=2)
    assert abs((walked.std() / x1.std()).item() - two_steps_std(s)) < 1e-3 * s
    x = torch.randn(50_000, 1, generator=generator)
    again = scflow.sample(gaussian_student(s), x, steps=8, solver="renoise", generator=generator)
    assert abs(again.std().item() - s) < 0.03 * s  # re-noised points are true x_t, and keep the width

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
ts, many = torch.linspace(0, 1, 101), 2 ** torch.arange(8)
axes[0].plot(ts, (1 - ts) * 0.5 + ts, color=TEACHER, lw=2.5, label=r"$\hat{x}_t$, visited by Euler")
axes[0].plot(ts, sigma(0.5, ts), color=STUDENT, lw=2.5, label="$x_t$, trained on")
axes[0].set(xlabel="t", ylabel="standard deviation", title="s = 0.5", xlim=(0, 1), ylim=(0, 1.05))
for s, color in ((0.15, GREY), (0.5, THIRD), (1.0, STUDENT)):
    widths = [(scflow.sample(gaussian_student(s), x1, k).std() / x1.std()).item() / s for k in many.tolist()]
    axes[1].semilogx(many, widths, "o-", base=2, color=color, lw=2, label=f"s = {s:g}")
    assert abs(widths[0] - 1) < 1e-3 and abs(widths[-1] - 2) < 0.05
axes[1].set(xlabel="Euler steps of the exact map", ylabel="std / s", ylim=(0.9, 2.1))
for ax in axes:
    ax.legend(frameon=False, loc="lower right")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see. Left: Euler visits points that are too far out. Right: f\* takes them for true x_t and lands too far
# out as well. With many steps every Gaussian ends twice as wide, whatever s is.*
#
# **The answer.** Yes, one evaluation can land where the flow does: consistency, with the boundary built in. Its v is
# then the average velocity to the end, and Euler on it solves another equation. Notebook 4 repairs that.

# %% [markdown]
# ## What to try next
#
# - Train the student with `tau=0.4` instead of `tau=0.0` in `alone`. Do its one-step modes shrink to points?
# - Set `delta=0.02`, then `delta=0.5`, in the `Phase`. Which error does each make after the same number of updates?
# - A truncated student gives means, and means blur. Notebook 3, `03_one_step_gan`, asks a critic for the rest.
