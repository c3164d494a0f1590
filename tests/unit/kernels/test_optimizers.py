"""Fused optimizers against the formulas of the papers in float64."""

from __future__ import annotations

import numpy as np
import pytest
from kinds import KIND, adapted, only_cpu

from dvkernels import errors

optimizers = adapted(f"dvkernels.kernels.{'cpu' if KIND == 'cpu' else 'cuda'}.optimizers")

SHAPES = [
    (5,),
    (3, 27 if KIND == "simulator" else 2731),
    (),
]  # one block of 8192 and a bit, and a scalar


def made(dtype, replicas, copies, seed=0):
    rng = np.random.default_rng(seed)

    def group(count, equal=False, zero=False):
        first = [rng.standard_normal(shape).astype(dtype) * (not zero) for shape in SHAPES]
        if equal:
            return [[np.array(value) for _ in range(count)] for value in first]
        return [
            [np.array(rng.standard_normal(shape), dtype) for _ in range(count)] for shape in SHAPES
        ]

    gradients = group(replicas)
    return gradients, group(copies, True), group(copies, True, True), group(copies, True, True)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(("replicas", "copies"), [(1, 1), (3, 3), (4, 1)])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam(dtype, replicas, copies, decoupled):
    gradients, parameters, first, second = made(dtype, replicas, copies)
    expected = [group[0].astype("f8") for group in parameters]
    one, two = ([0 * value for value in expected] for _ in range(2))
    for step in (1, 2, 3):
        optimizers.adam(
            gradients, parameters, first, second, step=step, learning_rate=0.1, epsilon=1e-3,
            weight_decay=0.1, decoupled=decoupled,
        )  # fmt: skip
        for k, group in enumerate(gradients):
            slope = np.mean(np.array(group, "f8"), 0)
            if decoupled:
                expected[k] = expected[k] * (1 - 0.1 * 0.1)
            else:
                slope = slope + 0.1 * expected[k]
            one[k] = 0.9 * one[k] + 0.1 * slope
            two[k] = 0.999 * two[k] + 0.001 * slope**2
            hat_1, hat_2 = one[k] / (1 - 0.9**step), two[k] / (1 - 0.999**step)
            expected[k] = expected[k] - 0.1 * hat_1 / (np.sqrt(hat_2) + 1e-3)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == "f8" else {"rtol": 1e-4, "atol": 3e-5}
    for groups, values in ((parameters, expected), (first, one), (second, two)):
        for group, value in zip(groups, values, strict=True):
            assert len({copy.tobytes() for copy in group}) == 1
            np.testing.assert_allclose(group[0], value, **tolerance)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "op"),
    [(0.0, False, "mean"), (0.9, False, "sum"), (0.9, True, "mean")],
)
def test_sgd(momentum, nesterov, op):
    gradients, parameters, velocities, _ = made("f8", 2, 2)
    expected = [group[0].copy() for group in parameters]
    speed = [0 * value for value in expected]
    for _ in range(3):
        optimizers.sgd(
            gradients, parameters, velocities if momentum else None, learning_rate=0.1,
            momentum=momentum, nesterov=nesterov, weight_decay=0.01, op=op,
        )  # fmt: skip
        for k, (a, b) in enumerate(gradients):
            slope = (a + b) / (2 if op == "mean" else 1) + 0.01 * expected[k]
            speed[k] = momentum * speed[k] + slope
            expected[k] = expected[k] - 0.1 * (
                slope + momentum * speed[k] if nesterov else speed[k]
            )
    for group, value in zip(parameters, expected, strict=True):
        assert len({copy.tobytes() for copy in group}) == 1
        np.testing.assert_allclose(group[0], value, rtol=1e-12, atol=1e-14)


