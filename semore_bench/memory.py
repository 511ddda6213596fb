"""Settings of the C library's memory allocator."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3), of glibc alone


def keep_freed_memory() -> None:
    """Has the C library keep what is freed for the next allocation, instead of handing it back to the system.

    Frames, flow and feature maps are allocated and freed in every step; fresh pages for them, zeroed one by one, cost
    half of the time that optical flow takes, and a tenth of an update. Arrays beyond 32 MB go back as before.
    """
    _set_thresholds(1 << 25, 2**31 - 1)


def hand_back_freed_memory() -> None:
    """What the C library does by itself, once a process has freed an array of 32 MB."""
    _set_thresholds(1 << 25, 1 << 26)


def _set_thresholds(own_pages: int, handed_back: int) -> None:
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, own_pages)
            mallopt(M_TRIM_THRESHOLD, handed_back)
