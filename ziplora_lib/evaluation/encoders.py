"""CLIP and DINO, by hub id or folder, and the scores that they give: cosines of their embeddings.

As in DreamBooth (arXiv 2208.12242), whose metrics the ZipLoRA paper follows: a picture's score against several references
is the mean of its cosines to each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from ziplora_lib.errors import BadInput
from ziplora_lib.evaluation import CLIP, DINO


class _Encoder:
    """A model that sees pictures."""

    def __init__(self, name: str, device: torch.device | str, remedy: str):
        self.name, self.device = name, device
        self.model, self.processor = _loaded(name, device, remedy)

    def public(self) -> dict:
        """As JSON: its name, and on the hub the commit."""
        return {"name": self.name, "revision": getattr(self.model.config, "_commit_hash", None)}


class Clip(_Encoder):
    """CLIP's embeddings, of length 1, on the CPU. Raises BadInput for what is no CLIP."""

    def __init__(self, name: str = CLIP, device: torch.device | str = "cpu"):
        remedy = f"Give the folder or hub id of a CLIP model, for instance {CLIP}"
        super().__init__(name, device, remedy)
        if not isinstance(self.model, CLIPModel):
            raise BadInput(f"is a {type(self.model).__name__}, and no CLIP", file=name, remedy=remedy)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:
            raise _unloadable(name, error, remedy) from error

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(n, width)."""
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.device)
        return _unit(self.model.get_image_features(**inputs).pooler_output)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, width); of a text that is too long for CLIP, what fits."""
        longest = self.model.config.text_config.max_position_embeddings
        # one by one: what a tokenizer pads with differs from model to model
        tokens = [self.tokenizer([text], truncation=True, max_length=longest, return_tensors="pt") for text in texts]
        return torch.cat([_unit(self.model.get_text_features(**t.to(self.device)).pooler_output) for t in tokens])


class Dino(_Encoder):
    """DINO's [CLS] embeddings, of length 1, on the CPU. Raises BadInput for a model that has none."""

    def __init__(self, name: str = DINO, device: torch.device | str = "cpu"):
        remedy = f"Give the folder or hub id of a DINO vision transformer, for instance {DINO}"
        super().__init__(name, device, remedy)
        try:
            self.pictures([Image.new("RGB", (64, 64))])
        except Exception as error:  # whatever another kind of model does with a picture
            raise BadInput(f"is a {type(self.model).__name__}, and no DINO", file=name, remedy=remedy) from error

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(n, width)."""
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.device)
        states = self.model(**inputs).last_hidden_state
        if states.ndim != 3:
            raise ValueError("no sequence that a [CLS] embedding could be the first of")
        return _unit(states[:, 0])


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float().cpu(), dim=-1)


def _loaded(name: str, device: torch.device | str, remedy: str):
    """A model in fp32 and eval mode, and its image processor, which works on PIL pictures without torchvision."""
    try:
        model, told = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    except Exception as error:  # transformers and its hub client raise a dozen kinds, all of which mean this
        raise _unloadable(name, error, remedy) from error
    # transformers fills what a file lacks with random numbers; of the pooler, which DINO has none of, nothing is used
    lacking = sorted(key for key in told["missing_keys"] if not key.startswith("pooler."))
    if lacking:
        raise BadInput(f"lacks {len(lacking)} of its weights", file=name, key=lacking[0], remedy=remedy)
    return model.to(device).eval(), processor


def _unloadable(name: str, error: Exception, remedy: str) -> BadInput:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return BadInput(f"cannot be loaded ({reason})", file=name, remedy=remedy)
