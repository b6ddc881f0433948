"""Files that a page sends: what was uploaded to this server, and no other file of it, whatever a request names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

# files in one go
MOST = 64


class Upload(gr.File):
    """A File of gradio 3, which by itself copies any file that a request names to where the page can fetch it."""

    is_template = True  # to the page it is a File

    def preprocess(self, x: Any) -> Any:
        files = x if isinstance(x, list) else [] if x is None else [x]
        if len(files) > MOST:
            raise gr.Error(f"More than {MOST} files at once are not taken")
        if not all(self._was_uploaded(file) for file in files):
            raise gr.Error("This file was not uploaded here")
        return super().preprocess(x)

    def _was_uploaded(self, file: Any) -> bool:
        """Whether it is where uploads go, or comes with the request itself."""
        try:
            place = Path(self.DEFAULT_TEMP_DIR).resolve()
            return not file.get("is_file", False) or Path(file["name"]).resolve().is_relative_to(place)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # no path, or no file's description at all
            return False


if not gr.__version__.startswith("3."):
    Upload = gr.File  # newer ones look for themselves
