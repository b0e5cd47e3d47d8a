"""Does a classifier tell samples of the demo from fresh drawings?

    python celeba_latent.py demo --seed 0 --out runs/demo-0
    python -m experiments.tell_apart --runs runs/demo-0

Fréchet distances compare means and covariances. A convolutional network looks at the pictures themselves. It is
trained for 400 updates to say of each picture whether the program has drawn it, and is asked about pictures that it
has not seen. Half of its answers are right where there is nothing to see.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import celeba_latent
import toy_2d
from celeba_latent import Codec
from experiments import common
from scflow import require


def classifier(size: int) -> nn.Module:
    """A network pictures (B,3,size,size) in [−1,1] → logits (B,1); `size` is a multiple of 16."""
    layers = []
    channels = 3
    for width in (24, 48, 64, 64):  # each halves the side
        layers.append(nn.Conv2d(channels, width, 4, stride=2, padding=1))
        layers.append(nn.LeakyReLU(0.2))
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (size // 16) ** 2, 1))


def tell_apart(real: Tensor, fake: Tensor, updates: int = 400) -> float:
    """The share of right answers about pictures that were not trained on.

    real, fake  uint8 (N,3,S,S) each; four fifths train the classifier, a fifth is asked about.
    """
    torch.manual_seed(0)
    net = classifier(real.shape[-1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    rows = 64  # of each kind
    answers = torch.cat([torch.ones(rows), torch.zeros(rows)])
    trained = len(real) * 4 // 5
    for _ in range(updates):
        drawn = real[torch.randint(trained, (rows,))]
        sampled = fake[torch.randint(trained, (rows,))]
        pictures = torch.cat([drawn, sampled])
        logits = net(pictures / 127.5 - 1)[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():  # nothing is trained any more
        right_real = (net(real[trained:] / 127.5 - 1) > 0).double().mean()
        right_fake = (net(fake[trained:] / 127.5 - 1) <= 0).double().mean()
    return ((right_real + right_fake) / 2).item()


def drawings(n: int, first: int) -> Tensor:
    """New drawings uint8 (n,3,64,64). The demo's own have the numbers below 10⁶."""
    pictures = []
    for number in range(first, first + n, 500):
        names = [str(10**6 + number)] * min(500, first + n - number)
        pictures += celeba_latent.draw_batch(names)
    return torch.stack(pictures)


def load_demo(run: str) -> tuple[nn.Module, nn.Module, Codec]:
    """Teacher, student and codec of a demo's run folder. Raises ValueError for another run."""
    teacher, _ = celeba_latent.load_run(Path(run, "teacher.pt"), "cpu")
    student, codec = celeba_latent.load_run(Path(run, "student.pt"), "cpu")
    require(isinstance(codec.net, celeba_latent.PicturePCA), f"{run} is no run of the demo")
    return teacher, student, codec


def measure(run: str, samples: int) -> dict[str, float]:
    """{who: share of right answers} for the networks of a demo's run folder, and for drawings against drawings."""
    teacher, student, codec = load_demo(run)
    noise = torch.randn(samples, *student.shape, generator=torch.Generator().manual_seed(2 * 10**6))
    real = drawings(samples, 0)
    return {
        "drawings": tell_apart(real, drawings(samples, 10**6)),
        "teacher, 50 steps": tell_apart(real, celeba_latent.generate(teacher, noise, 50, codec)),
        "student, 1 step": tell_apart(real, celeba_latent.generate(student, noise, 1, codec)),
    }


@dataclass(frozen=True)
class TellApart:
    """What is compared."""

    runs: tuple = ("runs/demo",)  # run folders of the demo
    samples: int = 5000  # pictures of each kind
    out: str = "results/demo/tell-apart"  # OUT.md is written

    def __post_init__(self):
        require(self.samples >= 100, f"samples must be at least 100, not {self.samples}")


def tell_apart_command(argv: list[str]) -> None:
    """Train a classifier to tell samples of the demo from fresh drawings; a table over runs."""
    (given,) = toy_2d.cli(argv, tell_apart_command.__doc__, TellApart())
    asked = TellApart(**given)
    common.open_out(asked.out)
    found = [measure(run, asked.samples) for run in asked.runs]
    rows = []
    for who in found[0]:
        values = [shares[who] for shares in found]
        each = ", ".join(f"{100 * value:.1f}" for value in values)
        rows.append([who, common.mean_sd(values, 100, 1), each])
    about = f"Share of right answers, %; 50 is guessing. {asked.samples} pictures of each kind; {toy_2d.machine()}."
    lines = [about, ""]
    lines += common.markdown(["against fresh drawings", "mean ± sd", "each run"], rows)
    common.write_report(asked.out, "experiments.tell_apart", argv, lines)


def main(argv=None) -> int:
    """Run the command; bad input is one line on stderr and exit code 2."""
    return toy_2d.main(argv, {"tell_apart": tell_apart_command}, "tell_apart", "experiments.tell_apart")


if __name__ == "__main__":
    sys.exit(main())
