"""Tables of notebooks: all that repr describes, escaped, well-formed, and never an error."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest

import dvkernels as dv
from dvkernels import html_table

VOID = {"br"}


class Cells(HTMLParser):
    """Texts of the cells; fails on elements that are not closed, and on styles and scripts."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert tag in {"table", "caption", "tr", "th", "td", "br"}
        assert dict(attributes).keys() <= ({"scope"} if tag == "th" else set())
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


class Hostile:
    """Value that raises wherever it is asked."""

    def __repr__(self):
        raise RuntimeError("no")

    __str__ = __len__ = __iter__ = __repr__


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        yield strategy


def objects(strategy, folder):
    data = dv.Dataset.from_arrays(np.arange(9.0)).shuffle(seed=1).batch(2)
    distributed = strategy.distribute_dataset(data)
    with strategy.scope():
        variable = dv.Variable(np.ones((2, 3)), name="<weight>", aggregation="mean")
    checkpoint = dv.Checkpoint(weight=variable, bias=np.zeros(3))
    path = folder / "saved"
    checkpoint.save(path)
    return [
        (strategy, ["MirroredStrategy", "cpu:0", "cpu:1"]),
        (dv.Device("cpu", 3), ["kind", "cpu", "index", "3"]),
        (variable, ["<weight>", "(2, 3)", "float64", "on_write", "mean", "cpu:1"]),
        (data, ["shuffle(seed=1)", "batch(2)"]),
        (distributed, ["batch(2)", "replicas", "2"]),
        (iter(distributed), ["epoch", "position", "0", "closed", "False"]),
        (dv.optimizers.SGD(lambda step: 0.5, momentum=0.9), ["learning_rate", "0.5", "0.9"]),
        (dv.optimizers.AdamW(), ["beta_2", "0.999", "weight_decay"]),
        (dv.optimizers.Adagrad(0.25), ["learning_rate", "0.25", "epsilon"]),
        (checkpoint, ["weight: Variable", "bias: ndarray"]),
        (dv.CheckpointManager(checkpoint, folder), [str(folder), "max_to_keep"]),
        (checkpoint.restore(path), ["matched", "weight", "bias", str(path)]),
        (strategy.run(lambda: "<b>&"), ["replica", "device", "value", "'<b>&'"]),
    ]


def test_each_object_has_a_table_of_its_facts(strategy, tmp_path):
    for each, facts in objects(strategy, tmp_path):
        page = each._repr_html_()
        cells = Cells(page)
        assert cells.tags[:2] == ["table", "caption"]
        assert cells.texts[0] == type(each).__name__
        assert {*facts} <= {*cells.texts}, (page, facts)
        assert page.count('<th scope="') == page.count("<th")
        if hasattr(each, "close") and each is not strategy:
            each.close()


def test_a_table_is_small_and_copies_nothing(strategy):
    many = dv.Checkpoint(**{f"name_{i}": i for i in range(1000)})
    assert "and 980 more" in Cells(many._repr_html_()).texts
    large = np.zeros(10**7)
    shown = strategy.run(lambda: large)._repr_html_()
    assert len(shown) < 500
    assert "float64[10000000]" in shown


def test_a_table_never_raises(strategy):
    def fail(_):
        raise ZeroDivisionError("<fails>")

    values = strategy.run(Hostile)
    assert "whose repr fails" in values._repr_html_()
    rate = dv.optimizers.SGD(fail)
    assert "ZeroDivisionError: <fails>" in Cells(rate._repr_html_()).texts
    assert "ZeroDivisionError" in repr(rate)
    assert "Hostile" in html_table.table("any", (), [("row", Hostile()), ("list", [Hostile()])])


def test_a_table_starts_no_collective():
    """In one replica alone the others would be waited for."""
    with dv.MirroredStrategy(["cpu:0", "cpu:1"], timeout_seconds=5) as strategy:
        with strategy.scope():
            variable = dv.Variable(0.0, synchronization="on_read", aggregation="sum")

        def step():
            replica = dv.get_replica_context().replica_id_in_sync_group
            return variable._repr_html_() if replica == 0 else ""

        assert "on_read" in strategy.run(step).values[0]
