"""The selection: a project's policy decides which features of each image stay, as at a stage before layer 0."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from toprl_models.integrations.vllm.options import PruningOptions
from toprl_models.methods._tower import TowerPolicy
from toprl_models.methods.toprl import TopRLPolicy
from toprl_models.policy import Policy, StageContext
from toprl_models.runtime.compact import top_mask
from toprl_models.runtime.stage import check_decision

logger = logging.getLogger("vllm.toprl")


class ImagePruning:
    """Choice of the features that stay, and counters of what it did.

    Args:
        policy: from ``PruningOptions.prepare``.
        options: how much stays.
        hidden_size: width of the language model; what a feature has beyond it follows along.
    """

    def __init__(self, policy: Policy, options: PruningOptions, hidden_size: int) -> None:
        self.policy, self.options, self.hidden_size = policy, options, hidden_size
        self.images = self.seen = self.kept = 0
        # a policy that draws does so for each image anew: images are cached, and their order is the scheduler's
        generator = getattr(policy, "generator", None)
        self._drawn_from = None if generator is None else generator.get_state()

    def prepare(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Bring the policy to the model: weights to its device, hooks into its tower."""
        inner = getattr(self.policy, "policy", self.policy)
        if isinstance(inner, nn.Module):
            inner.to(device).eval()
        if isinstance(inner, TopRLPolicy):
            inner.fold(dtype, 0)
        if isinstance(inner, TowerPolicy):
            from toprl_models.integrations.vllm.tower import TowerReader

            inner._reader = TowerReader(model)

    @torch.no_grad()
    def __call__(self, features: Sequence[Tensor], inputs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Prune the ``features`` [n, D] of each image, encoded together from ``inputs``.

        Returns:
            For each image what stays, ``[k, D]``, and its raster numbers, int64 ``[k]``, ascending.

        Raises:
            ValueError: the policy keeps another number of tokens than the prompt has placeholders.
        """
        if self._drawn_from is None:
            chosen = self._decide(features, inputs)
        else:
            chosen = [pair for each in features for pair in self._redrawn(each, inputs)]
        self._count(features, chosen)
        return chosen

    def _redrawn(self, features: Tensor, inputs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        self.policy.generator.set_state(self._drawn_from)  # type: ignore[attr-defined]
        return self._decide([features], inputs)

    def _decide(self, features: Sequence[Tensor], inputs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        context = self.context(features, inputs)
        decision = self.policy.decide(context)
        check_decision(self.policy, decision, context)
        if decision.keep_mask is not None:
            raise ValueError(
                f"policy {type(self.policy).__name__} chooses how many tokens it keeps, but vLLM counts an image's "
                "tokens before it is encoded: use a policy that takes the top-k of its scores"
            )
        keep = top_mask(decision.scores, context.valid_mask, context.num_keep)
        chosen = []
        for row, (each, count) in enumerate(zip(features, context.num_keep, strict=True)):
            index = keep[row, : len(each)].nonzero()[:, 0]
            if decision.states is not None and count < len(each):
                states = decision.states[row, : len(each)].to(each.dtype)
                each = torch.cat([states, each[:, self.hidden_size :]], -1)
            chosen.append((each[index], index))
        return chosen

    def context(self, features: Sequence[Tensor], inputs: Mapping[str, Any]) -> StageContext:
        """Show the policy what it would see at a stage before layer 0, each image as a prompt of its own."""
        states = pad_sequence([each[:, : self.hidden_size] for each in features], batch_first=True)
        batch, width = states.shape[:2]
        counts = tuple(map(len, features))
        places = torch.arange(width, device=states.device).expand(batch, -1)
        valid = places < torch.tensor(counts, device=states.device)[:, None]
        return StageContext(
            stage=0,
            layer=0,
            hidden_states=states,
            valid_mask=valid,
            visual_index=places.masked_fill(~valid, -1),
            num_visual=counts,
            num_keep=tuple(map(self.options.count, counts)),
            # there is no text yet: a policy that claims to be blind to it, and reads it, gets NaN
            text_state=states.new_full((batch, states.shape[2]), torch.nan),
            last_attention=_no_prompt,
            text_attention=_no_prompt,
            prompt=_no_prompt,
            inputs=inputs,
            text_states=_no_prompt,
            sequence=states,
            slots=places.masked_fill(~valid, 0),
        )

    def _count(self, features: Sequence[Tensor], chosen: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Count, and log whenever the number of images has doubled."""
        before = self.images
        self.images += len(features)
        self.seen += sum(map(len, features))
        self.kept += sum(len(index) for _, index in chosen)
        if before.bit_length() < self.images.bit_length():
            logger.info("toprl: %d images encoded, %d of %d visual tokens kept", self.images, self.kept, self.seen)


def _no_prompt() -> NoReturn:
    raise RuntimeError("images are encoded apart from their prompt: a policy can read neither text nor attention here")
