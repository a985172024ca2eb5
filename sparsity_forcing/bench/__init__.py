"""Speed, measured side by side: `python -m sparsity_forcing.bench cpu` and `… gpu`."""
