"""Build a random Qwen2.5-VL of about two million parameters, with tokenizer and processor.

Takes sizes and a corpus to train the tokenizer on (default: the demo's rationales and prompts). Writes a directory that
transformers and vLLM load like any Qwen2.5-VL. `pretrain.py` starts from the same parts; tests build small tied and
untied variants in seconds.

    python -m tatar_dist.demo.tiny.build --output DIR [--tie]

Differences from the large models, with reasons:
- The vocabulary is 1,024 byte-level BPE tokens: any text encodes, and a word of the demo's rationales is one token.
- Every digit is a separate token, so that numbers have one spelling and their digits can be learned one by one.
- <think>, </think>, <answer>, </answer> are single tokens but not special: they survive `skip_special_tokens`.
- Images are 112x112: 64 patches of 14 px, merged 2x2 to 16 image tokens; one attention window covers the image.
- head_dim is 32, the smallest that vLLM's CPU attention supports.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tatar_dist.assets import CONFIGS, TINY_MODEL

SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
)
FORMAT_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
IMAGE_SIZE = 112
MAX_POSITIONS = 2048

CHAT_TEMPLATE = (TINY_MODEL / "chat_template.jinja").read_text()


@dataclass(frozen=True)
class TinySizes:
    """Widths and depths; text_hidden / text_heads (`head_dim`) must be 32 for rotary sections."""

    vocab: int = 1024
    text_hidden: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_kv_heads: int = 2
    text_intermediate: int = 384
    vision_hidden: int = 128
    vision_depth: int = 4
    vision_heads: int = 4
    vision_intermediate: int = 256


DEFAULT_SIZES = TinySizes()


def default_corpus(n: int = 1500, seed: int = 0) -> list[str]:
    """Return tokenizer training texts: random rationales, prompts and measurement replies.

    Rationales are a function of the (random) measurements, so no photograph is needed.
    """
    import numpy as np

    from tatar_dist.demo.data import distortions
    from tatar_dist.demo.data import texts as templates
    from tatar_dist.demo.data.photos import Category
    from tatar_dist.demo.tiny.align import DESCRIBE, MEASURE_ALL, SCORE_NAME, measure_request, written
    from tatar_dist.demo.tiny.crops import MEASURES
    from tatar_dist.prompts.answer import Prompts

    rng = np.random.default_rng(seed)
    scenes = get_args(Category)
    texts = []
    for i in range(n):
        scene, score = scenes[i % len(scenes)], float(rng.uniform(0, 100))
        drawn = distortions.draw_distortions(rng)
        values = {k: float(rng.random()) for k in MEASURES["iaa"]}
        texts.append(templates.iqa_rationale(drawn, scene, score, rng))
        texts.append(templates.iaa_rationale(values, scene, score, rng))
    texts += templates.attribute_texts(values, 50.0).values()
    names = [*MEASURES["iqa"], *MEASURES["iaa"], *SCORE_NAME.values()]
    requests = [measure_request(name) + " " + written(name, 0.5) for name in names]
    requests += [written(name, 0.5) for name in names]
    prompts = Prompts.load(CONFIGS / "prompts.yaml")
    requests += [DESCRIBE, MEASURE_ALL, "user", "assistant", "system", "\n", prompts.system, *prompts.user.values()]
    # Repeated, so that words of the requests and prompts weigh as much as the rationales' rarer ones.
    return texts + requests * 100


def train_tokenizer(corpus: Iterable[str], vocab: int) -> Any:
    """Train a fast byte-level BPE tokenizer with chat template, of at most `vocab` tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    # Words keep their leading blank (one token a word), each digit and each other sign stands alone.
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s+"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL_TOKENS) - len(FORMAT_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in FORMAT_TOKENS])
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        bos_token=None,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )


def make_config(tokenizer: Any, sizes: TinySizes, tie: bool) -> Any:
    """Return the Qwen2_5_VLConfig of these sizes, with token ids from the tokenizer."""
    from transformers import Qwen2_5_VLConfig

    token = tokenizer.convert_tokens_to_ids
    ends = {
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": tie,
    }
    text = ends | {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.text_hidden,
        "intermediate_size": sizes.text_intermediate,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_heads,
        "num_key_value_heads": sizes.text_kv_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,  # 0.02 is made for widths of thousands: here it leaves the layers next to silent
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": sizes.vision_depth,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "num_heads": sizes.vision_heads,
        "out_hidden_size": sizes.text_hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": IMAGE_SIZE,
        "fullatt_block_indexes": list(range(1, sizes.vision_depth, 2)),
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        **ends,
    )


def image_processor() -> Any:
    """Return a processor that resizes images to about 112x112 pixels (square: 16 tokens)."""
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(min_pixels=IMAGE_SIZE**2, max_pixels=IMAGE_SIZE**2)


def make_processor(tokenizer: Any) -> Any:
    """Return the Qwen2.5-VL processor around the tokenizer and `image_processor`."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(min_pixels=IMAGE_SIZE**2, max_pixels=IMAGE_SIZE**2),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Any, *, tie: bool = False, seed: int = 0, sizes: TinySizes = DEFAULT_SIZES) -> Any:
    """Create a random float32 Qwen2_5_VLForConditionalGeneration; a seed fixes the weights."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(make_config(tokenizer, sizes, tie))
    # Plain sampling without truncation or penalty. All is set, because engines take their defaults from this file.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def build(
    directory: str | Path,
    *,
    tie: bool = False,
    seed: int = 0,
    corpus: Iterable[str] | None = None,
    sizes: TinySizes = DEFAULT_SIZES,
) -> Path:
    """Write model (float32), tokenizer, processor, generation config to `directory`; return it."""
    directory = Path(directory)
    tokenizer = train_tokenizer(default_corpus() if corpus is None else corpus, sizes.vocab)
    make_model(tokenizer, tie=tie, seed=seed, sizes=sizes).save_pretrained(directory)
    make_processor(tokenizer).save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the tiny Qwen2.5-VL with random weights.")
    parser.add_argument("--output", required=True)
    parser.add_argument("--tie", action="store_true", help="share input and output embeddings")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(build(args.output, tie=args.tie, seed=args.seed))


if __name__ == "__main__":
    main()
