"""Faces: from a folder of pictures to a generator that needs one step.

    python celeba_latent.py demo                                     drawn faces: no download, a CPU, minutes
    python celeba_latent.py encode --images DIR_OR_ZIP               pictures → latents/
    python celeba_latent.py teacher --latents latents --out runs/faces
    python celeba_latent.py distill --out runs/faces                 (finds the teacher and the latents there)
    python celeba_latent.py sample --out runs/faces --steps 1 2 4
    python celeba_latent.py evaluate --out runs/faces
    python celeba_latent.py bench                                    our updates against naive ones

The method, the networks, the training loops and the measures are those of `scflow.py`; this script adds pictures, the
autoencoder, sizes and speed. A latents folder holds latents.npy (float16, as encoded), meta.pt (the autoencoder, the
statistics, the sources), and thumbs.npy and textures.npy, what is compared of the originals. A run folder holds
config.json, teacher.pt, student.pt, log.csv, metrics.json, metrics.md and sheets of samples.
"""

import hashlib
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
from einops import rearrange
from torch import nn
from tqdm import tqdm

import scflow
import toy_2d
from scflow import Phase, TeacherSettings, option, require
from toy_2d import cli, open_folder, read_json, write_text

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
    paint(ellipse(x, y, zero, zero, rx, ry, edge), skin * (1 + between(-0.32, 0.32) * x - 0.1 * y)[:, None])  # head
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
    """Principal components of square patches: closed form, fitted in seconds, and blurred where they stop.

    Before `fit` the components are the pixels themselves: with patches of one pixel, no autoencoder at all.
    """

    def __init__(self, factor=8, channels=32):
        super().__init__()
        size = 3 * factor**2
        require(0 < channels <= size, f"patches of {factor} pixels have 1 to {size} components, not {channels}")
        self.arch, self.factor = dict(name="PatchPCA", factor=factor, channels=channels), factor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(size, channels))

    def fit(self, pictures):
        """Set mean and basis from pictures (N,3,S,S); returns the share of the variance that is kept."""
        patches = scflow.patchify(pictures, self.factor).flatten(0, 1)  # (N·h·w, 3·factor²)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))  # ascending
        self.mean, self.basis = patches.mean(0), vectors.flip(1)[:, : self.basis.shape[1]].contiguous()
        return (values.flip(0)[: self.basis.shape[1]].sum() / values.sum()).item()

    def encode(self, pictures):
        """(B,3,S,S) → (B,channels,S/factor,S/factor)."""
        tokens = (scflow.patchify(pictures, self.factor) - self.mean) @ self.basis
        return rearrange(tokens, "b (h w) c -> b c h w", h=pictures.shape[-2] // self.factor)

    def decode(self, latents):
        """(B,channels,h,w) → (B,3,h·factor,w·factor)."""
        tokens = rearrange(latents, "b c h w -> b (h w) c") @ self.basis.T + self.mean
        return scflow.unpatchify(tokens, self.factor, *(self.factor * n for n in latents.shape[2:])).clamp(0, 1)


class TinyBlock(nn.Module):
    """Three 3×3 convolutions beside the identity; `pool` adds the context of FLUX.2's variant before them."""

    def __init__(self, width, pool=False):
        super().__init__()
        layers = [m for _ in range(3) for m in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
        self.conv, self.pool = nn.Sequential(*layers[:-1]), None
        if pool:
            wide, narrow = (nn.Conv2d(a * width, b * width, 1, bias=False) for a, b in ((1, 4), (4, 1)))
            self.pool = nn.Sequential(wide, nn.GroupNorm(4, 4 * width), nn.ReLU(), narrow)

    def forward(self, x):
        """(B,width,H,W) → the same shape."""
        x = x if self.pool is None else x + self.pool(x)
        return torch.relu(x + self.conv(x))


class TinyAutoencoder(nn.Module):
    """The TAESD family (github.com/madebyollin/taesd): taesd, taesdxl, taesd3, taef1 and, with `pool`, taef2."""

    factor = 8

    def __init__(self, channels=4, pool=False, width=64):
        super().__init__()
        self.arch = dict(name="TinyAutoencoder", channels=channels, pool=pool, width=width)
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        down, up = [conv(3, width), TinyBlock(width)], [nn.Identity(), conv(channels, width), nn.ReLU()]
        for level in range(3):  # pools stand at the lowest resolution
            down += [conv(width, width, stride=2, bias=False)]
            down += [TinyBlock(width, pool and level == 2) for _ in range(3)]
            up += [TinyBlock(width, pool and level == 0) for _ in range(3)]
            up += [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
        self.encoder = nn.Sequential(*down, conv(width, channels))
        self.decoder = nn.Sequential(*up, TinyBlock(width), conv(width, 3))

    @classmethod
    def read(cls, prefix):
        """The pair PREFIX_encoder.pth and PREFIX_decoder.pth. Raises ValueError if they are not of the family."""
        paths = [f"{prefix}_{half}.pth" for half in ("encoder", "decoder")]
        try:
            encoder, decoder = (torch.load(path, map_location="cpu", weights_only=True) for path in paths)
            channels, width = encoder["14.weight"].shape[:2]
            net = cls(channels, any(".pool." in name for name in encoder), width)
            net.encoder.load_state_dict(encoder)
            net.decoder.load_state_dict(decoder)
        except Exception:  # on foreign bytes the unpickler raises nearly anything
            raise ValueError(f"{' and '.join(paths)} are not both there, or no pair of the TAESD family") from None
        return net

    def encode(self, pictures):
        """(B,3,S,S) → (B,channels,S/8,S/8)."""
        return self.encoder(pictures)

    def decode(self, latents):
        """(B,channels,h,w) → (B,3,8h,8w)."""
        return self.decoder(3 * torch.tanh(latents / 3)).clamp(0, 1)


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
            tiny = "Tiny" in diffusers.AutoencoderKL.load_config(source)["_class_name"]
            vae = (diffusers.AutoencoderTiny if tiny else diffusers.AutoencoderKL).from_pretrained(source)
        except (OSError, RuntimeError, KeyError) as error:
            raise ValueError(f"no AutoencoderKL or AutoencoderTiny at {source}: {str(error).splitlines()[0]}") from None
        self.vae = [vae.eval().requires_grad_(False)]  # in a list: a checkpoint names the source, and copies nothing
        self.factor = 64 // self.encode(torch.zeros(1, 3, 64, 64)).shape[-1]

    def encode(self, pictures):
        """(B,3,S,S) → (B,C,h,w), the mode of the posterior."""
        out = self.vae[0].to(pictures.device).encode(2 * pictures - 1)
        return out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents

    def decode(self, latents):
        """(B,C,h,w) → (B,3,S,S)."""
        return ((self.vae[0].to(latents.device).decode(latents).sample + 1) / 2).clamp(0, 1)


scflow.NETWORKS |= {c.__name__: c for c in (PatchPCA, TinyAutoencoder, Diffusers)}  # for scflow.load


def autoencoder(name, size, channels):
    """The autoencoder that `--autoencoder` names: pca, none, the prefix of a TAESD pair, or a diffusers source."""
    closed = {"pca": (8, channels), "none": (1, 3)}
    halves = (Path(f"{name}_{half}.pth").exists() for half in ("encoder", "decoder"))
    other = TinyAutoencoder.read if any(halves) else Diffusers
    net = PatchPCA(*closed[name]) if name in closed else other(name)
    require(size % net.factor == 0, f"--size {size} must be a multiple of {net.factor} for this autoencoder")
    return net.eval().requires_grad_(False)


# ═══ 3. What is compared of pictures ════════════════════════════════════════════════════════


def picture_features(pictures):
    """What is compared of pictures uint8 (B,3,H,W): thumbnails uint8 (B,3,32,32), and textures (B,192).

    A texture is the mean and the deviation over the picture of 3×32 random convolutions with a fixed seed.
    """
    x, weights, texture = pictures.float() / 255, torch.Generator().manual_seed(0), []
    thumbs, h = (255 * nn.functional.adaptive_avg_pool2d(x, 32)).round().byte(), 2 * x - 1
    for channels, side in ((3, 5), (32, 3), (32, 3)):
        weight = torch.randn(32, channels, side, side, generator=weights) * math.sqrt(2 / (channels * side**2))
        h = torch.relu(nn.functional.conv2d(h, weight.to(h), stride=2, padding=side // 2))
        texture += [h.mean((2, 3)), h.std((2, 3))]
    return thumbs.cpu(), torch.cat(texture, 1).cpu()


class PictureMeasure:
    """Fréchet distances to a reference set of pictures in two spaces fixed in advance, without a download.

    "layout" is 64 principal components of (3,000 of) the reference's thumbnails, "texture" as in `picture_features`.
    """

    def __init__(self, thumbs, texture):
        flat = thumbs.flatten(1).float() / 255
        self.mean = flat.mean(0)
        centred = flat[:3000] - self.mean  # (n,3072); the n×n Gram matrix has the same components
        self.basis = nn.functional.normalize(
            centred.T @ torch.linalg.eigh(centred @ centred.T)[1][:, -64:], dim=0
        )  # ascending
        self.reference = self.spaces(thumbs, texture)

    def spaces(self, thumbs, texture):
        """The features (N,64) and (N,192) of other pictures, by the name of the space."""
        return {"layout": (thumbs.flatten(1).float() / 255 - self.mean) @ self.basis, "texture": texture}

    def __call__(self, thumbs, texture):
        """{"layout", "texture": Fréchet distance, "coverage": share of the reference that is covered in layout}."""
        ours = self.spaces(thumbs, texture)
        row = {name: scflow.frechet_distance(ours[name], self.reference[name]) for name in ours}
        return row | {"coverage": scflow.knn_coverage(self.reference["layout"], ours["layout"])}


# ═══ 4. Latents ═════════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Device:
    """Where it is computed."""

    device: str = option("", "cpu, cuda or mps [the best there is]")

    def __post_init__(self):
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        object.__setattr__(self, "device", self.device or best)
        toy_2d.check_device(self.device)
        for name, value in vars(self).items():
            require(type(value) is not int or value > 0 or name == "seed", f"{name} must be positive, not {value}")
        require(not (getattr(self, "resume", 0) and self.overwrite), "--resume and --overwrite contradict each other")


@dataclass(frozen=True)
class Folder(Device):
    """What may already be there."""

    resume: bool = option(False, "go on with an interrupted run (give the same command)")
    overwrite: bool = option(False, "start afresh in a folder that exists")
    quiet: bool = option(False, "no progress bar and no estimate")


@dataclass(frozen=True)
class Encode(Folder):
    """Which pictures become latents, and how."""

    images: str = option("", "folder (searched through) or zip of jpg, png or webp pictures")
    autoencoder: str = option("pca", "pca, none (pixels), the prefix of a TAESD pair, or a diffusers name or folder")
    size: int = option(128, "side of the square pictures: cut out of the centre, resized")
    channels: int = option(32, "principal components of a patch of 8×8 pixels (pca only)")
    flips: bool = option(False, "encode the mirror image of every picture too")
    labels: str = option("", "attributes of the pictures, a text file like CelebA's list_attr_celeba.txt")
    batch: int = option(64, "pictures encoded at a time")
    out: str = option("latents", "latents folder")


class Pictures:
    """The pictures of a folder or a zip, by name."""

    def __init__(self, path):
        self.path, self.zip, kinds = Path(path), None, (".jpg", ".jpeg", ".png", ".webp")
        require(path and self.path.exists(), f"no pictures at {path or 'nowhere'}: give --images a folder or a zip")
        if self.path.is_file():
            try:
                self.zip = zipfile.ZipFile(path)
            except zipfile.BadZipFile:
                raise ValueError(f"{path} is neither a folder nor a whole zip") from None
        every = self.zip.namelist() if self.zip else [str(p.relative_to(path)) for p in self.path.rglob("*")]
        self.names = sorted(n for n in every if n.lower().endswith(kinds) and not Path(n).name.startswith("."))
        require(self.names, f"{path} holds no {', '.join(kinds)} pictures")

    def read(self, name, size):
        """uint8 (3,size,size): the central square, antialiased; or a string that says why there is none."""
        from PIL import Image, ImageOps

        try:
            with Image.open(self.zip.open(name) if self.zip else self.path / name) as image:
                image = ImageOps.exif_transpose(image).convert("RGB")  # as the camera was held
        except Exception as error:  # broken files raise nearly anything
            return f"cannot be read ({type(error).__name__})"
        side = min(image.size)
        if side < size:
            return f"too small ({image.width}×{image.height})"
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def read_all(self, names, size):
        """Several pictures, decoded by a few threads."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(partial(self.read, size=size), names))


def read_labels(path):
    """The names of the attributes and {file name: tokens}, 1 for no and 2 for yes, of a list in CelebA's format.

    It has the number of pictures in its first line, the names in its second, and then a file name and a −1 or 1 for
    each name. Raises ValueError, with the line, where it has not.
    """
    require(os.path.isfile(path), f"no list of labels at {path}")
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    names, tokens = lines[1].split() if len(lines) > 2 else [], {"-1": 1, "1": 2}
    require(names and lines[0].strip().isdecimal(), f"{path} does not begin with a number and a line of names")
    labels = {}
    for i, line in enumerate(lines[2:], 3):
        name, *values = line.split() or [""]
        require(len(values) == len(names) or not name, f"{path}, line {i}: {len(values)} values for {len(names)} names")
        require(all(v in tokens for v in values), f"{path}, line {i}: a label is -1 or 1, and nothing else")
        labels |= {name: [tokens[v] for v in values]} if name else {}
    require(len(labels) == int(lines[0]), f"{path} announces {int(lines[0])} pictures, and lists {len(labels)}")
    return names, labels


def encode_command(argv):
    """Turn pictures into a latents folder."""
    asked = Encode(**cli(argv, encode_command.__doc__, Encode)[0])
    pictures, net = Pictures(asked.images), autoencoder(asked.autoencoder, asked.size, asked.channels)
    fixed = {k: getattr(asked, k) for k in ("images", "autoencoder", "size", "channels", "flips")}
    if asked.labels:
        fixed["labels"], (_, labels) = asked.labels, read_labels(asked.labels)
        lost = next((name for name in pictures.names if Path(name).name not in labels), "")
        require(not lost, f"{asked.labels} has no line for {lost}")
    folder = open_folder(asked.out, "latents", asked.resume, asked.overwrite, fixed)
    meta = write_latents(folder, net, pictures.names, partial(pictures.read_all, size=asked.size), asked)
    count, skipped = len(meta["sources"]), "".join(f"\n  {name}: {reason}" for name, reason in meta["skipped"])
    print(f"{folder}: {count} pictures as latents {tuple(meta['shape'])}, {len(meta['skipped'])} skipped{skipped}")


@torch.no_grad()  # nothing is trained here
def write_latents(folder, net, names, read, asked):
    """Encode the pictures `read(names) -> [uint8 (3,S,S) or reason]` from where meta.pt ends; returns its content."""
    path, copies, size = folder / "meta.pt", 1 + asked.flips, asked.size
    meta = dict(size=size, flips=asked.flips, done=0, sources=[], skipped=[], complete=False)
    if path.exists():
        content, net = scflow.read(path), scflow.load(path)
        meta = {k: content[k] for k in (*meta, *(("mean", "std") if content["complete"] else ()))}
    elif isinstance(net, PatchPCA) and net.factor > 1:
        some = [x for x in read(names[:: max(1, len(names) // 4096)]) if not isinstance(x, str)]
        require(some, f"none of the pictures can be used; the first {read(names[:1])[0]}")
        kept = net.fit(torch.stack(some).float() / 255)
        print(f"{net.basis.shape[1]} components of a patch keep {kept:.1%} of the variance")
    net.to(asked.device, memory_format=torch.channels_last)  # convolutions are a quarter faster so, on a CPU too
    meta["shape"] = list(net.encode(torch.zeros(1, 3, size, size, device=asked.device)).shape[1:])
    file, mode = np.lib.format.open_memmap, "r+" if meta["done"] else "w+"
    arrays = [file(folder / f"{k}.npy", mode, kind, (n * len(names), *row)) for k, kind, n, row in layout(meta)]
    with tqdm(total=len(names), initial=meta["done"], desc="encode", unit="picture", disable=asked.quiet) as bar:
        while meta["done"] < len(names):
            chunk, start = names[meta["done"] : meta["done"] + asked.batch], len(meta["sources"])
            found = list(zip(chunk, read(chunk)))
            good = {name: x for name, x in found if not isinstance(x, str)}
            if good:
                x, end = torch.stack(list(good.values())).to(asked.device), start + len(good)
                both = torch.stack([x, x.flip(3)][:copies], 1).flatten(0, 1)  # (copies·n,3,S,S): each beside its mirror
                z = net.encode(both.float() / 255).cpu()
                require(z.isfinite().all(), f"the autoencoder gives values that are not finite near {next(iter(good))}")
                for array, part, n in zip(arrays, (z, *picture_features(x)), (copies, 1, 1)):
                    array[n * start : n * end] = part.numpy()
                    array.flush()  # on the disk before meta.pt counts it
            meta["sources"] += list(good)
            meta["skipped"] += [(name, x) for name, x in found if isinstance(x, str)]
            meta["done"] += len(chunk)
            bar.update(len(chunk))
            if meta["done"] % (16 * asked.batch) < asked.batch:  # not every time: a long list of sources takes a while
                scflow.save(path, net, **meta)
    count, first = len(meta["sources"]), "".join(f"; {name}: {reason}" for name, reason in meta["skipped"][:1])
    require(count >= 20, f"only {count} of {len(names)} pictures can be used, and 20 are needed{first}")
    rows = torch.from_numpy(arrays[0][: copies * count])
    sums = [[(part.double() ** power).sum((0, 2, 3)) for power in (1, 2)] for part in rows.split(1024)]
    mean, square = (sum(terms) / rows[:, 0].numel() for terms in zip(*sums))  # per channel
    std = (square - mean**2).clamp(min=0).sqrt()
    require((std > 1e-6).all(), "a channel of the latents is constant: use fewer --channels, or other pictures")
    meta |= dict(mean=mean.float()[:, None, None], std=std.float()[:, None, None], complete=True)
    if asked.labels:
        meta["attributes"], labels = read_labels(asked.labels)
        meta["labels"] = torch.tensor([labels[Path(name).name] for name in meta["sources"]], dtype=torch.uint8)
    scflow.save(path, net, **meta)
    return meta


def layout(meta):
    """The arrays of a latents folder: name, type, rows per picture, shape of a row."""
    rows = ("thumbs", np.uint8, 1, (3, 32, 32)), ("textures", np.float32, 1, (192,))
    return [("latents", np.float16, 1 + meta["flips"], tuple(meta["shape"])), *rows]


class Codec:
    """What turns normalised latents back into pictures, as kept in checkpoints: an autoencoder and the statistics."""

    def __init__(self, content, device="cpu"):
        self.content = {k: content[k] for k in ("arch", "weights", "mean", "std", "size")}
        self.device, self.mean, self.std = device, content["mean"].to(device), content["std"].to(device)
        self.net = scflow.build(content["arch"])
        self.net.load_state_dict(content["weights"])
        self.net.to(device).eval().requires_grad_(False)
        numbers = (content["mean"], content["std"], *content["weights"].values())
        parts = [repr(content["arch"]).encode(), *(part.cpu().numpy().tobytes() for part in numbers)]
        self.hash = hashlib.sha256(b"".join(parts)).hexdigest()[:16]  # codecs with the same one decode alike

    @torch.no_grad()  # nothing is trained here
    def decode(self, latents, batch=128):
        """Normalised latents (N,C,h,w) → uint8 pictures (N,3,S,S) on the CPU, in batches."""
        parts = (self.net.decode(z.to(self.device) * self.std + self.mean) for z in latents.split(batch))
        return torch.cat([(255 * x).round().byte().cpu() for x in parts])


class Latents:
    """A finished latents folder; a fixed tenth of its pictures is held out, and never trained on."""

    def __init__(self, folder):
        self.folder, path = folder, Path(folder, "meta.pt")
        require(path.is_file(), f"{folder or 'no --latents'} is not a latents folder (it holds no meta.pt): run encode")
        self.meta = meta = scflow.read(path)
        require(meta.get("complete"), f"{folder} is unfinished: give the same encode command with --resume")
        self.shape, self.copies, self.arrays, count = tuple(meta["shape"]), 1 + meta["flips"], {}, len(meta["sources"])
        for name, kind, n, shape in layout(meta):
            file = Path(folder, f"{name}.npy")
            try:
                self.arrays[name] = array = np.lib.format.open_memmap(file, mode="r")
            except (OSError, ValueError, EOFError):
                raise ValueError(f"{file} is missing or damaged: run encode again") from None
            fits = array.dtype == kind and array.shape[1:] == shape and len(array) >= n * count
            require(fits, f"{file} holds {array.dtype} {array.shape}, not {(n * count, *shape)}: run encode again")
        self.attributes, self.labels = meta.get("attributes", []), meta.get("labels")  # (N,L)
        self.tokens = (len(self.attributes), 2) if self.attributes else None
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        self.held_out, self.train = (part.sort().values for part in order.tensor_split([len(order) // 10]))

    def normalised(self, which, device="cpu", mirrored=False):
        """The latents of the pictures `which` (N,) as float32 (N,C,h,w); `mirrored`: their mirror images too."""
        rows = (self.copies * which[:, None] + torch.arange(self.copies if mirrored else 1)).flatten()
        z = torch.from_numpy(self.arrays["latents"][rows.numpy()]).to(device).float()
        require(z.isfinite().all(), f"{self.folder}/latents.npy holds values that are not finite: run encode again")
        return (z - self.meta["mean"].to(device)) / self.meta["std"].to(device)

    def cond(self, which):
        """The attributes (N,L) of the pictures `which` (N,), or None."""
        return self.labels[which].long() if self.attributes else None

    def batch(self, device):
        """`batch(n, generator)` over the training latents, which live on the device: no loader."""
        self.normalised(self.held_out)  # a bad value is found now, and not when the first sheet is drawn
        z = self.normalised(self.train, device, mirrored=True)
        std = z.std().item()
        require(0.8 < std < 1.25, f"the normalised latents have a deviation of {std:.2f}, not 1: run encode again")
        labels = self.cond(self.train).to(device) if self.attributes else None

        def batch(n, generator):
            rows = torch.randint(len(z), (n,), generator=generator, device=z.device)
            if labels is None:
                return z[rows], None
            # Each row knows a random share of its attributes: whoever samples may then name a few, and leave the rest.
            told, cond = torch.rand(n, 1, generator=generator, device=z.device), labels[rows // self.copies]
            return z[rows], cond * (torch.rand(cond.shape, generator=generator, device=z.device) < told)

        return batch

    def require_codec(self, codec, owner):
        """Raise ValueError unless these latents have the autoencoder and the statistics of a checkpoint."""
        same = Codec(self.meta).hash == codec.hash
        require(same, f"{self.folder} was made by another autoencoder, or of other pictures, than {owner} learned from")

    def originals(self, which):
        """The `picture_features` of the original pictures."""
        return tuple(torch.from_numpy(self.arrays[name][which.numpy()]) for name in ("thumbs", "textures"))


# ═══ 5. Settings and speed ══════════════════════════════════════════════════════════════════

# Networks by size, and how long a teacher of that size is trained; 2.9, 33 and 130 million parameters.
SIZES = {
    "small": (dict(dim=192, depth=4, heads=4), dict(teacher_steps=10000, teacher_batch=64, teacher_lr=1e-3)),
    "S": (dict(dim=384, depth=12, heads=6), dict(teacher_steps=20000, teacher_batch=256, teacher_lr=5e-4)),
    "B": (dict(dim=768, depth=12, heads=12), dict(teacher_steps=40000, teacher_batch=256, teacher_lr=2e-4)),
}

# The reference's settings for CelebA-HQ 256: a batch of 32 a GPU, 200 epochs of 27,000 pictures.
PAPER = Phase(168750, 32, 2e-5, 1e-4, warmup_self=1000, warmup_bi=1000, adversarial="softplus", r1=1.0)
# This project's schedule, distil first, straighten last (see scflow.SCHEDULES), with settings found on drawn faces.
FIRST, LAST = scflow.SCHEDULES["two_phase"]
FIRST = replace(FIRST, steps=8000, batch=32, lr=1e-3, lr_disc=2e-4, delta=0.15, lambda_adv=0.01, at_one=0.0)
LAST = replace(LAST, steps=2000, batch=64, lr=5e-4, lr_disc=2e-4, lambda_adv=0.01, at_one=0.25)
SCHEDULES = {"paper": (PAPER,), "two_phase": (FIRST, LAST)}


@dataclass(frozen=True)
class Run(Folder):
    """What is trained, how fast, and where it goes."""

    latents: str = option("", "latents folder (distill takes the teacher's)")
    out: str = option("runs/faces", "run folder")
    size: str = option("small", "network of the teacher, and so of the student", choices=tuple(SIZES))
    patch: int = option(2, "side of the DiT's patches, in latents")
    preset: str = option("two_phase", "schedule of the student's losses", choices=tuple(SCHEDULES))
    seed: int = option(0, "seed of weights, data and noise")
    precision: str = option("auto", "of the networks' passes; auto: bf16 on CUDA", choices=("auto", "fp32", "bf16"))
    compile: str = option("auto", "torch.compile; auto: on CUDA", choices=("auto", "yes", "no"))
    save_every: int = option(500, "updates between checkpoints")
    sheet_every: int = option(2000, "updates between sheets of samples")

    def place(self, net):
        """The network on the device, to compute in bf16 where that is fast. Its weights stay in float32."""
        cuda = self.device.startswith("cuda")
        torch.set_float32_matmul_precision("high" if cuda else "highest")  # on CUDA, TF32 for what is left in float32
        if self.precision == "bf16" or (self.precision == "auto" and cuda):
            net.precision = torch.bfloat16
        convolutional = cuda and isinstance(net, scflow.LatentDiscriminator)
        return net.to(self.device, memory_format=torch.channels_last if convolutional else torch.preserve_format)

    def compiled(self, net):
        """Compile the network in place, if asked to: its weights keep their names."""
        if self.compile == "yes" or (self.compile == "auto" and self.device.startswith("cuda")):
            # A graph for every batch size, with and without gradients: more than the 8 after which it gives up.
            torch._dynamo.config.cache_size_limit = 64
            for part in getattr(net, "blocks", [net]):  # the blocks of a DiT share theirs: a twelfth of the wait
                part.compile(dynamic=False)


class Log:
    """The past of a run: every tenth update's losses and speed, and sheets of samples on the way.

    plan  (updates, rows of a batch, FLOPs per row) of each phase.
    nets  one for each set of numbers that is kept, averages and moments too.
    draw  called with the State now and then.
    """

    def __init__(self, run, rows, plan, nets, draw):
        self.rows, self.frames, self.run, self.plan, self.draw, self.clock = rows, [], run, plan, draw, None
        self.rate = toy_2d.matmul_rate(run.device)
        minutes = sum(math.prod(part) for part in plan) / (0.4 * self.rate) / 60
        gb = 4e-9 * sum(p.numel() for net in nets for p in net.parameters())
        how = f"about {minutes:.2g} minutes, if 40% of this device's {self.rate / 1e12:.2g} TFLOP/s are reached"
        what = f"{gb:.2g} GB on disk, and in memory without activations (lower the batch if they do not fit)"
        if not run.quiet:
            print(f"{' + '.join(str(part[0]) for part in plan)} updates: {how}; {what}")

    def note(self, stage, state, total):
        """Record a State of the teacher or the student."""
        if state.step % 10 == 1:
            now, speed = time.perf_counter(), {}
            _, batch, flops = self.plan[np.searchsorted(np.cumsum([part[0] for part in self.plan]), state.step - 1)]
            if self.clock:
                images = batch * (state.step - self.clock[1]) / (now - self.clock[0])
                speed = dict(images_per_s=round(images, 1), mfu=round(images * flops / self.rate, 4))
            if self.run.device.startswith("cuda"):
                speed["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            self.rows.append({"stage": stage, "step": state.step, **state.losses, **speed})
            self.clock = (now, state.step)
        if state.step % self.run.sheet_every == 0 or state.step == total:
            self.draw(state)
            self.clock = None  # drawing is not training


# ═══ 6. Teacher and student ═════════════════════════════════════════════════════════════════


def generate(net, noise, steps, codec, solver="euler", batch=250, cond=None):
    """Noise (N,C,h,w) → pictures uint8 (N,3,S,S) on the CPU, in batches on the codec's device."""
    parts = noise.split(batch)
    conds = [None] * len(parts) if cond is None else cond.to(codec.device).split(batch)
    made = (scflow.sample(net, x.to(codec.device), steps, solver, c) for x, c in zip(parts, conds))
    return torch.cat([codec.decode(z) for z in made])


def draw_sheet(path, columns):
    """A PNG whose columns {title: uint8 (n,3,S,S)} show the same noise in every row."""
    from matplotlib.figure import Figure  # no window is opened

    across, down = len(columns), len(next(iter(columns.values())))
    figure = Figure(figsize=(1.3 * across, 0.35 + down * 1.3 * across / (1.05 * across - 0.05)), layout="none")
    for ax, (title, pictures) in zip(figure.subplots(1, across, squeeze=False)[0], columns.items()):
        ax.imshow(rearrange(pictures, "n c h w -> (n h) w c").numpy(), interpolation="nearest")
        ax.set_title(title, fontsize=11)
        ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1 - 0.35 / figure.get_figheight(), wspace=0.05)
    figure.savefig(path)


def compare(path, data, codec, **nets):
    """A sheet of held-out pictures and of samples, network=(net, numbers of steps), all of one noise.

    Where there are attributes, those of the samples are those of the held-out pictures.
    """
    noise, cond = torch.randn(8, *data.shape, generator=torch.Generator().manual_seed(1)), data.cond(data.held_out[:8])
    columns = {"held out": codec.decode(data.normalised(data.held_out[:8]))}
    for name, (net, counts) in nets.items():
        columns |= {f"{name} {n}": generate(net, noise[: len(data.held_out)], n, codec, cond=cond) for n in counts}
    draw_sheet(path, columns)


def teacher_command(argv):
    """Train the rectified-flow teacher on a latents folder."""
    given, trained = cli(argv, teacher_command.__doc__, Run, TeacherSettings)
    run = Run(**given)
    dims, defaults = SIZES[run.size]
    settings, data = TeacherSettings(**{**defaults, **trained}), Latents(run.latents)
    codec, total = Codec(data.meta, run.device), settings.teacher_steps
    torch.manual_seed(run.seed)  # initial weights
    net, batch = run.place(scflow.DiT(data.shape, run.patch, **dims, tokens=data.tokens)), data.batch(run.device)
    config = dict(latents=run.latents, codec=codec.hash, size=run.size, patch=run.patch, seed=run.seed)
    config |= {k: v for k, v in asdict(settings).items() if data.attributes or k != "teacher_drop"}
    folder = open_folder(run.out, "faces", run.resume, run.overwrite, config)

    def draw(state):
        compare(folder / "teacher.png", data, codec, teacher=(state.ema, (1, 50)))

    log = Log(run, [], [(total, settings.teacher_batch, 3 * net.flops())], 4 * [net], draw)  # its average, two moments
    run.compiled(net)
    generator = torch.Generator(run.device).manual_seed(run.seed)
    start = partial(scflow.train_teacher, net, batch, generator, settings, None)
    toy_2d.stage("teacher", run, folder, log, net, start, total, codec=codec.content, attributes=data.attributes)
    print(f"{folder}/teacher.pt and teacher.png; next: python celeba_latent.py distill --out {folder}")


@dataclass(frozen=True)
class Distill(Run):
    """What is distilled, how fast, and where it goes."""

    guidance: float = option(1.0, "guidance scale of a teacher of labelled pictures; the student needs none")


def distill_command(argv):
    """Distil the teacher of a run folder into a student that needs one step."""
    given, changed = cli(argv, distill_command.__doc__, Distill, Phase)
    run = Distill(**given)
    schedule, folder = toy_2d.revise(SCHEDULES[run.preset], changed), Path(run.out)
    path, student = folder / "teacher.pt", folder / "student.pt"
    require(path.is_file(), f"no teacher in {folder}: run celeba_latent.py teacher --out {folder} first")
    content, config = toy_2d.read_run(path, "teacher"), read_json(folder / "config.json", "latents", "teacher_steps")
    done = content["state"]["step"]
    require(done == config["teacher_steps"], f"the teacher stopped at update {done}: finish it with teacher --resume")
    data, codec = Latents(run.latents or config["latents"]), Codec(content["codec"], run.device)
    data.require_codec(codec, path)
    names = content.get("attributes", [])
    require(names == data.attributes, f"{data.folder} has other attributes than {path} learned from")
    require(names or run.guidance == 1, f"--guidance needs labels, and {data.folder} has none: encode with --labels")
    plan = dict(seed=run.seed, schedule=[asdict(phase) for phase in schedule])
    plan |= dict(guidance=run.guidance) if names else {}
    if student.exists():
        require(run.resume or run.overwrite, f"{student} exists: give --resume to go on with it, or --overwrite")
        same = run.overwrite or scflow.read(student).get("plan") == plan
        require(same, f"--resume with another seed or schedule than {student} was started with")
        for old in (student, folder / "metrics.json", folder / "metrics.md") if run.overwrite else ():
            old.unlink(missing_ok=True)
    torch.manual_seed(run.seed)  # initial weights of the critic
    teacher, disc = run.place(scflow.load(path)), run.place(scflow.LatentDiscriminator(data.shape, tokens=data.tokens))
    velocity = teacher
    if names:  # a copy: the student starts from the other, which is not compiled yet
        run.compiled(own := scflow.clone(teacher))
        velocity = scflow.guided(own, run.guidance)

    def draw(state):
        plain = scflow.guided(teacher, run.guidance) if names else teacher  # which is not compiled
        compare(folder / "student.png", data, codec, teacher=(plain, (1, 50)), student=(state.ema, (1, 2, 4)))

    costs = [(p.steps, p.batch, scflow.distill_flops(teacher, disc, p, p.steps - 1, bool(names))) for p in schedule]
    log = Log(run, content["journal"]["rows"], costs, [*7 * [teacher], *3 * [disc]], draw)
    generator, batch = torch.Generator(run.device).manual_seed(run.seed + 1), data.batch(run.device)
    loop = partial(scflow.distill, velocity, disc, batch, generator, schedule, teacher, prepare=run.compiled)
    total, kept = sum(p.steps for p in schedule), dict(codec=codec.content, plan=plan, attributes=names)
    toy_2d.stage("student", run, folder, log, teacher, lambda state: loop(resume=state), total, **kept)
    print(f"{student} and student.png; next: python celeba_latent.py evaluate --out {folder}")


# ═══ 7. Samples and measures ════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Sample(Device):
    """What is sampled."""

    out: str = option("runs/faces", "run folder (its student), or a weights file alone")
    steps: tuple = option((1,), "solver steps, one file for each number")
    attributes: tuple = option(("",), "NAME=1 or NAME=0 each, of a run on labelled pictures; what is not named is open")
    solver: str = option("euler", "sampler", choices=scflow.SOLVERS)
    count: int = option(64, "pictures")
    seed: int = option(0, "seed of the noise")
    file: str = option("samples.png", "grid .png, or .npz of an array (N,S,S,3); -STEPS is added to the name")


def sample_command(argv):
    """Draw samples of a run folder, or of a weights file alone, as a grid or an array."""
    from PIL import Image

    asked = Sample(**cli(argv, sample_command.__doc__, Sample)[0])
    source, path, n = Path(asked.out), Path(asked.file), asked.count
    require(path.suffix in (".png", ".npz"), f"--file must end in .png or .npz, not {asked.file!r}")
    net, codec = load_run(source / "student.pt" if source.is_dir() else source, asked.device)
    noise = torch.randn(n, *net.shape, generator=torch.Generator().manual_seed(asked.seed))
    cond = wanted(asked.attributes, net.attributes, n) if any(asked.attributes) else None
    for steps in asked.steps:
        name = path.with_stem(f"{path.stem}-{steps}")
        pictures = generate(net, noise, steps, codec, asked.solver, cond=cond)
        if path.suffix == ".npz":
            np.savez_compressed(name, pictures=rearrange(pictures, "n c h w -> n h w c").numpy())
        else:
            across = math.ceil(math.sqrt(n))
            filled = torch.cat([pictures, pictures.new_full((-n % across, *pictures.shape[1:]), 255)])
            Image.fromarray(rearrange(filled, "(r c) k h w -> (r h) (c w) k", c=across).numpy()).save(name)
        print(f"{name}: {n} pictures, {toy_2d.plural(scflow.nfe(steps, asked.solver), 'network evaluation')} each")


def wanted(given, names, n):
    """The condition (n,L) that NAME=1 and NAME=0 ask for, of the attributes `names` that a network knows."""
    require(names, "this run knows no attributes: its pictures were encoded without --labels")
    cond = torch.zeros(n, len(names), dtype=torch.int64)
    for text in given:
        name, _, value = text.partition("=")
        require(name in names, f"no attribute {name!r}; there are {', '.join(names)}")
        require(value in ("0", "1"), f"an attribute is {name}=1 or {name}=0, not {text!r}")
        cond[:, names.index(name)] = 1 + int(value)
    return cond


def load_run(path, device):
    """The network, with the names of its .attributes, and the codec of a checkpoint of this script."""
    content = scflow.read(path)
    require("codec" in content, f"{path} holds no autoencoder: it is not a checkpoint of celeba_latent.py")
    net = scflow.load(path, device=device)
    net.attributes = content.get("attributes", [])
    return net, Codec(content["codec"], device)


@dataclass(frozen=True)
class Evaluate(Device):
    """What is measured."""

    out: str = option("runs/faces", "run folder")
    latents: str = option("", "latents folder [the teacher's]")
    count: int = option(5000, "samples of each network")
    seed: int = option(0, "seed of the noise")
    fid: str = option("", "the pictures that were encoded: also InceptionV3 FID (needs torch-fidelity and its weights)")


def evaluate_command(argv):
    """Measure teacher and student of a run folder against pictures that were never trained on."""
    asked = Evaluate(**cli(argv, evaluate_command.__doc__, Evaluate)[0])
    folder, n, generator = Path(asked.out), asked.count, torch.Generator().manual_seed(10**6 + asked.seed)
    require(n >= 1000, f"a Fréchet distance from {n} samples says little: give --count 1000 or more")
    (teacher, _), (student, codec) = (load_run(folder / f"{who}.pt", asked.device) for who in ("teacher", "student"))
    data = Latents(asked.latents or read_json(folder / "config.json", "latents")["latents"])
    data.require_codec(codec, folder)
    require(len(data.held_out) >= 200, f"{len(data.held_out)} held-out pictures are too few: encode 2,000 pictures")
    measure = PictureMeasure(*data.originals(data.held_out))
    some = [data.train[torch.randperm(len(data.train), generator=generator)[:n]].sort().values for _ in range(5)]
    floors = [measure(*data.originals(which)) for which in some]
    floor = {k: (float(np.mean(v)), float(np.std(v, ddof=1))) for k in floors[0] if (v := [f[k] for f in floors])}
    rows = [dict(who="autoencoder", **measure(*features_of(codec.decode(data.normalised(some[0])))))]
    seen = measure.spaces(*data.originals(data.train))["layout"]
    usual = scflow.neighbours(measure.reference["layout"], seen)[0].median()
    noise, cond = torch.randn(n, *data.shape, generator=generator), None
    if data.attributes:  # asked for as often as they are found
        require(student.attributes == data.attributes, f"{data.folder} has other attributes than {folder} learned from")
        cond = data.cond(data.train[torch.randint(len(data.train), (n,), generator=generator)])
    networks = {"teacher": (teacher, (1, 50)), "student": (student, (1, 2, 4, 8))}
    if (scale := scflow.read(folder / "student.pt")["plan"].get("guidance", 1)) != 1:
        networks[f"teacher, guided at {scale:g}"] = scflow.guided(teacher, scale), (50,)
    for who, (net, counts) in networks.items():
        first = generate(net, noise, 1, codec, cond=cond)
        for steps in counts:
            pictures = first if steps == 1 else generate(net, noise, steps, codec, cond=cond)
            ours = features_of(pictures)
            distance, index = scflow.neighbours(measure.spaces(*ours)["layout"], seen)
            passes = steps * (1 + ("guided" in who))
            row = dict(who=who, nfe=passes, **measure(*ours), novelty=(distance.median() / usual).item())
            row["gap"] = scflow.rms_distance(pictures / 255, first / 255) / math.sqrt(first[0].numel())
            rows.append(row | ({"fid": inception_fid(pictures, data, asked.fid)} if asked.fid else {}))
            if (who, steps) == ("student", 1):
                nearest = codec.decode(data.normalised(data.train[index[:8]]))
                draw_sheet(folder / "neighbours.png", {"student 1": pictures[:8], "nearest": nearest})
    metrics = dict(samples=n, held_out=len(data.held_out), train=len(data.train), shape=data.shape, seed=asked.seed)
    metrics |= dict(size=codec.content["size"], floor=floor, rows=rows, machine=toy_2d.machine())
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    write_text(folder / "metrics.md", text := report(metrics))
    print(text)


def features_of(pictures, batch=250):
    """`picture_features` of many pictures."""
    return tuple(map(torch.cat, zip(*map(picture_features, pictures.split(batch)))))


def report(metrics):
    """The measures of a run as a Markdown table."""
    floor, names = metrics["floor"], ["layout", "texture", "coverage", "gap", "novelty"]
    names += ["fid"] * ("fid" in metrics["rows"][-1])
    shown = ", ".join(f"{name} {mean:.4f} ± {sd:.4f}" for name, (mean, sd) in floor.items())
    head = f"{metrics['samples']} samples against {metrics['held_out']} held-out pictures, seed {metrics['seed']}; "
    head += f"{metrics['machine']}. Fréchet distances less the floor that as many real ones set: {shown}.\n"
    lines = [head, f"| network | evaluations | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for r in metrics["rows"]:
        values = {k: r[k] - floor[k][0] if k in ("layout", "texture") else r[k] for k in names if k in r}
        cells = [f"{values[k]:.4f}" if k in values else "" for k in names]
        lines.append(f"| {' | '.join([r['who'], str(r.get('nfe', '')), *cells])} |")
    return "\n".join(lines) + "\n"


def inception_fid(pictures, data, images):
    """FID of uint8 pictures to the held-out originals, by torch-fidelity (InceptionV3 at 299 px, its own resize)."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise ValueError("--fid needs a package: pip install torch-fidelity") from None
    names = [data.meta["sources"][i] for i in data.held_out.tolist()]
    real = torch.stack(Pictures(images).read_all(names, data.meta["size"]))
    one, two = (torch.utils.data.Subset(x, range(len(x))) for x in (pictures, real))
    return calculate_metrics(input1=one, input2=two, fid=True, verbose=False)["frechet_inception_distance"]


# ═══ 8. The demo ════════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Demo(Folder):
    """Faces that the program draws, from pictures to a one-step generator; a CPU will do."""

    drawings: int = option(24000, "drawings, a tenth of which is held out")
    seed: int = option(0, "seed of the networks (the drawings are always the same)")
    count: int = option(5000, "samples that are measured")
    teacher_steps: int = option(1000, "updates of the teacher")
    student_steps: int = option(800, "updates of the student")
    out: str = option("runs/demo", "run folder; the latents go beside it, into OUT-latents")


def demo_command(argv):
    """The whole pipeline on drawn faces: latents, teacher, student, sheet of samples, measures."""
    demo, clock = Demo(**cli(argv, demo_command.__doc__, Demo)[0]), time.perf_counter()
    started = Path(demo.out, "config.json").exists()  # or it was stopped while it encoded
    flags = ["--quiet"] * demo.quiet + ["--overwrite"] * demo.overwrite + ["--resume"] * (demo.resume and started)
    common = ["--out", demo.out, "--seed", str(demo.seed), "--device", demo.device]

    def read(names):  # the first drawing of a batch seeds it
        generator = torch.Generator().manual_seed(int(names[0]))
        return list((255 * draw_faces(torch.rand(len(names), TRAITS, generator=generator))).round().byte())

    latents = open_folder(f"{demo.out}-latents", "", demo.resume, demo.overwrite, dict(drawings=demo.drawings))
    encode = Encode(size=32, batch=500, device=demo.device, quiet=demo.quiet)
    write_latents(latents, PatchPCA(16, 64), list(map(str, range(demo.drawings))), read, encode)
    given = ["--latents", str(latents), "--patch", "1", "--teacher-steps", str(demo.teacher_steps)]
    teacher_command([*common, *flags, *given])
    distill_command([*common, *flags, "--student-steps", str(demo.student_steps)])
    evaluate_command([*common, "--count", str(demo.count)])
    print(f"{time.perf_counter() - clock:.0f} s; samples: {Path(demo.out, 'student.png')}")


# ═══ 9. Speed, measured ═════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Bench(Device):
    """What is timed."""

    sizes: tuple = option(("small",), "networks", choices=tuple(SIZES))
    channels: int = option(4, "channels of the latents")
    side: int = option(32, "side of the latents")
    patch: int = option(2, "side of the DiT's patches, in latents")
    batch: int = option(32, "rows per update")
    rounds: int = option(5, "rounds; each times every variant forwards and backwards")
    updates: int = option(2, "updates at a time")
    out: str = option("results/bench", "path of the table, without .md and .json")


def one_loss_at_a_time(nets, x0, x1, t, phase, weights, generator=None, cond=None):
    """The losses of `scflow.distill_losses` as one would first write them: no pass serves two of them."""
    state, losses, fake = generator.get_state(), {}, None
    for name in (k for k, w in weights.items() if w > 0):
        generator.set_state(state)  # the same draws for all
        only = {k: w * (k == name) for k, w in weights.items()}
        loss, samples = scflow.distill_losses(nets, x0, x1, t, phase, only, generator, cond)
        losses, fake = losses | loss, samples if name == "adv" else fake
    return losses, fake


VARIANTS = {  # name: (precision, compile, TF32, one loss at a time)
    "naive fp32": ("fp32", "no", False, True),
    "naive fp32, TF32": ("fp32", "no", True, True),
    "bf16 eager": ("bf16", "no", True, False),
    "ours": ("auto", "auto", True, False),
}


def bench_loop(task, dims, variant, bench):
    """The training loop of one variant, from the same weights and draws as the others'."""
    precision, compiled, _, naive = VARIANTS[variant]
    run = Run(device=bench.device, precision=precision, compile=compiled)
    shape = (bench.channels, bench.side, bench.side)
    torch.manual_seed(0)
    net, disc = run.place(scflow.DiT(shape, bench.patch, **dims)), run.place(scflow.LatentDiscriminator(shape))
    nn.init.normal_(net.head.weight, std=0.02)  # the zero map would leave most gradients zero
    generator = torch.Generator(bench.device).manual_seed(0)

    def batch(n, generator):
        return torch.randn(n, *shape, generator=generator, device=bench.device), None

    if task == "teacher":
        run.compiled(net)
        return scflow.train_teacher(net, batch, generator, TeacherSettings(10**6, bench.batch, 1e-4))
    function = one_loss_at_a_time if naive else scflow.distill_losses
    phase = Phase(10**6, bench.batch, 1e-4)  # all four losses
    return scflow.distill(net, disc, batch, generator, (phase,), loss_function=function, prepare=run.compiled)


def bench_case(bench, size, task, matmul):
    """The rows of the table for one network and one kind of update."""
    cuda, truth, rows = torch.cuda if bench.device.startswith("cuda") else None, None, {}
    loops = {variant: bench_loop(task, SIZES[size][0], variant, bench) for variant in VARIANTS}
    seconds = {variant: [] for variant in VARIANTS}

    def advance(variant, updates=1):
        torch.set_float32_matmul_precision("high" if VARIANTS[variant][2] else "highest")
        torch.backends.cudnn.allow_tf32 = VARIANTS[variant][2]
        start = time.perf_counter()
        for _ in range(updates):
            state = next(loops[variant])
        if cuda:
            cuda.synchronize()
        return state, (time.perf_counter() - start) / updates

    for variant in VARIANTS:
        before = cuda.reset_peak_memory_stats() or cuda.memory_allocated() if cuda else 0
        state, spent = advance(variant)  # compiles
        net, loss = state.parts["net" if task == "teacher" else "student"], sum(state.losses.values())
        gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).cpu()
        truth = truth or (loss, gradient)
        rows[variant] = row = dict(size=size, update=task, variant=variant, loss=abs(loss / truth[0] - 1))
        row |= dict(gradient=((gradient - truth[1]).norm() / truth[1].norm()).item(), start_up=spent)
        row["gb"] = (cuda.max_memory_allocated() - before) / 1e9 if cuda else None
        advance(variant)  # warm
    for _ in range(bench.rounds):
        for variant in (*VARIANTS, *reversed(VARIANTS)):  # A-B-B-A
            seconds[variant].append(advance(variant, bench.updates)[1])
    disc, eager = scflow.LatentDiscriminator(net.shape), np.median(seconds["bf16 eager"])
    flops = bench.batch * (3 * net.flops() if task == "teacher" else scflow.distill_flops(net, disc, Phase(), 0))
    for variant, row in rows.items():
        ratios = np.quantile(np.array(seconds["naive fp32"]) / seconds[variant], (0.5, 0.1, 0.9)).tolist()
        middle = float(np.median(seconds[variant]))
        row |= dict(zip(("ratio", "p10", "p90"), ratios), ms=1e3 * middle, share=flops / middle / matmul)
        row["repaid"] = float(row["start_up"] / (eager - middle)) if variant == "ours" and eager > middle else None
    return list(rows.values())


def bench_command(argv):
    """Time our updates against naive ones, in turns in one process."""
    bench = Bench(**cli(argv, bench_command.__doc__, Bench)[0])
    a, b = torch.randn(2, 2**24, device=bench.device)
    probes = [(toy_2d.matmul_rate(bench.device), toy_2d.rate(bench.device, partial(a.copy_, b), 8 * a.numel()))]
    cases = [(size, task) for size in bench.sizes for task in ("teacher", "distill")]
    rows = [row for case in cases for row in bench_case(bench, *case, probes[0][0])]
    probes.append((toy_2d.matmul_rate(bench.device), toy_2d.rate(bench.device, partial(a.copy_, b), 8 * a.numel())))
    drift = max(abs(after / before - 1) for before, after in zip(*probes))
    names = "size update variant ms ratio p10 p90 share gb loss gradient start_up repaid".split()
    cells = [[f"{v:.3g}" if isinstance(v := r[k], float) else str(v or "") for k in names] for r in rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in (names, ["---"] * len(names), *cells))
    noisy = " (MORE THAN 3%: run again on a quiet machine)" * (drift > 0.03)
    text = f"""`{" ".join(["python celeba_latent.py bench", *argv])}`, {toy_2d.machine()}

Matrix product {probes[0][0] / 1e12:.3g} TFLOP/s, copy {probes[0][1] / 1e9:.3g} GB/s; moved by {drift:.1%}{noisy}.
ratio: naive fp32 time over this one, median, p10 and p90 of {2 * bench.rounds} turns; share: of the matrix product's
rate; gb: peak memory beside the other variants; loss, gradient: relative difference from naive fp32 in the first
update; start_up: seconds of that update, with compilation; repaid: after so many updates, against bf16 eager.

{table}"""
    Path(bench.out).parent.mkdir(parents=True, exist_ok=True)
    write_text(f"{bench.out}.json", json.dumps(dict(asdict(bench), probes=probes, rows=rows), indent=1))
    write_text(f"{bench.out}.md", text)
    print(text)


COMMANDS = {"demo": demo_command, "encode": encode_command, "teacher": teacher_command, "distill": distill_command}
COMMANDS |= {"sample": sample_command, "evaluate": evaluate_command, "bench": bench_command}


def main(argv=None):
    """Run a command, with the errors and exit codes of toy_2d.py."""
    return toy_2d.main(argv, COMMANDS, None, "celeba_latent.py")


if __name__ == "__main__":
    sys.exit(main())
