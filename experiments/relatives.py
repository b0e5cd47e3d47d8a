"""What else the same time buys: the method's relatives, each a few lines from its paper.

    python -m experiments.relatives                       all methods, four data sets, three seeds
    python -m experiments.relatives --methods MeanFlow shortcut --datasets spirals --share 2
    python -m experiments.relatives --costs               what an update of each loss takes on this machine
    python -m experiments.relatives --tune --seeds 100 --datasets 8gaussians checkerboard --out results/tuned

Every method trains the same perceptron with the same loop, in the time of the default run of toy_2d.py. From this
time it also pays for its teacher and its pairs. Time is counted in updates of flow matching (see `COST`), so that
other work on the machine changes nothing.
"""

import inspect
import itertools
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import jvp

import scflow
import toy_2d
from experiments import common
from scflow import interpolate, predict_x0, pseudo_huber, require, squared

# ═══ 1. The losses ════════════════════════════════════════════════════════════════════════
# loss(lab, x0, x1, t) for pairs x₀, x₁ (B,2) and times t (B,). `lab` has .net, which is trained; .average, its fast
# average, asked where no gradient should go; .teacher; .critic or .fake, if the loss trains one; .generator;
# and .progress, the share of the updates that is done.
#
# What does the network say? A velocity v(x,t); or where the path ends, f(x,t) = x − t·v(x,t); or a jump from t to s,
# X(x,t,s) = x − (t−s)·u(x,t,s), where u is the average velocity in between.


def flow_matching(lab, x0, x1, t):
    """Flow matching (Lipman et al., 2023; Liu et al., 2023): regress on x₁ − x₀."""
    v = lab.net(interpolate(x0, x1, t), t)
    return scflow.flow_matching_loss(v, x0, x1)


def contrastive(lab, x0, x1, t, weight):
    """Contrastive flow matching (Stoica et al., 2025): and move away from the velocity of another pair."""
    v = lab.net(interpolate(x0, x1, t), t)
    other = torch.randperm(len(t), generator=lab.generator)
    near = scflow.flow_matching_loss(v, x0, x1)
    far = scflow.flow_matching_loss(v, x0[other], x1[other])
    return near - weight * far


def paired_regression(lab, x0, x1, t):
    """Knowledge distillation (Luhman & Luhman, 2021): x₀ is what the teacher makes of x₁; get there in one step."""
    one = torch.ones_like(t)
    return pseudo_huber(predict_x0(lab.net, x1, one), x0)


def earlier(lab, t, window):
    """s = t − U(0, min(t,window)), (B,)."""
    return t - scflow.rand_times(t, lab.generator) * t.clamp(max=window)


def consistency_distillation(lab, x0, x1, t, window):
    """Consistency distillation (Song et al., 2023): from two points of a teacher's path, a Heun step apart, one end."""
    s = earlier(lab, t, window)
    xt = interpolate(x0, x1, t)
    with torch.no_grad():  # a target is a constant, here and below
        xs = scflow.follow(lab.teacher, xt, t, s, "heun")
        target = predict_x0(lab.average, xs, s)
    return pseudo_huber(predict_x0(lab.net, xt, t), target)


def consistency_training(lab, x0, x1, t, window):
    """Consistency training (Song et al., 2023): there is no teacher; both points lie on the line of the pair."""
    s = earlier(lab, t, window)
    xt = interpolate(x0, x1, t)
    xs = interpolate(x0, x1, s)
    with torch.no_grad():
        target = predict_x0(lab.average, xs, s)
    return pseudo_huber(predict_x0(lab.net, xt, t), target)


def generated_pairs(lab, x0, x1, t, window, own):
    """Generator-augmented flows (Issenhuth et al., 2024): a share `own` of the lines end in the network's answer."""
    n = round(own * len(t))
    xt = interpolate(x0[:n], x1[:n], t[:n])
    with torch.no_grad():
        answer = predict_x0(lab.average, xt, t[:n])
    x0 = torch.cat([answer, x0[n:]])
    return consistency_training(lab, x0, x1, t, window)


def velocity_consistency(lab, x0, x1, t, window, weight):
    """Consistency-FM (Yang et al., 2024): consistency training, and the velocities agree as well."""
    s = earlier(lab, t, window)
    xt = interpolate(x0, x1, t)
    xs = interpolate(x0, x1, s)
    v_t = lab.net(xt, t)
    with torch.no_grad():
        v_s = lab.average(xs, s)
    f_t = xt - t[:, None] * v_t
    f_s = xs - s[:, None] * v_s
    return pseudo_huber(f_t, f_s) + weight * squared(v_t, v_s)


def boot_step(y, f, t, s):
    """y at s from y at t, along dy/dt = (y − f)/(t(1−t)), for a constant guess f of the teacher."""
    ratio = s * (1 - t) / (t * (1 - s)).clamp(min=1e-6)
    return f + ratio[:, None] * (y - f)


