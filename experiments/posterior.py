"""Posterior sampling with a flow: which points could have given this measurement?

    python -m experiments.posterior                              points in the plane, where the truth is known
    python -m experiments.posterior faces --run runs/demo        drawn faces, of which half is hidden, or all is blurred

A point x₀ is measured in one direction, and with noise: y = ⟨a,x₀⟩ + σ·noise. If x₀ is from a Gaussian mixture, the
posterior p(x₀|y) is a mixture again, so that samples can be compared with the truth. Two ways to sample it take a
network as it is, and train nothing:

    steered      steps of the flow, each pulled towards y (flow matching posterior sampling)
    candidates   many one-step samples of a student; one of them is kept, drawn by its likelihood

A face is measured in many directions at once.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import celeba_latent
import scflow
import toy_2d
from celeba_latent import Codec
from experiments import common, tell_apart
from scflow import require

# ═══ 1. The truth ═════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Measurement:
    """y = A·x₀ + σ·noise (M,). The rows of A (M,d) are orthogonal to each other."""

    a: Tensor
    y: Tensor
    sigma: float

    def log_likelihood(self, x0: Tensor, spread: float = 0.0) -> Tensor:
        """log p(y|x₀) of points (…,d), but for a constant. `spread` is a deviation of x₀, if it is uncertain."""
        var = self.sigma**2 + spread**2 * self.a.square().sum(1)  # (M,)
        error = self.y - x0 @ self.a.T  # (…,M)
        return -(error**2 / (2 * var)).sum(-1)


def sample_posterior(mixture, measured: Measurement, n: int, generator) -> Tensor:
    """n exact samples (n,2), given one number. Of each component N(μ,s²I) the posterior is Gaussian."""
    (a,) = measured.a  # (2,)
    s = mixture.std
    var = measured.sigma**2 + s**2 * (a @ a)  # of y, for one component
    off = measured.y - mixture.means @ a  # (K,)
    share = (mixture.weights.log() - off**2 / (2 * var)).softmax(0)
    k = torch.multinomial(share, n, replacement=True, generator=generator)
    # A sample of the component and a measurement of it, moved to agree with y (Matheron's rule).
    x0 = mixture.means[k] + s * torch.randn(n, 2, generator=generator)
    y = x0 @ a + measured.sigma * torch.randn(n, generator=generator)
    return x0 + ((measured.y - y) * s**2 / var)[:, None] * a


# ═══ 2. Two ways to sample it ═════════════════════════════════════════════════════════════


def steered(net, measured: Measurement, noise: Tensor, steps: int) -> Tensor:
    """Euler steps along v(x,t) − t/(1−t)·∇log p(y|x_t): the flow of the posterior, if p(y|x_t) were known.

    It is not. It is replaced by the normal density of y around A·x̂₀, x̂₀ = f(x_t,t), with σ² and the variance of x̂₀.
    Of data N(m,I) that is t²/(t² + (1−t)²), and so it is taken for other data, too. The noise is (n,…).
    """
    x = noise
    for i in range(steps):
        t = 1 - (i + 0.5) / steps  # the middle of the step: at t = 1 the factor is infinite
        x = x.detach().requires_grad_()
        v = net(x, torch.full((len(x),), t))
        x0 = x - t * v
        spread = t / math.sqrt(t**2 + (1 - t) ** 2)
        likelihood = measured.log_likelihood(x0.flatten(1), spread)
        (pull,) = torch.autograd.grad(likelihood.sum(), x)
        x = x - (v - t / (1 - t) * pull) / steps
    return x.detach()


def candidates(student, measured: Measurement, n: int, each: int, generator, shape: tuple[int, ...] = (2,)) -> Tensor:
    """n samples (n,*shape), each one of `each` one-step samples, chosen with a chance in proportion to p(y|x₀)."""
    noise = torch.randn(n * each, *shape, generator=generator)
    x0 = scflow.sample(student, noise).unflatten(0, (n, each))  # (n,each,*shape)
    chance = measured.log_likelihood(x0.flatten(2)).softmax(1)  # (n,each)
    chosen = torch.multinomial(chance, 1, generator=generator)[:, 0]  # (n,)
    return x0[torch.arange(n), chosen]


# ═══ 3. What is measured ══════════════════════════════════════════════════════════════════

STEPS = (10, 50, 100)  # of the steered flow; a step has an evaluation and its derivative
EACH = (10, 100)  # candidates
SIGMA = 0.2


def measurements(mixture, count: int, generator) -> list[Measurement]:
    """Measurements of points of the mixture, in random directions."""
    found = []
    x0, _ = mixture.sample(count, generator)
    for point in x0:
        angle = 2 * math.pi * torch.rand(1, generator=generator)
        a = torch.cat([angle.cos(), angle.sin()])
        y = point @ a + SIGMA * torch.randn(1, generator=generator)
        found.append(Measurement(a[None], y, SIGMA))
    return found


def measure(dataset: str, seed: int, count: int, samples: int) -> dict:
    """Mean energy distances over `count` measurements, of each way to the exact posterior; and the floor."""
    run = toy_2d.Run(dataset=dataset, seed=seed, quiet=True)
    mixture = toy_2d.prepare(run)
    require(isinstance(mixture, toy_2d.GaussianMixture), f"of {dataset} the exact posterior is not known")
    teacher = toy_2d.fit_teacher(run, mixture, scflow.TeacherSettings())
    student = toy_2d.fit_student(run, mixture, teacher, scflow.SCHEDULES["two_phase"]).ema
    generator = torch.Generator().manual_seed(10**6 + seed)
    distances = {}
    for measured in measurements(mixture, count, generator):
        energy = toy_2d.EnergyDistance(sample_posterior(mixture, measured, samples, generator))
        noise = torch.randn(samples, 2, generator=generator)
        found = {"floor": sample_posterior(mixture, measured, samples, generator)}
        for who, net in {"exact": mixture, "teacher": teacher}.items():
            for steps in STEPS:
                found[f"steered, {who}, {steps}"] = steered(net, measured, noise, steps)
        for each in EACH:
            found[f"candidates, student, {each}"] = candidates(student, measured, samples, each, generator)
        for way, x in found.items():
            distances.setdefault(way, []).append(energy(x))
    means = {way: float(np.mean(values)) for way, values in distances.items()}
    return {"dataset": dataset, "seed": seed, **means, "machine": toy_2d.machine()}


def table(results: list[dict]) -> list[str]:
    """Lines of Markdown: a row for each way, a column for each data set; mean ± sd over the seeds."""
    datasets = list(dict.fromkeys(run["dataset"] for run in results))
    ways = [key for key in results[0] if key not in ("dataset", "seed", "machine")]
    rows = []
    for way in ways:
        name, who, count = way.split(", ") if way != "floor" else ("exact samples", "", "")
        cells = [name, who, count]
        for dataset in datasets:
            cells.append(common.mean_sd([run[way] for run in results if run["dataset"] == dataset], 1e3))
        rows.append(cells)
    return common.markdown(["way", "network", "evaluations", *datasets], rows)


# ═══ 4. Faces ═════════════════════════════════════════════════════════════════════════════
# The demo's autoencoder is linear: a picture is B·z + c. So a part of it, or a blurred one, is a linear measurement of
# its latents z. Nobody knows the posterior. Two things can be said of a sample: whether it has the measured values, and
# how far it is from the face that was measured.

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {  # pictures (N,3,64,64) → what is measured
    "upper half seen": lambda pictures: pictures[:, :, :32],
    "blurred to 8×8": lambda pictures: F.avg_pool2d(pictures, 8),
}
NOISE = 0.05  # σ of a measured value; values lie in [0,1]
FACE_STEPS = (10, 50, 100)
FACE_EACH = (100, 10000)


def linear_parts(codec: Codec) -> tuple[Tensor, Tensor]:
    """B as pictures (d,3,S,S), and c (1,3,S,S), of an autoencoder of principal components."""
    net = codec.net
    shape = (-1, 3, net.factor, net.factor)
    directions = (net.basis * net.scale * codec.std.flatten()).T
    middle = net.basis @ (net.scale * codec.mean.flatten()) + net.mean
    return directions.reshape(shape), middle.reshape(shape)


def measure_picture(codec: Codec, picture: Tensor, operator: Callable, generator) -> Measurement:
    """A measurement of a picture (3,S,S), in the directions that latents can change: those of a singular value."""
    directions, middle = linear_parts(codec)
    a = operator(directions).flatten(1).T  # (values,d)
    y = operator(picture[None] - middle).flatten()
    y = y + NOISE * torch.randn(len(y), generator=generator)
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    return Measurement(s[:, None] * vt, u.T @ y, NOISE)


def face_samples(teacher, student, measured: Measurement, generator) -> dict[str, Tensor]:
    """{way: latents (1,…) of one face with this measurement}."""
    shape = student.shape
    noise = torch.randn(1, *shape, generator=generator)
    ways = {"any face, student, 1": scflow.sample(student, noise)}
    for steps in FACE_STEPS:
        ways[f"steered, teacher, {steps}"] = steered(teacher, measured, noise, steps)
    for each in FACE_EACH:
        ways[f"candidates, student, {each}"] = candidates(student, measured, 1, each, generator, shape)
    return ways


def rms(x: Tensor) -> float:
    """The root of the mean square."""
    return x.square().mean().sqrt().item()


def measure_faces(teacher, student, codec: Codec, true: Tensor, generator) -> list[dict]:
    """What every way makes of faces uint8 (N,3,S,S), for every operator: a record of each sample."""
    records = []
    for name, operator in OPERATORS.items():
        for picture in true:
            measured = measure_picture(codec, picture / 255, operator, generator)
            for way, z in face_samples(teacher, student, measured, generator).items():
                misfit = (measured.y - z.flatten() @ measured.a.T) / measured.sigma
                made = codec.decode(z)[0]
                record = {"measurement": name, "way": way, "made": made}
                record["misfit"] = rms(misfit)
                record["distance"] = rms(made.float() - picture)
                records.append(record)
    return records


def faces_table(records: list[dict]) -> list[str]:
    """Lines of Markdown: a row for each operator and way, mean ± sd over the faces."""
    rows = {}
    for record in records:
        rows.setdefault((record["measurement"], record["way"]), []).append(record)
    lines = []
    for (name, way), same in rows.items():
        cells = [name, *way.split(", ")]
        for key in ("misfit", "distance"):
            cells.append(common.mean_sd([record[key] for record in same], digits=1))
        lines.append(cells)
    return common.markdown(["measurement", "way", "network", "evaluations", "misfit", "distance"], lines)


def seen_part(picture: Tensor, operator: Callable) -> Tensor:
    """What an operator leaves of a picture uint8 (3,S,S), as a picture; grey where nothing is seen."""
    size = picture.shape[-1]
    part = operator(picture[None].float())
    if part.shape[-1] == size:  # rows are missing
        part = F.pad(part, (0, 0, 0, size - part.shape[-2]), value=128)
    return F.interpolate(part, size)[0].round().byte()


def draw_faces(records: list[dict], true: Tensor, path: Path) -> None:
    """A sheet of two faces for each operator: true, what is seen, steered, and chosen."""
    shown = {"true": [], "seen": []}
    for operator in OPERATORS.values():
        for picture in true[:2]:
            shown["true"].append(picture)
            shown["seen"].append(seen_part(picture, operator))
    last = {
        f"steered, {FACE_STEPS[-1]}": f"steered, teacher, {FACE_STEPS[-1]}",
        f"one of {FACE_EACH[-1]:,}": f"candidates, student, {FACE_EACH[-1]}",
    }
    for title, way in last.items():
        shown[title] = []
        for name in OPERATORS:
            made = [record["made"] for record in records if record["way"] == way and record["measurement"] == name]
            shown[title] += made[:2]
    columns = {title: torch.stack(pictures) for title, pictures in shown.items()}
    celeba_latent.draw_sheet(path, columns)


@dataclass(frozen=True)
class Faces:
    """Whose networks are asked, and where it goes."""

    run: str = "runs/demo"  # run folder of the demo
    count: int = 20  # faces that are measured
    seed: int = 0  # seed of the faces and of all noise
    out: str = "results/posterior-faces"  # path of the results, without .md and .png

    def __post_init__(self):
        require(self.count >= 2, f"count must be at least 2, not {self.count}")


FACES_LEGEND = """Misfit: RMS of y − A·x₀ over σ, about 1 for the true face. Distance: RMS to the true face over the
pixels, which go from 0 to 255. Mean ± deviation over faces, a sample of each."""


def faces_command(argv: list[str]) -> None:
    """Complete drawn faces of which the upper half is seen, and sharpen blurred ones: a table and a sheet."""
    asked = common.settings_of(argv, faces_command.__doc__, Faces(), {})
    teacher, student, codec = tell_apart.load_demo(asked.run)
    common.open_out(asked.out)
    true = tell_apart.drawings(asked.count, 2 * 10**6 + asked.seed)  # numbers that no run has drawn
    generator = torch.Generator().manual_seed(10**6 + asked.seed)
    records = measure_faces(teacher, student, codec, true, generator)
    draw_faces(records, true, Path(f"{asked.out}.png"))
    about = f"{asked.count} faces, seed {asked.seed}; {toy_2d.machine()}."
    lines = [FACES_LEGEND, about, "", *faces_table(records)]
    common.write_report(asked.out, "experiments.posterior", ["faces", *argv], lines)


# ═══ 5. The program ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Posterior:
    """What is measured, and where it goes."""

    datasets: tuple = ("8gaussians", "25gaussians")  # mixtures by name
    seeds: tuple = (0, 1, 2)  # seeds
    count: int = 10  # measurements
    samples: int = 2000  # samples of each posterior
    out: str = "results/posterior"  # path of the results, without .md and .csv

    def __post_init__(self):
        common.check_values(self, "datasets", "seeds")
        require(self.count >= 1, f"count must be at least 1, not {self.count}")
        require(self.samples >= 50, f"samples must be at least 50, not {self.samples}")


LEGEND = """Energy distance ×10³ to exact samples of the posterior, the mean over all measurements, ± the deviation over
seeds. Evaluations of the network for one sample; where the flow is steered each has a derivative, too."""


def posterior_command(argv: list[str]) -> None:
    """Sample the posterior of a measurement with the flow of a teacher, and with one-step samples of its student."""
    settings = common.settings_of(argv, posterior_command.__doc__, Posterior(), {})
    common.open_out(settings.out)
    results = []
    for dataset in settings.datasets:
        for seed in settings.seeds:
            results.append(measure(dataset, seed, settings.count, settings.samples))
    toy_2d.write_csv(f"{settings.out}.csv", results)
    lines = [LEGEND, f"{settings.count} measurements. {common.about_runs(settings, results)}", "", *table(results)]
    common.write_report(settings.out, "experiments.posterior", argv, lines)


def main(argv=None) -> int:
    """Run a command, without its name that in the plane; bad input is one line on stderr and exit code 2."""
    commands = {"posterior": posterior_command, "faces": faces_command}
    return toy_2d.main(argv, commands, "posterior", "experiments.posterior")


if __name__ == "__main__":
    sys.exit(main())
