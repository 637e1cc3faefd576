"""One HTML page about a run: `html.write(run)`. Reading, verdicts, charts and gallery have a file each; no torch."""
