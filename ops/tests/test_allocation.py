"""Allocations that fail inside a run or while a session is made: a status or right numbers, and the process goes on (F11).

Each test counts the requests for memory of one generation, and then goes over them: the first fails, the second, …
"""

import subprocess
import sys
from pathlib import Path

import pytest

import tiny as T
from test_ops import child

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="interposes glibc's malloc"),
    pytest.mark.skipif(not T.ON_CPU, reason="counts what the CPU operators ask for"),
]


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory):
    """The environment in which allocations can be made to fail."""
    library = tmp_path_factory.mktemp("shim") / "failing_malloc.so"
    source = Path(__file__).with_name("failing_malloc.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", source, "-o", library], check=True)
    return {"LD_PRELOAD": str(library)}


@pytest.mark.parametrize("anonymous", [False, True])
def test_each_allocation_of_a_run_may_fail(preloaded, anonymous):
    """One fault is survived: the reserve serves it, or a tensor is not kept.

    What is remembered of anonymous runs may stay in the reserve for later ones, in which a fault is the second one then.
    """
    child(f"""
        import allocation as A
        total, raised = A.generations("library", anonymous={anonymous})
        assert total > 300 and raised <= (6 if {anonymous} else 0)
    """, **preloaded)


@pytest.mark.parametrize("anonymous", [False, True])
def test_memory_may_end_at_any_moment_of_a_run(preloaded, anonymous):
    child(f"""
        import allocation as A
        total, raised = A.generations("library", anonymous={anonymous}, count=A.ALWAYS, every=3)
        assert total > 150 and raised > total // 2
    """, **preloaded)


@pytest.mark.parametrize("count", ["1", "3", "A.ALWAYS"])
def test_the_host_may_have_no_memory_for_what_it_is_asked(preloaded, count):
    """With three in a row it has none for the status either, and says that all is well."""
    child(f"""
        import allocation as A
        total, raised = A.generations("below", count={count}, every=3)
        assert total > 200 and raised > 20
    """, **preloaded)


@pytest.mark.parametrize("threads,count", [(1, 1), (2, 1), (1, 4)])
def test_large_allocations_of_anybody_may_fail(preloaded, threads, count):
    child(f"""
        import allocation as A
        total, raised = A.large(threads={threads}, count={count})
        assert total > 40 and raised > total // 2
    """, **preloaded)


def test_the_lists_of_a_run_with_many_layers_may_fail(preloaded):
    child("""
        import allocation as A
        total, raised = A.many_layers()
        assert raised == total == 8
    """, **preloaded)


@pytest.mark.parametrize("count", ["1", "A.ALWAYS"])
def test_each_allocation_of_a_new_session_may_fail(preloaded, count):
    child(f"""
        import allocation as A
        total, raised = A.sessions(count={count})
        assert total > 150
    """, **preloaded)


def test_a_plan_that_is_too_long_for_the_memory_is_refused(preloaded):
    child("import allocation as A; A.long_plans()", **preloaded)
