"""For all tests: how Hypothesis searches."""

import contextlib

with contextlib.suppress(ImportError):  # the environment of the vLLM tests has no hypothesis
    from hypothesis import HealthCheck, settings

    # how long an example takes says nothing on a busy machine
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    # `make test`: the same examples every time, so that no run fails by luck
    settings.register_profile(
        "fixed", settings.get_profile("busy"), derandomize=True, database=None
    )
    # `make test-slow`: new examples every time, and 20 times as many
    settings.register_profile("search", settings.get_profile("busy"), max_examples=2_000)
    settings.load_profile("fixed")
