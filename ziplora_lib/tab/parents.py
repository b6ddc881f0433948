"""Picking: a card for each LoRA that goes in, with its picture, what its file says, prompt and strength."""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import gradio as gr

from ziplora_lib.errors import BadInput
from ziplora_lib.hosts.host import Entry
from ziplora_lib.later import later
from ziplora_lib.naming import ROLES, whole
from ziplora_lib.tab import words
from ziplora_lib.tab.controls import hint, property_of
from ziplora_lib.tab.place import Place
from ziplora_lib.tab.running import JS, QUIET
from ziplora_lib.tab.uploads import Upload

if TYPE_CHECKING:
    from ziplora_lib.catalogue import Facts

metadata = later("ziplora_lib.lora.metadata")

# as many cards as there are; the first two are always seen
MOST = 6
# <lora:name:0.8>, <lora:name:te=0.5:unet=0.8>, <lora:name>
_TAG = re.compile(r"<lora:([^:<>]+)((?::[^:<>]*)*)>")


class Parents:
    """The cards. `inputs` are what they hold, `of(values)` reads it; `fill` puts LoRAs into them, for `filled`."""

    def __init__(self, place: Place):
        self.place = place
        self.cards: list[dict[str, gr.components.Component]] = []
        # what was filled in rather than typed: it goes where its LoRA goes
        self.suggested = gr.State({})
        self.given = gr.Textbox(visible=False, elem_id="ziplora_given")
        with gr.Row(elem_id="ziplora_pick_row"):
            self.swap = gr.Button("Swap", elem_id="ziplora_swap", size="sm", min_width=110)
            self.another = gr.Button("Add another", elem_id="ziplora_another", size="sm", min_width=110)
            self.from_prompt = gr.Button("From prompt", elem_id="ziplora_from_prompt", size="sm", min_width=110)
            self.refresh = gr.Button("Refresh", elem_id="ziplora_refresh", size="sm", min_width=110)
        with gr.Row(elem_id="ziplora_pair", equal_height=False):
            for i in range(MOST):
                self.cards.append(self._card(i))
        # what JavaScript presses: a card that was chosen in the list, the choice of the last visit
        self.choose = gr.Button("Choose", elem_id="ziplora_choose")
        self.restore = gr.Button("Restore", elem_id="ziplora_restore")
        self.list = gr.HTML(elem_id="ziplora_list")
        parts = ("lora", "role", "prompt", "strength", "reference")
        self.inputs = [card[part] for card in self.cards for part in parts]
        shown = ("column", "lora", "role", "facts", "prompt", "note", "strength", "reference")
        self.filled = [*(card[part] for card in self.cards for part in shown), self.suggested]

    def _card(self, i: int) -> dict:
        role = _usual_role(i)
        name = f"ziplora_{{}}_{i + 1}"
        label = f"{ROLES[i].capitalize()} LoRA" if i < 2 else f"LoRA {i + 1}"
        with gr.Column(
            variant="compact",
            elem_id=name.format("card"),
            min_width=280,
            visible=i < 2,
            elem_classes=["ziplora_parent"],
        ) as column:
            facts = gr.HTML(self.facts(None), elem_id=name.format("facts"))
            with gr.Row(elem_classes=["ziplora_pick"]):
                lora = gr.Dropdown(
                    self.place.names() if i < 2 else [],
                    label=label,
                    info=("Who or what is in the picture", "How the picture looks", "One more for the same new LoRA")[
                        min(i, 2)
                    ],
                    elem_id=name.format("lora"),
                )
                browse = gr.Button("Browse", size="sm", elem_id=name.format("browse"), min_width=90, scale=0)
            chosen = gr.Radio(
                list(ROLES), value=role, label="It is the", info="Who is in it, or how it looks", elem_id=name.format("role")
            )  # fmt: skip
            prompt = gr.Textbox(
                label="Prompt", info=hint("prompt", parent=True), lines=2, elem_id=name.format("prompt")
            )
            note = gr.HTML(elem_id=name.format("note"), elem_classes=["ziplora_note"])
            strength = gr.Slider(
                0.1,
                2,
                property_of("strength", parent=True)["default"],
                step=0.05,
                label="Strength",
                info=hint("strength", parent=True),
                elem_id=name.format("strength"),
            )
            with gr.Accordion("Training pictures", open=False, elem_id=name.format("references")):
                reference = Upload(
                    label="Optional: without them the LoRA makes its own calibration pictures",
                    file_count="multiple",
                    file_types=["image"],
                    height=120,
                    elem_id=name.format("reference"),
                )
            remove = gr.Button("Remove", size="sm", elem_id=name.format("remove"), visible=i >= 2)
        return {
            "column": column,
            "facts": facts,
            "lora": lora,
            "browse": browse,
            "role": chosen,
            "prompt": prompt,
            "note": note,
            "strength": strength,
            "reference": reference,
            "remove": remove,
        }

    # --- what is there -------------------------------------------------------------------------------

    def listed(self) -> list:
        """The pickers, with the LoRAs as they are listed now."""
        choices = self.place.names()
        return [gr.update(choices=choices) for _ in self.cards]

    @property
    def pickers(self) -> list[gr.Dropdown]:
        return [card["lora"] for card in self.cards]

    def entry(self, name: str | None) -> Entry | None:
        try:
            return next((entry for entry in self.place.host.listing() if entry.name == name), None)
        except BadInput:
            return None

    def slots(self, values: Sequence) -> list[dict]:
        """What each card holds, {} for an empty one; what follows in the values is not the cards'."""
        held = []
        for lora, role, prompt, strength, reference in zip(*[iter(values[: len(self.inputs)])] * 5):
            paths = [file if isinstance(file, str) else file.name for file in reference or []]
            fields = {"lora": lora, "role": role, "prompt": prompt or "", "strength": strength, "reference": paths}
            held.append(fields if lora else {})
        return held

    def of(self, values: Sequence) -> list[dict]:
        """The LoRAs that are picked, as the recipe has them."""
        return [slot for slot in self.slots(values) if slot]

    # --- filling in ------------------------------------------------------------------------------------

    def fill(self, slots: Sequence[Mapping], suggested: Mapping) -> list:
        """Updates for `filled`: a LoRA for each card, {} for none; a prompt that is not given is suggested by the file."""
        choices, updates, kept = self.place.names(), [], {}
        used = max([2, *(i + 1 for i, slot in enumerate(slots) if slot)])
        for i in range(MOST):
            given = dict(slots[i]) if i < len(slots) else {}
            name, prompt, note = given.get("lora"), given.get("prompt", ""), ""
            if name and "prompt" not in given:
                prompt, note = self.suggestion(name)
                kept[str(i)] = prompt
            elif prompt and prompt in suggested.values():
                note, kept[str(i)] = self.suggestion(name)[1], prompt
            role = given.get("role") or _usual_role(i)
            updates += [
                gr.update(visible=i < used),
                gr.update(value=name, choices=choices),
                role,
                self.facts(name),
                prompt,
                note,
                given.get("strength", 1.0),
                given.get("reference") or None,
            ]
        return [*updates, {**{k: v for k, v in suggested.items() if k == "output"}, **kept}]

    def suggestion(self, name: str) -> tuple[str, str]:
        """The prompt that a LoRA's file suggests, and a line on where it came from."""
        try:
            found, source = metadata.trigger_words(self.place.host.peek(name))
        except BadInput as error:
            return "", words.error(str(error), "Cannot read it")
        if found := whole(found):
            return found, words.line(f"Filled in from the {source}.")
        return "", words.line("Its file names no trigger word: write its prompt yourself.")

    def facts(self, name: str | None) -> str:
        """A LoRA's picture, folder, rank, base and kind."""
        entry = self.entry(name) if name else None
        facts = self.place.catalogue.facts(entry) if entry else None
        return _card_html(entry, facts, bool(self.place.host.option("thumbnails")))

    def cards_html(self) -> str:
        """All LoRAs as cards, for the list that JavaScript opens."""
        found, pictures = self.place.catalogue.at_once(), bool(self.place.host.option("thumbnails"))
        cards = "".join(_choice_html(entry, facts, pictures) for entry, facts in found)
        # another text each time, so that the page can tell when it has come
        return f"<div data-at='{time.time()}'>{cards or words.line('There is no LoRA in the Lora folder yet.')}</div>"

    # --- what happens -------------------------------------------------------------------------------------

    def connect(self, output: gr.Textbox, pattern: Callable[[list[dict]], str], check: Callable) -> None:
        """Wires the cards. pattern(parents) names the output; check(event) shows the preflight after an event."""

        def named(parents: list[dict], current: str | None, suggested: dict) -> tuple[str, dict]:
            """The output name, which follows the LoRAs for as long as nobody has written another."""
            current = current or ""
            if len(parents) < 2 or current.strip() not in ("", suggested.get("output", "")):
                return current, suggested
            name = pattern(parents)
            return name, {**suggested, "output": name}

        def picked(i: int):
            def pick(suggested, current, *values):
                name, prompt = values[5 * i], values[5 * i + 2] or ""
                suggested, note = dict(suggested), ""
                if name:
                    found, note = self.suggestion(name)
                    if prompt.strip() in ("", suggested.get(str(i), "")):
                        prompt, suggested[str(i)] = found, found
                    else:
                        shortened = found if len(found) <= 200 else found[:200] + " …"
                        note = words.line("Your prompt was kept." + (f" Its file says “{shortened}”." if found else ""))
                current, suggested = named(self.of(values), current, suggested)
                return self.facts(name), prompt, note, current, suggested

            return pick

        def refilled(make: Callable[[str, list[dict]], Sequence[Mapping]]):
            """An event that puts other LoRAs into the cards: make(text, slots) -> the new slots."""

            def event(text, suggested, current, *values):
                try:
                    made = make(text or "", self.slots(values))
                    slots = [slot and {"role": _usual_role(i), **slot} for i, slot in enumerate(made)]
                except BadInput as error:
                    unchanged = [gr.update() for _ in self.filled]
                    return [*unchanged, gr.update(), words.error(str(error), "Not filled in")]
                updates = self.fill(slots, suggested)
                current, updates[-1] = named([slot for slot in slots if slot], current, updates[-1])
                return [*updates, current, ""]

            return event

        message = gr.HTML(elem_id="ziplora_picking")
        held, filled = [self.suggested, output, *self.inputs], [*self.filled, output, message]
        for i, card in enumerate(self.cards):
            outputs = [card["facts"], card["prompt"], card["note"], output, self.suggested]
            check(card["lora"].input(picked(i), held, outputs, **QUIET))
            for event in (card["prompt"].blur, card["strength"].release, card["role"].input):
                check(event)
            opening = {JS: f"() => ziplora_browse({i})"}
            opened = card["browse"].click(self.cards_html, None, self.list, **opening, **QUIET)
            opened.then(None, None, None, **{JS: "() => ziplora_browsed()"})
        for button, make, script in (
            (self.swap, _swapped, ""),
            (self.from_prompt, self._of_prompt, "ziplora_prompt"),
            (self.choose, _chosen, "ziplora_chosen"),
            (self.restore, self._of_last_visit, "ziplora_last"),
            *((card["remove"], _without(i), "") for i, card in enumerate(self.cards)),
        ):
            scripted = {JS: f"(...all) => {script}(...all.slice(0, {1 + len(held)}))"} if script else {}
            check(button.click(refilled(make), [self.given, *held], filled, **scripted, **QUIET))
        self.refresh.click(self._rescan, None, self.pickers, **QUIET)
        columns = [card["column"] for card in self.cards]
        self.another.click(self._one_more, self.pickers, [*columns, *self.pickers], **QUIET)

    def _rescan(self):
        self.place.host.refresh()
        return self.listed()

    def _one_more(self, *picked):
        """One more card than LoRAs that are picked."""
        seen = min(MOST, max([2, *(i + 1 for i, name in enumerate(picked) if name)]) + 1)
        visible = [gr.update(visible=i < seen) for i in range(MOST)]
        return [*visible, *self.listed()]

    def _of_prompt(self, text: str, slots: list[dict]) -> list[dict]:
        """The LoRAs of a prompt's tags with their strengths: a subject first, then styles, as the cards stand."""
        found = {name.strip(): _strength(weights) for name, weights in _TAG.findall(text)}
        if not found:
            raise BadInput(
                "the txt2img prompt has no <lora:…> tag", remedy="Put the tags of the LoRAs into it, or pick them here"
            )
        if len(found) > MOST:
            raise BadInput(f"the prompt has {len(found)} LoRAs", remedy=f"Keep {MOST} or fewer")
        names = self.place.names()
        missing = [name for name in found if name not in names]
        if missing:
            raise BadInput(
                f"the prompt's {', '.join(missing)} is not among the LoRAs",
                remedy="Use the file's name in the tag, or refresh the list",
            )
        return [{"lora": name, "strength": strength} for name, strength in found.items()]

    def _of_last_visit(self, text: str, slots: list[dict]) -> list[dict]:
        """What was picked when the page was left, as far as it is still there."""
        try:
            last = json.loads(text or "[]")
            kept = [
                {
                    "lora": str(slot["lora"]),
                    "role": slot["role"] if slot["role"] in ROLES else "style",
                    "prompt": str(slot["prompt"]),
                    "strength": float(slot["strength"]),
                }
                if slot
                else {}
                for slot in last[:MOST]
            ]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return slots
        names = set(self.place.names())
        return [slot if slot.get("lora") in names else {} for slot in kept] or slots


