"""What a person looks at: saved rows become tables, figures and self-contained HTML pages.

Knows the results of studies. Does NOT run models, nor know how rows were made.
"""
