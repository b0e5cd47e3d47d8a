"""Samples of a tilted density: follow the guided flow, or correct it with weights (Feynman-Kac correctors).

    python -m experiments.correctors

A guided velocity belongs, at each t, to the tilted density p_t(x)^(1−w)·p_t(x|c)^w. But these densities are not those
of one flow, so that whoever follows it ends elsewhere. Particles with weights end in the tilted density (Skreta et al.,
2025): where too few of them arrive their weights grow, and heavy ones are copied. The same holds for a power of a
density, and for a product of two. All of it is exact in the plane, where velocities and densities are known.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import scflow
import toy_2d
from experiments import common, guidance
from scflow import require

# ═══ 1. The method ════════════════════════════════════════════════════════════════════════
# The target at time t is q_t = Π pᵢ(x)^aᵢ, where each density pᵢ is that of a flow with velocity vᵢ, and score
# sᵢ = ∇log pᵢ = −(x + (1−t)·vᵢ)/t. With v = Σ aᵢ·vᵢ and s = Σ aᵢ·sᵢ, in time τ = 1 − t, particles move by
#
#     dx = (−v + κt·s)·dτ + √(2κt)·dW.
#
# κt·s and the noise together leave any density with score s as it is; they mix its particles. What v gets wrong is in
# the weight W of a particle:
#
#     d log W/dτ = Σ aᵢ·⟨vᵢ,sᵢ⟩ − ⟨v,s⟩.
#
# Why? pᵢ follows vᵢ, so that ∂log pᵢ/∂τ = ∇·vᵢ + ⟨vᵢ,sᵢ⟩, and log q_t should change by the sum of aᵢ times that. A
# density with score s that follows v changes by ∇·v + ⟨v,s⟩. In the difference the divergences cancel.


@torch.no_grad()  # a sampler never trains anything
def corrected(net, powers: dict[int, float], n: int, steps: int, generator, stir=4.0, weigh=True):
    """n samples (n,2) of Π p₀(x|label)^power, where net(x, t, label) is the velocity of p(x|label).

    stir   κ, the strength of the noise.
    weigh  carry weights, and resample. Without both it is Euler's method on the guided flow.
    Returns the samples, and the smallest effective share of particles, 1 / (n·Σ W²), before a resampling.
    """
    total = sum(powers.values())
    x = torch.randn(n, 2, generator=generator) / total**0.5  # at t = 1 each density is N(0,I)
    log_weight = torch.zeros(n)
    least = 1.0
    for i in range(steps):
        t = 1 - i / steps
        h = 1 / steps
        v = torch.zeros_like(x)
        s = torch.zeros_like(x)
        rate = torch.zeros(n)
        for label, power in powers.items():
            cond = torch.full((n, 1), label)
            v_i = net(x, torch.full((n,), t), cond)
            s_i = -(x + (1 - t) * v_i) / t
            v = v + power * v_i
            s = s + power * s_i
            rate = rate + power * (v_i * s_i).sum(1)
        rate = rate - (v * s).sum(1)

        x = x - h * v
        x = x + h * stir * t * s + (2 * stir * t * h) ** 0.5 * scflow.randn_like(x, generator)
        if weigh:
            log_weight = log_weight + h * rate
            weight = log_weight.softmax(0)
            share = 1 / (n * weight.square().sum().item())
            least = min(least, share)
            if share < 0.5 or i == steps - 1:
                x = x[resampled(weight, generator)]
                log_weight = torch.zeros(n)
    return x, least


def resampled(weight: Tensor, generator) -> Tensor:
    """Numbers of particles (n,), each as often as its weight (n,) says, up to rounding (systematic resampling)."""
    n = len(weight)
    place = (torch.arange(n) + torch.rand(1, generator=generator)) / n
    return torch.searchsorted(weight.cumsum(0), place).clamp(max=n - 1)


# ═══ 2. What is measured ══════════════════════════════════════════════════════════════════

CASES = {  # {label: power}; label 0 is the mixture of all
    "guidance, w = 2": {0: -1.0, 1: 2.0},
    "guidance, w = 4": {0: -3.0, 1: 4.0},
    "square of all": {0: 2.0},
    "product of two labels": {1: 1.0, 2: 1.0},
    "geometric mean of two": {1: 0.5, 2: 0.5},
}
WAYS = {
    "the flow": {"stir": 0.0, "weigh": False},
    "+ noise": {"weigh": False},
    "+ weights": {"stir": 0.0},
    "+ both": {},
}


def measure(case: str, seed: int, samples: int, counts: list[int]) -> dict:
    """Energy distances of every way and number of steps to exact samples of a case, and effective shares."""
    mixture = guidance.labelled()
    powers = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def exact():
        return guidance.of_powers(mixture, powers, samples, generator)

    energy = toy_2d.EnergyDistance(exact())
    found = {"case": case, "seed": seed, "machine": toy_2d.machine()}
    found["floor"], found["floor sd"] = toy_2d.noise_floor(energy, exact, 5)
    for way, options in WAYS.items():
        for steps in counts:
            x, least = corrected(mixture, powers, samples, steps, generator, **options)
            found[f"{way}, {steps}"] = energy(x)
            found[f"{way}, {steps}, share"] = least
    return found


def table(results: list[dict], counts: list[int]) -> list[str]:
    """Lines of Markdown: a row for each case and way, mean ± sd over the seeds."""
    rows = []
    for case in CASES:
        runs = [run for run in results if run["case"] == case]
        floor = np.mean([run["floor"] for run in runs])
        sd = np.mean([run["floor sd"] for run in runs])
        for way in WAYS:
            cells = [f"{case} ({1e3 * floor:.2f} ± {1e3 * sd:.2f})", way]
            for steps in counts:
                cells.append(common.mean_sd([run[f"{way}, {steps}"] for run in runs], 1e3))
            least = np.mean([run[f"{way}, {counts[-1]}, share"] for run in runs])
            cells.append(f"{100 * least:.0f}%" if "weigh" not in WAYS[way] else "")
            rows.append(cells)
    titles = [toy_2d.plural(steps, "step") for steps in counts]
    return common.markdown(["density (noise floor)", "way", *titles, "effective"], rows)


def draw(counts: list[int], path: str, n: int = 1500) -> None:
    """A row of panels for each case: exact samples, the flow alone, and particles with noise and weights."""
    plt = toy_2d.drawing()
    figure, axes = plt.subplots(len(CASES), 3, figsize=(6.5, 2.1 * len(CASES)))
    mixture = guidance.labelled()
    for row, (case, powers) in zip(axes, CASES.items()):
        generator = torch.Generator().manual_seed(0)
        panels = {"exact": guidance.of_powers(mixture, powers, n, generator)}
        for way in ("the flow", "+ both"):
            panels[way], _ = corrected(mixture, powers, n, counts[-1], generator, **WAYS[way])
        for ax, (title, points) in zip(row, panels.items()):
            data, _ = mixture.sample(1200, generator)
            toy_2d.cloud(ax, data, title, "#cccccc", 2)
            toy_2d.cloud(ax, points, title, toy_2d.STUDENT, 3)
            ax.set(xlim=(-4, 4), ylim=(-4, 4))
        row[0].set_ylabel(case, fontsize=10)
    toy_2d.write_figure(path, figure, 80)
    plt.close(figure)


# ═══ 3. The program ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Correctors:
    """What is measured, and where it goes."""

    seeds: tuple = (0, 1, 2, 3, 4)  # seeds
    counts: tuple = (25, 100, 400)  # numbers of steps
    samples: int = 6000  # particles, and points in the evaluation
    out: str = "results/correctors"  # path of the results, without .md, .csv and .png

    def __post_init__(self):
        common.check_values(self, "seeds", "counts")
        require(min(self.counts) >= 1, f"counts are numbers of steps, at least 1: {self.counts}")
        require(self.samples >= 50, f"samples must be at least 50, not {self.samples}")


LEGEND = """Energy distance ×10³ to exact samples, by the number of steps. Effective: the smallest effective share of
the particles in the most steps; below a half they are resampled."""


def correctors_command(argv: list[str]) -> None:
    """Sample tilted densities with the guided flow and with weighted particles; a table and a figure."""
    settings = common.settings_of(argv, correctors_command.__doc__, Correctors(), {})
    common.open_out(settings.out)
    results = []
    for case in CASES:
        for seed in settings.seeds:
            results.append(measure(case, seed, settings.samples, settings.counts))
    toy_2d.write_csv(f"{settings.out}.csv", results)
    about = common.about_runs(settings, results)
    lines = [LEGEND, about, "", *table(results, settings.counts)]
    common.write_report(settings.out, "experiments.correctors", argv, lines)
    draw(settings.counts, f"{settings.out}.png")


def main(argv=None) -> int:
    """The command; bad input is one line on stderr and exit code 2."""
    return toy_2d.main(argv, {"correctors": correctors_command}, "correctors", "experiments.correctors")


if __name__ == "__main__":
    sys.exit(main())
