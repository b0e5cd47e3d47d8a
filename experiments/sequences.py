"""Sequences: time series and sentences, made in one step by scflow.py, unchanged.

    python -m experiments.sequences

A sequence of L vectors of C numbers is a latent (C,1,L). All have one length, so that a perceptron will do. Two worlds,
both made by the program, so that samples can be checked: series with seasons and trends, and the sentences of
captions.py, with a fixed vector for each word.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import scflow
import toy_2d
from celeba_latent import frechet_distance
from experiments import captions, common
from scflow import TeacherSettings, require

# ═══ 1. Time series ═══════════════════════════════════════════════════════════════════════

CHANNELS = 3
TIMES = 24
READER_UPDATES = 400


def draw_series(n: int, generator=None) -> Tensor:
    """Series (n,3,1,24) of a variance of about 1: a season, a trend and noise.

    The season has a period of 6 or 12, and is the same in all channels but for a shift. Each channel has its own trend.
    """
    time = torch.arange(TIMES)
    period = 6.0 + 6.0 * torch.randint(2, (n, 1, 1), generator=generator)
    start = torch.rand(n, 1, 1, generator=generator)
    shift = torch.arange(CHANNELS)[:, None] / 6
    height = 0.6 + torch.rand(n, 1, 1, generator=generator)
    slope = torch.randn(n, CHANNELS, 1, generator=generator)
    noise = torch.randn(n, CHANNELS, TIMES, generator=generator)
    season = height * torch.sin(2 * math.pi * (time / period + start + shift))  # (n,3,24)
    trend = slope * (time / TIMES - 0.5)
    return (1.15 * (season + trend + 0.1 * noise))[:, :, None]


def series_batch(n: int, generator=None) -> tuple[Tensor, None]:
    """A batch of series, without a condition."""
    return draw_series(n, generator), None


class Reader(nn.Module):
    """A recurrent network (GRU) that reads series (B,3,1,24), and gives `outputs` numbers at every time."""

    def __init__(self, outputs: int, width: int = 32):
        super().__init__()
        self.recurrent = nn.GRU(CHANNELS, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def states(self, x: Tensor) -> Tensor:
        """What it remembers at every time, (B,24,width)."""
        return self.recurrent(rearrange(x, "b c 1 l -> b l c"))[0]

    def forward(self, x: Tensor) -> Tensor:
        """(B,24,outputs)."""
        return self.head(self.states(x))


def fit(net: nn.Module, loss_of: Callable[[Tensor], Tensor], n: int, generator) -> None:
    """Minimise `loss_of` on batches of 128 random row numbers below n."""
    opt = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(READER_UPDATES):
        loss = loss_of(torch.randint(n, (128,), generator=generator))
        opt.zero_grad()
        loss.backward()
        opt.step()


def autocorrelation(x: Tensor) -> Tensor:
    """Mean autocorrelation (3,12) of each channel of series (B,3,1,24) at lags 1 to 12.

    The mean over time is taken away first, and each sum is divided by that at lag 0.
    """
    x = x[:, :, 0]  # (B,3,24)
    x = x - x.mean(2, keepdim=True)
    total = x.square().sum(2)
    lags = []
    for lag in range(1, 13):
        product = x[..., lag:] * x[..., :-lag]
        lags.append(product.sum(2) / total)
    return torch.stack(lags, 2).mean(0)


class SeriesMeasure:
    """What is asked of samples of series, against `n` true ones."""

    def __init__(self, n: int, seed: int):
        self.generator = torch.Generator().manual_seed(10**6 + seed)
        self.real = draw_series(n, self.generator)
        torch.manual_seed(seed)  # initial weights
        self.forecaster = Reader(CHANNELS)
        fit(self.forecaster, self.forecast_loss, n, self.generator)

    def forecast_loss(self, rows: Tensor) -> Tensor:
        """Squared error of the forecaster, which says of each time what the next one is."""
        x = self.real[rows]
        said = self.forecaster(x)
        true = rearrange(x, "b c 1 l -> b l c")
        return scflow.squared(said[:, :-1], true[:, 1:])

    def __call__(self, fake: Tensor) -> dict[str, float]:
        """told apart  accuracy − ½ of a classifier on a fifth that it has not seen (as TimeGAN's discriminative score).
        autocorrelation  mean absolute difference.
        context  Fréchet distance of what a forecaster of the data remembers at the end.
        """
        with torch.no_grad():  # a measurement
            states = [self.forecaster.states(x)[:, -1] for x in (self.real, fake)]
        difference = autocorrelation(self.real) - autocorrelation(fake)
        return {
            "told apart": self.accuracy(fake) - 0.5,
            "autocorrelation": difference.abs().mean().item(),
            "context": frechet_distance(*states),
        }

    def accuracy(self, fake: Tensor) -> float:
        """The share of unseen series of which a classifier says rightly whether they are true."""
        order = torch.randperm(len(self.real) + len(fake), generator=self.generator)
        x = torch.cat([self.real, fake])[order]
        is_real = order < len(self.real)
        seen = 4 * len(x) // 5
        torch.manual_seed(0)  # the same initial weights for every sampler
        judge = Reader(1)

        def judge_loss(rows: Tensor) -> Tensor:
            logits = judge(x[rows])[:, -1, 0]
            return F.binary_cross_entropy_with_logits(logits, is_real[rows].float())

        fit(judge, judge_loss, seen, self.generator)
        with torch.no_grad():  # a measurement
            said = judge(x[seen:])[:, -1, 0] > 0
        return (said == is_real[seen:]).double().mean().item()


# ═══ 2. Sentences ═════════════════════════════════════════════════════════════════════════

WIDTH = 1 + len(captions.WORDS)  # 16
# A vector for each word, and one for an empty place: orthogonal, of length 4, so that the mean of their squares is 1.
ORTHOGONAL, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))
VECTORS = 4 * ORTHOGONAL
SCENE_OF = {tuple(tokens): number for number, tokens in enumerate(captions.TOKENS.tolist())}


def sentence_batch(n: int, generator=None) -> tuple[Tensor, None]:
    """A batch of sentences (n,16,1,10), each as often as it is said."""
    numbers = torch.multinomial(captions.CHANCE, n, replacement=True, generator=generator)
    vectors = VECTORS[captions.TOKENS[numbers]]  # (n,10,16)
    return rearrange(vectors, "b l c -> b c 1 l"), None


def tokens_of(x: Tensor) -> list[tuple[int, ...]]:
    """The tokens of sentences (B,16,1,10): in each place those of the nearest word."""
    product = torch.einsum("bcl,wc->blw", x[:, :, 0], VECTORS)  # all words have one length: the largest is the nearest
    return [tuple(row) for row in product.argmax(2).tolist()]


def text_of(tokens: tuple[int, ...]) -> str:
    """The words of ten tokens."""
    vocabulary = ("", *captions.WORDS)
    return " ".join(vocabulary[token] for token in tokens if token)


class SentenceMeasure:
    """What is asked of samples of sentences. Their grammar is known: `n` and `seed` are not used."""

    def __init__(self, n: int = 0, seed: int = 0):
        # A beginning is the first object and the relation: there are 225.
        _, self.beginning = captions.SCENES[:, :4].unique(dim=0, return_inverse=True)  # (8145,)
        self.exact = self.beginning.bincount(weights=captions.CHANCE)  # (225,)

    def __call__(self, fake: Tensor) -> dict[str, float]:
        """ungrammatical  the share of sentences that the grammar does not have.
        frequencies  of the others, ½Σ|p − q| over the 225 beginnings: how often each is said and should be.
        """
        found = [SCENE_OF[tokens] for tokens in tokens_of(fake) if tokens in SCENE_OF]
        numbers = torch.tensor(found, dtype=torch.int64)
        counts = self.beginning[numbers].bincount(minlength=len(self.exact))
        share = counts / max(1, len(numbers))
        return {
            "ungrammatical": 1 - len(numbers) / len(fake),
            "frequencies": (share - self.exact).abs().sum().item() / 2,
        }


# ═══ 3. One run ═══════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class World:
    """Shape (C,1,L), batches and measure of a kind of sequences."""

    shape: tuple[int, int, int]
    batch: scflow.Batch
    measure: type


WORLDS = {
    "series": World((CHANNELS, 1, TIMES), series_batch, SeriesMeasure),
    "sentences": World((WIDTH, 1, captions.LENGTH), sentence_batch, SentenceMeasure),
}
NETWORK = dict(width=512, depth=4, x_frequencies=0)
CRITIC = dict(width=128)
TEACHER = TeacherSettings(teacher_steps=4000, teacher_batch=128, teacher_lr=1e-3)
FIRST, LAST = scflow.SCHEDULES["two_phase"]
SCHEDULE = (
    replace(FIRST, steps=5000, batch=128, lr=2e-3),
    replace(LAST, steps=500, batch=128, lr=2e-4, lr_critic=2e-4),
)


def train(world: World, seed: int) -> tuple[nn.Module, nn.Module]:
    """A teacher and its student."""
    torch.manual_seed(seed)  # initial weights
    net = scflow.MLP(world.shape, **NETWORK)
    critic = scflow.PointCritic(math.prod(world.shape), **CRITIC)
    generator = torch.Generator().manual_seed(seed)
    for run in scflow.train_teacher(net, world.batch, generator, TEACHER):
        teacher = run.ema
    for run in scflow.distill(teacher, critic, world.batch, generator, SCHEDULE):
        student = run.ema
    return teacher, student


def measure(name: str, seed: int, samples: int) -> dict:
    """Measures of fresh true sequences, of the teacher in 50 steps, and of the student in 1, 2 and 4."""
    world = WORLDS[name]
    teacher, student = train(world, seed)
    scores = world.measure(samples, seed)
    generator = torch.Generator().manual_seed(2 * 10**6 + seed)
    noise = torch.randn(samples, *world.shape, generator=generator)
    truth, _ = world.batch(samples, generator)
    found = {"truth": truth, "teacher, 50": scflow.sample(teacher, noise, 50)}
    for steps in (1, 2, 4):
        found[f"student, {steps}"] = scflow.sample(student, noise, steps)
    rows = {who: scores(x) for who, x in found.items()}
    examples = {who: x[:4].tolist() for who, x in found.items()}
    return {"world": name, "seed": seed, "rows": rows, "examples": examples, "machine": toy_2d.machine()}


def table(runs: list[dict]) -> list[str]:
    """Lines of Markdown for the runs of one world: a row for each sampler, mean ± sd over the seeds."""
    first = runs[0]
    rows = []
    for who, scores in first["rows"].items():
        sampler, _, steps = who.partition(", ")
        cells = [sampler, steps]
        for name in scores:
            values = [run["rows"][who][name] for run in runs]
            cells.append(common.mean_sd(values, digits=3))
        rows.append(cells)
    return common.markdown([first["world"], "steps", *scores], rows)


def sentences(run: dict) -> list[str]:
    """Lines of Markdown: four sentences of each sampler; teacher and student start from the same noise."""
    rows = []
    for who, examples in run["examples"].items():
        for tokens in tokens_of(torch.tensor(examples)):
            rows.append([who, text_of(tokens)])
    return common.markdown(["sampler", "sentence"], rows)


def draw(run: dict, path: str) -> None:
    """Four series of the data, and of teacher and student from the same noise; a line for each channel."""
    plt = toy_2d.drawing()
    examples = run["examples"]
    shown = {
        "drawn by the program": examples["truth"],
        "teacher, 50 steps": examples["teacher, 50"],
        "student, 1 step": examples["student, 1"],
        "student, 4 steps": examples["student, 4"],
    }
    figure, axes = plt.subplots(4, 4, figsize=(11, 6), sharex=True, sharey=True)
    for column, (title, series) in zip(axes.T, shown.items()):
        column[0].set_title(title)
        column[-1].set_xlabel("time")
        for ax, one in zip(column, series):
            for channel, colour in zip(one, (toy_2d.STUDENT, toy_2d.TEACHER, toy_2d.RENOISE)):
                ax.plot(channel[0], color=colour, lw=1.2)
    toy_2d.write_figure(path, figure, 80)
    plt.close(figure)


# ═══ 4. The program ═══════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Sequences:
    """What is trained, and where it goes."""

    worlds: tuple = ("series", "sentences")  # what is made
    seeds: tuple = (0, 1, 2)  # seeds
    samples: int = 4000  # sequences that are compared
    workers: int = os.cpu_count() or 1  # runs side by side, one thread each
    runs: str = "runs/sequences"  # folder of the finished runs, which are read back
    out: str = "results/sequences"  # path of the results, without .md, .csv and .png

    def __post_init__(self):
        for world in self.worlds:
            require(world in WORLDS, f"no world {world!r}; choose from {', '.join(WORLDS)}")
        common.check_values(self, "worlds", "seeds")
        require(self.samples >= 200, f"samples must be at least 200, not {self.samples}")
        require(self.workers >= 1, f"workers must be at least 1, not {self.workers}")


LEGEND = """Series: accuracy − ½ of a classifier that tells samples from data; mean difference of autocorrelations;
Fréchet distance of what a forecaster of the data remembers. Sentences: share outside the grammar; total variation of
the frequencies of their beginnings. Truth: fresh ones, the floor. Mean ± deviation over seeds."""


def sequences_command(argv: list[str]) -> None:
    """Train teacher and student of time series and of sentences, and measure them."""
    settings = common.settings_of(argv, sequences_command.__doc__, Sequences(), {})
    common.open_out(settings.out)
    cells = []
    paths = []
    for name in settings.worlds:
        for seed in settings.seeds:
            cell = {"name": name, "seed": seed, "samples": settings.samples}
            mark = common.fingerprint(cell, NETWORK, CRITIC, TEACHER, SCHEDULE, READER_UPDATES)
            cells.append(cell)
            paths.append(Path(settings.runs, f"{common.slug(name, seed)}-{mark}.json"))
    results = common.run_cells(measure, cells, paths, settings.workers)

    records = []
    for run in results:
        for who, found in run["rows"].items():
            records.append({"world": run["world"], "seed": run["seed"], "sampler": who, **found})
    toy_2d.write_csv(f"{settings.out}.csv", records)
    lines = [LEGEND, common.about_runs(settings, results)]
    for name in settings.worlds:
        runs = [run for run in results if run["world"] == name]
        lines += ["", *table(runs)]
        if name == "sentences":
            lines += ["", *sentences(runs[0])]
        else:
            draw(runs[0], f"{settings.out}.png")
    common.write_report(settings.out, "experiments.sequences", argv, lines)


def main(argv=None) -> int:
    """The command; bad input is one line on stderr and exit code 2."""
    return toy_2d.main(argv, {"sequences": sequences_command}, "sequences", "experiments.sequences")


if __name__ == "__main__":
    sys.exit(main())
