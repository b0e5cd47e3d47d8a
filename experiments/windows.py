"""From consistency to paired regression: which window, and which steps of the teacher?

    python -m experiments.windows            six windows, five kinds of steps, two mixtures, three seeds
    python -m experiments.windows --quick    one mixture, one seed, a twentieth of the passes

In a narrow window the target is the student's own guess a little nearer the data. In a window of 1 the teacher walks
all the way from x_t to some x_s, often close to the data: that is paired regression, with the pairs made on the fly. In
between two errors are exchanged for each other. What the teacher's steps do wrong grows with the window. What the
network does wrong is passed on from window to window, and there are 1/δ of them.

The first error is computed without a network, from the map that a perfect student would learn. The second is what a
trained student has beside it. All students get the same number of network passes.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import scflow
import toy_2d
from experiments import common
from scflow import require

WALKS = ("euler", "euler-4", "heun", "heun-2", "heun-8")
PASSES = 8000  # of 256 rows: what phase 1 of the default schedule makes
START = scflow.TeacherSettings(teacher_steps=1000, teacher_batch=256)  # fits the student's first weights
ALONE = scflow.SCHEDULES["two_phase"][0]  # consistency alone; steps, δ and walk are set below


# ═══ 1. A perfect student ═════════════════════════════════════════════════════════════════


def chain(velocity, x: Tensor, delta: float, walk: str, generator) -> Tensor:
    """Points (n,d) at t = 1, carried to t < 0.001 from one random s = t − U(0, min(t,δ)) to the next."""
    t = torch.ones(len(x))
    while t.max() > 1e-3:
        s = t - scflow.rand_times(x, generator) * t.clamp(max=delta)
        x = scflow.follow(velocity, x, t, s, walk)
        t = s
    return x


def stepped_error(mixture, noise: Tensor, exact: Tensor, delta: float, walk: str, generator, chains: int = 8) -> float:
    """RMS distance of the map of a perfect student from the exact one, at t = 1.

    Without loss the student at (x_t,t) is the mean of its targets, f(x_t,t) = E_s[f(x_s,s)]. Put into itself again and
    again, this is the mean of the ends of all chains. Two halves of the chains have independent noise, so that the
    product of their errors has none in its mean. (This is for the squared distance; pseudo-Huber is near a median.)
    """
    halves = []
    for _ in range(2):
        ends = [chain(mixture, noise, delta, walk, generator) for _ in range(chains // 2)]
        halves.append(torch.stack(ends).mean(0) - exact)
    first, second = halves
    squared = (first * second).sum(1).mean()
    return squared.clamp(min=0).sqrt().item()


# ═══ 2. A trained student ═════════════════════════════════════════════════════════════════


def updates(walk: str, passes: float) -> int:
    """How many updates `passes` pay for. Each: one forward, its backward for two, the target, the teacher's steps."""
    solver, steps = scflow.read_walk(walk)
    return max(1, round(passes / (4 + scflow.nfe(steps, solver))))


