"""Where ranks meet."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from rlhf_core.ranks import open_meeting


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="there is no list of sockets")
def test_a_meeting_is_heard_at_its_own_address_alone():
    store = open_meeting("127.0.0.1", 2)
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    assert [address for address in listening if address.endswith(f":{store.port:04X}")] == [
        f"0100007F:{store.port:04X}"
    ]
    other = dist.TCPStore("127.0.0.1", store.port, 2, is_master=False, timeout=timedelta(seconds=10))
    other.set("there", "yes")
    assert store.get("there") == b"yes"
