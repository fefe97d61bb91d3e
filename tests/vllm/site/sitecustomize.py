"""Run by every Python that the tests start: declares what torchvision misses beside a CPU build of torch.

torchvision's wheel for Linux is built for CUDA: beside a CPU build of torch its operators cannot be loaded, and its
import fails because it describes two of them. Its transforms are plain Python and need none.
"""

import sys
from importlib.abc import MetaPathFinder


class Declaring(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            import torch

            sys.meta_path.remove(self)
            if not torch.version.cuda:
                self.library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sys.modules["torchvision_declared"] = self  # keeps the library
        return None


sys.meta_path.insert(0, Declaring())
