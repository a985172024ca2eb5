"""The steps of the pipeline: one thin module each, `run(params, root) -> metrics`."""
