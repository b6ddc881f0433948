"""What `inspect` and `compare` say of LoRA files: Lora → dict, for --json, → text."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from safetensors import safe_open

from ziplora_lib.errors import BadInput, one_line
from ziplora_lib.lora import bake
from ziplora_lib.lora.keys import is_unet, listed, span
from ziplora_lib.lora.metadata import trigger_words
from ziplora_lib.lora.reader import BASES, VERSIONS, Lora
from ziplora_lib.merge import analysis
from ziplora_lib.merge.analysis import Overlap, Sparsity, block_of, block_order, brief
from ziplora_lib.merge.pairing import equalising

# a layer group of analysis.py -> the part of the UNet that it is counted in
_PARTS = {"attn1": "attention", "attn2": "attention", "ff": "feed-forward", "proj": "projection", "resnet": "convolution",
          "sampler": "convolution", "conv": "convolution", "time": "time"}  # fmt: skip
_ENCODERS = {"te": "text encoder", "te1": "text encoder 1", "te2": "text encoder 2"}
# characters of a line for a terminal: metadata can have megabytes, which --json shows
SHOWN = 1000
# characters of the longest JSON that ZipLoRA records in a field
LONGEST_RECORDED = 1_000_000
# ranks above this one are rarely meant
HUGE_RANK = 256
# what trainers write -> how it is called here
_TRAINING = {
    "model": ("ss_sd_model_name",),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "pictures": ("ss_num_train_images",),
    "learning rate": ("ss_learning_rate", "ss_unet_lr"),
    "optimizer": ("ss_optimizer",),
    "network": ("ss_network_module",),
    "clip skip": ("ss_clip_skip",),
}
# base model -> how its name in ss_base_model_version begins; and the widths of what cross-attention reads
_CONTEXT_WIDTHS = {768, 1024, 2048}
# layers of open_clip's encoder, SDXL's second and SD 2.x's only one: the WebUI knows attention and mlp alone
_OPEN_CLIP = {"sdxl": "lora_te2_", "sd2": "lora_te_"}
_OPEN_CLIP_KNOWN = re.compile(r".*_encoder_layers_\d+_(?:self_attn|mlp)_.+")
# a factor that alpha belongs to
_HAS_ALPHA = re.compile(r"(.+?)[._](?:lora_down|lora_A|lora\.down|lora_linear_layer\.down|hada_w1_b|lokr_w[12]_b)\b")
_TEXT_SKIPPED = re.compile(r"lora_te\d?_.*(?:_embedding|text_projection)$")


def inspected(lora: Lora) -> dict:
    """What `inspect` says of a LoRA."""
    trigger, source = trigger_words(lora)
    unet = sum(map(is_unet, lora.layers))
    ranks = Counter(delta.rank for delta in lora.deltas.values())
    recorded = {k.removeprefix("ziplora."): v for k, v in lora.metadata.items() if k.startswith("ziplora.")}
    return {
        "kind": " + ".join(kind for kind in lora.kinds if kind != "LoRA" or "LoCon" not in lora.kinds),
        "kinds": lora.kinds,
        "base": BASES[lora.base],
        "base_from": _base_from(lora),
        "prediction": "v" if _predicts_v(lora) else lora.metadata.get("modelspec.prediction_type", ""),
        "layers": len(lora.layers),
        "unet_layers": unet,
        "text_encoder_layers": len(lora.layers) - unet,
        "parts": dict(Counter(_part(key) for key in lora.layers).most_common()),
        "ranks": lora.ranks,
        "rank_counts": {str(rank): ranks[rank] for rank in sorted(ranks)},
        "rank_median": median(ranks.elements()) if ranks else None,
        "scales": sorted({brief(delta.scale) for delta in lora.deltas.values()}),
        "scale_from": _scale_from(lora),
        "dtype": lora.dtype,
        "norm": brief(lora.norm()) if lora.deltas else None,
        "norms_by_block": {block: brief(norm) for block, norm in analysis.norms_by_block(lora).items()},
        "need_the_model": dict(Counter(layer.kind for layer in lora.dense.values())),
        "norm_layers": sum(v.weight is not None for v in lora.vectors.values()),
        "biases": sum(v.weight is None for v in lora.vectors.values()),
        "embeddings": sorted(lora.embeddings),
        "trigger": trigger,
        "trigger_from": source,
        "training": _training(lora),
        "problems": problems(lora),
        "sha256": lora.hash,
        "ziplora": {field: _parsed(value) for field, value in recorded.items()},
    }


def problems(lora: Lora) -> list[str]:
    """What may go wrong with a LoRA that can be read, in words."""
    said = []
    if zero := [key for key, delta in lora.deltas.items() if delta.norm() == 0]:
        all_ = len(zero) == len(lora.layers) and not lora.vectors
        said.append(
            "changes nothing: all its values are zero" if all_ else f"all zero, as if never trained: {listed(zero)}"
        )
    if huge := [key for key, delta in lora.deltas.items() if delta.rank > HUGE_RANK]:
        largest = max(delta.rank for delta in lora.deltas.values())
        said.append(f"ranks above {HUGE_RANK}, up to {largest}, which make the merged file large: {listed(huge)}")
    found, lacking = _alphas(lora)
    ours = "ziplora.version" in lora.metadata  # in diffusers' names there is none, and it is the rank
    if lacking and not ours and not _peft_settings(lora):
        where = "the layers" if not found else f"{lacking} of {found + lacking} layers"
        said.append(f"{where} have no alpha: taken as the rank, which makes them too strong or weak if it was another")
    if lora.base == "unknown":
        said.append("neither its layers nor its metadata say which base model it is for")
    told = lora.metadata.get("ss_base_model_version", "")
    if told and (start := VERSIONS.get(lora.base)) and not told.startswith(start):
        said.append(f"its layers are those of {BASES[lora.base]}, but its metadata says '{told}'")
    if _predicts_v(lora):
        said.append("was trained for a model that predicts v: it does not suit an ordinary one")
    return said + _text_problems(lora)


def _text_problems(lora: Lora) -> list[str]:
    """Text encoder layers that the WebUI reads in part or not at all."""
    said, start = [], _OPEN_CLIP.get(lora.base)
    attention: dict[str, set[str]] = defaultdict(set)
    for key in lora.layers:
        if start and (match := re.fullmatch(rf"({start}.+_self_attn)_(q|k|v|out)_proj", key)):
            attention[match[1]].add(match[2])
    if partly := sorted(layer for layer, found in attention.items() if len(found) < 4):
        said.append(f"some of q, k, v and out, but the WebUI applies the four together or none: {listed(partly)}")
    skipped = [
        key
        for key in (*lora.layers, *sorted(lora.vectors.keys() - set(lora.layers)))
        if _TEXT_SKIPPED.match(key) or (start and key.startswith(start) and not _OPEN_CLIP_KNOWN.match(key))
    ]
    if skipped:
        said.append(f"skipped by the WebUI and some other loaders: {listed(skipped)}")
    return said


def _part(key: str) -> str:
    block, group = block_of(key)
    return _ENCODERS.get(block) or f"UNet {_PARTS.get(group, 'other')}"


def _base_from(lora: Lora) -> str:
    """What told the base model, in the reader's order."""
    if lora.base == "unknown":
        return ""
    widths = {d.shape[1] for key, d in lora.deltas.items() if key.endswith(("attn2_to_k", "attn2_to_v"))}
    if widths & _CONTEXT_WIDTHS:
        return "the width of its cross-attention"
    if any(block_of(key)[0] in ("te", "te2") for key in lora.layers):
        return "its text encoders"
    told = lora.metadata.get("ss_base_model_version", "")
    return "ss_base_model_version" if told.startswith(VERSIONS[lora.base]) else "its layers"


