"""Labels and guidance in the plane, where the guided velocity is known exactly.

    python -m experiments.guidance                         scales 1, 2 and 4, five seeds
    python -m experiments.guidance --scales 2 --seeds 0    one student, in a minute
    python -m experiments.guidance --learn-from teacher data data-no-critic nothing

A teacher learns three labels, and a student learns the guided teacher: one pass in place of two a step.
Guided samples are distributed otherwise than the data, and a critic that holds the student against the
data undoes the guidance. So the student learns from samples of the guided teacher, if nothing else is said.
"Nothing" is score identity distillation, which needs no samples at all.
"""

import math
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import scflow
import toy_2d
from experiments import common, relatives
from scflow import Phase, TeacherSettings, require
from toy_2d import EnergyDistance, GaussianMixture

# ═══ 1. Data with labels ══════════════════════════════════════════════════════════════════

LABELS = (1, 2, 3)


def labelled() -> GaussianMixture:
    """Three labels of three Gaussians each, on arms that start where the labels overlap."""
    radius = torch.tensor([0.6, 1.5, 2.4]).repeat(3)
    arm = torch.arange(3).repeat_interleave(3)
    means = toy_2d.polar(radius, 2 * math.pi / 3 * arm + 0.35 * radius)
    return GaussianMixture(means, 0.35, labels=1 + arm)


def batch(n: int, generator=None) -> tuple[Tensor, Tensor]:
    """Data (n,2) and their labels (n,1)."""
    mixture = labelled()
    x0, component = mixture.sample(n, generator)
    return x0, mixture.labels[component, None]


def of_label(mixture: GaussianMixture, label: int) -> GaussianMixture:
    """The mixture of one label's components."""
    mine = mixture.labels == label
    return GaussianMixture(mixture.means[mine], mixture.std, mixture.weights[mine])


def tilted(mixture: GaussianMixture, label: int, scale: float, n: int, generator=None) -> Tensor:
    """n points (n,2) of the density p₀(x)^(1−w)·p₀(x|c)^w, w = `scale`."""
    return of_powers(mixture, {0: 1 - scale, label: scale}, n, generator)


def of_powers(mixture: GaussianMixture, powers: dict[int, float], n: int, generator=None) -> Tensor:
    """n points (n,2) of the density Π p₀(x|label)^power, drawn from a fine grid; label 0 is the whole mixture."""
    cells = 300  # in each direction
    reach = 4.0
    width = 2 * reach / cells
    side = (torch.arange(cells) + 0.5) * width - reach
    grid = torch.cartesian_prod(side, side)  # (cells²,2)
    zero = torch.zeros(len(grid))
    log = zero
    for label, power in powers.items():
        cond = torch.full((len(grid), 1), label)
        log = log + power * mixture.log_density(grid, zero, cond)
    cumulated = (log - log.max()).double().exp().cumsum(0)
    height = cumulated[-1] * torch.rand(n, generator=generator, dtype=torch.float64)
    cell = torch.searchsorted(cumulated, height).clamp(max=len(grid) - 1)
    jitter = torch.rand(n, 2, generator=generator) - 0.5
    return grid[cell] + width * jitter


# ═══ 2. Teacher and student ═══════════════════════════════════════════════════════════════


@lru_cache(maxsize=1)
def fit_teacher(seed: int, settings: TeacherSettings) -> scflow.MLP:
    """The teacher of a seed, trained once for all scales that a process has in turn."""
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)
    net = scflow.MLP(tokens=(1, len(LABELS)))
    for run in scflow.train_teacher(net, batch, generator, settings):
        average = run.ema
    return average


def own_samples(velocity, seed: int, n: int = 20000):
    """`batch(n, generator)` over samples of a guided teacher in 50 steps, with their labels."""
    generator = torch.Generator().manual_seed(4 * 10**6 + seed)
    data, labels = batch(n, generator)
    samples = scflow.sample(velocity, scflow.randn_like(data, generator), 50, cond=labels)

    def own_batch(n, generator):
        rows = torch.randint(len(samples), (n,), generator=generator)
        return samples[rows], labels[rows]

    return own_batch


