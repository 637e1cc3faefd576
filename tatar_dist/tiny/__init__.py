"""Former names of the commands in tatar_dist/demo/tiny, kept for one release: build.py, pretrain.py."""
