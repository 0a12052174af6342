"""Rows of metrics as plain names and numbers."""


def flat(row):
    """Numbers by reward under one name each: ``{"rewards": {"a": {"mean": 1}}}`` -> ``{"rewards/a/mean": 1}``."""
    nested = {f"{k}/{name}": v for k, values in row.items() if isinstance(values, dict) for name, v in values.items()}
    return flat(nested | {k: v for k, v in row.items() if not isinstance(v, dict)}) if nested else row
