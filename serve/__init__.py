"""What was trained, over HTTP, on Ray Serve: `app` deploys, `gateway` answers requests, `replicas` hold the models."""

import os

# Requests go from the gateway to the replicas over gRPC: an actor call adds nearly twice as much. Ray Serve reads it
# when it is imported, and only where requests are sent.
ENVIRONMENT = {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
