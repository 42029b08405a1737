"""The ranking policy: an encoder scores candidates, and Plackett–Luce over the scores gives orderings.

A ranking is a rollout as any other. The prompt's tokens hold the question, its candidates and what is picked already
(`questions.pack`); the completion's tokens are numbers of candidates, best first, each with its log-probability. With
the logits z of the candidates that are left, the next pick is c with probability exp(z_c) / Σ exp(z): Plackett–Luce
(Plackett 1975; as a policy, Oosterhuis 2021, and Neural PG-RANK, 2310.04407). One pick is a classifier.

Two scorers: `bi` embeds question and candidates apart (logit: `SCALE` times the cosine), `cross` reads each candidate
together with the question (logit: its output). Texts that prompts of a batch have in common are encoded once. Where a
search has ordered the candidates, `ORDER` times -log of its place is added to a candidate's logit: a policy whose own
logits are equal, as of a head newly drawn, begins with that order, and learns where to leave it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from srl_rlvr.policies import base_models, weights
from srl_rlvr.policies.losses import (
    SUMS,
    UpdateSpec,
    averages,
    check_finite,
    cross_entropy_loss,
    policy_gradient_loss,
)
from srl_rlvr.policies.optimizer import BETAS, new_optimizer
from srl_rlvr.policies.questions import Question, unpack

Kind = Literal["bi", "cross"]
SCALE = 20.0  # of cosines, as sentence-transformers trains them
# What answers is at place n of a search with a probability as 1 / n to this power: of BM25 likeliest with 1.7 (SciFact)
# and 1.8 (CovidQA).
ORDER = 1.75


class Scorer(torch.nn.Module):
    """Logits of candidates. `network` is a SentenceTransformer (`bi`) or a CrossEncoder (`cross`)."""

    def __init__(self, model: Path, kind: Kind, tokens_per_pass: int):
        super().__init__()
        self.kind: Kind = kind
        self.tokens_per_pass = tokens_per_pass
        self.network: Any = base_models.load_encoder(model, kind)
        self.pad = self.network.tokenizer.pad_token_id or 0
        self.separator = self.network.tokenizer.sep_token_id
        prompt = self.network.prompts.get(self.network.default_prompt_name) if kind == "bi" else None
        # Some encoders leave their prompt out of the mean; its length is part of what the others ignore.
        self.prompt_length = self.network.preprocess(["a"], prompt=prompt).get("prompt_length") if prompt else None
        self.takes_types = "token_type_ids" in self.network.tokenizer.model_input_names

    def texts(self, questions: Sequence[Question]) -> list[tuple[int, ...]]:
        """Every text of the questions once, the longest first."""
        texts = {text for q in questions for text in (q.question, *q.candidates) if text}
        return sorted(texts, key=lambda text: (-len(text), text))

    def passes(self, texts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """The texts in batches of at most `tokens_per_pass`, padding included: the longest first, none padded to more
        than twice its length."""
        batches: list[list[tuple[int, ...]]] = []
        for text in texts:
            longest = len(batches[-1][0]) if batches else 0
            if longest > 2 * len(text) or not batches or (len(batches[-1]) + 1) * longest > self.tokens_per_pass:
                batches.append([])
            batches[-1].append(text)
        return batches

    def forward(self, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """[texts, D]: embeddings of length 1 (`bi`), or one logit each (`cross`, D = 1)."""
        longest = max(map(len, texts))
        device = next(self.network.parameters()).device
        ids = torch.full((len(texts), longest), self.pad, device=device)
        mask = torch.zeros((len(texts), longest), dtype=torch.long, device=device)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text, device=device)
            mask[row, : len(text)] = 1
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.prompt_length is not None:
            inputs["prompt_length"] = self.prompt_length
        if self.takes_types:
            is_separator = (ids == self.separator) & mask.bool()
            after_first = (is_separator.cumsum(1) - is_separator.long() > 0) & mask.bool()
            inputs["token_type_ids"] = after_first.long() if self.kind == "cross" else torch.zeros_like(ids)
        output = self.network(inputs)
        if self.kind == "cross":
            return output["scores"].reshape(-1, 1)
        return torch.nn.functional.normalize(output["sentence_embedding"], dim=-1)

    @torch.no_grad()
    def encode(self, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """[texts, D], pass by pass."""
        return torch.cat([self(batch) for batch in self.passes(texts)])

    def logits(
        self,
        questions: Sequence[Question],
        texts: Sequence[tuple[int, ...]],
        outputs: torch.Tensor,
        dimensions: int = 0,
    ) -> torch.Tensor:
        """[questions, most candidates] of the outputs of `texts`; -inf where a candidate is missing or picked.

        Of embeddings only the first `dimensions` count, where they are given.
        """
        if dimensions:
            outputs = torch.nn.functional.normalize(outputs[:, :dimensions], dim=-1)
        row_of = {text: row for row, text in enumerate(texts)}
        widest = max(len(q.candidates) for q in questions)
        rows = torch.zeros(len(questions), widest, dtype=torch.long)
        out = torch.zeros(len(questions), widest, dtype=torch.bool)
        places = torch.ones(len(questions), widest)
        for index, q in enumerate(questions):
            places[index, : len(q.ranks)] = torch.tensor(q.ranks)
            rows[index, : len(q.candidates)] = torch.tensor([row_of[text] for text in q.candidates])
            out[index, len(q.candidates) :] = True
            out[index, list(q.picked)] = True
        found_P_D_V = outputs[rows.to(outputs.device)]
        if self.kind == "cross":
            logits = found_P_D_V[..., 0]
        else:
            asked = outputs[torch.tensor([row_of[q.question] for q in questions], device=outputs.device)]
            logits = SCALE * torch.einsum("pdv,pv->pd", found_P_D_V, asked)
        return (logits - ORDER * places.log().to(logits.device)).masked_fill(out.to(logits.device), -torch.inf)


def log_probabilities(logits_S_D: torch.Tensor, picks: Sequence[Sequence[int]]) -> torch.Tensor:
    """log π [sum of picks] of each pick of each sample, in order: `logits_S_D` are its candidates' (-inf: not left)."""
    longest = max(map(len, picks))
    picks_S_K = torch.zeros(len(picks), longest, dtype=torch.long, device=logits_S_D.device)
    there_S_K = torch.zeros(len(picks), longest, dtype=torch.bool, device=logits_S_D.device)
    for row, of_row in enumerate(picks):
        picks_S_K[row, : len(of_row)] = torch.tensor(of_row, device=logits_S_D.device)
        there_S_K[row, : len(of_row)] = True
    left, columns = logits_S_D, []
    for k in range(longest):
        pick = picks_S_K[:, k : k + 1]
        columns.append(torch.log_softmax(left, dim=1).gather(1, pick)[:, 0])
        if k + 1 < longest:
            # Without its last candidate a complete sample would have none, and NaN for the columns that it lacks.
            left = left.scatter(1, pick, -torch.inf).where(there_S_K[:, k + 1 : k + 2], left)
    return torch.stack(columns, dim=1)[there_S_K]


