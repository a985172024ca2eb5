"""The steps of the pipeline, in order: one thin module each, `run(params, root) -> metrics`.

A stage reads params.yaml and its inputs below ``root``, writes its outputs whole or not at all, writes
``metrics/STAGE.json`` and returns what is in it.
"""

from __future__ import annotations

STAGES = ("prepare", "base", "profile", "train", "evaluate", "report")