def measure(dataset: str, delta: float, walk: str, seed: int = 0, share: float = 1.0, samples: int = 5000) -> dict:
    """Errors of the perfect and of a trained student, whose teacher is the exact velocity; `share` of the passes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    mixture = toy_2d.dataset(dataset)
    batch = toy_2d.batches(mixture)
    fit = replace(START, teacher_steps=max(1, round(share * START.teacher_steps)))
    for run in scflow.train_teacher(scflow.MLP(), batch, generator, fit, oracle=mixture):
        start = run.ema
    phase = replace(ALONE, steps=updates(walk, share * PASSES), delta=delta, walk=walk)
    for run in scflow.distill(mixture, scflow.PointCritic(), batch, generator, (phase,), student=start):
        student = run.ema

    generator = torch.Generator().manual_seed(10**6 + seed)
    noise = torch.randn(samples, 2, generator=generator)
    exact = mixture.flow_map(noise, torch.ones(samples))
    one_step = scflow.sample(student, noise)
    few = slice(0, min(samples, 2000))
    return {
        "dataset": dataset,
        "walk": walk,
        "delta": delta,
        "seed": seed,
        "updates": phase.steps,
        "perfect": stepped_error(mixture, noise[few], exact[few], delta, walk, generator),
        "trained": toy_2d.rms_distance(one_step, exact),
        "energy": toy_2d.reference(dataset, samples)(one_step),
        "machine": toy_2d.machine(),
    }


# ═══ 3. Table and figure ══════════════════════════════════════════════════════════════════


def of_case(results: list[dict], **case) -> list[dict]:
    """The runs of all seeds that have these settings."""
    return [run for run in results if case.items() <= run.items()]


def table(results: list[dict], settings) -> list[str]:
    """Lines of Markdown: a row for each window and kind of steps."""
    lines = []
    for dataset in settings.datasets:
        for walk in WALKS:
            for delta in settings.deltas:
                runs = of_case(results, dataset=dataset, walk=walk, delta=delta)
                perfect = common.mean_sd([run["perfect"] for run in runs], 1, 3)
                trained = common.mean_sd([run["trained"] for run in runs], 1, 3)
                energy = common.mean_sd([run["energy"] for run in runs], 1e3)
                lines.append([dataset, walk, f"{delta:g}", str(runs[0]["updates"]), perfect, trained, energy])
    header = ["data set", "steps", "δ", "updates", "perfect student", "trained student", "energy distance ×10³"]
    return common.markdown(header, lines)


COLOURS = ("#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#222222")
MARKERS = "osD^v"


def plot(results: list[dict], settings, path) -> None:
    """The error of one step against the window: dashed of a perfect student, with marks of a trained one."""
    plt = toy_2d.drawing()
    n = len(settings.datasets)
    figure, axes = plt.subplots(1, n, figsize=(2 + 4.4 * n, 4.2), squeeze=False, sharey=True)
    for ax, dataset in zip(axes[0], settings.datasets):
        for walk, colour, marker in zip(WALKS, COLOURS, MARKERS):
            perfect = []
            trained = []
            for delta in settings.deltas:
                runs = of_case(results, dataset=dataset, walk=walk, delta=delta)
                perfect.append(np.mean([run["perfect"] for run in runs]))
                trained.append(np.mean([run["trained"] for run in runs]))
            ax.plot(settings.deltas, perfect, color=colour, ls="--", lw=1)
            ax.plot(settings.deltas, trained, color=colour, marker=marker, label=f"{walk}, trained")
        ax.plot([], [], color="#777777", ls="--", lw=1, label="perfect student")
        ax.set(xscale="log", yscale="log", title=dataset, xlabel="window δ", ylim=(4e-3, 1))
        ax.set_xticks(settings.deltas, [f"{delta:g}" for delta in settings.deltas])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("RMS distance to the exact flow map")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    toy_2d.write_figure(path, figure)
    plt.close(figure)


# ═══ 4. The program ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Windows:
    """What is run, and where it goes."""

    seeds: tuple = (0, 1, 2)  # seeds
    datasets: tuple = ("8gaussians", "25gaussians")  # mixtures, whose exact flow map is known
    deltas: tuple = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # windows δ
    samples: int = 5000  # points in the evaluation
    quick: bool = False  # one mixture, one seed, a twentieth of the passes, 500 samples, into runs/quick
    share: float = 1.0  # part of the passes that is made
    workers: int = os.cpu_count() or 1  # runs side by side, one thread each
    runs: str = "runs/windows"  # folder of the finished runs, which are read back
    out: str = "results/windows"  # path of the results, without .md, .csv and .png

    def __post_init__(self):
        common.check_values(self, "seeds", "datasets", "deltas")
        for name in self.datasets:
            mixture = isinstance(toy_2d.dataset(name), toy_2d.GaussianMixture)
            require(mixture, f"{name} has no exact flow map: give mixtures, 8gaussians or 25gaussians")
        for delta in self.deltas:
            require(0 < delta <= 1, f"deltas lie between 0 and 1, and one is {delta}")
        common.check_run(self, 16)


QUICK = {"seeds": [0], "datasets": ["8gaussians"], "samples": 500, "share": 0.05, "out": "runs/quick"}
LEGEND = """RMS distance of the one-step sample to the exact flow map, of a perfect student (no network) and of a
trained one, and the energy distance of the trained one; mean ± sd over the seeds. The teacher is the exact velocity."""


def windows_command(argv: list[str]) -> None:
    """The error of one step against the window δ, for several kinds of steps of the teacher, at equal passes."""
    settings = common.settings_of(argv, windows_command.__doc__, Windows(), QUICK)
    cells = []
    paths = []
    for dataset in settings.datasets:
        for walk in WALKS:
            for delta in settings.deltas:
                for seed in settings.seeds:
                    cell = {"dataset": dataset, "delta": delta, "walk": walk, "seed": seed}
                    cell.update(share=settings.share, samples=settings.samples)
                    mark = common.fingerprint(cell, START, ALONE, PASSES)  # all that a run depends on
                    cells.append(cell)
                    paths.append(Path(settings.runs, f"{common.slug(dataset, walk, delta, seed)}-{mark}.json"))
    common.open_out(settings.out)
    results = common.run_cells(measure, cells, paths, settings.workers)

    toy_2d.write_csv(f"{settings.out}.csv", results)
    about = common.about_runs(settings, results)
    common.write_report(settings.out, "experiments.windows", argv, [LEGEND, about, "", *table(results, settings)])
    plot(results, settings, f"{settings.out}.png")


def main(argv=None) -> int:
    """Run the program; returns its exit code."""
    return toy_2d.main(argv, {"windows": windows_command}, "windows", "experiments.windows")


if __name__ == "__main__":
    sys.exit(main())
