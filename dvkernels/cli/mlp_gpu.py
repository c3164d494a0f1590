"""Multilayer perceptron of ``train`` on a GPU: the twin of mlp.py, NumPy calls on CuPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.cli.digits import NUM_CLASSES
from dvkernels.cli.mlp import layers, num_weights
from dvkernels.devices import array_memory
from dvkernels.devices.device import Device

__all__: list[str] = []


class Workspace:
    """Arrays of one replica reused in every step; CuPy's memory pool reuses the others."""

    def __init__(self, num_examples: int, num_hidden: int, dtype: Any, device: Device) -> None:
        self.num_hidden = num_hidden
        self.classes = array_memory.on_device(np.arange(NUM_CLASSES), device)
        self.gradient = array_memory.on_device(np.zeros(num_weights(num_hidden) + 1, dtype), device)


def gradient_and_loss(weights: Any, images: Any, labels: Any, workspace: Workspace) -> Any:
    """Return the gradient of the mean cross-entropy over the examples, with the loss appended.

    As in mlp.py; asynchronous to the host.
    """
    if not len(images):
        return workspace.gradient
    kernel, bias, output_kernel, output_bias = layers(weights, workspace.num_hidden)
    hidden = np.maximum(images @ kernel + bias, 0)
    logits = hidden @ output_kernel + output_bias
    logits -= logits.max(axis=1, keepdims=True)
    powers = np.exp(logits)
    norm = powers.sum(axis=1, keepdims=True)
    onehot = (labels[:, None] == workspace.classes).astype(logits.dtype)
    losses = np.log(norm) - (logits * onehot).sum(axis=1, keepdims=True)
    slope = (powers / norm - onehot) / len(images)  # d loss / d logits
    back = (slope @ output_kernel.T) * (hidden > 0)
    parts = (images.T @ back, back.sum(axis=0), hidden.T @ slope, slope.sum(axis=0))
    for view, part in zip(layers(workspace.gradient, workspace.num_hidden), parts, strict=True):
        view[...] = part
    workspace.gradient[-1:] = losses.mean()
    return workspace.gradient
