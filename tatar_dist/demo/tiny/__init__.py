"""Build and pretrain the demo's base model, a Qwen2.5-VL of two million parameters.

build.py                        architecture, tokenizer, processor; random weights
crops.py                        pretraining crops
tower.py                        stage 1: train the vision tower on measurements
align.py                        stage 2: align the language model with the image tokens
pretrain.py, model_card.md.j2   both stages; produced the committed model
probe.py                        regression head on the frozen tower
"""
