import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddpkit.ranks import phase
from ddpkit.ranks.lifeline import ALL_WAIT, ENDED, IDLE, SILENT, Judge
from ddpkit.ranks.processes import Meter, below, state
from ddpkit.ranks.watchdog import GRACE, Ages, Board, Seen, _ended, _timeout, verdict


@pytest.mark.parametrize(
    ("waits", "together", "ages", "words"),
    [
        (0, False, Ages(stopped=12), "has been stopped for 12 s"),
        (0, False, Ages(idle=12), "no progress for 12 s"),
        (0, False, Ages(stopped=11, idle=11, waited=99), ""),
        (1, False, Ages(idle=99), ""),
        (1, False, Ages(waited=16), "has waited 16 s for the other ranks"),
        (2, False, Ages(idle=99, waited=99), ""),  # for another run
        (1, True, Ages(waited=99), ""),  # the others judge
        (1, True, Ages(idle=12 + GRACE), "no progress for 18 s"),  # none of its threads runs
        (0, True, Ages(stopped=13), ""),  # they say it first
        (0, True, Ages(stopped=12 + GRACE), "has been stopped for 18 s"),
        (1, True, Ages(stopped=12 + GRACE), "has been stopped for 18 s"),
    ],
)
def test_verdicts(waits, together, ages, words):
    said = verdict(Seen(1, "data", waits, together, 12.0, ""), ages)
    assert (words in said) if words else not said


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (["train.timeout=12", "+train.timeout=3.5"], 3.5),
        ([], 600),
        (["train.timeout=soon"], 600),
        (["train.timeout=-1"], 600),
    ],
)
def test_the_timeout_of_the_command_line(words, seconds):
    assert _timeout(words) == seconds


def test_the_phase_of_another_process_is_read_from_its_name():
    before = Path("/proc/self/comm").read_text()
    try:
        for name in phase.PHASES:
            phase.enter(name)
            assert phase.of(os.getpid()) == name
    finally:
        Path("/proc/self/comm").write_text(before.strip())
    assert phase.of(os.getppid()) == ""


def test_a_rank_tells_its_watchdog_how_it_stands(tmp_path):
    board = Board(12.0)
    phase.listeners.append(board.tell)
    try:
        first = board.read()
        with phase.waiting("the others"):
            waits = board.read()
            with phase.waiting("another run", patient=True):
                patient = board.read()
        board.watch_together(together=True, limit=7.0)
        board.belongs_to(tmp_path / "ein Lauf ü")
        board.idle = 3.5
        for sentence in ("Rank 1 fand kein Gefäß.", "SIGTERM came."):  # what comes later follows from the first
            board.leave_word(sentence)
    finally:
        phase.listeners.remove(board.tell)
    last = board.read()
    assert [seen.waits for seen in (first, waits, patient, last)] == [0, 1, 2, 0]
    assert first.changes < waits.changes < patient.changes < last.changes
    assert (last.together, last.limit, last.run_dir, board.idle) == (True, 7.0, str(tmp_path / "ein Lauf ü"), 3.5)
    assert (first.words, last.words) == ("", "Rank 1 fand kein Gefäß.")


def test_a_board_is_never_read_half_written():
    board = Board(12.0)
    writer = os.fork()
    if writer == 0:
        while True:
            board.tell()
    try:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            seen = board.read()
            assert (seen.limit, seen.changes > 0) == (12.0, True)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


PROGRAMS = {
    "computes": "while True: pass",
    "reads": "import time\nwhile True: open('/dev/zero', 'rb').read(1 << 17); time.sleep(0.5)",
    "lets another compute": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])",
    "sleeps": "import time; time.sleep(999)",
    "looks for something that does not come": "import time\nwhile True: time.sleep(0.2)",
    "is stopped": "import time; time.sleep(999)",
}


