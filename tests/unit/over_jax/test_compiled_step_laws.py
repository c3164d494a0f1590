"""Laws of compiled steps: modes x aggregations x reads over several steps give eager results."""

from __future__ import annotations

import numpy as np
import pytest

import dvkernels as dv

pytestmark = [pytest.mark.jax, pytest.mark.wide]
here = dv.get_replica_context
MODES = [("on_write", how) for how in ("sum", "mean", "only_first_replica")]
MODES += [("on_read", how) for how in ("sum", "mean", "only_first_replica")]
MODES += [("none", "none")]


def both(make, count, build, parts):
    """Yield what is seen after each step, by the function itself and by the compiled step."""
    seen = []
    for is_compiled in (False, True):
        strategy = make(count, seed=3)
        with strategy.scope():
            step, look = build(strategy)
        runs = strategy.jit(step) if is_compiled else step
        rows = []
        for k in range(3):
            given = dv.PerReplica([np.float32(parts(k, r)) for r in range(count)])
            result = strategy.run(runs, (given, 2.0))
            rows.append([np.asarray(x).tolist() for x in [*result.values, *look()]])
        seen.append(rows)
        if is_compiled:
            assert runs.traces == 1, "the second call traces nothing"
    return seen


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize(("when", "how"), MODES)
def test_writes_and_reads(tpus, x64, when, how, count):
    def build(strategy):
        v = dv.Variable(np.arange(3, dtype=np.float32), synchronization=when, aggregation=how)
        other = dv.Variable(np.ones(3, np.float32), synchronization="none")

        def step(x, y):
            before = v.read_value() + other  # an operand of a variable reads it
            v.assign_add(x * other.read_value())
            v.assign_sub(y * other)
            between = v.read_value()
            v.assign(2 * between + x)
            return before + 4 * between + 16 * v

        def look():
            return [*v.values, *([] if when == "none" else [v.read_value()])]

        return step, look

    eager, compiled = both(tpus, count, build, lambda k, r: 4 * k + r)
    assert compiled == eager


VERBS = ["add", "sub", "mul", "div", "min", "max", "update"]


@pytest.mark.parametrize("how", ["sum", "mean", "only_first_replica", "none"])
@pytest.mark.parametrize("verb", VERBS)
def test_scatter(tpus, x64, jax, verb, how):
    if verb in ("min", "max", "update") and how in ("sum", "mean"):
        pytest.skip("refused: not additive")

    def build(strategy):
        when = "none" if how == "none" else "on_write"
        table = dv.Variable(np.full((4, 2), 64, np.float32), synchronization=when, aggregation=how)

        def step(x, y):
            updates = x * jax.numpy.asarray([[1, 2], [4, 2], [2, 8]], "float32")
            getattr(table, f"scatter_{verb}")(jax.numpy.asarray([1, 3, 1]), updates)
            return table.gather_rows(jax.numpy.asarray([3, 1]))

        return step, lambda: table.values

    eager, compiled = both(tpus, 2, build, lambda k, r: 2 ** (r + k % 2))
    assert compiled == eager


@pytest.mark.parametrize("count", [1, 2, 8])
def test_collectives(tpus, x64, jax, count):
    jnp = jax.numpy

    def build(strategy):
        def step(x, y):
            whole = x + jnp.arange(8.0, dtype="float32").at[2].set(-x)
            ops = [here().all_reduce(op, whole) for op in ("sum", "mean", "min", "max")]
            product = here().all_reduce("prod", {"a": 1 + (whole % 2)})["a"]
            weighted = here().all_reduce("mean", jnp.where(x == 0, jnp.nan, x), weight=x * 1.0)
            part = here().reduce_scatter("sum", whole)
            gathered = here().all_gather(whole[:2])
            stacked = here().all_gather(x)
            root = here().broadcast(whole, root=count - 1)
            pending = here().all_reduce_async("sum", x).wait()
            flags = here().all_reduce("max", x > 1)
            here().barrier()
            parts = [*ops, product, part, gathered, stacked, root, flags * 1.0]
            sums = [(k + 1) * p.astype("float32").sum() for k, p in enumerate(parts)]
            return jnp.stack([*sums, weighted.astype("float32"), pending.astype("float32")])

        return step, list

    eager, compiled = both(tpus, count, build, lambda k, r: k + r + (count == 1))
    if count > 1:
        np.testing.assert_allclose(compiled[1], eager[1], rtol=1e-6)  # the weights: sevenths
    assert [row[:10] for row in np.array(compiled)[:, 0].tolist()] == [
        row[:10] for row in np.array(eager)[:, 0].tolist()
    ]


