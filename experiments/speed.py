"""How fast an update is: against one written naively, and against a matrix product of as many operations.

    python -m experiments.speed --points --out results/speed-points    the updates of toy_2d.py, one thread
    python -m experiments.speed                                        those of a small DiT on latents
    python -m experiments.speed --sizes S B --device cuda              larger ones, on a GPU
    python -m experiments.speed --plan --out results/plan              operations and memory of the GPU's presets

The variants of an update take turns in one process, so that what else the machine does slows all of them.
"""

import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import celeba_latent
import scflow
import toy_2d
from experiments import common
from scflow import Phase, TeacherSettings, require

# ═══ 1. Operations, and the most that a machine does of them ══════════════════════════════


def count_flops(function, *inputs) -> int:
    """Floating-point operations of one call, counted as it runs: matrix products, convolutions and attention."""
    # The counter does not see into the fused attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def rate(device: str, work, amount: float, seconds: float = 0.3) -> float:
    """How much of `amount` the device gets done in a second, when `work()` does it once."""
    work()  # the first time warms up
    wait(device)
    count = 0
    spent = 0.0
    start = time.perf_counter()
    while spent < seconds:
        work()
        wait(device)
        count += 1
        spent = time.perf_counter() - start
    return amount * count / spent


def matmul_rate(device: str) -> float:
    """FLOP/s of a square matrix product (bf16 on CUDA, else float32): the most that a network can hope for."""
    cuda = device.startswith("cuda")
    side = 8192 if cuda else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32)

    def product():
        a @ a

    return rate(device, product, 2 * side**3)


# ═══ 2. The updates that are timed ════════════════════════════════════════════════════════

FOREVER = 10**9  # updates: the loops are stopped from outside


@dataclass(frozen=True)
class Variant:
    """A way to compute an update."""

    precision: str = "auto"  # as in celeba_latent.place
    naive: bool = False  # one loss at a time, and no TF32
    compiled: bool = False


ON_CUDA = {
    "naive fp32": Variant("fp32", naive=True),
    "bf16 eager": Variant(),
    "ours": Variant(compiled=True),
}
ON_POINTS = {"naive fp32": Variant("fp32", naive=True), "ours": Variant()}
ON_CPU = {**ON_POINTS, "bf16": Variant("bf16")}


def one_loss_at_a_time(run, x0, x1, t, phase, weights, generator, cond=None):
    """The losses of `scflow.distill_losses` as one would first write them: no pass serves two of them."""
    state = generator.get_state()
    losses = {}
    x0_hat = None
    for name, weight in weights.items():
        if weight > 0:
            generator.set_state(state)  # the same draws for all
            alone = dict.fromkeys(weights, 0.0)
            alone[name] = weight
            found, judged = scflow.distill_losses(run, x0, x1, t, phase, alone, generator, cond)
            losses.update(found)
            if judged is not None:
                x0_hat = judged
    return losses, x0_hat


def compiling(loop):
    """A training loop whose networks are compiled after the first update: only then are all of them there."""
    for run in loop:
        if run.step == 1:
            for name in ("net", "teacher", "student", "target", "frozen", "critic"):
                if hasattr(run, name):
                    celeba_latent.compile_in_place(getattr(run, name))
        yield run


def training(settings, variant: Variant, net, critic, batch, device: str):
    """The loop that trains a teacher with TeacherSettings, or a student with a Phase."""
    generator = torch.Generator(device).manual_seed(0)
    if isinstance(settings, TeacherSettings):
        settings = replace(settings, teacher_steps=FOREVER)
        loop = scflow.train_teacher(net, batch, generator, settings)
    else:
        phase = replace(settings, steps=FOREVER)
        losses = one_loss_at_a_time if variant.naive else scflow.distill_losses
        loop = scflow.distill(net, critic, batch, generator, (phase,), loss_function=losses)
    return compiling(loop) if variant.compiled else loop


