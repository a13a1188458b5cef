"""Statistics against numpy's own."""

import numpy as np
import pytest

from safe_pruner_node.demonstrations import statistics


def test_columns():
    values = np.random.default_rng(0).normal(size=(500, 3))
    found = statistics.of_values(values)
    np.testing.assert_allclose(found["mean"], values.mean(axis=0))
    np.testing.assert_allclose(found["std"], values.std(axis=0))
    np.testing.assert_allclose(found["q10"], np.quantile(values, 0.1, axis=0))
    assert found["count"] == [500]
    assert statistics.of_values(np.arange(5))["max"] == [4.0]


@pytest.mark.parametrize("name", ["min", "max", "mean", "std", "q01", "q50", "q99"])
def test_images_by_way_of_histograms(name):
    images = np.random.default_rng(0).integers(20, 230, (4, 30, 40, 3), dtype=np.uint8)
    images[..., 2] //= 2
    counts = sum(statistics.histogram(image) for image in images)
    found = statistics.of_histogram(counts, 4)
    pixels = images.reshape(-1, 3) / 255
    if name.startswith("q"):
        truth = np.quantile(pixels, int(name[1:]) / 100, axis=0, method="inverted_cdf")
    else:
        truth = getattr(pixels, name)(axis=0)
    assert np.shape(found[name]) == (3, 1, 1)
    np.testing.assert_allclose(np.ravel(found[name]), truth, atol=1e-9)
    assert found["count"] == [4]
