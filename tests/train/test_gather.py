"""Small collectives that the host waits for no longer than the timeout."""

import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddpkit.ranks.gather import Gather, Sent
from ddpkit.ranks.group import Environment, environment, is_of_communication
from ddpkit.testing import run_ranks


class Never:
    """The end of a collective on a device that hangs."""

    def query(self):
        return False


def test_a_device_that_hangs_is_waited_for_until_the_timeout():
    gather = Gather(Environment(), timeout=0.5)
    one = torch.ones(1, 1)
    gather._under_way.append(Sent(one[0], one, one, None, Never(), time.monotonic(), None))  # as on a GPU
    began = time.monotonic()
    with pytest.raises(dist.DistError, match="has not ended after") as raised:
        gather.receive()
    assert 0.3 < time.monotonic() - began < 5
    assert is_of_communication(raised.value)  # so that whoever is missing is looked for


def gathers():
    here = environment()
    gather = Gather(here, timeout=20.0)
    assert gather.receive() is None
    gather.send(torch.tensor([float(here.rank), float("nan")], dtype=torch.float64), note="a note")
    everyone, note = gather.receive()
    objects = gather.objects({"rank": here.rank, "text": "x" * (1 + 20 * here.rank), "bits": torch.tensor([here.rank])})
    return everyone, note, gather.numbers([here.rank + 0.5]), objects


def test_every_rank_has_the_values_of_all():
    for everyone, note, numbers, objects in [gathers(), *run_ranks(gathers, 2)]:
        ranks = list(range(len(objects)))
        assert note == "a note"
        np.testing.assert_array_equal(everyone, [[rank, np.nan] for rank in ranks])
        np.testing.assert_array_equal(numbers, [[rank + 0.5] for rank in ranks])
        assert [(o["rank"], len(o["text"]), o["bits"].item()) for o in objects] == [(r, 1 + 20 * r, r) for r in ranks]
