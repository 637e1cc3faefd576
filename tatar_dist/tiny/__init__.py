"""Former names of commands in tatar_dist/demo/tiny, for one release: build.py, pretrain.py."""
