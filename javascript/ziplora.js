// The ZipLoRA tab: progress bar, the list of LoRAs, what was picked last, the tag into txt2img.

// --- the run ----------------------------------------------------------------------------------------

let ziplora_watched = "";

// [job] -> [job]: the host's progress bar and live preview for it, once
function ziplora_watch(job) {
    if (job && job !== ziplora_watched && typeof requestProgress === "function") {
        ziplora_watched = job;
        const bar = gradioApp().getElementById("ziplora_bar");
        const preview = gradioApp().getElementById("ziplora_live_preview");
        gradioApp().getElementById("ziplora_run").scrollIntoView({block: "nearest"});
        requestProgress(`ziplora ${job}`, bar, preview, () => {}, null, 40);
    }
    return [job];
}

// --- a page that is loaded (again) -----------------------------------------------------------------

let ziplora_ready = false;

// gradio's buttons are there before they listen: pressed until one answers
function ziplora_rejoined() {
    if (!ziplora_ready) {
        ziplora_ready = true;
        gradioApp().getElementById("ziplora_restore").click();
    }
    return [];
}

onUiLoaded(() => {
    const root = gradioApp().getElementById("ziplora_tab");
    if (!root) return;
    root.classList.toggle("ziplora_alone", !gradioApp().querySelector("#txt2img_prompt"));
    const timer = setInterval(() => {
        if (ziplora_ready) clearInterval(timer);
        // the progress bar needs the WebUI's options
        else if ("show_progressbar" in opts) gradioApp().getElementById("ziplora_resume").click();
    }, 500);
});

const ziplora_page = Math.random().toString(36).slice(2);

// keeps what is picked, five values a card, for the next visit; -> which page asks, and the values
function ziplora_keep(cards, values) {
    const slots = [];
    for (let i = 0; i < cards; i++) {
        const [lora, role, prompt, strength] = values.slice(5 * i);
        slots.push(lora ? {lora, role, prompt, strength} : null);
    }
    if (slots.some(Boolean)) localSet("ziplora_last", JSON.stringify(slots));
    return [ziplora_page, ...values];
}

function ziplora_last(_given, ...rest) {
    return [localGet("ziplora_last", "") || "", ...rest];
}

// --- picking ----------------------------------------------------------------------------------------

let ziplora_choice = {};
let ziplora_listed; // which answer of the server is in the dialog

function ziplora_dialog() {
    let dialog = gradioApp().getElementById("ziplora_dialog");
    if (dialog) return dialog;
    dialog = document.createElement("dialog");
    dialog.id = "ziplora_dialog";
    dialog.setAttribute("aria-label", "LoRAs");
    dialog.innerHTML = "<div class='ziplora_find'><input type='search' placeholder='Search by name or folder' " +
        "aria-label='Search'><select aria-label='Base model'></select><span></span><button type='button'>Close</button></div>" +
        "<div class='ziplora_choices' role='listbox'></div>";
    (gradioApp().querySelector("#ziplora_tab") || document.body).append(dialog);
    dialog.querySelector(".ziplora_find button").onclick = () => dialog.close();
    dialog.onclick = (event) => event.target === dialog && dialog.close();
    dialog.querySelector("input").oninput = ziplora_filter;
    dialog.querySelector("select").onchange = ziplora_filter;
    dialog.addEventListener("keydown", ziplora_keys);
    dialog.querySelector(".ziplora_choices").onclick = (event) => {
        const chosen = event.target.closest(".ziplora_choice");
        if (!chosen) return;
        ziplora_choice.lora = chosen.dataset.lora;
        dialog.close();
        gradioApp().getElementById("ziplora_choose").click();
    };
    return dialog;
}

function ziplora_browse(card) {
    ziplora_choice = {card};
    const dialog = ziplora_dialog();
    dialog.querySelector(".ziplora_choices").textContent = "Looking at the LoRAs …";
    dialog.querySelector("input").value = "";
    dialog.showModal();
    dialog.querySelector("input").focus();
    return [];
}

