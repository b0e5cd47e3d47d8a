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
# # 7. Prompts and guidance
#
# **Question.** A teacher follows a prompt because it is *guided*: two passes a step, one with the prompt and one
# without. Can a student do it in one pass?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/07_prompts_and_guidance.ipynb)

# %%
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

# A clone holds scflow.py here, or one folder up; as a program this runs from anywhere.
sys.path[:0] = [".", "..", str(Path(globals().get("__file__", "x/y")).resolve().parents[1])]
try:
    import celeba_latent
    import scflow
    import toy_2d
except ImportError:  # a hosted notebook: fetch it once
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "git+https://github.com/OWNER/REPO"], check=True)
    import celeba_latent
    import scflow
    import toy_2d

option, require = scflow.option, scflow.require
LECTURE = __name__ == "__main__" and "ipykernel" in sys.modules  # as a program, or imported, it draws no lecture

# %% [markdown]
# ## Guidance in the plane
#
# Three labels, three Gaussians each. Of a mixture the velocity is known in closed form, and of the components with one
# label as well. Classifier-free guidance goes on from the one towards the other, and beyond:
#
# $$v_w(x,t) = v(x,t) + w\,\bigl(v(x,t,c) - v(x,t)\bigr).$$
#
# Velocity and score are tied by $v = -(x + t\,\nabla\log p_t)/(1-t)$, so that $v_w$ belongs to the score of
# $p_t(x)^{1-w}\,p_t(x|c)^w$: at every $t$ a *tilted* density. These are not the densities of one flow, though.
# Following $v_w$ from noise gives something else than the tilted $p_0$.


# %%
def tilted(mixture, label, scale, n, generator=None, cells=300, reach=4.0):
    """n points (n,2) of the density p₀(x)^(1−w)·p₀(x|c)^w, drawn from a fine grid."""
    side = (torch.arange(cells) + 0.5) / cells * 2 * reach - reach
    grid = torch.cartesian_prod(side, side)  # (cells²,2)
    zero, cond = torch.zeros(len(grid)), torch.full((len(grid), 1), label)
    log = (1 - scale) * mixture.log_density(grid, zero) + scale * mixture.log_density(grid, zero, cond)
    cumulated = (log - log.max()).double().exp().cumsum(0)
    where = torch.rand(n, generator=generator, dtype=torch.float64) * cumulated[-1]
    jitter = (torch.rand(n, 2, generator=generator) - 0.5) * (2 * reach / cells)
    return grid[torch.searchsorted(cumulated, where).clamp(max=len(grid) - 1)] + jitter


def of_label(mixture, label):
    """The mixture of one label's components."""
    mine = mixture.labels == label
    return scflow.GaussianMixture(mixture.means[mine], mixture.std, mixture.weights[mine])


def evaluate(run, mixture, velocity, student):
    """What metrics.json holds of a student of the guided velocity: rows of means over labels, and `labels`, each one's.

    The goal is what the guided teacher reaches in 50 Euler steps, from other noise than the student's; `energy` is the
    distance to it, and the floor that of the same from fresh noise.
    """
    generator, n, (scale,) = torch.Generator().manual_seed(2 * 10**6 + run.seed), run.samples, run.guidance
    exact, counts, labels = scflow.guided(mixture, scale), sorted(map(int, run.nfe.split(","))), range(1, 4)
    found = {}

    def reach(net, cond, solver="euler"):
        return scflow.sample(net, torch.randn(n, 2, generator=generator), 50, solver, cond)

    for label in labels:
        cond = torch.full((n, 1), label)
        goal, ideal = scflow.EnergyDistance(reach(velocity, cond)), reach(exact, cond, "heun")
        one = of_label(mixture, label)
        truth = scflow.EnergyDistance(*one.sample(n, torch.Generator().manual_seed(10**6), stratified=True))
        noise = torch.randn(n, 2, generator=generator)
        samples = {steps: scflow.sample(student, noise, steps, cond=cond) for steps in counts}
        first = scflow.sample(student, noise, cond=cond)
        values = {f"student {k}": (goal(x), truth(x), scflow.rms_distance(x, first)) for k, x in samples.items()}
        values["floor"] = [goal(reach(velocity, cond)) for _ in range(3)]
        values["teacher to exact"] = goal(ideal)
        values["exact to tilted"] = scflow.EnergyDistance(ideal)(tilted(mixture, label, scale, n, generator))
        values["exact to truth"] = truth(ideal)
        values["teacher to truth"] = truth(goal.reference)
        found[label] = values
    rows = []
    for steps in counts:
        energy, to_truth, gap = np.transpose([found[c][f"student {steps}"] for c in labels]).tolist()
        row = dict(who="student", solver="euler", steps=steps, nfe=steps, energy=float(np.mean(energy)))
        rows.append(row | dict(gap=float(np.mean(gap)), truth=float(np.mean(to_truth)), labels=energy))
    floors = np.array([found[c]["floor"] for c in labels])  # (labels, draws)
    context = {k: [found[c][k] for c in labels] for k in found[1] if " to " in k}
    floor = dict(mean=floors.mean(), sd=floors.std(ddof=1) / len(labels) ** 0.5)  # of a mean over labels
    return dict(floor=floor, rows=rows, guidance=dict(scale=scale, floor=floors.mean(1).tolist(), **context))


