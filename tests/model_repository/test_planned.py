"""The cache of plans, with plans that only know their shape."""

from collections import Counter

from export.served.planned import PlannedShapes, Shape


def test_plans_are_compiled_once_and_the_least_recently_used_is_evicted() -> None:
    compiled: Counter[Shape] = Counter()

    def compile_for(shape: Shape) -> Shape:
        compiled[shape] += 1
        return shape

    planned = PlannedShapes(compile_for, memory_of=lambda shape: shape[0], limit=10)
    for shape in ((4,), (5,), (4,), (1,)):
        assert planned[shape] == shape
    assert compiled == {(4,): 1, (5,): 1, (1,): 1}
    assert planned[(3,)] == (3,)  # 4 + 5 + 1 fill the limit, and 5 is the least recently used
    assert [(size,) in planned for size in (1, 3, 4, 5)] == [True, True, True, False]
    assert planned[(11,)] == (11,)  # larger than the limit: it is compiled, and stays alone
    assert [(size,) in planned for size in (1, 3, 4, 11)] == [False, False, False, True]
    assert planned[(4,)] == (4,)
    assert (11,) not in planned
    assert compiled[(4,)] == 2


def test_eviction_comes_before_the_compilation() -> None:
    """The compilation needs the memory."""
    planned: PlannedShapes[bool]
    planned = PlannedShapes(lambda shape: (1,) in planned, memory_of=lambda shape: 1, limit=1)
    assert planned[(1,)] is False
    assert planned[(2,)] is False