def boot(lab, x0, x1, t, window, weight):
    """BOOT (Gu et al., 2023): from noise alone; it never sees data.

    It learns y(x₁,t) = (x_t − t·x₁)/(1−t), the part of x_t that is not noise: the teacher's guess at t = 1, the
    sample at t = 0. Here y = x₁ − net(x₁,t).
    """
    t = t.clamp(0.01, 0.99)
    s = earlier(lab, t, window)
    one = torch.ones_like(t)
    with torch.no_grad():
        y_t = x1 - lab.average(x1, t)
        xt = interpolate(y_t, x1, t)
        guess = predict_x0(lab.teacher, xt, t)
        target = boot_step(y_t, guess, t, s)
        first = predict_x0(lab.teacher, x1, one)
    y_s = x1 - lab.net(x1, s)
    y_1 = x1 - lab.net(x1, one)
    return squared(y_s, target) + weight * squared(y_1, first)


def score_identity(lab, x0, x1, t, alpha):
    """Score identity distillation (Zhou et al., 2024): one step, from a teacher alone; it never sees data.

    A second network is trained here, too: it learns the student's samples as a teacher learns data. If it agrees with
    the teacher everywhere, the samples are distributed as the teacher's.
    """
    x0_hat = predict_x0(lab.net, x1, torch.ones_like(t))
    fresh = scflow.randn_like(x1, lab.generator)
    own = interpolate(x0_hat.detach(), fresh, t)
    fitting = scflow.flow_matching_loss(lab.fake(own, t), x0_hat.detach(), fresh)
    lab.opt_fake.zero_grad()
    fitting.backward()
    lab.opt_fake.step()

    t = t.clamp(0.02, 0.98)
    xt = interpolate(x0_hat, fresh, t)
    real = predict_x0(lab.teacher, xt, t)
    fake = predict_x0(lab.fake, xt, t)
    apart = real - fake
    size = (x0_hat - real).abs().sum(1, keepdim=True).detach() + 1e-3  # far from the data all errors are large
    return ((apart * (real - x0_hat) - alpha * apart.square()) / size).mean()


class TwoTimes(scflow.MLP):
    """u(x,t,s): the same perceptron with one more time. u(x,t,t) is the velocity."""

    def __init__(self):
        super().__init__()
        first = self.layers[0]
        self.layers[0] = nn.Linear(first.in_features + 2 * len(self.t_freqs), first.out_features)

    def forward(self, x, t, s):
        """Average velocity (B,2) from times t to times s (B,)."""
        a = (x[..., None] * self.x_freqs).flatten(1)
        b = t[:, None] * self.t_freqs
        c = s[:, None] * self.t_freqs
        angles = torch.cat([a, b, c], 1)
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], 1))


def jump(u, x, t, s):
    """X(x,t,s), given the average velocity u (B,2) itself."""
    return x - (t - s)[:, None] * u


def half_jumps(u, x, t, d, shortest=0.0):
    """The average velocity of two jumps of d/2 (B,) from t. A jump of `shortest` or less goes by the velocity."""
    half = d / 2
    asked = torch.where(half <= shortest, 0 * half, half)
    first = u(x, t, t - asked)
    middle = jump(first, x, t, t - half)
    second = u(middle, t - half, t - half - asked)
    return (first + second) / 2


def shortcut(lab, x0, x1, t, jumping, halvings):
    """Shortcut models (Frans et al., 2025): a jump is two half jumps. Other rows learn flow matching."""
    n = round(jumping * len(t))
    d = 0.5 ** torch.randint(halvings, (n,), generator=lab.generator)
    place = torch.rand(n, generator=lab.generator) / d
    start = 1 - d * place.floor()  # a multiple of d from the noise
    t = torch.cat([start, t[n:]])
    s = torch.cat([start - d, t[n:]])
    xt = interpolate(x0, x1, t)
    with torch.no_grad():
        jumps = half_jumps(lab.average, xt[:n], start, d, 0.5**halvings)
    target = torch.cat([jumps, (x1 - x0)[n:]])
    return squared(lab.net(xt, t, s), target)


def lagrangian_residual(u, velocity, x, t, s):
    """∂ₛX(x,t,s) − v(X,s): the point where a jump lands moves with the velocity there."""

    def average(s):
        return u(x, t, s)

    u_s, slope = jvp(average, (s,), (torch.ones_like(s),))
    moving = u_s - (t - s)[:, None] * slope
    return moving - velocity(jump(u_s, x, t, s), s)


def flow_map_matching(lab, x0, x1, t, diagonal):
    """Flow map matching (Boffi et al., 2024), the Lagrangian form. A share `diagonal` of the rows has s = t."""
    s = t * scflow.rand_times(t, lab.generator)
    n = round(diagonal * len(t))
    s[:n] = t[:n]
    xt = interpolate(x0, x1, t)
    return lagrangian_residual(lab.net, lab.teacher, xt, t, s).square().mean()


