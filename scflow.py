"""scflow: self-corrected flow distillation in one readable module.

The method is that of Dao, Phung, Dao, Metaxas and Tran, "Self-Corrected Flow Distillation
for Consistent One-Step and Few-Step Text-to-Image Generation" (AAAI 2025,
arXiv 2412.16906). A rectified-flow teacher walks from noise to data in dozens of steps; its
student is trained to jump, and to land in the same place however many steps it takes.

    ┌─ notation ─────────────────────────────────────────────────────────────────────┐
    │ x₀ = x0          data, t = 0                                                   │
    │ x₁ = x1          Gaussian noise, t = 1                                         │
    │ x_t = xt         (1−t)·x₀ + t·x₁, a point of the straight path                 │
    │ v                dx_t/dt = x₁ − x₀; sampling walks t from 1 down to 0          │
    │ f(x,t)           x − t·v(x,t), `predict_x0`: where the point would land        │
    │ φ, θ, θ⁻         `teacher` (frozen), `student`, `target` (fast EMA of θ)       │
    │ x̂₀ = x0_hat      f_θ(x₁,1), the one-step sample                                │
    │ c = cond         tokens (B,L): labels or words from 1 on, 0 for none           │
    └────────────────────────────────────────────────────────────────────────────────┘
    t has shape (B,) everywhere. f(x,0) = x whatever the weights are.

The student minimises, in the order of this file (all four in `distill_losses`):

    consistency   D( f_θ(x_t,t), f_θ⁻(x_s,s) )   x_s one teacher Euler step nearer the data;
                                                 the target is the true x₀ where s < τ
    bi            D( f_θ(x_t,t), f_θ⁻(x_u,u) )   x_u one teacher Euler step nearer the noise
    self          ‖ f_θ(x̂_t,t) − x̂₀ ‖²           x̂_t on the straight line from x₁ to x̂₀
    adv           −D_ψ(x̂₀)                       a critic (the discriminator) tells x₀ from x̂₀

Three lines of use (`batch(n, generator)` returns data and a condition, or None for it):

    for run in train_teacher(MLP(), batch, generator): pass
    for run in distill(run.ema, PointDiscriminator(), batch, generator): pass
    x0 = sample(run.ema, torch.randn(1000, 2), steps=1)
"""

import copy
import functools
import math
import os
import warnings
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# ═══ 1. The straight path ═══════════════════════════════════════════════════════════════════


def broadcast(t, x):
    """Times (B,) as (B,1,…,1), so that they multiply an `x` of any shape (B,…)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x0, x1, t):
    """x_t = (1−t)·x₀ + t·x₁ for data and noise (B,…) and times (B,)."""
    t = broadcast(t, x0)
    return (1 - t) * x0 + t * x1


def predict_x0(net, x, t, cond=None):
    """f(x,t) = x − t·v(x,t): where the straight line through (x,t) with slope v meets t = 0."""
    return x - broadcast(t, x) * net(x, t, cond)


def randn_like(x, generator=None):
    """Standard normal noise of the shape, device and dtype of `x`, from `generator`."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def rand_like(x, generator=None):
    """Uniform [0,1) numbers of the shape, device and dtype of `x`, from `generator`."""
    return torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def require(condition, message):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


# ═══ 2. Sampling, with any velocity ═════════════════════════════════════════════════════════

SOLVERS = ("euler", "heun", "renoise")


def nfe(steps, solver="euler"):
    """Network evaluations that `sample` makes for so many solver steps."""
    return steps * (2 if solver == "heun" else 1)


