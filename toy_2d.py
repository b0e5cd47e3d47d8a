"""Self-corrected flow distillation in two dimensions: data, a run, its table and its figures.

    python toy_2d.py                                   eight Gaussians: teacher, student, table, figures
    python toy_2d.py --dataset checkerboard --seed 3
    python toy_2d.py --preset paper --lambda-self 2    the paper's joint losses, one weight changed
    python toy_2d.py plot --out runs/8gaussians --figures all --gif
    python toy_2d.py ablate --quick                    what each loss repairs, rows side by side in processes
    python toy_2d.py bench                             what else the same time buys

A run folder holds config.json, teacher.pt, student.pt, metrics.json, log.csv and figures.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import scflow
from scflow import GaussianMixture, Phase, TeacherSettings, option, require

LIMIT = 3.2  # half the side of every picture: data sets have an RMS radius near 2

# ═══ 1. Data ════════════════════════════════════════════════════════════════════════════════
# A data set has `sample(n, generator, stratified=False) -> (x0 (n,2), stratum (n,))`. A stratum is a
# part that is drawn from independently; a stratified sample has of each part exactly its share.


class Parts:
    """Data made of `count` equally likely parts; `draw(part, generator)` fills one row per part (n,) → (n,2)."""

    def __init__(self, count, draw):
        self.count, self.draw = count, draw

    def sample(self, n, generator=None, stratified=False):
        """x₀ (n,2) and its part (n,), drawn where the generator lives."""
        device = generator.device if generator else "cpu"
        if stratified:
            part = torch.arange(n, device=device) * self.count // n
        else:
            part = torch.randint(self.count, (n,), generator=generator, device=device)
        return self.draw(part, generator), part


class Points:
    """Your own points (N,2), centred and scaled to RMS radius 2; a fifth is held out as the reference."""

    def __init__(self, path):
        require(os.path.isfile(path), f"no points file at {path}")
        try:
            points = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError):
            raise ValueError(f"{path} is not a .npy file of numbers; write one with numpy.save") from None
        kind = f"{points.dtype} of shape {points.shape}" if isinstance(points, np.ndarray) else "an archive"
        good = kind != "an archive" and points.dtype.kind in "iuf" and points.ndim == 2 and points.shape[1] == 2
        require(good and len(points) >= 100, f"{path} must hold real numbers of shape (N, 2), N ≥ 100, not {kind}")
        require(np.isfinite(points).all(), f"{path} holds values that are not finite")
        points = points.astype(np.float64) / max(np.abs(points).max(), 1e-300)  # float32 only once centred and scaled
        points = points - points.mean(0)
        radius = np.sqrt((points**2).sum(1).mean())
        require(radius > 1e-12, f"{path} holds one point only, repeated")
        points = torch.as_tensor(2 * points / radius, dtype=torch.float32)
        points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))]
        self.held_out, self.train = points.split([len(points) // 5, len(points) - len(points) // 5])

    def sample(self, n, generator=None, stratified=False):
        """Rows drawn with replacement from the training part; stratified: the held-out part, at most n of it."""
        device = generator.device if generator else "cpu"
        rows = torch.randint(len(self.train), (n,), generator=generator, device=device)
        x0 = self.held_out[:n].to(device) if stratified else self.train.to(device)[rows]
        return x0, torch.zeros(len(x0), dtype=torch.int64, device=device)


def uniform(like, generator):
    """Uniform [0,1) numbers, one for each element of `like` (n,)."""
    return torch.rand(like.shape, generator=generator, device=like.device)


def normal(like, generator):
    """Standard normal points (n,2), one for each element of `like` (n,)."""
    return torch.randn(*like.shape, 2, generator=generator, device=like.device)


def polar(radius, angle):
    """(n,) and (n,) → (n,2)."""
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def checkerboard(part, generator):
    """The eight black squares of a 4×4 board on [−2,2]²."""
    row, col = part // 2, part % 2 * 2 + part // 2 % 2
    return torch.stack([row + uniform(part, generator), col + uniform(part, generator)], 1) - 2


def moons(part, generator):
    """Two interleaved half circles, blurred by 0.14."""
    angle, side = math.pi * uniform(part, generator), 1 - 2 * part
    x = polar(side, angle) + part[:, None] * torch.tensor([1.0, 0.5], device=part.device)
    return 1.7 * (x - torch.tensor([0.5, 0.25], device=part.device) + 0.08 * normal(part, generator))


def spirals(part, generator):
    """Two arms of one and a half turns, blurred by 0.06."""
    u = uniform(part, generator).sqrt()
    return polar(2.4 * u * (1 - 2 * part), 3 * math.pi * u) + 0.06 * normal(part, generator)


def pinwheel(part, generator):
    """Five bent blades."""
    x = normal(part, generator) * torch.tensor([0.3, 0.1], device=part.device)
    along, across = 1 + x[:, 0], x[:, 1]
    angle = 2 * math.pi / 5 * part + 0.25 * along.exp()
    return 1.8 * (polar(along, angle) + polar(across, angle + math.pi / 2))


def rings(part, generator):
    """Three concentric circles of equal mass, blurred by 0.08."""
    return polar(0.8 * (1.0 + part), 2 * math.pi * uniform(part, generator)) + 0.08 * normal(part, generator)


DATASETS = {
    "8gaussians": lambda: GaussianMixture(polar(torch.full((8,), 2.0), torch.arange(8) * math.pi / 4), 0.15),
    "25gaussians": lambda: GaussianMixture(torch.cartesian_prod(*2 * [torch.arange(-2.0, 3)]), 0.1),
    "checkerboard": lambda: Parts(8, checkerboard),
    "moons": lambda: Parts(2, moons),
    "spirals": lambda: Parts(2, spirals),
    "pinwheel": lambda: Parts(5, pinwheel),
    "rings": lambda: Parts(3, rings),
}


def labelled():
    """Three labels of three Gaussians each, on arms that start where the labels overlap."""
    radius, arm = torch.tensor([0.6, 1.5, 2.4]).repeat(3), torch.arange(3).repeat_interleave(3)
    return GaussianMixture(polar(radius, 2 * math.pi / 3 * arm + 0.35 * radius), 0.35, labels=1 + arm)


def dataset(name):
    """A data set by its name, or from a .npy file of points."""
    if name.endswith(".npy"):
        return Points(name)
    known = DATASETS | {"labelled": labelled}
    require(name in known, f"unknown data set {name!r}: choose {', '.join(known)}, or a .npy file of points")
    return known[name]()


# ═══ 2. Settings and flags ══════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Run:
    """What is run, and where it goes."""

    dataset: str = option("8gaussians", f"{', '.join(DATASETS)}, labelled, or a .npy file of (N,2) points")
    seed: int = option(0, "seed of the weights, the data and the evaluation noise")
    preset: str = option("two_phase", "schedule of the losses", choices=tuple(scflow.SCHEDULES))
    teacher: str = option("learned", "teacher: learned, or the closed-form velocity", choices=("learned", "exact"))
    guidance: tuple = option((1.0,), "guidance scales of the teacher (--dataset labelled), each with a student")
    learn_from: str = option(
        "teacher",
        "what is data to the student of a guided teacher: that teacher's samples, or the data set",
        choices=("teacher", "data"),
    )
    teacher_from: str = option("", "run folder whose teacher is taken instead of training the same one again")
    self_correction: str = option(
        "paper",
        "x̂_t from x̂₀'s own noise; from fresh noise; or with a gradient into x̂₀",
        choices=("paper", "fresh", "free"),
    )
    width: int = option(128, "hidden units of a layer of the networks (the critic has half as many)")
    depth: int = option(3, "hidden layers of the networks")
    samples: int = option(6000, "points that are sampled and compared in the evaluation")
    nfe: str = option("1,2,4,8", "network evaluations to measure, separated by commas (the teacher also 50)")
    device: str = option("cpu", "cpu, cuda or mps (the matrices are tiny: a CPU is rarely slower)")
    save_every: int = option(500, "updates between checkpoints")
    out: str = option("", "run folder [runs/DATASET, then runs/DATASET-2 and so on]")
    resume: bool = option(False, "go on with an interrupted run (give the same command)")
    overwrite: bool = option(False, "start afresh in a folder that exists")
    figures: str = option("basic", "figures to draw", choices=("none", "basic", "all"))
    gif: bool = option(False, "also draw a moving picture of the distillation")
    quiet: bool = option(False, "no progress bars and no table")

    def __post_init__(self):
        for name, least in dict(width=1, depth=1, samples=50, save_every=1).items():
            require(getattr(self, name) >= least, f"{name} must be at least {least}, not {getattr(self, name)}")
        require(not (self.resume and self.overwrite), "--resume and --overwrite contradict each other")
        good = all(n.isdecimal() and int(n) > 0 for n in self.nfe.split(","))
        require(good, f"nfe must be positive whole numbers separated by commas, not {self.nfe!r}")
        check_device(self.device)


def check_device(name):
    """Raise ValueError if there is no such device here."""
    try:
        torch.Generator(name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"no device {name!r} here: use --device cpu") from None


# What does not change the numbers may differ between a run and its resumption.
COSMETIC = ("out", "resume", "overwrite", "figures", "gif", "quiet", "save_every", "teacher_from")


def cli(argv, description, *settings):
    """Turn the fields of settings classes into flags; returns one {field: given value} per class.

    A field of Phase takes one value, or one for each phase of the schedule.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message} (--help lists the options)")  # main() reports in one line
    for cls in settings:
        group = parser.add_argument_group(cls.__name__, cls.__doc__)
        for f in fields(cls):
            flag, choices = "--" + f.metadata.get("flag", f.name.replace("_", "-")), f.metadata.get("choices")
            about = f.metadata["help"] + ("" if f.default in ("", False) else f" [{f.default}]")
            how = dict(dest=f"{cls.__name__}.{f.name}", default=argparse.SUPPRESS, help=about)
            if isinstance(f.default, bool):
                group.add_argument(flag, action="store_true", **how)
                continue
            several = isinstance(f.default, tuple)
            kind = type(f.default[0] if several else f.default)
            how |= dict(type=kind, choices=choices, metavar="|".join(choices or [f.name.upper()]))
            group.add_argument(flag, nargs="+" if several or cls is Phase else None, **how)
    given = vars(parser.parse_args(argv))
    return [{f.name: given[k] for f in fields(c) if (k := f"{c.__name__}.{f.name}") in given} for c in settings]


