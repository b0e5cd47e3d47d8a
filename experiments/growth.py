"""What grows with what: errors and operations by rows of a batch, width, dimensions and number of modes.

    python -m experiments.growth            every case on three seeds
    python -m experiments.growth --quick    one seed, a twentieth of the updates

Each case is the default run of toy_2d.py with one number changed, on a mixture whose truth is known exactly.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import scflow
import toy_2d
from experiments import common, speed
from scflow import require
from toy_2d import GaussianMixture

# ═══ 1. The cases ═════════════════════════════════════════════════════════════════════════

TEACHER = scflow.TeacherSettings()
SCHEDULE = scflow.SCHEDULES["two_phase"]
DEFAULT = {"rows": TEACHER.teacher_batch, "width": 128, "d": 2, "modes": 8}
AXES = {  # what grows, and through which values; the rest stays at the default
    "rows": (128, 256, 512, 1024),
    "width": (32, 64, 128, 256),
    "d": (2, 8, 16, 32),
    "modes": (9, 25, 49, 81),
}
TITLES = {
    "rows": "rows of a batch",  # the teacher's; those of the student grow with them
    "width": "hidden units of a layer",
    "d": "dimensions",
    "modes": "modes of a grid",
}


def all_cases() -> list[dict]:
    """Every case once; the default belongs to three axes."""
    cases = []
    for axis, values in AXES.items():
        for value in values:
            case = {**DEFAULT, axis: value}
            if case not in cases:
                cases.append(case)
    return cases


def mixture(d: int = 2, modes: int = 8) -> GaussianMixture:
    """Gaussians in d dimensions whose means have RMS radius 2.

    Eight modes stand on a circle in the plane, and on both sides of four axes above. Any other number fills a square
    grid in the plane; the deviation is a tenth of its spacing. Raises ValueError for a number that fits neither.
    """
    if d == 2 and modes == 8:
        return toy_2d.dataset("8gaussians")
    if d > 2:
        require(modes % 2 == 0 and modes <= 2 * d, f"{d} axes have room for an even number of modes, not {modes}")
        axes = 2 * torch.eye(modes // 2, d)
        return GaussianMixture(torch.cat([axes, -axes]), 0.15)
    side = round(modes**0.5)
    require(side**2 == modes, f"a square grid has 9, 25, … modes, not {modes}")
    line = torch.arange(side) - (side - 1) / 2
    means = torch.cartesian_prod(line, line)
    spacing = 2 / means.square().sum(1).mean().sqrt().item()
    return GaussianMixture(spacing * means, spacing / 10)


# ═══ 2. One run ═══════════════════════════════════════════════════════════════════════════


def operations(net, critic, batch, settings, schedule) -> float:
    """Floating-point operations of the whole training: an update of each stage is counted, and multiplied."""

    def counted(loop, updates):
        return updates * speed.count_flops(next, loop)

    generator = torch.Generator()  # of its own: the runs to come are as they would be without this
    teacher = scflow.clone(net)
    total = counted(scflow.train_teacher(teacher, batch, generator, settings), settings.teacher_steps)
    for phase in schedule:
        alone = replace(phase, self_source="ema")  # costs the same as "frozen", which no first phase may have
        loop = scflow.distill(teacher, scflow.clone(critic), batch, generator, (alone,))
        total += counted(loop, phase.steps)
    return total


def measure(rows=512, width=128, d=2, modes=8, seed=0, share=1.0, samples=5000) -> dict:
    """Train teacher and student of one case, and measure them; `share` of the updates.

    Returns the row of the CSV file: energy distances ("student 4" is that of four steps), the RMS distance from the
    one-step to the exact sample, and the operations of all updates.
    """
    found = {"rows": rows, "width": width, "d": d, "modes": modes, "seed": seed}
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = mixture(d, modes)
    batch = toy_2d.batches(data)
    settings = replace(TEACHER, teacher_batch=rows, teacher_steps=round(share * TEACHER.teacher_steps))
    batches = [phase.batch * rows // TEACHER.teacher_batch for phase in SCHEDULE]
    schedule = toy_2d.revise(SCHEDULE, {"batch": batches})
    schedule = scflow.rescale(schedule, share * sum(phase.steps for phase in schedule))

    net = scflow.MLP(d, width)
    critic = scflow.PointCritic(d, width // 2)
    found["operations"] = operations(net, critic, batch, settings, schedule)
    for run in scflow.train_teacher(net, batch, generator, settings):
        teacher = run.ema
    for run in scflow.distill(teacher, critic, batch, generator, schedule):
        student = run.ema

    generator = torch.Generator().manual_seed(10**6 + seed)
    energy = toy_2d.EnergyDistance(*data.sample(samples, generator, stratified=True))

    def draw_truth():
        return data.sample(samples, generator)[0]

    found["floor"], found["floor sd"] = toy_2d.noise_floor(energy, draw_truth, 10)
    noise = torch.randn(samples, d, generator=generator)
    found["teacher 50"] = energy(scflow.sample(teacher, noise, 50))
    for steps in (1, 2, 4, 8):
        found[f"student {steps}"] = energy(scflow.sample(student, noise, steps))
    few = noise[:1000]  # the exact map is slow
    truth = data.flow_map(few, torch.ones(len(few)))
    found["map error"] = toy_2d.rms_distance(scflow.sample(student, few), truth)
    found["machine"] = toy_2d.machine()
    return found


# ═══ 3. Table and figure ══════════════════════════════════════════════════════════════════

DISTANCES = ("teacher 50", "student 1", "student 2", "student 4", "student 8")
LINES = (("teacher 50", "#D55E00", "o"), ("student 1", "#56B4E9", "s"), ("student 8", "#0072B2", "D"))


def along(axis: str, results: list[dict]) -> dict[int, list[dict]]:
    """{value: the results of all seeds} of the cases in which nothing but this differs from the default."""
    found = {}
    for value in AXES[axis]:
        case = {**DEFAULT, axis: value}
        runs = [run for run in results if case.items() <= run.items()]
        if runs:
            found[value] = runs
    return found


def column(runs: list[dict], key: str, scale: float = 1.0) -> np.ndarray:
    """A measure of some runs, (runs,)."""
    return scale * np.array([run[key] for run in runs])


def table(results: list[dict]) -> list[str]:
    """Lines of Markdown: one row for each case."""
    lines = []
    for axis in AXES:
        for value, runs in along(axis, results).items():
            cells = [TITLES[axis], str(value)]
            cells.append(f"{column(runs, 'operations', 1e-12).mean():.2f}")
            floor = column(runs, "floor", 1e3).mean()
            sd = column(runs, "floor sd", 1e3).mean()
            cells.append(f"{floor:.2f} ± {sd:.2f}")
            cells += [common.mean_sd(column(runs, key), 1e3) for key in DISTANCES]
            cells.append(common.mean_sd(column(runs, "map error")))
            lines.append(cells)
    return common.markdown(["what grows", "to", "TFLOP", "floor", *DISTANCES, "map error"], lines)


def draw_distances(ax, axis: str, results: list[dict]) -> None:
    """Energy distances along an axis: the mean over seeds and their range, and the noise floor in grey."""
    cases = along(axis, results)
    values = np.array(list(cases))
    shift = 0.97  # the lines stand a little apart
    for key, colour, marker in LINES:
        found = np.stack([column(runs, key, 1e3) for runs in cases.values()])  # (values, seeds)
        mean = found.mean(1)
        reach = [mean - found.min(1), found.max(1) - mean]
        ax.errorbar(shift * values, mean, reach, color=colour, marker=marker, label=key)
        shift += 0.03
    floor = np.array([column(runs, "floor", 1e3).mean() for runs in cases.values()])
    sd = np.array([column(runs, "floor sd", 1e3).mean() for runs in cases.values()])
    ax.bar(values, floor + 2 * sd + 1, 0.3 * values, bottom=-1, color="#dddddd", label="noise floor + 2 sd")
    ax.set_xscale("log", base=2)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_xticks(values, values)
    ax.set_yticks([0, 1, 10, 100], [0, 1, 10, 100])
    ax.minorticks_off()


def draw(results: list[dict], path) -> None:
    """Distances above, operations below; a column of the figure for each thing that grows."""
    plt = toy_2d.drawing()
    shape = {"figsize": (13, 6), "sharex": "col", "sharey": "row", "height_ratios": (2, 1)}
    figure, axes = plt.subplots(2, len(AXES), **shape)
    for i, axis in enumerate(AXES):
        above, below = axes[:, i]
        draw_distances(above, axis, results)
        cases = along(axis, results)
        total = [column(runs, "operations", 1e-12).mean() for runs in cases.values()]
        below.plot(cases.keys(), total, "k.-")
        below.set(xlabel=TITLES[axis])
    axes[0, 0].set_ylabel("energy distance × 10³")
    axes[0, 0].set_ylim(bottom=-0.5)  # of the whole row, now that it is drawn
    axes[1, 0].set_ylabel("TFLOP of the training")
    axes[1, 0].set_yscale("log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    toy_2d.write_figure(path, figure, 80)
    plt.close(figure)


# ═══ 4. The program ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Growth:
    """What is run, and where it goes."""

    seeds: tuple = (0, 1, 2)  # seeds
    samples: int = 5000  # points in the evaluation
    quick: bool = False  # one seed, a twentieth of the updates, 1000 samples, into runs/quick
    share: float = 1.0  # part of the default run's updates that are made
    workers: int = os.cpu_count() or 1  # runs side by side, one thread each
    runs: str = "runs/growth"  # folder of the finished runs, which are read back
    out: str = "results/growth"  # path of the results, without .md, .csv and .png

    def __post_init__(self):
        common.check_values(self, "seeds")
        least = 2 * max(case["modes"] for case in all_cases())  # the distance takes two points of a mode
        common.check_run(self, least)


QUICK = {"seeds": [0], "samples": 1000, "share": 0.05, "out": "runs/quick"}
LEGEND = """Energy distance ×10³ of the teacher after 50 and of the student after 1, 2, 4 and 8 Euler evaluations. Map
error: RMS from the one-step to the exact sample. TFLOP: 10¹² operations of matrix products in the whole training. Mean
± sd over the seeds. From 8 dimensions on the nearest modes are 19 deviations apart, in the plane 10."""


def growth_command(argv: list[str]) -> None:
    """Cost and quality by rows of a batch, width, dimensions and modes: one of them grows at a time."""
    settings = common.settings_of(argv, growth_command.__doc__, Growth(), QUICK)
    cells = []
    paths = []
    for case in all_cases():
        for seed in settings.seeds:
            cell = {**case, "seed": seed, "share": settings.share, "samples": settings.samples}
            mark = common.fingerprint(cell, TEACHER, SCHEDULE)  # all that a run depends on
            cells.append(cell)
            paths.append(Path(settings.runs, f"{common.slug(*case.values(), seed)}-{mark}.json"))
    common.open_out(settings.out)
    results = common.run_cells(measure, cells, paths, settings.workers)

    toy_2d.write_csv(f"{settings.out}.csv", results)
    about = common.about_runs(settings, results)
    common.write_report(settings.out, "experiments.growth", argv, [LEGEND, about, "", *table(results)])
    draw(results, f"{settings.out}.png")


def main(argv=None) -> int:
    """Run the program; returns its exit code."""
    return toy_2d.main(argv, {"growth": growth_command}, "growth", "experiments.growth")


if __name__ == "__main__":
    sys.exit(main())
