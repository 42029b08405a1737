"""Where runs and models are recorded. It is handed numbers and paths; it must not know how they came about."""
