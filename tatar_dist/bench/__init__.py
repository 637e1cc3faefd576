"""Time one part of the pipeline beside a baseline: `tatar-dist bench NAME`.

The benches: learner.py, rollout.py, sync.py, reward.py, data.py, scaling.py (`make bench`); step.py (`make bench-trl`);
images.py, rationale.py, report.py, evaluate.py, settings.py, overlap.py, staleness.py, simulate.py (`make nightly`);
shapes.py, for one CUDA GPU. README.md has their results and the files that they share.
"""
