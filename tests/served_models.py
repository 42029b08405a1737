"""Tiny models of all seven types in the folders that `srl-rlvr train` writes, their cards too. Random weights."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROUTER = {"labels": {"card": "where is my card", "rate": "exchange rates", "fee": "fees and charges"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "year": {"type": "integer"}}}


def write(folder: Path, tiny_model: Path, tiny_encoder: Path) -> dict[str, Path]:
    """The folder of each type, by type."""
    from sentence_transformers import CrossEncoder

    from srl_rlvr import vision_base

    found: dict[str, Path] = {}

    def place(model_type: str, source: Path | None, **card: Any) -> Path:
        found[model_type] = folder / model_type
        if source is not None:
            shutil.copytree(source, found[model_type])
        lengths = {"max_context": 512, "max_tokens": 12}
        text = json.dumps({"name": model_type, "model_type": model_type, **lengths, **card})
        (found[model_type] / "model_card.json").write_text(text)
        return found[model_type]

    place("embeddings", tiny_encoder, max_context=64)
    place("intent_router", tiny_encoder, max_context=64, **ROUTER)
    bert = tiny_encoder.with_name(f"{tiny_encoder.name}-bert")
    CrossEncoder(str(bert), num_labels=1, device="cpu").save_pretrained(str(folder / "reranker"))
    place("reranker", None, max_context=64)
    place("task_llm", tiny_model)
    place("srl_parser", tiny_model)
    place("extractor", tiny_model, schema=SCHEMA)
    vision_base.build(folder / "multimodal_vision", texts=["one two", "yes no"], image_size=32, width=32, layers=1)
    place("multimodal_vision", None, question="what is it?", verifier="exact", metadata={"labels": ["one", "two"]})
    return found


def write_adapted(folder: Path, tiny_model: Path, count: int) -> dict[str, Path]:
    """Task models with adapters of the tiny model, as training saves them: merged, and beside the weights."""
    import torch

    from srl_rlvr.policies.text import TextPolicy

    found = {}
    for number in range(count):
        name = f"adapted-{number}"
        policy = TextPolicy(tiny_model, lora_rank=(4, 8)[number % 2], lora_alpha=8)
        torch.manual_seed(number)
        with torch.no_grad():
            for key, parameter in policy.network.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.3)
        found[name] = folder / name
        shutil.copytree(tiny_model, found[name])
        policy.save_model(found[name], {"name": name, "base": "tiny", "max_context": 512, "max_tokens": 12})
    return found


def alone(name: str, folder: Path, asked: list[str]) -> list[str]:
    """What our own engine writes with the merged model."""
    from serve.config import ModelEntry
    from serve.replicas import PlainWriter

    writer = PlainWriter(ModelEntry(path=str(folder), name=name))
    how = {"model": name, "temperature": 0, "max_tokens": 12, "request_id": "1"}
    found = [asyncio.run(writer.chat({"messages": [{"role": "user", "content": text}], **how})) for text in asked]
    return [each["choices"][0]["message"]["content"] for each in found]


if __name__ == "__main__":  # python served_models.py FOLDER TINY_MODEL COUNT TEXT…: in a process of its own
    where, tiny, many, *texts = sys.argv[1:]
    adapted = write_adapted(Path(where), Path(tiny), int(many))
    print(json.dumps({name: alone(name, folder, texts) for name, folder in adapted.items()}))