def guidance_table(done):
    """Lines of Markdown from the metrics of runs of several scales: energy distances ×10³ by label."""
    yield f"Energy distance ×10³ by label; {done[0]['samples']} samples, seed {done[0]['seed']}; {done[0]['machine']}."
    yield from ["", "| guidance | from | to | 1 | 2 | 3 | mean |", "|---" * 7 + "|"]
    teacher = "guided teacher, 50 steps"
    for metrics in done:
        about = metrics["guidance"]
        lines = [(f"student, {toy_2d.plural(r['nfe'], 'step')}", teacher, r["labels"]) for r in metrics["rows"]]
        lines += [
            ("the same from other noise (floor)", teacher, about["floor"]),
            ("exact guided velocity", teacher, about["teacher to exact"]),
            ("exact guided velocity", "tilted p₀", about["exact to tilted"]),
            ("exact guided velocity", "data of the label", about["exact to truth"]),
            (teacher, "data of the label", about["teacher to truth"]),
        ]
        for a, b, values in lines:
            cells = [f"{1e3 * v:.2f}" for v in (*values, np.mean(values))]
            yield f"| {about['scale']:g} | {a} | {b} | {' | '.join(cells)} |"


LABEL_COLOURS = (toy_2d.STUDENT, toy_2d.TEACHER, toy_2d.RENOISE)


def by_label(ax, title, draw, mixture, n=400):
    """Points of every label, `draw(label, generator)`, over the data in grey."""
    generator = torch.Generator().manual_seed(3)
    ax.scatter(*mixture.sample(3 * n, generator)[0].T, s=2, color="#cccccc", linewidths=0)
    for label, colour in enumerate(LABEL_COLOURS, 1):
        ax.scatter(*draw(label, generator).T, s=4, color=colour, linewidths=0)
    toy_2d.window(ax, title)
    ax.set(xlim=(-4.9, 4.9), ylim=(-4.9, 4.9))  # over-guided samples leave the data behind


def guidance_panels(axes, mixture, scale, nets, n=400):
    """A row of panels: the tilted density, the exact guided flow, and (network, steps) by title."""
    exact = scflow.guided(mixture, scale)

    def flow(net, steps, solver, label, generator):
        return scflow.sample(net, torch.randn(n, 2, generator=generator), steps, solver, torch.full((n, 1), label))

    by_label(axes[0], "tilted p₀", lambda label, g: tilted(mixture, label, scale, n, g), mixture)
    by_label(axes[1], "exact guided flow", partial(flow, exact, 50, "heun"), mixture)
    for ax, (title, (net, steps)) in zip(axes[2:], nets.items()):
        by_label(ax, title, partial(flow, net, steps, "euler"), mixture)
    axes[0].set_ylabel(f"w = {scale:g}", fontsize=13)


def draw_guidance(folders):
    """A row for the run of each guidance scale."""
    figure, axes = plt.subplots(len(folders), 4, figsize=(11, 2.8 * len(folders)), squeeze=False)
    for row, folder in zip(axes, folders):
        scale = toy_2d.read_json(folder / "config.json", "guidance")["guidance"]
        content = scflow.read(folder / "student.pt")
        teacher = scflow.build(content["teacher"]["arch"])
        teacher.load_state_dict(content["teacher"]["weights"])
        nets = {"teacher, 50 steps": (scflow.guided(teacher, scale), 50)}
        nets["student, 1 step"] = (scflow.load(folder / "student.pt"), 1)
        guidance_panels(row, toy_2d.dataset("labelled"), scale, nets)
    return figure


# %%
if LECTURE:
    mixture = toy_2d.dataset("labelled")
    figure, axes = plt.subplots(3, 2, figsize=(5.6, 8.4))
    for row, scale in zip(axes, (1, 2, 4)):
        guidance_panels(row, mixture, scale, {})
    plt.show()

# %% [markdown]
# At w = 1 both are the label's own mixture, and nothing is lost. From w = 2 on, the guided flow gives up the Gaussians
# near the centre, which might be another label's: samples that are surer of their label, and no longer its
# distribution. The tilted density keeps them: it is not what the guided flow ends in, not even the exact one.
#
# `python toy_2d.py --dataset labelled --guidance 1 2 4` trains a teacher and a student for each scale. One thing had to
# change: guided samples are distributed otherwise than the data, and **a critic that holds the student against the
# data undoes the guidance**. In the plane the student therefore learns from samples of the guided teacher
# (`--learn-from data` shows what happens otherwise, and with `--lambda-adv 0`, which takes the critic away, does not).

# %% [markdown]
# ## A world of captions
#
# Pictures of 32×32 pixels that the program draws from a sentence: one or two shapes on a bright ground. The sentence
# may name the size and the colour of each, or leave them open: "a circle above a red square" has any size and, of the
# circle, any colour. So there is no one picture that it means, and the mean of all that it might mean shows none of
# them. There are 8,145 sentences, and no end of pictures of each.

# %%
SIDE = 32
SIZES = {"small": (4.0, 4.5), "large": (6.0, 6.5)}  # radii in pixels
COLOURS = {"red": (0.85, 0.15, 0.15), "green": (0.15, 0.65, 0.2), "blue": (0.15, 0.3, 0.85), "yellow": (0.95, 0.8, 0.1)}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}  # from the first to the second
GRAMMAR = "a [SIZE] [COLOUR] SHAPE, or a [SIZE] [COLOUR] SHAPE RELATION a [SIZE] [COLOUR] SHAPE"
WORDS = ["a", *SIZES, *COLOURS, *SHAPES, "left", "right", "of", "above", "below"]
LENGTH = 10  # words of the longest sentence; in a shorter one what is not said leaves its place empty, token 0
HELD_OUT = (("green", "triangle"), ("yellow", "square"))  # no sentence with one of these, and no picture, is trained on


