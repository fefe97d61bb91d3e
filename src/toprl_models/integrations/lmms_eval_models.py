"""lmms-eval's own models with a pruner attached. Only lmms-eval imports this module (see ``lmms_eval.py``)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from PIL.Image import Image
    from transformers import BatchFeature, ProcessorMixin


class _GenerationFailed(BaseException):
    """Carrier of an exception through ``except Exception``, which would turn it into an empty answer."""


class _Pruned(lmms):
    """Addition to a model of lmms-eval.

    Args:
        pretrained: folder or Hub id of the model.
        kwargs: the arguments of ``PruningArguments`` and of the model.

    Raises:
        ValueError, TypeError: pruning arguments that make no sense or do not fit the model, before it is loaded.
    """

    def __init__(self, pretrained: str, **kwargs: Any) -> None:
        pruning = PruningArguments.take_from(kwargs)
        config = AutoConfig.from_pretrained(pretrained, revision=kwargs.get("revision", "main"))
        policy, schedule = pruning.prepare(config)
        super().__init__(pretrained=pretrained, **kwargs)
        for trained in trained_parts(policy):
            trained.to(self.model.device)
        self.pruner = attach(self.model, policy, schedule=schedule)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate answers; ``throughput`` of lmms-eval's results gets the visual tokens that the answers cost.

        Raises:
            Exception: whatever a generation raised, at once.
        """
        with _watch(self.pruner) as prompts:
            answers = super().generate_until(requests)
        if prompts:
            before, after = (statistics.fmean(column) for column in zip(*prompts, strict=True))
            metrics = {"visual_tokens": before, "visual_tokens_over_layers": after}
            log_metrics(total_elapsed_time=0.0, total_gen_tokens=0, avg_speed=0.0, additional_metrics=metrics)
        return answers

    def clean(self) -> None:
        """Free the model after an evaluation, when lmms-eval calls this method."""
        self.pruner.detach()
        del self.pruner
        super().clean()


class _PrunedLlava(_Pruned):
    """Addition to lmms-eval's LLaVA."""

    _image_processor: ProcessorMixin | _WithImages

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return each answer's loss and whether decoding would give this answer; the policy does not see it."""
        processor, self._image_processor = self._image_processor, _WithImages(self._image_processor)
        try:
            return super().loglikelihood(requests)
        finally:
            self._image_processor = processor


class _WithImages:
    """Processor that gives a text without images those of the text before.

    lmms-eval measures the question alone, to know where the answer begins, and processes the question without images.
    That is an error in processors of transformers 5.23; earlier ones left out all placeholders but the first.
    """

    def __init__(self, processor: ProcessorMixin | _WithImages) -> None:
        self._processor = processor
        self._images: list[Image] | None = None

    def __call__(self, *, images: list[Image] | None = None, **kwargs: Any) -> BatchFeature:
        self._images = self._images if images is None else images
        return self._processor(images=self._images, **kwargs)


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
    """Note each prompt of the model's ``generate()`` within this context, and let exceptions through.

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
