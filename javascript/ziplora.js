// The ZipLoRA tab: progress bar, a page that was reloaded during a job, copy the tag, jump to txt2img.

function ziplora_watch(task, timeout) {
    const below = gradioApp().getElementById("ziplora_checked");
    requestProgress(task, below, null, () => localRemove("ziplora_running"), null, timeout);
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
function ziplora_rejoin() {
    const [task, job] = JSON.parse(localGet("ziplora_running"));
    ziplora_watch(task, 0);
    return [job];
}

if (typeof onUiLoaded === "function") {
    onUiLoaded(() => {
        const button = gradioApp().getElementById("ziplora_resume");
        if (button && localGet("ziplora_running")) button.click();
    });
}

async function ziplora_copy(tag) {
    const button = gradioApp().getElementById("ziplora_copy");
    if (navigator.clipboard) {
        await navigator.clipboard.writeText(tag);
    } else { // a page that came over http from another machine
        gradioApp().querySelector("#ziplora_tag textarea, #ziplora_tag input").select();
        document.execCommand("copy");
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
