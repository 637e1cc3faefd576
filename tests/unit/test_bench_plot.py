"""How an update grows, drawn: what stands on which axis, and the line of what is counted."""

from __future__ import annotations

from tatar_dist.bench import plot


def work(seconds=2.0, gflops=10.0, **sizes):
    size = {"groups": 1, "pixels": 896, "tokens": 64, "vocab": 4096} | sizes
    return {**size, "seconds": seconds, "gflops": gflops, "mib": 512.0, "counted_mib": 1024.0}


FOUND = {
    "growth": {
        "groups": [work(), work(groups=2, seconds=5.0, gflops=20.0)],
        "image": [work(pixels=448, gflops=5.0), work()],
        "tokens": [work(), work(tokens=128)],
        "vocab": [work(), work(vocab=32768)],
    }
}


def test_the_line_is_the_flops_at_the_rate_of_the_first_update():
    values = plot.series(FOUND)
    assert values["groups"]["x"] == [1, 2]
    assert values["groups"]["seconds"] == [2.0, 5.0] and values["groups"]["counted seconds"] == [2.0, 4.0]
    assert values["image"]["x"] == [256, 1024] and values["image"]["counted seconds"] == [1.0, 2.0]
    assert values["vocab"]["GiB"] == [0.5, 0.5] and values["vocab"]["counted GiB"] == [1.0, 1.0]


def test_the_same_figures_give_the_same_file(tmp_path):
    files = [tmp_path / name for name in ("a.svg", "b.svg")]
    for file in files:
        plot.draw(FOUND, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"<svg" in files[0].read_bytes()
