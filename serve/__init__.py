"""What was trained, over HTTP, on Ray Serve: `app` deploys, `gateway` answers requests, `replicas` hold the models."""
