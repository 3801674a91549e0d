"""The command line: one thin verb a module, and what verbs share (option types, how tables are printed).

Knows pages and studies. Does NOT know how anything is computed.
"""
