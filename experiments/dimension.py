"""Do the paper's losses contradict each other in many dimensions, too?

    python -m experiments.dimension            mixtures in 2 to 512 dimensions, three seeds
    python -m experiments.dimension --quick    one seed, a twentieth of the updates, up to 32 dimensions
    python -m experiments.dimension photographs --run runs/faces    on the latents of a run of celeba_latent.py

In two dimensions, with all losses together at the reference's weights, two steps are much worse than one. A reason may
be that points x_t between data and noise lie among points x̂_t of the student's own straight lines. There consistency
and self-correction ask one network for different values. In more dimensions x_t and x̂_t may be easier to tell apart,
and one network could satisfy both losses. This program measures how far they overlap, and how much worse two steps are
than one.
"""

import hashlib
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import celeba_latent
import scflow
import toy_2d
from experiments import common, growth
from scflow import require

# ═══ 1. Networks and losses ═══════════════════════════════════════════════════════════════


class Velocity(nn.Module):
    """v(x,t) = g·x + r. A perceptron finds the number g and the vector r from x, ‖x‖/√d and t.

    In many dimensions most of a velocity is a multiple of x, which layers narrower than x cannot carry.
    """

    def __init__(self, d: int, width: int = 256):
        super().__init__()
        self.perceptron = scflow.MLP(d + 1, width, x_frequencies=0)

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        """Velocity (B,d) at points (B,d) and times (B,)."""
        out = self.perceptron(with_norm(x), t)  # (B,d+1)
        r = out[:, :-1]
        g = out[:, -1:]
        return g * x + r


def with_norm(x: Tensor) -> Tensor:
    """Points (B,d) with ‖x‖/√d as one more number, (B,d+1)."""
    norm = x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
    return torch.cat([x, norm], 1)


JOINT = scflow.Phase(batch=256)  # the reference's weights, δ and τ
LOSSES = {
    "consistency": replace(JOINT, lambda_adv=0.0, lambda_self=0.0, lambda_bi=0.0),
    "joint, hinge": JOINT,
    "joint, softplus and R1": replace(JOINT, adversarial="softplus", r1=1.0),
    "the same, λ_self 1": replace(JOINT, adversarial="softplus", r1=1.0, lambda_self=1.0),
}
START = scflow.TeacherSettings(teacher_steps=1500, teacher_batch=256)  # fits the student's first weights


# ═══ 2. The overlap ═══════════════════════════════════════════════════════════════════════


def overlap(draw, updates: int) -> float:
    """How much of two densities p and q lies in both, ∫min(p,q): 1 for equal ones, 0 where they never meet.

    It is the error rate of the best classifier on p plus that on q. Ours is a perceptron with the hinge loss. It may
    err more often than the best one, so that the true overlap is at most this.

    draw  callable (n) → rows of p and of q, (n,d) each.
    """
    one, _ = draw(1)
    classifier = scflow.PointCritic(one.shape[1] + 1, 256)
    opt = scflow.adamw(classifier, 1e-3)
    for i in range(updates):
        scflow.set_lr(opt, 1e-3 * scflow.lr_factor(i, updates))
        p, q = draw(512)
        loss = scflow.critic_loss(classifier(with_norm(p)), classifier(with_norm(q)))
        opt.zero_grad()
        loss.backward()
        opt.step()
    p, q = draw(10000)
    with torch.no_grad():
        wrong_on_p = (classifier(with_norm(p)) < 0).double().mean()
        wrong_on_q = (classifier(with_norm(q)) > 0).double().mean()
    return min(1.0, (wrong_on_p + wrong_on_q).item())


def overlap_of_norms(draw) -> float:
    """The same, where the classifier is the best threshold on ‖x‖.

    In the 2,048 dimensions of photographs' latents a perceptron takes too long to find out that the norm tells enough.
    """

    def share_below(points, thresholds):
        norms = points.norm(dim=1).sort().values
        return torch.searchsorted(norms, thresholds) / len(norms)

    p, q = draw(2000)
    thresholds = torch.cat([p, q]).norm(dim=1)
    apart = share_below(p, thresholds) - share_below(q, thresholds)
    best = thresholds[apart.abs().argmax()]
    p, q = draw(5000)  # other points than those that chose it
    apart = share_below(p, best) - share_below(q, best)
    return 1 - apart.abs().item()


