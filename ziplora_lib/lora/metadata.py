"""What a LoRA's metadata tells, and what a merged LoRA's metadata says.

Fields: kohya-ss (ss_*), the WebUI's sshs_model_hash, Stability AI's modelspec.* (SAI model spec 1.0), ours (ziplora.*).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ziplora_lib import __version__
from ziplora_lib.lora.reader import Lora

# how much of the parents' tags a merged file keeps
KEPT_FOLDERS, KEPT_TAGS = 20, 500


def tag_frequency(lora: Lora) -> dict[str, dict[str, int]]:
    """kohya's ss_tag_frequency: {folder: {tag: count}}; {} where it is missing or of another form."""
    try:
        folders = json.loads(lora.metadata.get("ss_tag_frequency", "{}"))
        return {str(f): {str(t): int(n) for t, n in tags.items()} for f, tags in folders.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _frequent(tags: dict[str, int]) -> dict[str, int]:
    """The most frequent tags: a header of megabytes is of no use, and safetensors allows only so much."""
    return dict(sorted(tags.items(), key=lambda entry: -entry[1])[:KEPT_TAGS])


def trigger_words(lora: Lora) -> tuple[str, str]:
    """The words that call up a LoRA, and where they were found; ("", "") where nothing says.

    In this order: the activation text in the WebUI's card, modelspec.trigger_phrase, the most frequent training tag.
    """
    if text := str(lora.sidecar.get("activation text") or "").strip():
        return text, "activation text of its card"
    if text := lora.metadata.get("modelspec.trigger_phrase", "").strip():
        return text, "trigger phrase in the file"
    counts: dict[str, int] = {}
    for tags in tag_frequency(lora).values():
        for tag, n in tags.items():
            counts[tag.strip()] = counts.get(tag.strip(), 0) + n
    if counts:
        return max(counts, key=lambda tag: counts[tag]), "most frequent training tag"
    return "", ""


# how the base models themselves are called: LoRAs trained on one of these are meant for all its fine-tunes
_PLAIN_BASES = (
    "sd_xl_base",
    "sdxl_base",
    "sdxl-base",
    "stable-diffusion-xl-base",
    "v1-5",
    "v1-4",
    "v2-1",
    "v2-base",
    "sd-v1",
)


def trained_elsewhere(lora: Lora, model: str, prediction: str) -> list[str]:
    """Warnings where a LoRA says that it was trained on another model of the same base, or for another prediction.

    model: the name of the model that it shall work on; prediction: its own, "epsilon" or "v".
    """
    said = []
    trained_on = lora.metadata.get("ss_sd_model_name", "").replace("\\", "/").rstrip("/").rpartition("/")[2]
    plain = _letters(trained_on.removesuffix(".safetensors").removesuffix(".ckpt"))
    known = not plain or any(_letters(name) in plain for name in _PLAIN_BASES)
    if not known and plain not in _letters(model) and _letters(model) not in plain:
        said.append(f"{lora.name} was trained on {trained_on}; on {model} it can look different")
    own = lora.metadata.get("modelspec.prediction_type", "")
    if own and own.startswith("v") != (prediction == "v"):
        said.append(
            f"{lora.name} was trained for {own}-prediction, but {model} predicts {prediction}; it may not work at all"
        )
    return said


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def made_by(lora: Lora) -> dict:
    """The recipe that ZipLoRA merged a LoRA by, as the file says; {} for any other LoRA, or where it cannot be read."""
    try:
        recipe = json.loads(lora.metadata.get("ziplora.recipe", "{}"))
    except (ValueError, RecursionError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def merged_metadata(
    name: str,
    parents: Sequence[Lora],
    ranks: dict[str, tuple[int, ...]],
    recipe: dict,
    learned: dict,
    base: str,
    prediction: str,
) -> dict[str, str]:
    """The metadata of a merged LoRA, all but the hash, which the writer adds once the bytes are known.

    ranks: each layer key's rank split, in the parents' order; learned: the coefficients' summary; base and prediction: the
    model's, as hosts name them. No date and no path: the same merge gives the same file.
    """
    triggers = ", ".join(dict.fromkeys(words for words, _ in map(trigger_words, parents) if words))
    tags = {f"{p.name}: {f}": _frequent(t) for p in parents for f, t in list(tag_frequency(p).items())[:KEPT_FOLDERS]}
    rank = max((sum(r) for r in ranks.values()), default=0)
    resolution = int(recipe.get("resolution", 1024))
    meta = {
        **_base_fields(base, prediction, [p.metadata.get("ss_base_model_version", "") for p in parents]),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": name,
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_training_comment": "merged by ZipLoRA from " + " and ".join(p.name for p in parents),
        "ss_tag_frequency": json.dumps(tags, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.merged_from": ", ".join(p.name for p in parents),
        "ziplora.version": __version__,
        "ziplora.recipe": json.dumps(recipe, ensure_ascii=False, sort_keys=True),
        "ziplora.parents": json.dumps(
            [_origin(p, chosen) for p, chosen in zip(parents, recipe["parents"])], ensure_ascii=False
        ),
        "ziplora.ranks": json.dumps(_rank_table(ranks, len(parents))),
        "ziplora.coefficients": json.dumps(learned, sort_keys=True),
    }
    if triggers:
        meta["modelspec.trigger_phrase"] = triggers
    for field in ("ss_sd_model_name", "ss_sd_model_hash", "ss_clip_skip"):
        if value := next((p.metadata[field] for p in parents if p.metadata.get(field)), None):
            meta[field] = value
    return meta


def _base_fields(base: str, prediction: str, versions: Sequence[str]) -> dict[str, str]:
    """What a file says of its base model, as kohya's trainer puts it. versions: what the parents' files say of theirs."""
    v = prediction == "v"
    begins, version, architecture, implementation = {
        "sdxl": (
            "sdxl_",
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base",
            "https://github.com/Stability-AI/generative-models",
        ),
        "sd1": ("sd_v1", "sd_v1_v" if v else "sd_v1", "stable-diffusion-v1", "diffusers"),
        "sd2": (
            "sd_v2",
            "sd_v2_v" if v else "sd_v2",
            "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512",
            "diffusers",
        ),
    }[base]
    return {
        "ss_base_model_version": next((found for found in versions if found.startswith(begins)), version),
        "ss_v2": str(base == "sd2"),
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        "modelspec.prediction_type": prediction,
    }


def _origin(parent: Lora, chosen: dict) -> dict[str, str]:
    """What a merged file keeps of one parent; its prompt has the trigger words where its file does not say them."""
    trigger = trigger_words(parent)[0] or chosen["prompt"]
    return {"name": parent.name, "sha256": parent.hash, "role": chosen["role"], "trigger": trigger}


def half_metadata(name: str, merged: Lora, origin: Mapping[str, str], rank: int) -> dict[str, str]:
    """The metadata of one parent's half of a merged LoRA, all but the hash. origin: as in ziplora.parents."""
    parent = origin["name"]
    tags = {f.removeprefix(f"{parent}: "): t for f, t in tag_frequency(merged).items() if f.startswith(f"{parent}: ")}
    # what is true of the whole alone
    whole = (
        "modelspec.merged_from",
        "modelspec.trigger_phrase",
        "ziplora.parents",
        "ziplora.ranks",
        "ziplora.coefficients",
    )
    kept = {field: value for field, value in merged.metadata.items() if field not in whole}
    source = {"name": merged.name, "sha256": merged.hash, "parent": dict(origin)}
    meta = {
        **kept,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": name,
        "ss_training_comment": f"the half of {parent} in {merged.name}, split by ZipLoRA",
        "ss_tag_frequency": json.dumps(tags, ensure_ascii=False),
        "modelspec.title": name,
        "ziplora.split_from": json.dumps(source, ensure_ascii=False),
    }
    if origin["trigger"]:
        meta["modelspec.trigger_phrase"] = origin["trigger"]
    return meta


def _rank_table(ranks: dict[str, tuple[int, ...]], parents: int) -> dict[str, list[int]]:
    """The rank splits in brief: the usual one under "*", each layer that differs by its key."""
    splits = list(ranks.values())
    usual = max(dict.fromkeys(splits), key=splits.count) if splits else [0] * parents
    return {"*": list(usual)} | {key: list(split) for key, split in ranks.items() if split != usual}