def lagrangian_self_distillation(lab, x0, x1, t, diagonal):
    """Lagrangian self-distillation (Boffi et al., 2025): the same without a teacher, whose part u(x,t,t) plays."""
    s = t * scflow.rand_times(t, lab.generator)
    n = round(diagonal * len(t))
    xt = interpolate(x0, x1, t)
    v = lab.net(xt[:n], t[:n], t[:n])
    flow = scflow.flow_matching_loss(v, x0[:n], x1[:n])

    def own_velocity(x, s):
        with torch.no_grad():  # the target is a constant
            return lab.net(x, s, s)

    residual = lagrangian_residual(lab.net, own_velocity, xt[n:], t[n:], s[n:])
    return flow + residual.square().mean()


def average_and_rate(u, velocity, x, t, s):
    """u(x,t,s) and du/dt, both (B,2), where x moves with a velocity (B,2) and s stays."""

    def average(x, t):
        return u(x, t, s)

    return jvp(average, (x, t), (velocity, torch.ones_like(t)))


def jump_ends(lab, t, jumping):
    """s below t in a share `jumping` of the rows; in the others s = t, where u is the velocity."""
    s = t * scflow.rand_times(t, lab.generator)
    n = round(jumping * len(t))
    s[n:] = t[n:]
    return s


def sliding_loss(u, rate, v, t, s, power):
    """‖u − (v − (t−s)·du/dt)‖², since d/dt [(t−s)·u] = v. Each row is divided by its value to the `power`."""
    target = v - (t - s)[:, None] * rate
    error = (u - target.detach()).square().sum(1)
    weight = (error.detach() + 1e-3) ** -power  # large errors count less
    return (weight * error).mean()


def mean_flow(lab, x0, x1, t, jumping, power):
    """MeanFlow (Geng et al., 2025): the start of a jump slides along the line of the pair."""
    s = jump_ends(lab, t, jumping)
    xt = interpolate(x0, x1, t)
    v = x1 - x0
    u, rate = average_and_rate(lab.net, v, xt, t, s)
    return sliding_loss(u, rate, v, t, s, power)


def improved_mean_flow(lab, x0, x1, t, jumping, power):
    """Improved MeanFlow (Geng et al., 2025): the start slides with the network's own velocity u(x,t,t)."""
    s = jump_ends(lab, t, jumping)
    xt = interpolate(x0, x1, t)
    with torch.no_grad():
        own = lab.net(xt, t, t)
    u, rate = average_and_rate(lab.net, own, xt, t, s)
    return sliding_loss(u, rate, x1 - x0, t, s, power)


def align_your_flow(lab, x0, x1, t, jumping, power):
    """Align Your Flow (Sabour et al., 2025), the Eulerian form: the start slides along a teacher's path."""
    s = jump_ends(lab, t, jumping)
    xt = interpolate(x0, x1, t)
    with torch.no_grad():
        v = lab.teacher(xt, t)
    u, rate = average_and_rate(lab.net, v, xt, t, s)
    return sliding_loss(u, rate, v, t, s, power)


def adversarial_flow(lab, x0, x1, t, transport, r1):
    """Adversarial flow (Lin et al., 2025): one step, judged by a critic; and not far from the noise, at first.

    The critic is trained here, too.
    """
    x0_hat = predict_x0(lab.net, x1, torch.ones_like(t))
    real = lab.critic(x0)
    fake = lab.critic(x0_hat.detach())
    verdict = scflow.critic_loss(real, fake, "softplus") + r1 * scflow.r1_penalty(lab.critic, x0)
    lab.opt_critic.zero_grad()
    verdict.backward()
    lab.opt_critic.step()

    weight = transport * (1 - lab.progress)
    return scflow.adversarial_loss(lab.critic(x0_hat), "softplus") + weight * squared(x0_hat, x1)


# ═══ 2. The time, and the loop ════════════════════════════════════════════════════════════

OF_TWO_TIMES = (
    shortcut,
    flow_map_matching,
    lagrangian_self_distillation,
    align_your_flow,
    mean_flow,
    improved_mean_flow,
)

# What one update takes, in updates of flow matching. `--costs` measures it again.
COST = {
    "flow_matching": 1.0,
    "contrastive": 1.05,
    "paired_regression": 1.0,
    "consistency_distillation": 1.85,
    "consistency_training": 1.35,
    "generated_pairs": 1.5,
    "velocity_consistency": 1.4,
    "boot": 2.5,
    "shortcut": 1.45,
    "flow_map_matching": 3.6,
    "lagrangian_self_distillation": 2.9,
    "align_your_flow": 2.75,
    "mean_flow": 2.55,
    "improved_mean_flow": 2.7,
    "adversarial_flow": 2.8,
    "score_identity": 3.3,
    "phase_1": 1.65,
    "phase_2": 2.25,
    "paper": 4.8,
    "thousand_samples": 0.5,  # one evaluation each, without gradient
}
ROWS = 512  # of an update, but for the phases of scflow
(PAPER,) = scflow.SCHEDULES["paper"]
FIRST, LAST = scflow.SCHEDULES["two_phase"]
TEACHER = scflow.TeacherSettings()
BUDGET = TEACHER.teacher_steps + FIRST.steps * COST["phase_1"] + LAST.steps * COST["phase_2"]


