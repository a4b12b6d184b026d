"""Large tensors on a CPU without a page fault for each 4 KiB of memory."""

import ctypes

# From malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors. Returns False if the C library is not glibc."""
    # By default glibc takes each block above 32 MiB from the kernel and returns it when freed, and the kernel zeroes
    # the pages each time: a third of the time of the VQGAN's encoder at 512 pixels.
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(name, value) for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))
    )
