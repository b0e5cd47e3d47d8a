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
import torch

import scflow
import toy_2d
from experiments.lecture import exercise, start
from toy_2d import GREY, STUDENT, TEACHER, GaussianMixture

start(linewidth=2)

# %% [markdown]
# ## The flow map
#
# Data are eight Gaussians, and the teacher is their exact velocity v\*. Follow it from (x,t) down to t = 0: it lands at
# **f\*(x,t)**, the *flow map*. Two facts fix f\*: it is the same at all points of a path, and f\*(x,0) = x.

# %%
mixture = toy_2d.dataset("8gaussians")
generator = torch.Generator().manual_seed(0)
noise = torch.randn(2000, 2, generator=generator)
times = torch.linspace(1, 0, 101)
_, path = scflow.sample(mixture, noise[[0, 2, 4]], steps=100, solver="heun", trajectory=True)  # (101,3,2)
x = path.flatten(0, 1)  # (303,2)
t = times.repeat_interleave(3)
landed = mixture.flow_map(x, t, steps=50).reshape(path.shape)  # f*(x_t,t)
assert torch.equal(landed[-1], path[-1])  # f*(x,0) = x
assert (landed - path[-1]).norm(dim=-1).max() < 0.02  # constant along each path

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
for curves, color, name in ((path, GREY, "$x_t$"), (landed, STUDENT, "f*")):
    lines = ax.plot(times, curves[:, :, 0], color=color)
    lines[0].set_label(name)
ax.set(xlabel="t", ylabel="first coordinate", xlim=(1, 0), ylim=(-1.8, 2.2))
ax.legend(loc="upper center", ncol=2)
plt.show()

# %% [markdown]
# *What to see: three paths, from noise (left) to data (right). The point moves (grey), but f\* (blue) is the same all
# the way. What is wrong: the second coordinate is not shown.*
#
# **Exercise.** A student's v is not v\*. With it the student jumps to f(x,t) = x − t·v(x,t). Which v leads to a given
# point?


# %%
def jump_velocity(x, t, end):
    """The v(x,t) that jumps from points x (B,d) at times t (B,) to the points end (B,d)."""
    return ...  # your answer


# %%
@exercise
def check():
    for time in (0.2, 0.5, 1.0):
        t = torch.full((2000,), time)
        end = mixture.flow_map(noise, t, steps=20)
        assert torch.allclose(noise - time * jump_velocity(noise, t, end), end, atol=1e-4)


# %% jupyter={"source_hidden": true}
# Solution
def jump_velocity(x, t, end):
    return (x - end) / t[:, None]  # the average velocity on the way to the end


check()

# %% [markdown]
# ## A loss from the two facts
#
# Can a network learn f\* without walking whole paths? Take a point x_t = (1−t)·x₀ + t·x₁ of data x₀ and noise x₁. One
# short Euler step of the teacher leads to its neighbour x_r, at a time r a little below t. (`scflow` writes s for r.)
# Ask the student for the same answer at both: that is **consistency**, d(f(x_t,t), f⁻(x_r,r)). Here d is a distance.
# f⁻ is the student with an average of its latest weights, held fixed in each update.
#
# A small loss alone proves nothing: an f that gives one constant everywhere has loss zero. The second fact,
# f(x,0) = x, forbids it. The form f(x,t) = x − t·v(x,t) has this fact **whatever the weights are**.

# %%
# Consistency alone; the other losses come in notebooks 3 and 4.
phase = scflow.Phase(steps=1200, batch=384, tau=0.0, lambda_adv=0.0, lambda_self=0.0, lambda_bi=0.0)
batch = toy_2d.batches(mixture)
critic = scflow.PointCritic()  # it has weight zero here
torch.manual_seed(0)
for run in scflow.distill(mixture, critic, batch, generator, (phase,), student=scflow.MLP()):
    student = run.ema  # the average of the weights that is sampled from

# %%
end = mixture.flow_map(noise, torch.ones(2000), steps=50)
error_teacher = toy_2d.rms_distance(scflow.sample(mixture, noise, steps=1), end)
error_student = toy_2d.rms_distance(scflow.sample(student, noise, steps=1), end)
print(f"RMS distance to f* in one step: teacher {error_teacher:.2f}, student {error_student:.2f}")
assert error_student < error_teacher / 4  # one step of the teacher knows only the mean of the data

# %% [markdown]
# ## Truncation
#
# Dao et al. (2025) add a rule: where r < τ, the target is the true x₀. (Above, τ = 0.) What does it cost? Many x₀
# belong to one x_t, and the answer of least squared error is their mean. For data N(0, s²), x_t has the standard
# deviation σ_t = √((1−t)²s² + t²), and E[x₀ | x_t] = (1−t)s²/σ_t² · x_t. So the mean keeps only the share
# **(1−t)·s/σ_t** of the data's deviation s.


# %%
def sigma(s, t):
    """Standard deviation of x_t."""
    return (((1 - t) * s) ** 2 + t**2) ** 0.5


x1 = noise[:, :1]
narrow = GaussianMixture([[0.0]], std=0.15)
for time in (0.4, 0.5):
    mean = scflow.predict_x0(narrow, sigma(0.15, time) * x1, torch.full((2000,), time))  # x_t − t·v* = E[x₀|x_t]
    share = (1 - time) * 0.15 / sigma(0.15, time)
    print(f"s = 0.15: the mean at t = {time} keeps the share {share:.2f}")
    assert abs(mean.std() / (0.15 * x1.std()) - share) < 1e-3