def fit_student(teacher: scflow.MLP, scale: float, learn_from, seed: int, schedule) -> scflow.MLP:
    """Distil the guided teacher; `learn_from(n, generator)` is what its student takes for data."""
    torch.manual_seed(seed + 1)  # initial weights of the critic
    generator = torch.Generator().manual_seed(seed + 1)
    critic = scflow.PointCritic(tokens=(1, len(LABELS)))
    velocity = scflow.guided(teacher, scale)
    for run in scflow.distill(velocity, critic, learn_from, generator, schedule, student=teacher):
        average = run.ema
    return average


def with_labels(net: scflow.Velocity, labels: Tensor) -> scflow.Velocity:
    """The network with these labels (B,1), as a velocity of points and times alone."""

    def velocity(x: Tensor, t: Tensor, cond: None = None) -> Tensor:
        return net(x, t, labels)

    return velocity


def identify(teacher: scflow.MLP, scale: float, seed: int, updates: int = 1500, lr: float = 1e-3) -> scflow.MLP:
    """Score identity distillation of the guided teacher (Zhou et al., 2024): a student of one step, without data.

    The loss and its second network are those of `relatives.score_identity`. Both networks start as the teacher.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    velocity = scflow.guided(teacher, scale)
    net = scflow.clone(teacher).requires_grad_(True)
    fake = scflow.clone(teacher).requires_grad_(True)
    average = scflow.clone(net)
    opt = scflow.adamw(net, lr)
    opt_fake = scflow.adamw(fake, lr)
    for i in range(updates):
        for optimiser in (opt, opt_fake):
            scflow.set_lr(optimiser, lr * scflow.lr_factor(i, updates))
        _, labels = batch(relatives.ROWS, generator)  # of the data only the labels are used
        x1 = torch.randn(len(labels), 2, generator=generator)
        t = scflow.rand_times(x1, generator)
        lab = SimpleNamespace(generator=generator, opt_fake=opt_fake)
        lab.net = with_labels(net, labels)
        lab.fake = with_labels(fake, labels)
        lab.teacher = with_labels(velocity, labels)
        loss = relatives.score_identity(lab, None, x1, t, alpha=1.0)
        opt.zero_grad()
        loss.backward()
        opt.step()
        scflow.ema_update(average, net, scflow.growing(i, 0.9999))
    return average


# ═══ 3. Measures ══════════════════════════════════════════════════════════════════════════

COUNTS = (1, 2, 4, 8)  # the student's steps
COMPARED = (
    "floor",  # the guided teacher, to the same from other noise
    "exact to teacher",  # the exact guided flow, to the guided teacher
    "exact to tilted p₀",
    "exact to data",  # of the label
    "teacher to data",
    "student to tilted p₀",  # in one step
)


def measure_label(label: int, scale: float, n: int, teacher, student, generator) -> tuple[list[dict], dict]:
    """Energy distances of n samples with one label: of the student's steps, and of what is COMPARED.

    The student's goal is what the guided teacher reaches in 50 Euler steps from other noise. The floor
    is what the teacher itself is from that goal, three times.
    """
    mixture = labelled()
    cond = torch.full((n, 1), label)
    velocity = scflow.guided(teacher, scale)
    exact = scflow.guided(mixture, scale)

    def reached(net, solver="euler"):
        noise = torch.randn(n, 2, generator=generator)
        return scflow.sample(net, noise, 50, solver, cond)

    goal = EnergyDistance(reached(velocity))
    noise = torch.randn(n, 2, generator=generator)
    one_step = scflow.sample(student, noise, 1, cond=cond)
    students = []
    for steps in COUNTS:
        x = scflow.sample(student, noise, steps, cond=cond)
        students.append({"energy": goal(x), "gap": toy_2d.rms_distance(x, one_step)})

    ideal = reached(exact, "heun")
    fixed = torch.Generator().manual_seed(10**6)
    reference, component = of_label(mixture, label).sample(n, fixed, stratified=True)
    data = EnergyDistance(reference, component)
    density = EnergyDistance(tilted(mixture, label, scale, n, generator))
    compared = {
        "floor": [goal(reached(velocity)) for _ in range(3)],
        "exact to teacher": goal(ideal),
        "exact to tilted p₀": density(ideal),
        "exact to data": data(ideal),
        "teacher to data": data(goal.reference),
        "student to tilted p₀": density(one_step),
    }
    return students, compared


def evaluate(seed: int, scale: float, samples: int, teacher, student) -> dict:
    """The measures of a student: a row for each number of steps (its mean over labels), and what is compared."""
    generator = torch.Generator().manual_seed(2 * 10**6 + seed)
    by_label = [measure_label(label, scale, samples, teacher, student, generator) for label in LABELS]
    rows = []
    for i, steps in enumerate(COUNTS):
        found = [students[i] for students, _ in by_label]
        row = {"solver": "euler", "steps": steps, "nfe": steps}
        row["energy"] = np.mean([measures["energy"] for measures in found])
        row["gap"] = np.mean([measures["gap"] for measures in found])
        for label, measures in zip(LABELS, found):
            row[f"energy of label {label}"] = measures["energy"]
        rows.append(row)
    compared = {}
    for name in COMPARED:
        compared[name] = np.mean([other[name] for _, other in by_label])
    draws = np.array([other["floor"] for _, other in by_label])  # (labels, draws)
    spread = draws.std(ddof=1) / math.sqrt(len(LABELS))  # of a mean over labels
    return {"rows": rows, "compared": compared, "floor": {"mean": draws.mean(), "sd": spread}}


@dataclass(frozen=True)
class Job:
    """A student to train and measure: a row of the table, and a seed."""

    seed: int
    scale: float
    source: str
    samples: int
    teacher: TeacherSettings
    schedule: tuple[Phase, ...]

    @property
    def row(self) -> str:
        """The name of the row."""
        return f"w = {self.scale:g}, from {self.source}"

    def place(self, folder: str) -> str:
        """Where its files go, without their endings. All that it depends on is in the name."""
        name = common.slug("seed", self.seed, "w", self.scale, self.source)
        return f"{folder}/{name}-{common.fingerprint(self)}"


def run_one(job: Job, place: str) -> dict:
    """Train teacher and student, save both beside each other, and measure."""
    teacher = fit_teacher(job.seed, job.teacher)
    if job.source == "nothing":
        student = identify(teacher, job.scale, job.seed)
    elif job.source == "teacher":
        samples = own_samples(scflow.guided(teacher, job.scale), job.seed)
        student = fit_student(teacher, job.scale, samples, job.seed, job.schedule)
    else:
        student = fit_student(teacher, job.scale, batch, job.seed, job.schedule)
    scflow.save(f"{place}-teacher.pt", teacher)
    scflow.save(f"{place}-student.pt", student)
    metrics = {"dataset": "labelled", "seed": job.seed, "machine": toy_2d.machine()}
    metrics.update(evaluate(job.seed, job.scale, job.samples, teacher, student))
    return metrics


# ═══ 4. Table and figure ══════════════════════════════════════════════════════════════════


def compared_table(done: dict) -> list[str]:
    """Lines of Markdown from {row: [metrics of each seed]}: how far apart students, teacher, flow and densities are."""
    lines = []
    for row, runs in done.items():
        cells = [row]
        for name in COMPARED:
            values = [metrics["compared"][name] for metrics in runs]
            cells.append(common.mean_sd(values, 1e3))
        lines.append(cells)
    return common.markdown(["row", *COMPARED], lines)


LABEL_COLOURS = (toy_2d.STUDENT, toy_2d.TEACHER, toy_2d.RENOISE)


def by_label(ax, title: str, points) -> None:
    """A panel with the `points(label, generator)` of every label over the data in grey."""
    generator = torch.Generator().manual_seed(3)
    data, _ = batch(1200, generator)
    toy_2d.cloud(ax, data, title, "#cccccc", 2)
    for label, colour in zip(LABELS, LABEL_COLOURS):
        toy_2d.cloud(ax, points(label, generator), title, colour, 4)
    ax.set(xlim=(-4.9, 4.9), ylim=(-4.9, 4.9))  # over-guided samples leave the data behind


def panels(axes, scale: float, networks: dict, n: int = 400) -> None:
    """A row of panels: the tilted density, the exact guided flow, and {title: (network, steps)}."""
    mixture = labelled()

    def tilted_points(label, generator):
        return tilted(mixture, label, scale, n, generator)

    by_label(axes[0], "tilted p₀", tilted_points)
    axes[0].set_ylabel(f"w = {scale:g}", fontsize=13)
    flows = {"exact guided flow": (scflow.guided(mixture, scale), 100), **networks}
    for ax, (title, (net, steps)) in zip(axes[1:], flows.items()):

        def reached(label, generator, net=net, steps=steps):
            noise = torch.randn(n, 2, generator=generator)
            return scflow.sample(net, noise, steps, cond=torch.full((n, 1), label))

        by_label(ax, title, reached)


def draw(places: dict, path: str) -> None:
    """A row of panels for each scale, from {scale: where its networks are}."""
    plt = toy_2d.drawing()
    size = (11, 2.8 * len(places))
    figure, axes = plt.subplots(len(places), 4, figsize=size, squeeze=False)
    for row, (scale, place) in zip(axes, places.items()):
        teacher = scflow.guided(scflow.load(f"{place}-teacher.pt"), scale)
        student = scflow.load(f"{place}-student.pt")
        panels(row, scale, {"teacher, 50 steps": (teacher, 50), "student, 1 step": (student, 1)})
    toy_2d.write_figure(path, figure, 80)
    plt.close(figure)


# ═══ 5. The command ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Guidance:
    """Which students are compared."""

    scales: tuple = (1.0, 2.0, 4.0)  # guidance scales w of the teacher
    seeds: tuple = (0, 1, 2, 3, 4)  # seeds; the figure shows the first
    learn_from: tuple = ("teacher",)  # what the student sees: teacher (its samples), data, data-no-critic, nothing
    samples: int = 6000  # points of each label that are compared
    workers: int = os.cpu_count() or 1  # runs side by side, one thread each
    runs: str = "runs/guidance"  # folder of the finished runs, which are read back
    out: str = "results/guidance"  # path of the results, without .md, .csv and .png

    def __post_init__(self):
        sources = ("teacher", "data", "data-no-critic", "nothing")
        for source in self.learn_from:
            require(source in sources, f"learn_from is {source!r}, not one of {', '.join(sources)}")
        common.check_values(self, "scales", "seeds", "learn_from")
        require(all(math.isfinite(scale) for scale in self.scales), "guidance scales are finite numbers")
        require(self.samples >= 50, f"samples must be at least 50, not {self.samples}")


LEGEND = """Energy distance ×10³ from the student's samples, by its passes, to what the guided teacher reaches in
50 steps of two passes each; mean over labels. Gap: RMS from one-step to last sample."""


def guidance_command(argv: list[str]) -> None:
    """Distil a guided teacher of labelled points for every scale and seed; write measures, tables and a figure."""
    two_phase = scflow.SCHEDULES["two_phase"]
    given, teacher, changes = toy_2d.cli(argv, guidance_command.__doc__, Guidance(), TeacherSettings(), two_phase)
    asked = Guidance(**given)
    settings = TeacherSettings(**teacher)
    schedule = toy_2d.revise(two_phase, changes)
    schedules = {source: schedule for source in asked.learn_from}
    if "data-no-critic" in schedules:
        schedules["data-no-critic"] = toy_2d.revise(schedule, {"lambda_adv": [0.0]})
    common.open_out(asked.out)

    rows = {}  # {row: the row it is compared with}
    jobs = []
    for seed in asked.seeds:
        for scale in asked.scales:
            other = ""
            for source in asked.learn_from:
                job = Job(seed, scale, source, asked.samples, settings, schedules[source])
                jobs.append(job)
                rows[job.row] = other
                other = other or job.row
    places = [job.place(asked.runs) for job in jobs]
    cells = [{"job": job, "place": place} for job, place in zip(jobs, places)]
    paths = [Path(f"{place}.json") for place in places]
    measured = common.run_cells(run_one, cells, paths, asked.workers)

    by_row = {}  # the measures of every seed
    shown = {}  # where the networks of the first seed are
    for job, place, metrics in zip(jobs, places, measured):
        by_row.setdefault(job.row, []).append(metrics)
        if job.source == asked.learn_from[0]:
            shown.setdefault(job.scale, place)
    results = common.Results(rows, [(job.row, metrics) for job, metrics in zip(jobs, measured)])
    toy_2d.write_csv(f"{asked.out}.csv", results.records)
    lines = [LEGEND, *results.about(asked.samples), "", *results.table(), ""]
    tests = results.tests()
    if tests:
        lines += [*tests, ""]
    lines += ["Energy distances ×10³ between them; mean over labels.", "", *compared_table(by_row)]
    common.write_report(asked.out, "experiments.guidance", argv, lines)
    draw(shown, f"{asked.out}.png")


def main(argv=None) -> int:
    """The command; bad input is one line on stderr and exit code 2."""
    return toy_2d.main(argv, {"guidance": guidance_command}, "guidance", "experiments.guidance")


if __name__ == "__main__":
    sys.exit(main())