def point_updates(rows: int) -> dict:
    """{name: the settings of an update of toy_2d.py}: the teacher's, and each phase's of each preset."""
    updates = {"teacher": TeacherSettings(teacher_batch=rows or 512)}
    for preset, schedule in scflow.SCHEDULES.items():
        for i, phase in enumerate(schedule):
            if phase.self_source == "frozen":
                phase = replace(phase, self_source="ema")  # no phase comes before it here; it costs the same
            updates[f"{preset}, phase {i + 1}"] = replace(phase, batch=rows or phase.batch)
    return updates


def point_loop(settings, variant: Variant, device: str):
    """The training loop of a perceptron on eight Gaussians."""
    torch.manual_seed(0)
    net = scflow.MLP().to(device)
    critic = scflow.PointCritic().to(device)
    batch = toy_2d.batches(toy_2d.dataset("8gaussians").to(device))
    return training(settings, variant, net, critic, batch, device)


def latent_updates(rows: int) -> dict:
    """{name: the settings of an update on latents}: the teacher's, and one of the student with all four losses."""
    return {
        "teacher": TeacherSettings(teacher_batch=rows or 32, teacher_lr=1e-4),
        "student": Phase(batch=rows or 32, lr=1e-4),
    }


def latent_loop(size: str, settings, variant: Variant, device: str):
    """The training loop of a DiT on noise of the shape of a 256-pixel picture's latents."""
    torch.manual_seed(0)
    net = scflow.DiT((4, 32, 32), 2, **celeba_latent.SIZES[size])
    nn.init.normal_(net.head.weight, std=0.02)  # a GPU multiplies the zeros of a new network faster
    net = celeba_latent.place(net, device, variant.precision)
    critic = celeba_latent.place(scflow.LatentCritic(), device, variant.precision)

    def batch(n, generator):
        return torch.randn(n, 4, 32, 32, generator=generator, device=device), None

    return training(settings, variant, net, critic, batch, device)


def start_loop(network: str, settings, variant: Variant, device: str):
    """The training loop of "points", or of a DiT of some size."""
    if network == "points":
        return point_loop(settings, variant, device)
    return latent_loop(network, settings, variant, device)


def cases(asked) -> list[tuple]:
    """(network, name of the update, its settings) of all that is asked for."""
    if asked.points:
        return [("points", name, settings) for name, settings in point_updates(asked.batch).items()]
    found = []
    for size in asked.sizes:
        for name, settings in latent_updates(asked.batch).items():
            found.append((size, name, settings))
    return found


# ═══ 3. Turns ═════════════════════════════════════════════════════════════════════════════


def advance(loop, variant: Variant, updates: int, device: str) -> float:
    """Seconds of one update, over several in a row."""
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("highest" if variant.naive else "high")
        torch.backends.cudnn.allow_tf32 = not variant.naive
    else:
        torch.backends.cuda.enable_flash_sdp(variant.precision != "bf16")  # as celeba_latent.place does
    start = time.perf_counter()
    for _ in range(updates):
        next(loop)
    wait(device)
    return (time.perf_counter() - start) / updates


def compare(network: str, settings, variants: dict[str, Variant], asked) -> list[dict]:
    """The measures of each variant of an update, when they take turns."""
    device = asked.device
    flops = count_flops(next, start_loop(network, settings, Variant(), device))
    loops = {}
    start_up = {}
    seconds = {}
    for name, variant in variants.items():
        loops[name] = start_loop(network, settings, variant, device)
        start_up[name] = 2 * advance(loops[name], variant, 2, device)  # the second compiles
        seconds[name] = []
    forth = list(variants)
    back = forth[::-1]
    for _ in range(asked.rounds):
        for name in forth + back:
            seconds[name].append(advance(loops[name], variants[name], asked.updates, device))
    rows = []
    for name in variants:
        ratios = np.array(seconds["naive fp32"]) / seconds[name]
        low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9)).tolist()
        row = {"variant": name, "seconds": np.median(seconds[name]).item(), "flops": flops}
        row.update(ratio=middle, p10=low, p90=high, start_up=start_up[name])
        rows.append(row)
    return rows


