"""The embedded model pairs: small base and aligned models with planted, known ground truth, one pair a concept; how they are built.

Calibration devices: they show whether the instruments recover what was planted. They are never evidence about Llama 3.
Knows models and stimuli. Does NOT know studies.
"""