def draw(
    logits_D: np.ndarray, samples: int, picks: int, temperature: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`samples` orderings of the first `picks` candidates by Gumbel top-k (Kool et al., 1903.06059), and the
    log-probability of each pick, both [samples, picks]; at temperature 0 the one best ordering each time.

    Candidates of logit -inf are never drawn: where fewer are left, fewer are picked.
    """
    left = np.flatnonzero(np.isfinite(logits_D))
    scaled = logits_D[left].astype(np.float64) / (temperature or 1.0)
    noise = rng.gumbel(size=(samples, len(left))) if temperature else np.zeros((samples, len(left)))
    orders = np.argsort(-(scaled + noise), axis=1, kind="stable")[:, : min(picks, len(left))]
    remaining, rows = np.tile(scaled, (samples, 1)), np.arange(samples)
    logprobs = np.empty(orders.shape)
    for k, pick in enumerate(orders.T):
        top = remaining.max(1)
        logprobs[:, k] = scaled[pick] - top - np.log(np.exp(remaining - top[:, None]).sum(1))
        remaining[rows, pick] = -np.inf
    return left[orders], logprobs


class RankingPolicy:
    """An encoder that learns from samples of orderings. It has the commands of `TextPolicy`, and its metrics.

    Several workers take their share of the questions each, and gradients are summed over them. Under `dimensions` the
    loss is the mean of that of whole embeddings and of those cut to each of these lengths (Matryoshka: Kusupati et al.,
    2205.13147); orderings are drawn, and metrics are, of whole ones.
    """

    def __init__(
        self,
        model: Path,
        *,
        kind: Kind,
        tokens_per_microbatch: int = 4096,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = BETAS,
        max_grad_norm: float = 1.0,
        dimensions: Sequence[int] = (),
        device: str = "cpu",
    ):
        self.dimensions = tuple(dimensions)
        self.device = torch.device(device)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.scorer = Scorer(model, kind, tokens_per_microbatch).to(self.device)
        self.weight_decay, self.betas, self.max_grad_norm = weight_decay, betas, max_grad_norm
        self.notices: list[str] = []
        self.version = 0
        named = list(self.scorer.network.named_parameters())
        self.parameters = [parameter for _, parameter in named]
        self.flat = weights.share_storage(self.parameters)
        self.shapes = tuple((name, tuple(parameter.shape)) for name, parameter in named)
        self.reference: torch.Tensor | None = None
        self.optimizer = self._new_optimizer()

    def begin_stage(self, keep_reference: bool) -> None:
        """A fresh optimizer and, if asked, the present weights as the reference of the KL term."""
        self.optimizer = self._new_optimizer()
        self.reference = self.flat.clone() if keep_reference else None

    def update(self, samples: pa.Table, spec: UpdateSpec) -> dict[str, float]:
        """Learn from one batch (a Sample table); metrics as those of `TextPolicy.update`, over picks.

        Raises ValueError where the loss is not finite, or it is of pairs.
        """
        if spec.loss == "preference":
            raise ValueError("a ranking policy learns from orderings, not from pairs: leave the dpo stage out")
        for group in self.optimizer.param_groups:
            group["lr"] = spec.learning_rate
        rows = samples.to_pylist()
        trunks = list(dict.fromkeys(row["trunk_id"] for row in rows))
        old = self._logprobs(rows, spec.temperature) if spec.updates > 1 else None
        totals = []
        for part in range(spec.updates):
            kept = set(trunks[part :: spec.updates])
            chosen = [index for index, row in enumerate(rows) if row["trunk_id"] in kept]
            if chosen:
                totals.append(self._step([rows[i] for i in chosen], [old[i] for i in chosen] if old else None, spec))
        self.version += 1
        return {name: float(np.mean([total[name] for total in totals])) for name in totals[0]}

    def logprobs(self, samples: pa.Table, temperature: float = 1.0) -> list[np.ndarray]:
        """log π of each sample's picks, in the order of the table."""
        return self._logprobs(samples.to_pylist(), temperature)

    def export(self) -> tuple[torch.Tensor, weights.Manifest]:
        """All weights as one flat float32 tensor: the storage that the policy learns in."""
        self.optimizer.zero_grad(set_to_none=True)
        return self.flat, weights.Manifest(self.version, self.shapes, weights.checksum(self.flat))

    def save(self, folder: Path) -> None:
        """Everything a resumed run needs, bit for bit. Raises OSError where it cannot be written."""
        if self.rank:
            return
        state = {
            "weights": self.flat,
            "optimizer": self.optimizer.state_dict(),
            "reference": self.reference,
            "version": self.version,
        }
        weights.write_state(state, folder / "learner.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "learner.pt", map_location=self.device, weights_only=True, mmap=True)
        with torch.no_grad():
            self.flat.copy_(state["weights"])
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.reference = None if state["reference"] is None else state["reference"].clone()
        self.version = state["version"]

    def save_model(self, folder: Path, card: dict[str, Any]) -> None:
        """As sentence-transformers saves it, tokenizer included, with our card beside it."""
        if self.rank:
            return
        self.scorer.network.save_pretrained(str(folder), create_model_card=False)
        (folder / "model_card.json").write_text(json.dumps(card, indent=2) + "\n")

    def _new_optimizer(self) -> torch.optim.AdamW:
        return new_optimizer(self.parameters, self.betas, self.weight_decay)

    def _step(self, rows: list[dict[str, Any]], old: list[np.ndarray] | None, spec: UpdateSpec) -> dict[str, float]:
        picks_seen = sum(len(row["completion_ids"]) for row in rows)
        denominator = len(rows) * spec.constant_length if spec.constant_length else picks_seen
        self.optimizer.zero_grad(set_to_none=True)
        trunks = list(dict.fromkeys(row["trunk_id"] for row in rows))
        mine = set(trunks[self.rank :: self.world])
        chosen = [index for index, row in enumerate(rows) if row["trunk_id"] in mine]
        sums = dict.fromkeys(SUMS, 0.0)
        if chosen:
            share = [rows[index] for index in chosen]
            before = [old[index] for index in chosen] if old else None
            sums = self._backward(share, before, spec, denominator)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world > 1:
            total = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
            dist.all_reduce(total)
            sums = dict(zip(sums, total.tolist(), strict=True))
            for parameter in self.parameters:
                dist.all_reduce(parameter.grad)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        metrics = averages(sums, picks_seen, denominator) | {"grad_norm": norm}
        check_finite(metrics, self.version)
        self.optimizer.step()
        return metrics

    def _backward(
        self, rows: list[dict[str, Any]], old: list[np.ndarray] | None, spec: UpdateSpec, denominator: float
    ) -> dict[str, float]:
        """Adds the gradient of these samples; returns their sums of metrics.

        The outputs of all texts come first; then the loss and its gradient with regard to these outputs; then that of
        the encoder, pass by pass. What is more than `tokens_per_pass` is encoded anew for it and not held (GradCache:
        Gao et al., 2101.06983), so that a batch of any size needs the memory of one pass.
        """
        reference_T = self._reference_logprobs(rows, spec.temperature) if spec.kl else None
        questions, of_row = _questions(rows)
        texts = self.scorer.texts(questions)
        passes = self.scorer.passes(texts)
        is_held = sum(len(batch) * len(batch[0]) for batch in passes) <= self.scorer.tokens_per_pass
        held = [self.scorer(batch) for batch in passes] if is_held else []
        outputs = (torch.cat(held).detach() if held else self.scorer.encode(texts)).requires_grad_()
        picks = [row["completion_ids"] for row in rows]
        losses = []
        for dimensions in (0, *self.dimensions):
            logits = self.scorer.logits(questions, texts, outputs, dimensions)
            logprobs_T = log_probabilities(logits[of_row] / spec.temperature, picks)
            if dimensions:  # no engine draws by these: they are their own behavior, without a reference
                losses.append(_loss(rows, logprobs_T, None, None, spec, logprobs_T.detach())[0])
            else:
                loss, sums = _loss(rows, logprobs_T, old, reference_T, spec)
                losses.append(loss)
        (torch.stack(losses).mean() / denominator).backward()
        gradient, at = outputs.grad, 0
        assert gradient is not None
        for number, batch in enumerate(passes):
            again = held[number] if held else self.scorer(batch)
            torch.autograd.backward(again, gradient[at : at + len(batch)])
            at += len(batch)
        return sums

    @torch.no_grad()
    def _logprobs(self, rows: list[dict[str, Any]], temperature: float) -> list[np.ndarray]:
        questions, of_row = _questions(rows)
        texts = self.scorer.texts(questions)
        logits = self.scorer.logits(questions, texts, self.scorer.encode(texts))
        picks = [row["completion_ids"] for row in rows]
        found = log_probabilities(logits[of_row] / temperature, picks).cpu().numpy()
        return np.split(found, np.cumsum([len(of) for of in picks])[:-1])

    def _reference_logprobs(self, rows: list[dict[str, Any]], temperature: float) -> torch.Tensor:
        if self.reference is None:
            raise ValueError("KL asked for, but begin_stage kept no reference")
        now = self.flat.clone()
        with torch.no_grad():
            self.flat.copy_(self.reference)
        found = np.concatenate(self._logprobs(rows, temperature))
        with torch.no_grad():
            self.flat.copy_(now)
        return torch.from_numpy(found).to(self.device)


def _questions(rows: list[dict[str, Any]]) -> tuple[list[Question], torch.Tensor]:
    """The questions of samples once, and which of them each sample is of. One that was drawn again, with candidates of
    other questions, is another."""
    asked = [tuple(row["prompt_ids"]) for row in rows]
    index = {prompt: number for number, prompt in enumerate(dict.fromkeys(asked))}
    return [unpack(prompt) for prompt in index], torch.tensor([index[prompt] for prompt in asked])


def _loss(
    rows: list[dict[str, Any]],
    logprobs_T: torch.Tensor,
    old: list[np.ndarray] | None,
    reference_T: torch.Tensor | None,
    spec: UpdateSpec,
    behavior_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one batch, and its sums; `behavior_T` stands for what was recorded at sampling."""
    device = logprobs_T.device
    if behavior_T is None:
        recorded = np.concatenate([row["behavior_logprobs"] for row in rows])
        behavior_T = torch.tensor(recorded, device=device).float()
    drawn_T, now_T = ~behavior_T.isnan(), logprobs_T.detach()  # the rest are an expert's picks
    divergence = 0.0
    if spec.loss == "cross_entropy":
        result = cross_entropy_loss(logprobs_T)
    else:
        advantages_T = torch.tensor(
            np.repeat([row["advantage"] for row in rows], [len(row["completion_ids"]) for row in rows]), device=device
        ).float()
        old_T = now_T if old is None else torch.from_numpy(np.concatenate(old)).to(device)
        behavior_T = torch.where(drawn_T, behavior_T, old_T)
        result = policy_gradient_loss(logprobs_T, old_T, behavior_T, advantages_T, reference_T, spec)
        gap = (old_T - behavior_T).double()
        divergence = float((torch.expm1(gap) - gap).sum())
    return result.loss, {
        "loss": float(result.loss.detach()),
        "kl": float(result.kl),
        "clip_fraction": float(result.clipped),
        "entropy": float(-now_T[drawn_T].sum()),
        "divergence": divergence,
        "drawn": float(drawn_T.sum()),
    }