def objects_of(scene):
    """The (size, colour, shape) of each object of a scene, and the number of the relation between two, 0 for one."""
    return [tuple(scene[:3]), tuple(scene[4:])][: 1 + (scene[3] > 0)], scene[3]


def template(scene):
    """Ten words in their places, "" for what is not said: a, size, colour, shape; two of the relation; the second's."""
    objects, relation = objects_of(scene)
    first, *second = [
        ["a", [*SIZES, ""][size], [*COLOURS, ""][colour], SHAPES[shape]] for size, colour, shape in objects
    ]  # an open attribute is -1, the last of its list
    between = [*RELATIONS][relation - 1].split() + [""]
    return first + (between[:2] + second[0] if second else 6 * [""])


def sentence(scene):
    """The words of a scene: numbers of size and colour, -1 for open, shape; relation from 1, or 0; and the second's."""
    return " ".join(word for word in template(scene) if word)


def every_scene():
    """All there are, (8145,7), the one-object ones first, and how often each is said, (8145,).

    A fifth have one object. A size is open half of the time, a colour one time in four.
    """
    noun = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 4), torch.arange(3))  # (45,3)
    size, colour, _ = noun.T
    said = torch.where(size < 0, 1 / 2, 1 / 4) * torch.where(colour < 0, 1 / 4, 3 / 16) / 3
    i, relation, j = torch.cartesian_prod(torch.arange(45), torch.arange(1, 5), torch.arange(45)).T
    single = torch.cat([noun, torch.zeros(45, 4, dtype=torch.int64)], 1)
    scenes = torch.cat([single, torch.cat([noun[i], relation[:, None], noun[j]], 1)])
    return scenes, torch.cat([0.2 * said, 0.8 / 4 * said[i] * said[j]])


SCENES, CHANCE = every_scene()
SENTENCES = {sentence(scene): i for i, scene in enumerate(SCENES.tolist())}  # sentence: number of the scene
TOKENS = torch.tensor([[["", *WORDS].index(word) for word in template(scene)] for scene in SCENES.tolist()])
UNSEEN = torch.tensor([any(f"{colour} {shape}" in s for colour, shape in HELD_OUT) for s in SENTENCES])


def parse(prompt):
    """The number of the scene that a sentence describes. Raises ValueError for what is not in the grammar."""
    words = prompt.lower().replace(".", "").split()
    unknown = [word for word in words if word not in WORDS]
    require(not unknown, f"unknown word {', '.join(map(repr, unknown))}; the words are: {', '.join(WORDS)}")
    require(" ".join(words) in SENTENCES, f"{prompt!r} is outside the grammar, which is: {GRAMMAR}")
    return SENTENCES[" ".join(words)]


def pick(n, generator=None, unseen=False):
    """Numbers (n,) of random scenes: those seen in training (22% of one object), or those with what is held out."""
    chance = (CHANCE * (UNSEEN == unseen)).to(generator.device if generator else "cpu")
    return torch.multinomial(chance, n, replacement=True, generator=generator)


def cover(x, y, radius, shape):
    """How much of each pixel (B,32,32) a shape covers; x (B,32) to the right of and y (B,32) below its centre."""
    x, y, r = x[:, None, :], y[:, :, None], radius[:, None, None]
    circle = r - (x**2 + y**2).sqrt()
    square = 0.9 * r - torch.maximum(x.abs(), y.abs())
    triangle = torch.minimum(0.95 * r - y, (y + 0.95 * r) / 2 - math.sqrt(0.75) * x.abs())  # equal sides, apex up
    inside = torch.stack([circle, square, triangle], 1)  # distance to the edge, (B,3,32,32)
    return (inside[torch.arange(len(shape), device=shape.device), shape] + 0.5).clamp(0, 1)


GRID = torch.arange(SIDE) + 0.5
PALETTE = torch.tensor([*COLOURS.values()])  # (4,3)
TRAINED = torch.tensor([[(colour, shape) not in HELD_OUT for colour in COLOURS] for shape in SHAPES])  # (3,4)


def settle(scenes, generator=None):
    """Scenes (B,7) with all that was open drawn at random: any size, and any colour that is not held out."""
    done = scenes.clone()
    for size, colour, shape in ((0, 1, 2), (4, 5, 6)):
        sizes = torch.randint(2, (len(scenes),), generator=generator, device=scenes.device)
        colours = torch.multinomial(TRAINED.float().to(scenes.device)[scenes[:, shape]], 1, generator=generator)[:, 0]
        for column, drawn in ((size, sizes), (colour, colours)):
            done[:, column] = torch.where(scenes[:, column] < 0, drawn, scenes[:, column])
    return done


def draw(scenes, generator=None):
    """Pictures (B,3,32,32) in [0,1] of scenes (B,7), on the device of the scenes, where the generator must be too."""
    scenes, n, device = settle(scenes, generator), len(scenes), scenes.device
    relation, grid, palette = scenes[:, 3:4], GRID.to(device), PALETTE.to(device)

    def between(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator, device=device)

    picture = between(0.8, 1.0)[:, None, None, None].expand(n, 3, SIDE, SIDE)
    directions = torch.tensor([(0, 0), *RELATIONS.values()], device=device)
    along = directions[relation[:, 0]]  # (B,2), from the first to the second
    step = torch.where(along != 0, along * between(15.5, 16.5, 1), between(-2, 2, 1)) * (relation > 0)
    centre = SIDE / 2 + torch.where(relation > 0, between(-0.5, 0.5, 2), between(-2, 2, 2))
    low, high = torch.tensor([*SIZES.values()], device=device).T
    for (size, colour, shape), where, there in (
        (scenes[:, :3].T, centre - step / 2, relation[:, 0] >= 0),
        (scenes[:, 4:].T, centre + step / 2, relation[:, 0] > 0),
    ):
        radius = low[size] + (high - low)[size] * between(0, 1)
        rgb = (palette[colour] + between(-0.06, 0.06, 3)).clamp(0, 1)
        mask = cover(grid - where[:, :1], grid - where[:, 1:], radius, shape) * there[:, None, None]
        picture = picture + mask[:, None] * (rgb[:, :, None, None] - picture)
    return picture