// the server's list is there; gradio puts it into the page a moment later
function ziplora_browsed(patience = 200) {
    const list = gradioApp().querySelector("#ziplora_list [data-at]");
    if (patience && (!list || list.dataset.at === ziplora_listed)) {
        setTimeout(() => ziplora_browsed(patience - 1), 50);
        return [];
    }
    ziplora_listed = list?.dataset.at;
    const dialog = ziplora_dialog();
    const found = list ? list.querySelectorAll(".ziplora_choice") : [];
    const choices = dialog.querySelector(".ziplora_choices");
    choices.replaceChildren(...[...found].map((choice) => choice.cloneNode(true)));
    if (!found.length) choices.textContent = list?.textContent || "The list did not come: close this, and try again";
    const bases = [...new Set([...found].map((choice) => choice.dataset.base).filter(Boolean))].sort();
    const select = dialog.querySelector("select");
    const before = select.value;
    select.replaceChildren(new Option("every base", ""), ...bases.map((base) => new Option(base, base)));
    select.value = bases.includes(before) ? before : "";
    ziplora_filter();
    return [];
}

function ziplora_filter() {
    const dialog = ziplora_dialog();
    const wanted = dialog.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
    const base = dialog.querySelector("select").value;
    let left = 0;
    for (const choice of dialog.querySelectorAll(".ziplora_choice")) {
        const fits = wanted.every((word) => choice.dataset.search.includes(word)) && (!base || choice.dataset.base === base);
        choice.hidden = !fits;
        left += fits;
    }
    dialog.querySelector(".ziplora_find span").textContent = `${left} LoRAs`;
}

// arrows go through the cards, Enter in the search takes the first; Escape is the dialog's own
function ziplora_keys(event) {
    event.stopPropagation(); // the WebUI takes Escape for "interrupt", and Enter for "generate"
    const seen = [...ziplora_dialog().querySelectorAll(".ziplora_choice:not([hidden])")];
    if (event.key === "Enter" && event.target.type === "search") {
        event.preventDefault();
        seen[0]?.click();
        return;
    }
    const at = seen.indexOf(document.activeElement);
    const row = seen.filter((choice) => choice.offsetTop === seen[0].offsetTop).length || 1;
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: row, ArrowUp: -row}[event.key];
    const typing = event.target.type === "search" && event.key !== "ArrowDown";
    if (!step || typing || event.target.tagName === "SELECT") return;
    event.preventDefault();
    seen[at < 0 ? 0 : Math.min(seen.length - 1, Math.max(0, at + step))]?.focus();
}

function ziplora_chosen(_given, ...rest) {
    return [JSON.stringify(ziplora_choice), ...rest];
}

function ziplora_prompt(_given, ...rest) {
    return [gradioApp().querySelector("#txt2img_prompt textarea")?.value || "", ...rest];
}

// --- the result -------------------------------------------------------------------------------------

async function ziplora_copy(text) {
    const button = gradioApp().getElementById("ziplora_copy");
    if (navigator.clipboard) {
        await navigator.clipboard.writeText(text);
    } else { // a page that came over http from another machine
        const area = document.body.appendChild(document.createElement("textarea"));
        area.value = text;
        area.select();
        document.execCommand("copy");
        area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
    return [];
}

// the tag behind what is in the prompt; into an empty one its words too
function ziplora_send(tag, words) {
    const prompt = gradioApp().querySelector("#txt2img_prompt textarea");
    if (!prompt.value.includes(tag)) {
        prompt.value = [prompt.value.trim() ? prompt.value.trimEnd() : words, tag].filter(Boolean).join(" ");
        updateInput(prompt);
    }
    switch_to_txt2img();
    return [];
}

function ziplora_generate(tag, words) {
    ziplora_send(tag, words);
    setTimeout(() => gradioApp().getElementById("txt2img_generate").click(), 100);
    return [];
}
