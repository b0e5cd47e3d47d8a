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
# # 3. The GAN inside: one step
#
# **Question.** A regression that cannot know the answer gives the mean of all answers. What can a critic teach a
# one-step student that a regression cannot? And what would a critic alone forget?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/03_one_step_gan.ipynb)
#
# It needs this repository: `pip install -e '.[notebooks]'` in a clone, or, hosted,
# `%pip install git+https://github.com/OWNER/REPO`.

# %%
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import scflow
import toy_2d
from experiments.lecture import exercise, start
from toy_2d import GREY, STUDENT, GaussianMixture, cloud

PINK = "#CC79A7"
SEED = 4
start(linewidth=2)

# %% [markdown]
# ## A mean is not a sample
#
# Many data points could lie behind one x_t = (1−t)·x₀ + t·x₁. The squared error is smallest at their mean,
# E[x₀ | x_t] = x_t − t·v\*(x_t,t). For a mixture of Gaussians v\* is known, and so is this mean.

# %%
mixture = toy_2d.dataset("8gaussians")
generator = torch.Generator().manual_seed(SEED)
data, _ = mixture.sample(2000, generator)
x1 = torch.randn(2000, 2, generator=generator)

# %%
fig, axes = plt.subplots(1, 4, figsize=(10, 2.9))
cloud(axes[0], data, "data")
for ax, t in zip(axes[1:], (0.2, 0.4, 0.7)):
    times = torch.full((2000,), t)
    xt = scflow.interpolate(data, x1, times)
    mean = scflow.predict_x0(mixture, xt, times)
    cloud(ax, mean, f"means at t = {t:g}", STUDENT)
    assert mean.square().sum() < data.square().sum()  # never as wide as the data
plt.show()

# %% [markdown]
# *What to see: at small t the modes shrink to dots. Then the means leave them, for bridges where there are no data, and
# at last for the middle. Each mean is the best answer to its question. Together they are not a sample.*
#
# **Exercise.** One Gaussian, x₀ ~ N(0, s²), σ_t² = (1−t)²s² + t². What is the standard deviation of E[x₀ | x_t]?
# (Hint: the mean is linear in x_t, with slope Cov(x₀,x_t)/σ_t².)


# %%
def mean_std(s, t):
    """Standard deviation of E[x₀ | x_t] over x_t."""
    return ...  # your answer


# %%
@exercise
def check():
    n = 100_000
    for s in (0.15, 0.5, 2.0):
        gauss = GaussianMixture([[0.0]], s)
        for t in (0.1, 0.4, 0.9):
            times = torch.full((n,), t)
            x0, _ = gauss.sample(n)
            xt = scflow.interpolate(x0, torch.randn(n, 1), times)
            mean = scflow.predict_x0(gauss, xt, times)
            assert abs(mean.std() / mean_std(s, t) - 1) < 0.02


# %% jupyter={"source_hidden": true}
# Solution
def mean_std(s, t):
    sigma = (((1 - t) * s) ** 2 + t**2) ** 0.5
    return (1 - t) * s**2 / sigma  # slope (1−t)s²/σ_t², times the deviation σ_t of x_t


check()

# %% [markdown]
# ## A student that inherits the mean
#
# The paper's consistency loss is *truncated*: its target is the true x₀ where s < τ, and the student itself above. So
# the student learns the mean near t = τ, and carries it to t = 1. **Predict:** the one-step sample is as narrow as the
# mean is between τ and τ + δ, where δ is the window of one comparison.
#
# The teacher is the exact velocity. The student starts from a short regression on it.

# %%
S = 0.5  # standard deviation of the data
TAUS = (0.2, 0.4, 0.6)
BASE = scflow.Phase(steps=500, lambda_self=0.0, lambda_bi=0.0, distance="squared")  # τ = 0.4, λ_adv = 0.1
gauss = GaussianMixture([[0.0]], S)
batch_1d = toy_2d.batches(gauss)
torch.manual_seed(SEED)
generator = torch.Generator().manual_seed(SEED)
settings = scflow.TeacherSettings(teacher_steps=200, teacher_batch=256)
net = scflow.MLP(1, 64, 2)
for run in scflow.train_teacher(net, batch_1d, generator, settings, oracle=gauss):
    start_1d = run.ema


# %%
def quantiles(std, n=4000):
    """n evenly spaced quantiles of N(0, std²), (n,1): a mean over them is an integral."""
    levels = (torch.arange(n) + 0.5) / n
    return std * torch.special.ndtri(levels)[:, None]


