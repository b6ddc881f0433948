"""The evaluation: for each pair the pictures of each LoRA alone, their plain sum and every merged LoRA, and their scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from torch import Tensor

from ziplora_lib import __version__
from ziplora_lib.calibration import references
from ziplora_lib.errors import BadInput
from ziplora_lib.evaluation import DECIDED
from ziplora_lib.evaluation.encoders import Clip, Dino
from ziplora_lib.evaluation.pairs import PLAIN_SUM, STYLE_ALONE, SUBJECT_ALONE, Pair
from ziplora_lib.evaluation.scoring import judged, summary
from ziplora_lib.hosts.host import Host
from ziplora_lib.job import preflight, prepare, run
from ziplora_lib.lora.reader import read
from ziplora_lib.merge.attach import attach
from ziplora_lib.merge.pairing import refuse_unfit
from ziplora_lib.opening import attached
from ziplora_lib.pictures import strip
from ziplora_lib.recipe import Recipe, parse

THUMBNAIL = 256  # pixels a side, on the sheets


@dataclass(frozen=True)
class Plan:
    """What is the same for every pair. settings: fields of the recipe, of merges and pictures alike; shares: by role.

    seeds: those of the pictures, the same in every row. Raises BadInput for what cannot be.
    """

    settings: Mapping
    methods: Sequence[str]
    seeds: Sequence[int]
    shares: Mapping[str, float]

    def __post_init__(self):
        for role, share in self.shares.items():
            if not 0 < share <= 1:
                raise BadInput(f"the {role} share {share} is not between 0 and 1", remedy="0.5 is half of the way")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise BadInput(
                "the seeds are not whole numbers of 0 or more, each given once", remedy="For instance 1 2 3 4"
            )
        if len(set(self.methods)) < len(self.methods):
            raise BadInput("a method is given twice", remedy="Give each once")

    def recipe(self, pair: Pair, method: str) -> Recipe:
        """How a pair is merged by a method. Raises BadInput for settings that a recipe cannot have."""
        parents = [
            {"lora": pair.subject, "role": "subject", "prompt": pair.subject_prompt},
            {"lora": pair.style, "role": "style", "prompt": pair.style_prompt},
        ]
        decided = {"parents": parents, "output": f"{pair.name}-{method}", "method": method, "balance_points": 1}
        if method == "direct":
            decided["equal_norms"] = False  # the plain sum is of the LoRAs as they are
        return parse({**self.settings, **decided})

    def public(self, pair: Pair) -> dict:
        """As JSON."""
        fields = json.loads(self.recipe(pair, [*self.methods, "direct"][0]).json())
        settings = {name: value for name, value in fields.items() if name not in DECIDED}
        return {"settings": settings, "methods": [*self.methods], "seeds": [*self.seeds], "shares": {**self.shares}}


def evaluate(
    pairs: Sequence[Pair], plan: Plan, host: Host, clip: Clip, dino: Dino, tell: Callable[[dict], None] = lambda _: None
) -> Iterator[tuple[dict, Image.Image]]:
    """After each pair: the report so far, as JSON, and the sheet of that pair.

    The report has what decided the results (versions, model, CLIP, DINO, settings, seeds), under "pairs" what `evaluated`
    says of each, and the "summary" of `scoring`. Raises BadInput, before any picture, for what can be refused then.
    """
    check(pairs, plan, host)
    libraries = ("torch", "diffusers", "transformers", "numpy", "Pillow")
    report = {
        "versions": {"ziplora": __version__, "python": sys.version.split()[0], **{n: version(n) for n in libraries}},
        "model": asdict(host.model()),
        "clip": clip.public(),
        "dino": dino.public(),
        **plan.public(pairs[0]),
        "listed_pairs": [pair.name for pair in pairs],
        "pairs": [],
    }
    for i, pair in enumerate(pairs):
        where = f"pair {i + 1}/{len(pairs)}"
        told, sheet = evaluated(
            pair, plan, host, clip, dino, lambda info, at=where: tell({**info, "phase": f"{at} {info['phase']}"})
        )
        done = [*report["pairs"], told]
        report = {**report, "pairs": done, "summary": summary(done)}
        yield report, sheet


def check(pairs: Sequence[Pair], plan: Plan, host: Host) -> None:
    """Raises BadInput for any pair that cannot be merged or drawn on the host's model, before any of them is."""
    for pair in pairs:
        if clash := pair.merged.keys() & {*plan.methods}:
            raise BadInput(f"two rows of {pair.name} are called {min(clash)}", remedy="Rename the merged LoRA's row")
        for method in ("direct", *plan.methods):
            preflight(plan.recipe(pair, method), host)
        for file in pair.merged.values():
            lora, model = read(Path(file)), host.model()
            shapes = {key: slot.shape for key, slot in host.slots([*lora.layers, *lora.vectors]).items()}
            refuse_unfit(lora, shapes, model.name, model.base)


