"""Prompts in miniature: a world of sentences, a reader that checks pictures, a guided teacher and its student.

    python -m experiments.captions --seeds 0 1 2              train, distil and measure; table and sheets
    python -m experiments.captions --seeds 0 1 2 --resume     go on where it was stopped
    python -m experiments.captions sample --prompt "a circle above a square" --steps 1 2 4

Pictures of 32×32 pixels show one or two shapes on a bright ground. A sentence may name the size and the
colour of each, or leave them open: "a circle above a red square" has any size and, of the circle, any
colour. There are 8,145 sentences, and no end of pictures of each.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import celeba_latent
import scflow
import toy_2d
from celeba_latent import Codec, PatchPCA, RunFile
from experiments import common
from scflow import TeacherSettings, require

# ═══ 1. Sentences ═════════════════════════════════════════════════════════════════════════
# A scene is seven whole numbers: size, colour, shape; the relation; size, colour, shape of the second
# object. An open size or colour is −1. Relations count from 1; with 0 there is no second object.

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
WORDS = ("a", *SIZES, *COLOURS, *SHAPES, "left", "right", "of", "above", "below")
LENGTH = 10  # places of a sentence, each for words of one kind
GRAMMAR = "a [SIZE] [COLOUR] SHAPE, or a [SIZE] [COLOUR] SHAPE RELATION a [SIZE] [COLOUR] SHAPE"
HELD_OUT = (("green", "triangle"), ("yellow", "square"))  # no picture with one of these is trained on


def places_of(scene: list[int]) -> list[str]:
    """The ten places of a scene's sentence, "" where nothing is said: four, two for the relation, four."""
    size, colour, shape, relation, *second = scene
    if relation == 0:
        return noun(size, colour, shape) + 6 * [""]
    between = RELATIONS[relation - 1].split()
    if len(between) == 1:
        between.append("")
    return noun(size, colour, shape) + between + noun(*second)


def noun(size: int, colour: int, shape: int) -> list[str]:
    """The four places of an object."""
    sizes = (*SIZES, "")  # −1, open, is the last
    colours = (*COLOURS, "")
    return ["a", sizes[size], colours[colour], SHAPES[shape]]


def sentence(scene: list[int]) -> str:
    """The words of a scene."""
    return " ".join(word for word in places_of(scene) if word)


def tokens_of(scene: list[int]) -> list[int]:
    """The ten places as tokens: words from 1 on, 0 for nothing."""
    vocabulary = ("", *WORDS)
    return [vocabulary.index(word) for word in places_of(scene)]


def every_scene() -> tuple[Tensor, Tensor]:
    """All scenes (8145,7), those of one object first, and how often each is said (8145,).

    A fifth have one object. A size is open half of the time, a colour one time in four.
    """
    nouns = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 4), torch.arange(3))  # (45,3)
    size_said = torch.where(nouns[:, 0] < 0, 1 / 2, 1 / 4)
    colour_said = torch.where(nouns[:, 1] < 0, 1 / 4, 3 / 16)
    said = size_said * colour_said / 3  # (45,)
    nothing = torch.zeros(45, 4, dtype=torch.int64)
    one = torch.cat([nouns, nothing], 1)
    i, relation, j = torch.cartesian_prod(torch.arange(45), torch.arange(1, 5), torch.arange(45)).T
    two = torch.cat([nouns[i], relation[:, None], nouns[j]], 1)
    chance = torch.cat([0.2 * said, 0.8 / 4 * said[i] * said[j]])
    return torch.cat([one, two]), chance


def is_held_out(text: str) -> bool:
    """Whether a sentence names a combination that is held out."""
    return any(f"{colour} {shape}" in text for colour, shape in HELD_OUT)


SCENES, CHANCE = every_scene()
SENTENCES = {sentence(scene): number for number, scene in enumerate(SCENES.tolist())}
TOKENS = torch.tensor([tokens_of(scene) for scene in SCENES.tolist()])  # (8145,10)
UNSEEN = torch.tensor([is_held_out(text) for text in SENTENCES])  # (8145,)


