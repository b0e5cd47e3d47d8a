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
#
# It needs this repository: `pip install -e '.[notebooks]'` in a clone, or, hosted,
# `%pip install git+https://github.com/OWNER/REPO`.

# %%
import matplotlib.pyplot as plt
import torch

import scflow
from experiments import captions, guidance
from experiments.lecture import exercise, start
from toy_2d import EnergyDistance, GaussianMixture

start(dpi=72)

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
figure, axes = plt.subplots(3, 2, figsize=(5.6, 8.4))
for row, scale in zip(axes, (1, 2, 4)):
    guidance.panels(row, scale, {})
plt.show()

# %% [markdown]
# At w = 1 both are the label's own mixture, and nothing is lost. From w = 2 on, the guided flow gives up the
# Gaussians near the centre, which might be another label's. Its samples are surer of their label, and no longer its
# distribution. The tilted density keeps these Gaussians: it is not what the guided flow ends in, not even the exact
# one.

# %%
mixture = guidance.labelled()
generator = torch.Generator().manual_seed(0)
n = 1500
label = torch.full((n, 1), 2)
for scale in (1.0, 2.0):
    exact = scflow.guided(mixture, scale)
    noise = torch.randn(n, 2, generator=generator)
    flow = scflow.sample(exact, noise, 30, "heun", label)
    density = guidance.tilted(mixture, 2, scale, n, generator)
    distance = EnergyDistance(density)(flow)
    print(f"w = {scale:g}: energy distance ×10³ from the guided flow to the tilted density {1000 * distance:.1f}")
    if scale == 1:
        assert abs(distance) < 0.01
    else:
        assert distance > 0.1

# %% [markdown]
# ## A student of the guided teacher
#
# A teacher learns all labels, and one time in ten none. So one network knows both velocities, and can be guided. Its
# student takes the label, makes one pass where the teacher made two, and one step where the teacher made fifty.
#
# One thing has to change. Guided samples are distributed otherwise than the data, and **a critic that holds the student
# against the data undoes the guidance**. So one student learns from samples of the guided teacher, and another, to see
# the difference, from the data.

# %%
scale = 2.0
schedule = scflow.SCHEDULES["two_phase"]
teacher = guidance.fit_teacher(0, scflow.TeacherSettings())
guided = scflow.guided(teacher, scale)
samples = guidance.own_samples(guided, seed=0)
student = guidance.fit_student(teacher, scale, samples, 0, schedule)
pulled_back = guidance.fit_student(teacher, scale, guidance.batch, 0, schedule)

# %%
networks = {
    "guided teacher, 50 steps": (guided, 50),
    "student, 1 step": (student, 1),
    "its critic saw data": (pulled_back, 1),
}
figure, axes = plt.subplots(1, 5, figsize=(12.5, 2.8))
guidance.panels(axes, scale, networks)
plt.show()

# %%
goal = EnergyDistance(scflow.sample(guided, torch.randn(n, 2, generator=generator), 50, cond=label))
noise = torch.randn(n, 2, generator=generator)
near = goal(scflow.sample(student, noise, cond=label))
far = goal(scflow.sample(pulled_back, noise, cond=label))
print(f"energy distance ×10³ to the guided teacher: {1000 * near:.1f}, and where the critic saw data {1000 * far:.1f}")
assert near < 0.015 and far > 4 * near

# %% [markdown]
# `python -m experiments.guidance` does this for several scales and seeds, and writes a table.

# %% [markdown]
# ## A world of captions
#
# Pictures of 32×32 pixels that the program draws from a sentence: one or two shapes on a bright ground. The sentence
# may name the size and the colour of each, or leave them open: "a circle above a red square" has any size and, of the
# circle, any colour. There are 8,145 sentences, and no end of pictures of each.

# %%
generator = torch.Generator().manual_seed(0)
chosen = captions.pick(8, generator)
pictures = captions.draw(captions.SCENES[chosen], generator)
figure, axes = plt.subplots(2, 4, figsize=(11, 6))
for ax, scene, picture in zip(axes.flat, captions.SCENES[chosen].tolist(), pictures):
    ax.imshow(picture.permute(1, 2, 0))
    ax.set_title(captions.sentence(scene).replace(" a ", "\na "), fontsize=10)
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
#
# The reader has to be right about the truth. (Tests check that it notices nine kinds of mistakes.)

