"""Runs that are configured, can be resumed and carry their provenance: the study, the comparison, the calibration, the doctor, forecasts.

Knows measures and mitigations. Does NOT know how anything is drawn.
"""
