"""How a test's child process says what it took."""

from pathlib import Path

PEAK_KIB = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
"""An expression: the most that was resident, KiB. `ru_maxrss` will not do: a child starts with its parent's."""


def peak_kib() -> int:
    """The same of this process."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