def halfway(student, batch, generator):
    """`draw` for the overlap of x_t and x̂_t at t = ½: points of the data's paths, and of the student's own lines."""

    def draw(n):
        x0, _ = batch(n, generator)
        x1 = scflow.randn_like(x0, generator)
        fresh = scflow.randn_like(x0, generator)
        x0_hat = scflow.sample(student, fresh)
        half = torch.full((n,), 0.5)
        xt = scflow.interpolate(x0, x1, half)
        xt_hat = scflow.interpolate(x0_hat, fresh, half)
        return xt.flatten(1), xt_hat.flatten(1)

    return draw


def overlap_of_exact(d: int, std: float = 0.15) -> float:
    """At most so far x_t and x̂_t overlap at t = ½, if the student is the exact flow map of `growth.mixture(d)`, d > 4.

    It is the overlap in the d − 4 dimensions that have no modes. There data are N(0,std²), and x̂₀ = std·x₁.
    """
    n = d - 4
    p = (std**2 + 1) / 4  # variance of x_t, in each dimension
    q = (std + 1) ** 2 / 4  # of x̂_t
    square = n * math.log(q / p) / (1 / p - 1 / q)  # ‖x‖² where both densities are equal
    half = torch.tensor(n / 2)
    inside_p = torch.special.gammainc(half, torch.tensor(square / p / 2))  # ‖x‖²/p has a chi-square distribution
    inside_q = torch.special.gammainc(half, torch.tensor(square / q / 2))
    return (1 - inside_p + inside_q).item()


# ═══ 3. One run ═══════════════════════════════════════════════════════════════════════════