def test_what_counts_as_progress():
    processes = {
        what: subprocess.Popen(
            [sys.executable, "-c", f"print('ready', flush=True)\n{text}"],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        for what, text in PROGRAMS.items()
    }
    try:
        for process in processes.values():
            assert process.stdout.readline() == b"ready\n"  # what starting takes is progress too
        other = processes["lets another compute"].pid
        while not list(below(other)):
            time.sleep(0.01)
        os.kill(processes["is stopped"].pid, signal.SIGSTOP)
        time.sleep(0.5)  # imports of what follows the word
        meters = {what: Meter(process.pid) for what, process in processes.items()}
        for meter in meters.values():
            meter.progressed(0.0)
        moved = dict.fromkeys(PROGRAMS, False)
        looked = time.monotonic()
        for _ in range(20):
            time.sleep(0.25)
            passed, looked = time.monotonic() - looked, time.monotonic()
            moved = {what: meter.progressed(passed) or moved[what] for what, meter in meters.items()}
        assert [what for what in PROGRAMS if moved[what]] == ["computes", "reads", "lets another compute"]
        assert state(processes["is stopped"].pid) in "tT"
        assert len(list(below(other))) == 1
    finally:
        for process in processes.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def test_a_watchdog_sees_its_rank_end():
    reader, writer = os.pipe()
    ward = os.fork()
    if ward == 0:  # a rank, which forks its watchdog and ends
        rank = os.getpid()
        if os.fork() == 0:
            began = time.monotonic()
            while not _ended(rank, 60.0):
                pass
            os.write(writer, f"{time.monotonic() - began}\n".encode())
            os._exit(0)
        time.sleep(0.5)
        os._exit(0)
    os.waitpid(ward, 0)
    assert float(os.read(reader, 64)) < 30.0


class Ranks:
    """What ranks tell a judge."""

    def __init__(self, count, limit=12.0):
        self.judge = Judge(count, limit)
        self.stands = [
            {"phase": "data", "waits": "", "since": 0.0, "patient": False, "idle": 0.0} for _ in range(count)
        ]
        self.number = 0

    def after(self, seconds, silent=(), ended=()):
        """What the judge says after so many seconds, two signs of life a second."""
        self.texts = getattr(self, "texts", [b"{}"] * len(self.stands))
        verdicts = []
        for _ in range(int(seconds / 0.5)):
            self.number += 1
            for rank, stand in enumerate(self.stands):
                if rank not in silent:
                    self.texts[rank] = json.dumps(stand | {"number": self.number}).encode()
            verdicts.append(self.judge.look(self.texts, ended, 0.5))
        return verdicts[-1]


def test_ranks_that_work_for_hours_are_left_alone():
    ranks = Ranks(3)
    ranks.stands[0] |= {"waits": "the other ranks in compiling", "since": 5.0}
    assert ranks.after(7200) == ([], "")


def test_a_rank_without_a_sign_of_life_is_lost():
    ranks = Ranks(3)
    ranks.after(2)
    assert ranks.after(11, silent=[1]) == ([], "")
    assert ranks.after(2, silent=[1]) == ([1], SILENT)
    assert ranks.judge.phase(1) == "data"


def test_a_rank_that_has_ended_is_lost_at_once():
    ranks = Ranks(2)
    ranks.after(1)
    assert ranks.after(5, silent=[1], ended=[1]) == ([1], ENDED)


def test_a_rank_without_progress_is_lost_unless_it_waits():
    ranks = Ranks(2)
    ranks.stands[1] |= {"idle": 12.5}
    assert ranks.after(1) == ([1], IDLE)
    ranks.stands[1] |= {"waits": "the other ranks in compiling", "since": 3.0}
    assert ranks.after(60) == ([], "")


def test_ranks_that_all_wait_for_one_another():
    ranks = Ranks(2)
    for rank, what in enumerate(("the other ranks' gradients", "the other ranks' losses")):
        ranks.stands[rank] |= {"waits": what, "since": 3.0}
    assert ranks.after(12) == ([], "")
    assert ranks.after(7) == ([], ALL_WAIT)
    ranks.stands[0] |= {"since": 4.0}  # another wait
    assert ranks.after(12) == ([], "")
    ranks.stands[1] |= {"patient": True}
    assert ranks.after(60) == ([], "")
