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
# trained on the lines learn, and what does the crossing cost?
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

start(linewidth=2)

# %% [markdown]
# ## Lines that cross
#
# Data x₀ are at t = 0, and Gaussian noise x₁ is at t = 1. They are drawn **independently of each other** and joined by
# a straight line, x_t = (1−t)·x₀ + t·x₁. The velocity of a line is x₁ − x₀, the same at all its points.
#
# Here x is a number, so that t can be an axis of the picture. The data have two modes, around −1.5 and 1.5. Which lines
# pass the place x = 0 at t = ½, and how fast?

# %%
two = GaussianMixture([[-1.5], [1.5]], std=0.25, weights=[1.0, 2.0])  # the upper mode is twice as likely
generator = torch.Generator().manual_seed(0)
x0, _ = two.sample(1_000_000, generator)  # (N,1)
x1 = torch.randn(1_000_000, 1, generator=generator)
halfway = (x0 + x1) / 2  # x_t at t = ½
passing = halfway[:, 0].abs() < 0.02
velocity = (x1 - x0)[passing]
mean = velocity.mean().item()
print(f"{len(velocity)} of a million lines pass; the mean of their velocities is {mean:.2f}")
near = (velocity - mean).abs() < 0.3
assert near.float().mean() < 0.01  # hardly a line has that velocity itself

# %%
lines = torch.cat([x1, x0], 1)  # (N,2): start and end of each
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
axes[0].plot([1, 0], lines[:60].T, color=GREY, lw=0.8)
axes[0].plot([1, 0], lines[passing][:20].T, color=TEACHER, lw=0.8)
axes[0].set(xlabel="t  (noise left, data right)", ylabel="x", xlim=(1, 0), ylim=(-4, 4))
axes[1].hist(velocity[:, 0].numpy(), 60, color=TEACHER)
axes[1].axvline(mean, color="black", ls="--", label="mean")
axes[1].set(xlabel="velocity of the lines through x = 0, t = ½", ylabel="number of lines")
axes[1].legend()
plt.show()

# %% [markdown]
# *What to see. Left: sixty lines (grey), and twenty that pass the place (orange), to both modes. Right: the velocities
# of all that pass. They form two groups, and hardly a line has the mean. Lines of negative velocity go up, because t
# falls. What is wrong: an orange line may miss the place by 0.02.*
#
# ## The network learns the mean
#
# Train a network on the loss ‖ v(x_t,t) − (x₁−x₀) ‖² (here a mean over coordinates). It knows x and t, but not the
# line. So it has one answer for all lines through a place. The squared error is least if this answer is their mean:
#
# **v\*(x,t) = E[ x₁ − x₀ | x_t = x ]**
#
# For a Gaussian mixture this is a formula, and calling `two(x, t)` evaluates it.

# %%
v_star = two(torch.zeros(1, 1), torch.tensor([0.5])).item()
print(f"v* at x = 0, t = ½ is {v_star:.2f}")
assert abs(mean - v_star) < 0.1

# %% [markdown]
# But lines that cross have different velocities, and the network has one answer. So the loss cannot reach zero. This is
# the first cost of the crossing.
#
# **Exercise.** How small can the loss be at one place, if you know the velocities of the lines through it? (Replace
# the `...`, and run the next cell. The solution is hidden below it.)


# %%
def least_loss(velocity):
    """The mean squared error of the best single answer, for velocities (N,1)."""
    return ...  # your answer


# %%
@exercise
def check():
    tried = [(velocity - answer).square().mean() for answer in torch.linspace(-5, 5, 1001)]
    assert abs(least_loss(velocity) - min(tried)) < 0.01


# %% jupyter={"source_hidden": true}
# Solution
def least_loss(velocity):
    return velocity.var()  # the best answer is the mean, and the rest is the variance around it


check()

# %% [markdown]
# ## The flow does not cross
#
# A **flow** follows v\*: it starts at noise and goes down to t = 0 along dx/dt = v\*(x,t). Two paths never meet: v\* is
# smooth, and so exactly one path passes through each place.
#
# Yet they turn noise into data: at each place the mean moves as much mass as all lines do. A test: two thirds of the
# paths must end in the upper mode, which has two thirds of the data.

# %%
quantiles = (torch.arange(400) + 0.5) / 400
noise = torch.special.ndtri(quantiles)[:, None]  # 400 numbers in order, spread like noise (ndtri: inverse normal CDF)
ends, path = scflow.sample(two, noise, steps=200, solver="heun", trajectory=True)  # path is (201,400,1)
assert (path.diff(dim=1) > 0).all()  # at every time they are in the order in which they started
upper = (ends > 0).float().mean().item()
print(f"share of the paths that end in the upper mode: {upper:.3f}")
assert abs(upper - 2 / 3) < 0.01

# %% [markdown]
# ## How many steps?
#
# A solver follows a path in straight steps. An **Euler step** from t to s goes to x_t − (t−s)·v\*(x_t,t), along the
# velocity at its start. Each step is one evaluation of the network. If the path is straight, one step is exact. If it
# bends, the steps must be short, and many. This is the second cost of the crossing.
#
# **Exercise.** Where does *one* Euler step land, from x₁ at t = 1 to t = 0? A hint: what does x₁ tell about x₀?


# %%
def one_euler_step(x1):
    """x₁ − v*(x₁,1) for x₁ (N,1) and the data of `two`, without calling `two`."""
    return ...  # your answer