def test_each_parameter_has_its_own_step_and_rate():
    gradients, parameters, first, second = made("f8", 2, 2)
    apart = made("f8", 2, 2)
    steps, rates = [1, 7, 1], [0.1, 0.2, 0.1]
    optimizers.adam(gradients, parameters, first, second, step=steps, learning_rate=rates)
    for k, (step, rate) in enumerate(zip(steps, rates, strict=True)):
        one = [groups[k : k + 1] for groups in apart]
        optimizers.adam(*one, step=step, learning_rate=rate)
    for together, alone in zip((parameters, first, second), apart[1:], strict=True):
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_array_equal(one, other)
    optimizers.sgd(gradients, parameters, learning_rate=[0.1, 0.0, 0.1])
    np.testing.assert_array_equal(parameters[1][0], apart[1][1][0])
    with pytest.raises(errors.BufferMismatchError, match="one for each of the 3"):
        optimizers.sgd(gradients, parameters, learning_rate=[0.1, 0.1])
    with pytest.raises(ValueError, match="counted from 1; got 0"):
        optimizers.adam(gradients, parameters, first, second, step=[1, 1, 0], learning_rate=0.1)


@only_cpu
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("shares", [(0.5, 0.25, 0.25), (0.0, 1.0, 0.0), (0.1, 0.2, 0.7)])
def test_shares_of_gradients(dtype, shares):
    gradients, parameters, _, _ = made(dtype, 3, 2)
    for group in gradients:
        for gradient, share in zip(group, shares, strict=True):
            if not share:
                gradient[...] = np.nan
    expected = []
    for group, copies in zip(gradients, parameters, strict=True):
        total = np.zeros_like(copies[0])
        for gradient, share in zip(group, shares, strict=True):
            total += gradient.dtype.type(share) * gradient if share else 0
        expected.append(copies[0] - gradient.dtype.type(0.1) * total)
    optimizers.sgd(gradients, parameters, learning_rate=0.1, op="sum", shares=shares)
    for copies, value in zip(parameters, expected, strict=True):
        for copy in copies:
            np.testing.assert_array_equal(copy, value)
    for wrong in ({"shares": shares[:2], "op": "sum"}, {"shares": shares}):
        with pytest.raises(errors.BufferMismatchError, match="a share for each of 3"):
            optimizers.sgd(gradients, parameters, learning_rate=0.1, **wrong)


def test_two_dtypes_and_strided_parameters_in_one_call():
    wide = np.ones((6, 40), "f4")
    parameters = [[wide[:, :20]], [np.ones(3)]]
    gradients = [[np.ones((6, 20), "f4")] * 2, [np.ones(3)] * 2]
    optimizers.sgd(gradients, parameters, learning_rate=0.5)
    assert (wide[:, :20] == 0.5).all()
    assert (wide[:, 20:] == 1).all()
    assert (parameters[1][0] == 0.5).all()


def ones(*shape, dtype="f4"):
    return np.ones(shape, dtype)


READ_ONLY = ones(3)
READ_ONLY.flags.writeable = False
TWICE = ones(3)


@pytest.mark.parametrize(
    ("gradients", "parameters", "error", "message"),
    [
        ([[ones(3)], [ones(4)]], [[ones(3)], [ones(5)]], errors.BufferMismatchError, "parameter 1"),
        ([[ones(3)]], [[ones(3)], [ones(3)]], errors.BufferMismatchError, "as many"),
        ([[ones(3)]], [[READ_ONLY]], errors.BufferMismatchError, "read-only"),
        ([[ones(3)]], [[TWICE, TWICE]], errors.BufferMismatchError, "share no element"),
        ([[TWICE]], [[TWICE]], errors.BufferMismatchError, "share no element"),
        ([[ones(3, dtype="f2")]], [[ones(3, dtype="f2")]], errors.UnsupportedDTypeError, "float16"),
        ([[ones(3, dtype="i4")]], [[ones(3, dtype="i4")]], errors.UnsupportedDTypeError, "int32"),
        ([[3.0]], [[ones(3)]], errors.NotABufferError, "float"),
        ([[ones(3)] * 2, [ones(3)]], [[ones(3)], [ones(3)]], errors.BufferMismatchError, "same"),
    ],
)
def test_bad_input_touches_nothing(gradients, parameters, error, message):
    before = [copy.copy() for group in parameters for copy in group]
    with pytest.raises(error, match=message):
        optimizers.sgd(gradients, parameters, learning_rate=0.1)
    after = [copy for group in parameters for copy in group]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
