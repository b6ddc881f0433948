"""The tab in a page, by what a person sees: the same in a WebUI and without one."""

import time

PATIENCE = 240_000


class Tab:
    def __init__(self, page):
        self.page = page
        page.wait_for_selector("#ziplora_zip", state="attached", timeout=60_000)
        if page.locator("#tabs > .tab-nav").count():
            page.click("#tabs > .tab-nav >> text=ZipLoRA")
        page.wait_for_selector("#ziplora_zip", state="visible", timeout=60_000)
        # until the page has asked for a running job and for what was picked last
        page.wait_for_function("typeof ziplora_ready !== 'undefined' && ziplora_ready", timeout=60_000)
        self.settle()

    def __call__(self, part: str):
        # gr.HTML carries its id twice, outside and inside
        return self.page.locator(f"#ziplora_{part}").last

    def text(self, field: str):
        return self.page.locator(f"#ziplora_{field} :is(textarea, input)").first

    def number(self, field: str):
        return self.page.locator(f"#ziplora_{field} input[type=number]")

    def section(self, name: str) -> None:
        self.page.click(f"#ziplora_sections > .tab-nav >> text={name}")
        self.settle()

    def choices(self, field: str) -> list[str]:
        self.text(field).click()
        names = self.page.locator(f"#ziplora_{field} ul li").all_inner_texts()
        self.text(field).blur()
        return [name.strip().lstrip("✓").strip() for name in names]

    def choose(self, field: str, name: str) -> None:
        self.text(field).fill(name)
        self.page.locator(f"#ziplora_{field} ul li[aria-label='{name}']").click()
        self.settle()

    def pick(self, card: int, name: str) -> None:
        self.choose(f"lora_{card}", name)

    def settle(self) -> None:
        """Waits for the events that are on their way."""
        self.page.wait_for_timeout(300)
        busy = "#ziplora_tab .pending, #ziplora_tab .generating:not(#ziplora_live *):not(#ziplora_live)"
        self.page.wait_for_function(f"!document.querySelector('{busy}')", timeout=120_000)
        self.page.wait_for_timeout(700)

    def write(self, field: str, value: str) -> None:
        self.text(field).fill(value)
        self.text(field).blur()
        self.settle()

    def advanced(self) -> None:
        if not self("resolution").is_visible():
            self.page.click("#ziplora_advanced > .label-wrap")
            self("resolution").wait_for(state="visible")

    def set(self, **fields) -> None:
        """Settings, by field of the recipe."""
        self.advanced()
        for field, value in fields.items():
            if isinstance(value, bool):
                self.page.locator(f"#ziplora_{field} input").set_checked(value)
            elif isinstance(value, int | float):
                self.number(field).fill(str(value))
                self.number(field).blur()
            elif (choice := self.page.locator(f"#ziplora_{field} input[value='{value}']")).count():
                choice.check()
            else:
                self.text(field).fill(value)
                self.text(field).blur()
        self.settle()

    def pair(self, output: str, subject: str = "tab-subject", style: str = "tab-style", **fields) -> None:
        """Both LoRAs picked, with these settings; ready for Zip."""
        self("refresh").click()
        self.settle()
        self.pick(1, subject)
        self.pick(2, style)
        self.write("output", output)
        if fields:
            self.set(**fields)

    def start(self, button: str = "zip") -> None:
        """Presses a button that starts a job, and waits until it has."""
        self(button).click()
        begun = "document.querySelector('#ziplora_zip').disabled || document.querySelector('#ziplora_said .error')"
        self.page.wait_for_function(begun, timeout=30_000)
        said = self("said").inner_text().strip()
        assert said == "", said

    def zip(self, until: str = "ended") -> list[str]:
        """Presses Zip; returns the texts on the progress bar until it ended, or one of them contains `until`."""
        self.start()
        seen: list[str] = []
        end = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < end:
            for text in self.page.locator("#ziplora_tab .progressDiv").all_inner_texts():
                if text not in seen:
                    seen.append(text)
                if until in text:
                    return seen
            if self("zip").is_enabled():
                return seen
            time.sleep(0.1)
        raise AssertionError(f"neither ended nor at {until!r}: {seen}")

    def ended(self) -> str:
        """Waits until the job ended; the result of a merge as text."""
        self.page.wait_for_function("!document.querySelector('#ziplora_zip').disabled", timeout=PATIENCE)
        self.settle()
        assert not self("stop").is_visible()
        return self("summary").inner_text()

    def red(self) -> str:
        """The red text."""
        self.page.wait_for_selector("#ziplora_tab .error", timeout=30_000)
        return " ".join(self.page.locator("#ziplora_tab .error").all_inner_texts())
