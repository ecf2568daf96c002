"""The memory of compiled code on CPUs."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 32 << 20  # bytes, the most that glibc takes for the second
_KEPT = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for what comes next, up to a gigabyte, for the whole process; elsewhere this does nothing.

    Compiled code allocates and frees the same arrays at every step. By default glibc gives them back to the kernel each time,
    which clears every page anew: that took two fifths of a step of Allegro.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST)
        set_option(_TRIM_THRESHOLD, _KEPT)
