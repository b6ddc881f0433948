"""Run by the WebUI at every launch: says what is missing. Installs nothing; a stock WebUI has all that is needed."""

from importlib.util import find_spec

NEEDED = ("torch", "safetensors", "gradio", "numpy", "pydantic", "PIL", "psutil")
missing = [name for name in NEEDED if find_spec(name) is None]
if missing:
    print(
        f"ZipLoRA: not found in the WebUI's environment: {', '.join(missing)}. Start the WebUI once without "
        "--skip-install so that it installs its own requirements."
    )