def parse(prompt: str) -> int:
    """The number of the scene that a sentence describes. Raises ValueError for what is not in the grammar."""
    words = prompt.lower().replace(".", "").split()
    unknown = [repr(word) for word in words if word not in WORDS]
    require(not unknown, f"unknown word {', '.join(unknown)}; the words are: {', '.join(WORDS)}")
    text = " ".join(words)
    require(text in SENTENCES, f"{prompt!r} is outside the grammar, which is: {GRAMMAR}")
    return SENTENCES[text]


def numbers_of(scenes: Tensor) -> Tensor:
    """The numbers (B,) of scenes (B,7)."""
    return torch.tensor([SENTENCES[sentence(scene)] for scene in scenes.tolist()])


def pick(n: int, generator=None, unseen: bool = False) -> Tensor:
    """Numbers (n,) of random scenes: those that are trained on, or those with what is held out."""
    device = generator.device if generator else "cpu"
    chance = CHANCE * (UNSEEN == unseen)
    return torch.multinomial(chance.to(device), n, replacement=True, generator=generator)


def in_red(numbers: Tensor) -> Tensor:
    """The scenes (B,) with red in place of each colour that is held out: just as hard, but trained on."""
    scenes = SCENES[numbers]
    for colour, shape in ((1, 2), (5, 6)):
        said = scenes[:, colour] >= 0
        held_out = said & ~TRAINED[scenes[:, shape], scenes[:, colour]]
        scenes[held_out, colour] = COLOURS.index("red")
    return numbers_of(scenes)


# ═══ 2. Pictures ══════════════════════════════════════════════════════════════════════════