@torch.no_grad()  # a sampler never trains anything
def sample(net, noise, steps=1, solver="euler", cond=None, *, start=1.0, beta=1.0, generator=None, trajectory=False):
    """Carry `noise` (B,…) from t = `start` to t = 0 in `steps` equal steps.

    solver      "euler" (1 evaluation a step), "heun" (2, order two), or "renoise": jump to x̂₀ and
                noise it again to the next time, with noise (1−β)·x₁ + β·fresh (the reference's
                stochastic sampler; the mixture has unit variance only at β = 0 and β = 1).
    start       a number, or one time per row (B,); re-noising with β < 1 takes `noise` for x₁, whatever it is.
    trajectory  also return the path, (steps+1, B, …).
    Raises ValueError for an unknown solver or fewer than one step.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose from {', '.join(SOLVERS)}")
    if steps < 1 or steps != int(steps):
        raise ValueError(f"a sampler takes at least one whole step, not {steps}")
    start = torch.as_tensor(start, dtype=noise.dtype, device=noise.device).expand(len(noise))
    x, path = noise, [noise]
    for i in range(int(steps)):
        t, s = start * (1 - i / steps), start * (1 - (i + 1) / steps)  # (B,), t > s
        dt = broadcast(t - s, x)
        v = net(x, t, cond)
        if solver == "euler":
            x = x - dt * v
        elif solver == "heun":
            x = x - dt * (v + net(x - dt * v, s, cond)) / 2
        else:
            fresh = randn_like(x, generator)
            x = interpolate(x - broadcast(t, x) * v, (1 - beta) * noise + beta * fresh, s)
        path.append(x)
    return (x, torch.stack(path)) if trajectory else x


# ═══ 3. Conditions and guidance ═════════════════════════════════════════════════════════════
# A condition `cond` is a tensor of tokens (B,L): class labels, attributes, or the words of a sentence, from 1 on, and
# 0 where nothing is said. All zeros, or None, is unconditional.


def refuse(cond):
    """An unconditional network says so, rather than ignore the condition it is given."""
    if cond is not None:
        raise ValueError("this network is unconditional: call it with cond=None")


def check_tokens(cond, shape, words):
    """Raise ValueError unless a condition (B,L) has integers of that shape and, as far as a CPU sees, up to `words`."""
    good = not cond.is_floating_point() and cond.shape == shape
    require(good, f"a condition is whole numbers of shape {tuple(shape)}, not {cond.dtype} {tuple(cond.shape)}")
    # Values are looked at on a CPU only, for a GPU would be kept waiting: there an unknown token passes for another,
    # or at the last place stops the program.
    low, high = cond.aminmax() if cond.device.type == "cpu" and cond.numel() else (0, 0)
    require(low >= 0 and high <= words, f"tokens lie between 0 and {words}, not between {low} and {high}")


def guided(net, scale):
    """Classifier-free guidance (Ho & Salimans, 2022): the velocity v(x,t) + w·(v(x,t,c) − v(x,t)), w = `scale`.

    It is called as networks are, with x (B,…), t (B,) and a condition (B,L), without which it raises ValueError, and
    makes one pass of 2B rows. w = 1 is the conditional velocity, w = 0 the unconditional one. At each t the score of v
    is that of p_t(x)^(1−w)·p_t(x|c)^w; these are not the marginals of one flow, so that following v from noise does
    not sample the tilted p₀. As a teacher it has no weights: give `distill` student=net as well. That student knows
    the conditions it was given and no more: the velocity without any is its teacher's affair.
    """

    def velocity(x, t, cond=None):
        require(cond is not None and len(cond) == len(x), "guidance needs a condition for every row")
        given, free = net(*(torch.cat([a, a]) for a in (x, t)), torch.cat([cond, 0 * cond])).chunk(2)
        return free + scale * (given - free)

    return velocity


def drop(cond, share, generator=None):
    """The condition (B,L) with that share of its rows set to zero, so that a network learns to do without it."""
    return cond * (torch.rand(len(cond), 1, generator=generator, device=cond.device) >= share)


# ═══ 4. Ground truth: the Gaussian mixture ══════════════════════════════════════════════════


class GaussianMixture(nn.Module):
    """Σ_k w_k N(μ_k, s²I) in d dimensions, with its exact density and velocity at every t.

    It is called like a network, `mixture(x, t)`, and so can be a teacher. With a label from 1 on for each component,
    `labels` (K,), there is the mixture of one label too, exact as well: a `cond` (B,1) names it, 0 and None are all.
    """

    def __init__(self, means, std, weights=None, labels=None):
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.get_default_dtype())  # (K,d)
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        self.register_buffer("means", means)
        self.register_buffer("weights", (weights / weights.sum()).to(means))  # (K,)
        self.std = float(std)
        self.register_buffer("labels", None if labels is None else torch.as_tensor(labels))  # (K,)
        self.arch = dict(name="GaussianMixture", means=means.tolist(), std=self.std, weights=self.weights.tolist())
        self.arch |= {} if labels is None else dict(labels=self.labels.tolist())

    def sample(self, n, generator=None, stratified=False):
        """Draw x₀ (n,d) and the component (n,) of each; stratified: every component its share."""
        if stratified:
            where = (torch.arange(n, device=self.means.device) + 0.5) / n
            k = torch.searchsorted(self.weights.cumsum(0), where).clamp(max=len(self.weights) - 1)
        else:
            k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        x0 = self.means[k]
        return x0 + self.std * randn_like(x0, generator), k

    def log_joint(self, x, t, cond=None):
        """log w_k N(x; (1−t)μ_k, σ_t²I), shape (B,K), with σ_t² = (1−t)²s² + t²; −∞ where the label is another."""
        var = ((1 - t) * self.std) ** 2 + t**2  # (B,)
        means = (1 - t)[:, None, None] * self.means  # (B,K,d)
        square = (x[:, None] - means).square().sum(-1)  # (B,K)
        joint = self.weights.log() - square / (2 * var[:, None]) - x.shape[1] / 2 * (2 * math.pi * var[:, None]).log()
        if cond is None:
            return joint
        refuse(cond if self.labels is None else None)
        check_tokens(cond, (len(x), 1), self.labels.max())
        return joint.where((cond == 0) | (cond == self.labels), -math.inf)

    def log_density(self, x, t, cond=None):
        """log p_t(x), shape (B,); with a label, log of p_t(x|c) but for a constant, its share of the weights."""
        return self.log_joint(x, t, cond).logsumexp(1)

    def forward(self, x, t, cond=None):
        """The marginal velocity v*(x,t) = E[x₁ − x₀ | x_t = x], shape (B,d).

        With responsibilities γ_k and their mean μ̄ = Σ γ_k μ_k, the sum over components
        Σ γ_k [−μ_k + (t − (1−t)s²)/σ_t² · (x − (1−t)μ_k)] collapses to the line returned.
        """
        mean = self.log_joint(x, t, cond).softmax(1) @ self.means  # (B,d)
        t = t[:, None]
        var = ((1 - t) * self.std) ** 2 + t**2
        return ((t - (1 - t) * self.std**2) * x - t * mean) / var

    def flow_map(self, x, t, steps=200, cond=None):
        """f*(x,t): follow v* from (x,t) down to t = 0 with a fine Heun solver, (B,d)."""
        return sample(self, x, steps, "heun", cond, start=t)


# ═══ 5. Settings ════════════════════════════════════════════════════════════════════════════


def option(default, text, **extra):
    """A dataclass field that carries its own help text (the scripts turn fields into flags)."""
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class TeacherSettings:
    """How the rectified-flow teacher is trained."""

    teacher_steps: int = option(1500, "updates of the teacher")
    teacher_batch: int = option(512, "rows per update")
    teacher_lr: float = option(4e-3, "AdamW learning rate: 50 updates up, then a cosine down to 0")
    teacher_drop: float = option(0.1, "share of rows that lose their condition, if there is one: guidance needs both")

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(value > 0 or name == "teacher_drop", f"{name} must be positive, not {value}")
        require(0 <= self.teacher_drop < 1, f"teacher_drop must lie in [0,1), and is {self.teacher_drop}")


LOSSES = ("consistency", "adv", "self", "bi")


@dataclass(frozen=True)
class Phase:
    """One stretch of distillation. The defaults are the paper's method with the reference's weights."""

    steps: int = option(2500, "updates of the student", flag="student-steps")
    batch: int = option(512, "rows per update", flag="student-batch")
    lr: float = option(
        4e-3, "AdamW learning rate of the student: 50 updates up, then a cosine down to 0", flag="student-lr"
    )
    lr_disc: float = option(1e-3, "AdamW learning rate of the discriminator, constant")
    lambda_consistency: float = option(1.0, "weight of the truncated consistency loss")
    lambda_adv: float = option(0.1, "weight of the adversarial loss")
    lambda_self: float = option(0.1, "weight of the self-correction loss")
    lambda_bi: float = option(0.1, "weight of the bidirectional consistency loss")
    warmup_adv: int = option(0, "updates before the adversarial loss is switched on")
    warmup_self: int = option(0, "updates before the self-correction loss is switched on")
    warmup_bi: int = option(0, "updates before the bidirectional loss is switched on")
    delta: float = option(0.1, "window δ: the neighbour lies at most so far along the path")
    tau: float = option(0.4, "truncation τ: below it the consistency target is the data itself")
    distance: str = option("huber", "distance of the consistency losses", choices=("huber", "squared"))
    self_source: str = option(
        "student", "network whose one-step sample is x̂₀ in self-correction", choices=("student", "ema", "frozen")
    )
    self_form: str = option(
        "x0", "compare landing points, or velocities (the same loss over t²)", choices=("x0", "velocity")
    )
    at_one: float = option(0.0, "share of the batch pinned at t = 1")
    adversarial: str = option("hinge", "adversarial loss", choices=("hinge", "softplus"))
    r1: float = option(0.0, "γ of the R1 penalty γ/2·‖∇D(x₀)‖²; 0 is off")
    r1_every: int = option(1, "apply R1 every so many updates, so many times as strongly")
    target_ema: float = option(0.9, "decay of the consistency target θ⁻")
    ema: float = option(0.9999, "cap on the decay of the sampling average, which grows with the updates (`growing`)")

    def __post_init__(self):
        for name in ("steps", "batch", "lr", "lr_disc", "delta", "r1_every"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("steps", "batch", "r1_every"):
            require(
                float(getattr(self, name)).is_integer(), f"{name} must be a whole number, not {getattr(self, name)}"
            )
        for name in (*(f"lambda_{k}" for k in LOSSES), "warmup_adv", "warmup_self", "warmup_bi", "r1"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, and is {getattr(self, name)}")
        for name in ("delta", "tau", "at_one", "target_ema", "ema"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie in [0,1], and is {getattr(self, name)}")
        for name, f in self.__dataclass_fields__.items():
            choices = f.metadata.get("choices", (getattr(self, name),))
            require(getattr(self, name) in choices, f"{name} is {getattr(self, name)!r}, not one of {choices}")
        require(self.r1 == 0 or self.lambda_adv > 0, "r1 regularises the critic, and lambda_adv = 0 leaves none")
        for name in ("adv", "self", "bi"):
            late = getattr(self, f"lambda_{name}") > 0 and getattr(self, f"warmup_{name}") >= self.steps
            require(not late, f"warmup_{name} is as long as the phase: its loss would never be switched on")
        require(any(self.weights(0).values()), "every loss has weight zero at the start: nothing would be learned")

    def pinned(self, n):
        """How many of n rows are pinned at t = 1; they are the first."""
        return round(self.at_one * n)

    def weights(self, step):
        """The weight of each loss at this update of the phase; a warm-up is a weight that starts late."""
        late = {"consistency": 0, "adv": self.warmup_adv, "self": self.warmup_self, "bi": self.warmup_bi}
        return {k: getattr(self, f"lambda_{k}") * (step >= late[k]) for k in LOSSES}


SCHEDULES = {
    # The paper's method: all four losses together, with the reference's weights, δ and τ.
    "paper": (Phase(steps=1100),),
    # This project's schedule: distil first, straighten last. Where the points x_t and x̂_t overlap,
    # consistency and self-correction ask one network for different values there, and a joint fit lands
    # in between. The last phase keeps the map at t = 1 and gives up the teacher's map in between, which
    # Euler sampling never visits (re-noising does). It needs neither teacher nor data for its main term.
    # In both phases the critic judges the rows that are pinned at t = 1, which costs no pass of its own.
    "two_phase": (
        Phase(steps=1000, lr=8e-3, lambda_self=0.0, lambda_bi=0.0, tau=0.0, delta=0.05, at_one=0.125),
        Phase(
            steps=150,
            lr=8e-3,
            lambda_consistency=0.0,
            lambda_bi=0.0,
            lambda_self=1.0,
            lambda_adv=0.02,
            self_source="frozen",
            self_form="velocity",
            at_one=0.5,
        ),
    ),
    # Here to show what the other losses repair: consistency alone, for as long as "paper".
    "consistency": (Phase(steps=2900, lambda_adv=0.0, lambda_self=0.0, lambda_bi=0.0, tau=0.0),),
}


def rescale(schedule, steps):
    """The schedule with `steps` updates in all, shared out as before, at least one a phase."""
    require(steps > 0, f"steps must be positive, not {steps}")
    total = sum(phase.steps for phase in schedule)
    return tuple(replace(p, steps=max(1, round(p.steps * steps / total))) for p in schedule)


# ═══ 6. Networks ════════════════════════════════════════════════════════════════════════════
# All are called `net(x, t, cond=None) -> v`, discriminators `disc(x, cond=None) -> (B,)`.


class Condition(nn.Module):
    """Tokens (B,L) → [their vectors (B,L,dim)], one for every word at every place, zero where there is none.

    tokens  (L, number of words), or None for an unconditional network, which refuses a condition.
    The list is empty for an unconditional network: what is not there costs nothing.
    """

    def __init__(self, tokens, dim, std=0.02):
        super().__init__()
        self.tokens = tokens and tuple(tokens)
        if tokens:
            length, words = tokens
            self.table = nn.Embedding(1 + length * words, dim, padding_idx=0)
            nn.init.normal_(self.table.weight[1:], std=std)
            self.register_buffer("places", words * torch.arange(length), persistent=False)  # (L,)

    def forward(self, cond, x):
        """[(B,L,dim)] for the rows of `x`, or []. Raises ValueError for a wrong length and for unknown tokens."""
        if not self.tokens:
            refuse(cond)
            return []
        length, words = self.tokens
        cond = torch.zeros(len(x), length, dtype=torch.int64, device=x.device) if cond is None else cond
        check_tokens(cond, (len(x), length), words)
        return [self.table((cond + self.places) * (cond > 0))]


class MLP(nn.Module):
    """Velocity network for points (B,dim): a plain perceptron on Fourier features of x and t."""

    def __init__(self, dim=2, width=128, depth=3, x_frequencies=3, t_frequencies=4, tokens=None):
        super().__init__()
        self.arch = dict(
            name="MLP", dim=dim, width=width, depth=depth, x_frequencies=x_frequencies, t_frequencies=t_frequencies
        )
        self.arch |= dict(tokens=list(tokens)) if tokens else {}
        # Frequencies π/4·(1, 2, …) suit data of unit size: without them sharp edges are learned slowly.
        self.register_buffer("x_freqs", math.pi / 4 * 2.0 ** torch.arange(x_frequencies), persistent=False)
        self.register_buffer("t_freqs", math.pi / 2 * torch.arange(1.0, t_frequencies + 1), persistent=False)
        self.words = Condition(tokens, width)
        sizes = [dim * (1 + 2 * x_frequencies) + 2 * t_frequencies + width * bool(tokens)] + [width] * depth
        layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x, t, cond=None):
        """Velocity (B,dim) at points (B,dim) and times (B,)."""
        a, b = (x[..., None] * self.x_freqs).flatten(1), t[:, None] * self.t_freqs
        words = [e.sum(1) for e in self.words(cond, x)]
        return self.layers(torch.cat([x, a.sin(), a.cos(), b.sin(), b.cos(), *words], 1))

    def flops(self):
        """Multiply-adds of one forward pass of one row, counted twice each."""
        return sum(2 * m.in_features * m.out_features for m in self.layers if isinstance(m, nn.Linear))


def projected(logits, features, embeddings):
    """A critic's logits (B,) plus features (B,D) · vectors of the words [(B,L,D)] or [] (Miyato & Koyama, 2018).

    For words that x determines each on its own, log p(c|x) is such a sum over the words. What only their combination
    says it cannot tell: "A left of B" and "B right of A" together weigh as much as "B left of A" and "A right of B".
    """
    return sum(((features * e.sum(1)).sum(1) for e in embeddings), start=logits)


class PointDiscriminator(nn.Module):
    """Critic for points (B,dim): a plain perceptron, one logit each. Kinks let it follow the edges of the data."""

    def __init__(self, dim=2, width=64, depth=3, tokens=None):
        super().__init__()
        self.arch = dict(name="PointDiscriminator", dim=dim, width=width, depth=depth)
        self.arch |= dict(tokens=list(tokens)) if tokens else {}
        self.words = Condition(tokens, width)
        sizes = [dim] + [width] * depth
        layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x, cond=None):
        """Logits (B,), large for data."""
        *hidden, head = self.layers
        for layer in hidden:
            x = layer(x)
        return projected(head(x)[:, 0], x, self.words(cond, x))

    flops = MLP.flops  # counted alike


def mixed_precision(forward):
    """Let a network's forward pass compute in its `.precision`; weights, input and output stay as they are."""

    @functools.wraps(forward)
    def wrapped(net, x, *args, **kwargs):
        if net.precision == torch.float32:
            return forward(net, x, *args, **kwargs)
        with torch.autocast(x.device.type, net.precision):
            return forward(net, x, *args, **kwargs).to(x.dtype)

    return wrapped


