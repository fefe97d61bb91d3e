"""A pruning stage: selection by score and the gather of all that travels with the tokens."""
