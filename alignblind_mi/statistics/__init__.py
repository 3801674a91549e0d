"""Tables to tables: rates, paired differences, the mixed model, power, the frontier.

Knows numbers and the names of outcomes. Does NOT know models or texts.
"""
