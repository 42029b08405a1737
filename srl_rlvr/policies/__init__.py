"""What is learned: losses, advantages and the models they move. Torch only; knows neither Ray nor rewards' origin."""
