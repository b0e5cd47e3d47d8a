"""Faces: from a folder of pictures to a generator that needs one step.

    python celeba_latent.py demo                                     drawn faces: no download, a CPU, minutes
    python celeba_latent.py encode --images DIR_OR_ZIP               pictures → latents/
    python celeba_latent.py teacher --latents latents --out runs/faces
    python celeba_latent.py distill --out runs/faces                 (finds the teacher and the latents there)
    python celeba_latent.py sample --out runs/faces --steps 1 2 4
    python celeba_latent.py evaluate --out runs/faces
    python celeba_latent.py bench                                    our step against a naive one

The method, the networks and the training loops are those of `scflow.py`; this script adds the pictures, the
autoencoder, sizes, speed and measures. A latents folder holds latents.npy (float16, as encoded), meta.pt (what
decodes them, their statistics, the sources), and for the measures thumbs.npy and features.npy of the originals.
A run folder holds config.json, teacher.pt, student.pt, log.csv, metrics.json and sheets of samples.
"""

import hashlib
import io
import json
import math
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

import scflow
import toy_2d
from scflow import Phase, TeacherSettings, option, require
from toy_2d import Stopped, cli, open_folder, read_json, write_text

# ═══ 1. Drawn faces ═════════════════════════════════════════════════════════════════════════
# A world of pictures without a download: every face comes from 34 numbers, uniform in [0,1), so that no two are
# alike and none can be memorised.

TRAITS = 34


def ellipse(x, y, cx, cy, rx, ry, edge):
    """How much of each pixel (B,S,S) an ellipse covers: 1 inside, 0 outside, with an `edge` wide ramp between."""
    radius = (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2).sqrt()
    return (0.5 - (radius - 1) * torch.minimum(rx, ry) / edge).clamp(0, 1)


def colour(hue, saturation, value):
    """HSV (B,1,1), each in [0,1], as RGB (B,3,1,1)."""
    k = (torch.tensor([5.0, 3.0, 1.0])[:, None, None] + 6 * hue[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def draw_faces(traits, size=32):
    """Faces drawn from numbers in [0,1), (B,34) → RGB (B,3,size,size) in [0,1], painted from back to front."""
    numbers = iter(traits.T[..., None, None])  # each (B,1,1)

    def between(low, high):
        return low + (high - low) * next(numbers)

    def paint(mask, rgb):
        nonlocal picture
        picture = picture + mask[:, None] * (rgb - picture)

    side = (torch.arange(size) + 0.5) / size * 2 - 1
    across, down = side[None, None, :], side[None, :, None]
    hue, saturation, value, angle = between(0, 1), between(0.1, 0.4), between(0.5, 0.95), between(0, 2 * math.pi)
    picture = colour(hue, saturation, value) * (1 + 0.25 * (across * angle.cos() + down * angle.sin()))[:, None]

    # Pose: everything that follows lives in the head's own coordinates.
    scale, dx, dy, tilt = between(1.12, 1.36), between(-0.1, 0.1), between(-0.08, 0.1), between(-0.22, 0.22)
    turn = 0.13 * between(-1, 1)
    u, v = (across - dx) / scale, (down - dy) / scale
    x, y = tilt.cos() * u + tilt.sin() * v, tilt.cos() * v - tilt.sin() * u
    zero, edge = torch.zeros_like(hue), 3.2 / size / scale

    tone, warm = between(0, 1), between(-0.04, 0.04)
    skin = torch.stack([0.95 - 0.55 * tone, 0.80 - 0.55 * tone, 0.68 - 0.52 * tone + warm], 1)
    hue, value, length = between(0.02, 0.13), between(0.1, 0.85), between(0, 1)
    hair = colour(hue, 0.75 - 0.35 * value, value)
    top, wide, fringe, parting = between(0, 0.14), between(0.04, 0.16), between(0.36, 0.62), between(-0.17, 0.17)
    rx, ry = between(0.40, 0.50), between(0.54, 0.64)

    shirt = colour(between(0, 1), zero + 0.5, between(0.25, 0.9))
    paint(ellipse(across, down, dx, 1.25 + dy, zero + 0.85, zero + 0.5, edge), shirt)
    crown = ellipse(x, y, zero, zero - 0.12, rx + wide, ry + top, edge)
    paint(crown, hair)
    falls = ellipse(x, y, zero, 0.1 + 0.45 * length, rx + wide + 0.05 * length, 0.25 + 0.45 * length, edge)
    paint(falls * (4 * length - 0.6).clamp(0, 1), hair)
    paint(ellipse(x, y, zero, zero + 0.62, zero + 0.2, zero + 0.4, edge), 0.82 * skin)  # neck
    light = between(-0.32, 0.32)
    paint(ellipse(x, y, zero, zero, rx, ry, edge), skin * (1 + light * x - 0.1 * y)[:, None])  # head
    hairline = parting * x + 0.5 * x**2 - 1.15 * fringe * ry
    paint(crown * (0.5 + (hairline - y) / edge).clamp(0, 1), 0.92 * hair)

    gap, eye, lid, hue = between(0.18, 0.22), between(0.095, 0.125), between(0.6, 0.95), between(0.05, 0.62)
    look, slant, brow = between(-0.03, 0.03), between(-0.3, 0.3), between(0.025, 0.05)
    for side in (-1, 1):
        cx, cy = turn + side * gap, zero - 0.08
        white = ellipse(x, y, cx, cy, 1.25 * eye, lid * eye, edge)
        paint(white, torch.full_like(skin, 0.96))
        paint(white * ellipse(x, y, cx + look, cy, 0.62 * eye, 0.62 * eye, edge), colour(hue, zero + 0.55, zero + 0.38))
        paint(ellipse(x, y, cx, cy - 0.19 + side * slant * (x - cx), 1.5 * eye, brow, edge), 0.6 * hair)
    paint(0.55 * ellipse(x, y, 1.35 * turn, zero + 0.1, zero + 0.045, zero + 0.13, edge), 0.72 * skin)  # nose
    smile, width, lips, red = between(-0.6, 1.2), between(0.14, 0.22), between(0.035, 0.085), between(0, 1)
    bend = 0.33 + 0.9 * smile * (0.02 - (x - turn) ** 2)
    rouge = torch.stack([0.55 + 0.3 * red, 0.18 + 0.15 * red, 0.2 + 0.17 * red], 1) * (1 - 0.35 * tone)[:, None]
    paint(ellipse(x, y - bend, turn, zero, width, lips, edge), rouge)
    return picture.clamp(0, 1)


# ═══ 2. Autoencoders ════════════════════════════════════════════════════════════════════════
# All have encode(pictures (B,3,S,S) in [0,1]) → latents (B,C,h,w), decode(latents) → pictures, and `factor` = S/h.


class PatchPCA(nn.Module):
    """Principal components of square patches: closed form, fitted in seconds, and blurred where they stop."""

    def __init__(self, factor=8, channels=32):
        super().__init__()
        require(0 < channels <= 3 * factor**2, f"patches of {factor} pixels have at most {3 * factor**2} components")
        self.arch, self.factor = dict(name="PatchPCA", factor=factor, channels=channels), factor
        self.register_buffer("mean", torch.zeros(3 * factor**2))
        self.register_buffer("basis", torch.eye(3 * factor**2, channels))

    def fit(self, pictures):
        """Set mean and basis from pictures (N,3,S,S); returns the share of the variance that is kept."""
        patches = scflow.patchify(pictures, self.factor).flatten(0, 1)  # (N·h·w, 3·factor²)
        self.mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))  # ascending
        self.basis = vectors.flip(1)[:, : self.basis.shape[1]].contiguous()
        return (values.flip(0)[: self.basis.shape[1]].sum() / values.sum()).item()

    def encode(self, pictures):
        """(B,3,S,S) → (B,channels,S/factor,S/factor)."""
        h = pictures.shape[-2] // self.factor
        return rearrange((scflow.patchify(pictures, self.factor) - self.mean) @ self.basis, "b (h w) c -> b c h w", h=h)

    def decode(self, latents):
        """(B,channels,h,w) → (B,3,h·factor,w·factor)."""
        tokens = rearrange(latents, "b c h w -> b (h w) c") @ self.basis.T + self.mean
        h, w = (self.factor * side for side in latents.shape[-2:])
        return scflow.unpatchify(tokens, self.factor, h, w).clamp(0, 1)


