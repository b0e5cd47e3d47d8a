"""The house, the programs, the notebooks and the documents: who imports whom, and whether what is written is true.

Each docstring says what is shown, and why its tolerance. Every program makes one real run, as small as it gets.
"""

import ast
import csv
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

# A machine with a GPU runs the tests on its CPU, too, as in test_scflow.py.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("SCFLOW_TEST_CUDA", "")

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import celeba_latent
import scflow
import toy_2d
from experiments import (
    ablation,
    bits,
    captions,
    common,
    correctors,
    dimension,
    front,
    growth,
    guidance,
    lecture,
    posterior,
    relatives,
    sequences,
    speed,
    tell_apart,
    windows,
)
from scflow import Phase, TeacherSettings
from toy_2d import EnergyDistance

torch.set_num_threads(1)  # for tiny matrices more threads are slower, and the order of sums must not change

HOUSE = Path(__file__).parent.parent


# ═══ Helpers ════════════════════════════════════════════════════════════════════════════════


@pytest.fixture(autouse=True)
def seeded():
    """Fresh weights are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Double precision for everything that the test makes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def one_after_the_other(workers, function, *lists):
    """`common.parallel_map` in this process."""
    return list(map(function, *lists))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, in this process alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "parallel_map", one_after_the_other)
    return tmp_path


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    """A folder with a run of the demo of two updates each, and its latents."""
    folder = tmp_path_factory.mktemp("short")
    short = "--drawings 2000 --count 1000 --teacher-steps 2 --student-steps 2 --quiet".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(celeba_latent, "demo", *short, "--out", "demo") == 0
    return folder


@pytest.fixture
def demo(here, short_demo):
    """The run of the demo, as demo/ in the present folder."""
    shutil.copytree(short_demo, here, dirs_exist_ok=True)


class Started(BaseException):
    """A program has begun with its first run. No `except Exception` is to catch it."""


def stop(*_, **__):
    raise Started


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def four_networks():
    """What `distill_losses` needs of a run."""
    nets = {name: scflow.MLP(2, 16, 2) for name in ("teacher", "student", "target")}
    return SimpleNamespace(**nets, critic=scflow.PointCritic(2, 16, 2))


def run(program, *argv):
    """The exit code of a program."""
    return program.main([str(word) for word in argv])


def refused(capsys, program, *argv):
    """The program ends with one line, which is returned."""
    capsys.readouterr()
    assert run(program, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def read(path):
    return Path(path).read_text(encoding="utf-8")


def read_csv(path):
    return list(csv.DictReader(read(path).splitlines()))


def tables(text):
    """The rows of all Markdown tables in a text, each {heading: cell}."""
    rows = []
    heads = None
    for line in text.splitlines():
        if not line.startswith("|"):
            heads = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if heads is None:
            heads = cells
        elif set(line) - set("|- "):
            rows.append(dict(zip(heads, cells)))
    return rows


def is_drawn(path):
    """A picture that is neither small nor empty."""
    image = Image.open(path).convert("L")
    darkest, lightest = image.getextrema()
    return min(image.size) > 100 and lightest - darkest > 100


# ═══ The house ══════════════════════════════════════════════════════════════════════════════

FLOORS = {"scflow": 0, "toy_2d": 1, "celeba_latent": 2, "experiments": 3, "notebooks": 4}
PACKAGES = {"torch", "numpy", "matplotlib", "tqdm", "einops", "PIL"}  # the last comes with matplotlib
OPTIONAL = {"diffusers", "torch_fidelity"}


def sources():
    """{path: floor} of all files that are no tests."""
    found = {}
    for name, floor in FLOORS.items():
        for path in [HOUSE / f"{name}.py", *sorted((HOUSE / name).glob("*.py"))]:
            if path.exists() and not path.name.startswith("test_"):
                found[path] = floor
    return found


every_source = pytest.mark.parametrize("path", sources(), ids=lambda path: path.stem)


def imports(nodes):
    """The packages, and our own modules, that these nodes of a syntax tree import."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return {name.split(".")[0] for name in names}


@every_source
def test_arrows_point_one_way_only(path):
    """scflow ← toy_2d ← celeba_latent ← experiments ← notebooks. Experiments may share; notebooks are read only."""
    names = imports(ast.walk(ast.parse(read(path))))
    assert not names & {notebook.stem for notebook in (HOUSE / "notebooks").glob("*.py")}
    for name in names & FLOORS.keys():
        shared = path.parent.name == name == "experiments"
        assert shared or FLOORS[name] < sources()[path], name


@every_source
def test_five_packages_are_enough(path):
    """Others are imported where they are used only. The core does with two of the five."""
    tree = ast.parse(read(path))
    known = PACKAGES | sys.stdlib_module_names | FLOORS.keys()
    assert imports(tree.body) <= known
    strangers = imports(ast.walk(tree)) - known
    assert strangers <= OPTIONAL
    if path.stem == "scflow":
        assert imports(ast.walk(tree)) - sys.stdlib_module_names == {"torch", "einops"}