def _usual_role(i: int) -> str:
    """What a card is for, as long as nobody has said otherwise."""
    return "style" if i else "subject"


def _swapped(_text: str, slots: list[dict]) -> list[dict]:
    """The first two LoRAs in each other's place; roles stay where they are."""
    first, second = ({k: v for k, v in slot.items() if k != "role"} for slot in slots[:2])
    return [second, first, *slots[2:]]


def _chosen(text: str, slots: list[dict]) -> list[dict]:
    """Another LoRA in one card, as the list of cards says: {"card", "lora"}."""
    try:
        chosen = json.loads(text)
        card, name = range(MOST)[chosen["card"]], str(chosen["lora"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise BadInput("this is no LoRA of the list", remedy="Press Browse and choose one") from error
    role = {"role": slots[card]["role"]} if slots[card] else {}
    return [*slots[:card], {**role, "lora": name}, *slots[card + 1 :]]


def _without(i: int) -> Callable[[str, list[dict]], list[dict]]:
    return lambda _text, slots: [*slots[:i], *slots[i + 1 :]]


def _strength(weights: str) -> float:
    """The strength in a tag: that of the UNet, where there are several; 1 where it is none that a merge takes."""
    named = dict(part.split("=", 1) for part in weights.split(":") if "=" in part)
    plain = [part for part in weights.split(":") if part and "=" not in part]
    text = named.get("unet") or (plain[1] if len(plain) > 1 else plain[0] if plain else named.get("te", "1"))
    try:
        return float(text) if 0.1 <= float(text) <= 2 else 1.0
    except ValueError:
        return 1.0


def _chips(entry: Entry, facts: Facts) -> str:
    told = [facts.base, facts.kind, f"rank {facts.rank}" if facts.rank else "", entry.folder and f"in {entry.folder}"]
    return " · ".join(html.escape(text) for text in told if text)


def _picture(entry: Entry, pictures: bool) -> str:
    if not pictures or not entry.preview:
        return f"<span class='ziplora_no_picture' aria-hidden='true'>{html.escape(entry.name[:1].upper())}</span>"
    return f"<img src='{html.escape(entry.preview, quote=True)}' alt='' loading='lazy'>"


def _card_html(entry: Entry | None, facts: Facts | None, pictures: bool) -> str:
    if entry is None or facts is None:
        return "<div class='ziplora_facts ziplora_none'>nothing picked</div>"
    said = f"<span class='error'>{html.escape(facts.problem)}</span>" if facts.problem else _chips(entry, facts)
    told = f"<div><b>{html.escape(entry.name)}</b><br>{said}</div>"
    return f"<div class='ziplora_facts'>{_picture(entry, pictures)}{told}</div>"


def _choice_html(entry: Entry, facts: Facts, pictures: bool) -> str:
    name, search = (html.escape(text, quote=True) for text in (entry.name, f"{entry.folder} {entry.name}".lower()))
    said = "cannot be read" if facts.problem else _chips(entry, facts)
    return (
        f"<button type='button' class='ziplora_choice' data-lora=\"{name}\" data-search=\"{search}\" "
        f'data-base="{html.escape(facts.base, quote=True)}">{_picture(entry, pictures)}'
        f"<b>{html.escape(entry.name)}</b><small>{said}</small></button>"
    )
