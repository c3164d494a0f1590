"""Restoring variables of every mode, optimizers, iterators, generators, data and containers."""

from __future__ import annotations

import random
from collections import OrderedDict, namedtuple

import ml_dtypes
import numpy as np
import optree
import pytest

import dvkernels as dv
from dvkernels.errors import CheckpointError, ContextError

Point = namedtuple("Point", "x y")


def mirrored(num_replicas):
    return dv.MirroredStrategy([f"cpu:{k}" for k in range(num_replicas)])


def variable(strategy, value, **modes):
    with strategy.scope():
        return dv.Variable(value, **modes)


# Synchronization, aggregation, and the copies after restoring [3, 4] on 2 and on 4 replicas.
RULES = [
    ("on_write", "none", [3.0, 3.0], [3.0] * 4),
    ("on_read", "sum", [3.5, 3.5], [1.75] * 4),
    ("on_read", "mean", [3.5, 3.5], [3.5] * 4),
    ("on_read", "only_first_replica", [3.0, 3.0], [3.0] * 4),
    ("on_read", "none", [3.0, 4.0], None),
    ("none", "none", [3.0, 4.0], None),
]


@pytest.mark.parametrize(("when", "how", "on_two", "on_four"), RULES)
def test_variables_of_each_mode(tmp_path, when, how, on_two, on_four):
    modes = {"synchronization": when, "aggregation": how}
    with mirrored(2) as two, mirrored(4) as four:
        saved = variable(two, 3.0, **modes)
        if when != "on_write":
            saved.assign(dv.PerReplica([3.0, 4.0]))
        dv.Checkpoint(v=saved).save(tmp_path / "c")
        again, other = variable(two, 0.0, **modes), variable(four, 7.0, **modes)
        dv.Checkpoint(v=again).restore(tmp_path / "c")
        assert [float(copy) for copy in again.values] == on_two
        if on_four is None:
            with pytest.raises(CheckpointError, match="2 copies that differ"):
                dv.Checkpoint(v=other).restore(tmp_path / "c")
            assert [float(copy) for copy in other.values] == [7.0] * 4
        else:
            dv.Checkpoint(v=other).restore(tmp_path / "c")
            assert [float(copy) for copy in other.values] == on_four


def test_equal_copies_reach_any_number_of_replicas_and_modes(tmp_path):
    with mirrored(2) as two, mirrored(3) as three:
        dv.Checkpoint(v=variable(two, 5.0, synchronization="none")).save(tmp_path / "c")
        for modes in ({}, {"synchronization": "none"}, {"synchronization": "on_read"}):
            found = variable(three, 0.0, **modes)
            dv.Checkpoint(v=found).restore(tmp_path / "c")
            assert [float(copy) for copy in found.values] == [5.0] * 3


def test_shares_of_integers_add_up(tmp_path):
    with mirrored(2) as two, mirrored(4) as four:
        modes = {"synchronization": "on_read", "aggregation": "sum"}
        total = variable(two, 0, **modes)
        total.assign(dv.PerReplica([3, 4]))
        dv.Checkpoint(v=total).save(tmp_path / "c")
        found = variable(four, 0, **modes)
        dv.Checkpoint(v=found).restore(tmp_path / "c")
        assert int(found.read_value()) == 7


def test_restoring_under_another_strategy(tmp_path):
    value = np.random.default_rng(0).random((3, 4))
    with mirrored(3) as source, dv.CentralStorageStrategy(["cpu:0", "cpu:1"]) as central:
        dv.Checkpoint(v=variable(source, value)).save(tmp_path / "c")
        with dv.OneDeviceStrategy("cpu:0") as one:
            for found in (variable(central, 0 * value), variable(one, 0 * value)):
                dv.Checkpoint(v=found).restore(tmp_path / "c")
                assert (found.numpy() == value).all()
        plain = dv.Variable(0 * value)
        dv.Checkpoint(v=plain).restore(tmp_path / "c")
        assert (plain.numpy() == value).all()


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "uint16", "int32", "uint64", "float16", "bfloat16", "float32", "float64",
     "complex64", "complex128"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_every_dtype_and_shape_bit_for_bit(tmp_path, dtype, shape):
    given = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    size = int(np.prod(shape)) * given.itemsize
    bits = np.random.default_rng(1).integers(0, 2 if dtype == "bool" else 256, size, dtype="u1")
    array = bits.view(given).reshape(shape)  # NaN and denormal numbers too
    saved, found = dv.Variable(array), dv.Variable(np.zeros(shape, given))
    dv.Checkpoint(v=saved, a=array).save(tmp_path / "c")
    again = np.zeros(shape, given)
    dv.Checkpoint(v=found, a=again).restore(tmp_path / "c")
    assert saved.numpy().tobytes() == found.numpy().tobytes() == again.tobytes() == bits.tobytes()


