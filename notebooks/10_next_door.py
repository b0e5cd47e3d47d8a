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
# # 10. Next door
#
# **Question.** A velocity and a one-step student were trained to sample the data. What else can be done with them, if
# nothing is trained again? And what else can they learn? (Read notebooks 4 and 7 first.)
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/10_next_door.ipynb)
#
# It needs this repository: `pip install -e '.[notebooks]'` in a clone, or, hosted,
# `%pip install git+https://github.com/OWNER/REPO`.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import scflow
import toy_2d
from experiments import bits, correctors, guidance, posterior, sequences
from experiments.lecture import exercise, start
from toy_2d import GREY, STUDENT, TEACHER

start(linewidth=2)
generator = torch.Generator().manual_seed(0)


def draw_three(data, clouds, distances):
    """Three panels of samples {title: (n,2)} over the data, with their distances; returns the panels."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.5))
    for ax, title, color in zip(axes, clouds, (GREY, TEACHER, STUDENT)):
        toy_2d.cloud(ax, data, title, "#dddddd", 3)
        toy_2d.cloud(ax, clouds[title][:600], title, color, 4)
        ax.set_xlabel(f"distance ×10³: {distances[title]:.1f}")
    return axes


# %% [markdown]
# ## Another density: weighted particles
#
# Notebook 7 guided a flow towards a label, and it did not end in the tilted density p(x)^(1−w)·p(x|c)^w. At each t the
# guided velocity belongs to a tilted density, but no one flow joins these densities. *Feynman-Kac correctors* (Skreta
# et al., 2025) mend it. Many samples, called **particles**, go together, and each has a **weight**. Where too few
# particles arrive, the weights grow. From time to time the particles are redrawn in proportion to their weights, which
# become equal. Some are copied then, and a little noise parts the copies.
#
# If few particles have all the weight, most are useless. For weights W that sum to 1, the *effective share* is
# 1 / (n·Σ W²).
#
# **Exercise.** What is it if all n weights are equal, and what if k of them are equal and the others zero?


# %%
def effective_shares(n, k):
    """The effective share of n equal weights, and that of k equal ones among n."""
    return ...  # your answer


# %%
@exercise
def check():
    for n, k in ((10, 1), (10, 5), (300, 20)):
        weight = torch.zeros(n)
        weight[:k] = 1 / k
        equal = torch.full((n,), 1 / n)
        measured = [1 / (n * w.square().sum().item()) for w in (equal, weight)]
        assert torch.allclose(torch.tensor(effective_shares(n, k)), torch.tensor(measured))


# %% jupyter={"source_hidden": true}
# Solution
def effective_shares(n, k):
    return 1.0, k / n  # so it is the share of the particles that count


check()

# %%
mixture = guidance.labelled()
powers = correctors.CASES["guidance, w = 4"]  # {label: power}; 0 is the mixture of all labels
density = guidance.of_powers(mixture, powers, 2000, generator)  # exact, from a fine grid
energy = toy_2d.EnergyDistance(guidance.of_powers(mixture, powers, 2000, generator))
clouds = {"tilted density": density}
for title, way in (("the flow", "the flow"), ("noise and weights", "+ both")):
    options = correctors.WAYS[way]  # "the flow" has no noise and no weights
    clouds[title], share = correctors.corrected(mixture, powers, 2000, 400, generator, **options)
print(f"smallest effective share on the way: {share:.2f}")  # below 0.5 they are redrawn
tilted = {title: 1e3 * energy(x) for title, x in clouds.items()}

# %%
data, _ = mixture.sample(1000, generator)
for ax in draw_three(data, clouds, tilted):
    ax.set(xlim=(-4.9, 4.9), ylim=(-4.9, 4.9))  # the flow goes beyond the data
plt.show()
assert tilted["the flow"] > 500
assert tilted["noise and weights"] < 20

# %% [markdown]
# *What to see: the data of all labels (light grey), and samples for one label at w = 4. The flow crowds the farthest
# mode, and goes beyond it. Weighted particles with some noise end near the tilted density. What is wrong: it takes 400
# steps and exact velocities, and another seed may be farther off.*
#
# ## A measurement: many cheap candidates
#
# A point x₀ of the data is measured: y = ⟨a,x₀⟩ + σ·noise, one number. Which points could it have been? They have the
# **posterior** p(x₀|y), in proportion to p(x₀)·p(y|x₀). A student of one step offers a simple way: draw many
# candidates, and keep one of them, drawn in proportion to its likelihood p(y|x₀). (Exact in the limit of many.)
#
# **Exercise.** With which chance is each of them kept?


# %%
def chance(y, seen, sigma):
    """The chance (n,K) to keep each candidate, in proportion to p(y|x₀); seen (n,K) is ⟨a,x₀⟩ of the candidates."""
    return ...  # your answer


# %%
@exercise
def check():
    seen = torch.tensor([[0.0, 1.0, 2.0]])
    likelihood = torch.distributions.Normal(seen, 0.5).log_prob(torch.tensor(1.5)).exp()
    assert torch.allclose(chance(1.5, seen, 0.5), likelihood / likelihood.sum(1, keepdim=True), atol=1e-5)


# %% jupyter={"source_hidden": true}
# Solution
def chance(y, seen, sigma):
    return (-((y - seen) ** 2) / (2 * sigma**2)).softmax(1)  # a constant factor of p(y|x₀) cancels


check()

# %% [markdown]
# Teacher and student are those of `python toy_2d.py`: eight Gaussians, the default schedule.

# %%
run = toy_2d.Run(quiet=True)
eight = toy_2d.prepare(run)
teacher = toy_2d.fit_teacher(run, eight, scflow.TeacherSettings())
student = toy_2d.fit_student(run, eight, teacher, scflow.SCHEDULES["two_phase"]).ema

# %%
first = torch.tensor([[1.0, 0.0]])  # what is measured: the first coordinate
measured = posterior.Measurement(a=first, y=torch.tensor([1.5]), sigma=0.2)
x0 = scflow.sample(student, torch.randn(100_000, 2, generator=generator)).view(1000, 100, 2)
kept = torch.multinomial(chance(measured.y, x0[..., 0], measured.sigma), 1, generator=generator)
exact = posterior.sample_posterior(eight, measured, 1000, generator)
steered = posterior.steered(teacher, measured, torch.randn(1000, 2, generator=generator), 100)
found = {"exact": exact, "steered": steered, "candidates": x0[torch.arange(1000), kept[:, 0]]}
energy = toy_2d.EnergyDistance(posterior.sample_posterior(eight, measured, 1000, generator))
after = {title: 1e3 * energy(x) for title, x in found.items()}

# %%
data, _ = eight.sample(1000, generator)
for ax in draw_three(data, found, after):
    ax.axvline(1.5, color="black", lw=0.8, ls="--")  # the measured value
plt.show()
assert after["candidates"] < after["steered"] / 2

# %% [markdown]
# *What to see: the measured coordinate (dashed), and points that could have been measured. "Steered" is a hundred
# steps of the teacher, each pulled towards y (flow matching posterior sampling). "Candidates" keeps one of a hundred
# one-step samples. What is wrong with steering: it takes p(y|x_t) to be normal, and here it has several modes. What is
# wrong with candidates: for a face, ten thousand are too few, and steering is better (see the report).*
#
# ## Weights of few bits
#
# Weights are stored in 32 bits. What if there are fewer? **Predict before you run it:** which suffers more, the student
# that is run once, or the teacher that is run fifty times?
#
# **Exercise.** Round each row to one of 2^b − 1 equally spaced values from −m to m, where m is its largest |weight|.


# %%
def rounded(weight, b):
    """A weight (out,in), rounded to b bits."""
    return ...  # your answer


# %%
@exercise
def check():
    weight = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    for b in (8, 4, 3):
        assert torch.allclose(rounded(weight, b), bits.rounded(weight, b), atol=1e-6)


# %% jupyter={"source_hidden": true}
# Solution
def rounded(weight, b):
    step = weight.abs().amax(1, keepdim=True) / (2 ** (b - 1) - 1)
    return (weight / step).round() * step


check()

# %%
noise = torch.randn(4000, 2, generator=generator)
energy = toy_2d.reference("8gaussians", 4000)
rounding = {}
for name, net, steps in (("teacher, 50 steps", teacher, 50), ("student, 1 step", student, 1)):
    small = [net] + [bits.round_network(net, b) for b in (8, 6, 4, 3)]  # biases keep 32 bits
    rounding[name] = [1e3 * energy(scflow.sample(one, noise, steps)) for one in small]
    print(f"{name:18s} 32, 8, 6, 4, 3 bits:", *(f"{value:7.2f}" for value in rounding[name]))
assert rounding["student, 1 step"][-1] > 3 * rounding["teacher, 50 steps"][-1]

# %% [markdown]
# ## Sentences
#
# A sentence of notebook 7 has ten places. Each word is a fixed vector of 16 numbers, and so a sentence is a latent of
# the shape (16,1,10). `train_teacher` and `distill` train a teacher and a student of such latents, here for a short
# time. A sample is read by the nearest word in each place, and a program checks it against the grammar.

# %%
torch.manual_seed(0)
net = scflow.MLP((16, 1, 10), **sequences.NETWORK)
settings = scflow.TeacherSettings(teacher_steps=1000, teacher_batch=128, teacher_lr=2e-3)
for state in scflow.train_teacher(net, sequences.sentence_batch, generator, settings):
    writer = state.ema
first_phase = replace(sequences.SCHEDULE[0], steps=400)
critic = scflow.PointCritic(16 * 10)  # not used: λ_adv is 0 in the first phase
for state in scflow.distill(writer, critic, sequences.sentence_batch, generator, (first_phase,)):
    fast_writer = state.ema

# %%
noise = torch.randn(1000, 16, 1, 10, generator=generator)
grammatical = {}
for name, net, steps in (("teacher", writer, 1), ("teacher", writer, 50), ("student", fast_writer, 1)):
    written = sequences.tokens_of(scflow.sample(net, noise, steps))
    right = [tokens in sequences.SCENE_OF for tokens in written]
    grammatical[name, steps] = sum(right) / len(right)
    print(f"{name}, {toy_2d.plural(steps, 'step')}: {grammatical[name, steps]:.0%} grammatical, for example")
    for tokens in written[:3]:
        print(f"    {sequences.text_of(tokens)}")
assert grammatical["student", 1] > grammatical["teacher", 1] + 0.4

# %% [markdown]
# *What to see: one step of the teacher aims at the mean of all sentences. It is read place by place, and such words
# seldom fit together. Those of the student mostly do. What is wrong: after so short a training many of the student's
# sentences are still none, and some of its teacher's.* `python -m experiments.sequences` trains longer, and makes time
# series, too.

# %%
print("energy distance ×10³:")
print(f"  tilted density: the flow {tilted['the flow']:.0f}, weighted particles {tilted['noise and weights']:.1f}")
print(f"  posterior: steered {after['steered']:.0f}, candidates {after['candidates']:.1f}")
print(f"  3 bits: teacher {rounding['teacher, 50 steps'][-1]:.1f}, student {rounding['student, 1 step'][-1]:.1f}")
print(f"grammatical in one step: teacher {grammatical['teacher', 1]:.0%}, student {grammatical['student', 1]:.0%}")

# %% [markdown]
# **The answer.** A velocity samples other densities too, with weights and noise. A student gives so many samples so
# cheaply that one can choose among them. But where modes are narrow, 3 bits hurt it far more than its teacher; why is
# an open question. And the same two loops learn sentences, if words are vectors. The
# [report](../experiments/README.md#next-door) has more data sets and seeds.

# %% [markdown]
# ## What to try next
#
# - Tilt at w = 2, or multiply two labels: other entries of `correctors.CASES`. How many steps does each need?
# - Measure with more noise, or keep one of ten candidates. When does steering win?
# - Round a student of the spirals, which have no narrow modes. Is it still hurt more than its teacher?
