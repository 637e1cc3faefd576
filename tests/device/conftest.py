"""Learners on a pretended accelerator: the real DeepSpeed ZeRO-3 and transformers, on tensors without memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pretend import RANKS, FakeAccelerator, join_process_group, register

from tatar_dist.assets import locate
from tatar_dist.config.load import load_config
from tatar_dist.learner import actor
from tatar_dist.learner import process_group as groups
from tatar_dist.learner.actor import Learner
from tatar_dist.models import family
from tatar_dist.models.base import QwenVL
from tatar_dist.types import LearnerRow

from models import MODELS  # isort: skip

IMAGES = ((448, 448), (308, 224))
LENGTHS = (40, 1, 17, 33)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories with a processor of each family: the demo's tokenizer, patches of the real size."""
    from transformers import AutoProcessor, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    ours = Path(locate("tatar_dist/assets/tiny-qwen2_5-vl"))
    processor = AutoProcessor.from_pretrained(ours)
    qwen3 = tmp_path_factory.mktemp("qwen3")
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=processor.tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=processor.chat_template,
    ).save_pretrained(qwen3)
    return {"qwen2_5_vl": ours, "qwen3_vl": qwen3}


class Rig:
    """One learner rank of RANKS, with the model's widths and rows for a micro-batch."""

    def __init__(self, mode: FakeAccelerator, learner: Learner, rows: list[LearnerRow], shape: Any) -> None:
        self.mode, self.learner, self.rows, self.shape = mode, learner, rows, shape

    def sft(self) -> Any:
        return self.learner.sft_step([self.rows, self.rows[:2]], 0, sum(LENGTHS))

    def grpo(self) -> Any:
        return self.learner.grpo_step([self.rows, self.rows[:2]], 0)


@pytest.fixture
def rig(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Make a rig: `rig(model, stage, *words, layers=…, images=…, lengths=…)`."""
    device = register()
    with ExitStack() as stack:

        def make(
            model: str,
            stage: str,
            *words: str,
            layers: int | None = 2,
            images: Sequence[tuple[int, int]] = IMAGES,
            lengths: Sequence[int] = LENGTHS,
        ) -> Rig:
            shape = MODELS[model]
            path = directories[shape.family]
            settings = [f"output={tmp_path}", f"model.path={path}", f"model.family={shape.family}"]
            config = load_config([], [*settings, "model.dtype=bfloat16", "cluster.gpus_per_node=8", *words])
            backbone = family(shape.family)(config.model)
            image_token = backbone.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            mode, model_config = FakeAccelerator(), shape.config(image_token, layers)
            monkeypatch.setattr(groups, "local_device", lambda _: device)
            monkeypatch.setattr(groups, "init_process_group", lambda *_: join_process_group())
            monkeypatch.setattr(family(shape.family), "load_model", without_weights(model_config))
            monkeypatch.setattr(actor, "open_log", lambda *_: None)  # it takes this process's output
            learner = Learner(config, 0, RANKS)
            rows = [_row(backbone, images[i % len(images)], n, i) for i, n in enumerate(lengths)]
            stack.enter_context(mode)
            learner.setup(None, stage, 10, 1)
            return Rig(mode, learner, rows, model_config)

        yield make


def without_weights(shape: Any) -> Callable[[Any], Any]:
    """Make `load_model` build the model of a configuration as from_pretrained does, without weights."""
    import transformers

    def load_model(backbone: Any) -> Any:
        cls = getattr(transformers, backbone.model_class)
        load = cls.from_pretrained

        def from_config(_: str, **settings: Any) -> Any:
            model, report = load(None, config=shape, state_dict={}, **settings)
            return model, dict.fromkeys(report, ())  # it misses all weights

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, "from_pretrained", from_config)
            return QwenVL.load_model(backbone)

    return load_model


def _row(backbone: Any, size: tuple[int, int], tokens: int, number: int) -> LearnerRow:
    png = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).resize(size).save(png, "PNG")
    content = [{"type": "image"}, {"type": "text", "text": "a plain view"}]
    message = [{"role": "user", "content": content}]
    prompt = backbone.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    more = {"advantage": 1.0 - number, "weight": 0.01, "sampled_logprobs": (-1.0,) * tokens}
    return LearnerRow(str(number % 2), png.getvalue(), prompt, tuple(range(40, 40 + tokens)), "iqa", **more)