@every_source
def test_no_module_is_loaded_by_its_path(path):
    """Nor is code executed that stands in a file or in a string."""
    tree = ast.parse(read(path))
    assert not imports(ast.walk(tree)) & {"importlib", "runpy", "imp", "pkgutil"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            assert node.id not in ("exec", "eval", "__import__")


# ═══ common.py ══════════════════════════════════════════════════════════════════════════════


def test_a_paired_comparison_finds_a_difference_and_only_then():
    """Halved in all of ten pairs: p is small. Up and down in turn: p is large. Keys make the pairs, not the order."""
    a = {("moons", seed): 1.0 + seed for seed in range(10)}
    half = {key: value / 2 for key, value in reversed(a.items())}
    ratio, falls, p = common.paired(a, half).split(", ")
    assert (ratio, falls) == ("×0.50", "10/10") and float(p) < 0.01
    ratio, falls, p = common.paired(half, a).split(", ")
    assert (ratio, falls) == ("×2.00", "0/10") and float(p) < 0.01

    mixed = {}
    for (name, seed), value in a.items():
        mixed[name, seed] = value + (-1) ** seed * 0.01 * (seed + 1)
    _, falls, p = common.paired(a, mixed).split(", ")
    assert falls == "5/10" and float(p) > 0.5
    assert common.paired(a, {("moons", 0): 1.0}) == ""


def test_p_is_that_of_all_choices_of_the_signs():
    """Eight changes have 256 choices of the signs, which can be counted (0.015: 4 standard errors of 20,000)."""
    changes = np.array([-3, 7, 6, -1, 5, 4, -2, 8])  # each is its own rank
    before = {("moons", i): 10.0 for i in range(8)}
    after = {("moons", i): 10.0 + change for i, change in enumerate(changes)}
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = (np.abs(signs @ np.abs(changes)) >= changes.sum()).mean()
    _, falls, p = common.paired(before, after).split(", ")
    assert falls == "3/8" and abs(float(p) - exact) < 0.015


def test_numbers_and_names_are_written_plainly():
    """Mean ± deviation, of one number itself, of none nothing; a slug is one safe name."""
    assert common.mean_sd([1, 3]) == "2.00 ± 1.41"
    assert common.mean_sd([0.5], 1000, 1) == "500.0"
    assert common.mean_sd([]) == ""
    assert common.slug("two phase", 0.5) == "two-phase-0.5"
    assert common.slug("../λ_self 0/1", "x") == "..-λ_self-0-1-x"
    lines = common.markdown(["a", "b"], [["1", "2"]])
    assert tables("\n".join(lines)) == [{"a": "1", "b": "2"}]


def test_finished_cells_are_read_back(here, monkeypatch):
    """What is in a file is not computed again; a cell that fails, or is killed while it is written, leaves none."""
    paths = [here / "cells" / f"{i}.json" for i in range(3)]
    cells = [{"x": 0}, {"x": 1}, {"x": 2}]
    assert common.run_cells(dict, cells, paths, 1) == cells
    toy_2d.write_text(paths[1], '{"x": "found"}')
    paths[2].unlink()
    results = common.run_cells(dict, cells, paths, 1)
    assert [result["x"] for result in results] == [0, "found", 2]

    new = here / "cells" / "new.json"
    with pytest.raises(Started):
        common.run_cell(stop, {}, new)
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(Started):
        common.run_cell(dict, {}, new)
    assert not new.exists()


def test_results_average_over_data_sets_before_they_take_deviations():
    """The mean row is mean ± deviation over seeds of each seed's mean; pairs are counted over data sets and seeds."""
    done = []
    for dataset, seed, energy in (("a", 0, 1), ("a", 1, 3), ("b", 0, 11), ("b", 1, 10)):
        for row, better in (("one", 0), ("two", 1)):
            measures = {"solver": "euler", "nfe": 1, "energy": (energy - better) / 1000, "gap": 0.5}
            metrics = {"dataset": dataset, "seed": seed, "machine": "here", "rows": [measures]}
            metrics["floor"] = {"mean": 0.0, "sd": 1e-4}
            done.append((row, metrics))
    done.append(("one", {"dataset": "b", "seed": 2, "failure": "it ran away"}))
    results = common.Results({"one": "", "two": "one"}, done)
    found = {}
    for row in tables("\n".join(results.table())):
        found[row["data set (noise floor)"], row["row"]] = row["1"]
    assert found["a (0.00 ± 0.10)", "one"] == "2.00 ± 1.41"
    assert found["mean of 2", "one"] == "6.25 ± 0.35"  # of 6 and 6.5
    (test,) = tables("\n".join(results.tests()))
    assert test["against"] == "one" and test["1"].startswith("×0.84, 4/4, ")
    assert results.about(9)[1] == "Failed: one, b, seed 2: it ran away."


def test_quick_settings_are_defaults_and_what_is_given_wins():
    """Without --quick they are not used."""

    def read_settings(*argv):
        found = common.settings_of([str(word) for word in argv], "help", growth.Growth(), growth.QUICK)
        return found.share, found.samples

    assert read_settings("--samples", 700) == (1.0, 700)
    assert read_settings("--quick") == (0.05, 1000)
    assert read_settings("--quick", "--samples", 700) == (0.05, 700)


def test_rows_of_a_figure_stand_under_the_heading_of_their_family():
    """Rows of no family first; a family without a row that was run has no heading."""
    done = []
    for row in ("teacher", "a", "b", "c"):
        measures = {"solver": "euler", "nfe": 1, "energy": 0.001}
        floor = {"mean": 0.0, "sd": 1e-4}
        done.append((row, {"dataset": "d", "seed": 0, "machine": "", "floor": floor, "rows": [measures]}))
    results = common.Results(dict.fromkeys(("teacher", "a", "b", "c", "not run"), ""), done)
    heights, headings = results.layout({"one": ["b", "a"], "empty": ["not run"], "two": ["c"]})
    assert heights == {"teacher": 0, "b": 2, "a": 3, "c": 5}
    assert headings == {"one": 1, "two": 4}


# ═══ ablation.py ════════════════════════════════════════════════════════════════════════════

# What a row's name says, and the setting that this is.
SAYS = {
    "λ_self": "lambda_self",
    "self-correction": "lambda_self",
    "λ_adv": "lambda_adv",
    "adversarial": "lambda_adv",
    "a critic": "lambda_adv",
    "consistency kept": "lambda_consistency",
    "τ": "tau",
    "truncation": "tau",
    "δ": "delta",
    "walk": "walk",
    "target EMA": "target_ema",
    "squared": "distance",
    "softplus": "adversarial",
    "R1": "r1",
    "lr": "lr",
    "as long": "steps",
    "as many": "steps",
    "pinned": "pinned",
    "x̂₀ of": "self_source",
    "landing points": "self_form",
}
IDLE = {  # settings that say nothing while a loss has weight zero
    "lambda_consistency": ("delta", "walk", "tau", "distance"),
    "lambda_self": ("self_source", "self_form"),
    "lambda_adv": ("judged", "adversarial", "r1", "lr_critic"),
}


def effective(phase):
    """The settings of a phase that have a say."""
    settings = asdict(phase)
    for weight, idle in IDLE.items():
        if settings[weight] == 0:
            for name in idle:
                del settings[name]
    return settings


def difference(schedule, other):
    """[(number of the phase, setting, its value)] in which a schedule differs from another, where both have it."""
    found = []
    for number, phases in enumerate(zip(schedule, other), 1):
        settings, before = map(effective, phases)
        for name in settings.keys() & before.keys():
            if settings[name] != before[name]:
                found.append((number, name, settings[name]))
    return found


@cache
def configured(flags):
    """Run, teacher and schedule of a row."""
    return toy_2d.configure(shlex.split(flags))


ROWS = []
for name, rows in ablation.GROUPS.items():
    ROWS += [(name, row) for row in rows]


@pytest.mark.parametrize("group, row", ROWS)
def test_a_row_of_the_ablation_changes_what_its_name_says(group, row):
    """Beside its base (the row named before its comma, else its partner) nothing else; and to the value in the name.

    Lengths in the main group may differ: they make up for what an update costs.
    """
    rows = ablation.GROUPS[group]
    flags, partner = rows[row]
    assert partner in rows or partner == ""
    made, _, schedule = configured(flags)
    assert (made.teacher == "exact") == ("teacher exact" in row)
    if row in scflow.SCHEDULES:
        assert schedule == scflow.SCHEDULES[row]
        return
    base, _, words = row.partition(",")
    if words == "" or base not in rows:
        base = partner
        words = row
    _, _, other = configured(rows[base][0])
    changed = difference(schedule, other)
    said = {SAYS[word] for word in SAYS if word in words and row not in ablation.VARIANTS}
    found = {name for _, name, _ in changed}
    if group == "main":
        found.discard("steps")
        said.discard("steps")
    assert found == said

    phases = re.findall(r"phase (\d)", row)
    values = re.findall(r"(λ_\w+|τ|δ|lr|R1|EMA|walk) ([\w.-]+)", words)
    for number, name, value in changed:
        assert not phases or str(number) in phases
        assert value == 0 or name == "steps" or "−" not in row
        for word, text in values:
            if SAYS.get(word, "target_ema") == name:
                assert str(value) == text or float(value) == float(text)


def test_no_two_rows_of_the_ablation_are_the_same():
    """But for the two variants of self-correction, which are no matter of flags."""
    for group in ablation.GROUPS.values():
        seen = []
        for row, (flags, _) in group.items():
            if row not in ablation.VARIANTS:
                seen.append(configured(flags))
        assert all(a != b for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("row", ablation.VARIANTS)
def test_a_variant_of_self_correction_changes_what_it_says_and_nothing_else(row, monkeypatch):
    """Fresh noise that happens to be x₁ is the paper's loss; without the stop-gradient only the gradient differs."""
    networks = four_networks()
    x0 = torch.randn(64, 2)
    x1 = torch.randn(64, 2)
    t = torch.rand(64)
    phase = Phase()

    def losses_of(function):
        found, _ = function(networks, x0, x1, t, phase, phase.weights(0), gen())
        gradient = torch.autograd.grad(found["self"], networks.student.parameters(), retain_graph=True)
        return found, torch.cat([part.flatten() for part in gradient])

    paper, gradient = losses_of(scflow.distill_losses)
    losses, _ = losses_of(ablation.VARIANTS[row])
    assert losses.keys() == paper.keys()
    assert all(torch.equal(losses[name], paper[name]) for name in ("consistency", "bi", "adv"))
    fresh = "fresh" in row
    if fresh:
        assert abs(losses["self"] - paper["self"]) > 1e-4
        monkeypatch.setattr(scflow, "randn_like", lambda x, generator: x1)
    losses, own_gradient = losses_of(ablation.VARIANTS[row])
    torch.testing.assert_close(losses["self"], paper["self"])
    assert torch.allclose(own_gradient, gradient, atol=1e-6) == fresh


def test_the_ablation_runs_in_processes_and_repeats_no_run(here, monkeypatch, capsys):
    """λ_self swept, and one row that explodes, as a command with two workers; then again, where nothing is trained."""
    rows = ["λ_self 0", "paper", "λ_self 1", "--preset paper --student-lr 1e30"]
    argv = ["--rows", *rows, "--datasets", "8gaussians", "--seeds", "0", "1", "--samples", "100", "--workers", "2"]
    argv += ["--flags", "--teacher-steps 5 --student-steps 20 --nfe 1 2", "--out", "results/mine"]
    command = [sys.executable, "-m", "experiments.ablation", *argv]
    environment = {**os.environ, "PYTHONPATH": str(HOUSE)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    text = read("results/mine.md")
    assert text.startswith("`python -m experiments.ablation --rows 'λ_self 0'")
    assert "seeds 0, 1; 100 samples" in text
    assert text.count("Failed: --preset paper --student-lr 1e30, 8gaussians, seed") == 2
    found = {row["row"]: row for row in tables(text) if "data set (noise floor)" in row}
    assert list(found) == ["teacher", *rows[:3]]
    tests = {row["row"]: row["against"] for row in tables(text) if "against" in row}
    assert tests == {"λ_self 0": "paper", "λ_self 1": "paper"}

    records = [record for record in read_csv("results/mine.csv") if record["row"] == "paper"]
    assert len(records) == 2 * 4  # seeds, two solvers at two counts
    two_steps = [record for record in records if record["solver"] == "euler" and record["nfe"] == "2"]
    energy = [float(record["energy"]) for record in two_steps]
    assert found["paper"]["2"] == common.mean_sd(energy, 1000)
    assert is_drawn("results/mine.png")

    monkeypatch.setattr(toy_2d, "fit_teacher", stop)
    assert run(ablation, *argv) == 0
    assert read("results/mine.md") == text
    with pytest.raises(Started):
        run(ablation, *argv, "--samples", 101)  # of other settings nothing is read back


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--rows", "λ_self 7"], "no row"),
        (["--rows", "two_phase", "--lambda-self -1"], "row '--lambda-self -1': lambda_self"),
        (["--datasets", "moon"], "moon"),
        (["--datasets", "moons", "--rows", "teacher exact"], "mixture"),
    ],
)
def test_a_bad_ablation_is_refused_before_anything_is_done(argv, word, here, capsys):
    """One line that names it, and an empty folder."""
    assert word in refused(capsys, ablation, *argv)
    assert not list(here.iterdir())


# ═══ relatives.py ═══════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("method", relatives.METHODS)
def test_every_relative_gets_the_same_time(method, monkeypatch):
    """A fiftieth of the default run's, counted update by update, teacher and pairs included (5%: rounding)."""
    spent = []

    def meter(place, name, price):
        loop = getattr(place, name)

        def metered(*args, **options):
            for state in loop(*args, **options):
                spent.append(price(state, *args))
                yield state

        monkeypatch.setattr(place, name, metered)

    def price_of_phase(state, teacher, critic, batch, generator, schedule):
        if len(schedule) == 1:
            return relatives.COST["paper"]
        return relatives.COST["phase_1" if state.phase == schedule[0] else "phase_2"]

    def sampled(net, noise, steps, solver):
        thousands = len(noise) / 1000 * scflow.nfe(steps, solver)
        spent.append(relatives.COST["thousand_samples"] * thousands)
        return noise

    meter(scflow, "train_teacher", lambda *_: 1)
    meter(scflow, "distill", price_of_phase)
    meter(relatives.Lab, "train", lambda state, lab, net, loss, *_: relatives.COST[loss.__name__])
    monkeypatch.setattr(scflow, "sample", sampled)
    relatives.METHODS[method](relatives.Lab("moons", share=0.02))
    assert abs(sum(spent) / (0.02 * relatives.BUDGET) - 1) < 0.05


def test_every_relative_has_at_most_twelve_trials():
    """Of settings that it takes, and what it is called with by default is one of them."""
    for method, function in relatives.METHODS.items():
        trials = relatives.trials(method)
        defaults = inspect.signature(function).parameters
        assert len(trials) <= 12
        for trial in trials:
            assert trial.keys() <= defaults.keys()
        if method in relatives.TRIALS:
            assert {name: defaults[name].default for name in trials[0]} in trials


def test_relatives_are_compared_and_read_back(here, monkeypatch):
    """Three of them: costs, table, tests, a figure; again, no run is made."""
    methods = ["2-rectified flow", "BOOT", relatives.OURS]
    argv = ["--methods", *methods, "--datasets", "moons", "--seeds", 0, 1, "--share", 0.01]
    argv += ["--samples", 100, "--rounds", 1]
    assert run(relatives, *argv) == 0
    found = tables(read("results/relatives.md"))
    costs = {row["loss"]: float(row["ms"]) for row in found if "loss" in row}
    assert costs.keys() == relatives.COST.keys() and min(costs.values()) > 0
    by_steps = [row for row in found if "gap at 8" in row and "against" not in row]
    assert [row["row"] for row in by_steps] == methods
    assert by_steps[1]["1"] and not by_steps[1]["2"]  # BOOT knows one step only
    assert is_drawn("results/relatives.png")

    records = read_csv("results/relatives.csv")
    monkeypatch.setattr(relatives, "Lab", stop)
    monkeypatch.setattr(relatives, "cost_table", lambda rounds: [])
    assert run(relatives, *argv) == 0
    assert read_csv("results/relatives.csv") == records
    with pytest.raises(Started):
        run(relatives, *argv, "--samples", 101)


def test_an_unknown_relative_is_refused(here, capsys):
    """One line, and an empty folder."""
    assert "alchemy" in refused(capsys, relatives, "--methods", "alchemy")
    assert not list(here.iterdir())


# ═══ growth.py ══════════════════════════════════════════════════════════════════════════════


def test_one_thing_grows_at_a_time():
    """Every case once; each differs from the default in one number or in none, and its data have RMS radius 2."""
    cases = growth.all_cases()
    assert growth.DEFAULT in cases
    for i, case in enumerate(cases):
        assert case not in cases[:i]
        assert sum(case[name] != value for name, value in growth.DEFAULT.items()) <= 1
        means = growth.mixture(case["d"], case["modes"]).means
        assert means.shape == (case["modes"], case["d"])
        assert abs(means.square().sum(1).mean() - 4) < 1e-5  # rounding


def test_growth_is_measured_and_read_back(here, monkeypatch):
    """Three cases on two seeds: the default stands on every axis; a table, a figure; again, no run is made."""
    monkeypatch.setattr(growth, "AXES", {"width": (64, 128), "d": (2, 8)})
    argv = ["--seeds", 0, 1, "--share", 0.01, "--samples", 100]
    assert run(growth, *argv) == 0
    text = read("results/growth.md")
    rows = tables(text)
    shown = [(row["what grows"], row["to"]) for row in rows]
    width = growth.TITLES["width"]
    d = growth.TITLES["d"]
    assert shown == [(width, "64"), (width, "128"), (d, "2"), (d, "8")]
    records = read_csv("results/growth.csv")
    assert len(records) == 3 * 2
    default = [record for record in records if record["d"] == "2" and record["width"] == "128"]
    energy = [float(record["student 8"]) for record in default]
    assert rows[1]["student 8"] == rows[2]["student 8"] == common.mean_sd(energy, 1000)
    assert is_drawn("results/growth.png")

    monkeypatch.setattr(scflow, "train_teacher", stop)
    assert run(growth, *argv) == 0
    assert read("results/growth.md") == text
    with pytest.raises(Started):
        run(growth, *argv, "--share", 0.02)


# ═══ windows.py ═════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("walk", ["euler", "heun-2"])
@pytest.mark.parametrize("delta", [0.2, 1.0])
def test_a_perfect_student_is_the_mean_of_its_chains(walk, delta):
    """For one Gaussian it multiplies by a(1). a(t) is the mean of a(s)·g(t,s), solved on a grid (3%: noise, grid).

    g(t,s) is what the teacher's steps from t to s multiply by.
    """
    gaussian = toy_2d.GaussianMixture([[0.0, 0.0]], 0.3)
    one = torch.ones(1, 2)
    grid = torch.linspace(0, 1, 401)
    a = [1.0]
    for i in range(1, len(grid)):
        first = round(max(0, grid[i].item() - delta) * 400)
        s = grid[first:i]
        steps = scflow.follow(gaussian, one.expand(len(s), 2), grid[i].expand(len(s)), s, walk)[:, 0]
        a.append((torch.tensor(a[first:]) * steps).mean().item())
    noise = torch.randn(4000, 2, generator=gen(1))
    found = windows.stepped_error(gaussian, noise, 0.3 * noise, delta, walk, gen(2), chains=16)
    expected = abs(a[-1] - 0.3) * noise.square().sum(1).mean().sqrt().item()
    assert found == pytest.approx(expected, rel=0.03, abs=2e-3)


def test_all_students_get_the_same_passes():
    """Forward 1, backward 2, target 1, and the teacher's; 8,000 are phase 1 of the default."""
    default = scflow.SCHEDULES["two_phase"][0]
    assert windows.updates(default.walk, windows.PASSES) == default.steps
    spent = {walk: windows.updates(walk, 8000) * passes for walk, passes in zip(windows.WALKS, (5, 8, 6, 8, 20))}
    assert all(abs(passes - 8000) < 5 for passes in spent.values())


def test_windows_are_measured_and_read_back(here, monkeypatch, capsys):
    """A row for each window and kind of steps, a figure; again, no run is made. Without an exact map it is refused."""
    assert "no exact flow map" in refused(capsys, windows, "--datasets", "moons")
    argv = ["--seeds", 0, "--datasets", "8gaussians", "--deltas", 0.1, 1, "--share", 0.005, "--samples", 100]
    assert run(windows, *argv) == 0
    text = read("results/windows.md")
    shown = [(row["steps"], row["δ"]) for row in tables(text)]
    assert shown == [(walk, delta) for walk in windows.WALKS for delta in ("0.1", "1")]
    records = [record for record in read_csv("results/windows.csv") if record["walk"] == "euler"]
    trained = [float(record["trained"]) for record in records if float(record["delta"]) == 0.1]
    assert tables(text)[0]["trained student"] == common.mean_sd(trained, 1, 3)
    assert is_drawn("results/windows.png")

    monkeypatch.setattr(scflow, "train_teacher", stop)
    assert run(windows, *argv) == 0
    assert read("results/windows.md") == text


# ═══ dimension.py ═══════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0])
def test_the_overlap_is_that_of_the_closed_form(apart):
    """Of N(0,I) and N(m,I) it is 2Φ(−‖m‖/2). The classifier knows it to 0.03: noise, and what it has not learned."""
    generator = gen()

    def draw(n):
        mean = torch.tensor([apart, 0.0])
        return torch.randn(n, 2, generator=generator), mean + torch.randn(n, 2, generator=generator)

    expected = 2 * torch.special.ndtr(torch.tensor(-apart / 2))
    assert abs(dimension.overlap(draw, 300) - expected) < 0.03


@pytest.mark.parametrize("wider", [0.8, 1.0, 1.1, 2.0])
def test_the_overlap_of_norms_is_that_of_two_normal_laws(wider):
    """Of N(0,I) and N(0,wider²·I) in 50 dimensions the norm says all there is to say (0.03: 5,000 points)."""
    generator = gen()

    def draw(n):
        return torch.randn(n, 50, generator=generator), wider * torch.randn(n, 50, generator=generator)

    half = torch.tensor(25.0)
    square = 50 * 2 * np.log(wider) / (1 - 1 / wider**2) if wider != 1 else 50.0  # where both densities are equal
    inside = torch.special.gammainc(half, torch.tensor(square / 2))
    inside_wider = torch.special.gammainc(half, torch.tensor(square / wider**2 / 2))
    expected = 1 - (inside - inside_wider).abs()
    assert abs(dimension.overlap_of_norms(draw) - expected) < 0.03


def test_what_overlaps_are_points_of_two_kinds_of_paths():
    """Half data, half noise: of x_t the data's own, of x̂_t what the student makes of the same noise."""

    def batch(n, generator):
        return torch.full((n, 2), 6.0), None

    def student(x, t, cond=None):
        return 2 * x  # so its one-step sample is −x₁, and x̂_t = 0 at half time

    xt, xt_hat = dimension.halfway(student, batch, gen())(2000)
    assert torch.equal(xt_hat, torch.zeros(2000, 2))
    assert (xt.mean(0) - 3).abs().max() < 0.05
    assert (xt.std(0) - 0.5).abs().max() < 0.03


@pytest.mark.parametrize("d", [8, 128])
def test_the_overlap_of_the_exact_map_is_that_of_its_densities(d):
    """By 100,000 draws of the dimensions without modes, each judged by the exact densities (0.006: four deviations)."""
    n = d - 4
    x0, x1 = torch.randn(2, 100_000, n, generator=gen()).unbind()
    xt = scflow.interpolate(0.15 * x0, x1, torch.full((100_000,), 0.5))
    xt_hat = scflow.interpolate(0.15 * x1, x1, torch.full((100_000,), 0.5))
    p = torch.distributions.Normal(0, xt.std())
    q = torch.distributions.Normal(0, xt_hat.std())

    def q_is_higher(x):
        return (q.log_prob(x).sum(1) > p.log_prob(x).sum(1)).float().mean()

    wrong = q_is_higher(xt) + 1 - q_is_higher(xt_hat)
    assert abs(wrong - dimension.overlap_of_exact(d)) < 0.006


def test_dimensions_are_measured_and_read_back(here, monkeypatch):
    """Every loss in two dimensions and in eight, on two seeds: a table, a figure; again, no run is made."""
    argv = ["--seeds", 0, 1, "--dimensions", 2, 8, "--share", 0.01, "--samples", 100]
    assert run(dimension, *argv) == 0
    text = read("results/dimension.md")
    rows = tables(text)
    shown = [(row["losses"], row["d"]) for row in rows]
    assert shown == [(name, d) for name in dimension.LOSSES for d in ("2", "8")]
    records = read_csv("results/dimension.csv")
    first = [record for record in records if record["losses"] == rows[0]["losses"] and record["d"] == "2"]
    one = [float(record["student 1"]) for record in first]
    two = [float(record["student 2"]) for record in first]
    assert rows[0]["2"] == common.mean_sd(two, 1000)
    assert rows[0]["2 ÷ 1"] == f"{sum(two) / sum(one):.1f}"
    assert is_drawn("results/dimension.png")

    monkeypatch.setattr(scflow, "train_teacher", stop)
    assert run(dimension, *argv) == 0
    assert read("results/dimension.md") == text
    with pytest.raises(Started):
        run(dimension, *argv, "--share", 0.02)


def test_photographs_are_measured_and_read_back(demo, monkeypatch, capsys):
    """A run folder's teacher is distilled with every loss; again, no run is made; another teacher is another run."""
    assert "no teacher in nowhere" in refused(capsys, dimension, "photographs", "--run", "nowhere")
    argv = ["photographs", "--run", "demo", "--updates", 2, "--samples", 1000, "--out", "seen"]
    assert run(dimension, *argv) == 0
    text = read("seen.md")
    rows = tables(text)
    assert [(row["losses"], row["d"]) for row in rows] == [(name, "96") for name in dimension.LOSSES]
    first = read_csv("seen.csv")[0]
    assert rows[0]["1 step"] == f"{float(first['student 1']):.2f}"
    assert 0 <= float(first["overlap"]) <= 1

    monkeypatch.setattr(scflow, "distill", stop)
    assert run(dimension, *argv) == 0
    assert read("seen.md") == text
    shutil.copy("demo/student.pt", "demo/teacher.pt")
    with pytest.raises(Started):
        run(dimension, *argv, "--workers", 1)


# ═══ guidance.py ════════════════════════════════════════════════════════════════════════════


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_guided_velocity_is_that_of_the_tilted_density(scale, t):
    """v = −(x + t·s)/(1−t), s the gradient of (1−w)·log p_t(x) + w·log p_t(x|c) by autograd (1e-10: rounding)."""
    mixture = guidance.labelled()
    x = 2 * torch.randn(60, 2)
    x.requires_grad_()
    times = torch.full((60,), t)
    labels = torch.tensor([1, 2, 3]).repeat(20)[:, None]
    free = mixture.log_density(x, times)
    conditional = mixture.log_density(x, times, labels)
    log = (1 - scale) * free + scale * conditional
    (score,) = torch.autograd.grad(log.sum(), x)
    expected = -(x + t * score) / (1 - t)
    found = scflow.guided(mixture, scale)(x, times, labels)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("label", guidance.LABELS)
def test_following_the_guided_flow_does_not_sample_the_tilted_density(label):
    """At w = 1 the two agree with the label's data within 0.01 (floor 0.003); at w = 2 they are 0.1 apart."""
    mixture = guidance.labelled()
    cond = torch.full((1500, 1), label)

    def distance(scale):
        tilted = guidance.tilted(mixture, label, scale, 1500, gen())
        noise = torch.randn(1500, 2, generator=gen(1))
        followed = scflow.sample(scflow.guided(mixture, scale), noise, 30, "heun", cond)
        return EnergyDistance(tilted)(followed)

    assert abs(distance(1.0)) < 0.01
    assert distance(2.0) > 0.1
    data, _ = guidance.of_label(mixture, label).sample(1500, gen(2))
    tilted = guidance.tilted(mixture, label, 1.0, 1500, gen())
    assert abs(EnergyDistance(data)(tilted)) < 0.01


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_a_guided_student_learns_from_what_it_is_told(source, monkeypatch):
    """Samples of the guided teacher, or data of the label; at w = 4 they are far apart.

    Energy distances are below 0.03 to one, above 0.3 to the other: 5 or more deviations either way.
    """
    seen = {}
    mixture = guidance.labelled()

    def spy(velocity, critic, batch, *rest, **options):
        seen.update(velocity=velocity, batch=batch)
        stop()

    net = scflow.MLP(tokens=(1, 3))
    net.forward = mixture.forward  # it has weights, and is exact
    monkeypatch.setattr(guidance, "fit_teacher", lambda *_: net)
    monkeypatch.setattr(scflow, "distill", spy)
    job = guidance.Job(0, 4.0, source, 50, TeacherSettings(), (Phase(),))
    with pytest.raises(Started):
        guidance.run_one(job, "")
    x0, labels = seen["batch"](1500, gen())
    t = torch.rand(1500)
    assert torch.equal(seen["velocity"](x0, t, labels), scflow.guided(mixture, 4.0)(x0, t, labels))
    pool, component = mixture.sample(6000, gen(1))
    for label in guidance.LABELS:
        ours = x0[labels[:, 0] == label]
        data = pool[mixture.labels[component] == label]
        noise = torch.randn(500, 2, generator=gen(2))
        cond = torch.full((500, 1), label)
        samples = scflow.sample(scflow.guided(mixture, 4.0), noise, 50, cond=cond)
        near, far = (samples, data) if source == "teacher" else (data, samples)
        assert EnergyDistance(near)(ours) < 0.03
        assert EnergyDistance(far)(ours) > 0.3


def test_score_identity_sees_labels_and_no_data(monkeypatch):
    """With data that are not even numbers the student is the same. It is not the teacher it started as."""
    torch.manual_seed(0)
    teacher = scflow.MLP(tokens=(1, 3))
    student = guidance.identify(teacher, 2.0, seed=0, updates=3)
    batch = guidance.batch

    def blind(n, generator):
        x0, labels = batch(n, generator)
        return torch.full_like(x0, torch.nan), labels

    monkeypatch.setattr(guidance, "batch", blind)
    again = guidance.identify(teacher, 2.0, seed=0, updates=3)
    weights = student.state_dict()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert not torch.equal(student.layers[0].weight, teacher.layers[0].weight)


def test_guided_students_are_measured_and_read_back(here, monkeypatch, capsys):
    """Two scales, three sources: a row for each; the critic is off where the name says so; again, no run is made."""
    sources = ("teacher", "data-no-critic", "nothing")
    argv = ["--scales", 1, 3, "--seeds", 0, "--learn-from", *sources, "--samples", 50]
    argv += ["--teacher-steps", 5, "--student-steps", 4]
    monkeypatch.setattr(guidance, "own_samples", partial(guidance.own_samples, n=200))
    monkeypatch.setattr(guidance, "identify", partial(guidance.identify, updates=2))
    fit_student = guidance.fit_student
    critics = []

    def spy(teacher, scale, learn_from, seed, schedule):
        critics.append([phase.lambda_adv for phase in schedule])
        return fit_student(teacher, scale, learn_from, seed, schedule)

    monkeypatch.setattr(guidance, "fit_student", spy)
    assert run(guidance, *argv) == 0
    usual = [phase.lambda_adv for phase in scflow.SCHEDULES["two_phase"]]
    assert critics == 2 * [usual, [0, 0]]
    text = read("results/guidance.md")
    names = [row["row"] for row in tables(text) if "gap at 8" in row]
    assert all(name in text for name in guidance.COMPARED)
    expected = []
    for scale in (1, 3):
        expected += [f"w = {scale}, from {source}" for source in sources]
    assert names == expected
    for record in read_csv("results/guidance.csv"):
        labels = [float(record[f"energy of label {label}"]) for label in guidance.LABELS]
        assert float(record["energy"]) == pytest.approx(np.mean(labels))
    assert is_drawn("results/guidance.png")

    monkeypatch.setattr(guidance, "run_one", stop)
    assert run(guidance, *argv) == 0
    assert read("results/guidance.md") == text
    with pytest.raises(Started):
        run(guidance, *argv, "--student-steps", 6)
    assert "from-data" in refused(capsys, guidance, "--learn-from", "from-data")


# ═══ speed.py ═══════════════════════════════════════════════════════════════════════════════


@pytest.mark.usefixtures("float64")
def test_one_loss_at_a_time_is_the_same_computation():
    """Losses, gradients, judged samples and random numbers are those of `distill_losses` (1e-12: rounding)."""
    networks = four_networks()
    x0 = torch.randn(32, 2)
    x1 = torch.randn(32, 2)
    t = torch.rand(32)
    phase = Phase(judged=0.5)
    weights = phase.weights(0)
    results = []
    for function in (speed.one_loss_at_a_time, scflow.distill_losses):
        generator = gen(7)
        losses, judged = function(networks, x0, x1, t, phase, weights, generator)
        total = sum(weights[name] * loss for name, loss in losses.items())
        gradient = torch.autograd.grad(total, networks.student.parameters())
        values = torch.stack([losses[name] for name in weights])
        results.append([values, judged, generator.get_state(), *gradient])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_operations_are_counted():
    """A linear layer and attention by hand, a product and a sum each: 2·rows·in·out, and 2·2·heads·tokens²·dim."""
    assert speed.count_flops(nn.Linear(8, 16), torch.randn(5, 8)) == 2 * 5 * 8 * 16
    q = torch.randn(1, 3, 7, 4)
    assert speed.count_flops(nn.functional.scaled_dot_product_attention, q, q, q) == 4 * 3 * 7 * 7 * 4


def test_networks_are_compiled_after_the_first_update(monkeypatch):
    """All of them, once, and none before it."""
    compiled = []
    monkeypatch.setattr(celeba_latent, "compile_in_place", compiled.append)
    loop = speed.point_loop(Phase(batch=4), speed.Variant(compiled=True), "cpu")
    first = next(loop)
    assert compiled == [first.teacher, first.student, first.target, first.frozen, first.critic]
    next(loop)
    assert len(compiled) == 5


@pytest.mark.parametrize(
    "kind, updates, variants",
    [
        ("--points", 5, {"naive fp32": 3, "ours": 2}),
        ("--sizes=small", 2, {"naive fp32": 3, "ours": 2, "bf16": 1}),
    ],
)
def test_updates_are_timed(kind, updates, variants, here, monkeypatch):
    """Variants of every update, which here take 3, 2 and 1 s; the share is that of a matrix product as large."""
    rates = iter([1e9, 1.05e9])
    advance = speed.advance
    clock = {"fp32": 3.0, "auto": 2.0, "bf16": 1.0}
    fused = []

    def clocked(loop, variant, *rest):
        advance(loop, variant, *rest)
        fused.append(torch.backends.cuda.flash_sdp_enabled() == (variant.precision != "bf16"))
        return clock[variant.precision]

    monkeypatch.setattr(speed, "advance", clocked)
    monkeypatch.setattr(speed, "matmul_rate", lambda device: next(rates))
    monkeypatch.setattr(scflow, "LatentCritic", partial(scflow.LatentCritic, width=8))
    monkeypatch.setitem(celeba_latent.SIZES, "small", {"dim": 32, "depth": 1, "heads": 2})
    assert run(speed, kind, "--batch", 2, "--rounds", 1, "--updates", 1) == 0
    content = json.loads(read("results/speed.json"))
    assert [row["variant"] for row in content["rows"]] == updates * list(variants)
    assert all(fused)
    for row, measures in zip(tables(read("results/speed.md")), content["rows"]):
        seconds = variants[measures["variant"]]
        assert row["ratio"].startswith(f"{3 / seconds:.2f}")
        share = measures["flops"] / 1e9 / seconds
        assert row["share"] == f"{share:.1%}"
    assert "moved by 5%" in read("results/speed.md")


def test_kept_bytes_are_counted_once_and_without_weights():
    """Of y = W·x and y²: x and y are kept, W is not. The second tensor is used twice, and is one."""
    layer = torch.nn.Linear(100, 50)
    x = torch.randn(10, 100)

    def forward():
        y = layer(x)
        return (y * y).sum()

    assert speed.activation_bytes(forward) == 4 * (10 * 100 + 10 * 50)


def test_a_plan_grows_with_rows_and_updates(monkeypatch):
    """Twice the rows: as many operations a row, and twice in all. The weights' part of the memory does not grow."""
    monkeypatch.setitem(celeba_latent.SIZES, "S", dict(dim=32, depth=1, heads=2))
    for settings in (celeba_latent.TEACHERS["S"], celeba_latent.SCHEDULES["large"][1]):
        once = speed.plan_row("S", "128 px, TAEF2", "update", settings)
        field = "teacher_batch" if "teacher_batch" in vars(settings) else "batch"
        double = replace(settings, **{field: 2 * getattr(settings, field)})
        twice = speed.plan_row("S", "128 px, TAEF2", "update", double)
        assert twice["GFLOP a row"] == once["GFLOP a row"]
        assert twice["PFLOP"] == pytest.approx(2 * once["PFLOP"], rel=1e-9)
        assert once["GB"] < twice["GB"] < 2 * once["GB"]


def test_a_plan_counts_what_a_real_update_takes(monkeypatch):
    """Fake tensors, which hold no numbers, give the same operations and memory as real ones."""
    monkeypatch.setitem(celeba_latent.SIZES, "S", dict(dim=32, depth=1, heads=2))
    for settings in (celeba_latent.TEACHERS["S"], celeba_latent.SCHEDULES["large"][1]):
        fake = speed.plan_row("S", "128 px, TAEF2", "update", settings)
        real = speed.count_plan("S", "128 px, TAEF2", "update", settings)
        assert fake.pop("GB") == pytest.approx(real.pop("GB"), rel=1e-3)  # real ones have some scalars more
        assert fake == real


def test_the_plan_names_every_run(here, monkeypatch):
    """Three networks, each with its teacher and both phases of its student."""

    def plan_row(size, latents, name, settings):
        return {"size": size, "latents": latents, "update": name, "PFLOP": 43.409}

    monkeypatch.setattr(speed, "plan_row", plan_row)
    assert run(speed, "--plan", "--out", "plan") == 0
    rows = tables(read("plan.md"))
    assert [row["size"] for row in rows] == ["S"] * 6 + ["B"] * 3
    assert [row["update"] for row in rows] == ["teacher", "phase 1", "phase 2"] * 3
    assert {row["PFLOP"] for row in rows} == {"43.4"}


# ═══ correctors.py ══════════════════════════════════════════════════════════════════════════


def two_gaussians(x, t, cond):
    """The velocities of N(−1,0.6²·I), label 1, and N(1,0.6²·I), label 2."""
    left = toy_2d.GaussianMixture([[-1.0, 0.0]], 0.6)
    right = toy_2d.GaussianMixture([[1.0, 0.0]], 0.6)
    return torch.where(cond == 1, left(x, t), right(x, t))


@pytest.mark.parametrize(
    "powers, mean, std",
    [
        ({1: 1.0}, -1.0, 0.6),
        ({1: 0.5, 2: 0.5}, 0.0, 0.6),
        ({1: -1.0, 2: 2.0}, 3.0, 0.6),
        ({1: 1.0, 2: 1.0}, 0.0, 0.6 / 2**0.5),
        ({1: 2.0}, -1.0, 0.6 / 2**0.5),
    ],
)
def test_weighted_particles_sample_powers_and_products(powers, mean, std):
    """Of Gaussians, where they are Gaussians again (0.05: noise, 100 steps).

    Gaussians of one width need no weights, if the powers sum to one: there the flow alone is right.
    """
    x, share = correctors.corrected(two_gaussians, powers, 8000, 100, gen())
    assert (x.mean(0) - torch.tensor([mean, 0.0])).abs().max() < 0.05
    assert (x.std(0) - std).abs().max() < 0.05
    assert (share == pytest.approx(1, abs=1e-3)) == (sum(powers.values()) == 1)


def test_resampling_copies_by_weight():
    """Particles of weight k/n appear k times, and others as often as is left, up to one."""
    weight = torch.tensor([0.5, 0.25, 0.0, 0.25])
    assert correctors.resampled(weight, gen()).tolist() == [0, 0, 1, 3]
    counts = correctors.resampled(torch.rand(1000).softmax(0), gen()).bincount(minlength=1000)
    assert counts.sum() == 1000 and counts.max() <= 2


def test_correctors_are_measured(here):
    """A row for each density and way; weights and noise together come nearer than the flow."""
    assert run(correctors, "--seeds", 0, "--counts", 10, 100, "--samples", 600, "--out", "seen") == 0
    rows = tables(read("seen.md"))
    assert [row["way"] for row in rows] == [*correctors.WAYS] * len(correctors.CASES)
    flow = rows[0]["100 steps"]
    assert float(rows[3]["100 steps"]) < float(flow) / 10
    assert f"{1000 * float(read_csv('seen.csv')[0]['the flow, 100']):.2f}" == flow
    assert is_drawn("seen.png")


# ═══ posterior.py ═══════════════════════════════════════════════════════════════════════════

MEASURED = posterior.Measurement(torch.tensor([[0.6, 0.8]]), torch.tensor([1.0]), 0.3)
(DIRECTION,) = MEASURED.a


def test_the_exact_posterior_is_what_is_left_of_the_data():
    """Data that a measurement as it was is drawn for: the energy distance is noise (0.004: three deviations)."""
    mixture = toy_2d.dataset("25gaussians")
    x0, _ = mixture.sample(400_000, gen())
    y = x0 @ DIRECTION + MEASURED.sigma * torch.randn(len(x0), generator=gen(1))
    kept = x0[(y - MEASURED.y).abs() < 0.02][:4000]
    found = posterior.sample_posterior(mixture, MEASURED, 4000, gen(2))
    assert len(kept) > 3000
    assert abs(EnergyDistance(kept)(found)) < 0.004


def test_the_steered_flow_is_exact_for_one_gaussian():
    """Of data N(m,I) the posterior is Gaussian: mean and covariance (0.05: noise, 100 steps)."""
    mean = torch.tensor([0.5, -1.0])
    gaussian = toy_2d.GaussianMixture(mean[None], 1.0)
    noise = torch.randn(20_000, 2, generator=gen())
    x = posterior.steered(gaussian, MEASURED, noise, 100)
    gain = DIRECTION / (1 + MEASURED.sigma**2)
    assert (x.mean(0) - mean - gain * (MEASURED.y - mean @ DIRECTION)).abs().max() < 0.05
    assert (x.T.cov() - torch.eye(2) + torch.outer(gain, DIRECTION)).abs().max() < 0.05


def test_candidates_are_drawn_by_their_likelihood():
    """With one candidate they are the student's samples; with two hundred, the posterior (0.01: noise, few kept)."""
    gaussian = toy_2d.GaussianMixture([[0.5, -1.0]], 1.0)

    def student(x, t, cond=None):
        return -torch.tensor([0.5, -1.0]).expand_as(x)  # one step adds the mean

    exact = posterior.sample_posterior(gaussian, MEASURED, 4000, gen())
    prior, _ = gaussian.sample(4000, gen(1))
    assert abs(EnergyDistance(prior)(posterior.candidates(student, MEASURED, 4000, 1, gen(2)))) < 0.01
    assert abs(EnergyDistance(exact)(posterior.candidates(student, MEASURED, 4000, 200, gen(2)))) < 0.01
    assert EnergyDistance(exact)(prior) > 0.1


def test_posteriors_are_measured(here, monkeypatch, capsys):
    """A row for each way and network. Without an exact posterior it is refused."""
    assert "not known" in refused(capsys, posterior, "--datasets", "moons")
    monkeypatch.setattr(toy_2d, "fit_teacher", lambda run, data, settings: scflow.MLP().requires_grad_(False))
    monkeypatch.setattr(toy_2d, "fit_student", lambda *_: SimpleNamespace(ema=scflow.MLP().requires_grad_(False)))
    argv = ["--datasets", "8gaussians", "--seeds", 0, 1, "--count", 2, "--samples", 60, "--out", "seen"]
    assert run(posterior, *argv) == 0
    rows = tables(read("seen.md"))
    assert [row["way"] for row in rows] == ["exact samples"] + ["steered"] * 6 + ["candidates"] * 2
    floor = [float(record["floor"]) for record in read_csv("seen.csv")]
    assert rows[0]["8gaussians"] == common.mean_sd(floor, 1000)


def test_the_demos_autoencoder_is_linear():
    """B·z + c is the picture, where no pixel is cut off at black or white (1e-5: float32)."""
    pictures = celeba_latent.draw_faces(torch.randn(300, len(celeba_latent.TRAITS), generator=gen()))
    net = celeba_latent.PicturePCA(32, 20)
    net.fit(pictures)
    content = {"arch": net.arch, "weights": net.state_dict(), "size": 32}
    content.update(mean=torch.full((1, 1, 1), 0.2), std=torch.full((1, 1, 1), 0.7))
    codec = celeba_latent.Codec(content)
    directions, middle = posterior.linear_parts(codec)
    z = torch.randn(50, 1, 1, 20, generator=gen(1))
    linear = torch.einsum("nd,dcij->ncij", z.flatten(1), directions) + middle
    decoded = codec.net.decode(z * codec.std + codec.mean)
    assert (linear.clamp(0, 1) - decoded).abs().max() < 1e-5
    # A measurement of a picture that latents can make: what is left is the noise, in directions at right angles.
    for operator in posterior.OPERATORS.values():
        measured = posterior.measure_picture(codec, linear[0], operator, gen(2))
        misfit = (measured.y - measured.a @ z[0].flatten()) / measured.sigma
        assert 0.5 < misfit.square().mean().sqrt() < 1.5
        product = measured.a @ measured.a.T
        assert (product - product.diag().diag()).abs().max() < 1e-4 * product.max()


def test_faces_are_completed_and_sharpened(demo, capsys):
    """Both ways for both measurements, and a sheet; a run of other networks is refused."""
    assert run(posterior, "faces", "--run", "demo", "--count", 2, "--out", "seen") == 0
    rows = tables(read("seen.md"))
    assert [row["way"] for row in rows] == 2 * (["any face"] + 3 * ["steered"] + 2 * ["candidates"])
    for part in (rows[:6], rows[6:]):
        misfits = {row["evaluations"]: float(row["misfit"].split()[0]) for row in part}
        assert misfits["100"] < misfits["1"]
    assert is_drawn("seen.png")
    assert "no checkpoint" in refused(capsys, posterior, "faces", "--run", "nowhere")


# ═══ bits.py ════════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("count", [3, 8])
def test_rounded_weights_are_on_a_grid_for_each_output(count):
    """2^bits − 1 values at most; the largest stays; no weight moves by more than half a step (1e-6: float32)."""
    weight = torch.randn(5, 400, generator=gen()) * torch.tensor([0.1, 1.0, 10.0, 0.0, 3.0])[:, None]
    found = bits.rounded(weight, count)
    step = weight.abs().amax(1) / (2 ** (count - 1) - 1)
    for row, before, size in zip(found, weight, step):
        assert len(row.unique()) <= 2**count - 1
        assert (row - before).abs().max() <= size / 2 + 1e-6
        assert row.abs().max() == pytest.approx(before.abs().max())


def test_calibration_takes_the_mean_error_away():
    """Of the last layer's output, on what the network was asked about; without it there is one (1e-5: float32)."""
    net = toy_network()
    seen = bits.asked_about(net, torch.randn(200, 2, generator=gen()), 4)
    assert seen[0].shape == (800, 2) and seen[1].unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    exact = net(*seen).mean(0)
    plain = bits.round_network(net, 3)(*seen).mean(0)
    calibrated = bits.round_network(net, 3, seen)(*seen).mean(0)
    assert (calibrated - exact).abs().max() < 1e-5 < (plain - exact).abs().max()


def toy_network():
    """A perceptron with weights of size one."""
    net = scflow.MLP(width=32).requires_grad_(False)
    for weight in net.parameters():
        weight.copy_(torch.randn(weight.shape, generator=gen(7)) / weight.shape[-1] ** 0.5)
    return net


def test_bits_are_measured_and_read_back(here, monkeypatch):
    """Two tables and a figure; again, no run is made."""
    argv = ["--datasets", "moons", "--seeds", 0, "--bits", 8, 3, "--samples", 60, "--workers", 1]
    argv += ["--out", "seen"]
    monkeypatch.setattr(common, "parallel_map", lambda workers, function, *lists: list(map(function, *lists)))
    monkeypatch.setattr(toy_2d, "fit_teacher", lambda run, data, settings: toy_network())
    monkeypatch.setattr(toy_2d, "fit_student", lambda *_: SimpleNamespace(ema=toy_network()))
    assert run(bits, *argv) == 0
    text = read("seen.md")
    shown = [row["sampler"] for row in tables(text)]
    assert shown[:6] == [who + end for who in bits.SAMPLERS for end in bits.ENDS]
    assert len(shown) == 6 + 4  # one step has no gap
    assert is_drawn("seen.png")
    monkeypatch.setattr(toy_2d, "fit_teacher", stop)
    assert run(bits, *argv) == 0
    assert read("seen.md") == text


def test_the_demos_networks_are_rounded(demo):
    """A row for each number of bits, and the drawings, which are nearest; a sheet."""
    assert run(bits, "faces", "--run", "demo", "--bits", 8, 2, "--samples", 250, "--out", "seen") == 0
    drawings, *rows = tables(read("seen.md"))
    expected = ["32", "8", "8, calibrated", "2", "2, calibrated"]
    assert [row["bits"] for row in rows] == 2 * expected
    assert float(drawings["layout"]) < min(float(row["layout"]) for row in rows)
    assert is_drawn("seen.png")


# ═══ sequences.py ═══════════════════════════════════════════════════════════════════════════


def test_autocorrelation_of_a_wave():
    """Of twelve times a wave, twice: −1 times the share that is left at half of the wave, and 1 times at all of it."""
    angle = 2 * torch.pi * (torch.arange(24) / 12 + torch.rand(500, 3, 1, 1, generator=gen()))
    found = sequences.autocorrelation(5 * angle.cos() + 3)
    assert torch.allclose(found[:, 5], torch.tensor(-18 / 24), atol=0.03)  # lag 6: 18 pairs of 24; 0.03: phases
    assert torch.allclose(found[:, 11], torch.tensor(12 / 24), atol=0.03)  # lag 12


def test_series_are_told_apart_where_they_differ():
    """Fresh ones are not (0.06: four deviations of a fifth of 3,000); those without a trend are, in every measure."""
    measures = sequences.SeriesMeasure(1500, seed=0)
    fresh = sequences.draw_series(1500, gen(1))
    assert fresh.shape == (1500, 3, 1, 24)
    assert fresh.std() == pytest.approx(1, abs=0.1)
    same = measures(fresh)
    assert abs(same["told apart"]) < 0.06
    slope = fresh.diff(dim=3).mean(3, keepdim=True)
    line = fresh.mean(3, keepdim=True) + slope * torch.linspace(-12, 12, 24)
    other = measures(fresh - line)
    assert other["told apart"] > 0.2
    assert other["autocorrelation"] > 3 * same["autocorrelation"]
    assert other["context"] > 3 * same["context"]


def test_sentences_are_read_back_and_checked():
    """Vectors with noise are the words they come from. A wrong word is seen, and so is one sentence all the time."""
    measures = sequences.SentenceMeasure()
    x, _ = sequences.sentence_batch(3000, gen())
    noisy = x + 0.3 * torch.randn(x.shape, generator=gen(1))
    assert sequences.tokens_of(noisy) == sequences.tokens_of(x)
    true = measures(noisy)
    assert true["ungrammatical"] == 0
    assert true["frequencies"] < 0.15  # 3,000 sentences, 225 beginnings
    wrong = x.clone()
    wrong[:1000, :, :, 0] = x[:1000, :, :, 3]  # "circle" for "a"
    assert measures(wrong)["ungrammatical"] == pytest.approx(1 / 3)
    assert measures(x[:1].expand_as(x))["frequencies"] > 0.9
    assert measures(torch.zeros_like(x)) == {"ungrammatical": 1.0, "frequencies": pytest.approx(0.5)}


def test_sequences_are_made_and_read_back(here, monkeypatch, capsys):
    """A table for each world, the sentences themselves, and a figure of the series; again, nothing is trained."""
    assert "no world" in refused(capsys, sequences, "--worlds", "music")
    monkeypatch.setattr(sequences, "TEACHER", TeacherSettings(teacher_steps=3, teacher_batch=8))
    monkeypatch.setattr(sequences, "READER_UPDATES", 3)
    short = [replace(phase, steps=2, batch=8) for phase in sequences.SCHEDULE]
    monkeypatch.setattr(sequences, "SCHEDULE", tuple(short))
    argv = ["--seeds", 0, 1, "--samples", 200, "--out", "seen"]
    assert run(sequences, *argv) == 0
    text = read("seen.md")
    rows = tables(text)
    who = ["truth", "teacher", "student", "student", "student"]
    assert [row["series"] for row in rows if "series" in row] == who
    assert [row["sentences"] for row in rows if "sentences" in row] == who
    written = [row["sentence"] for row in rows if row.get("sampler") == "truth"]
    assert len(written) == 4 and all(captions.parse(text) >= 0 for text in written)
    assert is_drawn("seen.png")
    assert len(read_csv("seen.csv")) == 2 * 2 * 5
    monkeypatch.setattr(sequences, "train", stop)
    assert run(sequences, *argv) == 0
    assert read("seen.md") == text


# ═══ captions.py ════════════════════════════════════════════════════════════════════════════


def two_objects(n, generator):
    """Scenes (n,7) of two different objects of which all is said."""
    said = (captions.SCENES >= 0).all(1) & (captions.SCENES[:, 3] > 0)
    first = captions.SCENES[:, :3]
    second = captions.SCENES[:, 4:]
    scenes = captions.SCENES[said & (first != second).any(1)]
    return scenes[torch.randperm(len(scenes), generator=generator)[:n]]


def passing(scenes, pictures):
    """The share of pictures that show their scenes."""
    return captions.accuracy(captions.numbers_of(scenes), pictures)


def test_the_reader_reads_what_was_drawn():
    """All of 500 pictures, 8 bits deep, of seen and of held-out combinations."""
    generator = gen()
    seen = captions.pick(300, generator)
    unseen = captions.pick(200, generator, unseen=True)
    scenes = captions.SCENES[torch.cat([seen, unseen])]
    scenes = captions.settle(scenes, generator)
    pictures = captions.draw(scenes, generator)
    assert 0 <= pictures.min() and pictures.max() <= 1
    assert passing(scenes, (255 * pictures).round() / 255) == 1


@pytest.mark.parametrize("mistake", captions.mistakes(captions.SCENES[:1]))
def test_the_reader_notices_every_kind_of_mistake(mistake):
    """Of pictures that differ from the sentence in this alone none passes for it."""
    generator = gen(1)
    scenes = two_objects(60, generator)
    wrong = captions.mistakes(scenes)[mistake]
    told = (wrong != scenes).any(1)  # two red objects may swap their colours
    assert told.sum() > 30
    assert passing(scenes[told], captions.draw(wrong[told], generator)) == 0


def test_what_a_sentence_leaves_open_may_be_anything():
    """Sizes and colours are struck out of it: all of its pictures pass still, and with another shape none."""
    generator = gen(3)
    scenes = two_objects(60, generator)
    pictures = captions.draw(scenes, generator)
    scenes[:, [0, 1, 4, 5]] = -1
    assert passing(scenes, pictures) == 1
    scenes[:, 2] = (scenes[:, 2] + 1) % 3
    scenes[:, 6] = (scenes[:, 6] + 1) % 3
    assert passing(scenes, pictures) == 0


def damaged(kind, x):
    """Pictures (B,3,32,32) of which none should pass for anything."""
    ground = x[:, :, :1, :1]
    inside = (x - ground).abs().sum(1, keepdim=True) > 0.05
    stripes = torch.arange(32) % 8 < 4
    corner = torch.zeros(32, 32)
    corner[:4, :4] = 1
    red = captions.PALETTE[0][:, None, None]
    kinds = {
        "noise": torch.rand(x.shape, generator=gen(4)),
        "empty ground": ground.expand_as(x),
        "dark ground": torch.where(inside, x, 0.3),
        "half a shape": torch.where(inside & stripes[:, None], ground, x),
        "two colours": torch.where(stripes, x, x.roll(1, 1)),  # the channels of some columns are turned
        "a blot": torch.lerp(x, red.expand_as(x), corner),
        "a ghost": torch.lerp(x, red.expand_as(x), 0.45 * corner),
        "a mixture": torch.lerp(x, x.flip(1), 0.5),  # red and blue change places
    }
    return kinds[kind]


KINDS = ("noise", "empty ground", "dark ground", "half a shape", "two colours", "a blot", "a ghost", "a mixture")


@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_passes_no_damaged_picture(kind):
    """Of 60 red circles at most 2 pass for "a circle" (a blot may fall on one, half of one may look like a shape)."""
    drawn = captions.SCENES[captions.parse("a red circle")].expand(60, -1)
    asked = captions.SCENES[captions.parse("a circle")].expand(60, -1)
    pictures = captions.draw(drawn, gen(2))
    assert passing(asked, pictures) == 1
    assert passing(asked, damaged(kind, pictures)) <= 2 / 60


def test_sentences_and_scenes_are_the_same_thing():
    """Each of the 8,145 scenes has its own sentence, which is parsed back, and its own tokens, which are the words."""
    count = 45 + 4 * 45**2
    assert len(captions.SENTENCES) == len(captions.SCENES) == len(captions.TOKENS.unique(dim=0)) == count
    for text, number in list(captions.SENTENCES.items())[::37]:
        assert captions.parse(f"{text.capitalize()}.") == number
        assert captions.sentence(captions.SCENES[number].tolist()) == text
        words = [captions.WORDS[token - 1] for token in captions.TOKENS[number].tolist() if token]
        assert " ".join(words) == text


def test_held_out_combinations_are_never_trained_on():
    """Of 5,000 drawn sentences none names one, and no open colour is drawn as one; all others occur."""
    pairs = ("green triangle", "yellow square")
    scenes = captions.SCENES[captions.pick(5000, gen())]
    settled = captions.settle(scenes, gen(1))
    for scene in torch.cat([scenes, settled]).unique(dim=0).tolist():
        assert not any(pair in captions.sentence(scene) for pair in pairs)
    unseen = captions.SCENES[captions.pick(500, gen(), unseen=True)]
    for scene in unseen.unique(dim=0).tolist():
        assert any(pair in captions.sentence(scene) for pair in pairs)
    drawn = settled[:, 1:3].unique(dim=0)
    assert len(drawn) == 4 * 3 - 2


def test_the_teacher_sees_pictures_of_its_sentences():
    """Decoded, 95% of the latents of a batch show what their tokens say (the autoencoder loses a little)."""
    codec = celeba_latent.Codec(captions.codec_of(2000))
    latents, tokens = captions.batches(codec)(100, gen())
    known = captions.TOKENS.tolist()
    numbers = torch.tensor([known.index(row) for row in tokens.tolist()])
    pictures = codec.decode(latents) / 255
    assert captions.accuracy(numbers, pictures) > 0.95
    assert captions.accuracy(numbers.roll(1), pictures) < 0.2


def test_variety_is_the_number_of_colours():
    """Four for pictures of "a circle", three for "a square", none where they show something else (5%: 100 pictures)."""
    circle = captions.parse("a circle")
    square = captions.parse("a square")
    for number, shown, colours in ((circle, circle, 4), (square, square, 3), (circle, square, 0)):
        pictures = captions.draw(captions.SCENES[shown].expand(100, -1), gen())
        assert captions.variety(number, pictures) == pytest.approx(colours, rel=0.05)


@pytest.mark.parametrize("prompt, word", [("a purple circle", "yellow"), ("a red small circle", "SIZE"), ("", "SIZE")])
def test_a_prompt_outside_the_grammar_is_refused(prompt, word, here, capsys):
    """One line: the words if one is unknown, else the grammar; nothing is written."""
    assert word in refused(capsys, captions, "sample", "--prompt", prompt)
    assert not list(here.iterdir())


@pytest.fixture
def few_captions(here, monkeypatch):
    """The smallest networks, three updates, and ten pictures that are read: the flags of a run."""
    schedule = toy_2d.revise(captions.SCHEDULE, {"steps": [3, 3], "batch": [4]})
    monkeypatch.setattr(captions, "SCHEDULE", schedule)
    monkeypatch.setattr(captions, "TEACHER", TeacherSettings(4, 8, 1e-3))
    monkeypatch.setattr(captions, "NETWORK", {"dim": 16, "depth": 1, "heads": 2})
    monkeypatch.setattr(captions, "codec_of", partial(captions.codec_of, 1000))
    accuracy = captions.accuracy
    monkeypatch.setattr(captions, "accuracy", lambda numbers, pictures: accuracy(numbers[:10], pictures[:10]))
    return ["--seeds", 7, "--samples", 200, "--guidance", 3, "--device", "cpu", "--quiet"]


def test_captions_are_trained_resumed_and_sampled(few_captions, monkeypatch, capsys):
    """Stopped after the teacher, it goes on from there; then a table, a sheet, and a prompt. Again, no run is made."""
    argv = few_captions
    distill = scflow.distill
    seen = {}

    def spy(velocity, *rest, student, **options):
        seen.update(velocity=velocity, teacher=student)
        stop()

    monkeypatch.setattr(scflow, "distill", spy)
    with pytest.raises(Started):
        run(captions, *argv)
    x = torch.randn(3, *captions.LATENT)
    t = torch.rand(3)
    guided = scflow.guided(seen["teacher"], 3.0)
    cond = captions.TOKENS[:3]
    assert torch.equal(seen["velocity"](x, t, cond), guided(x, t, cond))
    folder = Path("runs/captions/seed-7")
    teacher = (folder / "teacher.pt").read_bytes()
    assert "--overwrite" in refused(capsys, captions, *argv)
    monkeypatch.setattr(scflow, "distill", distill)
    assert run(captions, *argv, "--resume") == 0
    assert (folder / "teacher.pt").read_bytes() == teacher

    text = read("runs/captions/captions.md")
    truth, autoencoder, *networks = tables(text)
    assert truth["accuracy"] == truth["held out"] == truth["in red"] == autoencoder["accuracy"] == "100.0%"
    counts = [(row["network"], row["evaluations"]) for row in networks]
    expected = [("teacher, unguided", n) for n in ("1", "2", "4", "50")]
    expected += [("teacher, guided", "100")]
    expected += [("student", n) for n in ("1", "2", "4", "8")]
    assert counts == expected
    assert is_drawn(folder / "prompts.png")

    monkeypatch.setattr(captions, "measure", stop)
    assert run(captions, *argv, "--resume") == 0
    assert read("runs/captions/captions.md").splitlines()[1:] == text.splitlines()[1:]
    assert run(captions, "sample", "--out", folder, "--steps", 1, 2, "--count", 3, "--device", "cpu") == 0
    assert Image.open("prompt.png").size == (3 * 136, 2 * 136)

    scflow.save("stranger.pt", scflow.MLP(), codec=scflow.read(folder / "student.pt")["codec"])
    assert "no network of captions" in refused(capsys, captions, "sample", "--out", "stranger.pt")
    assert "twice" in refused(capsys, captions, "--seeds", 8, 8)
    assert not Path("runs/captions/seed-8").exists()


# ═══ The notebooks ══════════════════════════════════════════════════════════════════════════


def percent_cells(text):
    """[(kind, text)] of the cells in a .py file, each of which begins with # %%."""
    cells = []
    for part in re.split("^# %%", text, flags=re.MULTILINE)[1:]:
        mark, *lines = part.rstrip("\n").split("\n")
        kind = "markdown" if "[markdown]" in mark else "code"
        if kind == "markdown":
            lines = [re.sub("^# ?", "", line) for line in lines]
        cells.append((kind, "\n".join(lines).strip("\n")))
    return cells


@pytest.mark.parametrize("name", [path.stem for path in sources() if path.parent.name == "notebooks"])
def test_a_notebook_is_its_source_executed(name):
    """The .ipynb has the cells of the .py, which ran from top to bottom without an error, and is not large."""
    file = HOUSE / "notebooks" / f"{name}.ipynb"
    cells = json.loads(read(file))["cells"]
    written = [(cell["cell_type"], "".join(cell["source"]).strip("\n")) for cell in cells]
    assert written == percent_cells(read(file.with_suffix(".py")))
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert file.stat().st_size < 700_000


@pytest.mark.parametrize("name", [path.stem for path in sources() if path.parent.name == "notebooks"])
def test_an_exercise_is_unsolved_until_its_folded_solution(name):
    """Its check failed when the notebook ran; in the folded cell below, which runs the check again, it passed."""
    cells = json.loads(read(HOUSE / "notebooks" / f"{name}.ipynb"))["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    checks = [i for i, source in enumerate(text) if "@exercise" in source]
    asked = [source for source in text if source.startswith("**Exercise.**") or "\n**Exercise.**" in source]
    assert len(checks) == len(asked) > 0
    for i in checks:
        printed = "".join("".join(output.get("text", "")) for output in cells[i]["outputs"])
        assert printed.endswith("Not solved yet.\n")
        assert "return ...  # your answer" in "".join(text[i - 2 : i + 1])
        assert text[i + 1].startswith("# Solution\n")
        assert re.search(r"^check\(\)", text[i + 1], re.MULTILINE)
        assert cells[i + 1]["metadata"]["jupyter"]["source_hidden"]


def test_a_check_goes_on_either_way_and_can_be_called_again(capsys):
    """A right answer is solved, and one that fails in any way is not; where it is called again, it fails."""

    @lecture.exercise
    def right():
        assert abs(2.0 - 2.0) < 1

    assert capsys.readouterr().out == "Solved.\n"

    @lecture.exercise
    def missing():
        assert abs(... - 2.0) < 1

    assert capsys.readouterr().out == "Not solved yet.\n"
    right()
    with pytest.raises(TypeError):
        missing()


# ═══ tell_apart.py ══════════════════════════════════════════════════════════════════════════


def test_a_classifier_tells_what_differs_and_guesses_what_does_not():
    """Pictures of noise: those with a brighter corner are told apart, and others of the same kind are not."""
    noise = torch.randint(100, (600, 3, 16, 16), generator=gen()).byte()
    bright = noise[:300].clone()
    bright[:, :, :4, :4] += 100
    assert tell_apart.tell_apart(noise[300:], bright, updates=40) > 0.95
    assert abs(tell_apart.tell_apart(noise[:300], noise[300:], updates=40) - 0.5) < 0.15


def test_new_drawings_are_not_those_of_the_demo():
    """Batches with other numbers are other drawings."""
    new = tell_apart.drawings(600, 0)
    assert new.shape == (600, 3, 64, 64)
    assert not torch.equal(new[:500], torch.stack(celeba_latent.draw_batch(["0"] * 500)))
    assert not torch.equal(new[:100], new[500:])


def test_the_table_has_a_row_for_each_network(demo, monkeypatch, capsys):
    """From a short run of the demo; a folder that holds none is refused."""
    assert "nowhere" in refused(capsys, tell_apart, "--runs", "nowhere")
    monkeypatch.setattr(tell_apart, "tell_apart", lambda real, fake: len(fake) / 1000)
    assert run(tell_apart, "--runs", "demo", "demo", "--samples", 100, "--out", "told") == 0
    table = read("told.md")
    for who in ("drawings", "teacher, 50 steps", "student, 1 step"):
        assert f"| {who} | 10.0 ± 0.0 | 10.0, 10.0 |" in table


# ═══ The README's first picture ═════════════════════════════════════════════════════════════


def test_the_front_draws_two_runs(here, capsys):
    """Ten panels, which say what the runs measured; without a run one line says what is missing."""
    assert "no run of" in refused(capsys, front, "--paper", "nowhere")
    short = ["--teacher-steps", 5, "--student-steps", 5, "--samples", 100, "--figures", "none", "--quiet"]
    for preset, folder in (("paper", "runs/paper"), ("two_phase", "runs/ours")):
        assert run(toy_2d, *short, "--preset", preset, "--out", folder) == 0
    assert run(front, "--out", "front") == 0
    assert Image.open("front.png").width == 1000
    paper, ours = toy_2d.Pictures("runs/paper"), toy_2d.Pictures("runs/ours")
    axes = front.draw(toy_2d.drawing(), paper, ours).axes
    titles = [ax.get_title() for ax in axes]
    assert titles[1:5] == [f"paper, {steps}" for steps in ("1 step", "2 steps", "4 steps", "8 steps")]
    assert titles[6:] == [f"ours, {steps}" for steps in ("1 step", "2 steps", "4 steps", "8 steps")]
    assert f"{paper.quality('student')[2]:.1f}" in axes[2].get_xlabel()
    assert f"{ours.quality('student')[2]:.1f}" in axes[7].get_xlabel()


# ═══ The documents ══════════════════════════════════════════════════════════════════════════

README = read(HOUSE / "README.md")
FRONT = [HOUSE / "README.md", *sorted(HOUSE.glob("docs/*.md"))]
DOCUMENTS = [*FRONT, HOUSE / "experiments/README.md"]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
EXPERIMENTS = (
    ablation,
    bits,
    captions,
    correctors,
    dimension,
    front,
    growth,
    guidance,
    posterior,
    relatives,
    sequences,
    speed,
    tell_apart,
    windows,
)
PROGRAMS = {"toy_2d.py": toy_2d, "celeba_latent.py": celeba_latent}
PROGRAMS.update({f"-m {module.__name__}": module for module in EXPERIMENTS})
FIRST_STEPS = (  # where each program begins with its first run
    (toy_2d, "fit_teacher"),
    (celeba_latent, "write_latents"),
    (common, "parallel_map"),
    (relatives, "cost_table"),
    (captions, "run_one"),
    (correctors, "measure"),
    (speed, "matmul_rate"),
    (speed, "plan_row"),
    (tell_apart, "measure"),
)


def blocks(text, language=""):
    """The bodies of the blocks between ``` that are in this language."""
    return re.findall(f"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands():
    """The commands of all blocks, and those in the sentences of README and docs, without `python`."""
    found = []
    for document in FRONT:
        found += re.findall(r"`python ([^`]*)`", read(document))
    for document in DOCUMENTS:
        for block in blocks(read(document)):
            found += re.findall(r"^(?:pip .* && )?python (.*)$", block, re.MULTILINE)
    ours = {" ".join(command.split()) for command in found}
    return sorted(command for command in ours if not command.startswith(("-m pytest", "-m jupytext")))


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_documents_is_understood(command, here, monkeypatch, capsys):
    """As written, in an empty folder: it begins its first run, or misses only what an earlier command leaves."""
    for place, name in FIRST_STEPS:
        monkeypatch.setattr(place, name, stop)
    np.save("points.npy", np.random.default_rng(0).normal(size=(200, 2)))
    (program,) = [name for name in PROGRAMS if command.startswith(name)]
    argv = shlex.split(command.removeprefix(program))
    try:
        code = run(PROGRAMS[program], *argv)
    except Started:
        return
    except SystemExit as end:
        assert "--help" in argv and end.code == 0
        return
    error = capsys.readouterr().err
    missing = "no (pictures|teacher|checkpoint|run of|folder of latents|device 'cuda')"
    assert code == 2 and re.search(missing, error), error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short finished run of toy_2d.py."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    short = ["--teacher-steps", 20, "--student-steps", 20, "--samples", 100, "--figures", "none", "--quiet"]
    assert run(toy_2d, *short, "--out", folder) == 0
    return folder


def encode_colours(folder):
    """A latents folder of 40 pictures of 32 pixels, each of one colour."""
    Path("pictures").mkdir()
    for i, colour in enumerate(np.random.default_rng(0).integers(0, 256, (40, 3)).tolist()):
        Image.new("RGB", (32, 32), tuple(colour)).save(f"pictures/{i}.png")
    options = ["--autoencoder", "none", "--size", 32, "--quiet"]
    assert run(celeba_latent, "encode", "--images", "pictures", *options, "--out", folder) == 0


EXAMPLES = [code for document in FRONT for code in blocks(read(document), "python")]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number, finished, here):
    """Of README and docs, as it stands, after `python toy_2d.py`."""
    code = EXAMPLES[number]
    if "diffusers" in code:
        pytest.importorskip("diffusers")  # an optional extra
    shutil.copytree(finished, "runs/8gaussians")
    if "celeba_latent.Latents(" in code:
        encode_colours("latents")
    scope = {}
    exec(code, scope)
    if "x0" in scope:
        assert scope["x0"].shape == (1000, 2) and scope["x0"].isfinite().all()


@every_document
def test_tables_are_those_of_the_results(document):
    """Every row of measures, whatever its columns, stands in a table that a command wrote to results/."""
    written = []
    for path in (HOUSE / "results").rglob("*.md"):
        written += tables(read(path))
    for row in tables(read(document)):
        if {"row", "network", "ms", "PFLOP"} & row.keys():
            assert any(row.items() <= other.items() for other in written), row


QUOTED = ("8.06", "7.67")  # the paper's FID at one step and at two


@every_document
def test_numbers_are_those_of_the_results(document):
    """Each mean with its deviation stands in results/; each other number with two decimals there, or in the sources."""
    results = "".join(read(path) for path in sorted((HOUSE / "results").rglob("*.md")))
    code = "".join(read(path) for path in [*sources(), HOUSE / "pyproject.toml"])
    text = read(document).replace("−", "-")
    text = re.sub("^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # addresses
    for pair in re.findall(r"-?\d[\d.]* ± \d[\d.]*", text):
        assert pair in results, pair
    for number in re.findall(r"(?<![\w.])\d+\.\d\d+(?![\w.]*\d)", text):
        alone = rf"(?<![\d.]){re.escape(number)}(?!\d)"
        assert number in QUOTED or re.search(alone, results) or re.search(alone, code), number


def test_the_run_in_the_readme_is_that_of_the_results():
    """The table that `python toy_2d.py` prints, line by line."""
    metrics = toy_2d.read_json(HOUSE / "results/8gaussians/metrics.json")
    assert toy_2d.table(metrics) in README


@pytest.fixture(scope="module")
def vocabulary():
    """All words of the sources, and the names of the tests."""
    words = {"UNet2DConditionModel"}  # of diffusers
    for path in sources():
        words.update(re.findall(r"\w+", read(path)))
    for path in (HOUSE / "test_scflow.py", Path(__file__)):
        words.update(re.findall(r"def (test_\w+)", read(path)))
    return words


@every_document
def test_what_a_document_names_exists(document, vocabulary, capsys):
    """Functions, settings, tests and flags in backticks; files and headings that are linked."""
    text = read(document)
    prose = re.sub("^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for fragment in re.findall("`([^`]+)`", prose):
        if fragment.startswith("python "):
            continue  # those of today are tried above
        name = re.fullmatch(r"([a-zA-Z_]\w*)(\(.*\))?", fragment, re.DOTALL)
        assert name is None or name[1] in vocabulary, fragment
        for flag in re.findall("--([a-z-]+)", fragment):
            assert flag.replace("-", "_") in vocabulary, flag
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), target
        if heading:
            slugs = []
            for title in re.findall(r"^#+ (.*)$", read(path), re.MULTILINE):
                letters = re.sub(r"[^\w -]", "", title.lower())
                slugs.append(letters.replace(" ", "-"))
            assert heading in slugs, target
