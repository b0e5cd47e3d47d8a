"""The part toy_2d.py of the tests: truth, data, measures, flags, run folders, a run and its figures."""

# test_core_part comes first: it hides the GPU before torch is loaded.
from test_core_part import Gaussian, exact, float64, gen, refused, same, seeded, z_scores  # noqa: F401, I001

import ast
import csv
import inspect
import io
import itertools
import json
import math
import re
import shutil
import tokenize
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import scflow
import toy_2d
from scflow import Phase, TeacherSettings
from toy_2d import EnergyDistance, GaussianMixture

# ═══ toy_2d.py 1: exact truth ═══════════════════════════════════════════════════════════════

MEANS = [[-1.0, 0.5], [1.5, 0.0], [0.3, -1.8]]
SHARES = [0.6, 0.3, 0.1]


def skewed(labels=None):
    """Three Gaussians of unequal shares."""
    return GaussianMixture(MEANS, 0.3, SHARES, labels)


def on_paths(n):
    """x₀ of the skewed mixture, x₁, times and x_t."""
    generator = gen(3)
    x0, _ = skewed().sample(n, generator)
    x1 = torch.randn(n, 2, generator=generator)
    t = torch.rand(n, generator=generator)
    return x0, x1, t, scflow.interpolate(x0, x1, t)


@exact
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.95])
def test_the_velocity_is_the_score_of_the_density(t):
    """v* = −(x + t·∇log p_t)/(1−t) by autograd, where the data are and far from them (1e-10: rounding)."""
    x = 3 * torch.randn(300, 2)
    x.requires_grad_()
    times = torch.full((300,), t)
    (score,) = torch.autograd.grad(skewed().log_density(x, times).sum(), x)
    expected = -(x + t * score) / (1 - t)
    assert torch.allclose(skewed()(x, times), expected, rtol=1e-10, atol=1e-10)


@exact
def test_the_velocity_at_noise_points_away_from_the_mean():
    """At t = 1 it is x − Σ w_k μ_k (rounding: 1e-12)."""
    x = torch.randn(50, 2)
    mean = torch.tensor(SHARES) @ torch.tensor(MEANS)
    assert torch.allclose(skewed()(x, torch.ones(50)), x - mean, atol=1e-12)


@exact
def test_the_density_is_that_of_torch_distributions():
    """log p_t is torch's own mixture with means (1−t)μ_k and variance (1−t)²s² + t², here in 3-D (rounding: 1e-12)."""
    means = torch.randn(4, 3)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    sigma = math.sqrt((0.7 * 0.5) ** 2 + 0.3**2)
    parts = torch.distributions.Normal(0.7 * means, sigma)
    parts = torch.distributions.Independent(parts, 1)
    which = torch.distributions.Categorical(weights)
    law = torch.distributions.MixtureSameFamily(which, parts)
    x = torch.randn(50, 3)
    found = GaussianMixture(means, 0.5, weights).log_density(x, torch.full((50,), 0.3))
    assert torch.allclose(found, law.log_prob(x), atol=1e-12)


def test_the_velocity_is_the_conditional_mean():
    """E[(x₁ − x₀ − v*)·h(x_t)] = 0 for seven h and two axes: all |z| < 4, which chance breaks once in a thousand.

    The velocity for equal shares fails by far.
    """
    x0, x1, t, xt = on_paths(100_000)
    a, b = xt.T
    one = torch.ones_like(a)
    tests = torch.stack([one, a, b, (3 * a).sin(), a * b, (a > 1).float(), t * b], 1)  # (n,7)
    for mixture, is_true in [(skewed(), True), (GaussianMixture(MEANS, 0.3), False)]:
        rest = x1 - x0 - mixture(xt, t)  # (n,2)
        products = rest[:, :, None] * tests[:, None]  # (n,2,7)
        z = z_scores(products).abs().max()
        assert z < 4 if is_true else z > 10


def test_samples_have_the_moments_of_the_mixture():
    """Shares, mean and second moments are within 4 standard errors; stratified, the shares are exact."""
    mixture = skewed()
    x0, k = mixture.sample(20_000, gen())
    mean = mixture.weights @ mixture.means
    second = mixture.weights @ mixture.means**2 + 0.3**2
    assert z_scores(F.one_hot(k, 3) - mixture.weights).abs().max() < 4
    assert z_scores(x0 - mean).abs().max() < 4
    assert z_scores(x0**2 - second).abs().max() < 4
    assert z_scores((x0 - mixture.means[k]).prod(1)).abs() < 4  # the axes of a component are independent

    x0, k = mixture.sample(20_000, gen(), stratified=True)
    assert k.bincount().tolist() == [12_000, 6_000, 2_000]
    assert z_scores(x0 - mixture.means[k]).abs().max() < 4


