"""`bench report`: a small run of its kind has a page, and the figures are of that run."""

from tatar_dist.bench import report as benchmark
from tatar_dist.bench.table import show


def test_a_small_run_is_measured_whole(capsys):
    found = benchmark.run(steps=6, images=20, rounds=1)
    assert found["rollouts"] == 600 and found["name"] == "report"
    assert 0 < found["reading_seconds"] < found["seconds"][0]
    assert 0.02 < found["megabytes"] < 5 and found["peak_mib"] > 50
    show(found)
    assert "600 rollouts" in capsys.readouterr().out
