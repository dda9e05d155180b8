"""Starts a Ray cluster of two nodes on this machine and submits a job to it: a command line of `rlhf`.

It calls what the server behind `ray job submit` calls; that server itself comes with `ray[default]` only.

Usage: two_nodes.py COMMAND.json, a list of arguments. What the job prints is printed, and its exit code is that of this program.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import tempfile
from pathlib import Path

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.dashboard.modules.job.job_manager import JobManager

STORE = 100_000_000


async def submit(address: str, logs: str, command: list[str]) -> int:
    """Run a command as a job, to its end; its exit code."""
    manager = JobManager(GcsClient(address=address), logs)
    job = await manager.submit_job(entrypoint=shlex.join([sys.executable, "-m", "rlhf_cli", *command]))
    while not (status := await manager.get_job_status(job)) or not status.is_terminal():
        await asyncio.sleep(0.5)
    print(manager.get_job_logs(job))
    info = await manager.get_job_info(job)
    return 1 if info is None or info.driver_exit_code is None else info.driver_exit_code


def main(command: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path: Ray's sockets are in it
        both = {"num_cpus": 1, "object_store_memory": STORE, "temp_dir": folder, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=both)
        try:
            cluster.add_node(num_cpus=1, object_store_memory=STORE, temp_dir=folder)
            ray.init(cluster.address, log_to_driver=False)
            return asyncio.run(submit(cluster.address, cluster.head_node.get_logs_dir_path(), command))
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
