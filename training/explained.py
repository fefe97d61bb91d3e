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
    "cdpruner": "https://arxiv.org/abs/2506.10967",
    "vispruner": "https://arxiv.org/abs/2412.01818",
    "holov": "https://arxiv.org/abs/2510.02912",
    "prumerge_plus": "https://arxiv.org/abs/2403.15388",
    "hiprune": "https://arxiv.org/abs/2508.00553",
    "gprune": "https://arxiv.org/abs/2501.02268",
    "vscan": "https://arxiv.org/abs/2505.22654",
    "tome": "https://arxiv.org/abs/2210.09461",
    "dart": "https://arxiv.org/abs/2502.11494",
    "fitprune": "https://arxiv.org/abs/2409.10197",
    "evs": "https://arxiv.org/abs/2510.14624",
    "vidcom2": "https://arxiv.org/abs/2505.14454",
    "dycoke": "https://arxiv.org/abs/2411.15024",
    "fastvid": "https://arxiv.org/abs/2503.11187",
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
