"""Corruptions of images: nothing at severity 0, worse with each severity, the same rows and labels as digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from bnn.corruptions import KINDS, SEVERITIES, parse
from bnn.data import corrupted, load_data, load_outside
from bnn.errors import ConfigError, DataError
from bnn.seeding import generator

kinds = pytest.mark.parametrize("kind", KINDS)


def images(rows: int = 30, channels: int = 2, height: int = 8, width: int = 8) -> Tensor:
    """Smooth bright shapes on black, in [0, 1], a channel darker than the other."""
    source = generator(0, "images")
    centre = torch.rand(rows, 1, 1, 2, generator=source, dtype=torch.float64) * 2 + 2.5
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = (x - centre[..., 0]) ** 2 + 3 * (y - centre[..., 1]) ** 2  # [N, H, W]
    blob = (-distance / 6).exp()
    return torch.stack([blob / (1 + channel) for channel in range(channels)], dim=1)


@kinds
def test_severity_0_is_the_identity(kind: str) -> None:
    x = images()
    assert corrupted(x, kind, 0) is x


@kinds
def test_images_get_only_worse(kind: str) -> None:
    x = images()
    before = x.clone()
    distances = torch.stack([(corrupted(x, kind, s) - x).flatten(1).norm(dim=1) for s in range(6)])
    assert (distances.mean(dim=1).diff() > 0.02).all()
    if kind != "shift":  # moved further, a blob may meet itself less or leave the image: on average it is worse
        assert (distances.diff(dim=0) > 0).all()  # and so is each image
    assert torch.equal(x, before)


@kinds
def test_they_repeat_by_seed_and_touch_no_global_stream(kind: str, world_untouched: None) -> None:
    x = images().float()
    found = corrupted(x, kind, 3, seed=4)
    assert found.dtype == torch.float32
    assert found.shape == x.shape
    assert 0.0 <= float(found.min()) <= float(found.max()) <= 1.0
    assert torch.equal(found, corrupted(x, kind, 3, 4))
    draws = kind in ("noise", "rotation", "shift")
    assert torch.equal(found, corrupted(x, kind, 3, seed=5)) != draws


def test_noise_has_its_deviation_where_nothing_is_cut() -> None:
    x = torch.full((40, 1, 8, 8), 0.5, dtype=torch.float64)
    for severity, deviation in enumerate(SEVERITIES["noise"][:2], 1):
        found = corrupted(x, "noise", severity) - x
        assert abs(float(found.std()) - deviation) < 4 * deviation / math.sqrt(2 * found.numel())
        assert abs(float(found.mean())) < 4 * deviation / math.sqrt(found.numel())


def test_blur_is_scipys() -> None:
    x = images()
    for severity, deviation in enumerate(SEVERITIES["blur"], 1):
        expected = scipy.ndimage.gaussian_filter(
            x.numpy(), deviation, axes=(2, 3), mode="nearest", radius=math.ceil(3 * deviation)
        )
        np.testing.assert_allclose(corrupted(x, "blur", severity).numpy(), expected, atol=1e-12)


def test_contrast_keeps_the_mean() -> None:
    x = images()
    for severity, factor in enumerate(SEVERITIES["contrast"], 1):
        found = corrupted(x, "contrast", severity)
        torch.testing.assert_close(found.mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3)))
        torch.testing.assert_close(found.std(dim=(1, 2, 3)), factor * x.std(dim=(1, 2, 3)))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12)])
def test_rotation_is_scipys_one_way_or_the_other(height: int, width: int) -> None:
    x = images(12, 1, height, width)
    for severity, degrees in enumerate(SEVERITIES["rotation"], 1):
        found = corrupted(x, "rotation", severity).numpy()
        ways = [
            scipy.ndimage.rotate(
                np.pad(x.numpy(), ((0, 0), (0, 0), (9, 9), (9, 9))), way, axes=(2, 3), reshape=False, order=1
            )[:, :, 9:-9, 9:-9]
            for way in (degrees, -degrees)
        ]
        apart = np.stack([np.abs(found - way).max(axis=(1, 2, 3)) for way in ways])
        assert (apart.min(axis=0) < 1e-10).all()
        assert set(apart.argmin(axis=0).tolist()) == {0, 1}  # both ways are taken


def test_a_shift_moves_the_centre_of_mass_so_many_pixels() -> None:
    x = torch.zeros(15, 1, 16, 16, dtype=torch.float64)
    x[:, :, 7:9, 7:9] = 0.8  # nothing leaves the image

    def centre(image: Tensor) -> Tensor:
        places = torch.arange(16, dtype=torch.float64)
        mass = image.sum(dim=(1, 2, 3))
        across, down = image.sum(dim=(1, 2)) @ places, image.sum(dim=(1, 3)) @ places
        return torch.stack([across / mass, down / mass], dim=1)

    directions = []
    for severity, pixels in enumerate(SEVERITIES["shift"], 1):
        step = centre(corrupted(x, "shift", severity)) - centre(x)
        torch.testing.assert_close(step.norm(dim=1), torch.full((15,), pixels, dtype=torch.float64), rtol=0, atol=1e-9)
        directions.append(step / pixels)
    torch.testing.assert_close(directions[0], directions[-1], rtol=0, atol=1e-9)  # one direction an image
    assert float(directions[0].std(dim=0).min()) > 0.3


@pytest.mark.parametrize(
    ("x", "kind", "severity", "match"),
    [
        (images(), "fog", 1, "one of noise, blur, contrast, rotation, shift"),
        (images(), "blur", 6, "from 0 to 5"),
        (images(), "blur", True, "from 0 to 5"),
        (images(), "blur", 2.0, "from 0 to 5"),
        (images()[:, 0], "blur", 1, r"images \[N, C, H, W\]"),
        (images().long(), "blur", 1, "floating-point"),
        (16 * images(), "blur", 1, r"pixels in \[0, 1\]"),
        (images() * torch.nan, "blur", 1, r"pixels in \[0, 1\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(x: Tensor, kind: str, severity: int, match: str) -> None:
    with pytest.raises((ConfigError, DataError), match=match):
        corrupted(x, kind, severity)


# As data of the command line


def test_specs() -> None:
    assert parse("digits-rotation-3") == ("rotation", 3)
    assert [
        parse(spec) for spec in ("digits", "digits-shuffled", "digits-blur-0", "digits-fog-1", "digits-blur-12")
    ] == [None] * 5
    with pytest.raises(ConfigError, match="digits-KIND-SEVERITY"):
        load_data("digits-blur-6")


@kinds
def test_corrupted_digits_are_the_rows_of_digits(kind: str) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn (extra 'demo') is not installed")
    clean = load_data("digits", split=1)
    data = load_data(f"digits-{kind}-2", split=1, fitted=clean.record)
    assert torch.equal(data.test.y, clean.test.y)
    assert torch.equal(data.train.y, clean.train.y)
    assert data.input_shape == clean.input_shape
    distances = [
        float((load_data(f"digits-{kind}-{s}", split=1, fitted=clean.record).test.x - clean.test.x).square().mean())
        for s in (1, 3, 5)
    ]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert torch.equal(load_outside(f"digits-{kind}-2", clean, split=1).x, data.test.x)
    with pytest.raises(DataError, match="want split 1, which the bank was fitted on, got 0"):
        load_data(f"digits-{kind}-2", split=0, fitted=clean.record)


def test_a_bank_of_corrupted_digits_has_seen_the_clean_ones() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn (extra 'demo') is not installed")
    worse = load_data("digits-noise-1")
    clean = load_data("digits", fitted=worse.record)
    assert (len(clean.train.y), len(clean.test.y)) == (1438, 359)
    assert torch.equal(clean.test.x, load_data("digits").test.x)
