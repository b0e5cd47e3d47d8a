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
# **Question.** One network, one sampler, the same seconds: what else could they buy?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/06_relatives.ipynb)

# %%
import copy
import itertools
import subprocess
import sys
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from torch.func import jvp

sys.path[:0] = [".", ".."]  # a clone holds scflow.py here or one folder up
try:
    import celeba_latent
    import scflow
    import toy_2d
except ImportError:  # a hosted notebook: fetch it once
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "git+https://github.com/OWNER/REPO"], check=True)
    import celeba_latent
    import scflow
    import toy_2d

from scflow import interpolate, predict_x0, pseudo_huber, squared  # noqa: E402

torch.set_num_threads(1)  # networks this small run best in one thread
plt.rcParams.update({"font.size": 12, "figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Two questions sort the family
#
# *What does the network say?* The velocity v(x,t) here and now; or the end f(x,t) = x − t·v(x,t); or the jump from t to
# any earlier s, X(x,t,s) = x − (t−s)·u(x,t,s), where u is the average velocity in between.
#
# *Who tells it?* The data, as pairs (x₀,x₁) drawn apart; a teacher's velocity; pairs that a teacher has made; or the
# network itself, asked elsewhere. All losses below have the same arguments: the network, its average (asked where no
# gradient should go), a pair, a time, and the generator of random numbers.

# %%
one_gaussian = scflow.GaussianMixture([[1.0, -0.5]], std=0.7)  # its maps are known: every loss is held against them
generator = torch.Generator().manual_seed(0)


def exact_jump(x, t, s, mean=one_gaussian.means[0], std=0.7):
    """u*(x,t,s) of one Gaussian: along a path (x_t − (1−t)·mean)/σ_t stays what it is."""
    sigma_t, sigma_s = (((1 - r) * std) ** 2 + r**2 for r in (t, s))
    ratio = (sigma_s / sigma_t).sqrt()[:, None]
    landed = (1 - s)[:, None] * mean + ratio * (x - (1 - t)[:, None] * mean)
    return (x - landed) / (t - s)[:, None]


def jump(u, x, t, s):
    """X(x,t,s) from the average velocity u."""
    return x - (t - s)[:, None] * u


x1 = torch.randn(1000, 2, generator=generator)
t = 0.1 + 0.9 * torch.rand(1000, generator=generator)
s = t * torch.rand(1000, generator=generator)
xt = one_gaussian.flow_map(x1, torch.ones(1000))  # here only to check the formula: one jump to the end, and in two
assert torch.allclose(jump(exact_jump(x1, torch.ones(1000), 0 * t), x1, torch.ones(1000), 0 * t), xt, atol=1e-4)
xt = jump(exact_jump(x1, torch.ones(1000), t), x1, torch.ones(1000), t)
xs = jump(exact_jump(xt, t, s), xt, t, s)
assert torch.allclose(xs, jump(exact_jump(x1, torch.ones(1000), s), x1, torch.ones(1000), s), atol=1e-4)


# %% [markdown]
# ## Velocities
#
# **Flow matching** regresses on x₁ − x₀. Every relative starts here. **Contrastive flow matching** also pushes away
# from the velocity of another pair.


# %%
def flow_matching(net, average, x0, x1, t, generator):
    return scflow.flow_matching_loss(net(interpolate(x0, x1, t), t), x0, x1)


def contrastive(weight):
    def loss(net, average, x0, x1, t, generator):
        v, other = net(interpolate(x0, x1, t), t), torch.randperm(len(t), generator=generator)
        return scflow.flow_matching_loss(v, x0, x1) - weight * scflow.flow_matching_loss(v, x0[other], x1[other])

    return loss


# %% [markdown]
# **Exercise.** Without a condition the other pair is any pair, so its mean velocity is the constant E[x₁ − x₀]. Which
# velocity minimises the contrastive loss? Check it for a constant field.


# %%
def contrastive_optimum(v_star, mean_velocity, weight):
    """The minimiser of E‖v − (x₁−x₀)‖² − weight·E‖v − other‖² at a point where flow matching gives v*."""
    # your answer
    return (v_star - weight * mean_velocity) / (1 - weight)


# %%
v_star, mean_velocity, weight = torch.tensor([0.3, -1.0]), torch.tensor([0.7, 0.2]), 0.05
v = contrastive_optimum(v_star, mean_velocity, weight).requires_grad_()
((v - v_star).square().sum() - weight * (v - mean_velocity).square().sum()).backward()
assert v.grad.abs().max() < 1e-5  # so without a condition it is flow matching, put wrong by a known amount


# %% [markdown]
# **2-rectified flow** is flow matching again, on pairs (x₁, what the teacher makes of it). Their lines hardly cross, so
# few steps are enough. **Paired regression** asks only for the end, at t = 1.


# %%
def paired(net, average, x0, x1, t, generator):
    return pseudo_huber(predict_x0(net, x1, torch.ones_like(t)), x0)


# %% [markdown]
# ## Ends
#
# **Consistency**: the answers at t and at an earlier s of the same path agree. Whose path? In *distillation* the
# teacher takes the step; in *training* both points are on the line of the pair, which is right on average; with
# *generated pairs* the line ends in the network's own answer; *Consistency-FM* also asks for equal velocities.


# %%
def earlier(t, window, generator):
    """s = t − U(0, min(t,window))."""
    return t - torch.rand(len(t), generator=generator) * t.clamp(max=window)


def consistency_distillation(teacher, window):
    def loss(net, average, x0, x1, t, generator):
        s, xt = earlier(t, window, generator), interpolate(x0, x1, t)
        with torch.no_grad():
            target = predict_x0(average, jump(teacher(xt, t), xt, t, s), s)
        return pseudo_huber(predict_x0(net, xt, t), target)

    return loss


def consistency_training(window, generated=0.0):
    def loss(net, average, x0, x1, t, generator):
        s, n = earlier(t, window, generator), round(generated * len(t))
        with torch.no_grad():
            own = predict_x0(average, interpolate(x0, x1, t)[:n], t[:n])
            x0 = torch.cat([own, x0[n:]])
            target = predict_x0(average, interpolate(x0, x1, s), s)
        return pseudo_huber(predict_x0(net, interpolate(x0, x1, t), t), target)

    return loss


def velocity_consistency(window, weight):
    def loss(net, average, x0, x1, t, generator):
        s = earlier(t, window, generator)
        xt, xs = interpolate(x0, x1, t), interpolate(x0, x1, s)
        v = net(xt, t)
        with torch.no_grad():
            v_s = average(xs, s)
        return pseudo_huber(jump(v, xt, t, 0 * t), jump(v_s, xs, s, 0 * s)) + weight * squared(v, v_s)

    return loss


# %% [markdown]
# **BOOT** never sees data. It asks for y(x₁,t) = (x_t − t·x₁)/(1−t), the part of x_t that is not noise. At t = 1 this
# is the teacher's guess, at t = 0 the sample. Put x_t = (1−t)·y + t·x₁ into dx/dt = v: dy/dt = (y − f)/(t(1−t)). For a
# constant f the way from t to s is exact.


# %%
def boot_step(y, f, t, s):
    """y at s from y at t, while the teacher's guess f stays what it is."""
    return f + (s * (1 - t) / (t * (1 - s)).clamp(min=1e-6))[:, None] * (y - f)


def boot(teacher, window, weight):
    def loss(net, average, x0, x1, t, generator):  # y(x₁,t) = x₁ − net(x₁,t): this network is never asked at x_t
        t, one = t.clamp(0.01, 0.99), torch.ones_like(t)
        s = earlier(t, window, generator)
        with torch.no_grad():
            y = x1 - average(x1, t)
            goal = boot_step(y, predict_x0(teacher, interpolate(y, x1, t), t), t, s)
            goal = torch.cat([goal, predict_x0(teacher, x1, one)])
        answers = (x1.repeat(2, 1) - net(x1.repeat(2, 1), torch.cat([s, one]))).chunk(2)
        return squared(answers[0], goal[: len(t)]) + weight * squared(answers[1], goal[len(t) :])

    return loss


# %%
t = torch.linspace(0.2, 0.8, 1000)
s = t - 1e-3
y_t, y_s = (
    (jump(exact_jump(x1, torch.ones(1000), r), x1, torch.ones(1000), r) - r[:, None] * x1) / (1 - r)[:, None]
    for r in (t, s)
)
f = predict_x0(one_gaussian, interpolate(y_t, x1, t), t)
assert (boot_step(y_t, f, t, s) - y_s).abs().max() < 1e-2 * (y_t - y_s).abs().max()


# %% [markdown]
# ## Jumps
#
# A jump has two times, so the network has two. The exact jumps obey three laws, and each law is a loss:
#
# - **Shortcut**: a jump is two half jumps. At the end of the halving stands flow matching.
# - **Flow map matching** (Lagrangian): where the jump lands, it moves with the velocity there, ∂ₛX = v(X,s).
# - **MeanFlow**: its start may slide along the path, d/dt [(t−s)·u] = v, so u = v − (t−s)·du/dt.


# %%
class TwoTimes(scflow.MLP):
    """u(x,t,s): the same perceptron with one more time. Called with one time it says u(x,t,t), the velocity."""

    def __init__(self):
        super().__init__()
        first = self.layers[0]
        self.layers[0] = torch.nn.Linear(first.in_features + 2 * len(self.t_freqs), first.out_features)

    def forward(self, x, t, s=None):
        angles = [(x[..., None] * self.x_freqs).flatten(1)]
        angles += [r[:, None] * self.t_freqs for r in (t, t if s is None else s)]
        return self.layers(torch.cat([x, *(wave(a) for a in angles for wave in (torch.sin, torch.cos))], 1))


def half_jumps(u, x, t, d, shortest=0.0):
    """The average velocity of two jumps of d/2 from t; jumps of `shortest` or less are asked for as if of no length."""
    length = torch.where(d / 2 <= shortest, 0 * d, d / 2)
    first = u(x, t, t - length)
    middle = jump(first, x, t, t - d / 2)
    return (first + u(middle, t - d / 2, t - d / 2 - length)) / 2


def shortcut(share, halvings=6):
    def loss(net, average, x0, x1, t, generator):
        n, xt = round(share * len(t)), interpolate(x0, x1, t)
        d = 0.5 ** torch.randint(halvings, (n,), generator=generator)  # the last half is taken for a velocity
        start = 1 - d * (torch.rand(n, generator=generator) / d).floor()  # a multiple of d from the noise
        x = interpolate(x0[:n], x1[:n], start)
        with torch.no_grad():
            target = half_jumps(average, x, start, d, 0.5**halvings)
        target = torch.cat([target, (x1 - x0)[n:]])
        times = torch.cat([start, t[n:]]), torch.cat([start - d, t[n:]])
        return squared(net(torch.cat([x, xt[n:]]), *times), target)

    return loss


def lagrangian_residual(u, velocity, x, t, s):
    """∂ₛX(x,t,s) − v(X,s)."""
    value, slope = jvp(lambda s: u(x, t, s), (s,), (torch.ones_like(s),))
    return value - (t - s)[:, None] * slope - velocity(jump(value, x, t, s), s)


def flow_map_matching(teacher, diagonal):
    def loss(net, average, x0, x1, t, generator):
        s = t * torch.rand(len(t), generator=generator)
        s[: round(diagonal * len(t))] = t[: round(diagonal * len(t))]  # no length: flow matching
        return lagrangian_residual(net, teacher, interpolate(x0, x1, t), t, s).square().mean()

    return loss


def mean_flow_target(u, v, x, t, s):
    """u(x,t,s), and v − (t−s)·du/dt along the path."""
    value, rate = jvp(lambda x, t: u(x, t, s), (x, t), (v, torch.ones_like(t)))
    return value, v - (t - s)[:, None] * rate


def mean_flow(share, power):
    def loss(net, average, x0, x1, t, generator):
        s = t * torch.rand(len(t), generator=generator)
        s[round(share * len(t)) :] = t[round(share * len(t)) :]
        value, target = mean_flow_target(net, x1 - x0, interpolate(x0, x1, t), t, s)
        error = (value - target.detach()).square().sum(1)
        return (error / (error.detach() + 1e-3) ** power).mean()  # large errors count less

    return loss


# %%
t = 0.3 + 0.7 * torch.rand(1000, generator=generator)
s = t * 0.9 * torch.rand(1000, generator=generator)
xt = jump(exact_jump(x1, torch.ones(1000), t), x1, torch.ones(1000), t)
assert torch.allclose(half_jumps(exact_jump, xt, t, t - s), exact_jump(xt, t, s), atol=1e-3)
assert lagrangian_residual(exact_jump, one_gaussian, xt, t, s).abs().max() < 1e-3
value, target = mean_flow_target(exact_jump, one_gaussian(xt, t), xt, t, s)
assert (value - target).abs().max() < 1e-3

# %% [markdown]
# ## The same seconds
#
# The budget is what the default of `toy_2d.py` takes, teacher and student together. It is counted in updates of flow
# matching, so that a run does not depend on what else the machine does: `COST` says how many of them one update of a
# loss takes (`costs()` measures it, all losses in turns). What a method needs first, a teacher or pairs, it pays for.

# %%
COST = {
    "flow matching": 1.0,
    "contrastive": 1.05,
    "paired": 1.0,
    "consistency distillation": 1.6,
    "consistency training": 1.4,
    "generated pairs": 1.55,
    "velocity consistency": 1.4,
    "BOOT": 2.35,
    "shortcut": 1.55,
    "flow map matching": 3.5,
    "MeanFlow": 2.6,
    "phase 1": 2.3,
    "phase 2": 2.1,
    "paper": 4.1,
    "one million evaluations": 500.0,  # without gradient
}
TEACHER, (FIRST, LAST) = 1500, scflow.SCHEDULES["two_phase"]
PHASES = {"phase 1": FIRST, "phase 2": replace(LAST, self_source="ema"), "paper": scflow.SCHEDULES["paper"][0]}
BUDGET = TEACHER + FIRST.steps * COST["phase 1"] + LAST.steps * COST["phase 2"]


class Lab:
    """One data set, one seed, and a budget. `share` of the budget shortens everything alike."""

    def __init__(self, name, seed=0, share=1.0):
        torch.manual_seed(seed)
        self.data, self.generator = toy_2d.dataset(name), torch.Generator().manual_seed(seed)
        self.share, self.left, self.updates = share, share * BUDGET, 0

    def batch(self, n, generator):
        return self.data.sample(n, generator)[0], None

    def draw(self, n):
        """A pair (x₀,x₁), drawn apart."""
        return self.batch(n, self.generator)[0], torch.randn(n, 2, generator=self.generator)

    def train(self, net, loss, updates, draw=None, lr=4e-3, at_one=0.0, rows=512):
        """The loop of every method: yields the average of the network after each update."""
        opt, fast, slow = scflow.adamw(net, lr), scflow.clone(net), scflow.clone(net)
        for i in range(updates):
            opt.param_groups[0]["lr"] = lr * scflow.lr_factor(i, updates)
            x0, x1 = (draw or self.draw)(rows)
            t = torch.rand(rows, generator=self.generator)
            t[: round(at_one * rows)] = 1
            opt.zero_grad()
            loss(net, fast, x0, x1, t, self.generator).backward()
            opt.step()
            scflow.ema_update(fast, net, 0.9)
            scflow.ema_update(slow, net, scflow.growing(i, 0.9999))
            yield slow

    def fit(self, net, loss, cost, updates=None, **settings):
        """Train `net` with what is left of the budget, or for `updates`; returns its average."""
        updates = int(self.left / COST[cost]) if updates is None else round(self.share * updates)
        *_, average = self.train(net, loss, updates, **settings)
        self.left, self.updates = self.left - updates * COST[cost], self.updates + updates
        return average

    def teacher(self):
        return self.fit(scflow.MLP(), flow_matching, "flow matching", TEACHER)

    def pairs(self, teacher, count, steps):
        """Draw from `count` pairs (x̂₀,x₁) of the teacher by that many Heun steps."""
        count = round(self.share * count)
        x1 = torch.randn(count, 2, generator=self.generator)
        x0 = torch.cat([scflow.sample(teacher, x, steps, "heun") for x in x1.split(5000)])
        self.left -= COST["one million evaluations"] * count * scflow.nfe(steps, "heun") / 1e6

        def draw(n):
            i = torch.randint(count, (n,), generator=self.generator)
            return x0[i], x1[i]

        return draw


def trained_copy(net):
    return scflow.clone(net, train=True)


def euler(net):
    """A sampler (noise, steps) → samples."""
    return lambda noise, steps: scflow.sample(net, noise, steps)


def renoising(net):
    """Consistency models take more steps by going back to noise."""
    fresh = torch.Generator()  # its seed must not be one that the noise may come from
    return lambda noise, steps: scflow.sample(net, noise, steps, "renoise", generator=fresh.manual_seed(3 * 10**6))


def jumps(net):
    """n jumps of equal length."""

    def sample(noise, steps):
        x, times = noise, torch.linspace(1, 0, steps + 1).tolist()
        for t, s in zip(times, times[1:]):
            with torch.no_grad():
                x = jump(net(x, *(torch.full((len(x),), r) for r in (t, s))), x, t * torch.ones(1), s * torch.ones(1))
        return x

    return sample


# %% [markdown]
# One function for each method: from a lab to a sampler. Its settings are the best of those in `TRIALS` below, at most
# twelve each, on eight Gaussians and the checkerboard in a quarter of the time, by the mean over the steps it can take
# (`results/relatives-tuning.md`, written by `python toy_2d.py bench --tune`).


# %%
def plain(lab, lr=8e-3):
    return euler(lab.fit(scflow.MLP(), flow_matching, "flow matching", lr=lr))


def contrasted(lab, weight=0.1, lr=2e-3):
    return euler(lab.fit(scflow.MLP(), contrastive(weight), "contrastive", lr=lr))


def rectified(lab, count=50_000, steps=10, at_one=0.5, lr=4e-3):
    teacher = lab.teacher()
    draw = lab.pairs(teacher, count, steps)
    return euler(lab.fit(trained_copy(teacher), flow_matching, "flow matching", draw=draw, at_one=at_one, lr=lr))


def regressed(lab, count=50_000, steps=20, lr=8e-3):
    teacher = lab.teacher()
    draw = lab.pairs(teacher, count, steps)
    return euler(lab.fit(trained_copy(teacher), paired, "paired", draw=draw, lr=lr))


def distilled(lab, window=0.05, lr=2e-3):
    teacher = lab.teacher()
    loss = consistency_distillation(teacher, window)
    return renoising(lab.fit(trained_copy(teacher), loss, "consistency distillation", lr=lr))


def consistent(lab, window=0.05, lr=8e-3):
    return renoising(lab.fit(scflow.MLP(), consistency_training(window), "consistency training", lr=lr))


def generated(lab, window=0.05, generated=0.25, lr=4e-3):
    return renoising(lab.fit(scflow.MLP(), consistency_training(window, generated), "generated pairs", lr=lr))


def consistent_velocity(lab, window=0.1, weight=0.1, lr=4e-3):
    return euler(lab.fit(scflow.MLP(), velocity_consistency(window, weight), "velocity consistency", lr=lr))


def bootstrapped(lab, window=0.1, weight=0.3, lr=4e-3):
    loss, teacher = boot, lab.teacher()
    net = lab.fit(scflow.MLP(), loss(teacher, window, weight), "BOOT", lr=lr)
    return lambda noise, steps: noise - net(noise, torch.full((len(noise),), 1e-2)).detach()


def halved(lab, jumping=0.5, halvings=6, lr=4e-3):
    return jumps(lab.fit(TwoTimes(), shortcut(jumping, halvings), "shortcut", lr=lr))


def mapped(lab, diagonal=0.25, lr=8e-3):
    teacher = lab.teacher()
    return jumps(lab.fit(TwoTimes(), flow_map_matching(teacher, diagonal), "flow map matching", lr=lr))


def mean_flowed(lab, jumping=0.75, power=0.0, lr=4e-3):
    return jumps(lab.fit(TwoTimes(), mean_flow(jumping, power), "MeanFlow", lr=lr))


def self_corrected(lab, phases):
    """{phase: its name in `COST`}, by the module itself, for as many updates as the budget holds."""
    teacher, cost = lab.teacher(), sum(phase.steps * COST[name] for phase, name in phases.items())
    phases = scflow.rescale(tuple(phases), lab.left / cost * sum(phase.steps for phase in phases))
    *_, run = scflow.distill(teacher, scflow.PointDiscriminator(), lab.batch, lab.generator, phases)
    lab.updates += run.step
    return euler(run.ema)


def jointly(lab, weight=0.3, tau=0.4, lr=8e-3):
    (phase,) = scflow.SCHEDULES["paper"]
    return self_corrected(lab, {replace(phase, lambda_self=weight, tau=tau, lr=lr): "paper"})


def in_turn(lab, window=0.1, lr=8e-3, at_one=0.5):
    first, last = replace(FIRST, delta=window, lr=lr), replace(LAST, at_one=at_one)
    return self_corrected(lab, {first: "phase 1", last: "phase 2"})


def by_default(lab):
    return self_corrected(lab, {FIRST: "phase 1", LAST: "phase 2"})


METHODS = {  # and the numbers of steps it can take
    "flow matching": (plain, (1, 2, 4, 8)),
    "contrastive flow matching": (contrasted, (1, 2, 4, 8)),
    "2-rectified flow": (rectified, (1, 2, 4, 8)),
    "paired regression": (regressed, (1,)),
    "consistency distillation": (distilled, (1, 2, 4, 8)),
    "consistency training": (consistent, (1, 2, 4, 8)),
    "generated pairs": (generated, (1, 2, 4, 8)),
    "Consistency-FM": (consistent_velocity, (1, 2, 4, 8)),
    "BOOT": (bootstrapped, (1,)),
    "shortcut": (halved, (1, 2, 4, 8)),
    "flow map matching": (mapped, (1, 2, 4, 8)),
    "MeanFlow": (mean_flowed, (1, 2, 4, 8)),
    "self-corrected, jointly": (jointly, (1, 2, 4, 8)),
    (OURS := "two_phase (ours)"): (in_turn, (1, 2, 4, 8)),
    "two_phase, the default": (by_default, (1, 2, 4, 8)),  # chosen in as many trials, but of full length
}


TRIALS = {  # for `python toy_2d.py bench --tune`
    "flow matching": dict(lr=(2e-3, 4e-3, 8e-3)),
    "contrastive flow matching": dict(weight=(0.02, 0.05, 0.1), lr=(2e-3, 4e-3, 8e-3)),
    "2-rectified flow": dict(at_one=(0.1, 0.25, 0.5), steps=(10, 20), lr=(2e-3, 4e-3)),
    "paired regression": dict(count=(50_000, 100_000), steps=(10, 20), lr=(2e-3, 4e-3, 8e-3)),
    "consistency distillation": dict(window=(0.02, 0.05, 0.1, 0.2), lr=(2e-3, 4e-3, 8e-3)),
    "consistency training": dict(window=(0.02, 0.05, 0.1, 0.2), lr=(2e-3, 4e-3, 8e-3)),
    "generated pairs": dict(window=(0.02, 0.05, 0.1), generated=(0.25, 0.5), lr=(2e-3, 4e-3)),
    "Consistency-FM": dict(window=(0.02, 0.05, 0.1), weight=(0.01, 0.1), lr=(2e-3, 4e-3)),
    "BOOT": dict(window=(0.05, 0.1, 0.2), weight=(0.3, 1.0), lr=(2e-3, 4e-3)),
    "shortcut": dict(jumping=(0.125, 0.25, 0.5), halvings=(4, 6), lr=(2e-3, 4e-3)),
    "flow map matching": dict(diagonal=(0.1, 0.25, 0.5, 0.75), lr=(2e-3, 4e-3, 8e-3)),
    "MeanFlow": dict(jumping=(0.25, 0.5, 0.75), power=(0.0, 0.5), lr=(2e-3, 4e-3)),
    "self-corrected, jointly": dict(weight=(0.1, 0.3, 1.0), tau=(0.0, 0.4), lr=(4e-3, 8e-3)),
    OURS: dict(window=(0.02, 0.05, 0.1), lr=(4e-3, 8e-3), at_one=(0.25, 0.5)),
}


def trials(method):
    """The settings of a method that were tried, at most twelve."""
    grid = TRIALS.get(method, {})
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values()) if grid]


