"""What was tried to break it, as the README shows it: made from the results of the long runs.

python -m benchmarks.reliability        puts it into the README
"""

from __future__ import annotations

from benchmarks.costs import README, result

BEGIN, END = "<!-- reliability -->\n", "<!-- /reliability -->"


def table() -> str:
    """The block between the marks."""
    rows = ["| Tried | How often | What came of it |", "|---|---|---|"]
    rows += [f"| {what} | {many} | {came} |" for what, many, came in (*failures(), *kills(), *hostile(), *soaked())]
    return "\n".join(rows) + "\n\n" + where() + "\n"


def failures() -> list[tuple[str, str, str]]:
    found = []
    for name, place in (("state-webui", "in the WebUI"), ("failures", "without a WebUI")):
        told = result(name)
        what = f"a failure at a line of a merge, {place}: errors, memory that runs out, a thread that is ended"
        came = f"{told['recovered']:,} times all as before: weights, flags, hooks, devices, LoRAs, random state, files"
        if left := told["injected"] - told["recovered"]:
            came += f"; {left} times the new LoRA was in its place already, whole, though the job had failed"
        if told.get("pictures"):
            came += f"; {told['differing_pictures']} of {told['pictures']} pictures of the same seed differ"
        found.append((what, f"{told['injected']:,} of {told['lines']:,} lines", came))
    return found


def kills() -> list[tuple[str, str, str]]:
    told = result("kills")
    came = (
        f"{told['old file']} times the old file, whole, {told['new file']} times the new one, whole; "
        f"{len(told['wrong'])} times anything else; {told['with a part left']} times half a file under a name that nobody "
        "lists, gone with the next run"
    )
    return [
        (
            "a process killed at a random moment of a merge over an older file, half of them while it writes",
            f"{told['kills']:,}",
            came,
        )
    ]


def hostile() -> list[tuple[str, str, str]]:
    fuzz, asked = result("fuzz"), result("hostile")
    counts = fuzz["counts"]
    slow = f"a traceback, a wrong value, memory beyond the file's size, more than {fuzz['limits']['seconds']} s"
    read = (
        f"{counts['read']:,} read, {counts['refused']:,} refused in one line with file, key and remedy; {counts['failed']} "
        f"other ({slow})"
    )
    return [
        ("LoRA files made wrong by a fuzzer, through all that reads them", f"{fuzz['inputs']:,}", read),
        (
            "hostile requests to the API and forged events of the page, in the WebUI and without it",
            f"{sum(asked['counts'].values()):,}",
            "all refused; nothing outside the Lora folder read or written",
        ),
    ]


def soaked() -> list[tuple[str, str, str]]:
    told = result("soak")
    kinds = told["kinds"]
    many = ", ".join(f"{number} {name}s" if number != 1 else name for name, number in sorted(kinds.items()))
    came = f"{len(told['wrong'])} wrong: pictures compared to the pixel, files to the byte, with those made alone"
    first = next(iter(told["memory"].values()))
    grown = (
        f"{told['gained_bytes'] / 1e6:+.1f} MB of the process ({first['resident'] / 1e6:.0f} before), "
        f"{told['gained_tensors']:+d} tensors, {told['gained_hooks']:+d} hooks"
    )
    merges = list(told["memory"])
    return [
        (
            f"jobs and generations of {told['clients']} clients at once in a WebUI",
            f"{told['done']:,}",
            f"{came} ({many})",
        ),
        ("memory over a hundred merges among them", " → ".join(n.replace("_", " ") for n in merges), grown),
    ]


def where() -> str:
    webui, fuzz = result("state-webui"), result("fuzz")
    cores, threads = fuzz["machine"]["cores"], webui["threads"]
    return (
        f"(WebUI {webui['webui']}, Python {webui['python']}, torch {webui['torch']}, the miniature on a CPU, {cores} cores, "
        f"{threads} thread a process. `make bench-reliability`; a part of each runs with the tests.)"
    )


def main() -> None:
    text = README.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