def trained(strategy, optimizer, steps, weight=None):
    weight = variable(strategy, np.ones(3)) if weight is None else weight
    for step in range(steps):
        optimizer.apply_gradients([(np.arange(3.0) + step, weight)])
    return weight


@pytest.mark.parametrize(
    "make", [lambda: dv.optimizers.Adam(0.1), lambda: dv.optimizers.SGD(0.1, 0.9)]
)
def test_an_optimizer_continues_after_a_restore(tmp_path, make):
    with mirrored(2) as two, mirrored(3) as three:
        optimizer = make()
        weight = trained(two, optimizer, 3)
        dv.Checkpoint(model={"w": weight}, optimizer=optimizer).save(tmp_path / "c")
        trained(two, optimizer, 2, weight)

        # The restore creates the slots: this optimizer has taken no step.
        fresh = make()
        other = variable(three, np.zeros(3))
        dv.Checkpoint(model={"w": other}, optimizer=fresh).restore(tmp_path / "c")
        assert fresh.iterations == 3
        trained(three, fresh, 2, other)
        np.testing.assert_allclose(other.numpy(), weight.numpy(), rtol=1e-12)


def test_slots_that_did_not_exist_are_zeros_again(tmp_path):
    with mirrored(2) as strategy:
        optimizer = dv.optimizers.SGD(0.1, 0.9)
        weight = trained(strategy, optimizer, 0)
        checkpoint = dv.Checkpoint(w=weight, optimizer=optimizer)
        checkpoint.save(tmp_path / "c")
        trained(strategy, optimizer, 2, weight)
        once = weight.numpy()
        checkpoint.restore(tmp_path / "c")
        trained(strategy, optimizer, 2, weight)
        assert (weight.numpy() == once).all()


def test_slots_need_their_variable_and_their_optimizer(tmp_path):
    adam, sgd = dv.optimizers.Adam(), dv.optimizers.SGD(0.1, 0.9)
    with mirrored(2) as strategy:
        weight = trained(strategy, adam, 1)
        with pytest.raises(CheckpointError, match="not among the objects"):
            dv.Checkpoint(optimizer=adam).save(tmp_path / "c")
        dv.Checkpoint(w=weight, optimizer=adam).save(tmp_path / "c")
        before = weight.numpy()
        weight.assign_add(np.ones(3))
        with pytest.raises(CheckpointError, match="slots"):
            dv.Checkpoint(w=weight, optimizer=sgd).restore(tmp_path / "c")
        assert (weight.numpy() == before + 1).all()
        assert sgd.iterations == 0


def test_tied_variables_are_saved_once_and_restored_in_both_places(tmp_path):
    tied = dv.Variable(np.ones(4))
    dv.Checkpoint(a=tied, b=tied).save(tmp_path / "tied")
    a, b = dv.Variable(np.zeros(4)), dv.Variable(np.zeros(4))
    dv.Checkpoint(a=a, b=b).restore(tmp_path / "tied")
    assert (a.numpy() == 1).all()
    assert (b.numpy() == 1).all()
    b.assign(2 * np.ones(4))
    dv.Checkpoint(a=a, b=b).save(tmp_path / "apart")
    with pytest.raises(CheckpointError, match="two paths"):
        dv.Checkpoint(a=tied, b=tied).restore(tmp_path / "apart")
    assert (tied.numpy() == 1).all()


def test_a_tied_variable_is_shared_out_once_and_has_one_set_of_slots(tmp_path):
    modes = {"synchronization": "on_read", "aggregation": "sum"}
    with mirrored(2) as strategy:
        optimizer = dv.optimizers.SGD(0.1, 0.9)
        total, weight = variable(strategy, 4.0, **modes), trained(strategy, optimizer, 1)
        slot = optimizer.slots(weight)[0]
        velocity = slot.numpy()
        tied = {"a": total, "b": total, "c": weight, "d": weight, "optimizer": optimizer}
        dv.Checkpoint(**tied).save(tmp_path / "c")
        slot.assign(np.full(3, 7.0))
        dv.Checkpoint(**tied).restore(tmp_path / "c")
        assert float(total.read_value()) == 8.0
        assert (slot.numpy() == velocity).all()


@pytest.mark.parametrize("resumed_on", [1, 2, 3])
def test_an_iterator_continues_with_the_next_batch(tmp_path, resumed_on):
    dataset = dv.Dataset.range(20).shuffle(seed=3).batch(4)
    with mirrored(2) as strategy, mirrored(resumed_on) as other:
        iterator = iter(strategy.distribute_dataset(dataset))
        next(iterator)
        dv.Checkpoint(batches=iterator).save(tmp_path / "c")
        resumed = iter(other.distribute_dataset(dataset))
        dv.Checkpoint(batches=resumed).restore(tmp_path / "c")
        for theirs, ours in zip(iterator, resumed, strict=True):
            assert np.concatenate(theirs.values).tolist() == np.concatenate(ours.values).tolist()