@exact
def test_a_label_leaves_the_mixture_of_its_components():
    """With a label, velocity and density are those of these components alone, but for their share (1e-12)."""
    mixture = skewed(labels=[1, 2, 1])
    _, _, t, xt = on_paths(100)
    for label, mine in [(1, [0, 2]), (2, [1])]:
        cond = torch.full((100, 1), label)
        alone = GaussianMixture(mixture.means[mine], 0.3, mixture.weights[mine])
        share = mixture.weights[mine].sum().log()
        assert torch.allclose(mixture(xt, t, cond), alone(xt, t), atol=1e-12)
        assert torch.allclose(mixture.log_density(xt, t, cond), share + alone.log_density(xt, t), atol=1e-12)

    no_label = torch.zeros(100, 1, dtype=torch.int64)
    assert torch.equal(mixture(xt, t, no_label), mixture(xt, t))
    assert type(mixture.label_count) is int  # a tensor would have to be fetched from the device at every call
    refused(mixture, xt, t, torch.full((100, 1), 3))
    refused(skewed(), xt, t, torch.ones(100, 1, dtype=torch.int64))


@exact
@pytest.mark.parametrize("std", [0.15, 1.7])
def test_the_flow_map_of_one_gaussian_is_its_closed_form(std):
    """From any (x,t), each row with its own t. 200 Heun steps are good to 1e-3 (at s = 0.15; measured 2e-4)."""
    truth = Gaussian(std)
    mixture = GaussianMixture(truth.mean[None], std)
    x = torch.randn(100, 2)
    t = torch.rand(100)
    assert torch.allclose(mixture.flow_map(x, t), truth.flow_map(x, t), atol=1e-3)


# ═══ toy_2d.py 2: data sets ═════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("name", toy_2d.DATASETS)
def test_data_sets_are_centred_and_of_common_size(name):
    """Of 20,000 points the mean is 0 within 0.06 (4 standard errors: 0.04), the RMS radius between 1.5 and 2.1."""
    x0, _ = toy_2d.dataset(name).sample(20_000, gen())
    assert x0.mean(0).norm() < 0.06
    assert 1.5 < x0.square().sum(1).mean().sqrt() < 2.1


@pytest.mark.parametrize("name", toy_2d.DATASETS)
def test_a_stratified_sample_is_of_the_same_law(name):
    """Every part has its share to one point; twenty plain samples are at no distance (4 standard errors)."""
    data = toy_2d.dataset(name)
    generator = gen()
    reference, part = data.sample(2000, generator, stratified=True)
    counts = part.bincount()
    assert counts.max() - counts.min() <= 1 and len(counts) > 1
    energy = EnergyDistance(reference, part)
    mean, sd = toy_2d.noise_floor(energy, lambda: data.sample(2000, generator)[0])
    assert abs(mean) < 4 * sd / math.sqrt(20) + 1e-3  # the one reference has an error of its own, below 1e-3


def save_points(path, points):
    np.save(path, points)
    return str(path)


def test_your_own_points_are_centred_scaled_and_split(tmp_path):
    """From any place and scale they get mean 0 and RMS radius 2 (1e-5: float32); a fifth is held out."""
    points = np.random.default_rng(0).normal(100, [30, 5], (505, 2))
    data = toy_2d.dataset(save_points(tmp_path / "mine.npy", points))
    everything = torch.cat([data.train, data.held_out])
    assert everything.mean(0).abs().max() < 1e-5
    assert abs(everything.square().sum(1).mean().sqrt() - 2) < 1e-5
    assert len(data.held_out) == 101 and len(data.train) == 404

    scale = everything.numpy().std(0) / points.std(0)
    assert abs(scale[0] / scale[1] - 1) < 1e-5  # both axes have one scale


def test_held_out_points_are_never_drawn_for_training(tmp_path):
    """5,000 draws from 400 points leave none of these out (e^{−12} each); a stratified sample is the held-out ones."""
    points = np.random.default_rng(0).normal(size=(500, 2))
    data = toy_2d.dataset(save_points(tmp_path / "mine.npy", points))
    drawn, _ = data.sample(5000, gen())
    assert same(drawn.unique(dim=0), data.train.unique(dim=0))
    held_out, _ = data.sample(5000, gen(), stratified=True)
    assert same(held_out, data.held_out)
    assert len(torch.cat([drawn, held_out]).unique(dim=0)) == 500


BAD_POINTS = {
    "three columns": (np.ones((200, 3)), "(N,2)"),
    "too few": (np.ones((99, 2)), "N ≥ 100"),
    "text": (np.full((200, 2), "a"), "real numbers"),
    "complex": (np.ones((200, 2)) * 1j, "complex"),
    "objects": (np.full((200, 2), None), "numbers"),
    "not finite": (np.full((200, 2), np.nan), "finite"),
    "one point": (np.full((200, 2), 7.1), "one point"),
}


@pytest.mark.parametrize("case", BAD_POINTS)
def test_bad_points_are_refused(case, tmp_path):
    """What is no cloud of points says so, and names its file."""
    points, words = BAD_POINTS[case]
    path = save_points(tmp_path / "bad.npy", points)
    refused(toy_2d.dataset, path, match=f"bad.npy.*{re.escape(words)}")


