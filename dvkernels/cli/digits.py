"""Data set of ``python -m dvkernels train``: scikit-learn's handwritten digits.

1797 images of 8 x 8 pixels (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998,
doi:10.24432/C50P49).
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__: list[str] = []

NUM_CLASSES = 10
NUM_PIXELS = 64


class Digits(NamedTuple):
    """Training and test set: images as rows of 64 numbers from 0 to 1, labels from 0 to 9."""

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
        (images / 16.0).astype(dtype), labels, test_size=0.2, stratify=labels, random_state=0
    )
    return Digits(train_images, train_labels, test_images, test_labels)
