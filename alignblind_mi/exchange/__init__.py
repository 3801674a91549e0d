"""What passes to and from other evaluation frameworks: Inspect's tasks and logs, lm-evaluation-harness's task files and steered models.

Knows prompts, judges, measures and steering vectors. Does NOT know studies, pages or how a served model is reached; the frameworks are
optional, and imported where they are used.
"""
