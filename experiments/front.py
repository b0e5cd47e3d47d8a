"""The README's first picture: the paper's schedule and ours, from one step to eight.

python toy_2d.py --preset paper --figures none --out runs/paper
python toy_2d.py --figures none --out runs/ours
python -m experiments.front --paper runs/paper --ours runs/ours
"""

import sys
from dataclasses import dataclass

import scflow
import toy_2d
from experiments import common

STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Front:
    """What is drawn."""

    paper: str = "runs/paper"  # run folder of toy_2d.py with --preset paper
    ours: str = "runs/ours"  # run folder of toy_2d.py with its defaults, and the same data set and seed
    out: str = "results/front"  # OUT.png is written


def draw(plt, paper: toy_2d.Pictures, ours: toy_2d.Pictures):
    """Data and the teacher on the left; a row for each schedule. The colour of a point is that of its noise."""
    figure, axes = plt.subplots(2, 1 + len(STEPS), figsize=(10, 5))
    colours = toy_2d.by_angle(ours.noise)
    toy_2d.cloud(axes[0, 0], ours.x0, "data", size=2)
    samples = scflow.sample(ours.teacher, ours.noise, 50)
    toy_2d.cloud(axes[1, 0], samples, "teacher, 50 steps", colours, size=2)
    for row, run, name in ((axes[0], paper, "paper"), (axes[1], ours, "ours")):
        quality = run.quality("student")
        for ax, steps in zip(row[1:], STEPS):
            samples = scflow.sample(run.student, ours.noise, steps)
            toy_2d.cloud(ax, samples, f"{name}, {toy_2d.plural(steps, 'step')}", colours, size=2)
            ax.set_xlabel(f"energy distance × 10³: {quality[steps]:.1f}", fontsize=9, color="#444444")
    return figure


def front_command(argv: list[str]) -> None:
    """Draw the students of two runs of toy_2d.py, one with each schedule, at 1, 2, 4 and 8 steps."""
    (given,) = toy_2d.cli(argv, front_command.__doc__, Front())
    asked = Front(**given)
    common.open_out(asked.out)
    plt = toy_2d.drawing()
    figure = draw(plt, toy_2d.Pictures(asked.paper), toy_2d.Pictures(asked.ours))
    toy_2d.write_figure(f"{asked.out}.png", figure)
    print(f"{asked.out}.png")


def main(argv=None) -> int:
    """Run the command; bad input is one line on stderr and exit code 2."""
    return toy_2d.main(argv, {"front": front_command}, "front", "experiments.front")


if __name__ == "__main__":
    sys.exit(main())
