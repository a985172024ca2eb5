"""Rows of questions about images: one schema, the sources that fill it, and the quarantine for what does not fit."""
