"""Overlays: kept patches untouched, pruned ones dimmed, the letterbox cropped away."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from safe_pruner_node.inference.overlay import MAX_WIDTH, draw_overlay, encode_jpeg
from safe_pruner_node.pi05.transforms import resize_with_pad

GRID = 16
TOKENS = GRID * GRID


def white(height, width):
    return np.full((height, width, 3), 255, np.uint8)


def is_bright(overlay):
    return np.all(overlay == 255, axis=-1)


def test_everything_kept_is_the_image_itself():
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    np.testing.assert_array_equal(draw_overlay(image, np.arange(TOKENS), TOKENS), image)


def test_one_kept_patch_of_a_square_image():
    overlay = draw_overlay(white(224, 224), np.array([3 * GRID + 5]), TOKENS)
    expected = np.zeros((224, 224), bool)
    expected[3 * 14 : 4 * 14, 5 * 14 : 6 * 14] = True
    np.testing.assert_array_equal(is_bright(overlay), expected)
    assert overlay[0, 0].tolist() == [89, 89, 89]
    assert overlay[3 * 14 - 1, 5 * 14].tolist() not in ([89] * 3, [255] * 3)  # the outline


def test_wide_image_covers_only_the_middle_rows_of_the_grid():
    """1280x720 fits into 224x126 with bars of 49 rows: patch rows 3 (half) to 12 (half)."""
    in_bars = np.concatenate([np.arange(3 * GRID), np.arange(13 * GRID, TOKENS)])
    assert not is_bright(draw_overlay(white(720, 1280), in_bars, TOKENS)).any()
    row_3 = draw_overlay(white(720, 1280), np.arange(3 * GRID, 4 * GRID), TOKENS)
    assert row_3.shape == (270, 480, 3)
    rows = np.flatnonzero(is_bright(row_3).all(axis=1))
    np.testing.assert_array_equal(rows, np.arange(15))  # 7 of 126 rows of the square, at 270


@hypothesis_settings(deadline=None, max_examples=50)
@given(
    height=st.integers(8, 700),
    width=st.integers(8, 480),
    patch=st.integers(0, TOKENS - 1),
)
def test_kept_pixels_are_the_ones_the_model_sees_in_the_patch(height, width, patch):
    """Light up what the overlay keeps, resize as the model does: it lies in that patch alone."""
    kept = is_bright(draw_overlay(white(height, width), np.array([patch]), TOKENS))
    lit = np.repeat(kept[..., None] * np.uint8(255), 3, axis=2)
    square = resize_with_pad(lit, 224)[..., 0].astype(float)
    row, column = divmod(patch, GRID)
    # Bilinear resizing spreads by one source pixel or one square pixel, whichever is larger.
    spread = int(np.ceil(224 / max(height, width))) + 1
    inside = np.zeros((224, 224), bool)
    top, left = max(0, row * 14 - spread), max(0, column * 14 - spread)
    inside[top : (row + 1) * 14 + spread, left : (column + 1) * 14 + spread] = True
    assert not square[~inside].any()


@pytest.mark.parametrize("size", [(480, 640), (720, 1280), (360, 640)])
def test_size_is_bounded_and_the_aspect_kept(size):
    overlay = draw_overlay(white(*size), np.array([100]), TOKENS)
    assert overlay.shape[1] == MAX_WIDTH
    assert overlay.shape[0] == round(size[0] * MAX_WIDTH / size[1])


def test_small_grid():
    overlay = draw_overlay(white(28, 28), np.array([0, 3]), 4)
    assert is_bright(overlay)[:14, :14].all()
    assert is_bright(overlay)[14:, 14:].all()
    assert not is_bright(overlay)[:14, 14:].any()


def test_jpeg_keeps_the_colours():
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    bgr = cv2.imdecode(np.frombuffer(encode_jpeg(red), np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_allclose(bgr[8, 8], [0, 0, 200], atol=6)
