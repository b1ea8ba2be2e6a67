"""For all tests: how Hypothesis searches, and which tests share a worker."""

import contextlib

import pytest

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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Make groups of `--dist loadgroup` work with pytest 9.2.

    pytest-xdist 3.8 appends a test's group to `_nodeid`, which that pytest does not read any more.
    """
    for item in items:
        with_group = vars(item).get("_nodeid")
        if with_group is not None and hasattr(item, "_id"):
            item._id = type(item._id).parse(with_group)