def test_files_that_hold_no_array_are_refused(tmp_path):
    """Bytes, an archive of arrays, a folder, and nothing at all."""
    fake = tmp_path / "fake.npy"
    fake.write_bytes(b"no numbers")
    archive = tmp_path / "archive.npy"
    with open(archive, "wb") as file:
        np.savez(file, np.ones((200, 2)))
    for path in (fake, archive, tmp_path / "missing.npy", tmp_path):
        refused(toy_2d.Points, path, match=path.name)


# ═══ toy_2d.py 3: measures ══════════════════════════════════════════════════════════════════


def mean_distance(pairs):
    lengths = [(a - b).norm().item() for a, b in pairs]
    return sum(lengths) / len(lengths)


@pytest.mark.parametrize("dim, error", [(2, 1e-3), (3, 1e-5)])
def test_the_energy_distance_by_brute_force(dim, error):
    """Pair by pair. In 2-D every length is known to 1e-3 of itself, in 3-D to float32."""
    x = torch.randn(5, dim)
    y = torch.randn(6, dim) + 1
    between = mean_distance(itertools.product(x, y))
    within_x = mean_distance(itertools.permutations(x, 2))
    within_y = mean_distance(itertools.permutations(y, 2))
    tolerance = error * (2 * between + within_x + within_y)
    assert abs(EnergyDistance(y)(x) - (2 * between - within_x - within_y)) < tolerance

    # Two strata of three rows: half of all independent pairs lie across them, a quarter inside each.
    strata = torch.tensor([0, 1, 0, 1, 1, 0])
    a, b = y[strata == 0], y[strata == 1]
    within_y = mean_distance(itertools.product(a, b)) / 2
    for part in (a, b):
        within_y += mean_distance(itertools.permutations(part, 2)) / 4
    assert abs(EnergyDistance(y, strata)(x) - (2 * between - within_x - within_y)) < tolerance


def test_a_stratum_of_one_row_is_refused():
    """It would have no pair."""
    refused(EnergyDistance, torch.randn(3, 2), torch.tensor([0, 0, 1]), match="two rows")


@pytest.mark.parametrize("modes", [3, 4, 5, 6, 8, 12, 16])
def test_symmetric_data_do_not_add_up_the_errors_of_projections(modes):
    """A ring of modes against itself pushed outwards: in the plane, by projections, as in space, by pairs.

    To 1%. For 30 lines, or 32, the errors of the pairs would add up to 7% and 13%.
    """
    angle = 2 * math.pi / modes * (torch.arange(1600) % modes)
    centres = torch.stack([2 * angle.cos(), 2 * angle.sin()], 1)
    x = centres + 0.03 * torch.randn(1600, 2, generator=gen(1))
    pushed = x + centres / 20
    in_plane = EnergyDistance(x)(pushed)
    x = F.pad(x, (0, 1))  # a third coordinate of 0
    pushed = F.pad(pushed, (0, 1))
    in_space = EnergyDistance(x)(pushed)
    assert abs(in_plane / in_space - 1) < 0.01


def test_the_energy_distance_is_unbiased():
    """Over 200 references and samples of one law its mean is 0 (|z| < 4), if the strata of the reference are told."""
    mixture = skewed()
    generator = gen()
    rows = []
    for _ in range(200):
        x, _ = mixture.sample(60, generator)
        y, _ = mixture.sample(60, generator)
        stratified, k = mixture.sample(60, generator, stratified=True)
        measures = (EnergyDistance(y), EnergyDistance(stratified, k), EnergyDistance(stratified))
        rows.append([energy(x) for energy in measures])
    plain, told, untold = z_scores(torch.tensor(rows))
    assert abs(plain) < 4 and abs(told) < 4
    assert untold < -6


def test_the_noise_floor_by_hand():
    """1, 2, …, 20 have the mean 10.5 and, over n − 1, the deviation √35."""
    counter = itertools.count(1)
    mean, sd = toy_2d.noise_floor(float, lambda: next(counter))
    assert mean == 10.5
    assert abs(sd - math.sqrt(35)) < 1e-12


class Asked:
    """Normal points that remember how many were asked for, and how."""

    def __init__(self):
        self.calls = []

    def sample(self, n, generator=None, stratified=False):
        self.calls.append((n, stratified))
        return torch.randn(n, 2, generator=generator), torch.zeros(n)


def test_the_floor_is_taken_at_the_size_of_the_sample(monkeypatch):
    """Twenty true samples of n points, against one stratified reference of n points; its error is a sample's own."""
    data = Asked()
    monkeypatch.setitem(toy_2d.DATASETS, "asked", lambda: data)
    floor = toy_2d.floor_of("asked", 60)
    assert sorted(data.calls) == [(60, False)] * 20 + [(60, True)]
    assert abs(floor["mean"]) < 4 * floor["sd"]


