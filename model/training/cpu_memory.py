"""Large tensors on a CPU without a page fault for each 4 KiB of memory."""

import ctypes

# M_MMAP_MAX 0, M_TRIM_THRESHOLD -1 and M_TOP_PAD 64 MiB, from glibc's malloc.h.
SETTINGS = {-4: 0, -1: -1, -2: 64 << 20}


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory for its next tensors. Returns False if the C library is not glibc."""
    # glibc returns each block above 32 MiB to the kernel, which zeroes its pages again: a third of the VQGAN's time.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) for name, value in SETTINGS.items())
