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
# **Question.** What can a critic teach a one-step student that a regression cannot?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/03_one_step_gan.ipynb)
#
# It needs this repository: `pip install -e '.[notebooks]'` in a clone, or, hosted,
# `%pip install git+https://github.com/OWNER/REPO`.

# %%
import matplotlib.pyplot as plt
import torch

import scflow
import toy_2d
from experiments.lecture import exercise, start
from toy_2d import GREY, STUDENT, GaussianMixture, cloud

PINK = "#CC79A7"
SEED = 0
start(linewidth=2)

# %% [markdown]
# ## A student that inherits the mean
#
# Many data points x₀ can lie behind one x_t = (1−t)·x₀ + t·x₁. A **regression** makes the squared error small, so it
# answers with their mean, E[x₀ | x_t]. Such means have less spread than the data.
#
# The consistency loss asks the student for the same answer at x_t and at x_s, a point of the same path a little nearer
# to the data. The paper's loss is **truncated**: where s < τ, the target is the true x₀. So the student learns the mean
# up to t = τ, and consistency carries this mean on to t = 1. Below, "regression" is this loss alone.
#
# Take data from one Gaussian, N(0, s²). The function `mean_std` has the formula of notebook 2. The teacher is the exact
# velocity v\*. **Predict:** how wide are the samples of one step?

# %%
SPREAD = 0.5  # s, the standard deviation of the data
TAU = 0.4


def mean_std(t):
    """Standard deviation of E[x₀ | x_t]."""
    sigma = (((1 - t) * SPREAD) ** 2 + t**2) ** 0.5  # of x_t
    return (1 - t) * SPREAD**2 / sigma


def one_step(teacher, noise, steps, lambda_adv):
    """Train a student of this teacher, and return its one-step samples. λ_adv is the weight of the critic."""
    dim = noise.shape[1]
    torch.manual_seed(SEED)
    g = torch.Generator().manual_seed(SEED)
    student = scflow.MLP(dim)
    critic = scflow.PointCritic(dim)
    batch = toy_2d.batches(teacher)
    phase = scflow.Phase(steps, tau=TAU, distance="squared", lambda_adv=lambda_adv, lambda_self=0.0, lambda_bi=0.0)
    for run in scflow.distill(teacher, critic, batch, g, (phase,), student=student):
        average = run.ema
    return scflow.sample(average, noise)


# %%
gauss = GaussianMixture([[0.0]], SPREAD)
generator = torch.Generator().manual_seed(SEED)
x1 = torch.randn(10_000, 1, generator=generator)
regression = one_step(gauss, x1, steps=500, lambda_adv=0.0)
print(f"standard deviation: data {SPREAD:.2f}, mean at τ {mean_std(TAU):.2f}, samples {regression.std():.2f}")
assert abs(regression.std() - mean_std(TAU)) < 0.05

# %% [markdown]
# ## What a critic measures
#
# The samples are about as narrow as the mean at τ. No single sample is wrong, but their distribution is: too many are
# in the middle, and too few outside.
#
# A **critic** D is a second network, trained to tell data from samples. It wants D ≥ 1 on data and D ≤ −1 on samples.
# Where it fails, it pays a price, the **hinge loss**. At a point x where the data have density p and the samples have
# density q, this price is p·max(0, 1−D) + q·max(0, 1+D).
#
# **Exercise.** Which D(x) has the lowest price? (Hint: between −1 and 1 the price is a straight line in D.)


# %%
def best_critic(p, q):
    """The D of the lowest price. p and q are tensors, and differ."""
    return ...  # your answer


# %%
@exercise
def check():
    heights = torch.linspace(-3, 3, 601)
    for p, q in ((0.8, 0.2), (0.3, 0.5), (0.1, 0.4)):
        best = best_critic(torch.tensor(p), torch.tensor(q))
        price = p * (1 - best).relu() + q * (1 + best).relu()
        prices = p * (1 - heights).relu() + q * (1 + heights).relu()
        assert price < prices.min() + 1e-6


# %% jupyter={"source_hidden": true}
# Solution
def best_critic(p, q):
    return torch.sign(p - q)  # the line falls towards 1 where p > q, and towards −1 where p < q


check()

# %%
# Now train a real critic, on data and on samples as narrow as those of the student.
narrow = regression.std()
critic = scflow.PointCritic(dim=1)
opt = scflow.adamw(critic, 1e-3, (0.5, 0.99))
for _ in range(400):
    real = SPREAD * torch.randn(256, 1, generator=generator)
    fake = narrow * torch.randn(256, 1, generator=generator)
    loss = scflow.critic_loss(critic(real), critic(fake))
    opt.zero_grad()
    loss.backward()
    opt.step()

# %%
x = torch.linspace(-1.6, 1.6, 321)
p = torch.distributions.Normal(0, SPREAD).log_prob(x).exp()
q = torch.distributions.Normal(0, narrow).log_prob(x).exp()
learned = critic(x[:, None]).detach()  # for the picture
fig, ax = plt.subplots(figsize=(7, 3.6))
ax.fill_between(x, p, color=GREY, alpha=0.5, label="p, data")
ax.fill_between(x, q, color=PINK, alpha=0.4, label="q, samples")
ax.plot(x, best_critic(p, q), "k--", label="best D")
ax.plot(x, learned, color=STUDENT, label="learned D")
ax.set(xlabel="x", ylabel="density, and D", xlim=(-1.6, 1.6), ylim=(-1.4, 1.6))
ax.legend(loc="lower left")
plt.show()
assert learned[x.abs() > 0.7].min() > learned[x.abs() < 0.2].max() + 1  # D is higher outside

