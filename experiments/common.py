"""What all experiments share: work in processes, finished work read back; tables, paired tests and a figure."""

import hashlib
import json
import math
import re
import shlex
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import toy_2d
from scflow import require

# ═══ 1. Work ══════════════════════════════════════════════════════════════════════════════


def parallel_map(workers: int, function, *lists) -> list:
    """list(map(function, *lists)) in processes of one thread each, with a progress bar.

    `function` stands at the top level of a module, so that another process can import it.
    """
    context = get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
            results = pool.map(function, *lists)
            return list(tqdm(results, total=len(lists[0]), desc="runs"))
    except BrokenProcessPool:
        raise OSError("a process was killed, perhaps for want of memory: try fewer --workers") from None


def run_cell(function, cell: dict, path: Path) -> dict:
    """function(**cell), a dictionary that is kept in a JSON file. A finished one is read back, not run again."""
    if not path.exists():
        toy_2d.write_text(path, json.dumps(function(**cell)))
    return toy_2d.read_json(path)


def run_cells(function, cells: list[dict], paths: list[Path], workers: int) -> list[dict]:
    """`run_cell` of many cells, `workers` of them side by side. The results come in the order of the cells."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    return parallel_map(workers, run_cell, [function] * len(cells), cells, paths)


def slug(*words) -> str:
    """Words and numbers as a safe file name: slug("two phase", 0.5) is "two-phase-0.5"."""
    text = " ".join(str(word) for word in words)
    return "-".join(re.findall(r"[\w.]+", text))


def fingerprint(*settings) -> str:
    """Eight characters that stand for settings: in a file's name they keep the results of other settings apart."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


# ═══ 2. Settings and reports ══════════════════════════════════════════════════════════════


def settings_of(argv: list[str], text: str, defaults, quick: dict):
    """The settings of a command line, of the class of `defaults`. With --quick, those of `quick` are the defaults.

    text  begins the --help.
    """
    (given,) = toy_2d.cli(argv, text, defaults)
    if given.get("quick"):
        given = {**quick, **given}
    return type(defaults)(**given)


def check_values(settings, *names: str) -> None:
    """Raise ValueError if a setting names a value twice, which would be counted twice, or a negative seed."""
    for name in names:
        values = getattr(settings, name)
        require(name != "seeds" or min(values) >= 0, f"seeds must not be negative: {values}")
        require(len(set(values)) == len(values), f"--{name.replace('_', '-')} names one twice")


def check_run(settings, least: int) -> None:
    """Raise ValueError for a share of the updates, a number of workers or of samples (`least` or more) that is none."""
    require(0.001 <= settings.share <= 1000, f"share lies between 0.001 and 1000, and is {settings.share}")
    require(settings.workers >= 1, f"workers must be at least 1, not {settings.workers}")
    require(settings.samples >= least, f"samples must be at least {least}, not {settings.samples}")


def dataset_names(names) -> list[str]:
    """Names of data sets, where "all" stands for every one. Raises ValueError for a name that is none."""
    names = list(toy_2d.DATASETS) if "all" in names else list(names)
    for name in names:
        toy_2d.dataset(name)
    return names