def one_step_std(tau, lambda_adv):
    """Deviation of the one-step samples after a short distillation."""
    torch.manual_seed(SEED)
    g = torch.Generator().manual_seed(SEED)
    critic = scflow.PointCritic(dim=1)
    phase = replace(BASE, steps=250, tau=tau, lambda_adv=lambda_adv)
    for run in scflow.distill(gauss, critic, batch_1d, g, (phase,), student=start_1d):
        student = run.ema
    return scflow.sample(student, quantiles(1.0)).std().item()


def std_figure(**students):
    """One-step deviation against τ, with the prediction."""
    fig, ax = plt.subplots(figsize=(7, 3.8))
    t = torch.linspace(0, 0.8, 100)
    ax.axhline(S, color="black", lw=1.2, ls="--", label="data")
    ax.fill_between(t, mean_std(S, t + 0.1), mean_std(S, t), color="#DDDDDD", label="mean, from τ to τ + δ")
    for name, color in zip(students, (PINK, STUDENT)):
        ax.plot(TAUS, students[name], "o", color=color, label=name.replace("_", " "))
    ax.set(xlabel="truncation τ", ylabel="one-step std", xlim=(0, 0.8), ylim=(0, 0.6))
    ax.legend(loc="lower left")
    plt.show()


# %%
regression = [one_step_std(tau, lambda_adv=0.0) for tau in TAUS]
std_figure(regression=regression)
for tau, value in zip(TAUS, regression):
    assert value > mean_std(S, tau + 0.1) - 0.03
    assert value < mean_std(S, tau) + 0.03

# %% [markdown]
# *What to see: the students sit in the predicted band, far below the data. They do what they were asked to do: the mean
# is the best answer to a squared error.* (`distance="squared"` says so plainly. The default, pseudo-Huber, is nearer to
# a median.)

# %% [markdown]
# ## What a critic measures
#
# No single sample is wrong. The *law* is: too much in the middle, too little outside. A critic D compares laws.
# It wants D ≥ 1 on data (density p) and D ≤ −1 on samples (density q), and pays the **hinge loss**
# E_p max(0, 1−D) + E_q max(0, 1+D).
#
# **Exercise.** Find the best D at each x (hint: between −1 and 1 the loss is a straight line in D), and the
# loss there, with the total variation TV = ½∫|p−q|.


# %%
def best_critic(p, q):
    """The D that minimises the hinge loss, from the two densities."""
    return ...  # your answer


def best_loss(tv):
    """The hinge loss there."""
    return ...  # your answer