def configure(argv, description=""):
    """Command-line arguments → (Run, TeacherSettings, schedule). Raises ValueError where they contradict."""
    run, teacher, phase = cli(argv, description, Run, TeacherSettings, Phase)
    run = Run(**run)
    if run.teacher == "exact":  # an oracle has no weights to start a student from: a short regression on it has
        teacher = {"teacher_steps": 1000, **teacher}
    return run, TeacherSettings(**teacher), revise(scflow.SCHEDULES[run.preset], phase)


def revise(schedule, changes):
    """A schedule with fields changed, {name: [one value, or one for each phase]}. Raises ValueError if they clash."""
    n, changes = len(schedule), dict(changes)
    if len(changes.get("steps", [])) == 1:  # one number is the whole length, shared out as in the preset
        lasting = [replace(p, warmup_adv=0, warmup_self=0, warmup_bi=0) for p in schedule]  # these may change too
        changes["steps"] = [p.steps for p in scflow.rescale(lasting, *changes["steps"])]
    for name, values in changes.items():
        require(len(values) in (1, n), f"{name} takes one value, or one for each of {n} phases, not {len(values)}")
    each = [{name: values[i % len(values)] for name, values in changes.items()} for i in range(n)]
    schedule = tuple(replace(phase, **change) for phase, change in zip(schedule, each))
    scflow.check_schedule(schedule)
    return schedule


# ═══ 3. The run folder ══════════════════════════════════════════════════════════════════════