# %%
@exercise
def check():
    x1 = torch.randn(200, 1)
    assert torch.allclose(one_euler_step(x1), scflow.sample(two, x1, steps=1), atol=1e-5)


# %% jupyter={"source_hidden": true}
# Solution
def one_euler_step(x1):
    mean_x0 = (-1.5 + 2 * 1.5) / 3  # x₁ tells nothing about x₀, so this is the mean of all data
    return torch.full_like(x1, mean_x0)


check()

# %%
fig, axes = plt.subplots(1, 4, figsize=(10, 3.4), sharey=True)
for ax, steps in zip(axes, (1, 2, 4, 100)):
    _, path = scflow.sample(two, noise[10::20], steps, trajectory=True)  # 20 of the 400
    ax.plot(torch.linspace(1, 0, steps + 1), path[..., 0], color=STUDENT, lw=1)
    ax.set(title=toy_2d.plural(steps, "step"), xlabel="t", xlim=(1, 0), xticks=[1, 0.5, 0])
    ax.hlines([-1.5, 1.5], 0, 1, "black", "dashed", lw=0.8)
axes[0].set_ylabel("x")
plt.show()

# %% [markdown]
# *What to see: Euler steps with v\*, and the two modes (dashed). With 100 steps the paths bend: first all go towards
# 0.5, the mean of the data, then they part. With one step all end at 0.5. What is wrong: with two steps some end
# between the modes, where there are hardly any data.*
#
# ## A trained network
#
# Now train a network, the **teacher** of the later lectures, on eight modes in the plane. `train_teacher` draws x₀, x₁
# and t, and uses the loss above. On average it is the loss of v\*, called the **floor**, plus ‖ v − v\* ‖².

# %%
eight = toy_2d.dataset("8gaussians")
x0, _ = eight.sample(100_000, generator)
x1 = torch.randn(100_000, 2, generator=generator)
t = torch.rand(100_000, generator=generator)
xt = scflow.interpolate(x0, x1, t)
exact = eight(xt, t)
floor = scflow.flow_matching_loss(exact, x0, x1).item()

# %%
torch.manual_seed(0)
settings = scflow.TeacherSettings(teacher_steps=1000)
losses = []
for run in scflow.train_teacher(scflow.MLP(), toy_2d.batches(eight), generator, settings):
    losses.append(run.losses["flow"])
teacher = run.ema  # the average over the last updates

with torch.no_grad():  # a measurement
    v = teacher(xt, t)
error = scflow.squared(v, exact).item()
assert abs(scflow.flow_matching_loss(v, x0, x1) - floor - error) < 0.02  # the two parts add up

# %%
fig, ax = plt.subplots(figsize=(7, 3.4))
ax.plot(losses, color=TEACHER, lw=0.7, label="loss of each batch")
ax.axhline(floor, color="black", ls="--", label="floor: loss of v*")
ax.set(xlabel="update", ylabel="loss", ylim=(0, 4))
ax.legend()
plt.show()
last = torch.tensor(losses[-200:])
print(f"floor {floor:.2f}; mean of the last 200 losses {last.mean():.2f}; ‖ v − v* ‖² {error:.3f}")
assert abs(last.mean() - floor) < 0.1 * floor
assert error < 0.02 * floor  # nearly v*

# %% [markdown]
# *What to see: the loss comes to its floor in about 100 updates, and stays. The network is nearly v\*. What is wrong:
# often the loss lies below the floor. This is chance, for each point of the curve is one batch.*
#
# How many steps does a good sample take? We measure the **energy distance** to the data, 2E‖X−Y‖ − E‖X−X′‖ − E‖Y−Y′‖.
# It is zero for equal distributions. Its estimate is about zero for true data, and can be negative.

# %%
x1 = torch.randn(4000, 2, generator=generator)
distance = toy_2d.reference("8gaussians", 4000)  # to a fixed sample of the data
scores = {}
fig, axes = plt.subplots(1, 5, figsize=(10, 2.6))
for ax, steps in zip(axes, (1, 2, 4, 8, 32)):
    x = scflow.sample(teacher, x1, steps)
    scores[steps] = 1e3 * distance(x)
    toy_2d.cloud(ax, x[:600], toy_2d.plural(steps, "step"), TEACHER)
    ax.set_xlabel(f"distance ×10³: {scores[steps]:.1f}")
plt.show()

# %% [markdown]
# *What to see: the network's samples by Euler. One step gives nearly the mean of the data. What is wrong: even with 32
# steps some points lie between the modes.*

# %%
true = toy_2d.floor_of("8gaussians", 4000)  # the distance of true data: mean and deviation of 20 draws
high = 1e3 * (true["mean"] + 2 * true["sd"])
print(f"floor of the loss {floor:.2f}")
print(f"energy distance ×10³: 8 steps {scores[8]:.1f}, 32 steps {scores[32]:.1f}, true data up to {high:.1f}")
assert scores[32] < high < scores[8]

# %% [markdown]
# **The answer.** The network learns the mean velocity of all lines through a place. This mean changes on the way, so
# paths bend. The crossing costs an expected loss of at least 1.86, and many evaluations: eight are too few, and with 32
# the energy distance is as small as that of true data. If no lines crossed, the loss could be zero, and one step exact.

# %% [markdown]
# ## What to try next
#
# - Sample with `eight` in place of `teacher`. Are there still points between the modes?
# - Train longer, `teacher_steps=4000`. Does the loss show that the network gets better?
# - Can a network be trained to jump to the end of a path at once? Open the next notebook, `02_consistency`.
