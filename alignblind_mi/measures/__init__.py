"""One function a question: a model and a concept become tidy rows (behaviour, awareness, patching, side effects, mitigations, BBQ).

Knows instruments, mitigations and stimuli. Does NOT know folders, resuming or configurations.
"""
