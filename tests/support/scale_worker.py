"""Workers for tests: `python -m tests.support.scale_worker ADDRESS RULES` answers without llama.cpp.

RULES is JSON: {"seconds": 0.05, "die": [cell numbers], "hang": […], "timeout": {"3": 1}, "machine": "x",
"tree": "…", "lie": […], "trouble": […], "ok": true,
"trail": file that begun cells are noted in}. Everything but the measurement is the real worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from turbo_eval.records.provenance import Provenance
from turbo_eval.scale import overhead
from turbo_eval.scale.wire import Admit, Admitted, Measure, Measured
from turbo_eval.scale.worker.cells import Device, find_device, serve
from turbo_eval.scale.worker.content import RefusedError


class Rules(overhead.Sleeper):
    def __init__(self, device: Device, rules: dict[str, Any]) -> None:
        super().__init__(device)
        self.rules = rules
        self.seconds = float(rules.get("seconds", 0.05))
        self.timeouts: dict[str, int] = dict(rules.get("timeout", {}))

    def provenance(self) -> Provenance:
        made = overhead._provenance()
        here = made.machine.model_copy(update={"id": self.device.machine})
        return made.model_copy(update={"machine": here, "tree": self.rules.get("tree", made.tree)})

    def _admit(self, asked: Admit) -> Admitted:
        return Admitted(provenance=self.provenance())

    def _measure(self, asked: Measure) -> Measured:
        number = asked.cell.options["number"]
        if "trail" in self.rules:
            with Path(self.rules["trail"]).open("a") as trail:
                trail.write(f"{number}\n")
        if number in self.rules.get("trouble", []):
            raise RefusedError("its disk is on fire")
        if number in self.rules.get("die", []):
            self.say({"ticket": asked.ticket, "event": "begin", "worker": self.address()})
            time.sleep(0.3)  # the event gets out
            os.kill(os.getpid(), signal.SIGKILL)
        if number in self.rules.get("hang", []):
            self.say({"ticket": asked.ticket, "event": "begin", "worker": self.address()})
            follow = self._follow(asked.ticket)
            while True:
                time.sleep(0.05)
                follow(1, 2, 3.0)
        measured = super()._measure(asked)
        assert measured.record is not None
        update: dict[str, Any] = {"provenance": self.provenance()}
        if number in self.rules.get("lie", []):
            update["key"] = "0" * 16
        if self.timeouts.get(str(number), 0) > 0:
            self.timeouts[str(number)] -= 1
            update |= {"status": "timeout", "detail": "no result within 1 s"}
        if self.rules.get("ok") and update.get("status") is None:
            update |= {"status": "ok", "detail": "", "ppl": 10.0 + number, "ppl_err": 1.0}
        record = measured.record.model_copy(update=update)
        return measured.model_copy(update={"record": record, "log": f"log of {number}\n"})


if __name__ == "__main__":
    rules = json.loads(sys.argv[2])
    device = find_device("cpu")
    if "machine" in rules:
        device = replace(device, machine=rules["machine"])
    asyncio.run(serve(sys.argv[1], Rules(device, rules)))
