"""Scores of merged LoRAs on a list of pairs, as in the paper's Table 2, for those who have SDXL and reference pictures."""

# by hub id; DreamBooth (arXiv 2208.12242), whose metrics the ZipLoRA paper follows, names DINO's ViT-S/16 but no CLIP
CLIP = "openai/clip-vit-base-patch32"
DINO = "facebook/dino-vits16"

# recipe fields that the list of pairs, or the evaluation itself, decides
DECIDED = {"parents", "output", "method", "preview_prompt", "balance_points", "overwrite", "allow_same"}