class Lab:
    """One data set, one seed, and a share of the default run's time; `left` of it is not spent yet."""

    def __init__(self, dataset: str, seed: int = 0, share: float = 1.0):
        torch.manual_seed(seed)
        self.data = toy_2d.dataset(dataset)
        self.generator = torch.Generator().manual_seed(seed)
        self.share = share
        self.left = share * BUDGET
        self.updates = 0
        self.progress = 0.0
        self.teacher = None

    def draw(self, n):
        """Data and noise, drawn apart: x₀, x₁ (n,2)."""
        x0, _ = self.data.sample(n, self.generator)
        x1 = torch.randn(n, 2, generator=self.generator)
        return x0, x1

    def train(self, net, loss, updates, lr, draw=None, pinned=0.0, **options):
        """The loop of every method but the self-corrected ones; yields after each update.

        draw    where the pairs come from, if not from `self.draw`.
        pinned  share of the rows whose t is 1.
        """
        draw = draw or self.draw
        self.net = net
        self.average = scflow.clone(net)
        self.slow = scflow.clone(net)  # the network to sample with
        opt = scflow.adamw(net, lr)
        for i in range(updates):
            scflow.set_lr(opt, lr * scflow.lr_factor(i, updates))
            x0, x1 = draw(ROWS)
            t = scflow.rand_times(x0, self.generator)
            t[: round(pinned * ROWS)] = 1
            self.progress = i / updates
            value = loss(self, x0, x1, t, **options)
            if not value.isfinite():
                raise FloatingPointError(f"the loss became {value.item()} in update {i + 1}")
            opt.zero_grad()
            value.backward()
            opt.step()
            scflow.ema_update(self.average, net, 0.9)
            scflow.ema_update(self.slow, net, scflow.growing(i, 0.9999))
            self.updates += 1
            yield self

    def fit(self, net, loss, lr, **options):
        """Train `net` for the time that is left; returns its average."""
        updates = int(self.left / COST[loss.__name__])
        for _ in self.train(net, loss, updates, lr, **options):
            pass
        return self.slow

    def fit_teacher(self):
        """Train the teacher of the default run, and pay for it."""
        settings = replace(TEACHER, teacher_steps=round(self.share * TEACHER.teacher_steps))
        batch = toy_2d.batches(self.data)
        for run in scflow.train_teacher(scflow.MLP(), batch, self.generator, settings):
            self.updates = run.step
        self.teacher = scflow.clone(run.ema)
        self.left -= self.updates

    def use_critic(self, lr):
        """Give the lab a critic, for losses that train one."""
        self.critic = scflow.PointCritic()
        self.opt_critic = scflow.adamw(self.critic, lr, betas=(0.5, 0.99))

    def use_fake(self, lr):
        """Give the lab a second network that starts as the teacher, for a loss that trains one."""
        self.fake = self.from_teacher()
        self.opt_fake = scflow.adamw(self.fake, lr)

    def from_teacher(self):
        """A network that starts as the teacher."""
        return scflow.clone(self.teacher).requires_grad_(True)

    def pairs(self, count, steps):
        """Make pairs (x̂₀,x₁) by so many Heun steps of the teacher, and pay; returns the function that draws them."""
        count = round(self.share * count)
        x1 = torch.randn(count, 2, generator=self.generator)
        parts = [scflow.sample(self.teacher, part, steps, "heun") for part in x1.split(1000)]
        x0 = torch.cat(parts)
        self.left -= COST["thousand_samples"] * count / 1000 * scflow.nfe(steps, "heun")

        def draw(n):
            row = torch.randint(count, (n,), generator=self.generator)
            return x0[row], x1[row]

        return draw

    def distill(self, phases):
        """`scflow.distill` in the time that is left, for phases {name in COST: Phase}; returns the average."""
        self.fit_teacher()
        schedule = tuple(phases.values())
        steps = sum(phase.steps for phase in schedule)
        cost = sum(phase.steps * COST[name] for name, phase in phases.items())
        schedule = scflow.rescale(schedule, steps * self.left / cost)
        batch = toy_2d.batches(self.data)
        before = self.updates
        for run in scflow.distill(self.teacher, scflow.PointCritic(), batch, self.generator, schedule):
            self.updates = before + run.step
        return run.ema


# ═══ 3. The samplers: (net, noise (n,2), steps) → samples ═════════════════════════════════


