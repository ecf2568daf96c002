"""What tests of strategies, models and whole runs are made of.

`python -m ddpkit.testing mypackage.MySync` puts a strategy through the conformance suite and prints what passed.
`validate_model` does the same for a model.
"""

from ddpkit.testing.model import validate_model as validate_model
from ddpkit.testing.ranks import RankFailure as RankFailure
from ddpkit.testing.ranks import run_ranks as run_ranks
from ddpkit.testing.suite import Outcome as Outcome
from ddpkit.testing.suite import run_conformance as run_conformance
