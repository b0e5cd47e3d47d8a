"""Faces: from a folder of pictures to a generator that needs one step.

    python celeba_latent.py demo                                     drawn faces: no download, a CPU, minutes
    python celeba_latent.py encode --images DIR_OR_ZIP               pictures → latents/
    python celeba_latent.py teacher --latents latents --out runs/faces
    python celeba_latent.py distill --out runs/faces                 (finds the teacher and the latents there)
    python celeba_latent.py sample --out runs/faces --steps 1 2 4
    python celeba_latent.py evaluate --out runs/faces

The method, the networks and the training loops are those of `scflow.py`. This script adds pictures,
autoencoders, sizes, measures, and runs that can be resumed. A latents folder holds latents.npy (float16,
as encoded), meta.pt (the autoencoder, the statistics, the sources), and thumbs.npy and textures.npy, what
is compared of the originals. A run folder holds config.json, teacher.pt, student.pt, log.csv, metrics.json,
metrics.md and sheets of samples.
"""

import hashlib
import json
import math
import os
import random
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

import scflow
import toy_2d
from scflow import Phase, Refused, TeacherSettings, check_choices, reading, replacing, require
from toy_2d import cli, write_csv, write_text

# ═══ 1. Drawn faces ═══════════════════════════════════════════════════════════════════════
# A world of pictures without a download. Every face comes from 23 normal numbers, so that no two are
# alike and none can be memorised. It is made to be learned in minutes: colours are linear in these
# numbers, the head hardly moves, and all edges are soft, so that a moved edge is nearly a sum of pictures.

TRAITS = {  # mean and deviation of each; draw_faces takes its numbers in this order
    "ground_red": (0.68, 0.11),
    "ground_green": (0.68, 0.11),
    "ground_blue": (0.68, 0.11),
    "light": (0.0, 0.1),  # how much brighter it is on the right
    "shirt_red": (0.5, 0.15),
    "shirt_green": (0.5, 0.15),
    "shirt_blue": (0.5, 0.15),
    "skin_tone": (0.42, 0.24),
    "hair_tone": (0.4, 0.22),
    "hair_red": (0.4, 0.25),
    "hair_length": (0.5, 0.25),
    "hair_width": (0.64, 0.03),
    "fringe": (-0.32, 0.05),
    "parting": (0.0, 0.18),
    "turn": (0.0, 0.02),
    "eye_tone": (0.5, 0.35),
    "eye_size": (0.13, 0.01),
    "gaze": (0.0, 0.02),
    "brow_height": (0.24, 0.02),
    "brow_slant": (0.0, 0.15),
    "smile": (0.5, 0.6),
    "mouth_width": (0.21, 0.025),
    "lip_tone": (0.5, 0.3),
}


def read_traits(numbers: Tensor) -> SimpleNamespace:
    """Normal numbers (B,23) → the traits as attributes, (B,1,1) each."""
    traits = SimpleNamespace()
    for name, column in zip(TRAITS, numbers.T):
        mean, deviation = TRAITS[name]
        value = mean + deviation * column
        setattr(traits, name, value[:, None, None])
    return traits


def inside(distance: Tensor, edge: float = 0.12) -> Tensor:
    """A mask of distances to a border: 1 where they are negative, 0 outside, and a smooth ramp of width `edge`."""
    ramp = (0.5 - distance / edge).clamp(0, 1)
    return ramp**2 * (3 - 2 * ramp)


def ellipse(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float, edge: float = 0.12) -> Tensor:
    """The mask (B,S,S) of an ellipse around x = y = 0."""
    radius = ((x / rx) ** 2 + (y / ry) ** 2).sqrt()
    shorter = torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry))
    return inside((radius - 1) * shorter, edge)


def blend(share: Tensor, first: tuple, second: tuple) -> Tensor:
    """The colour (B,3,1,1) between two RGB triples: the first at a share (B,1,1) of 0, the second at 1."""
    first = torch.tensor(first)[:, None, None]
    second = torch.tensor(second)[:, None, None]
    return first + share[:, None] * (second - first)


def paint(picture: Tensor, mask: Tensor, rgb: Tensor | float) -> Tensor:
    """The picture (B,3,S,S) with a colour laid over it where the mask (B,S,S) is 1."""
    return picture + mask[:, None] * (rgb - picture)


def draw_faces(numbers: Tensor, size: int = 32) -> Tensor:
    """Normal numbers (B,23), one for each of TRAITS → faces, RGB (B,3,size,size) in [0,1]."""
    face = read_traits(numbers)
    pixels = (torch.arange(size) + 0.5) / size * 2 - 1  # centres of the pixels, in [-1,1]
    x = pixels[None, None, :]
    y = pixels[None, :, None]  # downwards

    ground = torch.stack([face.ground_red, face.ground_green, face.ground_blue], 1)
    shirt = torch.stack([face.shirt_red, face.shirt_green, face.shirt_blue], 1)
    skin = blend(face.skin_tone, (1.0, 0.83, 0.71), (0.4, 0.25, 0.16))
    red = blend(face.hair_red, (0.0, 0.0, 0.0), (0.22, 0.0, -0.06))
    hair = blend(face.hair_tone, (0.06, 0.05, 0.06), (0.8, 0.6, 0.38)) + red
    iris = blend(face.eye_tone, (0.35, 0.22, 0.12), (0.2, 0.42, 0.65))
    lips = blend(face.lip_tone, (0.75, 0.45, 0.4), (0.8, 0.15, 0.2))
    lips = lips * (1 - 0.35 * face.skin_tone)[:, None]

    # All is painted from back to front: the background, the shoulders, the hair, the neck.
    light = (face.light * x)[:, None]
    picture = ground + light
    picture = paint(picture, ellipse(x, y - 1.25, 0.85, 0.5), shirt)
    crown = ellipse(x, y + 0.12, face.hair_width, 0.8)
    beside = inside(x.abs() - face.hair_width) * inside(-0.12 - y)
    falling = beside * inside(y - face.hair_length, edge=0.4)  # thinner towards its ends
    picture = paint(picture, torch.maximum(crown, falling), hair)
    picture = paint(picture, ellipse(x, y - 0.75, 0.22, 0.45), 0.8 * skin)

    # The face ends at the hairline. So hair is painted once, in one colour.
    head = ellipse(x, y - 0.05, 0.49, 0.68)
    hairline = face.fringe + face.parting * x + 0.5 * x**2
    picture = paint(picture, head * inside(hairline - y), skin + 0.6 * light)

    # Eyes, a brow over each, nose and mouth move together where the head turns. Small things have finer edges.
    x = x - face.turn
    fine = 0.07
    for side in (-1, 1):
        across = x - 0.23 * side
        down = y + 0.02
        white = ellipse(across, down, 1.2 * face.eye_size, 0.8 * face.eye_size, fine)
        picture = paint(picture, white, 0.95)
        picture = paint(picture, white * ellipse(across - face.gaze, down, 0.08, 0.08, fine), iris)
        picture = paint(picture, white * ellipse(across - face.gaze, down, 0.035, 0.035, fine), 0.05)
        slope = side * face.brow_slant * across
        picture = paint(picture, ellipse(across, y + face.brow_height + slope, 0.16, 0.045, fine), 0.6 * hair)
    picture = paint(picture, 0.5 * ellipse(x, y - 0.17, 0.06, 0.14), 0.7 * skin)
    bend = 0.42 + face.smile * (0.02 - x**2)
    picture = paint(picture, ellipse(x, y - bend, face.mouth_width, 0.07, fine), lips)
    return picture.clamp(0, 1)


# ═══ 2. Autoencoders ══════════════════════════════════════════════════════════════════════
# All have encode(pictures (B,3,S,S) in [0,1]) → latents (B,C,h,w), decode(latents) → pictures,
# and `factor` = S/h.