def test_an_iterator_of_another_pipeline_changes_nothing(tmp_path):
    with mirrored(2) as strategy:
        iterator = iter(strategy.distribute_dataset(dv.Dataset.range(8).batch(4)))
        other = iter(strategy.distribute_dataset(dv.Dataset.range(8).batch(2)))
        weight, rng = variable(strategy, 1.0), np.random.default_rng(0)
        dv.Checkpoint(rng=rng, weight=weight, batches=iterator).save(tmp_path / "c")
        weight.assign(2.0)
        rng.random(5)
        before = rng.bit_generator.state
        with pytest.raises(CheckpointError, match=r"batches.*pipeline"):
            dv.Checkpoint(rng=rng, weight=weight, batches=other).restore(tmp_path / "c")
        assert float(weight) == 2.0
        assert rng.bit_generator.state == before


GENERATORS = {
    **{
        kind.__name__: (lambda seed, kind=kind: np.random.Generator(kind(seed)))
        for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox,
                     np.random.SFC64)
    },
    "RandomState": np.random.RandomState,
    "Random": random.Random,
}  # fmt: skip


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_continues_with_the_same_numbers(tmp_path, kind):
    generator, other = GENERATORS[kind](1), GENERATORS[kind](2)
    draw = {"RandomState": "standard_normal", "Random": "gauss"}.get(kind, "standard_normal")
    getattr(generator, draw)()  # may keep half of a pair
    dv.Checkpoint(g=generator).save(tmp_path / "c")
    dv.Checkpoint(g=other).restore(tmp_path / "c")
    for _ in range(9):
        assert getattr(other, draw)() == getattr(generator, draw)()


def test_a_generator_of_another_kind_is_refused(tmp_path):
    dv.Checkpoint(g=np.random.default_rng(0)).save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="PCG64"):
        dv.Checkpoint(g=np.random.Generator(np.random.MT19937(0))).restore(tmp_path / "c")


def test_plain_data_is_exact_and_changed_in_place(tmp_path):
    value = {
        "n": None, "big": 2**200, "t": (1, (2, "x")), "f": [0.1, float("inf"), float("-inf"), -0.0],
        "c": 1 + 2j, "raw": b"\0\xff", "np": np.float32(0.1), "half": ml_dtypes.bfloat16(1.5),
        3: "three", "$": "dollar", "": {"$tuple": 1}, "text": "é\ud800",
    }  # fmt: skip
    saved = dict(value)
    checkpoint = dv.Checkpoint(data=value, count=7, history=[1, 2])
    checkpoint.save(tmp_path / "c")
    found, history = {"other": 1}, [9, 9, 9, 9]
    restored = dv.Checkpoint(data=found, count=None, history=history).restore(tmp_path / "c")
    assert found == saved
    assert list(found) == list(saved)
    assert [type(each) for each in found.values()] == [type(each) for each in saved.values()]
    assert (restored.values["count"], history) == (7, [1, 2])
    assert restored.values["data"] is found


def test_containers_keep_their_kind(tmp_path):
    @optree.dataclasses.dataclass(namespace=optree.registry.__GLOBAL_NAMESPACE)
    class Model:
        weight: object
        step: int

    def objects(value):
        weight = dv.Variable(float(value))
        return {
            "model": Model(weight, value),
            "point": Point(dv.Variable(float(value)), value),
            "ordered": OrderedDict(b=dv.Variable(float(value)), a=value),
            "deep": [{"x": (np.full(2, value), value)}],
        }

    dv.Checkpoint(**objects(5)).save(tmp_path / "c")
    own = objects(0)
    found = dv.Checkpoint(**own).restore(tmp_path / "c").values
    assert found["model"] is own["model"]
    assert (float(own["model"].weight), own["model"].step) == (5.0, 5)
    assert type(found["point"]) is Point
    assert (found["point"].x is own["point"].x, float(found["point"].x)) == (True, 5.0)
    assert found["point"].y == 5
    assert (float(own["ordered"]["b"]), own["ordered"]["a"]) == (5.0, 5)
    assert found["deep"][0]["x"][0] is not None
    assert own["deep"][0]["x"][1] == 5
    assert own["deep"][0]["x"][0].tolist() == [5, 5]


class Counter:
    """User's object whose state has an array that it changes in place."""

    def __init__(self):
        self.seen = np.zeros(3)
        self.total = 0

    def state_dict(self):
        return {"seen": self.seen, "total": self.total}

    def load_state_dict(self, state):
        self.seen, self.total = state["seen"], state["total"]