def test_nested_results_and_constants(tpus, jax):
    strategy = tpus(2)
    with strategy.scope():
        v = dv.Variable(1.0, aggregation="mean")

    def step(batch, scale, *, name):
        v.assign_add(batch["x"].sum() * scale)
        return {"v": v.read_value(), "name": name, "none": None, "variable": v, "n": 3}

    given = {"x": dv.PerReplica([np.ones(2, np.float32), 3 * np.ones(2, np.float32)])}
    eager = strategy.run(step, (given, 0.5), {"name": "a"})
    compiled = strategy.run(strategy.jit(step), (given, 0.5), {"name": "a"})
    assert eager.keys() == compiled.keys()
    assert compiled["name"].values == ("a", "a") == eager["name"].values
    assert compiled["none"] is None is eager["none"]
    assert compiled["variable"] is v is eager["variable"]
    assert compiled["n"].values == (3, 3)
    assert [float(x) for x in compiled["v"].values] == [5.0, 5.0]
    assert strategy.run(strategy.jit(lambda: None)) is None


OPTIMIZERS = {
    "sgd": lambda: dv.optimizers.SGD(0.1),
    "momentum": lambda: dv.optimizers.SGD(0.1, momentum=0.5, weight_decay=0.01),
    "nesterov": lambda: dv.optimizers.SGD(lambda k: 0.1 / (1 + k), momentum=0.5, nesterov=True),
    "adagrad": lambda: dv.optimizers.Adagrad(0.1),
    "adam": lambda: dv.optimizers.Adam(0.1),
    "adamw": lambda: dv.optimizers.AdamW(0.1),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(tpus, x64, jax, kind, weighted):
    """A compiled step, an eager one, and one of MirroredStrategy on CPUs give the same weights."""
    dtype = "float64" if x64 else "float32"
    ends = []
    for where in ("jit", "eager", "numpy"):
        strategy = dv.MirroredStrategy(2) if where == "numpy" else tpus(2)
        optimizer = OPTIMIZERS[kind]()
        with strategy.scope():
            v = dv.Variable(np.array([1.0, -2.0, 3.0], dtype))
            w = dv.Variable(np.ones((2, 2), dtype))

        def step(x, n, v=v, w=w, optimizer=optimizer):
            weight = n if weighted else None
            pairs = [(x * v.read_value(), v), (x * w.read_value() * w.read_value(), w)]
            optimizer.apply_gradients(pairs, weight=weight)
            optimizer.apply_gradients([(x * v.read_value(), v), (None, w)], op="mean")

        runs = strategy.jit(step) if where == "jit" else step
        for k in range(4):
            given = dv.PerReplica([np.asarray(0.5 + k, dtype), np.asarray(1.5, dtype)])
            strategy.run(runs, (given, dv.PerReplica([1.0, 3.0])))
        assert optimizer.iterations == 8
        assert (int(optimizer.steps(v)), int(optimizer.steps(w))) == (8, 4)
        slots = [slot.numpy() for slot in optimizer.slots(v)]
        ends.append([v.numpy(), w.numpy(), *slots])
        if where == "jit":
            assert runs.traces == 1
        strategy.close()
    tolerance = 1e-12 if x64 else 2e-6
    for array, eager, reference in zip(*ends, strict=True):
        np.testing.assert_allclose(array, eager, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(array, reference, rtol=tolerance, atol=tolerance)


def test_keys_are_those_of_the_eager_step(tpus, jax):
    def step():
        return jax.random.bits(here().rng_key("noise"))

    eager, compiled = tpus(2, seed=5), tpus(2, seed=5)
    runs = compiled.jit(step)
    drawn = [eager.run(step).values for _ in range(3)]
    assert [compiled.run(runs).values for _ in range(3)] == drawn
    assert len({int(bits) for row in drawn for bits in row}) == 6
    state = compiled.state_dict()
    again = compiled.run(runs).values
    compiled.load_state_dict(state)
    assert compiled.run(runs).values == again
    assert runs.traces == 1
