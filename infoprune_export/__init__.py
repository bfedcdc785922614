"""Compress the vision encoder of a Hugging Face vision-language model, export it, and prove it equal enough."""

from infoprune_export._registration import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
