import logging

import pytest


@pytest.fixture(autouse=True)
def _quiet():
    """Inductor's structured trace would bury a failure."""
    logging.getLogger("torch.__trace").handlers.clear()
    logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)