def test_the_rms_distance_by_hand():
    """Rows of norms 3 and 4 have √12.5: it is a mean over rows, not over elements."""
    a = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]])
    assert abs(toy_2d.rms_distance(a, torch.zeros_like(a)) - math.sqrt(12.5)) < 1e-6


def test_coverage_and_precision_by_hand():
    """3σ is 1.5. Two of four points are nearer to a mode, one at each: 0.5 of a share of 0.7, and all 0.3."""
    mixture = GaussianMixture([[0.0, 0.0], [10.0, 0.0]], 0.5, [0.7, 0.3])
    x = torch.tensor([[1.4, 0.0], [0.0, 1.6], [10.0, 1.4], [5.0, 5.0]])
    coverage, precision = toy_2d.coverage_and_precision(x, mixture)
    assert abs(coverage - 0.8) < 1e-6 and precision == 0.5
    assert toy_2d.coverage_and_precision(x + 50, mixture) == (0, 0)


def test_the_sliced_distance_of_a_shift():
    """A shift Δ in d dimensions reads ‖Δ‖/√d (2% with 20,000 projections); the order of the rows is nothing."""
    x = torch.randn(50, 3)
    shifted = x + torch.tensor([3.0, 0.0, 4.0])
    found = toy_2d.sliced_w2(x, shifted[torch.randperm(50)], 20_000, gen())
    assert abs(found * math.sqrt(3) / 5 - 1) < 0.02
    refused(toy_2d.sliced_w2, x, x[:-1], match="equal size")


# ═══ toy_2d.py 4: settings and flags ════════════════════════════════════════════════════════

SETTINGS = [toy_2d.Run, TeacherSettings, Phase, toy_2d.Plot]


def comments_by_line(source):
    """{line number: its comment}, as Python's own tokenizer finds them."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.removeprefix("# ")
    return found


def field_comments(cls):
    """{field: the comment on its own line}, from the syntax tree of the file that defines the class."""
    source = Path(inspect.getsourcefile(cls)).read_text(encoding="utf-8")
    comments = comments_by_line(source)
    found = {}
    for definition in ast.parse(source).body:
        if isinstance(definition, ast.ClassDef) and definition.name == cls.__name__:
            for node in definition.body:
                if isinstance(node, ast.AnnAssign):
                    found[node.target.id] = comments[node.end_lineno]
    return found


@pytest.mark.parametrize("cls", SETTINGS)
def test_the_help_of_a_flag_is_the_comment_behind_its_field(cls):
    """Of every field, its own: read by the tokenizer and the syntax tree instead of by lines."""
    expected = field_comments(cls)
    assert list(expected) == [f.name for f in fields(cls)]
    assert all(expected.values())
    assert toy_2d.help_texts(cls) == expected


@dataclass(frozen=True)
class Longer(toy_2d.Plot):
    """Settings with one more field."""

    colour: str = "#D55E00"  # of what is drawn


def test_inherited_fields_keep_their_help():
    """A class that extends settings has its parent's texts and its own."""
    assert toy_2d.help_texts(Longer) == {**field_comments(toy_2d.Plot), "colour": "of what is drawn"}


def help_of(command, monkeypatch, capsys):
    """{flag: what --help says behind it}, with single spaces."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        toy(command, "--help")
    assert stop.value.code == 0
    found = {}
    for entry in re.findall(r"\n  (--.*(?:\n    .*)*)", capsys.readouterr().out):
        flag, _, text = " ".join(entry.split()).partition(" ")
        found[flag] = text
    return found


def test_help_shows_every_flag_with_its_text_and_default(monkeypatch, capsys):
    """For the student these are the default preset's: one value, or one for each phase where they differ."""
    found = help_of("train", monkeypatch, capsys)
    assert len(found) == sum(len(fields(cls)) for cls in SETTINGS[:3])

    schedule = scflow.SCHEDULES[toy_2d.Run().preset]
    for name, text in field_comments(Phase).items():
        flag = f"student-{name}" if name in ("steps", "batch", "lr") else name.replace("_", "-")
        values = [str(getattr(phase, name)) for phase in schedule]
        if len(set(values)) == 1:
            values = values[:1]
        assert found[f"--{flag}"].endswith(f"{text} [{' '.join(values)}]")

    for name, text in field_comments(TeacherSettings).items():
        default = getattr(TeacherSettings(), name)
        assert found["--" + name.replace("_", "-")].endswith(f"{text} [{default}]")

    texts = field_comments(toy_2d.Run)
    assert found["--nfe"].endswith(f"{texts['nfe']} [1 2 4 8]")
    assert found["--preset"] == f"two_phase|paper|consistency {texts['preset']} [two_phase]"
    assert found["--gif"] == texts["gif"]


