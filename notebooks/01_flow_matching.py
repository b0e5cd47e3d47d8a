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
# **Question.** Straight lines from noise to data cross each other. A flow cannot cross itself. What does a network
# learn that is trained on the lines, and how many steps does it need?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/01_flow_matching.ipynb)

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
TEACHER, STUDENT, THIRD, GREY = "#D55E00", "#0072B2", "#009E73", "#999999"
plt.rcParams.update({"font.size": 12, "figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Lines that cross
#
# Data are eight Gaussians, t = 0. Noise is N(0, I), t = 1. Draw a point of each, **apart from each other**, and join
# them: x_t = (1−t)·x₀ + t·x₁. Along a line the velocity is constant, v = x₁ − x₀.

# %%
angles = torch.arange(8) * math.pi / 4
mixture = scflow.GaussianMixture(2 * torch.stack([angles.cos(), angles.sin()], 1), 0.15)
generator = torch.Generator().manual_seed(0)
x0, _ = mixture.sample(120, generator)
x1 = torch.randn(120, 2, generator=generator)


def lines(ax, paths, title):
    """Paths (steps, n, 2), noise in orange, data in blue."""
    ax.plot(*paths.permute(2, 0, 1).numpy(), color=GREY, lw=0.7, zorder=1)
    ax.scatter(*paths[0].T.numpy(), s=10, color=TEACHER, label="noise, t = 1", zorder=2)
    ax.scatter(*paths[-1].T.numpy(), s=10, color=STUDENT, label="data, t = 0", zorder=2)
    ax.set(title=title, xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=[], yticks=[])


fig, ax = plt.subplots(figsize=(4.6, 4.8))
lines(ax, torch.stack([x1, x0]), "lines between pairs drawn apart")
fig.legend(loc="lower center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# *What to see: near the centre many lines meet, each with its own direction.*
#
# A network v(x,t) sees only where it is, not which line it is on. Trained on ‖v(x_t,t) − (x₁−x₀)‖², its best answer
# is the **mean over the lines through that point**: v\*(x,t) = E[x₁ − x₀ | x_t = x]. For a mixture that is known
# exactly.

# %%
t, place = 0.5, torch.tensor([0.6, 0.2])
many0, _ = mixture.sample(2_000_000, generator)
many1 = torch.randn(2_000_000, 2, generator=generator)
near = ((1 - t) * many0 + t * many1 - place).norm(dim=1) < 0.05
mean = (many1 - many0)[near].mean(0)
exact = mixture(place[None], torch.tensor([t]))[0]
print(f"{near.sum()} lines pass by; mean velocity {mean.tolist()}, v* {exact.tolist()}")
assert (mean - exact).norm() < 0.1

# %% [markdown]
# **Exercise.** For one Gaussian N(m, s²I) the pair (x₀, x_t) is jointly Gaussian. Write v\*(x,t). With
# σ_t² = (1−t)²s² + t² the regression of x₀ on x_t has slope (1−t)s²/σ_t², that of x₁ has slope t/σ_t².


# %%
def one_gaussian(x, t, m, s):
    """E[x₁ − x₀ | x_t = x] for x₀ ~ N(m, s²I)."""
    # your answer
    variance = ((1 - t) * s) ** 2 + t**2
    return -m + (t - (1 - t) * s**2) / variance * (x - (1 - t) * m)


m = torch.tensor([1.0, -0.5])
for s in (0.3, 1.7):
    one = scflow.GaussianMixture(m[None], s)
    for t in (0.0, 0.3, 1.0):
        x = torch.randn(100, 2, generator=generator)
        assert torch.allclose(one_gaussian(x, t, m, s), one(x, torch.full((100,), t)), atol=1e-5)

# %% [markdown]
# ## The flow does not cross
#
# Follow v\* from noise to data with many small steps. The law of x_t is the same as that of the lines, at every t. The
# paths are not.

# %%
noise = torch.randn(120, 2, generator=generator)
_, flow = scflow.sample(mixture, noise, 100, "heun", trajectory=True)  # (101, 120, 2)
fig, axes = plt.subplots(1, 2, figsize=(9, 4.9))
lines(axes[0], torch.stack([x1, x0]), "lines: what is trained on")
lines(axes[1], flow, "v*: what is learned")
fig.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# *What to see: the flow's paths bend. At first all of them head for the mean of the data; only near the ring does each
# make up its mind.*
#
# How bent? Compare the velocity on a path with the straight way to its end. On a straight path the difference is zero.

# %%
times = torch.linspace(1, 0, 101)
chord = flow[0] - flow[-1]  # x₁ − x₀ of the flow's own pairs
bend = torch.stack([(mixture(x, torch.full((120,), t)) - chord).square().sum(1).mean() for x, t in zip(flow, times)])
print(f"mean squared bend {bend.mean():.2f}, mean squared length {chord.square().sum(1).mean():.2f}")
assert bend.mean() > 0.05 * chord.square().sum(1).mean()

# %% [markdown]
# The flow at work: the same points at sixteen moments.

# %%
if "IPython" in sys.modules:  # a program shows no animation
    from IPython.display import HTML, display
    from matplotlib.animation import FuncAnimation

    fig, ax = plt.subplots(figsize=(4, 4), dpi=50)
    _, many = scflow.sample(mixture, torch.randn(250, 2, generator=generator), 15, "heun", trajectory=True)
    colour = torch.atan2(many[-1, :, 1], many[-1, :, 0]).numpy()

    def frame(i):
        ax.clear()
        ax.scatter(*many[i].T.numpy(), s=8, c=colour, cmap="twilight")
        ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xticks=[], yticks=[], title=f"t = {1 - i / 15:.2f}")

    display(HTML(FuncAnimation(fig, frame, 16, interval=150).to_jshtml(default_mode="reflect")))
    plt.close(fig)

# %% [markdown]
# ## A loss that stays put
#
# The lines through a point differ, so no network brings the loss to zero. Its floor is the spread of x₁ − x₀ around
# v\*, at every t.

# %%
n, ts = 20_000, torch.linspace(0.02, 0.98, 25)
big0, _ = mixture.sample(n, generator)
big1 = torch.randn(n, 2, generator=generator)
floor = []
for t in ts:
    xt = (1 - t) * big0 + t * big1
    floor.append((mixture(xt, t.expand(n)) - (big1 - big0)).square().mean())
floor = torch.stack(floor)
print(f"floor of the loss, mean over t: {floor.mean():.2f} per element")
assert floor.min() > 0.2

# %% [markdown]
# ## Euler and Heun
#
# Euler takes the slope at the start of a step, Heun the mean of both ends, at two evaluations a step. The error of the
# final point falls like 1/N for Euler and 1/N² for Heun. We measure it for one Gaussian, whose flow map is known.

# %%
s = 0.5
one, steps = scflow.GaussianMixture(m[None], s), [4, 8, 16, 32, 64]
start = torch.randn(500, 2, generator=generator).double()
one = one.double()
error = {
    k: [scflow.rms_distance(scflow.sample(one, start, n, k), m + s * start) for n in steps] for k in scflow.SOLVERS[:2]
}
order = {k: math.log2(e[-2] / e[-1]) for k, e in error.items()}
print({k: round(v, 2) for k, v in order.items()})
assert abs(order["euler"] - 1) < 0.1 and abs(order["heun"] - 2) < 0.1

# %% [markdown]
# **Exercise.** At t = 1 noise and data are independent, so v\*(x₁,1) is simple. Where does **one** Euler step land?


# %%
def one_euler_step(x1):
    """x₁ − v*(x₁,1), without calling the mixture."""
    # your answer
    return mixture.means.mean(0).expand_as(x1)  # E[x₁ − x₀ | x₁] = x₁ − E[x₀]: everything lands on the mean of the data


assert torch.allclose(one_euler_step(noise), scflow.sample(mixture, noise, 1), atol=1e-5)

# %% [markdown]
# This is why a teacher needs many steps: its first one knows nothing but the mean.
#
# ## A network instead of v\*
#
# Now train one. `train_teacher` draws x₀, x₁ and t, and regresses on x₁ − x₀.

# %%
torch.manual_seed(0)
net, losses = scflow.MLP(), []
settings = scflow.TeacherSettings(teacher_steps=1000)
for run in scflow.train_teacher(net, lambda n, g: (mixture.sample(n, g)[0], None), generator, settings):
    losses.append(run.losses["flow"])
teacher = run.ema  # the average over the last updates

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.5))
axes[0].plot(losses, color=TEACHER, lw=0.8)
axes[0].axhline(floor.mean(), color="black", ls="--", label="floor, exact")
axes[0].set(xlabel="update", ylabel="loss", ylim=(0, None), title="the loss settles at once")
with torch.no_grad():  # a measurement
    axes[1].plot(ts, floor, "k--", label="floor, exact")
    at_t = []
    for t in ts:
        xt = (1 - t) * big0 + t * big1
        at_t.append((teacher(xt, t.expand(n)) - (big1 - big0)).square().mean())
