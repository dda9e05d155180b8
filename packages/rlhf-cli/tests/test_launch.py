"""Starting ranks, without any."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher import api

from rlhf_cli.launch import start_ranks
from rlhf_core.config import ParallelConfig


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_launcher_that_is_told_to_end_ends_as_any_program_does(
    number: signal.Signals, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*given: Any) -> Any:
        def run(*arguments: str) -> None:
            raise SignalException(f"got signal: {number}", number)

        return run

    monkeypatch.setattr(api, "elastic_launch", launch)
    with pytest.raises(raised) as ended:
        start_ranks(ParallelConfig(), 2)
    assert getattr(ended.value, "code", 143) == 143
