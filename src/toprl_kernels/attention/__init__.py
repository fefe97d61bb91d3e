"""Attention under a per-token keep mask (Eqs. 6-7)."""
