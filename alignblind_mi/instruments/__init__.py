"""What a representation says and what an answer depends on: patchscope, lenses, probes, attention, patching, attribution, path patching.

Knows models. Does NOT know what a study asks, nor outcomes.
"""
