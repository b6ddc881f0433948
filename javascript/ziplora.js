// The ZipLoRA tab: progress bar, a page that was reloaded during a job, copy the tag, jump to txt2img.

function ziplora_watch(task, timeout) {
    const below = gradioApp().getElementById("ziplora_checked");
    requestProgress(task, below, null, () => {}, null, timeout);
}

// [task, job, …] -> [task id, job]; without a job, Zip was refused and there is nothing to watch
function ziplora_submit(_task, job) {
    if (!job || typeof requestProgress !== "function") return ["", job];
    const task = randomId();
    localSet("ziplora_running", JSON.stringify([task, job]));
    ziplora_watch(task, 40);
    return [task, job];
}

// the job that was running when the page was left
let ziplora_rejoined = false;

function ziplora_rejoin() {
    ziplora_rejoined = true;
    const [task, job] = JSON.parse(localGet("ziplora_running"));
    ziplora_watch(task, 0);
    return [job];
}

// only the server's answer ends a job: a page that is left breaks its progress bar off too
function ziplora_ended() {
    if (typeof localRemove === "function") localRemove("ziplora_running");
    return [];
}

if (typeof onUiLoaded === "function") {
    onUiLoaded(() => {
        if (!localGet("ziplora_running")) return;
        // gradio's buttons are there before they listen, and the progress bar needs the WebUI's options
        const timer = setInterval(() => {
            if (ziplora_rejoined) clearInterval(timer);
            else if ("show_progressbar" in opts) gradioApp().getElementById("ziplora_resume")?.click();
        }, 500);
    });
}

async function ziplora_copy(tag) {
    const button = gradioApp().getElementById("ziplora_copy");
    if (navigator.clipboard) {
        await navigator.clipboard.writeText(tag);
    } else { // a page that came over http from another machine
        const text = document.body.appendChild(document.createElement("textarea"));
        text.value = tag;
        text.select();
        document.execCommand("copy");
        text.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
    return [];
}

function ziplora_send(tag) {
    const prompt = gradioApp().querySelector("#txt2img_prompt textarea");
    if (!prompt.value.includes(tag)) {
        prompt.value = [prompt.value.trimEnd(), tag].filter(Boolean).join(" ");
        updateInput(prompt);
    }
    switch_to_txt2img();
    return [];
}
