"""Weights of few bits: what does rounding do to a student that is asked once, and to a teacher asked fifty times?

    python -m experiments.bits                            in the plane
    python -m experiments.bits faces --run runs/demo      drawn faces, of a run of the demo

Teacher and student of toy_2d.py, their weights rounded to 8, 6, 4 and 3 bits. One scale for each output of a layer,
so that its largest weight is kept.
"""

import copy
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import celeba_latent
import scflow
import toy_2d
from celeba_latent import features_of
from experiments import common, tell_apart
from scflow import require

# ═══ 1. Rounding ══════════════════════════════════════════════════════════════════════════


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight (out,in) on a grid of 2^bits − 1 values, symmetric about zero; a scale for each output."""
    largest = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / largest
    return (weight / scale.clamp(min=1e-12)).round() * scale


def linear_layers(net: nn.Module) -> list[nn.Linear]:
    """The layers that are rounded, in the order in which they are asked."""
    return [part for part in net.modules() if isinstance(part, nn.Linear)]


@torch.no_grad()  # nothing is trained here
def round_network(net: nn.Module, bits: int, seen: tuple[Tensor, Tensor] | None = None) -> nn.Module:
    """A copy of the network with rounded weights. Biases stay.

    seen  points (N,…) and times (N,) that the network is asked about. If given, the copy is calibrated on them: layer
          after layer, the bias makes up for the mean error of what the layer puts out, given the rounded ones before.
    """
    small = copy.deepcopy(net)
    for layer, exact in zip(linear_layers(small), linear_layers(net)):
        layer.weight.copy_(rounded(layer.weight, bits))
        if seen is not None:
            layer.bias += mean_output(net, exact, seen) - mean_output(small, layer, seen)
    return small


def mean_output(net: nn.Module, layer: nn.Linear, seen: tuple[Tensor, Tensor]) -> Tensor:
    """The mean (out,) of what a layer of the network puts out."""
    found = []
    hook = layer.register_forward_hook(lambda layer, inputs, output: found.append(output.mean(0)))
    net(*seen)
    hook.remove()
    return found[0]


# ═══ 2. One run ═══════════════════════════════════════════════════════════════════════════

SAMPLERS = {"teacher, 50 steps": 50, "student, 1 step": 1, "student, 4 steps": 4}


@torch.no_grad()  # nothing is trained here
def asked_about(net: nn.Module, noise: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The points (N,…) and times (N,) of all steps of the sampler from noise (n,…): N = steps·n."""
    _, path = scflow.sample(net, noise, steps, trajectory=True)  # (steps+1,n,…)
    times = 1 - torch.arange(steps) / steps
    return path[:-1].flatten(0, 1), times.repeat_interleave(len(noise))


def rounded_networks(net: nn.Module, bits: list[int], seen: tuple[Tensor, Tensor]) -> dict[str, nn.Module]:
    """{number of bits: network}: as it is with 32, and with fewer both as rounded and as calibrated."""
    networks = {"32": net}
    for b in bits:
        networks[f"{b}"] = round_network(net, b)
        networks[f"{b}, calibrated"] = round_network(net, b, seen)
    return networks


def measure(dataset: str, seed: int, bits: list[int], samples: int) -> dict:
    """Energy distances of each sampler, with each number of bits, as rounded and calibrated; and the floor."""
    run = toy_2d.Run(dataset=dataset, seed=seed, quiet=True)
    data = toy_2d.prepare(run)
    teacher = toy_2d.fit_teacher(run, data, scflow.TeacherSettings())
    student = toy_2d.fit_student(run, data, teacher, scflow.SCHEDULES["two_phase"]).ema
    energy = toy_2d.reference(dataset, samples)
    generator = torch.Generator().manual_seed(10**6 + seed)
    noise = torch.randn(samples, 2, generator=generator)
    others = torch.randn(1000, 2, generator=generator)  # to calibrate with
    floor = toy_2d.floor_of(dataset, samples)
    found = {"dataset": dataset, "seed": seed, "floor": floor["mean"], "floor sd": floor["sd"]}
    for who, steps in SAMPLERS.items():
        net = teacher if who.startswith("teacher") else student
        seen = asked_about(net, others, steps)
        for name, small in rounded_networks(net, bits, seen).items():
            x = scflow.sample(small, noise, steps)
            found[f"{who}, {name}"] = energy(x)
            found[f"gap of {who}, {name}"] = toy_2d.rms_distance(x, scflow.sample(small, noise))
    found["machine"] = toy_2d.machine()
    return found


