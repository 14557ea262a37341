"""Load over HTTP, as much as is quick: `scripts/load-test --minutes 5` does more of it."""

import load


def test_concurrent_generations_equal_the_solo_run(tmp_path):
    drawn, stats, failures = load.run(tmp_path, clients=64, images=192)
    assert not failures, (failures, drawn.done, stats)
    # The load had everything in it that it is there for.
    done = drawn.done
    assert done["images"] == 192
    assert all(done[event] > 0 for event in ("cancelled", "disconnected", "restarted", "retries")), done
    assert stats["layers_window"] > 0 and stats["layers_reused"] > 0 and stats["layers_halved"] > 0