# %%
if LECTURE:
    chosen = pick(8, torch.Generator().manual_seed(0))
    figure, axes = plt.subplots(2, 4, figsize=(11, 6))
    for ax, number, picture in zip(axes.flat, chosen, draw(SCENES[chosen], torch.Generator().manual_seed(0))):
        ax.imshow(picture.permute(1, 2, 0))
        ax.set_title(sentence(SCENES[number].tolist()).replace(" a ", "\na ").lstrip(), fontsize=10)
        ax.axis("off")
    plt.show()

# %% [markdown]
# ## The reader
#
# Whether a picture shows what the sentence says is a question for a program, not for an opinion. It finds the ground
# (the median of the border, which has to be bright), the blobs (five touching pixels and more that are nearer to a
# colour than to the ground), and for each the shape and radius that, drawn in its place, come closest. A blob that is
# close to none, or half of the way to another colour, makes the picture wrong, as does any other stain, or an object
# that is neither small nor large where the sentence asks. What it leaves open may be anything.

# %%
RADII = torch.arange(3.0, 7.6, 0.25)  # that the reader tries
HALF_WAY = float(torch.pdist(PALETTE).min()) / 2  # from a colour to the nearest other one, 0.33; drawn within 0.1


def blobs(mask):
    """Pixels (B,H,W) → numbers (B,H,W) from 1, the same where they touch, 0 outside."""
    numbers = torch.arange(1, mask[0].numel() + 1).reshape(mask.shape[1:]) * mask
    while True:
        p = F.pad(numbers, (1, 1, 1, 1))
        near = torch.stack([p[:, 1:-1, 1:-1], p[:, 2:, 1:-1], p[:, :-2, 1:-1], p[:, 1:-1, 2:], p[:, 1:-1, :-2]])
        if ((spread := near.amax(0) * mask) == numbers).all():
            return numbers
        numbers = spread


def read(pictures):
    """For each picture (B,3,32,32) in [0,1] its objects, each (size, colour, shape, x, y), size 2 for neither.

    What is none, a blot or a stain on the ground, is None.
    """
    edge = torch.cat([pictures[:, :, 0], pictures[:, :, -1], pictures[:, :, :, 0], pictures[:, :, :, -1]], 2)
    ground = edge.median(2).values  # (B,3)
    known = torch.cat([ground[:, None], PALETTE.expand(len(pictures), -1, -1)], 1)  # (B,5,3)
    colour = (pictures[:, None] - known[..., None, None]).square().sum(2).argmin(1)  # (B,32,32), 0 the ground
    numbers = blobs(colour > 0)
    dull = (ground.mean(1) < 0.7) | ((ground - ground.mean(1, keepdim=True)).abs().amax(1) > 0.1)
    off = (pictures - ground[..., None, None]).norm(dim=1) > 0.3  # (B,32,32)
    pairs, found = [], []
    for i, own in enumerate(numbers):
        sizes = own.unique(return_counts=True)
        mine = [k for k, n in zip(*sizes) if k and n >= 5]
        near = F.max_pool2d(torch.isin(own, torch.tensor(mine))[None].float(), 3, 1, 1)[0]
        wrong = dull[i] or len(mine) > 2 or (off[i] & (near == 0)).sum() >= 5
        found.append([None] if wrong else [])
        pairs += [] if wrong else [(i, k) for k in mine]
    if not pairs:
        return found
    row, number = (torch.tensor(column) for column in zip(*pairs))  # (N,) blobs of five pixels and more
    mask = numbers[row] == number[:, None, None]  # (N,32,32)
    votes = torch.stack([(mask & (colour[row] == 1 + c)).sum((1, 2)) for c in range(len(PALETTE))], 1)  # (N,4)
    colour = votes.argmax(1)
    inside = pictures[row].masked_fill(~mask[:, None], torch.nan).flatten(2).nanmedian(2).values  # (N,3)
    pure = (inside - PALETTE[colour]).norm(dim=1) < HALF_WAY
    # How much of each pixel is covered, its place between the ground and that colour, and how far it is from both.
    towards = (inside - ground[row])[..., None, None]
    offset = (pictures[row] - ground[row][..., None, None]) * F.max_pool2d(mask[:, None].float(), 3, 1, 1)
    length = towards.square().sum(1)
    share = ((offset * towards).sum(1) / length).clamp(0, 1)  # (N,32,32)
    stray = ((offset - share[:, None] * towards).square().sum(1) / length).sum((1, 2))
    mass = share.sum((1, 2))
    x, y = (share.sum(1) * GRID).sum(1) / mass, (share.sum(2) * GRID).sum(1) / mass  # the centre of mass (N,)
    errors = []
    for shape in range(len(SHAPES)):
        for radius in RADII.expand(len(row), -1).T:
            lower = 0.95 / 3 * radius * (shape == 2)  # of a triangle the mass lies lower than the middle
            ideal = cover(GRID - x[:, None], GRID - (y - lower)[:, None], radius, torch.full_like(row, shape))
            errors.append(((ideal - share).square().sum((1, 2)) + stray) / mass)
    error, best = torch.stack(errors, 1).min(1)
    shape, radius = best // len(RADII), RADII[best % len(RADII)]
    size = torch.where((radius - 4.25).abs() < 0.7, 0, torch.where((radius - 6.25).abs() < 0.7, 1, 2))
    good = (error < 0.12) & pure & (radius > RADII[0]) & (radius < RADII[-1])
    for i, ok, *values in zip(*(v.tolist() for v in (row, good, size, colour, shape, x, y))):
        found[i].append(tuple(values) if ok else None)
    return found


