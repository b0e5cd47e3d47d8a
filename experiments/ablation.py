"""Which loss repairs what: rows of settings on data sets and seeds; a table, paired tests and a figure.

    python -m experiments.ablation                    the main rows, four data sets, five seeds
    python -m experiments.ablation --quick            one data set, one seed, in minutes
    python -m experiments.ablation --rows sweeps --datasets 8gaussians 25gaussians --seeds 0 1 2
    python -m experiments.ablation --rows two_phase "--lambda-self 0 2" --datasets moons --out results/mine

All rows of a data set and seed share one teacher. A finished row is read back, and not run again.
"""

import os
import shlex
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

import scflow
import toy_2d
from experiments import common
from scflow import Phase, TeacherSettings, require
from toy_2d import Run

# ═══ 1. Rows ══════════════════════════════════════════════════════════════════════════════
# A row is a name, flags of toy_2d.py, and the row that it is compared with.

P1, P2 = scflow.SCHEDULES["two_phase"]
ACCURATE = f"--delta {P1.delta} --walk {P1.walk}"  # the teacher's steps of this project's schedule
PHASE_1 = f"{ACCURATE} --tau {P1.tau}"
ALONE = f"--preset consistency {PHASE_1} --student-batch {P1.batch} --student-lr {P1.lr}"

# In families, for the figure. By the costs of `experiments.relatives` all take about the same time, but for "ours":
# there only "two_phase, as long" does, and the others less than half of it.
FAMILIES = {
    "the paper's losses, one after another": {
        "consistency": ("--preset consistency", ""),
        "+ truncation": ("--preset consistency --tau 0.4", "consistency"),
        "+ adversarial": ("--preset paper --lambda-self 0 --lambda-bi 0 --student-steps 1450", "+ truncation"),
        "+ self-correction": ("--preset paper --lambda-bi 0 --student-steps 1200", "+ adversarial"),
        "paper": ("--preset paper", "+ self-correction"),  # + bidirectional
    },
    "the paper's, without one": {
        "paper − truncation": ("--preset paper --tau 0", "paper"),
        "paper − adversarial": ("--preset paper --lambda-adv 0 --student-steps 1600", "paper"),
        "paper − self-correction": ("--preset paper --lambda-self 0 --student-steps 1330", "paper"),
    },
    # The best of twelve trials each: consistency at one step, the paper over all steps. And both with accurate steps.
    "at their best": {
        "consistency, δ 0.02, lr 8e-3": ("--preset consistency --delta 0.02 --student-lr 8e-3", "consistency"),
        "consistency, walk heun-2, δ 0.5": (f"--preset consistency {ACCURATE} --student-steps 1800", "consistency"),
        "paper, λ_self 1": ("--preset paper --lambda-self 1", "consistency"),
        "paper, walk heun-2, δ 0.5": (f"--preset paper {ACCURATE} --student-steps 770", "paper"),
    },
    "ours": {
        "two_phase": ("--preset two_phase", "paper, λ_self 1"),
        "two_phase, as long": ("--preset two_phase --student-steps 3000", "consistency, walk heun-2, δ 0.5"),
        "two_phase, walk euler, δ 0.1": ("--walk euler --delta 0.1", "two_phase"),
        "two_phase, λ_adv 0": ("--lambda-adv 0", "two_phase"),
    },
}
MAIN = {row: what for family in FAMILIES.values() for row, what in family.items()}