def timestep_embedding(t, dim):
    """Sinusoids of 1000·t at `dim`/2 frequencies from 1 to 1/10000, (B,) → (B,dim)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = 1000 * t[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


def sincos_positions(h, w, dim):
    """Fixed 2-D positions: half of the channels encode the row, half the column, (h·w, dim)."""
    freqs = 1 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * freqs, cols.reshape(-1, 1) * freqs], 1)  # (hw, dim/2)
    return torch.cat([angles.sin(), angles.cos()], 1)


def modulate(x, shift, scale):
    """Shift and scale every token (B,N,D) by the vectors (B,D) of its sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Transformer block whose norms and residual gates are set by the time embedding (adaLN-Zero)."""

    def __init__(self, dim, heads, ratio):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(approximate="tanh"), nn.Linear(ratio * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        zero(self.modulation)  # gates start at 0: at first every block is the identity

    def forward(self, x, c):
        """Tokens (B,N,D) and embedding (B,D) → tokens (B,N,D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, 1)
        qkv = self.qkv(modulate(self.norm1(x), shift1, scale1))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + gate1[:, None] * self.proj(y)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


def zero(layer):
    """Start a linear layer at the zero map."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def patchify(x, p):
    """Latents (B,C,H,W) → tokens (B, H/p·W/p, p·p·C)."""
    if x.shape[-2] % p or x.shape[-1] % p:
        raise ValueError(f"patches of {p} do not tile latents of {tuple(x.shape[-2:])}: both sides must be multiples")
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(tokens, p, h, w):
    """Tokens (B, H/p·W/p, p·p·C) → latents (B,C,H,W), for H = `h` and W = `w`."""
    if h % p or w % p or tokens.shape[1] * p * p != h * w or tokens.shape[2] % (p * p):
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} are not patches of {p} that tile {(h, w)}")
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=h // p, p=p, q=p)


class DiT(nn.Module):
    """Diffusion transformer (Peebles & Xie, 2023) as a velocity network for latents (B,C,H,W)."""

    precision = torch.float32  # of the computation; torch.bfloat16 where the device is fast at it

    def __init__(self, shape=(4, 32, 32), patch=2, dim=384, depth=12, heads=6, ratio=4, tokens=None):
        super().__init__()
        c, h, w = shape
        require(h % patch == 0 and w % patch == 0, f"patches of {patch} do not tile latents of {(h, w)}")
        require(dim % heads == 0 and dim % 4 == 0, f"dim {dim} must be a multiple of heads ({heads}) and of 4")
        self.arch = dict(name="DiT", shape=list(shape), patch=patch, dim=dim, depth=depth, heads=heads, ratio=ratio)
        self.arch |= dict(tokens=list(tokens)) if tokens else {}
        self.words = Condition(tokens, dim, 1.0)
        self.shape, self.patch = tuple(shape), patch
        self.embed = nn.Linear(patch * patch * c, dim)
        self.register_buffer("positions", sincos_positions(h // patch, w // patch, dim), persistent=False)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation, self.head = nn.Linear(dim, 2 * dim), nn.Linear(dim, patch * patch * c)
        zero(self.modulation)
        zero(self.head)  # the untrained network is the zero map

    @mixed_precision
    def forward(self, x, t, cond=None):
        """Velocity (B,C,H,W) at latents (B,C,H,W) and times (B,)."""
        require(x.shape[1:] == self.shape, f"this network takes latents {self.shape}, not {tuple(x.shape[1:])}")
        h = self.embed(patchify(x, self.patch)) + self.positions  # (B,N,D)
        c, words = self.time(timestep_embedding(t, 256).to(x.dtype)), self.words(cond, x)  # (B,D), [(B,L,D)]
        h = torch.cat([h, *words], 1) if words else h  # words are tokens like patches
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(F.silu(c)).chunk(2, 1)
        h = h[:, : len(self.positions)] if words else h
        return unpatchify(self.head(modulate(self.norm(h), shift, scale)), self.patch, *self.shape[1:])

    def flops(self):
        """Multiply-adds of one forward pass of one sample, counted twice each (norms and the like left out)."""
        a, d, n = self.arch, self.arch["dim"], len(self.positions)
        patches = 2 * 2 * n * self.embed.in_features * d  # in and out
        m = n + self.arch.get("tokens", [0])[0]
        tokens = 2 * m * (4 + 2 * a["ratio"]) * d * d + 2 * 2 * m * m * d  # projections, MLP; q·k and a·v
        return patches + a["depth"] * (tokens + 2 * 6 * d * d) + 2 * (256 * d + d * d + 2 * d * d)


class LatentDiscriminator(nn.Module):
    """Critic for latents (B,C,H,W): residual convolutions down to a side of 4, then one logit from all places.

    Group norm, never batch statistics, so that real and fake rows may share a pass.
    """

    precision = torch.float32  # as in DiT

    def __init__(self, shape=(4, 32, 32), width=64, tokens=None):
        super().__init__()
        require(width % 8 == 0, f"width {width} must be a multiple of 8, the number of norm groups")
        self.arch = dict(name="LatentDiscriminator", shape=list(shape), width=width)
        self.arch |= dict(tokens=list(tokens)) if tokens else {}
        c, h, w = shape
        self.stem, self.stages = nn.Conv2d(c, width, 3, padding=1), nn.ModuleList()
        while min(h, w) > 4:
            out = min(2 * width, 512)
            self.stages.append(nn.ModuleList([DiscBlock(width, out), nn.AvgPool2d(2, ceil_mode=True)]))
            width, h, w = out, (h + 1) // 2, (w + 1) // 2
        # A mean over places would not know a mouth from a mouth on the forehead.
        self.last, self.head = DiscBlock(width, width), nn.Linear(width * h * w, 1)
        self.words = Condition(tokens, width * h * w)

    @mixed_precision
    def forward(self, x, cond=None):
        """Logits (B,), large for data."""
        h = self.stem(x)
        for block, pool in self.stages:
            h = pool(block(h))
        h = F.leaky_relu(self.last(h), 0.2).flatten(1)
        return projected(self.head(h)[:, 0], h, self.words(cond, x))

    def flops(self):
        """Multiply-adds of the convolutions of one forward pass of one sample, counted twice each."""
        c, h, w = self.arch["shape"]
        total = 2 * 9 * c * self.arch["width"] * h * w + 2 * self.head.in_features
        for block in [*(block for block, _ in self.stages), self.last]:
            a, b = block.conv2.in_channels, block.conv1.in_channels
            total += 2 * h * w * a * (9 * a + 9 * b + b * (a != b))
            h, w = (h + 1) // 2, (w + 1) // 2  # pooled, except after the last
        return total


class DiscBlock(nn.Module):
    """Two 3×3 convolutions around a 1×1 skip, pre-activated."""

    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, a), nn.GroupNorm(8, b)
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x):
        """(B,a,H,W) → (B,b,H,W)."""
        h = self.conv1(F.leaky_relu(self.norm1(x), 0.2))
        h = self.conv2(F.leaky_relu(self.norm2(h), 0.2))
        return (self.skip(x) + h) / math.sqrt(2)


NETWORKS = {c.__name__: c for c in (MLP, DiT, GaussianMixture, PointDiscriminator, LatentDiscriminator)}


def build(arch):
    """A network with fresh weights from its `arch` dictionary (as stored in checkpoints)."""
    require(arch.get("name") in NETWORKS, f"unknown architecture {arch.get('name')!r}; add it to scflow.NETWORKS")
    try:
        return NETWORKS[arch["name"]](**{k: v for k, v in arch.items() if k != "name"})
    except TypeError as error:
        raise ValueError(f"the architecture {arch} does not fit scflow.{arch['name']}: {error}") from None


# ═══ 7. Losses ══════════════════════════════════════════════════════════════════════════════
# One function per term. They take predictions and targets, never networks, and return a scalar.


def pseudo_huber(a, b, c=0.01):
    """√(d²+c²) − c, element-wise and averaged: squared for differences below c, absolute above."""
    return (((a - b) ** 2 + c**2).sqrt() - c).mean()


def squared(a, b):
    """Mean squared difference of the elements."""
    return ((a - b) ** 2).mean()


DISTANCES = {"huber": pseudo_huber, "squared": squared}


def flow_matching_loss(v, x0, x1):
    """E ‖v(x_t,t) − (x₁ − x₀)‖² per element: the teacher's loss."""
    return squared(v, x1 - x0)


