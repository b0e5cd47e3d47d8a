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
# # 5. Faces in latents
#
# **Question.** What changes when points become pictures? An autoencoder, a transformer and a convolutional critic are
# new; not one line of the method is. And what does a Fréchet distance of such pictures say, and not say?
#
# [![open in a hosted notebook](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/05_celeba_latents.ipynb)
#
# It needs this repository: `pip install -e '.[notebooks]'` in a clone, or, hosted,
# `%pip install git+https://github.com/OWNER/REPO`.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from einops import rearrange

import celeba_latent
import scflow
import toy_2d
from celeba_latent import frechet_distance, knn_coverage
from experiments.lecture import exercise, start

start()
generator = torch.Generator().manual_seed(0)


def sheet(rows):
    """Rows of pictures, {title: (n,3,S,S) in [0,1]}."""
    fig, axes = plt.subplots(len(rows), 1, figsize=(9, 1.05 * len(rows)))
    for ax, (title, pictures) in zip(axes, rows.items()):
        strip = rearrange(pictures.clamp(0, 1), "n c h w -> h (n w) c")
        ax.imshow(strip.numpy(), interpolation="nearest")
        ax.set_ylabel(title, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    plt.show()


# %% [markdown]
# ## Pictures
#
# Each face is drawn from 23 normal numbers: colours, hair, eyes, mouth. No two are alike, nothing is downloaded,
# and there are as many as you like.

# %%
numbers = torch.randn(6000, len(celeba_latent.TRAITS), generator=generator)
faces = celeba_latent.draw_faces(numbers)  # (6000,3,32,32)
held_out = faces[:1000]
train = faces[1000:]
sheet({"faces": train[:9], "more faces": train[9:18]})

# %% [markdown]
# ## Latents
#
# A picture of 32×32 has 3072 numbers, most of them redundant. An autoencoder keeps what matters; here it is the
# plainest: the principal components of its four quarters. Real faces use a trained one, which has the same two methods,
# `encode` and `decode`.

# %%
autoencoder = celeba_latent.PatchPCA(factor=16, channels=48)
kept = autoencoder.fit(train[:2000])
latents = autoencoder.encode(train)  # (5000,48,2,2)
mean = latents.mean((0, 2, 3), keepdim=True)
std = latents.std((0, 2, 3), keepdim=True)
latents = (latents - mean) / std  # noise has deviation 1, and so should the data


def decode(z):
    """Latents (B,48,2,2) → pictures (B,3,32,32)."""
    return autoencoder.decode(z * std + mean)


again = autoencoder.decode(autoencoder.encode(held_out))
print(f"{latents[0].numel()} numbers for {faces[0].numel()}; {kept:.1%} of the variance kept")
sheet({"held out": held_out[:9], "decoded": again[:9]})

# %% [markdown]
# *What to see: edges are softer, the rest is there. Nothing that follows can be sharper than the lower row.* How much
# is lost? The peak signal-to-noise ratio is −10·log₁₀ of the mean squared error, for values in [0,1], in decibels.


# %%
def psnr(a, b):
    """Peak signal-to-noise ratio of pictures in [0,1], in decibels."""
    return -10 * (a - b).square().mean().log10().item()


ours = psnr(again, held_out)
trivial = psnr(train.mean(0), held_out)
print(f"autoencoder: {ours:.1f} dB; the mean picture: {trivial:.1f} dB")
assert ours > trivial + 8

# %% [markdown]
# ## A transformer for the velocity
#
# The DiT cuts the latent into patches, one token each; every block lets the tokens look at each other, and the time t
# sets scale, shift and gate of the block. A fixed linear term is the velocity of normal latents, and the network adds
# what is left. Before training that is zero, and so a step from t = 1 lands at 0.

# %%
shape = tuple(latents.shape[1:])
torch.manual_seed(0)
net = scflow.DiT(shape, patch=1, dim=128, depth=3, heads=4)
some = latents[:5]
tokens = scflow.patchify(some, 1)  # (5,4,48): a token for each quarter
assert torch.equal(scflow.unpatchify(tokens, 1, 2, 2), some)
landed = scflow.predict_x0(net, some, torch.ones(5))
assert torch.allclose(landed, torch.zeros_like(some), atol=1e-6)

# %% [markdown]
# ## The same two loops
#
# These are the lines of the other notebooks. `batch`, the networks and the settings are new. The run is short; the
# project's own takes some minutes and does better: `python celeba_latent.py demo`.


# %%
def batch(n, generator):
    """Latents, and no condition."""
    rows = torch.randint(len(latents), (n,), generator=generator)
    return latents[rows], None


# %%
settings = scflow.TeacherSettings(teacher_steps=600, teacher_batch=64, teacher_lr=1e-3)
for run in scflow.train_teacher(net, batch, generator, settings):
    teacher = run.ema

# %%
first, last = celeba_latent.SCHEDULES["two_phase"]
first = replace(first, steps=300)  # shortened: this is a lecture
last = replace(last, steps=100)
critic = scflow.LatentCritic(shape, width=32)
for run in scflow.distill(teacher, critic, batch, generator, (first, last)):
    student = run.ema

# %%
noise = torch.randn(9, *shape, generator=generator)
rows = {
    "decoded": again[:9],
    "teacher, 1": decode(scflow.sample(teacher, noise, 1)),
    "teacher, 50": decode(scflow.sample(teacher, noise, 50)),
    "student, 1": decode(scflow.sample(student, noise, 1)),
    "student, 2": decode(scflow.sample(student, noise, 2)),
    "student, 4": decode(scflow.sample(student, noise, 4)),
}
sheet(rows)

# %% [markdown]
# *What to see: below the first row a column is one noise. The teacher's single step is close to the mean face; its
# fifty make faces. The student's one step is a face, and two or four steps leave it what it is. The seams between the
# quarters are what so short a run has not learned.*
#
# ## A Fréchet distance, read honestly
#
# Fit a Gaussian to features of real pictures and one to features of samples, and measure how far these two are apart.
# It is never zero: true pictures against true pictures show why.

# %%
flat = train[:1000].flatten(1)  # (1000,3072)
_, _, components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)