ENDS = ("", ", calibrated")


def table(results: list[dict], bits: list[int], key: str = "", scale: float = 1e3) -> list[str]:
    """Lines of Markdown: a row for each sampler on each data set, a column for each number of bits.

    key  "gap of " for gaps instead of energy distances.
    """
    rows = []
    for dataset in dict.fromkeys(run["dataset"] for run in results):
        runs = [run for run in results if run["dataset"] == dataset]
        for who in SAMPLERS:
            if key and SAMPLERS[who] == 1:
                continue  # one step has no gap
            for end in ENDS:
                cells = [dataset, who + end, common.mean_sd([run[f"{key}{who}, 32"] for run in runs], scale)]
                for b in bits:
                    cells.append(common.mean_sd([run[f"{key}{who}, {b}{end}"] for run in runs], scale))
                rows.append(cells)
    titles = [toy_2d.plural(b, "bit") for b in bits]
    return common.markdown(["data set", "sampler", "float32", *titles], rows)


def draw(results: list[dict], bits: list[int], path: str) -> None:
    """Energy distances against bits, means over seeds; a panel for each data set."""
    plt = toy_2d.drawing()
    datasets = list(dict.fromkeys(run["dataset"] for run in results))
    figure, axes = plt.subplots(1, len(datasets), figsize=(3 * len(datasets), 3.4), sharey=True, squeeze=False)
    for ax, dataset in zip(axes[0], datasets):
        runs = [run for run in results if run["dataset"] == dataset]
        noise = 1e3 * (runs[0]["floor"] + 2 * runs[0]["floor sd"])
        ax.axhspan(0.05, max(noise, 0.05), color="#dddddd", lw=0, label="within the noise")
        for who, colour in zip(SAMPLERS, (toy_2d.TEACHER, toy_2d.STUDENT, toy_2d.RENOISE)):
            for end, style in zip(ENDS, ("o-", "s--")):
                means = []
                for b in bits:
                    mean = sum(run[f"{who}, {b}{end}"] for run in runs) / len(runs)
                    means.append(max(1e3 * mean, 0.06))
                ax.plot(range(len(bits)), means, style, color=colour, ms=4, label=who + end)
        ax.set_yscale("log")
        ax.set_xticks(range(len(bits)), bits)
        ax.set(title=dataset, xlabel="bits of a weight", ylim=(0.05, None))
    axes[0, 0].set_ylabel("energy distance × 10³")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    toy_2d.write_figure(path, figure, 80)
    plt.close(figure)


# ═══ 3. The program ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Bits:
    """What is measured, and where it goes."""

    datasets: tuple = ("8gaussians", "25gaussians", "checkerboard", "spirals")  # data sets by name
    seeds: tuple = (0, 1, 2)  # seeds
    bits: tuple = (8, 6, 4, 3)  # bits of a weight
    samples: int = 10000  # points in the evaluation
    workers: int = os.cpu_count() or 1  # runs side by side, one thread each
    runs: str = "runs/bits"  # folder of the finished runs, which are read back
    out: str = "results/bits"  # path of the results, without .md, .csv and .png

    def __post_init__(self):
        common.check_values(self, "datasets", "seeds", "bits")
        require(all(2 <= b <= 16 for b in self.bits), f"a weight has 2 to 16 bits here: {self.bits}")
        require(self.samples >= 50, f"samples must be at least 50, not {self.samples}")
        require(self.workers >= 1, f"workers must be at least 1, not {self.workers}")


LEGEND = """Energy distance ×10³ of networks whose weights have so many bits, mean ± sd over the seeds. Calibrated: the
biases make up for mean errors of what each layer puts out."""


