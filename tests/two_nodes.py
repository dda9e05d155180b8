"""Starts a Ray cluster of two nodes on this machine and submits a job to it: a command line of `rlhf`.

Usage: two_nodes.py COMMAND.json, a list of arguments. What `ray job submit` prints is printed, and its exit code is that of
this program.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ray.cluster_utils import Cluster

PROGRAMS = Path(sys.executable).parent
STORE = 100_000_000


def main(command: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path: Ray's sockets are in it
        both = {"num_cpus": 1, "object_store_memory": STORE, "temp_dir": folder}
        head = both | {"include_dashboard": True, "dashboard_port": 0}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**both)
            server = f"http://{cluster.head_node.webui_url}"
            submit = [str(PROGRAMS / "ray"), "job", "submit", "--address", server, "--", str(PROGRAMS / "rlhf")]
            return subprocess.run([*submit, *command], check=False).returncode
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
