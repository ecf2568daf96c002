"""Two runs never write into one folder."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from starts import wait_for

from ddpkit import lock
from ddpkit.errors import InputError
from ddpkit.lock import FolderLock

HOLD = """
    import sys, time
    from pathlib import Path
    from ddpkit.errors import InputError
    from ddpkit.lock import FolderLock
    try:
        held = FolderLock(Path(sys.argv[1]))
    except InputError as error:
        print("refused:", error, flush=True)
    else:
        print("held", flush=True)
        time.sleep(60)
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLD), folder], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def away(tmp_path, monkeypatch):
    """A file system without locks, as some network file systems are mounted."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    return tmp_path


def holder(**changed):
    return lock.Holder.here().__dict__ | changed


def test_of_many_that_race_one_wins_and_the_others_name_it(tmp_path):
    racing = [start(tmp_path) for _ in range(4)]
    said = {process.pid: process.stdout.readline().strip() for process in racing}
    won = [pid for pid, line in said.items() if line == "held"]
    assert len(won) == 1, said
    refused = [line for line in said.values() if line.startswith("refused")]
    assert len(refused) == 3
    assert all("another run" in line and "run_dir" in line for line in refused)
    late = start(tmp_path)
    assert f"process {won[0]} on " in late.stdout.readline()
    os.kill(won[0], signal.SIGKILL)  # which leaves the file behind
    for process in racing:
        process.wait()
    assert (tmp_path / ".lock").stat().st_size
    again = FolderLock(tmp_path)
    again.release()
    assert not (tmp_path / ".lock").exists()


def test_a_process_cannot_hold_a_folder_twice(tmp_path):
    first = FolderLock(tmp_path)
    (tmp_path.parent / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path.parent / "link"):
        with pytest.raises(InputError, match=f"process {os.getpid()} on"):
            FolderLock(path)
    late = start(tmp_path)  # the lock is still held
    assert late.stdout.readline().startswith("refused")
    first.release()
    FolderLock(tmp_path).release()


def test_without_locks_the_process_itself_is_looked_for(away):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (away / ".lock").write_text(json.dumps(holder(process=child.pid, started=lock.started(child.pid))))
    with pytest.raises(InputError, match=f"process {child.pid} on"):
        FolderLock(away)
    child.communicate(b"\n")
    FolderLock(away).release()
    (away / ".lock").write_text(json.dumps(holder(started=1)))  # the number belongs to another process now
    FolderLock(away).release()


def test_a_lock_of_another_host_holds_as_long_as_it_is_renewed(away):
    file = away / ".lock"
    file.write_text(json.dumps(holder(host="elsewhere", home="another", process=12)))
    with pytest.raises(InputError, match=r"process 12 on elsewhere.*in a minute"):
        FolderLock(away)
    assert json.loads(file.read_text())["host"] == "elsewhere"
    os.utime(file, (time.time() - 2 * lock.STALE,) * 2)
    FolderLock(away).release()


@pytest.mark.parametrize("content", ["", "torn{", "[1]", '{"host": 3}'])
def test_a_torn_lock_that_nobody_holds_is_taken(content, tmp_path):
    (tmp_path / ".lock").write_text(content)
    FolderLock(tmp_path).release()


def test_whoever_was_taken_for_dead_stops_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    held = FolderLock(tmp_path)
    held.require()
    before = (tmp_path / ".lock").stat().st_mtime_ns
    wait_for(lambda: (tmp_path / ".lock").stat().st_mtime_ns > before)
    (tmp_path / ".lock").write_text(json.dumps(holder(host="elsewhere", process=12)))
    wait_for(lambda: held.taken_by)
    with pytest.raises(InputError, match="process 12 on elsewhere"):
        held.require()
    held.release()
    assert (tmp_path / ".lock").exists()  # it is the other's


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"(file|run) could not be written") as raised:
            FolderLock(path)
        assert "is a file" in str(raised.value)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="dangling could not be written"):
        FolderLock(tmp_path / "dangling")
