"""The hooked model: loading, tokens, edits as values, the engine and its oracle, decoding, memory, adapters, chat.

Knows prompts as values. Does NOT know what is asked about a concept, outcomes or studies.
"""
