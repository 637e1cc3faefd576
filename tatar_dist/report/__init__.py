"""HTML report of a run: `html.write(run)`. No module here imports torch."""
