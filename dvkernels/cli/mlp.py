"""Multilayer perceptron of ``train`` on the CPU: two dense layers with a ReLU, and the gradient.

Compiled code: forward and backward pass run without the interpreter's lock. In NumPy each operation
would end by acquiring the lock, and waiting for it would put the thread to sleep for longer than
the operation takes.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from dvkernels.cli.digits import NUM_CLASSES, NUM_PIXELS
from dvkernels.devices.device import Device
from dvkernels.kernels import jit

__all__: list[str] = []

# All weights lie in one flat array, so that one collective and one update handle them all:
# hidden kernel (64, h), hidden bias (h,), output kernel (h, 10), output bias (10,).


def num_weights(num_hidden: int) -> int:
    """Return the length of the flat array."""
    return (NUM_PIXELS + 1) * num_hidden + (num_hidden + 1) * NUM_CLASSES


def layers(flat: Any, num_hidden: int) -> list[Any]:
    """Return kernel and bias of each layer as views of the flat array of shape (num_weights,)."""
    views, start = [], 0
    for kernel in ((NUM_PIXELS, num_hidden), (num_hidden, NUM_CLASSES)):
        for shape in (kernel, kernel[1:]):
            stop = start + math.prod(shape)
            views.append(flat[start:stop].reshape(shape))
            start = stop
    return views


def initial_weights(num_hidden: int, dtype: Any, seed: int) -> Any:
    """Return flat weights: zero biases, kernels after He et al. (doi:10.1109/ICCV.2015.123)."""
    rng = np.random.default_rng(seed)
    flat = np.zeros(num_weights(num_hidden), dtype)
    hidden_kernel, _, output_kernel, _ = layers(flat, num_hidden)
    hidden_kernel[:] = rng.standard_normal(hidden_kernel.shape) * np.sqrt(2 / NUM_PIXELS)
    output_kernel[:] = rng.standard_normal(output_kernel.shape) * np.sqrt(2 / num_hidden)
    return flat


class Workspace:
    """Arrays of one replica's forward and backward pass, reused in every step.

    New arrays of a megabyte would come from the operating system each time, and their page faults
    would take longer than the computation.
    """

    def __init__(self, num_examples: int, num_hidden: int, dtype: Any, device: Device) -> None:
        del device  # first touch places the memory
        self.activations = (
            np.empty((num_examples, num_hidden), dtype),
            np.empty((num_examples, num_hidden), dtype),
            np.empty((num_examples, NUM_CLASSES), dtype),
        )
        self.gradient = np.zeros(num_weights(num_hidden) + 1, dtype)  # last element: the loss


def gradient_and_loss(weights: Any, images: Any, labels: Any, workspace: Workspace) -> Any:
    """Return the gradient of the mean cross-entropy over the examples, with the loss appended.

    Parameters
    ----------
    weights : array of shape (num_weights,)
    images : array of shape (examples, 64), of the weights' dtype
    labels : array of shape (examples,), int64
    workspace : Workspace

    Returns
    -------
    array of shape (num_weights + 1,)
        Part of the workspace, valid until its next use. Without examples it is left unchanged: a
        replica with an empty batch contributes with weight 0.
    """
    if len(images):
        _forward_backward(weights, images, labels, *workspace.activations, workspace.gradient)
    return workspace.gradient


@jit.njit(nogil=True)
def _layers(flat, num_hidden, num_classes):  # type: ignore[no-untyped-def]
    """Return the same views as ``layers``, in compiled code."""
    a = NUM_PIXELS * num_hidden
    b = a + num_hidden
    c = b + num_hidden * num_classes
    return (
        flat[:a].reshape((NUM_PIXELS, num_hidden)),
        flat[a:b],
        flat[b:c].reshape((num_hidden, num_classes)),
        flat[c : c + num_classes],
    )


@jit.njit(nogil=True)
def _forward_backward(  # type: ignore[no-untyped-def]
    weights, images, labels, hidden, back, logits, gradient
):
    num_examples, num_hidden = hidden.shape
    num_classes = logits.shape[1]
    kernel, bias, output_kernel, output_bias = _layers(weights, num_hidden, num_classes)
    kernel_gradient, bias_gradient, output_kernel_gradient, output_bias_gradient = _layers(
        gradient, num_hidden, num_classes
    )
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
    gradient[-1] = loss / num_examples


def accuracy(weights: Any, num_hidden: int, images: Any, labels: Any) -> float:
    """Return the fraction of images whose label the network predicts."""
    kernel, bias, output_kernel, output_bias = layers(weights, num_hidden)
    logits = np.maximum(images @ kernel + bias, 0) @ output_kernel + output_bias
    return float((logits.argmax(axis=1) == labels).mean())


def checksum(weights: Any) -> str:
    """Return the SHA-256 of the flat weights' bytes."""
    return hashlib.sha256(weights.tobytes()).hexdigest()
