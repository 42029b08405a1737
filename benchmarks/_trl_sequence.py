"""The rival of `paper_table.py`: TRL's SFTTrainer, then its GRPOTrainer, by the same run file.

Same demonstrations and problems, rates, batches, groups, verifier, and the best weights by the same dev problems at the
same updates; TRL's other settings are its defaults.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from _machine import import_trl

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "lr_scheduler_type": "constant_with_warmup",
    "adam_beta2": 0.99,
}


def train(config: Any, base: Path, out: Path) -> float:
    """Run the sft and the rlvr stage of `config` by TRL, write the model to `out`; minutes without the start."""
    from datasets import Dataset

    from srl_rlvr import trained
    from srl_rlvr.cli import inference
    from srl_rlvr.examples import sources
    from srl_rlvr.model_types import task_llm
    from srl_rlvr.policies import base_models
    from srl_rlvr.stages import rlvr

    trl = import_trl()
    train_examples, dev, _ = sources.load_all(config.data, config.seed)
    sft, grpo = config.stages
    tokens = config.evaluation.max_tokens
    network = base_models.load_model(base)
    with inference.open_model(trained.read(base, 512, tokens), "transformers") as opened:
        tokenizer = opened.tokenizer
        best = Best(network, opened, dev, config.evaluation.every, tokens)
        began = time.monotonic()
        solutions = [task_llm.TYPE.encode_solution(tokenizer, row, think=False) for row in train_examples.to_pylist()]
        arguments = trl.SFTConfig(
            output_dir=str(out / "sft"),
            learning_rate=sft.learning_rate,
            warmup_steps=sft.warmup_steps,
            per_device_train_batch_size=sft.batch_size,
            num_train_epochs=sft.epochs,
            max_length=None,
            seed=config.seed,
            **COMMON,
        )
        rows = [
            {"input_ids": s.prompt + answer, "labels": [-100] * len(s.prompt) + answer}
            for s in solutions
            for answer in [[token for step in s.steps for token in step]]
        ]
        best.during(
            trl.SFTTrainer(network, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        )
        prompts = rlvr.prompts(train_examples, tokenizer, grpo.label, think=False)
        arguments = trl.GRPOConfig(
            output_dir=str(out / "grpo"),
            learning_rate=grpo.learning_rate,
            warmup_steps=grpo.warmup_steps,
            max_steps=grpo.steps,
            num_generations=grpo.group_size,
            per_device_train_batch_size=grpo.group_size * grpo.prompts_per_step,
            max_completion_length=grpo.max_tokens,
            temperature=grpo.temperature,
            epsilon_high=grpo.clip_high,
            seed=config.seed,
            **COMMON,
        )
        rows = [
            {"prompt": tokenizer.decode(row["token_ids"]), **{name: row[name] for name in COLUMNS}}
            for row in prompts.to_pylist()
        ]
        best.during(
            trl.GRPOTrainer(
                network,
                reward_funcs=Reward(tokenizer),
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        )
        minutes = (time.monotonic() - began) / 60
    network.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    (out / "model" / "model_card.json").write_text(json.dumps({"model_type": "task_llm", "base": str(base)}) + "\n")
    return round(minutes, 2)


COLUMNS = ("verifier", "reference", "metadata")


class Reward:
    """Our own verifiers, as a reward function of TRL's."""

    __name__ = "verifier"

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        from srl_rlvr.verifiers import find_verifier

        rewards, end = [], self.tokenizer.eos_token_id
        for row, ids in enumerate(completion_ids):
            verifier, reference, metadata = (columns[name][row] for name in COLUMNS)
            about = json.loads(metadata) | {"finish_reason": "stop" if end in ids else "length"}
            text = self.tokenizer.decode([token for token in ids if token != end])
            rewards.append(find_verifier(verifier)(text, reference, about).reward)
        return rewards


class Best:
    """The weights of a stage that solve most dev problems, of equals the newest: the pipeline's rule."""

    def __init__(self, network: Any, opened: Any, dev: Any, every: int, max_tokens: int):
        self.network, self.opened, self.dev, self.every, self.max_tokens = network, opened, dev, every, max_tokens

    def during(self, trainer: Any) -> None:
        """Train, and end with the best weights."""
        from transformers import TrainerCallback

        self.score, looks = -1.0, self

        class Looks(TrainerCallback):
            def on_train_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
                looks.look(state.global_step)

            def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % looks.every == 0 or state.global_step == state.max_steps:
                    looks.look(state.global_step)

        trainer.add_callback(Looks())
        trainer.train()
        self.network.load_state_dict(self.weights)

    def look(self, step: int) -> None:
        from srl_rlvr import pipeline
        from srl_rlvr.policies import weights

        parameters = dict(self.network.named_parameters())
        flat = weights.flatten(parameter.detach() for parameter in parameters.values())
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in parameters.items())
        self.opened.engine.load(flat, weights.Manifest(0, shapes, weights.checksum(flat), None))
        scores, _ = pipeline.evaluate(self.dev, self.opened.tokenizer, self.opened, False, self.max_tokens)
        score = sum(scores) / len(scores)
        print(f"step {step}: {score:.1%} of {len(scores)} dev problems", flush=True)
        if score >= self.score:
            self.score = score
            self.weights = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
