"""Exact, order-preserving top-k selection of tokens with compaction."""
