"""Every call of a sped-up layer in these tests also asks whether the short way and the long way find the same."""

import pytest


@pytest.fixture(autouse=True)
def both_ways_agree(monkeypatch):
    """`only_adapter` may leave a call to `at_a_call`; what it takes, `at_a_call` takes too, with the same adapter."""
    pytest.importorskip("peft")
    from fastlora.peft_layers import conditions

    short = conditions.only_adapter

    def checked(layer, x):
        found = short(layer, x)
        if found is not None:
            reason, active = conditions.at_a_call(layer, x, (), {})
            assert (reason, len(active)) == ("", 1)
            expected = conditions.adapter(layer, active[0])
            assert found.a is expected.a
            assert found.b is expected.b
            assert found[2:] == expected[2:]
        return found

    monkeypatch.setattr(conditions, "only_adapter", checked)
