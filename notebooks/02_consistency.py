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
# **Question.** Can one network evaluation jump to where the flow would end? And why does the student that can do it get
# *worse* when it takes more steps?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/02_consistency.ipynb)

# %%
import math
import subprocess
import sys

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
angles = torch.arange(8) * math.pi / 4
mixture = scflow.GaussianMixture(2 * torch.stack([angles.cos(), angles.sin()], 1), 0.15)
generator = torch.Generator().manual_seed(0)


def window(ax, title):
    """A square picture around the data."""
    ax.set(title=title, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])


# %% [markdown]
# ## The flow map
#
# f\*(x,t) is where the flow takes (x,t) at t = 0. All points of one path have the same value: f\* is **constant along
# paths**, and at the end of the path it is the identity, f\*(x,0) = x. The two facts together determine it.

# %%
noise = torch.randn(40, 2, generator=generator)
_, paths = scflow.sample(mixture, noise, 100, "heun", trajectory=True)  # (101, 40, 2)
values = [mixture.flow_map(paths[i], torch.full((40,), 1 - i / 100)) for i in (0, 40, 80)]
assert all((v - paths[-1]).norm(dim=1).max() < 0.02 for v in values)  # from anywhere on the path

fig, ax = plt.subplots(figsize=(4.6, 4.6))
ax.plot(*paths.permute(2, 0, 1).numpy(), color=GREY, lw=0.8)
for i, colour in ((0, TEACHER), (40, PINK), (80, THIRD)):
    ax.scatter(*paths[i].T.numpy(), s=12, color=colour, label=f"t = {1 - i / 100:g}", zorder=2)