# %%
numbers = captions.pick(500, generator)
right = captions.accuracy(numbers, captions.draw(captions.SCENES[numbers], generator))
print(f"read as drawn: {right:.1%}")
assert right > 0.99

# %% [markdown]
# A sentence that leaves something open means many pictures. The mean of them all, which is what one step of an
# unguided teacher gives, is none of them.

# %%
figure, axes = plt.subplots(1, 2, figsize=(5, 2.8))
for ax, prompt in zip(axes, ("a small red circle", "a circle")):
    number = captions.parse(prompt)
    drawn = captions.draw(captions.SCENES[number].expand(200, -1), generator)
    mean = drawn.mean(0)
    ax.imshow(mean.permute(1, 2, 0))
    ax.set_title(f"mean of “{prompt}”", fontsize=10)
    ax.axis("off")
    print(
        f"{prompt}: {captions.variety(number, drawn):.2f} colours; the mean is read as {captions.read(mean[None])[0]}"
    )
assert captions.accuracy(torch.tensor([number]), mean[None]) == 0
plt.show()

# %% [markdown]
# ## Teacher and student
#
# As for the faces of notebook 5, but with smaller patches: each of 8×8 pixels becomes its 32 main components. A small
# DiT sees a picture as 16 tokens, and the ten places of a sentence, filled or empty, as ten more. The guided teacher,
# two passes a step, is distilled into a student that needs one.
#
# There is no critic: held against the data, it would pull the student away from its guide, as above.
#
# `python -m experiments.captions --seeds 0 1 2` trains three teachers and their students, and writes a table and a
# sheet of prompts. It takes an hour or two, and is not run here. This is its sheet of seed 0:
#
# ![Seven sentences, drawn by the program, by the teacher and by the student](../results/captions/prompts.png)
#
# *What to see: the student's one step shows what the guided teacher shows in 50. What is wrong: where the sentence
# leaves a colour open, one step can mix two; for the triangle that was held out the student draws a square. The numbers
# are in the [report](../experiments/README.md#captions).*

# %% [markdown]
# **Exercise.** When does the guided flow end in the tilted density after all? Take one Gaussian for the velocity
# without the label, N(0, s²), and another of the same width for that with it, N(m, s²). Where is the mean of what
# comes out?


# %%
def guided_mean(m, scale):
    """The mean of the samples that the guided velocity of N(0,s²) and N(m,s²) ends in."""
    return ...  # your answer


# %%
free = GaussianMixture([[0.0, 0.0]], 0.5)
conditional = GaussianMixture([[1.2, 0.0]], 0.5)


def velocity(x, t, cond):
    """The velocity with the label where there is one, and that without it elsewhere."""
    return torch.where(cond > 0, conditional(x, t), free(x, t))


noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
label = torch.ones(1000, 1, dtype=torch.int64)


@exercise
def check():
    for scale in (0.5, 1.0, 3.0):
        x = scflow.sample(scflow.guided(velocity, scale), noise, 20, "heun", label)
        assert abs(x[:, 0].mean() - guided_mean(1.2, scale)) < 0.05
        assert (x.std(0) - 0.5).abs().max() < 0.05


# %% jupyter={"source_hidden": true}
# Solution
def guided_mean(m, scale):
    # Velocities of Gaussians of one width are linear in their means: v_w is the velocity of N(w·m, s²), the tilted
    # density, at every t. It takes more than one Gaussian, or other widths, for the two to part.
    return scale * m


check()

# %%
print("energy distance ×10³ to a hundred passes of the guided teacher, after one pass of the student:")
print(f"  its critic saw the teacher's samples {1000 * near:.1f}, its critic saw data {1000 * far:.1f}")

# %% [markdown]
# **The answer.** Yes: guidance can be distilled, and one pass takes the place of a hundred. But the critic has to see
# what the guided teacher makes, where that is not what the data are. And following the guided velocity does not sample
# the tilted density, except where only means differ.

# %% [markdown]
# ## What to try next
#
# - Guide at w = 4: how far is the student from its teacher now, and its teacher from the tilted density?
# - Give the critic half data and half samples of the teacher. To which of the two does the student go?
# - `python -m experiments.captions sample --prompt "a circle"` asks a trained student for an open colour.
