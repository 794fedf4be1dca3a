"""Ranks without torch, for the launcher's tests: they wait, obey signals, fail on request.

    python plain_ranks.py FOLDER [FAULT RANK]

Faults: raise, mistake, kill, exit, hang-after-record, and of all ranks: deaf (to signals and to the launcher's word),
done, child (waits beside a child of its own).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from shards.errors import UserError
from train.launch.failure import SIGNAL_EXIT, RankLost, Reported, own_failure, read_note, record


def obey(folder: Path, rank: int, deaf: bool) -> int:
    """Wait for a signal or for the launcher's word."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None if deaf else asked.append(number))
    signal.signal(signal.SIGUSR1, lambda number, frame: (folder / f"used-{rank}").touch())
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    while not asked:
        if not deaf and (note := read_note()):
            raise RankLost(note.message)
        time.sleep(0.02)
    (folder / f"saved-{rank}").touch()
    return SIGNAL_EXIT + asked[0]


def fail(fault: str, folder: Path, rank: int) -> None:
    """What goes wrong in the one rank; the others are waiting by then."""
    others = [folder / f"pid-{other}" for other in range(int(os.environ["WORLD_SIZE"])) if other != rank]
    while not all(path.exists() for path in others):
        time.sleep(0.02)
    match fault:
        case "raise":
            raise ZeroDivisionError("a defect of this rank")
        case "mistake":
            raise UserError("the disk is full", fix="make room")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(9)
        case "hang-after-record":
            record(own_failure("crash", "something broke, and its thread does not end"))
            time.sleep(1000)


def main() -> None:
    """Run as a rank."""
    folder, fault = Path(sys.argv[1]), (*sys.argv[2:3], "")[0]
    rank, bad = int(os.environ["RANK"]), int((*sys.argv[3:4], "-1")[0])
    print(f"rank {rank} speaks", file=sys.stderr, flush=True)
    (folder / f"env-{rank}.json").write_text(json.dumps(dict(os.environ)))
    if fault == "done":
        return
    if fault == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        (folder / f"child-{rank}").write_text(str(child.pid))
    with Reported():
        if rank == bad:
            fail(fault, folder, rank)
        code = obey(folder, rank, deaf=fault == "deaf")
    sys.exit(code)


if __name__ == "__main__":
    main()