# One setting of the paper's at a time, with as many updates.
SWEEPS = {
    "paper": ("--preset paper", ""),
    "λ_self 0": ("--preset paper --lambda-self 0", "paper"),
    "λ_self 0.3": ("--preset paper --lambda-self 0.3", "paper"),
    "λ_self 1": ("--preset paper --lambda-self 1", "paper"),
    "λ_self 3": ("--preset paper --lambda-self 3", "paper"),
    "τ 0": ("--preset paper --tau 0", "paper"),
    "τ 0.2": ("--preset paper --tau 0.2", "paper"),
    "τ 0.6": ("--preset paper --tau 0.6", "paper"),
    "δ 0.02": ("--preset paper --delta 0.02", "paper"),
    "δ 0.2": ("--preset paper --delta 0.2", "paper"),
    "walk heun": ("--preset paper --walk heun", "paper"),
    "target EMA 0": ("--preset paper --target-ema 0", "paper"),
    "squared distance": ("--preset paper --distance squared", "paper"),
    "softplus, R1 1": ("--preset paper --adversarial softplus --r1 1", "paper"),
    "self-correction, fresh noise": ("--preset paper", "paper"),
    "self-correction, free gradient": ("--preset paper", "paper"),
    "paper, teacher exact": ("--preset paper --teacher exact", "paper"),
}

# One setting of this project's schedule at a time.
RECIPE = {
    "two_phase": ("--preset two_phase", ""),
    "phase 1 alone, as many updates": (f"{ALONE} --student-steps {P1.steps + P2.steps}", "two_phase"),
    "phase 1, walk euler": ("--walk euler", "two_phase"),
    "phase 1, walk heun": ("--walk heun", "two_phase"),
    "phase 1, δ 0.1": ("--delta 0.1", "two_phase"),
    "phase 1, δ 1": ("--delta 1", "two_phase"),
    "phase 1, a critic": (f"--lambda-adv 0.1 {P2.lambda_adv} --judged {P2.judged}", "two_phase"),
    "phase 1, twice as long": (f"--student-steps {2 * P1.steps} {P2.steps}", "two_phase"),
    "phase 2, twice as long": (f"--student-steps {P1.steps} {2 * P2.steps}", "two_phase"),
    "phase 2, λ_adv 0": (f"--lambda-adv {P1.lambda_adv} 0", "two_phase"),
    "phase 2, λ_adv 0.3": (f"--lambda-adv {P1.lambda_adv} 0.3", "two_phase"),
    "phase 2, none pinned": (f"--pinned {P1.pinned} 0", "two_phase"),
    "phase 2, x̂₀ of the student": ("--self-source student", "two_phase"),
    "phase 2, landing points": ("--self-form x0", "two_phase"),
    "phase 2, consistency kept": (f"--lambda-consistency 1 {PHASE_1}", "two_phase"),
    "teacher exact": ("--teacher exact", "two_phase"),
}
GROUPS = {"main": MAIN, "sweeps": SWEEPS, "recipe": RECIPE}


def chosen_rows(names: list[str]) -> dict[str, tuple[str, str]]:
    """{row: (flags, the row it is compared with)} of groups, rows by name, and lines of flags."""
    known = {}
    for group in GROUPS.values():
        known.update(group)
    rows = {}
    for name in names:
        if name in GROUPS:
            rows.update(GROUPS[name])
        elif name in known:
            rows[name] = known[name]
        else:
            require(name.startswith("-"), f"no row {name!r}: see experiments/ablation.py, section 1")
            first = next(iter(rows), "")
            rows[name] = (name, first)
    return rows


# ═══ 2. Two other self-corrections ════════════════════════════════════════════════════════


def fresh_noise(run, x0, x1, t, phase, weights, generator=None, cond=None):
    """`distill_losses`, but x̂_t is made with noise from which x̂₀ did not come."""
    others = {**weights, "self": 0.0}
    losses, x0_hat = scflow.distill_losses(run, x0, x1, t, phase, others, generator, cond)
    if weights["self"] > 0:
        with torch.no_grad():  # x̂₀ is a constant, as in the paper
            x0_fixed = scflow.predict_x0(run.student, x1, torch.ones_like(t), cond)
        noise = scflow.randn_like(x1, generator)
        xt_hat = scflow.interpolate(x0_fixed, noise, t)
        v_hat = run.student(xt_hat, t, cond)
        losses["self"] = scflow.self_correction_loss(v_hat, xt_hat, x0_fixed, noise, t)
    return losses, x0_hat


