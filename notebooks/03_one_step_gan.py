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
SEED = 0

# %% [markdown]
# ## A mean is not a sample
#
# Many data points could lie behind one x_t = (1−t)·x₀ + t·x₁. The squared error is smallest at their mean,
# E[x₀ | x_t] = x_t − t·v\*(x_t,t). For a mixture of Gaussians v\* is known, and so is this mean.

# %%
angle = torch.arange(8) * math.pi / 4
mixture = scflow.GaussianMixture(2 * torch.stack([angle.cos(), angle.sin()], 1), std=0.15)
generator = torch.Generator().manual_seed(SEED)
data, x1 = mixture.sample(2000, generator)[0], torch.randn(2000, 2, generator=generator)


def cloud(ax, x, title, color=STUDENT):
    """Points (n,2) in a square window."""
    ax.scatter(*x.T, s=4, color=color, linewidths=0)
    ax.set(title=title, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2])


# %%
fig, axes = plt.subplots(1, 4, figsize=(10, 2.9), sharey=True)
cloud(axes[0], data, "data", GREY)
for ax, t in zip(axes[1:], (0.2, 0.4, 0.7)):
    t_all = torch.full((2000,), t)
    mean = scflow.predict_x0(mixture, scflow.interpolate(data, x1, t_all), t_all)
    cloud(ax, mean, f"means at t = {t:g}")
    assert mean.square().sum() < data.square().sum()  # never as wide as the data
plt.tight_layout()
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
    sigma = (((1 - t) * s) ** 2 + t**2) ** 0.5
    # your answer
    return (1 - t) * s**2 / sigma  # slope (1−t)s²/σ_t², times the deviation σ_t of x_t


# %%
for s in (0.15, 0.5, 2.0):
    gauss = scflow.GaussianMixture([[0.0]], s)
    for t in (0.1, 0.4, 0.9):
        t_all = torch.full((100_000,), t)
        x0, noise = gauss.sample(100_000, generator)[0], torch.randn(100_000, 1, generator=generator)
        mean = scflow.predict_x0(gauss, scflow.interpolate(x0, noise, t_all), t_all)
        assert abs(mean.std() / mean_std(s, t) - 1) < 0.02

# %% [markdown]
# ## A student that inherits the mean
#
# The paper's consistency loss is *truncated*: its target is the true x₀ where s < τ, and the student itself above. So
# the student learns the mean near t = τ, and carries it to t = 1. **Predict:** the one-step sample is as narrow as the
# mean is between τ and τ + δ, where δ is the window of one comparison.

# %%
S = 0.5
gauss = scflow.GaussianMixture([[0.0]], S)
TAUS = (0.2, 0.4, 0.6)
BASE = scflow.Phase(steps=500, lambda_self=0.0, lambda_bi=0.0, distance="squared")  # τ = 0.4, λ_adv = 0.1


def batch_1d(n, generator):
    return gauss.sample(n, generator)[0], None


torch.manual_seed(SEED)
generator = torch.Generator().manual_seed(SEED)
settings = scflow.TeacherSettings(teacher_steps=200, teacher_batch=256)
*_, run = scflow.train_teacher(scflow.MLP(1, 64, 2), batch_1d, generator, settings, oracle=gauss)
start_1d = run.ema  # the teacher is the exact velocity; the student starts from a regression on it


# %%
def quantiles(law_std, n=4000):
    """n evenly spaced quantiles of N(0, law_std²): a mean over them is an integral."""
    return law_std * torch.special.ndtri((torch.arange(n) + 0.5) / n)


def one_step_std(tau, lambda_adv):
    """Deviation of the one-step samples after a short distillation."""
    torch.manual_seed(SEED)
    g, disc = torch.Generator().manual_seed(SEED), scflow.PointDiscriminator(dim=1)
    phase = replace(BASE, steps=250, tau=tau, lambda_adv=lambda_adv)
    *_, run = scflow.distill(gauss, disc, batch_1d, g, (phase,), student=start_1d)
    return scflow.sample(run.ema, quantiles(1.0)[:, None]).std().item()


regression = [one_step_std(tau, lambda_adv=0.0) for tau in TAUS]


