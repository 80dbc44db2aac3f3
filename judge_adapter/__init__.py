"""The embedded judge's adapter: its weights, its card, and how it is trained and measured."""
