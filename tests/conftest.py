"""For all tests."""

import contextlib

with contextlib.suppress(ImportError):  # the environment of the vLLM tests has no hypothesis
    from hypothesis import HealthCheck, settings

    # how long an example takes says nothing on a busy machine
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")
