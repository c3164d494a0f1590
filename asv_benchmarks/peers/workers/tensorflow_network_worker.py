"""Worker that trains the digits network by MirroredStrategy, its loop compiled by tf.function."""

from __future__ import annotations

import os
import sys

import program_server

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tensorflow as tf

size = int(sys.argv[1])
RATE, MOMENTUM = 0.05, 0.9


def write(data):
    """Set up the training; yield the function that runs it."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * size)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{rank}" for rank in range(size)])
    initial = program_server.layers(data["weights"])
    with strategy.scope():
        weights = [tf.Variable(layer) for layer in initial]
        sgd = tf.keras.optimizers.SGD(RATE, momentum=MOMENTUM)
        sgd.build(weights)
    images, labels = tf.constant(data["images"]), tf.constant(data["labels"])

    def step(x, y):
        kernel, bias, output_kernel, output_bias = weights
        with tf.GradientTape() as tape:
            logits = tf.nn.relu(x @ kernel + bias) @ output_kernel + output_bias
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            loss = tf.nn.compute_average_loss(losses)
        sgd.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    @tf.function
    def train(batches):
        for x, y in batches:
            strategy.run(step, args=(x, y))

    def batch(rows):
        return tf.gather(images, rows), tf.gather(labels, rows)

    dataset = tf.data.Dataset.from_tensor_slices(data["rows"]).map(batch).prefetch(tf.data.AUTOTUNE)
    batches = strategy.experimental_distribute_dataset(dataset)

    def program():
        for weight, layer in zip(weights, initial, strict=True):
            weight.assign(layer)
        for variable in sgd.variables[2:]:  # after the step and the rate: the velocities
            variable.assign(tf.zeros(variable.shape))
        train(batches)
        return [weight.numpy() for weight in weights]

    yield program


if __name__ == "__main__":
    program_server.serve(write)