axes[1].plot(ts, at_t, color=TEACHER, lw=2, label="teacher")
axes[1].set(xlabel="t", ylim=(0, None), title="at the end, by t")
for ax in axes:
    ax.legend(frameon=False, loc="lower right")
plt.tight_layout()
plt.show()
assert abs(sum(losses[-200:]) / 200 - floor.mean()) < 0.1

# %% [markdown]
# *What to see: the loss sits on its floor long before training ends, and says little about quality. What is left to
# learn is far smaller than the noise of a batch.*
#
# So measure the network against v\* itself.

# %%
side = torch.linspace(-3, 3, 81)
grid = torch.cartesian_prod(side, side)
fig, axes = plt.subplots(1, 4, figsize=(10, 3))
for ax, t in zip(axes, (0.9, 0.6, 0.4, 0.2)):
    at = torch.full((len(grid),), t)
    with torch.no_grad():  # a picture
        wrong = (teacher(grid, at) - mixture(grid, at)).norm(dim=1)
    density = mixture.log_density(grid, at)
    wrong[density < density.max() - math.log(1000)] = math.nan  # no data there
    picture = ax.imshow(wrong.reshape(81, 81).T, "YlOrBr", origin="lower", extent=(-3, 3, -3, 3), vmin=0, vmax=1.5)
    ax.set(title=f"t = {t}", xticks=[], yticks=[])
