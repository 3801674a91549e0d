"""The command line's verbs that have a file of their own: plain functions, registered in `__main__`."""
