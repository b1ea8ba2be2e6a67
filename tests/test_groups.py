"""Tests that share a worker, as `make test` runs them."""

import pytest


@pytest.mark.xdist_group("groups")
def test_a_group_is_seen(request):
    """Guards: tests that share a cluster, a run or a browser, spread over workers in silence: the
    group is not where pytest-xdist looks for it.
    """
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@groups")
    else:
        assert "@" not in request.node.nodeid
