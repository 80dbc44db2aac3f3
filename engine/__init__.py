"""The engine: models, sampling, log-probabilities, memory, runs. It never reads a text."""
