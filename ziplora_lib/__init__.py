"""ZipLoRA: merge a subject LoRA and a style LoRA into one ordinary LoRA (arXiv 2311.13600)."""

__version__ = "0.1.0"
