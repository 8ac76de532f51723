"""Before a run: what it will hold, how long it will take, which method and card to choose, and on what evidence.

Nothing here needs triton, a GPU or a compiler; nothing imports torch.
"""

from fastlora.planner.estimate import Estimate, forecast

__all__ = ["Estimate", "forecast"]