def renoised(net, noise, steps):
    """Consistency models take more steps by going back to noise."""
    fresh = torch.Generator().manual_seed(3 * 10**6)  # no seed that the noise may have
    return scflow.sample(net, noise, steps, "renoise", generator=fresh)


@torch.no_grad()  # a sampler never trains anything
def jumped(net, noise, steps):
    """So many jumps of equal length."""
    x = noise
    times = torch.linspace(1, 0, steps + 1)
    for i in range(steps):
        t = times[i].expand(len(x))
        s = times[i + 1].expand(len(x))
        x = jump(net(x, t, s), x, t, s)
    return x


@torch.no_grad()  # as above
def booted(net, noise, steps):
    """BOOT knows one step only."""
    t = torch.full((len(noise),), 0.01)
    return noise - net(noise, t)


# ═══ 4. The methods: lab → sampler (noise, steps) ═════════════════════════════════════════
# The settings are the best of TRIALS: on eight Gaussians and the checkerboard, in the whole time, seed 100, by the mean
# over all numbers of steps (results/tuned.md). Ours stays at its default: 0.131, and the best trial 0.127.


def plain(lab, lr=8e-3):
    net = lab.fit(scflow.MLP(), flow_matching, lr)
    return partial(scflow.sample, net)


def contrasted(lab, weight=0.2, lr=2e-3):
    net = lab.fit(scflow.MLP(), contrastive, lr, weight=weight)
    return partial(scflow.sample, net)


def rectified(lab, pinned=0.75, lr=1.6e-2):
    """2-rectified flow (Liu et al., 2023): flow matching again, on a teacher's pairs, whose lines hardly cross."""
    lab.fit_teacher()
    draw = lab.pairs(50_000, 10)
    net = lab.fit(lab.from_teacher(), flow_matching, lr, draw=draw, pinned=pinned)
    return partial(scflow.sample, net)


def regressed(lab, steps=20, lr=1.6e-2):
    lab.fit_teacher()
    draw = lab.pairs(50_000, steps)
    net = lab.fit(lab.from_teacher(), paired_regression, lr, draw=draw)
    return partial(scflow.sample, net)


def distilled(lab, window=0.1, lr=8e-3):
    lab.fit_teacher()
    net = lab.fit(lab.from_teacher(), consistency_distillation, lr, window=window)
    return partial(renoised, net)


def consistent(lab, window=0.05, lr=1.6e-2):
    net = lab.fit(scflow.MLP(), consistency_training, lr, window=window)
    return partial(renoised, net)


def generated(lab, window=0.05, own=0.25, lr=4e-3):
    net = lab.fit(scflow.MLP(), generated_pairs, lr, window=window, own=own)
    return partial(renoised, net)


def consistent_velocity(lab, window=0.1, weight=0.1, lr=8e-3):
    net = lab.fit(scflow.MLP(), velocity_consistency, lr, window=window, weight=weight)
    return partial(scflow.sample, net)


def bootstrapped(lab, window=0.05, lr=8e-3):
    lab.fit_teacher()
    net = lab.fit(scflow.MLP(), boot, lr, window=window, weight=0.3)
    return partial(booted, net)


def identified(lab, alpha=1.0, lr=1e-3):
    lab.fit_teacher()
    lab.use_fake(lr)
    net = lab.fit(scflow.MLP(), score_identity, lr, alpha=alpha)
    return partial(scflow.sample, net)


def halved(lab, jumping=0.5, halvings=6, lr=8e-3):
    net = lab.fit(TwoTimes(), shortcut, lr, jumping=jumping, halvings=halvings)
    return partial(jumped, net)


def mapped(lab, diagonal=0.5, lr=4e-3):
    lab.fit_teacher()
    net = lab.fit(TwoTimes(), flow_map_matching, lr, diagonal=diagonal)
    return partial(jumped, net)


def mapped_alone(lab, diagonal=0.75, lr=8e-3):
    net = lab.fit(TwoTimes(), lagrangian_self_distillation, lr, diagonal=diagonal)
    return partial(jumped, net)


def aligned(lab, jumping=0.75, power=0.0, lr=8e-3):
    lab.fit_teacher()
    net = lab.fit(TwoTimes(), align_your_flow, lr, jumping=jumping, power=power)
    return partial(jumped, net)


def averaged(lab, jumping=0.75, power=0.0, lr=4e-3):
    net = lab.fit(TwoTimes(), mean_flow, lr, jumping=jumping, power=power)
    return partial(jumped, net)


def averaged_anew(lab, jumping=0.75, power=0.0, lr=4e-3):
    net = lab.fit(TwoTimes(), improved_mean_flow, lr, jumping=jumping, power=power)
    return partial(jumped, net)


