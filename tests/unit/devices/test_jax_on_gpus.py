"""Arrays of JAX in GPU memory: real ones read as if they lay there, and doubles; no GPU needed."""

from __future__ import annotations

import contextlib
import types

import numpy as np
import pytest

from dvkernels.devices import cuda, cuda_arrays, interop, signature
from dvkernels.errors import NotABufferError

pytestmark = pytest.mark.jax


@pytest.fixture(scope="module")
def jax():
    return pytest.importorskip("jax")


class JaxOnGpu:
    """Real array of JAX that says that its memory, which is the host's, belongs to cuda:0.

    Its array interface is like that of a GPU array: without a stream, and missing for bfloat16.
    """

    __module__ = "jaxlib._jax"

    def __init__(self, array, events=None):
        self._array, self._events = array, [] if events is None else events

    def __getattr__(self, name):
        return getattr(self._array, name)

    def __dlpack_device__(self):
        return 2, 0

    def block_until_ready(self):
        self._array.block_until_ready()
        self._events.append("ready")
        return self

    @property
    def __cuda_array_interface__(self):
        if self.dtype == "bfloat16":
            raise AttributeError("__cuda_array_interface__ is not supported for BF16 buffers.")
        return {
            "shape": self.shape, "typestr": self.dtype.str, "version": 2, "strides": None,
            "data": (self._array.unsafe_buffer_pointer(), True),
        }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "complex64", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5), (2, 3, 4)])
def test_an_array_is_awaited_and_described(jax, dtype, shape):
    content = jax.numpy.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    events = []
    (buffer,) = cuda_arrays.locate("test", [JaxOnGpu(content, events)])
    assert events[0] == "ready"
    assert (buffer.device, buffer.stream) == (0, 0)
    assert buffer.array.dtype == content.dtype
    assert not buffer.array.flags.writeable
    np.testing.assert_array_equal(buffer.array, np.asarray(content))


def test_a_layout_in_columns_gives_strides(jax):
    if jax.__version_info__ < (0, 7):
        pytest.skip("JAX before 0.7 names layouts otherwise")
    from jax.experimental.layout import Format, Layout

    rows = jax.numpy.arange(24.0, dtype="float32").reshape(2, 3, 4)
    turned = jax.device_put(rows, Format(Layout(major_to_minor=(2, 0, 1)), rows.sharding))
    found = signature.of([turned])
    assert found.kind[2] == (12, 4, 24)
    np.testing.assert_array_equal(cuda_arrays._describe(found), np.asarray(rows))
    assert signature.read([rows, turned]) is None


def test_arrays_that_cannot_be_read_are_named(jax):
    deleted = jax.numpy.ones(3)
    deleted.delete()
    with pytest.raises(NotABufferError, match=r"replica 0.*deleted"):
        cuda_arrays.locate("test", [JaxOnGpu(deleted)])

    def refuse():
        raise BufferError("only supported for unsharded arrays")

    on_gpu = JaxOnGpu(jax.numpy.ones(3))
    on_gpu.__class__ = type("Sharded", (JaxOnGpu,), {"__dlpack_device__": lambda self: refuse()})
    assert not interop.is_on_gpu(on_gpu)
    with pytest.raises(NotABufferError, match=r"replica 0.*unsharded"):
        interop.view("test", on_gpu, "replica 0")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_becomes_an_array_of_jax(jax, dtype):
    class OfCuPy:
        """Double of a result of CuPy: DLPack does not know NumPy's bfloat16."""

        def __init__(self, hidden):
            self.hidden, self.dtype = hidden, hidden.dtype

        def view(self, dtype):
            return OfCuPy(self.hidden.view(dtype))

        def __dlpack_device__(self):
            return self.hidden.__dlpack_device__()

        def __dlpack__(self, **how):
            return self.hidden.__dlpack__()

    content = np.arange(6).astype(interop.dtype_named(dtype)).reshape(2, 3)
    result = interop.like(OfCuPy(content), jax.numpy.ones(1))
    assert isinstance(result, jax.Array)
    assert result.dtype == content.dtype
    np.testing.assert_array_equal(np.asarray(result), content)


def test_an_adopted_array_is_a_copy_that_is_there(jax, monkeypatch):
    events = []
    library = types.SimpleNamespace(
        current=lambda device: types.SimpleNamespace(ptr=0),
        at=lambda device: contextlib.nullcontext(events.append(f"at {device}")),
        stream_at=lambda device, address: types.SimpleNamespace(
            synchronize=lambda: events.append("synchronized")
        ),
        over=lambda described, device, owner: described,
        empty=lambda device, shape, dtype: np.empty(shape, dtype),
        copy=lambda target, source: events.append("copied") or np.copyto(target, source),
    )
    monkeypatch.setattr(cuda, "arrays", lambda: library)
    content = jax.numpy.arange(5.0)
    adopted = cuda_arrays.adopt("test", JaxOnGpu(content, events), "the value")
    # The default stream that is waited for is that of the current device.
    assert events == ["ready", "ready", "copied", "at 0", "synchronized"]
    assert not np.may_share_memory(adopted, np.asarray(content))
    np.testing.assert_array_equal(adopted, np.arange(5.0))
    cuda_arrays.wait_for_result(JaxOnGpu(content))
    assert events[5:] == ["at 0", "synchronized"]