def bits_command(argv: list[str]) -> None:
    """Round the weights of teacher and student to a few bits, and measure their samples."""
    settings = common.settings_of(argv, bits_command.__doc__, Bits(), {})
    cells = []
    paths = []
    for dataset in common.dataset_names(settings.datasets):
        for seed in settings.seeds:
            cell = {"dataset": dataset, "seed": seed, "bits": list(settings.bits), "samples": settings.samples}
            mark = common.fingerprint(cell, scflow.TeacherSettings(), scflow.SCHEDULES["two_phase"])
            cells.append(cell)
            paths.append(Path(settings.runs, f"{common.slug(dataset, seed)}-{mark}.json"))
    common.open_out(settings.out)
    results = common.run_cells(measure, cells, paths, settings.workers)
    toy_2d.write_csv(f"{settings.out}.csv", results)
    lines = [LEGEND, common.about_runs(settings, results), "", *table(results, settings.bits), ""]
    lines += ["Gap: RMS from the one-step to the last sample of the same noise and network.", ""]
    lines += table(results, settings.bits, "gap of ", 1)
    draw(results, settings.bits, f"{settings.out}.png")
    common.write_report(settings.out, "experiments.bits", argv, lines)


# ═══ 4. Faces ═════════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Faces:
    """Whose networks are rounded, and where it goes."""

    run: str = "runs/demo"  # run folder of the demo
    bits: tuple = (8, 6, 4, 3)  # bits of a weight
    samples: int = 2000  # samples, and drawings that they are compared with
    out: str = "results/bits-faces"  # path of the results, without .md and .png

    def __post_init__(self):
        common.check_values(self, "bits")
        require(all(2 <= b <= 16 for b in self.bits), f"a weight has 2 to 16 bits here: {self.bits}")
        require(self.samples >= 250, f"samples must be at least 250, not {self.samples}")


FACES_LEGEND = """Fréchet distances of layout and texture to new drawings, of networks whose weights have so many bits.
Drawings: others of the program, the floor. Calibrated as in bits.md."""


def faces_command(argv: list[str]) -> None:
    """Round the weights of a demo's teacher and student, and measure their faces: a table and a sheet."""
    asked = common.settings_of(argv, faces_command.__doc__, Faces(), {})
    teacher, student, codec = tell_apart.load_demo(asked.run)
    common.open_out(asked.out)
    n = asked.samples
    measure_of = celeba_latent.PictureMeasure(*features_of(tell_apart.drawings(n, 0)))
    generator = torch.Generator().manual_seed(10**6)
    noise = torch.randn(n, *student.shape, generator=generator)
    others = torch.randn(200, *student.shape, generator=generator)  # to calibrate with

    floor = measure_of(*features_of(tell_apart.drawings(n, n)))
    rows = [["drawings", "", *cells_of(floor)]]
    sheet = {}
    for who, net, steps in (("teacher, 50 steps", teacher, 50), ("student, 1 step", student, 1)):
        networks = rounded_networks(net, asked.bits, asked_about(net, others, steps))
        for name, small in networks.items():
            pictures = celeba_latent.generate(small, noise, steps, codec)
            found = measure_of(*features_of(pictures))
            rows.append([who, name, *cells_of(found)])
            if "calibrated" not in name:
                sheet[f"{who.split(',')[0]}, {name} bits"] = pictures[:4]
    celeba_latent.draw_sheet(Path(f"{asked.out}.png"), sheet)
    lines = [FACES_LEGEND, f"{n} samples; {toy_2d.machine()}.", ""]
    lines += common.markdown(["sampler", "bits", "layout", "texture", "coverage"], rows)
    common.write_report(asked.out, "experiments.bits", ["faces", *argv], lines)


def cells_of(measures: dict[str, float]) -> list[str]:
    """Layout, texture and coverage as text."""
    return [f"{measures['layout']:.2f}", f"{measures['texture']:.4f}", f"{measures['coverage']:.3f}"]


def main(argv=None) -> int:
    """Run a command, without its name that in the plane; bad input is one line on stderr and exit code 2."""
    return toy_2d.main(argv, {"bits": bits_command, "faces": faces_command}, "bits", "experiments.bits")


if __name__ == "__main__":
    sys.exit(main())
