"""The cases that a strategy must pass; `ddpkit.testing.run_conformance` runs them on real ranks, on GPUs where each has one.

Each case is a function of a `Setting`, called on every rank; it asserts. Gradients are compared in float64 with those of one
process that holds the batches of all ranks. A module holds the cases that look at one thing:

| module | looks at |
|---|---|
| `averages` | gradients of unequal batches, micro-batches, dtypes, shared parameters; bits; `stats` |
| `unused` | parameters without a gradient, on some ranks or on all |
| `frozen` | parameters that are frozen and unfrozen while training goes on |
| `further_modules` | modules with trained parameters beside the model |
| `non_finite` | NaN and infinity |
| `mismatches` | ranks that hold different models or options, or that call differently |
| `compiled` | compiled steps, recorded ones included |
"""

from ddpkit.sync.conformance import averages as averages
from ddpkit.sync.conformance import compiled as compiled
from ddpkit.sync.conformance import frozen as frozen
from ddpkit.sync.conformance import further_modules as further_modules
from ddpkit.sync.conformance import mismatches as mismatches
from ddpkit.sync.conformance import non_finite as non_finite
from ddpkit.sync.conformance import unused as unused
from ddpkit.sync.conformance.run import CANNOT as CANNOT
from ddpkit.sync.conformance.run import noted as noted
from ddpkit.sync.conformance.run import refuse as refuse
from ddpkit.sync.conformance.run import run_cases as run_cases
from ddpkit.sync.conformance.setting import CASES as CASES
from ddpkit.sync.conformance.setting import applicable as applicable
