"""`python -m ddpkit.experiments` is the program `ddpkit`."""

from ddpkit.experiments.cli import main

main()
