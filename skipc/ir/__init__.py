"""Plain data that every other part of skipc speaks: sites, plans, programs, configuration, errors.

Nothing in here imports the rest of skipc, runs ``torch.compile``, or holds a tensor.
"""
