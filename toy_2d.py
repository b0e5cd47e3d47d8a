"""Self-corrected flow distillation in two dimensions: data, a run, its table and its figures.

    python toy_2d.py                                   eight Gaussians: teacher, student, table, figures
    python toy_2d.py --dataset checkerboard --seed 3
    python toy_2d.py --preset paper --lambda-self 2    the paper's joint losses, one weight changed
    python toy_2d.py plot --out runs/8gaussians --figures all --gif
    python toy_2d.py table --seeds 0 1 2 3 4           every data set and seed, side by side

A run folder holds config.json, teacher.pt, student.pt, metrics.json, log.csv and figures.
"""

import argparse
import csv
import json
import math
import os
import platform
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import scflow
from scflow import GaussianMixture, Phase, State, TeacherSettings, option, require

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
        shape = getattr(points, "shape", "an archive")
        require(len(shape) == 2 and shape[1] == 2, f"{path} must hold an array of shape (N, 2), not {shape}")
        require(np.issubdtype(points.dtype, np.number), f"{path} must hold numbers, not {points.dtype}")
        require(len(points) >= 100, f"{path} holds {len(points)} points; at least 100 are needed")
        require(np.isfinite(points).all(), f"{path} holds values that are not finite")
        points = torch.as_tensor(points, dtype=torch.float32)
        points = points - points.mean(0)
        radius = points.square().sum(1).mean().sqrt()
        require(radius > 0, f"{path} holds one point only, repeated")
        points = 2 * points / radius
        points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))]
        self.held_out, self.train = points.split([len(points) // 5, len(points) - len(points) // 5])

    def sample(self, n, generator=None, stratified=False):
        """Rows drawn with replacement from the training part; stratified: the held-out part, at most n of it."""
        if stratified:
            x0 = self.held_out[:n]
        else:
            x0 = self.train[torch.randint(len(self.train), (n,), generator=generator)]
        return x0, torch.zeros(len(x0), dtype=torch.int64)


def uniform(like, generator):
    return torch.rand(like.shape, generator=generator, device=like.device)


def normal(like, generator, columns=2):
    return torch.randn(*like.shape, columns, generator=generator, device=like.device)


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


def eight_gaussians():
    """Radius 2, s = 0.15: the data set of every first example."""
    return GaussianMixture(polar(torch.full((8,), 2.0), torch.arange(8) * math.pi / 4), 0.15)


def grid_of_gaussians():
    """5×5 with spacing 1, s = 0.1."""
    return GaussianMixture(torch.cartesian_prod(torch.arange(-2.0, 3), torch.arange(-2.0, 3)), 0.1)


DATASETS = {
    "8gaussians": eight_gaussians,
    "25gaussians": grid_of_gaussians,
    "checkerboard": lambda: Parts(8, checkerboard),
    "moons": lambda: Parts(2, moons),
    "spirals": lambda: Parts(2, spirals),
    "pinwheel": lambda: Parts(5, pinwheel),
    "rings": lambda: Parts(3, rings),
}


def dataset(name):
    """A data set by its name, or from a .npy file of points."""
    if name.endswith(".npy"):
        return Points(name)
    require(name in DATASETS, f"unknown data set {name!r}: choose {', '.join(DATASETS)}, or a .npy file of points")
    return DATASETS[name]()


# ═══ 2. Settings and flags ══════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Run:
    """What is run, and where it goes."""

    dataset: str = option("8gaussians", f"{', '.join(DATASETS)}, or a .npy file of (N,2) points")
    seed: int = option(0, "seed of the weights, the data and the evaluation noise")
    preset: str = option("two_phase", "schedule of the losses", choices=tuple(scflow.SCHEDULES))
    teacher: str = option("learned", "teacher network, or the closed-form velocity", choices=("learned", "exact"))
    width: int = option(128, "hidden units of a layer of the networks")
    depth: int = option(3, "hidden layers of the networks")
    samples: int = option(6000, "points that are sampled and compared in the evaluation")
    device: str = option("cpu", "cpu, cuda or mps (the matrices are tiny: a CPU is rarely slower)")
    save_every: int = option(500, "updates between checkpoints")
    out: str = option("", "run folder [runs/DATASET, numbered]")
    resume: bool = option(False, "go on with an interrupted run (give the same command)")
    overwrite: bool = option(False, "start afresh in a folder that exists")
    figures: str = option("basic", "figures to draw", choices=("none", "basic", "all"))
    gif: bool = option(False, "also draw a moving picture of the distillation")
    quiet: bool = option(False, "no progress bars and no table")


# What does not change the numbers may differ between a run and its resumption.
COSMETIC = ("out", "resume", "overwrite", "figures", "gif", "quiet", "save_every")

# Where a data set wants more than the defaults (found on seeds from 100 up).
TUNED = {}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        """Say what is wrong and stop with exit code 2."""
        raise ValueError(f"{message} (--help lists the options)")


def cli(argv, description, *settings, lists=(Phase,)):
    """Turn the fields of settings classes into flags, and `argv` into one dictionary of given values per class.

    Fields of the classes in `lists` take one value, or one per phase of the schedule.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for cls in settings:
        group = parser.add_argument_group(cls.__name__, cls.__doc__)
        for f in fields(cls):
            how = dict(dest=f"{cls.__name__}.{f.name}", default=argparse.SUPPRESS)
            how["help"] = f.metadata["help"] + ("" if f.default in ("", False) else f" [{f.default}]")
            if isinstance(f.default, bool):
                how["action"] = "store_true"
            else:
                how |= dict(type=type(f.default), choices=f.metadata.get("choices"), metavar=f.name.upper())
                how |= dict(nargs="+") if cls in lists else {}
            if how.get("choices"):
                how["metavar"] = "|".join(how["choices"])
            group.add_argument("--" + f.metadata.get("flag", f.name.replace("_", "-")), **how)
    given = vars(parser.parse_args(argv))
    return [{f.name: given[k] for f in fields(c) if (k := f"{c.__name__}.{f.name}") in given} for c in settings]


def configure(run, teacher, phase):
    """Dictionaries of given values → (Run, TeacherSettings, schedule), with the data set's own defaults in between."""
    tuned = TUNED.get(run.get("dataset", Run.dataset), {})
    run = Run(**{k: v for k, v in tuned.items() if k in Run.__dataclass_fields__} | run)
    teacher = TeacherSettings(**{k: v for k, v in tuned.items() if k.startswith("teacher_")} | teacher)
    for name in ("width", "depth", "samples", "save_every"):
        require(getattr(run, name) > 0, f"{name} must be positive, not {getattr(run, name)}")
    require(not (run.resume and run.overwrite), "--resume and --overwrite contradict each other")
    schedule = scflow.SCHEDULES[run.preset]
    phase = dict(phase)
    steps = phase.pop("steps", [])
    if not steps and "stretch" in tuned:
        steps = [round(tuned["stretch"] * sum(p.steps for p in schedule))]
    if len(steps) == 1 and len(schedule) > 1:  # one number is the whole length, shared out as in the preset
        require(steps[0] > 0, f"student-steps must be positive, not {steps[0]}")
        schedule = scflow.rescale(schedule, steps[0])
    elif steps:
        phase["steps"] = steps
    for name, values in phase.items():
        flag = Phase.__dataclass_fields__[name].metadata.get("flag", name.replace("_", "-"))
        require(
            len(values) in (1, len(schedule)), f"--{flag} takes one value, or one for each of {len(schedule)} phases"
        )
        values = values * len(schedule) if len(values) == 1 else values
        schedule = tuple(replace(p, **{name: v}) for p, v in zip(schedule, values))
    scflow.check_schedule(schedule)
    return run, teacher, schedule


# ═══ 3. The run folder ══════════════════════════════════════════════════════════════════════


def write_text(path, text):
    """Replace a text file atomically."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def open_folder(out, name, resume, overwrite, config):
    """The run folder as a Path: a new one, or with `resume` the existing one, whose settings must be the same.

    Without `out` it is runs/NAME, then runs/NAME-2 and so on; `resume` takes the last of them.
    """
    if not out:
        numbered = [Path("runs", name)] + [Path("runs", f"{name}-{i}") for i in range(2, 10_000)]
        free = next(i for i, folder in enumerate(numbered) if not folder.exists())
        out = numbered[max(free - 1, 0) if resume or (overwrite and free) else free]
    out = Path(out)
    file = out / "config.json"
    if resume:
        require(file.is_file(), f"nothing to resume: {out} holds no config.json")
        stored = json.loads(file.read_text(encoding="utf-8"))
        changed = [k for k in config if stored.get(k) != config[k]]
        require(not changed, f"--resume with other settings than {out} was started with: {', '.join(changed)}")
        return out
    require(overwrite or not out.exists(), f"{out} exists: give --resume to go on with it, or --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in ("teacher.pt", "student.pt", "metrics.json", "log.csv"):
            (out / old).unlink(missing_ok=True)
        write_text(file, json.dumps(config, indent=1))
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from None
    return out


class Stopped(Exception):
    """Ctrl-C was pressed; the run was saved."""


def follow(loop, total, name, save, every, quiet=False, done=0):
    """Iterate over a training loop with a progress bar; call `save(state)` now and then, at the end and at Ctrl-C.

    Ctrl-C takes effect between two updates, so that what is saved is always whole.
    """
    pressed = []
    try:
        before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    except ValueError:  # not in the main thread: leave signals alone
        before = None
    try:
        with tqdm(total=total, initial=done, desc=name, disable=quiet, mininterval=0.2, dynamic_ncols=True) as bar:
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
        if before is not None:
            signal.signal(signal.SIGINT, before)


class Journal:
    """What the figures need of a run's past: losses every 10 updates, and samples and critic at 40 moments."""

    def __init__(self, stored=None):
        self.rows, self.frames = (stored["rows"], stored["frames"]) if stored else ([], [])
        self.noise = torch.randn(600, 2, generator=torch.Generator().manual_seed(1))
        side = torch.linspace(-3.2, 3.2, 48)
        self.grid = torch.cartesian_prod(side, side)

    def note(self, stage, state, total):
        """Record a State of the teacher or the student."""
        if state.step % 10 == 0 or state.step == 1:
            self.rows.append({"stage": stage, "step": state.step, **state.losses})
            self.rows[-1] |= {f"norm_{k}": v for k, v in state.grad_norms.items()} if state.step % 50 == 1 else {}
        if stage == "student" and (state.step == 1 or state.step % max(total // 40, 1) == 0):
            device = next(state.ema.parameters()).device
            steps = [scflow.sample(state.ema, self.noise.to(device), n) for n in (1, 2, 4)]
            with torch.no_grad():  # a picture of the critic
                critic = state.disc(self.grid.to(device))
            frame = {"step": state.step, "samples": torch.stack(steps).cpu().half(), "critic": critic.cpu().half()}
            self.frames.append(frame)

    def stored(self):
        """As a checkpoint keeps it."""
        return {"rows": self.rows, "frames": self.frames}

    def write(self, path):
        """log.csv: one row per record, losses unweighted, gradient norms weighted."""
        names = ["stage", "step", "flow", *scflow.LOSSES, "disc", "r1", *(f"norm_{k}" for k in scflow.LOSSES)]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)


# ═══ 4. A run: teacher, student, measures ═══════════════════════════════════════════════════


def loader(data):
    """The `batch(n, generator)` that scflow's loops call."""
    return lambda n, generator: (data.sample(n, generator)[0], None)


def start_generator(run):
    """The one generator of a run; the initial weights get the same seed."""
    torch.manual_seed(run.seed)
    return torch.Generator(run.device).manual_seed(run.seed)


def get_teacher(run, settings, data, generator, folder, journal):
    """Train the teacher, or with an exact one the student's starting point, or take up where it was left.

    Returns the averaged network and leaves teacher.pt in the folder.
    """
    exact = run.teacher == "exact"
    if exact:  # an oracle has no weights to start the student from: a short regression on it has
        settings = replace(settings, teacher_steps=max(settings.teacher_steps // 3, 1))
    path, total = folder / "teacher.pt", settings.teacher_steps
    net = scflow.MLP(2, run.width, run.depth).to(run.device)
    content = scflow.read(path, run.device) if run.resume and path.exists() else None
    if content:
        journal.rows[:] = content["journal"]["rows"]
        net.load_state_dict(content["weights"])
        generator.set_state(content["state"]["generator"].cpu())
    loop = scflow.train_teacher(
        net, loader(data), generator, settings, data if exact else None, content and content["state"]
    )

    def save(state):
        scflow.save(path, state.ema, kind="teacher", state=state.state_dict(), journal=journal.stored())

    done = content["state"]["step"] if content else 0
    for state in follow(loop, total, "teacher", save, run.save_every, run.quiet, done):
        journal.note("teacher", state, total)
        net = state.ema
    return net


def get_student(run, schedule, teacher, start, data, generator, folder, journal):
    """Distil the student, or take up where it was left; returns its sampling average and leaves student.pt."""
    path, total = folder / "student.pt", sum(p.steps for p in schedule)
    disc = scflow.PointDiscriminator(2, run.width, run.depth).to(run.device)
    content = scflow.read(path, run.device) if run.resume and path.exists() else None
    if content:
        journal.rows[:], journal.frames[:] = content["journal"]["rows"], content["journal"]["frames"]
        start.load_state_dict(content["weights"])
    loop = scflow.distill(
        teacher, disc, loader(data), generator, schedule, start, content and content["state"], norms_every=50
    )
    keep = {"arch": teacher.arch, "weights": teacher.state_dict()}

    def save(state):
        extra = dict(kind="student", state=state.state_dict(), journal=journal.stored(), teacher=keep)
        scflow.save(path, state.ema, **extra)
        journal.write(folder / "log.csv")

    done, net = content["state"]["step"] if content else 0, start
    for state in follow(loop, total, "student", save, run.save_every, run.quiet, done):
        journal.note("student", state, total)
        net = state.ema
    return net


def reference_of(data, n):
    """The fixed reference sample of a data set, stratified, as an EnergyDistance."""
    return scflow.EnergyDistance(*data.sample(n, torch.Generator().manual_seed(10**6), stratified=True))


FLOORS = {}  # noise floors already computed by this process


def noise_floor(name, data, n):
    """Mean and sd of the energy distance of 20 true samples of n points to the reference."""
    if (name, n) not in FLOORS:
        generator = torch.Generator().manual_seed(10**6 + 1)
        FLOORS[name, n] = scflow.noise_floor(reference_of(data, n), lambda: data.sample(n, generator)[0])
    return FLOORS[name, n]


def evaluate(run, data, teacher, student):
    """The rows of metrics.json: each network and solver at each number of steps, from the same noise."""
    energy = reference_of(data, run.samples)
    generator = torch.Generator().manual_seed(2 * 10**6 + run.seed)
    noise = torch.randn(run.samples, 2, generator=generator)
    fresh, _ = data.sample(run.samples, generator)
    mixture = data if isinstance(data, GaussianMixture) else None
    truth = mixture.flow_map(noise[:2000], torch.ones(2000)[: run.samples]) if mixture else None
    rows = []
    for who, net, solver, counts in (
        ("teacher", teacher, "euler", (1, 2, 4, 8, 50)),
        ("student", student, "euler", (1, 2, 4, 8)),
        ("student", student, "renoise", (1, 2, 4, 8)),
    ):
        for steps in counts:
            x = scflow.sample(net, noise, steps, solver, generator=generator)
            one = x if steps == 1 else one
            row = dict(who=who, solver=solver, steps=steps, nfe=scflow.nfe(steps, solver), energy=energy(x))
            row["sliced_w2"] = scflow.sliced_w2(x, fresh, generator=torch.Generator().manual_seed(0))
            if solver != "renoise":  # fresh noise has no pairing to compare
                row["gap"] = scflow.rms_distance(x, one)
                row["map_error"] = scflow.rms_distance(x[:2000], truth) if mixture else None
            if mixture:
                row["coverage"], row["precision"] = scflow.coverage_and_precision(x, mixture)
            rows.append(row)
    return rows


def machine():
    """What the figures were computed on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        processor=platform.machine(),
        gpu=gpu,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def train(run, teacher_settings, schedule):
    """One run from start to metrics.json; returns its folder and the metrics."""
    data = dataset(run.dataset)
    exact = run.teacher == "exact"
    require(not exact or isinstance(data, GaussianMixture), f"--teacher exact needs a mixture; {run.dataset} is none")
    require(run.device.split(":")[0] in ("cpu", "cuda", "mps"), f"unknown device {run.device!r}: cpu, cuda or mps")
    require(not run.device.startswith("cuda") or torch.cuda.is_available(), "no CUDA device here: use --device cpu")
    require(run.device != "mps" or torch.backends.mps.is_available(), "no MPS device here: use --device cpu")
    config = {k: v for k, v in asdict(run).items() if k not in COSMETIC}
    config |= dict(teacher_settings=asdict(teacher_settings), schedule=[asdict(p) for p in schedule])
    folder = open_folder(run.out, Path(run.dataset).stem, run.resume, run.overwrite, config)
    if not run.quiet:
        print(f"writing to {folder}")
    generator, journal = start_generator(run), Journal()
    if isinstance(data, GaussianMixture):
        data.to(run.device)
    clock = [time.perf_counter()]
    try:
        net = get_teacher(run, teacher_settings, data, generator, folder, journal)
        clock.append(time.perf_counter())
        teacher = data if exact else net
        student = get_student(run, schedule, teacher, net, data, generator, folder, journal)
    except Stopped:
        again = "the same command with --resume" + ("" if run.out else f" --out {folder}")
        raise Stopped(f"stopped and saved in {folder}; {again} goes on") from None
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {folder} keeps the last checkpoint before it") from None
    clock.append(time.perf_counter())
    data, teacher, student = dataset(run.dataset), teacher.to("cpu"), student.to("cpu")
    rows = evaluate(run, data, teacher, student)
    floor = noise_floor(run.dataset, data, run.samples)
    clock.append(time.perf_counter())
    seconds = {k: round(b - a, 2) for k, a, b in zip(("teacher", "student", "evaluation"), clock, clock[1:])}
    metrics = dict(dataset=run.dataset, seed=run.seed, preset=run.preset, teacher=run.teacher, samples=run.samples)
    metrics |= dict(floor=dict(mean=floor[0], sd=floor[1]), rows=rows, seconds=seconds, machine=machine())
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    return folder, metrics


def table(metrics):
    """The measures of a run as text: rows are networks, columns numbers of network evaluations."""
    floor, rows = metrics["floor"], metrics["rows"]
    columns = sorted({r["nfe"] for r in rows})
    lines = [f"{'network evaluations':34}" + "".join(f"{n:>10}" for n in columns)]
    for title, key, scale in (
        (f"energy distance ×10³ (floor {1e3 * floor['mean']:.2f} ± {1e3 * floor['sd']:.2f})", "energy", 1e3),
        ("consistency gap (RMS to one step)", "gap", 1),
        ("flow-map error (RMS to the exact map)", "map_error", 1),
    ):
        shown = {(r["who"], r["solver"], r["nfe"]): r[key] for r in rows if r.get(key) is not None}
        if not shown:
            continue
        lines.append(title)
        for who, solver in dict.fromkeys(k[:2] for k in shown):
            label = f"  {who}, " + {"euler": "Euler", "renoise": "re-noising (β = 1)"}[solver]
            cells = (shown.get((who, solver, n)) for n in columns)
            lines.append(f"{label:34}" + "".join(f"{'' if c is None else f'{scale * c:.3f}':>10}" for c in cells))
    return "\n".join(lines)


# ═══ 5. Figures ═════════════════════════════════════════════════════════════════════════════
# matplotlib is imported where it is used: a run without figures does without it.

TEACHER, STUDENT, RENOISE, GREY = "#D55E00", "#0072B2", "#009E73", "#999999"  # Okabe–Ito: safe for the colour-blind
CYCLE = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7", "#0072B2")
LIMIT = 3.2  # data sets have RMS radius near 2
LOSS_COLOURS = dict(flow="#D55E00", consistency="#0072B2", bi="#56B4E9", self="#009E73", adv="#CC79A7", disc="#E69F00")


def pyplot():
    """matplotlib.pyplot in the one style of all figures, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 110, "font.size": 11, "axes.titlesize": 12, "legend.frameon": False})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True})
    return plt


def by_angle(noise):
    """A colour per noise point (n,2): its direction on a colour wheel, paler near the centre."""
    from matplotlib.colors import LinearSegmentedColormap

    angle = torch.atan2(noise[:, 1], noise[:, 0]) / (2 * math.pi) % 1
    return LinearSegmentedColormap.from_list("wheel", CYCLE)(angle.numpy())


def cloud(ax, x, title, colours=GREY, size=3):
    """A scatter of points (n,2) in the common window, without ticks."""
    ax.scatter(x[:, 0], x[:, 1], s=size, c=colours, linewidths=0, rasterized=True)
    window(ax, title)


def window(ax, title=""):
    """The common square window around data and noise, framed, without ticks."""
    ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal")
    ax.set_title(title)
    for spine in ax.spines.values():
        spine.set(visible=True, color="#cccccc")


class Pictures:
    """The figures of one run folder, from its checkpoints and metrics alone."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        require((folder / "student.pt").exists(), f"no finished run in {folder}: it holds no student.pt")
        require((folder / "metrics.json").exists(), f"the run in {folder} has not finished: give --resume to it first")
        self.metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.schedule = tuple(Phase(**p) for p in config["schedule"])
        content = scflow.read(folder / "student.pt")
        self.journal = Journal(content["journal"])
        self.student = scflow.load(folder / "student.pt")
        self.teacher = scflow.build(content["teacher"]["arch"])
        self.teacher.load_state_dict(content["teacher"]["weights"])
        self.target = scflow.build(content["arch"])
        self.target.load_state_dict(content["state"]["parts"]["target"])
        self.data = dataset(config["dataset"])
        self.exact = self.data if isinstance(self.data, GaussianMixture) else None
        generator = torch.Generator().manual_seed(3)
        self.noise = torch.randn(2000, 2, generator=generator)
        self.x0 = self.data.sample(2000, generator)[0]

    def quality(self, who, solver="euler"):
        """{NFE: energy distance ×10³} of one network and solver."""
        rows = (r for r in self.metrics["rows"] if (r["who"], r["solver"]) == (who, solver))
        return {r["nfe"]: 1e3 * r["energy"] for r in rows}

    def hero(self, plt):
        """Noise, data, teacher and student samples: the colour of a point is that of its noise."""
        figure, axes = plt.subplots(2, 4, figsize=(10, 5.6))
        colours = by_angle(self.noise)
        cloud(axes[0, 0], self.noise, "noise (colour key)", colours)
        cloud(axes[0, 1], self.x0, "data")
        places = [("teacher", 1), ("teacher", 50), ("student", 1), ("student", 2), ("student", 4), ("student", 8)]
        for ax, (who, steps) in zip([*axes[0, 2:], *axes[1]], places):
            x = scflow.sample(getattr(self, who), self.noise, steps)
            cloud(ax, x, f"{who}, {steps} step{'s' * (steps > 1)}", colours)
            value = f"ED·10³ = {self.quality(who)[steps]:.1f}".replace("-", "−")
            ax.text(0.5, 0.02, value, transform=ax.transAxes, ha="center", fontsize=9, color="#444444")
        return figure

    def steps(self, plt):
        """Quality against network evaluations, with the noise floor as a band."""
        figure, ax = plt.subplots(figsize=(6, 3.9))
        mean, sd = (1e3 * self.metrics["floor"][k] for k in ("mean", "sd"))
        ax.axhspan(mean - 2 * sd, mean + 2 * sd, color="#dddddd", label="noise floor ± 2 sd", lw=0)
        for who, solver, colour, marker, label in (
            ("teacher", "euler", TEACHER, "o", "teacher, Euler"),
            ("student", "euler", STUDENT, "s", "student, Euler"),
            ("student", "renoise", RENOISE, "^", "student, re-noising"),
        ):
            values = self.quality(who, solver)
            ax.plot(values.keys(), values.values(), color=colour, marker=marker, label=label, lw=2, ms=7)
        ax.set_xscale("log", base=2)
        ax.set_yscale("symlog", linthresh=2)
        ax.set_xticks([1, 2, 4, 8, 50], ["1", "2", "4", "8", "50"])
        ax.minorticks_off()
        ax.set(xlabel="network evaluations", ylabel="energy distance × 10³", yticks=[-1, 0, 1, 2, 10, 100, 1000])
        ax.set_yticklabels(["−1", "0", "1", "2", "10", "100", "1000"])
        ax.legend(fontsize=10)
        return figure

    def paths(self, plt):
        """From noise (grey) to data (black): the teacher's curved paths, the student's in eight steps and in one."""
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.7))
        noise = self.noise[:160]
        for ax, who, steps in zip(axes, ("teacher", "student", "student"), (50, 8, 1)):
            x, path = scflow.sample(getattr(self, who), noise, steps, trajectory=True)  # (n,2), (steps+1,n,2)
            for i, colour in enumerate(by_angle(noise)):
                ax.plot(*path[:, i].T, color=colour, lw=0.8, alpha=0.8)
            ax.scatter(*noise.T, s=6, color="#bbbbbb", zorder=3)
            ax.scatter(*x.T, s=8, color="black", zorder=4)
            window(ax, f"{who}, {steps} Euler step{'s' * (steps > 1)}")
        return figure

    def field(self, plt):
        """Velocity at several t, over the distance to the exact field where that is known (else its own length)."""
        times = (1.0, 0.75, 0.5, 0.25)
        figure, axes = plt.subplots(2, 4, figsize=(10.6, 5.4))
        side = torch.linspace(-LIMIT, LIMIT, 61)
        fine = torch.cartesian_prod(side, side)  # (61²,2)
        coarse = torch.cartesian_prod(side[2::5], side[2::5])
        generator = torch.Generator().manual_seed(4)
        for row, who in zip(axes, ("teacher", "student")):
            net = getattr(self, who)
            for ax, t in zip(row, times):
                with torch.no_grad():  # a picture
                    v, arrows = net(fine, torch.full((len(fine),), t)), net(coarse, torch.full((len(coarse),), t))
                    error = (v - self.exact(fine, torch.full((len(fine),), t)) if self.exact else v).norm(dim=1)
                picture = ax.imshow(
                    error.reshape(61, 61).T, origin="lower", extent=(-LIMIT, LIMIT) * 2, cmap="Blues",
                    vmin=0, vmax=2 if self.exact else 4,
                )  # fmt: skip
                xt = scflow.interpolate(self.x0[:300], torch.randn(300, 2, generator=generator), torch.full((300,), t))
                ax.scatter(*xt.T, s=3, color=TEACHER, linewidths=0)
                ax.quiver(*coarse.T, *-arrows.T, color="black", scale=40, width=0.006)  # sampling follows −v
                window(ax, f"{who}, t = {t:g}")
        label = "‖v − v*‖, the exact velocity" if self.exact else "‖v‖"
        figure.colorbar(picture, ax=axes, shrink=0.7, label=label, extend="max")
        return figure

    def losses(self, plt):
        """Losses and gradient norms over training, and the losses by t at its end."""
        figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.7))
        rows = [r for r in self.journal.rows if r["stage"] == "student"]
        for name, colour in LOSS_COLOURS.items():
            for ax, key in ((axes[0], name), (axes[1], f"norm_{name}")):
                steps, values = (
                    zip(*[(r["step"], r[key]) for r in rows if key in r]) if any(key in r for r in rows) else ((), ())
                )
                if steps:
                    width = min(15 if ax is axes[0] else 1, len(values))  # single batches are noisy: show a running mean
                    smooth = np.convolve(values, np.ones(width) / width, "valid")
                    ax.plot(steps[width // 2 :][: len(smooth)], smooth, color=colour, label=name, lw=1.6)
        axes[0].set(title="losses (running mean)", xlabel="student update", yscale="symlog")
        axes[0].set_yscale("symlog", linthresh=0.01)
        axes[1].set(title="gradient norm of each weighted loss", xlabel="student update", yscale="log")
        edges, by_t = loss_by_t(self)
        for name, values in by_t.items():
            axes[2].step(edges, [values[0], *values], color=LOSS_COLOURS[name], label=name, lw=1.8)
        axes[2].set(title="losses by t, trained networks", xlabel="t", xlim=(0, 1), yscale="log")
        for ax in axes:
            ax.legend(fontsize=8, ncols=2)
        for phase in np.cumsum([p.steps for p in self.schedule])[:-1]:
            for ax in axes[:2]:
                ax.axvline(phase, color=GREY, ls=":", lw=1)
        return figure

    def critic(self, plt):
        """What the discriminator has seen at four moments: orange is taken for data, purple for samples."""
        frames = self.journal.frames
        chosen = [frames[round(i * (len(frames) - 1) / 3)] for i in range(4)]
        figure, axes = plt.subplots(1, 4, figsize=(11, 3.2))
        side = self.journal.grid[:48, 1]
        for ax, frame in zip(axes, chosen):
            levels = np.linspace(-1.5, 1.5, 13)
            critic = frame["critic"].float().reshape(48, 48).T
            picture = ax.contourf(side, side, critic, levels, cmap="PuOr_r", extend="both")
            ax.contour(side, side, critic, [0], colors="black", linewidths=0.8)
            cloud(ax, frame["samples"][0].float(), f"after {frame['step']} updates", "black", 2)
        figure.colorbar(picture, ax=axes, shrink=0.8, label="D(x)", ticks=[-1.5, 0, 1.5])
        return figure

    def gif(self, plt):
        """distillation.gif: samples of 1, 2 and 4 steps while the student is trained."""
        from matplotlib.animation import FuncAnimation, PillowWriter

        plt.rcParams["figure.constrained_layout.use"] = False  # the layout must not move between frames
        figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.8), dpi=90)
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.8, wspace=0.03)
        colours = by_angle(self.journal.noise)

        def draw(frame):
            for ax, steps, x in zip(axes, (1, 2, 4), frame["samples"].float()):
                ax.clear()
                cloud(ax, self.x0, "", "#dddddd", 2)
                cloud(ax, x, f"{steps} step{'s' * (steps > 1)}", colours, 5)
            figure.suptitle(f"student after {frame['step']} updates", fontsize=12)

        frames = self.journal.frames + [self.journal.frames[-1]] * 8
        FuncAnimation(figure, draw, frames).save(self.folder / "distillation.gif", PillowWriter(fps=6))
        plt.close(figure)

    def draw(self, which, gif=False):
        """Draw "none", "basic" or "all" of the figures into the folder; returns their paths."""
        plt, paths = pyplot(), []
        basic, more = (self.hero, self.steps), (self.paths, self.field, self.losses, self.critic)
        for number, picture in enumerate({"none": (), "basic": basic, "all": basic + more}[which], 1):
            paths.append(self.folder / f"{number}_{picture.__name__}.png")
            figure = picture(plt)
            figure.savefig(paths[-1], dpi=130)
            plt.close(figure)
        if gif:
            self.gif(plt)
            paths.append(self.folder / "distillation.gif")
        return paths


def loss_by_t(pictures, bins=10, n=2000):
    """Mean of the teacher's and each student loss in equal bins of t: (edges (bins+1,), {name: [value per bin]})."""
    generator, values = torch.Generator().manual_seed(5), {}
    nets = argparse.Namespace(teacher=pictures.teacher, student=pictures.student, target=pictures.target)
    nets.source, nets.disc = pictures.student, None
    phase = replace(pictures.schedule[0], self_form="x0")
    weights = dict(consistency=1, bi=1, self=1, adv=0)
    for i in range(bins):
        x0 = pictures.data.sample(n, generator)[0]
        x1, t = torch.randn(n, 2, generator=generator), (i + torch.rand(n, generator=generator)) / bins
        with torch.no_grad():  # a measurement
            losses, _ = scflow.distill_losses(nets, x0, x1, t, phase, weights, generator)
            v = pictures.teacher(scflow.interpolate(x0, x1, t), t)
        for name, value in (losses | {"flow": scflow.flow_matching_loss(v, x0, x1)}).items():
            values.setdefault(name, []).append(value.item())
    return np.linspace(0, 1, bins + 1), values


# ═══ 6. Commands ════════════════════════════════════════════════════════════════════════════


def train_command(argv):
    """Train, distil, evaluate and draw one data set (the command when none is named)."""
    run, teacher_settings, schedule = configure(*cli(argv, train_command.__doc__, Run, TeacherSettings, Phase))
    folder, metrics = train(run, teacher_settings, schedule)
    figures = Pictures(folder).draw(run.figures, run.gif) if run.figures != "none" or run.gif else []
    if not run.quiet:
        print(f"\n{run.dataset}, seed {run.seed}, schedule {run.preset!r}, {run.samples} samples\n{table(metrics)}\n")
        print("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in metrics["seconds"].items()))
        print("figures: " + (", ".join(str(f) for f in figures) or "none"))


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


@dataclass(frozen=True)
class Table:
    """Which runs are tabulated."""

    datasets: str = option(",".join(DATASETS), "data sets, separated by commas")
    presets: str = option("two_phase", "schedules, separated by commas")
    seeds: str = option("0,1,2,3,4", "seeds, separated by commas")
    samples: int = option(20000, "points in the evaluation")
    workers: int = option(os.cpu_count() or 1, "runs side by side, one thread each")
    runs: str = option("runs/table", "folder of the run folders; finished ones are not repeated")
    results: str = option("results", "folder of the tables")


def table_cell(argv):
    """One run of the table in a process of its own; a finished one is read back."""
    torch.set_num_threads(1)
    run, teacher_settings, schedule = configure(*cli(argv, "", Run, TeacherSettings, Phase))
    run = replace(run, resume=Path(run.out, "config.json").exists())
    if run.resume and Path(run.out, "metrics.json").exists():
        config = json.loads(Path(run.out, "config.json").read_text(encoding="utf-8"))
        if config["schedule"] == [asdict(p) for p in schedule] and config["samples"] == run.samples:
            return json.loads(Path(run.out, "metrics.json").read_text(encoding="utf-8"))
    return train(run, teacher_settings, schedule)[1]


def table_command(argv):
    """Run data sets × presets × seeds side by side, and write results/table.csv and table.md (mean ± sd over seeds)."""
    known = cli(argv, table_command.__doc__, Table)[0]
    settings = Table(**known)
    cells = []
    for name in settings.datasets.split(","):
        for preset in settings.presets.split(","):
            for seed in settings.seeds.split(","):
                out = Path(settings.runs, f"{Path(name).stem}-{preset}-{seed}")
                flags = f"--dataset {name} --preset {preset} --seed {seed} --samples {settings.samples} --out {out}"
                cells.append([*flags.split(), "--quiet"])
                configure(*cli(cells[-1], "", Run, TeacherSettings, Phase))  # complain before the first run starts
    done = []
    with ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(table_cell, cell) for cell in cells]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="runs"):
            done.append(job.result())
            write_table(done, settings, argv)
    print(write_table(done, settings, argv))