# %% [markdown]
# Consistency hands the mean on to t = 1. With τ = 0.4 and neighbours at most δ = 0.1 apart, it blends the means at
# times from 0.4 to 0.5. So one step should keep a share between the two that are printed.
#
# ## More steps
#
# More steps helped the teacher (notebook 1). Let the student take them: Euler steps with its v, or **re-noising**. It
# jumps to x̂₀ = f(x,t), and then to (1−r)·x̂₀ + r·(new noise), for the next time r. Beside it stands a perfect student,
# which jumps to f\*. We measure the energy distance to the data; the *noise floor* is what true samples have.


# %%
def perfect_student(data):
    """The v of a student that jumps to the flow map of the data."""

    def velocity(x, t, cond=None):
        return jump_velocity(x, t, data.flow_map(x, t, steps=20))

    return velocity


# %%
STEPS = (1, 2, 4, 8)
distance = toy_2d.reference("8gaussians", 2000)
floor = toy_2d.floor_of("8gaussians", 2000)
print(f"energy distance ×10³ at {STEPS} steps; noise floor {1e3 * floor['mean']:.1f} ± {1e3 * floor['sd']:.1f}")
samples = {}
scores = {}
for name, net in (("perfect", perfect_student(mixture)), ("trained", student)):
    for solver in ("euler", "renoise"):
        for steps in STEPS:
            g = torch.Generator().manual_seed(3)  # the same new noise for all
            samples[name, solver, steps] = scflow.sample(net, noise, steps, solver, generator=g)
        scores[name, solver] = [1e3 * distance(samples[name, solver, steps]) for steps in STEPS]
        print(f"  {name} {solver:8s}", *(f"{score:7.1f}" for score in scores[name, solver]))
    once, twice, _, eight_times = scores[name, "euler"]
    assert eight_times > twice > once + 2
    assert scores[name, "renoise"][-1] < eight_times / 3
near = samples["perfect", "euler", 1].norm(dim=1).median()
far = samples["perfect", "euler", 8].norm(dim=1).median()
print(f"perfect, median distance from the centre: one step {near:.2f}, eight Euler steps {far:.2f}")
assert far > near + 0.1

# %%
fig, axes = plt.subplots(2, 3, figsize=(9, 6.2))
columns = (("1 step", "euler", 1), ("8 Euler steps", "euler", 8), ("8 times re-noised", "renoise", 8))
for row, name, color in zip(axes, ("perfect", "trained"), (GREY, STUDENT)):
    for ax, (title, solver, steps) in zip(row, columns):
        toy_2d.cloud(ax, samples[name, solver, steps], title, color)
    row[0].set_ylabel(name)
plt.show()

# %% [markdown]
# *What to see: for both students Euler steps push the modes outwards and make them narrower. Re-noising leaves them
# where they are. What is wrong: one step of the trained student leaves points between the modes, and a few fall outside
# the frame.* So Euler steps make even a perfect student worse. It is not a defect of training.
#
# ## Why
#
# From x₁ an Euler step goes to x̂_t = (1−t)·x̂₀ + t·x₁, with **the same** x₁ that x̂₀ = f(x₁,1) came from. The student
# was trained at x_t, where data and noise are independent, as in re-noising. For data N(0, s²) the flow map is
# f\*(x,t) = (s/σ_t)·x. So x̂₀ = s·x₁, and x̂_t has the deviation (1−t)s + t. It is larger than σ_t.

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
t = torch.linspace(0, 1, 101)
ax.plot(t, (1 - t) * 0.5 + t, color=TEACHER, label=r"$\hat{x}_t$, visited by Euler")
ax.plot(t, sigma(0.5, t), color=STUDENT, label="$x_t$, trained on")
ax.set(xlabel="t", ylabel="standard deviation", title="data N(0, s²), s = 0.5", ylim=(0, 1.05))
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# *What to see: Euler visits points that are too far out. f\* takes them for true x_t, and lands too far out as well.
# What is wrong: it is one Gaussian. It does not show why each of the eight gets narrower.*
#
# **Exercise.** For N(0, s²), which standard deviation do two equal Euler steps of f\* give?


# %%
def two_steps_std(s):
    """Standard deviation of f*(x̂_t,t) at t = ½."""
    return ...  # your answer


# %%
@exercise
def check():
    for s in (0.15, 0.5, 1.0, 2.0):
        gaussian = GaussianMixture([[0.0]], std=s)
        x = scflow.sample(perfect_student(gaussian), x1, steps=2)
        assert abs(x.std() / x1.std() - two_steps_std(s)) < 0.01 * s


# %% jupyter={"source_hidden": true}
# Solution
def two_steps_std(s):
    return s * (1 + s) / math.sqrt(1 + s**2)  # s/σ_t · ((1−t)s + t), at t = ½


check()

# %%
one = scores["trained", "euler"][0]
eight = scores["trained", "euler"][-1]
print(f"RMS distance to f* after one step: student {error_student:.2f}, teacher {error_teacher:.2f}")
print(f"energy distance ×10³ of the student: one step {one:.1f}, eight Euler steps {eight:.1f}")

# %% [markdown]
# **The answer.** Yes: one evaluation lands near the end of the path, if consistency is trained in a form that has
# f(x,0) = x. More steps make it worse, because Euler steps lead to other points than those of the training. There
# even f\* lands too far out. Notebook 4 trains at these points, too.

# %% [markdown]
# ## What to try next
#
# - Train the student with `tau=0.4, distance="squared"` in `phase`. Do its one-step modes
#   shrink? Notebook 3 wins the spread back.
# - Set `delta=0.02`, then `delta=0.5`, in `phase`. How large is each error after the same number of updates?
