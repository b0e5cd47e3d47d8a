"""scflow: self-corrected flow distillation in one readable module.

The method is that of Dao, Phung, Dao, Metaxas and Tran, "Self-Corrected Flow Distillation
for Consistent One-Step and Few-Step Text-to-Image Generation" (AAAI 2025, arXiv 2412.16906).
A rectified-flow teacher needs dozens of steps from noise to data. Its student learns to do it
in one step, and to land at the same place when it takes two, four or eight.

    ┌─ notation ─────────────────────────────────────────────────────────────────────┐
    │ x₀ = x0          data, t = 0                                                   │
    │ x₁ = x1          Gaussian noise, t = 1                                         │
    │ x_t = xt         (1−t)·x₀ + t·x₁, a point of the straight path                 │
    │ v(x,t)           velocity, fitted to dx_t/dt = x₁ − x₀                         │
    │ f(x,t)           x − t·v(x,t), `predict_x0`: where the point would land        │
    │ φ, θ             `teacher` (frozen) and `student`                              │
    │ θ⁻               `target`, the fast average (EMA) of the student's weights     │
    │ x_s, x_u         `xs`, `xu`: neighbours on the teacher's path, s ≤ t ≤ u       │
    │ x̂₀ = x0_hat      f_θ(x₁,1), the one-step sample; `x0_fixed` without gradient   │
    │ x̂_t = xt_hat     (1−t)·x̂₀ + t·x₁, on the straight line from x₁ to x̂₀           │
    │ D_ψ              `critic`, the discriminator                                   │
    │ d(·,·)           distance of two points, `pseudo_huber`                        │
    │ c = cond         tokens (B,L): labels or words from 1 on, 0 for none           │
    └────────────────────────────────────────────────────────────────────────────────┘
    B is the number of rows of a batch. t has shape (B,) everywhere. Sampling goes from
    t = 1 down to 0. Because of its form, f(x,0) = x whatever the weights are.
    Squares and distances are means over the elements.

The student minimises a weighted sum of four losses (all in `distill_losses`):

    consistency   d( f_θ(x_t,t), f_θ⁻(x_s,s) )   the target is the true x₀ where s < τ
    bi            d( f_θ(x_t,t), f_θ⁻(x_u,u) )
    adv           −D_ψ(x̂₀)                       the critic tells x₀ from x̂₀
    self          ‖ f_θ(x̂_t,t) − x̂₀ ‖²           x̂₀ is a constant here

How to use it. `batch(n, generator)` returns n random rows of data, and their condition or None:

    generator = torch.Generator().manual_seed(0)
    for run in train_teacher(MLP(), batch, generator): pass
    teacher = run.ema
    for run in distill(teacher, PointCritic(), batch, generator, SCHEDULES["two_phase"]): pass
    student = run.ema
    x0 = sample(student, torch.randn(1000, 2), steps=1)

Where a comment says "the reference", it means the code that the paper's authors published.
"""

import copy
import math
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, t, cond) → v(x,t); a network is one
Batch = Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]  # (n, generator) → n rows of data, and cond
Distance = Callable[[Tensor, Tensor], Tensor]

# ═══ 1. The straight path ═════════════════════════════════════════════════════════════════


def broadcast(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) as (B,1,…,1), so that they multiply an `x` of any shape (B,…)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """x_t = (1−t)·x₀ + t·x₁ for data and noise (B,…) and times (B,)."""
    t = broadcast(t, x0)
    return (1 - t) * x0 + t * x1


