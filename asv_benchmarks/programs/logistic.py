"""Logistic regression by stochastic gradient descent over shuffled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

import dvkernels as dv
from programs.program import OURS, Neighbour, Program, at_most, of_possible
from programs.rows import SEED, Rows, make

__all__ = ["PROGRAM"]

RATE = 0.5
Run = Iterator[Callable[[], Any]]


def gradient(x: Any, y: Any, w: Any) -> Any:
    """Return the gradient of the log loss, the sum over the rows."""
    return x.T @ (1 / (1 + np.exp(-(x @ w))) - y)


def gradient_of(rows: Rows, w: Any, chosen: Any) -> Any:
    """Return the gradient of the chosen rows."""
    return gradient(rows.x[chosen], rows.y[chosen], w)


def numpy_alone(rows: Rows, count: int) -> Run:
    """Run in one thread, that of the caller."""

    def program() -> Any:
        w = np.zeros(rows.x.shape[1])
        for epoch in range(rows.epochs):
            order = rows.order(epoch)
            for start in range(0, len(order), rows.size):
                w -= RATE / rows.size * gradient_of(rows, w, order[start : start + rows.size])
        return w

    yield program


def replicas(rows: Rows, count: int) -> Run:
    """Run on replicas of this library."""
    with dv.MirroredStrategy(count) as strategy:

        def program() -> Any:
            with strategy.scope():
                w, sgd = dv.Variable(np.zeros(rows.x.shape[1])), dv.optimizers.SGD(RATE / rows.size)
            dataset = dv.Dataset.from_arrays((rows.x, rows.y)).shuffle(seed=SEED).batch(rows.size)
            batches = strategy.distribute_dataset(dataset)

            def step(x: Any, y: Any) -> None:
                sgd.apply_gradients([(gradient(x, y, w.read_value()), w)], op="sum")

            for _ in range(rows.epochs):
                for batch in batches:
                    strategy.run(step, batch)
            return w.numpy()

        yield program


def threads_by_hand(rows: Rows, count: int) -> Run:
    """Compute the gradients of the parts of a batch in a pool of threads, and add them."""
    with ThreadPoolExecutor(count) as pool:

        def program() -> Any:
            w = np.zeros(rows.x.shape[1])
            for epoch in range(rows.epochs):
                order = rows.order(epoch)
                for start in range(0, len(order), rows.size):
                    parts = np.array_split(order[start : start + rows.size], count)
                    gradients = pool.map(partial(gradient_of, rows, w), parts)
                    w -= RATE / rows.size * sum(gradients)
            return w

        yield program


def joblib_threads(rows: Rows, count: int) -> Run:
    """Compute the gradients of the parts of a batch in joblib's threads, and add them."""
    from joblib import Parallel, delayed

    with Parallel(count, prefer="threads") as parallel:

        def program() -> Any:
            w = np.zeros(rows.x.shape[1])
            for epoch in range(rows.epochs):
                order = rows.order(epoch)
                for start in range(0, len(order), rows.size):
                    parts = np.array_split(order[start : start + rows.size], count)
                    gradients = parallel(delayed(gradient_of)(rows, w, part) for part in parts)
                    w -= RATE / rows.size * sum(gradients)
            return w

        yield program


def scikit_learn(rows: Rows, count: int) -> Run:
    """Fit scikit-learn's classifier: one step for each row, so other arithmetic."""
    from sklearn.linear_model import SGDClassifier

    def program() -> Any:
        fitted = SGDClassifier(loss="log_loss", max_iter=rows.epochs, tol=None)
        return fitted.fit(rows.x, rows.y).coef_

    yield program


def share(rows: Rows, rank: int, count: int) -> None:
    """Compute one part of each batch, and update weights of one's own."""
    w = np.zeros(rows.x.shape[1])
    for epoch in range(rows.epochs):
        order = rows.order(epoch)
        for start in range(0, len(order), rows.size):
            part = np.array_split(order[start : start + rows.size], count)[rank]
            w -= RATE / rows.size * gradient_of(rows, w, part)


PROGRAM = Program(
    "logistic",
    "logistic regression: {epochs} epochs of {rows} x {columns} float64 in batches of {size}",
    {"rows": 50_000, "columns": 100, "size": 5000, "epochs": 6},
    make,
    (
        Neighbour("NumPy, 1 BLAS thread", numpy_alone),
        Neighbour(OURS, replicas),
        Neighbour("NumPy, all BLAS threads", numpy_alone, is_threaded_blas=True),
        Neighbour("threads by hand", threads_by_hand),
        Neighbour("joblib, threads", joblib_threads, needs="joblib"),
        Neighbour("SGDClassifier", scikit_learn, needs="sklearn.linear_model", is_landmark=True),
    ),
    "batch",
    lambda sizes: sizes["epochs"] * -(-sizes["rows"] // sizes["size"]),
    np.asarray,
    1e-9,
    (of_possible(0.7), at_most(1.0, "threads by hand"), at_most(1.0, "NumPy, all BLAS threads")),
    share,
)