def features(pictures):
    """32 principal components of the pixels, (N,32)."""
    return pictures.flatten(1) @ components[:32].T


reference = features(held_out)
counts = [50, 100, 200, 400, 800, 1600, 3200]
true = [frechet_distance(features(train[-n:]), reference) for n in counts]
for i in range(4):
    assert true[i] > true[i + 1]
assert true[-1] > 0

# %%
fig, ax = plt.subplots(figsize=(6.5, 3.6))
ax.loglog(counts, true, "o-", color=toy_2d.GREY)
ax.set(xlabel="number of true pictures", ylabel="Fréchet distance")
ax.set_xticks(counts, counts)
ax.set_yticks([0.5, 1, 2, 5], ["0.5", "1", "2", "5"])
ax.minorticks_off()
plt.show()

# %% [markdown]
# *What to see: real pictures, and the distance is far from zero when they are few. So the number of samples belongs to
# every such figure, and the distance of as many real pictures, its floor, beside it.*

# %%
n = 1000
floor = frechet_distance(features(decode(latents[-n:])), reference)
noise = torch.randn(n, *shape, generator=generator)
distances = {}
print(f"floor, with the autoencoder's loss: {floor:.3f}; less that floor:")
for name, model, steps in (
    ("teacher", teacher, 1),
    ("teacher", teacher, 50),
    ("student", student, 1),
    ("student", student, 4),
):
    x = features(decode(scflow.sample(model, noise, steps)))
    distance = frechet_distance(x, reference) - floor
    distances[name, steps] = distance
    print(f"  {name} {steps:2}: {distance:7.3f}, coverage {knn_coverage(reference, x):.2f}")
assert distances["student", 1] < distances["teacher", 1] / 5

# %% [markdown]
# A Fréchet distance sees means and covariances, and nothing else.
#
# **Exercise.** Make a law with the same mean and covariance as a standard normal in every direction, and yet nothing
# like it: half of its points near the centre, half far away. The distance must not see it; the coverage should.


# %%
def impostor(n, d):
    """Rows (n,d) of mean 0 and covariance I that are not Gaussian."""
    return ...  # your answer


# %%
a = torch.randn(4000, 16, generator=generator)
b = torch.randn(4000, 16, generator=generator)
distance_true = frechet_distance(a, b)
coverage_true = knn_coverage(b, a)
print(f"true: Fréchet {distance_true:.3f}, coverage {coverage_true:.2f}")


@exercise
def check():
    fake = impostor(4000, 16)
    distance = frechet_distance(fake, b)
    coverage = knn_coverage(b, fake)
    assert distance < 3 * distance_true + 0.05
    assert coverage < coverage_true - 0.2
    print(f"impostor: Fréchet {distance:.3f}, coverage {coverage:.2f}")


# %% jupyter={"source_hidden": true}
# Solution
def impostor(n, d):
    near = torch.rand(n, 1, generator=generator) < 0.5
    scale = torch.where(near, 0.2, (2 - 0.2**2) ** 0.5)  # the mean of its square is 1
    return scale * torch.randn(n, d, generator=generator)


check()

# %%
print(f"the autoencoder loses all beyond {ours:.1f} dB; the floor of the distance is {floor:.2f}, and above it")
print(f"the student's one step is {distances['student', 1]:.2f}, the teacher's fifty {distances['teacher', 50]:.2f}")

# %% [markdown]
# **The answer.** The method did not notice. The representation did: what the autoencoder loses is lost, what the
# measure does not see is not measured, and a floor belongs beside every distance.

# %% [markdown]
# ## What to try next
#
# - `lambda_adv=0.1` in `first`, ten times as much. What do the distance and the coverage say, and do they agree?
# - `PatchPCA(8, 12)`: latents (12, 4, 4), four times the tokens. Do the seams of the quarters go? What does it cost?
# - A larger network: `python -m experiments.speed` counts the operations of an update, and times it.
# - Your own pictures: `python celeba_latent.py encode --images …`, then `teacher` and `distill`, on a GPU.
