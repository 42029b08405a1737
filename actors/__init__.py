"""The long-lived Ray actors: thin shells that hold state and move Tables. The maths is in `srl_rlvr`."""
