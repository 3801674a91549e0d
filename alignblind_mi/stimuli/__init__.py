"""What is asked and what an answer says: concepts as data, prompts, the rules that judge answers, lexicons, released files.

Knows nothing above it: no model, no study.
"""
