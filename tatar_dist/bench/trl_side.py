"""Make GRPO steps by TRL's GRPOTrainer for `bench step`, with the python of .venv-trl.

    python trl_side.py MODEL DIRECTORY '{"prompts": 2, "group": 8, "tokens": 64, "steps": 2, "variant": "defaults"}'

DIRECTORY holds 0.png, 1.png, …, other images for every step, and messages.json, the chat without its image. Prints
one JSON line a step: seconds, tokens of a completion and of a prompt. `defaults` is what GRPOConfig gives for this
batch, all of it in one forward; the others (VARIANTS) are what its options offer on a CPU. The end token is kept from
coming early, so that every completion has all its tokens.
"""

import json
import sys
import time
from pathlib import Path

# this size has memory enough to keep activations; a group a forward pads less and stays in cache; a static KV cache
VARIANTS = {
    "defaults": {},
    "kept activations": {"gradient_checkpointing": False},
    "a group a forward": {"gradient_checkpointing": False, "split": True},
    "static cache": {"gradient_checkpointing": False, "cache_implementation": "static"},
}


def main() -> None:
    model_path, directory, asked = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    import torch
    import trl
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    prompts, group, tokens, steps = (asked[k] for k in ("prompts", "group", "tokens", "steps"))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_path)
    messages = json.loads((directory / "messages.json").read_text())
    images = [Image.open(directory / f"{i}.png").convert("RGB") for i in range(prompts * steps)]
    options = dict(VARIANTS[asked["variant"]])
    parts = prompts if options.pop("split", False) else 1
    config = GRPOConfig(
        output_dir=str(directory / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=prompts * group // parts,
        gradient_accumulation_steps=parts,
        num_generations=group,
        max_completion_length=tokens,
        max_steps=steps,
        learning_rate=1e-6,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        shuffle_dataset=False,
        generation_kwargs={"min_new_tokens": tokens},
        **options,
    )
    made: list[int] = []

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        made.extend(len(c) for c in completion_ids)
        return [float(i % group) for i in range(len(completion_ids))]

    class Clock(TrainerCallback):
        start, seen = 0.0, 0

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, args: object, state: object, *_: object, **__: object) -> None:
            seconds = time.perf_counter() - self.start  # generation included
            rows, before, self.seen = max(1, len(made)), self.seen, int(state.num_input_tokens_seen)
            prompt = (self.seen - before - sum(made)) / rows
            line = {"seconds": seconds, "tokens": sum(made) / rows, "prompt": prompt, "trl": trl.__version__}
            print(json.dumps(line), flush=True)
            made.clear()

    data = Dataset.from_list([{"prompt": messages, "image": images[i]} for i in range(prompts * steps)])
    GRPOTrainer(model, reward, args=config, train_dataset=data, processing_class=processor, callbacks=[Clock()]).train()


if __name__ == "__main__":
    main()