# %% [markdown]
# *What to see: D is low in the middle, where there are too many samples, and high outside, where there are too few.
# What is wrong: outside, the learned D rises out of the picture. The hinge loss asks only for D ≥ 1 there.*
#
# The student's **adversarial loss** is −D at its one-step samples. Its gradient moves them to where D is higher: here,
# outwards. Student and critic together are a GAN, a generative adversarial network.

# %% [markdown]
# ## Spread, won back
#
# Add the adversarial loss to the regression, with the paper's weight of 0.1. **Predict:** how wide are the samples now?

# %%
with_critic = one_step(gauss, x1, steps=500, lambda_adv=0.1)
fig, ax = plt.subplots(figsize=(7, 3.4))
ax.fill_between(x, p, color=GREY, alpha=0.5, label="data")
for drawn, color, name in ((regression, PINK, "regression"), (with_critic, STUDENT, "with critic")):
    ax.hist(drawn[:, 0], bins=50, density=True, histtype="step", lw=2, color=color, label=name)
ax.set(xlabel="x", ylabel="density", xlim=(-1.6, 1.6))
ax.legend(loc="upper left")
plt.show()
print(f"standard deviation: data {SPREAD:.2f}, regression {regression.std():.2f}, with critic {with_critic.std():.2f}")
assert abs(with_critic.std() - SPREAD) < 0.05

# %% [markdown]
# *What to see: regression alone is too narrow. With the critic the samples are as wide as the data. What is wrong:
# the blue line has peaks, where the student takes too many points of the noise to nearly the same place.*

# %% [markdown]
# ## Eight Gaussians
#
# Here a mean does more harm: it can lie between the modes. Again the exact velocity is the teacher, and τ = 0.4.

# %%
n = 4000
mixture = toy_2d.dataset("8gaussians")
data, _ = mixture.sample(n, generator)
noise = torch.randn(n, 2, generator=generator)
samples = {
    "data": data,
    "regression": one_step(mixture, noise, steps=800, lambda_adv=0.0),
    "with critic": one_step(mixture, noise, steps=800, lambda_adv=0.1),
}
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.3))
for ax, name, color in zip(axes, samples, (GREY, PINK, STUDENT)):
    cloud(ax, samples[name][:2000], name, color)
plt.show()

# %% [markdown]
# *What to see: regression alone fills bridges between the modes, where there are no data. With the critic most samples
# are on the modes. What is wrong: thin bridges stay, and the modes are narrower than those of the data.*

# %% [markdown]
# ## What a critic cannot see
#
# The teacher's **flow map** f\* takes each noise to one place. A critic compares distributions. It never asks which
# noise became which sample.
#
# **Exercise.** Make samples of the right distribution with a wrong map. (Hint: which change of the noise leaves its
# distribution as it is?)


# %%
def wrong_map(noise):
    """Samples (n,2) of the mixture, far from where f* takes the noise."""
    return ...  # your answer


# %%
goal = mixture.flow_map(noise, torch.ones(n), steps=50)  # f* of the noise
distance = toy_2d.reference("8gaussians", n)  # estimates the energy distance to the data, 0 for equal distributions


@exercise
def check():
    x = wrong_map(noise)
    assert distance(x) < distance(goal) + 0.002  # no critic can object
    assert toy_2d.rms_distance(x, goal) > 2  # but each noise ends in another place


# %% jupyter={"source_hidden": true}
# Solution
def wrong_map(noise):
    return mixture.flow_map(-noise, torch.ones(len(noise)), steps=50)  # this noise is Gaussian too


check()

# %%
samples["wrong map"] = wrong_map(noise)
on_mode = {}
print("             within 3σ of a mode   energy distance ×10³   distance to f*")
for name in ("regression", "with critic", "wrong map"):
    x = samples[name]
    _, on_mode[name] = toy_2d.coverage_and_precision(x, mixture)
    energy = 1e3 * distance(x)
    error = toy_2d.rms_distance(x, goal)
    print(f"{name:11} {on_mode[name]:20.0%} {energy:22.1f} {error:16.1f}")
assert on_mode["with critic"] > on_mode["regression"] + 0.1

# %% [markdown]
# **The answer.** A critic teaches the distribution of the data. So it wins back the spread that the mean has lost: the
# standard deviation is 0.50 again, where regression alone has 0.28. And with eight Gaussians 89% of the samples lie
# within 3σ of a mode, where regression alone has 58%. But a critic would accept the wrong map, too: its energy distance
# is about 0. So the student needs both, the regression for the map and the critic for the spread.

# %% [markdown]
# ## What to try next
#
# - Change `SEED` a few times. Which of the numbers changes most?
# - Set `TAU = 0.6`. How narrow is the student then, and how much does the critic win back?
# - One step is better now. Do two steps agree with it? Next notebook: `04_self_correction`.
