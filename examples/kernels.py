"""Use the kernels without any model: on CUDA tensors the Triton kernels run, elsewhere plain PyTorch.

python examples/kernels.py
"""

import torch

from toprl_kernels import compact_cache, explain, masked_attention, topk_compact

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# attention in which keep_mask says how much of each key is seen (Eqs. 6-7), with gradients to all four
query, key, value = torch.randn(3, 2, 8, 100, 64, device=device).unbind(0)  # [B, H, N, D]
keep_mask = torch.rand(2, 100, device=device, requires_grad=True)
masked_attention(query, key, value, keep_mask, is_causal=True).sum().backward()
print("gradient of the keep mask:", tuple(keep_mask.grad.shape))

# the 10 best of 100 tokens in their order, and the same selection in cached keys and values
states, scores = torch.randn(2, 100, 512, device=device), torch.rand(2, 100, device=device)
kept = topk_compact(states, scores, 10)
keys, values = compact_cache(key, value, kept.indices)
print("kept:", tuple(kept.hidden_states.shape), "cache:", tuple(keys.shape), kept.indices[0].tolist())
print(explain())