def test_a_flag_takes_one_value_or_one_for_each_phase():
    """One value goes to all phases, two go to the two; what is not named stays as it was."""
    before = scflow.SCHEDULES["two_phase"]
    _, _, schedule = toy_2d.configure("--delta 0.3 --lambda-self 0.2 0.7 --student-steps 30 20".split())
    assert [phase.delta for phase in schedule] == [0.3, 0.3]
    assert [phase.lambda_self for phase in schedule] == [0.2, 0.7]
    assert [phase.steps for phase in schedule] == [30, 20]
    assert [phase.lr for phase in schedule] == [phase.lr for phase in before]


@pytest.mark.parametrize("steps", [5, 230, 2300])
def test_one_number_of_steps_is_shared_out(steps):
    """In the proportions of the preset, rounded, and at least one step a phase."""
    before = scflow.SCHEDULES["two_phase"]
    total = sum(phase.steps for phase in before)
    _, _, schedule = toy_2d.configure(["--student-steps", str(steps)])
    for old, new in zip(before, schedule):
        assert abs(new.steps - old.steps * steps / total) <= 0.5 or new.steps == 1
    assert abs(sum(phase.steps for phase in schedule) - steps) <= 1


def test_settings_reach_their_own_class():
    """Run and teacher get what is theirs. A fit to the exact velocity is short, unless its length is given."""
    run, settings, _ = toy_2d.configure("--nfe 1 3 --gif --teacher-lr 0.5".split())
    assert list(run.nfe) == [1, 3] and run.gif and not run.overwrite
    assert settings == TeacherSettings(teacher_lr=0.5)
    for given, steps in [("", 1000), ("--teacher-steps 7", 7)]:
        _, settings, _ = toy_2d.configure(["--teacher", "exact", *given.split()])
        assert settings.teacher_steps == steps


# ═══ toy_2d.py 5: bad input ═════════════════════════════════════════════════════════════════

SHORT = "--teacher-steps 20 --student-steps 8 --samples 200 --width 16 --depth 2".split()
SILENT = [*SHORT, "--figures", "none", "--quiet"]


def toy(*argv):
    """Run a command in this process; returns its exit code."""
    return toy_2d.main([str(word) for word in argv])


def contents(folder):
    """{path: bytes} of everything in a folder."""
    found = {}
    for path in Path(folder).rglob("*"):
        found[path] = path.read_bytes() if path.is_file() else "a folder"
    return found


ERRORS = {
    "--dataset moon": "moon",
    "--dataset missing.npy": "missing.npy",
    "--dataset bad.npy": "bad.npy",
    "--teacher-steps 0": "teacher_steps",
    "--teacher-batch -1": "teacher_batch",
    "--teacher-drop 1": "teacher_drop",
    "--student-steps 0": "steps",
    "--student-steps -5 5": "steps",
    "--student-batch 0": "batch",
    "--student-lr nan": "lr",
    "--samples 0": "samples",
    "--width 0": "width",
    "--nfe 0": "nfe",
    "--nfe 1,two": "1,two",
    "--seed one": "one",
    "--seed 99999999999999999999": "seed",
    "--lamda-self 1": "--lamda-self",
    "--lambda-sel 1": "--lambda-sel",  # no abbreviations: a flag of tomorrow may share the beginning
    "--lambda-bi -1": "lambda_bi",
    "--lambda-self 0 1 2": "2 phases, not 3",
    "--delta 2": "delta",
    "--walk heun-0": "heun-0",
    "--preset papers": "papers",
    "--distance huber l1": "l1",
    "--device tpu9": "tpu9",
    "--teacher exact --dataset moons": "mixture",
    "--preset paper --self-source frozen": "first phase",
    "--preset consistency --r1 1": "r1",
    "--preset consistency --lambda-consistency 0": "weight zero",
    "--preset paper --student-steps 10 --warmup 10": "warmup",
    "--out .": "--overwrite",
    "--out . --overwrite": "left alone",
    "--out bad.npy --overwrite": "left alone",
    "--out /dev/null/run": "cannot write",
    "moons": "moons",
    "plot --out nowhere": "nowhere",
    "plot --figures some": "some",
}