# %%
def std_figure(**students):
    """One-step deviation against τ, with the prediction."""
    fig, ax = plt.subplots(figsize=(7, 3.8))
    t = torch.linspace(0, 0.8, 100)
    ax.axhline(S, color="black", lw=1.2, ls="--")
    ax.text(0.8, S + 0.01, "data", ha="right")
    ax.fill_between(t, mean_std(S, t + 0.1), mean_std(S, t), color="#DDDDDD", label="mean, from τ to τ + δ")
    for (name, values), color, marker in zip(students.items(), (PINK, STUDENT), "os"):
        ax.plot(TAUS, values, marker, color=color, ms=10, label=name.replace("_", " "))
    ax.set(xlabel="truncation τ", ylabel="one-step std", xlim=(0, 0.8), ylim=(0, 0.6))
    ax.legend(frameon=False, loc="lower left")
    plt.tight_layout()
    plt.show()


std_figure(regression=regression)
for tau, value in zip(TAUS, regression):
    assert mean_std(S, tau + 0.1) - 0.03 < value < mean_std(S, tau) + 0.03

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
    # your answer
    return torch.sign(p - q)  # p(1−D) + q(1+D) falls towards the end with more density


def best_loss(tv):
    """The hinge loss there."""
    # your answer
    return 2 * (1 - tv)  # 2·min(p,q), integrated; and min(p,q) = (p+q−|p−q|)/2


