# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 8. Growth
#
# **Question.** More modes, more dimensions, a wider network, a larger batch: what happens to the errors, and to the
# operations?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/08_growth.ipynb)
#
# It needs this repository: `pip install -e '.[notebooks]'` in a clone, or, hosted,
# `%pip install git+https://github.com/OWNER/REPO`.

# %%
import matplotlib.pyplot as plt
import torch

import toy_2d
from experiments import growth
from experiments.lecture import exercise, start

start()

# %% [markdown]
# ## Mixtures of any dimension
#
# A mixture of Gaussians keeps its closed form in any dimension: exact velocity, exact flow map. Eight modes stand on a
# circle in the plane, and on four axes from there on. For more modes in the plane there are square grids; their modes
# get narrower as they get closer.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3))
generator = torch.Generator().manual_seed(0)
for ax, modes in zip(axes, (8, 25, 81)):
    data = growth.mixture(2, modes)
    x, _ = data.sample(3000, generator)
    toy_2d.cloud(ax, x, f"{modes} modes", "black", 2)
plt.show()

# %%
for d, modes in ((2, 8), (2, 25), (8, 8), (32, 8)):
    data = growth.mixture(d, modes)
    radius = data.means.square().sum(1).mean().sqrt()
    assert abs(radius - 2) < 1e-4
    between = torch.pdist(data.means).min()
    print(f"{modes:2} modes in {d:2} dimensions: the nearest are {between / data.std:4.1f} deviations apart")

# %% [markdown]
# **Exercise.** In d dimensions the points of one mode are about s·√d from its middle, so in 32 dimensions the modes
# look as if they touched. Do they? Count the points that are nearer to another mode's middle than to their own.

# %%
data = growth.mixture(32, 8)
x, own = data.sample(10_000, generator)
distance = (x - data.means[own]).norm(dim=1).mean()
print(f"points are {distance:.2f} from their middle, and s·√d is {data.std * 32**0.5:.2f}")


def count_strays(x, own, means):
    """How many of the points x (n,d) are nearer to another of the means (K,d) than to their own, means[own]."""
    return ...  # your answer


# %%
@exercise
def check():
    close = torch.tensor([[0.0], [1.0]])
    assert count_strays(torch.tensor([[0.1], [0.9], [0.4]]), torch.tensor([0, 0, 1]), close) == 2
    assert count_strays(x, own, data.means) == 0


# %% jupyter={"source_hidden": true}
# Solution
def count_strays(x, own, means):
    nearest = torch.cdist(x, means).argmin(1)
    return (nearest != own).sum()


check()  # none: what counts is the deviation along the line to the other middle, and that is s in any dimension

# %% [markdown]
# ## One number at a time
#
# `experiments/growth.py` trains the teacher and the student of `toy_2d.py` with one number changed. (With the rows of
# the teacher's batch those of the student change as well.) TFLOP are the operations of the whole training: an update of
# each stage is counted, and multiplied.

# %%
for axis, values in growth.AXES.items():
    print(f"{growth.TITLES[axis]:24} {values}")

# %% [markdown]
# `python -m experiments.growth` runs every case on three seeds. Here are a third of the updates and one seed, of the
# dimensions and of two batches.

# %%
results = []
for changed in ({"d": 2}, {"d": 8}, {"d": 32}, {"rows": 256}):
    case = {**growth.DEFAULT, **changed}
    results.append(growth.measure(**case, share=1 / 3, samples=4000))
print(*growth.table(results), sep="\n")

# %%
figure, ax = plt.subplots(figsize=(7, 3.6))
growth.draw_distances(ax, "d", results)
ax.set(xlabel="dimensions", ylabel="energy distance × 10³")
ax.set_ylim(-0.5, 200)
ax.legend()
plt.show()

# %% [markdown]
# *What to see.* Dimensions cost quality rather than operations. The same network needs longer for a longer vector:
# after as many updates the teacher is further from the truth, and the student further than its teacher. Half the rows
# take half the operations, and end further from the truth. `results/growth.md` has the other columns.

# %%
by_dimension = growth.along("d", results)
for key in ("teacher 50", "student 1"):
    plane, eight, many = (runs[0][key] for runs in by_dimension.values())
    assert plane < eight < many
half, full = (runs[0] for runs in growth.along("rows", results).values())
assert half["operations"] < 0.6 * full["operations"]
assert half["student 1"] > full["student 1"]

# %%
(plane,), (_,), (many,) = by_dimension.values()
for key, scale in {"teacher 50": 1e3, "student 1": 1e3, "operations": 1e-12}.items():
    print(f"from 2 to 32 dimensions: {key} from {scale * plane[key]:.2f} to {scale * many[key]:.2f}")

# %% [markdown]
# **The answer.** With as many updates, the errors grow with the dimensions, and the operations by two thirds. The
# student's error is mostly not its teacher's: it grows faster. Half the rows save operations and cost quality.

# %% [markdown]
# ## What to try next
#
# - Train the teacher of 32 dimensions for four times as long (`share=4`): does the student follow it?
# - Widen the network together with the dimensions.
# - `python -m experiments.growth --share 0.25`: which of the numbers needs the most updates?
