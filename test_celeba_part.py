"""The part celeba_latent.py of the tests: faces, autoencoders, measures, latents, runs, samples, commands."""

# test_core_part comes first: it hides the GPU before torch is loaded.
from test_core_part import exact, float64, gen, refused, same, scramble, seeded  # noqa: F401, I001
from test_toy_part import contents, read_metrics

import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import celeba_latent
import scflow
import toy_2d
from celeba_latent import TRAITS, Codec, Latents, PatchPCA, Pictures, TinyAutoencoder, draw_faces

# ═══ celeba_latent.py 1: drawn faces ════════════════════════════════════════════════════════


def numbers(n, seed=0):
    """What n faces are drawn from, (n,34)."""
    return torch.rand(n, len(TRAITS), generator=gen(seed))


def drawings(n, size=32, seed=0):
    """Drawn faces, uint8 (n,3,size,size)."""
    return (255 * draw_faces(numbers(n, seed), size)).round().byte()


def test_traits_have_their_names_and_ranges():
    """The k-th number, here k/34, is the trait of the k-th name, along a line over its range (1e-6: float32)."""
    n = len(TRAITS)
    traits = celeba_latent.read_traits(torch.arange(n)[None] / n)
    for k, (name, (low, high)) in enumerate(TRAITS.items()):
        value = getattr(traits, name)
        assert value.shape == (1, 1, 1)
        assert abs(value.item() - low - (high - low) * k / n) < 1e-6, name


def test_every_trait_is_seen():
    """Half a range more or less moves some pixel of some of twenty faces by 2% at least."""
    before = numbers(20)
    faces_before = draw_faces(before)
    for k, name in enumerate(TRAITS):
        after = before.clone()
        after[:, k] = (before[:, k] + 0.5) % 1
        moved = (draw_faces(after) - faces_before).abs()
        assert moved.max() > 0.02, name


def test_no_two_faces_are_alike():
    """Of 300 faces the two nearest differ by more than 3% (RMS over all pixels)."""
    x = draw_faces(numbers(300)).flatten(1)
    distance, _ = celeba_latent.neighbours(x, x, 2)  # the nearest is the face itself
    assert distance.min() / x.shape[1] ** 0.5 > 0.03


def test_faces_can_be_drawn_at_any_size():
    """At 64 px, averaged to 32, they are nearly those at 32 px (1.2%; with hard edges 1.4%), each alone too (1e-6)."""
    small = draw_faces(numbers(50), 32)
    large = draw_faces(numbers(50), 64)
    assert small.shape == (50, 3, 32, 32) and large.shape == (50, 3, 64, 64)
    assert small.min() >= 0 and small.max() <= 1
    assert (F.avg_pool2d(large, 2) - small).abs().mean() < 0.012
    alone = draw_faces(numbers(50)[7:8])
    assert torch.allclose(alone, small[7:8], atol=1e-6)


# ═══ celeba_latent.py 2: autoencoders ═══════════════════════════════════════════════════════


@exact
@pytest.mark.parametrize("factor, channels", [(4, 5), (8, 32)])
def test_components_lose_exactly_the_variance_they_leave_out(factor, channels):
    """The squared error and the share that is kept are numpy's eigenvalues of the patches' covariance (1e-9).

    The pictures lie around ½, so that nothing is clamped.
    """
    x = 0.5 + 0.03 * F.avg_pool2d(torch.randn(40, 3, 16, 16), 3, 1, 1)
    patches = scflow.patchify(x, factor).flatten(0, 1).numpy()  # (40·h·w, 3·factor²)
    values = np.linalg.eigvalsh(np.cov(patches.T))  # the largest come last
    left_out = values[:-channels].sum()

    net = PatchPCA(factor, channels)
    kept = net.fit(x)
    assert abs(kept - 1 + left_out / values.sum()) < 1e-9
    z = net.encode(x)
    assert z.shape == (40, channels, 16 // factor, 16 // factor)
    error = (net.decode(z) - x).square().sum() / (len(patches) - 1)
    assert abs(error - left_out) < 1e-9 * values.sum()


@exact
def test_all_components_and_no_autoencoder_lose_nothing():
    """decode(encode(x)) is x for oblong pictures too: with 3·factor² components to 1e-12, with `none` bitwise."""
    x = torch.rand(30, 3, 8, 12)
    net = PatchPCA(2, 12)
    net.fit(x)
    assert torch.allclose(net.decode(net.encode(x)), x, atol=1e-12)
    none = celeba_latent.autoencoder("none", 8, 32)
    assert torch.equal(none.encode(x), x)
    assert torch.equal(none.decode(x), x)


def tiny_pair(prefix, channels=4, pool=False):
    """Random weights as the two files of a TAESD pair."""
    net = TinyAutoencoder(channels, pool, width=8)
    for weight in net.parameters():
        weight.data *= 1.6  # else values fade from layer to layer
    net.decoder[-1].bias.data += 0.5  # pictures around grey
    encoder = net.encoder.state_dict()
    decoder = net.decoder.state_dict()
    torch.save(encoder, f"{prefix}_encoder.pth")
    torch.save(decoder, f"{prefix}_decoder.pth")
    return encoder, decoder


def plain_conv(w, name, x, stride=1):
    """A 3×3 convolution, from weights by their names in the published files."""
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding=1)


def plain_block(w, name, x, pool=False):
    if pool:
        h = F.conv2d(x, w[f"{name}.pool.0.weight"])
        h = F.group_norm(h, 4, w[f"{name}.pool.1.weight"], w[f"{name}.pool.1.bias"])
        x = x + F.conv2d(h.relu(), w[f"{name}.pool.3.weight"])
    h = plain_conv(w, f"{name}.conv.0", x).relu()
    h = plain_conv(w, f"{name}.conv.2", h).relu()
    h = plain_conv(w, f"{name}.conv.4", h)
    return (x + h).relu()


def plain_encoder(w, x, pool):
    x = plain_conv(w, 0, x)
    x = plain_block(w, 1, x)
    for i in (2, 6, 10):
        x = plain_conv(w, i, x, stride=2)
        for k in (1, 2, 3):
            x = plain_block(w, i + k, x, pool and i == 10)
    return plain_conv(w, 14, x)


def plain_decoder(w, z, pool):
    x = 3 * (z / 3).tanh()
    x = plain_conv(w, 1, x).relu()
    for i in (3, 8, 13):
        for k in (0, 1, 2):
            x = plain_block(w, i + k, x, pool and i == 3)
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = plain_conv(w, i + 4, x)
    x = plain_block(w, 18, x)
    return plain_conv(w, 19, x).clamp(0, 1)


@pytest.mark.parametrize("channels, pool", [(4, False), (32, True)])
def test_a_tiny_autoencoder_equals_a_plain_implementation(channels, pool, tmp_path):
    """Read from its two files, and from a checkpoint after that, it agrees with layer by layer (1e-4: float32)."""
    encoder, decoder = tiny_pair(tmp_path / "pair", channels, pool)
    x = torch.rand(2, 3, 32, 48)
    z = 4 * torch.randn(2, channels, 3, 2)
    latents = plain_encoder(encoder, x, pool)
    pictures = plain_decoder(decoder, z, pool)
    inside = (pictures > 0) & (pictures < 1)
    assert inside.double().mean() > 0.3

    net = celeba_latent.autoencoder(str(tmp_path / "pair"), 32, 99)
    scflow.save(tmp_path / "net.pt", net)
    for read in (net, scflow.load(tmp_path / "net.pt")):
        assert torch.allclose(read.encode(x), latents, rtol=1e-4, atol=1e-4 * latents.abs().max().item())
        assert torch.allclose(read.decode(z), pictures, atol=1e-4)


