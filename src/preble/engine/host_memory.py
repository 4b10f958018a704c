"""How much memory the host has left."""

from __future__ import annotations

import os
import re
from pathlib import Path


def free_memory() -> int:
    """Bytes that a program may take without the host swapping."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    assert match is not None
    return int(match[1]) * 1024
