"""Two hosts, made from network namespaces that a pair of virtual interfaces joins.

`mpirun` cannot start ranks on them without ssh: what follows its start (`ddpkit.ranks.rendezvous`) is the same for every
launcher, and is tried here with ranks that are started by hand and by `torchrun`.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from filelock import FileLock
from starts import bound
from tiny import TINY

from ddpkit.ranks import network, rendezvous
from ddpkit.ranks.launchers import Place
from ddpkit.ranks.peers import Peer, counted

PORT = 29555
TIMEOUT = 12
IP = shutil.which("ip") or ""


def ip(*words):
    done = subprocess.run([IP, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip() or " ".join(words))


class Hosts:
    """Two hosts, `ddpa` and `ddpb`. As on Debian, the name of each leads to loopback on itself; both have a bridge of the same
    address, as containers' hosts do, that leads nowhere.
    """

    names = ("ddpa", "ddpb")
    links = ("eth0", "ens5")

    def make(self):
        for name in self.names:
            ip("netns", "add", name)
        (one, first), (other, second) = zip(self.names, self.links, strict=True)
        # no other program ever sees an interface that comes and goes
        ip("link", "add", first, "netns", one, "type", "veth", "peer", "name", second, "netns", other)
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True), 1):
            for words in (
                ("link", "add", "br0", "type", "bridge"),
                ("addr", "add", "172.17.0.1/16", "dev", "br0"),
                ("addr", "add", f"10.77.0.{number}/24", "dev", link),
                ("addr", "add", f"fd77::{number}/64", "dev", link, "nodad"),
                ("link", "set", "br0", "up"),
                ("link", "set", link, "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", name, *words)
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            other = self.names[2 - number]
            (folder / "hosts").write_text(
                f"127.0.0.1 localhost\n127.0.1.1 {name}\n10.77.0.{3 - number} {other}\n"
            )  # fmt: skip

    def remove(self):
        for name in self.names:
            with contextlib.suppress(OSError):
                ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def start(self, words, master, variables=None):
        """Starts a program on both, as a launcher does that sets variables alone."""
        return [
            self.run(number, [sys.executable, *words], {
                "RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": master, "MASTER_PORT": str(PORT),
                **((variables or {}).get(number, {})),
            })
            for number in range(2)
        ]  # fmt: skip

    def run(self, number, words, variables):
        name = self.names[number]
        inner = ["unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh", *words]
        return subprocess.Popen(
            [IP, "netns", "exec", name, *inner], env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


@pytest.fixture
def hosts():
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if not IP or shutil.which("unshare") is None:
        pytest.skip("network namespaces need `ip` of iproute2 and `unshare` of util-linux")
    made = Hosts()
    with FileLock(Path(tempfile.gettempdir()) / "ddpkit-hosts.lock"):  # there is one of each name on a machine
        made.remove()
        try:
            made.make()
        except OSError as error:
            made.remove()
            pytest.skip(f"this system makes no network namespaces: {error}")
        yield made
        made.remove()


def ends(processes, timeout=300):
    said = [process.communicate(timeout=timeout)[0] for process in processes]
    return said, [process.returncode for process in processes]


PROGRAM = """
    import json, os, sys
    from datetime import timedelta
    import ddpkit, torch, torch.distributed as dist
    from ddpkit.ranks import group
    try:
        here = ddpkit.init_process_group(device="cpu", timeout=timedelta(seconds=float(sys.argv[1])))
        x = torch.tensor([float(here.rank + 1)])
        dist.all_reduce(x)
        dist.all_reduce(x, group=dist.new_group(backend="gloo"))
        names = {name: value for name, value in os.environ.items() if "_SOCKET_" in name}
        print("told", json.dumps([here.rank, here.local_rank, here.local_size, x.item(), names]), flush=True)
        group.shutdown()
    except Exception as error:
        print("told", json.dumps(f"{type(error).__name__}: {error}"), flush=True)
        os._exit(2)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return str(path)


