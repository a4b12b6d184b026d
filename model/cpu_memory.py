"""Large tensors on a CPU without a page fault for each 4 KiB of them."""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next tensors. False where the C library is not glibc.

    glibc takes each block above 32 MiB from the kernel and gives it back when freed; the kernel fills the pages with
    zeros again each time. In the VQGAN's encoder at 512 pixels that is a third of all time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(name, value) for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))
    )
