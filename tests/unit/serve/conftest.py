from gateway_fixtures import address, ask, folders, replicas, settings

__all__ = ["address", "ask", "folders", "replicas", "settings"]
