"""Render prompts and parse answers, the same way in SFT, GRPO, evaluation and serving.

answer.py     the grammar of an answer; the wording of configs/prompts.yaml
render.py     each task's prompt as the model reads it, and its number of tokens
source.py     samples to prompts and training rows; broken samples are quarantined
unusable.py   reasons why samples cannot be used, counted
expected.py   the expected score over the numbers that an answer might have had
"""
