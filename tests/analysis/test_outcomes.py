import numpy as np
import pytest
from simulated_runs import falling, run_of

from ddpkit.analysis.outcomes import ended, outcome

NAN = "The loss was nan at step 9 on rank 1: look at that batch's labels, lower optimizer.lr"


@pytest.mark.parametrize(
    ("summary", "kind"),
    [
        ({"status": "finished"}, "complete"),
        ({"status": "running"}, "interrupted"),
        ({}, "interrupted"),
        ({"status": "failed"}, "interrupted"),
        ({"status": "failed", "error": NAN}, "failed"),
        ({"status": "failed", "error": NAN, "error_kind": "NonFiniteLossError"}, "failed"),
        ({"status": "failed", "error": "The gradient of 'a' is NaN", "error_kind": "RankLostError"}, "failed"),
        ({"status": "failed", "error": "compiled and eager differ", "error_kind": "ParityError"}, "failed"),
        ({"status": "failed", "error": "CUDA out of memory", "error_kind": "OutOfMemoryError"}, "failed"),
        ({"status": "failed", "error": "a significant difference", "error_kind": "RuntimeError"}, "failed"),
        ({"status": "failed", "error": "stopped by SIGUSR1 after step 7: continue with resume=x"}, "interrupted"),
        ({"status": "stopped", "error": "stopped by SIGUSR1 after step 7: continue with resume=x"}, "interrupted"),
        (
            {"status": "failed", "error": "Rank 1 ended by SIGKILL", "error_kind": "RankDisagreementError"},
            "interrupted",
        ),
        ({"status": "failed", "error": "", "error_kind": "KeyboardInterrupt"}, "interrupted"),
        (
            {"status": "failed", "error": "x could not be written: free some space", "error_kind": "InputError"},
            "interrupted",
        ),
    ],
)
def test_what_failed_of_itself_and_what_was_interrupted(summary, kind):
    assert ended(summary).kind == kind


def test_logs_are_read_too():
    base = falling(100)
    baseline = run_of("baseline", base)
    bad, blown, higher = (base.copy() for _ in range(3))
    bad[70:] = np.nan
    blown[60:] *= np.linspace(1, 1e6, 40)
    higher *= 3  # far off, as another seed may be, but no divergence
    for losses, status, kind in (
        (base, "finished", "complete"),
        (bad, "finished", "failed"),
        (blown, "finished", "failed"),
        (higher, "finished", "complete"),
        (base[:50], "running", "interrupted"),
        (base, "running", "complete"),
        (base[:50], "stopped", "interrupted"),
        (base, "stopped", "interrupted"),  # its last row may be missing in projection.csv
        (base[:50], "finished", "complete"),  # it stopped early by its own rule
    ):
        assert outcome(run_of("arm", losses, status=status), baseline, 100).kind == kind
    rising = run_of("baseline", base[::-1] * np.linspace(1, 100, 100))
    assert outcome(rising, rising, 100).kind == "failed"
