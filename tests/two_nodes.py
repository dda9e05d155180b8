"""Starts a Ray cluster of two nodes on this machine and submits a job to it: a command line of `rlhf`.

Usage: two_nodes.py COMMAND.json, a list of arguments. What `ray job submit` prints is printed, and its exit code is that of
this program.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

PROGRAMS = Path(sys.executable).parent
STORE = 100_000_000

AGENT = 120
"""Seconds in which the agent of the head node, which takes jobs, must be there: Ray itself refuses a job after 10."""


def main(command: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path: Ray's sockets are in it
        both = {"num_cpus": 1, "object_store_memory": STORE, "temp_dir": folder}
        # ports of its own: at the usual ones there may still be what another Ray leaves behind for a minute
        head = both | {"include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": 0}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**both)
            wait_for_agent(cluster)
            server = f"http://{cluster.head_node.webui_url}"
            submit = [str(PROGRAMS / "ray"), "job", "submit", "--address", server, "--", str(PROGRAMS / "rlhf")]
            return subprocess.run([*submit, *command], check=False).returncode
        finally:
            cluster.shutdown()


def wait_for_agent(cluster: Cluster) -> None:
    """Return when the head node takes jobs."""
    end = time.monotonic() + AGENT
    client, key = GcsClient(address=cluster.address), f"DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX:{cluster.head_node.node_id}"
    while not client.internal_kv_get(key.encode(), namespace=b"dashboard"):
        if time.monotonic() > end:
            raise TimeoutError(f"the head node's agent is not there after {AGENT} s")
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
