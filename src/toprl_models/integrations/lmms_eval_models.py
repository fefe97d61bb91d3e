"""lmms-eval's own models with a pruner attached. Only lmms-eval imports this module (see ``lmms_eval.py``)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.chat.llava_hf import LlavaHf as PlainLlavaHfChat
from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL as PlainQwen2_5_VLChat
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.simple.llava_hf import LlavaHf as PlainLlavaHf
from lmms_eval.models.simple.qwen2_5_vl import Qwen2_5_VL as PlainQwen2_5_VL
from transformers import AutoConfig

from toprl_models.integrations.lmms_eval import PruningArguments, trained_parts
from toprl_models.pruner import Pruner, attach
from toprl_models.schedule import Schedule


class _GenerationFailed(BaseException):
    """Carries an exception through ``except Exception``, which would make an empty answer of it."""


class _Pruned(lmms):
    """What is added to a model of lmms-eval.

    Args:
        pretrained: folder or Hub id of the model.
        arguments: those of ``PruningArguments``, and those of the model that is pruned.

    Raises:
        ValueError, TypeError: pruning arguments that make no sense or do not fit the model, before it is loaded.
    """

    def __init__(self, pretrained: str, **arguments: Any) -> None:
        pruning = PruningArguments.take_from(arguments)
        config = AutoConfig.from_pretrained(pretrained, revision=arguments.get("revision", "main"))
        policy, schedule = pruning.prepare(config)
        super().__init__(pretrained=pretrained, **arguments)
        for trained in trained_parts(policy):
            trained.to(self.model.device)
        self.pruner = attach(self.model, policy, schedule=schedule)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """The model's answers. ``throughput`` of lmms-eval's results gets the visual tokens that they have cost.

        Raises:
            Exception: whatever a generation raised, at once.
        """
        with _watch(self.pruner) as prompts:
            answers = super().generate_until(requests)
        if prompts:
            before, after = (statistics.fmean(column) for column in zip(*prompts, strict=True))
            found = {"visual_tokens": before, "visual_tokens_over_layers": after}
            log_metrics(total_elapsed_time=0.0, total_gen_tokens=0, avg_speed=0.0, additional_metrics=found)
        return answers

    def clean(self) -> None:
        """lmms-eval calls it after an evaluation, to free the model."""
        self.pruner.detach()
        del self.pruner
        super().clean()


class _PrunedLlava(_Pruned):
    """What is added to lmms-eval's LLaVA."""

    _image_processor: Any

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Return the loss of each answer and whether it is the greedy one; the policy does not see the answer."""
        processor, self._image_processor = self._image_processor, _WithImages(self._image_processor)
        try:
            return super().loglikelihood(requests)
        finally:
            self._image_processor = processor


class _WithImages:
    """A processor that gives a text without images those of the text before it.

    lmms-eval measures the question alone, to know where the answer begins, and processes it without its images. That is
    an error in processors of transformers 5.23; before, it was too short by all placeholders but one.
    """

    def __init__(self, processor: Any) -> None:
        self._processor, self._images = processor, None

    def __call__(self, *, images: Any = None, **arguments: Any) -> Any:
        self._images = self._images if images is None else images
        return self._processor(images=self._images, **arguments)


class LlavaHf(_PrunedLlava, PlainLlavaHf):
    """LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""


class LlavaHfChat(_PrunedLlava, PlainLlavaHfChat):
    """LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision, asked in the processor's chat template."""


class Qwen2_5_VL(_Pruned, PlainQwen2_5_VL):
    """Qwen2.5-VL."""


class Qwen2_5_VLChat(_Pruned, PlainQwen2_5_VLChat):
    """Qwen2.5-VL, asked in the processor's chat template."""


@contextmanager
def _watch(pruner: Pruner) -> Iterator[list[tuple[int, float]]]:
    """Within, ``generate()`` of the pruner's model notes each prompt, and its exceptions come through.

    Yields:
        One pair for each prompt with an image: its visual tokens, and what is left of them averaged over all layers.
    """
    model, generate = pruner.model, pruner.model.generate
    earlier = vars(model).get("generate")  # what was set on this instance already
    prompts: list[tuple[int, float]] = []
    failure: BaseException | None = None

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            output = generate(*args, **kwargs)
        except Exception as error:
            raise _GenerationFailed from error
        prompts.extend(_visual_tokens(pruner))
        return output

    model.generate = watched
    try:
        yield prompts
    except _GenerationFailed as carrier:
        failure = carrier.__cause__
    finally:
        del model.generate
        if earlier is not None:
            model.generate = earlier
    if failure is not None:
        raise failure


def _visual_tokens(pruner: Pruner) -> list[tuple[int, float]]:
    if not pruner.trace:
        return []
    num_layers = pruner.model.config.get_text_config().num_hidden_layers
    kept = zip(*(stage.counts for stage in pruner.trace), strict=True)
    return [
        (before, Schedule(tuple(zip(pruner.schedule.layers, counts, strict=True))).average_tokens(before, num_layers))
        for before, counts in zip(pruner.trace[0].num_visual, kept, strict=True)
    ]