# ═══ celeba_latent.py 3: what is compared ═══════════════════════════════════════════════════


def test_thumbnails_are_means_of_pixels():
    """From 64 px the means of 2×2 pixels, to one level (a half is rounded either way); at 32 px the pixels."""
    x = drawings(6, 64)
    thumbs, _ = celeba_latent.picture_features(x)
    means = x.reshape(6, 3, 32, 2, 32, 2).float().mean((3, 5)).round()
    assert (thumbs.float() - means).abs().max() <= 1
    again, _ = celeba_latent.picture_features(thumbs)
    assert torch.equal(again, thumbs)


def test_textures_feel_a_pattern_that_thumbnails_do_not():
    """A fine chequered board has the thumbnail of even grey, and a texture of its own (30% of the grey's norm)."""
    square = torch.tensor([[200, 60], [60, 200]], dtype=torch.uint8)
    board = square.repeat(32, 32).expand(1, 3, 64, 64)
    grey = torch.full_like(board, 130)
    thumb, texture = celeba_latent.picture_features(board)
    grey_thumb, grey_texture = celeba_latent.picture_features(grey)
    assert torch.equal(thumb, grey_thumb)
    assert (texture - grey_texture).norm() > 0.3 * grey_texture.norm()


def moments(n, mean, root):
    """Rows (n,d) whose sample mean and covariance are exactly `mean` and root·rootᵀ."""
    x = torch.randn(n, len(mean))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return mean + white.T @ root.T


@exact
def test_the_frechet_distance_of_known_gaussians():
    """‖m−m′‖² + tr C + tr C′ − 2Σ√λ, λ the eigenvalues of CC′ as numpy finds them, which do not commute (1e-9)."""
    m1, m2 = torch.randn(2, 4)
    a, b = torch.randn(2, 4, 4)
    found = celeba_latent.frechet_distance(moments(60, m1, a), moments(90, m2, b))
    values = np.linalg.eigvals((a @ a.T @ b @ b.T).numpy()).real
    traces = a.square().sum() + b.square().sum()
    expected = (m1 - m2).square().sum() + traces - 2 * np.sqrt(values).sum()
    assert abs(found - expected) < 1e-9


@pytest.mark.parametrize("rows", [(4, 9), (9, 4)])
def test_a_frechet_distance_of_few_rows_is_refused(rows):
    """As many rows as dimensions leave a covariance singular; one more do not."""
    x, y = (torch.randn(n, 4) for n in rows)
    refused(celeba_latent.frechet_distance, x, y, match="4 samples are too few")
    celeba_latent.frechet_distance(torch.randn(5, 4), torch.randn(5, 4))


@exact
@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_by_brute_force(k):
    """The k-th smallest of all distances from each row, and where it is (rounding: 1e-9)."""
    x = torch.randn(11, 3)
    y = torch.randn(7, 3)
    distance, index = celeba_latent.neighbours(x, y, k, rows=4)
    for i in range(11):
        lengths = (x[i] - y).norm(dim=1)
        nearest = lengths.argsort()[k - 1]
        assert index[i] == nearest
        assert abs(distance[i] - lengths[nearest]) < 1e-9


@exact
def test_coverage_by_brute_force():
    """A real row counts if a fake one is nearer than its second nearest other real row."""
    real = torch.randn(30, 2)
    fake = torch.randn(12, 2) + 0.5
    covered = 0
    for i in range(30):
        others = torch.cat([real[:i], real[i + 1 :]])
        radius = (others - real[i]).norm(dim=1).sort().values[1]
        if (fake - real[i]).norm(dim=1).min() <= radius:
            covered += 1
    assert 0 < covered < 30
    assert celeba_latent.knn_coverage(real, fake, k=2) == covered / 30


@pytest.fixture(scope="module")
def measured():
    """250 faces: thumbnails, textures, and the measure whose reference they are."""
    thumbs, textures = celeba_latent.features_of(drawings(250))
    measure = celeba_latent.PictureMeasure(thumbs, textures)
    return SimpleNamespace(thumbs=thumbs, textures=textures, measure=measure)


def test_layout_is_the_largest_components_of_the_thumbnails(measured):
    """The 64 features hold the variance of the 64 largest singular values, and their mean is 0 (1e-4: float32)."""
    flat = measured.thumbs.flatten(1).float() / 255
    largest = torch.linalg.svdvals(flat - flat.mean(0))[:64]
    layout = measured.measure.reference["layout"]
    assert abs(layout.square().sum() / largest.square().sum() - 1) < 1e-4
    assert layout.mean(0).abs().max() < 1e-4


