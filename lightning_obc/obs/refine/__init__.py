"""Beyond greedy: local search on codes and masks, as deep for each row as the other half of the samples agrees."""

from lightning_obc.obs.refine.layer import GreedyCodes, GreedyMask, refine_codes, refine_mask

__all__ = ["GreedyCodes", "GreedyMask", "refine_codes", "refine_mask"]