def free_gradient(run, x0, x1, t, phase, weights, generator=None, cond=None):
    """`distill_losses`, but x̂₀ is no constant in self-correction: it moves to where later steps end."""
    others = {**weights, "self": 0.0}
    losses, x0_hat = scflow.distill_losses(run, x0, x1, t, phase, others, generator, cond)
    if weights["self"] > 0:
        x0_free = scflow.predict_x0(run.student, x1, torch.ones_like(t), cond)
        xt_hat = scflow.interpolate(x0_free, x1, t)
        v_hat = run.student(xt_hat, t, cond)
        losses["self"] = scflow.self_correction_loss(v_hat, xt_hat, x0_free, x1, t)
    return losses, x0_hat


VARIANTS = {
    "self-correction, fresh noise": fresh_noise,
    "self-correction, free gradient": free_gradient,
}


# ═══ 3. Jobs ══════════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Job:
    """A row on one data set with one seed; without a schedule it is the teacher that is measured."""

    row: str
    run: Run
    teacher: TeacherSettings
    schedule: tuple[Phase, ...]

    def path(self, folder: str) -> Path:
        """The file of its measures. Everything that they depend on is in its name."""
        variant = VARIANTS.get(self.row, scflow.distill_losses).__name__
        mark = common.fingerprint(self.run, self.teacher, self.schedule, variant)
        words = common.slug(Path(self.run.dataset).stem, self.run.seed, self.row)
        return Path(folder, f"{words[:80]}-{mark}.json")


def teacher_run(run: Run) -> Run:
    """The run without what its teacher does not depend on: one teacher serves all that are equal."""
    return replace(run, preset=Run.preset, samples=Run.samples, nfe=Run.nfe)


@lru_cache(maxsize=1)
def fit_teacher(run: Run, settings: TeacherSettings):
    """The teacher, trained once for all rows of a process that ask for it one after the other."""
    return toy_2d.fit_teacher(run, toy_2d.prepare(run), settings)


def measure(job: Job) -> dict:
    """Train what a job needs, and measure it. A run that diverges is reported."""
    run = job.run
    metrics = {"dataset": run.dataset, "seed": run.seed, "machine": toy_2d.machine()}
    data = toy_2d.prepare(run)
    try:
        net = fit_teacher(teacher_run(run), job.teacher)
        if job.schedule:
            loss_function = VARIANTS.get(job.row, scflow.distill_losses)
            net = toy_2d.fit_student(run, data, net, job.schedule, loss_function=loss_function).ema
        elif run.teacher == "exact":
            net = data
    except FloatingPointError as error:
        metrics["failure"] = str(error)
        return metrics

    who = "student" if job.schedule else "teacher"
    net = scflow.clone(net).cpu()
    data = toy_2d.dataset(run.dataset)
    metrics["floor"] = toy_2d.floor_of(run.dataset, run.samples)
    metrics["rows"] = toy_2d.evaluate(run, data, who, net)
    if job.schedule and isinstance(data, toy_2d.GaussianMixture):
        error = toy_2d.path_error(net, data, run.seed)
        for measures in metrics["rows"]:
            measures["path_error"] = error
    return metrics


def measure_group(jobs: list[Job], folder: str) -> list[dict]:
    """The measures of all jobs of one teacher, in one process; finished ones are read back."""
    return [common.run_cell(measure, {"job": job}, job.path(folder)) for job in jobs]


