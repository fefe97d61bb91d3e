"""Give several methods the same budget and compare their answers and their cost.

python examples/compare_methods.py
"""

from pathlib import Path

from PIL import Image

from toprl_models import Schedule, tiny
from toprl_models.processors import encode
from toprl_models.show import answer, prepare

KEEP = 0.4
QUESTION = "which digit is in the picture ?"

model, processor = tiny.load()
image = Image.open(Path(__file__).parents[1] / "docs/scene.png").convert("RGB")
inputs = encode(processor, [image], QUESTION, model)
config = model.config.get_text_config()

print(f"{'full':18} answer {answer(model, processor, inputs, 2).text!r}")
whole = Schedule(((0, 1.0),)).macs(tiny.NUM_VISUAL_TOKENS, config)
for method in ("fastv", "pyramiddrop", "divprune", "random", "divprune+fastv"):
    policy, schedule = prepare(model, method, KEEP)
    found = answer(model, processor, inputs, 2, (policy, schedule))
    share = schedule.macs(tiny.NUM_VISUAL_TOKENS, config) / whole
    counts = ", ".join(f"{stage.counts[0]} before layer {stage.layer}" for stage in found.trace)
    print(f"{method:18} answer {found.text!r}: {counts}; {share:.0%} of the decoder's multiply-adds on visual tokens")
