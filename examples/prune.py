"""Prune one prompt and look at what is left.

python examples/prune.py                                           # the embedded model, nothing is downloaded
python examples/prune.py Qwen/Qwen2.5-VL-3B-Instruct photo.jpg "What is on the table?"
"""

import sys
from pathlib import Path

from PIL import Image

from toprl_models import FastV, attach, schedule_for
from toprl_models.processors import encode
from toprl_models.show import load

SCENE = Path(__file__).parents[1] / "docs/scene.png"
name, path, question = sys.argv[1:] or ("tiny", SCENE, "which digit is in the picture ?")

model, processor = load(name)
inputs = encode(processor, [Image.open(path).convert("RGB")], question, model)
schedule = schedule_for(model, "fastv", keep=0.4)  # a share of the visual tokens, averaged over all layers
with attach(model, FastV(), schedule=schedule) as pruner:
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)

print("answer:", processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
for stage in pruner.trace:
    print(f"before layer {stage.layer}: {stage.counts[0]} of {stage.num_visual[0]} visual tokens")