def test_each_measure_sees_its_own_damage(measured):
    """The reference scores 0, 0 and 1 (1e-4). Darker is a matter of layout and coverage, rougher of texture."""
    itself = measured.measure(measured.thumbs, measured.textures)
    assert abs(itself["layout"]) < 1e-4 and abs(itself["texture"]) < 1e-4
    assert itself["coverage"] == 1

    darker = measured.measure(measured.thumbs // 2, measured.textures)
    assert darker["layout"] > 1 and darker["coverage"] < 0.5
    assert darker["texture"] == itself["texture"]

    rougher = measured.measure(measured.thumbs, 2 * measured.textures)
    assert rougher["texture"] > 1
    assert rougher["layout"] == itself["layout"] and rougher["coverage"] == 1


# ═══ celeba_latent.py 4: pictures ═══════════════════════════════════════════════════════════


def save_picture(path, picture, **options):
    """uint8 (3,H,W) as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, **options)


def read_back(path, size, picture, **options):
    """The picture as it is read after it was saved."""
    save_picture(path, picture, **options)
    return Pictures(path.parent).read(path.name, size)


@pytest.mark.parametrize("wide", [True, False])
def test_the_crop_is_the_central_square(wide, tmp_path):
    """Of a picture three squares long the middle one is read, bitwise where nothing is resized."""
    picture = drawings(1, 96)[0, :, :32]
    middle = picture[:, :, 32:64]
    if not wide:
        picture = picture.mT
        middle = middle.mT
    assert torch.equal(read_back(tmp_path / "a.png", 32, picture), middle)


def test_a_photograph_is_read_as_the_camera_was_held(tmp_path):
    """The EXIF orientation 6 is a quarter turn: the left column becomes the top row."""
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    picture[:, :, :4] = 200
    tag = Image.Exif()
    tag[0x0112] = 6
    assert torch.equal(read_back(tmp_path / "a.png", 16, picture, exif=tag), picture.mT)


@pytest.mark.parametrize("side", [96, 112, 70])
def test_pictures_are_resized_without_aliasing(side, tmp_path):
    """A fine chequered board becomes even grey at any zoom (3 of 255 levels), away from the edge."""
    board = (torch.arange(side)[:, None] + torch.arange(side)) % 2 * 255
    small = read_back(tmp_path / "board.png", 16, board.byte().expand(3, -1, -1))
    assert (small[:, 2:-2, 2:-2].float() - 127.5).abs().max() < 3


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_other_colours_become_rgb(mode, tmp_path):
    """Grey, transparent, indexed, black and white."""
    Image.new(mode, (40, 40)).save(tmp_path / "a.png")
    assert Pictures(tmp_path).read("a.png", 16).shape == (3, 16, 16)


# ═══ celeba_latent.py 5: latents ════════════════════════════════════════════════════════════

ATTRIBUTES = ["Dark_Skin", "Smiling", "Eyeglasses"]
ENCODE = "--size 32 --channels 4 --flips --batch 1 --quiet".split()
TEACH = "--teacher-steps 12 --teacher-batch 16 --quiet".split()
DISTIL = "--student-steps 12 --guidance 2 --quiet".split()


def faces(*argv):
    """Run a command in this process; returns its exit code."""
    return celeba_latent.main([str(word) for word in argv])


def encode_again(album, out, *changes):
    """Encode the album as it was, but for changes; returns the exit code."""
    images = ["--images", album / "pictures", "--labels", album / "labels.txt"]
    return faces("encode", *images, *ENCODE, "--out", out, *changes)


@pytest.fixture(scope="module")
def tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(celeba_latent.SIZES, "small", dict(dim=16, depth=1, heads=2))
        yield


@pytest.fixture(scope="module")
def album(tiny_networks, tmp_path_factory):
    """Forty pictures in three formats, files that are none, a list of attributes; their latents; a guided run."""
    folder = tmp_path_factory.mktemp("album")
    lines = []
    for i, picture in enumerate(drawings(40, 40)):
        name = f"{i:02d}.{['png', 'jpg', 'webp'][i % 3]}"
        if i % 5:
            picture = picture[:, :36]
        save_picture(folder / "pictures" / "ab"[i % 2] / name, picture)
        bits = [1 if i >> k & 1 else -1 for k in range(3)]
        lines.append(f"{name} {bits[0]:2d} {bits[1]:2d}  {bits[2]:2d}")
    save_picture(folder / "pictures/small.png", picture[:, :20])
    save_picture(folder / "pictures/.hidden.png", picture)
    whole = (folder / "pictures/a/00.png").read_bytes()
    (folder / "pictures/a/broken.PNG").write_bytes(whole[:900])
    (folder / "pictures/notes.txt").write_text("no picture")
    lines += ["small.png 1 1 1", "broken.PNG 1 1 1"]
    (folder / "labels.txt").write_text("\n".join(["42", " ".join(ATTRIBUTES), *lines, ""]))

    assert encode_again(folder, folder / "latents") == 0
    run = folder / "run"
    assert faces("teacher", "--latents", folder / "latents", "--out", run, *TEACH) == 0
    assert faces("distill", "--out", run, *DISTIL) == 0
    return folder


def folder_of_latents(folder):
    """All that a latents folder holds: the bytes of its arrays, and what meta.pt says."""
    content = scflow.read(folder / "meta.pt")
    for name in ("latents", "thumbs", "textures"):
        content[name] = (folder / f"{name}.npy").read_bytes()
    return content


def test_a_zip_is_encoded_like_the_folder(album, tmp_path):
    """Arrays, statistics and names are bitwise the same, whatever the order in the zip."""
    with zipfile.ZipFile(tmp_path / "album.zip", "w") as file:
        for path in sorted((album / "pictures").rglob("*"), reverse=True):
            file.write(path, path.relative_to(album / "pictures"))
    assert encode_again(album, tmp_path / "latents", "--images", tmp_path / "album.zip") == 0
    assert same(folder_of_latents(tmp_path / "latents"), folder_of_latents(album / "latents"))


def test_pictures_that_are_left_out_are_named(album, tmp_path, capsys):
    """The broken and the small one are counted, printed and recorded. Hidden and other files are no pictures."""
    assert encode_again(album, tmp_path / "latents") == 0
    said = capsys.readouterr().out
    assert "40 pictures" in said and "2 skipped" in said
    assert "small.png: too small (40×20)" in said
    assert "a/broken.PNG: cannot be read" in said
    meta = scflow.read(tmp_path / "latents/meta.pt")
    assert [name for name, _ in meta["skipped"]] == ["a/broken.PNG", "small.png"]
    assert len(set(meta["sources"])) == 40
    assert not any("hidden" in name for name in meta["sources"])


def originals(album, data):
    """The album's pictures in the order of their latents, uint8 (40,3,32,32)."""
    return torch.stack(Pictures(album / "pictures").read_all(data.meta["sources"], 32))


def test_each_picture_has_its_latent_and_its_mirror_image_the_next_row(album, tmp_path):
    """Rows 2i and 2i+1 are picture i and its mirror image (2e-3: float16), in batches with gaps too."""
    tiny_pair(tmp_path / "pair")
    assert encode_again(album, tmp_path / "latents", "--autoencoder", tmp_path / "pair", "--batch", 7) == 0
    data = Latents(tmp_path / "latents")
    x = originals(album, data) / 255
    net = scflow.load(tmp_path / "latents/meta.pt")
    stored = torch.tensor(data.arrays["latents"][:80]).float()
    scale = stored.abs().max()
    assert (stored[::2] - stored[1::2]).abs().max() > 0.03 * scale
    assert (stored[::2] - net.encode(x)).abs().max() < 2e-3 * scale
    assert (stored[1::2] - net.encode(x.flip(3))).abs().max() < 2e-3 * scale


def test_what_is_compared_is_kept_of_the_originals(album):
    """Thumbnails and textures of the pictures by number, as computed again (1e-4: float32 sums)."""
    data = Latents(album / "latents")
    which = torch.tensor([31, 2])
    thumbs, textures = data.originals(which)
    x = originals(album, data)[which]
    assert torch.equal(thumbs, x)  # at 32 px they are the pictures
    assert torch.allclose(textures, celeba_latent.picture_features(x)[1], atol=1e-4)


def test_latents_are_normalised_per_channel(album):
    """Mean 0 and deviation 1 in each, though the channels' own deviations differ (1e-3: float16)."""
    data = Latents(album / "latents")
    stored = data.arrays["latents"][:80].astype(np.float64)
    assert np.ptp(stored.std((0, 2, 3))) > 0.1
    z = data.normalised(torch.arange(40), mirrored=True).double()
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    assert (z.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["pca", "none"])
def test_the_codec_decodes_normalised_latents(name, album, tmp_path):
    """To what the autoencoder itself makes of the pictures (1.5 levels: float16, and rounding), in any batches."""
    assert encode_again(album, tmp_path / "latents", "--autoencoder", name) == 0
    data = Latents(tmp_path / "latents")
    x = originals(album, data)
    net = scflow.load(tmp_path / "latents/meta.pt")
    expected = 255 * net.decode(net.encode(x / 255))
    decoded = Codec(data.meta).decode(data.normalised(torch.arange(40)), batch=7)
    assert decoded.dtype == torch.uint8
    assert (decoded - expected).abs().max() < 1.5


def rows_of(x):
    """The rows of a tensor as a set."""
    return {tuple(row) for row in x.flatten(1).tolist()}


def test_a_tenth_is_held_out_and_never_trained_on(album):
    """4,000 rows of a batch are the other 36 pictures and their mirror images, all of them, and nothing else."""
    data = Latents(album / "latents")
    assert len(data.held_out) == 4
    assert sorted(data.held_out.tolist() + data.train.tolist()) == list(range(40))
    drawn, _ = data.batch("cpu")(4000, gen())
    trained = rows_of(data.normalised(data.train, mirrored=True))
    assert len(trained) == 72
    assert rows_of(drawn) == trained
    assert not trained & rows_of(data.normalised(data.held_out, mirrored=True))


def test_labels_are_those_of_the_pictures_that_were_encoded(album):
    """For each picture the signs in the line of its name, 1 for −1 and 2 for 1."""
    said = {}
    for line in (album / "labels.txt").read_text().splitlines()[2:]:
        name, *values = line.split()
        said[name] = [2 if value == "1" else 1 for value in values]
    data = Latents(album / "latents")
    assert data.attributes == ATTRIBUTES
    assert len(data.labels) == 40
    for name, label in zip(data.meta["sources"], data.labels.tolist()):
        assert label == said[Path(name).name]


def test_a_batch_tells_a_random_part_of_its_own_labels(album):
    """What is told of a row is the row's own. Half is told (0.03: 4 standard errors of 6,000 rows), often all or none.

    The share is uniform, so all of 3 are told in a quarter of the rows, and none in a quarter.
    """
    data = Latents(album / "latents")
    z, cond = data.batch("cpu")(6000, gen())
    known = data.normalised(data.train, mirrored=True)
    rows = torch.cdist(z.flatten(1), known.flatten(1)).argmin(1)
    labels = data.labels[data.train][rows // 2].long()
    told = cond > 0
    assert torch.equal(cond, labels * told)
    assert abs(told.double().mean() - 0.5) < 0.03
    assert abs(told.all(1).double().mean() - 0.25) < 0.03
    assert abs(told.any(1).double().mean() - 0.75) < 0.03


LISTS = {
    "": "begin with",
    "2\n": "begin with",
    "Smiling\nBright\na.png 1\n": "begin with",
    "1\nSmiling Bright\na.png 1\n": "line 3",
    "2\nSmiling\na.png 1\nb.png 0\n": "line 4",
    "3\nSmiling\na.png 1\nb.png -1\n": "lists 2",
    "1\nSmiling\na.png 1\n": "no line for",
}


@pytest.mark.parametrize("text", LISTS)
def test_a_bad_list_of_labels_is_one_line(text, album, tmp_path, capsys):
    """It names the file and what is wrong with it, and no folder is made."""
    (tmp_path / "list.txt").write_text(text)
    assert encode_again(album, tmp_path / "new", "--labels", tmp_path / "list.txt") == 2
    error = capsys.readouterr().err
    assert "list.txt" in error and LISTS[text] in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad, words", [(20, "none of the pictures"), (12, "20 are needed")])
def test_too_few_good_pictures_are_an_error(bad, words, tmp_path, capsys):
    """None, or next to none: one line that says why the first one was left out, and latents that train nothing."""
    for i, picture in enumerate(drawings(20)):
        save_picture(tmp_path / f"pictures/{i:02d}.png", picture[:, :10] if i < bad else picture)
    assert faces("encode", "--images", tmp_path / "pictures", *ENCODE, "--out", tmp_path / "latents") == 2
    error = capsys.readouterr().err
    assert words in error and "too small (32×10)" in error and error.count("\n") == 1
    assert faces("teacher", "--latents", tmp_path / "latents", "--out", tmp_path / "run") == 2


def with_ctrl_c(function, n):
    """The function, but in its n-th call Ctrl-C is pressed."""
    calls = itertools.count(1)

    def pressing(*args, **options):
        if next(calls) == n:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **options)

    return pressing


def said_stopped(capsys):
    """What is printed at Ctrl-C: one line with the way to go on."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return "--resume" in error


def test_an_encoding_that_was_stopped_resumes_bit_for_bit(album, tmp_path, monkeypatch, capsys):
    """Ctrl-C at the 21st good picture: it is still counted, the folder trains nothing, and the rest is encoded."""
    out = tmp_path / "latents"
    with monkeypatch.context() as patch:
        patch.setattr(celeba_latent, "picture_features", with_ctrl_c(celeba_latent.picture_features, 21))
        assert encode_again(album, out) == 130
    assert said_stopped(capsys)
    assert len(scflow.read(out / "meta.pt")["sources"]) == 21
    assert faces("teacher", "--latents", out, "--out", tmp_path / "run") == 2
    assert "unfinished" in capsys.readouterr().err

    calls = []
    monkeypatch.setattr(PatchPCA, "fit", calls.append)  # the components stay as they were fitted
    assert encode_again(album, out, "--resume") == 0
    assert not calls
    assert same(folder_of_latents(out), folder_of_latents(album / "latents"))


KILLED_IN_A_SAVE = """
import os, signal, sys
import torch
import celeba_latent

saves = []
save = torch.save

def half(content, file):
    saves.append(file)
    if len(saves) < int(sys.argv[1]):
        return save(content, file)
    file.write(b"half a file")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
celeba_latent.torch.set_num_threads(1)
celeba_latent.main(sys.argv[2:])
"""


def kill_in_save(n, *argv):
    """Run a command in a process that is killed half-way through its n-th save."""
    program = [sys.executable, "-c", KILLED_IN_A_SAVE, str(n), *(str(word) for word in argv)]
    folder = Path(celeba_latent.__file__).parent
    assert subprocess.run(program, cwd=folder, timeout=100).returncode == -signal.SIGKILL


posix = pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")


@posix
def test_an_encoding_that_was_killed_resumes_bit_for_bit(album, tmp_path):
    """Killed in its second save. The first one, after 16 pictures, is whole, and so is what comes of it."""
    out = tmp_path / "latents"
    images = ["--images", album / "pictures", "--labels", album / "labels.txt"]
    kill_in_save(2, "encode", *images, *ENCODE, "--out", out)
    assert scflow.read(out / "meta.pt")["done"] == 16
    assert encode_again(album, out, "--resume") == 0
    assert same(folder_of_latents(out), folder_of_latents(album / "latents"))


# ═══ celeba_latent.py 6: autoencoders of diffusers ══════════════════════════════════════════


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_an_autoencoder_of_diffusers(kind, album, tmp_path):
    """Latents are the mode of its posterior (1e-2: float16), and decode like the library's (2 of 255 levels)."""
    diffusers = pytest.importorskip("diffusers")
    if kind == "AutoencoderKL":
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        vae = diffusers.AutoencoderKL(**blocks, block_out_channels=[8, 8], norm_num_groups=4)
    else:
        widths = [8, 8, 8, 8]
        vae = diffusers.AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    vae.eval().requires_grad_(False)
    vae.save_pretrained(tmp_path / "vae")
    assert encode_again(album, tmp_path / "latents", "--autoencoder", tmp_path / "vae") == 0

    data = Latents(tmp_path / "latents")
    x = originals(album, data)[[0, 7]]
    out = vae.encode(2 * (x / 255) - 1)
    z = out.latent_dist.mode() if kind == "AutoencoderKL" else out.latents
    stored = torch.tensor(data.arrays["latents"][[0, 14]]).float()
    assert (stored - z).abs().max() < 1e-2 * z.abs().max()
    pictures = 255 * (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    decoded = Codec(data.meta).decode(data.normalised(torch.tensor([0, 7])))
    assert (decoded - pictures).abs().max() < 2
    assert not data.meta["weights"]  # the source is named, and not copied


LOADING = [
    "teacher --latents latents --out new",
    "distill --latents latents --out run --overwrite",
    "sample --out run",
    "evaluate --latents latents --out run",
]


@pytest.mark.parametrize("command", LOADING)
def test_a_source_in_a_foreign_file_is_not_fetched_unless_trusted(command, album, tmp_path, monkeypatch, capsys):
    """A stand-in for the library sees whether it may fetch. What to type, if one trusts it, is in the error."""
    shutil.copytree(album, tmp_path, dirs_exist_ok=True)
    arch = {"name": "Diffusers", "source": "some/vae"}
    edit(tmp_path / "latents/meta.pt", arch=arch, weights={})
    codec = {**scflow.read(tmp_path / "run/teacher.pt")["codec"], "arch": arch, "weights": {}}
    for name in ("teacher", "student"):
        edit(tmp_path / f"run/{name}.pt", codec=codec)
    asked = []

    def load_config(source, local_files_only):
        asked.append((source, local_files_only))
        raise OSError("it is not here")

    library = SimpleNamespace(AutoencoderKL=SimpleNamespace(load_config=load_config))
    monkeypatch.setitem(sys.modules, "diffusers", library)
    monkeypatch.setattr(celeba_latent, "TRUSTED", set())
    monkeypatch.chdir(tmp_path)
    assert faces(*command.split()) == 2
    assert "--trust-autoencoder some/vae" in capsys.readouterr().err
    assert faces(*command.split(), "--trust-autoencoder", "some/vae") == 2
    assert asked == [("some/vae", True), ("some/vae", False)]


# ═══ celeba_latent.py 7: teacher and student ════════════════════════════════════════════════


def edit(path, **changes):
    """Change entries of a weights file."""
    torch.save({**scflow.read(path), **changes}, path)


def log_of(run):
    """The log without empty cells, and without the speeds, which no run has twice."""
    rows = []
    with open(run / "log.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            del row["images_per_s"]
            rows.append({name: value for name, value in row.items() if value != ""})
    return rows


def same_run(run, album, name):
    """Weights, averages, optimisers and random numbers are bitwise those of the album's run, and so is the log."""
    ours = scflow.read(run / f"{name}.pt")
    theirs = scflow.read(album / f"run/{name}.pt")
    rows = log_of(run)
    equal = same(ours["weights"], theirs["weights"]) and same(ours["state"], theirs["state"])
    return equal and rows == log_of(album / "run")[: len(rows)]


def taught(album, run):
    """A new run folder with the album's teacher."""
    run.mkdir()
    for name in ("teacher.pt", "config.json"):
        shutil.copy(album / "run" / name, run)
    return run


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_training_that_was_stopped_resumes_bit_for_bit(name, album, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the seventh update: it is finished and saved, and the run ends as if it had never stopped."""
    run = tmp_path / "run"
    command = ["teacher", "--latents", album / "latents", "--out", run, *TEACH]
    if name == "student":
        taught(album, run)
        command = ["distill", "--out", run, *DISTIL]
    with monkeypatch.context() as patch:
        patch.setattr(scflow, "lr_factor", with_ctrl_c(scflow.lr_factor, 7))
        assert faces(*command) == 130
    assert said_stopped(capsys)
    assert scflow.read(run / f"{name}.pt")["state"]["step"] == 7
    assert faces(*command, "--resume") == 0
    assert same_run(run, album, name)


@posix
def test_a_training_that_was_killed_resumes_bit_for_bit(album, tmp_path):
    """Killed in the save after update 12, in the second phase: the one after update 10 is whole."""
    run = taught(album, tmp_path / "run")
    command = ["distill", "--out", run, *DISTIL, "--save-every", 5]
    kill_in_save(3, *command)
    assert scflow.read(run / "student.pt")["state"]["step"] == 10
    assert faces(*command, "--resume") == 0
    assert same_run(run, album, "student")


def test_a_new_student_takes_the_place_of_the_old(album, tmp_path):
    """--overwrite: the measures of the old one go, the same seed gives the same again, another seed another."""
    run = tmp_path / "run"
    shutil.copytree(album / "run", run)
    (run / "metrics.json").write_text("{}")
    assert faces("distill", "--out", run, *DISTIL, "--overwrite") == 0
    assert not (run / "metrics.json").exists()
    assert same_run(run, album, "student")
    assert faces("distill", "--out", run, *DISTIL, "--overwrite", "--seed", 1) == 0
    assert not same_run(run, album, "student")


def test_guidance_is_of_the_teacher(album, tmp_path):
    """A student of the teacher without guidance becomes another one, and its file says which it had."""
    run = taught(album, tmp_path / "run")
    assert faces("distill", "--out", run, *DISTIL, "--guidance", 1) == 0
    ours = scflow.read(run / "student.pt")
    theirs = scflow.read(album / "run/student.pt")
    assert ours["plan"]["guidance"] == 1 and theirs["plan"]["guidance"] == 2
    assert not same(ours["weights"], theirs["weights"])


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_checkpoints_are_plain_and_complete(name, album):
    """The file alone gives the average, the network that samples, and the codec; all in float32, without prefixes."""
    content = scflow.read(album / f"run/{name}.pt")
    state = content["state"]
    parts = {"teacher": scflow.TeacherRun.PARTS, "student": scflow.StudentRun.PARTS}
    assert state["parts"].keys() == set(parts[name])
    assert state["step"] == 12
    net = scflow.load(album / f"run/{name}.pt")
    assert net.shape == (4, 4, 4)
    assert same(dict(net.state_dict()), dict(state["parts"]["ema"]))
    for key, weight in content["weights"].items():
        assert weight.dtype == torch.float32
        assert "_orig_mod" not in key
    meta = scflow.read(album / "latents/meta.pt")
    for key, value in content["codec"].items():
        assert same(value, meta[key])


@pytest.fixture
def compiled(monkeypatch):
    """The modules that were compiled, by torch's own graphs but without a compiler."""
    found = []
    compiler = torch.compile

    def eager(function, **options):
        found.append(function.__self__)
        return compiler(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", eager)
    return found


def kinds_of(modules):
    return sorted(type(module).__name__ for module in modules)


def test_compiled_training_saves_the_same_plain_weights(album, tmp_path, compiled):
    """The teacher's block, and then those of student, target, frozen copy and teacher, and the critic."""
    run = tmp_path / "run"
    assert faces("teacher", "--latents", album / "latents", "--out", run, *TEACH, "--compile", "yes") == 0
    assert kinds_of(compiled) == ["Block"]
    compiled.clear()
    assert faces("distill", "--out", run, *DISTIL, "--compile", "yes") == 0
    assert kinds_of(compiled) == ["Block"] * 4 + ["LatentCritic"]
    assert same_run(run, album, "student")


def test_a_critic_with_r1_is_not_compiled(album, tmp_path, compiled):
    """A compiled graph has no second derivative."""
    run = taught(album, tmp_path / "run")
    paper = ["--preset", "paper", "--warmup", "1", "--student-steps", "2"]
    assert faces("distill", "--out", run, *paper, "--compile", "yes", "--quiet") == 0
    assert kinds_of(compiled) == ["Block"] * 4


PRESETS = {
    "two_phase": {"self", "adv", "critic"},
    "paper": {"consistency", "adv", "self", "bi", "critic", "r1"},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run_in_both_precisions(preset, precision, album, tmp_path, monkeypatch):
    """All their losses are finite. Networks and critic compute in the precision, and their weights stay float32."""
    run = taught(album, tmp_path / "run")
    short = ["--preset", preset, "--student-steps", 12, "--student-batch", 8, "--quiet"]
    if preset == "paper":
        short += ["--warmup", 2]
    seen = []
    distill = scflow.distill

    def spy(velocity, critic, *args, student, **options):
        seen.extend([student.precision, critic.precision])
        return distill(velocity, critic, *args, student=student, **options)

    monkeypatch.setattr(scflow, "distill", spy)
    assert faces("distill", "--out", run, *short, "--precision", precision) == 0
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert seen == [expected[precision]] * 2
    last = log_of(run)[-1]
    assert last.keys() == PRESETS[preset] | {"stage", "step"}
    assert all(math.isfinite(float(last[name])) for name in PRESETS[preset])
    weights = scflow.read(run / "student.pt")["weights"]
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_the_log_counts_images_per_second_of_training(tmp_path, monkeypatch):
    """An update of 8 pictures takes half a second here: 16 a second. The pause after it, for a sheet, is left out."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(celeba_latent, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def loop():
        for step in range(1, 22):
            clock.now += 0.5
            yield SimpleNamespace(step=step, losses={"flow": 1.0}, phase=SimpleNamespace(batch=8))

    asked = celeba_latent.Train(quiet=True, save_every=100)
    file = celeba_latent.RunFile(tmp_path, "student", asked, "cpu")
    for _ in file.follow(loop(), total=100):
        clock.now += 30
    assert [row["step"] for row in file.rows] == [1, 11, 21]
    assert [row["images_per_s"] for row in file.rows] == [16.0, 16.0, 16.0]


# ═══ celeba_latent.py 8: samples ════════════════════════════════════════════════════════════


def samples(weights, *argv, steps=1):
    """Five pictures, uint8 (5,32,32,3), that `sample` writes here."""
    assert faces("sample", "--out", weights, "--count", 5, "--file", "samples.npz", "--steps", steps, *argv) == 0
    return np.load(f"samples-{steps}.npz")["pictures"]


@pytest.fixture
def lively(album, tmp_path, monkeypatch):
    """A weights file of a student whose pictures depend on everything; the current folder holds it alone."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(album / "run/student.pt", "lively.pt")
    net = scramble(scflow.load("lively.pt").requires_grad_(False))
    edit("lively.pt", weights=net.state_dict())
    return Path("lively.pt")


def test_samples_are_decoded_steps_of_the_network(lively):
    """By hand from the weights file: seeded noise, Euler steps, statistics, components (1 of 255 levels)."""
    codec = scflow.read(lively)["codec"]
    net = scflow.load(lively)
    noise = torch.randn(5, 4, 4, 4, generator=gen(3))
    for steps in (1, 2):
        z = scflow.sample(net, noise, steps) * codec["std"] + codec["mean"]
        patches = z.flatten(2).mT @ codec["weights"]["basis"].T + codec["weights"]["mean"]
        expected = 255 * scflow.unpatchify(patches, 8, 32, 32).clamp(0, 1).permute(0, 2, 3, 1)
        found = samples(lively, "--seed", 3, steps=steps)
        assert found.dtype == np.uint8
        assert np.abs(found - expected.numpy()).max() < 1


def test_samples_come_from_the_run_or_from_the_weights_file_alone(lively):
    """The same pictures; another seed gives others."""
    os.mkdir("run")
    shutil.copy(lively, "run/student.pt")
    assert np.array_equal(samples("run"), samples(lively))
    assert not np.array_equal(samples("run"), samples("run", "--seed", 1))


def test_a_grid_holds_the_samples(lively):
    """Row by row in three columns, the place that is left is white."""
    pictures = samples(lively)
    assert faces("sample", "--count", 5, "--out", lively, "--file", "grid.png") == 0
    with Image.open("grid-1.png") as image:
        grid = np.asarray(image)
    assert grid.shape == (64, 96, 3)
    for i, picture in enumerate(pictures):
        top = 32 * (i // 3)
        left = 32 * (i % 3)
        assert np.array_equal(grid[top : top + 32, left : left + 32], picture)
    assert (grid[32:, 64:] == 255).all()


def test_renoised_samples_are_reproducible(lively):
    """What re-noising adds is seeded too: the same pictures twice, others with another seed or by Euler's steps."""
    first = samples(lively, "--solver", "renoise", "--seed", 0, steps=2)
    torch.manual_seed(123)
    assert np.array_equal(first, samples(lively, "--solver", "renoise", "--seed", 0, steps=2))
    assert not np.array_equal(first, samples(lively, "--solver", "renoise", "--seed", 1, steps=2))
    assert not np.array_equal(first, samples(lively, "--solver", "euler", "--seed", 0, steps=2))


def test_samples_are_asked_for_by_their_attributes(lively):
    """NAME=1 is the token 2, NAME=0 is 1, what is not named is open: other wishes, other pictures of the same noise."""
    cond = celeba_latent.wanted(["Eyeglasses=0", "Smiling=1"], ATTRIBUTES, 2)
    assert cond.tolist() == [[0, 2, 1], [0, 2, 1]]
    yes = samples(lively, "--attributes", "Smiling=1")
    no = samples(lively, "--attributes", "Smiling=0")
    either = samples(lively)
    assert not np.array_equal(yes, no)
    assert not np.array_equal(yes, either)


def test_each_sample_keeps_its_noise_and_condition_in_any_batches(lively):
    """In batches of two the pictures are those of one batch (1 level: float32 sums)."""
    net, codec = celeba_latent.load_run(lively, "cpu")
    noise = torch.randn(5, 4, 4, 4)
    cond = torch.randint(0, 3, (5, 3))
    together = celeba_latent.generate(net, noise, 1, codec, cond=cond)
    apart = celeba_latent.generate(net, noise, 1, codec, cond=cond, batch=2)
    assert (apart.int() - together.int()).abs().max() <= 1


# ═══ celeba_latent.py 9: the demo and its measures ══════════════════════════════════════════

DEMO = "--drawings 2100 --count 1000 --teacher-steps 12 --student-steps 12 --quiet".split()


@pytest.fixture(scope="module")
def demo(tiny_networks, tmp_path_factory):
    """The run folder of a short demo; its latents lie beside it."""
    run = tmp_path_factory.mktemp("demo") / "run"
    assert faces("demo", *DEMO, "--out", run) == 0
    return run


def test_a_demo_that_was_stopped_while_it_encoded_goes_on(demo, tmp_path, monkeypatch):
    """--resume encodes the rest bit for bit, and starts to train; with a run there, it resumes the training too."""
    commands = []
    for name in ("teacher", "distill", "evaluate"):
        monkeypatch.setattr(celeba_latent, f"{name}_command", commands.append)
    argv = ["demo", *DEMO, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(celeba_latent, "picture_features", with_ctrl_c(celeba_latent.picture_features, 2))
        assert faces(*argv) == 130
    assert not commands

    assert faces(*argv, "--resume") == 0
    assert same(folder_of_latents(tmp_path / "run-latents"), folder_of_latents(Path(f"{demo}-latents")))
    assert ["--resume" in command for command in commands] == [False, False, False]

    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    assert faces(*argv, "--resume") == 0
    assert ["--resume" in command for command in commands[3:]] == [True, True, False]


def test_the_demo_measures_both_networks(demo):
    """A row for each network and number of steps, all finite. A sample of one step has no gap to itself."""
    metrics = read_metrics(demo)
    rows = [(row["who"], row.get("nfe")) for row in metrics["rows"]]
    expected = [("autoencoder", None), ("teacher", 1), ("teacher", 50)]
    expected += [("student", 1), ("student", 2), ("student", 4), ("student", 8)]
    assert rows == expected
    assert (metrics["samples"], metrics["held_out"], metrics["train"]) == (1000, 210, 1890)
    for row in metrics["rows"][1:]:
        for name in ("layout", "texture", "coverage", "gap", "novelty"):
            assert math.isfinite(row[name])
        assert (row["gap"] == 0) == (row["nfe"] == 1)


def test_the_table_shows_distances_less_their_floor(demo):
    """Layout and texture of every row less the floor, coverage as it is, and the floor itself in the heading."""
    metrics = read_metrics(demo)
    floor = metrics["floor"]
    text = (demo / "metrics.md").read_text()
    assert "1000 samples against 210 held-out pictures" in text
    assert f"layout {floor['layout'][0]:.4f} ± {floor['layout'][1]:.4f}" in text
    lines = text.splitlines()[-len(metrics["rows"]) :]
    for line, row in zip(lines, metrics["rows"]):
        cells = [cell.strip() for cell in line.split("|")]
        layout = row["layout"] - floor["layout"][0]
        texture = row["texture"] - floor["texture"][0]
        assert cells[1:3] == [row["who"], str(row.get("nfe", ""))]
        assert cells[3:6] == [f"{layout:.4f}", f"{texture:.4f}", f"{row['coverage']:.4f}"]


@pytest.mark.parametrize("name", ["teacher", "student", "neighbours"])
def test_the_demo_draws_sheets(name, demo):
    """With many colours."""
    with Image.open(demo / f"{name}.png") as image:
        colours = image.convert("RGB").getcolors(10**6)
    assert len(colours) > 50


@pytest.fixture(scope="module")
def judged(demo, tmp_path_factory):
    """An evaluation in which decoded pictures stand for samples: held-out ones for the teacher's, and for the
    student's those that it was trained on. More than one step moves all of them by 8 levels. The pictures have
    attributes, and the student's teacher was guided at 2.
    """
    folder = tmp_path_factory.mktemp("judged")
    run = shutil.copytree(demo, folder / "run")
    latents = shutil.copytree(f"{demo}-latents", folder / "latents")
    names = ["Left", "Right"]
    labels = torch.randint(1, 3, (2100, 2), generator=gen(), dtype=torch.uint8)
    edit(latents / "meta.pt", attributes=names, labels=labels)
    for name in ("teacher", "student"):
        edit(run / f"{name}.pt", attributes=names)
    plan = scflow.read(run / "student.pt")["plan"]
    edit(run / "student.pt", plan={**plan, "guidance": 2.0})

    data = Latents(latents)
    order = torch.randperm(len(data.train), generator=gen())
    pictures = {
        "teacher": Codec(data.meta).decode(data.normalised(data.held_out.repeat(5)[:1000])),
        "student": Codec(data.meta).decode(data.normalised(data.train[order[:1000]])),
    }
    student = scflow.load(run / "student.pt").state_dict()
    conds = []
    sheets = {}

    def generate(net, noise, steps, codec, cond=None):
        conds.append(cond)
        is_student = hasattr(net, "state_dict") and same(net.state_dict(), student)
        found = pictures["student" if is_student else "teacher"]
        return found if steps == 1 else found ^ 8

    def draw_sheet(path, columns):
        sheets[path.name] = columns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(celeba_latent, "generate", generate)
        patch.setattr(celeba_latent, "draw_sheet", draw_sheet)
        assert faces("evaluate", "--out", run, "--latents", latents, "--count", 1000) == 0
    rows = {}
    for row in read_metrics(run)["rows"]:
        rows[row["who"], row.get("nfe")] = row
    floor = read_metrics(run)["floor"]
    return SimpleNamespace(rows=rows, floor=floor, conds=conds, sheets=sheets, data=data)


def test_held_out_pictures_beat_the_floor_and_are_new(judged):
    """The floor's training pictures are twice as far away, at least. Held-out ones are as new as they are (10%)."""
    row = judged.rows["teacher", 1]
    assert row["layout"] < 0.5 * judged.floor["layout"][0]
    assert row["coverage"] == 1
    assert abs(row["novelty"] - 1) < 0.1


def test_training_pictures_are_as_good_as_the_autoencoder_and_copies(judged):
    """They are another thousand of those that the row of the autoencoder has (4 deviations); novelty sees them."""
    row = judged.rows["student", 1]
    autoencoder = judged.rows["autoencoder", None]
    for name in ("layout", "texture"):
        mean, deviation = judged.floor[name]
        assert mean > 0
        assert abs(row[name] - autoencoder[name]) < 4 * deviation
    assert row["novelty"] < 0.5


def test_the_gap_is_to_the_sample_of_one_step(judged):
    """8 of 255 levels, for every network and any number of steps (1e-6: float32)."""
    for (who, nfe), row in judged.rows.items():
        if who != "autoencoder":
            expected = 0 if nfe == 1 else 8 / 255
            assert abs(row["gap"] - expected) < 1e-6


def test_the_sheet_of_neighbours_shows_the_nearest_training_pictures(judged):
    """The student's pictures are decoded training pictures here: the nearest of each is itself, bitwise."""
    sheet = judged.sheets["neighbours.png"]
    assert list(sheet) == ["student 1", "nearest"]
    assert len(sheet["nearest"]) == 8
    assert torch.equal(sheet["nearest"], sheet["student 1"])


def test_evaluation_asks_for_attributes_as_often_as_they_are_found(judged):
    """All networks get the same labels, whole ones of a thousand pictures: each token in half the rows (|z| < 4)."""
    first = judged.conds[0]
    assert first.shape == (1000, 2)
    assert all(torch.equal(cond, first) for cond in judged.conds)
    assert set(first.flatten().tolist()) == {1, 2}
    assert abs(first.double().mean() - 1.5) < 4 * 0.5 / 2000**0.5


def test_a_guided_teacher_has_a_row_of_its_own(judged):
    """Two evaluations a step: 100 for 50 steps."""
    assert ("teacher, guided at 2", 100) in judged.rows


def test_the_floor_is_of_training_pictures_as_many_as_samples(album):
    """Five draws, without repetition; of the numbers 1 to 5 the mean is 3, and the deviation √2.5 (1e-12)."""
    data = Latents(album / "latents")
    trained = rows_of(data.originals(data.train)[0])
    drawn = []

    def measure(thumbs, textures):
        drawn.append(rows_of(thumbs))
        return {"layout": len(drawn)}

    floor, _ = celeba_latent.floor_of(measure, data, 30, gen())
    mean, deviation = floor["layout"]
    assert mean == 3 and abs(deviation - math.sqrt(2.5)) < 1e-12
    for rows in drawn:
        assert len(rows) == 30 and rows <= trained


def test_the_floor_needs_as_many_training_pictures_as_samples(demo, capsys):
    """1,891 samples cannot be compared with 1,890 pictures: one line, and the measures stay."""
    before = contents(demo)
    assert faces("evaluate", "--out", demo, "--count", 1891) == 2
    error = capsys.readouterr().err
    assert "as many training pictures for the floor, and there are 1890" in error and error.count("\n") == 1
    assert contents(demo) == before


def test_fid_is_taken_between_samples_and_held_out_originals(album, monkeypatch):
    """The library gets rows uint8 (3,S,S): all samples, and the held-out pictures themselves."""
    given = {}

    def calculate_metrics(input1, input2, fid, verbose):
        given["ours"] = torch.stack(list(input1))
        given["theirs"] = torch.stack(list(input2))
        return {"frechet_inception_distance": 12.5}

    library = SimpleNamespace(calculate_metrics=calculate_metrics)
    monkeypatch.setitem(sys.modules, "torch_fidelity", library)
    data = Latents(album / "latents")
    pictures = drawings(7)
    assert celeba_latent.inception_fid(pictures, data, album / "pictures") == 12.5
    assert torch.equal(given["ours"], pictures)
    assert torch.equal(given["theirs"], originals(album, data)[data.held_out])

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if it were not installed
    refused(celeba_latent.inception_fid, pictures, data, album / "pictures", match="pip install torch-fidelity")


# ═══ celeba_latent.py 10: commands and bad input ════════════════════════════════════════════


@pytest.mark.parametrize("command", ["teacher", "distill"])
def test_help_shows_the_default_size_and_preset(command, monkeypatch, capsys):
    """Behind every text the value of `small` or, where they differ, the values of both phases of `two_phase`."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        faces(command, "--help")
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    settings = {"teacher": (celeba_latent.TEACHERS["small"],), "distill": celeba_latent.SCHEDULES["two_phase"]}
    for name, text in toy_2d.help_texts(type(settings[command][0])).items():
        values = [str(getattr(part, name)) for part in settings[command]]
        if len(set(values)) == 1:
            values = values[:1]
        assert f"{text} [{' '.join(values)}]" in said


def shorten(path):
    """Cut a file in half."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.fixture(scope="module")
def troubles(album, tmp_path_factory):
    """A copy of the album in order, and beside it everything that can be wrong."""
    at = tmp_path_factory.mktemp("troubles")
    shutil.copytree(album, at, dirs_exist_ok=True)
    config = json.loads((at / "run/config.json").read_text())
    (at / "run/config.json").write_text(json.dumps({**config, "latents": "latents"}))

    def copy_of(source, name):
        return shutil.copytree(at / source, at / name)

    # Latents. In each folder one thing is wrong.
    data = Latents(at / "latents")
    stored = np.load(at / "latents/latents.npy")
    infinite = stored.copy()
    infinite[2 * data.train[0]] = np.inf
    unseen = stored.copy()
    unseen[2 * data.held_out[0]] = np.nan
    arrays = {"infinite": infinite, "unseen": unseen, "oblong": stored[:, :, :2], "short": stored[:79]}
    arrays["wide"] = (8 * stored).astype(np.float16)
    arrays["words"] = stored.astype("U3")
    for name, array in arrays.items():
        np.save(copy_of("latents", name) / "latents.npy", array)
    shorten(copy_of("latents", "cut") / "thumbs.npy")
    shorten(copy_of("latents", "damaged") / "meta.pt")
    (copy_of("latents", "gone") / "textures.npy").unlink()
    edit(copy_of("latents", "half") / "meta.pt", complete=False)
    edit(copy_of("latents", "other") / "meta.pt", mean=data.meta["mean"] + 0.1)
    edit(copy_of("latents", "plain") / "meta.pt", attributes=[])

    # Runs.
    (taught(album, at / "untaught") / "teacher.pt").unlink()
    taught(album, at / "unfinished")
    state = scflow.read(at / "run/teacher.pt")["state"]
    edit(at / "unfinished/teacher.pt", state={**state, "step": 2})
    shutil.copy(at / "run/student.pt", taught(album, at / "swapped") / "teacher.pt")
    (taught(album, at / "unread") / "config.json").write_text("{")
    (taught(album, at / "moved") / "config.json").write_text(json.dumps({**config, "latents": "nowhere"}))
    for name in ("teacher.pt", "student.pt"):
        edit(copy_of("run", f"plain-{name}") / name, attributes=[])
    state = scflow.read(at / "run/student.pt")["state"]
    edit(copy_of("run", "gpu") / "student.pt", state={**state, "generator": torch.zeros(16, dtype=torch.uint8)})

    # Pictures, autoencoders, weights.
    os.mkdir(at / "empty")
    scflow.save(at / "points.pt", scflow.MLP(width=8))
    shutil.copy(at / "points.pt", at / "damaged.zip")
    shorten(at / "damaged.zip")
    for name in ("alone", "cut-pair", "foreign"):
        tiny_pair(at / name)
    (at / "alone_decoder.pth").unlink()
    shorten(at / "cut-pair_encoder.pth")
    shutil.copy(at / "points.pt", at / "foreign_encoder.pth")
    return at


FACES_ERRORS = {
    "": "name a command",
    "train": "name a command",
    "demo --drawing 3": "--drawing",
    "demo --drawings 0": "drawings",
    "demo --device tpu9": "tpu9",
    "encode --out new": "--images",
    "encode --images nowhere --out new": "nowhere",
    "encode --images empty --out new": "empty",
    "encode --images labels.txt --out new": "neither a folder nor",
    "encode --images damaged.zip --out new": "whole zip",
    "encode --images points.pt --out new": "holds no",
    "encode --images pictures --out new --size 36": "multiple of 8",
    "encode --images pictures --out new --size 32 --channels 193": "1 to 192",
    "encode --images pictures --out new --channels 0": "channels",
    "encode --images pictures --out new --batch -1": "batch",
    "encode --images pictures --out new --autoencoder alone": "alone_decoder.pth",
    "encode --images pictures --out new --autoencoder cut-pair": "cut-pair_encoder.pth",
    "encode --images pictures --out new --autoencoder foreign": "TAESD",
    "encode --images pictures --out new --autoencoder some/vae": "pip install 'diffusers",
    "encode --images pictures --out new --labels nowhere.txt": "nowhere.txt",
    "encode --images pictures --out latents --size 32": "--overwrite",
    "encode --images pictures --out new --resume --overwrite": "contradict",
    "encode --images pictures --out new --resume": "nothing to resume",
    "encode --images pictures --out latents --size 32 --resume": "with other settings",
    "encode --images pictures --out pictures --overwrite": "left alone",
    "encode --images pictures --out /dev/null/latents": "cannot write",
    "teacher --out new": "run encode",
    "teacher --out new --latents nowhere": "nowhere",
    "teacher --out new --latents pictures": "meta.pt",
    "teacher --out new --latents half": "--resume",
    "teacher --out new --latents damaged": "meta.pt",
    "teacher --out new --latents oblong": "(84, 4, 2, 4), not (80, 4, 4, 4)",
    "teacher --out new --latents short": "(79, 4, 4, 4), not (80",
    "teacher --out new --latents words": "words/latents.npy",
    "teacher --out new --latents infinite": "not finite",
    "teacher --out new --latents unseen": "not finite",
    "teacher --out new --latents wide": "deviation of 8",
    "teacher --out new --latents cut": "thumbs.npy",
    "teacher --out new --latents gone": "textures.npy",
    "teacher --out new --latents latents --patch 3": "patches of 3",
    "teacher --out new --latents latents --size XL": "XL",
    "teacher --out new --latents latents --teacher-steps 0": "teacher_steps",
    "teacher --out run --latents latents": "--overwrite",
    "teacher --out run --latents latents --resume": "teacher_steps, teacher_batch",
    "distill --out nowhere": "run celeba_latent.py teacher",
    "distill --out untaught": "run celeba_latent.py teacher",
    "distill --out unfinished": "update 2",
    "distill --out swapped": "teacher.pt",
    "distill --out unread": "config.json",
    "distill --out moved": "nowhere",
    "distill --out moved --latents other": "another autoencoder",
    "distill --out run --latents plain": "other attributes",
    "distill --out plain-teacher.pt --latents plain --guidance 2": "encode with --labels",
    "distill --out run": "--overwrite",
    "distill --out run --student-steps 12 --resume": "guidance",
    "distill --out run --student-steps 12 --guidance 2 --resume --seed 5": "seed",
    "distill --out run --student-steps 12 --guidance 2 --resume --lambda-adv 1": "schedule",
    "distill --out gpu --student-steps 12 --guidance 2 --resume --quiet": "another device",
    "distill --out run --overwrite --preset paper --student-steps 9": "warmup",
    "distill --out run --overwrite --lambda-self 0 1 2": "phases",
    "distill --out run --overwrite --lambda-self 1 --self-source frozen": "first phase",
    "sample --out nowhere": "nowhere",
    "sample --out points.pt": "points.pt",
    "sample --out run --steps 0": "step",
    "sample --out run --count 0": "count",
    "sample --out run --file faces.gif": ".npz",
    "sample --out run --count 2 --file nowhere/a.png": "nowhere",
    "sample --out run --attributes Smile=1": "Eyeglasses",
    "sample --out run --attributes Smiling=2": "Smiling=0",
    "sample --out plain-student.pt --attributes Smiling=1": "without --labels",
    "evaluate --out run --count 100": "1000 or more",
    "evaluate --out run --count 1000": "too few",
    "evaluate --out moved --count 1000": "student.pt",
    "evaluate --out run --count 1000 --latents other": "another autoencoder",
    "evaluate --out run --count 1000 --latents plain": "other attributes",
}


@pytest.mark.parametrize("command", FACES_ERRORS)
def test_bad_input_for_faces_is_one_clear_line_and_changes_nothing(command, troubles, monkeypatch, capsys):
    """Exit code 2, one line on stderr that names the trouble, and no file written or lost."""
    monkeypatch.chdir(troubles)
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    before = contents(troubles)
    assert faces(*command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("celeba_latent.py: error: ") and error.count("\n") == 1
    assert FACES_ERRORS[command] in error
    assert contents(troubles) == before


def test_running_out_of_memory_says_what_to_lower(troubles, monkeypatch, capsys):
    """The many lines of torch become one that names the settings; exit code 2."""

    def full(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    monkeypatch.chdir(troubles)
    monkeypatch.setattr(scflow, "sample", full)
    assert faces("sample", "--out", "run") == 2
    error = capsys.readouterr().err
    assert "out of memory" in error and "--student-batch" in error and error.count("\n") == 1