def _scale_from(lora: Lora) -> str:
    """Where alpha / rank was found; "" where no layer has one."""
    found, lacking = _alphas(lora)
    if not found and not lacking:
        return ""
    return "alpha in the file" if found else "PEFT's settings" if _peft_settings(lora) else "nothing: alpha is the rank"


def _alphas(lora: Lora) -> tuple[int, int]:
    """How many layers that should have an alpha have one in the file, and how many have none."""
    with safe_open(str(lora.path), framework="pt") as file:
        names = set(file.keys())
    layers = {match[1] for match in map(_HAS_ALPHA.match, names) if match}
    found = sum(f"{layer}.alpha" in names or f"{layer}.scale" in names for layer in layers)
    return found, len(layers) - found


def _peft_settings(lora: Lora) -> bool:
    """Whether PEFT's alpha is beside the layers, as the reader finds it."""
    beside = lora.path.name == "adapter_model.safetensors" and lora.path.with_name("adapter_config.json").is_file()
    return beside or bool(lora.metadata.get("lora_adapter_metadata"))


def _predicts_v(lora: Lora) -> bool:
    told = lora.metadata.get("modelspec.prediction_type", "").lower()
    return told in ("v", "v_prediction", "v-prediction") or lora.metadata.get("ss_base_model_version", "").endswith(
        "_v"
    )