def averaged_on_pairs(lab, jumping=0.75, power=0.0, lr=8e-3):
    """Re-MeanFlow (Zhang et al., 2025): MeanFlow on a teacher's pairs, whose lines hardly cross."""
    lab.fit_teacher()
    draw = lab.pairs(50_000, 10)
    net = lab.fit(TwoTimes(), mean_flow, lr, draw=draw, jumping=jumping, power=power)
    return partial(jumped, net)


def adversarial(lab, transport=0.1, r1=0.1, lr=4e-3):
    lab.use_critic(lr)
    net = lab.fit(scflow.MLP(), adversarial_flow, lr, transport=transport, r1=r1)
    return partial(scflow.sample, net)


def jointly(lab, weight=1.0, tau=0.4, lr=4e-3):
    """The paper's four losses together (Dao et al., 2025)."""
    net = lab.distill({"paper": replace(PAPER, lambda_self=weight, tau=tau, lr=lr)})
    return partial(scflow.sample, net)


def ours(lab, window=0.5, lr=1.6e-2, pinned=0.75):
    """This project's schedule."""
    first = replace(FIRST, delta=window, lr=lr)
    last = replace(LAST, pinned=pinned)
    net = lab.distill({"phase_1": first, "phase_2": last})
    return partial(scflow.sample, net)


OURS = "two_phase (ours)"
FAMILIES = {  # by what the network says, and who tells it
    "a velocity": {
        "flow matching": plain,
        "contrastive flow matching": contrasted,
    },
    "from a teacher's pairs": {
        "2-rectified flow": rectified,
        "paired regression": regressed,
        "Re-MeanFlow": averaged_on_pairs,
    },
    "where a path ends": {
        "consistency distillation": distilled,
        "consistency training": consistent,
        "generated pairs": generated,
        "Consistency-FM": consistent_velocity,
        "BOOT": bootstrapped,
        "adversarial flow": adversarial,
        "SiD": identified,
    },
    "jumps": {
        "shortcut": halved,
        "flow map matching": mapped,
        "Lagrangian self-distillation": mapped_alone,
        "Align Your Flow": aligned,
        "MeanFlow": averaged,
        "improved MeanFlow": averaged_anew,
    },
    "self-corrected": {
        "self-corrected, jointly": jointly,
        OURS: ours,
    },
}
METHODS = {name: method for family in FAMILIES.values() for name, method in family.items()}
ONE_STEP = ("paired regression", "BOOT", "adversarial flow", "SiD")  # the others are measured in 1, 2, 4 and 8 steps

# What `--tune` tries: at most twelve settings of each method.
TRIALS = {
    "flow matching": {"lr": (2e-3, 4e-3, 8e-3)},
    "contrastive flow matching": {"weight": (0.1, 0.2), "lr": (2e-3, 4e-3, 8e-3)},
    "2-rectified flow": {"pinned": (0.25, 0.5, 0.75), "lr": (4e-3, 8e-3, 1.6e-2)},
    "paired regression": {"steps": (10, 20), "lr": (4e-3, 8e-3, 1.6e-2)},
    "consistency distillation": {"window": (0.05, 0.1, 0.2), "lr": (2e-3, 4e-3, 8e-3)},
    "consistency training": {"window": (0.05, 0.1, 0.2), "lr": (4e-3, 8e-3, 1.6e-2)},
    "generated pairs": {"window": (0.05, 0.1), "own": (0.25, 0.5), "lr": (4e-3, 8e-3)},
    "Consistency-FM": {"window": (0.05, 0.1), "weight": (0.01, 0.1), "lr": (4e-3, 8e-3)},
    "BOOT": {"window": (0.05, 0.1, 0.2), "lr": (4e-3, 8e-3)},
    "shortcut": {"jumping": (0.25, 0.5), "halvings": (4, 6), "lr": (4e-3, 8e-3)},
    "flow map matching": {"diagonal": (0.25, 0.5), "lr": (4e-3, 8e-3, 1.6e-2)},
    "Lagrangian self-distillation": {"diagonal": (0.25, 0.5, 0.75), "lr": (4e-3, 8e-3)},
    "Align Your Flow": {"jumping": (0.5, 0.75), "power": (0.0, 0.5), "lr": (4e-3, 8e-3)},
    "MeanFlow": {"jumping": (0.5, 0.75), "power": (0.0, 0.5), "lr": (4e-3, 8e-3)},
    "improved MeanFlow": {"jumping": (0.5, 0.75), "power": (0.0, 0.5), "lr": (4e-3, 8e-3)},
    "Re-MeanFlow": {"jumping": (0.5, 0.75), "power": (0.0, 0.5), "lr": (4e-3, 8e-3)},
    "SiD": {"alpha": (0.5, 1.0, 1.2), "lr": (1e-3, 2e-3, 4e-3)},
    "adversarial flow": {"transport": (0.1, 1.0), "r1": (0.1, 1.0), "lr": (1e-3, 2e-3, 4e-3)},
    "self-corrected, jointly": {"weight": (0.3, 1.0), "tau": (0.0, 0.4), "lr": (4e-3, 8e-3)},
    OURS: {"window": (0.5, 1.0), "lr": (8e-3, 1.6e-2, 3.2e-2), "pinned": (0.5, 0.75)},
}


