"""What the lectures in notebooks/ share: their style, and how an exercise is checked."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch

import toy_2d


def start(dpi: int = 80, linewidth: float = 1.5) -> None:
    """The style of the figures; and one thread, in which networks this small run best."""
    torch.set_num_threads(1)
    plt.rcParams.update(toy_2d.STYLE)
    plt.rcParams["figure.dpi"] = dpi
    plt.rcParams["lines.linewidth"] = linewidth


def exercise(check: Callable[[], None]) -> Callable[[], None]:
    """Call `check`, which fails for a wrong answer, and say how it went. It goes on either way.

    Below each check the solution is folded away. Its cell calls the check again, where a wrong answer is an error.
    """
    try:
        check()
    except Exception:  # an answer that is not there yet can fail in any way
        print("Not solved yet.")
    else:
        print("Solved.")
    return check
