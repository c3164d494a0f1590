"""Two dense layers with a ReLU between them, and their gradient, in compiled code.

The replicas' forward and backward passes run without the interpreter's lock from beginning to end:
in NumPy they would ask for it after every operation, and each time it is taken the operating
system puts the thread to sleep for longer than the operation lasts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

from dvkernels.cli.digits import NUM_CLASSES, NUM_PIXELS

__all__: list[str] = []

# The order of the weights, in every list of them and in their checksum.
WEIGHT_NAMES = ("hidden/kernel", "hidden/bias", "output/kernel", "output/bias")


def initial_weights(num_hidden: int, dtype: Any, seed: int) -> list[Any]:
    """Return the weights in the order of ``WEIGHT_NAMES``: He's normal kernels, zero biases."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((NUM_PIXELS, num_hidden)) * np.sqrt(2 / NUM_PIXELS)
    output = rng.standard_normal((num_hidden, NUM_CLASSES)) * np.sqrt(2 / num_hidden)
    zeros = (np.zeros(num_hidden), np.zeros(NUM_CLASSES))
    return [np.asarray(w, dtype) for w in (hidden, zeros[0], output, zeros[1])]


class Workspace:
    """The arrays of one replica's forward and backward pass, used again in every step.

    Arrays of a megabyte come fresh from the operating system each time they are allocated, and
    faulting their pages in takes longer than computing them.
    """

    def __init__(self, num_examples: int, num_hidden: int, dtype: Any) -> None:
        self.layers = (
            np.empty((num_examples, num_hidden), dtype),
            np.empty((num_examples, num_hidden), dtype),
            np.empty((num_examples, NUM_CLASSES), dtype),
        )
        shapes = (
            (NUM_PIXELS, num_hidden),
            (num_hidden,),
            (num_hidden, NUM_CLASSES),
            (NUM_CLASSES,),
        )
        self.gradients = [np.zeros(shape, dtype) for shape in shapes]


def loss_and_gradients(
    weights: Sequence[Any], images: Any, labels: Any, workspace: Workspace
) -> tuple[Any, list[Any]]:
    """Return the mean cross-entropy over the examples, and its gradient for each weight.

    The gradients lie in the workspace, valid until its next use. Of no examples, zeros: a replica
    with an empty part contributes with weight 0.
    """
    loss = 0.0
    if len(images):
        arrays = (*weights, images, labels, *workspace.layers, *workspace.gradients)
        loss = _forward_backward(*arrays)
    return np.array(loss, images.dtype), workspace.gradients


@numba.njit(nogil=True, cache=True)
def _forward_backward(  # type: ignore[no-untyped-def]
    kernel,
    bias,
    output_kernel,
    output_bias,
    images,
    labels,
    hidden,
    back,
    logits,
    kernel_gradient,
    bias_gradient,
    output_kernel_gradient,
    output_bias_gradient,
):
    num_examples, num_hidden = hidden.shape
    num_classes = logits.shape[1]
    zero = hidden.dtype.type(0)
    np.dot(images, kernel, hidden)
    for i in range(num_examples):
        for j in range(num_hidden):
            hidden[i, j] = max(hidden[i, j] + bias[j], zero)
    np.dot(hidden, output_kernel, logits)

    loss = 0.0
    output_bias_gradient[:] = zero
    for i in range(num_examples):
        row = logits[i]
        row += output_bias
        row -= row.max()
        picked = row[labels[i]]
        norm = zero
        for j in range(num_classes):
            row[j] = np.exp(row[j])
            norm += row[j]
        loss += np.log(norm) - picked
        for j in range(num_classes):  # d loss / d logits = (p - onehot) / examples
            row[j] = (row[j] / norm - (j == labels[i])) / num_examples
            output_bias_gradient[j] += row[j]

    np.dot(hidden.T, logits, output_kernel_gradient)
    np.dot(logits, output_kernel.T, back)
    bias_gradient[:] = zero
    for i in range(num_examples):
        for j in range(num_hidden):
            back[i, j] = back[i, j] if hidden[i, j] > zero else zero
            bias_gradient[j] += back[i, j]
    np.dot(images.T, back, kernel_gradient)
    return loss / num_examples


def accuracy(weights: Sequence[Any], images: Any, labels: Any) -> float:
    """Return the fraction of images whose label the network guesses."""
    kernel, bias, output_kernel, output_bias = weights
    logits = np.maximum(images @ kernel + bias, 0) @ output_kernel + output_bias
    return float((logits.argmax(axis=1) == labels).mean())


def checksum(weights: Sequence[Any]) -> str:
    """Return the SHA-256 of the weights' bytes, C order, in the order of ``WEIGHT_NAMES``."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(np.ascontiguousarray(weight).tobytes())
    return digest.hexdigest()
