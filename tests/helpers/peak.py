"""How a test's child process says what it took."""

PEAK_KIB = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
"""An expression: the most that was resident, KiB. `ru_maxrss` will not do: a child starts with its parent's."""
