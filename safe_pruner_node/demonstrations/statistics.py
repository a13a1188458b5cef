"""Statistics of features as LeRobot keeps them: of an episode and of a dataset.

Unlike LeRobot's, the quantiles of a dataset are those of all of its values, not the extremes of
its episodes' quantiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

Statistics = dict[str, list[Any]]
"""``min``, ``max``, ``mean``, ``std``, ``count`` and the quantiles, ready for JSON."""

LEVELS = 256


def of_values(values: NDArray[Any]) -> Statistics:
    """Statistics of a column.

    Args:
        values: [n] or [n, dim]; n at least 1.
    """
    table = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    quantiles = np.quantile(table, list(QUANTILES.values()), axis=0)
    return {
        "min": table.min(axis=0).tolist(),
        "max": table.max(axis=0).tolist(),
        "mean": table.mean(axis=0).tolist(),
        "std": table.std(axis=0).tolist(),
        "count": [len(table)],
        **{name: row.tolist() for name, row in zip(QUANTILES, quantiles, strict=True)},
    }


def histogram(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each level occurs in each channel of an image [h, w, 3], [3, 256]."""
    pixels = image.reshape(-1, 3)
    counts = [np.bincount(pixels[:, channel], minlength=LEVELS) for channel in range(3)]
    return np.stack(counts).astype(np.int64)


def of_histogram(counts: NDArray[np.int64], images: int) -> Statistics:
    """Statistics per channel of images, values 0 to 1, each [3, 1, 1] as LeRobot has them.

    Args:
        counts: Sum of the images' :func:`histogram`, [3, 256].
        images: How many images they are of; at least 1.
    """
    levels = np.arange(LEVELS) / (LEVELS - 1)
    share = counts / counts.sum(axis=1, keepdims=True)
    cumulated = np.cumsum(share, axis=1)
    mean = share @ levels
    seen = counts > 0
    result = {
        "min": levels[seen.argmax(axis=1)],
        "max": levels[LEVELS - 1 - seen[:, ::-1].argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0.0)),
    }
    for name, quantile in QUANTILES.items():
        result[name] = levels[(cumulated >= quantile - 1e-12).argmax(axis=1)]
    statistics: Statistics = {
        name: values.reshape(3, 1, 1).tolist() for name, values in result.items()
    }
    return {**statistics, "count": [images]}
