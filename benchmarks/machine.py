"""What figures were measured on."""

import os
import platform
import sys


def machine() -> dict[str, str | int | None]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
    }
