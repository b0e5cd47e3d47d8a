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
# # 6. Relatives
#
# **Question.** One network, one loop, the same seconds: which other methods do as well?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/06_relatives.ipynb)
#
# It needs this repository: `pip install -e '.[notebooks]'` in a clone, or, hosted,
# `%pip install git+https://github.com/OWNER/REPO`.

# %%
import inspect

import matplotlib.pyplot as plt
import torch

import toy_2d
from experiments import relatives
from experiments.lecture import exercise, start
from scflow import interpolate, predict_x0
from toy_2d import GaussianMixture

start()


def show(*functions):
    """Print the source of functions of experiments/relatives.py."""
    for function in functions:
        print(inspect.getsource(function))


# %% [markdown]
# ## Two questions sort the family
#
# *What does the network say?* The velocity v(x,t) here and now; or the end f(x,t) = x − t·v(x,t); or a jump from t to
# any earlier s, X(x,t,s) = x − (t−s)·u(x,t,s), where u is the average velocity in between.
#
# *Who tells it?* The data, as pairs (x₀,x₁) drawn apart; or a teacher's velocity; or pairs that a teacher has made; or
# the network itself, asked elsewhere.
#
# All losses are in `experiments/relatives.py`, and all have the same arguments: `lab`, which holds the network, its
# average and its teacher; pairs; and times. Each idea is checked below on one Gaussian, whose jumps are known: along a
# path of the flow (x_t − (1−t)·mean)/σ_t does not change.

# %%
mean = torch.tensor([1.0, -0.5])
std = 0.7
one_gaussian = GaussianMixture([[1.0, -0.5]], std)


def sigma(t):
    """The standard deviation of x_t, (B,1)."""
    return (((1 - t) * std) ** 2 + t**2).sqrt()[:, None]


def exact_jump(x, t, s):
    """u*(x,t,s), the average velocity of one Gaussian's flow from t to s, (B,2)."""
    away = (x - (1 - t)[:, None] * mean) / sigma(t)
    landed = (1 - s)[:, None] * mean + sigma(s) * away
    return (x - landed) / (t - s)[:, None]


def exact_point(x1, t):
    """The point at time t of the path that starts at the noise x₁."""
    one = torch.ones_like(t)
    return relatives.jump(exact_jump(x1, one, t), x1, one, t)


# %%
generator = torch.Generator().manual_seed(0)
x1 = torch.randn(1000, 2, generator=generator)
zero = torch.zeros(1000)
landed = one_gaussian.flow_map(x1, torch.ones(1000))  # by a fine solver
assert torch.allclose(exact_point(x1, zero), landed, atol=1e-4)

# %% [markdown]
# ## Velocities
#
# **Flow matching** regresses on x₁ − x₀. Every relative starts here. **Contrastive flow matching** also moves away
# from the velocity of another pair.

# %%
show(relatives.flow_matching, relatives.contrastive)

# %% [markdown]
# **Exercise.** Without a condition the other pair is any pair, so its mean velocity is the constant E[x₁ − x₀]. Which
# velocity minimises the contrastive loss? Check it at one point.


# %%
def contrastive_optimum(v_star, mean_velocity, weight):
    """The minimiser of E‖v − (x₁−x₀)‖² − weight·E‖v − other‖² at a point where flow matching gives v*."""
    return ...  # your answer


# %%
@exercise
def check():
    v_star = torch.tensor([0.3, -1.0])
    mean_velocity = torch.tensor([0.7, 0.2])
    weight = 0.05
    v = contrastive_optimum(v_star, mean_velocity, weight).requires_grad_()
    near = (v - v_star).square().sum()
    far = (v - mean_velocity).square().sum()
    (near - weight * far).backward()
    assert v.grad.abs().max() < 1e-5  # so without a condition it is flow matching, wrong by a known amount


# %% jupyter={"source_hidden": true}
# Solution
def contrastive_optimum(v_star, mean_velocity, weight):
    return (v_star - weight * mean_velocity) / (1 - weight)


check()

# %% [markdown]
# **2-rectified flow** is flow matching again, on pairs (x₁, what the teacher makes of it). Their lines hardly cross, so
# few steps are enough. **Paired regression** asks for the end only, at t = 1.

# %%
show(relatives.rectified, relatives.paired_regression)

# %% [markdown]
# ## Ends
#
# **Consistency**: seen from t and from an earlier s of the same path, the end is the same. Whose path? In
# *distillation* the teacher takes the step. In *training* both points are on the line of the pair, which is right on
# average. With *generated pairs* the line ends in the network's own answer. *Consistency-FM* also asks for equal
# velocities.

# %%
show(relatives.consistency_distillation, relatives.consistency_training)
show(relatives.generated_pairs, relatives.velocity_consistency)

# %% [markdown]
# **BOOT** never sees data. It asks for y(x₁,t) = (x_t − t·x₁)/(1−t), the part of x_t that is not noise. At t = 1 this
# is the teacher's guess, at t = 0 the sample. Put x_t = (1−t)·y + t·x₁ into dx/dt = v: dy/dt = (y − f)/(t(1−t)). For a
# constant f the way from t to s is exact.

# %%
show(relatives.boot_step, relatives.boot)


# %%
def clean_part(t):
    """y(x₁,t) of the exact path."""
    return (exact_point(x1, t) - t[:, None] * x1) / (1 - t)[:, None]


t = torch.linspace(0.2, 0.8, 1000)
s = t - 1e-3
guess = predict_x0(one_gaussian, interpolate(clean_part(t), x1, t), t)
error = relatives.boot_step(clean_part(t), guess, t, s) - clean_part(s)
step = clean_part(t) - clean_part(s)
assert error.abs().max() < 1e-2 * step.abs().max()