fig.colorbar(picture, ax=axes, label="‖v − v*‖", shrink=0.8, extend="max")
plt.show()

# %% [markdown]
# *What to see: as t falls the true velocity turns sharply between the modes, and that is where the network is wrong.
# White: fewer than a thousandth of the peak density.*
#
# ## Two errors
#
# A sample is wrong for two reasons: the steps are too long, and the velocity is not v\*. Only the first can be bought
# off with evaluations.

# %%
few = torch.randn(1000, 2, generator=generator)
truth = mixture.flow_map(few, torch.ones(1000))
counts, result = [2, 4, 8, 16, 32, 64, 128], {}
for who, v in (("v*", mixture), ("teacher", teacher)):
    for solver in ("euler", "heun"):
        ns = [c // (2 if solver == "heun" else 1) for c in counts]
        result[who, solver] = [scflow.rms_distance(scflow.sample(v, few, n, solver), truth) for n in ns]

fig, ax = plt.subplots(figsize=(6.5, 4))
for (who, solver), e in result.items():
    ax.loglog(
        counts,
        e,
        ["o-", "s--"][solver == "heun"],
        color={"v*": GREY, "teacher": TEACHER}[who],
        label=f"{who}, {solver}",
    )
ax.set(xlabel="network evaluations", ylabel="RMS distance to the exact sample")
ax.set_xticks(counts, counts)
ax.minorticks_off()
ax.legend(frameon=False)
plt.show()
assert result["v*", "heun"][-1] < result["teacher", "heun"][-1] / 3  # the teacher's own error stays
assert result["teacher", "euler"][0] > 5 * result["teacher", "euler"][-1]

# %% [markdown]
# *What to see: with v\* (grey) the error keeps falling, for Heun faster; with the teacher (orange) it stops at the
# network's own error, and there a better solver buys nothing.*
#
# **Exercise.** How many evaluations does each solver need to be within one and a half times the teacher's best?


# %%
def needed(errors, best):
    """The smallest number of evaluations in `counts` whose error is at most 1.5·best."""
    # your answer
    return next(c for c, e in zip(counts, errors) if e <= 1.5 * best)


best = min(result["teacher", "heun"] + result["teacher", "euler"])
need = {solver: needed(result["teacher", solver], best) for solver in ("euler", "heun")}
print(need)
assert need["heun"] <= need["euler"] and min(need.values()) > 2
assert all(result["teacher", k][counts.index(v)] <= 1.5 * best for k, v in need.items())
assert all(e > 1.5 * best for k, v in need.items() for e in result["teacher", k][: counts.index(v)])

# %% [markdown]
# **The answer.** The network learns the mean velocity of all lines through a point. Its paths do not cross, so they
# bend, and bent paths need many steps. A better solver does not take that away: one or two steps are not enough for
# any.

# %% [markdown]
# ## What to try next
#
# - Move the modes apart, `2 *` → `4 *` in the mixture. Do the paths bend more or less? What happens to the floor?
# - Train for `teacher_steps=4000`. How far does the plateau of the last figure fall, and does the loss show it?
# - One step should land where the flow would end. Can a network learn that jump? Next notebook: `02_consistency`.
