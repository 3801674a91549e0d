"""How sure a mean or a rate is: numbers and labels of clusters to the ends of intervals and p-values.

Does NOT know rows, outcomes, words or models.
"""
