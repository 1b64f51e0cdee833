"""Bytes that torch allocates on a CPU, from its allocator's own record."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

multiplies_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU takes minutes for products in bf16"
)


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """(peak, end): bytes that are allocated at most, and that remain, while `work` runs, beyond those of before."""
    from torch._C._profiler import _EventType

    gc.collect()  # what is freed meanwhile would count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    found, waiting = [], list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while waiting:
        event: Any = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append(event)
    taken = [event.extra_fields.total_allocated for event in sorted(found, key=lambda event: event.start_time_ns)]
    del result
    return max(taken) - taken[0], taken[-1] - taken[0]