def _training(lora: Lora) -> dict[str, str]:
    found = {name: [lora.metadata.get(field, "") for field in fields] for name, fields in _TRAINING.items()}
    return {
        name: value
        for name, values in found.items()
        if (value := next((v for v in values if v not in ("", "None")), ""))
    }


def inspected_text(view: Mapping) -> str:
    """One LoRA of `inspect`, for a terminal."""
    if "problem" in view:
        return f"{one_line(view['file'], SHOWN)}\n  {'problem':16}{one_line(view['problem'], SHOWN)}"
    kinds = ", ".join(f"{n} {kind}" for kind, n in view["kinds"].items())
    parts = ", ".join(f"{part} {n}" for part, n in view["parts"].items())
    norms = sorted(view["norms_by_block"].items(), key=lambda entry: -entry[1])
    top = ", ".join(f"{block} {norm:.3g}" for block, norm in norms[:5]) + (" …" if len(norms) > 5 else "")
    vectors = [
        f"{word} {view[field]}" for field, word in (("norm_layers", "norm layers"), ("biases", "biases")) if view[field]
    ]
    rows = {
        "kind": f"{view['kind']} ({kinds})",
        "base model": view["base"] + (f", told by {view['base_from']}" if view["base_from"] else ""),
        "prediction": view["prediction"],
        "layers": ": ".join([str(view["layers"]), *([parts] if parts else [])]),
        "rank": _rank_text(view),
        "alpha / rank": _scales_text(view),
        "dtype": view["dtype"],
        "‖ΔW‖": f"{view['norm']:.4g}: {top}" if norms else "",
        "need the model": ", ".join(f"{n} {kind}" for kind, n in view["need_the_model"].items()),
        "also changes": ", ".join(vectors),
        "embeddings": ", ".join(view["embeddings"]),
        "trigger": f"{view['trigger']} (from the {view['trigger_from']})" if view["trigger"] else "",
        "training": ", ".join(f"{name} {value}" for name, value in view["training"].items()),
        **_made_from(view["ziplora"]),
        "sha256": view["sha256"],
    }
    lines = [(name, value) for name, value in rows.items() if value]
    lines += [("problem", problem) for problem in view["problems"]]
    return "\n".join(
        [one_line(view["file"], SHOWN), *(f"  {name:16}{one_line(value, SHOWN)}" for name, value in lines)]
    )


def _rank_text(view: Mapping) -> str:
    ranks = view["ranks"]
    if len(ranks) > 4:
        return f"{ranks[0]} to {ranks[-1]}, median {view['rank_median']:g}"
    return ", ".join(f"{rank} ({view['rank_counts'][str(rank)]} layers)" for rank in ranks)


def _scales_text(view: Mapping) -> str:
    scales = view["scales"]
    if not scales or not view["scale_from"]:
        return ""
    shown = ", ".join(f"{s:g}" for s in scales) if len(scales) <= 4 else f"{scales[0]:g} to {scales[-1]:g}"
    return f"{shown} (from {view['scale_from']})"


