import math

from ddpkit.compile.parity import Difference
from ddpkit.experiments.check import table


def test_the_table_shows_the_worst_of_each_tensor():
    found = [
        Difference("loss", 1e-12, 1e-10, "2 atoms"),
        Difference("weight", 1e-11, 1e-10, "2 atoms"),
        Difference("loss", 3e-12, 1e-10, "5 atoms"),
        Difference("weight", math.nan, 1e-10, "5 atoms"),
    ]
    lines = table(found).splitlines()
    assert lines[0] == "batches of 2 atoms; 5 atoms"
    assert "3.00e-12" in lines[2]
    assert lines[3].endswith("nan    1e-10  <- too large")
    assert lines[4] == "2 tensors compared, 1 differ"