def write_table(done, settings, argv):
    """table.csv (every cell) and table.md (energy distance ×10³, mean ± sd over seeds); returns the latter's text."""
    groups = {}
    for m in sorted(done, key=lambda m: m["seed"]):
        groups.setdefault((m["dataset"], m["preset"]), []).append(m)
    lines = [
        f"`python toy_2d.py table {' '.join(argv)}`".replace(" `", "`"),
        "",
        f"Energy distance ×10³ at so many network evaluations, mean ± sd over seeds {settings.seeds}; "
        f"{settings.samples} samples; one thread a run; machine: {json.dumps(done[0]['machine'])}.",
        "",
        "| data set (noise floor) | schedule | network | 1 | 2 | 4 | 8 | 50 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = {name: i for i, name in enumerate(settings.datasets.split(","))}
    flat = []
    for (name, preset), runs in sorted(groups.items(), key=lambda g: (order.get(g[0][0], 99), g[0][1])):
        floor = runs[0]["floor"]
        for who, solver in (("teacher", "euler"), ("student", "euler"), ("student", "renoise")):
            cells = []
            for nfe in (1, 2, 4, 8, 50):
                rows = [(m["seed"], r) for m in runs for r in m["rows"]]
                rows = [(s, r) for s, r in rows if (r["who"], r["solver"], r["nfe"]) == (who, solver, nfe)]
                flat += [dict(dataset=name, preset=preset, seed=s, **r) for s, r in rows]
                values = 1e3 * np.array([r["energy"] for _, r in rows])
                sd = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.2f}{sd}" if len(values) else "")
            title = f"{name} ({1e3 * floor['mean']:.2f} ± {1e3 * floor['sd']:.2f})"
            lines.append("| " + " | ".join([title, preset, f"{who}, {solver}", *cells]) + " |")
    folder = Path(settings.results)
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    write_text(folder / "table.md", text)
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        names = list(dict.fromkeys(k for row in flat for k in row))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)
    return text


COMMANDS = {"train": train_command, "plot": plot_command, "table": table_command}


def main(argv=None):
    """Run a command; bad input is one line on stderr and exit code 2, a stop by Ctrl-C is 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS[argv.pop(0)] if argv and argv[0] in COMMANDS else train_command
    try:
        command(argv)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"toy_2d.py: error: {error}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as stop:
        print(stop or "stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
