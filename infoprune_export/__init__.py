"""Compress the vision encoder of a Hugging Face vision-language model, export it, and prove it equal enough."""

__version__ = "0.1.0"
