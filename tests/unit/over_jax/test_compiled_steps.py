"""Compiled steps: what they refuse, how often they are traced, what failures and Ctrl-C leave."""

from __future__ import annotations

import copy
import json

import interrupt_points
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import BufferMismatchError, ContextError, NotABufferError

pytestmark = pytest.mark.jax
here = dv.get_replica_context


@pytest.fixture
def strategy(tpus):
    return tpus(2)


@pytest.fixture
def variable(strategy):
    with strategy.scope():
        return dv.Variable(np.zeros(3, np.float32), aggregation="sum")


def refused(strategy, step, kind, *parts, args=()):
    with pytest.raises(kind) as caught:
        strategy.run(strategy.jit(step), args)
    said = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    for part in parts:
        assert part in said, said


def test_branches_of_python_get_a_note(strategy, variable, jax):
    kind = jax.errors.ConcretizationTypeError
    way_out = ("jax.lax.cond", "uncompiled")

    def branches_on_id():
        if here().replica_id_in_sync_group == 0:
            variable.assign_add(np.ones(3, np.float32))

    refused(strategy, branches_on_id, kind, *way_out)
    refused(strategy, lambda x: float(x), kind, *way_out, args=(1.0,))
    refused(strategy, lambda: np.sum(variable), jax.errors.TracerArrayConversionError, *way_out)
    assert variable.numpy().tolist() == [0, 0, 0]


def test_uneven_parts_name_the_ways_out(strategy):
    uneven = dv.PerReplica([np.ones(3), np.ones(2)])
    refused(strategy, lambda x: x, BufferMismatchError, "pad=True", "replica 1", args=(uneven,))
    ones = np.ones(3, np.float32)
    refused(strategy, lambda: here().reduce_scatter("sum", ones), BufferMismatchError, "multiple")
    refused(strategy, lambda: here().all_reduce("sum", ones, out=ones), BufferMismatchError, "out")


def test_what_needs_a_meeting_is_refused(strategy, variable):
    refused(strategy, lambda: here().merge_call(lambda s: 1), ContextError, "all_reduce")
    refused(strategy, lambda: dv.Variable(1.0), ContextError, "strategy.scope()")
    refused(strategy, lambda: strategy.run(lambda: 1), ContextError, "cross-replica")
    refused(strategy, lambda: here().rng("a"), ContextError, "rng_key")
    outside = dv.Variable(1.0)
    refused(strategy, lambda: outside.read_value(), ContextError, "constant")
    captured = dv.PerReplica([1.0, 2.0])
    refused(strategy, lambda: here().all_reduce("sum", captured), ContextError, "argument")
    step = strategy.jit(lambda: 1)
    with pytest.raises(TypeError, match=r"strategy\.run\(step"):
        step()
    with pytest.raises(ContextError, match="merge_call"):
        strategy.run(lambda: here().merge_call(lambda s: s.run(step)))


def test_a_step_belongs_to_its_strategy(strategy, tpus):
    with pytest.raises(ContextError, match="own strategy"):
        tpus(2).run(strategy.jit(lambda: 1))


def test_a_failed_trace_leaves_variables_as_they_were(strategy, variable):
    def fails():
        variable.assign_add(np.ones(3, np.float32))
        raise ZeroDivisionError("of the step")

    with pytest.raises(ZeroDivisionError, match="of the step"):
        strategy.run(strategy.jit(fails))
    assert variable.numpy().tolist() == [0, 0, 0]
    assert strategy.state_dict()["num_steps"] == 0
    ones = np.ones(3, np.float32)
    strategy.run(strategy.jit(lambda: variable.assign_add(ones)))
    assert variable.numpy().tolist() == [2, 2, 2]


def test_shapes_and_dtypes_trace_anew_and_the_same_ones_do_not(strategy):
    step = strategy.jit(lambda x, name: x + 1)
    for shape, name, traces in (((2,), "a", 1), ((2,), "a", 1), ((3,), "a", 2), ((3,), "b", 3)):
        strategy.run(step, (np.zeros(shape, np.float32), name))
        assert step.traces == traces


@pytest.mark.wide
def test_the_tenth_trace_of_one_place_warns(strategy):
    """Trap: what is made anew in each step is compiled in each step."""

    def run_one():
        strategy.run(strategy.jit(lambda: 1))

    for _ in range(9):
        run_one()
    with pytest.warns(RuntimeWarning, match=r"traced 10 times.*before the loop"):
        run_one()