ax.scatter(*values[0].T.numpy(), s=30, facecolors="none", edgecolors=STUDENT, label="f*, the same from all", zorder=2)
window(ax, "one value per path")
ax.legend(frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# *What to see: orange, pink and green points of a path share one blue ring.*
#
# ## The end of the path
#
# The network gives v; its jump is f(x,t) = x − t·v(x,t). At t = 0 that is x, **whatever the weights are**.

# %%
torch.manual_seed(0)
x = torch.randn(1000, 2, generator=generator)
assert torch.equal(scflow.predict_x0(scflow.MLP(), x, torch.zeros(1000)), x)

# %% [markdown]
# Why care? "Constant along paths" alone is also met by f = 0. Take the boundary away, let the network give f itself,
# and train it to agree with its neighbour on the exact path.


# %%
def train(jump, updates=300, delta=0.1, wrong=False):
    """Consistency on the exact paths with a jump(net, x, t); returns the losses and the one-step samples."""
    torch.manual_seed(0)
    net, g, losses = scflow.MLP(width=64), torch.Generator().manual_seed(1), []
    target, opt = scflow.clone(net), torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(updates):
        x0, x1, t = mixture.sample(512, g)[0], torch.randn(512, 2, generator=g), torch.rand(512, generator=g)
        xt = scflow.interpolate(x0, x1, t)
        s = t - torch.rand(512, generator=g) * t.clamp(max=delta)
        with torch.no_grad():  # the target is a constant
            goal = jump(target, xt - (t - s)[:, None] * mixture(xt, t), s)
        loss = scflow.pseudo_huber(jump(net, xt, t), goal)
        opt.zero_grad()
        loss.backward()
        opt.step()
        scflow.ema_update(target, net, 0.9)
        losses.append(loss.item())
    with torch.no_grad():  # a picture
        return losses, jump(net, torch.randn(500, 2, generator=g), torch.ones(500))


bound, free = train(scflow.predict_x0), train(lambda net, x, t: net(x, t))
fig, axes = plt.subplots(1, 3, figsize=(10, 3.3))
axes[0].semilogy(bound[0], color=STUDENT, label="f = x − t·v")
axes[0].semilogy(free[0], color=TEACHER, label="f = network")
axes[0].set(xlabel="update", title="consistency loss")
axes[0].legend(frameon=False, fontsize=10)
for ax, (_, x), title, colour in zip(axes[1:], (bound, free), ("f = x − t·v", "f = network"), (STUDENT, TEACHER)):
    ax.scatter(*x.T.numpy(), s=5, color=colour)
    window(ax, title)
plt.tight_layout()
plt.show()
assert free[0][-1] < bound[0][-1] and free[1].norm(dim=1).mean() < 0.5 < bound[1].norm(dim=1).mean()

# %% [markdown]
# *What to see: without the boundary the loss is the lower one, and the samples are worthless. A small consistency loss
# proves nothing unless the end of the path is nailed down.*
#
# ## The window
#
# The neighbour x_s lies one **Euler step of the teacher** nearer the data, s = t − U(0, min(t,δ)). Even f\* does not
# agree with it perfectly: Euler leaves the path by O(δ²). One Gaussian shows it, since its flow map is known:
# f\*(x,t) = m + (s/σ_t)·(x − (1−t)m).


# %%
def sigma(s, t):
    """Standard deviation of x_t for data N(m, s²I)."""
    return (((1 - t) * s) ** 2 + t**2) ** 0.5


def residual(delta, t=0.6, s=0.5):
    """|f*(x_t,t) − f*(x_s,s)| at one standard deviation, x_s one Euler step of length δ nearer the data (m = 0)."""
    one = scflow.GaussianMixture([[0.0]], s).double()
    xt = torch.tensor([[sigma(s, t)]], dtype=torch.float64)
    xs = xt - delta * one(xt, torch.tensor([t], dtype=torch.float64))
    return (s / sigma(s, t) * xt - s / sigma(s, t - delta) * xs).abs().item()


deltas = [0.2, 0.1, 0.05, 0.025]
errors = [residual(d) for d in deltas]
print("halving the window divides the residual by", [round(a / b, 2) for a, b in zip(errors, errors[1:])])
assert 3.5 < errors[-2] / errors[-1] < 4.5

# %% [markdown]
# A short window is exact, but news from t = 0 then needs many hops to reach t = 1.
#
# **Exercise.** How many hops does it take on average? A hop from t goes back U(0, min(t,δ)). Count until t < 0.01.


# %%
def hops(delta, n=2000):
    """Mean number of hops from t = 1 to below 0.01."""
    # your answer
    t, count = torch.ones(n), torch.zeros(n)
    while (far := t >= 0.01).any():
        t = torch.where(far, t - torch.rand(n, generator=generator) * t.clamp(max=delta), t)
        count += far
    return count.mean().item()


print({d: round(hops(d), 1) for d in (0.05, 0.1, 0.5)})
assert abs(hops(0.05) - 41) < 3 and abs(hops(0.1) - 22) < 3 and hops(0.5) < 8

# %% [markdown]
# ## Truncation
#
# Below τ the target is the data point x₀ itself. Its squared optimum is the mean of x₀ given x_t, which is narrower
# than the data. Above τ that value is handed on along the path.
#
# **Exercise.** For one Gaussian (m = 0) the mean of x₀ given x_τ is (1−τ)s²/σ_τ² · x_τ. What is the standard
# deviation of the one-step sample, if the value at τ is handed on unchanged?


# %%
def one_step_std(tau, s):
    """Of f(x₁,1), which is the posterior mean at the point x_τ of the same path."""
    # your answer
    return (1 - tau) * s**2 / sigma(s, tau)  # x_τ has deviation σ_τ


for tau, s in ((0.0, 0.5), (0.4, 0.15), (0.4, 1.0)):
    one, start = scflow.GaussianMixture([[0.0]], s), torch.randn(5000, 1, generator=generator)
    _, path = scflow.sample(one, start, 100, "heun", trajectory=True)
    at_tau = path[round(100 * (1 - tau))]
    mean = scflow.predict_x0(one, at_tau, torch.full((5000,), tau))  # x − τ·v* is the mean of x₀ given x_τ
    assert abs(mean.std().item() - one_step_std(tau, s)) < 0.05 * s

taus = torch.linspace(0, 1, 101)
fig, ax = plt.subplots(figsize=(6.5, 3.6))
for s, colour in ((0.15, GREY), (0.5, THIRD), (1.0, STUDENT), (2.0, TEACHER)):
    ax.plot(taus, one_step_std(taus, s) / s, color=colour, lw=2.5, label=f"s = {s:g}")
ax.axvline(0.4, color="black", ls=":", lw=1)
ax.set(xlabel="truncation τ", ylabel="one-step std / data std", xlim=(0, 1), ylim=(0, 1.02))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# *What to see: the sharper the data, the more truncation blurs. At the paper's τ = 0.4 (dotted) a narrow mode
# keeps a fifth of its width. Something has to win the spread back: the critic of the next notebook.*
#
# ## A student
#
# A teacher, then consistency alone, without truncation.


# %%
def batch(n, generator):
    """Data, and no condition."""
    return mixture.sample(n, generator)[0], None


torch.manual_seed(0)
*_, run = scflow.train_teacher(scflow.MLP(), batch, generator, scflow.TeacherSettings(teacher_steps=900))
teacher, phase = run.ema, scflow.Phase(steps=1500, tau=0.0, lambda_adv=0.0, lambda_self=0.0, lambda_bi=0.0)
*_, run = scflow.distill(teacher, scflow.PointDiscriminator(), batch, generator, (phase,))
student, start = run.ema, torch.randn(4000, 2, generator=generator)

# %%
fig, axes = plt.subplots(1, 4, figsize=(10, 2.9))
pictures = {"teacher, 1 step": (teacher, 1), "teacher, 50 steps": (teacher, 50), "student, 1 step": (student, 1)}
pictures["student, 8 steps"] = (student, 8)
for ax, (title, (net, steps)) in zip(axes, pictures.items()):
    x = scflow.sample(net, start[:1500], steps)
    ax.scatter(*x.T.numpy(), s=3, color=TEACHER if net is teacher else STUDENT, linewidths=0)
    window(ax, title)
plt.tight_layout()
plt.show()
radius = {n: scflow.sample(student, start, n).norm(dim=1).mean() for n in (1, 8)}
assert radius[8] > 1.05 * radius[1]

# %% [markdown]
# *What to see: one step of the student nearly does what takes the teacher fifty. With eight steps its modes move
# outwards.*
#
# ## More steps, worse samples
#
# Is the student badly trained? Ask the **perfect** student, f\* itself, as the velocity v(x,t) = (x − f\*(x,t))/t.


# %%
def exact(x, t, cond=None):
    """The average velocity to the end of the exact path."""
    return (x - mixture.flow_map(x, t, 30)) / t[:, None]


truth, k = mixture.sample(4000, generator, stratified=True)
energy = scflow.EnergyDistance(truth, k)
floor, spread = scflow.noise_floor(energy, lambda: mixture.sample(4000, generator)[0])
counts, result = (1, 2, 4, 8), {}
for who, net in (("exact map", exact), ("student", student)):
    for solver in ("euler", "renoise"):
        samples = [scflow.sample(net, start, n, solver, generator=generator) for n in counts]
        result[who, solver] = [1e3 * energy(x) for x in samples]
        print(f"{who:10} {solver:8}", *(f"{e:7.1f}" for e in result[who, solver]))

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for ax, solver, title in zip(axes, ("euler", "renoise"), ("Euler", "fresh re-noising")):
    ax.axhspan(1e3 * (floor - 2 * spread), 1e3 * (floor + 2 * spread), color="#dddddd", label="noise floor")
    ax.plot(counts, result["exact map", solver], "s--", color=GREY, lw=2, label="exact map")
    ax.plot(counts, result["student", solver], "o-", color=STUDENT, lw=2, label="student")
    ax.set(title=title, xlabel="steps", xscale="log")
    ax.set_xticks(counts, counts)
    ax.minorticks_off()
axes[0].set_ylabel("energy distance ×10³")
axes[0].legend(frameon=False)
plt.tight_layout()
plt.show()
assert result["exact map", "euler"][0] < 3 < 10 < result["exact map", "euler"][1] < result["exact map", "euler"][3]
assert result["student", "euler"][0] < result["student", "euler"][1] / 3 < result["student", "euler"][3] / 3
assert max(result["exact map", "renoise"]) < 3 and result["student", "renoise"][3] < result["student", "euler"][3] / 3

# %% [markdown]
# *What to see: the perfect map gets worse with every Euler step too. It is no defect of training. Re-noising costs
# neither of them.*
#
# The reason is where an Euler step arrives. From x̂₀ = f(x₁,1) it goes to x̂_t = (1−t)·x̂₀ + t·**the same** x₁, which
# is not distributed like x_t, whose x₀ and x₁ are drawn apart. Re-noising draws fresh noise, and its points are x_t.
#
# **Exercise.** One Gaussian, m = 0, f\*(x₁,1) = s·x₁. What is the standard deviation after **two** Euler steps of f\*?


# %%
def two_steps_std(s):
    """Deviation of f*(x̂_½, ½) for x̂_½ = ½·s·x₁ + ½·x₁."""
    # your answer
    return s / sigma(s, 0.5) * (s + 1) / 2


for s in (0.15, 0.5, 2.0):
    one, z = scflow.GaussianMixture([[0.0]], s), torch.randn(5000, 1, generator=generator)
    halfway = (scflow.sample(one, z, 200, "heun") + z) / 2  # the first Euler step of f*
    measured = one.flow_map(halfway, torch.full((5000,), 0.5)).std() / z.std()
    assert abs(measured - two_steps_std(s)) < 0.02 * s
    assert abs(two_steps_std(s) - s * (1 + s) / math.sqrt(1 + s**2)) < 1e-6
print("two Euler steps of the exact map stretch a Gaussian by", round(two_steps_std(0.15) / 0.15, 3), "at s = 0.15")

# %% [markdown]
# **The answer.** Yes: one evaluation can replace the flow, if the end of the path is nailed down. More Euler steps on
# it are steps of another equation, from points it never saw. To make them agree is a task of its own.

# %% [markdown]
# ## What to try next
#
# - Train the student with `tau=0.4`. Which of the step counts get better, and what happens to the modes at one step?
# - Set `delta=0.02`, then `0.5`. Which loses one-step quality, and why for opposite reasons?
# - Blur is what a mean leaves behind. What can a critic do that a regression cannot? Next notebook: `03_one_step_gan`.