# ═══ 4. A plan: what training on a GPU takes, counted on a CPU ════════════════════════════

LATENTS = {"128 px, TAEF2": (32, 16, 16), "256 px, sd-vae-ft-mse": (4, 32, 32)}
ROWS = 4  # of an update that is counted; operations and activations grow with the rows


def activation_bytes(function) -> int:
    """Bytes of all that autograd keeps during function(), each tensor once, weights not counted.

    What is freed before the end counts too, and a compiled network keeps less. So this is an upper bound.
    """
    kept = {}  # the memory itself, so that none is freed and given to another tensor

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # fake tensors have no address to tell them apart
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in kept.values())


def plan_row(size: str, latents: str, name: str, settings) -> dict:
    """Operations and memory of a training run with these settings, from one update of ROWS rows.

    It is counted on fake tensors: they have shapes and no numbers, so that nothing is computed.
    """
    no_check = mock.patch.object(scflow.Run, "check_finite", lambda run: None)  # there are no numbers to check
    with FakeTensorMode(allow_non_fake_inputs=True), no_check, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying a network asks for addresses
        return count_plan(size, latents, name, settings)


def count_plan(size: str, latents: str, name: str, settings) -> dict:
    """The same row, counted as an update runs."""
    net = scflow.DiT(LATENTS[latents], 2, **celeba_latent.SIZES[size])
    critic = scflow.LatentCritic(LATENTS[latents])
    for network in (net, critic):
        for part in network.modules():  # as celeba_latent.place does, which cannot move fake tensors
            part.precision = torch.bfloat16

    def batch(n, generator):
        return torch.randn(n, *LATENTS[latents], generator=generator), None

    if isinstance(settings, TeacherSettings):
        updates = settings.teacher_steps
        rows = settings.teacher_batch
        settings = replace(settings, teacher_batch=ROWS)
        copies = 5  # weights, gradient, two moments of Adam, average
        parameters = copies * count_parameters(net)
    else:
        updates = settings.steps
        rows = settings.batch
        source = "ema" if settings.self_source == "frozen" else settings.self_source  # no phase comes before it here
        settings = replace(settings, batch=ROWS, self_source=source, r1=0.0)  # the counter fails at R1
        copies = 8  # beside these the teacher, the target and the frozen copy
        parameters = copies * count_parameters(net) + 4 * count_parameters(critic)
    loop = training(settings, Variant(), net, critic, batch, "cpu")
    activations = activation_bytes(partial(next, loop))
    flops = count_flops(next, loop) / ROWS
    return {
        "size": size,
        "latents": latents,
        "update": name,
        "updates": updates,
        "rows": rows,
        "GFLOP a row": flops / 1e9,
        "PFLOP": flops * rows * updates / 1e15,
        "GB": (4 * parameters + activations * rows / ROWS) / 1e9,
    }


def count_parameters(net: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in net.parameters())


def cell(value: str | int | float) -> str:
    """What the table says: of a number with decimals the first three digits, as 8.48 or 1410."""
    if isinstance(value, float):
        return f"{float(f'{value:.3g}'):g}"
    return str(value)


def plan() -> list[str]:
    """The lines of a table: for each network of a GPU the training of its teacher, and both phases of its student."""
    lines = []
    for size, latents in (("S", "128 px, TAEF2"), ("S", "256 px, sd-vae-ft-mse"), ("B", "256 px, sd-vae-ft-mse")):
        first, last = celeba_latent.SCHEDULES["large"]
        trainings = {"teacher": celeba_latent.TEACHERS[size], "phase 1": first, "phase 2": last}
        for name, settings in trainings.items():
            row = plan_row(size, latents, name, settings)
            lines.append([cell(value) for value in row.values()])
    return common.markdown(list(row), lines)


