from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.leases import LeaseKey, LeaseTable

KEYS = st.tuples(st.sampled_from("abc"), st.integers(0, 1))
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["grant", "renew", "release", "wait"]),
        KEYS,
        st.integers(1, 5),
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_the_table_is_a_set_of_deadlines(operations: list[tuple[str, LeaseKey, int]]) -> None:
    table, model, now = LeaseTable(), dict[LeaseKey, float](), 0.0
    for what, key, amount in operations:
        if what == "wait":
            now += amount / 2
        elif what == "grant" and key in model:
            with pytest.raises(ValueError, match="exists"):
                table.grant(key, now, amount)
        elif what == "grant":
            table.grant(key, now, amount)
            model[key] = now + amount
        elif what == "renew":
            assert table.renew(key, now, amount) is (key in model)
            if key in model:
                model[key] = max(model[key], now + amount)
        else:
            assert table.release(key) is (model.pop(key, None) is not None)
        due = table.expired(now)
        assert set(due) == {one for one, deadline in model.items() if deadline <= now}
        assert [model[one] for one in due] == sorted(model[one] for one in due)
        assert table.next_deadline() == (min(model.values()) if model else None)
        assert len(table) == len(model)
        assert (key in table) is (key in model)


def test_expired_leases_stay_until_released() -> None:
    table = LeaseTable()
    table.grant(("r", 0), 10.0, 5.0)
    assert table.expired(14.999) == []
    assert table.expired(15.0) == [("r", 0)]
    assert table.renew(("r", 0), 16.0, 1.0)
    assert table.expired(16.5) == []
    assert table.release(("r", 0))
    assert table.expired(99.0) == []


def test_a_renewal_never_shortens() -> None:
    table = LeaseTable()
    table.grant(("r", 0), 0.0, 10.0)
    table.renew(("r", 0), 1.0, 2.0)
    assert table.next_deadline() == 10.0


def test_a_lease_must_last() -> None:
    with pytest.raises(ValueError, match="must last"):
        LeaseTable().grant(("r", 0), 0.0, 0.0)
