"""Network parameters from the environment are taken as given, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvkernels.communicators.workers.mpi import network_model
from dvkernels.errors import ClusterError
from dvkernels.schedules.cost_model import NETWORK, Network

FIELDS = st.fixed_dictionaries(
    {},
    optional={
        name: st.floats(0.01, 1.0) if name == "incast" else st.floats(1e-9, 1e12)
        for name in Network._fields
    },
)


@given(FIELDS)
def test_given_parameters_replace_the_defaults(said):
    text = " , ".join(f"{name} = {value!r}" for name, value in said.items())
    found = network_model.from_environ({network_model.VARIABLE: text})
    assert found._asdict() == NETWORK._asdict() | said


@given(FIELDS)
def test_the_printed_value_can_be_set(said):
    found = NETWORK._replace(**said)
    again = network_model.from_environ({network_model.VARIABLE: network_model.to_text(found)})
    assert again == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        "rate", "rate=", "rate=fast", "rate=0", "rate=-1", "rate=inf", "rate=nan", "speed=1",
        "incast=0", "incast=1.01", "hop_seconds=-1e-6", "rate=1,rate=1", "=1", "7e9", "rate=1;2",
    ],
)  # fmt: skip
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ClusterError, match=r"DVKERNELS_NETWORK: expected settings .* got '"):
        network_model.from_environ({network_model.VARIABLE: f"message_seconds=0,{wrong}"})
