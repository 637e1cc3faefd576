"""Time one part of the pipeline beside a baseline: `tatar-dist bench NAME`.

The benches: learner.py, rollout.py, sync.py, reward.py, data.py, scaling.py (`make bench`); step.py (`make bench-trl`);
overlap.py, staleness.py, simulate.py (`make nightly`). README.md has their results and the files that they share.
"""
