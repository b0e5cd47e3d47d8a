# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 8. Growth
#
# **Question.** More modes, more dimensions, a wider network, a larger batch: what happens to the errors, and to the
# seconds?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/08_growth.ipynb)

# %%
import subprocess
import sys
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path[:0] = [".", ".."]  # a clone holds scflow.py here or one folder up
try:
    import scflow
    import toy_2d
except ImportError:  # a hosted notebook: fetch it once
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "git+https://github.com/OWNER/REPO"], check=True)
    import scflow
    import toy_2d

torch.set_num_threads(1)  # networks this small run best in one thread
plt.rcParams.update({"font.size": 12, "figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Mixtures of any dimension
#
# A mixture of Gaussians keeps its closed form in any dimension: exact velocity, exact flow map. Eight modes stand on a
# circle in the plane, and on four axes from there on. For more modes in the plane there are square grids, whose modes
# get narrower as they get closer.


# %%
def mixture(d=2, modes=8):
    """`modes` Gaussians in d dimensions, their means at RMS radius 2; a tenth of the way to the next one wide."""
    if (d, modes) == (2, 8):
        return toy_2d.dataset("8gaussians")
    if d == 2:
        side = round(modes**0.5)
        assert side**2 == modes, "a grid has a square number of modes"
        means = torch.cartesian_prod(*2 * [torch.arange(side) - (side - 1) / 2])
        spacing = 2 / means.square().sum(1).mean().sqrt()
        return scflow.GaussianMixture(spacing * means, spacing.item() / 10)
    assert 2 * d >= modes, "two modes for each axis"
    axes = 2 * torch.eye(modes // 2, d)
    return scflow.GaussianMixture(torch.cat([axes, -axes]), 0.15)


for d, modes in ((2, 8), (2, 25), (8, 8), (32, 8)):
    data = mixture(d, modes)
    apart = torch.cdist(data.means, data.means).fill_diagonal_(9).min().item()
    assert data.means.shape == (modes, d) and abs(data.means.square().sum(1).mean().sqrt() - 2) < 1e-4
    if __name__ == "__main__":  # not where `bench` imports the functions
        print(f"{modes:2d} modes in {d:2d} dimensions: {apart / data.std:4.1f} deviations apart")

# %% [markdown]
# **Exercise.** In d dimensions the points of one mode are about s·√d from its middle, so in 32 dimensions the modes
# look as if they touched. Do they? Count the points that are nearer to another mode's middle than to their own.

# %%
x, own = mixture(32, 8).sample(10_000, torch.Generator().manual_seed(0))
# your answer
strays = (torch.cdist(x, mixture(32, 8).means).argmin(1) != own).sum()

# %%
assert strays == 0  # what counts is the deviation along the line to the other middle, and that is s in any dimension


# %% [markdown]
# ## One run
#
# The defaults of `toy_2d.py`, with one number changed at a time. `share` shortens everything alike. The time of an
# update is the median of what the processor spent on it.


# %%
def measure(rows=512, width=128, d=2, modes=8, seed=0, share=1.0, samples=5000):
    """Train teacher and student on one mixture; returns settings, milliseconds per update, and rows of measures."""
    torch.manual_seed(seed)
    data, generator = mixture(d, modes), torch.Generator().manual_seed(seed)

    def batch(n, generator):
        return data.sample(n, generator)[0], None

    def timed(loop):
        times = [time.process_time()]
        for state in loop:
            times.append(time.process_time())
            net = state.ema
        return net, 1e3 * np.diff(times)

    teacher = scflow.TeacherSettings()
    teacher = replace(teacher, teacher_batch=rows, teacher_steps=round(share * teacher.teacher_steps))
    phases = [replace(p, batch=rows, steps=round(share * p.steps)) for p in scflow.SCHEDULES["two_phase"]]
    net, disc = scflow.MLP(d, width), scflow.PointDiscriminator(d, width // 2)
    flow, first = timed(scflow.train_teacher(net, batch, generator, teacher))
    student, then = timed(scflow.distill(flow, disc, batch, generator, phases))
    ms = [np.median(part).item() for part in (first, then[: phases[0].steps], then[phases[0].steps :])]
    seconds = sum(n * t for n, t in zip((teacher.teacher_steps, *(p.steps for p in phases)), ms)) / 1e3

    generator = torch.Generator().manual_seed(10**6 + seed)
    energy = scflow.EnergyDistance(*data.sample(samples, generator, stratified=True))
    floor = scflow.noise_floor(energy, lambda: data.sample(samples, generator)[0], 10)
    noise, few = torch.randn(samples, d, generator=generator), min(samples, 1000)
    truth, found = data.flow_map(noise[:few], torch.ones(few)), []
    for who, net, counts in (("teacher", flow, (1, 50)), ("student", student, (1, 2, 4, 8))):
        for n in counts:
            x = scflow.sample(net, noise, n)
            error = scflow.rms_distance(x[:few], truth)
            found.append(dict(who=who, nfe=n, energy=energy(x), map_error=error, floor=floor[0], floor_sd=floor[1]))
    case = dict(rows=rows, width=width, d=d, modes=modes, seed=seed)
    return case | dict(ms=ms, seconds=seconds, machine=toy_2d.machine(), measures=found)


AXES = {  # what grows, and through which values; the rest stays at the default
    "rows": (128, 256, 512, 1024),
    "width": (32, 64, 128, 256),
    "d": (2, 8, 32),
    "modes": (9, 25, 49, 81),
}
DEFAULT = dict(rows=512, width=128, d=2, modes=8)
CASES = [dict(case) for case in {tuple((DEFAULT | {k: v}).items()): 0 for k, values in AXES.items() for v in values}]
TITLES = dict(rows="rows of a batch", width="hidden units of a layer", d="dimensions", modes="modes of a grid")


def along(axis, results):
    """{value: results of all seeds} of the cases in which at most this setting is not the default."""
    others = {k: v for k, v in DEFAULT.items() if k != axis}
    cases = {v: [r for r in results if r[axis] == v and others.items() <= r.items()] for v in AXES[axis]}
    return {v: runs for v, runs in cases.items() if runs}


def records(metrics):
    """The rows of a CSV file."""
    shared = {k: metrics[k] for k in (*DEFAULT, "seed", "seconds")}
    shared |= dict(zip(("ms_teacher", "ms_phase_1", "ms_phase_2"), metrics["ms"]))
    return [shared | measure for measure in metrics["measures"]]


def found(runs, who, nfe, key="energy", scale=1e3):
    """A measure of one network at one number of steps, over the seeds."""
    return [scale * m[key] for r in runs for m in r["measures"] if (m["who"], m["nfe"]) == (who, nfe)]


def growth_table(results):
    """Lines of Markdown: one row for each case, mean ± sd over seeds; times are medians."""
    seeds, machines = (", ".join(sorted({str(r[k]) for r in results})) for k in ("seed", "machine"))
    yield "Energy distance ×10³ of the teacher after 50 and the student after 1, 2, 4 and 8 Euler evaluations; map"
    yield "error: RMS from the one-step to the exact sample; milliseconds of the processor for an update, and seconds"
    yield f"for all of them. Mean ± sd over seeds {seeds}; {machines}."
    yield ""
    heads = (
        "what grows",
        "to",
        "teacher ms",
        "phase 1 ms",
        "phase 2 ms",
        "s",
        "floor",
        "teacher 50",
        *"1248",
        "map error",
    )
    yield from [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for axis in AXES:
        for value, runs in along(axis, results).items():
            cells = [f"{np.median([r['ms'][i] for r in runs]):.1f}" for i in range(3)]
            cells += [f"{np.median([r['seconds'] for r in runs]):.1f}"]
            floor, deviation = (np.mean(found(runs, "student", 1, key)) for key in ("floor", "floor_sd"))
            cells += [f"{floor:.2f} ± {deviation:.2f}"]
            columns = [found(runs, "teacher", 50), *(found(runs, "student", n) for n in (1, 2, 4, 8))]
            for v in [*columns, found(runs, "student", 1, "map_error", 1)]:
                cells += [f"{np.mean(v):.2f}" + (f" ± {np.std(v, ddof=1):.2f}" if len(v) > 1 else "")]
            yield f"| {TITLES[axis]} | {value} | {' | '.join(cells)} |"


LINES = (("teacher", 50, "#D55E00", "o"), ("student", 1, "#56B4E9", "s"), ("student", 8, "#0072B2", "D"))


def draw_growth(results):
    """Distances above, seconds below; one column for each thing that grows. Returns the figure."""
    fig, axes = plt.subplots(
        2, len(AXES), figsize=(13, 6), sharex="col", sharey="row", height_ratios=(2, 1), layout="constrained"
    )
    for column, axis in zip(axes.T, AXES):
        cases = along(axis, results)
        values, shift = list(cases), len(LINES) // 2
        for i, (who, n, color, marker) in enumerate(LINES):
            groups = [found(runs, who, n) for runs in cases.values()]
            middle = np.array([np.mean(v) for v in groups])
            reach = np.abs([[f(v) for v in groups] for f in (np.min, np.max)] - middle)
            x, label = [v * 1.03 ** (i - shift) for v in values], f"{who}, {toy_2d.plural(n, 'step')}"
            column[0].errorbar(x, middle, reach, color=color, marker=marker, label=label)
        floor = [np.mean(found(r, "student", 1, "floor")) for r in cases.values()]
        above = [m + 2 * np.mean(found(r, "student", 1, "floor_sd")) for m, r in zip(floor, cases.values())]
        column[0].fill_between(values, -1, above, color="#dddddd", lw=0, label="noise floor + 2 sd")
        column[1].plot(values, [np.median([r["seconds"] for r in runs]) for runs in cases.values()], "k.-")
        column[0].set_xscale("log", base=2)
        column[0].set_yscale("symlog", linthresh=1)
        column[1].set_yscale("log")
        column[1].set(xlabel=TITLES[axis])
        column[1].set_xticks(values, values)
        column[1].minorticks_off()
    ticks = [0, 1, 10, 100]
    axes[0, 0].set_yticks(ticks, ticks)
    axes[0, 0].set(ylabel="energy distance × 10³", ylim=(-0.5, None))
    axes[1, 0].set_yticks([10, 20, 40], [10, 20, 40])
    axes[1, 0].minorticks_off()
    axes[1, 0].set(ylabel="CPU seconds")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return fig


# %% [markdown]
# ## All of it, in small
#
# `python toy_2d.py bench --growth --samples 5000 --out results/growth` runs every case on three seeds. Here a third of
# the updates and one seed, of the dimensions and two batches.

# %%
if __name__ == "__main__":
    short = [case for case in CASES if case["modes"] == 8 and case["width"] == 128 and case["rows"] in (256, 512)]
    results = [measure(**case, share=1 / 3, samples=4000) for case in short]
    print(*growth_table(results), sep="\n")

# %%
if __name__ == "__main__":
    fig, ax = plt.subplots(figsize=(7, 3.6))
    for who, n, color, marker in LINES:
        label, runs = f"{who}, {toy_2d.plural(n, 'step')}", along("d", results)
        ax.plot(list(runs), [found(r, who, n)[0] for r in runs.values()], color=color, marker=marker, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_xticks(list(runs), list(runs))
    ax.set_yticks([0, 1, 10, 100], [0, 1, 10, 100])
    ax.minorticks_off()
    ax.set(xlabel="dimensions", ylabel="energy distance × 10³", ylim=(-0.5, 400))
    ax.legend(frameon=False)
    plt.tight_layout()
    plt.show()
