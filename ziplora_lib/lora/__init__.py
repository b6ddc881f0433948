"""LoRA files, and what a LoRA adds to one layer."""
