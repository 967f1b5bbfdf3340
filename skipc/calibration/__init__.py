"""Measuring a model: quality, and what each site costs and changes."""
