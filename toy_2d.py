"""Self-corrected flow distillation in two dimensions: data, exact truth, one run, its table and figures.

    python toy_2d.py                                   eight Gaussians: teacher, student, table, figures
    python toy_2d.py --dataset checkerboard --seed 3
    python toy_2d.py --preset paper --lambda-self 2    the paper's joint losses, one weight changed
    python toy_2d.py plot --out runs/8gaussians --figures all --gif

A run folder holds config.json, teacher.pt, student.pt, metrics.json, log.csv and figures.
"""

import argparse
import csv
import inspect
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

import scflow
from scflow import Phase, TeacherSettings, require

# ═══ 1. Exact truth: the Gaussian mixture ═════════════════════════════════════════════════


class GaussianMixture(nn.Module):
    """Σ_k w_k N(μ_k, s²I) in d dimensions, with its exact density and velocity at every t.

    It is called like a network, `mixture(x, t)`, and so can be a teacher.

    labels  (K,), from 1 on, a label for each component. Then cond (B,1) names a label, whose
            components alone are meant; 0 and None mean all of them.
    """

    def __init__(self, means, std: float, weights=None, labels=None):
        super().__init__()
        require(std > 0, f"the std of a mixture must be positive, not {std}")
        means = torch.as_tensor(means, dtype=torch.get_default_dtype())  # (K,d)
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        fit = weights.shape == (len(means),) and weights.min() >= 0 and weights.sum() > 0
        require(fit, f"a mixture of {len(means)} components needs as many weights, none negative, not {weights}")
        self.register_buffer("means", means)
        self.register_buffer("weights", (weights / weights.sum()).to(means))  # (K,)
        self.register_buffer("labels", None if labels is None else torch.as_tensor(labels))  # (K,)
        self.std = float(std)
        self.label_count = 0 if labels is None else int(self.labels.max())

    def sample(self, n: int, generator: Generator | None = None, stratified: bool = False) -> tuple[Tensor, Tensor]:
        """Draw x₀ (n,d) and the component (n,) of each. Stratified: every component its exact share."""
        if stratified:
            where = (torch.arange(n, device=self.means.device) + 0.5) / n
            k = torch.searchsorted(self.weights.cumsum(0), where)
            k = k.clamp(max=len(self.weights) - 1)
        else:
            k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        x0 = self.means[k]
        return x0 + self.std * scflow.randn_like(x0, generator), k

    def log_joint(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """log w_k N(x; (1−t)μ_k, σ_t²I), shape (B,K), with σ_t² = (1−t)²s² + t²; −∞ for other labels."""
        var = ((1 - t) * self.std) ** 2 + t**2  # (B,)
        means = (1 - t)[:, None, None] * self.means  # (B,K,d)
        square = (x[:, None] - means).square().sum(-1)  # (B,K)
        log_normal = -square / (2 * var[:, None]) - x.shape[1] / 2 * (2 * math.pi * var[:, None]).log()
        joint = self.weights.log() + log_normal
        if cond is None:
            return joint
        require(self.labels is not None, "this mixture has no labels: call it with cond=None")
        scflow.check_tokens(cond, (len(x), 1), self.label_count)
        return joint.where((cond == 0) | (cond == self.labels), -math.inf)

    def log_density(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """log p_t(x), shape (B,). With a label: log p_t(x|c) but for a constant, its share of the weights."""
        return self.log_joint(x, t, cond).logsumexp(1)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The marginal velocity v*(x,t) = E[x₁ − x₀ | x_t = x], shape (B,d).

        With the posterior weights γ_k of the components and their mean μ̄ = Σ γ_k μ_k, the sum
        Σ γ_k [−μ_k + (t − (1−t)s²)/σ_t² · (x − (1−t)μ_k)] becomes the line returned.
        """
        gamma = self.log_joint(x, t, cond).softmax(1)  # (B,K)
        mean = gamma @ self.means  # (B,d)
        t = t[:, None]
        var = ((1 - t) * self.std) ** 2 + t**2
        return ((t - (1 - t) * self.std**2) * x - t * mean) / var

    def flow_map(self, x: Tensor, t: Tensor, steps: int = 200, cond: Tensor | None = None) -> Tensor:
        """f*(x,t): follow v* from (x,t) down to t = 0 with a fine Heun solver, (B,d)."""
        return scflow.sample(self, x, steps, "heun", cond, start=t)


# ═══ 2. Data sets ═════════════════════════════════════════════════════════════════════════
# A data set has `sample(n, generator, stratified=False) → (x0 (n,2), part (n,))`. A part is drawn
# from independently of the others. A stratified sample has of each part exactly its share.


class Parts:
    """Data of `count` equally likely parts; `draw(part, generator)` makes a point of each part, (n,) → (n,2)."""

    def __init__(self, count: int, draw):
        self.count = count
        self.draw = draw

    def sample(self, n: int, generator: Generator | None = None, stratified: bool = False) -> tuple[Tensor, Tensor]:
        """x₀ (n,2) and its part (n,), on the generator's device."""
        device = generator.device if generator else "cpu"
        if stratified:
            part = torch.arange(n, device=device) * self.count // n
        else:
            part = torch.randint(self.count, (n,), generator=generator, device=device)
        return self.draw(part, generator), part


class Points:
    """Your own points (N,2), centred and scaled to RMS radius 2. A fifth is held out as the reference."""

    def __init__(self, path):
        points = read_points(path).astype(np.float64)
        points = points / max(np.abs(points).max(), 1e-300)  # so that no square overflows
        points = points - points.mean(0)
        radius = np.sqrt((points**2).sum(1).mean())
        require(radius > 1e-12, f"{path} holds one point only, repeated")
        points = torch.as_tensor(2 * points / radius, dtype=torch.float32)
        points = points[torch.randperm(len(points), generator=Generator().manual_seed(0))]
        fifth = len(points) // 5
        self.held_out = points[:fifth]
        self.train = points[fifth:]

    def sample(self, n: int, generator: Generator | None = None, stratified: bool = False) -> tuple[Tensor, Tensor]:
        """Training points, drawn with replacement. Stratified: the held-out points, at most n of them."""
        device = generator.device if generator else "cpu"
        if stratified:
            x0 = self.held_out[:n].to(device)
        else:
            rows = torch.randint(len(self.train), (n,), generator=generator, device=device)
            x0 = self.train.to(device)[rows]
        return x0, torch.zeros(len(x0), dtype=torch.int64, device=device)


def read_points(path: str) -> np.ndarray:
    """The array (N,2) in a .npy file. Raises ValueError if it is none."""
    with scflow.reading(path, ".npy file of points, as numpy.save writes one array"):
        points = np.load(path, allow_pickle=False)
        shaped = points.ndim == 2 and points.shape[1] == 2 and len(points) >= 100
        found = f"{points.dtype} of shape {points.shape}"
        require(shaped and points.dtype.kind in "iuf", f"{path} must hold real numbers (N,2), N ≥ 100, not {found}")
        require(np.isfinite(points).all(), f"{path} holds values that are not finite")
    return points


def uniform(part: Tensor, generator: Generator) -> Tensor:
    """Uniform [0,1) numbers, one for each element of `part` (n,)."""
    return torch.rand(part.shape, generator=generator, device=part.device)


def normal(part: Tensor, generator: Generator) -> Tensor:
    """Standard normal points (n,2), one for each element of `part` (n,)."""
    return torch.randn(len(part), 2, generator=generator, device=part.device)


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    """(n,) and (n,) → (n,2)."""
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def eight_gaussians() -> GaussianMixture:
    """Eight Gaussians on a circle of radius 2."""
    angle = torch.arange(8) * math.pi / 4
    return GaussianMixture(polar(torch.full((8,), 2.0), angle), 0.15)


def grid_of_gaussians() -> GaussianMixture:
    """25 Gaussians on a grid of spacing 1."""
    side = torch.arange(-2.0, 3)
    return GaussianMixture(torch.cartesian_prod(side, side), 0.1)


def checkerboard(part: Tensor, generator: Generator) -> Tensor:
    """The eight black squares of a 4×4 board on [−2,2]²."""
    row = part // 2
    column = 2 * (part % 2) + row % 2
    corner = torch.stack([row, column], 1)
    inside = torch.stack([uniform(part, generator), uniform(part, generator)], 1)
    return corner + inside - 2


def moons(part: Tensor, generator: Generator) -> Tensor:
    """Two interleaved half circles, blurred by 0.14."""
    angle = math.pi * uniform(part, generator)
    x = polar(1 - 2 * part, angle)
    shift = torch.tensor([1.0, 0.5], device=part.device)
    x = x + part[:, None] * shift - shift / 2
    return 1.7 * (x + 0.08 * normal(part, generator))


def spirals(part: Tensor, generator: Generator) -> Tensor:
    """Two arms of one and a half turns, blurred by 0.06."""
    u = uniform(part, generator).sqrt()
    return polar(2.4 * u * (1 - 2 * part), 3 * math.pi * u) + 0.06 * normal(part, generator)


def pinwheel(part: Tensor, generator: Generator) -> Tensor:
    """Five bent blades."""
    x = normal(part, generator) * torch.tensor([0.3, 0.1], device=part.device)
    along = 1 + x[:, 0]
    across = x[:, 1]
    angle = 2 * math.pi / 5 * part + 0.25 * along.exp()
    return 1.8 * (polar(along, angle) + polar(across, angle + math.pi / 2))


def rings(part: Tensor, generator: Generator) -> Tensor:
    """Three concentric circles of equal mass, blurred by 0.08."""
    angle = 2 * math.pi * uniform(part, generator)
    return polar(0.8 * (1.0 + part), angle) + 0.08 * normal(part, generator)


DATASETS = {
    "8gaussians": eight_gaussians,
    "25gaussians": grid_of_gaussians,
    "checkerboard": lambda: Parts(8, checkerboard),
    "moons": lambda: Parts(2, moons),
    "spirals": lambda: Parts(2, spirals),
    "pinwheel": lambda: Parts(5, pinwheel),
    "rings": lambda: Parts(3, rings),
}


Data = GaussianMixture | Parts | Points  # what `dataset` returns


def dataset(name: str) -> Data:
    """A data set by its name, or from a .npy file of points."""
    if name.endswith(".npy"):
        return Points(name)
    require(name in DATASETS, f"unknown data set {name!r}: choose {', '.join(DATASETS)}, or a .npy file of points")
    return DATASETS[name]()


def batches(data: Data) -> scflow.Batch:
    """`batch(n, generator) → (x0, None)` of a data set, as the training loops want it."""

    def batch(n, generator):
        x0, _ = data.sample(n, generator)
        return x0, None

    return batch


# ═══ 3. Measures ══════════════════════════════════════════════════════════════════════════


def total_distance(x: Tensor) -> float:
    """Σ ‖x_i − x_j‖ over the pairs i < j of points (N,d).

    In the plane a length is π/2 times the mean length of its projections on lines. Of numbers in
    order the sum over pairs is Σ (2k−N+1)·x_k: a sort instead of N² distances. The mean is over 31
    lines, a prime number, so that no symmetry of the data can be one of theirs. This makes a length
    within 10⁻³ of the true one.
    """
    if x.shape[1] != 2:
        parts = x.split(1000)
        twice = sum(torch.cdist(a, b).double().sum() for a in parts for b in parts)
        return twice.item() / 2
    angles = math.pi / 31 * torch.arange(31, device=x.device)
    lines = torch.stack([angles.cos(), angles.sin()], 1).to(x)  # (31,2)
    ordered = np.sort((lines @ x.T).cpu().numpy()).astype(np.float64)  # (31,N); torch sorts far slower
    sums = ordered @ (2.0 * np.arange(len(x)) - len(x) + 1)  # (31,)
    return math.pi / 2 * sums.mean().item()


class EnergyDistance:
    """2E‖X−Y‖ − E‖X−X′‖ − E‖Y−Y′‖ to a fixed reference Y (M,d): zero for equal distributions.

    It is unbiased, and so may be negative.

    strata  (M,), the stratum of each reference row, if it was drawn stratified. Within a stratum
            rows are independent, and a row is no partner of itself; across strata all pairs count.
    """

    def __init__(self, reference: Tensor, strata: Tensor | None = None):
        if strata is None:
            strata = torch.zeros(len(reference))
        self.reference = reference
        self.total = total_distance(reference)
        within = 0.0
        for k in strata.unique():
            part = reference[strata == k]
            require(len(part) > 1, "every stratum of the reference needs at least two rows")
            within += total_distance(part) / (len(part) - 1)
        self.self_term = 2 / len(reference) ** 2 * (self.total + within)

    def __call__(self, x: Tensor) -> float:
        """The distance of independent samples (N,d)."""
        n = len(x)
        m = len(self.reference)
        within = total_distance(x)
        between = total_distance(torch.cat([x, self.reference])) - within - self.total
        return 2 * between / (n * m) - 2 * within / (n * (n - 1)) - self.self_term


def noise_floor(measure: Callable, draw: Callable, repeats: int = 20) -> tuple[float, float]:
    """Mean and standard deviation of a measure over `repeats` independent true samples `draw()`."""
    values = torch.tensor([measure(draw()) for _ in range(repeats)], dtype=torch.float64)
    return values.mean().item(), values.std().item()


def rms_distance(a: Tensor, b: Tensor) -> float:
    """√E‖a−b‖² over paired rows (N,…).

    Between one-step and N-step samples of the same noise it is the consistency gap; between samples
    and `GaussianMixture.flow_map` of their noise, the flow-map error.
    """
    return (a - b).flatten(1).square().sum(1).mean().sqrt().item()


def coverage_and_precision(x: Tensor, mixture: GaussianMixture) -> tuple[float, float]:
    """How a sample (N,d) sits on the modes of a mixture: two shares, at best 1 and (in 2-D) 0.989.

    Coverage: 1 − TV between the modes' weights and the sample's share of each.
    Precision: the share of the sample within 3σ of a mode.
    """
    nearest, k = torch.cdist(x, mixture.means).min(1)
    k = k[nearest < 3 * mixture.std]
    share = torch.bincount(k, minlength=len(mixture.means)) / max(len(k), 1)
    return torch.minimum(share, mixture.weights).sum().item(), len(k) / len(x)


def sliced_w2(x: Tensor, y: Tensor, projections: int = 200, generator: Generator | None = None) -> float:
    """√ of the mean squared 2-Wasserstein distance between 1-D projections of two samples (N,d)."""
    require(len(x) == len(y), f"sliced W2 compares samples of equal size, not {len(x)} and {len(y)}")
    directions = torch.randn(x.shape[1], projections, generator=generator).to(x)
    directions = F.normalize(directions, dim=0)
    a = np.sort((directions.T @ x.T).cpu().numpy())  # (projections,N); torch sorts far slower
    b = np.sort((directions.T @ y.T).cpu().numpy())
    return float(np.sqrt(np.square(a - b).mean()))


@lru_cache
def reference(name: str, n: int) -> EnergyDistance:
    """The energy distance to the fixed, stratified reference sample of a data set."""
    x0, strata = dataset(name).sample(n, Generator().manual_seed(10**6), stratified=True)
    return EnergyDistance(x0, strata)


@lru_cache
def floor_of(name: str, n: int) -> dict[str, float]:
    """Mean and sd of the energy distance of 20 true samples of n points to that reference."""
    data = dataset(name)
    generator = Generator().manual_seed(10**6 + 1)
    mean, sd = noise_floor(reference(name, n), lambda: data.sample(n, generator)[0])
    return {"mean": mean, "sd": sd}


# ═══ 4. Settings and flags ════════════════════════════════════════════════════════════════
# Both scripts and all experiments read their flags with `cli`: a field is a flag, the comment behind it its help.


@dataclass(frozen=True)
class Run:
    """What is run, and where it goes."""

    dataset: str = "8gaussians"  # data set by name, or a .npy file of (N,2) points
    seed: int = 0  # seed of the weights, the data and the evaluation noise
    preset: Literal["two_phase", "paper", "consistency"] = "two_phase"  # schedule of the losses
    teacher: Literal["learned", "exact"] = "learned"  # a learned teacher, or a mixture's closed-form velocity
    width: int = 128  # hidden units of a layer of the networks (the critic has half as many)
    depth: int = 3  # hidden layers of the networks
    samples: int = 6000  # points that are sampled and compared in the evaluation
    nfe: tuple = (1, 2, 4, 8)  # numbers of network evaluations to measure (the teacher also 50)
    device: str = "cpu"  # cpu, cuda or mps (the matrices are tiny: a CPU is rarely slower)
    out: str = ""  # run folder; without it runs/DATASET, then runs/DATASET-2 and so on
    overwrite: bool = False  # start afresh in a run folder that exists
    figures: Literal["none", "basic", "all"] = "basic"  # figures to draw
    gif: bool = False  # also draw a moving picture of the distillation
    quiet: bool = False  # no progress bars and no table

    def __post_init__(self):
        scflow.check_choices(self)
        for name, least in {"width": 1, "depth": 1, "samples": 50}.items():
            value = getattr(self, name)
            require(value >= least, f"{name} must be at least {least}, not {value}")
        require(0 <= self.seed < 2**32, f"seed must lie between 0 and 2³² − 1, not {self.seed}")
        require(all(n > 0 for n in self.nfe), f"nfe are positive whole numbers, not {self.nfe}")
        check_device(self.device)


def check_device(name: str) -> None:
    """Raise ValueError if there is no such device here."""
    try:
        Generator(name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"no device {name!r} here: use --device cpu") from None


@lru_cache
def help_texts(settings) -> dict[str, str]:
    """{field: the comment behind it} of a settings class, those of its parents included."""
    texts = {}
    for cls in reversed(settings.__mro__[:-1]):
        for line in inspect.getsource(cls).splitlines():
            found = re.fullmatch(r"    (\w+): .*?  # (.*)", line)
            if found:
                texts[found[1]] = found[2]
    return texts


def flag_name(cls, name: str) -> str:
    """The flag of a field: its own name, but --student-steps, --student-batch and --student-lr."""
    if cls is Phase and name in ("steps", "batch", "lr"):
        name = f"student_{name}"
    return "--" + name.replace("_", "-")


def cli(argv: list[str], description: str, *defaults) -> list[dict]:
    """Turn settings into flags; returns one {field: given value} for each.

    defaults  instances of settings classes, whose values --help shows; for a schedule a tuple of Phases.
              A field of a schedule takes one value, or one for each phase.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message} (--help lists the options)")  # `main` reports in one line
    classes = []
    for default in defaults:
        phases = default if isinstance(default, tuple) else (default,)
        cls = type(phases[0])
        classes.append(cls)
        group = parser.add_argument_group(cls.__name__, cls.__doc__)
        texts = help_texts(cls)
        for f in fields(cls):
            values = [getattr(phase, f.name) for phase in phases]
            add_flag(group, cls, f, values, texts[f.name])
    given = vars(parser.parse_args(argv))
    found = []
    for cls in classes:
        prefix = f"{cls.__name__}."
        found.append({key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)})
    return found


def add_flag(group, cls, f, values: list, text: str) -> None:
    """Add the flag of one field, whose default is one value, or one for each phase."""
    first = values[0]
    several = cls is Phase or isinstance(first, tuple)
    shown = list(first) if isinstance(first, tuple) else values
    if len(set(shown)) == 1:
        shown = shown[:1]
    shown = " ".join(str(value) for value in shown)
    if shown and not isinstance(first, bool):
        text = f"{text} [{shown}]"
    how = {"dest": f"{cls.__name__}.{f.name}", "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    flag = flag_name(cls, f.name)
    if isinstance(first, bool):
        group.add_argument(flag, action="store_true", **how)
        return
    choices = get_args(f.type) if get_origin(f.type) is Literal else None
    kind = type(first[0] if isinstance(first, tuple) else first)
    if kind is int:
        kind = whole_number
    metavar = "|".join(choices) if choices else f.name.upper()
    group.add_argument(flag, type=kind, choices=choices, metavar=metavar, nargs="+" if several else None, **how)


def whole_number(text: str) -> int:
    """An int of a size that can be computed with."""
    number = int(text)
    if abs(number) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is too large: 2³² − 1 is the most")
    return number


def revise(schedule: tuple[Phase, ...], changes: dict[str, list]) -> tuple[Phase, ...]:
    """A schedule with fields changed, {name: [one value, or one for each phase]}.

    One number of steps is the whole length, shared out as before. Raises ValueError for a contradiction.
    """
    changes = dict(changes)
    if len(changes.get("steps", [])) == 1:
        lasting = [replace(phase, warmup=0) for phase in schedule]  # a warm-up may change as well
        rescaled = scflow.rescale(tuple(lasting), changes["steps"][0])
        changes["steps"] = [phase.steps for phase in rescaled]
    revised = []
    for i, phase in enumerate(schedule):
        change = {}
        for name, values in changes.items():
            fits = len(values) in (1, len(schedule))
            require(fits, f"{name} takes one value, or one for each of {len(schedule)} phases, not {len(values)}")
            change[name] = values[i % len(values)]
        revised.append(replace(phase, **change))
    scflow.check_schedule(revised)
    return tuple(revised)


def configure(argv: list[str], description: str = "") -> tuple[Run, TeacherSettings, tuple[Phase, ...]]:
    """Command-line arguments as settings. Raises ValueError where they contradict each other."""
    shown = scflow.SCHEDULES[Run.preset]
    given, teacher, changes = cli(argv, description, Run(), TeacherSettings(), shown)
    run = Run(**given)
    if run.teacher == "exact":  # it has no weights to start a student from: a short fit to it has
        teacher = {"teacher_steps": 1000, **teacher}
    schedule = revise(scflow.SCHEDULES[run.preset], changes)
    return run, TeacherSettings(**teacher), schedule


# ═══ 5. Files ═════════════════════════════════════════════════════════════════════════════


def write_text(path: Path | str, text: str) -> None:
    """Replace a text file atomically."""
    with scflow.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path | str, rows: list[dict]) -> None:
    """A CSV file of dictionaries, with a column for every key in the order of appearance."""
    names = {}  # a dictionary keeps the order
    for row in rows:
        names.update(row)
    with scflow.replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path | str, *keys: str) -> dict:
    """The dictionary in a JSON file. Raises ValueError if it is damaged or lacks one of the keys."""
    with scflow.reading(path, "JSON file of this program"):
        content = dict(json.loads(Path(path).read_text(encoding="utf-8")))
        for key in keys:
            require(key in content, f"{path} holds no {key!r}: it is of another version, or damaged")
    return content


@contextmanager
def open_folder(out: str, name: str, overwrite: bool, kind: str) -> Iterator[Path]:
    """The folder of a new run: `out`, or without it runs/NAME, runs/NAME-2 and so on.

    It is made here, or with `overwrite` it may be there; nothing in it is changed yet. If the block fails
    before anything is written, the folder goes. Raises ValueError if it is not free, or holds no `kind`.
    """
    try:
        folder = new_folder(out, name)
    except FileExistsError:
        folder = Path(out)
        require_room(folder, overwrite, kind)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # the system does this to empty folders only
        raise


def new_folder(out: str, name: str) -> Path:
    """Make a folder that nobody else has made. Raises FileExistsError if `out` is there."""
    folder = Path(out or f"runs/{name}")
    number = 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if out:
                raise
            number += 1
            folder = Path(f"runs/{name}-{number}")
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from None


def require_room(folder: Path, overwrite: bool, kind: str) -> None:
    """Raise ValueError if there is a folder, unless it may be overwritten and is empty or holds a `kind`."""
    require(overwrite or not folder.exists(), f"{folder} exists: give --overwrite to start afresh in it")
    if folder.exists() and not is_empty(folder):
        read_config(folder, kind)


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a killed program left."""
    return folder.is_dir() and all(file.name.startswith(scflow.UNFINISHED) for file in folder.iterdir())


def read_config(folder: Path, kind: str, *keys: str) -> dict:
    """The config.json of a folder. Raises ValueError unless it says that this is a `kind`, and has the keys."""
    file = Path(folder, "config.json")
    require(file.is_file(), f"{folder} is no {kind}: it holds no config.json")
    found = read_json(file).get("kind")
    require(found == kind, f"{folder} is no {kind}: its config.json says {found!r}")
    return read_json(file, *keys)


def clear_folder(folder: Path, names: tuple[str, ...]) -> None:
    """Delete the files of a run in this order, and what a killed program left. All other files are left alone."""
    for name in names:
        require(not (folder / name).is_dir(), f"{folder / name} is a folder: nothing in {folder} is deleted")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for old in folder.glob(f"{scflow.UNFINISHED}*"):
        shutil.rmtree(old, ignore_errors=True)


def machine() -> str:
    """What the numbers were computed on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()} CPU, {plural(torch.get_num_threads(), 'thread')}{gpu}, torch {torch.__version__}"


def plural(n: int, word: str) -> str:
    """1 step, 2 steps."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


# ═══ 6. A run: teacher, student, measures ═════════════════════════════════════════════════


def progress(loop: Iterator, total: int, name: str, quiet: bool = False, done: int = 0) -> Iterator:
    """Pass on the states of a training loop, with a progress bar that shows the losses; `done` updates are made."""
    with tqdm(total=total, initial=done, desc=name, disable=quiet, mininterval=0.2) as bar:
        for state in loop:
            yield state
            bar.update()
            if state.step % 20 == 1:
                losses = {key: f"{value:.3f}" for key, value in state.losses.items()}
                bar.set_postfix(losses, refresh=False)


class Journal:
    """What the figures need of a run's past: losses, samples and the critic's landscape."""

    def __init__(self):
        side = torch.linspace(-LIMIT, LIMIT, 48)
        self.rows = []  # losses of every tenth update
        self.frames = []  # samples and critic at some forty moments
        self.noise = torch.randn(600, 2, generator=Generator().manual_seed(1))
        self.grid = torch.cartesian_prod(side, side)  # (48²,2)

    def note(self, stage: str, run: scflow.Run, total: int) -> None:
        """Record a TeacherRun or a StudentRun."""
        if run.step % 10 == 1:
            self.rows.append({"stage": stage, "step": run.step, **run.losses})
        if stage == "student" and (run.step == 1 or run.step % max(total // 40, 1) == 0):
            device = next(run.ema.parameters()).device
            noise = self.noise.to(device)
            samples = [scflow.sample(run.ema, noise, steps) for steps in (1, 2, 4)]
            frame = {"step": run.step, "samples": torch.stack(samples).cpu().half()}  # (3,600,2)
            if "critic" in run.latest:  # a phase without an adversarial loss does not train it
                with torch.no_grad():  # a picture of the critic
                    frame["critic"] = run.critic(self.grid.to(device)).cpu().half()
            self.frames.append(frame)


def fit_teacher(run: Run, data: Data, settings: TeacherSettings, watch: Callable | None = None) -> scflow.MLP:
    """Train the teacher of a run. `watch("teacher", state, total)` is called after each update."""
    torch.manual_seed(run.seed)  # initial weights
    generator = Generator(run.device).manual_seed(run.seed)
    net = scflow.MLP(2, run.width, run.depth).to(run.device)
    oracle = data if run.teacher == "exact" else None
    loop = scflow.train_teacher(net, batches(data), generator, settings, oracle)
    for state in progress(loop, settings.teacher_steps, "teacher", run.quiet):
        if watch:
            watch("teacher", state, settings.teacher_steps)
    return state.ema


def fit_student(
    run: Run,
    data: Data,
    start: nn.Module,
    schedule: tuple[Phase, ...],
    watch: Callable | None = None,
    loss_function: Callable = scflow.distill_losses,
) -> scflow.StudentRun:
    """Distil into a student that starts from `start`, the learned teacher; returns the last state."""
    torch.manual_seed(run.seed + 1)  # initial weights of the critic
    generator = Generator(run.device).manual_seed(run.seed + 1)
    critic = scflow.PointCritic(2, max(1, run.width // 2), run.depth).to(run.device)
    teacher = data if run.teacher == "exact" else start
    total = sum(phase.steps for phase in schedule)
    loop = scflow.distill(
        teacher, critic, batches(data), generator, schedule, student=start, loss_function=loss_function
    )
    for state in progress(loop, total, "student", run.quiet):
        if watch:
            watch("student", state, total)
    return state


LABELS = {
    ("teacher", "euler"): "teacher, Euler",
    ("student", "euler"): "student, Euler",
    ("student", "renoise"): "student, re-noising (β = 1)",
}


def evaluate(run: Run, data: Data, who: str, net: scflow.Velocity) -> list[dict]:
    """The rows of metrics.json for "teacher" or "student": every solver at every number of steps, from one noise."""
    generator = Generator().manual_seed(2 * 10**6 + run.seed)
    noise = torch.randn(run.samples, 2, generator=generator)
    fresh, _ = data.sample(run.samples, generator)
    energy = reference(run.dataset, run.samples)
    mixture = data if isinstance(data, GaussianMixture) else None
    few = min(run.samples, 2000)  # the exact map costs 200 evaluations
    if mixture:
        truth = mixture.flow_map(noise[:few], torch.ones(few), 100)  # to 10⁻³
    counts = sorted({*run.nfe, 50}) if who == "teacher" else sorted(set(run.nfe))
    one_step = scflow.sample(net, noise)
    rows = []
    for _, solver in [label for label in LABELS if label[0] == who]:
        for steps in counts:
            x = scflow.sample(net, noise, steps, solver, generator=generator)
            row = {"who": who, "solver": solver, "steps": steps, "nfe": scflow.nfe(steps, solver)}
            row["energy"] = energy(x)
            row["sliced_w2"] = sliced_w2(x, fresh, generator=Generator().manual_seed(0))
            if solver == "euler":  # fresh noise leaves no pairs to compare
                row["gap"] = rms_distance(x, one_step)
            if solver == "euler" and mixture:
                row["map_error"] = rms_distance(x[:few], truth)
            if mixture:
                row["coverage"], row["precision"] = coverage_and_precision(x, mixture)
            rows.append(row)
    return rows


@torch.no_grad()  # a measurement
def path_error(net: scflow.Velocity, mixture: GaussianMixture, seed: int, n: int = 2000) -> float:
    """RMS of f(x_t,t) − f*(x_t,t) over t ~ U(0,1): what is left of the teacher's map where re-noising needs it."""
    generator = Generator().manual_seed(3 * 10**6 + seed)
    x0, _ = mixture.sample(n, generator)
    t = torch.rand(n, generator=generator)
    x1 = torch.randn(n, 2, generator=generator)
    xt = scflow.interpolate(x0, x1, t)
    return rms_distance(scflow.predict_x0(net, xt, t), mixture.flow_map(xt, t, 100))


def prepare(run: Run) -> Data:
    """The data set of a run. Raises ValueError if it cannot be run."""
    data = dataset(run.dataset)
    mixture = isinstance(data, GaussianMixture)
    require(mixture or run.teacher == "learned", f"--teacher exact needs a mixture, and {run.dataset} is none")
    return data.to(run.device) if mixture else data


RUN = "run of toy_2d.py"  # what config.json says it is
# What --overwrite deletes. Without weights no measures: those go first.
RUN_FILES = ("metrics.json", "teacher.pt", "student.pt", "log.csv", "1_hero.png", "2_steps.png", "3_paths.png")
RUN_FILES += ("4_field.png", "5_losses.png", "6_critic.png", "distillation.gif")


def train(run: Run, settings: TeacherSettings, schedule: tuple[Phase, ...]) -> tuple[Path, dict]:
    """One run from start to metrics.json; returns its folder and the metrics. All is written at the end."""
    data = prepare(run)
    config = {"kind": RUN, "teacher_settings": asdict(settings), "schedule": [asdict(phase) for phase in schedule]}
    for name in ("dataset", "seed", "preset", "teacher", "width", "depth", "samples", "nfe", "device"):
        config[name] = getattr(run, name)
    with open_folder(run.out, Path(run.dataset).stem, run.overwrite, RUN) as folder:
        if not run.quiet:
            print(f"writing to {folder}")
        torch.set_num_threads(1)  # a second thread saves little on matrices this small, and rounds otherwise
        journal = Journal()
        clock = [time.perf_counter()]
        teacher = fit_teacher(run, data, settings, journal.note)
        clock.append(time.perf_counter())
        state = fit_student(run, data, teacher, schedule, journal.note)
        clock.append(time.perf_counter())
        metrics = measure(run, data if run.teacher == "exact" else teacher, state.ema)
        clock.append(time.perf_counter())
        seconds = np.diff(clock).tolist()
        metrics["seconds"] = {"teacher": seconds[0], "student": seconds[1], "evaluation": seconds[2]}

        clear_folder(folder, RUN_FILES)
        write_text(folder / "config.json", json.dumps(config, indent=1))
        past = {"rows": journal.rows, "frames": journal.frames}
        scflow.save(folder / "teacher.pt", teacher)
        scflow.save(folder / "student.pt", state.ema, target=state.target.state_dict(), **past)
        write_csv(folder / "log.csv", journal.rows)  # the losses are unweighted
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    return folder, metrics


def measure(run: Run, teacher: scflow.Velocity, student: nn.Module) -> dict:
    """What metrics.json holds of teacher and student, which are moved to the CPU."""
    data = dataset(run.dataset)
    metrics = {name: getattr(run, name) for name in ("dataset", "seed", "preset", "teacher", "samples")}
    metrics["floor"] = floor_of(run.dataset, run.samples)
    metrics["rows"] = evaluate(run, data, "teacher", teacher.cpu()) + evaluate(run, data, "student", student.cpu())
    if isinstance(data, GaussianMixture):
        metrics["path_error"] = path_error(student, data, run.seed)
    metrics["machine"] = machine()
    return metrics


def table(metrics: dict) -> str:
    """The measures of a run as text: rows are networks, columns numbers of network evaluations."""
    floor = metrics["floor"]
    columns = sorted({row["nfe"] for row in metrics["rows"]})
    lines = [f"{'network evaluations':32}" + "".join(f"{n:>10}" for n in columns)]
    for title, key, scale in (
        (f"energy distance ×10³ (noise floor {1e3 * floor['mean']:.2f} ± {1e3 * floor['sd']:.2f})", "energy", 1e3),
        ("share of samples within 3σ of a mode, % (of the truth: 98.9)", "precision", 100),
        ("consistency gap: RMS to the one-step sample", "gap", 1),
        ("flow-map error: RMS to the exact map", "map_error", 1),
    ):
        if not any(key in row for row in metrics["rows"]):
            continue
        lines.append(title)
        for (who, solver), label in LABELS.items():
            values = {}
            for row in metrics["rows"]:
                if (row["who"], row["solver"]) == (who, solver) and key in row:
                    values[row["nfe"]] = f"{scale * row[key]:.3f}"
            if values:
                line = f"  {label:30}" + "".join(f"{values.get(n, ''):>10}" for n in columns)
                lines.append(line.rstrip())
    return "\n".join(lines)


# ═══ 7. Figures ═══════════════════════════════════════════════════════════════════════════
# matplotlib is imported where it is used: a run without figures does without it.

LIMIT = 3.2  # half the side of every picture: data sets have an RMS radius near 2
TEACHER, STUDENT, RENOISE, GREY = "#D55E00", "#0072B2", "#009E73", "#999999"  # Okabe–Ito: safe for the colour-blind
WHEEL = ("#0072B2", "#56B4E9", "#009E73", "#A6B400", "#E69F00", "#D55E00", "#CC79A7", "#0072B2")
LOSS_COLOURS = {
    "flow": TEACHER,
    "consistency": STUDENT,
    "bi": "#56B4E9",
    "self": RENOISE,
    "adv": "#CC79A7",
    "critic": "#E69F00",
}
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def drawing():
    """matplotlib.pyplot, to files only and in this program's style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def by_angle(noise: Tensor) -> np.ndarray:
    """A colour for each noise point (n,2): its direction on a colour wheel, (n,4)."""
    from matplotlib.colors import LinearSegmentedColormap

    turns = torch.atan2(noise[:, 1], noise[:, 0]) / (2 * math.pi) % 1
    return LinearSegmentedColormap.from_list("wheel", WHEEL)(turns.numpy())


def write_figure(path: Path | str, figure, dpi: int = 100) -> None:
    """Save a figure as a PNG of 256 colours, a third of the size."""
    from PIL import Image

    with scflow.replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
        with Image.open(temporary) as image:
            small = image.convert("RGB").quantize(256)
        small.save(temporary)


def window(ax, title: str = "") -> None:
    """The common square window around data and noise, framed, without ticks."""
    ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal", title=title)
    ax.spines[:].set(visible=True, color="#cccccc")


def cloud(ax, x: Tensor, title: str, colours=GREY, size: float = 4) -> None:
    """A scatter of points (n,2) in the common window."""
    ax.scatter(*x.T.numpy(), s=size, c=colours, linewidths=0)
    window(ax, title)


class Pictures:
    """The figures of one run folder, from its files alone."""

    def __init__(self, folder):
        self.folder = Path(folder)
        config = read_config(folder, RUN, "dataset", "teacher", "schedule")
        with scflow.reading(self.folder / "metrics.json", "measures of a finished run"):
            self.metrics = read_json(self.folder / "metrics.json")
            self.floor = [1e3 * self.metrics["floor"][name] for name in ("mean", "sd")]
            self.curves = {label: self.quality(*label) for label in LABELS}
        with scflow.reading(self.folder / "config.json", "configuration of this version"):
            self.schedule = tuple(Phase(**phase) for phase in config["schedule"])
            self.data = dataset(config["dataset"])
        self.exact = self.data if isinstance(self.data, GaussianMixture) else None
        self.student = scflow.load(self.folder / "student.pt")
        with scflow.reading(self.folder / "student.pt", "student of toy_2d.py"):
            past = scflow.read(self.folder / "student.pt", "rows", "frames", "target")
            self.rows = past["rows"]
            self.frames = past["frames"]
            self.target = scflow.clone(self.student)
            self.target.load_state_dict(past["target"])
        self.teacher = self.exact if config["teacher"] == "exact" else scflow.load(self.folder / "teacher.pt")
        generator = Generator().manual_seed(3)
        self.noise = torch.randn(1500, 2, generator=generator)
        self.x0, _ = self.data.sample(1500, generator)

    def quality(self, who: str, solver: str = "euler") -> dict[int, float]:
        """{evaluations: energy distance ×10³} of one network and solver."""
        rows = [row for row in self.metrics["rows"] if (row["who"], row["solver"]) == (who, solver)]
        return {row["nfe"]: 1e3 * row["energy"] for row in rows}

    def hero(self, plt):
        """Noise, data, teacher and student samples: the colour of a point is that of its noise."""
        figure, axes = plt.subplots(2, 4, figsize=(10, 6))
        colours = by_angle(self.noise)
        cloud(axes[0, 0], self.noise, "noise (colour key)", colours)
        cloud(axes[0, 1], self.x0, "data")
        panels = {
            ("teacher", 1): axes[0, 2],
            ("teacher", 50): axes[0, 3],
            ("student", 1): axes[1, 0],
            ("student", 2): axes[1, 1],
            ("student", 4): axes[1, 2],
            ("student", 8): axes[1, 3],
        }
        for (who, steps), ax in panels.items():
            x = scflow.sample(getattr(self, who), self.noise, steps)
            cloud(ax, x, f"{who}, {plural(steps, 'step')}", colours)
            quality = self.curves[who, "euler"]
            value = f"{quality[steps]:.1f}".replace("-", "−") if steps in quality else "not measured"
            ax.set_xlabel(f"energy distance × 10³: {value}", fontsize=9, color="#444444")
        return figure

    def steps(self, plt):
        """Quality against network evaluations, with the noise floor as a band."""
        figure, ax = plt.subplots(figsize=(6, 3.9))
        mean, sd = self.floor
        ax.axhspan(mean - 2 * sd, mean + 2 * sd, color="#dddddd", label="noise floor ± 2 sd", lw=0)
        for (who, solver), colour, marker in zip(LABELS, (TEACHER, STUDENT, RENOISE), "os^"):
            quality = self.curves[who, solver]
            ax.plot(quality.keys(), quality.values(), color=colour, marker=marker, label=LABELS[who, solver], lw=2)
        counts = sorted(self.curves["teacher", "euler"])
        ax.set_xscale("log", base=2)
        ax.set_yscale("symlog", linthresh=2)
        ax.set_xticks(counts, counts)
        ax.set_yticks([-2, -1, 0, 1, 2, 10, 100, 1000], ["−2", "−1", "0", "1", "2", "10", "100", "1000"])
        ax.minorticks_off()
        ax.set(xlabel="network evaluations", ylabel="energy distance × 10³", ylim=(min(-1, mean - 3 * sd), None))
        ax.legend(fontsize=10)
        return figure

    def paths(self, plt):
        """From noise (grey) to data (black): the teacher's curved paths, the student's in eight steps and in one."""
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.7))
        noise = self.noise[:160]
        colours = by_angle(noise)
        for ax, who, steps in zip(axes, ("teacher", "student", "student"), (50, 8, 1)):
            x, path = scflow.sample(getattr(self, who), noise, steps, trajectory=True)  # (n,2), (steps+1,n,2)
            for i, colour in enumerate(colours):
                ax.plot(path[:, i, 0], path[:, i, 1], color=colour, lw=0.9)
            ax.scatter(*noise.T.numpy(), s=6, color="#bbbbbb", zorder=3, label="noise")
            ax.scatter(*x.T.numpy(), s=8, color="black", zorder=4, label="where it lands")
            window(ax, f"{who}, {plural(steps, 'Euler step')}")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=10)
        return figure

    def field(self, plt):
        """Where the velocities lead at several t, over their distance to the exact ones (else over their length)."""
        figure, axes = plt.subplots(2, 4, figsize=(10.6, 5.6))
        side = torch.linspace(-LIMIT, LIMIT, 61)
        fine = torch.cartesian_prod(side, side)  # (61²,2)
        coarse = torch.cartesian_prod(side[2::5], side[2::5])
        x1 = torch.randn(200, 2, generator=Generator().manual_seed(4))
        for row, who in zip(axes, ("teacher", "student")):
            for ax, t in zip(row, (1.0, 0.75, 0.5, 0.25)):
                net = getattr(self, who)
                with torch.no_grad():  # a picture
                    arrows = -net(coarse, torch.full((len(coarse),), t))  # sampling follows −v
                shade = self.shade(who, fine, t).reshape(61, 61).T
                square = (-LIMIT, LIMIT, -LIMIT, LIMIT)
                picture = ax.imshow(shade.numpy(), "YlOrBr", origin="lower", extent=square, vmin=0, vmax=2)
                xt = scflow.interpolate(self.x0[:200], x1, torch.full((200,), t))
                ax.scatter(*xt.T.numpy(), s=4, color=STUDENT, linewidths=0)
                ax.quiver(*coarse.T.numpy(), *arrows.T.numpy(), color="black", scale=30, width=0.009)
                window(ax, f"{who}, t = {t:g}")
        label = "‖v − exact v‖ (student: average v)" if self.exact else "‖v‖"
        figure.colorbar(picture, ax=axes, shrink=0.7, label=label, extend="max")
        return figure

    @torch.no_grad()  # a picture
    def shade(self, who: str, x: Tensor, t: float) -> Tensor:
        """The error of a velocity at points (n,2), where it is known, else the velocity's length; (n,).

        The student's velocity is the average one to the end of the path, (x − f)/t, and is compared with that.
        """
        times = torch.full((len(x),), t)
        v = getattr(self, who)(x, times)
        if self.exact is None:
            return v.norm(dim=1)
        if who == "teacher":
            truth = self.exact(x, times)
        else:
            truth = (x - self.exact.flow_map(x, times, 50)) / t
        error = (v - truth).norm(dim=1)
        density = self.exact.log_density(x, times)
        error[density < density.max() - math.log(1000)] = math.nan  # nothing is learned there
        return error

    def losses(self, plt):
        """The losses over the student's training, and by t at its end."""
        figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.7))
        for name in ("consistency", "bi", "self"):
            self.plot_log(axes[0], name)
        for name in ("adv", "critic"):
            self.plot_log(axes[1], name)
        for ax in axes[:2]:
            for end in self.phase_ends()[:-1]:
                ax.axvline(end, color=GREY, ls=":", lw=1)
        edges, values = self.losses_by_t()
        for name, value in values.items():
            axes[2].stairs(value, edges, baseline=None, color=LOSS_COLOURS[name], label=name, lw=1.8)
        axes[0].set(title="distances", xlabel="student update", yscale="log")
        axes[1].set(title="student against critic", xlabel="student update")
        axes[2].set(title="by t, at the end", xlabel="t", yscale="log")
        for ax in axes:
            handles, _ = ax.get_legend_handles_labels()
            if handles:
                ax.legend(fontsize=9)
            else:
                ax.set_visible(False)  # a schedule without a critic
        return figure

    def plot_log(self, ax, name: str) -> None:
        """One loss against the student's updates: the mean of fifteen records of its phase, as batches are noisy."""
        student = [row for row in self.rows if row["stage"] == "student" and name in row]
        label = name
        for phase, end in zip(self.schedule, self.phase_ends()):
            rows = [row for row in student if end - phase.steps < row["step"] <= end]
            if not rows:
                continue
            values = [row[name] for row in rows]
            means = [np.mean(values[max(0, i - 7) : i + 8]) for i in range(len(values))]
            ax.plot([row["step"] for row in rows], means, color=LOSS_COLOURS[name], label=label, lw=1.6)
            label = None  # a later phase needs no second entry in the legend

    def phase_ends(self) -> list[int]:
        """The student's update after which each phase ends."""
        return np.cumsum([phase.steps for phase in self.schedule]).tolist()

    def losses_by_t(self, bins: int = 10, n: int = 2000):
        """The teacher's loss, and the student's that it was trained on, in equal bins of t.

        Returns edges (bins+1,) and {name: [value per bin]}.
        """
        generator = Generator().manual_seed(5)
        edges = np.linspace(0, 1, bins + 1)
        phase = replace(self.schedule[0], self_source="student", self_form="x0")
        weights = {"adv": 0.0}  # it has t = 1 only
        values = {"flow": []}
        for name in ("consistency", "bi", "self"):
            trained = any(part.weights(part.warmup)[name] > 0 for part in self.schedule)
            weights[name] = float(trained)
            if trained:
                values[name] = []
        for low in edges[:-1]:
            x0, _ = self.data.sample(n, generator)
            x1 = torch.randn(n, 2, generator=generator)
            t = float(low) + torch.rand(n, generator=generator) / bins
            with torch.no_grad():  # a measurement
                losses, _ = scflow.distill_losses(self, x0, x1, t, phase, weights, generator)
                v = self.teacher(scflow.interpolate(x0, x1, t), t)
            losses["flow"] = scflow.flow_matching_loss(v, x0, x1)
            for name, loss in losses.items():
                values[name].append(loss.item())
        return edges, values

    def critic(self, plt):
        """The critic at four moments: orange it takes for data, purple for samples."""
        figure, axes = plt.subplots(1, 4, figsize=(11, 3.1))
        frames = [frame for frame in self.frames if "critic" in frame]
        side = np.linspace(-LIMIT, LIMIT, 48)
        levels = np.linspace(-1.5, 1.5, 13)
        moments = np.linspace(0, len(frames) - 1, 4).round().astype(int)
        for ax, moment in zip(axes, moments):
            frame = frames[moment]
            critic = frame["critic"].float().reshape(48, 48).T.numpy()
            picture = ax.contourf(side, side, critic, levels, cmap="PuOr_r", extend="both")
            ax.contour(side, side, critic, [0], colors="black", linewidths=0.8)
            cloud(ax, frame["samples"][0].float(), f"after {plural(frame['step'], 'update')}", "black", 3)
        figure.colorbar(picture, ax=axes, shrink=0.8, label="D(x): purple samples, orange data", ticks=[-1.5, 0, 1.5])
        return figure

    def gif(self, plt) -> Path:
        """distillation.gif: samples of 1, 2 and 4 steps while the student is trained."""
        from matplotlib.animation import FuncAnimation, PillowWriter

        figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.8), dpi=90)
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.8, wspace=0.03)
        colours = by_angle(torch.randn(600, 2, generator=Generator().manual_seed(1)))  # the journal's noise

        def draw(frame):
            for ax, steps, x in zip(axes, (1, 2, 4), frame["samples"].float()):
                ax.clear()
                cloud(ax, self.x0, "", "#dddddd", 2)
                cloud(ax, x, plural(steps, "step"), colours, 5)
            phase = 1 + sum(frame["step"] > end for end in self.phase_ends())
            figure.suptitle(f"phase {phase}: student after {plural(frame['step'], 'update')}", fontsize=12)

        frames = self.frames + 8 * self.frames[-1:]  # it ends on a pause
        path = self.folder / "distillation.gif"
        with scflow.replacing(path) as temporary:
            FuncAnimation(figure, draw, frames).save(temporary, PillowWriter(fps=6))
        return path

    def draw(self, which: str, gif: bool = False) -> list[Path]:
        """Draw "none", "basic" or "all" of the figures into the folder; returns their paths."""
        basic = {"1_hero": self.hero, "2_steps": self.steps}
        more = {"3_paths": self.paths, "4_field": self.field, "5_losses": self.losses}
        if any("critic" in frame for frame in self.frames):  # a schedule without an adversarial loss trains none
            more["6_critic"] = self.critic
        chosen = {"none": {}, "basic": basic, "all": {**basic, **more}}[which]
        if not chosen and not gif:
            return []
        plt = drawing()
        paths = []
        for name, picture in chosen.items():
            path = self.folder / f"{name}.png"
            write_figure(path, picture(plt))
            paths.append(path)
        if gif:
            with plt.rc_context({"figure.constrained_layout.use": False}):  # the axes must not move
                paths.append(self.gif(plt))
        plt.close("all")
        return paths


# ═══ 8. Commands ══════════════════════════════════════════════════════════════════════════


def train_command(argv: list[str]) -> None:
    """Train, distil, evaluate and draw one data set. (This runs when no command is named; the other is plot.)"""
    run, settings, schedule = configure(argv, train_command.__doc__)
    folder, metrics = train(run, settings, schedule)
    if not run.quiet:
        print(f"\n{run.dataset}, seed {run.seed}, schedule {run.preset!r}, {run.samples} samples\n{table(metrics)}\n")
    clock = time.perf_counter()
    figures = Pictures(folder).draw(run.figures, run.gif)
    if not run.quiet:
        seconds = metrics["seconds"] | {"figures": time.perf_counter() - clock}
        files = [folder / "student.pt", folder / "metrics.json", *figures]
        print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
        print("files:   " + ", ".join(str(file) for file in files))


@dataclass(frozen=True)
class Plot:
    """What is drawn, and from where."""

    out: str = "runs/8gaussians"  # run folder
    figures: Literal["none", "basic", "all"] = "basic"  # figures to draw
    gif: bool = False  # also draw a moving picture of the distillation


def plot_command(argv: list[str]) -> None:
    """Draw the figures of a finished run again, without training."""
    (given,) = cli(argv, plot_command.__doc__, Plot())
    plot = Plot(**given)
    for path in Pictures(plot.out).draw(plot.figures, plot.gif):
        print(path)


COMMANDS = {"train": train_command, "plot": plot_command}


def main(
    argv: list[str] | None = None,
    commands: dict[str, Callable] = COMMANDS,
    default: str | None = "train",
    program: str = "toy_2d.py",
) -> int:
    """Run a command. Bad input is one line on stderr and exit code 2, a stop by Ctrl-C is 130."""
    open_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and argv[0] in commands else default
    try:
        require(name, f"name a command: {', '.join(commands)} (each has --help)")
        commands[name](argv)
        return 0
    except KeyboardInterrupt as stop:
        print(f"{program}: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        text = str(error)
    except Exception as error:
        if sys.flags.dev_mode:  # python -X dev
            raise
        text = explain(error)
    print(f"{program}: error: {' '.join(text.split())}", file=sys.stderr)
    return 2


def open_streams() -> None:
    """No character, and no stream that the caller has closed, may end a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal that knows no σ


def explain(error: Exception) -> str:
    """What to say of an error that nobody expected: where it happened, or that the memory is full."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate" in text:
        return "out of memory: lower --batch, --teacher-batch or --student-batch, or take smaller pictures or networks"
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return f"{type(error).__name__}: {text} ({where}; python -X dev shows all)"


if __name__ == "__main__":
    sys.exit(main())