def open_out(out: str) -> None:
    """Make the folder of OUT.md, OUT.csv and OUT.png: what is not writable is found before the first run."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)


def about_runs(settings, results: list[dict]) -> str:
    """The line above a table: seeds, samples and machines."""
    seeds = ", ".join(str(seed) for seed in settings.seeds)
    machines = "; ".join(sorted({run["machine"] for run in results}))
    return f"Seeds {seeds}; {settings.samples} samples; {machines}."


def write_report(out: str, program: str, argv: list[str], lines: list[str]) -> None:
    """Write OUT.md, whose first line is the command that made it, and print it."""
    command = shlex.join(["python", "-m", program, *argv])
    text = "\n".join([f"`{command}`", "", *lines]).strip()
    toy_2d.write_text(f"{out}.md", text + "\n")
    print(text)


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return lines


def mean_sd(values, scale: float = 1, digits: int = 2) -> str:
    """Mean ± standard deviation of some numbers; of one number itself, of none nothing."""
    values = scale * np.array(list(values), dtype=float)
    if len(values) == 0:
        return ""
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.{digits}f}"
    return text


def paired(a: dict, b: dict) -> str:
    """How b compares with a, both {(data set, seed): value}: the ratio of the means, how many pairs fall, and p.

    p is that of Wilcoxon's signed-rank statistic among 20,000 random choices of the signs, two-sided.
    """
    pairs = sorted(a.keys() & b.keys())
    if len(pairs) < 2:
        return ""
    x = np.array([a[pair] for pair in pairs])
    y = np.array([b[pair] for pair in pairs])
    size = np.abs(y - x)
    ranks = 1 + size.argsort().argsort()
    signed = np.sign(y - x) * ranks
    random = np.random.default_rng(0)
    signs = random.choice([-1, 1], (20000, len(pairs)))
    by_chance = np.abs(signs @ signed)
    as_far = (by_chance >= abs(signed.sum())).sum()
    p = (1 + as_far) / 20001
    falls = (y < x).sum()
    return f"×{y.mean() / x.mean():.2f}, {falls}/{len(pairs)}, {p:.2g}"


# ═══ 3. Results ═══════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Column:
    """A column of the table: a measure, of one solver at one number of network evaluations."""

    title: str
    solver: str
    nfe: float
    key: str
    scale: float
    digits: int


class Results:
    """The measures of rows (settings, methods) on data sets and seeds: records, table, paired tests, figure.

    rows    {row: the row it is compared with, or ""}, in the order of the table.
    done    [(row, metrics)]. metrics has "dataset", "seed", "floor", "machine" and "rows", one dictionary of
            measures for each "solver" and "nfe"; a run that diverged has "dataset", "seed" and "failure".
    solver  the one whose energy distances come first.
    Raises ValueError if every run diverged.
    """

    def __init__(self, rows: dict[str, str], done: list[tuple[str, dict]], solver: str = "euler"):
        self.failed = []
        self.records = []  # for the CSV file
        self.floors = {}
        self.machines = []
        for row, metrics in done:
            dataset = metrics["dataset"]
            seed = metrics["seed"]
            if "failure" in metrics:
                self.failed.append(f"Failed: {row}, {dataset}, seed {seed}: {metrics['failure']}.")
                continue
            for measures in metrics["rows"]:
                self.records.append({"row": row, "dataset": dataset, "seed": seed, **measures})
            self.floors[dataset] = metrics["floor"]
            if metrics["machine"] not in self.machines:
                self.machines.append(metrics["machine"])
        require(self.records, f"every run failed. {' '.join(self.failed[:1])}")
        found = {record["row"] for record in self.records}
        self.rows = {row: other for row, other in rows.items() if row in found}
        self.by_place = {}  # {(row, solver, nfe): its records}
        for record in self.records:
            place = (record["row"], record["solver"], record["nfe"])
            self.by_place.setdefault(place, []).append(record)
        students = [record for record in self.records if record.get("who", "student") == "student"]
        self.counts = sorted({record["nfe"] for record in students or self.records})
        self.energy = {}  # {nfe: its column of energy distances}
        for n in sorted({record["nfe"] for record in self.records}):
            self.energy[n] = Column(f"{n:g}", solver, n, "energy", 1e3, 2)
        self.columns = [column for column in self.all_columns(solver) if self.datasets(column)]

    def all_columns(self, solver: str) -> list[Column]:
        """The columns of a table in which nothing is missing."""
        few = self.counts[0]
        many = self.counts[-1]
        columns = list(self.energy.values())
        for n in self.counts[1:]:
            columns.append(Column(f"re-noising {n:g}", "renoise", n, "energy", 1e3, 2))
        columns.append(Column(f"gap at {many:g}", solver, many, "gap", 1, 3))
        columns.append(Column("map error", solver, few, "map_error", 1, 3))
        columns.append(Column("path error", solver, few, "path_error", 1, 3))
        columns.append(Column("coverage", solver, few, "coverage", 1, 3))
        columns.append(Column("within 3σ, %", solver, few, "precision", 100, 1))
        return columns

    def values(self, row: str, column: Column, dataset: str | None = None) -> dict[tuple, float]:
        """{(data set, seed): value} of a row in a column, on one data set or on all."""
        found = {}
        for record in self.by_place.get((row, column.solver, column.nfe), []):
            wanted = dataset is None or dataset == record["dataset"]
            if wanted and record.get(column.key) is not None:
                found[record["dataset"], record["seed"]] = column.scale * record[column.key]
        return found

    def cell(self, row: str, column: Column, dataset: str | None) -> str:
        """Mean ± sd over seeds, on one data set; else of each seed's mean over the data sets that have the column."""
        by_seed = {}
        for (_, seed), value in self.values(row, column, dataset).items():
            by_seed.setdefault(seed, []).append(value)
        if dataset is None:
            full = len(self.datasets(column))
            by_seed = {seed: values for seed, values in by_seed.items() if len(values) == full}
        means = [np.mean(values) for values in by_seed.values()]
        return mean_sd(means, 1, column.digits)

    def datasets(self, column: Column) -> set[str]:
        """The data sets on which any row has a value in this column."""
        found = set()
        for row in self.rows:
            found.update(dataset for dataset, _ in self.values(row, column))
        return found

    def about(self, samples: int) -> list[str]:
        """The line above a table, and one for each run that failed."""
        seeds = sorted({record["seed"] for record in self.records})
        listed = ", ".join(str(seed) for seed in seeds)
        line = f"Mean ± sd over seeds {listed}; {samples} samples; {'; '.join(self.machines)}."
        return [line, *self.failed]

    def table(self) -> list[str]:
        """Lines of Markdown: every row on every data set, then its mean over the data sets."""
        titles = {}
        for dataset, floor in self.floors.items():
            titles[dataset] = f"{dataset} ({1e3 * floor['mean']:.2f} ± {1e3 * floor['sd']:.2f})"
        if len(titles) > 1:
            titles[None] = f"mean of {len(titles)}"
        lines = []
        for dataset, title in titles.items():
            for row in self.rows:
                cells = [self.cell(row, column, dataset) for column in self.columns]
                if any(cells):
                    lines.append([title, row, *cells])
        header = ["data set (noise floor)", "row", *(column.title for column in self.columns)]
        return markdown(header, lines)

    def tests(self) -> list[str]:
        """Lines of Markdown: each row against another, if there are two or more pairs."""
        lines = []
        for row, other in self.rows.items():
            cells = []
            for column in self.columns:
                cells.append(paired(self.values(other, column), self.values(row, column)))
            if any(cells):
                lines.append([row, other, *cells])
        if not lines:
            return []
        legend = "Each row against another, in pairs of the same data set and seed: ratio of the means; in how many"
        header = ["row", "against", *(column.title for column in self.columns)]
        return [legend, "pairs it is lower; two-sided p of the signed ranks.", "", *markdown(header, lines)]

    def draw(self, path, families: dict | None = None) -> None:
        """The energy distance of each row on each data set: the median, and the range over seeds.

        families  {heading: its rows}; other rows stand above them.
        """
        plt = toy_2d.drawing()
        heights, headings = self.layout(families or {})
        rows = list(heights)
        size = (2.8 + 2.4 * len(self.floors), 1.5 + 0.32 * (len(rows) + len(headings)))
        shared = {"sharex": True, "sharey": True, "squeeze": False}
        figure, axes = plt.subplots(1, len(self.floors), figsize=size, **shared)
        colours = (toy_2d.GREY, "#E69F00", toy_2d.RENOISE, toy_2d.STUDENT)
        for ax, (dataset, floor) in zip(axes[0], self.floors.items()):
            noise = 1e3 * (floor["mean"] + 2 * floor["sd"])
            ax.axvspan(0.05, max(noise, 0.05), color="#dddddd", lw=0, label="within the noise")
            for n, colour, marker in zip(self.counts, colours, "os^D"):
                middle, reach = self.ranges(self.energy[n], dataset, rows)
                label = toy_2d.plural(n, "evaluation")
                ax.errorbar(middle, heights.values(), xerr=reach, fmt=marker, color=colour, label=label)
            ax.set_xscale("log")
            ax.set_xticks([0.1, 1, 10, 100, 1000], ["0.1", "1", "10", "100", "1000"])
            ax.minorticks_off()
            ax.set(title=dataset, xlabel="energy distance × 10³", xlim=(0.05, 2500))
            ax.set_yticks([*heights.values(), *headings.values()], [*rows, *headings])
            for text in ax.get_yticklabels()[len(rows) :]:
                text.set_fontweight("bold")
            ax.set_ylim(len(rows) + len(headings) - 0.5, -0.5)  # the first row is at the top
            ax.hlines(heights.values(), 0.05, 2500, color="#eeeeee", lw=0.8, zorder=0)
        legend = dict(loc="outside lower center", ncols=1 + len(self.counts))
        figure.legend(*axes[0, 0].get_legend_handles_labels(), **legend)
        toy_2d.write_figure(path, figure)
        plt.close(figure)

    def layout(self, families: dict[str, list[str]]) -> tuple[dict[str, int], dict[str, int]]:
        """Where rows and headings stand in a figure, from 0 at the top: {row: height}, {heading: height}."""
        grouped = [row for rows in families.values() for row in rows]
        heights = {}
        headings = {}
        for row in self.rows:
            if row not in grouped:
                heights[row] = len(heights)
        for heading, rows in families.items():
            members = [row for row in rows if row in self.rows]
            if members:
                headings[heading] = len(heights) + len(headings)
            for row in members:
                heights[row] = len(heights) + len(headings)
        return heights, headings

    def ranges(self, column: Column, dataset: str, rows: list[str]):
        """The median of each row (R,), and how far its lowest and highest seed are from it (2,R), as they are drawn."""
        middle = np.full(len(rows), math.nan)
        reach = np.zeros((2, len(rows)))
        for i, row in enumerate(rows):
            found = self.values(row, column, dataset)
            if found:
                values = np.clip(list(found.values()), 0.06, 2400)  # what is off the scale is at its edge
                middle[i] = np.median(values)
                reach[0, i] = middle[i] - values.min()
                reach[1, i] = values.max() - middle[i]
        return middle, reach