def truncated_consistency_loss(f_t, f_s, x0, s, tau, distance=pseudo_huber):
    """D(f_θ(x_t,t), f_θ⁻(x_s,s)) with 0 ≤ s ≤ t, where the true x₀ replaces the target if s < τ."""
    return distance(f_t, torch.where(broadcast(s, x0) < tau, x0, f_s))


def bidirectional_loss(f_t, f_u, distance=pseudo_huber):
    """D(f_θ(x_t,t), f_θ⁻(x_u,u)) with t ≤ u ≤ 1; never truncated."""
    return distance(f_t, f_u)


def self_correction_loss(prediction, target):
    """‖f_θ(x̂_t,t) − x̂₀‖² per element (the paper's reflow term), or in velocities ‖v(x̂_t,t) − (x₁ − x̂₀)‖².

    f_θ(x̂_t,t) − x̂₀ = t·((x₁ − x̂₀) − v): the second is the first over t². The target is a constant.
    """
    return squared(prediction, target.detach())  # x̂₀ teaches the later steps and is not taught by them


def adversarial_loss(fake, kind="hinge"):
    """What the student minimises, given the critic's logits (B,) on x̂₀ = f_θ(x₁,1)."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real, fake, kind="hinge"):
    """What the critic minimises, given its logits (B,) on x₀ and on x̂₀.

    At the best critic, sign(p−q), the hinge loss is 2(1 − TV(p,q)).
    """
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(real, x0):
    """½·E ‖∇D(x₀)‖², from the logits `real` (B,) that a critic gave to data `x0` that requires a gradient."""
    (grad,) = torch.autograd.grad(real.sum(), x0, create_graph=True)  # the penalty itself is differentiated
    return grad.flatten(1).square().sum(1).mean() / 2


def distill_losses(nets, x0, x1, t, phase, weights, generator=None, cond=None):
    """All losses of the student for one draw of x₀, x₁ (B,…) and t (B,), with as few passes as their order allows.

    nets     has .teacher, .student, .target, .disc, and .source, whose one-step sample is x̂₀ when
             `phase.self_source` is not the student itself.
    t        its first `phase.pinned(B)` values must be 1.
    weights  {name: λ}; a loss whose weight is zero costs nothing and is not returned.
    Returns ({name: scalar}, the one-step samples that the critic has judged, or None).
    """
    losses, one, fake = {}, torch.ones_like(t), None
    terms = [name for name in ("consistency", "bi") if weights[name] > 0]
    own_source = phase.self_source == "student"
    pinned = phase.pinned(len(t))
    # Rows pinned at t = 1 are one-step samples, and serve the critic, unless the student needs x̂₀ of every row.
    every_row, others = weights["self"] > 0 and own_source, len(terms) + weights["self"] > 0
    shared = weights["adv"] > 0 and pinned > 0 and others and not every_row
    one_step = (weights["adv"] > 0 and not shared) or every_row

    if terms:  # targets: what θ⁻ says at the neighbours s < t and u > t on the teacher's path
        distance, xt = DISTANCES[phase.distance], interpolate(x0, x1, t)
        with torch.no_grad():  # a target is a constant: neither the teacher nor θ⁻ learns through it
            v = nets.teacher(xt, t, cond)
            # Both are drawn whichever is used: switching one loss off leaves all other draws as they were.
            s = t - rand_like(t, generator) * t.clamp(max=phase.delta)
            u = t + rand_like(t, generator) * (1 - t).clamp(max=phase.delta)
            ends = [{"consistency": s, "bi": u}[name] for name in terms]
            points = [xt + broadcast(r - t, xt) * v for r in ends]  # one Euler step of the teacher
            f_ends = predict_x0(nets.target, torch.cat(points), torch.cat(ends), repeat(cond, len(ends)))
            f_ends = dict(zip(terms, f_ends.chunk(len(ends))))

    # The student at the current point (x_t,t) and at the noise (x₁,1): one pass if both need a gradient.
    if terms and one_step and weights["adv"] > 0:
        both = predict_x0(nets.student, torch.cat([xt, x1]), torch.cat([t, one]), repeat(cond, 2))
        f_t, x0_hat = both.chunk(2)
    else:
        f_t = predict_x0(nets.student, xt, t, cond) if terms else None
        with torch.set_grad_enabled(weights["adv"] > 0):  # self-correction alone takes x̂₀ as a constant
            x0_hat = predict_x0(nets.student, x1, one, cond) if one_step else None

    if weights["consistency"] > 0:
        losses["consistency"] = truncated_consistency_loss(f_t, f_ends["consistency"], x0, s, phase.tau, distance)
    if weights["bi"] > 0:
        losses["bi"] = bidirectional_loss(f_t, f_ends["bi"], distance)
    if weights["self"] > 0:
        with torch.no_grad():  # stop-gradient: x̂₀ is fixed, both as the target and inside x̂_t
            x0_fix = x0_hat.detach() if own_source else predict_x0(nets.source, x1, one, cond)
        xt_hat = interpolate(x0_fix, x1, t)  # the same x₁ that x̂₀ came from
        v_hat = nets.student(xt_hat, t, cond)
        f_hat = xt_hat - broadcast(t, xt_hat) * v_hat
        pair = (f_hat, x0_fix) if phase.self_form == "x0" else (v_hat, x1 - x0_fix)
        losses["self"] = self_correction_loss(*pair)
    if weights["adv"] > 0:
        fake = (f_hat if weights["self"] > 0 else f_t)[:pinned] if shared else x0_hat
        losses["adv"] = adversarial_loss(nets.disc(fake, head(cond, len(fake))), phase.adversarial)
    return losses, fake


def repeat(cond, times):
    """The condition for a batch that was stacked `times` times."""
    return None if cond is None else cond.repeat(times, *[1] * (cond.ndim - 1))


def head(cond, n):
    """The condition of the first n rows."""
    return None if cond is None else cond[:n]


# ═══ 8. Averages of the weights ═════════════════════════════════════════════════════════════


@torch.no_grad()  # an average is updated by hand, never by an optimiser
def ema_update(average, net, decay):
    """average ← decay·average + (1−decay)·net, buffers included; bitwise `net` at decay 0, untouched at 1."""
    if decay == 1:
        return
    pairs = list(zip(*([*n.parameters(), *n.buffers()] for n in (average, net))))
    torch._foreach_lerp_(*zip(*(pair for pair in pairs if pair[0].is_floating_point())), 1 - decay)
    for a, b in pairs:
        if not a.is_floating_point():  # counters and the like cannot be averaged
            a.copy_(b)


def growing(step, decay):
    """Decay of a sampling average after `step` updates: it remembers the last fiftieth of them, up to the cap `decay`.

    3,300 updates reach 0.985; a cap of 0.9999 is reached after half a million.
    """
    return min(decay, 1 - 50 / (50 + step))


# ═══ 9. Training loops ══════════════════════════════════════════════════════════════════════
# Both are generators: they yield the State after each update, and leave printing, drawing and
# saving to whoever iterates.


class State:
    """A run at one moment: .step, .losses by name, .grad_norms, .generator, and its parts by name.

    The parts are what is saved: networks and optimisers.
    """

    def __init__(self, generator, **parts):
        self.step, self.latest, self.grad_norms, self.generator, self.parts = 0, {}, {}, generator, parts
        self.__dict__.update(parts)  # run.student is run.parts["student"]

    @property
    def losses(self):
        """The losses of the latest update by name, as numbers (asking waits until the device has them)."""
        return {name: value.item() for name, value in self.latest.items()}

    def state_dict(self):
        """Everything the run needs to go on bit for bit. Raises FloatingPointError where weights are not finite."""
        for name, part in self.parts.items():
            if isinstance(part, nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
                raise FloatingPointError(f"the weights of the {name} are no longer finite at step {self.step}")
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"step": self.step, "generator": self.generator.get_state(), "parts": parts}

    def load_state_dict(self, saved):
        """Take up a run where `state_dict` left it. Raises ValueError if it was another kind of run."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved["parts"][name])
        except (KeyError, RuntimeError, ValueError):  # a part is missing, or has other shapes
            raise ValueError("the saved state is of another kind of run, or of another architecture") from None
        self.step = saved["step"]
        self.generator.set_state(saved["generator"].cpu())

    def record(self, losses, also=False):
        """Keep the losses of this update, beside those it has with `also`.

        Raises FloatingPointError, naming the loss and the step, if one is not finite; on a GPU, which must not
        be kept waiting for a look at every update, this is noticed at every 50th.
        """
        self.latest = (self.latest if also else {}) | {name: value.detach() for name, value in losses.items()}
        if self.generator.device.type == "cuda" and self.step % 50:
            return
        for name, value in self.losses.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} loss became {value} at step {self.step + 1}")


