from hypothesis import given
from hypothesis import strategies as st

from safe_pruner_node.training.schedule import Budget


@given(done=st.floats(0, 1))
def test_rate_stays_between_nothing_and_its_peak(done):
    rate = Budget(steps=10, minutes=0).learning_rate(done, 1e-3)
    assert 0 < rate <= 1e-3


def test_rises_then_falls():
    budget = Budget(steps=100, minutes=0)
    rates = [budget.learning_rate(i / 100, 1.0) for i in range(101)]
    top = rates.index(max(rates))
    assert 2 <= top <= 6
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] < 0.1
    assert rates[-1] < 0.02


def test_whichever_bound_comes_first_ends_it():
    budget = Budget(steps=100, minutes=2)
    assert budget.progress(50, 12) == 0.5
    assert budget.progress(10, 60) == 0.5
    assert budget.progress(10, 200) == 1.0
