"""The embedded model: a real but tiny LLaVA that answers questions about 128x128 scenes on a laptop.

It is a plain ``LlavaForConditionalGeneration`` (CLIP vision tower, two-layer projector, Llama decoder) with a
word-level tokenizer and LLaVA's own processor; only the sizes are small. 128x128 pixels in patches of 16 give 64
visual tokens. The checkpoint ships with the package and is reproduced by ``training/pretrain_tiny.py``.

Example:
    >>> from toprl_models import tiny
    >>> model, processor = tiny.load()
    >>> inputs = processor(images=image, text=tiny.prompt("which digit is in the picture ?"), return_tensors="pt")
    >>> processor.decode(model.generate(**inputs, max_new_tokens=2)[0, -2:], skip_special_tokens=True)
    '7'
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

CHECKPOINT = Path(__file__).parent / "tiny_llava"
IMAGE_SIZE = 128
PATCH_SIZE = 16
NUM_VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
HIDDEN_SIZE = 128
NUM_LAYERS = 6

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, IMAGE)
# The last word of every prompt: the answer is the word after it.
ANSWER = "answer"

CHAT_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}answer{% endif %}"
)


def prompt(question: str) -> str:
    """Make the prompt of a question about one image."""
    return f"{IMAGE} {question} {ANSWER}"


def build_model(vocab_size: int, seed: int = 0) -> LlavaForConditionalGeneration:
    """Build a tiny LLaVA with random float32 weights, in eval mode; the weights depend on ``seed`` alone."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=352,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        # transformers' 0.02 is made for widths of thousands; at this width it starves the residual stream
        initializer_range=0.08,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL_TOKENS.index(IMAGE),
        image_seq_length=NUM_VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).eval()


def build_processor(words: list[str]) -> LlavaProcessor:
    """Build LLaVA's processor with a word-level tokenizer of ``words``, special tokens and the answer word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate([*SPECIAL_TOKENS, ANSWER, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE},
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, dropped again by the "default" strategy
        chat_template=CHAT_TEMPLATE,
    )


def load(
    folder: str | Path = CHECKPOINT, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the shipped model (eval mode, parameters frozen) and its processor; nothing is downloaded.

    Args:
        folder: a folder written by ``training/pretrain_tiny.py``; the shipped checkpoint by default.
        device: where the model goes.
        dtype: the weights' type; they are stored in float16.

    Raises:
        FileNotFoundError: ``folder`` holds no checkpoint.
    """
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    if not (Path(folder) / "model.safetensors").is_file():
        raise FileNotFoundError(f"folder={str(folder)!r} holds no model.safetensors; run training/pretrain_tiny.py")
    model = LlavaForConditionalGeneration.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    model.requires_grad_(False)
    return model.to(device).eval(), LlavaProcessor.from_pretrained(str(folder), local_files_only=True)
