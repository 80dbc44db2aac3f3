"""Evaluation: benchmarks, checkpoints and attackers, cross-play, scores, tables, the report."""