# %%
def normal(x, std):
    """The density of N(0, std²)."""
    return torch.exp(-((x / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def total_variation(s, q_std):
    """½∫|p−q| of two centred Gaussians."""
    difference = normal(grid, s) - normal(grid, q_std)
    return torch.trapezoid(difference.abs(), grid).item() / 2


grid = torch.linspace(-12, 12, 48_001)


@exercise
def check():
    for s, q_std in ((0.5, 0.3), (1.0, 0.9), (2.0, 0.2)):
        x = quantiles(s)
        real = best_critic(normal(x, s), normal(x, q_std))
        x = quantiles(q_std)
        fake = best_critic(normal(x, s), normal(x, q_std))
        least = best_loss(total_variation(s, q_std))
        assert abs(scflow.critic_loss(real, fake) - least) < 2e-3
        for scale in (-1.0, 0.0, 0.5, 1.5):  # any other height is worse
            assert scflow.critic_loss(scale * real, scale * fake) > least + 0.01


# %% jupyter={"source_hidden": true}
# Solution
def best_critic(p, q):
    return torch.sign(p - q)  # p(1−D) + q(1+D) falls towards the end with more density


def best_loss(tv):
    return 2 * (1 - tv)  # 2·min(p,q), integrated; and min(p,q) = (p+q−|p−q|)/2


check()

# %% [markdown]
# Now a real critic, trained on draws of the data N(0, s²) and of their blurred copy at τ = 0.4.

# %%
blurred = mean_std(S, 0.4)
torch.manual_seed(SEED)
critic = scflow.PointCritic(dim=1)
opt = scflow.adamw(critic, 1e-3, (0.5, 0.99))
noisy = []  # the loss of each batch
expected = []  # the loss without the noise of a batch
for _ in range(400):
    real = S * torch.randn(256, 1, generator=generator)
    fake = blurred * torch.randn(256, 1, generator=generator)
    loss = scflow.critic_loss(critic(real), critic(fake))
    opt.zero_grad()
    loss.backward()
    opt.step()
    noisy.append(loss.item())
    with torch.no_grad():  # a measurement
        loss = scflow.critic_loss(critic(quantiles(S)), critic(quantiles(blurred)))
    expected.append(loss.item())

# %%
least = best_loss(total_variation(S, blurred))
with torch.no_grad():  # a picture
    learned = critic(grid[:, None])
print(f"2(1 − TV) = {least:.3f}, expected loss {expected[-1]:.3f}")
assert min(expected) > least - 1e-3  # no critic beats the best one
assert expected[-1] < least + 0.25 * (2 - least)  # and this one has come close
outside = (grid.abs() > 0.7) & (grid.abs() < 0.9)
inside = grid.abs() < 0.2
assert learned[outside].min() > learned[inside].max() + 1  # uphill is outward

# %%
p = normal(grid, S)
q = normal(grid, blurred)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
axes[0].plot(noisy, color=GREY, lw=0.8, label="one batch")
axes[0].plot(expected, color=PINK, label="expected")
axes[0].axhline(least, color="black", ls="--", label="2(1 − TV)")
axes[0].set(xlabel="update", ylabel="hinge loss", ylim=(1.2, 2.1))
axes[1].fill_between(grid, p, color=GREY, alpha=0.5, label="p, data")
axes[1].fill_between(grid, q, color=STUDENT, alpha=0.4, label="q, blurred")
axes[1].plot(grid, best_critic(p, q), "k--", label="sign(p − q)")
axes[1].plot(grid, learned, color=PINK, label="learned D")
axes[1].set(xlabel="x", xlim=(-1.6, 1.6), ylim=(-1.4, 1.6))
for ax in axes:
    ax.legend(loc="upper right")
plt.show()

# %% [markdown]
# *What to see: left, single batches dip below the dashed line, the expected loss never does, and it comes close. Right,
# the learned D is low in the middle and high outside: uphill is outward. That is the lesson a mean cannot give.*

# %% [markdown]
# ## Spread, won back
#
# The same truncated students, now with λ_adv = 0.1 beside the regression. **Predict:** which of them reach the dashed
# line?

# %%
with_critic = [one_step_std(tau, lambda_adv=0.1) for tau in TAUS]
std_figure(regression=regression, with_critic=with_critic)
for before, after in zip(regression, with_critic):
    assert abs(after - S) < max(0.5 * abs(before - S), 0.06)

# %% [markdown]
# *What to see: at every τ the blue dots have left the band, and most or all of the lost spread is back.*

# %% [markdown]
# ## Eight Gaussians
#
# Here a mean does more harm: it lies on a bridge. Again the teacher is the exact velocity, the student starts from a
# short regression on it, and τ = 0.4.

# %%
batch = toy_2d.batches(mixture)
torch.manual_seed(SEED)
generator = torch.Generator().manual_seed(SEED)
settings = scflow.TeacherSettings(teacher_steps=400, teacher_batch=256)
net = scflow.MLP()
for run in scflow.train_teacher(net, batch, generator, settings, oracle=mixture):
    start = run.ema

# %%
n = 4000
noise = torch.randn(n, 2, generator=generator)
goal = mixture.flow_map(noise, torch.ones(n), steps=50)  # where the teacher's flow takes each noise
floor = toy_2d.floor_of("8gaussians", n)
scores = {}


def score(name, x):
    """Note and print the energy distance ×10³, the share within 3σ of a mode, and the distance to the flow's end."""
    distance = 1e3 * toy_2d.reference("8gaussians", n)(x)
    _, precision = toy_2d.coverage_and_precision(x, mixture)
    error = toy_2d.rms_distance(x, goal)
    scores[name] = {"distance": distance, "precision": precision, "error": error}
    print(f"{name:12} energy distance {distance:5.2f}, precision {precision:.3f}, map error {error:.2f}")


# %%
MOMENTS = (10, 40, 150, 500)
samples = {}
moments = {}  # {name: [(one-step samples, the critic's heights on a mesh), …]}
side = torch.linspace(-toy_2d.LIMIT, toy_2d.LIMIT, 61)
mesh = torch.cartesian_prod(side, side)


@torch.no_grad()  # measurements
def watch(name, run):
    """Keep what the pictures below need of an update."""
    if run.step in MOMENTS:
        x = scflow.sample(run.student, noise[:500])
        moments[name].append((x, run.critic(mesh).reshape(61, 61).T))


def distil(name, **changes):
    """Distil with some settings changed; keep the one-step samples and what `watch` sees."""
    torch.manual_seed(SEED)
    g = torch.Generator().manual_seed(SEED)
    moments[name] = []
    phase = replace(BASE, **changes)
    for run in scflow.distill(mixture, scflow.PointCritic(), batch, g, (phase,), student=start):
        watch(name, run)
    samples[name] = scflow.sample(run.ema, noise)
    score(name, samples[name])


# %%
print(f"noise floor {1e3 * floor['mean']:.2f} ± {1e3 * floor['sd']:.2f}")
score("exact map", goal)
distil("regression", lambda_adv=0.0)
distil("with critic")
before = scores["regression"]
after = scores["with critic"]
assert after["distance"] < before["distance"] / 2  # nearer to the data
assert after["precision"] > before["precision"] + 0.1  # and on the modes
assert after["distance"] > 1e3 * (floor["mean"] + 3 * floor["sd"])  # but not yet at the floor

# %%
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.3))
cloud(axes[0], data, "data")
cloud(axes[1], samples["regression"][:2000], "regression", PINK)
cloud(axes[2], samples["with critic"][:2000], "with critic", STUDENT)
plt.show()

# %% [markdown]
# *What to see: regression alone draws the ring of means from the first figure. With the critic the mass is back on the
# modes. Thin bridges stay: a continuous map cannot tear the noise apart.*

# %% [markdown]
# ## The landscape moves
#
# The critic of that run at four moments, with the student's samples. Orange it takes for data, purple for samples; on
# the black line it cannot say.

# %%
levels = torch.linspace(-1.5, 1.5, 13)
fig, axes = plt.subplots(1, 4, figsize=(10, 2.9))
for ax, step, (x, heights) in zip(axes, MOMENTS, moments["with critic"]):
    picture = ax.contourf(side, side, heights, levels.tolist(), cmap="PuOr_r", extend="both")
    ax.contour(side, side, heights, [0], colors="black", linewidths=1)
    cloud(ax, x, f"update {step}", "black")
fig.colorbar(picture, ax=axes, shrink=0.8, ticks=[-1.5, 0, 1.5], label="D(x)")
plt.show()

# %% [markdown]
# *What to see: at first everything outside the blot in the middle looks like data. Once the samples have spread out,
# the landscape is nearly flat: the critic has lost them. Later it rises again, where it has found the next fault.*

# %% [markdown]
# ## A critic alone
#
# A critic compares laws. It never asks *which* noise went where.
#
# **Exercise.** Make one-step samples with the **right law** and a **wrong map**, from the exact flow map. (Hint: which
# changes of the noise leave its law as it is?)


# %%
def right_law_wrong_map(x1):
    """Samples (n,2) of the mixture, far from where the flow takes x1."""
    return ...  # your answer


# %%
@exercise
def check():
    score("wrong map", right_law_wrong_map(noise))
    assert scores["wrong map"]["distance"] < 1e3 * (floor["mean"] + 5 * floor["sd"])  # no critic would mind
    assert scores["wrong map"]["error"] > 2  # but each noise lands somewhere else


# %% jupyter={"source_hidden": true}
# Solution
def right_law_wrong_map(x1):
    return mixture.flow_map(-x1, torch.ones(len(x1)), steps=50)  # −x₁ is Gaussian too


check()

# %% [markdown]
# So the law does not fix the map. What does a student do that has nothing but the critic? It starts where the others
# did, at a regression on the teacher. **Predict before you run it.**

# %%
distil("critic alone", lambda_consistency=0.0)
alone = scores["critic alone"]
assert alone["error"] > 1.5 * scores["with critic"]["error"]  # another map
assert alone["distance"] > 2 * scores["with critic"]["distance"]  # and, in as many updates, a worse law

# %%
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.3))
colors = toy_2d.by_angle(noise)
cloud(axes[0], goal, "exact map", colors)
cloud(axes[1], samples["with critic"], "with critic", colors)
cloud(axes[2], samples["critic alone"], "critic alone", colors)
plt.show()

# %% [markdown]
# *What to see: a point has the colour of the direction of its noise. With the critic beside
# consistency, colours lie where the exact map puts them. The critic alone mixes them up, and misses the modes.*

# %%
for name in ("regression", "with critic", "critic alone"):
    precision = scores[name]["precision"]
    error = scores[name]["error"]
    print(f"{name:12} within 3σ of a mode {precision:.0%}, distance to the exact map {error:.2f}")

# %% [markdown]
# **The answer.** A regression knows which noise goes where, and answers with means. A critic knows what data look like
# as a whole, and does not mind who goes where. Together the one supplies the map, and the other the spread.

# %% [markdown]
# ## What to try next
#
# - Set `distance="huber"` in `BASE`, the default of `scflow`. How much blur is left for the critic to repair?
# - Change `SEED`. Most runs end at an energy distance of 2 to 4, a few near 10: student and critic do not come to rest.
#   Does a smaller `lr_critic` help?
# - Run `distil("heavy", lambda_adv=1.0)`. Do more of the samples land on the modes? What happens to the map error?
# - One step is better now. Do two steps agree with it? Next notebook: `04_self_correction`.
