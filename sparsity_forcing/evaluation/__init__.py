"""Measures accuracy and token ratios: the lmms-eval model, local tasks, the benchmark table, profiles against p."""
