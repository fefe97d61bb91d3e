"""Broken pruners turn tests red: each mutation is one that a plausible slip would make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import flash_stand_in, test_attention_backends, test_cost, test_families
from tests.models.agreement import MIXED, assert_agreement, model_of, schedule_of
from tests.models.tiny_families import build_inputs
from toprl_models.runtime import cache, compact, hooks, prompt, shortened, state

Break = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[str], Any]


def agreement(family: str) -> None:
    assert_agreement(model_of(family), build_inputs(family, MIXED), schedule_of(family))


def overtaken(family: str) -> None:
    test_families.test_drop_all_and_keep_one(family, test_families.OVERTAKEN, (0,))


def by_hand(family: str) -> None:
    test_families.test_both_modes_are_transformers_own_attention_without_the_dropped_keys(family, "left")


def flash(family: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_attention_backends.test_flash_without_a_cache(family, flash_stand_in.install(patch))


def flex(family: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        test_attention_backends.test_flex_without_a_cache(family)


def waits(family: str) -> None:
    test_cost.test_an_unpadded_batch_that_becomes_ragged_waits_once(family)


def waits_in_mask_mode(family: str) -> None:
    test_cost.test_a_prefill_waits_once_and_its_stages_never(family, MIXED, "mask")


def renumbered_positions(patch: pytest.MonkeyPatch) -> None:
    prune_stage = compact.prune_stage
    patch.setattr(compact, "prune_stage", lambda *args, **options: prune_stage(*args, **options | {"origins": None}))


def gapped_positions_reach_the_layers(patch: pytest.MonkeyPatch) -> None:
    before_layer = compact.Compact.before_layer

    def leaves_positions(
        self: Any, forward: Any, number: int, index: int, states: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        changed = before_layer(self, forward, number, index, states, kwargs)
        return {**changed, "position_ids": 2 * torch.arange(states.shape[1])[None]}

    patch.setattr(compact.Compact, "before_layer", leaves_positions)


def change_keys(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change what the mask of a shortened sequence is picked by."""
    picked_mask = shortened.picked_mask
    patch.setattr(
        shortened,
        "picked_mask",
        lambda original, slots, keys, states: picked_mask(original, slots, replace(keys, **changes), states),
    )


def columns_are_counted_in_the_short_sequence(patch: pytest.MonkeyPatch) -> None:
    change_keys(patch, origins=lambda: None)


def no_modality_gate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prompt.VisualIds, "brought", lambda self, kwargs: self.images + self.videos)


def fillers_of_short_rows_are_keys(patch: pytest.MonkeyPatch) -> None:
    change_keys(patch, valid=None)


def decoding_forgets_the_fillers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache, "extend_mask", lambda stored, new, past, states: new)


def one_layer_late_in_both_modes(patch: pytest.MonkeyPatch) -> None:
    init = hooks._LayerHook.__init__

    def second_stage_late(self: Any, runtime: Any, index: int) -> None:
        init(self, runtime, index)
        late = runtime.schedule.layers[1]
        runtime._stage_at = {
            layer + (layer == late): stage for layer, stage in zip(runtime.schedule.layers, runtime.stages, strict=True)
        }
        self.number -= index == late

    patch.setattr(hooks._LayerHook, "__init__", second_stage_late)


def dropped_tokens_do_not_see_themselves(patch: pytest.MonkeyPatch) -> None:
    """Eq. 7 without its "or i = j"."""
    from tests.models import agreement as module

    patch.setattr(module.torch, "eye", lambda n, **options: torch.zeros(n, n, **options))


def masks_are_checked_for_padding(patch: pytest.MonkeyPatch) -> None:
    def rebuild_mask(config: Any, states: Tensor, valid: Tensor | None, view: Any) -> Any:
        from transformers.masking_utils import create_causal_mask

        return create_causal_mask(config, states, valid, view)

    patch.setattr(shortened, "rebuild_mask", rebuild_mask)


def numbers_are_copied_in_time(patch: pytest.MonkeyPatch) -> None:
    for module in (compact, prompt, state):
        patch.setattr(module, "on_device", lambda numbers, device: torch.tensor(numbers, device=device))


@pytest.mark.parametrize(
    ("break_it", "check"),
    [
        (renumbered_positions, agreement),
        (renumbered_positions, test_families.test_survivors_keep_their_positions),
        (gapped_positions_reach_the_layers, flash),
        (gapped_positions_reach_the_layers, test_families.test_survivors_keep_their_positions),
        # earlier releases do not show this slip
        pytest.param(columns_are_counted_in_the_short_sequence, flex, marks=pytest.mark.since("5.23")),
        (no_modality_gate, test_families.test_a_generated_image_id_prunes_nothing),
        (fillers_of_short_rows_are_keys, overtaken),
        (decoding_forgets_the_fillers, overtaken),
        (one_layer_late_in_both_modes, by_hand),
        (dropped_tokens_do_not_see_themselves, by_hand),
        (masks_are_checked_for_padding, waits),
        (numbers_are_copied_in_time, waits),
        (numbers_are_copied_in_time, waits_in_mask_mode),
    ],
    ids=lambda function: function.__name__,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_broken_pruner_is_found(family: str, break_it: Break, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    if check is flex and family == "qwen2_5_vl":
        family = "internvl"  # transformers has no flex attention for the Qwen models
    check(family)
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check(family)
