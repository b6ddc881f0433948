"""What the sections of the tab share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ziplora_lib.errors import BadInput
from ziplora_lib.hosts.host import Host
from ziplora_lib.jobs import Job
from ziplora_lib.later import later
from ziplora_lib.naming import sendable
from ziplora_lib.tab.running import Runner

if TYPE_CHECKING:
    from ziplora_lib.catalogue import Catalogue

catalogues = later("ziplora_lib.catalogue")


@dataclass
class Place:
    """The host, its jobs (shared with the API), who runs them, and what is known of the LoRAs.

    overwriting: whether a LoRA that is there may be replaced.
    """

    host: Host
    jobs: dict[str, Job]
    runner: Runner
    overwriting: bool = True

    @cached_property
    def catalogue(self) -> Catalogue:
        return catalogues.Catalogue(self.host)

    def names(self) -> list[str]:
        """The LoRAs that can be picked; none, and a line in the console, where the host has none to list."""
        try:
            return [name for name in self.host.loras() if sendable(name)]
        except BadInput as error:
            print(f"ZipLoRA: {error}")
            return []
