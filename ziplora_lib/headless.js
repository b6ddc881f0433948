// What of the WebUI's page the tab's own script calls, for a page without a WebUI: the same names, the same behaviour.

const opts = {show_progressbar: true, live_preview_refresh_period: 500};

const gradioApp = () => document;
const localSet = (key, value) => localStorage.setItem(key, value);
const localGet = (key, fallback) => localStorage.getItem(key) ?? fallback;

function onUiLoaded(callback) {
    const timer = setInterval(() => {
        if (!document.getElementById("ziplora_tab")) return;
        clearInterval(timer);
        callback();
    }, 100);
}

// a bar above `container` and live pictures in `gallery`, for as long as the server is at work on the task
async function requestProgress(task, container, gallery, atEnd, _onProgress, patience = 40) {
    const bar = document.createElement("div");
    bar.className = "progressDiv";
    const inner = bar.appendChild(document.createElement("div"));
    inner.className = "progress";
    container.before(bar);
    const began = Date.now();
    let picture = null, shown = 0, wasActive = false;
    for (;;) {
        const body = JSON.stringify({id_task: task, id_live_preview: shown});
        const headers = {"Content-Type": "application/json"};
        const told = await fetch("internal/progress", {method: "POST", headers, body}).then((r) => r.json()).catch(() => null);
        if (!told || told.completed || (wasActive && !told.active)) break;
        wasActive ||= told.active;
        if (!told.active && !told.queued && Date.now() - began > 1000 * patience) break;
        inner.style.width = `${100 * (told.progress || 0)}%`;
        const left = told.eta ? ` ETA: ${Math.round(told.eta)}s` : "";
        const share = told.progress ? ` ${Math.round(100 * told.progress)}%${left}` : "";
        inner.textContent = `${told.textinfo || ""}${share}`;
        document.title = share ? `[${share.trim()}] ZipLoRA` : "ZipLoRA";
        if (told.live_preview && gallery) {
            picture ||= gallery.insertBefore(Object.assign(document.createElement("div"), {className: "livePreview"}),
                gallery.firstElementChild);
            picture.replaceChildren(Object.assign(new Image(), {src: told.live_preview, alt: "the picture that is made"}));
            shown = told.id_live_preview;
        }
        await new Promise((done) => setTimeout(done, opts.live_preview_refresh_period));
    }
    document.title = "ZipLoRA";
    bar.remove();
    picture?.remove();
    atEnd();
}