def write_text(path, text):
    """Replace a text file atomically."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_csv(path, rows):
    """A CSV file of dictionaries, with a column for every key in the order of appearance."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def read_json(path, *keys):
    """The dictionary in a JSON file. Raises ValueError if it is damaged or lacks one of the keys."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        content = None
    require(isinstance(content, dict) and all(k in content for k in keys), f"{path} is damaged")
    return content


def usual_folder(name, again=False):
    """runs/NAME, then runs/NAME-2 and so on: the first that is free, or `again` the last there is."""
    names = (Path("runs", f"{name}-{i}" if i > 1 else name) for i in itertools.count(1))
    taken = list(itertools.takewhile(Path.exists, names))
    return taken[-1] if taken and again else Path("runs", f"{name}-{len(taken) + 1}" if taken else name)


def open_folder(out, name, resume, overwrite, config):
    """The run folder as a Path: a new one, or with `resume` the existing one, whose settings must be the same.

    Without `out` it is runs/NAME, then runs/NAME-2 and so on; `resume` and `overwrite` take the last there is.
    """
    out = Path(out or usual_folder(name, resume or overwrite))
    file = out / "config.json"
    if resume:
        require(file.is_file(), f"nothing to resume: {out} holds no config.json")
        before = read_json(file)
        changed = [k for k in {**before, **config} if before.get(k) != config.get(k)]
        require(not changed, f"--resume with other settings than {out} was started with: {', '.join(changed)}")
        return out
    require(overwrite or not out.exists(), f"{out} exists: give --resume to go on with it, or --overwrite")
    ours = not out.exists() or file.is_file() or (out.is_dir() and not any(out.iterdir()))
    require(ours, f"{out} is not a run folder (it holds no config.json), and is left alone")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in itertools.chain(*map(out.glob, ("*.pt", "metrics.json", "log.csv", "[1-6]_*.png", "*.gif"))):
            old.unlink()
        write_text(file, json.dumps(config, indent=1))
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from None
    return out


class Journal:
    """What the figures need of a run's past: losses every 10 updates, samples and critic at 40 moments."""

    def __init__(self, stored=None):
        self.rows, self.frames = (stored["rows"], stored["frames"]) if stored else ([], [])
        self.noise = torch.randn(600, 2, generator=torch.Generator().manual_seed(1))
        self.grid = torch.cartesian_prod(*2 * [torch.linspace(-LIMIT, LIMIT, 48)])  # (48²,2)

    def note(self, stage, state, total):
        """Record a State of the teacher or the student."""
        if state.step % 10 == 1:
            norms = {f"norm_{k}": v for k, v in state.grad_norms.items()}
            self.rows.append({"stage": stage, "step": state.step, **state.losses, **norms})
        if stage == "student" and (state.step == 1 or state.step % max(total // 40, 1) == 0):
            device = next(state.ema.parameters()).device
            x = torch.stack([scflow.sample(state.ema, self.noise.to(device), n) for n in (1, 2, 4)])  # (3,n,2)
            with torch.no_grad():  # a picture of the critic
                critic = state.disc(self.grid.to(device))
            self.frames.append({"step": state.step, "samples": x.cpu().half(), "critic": critic.cpu().half()})


class Stopped(Exception):
    """Ctrl-C was pressed; the run was saved."""


def follow(loop, total, name, save, every, quiet=False, done=0):
    """Pass on the States of a training loop, with a progress bar; `save(state)` now and then, at the end, at Ctrl-C.

    Ctrl-C takes effect between two updates, so that what is saved is always whole.
    """
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        with tqdm(total=total, initial=done, desc=name, disable=quiet, mininterval=0.2) as bar:
            for state in loop:
                yield state
                bar.update()
                if state.step % 20 == 0:
                    bar.set_postfix({k: f"{v:.3f}" for k, v in state.losses.items()}, refresh=False)
                if pressed or state.step % every == 0 or state.step == total:
                    save(state)
                if pressed:
                    raise Stopped
    finally:
        signal.signal(signal.SIGINT, before)


def read_run(path, kind):
    """The checkpoint of a run, of the teacher or the student. Raises ValueError if it is none."""
    content = scflow.read(path)
    require(content.get("kind") == kind, f"{path} does not hold a run of the {kind}")
    return content


def stage(name, run, folder, journal, net, start, total, **extra):
    """Train the teacher or the student from the start or from its checkpoint; returns the averaged network.

    `start(resume)` makes the training loop; `extra` goes into the checkpoint.
    """
    path = folder / f"{name}.pt"
    content = read_run(path, name) if path.exists() else None  # of a run that is resumed, or borrowed
    if content:
        require(content["arch"] == net.arch, f"{path} holds a network of another architecture: {content['arch']}")
        net = scflow.load(path, device=run.device)
        journal.rows[:], journal.frames[:] = content["journal"]["rows"], content["journal"]["frames"]

    def save(state):
        kept = {"rows": journal.rows, "frames": journal.frames}
        scflow.save(path, state.ema, kind=name, state=state.state_dict(), journal=kept, **extra)
        write_csv(folder / "log.csv", journal.rows)  # losses unweighted, norms weighted

    done = content["state"]["step"] if content else 0
    for state in follow(start(content and content["state"]), total, name, save, run.save_every, run.quiet, done):
        journal.note(name, state, total)
        net = state.ema
    return net


# ═══ 4. A run: teacher, student, measures ═══════════════════════════════════════════════════


def outcome_depends_on(run, settings, schedule, labelled):
    """What config.json holds. Without labels it is what it was before there were any."""
    config = dict(teacher_settings=asdict(settings), schedule=[asdict(p) for p in schedule])
    config |= {k: v for k, v in asdict(run).items() if k not in COSMETIC} | dict(guidance=run.guidance[0])
    if not labelled:
        del config["guidance"], config["learn_from"], config["teacher_settings"]["teacher_drop"]
    return config


def measure(run, known, teacher, student):
    """What metrics.json holds of the two, moved to the CPU; `known` are rows of the teacher that are there already."""
    data, teacher, student = dataset(run.dataset), teacher.cpu(), student.cpu()
    metrics = dict(dataset=run.dataset, seed=run.seed, preset=run.preset, teacher=run.teacher, samples=run.samples)
    if getattr(data, "labels", None) is not None:
        velocity = scflow.guided(teacher, run.guidance[0])
        measures = notebook("07_prompts_and_guidance").evaluate(run, data, velocity, student)
        return metrics | measures | dict(machine=machine())
    rows = known + evaluate(run, data, None if known else teacher, student)
    metrics |= dict(floor=noise_floor(run.dataset, run.samples), rows=rows, machine=machine())
    return metrics | ({"path_error": path_error(student, data, run.seed)} if isinstance(data, GaussianMixture) else {})


def train(run, settings, schedule):
    """One run from start to metrics.json; returns its folder and the metrics. A finished run is read back."""
    data, exact = dataset(run.dataset), run.teacher == "exact"
    mixture = isinstance(data, GaussianMixture)
    require(mixture or not exact, f"--teacher exact needs a mixture, whose velocity is known; {run.dataset} is none")
    data = data.to(run.device) if mixture else data  # a mixture draws where its means are
    labels, (scale, *others) = getattr(data, "labels", None), run.guidance
    require(not others, "one guidance scale a run")
    require(labels is not None or scale == 1, f"{run.dataset} has no labels to guide by: give --dataset labelled")
    config = outcome_depends_on(run, settings, schedule, labels is not None)
    known = finished_teacher(Path(run.teacher_from), config) if run.teacher_from else []
    folder = open_folder(run.out, Path(run.dataset).stem, run.resume, run.overwrite, config)
    if run.resume and (folder / "metrics.json").exists():
        return folder, read_json(folder / "metrics.json", "rows", "floor", "seconds")
    if not run.quiet:
        print(f"writing to {folder}")
    if run.teacher_from and not (folder / "teacher.pt").exists():
        shutil.copy(Path(run.teacher_from, "teacher.pt"), folder / "teacher.pt")
    torch.manual_seed(run.seed)  # initial weights
    generator, journal = torch.Generator(run.device).manual_seed(run.seed), Journal()  # everything else
    tokens = None if labels is None else (1, int(labels.max()))
    net = scflow.MLP(2, run.width, run.depth, tokens=tokens).to(run.device)
    disc = scflow.PointDiscriminator(2, max(1, run.width // 2), run.depth, tokens).to(run.device)
    clock, threads = [time.perf_counter()], torch.get_num_threads()
    # A second thread saves a tenth on matrices this small, stalls where other programs run, and rounds otherwise.
    torch.set_num_threads(1)

    def batch(n, generator):
        x0, part = data.sample(n, generator)
        return x0, None if labels is None else labels[part, None]

    try:
        start = partial(scflow.train_teacher, net, batch, generator, settings, data if exact else None)
        net = stage("teacher", run, folder, journal, net, start, settings.teacher_steps)
        clock.append(time.perf_counter())
        teacher = data if exact else net
        kept = {"arch": teacher.arch, "weights": teacher.state_dict()}
        if labels is not None:
            teacher = scflow.guided(teacher, scale)
            batch = own_samples(teacher, batch, run) if run.learn_from == "teacher" else batch
        start = partial(scflow.distill, teacher, disc, batch, generator, schedule, net, norms_every=50)
        if run.self_correction != "paper":
            start.keywords["loss_function"] = partial(self_correction_variant, run.self_correction)
        total = sum(p.steps for p in schedule)
        student = stage("student", run, folder, journal, net, lambda r: start(resume=r), total, teacher=kept)
        clock.append(time.perf_counter())
        torch.set_num_threads(threads)  # distances between all pairs are worth it
        metrics = measure(run, known, data if exact else net, student)
        clock.append(time.perf_counter())
    except (Stopped, KeyboardInterrupt):
        again = "" if run.out else f" --out {folder}"
        raise Stopped(f"stopped and saved in {folder}; the same command with --resume{again} goes on") from None
    except FloatingPointError as error:
        kept = " and ".join(sorted(file.name for file in folder.glob("*.pt"))) or "no checkpoint yet"
        raise FloatingPointError(f"{error}; {folder} keeps {kept}, from before it") from None
    metrics["seconds"] = dict(zip(("teacher", "student", "evaluation"), np.diff(clock).tolist()))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    return folder, metrics


def own_samples(velocity, batch, run, n=20000):
    """`batch(n, generator)` over samples of a guided teacher in 50 steps, with their conditions.

    They are distributed otherwise than the data: a critic that held the student against these would undo the guidance.
    """
    generator = torch.Generator(run.device).manual_seed(4 * 10**6 + run.seed)
    x0, cond = batch(n, generator)
    x0 = scflow.sample(velocity, scflow.randn_like(x0, generator), 50, cond=cond)

    def draw(n, generator):
        rows = torch.randint(len(x0), (n,), generator=generator, device=x0.device)
        return x0[rows], cond[rows]

    return draw


def finished_teacher(folder, config):
    """Check that a run folder holds the teacher of such a run; returns its rows of metrics if they are the same.

    The numbers are those of training it again: its checkpoint holds the state of the random generator too.
    """
    theirs, done = read_json(folder / "config.json", *config), read_run(folder / "teacher.pt", "teacher")
    alike = ("dataset", "seed", "teacher", "teacher_settings", "width", "depth", "device")
    changed = [k for k in alike if theirs[k] != config[k]]
    require(not changed, f"the teacher in {folder} is of another run: it differs in {', '.join(changed)}")
    steps = done["state"]["step"], config["teacher_settings"]["teacher_steps"]
    require(steps[0] == steps[1], f"the teacher in {folder} is not finished: it had {steps[0]} of {steps[1]} updates")
    same = (folder / "metrics.json").exists() and all(theirs[k] == config[k] for k in ("samples", "nfe"))
    return [r for r in read_json(folder / "metrics.json", "rows")["rows"] if r["who"] == "teacher"] if same else []


def self_correction_variant(kind, nets, x0, x1, t, phase, weights, generator=None, cond=None):
    """`distill_losses` with another self-correction: "fresh" noise in x̂_t, or "free" of the stop-gradient."""
    losses, fake = scflow.distill_losses(nets, x0, x1, t, phase, weights | {"self": 0}, generator, cond)
    if weights["self"] > 0:
        with torch.set_grad_enabled(kind == "free"):  # the paper's x̂₀ is a constant
            x0_hat = scflow.predict_x0(nets.student, x1, torch.ones_like(t), cond)
        noise = scflow.randn_like(x1, generator) if kind == "fresh" else x1
        prediction = scflow.predict_x0(nets.student, scflow.interpolate(x0_hat, noise, t), t, cond)
        losses["self"] = scflow.squared(prediction, x0_hat)
    return losses, fake


LABELS = {("teacher", "euler"): "teacher, Euler", ("student", "euler"): "student, Euler"}
LABELS["student", "renoise"] = "student, re-noising (β = 1)"


@lru_cache
def reference(name, n):
    """The fixed, stratified reference sample of a data set, as a measure of energy distance."""
    return scflow.EnergyDistance(*dataset(name).sample(n, torch.Generator().manual_seed(10**6), stratified=True))


@lru_cache
def noise_floor(name, n):
    """Mean and sd of the energy distance of 20 true samples of n points to the reference."""
    data, generator = dataset(name), torch.Generator().manual_seed(10**6 + 1)
    floor = scflow.noise_floor(reference(name, n), lambda: data.sample(n, generator)[0])
    return dict(zip(("mean", "sd"), floor))


def evaluate(run, data, teacher, student):
    """The rows of metrics.json: each network and solver at each number of steps, from the same noise.

    A teacher of None is left out.
    """
    energy, generator = reference(run.dataset, run.samples), torch.Generator().manual_seed(2 * 10**6 + run.seed)
    noise = torch.randn(run.samples, 2, generator=generator)
    fresh, _ = data.sample(run.samples, generator)
    mixture, few = isinstance(data, GaussianMixture), min(run.samples, 2000)  # the exact map costs 200 evaluations
    truth = data.flow_map(noise[:few], torch.ones(few), 100) if mixture else None  # to 10⁻³
    counts, rows = sorted({int(n) for n in run.nfe.split(",")}), []
    for who, solver in LABELS:
        net = teacher if who == "teacher" else student
        if net is None:
            continue
        one_step = scflow.sample(net, noise)
        for steps in counts if who == "student" else sorted({*counts, 50}):
            x = scflow.sample(net, noise, steps, solver, generator=generator)
            row = dict(who=who, solver=solver, steps=steps, nfe=scflow.nfe(steps, solver), energy=energy(x))
            row["sliced_w2"] = scflow.sliced_w2(x, fresh, generator=torch.Generator().manual_seed(0))
            if solver != "renoise":  # fresh noise leaves no pairs to compare
                row["gap"] = scflow.rms_distance(x, one_step)
                row |= {"map_error": scflow.rms_distance(x[:few], truth)} if mixture else {}
            if mixture:
                row["coverage"], row["precision"] = scflow.coverage_and_precision(x, data)
            rows.append(row)
    return rows


@torch.no_grad()  # a measurement
def path_error(net, mixture, seed, n=2000):
    """RMS of f(x_t,t) − f*(x_t,t) over t ~ U(0,1): what is left of the teacher's map where re-noising needs it."""
    generator = torch.Generator().manual_seed(3 * 10**6 + seed)
    x0, t = mixture.sample(n, generator)[0], torch.rand(n, generator=generator)
    xt = scflow.interpolate(x0, torch.randn(n, 2, generator=generator), t)
    return scflow.rms_distance(scflow.predict_x0(net, xt, t), mixture.flow_map(xt, t, 100))


def plural(n, word):
    """1 step, 2 steps."""
    return f"{n} {word}{'s' * (n != 1)}"


def machine():
    """What the figures were computed on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()} CPU, {plural(torch.get_num_threads(), 'thread')}{gpu}, torch {torch.__version__}"


def table(metrics):
    """The measures of a run as text: rows are networks, columns numbers of network evaluations."""
    floor, columns = metrics["floor"], sorted({r["nfe"] for r in metrics["rows"]})
    lines = [f"{'network evaluations':32}" + "".join(f"{n:>10}" for n in columns)]
    for title, key, scale in (
        (f"energy distance ×10³ (noise floor {1e3 * floor['mean']:.2f} ± {1e3 * floor['sd']:.2f})", "energy", 1e3),
        ("consistency gap: RMS to the one-step sample", "gap", 1),
        ("flow-map error: RMS to the exact map", "map_error", 1),
    ):
        cells = {(r["who"], r["solver"], r["nfe"]): f"{scale * r[key]:.3f}" for r in metrics["rows"] if key in r}
        lines += [title] if cells else []
        for pair in dict.fromkeys(k[:2] for k in cells):
            lines.append(f"  {LABELS[pair]:30}" + "".join(f"{cells.get((*pair, n), ''):>10}" for n in columns))
    return "\n".join(lines)


# ═══ 5. Figures ═════════════════════════════════════════════════════════════════════════════
# matplotlib is imported where it is used: a run without figures does without it.

TEACHER, STUDENT, RENOISE, GREY = "#D55E00", "#0072B2", "#009E73", "#999999"  # Okabe–Ito: safe for the colour-blind
WHEEL = ("#0072B2", "#56B4E9", "#009E73", "#A6B400", "#E69F00", "#D55E00", "#CC79A7", "#0072B2")
LOSS_COLOURS = dict(flow=TEACHER, consistency=STUDENT, bi="#56B4E9", self=RENOISE, adv="#CC79A7", disc="#E69F00")
STYLE = {"font.size": 11, "axes.titlesize": 12, "legend.frameon": False, "figure.constrained_layout.use": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


def drawing():
    """matplotlib.pyplot, to files only and in this program's style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def by_angle(noise):
    """A colour per noise point (n,2): its direction on a colour wheel."""
    from matplotlib.colors import LinearSegmentedColormap

    angle = torch.atan2(noise[:, 1], noise[:, 0]) / (2 * math.pi) % 1
    return LinearSegmentedColormap.from_list("wheel", WHEEL)(angle.numpy())


def write_figure(path, figure, dpi=100):
    """Save a figure as a PNG of 256 colours, a third of the size."""
    from PIL import Image

    figure.savefig(path, dpi=dpi)
    Image.open(path).convert("RGB").quantize(256).save(path)


def window(ax, title=""):
    """The common square window around data and noise, framed, without ticks."""
    ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal", title=title)
    ax.spines[:].set(visible=True, color="#cccccc")


def cloud(ax, x, title, colours=GREY, size=4):
    """A scatter of points (n,2) in the common window."""
    ax.scatter(*x.T.numpy(), s=size, c=colours, linewidths=0)
    window(ax, title)


class Pictures:
    """The figures of one run folder, from its checkpoints and metrics alone."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        require((folder / "metrics.json").exists(), f"no finished run in {folder} (it holds no metrics.json)")
        config = read_json(folder / "config.json", "schedule", "dataset")
        require("guidance" not in config, f"{folder} is one of several guidance scales, drawn together as guidance.png")
        self.metrics = read_json(folder / "metrics.json", "rows", "floor")
        self.schedule = tuple(Phase(**p) for p in config["schedule"])
        content = read_run(folder / "student.pt", "student")
        self.journal = Journal(content["journal"])
        self.student = scflow.load(folder / "student.pt")
        self.teacher, self.target = scflow.build(content["teacher"]["arch"]), scflow.build(content["arch"])
        self.teacher.load_state_dict(content["teacher"]["weights"])
        self.target.load_state_dict(content["state"]["parts"]["target"])
        self.data, generator = dataset(config["dataset"]), torch.Generator().manual_seed(3)
        self.exact = self.data if isinstance(self.data, GaussianMixture) else None
        self.noise = torch.randn(1500, 2, generator=generator)
        self.x0 = self.data.sample(1500, generator)[0]

    def quality(self, who, solver="euler"):
        """{NFE: energy distance ×10³} of one network and solver."""
        return {r["nfe"]: 1e3 * r["energy"] for r in self.metrics["rows"] if (r["who"], r["solver"]) == (who, solver)}

    def hero(self, plt):
        """Noise, data, teacher and student samples: the colour of a point is that of its noise."""
        figure, axes = plt.subplots(2, 4, figsize=(10, 6))
        colours = by_angle(self.noise)
        cloud(axes[0, 0], self.noise, "noise (colour key)", colours)
        cloud(axes[0, 1], self.x0, "data")
        places = [("teacher", 1), ("teacher", 50), ("student", 1), ("student", 2), ("student", 4), ("student", 8)]
        for ax, (who, steps) in zip([*axes[0, 2:], *axes[1]], places):
            cloud(ax, scflow.sample(getattr(self, who), self.noise, steps), f"{who}, {plural(steps, 'step')}", colours)
            value = (
                f"{self.quality(who)[steps]:.1f}".replace("-", "−") if steps in self.quality(who) else "not measured"
            )
            ax.set_xlabel(f"energy distance × 10³: {value}", fontsize=9, color="#444444")
        return figure

    def steps(self, plt):
        """Quality against network evaluations, with the noise floor as a band."""
        figure, ax = plt.subplots(figsize=(6, 3.9))
        mean, sd = (1e3 * self.metrics["floor"][k] for k in ("mean", "sd"))
        ax.axhspan(mean - 2 * sd, mean + 2 * sd, color="#dddddd", label="noise floor ± 2 sd", lw=0)
        for (who, solver), colour, marker in zip(LABELS, (TEACHER, STUDENT, RENOISE), "os^"):
            nfe, values = zip(*self.quality(who, solver).items())
            ax.plot(nfe, values, color=colour, marker=marker, label=LABELS[who, solver], lw=2)
        ax.set_xscale("log", base=2)
        ax.set_yscale("symlog", linthresh=2)
        ax.set_xticks(*2 * [sorted(self.quality("teacher"))])
        ax.set_yticks([-2, -1, 0, 1, 2, 10, 100, 1000], ["−2", "−1", "0", "1", "2", "10", "100", "1000"])
        ax.minorticks_off()
        ax.set(xlabel="network evaluations", ylabel="energy distance × 10³", ylim=(min(-1, mean - 3 * sd), None))
        ax.legend(fontsize=10)
        return figure

    def paths(self, plt):
        """From noise (grey) to data (black): the teacher's curved paths, the student's in eight steps and in one."""
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.7))
        noise = self.noise[:160]
        for ax, who, steps in zip(axes, ("teacher", "student", "student"), (50, 8, 1)):
            x, path = scflow.sample(getattr(self, who), noise, steps, trajectory=True)  # (n,2), (steps+1,n,2)
            for i, colour in enumerate(by_angle(noise)):
                ax.plot(*path[:, i].T.numpy(), color=colour, lw=0.9)
            ax.scatter(*noise.T.numpy(), s=6, color="#bbbbbb", zorder=3)
            ax.scatter(*x.T.numpy(), s=8, color="black", zorder=4)
            window(ax, f"{who}, {plural(steps, 'Euler step')}")
        return figure

    def field(self, plt):
        """Where the velocities lead at several t, over their distance to the exact ones (else over their length).

        The student's velocity is the average one to the end of the path, (x − f)/t, and is compared with that.
        """
        figure, axes = plt.subplots(2, 4, figsize=(10.6, 5.6))
        side, generator = torch.linspace(-LIMIT, LIMIT, 61), torch.Generator().manual_seed(4)
        fine, coarse = torch.cartesian_prod(side, side), torch.cartesian_prod(side[2::5], side[2::5])
        for row, who in zip(axes, ("teacher", "student")):
            for ax, t in zip(row, (1.0, 0.75, 0.5, 0.25)):
                times, net = torch.full((len(fine),), t), getattr(self, who)
                with torch.no_grad():  # a picture
                    shade, arrows = net(fine, times), net(coarse, times[: len(coarse)])
                if self.exact:  # blank where p_t is below a thousandth of its peak: nothing is learned there
                    average = (fine - self.exact.flow_map(fine, times, 50)) / t
                    shade = shade - (self.exact(fine, times) if who == "teacher" else average)
                    density = self.exact.log_density(fine, times)
                    shade[density < density.max() - math.log(1000)] = math.nan
                shade = shade.norm(dim=1).reshape(61, 61).T.numpy()
                picture = ax.imshow(shade, "YlOrBr", origin="lower", extent=2 * (-LIMIT, LIMIT), vmin=0, vmax=2)
                x1 = torch.randn(200, 2, generator=generator)
                xt = scflow.interpolate(self.x0[:200], x1, times[:200])
                ax.scatter(*xt.T.numpy(), s=4, color=STUDENT, linewidths=0)
                arrows = -arrows.T.numpy()  # sampling follows −v
                ax.quiver(*coarse.T.numpy(), *arrows, color="black", scale=45, width=0.006)
                window(ax, f"{who}, t = {t:g}")
        label = "‖v − exact v‖ (student: average v)" if self.exact else "‖v‖"
        figure.colorbar(picture, ax=axes, shrink=0.7, label=label, extend="max")
        return figure

    def losses(self, plt):
        """Losses and gradient norms over training, and the losses by t at its end."""
        figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.7))
        for prefix, ax in (("", axes[0]), ("norm_", axes[1])):
            for name, colour in LOSS_COLOURS.items():
                rows = [r for r in self.journal.rows if r["stage"] == "student" and prefix + name in r]
                width = 1 if prefix else max(1, min(15, len(rows) // 4))  # the losses of single batches are noisy
                if rows:
                    mean = np.convolve([r[prefix + name] for r in rows], np.ones(width) / width, "valid")
                    steps = [r["step"] for r in rows][(width - 1) // 2 :][: len(mean)]
                    ax.plot(steps, mean, ".-" if prefix else "-", color=colour, label=name, lw=1.6)
            for end in np.cumsum([p.steps for p in self.schedule])[:-1]:
                ax.axvline(end, color=GREY, ls=":", lw=1)
        edges, values = self.losses_by_t()
        for name, value in values.items():
            axes[2].stairs(value, edges, baseline=None, color=LOSS_COLOURS[name], label=name, lw=1.8)
        axes[0].set(title="losses (running mean)", xlabel="student update")
        axes[0].set_yscale("symlog", linthresh=0.01)
        axes[1].set(title="gradient norm of each weighted loss", xlabel="student update", yscale="log")
        axes[2].set(title="losses by t, at the end", xlabel="t", yscale="log")
        for ax in axes:
            ax.legend(fontsize=8, ncols=2)
        return figure

    def losses_by_t(self, bins=10, n=2000):
        """Mean teacher and student losses in equal bins of t: edges (bins+1,), {name: [value per bin]}."""
        generator, values, edges = torch.Generator().manual_seed(5), {}, np.linspace(0, 1, bins + 1)
        phase = replace(self.schedule[0], self_source="student", self_form="x0")
        weights = dict(consistency=1, bi=1, self=1, adv=0)
        for low in edges[:-1]:
            x0, x1 = self.data.sample(n, generator)[0], torch.randn(n, 2, generator=generator)
            t = float(low) + torch.rand(n, generator=generator) / bins
            with torch.no_grad():  # a measurement
                losses, _ = scflow.distill_losses(self, x0, x1, t, phase, weights, generator)
                v = self.teacher(scflow.interpolate(x0, x1, t), t)
            for name, value in {"flow": scflow.flow_matching_loss(v, x0, x1), **losses}.items():
                values.setdefault(name, []).append(value.item())
        return edges, values

    def critic(self, plt):
        """The discriminator at four moments: orange it takes for data, purple for samples."""
        frames, side = self.journal.frames, self.journal.grid[:48, 1].numpy()
        figure, axes = plt.subplots(1, 4, figsize=(11, 3.1))
        for ax, i in zip(axes, np.linspace(0, len(frames) - 1, 4).round().astype(int)):
            critic, levels = frames[i]["critic"].float().numpy().reshape(48, 48).T, np.linspace(-1.5, 1.5, 13)
            picture = ax.contourf(side, side, critic, levels, cmap="PuOr_r", extend="both")
            ax.contour(side, side, critic, [0], colors="black", linewidths=0.8)
            cloud(ax, frames[i]["samples"][0].float(), f"after {plural(frames[i]['step'], 'update')}", "black", 3)
        figure.colorbar(picture, ax=axes, shrink=0.8, label="D(x)", ticks=[-1.5, 0, 1.5])
        return figure

    def gif(self, plt):
        """distillation.gif: samples of 1, 2 and 4 steps while the student is trained."""
        from matplotlib.animation import FuncAnimation, PillowWriter

        figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.8), dpi=90, layout="none")  # it must not move
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.8, wspace=0.03)

        def draw(frame):
            for ax, steps, x in zip(axes, (1, 2, 4), frame["samples"].float()):
                ax.clear()
                cloud(ax, self.x0, "", "#dddddd", 2)
                cloud(ax, x, plural(steps, "step"), by_angle(self.journal.noise), 5)
            figure.suptitle(f"student after {plural(frame['step'], 'update')}", fontsize=12)

        film = FuncAnimation(figure, draw, self.journal.frames + 8 * self.journal.frames[-1:])  # it ends on a pause
        film.save(path := self.folder / "distillation.gif", PillowWriter(fps=6))
        return path

    def draw(self, which, gif=False):
        """Draw "none", "basic" or "all" of the figures into the folder; returns their paths."""
        plt = drawing()
        paths, basic, more = [], [self.hero, self.steps], [self.paths, self.field, self.losses, self.critic]
        for number, picture in enumerate({"none": [], "basic": basic, "all": basic + more}[which], 1):
            paths.append(self.folder / f"{number}_{picture.__name__}.png")
            write_figure(paths[-1], picture(plt))
        paths += [self.gif(plt)] if gif else []
        plt.close("all")
        return paths


# ═══ 6. Ablation ════════════════════════════════════════════════════════════════════════════
# A row is a name, its flags, and the row it is compared with. All rows of "main" but one take about the same time.

MAIN = {
    "consistency": ("--preset consistency", ""),
    "+ truncation": ("--preset consistency --tau 0.4", "consistency"),
    "+ adversarial": ("--preset paper --lambda-self 0 --lambda-bi 0 --student-steps 1450", "+ truncation"),
    "+ self-correction": ("--preset paper --lambda-bi 0 --student-steps 1200", "+ adversarial"),
    "paper": ("--preset paper", "+ self-correction"),  # + bidirectional
    "paper − truncation": ("--preset paper --tau 0", "paper"),
    "paper − adversarial": ("--preset paper --lambda-adv 0 --student-steps 1600", "paper"),
    "paper − self-correction": ("--preset paper --lambda-self 0 --student-steps 1330", "paper"),
    # The best of as many trials of each (results/tuning.md): over all step counts, and at one step.
    "consistency, δ 0.2": ("--preset consistency --delta 0.2", "consistency"),
    "consistency, δ 0.02, lr 8e-3": ("--preset consistency --delta 0.02 --student-lr 8e-3", "consistency"),
    "paper, λ_self 1": ("--preset paper --lambda-self 1", "consistency"),
    "paper, λ_self 3": ("--preset paper --lambda-self 3", "paper"),
    "paper, λ_self 3, x̂₀ of EMA": ("--preset paper --lambda-self 3 --self-source ema", "consistency"),
    "two_phase": ("--preset two_phase", "paper, λ_self 1"),  # the default, in 0.6 of the time
    "two_phase, as long": ("--preset two_phase --student-steps 1720 260", "consistency, δ 0.02, lr 8e-3"),
}
SWEEPS = {"paper": ("--preset paper", "")} | {  # one setting of the paper's at a time, as many updates
    f"{name} {value}": (f"--preset paper {flags.format(value)}", "paper")
    for name, flags, values in (
        ("λ_self", "--lambda-self {}", "0 0.03 0.3 1 3 10"),
        ("τ", "--tau {}", "0 0.1 0.2 0.6"),
        ("δ", "--delta {}", "0.02 0.05 0.2 0.5"),
        ("target EMA", "--target-ema {}", "0 0.99"),
        ("distance", "--distance {}", "squared"),
        ("softplus, R1", "--adversarial softplus --r1 {}", "0.1 1"),
        ("half-time start of", "--warmup-{} 550", "adv self bi"),
        ("self-correction,", "--self-correction {}", "fresh free"),
        ("teacher", "--teacher {}", "exact"),
    )
    for value in values.split()
}
PHASE1 = "--preset consistency --lambda-adv 0.1 --delta 0.05 --at-one 0.125 --student-lr 8e-3"
RECIPE = {  # one setting of this project's schedule at a time
    "two_phase": ("--preset two_phase", ""),
    "phase 1 alone, as long": (f"{PHASE1} --student-steps 1150", "two_phase"),
} | {
    name: (f"--preset two_phase {flags}", "two_phase")
    for name, flags in {
        "phase 1 of 500": "--student-steps 500 150",
        "phase 1 of 2000": "--student-steps 2000 150",
        "phase 2 of 75": "--student-steps 1000 75",
        "phase 2 of 300": "--student-steps 1000 300",
        "phase 1, τ 0.4": "--tau 0.4 0",
        "phase 1, λ_adv 0": "--lambda-adv 0 0.02",
        "phase 1, none at t = 1": "--at-one 0 0.5",  # the critic's rows are a pass of their own
        "phase 2, landing points": "--self-form x0",
        "phase 2, none at t = 1": "--at-one 0.125 0",
        "phase 2, x̂₀ of the student": "--self-source student",
        "phase 2, x̂₀ of its average": "--self-source ema",
        "phase 2, consistency kept": "--lambda-consistency 1 --delta 0.05",
        "teacher exact": "--teacher exact",
    }.items()
}
GROUPS = {"main": MAIN, "sweeps": SWEEPS, "recipe": RECIPE}


@dataclass(frozen=True)
class Ablate:
    """Which runs are compared; lists are separated by commas, rows by spaces."""

    rows: tuple = option(("main",), f"groups ({', '.join(GROUPS)}), rows by name, or your own: flags in quotes")
    datasets: str = option("8gaussians,25gaussians,checkerboard,spirals", "data sets, or all")
    seeds: str = option("0,1,2,3,4", "seeds")
    flags: str = option("", "further flags of every run, in quotes")
    samples: int = option(20000, "points in the evaluation")
    quick: bool = option(False, "one data set and seed, 6000 samples, where nothing else is asked for")
    workers: int = option(os.cpu_count() or 1, "runs side by side, one thread each")
    runs: str = option("runs/ablate", "folder of the runs, one for each set of flags; finished runs are read back")
    out: str = option("results/ablation", "path of the results, without .csv, .md and .png")


def chosen_rows(names):
    """{row: (flags, the row it is compared with)} of the names of groups or rows, or lines of flags."""
    every, rows = {name: row for group in GROUPS.values() for name, row in group.items()}, {}
    for name in names:
        require(name in GROUPS or name in every or name.startswith("-"), f"no row {name!r}: see toy_2d.py, section 6")
        own = {name: every.get(name, (name, next(iter(rows), "")))}
        rows |= GROUPS.get(name, own)
    return rows


def ablate_cell(argv):
    """One run of the ablation, in a process of its own; one that diverges is reported, not hidden."""
    torch.set_num_threads(1)
    run, settings, schedule = configure(argv)
    try:
        return train(replace(run, resume=Path(run.out, "config.json").exists()), settings, schedule)[1]
    except FloatingPointError as error:
        return dict(dataset=run.dataset, seed=run.seed, teacher=run.teacher, rows=[], failure=str(error))


def ablate_command(argv):
    """Run rows of settings × data sets × seeds side by side; write every measure, tables, tests and figures."""
    given = cli(argv, ablate_command.__doc__, Ablate)[0]
    quick = dict(datasets="8gaussians", seeds="0", samples=6000) if given.get("quick") else {}
    settings = Ablate(**quick | given)
    rows, donors, waves = chosen_rows(settings.rows), {}, ([], [])
    names = list(DATASETS) if settings.datasets == "all" else settings.datasets.split(",")
    for name, seed, (label, (flags, _)) in itertools.product(names, settings.seeds.split(","), rows.items()):
        mixture, flags = isinstance(dataset(name), GaussianMixture), f"{flags} {settings.flags}"
        out = Path(settings.runs, "-".join([*re.findall(r"[\w.]+", flags), Path(name).stem, seed]))
        cell = ["--dataset", name, "--seed", seed, "--samples", str(settings.samples), "--out", str(out), "--quiet"]
        cell += shlex.split(flags)
        run, teacher, _ = configure(cell)  # this and `dataset` complain before the first run starts
        if run.teacher == "exact" and not mixture:
            continue  # a row that this data set cannot have
        key = (name, seed, run.teacher, teacher, run.width, run.depth)
        first = donors.setdefault(key, out) == out  # a teacher is trained once, and serves the runs of the second wave
        waves[not first].append((label, cell if first else [*cell, "--teacher-from", str(donors[key])]))
    require(any(waves), "--teacher exact needs a mixture, and there is none among the data sets")
    with (
        ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=sum(map(len, waves)), desc="runs") as bar,
    ):
        done = []
        for wave in waves:
            for (label, _), metrics in zip(wave, pool.map(ablate_cell, [cell for _, cell in wave])):
                done.append((label, metrics))
                bar.update()
    Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    results = Ablation(rows, done)
    write_csv(f"{settings.out}.csv", results.records)
    command = f"`{shlex.join(['python', 'toy_2d.py', 'ablate', *argv])}`"
    legend = """Energy distance ×10³ by Euler evaluations, then by re-noising. Gap: RMS from one-step to last sample.
On mixtures, map error: RMS from one-step to exact sample; path error: RMS from f(x_t,t) to f*(x_t,t)."""
    lines = [command, "", legend, *results.table(settings), "", *results.tests(), ""]
    write_text(f"{settings.out}.md", text := "\n".join(lines))
    print(text, *results.draw(settings.out), sep="\n")


def paired(a, b):
    """How b compares with a, both {(data set, seed): value}: the ratio of the means, how many pairs fall, and p.

    p is that of Wilcoxon's signed-rank statistic among 20,000 random choices of the signs, two-sided.
    """
    pairs = sorted(a.keys() & b.keys())
    if len(pairs) < 2:
        return ""
    x, y = (np.array([v[k] for k in pairs]) for v in (a, b))
    ranks = np.sign(y - x) * (1 + np.abs(y - x).argsort().argsort())
    chance = np.random.default_rng(0).choice([-1, 1], (20000, len(pairs))) @ ranks
    p = (1 + (np.abs(chance) >= abs(ranks.sum())).sum()) / 20001
    return f"×{y.mean() / x.mean():.2f}, {(y < x).sum()}/{len(pairs)}, {p:.2g}"


class Ablation:
    """The results of an ablation: one record per row, data set, seed, solver and count; tables and figures of them."""

    def __init__(self, rows, done, solver="euler"):
        self.rows = {"teacher": "", "exact velocity": ""} | {row: other for row, (_, other) in rows.items()}
        self.done = [m for _, m in done if m["rows"]]
        self.failed = [f"Failed: {row}, {m['dataset']}, {m['failure']}." for row, m in done if not m["rows"]]
        self.cells = {}  # (row, data set, solver, NFE): {seed: record}; teachers are shared, and stand once
        for row, m in done:
            for r in m["rows"]:
                who = row if r["who"] == "student" else "exact velocity" if m["teacher"] == "exact" else "teacher"
                more = {"path_error": m.get("path_error")} if who == row else {}
                seeds = self.cells.setdefault((who, m["dataset"], r["solver"], r["nfe"]), {})
                seeds.setdefault(m["seed"], {"row": who, "dataset": m["dataset"], "seed": m["seed"], **r, **more})
        self.records = [record for seeds in self.cells.values() for record in seeds.values()]
        self.floors = {m["dataset"]: {k: 1e3 * v for k, v in m["floor"].items()} for m in self.done}
        self.counts = sorted({r["nfe"] for r in self.records if r["who"] == "student"})
        few, many = self.counts[0], self.counts[-1]
        self.columns = {f"{n:g}": (solver, n, "energy", 1e3) for n in sorted({r["nfe"] for r in self.records})}
        self.columns |= {f"re-noising {n}": ("renoise", n, "energy", 1e3) for n in self.counts[1:]}
        self.columns |= {f"gap at {many}": (solver, many, "gap", 1)}
        self.columns |= {k.replace("_", " "): (solver, few, k, 1) for k in ("map_error", "path_error", "coverage")}
        self.columns = {k: v for k, v in self.columns.items() if any(self.values(row, None, k) for row in self.rows)}

    def values(self, row, name, column):
        """{(data set, seed): value} of a row in a column of the table; `name` is a data set, or None for all."""
        solver, nfe, key, scale = self.columns[column]
        cells = {n: self.cells.get((row, n, solver, nfe), {}) for n in self.floors if name in (None, n)}
        found = {(n, seed): r.get(key) for n, seeds in cells.items() for seed, r in seeds.items()}
        return {k: scale * v for k, v in found.items() if v is not None}

    def median(self, row, name, column):
        """The median of a row over seeds, not a number if there is none."""
        return np.median([*self.values(row, name, column).values()] or [math.nan])

    def table(self, settings):
        """Lines of Markdown: every row on every data set, mean ± sd over seeds."""
        machines = "; ".join({m["machine"]: 0 for m in self.done})
        yield f"Mean ± sd over seeds {settings.seeds}; {settings.samples} samples; {machines}."
        yield from ["", *self.failed, ""] if self.failed else [""]
        yield f"| data set (noise floor) | row | {' | '.join(self.columns)} |"
        yield "|---" * (2 + len(self.columns)) + "|"
        groups = {name: f"{name} ({floor['mean']:.2f} ± {floor['sd']:.2f})" for name, floor in self.floors.items()}
        groups |= {None: f"mean of {len(groups)}"} if len(groups) > 1 else {}
        for name, row in itertools.product(groups, self.rows):
            cells = []
            for column, (*_, scale) in self.columns.items():
                found, digits = self.values(row, name, column), 2 if scale > 1 else 3
                v = [np.mean([v for (_, s), v in found.items() if s == seed]) for seed in {s: 0 for _, s in found}]
                cells.append(f"{np.mean(v):.{digits}f}" if v else "")
                cells[-1] += f" ± {np.std(v, ddof=1):.{digits}f}" if len(v) > 1 else ""
            if any(cells):
                yield f"| {groups[name]} | {row} | {' | '.join(cells)} |"

    def tests(self):
        """Lines of Markdown: each row against another, paired by data set and seed, if there are two or more pairs."""
        compared = {
            (row, other): [paired(self.values(other, None, c), self.values(row, None, c)) for c in self.columns]
            for row, other in self.rows.items()
        }
        if any(map(any, compared.values())):
            yield "Each row against another, in pairs of the same data set and seed: ratio of the means; in how many"
            yield from ["pairs it is lower; two-sided p of the signed ranks.", ""]
            yield from [f"| row | against | {' | '.join(self.columns)} |", "|---" * (2 + len(self.columns)) + "|"]
            yield from (f"| {' | '.join([*names, *cells])} |" for names, cells in compared.items() if any(cells))

    def draw(self, out, label=lambda n: plural(n, "evaluation")):
        """OUT.png: median and range of each row; and OUT-frontier.png, what λ_self trades, if it was swept."""
        plt = drawing()
        rows = [r for r in self.rows if any(self.values(r, None, f"{n:g}") for n in self.counts)]
        size = (2.8 + 2.4 * len(self.floors), 1.5 + 0.32 * len(rows))
        figure, axes = plt.subplots(1, len(self.floors), figsize=size, sharex=True, sharey=True, squeeze=False)
        for ax, (name, floor) in zip(axes[0], self.floors.items()):
            ax.axvspan(floor["mean"] - 2 * floor["sd"], floor["mean"] + 2 * floor["sd"], color="#dddddd", lw=0)
            for n, colour, marker in zip(self.counts, (GREY, "#E69F00", RENOISE, STUDENT), "os^D"):
                values = [[*self.values(row, name, f"{n:g}").values()] or [math.nan] for row in rows]
                values = [np.minimum(v, 2500) for v in values]  # what ran away is on the right edge
                middle = np.array([np.median(v) for v in values])
                reach = np.abs([[f(v) for v in values] for f in (np.min, np.max)] - middle)
                ax.errorbar(middle, range(len(rows)), xerr=reach, fmt=marker, color=colour, label=label(n))
            ax.set_xscale("symlog", linthresh=1)
            ax.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])
            ax.minorticks_off()
            ax.set(title=name, xlabel="energy distance × 10³", xlim=(-0.5, 2500), ylim=(len(rows) - 0.5, -0.5))
            ax.set_yticks(range(len(rows)), rows)
            ax.grid(axis="y", color="#eeeeee")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(self.counts))
        figure.savefig(f"{out}.png", dpi=100)
        swept = {"paper": scflow.SCHEDULES["paper"][0].lambda_self}
        swept |= {row: float(row.split()[1]) for row in rows if row.startswith("λ_self")}
        names = [n for n in self.floors if "path error" in self.columns and self.values(rows[-1], n, "path error")]
        if len(swept) == 1 or not names:
            return [f"{out}.png"]
        figure, axes = plt.subplots(1, len(names), figsize=(1 + 4 * len(names), 4), sharey=True, squeeze=False)
        gap, line = f"gap at {self.counts[-1]}", sorted(swept, key=swept.get)
        for ax, name in zip(axes[0], names):
            kept = [row for row in line if self.median(row, name, "map error") < 1]  # the others ran away
            for error, colour, marker in (("map error", TEACHER, "o"), ("path error", STUDENT, "s")):
                x, y = ([self.median(row, name, column) for row in kept] for column in (gap, error))
                ax.plot(x, y, color=colour, marker=marker, label=f"λ_self: {error}")
                for row, *place in zip(kept, x, y):
                    if swept[row] in (0, 0.3, 1, 3, 10):  # what lies between is too close for a label
                        ax.annotate(f"{swept[row]:g}", place, xytext=(6, 2), textcoords="offset points", fontsize=9)
                if "two_phase" in rows:
                    place = self.median("two_phase", name, gap), self.median("two_phase", name, error)
                    ax.plot(*place, "*", color=colour, ms=14, label=f"two_phase: {error}")
            ax.set(title=name, xlabel=gap, xlim=(0, None), ylim=(0, None))
        axes[0, 0].set_ylabel("distance to the exact map")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(f"{out}-frontier.png", dpi=100)
        return [f"{out}.png", f"{out}-frontier.png"]


# ═══ 7. What else the same time buys ════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Bench:
    """What is compared; lists are separated by commas."""

    methods: str = option("all", "methods by their names in notebook 6")
    datasets: str = option("8gaussians,25gaussians,checkerboard,spirals", "data sets, or all")
    seeds: str = option("0,1,2", "seeds")
    shares: str = option("0.25,1", "parts of the default run's time that each method gets")
    samples: int = option(20000, "points in the evaluation")
    tune: bool = option(False, "all settings that were tried, instead of the chosen ones")
    growth: bool = option(False, "instead, cost and quality by batch, width, dimension and modes (notebook 8)")
    rounds: int = option(20, "turns in which the cost of an update is measured")
    workers: int = option(os.cpu_count() or 1, "runs side by side, one thread each")
    runs: str = option("runs/bench", "folder of the finished runs, which are read back")
    out: str = option("results/bench", "path of the results, without .csv, .md and .png")


def notebook(stem):
    """The source of a notebook as a module."""
    path = Path(__file__).with_name("notebooks") / f"{stem}.py"
    require(path.is_file(), f"this needs {path}, which is not there: call it in a clone")
    spec = importlib.util.spec_from_file_location(stem, path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def rate(device, work, amount, seconds=0.3):
    """How much of `amount` the device gets done in a second, when `work()` does it once."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    work(), wait()  # the first time warms up
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        work(), wait()
        count += 1
    return amount * count / spent


def matmul_rate(device):
    """FLOP/s of a square matrix product (bf16 on CUDA, else float32): the most that a network can hope for."""
    side, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (1024, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    return rate(device, lambda: a @ a, 2 * side**3)


def bench_cell(path, stem, cell):
    """One run that a notebook defines, in a process of its own; a finished one is read back."""
    torch.set_num_threads(1)
    if not path.exists():
        write_text(path, json.dumps(notebook(stem).measure(**cell)))
    return read_json(path, "machine")


def bench_cells(bench, stem, cells):
    """`bench_cell` of many, side by side."""
    slugs = ("-".join(re.findall(r"[\w.]+", " ".join(map(str, cell.values())))) for cell in cells)
    paths = [Path(bench.runs, f"{stem}-{slug}.json") for slug in slugs]
    for path in (Path(bench.out), paths[0]):
        path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(bench.workers, mp_context=get_context("spawn")) as pool:
        done = pool.map(bench_cell, paths, itertools.repeat(stem), cells)
        return list(tqdm(done, total=len(cells), desc="runs"))


def bench_command(argv):
    """Our update against a naive one, and our student against the method's relatives at equal time; or its growth."""
    bench = Bench(**cli(argv, bench_command.__doc__, Bench)[0])
    seeds, shares = (sorted(map(kind, text.split(","))) for kind, text in ((int, bench.seeds), (float, bench.shares)))
    command = f"`{shlex.join(['python', 'toy_2d.py', 'bench', *argv])}`"
    if bench.growth:
        module = notebook("08_growth")
        cells = [dict(case, seed=seed, samples=bench.samples) for case in module.CASES for seed in seeds]
        done = bench_cells(bench, "08_growth", [dict(cell, share=shares[-1]) for cell in cells])
        write_csv(f"{bench.out}.csv", [row for metrics in done for row in module.records(metrics)])
        write_text(f"{bench.out}.md", text := "\n".join([command, "", *module.growth_table(done), ""]))
        drawing()
        module.draw_growth(done).savefig(f"{bench.out}.png", dpi=80)
        return print(text, f"{bench.out}.png", sep="\n")
    module = notebook(source := "06_relatives")
    names = list(DATASETS) if bench.datasets == "all" else bench.datasets.split(",")
    chosen = list(module.METHODS) if bench.methods == "all" else bench.methods.split(",")
    for method in chosen:
        require(method in module.METHODS, f"no method {method!r}: there are {', '.join(module.METHODS)}")
    for name in names:
        dataset(name)  # complains before the first run starts
    methods = [(f"{k} {v}" if v else k, k, v) for k in chosen for v in (module.trials(k) if bench.tune else [{}])]
    rows, cells = [], []
    for name, seed, share, (row, method, trial) in itertools.product(names, seeds, shares, methods):
        rows += [row]
        cells += [dict(method=method, name=name, seed=seed, share=share, samples=bench.samples, **trial)]
    costs = [] if bench.tune else [*module.cost_table(bench.rounds), ""]
    done = list(zip(rows, bench_cells(bench, source, cells)))
    rows = {row: ("", "" if bench.tune or row == module.OURS else module.OURS) for row, _, _ in methods}
    by_steps = Ablation(rows, [(k, m) for k, m in done if m["share"] == shares[-1]], "own")
    one_step = [(k, m | dict(rows=[dict(m["rows"][0], nfe=m["share"], gap=None)])) for k, m in done]
    by_time = Ablation(rows, one_step, "own")
    write_csv(f"{bench.out}.csv", by_steps.records)
    write_csv(f"{bench.out}-time.csv", by_time.records)
    legends = (
        "Energy distance ×10³ by evaluations of the network in sampling, and gap: RMS from one-step to last sample.",
        f"Energy distance ×10³ of one step, by training time: {shares} of the default run's.",
    )
    lines = [command, "", *costs, *module.effort_table([(k, m) for k, m in done if m["share"] == shares[-1]]), ""]
    lines += [legends[0], *by_steps.table(bench), "", *by_steps.tests(), "", legends[1], *by_time.table(bench), ""]
    write_text(f"{bench.out}.md", text := "\n".join(lines))
    print(text, *by_steps.draw(bench.out), *by_time.draw(f"{bench.out}-time", "{:g} of the time".format), sep="\n")


# ═══ 8. Commands ════════════════════════════════════════════════════════════════════════════


def train_command(argv):
    """Train, distil, evaluate and draw one data set (the command when none is named; others: plot, ablate, bench)."""
    run, settings, schedule = configure(argv, train_command.__doc__)
    if getattr(dataset(run.dataset), "labels", None) is not None:
        return train_guided(run, settings, schedule)
    folder, metrics = train(run, settings, schedule)
    if not run.quiet:
        print(f"\n{run.dataset}, seed {run.seed}, schedule {run.preset!r}, {run.samples} samples\n{table(metrics)}\n")
    clock = time.perf_counter()
    figures = Pictures(folder).draw(run.figures, run.gif) if run.gif or run.figures != "none" else []
    if not run.quiet:
        seconds = metrics["seconds"] | {"figures": time.perf_counter() - clock}
        print("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
        print("files:   " + ", ".join(map(str, [folder / "student.pt", folder / "metrics.json", *figures])))


def train_guided(run, settings, schedule):
    """One teacher of a labelled data set, and a student for each guidance scale in a run folder of its own."""
    module, again = notebook("07_prompts_and_guidance"), run.resume or run.overwrite
    folder = Path(run.out or usual_folder(run.dataset, again))
    places = {scale: folder / f"guidance-{scale:g}" for scale in run.guidance}
    require(all(map(math.isfinite, places)) and len({*places.values()}) == len(run.guidance), "give different scales")
    require(run.figures != "all" and not run.gif, "of labelled data there is one figure, guidance.png")
    started = [path for path in places.values() if (path / "config.json").exists()]
    require(started or not run.resume, f"nothing to resume: {folder} holds no run of these scales")
    require(again or not started, f"{folder} exists: give --resume to go on with it, or --overwrite")
    donor = run.teacher_from
    for scale, path in places.items():
        own = replace(run, guidance=(scale,), out=str(path), resume=run.resume and path in started, teacher_from=donor)
        finished, _ = train(own, settings, schedule)
        donor = donor or str(finished)
    done = {
        path: read_json(path / "metrics.json", "guidance")
        for path in folder.glob("guidance-*/")
        if (path / "metrics.json").exists()
    }
    done = dict(sorted(done.items(), key=lambda item: item[1]["guidance"]["scale"]))  # of earlier calls too
    write_text(folder / "guidance.md", text := "\n".join(module.guidance_table([*done.values()])) + "\n")
    if run.figures != "none":
        drawing()
        write_figure(folder / "guidance.png", module.draw_guidance([*done]), 80)
    if not run.quiet:
        print(text, *sorted(map(str, folder.glob("guidance.*"))), sep="\n")


@dataclass(frozen=True)
class Plot:
    """What is drawn, and from where."""

    out: str = option("runs/8gaussians", "run folder")
    figures: str = option("basic", "figures to draw", choices=("none", "basic", "all"))
    gif: bool = option(False, "also draw a moving picture of the distillation")


def plot_command(argv):
    """Draw the figures of a finished run again, without training."""
    plot = Plot(**cli(argv, plot_command.__doc__, Plot)[0])
    for path in Pictures(plot.out).draw(plot.figures, plot.gif):
        print(path)


COMMANDS = {"train": train_command, "plot": plot_command, "ablate": ablate_command, "bench": bench_command}


def main(argv=None, commands=COMMANDS, default="train", program="toy_2d.py"):
    """Run a command; bad input is one line on stderr and exit code 2, a stop by Ctrl-C is 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name, code = argv.pop(0) if argv and argv[0] in commands else default, 2
    try:
        require(name, f"name a command: {', '.join(commands)} (each has --help)")
        return commands[name](argv) or 0
    except torch.cuda.OutOfMemoryError:
        text = "error: out of memory: lower the batch (--batch, --teacher-batch, --student-batch) or --size"
    except (ValueError, FloatingPointError, OSError) as error:
        text = f"error: {error}"
    except (Stopped, KeyboardInterrupt) as stop:
        text, code = str(stop) or "stopped: the same command with --resume goes on with what was saved", 130
    print(f"{program}: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