@pytest.mark.parametrize("command", ERRORS)
def test_bad_input_is_one_clear_line_and_changes_nothing(command, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line on stderr that names the trouble, and no file written or lost."""
    monkeypatch.chdir(tmp_path)
    save_points("bad.npy", np.ones((200, 3)))
    before = contents(tmp_path)
    argv = command.split()
    if argv[0] != "plot":
        argv = SILENT + argv
    assert toy(*argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("toy_2d.py: error: ") and output.err.count("\n") == 1
    assert ERRORS[command] in output.err
    assert contents(tmp_path) == before


# ═══ toy_2d.py 6: run folders ═══════════════════════════════════════════════════════════════


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one short run with all figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("toy"))
        assert toy(*SHORT, "--figures", "all", "--gif") == 0
        return Path("runs/8gaussians").absolute()


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    """Without a name the next free one is taken, and those before are left alone."""
    monkeypatch.chdir(tmp_path)
    names = [toy_2d.open_folder("", "moons", False, {}).name for _ in range(3)]
    assert names == ["moons", "moons-2", "moons-3"]


def test_a_finished_run_is_refused_unless_it_is_to_be_overwritten(finished, tmp_path, monkeypatch):
    """Without --overwrite no byte changes. With it the old run's files go, and your own stay."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "notes.txt").write_text("mine")
    before = contents(run)
    assert toy(*SILENT, "--out", "run") == 2
    assert contents(run) == before

    assert toy(*SILENT, "--out", "run", "--overwrite", "--seed", "1") == 0
    assert read_metrics(run)["seed"] == 1
    kept = {path.name for path in run.iterdir()}
    assert kept == {"config.json", "teacher.pt", "student.pt", "metrics.json", "log.csv", "notes.txt"}


@pytest.mark.parametrize("write, content", [(toy_2d.write_text, "new"), (toy_2d.write_csv, [{"new": 1}])])
def test_a_file_is_replaced_whole_or_not_at_all(write, content, tmp_path, monkeypatch):
    """The old file is untouched until the new one, complete, takes its name."""
    path = tmp_path / "file"
    path.write_text("old")

    def fail(source, target):
        assert "new" in Path(source).read_text() and Path(target) == path
        raise OSError

    monkeypatch.setattr(toy_2d.os, "replace", fail)
    with pytest.raises(OSError):
        write(path, content)
    assert path.read_text() == "old"


# ═══ toy_2d.py 7: a run ═════════════════════════════════════════════════════════════════════


def test_the_same_command_gives_the_same_numbers(finished, tmp_path):
    """To the last bit on one machine, whatever was drawn before; another seed gives others."""
    torch.manual_seed(123)
    before = read_metrics(finished)
    assert toy(*SILENT, "--out", tmp_path / "same") == 0
    after = read_metrics(tmp_path / "same")
    for key in ("rows", "floor", "path_error"):
        assert after[key] == before[key]
    assert (tmp_path / "same/log.csv").read_bytes() == (finished / "log.csv").read_bytes()

    assert toy(*SILENT, "--out", tmp_path / "other", "--seed", 1) == 0
    other = read_metrics(tmp_path / "other")["rows"]
    assert all(a["energy"] != b["energy"] for a, b in zip(other, before["rows"]))


def test_the_rows_of_a_run_are_complete_and_finite(finished):
    """Every solver at every number of evaluations, with all measures it has; the floor is at the run's own size."""
    metrics = read_metrics(finished)
    expected = [("teacher", "euler", steps) for steps in (1, 2, 4, 8, 50)]
    expected += [("student", solver, steps) for solver in ("euler", "renoise") for steps in (1, 2, 4, 8)]
    assert [(row["who"], row["solver"], row["steps"]) for row in metrics["rows"]] == expected
    for row in metrics["rows"]:
        names = {"energy", "sliced_w2", "coverage", "precision"}
        if row["solver"] == "euler":
            names.update(("gap", "map_error"))  # they compare pairs, and re-noising leaves none
        values = {name: value for name, value in row.items() if name not in ("who", "solver", "steps")}
        assert values.keys() == names | {"nfe"}
        assert all(math.isfinite(value) for value in values.values())
    assert metrics["floor"] == toy_2d.floor_of("8gaussians", 200)
    assert metrics["path_error"] > 0 and metrics["samples"] == 200


def test_the_consistency_gap_and_renoising_start_from_the_one_step_sample(finished):
    """In one step the gap is 0 and both solvers agree; in more steps neither is so."""
    rows = {}
    for row in read_metrics(finished)["rows"]:
        rows[row["who"], row["solver"], row["steps"]] = row
    for steps in (1, 2, 4, 8):
        euler = rows["student", "euler", steps]
        renoise = rows["student", "renoise", steps]
        assert (euler["gap"] == 0) == (steps == 1)
        assert (euler["energy"] == renoise["energy"]) == (steps == 1)


def test_the_table_shows_the_numbers_of_the_rows(finished):
    """The student's energy distances ×10³ stand in their line, in the order of the evaluations."""
    metrics = read_metrics(finished)
    expected = ["student,", "Euler"]
    for row in metrics["rows"]:
        if row["who"] == "student" and row["solver"] == "euler":
            expected.append(f"{1000 * row['energy']:.3f}")
    lines = [line.split() for line in toy_2d.table(metrics).splitlines()]
    assert expected in lines


def test_the_average_is_saved_and_not_the_target(finished):
    """Distilled once more without anybody watching, average and target are bitwise those of the file."""
    saved = scflow.read(finished / "student.pt")
    run, _, schedule = toy_2d.configure(SILENT)
    teacher = scflow.load(finished / "teacher.pt")
    torch.manual_seed(123)  # what was drawn before does not matter
    state = toy_2d.fit_student(run, toy_2d.dataset(run.dataset), teacher, schedule)
    assert same(dict(state.ema.state_dict()), dict(saved["weights"]))
    assert same(dict(state.target.state_dict()), dict(saved["target"]))
    assert not same(dict(saved["weights"]), dict(saved["target"]))


def test_the_saved_student_has_the_reported_measures(finished):
    """The weights file alone gives a network whose samples score what metrics.json says, to the last bit.

    With another seed the noise is another one, and so are all measures.
    """
    data = toy_2d.eight_gaussians()
    student = scflow.load(finished / "student.pt")
    reported = [row for row in read_metrics(finished)["rows"] if row["who"] == "student"]
    for seed in (0, 1):
        run, _, _ = toy_2d.configure([*SILENT, "--seed", str(seed)])
        rows = toy_2d.evaluate(run, data, "student", student)
        assert (rows == reported) == (seed == 0)


def test_the_measures_of_a_point_mass_by_hand():
    """A network that lands every point at the origin, where the data are nearly a circle of radius 2 (to 10%).

    Its energy distance is 2·2 − 8/π, for two points of the circle are 8/π apart on average. Its sliced distance
    is the RMS of a coordinate, √2, and the exact map is 2 away.
    """
    run = toy_2d.Run(samples=400, nfe=(1,))

    def to_origin(x, t, cond=None):
        return x / t[:, None]

    row, *_ = toy_2d.evaluate(run, toy_2d.eight_gaussians(), "student", to_origin)
    assert abs(row["energy"] / (4 - 8 / math.pi) - 1) < 0.1
    assert abs(row["sliced_w2"] / math.sqrt(2) - 1) < 0.1
    assert abs(row["map_error"] / 2 - 1) < 0.1
    assert row["precision"] == 0 and row["coverage"] == 0


def test_the_exact_teacher_is_exact(tmp_path):
    """--teacher exact: the 50 Euler steps alone are in its flow-map error, below 0.1; the short fit would have 1."""
    assert toy(*SILENT, "--teacher", "exact", "--out", tmp_path / "run") == 0
    rows = read_metrics(tmp_path / "run")["rows"]
    (error,) = [row["map_error"] for row in rows if row["who"] == "teacher" and row["steps"] == 50]
    assert error < 0.1


def test_a_student_of_the_exact_teacher_follows_the_exact_velocity(finished):
    """The walk is along v*; the fitted network is only where the student starts."""
    run, _, schedule = toy_2d.configure([*SILENT, "--teacher", "exact"])
    data = toy_2d.dataset(run.dataset)
    state = toy_2d.fit_student(run, data, scflow.load(finished / "teacher.pt"), schedule)
    _, x1, t, xt = on_paths(50)
    assert torch.equal(state.teacher(xt, t), data(xt, t))


def test_your_own_points_run_from_start_to_finish(tmp_path, monkeypatch):
    """A file of points far from the origin is learned, measured and drawn, without measures that need a mixture."""
    monkeypatch.chdir(tmp_path)
    save_points("mine.npy", np.random.default_rng(0).normal(100, 30, (500, 2)))
    assert toy(*SHORT, "--dataset", "mine.npy", "--figures", "all", "--quiet") == 0
    folder = Path("runs/mine")
    for row in read_metrics(folder)["rows"]:
        assert math.isfinite(row["energy"])
        assert "precision" not in row and "map_error" not in row
    assert len(list(folder.glob("*.png"))) == 6


def test_the_path_error_is_zero_for_the_exact_map():
    """Of the velocity that lands on f* it is 0 (1e-4: the solver); v* itself lands on the posterior mean."""
    mixture = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.2)

    def exact_map(x, t, cond=None):
        return (x - mixture.flow_map(x, t, 100)) / t[:, None]

    assert toy_2d.path_error(exact_map, mixture, 0) < 1e-4
    assert 0.2 < toy_2d.path_error(mixture, mixture, 0) < 1


