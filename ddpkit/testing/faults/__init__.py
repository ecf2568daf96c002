"""The fault campaign: runs that are struck at random moments must end soon, say why, and go on bit for bit.

`python -m ddpkit.testing faults --count N --seed S`; what is struck and what must hold stands in docs/explanation/faults.md.
"""
