"""The prompt of each task as the model reads it: its text and its number of tokens, for whoever asks a model.

In: the model's family and directory, the wording. Out: texts, and why an image cannot be asked about. Training,
evaluation and scoring all render here, so that a model is asked what it was trained on.
"""

from __future__ import annotations

import contextlib
from io import StringIO
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.data.images import UnreadableImage, decode_image
from tatar_dist.models import family
from tatar_dist.prompts.answer import Prompts
from tatar_dist.types import Task


class PromptTexts:
    """`text[task]`, `tokens[task]` (without the image) for the model of `config`; `backbone`, `wording`."""

    def __init__(self, config: Config) -> None:
        backbone_class = family(config.model.family)
        backbone_class.check_directory(config.model.path)
        with contextlib.redirect_stderr(StringIO()):
            self.backbone = backbone_class(config.model)
        self.wording = Prompts.load(config.data.prompts)
        self._data = config.data
        self.text = {task: self.wording.render(task, self._chat) for task in self.wording.user}  # type: ignore[arg-type]
        self.tokens = {t: len(self.backbone.tokenizer(text)["input_ids"]) for t, text in self.text.items()}

    def _chat(self, messages: list[dict[str, Any]]) -> str:
        return self.backbone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def longest(self, answer: int) -> int:
        """Tokens of the longest prompt, with a picture as large as the model sees one, and an answer of `answer`."""
        p = self.backbone.processor.image_processor
        image = self.backbone.config.max_pixels // (p.patch_size * p.merge_size) ** 2
        return max(self.tokens.values()) + image + answer

    def measure(self, image: bytes, task: Task, where: str) -> int | str:
        """Tokens of the prompt with this image, or why it cannot be asked. `where` names the image."""
        try:
            return self.tokens_with(decode_image(image, where).size, task)
        except UnreadableImage as e:
            return str(e)

    def tokens_with(self, size: tuple[int, int], task: Task) -> int | str:
        """Tokens of the prompt with an upright image of (width, height), or why it cannot be asked."""
        try:
            tokens = self.tokens[task] + self.backbone.image_tokens(*size)
        except ValueError as e:  # more than 200 times as wide as high, or the reverse
            return str(e)
        limit = self._data.max_prompt_tokens
        if tokens > limit:
            return f"prompt of {tokens} tokens is over data.max_prompt_tokens={limit}"
        return tokens
