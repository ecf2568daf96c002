import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ddpkit import InputError
from ddpkit.data.parallel import cores, ordered_map


def square_slowly(number):
    if number == 13:
        raise InputError("13 is refused")
    time.sleep(0.02 * (number % 3))
    return number**2, os.environ["OMP_NUM_THREADS"]


def test_results_come_in_order_and_few_tasks_wait(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    drawn = []

    def tasks():
        for number in range(12):
            drawn.append(number)
            yield number

    results = ordered_map(square_slowly, tasks(), 2)
    assert next(results) == (0, "1")
    assert len(drawn) <= 6
    assert [r for r, _ in results] == [n**2 for n in range(1, 12)]
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_errors_are_passed_on():
    with pytest.raises(InputError, match="13 is refused"):
        list(ordered_map(square_slowly, range(10, 20), 1))


def test_an_error_ends_the_processes_every_time(tmp_path):
    program = """
        import sys
        from ddpkit.data.parallel import ordered_map

        if __name__ == "__main__":
            for _ in range(60):
                try:
                    list(ordered_map(int, ["1", "2", "3", "x", "4", "5", "6"], 1))
                except ValueError:
                    print("ended", flush=True)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    command = [sys.executable, str(tmp_path / "program.py")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("ended") == 60


def test_without_processes_the_work_is_done_here(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert list(ordered_map(square_slowly, [1], 0)) == [(1, "7")]


def test_workers_of_a_bound_rank_may_use_what_its_launcher_may(monkeypatch):
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everything)})
    try:
        monkeypatch.setattr("ddpkit.ranks.cores._of_launcher", lambda: None)
        monkeypatch.setattr("ddpkit.ranks.cores._of_group", lambda: None)
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        assert cores() == 1
        monkeypatch.setattr("ddpkit.ranks.cores._of_launcher", lambda: everything)
        assert cores() == len(everything)
        assert os.sched_getaffinity(0) == {min(everything)}
    finally:
        os.sched_setaffinity(0, everything)


def test_workers_end_with_a_killed_process(tmp_path):
    program = """
        import os, sys, time
        sys.path.insert(0, os.path.dirname(__file__))
        from ddpkit.data.parallel import ordered_map

        def work(path):
            open(path + str(os.getpid()), "w").close()
            time.sleep(60)

        if __name__ == "__main__":
            list(ordered_map(work, [sys.argv[1] + "/pid-"] * 2, 2))
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py"), str(tmp_path)])
    workers = wait_for(lambda: [int(p.name[4:]) for p in tmp_path.glob("pid-*")], lambda pids: len(pids) == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wait_for(lambda: [pid for pid in workers if alive(pid)], lambda left: not left) == []


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(what, good, seconds=300.0):
    end = time.monotonic() + seconds
    while not good(value := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return value