PLAN = """Training with the presets for a GPU, counted on a CPU in bf16, not run. PFLOP: of all updates. GB: weights,
gradients, moments and averages in float32, and all that autograd keeps during an update, not compiled. R1 and the
closed form that a student starts with are not counted."""


# ═══ 5. The program ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Speed:
    """What is timed, and where."""

    points: bool = False  # the updates of toy_2d.py, one thread, in place of those on latents
    plan: bool = False  # operations and memory of the presets for a GPU; nothing is timed
    sizes: tuple = ("small",)  # networks of celeba_latent.py: small, S, B
    batch: int = 0  # rows per update; 0 is 32 latents, or as many points as toy_2d.py takes
    rounds: int = 5  # rounds; each times every variant, forth and back
    updates: int = 3  # updates at a time
    device: str = "cpu"  # cpu or cuda
    out: str = "results/speed"  # path of the results, without .md and .json

    def __post_init__(self):
        for size in self.sizes:
            require(size in celeba_latent.SIZES, f"no size {size!r}: there are {', '.join(celeba_latent.SIZES)}")
        for name, least in {"batch": 0, "rounds": 1, "updates": 1}.items():
            value = getattr(self, name)
            require(value >= least, f"{name} must be at least {least}, not {value}")
        toy_2d.check_device(self.device)


LEGEND = """Medians of {turns} turns, {machine}.
Ratio: the time of naive fp32 (one loss at a time) over that of the variant, and its tenth and ninetieth percent.
Share: the time of a square matrix product of as many operations (float32 on a CPU), over the time of the update.
Start: seconds of the first two updates; compiling is one of them.
The matrix product: {rate:.3g} TFLOP/s; from the first measurement to the last it moved by {drift:.0%}."""


def table(rows: list[dict], matmul: float) -> list[str]:
    """The measures as lines of Markdown."""
    lines = []
    for row in rows:
        milliseconds = cell(1e3 * row["seconds"])
        ratio = f"{row['ratio']:.2f} ({row['p10']:.2f} to {row['p90']:.2f})"
        gflop = f"{row['flops'] / 1e9:.4g}"
        share = f"{row['flops'] / matmul / row['seconds']:.1%}"
        start = f"{row['start_up']:.2g}"
        lines.append([row["network"], row["update"], row["variant"], milliseconds, ratio, gflop, share, start])
    return common.markdown(["network", "update", "variant", "ms", "ratio", "GFLOP", "share", "start"], lines)


def speed_command(argv: list[str]) -> None:
    """Time updates against naive ones, and against a matrix product of as many operations."""
    (given,) = toy_2d.cli(argv, speed_command.__doc__, Speed())
    asked = Speed(**given)
    device = asked.device
    common.open_out(asked.out)
    if asked.plan:
        common.write_report(asked.out, "experiments.speed", argv, [PLAN, "", *plan()])
        return
    variants = ON_CUDA if device.startswith("cuda") else ON_CPU
    if asked.points:
        torch.set_num_threads(1)
        variants = ON_POINTS
    before = matmul_rate(device)
    rows = []
    for network, update, settings in cases(asked):
        for measures in compare(network, settings, variants, asked):
            rows.append({"network": network, "update": update, **measures})
    after = matmul_rate(device)
    drift = abs(after / before - 1)
    text = LEGEND.format(turns=2 * asked.rounds, machine=toy_2d.machine(), rate=before / 1e12, drift=drift)
    content = {"asked": asdict(asked), "machine": toy_2d.machine(), "matmul": [before, after], "rows": rows}
    toy_2d.write_text(f"{asked.out}.json", json.dumps(content, indent=1))
    common.write_report(asked.out, "experiments.speed", argv, [text, "", *table(rows, before)])


def main(argv=None) -> int:
    """The command; bad input is one line on stderr and exit code 2."""
    return toy_2d.main(argv, {"speed": speed_command}, "speed", "experiments.speed")


if __name__ == "__main__":
    sys.exit(main())
