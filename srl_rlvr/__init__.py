"""Train small models on narrow jobs by Supervised Reinforcement Learning, then RL with Verifiable Rewards."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The clients, imported when they are asked for."""
    if name in ("Client", "AsyncClient", "ApiError", "NetworkError"):
        from srl_rlvr import client

        return getattr(client, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
