"""A rank that fails or ends while others wait for it: they say so within seconds, without any launcher's help."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
from starts import fork_program, free_port

from ddpkit.testing.ranks import end

PROGRAM = """
    import os, signal, sys, time
    import ddpkit, torch
    from ddpkit.ranks.agree import agree, share
    from ddpkit.errors import RankDisagreementError

    what, culprit = sys.argv[1], int(sys.argv[2])
    here = ddpkit.init_process_group(device="cpu")
    failing = here.rank == culprit
    if what in ("uncaught", "caught", "unfrozen"):
        from ddpkit.compile.backend import use

        use("interpreted")
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 3)
        parameters = model.parameters()
        model.bias.requires_grad_(what != "unfrozen")
        step = ddpkit.make_step(
            model, lambda y, _: y.square().mean(), torch.optim.SGD(parameters, 0.1), strategy="ingraph", compile=True
        )
        original = model.weight
        if failing and what == "unfrozen":
            model.bias.requires_grad_()
        elif failing:
            model.weight = torch.nn.Parameter(torch.zeros(3, 3))
        began = time.monotonic()
        if what != "uncaught":
            try:
                step(torch.ones(2, 3))
            except (ddpkit.InputError, RankDisagreementError) as error:
                print(f"told {here.rank} {time.monotonic() - began:.0f} {type(error).__name__}: {error}", flush=True)
            model.weight = original
            model.bias.requires_grad_(what != "unfrozen")
            with agree("trying again"):
                pass
            step(torch.ones(2, 3))
            print(f"went on {here.rank} {model.weight.sum().item():.6f}", flush=True)
            sys.exit()
        step(torch.ones(2, 3))
    if failing and what == "exit":
        sys.exit(3)
    if failing and what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    with agree("the first thing"):
        pass
    if failing and what == "raises":
        raise MemoryError("no room")
    share(lambda: 5, "the second thing")
"""


def variables_of(rank, port):
    return os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return path


def start(program, *words):
    """Two ranks by hand: what each said, its exit code, and after how many seconds the last ended."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), *words],
            env=variables_of(rank, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    began = time.monotonic()
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return said, [rank.returncode for rank in ranks], time.monotonic() - began


@pytest.mark.parametrize(
    ("what", "culprit", "sentence"),
    [
        ("uncaught", 1, "Rank 1 has ended (InputError: Parameter 'weight' has been replaced"),
        ("raises", 0, "Rank 0 has ended (MemoryError: no room), but rank 1 waits for it in the second thing"),
        ("exit", 1, "Rank 1 has ended, but rank 0 waits for it in the first thing: see what rank 1 says."),
        ("killed", 1, "ended without a word (killed, or out of memory), but rank 0 waits for it in the first thing."),
    ],
)
def test_a_rank_that_ends_is_named_by_those_that_wait(what, culprit, sentence, program):
    said, codes, took = start(program, what, str(culprit))
    # the rank may wait before the other has come to its end
    other = sentence.replace("Rank 1 has ended (", "rank 1 has failed on the way to it (")
    assert sentence in said[1 - culprit] or other in said[0]
    assert all(code != 0 for code in codes)
    assert took < 60


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("caught", "Parameter 'weight' has been replaced since"),
        ("unfrozen", "Parameter 'bias' was frozen when strategy=ingraph"),
    ],
)
def test_a_rank_that_lives_on_after_its_error_is_named_and_all_may_try_again(what, error, program, tmp_path):
    port = free_port()
    folders = [tmp_path / str(rank) for rank in range(2)]
    ranks = [
        fork_program(program, [what, "1"], variables_of(rank, port), folder) for rank, folder in enumerate(folders)
    ]
    try:
        codes = [rank.wait(300.0) for rank in ranks]
    finally:
        end(ranks)
    said = [(folder / "output").read_text() for folder in folders]
    told = [next(line for line in text.splitlines() if line.startswith("told")) for text in said]
    assert f"InputError: {error}" in told[1]
    assert (
        "RankDisagreementError: Rank 0 waits for rank 1 in order to compile the step, but rank 1 has failed" in told[0]
    )
    assert error in told[0]
    assert [text.split()[1] for text in told] == ["0", "1"]
    assert all(int(text.split()[2]) < 20 for text in told)
    went_on = [next(line for line in text.splitlines() if line.startswith("went on")).split()[-1] for text in said]
    assert went_on[0] == went_on[1]
    assert codes == [0, 0]


COMPUTES_ON = """
import threading, torch
from ddpkit.experiments import cli

begun = threading.Semaphore(0)

def compute():
    x = torch.ones(400, 400)
    while True:
        x = (x @ x).clamp(0, 1)
        begun.release()

def work():
    for _ in range(3):
        threading.Thread(target=compute, daemon=True).start()
    for _ in range(30):
        begun.acquire()
    print("done")

cli._leave(work)
cli._end()
"""


def test_threads_that_compute_on_do_not_abort_the_end():
    done = subprocess.run([sys.executable, "-c", COMPUTES_ON], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
