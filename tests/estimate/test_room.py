"""What a process may use of a machine's memory, and the peak of what it has used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from mft.errors import UserError
from mft.estimate import room
from mft.estimate.room import Host

GIB = 2**30


def test_the_limit_is_half_of_what_is_free_divided_among_the_processes() -> None:
    alone, one_of_two, free = Host.of(1), Host.of(2), psutil.virtual_memory().available
    own = room.resident("VmRSS")
    assert alone.limit - own == pytest.approx(free / 2, rel=0.2)
    assert one_of_two.limit - own == pytest.approx(free / 4, rel=0.2)
    assert alone.limit < alone.whole and "for 2 processes" in one_of_two.words


def test_a_control_group_with_less_is_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "memory.max": str(GIB),
        "memory.current": str(GIB // 2),
        "memory.stat": f"anon 1\ninactive_file {GIB // 4}",
    }
    monkeypatch.setattr(room, "control_group", lambda name: files[name])
    found = Host.of(1)
    assert found.device == "CPU, 1.0 GiB" and found.whole - room.resident("VmRSS") == pytest.approx(
        0.75 * GIB, abs=2**26
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no peak")
def test_a_peak_is_that_since_the_reset() -> None:
    host = Host.of(1)
    host.reset()
    before = host.peak()
    held = torch.ones(2**26)  # 256 MiB
    assert host.peak() - before == pytest.approx(2**28, rel=0.1)
    del held
    host.reset()
    assert host.peak() - before < 2**27


def test_where_no_peak_can_be_measured_a_number_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that refuses to write /proc/self/clear_refs, which root of this machine may."""
    monkeypatch.setattr(room, "Resident", lambda: SimpleNamespace(resets=False))
    with pytest.raises(UserError, match=r"per_device_batch_size=auto: the peak .* cannot be measured here"):
        Host.of(1)