def _made_from(made: Mapping) -> dict[str, str]:
    """The part of what ZipLoRA recorded that fits a terminal; the rest is in --json."""
    try:
        if "split_from" in made:
            source = made["split_from"]
            return {"half of": f"{source['name']} (its {source['parent']['role']} {source['parent']['name']})"}
        parents, chosen, learned = made["parents"], made["recipe"]["parents"], made["coefficients"]
        weights = [float(parent.get("strength", 1)) for parent in chosen]
        baked = made.get("strengths") or [1.0] * len(parents)
        return {
            "merged from": " + ".join(str(parent["name"]) for parent in parents),
            "roles": ", ".join(str(parent.get("role", "")) for parent in parents).strip(", "),
            "strengths": " : ".join(f"{a * float(b):g}" for a, b in zip(weights, baked)),
            "method": str(made["recipe"]["method"]),
            "mean m": ", ".join(f"{float(m):.3g}" for m in learned.get("mean", [])),
        }
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):  # not ours, or changed by another tool
        return {}


def compared(loras: Sequence[Lora]) -> dict:
    """What `compare` says of two LoRAs or more, in the order given. Raises BadInput for LoRAs of different base models."""
    _refuse_different_bases(loras)
    labels = _labels(len(loras))
    keys = sorted({key for lora in loras for key in lora.layers})
    known = {key: [i for i, lora in enumerate(loras) if key in lora.deltas] for key in keys}
    need = [key for key in keys if any(key in lora.dense for lora in loras)]
    pairs = [(i, k) for i in range(len(loras)) for k in range(i + 1, len(loras))]
    overlaps: dict[tuple[int, int], dict[str, Overlap]] = {pair: {} for pair in pairs}
    unfit = []
    for key in keys:
        if len(known[key]) < 2:
            continue
        try:
            grams = analysis.stacked(loras, key).column_grams()
        except BadInput as error:
            unfit.append(str(error))
            continue
        for i, k in pairs:
            if i in known[key] and k in known[key]:
                overlaps[i, k][key] = analysis.overlap(grams, i, k)
    shared = [key for key in keys if len(known[key]) == len(loras)]
    norms = [sum(lora.deltas[key].norm() ** 2 for key in shared) ** 0.5 for lora in loras]
    parents = [
        _parent(lora, labels[i], sum(known[key] == [i] and key not in need for key in keys), norms[i], even)
        for i, (lora, even) in enumerate(zip(loras, equalising(norms)))
    ]
    values = sum(d.up.numel() + d.down.numel() for lora in loras for d in lora.deltas.values())
    return {
        "loras": parents,
        "fit": not unfit,
        "unfit": unfit,
        "layers": len(keys),
        "shared": len(shared),
        "shared_unet": sum(map(is_unet, shared)),
        "need_the_model": len(need),
        "vectors": len({key for lora in loras for key in lora.vectors}),
        "merged_bytes_fp16": 2 * values,
        "merged_ranks": sorted({sum(loras[i].deltas[key].rank for i in known[key]) for key in keys if known[key]}),
        "pairs": [_pair_view([labels[i], labels[k]], overlaps[i, k]) for i, k in pairs],
        "sparsity": [_sparsity_view(label, lora) for label, lora in zip(labels, loras)],
        "merges": _merges(loras, labels),
    }


def _refuse_different_bases(loras: Sequence[Lora]) -> None:
    known = [lora for lora in loras if lora.base != "unknown"]
    if other := next((lora for lora in known if lora.base != known[0].base), None):
        raise BadInput(
            f"is a LoRA for {BASES[other.base]}, but {known[0].path.name} is for {BASES[known[0].base]}",
            file=other.path.name,
            remedy="Compare LoRAs of the same base model",
        )


def _labels(n: int) -> list[str]:
    return list(string.ascii_uppercase[:n]) if n <= 26 else [f"L{i + 1}" for i in range(n)]


def _parent(lora: Lora, label: str, alone: int, norm: float, even: float) -> dict:
    return {
        "label": label,
        "file": str(lora.path),
        "kinds": lora.kinds,
        "base": BASES[lora.base],
        "layers": len(lora.layers),
        "unet_layers": sum(map(is_unet, lora.layers)),
        "alone": alone,
        "need_the_model": len(lora.dense),
        "ranks": lora.ranks,
        "dtype": lora.dtype,
        "norm": brief(lora.norm()) if lora.deltas else None,
        "norm_shared": brief(norm) if norm else None,
        "suggested_strength": brief(even) if norm else None,
        "norms_by_block": {block: brief(norm) for block, norm in analysis.norms_by_block(lora).items()},
    }


