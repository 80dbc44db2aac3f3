"""The game's texts and turns: prompts, parsing, seeds, replay, monitoring. No tensor of a model."""