# %%
def normal(x, std):
    return torch.exp(-((x / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def expected_loss(critic, s, q_std):
    """The hinge loss of a critic between N(0,s²) and N(0,q_std²), without sampling noise."""
    return scflow.discriminator_loss(critic(quantiles(s)), critic(quantiles(q_std))).item()


# %%
grid = torch.linspace(-12, 12, 48_001)
for s, q_std in ((0.5, 0.3), (1.0, 0.9), (2.0, 0.2)):
    tv = torch.trapezoid((normal(grid, s) - normal(grid, q_std)).abs(), grid).item() / 2
    on_data, on_samples = (best_critic(normal(x, s), normal(x, q_std)) for x in (quantiles(s), quantiles(q_std)))
    assert abs(scflow.discriminator_loss(on_data, on_samples) - best_loss(tv)) < 2e-3
    for scale in (-1.0, 0.0, 0.5, 1.5):  # any other height is worse
        assert scflow.discriminator_loss(scale * on_data, scale * on_samples) > best_loss(tv) + 0.01

# %% [markdown]
# Now a real critic, trained on draws of the data N(0, s²) and of their blurred copy at τ = 0.4.

# %%
blurred = mean_std(S, 0.4)
torch.manual_seed(SEED)
critic, noisy, exact = scflow.PointDiscriminator(dim=1), [], []
opt = scflow.adamw(critic, 1e-3, (0.5, 0.99))
for _ in range(400):
    real, fake = torch.randn(2, 256, 1, generator=generator)
    loss = scflow.discriminator_loss(critic(S * real), critic(blurred * fake))
    opt.zero_grad()
    loss.backward()
    opt.step()
    noisy.append(loss.item())
    with torch.no_grad():
        exact.append(expected_loss(lambda x: critic(x[:, None]), S, blurred))

# %%
p, q = normal(grid, S), normal(grid, blurred)
tv = torch.trapezoid((p - q).abs(), grid).item() / 2
with torch.no_grad():
    learned = critic(grid[:, None])
print(f"2(1 − TV) = {best_loss(tv):.3f}, expected loss {exact[-1]:.3f}")
assert min(exact) > best_loss(tv) - 1e-3  # no critic beats the best one
assert exact[-1] < best_loss(tv) + 0.25 * (2 - best_loss(tv))  # and this one has come close
assert learned[(grid.abs() - 0.8).abs() < 0.1].min() > learned[grid.abs() < 0.2].max() + 1  # uphill is outward

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
axes[0].plot(noisy, color=GREY, lw=0.8, label="one batch")
axes[0].plot(exact, color=PINK, lw=2.5, label="expected")
axes[0].axhline(best_loss(tv), color="black", ls="--", label="2(1 − TV)")
axes[0].set(xlabel="update", ylabel="hinge loss", ylim=(1.2, 2.1))
axes[1].fill_between(grid, p, color=GREY, alpha=0.5, label="p, data")
axes[1].fill_between(grid, q, color=STUDENT, alpha=0.4, label="q, blurred")
axes[1].plot(grid, best_critic(p, q), "k--", label="sign(p − q)")
axes[1].plot(grid, learned, color=PINK, lw=2.5, label="learned D")
axes[1].set(xlabel="x", xlim=(-1.6, 1.6), ylim=(-1.4, 1.6))
for ax in axes:
    ax.legend(frameon=False, fontsize=11)
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: left, single batches dip below the dashed line, the expected loss never does, and it comes close. Right,
# the learned D is low in the middle and high outside: uphill is outward. That is the lesson a mean cannot give.*

# %% [markdown]
# ## Where each loss stops teaching
#
# The student minimises −D(x̂₀). There is a second pair of losses, of the first GANs: softplus(−D) for data and
# softplus(D) for samples; the student minimises softplus(−D). Both pairs are in `scflow`.
#
# **Exercise.** Write the slopes in the logit D: of the critic's loss on one sample, and of the student's loss.


# %%
def critic_slope(d, kind):
    """Derivative of the critic's loss on a sample with logit d."""
    # your answer
    return (d > -1).float() if kind == "hinge" else torch.sigmoid(d)


def student_slope(d, kind):
    """Derivative of the student's loss there."""
    # your answer
    return -torch.ones_like(d) if kind == "hinge" else -torch.sigmoid(-d)


# %%
logits = torch.linspace(-4, 4, 200)
for kind in ("hinge", "softplus"):
    d = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(scflow.discriminator_loss(torch.full((1,), 9.0), d, kind) * len(d), d)
    assert torch.allclose(slope, critic_slope(logits, kind), atol=1e-6)
    (slope,) = torch.autograd.grad(scflow.adversarial_loss(d, kind) * len(d), d)
    assert torch.allclose(slope, student_slope(logits, kind), atol=1e-6)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
for kind, color, style in (("hinge", STUDENT, "-"), ("softplus", TEACHER, "--")):
    axes[0].plot(logits, critic_slope(logits, kind), color=color, ls=style, lw=2.5, label=kind)
    axes[1].plot(logits, -student_slope(logits, kind), color=color, ls=style, lw=2.5, label=kind)
axes[0].set(title="push on the critic", xlabel="logit D of a sample", ylabel="size of the slope", ylim=(-0.05, 1.15))
axes[1].set(title="push on the student", xlabel="logit D of a sample")
axes[0].legend(frameon=False, loc="center right")
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: the hinge critic stops once a sample is safely recognised, and its height stays near ±1; softplus never
# stops. A hinge student is always pushed; a softplus student less, the better it passes for data.*
#
# The push on a *sample* is this slope times ∇D(x). The best hinge critic is flat, and has none to give. A learned one
# teaches along the ramps between its plateaus.

# %%
x = torch.tensor([[0.0], [0.38]], requires_grad=True)  # the middle, and about where p = q
(slope,) = torch.autograd.grad(critic(x).sum(), x)
print(f"slope of the learned D in the middle {slope[0].item():.2f}, where p = q {slope[1].item():.2f}")
assert slope[1] > 3 * slope[0].abs()

# %% [markdown]
# ## Spread, won back
#
# The same truncated students, now with λ_adv = 0.1 beside the regression. **Predict:** which of them reach the dashed
# line?

# %%
with_critic = [one_step_std(tau, lambda_adv=0.1) for tau in TAUS]
std_figure(regression=regression, with_critic=with_critic)
for before, after in zip(regression, with_critic):
    assert abs(after - S) < 0.5 * abs(before - S) or abs(after - S) < 0.06

# %% [markdown]
# *What to see: at every τ the squares have left the band, and most or all of the lost spread is back.*

# %% [markdown]
# ## Eight Gaussians
#
# Here a mean does more harm: it lies on a bridge. The teacher is the exact velocity, the student starts from a short
# regression on it, τ = 0.4.


# %%
def batch(n, generator):
    return mixture.sample(n, generator)[0], None


torch.manual_seed(SEED)
generator = torch.Generator().manual_seed(SEED)
settings = scflow.TeacherSettings(teacher_steps=400, teacher_batch=256)
*_, run = scflow.train_teacher(scflow.MLP(), batch, generator, settings, oracle=mixture)
start = run.ema

# %%
truth, strata = mixture.sample(4000, generator, stratified=True)
distance = scflow.EnergyDistance(truth, strata)
floor = scflow.noise_floor(distance, lambda: mixture.sample(4000, generator)[0], repeats=10)
noise, one = torch.randn(4000, 2, generator=generator), torch.ones(4000)
goal = mixture.flow_map(noise, one, steps=50)  # where the teacher's flow takes each noise


def score(x):
    """Energy distance ×10³, share within 3σ of a mode, RMS distance to the flow's end."""
    return 1e3 * distance(x), scflow.coverage_and_precision(x, mixture)[1], scflow.rms_distance(x, goal)


# %%
MOMENTS = (10, 40, 150, 500)
samples, moments, proven = {}, {}, {}


def distil(name, **changes):
    """Distil; keep the one-step samples, the critic at some moments, and what it proves (see below)."""
    torch.manual_seed(SEED)
    g, disc = torch.Generator().manual_seed(SEED), scflow.PointDiscriminator()
    for run in scflow.distill(mixture, disc, batch, g, (replace(BASE, **changes),), student=start):
        if run.step in MOMENTS:
            moments[name, run.step] = copy.deepcopy(run.disc), scflow.sample(run.student, noise[:500])
        if run.step % 10 == 0:
            with torch.no_grad():
                logits = disc(truth), disc(scflow.sample(run.student, noise))
            proven[name, run.step] = 1 - scflow.discriminator_loss(*logits).item() / 2
    samples[name] = scflow.sample(run.ema, noise)


# %%
distil("regression", lambda_adv=0.0)
distil("with critic")
scores = {name: score(x) for name, x in samples.items()}
print(f"noise floor {1e3 * floor[0]:.2f} ± {1e3 * floor[1]:.2f}; exact map {score(goal)[0]:.2f}")
for name, row in scores.items():
    print("{:12} energy distance {:5.2f}, precision {:.3f}, map error {:.2f}".format(name, *row))
assert scores["with critic"][0] < scores["regression"][0] / 2  # nearer to the data
assert scores["with critic"][1] > scores["regression"][1] + 0.1  # and on the modes
assert scores["with critic"][0] > 1e3 * (floor[0] + 3 * floor[1])  # but not yet at the floor

# %%
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.3), sharey=True)
cloud(axes[0], data, "data", GREY)
cloud(axes[1], samples["regression"][:2000], "regression", PINK)
cloud(axes[2], samples["with critic"][:2000], "with critic")
plt.tight_layout()
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
side = torch.linspace(-3, 3, 61)
mesh, levels = torch.cartesian_prod(side, side), torch.linspace(-1.5, 1.5, 13).tolist()
fig, axes = plt.subplots(1, 4, figsize=(10, 2.9), sharey=True, layout="constrained")
for ax, step in zip(axes, MOMENTS):
    disc, x = moments["with critic", step]
    with torch.no_grad():
        heights = disc(mesh).reshape(61, 61).T
    picture = ax.contourf(side, side, heights, levels, cmap="PuOr_r", extend="both")
    ax.contour(side, side, heights, [0], colors="black", linewidths=1)
    cloud(ax, x, f"update {step}", "black")
fig.colorbar(picture, ax=axes, shrink=0.8, ticks=[-1.5, 0, 1.5], label="D(x)")
plt.show()

# %% [markdown]
# *What to see: at first everything outside the blot in the middle looks like data. Once the samples have spread out,
# the landscape is nearly flat: the critic has lost them. Later it rises again, where it has found the next fault.*

# %% [markdown]
# A loss L of *any* critic on fresh points proves something: TV ≥ 1 − L/2, for no critic is below 2(1 − TV). So does the
# critic of the run prove less and less because the samples are better, or because it cannot keep up? Ask a **referee**:
# a new critic, trained on frozen samples.


# %%
def referee(x):
    """The TV that a new critic can prove between data and x; it learns on one half of x and is asked on the other."""
    torch.manual_seed(SEED)
    g, disc = torch.Generator().manual_seed(SEED), scflow.PointDiscriminator()
    opt = scflow.adamw(disc, 3e-3, (0.5, 0.99))
    for _ in range(300):
        real, fake = mixture.sample(1000, g)[0], x[torch.randint(2000, (1000,), generator=g)]
        loss = scflow.discriminator_loss(disc(real), disc(fake))
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        return 1 - scflow.discriminator_loss(disc(mixture.sample(2000, g)[0]), disc(x[2000:])).item() / 2


verdict = {name: referee(x) for name, x in samples.items()} | {"true": referee(mixture.sample(4000, generator)[0])}
print({k: round(v, 3) for k, v in verdict.items()})

# %%
fig, ax = plt.subplots(figsize=(7, 3.6))
steps, values = zip(*((step, v) for (name, step), v in proven.items() if name == "with critic"))
ax.plot(steps, values, color=STUDENT, lw=2.5, label="the run's own critic")
ax.plot(500, verdict["regression"], "o", color=PINK, ms=11, label="referee, on the regression", clip_on=False)
ax.plot(500, verdict["with critic"], "s", color=STUDENT, ms=11, label="referee, on the run", clip_on=False)
ax.axhline(0, color="black", lw=1)
ax.set(xlabel="update", ylabel="proven TV, 1 − L/2", xlim=(0, 505))
ax.legend(frameon=False)
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: the run's own critic proves little, early and late. The referee proves more, so part of its silence is
# that it could not keep up; and far less than of the regression, so part is that the samples are better.*
#
# ## A critic alone
#
# A critic compares laws. It never asks *which* noise went where.
#
# **Exercise.** Make one-step samples with the **right law** and a **wrong map**, from the exact flow map. (Hint: which
# changes of the noise leave its law as it is?)


# %%
def right_law_wrong_map(x1):
    """Samples (n,2) of the mixture, far from where the flow takes x1."""
    # your answer
    return mixture.flow_map(-x1, torch.ones(len(x1)), steps=50)  # −x₁ is Gaussian too


# %%
row = score(right_law_wrong_map(noise))
print("wrong map: energy distance {:.2f}, precision {:.3f}, map error {:.2f}".format(*row))
assert row[0] < 1e3 * (floor[0] + 5 * floor[1])  # no critic would mind
assert row[2] > 2  # but each noise lands somewhere else

# %% [markdown]
# So the law does not fix the map. What does a student do that has nothing but the critic? It starts where the others
# did, at a regression on the teacher. **Predict before you run it.**

# %%
distil("critic alone", lambda_consistency=0.0)
scores["critic alone"] = score(samples["critic alone"])
for name, row in scores.items():
    print("{:12} energy distance {:5.2f}, precision {:.3f}, map error {:.2f}".format(name, *row))
assert scores["critic alone"][2] > 1.5 * scores["with critic"][2]  # another map
assert scores["critic alone"][0] > 2 * scores["with critic"][0]  # and, in as many updates, a worse law

# %%
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.3), sharey=True)
panels = {"exact map": goal, "with critic": samples["with critic"], "critic alone": samples["critic alone"]}
hue = torch.atan2(noise[:, 1], noise[:, 0])
for ax, (name, x) in zip(axes, panels.items()):
    cloud(ax, x, name, "none")
    ax.scatter(*x.T, s=4, c=hue, cmap="twilight", linewidths=0)
plt.tight_layout()
plt.show()

# %% [markdown]
# *What to see: a point has the colour of the direction of its noise. With the critic beside
# consistency, colours lie where the exact map puts them. The critic alone mixes them up, and misses the modes.*

# %% [markdown]
# **The answer.** A regression knows which noise goes where, and answers with means. A critic knows what data look like
# as a whole, and does not mind who goes where. Together the one supplies the map, and the other the spread.

# %% [markdown]
# ## What to try next
#
# - Set `distance="huber"` in `BASE`, the default of `scflow`. How much blur is left for the critic to repair?
# - Run `distil("heavy", lambda_adv=1.0)`. Do more of the samples land on the modes? What happens to the map error?
# - One step is better now. Do two steps agree with it? Next notebook: `04_self_correction`.