class Pixels(nn.Module):
    """No autoencoder: the latents are the pixels, in [−1,1]."""

    factor = 1

    def __init__(self):
        super().__init__()
        self.arch = dict(name="Pixels")

    def encode(self, pictures):
        """[0,1] → [−1,1]."""
        return 2 * pictures - 1

    def decode(self, latents):
        """[−1,1] → [0,1]."""
        return ((latents + 1) / 2).clamp(0, 1)


class TinyBlock(nn.Module):
    """Three 3×3 convolutions beside the identity; `pool` adds the context of FLUX.2's variant before them."""

    def __init__(self, pool=False, width=64):
        super().__init__()
        layers = [m for _ in range(3) for m in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
        self.conv, self.pool = nn.Sequential(*layers[:-1]), None
        if pool:
            wide = nn.Conv2d(width, 4 * width, 1, bias=False)
            narrow = nn.Conv2d(4 * width, width, 1, bias=False)
            self.pool = nn.Sequential(wide, nn.GroupNorm(4, 4 * width), nn.ReLU(), narrow)

    def forward(self, x):
        """(B,width,H,W) → the same shape."""
        x = x if self.pool is None else x + self.pool(x)
        return F.relu(x + self.conv(x))


class Clamp(nn.Module):
    """Soft limit of the latents to (−3,3)."""

    def forward(self, x):
        """Any shape."""
        return 3 * torch.tanh(x / 3)


class TinyAutoencoder(nn.Module):
    """The TAESD family (github.com/madebyollin/taesd): taesd, taesdxl, taesd3, taef1 and, with `pool`, taef2."""

    factor = 8

    def __init__(self, channels=4, pool=False, width=64):
        super().__init__()
        self.arch = dict(name="TinyAutoencoder", channels=channels, pool=pool, width=width)
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        down, up = [conv(3, width), TinyBlock(width=width)], [Clamp(), conv(channels, width), nn.ReLU()]
        for level in range(3):
            blocks = [TinyBlock(pool and level == 2, width) for _ in range(3)]
            down += [conv(width, width, stride=2, bias=False), *blocks]
        for level in range(3):
            blocks = [TinyBlock(pool and level == 0, width) for _ in range(3)]
            up += [*blocks, nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
        self.encoder = nn.Sequential(*down, conv(width, channels))
        self.decoder = nn.Sequential(*up, TinyBlock(width=width), conv(width, 3))

    @classmethod
    def read(cls, prefix):
        """The pair PREFIX_encoder.pth and PREFIX_decoder.pth. Raises ValueError if they are not of the family."""
        parts = []
        for half in ("encoder", "decoder"):
            path = f"{prefix}_{half}.pth"
            require(os.path.isfile(path), f"no file {path}: --autoencoder PREFIX needs PREFIX_encoder.pth and …_decoder.pth")
            try:
                parts.append(torch.load(path, map_location="cpu", weights_only=True))
                channels, width = parts[0]["14.weight"].shape[:2]
            except Exception:  # on foreign bytes the unpickler raises nearly anything
                raise ValueError(f"{path} is damaged, or not a tiny autoencoder of the TAESD family") from None
        net = cls(channels, any(".pool." in name for name in parts[0]), width)
        try:
            net.encoder.load_state_dict(parts[0])
            net.decoder.load_state_dict(parts[1])
        except RuntimeError:
            raise ValueError(f"{prefix}_encoder.pth and …_decoder.pth are not a pair of the TAESD family") from None
        return net

    def encode(self, pictures):
        """(B,3,S,S) → (B,channels,S/8,S/8)."""
        return self.encoder(pictures)

    def decode(self, latents):
        """(B,channels,h,w) → (B,3,8h,8w)."""
        return self.decoder(latents).clamp(0, 1)


class Diffusers(nn.Module):
    """An AutoencoderKL or AutoencoderTiny of the diffusers library, by hub name or folder.

    Its usual scale (0.18215 for the paper's sd-vae-ft-mse) is left out: latents are normalised by their statistics.
    """

    def __init__(self, source):
        super().__init__()
        try:
            import diffusers
        except ImportError:
            raise ValueError(f"--autoencoder {source} needs a package: pip install 'diffusers>=0.30'") from None
        self.arch = dict(name="Diffusers", source=str(source))
        try:
            kind = diffusers.AutoencoderKL.load_config(source).get("_class_name")
            require(kind in ("AutoencoderKL", "AutoencoderTiny"), f"{source} holds a {kind}, not an AutoencoderKL or …Tiny")
            self.vae = getattr(diffusers, kind).from_pretrained(source)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"no autoencoder {source}, here or on the hub: {str(error).splitlines()[0]}") from None
        self.factor = 64 // self.encode(torch.zeros(1, 3, 64, 64)).shape[-1]

    def state_dict(self, *args, **kwargs):
        """Empty: a checkpoint names the source, and does not carry a copy of a third of a gigabyte."""
        return {}

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Nothing to do: the weights were read from the source."""

    @torch.no_grad()  # it is used, not trained
    def encode(self, pictures):
        """(B,3,S,S) → (B,C,h,w), the mode of the posterior."""
        out = self.vae.encode(2 * pictures - 1)
        return out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents

    def decode(self, latents):
        """(B,C,h,w) → (B,3,S,S)."""
        return ((self.vae.decode(latents).sample + 1) / 2).clamp(0, 1)


scflow.NETWORKS |= {c.__name__: c for c in (PatchPCA, Pixels, TinyAutoencoder, Diffusers)}  # for scflow.load


def autoencoder(name, size, channels):
    """The autoencoder that `--autoencoder` names: pca, none, the prefix of a TAESD pair, or a diffusers source."""
    if name == "pca":
        net = PatchPCA(channels=channels)
    elif name == "none":
        net = Pixels()
    else:
        tiny = any(os.path.exists(f"{name}_{half}.pth") for half in ("encoder", "decoder"))
        net = TinyAutoencoder.read(name) if tiny else Diffusers(name)
    require(size % net.factor == 0, f"--size {size} must be a multiple of {net.factor} for this autoencoder")
    return net.eval().requires_grad_(False)


# ═══ 3. What is measured of a picture ═══════════════════════════════════════════════════════
# Two spaces, fixed in advance and without a download: layout is seen by 64 principal components of the picture at
# 32×32, texture by the responses of three random convolutions at full size.


def features(pictures):
    """uint8 pictures (B,3,S,S) → thumbnails uint8 (B,3,32,32), and mean and deviation of 96 random filters (B,192)."""
    x, filters = pictures.float() / 255, torch.Generator().manual_seed(0)
    thumbs, h, out = F.adaptive_avg_pool2d(x, 32), 2 * x - 1, []
    for channels, side, stride in ((3, 5, 1), (32, 3, 2), (32, 3, 2)):
        weight = torch.randn(32, channels, side, side, generator=filters) * math.sqrt(2 / (channels * side**2))
        h = F.relu(F.conv2d(h, weight.to(h), stride=stride, padding=side // 2))
        out += [h.mean((2, 3)), h.std((2, 3))]
    return (255 * thumbs).round().byte().cpu(), torch.cat(out, 1).cpu()


class Spaces:
    """The two feature spaces of a reference set, given its (thumbs, features): called on another set's, {name: (N,d)}."""

    def __init__(self, thumbs, textures, components=64):
        flat = thumbs.flatten(1).float() / 255
        self.mean = flat.mean(0)
        self.basis = torch.linalg.eigh(torch.cov(flat.T))[1][:, -components:]  # of the largest eigenvalues
        self.reference = self(thumbs, textures)

    def __call__(self, thumbs, textures):
        """Thumbnails (N,3,32,32) and textures (N,192) in both spaces."""
        return {"layout": (thumbs.flatten(1).float() / 255 - self.mean) @ self.basis, "texture": textures}

    def measure(self, thumbs, textures):
        """Fréchet distance in both spaces, and the share of the reference that is covered."""
        ours = self(thumbs, textures)
        row = {name: scflow.frechet_distance(ours[name], self.reference[name]) for name in ours}
        return row | {"coverage": scflow.knn_coverage(self.reference["layout"], ours["layout"])}


# ═══ 4. Latents ═════════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Encode:
    """Which pictures become latents, and how."""

    images: str = option("", "folder (searched through) or zip of jpg, png or webp pictures")
    autoencoder: str = option("pca", "pca, none (pixels), the prefix of a TAESD pair, or a diffusers name or folder")
    size: int = option(128, "side of the square pictures: cut out of the centre, resized")
    channels: int = option(32, "principal components of a patch of 8×8 pixels (pca only)")
    flips: bool = option(False, "encode the mirror image of every picture too")
    limit: int = option(0, "take only so many pictures, evenly spaced; 0 takes all")
    batch: int = option(256, "pictures encoded at a time")
    device: str = option("", "cpu, cuda or mps [the best there is]")
    out: str = option("latents", "latents folder")
    resume: bool = option(False, "go on with an interrupted run (give the same command)")
    overwrite: bool = option(False, "start afresh in a folder that exists")
    quiet: bool = option(False, "no progress bar")


class Pictures:
    """The pictures of a folder or a zip, by name."""

    def __init__(self, path):
        self.path, kinds = Path(path), (".jpg", ".jpeg", ".png", ".webp")
        require(path and self.path.exists(), f"no pictures at {path or 'nowhere'}: give --images a folder or a zip")
        self.zip = None
        if self.path.is_file():
            require(zipfile.is_zipfile(path), f"{path} is neither a folder nor a zip")
            self.zip = zipfile.ZipFile(path)
        every = self.zip.namelist() if self.zip else [str(p.relative_to(path)) for p in self.path.rglob("*")]
        self.names = sorted(n for n in every if n.lower().endswith(kinds) and not Path(n).name.startswith("."))
        require(self.names, f"{path} holds no {', '.join(kinds)} pictures")

    def read(self, name, size):
        """One picture, uint8 (3,size,size): the central square, antialiased; or a string that says why there is none."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.zip.read(name)) if self.zip else self.path / name) as image:
                image = image.convert("RGB")
        except Exception as error:  # broken files raise nearly anything
            return f"cannot be read ({type(error).__name__})"
        side = min(image.size)
        if side < size:
            return f"too small ({image.width}×{image.height})"
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)

    def read_all(self, names, size):
        """Several pictures, decoded by a few threads."""
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            return list(pool.map(partial(self.read, size=size), names))


def encode_command(argv):
    """Turn pictures into a latents folder."""
    settings = Encode(**cli(argv, encode_command.__doc__, Encode)[0])
    require(settings.size >= 8 and settings.batch > 0, "--size must be at least 8, and --batch positive")
    device, pictures = best_device(settings.device), Pictures(settings.images)
    stride = max(1, len(pictures.names) // settings.limit) if settings.limit else 1
    names = pictures.names[::stride][: settings.limit or None]
    net = autoencoder(settings.autoencoder, settings.size, settings.channels)
    given = {k: getattr(settings, k) for k in ("images", "autoencoder", "size", "channels", "flips", "limit")}
    folder = open_folder(settings.out, "latents", settings.resume, settings.overwrite, given)
    read = partial(pictures.read_all, size=settings.size)
    try:
        meta = write_latents(folder, net, names, read, settings.size, settings.flips, settings.batch, device, settings.quiet)
    except KeyboardInterrupt:
        raise Stopped(f"stopped and saved in {folder}; the same command with --resume goes on") from None
    print(f"{folder}: {len(meta['sources'])} pictures as latents {tuple(meta['shape'])}, {len(meta['skipped'])} skipped")
    for name, reason in meta["skipped"][:10]:
        print(f"  skipped {name}: {reason}")


@torch.no_grad()  # nothing is trained here
def write_latents(folder, net, names, read, size, flips=False, batch=256, device="cpu", quiet=False):
    """Encode the pictures `read(names) -> [uint8 (3,size,size) or reason]`, going on where meta.pt says; returns meta."""
    path = folder / "meta.pt"
    if path.exists():
        meta = {k: v for k, v in scflow.read(path).items() if k not in ("format", "arch", "weights")}
        net = scflow.load(path)
    else:
        meta = dict(size=size, flips=flips, done=0, sources=[], skipped=[], complete=False)
        if isinstance(net, PatchPCA):
            some = [x for x in read(names[:: max(1, len(names) // 4096)]) if not isinstance(x, str)]
            require(some, f"none of the pictures can be used: {names[0]} {read(names[:1])[0]}" if not some else "")
            kept = net.fit(torch.stack(some).float() / 255)
            print(f"{net.basis.shape[1]} components of a patch keep {kept:.1%} of the variance")
    net.to(device, memory_format=torch.channels_last)  # convolutions are a quarter faster so, on a CPU too
    meta["shape"] = shape = list(net.encode(torch.zeros(1, 3, size, size, device=device)).shape[1:])
    copies, mode = 1 + flips, "r+" if meta["done"] else "w+"
    latents, thumbs, textures = (
        np.lib.format.open_memmap(folder / f"{name}.npy", mode, kind, (rows, *dims))
        for name, kind, rows, dims in (
            ("latents", np.float16, copies * len(names), shape),
            ("thumbs", np.uint8, len(names), (3, 32, 32)),
            ("features", np.float32, len(names), (192,)),
        )
    )
    with tqdm(total=len(names), initial=meta["done"], desc="encode", unit="picture", disable=quiet) as bar:
        while meta["done"] < len(names) and not meta["complete"]:
            chunk, start = names[meta["done"] : meta["done"] + batch], len(meta["sources"])
            found = list(zip(chunk, read(chunk)))
            good = [(name, x) for name, x in found if not isinstance(x, str)]
            if good:
                x = torch.stack([x for _, x in good]).to(device)
                both = torch.stack([x, x.flip(3)][:copies], 1).flatten(0, 1)  # (copies·n,3,S,S): mirrored beside it
                z = net.encode(both.float() / 255).cpu()
                require(z.isfinite().all(), f"the autoencoder gave values that are not finite near {good[0][0]}")
                end = start + len(good)
                latents[copies * start : copies * end] = z.numpy()
                thumbs[start:end], textures[start:end] = (part.numpy() for part in features(x))
                for array in (latents, thumbs, textures):
                    array.flush()  # on the disk before meta.pt counts it
            meta["sources"] += [name for name, _ in good]
            meta["skipped"] += [(name, x) for name, x in found if isinstance(x, str)]
            meta["done"] += len(chunk)
            bar.update(len(chunk))
            scflow.save(path, net.cpu(), **meta)
            net.to(device)
    few = f"only {len(meta['sources'])} of {len(names)} pictures could be used"
    require(len(meta["sources"]) >= 20, few + "".join(f"; {n} {why}" for n, why in meta["skipped"][:1]))
    if not meta["complete"]:
        rows = torch.from_numpy(latents[: copies * len(meta["sources"])])
        sums = [torch.stack([(p := part.double()).sum((0, 2, 3)), (p**2).sum((0, 2, 3))]) for part in rows.split(1024)]
        mean, square = sum(sums) / (len(rows) * shape[1] * shape[2])
        std = (square - mean**2).sqrt()
        require((std > 0).all(), "a channel of the latents is constant: use fewer --channels, or other pictures")
        meta |= dict(mean=mean.float()[:, None, None], std=std.float()[:, None, None], complete=True)
        scflow.save(path, net.cpu(), **meta)
    return meta


class Codec:
    """What turns normalised latents back into pictures: an autoencoder and the statistics, as kept in checkpoints."""

    def __init__(self, content, device="cpu"):
        self.content = content
        net = scflow.build(content["arch"])
        net.load_state_dict(content["weights"])
        self.net, self.device = net.to(device).eval().requires_grad_(False), device
        self.mean, self.std = content["mean"].to(device), content["std"].to(device)

    @property
    def hash(self):
        """A fingerprint: two codecs with the same one decode alike."""
        parts = [self.content["mean"], self.content["std"], *self.content["weights"].values()]
        digest = hashlib.sha256(json.dumps(self.content["arch"]).encode())
        for part in parts:
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()  # nothing is trained here
    def decode(self, latents, batch=128):
        """Normalised latents (N,C,h,w) → uint8 pictures (N,3,S,S) on the CPU, in batches."""
        parts = (self.net.decode(z.to(self.device) * self.std + self.mean) for z in latents.split(batch))
        return torch.cat([(255 * x).round().byte().cpu() for x in parts])


class Latents:
    """A finished latents folder; a fixed tenth of its pictures is held out, and never trained on."""

    def __init__(self, folder):
        self.folder, path = Path(folder), Path(folder, "meta.pt")
        require(path.is_file(), f"{folder} is not a latents folder (it holds no meta.pt): run encode")
        meta = scflow.read(path)
        require(meta.get("complete"), f"{folder} is unfinished: give the same encode command with --resume")
        self.shape, self.sources = tuple(meta["shape"]), meta["sources"]
        self.copies, count = 1 + meta["flips"], len(meta["sources"])
        self.codec = {k: meta[k] for k in ("arch", "weights", "mean", "std", "size")}
        arrays = []
        for name, dims in (("latents", self.shape), ("thumbs", (3, 32, 32)), ("features", (192,))):
            rows = count * (self.copies if name == "latents" else 1)
            try:
                array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            except (OSError, ValueError, EOFError):
                raise ValueError(f"{self.folder / name}.npy is missing or damaged: run encode again") from None
            good = array.shape[1:] == dims and len(array) >= rows
            require(good, f"{name}.npy has shape {array.shape}, and meta.pt says {(rows, *dims)}: run encode again")
            arrays.append(array[:rows])
        self.z, self.thumbs, self.features = arrays
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        self.held_out, self.train = order[: count // 10].sort().values, order[count // 10 :].sort().values

    def normalised(self, which, device="cpu"):
        """The latents of the pictures `which` (N,), mirror images included, as float32 (copies·N,C,h,w)."""
        rows = (self.copies * which[:, None] + torch.arange(self.copies)).flatten()
        z = torch.from_numpy(self.z[rows.numpy()]).to(device).float()
        require(z.isfinite().all(), f"{self.folder}/latents.npy holds values that are not finite: run encode again")
        z = (z - self.codec["mean"].to(device)) / self.codec["std"].to(device)
        std = z.std().item()
        require(0.8 < std < 1.25, f"normalised latents have a deviation of {std:.2f}, not 1: run encode again")
        return z

    def measured(self, which):
        """Thumbnails (N,3,32,32) and features (N,192) of the original pictures."""
        return torch.from_numpy(self.thumbs[which.numpy()]), torch.from_numpy(self.features[which.numpy()])


# ═══ 5. Settings ════════════════════════════════════════════════════════════════════════════

# Networks by size, and what trains a teacher of that size; 2.9, 33 and 130 million parameters.
SIZES = {
    "small": (dict(dim=192, depth=4, heads=4), dict(teacher_steps=3000, teacher_batch=64, teacher_lr=1e-3)),
    "S": (dict(dim=384, depth=12, heads=6), dict(teacher_steps=20000, teacher_batch=256, teacher_lr=5e-4)),
    "B": (dict(dim=768, depth=12, heads=12), dict(teacher_steps=40000, teacher_batch=256, teacher_lr=2e-4)),
}

SCHEDULES = {
    # The reference's settings for CelebA-HQ 256: a batch of 32 a GPU, 200 epochs of 27,000 pictures.
    "paper": (
        Phase(
            steps=168750,
            batch=32,
            lr=2e-5,
            lr_disc=1e-4,
            warmup_self=1000,
            warmup_bi=1000,
            adversarial="softplus",
            r1=1.0,
        ),
    ),
    # This project's: distil first, straighten last (see scflow.SCHEDULES).
    "two_phase": (
        Phase(steps=1600, batch=32, lr=1e-3, lr_disc=2e-4, lambda_self=0.0, lambda_bi=0.0, tau=0.0, r1=0.3),
        replace(scflow.SCHEDULES["two_phase"][1], steps=500, batch=64, lr=5e-4, lr_disc=2e-4),
    ),
}


@dataclass(frozen=True)
class Run:
    """What is trained, how fast, and where it goes."""

    latents: str = option("", "latents folder (distill takes the teacher's)")
    out: str = option("runs/faces", "run folder")
    size: str = option("small", "network", choices=tuple(SIZES))
    patch: int = option(2, "side of the DiT's patches, in latents")
    preset: str = option("two_phase", "schedule of the losses", choices=tuple(SCHEDULES))
    seed: int = option(0, "seed of weights, data and noise")
    device: str = option("", "cpu, cuda or mps [the best there is]")
    precision: str = option("auto", "of the networks' passes; auto: bf16 on CUDA", choices=("auto", "fp32", "bf16"))
    compiled: str = option("auto", "torch.compile; auto: on CUDA", choices=("auto", "yes", "no"))
    save_every: int = option(1000, "updates between checkpoints")
    sheet_every: int = option(2000, "updates between sheets of samples")
    resume: bool = option(False, "go on with an interrupted run (give the same command)")
    overwrite: bool = option(False, "start afresh in a folder that exists")
    quiet: bool = option(False, "no progress bar and no estimate")

    def __post_init__(self):
        for name in ("patch", "save_every", "sheet_every"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require(not (self.resume and self.overwrite), "--resume and --overwrite contradict each other")
        object.__setattr__(self, "device", best_device(self.device))


def best_device(name=""):
    """The device called `name`, or without one the best there is. Raises ValueError if it is not to be had."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.Generator(name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"no device {name!r} here: use --device cpu") from None
    return name


# ═══ 6. Speed ═══════════════════════════════════════════════════════════════════════════════


def prepare(net, run):
    """Make a network fast on its device: bf16 passes, channels last for convolutions, compiled. Weights stay fp32."""
    cuda = run.device.startswith("cuda")
    torch.set_float32_matmul_precision("high" if cuda else "highest")  # TF32 for what is left in fp32
    net.to(run.device)
    if run.precision == "bf16" or (run.precision == "auto" and cuda):
        net.precision = torch.bfloat16
    if cuda and isinstance(net, scflow.LatentDiscriminator):
        net.to(memory_format=torch.channels_last)
    return net


def compiled(net, run):
    """Compile the network in place, if the run asks for it: its weights keep their names."""
    if run.compiled == "yes" or (run.compiled == "auto" and run.device.startswith("cuda")):
        net.compile()


def step_flops(net, disc, phase, step):
    """FLOPs per image of one update of the student: a backward pass costs two forward passes."""
    w, pinned = phase.weights(step), phase.pinned(1000) / 1000
    terms, own = (w["consistency"] > 0) + (w["bi"] > 0), phase.self_source == "student"
    shared = w["adv"] > 0 and w["self"] > 0 and not own and pinned > 0
    one_step = 0 if shared else 3 if w["adv"] > 0 else w["self"] > 0 and own
    rows = (1 + terms + 3) * (terms > 0) + one_step + (w["self"] > 0) * (3 + (not own))
    judged = (w["adv"] > 0) * (pinned if shared else 1)  # by the critic: 2 forward and back to x̂₀, then 6 to learn
    return rows * net.flops() + judged * (2 + 6) * disc.flops()


def matmul_rate(device, dtype, side=None, seconds=0.3):
    """FLOP/s of a square matrix product, the most that a network's passes can hope for."""
    side = side or (8192 if device.startswith("cuda") else 1024)
    a = torch.randn(side, side, device=device, dtype=dtype)
    (a @ a).sum().item()
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or count == 0:
        (a @ a).flatten()[0].item()  # waits for the device
        count += 1
    return 2 * side**3 * count / spent


class Log:
    """The past of a run: every tenth update's losses and speed, and sheets of samples on the way.

    work    step → (images, FLOPs) of an update.
    sheet   called with the stage and the State now and then.
    """

    def __init__(self, run, rows, work, sheet):
        self.rows, self.frames, self.run, self.work, self.sheet, self.clock = rows, [], run, work, sheet, None
        self.rate = matmul_rate(run.device, torch.bfloat16 if run.device.startswith("cuda") else torch.float32)

    def note(self, stage, state, total):
        """Record a State of the teacher or the student."""
        if state.step % 10 == 1:
            now, speed = time.perf_counter(), {}
            if self.clock:
                images, flops = self.work(state.step - 1)
                rate = (state.step - self.clock[1]) / (now - self.clock[0])  # updates a second
                speed = dict(images_per_s=images * rate, mfu=flops * rate / self.rate)
            if self.run.device.startswith("cuda"):
                speed["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            self.rows.append({"stage": stage, "step": state.step, **state.losses, **speed})
            self.clock = (now, state.step)
        if state.step % self.run.sheet_every == 0 or state.step == total:
            self.sheet(stage, state)
            self.clock = None  # drawing is not training


# ═══ 7. Teacher and student ═════════════════════════════════════════════════════════════════


def generate(net, noise, steps, codec, solver="euler", batch=250):
    """Noise (N,C,h,w) → (normalised latents, uint8 pictures (N,3,S,S)), on the CPU, in batches on the codec's device."""
    parts = [scflow.sample(net, x.to(codec.device), steps, solver).cpu() for x in noise.split(batch)]
    return torch.cat(parts), codec.decode(torch.cat(parts))


def draw_sheet(path, columns):
    """A PNG whose columns {title: uint8 (n,3,S,S)} show the same noise in every row."""
    from matplotlib.figure import Figure  # no window is ever opened

    n, side = next(iter(columns.values())).shape[::2][:2]
    figure = Figure(figsize=(1.3 * len(columns), 1.16 * n + 0.3), dpi=100, layout="constrained")
    for ax, (title, pictures) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items()):
        ax.imshow(rearrange(pictures, "n c h w -> (n h) w c").numpy(), interpolation="nearest" if side < 64 else None)
        ax.set_title(title, fontsize=11)
        ax.axis("off")
    figure.savefig(path)


def estimate(run, log, steps, batch, flops, nets):
    """Print what is about to be spent, before it is."""
    if run.quiet:
        return
    count = sum(p.numel() for net in nets for p in net.parameters())
    hours = steps * batch * flops / (0.4 * log.rate) / 3600
    print(
        f"{steps} updates of {batch} latents, {flops / 1e9:.3g} GFLOP each: about {hours:.2g} h if 40% of this "
        f"device's {log.rate / 1e12:.2g} TFLOP/s are reached; {count / 1e6:.1f} M numbers kept, "
        f"{4e-9 * count:.2g} GB in memory and on disk (activations come on top: lower the batch if they do not fit)"
    )


def batches(data, device):
    """`batch(n, generator)` over the training latents, which live on the device: no loader."""
    z = data.normalised(data.train, device)
    return lambda n, generator: (z[torch.randint(len(z), (n,), generator=generator, device=z.device)], None)


def held_out(data, codec, n=8):
    """Held-out pictures as the autoencoder gives them back, uint8 (n,3,S,S)."""
    return codec.decode(data.normalised(data.held_out[:n])[:: data.copies])


def teacher_command(argv):
    """Train the rectified-flow teacher on a latents folder."""
    given, trained = cli(argv, teacher_command.__doc__, Run, TeacherSettings)
    run = Run(**given)
    dims, defaults = SIZES[run.size]
    settings, data = TeacherSettings(**{**defaults, **trained}), Latents(run.latents)
    codec = Codec(data.codec, run.device)
    torch.manual_seed(run.seed)  # initial weights
    net = prepare(scflow.DiT(data.shape, run.patch, **dims), run)
    config = dict(latents=run.latents, codec=codec.hash, size=run.size, patch=run.patch, seed=run.seed)
    folder = open_folder(run.out, "faces", run.resume, run.overwrite, config | asdict(settings))
    noise, real = torch.randn(8, *data.shape, generator=torch.Generator().manual_seed(1)), held_out(data, codec)

    def sheet(stage, state):
        columns = {f"teacher {n}": generate(state.ema, noise, n, codec)[1] for n in (1, 50)}
        draw_sheet(folder / "teacher.png", {"held out": real, **columns})

    images, flops = settings.teacher_batch, 3 * net.flops()
    log = Log(run, [], lambda step: (images, images * flops), sheet)
    estimate(run, log, settings.teacher_steps, images, flops, 4 * [net])  # weights, their average, Adam's two moments
    compiled(net, run)
    generator = torch.Generator(run.device).manual_seed(run.seed)
    start = partial(scflow.train_teacher, net, batches(data, run.device), generator, settings, None)
    guarded(folder, toy_2d.stage, "teacher", run, folder, log, net, start, settings.teacher_steps, codec=codec.content)
    print(f"{folder}/teacher.pt and teacher.png; next: celeba_latent.py distill --out {folder}")


def distill_command(argv):
    """Distil the teacher of a run folder into a student that needs one step."""
    given, changed = cli(argv, distill_command.__doc__, Run, Phase)
    run, schedule = Run(**given), toy_2d.revise(SCHEDULES[given.get("preset", Run.preset)], changed)
    folder, path = Path(run.out), Path(run.out, "teacher.pt")
    require(path.is_file(), f"no teacher in {folder}: run celeba_latent.py teacher --out {folder} first")
    content, config = toy_2d.read_run(path, "teacher"), read_json(folder / "config.json", "latents", "teacher_steps")
    done = content["state"]["step"]
    require(done == config["teacher_steps"], f"the teacher stopped at update {done}: finish it with teacher --resume")
    data, codec = Latents(run.latents or config["latents"]), Codec(content["codec"], run.device)
    same = Codec(data.codec).hash == codec.hash
    require(same, f"{data.folder} comes from another autoencoder, or other pictures, than {path}")
    plan, asked = folder / "distill.json", dict(seed=run.seed, schedule=[asdict(p) for p in schedule])
    if run.resume:
        require(plan.is_file(), f"nothing to resume: {folder} holds no distill.json")
        require(read_json(plan) == json.loads(json.dumps(asked)), f"--resume with other settings than those in {plan}")
    else:
        student = folder / "student.pt"
        require(run.overwrite or not student.exists(), f"{student} exists: give --resume to go on with it, or --overwrite")
        for old in (student, folder / "metrics.json"):
            old.unlink(missing_ok=True)
        write_text(plan, json.dumps(asked, indent=1))

    teacher = prepare(scflow.load(path), run)
    torch.manual_seed(run.seed)  # initial weights of the critic
    disc = prepare(scflow.LatentDiscriminator(data.shape), run)
    noise, real = torch.randn(8, *data.shape, generator=torch.Generator().manual_seed(1)), held_out(data, codec)
    columns = {"held out": real, **{f"teacher {n}": generate(teacher, noise, n, codec)[1] for n in (1, 50)}}

    def sheet(stage, state):
        ours = {f"student {n}": generate(state.ema, noise, n, codec)[1] for n in (1, 2, 4)}
        draw_sheet(folder / "student.png", columns | ours)

    def work(step):  # of the phase that this update belongs to
        for phase in schedule:
            if step < phase.steps:
                return phase.batch, phase.batch * step_flops(teacher, disc, phase, step)
            step -= phase.steps

    total = sum(p.steps for p in schedule)
    log = Log(run, content["journal"]["rows"], work, sheet)
    for phase in schedule:
        flops = step_flops(teacher, disc, phase, phase.steps - 1)
        estimate(run, log, phase.steps, phase.batch, flops, [*7 * [teacher], *3 * [disc]])
    loop = partial(
        scflow.distill, teacher, disc, batches(data, run.device), torch.Generator(run.device).manual_seed(run.seed + 1),
        schedule, prepare=partial(compiled, run=run),
    )  # fmt: skip
    kept = {"teacher": {"arch": teacher.arch, "weights": teacher.state_dict()}, "codec": codec.content}
    guarded(folder, toy_2d.stage, "student", run, folder, log, teacher, lambda r: loop(resume=r), total, **kept)
    print(f"{folder}/student.pt and student.png; next: celeba_latent.py evaluate --out {folder}")


def guarded(folder, train, *args, **kwargs):
    """Train; where it is stopped, diverges or does not fit, say what is kept and what to do."""
    kept = f"{folder} keeps the last checkpoint"
    try:
        return train(*args, **kwargs)
    except (Stopped, KeyboardInterrupt):
        raise Stopped(f"stopped and saved in {folder}; the same command with --resume goes on") from None
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {kept}; lower the learning rate or --lambda-adv") from None
    except torch.OutOfMemoryError:
        raise ValueError(f"out of memory; {kept}; lower --teacher-batch or --student-batch, or take a smaller --size") from None


# ═══ 8. Samples and measures ════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Sample:
    """What is sampled."""

    out: str = option("runs/faces", "run folder")
    weights: str = option("", "a teacher.pt or student.pt alone, instead of a run folder")
    who: str = option("student", "network of the run folder", choices=("student", "teacher"))
    steps: tuple = option((1,), "solver steps, one grid for each number")
    solver: str = option("euler", "sampler", choices=scflow.SOLVERS)
    count: int = option(64, "pictures")
    seed: int = option(0, "seed of the noise")
    device: str = option("", "cpu, cuda or mps [the best there is]")
    file: str = option("", "where to: a .png, or .npz for the pictures as an array [samples-STEPS.png in the folder]")


def sample_command(argv):
    """Draw samples of a run folder, or of a weights file alone, as a grid PNG or an array."""
    settings = Sample(**cli(argv, sample_command.__doc__, Sample)[0])
    require(settings.count > 0, "--count must be positive")
    require(settings.file.endswith((".png", ".npz", "")[: 2 + (not settings.file)]), "--file must end in .png or .npz")
    path = Path(settings.weights or Path(settings.out, f"{settings.who}.pt"))
    net, codec, _ = load_run(path, best_device(settings.device))
    noise = torch.randn(settings.count, *net.shape, generator=torch.Generator().manual_seed(settings.seed))
    for steps in settings.steps:
        pictures = generate(net, noise, steps, codec, settings.solver)[1]
        name = Path(settings.file or path.with_name(f"samples-{steps}.png"))
        if settings.file and len(settings.steps) > 1:
            name = name.with_stem(f"{name.stem}-{steps}")
        if name.suffix == ".npz":
            np.savez_compressed(name, pictures=pictures.permute(0, 2, 3, 1).numpy())  # (N,S,S,3)
        else:
            save_grid(name, pictures)
        evaluations = scflow.nfe(steps, settings.solver)
        print(f"{name}: {settings.count} pictures, {toy_2d.plural(evaluations, 'network evaluation')} each")


def save_grid(path, pictures):
    """uint8 pictures (N,3,S,S) as the tiles of one PNG."""
    from PIL import Image

    across = math.ceil(math.sqrt(len(pictures)))
    blank = pictures.new_full((-len(pictures) % across, *pictures.shape[1:]), 255)
    tiles = rearrange(torch.cat([pictures, blank]), "(r c) k h w -> (r h) (c w) k", c=across)
    Image.fromarray(tiles.numpy()).save(path)


def load_run(path, device):
    """The network of a checkpoint of this script, its codec, and the checkpoint's content."""
    content = scflow.read(path)
    require("codec" in content, f"{path} holds no autoencoder: it is not a checkpoint of celeba_latent.py")
    return scflow.load(path, device=device), Codec(content["codec"], device), content


@dataclass(frozen=True)
class Evaluate:
    """What is measured."""

    out: str = option("runs/faces", "run folder")
    latents: str = option("", "latents folder [the teacher's]")
    count: int = option(5000, "samples of each network")
    seed: int = option(0, "seed of the noise")
    device: str = option("", "cpu, cuda or mps [the best there is]")
    fid: bool = option(False, "also InceptionV3 FID to the held-out pictures (needs torch-fidelity, and --images)")
    images: str = option("", "the pictures that were encoded, for --fid")


def evaluate_command(argv):
    """Measure teacher and student of a run folder against pictures that were never trained on."""
    settings = Evaluate(**cli(argv, evaluate_command.__doc__, Evaluate)[0])
    folder, n = Path(settings.out), settings.count
    require(n >= 1000, f"a Fréchet distance from {n} samples says little: give --count 1000 or more")
    student, codec, content = load_run(folder / "student.pt", best_device(settings.device))
    teacher = scflow.build(content["teacher"]["arch"])
    teacher.load_state_dict(content["teacher"]["weights"])
    teacher.to(codec.device).eval()
    data = Latents(settings.latents or read_json(folder / "config.json", "latents")["latents"])
    require(Codec(data.codec).hash == codec.hash, f"{data.folder} belongs to another autoencoder than {folder}")
    few = f"only {len(data.held_out)} held-out pictures: a Fréchet distance needs 200, that is 2,000 encoded pictures"
    require(len(data.held_out) >= 200, few)
    spaces, generator = Spaces(*data.measured(data.held_out)), torch.Generator().manual_seed(10**6 + settings.seed)

    def some_real():
        return data.train[torch.randperm(len(data.train), generator=generator)[:n]].sort().values

    floors = [spaces.measure(*data.measured(some_real())) for _ in range(5)]
    floor = {k: float(np.mean([f[k] for f in floors])) for k in floors[0]}
    rows = [dict(who="training pictures (floor)", **floor)]
    back = codec.decode(data.normalised(some_real())[:: data.copies])
    rows.append(dict(who="the autoencoder's reconstruction of them", **spaces.measure(*features_of(back))))
    noise = torch.randn(n, *data.shape, generator=generator)
    seen = spaces(*data.measured(data.train))["layout"]
    usual = nearest(spaces.reference["layout"], seen)[0].median()
    for who, net, counts in (("teacher", teacher, (1, 2, 4, 50)), ("student", student, (1, 2, 4, 8))):
        first = None
        for steps in counts:
            pictures = generate(net, noise, steps, codec)[1]
            ours = features_of(pictures)
            row = dict(who=who, nfe=steps, **spaces.measure(*ours))
            first = pictures if first is None else first
            row["gap"] = scflow.rms_distance(pictures.float() / 255, first.float() / 255) / math.sqrt(first[0].numel())
            distance, index = nearest(spaces(*ours)["layout"], seen)
            row["novelty"] = (distance.median() / usual).item()
            if settings.fid:
                row["fid"] = inception_fid(pictures, data, settings.images)
            rows.append(row)
            if (who, steps) == ("student", 1):
                twins = codec.decode(data.normalised(data.train[index[:8]])[:: data.copies])
                draw_sheet(folder / "neighbours.png", {"student 1": pictures[:8], "nearest": twins})
    sizes = {"samples": n, "held_out": len(data.held_out), "train": len(data.train)}
    metrics = dict(**sizes, rows=rows, floor_sd={k: float(np.std([f[k] for f in floors], ddof=1)) for k in floor})
    metrics |= dict(seed=settings.seed, machine=toy_2d.machine())
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    write_text(folder / "metrics.md", text := report(metrics))
    print(text)


def features_of(pictures, batch=250):
    """Thumbnails and textures of many pictures."""
    return tuple(map(torch.cat, zip(*(features(part) for part in pictures.split(batch)))))


def nearest(x, y, rows=500):
    """Distance and index (N,) of the nearest row of y (M,d) to each row of x (N,d)."""
    found = [torch.cdist(part, y).min(1) for part in x.split(rows)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def report(metrics):
    """The measures of a run as a Markdown table."""
    floor, sd = metrics["rows"][0], metrics["floor_sd"]
    lines = [
        f"Fréchet distance to {metrics['held_out']} held-out pictures, from {metrics['samples']} samples each, less the "
        f"floor (layout {floor['layout']:.3f} ± {sd['layout']:.3f}, texture {floor['texture']:.4f} ± "
        f"{sd['texture']:.4f}: what as many training pictures score); {metrics['machine']}; seed {metrics['seed']}.",
        "",
        "| network | evaluations | layout (64 PCs of 32×32) | texture (random convolutions) | coverage | gap to one step | novelty |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in metrics["rows"]:
        extra = [f"{r[k]:.3f}" if k in r else "" for k in ("gap", "novelty")]
        cells = [r["who"], str(r.get("nfe", "")), f"{r['layout'] - floor['layout']:.3f}"]
        cells += [f"{r['texture'] - floor['texture']:.4f}", f"{r['coverage']:.3f}", *extra]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def inception_fid(pictures, data, images):
    """FID of uint8 pictures to the held-out originals, by torch-fidelity (InceptionV3 at 299 px, its own resize)."""
    try:
        import torch_fidelity
    except ImportError:
        raise ValueError("--fid needs a package: pip install torch-fidelity") from None
    originals = Pictures(images)
    names = [data.sources[i] for i in data.held_out.tolist()]
    real = torch.stack([originals.read(name, data.codec["size"]) for name in names])
    sets = [torch.utils.data.TensorDataset(x) for x in (pictures, real)]
    first = [type("First", (torch.utils.data.Dataset,), dict(__len__=lambda s, d=d: len(d), __getitem__=lambda s, i, d=d: d[i][0]))() for d in sets]
    return torch_fidelity.calculate_metrics(input1=first[0], input2=first[1], fid=True, verbose=False)["frechet_inception_distance"]


# ═══ 9. The demo ════════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Demo:
    """Faces that the program draws, from pictures to a one-step generator; a CPU will do."""

    pictures: int = option(50000, "drawings, a tenth of which is held out")
    side: int = option(32, "pixels of a side")
    seed: int = option(0, "seed of the networks (the drawings are always the same)")
    count: int = option(5000, "samples that are measured")
    teacher_steps: int = option(1700, "updates of the teacher")
    student_steps: int = option(2100, "updates of the student")
    out: str = option("runs/demo", "run folder; the latents go into its folder latents")
    overwrite: bool = option(False, "start afresh in a folder that exists")
    quiet: bool = option(False, "no progress bars")


def demo_command(argv):
    """The whole pipeline on drawn faces: latents, teacher, student, sheet of samples, measures."""
    demo, clock = Demo(**cli(argv, demo_command.__doc__, Demo)[0]), time.perf_counter()
    out, again = Path(demo.out), ["--overwrite"] * demo.overwrite
    quiet, seed = ["--quiet"] * demo.quiet, ["--seed", str(demo.seed), "--device", "cpu"]
    folder = open_folder(out / "latents", "", False, demo.overwrite, asdict(demo))

    def read(names):  # the first drawing of a batch seeds it
        generator = torch.Generator().manual_seed(int(names[0]))
        return list((255 * draw_faces(torch.rand(len(names), TRAITS, generator=generator), demo.side)).round().byte())

    names = [str(i) for i in range(demo.pictures)]
    write_latents(folder, PatchPCA(16, 64), names, read, demo.side, batch=500, quiet=demo.quiet)
    lengths = ["--teacher-steps", str(demo.teacher_steps)], ["--student-steps", str(demo.student_steps)]
    teacher_command(["--latents", str(folder), "--out", demo.out, "--patch", "1", *again, *quiet, *seed, *lengths[0]])
    distill_command(["--out", demo.out, *again, *quiet, *seed, *lengths[1]])
    evaluate_command(["--out", demo.out, "--count", str(demo.count), *seed])
    print(f"{time.perf_counter() - clock:.0f} s; the sheet of samples is {out / 'student.png'}")


# ═══ 10. Speed, measured ════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Bench:
    """What is timed."""

    sizes: tuple = option(("small",), "networks", choices=tuple(SIZES))
    channels: int = option(4, "channels of the latents")
    side: int = option(32, "side of the latents")
    patch: int = option(2, "side of the DiT's patches, in latents")
    batch: int = option(64, "rows per update")
    rounds: int = option(5, "rounds; each times every variant forwards and backwards")
    updates: int = option(3, "updates at a time")
    device: str = option("", "cpu, cuda or mps [the best there is]")
    out: str = option("results/bench", "path of the table, without .md and .json")


def one_loss_at_a_time(nets, x0, x1, t, phase, weights, generator=None, cond=None):
    """The losses of `scflow.distill_losses` as one would first write them: no pass serves two of them."""
    state, losses, fake = generator.get_state(), {}, None
    for name in (k for k, w in weights.items() if w > 0):
        generator.set_state(state)  # the same draws for all
        only = {k: w * (k == name) for k, w in weights.items()}
        loss, samples = scflow.distill_losses(nets, x0, x1, t, phase, only, generator, cond)
        losses |= loss
        fake = samples if name == "adv" else fake
    return losses, fake


VARIANTS = {  # name: (run settings, TF32, one loss at a time)
    "naive fp32": (dict(precision="fp32", compiled="no"), False, True),
    "naive fp32 with TF32": (dict(precision="fp32", compiled="no"), True, True),
    "bf16 eager": (dict(precision="bf16", compiled="no"), True, False),
    "ours": (dict(), True, False),
}


def bench_loop(task, size, variant, bench, device):
    """A training loop of one variant: an endless generator of States, from the same weights and draws."""
    how, _, naive = VARIANTS[variant]
    run, shape = Run(device=device, **how), (bench.channels, bench.side, bench.side)
    torch.manual_seed(0)
    net = prepare(scflow.DiT(shape, bench.patch, **SIZES[size][0]), run)
    disc = prepare(scflow.LatentDiscriminator(shape), run)
    nn.init.normal_(net.head.weight, std=0.02)  # not the zero map, or the first gradients would be zero too
    generator = torch.Generator(device).manual_seed(0)

    def batch(n, generator):
        return torch.randn(n, *shape, generator=generator, device=device), None

    if task == "teacher":
        compiled(net, run)
        loop = scflow.train_teacher(net, batch, generator, TeacherSettings(10**6, bench.batch, 1e-4))
    else:
        phase = Phase(steps=10**6, batch=bench.batch, lr=1e-4)  # all four losses
        function = one_loss_at_a_time if naive else scflow.distill_losses
        loop = scflow.distill(net, disc, batch, generator, (phase,), loss_function=function, prepare=partial(compiled, run=run))
    for state in loop:
        if naive and state.step == 1:  # the first update is only compared, not timed
            state.opt = torch.optim.AdamW(state.opt.param_groups[0]["params"], 1e-4, weight_decay=0.0, foreach=False)
        yield state


def bench_command(argv):
    """Time our training steps against naive ones, in turns in one process."""
    bench = Bench(**cli(argv, bench_command.__doc__, Bench)[0])
    device, rows = best_device(bench.device), []
    cuda = device.startswith("cuda")
    dtype, wait = (torch.bfloat16, torch.cuda.synchronize) if cuda else (torch.float32, lambda: None)
    probes = [(matmul_rate(device, dtype), copy_rate(device))]
    for size in bench.sizes:
        for task in ("teacher", "distill"):
            loops, seconds, parity, memory, start_up = {}, {v: [] for v in VARIANTS}, {}, {}, {}

            def advance(variant, updates):
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = VARIANTS[variant][1]
                wait()
                start = time.perf_counter()
                for _ in range(updates):
                    state = next(loops[variant])
                wait()
                return state, (time.perf_counter() - start) / updates

            for variant in VARIANTS:
                loops[variant] = bench_loop(task, size, variant, bench, device)
                before = torch.cuda.memory_allocated() if cuda and torch.cuda.reset_peak_memory_stats() is None else 0
                state, start_up[variant] = advance(variant, 1)
                net = state.net if task == "teacher" else state.student
                gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).double()
                parity[variant] = (sum(state.losses.values()), gradient.cpu())
                advance(variant, 2)  # warm
                memory[variant] = (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else math.nan
            for _ in range(bench.rounds):
                for variant in [*VARIANTS, *reversed(VARIANTS)]:  # A-B-B-A
                    seconds[variant].append(advance(variant, bench.updates)[1])
            net, disc = scflow.DiT((bench.channels, bench.side, bench.side), bench.patch, **SIZES[size][0]), None
            disc = scflow.LatentDiscriminator(net.shape)
            flops = bench.batch * (3 * net.flops() if task == "teacher" else step_flops(net, disc, Phase(), 0))
            loss, truth = parity["naive fp32"]
            for variant, times in seconds.items():
                ratio = np.quantile(np.array(seconds["naive fp32"]) / times, (0.5, 0.1, 0.9)).tolist()
                mine, gradient = parity[variant]
                row = dict(size=size, task=task, variant=variant, ms=1e3 * float(np.median(times)), ratio=ratio)
                row |= dict(gflop=flops / 1e9, share=flops / float(np.median(times)) / probes[0][0], memory_gb=memory[variant])
                row |= dict(loss=abs(mine - loss) / abs(loss), gradient=((gradient - truth).norm() / truth.norm()).item())
                saved = float(np.median(seconds["bf16 eager"])) - float(np.median(seconds["ours"]))
                row["start_up"] = start_up[variant]
                row["break_even"] = start_up["ours"] / saved if variant == "ours" and saved > 0 else None
                rows.append(row)
    probes.append((matmul_rate(device, dtype), copy_rate(device)))
    drift = max(abs(b / a - 1) for a, b in zip(*probes))
    content = dict(asdict(bench), machine=toy_2d.machine(), matmul=probes, drift=drift, rows=rows)
    Path(bench.out).parent.mkdir(parents=True, exist_ok=True)
    write_text(f"{bench.out}.json", json.dumps(content, indent=1))


COMMANDS = {"demo": demo_command, "encode": encode_command, "teacher": teacher_command, "distill": distill_command}
COMMANDS |= {"sample": sample_command, "evaluate": evaluate_command, "bench": bench_command}


def main(argv=None):
    """Run a command; bad input is one line on stderr and exit code 2, a stop by Ctrl-C is 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        require(argv and argv[0] in COMMANDS, f"name a command: {', '.join(COMMANDS)} (each has --help)")
        COMMANDS[argv[0]](argv[1:])
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"celeba_latent.py: error: {error}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as stop:
        print(f"celeba_latent.py: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
