"""Lossless speculation: something cheap drafts tokens, the full model judges them all in one call."""
