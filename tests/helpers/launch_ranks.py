"""The launcher over a script of ranks, as a process of its own: one machine's part of a run.

python launch_ranks.py FOLDER GRACE_SECONDS NUM_HERE NUM_NODES NODE MASTER SCRIPT ARGUMENT…
"""

import sys
from pathlib import Path

from train.launch import launch

if __name__ == "__main__":
    folder, grace, num_here, num_nodes, node, master, script, *arguments = sys.argv[1:]
    place = launch.Place(int(num_here), int(num_nodes), int(node), master if int(num_nodes) > 1 else None)
    command = [sys.executable, str(Path(__file__).with_name(script)), folder, *arguments]
    launch.FAILURE_LEAVE_SECONDS = 1.0 if script == "plain_ranks.py" else launch.FAILURE_LEAVE_SECONDS
    sys.exit(launch.launch(command, place, Path(folder), float(grace)))
