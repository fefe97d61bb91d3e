"""Training and evaluation of pruning policies: scripts and the pieces they share."""
