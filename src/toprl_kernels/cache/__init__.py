"""Gathering the kept tokens' keys and values of an existing cache."""