def clone(net, train=False):
    """A copy of the network, frozen unless it is to be trained."""
    return copy.deepcopy(net).requires_grad_(train).train(train)


def adamw(net, lr, betas=(0.9, 0.999)):
    """AdamW without decay, fused where every torch from 2.4 on has that."""
    fused = next(net.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(net.parameters(), lr, betas, weight_decay=0.0, fused=fused)


def lr_factor(i, steps):
    """Learning-rate factor of update i: up along a line for 50 updates, down to 0 along a cosine."""
    return min(1, (i + 1) / 50) * (1 + math.cos(math.pi * i / steps)) / 2


def train_teacher(net, batch, generator, settings=TeacherSettings(), oracle=None, resume=None):
    """Rectified flow: regress v_φ(x_t,t) on x₁ − x₀. Yields a State (.net, .ema, .opt, .losses) per update.

    net     is trained in place.
    batch   callable (n, generator) → (x₀, cond or None).
    oracle  a known velocity field to regress on instead (its noise-free targets need fewer steps).
    resume  an earlier State's `state_dict()`.
    """
    run = State(generator, net=net, ema=clone(net), opt=adamw(net, settings.teacher_lr))
    oracle = oracle and torch.no_grad()(functools.partial(oracle))  # known, and not to be trained
    if resume:
        run.load_state_dict(resume)
    while run.step < settings.teacher_steps:
        run.opt.param_groups[0]["lr"] = settings.teacher_lr * lr_factor(run.step, settings.teacher_steps)
        x0, cond = batch(settings.teacher_batch, generator)
        x1, t = randn_like(x0, generator), rand_like(x0.flatten(1)[:, 0], generator)
        xt, cond = interpolate(x0, x1, t), cond if cond is None else drop(cond, settings.teacher_drop, generator)
        v = net(xt, t, cond)
        loss = squared(v, oracle(xt, t, cond)) if oracle is not None else flow_matching_loss(v, x0, x1)
        run.record({"flow": loss})
        run.opt.zero_grad()
        loss.backward()
        run.opt.step()
        ema_update(run.ema, net, growing(run.step, 0.9999))
        run.step += 1
        yield run


def distill(
    teacher, disc, batch, generator, schedule=SCHEDULES["paper"], student=None, *,
    resume=None, norms_every=0, loss_function=distill_losses, prepare=None,
):  # fmt: skip
    """Self-corrected flow distillation. Yields a State per update, with .student, .target, .ema, .disc, .losses.

    teacher        any callable (x, t, cond) → v. A network is copied and frozen; another callable is used as it is.
    disc           critic, trained in place.
    schedule       tuple of Phases, run one after the other.
    student        where the student starts (it is copied); without it, from the teacher's weights.
    resume         an earlier State's `state_dict()`.
    norms_every    every so many updates, measure the gradient norm of each weighted loss (.grad_norms).
    loss_function  `distill_losses`, or your function around it.
    prepare        called once with each network that the updates run, bar the average: nn.Module.compile, say.
    Raises ValueError for contradictory phases, and for a teacher without weights and no student.
    """
    check_schedule(schedule)
    trainable = isinstance(teacher, nn.Module) and any(p.numel() for p in teacher.parameters())
    advice = "pass student=, a network regressed on it by train_teacher(oracle=teacher)"
    require(trainable or student is not None, f"this teacher has no weights to start a student from: {advice}")
    student = clone(teacher if student is None else student, train=True)
    target, ema, frozen = clone(student), clone(student), clone(student)
    # The critic's betas are short: what it learned of earlier samples is soon out of date.
    opt, opt_disc = adamw(student, schedule[0].lr), adamw(disc, schedule[0].lr_disc, (0.5, 0.99))
    run = State(
        generator, student=student, target=target, ema=ema, frozen=frozen, disc=disc, opt=opt, opt_disc=opt_disc
    )
    # What follows is not saved. The teacher is frozen: the paths that the targets follow must not move.
    run.teacher = clone(teacher) if isinstance(teacher, nn.Module) else teacher
    run.loss_function = loss_function
    if resume:
        run.load_state_dict(resume)
    prepared = (run.teacher, *run.parts.values()) if prepare else ()
    for net in (part for part in prepared if isinstance(part, nn.Module) and part is not ema):
        prepare(net)
    start = 0
    for phase in schedule:
        run.source = {"student": student, "ema": ema, "frozen": frozen}[phase.self_source]
        while run.step < start + phase.steps:
            if run.step == start > 0:
                # The average, better than the weights it averages, becomes the new start, the new target and
                # the frozen source of x̂₀. Adam's moments belong to other losses, and go; the critic stays.
                for net in (student, target, frozen):
                    net.load_state_dict(ema.state_dict())
                run.opt.state.clear()
            distill_step(run, phase, run.step - start, batch, norms_every)
            run.step += 1
            yield run
        start += phase.steps


def distill_step(run, phase, i, batch, norms_every=0):
    """Update i of a phase: the student on all its losses, the two averages, the critic."""
    run.opt.param_groups[0]["lr"] = phase.lr * lr_factor(i, phase.steps)
    run.opt_disc.param_groups[0]["lr"] = phase.lr_disc
    x0, cond = batch(phase.batch, run.generator)
    x1, t = randn_like(x0, run.generator), rand_like(x0.flatten(1)[:, 0], run.generator)
    t[: phase.pinned(len(t))] = 1

    run.disc.requires_grad_(False)  # the student's step must not touch the critic
    weights = phase.weights(i)
    losses, fake = run.loss_function(run, x0, x1, t, phase, weights, run.generator, cond)
    run.record(losses)
    measure = norms_every and run.step % norms_every == 0
    run.grad_norms = {k: grad_norm(weights[k] * v, run.student) for k, v in losses.items()} if measure else {}
    run.opt.zero_grad()
    sum(weights[k] * v for k, v in losses.items()).backward()
    run.opt.step()
    ema_update(run.target, run.student, phase.target_ema)
    ema_update(run.ema, run.student, growing(run.step, phase.ema))

    if fake is not None:
        run.disc.requires_grad_(True)
        fake = fake.detach()  # the critic's step must not touch the student
        real, cond = x0[: len(fake)], head(cond, len(fake))
        losses = disc_losses(run.disc, real, fake, phase, penalise=i % phase.r1_every == 0, cond=cond)
        run.record(losses, also=True)
        run.opt_disc.zero_grad()
        sum(losses.values()).backward()
        run.opt_disc.step()


def disc_losses(disc, real, fake, phase, penalise=True, cond=None):
    """The critic's losses on data and one-step samples (B,…), as {name: scalar}: adversarial, and R1 if asked."""
    logits = disc(torch.cat([real, fake]), repeat(cond, 2)).chunk(2)
    losses = {"disc": discriminator_loss(*logits, phase.adversarial)}
    if phase.r1 > 0 and penalise:
        real = real.detach().requires_grad_()  # R1 is a gradient with respect to the data
        eager = getattr(disc, "forward", disc)  # a compiled graph has no second derivative
        losses["r1"] = phase.r1 * phase.r1_every * r1_penalty(eager(real, cond), real)
    return losses


def distill_flops(net, disc, phase, step, guided=False):
    """FLOPs per row of update `step` of a phase, without R1; a backward pass costs two forward passes."""
    w, pinned, own = phase.weights(step), phase.at_one, phase.self_source == "student"
    terms = (w["consistency"] > 0) + (w["bi"] > 0)
    shared = w["adv"] > 0 and pinned > 0 and (terms or w["self"] > 0) and not (w["self"] > 0 and own)
    one_step = 0 if shared else 3 if w["adv"] > 0 else int(w["self"] > 0 and own)
    passes = (1 + guided + terms + 3) * (terms > 0) + one_step + (3 + (not own)) * (w["self"] > 0)
    judged = (pinned if shared else 1) * (w["adv"] > 0)  # forward and back to x̂₀; then the critic learns
    return passes * net.flops() + judged * (2 + 2 * 3) * disc.flops()


def grad_norm(loss, net):
    """Euclidean norm of the gradient of a scalar with respect to the network's parameters."""
    grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
    return sum(g.square().sum() for g in grads if g is not None).sqrt().item()


def check_schedule(schedule):
    """Raise ValueError where the phases contradict each other."""
    require(len(schedule) > 0, "a schedule needs at least one phase")
    first = schedule[0]
    require(
        first.self_source != "frozen" or first.lambda_self == 0,
        "self_source 'frozen' copies the phase before, and the first phase has none: use 'student' or 'ema'",
    )


# ═══ 10. Checkpoints ═════════════════════════════════════════════════════════════════════════

FORMAT = "scflow-1"


def save(path, net, **extra):
    """Write the network's weights and `extra` (tensors, numbers, strings, lists, dictionaries) atomically.

    A run killed at any moment leaves either the old file or the new one, whole.
    """
    net = getattr(net, "_orig_mod", net)  # of a compiled network, the plain one: its weights carry no prefix
    content = {"format": FORMAT, "arch": getattr(net, "arch", None), "weights": net.state_dict(), **extra}
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old file's name
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def read(path):
    """The dictionary `save` wrote, on the CPU. Raises ValueError if the file is missing, damaged or not ours."""
    require(os.path.isfile(path), f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:  # the system's own words are clear
        raise
    except Exception:  # on foreign bytes the unpickler raises nearly anything
        raise ValueError(f"{path} is truncated or not a checkpoint") from None
    known = isinstance(content, dict) and content.get("format") == FORMAT and {"arch", "weights"} <= content.keys()
    require(known, f"{path} is not a checkpoint of scflow ({FORMAT})")
    return content


def load(path, net=None, device="cpu"):
    """The network of a checkpoint, in eval mode, ready for `sample`.

    net   an instance to fill, for architectures that are not in NETWORKS.
    Raises ValueError if the file or its architecture does not fit.
    """
    content = read(path)
    net = build(content["arch"] or {}) if net is None else net
    try:
        net.load_state_dict(content["weights"])
    except RuntimeError:
        raise ValueError(f"{path} holds a network of another architecture ({content['arch']})") from None
    return net.to(device).eval().requires_grad_(False)


# ═══ 11. Measures ═══════════════════════════════════════════════════════════════════════════


def total_distance(x, rows=100):
    """Σ ‖x_i − x_j‖ over the pairs i < j of points (N,d).

    In 2-D a length is π/2 times the mean length of its projections, and of numbers in order the sum over pairs is
    Σ (2k−N+1)·x_k: a sort instead of N² distances. The mean is over 67 directions, a prime number, so that no
    symmetry of the data can be one of theirs; they make a norm within 2·10⁻⁴ of the Euclidean one.
    """
    if x.shape[1] == 2:
        angles = math.pi / 67 * torch.arange(67, device=x.device)
        projections = torch.stack([angles.cos(), angles.sin()], 1).to(x) @ x.T  # (67,N)
        ordered = np.sort(projections.cpu().numpy()).astype(np.float64)  # torch sorts far slower
        return math.pi / 2 * (ordered @ (2.0 * np.arange(len(x)) - len(x) + 1)).mean().item()
    total = 0.0
    for i, part in enumerate(x.split(rows)):  # blocks that stay in the cache
        total += torch.cdist(part, x[i * rows :]).sum(1).double().sum().item()
        total -= torch.cdist(part, part).sum(1).double().sum().item() / 2  # its pairs were counted twice
    return total


class EnergyDistance:
    """2E‖X−Y‖ − E‖X−X′‖ − E‖Y−Y′‖ to a fixed reference Y (M,d), unbiased: zero for equal laws, and it may be negative.

    strata (M,) says which stratum each reference row was drawn from, if it was drawn stratified;
    the self-term is then estimated per pair of strata, for within a stratum alone rows are iid.
    """

    def __init__(self, reference, strata=None):
        self.reference = reference
        strata = torch.zeros(len(reference), dtype=torch.int64) if strata is None else strata.cpu()
        parts = [reference[strata == k] for k in strata.unique()]
        require(all(len(p) > 1 for p in parts), "every stratum of the reference needs at least two rows")
        self.total, m = total_distance(reference), len(reference)
        # Of two strata all pairs count; within one, a row is no neighbour of itself.
        self.self_term = 2 / m**2 * (self.total + sum(total_distance(p) / (len(p) - 1) for p in parts))

    def __call__(self, x):
        """The distance of iid samples (N,d)."""
        n, m, within = len(x), len(self.reference), total_distance(x)
        between = total_distance(torch.cat([x, self.reference])) - within - self.total
        return 2 * between / (n * m) - 2 * within / (n * (n - 1)) - self.self_term


def noise_floor(measure, draw, repeats=20):
    """Mean and standard deviation of a measure over `repeats` independent true samples `draw()`."""
    values = torch.tensor([measure(draw()) for _ in range(repeats)], dtype=torch.float64)
    return values.mean().item(), values.std().item()


def rms_distance(a, b):
    """√E‖a−b‖² over paired rows (N,…).

    Between one-step and N-step samples of the same noise it is the consistency gap; between samples
    and `GaussianMixture.flow_map` of their noise, the flow-map error.
    """
    return (a - b).flatten(1).square().sum(1).mean().sqrt().item()


def coverage_and_precision(x, mixture):
    """How a sample (N,d) sits on the modes of a mixture: two shares, at best 1 and (in 2-D) 0.989.

    Coverage: 1 − TV between the modes' weights and the sample's share of each.
    Precision: the share of the sample within 3σ of a mode.
    """
    near, k = torch.cdist(x, mixture.means).min(1)
    k = k[near < 3 * mixture.std]
    share = torch.bincount(k, minlength=len(mixture.means)) / max(len(k), 1)
    return torch.minimum(share, mixture.weights).sum().item(), len(k) / len(x)


def sliced_w2(x, y, projections=200, generator=None):
    """√ of the mean squared 2-Wasserstein distance between 1-D projections of two samples of equal size (N,d)."""
    require(len(x) == len(y), f"sliced W2 compares samples of equal size, not {len(x)} and {len(y)}")
    directions = F.normalize(torch.randn(x.shape[1], projections, generator=generator), dim=0).to(x)
    a, b = (np.sort((directions.T @ z.T).cpu().numpy()) for z in (x, y))  # (projections,N); torch sorts far slower
    return float(np.sqrt(np.square(a - b).mean()))


def frechet_distance(x, y):
    """‖m−m′‖² + tr(C + C′ − 2(CC′)^½) of Gaussians fitted to features (N,d) and (M,d) (Heusel et al., 2017).

    Raises ValueError for no more rows than dimensions, where the covariances are singular.
    """
    few = min(len(x), len(y))
    require(few > x.shape[1], f"{few} samples are too few for a Fréchet distance in {x.shape[1]} dimensions")
    (m, c), (n, d) = ((a.double().mean(0), torch.cov(a.double().T)) for a in (x, y))
    values, vectors = torch.linalg.eigh(c)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C^½; then tr (CC′)^½ = tr (C^½ C′ C^½)^½
    cross = torch.linalg.eigvalsh(root @ d @ root).clamp(min=0).sqrt().sum()
    return ((m - n).square().sum() + c.trace() + d.trace() - 2 * cross).item()


def neighbours(x, y, k=1, rows=500):
    """Distance (N,) from each row of x (N,d) to its k-th nearest row of y (M,d), and that row's index (N,)."""
    found = [torch.cdist(part, y).topk(k, largest=False) for part in x.split(rows)]
    return torch.cat([f.values[:, -1] for f in found]), torch.cat([f.indices[:, -1] for f in found])


def knn_coverage(real, fake, k=5):
    """Share of real rows (N,d) with a fake one (M,d) nearer than their k-th real neighbour (Naeem et al., 2020)."""
    radius = neighbours(real, real, k + 1)[0]  # the nearest is the row itself
    return (neighbours(real, fake)[0] <= radius).double().mean().item()