def trials(method: str) -> list[dict]:
    """Every combination of the settings that were tried; one without settings if there are none."""
    found = [{}]
    for name, values in TRIALS.get(method, {}).items():
        found = [{**trial, name: value} for trial in found for value in values]
    return found


# ═══ 5. One run ═══════════════════════════════════════════════════════════════════════════


def measure(method: str, dataset: str, seed: int, share: float, samples: int, settings: dict) -> dict:
    """Train a method and measure its sampler, which takes one evaluation of the network a step.

    settings  instead of the chosen ones.
    Returns what common.Results takes: the measures, or the "failure" of a run that diverged.
    """
    metrics = {"dataset": dataset, "seed": seed, "share": share}
    start = time.process_time()
    lab = Lab(dataset, seed, share)
    try:
        sampler = METHODS[method](lab, **settings)
    except FloatingPointError as error:
        return {**metrics, "failure": str(error)}
    seconds = time.process_time() - start

    noise = torch.randn(samples, 2, generator=torch.Generator().manual_seed(2 * 10**6 + seed))
    energy = toy_2d.reference(dataset, samples)
    one_step = sampler(noise, 1)
    rows = []
    for steps in (1,) if method in ONE_STEP else (1, 2, 4, 8):
        x = sampler(noise, steps)
        row = {"solver": "own", "nfe": steps, "energy": energy(x), "gap": toy_2d.rms_distance(x, one_step)}
        if isinstance(lab.data, toy_2d.GaussianMixture):
            _, row["precision"] = toy_2d.coverage_and_precision(x, lab.data)
        rows.append({**row, "updates": lab.updates, "seconds": seconds})
    floor = toy_2d.floor_of(dataset, samples)
    return {**metrics, "floor": floor, "machine": toy_2d.machine(), "rows": rows}


# ═══ 6. What an update takes ══════════════════════════════════════════════════════════════


def training_loops() -> dict:
    """{name in COST: an endless loop that makes one update each time it is asked}."""
    losses = {
        flow_matching: {},
        contrastive: {"weight": 0.1},
        paired_regression: {},
        consistency_distillation: {"window": 0.1},
        consistency_training: {"window": 0.1},
        generated_pairs: {"window": 0.1, "own": 0.5},
        velocity_consistency: {"window": 0.1, "weight": 0.1},
        boot: {"window": 0.1, "weight": 1.0},
        shortcut: {"jumping": 0.5, "halvings": 6},
        flow_map_matching: {"diagonal": 0.25},
        lagrangian_self_distillation: {"diagonal": 0.5},
        align_your_flow: {"jumping": 0.75, "power": 0.0},
        mean_flow: {"jumping": 0.75, "power": 0.0},
        improved_mean_flow: {"jumping": 0.75, "power": 0.0},
        adversarial_flow: {"transport": 0.1, "r1": 0.1},
        score_identity: {"alpha": 1.0},
    }
    teacher = scflow.MLP().requires_grad_(False)
    loops = {}
    for loss, options in losses.items():
        lab = Lab("8gaussians")
        lab.teacher = teacher
        lab.use_critic(4e-3)
        lab.use_fake(4e-3)
        net = TwoTimes() if loss in OF_TWO_TIMES else scflow.MLP()
        loops[loss.__name__] = lab.train(net, loss, 10**6, 4e-3, **options)
    last = replace(LAST, self_source="ema")  # costs the same as "frozen", which no first phase may have
    for name, phase in {"phase_1": FIRST, "phase_2": last, "paper": PAPER}.items():
        lab = Lab("8gaussians")
        batch = toy_2d.batches(lab.data)
        schedule = (replace(phase, steps=10**6),)
        loops[name] = scflow.distill(teacher, scflow.PointCritic(), batch, lab.generator, schedule)
    loops["thousand_samples"] = sampling_loop(teacher)
    return loops


def sampling_loop(net):
    """A thousand evaluations without gradient, each time it is asked."""
    while True:
        yield scflow.sample(net, torch.randn(1000, 2))


def cost_table(rounds: int, updates: int = 10) -> list[str]:
    """Measure all losses in turns, in one process; lines of Markdown."""
    loops = training_loops()
    turns = {name: [] for name in loops}
    for _ in range(rounds + 1):
        for name, loop in loops.items():
            start = time.process_time()
            for _ in range(updates):
                next(loop)
            turns[name].append(1e3 * (time.process_time() - start) / updates)
    unit = np.median(turns["flow_matching"][1:])  # the first turn warms up
    rows = []
    for name, times in turns.items():
        ms = np.median(times[1:])
        rows.append([name, f"{ms:.2f}", f"{ms / unit:.2f}", f"{COST[name]:.2f}"])
    legend = (
        f"Milliseconds of one processor for an update: of {ROWS} rows, or a phase's own. Medians of {rounds} turns."
    )
    return [legend, "", *common.markdown(["loss", "ms", "× flow matching", "counted as"], rows)]


