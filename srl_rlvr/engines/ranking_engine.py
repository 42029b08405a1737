"""Draws orderings: the engine of ranking policies. Every text of a call is encoded once, whatever prompts share it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from srl_rlvr.engines import Completion, SamplingSpec
from srl_rlvr.policies.questions import unpack
from srl_rlvr.policies.ranking import Kind, Scorer, draw
from srl_rlvr.policies.weights import Manifest, unflatten

_AT_ONCE = 256  # questions whose candidates' vectors are gathered


class RankingEngine:
    def __init__(self, model: Path, kind: Kind, tokens_per_pass: int):
        self.version = 0
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.scorer = Scorer(model, kind, tokens_per_pass).to(device)

    def sample(
        self, prompts: list[list[int]], spec: SamplingSpec, images: Sequence[Sequence[bytes]] = ()
    ) -> list[list[Completion]]:
        """`spec.samples` orderings of each prompt's candidates, of the first `spec.max_tokens` picks; where the spec
        has stops, an action ends with each, and here an action is one pick."""
        picks = len(spec.stops) or spec.max_tokens
        questions = [unpack(prompt) for prompt in prompts]
        texts = self.scorer.texts(questions)
        outputs, groups = self.scorer.encode(texts), []
        parts = (questions[at : at + _AT_ONCE] for at in range(0, len(questions), _AT_ONCE))
        logits = (row for part in parts for row in self.scorer.logits(part, texts, outputs).cpu().numpy())
        for prompt, logits_D in zip(prompts, logits, strict=True):
            # Of the prompt and not of its place: what it is asked with, or on which engine, changes nothing.
            rng = np.random.default_rng([spec.seed, xxhash.xxh64_intdigest(np.array(prompt, np.int32).tobytes())])
            orders, logprobs = draw(logits_D, spec.samples, picks, spec.temperature, rng)
            groups.append(
                [Completion(*drawn, "stop") for drawn in zip(orders.tolist(), logprobs.tolist(), strict=True)]
            )
        return groups

    def load(self, buffer: np.ndarray | torch.Tensor, manifest: Manifest) -> str:
        """Serve these weights from now on; returns the checksum of what arrived."""
        parameters = dict(self.scorer.network.named_parameters())
        with torch.no_grad():
            for name, tensor in unflatten(buffer, manifest):
                parameters[name].copy_(tensor)
        self.version = manifest.version
        return manifest.checksum