class PatchPCA(nn.Module):
    """Principal components of square patches: closed form, fitted in seconds, and blurred where they stop.

    Before `fit` the components are the pixels themselves: with patches of one pixel, no autoencoder at all.
    """

    def __init__(self, factor: int = 8, channels: int = 32):
        super().__init__()
        size = 3 * factor**2
        require(0 < channels <= size, f"patches of {factor} pixels have 1 to {size} components, not {channels}")
        self.arch = dict(name="PatchPCA", factor=factor, channels=channels)
        self.factor = factor
        self.channels = channels
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(size, channels))

    def fit(self, pictures: Tensor) -> float:
        """Set mean and basis from pictures (N,3,S,S); returns the share of the variance that is kept."""
        patches = scflow.patchify(pictures, self.factor).flatten(0, 1)  # (N·h·w, 3·factor²)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))  # the largest come last
        self.mean = patches.mean(0)
        self.basis = vectors.flip(1)[:, : self.channels].contiguous()
        kept = values[-self.channels :].sum() / values.sum()
        return kept.item()

    def encode(self, pictures: Tensor) -> Tensor:
        """(B,3,S,S) → (B,channels,S/factor,S/factor)."""
        patches = scflow.patchify(pictures, self.factor)
        tokens = (patches - self.mean) @ self.basis
        return rearrange(tokens, "b (h w) c -> b c h w", h=pictures.shape[-2] // self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """(B,channels,h,w) → (B,3,h·factor,w·factor)."""
        h, w = latents.shape[2:]
        tokens = rearrange(latents, "b c h w -> b (h w) c")
        patches = tokens @ self.basis.T + self.mean
        pictures = scflow.unpatchify(patches, self.factor, h * self.factor, w * self.factor)
        return pictures.clamp(0, 1)


class PicturePCA(nn.Module):
    """Principal components of whole pictures: without seams, for nothing is joined. Closed form, fitted in seconds.

    They stand in one row, latents (B,1,1,channels), each divided by the fourth root of its variance. In the pixels' own
    units the fine components would count for nothing; with unit variance they would count as much as the coarse ones.
    """

    def __init__(self, size: int = 64, channels: int = 96):
        super().__init__()
        self.arch = dict(name="PicturePCA", size=size, channels=channels)
        self.factor = size
        self.channels = channels
        self.register_buffer("mean", torch.zeros(3 * size**2))
        self.register_buffer("basis", torch.eye(3 * size**2, channels))
        self.register_buffer("scale", torch.ones(channels))

    def fit(self, pictures: Tensor) -> float:
        """Set mean, basis and scale from (2,000 of the) pictures (N,3,S,S); returns the share of variance kept."""
        flat = pictures[:2000].flatten(1)
        self.mean = flat.mean(0)
        x = flat - self.mean
        values, vectors = torch.linalg.eigh(x @ x.T / len(x))  # the Gram matrix has the same; the largest come last
        largest = values[-self.channels :]
        self.basis = F.normalize(x.T @ vectors[:, -self.channels :], dim=0)  # (3·S²,channels)
        self.scale = largest**0.25
        return (largest.sum() / values.sum()).item()

    def encode(self, pictures: Tensor) -> Tensor:
        """(B,3,S,S) → (B,1,1,channels)."""
        row = (pictures.flatten(1) - self.mean) @ self.basis / self.scale
        return row[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """(B,1,1,channels) → (B,3,S,S)."""
        row = latents.flatten(1) * self.scale
        flat = row @ self.basis.T + self.mean
        return flat.reshape(-1, 3, self.factor, self.factor).clamp(0, 1)


def conv3(a: int, b: int, **options) -> nn.Conv2d:
    """A 3×3 convolution from a to b channels that keeps the size."""
    return nn.Conv2d(a, b, 3, padding=1, **options)


class TinyBlock(nn.Module):
    """Three 3×3 convolutions beside the identity; `pool` adds the context of FLUX.2's variant before them."""

    def __init__(self, width: int, pool: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            conv3(width, width),
            nn.ReLU(),
            conv3(width, width),
            nn.ReLU(),
            conv3(width, width),
        )
        self.pool = None
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B,width,H,W) → the same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class TinyAutoencoder(nn.Module):
    """The TAESD family (github.com/madebyollin/taesd): taesd, taesdxl, taesd3, taef1 and, with `pool`, taef2."""

    factor = 8

    def __init__(self, channels: int = 4, pool: bool = False, width: int = 64):
        super().__init__()
        self.arch = dict(name="TinyAutoencoder", channels=channels, pool=pool, width=width)
        down = [conv3(3, width), TinyBlock(width)]
        up = [nn.Identity(), conv3(channels, width), nn.ReLU()]
        for level in range(3):  # pools stand at the lowest resolution
            down.append(conv3(width, width, stride=2, bias=False))
            for _ in range(3):
                down.append(TinyBlock(width, pool and level == 2))
                up.append(TinyBlock(width, pool and level == 0))
            up.append(nn.Upsample(scale_factor=2))
            up.append(conv3(width, width, bias=False))
        self.encoder = nn.Sequential(*down, conv3(width, channels))
        self.decoder = nn.Sequential(*up, TinyBlock(width), conv3(width, 3))

    @classmethod
    def read(cls, prefix: str) -> "TinyAutoencoder":
        """The pair PREFIX_encoder.pth and PREFIX_decoder.pth. Raises ValueError if they are not of the family."""
        first = f"{prefix}_encoder.pth"
        with scflow.reading(first, "encoder of the TAESD family"):
            weights = scflow.read_tensors(first)
            channels, width = weights["14.weight"].shape[:2]
            pool = any(".pool." in name for name in weights)
            net = cls(channels, pool, width)
            net.encoder.load_state_dict(weights)
        second = f"{prefix}_decoder.pth"
        with scflow.reading(second, f"decoder for {first}"):
            net.decoder.load_state_dict(scflow.read_tensors(second))
        return net

    def encode(self, pictures: Tensor) -> Tensor:
        """(B,3,S,S) → (B,channels,S/8,S/8)."""
        return self.encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """(B,channels,h,w) → (B,3,8h,8w)."""
        return self.decoder(3 * torch.tanh(latents / 3)).clamp(0, 1)


# Names of diffusers autoencoders that the user has given. Only these are ever fetched from a hub: a
# checkpoint names its autoencoder, too, and whoever wrote it would choose what is fetched.
TRUSTED = set()


class Diffusers(nn.Module):
    """An AutoencoderKL or AutoencoderTiny of the diffusers library, by hub name or folder.

    Its usual scale (0.18215 for the paper's sd-vae-ft-mse) is left out: latents are normalised by their statistics.
    Raises ValueError if there is none, or if it would have to be fetched and is not TRUSTED.
    """

    def __init__(self, source: str):
        super().__init__()
        self.arch = dict(name="Diffusers", source=source)
        try:
            import diffusers
        except ImportError:
            raise Refused(f"the autoencoder {source} needs a package: pip install 'diffusers>=0.30'") from None
        local = source not in TRUSTED
        kind = diffusers.AutoencoderKL
        try:
            config = kind.load_config(source, local_files_only=local)
            if "Tiny" in config["_class_name"]:
                kind = diffusers.AutoencoderTiny
            vae = kind.from_pretrained(source, local_files_only=local)
        except (OSError, RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            if local:
                reason = f"fetch it with --trust-autoencoder {source}, if you trust its authors"
            raise Refused(f"no AutoencoderKL or AutoencoderTiny at {source} here: {reason}") from None
        self.vae = [vae.eval().requires_grad_(False)]  # in a list: a checkpoint names the source, and copies nothing
        self.factor = 64 // self.encode(torch.zeros(1, 3, 64, 64)).shape[-1]

    def encode(self, pictures: Tensor) -> Tensor:
        """(B,3,S,S) → (B,C,h,w), the mode of the posterior."""
        with self.fast(pictures.device):
            out = self.vae[0].encode(2 * pictures - 1)
        if hasattr(out, "latent_dist"):
            return out.latent_dist.mode().float()
        return out.latents.float()

    def decode(self, latents: Tensor) -> Tensor:
        """(B,C,h,w) → (B,3,S,S)."""
        with self.fast(latents.device):
            pictures = self.vae[0].decode(latents).sample
        return ((pictures.float() + 1) / 2).clamp(0, 1)

    def fast(self, device: torch.device):
        """A block in which the autoencoder is on the device, and computes in bf16 on CUDA."""
        self.vae[0].to(device, memory_format=torch.channels_last)
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# So that scflow.build finds them.
scflow.NETWORKS.update(PatchPCA=PatchPCA, PicturePCA=PicturePCA)
scflow.NETWORKS.update(TinyAutoencoder=TinyAutoencoder, Diffusers=Diffusers)


def autoencoder(name: str, size: int, channels: int) -> nn.Module:
    """The autoencoder that `--autoencoder` names: pca, none, the prefix of a TAESD pair, or a diffusers source."""
    if name == "pca":
        net = PatchPCA(8, channels)
    elif name == "none":
        net = PatchPCA(1, 3)
    elif os.path.exists(f"{name}_encoder.pth") or os.path.exists(f"{name}_decoder.pth"):
        net = TinyAutoencoder.read(name)
    else:
        TRUSTED.add(name)
        net = Diffusers(name)
    require(size % net.factor == 0, f"--size {size} must be a multiple of {net.factor} for this autoencoder")
    return net.eval().requires_grad_(False)


# ═══ 3. What is compared of pictures ══════════════════════════════════════════════════════


def picture_features(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """What is compared of pictures uint8 (B,3,H,W): thumbnails uint8 (B,3,32,32), and textures (B,192).

    A texture is the mean and the deviation over the picture of 3×32 random convolutions with a fixed seed.
    """
    generator = torch.Generator().manual_seed(0)
    x = pictures.float() / 255
    thumbs = (255 * F.adaptive_avg_pool2d(x, 32)).round().byte()
    h = 2 * x - 1
    textures = []
    for channels, side in ((3, 5), (32, 3), (32, 3)):
        weight = torch.randn(32, channels, side, side, generator=generator)
        weight = weight * math.sqrt(2 / (channels * side**2))
        h = torch.relu(F.conv2d(h, weight.to(h), stride=2, padding=side // 2))
        textures += [h.mean((2, 3)), h.std((2, 3))]
    return thumbs.cpu(), torch.cat(textures, 1).cpu()


def features_of(pictures: Tensor, device: str = "cpu", batch: int = 64) -> tuple[Tensor, Tensor]:
    """`picture_features` of many pictures (N,3,H,W), computed on the device in batches."""
    thumbs = []
    textures = []
    for part in pictures.split(batch):
        thumb, texture = picture_features(part.to(device))
        thumbs.append(thumb)
        textures.append(texture)
    return torch.cat(thumbs), torch.cat(textures)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """‖m−m′‖² + tr(C + C′ − 2(CC′)^½) of Gaussians fitted to features (N,d) and (M,d) (Heusel et al., 2017).

    Raises ValueError for no more rows than dimensions, where the covariances are singular.
    """
    few = min(len(x), len(y))
    require(few > x.shape[1], f"{few} samples are too few for a Fréchet distance in {x.shape[1]} dimensions")
    x = x.double()
    y = y.double()
    cov_x = torch.cov(x.T)
    cov_y = torch.cov(y.T)
    means = (x.mean(0) - y.mean(0)).square().sum()
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C^½; then tr (CC′)^½ = tr (C^½ C′ C^½)^½
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return (means + cov_x.trace() + cov_y.trace() - 2 * cross).item()


def neighbours(x: Tensor, y: Tensor, k: int = 1, rows: int = 500) -> tuple[Tensor, Tensor]:
    """Distance (N,) from each row of x (N,d) to its k-th nearest row of y (M,d), and that row's index (N,)."""
    distances = []
    indices = []
    for part in x.split(rows):
        nearest = torch.cdist(part, y).topk(k, largest=False)
        distances.append(nearest.values[:, -1])
        indices.append(nearest.indices[:, -1])
    return torch.cat(distances), torch.cat(indices)


def knn_coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of real rows (N,d) with a fake one (M,d) nearer than their k-th real neighbour (Naeem et al., 2020)."""
    radius, _ = neighbours(real, real, k + 1)  # the nearest is the row itself
    distance, _ = neighbours(real, fake)
    return (distance <= radius).double().mean().item()


class PictureMeasure:
    """Fréchet distances to a reference set of pictures in two spaces fixed in advance, without a download.

    "layout" is 64 principal components of (3,000 of) the reference's thumbnails, "texture" as in `picture_features`.
    """

    def __init__(self, thumbs: Tensor, textures: Tensor):
        flat = thumbs.flatten(1).float() / 255  # (N,3072)
        self.mean = flat.mean(0)
        some = flat[:3000] - self.mean
        _, vectors = torch.linalg.eigh(some @ some.T)  # the n×n Gram matrix has the same components; the largest last
        self.basis = F.normalize(some.T @ vectors[:, -64:], dim=0)  # (3072,64)
        self.reference = self.spaces(thumbs, textures)

    def spaces(self, thumbs: Tensor, textures: Tensor) -> dict[str, Tensor]:
        """The features (N,64) and (N,192) of other pictures, by the name of the space."""
        flat = thumbs.flatten(1).float() / 255
        return {"layout": (flat - self.mean) @ self.basis, "texture": textures}

    def __call__(self, thumbs: Tensor, textures: Tensor) -> dict[str, float]:
        """{"layout", "texture": Fréchet distance, "coverage": share of the reference that is covered in layout}."""
        ours = self.spaces(thumbs, textures)
        return {
            "layout": frechet_distance(ours["layout"], self.reference["layout"]),
            "texture": frechet_distance(ours["texture"], self.reference["texture"]),
            "coverage": knn_coverage(self.reference["layout"], ours["layout"]),
        }


# ═══ 4. What the commands share: devices, folders, Ctrl-C ═════════════════════════════════


@dataclass(frozen=True)
class Device:
    """Where it is computed."""

    device: str = ""  # cpu, cuda or mps; without it the best there is

    def __post_init__(self):
        check_choices(self)
        require(getattr(self, "out", "named"), "give --out a folder")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and f.name != "seed":
                require(value > 0, f"{f.name} must be positive, not {value}")
            if f.name == "seed":
                require(value >= 0, f"seed must not be negative, and is {value}")


@dataclass(frozen=True)
class Folder(Device):
    """What may already be there."""

    resume: bool = False  # go on with an interrupted run (give the same command)
    overwrite: bool = False  # start afresh in a folder that exists
    quiet: bool = False  # no progress bar

    def __post_init__(self):
        super().__post_init__()
        require(not (self.resume and self.overwrite), "--resume and --overwrite contradict each other")


def choose_device(name: str) -> str:
    """The device of that name, or the best there is. Raises ValueError if it is not here."""
    if name == "":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    toy_2d.check_device(name)
    if name.startswith("cuda"):
        torch.cuda.set_device(name)  # of several the one whose memory and name are asked for
    return name


LATENTS = "folder of latents"  # what config.json says it is
RUN = "run of celeba_latent.py"
# What --overwrite deletes, in this order: no measures without their weights.
LATENT_FILES = ("meta.pt", "latents.npy", "thumbs.npy", "textures.npy")
STUDENT_FILES = ("metrics.json", "metrics.md", "student.pt", "student.png", "neighbours.png")
RUN_FILES = (*STUDENT_FILES, "teacher.pt", "teacher.png", "log.csv")


def require_room(asked: Folder, folder: Path, kind: str) -> None:
    """Raise ValueError if a folder is there that is neither to be gone on with nor a `kind` to be overwritten."""
    if asked.resume:
        return
    new = asked.overwrite or not folder.exists()
    require(new, f"{folder} exists: give --resume to go on with it, or --overwrite")
    toy_2d.require_room(folder, asked.overwrite, kind)


@contextmanager
def open_or_resume(asked: Folder, kind: str, config: dict) -> Iterator[Path]:
    """The folder `asked.out`, of a new run or with --resume of the one there is, whose settings must be the same.

    Nothing in it is changed yet. Raises ValueError if it is not free, or holds no `kind`.
    """
    folder = Path(asked.out)
    if not asked.resume:
        require_room(asked, folder, kind)
        with toy_2d.open_folder(asked.out, "", asked.overwrite, kind) as folder:
            yield folder
        return
    require(folder.exists(), f"nothing to resume: there is no {folder}")
    if not toy_2d.is_empty(folder):  # it is, after a kill right at the start
        before = toy_2d.read_config(folder, kind)
        config = {"kind": kind, **config}
        changed = [name for name in {**before, **config} if before.get(name) != config.get(name)]
        require(not changed, f"--resume with other settings than {folder} was started with: {', '.join(changed)}")
    toy_2d.clear_folder(folder, ())
    yield folder


def start_folder(folder: Path, kind: str, config: dict, files: tuple[str, ...]) -> None:
    """Delete the files of an old run, and say in config.json what comes in their place."""
    toy_2d.clear_folder(folder, files)
    write_text(folder / "config.json", json.dumps({"kind": kind, **config}, indent=1))


class Stopped(KeyboardInterrupt):
    """Ctrl-C was pressed, and what was done is saved."""

    def __init__(self):
        super().__init__("stopped: the same command with --resume goes on with what was saved")


@contextmanager
def ctrl_c_waits() -> Iterator[Event]:
    """Within this block Ctrl-C breaks nothing off. It only sets the event that the block is given."""
    pressed = Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ═══ 5. Latents ═══════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Encode(Folder):
    """Which pictures become latents, and how."""

    images: str = ""  # folder (searched through) or zip of jpg, png or webp pictures
    autoencoder: str = "pca"  # pca, none (pixels), the prefix of a TAESD pair, or a diffusers name or folder
    size: int = 128  # side of the square pictures: cut out of the centre, resized
    channels: int = 32  # principal components of a patch of 8×8 pixels (pca only)
    flips: bool = False  # encode the mirror image of every picture too
    batch: int = 64  # pictures encoded at a time
    out: str = "latents"  # latents folder

    def __post_init__(self):
        super().__post_init__()
        require(self.size >= 16, f"size must be at least 16, not {self.size}")


class Pictures:
    """The pictures of a folder or a zip, by name."""

    KINDS = (".jpg", ".jpeg", ".png", ".webp")

    def __init__(self, path):
        self.path = Path(path)
        self.zip = None
        require(path and self.path.exists(), f"no pictures at {path or 'nowhere'}: give --images a folder or a zip")
        if self.path.is_file():
            with reading(path, "zip of pictures"):
                self.zip = zipfile.ZipFile(path)
                found = self.zip.namelist()
        else:
            found = [str(file.relative_to(path)) for file in self.path.rglob("*") if file.is_file()]
        self.names = sorted(name for name in found if self.is_picture(name))
        require(self.names, f"{path} holds no {', '.join(self.KINDS)} pictures")

    def is_picture(self, name: str) -> bool:
        """By its ending. Hidden files are none."""
        return name.lower().endswith(self.KINDS) and not Path(name).name.startswith(".")

    def read(self, name: str, size: int) -> Tensor | str:
        """uint8 (3,size,size): the central square, antialiased; or a string that says why there is none."""
        from PIL import Image, ImageOps

        try:
            file = self.zip.open(name) if self.zip else self.path / name
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image)  # as the camera was held
                if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off at 255
                    image = image.point(lambda value: value / 257, "L" if image.mode == "I" else None)
                image = image.convert("RGB")
        except Exception as error:  # broken files raise nearly anything
            return f"cannot be read ({type(error).__name__})"
        side = min(image.size)
        if side < size:
            return f"too small ({image.width}×{image.height})"
        left = (image.width - side) / 2
        top = (image.height - side) / 2
        square = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, square)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def read_all(self, names: list[str], size: int) -> list:
        """Several pictures, decoded by a few threads."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(partial(self.read, size=size), names))


def encode_command(argv: list[str]) -> None:
    """Turn pictures into a latents folder."""
    (given,) = cli(argv, encode_command.__doc__, Encode())
    asked = Encode(**given)
    pictures = Pictures(asked.images)
    net = autoencoder(asked.autoencoder, asked.size, asked.channels)
    names = "\n".join(pictures.names).encode(errors="surrogateescape")
    config = {"pictures": hashlib.sha256(names).hexdigest()[:16]}
    for name in ("images", "autoencoder", "size", "channels", "flips"):
        config[name] = getattr(asked, name)
    read = partial(pictures.read_all, size=asked.size)
    meta = write_latents(net, pictures.names, read, asked, config)
    count = len(meta["sources"])
    print(f"{asked.out}: {count} pictures as latents {tuple(meta['shape'])}, {len(meta['skipped'])} skipped")
    for name, reason in meta["skipped"]:
        print(f"  {name}: {reason}")


def arrays_of(meta: dict, count: int) -> dict[str, tuple]:
    """{name: (type, shape)} of the arrays in a latents folder of so many pictures."""
    return {
        "latents": (np.float16, (meta["copies"] * count, *meta["shape"])),
        "thumbs": (np.uint8, (count, 3, 32, 32)),
        "textures": (np.float32, (count, 192)),
    }


@torch.no_grad()  # nothing is trained here
def write_latents(net: nn.Module, names: list[str], read: Callable, asked: Encode, config: dict) -> dict:
    """Encode pictures from where meta.pt ends; returns the content of the finished meta.pt.

    read    callable (names) → [uint8 (3,S,S), or the reason why there is none].
    config  goes into config.json.
    Raises ValueError for too few good pictures, and for an autoencoder whose values are not finite or constant.
    """
    device = choose_device(asked.device)
    with open_or_resume(asked, LATENTS, config) as folder:
        path = folder / "meta.pt"
        if asked.resume and path.exists():
            with reading(path, "record of an encoding"):
                meta = scflow.read(path, "complete")
                if meta["complete"]:
                    return meta
                net = scflow.load(path)
                for key in ("format", "arch", "weights"):
                    del meta[key]  # scflow.save writes them
                arrays = read_arrays(folder, meta, "r+")
        else:
            prepare(net, names, read, device)
            blank = torch.zeros(1, 3, asked.size, asked.size, device=device)
            meta = {"size": asked.size, "copies": 2 if asked.flips else 1, "complete": False}
            meta.update(done=0, sources=[], skipped=[])
            meta["shape"] = list(net.encode(blank).shape[1:])
            meta["checksums"] = dict.fromkeys(arrays_of(meta, 0), 0)  # of the rows that are written
            start_folder(folder, LATENTS, config, LATENT_FILES)
            make_arrays(folder, meta, len(names))
            arrays = read_arrays(folder, meta, "r+")
        fill_arrays(path, net, names, read, asked, meta, arrays)
        latents = torch.from_numpy(arrays["latents"][: meta["copies"] * len(meta["sources"])])
        meta["mean"], meta["std"] = channel_statistics(latents)
        meta["complete"] = True
        scflow.save(path, net, **meta)
    return meta


def prepare(net: nn.Module, names: list[str], read: Callable, device: str) -> None:
    """Try the autoencoder on pictures from all over the list; principal components are fitted to them.

    This comes before old latents are deleted. Raises ValueError for fewer than 20 good pictures.
    """
    fits = isinstance(net, (PatchPCA, PicturePCA)) and net.factor > 1
    wanted = 4096 if fits else 64
    shuffled = random.Random(0).sample(names, len(names))
    good = []
    reason = ""
    for start in range(0, len(names), 64):
        for picture in read(shuffled[start : start + 64]):
            if isinstance(picture, str):
                reason = f"; one of the others {picture}"
            else:
                good.append(picture)
        if len(good) >= wanted:
            break
    require(len(good) >= 20, f"only {len(good)} of {len(names)} pictures can be used, and 20 are needed{reason}")
    x = torch.stack(good).float() / 255
    if fits:
        kept = net.fit(x)
        print(f"{net.channels} components keep {kept:.1%} of the variance")
    z = net.to(device).encode(x[:64].to(device)).half().cpu()
    again = net.decode(z.float().to(device))
    finite = z.isfinite().all() and again.isfinite().all()
    require(finite, "the autoencoder gives values that are not finite")
    channel_statistics(z)


def make_arrays(folder: Path, meta: dict, count: int) -> None:
    """The files of the arrays, full of zeros. A full disk is found now, by an error, and not by a signal later."""
    for name, (kind, shape) in arrays_of(meta, count).items():
        with replacing(folder / f"{name}.npy") as temporary:
            np.lib.format.open_memmap(temporary, "w+", kind, shape)
            if hasattr(os, "posix_fallocate"):
                with open(temporary, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)


def fill_arrays(
    path: Path, net: nn.Module, names: list[str], read: Callable, asked: Encode, meta: dict, arrays: dict
) -> None:
    """Encode the pictures that are not done, and save meta.pt at `path` now and then."""
    device = choose_device(asked.device)
    net.to(device, memory_format=torch.channels_last)  # convolutions are a quarter faster so, on a CPU too
    done = meta["done"]
    bar = tqdm(total=len(names), initial=done, desc="encode", unit="picture", disable=asked.quiet)
    with ctrl_c_waits() as pressed, bar:
        for start in range(done, len(names), asked.batch):
            chunk = names[start : start + asked.batch]
            encode_chunk(net, chunk, read(chunk), meta, arrays, device)
            bar.update(len(chunk))
            every = 16 * asked.batch  # not every time: a long list of sources takes a while
            if pressed.is_set() or (meta["done"] - done) % every == 0:
                scflow.save(path, net, **meta)
            if pressed.is_set():
                raise Stopped


def encode_chunk(net: nn.Module, names: list[str], found: list, meta: dict, arrays: dict, device: str) -> None:
    """Encode pictures `found`, uint8 (3,S,S) each or a reason why there is none, into the next rows of the arrays."""
    good = []
    for name, picture in zip(names, found):
        if isinstance(picture, str):
            meta["skipped"].append((name, picture))
        else:
            good.append(picture)
            meta["sources"].append(name)
    meta["done"] += len(names)
    if not good:
        return
    x = torch.stack(good).to(device)
    both = torch.stack([x, x.flip(3)], 1)[:, : meta["copies"]]  # each beside its mirror image
    z = net.encode(both.flatten(0, 1).float() / 255).half().cpu()  # (copies·n,C,h,w)
    first = len(meta["sources"]) - len(good)
    require(z.isfinite().all(), f"the autoencoder gives values that are not finite near {meta['sources'][first]}")
    thumbs, textures = picture_features(x)
    for name, values in {"latents": z, "thumbs": thumbs, "textures": textures}.items():
        rows = np.ascontiguousarray(values.numpy())
        start = first * len(rows) // len(good)  # a picture may have two rows
        arrays[name][start : start + len(rows)] = rows
        arrays[name].flush()  # on the disk before meta.pt counts it
        meta["checksums"][name] = zlib.crc32(rows, meta["checksums"][name])


def channel_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,1,1) of the channels of latents (N,C,h,w), added up in double precision."""
    total = 0
    squares = 0
    for part in latents.split(1024):
        part = part.double()
        total += part.sum((0, 2, 3))
        squares += part.square().sum((0, 2, 3))
    n = latents[:, 0].numel()
    mean = total / n
    std = (squares / n - mean**2).clamp(min=0).sqrt()
    require((std > 1e-6).all(), "a channel of the latents is constant: use fewer --channels, or other pictures")
    return mean.float()[:, None, None], std.float()[:, None, None]


class Codec:
    """What turns normalised latents back into pictures, as kept in checkpoints: an autoencoder and the statistics."""

    def __init__(self, content: dict, device: str = "cpu"):
        self.content = {key: content[key] for key in ("arch", "weights", "mean", "std", "size")}
        self.device = device
        self.mean = content["mean"].to(device)
        self.std = content["std"].to(device)
        self.net = scflow.build(content["arch"])
        self.net.load_state_dict(content["weights"])
        self.net.to(device).eval().requires_grad_(False)

    @torch.no_grad()  # nothing is trained here
    def decode(self, latents: Tensor, batch: int = 128) -> Tensor:
        """Normalised latents (N,C,h,w) → uint8 pictures (N,3,S,S) on the CPU, in batches."""
        parts = []
        for z in latents.split(batch):
            pictures = self.net.decode(z.to(self.device) * self.std + self.mean)
            parts.append((255 * pictures).round().byte().cpu())
        return torch.cat(parts)


def codec_hash(content: dict) -> str:
    """Codecs with the same one decode alike. It is made of the content alone: nothing is built, or fetched."""
    digest = hashlib.sha256(repr(content["arch"]).encode())
    for numbers in (content["mean"], content["std"], *content["weights"].values()):
        digest.update(numbers.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Latents:
    """A finished latents folder. A fixed tenth of its pictures is held out, and never trained on."""

    def __init__(self, folder):
        require(folder, "give --latents a folder that encode has made")
        toy_2d.read_config(folder, LATENTS)
        path = Path(folder, "meta.pt")
        with reading(path, "record of an encoding"):
            meta = scflow.read(path, "complete")
            require(meta["complete"], f"{folder} is unfinished: give the same encode command with --resume")
            count = len(meta["sources"])
            self.folder = folder
            self.meta = meta
            self.shape = tuple(meta["shape"])
            self.copies = meta["copies"]
            self.arrays = read_arrays(Path(folder), meta)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        tenth = count // 10
        self.held_out = order[:tenth].sort().values
        self.train = order[tenth:].sort().values

    def normalised(self, which: Tensor, device: str = "cpu", mirrored: bool = False) -> Tensor:
        """The latents of the pictures `which` (N,) as float32 (N,C,h,w); `mirrored`: their mirror images too."""
        rows = self.copies * which
        if mirrored:
            rows = (rows[:, None] + torch.arange(self.copies)).flatten()
        z = torch.from_numpy(self.arrays["latents"][rows.numpy()]).to(device).float()
        return (z - self.meta["mean"].to(device)) / self.meta["std"].to(device)

    def batch(self, device: str) -> scflow.Batch:
        """`batch(n, generator)` over the training latents, which live on the device: no loader."""
        z = self.normalised(self.train, device, mirrored=True)

        def batch(n, generator):
            rows = torch.randint(len(z), (n,), generator=generator, device=device)
            return z[rows], None

        return batch

    def require_codec(self, content: dict, owner: Path | str) -> None:
        """Raise ValueError unless these latents have the autoencoder and the statistics of a checkpoint."""
        same = codec_hash(self.meta) == codec_hash(content)
        require(same, f"{self.folder} was made by another autoencoder, or of other pictures, than {owner} learned from")

    def originals(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """The `picture_features` of the original pictures."""
        rows = which.numpy()
        thumbs = torch.from_numpy(self.arrays["thumbs"][rows])
        textures = torch.from_numpy(self.arrays["textures"][rows])
        return thumbs, textures


def read_arrays(folder: Path, meta: dict, mode: str = "r") -> dict[str, np.ndarray]:
    """The arrays of a latents folder, which stay on the disk. Raises ValueError unless they are what encode wrote."""
    arrays = {}
    for name, (kind, shape) in arrays_of(meta, len(meta["sources"])).items():
        path = folder / f"{name}.npy"
        with reading(path, "array that encode wrote: run it again with --overwrite"):
            array = np.lib.format.open_memmap(path, mode)
            fits = array.dtype == kind and array.shape[1:] == shape[1:]
            whole = fits and zlib.crc32(array[: shape[0]]) == meta["checksums"][name]
            require(whole, f"{path} is damaged (its checksum is wrong): run encode again with --overwrite")
        arrays[name] = array
    return arrays


# ═══ 6. Where networks start: what is known of normal latents ═════════════════════════════
# If latents were normal, with mean m and covariance V·diag(λ)·Vᵀ, the components of y = Vᵀ(x_t − (1−t)m) would be
# normal and independent, with variances σ² = (1−t)²λ + t². Then all would be known:
#
#     the velocity              v(x_t,t) = V(slope·y) − m         slope = (t − (1−t)λ) / σ²
#     the flow map to t = 0     f(x_t,t) = V(√λ/σ·y) + m
#     the map as a velocity     (x_t − f)/t = V(chord·y) − m      chord = (t(1+λ) − 2λ) / (σ(σ+√λ))
#
# The slope belongs to the tangent of a path, the chord to the straight line from x_t to where the path ends. Latents
# are not normal. But beside this closed form a network has less to learn.


def slope(variance: Tensor, t: Tensor) -> Tensor:
    """What the velocity multiplies a component with."""
    return (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)


def chord(variance: Tensor, t: Tensor) -> Tensor:
    """What the mean velocity from t to 0 multiplies a component with; at t = 0 it is the slope."""
    deviation = ((1 - t) ** 2 * variance + t**2).sqrt()  # σ
    return (t * (1 + variance) - 2 * variance) / (deviation * (deviation + variance.sqrt()))


class NormalStart(nn.Module):
    """A velocity network of latents, to which the closed form for normal latents is added.

    net         the `arch` of the network.
    components  how many, the leading ones.
    form        "velocity" is for a teacher around a DiT. An untrained DiT has slope(1,t)·x_t, the velocity of latents
                of variance 1. This adds the true mean, and the true slope of the components.
                "map" is for a student around a trained teacher: the teacher's velocity plus (chord − slope)·y, which
                for normal latents is the flow map.
    """

    def __init__(self, net: dict, components: int, form: Literal["velocity", "map"]):
        super().__init__()
        self.arch = dict(name="NormalStart", net=net, components=components, form=form)
        self.net = scflow.build(net)
        self.form = form
        size = math.prod(self.net.shape)
        self.shape = self.net.shape
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(size, components))
        self.register_buffer("variance", torch.ones(components))

    def fit(self, latents: Tensor) -> None:
        """Set mean, basis and variances from latents (N,C,h,w)."""
        flat = latents.flatten(1)
        values, vectors = torch.linalg.eigh(torch.cov(flat.T))  # the largest come last
        k = len(self.variance)
        self.mean.copy_(flat.mean(0))
        self.basis.copy_(vectors[:, -k:])
        self.variance.copy_(values[-k:].clamp(min=1e-4))  # rounding can leave negative ones

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity (B,C,h,w) at latents (B,C,h,w) and times (B,)."""
        v = self.net(x, t, cond)
        t = t[:, None]
        y = (x.flatten(1) - (1 - t) * self.mean) @ self.basis  # (B,components)
        tangent = slope(self.variance, t)
        if self.form == "velocity":
            of_dit = slope(torch.ones_like(t), t)
            change = ((tangent - of_dit) * y) @ self.basis.T
            change = change - (1 + (1 - t) * of_dit) * self.mean  # the DiT took the mean for 0
        else:
            change = ((chord(self.variance, t) - tangent) * y) @ self.basis.T
        return v + change.reshape(x.shape)


scflow.NETWORKS.update(NormalStart=NormalStart)


# A teacher gets few components. Beside all of them nothing linear is left to learn, and a DiT begins with what is
# linear: in a trial, which is not kept, it learned nothing in a thousand updates.
COMPONENTS = {"velocity": 64, "map": 2048}


def start_from_normal(net: nn.Module, latents: Tensor, form: Literal["velocity", "map"]) -> nn.Module:
    """The network in a NormalStart for these latents (N,C,h,w), on the CPU as they are.

    Returns the network itself where there are fewer than 4 latents, or more than 8,192 numbers in each: the covariance
    of so many takes minutes and 0.3 GB.
    """
    size = math.prod(net.shape)
    components = min(COMPONENTS[form], size, len(latents) // 4)  # each variance from at least 4 latents
    if components == 0 or size > 8192:
        return net
    start = NormalStart(net.arch, components, form)
    start.net.load_state_dict(net.state_dict())
    start.fit(latents)
    return start


# ═══ 7. Training: sizes, schedules, speed, and a run that can be resumed ══════════════════

# Networks by size, of 5, 33 and 130 million parameters, and how a teacher of that size is trained.
SIZES = {
    "small": dict(dim=256, depth=4, heads=4),
    "S": dict(dim=384, depth=12, heads=6),
    "B": dict(dim=768, depth=12, heads=12),
}
# For the demo, a plain perceptron: components of whole pictures have no place in them, and so make no tokens.
PERCEPTRON = dict(width=512, depth=3, x_frequencies=0)
# What S and B share. They are planned for a GPU, and were never run.
ON_GPU = TeacherSettings(teacher_rise=1000, teacher_clip=1.0, teacher_times="logit-normal")
TEACHERS = {
    "demo": TeacherSettings(teacher_steps=6000, teacher_batch=256, teacher_lr=2e-3),
    "small": TeacherSettings(teacher_steps=15000, teacher_batch=32, teacher_lr=1e-3, teacher_times="logit-normal"),
    "S": replace(ON_GPU, teacher_steps=20000, teacher_batch=256, teacher_lr=5e-4),
    "B": replace(ON_GPU, teacher_steps=80000, teacher_batch=128, teacher_lr=2e-4),
}

# The reference's settings for CelebA-HQ 256: 200 epochs of 27,000 pictures in batches of 32, on one GPU. Two things are
# ours: the rate rises over 50 updates, and the critic's AdamW has the betas 0.5 and 0.99.
# λ, δ, τ and the teacher's step are the defaults of Phase.
PAPER = Phase(
    steps=168750,
    batch=32,
    lr=2e-5,
    lr_fall="none",
    lr_critic=1e-4,
    warmup=1000,
    adversarial="softplus",
    r1=1.0,
)
# This project's schedule, with what pictures need.
FIRST, LAST = scflow.SCHEDULES["two_phase"]
FIRST = replace(FIRST, steps=3600, batch=32, lr=1e-3, delta=0.2)
LAST = replace(LAST, steps=1200, batch=64, lr=4e-4, lr_critic=2e-4, lambda_adv=0.02, pinned=0.5)
# The same for the demo's perceptron.
DEMO = (
    replace(FIRST, steps=2800, batch=256, lr=2e-3, delta=0.5),
    replace(LAST, steps=800, batch=256, lr=1e-3, lambda_adv=0.01),
)
# The same for S and B, with lower rates, and with R1, because a critic can learn few pictures by heart.
LARGE = (
    replace(FIRST, steps=20000, batch=128, lr=1e-4),
    replace(LAST, steps=5000, batch=128, lr=5e-5, r1=1.0),
)
SCHEDULES = {"two_phase": (FIRST, LAST), "large": LARGE, "paper": (PAPER,), "demo": DEMO}


@dataclass(frozen=True)
class Train(Folder):
    """How it is trained, and where it goes."""

    latents: str = ""  # latents folder (distill takes the teacher's)
    out: str = "runs/faces"  # run folder
    seed: int = 0  # seed of weights, data and noise
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the networks' passes; auto: bf16 on CUDA
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on CUDA
    save_every: float = 10.0  # minutes between checkpoints
    sheet_every: int = 2000  # updates between sheets of samples
    trust_autoencoder: str = ""  # name of a diffusers autoencoder that may be fetched from a hub

    def __post_init__(self):
        super().__post_init__()
        require(self.save_every >= 0, f"save_every must not be negative, and is {self.save_every}")


@dataclass(frozen=True)
class Teach(Train):
    """Which teacher is trained, and where it goes."""

    network: Literal["small", "S", "B", "demo"] = "small"  # network of the teacher, and so of the student
    patch: int = 2  # side of the DiT's patches, in latents


@dataclass(frozen=True)
class Distill(Train):
    """What is distilled, and where it goes."""

    preset: Literal["two_phase", "large", "paper", "demo"] = "two_phase"  # schedule; large: ours for S and B


def place(net: nn.Module, device: str, precision: str = "auto") -> nn.Module:
    """The network on the device, to compute in bf16 where that is fast. Its weights stay in float32.

    Whoever trains, samples or measures places networks so. On CUDA, what is left in float32 uses TF32. Both switches
    below are torch's own, for all networks: give those that work together one precision.
    """
    cuda = device.startswith("cuda")
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    in_bf16 = precision == "bf16" or (precision == "auto" and cuda)
    if in_bf16:
        for part in net.modules():  # whichever of them asks for it
            part.precision = torch.bfloat16
    # In bf16 on a CPU, fused attention has a slow backward pass. (The switch is for CPUs, too, whatever its name.)
    torch.backends.cuda.enable_flash_sdp(cuda or not in_bf16)
    return net.to(device)


def wants_compile(asked: Train, device: str) -> bool:
    """Whether the networks are to be compiled."""
    return asked.compile == "yes" or (asked.compile == "auto" and device.startswith("cuda"))


def compile_in_place(net: nn.Module) -> None:
    """Compile a network. Its weights keep their names."""
    # A graph for every batch size, with and without gradients: more than the 8 after which it gives up.
    torch._dynamo.config.cache_size_limit = 64
    if isinstance(net, scflow.LatentCritic) and next(net.parameters()).is_cuda:
        net.to(memory_format=torch.channels_last)  # of convolutions; not compiled, it would gain nothing
    blocks = [part for part in net.modules() if isinstance(part, scflow.Block)]
    for part in blocks or [net]:  # the blocks of a DiT share their graphs: a twelfth of the wait
        part.compile(dynamic=False)


def read_run(path: Path, kind: str) -> dict:
    """The checkpoint of a run of the "teacher" or the "student". Raises ValueError if it is none."""
    with reading(path, f"run of the {kind}"):
        content = scflow.read(path, "kind", "state", "log")
        require(content["kind"] == kind, f"{path} does not hold a run of the {kind}")
        require(content["state"]["step"] > 0, f"{path} is a run without a step")
    return content


class RunFile:
    """The checkpoint of a run that trains the "teacher" or the "student", and its log.

    start   called after the first update of a new run, to delete what the run replaces: what cannot work at all
            fails before that
    .state  where the checkpoint to go on with has left the run, or None
    .rows   the log up to there
    """

    def __init__(self, folder: Path, kind: str, asked: Train, start: Callable):
        self.folder = folder
        self.kind = kind
        self.asked = asked
        self.start = start
        self.path = folder / f"{kind}.pt"
        self.state = None
        self.rows = []
        if asked.resume and self.path.exists():
            content = read_run(self.path, kind)
            self.state = content["state"]
            self.rows = content["log"]

    def follow(self, loop: Iterator, total: int, **extra) -> Iterator[scflow.Run]:
        """Pass on the states of a training loop, with a progress bar; save now and then, at the end, at Ctrl-C.

        Ctrl-C takes effect between two updates, so that what is saved is always whole.

        extra  goes into the checkpoint.
        """
        done = self.state["step"] if self.state else 0
        saved = time.perf_counter()
        with ctrl_c_waits() as pressed:
            for run in toy_2d.progress(loop, total, self.kind, self.asked.quiet, done):
                if run.step == 1:
                    self.start()
                if run.step % 10 == 1:
                    self.rows.append({"stage": self.kind, "step": run.step, **run.losses})
                yield run
                due = time.perf_counter() - saved >= 60 * self.asked.save_every
                if pressed.is_set() or due or run.step == total:
                    self.save(run, extra)
                    saved = time.perf_counter()
                if pressed.is_set():
                    raise Stopped

    def save(self, run: scflow.Run, extra: dict) -> None:
        """Write the checkpoint and the log."""
        content = {"kind": self.kind, "state": run.state_dict(), "log": self.rows, **extra}
        scflow.save(self.path, run.ema, **content)
        write_csv(self.folder / "log.csv", self.rows)


# ═══ 8. Teacher and student ═══════════════════════════════════════════════════════════════


def generate(
    net: scflow.Velocity,
    noise: Tensor,
    steps: int,
    codec: Codec,
    batch: int = 250,
    cond: Tensor | None = None,
    solver: str = "euler",
) -> Tensor:
    """Noise (N,C,h,w) → pictures uint8 (N,3,S,S) on the CPU, in batches on the codec's device."""
    pictures = []
    for i in range(0, len(noise), batch):
        x = noise[i : i + batch].to(codec.device)
        c = None if cond is None else cond[i : i + batch].to(codec.device)
        z = scflow.sample(net, x, steps, solver, cond=c)
        pictures.append(codec.decode(z))
    return torch.cat(pictures)


def draw_sheet(path: Path, columns: dict[str, Tensor]) -> None:
    """A PNG whose columns {title: uint8 (n,3,S,S)} show the same noise in every row."""
    from matplotlib.figure import Figure  # no window is opened

    down = len(next(iter(columns.values())))
    width = 1.3 * len(columns)
    column = width / (1.05 * len(columns) - 0.05)  # between two columns a twentieth of one is left free
    height = 0.35 + down * column  # the titles above
    figure = Figure(figsize=(width, height), layout="none")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for ax, (title, pictures) in zip(axes, columns.items()):
        ax.imshow(rearrange(pictures, "n c h w -> (n h) w c").numpy(), interpolation="nearest")
        ax.set_title(title, fontsize=11)
        ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1 - 0.35 / height, wspace=0.05)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def compare(path: Path, data: Latents, codec: Codec, networks: dict) -> None:
    """A sheet of held-out pictures and of samples, {name: (net, numbers of steps)}, all of one noise."""
    shown = data.held_out[:8]
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(8, *data.shape, generator=generator)[: len(shown)]
    columns = {"held out": codec.decode(data.normalised(shown))}
    for name, (net, counts) in networks.items():
        for steps in counts:
            columns[f"{name} {steps}"] = generate(net, noise, steps, codec)
    draw_sheet(path, columns)


def teacher_command(argv: list[str]) -> None:
    """Train the rectified-flow teacher on a latents folder. (Below, the numbers of --network small.)"""
    given, changed = cli(argv, teacher_command.__doc__, Teach(), TEACHERS["small"])
    asked = Teach(**given)
    teach(asked, replace(TEACHERS[asked.network], **changed))


def teach(asked: Teach, settings: TeacherSettings) -> None:
    """Train a teacher, or go on with it."""
    total = settings.teacher_steps
    device = choose_device(asked.device)
    data = Latents(asked.latents)
    TRUSTED.add(asked.trust_autoencoder)
    codec = Codec(data.meta, device)
    torch.manual_seed(asked.seed)  # initial weights
    if asked.network == "demo":
        net = scflow.MLP(data.shape, **PERCEPTRON)
    else:
        net = scflow.DiT(data.shape, asked.patch, **SIZES[asked.network])
        net = start_from_normal(net, data.normalised(data.train, mirrored=True), "velocity")
    net = place(net, device, asked.precision)
    batch = data.batch(device)
    config = {"latents": asked.latents, "codec": codec_hash(codec.content), **asdict(settings)}
    config.update(network=asked.network, patch=asked.patch, seed=asked.seed, precision=asked.precision)
    if wants_compile(asked, device):
        compile_in_place(net)
    generator = torch.Generator(device).manual_seed(asked.seed)
    with open_or_resume(asked, RUN, config) as folder:
        start = partial(start_folder, folder, RUN, config, RUN_FILES)
        file = RunFile(folder, "teacher", asked, start)
        loop = scflow.train_teacher(net, batch, generator, settings, resume=file.state)
        for run in file.follow(loop, total, codec=codec.content):
            if run.step % asked.sheet_every == 0 or run.step == total:
                compare(folder / "teacher.png", data, codec, {"teacher": (run.ema, (1, 50))})
    print(f"{folder}/teacher.pt and teacher.png; next: python celeba_latent.py distill --out {folder}")


def distill_command(argv: list[str]) -> None:
    """Distil the teacher of a run folder into a student that needs one step. (Below, the numbers of two_phase.)"""
    given, changed = cli(argv, distill_command.__doc__, Distill(), SCHEDULES["two_phase"])
    asked = Distill(**given)
    distil(asked, toy_2d.revise(SCHEDULES[asked.preset], changed))


def distil(asked: Distill, schedule: tuple[Phase, ...]) -> None:
    """Train a student, or go on with it."""
    total = sum(phase.steps for phase in schedule)
    device = choose_device(asked.device)
    folder = Path(asked.out)
    past, latents = trained_teacher(folder)
    data = Latents(asked.latents or latents)
    data.require_codec(past["codec"], folder)
    plan = {"seed": asked.seed, "precision": asked.precision}
    plan["schedule"] = [asdict(phase) for phase in schedule]
    TRUSTED.add(asked.trust_autoencoder)
    codec = Codec(past["codec"], device)
    batch = data.batch(device)
    require_no_other(folder / "student.pt", asked, plan)
    toy_2d.clear_folder(folder, ())

    teacher, student, critic = first_networks(asked, data, device)
    generator = torch.Generator(device).manual_seed(asked.seed + 1)
    start = partial(toy_2d.clear_folder, folder, STUDENT_FILES)
    file = RunFile(folder, "student", asked, start)
    if file.state is None:
        file.rows = past["log"]
    loop = scflow.distill(teacher, critic, batch, generator, schedule, student=student, resume=file.state)
    compiled = not wants_compile(asked, device)
    for run in file.follow(loop, total, codec=codec.content, plan=plan):
        if not compiled:  # after the first update, for only now are all networks there
            compile_all(run, schedule)
            compiled = True
        if run.step % asked.sheet_every == 0 or run.step == total:
            columns = {"teacher": (run.teacher, (1, 50)), "student": (run.ema, (1, 2, 4))}
            compare(folder / "student.png", data, codec, columns)
    print(f"{folder}/student.pt and student.png; next: python celeba_latent.py evaluate --out {folder}")


def trained_teacher(folder: Path) -> tuple[dict, str]:
    """The checkpoint of a run folder's teacher, and its latents folder. Raises ValueError if it is not finished."""
    path = folder / "teacher.pt"
    require(path.is_file(), f"no teacher in {folder}: run celeba_latent.py teacher --out {folder} first")
    config = toy_2d.read_config(folder, RUN, "latents", "teacher_steps")
    past = read_run(path, "teacher")
    done = past["state"]["step"]
    require(done == config["teacher_steps"], f"the teacher stopped at update {done}: finish it with teacher --resume")
    return past, config["latents"]


def first_networks(asked: Distill, data: Latents, device: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Teacher, student and critic, as they are before the first update."""
    torch.manual_seed(asked.seed)  # initial weights of the critic
    teacher = scflow.load(Path(asked.out) / "teacher.pt")
    if isinstance(teacher, scflow.MLP):  # there are no places to convolve over
        critic = scflow.PointCritic(math.prod(data.shape), 128)
    else:
        critic = scflow.LatentCritic(data.shape)
    teacher = place(teacher, device, asked.precision)
    critic = place(critic, device, asked.precision)
    student = teacher
    if asked.preset in ("two_phase", "large"):  # "paper" and "demo" start from the teacher
        student = start_from_normal(teacher, data.normalised(data.train, mirrored=True), "map")
        student = place(student, device, asked.precision)
    return teacher, student, critic


def compile_all(run: scflow.StudentRun, schedule: tuple[Phase, ...]) -> None:
    """Compile the networks that an update asks."""
    nets = [run.teacher, run.student, run.target, run.frozen]
    if all(phase.r1 == 0 for phase in schedule):  # a compiled graph has no second derivative
        nets.append(run.critic)
    for net in nets:
        compile_in_place(net)


def require_no_other(student: Path, asked: Distill, plan: dict) -> None:
    """Raise ValueError if a student is already there that is neither to be gone on with nor to be overwritten."""
    if not student.exists():
        return
    require(asked.resume or asked.overwrite, f"{student} exists: give --resume to go on with it, or --overwrite")
    if asked.resume:
        before = read_run(student, "student").get("plan")
        same = before == plan
        words = "seed, precision or schedule"
        require(same, f"--resume with another {words} than {student} was started with")


# ═══ 9. Samples and measures ══════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Sample(Device):
    """What is sampled."""

    out: str = "runs/faces"  # run folder (its student), or a weights file alone
    steps: tuple = (1,)  # solver steps, one file for each number
    count: int = 64  # pictures
    seed: int = 0  # seed of the noise
    file: str = "samples.png"  # grid .png or .jpg, or .npz of an array (N,S,S,3); -STEPS is added to the name
    trust_autoencoder: str = ""  # name of a diffusers autoencoder that may be fetched from a hub

    def __post_init__(self):
        super().__post_init__()
        require(min(self.steps) > 0, f"steps must be positive, not {min(self.steps)}")
        good = Path(self.file).suffix in (".png", ".jpg", ".npz")
        require(good, f"--file must end in .png, .jpg or .npz, not {self.file!r}")


def sample_command(argv: list[str]) -> None:
    """Draw samples of a run folder, or of a weights file alone, as a grid or an array."""
    from PIL import Image

    (given,) = cli(argv, sample_command.__doc__, Sample())
    asked = Sample(**given)
    source = Path(asked.out)
    if source.is_dir():
        source = source / "student.pt"
    TRUSTED.add(asked.trust_autoencoder)
    net, codec = load_run(source, choose_device(asked.device))
    noise = torch.randn(asked.count, *net.shape, generator=torch.Generator().manual_seed(asked.seed))
    for steps in asked.steps:
        pictures = generate(net, noise, steps, codec)
        path = Path(asked.file)
        path = path.with_stem(f"{path.stem}-{steps}")
        with replacing(path) as temporary:
            if path.suffix == ".npz":
                np.savez_compressed(temporary, pictures=rearrange(pictures, "n c h w -> n h w c").numpy())
            else:
                Image.fromarray(grid(pictures)).save(temporary, quality=90)  # of a .jpg
        print(f"{path}: {asked.count} pictures of {toy_2d.plural(steps, 'Euler step')} each")


def grid(pictures: Tensor) -> np.ndarray:
    """Pictures uint8 (N,3,S,S) side by side in a square, filled up with white, (rows·S, columns·S, 3)."""
    columns = math.ceil(math.sqrt(len(pictures)))
    missing = -len(pictures) % columns
    white = pictures.new_full((missing, *pictures.shape[1:]), 255)
    filled = torch.cat([pictures, white])
    return rearrange(filled, "(r c) k h w -> (r h) (c w) k", c=columns).numpy()


def load_run(path: Path | str, device: str) -> tuple[nn.Module, Codec]:
    """The network and the codec of a checkpoint of this script."""
    with reading(path, "checkpoint of celeba_latent.py"):
        content = scflow.read(path)
        require("codec" in content, f"{path} holds no autoencoder: it is not a checkpoint of celeba_latent.py")
        net = place(scflow.load(path), device)
        return net, Codec(content["codec"], device)


@dataclass(frozen=True)
class Evaluate(Device):
    """What is measured."""

    out: str = "runs/faces"  # run folder
    latents: str = ""  # latents folder; without it the teacher's
    count: int = 5000  # samples of each network
    seed: int = 0  # seed of the noise
    fid: str = ""  # the pictures that were encoded: also FID, of 30,000 samples (needs torch-fidelity and its weights)
    trust_autoencoder: str = ""  # name of a diffusers autoencoder that may be fetched from a hub

    def __post_init__(self):
        super().__post_init__()
        n = self.count
        require(n >= 1000, f"a Fréchet distance from {n} samples says little: give --count 1000 or more")


def evaluate_command(argv: list[str]) -> None:
    """Measure teacher and student of a run folder against pictures that were never trained on."""
    (given,) = cli(argv, evaluate_command.__doc__, Evaluate())
    evaluate(Evaluate(**given))


def evaluate(asked: Evaluate) -> None:
    """Measure, and write metrics.json, metrics.md and neighbours.png."""
    device = choose_device(asked.device)
    n = asked.count
    folder = Path(asked.out)
    TRUSTED.add(asked.trust_autoencoder)
    teacher, _ = load_run(folder / "teacher.pt", device)
    student, codec = load_run(folder / "student.pt", device)
    data = Latents(asked.latents or toy_2d.read_config(folder, RUN, "latents")["latents"])
    data.require_codec(codec.content, folder)
    require(len(data.held_out) >= 200, f"{len(data.held_out)} held-out pictures are too few: encode 2,000 pictures")
    enough = len(data.train) >= n
    require(enough, f"--count {n} needs as many training pictures for the floor, and there are {len(data.train)}")
    if asked.fid:  # what is missing is found before minutes of sampling
        Pictures(asked.fid)
        fidelity()

    generator = torch.Generator().manual_seed(10**6 + asked.seed)
    measure = PictureMeasure(*data.originals(data.held_out))
    floor, some = floor_of(measure, data, n, generator)
    decoded = codec.decode(data.normalised(some))
    rows = [{"who": "autoencoder", **measure(*features_of(decoded, device))}]

    count = max(n, FID_SAMPLES) if asked.fid else n
    noise = torch.randn(count, *data.shape, generator=generator)
    cases = [
        ("teacher", teacher, 1, "euler"),
        ("teacher", teacher, 50, "euler"),
        ("teacher, Heun", teacher, 25, "heun"),  # as many evaluations, in the steps that a student learns from
    ]
    cases += [("student", student, steps, "euler") for steps in (1, 2, 4, 8)]
    known = measure.spaces(*data.originals(data.train))["layout"]
    usual = neighbours(measure.reference["layout"], known)[0].median()
    for who, net, steps, solver in cases:
        pictures = generate(net, noise, steps, codec, solver=solver)
        if steps == 1:
            one_step = pictures[:n]
        features = features_of(pictures[:n], device)
        distance, nearest = neighbours(measure.spaces(*features)["layout"], known)
        row = {"who": who, "nfe": scflow.nfe(steps, solver), **measure(*features)}
        row["gap"] = pixel_gap(pictures[:n], one_step)
        row["novelty"] = (distance.median() / usual).item()
        if asked.fid:
            row["fid"] = inception_fid(pictures, data, asked.fid)
        rows.append(row)
        if who == "student" and steps == 1:
            copied = codec.decode(data.normalised(data.train[nearest[:8]]))
            draw_sheet(folder / "neighbours.png", {"student 1": pictures[:8], "nearest": copied})

    metrics = {
        "samples": n,
        "held_out": len(data.held_out),
        "train": len(data.train),
        "shape": data.shape,
        "size": codec.content["size"],
        "seed": asked.seed,
        "floor": floor,
        "rows": rows,
        "machine": toy_2d.machine(),
    }
    text = report(metrics)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    write_text(folder / "metrics.md", text)
    print(text)


def pixel_gap(a: Tensor, b: Tensor) -> float:
    """RMS difference of the values, in [0,1], of pictures uint8 (N,3,S,S); a few at a time, as memory is finite."""
    total = 0.0
    for x, y in zip(a.split(500), b.split(500)):
        total += (x.float() - y.float()).square().sum().item()
    return math.sqrt(total / a.numel()) / 255


def floor_of(measure: PictureMeasure, data: Latents, n: int, generator: torch.Generator) -> tuple[dict, Tensor]:
    """What n real pictures reach, five times: {measure: (mean, deviation)}; and the first n of them."""
    draws = []
    for _ in range(5):
        order = torch.randperm(len(data.train), generator=generator)
        draws.append(data.train[order[:n]].sort().values)
    found = [measure(*data.originals(some)) for some in draws]
    floor = {}
    for name in found[0]:
        values = [row[name] for row in found]
        floor[name] = (float(np.mean(values)), float(np.std(values, ddof=1)))
    return floor, draws[0]


def report(metrics: dict) -> str:
    """The measures of a run as a Markdown table."""
    floor = metrics["floor"]
    names = ["layout", "texture", "coverage", "gap", "novelty"]
    if "fid" in metrics["rows"][-1]:
        names.append("fid")
    shown = ", ".join(f"{name} {mean:.4f} ± {sd:.4f}" for name, (mean, sd) in floor.items())
    lines = [
        f"{metrics['samples']} samples against {metrics['held_out']} held-out pictures, seed {metrics['seed']}; "
        f"{metrics['machine']}. Fréchet distances less the floor that as many real ones set: {shown}.",
        "",
        f"| network | evaluations | {' | '.join(names)} |",
        "|---" * (2 + len(names)) + "|",
    ]
    for row in metrics["rows"]:
        cells = [row["who"], str(row.get("nfe", ""))]
        for name in names:
            value = row.get(name)
            if value is None:
                cells.append("")
                continue
            if name in ("layout", "texture"):
                value -= floor[name][0]
            cells.append(f"{value:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def fidelity() -> Callable:
    """The function of torch-fidelity that computes FID. Raises ValueError if the package is not installed."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise ValueError("--fid needs a package: pip install torch-fidelity") from None
    return calculate_metrics


class Originals(torch.utils.data.Dataset):
    """The pictures uint8 (3,size,size) of these names, each read when it is asked for."""

    def __init__(self, images, names: list[str], size: int):
        self.pictures = Pictures(images)
        self.names = names
        self.size = size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Tensor:
        picture = self.pictures.read(self.names[i], self.size)
        require(not isinstance(picture, str), f"{self.names[i]} in {self.pictures.path} {picture}")
        return picture


FID_SAMPLES = 30000  # a covariance of 2048 features from fewer samples is too far off, and FID too high


def inception_fid(pictures: Tensor, data: Latents, images: str) -> float:
    """FID of uint8 pictures to all training pictures, by torch-fidelity (InceptionV3 at 299 px, its own resize)."""
    names = [data.meta["sources"][i] for i in data.train.tolist()]
    theirs = Originals(images, names, data.meta["size"])
    ours = torch.utils.data.Subset(pictures, range(len(pictures)))
    metrics = fidelity()(input1=ours, input2=theirs, fid=True, verbose=False)
    return metrics["frechet_inception_distance"]


# ═══ 10. The demo ═════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Demo(Folder):
    """Faces that the program draws, from pictures to a one-step generator; a CPU will do."""

    drawings: int = 20000  # drawings, a tenth of which is held out
    seed: int = 0  # seed of the networks (the drawings are always the same)
    count: int = 5000  # samples that are measured
    teacher_steps: int = 6000  # updates of the teacher
    student_steps: int = 3600  # updates of the student
    out: str = "runs/demo"  # run folder; the latents go beside it, into OUT-latents

    def __post_init__(self):
        super().__post_init__()
        held_out = self.drawings // 10
        require(held_out >= 200, f"{self.drawings} drawings are too few to measure with: give 2,000 or more")
        enough = self.count <= self.drawings - held_out
        require(enough, f"--count {self.count} needs as many drawings that are trained on; a tenth is held out")


def draw_batch(names: list[str]) -> list[Tensor]:
    """Drawings uint8 (3,64,64) by their numbers; the first number of a batch seeds it."""
    generator = torch.Generator().manual_seed(int(names[0]))
    numbers = torch.randn(len(names), len(TRAITS), generator=generator)
    parts = []
    for some in numbers.split(50):  # few at a time, as fast memory holds them
        parts.append((255 * draw_faces(some, 64)).round().byte())
    return list(torch.cat(parts))


def demo_command(argv: list[str]) -> None:
    """The whole pipeline on drawn faces: latents, teacher, student, sheet of samples, measures."""
    clock = time.perf_counter()
    (given,) = cli(argv, demo_command.__doc__, Demo())
    demo = Demo(**given)
    latents = f"{demo.out}-latents"
    require_room(demo, Path(demo.out), RUN)
    how = dict(device=choose_device(demo.device), resume=demo.resume, overwrite=demo.overwrite, quiet=demo.quiet)
    # All settings are made, and so checked, before the first minute is spent.
    encoding = Encode(**how, size=64, batch=500, out=latents)
    measuring = Evaluate(device=how["device"], out=demo.out, seed=demo.seed, count=demo.count)
    schedule = scflow.rescale(SCHEDULES["demo"], demo.student_steps)
    settings = replace(TEACHERS["demo"], teacher_steps=demo.teacher_steps)
    if not Path(demo.out).exists():  # it was stopped while it encoded
        how["resume"] = False
    teaching = Teach(**how, latents=latents, out=demo.out, seed=demo.seed, network="demo")
    distilling = Distill(**how, out=demo.out, seed=demo.seed, preset="demo")

    names = [str(i) for i in range(demo.drawings)]
    write_latents(PicturePCA(64, 96), names, draw_batch, encoding, {"drawings": demo.drawings})
    teach(teaching, settings)
    distil(distilling, schedule)
    evaluate(measuring)
    print("How to read it: layout and texture are distances to held-out drawings, best at 0, where new drawings are.")
    print("The student's one step should be as near as its teacher's 50, and cover as much.")
    print(f"{time.perf_counter() - clock:.0f} s; the samples, one noise a row: {Path(demo.out, 'student.png')}")


COMMANDS = {
    "demo": demo_command,
    "encode": encode_command,
    "teacher": teacher_command,
    "distill": distill_command,
    "sample": sample_command,
    "evaluate": evaluate_command,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command, with the errors and exit codes of toy_2d.py."""
    return toy_2d.main(argv, COMMANDS, None, "celeba_latent.py")


if __name__ == "__main__":
    sys.exit(main())