# ═══ 7. The program ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Relatives:
    """What is compared."""

    methods: tuple = ("all",)  # methods by name, in quotes where it has spaces, or all
    datasets: tuple = ("8gaussians", "25gaussians", "checkerboard", "spirals")  # data sets by name, or all
    seeds: tuple = (0, 1, 2)  # seeds
    share: float = 1.0  # part of the default run's time that each method gets
    samples: int = 20000  # points in the evaluation
    quick: bool = False  # one data set and seed, a quarter of the time, 6000 samples, into runs/quick
    tune: bool = False  # every setting in TRIALS, instead of the chosen ones
    costs: bool = False  # only measure what an update of each loss takes, and print it
    rounds: int = 10  # turns in which that is measured
    workers: int = os.cpu_count() or 1  # runs side by side, one thread each
    runs: str = "runs/relatives"  # folder of the finished runs, which are read back
    out: str = "results/relatives"  # path of the results, without .md, .csv and .png

    def __post_init__(self):
        common.check_values(self, "methods", "datasets", "seeds")
        for method in self.methods:
            known = method == "all" or method in METHODS
            require(known, f"no method {method!r}: there are {'; '.join(METHODS)}")
        require(self.rounds >= 1, f"rounds must be at least 1, not {self.rounds}")
        common.check_run(self, 50)


QUICK = {"datasets": ["8gaussians"], "seeds": [0], "share": 0.25, "samples": 6000, "out": "runs/quick"}


def cell_path(runs: str, cell: dict) -> Path:
    """The file of a run. Everything that it depends on is in its name."""
    chosen = str(inspect.signature(METHODS[cell["method"]]))
    mark = common.fingerprint(cell, chosen, COST, TEACHER, scflow.SCHEDULES)
    name = common.slug(cell["method"], cell["dataset"], cell["seed"], cell["share"], mark)
    return Path(runs, f"{name}.json")


def effort_table(results: common.Results) -> list[str]:
    """What a run of each method took, as lines of Markdown."""
    rows = []
    for method in results.rows:
        runs = results.by_place[method, "own", 1]
        updates = np.median([run["updates"] for run in runs])
        seconds = np.median([run["seconds"] for run in runs])
        rows.append([method, f"{updates:.0f}", f"{seconds:.1f}"])
    legend = "What a run took: updates, the teacher's included, and seconds of one processor; medians."
    return [legend, "", *common.markdown(["method", "updates", "s"], rows)]


LEGEND = """Energy distance ×10³ by evaluations of the network in sampling. Gap: RMS from one-step to last sample.
On mixtures, of one step: the share within 3σ of a mode (of the truth: 98.9%)."""


def relatives_command(argv: list[str]) -> None:
    """Give each relative of the method the time of the default run of toy_2d.py, and measure it."""
    settings = common.settings_of(argv, relatives_command.__doc__, Relatives(), QUICK)
    torch.set_num_threads(1)
    if settings.costs:
        print("\n".join(cost_table(settings.rounds)))
        return

    datasets = common.dataset_names(settings.datasets)
    methods = list(METHODS) if "all" in settings.methods else settings.methods
    compared = {}  # {row: the row it is compared with}
    rows = []  # that of each cell
    cells = []
    for method in methods:
        for trial in trials(method) if settings.tune else [{}]:
            row = " ".join([method, *(f"{name} {value:g}" for name, value in trial.items())])
            compared[row] = "" if settings.tune or method == OURS else OURS
            for dataset, seed in itertools.product(datasets, settings.seeds):
                cell = {"method": method, "dataset": dataset, "seed": seed, "share": settings.share}
                cells.append({**cell, "samples": settings.samples, "settings": trial})
                rows.append(row)
    common.open_out(settings.out)
    costs = cost_table(settings.rounds)
    paths = [cell_path(settings.runs, cell) for cell in cells]
    found = common.run_cells(measure, cells, paths, settings.workers)

    results = common.Results(compared, list(zip(rows, found)), "own")
    toy_2d.write_csv(f"{settings.out}.csv", results.records)
    lines = [*costs, "", *effort_table(results), ""]
    lines += [LEGEND, *results.about(settings.samples), "", *results.table(), "", *results.tests()]
    common.write_report(settings.out, "experiments.relatives", argv, lines)
    results.draw(f"{settings.out}.png", families=FAMILIES)


def main(argv=None) -> int:
    """Run the program; returns its exit code."""
    return toy_2d.main(argv, {"relatives": relatives_command}, "relatives", "experiments.relatives")


if __name__ == "__main__":
    sys.exit(main())
