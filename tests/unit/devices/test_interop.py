"""Arrays of PyTorch and JAX in collectives and variables; skipped where a library is absent."""

from __future__ import annotations

import numpy as np
import pytest

import dvkernels as dv
from dvkernels import kernels
from dvkernels.errors import BufferMismatchError, NotABufferError

DTYPES = ["float32", "float64", "float16", "bfloat16", "complex64", "int32"]


def rank():
    return dv.get_replica_context().replica_id_in_sync_group


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as made:
        yield made


class OfTorch:
    def __init__(self):
        self.torch = pytest.importorskip("torch")
        self.kind = self.torch.Tensor

    def full(self, shape, value, dtype):
        return self.torch.full(shape, value, dtype=getattr(self.torch, dtype))

    def dtype(self, array):
        return str(array.dtype).removeprefix("torch.")


class OfJax:
    def __init__(self):
        self.jax = pytest.importorskip("jax")
        self.jax.config.update("jax_enable_x64", True)
        self.kind = self.jax.Array

    def full(self, shape, value, dtype):
        return self.jax.numpy.full(shape, value, dtype=dtype)

    def dtype(self, array):
        return str(array.dtype)


@pytest.fixture(params=[OfTorch, OfJax], ids=["torch", "jax"])
def library(request):
    return request.param()


@pytest.mark.parametrize("dtype", DTYPES)
def test_collectives_return_arrays_of_the_same_library(strategy, library, dtype):
    def step():
        here, own = dv.get_replica_context(), library.full((3, 2), rank() + 1, dtype)
        found = [
            here.all_reduce("sum", {"own": own, "turned": own.T})["turned"],
            here.all_reduce("sum", own, shared=True),
            here.all_reduce_async("sum", own).wait(),
            here.reduce_scatter("sum", own),
            here.all_gather(own),
            here.broadcast(own, root=1),
        ]
        assert float(own[0, 0].real) == rank() + 1
        return tuple(found)

    found = strategy.run(step)
    shapes = [(2, 3), (3, 2), (3, 2), (2, 2), (6, 2), (3, 2)]
    for value, shape, corner in zip(found, shapes, [3, 3, 3, 3, 1, 2], strict=True):
        assert isinstance(value[0], library.kind)
        assert library.dtype(value[0]) == dtype
        assert tuple(value[0].shape) == shape
        assert float(value[0][0, 0].real) == corner
    assert isinstance(strategy.reduce("sum", found[1]), library.kind)
    assert isinstance(strategy.gather(found[1]), library.kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_written_in_place(strategy, dtype):
    library = OfTorch()

    def step():
        own = library.full((5,), rank() + 1, dtype)
        assert dv.get_replica_context().all_reduce("sum", own, out=own) is own
        return own

    for tensor in strategy.run(step).values:
        assert float(tensor[4].real) == 3
    tensors = [library.full((5,), 2, dtype) for _ in range(3)]
    kernels.all_reduce(tensors)
    assert [float(tensor[0].real) for tensor in tensors] == [6, 6, 6]


def test_parameters_and_gradients(strategy):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(3))
    found = strategy.run(lambda: dv.get_replica_context().all_reduce("sum", parameter))
    assert found[0].tolist() == [2, 2, 2]
    with strategy.scope():
        weight = dv.Variable(parameter, aggregation="mean")
    strategy.run(lambda: weight.assign_add(parameter * (rank() + 1)))
    np.testing.assert_allclose(weight.numpy(), 2.5)
    sgd = dv.optimizers.SGD(1.0)
    strategy.run(lambda: sgd.apply_gradients([(parameter, weight)]))
    np.testing.assert_allclose(weight.numpy(), 1.5)


def test_arrays_without_memory_are_refused(strategy):
    torch = pytest.importorskip("torch")
    nowhere = torch.ones(2, device="meta")
    with pytest.raises((NotABufferError, BufferMismatchError), match="replica 0"):
        strategy.run(lambda: dv.get_replica_context().all_reduce("sum", nowhere))


def test_arrays_of_jax_cannot_be_written(strategy):
    library = OfJax()
    own = library.full((2,), 1, "float32")
    with pytest.raises(BufferMismatchError, match="read-only"):
        strategy.run(lambda: dv.get_replica_context().all_reduce("sum", own, out=own))
    assert own.tolist() == [1, 1]