def told(said):
    return [json.loads(re.search(r"^told (.*)$", text, re.MULTILINE)[1]) for text in said]


@pytest.mark.parametrize(
    ("master", "family"), [("ddpa", "AF_INET"), pytest.param("fd77::1", "AF_INET6", marks=pytest.mark.long)]
)
def test_ranks_of_two_hosts_meet_over_the_interface_that_leads_to_the_rendezvous(master, family, hosts, program):
    if family == "AF_INET6":  # and no other
        for number, link in enumerate(hosts.links, 1):
            ip("-n", hosts.names[number - 1], "addr", "del", f"10.77.0.{number}/24", "dev", link)
    said, codes = ends(hosts.start([program, "60"], master))
    assert codes == [0, 0], said
    for rank, facts in enumerate(told(said)):
        link = hosts.links[rank]
        names = {"GLOO_SOCKET_IFNAME": link, "NCCL_SOCKET_IFNAME": f"={link}", "NCCL_SOCKET_FAMILY": family}
        assert facts == [rank, 0, 1, 6.0, names]


def test_torchrun_on_two_hosts(hosts, program):
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr"]
    said, codes = ends(
        [
            hosts.run(
                number, [*words, "10.77.0.1", "--node-rank", str(number), "--master-port", str(PORT), program, "60"], {}
            )
            for number in range(2)
        ]
    )
    assert codes == [0, 0], said
    assert [facts[0] for facts in told(said)] == [0, 1]


def test_what_is_not_reached_is_named(hosts, program):
    ours = {1: {"GLOO_SOCKET_IFNAME": "br0"}}  # the user's choice, which leads nowhere
    said, codes = ends(hosts.start([program, "60"], "ddpa", ours))
    assert codes == [2, 2], said
    for text in told(said):
        assert re.search(r"InputError: Host ddp(a|b) does not reach host ddp(b|a) at \S+, port \d+ \(.+\)", text)
        assert "GLOO_SOCKET_IFNAME" in text
    # a rendezvous that does not answer
    ip("-n", "ddpb", "link", "set", "ens5", "down")
    said, codes = ends(hosts.start([program, "8"], "10.77.0.1"))
    assert codes == [2, 2], said
    first, second = told(said)
    assert "Of 2 ranks rank 1 did not come to the rendezvous within 8 s" in first
    assert "Rank 1 on ddpb does not reach the rendezvous on port 29555 within 8 s (10.77.0.1: " in second
    assert "MASTER_ADDR=10.77.0.1" in second


@pytest.mark.parametrize("what", ["link", pytest.param("host", marks=pytest.mark.long)])
def test_a_link_that_stops_and_a_host_that_vanishes(what, hosts, clusters, cache, tmp_path):
    run = tmp_path / "run"
    words = dict(word.split("=", 1) for word in TINY) | {
        "data.path": clusters, "data.cache": cache, "train.max_epochs": 100000, "train.timeout": TIMEOUT, "run_dir": run,
    }  # fmt: skip
    processes = hosts.start(["-m", "ddpkit.experiments", "run", *(f"{k}={v}" for k, v in words.items())], "ddpa")
    started = time.monotonic()
    rows = run / "steps.csv"
    while not rows.exists() or len(rows.read_text().splitlines()) < 4:
        assert time.monotonic() < started + 300
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.1)
    began = time.monotonic()
    if what == "link":
        ip("-n", "ddpb", "link", "set", "ens5", "down")
    else:
        for number in subprocess.run(
            [IP, "netns", "pids", "ddpb"], capture_output=True, text=True, check=True
        ).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)
    said, codes = ends(processes)
    assert time.monotonic() - began < bound(TIMEOUT, began - started)
    assert 0 not in codes
    assert re.search(r"ddpkit: .*ank 1 \(process \d+ on ddpb\)", said[0]), said[0]
    if what == "link":
        assert re.search(r"ddpkit: .*ank 0 \(process \d+ on ddpa\)", said[1]), said[1]
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"