def test_results_and_batches_are_arguments_of_the_next_step(strategy):
    step = strategy.jit(lambda x: x + here().replica_id_in_sync_group)
    batches = strategy.distribute_dataset(dv.Dataset.from_arrays(np.zeros(4, np.float32)).batch(4))
    (value,) = batches
    for k in range(3):  # the replicas' parts differ
        value = strategy.run(step, (value,))
        assert [part.tolist() for part in value.values] == [[0, 0], [k + 1, k + 1]]
        assert value[1].devices() == {strategy.placement.jax_local_devices[1]}


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0)])
def test_arrays_of_jax_in_a_dataset_are_those_of_their_replicas(strategy, jax, order):
    own = strategy.placement.jax_local_devices
    elements = [jax.device_put(np.float32(k), own[order[k]]) for k in range(2)]
    dealt = strategy.distribute_datasets_from_function(lambda _: dv.Dataset.from_sequence(elements))
    (value,) = dealt
    for step in (lambda x: x + 0, strategy.jit(lambda x: x + 0)):
        assert [float(part) for part in strategy.run(step, (value,)).values] == [0, 1]


def test_a_deleted_part_of_an_argument_or_a_variable_is_an_error(strategy, variable, jax):
    step = strategy.jit(lambda x: variable.assign_add(np.ones(3, np.float32) * x))
    value = strategy.run(strategy.jit(lambda x: x + 0), (np.float32(1),))
    strategy.run(step, (value,))
    value.values[1].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        strategy.run(step, (value,))
    variable.values[0].delete()
    with pytest.raises(NotABufferError, match=r"values has been deleted.*until it is assigned"):
        strategy.run(step, (1.0,))
    assert np.isnan(variable.numpy()).all()
    variable.assign(np.zeros(3, np.float32))
    strategy.run(step, (1.0,))
    assert variable.numpy().tolist() == [2, 2, 2]


def test_results_are_the_same_arguments_whole_and_in_parts(strategy, jax):
    weak = strategy.run(strategy.jit(lambda: jax.numpy.asarray(1.0)))
    step = strategy.jit(lambda x: x * jax.numpy.ones((), jax.numpy.bfloat16))
    ends = [strategy.run(step, (each,)).values[0] for each in (weak, copy.deepcopy(weak))]
    assert ends[0].dtype == ends[1].dtype
    assert step.traces == 1


def test_masks_are_refused(strategy, variable):
    masked = np.ma.masked_array(np.ones(3, np.float32), [0, 1, 0])
    for given in (masked, dv.PerReplica([masked, masked])):
        with pytest.raises(NotABufferError, match="mask"):
            strategy.run(strategy.jit(lambda x: x), (given,))
    rows = np.ma.masked_array([0, 1], [0, 1])
    with pytest.raises(NotABufferError, match="mask"):
        strategy.run(strategy.jit(lambda: variable.scatter_add(rows, 1.0)))


def test_gradients_are_each_replicas_own(strategy, jax):
    """Trap: with check_vma=True JAX sums gradients of replicated parameters by itself."""
    with strategy.scope():
        weight = dv.Variable(np.float32(1.0), aggregation="mean")

    def step(x):
        gradient = jax.grad(lambda w: w * x)(weight.read_value())
        weight.assign(gradient)
        return gradient

    own = strategy.run(strategy.jit(step), (dv.PerReplica([np.float32(1), np.float32(2)]),))
    assert [float(x) for x in own.values] == [1.0, 2.0]
    assert float(weight) == 1.5


def test_variables_of_one_content_survive_the_donation_of_the_other(strategy, variable):
    with strategy.scope():
        other = dv.Variable(np.zeros(3, np.float32), aggregation="sum")
    ones = np.ones(3, np.float32)
    step = strategy.jit(lambda: variable.assign_add(ones))
    strategy.run(step)
    other.assign(variable.read_value())
    strategy.run(step)
    strategy.run(step)
    assert other.numpy().tolist() == [2, 2, 2]
    assert variable.numpy().tolist() == [6, 6, 6]


def test_eager_and_compiled_steps_alternate(strategy, variable):
    ones = np.ones(3, np.float32)
    with strategy.scope():
        own = dv.Variable(0.0, synchronization="on_read", aggregation="sum")

    def step():
        variable.assign_add(ones)
        own.assign_add(1.0)

    compiled = strategy.jit(step)
    for k in range(6):
        strategy.run(compiled if k % 2 else step)
        assert variable.numpy().tolist() == [2 * (k + 1)] * 3
        assert float(own) == 2 * (k + 1)
    variable.scatter_add([0], np.float32([-5]))
    strategy.run(compiled)
    assert variable.numpy().tolist() == [9, 14, 14]


def test_other_slots_are_found(strategy, variable):
    sgd = dv.optimizers.SGD(1.0, momentum=0.5)
    step = strategy.jit(lambda: sgd.apply_gradients([(np.ones(3, np.float32), variable)]))
    strategy.run(step)
    state = sgd.state_dict()
    strategy.run(step)
    variable.assign(np.zeros(3, np.float32))
    sgd.load_state_dict(state)  # makes other slots
    strategy.run(step)
    assert variable.numpy().tolist() == [-1.5] * 3
    assert sgd.slots(variable)[0].numpy().tolist() == [1.5] * 3
    assert sgd.iterations == 2


def test_debug_mode_runs_the_function_itself(strategy, variable):
    seen = []
    with dv.debug():
        strategy.run(strategy.jit(lambda: seen.append(here().replica_id_in_sync_group)))
    assert sorted(seen) == [0, 1]


