"""Data set of ``python -m dvkernels train``: scikit-learn's handwritten digits, and their shifts.

1797 images of 8 x 8 pixels (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998,
doi:10.24432/C50P49).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__: list[str] = []

NUM_CLASSES = 10
NUM_PIXELS = 64
WIDTH = 8
MEAN, DEVIATION = 4.88, 6.02  # of all pixels, from 0 to 16


class Digits(NamedTuple):
    """Training and test set: images as rows of standardized pixels, labels from 0 to 9."""

    train_images: Any  # (examples, 64)
    train_labels: Any  # (examples,)
    test_images: Any
    test_labels: Any


def load(dtype: Any) -> Digits:
    """Return the digits, always split alike: stratified, 20 % for the test."""
    # Imported here: scikit-learn belongs to the demo extra.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        ((images - MEAN) / DEVIATION).astype(dtype),
        labels,
        test_size=0.2,
        stratify=labels,
        random_state=0,
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def with_shifts(data: Digits) -> Digits:
    """Return the digits with nine images for each of the training set.

    They are the image itself and its shifts by one pixel in eight directions.
    """
    pictures = data.train_images.reshape(-1, WIDTH, WIDTH)
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), constant_values=-MEAN / DEVIATION)
    shifted = [
        padded[:, row : row + WIDTH, column : column + WIDTH].reshape(-1, NUM_PIXELS)
        for row in range(3)
        for column in range(3)
    ]
    labels = np.tile(data.train_labels, len(shifted))
    return data._replace(train_images=np.concatenate(shifted), train_labels=labels)
