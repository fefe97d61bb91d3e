"""What the rows of the tables are: a sentence for each method, and where its paper is."""

from __future__ import annotations

from urllib.parse import quote_plus

from toprl_models import METHODS as REGISTERED

TITLE = "TOP-RL: Task-Optimized Progressive Token Pruning with Reinforcement Learning for Large Vision Language Models"
# the paper has no address that this project knows, so that its title is looked up
ADDRESS = "https://scholar.google.com/scholar?q=" + quote_plus(TITLE)
PAPER = f'The paper: Wang et al., <a href="{ADDRESS}">{TITLE}</a>.'
LINKS = {
    "toprl": ADDRESS,
    "fastv_progressive": ADDRESS,
    "oneshot": ADDRESS,
    "downsample": "https://arxiv.org/abs/2511.02650",
    "fastv": "https://arxiv.org/abs/2403.06764",
    "pyramiddrop": "https://arxiv.org/abs/2410.17247",
    "sparsevlm": "https://arxiv.org/abs/2410.04417",
    "visionzip": "https://arxiv.org/abs/2412.04467",
    "fastervlm": "https://arxiv.org/abs/2412.01818",
    "divprune": "https://arxiv.org/abs/2503.02175",
}
EXPLAINED = {
    "full": "Every layer sees all visual tokens. The reference.",
    "toprl": "A small actor, trained with PPO on this kind of questions, keeps the tokens that it finds most likely to "
    "be needed, as many as the schedule says. It does not see the question.",
    "random": "Keeps tokens drawn at random: what any method must beat.",
    "untrained": "The same actor before training.",
    "argmax": "The trained actor without a schedule: each stage keeps the tokens that it finds more likely kept than "
    "dropped, however many these are.",
}


def explanation(method: str) -> str:
    """Say in a sentence what a row of the table is: the first of the policy's docstring, or that of EXPLAINED."""
    if method in EXPLAINED or method not in REGISTERED:
        return EXPLAINED.get(method, "")
    return " ".join((REGISTERED[method].policy.__doc__ or "").partition("\n\n")[0].split())
