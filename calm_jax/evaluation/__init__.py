"""Protocols, metrics and pages that say how good a model is. Stands on inference and data."""