def _pair_view(labels: list[str], layers: Mapping[str, Overlap]) -> dict:
    def summed(name_of: Callable[[str], str], order=None) -> dict[str, dict]:
        found: dict[str, Overlap] = defaultdict(Overlap)
        for key, overlap in layers.items():
            found[name_of(key)] += overlap
        return {name: _overlap_view(found[name]) for name in sorted(found, key=order)}

    return {
        "of": labels,
        "layers_shared": len(layers),
        "all": _overlap_view(sum(layers.values(), Overlap())),
        "blocks": summed(lambda key: block_of(key)[0], block_order),
        "groups": summed(lambda key: block_of(key)[1]),
        "layers": {
            key: dict(zip(("block", "group"), block_of(key))) | _overlap_view(overlap)
            for key, overlap in layers.items()
        },
    }


def _overlap_view(overlap: Overlap) -> dict:
    return {
        "columns": overlap.columns,
        "column_cosine": brief(overlap.column_cosine),
        "interference": brief(overlap.interference),
        "cosine": brief(overlap.cosine),
        "norms": [brief(overlap.energy_c**0.5), brief(overlap.energy_s**0.5)],
    }


def _sparsity_view(label: str, lora: Lora) -> dict:
    found = {key: analysis.sparsity(delta) for key, delta in lora.deltas.items()}
    measured = [(key, delta.down[0].numel(), found[key]) for key, delta in lora.deltas.items() if found[key]]
    blocks = defaultdict(list)
    for key, columns, layer in measured:
        blocks[block_of(key)[0]].append((columns, layer))
    return {
        "of": label,
        "all": _share_view(analysis.mean_sparsity((columns, layer) for _, columns, layer in measured)),
        "blocks": {b: _share_view(analysis.mean_sparsity(blocks[b])) for b in sorted(blocks, key=block_order)},
        "layers": {key: _share_view(layer) for key, _, layer in measured},
    }


def _share_view(sparsity: Sparsity | None) -> dict | None:
    if sparsity is None:
        return None
    return {
        "columns": {f"{e:.0%}": brief(s) for e, s in zip(analysis.COLUMN_ENERGIES, sparsity.columns)},
        "elements": {f"{e:.0%}": brief(s) for e, s in zip(analysis.ELEMENT_ENERGIES, sparsity.elements)},
        "rows_counted": sparsity.rows,
        "rows": sparsity.out,
    }


def _merges(loras: Sequence[Lora], labels: Sequence[str]) -> list[dict]:
    """For a LoRA that ZipLoRA merged from others that are compared: its weighted overlap."""
    by_hash = {lora.hash: i for i, lora in enumerate(loras)}
    found = []
    for merged, label in zip(loras, labels):
        try:
            own = [by_hash.get(parent["sha256"]) for parent in bake.origins(merged)]
            if None in own:
                continue
            parents, after = [loras[i] for i in own], bake.stacks(merged)
            both = [key for key in after if sum(key in parent.deltas for parent in parents) > 1]
            overlaps = analysis.weighted_overlap({key: analysis.stacked(parents, key) for key in both}, after)
        except BadInput:  # not ours, or changed by another tool
            continue
        kept = {block: brief(value) for block, value in overlaps.items()}
        found.append({"of": label, "from": [labels[i] for i in own], "weighted_overlap": kept})
    return found


def compared_text(view: Mapping) -> str:
    """`compare`, for a terminal; what it says by layer is in --json."""
    parents = view["loras"]
    header = ["", "layers", "alone", "rank", "‖ΔW‖", "shared", "strength", "base", "dtype", "file"]
    rows = [
        [p["label"], p["layers"], p["alone"], span(p["ranks"]) or "-", _number(p["norm"], ".4g"),
         _number(p["norm_shared"], ".4g"), _number(p["suggested_strength"], ".2f"), p["base"], p["dtype"], p["file"]]
        for p in parents
    ]  # fmt: skip
    sections = [_table(header, rows, last_left=True), _preflight_text(view)]
    for pair in view["pairs"]:
        sections.append(_pair_text(pair))
    sections.append(_sparsity_text(view["sparsity"]))
    for merge in view["merges"]:
        kept = merge["weighted_overlap"]
        rows = [[block, f"{value:.3f}"] for block, value in kept.items()]
        sections.append(
            f"{merge['of']} is a merge of {' and '.join(merge['from'])}: their overlap in it, "
            "1 as in the sum at strengths of 1\n" + _table(["block", "overlap"], rows)
        )
    return "\n\n".join(sections)