def test_objects_with_state(tmp_path):
    one, two = Counter(), Counter()
    one.seen += 4
    one.total = 9
    dv.Checkpoint(counter=one).save(tmp_path / "c")
    dv.Checkpoint(counter=two).restore(tmp_path / "c")
    assert (two.seen.tolist(), two.total) == ([4, 4, 4], 9)
    two.seen += 1  # a new, writable array


def test_strict_and_partial(tmp_path):
    weight, bias = dv.Variable(1.0), dv.Variable(2.0)
    dv.Checkpoint(model={"weight": weight, "bias": bias}, step=3).save(tmp_path / "c")
    new, head = dv.Variable(0.0), dv.Variable(9.0)
    checkpoint = dv.Checkpoint(model={"weight": new, "head": head})
    with pytest.raises(CheckpointError, match=r"lacks model/head.*holds step, model/bias"):
        checkpoint.restore(tmp_path / "c")
    assert float(new) == 0.0
    restored = checkpoint.restore(tmp_path / "c", partial=True)
    assert restored.matched == ("model/weight",)
    assert restored.missing == ("model/head",)
    assert set(restored.unexpected) == {"model/bias", "step"}
    assert (float(new), float(head)) == (1.0, 9.0)


@pytest.mark.parametrize("other", [np.zeros(3), np.zeros((2, 2)), np.zeros(2, np.float32), 1.0])
def test_a_mismatch_names_the_variable_and_changes_nothing(tmp_path, other):
    dv.Checkpoint(first=dv.Variable(1.0), second=np.zeros(2)).save(tmp_path / "c")
    first = dv.Variable(0.0)
    second = dv.Variable(other, name="second_weight")
    for partial in (False, True):
        with pytest.raises(CheckpointError, match=r"second.*'second_weight'.*float64\[2\]"):
            dv.Checkpoint(first=first, second=second).restore(tmp_path / "c", partial=partial)
    assert float(first) == 0.0


def test_kinds_must_agree(tmp_path):
    dv.Checkpoint(x=dv.Variable(1.0)).save(tmp_path / "c")
    for other in (3, "x", [1], np.random.default_rng(), dv.optimizers.SGD(0.1), {"a": Counter()}):
        with pytest.raises(CheckpointError, match="x: expected"):
            dv.Checkpoint(x=other).restore(tmp_path / "c")


@pytest.mark.parametrize(
    "value",
    [object(), np.array(["a"]), np.zeros(2, ">f4"), np.zeros(2, np.longdouble),
     dv.PerReplica([1, 2]), {"a": {"b": object()}}, random.SystemRandom()],
)  # fmt: skip
def test_an_object_that_cannot_be_saved_is_named_before_anything_is_written(tmp_path, value):
    with pytest.raises(CheckpointError, match="thing"):
        dv.Checkpoint(thing=value).save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_cycles_and_deep_nesting_are_errors(tmp_path):
    circle = [np.zeros(1)]
    circle.append(circle)
    deep = []
    for _ in range(300):
        deep = [deep]
    for value in (circle, deep):
        with pytest.raises(CheckpointError):
            dv.Checkpoint(x=value).save(tmp_path / "c")


def test_read_only_and_strided_arrays(tmp_path):
    dv.Checkpoint(x=np.arange(6.0).reshape(2, 3).T).save(tmp_path / "c")
    turned = np.zeros((2, 3)).T
    dv.Checkpoint(x=turned).restore(tmp_path / "c")
    assert turned.tolist() == np.arange(6.0).reshape(2, 3).T.tolist()
    fixed = np.zeros((3, 2))
    fixed.flags.writeable = False
    with pytest.raises(CheckpointError, match="read-only"):
        dv.Checkpoint(x=fixed).restore(tmp_path / "c")


def test_replicas_neither_save_nor_restore(tmp_path):
    with mirrored(2) as strategy:
        checkpoint = dv.Checkpoint(v=variable(strategy, 0.0))
        checkpoint.save(tmp_path / "c")
        for verb in (checkpoint.save, checkpoint.restore):
            with pytest.raises(ContextError, match="outside of run"):
                strategy.run(lambda verb=verb: verb(tmp_path / "c"))


def test_saves_and_restores_inside_scopes(tmp_path):
    with mirrored(2) as strategy:
        total = variable(strategy, 1.0, synchronization="on_read", aggregation="sum")
        checkpoint = dv.Checkpoint(total=total)
        with strategy.scope():
            checkpoint.save(tmp_path / "c")
            total.assign(8.0)
            checkpoint.restore(tmp_path / "c")
        assert float(total) == 2.0  # one each
