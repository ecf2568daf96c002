import logging

import pytest

from ddpkit.compile.backend import using


@pytest.fixture(autouse=True)
def _quiet():
    """Inductor's structured trace would bury a failure."""
    logging.getLogger("torch.__trace").handlers.clear()
    logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)


@pytest.fixture
def interpreted():
    """For tests of what is traced, chosen and compared: graphs are not compiled, which takes seconds."""
    with using("interpreted"):
        yield