def _preflight_text(view: Mapping) -> str:
    text = view["shared"] - view["shared_unet"]
    lines = [
        f"{view['shared']} of {view['layers']} layers are in all ({view['shared_unet']} of the UNet, {text} of text "
        "encoders); alone: in this LoRA only",
        "strength: what brings ‖ΔW‖ of the shared layers to the same value; the right balance of a picture can be another",
        f"merged in fp16: about {view['merged_bytes_fp16'] / 1e6:.1f} MB, rank {span(view['merged_ranks']) or '-'}",
    ]
    if view["need_the_model"]:
        lines.append(f"layers that need the model: {view['need_the_model']}, left out of all numbers and of the size")
    if view["vectors"]:
        lines.append(f"norms and biases: {view['vectors']}, left out of all numbers, for they have no columns")
    if view["unfit"]:
        lines.append(
            f"layers that do not fit each other: {len(view['unfit'])}, left out of all numbers: {view['unfit'][0]}"
        )
    else:
        lines.append("they fit each other's shapes")
    return "\n".join(lines)


def _pair_text(pair: Mapping) -> str:
    c, s = pair["of"]
    if not pair["layers_shared"]:
        return f"{c} and {s} share no layer"
    header = [f"{c} and {s}", "columns", "|cos|", "interference", "cosine", f"‖{c}‖", f"‖{s}‖"]
    found = {**pair["blocks"], **{f"· {group}": o for group, o in pair["groups"].items()}, "all": pair["all"]}
    rows = [
        [name, o["columns"], f"{o['column_cosine']:.3f}", f"{o['interference']:.3f}", f"{o['cosine']:+.3f}",
         *(f"{norm:.3g}" for norm in o["norms"])]
        for name, o in found.items()
    ]  # fmt: skip
    explained = (
        "|cos|: mean over paired columns; interference: the same, weighted by size; cosine: of ΔW as a whole; "
        "·: by group of layers"
    )
    return f"{_table(header, rows)}\n{explained}"


def _sparsity_text(views: Sequence[Mapping]) -> str:
    blocks = sorted({block for view in views for block in view["blocks"]}, key=block_order)
    header, rows = ["sparsity, %"], [[block] for block in [*blocks, "all"]]
    for view in views:
        header += [f"{view['of']} columns", f"{view['of']} elements"]
        for row, found in zip(rows, [*(view["blocks"].get(block) for block in blocks), view["all"]]):
            row += [
                " ".join(f"{100 * s:.0f}" for s in found[kind].values()) if found else "-"
                for kind in ("columns", "elements")
            ]
    of = [view["all"] for view in views if view["all"]]
    counted, total = (sum(view[field] for view in of) for field in ("rows_counted", "rows"))
    columns, elements = (
        "/".join(f"{100 * e:g}" for e in es) for es in (analysis.COLUMN_ENERGIES, analysis.ELEMENT_ENERGIES)
    )
    explained = (
        f"columns: how many of a layer's hold {columns} % of its energy; elements: how many of the smallest hold {elements} %"
        + (f", counted in {counted:,} of {total:,} rows" if counted < total else "")
    )
    return f"{_table(header, rows)}\n{explained}"


def _table(header: Sequence[str], rows: Sequence[Sequence], last_left: bool = False) -> str:
    """Columns aligned, the first to the left, the others to the right."""
    lines = [[one_line(cell, SHOWN) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]

    def line(cells: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 or (last_left and i == len(widths) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join(map(line, lines))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _parsed(value: str) -> object:
    """What recorded JSON says, where it can be said again as JSON, else its text."""
    if len(value) > LONGEST_RECORDED:
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if _plain(found) else value


def _plain(value: object, levels: int = 50) -> bool:
    """Whether JSON is of finite numbers, and nested no more deeply than anything that ZipLoRA records."""
    if isinstance(value, float):
        return math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_plain(part, levels - 1) for part in inner)
