"""Maps a function over items with Ray Data, on whatever CPUs the cluster has.

In: a function and its items. Out: results in the items' order. A FoundryError of a call is raised here again.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import ray.data
from ray import cloudpickle

from gptcore.errors import FoundryError
from gptcore.progress import at

Item = TypeVar("Item")
Result = TypeVar("Result")


def ray_map(fn: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`list(map(fn, items))`, spread over the cluster. Raises what `fn` raises, if that is a FoundryError."""

    def call(row: dict[str, Any]) -> dict[str, Any]:
        try:
            outcome: Any = fn(cloudpickle.loads(row["item"]))
        except FoundryError as error:  # carried as a value: Ray would wrap it and print the worker's stack
            outcome = error
        return {"index": row["index"], "outcome": cloudpickle.dumps(outcome)}

    rows = [{"index": index, "item": cloudpickle.dumps(item)} for index, item in enumerate(items)]
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # users need neither its plan nor its timing
    done: list[dict[str, Any]] = []
    for row in ray.data.from_items(rows, override_num_blocks=len(rows) or None).map(call).iter_rows():
        done.append(row)
        at(len(done), len(rows))
    outcomes = [cloudpickle.loads(row["outcome"]) for row in sorted(done, key=lambda row: row["index"])]
    for outcome in outcomes:
        if isinstance(outcome, FoundryError):
            raise outcome
    return outcomes
