"""What is learned: losses, advantages and the models they move. Torch only; knows nothing of Ray or of rewards' origin."""
