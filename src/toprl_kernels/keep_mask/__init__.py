"""Sampling a keep mask from the actor's logits (Gumbel-softmax) and its log-probability."""