# -- what is decided, without any network ----------------------------------------------------------------------------


def peers(*rows):
    return [Peer(host, host, 100 + n, address, reached) for n, (host, address, reached) in enumerate(rows)]


TWO_CARDS = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "eth0": ["10.0.0.1"],
    "ib0": ["192.168.5.1", "fd00::1"],
}


@pytest.mark.parametrize(
    ("others", "variables", "expected"),
    [
        (peers(("a", "10.0.0.1", "10.0.0.1"), ("a", "10.0.0.1", "10.0.0.1")), {}, None),  # one host
        (peers(("a", "10.0.0.1", "10.0.0.1"), ("b", "10.0.0.2", "10.0.0.1")), {}, ("eth0", "10.0.0.1")),
        (peers(("a", "127.0.0.1", "127.0.1.1"), ("b", "192.168.5.2", "192.168.5.1")), {}, ("ib0", "192.168.5.1")),
        (peers(("a", "fd00::1", "fd00::1"), ("b", "fd00::2", "fd00::1")), {}, ("ib0", "192.168.5.1")),
        (
            peers(("a", "10.0.0.1", "10.0.0.1"), ("b", "10.0.0.2", "10.0.0.1")),
            {"GLOO_SOCKET_IFNAME": "ib0"},
            ("ib0", "192.168.5.1"),
        ),
        (
            peers(("a", "10.0.0.1", "10.0.0.1"), ("b", "10.0.0.2", "10.0.0.1")),
            {"NCCL_SOCKET_IFNAME": "^docker0"},
            ("eth0", "10.0.0.1"),
        ),
    ],
)
def test_the_interface_that_is_chosen(others, variables, expected):
    chosen = rendezvous.interface(0, others, TWO_CARDS, variables)
    assert (chosen and (chosen.name, chosen.address)) == expected


def test_what_the_user_named_is_left_alone():
    chosen = rendezvous.Interface("eth0", "10.0.0.1", "")
    assert rendezvous.variables_for(chosen, {"NCCL_SOCKET_IFNAME": "ib0,ib1"}) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert rendezvous.variables_for(chosen, {"GLOO_SOCKET_IFNAME": "eth1"}) == {
        "NCCL_SOCKET_IFNAME": "=eth0",
        "NCCL_SOCKET_FAMILY": "AF_INET",
    }


def test_ports_of_slurm_steps():
    ports = rendezvous.step_ports("4711.0")
    assert ports == rendezvous.step_ports("4711.0")
    assert len(set(ports)) == len(ports) > 4
    assert not any(low <= port <= high for port in ports for low, high in [network.DEFAULT_EPHEMERAL])
    assert rendezvous.step_ports("4711.1")[0] != ports[0]


def test_a_port_that_is_taken_is_passed_over(monkeypatch):
    import socket
    from datetime import timedelta

    taken = socket.create_server(("", 0))
    with socket.create_server(("", 0)) as probe:
        free = probe.getsockname()[1]
    monkeypatch.setattr(rendezvous, "step_ports", lambda _: [taken.getsockname()[1], free])
    variables = {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
    with taken:
        stores = [
            rendezvous.open_store(Place("srun", rank, 2, rank, 2), timedelta(seconds=20), variables)[0]
            for rank in range(2)
        ]
    stores[0].set("a", "1")
    assert [store.port for store in stores] == [free, free]
    assert stores[1].get("a") == b"1"


def test_ranks_of_a_host_count_themselves():
    others = peers(("a", "", ""), ("b", "", ""), ("a", "", ""), ("b", "", ""))
    here = counted(Place("by hand", 2, 4, 0, 1, counted=False), others)
    assert (here.local_rank, here.local_size) == (1, 2)
    told = Place("mpirun", 2, 4, 3, 4)
    assert counted(told, others) is told
