"""Settings of the property tests: `make test` tries the same examples each time, `make fuzz` thousands of others.

A test says with `examples(N)` how many it tries in `make test`; `make fuzz` tries `FUZZ_TIMES` as many.
"""

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

EXAMPLES = 100
FUZZ_TIMES = 20
settings.register_profile(
    "same",
    max_examples=EXAMPLES,
    derandomize=True,  # the examples follow from the test's own code
    database=None,  # nor from what failed here before
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),  # some judge the machine's speed, others the strategy; none our code
)
settings.register_profile("fuzz", settings.get_profile("same"), derandomize=False, max_examples=EXAMPLES * FUZZ_TIMES)


def examples(count: int) -> settings:
    """The profile's settings, with `count` examples in the profile "same" and in proportion in any other."""
    return settings(max_examples=count * settings().max_examples // EXAMPLES)


def times() -> int:
    """How many times as much `make fuzz` tries: 1 in all other runs."""
    return settings().max_examples // EXAMPLES


def forget_the_project() -> None:
    """Keeps Hypothesis from drawing numbers and strings that it finds in the source of what is imported.

    With them, what a test tries would depend on the tests before it, and on the name of the checkout's folder.
    """
    providers._get_local_constants = providers.Constants