def evaluated(
    pair: Pair, plan: Plan, host: Host, clip: Clip, dino: Dino, tell: Callable[[dict], None] = lambda _: None
) -> tuple[dict, Image.Image]:
    """All that is measured on a pair, as JSON, and a sheet of its pictures, a row each.

    rows: for every row a picture for each prompt and seed with its scores, cosines of -1 to 1; own_prompt: each LoRA alone on
    its own prompt; thresholds: see `scoring.judged`; merged: the LoRAs of the merged rows. tell gets a dict a picture, with
    the keys of a job's progress. Raises as `job.run` does.
    """
    plain = plan.recipe(pair, "direct")
    judge = _Judge(pair, clip, dino, plain.resolution)
    rows: dict[str, list[dict]] = {}
    thumbnails: dict[str, list[Image.Image]] = {}

    def draw(row: str, prompts: Sequence[str]) -> tuple[list[dict], list[Image.Image]]:
        pictures, told = [], []
        for prompt in prompts:
            for seed in plan.seeds:
                tell({"phase": row, "step": len(told), "steps": len(prompts) * len(plan.seeds)})
                latent = host.sample(prompt, seed, plain.resolution, plain.sampler_steps, plain.guidance)
                picture = host.decode(latent)
                told.append({"prompt": prompt, "seed": seed, **judge(picture, prompt)})
                pictures.append(picture.resize((THUMBNAIL, THUMBNAIL)))
        return told, pictures

    ready = preflight(plain, host)
    own = {}
    with host.session(), host.embeddings(ready.loras):
        pairing, _, warnings = prepare(plain, ready, host, lambda _: None)
        with attach(ready.slots, pairing.stacks, pairing.vectors) as router:
            for i, (role, prompt) in enumerate((("subject", pair.subject_prompt), ("style", pair.style_prompt))):
                router.alone(i)
                told, _ = draw(f"{role} on its own prompt", [prompt])
                own[role] = [{"seed": picture["seed"], role: picture[role]} for picture in told]
            choices = (partial(router.alone, 0), partial(router.alone, 1), router.merged)
            for row, choose in zip((SUBJECT_ALONE, STYLE_ALONE, PLAIN_SUM), choices):
                choose()
                rows[row], thumbnails[row] = draw(row, pair.prompts)
    files, merged = dict(pair.merged), {}
    for method in plan.methods:
        result = run(plan.recipe(pair, method), host, tell)
        files[method] = result.file
        merged[method] = {"learned": result.learned, "warnings": result.warnings}
    for row, file in files.items():
        lora = read(Path(file))
        with host.session(), host.embeddings([lora]), attached(lora, host):
            rows[row], thumbnails[row] = draw(row, pair.prompts)
        merged[row] = {"file": lora.path.name, "sha256": lora.hash, **merged.get(row, {})}
    thresholds = judged(rows, {role: [p[role] for p in own[role]] for role in own}, plan.shares)
    labels = [f"{prompt[:30]}, seed {seed}" for prompt in pair.prompts for seed in plan.seeds]
    view = {
        "name": pair.name,
        "subject": {"file": ready.loras[0].path.name, "sha256": ready.loras[0].hash, "prompt": pair.subject_prompt},
        "style": {"file": ready.loras[1].path.name, "sha256": ready.loras[1].hash, "prompt": pair.style_prompt},
        "reference_pictures": judge.references,
        "merged": merged,
        "warnings": [*ready.report["warnings"], *warnings],
        "own_prompt": own,
        "thresholds": thresholds,
        "rows": rows,
    }
    return view, strip(list(thumbnails.values()), list(thumbnails), labels)


class _Judge:
    """A picture's scores against one pair's references, which are cropped to their middle square as the pictures are."""

    def __init__(self, pair: Pair, clip: Clip, dino: Dino, resolution: int):
        self.clip, self.dino = clip, dino
        subject, style = (references([path], resolution) for path in (pair.subject_pictures, pair.style_pictures))
        self.references = {"subject": len(subject), "style": len(style)}
        self._subject, self._style = dino.pictures(subject), clip.pictures(style)
        self._texts: dict[str, Tensor] = {}

    def __call__(self, picture: Image.Image, prompt: str) -> dict[str, float]:
        """{"style", "subject", "text"}: means of cosines."""
        if prompt not in self._texts:
            self._texts[prompt] = self.clip.texts([prompt])
        seen = self.clip.pictures([picture])
        return {
            "style": _cosine(seen, self._style),
            "subject": _cosine(self.dino.pictures([picture]), self._subject),
            "text": _cosine(seen, self._texts[prompt]),
        }


def _cosine(one: Tensor, others: Tensor) -> float:
    """The mean cosine of a vector (1, n) to others (k, n), all of length 1."""
    return float((one @ others.T).mean())
