"""Write a pruning method: one class, one function.

python examples/own_method.py
python -m toprl_models.show tiny docs/scene.png "which digit is in the picture ?" --method examples/own_method.py:Middle
"""

from pathlib import Path

import torch
from PIL import Image

from toprl_models import Policy, Schedule, StageContext, attach, tiny


class Middle(Policy):
    """Keep the tokens that are nearest to the middle of a square image."""

    uses_text = False  # reads the visual tokens alone

    def score(self, context: StageContext) -> torch.Tensor:
        """Score by the distance from the middle: [B, V], the larger the more worth keeping."""
        side = int(max(context.num_visual) ** 0.5)
        row, column = context.visual_index // side, context.visual_index % side
        middle = (side - 1) / 2
        return -((row - middle) ** 2 + (column - middle) ** 2)


if __name__ == "__main__":
    model, processor = tiny.load()
    image = Image.open(Path(__file__).parents[1] / "docs/scene.png")
    inputs = processor(images=image, text=tiny.prompt("which digit is in the picture ?"), return_tensors="pt")
    with attach(model, Middle(), schedule=Schedule(((1, 0.5), (3, 4)))) as pruner:
        model.generate(**inputs, max_new_tokens=2)
    print("kept at last:", pruner.trace[-1].indices[0].tolist())  # rows 3 and 4, columns 3 and 4 of 8 x 8
