"""Step counts per variable in checkpoints; older ones with one count per optimizer are readable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dvkernels as dv

# Written when an optimizer had a single count: three steps of each, with gradients of ones.
EARLIER = Path(__file__).with_name("single_step_count")


def made():
    a, b = dv.Variable(np.ones(2), name="a"), dv.Variable(np.ones(3), name="b")
    optimizers = {
        "adam": dv.optimizers.Adam(0.1),
        "sgd": dv.optimizers.SGD(lambda steps: 0.1 / (1 + steps)),
        "mom": dv.optimizers.SGD(0.1, momentum=0.9),
    }
    return {"a": a, "b": b, **optimizers}


def step(objects, count=1):
    for _ in range(count):
        for name, of in (("adam", "a"), ("sgd", "b"), ("mom", "b")):
            variable = objects[of]
            objects[name].apply_gradients([(np.ones(variable.shape), variable)])


def test_a_single_step_count_applies_to_all_variables():
    restored, straight = made(), made()
    dv.Checkpoint(**restored).restore(EARLIER)
    step(straight, 3)
    for run in (restored, straight):
        step(run)
    for name in ("a", "b"):
        np.testing.assert_array_equal(restored[name].numpy(), straight[name].numpy())
    assert [int(restored[name].steps(restored["b"])) for name in ("sgd", "mom")] == [4, 4]


@pytest.mark.parametrize("make", [lambda: dv.optimizers.Adam(0.1), lambda: dv.optimizers.SGD(
    lambda steps: 1 / (1 + steps)), lambda: dv.optimizers.AdamW(0.1)])  # fmt: skip
@pytest.mark.parametrize("replicas", [1, 3])
def test_step_counts_are_restored_on_any_number_of_replicas(tmp_path, make, replicas):
    def build(count):
        strategy = dv.MirroredStrategy([f"cpu:{k}" for k in range(count)])
        with strategy.scope():
            pair = [dv.Variable(np.ones(2)) for _ in range(2)]
        return strategy, {"pair": pair, "optimizer": make()}

    strategy, run = build(2)
    trunk, head = run["pair"]
    for _ in range(4):
        run["optimizer"].apply_gradients([(np.ones(2), trunk)])
    run["optimizer"].apply_gradients([(np.ones(2), head)])
    dv.Checkpoint(**run).save(tmp_path / "run")
    other, resumed = build(replicas)
    resumed["optimizer"].apply_gradients([(np.ones(2), v) for v in resumed["pair"]])
    dv.Checkpoint(**resumed).restore(tmp_path / "run")
    assert [int(resumed["optimizer"].steps(v)) for v in resumed["pair"]] == [4, 1]
    assert resumed["optimizer"].iterations == 4
    for each in (run, resumed):
        each["optimizer"].apply_gradients([(np.ones(2), v) for v in each["pair"]])
    for one, another in zip(run["pair"], resumed["pair"], strict=True):
        np.testing.assert_array_equal(one.numpy(), another.numpy())
    strategy.close()
    other.close()


def test_a_step_count_of_zero_is_restored(tmp_path):
    objects = made()
    dv.Checkpoint(**objects).save(tmp_path / "fresh")
    step(objects, 2)
    dv.Checkpoint(**objects).restore(tmp_path / "fresh")
    assert [int(objects[k].steps(objects[v])) for k, v in (("adam", "a"), ("sgd", "b"))] == [0, 0]


def test_a_loaded_state_without_its_variable_is_saved(tmp_path):
    first, second = made(), made()
    step(first, 3)
    second["adam"].load_state_dict(first["adam"].state_dict())
    dv.Checkpoint(**second).save(tmp_path / "run")
    third = made()
    dv.Checkpoint(**third).restore(tmp_path / "run")
    third["a"].assign(first["a"].numpy())
    for run in (first, third):
        run["adam"].apply_gradients([(np.ones(2), run["a"])])
    np.testing.assert_array_equal(third["a"].numpy(), first["a"].numpy())
