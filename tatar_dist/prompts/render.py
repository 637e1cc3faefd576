"""Render each task's prompt as the model reads it, and count its tokens.

Training, evaluation and scoring all render here, so that a model gets the prompts that it was trained on.
"""

from __future__ import annotations

import contextlib
from io import StringIO
from typing import Any

from jinja2 import TemplateError

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.models import family
from tatar_dist.models.files import COPY
from tatar_dist.prompts.answer import Prompts
from tatar_dist.prompts.unusable import TooLong
from tatar_dist.types import Task


class PromptTexts:
    """Prompts for `config`'s model. text, tokens (without image): by task; backbone, wording."""

    def __init__(self, config: Config) -> None:
        backbone_class = family(config.model.family)
        backbone_class.check_directory(config.model.path)
        with contextlib.redirect_stderr(StringIO()):
            self.backbone = backbone_class(config.model)
        self.backbone.check_weights()
        self.wording = Prompts.load(config.data.prompts)
        self._data = config.data
        self.text = {task: self.wording.render(task, self._chat) for task in self.wording.user}  # type: ignore[arg-type]
        self.tokens = {t: len(self.backbone.tokenizer(text)["input_ids"]) for t, text in self.text.items()}

    def _chat(self, messages: list[dict[str, Any]]) -> str:
        try:
            options = {"tokenize": False, "add_generation_prompt": True}
            text: str = self.backbone.tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, ValueError, TypeError) as e:
            raise UserError(f"{self.backbone.config.path}: its chat template cannot be rendered: {e}") from e
        if self.backbone.processor.image_token not in text:
            raise UserError(f"{self.backbone.config.path}: its chat template leaves the image out: {COPY}")
        return text

    def longest(self, answer: int) -> int:
        """Return the tokens of the longest prompt with the largest image, plus `answer` tokens."""
        p = self.backbone.processor.image_processor
        image = self.backbone.config.max_pixels // (p.patch_size * p.merge_size) ** 2
        return max(self.tokens.values()) + image + answer

    def tokens_with(self, size: tuple[int, int], task: Task) -> int | str:
        """Return the prompt's tokens with an upright (width, height) image, or why it is unusable."""
        try:
            tokens = self.tokens[task] + self.backbone.image_tokens(*size)
        except ValueError as e:  # more than 200 times as wide as high, or the reverse
            return str(e)
        limit = self._data.max_prompt_tokens
        if tokens > limit:
            p, left = self.backbone.processor.image_processor, limit + 1 - max(self.tokens.values())  # 1: placeholder
            pixels = left * (p.patch_size * p.merge_size) ** 2
            takes = pixels if pixels >= self.backbone.config.min_pixels else 0
            return TooLong.of("prompt", tokens, "data.max_prompt_tokens", limit, takes)
        return tokens