SIDE = 32
GRID = torch.arange(SIDE) + 0.5  # centres of the pixels
RADII = torch.tensor([(4.0, 4.5), (6.0, 6.5)])  # of small and large objects, from and to, in pixels
PALETTE = torch.tensor(
    [
        (0.85, 0.15, 0.15),
        (0.15, 0.65, 0.2),
        (0.15, 0.3, 0.85),
        (0.95, 0.8, 0.1),
    ]
)
# From the first object to the second, by relation; x points to the right, y down.
DIRECTIONS = torch.tensor([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
TRAINED = torch.ones(len(SHAPES), len(COLOURS), dtype=torch.bool)  # (3,4), False for what is held out
for held_colour, held_shape in HELD_OUT:
    TRAINED[SHAPES.index(held_shape), COLOURS.index(held_colour)] = False


def settle(scenes: Tensor, generator=None) -> Tensor:
    """Scenes (B,7) with all that was open drawn at random: any size, and any colour that is not held out."""
    settled = scenes.clone()
    allowed = TRAINED.float().to(scenes.device)
    for size, colour, shape in ((0, 1, 2), (4, 5, 6)):
        any_size = torch.randint(2, (len(scenes),), generator=generator, device=scenes.device)
        any_colour = torch.multinomial(allowed[scenes[:, shape]], 1, generator=generator)[:, 0]
        settled[:, size] = torch.where(scenes[:, size] < 0, any_size, scenes[:, size])
        settled[:, colour] = torch.where(scenes[:, colour] < 0, any_colour, scenes[:, colour])
    return settled


def cover(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """How much of each pixel a shape covers, (B,32,32).

    x, y    (B,32) each, of the columns and the rows, from the middle of the shape
    radius  (B,)
    shape   (B,), its number
    """
    x = x[:, None, :]  # (B,1,32)
    y = y[:, :, None]  # (B,32,1)
    r = radius[:, None, None]
    # How far each pixel lies inside the edge. The triangle has equal sides and points up.
    circle = r - (x**2 + y**2).sqrt()
    square = 0.9 * r - torch.maximum(x.abs(), y.abs())
    base = 0.95 * r - y
    sides = (y + 0.95 * r) / 2 - math.sqrt(0.75) * x.abs()
    triangle = torch.minimum(base, sides)
    inside = torch.stack([circle, square, triangle], 1)  # (B,3,32,32)
    rows = torch.arange(len(shape), device=shape.device)
    return (inside[rows, shape] + 0.5).clamp(0, 1)


def draw(scenes: Tensor, generator=None) -> Tensor:
    """Pictures (B,3,32,32) in [0,1] of scenes (B,7), on the device of the scenes and the generator."""
    device = scenes.device
    n = len(scenes)
    grid = GRID.to(device)

    def between(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator, device=device)

    def paint(picture, thing, place):
        """Lay an object (B,3) over a picture, its middle at `place` (B,2)."""
        size, colour, shape = thing.T
        low, high = RADII.to(device)[size].T
        radius = low + (high - low) * between(0, 1)
        rgb = PALETTE.to(device)[colour] + between(-0.06, 0.06, 3)
        rgb = rgb.clamp(0, 1)[:, :, None, None]
        mask = cover(grid - place[:, :1], grid - place[:, 1:], radius, shape)[:, None]
        return picture + mask * (rgb - picture)

    # All numbers are drawn whether they are used or not: a seed gives one picture per scene.
    scenes = settle(scenes, generator)
    ground = between(0.8, 1.0)
    apart = between(15.5, 16.5, 1)
    aside = between(-2, 2, 1)
    in_the_middle = between(-0.5, 0.5, 2)
    anywhere = between(-2, 2, 2)

    relation = scenes[:, 3:4]  # (B,1)
    two = relation > 0
    direction = DIRECTIONS.to(device)[relation[:, 0]]  # (B,2)
    step = torch.where(direction != 0, direction * apart, aside) * two  # from the first to the second
    centre = SIDE / 2 + torch.where(two, in_the_middle, anywhere)

    picture = ground[:, None, None, None].expand(n, 3, SIDE, SIDE)
    picture = paint(picture, scenes[:, :3], centre - step / 2)
    both = paint(picture, scenes[:, 4:], centre + step / 2)
    return torch.where(two[:, :, None, None], both, picture)


# ═══ 3. The reader ════════════════════════════════════════════════════════════════════════
# Whether a picture shows what the sentence says is a question for a program, not for an opinion. It finds
# the ground, the blobs of colour on it, and for each blob the shape and radius that, drawn in its place,
# come closest. A blob that is close to none, or half of the way to another colour, makes the picture
# wrong. So does any other stain. What the sentence leaves open may be anything.

LEAST = 5  # pixels of a blob that counts
TRIANGLE = SHAPES.index("triangle")
TRIED = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0, 7.6, 0.25))  # shapes × radii, (57,2)
TRIED_SHAPES = TRIED[:, 0].long()
TRIED_RADII = TRIED[:, 1]
HALF_WAY = torch.pdist(PALETTE).min() / 2  # from a colour to the nearest other one, 0.33; drawn within 0.1


class Thing(NamedTuple):
    """An object that was read: numbers of its size (2 is neither), colour and shape, and its centre in pixels."""

    size: int
    colour: int
    shape: int
    x: float
    y: float


def read(pictures: Tensor) -> list[list[Thing | None]]:
    """For each picture (B,3,32,32) in [0,1] the objects it shows. None stands for something that is no object."""
    ground = ground_of(pictures)  # (B,3)
    nearest = nearest_colour(pictures, ground)  # (B,32,32), 0 for the ground
    blobs = touching(nearest > 0)  # (B,32,32)
    return [things_of(*parts) for parts in zip(pictures, ground, nearest, blobs)]


def ground_of(pictures: Tensor) -> Tensor:
    """The median colour of the border, (B,3)."""
    rows = [pictures[:, :, 0], pictures[:, :, -1]]
    columns = [pictures[:, :, :, 0], pictures[:, :, :, -1]]
    return torch.cat(rows + columns, 2).median(2).values


def nearest_colour(pictures: Tensor, ground: Tensor) -> Tensor:
    """Which of ground, red, green, blue and yellow each pixel is nearest to, from 0 on, (B,32,32)."""
    palette = PALETTE.expand(len(pictures), -1, -1)
    known = torch.cat([ground[:, None], palette], 1)  # (B,5,3)
    difference = pictures[:, None] - known[..., None, None]  # (B,5,3,32,32)
    return difference.square().sum(2).argmin(1)


def touching(mask: Tensor) -> Tensor:
    """Numbers from 1 on for the pixels of a mask (B,H,W), the same for those that touch, and 0 elsewhere."""
    h, w = mask.shape[1:]
    numbers = torch.arange(1.0, h * w + 1).reshape(h, w) * mask
    while True:  # every pixel takes the largest number beside it, until none changes
        beside = F.max_pool2d(numbers, (1, 3), 1, (0, 1))
        above = F.max_pool2d(numbers, (3, 1), 1, (1, 0))
        spread = torch.maximum(beside, above) * mask
        if torch.equal(spread, numbers):
            return numbers.long()
        numbers = spread


def things_of(picture: Tensor, ground: Tensor, nearest: Tensor, blobs: Tensor) -> list[Thing | None]:
    """The objects of one picture (3,32,32), given its ground (3,), nearest colours and blobs (32,32)."""
    count = blobs.flatten().bincount()
    count[0] = 0  # the ground
    masks = [blobs == number for number in torch.where(count >= LEAST)[0]]
    grey = ground.mean()
    dull = grey < 0.7 or (ground - grey).abs().max() > 0.1
    near = grow((count >= LEAST)[blobs])  # the blobs with their edges
    stain = (picture - ground[:, None, None]).norm(dim=0) > 0.3
    stained = (stain & ~near).sum() >= LEAST
    if dull or stained or len(masks) > 2:
        return [None]
    return [thing_of(picture, ground, nearest, mask) for mask in masks]


def grow(mask: Tensor) -> Tensor:
    """A mask (H,W) with all its neighbours."""
    return F.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0


def thing_of(picture: Tensor, ground: Tensor, nearest: Tensor, mask: Tensor) -> Thing | None:
    """The object whose pixels a mask (32,32) marks, or None if it is no clean one."""
    colour = nearest[mask].bincount(minlength=5).argmax() - 1
    inside = picture[:, mask].median(1).values  # (3,)
    pure = (inside - PALETTE[colour]).norm() < HALF_WAY

    # How much of each pixel is covered: its place on the line from the ground's colour to the object's.
    # What lies beside that line is astray.
    line = (inside - ground)[:, None, None]  # (3,1,1)
    length = line.square().sum()
    offset = (picture - ground[:, None, None]) * grow(mask)  # (3,32,32)
    share = ((offset * line).sum(0) / length).clamp(0, 1)  # (32,32)
    astray = (offset - share * line).square().sum() / length
    mass = share.sum()
    x = (share.sum(0) * GRID).sum() / mass  # the centre of mass
    y = (share.sum(1) * GRID).sum() / mass

    # Every shape at every radius, drawn in that place. A triangle's middle is above its centre of mass.
    middle = y - 0.95 / 3 * TRIED_RADII * (TRIED_SHAPES == TRIANGLE)  # (57,)
    left = (GRID - x).expand(len(TRIED), SIDE)
    ideal = cover(left, GRID - middle[:, None], TRIED_RADII, TRIED_SHAPES)  # (57,32,32)
    error = ((ideal - share).square().sum((1, 2)) + astray) / mass  # (57,)
    best = error.argmin()
    radius = TRIED_RADII[best]
    fits = error[best] < 0.12 and TRIED_RADII[0] < radius < TRIED_RADII[-1]
    if not (pure and fits):
        return None
    return Thing(size_of(radius), int(colour), int(TRIED_SHAPES[best]), float(x), float(y))


def size_of(radius: Tensor) -> int:
    """0 for small, 1 for large, 2 for neither."""
    for size, (low, high) in enumerate(RADII):
        if (radius - (low + high) / 2).abs() < 0.7:
            return size
    return 2


def shows(scene: list[int], things: list[Thing | None]) -> bool:
    """Whether the objects that were read are those of the scene, in either order, and stand as it says."""
    relation = scene[3]
    expected = 1 if relation == 0 else 2
    if None in things or len(things) != expected:
        return False
    if relation == 0:
        return agrees(scene[:3], things[0])
    for first, second in (things, things[::-1]):
        if agrees(scene[:3], first) and agrees(scene[4:], second) and stands(relation, first, second):
            return True
    return False


def agrees(asked: list[int], thing: Thing) -> bool:
    """Whether an object has the size, colour and shape that were asked for; −1 may be any."""
    return all(number in (-1, found) for number, found in zip(asked, thing))


def stands(relation: int, first: Thing, second: Thing) -> bool:
    """Whether the second object lies in that direction from the first, by 8 pixels, and more than aside."""
    dx = second.x - first.x
    dy = second.y - first.y
    right, down = DIRECTIONS[relation].tolist()
    along = right * dx + down * dy
    aside = right * dy + down * dx
    return along > 8 and along > abs(aside)


def accuracy(numbers: Tensor, pictures: Tensor) -> float:
    """The share of pictures (B,3,32,32) that show what their scenes (B,) say, all of it, and nothing else."""
    right = 0
    for some, part in zip(numbers.split(500), pictures.split(500)):
        for scene, things in zip(SCENES[some].tolist(), read(part)):
            right += shows(scene, things)
    return right / len(numbers)


def variety(number: int, pictures: Tensor) -> float:
    """How many colours have the pictures (B,3,32,32) that show a scene of one object: exp of the entropy, or 0."""
    scene = SCENES[number].tolist()
    colours = [things[0].colour for things in read(pictures) if shows(scene, things)]
    if not colours:
        return 0.0
    _, counts = np.unique(colours, return_counts=True)
    share = counts / len(colours)
    return math.exp(-(share * np.log(share)).sum())


def mistakes(scenes: Tensor) -> dict[str, Tensor]:
    """{mistake: the scenes (B,7), of two objects of which all is said, with this alone made wrong}.

    Where the mistake makes no difference (two red objects swap their colours) a scene stays as it is.
    """
    wrong = {}
    for name, column, words in (
        ("size", 0, SIZES),
        ("colour", 1, COLOURS),
        ("shape", 2, SHAPES),
        ("size of the second", 4, SIZES),
        ("colour of the second", 5, COLOURS),
    ):
        wrong[name] = scenes.clone()
        wrong[name][:, column] = (scenes[:, column] + 1) % len(words)
    opposite = torch.tensor((0, 2, 1, 4, 3))
    quarter = torch.tensor((0, 3, 4, 1, 2))
    for name, other in (("relation", opposite), ("turned by a quarter", quarter)):
        wrong[name] = scenes.clone()
        wrong[name][:, 3] = other[scenes[:, 3]]
    wrong["colours swapped"] = scenes[:, [0, 5, 2, 3, 4, 1, 6]]
    wrong["one missing"] = scenes.clone()
    wrong["one missing"][:, 3:] = 0
    return wrong


# ═══ 4. Latents, networks, schedules ══════════════════════════════════════════════════════
# Everything is as for faces. Patches of 8×8 pixels become their 32 main components, a small DiT sees them as
# 16 tokens, and the ten places of a sentence, filled or empty, as ten more.

LATENT = (32, 4, 4)  # enough components to read every object back
VOCABULARY = (LENGTH, len(WORDS))

# No critic: held against the data it would pull the student away from its guided teacher.
FIRST, LAST = scflow.SCHEDULES["two_phase"]
SCHEDULE = (
    replace(FIRST, steps=4000, batch=32, lr=2e-3, pinned=0.25),
    # Short, and compares landing points: what one step gets right has to survive it.
    replace(LAST, steps=300, batch=64, lr=2e-4, lambda_adv=0.0, self_form="x0"),
)
NETWORK = dict(dim=128, depth=4, heads=4)
TEACHER = TeacherSettings(teacher_steps=6000, teacher_batch=32, teacher_lr=2e-3)


def codec_of(drawings: int = 6000, scale: float = 0.35) -> dict:
    """The autoencoder of the captions, as a dictionary of which `celeba_latent.Codec` is made.

    Latents have a deviation of `scale`: what a picture shows is then decided in the middle of the path. At unit
    scale it would be settled right after t = 1, where few of the times that training draws lie.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = draw(SCENES[pick(drawings, generator)], generator)
    net = PatchPCA(SIDE // 4, LATENT[0])
    net.fit(pictures)
    z = net.encode(pictures)
    mean = z.mean((0, 2, 3))[:, None, None]  # (32,1,1)
    deviation = (z - mean).square().mean().sqrt()
    std = torch.full_like(mean, deviation.item() / scale)
    return {"arch": net.arch, "weights": net.state_dict(), "mean": mean, "std": std, "size": SIDE}


def encode(codec: Codec, pictures: Tensor) -> Tensor:
    """Pictures (B,3,32,32) → normalised latents (B,32,4,4)."""
    return (codec.net.encode(pictures) - codec.mean) / codec.std


def batches(codec: Codec):
    """`batch(n, generator)` of latents (n,32,4,4) and their tokens (n,10), drawn as they are needed."""
    tokens = TOKENS.to(codec.device)
    scenes = SCENES.to(codec.device)

    def batch(n, generator):
        numbers = pick(n, generator)
        pictures = draw(scenes[numbers], generator)
        return encode(codec, pictures), tokens[numbers]

    return batch


def paint(codec: Codec, net, numbers: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Samples uint8 (B,3,32,32) of a network for the sentences of scenes (B,)."""
    noise = torch.randn(len(numbers), *LATENT, generator=torch.Generator().manual_seed(seed))
    return celeba_latent.generate(net, noise, steps, codec, cond=TOKENS[numbers])


# ═══ 5. Measures, table, sheet ════════════════════════════════════════════════════════════


def measure(codec: Codec, teacher, student, guidance: float, n: int, seed: int) -> list[dict]:
    """Rows of accuracies and Fréchet distances: truth, autoencoder, teacher without and with guidance, student."""
    generator = torch.Generator().manual_seed(10**6 + seed)
    seen = pick(n, generator)
    unseen = pick(max(1, n // 4), generator, unseen=True)
    red = in_red(unseen)
    circle = parse("a circle")
    circles = torch.full_like(unseen, circle)

    def drawn(numbers):
        pictures = draw(SCENES[numbers], generator)
        return (255 * pictures).round().byte()

    def rebuilt(numbers):
        pictures = drawn(numbers).to(codec.device)
        return codec.decode(encode(codec, pictures / 255))

    reference = drawn(pick(5 * n, generator))
    distances = celeba_latent.PictureMeasure(*celeba_latent.features_of(reference))

    def row(who, passes, make):
        pictures = make(seen)
        measures = {"who": who, "nfe": passes}
        measures["accuracy"] = accuracy(seen, pictures / 255)
        measures["held out"] = accuracy(unseen, make(unseen) / 255)
        measures["in red"] = accuracy(red, make(red) / 255)
        measures["colours"] = variety(circle, make(circles) / 255)
        measures.update(distances(*celeba_latent.features_of(pictures)))
        return measures

    rows = [row("truth", 0, drawn), row("autoencoder", 0, rebuilt)]
    guided = scflow.guided(teacher, guidance)
    for who, net, counts in (
        ("teacher, unguided", teacher, (1, 2, 4, 50)),
        ("teacher, guided", guided, (50,)),
        ("student", student, (1, 2, 4, 8)),
    ):
        for steps in counts:
            passes = 2 * steps if net is guided else steps
            rows.append(row(who, passes, partial(paint, codec, net, steps=steps, seed=10**6 + seed)))
    return rows


COLUMNS = {  # title: measure, factor, digits, unit
    "accuracy": ("accuracy", 100, 1, "%"),
    "held out": ("held out", 100, 1, "%"),
    "in red": ("in red", 100, 1, "%"),
    'colours of "a circle"': ("colours", 1, 2, ""),
    "layout": ("layout", 1000, 1, ""),
    "texture": ("texture", 1000, 1, ""),
}
LEGEND = """Accuracy: share of pictures that show all the sentence says, of seen sentences, of held-out combinations,
and of the same sentences with red for the colour that is held out. Colours: exp of their entropy where
pictures show "a circle", 4 at best. Layout, texture: Fréchet distances ×10³."""


def table(done: list[dict]) -> list[str]:
    """Lines of Markdown: mean ± sd over seeds."""
    lines = []
    for i, first in enumerate(done[0]["rows"]):
        same = [metrics["rows"][i] for metrics in done]  # of every seed
        cells = [first["who"], str(first["nfe"] or "")]
        for name, factor, digits, unit in COLUMNS.values():
            values = [row[name] for row in same]
            cells.append(common.mean_sd(values, factor, digits) + unit)
        lines.append(cells)
    return common.markdown(["network", "evaluations", *COLUMNS], lines)


SHEET = (
    "a small red circle left of a large blue square",
    "a large yellow triangle above a small green circle",
    "a red triangle below a large square",
    "a circle right of a circle",
    "a square",
    "a large green triangle left of a blue square",
    "a small yellow square above a circle",
)


def draw_sheet(columns: dict[str, Tensor], prompts, size: tuple):
    """A figure with a row for each sentence, and a column {title: pictures (n,3,32,32)} for each network."""
    import matplotlib.pyplot as plt  # in a notebook its figures are shown, else the caller has called `drawing`

    figure, axes = plt.subplots(len(prompts), len(columns), figsize=size, layout="constrained")
    for j, (title, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(title, fontsize=10)
        for ax, picture in zip(axes[:, j], pictures):
            ax.imshow(picture.permute(1, 2, 0).numpy())
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, prompt in zip(axes[:, 0], prompts):
        text = prompt.replace(" a ", "\na ")
        if is_held_out(prompt):
            text += "\n(held out)"
        ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=10)
    return figure


def prompt_sheet(codec: Codec, teacher, student, guidance: float):
    """A row for each sentence of SHEET: a true drawing, and samples of one noise."""
    numbers = torch.tensor([parse(prompt) for prompt in SHEET])
    guided = scflow.guided(teacher, guidance)
    columns = {"drawn": draw(SCENES[numbers], torch.Generator().manual_seed(1))}
    for title, net, steps in (
        ("unguided\n50 steps", teacher, 50),
        (f"guided, w = {guidance:g}\n50 steps", guided, 50),
        ("guided\n1 step", guided, 1),
        ("student\n1 step", student, 1),
        ("student\n2 steps", student, 2),
        ("student\n4 steps", student, 4),
    ):
        columns[title] = paint(codec, net, numbers, steps, seed=1)
    return draw_sheet(columns, SHEET, (11, 8.6))


# ═══ 6. Commands ══════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Captions(celeba_latent.Folder):
    """What is trained, and how it is measured."""

    seeds: tuple = (0,)  # seeds, a run folder each; with --resume finished ones are read back
    guidance: float = 2.0  # guidance scale of the teacher that is distilled
    samples: int = 1000  # pictures that are read and compared; a quarter as many of held-out combinations
    save_every: float = 10.0  # minutes between checkpoints
    out: str = "runs/captions"  # folder of the run folders, and of captions.md and captions.csv

    def __post_init__(self):
        super().__post_init__()
        require(self.samples >= 200, f"{self.samples} samples are too few for a Fréchet distance: give 200 or more")
        common.check_values(self, "seeds")
        require(math.isfinite(self.guidance), f"--guidance is a number, not {self.guidance}")


def train_command(argv: list[str]) -> None:
    """Train, distil and measure; a table over the seeds."""
    (given,) = toy_2d.cli(argv, train_command.__doc__, Captions())
    asked = Captions(**given)
    asked = replace(asked, device=celeba_latent.choose_device(asked.device))
    folders = [Path(asked.out, f"seed-{seed}") for seed in asked.seeds]
    for folder in folders:  # all are looked at before the first is overwritten
        celeba_latent.require_room(asked, folder, RUN)

    done = []
    records = []
    for folder, seed in zip(folders, asked.seeds):
        metrics = run_one(asked, folder, seed)
        done.append(metrics)
        for row in metrics["rows"]:
            records.append({"seed": seed, **row})
    toy_2d.write_csv(f"{asked.out}/captions.csv", records)
    seeds = ", ".join(str(seed) for seed in asked.seeds)
    about = f"Guidance {asked.guidance:g}, {asked.samples} samples, seeds {seeds};"
    lines = [about, f"{done[0]['machine']}.", LEGEND, "", *table(done)]
    common.write_report(f"{asked.out}/captions", "experiments.captions", argv, lines)


RUN = "run of captions"  # what config.json says it is
RUN_FILES = ("metrics.json", "student.pt", "teacher.pt", "prompts.png", "log.csv")


def run_one(asked: Captions, folder: Path, seed: int) -> dict:
    """Teacher, student and measures of one seed. What is finished is read back, what was stopped goes on."""
    config = {
        "seed": seed,
        "guidance": asked.guidance,
        "samples": asked.samples,
        "device": asked.device,
        "network": NETWORK,
        "teacher": asdict(TEACHER),
        "student": [asdict(phase) for phase in SCHEDULE],
    }
    started = (folder / "config.json").exists()
    asked = replace(asked, out=str(folder), resume=asked.resume and started)
    with celeba_latent.open_or_resume(asked, RUN, config):
        file = folder / "metrics.json"
        if asked.resume and file.exists():
            return toy_2d.read_json(file, "rows", "machine")
        start = partial(celeba_latent.start_folder, folder, RUN, config, RUN_FILES)
        codec, teacher, student = train_one(asked, folder, seed, start)
        rows = measure(codec, teacher, student, asked.guidance, asked.samples, seed)
        plt = toy_2d.drawing()
        figure = prompt_sheet(codec, teacher, student, asked.guidance)
        toy_2d.write_figure(folder / "prompts.png", figure, 80)
        plt.close(figure)
        metrics = {"rows": rows, "machine": toy_2d.machine()}
        toy_2d.write_text(file, json.dumps(metrics, indent=1))
    return metrics


def train_one(asked: Captions, folder: Path, seed: int, start) -> tuple:
    """The codec, the teacher and the student of one seed."""
    teacher_file = RunFile(folder, "teacher", asked, start)
    student_file = RunFile(folder, "student", asked, lambda: None)
    if teacher_file.state is None:
        content = codec_of()
    else:
        content = scflow.read(teacher_file.path, "codec")["codec"]  # another machine might compute another
    codec = Codec(content, asked.device)
    batch = batches(codec)
    torch.manual_seed(seed)  # initial weights
    net = scflow.DiT(LATENT, 1, **NETWORK, tokens=VOCABULARY).to(asked.device)
    critic = scflow.LatentCritic(LATENT).to(asked.device)  # not used

    generator = torch.Generator(asked.device).manual_seed(seed)
    loop = scflow.train_teacher(net, batch, generator, TEACHER, resume=teacher_file.state)
    for _ in teacher_file.follow(loop, TEACHER.teacher_steps, codec=content):
        pass
    teacher = scflow.load(teacher_file.path, device=asked.device)

    guided = scflow.guided(teacher, asked.guidance)
    generator = torch.Generator(asked.device).manual_seed(seed + 1)
    loop = scflow.distill(guided, critic, batch, generator, SCHEDULE, student=teacher, resume=student_file.state)
    total = sum(phase.steps for phase in SCHEDULE)
    if student_file.state is None:
        student_file.rows = teacher_file.rows  # one log for both
    for _ in student_file.follow(loop, total, codec=content):
        pass
    student = scflow.load(student_file.path, device=asked.device)
    return codec, teacher, student


@dataclass(frozen=True)
class Sample(celeba_latent.Device):
    """What is drawn."""

    prompt: str = "a small red circle left of a large blue square"  # a [SIZE] [COLOUR] SHAPE, or two and a RELATION
    out: str = "runs/captions/seed-0"  # run folder (its student), or a weights file alone
    steps: tuple = (1,)  # Euler steps, a row for each number
    count: int = 8  # pictures in a row
    seed: int = 0  # seed of the noise
    file: str = "prompt.png"  # where the pictures go

    def __post_init__(self):
        super().__post_init__()
        require(min(self.steps) > 0, f"steps must be positive, not {min(self.steps)}")
        require(self.file.endswith(".png"), f"--file must end in .png, not {self.file!r}")


def sample_command(argv: list[str]) -> None:
    """Draw a sentence."""
    from PIL import Image

    (given,) = toy_2d.cli(argv, sample_command.__doc__, Sample())
    asked = Sample(**given)
    number = parse(asked.prompt)
    source = Path(asked.out)
    if source.is_dir():
        source = source / "student.pt"
    net, codec = celeba_latent.load_run(source, celeba_latent.choose_device(asked.device))
    fits = tuple(net.arch.get("shape") or ()) == LATENT and tuple(net.arch.get("tokens") or ()) == VOCABULARY
    require(fits, f"{source} holds no network of captions: train one with this program")
    numbers = torch.full((asked.count,), number)
    rows = []
    for steps in asked.steps:
        pictures = paint(codec, net, numbers, steps, asked.seed)
        right = accuracy(numbers, pictures / 255)
        passes = toy_2d.plural(steps, "network evaluation")
        print(f"{asked.file}: {passes} each, {right:.0%} read back as asked")
        rows.append(F.pad(pictures, (1, 1, 1, 1), value=255))  # a white frame, (count,3,34,34)
    grid = rearrange(torch.stack(rows), "steps n c h w -> (steps h) (n w) c")
    image = Image.fromarray(grid.numpy())
    image = image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST)
    with scflow.replacing(asked.file) as temporary:
        image.save(temporary)


COMMANDS = {"train": train_command, "sample": sample_command}


def main(argv=None) -> int:
    """Run a command; bad input is one line on stderr and exit code 2."""
    return toy_2d.main(argv, COMMANDS, "train", "experiments.captions")


if __name__ == "__main__":
    sys.exit(main())
