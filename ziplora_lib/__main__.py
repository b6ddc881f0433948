"""The command line: `python -m ziplora_lib zip …`, `bake` and `inspect`, without a WebUI.

Exit status: 0 done, 1 failed, 2 bad input (one line saying what, where and what to do), 130 stopped (with what was kept).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from ziplora_lib.errors import BadInput, MergeFailed, Stopped
from ziplora_lib.lora import writer
from ziplora_lib.lora.bake import bake
from ziplora_lib.lora.keys import is_unet
from ziplora_lib.lora.metadata import trigger_words
from ziplora_lib.lora.reader import BASES, Lora, read
from ziplora_lib.merge import balance
from ziplora_lib.recipe import Recipe, parse

# what these libraries say at import (a missing torchvision, for instance) is of no use to whoever merges LoRAs
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# recipe fields that are not plain flags of `zip`
_OWN_FLAGS = {"parents", "output"}


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that cannot show a name must not lose the merge
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except BadInput as error:
        print(f"ziplora: {error}", file=sys.stderr)
        return 2
    except (MergeFailed, OSError) as error:
        print(f"ziplora: failed: {error}", file=sys.stderr)
        return 1
    except Stopped:
        print("ziplora: stopped before anything was learned; nothing was saved", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ziplora_lib", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    zip_ = commands.add_parser("zip", help="merge a subject LoRA and a style LoRA into one")
    for role in ("subject", "style"):
        zip_.add_argument(f"--{role}", required=True, metavar="FILE", help=f"the {role} LoRA")
        zip_.add_argument(f"--{role}-prompt", default="", metavar="TEXT", help="the prompt it was trained with")
        zip_.add_argument(f"--{role}-strength", type=float, default=1.0, metavar="W", help="its strength in the merge")
        zip_.add_argument(
            f"--reference-{role}",
            action="append",
            default=[],
            metavar="PATH",
            help="its training pictures, instead of pictures that it makes itself",
        )
    zip_.add_argument("--model", default="miniature", help="SDXL folder, .safetensors file, hub id, or miniature")
    zip_.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; the best there is by default")
    zip_.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors", help="the merged LoRA")
    zip_.add_argument("--report", type=Path, metavar="FILE.json", help="write what was done and learned")
    for name, field in Recipe.schema()["properties"].items():
        if name in _OWN_FLAGS:
            continue
        flag = f"--{name.replace('_', '-')}"
        default = Recipe.__fields__[name].default
        if field["type"] == "boolean" and default is True:
            zip_.add_argument(
                f"--no-{name.replace('_', '-')}", dest=name, action="store_false", help=f"not: {field['description']}"
            )
        elif field["type"] == "boolean":
            zip_.add_argument(flag, dest=name, action="store_true", help=field["description"])
        else:
            kind = {"integer": int, "number": float}.get(field["type"], str)
            zip_.add_argument(
                flag, dest=name, type=kind, default=default, choices=field.get("enum"), help=field["description"]
            )
    zip_.set_defaults(run=_zip)
    baked = commands.add_parser("bake", help="save a merged LoRA at another balance, or at two strengths")
    baked.add_argument("file", type=Path, metavar="FILE", help="a LoRA that ZipLoRA made")
    baked.add_argument("--balance", type=float, metavar="B", help="-1 more subject … 0 as it is … 1 more style")
    baked.add_argument("--subject", type=float, metavar="W", help="strength of the subject's half")
    baked.add_argument("--style", type=float, metavar="W", help="strength of the style's half")
    baked.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors")
    baked.add_argument("--overwrite", action="store_true", help="replace a LoRA of the same name")
    baked.set_defaults(run=_bake)
    inspect = commands.add_parser("inspect", help="what is in LoRA files")
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.set_defaults(run=_inspect)
    return parser


def _recipe(args: argparse.Namespace) -> Recipe:
    parents = [
        {
            "lora": getattr(args, role),
            "role": role,
            "prompt": getattr(args, f"{role}_prompt"),
            "strength": getattr(args, f"{role}_strength"),
            "reference": getattr(args, f"reference_{role}"),
        }
        for role in ("subject", "style")
    ]
    fields = {name: getattr(args, name) for name in Recipe.__fields__ if name not in _OWN_FLAGS}
    return parse({**fields, "parents": parents, "output": args.out.name.removesuffix(".safetensors")})


def _zip(args: argparse.Namespace) -> int:
    # what can be refused now is, before the model is loaded, which can take minutes
    _check_out(args.out)
    recipe = _recipe(args)
    writer.check_free(args.out, recipe.overwrite)
    if args.report:
        _check_report(args.report, args.out)
    for parent in recipe.parents:
        read(Path(parent.lora))
    from ziplora_lib.hosts.diffusers import DiffusersHost
    from ziplora_lib.job import run

    host = DiffusersHost(args.model, args.out.parent, args.device)
    interrupted = shown = False

    def interrupt(*_) -> None:
        nonlocal interrupted
        interrupted = True

    def show(info: dict) -> bool:
        nonlocal shown
        if info["phase"] != "preflight":  # which is over at once, or ends in a line of its own
            print(_progress(info), end="", file=sys.stderr, flush=True)
            shown = True
        return interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        result = run(recipe, host, show)
    finally:
        signal.signal(signal.SIGINT, before)
        if shown:
            print(file=sys.stderr)
    if args.report:
        args.report.write_text(json.dumps({**result.public(), "history": result.history}, indent=2) + "\n")
    if result.pictures:
        from ziplora_lib.pictures import png, strip

        labels = [_balance_label(point) for point, _ in result.pictures]
        sheet = strip([[picture for _, picture in result.pictures]], [""], labels)
        writer.write_beside(args.out, ".balance.png", png(sheet))
    print(summary(result))
    return 130 if result.stopped else 0


def _bake(args: argparse.Namespace) -> int:
    by_strength = args.subject is not None or args.style is not None
    if by_strength == (args.balance is not None):
        raise BadInput("give either --balance, or --subject and --style", remedy="For instance --balance -0.2")
    chosen = (args.subject, args.style) if by_strength else balance.weights(_in_range(args.balance))
    _check_out(args.out)
    saved = bake(args.file, args.out, [1.0 if w is None else w for w in chosen], args.overwrite)
    print(f"saved {args.out}  ({saved['bytes'] / 1e6:.1f} MB)\nprompt with <lora:{args.out.stem}:1>")
    return 0


def _check_report(report: Path, out: Path) -> None:
    if not report.parent.is_dir():
        raise BadInput(f"the folder {report.parent} of --report does not exist", remedy="Create it, or choose another")
    if report.suffix != ".json" or report.is_dir():
        raise BadInput(f"--report {report} is not a .json file", remedy="For instance report.json")
    if report.resolve() == out.with_suffix(".json").resolve():
        raise BadInput(f"--report {report} is the name of the LoRA's own card", remedy="Give the report another name")


def _in_range(value: float) -> float:
    if not -1 <= value <= 1:
        raise BadInput(f"--balance {value} is not between -1 and 1", remedy="-1 is more subject, 1 is more style")
    return value


def _check_out(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise BadInput(f"--out {out} does not end in .safetensors", remedy="Give the merged LoRA that ending")
    writer.check_name(out.name.removesuffix(".safetensors"))


def summary(result) -> str:
    """A finished merge in a few lines."""
    lines = [
        f"saved {result.file}  ({result.saved['bytes'] / 1e6:.1f} MB, largest rounding {result.saved['largest_error']:.1e})"
    ]
    if "error" in result.learned:
        for i, role in enumerate(("subject", "style")):
            lines.append(
                f"{role}: error against this LoRA alone {result.learned['error'][i]:.3f} "
                f"(plain sum {result.learned['error_plain_sum'][i]:.3f}); mean coefficient {result.learned['mean'][i]:.2f}"
            )
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join([*lines, f"prompt with {result.tag}"])


def _balance_label(balance: float) -> str:
    return "as learned" if balance == 0 else f"{'subject' if balance < 0 else 'style'} {abs(balance):.0%}"


def _progress(info: dict) -> str:
    loss = f"  loss {info['loss']:.3f}" if "loss" in info else ""
    return f"\r{info['phase']} {info.get('step', 0)}/{info.get('steps', 1)}{loss}".ljust(60)


def _inspect(args: argparse.Namespace) -> int:
    views = []
    for path in args.files:
        try:
            views.append(_view(read(path)) | {"file": str(path)})
        except BadInput as error:
            views.append({"file": str(path), "problem": str(error)})
    if args.json:
        print(json.dumps(views, indent=2, ensure_ascii=False))
    else:
        for view in views:
            print(view.pop("file"))
            made = view.pop("ziplora", {})
            for name, value in {**view, **_made_from(made)}.items():
                if value not in ("", []):
                    print(f"  {name.replace('_', ' '):20} {value}")
    return 2 if any("problem" in view for view in views) else 0


def _view(lora: Lora) -> dict:
    """What `inspect` says of a LoRA."""
    trigger, source = trigger_words(lora)
    unet = sum(map(is_unet, lora.deltas))
    convolves = any(delta.down.ndim == 4 and delta.down.shape[2:].numel() > 1 for delta in lora.deltas.values())
    recorded = {k.removeprefix("ziplora."): v for k, v in lora.metadata.items() if k.startswith("ziplora.")}
    return {
        "kind": "LoCon" if convolves else "LoRA",
        "base": BASES[lora.base],
        "layers": len(lora.deltas),
        "unet_layers": unet,
        "text_encoder_layers": len(lora.deltas) - unet,
        "ranks": lora.ranks,
        "dtype": lora.dtype,
        "norm": round(lora.norm(), 4),
        "trigger": trigger,
        "trigger_from": source,
        "sha256": lora.hash,
        "ziplora": {k: _parsed(v) for k, v in recorded.items()},
    }


def _made_from(made: dict) -> dict:
    """The part of what ZipLoRA recorded that fits a terminal; the rest is in --json."""
    try:
        return {
            "merged_from": " + ".join(str(parent["name"]) for parent in made["parents"]),
            "method": made["recipe"]["method"],
            "strengths": made.get("strengths", ""),
            "mean_coefficients": made["coefficients"].get("mean", ""),
        }
    except (KeyError, TypeError, AttributeError):  # not ours, or changed by another tool
        return {}


def _parsed(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value


if __name__ == "__main__":
    sys.exit(main())