def measure(method, name, seed=0, share=1.0, samples=20_000, **settings):
    """Train one method and measure it, as a run's metrics.json does; its sampler takes one evaluation a step."""
    start, lab, (train, counts) = time.process_time(), Lab(name, seed, share), METHODS[method]
    evaluations = [0]

    def count(net, args, output):
        evaluations[0] += len(output) if isinstance(net, scflow.MLP) else 0

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    sampler = train(lab, **settings)
    hook.remove()
    spent = dict(seconds=time.process_time() - start, updates=lab.updates, evaluations=evaluations[0])
    energy, noise = (
        toy_2d.reference(name, samples),
        torch.randn(samples, 2, generator=torch.Generator().manual_seed(seed)),
    )
    samples_by = {n: sampler(noise, n) for n in counts}
    rows = [
        dict(who="student", solver="own", nfe=n, energy=energy(x), gap=scflow.rms_distance(x, samples_by[1])) | spent
        for n, x in samples_by.items()
    ]
    floor, machine = toy_2d.noise_floor(name, samples), toy_2d.machine()
    return dict(dataset=name, seed=seed, share=share, teacher="learned", floor=floor, machine=machine, rows=rows)


def naively(phases):
    """The loop of `scflow.distill` as one would first write it: a pass for every loss, optimisers as they come."""
    for run in scflow.distill(*phases, loss_function=celeba_latent.one_loss_at_a_time):
        if run.step == 1:
            run.opt, run.opt_disc = (torch.optim.AdamW(net.parameters(), 1e-3) for net in (run.student, run.disc))
        yield run


