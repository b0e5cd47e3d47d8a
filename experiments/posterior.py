"""Posterior sampling with a flow: which points could have given this measurement?

    python -m experiments.posterior

A point x₀ is measured in one direction, and with noise: y = ⟨a,x₀⟩ + σ·noise. If x₀ is from a Gaussian mixture, the
posterior p(x₀|y) is a mixture again, so that samples can be compared with the truth. Two ways to sample it take a
network as it is, and train nothing:

    steered      steps of the flow, each pulled towards y (flow matching posterior sampling)
    candidates   many one-step samples of a student; one of them is kept, drawn by its likelihood
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import scflow
import toy_2d
from experiments import common
from scflow import require

# ═══ 1. The truth ═════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Measurement:
    """y = ⟨a,x₀⟩ + σ·noise, for a direction a (2,)."""

    a: Tensor
    y: float
    sigma: float

    def log_likelihood(self, x0: Tensor, spread: float = 0.0) -> Tensor:
        """log p(y|x₀) of points (…,2), but for a constant. `spread` is a deviation of ⟨a,x₀⟩, if x₀ is uncertain."""
        var = self.sigma**2 + spread**2
        return -((self.y - x0 @ self.a) ** 2) / (2 * var)


def sample_posterior(mixture, measured: Measurement, n: int, generator) -> Tensor:
    """n exact samples (n,2). Each component N(μ,s²I) has a Gaussian posterior, and its share grows with p(y|μ)."""
    a = measured.a
    s = mixture.std
    var = measured.sigma**2 + s**2 * (a @ a)  # of y, for one component
    off = measured.y - mixture.means @ a  # (K,)
    share = (mixture.weights.log() - off**2 / (2 * var)).softmax(0)
    k = torch.multinomial(share, n, replacement=True, generator=generator)
    # A sample of the component and a measurement of it, moved to agree with y (Matheron's rule).
    x0 = mixture.means[k] + s * torch.randn(n, 2, generator=generator)
    y = x0 @ a + measured.sigma * torch.randn(n, generator=generator)
    return x0 + ((measured.y - y) * s**2 / var)[:, None] * a


# ═══ 2. Two ways to sample it ═════════════════════════════════════════════════════════════


def steered(net, measured: Measurement, noise: Tensor, steps: int) -> Tensor:
    """Euler steps along v(x,t) − t/(1−t)·∇log p(y|x_t): the flow of the posterior, if p(y|x_t) were known.

    It is not. It is replaced by the normal density of y around ⟨a,x̂₀⟩, x̂₀ = f(x_t,t), with σ² and the variance of x̂₀.
    Of data N(m,I) that is t²/(t² + (1−t)²), and so it is taken for other data, too.
    """
    x = noise
    for i in range(steps):
        t = 1 - (i + 0.5) / steps  # the middle of the step: at t = 1 the factor is infinite
        x = x.detach().requires_grad_()
        v = net(x, torch.full((len(x),), t))
        x0 = x - t * v
        spread = t / math.sqrt(t**2 + (1 - t) ** 2)
        (pull,) = torch.autograd.grad(measured.log_likelihood(x0, spread).sum(), x)
        x = x - (v - t / (1 - t) * pull) / steps
    return x.detach()


def candidates(student, measured: Measurement, n: int, each: int, generator) -> Tensor:
    """n samples (n,2), each of them one of `each` one-step samples, chosen with a chance in proportion to p(y|x₀)."""
    noise = torch.randn(n * each, 2, generator=generator)
    x0 = scflow.sample(student, noise).view(n, each, 2)
    chance = measured.log_likelihood(x0).softmax(1)  # (n,each)
    chosen = torch.multinomial(chance, 1, generator=generator)  # (n,1)
    return x0.gather(1, chosen[..., None].expand(-1, -1, 2))[:, 0]


# ═══ 3. What is measured ══════════════════════════════════════════════════════════════════

STEPS = (10, 50, 100)  # of the steered flow; a step has an evaluation and its derivative
EACH = (10, 100)  # candidates
SIGMA = 0.2


def measurements(mixture, count: int, generator) -> list[Measurement]:
    """Measurements of points of the mixture, in random directions."""
    found = []
    x0, _ = mixture.sample(count, generator)
    for point in x0:
        angle = 2 * math.pi * torch.rand(1, generator=generator)
        a = torch.cat([angle.cos(), angle.sin()])
        y = point @ a + SIGMA * torch.randn(1, generator=generator)
        found.append(Measurement(a, y.item(), SIGMA))
    return found


def measure(dataset: str, seed: int, count: int, samples: int) -> dict:
    """Mean energy distances over `count` measurements, of each way to the exact posterior; and the floor."""
    run = toy_2d.Run(dataset=dataset, seed=seed, quiet=True)
    mixture = toy_2d.prepare(run)
    require(isinstance(mixture, toy_2d.GaussianMixture), f"of {dataset} the exact posterior is not known")
    teacher = toy_2d.fit_teacher(run, mixture, scflow.TeacherSettings())
    student = toy_2d.fit_student(run, mixture, teacher, scflow.SCHEDULES["two_phase"]).ema
    generator = torch.Generator().manual_seed(10**6 + seed)
    distances = {}
    for measured in measurements(mixture, count, generator):
        energy = toy_2d.EnergyDistance(sample_posterior(mixture, measured, samples, generator))
        noise = torch.randn(samples, 2, generator=generator)
        found = {"floor": sample_posterior(mixture, measured, samples, generator)}
        for who, net in {"exact": mixture, "teacher": teacher}.items():
            for steps in STEPS:
                found[f"steered, {who}, {steps}"] = steered(net, measured, noise, steps)
        for each in EACH:
            found[f"candidates, student, {each}"] = candidates(student, measured, samples, each, generator)
        for way, x in found.items():
            distances.setdefault(way, []).append(energy(x))
    means = {way: float(np.mean(values)) for way, values in distances.items()}
    return {"dataset": dataset, "seed": seed, **means, "machine": toy_2d.machine()}


def table(results: list[dict]) -> list[str]:
    """Lines of Markdown: a row for each way, a column for each data set; mean ± sd over the seeds."""
    datasets = list(dict.fromkeys(run["dataset"] for run in results))
    ways = [key for key in results[0] if key not in ("dataset", "seed", "machine")]
    rows = []
    for way in ways:
        name, who, count = way.split(", ") if way != "floor" else ("exact samples", "", "")
        cells = [name, who, count]
        for dataset in datasets:
            cells.append(common.mean_sd([run[way] for run in results if run["dataset"] == dataset], 1e3))
        rows.append(cells)
    return common.markdown(["way", "network", "evaluations", *datasets], rows)


# ═══ 4. The program ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Posterior:
    """What is measured, and where it goes."""

    datasets: tuple = ("8gaussians", "25gaussians")  # mixtures by name
    seeds: tuple = (0, 1, 2)  # seeds
    count: int = 10  # measurements
    samples: int = 2000  # samples of each posterior
    out: str = "results/posterior"  # path of the results, without .md and .csv

    def __post_init__(self):
        common.check_values(self, "datasets", "seeds")
        require(self.count >= 1, f"count must be at least 1, not {self.count}")
        require(self.samples >= 50, f"samples must be at least 50, not {self.samples}")


LEGEND = """Energy distance ×10³ to exact samples of the posterior, the mean over all measurements, ± the deviation over
seeds. Evaluations of the network for one sample; where the flow is steered each has a derivative, too."""


def posterior_command(argv: list[str]) -> None:
    """Sample the posterior of a measurement with the flow of a teacher, and with one-step samples of its student."""
    settings = common.settings_of(argv, posterior_command.__doc__, Posterior(), {})
    common.open_out(settings.out)
    results = []
    for dataset in settings.datasets:
        for seed in settings.seeds:
            results.append(measure(dataset, seed, settings.count, settings.samples))
    toy_2d.write_csv(f"{settings.out}.csv", results)
    lines = [LEGEND, f"{settings.count} measurements. {common.about_runs(settings, results)}", "", *table(results)]
    common.write_report(settings.out, "experiments.posterior", argv, lines)


def main(argv=None) -> int:
    """The command; bad input is one line on stderr and exit code 2."""
    return toy_2d.main(argv, {"posterior": posterior_command}, "posterior", "experiments.posterior")


if __name__ == "__main__":
    sys.exit(main())
