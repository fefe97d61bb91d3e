"""The paper's tables and figures as analyses that run on any model; ``training/reproduce.py`` is their command."""
