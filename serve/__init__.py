"""What was trained, over HTTP, on Ray Serve: `app` deploys, `gateway` answers requests, `replicas` hold the models."""

import os

ENVIRONMENT = {
    # Requests go from the gateway to the replicas over gRPC: an actor call adds nearly twice as much. Ray Serve
    # reads it when it is imported, and only where requests are sent.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Bytes of one message, which a replica reads for requests and the gateway for answers; gRPC's own 4 MiB are less
    # than the limits of SERVE.toml. `config` holds the limits to it.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(512 * 2**20),
    # An idle Ray with its default of 0.1 s, and with the history of tasks that only its dashboard shows, takes a third
    # more of a core's time from the models. Both are read where a Ray of our own starts.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_task_events_report_interval_ms": "0",
}

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
