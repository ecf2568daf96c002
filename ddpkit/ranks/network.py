"""Addresses and interfaces of this host, and what it reaches."""

import ctypes
import ctypes.util
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

DEFAULT_EPHEMERAL = (32768, 60999)


def interfaces() -> dict[str, list[str]]:
    """The addresses of each interface, as the system lists them; none of link scope."""

    class Entry(ctypes.Structure):
        pass

    Entry._fields_ = [
        ("next", ctypes.POINTER(Entry)),
        ("name", ctypes.c_char_p),
        ("flags", ctypes.c_uint),
        ("address", ctypes.c_void_p),
    ]
    library = ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6", use_errno=True)
    head = ctypes.POINTER(Entry)()
    if library.getifaddrs(ctypes.byref(head)):
        raise OSError(ctypes.get_errno(), "getifaddrs")
    listed: dict[str, list[str]] = {}
    try:
        entry = head
        while entry:
            one = entry.contents
            if one.address and (address := _address(one.address)) and not ipaddress.ip_address(address).is_link_local:
                listed.setdefault(one.name.decode(), []).append(address)
            entry = one.next
    finally:
        library.freeifaddrs(head)
    return listed


def _address(pointer: int) -> str:
    """The address in a `sockaddr`; empty for families other than IP."""
    family = int.from_bytes(ctypes.string_at(pointer, 2), "little")
    if family == socket.AF_INET:
        return socket.inet_ntop(family, ctypes.string_at(pointer + 4, 4))
    if family == socket.AF_INET6:
        return socket.inet_ntop(family, ctypes.string_at(pointer + 8, 16))
    return ""


def interface_of(address: str, of_host: Mapping[str, Sequence[str]]) -> str:
    """The interface that has an address; empty if none has."""
    return next((name for name, addresses in of_host.items() if address in addresses), "")


def is_loopback(address: str) -> bool:
    """Whether an address leads to its own host alone."""
    return not address or ipaddress.ip_address(address).is_loopback


def source_for(address: str) -> str:
    """This host's address that packets to `address` leave from (nothing is sent); empty where no route leads there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return ""


def resolve(host: str) -> list[str]:
    """The addresses of a host's name, each once.

    Raises:
        OSError: the name is not known here.
    """
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]).partition("%")[0] for answer in answers))


def connect(address: str, port: int, seconds: float) -> str:
    """Tries a connection.

    Returns:
        Why there is none; empty where there is.
    """
    try:
        with socket.create_connection((address, port), timeout=seconds):
            return ""
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def first_that_answers(hosts: Sequence[str], port: int, seconds: float) -> tuple[str, str]:
    """The first address of some hosts (names or addresses) that takes a connection, tried in turn until time is up.

    Returns:
        It, or an empty string and why there is none.
    """
    deadline = time.monotonic() + seconds
    while True:
        why: dict[str, str] = {}
        for host in hosts:
            try:
                addresses = resolve(host)
            except OSError as error:
                why[host] = f"its name is not known here: {(error.strerror or str(error)).lower()}"
                continue
            for address in addresses:
                left = deadline - time.monotonic()
                if not (reason := connect(address, port, min(5.0, max(0.5, left)))):
                    return address, ""
                why[address] = reason
        if time.monotonic() >= deadline:
            return "", "; ".join(f"{address}: {reason}" for address, reason in why.items())
        time.sleep(0.1)


def ephemeral_ports() -> tuple[int, int]:
    """The range that the system takes ports for outgoing connections from."""
    with suppress(OSError, ValueError):
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        return low, high
    return DEFAULT_EPHEMERAL


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What `ask` returns, or None where it fails or takes longer: a store whose rank is stopped answers never."""
    answers: list[T] = []

    def work() -> None:
        with suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError):  # there is no memory for one
        return None
    thread.join(seconds)
    return answers[0] if answers else None
