"""The peer of `serving.py`: FastAPI and sentence-transformers in one process, as one would write it in an afternoon.

python _plain_server.py MODEL PORT
"""

from __future__ import annotations

import asyncio
import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer


class Asked(BaseModel):
    model: str = ""
    input: list[str]


def main() -> None:
    model, turn = SentenceTransformer(sys.argv[1], device="cpu"), asyncio.Lock()
    app = FastAPI()

    @app.post("/v1/embeddings")
    async def embeddings(asked: Asked) -> dict[str, object]:
        async with turn:  # one at a time, each with all cores
            vectors = await asyncio.to_thread(model.encode, asked.input, show_progress_bar=False)
        return {"data": [{"index": n, "embedding": vector.tolist()} for n, vector in enumerate(vectors)]}

    uvicorn.run(app, port=int(sys.argv[2]), log_level="error")


if __name__ == "__main__":
    main()