def predict_x0(net: Velocity, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
    """f(x,t) = x − t·v(x,t): where the straight line through (x,t) with slope v meets t = 0."""
    return x - broadcast(t, x) * net(x, t, cond)


def solver_step(net: Velocity, x: Tensor, t: Tensor, s: Tensor, solver: str, cond: Tensor | None = None) -> Tensor:
    """One step along dx/dt = v(x,t) from times t (B,) to times s (B,): "euler" or "heun"."""
    h = broadcast(t - s, x)
    v = net(x, t, cond)
    euler = x - h * v
    if solver == "euler":
        return euler
    v_end = net(euler, s, cond)
    return x - h * (v + v_end) / 2


def read_walk(walk: str) -> tuple[str, int]:
    """Solver and number of steps of a walk: "heun-2" is ("heun", 2). Raises ValueError for another form."""
    solver, dash, steps = walk.partition("-")
    if not dash:
        steps = "1"
    good = solver in ("euler", "heun") and steps.isdecimal() and int(steps) > 0
    require(good, f"a walk is euler, heun, or several such steps, as in heun-2; not {walk!r}")
    return solver, int(steps)


def follow(net: Velocity, x: Tensor, t: Tensor, s: Tensor, walk: str = "euler", cond: Tensor | None = None) -> Tensor:
    """Walk along dx/dt = v(x,t) from times t (B,) to times s (B,), which may be above t.

    walk  "euler" is the paper's one Euler step, "heun" one Heun step, "heun-2" two equal Heun steps.
    """
    solver, steps = read_walk(walk)
    for i in range(steps):
        start = torch.lerp(t, s, i / steps)
        end = torch.lerp(t, s, (i + 1) / steps)
        x = solver_step(net, x, start, end, solver, cond)
    return x


SOLVERS = ("euler", "heun", "renoise")


def nfe(steps: int, solver: str = "euler") -> int:
    """Network evaluations that `sample` makes for so many solver steps."""
    return 2 * steps if solver == "heun" else steps


@torch.no_grad()  # a sampler never trains anything
def sample(
    net: Velocity,
    noise: Tensor,
    steps: int = 1,
    solver: str = "euler",
    cond: Tensor | None = None,
    *,
    start: float | Tensor = 1.0,
    beta: float = 1.0,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Carry `noise` (B,…) from t = `start` to t = 0 in `steps` equal steps.

    solver      "euler" (1 evaluation a step), "heun" (2, of order two), or "renoise": jump to
                x̂₀ and add noise again, (1−β)·x₁ + β·fresh, for the next time. This noise has
                unit variance only at β = 0 and β = 1, as in the reference's sampler.
    start       a number, or a time for each row (B,). Re-noising with β < 1 starts at 1: it
                takes `noise` for x₁.
    trajectory  also return the path, (steps+1, B, …).
    Raises ValueError for an unknown solver or fewer than one step.
    """
    require(solver in SOLVERS, f"unknown solver {solver!r}; choose from {', '.join(SOLVERS)}")
    require(steps >= 1 and steps == int(steps), f"a sampler takes at least one whole step, not {steps}")
    start = torch.as_tensor(start, dtype=noise.dtype, device=noise.device).expand(len(noise))
    x = noise
    path = [x]
    for i in range(int(steps)):
        t = start * (1 - i / steps)
        s = start * (1 - (i + 1) / steps)
        if solver == "renoise":
            x0_hat = predict_x0(net, x, t, cond)
            fresh = randn_like(x, generator)
            x = interpolate(x0_hat, (1 - beta) * noise + beta * fresh, s)
        else:
            x = solver_step(net, x, t, s, solver, cond)
        path.append(x)
    if trajectory:
        return x, torch.stack(path)
    return x


def randn_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of the shape, device and dtype of `x`."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def rand_times(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A uniform number in [0,1) for each row of `x` (B,…), as (B,)."""
    return torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)


class Refused(ValueError):
    """What `require` raises. Its message is written for whoever gave the input."""


def require(condition: object, message: str) -> None:
    """Raise Refused, a ValueError, with this message if the condition does not hold."""
    if not condition:
        raise Refused(message)


# ═══ 2. The losses ════════════════════════════════════════════════════════════════════════


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of the elements."""
    return ((a - b) ** 2).mean()


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.01) -> Tensor:
    """√(d²+c²) − c of each difference d, averaged: squared below c, absolute above."""
    return (((a - b) ** 2 + c**2).sqrt() - c).mean()


DISTANCES = {"huber": pseudo_huber, "squared": squared}


def flow_matching_loss(v: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """The teacher's loss ‖v(x_t,t) − (x₁ − x₀)‖²."""
    return squared(v, x1 - x0)


def truncated_consistency_loss(
    f_t: Tensor, f_s: Tensor, x0: Tensor, s: Tensor, tau: float, distance: Distance = pseudo_huber
) -> Tensor:
    """d(f_θ(x_t,t), f_θ⁻(x_s,s)) with s ≤ t. Where s < τ the true x₀ is the target."""
    target = torch.where(broadcast(s, x0) < tau, x0, f_s)
    return distance(f_t, target)


def bidirectional_loss(f_t: Tensor, f_u: Tensor, distance: Distance = pseudo_huber) -> Tensor:
    """d(f_θ(x_t,t), f_θ⁻(x_u,u)) with u ≥ t. It is never truncated."""
    return distance(f_t, f_u)


def self_correction_loss(
    v_hat: Tensor, xt_hat: Tensor, x0_fixed: Tensor, x1: Tensor, t: Tensor, form: str = "x0"
) -> Tensor:
    """‖f_θ(x̂_t,t) − x̂₀‖² for v̂ = v_θ(x̂_t,t): the paper's reflow term.

    form  "velocity" is ‖v̂ − (x₁ − x̂₀)‖². Because f_θ(x̂_t,t) − x̂₀ = t·((x₁ − x̂₀) − v̂), this is the
          other one, each row divided by t².
    """
    if form == "velocity":
        return squared(v_hat, x1 - x0_fixed)
    f_hat = xt_hat - broadcast(t, xt_hat) * v_hat
    return squared(f_hat, x0_fixed)


def adversarial_loss(fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the student minimises, given the critic's logits (B,) on x̂₀."""
    if kind == "hinge":
        return -fake.mean()
    return F.softplus(-fake).mean()


def critic_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the critic minimises, given its logits (B,) on x₀ and on x̂₀.

    Data have density p and samples q. The best critic for the hinge loss is sign(p−q), and its
    loss is 2·(1 − TV(p,q)), where TV(p,q) = ½∫|p−q|.
    """
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(critic: nn.Module, x0: Tensor, cond: Tensor | None = None) -> Tensor:
    """½·E‖∇D(x₀)‖² over data (B,…)."""
    x0 = x0.detach().requires_grad_()
    logits = critic(x0, cond)
    (grad,) = torch.autograd.grad(logits.sum(), x0, create_graph=True)  # the penalty is differentiated again
    return grad.flatten(1).square().sum(1).mean() / 2


def first_rows(cond: Tensor | None, n: int) -> Tensor | None:
    """The condition of the first n rows."""
    return None if cond is None else cond[:n]


def distill_losses(
    run: "StudentRun",
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    phase: "Phase",
    weights: dict[str, float],
    generator: torch.Generator | None = None,
    cond: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The student's losses for one draw of data and noise x₀, x₁ (B,…) and times t (B,).

    run      has .teacher, .student, .target, .critic, and .ema and .frozen if `phase.self_source` asks for them.
    phase    the Phase with the settings.
    weights  {name: λ}; a loss of weight zero is neither computed nor returned.
    Returns losses and x0_hat. losses is {name: scalar}; x0_hat holds the one-step samples that the
    critic has judged, (n,…), or is None.
    """
    losses = {}
    distance = DISTANCES[phase.distance]
    one = torch.ones_like(t)
    xt = interpolate(x0, x1, t)

    # s and u are drawn always, so that switching a loss off does not change later random numbers.
    window_below = t.clamp(max=phase.delta)  # min(t, δ): s does not pass 0
    window_above = (1 - t).clamp(max=phase.delta)  # u does not pass 1
    s = t - rand_times(x0, generator) * window_below
    u = t + rand_times(x0, generator) * window_above

    if weights["consistency"] > 0 or weights["bi"] > 0:
        f_t = predict_x0(run.student, xt, t, cond)

    # Truncated consistency: the student at (x_t,t) agrees with the target nearer the data.
    if weights["consistency"] > 0:
        with torch.no_grad():  # stop-gradient: the target is a constant
            xs = follow(run.teacher, xt, t, s, phase.walk, cond)
            f_s = predict_x0(run.target, xs, s, cond)
        losses["consistency"] = truncated_consistency_loss(f_t, f_s, x0, s, phase.tau, distance)

    # Bidirectional consistency: it agrees with the target nearer the noise, too.
    if weights["bi"] > 0:
        with torch.no_grad():  # stop-gradient: the target is a constant
            xu = follow(run.teacher, xt, t, u, phase.walk, cond)
            f_u = predict_x0(run.target, xu, u, cond)
        losses["bi"] = bidirectional_loss(f_t, f_u, distance)

    # Adversarial: the critic's verdict on the one-step sample. Here the gradient goes into x̂₀.
    x0_hat = None
    if weights["adv"] > 0:
        n = phase.critic_rows(len(x0))
        x0_hat = predict_x0(run.student, x1[:n], one[:n], first_rows(cond, n))
        verdict = run.critic(x0_hat, first_rows(cond, n))
        losses["adv"] = adversarial_loss(verdict, phase.adversarial)

    # Self-correction: every later step ends where the one step ended.
    if weights["self"] > 0:
        with torch.no_grad():  # stop-gradient: x̂₀ is a constant, where it is the target and inside x̂_t
            every_row = x0_hat is not None and len(x0_hat) == len(x0)
            if phase.self_source == "student" and every_row:
                x0_fixed = x0_hat.detach()  # the sample that the critic has judged
            else:
                source = getattr(run, phase.self_source)
                x0_fixed = predict_x0(source, x1, one, cond)
        xt_hat = interpolate(x0_fixed, x1, t)  # the same x₁ that x̂₀ came from
        v_hat = run.student(xt_hat, t, cond)
        losses["self"] = self_correction_loss(v_hat, xt_hat, x0_fixed, x1, t, phase.self_form)

    return losses, x0_hat


# ═══ 3. Training ══════════════════════════════════════════════════════════════════════════
# Both loops are generators: they yield the run after each update. Printing, drawing, saving and
# compiling are left to whoever iterates. The scripts show the comment behind a setting as its --help.


def check_choices(settings) -> None:
    """Raise ValueError where a field of type Literal has another value than those listed."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if get_origin(f.type) is Literal:
            choices = get_args(f.type)
            require(value in choices, f"{f.name} is {value!r}, not one of {', '.join(choices)}")


@dataclass(frozen=True)
class TeacherSettings:
    """How the rectified-flow teacher is trained."""

    teacher_steps: int = 1500  # updates of the teacher
    teacher_batch: int = 512  # rows per update of the teacher
    teacher_lr: float = 4e-3  # AdamW learning rate of the teacher: up along a line, then a cosine down to 0
    teacher_rise: int = 50  # updates in which the rate rises
    teacher_clip: float = 0.0  # a gradient of a larger norm is shortened to this norm; 0: never
    teacher_drop: float = 0.1  # share of rows that lose their condition, if there is one: guidance needs both
    teacher_times: Literal["uniform", "logit-normal"] = "uniform"  # how t is drawn; logit-normal: rarely near 0 and 1

    def __post_init__(self):
        check_choices(self)
        for name in ("teacher_steps", "teacher_batch", "teacher_lr", "teacher_rise"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} must be positive, not {value}")
        require(self.teacher_clip >= 0, f"teacher_clip must not be negative, and is {self.teacher_clip}")
        require(0 <= self.teacher_drop < 1, f"teacher_drop must lie in [0,1), and is {self.teacher_drop}")


@dataclass(frozen=True)
class Phase:
    """One stretch of distillation: how long, with which losses."""

    # The defaults have the paper's losses with the reference's weights, δ and τ; sizes suit points in the plane.
    steps: int = 1100  # updates of the student
    batch: int = 512  # rows per update of the student
    lr: float = 4e-3  # AdamW learning rate of the student
    lr_fall: Literal["cosine", "none"] = "cosine"  # the rate rises over 50 updates, and then falls to 0 or stays
    lr_critic: float = 1e-3  # AdamW learning rate of the critic, constant
    lambda_consistency: float = 1.0  # weight of the truncated consistency loss
    lambda_adv: float = 0.1  # weight of the adversarial loss
    lambda_self: float = 0.1  # weight of the self-correction loss
    lambda_bi: float = 0.1  # weight of the bidirectional consistency loss
    warmup: int = 0  # updates before self-correction and the bidirectional loss are switched on
    delta: float = 0.1  # window δ: a neighbour lies at most so far along the path
    walk: str = "euler"  # the teacher's steps to a neighbour: euler (the paper's), heun, or several, as in heun-2
    tau: float = 0.4  # truncation τ: below it the consistency target is the data itself
    distance: Literal["huber", "squared"] = "huber"  # distance of the consistency losses
    self_source: Literal["student", "ema", "frozen"] = "student"  # whose one-step sample is x̂₀ in self-correction
    self_form: Literal["x0", "velocity"] = "x0"  # compare landing points, or velocities (the same error over t)
    pinned: float = 0.0  # share of the rows whose t is 1, where a single step is taken
    judged: float = 1.0  # share of the rows whose one-step sample the critic judges
    adversarial: Literal["hinge", "softplus"] = "hinge"  # adversarial loss
    r1: float = 0.0  # γ of the R1 penalty γ/2·‖∇D(x₀)‖²; 0 is off
    target_ema: float = 0.9  # decay of the consistency target θ⁻
    ema: float = 0.9999  # cap on the decay of the sampling average, which grows with the updates

    def __post_init__(self):
        for name in ("steps", "batch", "lr", "lr_critic", "delta"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} must be positive, not {value}")
        for name in ("steps", "batch", "warmup"):
            value = getattr(self, name)
            require(isinstance(value, int), f"{name} must be a whole number, not {value}")
        for name in ("lambda_consistency", "lambda_adv", "lambda_self", "lambda_bi", "warmup", "r1"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must not be negative, and is {value}")
        for name in ("delta", "tau", "pinned", "judged", "target_ema", "ema"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} must lie in [0,1], and is {value}")
        check_choices(self)
        read_walk(self.walk)
        require(self.lambda_adv == 0 or self.judged > 0, "lambda_adv needs rows to judge, and judged is 0")
        require(self.r1 == 0 or self.lambda_adv > 0, "r1 regularises the critic, and lambda_adv = 0 leaves none")
        warm = self.lambda_self > 0 or self.lambda_bi > 0
        require(not warm or self.warmup < self.steps, "warmup is as long as the phase: its losses would never start")
        require(any(self.weights(0).values()), "every loss has weight zero at the start: nothing would be learned")

    def weights(self, i: int) -> dict[str, float]:
        """The weight λ of each loss in update i of the phase; a warm-up is a weight that starts late."""
        late = 0.0 if i < self.warmup else 1.0
        return {
            "consistency": self.lambda_consistency,
            "bi": self.lambda_bi * late,
            "adv": self.lambda_adv,
            "self": self.lambda_self * late,
        }

    def pinned_rows(self, n: int) -> int:
        """How many of n rows have t = 1; they are the first."""
        return round(self.pinned * n)

    def critic_rows(self, n: int) -> int:
        """How many of n rows the critic judges, at least one; they are the first."""
        return max(1, round(self.judged * n))


SCHEDULES = {
    # The paper's method: all four losses together, with the reference's weights, δ and τ. The critic's loss is
    # hinge, where the reference's is softplus with R1.
    "paper": (Phase(),),
    # This project's schedule: distil first, straighten last. Where the points x_t and x̂_t overlap,
    # consistency and self-correction ask one network for different values there, and a joint fit lands
    # in between. So phase 1 is consistency alone. Its student converges to the map of the *stepped*
    # teacher: accurate steps allow a wide window, and what is known at t = 0 reaches t = 1 in few windows.
    # Phase 2 keeps that map at t = 1 (self-correction towards the frozen copy, most rows at t = 1) and
    # gives it up in between, where Euler sampling never goes (re-noising does). Here the critic sees data.
    "two_phase": (
        Phase(
            steps=1000,
            batch=256,
            lr=1.6e-2,
            lambda_adv=0.0,
            lambda_self=0.0,
            lambda_bi=0.0,
            delta=0.5,
            walk="heun-2",
            tau=0.0,
        ),
        Phase(
            steps=300,
            lr=8e-3,
            lambda_consistency=0.0,
            lambda_adv=0.05,
            lambda_self=1.0,
            lambda_bi=0.0,
            self_source="frozen",
            self_form="velocity",
            pinned=0.75,
            judged=0.25,
        ),
    ),
    # Here to show what the other losses repair: consistency alone, in about the time of "paper".
    "consistency": (Phase(steps=2900, lambda_adv=0.0, lambda_self=0.0, lambda_bi=0.0, tau=0.0),),
}


def rescale(schedule: tuple[Phase, ...], steps: int) -> tuple[Phase, ...]:
    """The schedule with about `steps` updates in all, shared out as before, at least one a phase."""
    require(steps > 0, f"steps must be positive, not {steps}")
    total = sum(phase.steps for phase in schedule)
    return tuple(replace(phase, steps=max(1, round(phase.steps * steps / total))) for phase in schedule)


def check_schedule(schedule: tuple[Phase, ...]) -> None:
    """Raise ValueError where the phases contradict each other."""
    require(len(schedule) > 0, "a schedule needs at least one phase")
    first = schedule[0]
    copies_nothing = first.self_source == "frozen" and first.lambda_self > 0
    require(
        not copies_nothing,
        "self_source 'frozen' copies the phase before, and the first phase has none: use 'student' or 'ema'",
    )


def train_teacher(
    net: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    settings: TeacherSettings = TeacherSettings(),
    oracle: Velocity | None = None,
    resume: dict | None = None,
) -> Iterator["TeacherRun"]:
    """Rectified flow: fit v_φ(x_t,t) to x₁ − x₀. Yields a TeacherRun after each update.

    net     is trained in place.
    batch   callable (n, generator) → (x₀, cond or None), in random order.
    oracle  a known velocity to fit instead; without noise in its targets fewer updates will do.
    resume  an earlier run's `state_dict()`.
    """
    net.requires_grad_(True).train()
    run = TeacherRun(net, clone(net), adamw(net, settings.teacher_lr), generator)
    if resume is not None:
        run.load_state_dict(resume)
    while run.step < settings.teacher_steps:
        factor = lr_factor(run.step, settings.teacher_steps, settings.teacher_rise)
        set_lr(run.opt, settings.teacher_lr * factor)
        x0, cond = batch(settings.teacher_batch, generator)
        x1 = randn_like(x0, generator)
        t = rand_times(x0, generator)
        if settings.teacher_times == "logit-normal":
            t = torch.special.ndtri(t).sigmoid()  # ndtri makes uniform numbers normal (Esser et al., 2024)
        xt = interpolate(x0, x1, t)
        if cond is not None:
            cond = drop(cond, settings.teacher_drop, generator)

        v = net(xt, t, cond)
        if oracle is None:
            loss = flow_matching_loss(v, x0, x1)
        else:
            with torch.no_grad():  # it is known, and not trained
                exact = oracle(xt, t, cond)
            loss = squared(v, exact)
        run.latest = {"flow": loss.detach()}
        run.check_finite()
        run.opt.zero_grad()
        loss.backward()
        if settings.teacher_clip > 0:
            nn.utils.clip_grad_norm_(net.parameters(), settings.teacher_clip)
        run.opt.step()
        ema_update(run.ema, net, growing(run.step, 0.9999))

        run.step += 1
        yield run


def distill(
    teacher: Velocity,
    critic: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    schedule: tuple[Phase, ...] = SCHEDULES["paper"],
    student: nn.Module | None = None,
    *,
    resume: dict | None = None,
    loss_function: Callable = distill_losses,
) -> Iterator["StudentRun"]:
    """Self-corrected flow distillation. Yields a StudentRun after each update.

    teacher        any callable (x, t, cond) → v. A network is copied and frozen; another callable is used as it is.
    critic         module (x, cond) → (B,), trained in place.
    batch          callable (n, generator) → (x₀, cond or None), in random order: the critic sees the first rows.
    schedule       tuple of Phases, run one after the other.
    student        where the student starts (it is copied); without it, from the teacher's weights.
    resume         an earlier run's `state_dict()`.
    loss_function  `distill_losses`, or one that wraps it; each loss it returns needs a key in `phase.weights(i)`.
    Raises ValueError for contradictory phases, and if the teacher has no weights and `student` is not given.
    """
    check_schedule(schedule)
    run = start_distillation(teacher, critic, generator, schedule[0], student)
    if resume is not None:
        run.load_state_dict(resume)
    phase_start = 0  # the update at which the phase starts
    for phase in schedule:
        run.phase = phase
        while run.step < phase_start + phase.steps:
            i = run.step - phase_start  # the update within the phase
            if i == 0 and phase_start > 0:  # the first update of a later phase
                next_phase(run)
            steps = phase.steps if phase.lr_fall == "cosine" else math.inf
            set_lr(run.opt, phase.lr * lr_factor(i, steps))
            set_lr(run.opt_critic, phase.lr_critic)
            x0, cond = batch(phase.batch, generator)
            x1 = randn_like(x0, generator)
            t = rand_times(x0, generator)
            t[: phase.pinned_rows(len(t))] = 1  # the pinned rows

            # The student, on its weighted losses.
            weights = phase.weights(i)
            run.critic.requires_grad_(False)  # no gradient for the critic's weights; x̂₀ still gets its own
            losses, x0_hat = loss_function(run, x0, x1, t, phase, weights, generator, cond)
            run.latest = {name: loss.detach() for name, loss in losses.items()}
            run.check_finite()
            run.opt.zero_grad()
            sum(weights[name] * loss for name, loss in losses.items()).backward()
            run.opt.step()

            # The student's two averages: θ⁻, and the slow one to sample with.
            ema_update(run.target, run.student, phase.target_ema)
            ema_update(run.ema, run.student, growing(run.step, phase.ema))

            # The critic, on data and on the samples that it judged above.
            if x0_hat is not None:
                run.critic.requires_grad_(True)
                n = len(x0_hat)
                real = run.critic(x0[:n], first_rows(cond, n))
                fake = run.critic(x0_hat.detach(), first_rows(cond, n))  # stop-gradient: none into the student
                loss = critic_loss(real, fake, phase.adversarial)
                run.latest["critic"] = loss.detach()
                if phase.r1 > 0:
                    r1 = phase.r1 * r1_penalty(run.critic, x0[:n], first_rows(cond, n))
                    run.latest["r1"] = r1.detach()
                    loss = loss + r1
                run.check_finite()
                run.opt_critic.zero_grad()
                loss.backward()
                run.opt_critic.step()

            run.step += 1
            yield run
        phase_start += phase.steps


class Run:
    """What both loops yield: networks, optimisers and random numbers between two updates.

    PARTS names the attributes with a state of their own; they are what is saved.
    """

    PARTS: tuple[str, ...] = ()

    @property
    def losses(self) -> dict[str, float]:
        """The losses of the latest update as numbers. On a GPU, asking waits for the update to finish."""
        return {name: loss.item() for name, loss in self.latest.items()}

    def check_finite(self) -> None:
        """Raise FloatingPointError, naming the loss and the update, if a loss is not finite.

        A GPU must not wait for this at every update: there it looks at every fiftieth.
        """
        if self.generator.device.type == "cuda" and self.step % 50 != 0:
            return
        for name, value in self.losses.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} loss became {value} at step {self.step + 1}")

    def state_dict(self) -> dict:
        """What the run needs to go on bit for bit, beside teacher, data and settings.

        Save it before the next update: it holds the tensors themselves, no copies.
        Raises FloatingPointError if weights are not finite.
        """
        parts = {name: getattr(self, name) for name in self.PARTS}
        for name, part in parts.items():
            if isinstance(part, nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
                raise FloatingPointError(f"the weights of the {name} are no longer finite at step {self.step}")
        states = {name: part.state_dict() for name, part in parts.items()}
        return {"step": self.step, "generator": self.generator.get_state(), "parts": states}

    def load_state_dict(self, saved: dict) -> None:
        """Take up a run where `state_dict` left it. Raises ValueError if it was another kind of run."""
        try:
            for name in self.PARTS:
                getattr(self, name).load_state_dict(saved["parts"][name])
        except (KeyError, RuntimeError, ValueError):  # a part is missing, or has other shapes
            raise ValueError("the saved state is of another kind of run, or of another architecture") from None
        try:
            self.generator.set_state(saved["generator"].cpu())
        except RuntimeError:
            device = self.generator.device.type
            raise ValueError(f"the saved random numbers are of another device than {device}: resume on it") from None
        self.step = saved["step"]


@dataclass
class TeacherRun(Run):
    """The teacher's training between two updates."""

    PARTS = ("net", "ema", "opt")

    net: nn.Module  # v_φ, trained in place
    ema: nn.Module  # average of its weights, the teacher to use
    opt: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0  # updates that are done
    latest: dict[str, Tensor] = field(default_factory=dict)  # losses of the latest update


@dataclass
class StudentRun(Run):
    """The distillation between two updates."""

    PARTS = ("student", "target", "ema", "frozen", "critic", "opt", "opt_critic")

    teacher: nn.Module  # v_φ, frozen; any callable (x, t, cond) → v
    student: nn.Module  # v_θ
    target: nn.Module  # θ⁻, fast average of the student: the consistency target
    ema: nn.Module  # slow average of the student, the network to sample with
    frozen: nn.Module  # copy of the average at the start of the phase
    critic: nn.Module  # D_ψ
    opt: torch.optim.Optimizer
    opt_critic: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0  # updates that are done, of all phases
    phase: Phase | None = None  # the present phase
    latest: dict[str, Tensor] = field(default_factory=dict)  # losses of the latest update


def start_distillation(
    teacher: Velocity, critic: nn.Module, generator: torch.Generator, phase: Phase, student: nn.Module | None = None
) -> StudentRun:
    """The run before its first update: student, target, average and frozen copy start alike."""
    trainable = isinstance(teacher, nn.Module) and any(p.numel() for p in teacher.parameters())
    advice = "pass student=, a network fitted to it by train_teacher(oracle=teacher)"
    require(trainable or student is not None, f"this teacher has no weights to start a student from: {advice}")
    student = clone(teacher if student is None else student).requires_grad_(True).train()
    return StudentRun(
        teacher=clone(teacher) if isinstance(teacher, nn.Module) else teacher,  # frozen: its paths must not move
        student=student,
        target=clone(student),
        ema=clone(student),
        frozen=clone(student),
        critic=critic,
        opt=adamw(student, phase.lr),
        # Short memory: what the critic learned of earlier samples is soon out of date.
        opt_critic=adamw(critic, phase.lr_critic, betas=(0.5, 0.99)),
        generator=generator,
    )


def next_phase(run: StudentRun) -> None:
    """Start all networks of a phase from the average, which is better than the weights it averages.

    Adam's moments belong to other losses, and are deleted. The critic stays as it is.
    """
    for net in (run.student, run.target, run.frozen):
        net.load_state_dict(run.ema.state_dict())
    run.opt.state.clear()


def clone(net: nn.Module) -> nn.Module:
    """A frozen copy of the network."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def adamw(net: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW without decay, fused where torch has that."""
    fused = next(net.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(net.parameters(), lr, betas, weight_decay=0.0, fused=fused)


def set_lr(opt: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next update."""
    opt.param_groups[0]["lr"] = lr


def lr_factor(i: int, steps: float, rise: int = 50) -> float:
    """Factor of the learning rate in update i: up along a line for `rise` updates, down to 0 along a cosine.

    It stays up if `steps` is infinite.
    """
    rise = min(1, (i + 1) / rise)
    fall = (1 + math.cos(math.pi * i / steps)) / 2
    return rise * fall


def growing(step: int, cap: float) -> float:
    """Decay of a sampling average after `step` updates: it remembers about the last fiftieth of them.

    3,300 updates reach 0.985; a cap of 0.9999 is reached after half a million.
    """
    return min(cap, 1 - 50 / (50 + step))


@torch.no_grad()  # an average is updated by hand, never by an optimiser
def ema_update(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average ← decay·average + (1−decay)·net, buffers included; exactly `net` at decay 0, untouched at 1."""
    if decay == 1:
        return
    ours = [*average.parameters(), *average.buffers()]
    theirs = [*net.parameters(), *net.buffers()]
    for a, b in zip(ours, theirs):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)  # counters and the like cannot be averaged


def drop(cond: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """The condition (B,L), set to zero in that share of its rows, so that a network learns to do without it."""
    keep = torch.rand(len(cond), 1, generator=generator, device=cond.device) >= share
    return cond * keep


# ═══ 4. Networks ══════════════════════════════════════════════════════════════════════════
# A velocity is called as net(x, t, cond=None) → v, a critic as critic(x, cond=None) → (B,).


class TokenEmbedding(nn.Module):
    """Tokens (B,L) → vectors (B,L,dim), one for each word at each place, and zero where nothing is said.

    tokens  (L, number of words).
    """

    def __init__(self, tokens: tuple[int, int], dim: int, std: float = 0.02):
        super().__init__()
        self.length, self.words = tokens
        self.table = nn.Embedding(1 + self.length * self.words, dim, padding_idx=0)
        nn.init.normal_(self.table.weight[1:], std=std)
        self.register_buffer("places", self.words * torch.arange(self.length), persistent=False)  # (L,)

    def forward(self, cond: Tensor | None, x: Tensor) -> Tensor:
        """Vectors (B,L,dim) for the rows of `x`. Raises ValueError for a wrong shape or unknown tokens."""
        if cond is None:
            cond = torch.zeros(len(x), self.length, dtype=torch.int64, device=x.device)
        check_tokens(cond, (len(x), self.length), self.words)
        number = (cond + self.places) * (cond > 0)
        return self.table(number)


def check_tokens(cond: Tensor, shape: tuple[int, int], words: int) -> None:
    """Raise ValueError unless a condition holds integers of that shape, between 0 and `words`.

    The values are looked at on a CPU only, for a GPU would be kept waiting.
    """
    good = not cond.is_floating_point() and cond.shape == shape
    require(good, f"a condition is whole numbers of shape {tuple(shape)}, not {cond.dtype} {tuple(cond.shape)}")
    if cond.device.type == "cpu" and cond.numel() > 0:
        low, high = cond.aminmax()
        require(low >= 0 and high <= words, f"tokens lie between 0 and {words}, not between {low} and {high}")


def refuse(cond: Tensor | None) -> None:
    """An unconditional network says so, rather than ignore the condition it is given."""
    require(cond is None, "this network is unconditional: call it with cond=None")


class MLP(nn.Module):
    """Velocity of points (B,dim): a plain perceptron on Fourier features of x and t.

    For points of another shape, such as latents (B,C,H,W) whose places mean nothing, `dim` is that shape (C,H,W).
    """

    def __init__(self, dim=2, width=128, depth=3, x_frequencies=3, t_frequencies=4, tokens=None):
        super().__init__()
        self.shape = (dim,) if isinstance(dim, int) else tuple(dim)
        dim = math.prod(self.shape)
        self.arch = dict(name="MLP", dim=list(self.shape), width=width, depth=depth, tokens=tokens)
        self.arch.update(x_frequencies=x_frequencies, t_frequencies=t_frequencies)
        # Frequencies π/4·(1, 2, …) suit data of unit size: without them sharp edges are learned slowly.
        self.register_buffer("x_freqs", math.pi / 4 * 2.0 ** torch.arange(x_frequencies), persistent=False)
        self.register_buffer("t_freqs", math.pi / 2 * torch.arange(1.0, t_frequencies + 1), persistent=False)
        inputs = dim * (1 + 2 * x_frequencies) + 2 * t_frequencies
        self.words = None
        if tokens:
            self.words = TokenEmbedding(tokens, width)
            inputs += width
        layers = []
        for _ in range(depth):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity (B,dim) at points (B,dim) and times (B,)."""
        point = x.flatten(1)
        a = (point[..., None] * self.x_freqs).flatten(1)  # (B, dim·x_frequencies)
        b = t[:, None] * self.t_freqs  # (B, t_frequencies)
        features = [point, a.sin(), a.cos(), b.sin(), b.cos()]
        if self.words is None:
            refuse(cond)
        else:
            features.append(self.words(cond, x).sum(1))
        v = self.layers(torch.cat(features, 1))
        return v.reshape(x.shape)


class PointCritic(nn.Module):
    """Critic of points (B,dim), or of another shape with as many numbers: a plain perceptron.

    The kinks of leaky ReLU follow the edges of the data.
    """

    def __init__(self, dim=2, width=64, depth=3, tokens=None):
        super().__init__()
        self.arch = dict(name="PointCritic", dim=dim, width=width, depth=depth, tokens=tokens)
        self.words = TokenEmbedding(tokens, width) if tokens else None
        layers = []
        for _ in range(depth):
            layers += [nn.Linear(dim, width), nn.LeakyReLU(0.2)]
            dim = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Logits (B,), large for data."""
        features = self.hidden(x.flatten(1))
        return self.head(features)[:, 0] + projection(self.words, features, cond)


def projection(words: TokenEmbedding | None, features: Tensor, cond: Tensor | None) -> Tensor | float:
    """What a critic adds to its logits: features (B,D) · summed vectors of the words (Miyato & Koyama, 2018).

    It is a sum over the words. So it cannot tell what only their combination says, such as which is left of which.
    """
    if words is None:
        refuse(cond)
        return 0.0
    return (features * words(cond, features).sum(1)).sum(1)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000·t at `dim`/2 frequencies from 1 to 1/10000, (B,) → (B,dim)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = 1000 * t[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


def sincos_positions(h: int, w: int, dim: int) -> Tensor:
    """Fixed 2-D positions: half of the channels encode the row, half the column, (h·w, dim)."""
    freqs = 1 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * freqs, cols.reshape(-1, 1) * freqs], 1)  # (hw, dim/2)
    return torch.cat([angles.sin(), angles.cos()], 1)


def patchify(x: Tensor, p: int) -> Tensor:
    """Latents (B,C,H,W) → tokens (B, H/p·W/p, p·p·C). Raises ValueError if p does not divide both sides."""
    h, w = x.shape[-2:]
    require(h % p == 0 and w % p == 0, f"patches of {p} do not tile latents of {(h, w)}: both must be multiples")
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(tokens: Tensor, p: int, h: int, w: int) -> Tensor:
    """Tokens (B, H/p·W/p, p·p·C) → latents (B,C,H,W), for H = `h` and W = `w`."""
    tiled = h % p == 0 and w % p == 0 and tokens.shape[1] * p * p == h * w and tokens.shape[2] % (p * p) == 0
    require(tiled, f"tokens of shape {tuple(tokens.shape)} are not patches of {p} that tile {(h, w)}")
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=h // p, p=p, q=p)


def zero_(layer: nn.Linear) -> nn.Linear:
    """Make a linear layer the zero map."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale every token (B,N,D) by the vectors (B,D) of its sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Transformer block whose norms and gates are set by the time embedding (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, ratio: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, ratio * dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(ratio * dim, dim),
        )
        self.modulation = zero_(nn.Linear(dim, 6 * dim))  # gates start at 0: at first a block is the identity

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B,N,D) and embedding (B,D) → tokens (B,N,D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, 1)  # (B,D) each
        qkv = self.qkv(modulate(self.norm1(x), shift1, scale1))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        y = rearrange(y, "b h n d -> b n (h d)")
        x = x + gate1[:, None] * self.proj(y)
        y = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + gate2[:, None] * y


class DiT(nn.Module):
    """Diffusion transformer (Peebles & Xie, 2023) as the velocity of latents (B,C,H,W) of mean 0 and variance 1.

    If they were normal, the velocity would be a·x_t with a = (2t−1)/σ_t², where σ_t² = (1−t)² + t² is the variance of
    x_t. Around this line x₁ − x₀ has a standard deviation of 1/σ_t. So the transformer learns only the rest, in units
    of 1/σ_t (Karras et al., 2022): it need not carry the noise from its input to its output.
    """

    precision = torch.float32  # of the computation, or torch.bfloat16 where the device is fast at it

    def __init__(self, shape=(4, 32, 32), patch=2, dim=384, depth=12, heads=6, ratio=4, tokens=None):
        super().__init__()
        c, h, w = shape
        require(h % patch == 0 and w % patch == 0, f"patches of {patch} do not tile latents of {(h, w)}")
        require(dim % heads == 0 and dim % 4 == 0, f"dim {dim} must be a multiple of heads ({heads}) and of 4")
        self.arch = dict(name="DiT", shape=list(shape), patch=patch, dim=dim, depth=depth, heads=heads)
        self.arch.update(ratio=ratio, tokens=tokens)
        self.shape = tuple(shape)
        self.patch = patch
        self.embed = nn.Linear(patch * patch * c, dim)
        self.register_buffer("positions", sincos_positions(h // patch, w // patch, dim), persistent=False)
        self.words = TokenEmbedding(tokens, dim, std=1.0) if tokens else None
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = zero_(nn.Linear(dim, 2 * dim))
        self.head = zero_(nn.Linear(dim, patch * patch * c))  # untrained, the velocity is that of normal latents

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity (B,C,H,W) at latents (B,C,H,W) and times (B,)."""
        require(x.shape[1:] == self.shape, f"this network takes latents {self.shape}, not {tuple(x.shape[1:])}")
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            rest = self.transformer(x, t, cond).to(x.dtype)
        t = broadcast(t, x)
        variance = (1 - t) ** 2 + t**2  # σ_t²
        return (2 * t - 1) / variance * x + rest / variance.sqrt()

    def transformer(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """The rest of the velocity times σ_t, (B,C,H,W)."""
        h = self.embed(patchify(x, self.patch)) + self.positions  # (B,N,D)
        c = self.time(timestep_embedding(t, 256).to(x.dtype))  # (B,D)
        n = h.shape[1]
        if self.words is None:
            refuse(cond)
        else:
            h = torch.cat([h, self.words(cond, x)], 1)  # (B,N+L,D): words are tokens like patches
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(F.silu(c)).chunk(2, 1)
        h = self.head(modulate(self.norm(h[:, :n]), shift, scale))  # (B,N,p·p·C)
        return unpatchify(h, self.patch, *self.shape[1:])


class CriticBlock(nn.Module):
    """Two 3×3 convolutions around a 1×1 skip, pre-activated."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, a)
        self.conv1 = nn.Conv2d(a, b, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, b)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B,a,H,W) → (B,b,H,W)."""
        h = self.conv1(F.leaky_relu(self.norm1(x), 0.2))
        h = self.conv2(F.leaky_relu(self.norm2(h), 0.2))
        return (self.skip(x) + h) / math.sqrt(2)


class LatentCritic(nn.Module):
    """Critic of latents (B,C,H,W): residual convolutions down to a side of 4, then one logit from all places.

    Group norm, never batch statistics: each row is judged alone.
    """

    precision = torch.float32  # as in DiT

    def __init__(self, shape=(4, 32, 32), width=64, tokens=None):
        super().__init__()
        require(width % 8 == 0, f"width {width} must be a multiple of 8, the number of norm groups")
        self.arch = dict(name="LatentCritic", shape=list(shape), width=width, tokens=tokens)
        c, h, w = shape
        layers = [nn.Conv2d(c, width, 3, padding=1)]
        while min(h, w) > 4:
            wider = min(2 * width, 512)
            layers += [CriticBlock(width, wider), nn.AvgPool2d(2, ceil_mode=True)]
            width = wider
            h = (h + 1) // 2
            w = (w + 1) // 2
        layers += [CriticBlock(width, width), nn.LeakyReLU(0.2)]
        self.convolutions = nn.Sequential(*layers)
        # A mean over places would not know a mouth from a mouth on the forehead.
        self.head = nn.Linear(width * h * w, 1)
        self.words = TokenEmbedding(tokens, width * h * w) if tokens else None

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Logits (B,), large for data."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            features = self.convolutions(x).flatten(1)
            logits = self.head(features)[:, 0] + projection(self.words, features, cond)
        return logits.to(x.dtype)


# ═══ 5. Guidance ══════════════════════════════════════════════════════════════════════════


def guided(net: Velocity, w: float) -> Velocity:
    """Classifier-free guidance (Ho & Salimans, 2022): the velocity v(x,t) + w·(v(x,t,c) − v(x,t)).

    w = 1 is the conditional velocity, w = 0 the unconditional one. At each t its score is that of
    p_t(x)^(1−w)·p_t(x|c)^w. These are not the densities of one flow, so following it from noise does not
    sample the tilted p₀. It has no weights: as a teacher it needs `distill(..., student=net)`.
    Raises ValueError if it is called without a condition for each row.
    """

    def velocity(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        require(cond is not None and len(cond) == len(x), "guidance needs a condition for every row")
        v_cond = net(x, t, cond)
        v_free = net(x, t, torch.zeros_like(cond))
        return v_free + w * (v_cond - v_free)

    return velocity


# ═══ 6. Weights files ═════════════════════════════════════════════════════════════════════

FORMAT = "scflow-3"
UNFINISHED = ".unfinished-"  # so begins the name of a folder that `replacing` writes in; a killed program leaves one
NETWORKS = {c.__name__: c for c in (MLP, DiT, PointCritic, LatentCritic)}


def build(arch: dict) -> nn.Module:
    """A network with fresh weights from its `arch` dictionary, as stored in weights files."""
    name = arch.get("name")
    require(name in NETWORKS, f"unknown architecture {name!r}; add it to scflow.NETWORKS")
    settings = {key: value for key, value in arch.items() if key != "name"}
    try:
        return NETWORKS[name](**settings)
    except TypeError as error:
        raise Refused(f"the architecture {arch} does not fit scflow.{name}: {error}") from None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write a file at. When the block ends well, that file takes the place of `path`.

    A program killed at any moment leaves either the old file or the new one, whole.
    Raises OSError, and leaves the old file, where nothing can be written or the disk is full.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as folder:  # no other writer's
            temporary = Path(folder, path.name)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # on the disk before it takes the old file's name
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


@contextmanager
def reading(path: str | Path, kind: str) -> Iterator[None]:
    """Turn whatever fails in this block into a ValueError: "PATH is damaged, or no KIND".

    Readers of foreign bytes raise nearly anything; so does code that uses what they return. What `require` raises
    passes as it is.
    """
    require(os.path.isfile(path), f"no {kind} at {path}")  # a pipe would keep us waiting
    try:
        yield
    except (Refused, PermissionError):  # the system's own words are clear
        raise
    except Exception:
        raise Refused(f"{path} is damaged, or no {kind}") from None


def save(path: str | Path, net: nn.Module, **extra) -> None:
    """Write the network's weights and `extra` (tensors, numbers, strings, lists, dictionaries) atomically.

    Raises FloatingPointError if weights are not finite, ValueError if `read` would refuse the file, and OSError
    if it cannot be written. The old file is left then.
    """
    if not all(p.isfinite().all() for p in net.parameters()):
        raise FloatingPointError(f"the weights for {path} are no longer finite, and are not saved")
    net = getattr(net, "_orig_mod", net)  # of a compiled network the plain one: its weights carry no prefix
    content = {"format": FORMAT, "arch": getattr(net, "arch", None), "weights": net.state_dict(), **extra}
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError:
            raise OSError("torch could not, as when the disk is full") from None
        try:
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)  # mmap: no number is read
        except pickle.UnpicklingError:
            kinds = "tensors, numbers, strings, lists and dictionaries"
            raise Refused(f"{path} is not written: of what it is to hold, not all are {kinds}") from None


def read(path: str | Path, *keys: str) -> dict:
    """The dictionary that `save` wrote, on the CPU.

    keys  entries that it must have, beside those of every file.
    Raises ValueError if the file is missing, damaged, not ours or lacks an entry.
    """
    with reading(path, "checkpoint"):
        content = read_tensors(path)
        require(content["format"] == FORMAT, f"{path} is not a checkpoint of scflow ({FORMAT})")
        for key in ("arch", "weights", *keys):
            require(key in content, f"{path} holds no {key!r}: another program wrote it")
    return content


def read_tensors(path: str | Path) -> dict:
    """What torch.save has put in a file, on the CPU. Nothing in it is executed."""
    with zipfile.ZipFile(path) as archive:
        require(archive.testzip() is None, f"{path} is damaged: a checksum is wrong")  # torch does not look
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error follows, and says it
        return torch.load(path, map_location="cpu", weights_only=True)


def load(path: str | Path, net: nn.Module | None = None, device: str = "cpu") -> nn.Module:
    """The network of a weights file, frozen and ready for `sample`.

    net  an instance to fill, for architectures that are not in NETWORKS.
    Raises ValueError if the file or its architecture does not fit.
    """
    content = read(path)
    with reading(path, "network of this architecture"):
        if net is None:
            net = build(content["arch"] or {})
        net.load_state_dict(content["weights"])
    return net.to(device).eval().requires_grad_(False)