@pytest.mark.wide
def test_interrupts_leave_variables_whole(strategy, variable):
    """At every point where Python looks for signals: all of the step is done, or nothing."""
    with strategy.scope():
        other = dv.Variable(np.zeros(3, np.float32), aggregation="sum")
    ones = np.ones(3, np.float32)

    def step():
        variable.assign_add(ones)
        other.assign_add(ones)

    compiled = strategy.jit(step)
    for _ in range(3):
        strategy.run(compiled)
    for _ in interrupt_points.strike_in_turn(lambda: strategy.run(compiled), 200):
        assert variable.numpy().tolist() == other.numpy().tolist()
        assert len({*variable.numpy().tolist()}) == 1
    before = variable.numpy()
    strategy.run(compiled)
    assert (variable.numpy() == before + 2).all()


def test_traces_have_spans_of_compiled_steps(strategy, variable, tmp_path):
    step = strategy.jit(lambda x: variable.assign_add(x * np.ones(3, np.float32)))
    with dv.profiler.trace(tmp_path / "run.json"):
        for _ in range(2):
            strategy.run(step, (1.0,))
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    spans = {each["name"]: each for each in events if each["ph"] == "X"}
    assert spans.keys() == {"run", "trace", "compile", "program"}
    assert spans["run"]["args"]["step"] == 2
    assert spans["program"]["dur"] <= spans["run"]["dur"]
    assert variable.numpy().tolist() == [4, 4, 4]


def test_results_outlive_the_donation_of_the_next_step(strategy, variable):
    def step():
        before = variable.read_value()
        variable.assign_add(np.ones(3, np.float32))
        return before, variable.read_value()

    compiled = strategy.jit(step)
    seen = [strategy.run(compiled) for _ in range(3)]
    assert [[x[0].tolist()[0] for x in pair] for pair in seen] == [[0, 2], [2, 4], [4, 6]]


@pytest.mark.wide
def test_gradients_are_clipped_inside_and_outside(strategy, jax):
    def step(x):
        clipped, norm = dv.optimizers.clip_by_global_norm({"a": x, "b": [4 * x]}, 1.0)
        return clipped["a"], norm * jax.numpy.ones(())

    x = dv.PerReplica([jax.numpy.float32(3.0), jax.numpy.float32(0.1)])
    eager, compiled = strategy.run(step, (x,)), strategy.run(strategy.jit(step), (x,))
    for mine, other in zip(compiled, eager, strict=True):
        assert np.allclose(np.asarray(mine.values), np.asarray(other.values), rtol=1e-6)
    assert np.allclose(float(compiled[0].values[0]), 3 / np.sqrt(9 + 144), rtol=1e-6)
    assert float(compiled[0].values[1]) == np.float32(0.1)


def test_batches_are_padded(strategy):
    data = dv.Dataset.from_arrays((np.arange(1.0, 8, dtype=np.float32),)).batch(4)
    step = strategy.jit(lambda rows, counts: here().all_reduce("sum", (rows * counts).sum()))
    totals, shapes = [], []
    for (rows,), counts in strategy.distribute_dataset(data, dv.InputOptions(pad=True)):
        totals.append(float(strategy.run(step, (rows, counts))[0]))
        shapes += [part.shape for part in (*rows.values, *counts.values)]
    assert totals == [10.0, 18.0]
    assert {*shapes} == {(2,)}
    assert step.traces == 1


@pytest.mark.wide
def test_digits_are_those_of_replicas_on_cpus(tpus, jax):
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, digits = datasets.load_digits(return_X_y=True)
    data = dv.Dataset.from_arrays(
        (np.float32(pixels / 16), np.eye(10, dtype=np.float32)[digits])
    ).batch(200, drop_remainder=True)

    def train(strategy, xp, compiled):
        with strategy.scope():
            hidden = dv.Variable(0.1 * np.sin(np.arange(64 * 20.0, dtype="f4")).reshape(64, 20))
            out = dv.Variable(0.1 * np.cos(np.arange(200.0, dtype=np.float32)).reshape(20, 10))
        sgd = dv.optimizers.SGD(0.5, momentum=0.5)

        def step(x, y):
            h = xp.tanh(x @ hidden.read_value())
            scores = xp.exp(h @ out.read_value())
            slope = (scores / scores.sum(1, keepdims=True) - y) / np.float32(len(x))
            back = (slope @ out.read_value().T) * (1 - h * h)
            sgd.apply_gradients([(h.T @ slope, out), (x.T @ back, hidden)])

        run = strategy.jit(step) if compiled else step
        for _ in range(3):
            for batch in strategy.distribute_dataset(data):
                strategy.run(run, batch)
        return np.concatenate([hidden.numpy().ravel(), out.numpy().ravel()])

    with dv.MirroredStrategy(2) as on_cpus:
        expected = train(on_cpus, np, False)
    for compiled in (False, True):
        found = train(tpus(2), jax.numpy, compiled)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
