"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) of a model: reading, checking, merging."""
