"""The store of traces in the worker."""

from optimal_sampling.engines.vllm.trace_store import TraceStore

ROW = [0.5]


def finish_some(store, numbers):
    for i in numbers:
        store.add(f"r{i}", 0, [ROW] * 9)
        store.finish([f"r{i}"])


def test_traces_that_are_never_fetched_are_dropped():
    """Guards: traces of clients that went away, for as long as the server lives."""
    store = TraceStore(capacity=30)
    finish_some(store, range(100))
    assert sorted(store.rows) == ["r97", "r98", "r99"]
    assert len(store.take_by_prefix(["r98"])["r98"][0]) == 9
    # a step that was on its way when the completion was cut by a stop string
    store.add("r98", 9, [ROW])
    store.finish(["r98", "r98"])
    finish_some(store, range(100, 110))
    assert sorted(store.rows) == ["r107", "r108", "r109"]


def test_a_token_computed_again_counts_once():
    """Guards: doubled or unordered rows after a preemption."""
    store = TraceStore()
    store.add("a", 0, [[0.1], [0.2]])
    store.add("a", 1, [[0.2], [0.3]])
    assert store.take(["a", "b"]) == {"a": ([[0.1], [0.2], [0.3]], ""), "b": ([], "")}
