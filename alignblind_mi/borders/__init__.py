"""What comes in and what goes out: numbers that are refused, files that are not ours, texts that are data.

Knows nothing of what this project is about.
"""