def measure(d: int, losses: str, seed: int = 0, share: float = 1.0, samples: int = 5000) -> dict:
    """Distil a teacher that is exact, the velocity of eight Gaussians in d dimensions; `share` of the updates.

    Returns energy distances ("student 4" is that of four steps), the noise floor and the overlap.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = growth.mixture(d)
    batch = toy_2d.batches(data)
    net = Velocity(d)
    fit = replace(START, teacher_steps=round(share * START.teacher_steps))
    for run in scflow.train_teacher(net, batch, generator, fit, oracle=data):
        start = run.ema
    schedule = scflow.rescale((LOSSES[losses],), round(share * LOSSES[losses].steps))
    critic = scflow.PointCritic(d, 128)
    for run in scflow.distill(data, critic, batch, generator, schedule, student=start):
        student = run.ema

    generator = torch.Generator().manual_seed(10**6 + seed)
    energy = toy_2d.EnergyDistance(*data.sample(samples, generator, stratified=True))

    def draw_truth():
        return data.sample(samples, generator)[0]

    found = {"losses": losses, "d": d, "seed": seed}
    found["floor"], found["floor sd"] = toy_2d.noise_floor(energy, draw_truth, 10)
    noise = torch.randn(samples, d, generator=generator)
    for steps in (1, 2, 4, 8):
        found[f"student {steps}"] = energy(scflow.sample(student, noise, steps))
    found["overlap"] = overlap(halfway(student, batch, generator), round(share * 1000))
    found["machine"] = toy_2d.machine()
    return found


# What photographs need: fewer rows, for a network that costs more, and a lower rate.
ON_PHOTOGRAPHS = dict(batch=32, lr=1e-3, lr_critic=2e-4)


def measure_photographs(folder: str, losses: str, seed: int, updates: int, samples: int) -> dict:
    """Distil the teacher of a run folder of celeba_latent.py, from the start of its own student.

    Returns Fréchet distances in layout, less the floor ("student 4" is that of four steps), and the overlap.
    """
    teacher, codec = celeba_latent.load_run(Path(folder, "teacher.pt"), "cpu")
    latents = toy_2d.read_config(Path(folder), celeba_latent.RUN, "latents")["latents"]
    data = celeba_latent.Latents(latents)
    data.require_codec(codec.content, folder)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = data.batch("cpu")
    start = celeba_latent.start_from_normal(teacher, data.normalised(data.train, mirrored=True), "map")
    critic = scflow.LatentCritic(data.shape)
    phase = replace(LOSSES[losses], steps=updates, **ON_PHOTOGRAPHS)
    for run in scflow.distill(teacher, critic, batch, generator, (phase,), student=start):
        student = run.ema

    generator = torch.Generator().manual_seed(10**6 + seed)
    layout = celeba_latent.PictureMeasure(*data.originals(data.held_out))
    floor, _ = celeba_latent.floor_of(layout, data, samples, generator)
    noise = torch.randn(samples, *data.shape, generator=generator)
    found = {"losses": losses, "d": math.prod(data.shape), "seed": seed}
    found["floor"], found["floor sd"] = floor["layout"]
    for steps in (1, 2, 4, 8):
        pictures = celeba_latent.generate(student, noise, steps, codec)
        distance = layout(*celeba_latent.features_of(pictures))["layout"]
        found[f"student {steps}"] = distance - floor["layout"][0]
    found["overlap"] = overlap_of_norms(halfway(student, batch, generator))
    found["machine"] = toy_2d.machine()
    return found


# ═══ 4. Table and figure ══════════════════════════════════════════════════════════════════


def cases(results: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """{(losses, d): the results of all seeds}, in the order of the table."""
    found = {}
    for losses in LOSSES:
        for run in results:
            if run["losses"] == losses:
                found.setdefault((losses, run["d"]), []).append(run)
    return found


def ratio(runs: list[dict]) -> float:
    """The energy distance of two steps over that of one, each a mean over the seeds."""
    one = np.mean([run["student 1"] for run in runs])
    two = np.mean([run["student 2"] for run in runs])
    return two / one


def table(results: list[dict], scale: float = 1e3) -> list[str]:
    """Lines of Markdown: one row for each case, distances times `scale`."""
    lines = []
    for (losses, d), runs in cases(results).items():
        cells = [losses, str(d)]
        for steps in (1, 2, 4, 8):
            cells.append(common.mean_sd([run[f"student {steps}"] for run in runs], scale))
        floor = np.mean([run["floor"] for run in runs])
        sd = np.mean([run["floor sd"] for run in runs])
        cells.append(f"{scale * floor:.2f} ± {scale * sd:.2f}")
        cells.append(f"{ratio(runs):.1f}")
        cells.append(common.mean_sd([run["overlap"] for run in runs]))
        lines.append(cells)
    return common.markdown(["losses", "d", "1 step", "2", "4", "8", "floor", "2 ÷ 1", "overlap"], lines)


COLOURS = ("#999999", "#0072B2", "#D55E00", "#009E73")
MARKERS = ("o", "s", "D", "^")


def plot(results: list[dict], path) -> None:
    """Against d: the overlap, and the energy distances of one step and of two."""
    plt = toy_2d.drawing()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
    axes[1].sharey(axes[2])
    found = cases(results)
    keys = {"overlap": 1, "student 1": 1e3, "student 2": 1e3}
    for losses, colour, marker in zip(LOSSES, COLOURS, MARKERS):
        mine = {d: runs for (name, d), runs in found.items() if name == losses}
        for ax, (key, scale) in zip(axes, keys.items()):
            means = [scale * np.mean([run[key] for run in runs]) for runs in mine.values()]
            ax.plot(mine.keys(), means, color=colour, marker=marker, label=losses)
    many = [d for d in sorted({d for _, d in found}) if d > 4]
    axes[0].plot(many, [overlap_of_exact(d) for d in many], "k:", label="exact map, at most")
    for ax in axes:
        ticks = sorted({d for _, d in found})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.set_xlabel("dimensions d")
    axes[0].set(title="overlap of x_t and x̂_t, t = ½", ylim=(0, 1))
    axes[1].set(title="one step: energy distance × 10³", yscale="log")
    axes[2].set(title="two steps: energy distance × 10³", yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    toy_2d.write_figure(path, figure, 80)
    plt.close(figure)


# ═══ 5. The program ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Dimension:
    """What is run, and where it goes."""

    seeds: tuple = (0, 1, 2)  # seeds
    dimensions: tuple = (2, 8, 32, 128, 512)  # numbers of dimensions: 2, or 4 and more
    samples: int = 5000  # points in the evaluation
    quick: bool = False  # one seed, up to 32 dimensions, a twentieth of the updates, 1000 samples, into runs/quick
    share: float = 1.0  # part of the updates that is made
    workers: int = os.cpu_count() or 1  # runs side by side, one thread each
    runs: str = "runs/dimension"  # folder of the finished runs, which are read back
    out: str = "results/dimension"  # path of the results, without .md, .csv and .png

    def __post_init__(self):
        common.check_values(self, "seeds", "dimensions")
        for d in self.dimensions:
            require(d == 2 or d >= 4, f"dimensions are 2, or 4 and more, not {d}")
        common.check_run(self, 16)


QUICK = {"seeds": [0], "dimensions": [2, 8, 32], "samples": 1000, "share": 0.05, "out": "runs/quick"}
LEGEND = """Energy distance ×10³ of the student after 1, 2, 4 and 8 Euler steps, mean ± sd over the seeds; floor: that
of true samples. 2 ÷ 1: the mean of two steps over that of one. Overlap: an upper bound for the part that the densities
of x_t and x̂_t at t = ½ share."""


def dimension_command(argv: list[str]) -> None:
    """How much worse two steps are than one, and how far x_t and x̂_t overlap, in 2 to 512 dimensions."""
    settings = common.settings_of(argv, dimension_command.__doc__, Dimension(), QUICK)
    cells = []
    paths = []
    for d in settings.dimensions:
        for losses in LOSSES:
            for seed in settings.seeds:
                cell = {"d": d, "losses": losses, "seed": seed, "share": settings.share, "samples": settings.samples}
                mark = common.fingerprint(cell, START, LOSSES[losses])  # all that a run depends on
                cells.append(cell)
                paths.append(Path(settings.runs, f"{common.slug(d, losses, seed)}-{mark}.json"))
    common.open_out(settings.out)
    results = common.run_cells(measure, cells, paths, settings.workers)

    toy_2d.write_csv(f"{settings.out}.csv", results)
    about = common.about_runs(settings, results)
    exact = [f"{overlap_of_exact(d):.2f} in {d}" for d in settings.dimensions if d > 4]
    bound = f"Overlap of a student that is the exact map, at most: {', '.join(exact)} dimensions." if exact else ""
    common.write_report(settings.out, "experiments.dimension", argv, [LEGEND, about, bound, "", *table(results)])
    plot(results, f"{settings.out}.png")


@dataclass(frozen=True)
class Photographs:
    """Whose teacher is distilled, how long, and where the results go."""

    run: str = "runs/faces"  # run folder of celeba_latent.py
    seeds: tuple = (0,)  # seeds
    updates: int = 1000  # updates of each student
    samples: int = 2000  # samples in the evaluation
    workers: int = os.cpu_count() or 1  # runs side by side, one thread each
    runs: str = "runs/dimension"  # folder of the finished runs, which are read back
    out: str = "results/dimension-photographs"  # path of the results, without .md and .csv

    def __post_init__(self):
        common.check_values(self, "seeds")
        require(self.updates >= 1, f"updates must be at least 1, not {self.updates}")
        require(self.samples >= 1000, f"a Fréchet distance needs 1000 samples or more, not {self.samples}")
        require(self.workers >= 1, f"workers must be at least 1, not {self.workers}")


ABOUT_PHOTOGRAPHS = """Latents of photographs. Fréchet distance in layout, less the floor, of the student after 1, 2, 4
and 8 Euler steps; floor: that of as many photographs. 2 ÷ 1 as in dimension.md. Overlap: an upper
bound again, from ‖x_t‖ and ‖x̂_t‖ alone."""


def photographs_command(argv: list[str]) -> None:
    """The same measured on photographs: the teacher of a run of celeba_latent.py is distilled with the same losses."""
    settings = common.settings_of(argv, photographs_command.__doc__, Photographs(), {})
    teacher = Path(settings.run, "teacher.pt")
    require(teacher.is_file(), f"no teacher in {settings.run}: run celeba_latent.py teacher --out {settings.run} first")
    how = {"folder": settings.run, "updates": settings.updates, "samples": settings.samples}
    weights = hashlib.sha256(teacher.read_bytes()).hexdigest()
    cells = []
    paths = []
    for losses in LOSSES:
        for seed in settings.seeds:
            cell = {"losses": losses, "seed": seed, **how}
            mark = common.fingerprint(cell, weights, LOSSES[losses], ON_PHOTOGRAPHS)
            cells.append(cell)
            paths.append(Path(settings.runs, f"{common.slug('photographs', losses, seed)}-{mark}.json"))
    common.open_out(settings.out)
    results = common.run_cells(measure_photographs, cells, paths, settings.workers)
    toy_2d.write_csv(f"{settings.out}.csv", results)
    about = common.about_runs(settings, results)
    lines = [ABOUT_PHOTOGRAPHS, f"{settings.updates} updates of each student.", about, "", *table(results, scale=1)]
    common.write_report(settings.out, "experiments.dimension", ["photographs", *argv], lines)


def main(argv=None) -> int:
    """Run a command, without its name the test on mixtures; returns its exit code."""
    commands = {"dimension": dimension_command, "photographs": photographs_command}
    return toy_2d.main(argv, commands, "dimension", "experiments.dimension")


if __name__ == "__main__":
    sys.exit(main())