def shows(scene, found):
    """Whether the objects that were read, in either order, are as the scene says, and stand as it says."""
    objects, relation = objects_of(scene)
    if None in found or len(found) != len(objects):
        return False
    for order in (found, found[::-1]):
        if all(a in (-1, b) for asked, got in zip(objects, order) for a, b in zip(asked, got)):
            if relation == 0:
                return True
            dx, dy = (b - a for a, b in zip(order[0][3:], order[1][3:]))
            along, aside = [(dx, dy), (-dx, dy), (dy, dx), (-dy, dx)][relation - 1]
            if along > 8 and along > abs(aside):
                return True
    return False


def accuracy(numbers, pictures):
    """The share of pictures (B,3,32,32) that show what their scenes (B,) say, all of it, and nothing else."""
    found = [objects for part in pictures.split(500) for objects in read(part)]
    return float(np.mean([shows(scene, objects) for scene, objects in zip(SCENES[numbers].tolist(), found)]))


def variety(number, pictures):
    """How many colours have the pictures (B,3,32,32) that show a scene of one object: exp of the entropy, or 0."""
    shown = [found[0][1] for found in read(pictures) if shows(SCENES[number].tolist(), found)]
    share = np.unique(shown, return_counts=True)[1] / max(1, len(shown))
    return float(np.exp(-(share * np.log(share)).sum())) if shown else 0.0


# %% [markdown]
# The reader has to be right about the truth, and to notice each kind of mistake.


# %%
def mistakes():
    """{mistake: function from scenes (B,7) of two unlike objects to scenes that differ in this alone}."""

    def changed(column, count):
        def change(scenes):
            other = scenes.clone()
            other[:, column] = (scenes[:, column] + 1) % count
            return other

        return change

    def turned(scenes):
        other = scenes.clone()
        other[:, 3] = torch.tensor([0, 2, 1, 4, 3])[scenes[:, 3]]
        return other

    def quarter(scenes):
        other = scenes.clone()
        other[:, 3] = torch.tensor([0, 3, 4, 1, 2])[scenes[:, 3]]
        return other

    def crossed(scenes):  # the colours change places
        return scenes[:, [0, 5, 2, 3, 4, 1, 6]]

    def alone(scenes):
        return torch.cat([scenes[:, :3], 0 * scenes[:, 3:]], 1)

    kinds = {"size": (0, 2), "colour": (1, 4), "shape": (2, 3), "size of the second": (4, 2)}
    made = {name: changed(*kind) for name, kind in (kinds | {"colour of the second": (5, 4)}).items()}
    return made | {"turned by a quarter": quarter, "relation": turned, "colours swapped": crossed, "one missing": alone}


if LECTURE:
    generator = torch.Generator().manual_seed(0)
    numbers = pick(4000, generator)
    print(f"read as drawn: {accuracy(numbers, draw(SCENES[numbers], generator)):.2%}")
    first, second = SCENES[:, :3], SCENES[:, 4:]
    unlike = (SCENES[:, 3] > 0) & (SCENES >= 0).all(1) & (first != second).any(1)  # two, of which all is said
    unlike = torch.where(unlike)[0][torch.randperm(int(unlike.sum()), generator=generator)[:500]]
    for name, change in mistakes().items():
        told = unlike[(change(SCENES[unlike]) != SCENES[unlike]).any(1)]  # two red objects cannot swap their colours
        print(f"{name}: {accuracy(told, draw(change(SCENES[told]), generator)):.2%} taken for right")

# %% [markdown]
# ## Teacher and student
#
# Everything is as for faces: patches of 8×8 pixels become their 32 main components, a small DiT sees them as 16 tokens,
# and the ten places of a sentence, filled or empty, as ten more. A tenth of the teacher's rows lose their sentence, so
# that one network knows both velocities. The guided teacher, two passes a step, is distilled into a student that needs
# one.
#
# Here the critic holds the student against the data, which both should look like: at this scale guidance mends what the
# teacher gets wrong. It pulls away from the guide all the same, and so has a small weight. Of "left of", and of which
# object is red, it knows nothing: its score is a sum over the words, and what it gives to "A left of B" and to "B right
# of A" is together the same whichever way they stand. That much the student has from its teacher.

# %%
# The schedule of the faces, with a wider window and a slow critic of small weight: a larger one brings the student
# nearer to the data, and away from its guided teacher. The last phase is short, and compares landing points: what one
# step gets right has to survive it.
FIRST, LAST = celeba_latent.SCHEDULES["two_phase"]
FIRST = replace(FIRST, delta=0.3, lr_disc=5e-5, lambda_adv=0.004, at_one=0.25)
LAST = replace(LAST, lr=2e-4, lr_disc=5e-5, lambda_adv=0.001, at_one=0.75, self_form="x0")
PRESETS = {  # network, teacher, student
    "cpu": (
        dict(dim=128, depth=4, heads=4),
        scflow.TeacherSettings(6000, 32, 2e-3),
        (replace(FIRST, steps=3000, lr=2e-3), replace(LAST, steps=150)),
    ),
    "gpu": (  # a guess, never run
        dict(dim=384, depth=8, heads=6),
        scflow.TeacherSettings(20000, 256, 5e-4),
        (replace(FIRST, steps=6000, batch=128), replace(LAST, steps=500, batch=128)),
    ),
}


