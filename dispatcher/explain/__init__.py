"""Explanations for people: `flexlb explain`, and what `flexlb simulate --explain` prints."""
