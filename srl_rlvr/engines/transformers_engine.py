"""The fallback engine: transformers and a plain sampling loop. Slower than vLLM, lighter, and nothing to install.

Each prompt is computed once and its cache repeated for the group; sequences that have ended leave the batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from srl_rlvr.engines import Completion, SamplingSpec, in_segments
from srl_rlvr.policies import base_models
from srl_rlvr.policies.weights import Manifest, checksum, merge_lora, unflatten


class TransformersEngine:
    def __init__(self, model: Path, *, max_running: int, max_context: int, **_vllm_only: Any):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = base_models.load_model(model).to(self.device)
        self.tokenizer = base_models.load_tokenizer(model)
        self.max_running = max_running
        self.max_context = max_context
        self.version = 0
        self._base: dict[str, torch.Tensor] | None = None

    @torch.inference_mode()
    def sample(self, prompts: list[list[int]], spec: SamplingSpec) -> list[list[Completion]]:
        generator = torch.Generator(self.device).manual_seed(spec.seed)

        def one_segment(prompts: list[list[int]], samples: list[int], max_tokens: list[int], stop: str) -> Any:
            groups = []
            at = 0
            while at < len(prompts):
                end, rows = at, 0
                while end < len(prompts) and (end == at or rows + samples[end] <= self.max_running):
                    rows += samples[end]
                    end += 1
                groups += self._batch(
                    prompts[at:end], samples[at:end], max_tokens[at:end], stop, spec.temperature, generator
                )
                at = end
            return groups

        return in_segments(one_segment, prompts, spec, self.max_context)

    def load(self, buffer: np.ndarray, manifest: Manifest) -> str:
        tensors = dict(unflatten(buffer, manifest))
        if manifest.lora_scale is not None:
            if self._base is None:
                self._base = {name: p.detach().clone() for name, p in self.network.named_parameters()}
            tensors = dict(merge_lora(self._base.items(), tensors, manifest.lora_scale))
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(tensors[name])
        self.version = manifest.version
        return checksum(buffer)

    def _batch(
        self,
        prompts: list[list[int]],
        samples: list[int],
        max_tokens: list[int],
        stop: str,
        temperature: float,
        generator: torch.Generator,
    ) -> list[tuple[list[Completion], list[bool]]]:
        """Sample one batch to its end. Rows are samples in order; `alive` holds those still running."""
        logits, cache, attention = self._prefill(prompts, samples)
        owner = [p for p, n in enumerate(samples) for _ in range(n)]
        completions = [Completion([], [], "length") for _ in owner]
        by_stop = [False] * len(owner)
        alive = torch.arange(len(owner), device=self.device)
        positions = torch.tensor([len(prompts[p]) for p in owner], device=self.device)
        while True:
            tokens, logprobs = _draw(logits, temperature, generator)
            keep = []
            for i, (row, token, logprob) in enumerate(
                zip(alive.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
            ):
                completion = completions[row]
                completion.token_ids.append(token)
                completion.logprobs.append(logprob)
                ended = token == self.tokenizer.eos_token_id
                by_stop[row] = bool(stop) and not ended and stop in self._tail(completion, stop)
                if ended or by_stop[row]:
                    completion.finish_reason = "stop"
                elif len(completion.token_ids) < max_tokens[owner[row]]:
                    keep.append(i)
            if not keep:
                break
            kept = torch.tensor(keep, device=self.device)
            if len(keep) < len(alive):
                cache.batch_select_indices(kept)
                alive, attention, tokens, positions = alive[kept], attention[kept], tokens[kept], positions[kept]
            attention = torch.cat([attention, attention.new_ones(len(keep), 1)], dim=1)
            output = self.network(
                input_ids=tokens[:, None],
                attention_mask=attention,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            positions = positions + 1
            logits, cache = output.logits[:, -1], output.past_key_values
        ends = np.cumsum(samples)
        return [(completions[end - n : end], by_stop[end - n : end]) for end, n in zip(ends, samples, strict=True)]

    def _prefill(self, prompts: list[list[int]], samples: list[int]) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Logits [rows, V] after each prompt, its cache and mask, repeated for its samples. Prompts pad on the left."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = self.network(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(samples)).to(self.device)
        output.past_key_values.batch_select_indices(rows)
        return output.logits[:, -1][rows], output.past_key_values, mask[rows]

    def _tail(self, completion: Completion, stop: str) -> str:
        """The decoded end of a completion, long enough to hold `stop`: a token is at least one byte."""
        return self.tokenizer.decode(completion.token_ids[-len(stop) - 1 :])


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows] and their log-probabilities at `temperature` (at 1 where it is 0, greedy)."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        tokens = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
