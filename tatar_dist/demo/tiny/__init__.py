"""The tiny Qwen2.5-VL of the demo: architecture and tokenizer (build), pretraining, and the regression probe."""