@dataclass(frozen=True)
class Captions(celeba_latent.Folder):
    """What is trained, and how it is measured."""

    seeds: tuple = option((0,), "seeds, a run folder each; with --resume finished ones are read back")
    preset: str = option("", "size and length [gpu on CUDA, else cpu]", choices=tuple(PRESETS))
    guidance: float = option(2.0, "guidance scale of the teacher that is distilled")
    samples: int = option(1000, "pictures that are read and compared; a quarter as many of held-out combinations")
    save_every: int = option(500, "updates between checkpoints")
    out: str = option("runs/captions", "folder of the run folders")


LATENT = (32, 4, 4)  # 32 components of each patch of 8×8 pixels: enough to read every object back


def codec_of(drawings=6000, scale=0.35):
    """The autoencoder of the captions, as a dictionary of which `celeba_latent.Codec` is made.

    Latents have a deviation of `scale`: what a picture shows is then decided in the middle of the path. At unit scale
    it would be settled right after t = 1, where few of the times that training draws lie.
    """
    generator = torch.Generator().manual_seed(0)
    pictures, net = draw(SCENES[pick(drawings, generator)], generator), celeba_latent.PatchPCA(SIDE // 4, LATENT[0])
    net.fit(pictures)
    z = net.encode(pictures)
    mean = z.mean((0, 2, 3))[:, None, None]
    std = (z - mean).square().mean().sqrt().expand(LATENT[0], 1, 1) / scale
    return dict(arch=net.arch, weights=net.state_dict(), mean=mean, std=std.clone(), size=SIDE)


def encode(codec, pictures):
    """Pictures (B,3,32,32) → normalised latents (B,32,4,4)."""
    return (codec.net.encode(pictures) - codec.mean) / codec.std


def captions(codec):
    """`batch(n, generator)` of latents (n,32,4,4) and their tokens (n,10), drawn as they are needed."""
    words, scenes = TOKENS.to(codec.device), SCENES.to(codec.device)

    def batch(n, generator):
        numbers = pick(n, generator)
        z = encode(codec, draw(scenes[numbers], generator))
        return z, words[numbers]

    return batch


class Log:
    """The past of a run: losses of every tenth update."""

    def __init__(self, rows=()):
        self.rows, self.frames = list(rows), []

    def note(self, stage, state, total):
        """Record a State of the teacher or the student."""
        if state.step % 10 == 1:
            self.rows.append({"stage": stage, "step": state.step, **state.losses})


def run_one(asked, seed):
    """Teacher, student and measures of one seed; returns its folder and metrics. A finished run is read back."""
    dims, settings, schedule = PRESETS[asked.preset]
    config = dict(seed=seed, guidance=asked.guidance, preset=asked.preset, samples=asked.samples, device=asked.device)
    config |= dict(network=dims, teacher=asdict(settings), student=[asdict(phase) for phase in schedule])
    folder = Path(asked.out, f"seed-{seed}")
    started = asked.resume and (folder / "config.json").exists()
    folder = toy_2d.open_folder(folder, "", started, asked.overwrite, config)
    if started and (folder / "metrics.json").exists():
        return folder, toy_2d.read_json(folder / "metrics.json", "rows")
    run, log, kept = replace(asked, resume=started), Log(), folder / "teacher.pt"
    content = scflow.read(kept)["codec"] if kept.exists() else codec_of()
    codec = celeba_latent.Codec(content, run.device)
    tokens, device = (LENGTH, len(WORDS)), run.device
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator(device).manual_seed(seed)
    net = scflow.DiT(LATENT, 1, **dims, tokens=tokens).to(device)
    disc = scflow.LatentDiscriminator(LATENT, tokens=tokens).to(device)
    batch = captions(codec)
    start = partial(scflow.train_teacher, net, batch, generator, settings, None)
    teacher = toy_2d.stage("teacher", run, folder, log, net, start, settings.teacher_steps, codec=content)
    guided = scflow.guided(teacher, run.guidance)
    loop = partial(scflow.distill, guided, disc, batch, generator, schedule, teacher)
    total = sum(p.steps for p in schedule)
    student = toy_2d.stage("student", run, folder, log, teacher, lambda r: loop(resume=r), total, codec=content)
    metrics = config | dict(rows=measure(asked, codec, teacher, student, seed), machine=toy_2d.machine())
    toy_2d.drawing()
    toy_2d.write_figure(folder / "prompts.png", prompt_sheet(codec, teacher, student, run.guidance), 80)
    toy_2d.write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    return folder, metrics


def paint(codec, net, numbers, steps, seed=0):
    """Samples uint8 (B,3,32,32) of a velocity for scenes (B,), in batches."""
    noise = torch.randn(len(numbers), *LATENT, generator=torch.Generator().manual_seed(seed))
    parts = zip(*(x.to(codec.device).split(500) for x in (noise, TOKENS[numbers])))
    return torch.cat([codec.decode(scflow.sample(net, x, steps, cond=cond)) for x, cond in parts])


def twins(numbers):
    """The scenes (B,) with red in place of each colour that is held out: seen in training, with as much left open."""
    scenes = SCENES[numbers]
    for colour, shape in ((1, 2), (5, 6)):
        held = (scenes[:, colour] >= 0) & ~TRAINED[scenes[:, shape], scenes[:, colour]]
        scenes[held, colour] = 0
    return torch.tensor([SENTENCES[sentence(scene)] for scene in scenes.tolist()])


def measure(asked, codec, teacher, student, seed):
    """Rows of prompt accuracy and Fréchet distances: truth, autoencoder, teacher without and with guidance, student."""
    generator, n = torch.Generator().manual_seed(10**6 + seed), asked.samples
    numbers, unseen = pick(n, generator), pick(max(1, n // 4), generator, unseen=True)
    reds, circles = twins(unseen), torch.full((max(1, n // 4),), circle := parse("a circle"))

    def drawn(numbers):
        return (255 * draw(SCENES[numbers], generator)).round().byte()

    def through(numbers):
        return codec.decode(encode(codec, (drawn(numbers) / 255).to(codec.device)))

    compare = celeba_latent.PictureMeasure(*celeba_latent.features_of(drawn(pick(5 * n, generator))))
    guided, rows = scflow.guided(teacher, asked.guidance), []
    plan = [("truth", drawn, 0), ("autoencoder", through, 0)]
    plan += [("teacher, unguided", teacher, k) for k in (1, 2, 4, 50)]
    plan += [("teacher, guided", guided, 50), *(("student", student, k) for k in (1, 2, 4, 8))]
    for who, net, steps in plan:
        make = partial(paint, codec, net, steps=steps, seed=10**6 + seed) if steps else net
        seen, other, red, open_colour = map(make, (numbers, unseen, reds, circles))
        row = dict(who=who, steps=steps, nfe=steps * (1 + (net is guided)), accuracy=accuracy(numbers, seen / 255))
        row |= dict(unseen=accuracy(unseen, other / 255), twins=accuracy(reds, red / 255))
        row |= dict(colours=variety(circle, open_colour / 255))
        rows.append(row | compare(*celeba_latent.features_of(seen)))
    return rows


def captions_table(done):
    """Lines of Markdown: mean ± sd over seeds."""
    first, names = done[0], ("accuracy", "unseen", "twins", "colours", "layout", "texture")
    seeds = ", ".join(str(m["seed"]) for m in done)
    yield f"Preset {first['preset']}, guidance {first['guidance']:g}, {first['samples']} samples, seeds {seeds};"
    yield f"{first['machine']}."
    yield "Accuracy: share of pictures that show all the sentence says, of seen sentences, of held-out combinations,"
    yield "and of the same sentences with red for the colour that is held out. Colours: exp of their entropy where"
    yield 'pictures show "a circle", 4 at best. Layout, texture: Fréchet distances ×10³.'
    head = ("network", "evaluations", "accuracy", "held out", "in red", 'colours of "a circle"', "layout", "texture")
    yield from ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for i, row in enumerate(first["rows"]):
        cells = []
        for name in names:
            unit, digits, factor = {"colours": ("", 2, 1)}.get(name, ("%" * (name in names[:3]), 1, 1000))
            v = np.array([m["rows"][i][name] for m in done]) * (100 if unit else factor)
            spread = f" ± {v.std(ddof=1):.{digits}f}" if len(v) > 1 else ""
            cells.append(f"{v.mean():.{digits}f}{spread}{unit}")
        yield f"| {row['who']} | {row['nfe'] or ''} | {' | '.join(cells)} |"


SHEET = (
    "a small red circle left of a large blue square",
    "a large yellow triangle above a small green circle",
    "a red triangle below a large square",
    "a circle right of a circle",
    "a square",
    "a large green triangle left of a blue square",
    "a small yellow square above a circle",
)


def sheet(columns, prompts, figsize):
    """A figure with a row for each sentence and a column {title: pictures} for each network."""
    figure, axes = plt.subplots(len(prompts), len(columns), figsize=figsize, layout="constrained")
    for row, prompt, pictures in zip(axes, prompts, zip(*columns.values())):
        unseen = "\n(held out)" * bool(UNSEEN[parse(prompt)])
        first, *rest = prompt.split(" a ")
        text = "\na ".join([first, *rest]) + unseen
        row[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=10)
        for ax, picture in zip(row, pictures):
            ax.imshow(picture.permute(1, 2, 0))
            ax.set(xticks=[], yticks=[])
    for ax, title in zip(axes[0], columns):
        ax.set_title(title, fontsize=10)
    return figure


def prompt_sheet(codec, teacher, student, scale):
    """A row for each sentence of SHEET: a true drawing, and samples of one noise."""
    numbers, guided = torch.tensor([parse(prompt) for prompt in SHEET]), scflow.guided(teacher, scale)
    columns = {"drawn": (255 * draw(SCENES[numbers], torch.Generator().manual_seed(1))).round().byte()}
    for title, net, steps in (
        ("teacher\n50 steps", teacher, 50),
        (f"guided, w = {scale:g}\n50 steps", guided, 50),
        ("guided\n1 step", guided, 1),
        ("student\n1 step", student, 1),
        ("student\n2 steps", student, 2),
        ("student\n4 steps", student, 4),
    ):
        columns[title] = paint(codec, net, numbers, steps, seed=1)
    return sheet(columns, SHEET, (11, 8.6))


# %% [markdown]
# A few hundred updates of the teacher show in which order things are learned: where something is, then its colour and
# size, and last which shape.

# %%
if LECTURE:
    torch.manual_seed(100)
    dims, settings, _ = PRESETS["cpu"]
    codec, generator = celeba_latent.Codec(codec_of()), torch.Generator().manual_seed(100)
    net = scflow.DiT(LATENT, 1, **dims, tokens=(LENGTH, len(WORDS)))
    numbers, columns = torch.tensor([parse(prompt) for prompt in SHEET[:4]]), {}
    for run in scflow.train_teacher(net, captions(codec), generator, settings):
        if run.step % 250 == 0:
            columns[f"{run.step} updates"] = paint(codec, scflow.guided(run.ema, 2.0), numbers, 20, seed=1)
        if run.step == 750:
            break
    sheet(columns, SHEET[:4], figsize=(6, 5))
    plt.show()

# %% [markdown]
# `python notebooks/07_prompts_and_guidance.py --seeds 0 1 2` trains three teachers and their students to the end, and
# writes a table and a sheet of prompts (both are in the README); `sample --prompt "..."` draws a sentence.
#
# Where the sentence says all, the unguided teacher's single step is often readable too: the mean of pictures that
# hardly differ is one of them, only softer. Where a colour is open it never is. There the student has something to
# learn, and there the sheet shows its mistakes: a mixture of two colours.

# %% [markdown]
# **Exercise.** When does the guided flow end in the tilted density after all? Take one Gaussian for the velocity
# without the label, N(0, s²), and another of the same width for that with it, N(m, s²). Where is the mean of what
# comes out?


# %%
def guided_mean(m, scale):
    """The mean of the samples that the guided velocity of N(0,s²) and N(m,s²) ends in."""
    # your answer
    return scale * m


# %%
pair = [scflow.GaussianMixture([[mean, 0.0]], 0.5) for mean in (0.0, 1.2)]
both = lambda x, t, cond: torch.where(cond > 0, pair[1](x, t), pair[0](x, t))  # noqa: E731
noise, label = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)), torch.ones(1000, 1, dtype=torch.int64)
for scale in (0.5, 1.0, 3.0):
    x = scflow.sample(scflow.guided(both, scale), noise, 20, "heun", label)
    mean, width = x.mean(0), x.std(0)
    assert abs(mean[0] - guided_mean(1.2, scale)) < 0.05 and (width - 0.5).abs().max() < 0.05
# Velocities of Gaussians of one width are linear in their means: v_w is the velocity of N(w·m, s²), the tilted density,
# at every t. It takes more than one Gaussian, or other widths, for the two to part.

# %% [markdown]
# ## Commands


# %%
def train_command(argv):
    """Train, distil and measure; a table over the seeds."""
    asked = Captions(**toy_2d.cli(argv, train_command.__doc__, Captions)[0])
    require(asked.samples >= 200, f"{asked.samples} samples are too few for a Fréchet distance: give 200 or more")
    require(len({*asked.seeds}) == len(asked.seeds), f"--seeds names one twice: {' '.join(map(str, asked.seeds))}")
    require(math.isfinite(asked.guidance), f"--guidance is a number, not {asked.guidance}")
    there = [str(p) for seed in asked.seeds if (p := Path(asked.out, f"seed-{seed}")).exists()]
    free = asked.resume or asked.overwrite or not there  # known before the first seed is trained
    require(free, f"{', '.join(there)} exists: give --resume to go on with it, or --overwrite")
    asked = replace(asked, preset=asked.preset or ("gpu" if asked.device.startswith("cuda") else "cpu"))
    done = [run_one(asked, seed) for seed in asked.seeds]
    toy_2d.write_text(Path(asked.out, "captions.md"), text := "\n".join(captions_table([m for _, m in done])) + "\n")
    print(text)


@dataclass(frozen=True)
class Sample(celeba_latent.Device):
    """What is drawn."""

    prompt: str = option("a small red circle left of a large blue square", GRAMMAR)
    out: str = option("runs/captions/seed-0", "run folder (its student), or a weights file alone")
    steps: tuple = option((1,), "Euler steps, a row for each number")
    count: int = option(8, "pictures in a row")
    seed: int = option(0, "seed of the noise")
    file: str = option("prompt.png", "where the pictures go")


def sample_command(argv):
    """Draw a sentence."""
    from PIL import Image

    asked = Sample(**toy_2d.cli(argv, sample_command.__doc__, Sample)[0])
    number, source = parse(asked.prompt), Path(asked.out)
    net, codec = celeba_latent.load_run(source / "student.pt" if source.is_dir() else source, asked.device)
    fits = net.arch.get("shape") == [*LATENT] and net.arch.get("tokens") == [LENGTH, len(WORDS)]
    require(fits, f"{source} holds no network of captions: train one with this program")
    numbers = torch.full((asked.count,), number)
    rows = [paint(codec, net, numbers, steps, asked.seed) for steps in asked.steps]
    framed = [F.pad(row, (1, 1, 1, 1), value=255).permute(0, 2, 3, 1) for row in rows]  # (count,34,34,3)
    grid = torch.cat([torch.cat([*row], 1) for row in framed])  # (rows·34, count·34, 3)
    image = Image.fromarray(grid.numpy())
    image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST).save(asked.file)
    for steps, row in zip(asked.steps, rows):
        right = accuracy(numbers, row / 255)
        print(f"{asked.file}: {toy_2d.plural(steps, 'network evaluation')} each, {right:.0%} read back as asked")


if __name__ == "__main__" and not LECTURE:
    program = dict(train=train_command, sample=sample_command)
    sys.exit(toy_2d.main(None, program, "train", Path(__file__).name))