# %% [markdown]
# ## Jumps
#
# A jump has two times, and so has its network. Exact jumps obey three laws, and each law is a loss:
#
# - **Shortcut**: a jump is two half jumps. At the end of the halving stands flow matching.
# - **Flow map matching** (Lagrangian): the point where a jump lands moves with the velocity there, ∂ₛX = v(X,s).
# - **MeanFlow**: the start of a jump may slide along the path, d/dt [(t−s)·u] = v, so u = v − (t−s)·du/dt. Which path?
#   MeanFlow takes the line of the pair, improved MeanFlow the network's own velocity, Align Your Flow a teacher's.

# %%
show(relatives.half_jumps, relatives.lagrangian_residual)
show(relatives.average_and_rate, relatives.sliding_loss)
show(relatives.mean_flow, relatives.improved_mean_flow, relatives.align_your_flow)

# %%
t = 0.3 + 0.7 * torch.rand(1000, generator=generator)
s = t * 0.9 * torch.rand(1000, generator=generator)
xt = exact_point(x1, t)
assert torch.allclose(relatives.half_jumps(exact_jump, xt, t, t - s), exact_jump(xt, t, s), atol=1e-3)
assert relatives.lagrangian_residual(exact_jump, one_gaussian, xt, t, s).abs().max() < 1e-3
v = one_gaussian(xt, t)
u, rate = relatives.average_and_rate(exact_jump, v, xt, t, s)
assert relatives.sliding_loss(u, rate, v, t, s, power=0) < 1e-6

# %% [markdown]
# ## The same seconds
#
# The budget is what the default of `toy_2d.py` takes, teacher and student together. It is counted in updates of flow
# matching, so that a run does not depend on what else the machine does: `COST` says how many of them one update of a
# loss takes (`python -m experiments.relatives --costs` measures it). What a method needs first, a teacher or pairs, it
# pays for.
#
# `python -m experiments.relatives` compares all methods on four data sets and three seeds, with a quarter and with all
# of the budget. Here it is a sixth, on one data set.

# %%
found = {}
for method in relatives.METHODS:
    metrics = relatives.measure(method, "8gaussians", seed=0, share=1 / 6, samples=6000, settings={})
    found[method] = {row["nfe"]: 1e3 * row["energy"] for row in metrics["rows"]}  # {steps: distance}
    updates = metrics["rows"][0]["updates"]
    values = "".join(f"{value:9.2f}" for value in found[method].values())
    print(f"{method:26}{updates:6} updates{values}")

# %%
figure, ax = plt.subplots(figsize=(8, 5.5))
floor = metrics["floor"]
ax.axvspan(-1, 1e3 * (floor["mean"] + 2 * floor["sd"]), color="#dddddd", lw=0)
colours = (toy_2d.GREY, "#E69F00", toy_2d.RENOISE, toy_2d.STUDENT)
for steps, colour, marker in zip((1, 2, 4, 8), colours, "os^D"):
    rows = [i for i, method in enumerate(found) if steps in found[method]]
    values = [distances[steps] for distances in found.values() if steps in distances]
    ax.plot(values, rows, marker, color=colour, label=toy_2d.plural(steps, "step"))
ax.set_xscale("symlog", linthresh=1)
ax.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])
ax.set_yticks(range(len(found)), found)
ax.set(xlabel="energy distance × 10³", xlim=(-0.5, 2500))
ax.invert_yaxis()
ax.legend()
plt.show()

# %% [markdown]
# *What to see.* Flow matching needs its many steps, and contrastive flow matching, too. Paired regression and
# 2-rectified flow, which learn a teacher's pairs, are ahead in one step: in the plane fifty thousand pairs cost as much
# as five hundred to a thousand updates, and a target that never changes is easy. On pictures a pair costs dozens of
# passes of a large network; and pairs keep the teacher's error, for only a critic sees the data again. In four and
# eight steps consistency training leads, which goes back to noise in between. MeanFlow and its relatives pay for a
# derivative in every update. The self-corrected rows share this short time among a teacher and two phases. What all of
# the time buys is in `results/relatives.md`.

# %%
for steps in (1, 2, 4, 8):
    values = {method: distances[steps] for method, distances in found.items() if steps in distances}
    best = min(values, key=values.get)
    print(f"{toy_2d.plural(steps, 'step')}: {best}, {values[best]:.1f}")

# %% [markdown]
# **The answer.** In a sixth of the time, in the plane: for one or two steps, regression on pairs that a teacher has
# made; for four and more, consistency training, which goes back to noise in between. None is best everywhere.
#
# **Exercise.** A large network spends its time in passes: three for each row of an update, one for each evaluation of a
# pair. How many updates of 256 rows do 50,000 pairs of 20 evaluations cost there?


# %%
def updates_for_pairs(pairs, evaluations, rows):
    """Updates that take as many passes as the pairs; an update takes three passes of every row."""
    return ...  # your answer


# %%
@exercise
def check():
    assert round(updates_for_pairs(50_000, 20, 256)) == 1302
    assert updates_for_pairs(10**6, 100, 256) > 100_000  # a million pairs of fifty Heun steps: longer than the training


# %% jupyter={"source_hidden": true}
# Solution
def updates_for_pairs(pairs, evaluations, rows):
    return pairs * evaluations / (3 * rows)


check()

# %% [markdown]
# ## What to try next
#
# - Give 2-rectified flow a critic: which of the two errors does it repair, the teacher's or its own?
# - Start the second phase of `two_phase` from paired regression instead of consistency.
# - Measure the error at the points in between (`toy_2d.path_error`): who keeps the teacher's map, and who gives it up?
# - `python -m experiments.relatives --methods MeanFlow "two_phase (ours)" --datasets spirals --share 2`
