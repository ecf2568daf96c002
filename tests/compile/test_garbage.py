import gc

import pytest
import torch
from test_step import criterion
from toy import Toy, random_batch

import ddpkit
from ddpkit.compile.backend import using
from ddpkit.compile.garbage import garbage_collection_paused


@pytest.fixture(autouse=True)
def _as_before():
    yield
    gc.enable()


def test_the_collector_waits_and_goes_on():
    with garbage_collection_paused():
        assert not gc.isenabled()
        with garbage_collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_error():
    with pytest.raises(ValueError, match="inside"), garbage_collection_paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_where_the_user_has_turned_it_off_it_stays_off():
    gc.disable()
    with garbage_collection_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


class Watched(Toy):
    """Notes whenever it is called with what kind of tensor, and whether garbage is collected."""

    def __init__(self, seen, *, fails=False):
        super().__init__()
        self.note, self.fails = seen.append, fails

    def forward(self, batch):
        is_traced = type(batch.positions) is not torch.Tensor
        self.note((is_traced, gc.isenabled()))
        if self.fails and is_traced:
            raise ArithmeticError("cannot be traced")
        return super().forward(batch)


def step_of(model, **options):
    return ddpkit.make_step(
        model, criterion, torch.optim.SGD(model.parameters(), lr=0.0), strategy="none", compile=True, **options
    )


def test_it_waits_for_a_trace_and_not_for_eager_code():
    seen = []
    with using("interpreted"):
        step_of(Watched(seen))(random_batch([4, 3]))
    assert set(seen) == {(True, False), (False, True)}
    assert gc.isenabled()


def test_it_goes_on_where_a_model_cannot_be_traced():
    seen = []
    with using("interpreted"), pytest.raises(Exception, match="cannot be traced"):
        step_of(Watched(seen, fails=True))(random_batch([4, 3]))
    assert (True, False) in seen
    assert gc.isenabled()
