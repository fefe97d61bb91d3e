"""Evaluation: methods by name, resumable records of every sample, statistics, tables (docs/evaluation.md)."""