def costs(rounds=10, updates=10):
    """{loss: milliseconds per update}: medians over turns, all losses in one process."""
    lab, teacher = Lab("8gaussians"), scflow.MLP().requires_grad_(False)
    one_time = {
        "flow matching": flow_matching,
        "contrastive": contrastive(0.1),
        "paired": paired,
        "consistency distillation": consistency_distillation(teacher, 0.1),
        "consistency training": consistency_training(0.1),
        "generated pairs": consistency_training(0.1, 0.5),
        "velocity consistency": velocity_consistency(0.1, 0.1),
        "BOOT": boot(teacher, 0.1, 1.0),
    }
    two_times = {
        "shortcut": shortcut(0.5),
        "flow map matching": flow_map_matching(teacher, 0.25),
        "MeanFlow": mean_flow(0.75, 0.0),
    }
    loops = {name: lab.train(scflow.MLP(), loss, 10**6) for name, loss in one_time.items()}
    loops |= {name: lab.train(TwoTimes(), loss, 10**6) for name, loss in two_times.items()}
    for name, phase in PHASES.items():
        setting = teacher, scflow.PointDiscriminator(), lab.batch, lab.generator, (replace(phase, steps=10**6),)
        loops[name], loops[f"{name}, naively"] = scflow.distill(*setting), naively(copy.deepcopy(setting))
    turns = {name: [] for name in loops}
    for i in range(rounds + 1):
        for name in list(loops)[:: 1 - 2 * (i % 2)]:
            start = time.perf_counter()
            for _ in range(updates):
                next(loops[name])
            turns[name].append(1e3 * (time.perf_counter() - start) / updates)
    return {name: sorted(times[1:])[rounds // 2] for name, times in turns.items()}  # the first round warms up


def cost_table(rounds=10):
    """`costs` as lines of Markdown, with naive loops and the floor, the time of a matrix product of as many FLOPs."""
    student, disc, flops = scflow.MLP(), scflow.PointDiscriminator(), {"flow matching": 3 * scflow.MLP().flops()}
    flops |= {name: scflow.distill_flops(student, disc, phase, 0) for name, phase in PHASES.items()}
    milliseconds, rate = costs(rounds), toy_2d.matmul_rate("cpu")
    yield "Milliseconds per update of 512 rows, medians over turns in one process; `naively`: a pass for every loss,"
    yield "and the optimisers as they come; floor: as many FLOPs in a square matrix product. One thread."
    yield from ["", "| loss | ms | × flow matching | counted as | naively / ours | floor / ours |", "|---" * 6 + "|"]
    for name, counted in COST.items():
        if name in milliseconds:
            ms = milliseconds[name]
            slow = f"{milliseconds[f'{name}, naively'] / ms:.2f}" if name in PHASES else ""
            floor = f"{512e3 * flops[name] / rate / ms:.2f}" if name in flops else ""
            ratio = ms / milliseconds["flow matching"]
            yield f"| {name} | {ms:.2f} | {ratio:.2f} | {counted:.2f} | {slow} | {floor} |"


def effort_table(done):
    """What [(method, its `measure`)] took, as lines of Markdown."""
    yield "What a run took: updates; evaluations of the network for one row, in millions; seconds of one busy core."
    yield from ["", "| method | updates | evaluations | s |", "|---" * 4 + "|"]
    for method in dict(done):
        rows = [metrics["rows"][0] for name, metrics in done if name == method]
        median = {k: sorted(r[k] for r in rows)[len(rows) // 2] for k in ("updates", "evaluations", "seconds")}
        yield f"| {method} | {median['updates']} | {median['evaluations'] / 1e6:.3g} | {median['seconds']:.1f} |"


# %% [markdown]
# ## All of them
#
# `python toy_2d.py bench` compares them on four data sets and three seeds, with a quarter and all of the budget.
# Here a sixth of it, on one data set.

# %%
if __name__ == "__main__":  # not where `bench` imports the methods
    found = {method: measure(method, "8gaussians", share=1 / 6, samples=6000) for method in METHODS}
    for method, metrics in found.items():
        values = "".join(f"{1e3 * row['energy']:9.2f}" for row in metrics["rows"])
        print(f"{method:28s}{metrics['rows'][0]['updates']:6d} updates, {metrics['rows'][0]['seconds']:4.1f} s{values}")

# %%
if __name__ == "__main__":
    fig, ax = plt.subplots(figsize=(8, 5.5))
    floor = 1e3 * (metrics["floor"]["mean"] + 2 * metrics["floor"]["sd"])
    ax.axvspan(-1, floor, color="#dddddd", lw=0)
    for n, color, marker in ((1, "#999999", "o"), (2, "#E69F00", "s"), (4, "#009E73", "^"), (8, "#0072B2", "D")):
        for y, metrics in enumerate(found.values()):
            at = [1e3 * row["energy"] for row in metrics["rows"] if row["nfe"] == n]
            ax.plot(at, [y] * len(at), marker, color=color, label=toy_2d.plural(n, "step") if y == 2 else None)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])
    ax.set_yticks(range(len(found)), found)
    ax.set(xlabel="energy distance × 10³", xlim=(-0.5, 2500), ylim=(len(found) - 0.5, -0.5))
    ax.legend(frameon=False)
    plt.tight_layout()
    plt.show()

# %% [markdown]
# *What to see. In so short a time the two rows that learn from a teacher's pairs are ahead in one and two steps: in the
# plane fifty thousand pairs cost as much as five hundred updates, and a straight target is easy. (On pictures a pair
# costs dozens of passes of a large network; and the pairs keep the teacher's error, for only a critic sees the data
# again.) In four and eight steps consistency training leads, which goes back to noise in between. Contrastive flow
# matching differs little from flow matching, as the exercise says. MeanFlow and flow map matching pay for a derivative
# in every update. The self-corrected rows are last to arrive: 170 updates are few for a first phase. With all of the
# time (`results/bench.md`) the last two rows are second only to the pairs in one and two steps, and in eight also to
# shortcut models.*

# %%
if __name__ == "__main__":
    one_step = {method: metrics["rows"][0]["energy"] for method, metrics in found.items()}
    assert set(sorted(one_step, key=one_step.get)[:2]) == {"2-rectified flow", "paired regression"}
    many = {method: [row["energy"] for row in metrics["rows"][2:]] for method, metrics in found.items()}
    best = [min((v[i], method) for method, v in many.items() if v)[1] for i in (0, 1)]
    assert best == 2 * ["consistency training"]  # four and eight steps

# %% [markdown]
# **Exercise.** A large network spends its time in passes: three for each row of an update, one for each evaluation of a
# pair. How many updates of 256 rows do 50,000 pairs of 20 evaluations cost there?


# %%
def updates_for_pairs(pairs, evaluations, rows):
    """Updates that take as many passes as the pairs; an update takes three passes of every row."""
    # your answer
    return pairs * evaluations / (3 * rows)


# %%
assert round(updates_for_pairs(50_000, 20, 256)) == 1302
assert updates_for_pairs(10**6, 100, 256) > 100_000  # a million pairs of fifty Heun steps: longer than the training

# %% [markdown]
# ## What to try next
#
# - Give 2-rectified flow a critic: which of the two errors, the teacher's or its own, does it repair?
# - Take `two_phase` and start its second phase from paired regression instead of consistency.
# - Measure the error at the points in between (`toy_2d.path_error`): who keeps the teacher's map, and who gives it up?
# - `python toy_2d.py bench --methods "MeanFlow,two_phase (ours)" --datasets spirals --shares 0.5,1,2`
