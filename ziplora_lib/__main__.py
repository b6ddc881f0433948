"""The command line, without a WebUI: `python -m ziplora_lib zip …`, and what else --help lists.

Exit status: 0 done, 1 failed, 2 bad input (one line saying what, where and what to do), 130 stopped (with what was kept).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from ziplora_lib import inspection
from ziplora_lib.commands.watching import progress_line, watched
from ziplora_lib.errors import BadInput, MergeFailed, Stopped
from ziplora_lib.evaluation import CLIP, DECIDED, DINO
from ziplora_lib.lora import writer
from ziplora_lib.lora.bake import bake, in_order, origins, split, strengths
from ziplora_lib.lora.reader import peek, read
from ziplora_lib.merge import balance
from ziplora_lib.naming import ROLES
from ziplora_lib.options import OPTIONS
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
    zip_ = commands.add_parser(
        "zip",
        help="merge a subject LoRA and a style LoRA into one, or any two to eight of them",
        epilog="With several LoRAs of one role, its flags are given once for each of them, in their order, or not at all.",
    )
    for role in ROLES:

        def repeated(flag: str, what: str, **options) -> None:
            zip_.add_argument(flag, action="append", default=[], help=what, **options)

        repeated(f"--{role}", f"a {role} LoRA; repeat it for more of them", metavar="FILE")
        repeated(f"--{role}-prompt", "the prompt it was trained with", metavar="TEXT")
        repeated(f"--{role}-strength", "its strength in the merge, 1 by default", type=float, metavar="W")
        repeated(
            f"--reference-{role}",
            "its training pictures, instead of pictures that it makes itself; all that are given belong to an only "
            f"{role}, with several the first to the first, and so on: a folder for more than one picture, '' for none",
            metavar="PATH",
        )
    _add_model(zip_, default="miniature")
    zip_.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors", help="the merged LoRA")
    zip_.add_argument("--report", type=Path, metavar="FILE.json", help="write what was done and learned")
    _add_recipe(zip_, _OWN_FLAGS)
    zip_.set_defaults(run=_zip)
    many = commands.add_parser(
        "zip-many",
        help="merge a list of pairs, one after another",
        epilog="A CSV file with the columns subject and style (files, as seen from its folder), and if you like "
        "subject_prompt, style_prompt (by default the trigger words in the files), output, subject_strength and "
        "style_strength. One picture of each is drawn; they come together in contact-sheet.png.",
    )
    many.add_argument("pairs", type=Path, metavar="PAIRS.csv", help="the list of pairs")
    _add_model(many, default="miniature")
    many.add_argument("--out-folder", required=True, type=Path, metavar="DIR", help="where the merged LoRAs go")
    many.add_argument(
        "--name",
        default=OPTIONS["name"].default,
        metavar="PATTERN",
        help=f"their names where the list gives none: {OPTIONS['name'].hint}",
    )
    many.add_argument("--skip-existing", action="store_true", help="leave out the pairs whose names are there already")
    many.add_argument("--report", type=Path, metavar="FILE.json", help="write what became of each pair")
    many.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="spread the pairs over a Ray cluster, a worker a GPU, or over this machine's without an address; its machines "
        "must see the same folders",
    )
    _add_recipe(many, {*_OWN_FLAGS, "balance_points"})
    many.set_defaults(run=_zip_many)
    baked = commands.add_parser("bake", help="save a merged LoRA at another balance, or at other strengths")
    baked.add_argument("file", type=Path, metavar="FILE", help="a LoRA that ZipLoRA made")
    baked.add_argument(
        "--balance",
        type=float,
        metavar="B",
        help="-1 more subject … 0 as it is … 1 more style; of LoRAs of one role, the first and the others",
    )
    for role in ROLES:
        baked.add_argument(
            f"--{role}",
            type=float,
            action="append",
            default=[],
            metavar="W",
            help=f"strength of the {role}'s half; of several, one for all or one each in their order",
        )
    baked.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors")
    baked.add_argument("--overwrite", action="store_true", help="replace a LoRA of the same name")
    baked.set_defaults(run=_bake)
    halves = commands.add_parser("split", help="save each parent's half of a merged LoRA as a LoRA of its own")
    halves.add_argument("file", type=Path, metavar="FILE", help="a LoRA that ZipLoRA made")
    for role in ROLES:
        halves.add_argument(
            f"--out-{role}",
            type=Path,
            action="append",
            default=[],
            metavar="FILE.safetensors",
            help=f"the {role}'s half; of several, one each in their order",
        )
    halves.add_argument("--overwrite", action="store_true", help="replace LoRAs of the same names")
    halves.set_defaults(run=_split)
    drawn = commands.add_parser("strip", help="draw a merged LoRA along the balance, from more subject to more style")
    drawn.add_argument("file", type=Path, metavar="FILE", help="a LoRA that ZipLoRA made")
    drawn.add_argument("--prompt", default="", metavar="TEXT", help="the one of its preview by default")
    _add_model(drawn, required=True)
    drawn.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the pictures side by side")
    drawn.add_argument("--points", type=int, default=5, metavar="N", help="how many pictures, 5 by default")
    drawn.add_argument(
        "--seed", type=int, nargs="+", metavar="N", help="its recipe's by default; a row of pictures for each"
    )
    drawn.add_argument(
        "--resolution", type=int, metavar="N", help="side of a picture in pixels; as its preview's by default"
    )
    drawn.add_argument("--sampler-steps", type=int, metavar="N", help="as its preview's by default")
    drawn.add_argument("--guidance", type=float, metavar="G", help="as its preview's by default")
    drawn.set_defaults(run=_strip)
    inspect = commands.add_parser("inspect", help="what is in LoRA files")
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.set_defaults(run=_inspect)
    compare = commands.add_parser("compare", help="what LoRAs have in common, and how they get into each other's way")
    compare.add_argument("files", nargs="+", type=Path, metavar="FILE", help="two LoRAs or more")
    compare.add_argument("--json", action="store_true", help="as JSON, by layer too")
    compare.set_defaults(run=_compare)
    evaluate = commands.add_parser(
        "evaluate",
        help="score merges of a list of pairs by CLIP and DINO, as the paper does",
        epilog="The README shows a list of pairs, and says what the scores can and cannot tell.",
    )
    evaluate.add_argument("pairs", type=Path, metavar="PAIRS.json", help="the list of pairs")
    _add_model(evaluate, required=True)
    evaluate.add_argument("--clip", default=CLIP, help="CLIP, a folder or hub id")
    evaluate.add_argument("--dino", default=DINO, help="DINO, a folder or hub id")
    methods = [name for name in Recipe.schema()["properties"]["method"]["enum"] if name != "direct"]
    evaluate.add_argument(
        "--method",
        action="append",
        choices=methods,
        help="merge every pair by this method; repeat it for more. ziplora if the list names no merged LoRAs, else none",
    )
    evaluate.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3, 4],
        metavar="N",
        help="a picture of every prompt with each of these seeds, in every row; 1 2 3 4 by default",
    )
    for role in ROLES:
        evaluate.add_argument(
            f"--{role}-share",
            type=float,
            default=0.5,
            metavar="S",
            help=f"joint success: how far of the way to the {role} LoRA alone on its own prompt, 0.5 by default",
        )
    evaluate.add_argument("--json", type=Path, metavar="FILE.json", help="write everything, picture by picture")
    evaluate.add_argument("--grids", type=Path, metavar="FOLDER", help="write the pictures of each pair, as one PNG")
    evaluate.add_argument("--zipped", type=Path, metavar="FOLDER", help="keep the LoRAs that are merged for this")
    _add_recipe(evaluate, DECIDED)
    evaluate.set_defaults(run=_evaluate)
    page = commands.add_parser("tab", help="the WebUI's tab without a WebUI, in the browser")
    _add_model(page, default="miniature")
    page.add_argument(
        "--folder", type=Path, default=Path("."), metavar="DIR", help="where the LoRAs are, and new ones go"
    )
    page.add_argument("--port", type=int, help="the first free one from 7860 on by default")
    page.add_argument(
        "--listen", default="127.0.0.1", metavar="ADDRESS", help="who may connect: 0.0.0.0 for every machine"
    )
    page.set_defaults(run=_tab)
    return parser


def _add_model(parser: argparse.ArgumentParser, **options) -> None:
    parser.add_argument("--model", help="folder, .safetensors file, hub id, or a miniature[-sd1]", **options)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; the best there is by default")


def _add_recipe(parser: argparse.ArgumentParser, without: set[str]) -> None:
    """A flag for every other field of the recipe."""
    for name, field in Recipe.schema()["properties"].items():
        if name in without:
            continue
        flag = f"--{name.replace('_', '-')}"
        default = Recipe.__fields__[name].default
        if field["type"] == "boolean" and default is True:
            parser.add_argument(
                f"--no-{name.replace('_', '-')}", dest=name, action="store_false", help=f"not: {field['description']}"
            )
        elif field["type"] == "boolean":
            parser.add_argument(flag, dest=name, action="store_true", help=field["description"])
        else:
            kind = {"integer": int, "number": float}.get(field["type"], str)
            parser.add_argument(
                flag, dest=name, type=kind, default=default, choices=field.get("enum"), help=field["description"]
            )


def _recipe(args: argparse.Namespace) -> Recipe:
    parents = [parent for role in ROLES for parent in _parents(args, role)]
    if len(parents) < 2:
        raise BadInput(
            f"a merge takes two LoRAs or more, but {len(parents)} {'is' if len(parents) == 1 else 'are'} given",
            remedy="For instance --subject dog.safetensors --style ink.safetensors",
        )
    fields = {name: getattr(args, name) for name in Recipe.__fields__ if name not in _OWN_FLAGS}
    return parse({**fields, "parents": parents, "output": args.out.name.removesuffix(".safetensors")})


def _parents(args: argparse.Namespace, role: str) -> list[dict]:
    """The LoRAs of a role with what was given for each. Raises BadInput where that cannot be told."""
    loras = getattr(args, role)

    def each(flag: str, default) -> list:
        values = getattr(args, flag.replace("-", "_"))
        if values and len(values) != len(loras):
            raise BadInput(
                f"--{flag}: {len(values)} given for {len(loras)} LoRAs of --{role}",
                remedy=f"Give it once for each {role}, in their order, or not at all",
            )
        return values or [default] * len(loras)

    if len(loras) == 1:
        references = [getattr(args, f"reference_{role}")]
    else:
        references = [[path] if path else [] for path in each(f"reference-{role}", "")]
    prompts, weights = each(f"{role}-prompt", ""), each(f"{role}-strength", 1.0)
    return [
        {"lora": lora, "role": role, "prompt": prompt, "strength": weight, "reference": reference}
        for lora, prompt, weight, reference in zip(loras, prompts, weights, references)
    ]


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
    with watched() as show:
        result = run(recipe, host, show)
    if args.report:
        args.report.write_text(json.dumps({**result.public(), "history": result.history}, indent=2) + "\n")
    if result.pictures:
        from ziplora_lib.pictures import png, strip

        parents = result.preflight["parents"]
        roles, names = [parent["role"] for parent in parents], [parent["name"] for parent in parents]
        labels = [balance.caption(point, roles, names) for point, _ in result.pictures]
        sheet = strip([[picture for _, picture in result.pictures]], [""], labels)
        sheet.info = next(picture.info for point, picture in result.pictures if point == 0)
        writer.write_beside(args.out, ".balance.png", png(sheet))
    print(summary(result))
    return 130 if result.stopped else 0


def _zip_many(args: argparse.Namespace) -> int:
    if not args.out_folder.is_dir():
        raise BadInput(
            f"the folder {args.out_folder} of --out-folder does not exist", remedy="Create it, or choose another"
        )
    if args.report:
        _check_json(args.report, "--report")
    if args.overwrite and args.skip_existing:
        raise BadInput("give either --overwrite or --skip-existing", remedy="Leave one of them out")
    from ziplora_lib.commands.zip_many import zip_many

    settings = {name: getattr(args, name) for name in Recipe.__fields__ if name not in {*_OWN_FLAGS, "balance_points"}}
    existing = "overwrite" if args.overwrite else "skip" if args.skip_existing else "refuse"
    where = (args.pairs, args.out_folder, args.model, args.device)
    return zip_many(*where, args.name, settings, existing, args.report, args.ray)


def _bake(args: argparse.Namespace) -> int:
    if bool(args.subject or args.style) == (args.balance is not None):
        raise BadInput("give either --balance, or --subject and --style", remedy="For instance --balance -0.2")
    _check_out(args.out)
    merged = peek(args.file)
    if args.balance is not None:
        weights = balance.weights(args.balance, [parent["role"] for parent in origins(merged)])
    else:
        weights = strengths(merged, {role: getattr(args, role) for role in ROLES})
    _tell(args.out, bake(args.file, args.out, weights, args.overwrite))
    return 0


def _strip(args: argparse.Namespace) -> int:
    from ziplora_lib.commands.strip import strip

    settings = {name: getattr(args, name) for name in ("resolution", "sampler_steps", "guidance")}
    return strip(args.file, args.out, args.model, args.device, args.points, args.seed, args.prompt, settings)


def _split(args: argparse.Namespace) -> int:
    given = {role: getattr(args, f"out_{role}") for role in ROLES}
    for role, paths in given.items():
        for path in paths:
            _check_out(path, f"--out-{role}")
    paths = in_order(peek(args.file), given)
    for path, saved in zip(paths, split(args.file, paths, args.overwrite)):
        _tell(path, saved)
    return 0


def _tell(path: Path, saved: dict) -> None:
    print(f"saved {path}  ({saved['bytes'] / 1e6:.1f} MB)\nprompt with <lora:{path.stem}:1>")


def _check_json(path: Path, flag: str) -> None:
    if not path.parent.is_dir():
        raise BadInput(f"the folder {path.parent} of {flag} does not exist", remedy="Create it, or choose another")
    if path.suffix != ".json" or path.is_dir():
        raise BadInput(f"{flag} {path} is not a .json file", remedy="For instance report.json")


def _check_report(report: Path, out: Path) -> None:
    _check_json(report, "--report")
    if report.resolve() == out.with_suffix(".json").resolve():
        raise BadInput(f"--report {report} is the name of the LoRA's own card", remedy="Give the report another name")


def _check_out(out: Path, flag: str = "--out") -> None:
    if out.suffix != ".safetensors":
        raise BadInput(f"{flag} {out} does not end in .safetensors", remedy="Give the new LoRA that ending")
    writer.check_name(out.name.removesuffix(".safetensors"))


def summary(result) -> str:
    """A finished merge in a few lines."""
    lines = [
        f"saved {result.file}  ({result.saved['bytes'] / 1e6:.1f} MB, largest rounding {result.saved['largest_error']:.1e})"
    ]
    if "error" in result.learned:
        for i, parent in enumerate(result.preflight["parents"]):
            mean = f"; mean coefficient {result.learned['mean'][i]:.2f}" if "mean" in result.learned else ""
            lines.append(
                f"{parent['title']}: error against this LoRA alone {result.learned['error'][i]:.3f} "
                f"(plain sum {result.learned['error_plain_sum'][i]:.3f}){mean}"
            )
    lines.append(result.verdict)
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join([*lines, f"prompt with {result.tag}"])


def _tab(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise BadInput(f"the folder {args.folder} of --folder does not exist", remedy="Create it, or choose another")
    from ziplora_lib.hosts.diffusers import DiffusersHost

    try:
        from ziplora_lib.server import serve
    except ImportError as error:
        raise BadInput(
            f"the tab needs {error.name}", remedy='Install it with this project: pip install ".[headless,tab]"'
        ) from error
    host = DiffusersHost(args.model, args.folder, args.device)
    try:
        serve(host, args.port, args.listen)
    except OSError as error:  # gradio's words for a port that is taken
        raise BadInput(str(error).splitlines()[0], remedy="Give another --port") from error
    return 0


def _inspect(args: argparse.Namespace) -> int:
    views = []
    for path in args.files:
        try:
            views.append({"file": str(path), **inspection.inspected(read(path))})
        except BadInput as error:
            views.append({"file": str(path), "problem": str(error)})
    if args.json:
        print(json.dumps(views, indent=2, ensure_ascii=False))
    else:
        print("\n".join(map(inspection.inspected_text, views)))
    return 2 if any("problem" in view for view in views) else 0


def _compare(args: argparse.Namespace) -> int:
    if len(args.files) < 2:
        raise BadInput("compare takes two LoRAs or more", remedy="Name another file")
    view = inspection.compared([read(path) for path in args.files])
    print(json.dumps(view, indent=2, ensure_ascii=False) if args.json else inspection.compared_text(view))
    return 0 if view["fit"] else 2


def _evaluate(args: argparse.Namespace) -> int:
    from ziplora_lib.evaluation.pairs import read_pairs

    if args.json:
        _check_json(args.json, "--json")
        if args.json.resolve() == args.pairs.resolve():
            raise BadInput(f"--json {args.json} is the list of pairs itself", remedy="Give the results another name")
    for flag, folder in (("--grids", args.grids), ("--zipped", args.zipped)):
        if folder and not folder.is_dir():
            raise BadInput(f"the folder {folder} of {flag} does not exist", remedy="Create it, or choose another")
    pairs = read_pairs(args.pairs)

    from transformers.utils import logging

    from ziplora_lib.evaluation import run, scoring
    from ziplora_lib.evaluation.encoders import Clip, Dino
    from ziplora_lib.hosts.diffusers import DiffusersHost, usable_device
    from ziplora_lib.pictures import png

    plan = run.Plan(
        {name: getattr(args, name) for name in Recipe.__fields__ if name not in DECIDED},
        args.method or ([] if pairs[0].merged else ["ziplora"]),
        args.seeds,
        {role: getattr(args, f"{role}_share") for role in ROLES},
    )
    plan.recipe(pairs[0], "direct")  # refuses bad settings before any model is loaded
    logging.disable_progress_bar()
    report: dict = {}
    shown = stopped = False

    def show(info: dict) -> None:
        nonlocal shown
        shown = True
        print(progress_line(info), end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        try:
            # the model last, which can take minutes
            device = usable_device(args.device)
            clip, dino = Clip(args.clip, device), Dino(args.dino, device)
            host = DiffusersHost(args.model, args.zipped or Path(temporary), args.device)
            for report, sheet in run.evaluate(pairs, plan, host, clip, dino, show):
                if args.grids:
                    name = report["pairs"][-1]["name"]
                    writer.write_beside(args.grids / f"{name}.png", ".png", png(sheet))
                if args.json:  # after each pair, so that a run that is broken off leaves what it has
                    text = json.dumps(report, indent=2, ensure_ascii=False)
                    writer.write_beside(args.json, ".json", f"{text}\n".encode())
        except KeyboardInterrupt:
            stopped = True
        finally:
            if shown:
                print(file=sys.stderr)
    if report:
        print(scoring.text(report))
    if stopped:
        print(f"ziplora: stopped after {len(report.get('pairs', []))} of {len(pairs)} pairs", file=sys.stderr)
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