@pytest.mark.parametrize("flag, loss", [("--teacher-lr", "flow"), ("--student-lr", "consistency|bi|self|adv")])
def test_a_run_whose_loss_is_not_finite_ends_in_one_line(flag, loss, tmp_path, capsys):
    """A rate that explodes: exit code 2, one line with the loss and the step, and no metrics of a failed run."""
    run = tmp_path / "run"
    assert toy(*SILENT, flag, "1e30", "--out", run) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"toy_2d.py: error: the ({loss}) loss became (nan|inf) at step \d+\n", error)
    assert not (run / "metrics.json").exists() and not (run / "student.pt").exists()


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    """In the middle of the training: exit code 130, one line, and a folder that plot refuses."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scflow, "flow_matching_loss", interrupt)
    assert toy(*SILENT, "--out", tmp_path / "run") == 130
    assert capsys.readouterr().err == "toy_2d.py: stopped\n"
    assert toy("plot", "--out", tmp_path / "run") == 2
    assert "no finished run" in capsys.readouterr().err


def test_the_log_holds_losses_and_gradient_norms(finished):
    """Every tenth update of both stages has its losses; norms are there for every loss with a weight."""
    with open(finished / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["teacher", "teacher", "student"]
    assert [row["step"] for row in rows] == ["1", "11", "1"]
    assert all(float(row["flow"]) > 0 for row in rows[:2])
    first_phase = scflow.SCHEDULES["two_phase"][0]
    for name, weight in first_phase.weights(0).items():
        if weight > 0:
            assert math.isfinite(float(rows[2][name])) and float(rows[2][f"norm_{name}"]) > 0


def test_a_logged_norm_is_that_of_the_weighted_loss(finished):
    """‖∇λL‖ over all parameters, loss by loss, also of one that is still warming up (1e-4: float32).

    The window is so small that the neighbours' random times do not matter.
    """
    weights = {"lambda_consistency": 0.9, "lambda_adv": 0.3, "lambda_self": 0.7, "lambda_bi": 0.5}
    schedule = (Phase(steps=3, warmup=2, delta=1e-6, **weights),)
    run = toy_2d.Run(width=16, depth=2, quiet=True)
    data = toy_2d.dataset(run.dataset)
    state = toy_2d.fit_student(run, data, scflow.load(finished / "teacher.pt"), schedule)
    journal = toy_2d.Journal(data)
    norms = journal.gradient_norms(state)
    assert len(norms) == 4
    assert journal.gradient_norms(state) == norms  # always of the same draw

    for name in ("consistency", "adv", "self", "bi"):
        student = state.student
        student.zero_grad()
        everything = state.phase.weights(2)
        losses, _ = scflow.distill_losses(state, journal.x0, journal.x1, journal.t, state.phase, everything)
        losses[name].backward()
        grads = torch.cat([p.grad.flatten() for p in student.parameters()])
        expected = weights[f"lambda_{name}"] * grads.norm()
        assert abs(norms[f"norm_{name}"] / expected - 1) < 1e-4


# ═══ toy_2d.py 8: figures ═══════════════════════════════════════════════════════════════════


PANELS = {
    "1_hero": (2, 4),
    "2_steps": (1, 1),
    "3_paths": (1, 3),
    "4_field": (2, 4),
    "5_losses": (1, 1),  # a run this short has hardly a curve
    "6_critic": (1, 4),
}


@pytest.mark.parametrize("name", PANELS)
def test_a_figure_is_drawn_and_not_empty(name, finished):
    """Something stands in the middle of every panel, away from its frame and words; less than 300 KB."""
    file = finished / f"{name}.png"
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("L"))
    rows, columns = PANELS[name]
    for row in np.array_split(pixels, rows, axis=0):
        for panel in np.array_split(row, columns, axis=1):
            h, w = panel.shape
            assert panel[h // 4 : -h // 4, w // 4 : -w // 4].std() > 5
    assert file.stat().st_size < 300_000


def test_the_gif_moves_and_its_windows_stand_still(finished):
    """A frame for each of the eight updates, in less than 2 MB. Points move; the lines around them do not."""
    file = finished / "distillation.gif"
    assert file.stat().st_size < 2_000_000
    pictures = []
    with Image.open(file) as image:
        for i in range(image.n_frames):
            image.seek(i)
            pictures.append(np.asarray(image.convert("L")).astype(float))
    assert len(pictures) >= 8

    lines = [(picture < 240).mean(0) > 0.7 for picture in pictures]  # columns of pixels that are drawn all along
    assert lines[0].sum() >= 6
    assert all(np.array_equal(one, lines[0]) for one in lines)
    below_title = slice(60, None)
    assert np.abs(pictures[-1] - pictures[0])[below_title].mean() > 0.3


def test_plot_draws_the_same_figure_again(finished):
    """From the folder's files alone, to the last byte."""
    hero = finished / "1_hero.png"
    before = hero.read_bytes()
    hero.unlink()
    assert toy("plot", "--out", finished) == 0
    assert hero.read_bytes() == before


OLD_CONFIG = b'{"dataset": "8gaussians", "teacher": "learned", "schedule": [{"at_one": 0.5}]}'
DAMAGES = {
    "metrics.json": [None, b"{", b"[]", b"{}"],
    "config.json": [None, b"no json", b"{}", OLD_CONFIG],
    "student.pt": [None, b"no weights"],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_plot_refuses_an_unfinished_or_damaged_run(name, finished, tmp_path, capsys):
    """A file is missing, or is not what it should be: one line that names the file, and nothing is drawn."""
    for damage in DAMAGES[name]:
        run = tmp_path / "run"
        run.mkdir()
        for other in DAMAGES:
            shutil.copy(finished / other, run)
        shutil.copy(finished / "teacher.pt", run)
        (run / name).unlink()
        if damage is not None:
            (run / name).write_bytes(damage)
        assert toy("plot", "--out", run) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1
        assert not list(run.glob("*.png"))
        shutil.rmtree(run)


def test_plot_refuses_a_student_of_another_program(finished, tmp_path, capsys):
    """A weights file without the past that the figures show."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(finished / "teacher.pt", tmp_path / "run/student.pt")
    assert toy("plot", "--out", tmp_path / "run") == 2
    assert "student.pt" in capsys.readouterr().err