def make_groups(rows: dict, datasets: list[str], seeds: list[int], samples: int, flags: str) -> list[list[Job]]:
    """Jobs grouped by their teacher, whose own job comes first. Raises ValueError where settings are wrong."""
    groups = {}
    for dataset in datasets:
        mixture = isinstance(toy_2d.dataset(dataset), toy_2d.GaussianMixture)
        for seed in seeds:
            fixed = ["--dataset", dataset, "--seed", str(seed), "--samples", str(samples), "--quiet"]
            teachers = set()
            for row, (row_flags, _) in rows.items():
                try:
                    run, teacher, schedule = toy_2d.configure(shlex.split(f"{row_flags} {flags}") + fixed)
                except ValueError as error:
                    raise ValueError(f"row {row!r}: {error}") from None
                if run.teacher == "exact" and not mixture:
                    continue  # a row that this data set cannot have
                key = (teacher_run(run), teacher)
                if key not in groups:
                    name = "exact velocity" if run.teacher == "exact" else "teacher"
                    if name in teachers:
                        name = f"teacher of {row}"
                    teachers.add(name)
                    itself = replace(run, preset=Run.preset)
                    groups[key] = [Job(name, itself, teacher, ())]
                groups[key].append(Job(row, run, teacher, schedule))
    require(groups, "--teacher exact needs a mixture, and there is none among the data sets")
    return list(groups.values())


# ═══ 4. The command ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Ablation:
    """Which runs are compared."""

    rows: tuple = ("main",)  # groups (main, sweeps, recipe), rows by name, or your own: flags of toy_2d.py in quotes
    datasets: tuple = ("8gaussians", "25gaussians", "checkerboard", "spirals")  # data sets, or all
    seeds: tuple = (0, 1, 2, 3, 4)  # seeds
    flags: str = ""  # further flags of every run, in quotes
    samples: int = 20000  # points in the evaluation
    quick: bool = False  # one data set and seed, 6000 samples, into runs/quick, where nothing else is asked for
    workers: int = os.cpu_count() or 1  # teachers with their rows side by side, one thread each
    runs: str = "runs/ablation"  # folder of the finished rows, which are read back
    out: str = "results/ablation"  # path of the results, without .csv, .md and .png

    def __post_init__(self):
        common.check_values(self, "rows", "datasets", "seeds")


QUICK = {"datasets": ["8gaussians"], "seeds": [0], "samples": 6000, "out": "runs/quick"}
LEGEND = """Energy distance ×10³ by Euler evaluations, then by re-noising. Gap: RMS from one-step to last sample.
On mixtures, of one step: map error, the RMS to the exact sample; coverage of the modes; share within 3σ of a mode
(of the truth: 98.9%). Path error: RMS from f(x_t,t) to f*(x_t,t)."""


def ablation_command(argv: list[str]) -> None:
    """Run rows of settings on data sets and seeds; write every measure, a table, paired tests and figures."""
    settings = common.settings_of(argv, ablation_command.__doc__, Ablation(), QUICK)
    rows = chosen_rows(settings.rows)
    datasets = common.dataset_names(settings.datasets)
    groups = make_groups(rows, datasets, settings.seeds, settings.samples, settings.flags)
    common.open_out(settings.out)
    Path(settings.runs).mkdir(parents=True, exist_ok=True)

    folders = [settings.runs] * len(groups)
    measured = common.parallel_map(settings.workers, measure_group, groups, folders)
    done = []
    compared = {}  # {row: the row it is compared with}, teachers first
    for jobs, results in zip(groups, measured):
        compared[jobs[0].row] = ""
        for job, metrics in zip(jobs, results):
            done.append((job.row, metrics))
    for row, (_, other) in rows.items():
        compared[row] = other

    results = common.Results(compared, done)
    toy_2d.write_csv(f"{settings.out}.csv", results.records)
    lines = [LEGEND, *results.about(settings.samples), ""]
    lines += [*results.table(), "", *results.tests()]
    common.write_report(settings.out, "experiments.ablation", argv, lines)
    results.draw(f"{settings.out}.png", families=FAMILIES)


def main(argv=None) -> int:
    """The command; bad input is one line on stderr and exit code 2."""
    return toy_2d.main(argv, {"ablation": ablation_command}, "ablation", "experiments.ablation")


if __name__ == "__main__":
    sys.exit(main())
