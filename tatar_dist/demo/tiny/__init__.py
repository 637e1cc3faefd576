"""Build and pretrain the demo's base model, a Qwen2.5-VL of two million parameters.

build.py      architecture, tokenizer, processor; random weights
crops.py      crops to pretrain on, kept on disk
tower.py      stage 1: the vision tower learns to measure
align.py      stage 2: the language model learns to read image tokens
pretrain.py   both stages; made the committed model
probe.py      regression head on the frozen tower
"""
